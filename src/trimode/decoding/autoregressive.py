"""`ar`: one token a forward. Prefill is just a long step."""

from collections.abc import Sequence

from trimode.decoding.interface import Generation, Outcome, Predictions, Step, Traits
from trimode.decoding.sampling import next_token
from trimode.decoding.settings import Settings
from trimode.model.views import Causal

__all__ = ["Autoregressive", "causal_step"]


def causal_step(generation: Generation, kind: str) -> Step:
    """Cache everything final and predict what follows it."""
    tokens = generation.uncached
    if generation.cached < len(generation.prompt):
        kind = "prefill"
    return Step(kind=kind, tokens=tokens, view=Causal(), after=(len(tokens) - 1,))


class Autoregressive:
    """Plans what is final but uncached, and commits the token after it."""

    def plan(self, generations: Sequence[Generation]) -> list[Step]:
        return [causal_step(g, "decode") for g in generations]

    def absorb(
        self, generations: Sequence[Generation], steps: Sequence[Step], predictions: Sequence[Predictions]
    ) -> list[Outcome]:
        return [
            Outcome(committed=(next_token(p.after, g),), kept=len(s.tokens))
            for g, s, p in zip(generations, steps, predictions, strict=True)
        ]

    def num_scratch(self, settings: Settings, traits: Traits) -> int:
        return 0
