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
from jax.sharding import NamedSharding, PartitionSpec

from conv3dt_jax import _choice, _partition, _shards
from conv3dt_jax._cut import ROLES, Cut, agreed, is_explicit
from conv3dt_jax._geometry import Geometry
from conv3dt_jax._slabs import WHOLE
from conv3dt_jax.lowerings import _triton
from conv3dt_jax.lowerings._origin import AS_GIVEN, Origin

Shape = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Form:
    """What the three directions have in common; static and hashable.

    ``dtypes`` are those of the inputs, the kernel and the outputs, ``sums`` that of the sums before they are rounded to
    the outputs'. Channels and filters count all groups. ``channels_first`` is about the outputs. ``origin`` says
    what the kernel was made from. Each axis is computed in as many ``slabs``, one after the other. ``cut`` says over
    which devices operands and results lie, where that is not left to the compiler.
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
    origin: Origin = AS_GIVEN
    slabs: tuple[int, int, int] = WHOLE
    cut: Cut | None = None

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
        cut = None if self.cut is None else self.cut.regrouped()
        return dataclasses.replace(form, groups=self.groups * times, cut=cut)


def outputs(x: jax.Array, w: jax.Array, form: Form) -> jax.Array:
    """``y[i * s + t * d - lo, f] += sum_c x[i, c] w[t, f, c]``."""
    operands, form = _placed("outputs", form, x, w)
    return outputs_p.bind(*operands, form=form)


def affine(x: jax.Array, w: jax.Array, b: jax.Array, form: Form) -> jax.Array:
    """``outputs(x, w) + b``, rounded once; ``b`` has the dtype of the sums. Saves a pass over the result."""
    operands, form = _placed("affine", form, x, w, b)
    return affine_p.bind(*operands, form=form)


def inputs(w: jax.Array, y: jax.Array, form: Form) -> jax.Array:
    """``x[i, c] = sum_{t, f} w[t, f, c] y[i * s + t * d - lo, f]``."""
    operands, form = _placed("inputs", form, w, y)
    return inputs_p.bind(*operands, form=form)


def kernel(x: jax.Array, y: jax.Array, form: Form) -> jax.Array:
    """``w[t, f, c] = sum_i x[i, c] y[i * s + t * d - lo, f]``."""
    operands, form = _placed("kernel", form, x, y)
    return kernel_p.bind(*operands, form=form)


def tangent(dx: jax.Array, dw: jax.Array, x: jax.Array, w: jax.Array, form: Form) -> jax.Array:
    """``outputs(dx, w) + outputs(x, dw)``."""
    operands, form = _placed("tangent", form, dx, dw, x, w)
    return tangent_p.bind(*operands, form=form)


def gradients(x: jax.Array, w: jax.Array, y: jax.Array, form: Form) -> list[jax.Array]:
    """``[inputs(w, y), kernel(x, y)]``."""
    operands, form = _placed("gradients", form, x, w, y)
    return gradients_p.bind(*operands, form=form)


def _placed(kind: str, form: Form, *operands: jax.Array) -> tuple[Sequence[jax.Array], Form]:
    """The operands where the form wants them on a mesh; where their types say how they are cut, the form too."""
    roles, _ = ROLES[kind]
    mesh = _explicit_mesh(operands)
    if form.cut is None and mesh is not None:
        specs: dict[str, PartitionSpec] = {}
        for role, operand in zip(roles, operands, strict=True):
            specs.setdefault(role, jax.typeof(operand).sharding.spec)
        form = dataclasses.replace(form, cut=agreed(kind, form, mesh, specs))
    if form.cut is not None:
        operands = tuple(form.cut.placed(operand, role, form) for role, operand in zip(roles, operands, strict=True))
    return _equally_varying(*operands), form


def beside(vector: jax.Array, array: jax.Array) -> jax.Array:
    """What shall be added to an array: whole, where types say how the array is cut, for then JAX cuts it alike."""
    if (mesh := _explicit_mesh([array])) is None:
        return vector
    return jax.sharding.reshard(vector, NamedSharding(mesh, PartitionSpec()))


def _explicit_mesh(operands: Sequence[jax.Array]) -> Any:
    """The mesh of operands whose types say how they are cut; None where it is left to the compiler."""
    meshes = [jax.typeof(operand).sharding.mesh for operand in operands]
    return next((mesh for mesh in meshes if is_explicit(mesh)), None)


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

    _, made = ROLES[name]

    def abstract(*avals: Any, form: Form) -> Any:
        results = []
        for role, (shape, dtype) in zip(made, result(form, *avals), strict=True):
            typed: dict[str, Any] = {"shape": shape, "dtype": dtype, "weak_type": False}
            if form.cut is not None and form.cut.is_explicit:
                typed["sharding"] = form.cut.typed(role, form, shape)
            results.append(avals[0].update(**typed))
        return results if multiple else results[0]

    primitive.def_abstract_eval(abstract)
    primitive.def_impl(
        lambda *operands, form: _run(form)(name, _choice.platform_of(jax.default_backend()), form, *operands)
    )
    mlir.register_lowering(primitive, _lowering(name, "default", multiple))
    _partition.tell_devices(primitive)
    for platform in _choice.PLATFORMS:
        mlir.register_lowering(primitive, _lowering(name, platform, multiple), platform=platform)
    return primitive


def _lowering(name: str, platform: str, multiple: bool) -> Any:
    """Lowers by tracing: for one device, for the partitioner, or for the shards of a form that is cut."""

    def rule(compute: Callable[..., Any], own: str) -> Any:
        def run(*operands: jax.Array, form: Form) -> Any:
            return compute(name, own, form, *operands)

        return mlir.lower_fun(run, multiple_results=multiple)

    def lower(ctx: Any, *operands: Any, form: Form) -> Any:
        if form.cut is None:  # in terms of one device, whatever mesh axes the operands vary over
            avals = [jax.core.ShapedArray(aval.shape, aval.dtype) for aval in ctx.avals_in]
            ctx = ctx.replace(avals_in=avals)
        compute = _partition.partitioned if form.cut is None and _partition.is_asked(ctx) else _run(form)
        exporting = ctx.module_context.lowering_parameters.for_export
        with _triton.without_notice():
            return rule(compute, _choice.platform_of(platform, exporting))(ctx, *operands, form=form)

    return lower


def _run(form: Form) -> Callable[..., Any]:
    return _choice.run if form.cut is None else _shards.run


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
        cut = jax.typeof(y).sharding if _explicit_mesh([y]) is not None else None
        shift = lax.broadcast_in_dim(db, y.shape, (form.filters_dim,), out_sharding=cut)
        shift, _ = _equally_varying(shift.astype(y.dtype), y)
        moved = ad.add_tangents(moved, shift)
    return y, moved


def _affine_transpose(ct: Any, x: Any, w: Any, b: Any, *, form: Form) -> list[Any]:
    """Linear in the bias, alone or with one of the others, for `jax.linear_transpose`."""
    found: list[Any] = [None] * 3
    if _is_zero(ct):
        return found
    if ad.is_undefined_primal(x):
        found[0] = inputs(w, ct, form)
    if ad.is_undefined_primal(w):
        found[1] = kernel(x, ct, form)
    if ad.is_undefined_primal(b):
        found[2] = ct.astype(b.aval.dtype).sum([dim for dim in range(ct.ndim) if dim != form.filters_dim])
    return found


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
ad.primitive_transposes[affine_p] = _affine_transpose
ad.primitive_jvps[tangent_p] = _tangent_jvp
ad.primitive_transposes[tangent_p] = _tangent_transpose
ad.primitive_jvps[gradients_p] = _gradients_jvp
ad.primitive_transposes[gradients_p] = _gradients_transpose
