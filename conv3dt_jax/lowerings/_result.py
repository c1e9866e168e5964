"""A result written block by block: exactly what is asked for, though the blocks of cells stick out of it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from conv3dt_jax.lowerings import _tiles

Part = tuple[jax.Array, tuple[int, int]]
"""``(n, cells, rd, cells, rh, width, F)``, or F second, and the first places of rd and rh in their cells."""


@dataclasses.dataclass(frozen=True)
class Result:
    """``(N, *out, F)``, or ``(N, F, *out)``, covered by cells in depth and height.

    Attributes:
      out: lengths in depth, height and width.
      steps: of a cell in depth and height.
      crops: how far the first cell begins before the result, in depth and height.
      spans: the blocks of batch, groups, depth and height.
      filters: F.
      dtype: of the result; bfloat16 is carried as `_tiles.bits`.
      channels_first: whether F is second.
    """

    out: Sequence[int]
    steps: Sequence[int]
    crops: Sequence[int]
    spans: Sequence[_tiles.Span]
    filters: int
    dtype: Any
    channels_first: bool

    @property
    def _whole(self) -> bool:
        """Whether no cell sticks out."""
        return not any(self.crops) and all(n % s == 0 for n, s in zip(self.out[:2], self.steps, strict=True))

    @property
    def _ordered(self) -> Callable[..., tuple[Any, ...]]:
        return functools.partial(_tiles.ordered, self.channels_first)

    def filled(self, fill: jax.Array) -> jax.Array:
        """To begin with: ``fill`` ``(F,)`` everywhere."""
        batch = self.spans[0].length
        if self._whole:
            cells = [n for cut, s in zip(self.spans[2:], self.steps, strict=True) for n in (cut.length, s)]
            return self._broadcast(fill, batch, *cells, self.out[2])
        return self._broadcast(fill, batch, *self.out)

    def _broadcast(self, fill: jax.Array, *sizes: Any) -> jax.Array:
        shape = self._ordered(*sizes, fill.shape[0])
        return _tiles.bits(lax.broadcast_in_dim(fill, shape, (1 if self.channels_first else len(shape) - 1,)))

    def put(self, outputs: jax.Array, parts: Sequence[Part], starts: Sequence[Any], fill: jax.Array) -> jax.Array:
        """Writes a block of cells; what its parts leave out is ``fill``."""
        sample, group, *corner = starts
        each = self.filters // self.spans[1].length
        first = group * each
        if self._whole:
            return self._put(outputs, parts, (sample, *corner, first))
        n, blocks = self.spans[0].block, [cut.block for cut in self.spans[2:]]
        cells = [size for pair in zip(blocks, self.steps, strict=True) for size in pair]
        block = self._broadcast(lax.dynamic_slice_in_dim(fill, first, each), n, *cells, self.out[2])
        block = self._put(block, parts, (0, 0, 0, 0))
        block = block.reshape(self._ordered(n, cells[0] * cells[1], cells[2] * cells[3], self.out[2], each))
        for rows in itertools.product(self._rows(0), self._rows(1)):
            (d, d_length), (h, h_length) = rows
            part = lax.slice(
                block, self._ordered(0, d, h, 0, 0), self._ordered(n, d + d_length, h + h_length, self.out[2], each)
            )  # fmt: skip
            place = [
                start * s - crop + row
                for start, s, crop, (row, _) in zip(corner, self.steps, self.crops, rows, strict=True)
            ]
            outputs = _tiles.put(outputs, part, self._ordered(sample, *place, 0, first))
        return outputs

    def _put(self, outputs: jax.Array, parts: Sequence[Part], starts: Sequence[Any]) -> jax.Array:
        sample, d, h, first = starts
        for part, (d0, h0) in parts:
            place = self._ordered(sample, d, d0, h, h0, 0, first)
            outputs = part if part.shape == outputs.shape else _tiles.put(outputs, part, place)
        return outputs

    def finished(self, outputs: jax.Array) -> jax.Array:
        """What the last block leaves, as the result."""
        outputs = _tiles.values(outputs, self.dtype)
        return outputs.reshape(self._ordered(self.spans[0].length, *self.out, self.filters))

    def _rows(self, dim: int) -> list[tuple[int, int]]:
        """The elements of a block in depth or height, as ``(start, length)`` in the order of their writing.

        The first and the last block may stick out of the result. What may stick out is written first: it is moved back
        into the result then, over elements that the last write mends.
        """
        span, step, crop = self.spans[2 + dim], self.steps[dim], self.crops[dim]
        end = span.block * step - (span.length * step - crop - self.out[dim])
        inside = end - crop
        if span.count == 1:
            return [(crop, inside)]
        assert inside > 0, "blocks that stick out at both ends must hold two cells"
        edges = [*_pieces(0, crop, inside), *_pieces(end, span.block * step, inside)]
        return [*edges, (crop, inside)]


def _pieces(start: int, end: int, most: int) -> list[tuple[int, int]]:
    return [(first, min(most, end - first)) for first in range(start, end, most)]
