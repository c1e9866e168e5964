"""Sliding-window inference: windows that overlap, blended by Gaussian weights, over a volume of any size."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from examples.brain_segmentation.model import FACTOR, UNet

WINDOW = 64
OVERLAP = 0.5
SIGMA = 1 / 8
"""Deviation of the Gaussian, in windows: the border of a window, which sees least around it, weighs next to nothing."""

Predict = Callable[[np.ndarray], Any]


def probabilities(model: UNet, params: Any, image: np.ndarray) -> np.ndarray:
    """``(D, H, W)`` image to ``(D, H, W, classes)`` probabilities."""
    assert WINDOW % FACTOR == 0
    predict = _predictor(model)
    return sliding_window(lambda windows: predict(params, windows[..., None]), image)


@functools.cache
def _predictor(model: UNet) -> Callable[[Any, Any], jax.Array]:
    """Compiled once for a network, not once for an evaluation."""
    return jax.jit(lambda params, windows: jax.nn.softmax(jnp.asarray(model.apply({"params": params}, windows))))


def sliding_window(predict: Predict, image: np.ndarray, window: int = WINDOW) -> np.ndarray:
    """The weighted mean of what ``predict`` makes of windows that share half of their edge.

    Args:
      predict: ``(1, W, W, W)`` to ``(1, W, W, W, K)``.
      image: ``(D, H, W)``; where it is smaller than the window, its border is repeated.
      window: edge of the cubic windows.

    Returns:
      ``(D, H, W, K)`` float32.
    """
    padded = np.pad(image, [(0, max(0, window - size)) for size in image.shape], mode="edge")
    weight = gaussian(window)[..., None]
    total = np.zeros((*padded.shape, 1), np.float32)
    blended: np.ndarray | None = None
    for corner in itertools.product(*(starts(size, window, OVERLAP) for size in padded.shape)):
        where = tuple(slice(a, a + window) for a in corner)
        predicted = np.asarray(predict(padded[where][None]), np.float32)[0]
        if blended is None:
            blended = np.zeros((*padded.shape, predicted.shape[-1]), np.float32)
        blended[where] += weight * predicted
        total[where] += weight
    assert blended is not None
    return (blended / total)[tuple(map(slice, image.shape))]


def starts(size: int, window: int, overlap: float) -> list[int]:
    """First voxels of the windows along an axis of at least one window: evenly spread, the last one flush."""
    stride = max(1, int(window * (1 - overlap)))
    count = -(-(size - window) // stride) + 1
    return [round(i * (size - window) / max(1, count - 1)) for i in range(count)]


def gaussian(window: int) -> np.ndarray:
    """``(W, W, W)`` weights, 1 in the middle; positive everywhere."""
    distance = (np.arange(window) - (window - 1) / 2) / (SIGMA * window)
    line = np.exp(-0.5 * distance**2)
    return np.einsum("i,j,k->ijk", line, line, line).astype(np.float32)
