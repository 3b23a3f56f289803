"""The engine's three contract lines, each broken on purpose by a small wrong decoder."""

import pytest
import torch

from trimode.decoding.autoregressive import Autoregressive
from trimode.decoding.generate import run_to_end
from trimode.decoding.interface import Generation, Outcome, Predictions, Rows, Step, Traits
from trimode.decoding.settings import Settings
from trimode.errors import EngineContractError
from trimode.model.views import Bidirectional, Causal

TRAITS = Traits(mask_token_id=3, eos_token_ids=frozenset({2}), block_length=4)


def counting(generations, steps):
    """A model that counts: the token after t is t + 1."""
    outputs = []
    for step in steps:
        after = torch.zeros(len(step.after), 50)
        for row, index in enumerate(step.after):
            after[row, step.tokens[index] + 1] = 5.0
        outputs.append(Predictions(after=Rows(after), at=Rows(torch.zeros(len(step.at), 50))))
    return outputs


def generation(decoder, **knobs):
    return Generation(
        prompt=(5, 6, 7),
        settings=Settings(max_new_tokens=4, **knobs),
        traits=TRAITS,
        random=torch.Generator(),
        decoder=decoder,
    )


class Wrong(Autoregressive):
    def __init__(self, step=None, outcome=None):
        self.step, self.outcome = step, outcome

    def plan(self, generations):
        return [self.step] if self.step else super().plan(generations)

    def absorb(self, generations, steps, predictions):
        return [self.outcome] if self.outcome else super().absorb(generations, steps, predictions)


def run(decoder):
    g = generation(decoder)
    for _ in run_to_end([g], counting):
        pass
    return g


def test_a_sound_decoder_runs_to_its_token_limit():
    g = run(Autoregressive())
    assert g.new_tokens == [8, 9, 10, 11]
    assert g.finish_reason == "length"
    assert g.cached == 6
    assert (g.tally.nfe_prefill, g.tally.nfe_decode) == (1, 3)


@pytest.mark.parametrize(
    "wrong",
    [
        Wrong(step=Step(kind="decode", tokens=(6, 7), view=Causal(), after=(1,))),
        Wrong(step=Step(kind="decode", tokens=(), view=Causal())),
        Wrong(
            step=Step(kind="draft", tokens=(5, 6, 7, 3), view=Bidirectional(), at=(3,)),
            outcome=Outcome(committed=(8,), kept=3),
        ),
        Wrong(outcome=Outcome(committed=(), kept=4)),
        Wrong(
            step=Step(kind="verify", tokens=(5, 6, 7, 9), view=Causal(), after=(2, 3)),
            outcome=Outcome(committed=(8, 9), kept=4),
        ),
    ],
    ids=[
        "skips a final token",
        "asks for nothing",
        "keeps block keys",
        "keeps more than there is",
        "keeps a rejected draft",
    ],
)
def test_a_decoder_that_breaks_the_contract_is_stopped(wrong):
    with pytest.raises(EngineContractError):
        run(wrong)
