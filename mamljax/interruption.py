"""Ctrl-C and SIGTERM as a request to finish what is under way, and save."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def interruptions() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C or SIGTERM into an event, so that the update under way can be finished and saved.

    A signal that the process ignores, as a shell has it for what runs in the background, stays ignored; one that is handled
    outside of Python, in a program that embeds it, is left to that.
    """
    event = threading.Event()
    # Python lets no other thread set handlers.
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    previous = {number: handler for number, handler in previous.items() if handler not in (signal.SIG_IGN, None)}

    def restore_handlers() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def on_signal(number: int, frame: Any) -> None:
        event.set()
        restore_handlers()
        print("\nStopping after the updates under way. Once more to stop at once.", file=sys.stderr)

    for number in previous:
        signal.signal(number, on_signal)
    try:
        yield event
    finally:
        restore_handlers()
