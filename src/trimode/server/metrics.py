"""What an operator's graphs are drawn from, in Prometheus' text form. Each server has a registry of its own."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from trimode.engine.engine import Snapshot
from trimode.engine.request import Stats

__all__ = ["Metrics"]

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_PER_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_PER_FORWARD = (0.5, 1, 1.25, 1.5, 2, 2.5, 3, 4, 6, 8, 12, 16, 32)


class _EngineCollector:
    """Reads the engine's counts when somebody asks."""

    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self._snapshot = snapshot

    def collect(self):
        """The families, for the registry."""
        s = self._snapshot()
        for name, text, value in (
            ("trimode_requests_running", "Requests that share forwards now.", s.running),
            ("trimode_queue_length", "Requests that wait.", s.waiting),
            ("trimode_cache_positions", "Cache positions in all.", s.positions),
            ("trimode_cache_positions_running", "Cache positions held by running requests.", s.positions_running),
            ("trimode_cache_positions_remembered", "Cache positions of remembered prefixes.", s.positions_remembered),
        ):
            yield GaugeMetricFamily(name, text, value=value)
        for name, text, value in (
            ("trimode_engine_forwards", "Passes through the model, each shared by all who ran.", s.forwards),
            ("trimode_preemptions", "Times that a request made room for an older one.", s.preemptions),
            ("trimode_reused_prompt_tokens", "Prompt tokens whose keys were there already.", s.reused_tokens),
        ):
            yield CounterMetricFamily(name, text, value=value)


class Metrics:
    """Counters and histograms of one server."""

    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(snapshot))  # pyright: ignore[reportArgumentType]
        r = self.registry
        self._requests = Counter("trimode_http_requests", "Replies.", ["path", "status"], registry=r)
        self._seconds = Histogram(
            "trimode_http_request_seconds", "From request to end of reply.", ["path"], buckets=_SECONDS, registry=r
        )
        self._answers = Counter("trimode_answers", "Answers, by how they ended.", ["mode", "finish_reason"], registry=r)
        self._prompt_tokens = Counter("trimode_prompt_tokens", "Tokens read.", registry=r)
        self._tokens = Counter("trimode_tokens", "Tokens made.", ["mode"], registry=r)
        self._forwards = Counter("trimode_forwards", "Steps of all answers, by kind.", ["kind"], registry=r)
        self._tpf = Histogram(
            "trimode_tokens_per_forward", "Of an answer's decode forwards.", ["mode"], buckets=_PER_FORWARD, registry=r
        )
        self._acceptance = Histogram(
            "trimode_acceptance_length", "Tokens a round of self_spec emits.", buckets=_PER_FORWARD, registry=r
        )
        self._first = Histogram(
            "trimode_time_to_first_token_seconds", "From arrival.", ["mode"], buckets=_SECONDS, registry=r
        )
        self._per_token = Histogram(
            "trimode_time_per_token_seconds", "After the first.", ["mode"], buckets=_PER_TOKEN_SECONDS, registry=r
        )
        self.connections = Gauge("trimode_connections", "Open connections.", registry=r)

    def note_reply(self, path: str, status: int, seconds: float) -> None:
        """A reply is over. `path` is a route's, or one word for all that is none."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def note_answer(self, stats: Stats, forwards: dict[str, int], finish_reason: str) -> None:
        """An answer is over."""
        self._answers.labels(stats.mode, finish_reason).inc()
        self._prompt_tokens.inc(stats.prompt_tokens)
        self._tokens.labels(stats.mode).inc(stats.tokens)
        for kind, count in forwards.items():
            self._forwards.labels(kind).inc(count)
        if not stats.tokens:
            return
        self._first.labels(stats.mode).observe(stats.first_token_seconds)
        if stats.nfe_decode:
            self._tpf.labels(stats.mode).observe(stats.decode_tpf)
        if stats.acceptance_length is not None:
            self._acceptance.observe(stats.acceptance_length)
        if stats.tokens > 1:
            each = (stats.seconds - stats.first_token_seconds) / (stats.tokens - 1)
            self._per_token.labels(stats.mode).observe(max(each, 0.0))

    def text(self) -> bytes:
        """The page at /metrics."""
        return generate_latest(self.registry)
