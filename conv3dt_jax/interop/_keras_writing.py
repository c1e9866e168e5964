"""Weights into Keras's files, old and new, with h5py alone; the layouts are those of `_keras_files`."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from conv3dt_jax.interop import _common, _keras_files

_GROUPS = {"Conv3DTranspose": "conv3d_transpose", "Conv3D": "conv3d"}
"""Of a layer in a file: the name of its class."""


def write(path: Path, changes: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Puts other arrays into layers of a file; all of them, or the file stays as it was."""
    with _keras_files.opened(path) as file:
        records = _keras_files.records(path, file)
        for name, arrays in changes.items():
            record = _common.pick(path.name, records, name)
            there = {part: _keras_files.value(file, place) for part, place in record.datasets.items()}
            _common.fit(f"layer {name!r} of {path.name}", there, arrays)
    places = {records[name].datasets[part]: array for name, parts in changes.items() for part, array in parts.items()}
    with _common.replacing(path) as new:
        if not zipfile.is_zipfile(path):
            shutil.copyfile(path, new)
            _overwrite(new, places)
            return
        with _keras_files.open_archive(path) as archive, zipfile.ZipFile(new, "w") as copy:
            for member in archive.infolist():
                data = _keras_files.member(path, archive, member.filename)
                if member.filename == _keras_files.WEIGHTS:
                    buffer = io.BytesIO(data)
                    _overwrite(buffer, places)
                    data = buffer.getvalue()
                copy.writestr(member, data)


def create_archive(
    path: Path, kind: str, layer: Mapping[str, Any], channels: int, arrays: Mapping[str, np.ndarray]
) -> None:
    """A new `.keras` of a `Sequential` model with one convolution: Keras's class ``kind`` with the config ``layer``."""
    name = layer["name"] or _GROUPS[kind]
    space: list[int | None] = [None] * 3
    shape = [None, channels, *space] if layer["data_format"] == "channels_first" else [None, *space, channels]
    built = {"build_config": {"input_shape": shape}}
    start = {"batch_shape": shape, "dtype": arrays["kernel"].dtype.name, "sparse": False, "name": "input_layer"}
    layers = [
        _keras_object("keras.layers", "InputLayer", start),
        _keras_object("keras.layers", kind, {**layer, "name": name}) | built,
    ]
    model = {"name": "sequential", "trainable": True, "layers": layers, "build_input_shape": shape}
    with _common.replacing(path) as new, zipfile.ZipFile(new, "w") as archive:
        archive.writestr("metadata.json", json.dumps({"keras_version": "3.0.0", "date_saved": ""}))
        archive.writestr("config.json", json.dumps(_keras_object("keras", "Sequential", model) | built))
        weights = io.BytesIO()
        _write_one(weights, name, arrays, kind)
        archive.writestr(_keras_files.WEIGHTS, weights.getvalue())


def _keras_object(module: str, name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {"module": module, "class_name": name, "config": config, "registered_name": None}


def create(path: Path, layers: Mapping[str, Mapping[str, np.ndarray]], kind: str = "Conv3DTranspose") -> None:
    """A new file of weights: a `.weights.h5` of one layer of a kind, or an older `.h5`, which Keras loads by names."""
    if path.name.endswith(".weights.h5"):
        if len(layers) > 1:
            raise ValueError(
                f"{path.name}: in a new .weights.h5 Keras tells layers apart by their order alone, which a dict does "
                "not keep through JAX. Write into the model's own file, or make a .h5 and load it with by_name=True."
            )
        with _common.replacing(path) as new:
            _write_one(new, *next(iter(layers.items())), kind)
        return
    wrong = [name for name in layers if "/" in name or name in (".", "..")]
    if wrong:
        raise ValueError(f"{wrong[0]!r} is no name for a layer in a Keras file; choose one without '/'.")
    h5py = _common.needed("h5py", "keras")
    with _common.replacing(path) as new, h5py.File(new, "w") as file:
        file.attrs["layer_names"] = [name.encode() for name in layers]
        for name, arrays in layers.items():
            group = file.create_group(name)
            group.attrs["weight_names"] = [f"{name}/{part}".encode() for part in arrays]
            for part, array in arrays.items():
                group.create_dataset(f"{name}/{part}", data=array)


def _write_one(target: Any, name: str, arrays: Mapping[str, np.ndarray], kind: str) -> None:
    """The weights file of a model of one convolution."""
    h5py = _common.needed("h5py", "keras")
    with h5py.File(target, "w") as file:
        group = file.create_group(f"layers/{_GROUPS[kind]}/vars")
        group.attrs["name"] = name
        for number, array in enumerate(arrays.values()):
            data = group.create_dataset(str(number), data=array)
            if array.dtype == jnp.bfloat16:
                data.attrs["dtype"] = "bfloat16"


def _overwrite(file: Any, places: Mapping[str, np.ndarray]) -> None:
    h5py = _common.needed("h5py", "keras")
    with h5py.File(file, "r+") as opened:
        for place, array in places.items():
            opened[place][...] = array.view(opened[place].dtype) if array.dtype == jnp.bfloat16 else array
