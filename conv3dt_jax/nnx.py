"""`Conv3DTranspose` and `Conv3D` for Flax NNX: the layers of `conv3dt_jax.linen` as objects that hold their parameters.

>>> import jax.numpy as jnp
>>> from flax import nnx
>>> import conv3dt_jax as c3t
>>> up = c3t.nnx.Conv3DTranspose(8, 4, 2, strides=2, rngs=nnx.Rngs(0))
>>> up(jnp.ones((1, 4, 4, 4, 8))).shape
(1, 8, 8, 8, 4)
>>> down = c3t.nnx.Conv3D(8, 16, 3, strides=2, padding="same", rngs=nnx.Rngs(0))
>>> down(jnp.ones((1, 4, 4, 4, 8))).shape
(1, 2, 2, 2, 16)
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from conv3dt_jax import _layer
from conv3dt_jax._nnx import Layer, RegularizationLoss
from conv3dt_jax._placement import MeshAxes
from conv3dt_jax.functional import Implementation

__all__ = ["Conv3D", "Conv3DTranspose", "Convolution3D", "Convolution3DTranspose", "RegularizationLoss"]

Identifier = str | Mapping[str, Any] | Callable[..., Any] | None


class Conv3DTranspose(Layer):
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

    The arguments are attributes of the layer, and so are these:

    Attributes:
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

    kind: ClassVar[_layer.Kind] = _layer.TRANSPOSED

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
        implementation: Implementation = "auto",
        input_shape: Sequence[int | None] | None = None,
        batch_input_shape: Sequence[int | None] | None = None,
        trainable: bool = True,
        weights: Sequence[ArrayLike] | None = None,
        mesh_axes: MeshAxes | Mapping[str, Any] | None = None,
        name: str | None = None,
        *,
        kernel_metadata: Mapping[str, Any] = types.MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = types.MappingProxyType({}),
        rngs: nnx.Rngs | nnx.RngStream,
    ) -> None:
        self._set_up(locals())

    def __call__(self, inputs: ArrayLike, output_size: Sequence[int] | None = None) -> jax.Array:
        """Applies the layer.

        Args:
          inputs: ``(N, D, H, W, C)``, or ``(N, C, D, H, W)`` with "channels_first"; any number of batch dimensions.
          output_size: the wanted ``(D, H, W)`` of the result, in place of ``output_padding``.

        Returns:
          ``(N, D', H', W', F)``, or ``(N, F, D', H', W')`` with "channels_first".
        """
        return self._outputs(inputs, output_size)


class Conv3D(Layer):
    """3-D convolution layer, as Keras has it, for Flax NNX.

    Computes ``activation(conv3d(inputs, kernel) + bias)``, to the bit what `conv3dt_jax.Conv3D`, the layer for Linen,
    computes with the same parameters. Arguments and errors are explained there, and those that NNX adds, with the
    attributes, in `Conv3DTranspose`.

    Example:
      >>> import jax.numpy as jnp
      >>> import conv3dt_jax as c3t
      >>> from flax import nnx
      >>> layer = c3t.nnx.Conv3D(3, 8, 3, strides=2, padding="same", activation="relu", rngs=nnx.Rngs(0))
      >>> layer.kernel.shape, layer.bias.shape
      ((3, 3, 3, 3, 8), (8,))
      >>> layer(jnp.ones((1, 8, 9, 10, 3))).shape
      (1, 4, 5, 5, 8)

    References:
      tf.keras.layers.Conv3D, https://www.tensorflow.org/versions/r2.4/api_docs/python/tf/keras/layers/Conv3D
    """

    kind: ClassVar[_layer.Kind] = _layer.ORDINARY

    def __init__(
        self,
        in_features: int,
        filters: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] = (1, 1, 1),
        padding: str | int | Sequence[int] | Sequence[Sequence[int]] = "valid",
        data_format: str | None = None,
        dilation_rate: int | Sequence[int] = (1, 1, 1),
        groups: int = 1,
        activation: Identifier = None,
        use_bias: bool = True,
        kernel_initializer: Identifier = "glorot_uniform",
        bias_initializer: Identifier = "zeros",
        kernel_regularizer: Identifier = None,
        bias_regularizer: Identifier = None,
        activity_regularizer: Identifier = None,
        kernel_constraint: Identifier = None,
        bias_constraint: Identifier = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: lax.PrecisionLike = None,
        implementation: Implementation = "auto",
        input_shape: Sequence[int | None] | None = None,
        batch_input_shape: Sequence[int | None] | None = None,
        trainable: bool = True,
        weights: Sequence[ArrayLike] | None = None,
        mesh_axes: MeshAxes | Mapping[str, Any] | None = None,
        name: str | None = None,
        *,
        kernel_metadata: Mapping[str, Any] = types.MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = types.MappingProxyType({}),
        rngs: nnx.Rngs | nnx.RngStream,
    ) -> None:
        self._set_up(locals())

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
