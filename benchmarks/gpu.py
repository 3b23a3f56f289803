"""What forwards cost on a GPU, at the shapes of the published checkpoints with random weights, and how near to its memory they come.

    python benchmarks/gpu.py [--shape 3b,8b,14b] [--batch 1,8,32] [--context 0,1024,4096] [--quantize int8] [--compile] [--json]
    python benchmarks/gpu.py --shape tiny                  # on any machine, to see that it runs; its figures mean nothing

Variants take turns, round by round, after a warm-up that captures; medians. `ms` is from the call to its results on the host, `device
ms` is between CUDA events around the same call. `memory` is the share of the bandwidth, measured in the same run, at which the weights
and the cached keys are read. Random weights accept no drafts, so tokens a second of self-speculation are arithmetic on these times for
acceptance lengths that are assumed, and say so.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trimode.checkpoint.presets import published_sizes
from trimode.engine.language_model import LanguageModel
from trimode.model.attention import Span
from trimode.model.cache import KeyValueCache
from trimode.model.config import ModelConfig, RopeConfig
from trimode.model.forward import Inputs, TorchForward
from trimode.model.graphs import Capture, CudaCapture, KernelChoice, Rehearsal
from trimode.model.linear import Linear
from trimode.model.lora import Lora
from trimode.model.static import STATIC_KERNELS
from trimode.model.transformer import Transformer
from trimode.model.views import Bidirectional, Causal, VerifyAndPredraft, View

LENGTHS = (1, 2, 4, 8, 16, 32, 64)
BLOCK = 32
QUADRATIC_BLOCK = 8
ASSUMED_ACCEPTANCE = (2.0, 4.0, 6.0)
"""Tokens a round, the bonus token included."""
ADAPTER_RANK = 128
"""Of the published drafters, which act on the attention's output projection."""


def published(size: str) -> ModelConfig:
    """The Nemotron-Labs-Diffusion checkpoint of this size."""
    sizes = published_sizes(f"nvidia/Nemotron-Labs-Diffusion-{size}")
    assert sizes is not None
    return replace(
        sizes,
        family="nemotron_labs_diffusion",
        rope=RopeConfig(theta=1e6, kind="yarn", factor=16.0, original_max_positions=16_384, llama4_beta=0.1),
        max_positions=262_144,
        mask_token_id=100,
        eos_token_ids=(11,),
        trained_for_blocks=True,
    )


SHAPES = {
    "3b": published("3B"),
    "8b": published("8B"),
    "14b": published("14B"),
    "tiny": ModelConfig(
        family="nemotron_labs_diffusion",
        vocab_size=512,
        width=64,
        mlp_width=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_size=16,
        mask_token_id=3,
        eos_token_ids=(2,),
        trained_for_blocks=True,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="3b,8b,14b", help="of 3b, 8b, 14b, tiny; several with commas between them")
    parser.add_argument("--batch", default="1,8,32")
    parser.add_argument("--context", default="0,1024,4096", help="cached positions of each row")
    parser.add_argument("--length", default=",".join(map(str, LENGTHS)), help="inputs of a row, T")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quantize", choices=["none", "int8"], default="none")
    parser.add_argument("--compile", action="store_true", help="captured forwards are compiled whole first: minutes")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    names = options.shape.split(",")
    for name in names:
        if name not in SHAPES:
            refuse(f"There is no shape {name!r}. Use {', '.join(SHAPES)}.")
    has_gpu = torch.cuda.is_available()
    if not has_gpu and names != ["tiny"]:
        refuse("No CUDA device was found; the 3B, 8B and 14B shapes are measured on a GPU. Try --shape tiny.")
    options.batches, options.contexts, options.lengths = (
        numbers(which, given, least)
        for which, given, least in (
            ("batch", options.batch, 1),
            ("context", options.context, 0),
            ("length", options.length, 1),
        )
    )
    if options.rounds < 1:
        refuse(f"--rounds must be at least 1; got {options.rounds}.")
    device = torch.device("cuda" if has_gpu else "cpu")
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if has_gpu else "CPU (figures mean nothing)",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "dtype": "bfloat16" if has_gpu else "float32",
        "quantize": options.quantize,
        "compiled": options.compile,
        "rounds": options.rounds,
        "bandwidth": bandwidth(device),
        "shapes": {},
    }
    for name in names:
        try:
            report["shapes"][name] = measure(SHAPES[name], device, options, report["bandwidth"])
        except torch.OutOfMemoryError:
            refuse(f"The shape {name} does not fit into this device's memory. Use a smaller shape, batch or context.")
    print(json.dumps(report, indent=1) if options.json else as_text(report))


def refuse(why: str) -> None:
    print(why, file=sys.stderr)
    sys.exit(2)


def numbers(name: str, given: str, least: int) -> list[int]:
    parts = given.split(",")
    if not all(part.strip().isdigit() and int(part) >= least for part in parts):
        refuse(f"--{name} takes whole numbers of at least {least} with commas between them; got {given!r}.")
    return sorted({int(part) for part in parts})


# ---- the machine ------------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds of a call that ends with its results on the host: by the wall, and between events on the device."""

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"

    def __call__(self, run: Callable[[], Any]) -> tuple[float, float]:
        if not self._is_gpu:
            start = time.perf_counter()
            run()
            seconds = time.perf_counter() - start
            return seconds, seconds
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start = time.perf_counter()
        first.record()
        run()
        last.record()
        torch.cuda.synchronize()
        return time.perf_counter() - start, first.elapsed_time(last) / 1e3


def bandwidth(device: torch.device) -> dict[str, float]:
    """Bytes a second of reading a large tensor, and of copying one (read and written)."""
    clock = Clock(device)
    num_bytes = (4 << 30) if device.type == "cuda" else (64 << 20)
    source = torch.zeros(num_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    taken: dict[str, list[float]] = {"read": [], "copy": []}
    for round_ in range(-3, 15):
        for which, run in (("read", source.sum), ("copy", lambda: target.copy_(source))):
            seconds = clock(run)[1]
            if round_ >= 0:
                taken[which].append(seconds)
    return {
        "read": num_bytes / statistics.median(taken["read"]),
        "copy": 2 * num_bytes / statistics.median(taken["copy"]),
    }


# ---- the model --------------------------------------------------------------------------------------------------------------


def random_weights(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in Transformer(config).named_parameters():
        if name.endswith("norm.weight"):
            yield name, torch.ones(parameter.shape, dtype=dtype, device=device)
        else:
            yield name, torch.empty(parameter.shape, dtype=dtype, device=device).normal_(std=0.02)


def random_adapter(config: ModelConfig, device: torch.device) -> Lora:
    inputs, outputs = config.part_sizes["output"]
    rank = min(ADAPTER_RANK, outputs)
    factors = {
        (layer, "output"): (
            torch.randn(rank, inputs, device=device) * 0.02,
            torch.randn(outputs, rank, device=device) * 0.02,
        )
        for layer in range(config.num_layers)
    }
    return Lora(factors, 4.0)


def bytes_read(transformer: Transformer, num_cached: int) -> int:
    """Bytes that a forward over one input must read: all weights but the embedding table, and the cached keys and values."""
    config = transformer.config
    itemsize = transformer.embedding.weight.element_size()
    kept = sum(p.numel() * p.element_size() for p in transformer.parameters())
    held = [m.int8 for m in transformer.modules() if isinstance(m, Linear) and m.int8 is not None]
    kept += sum(numbers.numel() + scales.numel() * scales.element_size() for numbers, scales in held)
    table = 0 if config.tied_head else config.vocab_size * config.width * itemsize
    return kept - table + 2 * config.num_layers * config.num_kv_heads * config.head_size * itemsize * num_cached


def inputs_of(num_rows: int, length: int, cached: int, view: View, *, adapted: bool = False) -> Inputs:
    spans = [Span(row * length, length, row, cached, view) for row in range(num_rows)]
    every = list(range(num_rows * length))
    return Inputs(
        tokens=[5 + i % 400 for i in every],
        positions=[cached + offset for _ in range(num_rows) for offset in view.offsets(length)],
        spans=spans,
        adapted=every if adapted else [],
        asked=every,
    )


# ---- measuring --------------------------------------------------------------------------------------------------------------

Variant = tuple[str, TorchForward, KeyValueCache, Inputs]


def run_forward(forward: TorchForward, cache: KeyValueCache, inputs: Inputs) -> None:
    """One forward and the greedy choice of each row, on the host."""
    found = forward(inputs, cache).answers(0, len(inputs.asked))
    (found.logits.argmax(dim=-1) if found.unread_best is None else found.unread_best).tolist()


def take_turns(variants: list[Variant], rounds: int, clock: Clock) -> dict[str, dict[str, float]]:
    """Medians of each variant, which run one after the other in every round."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name, *_ in variants}
    for round_ in range(-4, rounds):  # the second run measures kernels and captures
        for name, *given in variants:
            seconds = clock(partial(run_forward, *given))
            if round_ >= 0:
                taken[name].append(seconds)
    return {
        name: {
            "ms": 1e3 * statistics.median(wall for wall, _ in times),
            "device_ms": 1e3 * statistics.median(device for _, device in times),
        }
        for name, times in taken.items()
    }


def measure(config: ModelConfig, device: torch.device, options: argparse.Namespace, known: dict) -> dict[str, Any]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    transformer = Transformer(config, dtype=dtype)
    transformer.load(random_weights(config, dtype, device), pack=False, quantize=options.quantize == "int8")
    lora = random_adapter(config, device)
    capture: Capture = CudaCapture(device) if device.type == "cuda" else Rehearsal()
    common: dict[str, Any] = {"lora": lora, "dtype": dtype, "device": device}
    eager = TorchForward(transformer, **common)
    choice = KernelChoice(None)
    captured = TorchForward(transformer, **common, capture=capture, choice=choice, compiled=options.compile)
    clock = Clock(device)
    forwards = []
    for batch in options.batches:
        for context in options.contexts:
            forwards += forward_table(eager, captured, batch, context, options, clock)
    fastest = max(known.values())
    for row in forwards:
        if row["length"] == 1 and row["batch"] == 1:
            share = bytes_read(transformer, row["context"]) / (row["captured"]["ms"] / 1e3) / fastest
            row["memory"] = share
    return {
        "parameters": config.num_parameters,
        "forwards": forwards,
        "kernels": kernel_table(transformer, common, capture, options, clock),
        "chosen_kernels": [
            {"batch": s.num_rows, "length": s.length, "sight": s.sight, "kernel": k} for s, k in choice.chosen.items()
        ],
        "decoding": decoding_table(captured, options, clock),
    }


def forward_table(
    eager: TorchForward, captured: TorchForward, batch: int, context: int, options: argparse.Namespace, clock: Clock
) -> list[dict[str, Any]]:
    """Causal forwards over T inputs a row: eager and captured; and drafts (all inputs see one another) with and without the adapter."""
    lengths = options.lengths
    cache = captured.make_cache([context + max(lengths)] * batch)
    variants: list[Variant] = []
    for T in lengths:
        draft = [inputs_of(batch, T, context, Bidirectional(), adapted=adapted) for adapted in (False, True)]
        variants += [
            (f"eager {T}", eager, cache, inputs_of(batch, T, context, Causal())),
            (f"captured {T}", captured, cache, inputs_of(batch, T, context, Causal())),
            (f"draft {T}", captured, cache, draft[0]),
            (f"adapted draft {T}", captured, cache, draft[1]),
        ]
    found = take_turns(variants, options.rounds, clock)
    check_captured(captured, cache)
    one = found.get("captured 1")
    return [
        {
            "batch": batch,
            "context": context,
            "length": T,
            "eager": found[f"eager {T}"],
            "captured": found[f"captured {T}"],
            "is_captured": captured.is_captured(inputs_of(batch, T, context, Causal()), cache),
            "times_one": None if one is None else found[f"captured {T}"]["ms"] / one["ms"],
            "draft": found[f"draft {T}"],
            "adapted_draft": found[f"adapted draft {T}"],
            "adapter": found[f"adapted draft {T}"]["ms"] / found[f"draft {T}"]["ms"] - 1,
        }
        for T in lengths
    ]


def check_captured(forward: TorchForward, cache: KeyValueCache) -> None:
    """A figure of a graph that was never captured would be a lie."""
    refusal = forward.refusal(cache)
    if refusal is not None:
        refuse(f"This device captures no graph: {refusal}")


def kernel_table(
    transformer: Transformer, common: dict[str, Any], capture: Capture, options: argparse.Namespace, clock: Clock
) -> list[dict[str, Any]]:
    """The same causal forward, batch 1, by each attention kernel."""
    is_gpu = common["device"].type == "cuda"
    # the stand-in's flex is neither compiled nor quick, and flash needs a GPU
    kernels = STATIC_KERNELS if is_gpu else ("plain", "sdpa")
    found: list[dict[str, Any]] = []
    for context in options.contexts:
        for T in options.lengths:
            inputs = inputs_of(1, T, context, Causal())
            row: dict[str, Any] = {"context": context, "length": T}
            variants: list[Variant] = []
            for kernel in kernels:
                # each with memory of its own; what lies in it does not matter here
                forward = TorchForward(transformer, **common, capture=capture, choice=KernelChoice(kernel))
                cache = forward.make_cache([context + T])
                try:
                    for _ in range(2):
                        run_forward(forward, cache, inputs)
                    reason = forward.refusal(cache)
                except RuntimeError as error:
                    reason = str(error).splitlines()[0]
                if reason is None:
                    variants.append((kernel, forward, cache, inputs))
                else:
                    row[kernel] = reason[:100]
            row.update({kernel: times["ms"] for kernel, times in take_turns(variants, options.rounds, clock).items()})
            found.append(row)
    return found


def decoding_table(captured: TorchForward, options: argparse.Namespace, clock: Clock) -> list[dict[str, Any]]:
    """Tokens a second of one sequence: `ar` as it runs, the whole loop; and what each acceptance length would make of the forwards."""
    found = []
    quadratic = QUADRATIC_BLOCK * (QUADRATIC_BLOCK + 1)
    for context in options.contexts:
        cache = captured.make_cache([context + quadratic])
        view = VerifyAndPredraft(QUADRATIC_BLOCK, QUADRATIC_BLOCK)
        variants: list[Variant] = [
            ("one", captured, cache, inputs_of(1, 1, context, Causal())),
            ("draft", captured, cache, inputs_of(1, BLOCK, context, Bidirectional(), adapted=True)),
            ("verify", captured, cache, inputs_of(1, BLOCK, context, Causal())),
            ("quadratic", captured, cache, inputs_of(1, quadratic, context, view)),
        ]
        ms = {name: times["ms"] for name, times in take_turns(variants, options.rounds, clock).items()}
        del cache
        rates = {
            f"linear, blocks of {BLOCK}": ms["draft"] + ms["verify"],
            f"quadratic, blocks of {QUADRATIC_BLOCK}": ms["quadratic"],
        }
        found.append(
            {
                "context": context,
                "ar_loop_tokens_per_second": ar_loop(captured, max(context, 1), options),
                "ar_forward_tokens_per_second": 1e3 / ms["one"],
                "assumed": {
                    name: {str(length): length * 1e3 / round_ms for length in ASSUMED_ACCEPTANCE}
                    for name, round_ms in rates.items()
                },
            }
        )
    return found


def ar_loop(captured: TorchForward, num_prompt: int, options: argparse.Namespace) -> float:
    """Tokens a second of `generate` behind a prompt of so many tokens, the prompt's forward left out."""
    model = LanguageModel("random", captured)
    num_tokens = 128 if captured.device.type == "cuda" else 8
    rates = []
    for round_ in range(-2, 3):
        times: list[float] = []
        model.generate(
            [5] * num_prompt,
            mode="ar",
            max_new_tokens=num_tokens,
            ignore_eos=True,
            observe=lambda *_, times=times: times.append(time.perf_counter()),
        )
        if round_ >= 0:
            rates.append((len(times) - 1) / (times[-1] - times[0]))
    return statistics.median(rates)


# ---- printing ---------------------------------------------------------------------------------------------------------------


def as_text(report: dict[str, Any]) -> str:
    speed = {which: f"{value / 1e9:,.0f} GB/s" for which, value in report["bandwidth"].items()}
    lines = [
        f"{report['device']}, torch {report['torch']}, CUDA {report['cuda']}; weights in {report['dtype']}"
        + (", int8 in the layers" if report["quantize"] == "int8" else "")
        + (", compiled" if report["compiled"] else "")
        + f"; medians of {report['rounds']} rounds",
        f"memory bandwidth measured in this run: read {speed['read']}, copy {speed['copy']}; shares are of the greater",
    ]
    for name, found in report["shapes"].items():
        lines += ["", f"{name}: {found['parameters'] / 1e9:.2f} billion parameters, random", ""]
        lines += forward_lines(found["forwards"])
        lines += ["", "attention kernels, batch 1, ms of the whole forward", *kernel_lines(found["kernels"])]
        lines += ["", *decoding_lines(found["decoding"])]
    return "\n".join(lines)


def forward_lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        f"{'batch':>5} {'context':>8} {'T':>4} {'eager ms':>9} {'captured ms':>12} {'device ms':>10} {'times T=1':>10} "
        f"{'draft ms':>9} {'adapted':>9} {'adapter':>8} {'memory':>7}"
    ]
    for r in rows:
        times = "" if r["times_one"] is None else f"{r['times_one']:.2f}"
        memory = f"{r['memory']:.0%}" if "memory" in r else ""
        # too wide a step runs eagerly, and is marked
        mark = " " if r["is_captured"] else "*"
        lines.append(
            f"{r['batch']:>5} {r['context']:>8,} {r['length']:>4} {r['eager']['ms']:>9.3f} "
            f"{r['captured']['ms']:>11.3f}{mark} {r['captured']['device_ms']:>10.3f} {times:>10} "
            f"{r['draft']['ms']:>9.3f} {r['adapted_draft']['ms']:>9.3f} {r['adapter']:>+8.1%} {memory:>7}"
        )
    if not all(r["is_captured"] for r in rows):
        lines.append("* too wide to be captured: the same as eager")
    return lines


def kernel_lines(rows: list[dict[str, Any]]) -> list[str]:
    kernels = [kernel for kernel in STATIC_KERNELS if kernel in rows[0]]
    lines = [f"{'context':>8} {'T':>4} " + " ".join(f"{kernel:>9}" for kernel in kernels)]
    notes = {}
    for r in rows:
        cells = []
        for kernel in kernels:
            if isinstance(r[kernel], str):
                notes[kernel] = r[kernel]
                cells.append(f"{'-':>9}")
            else:
                cells.append(f"{r[kernel]:>9.3f}")
        lines.append(f"{r['context']:>8,} {r['length']:>4} " + " ".join(cells))
    return lines + [f"{kernel} does not run here: {why}" for kernel, why in notes.items()]


def decoding_lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["tokens a second, one sequence"]
    for r in rows:
        lines.append(
            f"context {r['context']:,}: ar {r['ar_loop_tokens_per_second']:.1f} (the whole loop), "
            f"{r['ar_forward_tokens_per_second']:.1f} (forwards alone)"
        )
        for name, rates in r["assumed"].items():
            told = ", ".join(f"{rate:.1f} if {length} tokens a round" for length, rate in rates.items())
            lines.append(f"  {name}: {told} (acceptance assumed, not measured)")
    return lines


if __name__ == "__main__":
    main()
