"""The convolutions of `equinox.nn` and Haiku; the transposed ones slide a window over the input with zeros put in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conv3dt_jax import _arguments as args
from conv3dt_jax._spec import Conv3DSpec, Conv3DTransposeSpec
from conv3dt_jax.interop import _common
from conv3dt_jax.interop._windows import added, crops, lax_padding, three, turned


def from_equinox(module: Any) -> _common.Params:
    """Parameters out of an `equinox.nn.ConvTranspose3d` or `Conv3d`, for `spec_from_equinox` of the module.

    Example:
      >>> import numpy as np
      >>> from types import SimpleNamespace
      >>> module = SimpleNamespace(weight=np.ones((8, 3, 2, 2, 2), "f4"), bias=np.zeros((8, 1, 1, 1), "f4"), groups=1,
      ...     output_padding=(0, 0, 0))
      >>> {name: value.shape for name, value in from_equinox(module).items()}
      {'kernel': (2, 2, 2, 8, 3), 'bias': (8,)}
    """
    _common.wanted("module", module, "equinox.nn.ConvTranspose3d or equinox.nn.Conv3d", "weight", "bias", "groups")
    weight, groups = _common.numpy("weight", module.weight), module.groups
    if _is_ordinary(module):
        arrays = {"kernel": weight.transpose(2, 3, 4, 1, 0)}
    else:
        blocks = weight.reshape(groups, -1, *weight.shape[1:])  # (G, F // G, C // G, kd, kh, kw)
        kernel = blocks.transpose(3, 4, 5, 1, 0, 2).reshape(*weight.shape[2:], blocks.shape[1], -1)
        arrays = {"kernel": turned(kernel)}
    if module.bias is not None:
        arrays["bias"] = _common.numpy("bias", module.bias).reshape(-1)
        _common.check_bias("module", arrays)
    return _common.as_jax(arrays)


def to_equinox(params: Mapping[str, Any], module: Any) -> Any:
    """A copy of an `equinox.nn.ConvTranspose3d` or `Conv3d` that holds the parameters.

    Raises:
      ValueError: shapes or dtypes that differ from the module's.

    Example:
      ``layer = to_equinox(params, equinox.nn.ConvTranspose3d(3, 8, 2, 2, key=key))``

      >>> import numpy as np
      >>> to_equinox({"kernel": np.ones((2, 2, 2, 8, 3), "f4"), "scale": 1}, None)
      Traceback (most recent call last):
      ...
      ValueError: `params` must be the parameters of one layer, 'kernel' and 'bias', not ['kernel', 'scale'].
    """
    arrays = _common.checked(params)
    equinox = _common.needed("equinox", "equinox")
    _common.wanted("module", module, "equinox.nn.ConvTranspose3d or equinox.nn.Conv3d", "weight", "bias", "groups")
    kernel, groups = arrays["kernel"], module.groups
    if _is_ordinary(module):
        new = {"weight": kernel.transpose(4, 3, 0, 1, 2)}
    else:
        blocks = turned(kernel).reshape(*kernel.shape[:4], groups, -1)  # (kd, kh, kw, F // G, G, C // G)
        new = {"weight": blocks.transpose(4, 3, 5, 0, 1, 2).reshape(-1, blocks.shape[-1], *kernel.shape[:3])}
    if "bias" in arrays:
        new["bias"] = arrays["bias"].reshape(-1, 1, 1, 1)
    there = {"weight": module.weight} | ({} if module.bias is None else {"bias": module.bias})
    _common.fit("the Equinox layer", there, new)
    values = _common.as_jax(new)
    return equinox.tree_at(lambda m: [getattr(m, name) for name in values], module, list(values.values()))


def spec_from_equinox(module: Any) -> Conv3DTransposeSpec | Conv3DSpec:
    """The operation of an `equinox.nn.ConvTranspose3d` or `Conv3d`.

    Channels come first; the batch that Equinox lacks may be there or not.

    Raises:
      ValueError: padding that lies otherwise than here: circular "SAME_LOWER" with an odd overlap, for one.

    Example:
      >>> from types import SimpleNamespace
      >>> module = SimpleNamespace(out_channels=8, kernel_size=(3, 3, 3), stride=(2, 2, 2), padding="SAME", groups=1,
      ...     output_padding=(0, 0, 0), dilation=(1, 1, 1), use_bias=True, padding_mode="ZEROS")
      >>> spec_from_equinox(module).output_shape((8, 4, 4, 4))
      (8, 8, 8, 8)
    """
    names = ("kernel_size", "stride", "dilation", "padding", "padding_mode", "out_channels")
    _common.wanted("module", module, "equinox.nn.ConvTranspose3d or equinox.nn.Conv3d", *names)
    k, s, d = module.kernel_size, module.stride, module.dilation
    spans = [(a - 1) * b + 1 for a, b in zip(k, d, strict=True)]
    common: dict[str, Any] = {
        "kernel_size": k, "strides": s, "dilation_rate": d, "groups": module.groups, "use_bias": module.use_bias,
        "data_format": "channels_first",
    }  # fmt: skip
    if _is_ordinary(module):
        return Conv3DSpec(module.out_channels, padding=_added(module, spans), **common)
    if module.padding_mode == "CIRCULAR":
        if module.padding == "SAME_LOWER" and any((e - b) % 2 and e > b for e, b in zip(spans, s, strict=True)):
            raise ValueError("circular padding of 'SAME_LOWER' with an odd overlap lies one step off; no spec has it.")
        return Conv3DTransposeSpec(module.out_channels, padding="circular", **common)
    cropped, extra = [], []
    for axis, (e, b, a) in enumerate(zip(spans, s, module.output_padding, strict=True)):
        if isinstance(module.padding, str) and module.padding != "VALID":
            over = e - b + a  # what "same" takes off; below zero it adds
            low = (max(over, 0) + (module.padding == "SAME_LOWER")) // 2
            cropped.append((low, max(over, 0) - low))
            extra.append(max(-over, 0))
        else:
            cropped.append((0, 0) if module.padding == "VALID" else tuple(module.padding[axis]))
            extra.append(a)
    return Conv3DTransposeSpec(module.out_channels, padding=tuple(cropped), output_padding=tuple(extra), **common)


def _is_ordinary(module: Any) -> bool:
    """Whether an Equinox layer is a `Conv3d`."""
    return not hasattr(module, "output_padding")


def _added(module: Any, spans: list[int]) -> Any:
    """The padding of an Equinox `Conv3d`."""
    padding, unstrided = module.padding, max(module.stride) == 1
    if padding == "VALID" or (not isinstance(padding, str) and not any(map(any, padding))):
        return "valid"
    if module.padding_mode == "ZEROS":
        return added(padding, spans, module.stride)
    if padding == "SAME_LOWER" and unstrided:
        padding = added(padding, spans, module.stride)
    aligned = padding == "SAME" or (unstrided and [*padding] == [((e - 1) // 2, e // 2) for e in spans])
    if module.padding_mode == "CIRCULAR" and aligned:
        return "circular"
    raise ValueError(
        f"padding={module.padding!r} with padding_mode={module.padding_mode!r} and stride {module.stride} has no "
        "counterpart here; pad the inputs with jax.numpy.pad before."
    )


HAIKU = ("Conv3DTranspose", "Conv3D")
"""The modules of Haiku, whose parameters do not say which they are of."""


def from_haiku(params: Mapping[str, Any], module: str = "Conv3DTranspose") -> _common.Params:
    """Parameters out of a `haiku.Conv3DTranspose`, ``{"w": (kd, kh, kw, F, C), "b": (F,)}``, or a `haiku.Conv3D`.

    Args:
      params: those of the module.
      module: "Conv3DTranspose" or "Conv3D", whose "w" is ``(kd, kh, kw, C // G, F)``, as ours is.

    Example:
      >>> import numpy as np
      >>> from_haiku({"w": np.ones((2, 2, 2, 8, 3), "f4")})["kernel"].shape
      (2, 2, 2, 8, 3)
    """
    if not isinstance(params, Mapping) or "w" not in params or not set(params) <= {"w", "b"}:
        found = sorted(map(str, params)) if isinstance(params, Mapping) else type(params).__name__
        raise ValueError(f"`params` must be those of one Haiku module, 'w' and 'b', not {found}.")
    arrays = _common.checked({"kernel": params["w"]})
    if _of_haiku(module) == "Conv3DTranspose":
        arrays["kernel"] = turned(arrays["kernel"])
    if "b" in params:
        arrays["bias"] = _common.numpy("b", params["b"]).reshape(-1)  # (F, 1, 1, 1) with channels first
        _common.check_bias("params", arrays)
    return _common.as_jax(arrays)


def to_haiku(
    params: Mapping[str, Any], data_format: str = "channels_last", module: str = "Conv3DTranspose"
) -> _common.Params:
    """Parameters for a `haiku.Conv3DTranspose` or a `haiku.Conv3D`: ``{"w": ..., "b": ...}``.

    Args:
      params: ``{"kernel", "bias"}`` as here.
      data_format: the module's; with "channels_first" its bias is ``(F, 1, 1, 1)``.
      module: "Conv3DTranspose" or "Conv3D".

    Example:
      >>> import numpy as np
      >>> {name: value.shape for name, value in to_haiku({"kernel": np.ones((2, 2, 2, 8, 3), "f4")}).items()}
      {'w': (2, 2, 2, 8, 3)}
    """
    arrays = _common.checked(params)
    result = {"w": turned(arrays["kernel"]) if _of_haiku(module) == "Conv3DTranspose" else arrays["kernel"]}
    if "bias" in arrays:
        first = data_format in ("channels_first", "NCDHW", "NC...")
        result["b"] = arrays["bias"].reshape(-1, 1, 1, 1) if first else arrays["bias"]
    return _common.as_jax(result)


def _of_haiku(module: str) -> str:
    if module not in HAIKU:
        raise ValueError(f"{args.received('module', module)} must be one of {', '.join(map(repr, HAIKU))}.")
    return module


def spec_from_haiku(module: Any) -> Conv3DTransposeSpec | Conv3DSpec:
    """The operation of a `haiku.Conv3DTranspose` or a `haiku.Conv3D`.

    The former's ``output_shape`` is the ``output_size`` of the call here.

    Example:
      >>> from types import SimpleNamespace
      >>> module = SimpleNamespace(output_channels=8, kernel_shape=(3, 3, 3), stride=(2, 2, 2), padding="SAME",
      ...     mask=None, with_bias=True, data_format="channels_last", output_shape=None)
      >>> spec_from_haiku(module).output_shape((1, 4, 4, 4, 3))
      (1, 8, 8, 8, 8)
    """
    names = ("kernel_shape", "stride", "padding", "output_channels", "mask", "data_format")
    _common.wanted("module", module, "haiku.Conv3DTranspose or haiku.Conv3D", *names)
    if module.mask is not None:
        raise ValueError("a Haiku module with a mask has no counterpart; multiply the mask into its weights.")
    spans, strides = three(module.kernel_shape), three(module.stride)
    first = module.data_format in ("channels_first", "NCDHW", "NC...")
    common: dict[str, Any] = {"kernel_size": spans, "strides": strides, "use_bias": module.with_bias}
    common["data_format"] = "channels_first" if first else "channels_last"
    if not hasattr(module, "output_shape"):
        common |= {"dilation_rate": module.kernel_dilation, "groups": module.feature_group_count}
        return Conv3DSpec(module.output_channels, padding=added(module.padding, spans, strides), **common)
    if module.output_shape is not None:
        return Conv3DTransposeSpec(module.output_channels, padding=module.padding, **common)
    return Conv3DTransposeSpec(
        module.output_channels, **crops(lax_padding(module.padding, spans, strides), spans), **common
    )
