"""A compact 3-D U-Net. Its parts were chosen by measurement on CPU, where XLA is slow at ordinary 3-D convolutions.

`python -m examples.brain_segmentation.measure` times the alternatives, forward with both gradients. On two cores, for
patches of 32 voxels in batches of 4, relative to what is used here:

    3x3x3, stride 1, 8 to 32 channels    Conv3DTranspose 1     flax Conv 1.5 to 3.6
    halving, 8 or 16 channels            space to depth 1      max pool 1.6 to 2.9, 2x2x2 strided convolution 24 to 39,
                                                               3x3x3 strided convolution 75 to 127
    doubling, 16 or 32 channels          Conv3DTranspose 1     flax ConvTranspose 31, trilinear 0.8 to 0.9
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

import conv3dt_jax as c3t

LEVELS = 3
FACTOR = 2**LEVELS
"""Every spatial size must be divisible by this: each level halves it."""

Upsample = Callable[[int, DTypeLike], Callable[[jax.Array], jax.Array]]


class Convolution(nn.Module):
    """3x3x3 convolution, normalization, activation: ``(N, D, H, W, C)`` to ``(N, D, H, W, features)``.

    With stride 1 a convolution is a transposed one with a flipped kernel, and learning does not mind the flip.
    Normalizing the channels of each voxel, not the volume, keeps a voxel's result free of the tile it is computed in.
    """

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = c3t.Conv3DTranspose(
            self.features, 3, padding="same", use_bias=False, kernel_initializer="he_normal", dtype=self.dtype
        )(x)
        return nn.leaky_relu(nn.LayerNorm(epsilon=1e-5, dtype=self.dtype)(x), 0.1)


class Downsample(nn.Module):
    """Halves each axis: space to depth, then a matrix; ``(N, D, H, W, C)`` to ``(N, D/2, H/2, W/2, features)``."""

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        n, d, h, w, c = x.shape
        x = x.reshape(n, d // 2, 2, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 5, 2, 4, 6, 7)
        return nn.Dense(self.features, dtype=self.dtype)(x.reshape(n, d // 2, h // 2, w // 2, 8 * c))


class TrilinearUpsample(nn.Module):
    """What a transposed convolution replaces: mix the channels, then interpolate to twice the size."""

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(self.features, dtype=self.dtype)(x)
        n, d, h, w, c = x.shape
        return jax.image.resize(x, (n, 2 * d, 2 * h, 2 * w, c), "trilinear")


def transposed_upsample(features: int, dtype: DTypeLike) -> nn.Module:
    """Learnt upsampling to twice the size; kernel and stride of 2 leave no overlap, hence no checkerboard."""
    return c3t.Conv3DTranspose(features, 2, strides=2, dtype=dtype)


def flax_upsample(features: int, dtype: DTypeLike) -> nn.Module:
    """The same by Flax's own layer, for comparison."""
    return nn.ConvTranspose(features, (2, 2, 2), (2, 2, 2), dtype=dtype)


UPSAMPLINGS: dict[str, Upsample] = {
    "transposed": transposed_upsample,
    "trilinear": TrilinearUpsample,
    "flax": flax_upsample,
}


class UNet(nn.Module):
    """``(N, D, H, W, 1)`` image to ``(N, D, H, W, classes)`` float32 logits; D, H, W divisible by `FACTOR`.

    The finest level, where voxels are many, is narrow and has one convolution on the way down and one on the way up.
    Computes in ``dtype``; parameters and logits are float32.
    """

    classes: int
    features: int = 8
    upsampling: str = "transposed"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        upsample = UPSAMPLINGS[self.upsampling]
        widths = [self.features * 2**level for level in range(LEVELS + 1)]
        x = x.astype(self.dtype)
        skips = []
        for level, width in enumerate(widths):
            x = Convolution(width, self.dtype)(Downsample(width, self.dtype)(x) if level else x)
            skips.append(x)
        for level in reversed(range(LEVELS)):
            x = jnp.concatenate([upsample(widths[level], self.dtype)(x), skips[level]], -1)
            x = Convolution(widths[level], self.dtype)(x)
        return nn.Dense(self.classes, dtype=jnp.float32)(x)
