"""The directory of a run: the configuration that it was made with, and whether it may be used."""

import contextlib
import json
import reprlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock

from mamljax.files import write_atomically

ABRIDGED = reprlib.Repr()  # of lists, such as those of all classes, a few entries
ABRIDGED.maxlist, ABRIDGED.maxdict, ABRIDGED.maxstring, ABRIDGED.maxother = 4, 50, 100, 100


class CheckpointError(Exception):
    """A checkpoint or its directory cannot be used; the message says why and what to do."""


@contextlib.contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Keep other processes from working in a directory, made if it is missing, within this context.

    Raises:
        CheckpointError: another process is at work there, or it cannot be made.
        OSError: it cannot be written.
    """
    make_directory(directory)
    try:
        lock = filelock.FileLock(directory / "lock").acquire(blocking=False)
    except filelock.Timeout as error:
        message = f"another process is training in {directory}. Wait for it, or choose another directory."
        raise CheckpointError(message) from error
    with lock:
        yield


def claim_directory(
    directory: Path, config: dict[str, Any], *, defaults: Mapping[str, Any] = {}, ignored: Collection[str] = ()
) -> None:
    """Write `config.json` into a directory, or check that the one in there says the same.

    One of a command that was refused, and so left nothing else, is replaced. Call it `alone_in` the directory, or a command
    that has left nothing yet would go on under the options of this one.

    Args:
        directory: made if it is missing.
        config: JSON values.
        defaults: what entries that are not in there count as: a run of an earlier version lacks those that came later, whose
            defaults must let it go on as it began.
        ignored: entries in there that do not count: an earlier version still compared them, and by now they may differ.

    Raises:
        CheckpointError: it says something else, cannot be read, or is missing beside checkpoints; or the directory cannot be
            written.
    """
    make_directory(directory)
    path = directory / "config.json"
    config = {name: _json_value(name, value) for name, value in config.items()}
    if not path.exists():
        if _has_checkpoints(directory):
            raise CheckpointError(
                f"{directory} holds checkpoints of a run, but no config.json. Delete that directory, or choose another one."
            )
        _write_config(path, config)
    # Read back even where it was just written: another process may have come between.
    saved = {name: value for name, value in read_config(directory).items() if name not in ignored}
    found = {**defaults, **saved}
    keys = [key for key in sorted(config.keys() | found.keys()) if not _are_equal(config.get(key), found.get(key))]
    used = (directory / "results.json").exists() or _has_checkpoints(directory)
    if keys and found.keys() == config.keys() and not used:
        _write_config(path, config)
    elif keys:
        shown = [key for key in keys if key in saved] or keys  # not what only counts as being there
        sides = [{key: side.get(key) for key in shown} for side in (found, config)]
        there, given = map(ABRIDGED.repr, sides)
        if there == given:  # they differ in what was left out
            there, given = map(repr, sides)
        raise CheckpointError(
            f"{directory} holds a run of another configuration: it has {there}, this one {given}. "
            "Choose another directory, or delete that one."
        )


def _are_equal(value: Any, other: Any) -> bool:
    # A larger whole number would lose digits as a float, and then equal others.
    def number(text: str) -> int | float:
        return float(text) if abs(int(text)) < 2**53 else int(text)

    def plain(value: Any) -> str:  # in which NaN equals NaN, and 1 is 1.0 but not true
        return json.dumps(json.loads(json.dumps(value), parse_int=number), sort_keys=True)

    return plain(value) == plain(other)


def _json_value(name: str, value: Any) -> Any:
    try:
        return json.loads(json.dumps(value))
    except TypeError as error:
        raise ValueError(
            f"config[{name!r}] must be made of numbers, strings, lists and dicts, got {value!r} ({error}). "
            "Convert it, for example by float or str."
        ) from error


def _write_config(path: Path, config: dict[str, Any]) -> None:
    try:
        write_atomically(path, json.dumps(config, indent=1) + "\n")
    except OSError as error:
        raise CheckpointError(f"cannot write to {path.parent}: {error.strerror}. Choose another directory.") from error


def make_directory(directory: Path) -> None:
    """Make a directory, and those above it.

    Raises:
        CheckpointError: it cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot write to {directory}: {error.strerror}. Choose another directory.") from error


def read_config(directory: Path) -> dict[str, Any]:
    """Read the configuration of the run in a directory.

    Raises:
        CheckpointError: there is none, or it is not one.
    """
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{directory} holds no training run (config.json: {error.strerror}). Train first, or choose another one."
        ) from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}. Mend that, or choose another directory.") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}). Delete that directory, or choose another one.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a JSON object, but {config!r}. Delete that directory, or choose another one.")
    return config


def _has_checkpoints(directory: Path) -> bool:
    """Whether a run has left some, in there or below."""
    return any(directory.glob("**/steps/*"))
