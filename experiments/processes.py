"""Joining the other processes of a run with `--distributed`."""

import os
import sys
import threading

import jax

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
