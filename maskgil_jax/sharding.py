"""Meshes and shardings: which array axis lies on which devices.

A mesh has the axes `data` (batch), `fsdp` (batch, and parameters split along their widest axis) and
`tensor` (heads, MLP and vocabulary). Modules name the axes of their parameters logically; the one
rule table here maps those names to mesh axes.
"""

import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
# Every device holds a copy of what is replicated.
MAX_CPU_DEVICES = 8

# Logical axis → mesh axes. A name that is absent here is an error, not "replicated".
RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    ("batch", ("data", "fsdp")),
    ("length", None),
    ("act_embed", None),
    ("layers", None),
    ("embed", "fsdp"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("head_dim", None),
    ("vocab", "tensor"),
)


def make_mesh(shape: Mapping[str, int], devices: Any = None) -> Mesh:
    """Return a mesh with the axes data, fsdp and tensor.

    Args:
        shape: size of each axis; one of them may be -1 and takes the devices that are left.
        devices: devices to use; all of `jax.devices()` if `None`.

    Raises:
        ValueError: if an axis is unknown or the sizes do not make up the number of devices.
    """
    devices = np.asarray(jax.devices() if devices is None else devices)
    if unknown := set(shape) - set(AXES):
        raise ValueError(f"mesh axes {sorted(unknown)} are unknown; allowed: {', '.join(AXES)}")
    sizes = [int(shape.get(axis, 1)) for axis in AXES]
    rest = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"mesh {dict(shape)}: sizes must be at least 1, and at most one may be -1")
    sizes = [devices.size // rest if size == -1 else size for size in sizes]
    if math.prod(sizes) != devices.size:
        raise ValueError(
            f"mesh {dict(zip(AXES, sizes, strict=True))} needs {math.prod(sizes) or rest} devices "
            f"or a multiple, but there are {devices.size}"
        )
    return Mesh(devices.reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def split_cpu(batch_size: int) -> None:
    """Make one device of every CPU core, for work that is split over the batch.

    XLA computes many a convolution on one core per device. The number of devices divides the batch
    size and is at most `MAX_CPU_DEVICES`. A number chosen in the environment, by
    `JAX_NUM_CPU_DEVICES` or in `XLA_FLAGS`, is left as it is; accelerators are not touched.

    Raises:
        RuntimeError: if JAX has been used already, which settles the devices.
    """
    chosen = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if chosen or "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    most = min(len(os.sched_getaffinity(0)), MAX_CPU_DEVICES)
    count = max(n for n in range(1, most + 1) if batch_size % n == 0)
    jax.config.update("jax_num_cpu_devices", count)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array whose leading axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_shards(mesh: Mesh) -> int:
    """Return into how many parts a batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch_size(name: str, size: int, mesh: Mesh) -> None:
    """Raise a `ValueError` unless a batch splits evenly over the devices."""
    parts = batch_shards(mesh)
    if size < 1 or size % parts:
        raise ValueError(
            f"{name} {size} is not divisible by {parts} (mesh data × fsdp of {dict(mesh.shape)}); "
            f"use a multiple of {parts}, for example {max(1, round(size / parts)) * parts}"
        )


def state_shardings(abstract: Any, mesh: Mesh) -> Any:
    """Return a `NamedSharding` for every leaf of a tree that may hold logically partitioned boxes.

    A leaf without axis names is replicated. An axis whose length the mesh axis does not divide is
    replicated too (a vocabulary of 16,385 rows, say), so that any size trains on any mesh.

    Args:
        abstract: tree of `ShapeDtypeStruct`s, possibly in flax's partitioning boxes.
        mesh: the mesh.

    Returns:
        the unboxed tree with shardings for leaves.

    Raises:
        ValueError: if an axis has a logical name that no rule knows.
    """
    known = {name for name, _ in RULES} | {None}

    def sharding(leaf):
        if not isinstance(leaf, nn.LogicallyPartitioned):
            return replicated(mesh)
        if not jax.tree.leaves(leaf.value):
            return leaf.value  # a part of an optimiser's state that this parameter has not
        names = leaf.names
        if unknown := set(names) - known:
            raise ValueError(
                f"logical axes {sorted(map(str, unknown))} have no rule; allowed: "
                f"{', '.join(name for name, _ in RULES)}"
            )
        axes = nn.logical_to_mesh_axes(names, RULES)
        shape = leaf.value.shape
        return NamedSharding(mesh, PartitionSpec(*_divisible(axes, shape, mesh)))

    def is_box(leaf):
        return isinstance(leaf, nn.LogicallyPartitioned)

    return jax.tree.map(sharding, abstract, is_leaf=is_box)


def _divisible(axes, shape, mesh):
    for axis, length in zip(axes, shape, strict=True):
        group = (axis,) if isinstance(axis, str) else tuple(axis or ())
        yield axis if length % math.prod(mesh.shape[a] for a in group) == 0 else None


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Assemble each process's rows of a batch into global arrays split over the mesh."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def map_rows(
    mesh: Mesh, function: Callable[[Any, Any], Any], whole: Any, rows: Any, count: jax.Array
) -> Any:
    """Apply a function to one row of a batch after the other, each on the device that holds it.

    The function always sees a batch of one. So what becomes of a row does not depend, to the last
    bit, on how many there are nor on how many devices share them, though the order in which a
    matrix product is summed depends on its shape.

    Args:
        mesh: devices; the rows are split over its data axes.
        function: `(whole, rows [1 …]) → results [1 …]`.
        whole: what every call is given, whole on every device.
        rows: tree of arrays with the batch in front, which splits evenly.
        count: how many rows, from the first on, to compute; the results of the others are zeros.
            It must not be a constant: a loop that the compiler knows to run once is no loop.

    Returns:
        the results of all rows.
    """
    split, kept = batch_sharding(mesh).spec, replicated(mesh).spec
    # Jitted, so that it is traced once, though it is asked for its shapes before it is called.
    function = jax.jit(function)

    def run(whole, rows, count):
        length = len(jax.tree.leaves(rows)[0])
        first = jax.lax.axis_index(split[0]) * length

        def take(place):
            return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, place, 1), rows)

        def put(place, results):
            return jax.tree.map(
                lambda all_of_them, one: jax.lax.dynamic_update_slice_in_dim(
                    all_of_them, one, place, 0
                ),
                results,
                function(whole, take(place)),
            )

        shapes = jax.eval_shape(function, whole, take(0))
        zeros = jax.tree.map(lambda x: jnp.zeros((length, *x.shape[1:]), x.dtype), shapes)
        return jax.lax.fori_loop(0, jnp.clip(count - first, 0, length), put, zeros)

    # The check takes zeros for the same on all devices, and would refuse to add rows to them.
    mapped = jax.shard_map(
        run, mesh=mesh, in_specs=(kept, split, kept), out_specs=split, check_vma=False
    )
    return mapped(whole, rows, count)


def check_whole(what: str, params: Any, mesh: Mesh) -> None:
    """Raise a `ValueError` unless every device of a mesh holds all parameters whole.

    Args:
        what: that needs it.
        params: tree of arrays that lie on the mesh.
        mesh: the mesh.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not leaf.sharding.is_fully_replicated:
            raise ValueError(
                f"{what} needs the parameters whole on every device, but "
                f"{'/'.join(str(entry.key) for entry in path)} is split over the mesh "
                f"{dict(mesh.shape)}; give jax.device_get(params), or leave {what} out"
            )
