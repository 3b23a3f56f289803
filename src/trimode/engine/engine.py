"""Many prompts at once: requests of any mode join and leave at any step and share forwards.

The engine owns the cache, the order and the forwards; what an answer says is the decoders' business alone, so that it is the same here
as in the reference loop. A tick is: let go, let in, plan, make room, run, absorb. A request that must give its room to an older one
loses keys and values and nothing else: they are computed again from what is final.

One thread calls `tick` and `submit` (`engine.worker` brings requests of other threads there); anyone may cancel an entry.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from trimode.decoding.generate import Observer, absorb_predictions, apply, check_step, plan_steps
from trimode.decoding.interface import Generation, Predictions, Step
from trimode.decoding.trace import traced
from trimode.engine.answer import Answer
from trimode.engine.language_model import LanguageModel, num_positions
from trimode.engine.pages import Extent, Extents, Prefixes, num_common
from trimode.engine.request import StreamEvent
from trimode.engine.scheduler import FairQueue, Pace, num_ahead, piece_of, without_leading
from trimode.errors import ContextLengthError
from trimode.model.views import Causal

__all__ = ["Engine", "EngineLimits", "Entry", "Listener", "Snapshot"]

LOG = logging.getLogger(__name__)
LEAST_REMEMBERED = 16
"""A shorter prefix is sooner read again than looked up."""
FIRST_ROOM = 64
"""Positions for the answer that a request starts with; its extent doubles as it grows."""

Listener = Callable[[StreamEvent], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """How much an engine holds at a time."""

    max_running: int = 32
    """Requests that share forwards."""
    max_waiting: int = 256
    """Requests in the queue; more are refused."""
    cache_positions: int = 16_384
    """Tokens of all running requests together that the cache holds, rounded up to a power of two."""
    prefill_inputs: int | None = None
    """Inputs of long prompts that join a forward while others decode; None: as many as add less than an ordinary step."""
    prefill_inputs_alone: int = 512
    """The same while nobody waits for a token."""


@dataclass(slots=True, eq=False)
class Entry:
    """One request in the engine."""

    answer: Answer
    listener: Listener
    """Gets its events, the last of which is `finish`."""
    client: str = ""
    """Clients take turns in the queue."""
    wants_canvas: bool = False
    cancelled: bool = False
    """Set it to stop the request: it leaves before the next forward, with finish_reason "cancelled"."""
    arrival: int = -1
    """Older requests have smaller numbers and never make room for younger ones."""
    extent: Extent | None = None
    slot: int = -1
    step: Step | None = None
    """Planned and not run yet, because it is read in pieces or waits for room."""
    restore_to: int = 0
    """Tokens that were cached before the request lost its room, and must be again before it goes on."""
    num_reused: int = 0
    """Prompt tokens whose keys came from another request."""

    @property
    def generation(self) -> Generation:
        return self.answer.generation


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Where an engine stands."""

    running: int
    waiting: int
    """Queued, or put back into the queue."""
    positions: int
    """Cache positions in all."""
    positions_running: int
    positions_remembered: int
    preemptions: int
    """Times that a request made room, since the start."""
    reused_tokens: int
    """Prompt tokens that were not read again, since the start."""
    forwards: int
    """Passes through the model, each shared by all who ran, since the start."""


@dataclass(slots=True)
class _Work:
    """What one request contributes to this forward."""

    entry: Entry
    step: Step
    is_piece: bool
    """A part of its step that is cached ahead, or keys that were lost."""


class Engine:
    """Continuous batching over one model."""

    def __init__(
        self, model: LanguageModel, limits: EngineLimits | None = None, *, observe: Observer | None = None
    ) -> None:
        self.model = model
        self.limits = limits or EngineLimits()
        self._observe = observe
        num = 1 << (self.limits.cache_positions - 1).bit_length()
        self._extents = Extents(num, smallest=min(num, 64))
        self._prefixes = Prefixes()
        self._cache = model.forward.make_cache([num])
        # slots are names of extents: they hold nothing until they are placed
        self._cache.starts = [0] * self.limits.max_running
        self._cache.lengths = [0] * self.limits.max_running
        self._slots = list(range(self.limits.max_running))
        self._runner = model.make_runner(self._cache)
        self._run = traced(self._runner, observe)
        self._queue: FairQueue[Entry] = FairQueue(self.limits.max_waiting)
        self._running: list[Entry] = []
        self._preempted: list[Entry] = []
        self._num_arrived = 0
        self._num_preemptions = 0
        self._num_reused = 0
        self._num_forwards = 0
        self._pace = Pace()

    # ---- from outside -----------------------------------------------------------------------------------------------------

    def check(self, answer: Answer) -> None:
        """Refuses a request that this engine's cache could never hold."""
        need = num_positions(answer.generation)
        if need > self._extents.num_positions:
            raise ContextLengthError(
                f"Prompt and answer may take {need:,} positions; this server's cache holds {self._extents.num_positions:,}. "
                "Shorten the prompt or lower max_new_tokens."
            )

    def submit(self, entry: Entry) -> None:
        """Queue a request. Raises QueueFullError, ContextLengthError."""
        self.check(entry.answer)
        entry.arrival = self._num_arrived
        self._queue.put(entry.client, entry)
        self._num_arrived += 1

    def cancel_all(self) -> None:
        """Stop every request."""
        for entry in (*self._running, *self._preempted, *self._queue):
            entry.cancelled = True

    def fail_all(self) -> None:
        """End every request with an error."""
        for entry in (*self._running, *self._preempted, *self._queue):
            self._end(entry, "error")

    @property
    def num_queued(self) -> int:
        """Requests that were never let in yet."""
        return len(self._queue)

    @property
    def is_idle(self) -> bool:
        """Nobody runs and nobody waits."""
        return not (self._running or self._preempted or len(self._queue))

    def snapshot(self) -> Snapshot:
        """Counts for whoever watches."""
        return Snapshot(
            running=len(self._running),
            waiting=len(self._queue) + len(self._preempted),
            positions=self._extents.num_positions,
            positions_running=sum(e.extent.length for e in self._running if e.extent is not None),
            positions_remembered=self._prefixes.num_positions,
            preemptions=self._num_preemptions,
            reused_tokens=self._num_reused,
            forwards=self._num_forwards,
        )

    # ---- one tick ---------------------------------------------------------------------------------------------------------

    def tick(self) -> bool:
        """One forward for all who run. False if there was nothing to do."""
        self._let_go()
        self._let_in()
        self._plan()
        work = self._with_room(self._share())
        if not work:
            return False
        start = time.perf_counter()
        try:
            predictions = self._run([w.entry.generation for w in work], [w.step for w in work])
            self._num_forwards += 1
            self._absorb(work, predictions)
            self._note_pace(work, time.perf_counter() - start)
        except Exception:
            LOG.exception("A forward failed; its %d requests end with an error.", len(work))
            for w in work:
                if w.entry.generation.finish_reason is None:
                    self._end(w.entry, "error")
        return True

    def run_until_idle(self) -> None:
        """Ticks until nobody is left."""
        while not self.is_idle:
            self.tick()

    def _let_go(self) -> None:
        for entry in [e for e in (*self._running, *self._preempted, *self._queue) if e.cancelled]:
            self._end(entry, "cancelled")

    def _let_in(self) -> None:
        while self._slots:
            entry = self._preempted[0] if self._preempted else self._queue.peek()
            if entry is None or not self._settle(entry):
                return
            if self._preempted:
                self._preempted.pop(0)
            else:
                self._queue.pop()
            self._running.append(entry)
            self._running.sort(key=lambda e: e.arrival)

    def _settle(self, entry: Entry) -> bool:
        """Give a request room, and the keys of its prefix if they are there. False: there is no room now."""
        g = entry.generation
        if entry.step is None and not entry.restore_to:
            entry.step = plan_steps([g])[0]
            check_step(g, entry.step)
        wanted = min(num_positions(g), self._need(entry) + FIRST_ROOM)
        num_useful = entry.restore_to
        if not num_useful and entry.step is not None:
            num_useful = num_ahead(g, entry.step)
        donor, start, num_reused = self._longest_prefix(g.final[:num_useful])
        extent = self._take(wanted, keep=donor)
        if extent is None and donor is not None:
            num_reused = 0
            extent = self._take(wanted)
        if extent is None:
            return False
        entry.extent, entry.slot = extent, self._slots.pop()
        self._cache.place(entry.slot, extent.start, extent.length)
        self._runner.admit(g, entry.slot)
        if num_reused >= LEAST_REMEMBERED:
            self._cache.copy(start, extent.start, num_reused)
            self._advance(entry, num_reused)
            self._num_reused += num_reused
            entry.num_reused += num_reused
        return True

    def _longest_prefix(self, tokens: list[int]) -> tuple[Extent | None, int, int]:
        """The remembered extent to keep, where to copy from, and how much."""
        if len(tokens) < LEAST_REMEMBERED:
            return None, 0, 0
        donor, most = self._prefixes.longest(tokens)
        start = 0 if donor is None else donor.start
        for other in self._running:
            g = other.generation
            common = num_common(np.asarray(g.final[: g.cached]), np.asarray(tokens))
            if common > most and other.extent is not None:
                donor, start, most = None, other.extent.start, common
        return donor, start, most

    def _need(self, entry: Entry) -> int:
        """Positions that a request's next forwards reach up to."""
        g = entry.generation
        num_inputs = 1 if entry.step is None else len(entry.step.tokens)
        return max(g.cached, entry.restore_to) + num_inputs

    def _advance(self, entry: Entry, num: int) -> None:
        """The first `num` tokens behind the cursor are in the cache now, without the decoder's doing."""
        g = entry.generation
        if entry.restore_to:
            g.cached += num
            if g.cached == entry.restore_to:
                entry.restore_to = 0
        else:
            assert entry.step is not None
            entry.step = without_leading(entry.step, num)
            g.cached += num

    def _plan(self) -> None:
        free = [e for e in self._running if e.step is None and not e.restore_to]
        for entry, step in zip(free, plan_steps([e.generation for e in free]), strict=True):
            check_step(entry.generation, step)
            entry.step = step

    def _share(self) -> list[_Work]:
        """What each request may do in this forward: short steps whole, long ones in pieces while the allowance lasts."""
        reading = [e for e in self._running if self._is_reading(e)]
        others = len(reading) < len(self._running)
        left = self.limits.prefill_inputs_alone
        if others:
            left = self.limits.prefill_inputs or self._pace.allowance
        work = []
        for entry in self._running:
            if entry not in reading:
                assert entry.step is not None
                work.append(_Work(entry, entry.step, False))
                continue
            if left <= 0:
                continue
            one = self._piece(entry, left)
            left -= len(one.step.tokens)
            work.append(one)
        return work

    def _note_pace(self, work: list[_Work], seconds: float) -> None:
        num_read = sum(len(w.step.tokens) for w in work if w.is_piece)
        if len(work) > sum(w.is_piece for w in work):
            self._pace.note(num_read, seconds)

    def _is_reading(self, entry: Entry) -> bool:
        return bool(entry.restore_to) or entry.generation.cached < len(entry.generation.prompt) - 1

    def _piece(self, entry: Entry, most: int) -> _Work:
        g = entry.generation
        if entry.restore_to:
            tokens = tuple(g.final[g.cached : min(entry.restore_to, g.cached + most)])
            return _Work(entry, Step(kind="prefill", tokens=tokens, view=Causal()), True)
        step = entry.step
        assert step is not None
        num = num_ahead(g, step)
        # what must stay together (a block of masks) may exceed the allowance: else it would never run
        if len(step.tokens) <= most or num == 0:
            return _Work(entry, step, False)
        return _Work(entry, piece_of(step, min(num, most)), True)

    # ---- room -------------------------------------------------------------------------------------------------------------

    def _with_room(self, work: list[_Work]) -> list[_Work]:
        """The same, where each request's extent holds its inputs; the youngest make room for the oldest."""
        ready = []
        for w in work:
            if w.entry.extent is None:  # made room for an older one a moment ago
                continue
            if self._has_room(w.entry, w.entry.generation.cached + len(w.step.tokens)):
                ready.append(w)
        # rows alike and in order of place: one kernel call then serves many
        ready.sort(key=lambda w: (len(w.step.tokens), self._cache.starts[w.entry.slot]))
        return ready

    def _has_room(self, entry: Entry, need: int) -> bool:
        extent = entry.extent
        assert extent is not None
        if need <= extent.length:
            return True
        # given back first: the larger one may contain it, and nobody writes before the copy is made
        self._extents.give_back(extent)
        wanted = min(num_positions(entry.generation), need + FIRST_ROOM)
        new = self._take(wanted)
        while new is None:
            younger = [e for e in self._running if e.arrival > entry.arrival]
            if not younger:
                entry.extent = None
                self._preempt(entry)
                return False
            self._preempt(younger[-1], remember=False)
            new = self._take(wanted)
        self._cache.copy(extent.start, new.start, entry.generation.cached)
        entry.extent = new
        self._cache.place(entry.slot, new.start, new.length)
        return True

    def _take(self, num: int, keep: Extent | None = None) -> Extent | None:
        """An extent, forgetting remembered prefixes for it if need be."""
        while (extent := self._extents.take(num)) is None:
            old = self._prefixes.forget_oldest(keep)
            if old is None:
                return None
            self._extents.give_back(old)
        return extent

    def _preempt(self, entry: Entry, *, remember: bool = True) -> None:
        """Take a request's room; it waits ahead of the queue."""
        g = entry.generation
        self._vacate(entry, remember=remember)
        entry.restore_to = max(entry.restore_to, g.cached)
        g.cached = 0
        self._num_preemptions += 1
        self._preempted.append(entry)
        self._preempted.sort(key=lambda e: e.arrival)

    def _vacate(self, entry: Entry, *, remember: bool) -> None:
        """Take a request out of the running ones and free its slot and extent."""
        g = entry.generation
        self._running.remove(entry)
        self._runner.dismiss(g)
        self._slots.append(entry.slot)
        extent, entry.extent, entry.slot = entry.extent, None, -1
        if extent is None:
            return
        unneeded = [extent]
        if remember and g.cached >= LEAST_REMEMBERED:
            unneeded = self._prefixes.remember(extent, g.final[: g.cached])
        for one in unneeded:
            self._extents.give_back(one)

    # ---- after the forward ------------------------------------------------------------------------------------------------

    def _absorb(self, work: list[_Work], predictions: list[Predictions]) -> None:
        whole: list[tuple[Entry, Step, Predictions]] = []
        for w, predicted in zip(work, predictions, strict=True):
            if w.is_piece:
                self._advance(w.entry, len(w.step.tokens))
                tally = w.entry.generation.tally
                tally.nfe_prefill += 1
                tally.forwards["prefill"] = tally.forwards.get("prefill", 0) + 1
            else:
                whole.append((w.entry, w.step, predicted))
        generations = [entry.generation for entry, _, _ in whole]
        steps = [step for _, step, _ in whole]
        outcomes = absorb_predictions(generations, steps, [predicted for _, _, predicted in whole])
        of = {id(entry.generation): entry.answer.text for entry, _, _ in whole}
        for (entry, step, _), outcome in zip(whole, outcomes, strict=True):
            g = entry.generation
            entry.step = None
            apply(g, step, outcome, lambda g, token: of[id(g)].push(token))
            if self._observe is not None:
                self._observe(g, step, outcome)
            entry.answer.look()
            if g.finish_reason is None:
                self._tell(entry)
            else:
                self._end(entry, g.finish_reason)

    def _tell(self, entry: Entry) -> None:
        for event in entry.answer.news(self.model.token_text if entry.wants_canvas else None):
            entry.listener(event)

    def _end(self, entry: Entry, reason: str) -> None:
        """The request leaves, and its last events are told."""
        if entry in self._running:
            self._vacate(entry, remember=reason != "error")
        elif entry in self._preempted:
            self._preempted.remove(entry)
        else:
            self._queue.remove(entry)
        entry.generation.finish_reason = reason
        entry.answer.look()
        self._tell(entry)
        entry.listener(self.model.finish_event(entry.answer))
