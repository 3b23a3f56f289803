"""What a forward costs on this machine, measured; and what follows from it for `auto`.

A table of seconds by number of inputs, with and without the adapter, and by what they look back at, is measured once (a second or two)
and kept in a file that knows the machine and the model. What forwards take later corrects it. The expected tokens a second of each way
to go on then follow from the costs and from the drafts that were accepted so far.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import pairwise
from math import inf, log2
from pathlib import Path
from statistics import median
from typing import Any

from trimode.decoding.auto import LARGEST_STEP
from trimode.decoding.interface import Choice, Generation
from trimode.decoding.lookup import Suggestion
from trimode.device import processor
from trimode.model.attention import Span
from trimode.model.config import ModelConfig
from trimode.model.forward import Cache, Forward, Inputs
from trimode.model.views import BlockOverCausal, Causal, View

__all__ = ["Acceptance", "CostTable", "LatelySeen", "MeasuredChooser", "cost_table", "kept_table", "measure_cost"]

NUM_INPUTS = (1, 2, 4, 8, 16, 32, 64, 128)
CONTEXT = 128
"""Cached positions in front of what is measured."""
LONG_CONTEXT = 1024
"""And once more, a few inputs behind so many, for what a position costs."""
BUDGET_S = 8.0
"""Measuring stops here; more inputs are then extrapolated."""
REPEATS = range(3, 8)
"""How often each size is measured: as often as fits into `SIZE_S` seconds. Short forwards are the noisier ones."""
SIZE_S = 0.1
LENGTHS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)
"""Block lengths that are considered."""
HARDLY = 0.02
"""A draft that is accepted with less than this chance makes no block worth its inputs, nor does any behind it."""
LEAST_TRUST = 0.9
"""In what a text suggests, until it shows."""
AT_HAND = 0.8
"""What is suggested is preferred to drafting from this share of its promise on: that promise is the better known of the two. Counted on
60 prompts of Spec-Bench: 1.0 makes 1.80 times the speed of `ar`, 0.8 1.84."""
SUREST = 0.97
"""No draft is right more often."""
LONGEST_QUOTE = 16
"""Inputs of a verification of what the text or the table suggests, at most."""
ENOUGH = 1.05
"""A choice must promise this much over `ar`: estimates are never better than that."""
FIRST_PROBE, PROBE_EVERY = 4, 48
"""Rounds of `ar` after which a way that is nearly as good is tried, to learn; twice as many after each trial, at most so many. After
the latter number of rounds of drafting one of `ar` is tried too: what a forward takes changes, and is only seen where it is made."""
NEARLY = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class CostTable:
    """Seconds of a forward by its number of inputs, piecewise linear."""

    num_inputs: tuple[int, ...]
    causal_s: tuple[float, ...]
    """All of them without the adapter, in one row."""
    drafting_s: tuple[float, ...]
    """One known token and masks on which the adapter acts."""
    position_s: float = 0.0
    """What each input takes more for each cached position beyond `CONTEXT`."""

    @property
    def is_sound(self) -> bool:
        """Whether these are times of widths: somebody may have written to the file where they are kept."""
        widths, each = self.num_inputs, (*self.causal_s, *self.drafting_s)
        rising = widths and widths[0] > 0 and all(a < b for a, b in pairwise(widths))
        complete = len(widths) == len(self.causal_s) == len(self.drafting_s)
        return bool(rising) and complete and all(0 < s < inf for s in each) and 0 <= self.position_s < inf

    def seconds(self, drafting: bool, num_inputs: float, context: float = CONTEXT) -> float:
        """Of a forward over so many inputs, each behind so many cached positions. drafting: over masks."""
        of_inputs = _interpolate(self.num_inputs, self.drafting_s if drafting else self.causal_s, num_inputs)
        return of_inputs + num_inputs * max(0.0, context - CONTEXT) * self.position_s


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
    left = budget_s - (time.perf_counter() - start)
    position_s = _position_cost(forward) if 8 * causal_s[-1] < left and len(ns) > 2 else 0.0
    return CostTable(num_inputs=ns, causal_s=_rising(causal_s), drafting_s=_rising(drafting_s), position_s=position_s)


def _position_cost(forward: Forward) -> float:
    num = NUM_INPUTS[2]
    context = min(LONG_CONTEXT, forward.config.max_positions - num) // CONTEXT * CONTEXT
    if context <= 2 * CONTEXT:
        return 0.0
    cache = forward.make_cache([context + num])
    tokens = [1 % forward.config.vocab_size] * num
    _run(forward, cache, 0, tokens * (CONTEXT // num), Causal(), ())
    for place in range(CONTEXT, context - CONTEXT + 1, CONTEXT):  # memory that nobody wrote to is faster than any cache
        cache.copy(cache.starts[0], cache.starts[0] + place, CONTEXT)
    each: tuple[list[float], list[float]] = ([], [])
    for _ in range(REPEATS.start):
        for times, cached in zip(each, (CONTEXT, context), strict=True):
            times.append(_run(forward, cache, cached, tokens, Causal(), ()))
    return max(0.0, median(each[1]) - median(each[0])) / (num * (context - CONTEXT))


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
    elif found.unread_best is not None:
        found.unread_best.tolist()  # a device has done it all by then
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
            table: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in kept["table"].items()}
            found = CostTable(**table)
            return found if found.is_sound else None
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
        "version": 4,
        "processor": processor(),
        "cores": os.cpu_count(),
        "device": str(forward.device),
        "engine": forward.describe(),
        "shape": [config.width, config.mlp_width, config.num_layers, config.vocab_size, config.num_kv_heads],
    }


@dataclass(slots=True)
class _Width:
    """What is known of forwards of one width."""

    off: float
    """What they take, as a multiple of the table's."""
    seen_at: int
    """By the number of forwards."""
    count: int = 0
    told: float = 1.0
    """`off` when last a change was told."""


class LatelySeen:
    """A table, corrected by what forwards have taken lately: machines change their speed, and are busy while a table is measured.
    Forwards of a width that was not seen yet are taken to be off as those of the nearest one are."""

    _LEAST_WEIGHT = 0.1
    """Of one forward. The first ones of a width count for more, and those of one that was not seen for a while."""
    _WHILE = 100
    """Forwards."""
    _MOST = 2.0
    """One forward tells of at most so much more or less than was known: what is beyond it was somebody else's turn."""

    def __init__(self, table: CostTable) -> None:
        self.table = table
        self._widths: dict[tuple[bool, int], _Width] = {}
        self._nearest: dict[tuple[bool, int], _Width] = {}
        """Of widths that were not seen, the nearest one that was; asked for more often than anything else here."""
        self._num_notes = 0
        self.version = 0
        """Changes when costs have moved by more than a little."""

    def seconds(self, drafting: bool, num_inputs: float, context: float = CONTEXT) -> float:
        """See `CostTable`."""
        return self.table.seconds(drafting, num_inputs, context) * self._factor(drafting, num_inputs)

    def note(self, drafting: bool, num_inputs: int, context: float, seconds: float) -> None:
        """A forward took so long, with what follows from it."""
        if not 0 < num_inputs <= self.table.num_inputs[-1]:
            return
        key = (drafting, _place(num_inputs))
        known = self._factor(drafting, num_inputs)
        self._num_notes += 1
        width = self._widths.get(key)
        if width is None:
            width = self._widths[key] = _Width(off=known, seen_at=self._num_notes)
            self._nearest = {}
        width.count += 1
        age = self._num_notes - width.seen_at
        width.seen_at = self._num_notes
        weight = max(self._LEAST_WEIGHT, 1.0 / (width.count + 1), min(0.5, age / self._WHILE))
        news = seconds / self.table.seconds(drafting, num_inputs, context) / known
        width.off = known * min(max(news, 1.0 / self._MOST), self._MOST) ** weight
        if abs(log2(width.off / width.told)) > 0.07:  # about 5 %
            width.told = width.off
            self.version += 1

    def _factor(self, drafting: bool, num_inputs: float) -> float:
        key = (drafting, _place(num_inputs))
        found = self._widths.get(key) or self._nearest.get(key)
        if found is None:
            # in this order: another thread may be noting a new one
            nearest, others = self._nearest, list(self._widths.items())
            if not others:
                return 1.0
            found = nearest[key] = min(others, key=lambda o: (o[0][0] != drafting, abs(o[0][1] - key[1])))[1]
        return found.off


@lru_cache(maxsize=1024)
def _place(num_inputs: float) -> int:
    return round(2 * log2(max(num_inputs, 1.0)))


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


class Trust:
    """How much more or less often suggestions are right than they say, the first token and those behind it; old ones count less and
    less."""

    _WEIGHT = 4.0
    _MEMORY = 0.98

    def __init__(self) -> None:
        self._hoped = [0.0, 0.0]
        self._right = [0.0, 0.0]

    def note(self, chances: Sequence[float], num_accepted: int) -> None:
        """A verification accepted this many of drafts with such chances."""
        for place in (0, 1):
            self._hoped[place] *= self._MEMORY
            self._right[place] *= self._MEMORY
        for k in range(min(num_accepted + 1, len(chances))):
            self._hoped[k > 0] += chances[k]
            self._right[k > 0] += k < num_accepted

    def factor(self, is_first: bool, prior: float = 1.0) -> float:
        """By which such a chance is to be multiplied."""
        place = not is_first
        return (self._right[place] + self._WEIGHT * prior) / (self._hoped[place] + self._WEIGHT)


class _Trials:
    """When a request tries what it does not take for the best."""

    def __init__(self) -> None:
        self.choice: Choice | None = None
        """What is being tried."""
        self._begun_at = 0
        self._drafts = False
        self._num_same = 0
        self._wait = FIRST_PROBE

    @property
    def is_due(self) -> bool:
        """Whether something is to be tried next."""
        return self._num_same >= (PROBE_EVERY if self._drafts else self._wait)

    def begin(self, best: Choice, num_notes: int) -> Choice:
        """Try the best that there is beside what is done lately. num_notes: verifications so far."""
        self.choice = Choice("ar") if self._drafts else best
        self._begun_at = num_notes
        return self.choice

    def tells_nothing_yet(self, num_notes: int) -> bool:
        """Whether what is being tried must go on: drafts tell when they are verified, which may take two forwards."""
        return self.choice != Choice("ar") and num_notes == self._begun_at

    def end(self) -> None:
        """As much of the same as before, or twice as much, and the next one."""
        self.choice, self._num_same = None, 0
        if not self._drafts:
            self._wait = min(2 * self._wait, PROBE_EVERY)

    def note(self, drafts: bool) -> None:
        """What a round does that is no trial."""
        self._num_same = self._num_same + 1 if drafts == self._drafts else 0
        self._drafts = drafts


@dataclass(slots=True)
class _Request:
    """What is known of one generation."""

    own: Acceptance = field(default_factory=Acceptance)
    """Of the block view's drafts."""
    trust: dict[int, Trust] = field(default_factory=dict)
    """In what is suggested, by `Suggestion.length`."""
    suggested: Suggestion | None = None
    """What was last looked at."""
    trials: _Trials = field(default_factory=_Trials)
    hung_on: tuple[int, ...] = ()
    """What the latest choice hung on: most rounds bring nothing new."""
    best: Choice = field(default_factory=lambda: Choice("ar"))
    speed: float = 0.0
    """Tokens a second that the latest choice promised."""


class MeasuredChooser:
    """The way that promises most tokens a second."""

    def __init__(
        self,
        table: CostTable | Callable[[], CostTable],
        *,
        has_adapter: bool,
        first_is_exact: bool,
        can_draft: bool = True,
    ) -> None:
        """table: or what measures it, which nobody's first token waits for. can_draft: somebody trained the block view; else only what
        the text or the table suggests is ever verified."""
        self._can_draft = can_draft
        self._costs = LatelySeen(table) if isinstance(table, CostTable) else None
        self._measure = table
        self._has_adapter = has_adapter
        self._first_is_exact = first_is_exact
        self._all = Acceptance()
        self._trust: dict[int, Trust] = {}
        """In what is suggested, by `Suggestion.length`."""
        self._crowds: tuple[int, dict[int, bool]] = (-1, {})
        """For a version of the costs, whether so many requests fill a forward."""

    @property
    def costs(self) -> LatelySeen:
        """What forwards cost; measured now, if it was not yet."""
        if self._costs is None:
            assert callable(self._measure)
            self._costs = LatelySeen(self._measure())
        return self._costs

    def choose(
        self, g: Generation, num_sharing: int, suggest: Callable[[Generation, int], Suggestion | None]
    ) -> Choice:
        if g.settings.temperature > 0 and g.settings.seed is not None:
            # its tokens hang on what is chosen, and neither others nor a clock must reach into a seeded answer
            return Choice("ar")
        if (self._costs is None and g.num_new == 0) or self._is_crowd(num_sharing):
            return Choice("ar")
        request = self._of(g)
        own, trials = request.own, request.trials
        if trials.choice is not None:
            if trials.tells_nothing_yet(own.num_notes):
                return trials.choice
            trials.end()
        is_trial = trials.is_due
        context = len(g.final) // CONTEXT * CONTEXT
        key = (own.num_notes, self.costs.version, num_sharing, context, is_trial)
        if request.hung_on != key:
            enough = NEARLY if is_trial else ENOUGH
            request.hung_on = key
            request.best, request.speed = self._best(own, self._all, num_sharing, context, enough)
        best = request.best
        if is_trial:
            return trials.begin(best, own.num_notes)
        suggested = suggest(g, min(LONGEST_QUOTE, g.num_left) - 1)
        if suggested is not None:
            quote, faster = self._best_quote(request, suggested, num_sharing, context)
            if faster > (ENOUGH if best.kind == "ar" else AT_HAND) * request.speed:
                return quote
        trials.note(best.kind != "ar")
        return best

    def _is_crowd(self, num_sharing: int) -> bool:
        """Whether so many fill a forward: not even drafts that are all right would pay."""
        version, known = self._crowds
        if version != self.costs.version:
            version, known = self._crowds = (self.costs.version, {})
        found = known.get(num_sharing)
        if found is None:
            cost = self.costs.seconds
            most = max(length / cost(False, length * num_sharing) for length in range(2, LENGTHS[-1] + 1))
            found = known[num_sharing] = most <= ENOUGH / cost(False, num_sharing)
        return found

    def note(self, g: Generation, num_drafted: int, num_accepted: int) -> None:
        request = self._of(g)
        if g.choice is not None and g.choice.kind == "lookup" and request.suggested is not None:
            of_text = request.trust[request.suggested.length], self._trust[request.suggested.length]
            for trust in of_text:
                trust.note(request.suggested.chances[:num_drafted], num_accepted)
        else:
            request.own.note(num_drafted, num_accepted)
            self._all.note(num_drafted, num_accepted)

    def _of(self, g: Generation) -> _Request:
        if g.memo is None:
            g.memo = _Request()
        return g.memo

    def _best_quote(
        self, request: _Request, suggested: Suggestion, num_sharing: int, context: int
    ) -> tuple[Choice, float]:
        """How much of what is suggested is best verified, and the tokens a second that this promises."""
        request.suggested = suggested
        own = request.trust.setdefault(suggested.length, Trust())
        shared = self._trust.setdefault(suggested.length, Trust())
        # others' texts may have misled: each text is given its chance
        factors = [own.factor(is_first, max(shared.factor(is_first), LEAST_TRUST)) for is_first in (True, False)]
        best, most = Choice("ar"), 0.0
        emitted, chance = 1.0, 1.0
        for num, hoped in enumerate(suggested.chances, 1):
            chance *= min(SUREST, hoped * factors[num > 1])
            emitted += chance
            width = num_sharing * (num + 1)
            if width > self.costs.table.num_inputs[-1] * 2:
                break
            speed = emitted / self.costs.seconds(False, width, context)
            if speed > most:
                best, most = Choice("lookup", num + 1), speed
            elif speed < 0.95 * most or chance < HARDLY:
                break
        return best, most

    def note_cost(self, drafting: bool, num_inputs: int, context: float, seconds: float) -> None:
        if self._costs is not None:
            self._costs.note(drafting and self._has_adapter, num_inputs, context, seconds)

    def speeds(
        self, own: Acceptance, shared: Acceptance | None, num_sharing: int, context: int = CONTEXT
    ) -> dict[Choice, float]:
        """Expected tokens a second of one generation, by choice."""
        n, costs = num_sharing, self.costs

        def draft(num_inputs: int) -> float:
            return costs.seconds(self._has_adapter, num_inputs, context)

        found = {Choice("ar"): 1.0 / costs.seconds(False, n, context)}
        if not self._can_draft:
            return found
        accepted, chance = 0.0, 1.0
        known = 0
        exact = self._first_is_exact
        for length in LENGTHS:
            while known < length - 1:  # drafts that a verification looks at
                chance *= own.rate(known, None if shared is None else shared.rate(known))
                accepted += chance
                known += 1
            if length * n > costs.table.num_inputs[-1] * 2 or chance < HARDLY:
                break
            emitted = 1.0 + exact + accepted
            found[Choice("linear", length)] = emitted / (draft(n * length) + costs.seconds(False, n * length, context))
            width = length * (length if exact else length + 1)
            if width <= LARGEST_STEP:
                found[Choice("quadratic", length)] = (1.0 + accepted) / draft(n * width)
        return found

    def _best(
        self,
        own: Acceptance,
        shared: Acceptance | None,
        num_sharing: int,
        context: int,
        enough: float = ENOUGH,
    ) -> tuple[Choice, float]:
        """What is chosen, and the tokens a second that it promises."""
        speeds = self.speeds(own, shared, num_sharing, context)
        ar = speeds.pop(Choice("ar"))
        best = max(speeds, key=lambda choice: speeds[choice], default=None)
        return (best, speeds[best]) if best is not None and speeds[best] > enough * ar else (Choice("ar"), ar)
