"""The devices of a run, and the other processes with `--distributed`."""

import contextlib
import dataclasses
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import jax

from mamljax.checks import check_count
from mamljax.devices import is_first_host

AnyOptions = TypeVar("AnyOptions")  # those of `runner.Options`, at least

REMEDY = "Start as many as JAX_NUM_PROCESSES says, each with its own JAX_PROCESS_ID, all with one JAX_COORDINATOR_ADDRESS."


def join_processes(seconds: int) -> None:
    """Join the processes of a cluster that `jax.distributed` recognises, or those that the environment speaks of.

    A process that waits for longer than `seconds` says so and ends with exit code 2.

    Raises:
        ValueError: the environment is not well-formed, or they cannot be joined.
    """
    numbers = [os.environ.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")]
    try:
        num_processes, process_id = (None if number is None else int(number) for number in numbers)
    except ValueError as error:
        raise ValueError(f"JAX_NUM_PROCESSES and JAX_PROCESS_ID must be whole numbers, got {numbers}.") from error
    coordinator = os.environ.get("JAX_COORDINATOR_ADDRESS", "the coordinator")
    failure = f"the other processes could not be joined at {coordinator} within {seconds} s"

    def give_up() -> None:
        print(f"error: {failure}. {REMEDY} Checkpoints are as they were.", file=sys.stderr, flush=True)
        os._exit(2)

    print(f"joining the other processes at {coordinator}, for {seconds} s at most", file=sys.stderr)
    limits = dict.fromkeys(("heartbeat_timeout_seconds", "shutdown_timeout_seconds"), seconds)
    limits["initialization_timeout"] = seconds + 60
    timer = threading.Timer(seconds, give_up)  # JAX's own limit, which is later, aborts with a trace
    timer.start()
    try:
        jax.distributed.initialize(num_processes=num_processes, process_id=process_id, **limits)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{failure}: {error} {REMEDY}") from error
    finally:
        timer.cancel()


@contextlib.contextmanager
def join_devices(options: AnyOptions) -> Iterator[AnyOptions]:
    """Make the devices and join the processes that were asked for; files of all but the first are temporary.

    Raises:
        ValueError: the other processes cannot be joined.
    """
    if options.devices is not None:
        check_count("--devices", options.devices)
        with contextlib.suppress(RuntimeError):  # something has been computed already: there are as many as there are
            jax.config.update("jax_num_cpu_devices", options.devices)
    if options.distributed:
        join_processes(options.join_seconds)
    with contextlib.ExitStack() as stack:
        if not is_first_host():
            options = dataclasses.replace(options, out=Path(stack.enter_context(tempfile.TemporaryDirectory())))
        yield options
