"""What the server must reach, measured: shared forwards, HTTP's own cost, long prompts among streams, a soak that ends with SIGTERM.

    python benchmarks/server.py batching   [--streams 16] [--tokens 64]     16 streams in ar against one
    python benchmarks/server.py overhead   [--tokens 256] [--rounds 3]      HTTP against the library, on one stream
    python benchmarks/server.py prefill    [--prompt 2000]                  a long prompt arrives while 8 streams run
    python benchmarks/server.py soak       [--requests 500] [--at-once 64]  disconnects, bad bodies, timeouts; then SIGTERM under load

Everything runs on this machine and over 127.0.0.1, bounded in count and time. Figures are one run's; --json prints all of them.
"""

import argparse
import asyncio
import json
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

import trimode
from trimode.engine.engine import Engine, EngineLimits, Entry

ROOT = Path(__file__).parents[1]
PROMPTS = [
    "Why is the sky blue?",
    "Write a Python function that reverses a string.",
    "List five fruits that are red.",
    "Explain what a prime number is to a child.",
    "Translate into French: The train leaves at nine.",
    "Tell me about the moon.",
    "What is a good name for a cat?",
    "How do I boil an egg?",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["batching", "overhead", "prefill", "soak"])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=2000)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--at-once", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    measure = {"batching": batching, "overhead": overhead, "prefill": prefill, "soak": soak}[options.what]
    report = measure(options)
    print(json.dumps(report, indent=1) if options.json else "\n".join(f"{k:34} {_shown(v)}" for k, v in report.items()))


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ---- forwards that are shared -----------------------------------------------------------------------------------------------


def batching(options: Any) -> dict[str, Any]:
    """Tokens a second of many streams against one, and mixed modes against each alone."""
    model = trimode.load(options.model, dtype="float32", threads=options.threads)
    tokens = options.tokens or 64
    one = statistics.median(_rate(model, 1, tokens) for _ in range(options.rounds))
    many = statistics.median(_rate(model, options.streams, tokens) for _ in range(options.rounds))
    mixed = [
        (PROMPTS[i % len(PROMPTS)], {"mode": ("ar", "self_spec", "diffusion")[i % 3], "max_new_tokens": 24})
        for i in range(12)
    ]
    together = _together(model, mixed)
    alone = [model.generate(prompt, **knobs).token_ids for prompt, knobs in mixed]
    return {
        "one stream, tokens/s": one,
        f"{options.streams} streams, tokens/s": many,
        "ratio (at least 3)": many / one,
        "mixed modes equal to alone": f"{sum(a == b for a, b in zip(together, alone, strict=True))} of {len(mixed)}",
    }


def _rate(model: Any, num: int, tokens: int) -> float:
    knobs = {"mode": "ar", "max_new_tokens": tokens, "ignore_eos": True}
    start = time.perf_counter()
    ids = _together(model, [(f"{PROMPTS[i % len(PROMPTS)]} ({i})", knobs) for i in range(num)])
    return sum(map(len, ids)) / (time.perf_counter() - start)


def _together(model: Any, asked: list[tuple[str, dict[str, Any]]]) -> list[list[int]]:
    engine = Engine(model, EngineLimits(max_running=len(asked)))
    answers = [model.open_answer(prompt, knobs) for prompt, knobs in asked]
    for answer in answers:
        engine.submit(Entry(answer, lambda event: None))
    engine.run_until_idle()
    return [answer.generation.new_tokens for answer in answers]


# ---- HTTP's own cost --------------------------------------------------------------------------------------------------------


@contextmanager
def in_process(model: Any, **settings: Any):
    """A server of this model in a thread; its address."""
    import uvicorn

    from trimode.server.run import configured
    from trimode.server.service import Service

    service = Service(model, name="model", **settings)
    config = configured(service)
    config.port = 0
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)


def overhead(options: Any) -> dict[str, Any]:
    """One streamed answer over HTTP against the library's `stream`, turn by turn, and to the first token."""
    model = trimode.load(options.model, dtype="float32", threads=options.threads)
    tokens = options.tokens or 256
    whole: list[tuple[float, float]] = []
    first: list[tuple[float, float]] = []
    with in_process(model) as url, httpx.Client(base_url=url, timeout=600) as http:
        for round_ in range(-1, options.rounds):
            for prompt in PROMPTS[:2]:
                length = 8 if round_ < 0 else tokens
                # a prompt of its own each time: none finds its prefix in the engine's cache, as none does in the library
                asked = f"({random.random()}) {prompt}"
                own = _library(model, asked, length)
                told = _over_http(http, asked, length)
                if round_ >= 0:
                    first.append((own[0], told[0]))
                    whole.append((own[1], told[1]))
    added = [1e3 * (b - a) for a, b in first]
    return {
        "library, s": statistics.median(a for a, _ in whole),
        "HTTP, s": statistics.median(b for _, b in whole),
        "HTTP adds, % (at most 5)": 100 * (statistics.median(b / a for a, b in whole) - 1),
        "first token, library, ms": 1e3 * statistics.median(a for a, _ in first),
        "first token, HTTP adds, ms (at most 10)": statistics.median(added),
        "its spread, ms": f"{min(added):.1f} to {max(added):.1f}",
    }


def _library(model: Any, prompt: str, tokens: int) -> tuple[float, float]:
    start = time.perf_counter()
    first = None
    for event in model.stream(prompt, mode="ar", max_new_tokens=tokens, ignore_eos=True):
        if first is None and event.token_ids:
            first = time.perf_counter() - start
    assert first is not None
    return first, time.perf_counter() - start


def _over_http(http: httpx.Client, prompt: str, tokens: int) -> tuple[float, float]:
    body = {
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
        "mode": "ar",
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    start = time.perf_counter()
    first = None
    with http.stream("POST", "/v1/chat/completions", json=body) as stream:
        for line in stream.iter_lines():
            if first is None and '"token_ids":[' in line:
                first = time.perf_counter() - start
    assert first is not None
    return first, time.perf_counter() - start


# ---- a long prompt among streams --------------------------------------------------------------------------------------------


def prefill(options: Any) -> dict[str, Any]:
    """The longest time between two tokens of 8 streams, before and while a long prompt is read."""
    model = trimode.load(options.model, dtype="float32", threads=options.threads)
    engine = Engine(model)
    times: list[list[float]] = [[] for _ in range(8)]

    def listener(mine: list[float]) -> Any:
        return lambda event: mine.append(time.perf_counter()) if event.token_ids else None

    knobs = {"mode": "ar", "max_new_tokens": 1500, "ignore_eos": True}
    entries = [Entry(model.open_answer(PROMPTS[i], knobs), listener(times[i])) for i in range(8)]
    for entry in entries:
        engine.submit(entry)
    for _ in range(60):
        engine.tick()
    ordinary = statistics.median(b - a for mine in times for a, b in pairwise(mine[10:]))
    num_before = [len(mine) for mine in times]
    ids = [5 + i * 7 % 4000 for i in range(options.prompt)]
    late = Entry(model.open_answer(ids, {"mode": "ar", "max_new_tokens": 4, "ignore_eos": True}), lambda event: None)
    arrived = time.perf_counter()
    engine.submit(late)
    num_ticks = 0
    while late.generation.num_new == 0:
        engine.tick()
        num_ticks += 1
    took = time.perf_counter() - arrived
    engine.cancel_all()
    engine.run_until_idle()
    gaps = [b - a for mine, n in zip(times, num_before, strict=True) for a, b in pairwise(mine[n - 1 :])]
    gaps = sorted(gaps)
    return {
        "an ordinary step, ms": 1e3 * ordinary,
        "median gap while reading, steps": statistics.median(gaps) / ordinary,
        "95th percentile, steps": gaps[int(0.95 * len(gaps))] / ordinary,
        "longest gap, steps (at most 3)": gaps[-1] / ordinary,
        "forwards that read the prompt": num_ticks,
        "first token of the long prompt, s": took,
    }


# ---- a soak -----------------------------------------------------------------------------------------------------------------


def soak(options: Any) -> dict[str, Any]:
    """Many requests with mishaps among them, then SIGTERM while streams run."""
    command = [
        sys.executable,
        "-m",
        "trimode",
        "serve",
        options.model,
        "--port",
        "0",
        "--threads",
        str(options.threads),
    ]
    limits = ["--max-queue", "128", "--grace", "120", "--log-level", "info", "--dtype", "float32"]
    with subprocess.Popen([*command, *limits], cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines: list[str] = []
        for line in process.stderr:
            lines.append(line)
            if '"serving"' in line:
                break
        url = json.loads(lines[-1])["url"]
        reading = threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True)
        reading.start()
        try:
            report = asyncio.run(_soak(url, process, options))
            report["exit status after SIGTERM"] = process.wait(timeout=180)
        finally:
            process.kill()
        reading.join(5)
        report["tracebacks in the log"] = sum("traceback" in line.lower() for line in lines)
        return report


async def _soak(url: str, process: Any, options: Any) -> dict[str, Any]:
    import psutil

    rng = random.Random(options.seed)
    memory: list[float] = []
    server = psutil.Process(process.pid)
    statuses: dict[str, int] = {}
    faults: list[str] = []
    answers: dict[str, str] = {}
    num_done = 0
    gate = asyncio.Semaphore(options.at_once)
    bounds = httpx.Limits(max_connections=options.at_once + 8)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=bounds) as http:

        async def one(i: int) -> None:
            nonlocal num_done
            async with gate:
                told = await _one(http, i, random.Random(options.seed * 100_003 + i), answers, faults)
                statuses[told] = statuses.get(told, 0) + 1
                num_done += 1
                if num_done % 20 == 0:
                    memory.append(server.memory_info().rss / 2**20)

        order = list(range(options.requests))
        rng.shuffle(order)
        start = time.perf_counter()
        await asyncio.gather(*(one(i) for i in order))
        seconds = time.perf_counter() - start
        while (counts := await _counts(http))["trimode_requests_running"] or counts["trimode_queue_length"]:
            await asyncio.sleep(0.1)
        streams = [asyncio.create_task(_last(http, i)) for i in range(min(32, options.at_once))]
        while (await _counts(http))["trimode_requests_running"] < len(streams):
            await asyncio.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        ended = await asyncio.gather(*streams)
    after_100 = memory[max(0, 100 // 20 - 1) :]
    return {
        "requests": options.requests,
        "seconds": seconds,
        "replies": dict(sorted(statuses.items())),
        "5xx": sum(n for s, n in statuses.items() if s.startswith("5")),
        "answers unlike their first": len(faults),
        "cache positions held at the end": counts["trimode_cache_positions_running"],
        "memory after 100 requests, MB": after_100[0],
        "memory at the end, MB": after_100[-1],
        "memory grew, % (at most 5)": 100 * (max(after_100) / after_100[0] - 1),
        "streams at SIGTERM": len(ended),
        "of them ended properly": sum(ended),
    }


async def _one(http: httpx.AsyncClient, i: int, rng: random.Random, answers: dict[str, str], faults: list[str]) -> str:
    """One request, which may go wrong on purpose; its status, or what was done to it."""
    mode = rng.choice(["ar", "self_spec", "diffusion", "ar"])
    prompt = rng.choice(PROMPTS)
    stream = rng.random() < 0.5
    # greedy, so that the same question has the same answer whoever runs beside it
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": prompt}],
        "mode": mode,
        "max_tokens": 24,
        "stream": stream,
        "return_token_ids": True,
    }
    fate = rng.random()
    try:
        if fate < 0.1:
            bad = rng.choice([b"{", b"[]", b'{"messages": 3}', json.dumps({**body, "mood": 1}).encode(), b"\xff" * 999])
            reply = await http.post("/v1/chat/completions", content=bad, headers={"content-type": "application/json"})
            return f"{reply.status_code} for a bad body"
        if fate < 0.2:
            await http.post(
                "/v1/chat/completions", json={**body, "stream": False, "max_tokens": 400}, timeout=rng.uniform(0.2, 2)
            )
            return "200"
        if fate < 0.35:
            async with http.stream(
                "POST", "/v1/chat/completions", json={**body, "stream": True, "max_tokens": 400}
            ) as reply:
                left = rng.randrange(1, 12)
                async for _ in reply.aiter_lines():
                    left -= 1
                    if left <= 0:
                        break
            return "left by the client"
        if stream:
            text, ids = "", []
            async with http.stream("POST", "/v1/chat/completions", json=body) as reply:
                if reply.status_code != 200:
                    return str(reply.status_code)
                async for line in reply.aiter_lines():
                    if line.startswith("data: {"):
                        chunk = json.loads(line[6:])
                        if "error" in chunk:
                            return f"5xx in a stream: {chunk['error']['code']}"
                        for choice in chunk["choices"]:
                            text += choice["delta"].get("content") or ""
                            ids += choice.get("token_ids", [])
            status = reply.status_code
        else:
            reply = await http.post("/v1/chat/completions", json=body)
            status = reply.status_code
            if status != 200:
                return str(status)
            choice = reply.json()["choices"][0]
            text, ids = choice["message"]["content"], choice["token_ids"]
        told = json.dumps([text, ids])
        if answers.setdefault(f"{mode} {prompt}", told) != told:
            faults.append(f"{i}: {mode} {prompt}")
        return str(status)
    except httpx.TimeoutException:
        return "given up by the client"


async def _counts(http: httpx.AsyncClient) -> dict[str, float]:
    text = (await http.get("/metrics")).text
    pairs = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


async def _last(http: httpx.AsyncClient, i: int) -> bool:
    """A stream that runs while the server is told to stop: whether it had all its tokens and a proper end."""
    body = {
        "messages": [{"role": "user", "content": PROMPTS[i % len(PROMPTS)]}],
        "mode": "ar",
        "max_tokens": 60,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    ids: list[int] = []
    lines = []
    async with http.stream("POST", "/v1/chat/completions", json=body) as reply:
        async for line in reply.aiter_lines():
            if line:
                lines.append(line)
                if line.startswith("data: {"):
                    ids += json.loads(line[6:])["choices"][0].get("token_ids", [])
    return lines[-1] == "data: [DONE]" and '"finish_reason":"length"' in lines[-2] and len(ids) == 60


if __name__ == "__main__":
    main()
