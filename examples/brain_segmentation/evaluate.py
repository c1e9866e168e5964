"""Labels for a whole volume, and how well they agree with the truth."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from examples.brain_segmentation.model import FACTOR, REACH, UNet

TILE = 128
"""Longer axes are cut into overlapping tiles of this length, to bound the memory."""


def segment(model: UNet, params: Any, image: np.ndarray, tile: int = TILE) -> np.ndarray:
    """``(D, H, W)`` image to ``(D, H, W)`` class indices; the same for every length of tiles.

    ``tile`` is a multiple of `FACTOR` above ``2 * REACH``.
    """
    padded = np.pad(image, [(0, -size % FACTOR) for size in image.shape], mode="edge")
    window = [min(tile, size) for size in padded.shape]
    starts = [_starts(size, length) for size, length in zip(padded.shape, window, strict=True)]

    @jax.jit
    def predict(params: Any, volume: jax.Array) -> jax.Array:
        logits = jnp.asarray(model.apply({"params": params}, volume[None, ..., None]))
        return jnp.argmax(logits[0], -1).astype(jnp.int32)

    labels = np.zeros(padded.shape, np.int32)
    for corner in itertools.product(*starts):
        box = tuple(slice(a, a + length) for a, length in zip(corner, window, strict=True))
        # Past a cut, REACH voxels are the previous tile's to tell; the next tile overwrites as many at this one's end.
        inner = tuple(slice(REACH if a else 0, None) for a in corner)
        labels[box][inner] = np.asarray(predict(params, padded[box]))[inner]
    return labels[tuple(map(slice, image.shape))]


def _starts(size: int, length: int) -> list[int]:
    """Where tiles of ``length`` start, each overlapping the next by two reaches at least."""
    return sorted({min(start, size - length) for start in range(0, size, length - 2 * REACH)})


def dice(prediction: np.ndarray, truth: np.ndarray, classes: int) -> list[float]:
    """Per class, twice the overlap over the sum of the sizes; 1 is perfect, NaN where a class is in neither."""
    scores = []
    for label in range(classes):
        a, b = prediction == label, truth == label
        total = int(a.sum()) + int(b.sum())
        scores.append(2 * int((a & b).sum()) / total if total else float("nan"))
    return scores
