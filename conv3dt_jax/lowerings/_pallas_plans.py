"""Tiles and cells of the Pallas kernels, by a cost rule fitted on an H200 (`benchmarks/NOTES.md`).

A gathered product costs what its rows, multiply-adds and written values cost, see `Pace`. Cells of more inputs read a
row once for more outputs, and multiply more zeros; the rule weighs one against the other.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from conv3dt_jax._geometry import Axis, Geometry
from conv3dt_jax.lowerings import _reduce, _walks
from conv3dt_jax.lowerings._gather import Gather
from conv3dt_jax.lowerings._reduce import Reduce
from conv3dt_jax.lowerings._triton import PARTS, Tile, power
from conv3dt_jax.lowerings._walks import Walk

SHORT, FLAT = 16, 32
"""Values of a term below which all terms lie side by side in a row, and up to which they may."""

WIDEST, DEEPEST = 512, 2048
"""Columns of a product, and values of a flat row, beyond which cells are not made larger."""

EACH = 4096
"""Values of a tile where channels are not mixed."""

PROGRAMS = 132
"""Multiprocessors to be kept busy."""

READS = 2.0
"""Times that programs read a value of the cotangent from which it is taken apart once before."""

MOST_SHARES = 4 * PROGRAMS


@dataclasses.dataclass(frozen=True)
class Pace:
    """Seconds for a gathered row of a step, for a place in a flat row, a multiply-add, and a byte that is written."""

    row: float
    place: float
    multiply_add: float
    byte: float


PACES = {
    "half": Pace(6e-12, 0.6e-12, 1 / 450e12, 1 / 2.9e12),
    "tf32": Pace(11e-12, 0.8e-12, 1 / 120e12, 1 / 3.4e12),
    "three": Pace(15e-12, 0.8e-12, 1 / 36e12, 1 / 3.4e12),
}


def arithmetic_of(dtype: Any, precision: Any) -> str | None:
    """How products are made at a precision of `jax.lax`: "half", "tf32", "two" or "three"; None where it is unknown."""
    if jnp.dtype(dtype) != jnp.float32:
        return "half"
    if precision is None:
        precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    both = precision if isinstance(precision, tuple) else (precision,)
    found = [_ARITHMETIC.get(str(getattr(one, "name", one)).lower()) for one in both]
    return None if None in found else max(found, key=["tf32", "two", "three"].index)  # type: ignore[arg-type]


_ARITHMETIC = {
    **dict.fromkeys(("none", "default", "fastest", "bfloat16", "tf32_tf32_f32"), "tf32"),
    **dict.fromkeys(("high", "bfloat16_3x", "tensorfloat32", "bf16_bf16_f32_x3"), "two"),
    **dict.fromkeys(("highest", "float32", "f32_f32_f32"), "three"),
}


def outputs_gather(
    geometry: Geometry, batch: int, channels: int, filters: int, groups: int, dtype: Any, way: str
) -> Gather:
    """The plan for the result, by channels and filters of a group."""
    return outputs_gathers(geometry, batch, channels, filters, groups, dtype, way)[0]


def inputs_gather(
    geometry: Geometry, batch: int, channels: int, filters: int, groups: int, dtype: Any, way: str
) -> Gather:
    """The plan for the gradient of the inputs."""
    return inputs_gathers(geometry, batch, channels, filters, groups, dtype, way)[0]


def outputs_gathers(
    geometry: Geometry, batch: int, channels: int, filters: int, groups: int, dtype: Any, way: str
) -> list[Gather]:
    """What is in question for the result, the cheapest first: an axis in phases, or in cells of one or more inputs."""
    if is_each(channels, filters, groups):
        axes = [_walks.outputs_walk(axis, 0 if axis.s > 1 or axis.d > 1 else 1) for axis in geometry]
        return [_of_each(axes, batch, groups)]
    choices = [[cells for cells in (0, 1, 2, 4) if _is_in_question(axis, cells, filters)] for axis in geometry]
    return _ranked(geometry, choices, _walks.outputs_walk, (batch, channels, filters, groups), dtype, way)


def _is_in_question(axis: Axis, cells: int, filters: int) -> bool:
    """Phases, or cells of one input without strides; and cells that by themselves have no more columns than may be."""
    return cells == int(axis.s == axis.d == 1) or (cells > 0 and cells * axis.s * filters <= WIDEST)


def inputs_gathers(
    geometry: Geometry, batch: int, channels: int, filters: int, groups: int, dtype: Any, way: str
) -> list[Gather]:
    """What is in question for the gradient of the inputs, the cheapest first: cells of one or more inputs."""
    if is_each(channels, filters, groups):
        return [_of_each([_walks.inputs_walk(axis, 1) for axis in geometry], batch, groups)]
    return _ranked(geometry, [(1, 2, 4)] * 3, _walks.inputs_walk, (batch, filters, channels, groups), dtype, way)


def is_each(channels: int, filters: int, groups: int) -> bool:
    """Whether channels are not mixed, by channels and filters of a group."""
    return groups > 1 and channels == filters == 1


def _of_each(axes: Any, batch: int, groups: int) -> Gather:
    columns = power(groups, 16, 64)
    return Gather(tuple(axes), batch, groups, groups, 1, False, Tile(EACH // columns, columns, 16), each=True)


def _ranked(
    geometry: Geometry,
    choices: Iterable[Iterable[int]],
    walk: Callable[[Axis, int], Walk],
    sizes: tuple[int, int, int, int],
    dtype: Any,
    way: str,
) -> list[Gather]:
    batch, inner, outer, groups = sizes
    found = []
    walks: Any = [[walk(axis, cell) for cell in cells] for axis, cells in zip(geometry, choices, strict=True)]
    axes: Any
    for axes in itertools.product(*walks):
        whole = all(axis.pieces == 1 for axis in axes)
        for flat in [*([False] if inner >= SHORT or not whole else []), *([True] if inner <= FLAT and whole else [])]:
            depth = inner * (math.prod(axis.terms for axis in axes) if flat else 1)
            columns = math.prod(axis.merged for axis in axes) * outer
            steps = -(-depth // 64) * (1 if flat else math.prod(axis.terms for axis in axes))
            tile = gather_tile(columns, depth, steps, way)
            found.append(Gather(axes, batch, inner, outer, groups, flat, tile))
    small = [one for one in found if one.columns <= WIDEST and not (one.flat and one.depth > DEEPEST)]
    itemsize = jnp.dtype(dtype).itemsize
    return sorted(small or found[:1], key=lambda one: seconds(one, itemsize, way) * (1 + one.pieces / 1000))


def gather_tile(columns: int, depth: int, steps: int, way: str) -> Tile:
    """As measured: wide for long sums of halves; small where a program has little to do but to write."""
    if way == "half":
        wide, deep = power(columns, 16, 256 if steps >= 8 else 128), power(depth, 16, 64)
        if wide == 256:
            return Tile(128, 256, deep, warps=8, stages=4 if steps >= 32 else 3)
        return Tile(64 if wide == 128 and steps <= 2 else 128, wide, deep)
    wide, deep = power(columns, 16, 128), power(depth, 16, 32)
    if way == "tf32":
        return Tile(128, wide, deep)
    return Tile(128 if wide >= 64 else 64, wide, deep, warps=8 if wide >= 64 else 4)


def seconds(gather: Gather, itemsize: int, way: str) -> float:
    """What a product takes, by the cost rule."""
    pace, tile = PACES["three" if way == "two" else way], gather.tile
    each = 1 if gather.flat else sum(math.prod(c) for c in itertools.product(*(axis.counts for axis in gather.axes)))
    steps = -(-gather.cells // tile.rows) * gather.groups * gather.blocks * each * -(-gather.depth // tile.depth)
    vector = min(16 // itemsize, gather.inner & -gather.inner)
    places = tile.depth / vector if gather.flat else 0
    written = gather.cells * gather.pieces * gather.groups * gather.columns * itemsize
    return (
        steps * tile.rows * (pace.row + places * pace.place + tile.columns * tile.depth * pace.multiply_add)
        + written * pace.byte
    )


def kernel_reduce(
    geometry: Geometry, batch: int, channels: int, filters: int, groups: int, way: str
) -> tuple[Reduce, str]:
    """The plan for the gradient of the kernel, and its arithmetic."""
    if is_each(channels, filters, groups):
        columns = power(groups, 16, 64)
        one = Reduce(geometry, batch, groups, 1, 1, _reduce.TAP, 1, Tile(1, columns, EACH // 2 // columns), each=True)
        most = max(1, one.cells // (4 * one.tile.depth))
        return dataclasses.replace(one, shares=max(1, min(8 * PROGRAMS // one.tiles, most))), way
    taps, last = math.prod(axis.k for axis in geometry), geometry[2]
    if taps * filters <= (256 if filters < SHORT else 128):
        line = _reduce.ALL
    elif last.k * filters <= 256 and last.d == 1 and groups == 1 and not last.wraps:
        line = _reduce.WIDTH
    else:
        line = _reduce.TAP
    length = math.prod(axis.k for axis in geometry[3 - line :]) * filters
    rows, columns = power(length, 16, 128), power(channels, 16, 128)
    wide = rows * columns >= 128 * 128
    one = Reduce(geometry, batch, channels, filters, groups, line, 1, Tile(rows, columns, 64 if way == "half" else 32))
    if way == "tf32":
        way = "tf32" if line == _reduce.ALL else "two"
    elif way == "three" and not wide:
        way, one = "float32", dataclasses.replace(one, tile=dataclasses.replace(one.tile, warps=8))
    if way in PARTS and (wide or _reads(one) >= READS):
        one = dataclasses.replace(one, parts=PARTS[way])
    if way == "three" or (way == "two" and wide and one.parts == 1):
        one = dataclasses.replace(one, tile=dataclasses.replace(one.tile, warps=8))
    held = batch * (
        math.prod(axis.n for axis in geometry) * channels + math.prod(axis.out for axis in geometry) * filters
    )
    most = min(MOST_SHARES, one.cells // (8 * one.tile.depth), held * groups // (2 * one.size))
    return dataclasses.replace(one, shares=max(1, min((4 if wide else 8) * PROGRAMS // one.tiles, most))), way


def _reads(reduce: Reduce) -> float:
    """How often programs read a value of the cotangent."""
    strides = math.prod(axis.s for axis in reduce.geometry)
    return reduce.taps / strides * reduce.sides
