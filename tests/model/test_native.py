"""The native engine: PyTorch's logits, and a row's own bits whatever shares its forward."""

import functools
import gc
import json
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.worlds import MASK, as_packed, native_forward, random_lora, random_tensors, random_transformer, tiny_config
from trimode.engine.language_model import LanguageModel
from trimode.model import native
from trimode.model.attention import Span
from trimode.model.config import RopeConfig
from trimode.model.forward import Inputs, TorchForward
from trimode.model.views import Bidirectional, BlockOverCausal, Causal, VerifyAndPredraft

pytestmark = pytest.mark.skipif(not native.available(), reason="the native engine was not built")

KERNELS = native.kernel_names()
LLAMA3 = RopeConfig(kind="llama3", factor=8.0, original_max_positions=16)
YARN = RopeConfig(kind="yarn", factor=4.0, original_max_positions=8, llama4_beta=0.1)
ODD = {"width": 24, "mlp_width": 40, "vocab_size": 97, "num_heads": 6, "num_kv_heads": 2, "head_size": 6}
CONFIGS = {
    "grouped queries": {},
    "a head for each query": {"num_kv_heads": 4},
    "one head for all": {"num_kv_heads": 1},
    "biases": {"qkv_bias": True, "output_bias": True, "mlp_bias": True},
    "qk-norm": {"qk_norm": True},
    "tied head": {"tied_head": True},
    "llama3 rope": {"rope": LLAMA3},
    "yarn and llama4 rope": {"rope": YARN},
    "linear rope": {"rope": RopeConfig(kind="linear", factor=3.0)},
    "odd sizes": ODD,
    "odd sizes, all at once": {
        **ODD,
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "qk_norm": True,
        "rope": YARN,
    },
    "wider than a panel": {"width": 160, "mlp_width": 288, "num_heads": 5, "num_kv_heads": 1, "head_size": 48},
    "wide heads": {"head_size": 80},
}
ALL_PARTS = ("query", "key", "value", "output", "gate", "up", "down")


def step(forward, cache, tokens, *, cached=0, view=None, slot=0, adapted=()):
    """Logits [T, V] of one row's forward."""
    return together(forward, cache, [(slot, cached, tokens, view or Causal(), adapted)])[0]


def together(forward, cache, rows):
    """Logits of each (slot, cached, tokens, view, adapted) of one forward, copied."""
    tokens, positions, spans, adapted = [], [], [], []
    for slot, cached, row, view, here in rows:
        start = len(tokens)
        spans.append(Span(start=start, length=len(row), slot=slot, cached=cached, view=view))
        tokens += row
        positions += [cached + offset for offset in view.offsets(len(row))]
        adapted += [start + i for i in here]
    asked = list(range(len(tokens)))
    inputs = Inputs(tokens=tokens, positions=positions, spans=spans, adapted=adapted, asked=asked)
    logits = forward(inputs, cache).logits(0, len(tokens)).float().clone()
    return [logits[s.start : s.start + s.length] for s in spans]


def views_over(prefix, block):
    """A step of each view: cached inputs, inputs, view."""
    masks = [MASK] * 4
    yield "causal", 0, prefix + block, Causal()
    yield "causal behind a prefix", len(prefix), block, Causal()
    yield "bidirectional", len(prefix), block[:1] + masks, Bidirectional()
    yield "block over causal", len(prefix), block + masks, BlockOverCausal(len(block))
    yield "quadratic", len(prefix), block + masks * len(block), VerifyAndPredraft(len(block), 4)


def both(changes, precision="float32", adapter=False, kernels=None):
    config = tiny_config(**changes)
    tensors = random_tensors(config, 2)
    lora = random_lora(config, ALL_PARTS, rank=5) if adapter else None
    seen = (
        lora
        if lora is None or precision not in ("int8", "s8")
        else as_packed(lora, "s8" if precision == "s8" else "u4")
    )
    torch_forward = TorchForward(random_transformer(config, 2), lora=seen)
    return torch_forward, native_forward(config, tensors, precision=precision, lora=lora, kernels=kernels)


def compare(expected, actual, adapter):
    """Pairs of logits for a step of each view, and the view's name."""
    prefix, block = [5, 9, 1, 17, 30, 8, 22, 4, 11], [7, 12, 39]
    caches = [forward.make_cache([7, 40]) for forward in (expected, actual)]
    for name, cached, tokens, view in views_over(prefix, block):
        adapted = [i for i, token in enumerate(tokens) if token == MASK] if adapter else []
        if adapter and not adapted:
            adapted = list(range(0, len(tokens), 2))
        pair = []
        for forward, cache in zip((expected, actual), caches, strict=True):
            if cached:
                step(forward, cache, prefix, slot=1)
            pair.append(step(forward, cache, tokens, cached=cached, view=view, slot=1, adapted=adapted))
        yield name, *pair


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("adapter", [False, True], ids=["plain", "adapted"])
@pytest.mark.parametrize("case", CONFIGS)
def test_float32_logits_are_those_of_torch_in_every_view(case, adapter, kernels):
    for view, expected, found in compare(*both(CONFIGS[case], adapter=adapter, kernels=kernels), adapter):
        # float32: sums in another order; the logits are about 3 in size
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4, msg=lambda m, v=view: f"{v}: {m}")


# Relative distance of all logits of a view. Random weights of this size turn softmaxes around: what they were seen to make of the
# rounding of bfloat16 (2^-9) was at most 0.024, of int8's (1/254 of the greatest of 32 weights or activations) 0.207, of s8's (of up to
# 192 weights) 0.277. Adapters are compared as they are once rounded. That a product is exactly what its format says is another test's
# business.
TOLERANCE = {"bfloat16": 0.05, "int8": 0.25, "s8": 0.45}


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("adapter", [False, True], ids=["plain", "adapted"])
@pytest.mark.parametrize("case", CONFIGS)
def test_narrower_weights_stay_near(case, adapter, precision):
    for view, expected, found in compare(*both(CONFIGS[case], precision, adapter), adapter):
        distance = float((found - expected).norm() / expected.norm())
        assert 0 < distance < TOLERANCE[precision], (view, distance)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("kind", ["u8", "u4", "bfloat16"])
def test_a_product_is_what_the_format_says(kind, kernels):
    # the head alone: weights as `row` gives them back, activations rounded to 127ths of the greatest of each 32
    config = tiny_config(vocab_size=97, width=96, mlp_width=64)
    precision = {"u8": "int8", "u4": "u4", "bfloat16": "bfloat16"}[kind]
    tensors = random_tensors(config, 7)
    forward = native_forward(config, tensors, precision=precision, kernels=kernels)
    matrix = forward._kept[-1]
    weights = np.stack([matrix.row(i) for i in range(97)]).astype(np.float64)
    dense = dict(tensors)["head.weight"].numpy()
    step_size = {"u8": 1 / 250, "u4": 1 / 14, "bfloat16": 1 / 256}[kind]
    assert np.abs(weights - dense).max() <= step_size * 2 * np.abs(dense).max()
    hidden = np.random.default_rng(0).normal(size=(7, 96)).astype(np.float32)
    seen = hidden.astype(np.float64)
    if kind != "bfloat16":
        groups = hidden.reshape(7, 3, 32)
        most = np.abs(groups).max(axis=-1, keepdims=True)
        seen = (np.rint(groups * (np.float32(127) / most)).astype(np.float64) * (most / np.float32(127))).reshape(7, 96)
    answers = forward.head(hidden)
    expected = seen @ weights.T
    np.testing.assert_allclose(answers.logits.numpy(), expected, atol=2e-5)
    masked = expected.copy()
    masked[:, MASK] = -np.inf
    assert list(answers.best) == masked.argmax(axis=-1).tolist()
    np.testing.assert_allclose(answers.logsumexp.numpy(), np.log(np.exp(expected).sum(axis=-1)), atol=1e-5)


@pytest.mark.parametrize("adapter", [False, True], ids=["plain", "adapted"])
def test_the_adapter_acts_on_the_named_inputs_alone(adapter):
    _, forward = both(CONFIGS["odd sizes"], adapter=True)
    plain = step(forward, forward.make_cache([16]), [5, 6, 7, 8])
    acted = step(forward, forward.make_cache([16]), [5, 6, 7, 8], adapted=[2, 3] if adapter else [])
    assert torch.equal(plain[:2], acted[:2])
    assert torch.equal(plain[2:], acted[2:]) is not adapter


@functools.cache
def _for_the_property(precision, kernels, threads=1):
    sizes = {"width": 32, "mlp_width": 64} if precision == "u4" else ODD
    config = tiny_config(**{**sizes, "vocab_size": 97, "rope": YARN})
    lora = random_lora(config, ALL_PARTS, rank=5)
    return native_forward(
        config, random_tensors(config, 4), precision=precision, lora=lora, kernels=kernels, threads=threads
    )


@st.composite
def texts(draw):
    """Prompts in pieces, each with a last step of some view; and in which order the pieces meet in forwards."""
    rows = []
    for _ in range(draw(st.integers(1, 5))):
        tokens = draw(st.lists(st.integers(4, 96), min_size=1, max_size=24))
        num_known = draw(st.integers(0, 3))
        known = draw(st.lists(st.integers(4, 96), min_size=num_known, max_size=num_known))
        masks = draw(st.integers(1, 9))
        kind = draw(st.sampled_from(["causal", "both ways", "block over causal", "quadratic"]))
        if kind == "quadratic":
            known = known or [6]
            last, view = known + [MASK] * masks * len(known), VerifyAndPredraft(len(known), masks)
        else:
            last = known + [MASK] * masks
            view = {"causal": Causal(), "both ways": Bidirectional(), "block over causal": BlockOverCausal(num_known)}[
                kind
            ]
        cuts = sorted(draw(st.sets(st.integers(1, len(tokens) - 1), max_size=4))) if len(tokens) > 1 else []
        pieces = [tokens[a:b] for a, b in zip([0, *cuts], [*cuts, len(tokens)], strict=True)]
        rows.append((tokens, pieces, last, view, [i for i, t in enumerate(last) if t == MASK]))
    return rows


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8", "u4", "s8", "mixed"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=texts())
def test_a_rows_logits_are_the_same_bits_alone_and_in_any_batch_at_any_split(precision, kernels, rows):
    forward = _for_the_property(precision, kernels)
    alone = []
    for tokens, _, last, view, adapted in rows:
        cache = forward.make_cache([len(tokens) + len(last)])
        prompt = step(forward, cache, tokens)
        alone.append((prompt, step(forward, cache, last, cached=len(tokens), view=view, adapted=adapted)))
    cache = forward.make_cache([len(tokens) + len(last) for tokens, _, last, _, _ in rows])
    seen = [[] for _ in rows]
    for turn in range(max(len(pieces) for _, pieces, *_ in rows) + 1):
        batch, owners = [], []
        for slot, (tokens, pieces, last, view, adapted) in enumerate(rows):
            if turn < len(pieces):
                batch.append((slot, sum(map(len, pieces[:turn])), pieces[turn], Causal(), ()))
            elif turn == len(pieces):
                batch.append((slot, len(tokens), last, view, adapted))
            else:
                continue
            owners.append(slot)
        for owner, logits in zip(owners, together(forward, cache, batch), strict=True):
            seen[owner].append(logits)
    for (prompt, last), pieces in zip(alone, seen, strict=True):
        assert torch.equal(torch.cat(pieces[:-1]), prompt)
        assert torch.equal(pieces[-1], last)


@pytest.mark.parametrize("precision", ["float32", "int8", "s8", "mixed"])
def test_any_number_of_threads_gives_the_same_bits(precision):
    # more rows than stay near at once, and runs of adapted ones that begin anywhere
    changes = {**CONFIGS["wider than a panel"], "vocab_size": 4000}
    tokens = [(37 * i) % 4000 for i in range(230)]
    adapted = [3, 9, 60, 61, 62, *range(180, 205), 228, 229]
    results = []
    for threads in (1, 2, 3):
        config = tiny_config(**changes)
        lora = random_lora(config, ALL_PARTS)
        forward = native_forward(config, random_tensors(config, 1), precision=precision, threads=threads, lora=lora)
        assert forward.threads == threads
        runs = [step(forward, forward.make_cache([240]), tokens, adapted=adapted) for _ in range(8)]
        assert all(torch.equal(run, runs[0]) for run in runs)
        results.append(runs[0])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_the_reference_vectors_are_met():
    import trimode

    golden = Path(__file__).parents[1] / "golden" / "nld_tiny"
    model = trimode.load(golden, backend="native")
    assert model.precision == "float32"
    exact = trimode.load(golden, backend="torch")
    for case in json.loads((golden / "cases.json").read_text())[:40]:
        ids = case["prompt"] if "prompt" in case else case["prompt_ids"]
        # float32: sums in another order
        torch.testing.assert_close(model.logits(ids), exact.logits(ids), atol=1e-4, rtol=1e-4)
        for draft_lora in (False, True):
            asked = {"view": "block", "prefix": len(ids) // 2, "draft_lora": draft_lora}
            torch.testing.assert_close(model.logits(ids, **asked), exact.logits(ids, **asked), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", "quadratic", "lookup"])
def test_greedy_self_speculation_of_the_embedded_model_equals_autoregression_in_int8(kind):
    import trimode
    from trimode.engine.request import Request

    model = trimode.load("smollm2-135m", quantize="int8", threads=2)
    lines = (Path(__file__).parents[1] / "data" / "prompts.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines[::3]][:6]
    expected = [model.generate(prompt, mode="ar", max_new_tokens=48).token_ids for prompt in prompts]
    knobs = {"mode": "self_spec", "self_spec_kind": kind, "max_new_tokens": 48}
    assert [model.generate(prompt, **knobs).token_ids for prompt in prompts] == expected
    assert [out.token_ids for out in model.generate([Request(p) for p in prompts], **knobs)] == expected


def tiny_native(seed=0, precision="int8", threads=1, lora=None, **changes):
    config = tiny_config(**changes)
    tensors = random_tensors(config, seed)
    return LanguageModel(
        "tiny", native_forward(config, tensors, precision=precision, threads=threads, lora=lora), adapter=lora
    )


@pytest.mark.parametrize("kind", ["linear", "quadratic", "lookup"])
@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 3),
    prompts=st.lists(st.lists(st.integers(0, 39), min_size=1, max_size=12), min_size=1, max_size=4),
    block_length=st.integers(1, 9),
    adapter=st.sampled_from([None, "draft", "masks"]),
    precision=st.sampled_from(["bfloat16", "int8"]),
)
def test_greedy_self_speculation_equals_greedy_autoregression_in_narrow_precisions(
    kind, seed, prompts, block_length, adapter, precision
):
    lora = None if adapter is None else random_lora(tiny_config())
    model = tiny_native(seed, precision, lora=lora, adapter_acts_on=adapter or "draft")
    expected = [model.generate(prompt, mode="ar", max_new_tokens=20) for prompt in prompts]
    knobs = {"self_spec_kind": kind, "block_length": block_length, "max_new_tokens": 20}
    actual = model.generate([as_request(p) for p in prompts], mode="self_spec", **knobs)
    assert [a.token_ids for a in actual] == [e.token_ids for e in expected]


def as_request(prompt):
    from trimode.engine.request import Request

    return Request(prompt)


def test_engines_in_two_threads_at_once_give_their_own_results():
    models = [tiny_native(seed, threads=2) for seed in (0, 1)]
    prompts = [[5 + i, 9, 30 - i] for i in range(12)]

    def ids(job):
        model, prompt = job
        return model.generate(prompt, mode="self_spec", max_new_tokens=12).token_ids

    # the first model twice: two callers of one engine, too
    jobs = [(model, prompt) for prompt in prompts for model in (*models, models[0])]
    alone = [ids(job) for job in jobs]
    assert alone[0] != alone[1]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(ids, jobs)) == alone


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_gives_its_parents_results():
    forward = _for_the_property("int8", None, 2)
    tokens = list(range(4, 60))
    expected = step(forward, forward.make_cache([64]), tokens)
    with forward._lock:  # as if another thread of the parent were in the middle of a forward
        child = os.fork()
    if child == 0:
        code = 3
        try:
            signal.alarm(20)
            code = 0 if torch.equal(step(forward, forward.make_cache([64]), tokens), expected) else 1
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert status == 0
    assert torch.equal(step(forward, forward.make_cache([64]), tokens), expected)


def test_an_idle_engine_takes_no_processor_time():
    forward = _for_the_property("int8", None, 3)
    step(forward, forward.make_cache([64]), list(range(4, 60)))
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.02


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")
def test_memory_stays_flat_over_50_generations():
    model = tiny_native(0, vocab_size=4000, max_positions=8192)

    def run(count):
        for i in range(count):
            mode = ("ar", "diffusion", "self_spec")[i % 3]
            # a cache of 5,000 positions that nobody touches takes no memory, one that leaks would show in its pages
            model.generate([5] * 900, mode=mode, max_new_tokens=6)
        gc.collect()

    run(9)
    before = psutil.Process().memory_info().rss
    run(50)
    # one cache of these prompts is 0.12 MB and the logits of one step 0.1 MB
    assert psutil.Process().memory_info().rss - before < 3e6


def bad_calls():
    """What a caller may get wrong, one at a time."""
    from trimode import _native

    config = tiny_config()
    forward = native_forward(config, random_tensors(config))
    model = forward._model
    cache = model.make_cache(32, False)
    other = native_forward(tiny_config(num_layers=3), random_tensors(tiny_config(num_layers=3)))._model.make_cache(
        32, False
    )
    wide, u4 = _native.Matrix(0, 40, 32), _native.Matrix(3, 16, 32)
    sizes = [40, 32, 48, 2, 4, 2, 8]
    rest = [1e-5, 1.0, 0.0, 1]
    frequencies = np.ones(4, dtype=np.float32)
    good = [(0, 2, 0, 0, None)]

    def run(tokens=(5, 6), positions=(0, 1), spans=good, cache=cache, adapted=(), asked=(0,)):
        return lambda: model.run(list(tokens), list(positions), spans, cache, list(adapted), list(asked))

    def new(sizes=sizes, rest=rest, frequencies=frequencies, threads=1, kernels=KERNELS[0]):
        return lambda: _native.Model(*sizes, *rest, frequencies, threads, kernels)

    yield "no such format", lambda: _native.Matrix(9, 4, 32)
    yield "no rows", lambda: _native.Matrix(0, 0, 32)
    yield "negative", lambda: _native.Matrix(0, 4, -32)
    yield "too many rows", lambda: wide.pack_floats(0, np.zeros((41, 32), np.float32))
    yield "rows behind the end", lambda: wide.pack_floats(39, np.zeros((2, 32), np.float32))
    yield "rows before the first", lambda: wide.pack_floats(-1, np.zeros((2, 32), np.float32))
    yield "short rows", lambda: wide.pack_floats(0, np.zeros((2, 31), np.float32))
    yield "a vector", lambda: wide.pack_floats(0, np.zeros(32, np.float32))
    yield "blocks into floats", lambda: wide.pack_blocks(3, [0], bytes(20))
    yield "unknown blocks", lambda: u4.pack_blocks(7, [0], bytes(20))
    yield "blocks of another row", lambda: u4.pack_blocks(3, [16], bytes(20))
    yield "blocks cut off", lambda: u4.pack_blocks(3, [0], bytes(19))
    yield "a row behind the end", lambda: wide.row(40)
    yield "a row before the first", lambda: wide.row(-1)
    yield "borrowed too short", lambda: _native.Matrix.borrow(0, 40, 32, bytes(100))
    yield "borrowed in steps", lambda: _native.Matrix.borrow(0, 16, 32, np.zeros(4096, np.uint8)[::2])
    yield (
        "packing what is borrowed",
        lambda: _native.Matrix.borrow(0, 16, 32, bytes(2048)).pack_floats(0, np.zeros((1, 32), np.float32)),
    )
    yield "no layers", new([40, 32, 48, 0, 4, 2, 8])
    yield "heads that do not divide", new([40, 32, 48, 2, 4, 3, 8])
    yield "an odd head", new([40, 32, 48, 2, 4, 2, 7])
    yield "other frequencies", new(frequencies=np.ones(5, dtype=np.float32))
    yield "no threads", new(threads=0)
    yield "a million threads", new(threads=10**6)
    yield "no such kernels", new(kernels="sse9")
    yield "another embedding", lambda: model.set_embedding(_native.Matrix(0, 41, 32))
    yield "another head", lambda: model.set_head(_native.Matrix(0, 40, 64))
    yield "a short norm", lambda: model.set_norm(np.ones(31, np.float32))
    yield "no norm", lambda: model.set_norm(None)
    yield "a layer that is not there", lambda: model.set_norms(2, np.ones(32), np.ones(32), None, None)
    yield "a layer before the first", lambda: model.set_norms(-1, np.ones(32), np.ones(32), None, None)
    yield "a norm of another head", lambda: model.set_norms(0, np.ones(32), np.ones(32), np.ones(7), None)
    yield "a map that is not there", lambda: model.set_map(0, 4, wide, None)
    yield "a map of another size", lambda: model.set_map(0, 0, wide, None)
    yield "a bias of another size", lambda: model.set_map(0, 1, _native.Matrix(0, 32, 32), np.ones(31))
    yield "an adapter of another width", lambda: model.set_adapter(0, 0, _native.Matrix(0, 4, 48), [(wide, 0, 0)])
    yield "an adapter without parts", lambda: model.set_adapter(0, 0, _native.Matrix(0, 4, 32), [])
    yield "an adapter beyond the outputs", lambda: model.set_adapter(0, 1, _native.Matrix(0, 4, 32), [(wide, 0, 0)])
    yield (
        "an adapter beyond its inputs",
        lambda: model.set_adapter(0, 1, _native.Matrix(0, 4, 32), [(_native.Matrix(0, 32, 33), 0, 0)]),
    )
    yield "another mask embedding", lambda: model.set_adapter_scale(1.0, np.ones(5))
    yield "a model without weights", lambda: new()().run([5], [0], [(0, 1, 0, 0, None)], cache, [], [])
    yield "a cache of no places", lambda: model.make_cache(0, False)
    yield "no inputs", run((), (), [])
    yield "too few positions", run(positions=(0,))
    yield "a token beyond the vocabulary", run((5, 40))
    yield "a negative token", run((5, -1))
    yield "a position beyond all", run(positions=(0, 2**31 - 1))
    yield "no spans", run(spans=[])
    yield "a span too many", run(spans=[*good, (2, 1, 16, 0, None)])
    yield "a span beyond the cache", run(spans=[(0, 2, 16, 15, None)])
    yield "a span far beyond", run(spans=[(0, 2, 16, 2**31 - 8, None)])
    yield "a span between blocks", run(spans=[(0, 2, 8, 0, None)])
    yield "a view of another size", run(spans=[(0, 2, 0, 0, np.ones((1, 2), np.uint8))])
    yield "an adapted input that is not there", run(adapted=(2,))
    yield "adapted out of order", run(adapted=(1, 0))
    yield "adapted twice", run(adapted=(1, 1))
    yield "asked for what is not there", run(asked=(-1,))
    yield "another model's cache", run(cache=other)
    yield (
        "hidden states of another width",
        lambda: model.head(np.zeros((2, 31), np.float32), -1, np.zeros((2, 48), np.float32), np.zeros(2, np.float32)),
    )
    yield (
        "room for too few logits",
        lambda: model.head(np.zeros((2, 32), np.float32), -1, np.zeros((2, 32), np.float32), np.zeros(2, np.float32)),
    )
    yield (
        "room for too few rows",
        lambda: model.head(np.zeros((2, 32), np.float32), -1, np.zeros((1, 48), np.float32), np.zeros(2, np.float32)),
    )
    yield (
        "room of another type",
        lambda: model.head(np.zeros((2, 32), np.float32), -1, np.zeros((2, 48)), np.zeros(2, np.float32)),
    )
    yield "copied from between", lambda: cache.copy(3, 16, 4)
    yield "copied beyond the end", lambda: cache.copy(0, 16, 17)
    yield "copied from before", lambda: cache.copy(-16, 0, 4)


def test_what_would_reach_beyond_memory_is_refused():
    for name, call in bad_calls():
        try:
            call()
        except (ValueError, IndexError, TypeError):
            continue
        pytest.fail(f"{name} was taken")


def test_a_model_may_be_used_though_a_call_before_was_refused():
    forward = _for_the_property("int8", None, 2)
    expected = step(forward, forward.make_cache([16]), [5, 6])
    with pytest.raises(ValueError):
        step(forward, forward.make_cache([16]), [5, 97])
    assert torch.equal(step(forward, forward.make_cache([16]), [5, 6]), expected)
