"""What decoders do with logits that lie on a device: nothing that a device refuses, the CPU's answers, and few waits for it."""

from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch

from tests.decoding.test_constraint import Ladder
from tests.model.test_graphs import CHECKPOINTS, model
from tests.pretended_device import Pretended, pretended_device
from trimode.engine.request import Request
from trimode.model.forward import TorchForward, TorchScores
from trimode.model.successor import Successor, TorchDraftHead

GREEDY = {
    "": {},
    "penalties": {"repetition_penalty": 1.2, "frequency_penalty": 0.5},
    "bias": {"logit_bias": {3: 1.0, 9: -1.0}},
}
SAMPLED = {"temperature": 1.0, "top_p": 0.9, "seed": 3}
THINKING = {"max_thinking_tokens": 4, "end_think_token_id": 9}
VARIANTS = {
    **GREEDY,
    "sampled": SAMPLED,
    "sampled, penalties": {**SAMPLED, **GREEDY["penalties"]},
    "logprobs": {"logprobs": 2},
    "sampled, logprobs": {**SAMPLED, "logprobs": 2},
    "thinking": THINKING,
    "sampled, thinking": {**SAMPLED, **THINKING},
}
REVISING = {"editing_threshold": 0.5, "max_post_steps": 2}
MODES = {
    "ar": {"mode": "ar"},
    "diffusion": {"mode": "diffusion"},
    "linear": {"mode": "self_spec"},
    "quadratic": {"mode": "self_spec", "self_spec_kind": "quadratic"},
    "lookup": {"mode": "self_spec", "self_spec_kind": "lookup", "block_length": 4},
}
POLICIES = {by: {"mode": "diffusion", "unmasking": by} for by in ("fixed", "entropy_bound", "margin", "leftmost")}
KNOBS = {
    **{f"{mode}; {name}": {**a, **b} for mode, a in MODES.items() for name, b in VARIANTS.items()},
    **{f"{by}; {name}": {**a, **b} for by, a in POLICIES.items() for name, b in {"": {}, "sampled": SAMPLED}.items()},
}
WORLDS = {**{name: (name, 0) for name in CHECKPOINTS}, "with a draft head": ("shifted", 5)}
PROMPT = [5, 6, 7, 8, 6, 7]


def there(tensor):
    return tensor.as_subclass(Pretended)


@contextmanager
def on_a_device():
    """Logits and hidden states of a captured model pretend to lie on a device. What waited, and how much had before each forward."""
    run, answers, head = TorchForward.__call__, TorchScores.answers, TorchDraftHead.__init__
    forwards = []

    def on_host(whole, *given):
        with torch._C.DisableTorchFunction():
            return whole(*given)

    def answers_there(self, start, stop):
        found = on_host(answers, self, start, stop)
        return found._replace(
            **{name: there(value) for name, value in found._asdict().items() if isinstance(value, torch.Tensor)}
        )

    def head_there(self, *given):
        head(self, *given)
        self._embedding, self._head = there(self._embedding), there(self._head)
        self._successor = Successor(there(self._successor.inner), there(self._successor.outer))

    with pytest.MonkeyPatch.context() as patch, pretended_device() as waits:
        patch.setattr(TorchForward, "__call__", lambda *given: forwards.append(len(waits)) or on_host(run, *given))
        patch.setattr(TorchScores, "answers", answers_there)
        patch.setattr(TorchDraftHead, "__init__", head_there)
        yield waits, forwards


def most_waits(waits, forwards):
    """Behind one forward."""
    return max(b - a for a, b in pairwise([*forwards, len(waits)]))


def answer(world, knobs, *, captured=False):
    """Ids of an answer, and how often the device was waited for behind a forward, at most."""
    checkpoint, successor = WORLDS[world]
    if checkpoint == "reference" and knobs.get("self_spec_kind") == "quadratic":
        # an adapter that acts on all inputs cannot verify and draft in one forward
        knobs = {**knobs, "draft_lora": False}
    kwargs = {"max_new_tokens": 20, "ignore_eos": True, **knobs}
    if not captured:
        return model(captured=False, successor=successor, **CHECKPOINTS[checkpoint]).generate(PROMPT, **kwargs), 0
    with on_a_device() as (waits, forwards):
        own = model(captured=True, successor=successor, **CHECKPOINTS[checkpoint])
        out = own.generate(PROMPT, **kwargs)
        return out, most_waits(waits, forwards)


@pytest.mark.parametrize("knobs", KNOBS.values(), ids=list(KNOBS))
@pytest.mark.parametrize("world", WORLDS)
def test_a_step_waits_once_for_the_device_and_says_what_it_says_on_a_cpu(world, knobs):
    out, num_waits = answer(world, knobs, captured=True)
    expected = answer(world, knobs)[0]
    assert out.token_ids == expected.token_ids
    told, as_told = out.logprobs or [], expected.logprobs or []
    assert [one.token for one in told] == [one.token for one in as_told]
    assert [one.logprob for one in told] == pytest.approx([one.logprob for one in as_told], abs=1e-4)
    assert num_waits == 1


@pytest.mark.parametrize(
    "knobs",
    [
        {"mode": "self_spec", "threshold": 0.7},
        {"mode": "self_spec", "threshold": 0.7, **SAMPLED},
        {"mode": "self_spec", "threshold": 0.7, **SAMPLED, **GREEDY["penalties"]},
        {"mode": "diffusion", **REVISING},
        {"mode": "diffusion", **REVISING, **SAMPLED},
        {"mode": "diffusion", "unmasking": "random", "seed": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("world", WORLDS)
def test_so_does_one_of_many_passes(world, knobs):
    out, num_waits = answer(world, knobs, captured=True)
    assert out.token_ids == answer(world, knobs)[0].token_ids
    assert num_waits == 1


@pytest.mark.parametrize("knobs", [{}, SAMPLED, {"unmasking": "margin"}], ids=str)
@pytest.mark.parametrize("world", WORLDS)
def test_a_gap_is_read_once_a_step(world, knobs):
    checkpoint, successor = WORLDS[world]
    gap = [5, 6, None, None, None, 9]
    expected = model(captured=False, successor=successor, **CHECKPOINTS[checkpoint]).infill(gap, **knobs)
    with on_a_device() as (waits, forwards):
        own = model(captured=True, successor=successor, **CHECKPOINTS[checkpoint])
        assert own.infill(gap, **knobs).token_ids == expected.token_ids
    # the first forward reads what stands before the gap, and is asked nothing
    assert most_waits(waits, forwards) == 1
    assert len(waits) < len(forwards)


@pytest.mark.parametrize("world", WORLDS)
def test_requests_that_share_forwards_say_on_a_device_what_each_says_alone_and_wait_together(world):
    checkpoint, successor = WORLDS[world]
    draft = {"draft_lora": False} if checkpoint == "reference" else {}
    requests = [
        {"mode": "ar"},
        {"mode": "self_spec", **draft, **SAMPLED},
        {"mode": "self_spec", "self_spec_kind": "quadratic", **draft},
        {"mode": "self_spec", "self_spec_kind": "quadratic", **draft, **SAMPLED},
        {"mode": "diffusion", **SAMPLED},
        {"mode": "diffusion"},
        {"mode": "ar", **GREEDY["penalties"]},
    ]
    kwargs = {"max_new_tokens": 16, "ignore_eos": True}
    alone = model(captured=False, successor=successor, **CHECKPOINTS[checkpoint])
    expected = [alone.generate(PROMPT, **kwargs, **knobs).token_ids for knobs in requests]
    with on_a_device() as (waits, forwards):
        own = model(captured=True, successor=successor, **CHECKPOINTS[checkpoint])
        outs = own.generate([Request(PROMPT, **kwargs, **knobs) for knobs in requests])
    assert [out.token_ids for out in outs] == expected
    assert most_waits(waits, forwards) == 1


def test_the_pretended_device_refuses_and_counts_what_a_device_would():
    with pretended_device() as waits:
        x = there(torch.arange(6.0).view(2, 3))
        assert x.device.type == "cuda"
        with pytest.raises(RuntimeError, match="beside those of"):
            x + torch.ones(3)
        with pytest.raises(RuntimeError, match="beside those of"):
            x.index_fill(0, torch.tensor(0), 1.0)
        sent = torch.ones(3).to(x.device, non_blocking=True)
        assert not waits
        assert (x + sent).argmax(dim=-1).tolist() == [2, 2]
        assert waits == ["tolist"]
        torch.tensor([1, 2], device=x.device)
        x[[0, 1]]
        x[x > 2]
        float(x[0, 0])
        x.cpu()
        assert len(waits) == 6


@pytest.mark.parametrize("mode", ["ar", "lookup", "linear", "quadratic", "diffusion"])
@pytest.mark.parametrize("world", WORLDS)
def test_what_a_grammar_allows_is_verified_at_once_and_drafted_place_by_place(world, mode):
    knobs = {**MODES[mode], "grammar": Ladder(), "ignore_eos": False}
    out, num_waits = answer(world, knobs, captured=True)
    assert out.token_ids == answer(world, knobs)[0].token_ids
    assert num_waits <= (1 if mode in ("ar", "lookup") else 9)
