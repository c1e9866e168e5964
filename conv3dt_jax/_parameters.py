"""Parameters apart from compute, for who uses no layer library: made for a specification, and applied by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from conv3dt_jax import _arguments as args
from conv3dt_jax import _operands, initializers
from conv3dt_jax._convolution_spec import ConvolutionSpec, check_spec
from conv3dt_jax._operation import run
from conv3dt_jax._spec import Conv3DSpec, Conv3DTransposeSpec


def init(
    key: jax.Array,
    spec: Conv3DTransposeSpec | Conv3DSpec,
    in_channels: int,
    *,
    dtype: DTypeLike = jnp.float32,
    kernel_initializer: Any = "glorot_uniform",
    bias_initializer: Any = "zeros",
) -> dict[str, jax.Array]:
    """New parameters for ``spec``: a plain dict, the pytree that `apply` takes.

    Args:
      key: a `jax.random` key.
      spec: the operation, a `Conv3DTransposeSpec` or a `Conv3DSpec`.
      in_channels: channels C of the inputs.
      dtype: dtype of the parameters.
      kernel_initializer: a Keras name, "trilinear", "icnr", a config dict, or a callable ``(key, shape, dtype)``.
      bias_initializer: likewise.

    Returns:
      ``{"kernel": (kd, kh, kw, F // G, C), "bias": (F,)}``, or ``(kd, kh, kw, C // G, F)`` for a `Conv3DSpec`; no
      "bias" where ``spec.use_bias`` is False.

    Example:
      >>> import jax
      >>> import conv3dt_jax as c3t
      >>> spec = c3t.Conv3DTransposeSpec(filters=8, kernel_size=2, strides=2)
      >>> params = c3t.init(jax.random.key(0), spec, in_channels=3)
      >>> {name: value.shape for name, value in params.items()}
      {'bias': (8,), 'kernel': (2, 2, 2, 8, 3)}
    """
    check_spec(spec)
    dtype = args.inexact_dtype("dtype", dtype)
    kernel_key, bias_key = jax.random.split(key)
    make_kernel = initializer_of_kernel(kernel_initializer, spec)
    params = {"kernel": make_kernel(kernel_key, spec.kernel_shape(in_channels), dtype)}
    if spec.use_bias:
        make_bias = initializer_of_bias(bias_initializer)
        params = {"bias": make_bias(bias_key, (spec.filters,), dtype), **params}
    return params


def apply(
    params: Mapping[str, ArrayLike],
    inputs: ArrayLike,
    spec: Conv3DTransposeSpec | Conv3DSpec,
    *,
    output_size: Sequence[int] | None = None,
) -> jax.Array:
    """`conv3d_transpose`, or `conv3d`, with the parameters and the specification of `init`.

    Args:
      params: ``{"kernel": ..., "bias": ...}``; "bias" just where ``spec.use_bias``.
      inputs: as in `conv3d_transpose` or `conv3d`.
      spec: the operation; hashable, so it may be a static argument of `jax.jit`.
      output_size: the wanted ``(D, H, W)`` of a transposed convolution, in place of an output padding.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import conv3dt_jax as c3t
      >>> spec = c3t.Conv3DTransposeSpec(filters=8, kernel_size=2, strides=2)
      >>> params = c3t.init(jax.random.key(0), spec, in_channels=3)
      >>> c3t.apply(params, jnp.ones((1, 4, 4, 4, 3)), spec).shape
      (1, 8, 8, 8, 8)
    """
    check_spec(spec)
    wanted = {"kernel", "bias"} if spec.use_bias else {"kernel"}
    if not isinstance(params, Mapping) or set(params) != wanted:
        found = sorted(params) if isinstance(params, Mapping) else type(params).__name__
        raise ValueError(f"`params` must be a mapping with {sorted(wanted)} (`use_bias={spec.use_bias}`), not {found}.")
    kernel = _operands.kernel(params["kernel"], spec.kernel_layout)
    return run(inputs, kernel, params.get("bias"), spec, output_size)


def initializer_of_kernel(identifier: Any, spec: ConvolutionSpec) -> Any:
    """The initializer that a name, config, object or callable stands for, for the kernel of an operation."""
    found = initializers.get("kernel_initializer", identifier, spec.strides, spec.groups)
    if isinstance(spec, Conv3DSpec) and isinstance(found, tuple(initializers.CLASSES.values())):
        raise ValueError(
            f"{args.received('kernel_initializer', identifier)} makes kernels of transposed convolutions alone; "
            "choose another one for an ordinary convolution."
        )
    return found


def initializer_of_bias(identifier: Any) -> Any:
    """The same for a bias."""
    found = initializers.get("bias_initializer", identifier)
    if isinstance(found, tuple(initializers.CLASSES.values())):
        raise ValueError(
            f"{args.received('bias_initializer', identifier)} makes kernels alone; choose one for a vector."
        )
    return found
