"""Several devices and hosts: each takes an equal share of the tasks; one all-reduce averages what they found.

`jax.set_mesh` says over which devices to divide; without a mesh everything here does nothing. `train.fit` sets it from its
argument.
"""

import contextlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mamljax.types import PyTree

EVERYWHERE = PartitionSpec()  # a copy on each device
BY_TASK = PartitionSpec("tasks")  # the leading axis divided among them


def task_mesh(devices: Mesh | int | None = None) -> Mesh:
    """Make the mesh over which tasks are divided.

    Args:
        devices: any mesh, of which all devices are taken; or how many of each host's devices, by default all.

    Raises:
        ValueError: there are not that many, or `devices` is something else.
    """
    if not isinstance(devices, Mesh | int | None):
        raise ValueError(f"a mesh must be a jax.sharding.Mesh, got {type(devices).__name__}. Build one by jax.make_mesh.")
    if isinstance(devices, Mesh):
        chosen = list(devices.devices.flat)
    else:
        number = jax.local_device_count() if devices is None else devices
        if not 1 <= number <= jax.local_device_count():
            raise ValueError(
                f"{number} devices were asked for, but there are {jax.local_device_count()} ({jax.devices()[0].platform}). "
                'On a CPU say so before anything is computed: jax.config.update("jax_num_cpu_devices", n).'
            )
        hosts = range(jax.process_count())
        chosen = [device for host in hosts for device in [d for d in jax.devices() if d.process_index == host][:number]]
    # Auto: with explicit axes the program itself would have to say how each of its arrays is divided.
    return Mesh(np.array(chosen), ("tasks",), axis_types=(AxisType.Auto,))


def num_shares() -> int:
    """Among how many devices tasks are divided here: those of `jax.set_mesh`, or one.

    Raises:
        ValueError: the mesh has axes that the program itself has to divide (`AxisType.Explicit`).
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if axes.get("tasks") == AxisType.Explicit:
        raise ValueError("the mesh of jax.set_mesh has explicit axes. Use jax.set_mesh(mamljax.devices.task_mesh(mesh)).")
    return dict(mesh.shape).get("tasks", 1)


def check_shares(num_tasks: int, num_devices: int) -> None:
    """Raise `ValueError` unless so many devices can take equal shares of the tasks."""
    if num_tasks % num_devices:
        raise ValueError(f"num_tasks must be a multiple of the number of devices, {num_devices}, got {num_tasks}.")


def divide(
    fn: Callable[[PyTree, PyTree], PyTree], common: PyTree, tasks: PyTree, *, common_spec: PartitionSpec = EVERYWHERE
) -> PyTree:
    """Apply `fn(common, tasks)` to each device's share of the leading axis of `tasks`; the results are joined along it."""
    if num_shares() == 1:
        return fn(common, tasks)
    check_shares(len(jax.tree.leaves(tasks)[0]), num_shares())
    return _on_each_device(fn, (common_spec, BY_TASK), BY_TASK)(common, tasks)


def mean_over_devices(fn: Callable[[PyTree, PyTree], PyTree], common: PyTree, tasks: PyTree) -> PyTree:
    """Apply `fn(common, tasks)` to each device's share of the leading axis of `tasks`; the results are averaged."""
    if num_shares() == 1:
        return fn(common, tasks)
    check_shares(len(jax.tree.leaves(tasks)[0]), num_shares())
    # Shares are equal, so that the mean of their means is the mean over all tasks.
    return _on_each_device(lambda *args: lax.pmean(fn(*args), "tasks"), (EVERYWHERE, BY_TASK), EVERYWHERE)(common, tasks)


def _on_each_device(fn: Callable, in_specs: tuple[PartitionSpec, ...], out_specs: PartitionSpec) -> Callable:
    # Unless told not to check, JAX sums gradients in what all devices have alike, the parameters: here each has its own.
    return jax.shard_map(fn, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def on(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """Divide tasks among the devices of a mesh within this context; None changes nothing."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def place(tree: PyTree, mesh: Mesh | None, spec: PartitionSpec = EVERYWHERE) -> PyTree:
    """Put arrays of this host onto the devices of a mesh: copies of them, or this host's share of the leading axis."""
    if mesh is None:
        return tree
    sharding = NamedSharding(mesh, spec)
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    # Every host passes what it has, and all of it together is one array.
    return _map_data(lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), tree)


def take_back(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """Return the copies that `place` has made as arrays of the default device."""
    if mesh is None:
        return tree
    # By way of NumPy: arrays taken from a mesh stay committed to its devices, and could not be combined with others.
    return jax.tree.map(jnp.asarray, _map_data(lambda leaf: leaf, jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)))


def host() -> jax.Device:
    """The CPU as a device; or the default device, where JAX was told to know no CPU."""
    with contextlib.suppress(RuntimeError):
        return jax.local_devices(backend="cpu")[0]
    return jax.local_devices()[0]


def is_first_host() -> bool:
    """Whether this process is the one that writes files."""
    return jax.process_index() == 0


def from_first_host(tree: PyTree) -> PyTree:
    """Return what the first of several processes passes; all must call this."""
    return tree if jax.process_count() == 1 else _map_data(multihost_utils.broadcast_one_to_all, tree)


def any_host(flag: bool) -> bool:
    """Whether any of several processes passes true; all must call this."""
    return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(flag)).any())


def _map_data(fn: Callable[[np.ndarray], PyTree], tree: PyTree) -> PyTree:
    """Apply `fn` to each leaf as a NumPy array; to a random key's data, and make keys of the results."""

    def apply(leaf: PyTree) -> PyTree:
        if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
            return jax.random.wrap_key_data(fn(np.asarray(jax.random.key_data(leaf))), impl=jax.random.key_impl(leaf))
        return fn(np.asarray(leaf))

    return jax.tree.map(apply, tree)
