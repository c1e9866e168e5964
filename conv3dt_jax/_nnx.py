"""What the layers for Flax NNX share: their parameters, their call, and the variable that holds an activity loss."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import errors, nnx
from flax.core import meta
from jax.typing import ArrayLike

from conv3dt_jax import _arguments as args
from conv3dt_jax import _config, _layer


class RegularizationLoss(nnx.Variable[jax.Array]):
    """The variables that hold what regularizers took for a layer's output; the collection "losses" of Linen.

    A layer with an ``activity_regularizer`` has one from the start, 0, and each call leaves its loss there in place of
    the one before. `conv3dt_jax.regularization_loss` sums those of a model, and computes the penalties of the
    parameters. Where layers are called more than once in a step, `flax.nnx.capture` keeps the losses of all calls.

    Example:
      >>> import jax.numpy as jnp, conv3dt_jax as c3t
      >>> from flax import nnx
      >>> layer = c3t.nnx.Conv3DTranspose(3, 2, 1, kernel_initializer="ones", activity_regularizer="l1",
      ...     rngs=nnx.Rngs(0))
      >>> outputs = layer(jnp.ones((4, 1, 1, 1, 3)))
      >>> layer.activity_loss[...].round(4)  # 0.01 * 3 * 2 for each sample
      Array(0.06, dtype=float32)
      >>> twice = nnx.capture(lambda layer, x: layer(layer(x)[..., :1] + x), c3t.nnx.RegularizationLoss)
      >>> outputs, losses = twice(layer, jnp.ones((4, 1, 1, 1, 3)))
      >>> round(float(c3t.regularization_loss(layer, losses=losses)), 4)  # 0.06 and 0.01 * 12 * 2
      0.3
    """


with contextlib.suppress(ValueError):  # another library has given the collection "losses" a type
    nnx.register_variable_name("losses", RegularizationLoss)


class Layer(nnx.Module):
    """What both layers do; their constructors take the arguments, each in Keras's order."""

    kind: ClassVar[_layer.Kind]

    def _set_up(self, given: Mapping[str, Any]) -> None:
        """Keeps the arguments of the constructor, its local variables, and makes the parameters."""
        named = types.SimpleNamespace(**{argument: given[argument] for argument in self.kind.arguments})
        for argument, value in _layer.canonical(named, self.kind).items():
            setattr(self, argument, value)
        self.in_features = args.integer("in_features", given["in_features"], minimum=1)
        self.name = given["name"]
        if not isinstance(self.name, str | None):
            raise TypeError(f"{args.received('name', self.name)} must be a string or None.")
        self.deterministic = False
        config = _layer.configure(self, self.kind)
        _layer.check_in_features(config, self.in_features)
        make_kernel, make_bias = config.makers
        kernel_shape, rngs = config.spec.kernel_shape(self.in_features), given["rngs"]
        self.kernel = _parameter("kernel", make_kernel, kernel_shape, config, given["kernel_metadata"], rngs)
        self.bias = nnx.data(None)
        if config.spec.use_bias:
            self.bias = _parameter("bias", make_bias, (config.spec.filters,), config, given["bias_metadata"], rngs)
        self.activity_loss = nnx.data(None)
        if config.activity_regularizer is not None:
            self.activity_loss = _no_loss()

    def _outputs(self, inputs: ArrayLike, output_size: Sequence[int] | None = None) -> jax.Array:
        config = _layer.configure(self, self.kind)
        inputs, _ = _layer.in_channels(config, inputs)
        bias = None if self.bias is None else self.bias[...]
        if config.spec.use_bias != (bias is not None):
            raise ValueError(
                f"`use_bias={config.spec.use_bias}` was set on a layer that holds {'a' if bias is not None else 'no'} "
                "bias; make the layer anew."
            )
        outputs = _layer.forward(config, inputs, self.kernel[...], bias, output_size)
        if config.activity_regularizer is not None and not self.deterministic:
            self._keep(_layer.activity_loss(config, outputs))
        return outputs

    def _keep(self, loss: jax.Array) -> None:
        if hasattr(self, "__captures__"):
            self.sow(RegularizationLoss, "activity_regularizer", loss)
        kept = getattr(self, "activity_loss", None)
        try:
            if kept is None:  # popped, or the regularizer was set later
                self.activity_loss = kept = _no_loss()
            kept.set_value(loss.astype(kept.get_value().dtype))
        except errors.TraceContextError as error:
            raise ValueError(
                "`activity_regularizer` leaves its loss in the layer, which a transformation that closes over the "
                "layer cannot change: pass the layer, or its model, to the transformation as an argument (nnx.jit, "
                "nnx.remat, ...); or call model.eval() first where no loss is wanted."
            ) from error

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> tuple[int | None, ...]:
        """The output's shape for inputs of ``input_shape``, None standing for what is not known, as in Keras."""
        return _layer.configure(self, self.kind).spec.partial_output_shape(input_shape)

    def get_config(self) -> dict[str, Any]:
        """The layer's arguments as a dict that JSON can hold, in Keras's form; without ``in_features``."""
        canonical = types.SimpleNamespace(name=self.name, **_layer.canonical(self, self.kind))
        return _config.to_config(canonical, self.kind)

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        custom_objects: Mapping[str, Any] | None = None,
        *,
        in_features: int,
        rngs: nnx.Rngs | nnx.RngStream,
    ) -> Self:
        """The layer of a config of either layer's ``get_config``, of Keras 3 or of Keras 2, for C = ``in_features``.

        Example:
          >>> from conv3dt_jax.nnx import Conv3DTranspose
          >>> config = {"filters": 8, "kernel_size": [3, 3, 3], "strides": [2, 2, 2]}
          >>> Conv3DTranspose.from_config(config, in_features=3, rngs=nnx.Rngs(0)).strides
          (2, 2, 2)
        """
        arguments = _config.from_config(config, cls.kind, [*cls.kind.arguments, "name"], custom_objects)
        return cls(in_features, **arguments, rngs=rngs)  # type: ignore[call-arg]


def _no_loss() -> RegularizationLoss:
    """Of a dtype that stays, as the carry of a scan must."""
    return RegularizationLoss(jnp.zeros((), jnp.result_type(float)))


def _parameter(
    name: str,
    make: Callable[..., Any],
    shape: tuple[int, ...],
    config: _layer.LayerConfig,
    metadata: Mapping[str, Any],
    rngs: nnx.Rngs | nnx.RngStream,
) -> nnx.Param:
    if not isinstance(metadata, Mapping):
        raise TypeError(f"{args.received(f'{name}_metadata', metadata)} must be a dict, of metadata for an nnx.Param.")
    value = make(_key(rngs), shape, config.param_dtype)
    if isinstance(value, meta.AxisMetadata):  # Linen's annotations
        given = value.to_nnx_metadata() if hasattr(value, "to_nnx_metadata") else vars(value)
        metadata = {**given, **metadata, "linen_meta_type": type(value)}
        value = metadata.pop("value")
    parameter = nnx.Param(value, **metadata)
    _layer.check_drawn(f"{name}_initializer", parameter[...], shape)
    return parameter


def _key(rngs: nnx.Rngs | nnx.RngStream) -> jax.Array:
    if not isinstance(rngs, nnx.Rngs | nnx.RngStream):
        raise TypeError(f"`rngs` must be a flax.nnx.Rngs, for instance nnx.Rngs(0), not {type(rngs).__name__}.")
    if isinstance(rngs, nnx.RngStream):
        return rngs()
    if not {"params", "default"} & set(rngs):
        raise ValueError(f"`rngs` has the streams {sorted(rngs)}; parameters need one named 'params', or a default.")
    return rngs.params()


def kept_losses(model: nnx.Module) -> list[Any]:
    """The losses that the latest calls left in a model; none of layers whose regularizer was taken away or sleeps."""
    idle, kept = set(), []
    for _, node in nnx.iter_graph(model):
        if isinstance(node, Layer):
            if node.deterministic or _layer.configure(node, node.kind).activity_regularizer is None:
                idle.add(id(getattr(node, "activity_loss", None)))
        elif isinstance(node, RegularizationLoss):
            kept.append(node)
    try:
        for variable in kept:
            variable.set_value(variable.get_value())
    except errors.TraceContextError as error:
        raise ValueError(
            "the model's activity losses were left outside of the transformation that asks for them; pass the model "
            "to it as an argument (flax.nnx.jit, flax.nnx.grad, or flax.nnx.merge inside), not as part of a closure."
        ) from error
    return [variable.get_value() for variable in kept if id(variable) not in idle]
