"""A product whose rows are gathered on the way, as a Pallas kernel for Triton: nothing is laid out before it.

    to[q, r, e, n] = sum_j from[q * scale + first[r] + j * step] @ b[r, j, e, n]

for the cells q of the destination, the pieces r of a cell, the terms j that reach a piece, and the neighbours e and
columns n that share a product. Both directions of a strided convolution are of this kind, axis by axis (`Walk`).

A program makes a tile of cells by columns. It reads its rows where they lie, past the ends as zeros, and writes what it
made where it belongs. Neighbours that share a product read a row once for all of them, and multiply zeros where a term
reaches only some.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from conv3dt_jax.lowerings import _triton
from conv3dt_jax.lowerings._triton import Tile, across, both, down, pick, split, unravel, within
from conv3dt_jax.lowerings._walks import Walk


@dataclasses.dataclass(frozen=True)
class Gather:
    """The whole product: its axes, samples, ``inner`` values of a term and ``outer`` columns, of each of ``groups``.

    ``flat``: all terms lie side by side in a row, for short ``inner``; each axis is one piece then. ``each``: channels
    are not mixed, every column meets its own value alone; there is one group of them then.
    """

    axes: tuple[Walk, Walk, Walk]
    batch: int
    inner: int
    outer: int
    groups: int
    flat: bool
    tile: Tile
    each: bool = False

    @property
    def cells(self) -> int:
        return self.batch * math.prod(axis.cells for axis in self.axes)

    @property
    def columns(self) -> int:
        """Of a product: those of all neighbours."""
        return math.prod(axis.merged for axis in self.axes) * self.outer

    @property
    def pieces(self) -> int:
        return math.prod(axis.pieces for axis in self.axes)

    @property
    def terms(self) -> int:
        return math.prod(axis.terms for axis in self.axes)

    @property
    def depth(self) -> int:
        """Values side by side in a row: of a term, or of all."""
        if self.each:
            return 1
        return self.inner * (self.terms if self.flat else 1)

    @property
    def blocks(self) -> int:
        """Tiles of the columns."""
        return -(-self.columns // self.tile.columns)

    @property
    def programs(self) -> int:
        return -(-self.cells // self.tile.rows) * self.groups * self.pieces * self.blocks

    @property
    def weights(self) -> int:
        """Values of its `matrices`."""
        if self.each:
            return self.pieces * self.terms * self.columns
        return self.groups * self.pieces * self.columns * self.inner * self.terms

    @property
    def rows(self) -> int:
        """Rows that are gathered: one for every cell, block of columns and term of a piece."""
        each = math.prod(sum(axis.counts) for axis in self.axes)
        return self.cells * self.groups * self.blocks * each

    @property
    def multiply_adds(self) -> int:
        """Those of all rows, zeros included."""
        return self.rows // self.blocks * (1 if self.each else self.inner) * self.columns

    @property
    def run(self) -> int:
        """Columns that lie side by side where they are written."""
        return (self.axes[2].merged if self.groups == 1 else 1) * self.outer


def matrices(kernel: jax.Array, gather: Gather, *, adjoint: bool) -> jax.Array:
    """``(kd, kh, kw, F / G, C)`` as rows of ``depth`` values, by group, piece, term (unless flat) and column."""
    if gather.each:
        taps = kernel.reshape(-1, gather.columns)
        return taps.at[_tap_places(gather.axes, kernel.shape[:3])].get(mode="fill", fill_value=0).reshape(-1)
    taps = kernel.reshape(-1, kernel.shape[3], gather.groups, gather.inner if not adjoint else gather.outer)
    found = taps.at[_tap_places(gather.axes, kernel.shape[:3])].get(mode="fill", fill_value=0)
    places = [*range(3), *range(6, 9), *range(3, 6)] if gather.flat else range(9)
    last = (9, 11) if adjoint else (11, 9)
    order = (*places[:6], last[1], *places[6:], last[0]) if gather.flat else (*places, last[1], last[0])
    return found.transpose(10, *order).reshape(-1)


def _tap_places(axes: tuple[Walk, Walk, Walk], kernel: Any) -> np.ndarray:
    """The tap for each (pieces, terms, neighbours), one past the last where there is none."""
    found: Any = 0
    none: Any = False
    for dim, (axis, taps) in enumerate(zip(axes, kernel, strict=True)):
        own = np.array([[[-1 if t is None else t for t in es] for es in js] for js in axis.taps])
        shape = [1] * 9
        for place, size in zip((dim, dim + 3, dim + 6), own.shape, strict=True):
            shape[place] = size
        none = none | (own.reshape(shape) < 0)
        found = found * taps + own.reshape(shape)
    return np.where(none, math.prod(kernel), found)


def run(
    source: jax.Array,
    weights: jax.Array,
    bias: jax.Array | None,
    gather: Gather,
    *,
    result: Any,
    arithmetic: str,
    interpret: bool,
) -> jax.Array:
    """``(N, *sizes, C)`` and `matrices` to ``(N, *lengths, F)`` of dtype ``result``, plus ``bias`` before rounding."""
    shape = (gather.batch, *(axis.length for axis in gather.axes), gather.groups * gather.outer)
    operands = [source.reshape(-1), weights, *([] if bias is None else [bias])]
    program = functools.partial(
        _program, gather=gather, arithmetic=arithmetic, has_bias=bias is not None, interpret=interpret
    )
    made = _triton.launch(program, operands, math.prod(shape), result, gather.programs, gather.tile, interpret)
    return made.reshape(shape)


@dataclasses.dataclass(frozen=True)
class _Place:
    """What a program works on: its column indices, piece and group, and for every row sample and cell."""

    columns: jax.Array
    group: Any
    piece: Any
    pieces: list[Any]
    sample: jax.Array
    corner: list[jax.Array]
    inside: jax.Array | None


def _program(*refs: Any, gather: Gather, arithmetic: str, has_bias: bool, interpret: bool) -> None:
    tile, axes = gather.tile, gather.axes
    block, rest = split(_triton.program(), gather.blocks)
    piece, rest = split(rest, gather.pieces)
    group, place = split(rest, gather.groups)
    cells = place * tile.rows + jnp.arange(tile.rows, dtype=jnp.int32)
    sample, *corner = unravel(cells, [gather.batch, *(axis.cells for axis in axes)])
    here = _Place(
        columns=block * tile.columns + jnp.arange(tile.columns, dtype=jnp.int32),
        group=group,
        piece=piece,
        pieces=unravel(piece, [axis.pieces for axis in axes]),
        sample=sample,
        corner=corner,
        inside=None if gather.cells % tile.rows == 0 else cells < gather.cells,
    )
    known = None if gather.columns % tile.columns == 0 else here.columns < gather.columns
    sums = _sums(refs[0], refs[1], gather, arithmetic, here, known)
    filters, neighbour = split(here.columns, gather.outer)
    if has_bias:
        own = jnp.broadcast_to(group * gather.outer + filters, here.columns.shape)
        sums += across(_triton.load(refs[2], own, known).astype(sums.dtype))
    _write(refs[-1], sums, gather, here, filters, neighbour, known, interpret)


def _sums(source: Any, weights: Any, gather: Gather, arithmetic: str, here: _Place, known: Any) -> jax.Array:
    """The tile, before it is rounded: terms after terms, of each a block of values at a time."""
    tile, axes = gather.tile, gather.axes
    width = gather.groups * gather.inner
    strides = [width * axes[1].size * axes[2].size, width * axes[2].size, width]
    counts = [pick(r, axis.counts) for r, axis in zip(here.pieces, axes, strict=True)]
    starts = [q * axis.scale + pick(r, axis.first) for q, r, axis in zip(here.corner, here.pieces, axes, strict=True)]
    begin = here.sample * (axes[0].size * strides[0]) + here.group * gather.inner
    for start, axis, stride in zip(starts, axes, strides, strict=True):
        begin = begin if axis.wraps else begin + start * stride
    blocks = -(-gather.depth // tile.depth)
    line = (here.group * gather.pieces + here.piece) * (1 if gather.flat else gather.terms)
    rows = down((line * gather.columns + here.columns) * gather.depth)
    of_rows: Any = down if gather.flat else (lambda value: value)

    def add(turn: Any, sums: jax.Array) -> jax.Array:
        part, rank = split(turn, blocks)
        values = part * tile.depth + jnp.arange(tile.depth, dtype=jnp.int32)
        held = None if gather.depth % tile.depth == 0 else values < gather.depth
        terms, inner, at = _terms(gather, rank, values, counts)
        address, valid, shift = of_rows(begin), here.inside, 0
        valid = None if valid is None else of_rows(valid)
        for term, start, axis, stride in zip(terms, starts, axes, strides, strict=True):
            moved = term * axis.step
            if axis.wraps:
                past = -(min(axis.first) // axis.size) * axis.size
                address = address + _triton.remainder(of_rows(start) + moved + past, axis.size) * stride
                continue
            shift = shift + moved * stride
            if not axis.stays_inside:
                valid = both(valid, within(of_rows(start) + moved, axis.size))
        if gather.flat:
            a = _triton.load(source, address + (shift + across(inner)), both(valid, across(held)))
        else:
            inner = here.columns if gather.each else inner
            held = known if gather.each else held
            a = _triton.load(source, down(address + shift) + across(inner), both(down(valid), across(held)))
        if gather.each:
            b = _triton.load(weights, line * gather.columns + at + here.columns, known)
            return sums + a.astype(jnp.float32) * across(b.astype(jnp.float32))
        b = _triton.load(weights, rows + at + across(values), both(down(known), across(held)))
        return _triton.add_product(sums, [a], [b], arithmetic, transposed=1)

    turns = blocks if gather.flat else counts[0] * counts[1] * counts[2] * blocks
    return _triton.repeat(turns, add, jnp.zeros((tile.rows, tile.columns), jnp.float32))


def _terms(gather: Gather, rank: Any, values: jax.Array, counts: list[Any]) -> tuple[list[Any], Any, Any]:
    """The terms along each axis, the place of the values in them, and where the weights of this turn begin."""
    sizes = [axis.terms for axis in gather.axes]
    if gather.flat:
        inner, term = split(values, gather.inner)
        return [across(t) for t in unravel(term, sizes)], inner, 0
    terms = unravel(rank, counts)
    at = (terms[0] * sizes[1] + terms[1]) * sizes[2] + terms[2]
    return terms, values, at * (gather.columns * gather.depth)


def _write(
    made: Any, sums: jax.Array, gather: Gather, here: _Place, filters: Any, neighbour: Any, known: Any, interpret: bool
) -> None:
    """Rounds the tile and puts it where it belongs."""
    axes, width = gather.axes, gather.groups * gather.outer
    strides = [width * axes[1].length * axes[2].length, width * axes[2].length, width]
    neighbours = unravel(neighbour, [axis.merged for axis in axes])
    address, valid, shift = here.sample * (axes[0].length * strides[0]), down(here.inside), here.group * gather.outer
    for q, r, e, axis, stride in zip(here.corner, here.pieces, neighbours, axes, strides, strict=True):
        own = q * axis.stride + pick(r, axis.offsets)
        address = address + own * stride
        if not axis.fills:
            valid = both(valid, within(down(own) + across(e), axis.length))
        if axis is not axes[2] or gather.run == gather.outer:
            shift = shift + e * stride
    shift = shift + (filters if gather.run == gather.outer else _triton.remainder(here.columns, gather.run))
    address = down(address) + jnp.broadcast_to(across(shift), (1, gather.tile.columns))
    _triton.store(made, address, sums, both(valid, across(known)), interpret)
