"""`Conv3DTranspose` for Flax Linen, with the arguments of `tf.keras.layers.Conv3DTranspose`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from conv3dt_jax import _layer, functional

Identifier = str | Mapping[str, Any] | Callable[..., Any] | None


class Conv3DTranspose(nn.Module):
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
      kernel_initializer: a Keras name, config dict, or a callable ``(key, shape, dtype)``.
      bias_initializer: likewise.
      kernel_regularizer: None (regularizers and constraints are not supported yet).
      bias_regularizer: None.
      activity_regularizer: None.
      kernel_constraint: None.
      bias_constraint: None.
      groups: G; input channels and filters are split into G blocks, as in PyTorch.
      dtype: dtype of the computation and the result; None promotes inputs and parameters, as Flax does.
      param_dtype: dtype of the parameters.
      precision: see `jax.lax.conv_general_dilated`.
      implementation: "auto" or the name of a lowering, as in `conv3d_transpose`.
      input_shape: Keras's hint, the shape of an input without its batch, None for unknown sizes; checked at the call.

    Parameters: ``kernel`` ``(kd, kh, kw, F // G, C)`` and, with ``use_bias``, ``bias`` ``(F,)``.

    Raises:
      ValueError: on construction, as Keras: ``padding="causal"``, ``strides`` and ``dilation_rate`` both above 1,
        ``output_padding`` not below ``strides``, unknown names, sizes out of range.
      TypeError: on construction, arguments of the wrong type (a boolean or a float for an integer, say).
      NotImplementedError: a regularizer or a constraint.

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
    implementation: functional.Implementation = "auto"
    input_shape: Sequence[int | None] | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # lists and dicts would make the module unhashable, and so jit fail
            if isinstance(getattr(self, field.name), list | dict | np.ndarray | jax.Array):
                object.__setattr__(self, field.name, _layer.hashable(getattr(self, field.name)))
        _layer.configure(self)  # for its errors; what it returns holds functions, which would keep pickle away
        super().__post_init__()

    @nn.compact
    def __call__(self, inputs: ArrayLike, output_size: Sequence[int] | None = None) -> jax.Array:
        """Applies the layer.

        Args:
          inputs: ``(N, D, H, W, C)``, or ``(N, C, D, H, W)`` with "channels_first"; any number of batch dimensions.
          output_size: the wanted ``(D, H, W)`` of the result, in place of ``output_padding``: for skip connections
            whose sizes are odd. It reaches as far as output paddings below ``strides`` do.

        Returns:
          ``(N, D', H', W', F)``, or ``(N, F, D', H', W')`` with "channels_first".
        """
        config = _layer.configure(self)
        inputs, channels = _layer.in_channels(config, inputs)
        spec = config.spec if output_size is None else config.spec.without_output_padding()
        kernel_shape = spec.kernel_shape(channels)
        self._check_given_kernel(channels)
        kernel = self.param("kernel", config.kernel_initializer, kernel_shape, config.param_dtype)
        _layer.check_drawn("kernel_initializer", kernel, kernel_shape)
        bias = None
        if spec.use_bias:
            bias = self.param("bias", config.bias_initializer, (spec.filters,), config.param_dtype)
            _layer.check_drawn("bias_initializer", bias, (spec.filters,))
        dtype = _layer.compute_dtype(config, inputs, kernel, bias)
        inputs, kernel = inputs.astype(dtype), kernel.astype(dtype)
        bias = None if bias is None else bias.astype(dtype)
        outputs = functional.run(inputs, kernel, bias, spec, output_size, keras_rules=True)
        return config.activation(outputs)

    def _check_given_kernel(self, channels: int) -> None:
        if not self.has_variable("params", "kernel"):
            return
        given = jnp.shape(meta.unbox(self.get_variable("params", "kernel")))
        if len(given) == 5 and given[-1] != channels:
            raise ValueError(
                f"the inputs have {channels} channels, but the layer's kernel of shape {given} was made for "
                f"{given[-1]}; give inputs with {given[-1]} channels, or initialize the layer again."
            )


Convolution3DTranspose = Conv3DTranspose
