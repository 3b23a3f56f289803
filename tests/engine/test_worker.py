"""The engine's thread: requests from other threads, a full queue, cancelling, draining."""

import threading

import pytest

from tests.worlds import tiny_model
from trimode.engine.engine import Engine, EngineLimits, Entry
from trimode.engine.worker import Worker
from trimode.errors import ContextLengthError, QueueFullError

MODEL = tiny_model(1)
KNOBS = {"mode": "ar", "max_new_tokens": 20, "ignore_eos": True}


class Heard:
    """Waits for the last event."""

    def __init__(self):
        self.output = None
        self._ended = threading.Event()

    def __call__(self, event):
        if event.kind == "finish":
            self.output = event.output
            self._ended.set()

    def wait(self):
        assert self._ended.wait(30)
        return self.output


def entry(heard, prompt=(5,), **knobs):
    return Entry(MODEL.open_answer(list(prompt), {**KNOBS, **knobs}), heard)


def test_requests_of_many_threads_get_their_own_answers():
    worker = Worker(Engine(MODEL, EngineLimits(max_running=3)))
    worker.start()
    heard = [Heard() for _ in range(8)]
    threads = [threading.Thread(target=worker.submit, args=(entry(h, (5, i)),)) for i, h in enumerate(heard)]
    for thread in threads:
        thread.start()
    for i, h in enumerate(heard):
        assert h.wait().token_ids == MODEL.generate([5, i], **KNOBS).token_ids
    assert worker.drain(10)
    worker.stop()
    assert not worker.is_alive


def test_a_full_queue_and_a_request_that_can_never_fit_are_refused():
    worker = Worker(Engine(MODEL, EngineLimits(max_waiting=2, cache_positions=64)))
    worker.submit(entry(Heard()))
    worker.submit(entry(Heard()))
    with pytest.raises(QueueFullError):
        worker.submit(entry(Heard()))
    with pytest.raises(ContextLengthError, match="64"):
        worker.submit(entry(Heard(), max_new_tokens=100))


def test_stopping_the_thread_ends_what_runs_properly():
    worker = Worker(Engine(MODEL))
    worker.start()
    heard = Heard()
    worker.submit(entry(heard, max_new_tokens=500))
    worker.stop()
    assert heard.wait().finish_reason in ("cancelled", "length")
