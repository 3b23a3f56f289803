"""`trimode serve`: OpenAI's API, every mode, and a page to watch it."""

import importlib.util
from pathlib import Path
from typing import Annotated, Any

import typer

from trimode.cli import screen
from trimode.cli.options import Device, Dtype, Quantize, Threads, whole_number
from trimode.errors import SettingError

__all__ = ["serve"]

LEVELS = ("debug", "info", "warning", "error")


def _option(name: str, metavar: str, panel: str, help: str) -> Any:
    return typer.Option(name, metavar=metavar, rich_help_panel=panel, help=help)


def serve(
    model: Annotated[
        str, typer.Argument(metavar="[MODEL]", help="Preset, directory, GGUF file or hub id.")
    ] = "smollm2-135m",
    host: Annotated[
        str, _option("--host", "ADDRESS", "Address", "Where to listen; 0.0.0.0 is every network.")
    ] = "127.0.0.1",
    port: Annotated[str, _option("--port", "N", "Address", "0 lets the system choose.")] = "8000",
    name: Annotated[
        str | None, _option("--name", "NAME", "Address", "The model's name in requests; MODEL if not given.")
    ] = None,
    api_key_file: Annotated[
        str | None,
        _option(
            "--api-key-file", "FILE", "Access", "One key a line. Keys in TRIMODE_API_KEYS, with commas, count too."
        ),
    ] = None,
    requests_per_key: Annotated[
        str | None, _option("--requests-per-key", "N", "Access", "Requests that one key may have on their way.")
    ] = None,
    max_body: Annotated[str, _option("--max-body", "BYTES", "Limits", "Largest body.")] = "2097152",
    max_prompt_tokens: Annotated[
        str | None, _option("--max-prompt-tokens", "N", "Limits", "Longest prompt; the context's length if not given.")
    ] = None,
    max_answer_tokens: Annotated[str, _option("--max-answer-tokens", "N", "Limits", "Longest answer.")] = "4096",
    max_running: Annotated[str, _option("--max-running", "N", "Limits", "Answers that share forwards.")] = "32",
    max_queue: Annotated[str, _option("--max-queue", "N", "Limits", "Answers that wait; more are told 429.")] = "256",
    max_connections: Annotated[str, _option("--max-connections", "N", "Limits", "Open connections.")] = "512",
    cache_positions: Annotated[
        str, _option("--cache-positions", "N", "Limits", "Tokens that the cache holds, of all requests together.")
    ] = "16384",
    request_time: Annotated[str, _option("--request-time", "SECONDS", "Limits", "Longest time of a request.")] = "600",
    grace: Annotated[
        str, _option("--grace", "SECONDS", "Limits", "After SIGTERM, what runs may go on for so long.")
    ] = "30",
    dtype: Dtype = None,
    quantize: Quantize = None,
    device: Device = None,
    threads: Threads = None,
    log_level: Annotated[
        str, _option("--log-level", "LEVEL", "Output", f"Of the JSON lines on standard error: {', '.join(LEVELS)}.")
    ] = "info",
) -> None:
    """Serve a model over HTTP: OpenAI's API, all modes in one process.

    A page to chat and to watch blocks being filled is at /. SIGTERM or Ctrl-C lets running answers end.
    """
    if log_level not in LEVELS:
        raise SettingError(f"--log-level must be one of {', '.join(LEVELS)}; got {log_level!r}.")
    number = whole_number(port, "--port", low=0)
    if number > 65535:
        raise SettingError(f"--port must be at most 65535; got {number}.")
    missing = [
        p for p in ("fastapi", "uvicorn", "pydantic", "prometheus_client") if importlib.util.find_spec(p) is None
    ]
    if missing:
        raise SettingError(f"Serving needs {', '.join(missing)}. Install: pip install 'trimode[serve]'")
    from trimode.server.keys import ApiKeys
    from trimode.server.limits import ServerLimits

    limits = ServerLimits(
        max_body_bytes=whole_number(max_body, "--max-body", low=1000),
        max_prompt_tokens=_optional(max_prompt_tokens, "--max-prompt-tokens"),
        max_answer_tokens=whole_number(max_answer_tokens, "--max-answer-tokens", low=1),
        requests_per_key=_optional(requests_per_key, "--requests-per-key"),
        request_time_s=whole_number(request_time, "--request-time", low=1),
        max_connections=whole_number(max_connections, "--max-connections", low=1),
        grace_s=whole_number(grace, "--grace", low=0),
    )
    engine = {
        "max_running": whole_number(max_running, "--max-running", low=1),
        "max_waiting": whole_number(max_queue, "--max-queue", low=1),
        "cache_positions": whole_number(cache_positions, "--cache-positions", low=64),
    }
    keys = ApiKeys.read(None if api_key_file is None else Path(api_key_file))
    if limits.requests_per_key is not None and not len(keys):
        raise SettingError("--requests-per-key has no effect without keys. Give --api-key-file, or leave it out.")
    loaded = screen.load(model, dtype=dtype, device=device, threads=threads, quantize=quantize)

    from trimode.engine.engine import EngineLimits
    from trimode.server import run
    from trimode.server.logs import set_up_logging
    from trimode.server.service import Service

    set_up_logging(log_level)
    service = Service(loaded, name=name or model, engine_limits=EngineLimits(**engine), limits=limits, keys=keys)
    run.serve(service, host=host, port=number)


def _optional(written: str | None, label: str) -> int | None:
    return None if written is None else whole_number(written, label, low=1)
