"""The reference loop: plan, run, absorb, release, until every generation is finished.

It is handed the function that runs steps and never sees a model. Three contract lines are checked for every decoder alike: a step
starts with every final token not yet cached; only causal keys stay; the cache never runs ahead of what is final.
"""

from collections.abc import Callable, Iterator, Sequence

from trimode.decoding.interface import Generation, Outcome, Predictions, Step
from trimode.decoding.reading import read, together
from trimode.errors import EngineContractError

__all__ = [
    "IsStopped",
    "Observer",
    "RunSteps",
    "absorb_predictions",
    "apply",
    "check_step",
    "plan_steps",
    "run_to_end",
    "tick",
]

RunSteps = Callable[[Sequence[Generation], Sequence[Step]], list[Predictions]]
Observer = Callable[[Generation, Step, Outcome], None]
IsStopped = Callable[[Generation, int], bool]
"""Told of each committed token in order; True ends the generation there (stop strings, which only text knows)."""


def tick(
    generations: Sequence[Generation],
    run: RunSteps,
    *,
    observe: Observer | None = None,
    is_stopped: IsStopped | None = None,
) -> None:
    """One forward for each of these unfinished generations, whatever their decoders."""
    steps = plan_steps(generations)
    for g, step in zip(generations, steps, strict=True):
        check_step(g, step)
    predictions = run(generations, steps)
    outcomes = absorb_predictions(generations, steps, predictions)
    for g, step, outcome in zip(generations, steps, outcomes, strict=True):
        apply(g, step, outcome, is_stopped)
        if observe is not None:
            observe(g, step, outcome)


def run_to_end(
    generations: Sequence[Generation],
    run: RunSteps,
    *,
    observe: Observer | None = None,
    is_stopped: IsStopped | None = None,
) -> Iterator[None]:
    """Ticks until all are finished, yielding after each so that the caller can look, or stop."""
    while active := [g for g in generations if g.finish_reason is None]:
        tick(active, run, observe=observe, is_stopped=is_stopped)
        yield


def _by_decoder(generations: Sequence[Generation]) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for i, g in enumerate(generations):
        groups.setdefault(id(g.decoder), []).append(i)
    return list(groups.values())


def plan_steps(generations: Sequence[Generation]) -> list[Step]:
    """The next forward of each generation, whatever their decoders."""
    if len(generations) == 1:  # at batch 1 this loop is what Python does beside the engine
        return generations[0].decoder.plan(generations)
    steps: dict[int, Step] = {}
    for group in _by_decoder(generations):
        planned = generations[group[0]].decoder.plan([generations[i] for i in group])
        steps.update(zip(group, planned, strict=True))
    return [steps[i] for i in range(len(generations))]


def absorb_predictions(
    generations: Sequence[Generation], steps: Sequence[Step], predictions: Sequence[Predictions]
) -> list[Outcome]:
    """What each of these forwards made final, whatever the decoders."""
    if len(generations) == 1:
        return read(generations[0].decoder.absorb(generations, steps, predictions))
    groups = _by_decoder(generations)
    absorbing = (
        generations[group[0]].decoder.absorb(
            [generations[i] for i in group], [steps[i] for i in group], [predictions[i] for i in group]
        )
        for group in groups
    )
    outcomes: dict[int, Outcome] = {}
    for group, absorbed in zip(groups, read(together(absorbing)), strict=True):
        outcomes.update(zip(group, absorbed, strict=True))
    return [outcomes[i] for i in range(len(generations))]


def check_step(g: Generation, step: Step) -> None:
    """Contract line 1, before the forward runs."""
    uncached = g.uncached
    if not step.tokens or step.tokens[: len(uncached)] != uncached:
        raise EngineContractError(
            f"A {step.kind} step must start with the {len(uncached)} final tokens that are not cached; "
            f"got {step.tokens[: len(uncached)]}, expected {uncached}."
        )
    # a place before the first input would silently be another request's row
    if any(not 0 <= i < len(step.tokens) for i in (*step.after, *step.at, *step.adapted)):
        raise EngineContractError(f"A {step.kind} step of {len(step.tokens)} inputs asks about places that it has not.")


def apply(g: Generation, step: Step, outcome: Outcome, is_stopped: IsStopped | None = None) -> None:
    """Make an outcome real: count it, move the cursor, append what is final, and finish where the text ends."""
    if outcome.kept > step.view.num_causal(len(step.tokens)):
        raise EngineContractError(
            f"A {step.kind} step may keep its {step.view.num_causal(len(step.tokens))} causal inputs; got {outcome.kept}."
        )
    final_after = (*g.uncached, *outcome.committed)
    if outcome.kept > len(final_after) or step.tokens[: outcome.kept] != final_after[: outcome.kept]:
        raise EngineContractError(
            f"A {step.kind} step keeps keys of tokens that are not final: kept {step.tokens[: outcome.kept]}, "
            f"final {final_after}."
        )
    _count(g, step, outcome)
    g.cached += outcome.kept
    before = g.num_new
    for i, token in enumerate(outcome.committed):
        g.final.append(token)
        if g.settings.logprobs is not None:
            g.logprobs.append(outcome.logprobs[i])
        stopped = is_stopped is not None and is_stopped(g, token)
        if stopped or g.ends_with(token):
            g.finish_reason = "stop"
        elif g.num_new >= g.settings.max_new_tokens:
            g.finish_reason = "length"
        if g.finish_reason is not None:
            break
    g.tally.rounds += outcome.accepted is not None
    if outcome.accepted is not None or step.kind == "draft":
        g.tally.round_tokens += g.num_new - before


def _count(g: Generation, step: Step, outcome: Outcome) -> None:
    if step.kind == "prefill":
        g.tally.nfe_prefill += 1
    else:
        g.tally.nfe_decode += 1
    g.tally.forwards[step.kind] = g.tally.forwards.get(step.kind, 0) + 1
    g.tally.revised += outcome.revised
