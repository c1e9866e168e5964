"""Both operations slab by slab, with little memory beside operands and result."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from conv3dt_jax import _arguments as args
from conv3dt_jax import _operands, _slab_sizes, _streaming
from conv3dt_jax._convolution_spec import ConvolutionSpec, check_spec
from conv3dt_jax._geometry import Geometry
from conv3dt_jax._operation import checked, is_constant, opened, read, run
from conv3dt_jax._spec import Conv3DSpec, Conv3DTransposeSpec
from conv3dt_jax.functional import Implementation


def tiled(
    inputs: Any,
    kernel: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    strides: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] | Sequence[Sequence[int]] = "valid",
    output_padding: int | Sequence[int] | None = None,
    dilation_rate: int | Sequence[int] = 1,
    groups: int = 1,
    data_format: str = "channels_last",
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    output_size: Sequence[int] | None = None,
    implementation: Implementation = "auto",
    spec: Conv3DTransposeSpec | Conv3DSpec | None = None,
    slabs: int | Sequence[int] | None = None,
    memory_limit: int | str | None = None,
    out: Any = None,
    dtype: DTypeLike | None = None,
    progress: bool = True,
) -> Any:
    """`conv3d_transpose`, or `conv3d`, slab by slab: the same result with little memory, for volumes of any size.

    The result is cut into slabs along the spatial axes, and each is computed from the inputs that reach it, its halo
    included. There are two forms:

    - on the device, inside `jax.jit` or not: one program with a loop over the slabs. Operands and result are arrays as
      in `conv3d_transpose`, and only temporaries get smaller. Derivatives of all orders go slab by slab too: the
      gradient for the inputs in slabs of the inputs, the one for the kernel as a sum over them.
    - from and to the host, where ``out`` is given: slabs are read from ``inputs``, computed, and written to ``out``,
      and neither is ever in memory as a whole. Both are whatever takes slices as a NumPy array does: memory maps, zarr
      and HDF5 arrays, TensorStore's, the ``dataobj`` of a NIfTI image (to read from). The next slab is read while one
      is computed.

    Slabs have one shape; the last along an axis begins earlier where it would stick out. The result is that of the
    whole to rounding, and on a CPU its very bits as a rule where the lowering "phases" runs in both.

    Args:
      inputs: ``(..., D, H, W, C)``, or ``(..., C, D, H, W)`` with "channels_first". With ``out``, one channel may go
        without an axis: ``(D, H, W)``.
      kernel: as in `conv3d_transpose`, or in `conv3d` where ``spec`` is a `Conv3DSpec`.
      bias: ``(F,)`` or None.
      strides: and all up to ``implementation``: as in `conv3d_transpose`.
      spec: the operation, in place of these arguments.
      slabs: how many along depth, height and width, at most; one integer is for the depth.
      memory_limit: in place of ``slabs``, bytes, or a string such as "500MB" or "2GiB" (the default). What may be held
        at a time beside operands and result (beside ``inputs`` and ``out`` on the host), of temporaries and slabs, by
        the result or by both gradients: an estimate, that of `explain` for temporaries, and a quarter more. The fewest
        slabs that stay below it are taken, of the depth first. On the device, inputs with the channels first are
        copied whole, and so are those of a circular convolution whose stride does not divide them.
      out: what the result is written to, of its shape and of a dtype that holds its values; one filter may go without
        an axis, ``(D', H', W')``.
      dtype: with ``out``, what is read is cast to this; None leaves it, as JAX takes NumPy arrays.
      progress: with ``out``, whether a bar is shown on standard error.

    Returns:
      The result; with ``out``, that.

    Raises:
      TypeError, ValueError: as `conv3d_transpose` does; a limit that cannot be met, which says the smallest that can;
        both ``slabs`` and ``memory_limit``; an ``out`` that does not fit.

    Example:
      >>> import jax, numpy as np
      >>> import conv3dt_jax as c3t
      >>> x, w = np.ones((1, 16, 8, 8, 2), np.float32), np.ones((3, 3, 3, 4, 2), np.float32)
      >>> y = c3t.tiled(x, w, strides=2, padding="same", slabs=4)
      >>> bool((y == c3t.conv3d_transpose(x, w, strides=2, padding="same")).all())
      True
      >>> import pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp(), "outputs.npy")
      >>> out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=y.shape)
      >>> out = c3t.tiled(x, w, strides=2, padding="same", memory_limit="1MB", out=out, progress=False)
      >>> bool((out == y).all())
      True
    """
    convolution = isinstance(spec, Conv3DSpec)
    kernel = _operands.kernel(kernel, (Conv3DSpec if convolution else Conv3DTransposeSpec).kernel_layout)
    bias = None if bias is None else _operands.array("bias", bias)
    given: dict[str, Any] = {
        "strides": strides, "padding": padding, "output_padding": output_padding, "dilation_rate": dilation_rate,
        "groups": groups, "data_format": data_format, "precision": precision,
        "preferred_element_type": preferred_element_type, "implementation": implementation,
    }  # fmt: skip
    described = _spec_of(spec, kernel, bias, given)
    if out is None:
        if dtype is not None:
            raise ValueError(f"{args.received('dtype', dtype)} is for `out`; cast the inputs instead.")
        inputs = _operands.array("inputs", inputs)
        geometry = checked(inputs, kernel, bias, described, output_size)
        counts = _counts(inputs, kernel, described, geometry, slabs, memory_limit)
        return run(inputs, kernel, bias, described, output_size, slabs=counts)
    volume = _streaming.Source(inputs, described, described.channels_of(kernel.shape), dtype)
    geometry = checked(volume, kernel, bias, described, output_size)
    args.boolean("progress", progress)
    return _streaming.stream(
        volume, kernel, bias, described, geometry, out, slabs=slabs, memory_limit=memory_limit, progress=progress
    )


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Conv3DTransposeSpec)}


def _spec_of(spec: Any, kernel: jax.Array, bias: Any, given: dict[str, Any]) -> ConvolutionSpec:
    """The operation, from its arguments or as it is given."""
    if spec is None:
        filters = kernel.shape[3] * args.integer("groups", given["groups"], minimum=1)
        return Conv3DTransposeSpec(filters, kernel.shape[:3], use_bias=bias is not None, **given)
    check_spec(spec)
    for name, value in given.items():
        if value is not _DEFAULTS[name] and not (type(value) is type(_DEFAULTS[name]) and value == _DEFAULTS[name]):
            raise ValueError(f"{args.received(name, value)} is part of `spec` where that is given; set it there.")
    _operands.check_bias_given(spec, bias)
    return spec


def _counts(
    inputs: jax.Array, kernel: jax.Array, spec: ConvolutionSpec, geometry: Geometry, slabs: Any, limit: Any
) -> tuple[int, int, int]:
    sizes = (*inputs.shape, *(axis.n for axis in geometry))
    if not all(isinstance(size, int) for size in sizes):
        raise ValueError(f"`inputs` have symbolic sizes, {inputs.shape}; slabs need to know them.")
    batch, _, channels = spec.split_shape(inputs.shape)
    axes, around = opened(geometry)
    reading = read(spec, axes, channels, inputs.dtype, *_operands.result_dtypes(spec, inputs, kernel))
    # Whole inputs and their gradient, moved or with their other end around them.
    copies = 2 * (spec.data_format == "channels_first") + 2 * any(pair != (0, 0) for pair in around)
    more = copies * math.prod(inputs.shape) * jnp.dtype(inputs.dtype).itemsize
    samples = 0 if is_constant(batch, geometry) else math.prod(batch)
    return _slab_sizes.choose(slabs, limit, spec.space(geometry), reading, samples, more=more)
