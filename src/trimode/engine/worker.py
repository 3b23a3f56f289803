"""A thread that runs an engine, for callers in other threads: a server's event loop, for one."""

import logging
import threading
import time

from trimode.engine.engine import Engine, Entry, Snapshot
from trimode.errors import QueueFullError

__all__ = ["Worker"]

LOG = logging.getLogger(__name__)


class Worker:
    """Takes requests from any thread and ticks while there are some. Listeners are called in its own thread."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._inbox: list[Entry] = []
        self._changed = threading.Condition()
        self._stopped = False
        self._busy = False
        self.snapshot: Snapshot = engine.snapshot()
        """Where the engine stood after the last tick; other threads must not look into it while it runs."""
        self._thread = threading.Thread(target=self._run, name="trimode engine", daemon=True)

    def start(self) -> None:
        """Begin to tick."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """The thread runs."""
        return self._thread.is_alive()

    @property
    def is_idle(self) -> bool:
        """Nothing waits or runs."""
        with self._changed:
            return not self._inbox and not self._busy

    def submit(self, *entries: Entry) -> None:
        """Queue requests, all or none. Raises QueueFullError, ContextLengthError."""
        for entry in entries:
            self.engine.check(entry.answer)
        with self._changed:
            capacity = self.engine.limits.max_waiting
            waiting = self.engine.num_queued + len(self._inbox)
            if waiting + len(entries) > capacity:
                raise QueueFullError(f"{waiting} requests are waiting already, as many as may. Try again in a while.")
            self._inbox.extend(entries)
            self._changed.notify()

    def cancel(self, entry: Entry) -> None:
        """Stop a request before its next forward. No harm if it has ended."""
        entry.cancelled = True
        with self._changed:
            self._changed.notify()

    def drain(self, grace_s: float) -> bool:
        """Wait until nothing is left, for so long at most. True if nothing is left."""
        end = time.monotonic() + grace_s
        while not self.is_idle and self.is_alive:
            if time.monotonic() >= end:
                return False
            time.sleep(0.02)
        return True

    def stop(self) -> None:
        """End the thread; what still runs is cancelled."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout=60)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._busy = not self.engine.is_idle
                while not (self._inbox or self._busy or self._stopped):
                    self._changed.wait()
                # under the lock: else those who come meanwhile would not count them
                for entry in self._inbox:
                    self.engine.submit(entry)
                self._inbox.clear()
                self._busy = True
                stopped = self._stopped
            if stopped:
                self.engine.cancel_all()
            try:
                self.engine.tick()
            except Exception:
                # a bug of ours: those who run hear of it, and those who come later are served
                LOG.exception("The engine failed; all requests end with an error.")
                self.engine.fail_all()
            self.snapshot = self.engine.snapshot()
            if stopped:
                return
