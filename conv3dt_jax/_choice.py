"""The one place that chooses a lowering, and runs it.

"auto" decides per platform when a module is compiled for it, so that one exported module serves all of them:

- NVIDIA GPUs of compute capability 9 (H100, H200: "hopper"): `pallas`, for floating-point numbers that are summed in
  float32, but for groups of two or three channels. XLA stuffs the inputs of a transposed convolution with zeros and
  hands them to cuDNN in float32 with the channels moved: many times slower (`benchmarks/NOTES.md`).
- other GPUs, modules that are exported, and what `pallas` does not take: `matmul` for results where nothing overlaps
  (every effective kernel <= its stride), and everywhere where there are few filters; `phases` otherwise.
- TPU: `matmul` where nothing overlaps, one product and no work on zeros; `dilated` elsewhere, which its compiler hands
  to convolution hardware; integers and complex numbers go to `phases`.
- CPU, where XLA runs a dilated convolution as a scalar loop: one of the matrix lowerings, by the cost rule below. Both
  gradients are those of `phases` or `winograd`; `winograd` is in question where floating-point numbers are summed in
  float32 at the default precision. A strided convolution whose blocks would be short is `dilated`; so are planes and
  lines where few inputs meet nine taps or more, for which the platform has a product too.
- sizes that are not known when the operation is traced: `dilated`.

Without strides a CPU computes gradients, and results of two channels, from the side with fewer values (`steps`).

The cost rule, in nanoseconds fitted on two cores of an x86 server, counts multiply-adds and the values that pass
through the cache, ``MULTIPLY_ADD * multiply_adds + VALUE * values`` (`lowerings._work`): for `matmul` one product for
every input, tap and filter, dearer where many make up an output, and the kernel as it is read; for `phases` the
gathered shifts of the inputs, the kernel's matrices and the result, while it multiplies some zeros; for `winograd` the
transformed inputs, kernel and products, while it multiplies half to a third as often. Since it rounds more, it must
save a seventh. For planes and lines without strides `dilated` is in question too: the convolution of the platform.
Results with the filters second are transposed by `matmul`, value by value, but for planes and lines.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from conv3dt_jax import _candidates, _slabs
from conv3dt_jax._geometry import Geometry, turned
from conv3dt_jax.lowerings import LOWERINGS, _matmul_plans, _side_by_side, _triton, dilated
from conv3dt_jax.lowerings._tiles import plus, tile_bytes
from conv3dt_jax.lowerings._turn import turned_kernel
from conv3dt_jax.lowerings._work import GRADIENTS, Call, nanoseconds

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
"""Those of JAX."""

HOPPER = "hopper"
"""The platform "cuda" where the GPUs are of compute capability 9 and Pallas may be used."""

GPUS = ("cuda", HOPPER, "rocm", "gpu")

FEWER = 4
"""Times as many filters as channels from which gradients without strides are computed from the inputs' side."""

FEW_FILTERS = 4
"""Filters of a group up to which a GPU lays out the products of all taps."""

CONVOLVED = {"outputs": 1, "affine": 1, "tangent": 1, "inputs": 1, "kernel": 1.3, "gradients": 2.2}
"""What XLA's convolution takes for each, in the time of a result."""

LONG, PATCHED = 5, 1.5
"""Taps of a line from which on patches for its gradients take longer than the rule says, and how much."""

PLANE_CALL, PLANE_PRODUCT = 60_000, 0.05
"""Nanoseconds that `matmul` takes beyond the rule in a plane without strides: for a call, and for a product."""

WORTH = 0.85
"""The share of the others' time that `winograd` must stay below: it rounds more, and ties are not worth that."""

TRANSPOSED = 0.25
"""Nanoseconds for a value of the inputs or the outputs that is moved from or to the channels second."""

_EITHER_LAYOUT = ("phases", "winograd")
"""What reads and writes outputs with the filters second block by block; the others' outputs are transposed whole."""


def steps(kind: str, platform: str, form: Any) -> list[tuple[str, Any]]:
    """The primitives that stand for one, each with its form.

    Without strides the inputs and the outputs of the form may change places, as in `_geometry.turned`, and on a CPU
    "auto" gathers from the side where less is to be gathered. Gradients gather cotangents, ``filters`` values a tap;
    from the other side the one for the inputs is a result, and the kernel's gathers inputs, ``channels`` values a tap.
    A result of two channels is an adjoint, for which `_side_by_side` makes long runs. Neither is sent back: what is
    gathered from the other side has fewer filters than channels.
    """
    if platform != "cpu" or form.implementation != "auto" or kind == "tangent":
        return [(kind, form)]
    other = _from_the_outputs(form)
    if other is None:
        return [(kind, form)]
    if GRADIENTS[kind] and form.filters >= FEWER * form.channels:
        pairs = (("outputs", "inputs"), ("kernel", "kernel"))
        return [(step, other) for step, gradient in pairs if kind in (gradient, "gradients")]
    runs = _side_by_side.count(other.geometry, other.channels, other.filters, form.groups)
    if not GRADIENTS[kind] and form.channels > 1 and runs > 1:
        return [("inputs", other)]
    return [(kind, form)]


def _from_the_outputs(form: Any) -> Any:
    """The form with inputs and outputs exchanged, and the kernel turned around; None where there is none."""
    axes = [turned(axis) if isinstance(axis.out, int) else None for axis in form.geometry]
    if None in axes:
        return None
    sides: dict[str, Any] = {"channels": form.filters, "filters": form.channels, "dtypes": form.dtypes[::-1]}
    return dataclasses.replace(form, geometry=tuple(axes), **sides, origin=form.origin.turned(), channels_first=False)


def platform_of(name: str, exporting: bool = False) -> str:
    """The platform to choose for: `HOPPER` where it is one. Exported modules hold nothing that JAX may change."""
    return HOPPER if name in ("cuda", "gpu") and not exporting and _triton.is_hopper() else name


def choose(kind: str, platform: str, form: Any, batch: Any) -> str:
    """The lowering that "auto" means for a primitive on a platform; ``batch`` may be symbolic."""
    return decide(kind, platform, form, batch)[0]


def decide(kind: str, platform: str, form: Any, batch: Any) -> tuple[str, str]:
    """The lowering that "auto" means, and why."""
    geometry = form.geometry
    if not all(isinstance(axis.out, int) for axis in geometry):
        return "dilated", "the spatial sizes are not known when it is traced"
    overlaps = any(axis.overlaps for axis in geometry)
    if platform == HOPPER and _candidates.may_gather(form, batch):
        return "pallas", "gathered products: nothing is laid out, and no stuffed zeros"
    if platform in GPUS:
        return _of_a_gpu(kind, form, overlaps)
    if platform != "cpu":
        if not overlaps:
            return "matmul", "no outputs overlap: one product, no zeros"
        if jnp.issubdtype(form.sums, jnp.floating):
            return "dilated", "outputs overlap: the platform's convolution"
        return "phases", "outputs overlap, and the platform convolves floating-point numbers only"
    forward = not GRADIENTS[kind]
    call = Call.of(form, batch, room_for("cpu", form, batch))
    if kind == "inputs" and _candidates.has_short_products(form, call):
        return "dilated", "the products of its blocks would be short: the platform's convolution"
    plain = form.groups == 1 and not form.channels_first
    if forward and not overlaps and (plain or _matmul_plans.is_elementwise(call)):
        return "matmul", "no outputs overlap: one product, no zeros"
    names = [
        "phases",
        *(["matmul"] if forward else []),
        *(["winograd"] if _candidates.may_filter(form, call, GRADIENTS[kind]) else []),
        *(["dilated"] if _candidates.may_convolve(kind, form) else []),
    ]
    if names == ["phases"]:
        return "phases", "one gathering of patches" + (" serves both gradients" if kind == "gradients" else "")
    bfloat16 = all(dtype == jnp.bfloat16 for dtype in form.dtypes)
    costs = {name: cost(name, call, gradients=GRADIENTS[kind], bfloat16=bfloat16) for name in names}
    if "dilated" in costs:
        costs["dilated"] = CONVOLVED[kind] * cost("dilated", call, gradients=0)
        if GRADIENTS[kind] and dilated.is_line(form.geometry) and max(axis.k for axis in form.geometry) >= LONG:
            costs["phases"] *= PATCHED
        if not GRADIENTS[kind] and not dilated.is_line(form.geometry):
            costs["matmul"] += PLANE_CALL + PLANE_PRODUCT * _matmul_plans.products_of(call)
    if form.channels_first and "matmul" in costs and not _matmul_plans.by_planes(call):
        shapes = (form.inputs_shape(call.batch), form.outputs_shape(call.batch))
        costs["matmul"] += TRANSPOSED * sum(math.prod(shape) for shape in shapes)
    name = min(costs, key=lambda name: costs[name] / (WORTH if name == "winograd" else 1))
    if name == "matmul" and _candidates.is_short(form, call):
        return "dilated", "few products under nine taps or more: the platform's transposed convolution"
    return name, " against ".join(f"{name} {ns / 1e6:.2g} ms" for name, ns in costs.items()) + " by the cost rule"


def _of_a_gpu(kind: str, form: Any, overlaps: bool) -> tuple[str, str]:
    """Where `pallas` is not to be had. Never the platform's convolution: XLA stuffs it with zeros."""
    if form.filters // form.groups <= FEW_FILTERS:
        return "matmul", "few filters: one product for all taps"
    if not overlaps and not GRADIENTS[kind]:
        return "matmul", "no outputs overlap: one product, no zeros"
    return "phases", "one gathering of patches" + (" serves both gradients" if kind == "gradients" else "")


def cost(name: str, call: Call, *, gradients: int, bfloat16: bool = False) -> float:
    """Nanoseconds for the result, or one or both gradients, on a CPU, by the cost rule.

    Operands in bfloat16 are multiplied twice as fast, but for `winograd`, which transforms them in float32.
    """
    work = LOWERINGS[name].work(call, gradients=gradients)
    pace = 2 if bfloat16 and name != "winograd" else 1
    return nanoseconds(name, work.multiply_adds / pace, work.values)


def room_for(platform: str, form: Any, batch: Any) -> int:
    """Bytes of a block, see `_tiles.tile_bytes`."""
    return tile_bytes(platform, *_candidates.shapes(form, batch), itemsize=form.sums.itemsize)


def check_named(implementation: str, geometry: Geometry, sums: Any) -> None:
    """Raises the reason where the named lowering cannot take the geometry; it never falls back unseen."""
    reason = LOWERINGS[implementation].refusal(geometry, sums)
    if reason is not None:
        raise NotImplementedError(f"`implementation={implementation!r}` cannot run this: {reason}; use 'auto'.")


def run(kind: str, platform: str, form: Any, *operands: jax.Array) -> Any:
    """Computes one of the primitives of `_primitives` with the lowering named there, or that "auto" means."""
    if max(form.slabs) > 1:
        return _slabs.run(functools.partial(run, kind, platform), kind, form, operands)
    if (found := steps(kind, platform, form)) != [(kind, form)]:
        return _from_the_other_side(kind, platform, form, found, *operands)
    (x_dtype, w_dtype, y_dtype), sums = form.dtypes, form.sums
    x, w, y = by_role(kind, operands)
    batch = (x if y is None else y).shape[0]
    name = form.implementation if form.implementation != "auto" else choose(kind, platform, form, batch)
    lowering = LOWERINGS[name]
    room = room_for(platform, form, batch)
    static: dict[str, Any] = {
        "groups": form.groups, "precision": form.precision, "accumulate": sums, "tile_bytes": room
    }  # fmt: skip
    if name == "pallas":
        static["interpret"] = platform not in GPUS
    if name in ("matmul", "dilated") and y is None:
        static["origin"] = form.origin
    moved = form.channels_first and name not in _EITHER_LAYOUT and not (name == "matmul" and y is None)
    if form.channels_first and not moved:
        static["channels_first"] = True
    if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in (sums, *form.dtypes)):
        operands = tuple(operand.astype(sums) for operand in operands)  # the libraries mix no other kinds
        x, w, y = by_role(kind, operands)
    if y is None:
        if kind == "tangent":
            dx, dw = operands[:2]
            terms = [lowering.outputs(*pair, form.geometry, **static, result=sums) for pair in ((dx, w), (x, dw))]
            found = terms[0] + terms[1]
        else:
            bias = operands[2] if kind == "affine" else None
            found = lowering.outputs(x, w, form.geometry, **static, result=y_dtype, bias=bias)
        return (jnp.moveaxis(found, -1, 1) if moved else found).astype(y_dtype)
    y = jnp.moveaxis(y, 1, -1) if moved else y
    gradients = lowering.gradients(x, w, y, form.geometry, form.channels, **static, result=x_dtype)
    found = [g.astype(dtype) for g, dtype in zip(gradients, (x_dtype, w_dtype), strict=True) if g is not None]
    return found if kind == "gradients" else found[0]


def _from_the_other_side(
    kind: str, platform: str, form: Any, found: Sequence[tuple[str, Any]], *operands: jax.Array
) -> Any:
    x, w, y = by_role(kind, operands)
    if y is None:
        ((step, other),) = found
        if kind == "affine":  # rounded after the bias
            other = dataclasses.replace(other, dtypes=(form.sums, *other.dtypes[1:]))
        made = run(step, platform, other, turned_kernel(w, form.groups), x)
        made = plus(made, operands[2] if kind == "affine" else None).astype(form.dtypes[2])
        return jnp.moveaxis(made, -1, 1) if form.channels_first else made
    y = jnp.moveaxis(y, 1, -1) if form.channels_first else y
    results = []
    for step, other in found:
        if step == "outputs":
            results.append(run(step, platform, other, y, turned_kernel(w, form.groups)))
        else:
            results.append(turned_kernel(run(step, platform, other, y, x), form.groups))
    return results if kind == "gradients" else results[0]


def by_role(kind: str, operands: Sequence[Any]) -> tuple[Any, Any, Any]:
    """The inputs, the kernel and the outputs among the operands of a primitive."""
    if kind == "inputs":
        return None, operands[0], operands[1]
    if kind == "kernel":
        return operands[0], None, operands[1]
    if kind == "gradients":
        return operands[0], operands[1], operands[2]
    if kind == "tangent":
        return operands[2], operands[3], None
    return operands[0], operands[1], None
