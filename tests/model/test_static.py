"""The static forward, which a GPU captures: padded to buckets, told everything in one tensor, and yet the ordinary forward.

The oracle is the ordinary path (`CachedAttention`, adapter rows by index). Sums over padded keys run in another order, so float32
results agree to a few units of the last places; arg-maxima of these worlds are far from ties.
"""

import itertools

import pytest
import torch

from tests.worlds import MASK, random_lora, random_transformer, tiny_config
from trimode.model.attention import Span
from trimode.model.forward import Inputs, TorchForward
from trimode.model.graphs import KernelChoice, Rehearsal
from trimode.model.lora import ADAPTED_PARTS
from trimode.model.static import MOST_INPUTS, reach, shape_of
from trimode.model.views import (
    Bidirectional,
    BlockCausal,
    BlockOverCausal,
    Causal,
    NoisyAndClean,
    VerifyAndPredraft,
    visible_matrix,
)

CONFIG = tiny_config()
QUADRATIC = VerifyAndPredraft(num_verified=3, num_masks=2)
STEPS = {
    "one token": [(7, 1, Causal())],
    "one token of an empty cache": [(0, 1, Causal())],
    "prompt": [(0, 11, Causal())],
    "verification": [(300, 5, Causal())],
    "block": [(9, 4, Bidirectional())],
    "block over causal": [(9, 6, BlockOverCausal(2))],
    "quadratic": [(9, 9, QUADRATIC)],
    "a batch of tokens": [(3, 1, Causal()), (290, 1, Causal()), (0, 1, Causal())],
    "a batch of blocks": [(3, 5, Bidirectional()), (40, 5, Bidirectional())],
    "all views at once": [
        (3, 1, Causal()),
        (17, 6, BlockOverCausal(2)),
        (0, 9, QUADRATIC),
        (280, 4, Bidirectional()),
        (5, 8, Causal()),
    ],
}
ADAPTED = {"off": lambda n: [], "on": lambda n: list(range(n)), "mixed": lambda n: list(range(0, n, 2))}


def forward(*, lora=None, kernel=None, captured=True, pack=False, config=CONFIG, **options):
    transformer = random_transformer(config, pack=pack)
    return TorchForward(transformer, lora=lora, kernel=kernel, capture=Rehearsal() if captured else None, **options)


def inputs_of(step, adapted=(), asked=None, seed=0):
    """A step of rows (cached, length, view), with arbitrary tokens."""
    random = torch.Generator().manual_seed(seed)
    spans, tokens, positions = [], [], []
    for slot, (cached, length, view) in enumerate(step):
        spans.append(Span(len(tokens), length, slot, cached, view))
        tokens += torch.randint(4, 40, (length,), generator=random).tolist()
        positions += [cached + offset for offset in view.offsets(length)]
    asked = list(range(len(tokens))) if asked is None else asked
    return Inputs(tokens=tokens, positions=positions, spans=spans, adapted=adapted, asked=asked)


def filled(forward, step, slack=3, seed=1):
    """A cache whose slots hold arbitrary keys up to each row's cursor, the same for each engine."""
    cache = forward.make_cache([cached + length + slack for cached, length, _ in step])
    random = torch.Generator().manual_seed(seed)
    shape = (cache.starts[-1] + cache.lengths[-1], CONFIG.num_kv_heads, CONFIG.head_size)
    for tensor in (*cache.memory.keys, *cache.memory.values):
        tensor[: shape[0]] = torch.randn(shape, generator=random)
    return cache


def run(forward, step, inputs):
    cache = filled(forward, step)
    scores = forward(inputs, cache)
    kept = [
        tensor[start + cached : start + cached + length].clone()
        for tensor in (*cache.memory.keys, *cache.memory.values)
        for start, (cached, length, _) in zip(cache.starts, step, strict=True)
    ]
    return scores.answers(0, len(inputs.asked)), kept


@pytest.mark.parametrize("adapted", ADAPTED)
@pytest.mark.parametrize("step", STEPS)
def test_the_padded_static_forward_equals_the_ordinary_one(step, adapted):
    rows = STEPS[step]
    inputs = inputs_of(rows, ADAPTED[adapted](sum(length for _, length, _ in rows)))
    lora = random_lora(CONFIG, ADAPTED_PARTS)
    expected, expected_keys = run(forward(lora=lora, captured=False), rows, inputs)
    found, keys = run(forward(lora=lora), rows, inputs)
    torch.testing.assert_close(found.logits, expected.logits, atol=2e-5, rtol=2e-5)
    for own, theirs in zip(keys, expected_keys, strict=True):
        torch.testing.assert_close(own, theirs, atol=2e-5, rtol=2e-5)


@pytest.mark.filterwarnings("ignore:.*flex_attention.*")
@pytest.mark.parametrize("kernel", ["plain", "flex"])
@pytest.mark.parametrize("step", STEPS)
def test_each_static_kernel_equals_the_fused_one(step, kernel):
    inputs = inputs_of(STEPS[step])
    expected, _ = run(forward(), STEPS[step], inputs)
    found, _ = run(forward(kernel=kernel), STEPS[step], inputs)
    torch.testing.assert_close(found.logits, expected.logits, atol=2e-5, rtol=2e-5)
