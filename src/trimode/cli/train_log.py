"""What a training run tells while it goes: a bar on the screen, lines of JSON, TensorBoard's events, and what it cost."""

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from trimode.cli import screen
from trimode.device import peak_memory
from trimode.errors import TrainingError

__all__ = ["TrainingLog"]

RECENT = 20
"""Updates over which the speed on the bar is taken."""


class TrainingLog:
    """A run's progress, in the run's folder and on the screen; the first rank's alone."""

    def __init__(self, output: Path, num_steps: int, device: Any, num_done: int = 0) -> None:
        """num_done: updates of an earlier run that this one continues."""
        self.history: list[dict[str, Any]] = []
        self._output = output
        self._num_steps, self._num_done = num_steps, num_done
        self._device = device
        self._file: Any = None
        self._events: Any = None

    def __enter__(self) -> "TrainingLog":
        if not screen.is_first_rank():
            return self
        self._file = (self._output / "log.jsonl").open("a", encoding="utf-8")
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(self._output / "events"))
        except ImportError:  # one of the train extra's packages
            pass
        columns = (
            TextColumn("update"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=screen.errors_console())
        self._bar.start()
        self._task = self._bar.add_task("", total=self._num_steps, completed=self._num_done, state="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is None:
            return
        self._bar.stop()
        try:
            if self._events is not None:
                self._events.close()
            self._file.close()
        except OSError as error:
            if failure is None:
                raise self._disk(error) from error

    def tell(self, progress: Any) -> None:
        """Take down one update. Raises TrainingError if the disk refuses."""
        record = {
            "step": progress.step,
            "loss": progress.loss,
            "rate": progress.rate,
            "grad_norm": progress.grad_norm,
            "seconds": progress.seconds,
            "positions": progress.positions,
            **progress.parts,
            **{f"held_out_{name}": value for name, value in (progress.evaluation or {}).items()},
        }
        self.history.append(record)
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
            if self._events is not None:
                for name, value in record.items():
                    self._events.add_scalar(name, value, progress.step)
        except OSError as error:
            raise self._disk(error) from error
        recent = self.history[-RECENT:]
        speed = sum(r["positions"] for r in recent) / max(sum(r["seconds"] for r in recent), 1e-9)
        self._bar.update(
            self._task, completed=progress.step, state=f"loss {progress.loss:.3f}  {speed:,.0f} positions/s"
        )

    def cost(self) -> dict[str, Any]:
        """Speed and memory of the updates that this process did."""
        if not self.history:
            return {}
        seconds = sum(record["seconds"] for record in self.history)
        return {
            "positions_per_second": sum(record["positions"] for record in self.history) / max(seconds, 1e-9),
            "peak_memory_bytes": peak_memory(self._device),
        }

    def cost_in_words(self) -> str:
        """The same for a reader."""
        cost, seconds = self.cost(), sum(record["seconds"] for record in self.history)
        peak = cost["peak_memory_bytes"]
        updates = "1 update" if len(self.history) == 1 else f"{len(self.history):,} updates"
        return f"{updates} in {seconds:,.0f} s: {cost['positions_per_second']:,.0f} positions a second" + (
            f", {peak / 1e9:.2f} GB at the peak" if peak else ""
        )

    def draw(self, recipe: Any) -> None:
        """The whole run as a picture, where matplotlib is installed."""
        if self._file is None:
            return
        from trimode.viz.curves import training_curves

        # a line that a crash cut off, or an update that was done again, is left out
        records: dict[int, dict[str, Any]] = {}
        for line in (self._output / "log.jsonl").read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            records[record["step"]] = record
        if not records:
            return
        try:
            training_curves(
                [records[step] for step in sorted(records)],
                self._output / "curves.png",
                f"{Path(recipe.base).name}: {recipe.objective}",
            )
        except ImportError:
            screen.say("curves.png is not drawn: matplotlib is not installed (pip install 'trimode[plots]').")

    def _disk(self, error: OSError) -> TrainingError:
        return TrainingError(
            f"Cannot write {self._output / 'log.jsonl'}: {error.strerror}. The last state saved there is intact."
        )
