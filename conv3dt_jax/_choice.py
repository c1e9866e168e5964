"""The one place that chooses a lowering.

"auto" decides per platform when a module is compiled for it, so that one exported module serves all of them:

- no overlap (every effective kernel <= its stride): `matmul`, everywhere. It does no work on zeros and one pass.
- CPU, overlap: XLA runs a dilated convolution as a scalar loop there, so one of the matrix lowerings, the one with
  the smaller temporary per input cell: `matmul` keeps a product for every tap and filter, `phases` the gathered
  channels and the phases. Where even that is large (kernels of hundreds of taps at stride 1), `dilated`.
- GPU and TPU, overlap: `dilated`, which their compilers hand to convolution hardware; integers and complex numbers,
  which those libraries do not take, go to `phases`.
- sizes that are not known when the operation is traced: `dilated`.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from conv3dt_jax._geometry import Geometry
from conv3dt_jax.lowerings import LOWERINGS, phases

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")

# Values per input cell beyond which the matrix lowerings' temporaries outweigh their speed.
_MOST_PIECES = 512


def choose(platform: str, geometry: Geometry, channels: int, filters: int, dtype: np.dtype) -> str:
    """The name of the lowering that "auto" means on ``platform``."""
    if not all(isinstance(axis.out, int) for axis in geometry):
        return "dilated"
    if not any(axis.overlaps for axis in geometry):
        return "matmul"
    if platform != "cpu":
        return "dilated" if jnp.issubdtype(dtype, jnp.floating) else "phases"
    taps = math.prod(axis.k for axis in geometry)
    shifts = math.prod(len(phases.blocks(axis)) for axis in geometry)
    if shifts > _MOST_PIECES:
        return "dilated"
    gathered = shifts // len(phases.blocks(geometry[0])) * channels
    interleaved = math.prod(axis.s for axis in geometry) * filters
    return "matmul" if taps * filters <= gathered + interleaved else "phases"


def check_named(implementation: str, geometry: Geometry) -> None:
    """Raises the reason where the named lowering cannot take the geometry; it never falls back unseen."""
    reason = LOWERINGS[implementation].refusal(geometry)
    if reason is not None:
        raise NotImplementedError(f"`implementation={implementation!r}` cannot run this: {reason}; use 'auto'.")
