"""How near the native engine's int8 forward comes to what this machine's memory allows, at the 3B shape with random weights.

    python benchmarks/cpu_floor.py [--layers 26] [--rounds 5] [--json]

The floor of a forward is the time that reading its weights takes at the bandwidth measured in the same run. Beside it, over the same
layers: PyTorch's own int8 products (fbgemm, per-channel weights, activations rounded per tensor), products alone. Fewer layers make a
smaller model of the same shape, and a shorter run. Variants take turns; medians.
"""

import argparse
import json
import statistics
import time
import warnings
from dataclasses import replace

import numpy as np
import torch

from trimode.checkpoint.packed_files import kind_of, panel_bytes
from trimode.checkpoint.presets import published_sizes
from trimode.device import has_tiles
from trimode.model.attention import Span
from trimode.model.config import ModelConfig, RopeConfig
from trimode.model.forward import Inputs
from trimode.model.native import NativeForward, borrowed_matrix
from trimode.model.views import Causal

LENGTHS = (1, 2, 4, 8, 16, 32)
CACHED = 256


def shape(num_layers: int) -> ModelConfig:
    """Nemotron-Labs-Diffusion 3B."""
    sizes = published_sizes("nvidia/Nemotron-Labs-Diffusion-3B")
    assert sizes is not None
    return replace(
        sizes,
        family="nemotron_labs_diffusion",
        num_layers=num_layers,
        rope=RopeConfig(theta=1e6),
        max_positions=4096,
        mask_token_id=100,
        eos_token_ids=(11,),
        tied_head=True,
    )


def random_matrix(num_outputs: int, num_inputs: int, random: np.random.Generator):
    """8-bit weights in the layout that the engine gives them here, every group with the same scale."""
    kind = kind_of(["BF16"], tiles=has_tiles())
    panels = random.integers(0, 256, (num_outputs // 16, panel_bytes(kind, num_inputs)), dtype=np.uint8)
    scales = panels[:, num_inputs * 16 :]
    scales[:] = np.full(scales.shape[1] // 2, 0.002, dtype=np.float16).view(np.uint8)
    return borrowed_matrix(kind, num_outputs, num_inputs, panels), panels.nbytes


def native(config: ModelConfig, random: np.random.Generator) -> tuple[NativeForward, int]:
    """The engine over random weights, and their bytes."""
    D, I = config.width, config.mlp_width  # noqa: E741
    sizes = {
        "qkv": ((config.num_heads + 2 * config.num_kv_heads) * config.head_size, D),
        "output": (D, config.num_heads * config.head_size),
        "gate_up": (2 * I, D),
        "down": (D, I),
    }
    forward = NativeForward(config, precision="int8")
    tensors, total = [], 0
    for i in range(config.num_layers):
        for name, size in sizes.items():
            matrix, num_bytes = random_matrix(*size, random)
            tensors.append((f"layers.{i}.{name}.weight", matrix))
            total += num_bytes
        tensors += [(f"layers.{i}.{name}_norm.weight", np.ones(D, np.float32)) for name in ("attention", "mlp")]
    matrix, num_bytes = random_matrix(config.vocab_size, D, random)
    forward.load([*tensors, ("embedding.weight", matrix), ("norm.weight", np.ones(D, np.float32))])
    return forward, total + num_bytes


def bandwidth(num_bytes: int) -> float:
    """Bytes a second that two sums over a large array read, the better of five."""
    memory = torch.ones(num_bytes // 8, dtype=torch.int64)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        memory.sum()
        seconds.append(time.perf_counter() - start)
    return memory.numel() * 8 / min(seconds)


class Fbgemm:
    """The linear maps of the same shape as PyTorch quantises them; all layers share one layer's weights four times over."""

    def __init__(self, config: ModelConfig) -> None:
        D, I = config.width, config.mlp_width  # noqa: E741
        q = (config.num_heads + 2 * config.num_kv_heads) * config.head_size
        sizes = [(q, D), (D, config.num_heads * config.head_size), (2 * I, D), (D, I)]
        self._num_layers = config.num_layers
        torch.backends.quantized.engine = "fbgemm"
        warnings.filterwarnings("ignore", "torch.quantize_per")  # it is what is compared with
        self._maps = [[self._packed(*size) for size in sizes] for _ in range(4)]
        self._head = self._packed(config.vocab_size, D)
        self._inputs = [size[1] for size in sizes]
        self._width = D

    @staticmethod
    def _packed(num_outputs: int, num_inputs: int):
        weight = torch.randn(num_outputs, num_inputs) * 0.02
        scales = weight.abs().amax(dim=1).double() / 127
        whole = torch.quantize_per_channel(weight, scales, torch.zeros(num_outputs, dtype=torch.long), 0, torch.qint8)
        return torch.ops.quantized.linear_prepack(whole, None)

    def __call__(self, num_rows: int) -> None:
        rows = {width: torch.randn(num_rows, width) for width in set(self._inputs)}
        for layer in range(self._num_layers):
            for packed, width in zip(self._maps[layer % 4], self._inputs, strict=True):
                torch.ops.quantized.linear_dynamic(rows[width], packed, False)
        torch.ops.quantized.linear_dynamic(rows[self._width], self._head, False)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=26)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    config = shape(given.layers)
    forward, num_bytes = native(config, np.random.default_rng(0))
    peer = Fbgemm(config)
    cache = forward.make_cache([CACHED + max(LENGTHS)])

    def run(T: int) -> None:
        positions = list(range(CACHED, CACHED + T))
        span = Span(0, T, 0, CACHED, Causal())
        inputs = Inputs(tokens=list(range(T)), positions=positions, spans=[span], asked=list(range(T)))
        forward(inputs, cache).answers(0, T)

    seconds: dict[tuple[str, int], list[float]] = {}
    rate = bandwidth(1 << 30)
    for number in range(-1, given.rounds):
        for T in LENGTHS:
            for name, work in (("native", run), ("fbgemm", peer)):
                start = time.perf_counter()
                work(T)
                if number >= 0:
                    seconds.setdefault((name, T), []).append(time.perf_counter() - start)
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    floor = num_bytes / rate
    report = {
        "layers": given.layers,
        "bytes": num_bytes,
        "bandwidth": rate,
        "floor_s": floor,
        "engine": forward.describe(),
        "rows": [
            {"T": T, "native_s": medians["native", T], "fbgemm_products_s": medians["fbgemm", T]} for T in LENGTHS
        ],
    }
    if given.json:
        print(json.dumps(report))
        return
    print(
        f"{forward.describe()}, {given.layers} layers, {num_bytes / 1e9:.2f} GB of weights, {CACHED} positions cached"
    )
    print(f"memory is read at {rate / 1e9:.1f} GB/s: the floor is {floor * 1e3:.0f} ms\n")
    print("  T   native ms   of the floor   of T=1   fbgemm ms, products alone")
    one = medians["native", 1]
    for T in LENGTHS:
        ms = medians["native", T]
        print(
            f"{T:3d} {ms * 1e3:11.1f} {ms / floor:14.2f} {ms / one:8.2f} {medians['fbgemm', T] * 1e3:27.1f}", flush=True
        )


if __name__ == "__main__":
    main()
