"""A compact 3-D U-Net. Its parts were chosen by measurement on CPU, where XLA is slow at the gradients of convolutions.

`python -m examples.brain_segmentation.measure` times the alternatives, forward with both gradients. On two cores, for
patches of 32 voxels in batches of 4, relative to what is used here:

    3x3x3, stride 1, 8 to 32 channels    Conv3D 1              flax Conv 2.8 to 8.2
    halving, 8 or 16 channels            Conv3D 2x2x2 1        Conv3D 3x3x3 2.9 to 3.4, max pool 1.5 to 2.1,
                                                               flax Conv 2x2x2 31 to 46, 3x3x3 100 to 147
    doubling, 16 or 32 channels          Conv3DTranspose 1     flax ConvTranspose 43 to 52, trilinear 1.1 to 1.4
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

    Normalizing the channels of each voxel, not the volume, keeps a voxel's result free of the tile it is computed in.
    """

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = c3t.Conv3D(
            self.features, 3, padding="same", use_bias=False, kernel_initializer="he_normal", dtype=self.dtype
        )(x)
        return nn.leaky_relu(nn.LayerNorm(epsilon=1e-5, dtype=self.dtype)(x), 0.1)


def downsample(features: int, dtype: DTypeLike) -> nn.Module:
    """Learnt downsampling to half the size, the adjoint of `transposed_upsample` in its shape."""
    return c3t.Conv3D(features, 2, strides=2, dtype=dtype)


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
            x = Convolution(width, self.dtype)(downsample(width, self.dtype)(x) if level else x)
            skips.append(x)
        for level in reversed(range(LEVELS)):
            x = jnp.concatenate([upsample(widths[level], self.dtype)(x), skips[level]], -1)
            x = Convolution(widths[level], self.dtype)(x)
        return c3t.Conv3D(self.classes, 1, dtype=jnp.float32)(x)
