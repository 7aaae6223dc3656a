"""The files that a training run leaves: checkpoints, a log of its metrics, TensorBoard events."""

import json
import time
from pathlib import Path
from typing import Any

from mamljax.checkpoint import Checkpoints
from mamljax.files import write_atomically
from mamljax.types import PyTree


class Record:
    """The files of one run: checkpoints, `metrics.jsonl`, TensorBoard events. Does nothing without a directory."""

    def __init__(self, directory: str | Path | None, config: dict[str, Any], *, tensorboard: bool = False) -> None:
        """Open the record of a run, as `checkpoint.Checkpoints` does; enter it as a context to log and save."""
        self.directory = None if directory is None else Path(directory)
        self.checkpoints = None if directory is None else Checkpoints(directory, config)
        self.tensorboard = tensorboard
        self.saved_update = None
        self.saved_at = self.opened_at = time.monotonic()
        self.seconds_before = 0.0
        self.log_file = self.writer = None

    def restore(self, like: PyTree) -> tuple[int, PyTree]:
        """Return the number of meta-updates done and the newest checkpoint, or 0 and `like` where there is none."""
        self.saved_update, tree = (self.checkpoints and self.checkpoints.restore(like)) or (None, like)
        return self.saved_update or 0, tree

    def __enter__(self) -> "Record":
        """Take back what was logged after the checkpoint from which the run goes on."""
        if self.directory is None:
            return self
        path = self.directory / "metrics.jsonl"
        lines = [line for line in read_metrics(path) if line["update"] <= (self.saved_update or 0)]
        self.seconds_before = lines[-1]["seconds"] if lines else 0.0
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))
        self.log_file = path.open("a", buffering=1)
        if self.tensorboard:
            self.writer = _summary_writer(self.directory / "tensorboard", purge_step=(self.saved_update or 0) + 1)
        return self

    def __exit__(self, *exception: object) -> None:
        for file in (self.log_file, self.writer):
            if file is not None:
                file.close()

    @property
    def seconds(self) -> float:
        """Time spent, over all sessions of the run."""
        return self.seconds_before + time.monotonic() - self.opened_at

    @property
    def where(self) -> str:
        """What is kept, to end a message with."""
        if self.directory is None:
            return ""
        kept = "no checkpoint yet" if self.saved_update is None else f"the checkpoint of meta-update {self.saved_update}"
        return f"; {self.directory} keeps {kept}"

    def log(self, update: int, line: dict[str, float]) -> None:
        """Add a line of numbers to the log."""
        if self.directory is None:
            return
        self.log_file.write(json.dumps({"update": update, **line, "seconds": round(self.seconds, 3)}) + "\n")
        if self.writer:
            for name, value in line.items():
                self.writer.add_scalar(name, value, update)

    def save(self, update: int, tree: PyTree) -> None:
        """Write a checkpoint, unless it is there already."""
        if self.directory is not None and update != self.saved_update:
            self.checkpoints.save(update, tree)
            self.saved_update, self.saved_at = update, time.monotonic()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read the lines of a `metrics.jsonl`; the last one may have been cut short by a kill and is then left out."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _summary_writer(directory: Path, *, purge_step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ValueError('TensorBoard event files need tensorboardX. Install it: pip install "mamljax[experiments]"') from error
    return SummaryWriter(str(directory), purge_step=purge_step)
