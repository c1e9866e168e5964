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

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from conv3dt_jax import _batching as _batching  # registers the rules of jax.vmap
from conv3dt_jax import _operands, _primitives
from conv3dt_jax._choice import check_named
from conv3dt_jax._convolution_spec import ConvolutionSpec
from conv3dt_jax._geometry import Geometry, turned
from conv3dt_jax._primitives import Form
from conv3dt_jax._spec import Conv3DTransposeSpec
from conv3dt_jax.lowerings._tiles import plus, wrapped
from conv3dt_jax.lowerings._turn import turned_kernel


@dataclasses.dataclass(frozen=True)
class Reading:
    """How the form gives an operation: as its ``outputs``, maybe with the kernel ``turned``, or as its inputs."""

    form: Form
    outputs: bool
    turned: bool


def read(
    spec: ConvolutionSpec, geometry: Geometry, channels: int, operand: np.dtype, sums: np.dtype, result: np.dtype
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
) -> jax.Array:
    """The operation behind the functions and the layers: checks the arrays, then computes."""
    inputs = _operands.array("inputs", inputs)
    bias = None if bias is None else _operands.array("bias", bias)
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
    return _compute(inputs, kernel, bias, spec=spec, geometry=geometry, sums=sums, result=result)


@functools.partial(jax.jit, static_argnames=("spec", "geometry", "sums", "result"))
def _compute(
    inputs: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    *,
    spec: ConvolutionSpec,
    geometry: Geometry,
    sums: np.dtype,
    result: np.dtype,
) -> jax.Array:
    batch, _, channels = spec.split_shape(inputs.shape)
    channels_first = spec.data_format == "channels_first"
    shape = spec.join_shape(batch, spec.space(geometry), spec.filters)
    bias = None if bias is None else bias.astype(sums)
    if 0 in batch or any(axis.is_empty for axis in geometry):
        fill = jnp.zeros((spec.filters,), sums) if bias is None else bias
        filters_dim = len(shape) - (4 if channels_first else 1)
        return lax.broadcast_in_dim(fill, shape, (filters_dim,)).astype(result)
    inputs = inputs.reshape(-1 if len(batch) != 1 else batch[0], *inputs.shape[len(batch) :])
    inputs, geometry = _around(inputs, geometry, first=2 if channels_first else 1)
    reading = read(spec, geometry, channels, inputs.dtype, sums, result)
    form = reading.form
    if channels_first:  # outputs, the larger ones as a rule, are written so by the lowerings; inputs are moved
        inputs = jnp.moveaxis(inputs, 1, -1)
    if not reading.outputs:
        if bias is not None:  # rounded once, after it
            form = dataclasses.replace(form, dtypes=(sums, *form.dtypes[1:]))
        found = plus(_primitives.inputs(kernel, inputs, form), bias)
        return (jnp.moveaxis(found, -1, 1) if channels_first else found).reshape(shape).astype(result)
    if reading.turned:
        kernel = turned_kernel(kernel, spec.groups)
    if bias is None:
        return _primitives.outputs(inputs, kernel, form).reshape(shape)
    return _primitives.affine(inputs, kernel, bias, form).reshape(shape)


def _around(inputs: jax.Array, geometry: Geometry, first: int) -> tuple[jax.Array, Geometry]:
    """Circular convolutions whose stride does not divide the inputs, with the other end copied to either side.

    On the other circular axes whole strides wrap around, and the lowerings see to them.
    """
    axes = list(geometry)
    for i, axis in enumerate(geometry):
        if axis.wraps and axis.n * axis.s != axis.out:
            inputs = wrapped(inputs, first + i, axis.lo, max(axis.full - axis.lo - axis.out, 0))
            axes[i] = dataclasses.replace(axis, lo=0, out=inputs.shape[first + i], wraps=False)
    return inputs, (axes[0], axes[1], axes[2])
