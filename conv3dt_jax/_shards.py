"""A primitive on several devices: what each computes of its shards, and what they exchange.

Batch, filters, channels and groups are cut where they stand; a cut spatial axis needs halos (`_halos`); what is summed
over a cut axis is summed up once more over the devices.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from conv3dt_jax import _choice, _halos
from conv3dt_jax._cut import ROLES, Cut, Names, names_of
from conv3dt_jax._geometry import Axis, part_of_inputs, part_of_outputs
from conv3dt_jax.lowerings._work import GRADIENTS


@dataclasses.dataclass(frozen=True)
class CutAxis:
    """One cut spatial axis: its mesh axes, the axis of one device, what it reads, and what it keeps of its outputs."""

    names: Names
    numbers: tuple[int, ...]
    axis: Axis
    exchange: _halos.Exchange
    kept: int = 0
    skipped: tuple[int, ...] = ()


Lines = tuple[CutAxis | None, CutAxis | None, CutAxis | None]


def run(kind: str, platform: str, form: Any, *operands: jax.Array) -> Any:
    """`_choice.run` of a form that is cut: manually, over the axes of its mesh."""
    cut, form = form.cut, dataclasses.replace(form, cut=None)
    roles, made = ROLES[kind]
    batch = operands[-1 if GRADIENTS[kind] else 0].shape[0]
    shapes = {"x": form.inputs_shape(batch), "w": form.kernel_shape(), "y": form.outputs_shape(batch)}
    found = jax.shard_map(
        functools.partial(local, kind, platform, form, cut, batch),
        mesh=cut.mesh,
        in_specs=tuple(cut.spec(role, form) for role in roles),
        out_specs=[cut.spec(role, form) for role in made],
        axis_names=set(cut.manual),
        check_vma=False,
    )(*[_filled(operand, cut, role, form) for role, operand in zip(roles, operands, strict=True)])
    results = [_kept(value, cut, role, form, shapes[role]) for role, value in zip(made, found, strict=True)]
    return results if kind == "gradients" else results[0]


def _filled(array: jax.Array, cut: Cut, role: str, form: Any) -> jax.Array:
    """With as many elements as the devices divide; what is added is never read, or as zeros."""
    missing = cut.missing(role, form, array.shape)
    if any(missing):
        array = lax.pad(array, jnp.zeros((), array.dtype), [(0, count, 0) for count in missing])
    return jax.sharding.reshard(array, cut.sharding(role, form)) if cut.is_explicit else array


def _kept(array: jax.Array, cut: Cut, role: str, form: Any, shape: tuple[int, ...]) -> jax.Array:
    if cut.is_explicit:
        array = jax.sharding.reshard(array, cut.typed(role, form, shape))
    return array if array.shape == shape else lax.slice(array, (0,) * array.ndim, shape)


def part_of(kind: str, form: Any, cut: Cut) -> tuple[Any, Lines]:
    """The form of what one device computes, and its cut axes."""
    line = _line_of_inputs if GRADIENTS[kind] else _line_of_outputs
    depth, height, width = (
        line(axis, names, cut.numbers(names)) if cut.shards(names) > 1 else None
        for axis, names in zip(form.geometry, cut.space, strict=True)
    )
    lines = (depth, height, width)
    return dataclasses.replace(
        form,
        geometry=tuple(axis if line is None else line.axis for axis, line in zip(form.geometry, lines, strict=True)),
        channels=form.channels // cut.shards(cut.channels or cut.groups),
        filters=form.filters // cut.shards(cut.filters or cut.groups),
        groups=form.groups // cut.shards(cut.groups),
        dtypes=_partial_dtypes(kind, form, cut),
    ), lines


def summed(kind: str, cut: Cut) -> dict[str, Names]:
    """Over which mesh axes the results of a primitive are summed up; none that has one device."""
    found = {"y": cut.channels}
    if GRADIENTS[kind]:
        found = {"x": cut.filters, "w": (*cut.batch, *(name for names in cut.space for name in names))}
    return {role: tuple(name for name in names if cut.mesh.shape[name] > 1) for role, names in found.items()}


def _partial_dtypes(kind: str, form: Any, cut: Cut) -> tuple[Any, Any, Any]:
    """What is still to be summed up is not rounded before."""
    sums = summed(kind, cut)
    x, w, y = (
        form.sums if sums.get(role) else dtype for role, dtype in zip("xwy", form.dtypes, strict=True)
    )  # fmt: skip
    return x, w, y


def _line_of_inputs(axis: Axis, names: Names, numbers: tuple[int, ...]) -> CutAxis:
    shards = len(numbers)
    piece = -(-axis.n // shards)
    first, part = part_of_inputs(axis, piece)
    starts = [device * piece * axis.s + first for device in range(shards)]
    return CutAxis(names, numbers, part, _halos.plan(axis.out, shards, starts, part.out, axis.wraps))


def _line_of_outputs(axis: Axis, names: Names, numbers: tuple[int, ...]) -> CutAxis:
    shards = len(numbers)
    piece = -(-axis.out // shards)
    whole, skipped = zip(*(divmod(device * piece, axis.s) for device in range(shards)), strict=True)
    first, part = part_of_outputs(axis, piece + max(skipped))
    exchange = _halos.plan(axis.n, shards, [cell + first for cell in whole], part.n, axis.wraps)
    return CutAxis(names, numbers, part, exchange, piece, skipped)


def local(kind: str, platform: str, form: Any, cut: Cut, batch: int, *operands: jax.Array) -> Any:
    """What one device computes of ``batch`` samples in all, with its shards of the operands; a list of results."""
    part, lines = part_of(kind, form, cut)

    def compute(kind: str, part: Any, slab: Sequence[jax.Array]) -> Any:
        return _choice.run(kind, platform, part, *slab)

    if not GRADIENTS[kind]:
        return [_outputs(compute, kind, form, part, cut, lines, operands)]
    first = 2 if form.channels_first else 1
    slab = [*operands[:-1], _windows(_within(operands[-1], [cut.batch], [batch]), lines, first)]
    if kind != "inputs":
        lengths = [batch, *(axis.n for axis in form.geometry)]
        slab[0] = _within(operands[0], [cut.batch, *cut.space], lengths)
    made = compute(kind, part, slab)
    _, roles = ROLES[kind]
    found = dict(zip(roles, made if kind == "gradients" else [made], strict=True))
    dtypes, sums = dict(zip("xwy", form.dtypes, strict=True)), summed(kind, cut)
    return [
        (lax.psum(value, sums[role]) if sums[role] else value).astype(dtypes[role]) for role, value in found.items()
    ]


def _outputs(
    compute: Callable[..., Any],
    kind: str,
    form: Any,
    part: Any,
    cut: Cut,
    lines: Lines,
    operands: Sequence[jax.Array],
) -> jax.Array:
    slab = list(operands)
    for place in (0, 2) if kind == "tangent" else (0,):
        slab[place] = _windows(operands[place], lines, 1)
    sums, bias = summed(kind, cut)["y"], None
    if sums and kind == "affine":  # the bias once, and rounded once
        kind, bias = "outputs", slab.pop()
    made = compute(kind, part, slab)
    for dim, line in enumerate(lines, start=2 if form.channels_first else 1):
        if line is not None and made.shape[dim] != line.kept:
            start = jnp.asarray(line.skipped, jnp.int32)[lax.axis_index(line.names)]
            made = lax.dynamic_slice_in_dim(made, start, line.kept, dim)
    if sums:
        made = lax.psum(made, sums)
    if bias is not None:
        made = made + lax.expand_dims(bias, [dim for dim in range(5) if dim != form.filters_dim])
    return made.astype(form.dtypes[2])


def _windows(array: jax.Array, lines: Lines, first: int) -> jax.Array:
    for dim, line in enumerate(lines, start=first):
        if line is not None:
            array = _halos.exchanged(array, dim, line.exchange, line.names, line.numbers)
    return array


def _within(array: jax.Array, cuts: Sequence[Names], lengths: Sequence[int]) -> jax.Array:
    """Zeros for what lies beyond an array in its last shards, which may be anything; of its first dimensions."""
    for dim, (names, length) in enumerate(zip(cuts, lengths, strict=True)):
        if names and length % lax.axis_size(names):
            place = lax.axis_index(names) * array.shape[dim] + lax.broadcasted_iota(jnp.int32, array.shape, dim)
            array = jnp.where(place < length, array, jnp.zeros((), array.dtype))
    return array


def around(length: int, low: int, high: int, shards: int) -> tuple[_halos.Exchange, int]:
    """How an axis gets so much of its other end before and behind it, and what each device has then."""
    piece = -(-(length + low + high) // shards)
    starts = [device * piece - low for device in range(shards)]
    return _halos.plan(length, shards, starts, piece, wraps=True), piece


def wrapped(array: jax.Array, dim: int, low: int, high: int, cut: Cut, entries: Sequence[Any]) -> jax.Array:
    """With ``low`` and ``high`` elements of its other end around it, along an axis that is cut as ``entries`` say.

    At least as many at the end: as many as it takes for the devices to divide them.
    """
    names = names_of(entries[dim])
    shards, numbers, length = cut.shards(names), cut.numbers(names), array.shape[dim]
    exchange, _ = around(length, low, high, shards)
    missing = [-size % cut.shards(names_of(entry)) for size, entry in zip(array.shape, entries, strict=True)]
    # What does not divide is whole while this axis gets its other end.
    spec = PartitionSpec(*(None if count and i != dim else entries[i] for i, count in enumerate(missing)))
    padding = [(0, missing[dim], 0) if i == dim else (0, 0, 0) for i in range(array.ndim)]
    padded = lax.pad(array, jnp.zeros((), array.dtype), padding)
    if cut.is_explicit:
        padded = jax.sharding.reshard(padded, NamedSharding(cut.abstract, spec))
    return jax.shard_map(
        lambda piece: _halos.exchanged(piece, dim, exchange, names, numbers),
        mesh=cut.mesh,
        in_specs=spec,
        out_specs=spec,
        axis_names=set(cut.manual),
    )(padded)
