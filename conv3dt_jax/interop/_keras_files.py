"""Weights in Keras's files, read and rewritten with h5py alone: `.keras`, `.weights.h5` and the older `.h5`.

Layouts, as Keras 3 (saving_lib.py) and Keras 1 and 2 (hdf5_format.py) write them:

- `.weights.h5`: a group for each layer, ``layers/conv3d_transpose_1`` and deeper for models in models, whose subgroup
  ``vars`` holds the arrays ``0``, ``1``, ... and the layer's name as an attribute;
- `.keras`: a zip of ``config.json``, ``metadata.json`` and such a file, ``model.weights.h5``;
- older `.h5`: under ``model_weights`` (a whole model) or at the top (weights alone), a group for each layer with an
  attribute ``weight_names``; the model's config is JSON in the attribute ``model_config``.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from conv3dt_jax.interop import _common

WEIGHTS = "model.weights.h5"
_BOMB_FLOOR, _BOMB_RATIO = 64 << 20, 1000  # a few kilobytes that claim to be gigabytes are refused


@dataclasses.dataclass(frozen=True)
class Record:
    """A layer in a file: its name, the name of its class where the file says it, and where its arrays are."""

    name: str
    kind: str | None
    datasets: Mapping[str, str]  # the part, "kernel" or "bias", to the path in the file
    shapes: Mapping[str, tuple[int, ...]]

    def __str__(self) -> str:
        shapes = ", ".join(f"{part} {shape}" for part, shape in self.shapes.items())
        return f"{self.kind or 'a convolution'}, {shapes}"


def read(path: Path) -> dict[str, tuple[Record, dict[str, np.ndarray]]]:
    """The 3-D convolutions of a file, transposed or not, by name; each with its arrays."""
    with opened(path) as file:
        return {
            name: (record, {part: value(file, place) for part, place in record.datasets.items()})
            for name, record in records(path, file).items()
        }


def config(path: Path) -> Mapping[str, Any]:
    """The model's config; a `ValueError` where the file has weights alone."""
    if zipfile.is_zipfile(path):
        with open_archive(path) as archive:
            return _json(path, member(path, archive, "config.json"))
    try:
        with opened(path) as file:
            text = file.attrs.get("model_config")
    except (KeyError, OSError, RuntimeError) as error:
        raise ValueError(f"{path.name} is damaged: {error}") from error
    if text is None:
        raise ValueError(
            f"{path.name} holds weights without a config; take the layer's arguments from where it was made."
        )
    return _json(path, text)


def opened(path: Path) -> Any:
    """The HDF5 file, or the one inside of a `.keras` archive."""
    h5py = _common.needed("h5py", "keras")
    source: Any = path
    if zipfile.is_zipfile(path):
        with open_archive(path) as archive:
            source = io.BytesIO(member(path, archive, WEIGHTS))
    try:
        return h5py.File(source, "r")
    except OSError as error:
        raise ValueError(f"{path.name} is no HDF5 file, no .keras archive, or is damaged: {error}") from error


def open_archive(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path.name} is a damaged .keras archive: {error}") from error


def member(path: Path, archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        info = archive.getinfo(name)
        if info.file_size > max(_BOMB_FLOOR, _BOMB_RATIO * info.compress_size):
            raise ValueError(
                f"{path.name}: {name} claims {info.file_size} bytes in {info.compress_size}; it is refused."
            )
        return archive.read(name)
    except (KeyError, zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError) as error:
        raise ValueError(f"{path.name} is no .keras archive, or is damaged: {error}") from error


def _json(path: Path, text: Any) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path.name} has a config that is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} has a config that is no JSON object.")
    return value


def records(path: Path, file: Any) -> dict[str, Record]:
    """The convolutions of a file by name; where a name is there twice, by the names on the way to it."""
    try:
        found = list(_legacy(file) if "layer_names" in _top(file).attrs else _current(file))
    except (KeyError, OSError, RuntimeError, AttributeError, TypeError) as error:
        raise ValueError(f"{path.name} is damaged, or no file of Keras's: {error}") from error
    return unique([(place, record.name, record) for place, record in found])


def unique(found: Sequence[tuple[str, str, Any]]) -> dict[str, Any]:
    """Of (path, name, what) the last by the name; by the path, where the name is there twice."""
    names, paths = [name for _, name, _ in found], [path for path, _, _ in found]
    twice = sorted({path for path in paths if paths.count(path) > 1})
    if twice:
        raise ValueError(f"two layers have the one path {twice[0]!r}; they cannot be told apart.")
    return {name if names.count(name) == 1 else path: one for path, name, one in found}


def _top(file: Any) -> Any:
    return _group(file, "model_weights") if "model_weights" in file else file


def _current(file: Any) -> Iterator[tuple[str, Record]]:
    seen: set[Any] = set()

    def walk(group: Any, place: str, names: str) -> Iterator[tuple[str, Record]]:
        variables = _group(group, "vars") if "vars" in group else None
        label = place.rpartition("/")[2]
        name = label if variables is None else str(variables.attrs.get("name", label))
        path = f"{names}{name}" if place else ""
        if variables is not None:
            yield from arrays(variables, place, path, name)
        for key in group:
            child = group[key] if _is_group(group, key) else None
            if child is None or key == "vars":
                continue
            if child.id in seen:
                raise ValueError(f"the group {key!r} is there twice, which Keras never writes; that is refused.")
            seen.add(child.id)
            within = names if variables is None or not path else f"{path}/"
            yield from walk(child, f"{place}/{key}".lstrip("/"), within)

    def arrays(group: Any, place: str, path: str, name: str) -> Iterator[tuple[str, Record]]:
        keys = sorted((key for key in group if key.isdigit()), key=int)
        label = place.rpartition("/")[2].rstrip("0123456789").rstrip("_")
        kind = "".join(word.capitalize() for word in label.split("_")).replace("Conv3d", "Conv3D") or None
        places = [f"{place}/vars/{key}".lstrip("/") for key in keys]
        for _, record in _record(file, place, name, kind, places):
            yield path, record

    return walk(file, "", "")


def _is_group(parent: Any, name: str) -> bool:
    kind = parent.get(name, getclass=True, getlink=True)
    return kind is not None and kind.__name__ == "HardLink" and parent.get(name, getclass=True).__name__ == "Group"


def _legacy(file: Any) -> Iterator[tuple[str, Record]]:
    top = _top(file)
    prefix = "model_weights/" if "model_weights" in file else ""
    for layer in _names(top, "layer_names"):
        weights = _names(_group(top, layer), "weight_names")
        owners = list(dict.fromkeys(weight.rpartition("/")[0] for weight in weights))  # several in a model in the model
        for owner in owners:
            steps = owner.split("/") if owner else [layer]
            steps = steps[steps.index(layer) :] if layer in steps else [layer, *steps]
            places = [f"{prefix}{layer}/{weight}" for weight in weights if weight.rpartition("/")[0] == owner]
            yield from _record(file, "/".join(steps), steps[-1], None, places)


def _names(group: Any, attribute: str) -> list[str]:
    """Names in an attribute, which Keras splits over several where they are many."""
    values = [group.attrs[attribute]] if attribute in group.attrs else []
    for index in range(len(group.attrs)):
        if f"{attribute}{index}" in group.attrs:
            values.append(group.attrs[f"{attribute}{index}"])
    return [name.decode() if isinstance(name, bytes) else str(name) for part in values for name in part]


def _record(file: Any, place: str, name: str, kind: str | None, places: list[str]) -> Iterator[tuple[str, Record]]:
    places = sorted(places, key=lambda one: -_dataset(file, one).ndim)  # the kernel first, whatever the order
    shapes = [tuple(_dataset(file, one).shape) for one in places]
    if not shapes or len(shapes[0]) != 5:
        return
    if len(shapes) > 2 or any(len(shape) != 1 for shape in shapes[1:]):
        return  # an optimizer, whose slots come with counters, or a layer of another make, such as a quantized one
    parts = dict(zip(_common.PARTS, zip(places, shapes, strict=True), strict=False))
    datasets, sizes = {part: p for part, (p, _) in parts.items()}, {part: s for part, (_, s) in parts.items()}
    yield place, Record(name, kind, datasets, sizes)


def _group(parent: Any, place: str) -> Any:
    for name in filter(None, place.split("/")):
        parent = _own(parent, name, "Group")
    return parent


def _dataset(parent: Any, place: str) -> Any:
    groups, _, last = place.rpartition("/")
    data = _own(_group(parent, groups), last, "Dataset")
    if data.external or data.is_virtual:
        raise ValueError(f"the dataset {place!r} is stored in other files; that is refused.")
    size, stored = math.prod(data.shape) * data.dtype.itemsize, data.id.get_storage_size()
    if size > max(_BOMB_FLOOR, _BOMB_RATIO * stored):
        raise ValueError(f"the dataset {place!r} claims {size} bytes in {stored}; that is refused.")
    return data


def _own(parent: Any, name: str, kind: str) -> Any:
    """A child that lies in this file: links to others are refused."""
    link = parent.get(name, getclass=True, getlink=True)
    if link is None or link.__name__ != "HardLink":
        raise ValueError(f"{name!r} is {'missing' if link is None else 'a link'}; that is refused.")
    child = parent[name]
    if type(child).__name__ != kind:
        raise ValueError(f"{name!r} is a {type(child).__name__} where a {kind} is wanted.")
    return child


def value(file: Any, place: str) -> np.ndarray:
    data = _dataset(file, place)
    try:
        array = np.asarray(data[...])
    except (OSError, RuntimeError) as error:
        raise ValueError(f"the dataset {place!r} cannot be read, the file is damaged: {error}") from error
    if data.attrs.get("dtype") == "bfloat16" or array.dtype == np.dtype("V2"):  # an older .h5 does not say it
        array = array.view(jnp.bfloat16)
    if not jnp.issubdtype(array.dtype, jnp.number):
        raise ValueError(f"the dataset {place!r} holds {array.dtype}, no numbers.")
    return array
