"""Keys, limits, a full queue, clients that leave or take nothing, connections that say nothing, counts, and silence about texts."""

import contextlib
import json
import logging
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.server.worlds import serving
from trimode.errors import SettingError
from trimode.server.keys import ApiKeys
from trimode.server.limits import ServerLimits

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]
LONG = {"messages": HELLO, "max_tokens": 600, "ignore_eos": True, "mode": "ar"}


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)


def test_only_those_with_a_key_are_let_in(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text("# ours\nalpha-key\n\nbeta-key\n")
    monkeypatch.setenv("TRIMODE_API_KEYS", "gamma-key")
    with serving(keys=ApiKeys.read(file)) as (url, _), httpx.Client(base_url=url, timeout=30) as http:
        body = {"messages": HELLO, "max_tokens": 2}
        for header in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "alpha-key"},
            {"Authorization": "Bearer"},
        ):
            for reply in (http.post(CHAT, json=body, headers=header), http.get("/v1/models", headers=header)):
                assert reply.status_code == 401
                assert reply.json()["error"]["type"] == "authentication_error"
                assert reply.headers["www-authenticate"] == "Bearer"
        for key in ("alpha-key", "beta-key", "gamma-key"):
            assert http.post(CHAT, json=body, headers={"Authorization": f"Bearer {key}"}).status_code == 200
        assert http.get("/metrics").status_code == 401
        assert http.get("/health").status_code == 200
        assert http.get("/").status_code == 200


@pytest.mark.parametrize("content", [None, "", "# nothing\n", "two words", "\x00"])
def test_a_file_without_keys_is_refused(tmp_path, content):
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SettingError):
        ApiKeys.read(file)


def test_a_full_queue_and_a_greedy_key_are_told_when_to_come_back():
    with (
        serving(engine={"max_running": 1, "max_waiting": 1}) as (url, service),
        httpx.Client(base_url=url, timeout=60) as http,
        ThreadPoolExecutor(4) as pool,
    ):
        first = pool.submit(http.post, CHAT, json=LONG)
        until(lambda: service.worker.snapshot.running == 1)
        second = pool.submit(http.post, CHAT, json={**LONG, "max_tokens": 2})
        until(lambda: service.num_calls == 2)
        refused = http.post(CHAT, json=LONG)
        assert refused.status_code == 429
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert first.result().status_code == second.result().status_code == 200
    keys = ApiKeys(["a", "b"])
    limits = ServerLimits(requests_per_key=1)
    with (
        serving(keys=keys, limits=limits) as (url, service),
        httpx.Client(base_url=url, timeout=60) as http,
        ThreadPoolExecutor(4) as pool,
    ):
        busy = pool.submit(http.post, CHAT, json=LONG, headers={"Authorization": "Bearer a"})
        until(lambda: service.num_calls == 1)
        again = http.post(CHAT, json=LONG, headers={"Authorization": "Bearer a"})
        assert again.status_code == 429
        assert "retry-after" in again.headers
        assert http.post(CHAT, json={**LONG, "max_tokens": 2}, headers={"Authorization": "Bearer b"}).status_code == 200
        assert busy.result().status_code == 200
        after = http.post(CHAT, json={**LONG, "max_tokens": 2}, headers={"Authorization": "Bearer a"})
        assert after.status_code == 200


def test_sizes_and_times_are_bounded():
    limits = ServerLimits(max_body_bytes=5000, max_prompt_tokens=50, max_answer_tokens=20, request_time_s=0.001)
    with serving(limits=limits) as (url, service), httpx.Client(base_url=url, timeout=30) as http:
        big = http.post(CHAT, content=b" " * 10_000_000, headers={"content-type": "application/json"})
        assert big.status_code == 413
        assert "5,000" in big.json()["error"]["message"]
        long = http.post(CHAT, json={"messages": [{"role": "user", "content": "word " * 100}]})
        assert long.status_code == 400
        assert long.json()["error"]["code"] == "context_length_exceeded"
        assert http.post(CHAT, json={"messages": HELLO, "max_tokens": 21}).status_code == 400
        for knob in ("block_length", "block_size"):  # one forward over thousands of masks would hold up everybody
            wide = http.post(CHAT, json={"messages": HELLO, "max_tokens": 4, "mode": "diffusion", knob: 1024})
            assert (wide.status_code, wide.json()["error"]["param"]) == (400, "block_length")
            assert "at most 128 here; got 1,024" in wide.json()["error"]["message"]
        late = http.post(CHAT, json={"messages": HELLO, "ignore_eos": True})
        assert late.status_code == 408
        assert late.json()["error"]["code"] == "timeout"
        with http.stream("POST", CHAT, json={"messages": HELLO, "ignore_eos": True, "stream": True}) as stream:
            lines = [line for line in stream.iter_lines() if line]
        assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "timeout"
        assert lines[-1] == "data: [DONE]"
        until(lambda: service.worker.is_idle)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_what_it_held(stream):
    with serving() as (url, service):
        host, port = url.removeprefix("http://").split(":")
        body = json.dumps({**LONG, "stream": stream, "n": 3}).encode()
        with socket.create_connection((host, int(port))) as sock:
            sock.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                + f"Content-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            until(lambda: service.worker.snapshot.running == 3)
        until(lambda: service.worker.snapshot.running == 0, seconds=5)
        assert service.num_calls == 0
        assert service.worker.snapshot.positions_running == 0


def test_a_client_that_reads_nothing_is_given_up_and_harms_nobody():
    limits = ServerLimits(send_time_s=0.3)
    with serving(limits=limits) as (url, service), httpx.Client(base_url=url, timeout=60) as http:
        host, port = url.removeprefix("http://").split(":")
        body = json.dumps({**LONG, "stream": True, "n": 16, "logprobs": True, "top_logprobs": 20}).encode()
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect((host, int(port)))
            sock.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                + f"Content-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            until(lambda: service.worker.snapshot.running)
            assert http.post(CHAT, json={"messages": HELLO, "max_tokens": 2}).status_code == 200
            until(lambda: service.num_calls == 0, seconds=60)
        until(lambda: service.worker.snapshot.running == 0)


def test_connections_that_say_nothing_are_bounded_and_closed():
    limits = ServerLimits(max_connections=20, body_time_s=3)
    with (
        serving(limits=limits) as (url, _),
        httpx.Client(base_url=url, timeout=30) as http,
        contextlib.ExitStack() as open_sockets,
    ):
        assert http.get("/health").status_code == 200
        host, port = url.removeprefix("http://").split(":")
        socks = [open_sockets.enter_context(socket.create_connection((host, int(port)))) for _ in range(200)]
        # the one that was there before is served, whoever else knocks
        assert http.get("/health").status_code == 200
        assert "trimode_connections 20.0" in http.get("/metrics").text
        for sock in socks:
            sock.settimeout(15)
            with contextlib.suppress(ConnectionResetError):
                assert sock.recv(1) == b""
            sock.close()
        until(lambda: "trimode_connections 1.0" in http.get("/metrics").text)
        with httpx.Client(base_url=url) as other:
            assert other.get("/health").status_code == 200


def test_a_head_and_a_body_that_never_end_are_given_up():
    limits = ServerLimits(body_time_s=0.4)
    with serving(limits=limits) as (url, _):
        host, port = url.removeprefix("http://").split(":")
        for begun in (
            b"POST /v1/chat/completions HTTP/1.1\r\nHos",
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{",
        ):
            with socket.create_connection((host, int(port)), timeout=10) as sock:
                sock.sendall(begun)
                got = b""
                try:
                    while piece := sock.recv(4096):
                        got += piece
                except ConnectionResetError:
                    pass
                assert got == b"" or got.startswith(b"HTTP/1.1 408")


def test_a_failing_forward_is_an_error_of_the_servers_and_the_next_request_is_answered():
    with serving() as (url, service), httpx.Client(base_url=url, timeout=30) as http:
        engine = service.worker.engine
        whole = engine._run

        def broken(generations, steps):
            raise RuntimeError("out of luck")

        logging.getLogger("trimode.engine.engine").disabled = True
        try:
            engine._run = broken
            reply = http.post(CHAT, json={"messages": HELLO, "max_tokens": 3})
            assert reply.status_code == 500
            assert reply.json()["error"]["type"] == "server_error"
            assert "luck" not in reply.text
            with http.stream("POST", CHAT, json={"messages": HELLO, "stream": True}) as stream:
                assert "server_error" in "".join(stream.iter_text())
        finally:
            logging.getLogger("trimode.engine.engine").disabled = False
            engine._run = whole
        assert http.post(CHAT, json={"messages": HELLO, "max_tokens": 3}).status_code == 200


def test_what_happens_is_counted():
    with serving() as (url, _), httpx.Client(base_url=url, timeout=30) as http:
        for mode in ("ar", "self_spec", "diffusion"):
            http.post(CHAT, json={"messages": HELLO, "max_tokens": 8, "mode": mode, "ignore_eos": True})
        http.post(CHAT, json={"nonsense": 1})
        http.get("/no/such/path")
        text = http.get("/metrics").text
        for line in (
            'trimode_http_requests_total{path="/v1/chat/completions",status="200"} 3.0',
            'trimode_http_requests_total{path="/v1/chat/completions",status="400"} 1.0',
            'trimode_http_requests_total{path="other",status="404"} 1.0',
            'trimode_tokens_total{mode="ar"} 8.0',
            'trimode_answers_total{finish_reason="length",mode="self_spec"} 1.0',
            'trimode_forwards_total{kind="verify"}',
            'trimode_forwards_total{kind="denoise"}',
            'trimode_tokens_per_forward_count{mode="diffusion"} 1.0',
            "trimode_acceptance_length_count 1.0",
            'trimode_time_to_first_token_seconds_count{mode="ar"} 1.0',
            'trimode_time_per_token_seconds_count{mode="ar"} 1.0',
            "trimode_requests_running",
            "trimode_queue_length 0.0",
            "trimode_cache_positions 16384.0",
            "trimode_engine_forwards_total",
        ):
            assert line in text, line


@contextlib.contextmanager
def logged():
    """The server's logging as a process sets it up; afterwards as it was."""
    from trimode.server.logs import set_up_logging

    names = ("trimode", "uvicorn", "asyncio")
    before = [
        (logging.getLogger(n).handlers, logging.getLogger(n).propagate, logging.getLogger(n).level) for n in names
    ]
    set_up_logging("info")
    try:
        yield
    finally:
        for name, (handlers, propagate, level) in zip(names, before, strict=True):
            logger = logging.getLogger(name)
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)


def test_logs_are_json_and_tell_no_text(capsys):
    with logged(), serving() as (url, _), httpx.Client(base_url=url, timeout=30) as http:
        asked = [{"role": "user", "content": "My secret is xyzzy"}]
        answer = http.post(CHAT, json={"messages": asked, "max_tokens": 4, "mode": "ar"})
        http.post(CHAT, json={"messages": "xyzzy"})
        http.get("/xyzzy")
    printed = capsys.readouterr().err
    lines = [json.loads(line) for line in printed.splitlines()]
    assert "xyzzy" not in printed
    first = next(line for line in lines if line["event"] == "request")
    assert first["status"] == 200
    assert (first["mode"], first["completion_tokens"]) == ("ar", 4)
    assert first["id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize("stream", [False, True])
def test_what_stands_around_a_gap_is_counted_as_prompt_in_the_log_and_the_counters(capsys, stream):
    gap = {"prompt": "The capital of", "suffix": " is Paris, and it is large.", "max_tokens": 4}
    with logged(), serving() as (url, service), httpx.Client(base_url=url, timeout=30) as http:
        http.post("/v1/completions", json={**gap, "stream": stream})
        counters = http.get("/metrics").text
        given = [service.encode_text(gap[name], add_special_tokens=False) for name in ("prompt", "suffix")]
    line = next(line for line in map(json.loads, capsys.readouterr().err.splitlines()) if "completion_tokens" in line)
    num_given = sum(map(len, given))
    assert (line["prompt_tokens"], line["completion_tokens"]) == (num_given, 4)
    assert 'trimode_tokens_total{mode="diffusion"} 4.0' in counters
    assert f"trimode_prompt_tokens_total {num_given}.0" in counters


def test_requests_while_stopping_are_told_so():
    with serving() as (url, service), httpx.Client(base_url=url, timeout=30) as http:
        assert http.get("/ready").status_code == 200
        service.is_draining = True
        assert http.get("/ready").status_code == 503
        assert http.get("/health").status_code == 200
        reply = http.post(CHAT, json={"messages": HELLO})
        assert reply.status_code == 503
        assert reply.json()["error"]["code"] == "server_stopping"


def test_clients_that_leave_at_any_moment_free_what_they_held():
    """Thirty, each at another moment: one of them leaves just when a token comes."""
    with serving() as (url, service):
        host, port = url.removeprefix("http://").split(":")
        body = json.dumps({**LONG, "stream": True}).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        for i in range(30):
            with socket.create_connection((host, int(port))) as sock:
                sock.sendall(head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
                for _ in range(i % 5 + 1):
                    sock.recv(1000)
            until(lambda: service.num_calls == 0 and service.worker.snapshot.running == 0, seconds=1.5)
