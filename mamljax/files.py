"""Files that are whole or not there."""

import os
import threading
from pathlib import Path


def user_cache() -> Path:
    """Where programs of a user keep what they can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader, or a kill, finds the old content or the new but nothing in between.

    Of several processes or threads that write it at once, the last one's remains. A symbolic link is followed.
    """
    path = path.resolve()
    draft = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with draft.open("w", encoding="utf-8", errors="surrogateescape") as file:  # as in names of files
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
