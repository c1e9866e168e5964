"""Keras: a live layer or model, a `.keras` archive, a `.weights.h5`, an older `.h5`. Kernels keep their layout."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from conv3dt_jax import _layer
from conv3dt_jax.interop import _common, _keras_files, _keras_writing
from conv3dt_jax.linen import Conv3D, Conv3DTranspose, Layer

_LAYERS: dict[str, type[Conv3DTranspose | Conv3D]] = {
    **dict.fromkeys(Conv3DTranspose.kind.names, Conv3DTranspose),
    **dict.fromkeys(Conv3D.kind.names, Conv3D),
}


def from_keras(source: Any, layer: str | None = None) -> _common.Params:
    """Parameters out of Keras: of one layer, or of all 3-D convolutions of a model, transposed or not.

    Args:
      source: a Keras layer or model (of any backend), or the path of a `.keras` archive, a `.weights.h5` or an older
        `.h5`. Files are read with h5py; Keras itself is not needed.
      layer: the layer's name; where a model holds models, names that are there twice are written as whole paths.

    Returns:
      ``{"kernel", "bias"}`` of the layer; without ``layer`` such dicts by the names of the layers (of a live layer, its
      own). Ordinary convolutions have Keras's layout as well, which is that of `flax.linen.Conv`.

    Raises:
      ValueError: no layer of that name (the message lists those there are), a file that is damaged or holds links to
        other files.
      FileNotFoundError, ImportError: no file, no h5py.

    Example:
      >>> import numpy as np, tempfile, pathlib
      >>> from conv3dt_jax import interop
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.weights.h5"
      >>> interop.to_keras({"up": {"kernel": np.ones((2, 2, 2, 4, 3), "f4"), "bias": np.zeros(4, "f4")}}, path)
      >>> interop.from_keras(path, "up")["kernel"].shape
      (2, 2, 2, 4, 3)
    """
    if isinstance(source, str | os.PathLike):
        path = _common.existing(source)
        found = _keras_files.read(path)
        if layer is not None:
            return _common.as_jax(_common.pick(path.name, found, layer, lambda one: str(one[0]))[1])
        return {name: _common.as_jax(arrays) for name, (_, arrays) in found.items()}
    if not _is_model(source):
        _check_name(source, layer)
        return _common.as_jax(_arrays(source))
    layers = _convolutions(source)
    if layer is not None:
        return _common.as_jax(_arrays(_common.pick(f"the model {source.name!r}", layers, layer, _kind)))
    return {name: _common.as_jax(_arrays(one)) for name, one in layers.items()}


def layer_from_keras(
    source: Any, layer: str | None = None, custom_objects: Mapping[str, Any] | None = None
) -> Conv3DTranspose | Conv3D:
    """The `Conv3DTranspose` or `Conv3D` with the arguments of a Keras layer; its parameters are those of `from_keras`.

    Args:
      source: a Keras layer or model, or the path of a `.keras` archive or an older `.h5` that holds a model.
      layer: the layer's name in a model; without it, the one there is, or the one that is transposed.
      custom_objects: functions and classes for names that are not Keras's, as `Conv3DTranspose.from_config` takes them.

    Raises:
      ValueError: as `from_keras` does; a file without a config; arguments that mean nothing here.

    Example:
      >>> class Conv3DTranspose:  # stands for that of keras.layers
      ...     def get_config(self):
      ...         return {"filters": 4, "kernel_size": (2, 2, 2), "strides": (2, 2, 2), "padding": "same"}
      >>> layer_from_keras(Conv3DTranspose()).padding
      'same'
    """
    if isinstance(source, str | os.PathLike):
        path = _common.existing(source)
        found = _keras_files.unique(list(_layer_configs(_keras_files.config(path))))
        name = path.name
    elif _is_model(source):
        found = {one: (_class_of(peer), peer.get_config()) for one, peer in _convolutions(source).items()}
        name = f"the model {source.name!r}"
    elif (own := _class_of(source)) is not None:
        _check_name(source, layer)
        return own.from_config(source.get_config(), custom_objects)
    else:
        raise ValueError(f"a Keras Conv3DTranspose or Conv3D is wanted, not a {_kind(source)}.")
    if not found:
        raise ValueError(
            f"{name} shows no 3-D convolution; those within layers of a user's class are not in its config: "
            "load the model with Keras, and pass it or the layer."
        )
    if layer is None:
        names = [one for one, (own, _) in found.items() if own is Conv3DTranspose] if len(found) > 1 else [*found]
        if len(names) != 1:
            raise ValueError(
                f"{name} has {len(names)} transposed 3-D convolutions among {sorted(found)}; name one as `layer`."
            )
        (layer,) = names
    own, config = _common.pick(name, found, layer, lambda one: f"{one[0].kind.name}, filters {one[1].get('filters')}")
    return own.from_config(config, custom_objects)


def to_keras(params: Mapping[str, Any], target: Any, layer: str | Layer | None = None) -> None:
    """Puts parameters into Keras: into a live layer or model, or into a file.

    Args:
      params: those of one layer; or dicts of them by the names of a model's layers.
      target: a Keras layer or model; the path of a `.keras` archive, a `.weights.h5` or an older `.h5` that has the
        layers, whose weights are replaced; or of a file that is to be made: a `.weights.h5` of one layer, a `.keras` of
        one, or a `.h5` of any number, which Keras loads with ``by_name=True``.
      layer: the layer's name in the target, where ``params`` are those of one; for a new `.keras` archive the
        `Conv3DTranspose` or `Conv3D` itself, whose arguments go with them, and for a new `.weights.h5` of a `Conv3D`,
        where Keras tells layers apart by their class.

    Raises:
      ValueError: names, shapes or dtypes that differ from the target's, which then stays as it was; for a new archive,
        an argument that Keras does not have.

    Example:
      See `from_keras`.

      >>> to_keras({"kernel": np.ones((2, 2, 2, 4, 3), "f4")}, "model.keras", "up")
      Traceback (most recent call last):
      ...
      FileNotFoundError: there is no file 'model.keras'.
    """
    if isinstance(layer, Layer):
        return _new_file(_common.checked(params), target, layer)
    changes = _changes(params, layer)
    if isinstance(target, str | os.PathLike):
        path = os.fspath(target)
        if not os.path.exists(path) and str(path).endswith(".h5"):
            names = {name or "conv3d_transpose": arrays for name, arrays in changes.items()}
            return _keras_writing.create(_common.Path(path), names)
        return _keras_writing.write(_common.existing(path), _named(changes, path))
    if _is_model(target):
        layers, named = _convolutions(target), _named(changes, f"the model {target.name!r}")
        pairs = [(_common.pick(target.name, layers, name, _kind), arrays) for name, arrays in named.items()]
    elif len(changes) == 1:
        pairs = [(target, arrays) for arrays in changes.values()]
    else:
        raise ValueError(
            f"`params` are those of several layers, {sorted(map(str, changes))}, but the target is one layer."
        )
    for peer, arrays in pairs:
        _common.fit(f"the Keras layer {peer.name!r}", _arrays(peer), arrays)
    for peer, arrays in pairs:
        peer.set_weights([arrays[part] for part in _common.PARTS if part in arrays])
    return None


def _new_file(arrays: dict[str, np.ndarray], target: Any, layer: Layer) -> None:
    path = _common.Path(target)
    weights = path.name.endswith(".weights.h5")
    if not (path.suffix == ".keras" or weights) or path.exists():
        raise ValueError(
            f"{path} must be a new .keras archive or .weights.h5 where `layer` is a layer; else that is a name in it."
        )
    spec, config = _layer.configure(layer, layer.kind).spec, layer.get_config()
    extra = set(config) - set(_LAYERS[layer.kind.name](1, 1).get_config())
    if not weights and (extra or spec.padding not in ("valid", "same")):
        raise ValueError(
            f"Keras's layer has no {', '.join(sorted(extra)) or f'padding={spec.padding!r}'}; no archive is made."
        )
    channels = spec.channels_of(arrays["kernel"].shape)
    wanted = {"kernel": spec.kernel_shape(channels)} | ({"bias": (spec.filters,)} if spec.use_bias else {})
    found = {name: array.shape for name, array in arrays.items()}
    if found != wanted:
        raise ValueError(f"the layer takes {wanted}, but the parameters are {found}.")
    if weights:
        name = layer.name or layer.kind.name.lower()
        return _keras_writing.create(path, {name: arrays}, layer.kind.name)
    return _keras_writing.create_archive(path, layer.kind.name, config, channels, arrays)


def _changes(params: Mapping[str, Any], layer: str | None) -> dict[str | None, dict[str, np.ndarray]]:
    if isinstance(params, Mapping) and set(params) == {"params"}:
        params = params["params"]
    if not isinstance(params, Mapping) or not params:
        raise TypeError(f"`params` must be a dict with 'kernel' and 'bias', or of such by name, not {params!r:.60}.")
    if _common.is_layer(params):
        return {layer: _common.checked(params)}
    if layer is not None:
        raise ValueError(f"`layer={layer!r}` names one layer, but `params` are those of several: {sorted(params)}.")
    return {name: _common.checked(value, f"params[{name!r}]") for name, value in params.items()}


def _named(changes: Mapping[str | None, Any], target: str) -> dict[str, Any]:
    if None in changes:
        raise ValueError(f"`layer` must name the layer of {target} that the parameters are for.")
    return {str(name): arrays for name, arrays in changes.items()}


def _check_name(source: Any, layer: str | None) -> None:
    if layer not in (None, getattr(source, "name", None)):
        raise ValueError(f"`layer={layer!r}` is not the name of the one layer that was given, {source.name!r}.")


def _kind(layer: Any) -> str:
    return type(layer).__name__


def _is_model(source: Any) -> bool:
    if not hasattr(source, "get_config"):
        raise TypeError(f"`source` must be a Keras layer or model, or the path of a file, not {type(source).__name__}.")
    return isinstance(getattr(source, "layers", None), list)


def _convolutions(model: Any) -> dict[str, Any]:
    """The built 3-D convolutions of a model and all that is in it, by name, or by path where a name is there twice."""
    seen: set[int] = set()

    def walk(one: Any, path: str) -> Iterator[tuple[str, str, Any]]:
        for layer in getattr(one, "layers", None) or getattr(one, "_layers", None) or []:
            if id(layer) in seen or not hasattr(layer, "name"):
                continue
            seen.add(id(layer))
            if _class_of(layer) is not None and layer.weights:
                yield f"{path}{layer.name}", layer.name, layer
            else:
                yield from walk(layer, f"{path}{layer.name}/")

    return _keras_files.unique(list(walk(model, "")))


def _class_of(layer: Any) -> type[Conv3DTranspose | Conv3D] | None:
    """The layer here for one of Keras's, or of a user's class that derives from one (in Keras 2 one from the other)."""
    return next((_LAYERS[kind.__name__] for kind in type(layer).__mro__ if kind.__name__ in _LAYERS), None)


def _arrays(layer: Any) -> dict[str, np.ndarray]:
    values = layer.get_weights()
    if not values:
        raise ValueError(f"the Keras layer {layer.name!r} has no weights yet; build it, or call it once.")
    if len(values) > 2 or np.ndim(values[0]) != 5:
        shapes = [np.shape(value) for value in values]
        raise ValueError(f"the Keras layer {layer.name!r} is no 3-D convolution: its weights have the shapes {shapes}.")
    return {part: np.asarray(value) for part, value in zip(_common.PARTS, values, strict=False)}


def _layer_configs(config: Any, path: str = "", top: bool = True) -> Iterator[tuple[str, str, Any]]:
    """(path, name, (layer, config)) of the 3-D convolutions, wherever they are in a model's config."""
    if isinstance(config, Mapping):
        inner = config.get("config")
        name = str(inner.get("name")) if isinstance(inner, Mapping) else ""
        if config.get("class_name") in _LAYERS and isinstance(inner, Mapping):
            yield f"{path}{name}", name, (_LAYERS[config["class_name"]], inner)
            return
        owner = "class_name" in config and not top and name not in ("", "None")
        for value in config.values():
            yield from _layer_configs(value, f"{path}{name}/" if owner else path, top and "class_name" not in config)
    elif isinstance(config, list):
        for value in config:
            yield from _layer_configs(value, path, top)
