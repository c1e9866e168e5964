"""Several devices: batches are cut over a mesh, patches as well, and the state of the training lies on every one."""

from __future__ import annotations

import argparse
import contextlib
import math
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from examples.brain_segmentation.data import DataError
from examples.brain_segmentation.settings import Settings

AXES = ("data", "depth", "height", "width")
"""Over "data" the patches of a batch are cut, over the others each patch."""


def mesh_value(text: str) -> str:
    """An argument such as "data=2,depth=2", in one spelling."""
    sizes: dict[str, int] = {}
    for item in filter(None, text.split(",")):
        name, _, size = item.partition("=")
        if name not in AXES or name in sizes or not size.isdigit() or not 0 < int(size) < 2**16:
            raise argparse.ArgumentTypeError(
                f"{text[:40]!r} is no mesh: write sizes of {', '.join(AXES)}, such as data=2,depth=2"
            )
        sizes[name] = int(size)
    return ",".join(f"{name}={sizes[name]}" for name in AXES if sizes.get(name, 1) > 1)


def sizes_of(mesh: str) -> list[int]:
    """Of the axes, in their order."""
    sizes = dict(item.split("=") for item in mesh.split(",") if item)
    return [int(sizes.get(name, 1)) for name in AXES]


def check(mesh: str, batch: int, patch: int) -> None:
    """Devices with less than others would wait for them."""
    data, *space = sizes_of(mesh)
    if batch % data:
        raise DataError(f"--mesh {mesh} cannot cut --batch {batch} into {data} equal parts")
    if any(patch % size for size in space):
        raise DataError(f"--mesh {mesh} cannot cut --patch {patch} into equal parts")


def ask_for(mesh: str) -> None:
    """Before JAX starts: that the CPU be as many devices as a mesh has; other platforms have those that they have."""
    if (count := math.prod(sizes_of(mesh))) > 1:
        with contextlib.suppress(RuntimeError):  # it has started: there are as many as there are
            jax.config.update("jax_num_cpu_devices", count)


class Devices:
    """The devices of a run, one or a mesh of them.

    Where only a CPU is there, it stands for as many devices as the mesh has: enough to see that the result is the same.
    """

    def __init__(self, settings: Settings) -> None:
        check(settings.mesh, settings.batch, settings.patch)
        sizes, self.mesh = sizes_of(settings.mesh), None
        if (count := math.prod(sizes)) > 1:
            if len(jax.devices()) < count:
                raise DataError(f"--mesh {settings.mesh} needs {count} devices, and there are {len(jax.devices())}")
            kinds = (AxisType.Auto,) * len(AXES)
            self.mesh = jax.make_mesh(sizes, AXES, axis_types=kinds, devices=jax.devices()[:count])

    def everywhere(self, tree: Any) -> Any:
        """A copy on each device."""
        return tree if self.mesh is None else jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec()))

    def cut(self, *arrays: Any) -> tuple[Any, ...]:
        """Arrays ``(N, D, H, W, ...)``, each device with its piece."""
        if self.mesh is None:
            return arrays
        return tuple(jax.device_put(array, NamedSharding(self.mesh, PartitionSpec(*AXES))) for array in arrays)
