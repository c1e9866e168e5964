"""The one place that chooses a lowering.

"auto" decides per platform when a module is compiled for it, so that one exported module serves all of them:

- no overlap (every effective kernel <= its stride): `matmul`, everywhere. It does no work on zeros and one pass.
- CPU, overlap: XLA runs a dilated convolution as a scalar loop there, so one of the matrix lowerings, the one that
  writes fewer values. `matmul` writes a product for every input, tap and filter; `phases` the gathered channels, the
  phases and a kernel filled up with zeros, which counts where volumes are small and channels many. Kernels of hundreds
  of taps at stride 1 would unroll `phases` into as many pieces: `matmul` where its products are few, else `dilated`.
- GPU and TPU, overlap: `dilated`, which their compilers hand to convolution hardware; integers and complex numbers,
  which those libraries do not take, go to `phases`.
- sizes that are not known when the operation is traced: `dilated`.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from conv3dt_jax._geometry import Geometry
from conv3dt_jax.lowerings import LOWERINGS, phases

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")

_MOST_PIECES = 216
"""Shifts that `phases` may unroll; its compile time grows with them."""

_MOST_PRODUCTS = 4096
"""Products per input that `matmul` may hold where `phases` is out of the question."""


def choose(platform: str, geometry: Geometry, batch: Any, channels: int, filters: int, dtype: np.dtype) -> str:
    """The name of the lowering that "auto" means on ``platform``; ``batch`` may be symbolic."""
    if not all(isinstance(axis.out, int) for axis in geometry):
        return "dilated"
    if not any(axis.overlaps for axis in geometry):
        return "matmul"
    if platform != "cpu":
        return "dilated" if jnp.issubdtype(dtype, jnp.floating) else "phases"
    taps = math.prod(axis.k for axis in geometry)
    shifts = [len(phases.blocks(axis)) for axis in geometry]
    if math.prod(shifts) > _MOST_PIECES:
        return "matmul" if taps * filters <= _MOST_PRODUCTS else "dilated"
    batch = batch if isinstance(batch, int) else 1
    inputs = batch * math.prod(axis.n for axis in geometry)
    windows = batch * math.prod(phases.window_length(axis) for axis in geometry)
    strides = math.prod(axis.s for axis in geometry)
    products = inputs * taps * filters + taps * channels * filters
    gathered = windows * (shifts[1] * shifts[2] * channels + strides * filters)
    filled_kernel = 2 * math.prod(shifts) * strides * channels * filters
    return "matmul" if products <= gathered + filled_kernel else "phases"


def check_named(implementation: str, geometry: Geometry) -> None:
    """Raises the reason where the named lowering cannot take the geometry; it never falls back unseen."""
    reason = LOWERINGS[implementation].refusal(geometry)
    if reason is not None:
        raise NotImplementedError(f"`implementation={implementation!r}` cannot run this: {reason}; use 'auto'.")
