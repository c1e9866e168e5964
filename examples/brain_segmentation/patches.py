"""Patches to learn from: where they lie is a function of (seed, step) alone; their augmentation, on the device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from examples.brain_segmentation.data import DataError, Subject


class PatchSampler:
    """Cubic patches of the part to learn from; what a step sees is a function of (seed, step) alone."""

    def __init__(self, subject: Subject, patch: int, batch: int, seed: int) -> None:
        end = subject.split.train
        self.image, self.labels = subject.image[:, :end], subject.labels[:, :end]
        self.patch, self.batch, self.seed = patch, batch, seed
        if any(size < patch for size in self.image.shape):
            raise DataError(
                f"--patch {patch} is larger than the part to learn from, {self.image.shape}; choose a smaller patch"
            )
        self.foreground = np.argwhere(self.labels > 0)

    def corners(self, step: int) -> np.ndarray:
        """``(batch, 3)``: the first voxel of each patch of a step, around voxels of the foreground."""
        rng = np.random.default_rng((self.seed, step))
        centres = rng.choice(self.foreground, self.batch)
        jitter = rng.integers(-self.patch // 4, self.patch // 4 + 1, (self.batch, 3))
        return np.clip(centres - self.patch // 2 + jitter, 0, np.array(self.image.shape) - self.patch)

    def __call__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """``(batch, P, P, P, 1)`` images and ``(batch, P, P, P)`` labels."""
        windows = [tuple(slice(a, a + self.patch) for a in corner) for corner in self.corners(step)]
        images, labels = ([volume[w] for w in windows] for volume in (self.image, self.labels))
        return np.stack(images)[..., None], np.stack(labels)

    def describe(self, step: int) -> str:
        """What a step sees, in words that find it again."""
        corners = ", ".join(str(tuple(map(int, corner))) for corner in self.corners(step))
        return f"batch {step} of seed {self.seed}: patches of {self.patch} voxels at {corners}"


FLIP_AXIS = 1
"""Left against right, in a batch ``(N, D, H, W, C)``: the mirror image of a brain is a brain."""


def augment(key: jax.Array, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mirrors half of the patches, and varies contrast, brightness, gamma and noise, as scanners do.

    Args:
      key: of `jax.random`; the same key gives the same result.
      images: ``(N, P, P, P, 1)``, about zero mean and unit deviation.
      labels: ``(N, P, P, P)``.
    """
    flip, contrast, brightness, gamma, noise = jax.random.split(key, 5)
    each = (len(images), 1, 1, 1, 1)
    mirrored = jax.random.bernoulli(flip, 0.5, each)
    images = jnp.where(mirrored, jnp.flip(images, FLIP_AXIS), images)
    labels = jnp.where(mirrored[..., 0], jnp.flip(labels, FLIP_AXIS), labels)
    exponent = jnp.exp(jax.random.uniform(gamma, each, minval=-0.2, maxval=0.2))
    images = jnp.sign(images) * jnp.abs(images) ** exponent
    images = images * jax.random.uniform(contrast, each, minval=0.9, maxval=1.1)
    images = images + jax.random.uniform(brightness, each, minval=-0.1, maxval=0.1)
    return images + 0.05 * jax.random.normal(noise, images.shape), labels
