"""What a forward costs on this machine, measured; and what follows from it for `auto`.

A table of seconds by number of inputs, with and without the adapter, is measured once (a second or two) and kept in a file that knows
the machine and the model. The expected tokens a second of each way to go on then follow from the table and from the drafts that were
accepted so far.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from weakref import WeakKeyDictionary

from trimode.decoding.auto import LARGEST_STEP
from trimode.decoding.interface import Choice, Generation
from trimode.device import processor
from trimode.model.attention import Span
from trimode.model.config import ModelConfig
from trimode.model.forward import Cache, Forward, Inputs
from trimode.model.views import BlockOverCausal, Causal, View

__all__ = ["Acceptance", "CostTable", "MeasuredChooser", "cost_table", "kept_table", "measure_cost"]

NUM_INPUTS = (1, 2, 4, 8, 16, 32, 64, 128)
CONTEXT = 128
"""Cached positions in front of what is measured."""
BUDGET_S = 8.0
"""Measuring stops here; more inputs are then extrapolated."""
REPEATS = range(3, 8)
"""How often each size is measured: as often as fits into `SIZE_S` seconds. Short forwards are the noisier ones."""
SIZE_S = 0.1
LENGTHS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)
"""Block lengths that are considered."""
ENOUGH = 1.08
"""A choice must promise this much over `ar`: estimates are never better than that."""
PROBE_EVERY = 48
"""Rounds of `ar` after which a way that is nearly as good is tried again, to learn."""
NEARLY = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class CostTable:
    """Seconds of a forward by its number of inputs, piecewise linear."""

    num_inputs: tuple[int, ...]
    causal_s: tuple[float, ...]
    """All of them without the adapter, in one row."""
    drafting_s: tuple[float, ...]
    """One known token and masks on which the adapter acts."""

    def causal(self, num_inputs: float) -> float:
        """Seconds of a causal forward."""
        return _interpolate(self.num_inputs, self.causal_s, num_inputs)

    def drafting(self, num_inputs: float) -> float:
        """Seconds of a forward over masks."""
        return _interpolate(self.num_inputs, self.drafting_s, num_inputs)


def _interpolate(xs: Sequence[int], ys: Sequence[float], x: float) -> float:
    i = 0
    while i < len(xs) - 2 and x > xs[i + 1]:
        i += 1
    if len(xs) == 1:
        return ys[0] * x / xs[0]
    slope = (ys[i + 1] - ys[i]) / (xs[i + 1] - xs[i])
    return ys[i] + slope * (x - xs[i])


def measure_cost(forward: Forward, *, budget_s: float = BUDGET_S) -> CostTable:
    """Run forwards of each size and time them. Their tokens are arbitrary."""
    config = forward.config
    longest = min(NUM_INPUTS[-1], config.max_positions // 2)
    context = min(CONTEXT, config.max_positions - longest)
    sizes = [n for n in NUM_INPUTS if n <= longest]
    cache = forward.make_cache([context + longest])
    mask = config.mask_token_id
    start = time.perf_counter()
    _run(forward, cache, 0, [1 % config.vocab_size] * context, Causal(), ())
    found: list[tuple[int, float, float]] = []
    for num in sizes:
        each: tuple[list[float], list[float]] = ([], [])
        before = time.perf_counter()
        for repeat in range(REPEATS.stop - 1):
            if repeat >= REPEATS.start and time.perf_counter() - before > SIZE_S:
                break
            each[0].append(_run(forward, cache, context, [1 % config.vocab_size] * num, Causal(), ()))
            if mask is not None:
                tokens = [1 % config.vocab_size] + [mask] * (num - 1)
                each[1].append(_run(forward, cache, context, tokens, BlockOverCausal(1), range(1, num)))
            if time.perf_counter() - start > budget_s:
                break
        causal = median(each[0])
        found.append((num, causal, median(each[1]) if each[1] else causal))
        # the next size may take as long as all sizes so far
        if time.perf_counter() - start + 2 * (time.perf_counter() - before) > budget_s:
            break
    # a wider forward is never cheaper; where it seems so, the clock was disturbed
    ns, causal_s, drafting_s = zip(*found, strict=True)
    return CostTable(num_inputs=ns, causal_s=_rising(causal_s), drafting_s=_rising(drafting_s))


def _run(forward: Forward, cache: Cache, cached: int, tokens: list[int], view: View, adapted: Sequence[int]) -> float:
    n = len(tokens)
    inputs = Inputs(
        tokens=tokens,
        positions=list(range(cached, cached + n)),
        spans=[Span(start=0, length=n, slot=0, cached=cached, view=view)],
        adapted=list(adapted),
        asked=list(range(n)),
    )
    start = time.perf_counter()
    found = forward(inputs, cache).answers(0, n)
    if (
        len(adapted) > 0 and found.draft_head is not None and found.hidden is not None
    ):  # a draft is made of the answers, one token behind the other
        found.draft_head.draft(found.hidden[1:], found.logits[1:], tokens[0])
    return time.perf_counter() - start


def _rising(seconds: Sequence[float]) -> tuple[float, ...]:
    out: list[float] = []
    for s in seconds:
        out.append(max(s, out[-1] if out else 0.0))
    return tuple(out)


def cost_table(forward: Forward, *, folder: Path | None = None) -> CostTable:
    """The kept table of this machine and model, or a new one. A file that cannot be read or written is done without."""
    table = kept_table(forward, folder=folder)
    if table is None:
        table = measure_cost(forward)
        identity = _identity(forward)
        path = _path(identity, folder)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_suffix(f".{os.getpid()}")
            draft.write_text(json.dumps({"identity": identity, "table": asdict(table)}), encoding="utf-8")
            draft.replace(path)
        except OSError:
            pass  # a home that cannot be written: measured again next time
    return table


def kept_table(forward: Forward, *, folder: Path | None = None) -> CostTable | None:
    """The table that was measured for this machine and model, if it was."""
    identity = _identity(forward)
    try:
        kept = json.loads(_path(identity, folder).read_text(encoding="utf-8"))
        if kept["identity"] == identity:
            return CostTable(**{name: tuple(values) for name, values in kept["table"].items()})
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none yet, another machine's, or cut off: to be measured anew
    return None


def _path(identity: dict[str, object], folder: Path | None) -> Path:
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return (folder or Path.home() / ".cache" / "trimode") / f"cost-{key}.json"


def _identity(forward: Forward) -> dict[str, object]:
    """What a cost hangs on."""
    config: ModelConfig = forward.config
    return {
        "version": 2,
        "processor": processor(),
        "cores": os.cpu_count(),
        "device": str(forward.device),
        "engine": forward.describe(),
        "shape": [config.width, config.mlp_width, config.num_layers, config.vocab_size, config.num_kv_heads],
    }


class Acceptance:
    """How often the k-th draft of a block was accepted when all before it were; old rounds count less and less."""

    def __init__(self, prior: float = 0.55, weight: float = 4.0, memory: float = 0.98) -> None:
        self._prior, self._weight, self._memory = prior, weight, memory
        self._tried: list[float] = []
        self._accepted: list[float] = []
        self.num_notes = 0

    def note(self, num_drafted: int, num_accepted: int) -> None:
        """A verification accepted this many of so many drafts."""
        self.num_notes += 1
        while len(self._tried) < num_drafted:
            self._tried.append(0.0)
            self._accepted.append(0.0)
        for k in range(len(self._tried)):
            self._tried[k] *= self._memory
            self._accepted[k] *= self._memory
        for k in range(min(num_accepted + 1, num_drafted)):
            self._tried[k] += 1.0
            self._accepted[k] += k < num_accepted

    def rate(self, k: int, prior: float | None = None) -> float:
        """Chance that draft k (from 0) is accepted once those before it are."""
        before = self._prior if prior is None else prior
        if k >= len(self._tried):
            return before if not self._tried else min(before, self.rate(len(self._tried) - 1, prior))
        return (self._accepted[k] + self._weight * before) / (self._tried[k] + self._weight)


class MeasuredChooser:
    """The way that promises most tokens a second."""

    def __init__(self, table: CostTable | Callable[[], CostTable], *, has_adapter: bool, first_is_exact: bool) -> None:
        """table: or what measures it, which nobody's first token waits for."""
        self._known_table = table if isinstance(table, CostTable) else None
        self._measure = table
        self._has_adapter = has_adapter
        self._first_is_exact = first_is_exact
        self._all = Acceptance()
        self._each: WeakKeyDictionary[Generation, Acceptance] = WeakKeyDictionary()
        self._last: WeakKeyDictionary[Generation, tuple[tuple[int, int, bool], Choice]] = WeakKeyDictionary()
        """What was chosen for each, and what that hung on: most rounds bring nothing new."""

    @property
    def table(self) -> CostTable:
        """What forwards cost; measured now, if it was not yet."""
        if self._known_table is None:
            assert callable(self._measure)
            self._known_table = self._measure()
        return self._known_table

    def choose(self, g: Generation, num_sharing: int) -> Choice:
        if g.settings.temperature > 0 and g.settings.seed is not None:
            # what others do, and what was learnt before, must not reach into a seeded answer
            return self._best(Acceptance(), None, 1, probe=False)
        if self._known_table is None and g.num_new == 0:
            return Choice("ar")
        own = self._each.setdefault(g, Acceptance())
        probe = g.choices.get("ar", 0) % PROBE_EVERY == PROBE_EVERY - 1
        key = (own.num_notes, num_sharing, probe)
        known = self._last.get(g)
        if known is None or known[0] != key:
            known = self._last[g] = (key, self._best(own, self._all, num_sharing, probe=probe))
        return known[1]

    def note(self, g: Generation, num_drafted: int, num_accepted: int) -> None:
        self._all.note(num_drafted, num_accepted)
        self._each.setdefault(g, Acceptance()).note(num_drafted, num_accepted)

    def speeds(self, own: Acceptance, shared: Acceptance | None, num_sharing: int) -> dict[Choice, float]:
        """Expected tokens a second of one generation, by choice."""
        n = num_sharing
        table = self.table
        draft = table.drafting if self._has_adapter else table.causal
        found = {Choice("ar"): 1.0 / table.causal(n)}
        accepted, chance = 0.0, 1.0
        known = 0
        exact = self._first_is_exact
        for length in LENGTHS:
            while known < length - 1:  # drafts that a verification looks at
                chance *= own.rate(known, None if shared is None else shared.rate(known))
                accepted += chance
                known += 1
            if length * n > table.num_inputs[-1] * 2:
                break
            emitted = 1.0 + exact + accepted
            found[Choice("linear", length)] = emitted / (draft(n * length) + table.causal(n * length))
            width = length * (length if exact else length + 1)
            if width <= LARGEST_STEP:
                found[Choice("quadratic", length)] = (1.0 + accepted) / draft(n * width)
        return found

    def _best(self, own: Acceptance, shared: Acceptance | None, num_sharing: int, *, probe: bool) -> Choice:
        speeds = self.speeds(own, shared, num_sharing)
        ar = speeds.pop(Choice("ar"))
        if not speeds:
            return Choice("ar")
        best = max(speeds, key=lambda choice: speeds[choice])
        if speeds[best] > ENOUGH * ar or (probe and speeds[best] > NEARLY * ar):
            return best
        return Choice("ar")
