"""Labels for a whole volume, tile by tile, and how well they agree with the truth."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from examples.brain_segmentation.model import FACTOR, UNet

TILE = 64
MARGIN = 8
"""Each tile's border is computed for its neighbours' sake and dropped."""


def segment(model: UNet, params: Any, image: np.ndarray) -> np.ndarray:
    """``(D, H, W)`` image to ``(D, H, W)`` class indices."""
    core = TILE - 2 * MARGIN
    assert TILE % FACTOR == 0
    padded = np.pad(image, [(MARGIN, MARGIN + -size % core) for size in image.shape], mode="edge")
    predict = jax.jit(
        lambda params, tile: jnp.argmax(jnp.asarray(model.apply({"params": params}, tile)), -1).astype(jnp.int32)
    )
    labels = np.zeros([size + -size % core for size in image.shape], np.int32)
    for start in itertools.product(*(range(0, size, core) for size in image.shape)):
        tile = padded[tuple(slice(a, a + TILE) for a in start)]
        inner = np.asarray(predict(params, tile[None, ..., None]))[0]
        inner = inner[MARGIN:-MARGIN, MARGIN:-MARGIN, MARGIN:-MARGIN]
        labels[tuple(slice(a, a + core) for a in start)] = inner
    return labels[tuple(map(slice, image.shape))]


def dice(prediction: np.ndarray, truth: np.ndarray, classes: int) -> list[float]:
    """Per class, twice the overlap over the sum of the sizes; 1 is perfect, NaN where a class is in neither."""
    scores = []
    for label in range(classes):
        a, b = prediction == label, truth == label
        total = int(a.sum()) + int(b.sum())
        scores.append(2 * int((a & b).sum()) / total if total else float("nan"))
    return scores
