"""`ar`: one token a forward. Prefill is just a long step."""

from trimode.decoding.interface import Generation, OneByOne, Outcome, Predictions, Step, Traits
from trimode.decoding.sampling import next_token, token_logprobs
from trimode.decoding.settings import Settings
from trimode.model.views import Causal

__all__ = ["Autoregressive", "causal_step"]


def causal_step(generation: Generation, kind: str) -> Step:
    """Cache everything final and predict what follows it."""
    tokens = generation.uncached
    if generation.cached < len(generation.prompt):
        kind = "prefill"
    return Step(kind=kind, tokens=tokens, view=Causal(), after=(len(tokens) - 1,))


class Autoregressive(OneByOne):
    """Plans what is final but uncached, and commits the token after it."""

    def plan_one(self, g: Generation) -> Step:
        return causal_step(g, "decode")

    def absorb_one(self, g: Generation, step: Step, predictions: Predictions) -> Outcome:
        token = next_token(predictions.after, g)
        return Outcome(
            committed=(token,), kept=len(step.tokens), logprobs=token_logprobs((token,), predictions.after, g)
        )

    def num_scratch(self, settings: Settings, traits: Traits) -> int:
        return 0
