"""What all layers share, of either operation and framework: names to functions, dtype rules, the call."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core.spmd import get_logical_axis_rules
from jax import lax

from conv3dt_jax import (
    _activations,
    _dtype_policy,
    _initializers,
    _operands,
    _placement,
    constraints,
    initializers,
    regularizers,
)
from conv3dt_jax import _arguments as args
from conv3dt_jax._convolution_spec import ConvolutionSpec
from conv3dt_jax._given_weights import GivenWeights
from conv3dt_jax._keras_config import default_data_format
from conv3dt_jax._operation import run
from conv3dt_jax._parameters import initializer_of_bias, initializer_of_kernel
from conv3dt_jax._placement import MeshAxes, Placement
from conv3dt_jax._spec import Conv3DSpec, Conv3DTransposeSpec

# Arguments that a layer keeps in canonical form, so that equal layers are equal and a config has one spelling.
_OF_CONFIG = ("dtype", "param_dtype", "input_shape", "batch_input_shape", "trainable", "weights", "mesh_axes")
PENALTIES = ("kernel_regularizer", "bias_regularizer", "activity_regularizer")
CONSTRAINTS = ("kernel_constraint", "bias_constraint")
FUNCTIONS = ("activation", "kernel_initializer", "bias_initializer", *PENALTIES, *CONSTRAINTS)


@dataclasses.dataclass(frozen=True)
class Kind:
    """One of the two operations as a layer: its names, its specification, and what of this Keras's layer takes too."""

    names: tuple[str, ...]
    spec: type[ConvolutionSpec]
    of_keras: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def of_spec(self) -> tuple[str, ...]:
        """The arguments of the specification."""
        return tuple(field.name for field in dataclasses.fields(self.spec) if field.name != "preferred_element_type")

    @property
    def arguments(self) -> tuple[str, ...]:
        """All that a layer takes."""
        return (*self.of_spec, *_OF_CONFIG, *FUNCTIONS)


_SIZES = ("filters", "kernel_size", "strides", "padding")
_FUNCTIONS = ("activation", "use_bias", *FUNCTIONS[1:])
TRANSPOSED = Kind(
    names=("Conv3DTranspose", "Convolution3DTranspose"),
    spec=Conv3DTransposeSpec,
    of_keras=(*_SIZES, "output_padding", "data_format", "dilation_rate", *_FUNCTIONS),
)
ORDINARY = Kind(
    names=("Conv3D", "Convolution3D"),
    spec=Conv3DSpec,
    of_keras=(*_SIZES, "data_format", "dilation_rate", "groups", *_FUNCTIONS),
)


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """A layer's checked arguments: the spec of its operation and the functions its names mean."""

    spec: ConvolutionSpec
    activation: _activations.Activation
    kernel_initializer: _initializers.Initializer
    bias_initializer: _initializers.Initializer
    kernel_regularizer: regularizers.Regularizer | None
    bias_regularizer: regularizers.Regularizer | None
    activity_regularizer: regularizers.Regularizer | None
    kernel_constraint: constraints.Constraint | None
    bias_constraint: constraints.Constraint | None
    dtype: np.dtype | None
    param_dtype: np.dtype
    input_shape: tuple[int | None, ...] | None
    batch_input_shape: tuple[int | None, ...] | None
    trainable: bool
    weights: GivenWeights | None
    mesh_axes: MeshAxes | None

    @property
    def makers(self) -> tuple[_initializers.Initializer, _initializers.Initializer]:
        """What makes the kernel and the bias: the initializers, or the weights that were given."""
        if self.weights is None:
            return self.kernel_initializer, self.bias_initializer
        return self.weights.initializer(0), self.weights.initializer(1)


def configure(layer: Any, kind: Kind) -> LayerConfig:
    """Checks the arguments of a layer (its attributes) and resolves what they name.

    Raises:
      TypeError, ValueError: as `Conv3DTransposeSpec` does; also what Keras refuses: stride > 1 with dilation > 1,
        ``output_padding >= strides``; and names, configs and shapes that mean nothing.
    """
    arguments = {name: getattr(layer, name) for name in kind.of_spec}
    if layer.data_format is None:
        arguments["data_format"] = default_data_format()
    spec = kind.spec(**arguments)
    spec.check_keras_rules()
    dtype, param_dtype = _dtype_policy.resolve(layer.dtype, layer.param_dtype)
    input_shape, batch_input_shape = _input_shapes(layer.input_shape, layer.batch_input_shape)
    return LayerConfig(
        spec=spec,
        activation=_activations.get("activation", layer.activation),
        kernel_initializer=initializer_of_kernel(layer.kernel_initializer, spec),
        bias_initializer=initializer_of_bias(layer.bias_initializer),
        kernel_regularizer=regularizers.get("kernel_regularizer", layer.kernel_regularizer),
        bias_regularizer=regularizers.get("bias_regularizer", layer.bias_regularizer),
        activity_regularizer=regularizers.get("activity_regularizer", layer.activity_regularizer),
        kernel_constraint=constraints.get("kernel_constraint", layer.kernel_constraint, rank=5),
        bias_constraint=constraints.get("bias_constraint", layer.bias_constraint, rank=1),
        dtype=dtype,
        param_dtype=param_dtype,
        input_shape=input_shape,
        batch_input_shape=batch_input_shape,
        trainable=args.boolean("trainable", layer.trainable),
        weights=None if layer.weights is None else GivenWeights.of(layer.weights, spec, param_dtype),
        mesh_axes=_placement.mesh_axes_of(layer.mesh_axes),
    )


def canonical(layer: Any, kind: Kind) -> dict[str, Any]:
    """The layer's arguments as it shall keep them: triples, lower-case names, dtypes; hashable, all of them."""
    config = configure(layer, kind)
    kept = {name: getattr(config.spec, name) for name in kind.of_spec}
    kept |= {name: getattr(config, name) for name in (*_OF_CONFIG, *PENALTIES, *CONSTRAINTS)}
    kept |= {name: initializers.kept(getattr(layer, name)) for name in ("kernel_initializer", "bias_initializer")}
    return kept | {"activation": _activations.kept(layer.activation)}


def _input_shapes(inner: Any, whole: Any) -> tuple[tuple[int | None, ...] | None, tuple[int | None, ...] | None]:
    inner, whole = _shape("input_shape", inner, 4), _shape("batch_input_shape", whole, 5)
    if inner is not None and whole is not None and inner != whole[1:]:
        raise ValueError(
            f"`input_shape={inner}` and `batch_input_shape={whole}` differ; give one of them, or the same sizes."
        )
    return inner, whole


def _shape(argument: str, value: Any, rank: int) -> tuple[int | None, ...] | None:
    if value is None:
        return None
    if not args.is_sequence(value) or len(value) != rank:
        batch = "with" if rank == 5 else "without"
        raise ValueError(
            f"{args.received(argument, value)} must be the {rank} sizes of an input {batch} its batch (or None)."
        )
    return tuple(None if size is None else args.integer(argument, size, minimum=0, whole=value) for size in value)


def in_channels(config: LayerConfig, inputs: Any) -> tuple[jax.Array, int]:
    """The inputs as an array, and the number of their channels."""
    array = _operands.array("inputs", inputs)
    channels = config.spec.split_shape(array.shape)[2]
    for argument in ("input_shape", "batch_input_shape"):
        expected = getattr(config, argument)
        if expected is not None and not _fits(array.shape, expected):
            raise ValueError(
                f"the inputs have shape {array.shape}, but the layer was made for `{argument}={expected}`."
            )
    return array, channels


def check_in_features(config: LayerConfig, in_features: int) -> None:
    """Where a layer is told its channels, they must be those of its ``input_shape``."""
    for name in ("input_shape", "batch_input_shape"):
        shape = getattr(config, name)
        if shape is not None and config.spec.split_shape(shape)[2] not in (None, in_features):
            raise ValueError(f"`{name}={shape}` has other channels than `in_features={in_features}`; give the same.")


def _fits(shape: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    last = shape[-len(expected) :]
    return len(last) == len(expected) and all(a is None or a == b for a, b in zip(expected, last, strict=True))


def forward(
    config: LayerConfig,
    inputs: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    output_size: Any = None,
    *,
    initializing: bool = False,
) -> jax.Array:
    """``activation(operation(inputs, kernel) + bias)``, in the layer's dtype.

    The inputs of an initialization may be smaller than those of a mesh, and lie as they do.
    """
    if not config.trainable:
        kernel, bias = lax.stop_gradient((kernel, bias))
    dtype = compute_dtype(config, inputs, kernel, bias)
    inputs, kernel = inputs.astype(dtype), kernel.astype(dtype)
    bias = None if bias is None else bias.astype(dtype)
    spec = config.spec if output_size is None else config.spec.without_output_padding()
    placement = None if initializing else _current_placement(config.mesh_axes)
    return config.activation(run(inputs, kernel, bias, spec, output_size, keras_rules=True, placement=placement))


def _current_placement(axes: MeshAxes | None) -> Placement | None:
    """Over the mesh of `jax.set_mesh`, where there is one; its axes may have other names by Flax's rules."""
    mesh = _placement.current_mesh()
    if axes is None or mesh is None:
        return None
    rules: dict[str, Any] = {}
    for logical, name in get_logical_axis_rules():
        rules.setdefault(logical, name)
    return Placement(mesh, axes.translated(rules))


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


def penalty(argument: str, regularizer: regularizers.Regularizer, value: jax.Array) -> jax.Array:
    """What a regularizer takes for a value: a scalar."""
    try:
        loss = jnp.asarray(regularizer(value))
    except ValueError as error:
        raise ValueError(f"`{argument}` does not take an array of shape {value.shape}: {error}") from error
    if loss.ndim:
        raise ValueError(f"`{argument}` returned shape {loss.shape}; it must return a scalar.")
    return loss


def activity_loss(config: LayerConfig, outputs: jax.Array) -> jax.Array:
    """The penalty on the layer's outputs, divided by the size of the batch, as Keras 3 does; 0 for none."""
    assert config.activity_regularizer is not None
    batch = math.prod(outputs.shape[:-4])
    loss = penalty("activity_regularizer", config.activity_regularizer, outputs)
    return jnp.zeros_like(loss) if batch == 0 else loss / batch
