"""Law 1: with a cache = without one, at any split."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.worlds import random_transformer, tiny_config
from trimode.model.attention import CachedAttention, SelfAttention, Span
from trimode.model.cache import KeyValueCache
from trimode.model.config import RopeConfig
from trimode.model.views import Bidirectional, BlockOverCausal, Causal

CONFIG = tiny_config(rope=RopeConfig(kind="yarn", factor=4.0, original_max_positions=8, llama4_beta=0.1))
MODEL = random_transformer(CONFIG)


def run(cache, slot, cached, tokens, view, kernel="sdpa"):
    span = Span(0, len(tokens), slot, cached, view)
    positions = torch.arange(cached, cached + len(tokens))
    with torch.inference_mode():
        hidden = MODEL(torch.tensor(tokens), positions, CachedAttention([span], cache, kernel, "cpu"))
        return MODEL.logits(hidden)


def whole(tokens, view):
    with torch.inference_mode():
        attend = SelfAttention(view, 1, len(tokens), "plain", "cpu")
        return MODEL.logits(MODEL(torch.tensor(tokens), torch.arange(len(tokens)), attend))


@settings(max_examples=40, deadline=None)
@given(data=st.data(), tokens=st.lists(st.integers(0, 39), min_size=2, max_size=24))
def test_a_text_in_any_pieces_through_the_cache_gives_the_logits_of_the_whole(data, tokens):
    cuts = sorted(data.draw(st.sets(st.integers(1, len(tokens) - 1))) if len(tokens) > 1 else set())
    cache = KeyValueCache(CONFIG, [7, len(tokens)], dtype=torch.float32)
    pieces = [tokens[a:b] for a, b in zip([0, *cuts], [*cuts, len(tokens)], strict=True)]
    logits, done = [], 0
    for piece in pieces:
        logits.append(run(cache, 1, done, piece, Causal()))
        done += len(piece)
    # float32: sums in another order
    torch.testing.assert_close(torch.cat(logits), whole(tokens, Causal()), atol=2e-5, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    prefix=st.lists(st.integers(0, 39), min_size=1, max_size=12),
    block=st.lists(st.integers(0, 39), min_size=1, max_size=8),
)
def test_a_block_over_a_cached_prefix_is_a_block_over_a_causal_one(prefix, block):
    cache = KeyValueCache(CONFIG, [32], dtype=torch.float32)
    run(cache, 0, 0, prefix, Causal())
    cached = run(cache, 0, len(prefix), block, Bidirectional())
    uncached = whole(prefix + block, BlockOverCausal(len(prefix)))[len(prefix) :]
    torch.testing.assert_close(cached, uncached, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("rejected", [1, 5])
def test_a_rejected_draft_leaves_no_trace_behind_the_cursor(rejected):
    cache = KeyValueCache(CONFIG, [32], dtype=torch.float32)
    run(cache, 0, 0, [5, 6, 7], Causal())
    run(cache, 0, 3, [9] * rejected, Bidirectional())
    torch.testing.assert_close(
        run(cache, 0, 3, [8, 10], Causal()), whole([5, 6, 7, 8, 10], Causal())[3:], atol=2e-5, rtol=1e-4
    )


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([16, 16, 24, 40]), min_size=1, max_size=6),
    data=st.data(),
)
def test_slots_of_any_lengths_side_by_side_keep_out_of_one_another(lengths, data):
    cache = KeyValueCache(CONFIG, lengths, dtype=torch.float32)
    assert cache.num_bytes == sum(lengths) * 2 * CONFIG.num_layers * CONFIG.num_kv_heads * CONFIG.head_size * 4
    num_cached = [data.draw(st.integers(1, length - 4)) for length in lengths]
    texts = [[(7 * slot + i) % 40 for i in range(n + 3)] for slot, n in enumerate(num_cached)]
    for slot, (text, n) in enumerate(zip(texts, num_cached, strict=True)):
        run(cache, slot, 0, text[:n], Causal())
    spans = [Span(3 * slot, 3, slot, n, Causal()) for slot, n in enumerate(num_cached)]
    positions = torch.cat([torch.arange(n, n + 3) for n in num_cached])
    tokens = torch.tensor([token for text in texts for token in text[-3:]])
    with torch.inference_mode():
        together = MODEL.logits(MODEL(tokens, positions, CachedAttention(spans, cache, "sdpa", "cpu")))
    for slot, text in enumerate(texts):
        torch.testing.assert_close(together[3 * slot : 3 * slot + 3], whole(text, Causal())[-3:], atol=2e-5, rtol=1e-4)
