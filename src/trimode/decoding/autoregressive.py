"""`ar`: one token a forward. Prefill is just a long step."""

from trimode.decoding.interface import Generation, OneByOne, Outcome, Predictions, Rows, Step, Traits
from trimode.decoding.reading import Reading
from trimode.decoding.sampling import next_token
from trimode.decoding.settings import Settings
from trimode.model.views import Causal

__all__ = ["Autoregressive", "causal_step", "one_token"]


def causal_step(generation: Generation, kind: str) -> Step:
    """Cache everything final and predict what follows it."""
    tokens = generation.uncached
    if generation.cached < len(generation.prompt):
        kind = "prefill"
    return Step(kind=kind, tokens=tokens, view=Causal(), after=(len(tokens) - 1,))


def one_token(g: Generation, row: Rows, kept: int) -> Reading[Outcome]:
    """A step that ends with the token behind everything final."""
    token, told = yield from next_token(row, g)
    return Outcome(committed=(token,), kept=kept, logprobs=told)


class Autoregressive(OneByOne):
    """Plans what is final but uncached, and commits the token after it."""

    def plan_one(self, g: Generation) -> Step:
        return causal_step(g, "decode")

    def absorb_one(self, g: Generation, step: Step, predictions: Predictions) -> Reading[Outcome]:
        return one_token(g, predictions.after, len(step.tokens))

    def num_scratch(self, settings: Settings, traits: Traits) -> int:
        return 0
