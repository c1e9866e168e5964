"""How the dimensions of a form are cut over the axes of a mesh of devices."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import jax
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

Names = tuple[str, ...]

ROLES = {
    "outputs": ("xw", "y"),
    "affine": ("xwb", "y"),
    "tangent": ("xwxw", "y"),
    "inputs": ("wy", "x"),
    "kernel": ("xy", "w"),
    "gradients": ("xwy", "xw"),
}
"""The operands and the results of the primitives: inputs, kernel, outputs, bias."""


@dataclasses.dataclass(frozen=True)
class Cut:
    """The axes of ``mesh`` over which each dimension is cut, into pieces of equal size, the last of which may be short.

    With several groups, channels and filters are cut where whole groups end. Of several axes the first is the
    outermost, whatever their order in the mesh.
    """

    mesh: Mesh | AbstractMesh
    batch: Names = ()
    space: tuple[Names, Names, Names] = ((), (), ())
    channels: Names = ()
    filters: Names = ()
    groups: Names = ()

    def shards(self, names: Names) -> int:
        """The number of pieces over these axes."""
        return math.prod(self.mesh.shape[name] for name in names)

    def numbers(self, names: Names) -> tuple[int, ...]:
        """For each device along these axes, its number in the order of the mesh, by which `jax.lax.ppermute` counts."""
        ordered = [name for name in self.mesh.axis_names if name in names]
        found = []
        for place in itertools.product(*(range(self.mesh.shape[name]) for name in names)):
            at, number = dict(zip(names, place, strict=True)), 0
            for name in ordered:
                number = number * self.mesh.shape[name] + at[name]
            found.append(number)
        return tuple(found)

    def spec(self, role: str, form: Any) -> PartitionSpec:
        """Of the inputs, the kernel, the outputs or the bias."""
        channels, filters = self.groups or self.channels, self.groups or self.filters
        if role == "w":
            return PartitionSpec(None, None, None, entry_of(self.filters), entry_of(channels))
        if role == "b":
            return PartitionSpec(entry_of(filters))
        space = [entry_of(names) for names in self.space]
        if role == "y" and form.channels_first:
            return PartitionSpec(entry_of(self.batch), entry_of(filters), *space)
        return PartitionSpec(entry_of(self.batch), *space, entry_of(channels if role == "x" else filters))

    def sharding(self, role: str, form: Any) -> NamedSharding:
        """The same, for constraints and types."""
        return NamedSharding(self.abstract if self.is_explicit else self.mesh, self.spec(role, form))

    def typed(self, role: str, form: Any, shape: tuple[int, ...]) -> NamedSharding:
        """What types can say of it: a dimension that its axes do not divide is whole."""
        whole = self.sharding(role, form)
        missing = self.missing(role, form, shape)
        entries = [None if count else entry for entry, count in zip(whole.spec, missing, strict=True)]
        return whole.update(spec=PartitionSpec(*entries))

    def placed(self, array: jax.Array, role: str, form: Any) -> jax.Array:
        """An operand, where it shall lie."""
        if self.is_explicit:
            return jax.sharding.reshard(array, self.typed(role, form, array.shape))
        return lax.with_sharding_constraint(array, self.sharding(role, form))

    def counts(self, role: str, form: Any) -> list[int]:
        """Over how many devices each dimension is cut."""
        return [self.shards(names_of(entry)) for entry in self.spec(role, form)]

    def missing(self, role: str, form: Any, shape: tuple[int, ...]) -> list[int]:
        """How many elements more each dimension needs so that its axes divide it."""
        return [-size % count for size, count in zip(shape, self.counts(role, form), strict=True)]

    @property
    def is_explicit(self) -> bool:
        """Whether types say how arrays are cut."""
        return is_explicit(self.mesh)

    @property
    def abstract(self) -> AbstractMesh:
        """The mesh without its devices, as types have it."""
        return self.mesh.abstract_mesh if isinstance(self.mesh, Mesh) else self.mesh

    @property
    def manual(self) -> Names:
        """The axes over which the devices are told what to do: those that types speak of, or all."""
        kinds = zip(self.mesh.axis_names, self.mesh.axis_types, strict=True)
        return tuple(name for name, kind in kinds if kind == AxisType.Explicit) or self.mesh.axis_names

    def regrouped(self) -> Cut:
        """For a form whose channels and filters became parts of groups: cut only where groups were cut before."""
        return dataclasses.replace(self, channels=(), filters=())


def is_explicit(mesh: Any) -> bool:
    """Whether types say how arrays are cut over some of its axes."""
    return AxisType.Explicit in mesh.axis_types


def reshaped(array: jax.Array, shape: tuple[Any, ...], entries: tuple[Any, ...]) -> jax.Array:
    """Cut as the entries say, where types say it; a dimension that its axes do not divide is whole."""
    mesh = jax.typeof(array).sharding.mesh
    if not is_explicit(mesh):
        return array.reshape(shape)
    whole = [size % Cut(mesh).shards(names_of(entry)) for size, entry in zip(shape, entries, strict=True)]
    fitting = [None if rest else entry for rest, entry in zip(whole, entries, strict=True)]
    return lax.reshape(array, shape, out_sharding=NamedSharding(mesh, PartitionSpec(*fitting)))


def entry_of(names: Names) -> Any:
    """Of a `PartitionSpec`."""
    return None if not names else names[0] if len(names) == 1 else names


def names_of(entry: Any) -> Names:
    """The inverse."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def agreed(kind: str, form: Any, mesh: Any, specs: dict[str, PartitionSpec]) -> Cut:
    """The mesh axes that the operands and results agree on, as far as there is a computation for them."""
    used: set[str] = set()

    def names(role: str, dim: int, size: int | None = None) -> Names:
        found = names_of(specs[role][dim]) if role in specs and dim < len(specs[role]) else ()
        shards = math.prod(mesh.shape[name] for name in found)
        if used & set(found) or (size is not None and size % shards):
            return ()
        used.update(found)
        return found

    # Batch and space are cut as the result is, or the larger array; else as the other, for what is whole is cut freely.
    sides = ("x", "y") if kind == "inputs" else ("y", "x")
    first = {"x": 1, "y": 2 if form.channels_first else 1}
    batch = names(sides[0], 0) or names(sides[1], 0)
    depth, height, width = (
        names(sides[0], first[sides[0]] + i) or names(sides[1], first[sides[1]] + i) for i in range(3)
    )  # fmt: skip
    space = (depth, height, width)
    filters_dim = 1 if form.channels_first else 4
    if form.groups > 1:
        groups = names("y", filters_dim, form.groups) or names("x", 4, form.groups) or names("w", 4, form.groups)
        return Cut(mesh, batch, space, groups=groups)
    filters = names("y", filters_dim, form.filters) or names("w", 3, form.filters)
    channels = names("x", 4, form.channels) or names("w", 4, form.channels)
    return Cut(mesh, batch, space, channels, filters)
