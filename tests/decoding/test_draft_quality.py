"""Drafts are as good as the model's block view: where that view knows the text, every draft is accepted.

Exactness alone would not notice a decoder that asks for the wrong rows: its drafts are rejected and the text is right all the same. So
these tests run the real runner and the real decoders over a model that knows its text by heart, from positions alone.
"""

import pytest
import torch

from tests.worlds import EOS, MASK, tiny_config
from trimode.engine.language_model import LanguageModel
from trimode.model.cache import KeyValueCache
from trimode.model.forward import Answers

V = 40
PROMPT = [5, 6, 7]


def text_at(position: int) -> int:
    """What stands there: neither the mask nor an end, and no neighbour like another."""
    return 4 + position * 7 % (V - 4)


class ByHeart:
    """Stands in for an engine. A causal row knows what follows it; a mask knows its own place, or the next one if `shifted`.

    With `needs_neighbour`, a mask whose left neighbour is a mask too has but a wrong and faint idea.
    """

    dtype, device, precision, draft_head = torch.float32, torch.device("cpu"), "float32", None

    def __init__(self, config, *, shifted: bool, needs_neighbour: bool = False) -> None:
        self.config = config
        self._shifted = shifted
        self._needs_neighbour = needs_neighbour

    def describe(self):
        return "by heart"

    def make_cache(self, lengths):
        return KeyValueCache(self.config, lengths, dtype=torch.float32)

    def __call__(self, inputs, cache):
        logits = torch.zeros(len(inputs.tokens), V)
        rows = list(zip(inputs.tokens, inputs.positions, strict=True))
        for i, (token, position) in enumerate(rows):
            place = position if token == MASK and not self._shifted else position + 1
            strength, known = 20.0, text_at(place)
            if self._needs_neighbour and token == MASK and (MASK, position - 1) in rows[i - 1 : i]:
                strength, known = 1.0, text_at(place + 1)
            logits[i, known] = strength
        return Known(logits[inputs.asked])


class Known:
    def __init__(self, logits) -> None:
        self._logits = logits

    def answers(self, start, stop):
        return Answers(self._logits[start:stop])

    def logits(self, start, stop):
        return self._logits[start:stop]


def model(predicts="self", causal=False, *, needs_neighbour=False, block_length=4):
    config = tiny_config(
        vocab_size=V, block_predicts=predicts, known_tokens_are_causal=causal, block_length=block_length
    )
    return LanguageModel("by heart", ByHeart(config, shifted=predicts == "next", needs_neighbour=needs_neighbour))


WAYS = [("self", False), ("self", True), ("next", False), ("next", True)]
ways = pytest.mark.parametrize(("predicts", "causal"), WAYS, ids=[f"{p}-{'causal' if c else 'block'}" for p, c in WAYS])


def decode(model, num, **knobs):
    rounds = []
    out = model.generate(
        PROMPT,
        max_new_tokens=num,
        observe=lambda g, step, outcome: (
            rounds.append((outcome.accepted, len(outcome.committed))) if outcome.accepted is not None else None
        ),
        **knobs,
    )
    assert out.token_ids == [text_at(p) for p in range(len(PROMPT), len(PROMPT) + num)]
    assert EOS not in out.token_ids
    return out, rounds


@ways
@pytest.mark.parametrize("kind", ["linear", "quadratic"])
@pytest.mark.parametrize("block_length", [2, 3, 8])
def test_a_model_whose_block_view_knows_the_text_has_every_draft_accepted(predicts, causal, kind, block_length):
    knobs = {"mode": "self_spec", "self_spec_kind": kind, "block_length": block_length}
    out, rounds = decode(model(predicts, causal), 60, **knobs)
    # an exact first place comes with the draft for nothing
    free = kind == "linear" and predicts == "next" and causal
    # the last round may be cut by the token limit after it was verified; with an exact first place it drafts no further than that
    assert {accepted for accepted, _ in rounds[:-1]} == {block_length - 1}
    accepted, num_committed = rounds[-1]
    assert accepted == block_length - 1 or (free and accepted >= num_committed - 1)
    per_round = block_length + free
    num_rounds = -(-(60 - (1 - free)) // per_round)
    forwards = {"linear": 2 * num_rounds - free, "quadratic": num_rounds}[kind]
    # a single token that is left is verified without a draft: in linear rounds one forward less
    assert out.stats.nfe_decode in (forwards, forwards - (kind == "linear"))
    assert out.stats.nfe_prefill == 1


@ways
def test_drafts_of_several_passes_see_what_earlier_passes_drafted(predicts, causal):
    knobs = {"mode": "self_spec", "block_length": 5}
    hesitant = model(predicts, causal, needs_neighbour=True)
    _, blind = decode(hesitant, 40, **knobs)
    _, careful = decode(hesitant, 40, threshold=0.9, **knobs)
    assert {accepted for accepted, _ in careful[:-1]} == {4}  # the last one drafts as far as the answer goes
    assert sum(accepted for accepted, _ in blind) / len(blind) <= 2


def draft_lengths(model, **knobs):
    """Masks of each draft forward of an answer of 60 tokens, and the answer."""
    found = []

    def observe(g, step, outcome):
        if step.adapted or MASK in step.tokens:
            found.append(step.tokens.count(MASK))

    out = model.generate(PROMPT, mode="self_spec", max_new_tokens=60, observe=observe, **knobs)
    assert out.token_ids == [text_at(p) for p in range(len(PROMPT), len(PROMPT) + 60)]
    return found


def test_linear_drafts_grow_where_they_are_accepted_and_shrink_where_not():
    knowing, hesitant = (
        model("next", causal=True, needs_neighbour=hesitant, block_length=8) for hesitant in (False, True)
    )
    grown = draft_lengths(knowing)
    assert grown[0] == 4
    longest = knowing.config.block_length - 1
    assert grown[:-1] == sorted(grown[:-1])  # the last one ends with the answer
    assert max(grown) == longest
    shrunk = draft_lengths(hesitant)
    assert shrunk[:-1] == sorted(shrunk[:-1], reverse=True)
    assert shrunk[-2] == 3  # of which one is accepted, round after round


@pytest.mark.parametrize("knobs", [{"block_length": 6}, {"threshold": 0.5}])
def test_drafts_are_as_long_as_the_block_that_was_asked_for(knobs):
    model_ = model("next", causal=True, needs_neighbour=True, block_length=8)
    lengths = draft_lengths(model_, **knobs)
    longest = knobs.get("block_length", model_.config.block_length) - 1
    assert lengths[0] == max(lengths) == longest
    if "threshold" not in knobs:
        assert set(lengths[:-2]) == {longest}


@pytest.mark.parametrize(("predicts", "causal"), WAYS[:3])
def test_a_published_block_is_drafted_whole(predicts, causal):
    assert set(draft_lengths(model(predicts, causal, needs_neighbour=True, block_length=8))[:-1]) == {7}


def test_the_drafts_of_a_seeded_sample_do_not_hang_on_where_it_is_made():
    knowing = model("next", causal=True, block_length=8)
    lengths = draft_lengths(knowing, temperature=0.1, seed=1)
    assert set(lengths[:-1]) == {7}
    assert draft_lengths(knowing, temperature=0.1)[0] == 4


@ways
@pytest.mark.parametrize("threshold", [0.0, 0.9])
def test_diffusion_fills_each_place_with_what_the_block_view_says_of_it(predicts, causal, threshold):
    exact = predicts == "next" and causal
    out, _ = decode(model(predicts, causal), 32, mode="diffusion", block_length=8, threshold=threshold)
    # four blocks of one denoising pass each; anchors cost a forward unless they are exact
    assert out.stats.nfe_decode + out.stats.nfe_prefill == (4 if exact else 8)
    hesitant = model(predicts, causal, needs_neighbour=True)
    decode(hesitant, 32, mode="diffusion", block_length=8, threshold=0.9)


@ways
def test_infilling_asks_for_the_masked_places(predicts, causal):
    text = [text_at(p) for p in range(12)]
    gaps = [None if p in (2, 3, 7, 11) else token for p, token in enumerate(text)]
    assert model(predicts, causal).infill(gaps).token_ids == text
