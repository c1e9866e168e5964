"""The operation as JAX primitives: one trilinear form, read in three directions, closed under differentiation.

    T(x, w, y) = sum_{i, t, c, f} x[i, c] w[t, f, c] y[i * s + t * d - lo, f]

    outputs(x, w) = dT/dy,      the transposed convolution,
    inputs(w, y)  = dT/dx,      its adjoint in x: the convolution with stride s,
    kernel(x, y)  = dT/dw,      its adjoint in w.

Each is bilinear, its derivative is itself with one operand exchanged, and its transpose is one of the other two; so
forward mode, reverse mode and every higher order run on the same three pieces of code, each as fast as it was written.
Reverse mode wants both adjoints for one y, and they share most of their work: the pair is a primitive of its own
(`gradients`), and so is the derivative that it transposes (`tangent`), and the outputs with a bias (`affine`).

Arrays have the lowerings' layout: ``(N, D, H, W, C)``, ``(kd, kh, kw, F / G, C)`` and ``(N, *out, F)``; the last, which
is the largest as a rule, may be ``(N, F, *out)``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir

from conv3dt_jax import _choice, _partition
from conv3dt_jax._geometry import Geometry
from conv3dt_jax._slabs import WHOLE

Shape = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Form:
    """What the three directions have in common; static and hashable.

    ``dtypes`` are those of the inputs, the kernel and the outputs, ``sums`` that of the sums before they are rounded to
    the outputs'. Channels and filters count all groups. ``channels_first`` is about the outputs. Each axis is computed
    in as many ``slabs``, one after the other.
    """

    geometry: Geometry
    channels: int
    filters: int
    groups: int
    dtypes: tuple[np.dtype, np.dtype, np.dtype]
    sums: np.dtype
    precision: lax.PrecisionLike
    implementation: str
    channels_first: bool = False
    slabs: tuple[int, int, int] = WHOLE

    def inputs_shape(self, batch: Any) -> Shape:
        return (batch, *(axis.n for axis in self.geometry), self.channels)

    def outputs_shape(self, batch: Any) -> Shape:
        space = tuple(axis.out for axis in self.geometry)
        return (batch, self.filters, *space) if self.channels_first else (batch, *space, self.filters)

    @property
    def filters_dim(self) -> int:
        """The axis of the filters in the outputs."""
        return 1 if self.channels_first else 4

    def kernel_shape(self) -> Shape:
        return (*(axis.k for axis in self.geometry), self.filters // self.groups, self.channels)

    def with_channels(self, times: int) -> Form:
        return dataclasses.replace(self, channels=self.channels * times)

    def with_filters(self, times: int) -> Form:
        return dataclasses.replace(self, filters=self.filters * times)

    def with_groups(self, times: int) -> Form:
        form = self.with_channels(times).with_filters(times)
        return dataclasses.replace(form, groups=self.groups * times)


def outputs(x: jax.Array, w: jax.Array, form: Form) -> jax.Array:
    """``y[i * s + t * d - lo, f] += sum_c x[i, c] w[t, f, c]``."""
    if any(_is_explicitly_sharded(operand) for operand in (x, w)):  # the types of results are then JAX's to find
        return _choice.run("outputs", "default", form, x, w)
    return outputs_p.bind(*_equally_varying(x, w), form=form)


def affine(x: jax.Array, w: jax.Array, b: jax.Array, form: Form) -> jax.Array:
    """``outputs(x, w) + b``, rounded once; ``b`` has the dtype of the sums. Saves a pass over the result."""
    if any(_is_explicitly_sharded(operand) for operand in (x, w, b)):
        return _choice.run("affine", "default", form, x, w, b)
    return affine_p.bind(*_equally_varying(x, w, b), form=form)


def inputs(w: jax.Array, y: jax.Array, form: Form) -> jax.Array:
    """``x[i, c] = sum_{t, f} w[t, f, c] y[i * s + t * d - lo, f]``."""
    if any(_is_explicitly_sharded(operand) for operand in (w, y)):
        return _choice.run("inputs", "default", form, w, y)
    return inputs_p.bind(*_equally_varying(w, y), form=form)


def kernel(x: jax.Array, y: jax.Array, form: Form) -> jax.Array:
    """``w[t, f, c] = sum_i x[i, c] y[i * s + t * d - lo, f]``."""
    return kernel_p.bind(*_equally_varying(x, y), form=form)


def tangent(dx: jax.Array, dw: jax.Array, x: jax.Array, w: jax.Array, form: Form) -> jax.Array:
    """``outputs(dx, w) + outputs(x, dw)``."""
    return tangent_p.bind(*_equally_varying(dx, dw, x, w), form=form)


def gradients(x: jax.Array, w: jax.Array, y: jax.Array, form: Form) -> list[jax.Array]:
    """``[inputs(w, y), kernel(x, y)]``."""
    return gradients_p.bind(*_equally_varying(x, w, y), form=form)


def _is_explicitly_sharded(x: jax.Array) -> bool:
    return jax.sharding.AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


def _equally_varying(*operands: jax.Array) -> Sequence[jax.Array]:
    """Under `jax.shard_map`, marks all operands as varying over the mesh axes that any of them varies over."""
    varying = [jax.typeof(operand).manual_axis_type.varying for operand in operands]
    union = frozenset().union(*varying)
    return [
        lax.pcast(operand, tuple(sorted(union - mine)), to="varying") if union - mine else operand
        for operand, mine in zip(operands, varying, strict=True)
    ]  # fmt: skip


# What each primitive is: its shape and dtype, its value, its lowering on every platform.


def _define(name: str, result: Callable[..., Any], multiple: bool = False) -> Primitive:
    primitive = Primitive(f"conv3d_transpose_{name}" if name != "outputs" else "conv3d_transpose")
    primitive.multiple_results = multiple

    def abstract(*avals: Any, form: Form) -> Any:
        results = [
            avals[0].update(shape=shape, dtype=dtype, weak_type=False) for shape, dtype in result(form, *avals)
        ]  # fmt: skip
        return results if multiple else results[0]

    primitive.def_abstract_eval(abstract)
    primitive.def_impl(lambda *operands, form: _choice.run(name, jax.default_backend(), form, *operands))
    mlir.register_lowering(primitive, _lowering(name, "default", multiple))
    _partition.tell_devices(primitive)
    for platform in _choice.PLATFORMS:
        mlir.register_lowering(primitive, _lowering(name, platform, multiple), platform=platform)
    return primitive


def _lowering(name: str, platform: str, multiple: bool) -> Any:
    """Lowers by tracing; in terms of one device, whatever mesh axes the operands vary over, or for the partitioner."""

    def rule(compute: Callable[..., Any]) -> Any:
        def run(*operands: jax.Array, form: Form) -> Any:
            return compute(name, platform, form, *operands)

        return mlir.lower_fun(run, multiple_results=multiple)

    alone, together = rule(_choice.run), rule(_partition.partitioned)

    def lower(ctx: Any, *operands: Any, **params: Any) -> Any:
        avals = [jax.core.ShapedArray(aval.shape, aval.dtype) for aval in ctx.avals_in]
        found = together if _partition.is_asked(ctx) else alone
        return found(ctx.replace(avals_in=avals), *operands, **params)

    return lower


outputs_p = _define("outputs", lambda form, x, w: [(form.outputs_shape(x.shape[0]), form.dtypes[2])])
affine_p = _define("affine", lambda form, x, w, b: [(form.outputs_shape(x.shape[0]), form.dtypes[2])])
inputs_p = _define("inputs", lambda form, w, y: [(form.inputs_shape(y.shape[0]), form.dtypes[0])])
kernel_p = _define("kernel", lambda form, x, y: [(form.kernel_shape(), form.dtypes[1])])
tangent_p = _define("tangent", lambda form, dx, dw, x, w: [(form.outputs_shape(x.shape[0]), form.dtypes[2])])
gradients_p = _define(
    "gradients",
    lambda form, x, w, y: [(form.inputs_shape(y.shape[0]), form.dtypes[0]), (form.kernel_shape(), form.dtypes[1])],
    multiple=True,
)


# Derivatives.


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, ad.Zero)


def _sum(terms: Sequence[Any]) -> Any:
    return functools.reduce(ad.add_tangents, terms)


def _outputs_tangent(dx: Any, dw: Any, x: jax.Array, w: jax.Array, form: Form) -> Any:
    """The derivative of `outputs`, as one primitive where both operands move: its transpose gives both gradients."""
    if _is_zero(dx) and _is_zero(dw):
        return ad.Zero(jax.typeof(outputs(x, w, form)).to_tangent_aval())
    if _is_zero(dw):
        return outputs(dx, w, form)
    if _is_zero(dx):
        return outputs(x, dw, form)
    return tangent(dx, dw, x, w, form)


def _outputs_jvp(primals: Any, tangents: Any, *, form: Form) -> Any:
    (x, w), (dx, dw) = primals, tangents
    return outputs(x, w, form), _outputs_tangent(dx, dw, x, w, form)


def _affine_jvp(primals: Any, tangents: Any, *, form: Form) -> Any:
    """Not bilinear, but its derivative is made of what is."""
    (x, w, b), (dx, dw, db) = primals, tangents
    y = affine(x, w, b, form)
    moved = _outputs_tangent(dx, dw, x, w, form)
    if not _is_zero(db):
        # Widened before it is rounded, so that its transpose sums the cotangents in the dtype of the sums.
        shift, _ = _equally_varying(lax.broadcast_in_dim(db, y.shape, (form.filters_dim,)).astype(y.dtype), y)
        moved = ad.add_tangents(moved, shift)
    return y, moved


def _tangent_jvp(primals: Any, tangents: Any, *, form: Form) -> Any:
    dx, dw, x, w = primals
    ddx, ddw, x_dot, w_dot = tangents
    terms = [_outputs_tangent(ddx, ddw, x, w, form)]
    terms += [] if _is_zero(x_dot) else [outputs(x_dot, dw, form)]
    terms += [] if _is_zero(w_dot) else [outputs(dx, w_dot, form)]
    return tangent(dx, dw, x, w, form), _sum(terms)


def _gradients_jvp(primals: Any, tangents: Any, *, form: Form) -> Any:
    x, w, y = primals
    x_dot, w_dot, y_dot = tangents
    result = gradients(x, w, y, form)
    moved: list[Any]
    if _is_zero(y_dot):
        moved = [ad.Zero(jax.typeof(value).to_tangent_aval()) for value in result]
    else:
        moved = gradients(x, w, y_dot, form)
    dx, dw = moved
    dx = dx if _is_zero(w_dot) else ad.add_tangents(dx, inputs(w_dot, y, form))
    dw = dw if _is_zero(x_dot) else ad.add_tangents(dw, kernel(x_dot, y, form))
    return result, [dx, dw]


def _tangent_transpose(ct: Any, dx: Any, dw: Any, x: Any, w: Any, *, form: Form) -> list[Any]:
    if _is_zero(ct):
        return [None] * 4
    if ad.is_undefined_primal(dx) and ad.is_undefined_primal(dw):
        return [*gradients(x, w, ct, form), None, None]
    if ad.is_undefined_primal(dx):
        return [inputs(w, ct, form), None, None, None]
    return [None, kernel(x, ct, form), None, None]


def _gradients_transpose(cts: Any, x: Any, w: Any, y: Any, *, form: Form) -> list[Any]:
    """`gradients` is linear in y; its transpose is `tangent`."""
    dx, dw = cts
    if _is_zero(dx) and _is_zero(dw):
        return [None] * 3
    return [None, None, _outputs_tangent(dx, dw, x, w, form)]


ad.defbilinear(outputs_p, lambda ct, x, w, *, form: inputs(w, ct, form), lambda ct, x, w, *, form: kernel(x, ct, form))
ad.primitive_jvps[outputs_p] = _outputs_jvp
ad.defbilinear(inputs_p, lambda ct, w, y, *, form: kernel(ct, y, form), lambda ct, w, y, *, form: outputs(ct, w, form))
ad.defbilinear(kernel_p, lambda ct, x, y, *, form: inputs(ct, y, form), lambda ct, x, y, *, form: outputs(x, ct, form))
ad.primitive_jvps[affine_p] = _affine_jvp
ad.primitive_jvps[tangent_p] = _tangent_jvp
ad.primitive_transposes[tangent_p] = _tangent_transpose
ad.primitive_jvps[gradients_p] = _gradients_jvp
ad.primitive_transposes[gradients_p] = _gradients_transpose
