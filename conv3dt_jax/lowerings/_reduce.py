"""The gradient for the kernel as a Pallas kernel: products of gathered cotangents with inputs, summed over all cells.

    w[t, f, c] = sum_i y[i * s + t * d - lo, f] x[i, c]

A program sums a share of the cells for a tile of (taps and filters, channels); the shares are added afterwards. The
rows of a tile lie on a line: the filters of one tap, those of all taps in width, or of all taps.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from conv3dt_jax._geometry import Geometry
from conv3dt_jax.lowerings import _triton
from conv3dt_jax.lowerings._triton import Tile, across, both, down, split, unravel, within

TAP, WIDTH, ALL = 0, 1, 3


@dataclasses.dataclass(frozen=True)
class Reduce:
    """Channels and filters of a group. ``line``: the axes, from the last, whose taps are on a line.

    ``tile``: ``rows`` taps and filters, ``columns`` channels, ``depth`` cells at a time. ``parts``: of how many
    bfloat16 each operand is the sum, where it is taken apart before, and not by every program that reads it. ``each``:
    channels are not mixed; a tap has one filter then, for all channels of one group.
    """

    geometry: Geometry
    batch: int
    channels: int
    filters: int
    groups: int
    line: int
    shares: int
    tile: Tile
    parts: int = 1
    each: bool = False

    @property
    def cells(self) -> int:
        return self.batch * math.prod(axis.n for axis in self.geometry)

    @property
    def taps(self) -> int:
        return math.prod(axis.k for axis in self.geometry)

    @property
    def length(self) -> int:
        """Of a line."""
        return math.prod(axis.k for axis in self.geometry[3 - self.line :]) * self.filters

    @property
    def lines(self) -> int:
        return self.taps * self.filters // self.length

    @property
    def blocks(self) -> int:
        """Tiles of a line."""
        return -(-self.length // self.tile.rows)

    @property
    def sides(self) -> int:
        """Tiles of the channels."""
        return -(-self.channels // self.tile.columns)

    @property
    def tiles(self) -> int:
        return self.groups * self.lines * self.blocks * self.sides

    @property
    def size(self) -> int:
        return self.groups * self.taps * self.filters * self.channels

    @property
    def share(self) -> int:
        """Cells that a program sums, a multiple of those it takes at a time."""
        return -(-self.cells // (self.shares * self.tile.depth)) * self.tile.depth

    def is_run(self, dim: int) -> bool:
        """Whether taps and filters along an axis lie side by side in the cotangent."""
        axis = self.geometry[dim]
        return dim == 2 and self.line == WIDTH and self.groups == 1 and axis.d == 1 and not axis.wraps


def run(x: jax.Array, y: jax.Array, reduce: Reduce, *, arithmetic: str, interpret: bool) -> jax.Array:
    """``(N, D, H, W, C)`` and ``(N, *out, F)`` to ``(kd, kh, kw, F / G, C)`` in float32."""
    made = _triton.launch(
        functools.partial(_program, reduce=reduce, arithmetic=arithmetic, interpret=interpret),
        [part.reshape(-1) for operand in (x, y) for part in _triton.taken_apart(operand, reduce.parts)],
        reduce.shares * reduce.size,
        jnp.float32,
        reduce.shares * reduce.tiles,
        reduce.tile,
        interpret,
    )
    kernel = tuple(axis.k for axis in reduce.geometry)
    found = made.reshape(reduce.shares, reduce.groups, *kernel, reduce.filters, reduce.channels).sum(0)
    return jnp.moveaxis(found, 0, 4).reshape(*kernel, reduce.filters, -1)


@dataclasses.dataclass(frozen=True)
class _Place:
    """What a program works on: its rows on the line, channels, group, share, and the tap along each axis."""

    rows: jax.Array
    channels: jax.Array
    group: Any
    share: Any
    line: Any
    taps: list[Any]
    filters: Any


def _program(*refs: Any, reduce: Reduce, arithmetic: str, interpret: bool) -> None:
    x, y, made = refs[: reduce.parts], refs[reduce.parts : -1], refs[-1]
    tile, sizes = reduce.tile, [axis.k for axis in reduce.geometry]
    side, rest = split(_triton.program(), reduce.sides)
    block, rest = split(rest, reduce.blocks)
    line, rest = split(rest, reduce.lines)
    group, share = split(rest, reduce.groups)
    rows = block * tile.rows + jnp.arange(tile.rows, dtype=jnp.int32)
    channels = side * tile.columns + jnp.arange(tile.columns, dtype=jnp.int32)
    filters, rank = (rows, 0) if reduce.line == TAP else split(rows, reduce.filters)
    fixed = unravel(line, sizes[: 3 - reduce.line]) if reduce.line < ALL else []
    varying = unravel(rank, sizes[3 - reduce.line :]) if reduce.line > TAP else []
    here = _Place(rows, channels, group, share, line, [*fixed, *map(across, varying)], filters)
    known = None if reduce.length % tile.rows == 0 else rows < reduce.length
    shown = None if reduce.channels % tile.columns == 0 else channels < reduce.channels
    sums = _sums(x, y, reduce, arithmetic, here, known, shown)
    if reduce.each:
        address = (share * reduce.lines + line) * reduce.channels + channels
        _triton.store(made, address, sums.sum(0), shown, interpret)
        return
    lines = ((share * reduce.groups + group) * reduce.lines + line) * reduce.length
    address = (lines + down(rows)) * reduce.channels + across(channels)
    _triton.store(made, address, sums, both(down(known), across(shown)), interpret)


def _sums(x: Any, y: Any, reduce: Reduce, arithmetic: str, here: _Place, known: Any, shown: Any) -> jax.Array:
    tile, axes = reduce.tile, reduce.geometry
    width = reduce.channels if reduce.each else reduce.groups * reduce.filters
    strides = [width * axes[1].out * axes[2].out, width * axes[2].out, width]
    begin = here.share * reduce.share
    own = across(here.group * reduce.channels + here.channels)
    shift = here.group * reduce.filters + (here.rows if reduce.is_run(2) else here.filters)
    if reduce.each:
        shift, known = here.channels, shown
    whole = reduce.shares * reduce.share == reduce.cells

    def add(turn: Any, sums: jax.Array) -> jax.Array:
        cells = begin + turn * tile.depth + jnp.arange(tile.depth, dtype=jnp.int32)
        inside = None if whole else cells < reduce.cells
        at = down(cells * (reduce.groups * reduce.channels)) + own
        a = [_triton.load(part, at, both(down(inside), across(shown))) for part in x]
        sample, *corner = unravel(cells, [reduce.batch, *(axis.n for axis in axes)])
        address, valid = sample * (axes[0].out * strides[0]), inside
        across_line, apart = across(shift), None if known is None else across(known)
        for dim, (i, tap, axis, stride) in enumerate(zip(corner, here.taps, axes, strides, strict=True)):
            start, moved = i * axis.s - axis.lo, tap * axis.d
            fixed = dim < 3 - reduce.line
            if axis.wraps:
                past = -(-axis.lo // axis.out) * axis.out
                place = _triton.remainder((start if fixed else down(start)) + moved + past, axis.out) * stride
                address = address + place if fixed else down(address) + place
                continue
            address = address + (start if address.ndim == 1 else down(start)) * stride
            if fixed:
                address = address + moved * stride
            elif not reduce.is_run(dim):
                across_line = across_line + moved * stride
            if _stays_inside(axis):
                continue
            if fixed:
                valid = both(valid, within(start + moved, axis.out))
            else:
                apart = both(apart, within(down(start) + moved, axis.out))
        b = [_triton.load(part, down(address) + across_line, both(down(valid), apart)) for part in y]
        if reduce.each:
            return sums + a[0].astype(jnp.float32) * b[0].astype(jnp.float32)
        return _triton.add_product(sums, b, a, arithmetic, transposed=0)

    turns, rows = reduce.share // tile.depth, tile.depth if reduce.each else tile.rows
    return _triton.repeat(turns, add, jnp.zeros((rows, tile.columns), jnp.float32))


def _stays_inside(axis: Any) -> bool:
    return axis.lo <= 0 and (axis.n - 1) * axis.s + axis.ke - 1 - axis.lo < axis.out
