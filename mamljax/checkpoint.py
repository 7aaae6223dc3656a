"""Checkpoints that survive kills, full disks and corruption; Orbax underneath."""

import contextlib
import os
import shutil
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax import Array

from mamljax.run_directory import CheckpointError, claim_directory
from mamljax.types import PyTree

READ_ATTEMPTS = 20  # while another process writes


class Checkpoints:
    """The checkpoints of one training run in one directory, the configuration beside them.

    A checkpoint appears whole or not at all, and the last two are kept. Each carries a checksum, so that a damaged one is
    noticed and the one before it used.
    """

    def __init__(self, directory: str | os.PathLike, config: dict[str, Any] | None) -> None:
        """Open a directory, made if it is missing.

        Args:
            directory: where the checkpoints are or will be.
            config: JSON values; everything that decides how the run goes. None to read only: then nothing in the directory is
                changed, so that another process may be training there.

        Raises:
            CheckpointError: the directory holds a run of another configuration, cannot be written, or has nothing to read.
        """
        self.directory, self.writes = Path(directory).absolute(), config is not None
        steps = self.directory / "steps"
        if config is not None:
            claim_directory(self.directory, config)
            steps.mkdir(exist_ok=True)
            options = {"max_to_keep": 2, "enable_async_checkpointing": False, "cleanup_tmp_directories": True}
        else:
            if not steps.is_dir():
                raise CheckpointError(f"{directory} holds no checkpoint yet. Train for longer.")
            options = {"create": False}  # with read_only Orbax would warn that it is
        if jax.process_count() > 1:  # this process alone reads and writes; the others do not wait for it
            # Orbax makes no directory where it is told which processes are active; `steps` is there already.
            me = jax.process_index()
            alone = {"primary_host": me, "active_processes": {me}, "barrier_sync_key_prefix": "checkpoints"}
            options |= {"multiprocessing_options": ocp.options.MultiprocessingOptions(**alone), "create": False}
        self._manager = ocp.CheckpointManager(steps, options=ocp.CheckpointManagerOptions(**options))

    def save(self, step: int, tree: PyTree) -> None:
        """Write `tree`, a pytree of arrays, as it is after meta-update `step`.

        Raises:
            CheckpointError: the disk is full or cannot be written; earlier checkpoints are still there.
        """
        tree = _without_keys(tree)
        seal = {"checksum": _checksum(tree), "shapes": _shapes(tree), "flat": True}
        # As NumPy arrays: JAX's would be parts of global ones, where there are several processes.
        items = ocp.args.Composite(tree=ocp.args.StandardSave(_flat(tree)), seal=ocp.args.JsonSave(seal))
        try:
            # By force, as Orbax has rules of its own for when a checkpoint is due.
            self._manager.save(step, args=items, force=True)
        except (OSError, ValueError) as error:  # tensorstore reports a full disk as ValueError
            # tensorstore buries the cause under paths and specifications.
            cause = "No space left on device" if "No space left" in str(error) else _in_short(error)
            raise CheckpointError(
                f"cannot write the checkpoint of meta-update {step} to {self.directory}: {cause}. "
                "Make room there or choose another directory; earlier checkpoints are kept."
            ) from error

    def restore(self, like: PyTree) -> tuple[int, PyTree] | None:
        """Read the newest checkpoint that is whole. Newer ones, which cannot be read, are put aside, into `damaged/`.

        Args:
            like: arrays, or their shapes, in the structure of what was saved.

        Returns:
            The number of meta-updates done and the tree; None if there is no checkpoint yet.

        Raises:
            CheckpointError: the checkpoint is one of another model or method, or none can be read.
            FileNotFoundError: opened to read only, by another process that is training there it was replaced meanwhile.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                tree = self._read(step, like)
            except (CheckpointError, MemoryError):
                raise
            except Exception as error:  # whatever a damaged file makes Orbax or tensorstore raise
                if "Permission denied" in str(error):  # it may well be whole
                    message = f"the checkpoint of meta-update {step} in {self.directory} cannot be read: Permission denied."
                    raise CheckpointError(f"{message} Make its files readable for this user.") from error
                if not (self.writes or (self.directory / "steps" / str(step)).exists()):
                    raise FileNotFoundError(f"the checkpoint of meta-update {step} is there no longer") from error
                print(f"The checkpoint of meta-update {step} in {self.directory} cannot be read ({_in_short(error)}); "
                      "falling back to the one before.", file=sys.stderr)  # fmt: skip
                continue
            # Put aside only now that an older one was read: where none can be, they stay where they are.
            for damaged in (s for s in steps if s > step and self.writes):
                self._put_aside(damaged)
            if self.writes:  # Orbax keeps its own list, and would refuse to save again under the number of one that was moved
                self._manager.reload()
            return step, _as_jax_arrays(tree, like)
        if steps:
            raise CheckpointError(f"no checkpoint in {self.directory} can be read. Delete that directory to start afresh.")
        return None

    def _read(self, step: int, like: PyTree) -> PyTree:
        # The seal first: where the shapes are of another model, no older checkpoint would do either.
        seal = self._manager.restore(step, args=ocp.args.Composite(seal=ocp.args.JsonRestore()))["seal"]
        plain = jax.eval_shape(_without_keys, like)
        saved, expected = seal["shapes"], _shapes(plain)
        for path in sorted(saved.keys() | expected.keys()):
            if saved.get(path) != expected.get(path):
                raise CheckpointError(
                    f"the checkpoint in {self.directory} is one of another model or method: at {path} it has "
                    f"{saved.get(path, 'nothing')}, expected {expected.get(path, 'nothing')}. Choose another directory."
                )
        target = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), plain)
        flat = seal.get("flat", False)  # an earlier version left the structure to Orbax
        args = ocp.args.StandardRestore(_flat(target) if flat else target)
        found = self._manager.restore(step, args=ocp.args.Composite(tree=args))["tree"]
        tree = _filled(target, found) if flat else found
        if _checksum(tree) != seal["checksum"]:
            raise ValueError("its checksum does not match")
        return tree

    def _put_aside(self, step: int) -> None:
        aside = self.directory / "damaged"
        aside.mkdir(exist_ok=True)
        shutil.rmtree(aside / str(step), ignore_errors=True)
        (self.directory / "steps" / str(step)).rename(aside / str(step))


def read_newest(directory: str | os.PathLike, like: PyTree) -> tuple[int, PyTree] | None:
    """Read the newest checkpoint, as `Checkpoints.restore` does, where another process may be training; nothing is changed.

    Raises:
        CheckpointError: as `Checkpoints` and `restore`; or whatever is listed is replaced before it can be read.
    """
    for _ in range(READ_ATTEMPTS):
        with contextlib.suppress(FileNotFoundError):  # raised by Orbax, too, when it lists what then goes
            return Checkpoints(directory, None).restore(like)
    raise CheckpointError(f"the checkpoints in {directory} are replaced faster than they can be read. Try again later.")


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _without_keys(tree: PyTree) -> PyTree:
    """Random keys as the integers behind them, which can be stored."""
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, tree)


def _flat(tree: PyTree) -> dict[str, np.ndarray]:
    """The arrays of a tree by their number, as NumPy's. Orbax would store "a.b" and "b" within "a" in one place.

    It stores no empty arrays; these are left out.
    """
    return {f"{index:06}": np.asarray(leaf) for index, leaf in enumerate(jax.tree.leaves(tree)) if leaf.size}


def _filled(tree: PyTree, flat: Mapping[str, np.ndarray]) -> PyTree:
    """A tree with the arrays that `_flat` has made of one like it."""
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [flat.get(f"{index:06}", leaf) for index, leaf in enumerate(leaves)])


def _as_jax_arrays(tree: PyTree, like: PyTree) -> PyTree:
    """NumPy's arrays as JAX's, and integers as random keys where `like` has keys.

    They are bound to no device, as is what a fresh run begins with: else a resumed run would have to compile a program of its
    own.
    """

    def convert(leaf: np.ndarray, like: Any) -> Array:
        if not _is_key(like):
            return jnp.asarray(leaf)
        return jax.random.wrap_key_data(jnp.asarray(leaf), impl=jax.random.key_impl(jnp.empty(like.shape, like.dtype)))

    return jax.tree.map(convert, tree, like)


def _checksum(tree: PyTree) -> int:
    checksum = 0
    for leaf in jax.tree.leaves(tree):
        checksum = zlib.crc32(np.ascontiguousarray(leaf), checksum)
    return checksum


def _shapes(tree: PyTree) -> dict[str, str]:
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def _in_short(error: BaseException) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= 200 else line[:200] + "..."
