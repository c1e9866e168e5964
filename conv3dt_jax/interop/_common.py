"""What the directions share: parameters and checks of them, optional packages, files that never change by half."""

from __future__ import annotations

import contextlib
import importlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

Params: TypeAlias = dict[str, Any]
"""``{"kernel": (kd, kh, kw, F // G, C), "bias": (F,)}`` of one layer, or such dicts by the names of layers.

The kernel of an ordinary convolution is ``(kd, kh, kw, C // G, F)``.
"""

PARTS = ("kernel", "bias")


def needed(package: str, extra: str) -> Any:
    """An optional package, imported when it is first used."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"this needs {package.split('.')[0]}, which is not installed: pip install 'conv3dt-jax[{extra}]'."
        ) from error


def is_layer(params: Any) -> bool:
    """Whether these are the parameters of one layer, not of a model."""
    return isinstance(params, Mapping) and not isinstance(params.get("kernel"), Mapping) and "kernel" in params


def checked(params: Any, argument: str = "params") -> Params:
    """The parameters of one layer as NumPy arrays: a kernel of rank 5, and a bias or none."""
    if isinstance(params, Mapping) and set(params) == {"params"}:
        params = params["params"]
    if not is_layer(params) or not set(params) <= set(PARTS):
        found = sorted(map(str, params)) if isinstance(params, Mapping) else type(params).__name__
        raise ValueError(f"`{argument}` must be the parameters of one layer, 'kernel' and 'bias', not {found}.")
    if params["kernel"] is None:
        raise ValueError(f"`{argument}['kernel']` is None; a layer has a kernel.")
    arrays = {name: numpy(f"{argument}[{name!r}]", params[name]) for name in PARTS if params.get(name) is not None}
    if arrays["kernel"].ndim != 5:
        raise ValueError(
            f"`{argument}['kernel']` has shape {arrays['kernel'].shape}; it must be (kd, kh, kw, filters // groups, "
            "channels), or of an ordinary convolution (kd, kh, kw, channels // groups, filters)."
        )
    check_bias(argument, arrays)
    return arrays


def check_bias(argument: str, arrays: Mapping[str, np.ndarray]) -> None:
    """A bias has a value for each filter of a transposed kernel, or of an ordinary one, which has them last."""
    if "bias" not in arrays:
        return
    shape, kernel = arrays["bias"].shape, arrays["kernel"].shape
    if len(shape) != 1 or (shape[0] % kernel[3] and shape[0] != kernel[4]) or not shape[0]:
        raise ValueError(
            f"`{argument}['bias']` has shape {shape}; it must be (filters,), and the kernel of shape {kernel} makes "
            f"{kernel[3]} filters in each group."
        )


def wanted(argument: str, module: Any, kind: str, *attributes: str) -> None:
    """Raises where a module is not of the kind that is meant: by what it has, so that no framework is imported."""
    missing = [name for name in attributes if not hasattr(module, name)]
    if missing:
        raise TypeError(f"`{argument}` must be a {kind}, not {type(module).__name__}.")


def numpy(name: str, value: Any) -> np.ndarray:
    """An array of numbers of any framework, as NumPy's, without a copy where that can be."""
    if type(value).__module__.split(".")[0] == "torch":
        value = _from_torch(name, value)
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"`{name}` must be an array, not {type(value).__name__}.") from error
    if not jnp.issubdtype(array.dtype, jnp.number):
        raise TypeError(f"`{name}` must be an array of numbers, not {type(value).__name__} of {array.dtype}.")
    return array


def _from_torch(name: str, tensor: Any) -> np.ndarray:
    torch = needed("torch", "pytorch")
    if tensor.is_meta:
        raise ValueError(f"the tensor `{name}` is on the device 'meta' and holds no values; load the weights first.")
    try:
        tensor = tensor.detach().cpu()
        dense = tensor if tensor.layout == torch.strided else tensor.to_dense()
        tensor = dense.resolve_conj().resolve_neg().contiguous()
        if tensor.dtype == torch.bfloat16:  # NumPy has no bfloat16 of its own: the bits go over
            return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
        return tensor.numpy()
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"the tensor `{name}` cannot be read: {error}") from error


def as_jax(arrays: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """The arrays as JAX's, none of them silently narrower."""
    for name, array in arrays.items():
        if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
            raise TypeError(
                f"the {name} is {array.dtype}, and JAX has 64-bit types switched off; set "
                "jax.config.update('jax_enable_x64', True), or save the weights in 32 bits."
            )
    return {name: jnp.asarray(array) for name, array in arrays.items()}


def fit(what: str, target: Mapping[str, Any], given: Mapping[str, np.ndarray]) -> None:
    """Raises where what would be written has not the names, shapes and dtypes of what is there (arrays, by name)."""
    wanted = {name: (tuple(array.shape), str(array.dtype)) for name, array in target.items()}
    found = {name: (array.shape, str(array.dtype)) for name, array in given.items()}
    if wanted != found:
        raise ValueError(f"{what} has {_shown(wanted)}, but the parameters are {_shown(found)}; nothing was changed.")


def _shown(arrays: Mapping[str, tuple[tuple[int, ...], str]]) -> str:
    return ", ".join(f"{name} {shape} {dtype}" for name, (shape, dtype) in sorted(arrays.items())) or "nothing"


def shapes(arrays: Mapping[str, np.ndarray]) -> str:
    """Arrays in words."""
    return ", ".join(f"{name} {array.shape}" for name, array in arrays.items())


def pick(source: str, found: Mapping[str, Any], layer: str, describe: Callable[[Any], str] = str) -> Any:
    """One layer by its name, or an error that lists those there are."""
    if layer in found:
        return found[layer]
    listed = "\n  ".join(f"{name}: {describe(one)}" for name, one in found.items()) or "none"
    raise ValueError(f"{source} has no layer {layer!r}. Its layers of 3-D convolutions:\n  {listed}")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file beside ``path`` that takes its place when the block ends well, and vanishes otherwise."""
    if path.is_dir() or not path.parent.is_dir():
        what = f"{str(path)!r} is a folder" if path.is_dir() else f"there is no folder {str(path.parent)!r}"
        raise ValueError(f"{what}; name a file to write.")
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    try:
        yield Path(name)
        if path.exists():
            os.chmod(name, path.stat().st_mode & 0o777)
        else:
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def existing(path: Any) -> Path:
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {str(file)!r}.")
    return file
