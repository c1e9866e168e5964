"""The primitives on several devices, under plain `jax.jit`: what each computes of its shards, and what they exchange.

The compiler's partitioner asks for the shards of the operands, given those of the result, and for the computation on
them. Batch, filters, channels and groups are cut where they stand; a cut spatial axis needs halos (`_halos`); what is
summed over a cut axis is summed up once more over the devices.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax._src import dispatch, sharding_impls  # what custom_partitioning itself takes of them has no public name
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from conv3dt_jax import _choice, _halos
from conv3dt_jax._geometry import Axis, part_of_inputs, part_of_outputs
from conv3dt_jax.lowerings._work import GRADIENTS

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


@functools.partial(custom_partitioning, static_argnums=(0, 1, 2))
def partitioned(kind: str, platform: str, form: Any, *operands: jax.Array) -> Any:
    """`_choice.run`, which the partitioner may cut; within `jax.jit`, which keeps the constants it has."""
    return jax.jit(functools.partial(_choice.run, kind, platform, form))(*operands)


def is_asked(ctx: Any) -> bool:
    """Whether a module is lowered for several devices of one mesh, by a partitioner that calls back.

    Exported modules hold no calls back, in `jax.shard_map` everything is local, and the partitioner before Shardy wants
    rules of another kind: there the compiler cuts the programs of the lowerings as it finds them.
    """
    if not jax.config.jax_use_shardy_partitioner:  # type: ignore[attr-defined]
        return False
    module = ctx.module_context
    mesh = getattr(module.axis_context, "abstract_mesh", None)  # that of the shardings; none in a manual computation
    return mesh is not None and mesh.size > 1 and not module.lowering_parameters.for_export


def tell_devices(primitive: Primitive) -> None:
    """Has JAX tell the lowering rules of a primitive about devices and mesh, as for its own that are partitioned."""
    dispatch.prim_requires_devices_during_lowering.add(primitive)


@dataclasses.dataclass(frozen=True)
class Cut:
    """The mesh axes over which each dimension is cut."""

    batch: Names
    space: tuple[Names, Names, Names]
    channels: Names
    filters: Names
    groups: Names

    def spec(self, role: str, form: Any) -> PartitionSpec:
        """Of the inputs, the kernel, the outputs or the bias."""
        channels, filters = self.groups or self.channels, self.groups or self.filters
        if role == "w":
            return PartitionSpec(None, None, None, self.filters or None, channels or None)
        if role == "b":
            return PartitionSpec(filters or None)
        space = [names or None for names in self.space]
        if role == "y" and form.channels_first:
            return PartitionSpec(self.batch or None, filters or None, *space)
        return PartitionSpec(self.batch or None, *space, (channels if role == "x" else filters) or None)


def _cut(kind: str, form: Any, mesh: Any, specs: dict[str, PartitionSpec]) -> Cut:
    """The mesh axes that the operands and results agree on, as far as there is a computation for them."""
    used: set[str] = set()

    def names(role: str, dim: int, size: int | None = None) -> Names:
        entry = specs[role][dim] if role in specs and dim < len(specs[role]) else None
        found = (entry,) if isinstance(entry, str) else tuple(entry or ())
        shards = math.prod(mesh.shape[name] for name in found)
        if used & set(found) or (size is not None and size % shards):
            return ()
        used.update(found)
        return found

    outer = "y" if kind != "inputs" else "x"  # where batch and space are taken from: the larger one, or the result
    first = 2 if outer == "y" and form.channels_first else 1
    batch = names(outer, 0)
    space = tuple(names(outer, first + i) for i in range(3))
    filters_dim = 1 if form.channels_first else 4
    channels: Names
    filters: Names
    if form.groups > 1:
        groups = names("y", filters_dim, form.groups) or names("x", 4, form.groups) or names("w", 4, form.groups)
        return Cut(batch, space, (), (), groups)  # type: ignore[arg-type]
    filters = names("y", filters_dim, form.filters) or names("w", 3, form.filters)
    channels = names("x", 4, form.channels) or names("w", 4, form.channels)
    return Cut(batch, space, channels, filters, ())  # type: ignore[arg-type]


def _refined(mesh: Mesh) -> Mesh:
    """The mesh with axes of prime sizes: a dimension may be cut over a part of an axis, as reshapes bring it about."""
    names, sizes = [], []
    for name, size in mesh.shape.items():
        for i, factor in enumerate(_primes(size)):
            names.append(f"{name}.{i}")
            sizes.append(factor)
    return Mesh(mesh.devices.reshape(sizes), names)


def _primes(number: int) -> list[int]:
    """Its prime factors; of 1, itself."""
    found, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            found.append(divisor)
            number //= divisor
        divisor += 1
    return found or [1]


def _spec(value: Any, mesh: Mesh) -> PartitionSpec:
    """How the partitioner cuts an array; one that has no words for the mesh is taken whole."""
    if value.sharding is None:
        return PartitionSpec()
    found = value.sharding._to_xla_hlo_sharding(len(value.shape))
    try:
        return sharding_impls.parse_flatten_op_sharding(found, mesh)[0]
    except Exception:  # an error here would end the compilation
        return PartitionSpec()


def _partition(kind: str, platform: str, form: Any, mesh: Any, operands: Any, results: Any) -> Any:
    roles, made = ROLES[kind]
    found = results if isinstance(results, list | tuple) else [results]
    mesh = _refined(mesh)
    specs: dict[str, PartitionSpec] = {}
    for role, value in [*zip(made, found, strict=True), *zip(roles, operands, strict=True)]:
        specs.setdefault(role, _spec(value, mesh))
    cut = _cut(kind, form, mesh, specs)
    batch = next(value.shape[0] for role, value in zip(roles, operands, strict=True) if role in "xy")
    local = functools.partial(_local, kind, platform, form, mesh, cut, batch)
    shardings = {role: NamedSharding(mesh, cut.spec(role, form)) for role in "xwyb"}
    result = [shardings[role] for role in made]
    return mesh, local, result if kind == "gradients" else result[0], tuple(shardings[role] for role in roles)


def _rule(kind: str, platform: str, form: Any, mesh: Any, operands: Any, results: Any) -> tuple[str, dict[str, Any]]:
    """How the dimensions belong together: n, (d, h, w), channels c and filters f of groups g."""
    each_c, each_f = form.channels // form.groups, form.filters // form.groups
    sizes: dict[str, int] = {}
    channels, filters = "c", "f"
    if form.groups > 1:  # a factor of one element must not stand beside another
        channels, filters = ("(g c)" if each_c > 1 else "g"), ("(g f)" if each_f > 1 else "g")
        sizes = ({"c": each_c} if each_c > 1 else {}) | ({"g": form.groups} if min(each_c, each_f) > 1 else {})
    words = {
        "x": f"n d h w {channels}",
        "w": f"i j k f {channels}",
        "y": f"n {filters} d h w" if form.channels_first else f"n d h w {filters}",
        "b": filters,
    }
    roles, made = ROLES[kind]
    rule = ", ".join(words[role] for role in roles) + " -> " + ", ".join(words[role] for role in made)
    return rule, {"need_replication_factors": ("i", "j", "k"), **sizes}


partitioned.def_partition(_partition, sharding_rule=_rule, decode_shardings=False)


@dataclasses.dataclass(frozen=True)
class CutAxis:
    """One cut spatial axis: its mesh axes, the axis of one device, what it reads, and what it keeps of its outputs."""

    names: Names
    axis: Axis
    exchange: _halos.Exchange
    kept: int = 0
    skipped: tuple[int, ...] = ()


def _line(axis: Axis, names: Names, shards: int, forward: bool) -> CutAxis:
    """Of outputs from inputs where ``forward``, else of inputs from outputs."""
    if not forward:
        piece = -(-axis.n // shards)
        first, part = part_of_inputs(axis, piece)
        starts = [device * piece * axis.s + first for device in range(shards)]
        return CutAxis(names, part, _halos.plan(axis.out, shards, starts, part.out, axis.wraps))
    piece = -(-axis.out // shards)
    whole, skipped = zip(*(divmod(device * piece, axis.s) for device in range(shards)), strict=True)
    first, part = part_of_outputs(axis, piece + max(skipped))
    exchange = _halos.plan(axis.n, shards, [cell + first for cell in whole], part.n, axis.wraps)
    return CutAxis(names, part, exchange, piece, skipped)


def _local(kind: str, platform: str, form: Any, mesh: Any, cut: Cut, batch: int, *operands: jax.Array) -> Any:
    """What one device computes, with its shards of the operands."""

    def shards(names: Names) -> int:
        return math.prod(mesh.shape[name] for name in names)

    forward = not GRADIENTS[kind]
    lines = [
        _line(axis, names, shards(names), forward) if names else None
        for axis, names in zip(form.geometry, cut.space, strict=True)
    ]
    part = dataclasses.replace(
        form,
        geometry=tuple(axis if line is None else line.axis for axis, line in zip(form.geometry, lines, strict=True)),
        channels=form.channels // shards(cut.channels or cut.groups),
        filters=form.filters // shards(cut.filters or cut.groups),
        groups=form.groups // shards(cut.groups),
    )

    def compute(kind: str, part: Any, slab: Sequence[jax.Array]) -> Any:
        return _choice.run(kind, platform, part, *slab)

    first = 2 if form.channels_first else 1
    if forward:
        return _outputs(compute, kind, form, part, cut, lines, operands)
    y = _windows(_within(operands[-1], [cut.batch], [batch]), lines, first)
    summed = (*cut.batch, *(name for names in cut.space for name in names))
    x_dtype, w_dtype, y_dtype = form.dtypes
    part = dataclasses.replace(
        part, dtypes=(form.sums if cut.filters else x_dtype, form.sums if summed else w_dtype, y_dtype)
    )
    slab = [*operands[:-1], y]
    if kind != "inputs":
        lengths = [batch, *(axis.n for axis in form.geometry)]
        slab[0] = _within(operands[0], [cut.batch, *cut.space], lengths)
    made = compute(kind, part, slab)
    dx, dw = made if kind == "gradients" else (made, made)
    dx = (lax.psum(dx, cut.filters) if cut.filters else dx).astype(x_dtype) if kind != "kernel" else None
    dw = (lax.psum(dw, summed) if summed else dw).astype(w_dtype) if kind != "inputs" else None
    return [dx, dw] if kind == "gradients" else dw if kind == "kernel" else dx


def _outputs(
    compute: Callable[..., Any],
    kind: str,
    form: Any,
    part: Any,
    cut: Cut,
    lines: Sequence[CutAxis | None],
    operands: Sequence[jax.Array],
) -> jax.Array:
    slab = list(operands)
    for place in (0, 2) if kind == "tangent" else (0,):
        slab[place] = _windows(operands[place], lines, 1)
    bias = None
    if cut.channels:  # the bias once, and rounded once
        part = dataclasses.replace(part, dtypes=(*part.dtypes[:2], form.sums))
        if kind == "affine":
            kind, bias = "outputs", slab.pop()
    made = compute(kind, part, slab)
    for dim, line in enumerate(lines, start=2 if form.channels_first else 1):
        if line is not None and made.shape[dim] != line.kept:
            start = jnp.asarray(line.skipped, jnp.int32)[lax.axis_index(line.names)]
            made = lax.dynamic_slice_in_dim(made, start, line.kept, dim)
    if cut.channels:
        made = lax.psum(made, cut.channels)
    if bias is not None:
        made = made + lax.expand_dims(bias, [dim for dim in range(5) if dim != form.filters_dim])
    return made.astype(form.dtypes[2])


def _windows(array: jax.Array, lines: Sequence[CutAxis | None], first: int) -> jax.Array:
    for dim, line in enumerate(lines, start=first):
        if line is not None:
            array = _halos.exchanged(array, dim, line.exchange, line.names)
    return array


def _within(array: jax.Array, cuts: Sequence[Names], lengths: Sequence[int]) -> jax.Array:
    """Zeros for what lies beyond an array in its last shards, which may be anything; of its first dimensions."""
    for dim, (names, length) in enumerate(zip(cuts, lengths, strict=True)):
        if names and length % lax.axis_size(names):
            place = lax.axis_index(names) * array.shape[dim] + lax.broadcasted_iota(jnp.int32, array.shape, dim)
            array = jnp.where(place < length, array, jnp.zeros((), array.dtype))
    return array
