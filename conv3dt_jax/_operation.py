"""Both operations, behind the functions and the layers: checks of the arrays, layout, direction, bias.

A transposed convolution and a convolution are two directions of one trilinear form (`_primitives`), and share all that
is below. Without strides the two are one operation with the kernel turned around, and it is computed as the outputs of
the form: they take the bias, and both of their gradients have one piece of code. With strides a convolution is the
form's inputs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from conv3dt_jax import _arrangement, _operands, _primitives
from conv3dt_jax import _batching as _batching  # registers the rules of jax.vmap
from conv3dt_jax._choice import check_named
from conv3dt_jax._convolution_spec import ConvolutionSpec
from conv3dt_jax._cut import Cut
from conv3dt_jax._geometry import Geometry, turned
from conv3dt_jax._placement import Placement
from conv3dt_jax._primitives import Form
from conv3dt_jax._slabs import WHOLE
from conv3dt_jax._spec import Conv3DTransposeSpec
from conv3dt_jax.lowerings._origin import AS_GIVEN, Origin
from conv3dt_jax.lowerings._tiles import plus
from conv3dt_jax.lowerings._turn import turned_kernel


@dataclasses.dataclass(frozen=True)
class Reading:
    """How the form gives an operation: as its ``outputs``, maybe with the kernel ``turned``, or as its inputs."""

    form: Form
    outputs: bool
    turned: bool

    @property
    def result(self) -> np.dtype:
        """The dtype of what results."""
        return self.form.dtypes[2 if self.outputs else 0]


def read(
    spec: ConvolutionSpec,
    geometry: Geometry,
    channels: int,
    operand: np.dtype,
    sums: np.dtype,
    result: np.dtype,
    slabs: tuple[int, int, int] = WHOLE,
    cut: Cut | None = None,
    *,
    origin: Origin = AS_GIVEN,
) -> Reading:
    """The reading of the form for an operation on operands of this dtype."""
    convolution = not isinstance(spec, Conv3DTransposeSpec)
    axes = [turned(axis) if convolution else axis for axis in geometry]
    outputs = None not in axes
    channels, filters = (channels, spec.filters) if outputs else (spec.filters, channels)
    form = Form(
        geometry=tuple(axes) if outputs else geometry,  # type: ignore[arg-type]
        channels=channels,
        filters=filters,
        groups=spec.groups,
        dtypes=(operand, operand, result) if outputs else (result, operand, operand),
        sums=sums,
        precision=spec.precision,
        implementation=spec.implementation,
        channels_first=outputs and spec.data_format == "channels_first",
        origin=origin.turned() if convolution and outputs else origin,
        slabs=slabs,
        cut=cut,
    )
    return Reading(form, outputs, convolution and outputs)


def run(
    inputs: ArrayLike,
    kernel: jax.Array,
    bias: ArrayLike | None,
    spec: ConvolutionSpec,
    output_size: Sequence[int] | None = None,
    *,
    keras_rules: bool = False,
    origin: Origin = AS_GIVEN,
    slabs: tuple[int, int, int] = WHOLE,
    placement: Placement | None = None,
) -> jax.Array:
    """The operation behind the functions and the layers: checks the arrays, then computes, in parts if it shall."""
    inputs = _operands.array("inputs", inputs)
    bias = None if bias is None else _operands.array("bias", bias)
    geometry = checked(inputs, kernel, bias, spec, output_size, keras_rules=keras_rules)
    sums, result = _operands.result_dtypes(spec, inputs, kernel)
    cut = None
    if placement is not None:
        batch, _, channels = spec.split_shape(inputs.shape)
        axes, _ = opened(geometry)
        cut = placement.cut(spec, batch, channels, read(spec, axes, channels, inputs.dtype, sums, result))
    return _compute(
        inputs,
        kernel,
        bias,
        spec=spec,
        geometry=geometry,
        sums=sums,
        result=result,
        origin=origin,
        slabs=slabs,
        cut=cut,
    )


def checked(
    inputs: Any,
    kernel: Any,
    bias: Any,
    spec: ConvolutionSpec,
    output_size: Sequence[int] | None = None,
    *,
    keras_rules: bool = False,
) -> Geometry:
    """The axes, for operands that fit each other and the spec; ``inputs`` has a shape and a dtype."""
    _, spatial, channels = spec.split_shape(inputs.shape)
    _operands.check_shapes(spec, channels, kernel.shape, bias)
    sums, result = _operands.result_dtypes(spec, inputs, kernel)
    if bias is not None:
        _operands.check_bias_dtype(bias, inputs.dtype, result)
    geometry = spec.geometry(spatial, output_size, keras_rules=keras_rules)
    _operands.check_size(geometry, inputs.shape, max(spec.filters, channels), sums)
    if spec.implementation != "auto":
        reading = read(spec, geometry, channels, inputs.dtype, sums, result)
        check_named(spec.implementation, reading.form.geometry, sums)
    return geometry


@functools.partial(jax.jit, static_argnames=("spec", "geometry", "sums", "result", "origin", "slabs", "cut"))
def _compute(
    inputs: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    *,
    spec: ConvolutionSpec,
    geometry: Geometry,
    sums: np.dtype,
    result: np.dtype,
    origin: Origin,
    slabs: tuple[int, int, int],
    cut: Cut | None,
) -> jax.Array:
    batch, _, channels = spec.split_shape(inputs.shape)
    shape = spec.join_shape(batch, spec.space(geometry), spec.filters)
    bias = None if bias is None else bias.astype(sums)
    if is_constant(batch, geometry):
        fill = jnp.zeros((spec.filters,), sums) if bias is None else bias
        filters_dim = len(shape) - (4 if spec.data_format == "channels_first" else 1)
        return lax.broadcast_in_dim(fill, shape, (filters_dim,)).astype(result)
    side = "x" if read(spec, geometry, channels, inputs.dtype, sums, result).outputs else "y"
    arranged = _arrangement.arranged(inputs, batch, spec.data_format == "channels_first", cut, side)
    geometry, around = opened(geometry, arranged.shards)
    reading = read(spec, geometry, channels, inputs.dtype, sums, result, slabs, cut, origin=origin)
    return arranged.restored(computed(arranged.around(around), kernel, bias, reading, spec), shape)


def is_constant(batch: Sequence[Any], geometry: Geometry) -> bool:
    """Whether the result is empty, or the bias alone."""
    return 0 in batch or any(axis.is_empty for axis in geometry)


def computed(
    inputs: jax.Array, kernel: jax.Array, bias: jax.Array | None, reading: Reading, spec: ConvolutionSpec
) -> jax.Array:
    """The operation on inputs with one axis of batch, as the form is read; the bias has the dtype of the sums."""
    form, channels_first = reading.form, spec.data_format == "channels_first"
    if channels_first:  # outputs, the larger ones as a rule, are written so by the lowerings; inputs are moved
        inputs = jnp.moveaxis(inputs, 1, -1)
    if not reading.outputs:
        if bias is not None:  # rounded once, after it
            form = dataclasses.replace(form, dtypes=(form.sums, *form.dtypes[1:]))
        found = _primitives.inputs(kernel, inputs, form)
        found = found if bias is None else plus(found, _primitives.beside(bias, found))
        found = found if form.cut is None else form.cut.placed(found, "x", form)
        return (jnp.moveaxis(found, -1, 1) if channels_first else found).astype(reading.result)
    if reading.turned:
        kernel = turned_kernel(kernel, form.groups)
    if bias is None:
        found = _primitives.outputs(inputs, kernel, form)
    else:
        found = _primitives.affine(inputs, kernel, bias, form)
    return found if form.cut is None else form.cut.placed(found, "y", form)


def opened(geometry: Geometry, shards: tuple[int, int, int] = (1, 1, 1)) -> tuple[Geometry, _arrangement.Pairs]:
    """Circular convolutions whose stride does not divide the inputs, as others of more inputs.

    Returns the axes, and how much of the other end stands before and behind the inputs; behind them stands as much more
    as it takes that ``shards`` divide them. On the other circular axes whole strides wrap around, and the lowerings see
    to them.
    """
    axes, around = list(geometry), [(0, 0)] * 3
    for i, axis in enumerate(geometry):
        if axis.wraps and axis.n * axis.s != axis.out:
            around[i] = (axis.lo, max(axis.full - axis.lo - axis.out, 0))
            size = axis.out + sum(around[i])
            size += -size % shards[i] if shards[i] > 1 else 0
            axes[i] = dataclasses.replace(axis, lo=0, out=size, wraps=False)
    return (axes[0], axes[1], axes[2]), tuple(around)
