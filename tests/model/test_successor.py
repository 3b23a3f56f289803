"""Drafts that know the draft before them: the chain written out, both engines, and decoding that uses it."""

import pytest
import torch

from tests.worlds import MASK, native_forward, random_lora, random_tensors, random_transformer, tiny_config, tiny_model
from trimode.engine.language_model import LanguageModel
from trimode.model import native
from trimode.model.attention import Span
from trimode.model.forward import Inputs, TorchForward
from trimode.model.views import BlockOverCausal

PROMPT = [5, 9, 1, 7, 30]
NUM_MASKS = 6
CONVERTED = {"block_predicts": "next", "known_tokens_are_causal": True, "adapter_acts_on": "masks", "block_length": 7}
SHAPES = {"own head": {}, "tied head": {"tied_head": True}, "no multiple of a panel": {"width": 24, "head_size": 6}}


def worlds(shape, tensors_seed=2):
    config = tiny_config(**CONVERTED, **SHAPES[shape])
    lora = random_lora(config, successor=5)
    return config, lora, TorchForward(random_transformer(config, tensors_seed), lora=lora)


def drafted_rows(forward):
    """The answers to a draft's masks, and the token that the known part predicts."""
    tokens = PROMPT + [MASK] * NUM_MASKS
    masks = list(range(len(PROMPT), len(tokens)))
    inputs = Inputs(
        tokens=tokens,
        positions=list(range(len(tokens))),
        spans=[Span(0, len(tokens), 0, 0, BlockOverCausal(len(PROMPT)))],
        adapted=masks,
        asked=masks,
    )
    return forward(inputs, forward.make_cache([64])).answers(0, NUM_MASKS)


def written_out(transformer, lora, rows, before):
    """The greedy chain over the whole vocabulary, one product after the other."""
    tokens, successor = [], lora.successor
    head = transformer.embedding.weight if transformer.config.tied_head else transformer.head.dense_weight()
    for hidden, logits in zip(rows.hidden, rows.logits, strict=True):
        token = transformer.embedding.weight[before]
        both = [x / (x.square().mean() + torch.finfo(torch.float32).eps).sqrt() for x in (hidden, token)]
        inner = successor.inner @ torch.cat(both)
        scores = head @ (hidden + successor.outer @ (inner * torch.sigmoid(inner)))
        likely = logits.index_fill(0, torch.tensor(MASK), -torch.inf).topk(32).indices
        before = int(likely[scores[likely].argmax()])
        tokens.append(before)
    return tokens


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_a_draft_is_the_chain_written_out_and_hangs_on_the_token_before(shape):
    _, lora, forward = worlds(shape)
    rows = drafted_rows(forward)
    drafts = {before: rows.draft_head.draft(rows.hidden, rows.logits, before)[0] for before in range(4, 40)}
    for before, tokens in drafts.items():
        assert tokens == written_out(forward.transformer, lora, rows, before)
        assert MASK not in tokens
    assert len({tuple(tokens) for tokens in drafts.values()}) > 4


@pytest.mark.skipif(not native.available(), reason="the native engine was not built")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_native_engine_drafts_and_rescores_as_pytorch_does(shape, threads):
    config, lora, torch_forward = worlds(shape)
    forward = native_forward(config, random_tensors(config, 2), lora=lora, threads=threads)
    expected, rows = drafted_rows(torch_forward), drafted_rows(forward)
    for before in range(4, 40):
        tokens, probabilities = rows.draft_head.draft(rows.hidden, rows.logits, before)
        its_tokens, its_probabilities = expected.draft_head.draft(expected.hidden, expected.logits, before)
        assert tokens == its_tokens
        assert probabilities == pytest.approx(its_probabilities, abs=1e-4)
        for j in range(NUM_MASKS):
            ours, theirs = (
                found.draft_head.rescored(found.hidden[j : j + 1], found.logits[j : j + 1], before)
                for found in (rows, expected)
            )
            torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)


def test_rescoring_one_by_one_gives_the_greedy_draft():
    _, _, forward = worlds("own head")
    rows = drafted_rows(forward)
    before, tokens, sure = 8, [], []
    for j in range(NUM_MASKS):
        scores = rows.draft_head.rescored(rows.hidden[j : j + 1], rows.logits[j : j + 1], before)[0].clone()
        p = scores.softmax(-1)
        scores[MASK] = -torch.inf
        likely = rows.logits[j].index_fill(0, torch.tensor(MASK), -torch.inf).topk(32).indices
        before = int(likely[scores[likely].argmax()])
        tokens.append(before)
        sure.append(float(p[before]))
    drafts, probabilities = rows.draft_head.draft(rows.hidden, rows.logits, 8)
    assert tokens == drafts
    assert sure == pytest.approx(probabilities, abs=1e-5)


@pytest.mark.parametrize("kind", ["linear", "quadratic"])
def test_decoding_drafts_with_it_unless_the_adapter_is_off(kind):
    """With drafts that the successor makes the verification accepts other ones; the text stays."""
    shape = CONVERTED | {"block_length": 4}
    plain = random_lora(tiny_config(**shape))
    with_it = random_lora(tiny_config(**shape), successor=5)
    prompts = [[7, p] for p in range(4, 12)]
    knobs = {"max_new_tokens": 60, "ignore_eos": True}
    texts = [tiny_model(4, **shape).generate(p, mode="ar", **knobs).token_ids for p in prompts]
    forwards = {}
    for name, lora in {"plain": plain, "successor": with_it}.items():
        model = tiny_model(4, lora=lora, **shape)
        for draft_lora in (True, False):
            drafting = {"self_spec_kind": kind, "draft_lora": draft_lora}
            outs = [model.generate(p, mode="self_spec", **drafting, **knobs) for p in prompts]
            assert [o.token_ids for o in outs] == texts
            forwards[name, draft_lora] = [o.stats.nfe_decode for o in outs]
    assert forwards["plain", True] != forwards["successor", True]
    assert forwards["plain", False] == forwards["successor", False]


def test_a_saved_adapter_has_its_successor_again(tmp_path):
    import trimode

    shape = CONVERTED | {"block_length": 4}
    lora = random_lora(tiny_config(**shape), successor=5)
    model = tiny_model(4, lora=lora, **shape)
    model.save(tmp_path / "saved")
    again = trimode.load(tmp_path / "saved", dtype="float32", backend="torch")
    assert isinstance(again, LanguageModel)
    assert again.adapter is not None
    assert again.adapter.successor is not None
    for mine, its in zip(
        (lora.successor.inner, lora.successor.outer),
        (again.adapter.successor.inner, again.adapter.successor.outer),
        strict=True,
    ):
        torch.testing.assert_close(its.float(), mine)
