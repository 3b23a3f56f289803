"""The server as a process: SIGTERM lets running answers end and exits with 0; mistakes on the command line are one line."""

import json
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys, torch
torch.set_num_threads(1)
from tests.server.worlds import tiny_text_model
from trimode.server import run
from trimode.server.limits import ServerLimits
from trimode.server.logs import set_up_logging
from trimode.server.service import Service
set_up_logging("info")
run.serve(Service(tiny_text_model(), limits=ServerLimits(grace_s=float(sys.argv[1]))), host="127.0.0.1", port=0)
"""
LONG = {
    "messages": [{"role": "user", "content": "Hello"}],
    "max_tokens": 400,
    "ignore_eos": True,
    "mode": "ar",
    "stream": True,
    "stream_options": {"include_usage": True},
}


def start(grace_s):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(grace_s)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        if line.startswith("{") and (told := json.loads(line))["event"] == "serving":
            return process, told["url"]
    raise AssertionError(f"the server did not start: {process.wait()}")


def read(url):
    chunks = []
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=LONG, timeout=60) as stream:
        assert stream.status_code == 200
        chunks.extend(line.removeprefix("data: ") for line in stream.iter_lines() if line.startswith("data: "))
    assert chunks[-1] == "[DONE]"
    return [json.loads(chunk) for chunk in chunks[:-1]]


def stop_under_load(grace_s, *, signals=(signal.SIGTERM,)):
    process, url = start(grace_s)
    with ThreadPoolExecutor(8) as pool:
        streams = [pool.submit(read, url) for _ in range(8)]
        end = time.monotonic() + 20
        while "trimode_requests_running 8.0" not in httpx.get(f"{url}/metrics").text:
            assert time.monotonic() < end
            time.sleep(0.02)
        for number in signals:
            process.send_signal(number)
            time.sleep(0.3)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
        told = [stream.result() for stream in streams]
    out, errors = process.communicate(timeout=30)
    assert out == ""
    assert "Traceback" not in errors
    return process.returncode, told, errors


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_lets_running_answers_end(number):
    status, told, errors = stop_under_load(60, signals=[number])
    assert status == 0
    for chunks in told:
        assert chunks[-1]["usage"]["completion_tokens"] == 400
        assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert json.loads(errors.splitlines()[-1])["event"] == "stopped"


@pytest.mark.parametrize(
    ("grace_s", "signals"),
    [(0.2, [signal.SIGTERM]), pytest.param(60, [signal.SIGTERM, signal.SIGTERM], marks=pytest.mark.slow)],
)
def test_after_the_grace_each_client_is_told_why(grace_s, signals):
    status, told, _ = stop_under_load(grace_s, signals=signals)
    assert status == 0
    assert {chunks[-1]["error"]["code"] for chunks in told} == {"server_stopping"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "http"], "--port must be a whole number"),
        (["--port", "70000"], "65535"),
        (["--api-key-file", "/no/such/file"], "/no/such/file"),
        (["--max-running", "0"], "--max-running"),
        (["--log-level", "loud"], "loud"),
        (["--requests-per-key", "3"], "--requests-per-key"),
        (["--grace", "-1"], "--grace"),
        (["no-such-model"], "no-such-model"),
        (["--prot", "1"], "--port"),
        (["a", "b"], "b"),
    ],
    ids=str,
)
def test_mistakes_on_the_command_line_are_one_line(capfd, arguments, said):
    from trimode.cli.app import run

    assert run(["serve", *arguments]) == 2
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert said in printed.err
