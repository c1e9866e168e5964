"""`Conv3DTranspose` for Flax NNX: the layer of `conv3dt_jax.linen` as an object that holds its parameters.

>>> import jax.numpy as jnp
>>> from flax import nnx
>>> import conv3dt_jax as c3t
>>> up = c3t.nnx.Conv3DTranspose(8, 4, 2, strides=2, rngs=nnx.Rngs(0))
>>> up(jnp.ones((1, 4, 4, 4, 8))).shape
(1, 8, 8, 8, 4)
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import errors, nnx
from flax.core import meta
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from conv3dt_jax import _arguments as args
from conv3dt_jax import _config, _layer, functional

__all__ = ["Conv3DTranspose", "Convolution3DTranspose", "RegularizationLoss"]

Identifier = str | Mapping[str, Any] | Callable[..., Any] | None


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


class Conv3DTranspose(nnx.Module):
    """Transposed 3-D convolution layer (sometimes called deconvolution), as Keras has it, for Flax NNX.

    Computes ``activation(conv3d_transpose(inputs, kernel) + bias)``, to the bit what `conv3dt_jax.Conv3DTranspose`, the
    layer for Linen, computes with the same parameters. Arguments and errors are explained there; only these are added:

    Args:
      in_features: C, the number of input channels.
      name: the layer's name in configs; None for none.
      kernel_metadata: metadata of the kernel's `flax.nnx.Param`, such as
        ``{"out_sharding": conv3dt_jax.initializers.KERNEL_AXES}``. Initializers may bring metadata too, by
        `flax.nnx.with_partitioning` or the `with_partitioning` of Linen.
      bias_metadata: likewise, of the bias.
      rngs: where the initial values come from: a `flax.nnx.Rngs`, or a stream of one.

    Attributes: the arguments, and

      kernel: `flax.nnx.Param` ``(kd, kh, kw, F // G, C)``.
      bias: `flax.nnx.Param` ``(F,)``; None without ``use_bias``.
      activity_loss: `RegularizationLoss`; None without ``activity_regularizer``.
      deterministic: False; ``model.eval()`` makes it True, and calls leave no activity loss, ``model.train()`` False.

    Raises:
      ValueError: on construction, what the layer for Linen refuses; ``in_features`` below 1, not divisible by
        ``groups`` or not that of ``input_shape``. On a call, an ``activity_regularizer`` in a transformation that
        closes over the layer.
      TypeError: on construction, arguments of the wrong type.

    A call changes nothing but ``activity_loss``. Where there is one, transformations take the layer as an argument, and
    `flax.nnx.vmap` and `flax.nnx.scan` are told of it as of any variable that changes, batch statistics for instance.

    Example:
      >>> import jax.numpy as jnp
      >>> import conv3dt_jax as c3t
      >>> from flax import nnx
      >>> layer = c3t.nnx.Conv3DTranspose(3, 8, 3, strides=2, padding="same", activation="relu", rngs=nnx.Rngs(0))
      >>> layer.kernel.shape, layer.bias.shape
      ((3, 3, 3, 8, 3), (8,))
      >>> layer(jnp.ones((1, 4, 5, 6, 3))).shape
      (1, 8, 10, 12, 8)

    References:
      tf.keras.layers.Conv3DTranspose, https://www.tensorflow.org/versions/r2.4/api_docs/python/tf/keras/layers
    """

    def __init__(
        self,
        in_features: int,
        filters: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] = (1, 1, 1),
        padding: str | int | Sequence[int] | Sequence[Sequence[int]] = "valid",
        output_padding: int | Sequence[int] | None = None,
        data_format: str | None = None,
        dilation_rate: int | Sequence[int] = (1, 1, 1),
        activation: Identifier = None,
        use_bias: bool = True,
        kernel_initializer: Identifier = "glorot_uniform",
        bias_initializer: Identifier = "zeros",
        kernel_regularizer: Identifier = None,
        bias_regularizer: Identifier = None,
        activity_regularizer: Identifier = None,
        kernel_constraint: Identifier = None,
        bias_constraint: Identifier = None,
        groups: int = 1,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: lax.PrecisionLike = None,
        implementation: functional.Implementation = "auto",
        input_shape: Sequence[int | None] | None = None,
        batch_input_shape: Sequence[int | None] | None = None,
        trainable: bool = True,
        weights: Sequence[ArrayLike] | None = None,
        name: str | None = None,
        *,
        kernel_metadata: Mapping[str, Any] = types.MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = types.MappingProxyType({}),
        rngs: nnx.Rngs | nnx.RngStream,
    ) -> None:
        given = {argument: value for argument, value in locals().items() if argument in _layer.ARGUMENTS}
        for argument, value in _layer.canonical(types.SimpleNamespace(**given)).items():
            setattr(self, argument, value)
        self.in_features = args.integer("in_features", in_features, minimum=1)
        if not isinstance(name, str | None):
            raise TypeError(f"{args.received('name', name)} must be a string or None.")
        self.name = name
        self.deterministic = False
        config = _layer.configure(self)
        _layer.check_in_features(config, self.in_features)
        make_kernel, make_bias = config.makers
        kernel_shape = config.spec.kernel_shape(self.in_features)
        self.kernel = _parameter("kernel", make_kernel, kernel_shape, config, kernel_metadata, rngs)
        self.bias = nnx.data(None)
        if config.spec.use_bias:
            self.bias = _parameter("bias", make_bias, (config.spec.filters,), config, bias_metadata, rngs)
        self.activity_loss = nnx.data(None)
        if config.activity_regularizer is not None:
            self.activity_loss = _no_loss()

    def __call__(self, inputs: ArrayLike, output_size: Sequence[int] | None = None) -> jax.Array:
        """Applies the layer.

        Args:
          inputs: ``(N, D, H, W, C)``, or ``(N, C, D, H, W)`` with "channels_first"; any number of batch dimensions.
          output_size: the wanted ``(D, H, W)`` of the result, in place of ``output_padding``.

        Returns:
          ``(N, D', H', W', F)``, or ``(N, F, D', H', W')`` with "channels_first".
        """
        config = _layer.configure(self)
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
        return _layer.configure(self).spec.partial_output_shape(input_shape)

    def get_config(self) -> dict[str, Any]:
        """The layer's arguments as a dict that JSON can hold, in Keras's form; without ``in_features``."""
        return _config.to_config(types.SimpleNamespace(name=self.name, **_layer.canonical(self)))

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        custom_objects: Mapping[str, Any] | None = None,
        *,
        in_features: int,
        rngs: nnx.Rngs | nnx.RngStream,
    ) -> Conv3DTranspose:
        """The layer of a config of either layer's ``get_config``, of Keras 3 or of Keras 2, for C = ``in_features``.

        Example:
          >>> config = {"filters": 8, "kernel_size": [3, 3, 3], "strides": [2, 2, 2]}
          >>> Conv3DTranspose.from_config(config, in_features=3, rngs=nnx.Rngs(0)).strides
          (2, 2, 2)
        """
        arguments = _config.from_config(config, [*_layer.ARGUMENTS, "name"], custom_objects)
        return cls(in_features, **arguments, rngs=rngs)


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
        if isinstance(node, Conv3DTranspose):
            if node.deterministic or _layer.configure(node).activity_regularizer is None:
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


Convolution3DTranspose = Conv3DTranspose
