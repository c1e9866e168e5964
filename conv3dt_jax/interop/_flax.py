"""`flax.linen.ConvTranspose` and `flax.nnx.ConvTranspose`: a window slid over the input with zeros put in between.

Their kernel is ours turned around in space, channels before filters; with ``transpose_kernel=True`` it is ours as it
is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from conv3dt_jax._spec import Conv3DTransposeSpec
from conv3dt_jax.interop import _common
from conv3dt_jax.interop._windows import crops, lax_padding, three, turned


def from_flax(module: Any, params: Mapping[str, Any] | None = None) -> _common.Params:
    """Parameters out of a `flax.linen.ConvTranspose` or a `flax.nnx.ConvTranspose`, for `spec_from_flax` of the module.

    Args:
      module: the layer. A mask that it has is multiplied into the kernel.
      params: the parameters of a Linen layer; an NNX layer holds its own.

    Returns:
      ``{"kernel": (kd, kh, kw, F, C), "bias": (F,)}``.

    Example:
      >>> import numpy as np
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> import conv3dt_jax as c3t
      >>> x = jax.random.normal(jax.random.key(0), (1, 4, 4, 4, 3))
      >>> peer = nn.ConvTranspose(8, (3, 3, 3), strides=(2, 2, 2))
      >>> variables = peer.init(jax.random.key(1), x)
      >>> params = from_flax(peer, variables["params"])
      >>> bool(jnp.allclose(c3t.apply(params, x, spec_from_flax(peer)), peer.apply(variables, x), atol=1e-5))
      True
    """
    _check_flax(module)
    arrays = _common.checked(meta.unbox(_own_params(module) if params is None else params))
    _fit_flax(module, arrays, swapped=not module.transpose_kernel)
    if module.mask is not None:
        arrays["kernel"] = arrays["kernel"] * np.asarray(module.mask, arrays["kernel"].dtype)
    if not module.transpose_kernel:
        arrays["kernel"] = turned(arrays["kernel"]).swapaxes(3, 4)
    return _common.as_jax(arrays)


def to_flax(params: Mapping[str, Any], module: Any) -> _common.Params:
    """Parameters for a `flax.linen.ConvTranspose` or a `flax.nnx.ConvTranspose`; an NNX layer's are set as well.

    Args:
      params: ``{"kernel", "bias"}`` as here.
      module: the layer that is to hold them; its ``transpose_kernel`` decides the layout.

    Raises:
      ValueError: shapes or dtypes that differ from those of an NNX layer, which then stays as it was.

    Example:
      >>> import flax.linen as nn, numpy as np
      >>> peer = nn.ConvTranspose(8, (2, 2, 2), use_bias=False)
      >>> to_flax({"kernel": np.ones((2, 2, 2, 8, 3), "f4")}, peer)["kernel"].shape
      (2, 2, 2, 3, 8)
    """
    _check_flax(module)
    arrays = _common.checked(params)
    _fit_flax(module, arrays, swapped=False)
    if not module.transpose_kernel:
        arrays["kernel"] = turned(arrays["kernel"].swapaxes(3, 4))
    result = _common.as_jax(arrays)
    if _is_nnx(module):
        _common.fit("the NNX layer", _own_params(module), arrays)
        for name, value in result.items():
            getattr(module, name)[...] = value
    return result


def spec_from_flax(module: Any) -> Conv3DTransposeSpec:
    """The operation of a `flax.linen.ConvTranspose` or `flax.nnx.ConvTranspose`, for `conv3dt_jax.apply`.

    Raises:
      ValueError: what has no counterpart here: padding beyond a whole kernel, or "CIRCULAR" with ``transpose_kernel``
        and an odd overlap, which lies one step off.

    Example:
      >>> import flax.linen as nn
      >>> spec_from_flax(nn.ConvTranspose(8, (3, 3, 3), strides=(2, 2, 2))).padding
      ((0, 1), (0, 1), (0, 1))
    """
    _check_flax(module)
    kernel, strides = three(module.kernel_size), three(module.strides)
    dilation = three(module.kernel_dilation)
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    padding = module.padding
    common: dict[str, Any] = {"kernel_size": kernel, "strides": strides, "dilation_rate": dilation}
    common["use_bias"] = bool(module.use_bias)
    features = _features(module)
    if padding == "CIRCULAR":
        if module.transpose_kernel and any((e - s) % 2 and e > s for e, s in zip(spans, strides, strict=True)):
            raise ValueError(
                "padding='CIRCULAR' with transpose_kernel=True and an odd overlap lies one step off; no spec has it."
            )
        return Conv3DTransposeSpec(features, padding="circular", **common)
    pads = lax_padding(padding, spans, strides)
    return Conv3DTransposeSpec(features, **crops(pads, spans), **common)


def _check_flax(module: Any) -> None:
    if not hasattr(module, "transpose_kernel"):
        raise TypeError(f"`module` must be a flax.linen.ConvTranspose or flax.nnx.ConvTranspose, not {module!r:.60}.")


def _features(module: Any) -> int:
    return module.out_features if _is_nnx(module) else module.features


def _fit_flax(module: Any, arrays: Mapping[str, np.ndarray], *, swapped: bool) -> None:
    """The parameters must be those of the layer, whatever its input channels."""
    kernel = arrays["kernel"]
    filters = kernel.shape[4 if swapped else 3]
    wanted = (three(module.kernel_size), _features(module), bool(module.use_bias))
    if (kernel.shape[:3], filters, "bias" in arrays) != wanted:
        raise ValueError(
            f"the Flax layer has kernel_size={wanted[0]}, {wanted[1]} features and use_bias={wanted[2]}, but the "
            f"parameters are {_common.shapes(arrays)}."
        )
    if "bias" in arrays and arrays["bias"].shape != (filters,):
        raise ValueError(f"the bias has shape {arrays['bias'].shape}, but the kernel makes {filters} features.")


def _is_nnx(module: Any) -> bool:
    return not dataclasses.is_dataclass(module) and hasattr(module, "kernel")


def _own_params(module: Any) -> dict[str, jax.Array]:
    if not _is_nnx(module):
        raise ValueError("a Linen layer holds no parameters; pass them as `params`.")
    bias = getattr(module, "bias", None)
    arrays = {"kernel": jnp.asarray(module.kernel[...])}
    return arrays if bias is None else arrays | {"bias": jnp.asarray(bias[...])}
