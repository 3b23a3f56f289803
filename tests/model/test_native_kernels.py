"""Law: each kernel set that this processor runs multiplies as numpy does, and gives a row the same bits in any company."""

from typing import Any

import numpy as np
import pytest

from trimode.device import has_tiles
from trimode.model.native import BLOCKS, GROUP, kernel_names, new_matrix

pytestmark = pytest.mark.skipif(not kernel_names(), reason="the engine was not built")

KINDS = ("float32", "bfloat16", "u8", "s8", "u4")
OUTPUTS, INPUTS = 72, 160
"""Half a panel behind two pairs of them, and an odd number of groups."""


def random_matrix(kind: str, inputs: int, rng: np.random.Generator) -> Any:
    matrix = new_matrix(kind, OUTPUTS, inputs)
    if kind == "u4" and inputs % GROUP == 0:  # GGUF's Q4_1: a scale and a least value, both halves, before 32 nibbles
        blocks = np.empty((OUTPUTS * inputs // GROUP, 20), np.uint8)
        blocks[:, :4] = rng.normal(size=(len(blocks), 2)).astype(np.float16).view(np.uint8)
        blocks[:, 4:] = rng.integers(0, 256, (len(blocks), 16))
        matrix.pack_blocks(BLOCKS["Q4_1"], list(range(OUTPUTS)), blocks.tobytes())
    else:
        matrix.pack_floats(0, rng.normal(size=(OUTPUTS, inputs)).astype(np.float32))
    return matrix


def rounded_to_8_bits(x: np.ndarray) -> np.ndarray:
    """What a product of integers sees of its inputs [T, inputs], as numbers of double precision."""
    groups = np.pad(x, ((0, 0), (0, -x.shape[1] % GROUP))).reshape(len(x), -1, GROUP)
    most = np.abs(groups).max(-1, keepdims=True)
    inverse = np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > 0)
    seen = np.rint(groups * inverse).astype(np.float64) * (most / np.float32(127))
    return seen.reshape(len(x), -1)[:, : x.shape[1]]


def rounded_to_14_bits(x: np.ndarray) -> np.ndarray:
    """The same for signed weights: one scale a row."""
    most = np.abs(x).max(-1, keepdims=True)
    inverse = np.divide(np.float32(16256), most, out=np.zeros_like(most), where=most > 0)
    return np.rint(x * inverse).astype(np.float64) * (most / np.float32(16256))


@pytest.mark.skipif(not has_tiles(), reason="this processor has no tiles of integers")
@pytest.mark.parametrize("inputs", [77, 576, 1536])
def test_tiles_give_the_bits_of_the_other_kernels(inputs: int) -> None:
    rng = np.random.default_rng(inputs)
    matrix = random_matrix("s8", inputs, rng)
    x = rng.normal(size=(21, inputs)).astype(np.float32)
    np.testing.assert_array_equal(matrix.multiply(x, "amx"), matrix.multiply(x, "avx512vnni"))


@pytest.mark.parametrize("kernels", kernel_names())
@pytest.mark.parametrize(("kind", "inputs"), [(kind, inputs) for kind in KINDS for inputs in (INPUTS, 77)])
def test_a_product_is_numpys_and_a_row_the_same_bits_in_any_company(kernels: str, kind: str, inputs: int) -> None:
    rng = np.random.default_rng(inputs)
    matrix = random_matrix(kind, inputs, rng)
    weights = np.stack([matrix.row(i) for i in range(OUTPUTS)]).astype(np.float64)
    x = rng.normal(size=(40, inputs)).astype(np.float32)
    x[3] = 0
    x[5, :GROUP] *= 1000
    seen = {"u8": rounded_to_8_bits, "u4": rounded_to_8_bits, "s8": rounded_to_14_bits}.get(kind, np.float64)(x)
    # float sums err by some units in the last place of what is added, not of the sum
    tolerance = 2e-6 * (np.abs(seen) @ np.abs(weights).T) + 1e-6
    alone = np.concatenate([matrix.multiply(x[i : i + 1], kernels) for i in range(len(x))])
    assert (np.abs(alone - seen @ weights.T) <= tolerance).all()
    for count in range(1, len(x) + 1):
        np.testing.assert_array_equal(matrix.multiply(x[-count:], kernels), alone[-count:])


def test_floats_rounded_to_4_bits_are_within_half_a_step_of_each_group() -> None:
    rng = np.random.default_rng(4)
    rows = (rng.normal(size=(OUTPUTS, 77)) + rng.normal(size=(OUTPUTS, 1))).astype(np.float32)
    rows[7] = 0.25
    matrix = new_matrix("u4", OUTPUTS, 77)
    matrix.pack_floats(0, rows)
    for i, row in enumerate(rows):
        for group in (slice(0, 32), slice(32, 64), slice(64, 77)):
            least, most = row[group].min(), row[group].max()
            # and what halves make of a scale and a least value
            allowed = (most - least) / 30 + 2**-11 * (abs(least) + most - least)
            assert np.abs(matrix.row(i)[group] - row[group]).max() <= 1.01 * allowed + 1e-7, (i, group)
