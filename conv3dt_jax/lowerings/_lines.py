"""The axes of a correlation of cells, and the algorithm for each; kernels as the taps between cells.

A cell is one input, or the ``s`` outputs of a stride: the phases of a transposed convolution, side by side in the
channels, are filters of a convolution without strides. Dilated lines without strides are interleaved ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from conv3dt_jax._geometry import Axis
from conv3dt_jax.lowerings import _minimal
from conv3dt_jax.lowerings._cells import aligned, cells, shifts

DEPTH = {1: _minimal.NONE, 2: _minimal.F32, 3: _minimal.F23}
HEIGHT = {1: _minimal.NONE, 2: _minimal.F32, 3: _minimal.F43}
"""The algorithm for so many taps."""


class Line(NamedTuple):
    """One axis of a correlation of cells: ``found[i] = sum_t given[i + offset + t * d] taps[t]``.

    Attributes:
      offset: see there.
      k: taps.
      d: their distance.
      cells: how many are found.
      length: elements found.
      given: elements of the array in a cell of it.
      found: elements found in a cell.
      early: how far the first cell begins before the elements, on the side that has several in a cell.
    """

    offset: int
    k: int
    d: int
    cells: int
    length: int
    given: int = 1
    found: int = 1
    early: int = 0

    @classmethod
    def forward(cls, axis: Axis) -> Line:
        """From inputs to outputs."""
        begun, early = aligned(axis)
        taps, distance = _taps_of(begun)
        return cls(-shifts(begun)[-1], taps, distance, cells(begun), axis.out, found=axis.s, early=early)

    @classmethod
    def adjoint(cls, axis: Axis) -> Line:
        """From the cotangent of the outputs to that of the inputs."""
        begun, early = aligned(axis)
        taps, distance = _taps_of(begun)
        return cls(shifts(begun)[0], taps, distance, axis.n, axis.n, given=axis.s, early=early)


def _taps_of(axis: Axis) -> tuple[int, int]:
    """The taps of every phase, and their distance in cells."""
    if axis.s == 1:
        return axis.k, axis.d
    return shifts(axis)[-1] - shifts(axis)[0] + 1, 1


def phases_to_filters(kernel: jax.Array, geometry: Sequence[Axis]) -> jax.Array:
    """``(B, kd, kh, kw, F, C)`` to ``(B, *taps, sd * sh * sw * F, C)``: what an input adds to the cells of outputs."""
    for dim, axis in zip((1, 3, 5), geometry, strict=True):
        low, high = _room(axis)
        padding = [(0, 0, 0)] * kernel.ndim
        padding[dim] = (low, high, axis.d - 1 if axis.s > 1 else 0)
        kernel = lax.pad(kernel, jnp.zeros((), kernel.dtype), padding)
        kernel = kernel.reshape(*kernel.shape[:dim], -1, axis.s, *kernel.shape[dim + 1 :])
    kernel = kernel.transpose(0, 1, 3, 5, 2, 4, 6, 7, 8)
    return kernel.reshape(*kernel.shape[:4], -1, kernel.shape[-1])


def filters_to_phases(taps: jax.Array, geometry: Sequence[Axis]) -> jax.Array:
    """The transpose of `phases_to_filters`."""
    strides = [axis.s for axis in geometry]
    blocks, *sizes, _, channels = taps.shape
    taps = taps.reshape(blocks, *sizes, *strides, -1, channels).transpose(0, 1, 4, 2, 5, 3, 6, 7, 8)
    taps = taps.reshape(blocks, *(k * s for k, s in zip(sizes, strides, strict=True)), *taps.shape[-2:])
    for dim, axis in enumerate(geometry, start=1):
        low, high = _room(axis)
        taps = lax.slice_in_dim(taps, low, taps.shape[dim] - high, axis.d if axis.s > 1 else 1, dim)
    return taps


def _room(axis: Axis) -> tuple[int, int]:
    """The places before the first and behind the last tap, in the cells that the taps lie in."""
    if axis.s == 1:
        return 0, 0
    begun, _ = aligned(axis)
    low = -begun.lo - shifts(begun)[0] * axis.s
    return low, _taps_of(begun)[0] * axis.s - low - axis.ke


@dataclasses.dataclass(frozen=True)
class Tiles:
    """An axis in tiles: ``unit`` cells are ``outputs`` of the algorithm for each of ``d`` interleaved lines."""

    line: Line
    algorithm: _minimal.Algorithm

    @property
    def unit(self) -> int:
        return self.algorithm.outputs * self.line.d

    @property
    def count(self) -> int:
        return -(-self.line.cells // self.unit)


def tiles_of(lines: Sequence[Line]) -> tuple[Tiles, Tiles]:
    return Tiles(lines[0], DEPTH[lines[0].k]), Tiles(lines[1], HEIGHT[lines[1].k])
