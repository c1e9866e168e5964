"""Files of one framework as files of another: the work behind ``python -m conv3dt_jax convert``."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import serialization

from conv3dt_jax.interop import _common, _keras, _keras_files, _keras_writing, _pytorch

KERAS, PYTORCH, FLAX = "keras", "pytorch", "flax"
_SUFFIXES = {
    ".keras": KERAS, ".h5": KERAS, ".hdf5": KERAS, ".pt": PYTORCH, ".pth": PYTORCH, ".msgpack": FLAX,
    ".safetensors": "",
}  # fmt: skip


def convert(
    source: Path,
    target: Path,
    *,
    layers: Sequence[tuple[str, str]] = (),
    to: str | None = None,
    template: Path | None = None,
    overwrite: bool = False,
) -> dict[str, tuple[str, dict[str, np.ndarray]]]:
    """Converts the 3-D convolutions of a file.

    Args:
      source: a file of Keras, PyTorch or Flax.
      target: the file to write; its ending says for which framework.
      layers: the layers to take, each with its new name; none for all, as they are called.
      to: "keras", "pytorch" or "flax", where the ending leaves it open (`.safetensors`).
      template: for Keras: a file of the model that is to get the weights, of which a copy is written. Without it a
        `.h5` can be made, which Keras loads by name, or the `.weights.h5` of one layer.
      overwrite: whether ``target`` may be there already.

    Returns:
      What was written: by its name in ``target`` the name in ``source`` and the arrays.

    Raises:
      ValueError, FileNotFoundError: nothing has been written then.
    """
    source = _common.existing(source)
    kind = _framework(target, to)
    if target.exists() and not overwrite:
        raise ValueError(f"{target} is there already; choose another name, or allow it to be overwritten.")
    found = _read(source)
    chosen = list(layers) or [(name, name) for name in found]
    for names in zip(*chosen, strict=True):
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"{', '.join(map(repr, twice))} would be converted or written twice; give each layer once."
            )
    taken = {new: (old, _common.pick(source.name, found, old, _common.shapes)) for old, new in chosen}
    if not taken:
        raise ValueError(f"{source.name} has no 3-D convolution to convert.")
    if template is not None and kind != KERAS:
        raise ValueError("a template is for Keras's files alone.")
    _write(target, kind, {name: arrays for name, (_, arrays) in taken.items()}, template)
    return taken


def _framework(target: Path, to: str | None) -> str:
    known = _SUFFIXES.get(target.suffix)
    if known is None:
        raise ValueError(f"{target.name} must end in one of {', '.join(_SUFFIXES)}.")
    if to and known and to != known:
        raise ValueError(f"{target.name} is a file for {known}, not for {to}.")
    if not (known or to):
        raise ValueError(f"{target.name} may be for PyTorch or for Flax; say which: pytorch or flax.")
    if to == KERAS and not known:
        raise ValueError(f"{target.name}: Keras reads .keras, .weights.h5 and .h5.")
    return known or str(to)


def _read(source: Path) -> dict[str, dict[str, np.ndarray]]:
    kind = _SUFFIXES.get(source.suffix)
    if kind is None:
        raise ValueError(f"{source.name} must end in one of {', '.join(_SUFFIXES)}.")
    if kind == KERAS:
        return {name: arrays for name, (_, arrays) in _keras_files.read(source).items()}
    if kind == FLAX:
        return dict(_flatten(_restored(source)))
    if kind == "":
        tensors = _pytorch.read_safetensors(source)
        if any(name.rpartition(".")[2] == "kernel" for name in tensors):
            return dict(_flatten(_nested({tuple(name.split(".")): array for name, array in tensors.items()})))
        return _pytorch.layers(tensors)
    return _pytorch.layers(_pytorch.read(source))


def _restored(source: Path) -> Any:
    try:
        return serialization.msgpack_restore(source.read_bytes())
    except Exception as error:  # msgpack has many of its own
        raise ValueError(f"{source.name} is no Flax msgpack, or is damaged: {error}") from error


def _flatten(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """The convolutions in a tree of parameters, by their paths joined with dots."""
    if not isinstance(tree, Mapping):
        return
    if not path and isinstance(tree.get("params"), Mapping):  # the rest: statistics, an optimizer's moments
        tree = tree["params"]
    if np.ndim(tree.get("kernel", 0)) == 5:
        parts = {part: _common.numpy(part, tree[part]) for part in _common.PARTS if tree.get(part) is not None}
        yield ".".join(path), parts
    for name, value in tree.items():
        yield from _flatten(value, (*path, str(name)))


def _nested(flat: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        at = tree
        for name in path[:-1]:
            at = at.setdefault(name, {})
            if not isinstance(at, dict):
                raise ValueError(f"{'.'.join(path)!r} would lie within an array; rename that layer.")
        if path[-1] in at:
            raise ValueError(f"{'.'.join(path)!r} is the name of a layer and of an array; rename that layer.")
        at[path[-1]] = value
    return tree


def _write(target: Path, kind: str, layers: Mapping[str, Mapping[str, np.ndarray]], template: Path | None) -> None:
    if kind == KERAS:
        _write_keras(target, layers, template)
    elif kind == PYTORCH:
        _pytorch.to_pytorch(layers[""] if set(layers) == {""} else layers, target)
    else:
        paths = {(*name.split("."), part): a for name, parts in layers.items() for part, a in parts.items()}
        flat = {tuple(filter(None, path)): np.ascontiguousarray(array) for path, array in paths.items()}
        with _common.replacing(target) as new:
            if target.suffix == ".safetensors":
                safetensors = _common.needed("safetensors.numpy", "safetensors")
                safetensors.save_file({".".join(path): array for path, array in flat.items()}, new)
            else:
                new.write_bytes(serialization.msgpack_serialize(_nested(flat)))


def _write_keras(target: Path, layers: Mapping[str, Any], template: Path | None) -> None:
    if template is None:
        if target.suffix != ".h5":
            raise ValueError(f"{target.name} needs a template: a file of the Keras model that is to get the weights.")
        _keras_writing.create(target, {name or "conv3d_transpose": arrays for name, arrays in layers.items()})
        return
    if _ending(template) != _ending(target):
        raise ValueError(f"the template {template.name} and {target.name} must have the same ending.")
    with _common.replacing(target) as new:
        shutil.copyfile(_common.existing(template), new)
        try:
            _keras.to_keras(layers, new)
        except ValueError as error:
            raise ValueError(str(error).replace(new.name, template.name)) from error


def _ending(path: Path) -> str:
    return ".weights.h5" if path.name.endswith(".weights.h5") else path.suffix
