"""`ConvTranspose` and `Conv` of `flax.linen` and `flax.nnx`.

The former is a window slid over the input with zeros put in between: its kernel is ours turned around in space,
channels before filters; with ``transpose_kernel=True`` it is ours as it is. So is that of `Conv`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from conv3dt_jax._spec import Conv3DSpec, Conv3DTransposeSpec
from conv3dt_jax.interop import _common
from conv3dt_jax.interop._windows import added, crops, lax_padding, three, turned


def from_flax(module: Any, params: Mapping[str, Any] | None = None) -> _common.Params:
    """Parameters out of a `ConvTranspose` or `Conv` of `flax.linen` or `flax.nnx`, for `spec_from_flax` of the module.

    Args:
      module: the layer. A mask that it has is multiplied into the kernel.
      params: the parameters of a Linen layer; an NNX layer holds its own.

    Returns:
      ``{"kernel": (kd, kh, kw, F, C), "bias": (F,)}``; the kernel of a `Conv` is ``(kd, kh, kw, C // G, F)``.

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
    _fit_flax(module, arrays, swapped=not _as_ours(module))
    if module.mask is not None:
        arrays["kernel"] = arrays["kernel"] * np.asarray(module.mask, arrays["kernel"].dtype)
    if not _as_ours(module):
        arrays["kernel"] = turned(arrays["kernel"]).swapaxes(3, 4)
    return _common.as_jax(arrays)


def to_flax(params: Mapping[str, Any], module: Any) -> _common.Params:
    """Parameters for a `ConvTranspose` or `Conv` of `flax.linen` or `flax.nnx`; an NNX layer's are set as well.

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
    if not _as_ours(module):
        arrays["kernel"] = turned(arrays["kernel"].swapaxes(3, 4))
    result = _common.as_jax(arrays)
    if _is_nnx(module):
        _common.fit("the NNX layer", _own_params(module), arrays)
        for name, value in result.items():
            getattr(module, name)[...] = value
    return result


def spec_from_flax(module: Any) -> Conv3DTransposeSpec | Conv3DSpec:
    """The operation of a `ConvTranspose` or `Conv` of `flax.linen` or `flax.nnx`, for `conv3dt_jax.apply`.

    Raises:
      ValueError: what has no counterpart here: of `ConvTranspose` padding beyond a whole kernel, or "CIRCULAR" with
        ``transpose_kernel`` and an odd overlap, which lies one step off; of `Conv` "CIRCULAR" with strides, an input
        dilation, other paddings than zeros.

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
    if _is_ordinary(module):
        if three(module.input_dilation) != (1, 1, 1):
            raise ValueError("input_dilation makes a transposed convolution; use conv3dt_jax.conv3d_transpose for it.")
        if padding == "CIRCULAR" and any(e > 1 < s for e, s in zip(spans, strides, strict=True)):
            raise ValueError(
                "padding='CIRCULAR' with strides lies otherwise than here; pad with jax.numpy.pad(mode='wrap') before."
            )
        return Conv3DSpec(features, padding=added(padding, spans, strides), groups=module.feature_group_count, **common)
    if padding == "CIRCULAR":
        if module.transpose_kernel and any((e - s) % 2 and e > s for e, s in zip(spans, strides, strict=True)):
            raise ValueError(
                "padding='CIRCULAR' with transpose_kernel=True and an odd overlap lies one step off; no spec has it."
            )
        return Conv3DTransposeSpec(features, padding="circular", **common)
    pads = lax_padding(padding, spans, strides)
    return Conv3DTransposeSpec(features, **crops(pads, spans), **common)


def _check_flax(module: Any) -> None:
    if not hasattr(module, "transpose_kernel") and not _is_ordinary(module):
        raise TypeError(f"`module` must be a ConvTranspose or Conv of flax.linen or flax.nnx, not {module!r:.60}.")


def _is_ordinary(module: Any) -> bool:
    return hasattr(module, "feature_group_count") and getattr(module, "shared_weights", True)


def _as_ours(module: Any) -> bool:
    """Whether the kernel has our layout."""
    return _is_ordinary(module) or module.transpose_kernel


def _features(module: Any) -> int:
    return module.out_features if _is_nnx(module) else module.features


def _fit_flax(module: Any, arrays: Mapping[str, np.ndarray], *, swapped: bool) -> None:
    """The parameters must be those of the layer, whatever its input channels."""
    kernel = arrays["kernel"]
    filters = kernel.shape[4 if swapped or _is_ordinary(module) else 3]
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
