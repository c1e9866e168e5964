"""Groups as blocks: a few small groups become one block-diagonal product, large ones are walked one by one."""

from __future__ import annotations

import jax
import jax.numpy as jnp

NARROW, MOST = 32, 16
"""Channels up to which groups are merged, and how many: narrower products waste more than the zeros of a merged one."""


def merged(groups: int, channels: int, filters: int) -> int:
    """How many groups of ``channels`` inputs and ``filters`` outputs share a block."""
    most = max(min(NARROW // max(channels, filters), MOST), 1)
    return max(r for r in range(1, min(most, groups) + 1) if groups % r == 0)


def count(groups: int, channels: int, filters: int) -> int:
    """The blocks that groups of ``channels`` and ``filters`` in all are walked in."""
    return groups // merged(groups, channels // groups, filters // groups)


def split_kernel(kernel: jax.Array, groups: int) -> jax.Array:
    """``(kd, kh, kw, F / G, C)`` to ``(B, kd, kh, kw, F / B, C / B)`` with B blocks of merged groups."""
    *window, filters, channels = kernel.shape
    if groups == 1:
        return kernel[None]
    each = channels // groups
    together = merged(groups, each, filters)
    blocks = groups // together
    kernel = kernel.reshape(*window, 1, filters, blocks, together, each)
    if together > 1:
        own = jnp.eye(together, dtype=bool).reshape(1, 1, 1, together, 1, 1, together, 1)
        kernel = jnp.where(own, kernel, jnp.zeros((), kernel.dtype))
    kernel = jnp.moveaxis(kernel, -3, 0)
    return kernel.reshape(blocks, *window, together * filters, together * each)


def join_kernel(blocks: jax.Array, groups: int, filters: int, channels: int) -> jax.Array:
    """The adjoint of `split_kernel`: ``(B, kd, kh, kw, F / B, C / B)`` to ``(kd, kh, kw, filters / G, channels)``."""
    count, *window = blocks.shape[:4]
    if groups == 1:
        return blocks[0]
    together = groups // count
    each_f, each_c = filters // groups, channels // groups
    blocks = blocks.reshape(count, *window, together, each_f, together, each_c)
    kernel = jnp.diagonal(blocks, axis1=4, axis2=6)  # (B, kd, kh, kw, F / G, C / G, merged)
    return kernel.transpose(1, 2, 3, 4, 0, 6, 5).reshape(*window, each_f, channels)
