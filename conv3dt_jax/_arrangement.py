"""Inputs as the primitives take them, with one axis of batch and maybe their other end around them, and results back.

Where arrays are cut over a mesh, as it is declared or as their types say, they stay so.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from conv3dt_jax import _shards
from conv3dt_jax._cut import Cut, entry_of, is_explicit, names_of, reshaped
from conv3dt_jax.lowerings._tiles import wrapped

Pairs = tuple[tuple[Any, Any], ...]


@dataclasses.dataclass(frozen=True)
class Arranged:
    """Inputs with one axis of batch; how each dimension is cut, and the dimensions of batch before, if that is known.

    ``shards`` is the number of pieces of depth, height and width, 1 where it is left to the compiler.
    """

    array: jax.Array
    cut: Cut | None
    entries: tuple[Any, ...]
    leading: tuple[Any, ...]
    first: int

    @property
    def shards(self) -> tuple[int, int, int]:
        if self.cut is None:
            return (1, 1, 1)
        depth, height, width = (self.cut.shards(names_of(entry)) for entry in self.entries[self.first : self.first + 3])
        return depth, height, width

    def around(self, pairs: Pairs) -> jax.Array:
        """The array with so much of its other end before and behind it, along the axes of space."""
        array = self.array
        for dim, (low, high), shards in zip(range(self.first, self.first + 3), pairs, self.shards, strict=True):
            if (low, high) == (0, 0):
                continue
            if self.cut is None or shards == 1:
                array = wrapped(array, dim, low, high)
            else:
                array = _shards.wrapped(array, dim, low, high, self.cut, self.entries)
        return array

    def restored(self, result: jax.Array, shape: tuple[Any, ...]) -> jax.Array:
        """A result with the dimensions of batch that there were."""
        count = len(self.leading)
        if count == 1:
            return result
        return reshaped(result, shape, (*self.leading, *jax.typeof(result).sharding.spec[1:]))


def arranged(inputs: jax.Array, batch: Sequence[Any], channels_first: bool, cut: Cut | None, read: str) -> Arranged:
    """The inputs of an operation, the side ``read`` of its form: "x" or "y"."""
    typed = jax.typeof(inputs).sharding
    is_typed = is_explicit(typed.mesh)
    count, leading, own = len(batch), typed.spec[: len(batch)], typed.spec[len(batch) :]
    known = cut if cut is not None else Cut(typed.mesh) if is_typed else None
    joined = None  # how the one axis of batch is cut
    if cut is not None:
        joined = entry_of(cut.batch)
        whole = count == 0 or batch[0] % cut.shards(cut.batch) != 0
        leading = (None if whole else joined, *[None] * (count - 1)) if count else ()
        features = cut.groups or (cut.channels if read == "x" else cut.filters)
        space = map(entry_of, cut.space)
        own = (entry_of(features), *space) if channels_first else (*space, entry_of(features))
    elif known is not None:
        size = math.prod(batch)
        fitting = [entry for entry in leading if entry is not None and size % known.shards(names_of(entry)) == 0]
        joined = next(iter(fitting), None)
    entries = (joined, *own)
    if count != 1:
        inputs = reshaped(inputs, (math.prod(batch), *inputs.shape[count:]), (joined, *typed.spec[count:]))
    return Arranged(inputs, known, entries, tuple(leading), 2 if channels_first else 1)
