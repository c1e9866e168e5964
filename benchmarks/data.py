"""The operands of a case, the same in every process, and the positions at which results are compared."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Sequence

import numpy as np

from benchmarks.cases import Case

SAMPLES = 512
DISTINCT = 1 << 25
"""Values that are drawn for an array at most."""


@functools.lru_cache(maxsize=1)
def operands(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs ``(N, D, H, W, C)``, kernel in Keras's layout, cotangent ``(N, D', H', W', F)``: float32, read-only."""
    seed = case.name.removesuffix("_bf16").removesuffix("_tf32").removesuffix("_f32")
    rng = np.random.default_rng(zlib.crc32(seed.encode()))
    arrays = [_normal(rng, shape) for shape in (case.inputs, case.kernel_shape, case.outputs)]
    for array in arrays:
        array.flags.writeable = False
    return arrays[0], arrays[1], arrays[2]


def _normal(rng: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
    """Of a large array, so many values again and again: more than a cache holds."""
    size = math.prod(shape)
    values = rng.standard_normal(min(size, DISTINCT), np.float32)
    return (values if size <= DISTINCT else np.resize(values, size)).reshape(shape)


def labels(case: Case) -> np.ndarray:
    """A random class for every voxel of the inputs, as the network is trained with."""
    return np.random.default_rng(1).integers(0, case.filters, case.inputs[:4]).astype(np.int32)


def sample(parts: Sequence[np.ndarray]) -> list[list[float]]:
    """Fixed pseudo-random entries of results in the layout of `operands`."""
    rng = np.random.default_rng(0)
    picked = []
    for part in parts:
        positions = np.unravel_index(rng.integers(0, part.size, SAMPLES), part.shape)
        picked.append(np.asarray(part[positions], np.float64).tolist())
    return picked


def to_channels_first(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(x, -1, 1))


def to_channels_last(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, 1, -1)
