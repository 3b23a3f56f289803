"""One loop for all objectives.

An update: the losses of some micro-batches, summed; gradients divided by the global count; clipped; one AdamW step. What to minimise,
where documents come from, how to evaluate and whom to tell are handed in.
"""

import math
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from trimode.diffusion.corruption import SampleNoise
from trimode.errors import TrainingError
from trimode.training.data import Mixture, pack
from trimode.training.objectives import Objective
from trimode.training.optim import ScheduleName, adamw, learning_rate
from trimode.training.run_state import RunDirectory
from trimode.training.trainable import TrainableModel

__all__ = ["Interrupted", "Progress", "TrainSettings", "train"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """How long and how fast."""

    steps: int
    """Updates."""
    documents_per_step: int
    """Global batch."""
    documents_per_forward: int
    """What one forward of one rank takes; the rest is accumulated."""
    rate: float = 1e-3
    """Peak learning rate."""
    warmup: int = 20
    schedule: ScheduleName = "cosine"
    decay: float = 0.2
    """wsd: share of the run in which the rate falls."""
    floor: float = 0.0
    """Share of the peak rate at the end."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0
    save_every: int = 50
    evaluate_every: int = 50
    shard: bool = False
    """Under torchrun: each rank holds its share of the layers' weights, gradients and optimiser (FSDP2)."""
    recompute: bool = False
    """Keep each layer's inputs only and compute the rest again in the backward pass: a third more time, far less memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """One update, for logs and progress bars."""

    step: int
    """Updates done."""
    loss: float
    rate: float
    grad_norm: float
    seconds: float
    """Of this update."""
    positions: int
    """Places that its losses asked for, over all ranks."""
    parts: Mapping[str, float]
    """The objective's own measures, averaged over the global batch."""
    evaluation: Mapping[str, float] | None = None


class Interrupted(Exception):  # noqa: N818 - nothing went wrong
    """SIGTERM or Ctrl-C: the state was saved."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def train(
    model: TrainableModel,
    objective: Objective,
    data: Mixture,
    settings: TrainSettings,
    run: RunDirectory,
    *,
    autocast: bool = False,
    tell: Callable[[Progress], None] = lambda progress: None,
    evaluate: Callable[[TrainableModel], Mapping[str, float]] | None = None,
) -> None:
    """Train to the end, from the newest state of the run. Raises Interrupted, TrainingError (a loss that is no number) or
    RunStateError (nothing more can be written); the last good state is on disk each time.

    autocast: compute in bfloat16 where parameters are float32.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if settings.documents_per_step % world:
        raise TrainingError(f"documents_per_step={settings.documents_per_step} does not divide among {world} ranks.")
    optimizer = adamw(
        model.named_parameters(), rate=settings.rate, betas=settings.betas, weight_decay=settings.weight_decay
    )
    first = run.resume(model, optimizer)
    noise = SampleNoise(settings.seed)
    model.train()
    with _Signals() as caught:
        for step in range(first, settings.steps):
            start = time.perf_counter()
            rate = _set_rate(optimizer, step, settings)
            sums = _accumulate(model, objective, data, noise, settings, step, rank, world, autocast)
            total, count = sums["total"]
            if not math.isfinite(total) or count == 0:
                raise _not_a_number(f"The loss of update {step} is {total} over {count:g} positions", run)
            norm = _update(model, optimizer, count, settings.clip)
            if not math.isfinite(norm):
                raise _not_a_number(f"The gradient of update {step} is {norm}", run)
            seconds = time.perf_counter() - start
            done = step + 1
            evaluation = None
            if evaluate is not None and (done % settings.evaluate_every == 0 or done == settings.steps):
                model.eval()
                with torch.no_grad():
                    evaluation = dict(evaluate(model))
                model.train()
            tell(
                Progress(
                    step=done,
                    loss=total / count,
                    rate=rate,
                    grad_norm=norm,
                    seconds=seconds,
                    positions=round(sums["positions"][0]),
                    parts={
                        name: s / max(n, 1e-9) for name, (s, n) in sums.items() if name not in ("total", "positions")
                    },
                    evaluation=evaluation,
                )
            )
            stop = caught.any_rank()
            if stop or done % settings.save_every == 0 or done == settings.steps:
                run.save(done, model, optimizer)
            if stop:
                raise Interrupted(stop)


def _set_rate(optimizer: torch.optim.Optimizer, step: int, settings: TrainSettings) -> float:
    rate = learning_rate(
        step,
        peak=settings.rate,
        steps=settings.steps,
        warmup=settings.warmup,
        schedule=settings.schedule,
        decay=settings.decay,
        floor=settings.floor,
    )
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def _accumulate(
    model: TrainableModel,
    objective: Objective,
    data: Mixture,
    noise: SampleNoise,
    settings: TrainSettings,
    step: int,
    rank: int,
    world: int,
    autocast: bool,
) -> dict[str, tuple[float, float]]:
    """Gradients of the summed losses, on every rank; sums and counts over all ranks."""
    share = settings.documents_per_step // world
    first = step * settings.documents_per_step + rank * share
    sums: dict[str, list[float]] = {}
    for start in range(first, first + share, settings.documents_per_forward):
        samples = range(start, min(start + settings.documents_per_forward, first + share))
        batch = pack([data[i] for i in samples], samples, progress=step / max(settings.steps, 1), device=model.device)
        with _autocast(autocast, model.device):
            loss = objective(model, batch, noise)
        loss.total.backward()
        of_all = {"total": (float(loss.total.detach()), loss.count), "positions": (loss.positions, 1.0)}
        for name, (s, n) in (of_all | dict(loss.parts)).items():
            entry = sums.setdefault(name, [0.0, 0.0])
            entry[0] += s
            entry[1] += n
    if world > 1:
        names = sorted(sums)
        table = torch.tensor([sums[name] for name in names], dtype=torch.float64, device=model.device)
        dist.all_reduce(table)
        sums = dict(zip(names, table.tolist(), strict=True))
    return {name: (s, n) for name, (s, n) in sums.items()}


def _autocast(wanted: bool, device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16) if wanted else nullcontext()


def _update(model: TrainableModel, optimizer: torch.optim.Optimizer, count: float, clip: float) -> float:
    trained = [p for p in model.parameters() if p.requires_grad]
    squares = torch.zeros(2, dtype=torch.float64, device=model.device)
    for p in trained:
        if p.grad is None:
            p.grad = torch.zeros_like(p)  # a parameter that no sample of this batch touched
        grad = p.grad
        if isinstance(grad, DTensor):
            # FSDP has averaged over the ranks; the sum is wanted
            grad.mul_(dist.get_world_size())
            grad = grad.to_local()
            sharded = 1
        else:
            sharded = 0
            if dist.is_initialized():
                dist.all_reduce(grad)
        grad.div_(count)
        squares[sharded] += grad.double().square().sum()
    if dist.is_initialized():
        shares = squares[1:].clone()
        dist.all_reduce(shares)
        squares[1:] = shares
    norm = float(squares.sum().sqrt())
    if math.isfinite(norm):
        if 0 < clip < norm:
            for p in trained:
                assert p.grad is not None
                p.grad.mul_(clip / norm)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def _not_a_number(what: str, run: RunDirectory) -> TrainingError:
    states = run.states()
    where = f"The last good state is {states[-1]}." if states else "Nothing had been saved yet."
    return TrainingError(
        f"{what}: not a number to go on with. {where} Lower the learning rate and start again from there."
    )


class _Signals:
    """SIGTERM and Ctrl-C, noticed between updates. A second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self._signum = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        try:
            for signum in (signal.SIGTERM, signal.SIGINT):
                self._before[signum] = signal.signal(signum, self._notice)
        except ValueError:  # not the main thread: whoever runs us handles signals
            pass
        return self

    def __exit__(self, *failure: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _notice(self, signum: int, frame: FrameType | None) -> None:
        if self._signum and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self._signum = signum

    def any_rank(self) -> int:
        """The signal that some rank has caught, or 0."""
        if not dist.is_initialized():
            return self._signum
        flag = torch.tensor(self._signum)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return int(flag)
