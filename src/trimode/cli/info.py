"""`trimode info`: what a checkpoint is and what running it takes, from its headers alone."""

from typing import Annotated, Any

import typer

from trimode.cli import screen
from trimode.cli.options import Json
from trimode.device import NATIVE_MISSING, available_bytes, memory_bytes, native_kernels
from trimode.viz import terminal

__all__ = ["info"]


def info(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Preset, directory, GGUF file or hub id.")],
    json: Json = False,
) -> None:
    """Tell what a checkpoint is and whether it would run here.

    Sizes, modes, parameters and the memory needed, from the headers alone: the weights are not read.
    """
    from trimode.checkpoint import describe, open_checkpoint

    facts: dict[str, Any] = describe(open_checkpoint(path))
    machine = {"memory_bytes": memory_bytes(), "available_bytes": available_bytes()}
    engine = engine_on_the_cpu(facts["dtype"], native_kernels())
    verdicts = {dtype: verdict(needed, **machine) for dtype, needed in facts["memory_bytes"].items()}
    if json:
        screen.print_json({**facts, "machine": machine, "runs_here": verdicts, "engine": engine})
    else:
        page = terminal.info_page({**facts, "runs_here": verdicts, "engine": engine}, machine)
        screen.answers_console().print(page, soft_wrap=True)


def engine_on_the_cpu(stored_dtype: str, kernels: list[str]) -> dict[str, Any]:
    """What `trimode.load` would run this checkpoint with on the CPU, and why."""
    exact = stored_dtype if stored_dtype in ("float32", "bfloat16", "float16") else "float32"
    if not kernels:
        precision = "bfloat16" if stored_dtype == "int8" else exact
        return {"name": "torch", "kernels": None, "precision": precision, "why": f"no native engine: {NATIVE_MISSING}"}
    if exact == "float16":
        why = "--quantize int8 is faster, by the native engine."
        return {"name": "torch", "kernels": None, "precision": "float16", "why": why}
    if stored_dtype == "float32":
        why = "--quantize int8 is faster and rounds the weights."
        return {"name": "native", "kernels": kernels[0], "precision": "float32", "why": why}
    why = f"--quantize none computes in {exact}: slower, and nothing is rounded to int8."
    return {"name": "native", "kernels": kernels[0], "precision": "int8", "why": why}


def verdict(needed: int, *, memory_bytes: int | None, available_bytes: int | None) -> str:
    """Whether something that needs `needed` bytes would run here."""
    if memory_bytes is None:
        return ""
    if needed > memory_bytes:
        return "does not fit here"
    if available_bytes is not None and needed > available_bytes:
        return "would run here with more memory free"
    return "runs here"
