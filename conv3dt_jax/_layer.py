"""What the layers of all frameworks share: defaults of Keras, names to functions, dtype rules."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict

from conv3dt_jax import _activations, _initializers, _operands
from conv3dt_jax import _arguments as args
from conv3dt_jax._keras_config import default_data_format
from conv3dt_jax._spec import Conv3DTransposeSpec

# Regularizers and constraints are not built yet: anything but None is refused by name.
NOT_YET = (
    "kernel_regularizer",
    "bias_regularizer",
    "activity_regularizer",
    "kernel_constraint",
    "bias_constraint",
)


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """A layer's checked arguments: the spec of its operation and the functions its names mean."""

    spec: Conv3DTransposeSpec
    activation: _activations.Activation
    kernel_initializer: _initializers.Initializer
    bias_initializer: _initializers.Initializer
    dtype: np.dtype | None
    param_dtype: np.dtype
    input_shape: tuple[int | None, ...] | None


def configure(layer: Any) -> LayerConfig:
    """Checks the arguments of a layer (its attributes) and resolves what they name.

    Raises:
      TypeError, ValueError: as `Conv3DTransposeSpec` does; also what Keras refuses: stride > 1 with dilation > 1,
        ``output_padding >= strides``.
      NotImplementedError: a regularizer or constraint other than None.
    """
    for name in NOT_YET:
        if getattr(layer, name) is not None:
            raise NotImplementedError(f"`{name}` is not supported yet; leave it None.")
    spec = Conv3DTransposeSpec(
        filters=layer.filters,
        kernel_size=layer.kernel_size,
        strides=layer.strides,
        padding=layer.padding,
        output_padding=layer.output_padding,
        dilation_rate=layer.dilation_rate,
        groups=layer.groups,
        data_format=default_data_format() if layer.data_format is None else layer.data_format,
        use_bias=layer.use_bias,
        precision=layer.precision,
        implementation=layer.implementation,
    )
    spec.check_keras_rules()
    return LayerConfig(
        spec=spec,
        activation=_activations.get("activation", layer.activation),
        kernel_initializer=_initializers.get("kernel_initializer", layer.kernel_initializer),
        bias_initializer=_initializers.get("bias_initializer", layer.bias_initializer),
        dtype=None if layer.dtype is None else args.inexact_dtype("dtype", layer.dtype),
        param_dtype=args.inexact_dtype("param_dtype", layer.param_dtype),
        input_shape=_input_shape(layer.input_shape),
    )


def _input_shape(value: Any) -> tuple[int | None, ...] | None:
    if value is None:
        return None
    if not args.is_sequence(value) or len(value) != 4:
        raise ValueError(
            f"{args.received('input_shape', value)} must be the 4 sizes of an input without its batch (or None)."
        )
    return tuple(None if size is None else args.integer("input_shape", size, minimum=0, whole=value) for size in value)


def hashable(value: Any) -> Any:
    """Lists and arrays as tuples and dicts as frozen dicts, all the way down."""
    if isinstance(value, Mapping):
        return FrozenDict({key: hashable(item) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return tuple(map(hashable, value))
    return hashable(np.asarray(value).tolist()) if isinstance(value, np.ndarray | jax.Array) else value


def in_channels(config: LayerConfig, inputs: Any) -> tuple[jax.Array, int]:
    """The inputs as an array, and the number of their channels."""
    array = _operands.array("inputs", inputs)
    channels = config.spec.split_shape(array.shape)[2]
    expected = config.input_shape or (None,) * 4
    if any(size not in (None, given) for size, given in zip(expected, array.shape[-4:], strict=True)):
        raise ValueError(f"the inputs have shape {array.shape}, but the layer was made for `input_shape={expected}`.")
    return array, channels


def check_drawn(argument: str, value: jax.Array, shape: tuple[int, ...]) -> None:
    """An initializer of the user's must return the shape that it was asked for."""
    if jnp.shape(value) != shape:
        raise ValueError(f"`{argument}` returned shape {jnp.shape(value)} where {shape} was asked for.")


def compute_dtype(config: LayerConfig, *operands: jax.Array | None) -> np.dtype:
    """``dtype`` where it is given; else what the inputs and parameters promote to, at least a float (Flax's rule)."""
    given = [operand for operand in operands if operand is not None]
    if config.dtype is not None:
        if any(jnp.iscomplexobj(operand) for operand in given) and not jnp.issubdtype(
            config.dtype, jnp.complexfloating
        ):
            raise TypeError(
                f"`dtype={config.dtype.name}` would drop the imaginary part of complex inputs or parameters; "
                "leave it None, or give a complex dtype."
            )
        return config.dtype
    promoted = jnp.result_type(*given)
    return promoted if jnp.issubdtype(promoted, jnp.inexact) else jnp.promote_types(promoted, jnp.float32)
