"""A Keras model with convolutions at every depth, and its files in every form; for the tests of weights."""

import pathlib

import jax
import numpy as np
import pytest

h5py = pytest.importorskip("h5py")
keras = pytest.importorskip("keras")

X = np.random.default_rng(0).normal(size=(2, 4, 4, 4, 3)).astype(np.float32)


LAYERS = ["c1", "up_a", "up_b"]


def model(seed=0):
    """Two transposed convolutions, one of them in a model of its own, a convolution, and layers of other kinds."""
    keras.utils.set_random_seed(seed)
    inner = keras.Sequential(
        [
            keras.Input((8, 8, 8, 4)),
            keras.layers.Conv3DTranspose(2, 2, 2, use_bias=False, activation="tanh", name="up_b"),
        ],
        name="inner",
    )
    inputs = keras.Input(X.shape[1:])
    x = keras.layers.Conv3D(5, 3, padding="same", bias_initializer="normal", name="c1")(inputs)
    x = keras.layers.BatchNormalization(name="norm")(x)
    x = keras.layers.Conv3DTranspose(4, 3, strides=2, padding="same", bias_initializer="normal", name="up_a")(x)
    x = inner(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="dense")(x))


def values(keras_model):
    own = {layer.name: layer for layer in keras_model.layers} | {
        layer.name: layer for layer in keras_model.get_layer("inner").layers
    }
    return {name: dict(zip(("kernel", "bias"), own[name].get_weights(), strict=False)) for name in LAYERS}


def save(keras_model, folder: pathlib.Path, kind: str) -> pathlib.Path:
    path = folder / f"model{kind}"
    if kind == "_weights.h5":  # the legacy form of weights alone
        with h5py.File(path, "w") as file:
            keras.src.legacy.saving.legacy_h5_format.save_weights_to_hdf5_group(file, keras_model)
    elif kind == ".weights.h5":
        keras_model.save_weights(path)
    else:
        keras_model.save(path)
    return path


KINDS = [".keras", ".weights.h5", ".h5", "_weights.h5"]


def assert_equal(got, want) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)
