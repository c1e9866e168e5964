"""`Conv3DTranspose` and `Conv3D` for Flax Linen, with the arguments of `tf.keras.layers`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from conv3dt_jax import _config, _layer
from conv3dt_jax._placement import MeshAxes
from conv3dt_jax.functional import Implementation

Identifier = str | Mapping[str, Any] | Callable[..., Any] | None


class Layer(nn.Module):
    """What both layers do; their fields are the arguments, each in Keras's order."""

    kind: ClassVar[_layer.Kind]

    def __post_init__(self) -> None:
        # Names stay names: the functions that they mean would keep pickle away.
        for name, value in _layer.canonical(self, self.kind).items():
            object.__setattr__(self, name, value)
        super().__post_init__()

    @nn.compact
    def _outputs(self, inputs: ArrayLike, output_size: Sequence[int] | None = None) -> jax.Array:
        config = _layer.configure(self, self.kind)
        inputs, channels = _layer.in_channels(config, inputs)
        self._check_given_kernel(config, channels)
        kernel_shape = config.spec.kernel_shape(channels)
        make_kernel, make_bias = config.makers
        kernel = self.param("kernel", make_kernel, kernel_shape, config.param_dtype)
        _layer.check_drawn("kernel_initializer", kernel, kernel_shape)
        bias = None
        if config.spec.use_bias:
            bias = self.param("bias", make_bias, (config.spec.filters,), config.param_dtype)
            _layer.check_drawn("bias_initializer", bias, (config.spec.filters,))
        outputs = _layer.forward(config, inputs, kernel, bias, output_size, initializing=self.is_initializing())
        # At init nothing is sown: the loss would come back among the variables, and be counted again.
        if config.activity_regularizer is not None and not self.is_initializing():
            self.sow("losses", "activity_regularizer", _layer.activity_loss(config, outputs))
        return outputs

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> tuple[int | None, ...]:
        """The output's shape for inputs of ``input_shape``, None standing for what is not known, as in Keras.

        Example:
          >>> Conv3DTranspose(8, 3, strides=2, padding="same").compute_output_shape((None, 4, None, 6, 3))
          (None, 8, None, 12, 8)
        """
        return _layer.configure(self, self.kind).spec.partial_output_shape(input_shape)

    def get_config(self) -> dict[str, Any]:
        """The layer's arguments as a dict that JSON can hold, in Keras's form: `from_config` and Keras 3 take it.

        What Keras does not have (``precision``, ``implementation``, ...) is in it where it is not at its default.

        Raises:
          ValueError: a callable that has no name (a lambda, a closure), which no config can hold.

        Example:
          >>> config = Conv3DTranspose(8, 3, kernel_regularizer="l2").get_config()
          >>> config["kernel_size"], config["kernel_regularizer"]["config"]
          ([3, 3, 3], {'l2': 0.01})
          >>> Conv3DTranspose.from_config(config) == Conv3DTranspose(8, 3, kernel_regularizer="l2")
          True
        """
        return _config.to_config(self, self.kind)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None) -> Self:
        """The layer of a config: of `get_config` here, or of Keras 3 or Keras 2, also as it stands in a saved model.

        Args:
          config: the dict, or ``{"class_name": "Conv3DTranspose", "config": {...}}`` around it.
          custom_objects: functions and classes for the names that are not Keras's.

        Raises:
          ValueError: a key or a name that is unknown, or values that the layer refuses.

        Example:
          >>> Conv3DTranspose.from_config({"filters": 8, "kernel_size": [3, 3, 3], "strides": [2, 2, 2]}).strides
          (2, 2, 2)
        """
        known = [field.name for field in dataclasses.fields(cls)]
        return cls(**_config.from_config(config, cls.kind, known, custom_objects))

    def _check_given_kernel(self, config: _layer.LayerConfig, channels: int) -> None:
        if not self.has_variable("params", "kernel"):
            return
        given = jnp.shape(meta.unbox(self.get_variable("params", "kernel")))
        if len(given) == 5 and config.spec.channels_of(given) != channels:
            made_for = config.spec.channels_of(given)
            raise ValueError(
                f"the inputs have {channels} channels, but the layer's kernel of shape {given} was made for "
                f"{made_for}; give inputs with {made_for} channels, or initialize the layer again."
            )


class Conv3DTranspose(Layer):
    """Transposed 3-D convolution layer (sometimes called deconvolution), as Keras has it.

    Computes ``activation(conv3d_transpose(inputs, kernel) + bias)``; see `conv3dt_jax.conv3d_transpose` for the
    equation. Arguments, order, defaults and errors are those of `tf.keras.layers.Conv3DTranspose`; strings, callables
    and config dicts are taken wherever Keras takes them.

    Dimensions: N batch, (D, H, W) depth, height, width, C input channels, F filters, G groups.

    Attributes:
      filters: F, the number of output channels.
      kernel_size: the window (kd, kh, kw); an int or three, as all sizes here.
      strides: output steps per input element.
      padding: "valid" or "same" as in Keras; also "circular", or explicit crops as in `conv3d_transpose`.
      output_padding: elements added at the end of each axis, below ``strides``; None infers the output's shape.
      data_format: "channels_last" or "channels_first"; None takes ``image_data_format`` of ``~/.keras/keras.json``
        (or ``$KERAS_HOME``), else "channels_last".
      dilation_rate: output steps between two taps; above 1 only with ``strides`` of 1.
      activation: a Keras name, config dict or callable; None for none.
      use_bias: whether a bias is added.
      kernel_initializer: a Keras name, "trilinear", "icnr" (see `conv3dt_jax.initializers`), a config dict, or a
        callable ``(key, shape, dtype)``.
      bias_initializer: likewise.
      kernel_regularizer: a name, config dict, object or callable (see `conv3dt_jax.regularizers`), whose penalty
        `conv3dt_jax.regularization_loss` computes from the parameters.
      bias_regularizer: likewise.
      activity_regularizer: likewise, for the output: its penalty, divided by the size of the batch, is sown into the
        collection "losses" where a call has that ``mutable``.
      kernel_constraint: a name, config dict, object or callable (see `conv3dt_jax.constraints`), which
        `conv3dt_jax.constrain` applies after each update of an optimizer.
      bias_constraint: likewise.
      groups: G; input channels and filters are split into G blocks, as in PyTorch.
      dtype: dtype of the computation and the result; None promotes inputs and parameters, as Flax does. Also Keras's
        policies "mixed_bfloat16" and "mixed_float16", with float32 parameters.
      param_dtype: dtype of the parameters.
      precision: see `jax.lax.conv_general_dilated`.
      implementation: "auto" or the name of a lowering, as in `conv3d_transpose`.
      input_shape: Keras's hint, the shape of an input without its batch, None for unknown sizes; checked at the call.
      batch_input_shape: likewise, with the batch.
      trainable: with False no gradient flows to the parameters (`jax.lax.stop_gradient`), they have no penalty, and
        `conv3dt_jax.constrain` leaves them as they are.
      weights: initial values ``[kernel, bias]`` in place of those of the initializers, cast to ``param_dtype``.
      mesh_axes: how a call is cut over the mesh of `jax.set_mesh`, as `conv3dt_jax.sharded` does it: a
        `conv3dt_jax.MeshAxes`, or a dict such as ``{"batch": "data", "depth": "z"}``, of names of mesh axes or of
        logical names for `flax.linen.logical_axis_rules`. Without a mesh, and at init, it has no effect.

    Parameters: ``kernel`` ``(kd, kh, kw, F // G, C)`` and, with ``use_bias``, ``bias`` ``(F,)``.

    Raises:
      ValueError: on construction, as Keras: ``padding="causal"``, ``strides`` and ``dilation_rate`` both above 1,
        ``output_padding`` not below ``strides``, unknown names, sizes out of range.
      TypeError: on construction, arguments of the wrong type (a boolean or a float for an integer, say).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from conv3dt_jax import Conv3DTranspose
      >>> layer = Conv3DTranspose(8, 3, strides=2, padding="same", activation="relu")
      >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 4, 5, 6, 3)))
      >>> jax.tree.map(jnp.shape, variables)
      {'params': {'bias': (8,), 'kernel': (3, 3, 3, 8, 3)}}
      >>> layer.apply(variables, jnp.ones((1, 4, 5, 6, 3))).shape
      (1, 8, 10, 12, 8)

    References:
      tf.keras.layers.Conv3DTranspose, https://www.tensorflow.org/versions/r2.4/api_docs/python/tf/keras/layers
      Dumoulin and Visin, A guide to convolution arithmetic for deep learning, arXiv:1603.07285.
    """

    kind: ClassVar[_layer.Kind] = _layer.TRANSPOSED

    filters: int
    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] = (1, 1, 1)
    padding: str | int | Sequence[int] | Sequence[Sequence[int]] = "valid"
    output_padding: int | Sequence[int] | None = None
    data_format: str | None = None
    dilation_rate: int | Sequence[int] = (1, 1, 1)
    activation: Identifier = None
    use_bias: bool = True
    kernel_initializer: Identifier = "glorot_uniform"
    bias_initializer: Identifier = "zeros"
    kernel_regularizer: Identifier = None
    bias_regularizer: Identifier = None
    activity_regularizer: Identifier = None
    kernel_constraint: Identifier = None
    bias_constraint: Identifier = None
    groups: int = 1
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: lax.PrecisionLike = None
    implementation: Implementation = "auto"
    input_shape: Sequence[int | None] | None = None
    batch_input_shape: Sequence[int | None] | None = None
    trainable: bool = True
    weights: Sequence[ArrayLike] | None = None
    mesh_axes: MeshAxes | Mapping[str, Any] | None = None

    def __call__(self, inputs: ArrayLike, output_size: Sequence[int] | None = None) -> jax.Array:
        """Applies the layer.

        Args:
          inputs: ``(N, D, H, W, C)``, or ``(N, C, D, H, W)`` with "channels_first"; any number of batch dimensions.
          output_size: the wanted ``(D, H, W)`` of the result, in place of ``output_padding``: for skip connections
            whose sizes are odd. It reaches as far as output paddings below ``strides`` do.

        Returns:
          ``(N, D', H', W', F)``, or ``(N, F, D', H', W')`` with "channels_first".
        """
        return self._outputs(inputs, output_size)


class Conv3D(Layer):
    """3-D convolution layer, as Keras has it: the layer that stands beside `Conv3DTranspose` in every network.

    Computes ``activation(conv3d(inputs, kernel) + bias)``; see `conv3dt_jax.conv3d` for the equation. Arguments, order,
    defaults and errors are those of `tf.keras.layers.Conv3D`; what is not listed here is as in `Conv3DTranspose`.

    Dimensions: N batch, (D, H, W) depth, height, width, C input channels, F filters, G groups.

    Attributes:
      filters: F, the number of output channels.
      kernel_size: the window (kd, kh, kw); an int or three, as all sizes here.
      strides: input steps per output element.
      padding: "valid" or "same" as in Keras; also "circular", or what is added at the ends, as in `conv3d`.
      data_format: see `Conv3DTranspose`.
      dilation_rate: input steps between two taps; above 1 only with ``strides`` of 1.
      groups: G; input channels and filters are split into G blocks.

    Parameters: ``kernel`` ``(kd, kh, kw, C // G, F)`` and, with ``use_bias``, ``bias`` ``(F,)``.

    Raises:
      ValueError, TypeError: on construction, as `Conv3DTranspose` does; also for the initializers "trilinear" and
        "icnr", which are for transposed convolutions alone.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from conv3dt_jax import Conv3D
      >>> layer = Conv3D(8, 3, strides=2, padding="same", activation="relu")
      >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 8, 9, 10, 3)))
      >>> jax.tree.map(jnp.shape, variables)
      {'params': {'bias': (8,), 'kernel': (3, 3, 3, 3, 8)}}
      >>> layer.apply(variables, jnp.ones((1, 8, 9, 10, 3))).shape
      (1, 4, 5, 5, 8)

    References:
      tf.keras.layers.Conv3D, https://www.tensorflow.org/versions/r2.4/api_docs/python/tf/keras/layers/Conv3D
    """

    kind: ClassVar[_layer.Kind] = _layer.ORDINARY

    filters: int
    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] = (1, 1, 1)
    padding: str | int | Sequence[int] | Sequence[Sequence[int]] = "valid"
    data_format: str | None = None
    dilation_rate: int | Sequence[int] = (1, 1, 1)
    groups: int = 1
    activation: Identifier = None
    use_bias: bool = True
    kernel_initializer: Identifier = "glorot_uniform"
    bias_initializer: Identifier = "zeros"
    kernel_regularizer: Identifier = None
    bias_regularizer: Identifier = None
    activity_regularizer: Identifier = None
    kernel_constraint: Identifier = None
    bias_constraint: Identifier = None
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: lax.PrecisionLike = None
    implementation: Implementation = "auto"
    input_shape: Sequence[int | None] | None = None
    batch_input_shape: Sequence[int | None] | None = None
    trainable: bool = True
    weights: Sequence[ArrayLike] | None = None
    mesh_axes: MeshAxes | Mapping[str, Any] | None = None

    def __call__(self, inputs: ArrayLike) -> jax.Array:
        """Applies the layer.

        Args:
          inputs: ``(N, D, H, W, C)``, or ``(N, C, D, H, W)`` with "channels_first"; any number of batch dimensions.

        Returns:
          ``(N, D', H', W', F)``, or ``(N, F, D', H', W')`` with "channels_first".
        """
        return self._outputs(inputs)


Convolution3D = Conv3D
Convolution3DTranspose = Conv3DTranspose
