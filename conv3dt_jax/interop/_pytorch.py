"""PyTorch: a module, a `state_dict`, a `.pt` of weights, a `.safetensors`.

``ConvTranspose3d`` keeps its weight as ``(C, F // G, kd, kh, kw)`` and scatters with it as this package does, so that
the kernel is the weight with its axes in another order; so it is for ``Conv3d``, which has ``(F, C // G, kd, kh, kw)``.
"""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from conv3dt_jax._spec import Conv3DSpec, Conv3DTransposeSpec
from conv3dt_jax.interop import _common

_TO_KERNEL, _TO_WEIGHT = (2, 3, 4, 1, 0), (4, 3, 0, 1, 2)


def from_pytorch(source: Any, layer: str | None = None) -> _common.Params:
    """Parameters out of PyTorch: of one layer, or of all 3-D convolutions of a model, transposed or not.

    Args:
      source: a `torch.nn.Module`, a ``state_dict`` (of tensors or arrays), or the path of a `.safetensors`, `.pt` or
        `.pth` file. A pickle is read as weights alone: one that would run code is refused.
      layer: the layer's name in a model, "decoder.up".

    Returns:
      ``{"kernel": (kd, kh, kw, F // G, C), "bias": (F,)}`` of the layer, the kernel ``(kd, kh, kw, C // G, F)`` of a
      ``Conv3d``; without ``layer`` such dicts by the layers' names, or the parameters themselves where the source is a
      layer on its own.

    Raises:
      ValueError: no layer of that name (the message lists those there are), or a file that is damaged or unsafe.
      FileNotFoundError, ImportError: no file, no torch or safetensors.

    Example:
      >>> import numpy as np
      >>> from conv3dt_jax import interop
      >>> state = {"up.weight": np.ones((3, 4, 2, 2, 2), "f4"), "up.bias": np.zeros(4, "f4")}
      >>> interop.from_pytorch(state, "up")["kernel"].shape
      (2, 2, 2, 4, 3)
    """
    name, state = _state(source)
    found = layers(state, layer)
    if layer is not None:
        return _common.as_jax(_common.pick(name, found, layer, _common.shapes))
    if set(found) == {""}:
        return _common.as_jax(found[""])
    return {one: _common.as_jax(arrays) for one, arrays in found.items()}


def to_pytorch(params: Mapping[str, Any], target: Any = None, layer: str | None = None) -> dict[str, Any]:
    """Parameters as PyTorch's ``state_dict``, and into a module or a file where one is given.

    Args:
      params: those of one layer; or dicts of them by the names of a model's layers.
      target: None; a `torch.nn.Module`, whose weights are replaced (its other layers stay); or the path of a
        `.safetensors`, `.pt` or `.pth` file to write.
      layer: the layer's name in a model, where ``params`` are those of one: the prefix of the names.

    Returns:
      ``{"weight": ..., "bias": ...}``, or "decoder.up.weight" and so on: tensors, where
      PyTorch is installed or asked for;
      else, for `.safetensors`, NumPy arrays.

    Raises:
      ValueError: shapes, names or dtypes that differ from the module's, which then stays as it was.

    Example:
      >>> import numpy as np, pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "up.safetensors"
      >>> params = {"kernel": np.ones((2, 2, 2, 4, 3), "f4"), "bias": np.zeros(4, "f4")}
      >>> sorted(to_pytorch(params, path, layer="up"))
      ['up.bias', 'up.weight']
      >>> from_pytorch(path, "up")["kernel"].shape
      (2, 2, 2, 4, 3)
    """
    state = _flat(params, layer)
    if isinstance(target, str | os.PathLike):
        return _write(Path(target), state)
    tensors = _tensors(state)
    if target is not None:
        _common.wanted("target", target, "torch.nn.Module, or the path of a file", "state_dict", "load_state_dict")
        there = target.state_dict()
        missing = sorted(set(tensors) - set(there))
        if missing:
            raise ValueError(f"the module has no {', '.join(missing)}; it has {', '.join(sorted(there))}.")
        extra = {name for name in there if name.rpartition(".")[0] in {key.rpartition(".")[0] for key in tensors}}
        _common.fit("the module", {name: there[name] for name in extra}, _Shaped.of(tensors))
        target.load_state_dict({**there, **tensors})
    return tensors


def spec_from_pytorch(module: Any) -> Conv3DTransposeSpec | Conv3DSpec:
    """The operation of a ``torch.nn.ConvTranspose3d`` or ``torch.nn.Conv3d``.

    ``apply(from_pytorch(module), inputs, spec)`` gives its output.

    Args:
      module: the module, or any object with its attributes.

    Raises:
      ValueError: a ``padding_mode`` other than "zeros", save a "circular" one that is aligned as it is here.

    Example:
      >>> from types import SimpleNamespace
      >>> module = SimpleNamespace(
      ...     out_channels=8, kernel_size=(3, 3, 3), stride=(2, 2, 2), padding=(1, 1, 1), output_padding=(1, 1, 1),
      ...     dilation=(1, 1, 1), groups=2, bias=None, padding_mode="zeros")
      >>> spec_from_pytorch(module).output_shape((1, 4, 5, 5, 5))
      (1, 8, 10, 10, 10)
    """
    names = ("kernel_size", "stride", "padding", "output_padding", "dilation", "groups", "out_channels")
    _common.wanted("module", module, "torch.nn.ConvTranspose3d or torch.nn.Conv3d", *names)
    if len(module.kernel_size) != 3:
        raise TypeError(f"a torch.nn.ConvTranspose3d or torch.nn.Conv3d is wanted, not {type(module).__name__}.")
    common: dict[str, Any] = {
        "filters": module.out_channels, "kernel_size": module.kernel_size, "strides": module.stride,
        "dilation_rate": module.dilation, "groups": module.groups, "use_bias": module.bias is not None,
        "data_format": "channels_first",
    }  # fmt: skip
    mode = getattr(module, "padding_mode", "zeros")
    if not getattr(module, "transposed", True):
        return Conv3DSpec(padding=module.padding if mode == "zeros" else _around(module, mode), **common)
    if mode != "zeros":
        raise ValueError(f"padding_mode={mode!r} is none of ConvTranspose3d's; it has 'zeros' alone.")
    return Conv3DTransposeSpec(padding=module.padding, output_padding=module.output_padding, **common)


def _around(module: Any, mode: str) -> str:
    """The padding of a ``Conv3d`` that pads with other things than zeros."""
    if module.padding == "valid" or not any(map(bool, module.padding)):
        return "valid"
    if mode != "circular":
        raise ValueError(f"padding_mode={mode!r} has no counterpart here; pad the inputs with jax.numpy.pad before.")
    reach = [(k - 1) * d for k, d in zip(module.kernel_size, module.dilation, strict=True)]
    if module.padding != "same" and (max(module.stride) > 1 or [2 * p for p in module.padding] != reach):
        raise ValueError(
            f"padding_mode='circular' with stride {module.stride} and padding {module.padding} is not aligned as "
            "padding='circular' is here; pad the inputs with jax.numpy.pad(mode='wrap') before."
        )
    return "circular"


def _state(source: Any) -> tuple[str, Mapping[str, Any]]:
    """A name for messages, and the tensors by name."""
    if isinstance(source, str | os.PathLike):
        path = _common.existing(source)
        return path.name, read(path)
    if isinstance(source, Mapping):
        return "the state_dict", source
    if callable(getattr(source, "state_dict", None)):
        return f"the module {type(source).__name__}", source.state_dict()
    raise TypeError(
        f"`source` must be a torch module, a state_dict or the path of a file, not {type(source).__name__}."
    )


def read(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    torch = _common.needed("torch", "pytorch")
    try:
        with warnings.catch_warnings():  # of pickles that are none of torch.save's: they are errors below
            warnings.simplefilter("ignore", UserWarning)
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "nsupported" not in str(error):
            raise ValueError(f"{path.name} is no file of torch.save, or is damaged: {error}") from error
        raise ValueError(
            f"{path.name} holds more than weights: its pickle would run code, and is refused. Save module.state_dict() "
            f"instead of the module. ({str(error).splitlines()[0]})"
        ) from error
    except Exception as error:  # damaged files raise errors of every kind
        raise ValueError(f"{path.name} is no file of torch.save, or is damaged: {error}") from error
    for key in ("state_dict", "model_state_dict", "model"):  # as Lightning keeps it, and PyTorch's own examples
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping):
        raise ValueError(f"{path.name} holds a {type(state).__name__}, no state_dict.")
    return state


def read_safetensors(path: Path) -> Mapping[str, Any]:
    safetensors = _common.needed("safetensors.numpy", "safetensors")
    try:
        return safetensors.load_file(path)
    except Exception as error:  # the package has errors of its own, and those of Rust
        raise ValueError(f"{path.name} is no safetensors file, or is damaged: {error}") from error


def layers(state: Mapping[str, Any], layer: str | None = None) -> dict[str, dict[str, np.ndarray]]:
    """The layers whose weight has five dimensions, by the prefix of their names; ``layer`` is the one wanted."""
    found = {}
    for key, value in state.items():
        prefix, dot, part = str(key).rpartition(".")
        if _rank(value) != 5:
            continue
        if part != "weight":
            _refuse_parametrized(str(key), layer)
            continue
        arrays = {"kernel": _common.numpy(str(key), value).transpose(_TO_KERNEL)}
        bias = state.get(f"{prefix}{dot}bias")
        if bias is not None:
            arrays["bias"] = _common.numpy(f"{prefix}{dot}bias", bias)
        _common.check_bias(prefix, arrays)
        found[prefix] = arrays
    if not found:
        shown = ", ".join(sorted(map(str, state))[:20]) or "nothing"
        raise ValueError(f"there is no weight of a 3-D convolution, `weight` with 5 dimensions, among: {shown}.")
    return found


def _rank(value: Any) -> int:
    try:
        return len(getattr(value, "shape", ()))
    except RuntimeError:  # a lazy parameter of PyTorch has no shape yet
        return 0


def _refuse_parametrized(key: str, layer: str | None) -> None:
    """A weight that is computed from others (weight norm, spectral norm, pruning) is not there to be read."""
    for mark in (".parametrizations.weight.", "parametrizations.weight.", ".weight_", "weight_"):
        prefix, found, _ = key.partition(mark)
        if found and layer in (None, prefix):
            raise ValueError(
                f"{key!r}: the weight of {prefix or 'the layer'!r} is computed from others (weight norm or the like); "
                "take that away first, with torch.nn.utils.parametrize.remove_parametrizations or remove_weight_norm."
            )


def _flat(params: Mapping[str, Any], layer: str | None) -> dict[str, np.ndarray]:
    if isinstance(params, Mapping) and set(params) == {"params"}:
        params = params["params"]
    one = _common.is_layer(params)
    if not one and layer is not None:
        raise ValueError(f"`layer={layer!r}` names one layer, but `params` are those of several: {sorted(params)}.")
    layers = {layer or "": _common.checked(params)} if one else _nested(params, "")
    state = {}
    for name, arrays in layers.items():
        prefix = f"{name}." if name else ""
        state[f"{prefix}weight"] = np.ascontiguousarray(arrays["kernel"].transpose(_TO_WEIGHT))
        if "bias" in arrays:
            state[f"{prefix}bias"] = np.ascontiguousarray(arrays["bias"])
    return state


def _nested(params: Any, prefix: str) -> dict[str, dict[str, np.ndarray]]:
    if _common.is_layer(params):
        return {prefix: _common.checked(params, prefix)}
    if not isinstance(params, Mapping) or not params:
        raise ValueError(f"`params` hold no 'kernel' under {prefix or 'the top'}.")
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, value in params.items():
        found |= _nested(value, f"{prefix}.{name}".lstrip("."))
    return found


def _tensors(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    torch = _common.needed("torch", "pytorch")

    def tensor(array: np.ndarray) -> Any:
        if array.dtype == jnp.bfloat16:
            return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
        return torch.from_numpy(array.copy())

    return {name: tensor(array) for name, array in state.items()}


def _write(path: Path, state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        safetensors = _common.needed("safetensors.numpy", "safetensors")
        with _common.replacing(path) as new:
            safetensors.save_file(dict(state), new)
        return dict(state)
    if path.suffix not in (".pt", ".pth"):
        raise ValueError(f"{path.name} must end in .safetensors, .pt or .pth.")
    torch, tensors = _common.needed("torch", "pytorch"), _tensors(state)
    with _common.replacing(path) as new:
        torch.save(tensors, new)
    return tensors


class _Shaped:
    """A tensor's shape and dtype in the form that `_common.fit` compares."""

    def __init__(self, tensor: Any) -> None:
        self.shape, self.dtype = tuple(tensor.shape), str(tensor.dtype)

    @classmethod
    def of(cls, tensors: Mapping[str, Any]) -> dict[str, Any]:
        return {name: cls(tensor) for name, tensor in tensors.items()}
