"""The one place that chooses a lowering, and runs it.

"auto" decides per platform when a module is compiled for it, so that one exported module serves all of them:

- GPU and TPU: `matmul` where nothing overlaps (every effective kernel <= its stride), one product and no work on zeros;
  `dilated` elsewhere, which their compilers hand to convolution hardware; integers and complex numbers, which those
  libraries do not take, go to `phases`.
- CPU, where XLA runs a dilated convolution as a scalar loop: one of the matrix lowerings, by the cost rule below, for
  the result; the gathered patches of `phases` for both gradients.
- sizes that are not known when the operation is traced: `dilated`. Kernels of hundreds of overlapping taps would unroll
  `phases` into as many slices: `matmul` where its products are few, else `dilated`.

The cost rule, in nanoseconds fitted on two cores of an x86 server, counts multiply-adds and the values that pass
through the cache: ``0.005 * multiply_adds + 0.3 * products`` for `matmul`, which writes one product for every input,
tap and filter, and ``0.005 * multiply_adds + 0.25 * gathered`` for `phases`, which gathers shifted inputs and
multiplies some zeros.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from conv3dt_jax._geometry import Geometry
from conv3dt_jax.lowerings import LOWERINGS, matmul, phases
from conv3dt_jax.lowerings._cells import cells, runs, shifts
from conv3dt_jax.lowerings._tiles import tile_bytes

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")

MULTIPLY_ADD, PRODUCT, GATHERED = 0.005, 0.3, 0.25

SHORT_RUN = 6
"""Neighbouring values below which a block's products are laid out one by one, at five times the cost."""

_MOST_PIECES = 216
"""Slices that `phases` may write into the program; its compile time grows with them."""

_MOST_PRODUCTS = 4096
"""Products per input that `matmul` may hold where `phases` is out of the question."""


def choose(kind: str, platform: str, form: Any, batch: Any) -> str:
    """The lowering that "auto" means for a primitive on a platform; ``batch`` may be symbolic."""
    geometry = form.geometry
    if not all(isinstance(axis.out, int) for axis in geometry):
        return "dilated"
    overlaps = any(axis.overlaps for axis in geometry)
    if platform != "cpu":
        floating = jnp.issubdtype(form.dtypes[2], jnp.floating)
        return "matmul" if not overlaps else "dilated" if floating else "phases"
    forward = kind in ("outputs", "tangent")
    if phases.pieces(geometry, gradient=not forward) > _MOST_PIECES:
        few = math.prod(axis.k for axis in geometry) * form.filters // form.groups <= _MOST_PRODUCTS
        return "matmul" if few else "dilated"
    if not forward:
        return "phases"
    if not overlaps:
        return "matmul"
    return "matmul" if matmul_cost(form, batch) < phases_cost(form, batch) else "phases"


def matmul_cost(form: Any, batch: Any) -> float:
    """Nanoseconds that `matmul` takes for the result on a CPU, by the rule above."""
    batch = batch if isinstance(batch, int) else 1
    inputs = batch * math.prod(axis.n for axis in form.geometry)
    products = inputs * math.prod(axis.k for axis in form.geometry) * form.filters
    shapes = (form.inputs_shape(batch), form.kernel_shape(), form.outputs_shape(batch))
    itemsize = form.dtypes[2].itemsize
    room = tile_bytes("cpu", *shapes, itemsize=itemsize)
    in_blocks = matmul.in_blocks(form.geometry, batch, form.channels, form.filters, itemsize, room)
    short = in_blocks and form.geometry[2].s * form.filters < SHORT_RUN
    return MULTIPLY_ADD * products * form.channels / form.groups + PRODUCT * (5 if short else 1) * products


def phases_cost(form: Any, batch: Any) -> float:
    """Nanoseconds that `phases` takes for the result on a CPU, by the rule above."""
    batch = batch if isinstance(batch, int) else 1
    width = phases.aligned(form.geometry[2])[0]
    depth, height = form.geometry[:2]
    windows = batch * math.prod(map(cells, (depth, height, width)))
    gathered = multiply_adds = 0.0
    for (d0, d1), (h0, h1) in itertools.product(runs(depth), runs(height)):
        here = len(shifts(depth, range(d0, d1))) * len(shifts(height, range(h0, h1))) * len(shifts(width))
        gathered += windows * here * form.channels
        multiply_adds += windows * here * (d1 - d0) * (h1 - h0) * width.s * form.channels * form.filters / form.groups
    return MULTIPLY_ADD * multiply_adds + GATHERED * gathered


def check_named(implementation: str, geometry: Geometry) -> None:
    """Raises the reason where the named lowering cannot take the geometry; it never falls back unseen."""
    reason = LOWERINGS[implementation].refusal(geometry)
    if reason is not None:
        raise NotImplementedError(f"`implementation={implementation!r}` cannot run this: {reason}; use 'auto'.")


def run(kind: str, platform: str, form: Any, *operands: jax.Array) -> Any:
    """Computes one of the primitives of `_primitives` with the lowering named there, or that "auto" means."""
    x_dtype, w_dtype, sums = form.dtypes
    x, w, y = _by_role(kind, operands)
    batch = (x if y is None else y).shape[0]
    name = form.implementation if form.implementation != "auto" else choose(kind, platform, form, batch)
    lowering = LOWERINGS[name]
    shapes = (form.inputs_shape(batch), form.kernel_shape(), form.outputs_shape(batch))
    static = {
        "groups": form.groups,
        "precision": form.precision,
        "accumulate": sums,
        "tile_bytes": tile_bytes(platform, *shapes, itemsize=sums.itemsize),
    }
    if not jnp.issubdtype(sums, jnp.floating) or not jnp.issubdtype(x_dtype, jnp.floating):
        operands = tuple(operand.astype(sums) for operand in operands)  # the libraries mix no other kinds
        x, w, y = _by_role(kind, operands)
    if kind == "outputs":
        return lowering.outputs(x, w, form.geometry, **static).astype(sums)
    if kind == "tangent":
        dx, dw = operands[:2]
        terms = [lowering.outputs(*pair, form.geometry, **static).astype(sums) for pair in ((dx, w), (x, dw))]
        return terms[0] + terms[1]
    gradients = lowering.gradients(x, w, y, form.geometry, form.channels, **static)
    found = [g.astype(dtype) for g, dtype in zip(gradients, (x_dtype, w_dtype), strict=True) if g is not None]
    return found if kind == "gradients" else found[0]


def _by_role(kind: str, operands: Sequence[Any]) -> tuple[Any, Any, Any]:
    """The inputs, the kernel and the outputs among the operands of a primitive."""
    if kind == "inputs":
        return None, operands[0], operands[1]
    if kind == "kernel":
        return operands[0], None, operands[1]
    if kind == "gradients":
        return operands[0], operands[1], operands[2]
    return operands[-2], operands[-1], None
