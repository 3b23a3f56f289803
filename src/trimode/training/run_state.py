"""A run's state on disk: parameters that are trained, optimiser, and which update comes next.

Order of the data and all noise follow from the seed and the sample's index, so nothing else needs keeping. A state is written beside
its place and renamed when whole; the one before stays until then. PyTorch's distributed checkpoints hold the tensors, so a run may be
continued on another number of ranks.
"""

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from trimode.errors import RunStateError

__all__ = ["RunDirectory"]

STATE, KIND = "state.json", "trimode-run"
_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False, flatten_optimizer_state_dict=True)
"""Flattened: by parameter and not by group, since groups differ with the number of ranks."""


class RunDirectory:
    """The output folder of one run: looked at when made, written from `begin` on."""

    def __init__(self, path: Path, *, identity: Mapping[str, Any]) -> None:
        """identity: what must be the same for a state to fit (recipe and base). Raises RunStateError for another run's folder."""
        self.path = path
        # as it reads back from the file: a tuple would differ from its own list for ever
        self._identity = json.loads(json.dumps(dict(identity)))
        self._is_first = not dist.is_initialized() or dist.get_rank() == 0
        marker = path / "run.json"
        try:
            found = json.loads(marker.read_text()) if marker.exists() else None
        except ValueError as error:
            raise RunStateError(f"{marker} is damaged: {error}. Choose another folder.") from None
        if found is None:
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise RunStateError(f"{path} holds something else than a run of trimode. Choose another folder.")
        elif found.get("identity") != self._identity:
            old, new = found.get("identity") or {}, self._identity
            changed = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
            raise RunStateError(
                f"{path} holds another run: {', '.join(changed)} differ. Choose another folder or remove it."
            )

    def begin(self) -> None:
        """Claim the folder, once all else is known to be in order. Raises RunStateError."""
        _barrier()  # no rank still looks whether somebody else is here
        marker = self.path / "run.json"
        if self._is_first and not marker.exists():
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                marker.write_text(json.dumps({"kind": KIND, "identity": self._identity}, indent=2) + "\n")
            except OSError as error:
                raise RunStateError(f"Cannot write {self.path}: {error.strerror}.") from error

    def states(self) -> list[Path]:
        """Whole states, oldest first."""
        return sorted(p for p in self.path.glob("step-*") if p.suffix == "" and (p / STATE).exists())

    @property
    def num_done(self) -> int:
        """Updates that the newest state holds; 0 for one that cannot be read, which `resume` names."""
        try:
            return json.loads((self.states()[-1] / STATE).read_text())["step"]
        except (IndexError, OSError, ValueError, KeyError, TypeError):
            return 0

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, *, keep: int = 2) -> Path:
        """Write the state before update `step` (from 0). Raises RunStateError; the last whole state is then intact."""
        target = self.path / f"step-{step:07d}"
        if (target / STATE).exists():
            return target
        draft = self.path / f"step-{step:07d}.draft"
        try:
            if self._is_first:
                shutil.rmtree(draft, ignore_errors=True)
                draft.mkdir()
            _barrier()
            with _quiet_when_alone():
                dcp.save(  # pyright: ignore[reportPrivateImportUsage]
                    _state(model, optimizer), checkpoint_id=draft / "tensors"
                )
            if self._is_first:
                (draft / STATE).write_text(json.dumps({"step": step}) + "\n")
                _sync(draft)
                draft.rename(target)
                for old in self.states()[:-keep]:
                    shutil.rmtree(old)
            _barrier()
        except (
            Exception,
            CheckpointException,
        ) as error:  # dcp wraps the disk's errors in its own, which is no Exception
            shutil.rmtree(draft, ignore_errors=True)
            last = self.states()
            where = f"The last whole state is {last[-1]}." if last else "There is no earlier state."
            reason = getattr(_cause(error), "strerror", None) or str(error).strip().splitlines()[0]
            raise RunStateError(f"Cannot write {target}: {reason}. {where}") from error
        return target

    def resume(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Load the newest state in place, if there is one; the next update's number."""
        states = self.states()
        if not states:
            return 0
        try:
            step = json.loads((states[-1] / STATE).read_text())["step"]
            state = _state(model, optimizer)
            with _quiet_when_alone():
                dcp.load(state, checkpoint_id=states[-1] / "tensors")  # pyright: ignore[reportPrivateImportUsage]
        except (Exception, CheckpointException) as error:
            raise RunStateError(
                f"{states[-1]} is damaged ({str(_cause(error)).strip().splitlines()[0]}). Remove it to continue from an earlier state."
            ) from error
        set_model_state_dict(model, state["model"], options=_TRAINED)
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=_TRAINED)
        return step


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(model, options=_TRAINED),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=_TRAINED),
    }


@contextmanager
def _quiet_when_alone() -> Iterator[None]:
    """Without the warning that one process is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _sync(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def _cause(error: BaseException) -> BaseException:
    """The disk's own error, if one lies under this one."""
    # dcp keeps those of the ranks apart, outside of the chain of causes
    seen: BaseException | None = next((e for e, _ in getattr(error, "failures", {}).values()), error)
    while seen is not None and not isinstance(seen, OSError):
        seen = seen.__cause__ or seen.__context__
    return error if seen is None else seen
