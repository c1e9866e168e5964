"""What a lowering does for one call, in numbers: the basis of the choice between them and of `explain`."""

from __future__ import annotations

import dataclasses
from typing import Any

from conv3dt_jax._geometry import Geometry

MULTIPLY_ADD, VALUE = 0.005, {"matmul": 0.36, "phases": 0.25, "winograd": 0.15, "dilated": 0.08}
"""Nanoseconds for a multiply-add, and for a value that passes through the cache, fitted on two x86 cores."""

GRADIENTS = {"outputs": 0, "affine": 0, "tangent": 0, "inputs": 1, "kernel": 1, "gradients": 2}
"""How many of the two gradients a primitive computes; none is the result."""


@dataclasses.dataclass(frozen=True)
class Call:
    """The sizes of one call. Channels and filters count all groups; a symbolic batch counts as one sample.

    ``channels_first`` is about the outputs.
    """

    geometry: Geometry
    batch: int
    channels: int
    filters: int
    groups: int
    itemsize: int
    tile_bytes: int
    channels_first: bool = False

    @classmethod
    def of(cls, form: Any, batch: Any, tile_bytes: int) -> Call:
        samples = batch if isinstance(batch, int) else 1
        sizes = (form.channels, form.filters, form.groups, form.sums.itemsize, tile_bytes)
        return cls(form.geometry, samples, *sizes, channels_first=form.channels_first)


@dataclasses.dataclass(frozen=True)
class Work:
    """Multiply-adds, values that pass through the cache on the way, and the bytes of all temporaries at their most."""

    multiply_adds: int
    values: int
    temporary_bytes: int


def nanoseconds(name: str, multiply_adds: float, values: float) -> float:
    """The cost rule for CPUs."""
    return MULTIPLY_ADD * multiply_adds + VALUE[name] * values
