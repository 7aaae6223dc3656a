"""The files that a training run leaves: checkpoints, a log of its metrics, TensorBoard events."""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mamljax.checkpoint import Checkpoints
from mamljax.files import write_atomically
from mamljax.run_directory import CheckpointError, alone_in
from mamljax.types import PyTree


class Record:
    """The files of one run: checkpoints, `metrics.jsonl`, TensorBoard events. Does nothing without a directory."""

    def __init__(self, directory: str | Path | None, config: dict[str, Any], *, tensorboard: bool = False) -> None:
        """Describe the record of a run; enter it as a context to use it."""
        self.directory = None if directory is None else Path(directory)
        self.config, self.tensorboard = config, tensorboard
        self.saved_update: int | None = None
        self.saved_at = self.opened_at = time.monotonic()
        self.seconds_before = 0.0
        self.files = contextlib.ExitStack()

    def __enter__(self) -> "Record":
        """Open the directory, and keep other processes from it.

        Raises:
            CheckpointError: as `Checkpoints`; or another process is at work there.
        """
        if self.directory is None:
            return self
        # Whatever fails in here, the lock is let go; `pop_all` keeps it until the run is left.
        with contextlib.ExitStack() as files, self._writing(kept=""):  # of checkpoints nothing is known yet
            files.enter_context(alone_in(self.directory))
            self.checkpoints = Checkpoints(self.directory, self.config)
            self.files = files.pop_all()
        return self

    def restore(self, like: PyTree) -> tuple[int, PyTree]:
        """Return the number of meta-updates done and the newest checkpoint, or 0 and `like` where there is none.

        What was logged after it is taken back.
        """
        if self.directory is None:
            return 0, like
        self.saved_update, tree = self.checkpoints.restore(like) or (None, like)
        done = self.saved_update or 0
        path = self.directory / "metrics.jsonl"
        try:
            logged = read_metrics(path)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}. Make it readable for this user.") from error
        with self._writing():
            # Later lines are of meta-updates that will be done, and logged, once more.
            lines = [line for line in logged if line["update"] <= done]
            self.seconds_before = lines[-1]["seconds"] if lines else 0.0
            write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))
            # Written line by line, so that a kill spoils one line at most.
            self.log_file = self.files.enter_context(path.open("a", buffering=1))
            if self.tensorboard:
                writer = _summary_writer(self.directory / "tensorboard", purge_step=done + 1)
                self.writer = self.files.enter_context(contextlib.closing(writer))
        return done, tree

    def __exit__(self, *exception: object) -> None:
        """Close all files and let other processes in."""
        with contextlib.suppress(OSError):  # of a line that could not be written, which was said when it was
            self.files.close()

    @contextlib.contextmanager
    def _writing(self, kept: str | None = None) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            cause, kept = error.strerror or error, self.kept if kept is None else kept
            raise CheckpointError(
                f"cannot write to {self.directory}: {cause}{kept}. Make room there, or choose another directory."
            ) from error

    @property
    def seconds(self) -> float:
        """Time spent, over all sessions of the run."""
        return self.seconds_before + time.monotonic() - self.opened_at

    @property
    def kept(self) -> str:
        """What the directory keeps, to end a message with."""
        if self.directory is None:
            return ""
        checkpoint = "no checkpoint yet" if self.saved_update is None else f"the checkpoint of meta-update {self.saved_update}"
        return f"; {self.directory} keeps {checkpoint}"

    def log(self, update: int, line: dict[str, float]) -> None:
        """Add a line of numbers to the log; one that is not finite becomes null."""
        if self.directory is None:
            return
        line = {"update": update, **line, "seconds": round(self.seconds, 3)}
        plain = {name: value if math.isfinite(value) else None for name, value in line.items()}
        with self._writing():
            self.log_file.write(json.dumps(plain) + "\n")
            if self.tensorboard:
                for name, value in line.items():
                    self.writer.add_scalar(name, value, update)

    def is_due(self, seconds: float) -> bool:
        """Whether the last checkpoint is older than that."""
        return self.directory is not None and time.monotonic() - self.saved_at > seconds

    def save(self, update: int, tree: PyTree) -> None:
        """Write a checkpoint, unless it is there already."""
        if self.directory is not None and update != self.saved_update:
            self.checkpoints.save(update, tree)
            self.saved_update, self.saved_at = update, time.monotonic()


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """Read the lines of a `metrics.jsonl` up to the first that is not one, as a kill or a power cut may have left it."""
    lines = []
    path = Path(path)
    for text in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not (isinstance(line, dict) and {"update", "seconds"} <= line.keys()):
            break
        lines.append(line)
        if not text.endswith(b"\n"):
            break
    return lines


def best_update(directory: Path) -> int | None:
    """After which meta-update the validation error of a run was least; None if there is no finite one."""
    lines = [line for line in read_metrics(directory / "metrics.jsonl") if line.get("validation_error") is not None]
    return int(min(lines, key=lambda line: line["validation_error"])["update"]) if lines else None


def _summary_writer(directory: Path, *, purge_step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ValueError('TensorBoard event files need tensorboardX. Install it: pip install "mamljax[experiments]"') from error
    return SummaryWriter(str(directory), purge_step=purge_step)
