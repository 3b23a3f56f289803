"""The static forward, which a GPU captures: padded to buckets, told everything in one tensor, and yet the ordinary forward.

The oracle is the ordinary path (`CachedAttention`, adapter rows by index). Sums over padded keys run in another order, so float32
results agree to a few units of the last places; arg-maxima of these worlds are far from ties.
"""

import itertools
from functools import partial
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.worlds import MASK, random_lora, random_tensors, random_transformer, tiny_config
from trimode.model import static
from trimode.model.attention import KERNELS, Span
from trimode.model.cache import Memory
from trimode.model.config import RopeConfig
from trimode.model.forward import Inputs, TorchForward
from trimode.model.graphs import CudaCapture, KernelChoice, Rehearsal
from trimode.model.lora import ADAPTED_PARTS, Lora
from trimode.model.static import (
    MOST_INPUTS,
    Found,
    StaticShape,
    reach,
    run_static,
    shape_of,
    size_of_feed,
)
from trimode.model.transformer import Transformer
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
YARN = RopeConfig(theta=1e6, kind="yarn", factor=16.0, original_max_positions=16_384, llama4_beta=0.1)
QUADRATIC = VerifyAndPredraft(num_verified=3, num_masks=2)
STEPS = {
    "one token": [(7, 1, Causal())],
    "one token of an empty cache": [(0, 1, Causal())],
    "prompt": [(0, 11, Causal())],
    "verification": [(300, 5, Causal())],
    "verification that fills its bucket of keys": [(251, 5, Causal())],
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
    shape = (cache.starts[-1] + cache.lengths[-1], forward.config.num_kv_heads, forward.config.head_size)
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


# ---- what a GPU would refuse ------------------------------------------------------------------------------------------------


class Ops(TorchDispatchMode):
    """Notes every operation that runs, and the devices of what it makes."""

    def __init__(self):
        super().__init__()
        self.names = []
        self.devices = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        self.devices |= {t.device.type for t in tree_leaves(out) if isinstance(t, torch.Tensor)}
        return out


class WithoutDriver(TorchFunctionMode):
    """x[...], ~x and copy_ by operators: their usual way asks the CUDA driver for its device, and a build for CPUs has none."""

    OPERATORS: ClassVar = {
        torch.Tensor.copy_: torch.ops.aten.copy_.default,
        torch.Tensor.__invert__: torch.ops.aten.bitwise_not.default,
    }

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.OPERATORS:
            return self.OPERATORS[func](*args)
        if func is not torch.Tensor.__getitem__:
            return func(*args, **(kwargs or {}))
        x, index = args
        index = list(index) if isinstance(index, tuple) else [index]
        if ... in index:
            at = index.index(...)
            num_real = sum(i is not None for i in index) - 1
            index[at : at + 1] = [slice(None)] * (x.dim() - num_real)
        dim = 0
        for i in index:
            if i is None:
                x = x.unsqueeze(dim)
            elif isinstance(i, int):
                x = x.select(dim, i)
                continue
            else:
                start, stop, step = i.indices(x.shape[dim])
                x = torch.ops.aten.slice.Tensor(x, dim, start, stop, step)
            dim += 1
        return x


def on_a_pretended_gpu(shape, *, config=CONFIG, lora=None, dtype=torch.bfloat16):
    """Operations of one static forward over tensors that claim to lie on a GPU; mixing devices and looking at values raise."""
    with torch.no_grad(), FakeTensorMode(), WithoutDriver():
        transformer = Transformer(config, dtype=dtype, device="cuda")
        transformer._frequencies = torch.empty(config.head_size // 2, device="cuda")
        memory = Memory(config, 1024, dtype=dtype, device="cuda", spare=2)
        found = Found(
            torch.empty(shape.num_asked, config.width, dtype=dtype, device="cuda"),
            torch.empty(shape.num_asked, config.vocab_size, dtype=dtype, device="cuda"),
            torch.empty(3, shape.num_asked, dtype=torch.float64, device="cuda"),
        )
        tensors = static.Static(torch.empty(size_of_feed(shape), dtype=torch.int64, device="cuda"), found, memory)
        if lora is not None:
            lora = Lora(
                {
                    place: (
                        torch.empty(A.shape, dtype=dtype, device="cuda"),
                        torch.empty(B.shape, dtype=dtype, device="cuda"),
                    )
                    for place, (A, B) in lora.factors.items()
                },
                lora.scale,
                torch.empty(config.width, dtype=dtype, device="cuda"),
            )
        # the warm-up is where an adapter's factors are prepared
        run_static(transformer, lora, shape, tensors)
        with Ops() as ops:
            run_static(transformer, lora, shape, tensors)
    return ops


@pytest.mark.parametrize("adapted", ["none", "some", "all"])
@pytest.mark.parametrize(
    ("kernel", "sight"),
    [("plain", "any"), ("sdpa", "any"), ("flash", "causal"), ("flash", "all"), ("flash", "both")],
)
def test_nothing_in_a_captured_forward_leaves_the_gpu_or_asks_for_a_value(kernel, sight, adapted):
    shape = StaticShape(num_rows=2, length=8, num_keys=256, num_asked=16, adapted=adapted, kernel=kernel, sight=sight)
    every_option = tiny_config(qk_norm=True, qkv_bias=True, tied_head=True, rope=YARN)
    for config in (CONFIG, every_option):
        ops = on_a_pretended_gpu(shape, config=config, lora=random_lora(config, ADAPTED_PARTS))
        assert ops.devices == {"cuda"}
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "pin_memory", "item")
        assert not [name for name in ops.names if any(word in name for word in waits)]


def test_the_pretended_gpu_notices_a_tensor_of_the_cpu(monkeypatch):
    """Else the test above would say nothing."""
    monkeypatch.setattr(static, "find_best", lambda logits, but, numbers: logits + torch.ones(len(logits), 1))
    shape = StaticShape(num_rows=1, length=1, num_keys=256, num_asked=1)
    with pytest.raises(RuntimeError, match="device"):
        on_a_pretended_gpu(shape)
    monkeypatch.setattr(static, "find_best", lambda logits, but, numbers: logits.sum().item())
    with pytest.raises(RuntimeError, match="_local_scalar_dense"):
        on_a_pretended_gpu(shape)


def varlen(q, k, v, query_ends, key_starts, most_queries, most_keys, *, window_size, enable_gqa, seqused_k):
    """`torch.nn.attention.varlen.varlen_attn` as its documentation has it: row b's keys are the `seqused_k[b]` from `key_starts[b]`
    on; with a right window of 0 its last query sees them all and each earlier one a key less."""
    assert enable_gqa
    assert max(seqused_k) <= most_keys
    outs = []
    for b, (start, stop) in enumerate(itertools.pairwise(query_ends.tolist())):
        used, num, first = int(seqused_k[b]), stop - start, int(key_starts[b])
        assert num <= most_queries
        assert first + used <= len(k)
        visible = None
        if window_size == (-1, 0):
            visible = (torch.arange(used)[None, :] <= torch.arange(num)[:, None] + used - num)[None]
        one = (x.transpose(0, 1)[None] for x in (q[start:stop], k[first : first + used], v[first : first + used]))
        outs.append(KERNELS["plain"](*one, visible)[0].transpose(0, 1))
    return torch.cat(outs)


@pytest.mark.parametrize("step", STEPS)
def test_flash_attention_is_told_the_same_by_lengths(step, monkeypatch):
    """Its kernel needs a GPU; what it is told is checked against what its documentation says of it."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
    inputs = inputs_of(STEPS[step])
    expected, _ = run(forward(), STEPS[step], inputs)
    engine = forward(choice=KernelChoice("flash"))
    found, _ = run(engine, STEPS[step], inputs)
    torch.testing.assert_close(found.logits, expected.logits, atol=2e-5, rtol=2e-5)
    cache = filled(engine, STEPS[step])
    sights = {"any": ["quadratic", "all views at once"], "both": ["block over causal"]}
    sights["causal"] = ["prompt", "verification", "verification that fills its bucket of keys"]
    assert step in sights.get(shape_of(inputs, cache).sight, [step])


def test_flash_attention_never_reads_behind_the_memory():
    engine = forward(choice=KernelChoice("flash"))
    cache = engine.make_cache([1024])
    inputs = inputs_of([(1020, 3, Causal())])
    assert shape_of(inputs, cache).sight == "causal"
    inputs = inputs_of([(1015, 9, Causal())])
    assert shape_of(inputs, cache).length == 16
    assert shape_of(inputs, cache).sight == "any"


# ---- buckets and the feed ---------------------------------------------------------------------------------------------------


@given(st.integers(0, 5), st.integers(1, 5), st.integers(0, 12))
def test_three_integers_tell_every_view_of_decoding(known, masks, more):
    n = known + masks + more
    for view in (
        Causal(),
        Bidirectional(),
        BlockOverCausal(known),
        BlockCausal(masks),
        VerifyAndPredraft(known + 1, masks),
    ):
        length = (known + 1) * (masks + 1) if isinstance(view, VerifyAndPredraft) else n
        upto, first, stop = reach(view, length)[..., None]
        k = np.arange(length)
        assert np.array_equal((k < upto) | ((k >= first) & (k < stop)), visible_matrix(view, length).numpy())


def test_a_view_that_three_integers_do_not_tell_and_a_wide_step_take_the_ordinary_path():
    assert reach(NoisyAndClean(length=6, block_length=2), 12) is None
    engine = forward()
    for rows in ([(0, 12, NoisyAndClean(length=6, block_length=2))], [(0, MOST_INPUTS + 1, Causal())]):
        inputs = inputs_of(rows)
        expected, _ = run(forward(captured=False), rows, inputs)
        found, _ = run(engine, rows, inputs)
        assert torch.equal(found.logits, expected.logits)
        assert torch.equal(found.unread_best, without_mask(expected.logits).argmax(dim=-1))
    assert engine.capture.num_captures == 0


@given(st.integers(1, 3000))
def test_a_bucket_holds_its_number_and_pads_it_by_a_quarter_at_most(number):
    for least in (1, 256):
        bucket = static._bucket(number, least=least)
        assert bucket >= number
        assert static._bucket(bucket, least=least) == bucket
        assert bucket <= max(least, 1.25 * number) or number <= 32


# ---- what comes back --------------------------------------------------------------------------------------------------------


def without_mask(logits):
    logits = logits.clone()
    logits[:, MASK] = float("-inf")
    return logits


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("step", ["one token", "block over causal", "all views at once"])
def test_what_was_found_beside_the_logits_is_true_and_leaves_them_whole(step, pack):
    rows = STEPS[step]
    total = sum(length for _, length, _ in rows)
    asked = list(range(total))[::-2]
    inputs = inputs_of(rows, asked=asked)
    found, _ = run(forward(pack=pack), rows, inputs)
    expected, _ = run(forward(captured=False, pack=pack), rows, inputs)
    assert (expected.best, expected.unread_best, found.best) == (None, None, None)
    torch.testing.assert_close(found.logits, expected.logits, atol=2e-5, rtol=2e-5)
    assert torch.equal(found.unread_best, without_mask(expected.logits).argmax(dim=-1))
    total = expected.logits.logsumexp(dim=-1)
    torch.testing.assert_close(found.logsumexp.float(), total, atol=1e-5, rtol=1e-5)
    best = expected.logits.gather(-1, found.unread_best[:, None])[:, 0]
    torch.testing.assert_close(found.best_logits.float(), best, atol=1e-5, rtol=1e-5)


def test_garbage_in_another_row_and_in_the_scratch_position_reaches_nobody():
    """A NaN survives a zero weight, so what a row may not see must not be read."""
    rows = STEPS["a batch of tokens"]
    inputs = inputs_of(rows)
    expected, _ = run(forward(), rows, inputs)
    engine = forward()
    cache = filled(engine, rows)
    for tensor in (*cache.memory.keys, *cache.memory.values):
        for start, length, (cached, _, _) in zip(cache.starts, cache.lengths, rows, strict=True):
            tensor[start + cached : start + length] = float("nan")
        tensor[cache.memory.scratch] = float("nan")
        tensor[sum(cache.lengths) : cache.memory.num_positions] = float("nan")
    for _ in range(3):
        found = engine(inputs, cache).answers(0, 3)
        torch.testing.assert_close(found.logits, expected.logits, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("num_rows", [1, 64, 65, 130])
@pytest.mark.parametrize("but", [None, MASK])
def test_the_mask_token_never_wins_counts_in_the_sum_and_keeps_its_logit(num_rows, but):
    logits = torch.randn(num_rows, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    logits[::2, MASK] = 9.0
    before = logits.clone()
    numbers = torch.empty(3, num_rows, dtype=torch.float64)
    static.find_best(logits, but, numbers)
    assert torch.equal(logits, before)
    best = (before if but is None else without_mask(before)).argmax(dim=-1)
    assert torch.equal(numbers[0], best.double())
    assert torch.equal(numbers[1], before.gather(-1, best[:, None])[:, 0].double())
    assert torch.equal(numbers[2].float(), before.float().logsumexp(dim=-1))


# ---- on a real GPU ----------------------------------------------------------------------------------------------------------


def engines_of(kernel, dtype, device, capture):
    """An ordinary engine and one that captures, of the same weights."""
    config = tiny_config(head_size=16)  # the least that FlexAttention takes on a GPU
    lora = random_lora(config, ADAPTED_PARTS).to(torch.device(device)).to(dtype)
    transformer = Transformer(config, dtype=dtype)
    tensors = ((name, tensor.to(device, dtype)) for name, tensor in random_tensors(config))
    transformer.load(tensors, pack=False)
    given = {"lora": lora, "dtype": dtype, "device": device}
    yield TorchForward(transformer, **given)
    yield TorchForward(transformer, **given, capture=capture, choice=KernelChoice(kernel))


def check_replays(kernel, dtype, device, capture, tolerance):
    ordinary, captured = engines_of(kernel, dtype, device, capture)
    for step, rows in STEPS.items():
        total = sum(length for _, length, _ in rows)
        for which, adapted in ADAPTED.items():
            inputs = inputs_of(rows, adapted(total))
            expected, _ = run(ordinary, rows, inputs)
            for _ in range(3):  # as it is, captured, replayed
                found, _ = run(captured, rows, inputs)
                told = partial("{}, adapter {}: {}".format, step, which)
                torch.testing.assert_close(found.logits, expected.logits, atol=tolerance, rtol=tolerance, msg=told)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures for real, which needs a CUDA device")
@pytest.mark.parametrize("kernel", static.STATIC_KERNELS)
def test_graphs_that_were_captured_on_a_gpu_equal_the_ordinary_forward_there(kernel):
    # FlashAttention takes no float32. In bfloat16 two orders of the same sums differ by up to 0.13 here, of logits up to 7.
    dtype, tolerance = (torch.bfloat16, 0.25) if kernel == "flash" else (torch.float32, 1e-3)
    capture = CudaCapture(torch.device("cuda"))
    check_replays(kernel, dtype, "cuda", capture, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 0.25)])
def test_the_same_check_rehearsed(dtype, tolerance):
    check_replays("sdpa", dtype, "cpu", Rehearsal(), tolerance)
