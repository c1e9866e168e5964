"""The layer against the real Keras layer (JAX backend), option by option: same weights, same numbers."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import conv3dt_jax as c3t
from conv3dt_jax import _activations, _initializers

keras = pytest.importorskip("keras")

pytestmark = [pytest.mark.lenient, pytest.mark.usefixtures("quick_compiles")]

SPACE = (3, 4, 2)


def both_layers(channels=3, **kwargs):
    """(Keras's layer, ours, our variables holding Keras's weights), built for ``channels`` inputs."""
    theirs = keras.layers.Conv3DTranspose(**kwargs, bias_initializer="random_normal")
    first = kwargs.get("data_format") == "channels_first"
    theirs.build((None, channels, *SPACE) if first else (None, *SPACE, channels))
    ours = c3t.Conv3DTranspose(**kwargs)
    params = {weight.name: jnp.asarray(weight.value) for weight in theirs.weights}
    return theirs, ours, {"params": params}


def inputs(channels=3, *, first=False, seed=0):
    x = np.random.default_rng(seed).normal(size=(2, *SPACE, channels)).astype(np.float32)
    return np.moveaxis(x, -1, 1) if first else x


def check(**kwargs):
    theirs, ours, variables = both_layers(**kwargs)
    x = inputs(first=kwargs.get("data_format") == "channels_first")
    want = np.asarray(theirs(x))
    got = ours.apply(variables, x)
    assert got.shape == want.shape == tuple(theirs.compute_output_shape(x.shape))
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
    mine = ours.init(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, mine) == jax.tree.map(jnp.shape, variables)


GRID = list(itertools.product(["valid", "same"], [(1, 1, 1), (2, 1, 3), (3, 2, 2)], [(2, 3, 1), (3, 4, 5)]))


@pytest.mark.parametrize(("padding", "strides", "kernel_size"), GRID)
def test_padding_strides_and_kernel(padding, strides, kernel_size) -> None:
    check(filters=2, kernel_size=kernel_size, strides=strides, padding=padding)


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("output_padding", [0, 1, (0, 1, 1)])
@pytest.mark.parametrize("kernel_size", [3, (3, 5, 3)])
def test_output_padding(padding, output_padding, kernel_size) -> None:
    check(filters=2, kernel_size=kernel_size, strides=2, padding=padding, output_padding=output_padding)


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("dilation_rate", [2, (1, 3, 2)])
def test_dilation_rate(padding, dilation_rate) -> None:
    check(filters=2, kernel_size=3, dilation_rate=dilation_rate, padding=padding)


@pytest.mark.parametrize(
    "kwargs",
    [{"data_format": "channels_first"}, {"data_format": "channels_last"}, {"use_bias": False}, {"padding": "SAME"}],
    ids=str,
)
def test_other_options(kwargs) -> None:
    check(filters=2, kernel_size=3, strides=2, **kwargs)


def test_a_keras_call_runs_unchanged_with_positional_arguments() -> None:
    arguments = (
        4, (3, 3, 3), (2, 2, 2), "same", None, "channels_last", (1, 1, 1), "relu", True, "he_normal", "zeros",
        None, None, None, None, None,
    )  # fmt: skip
    ours = c3t.Convolution3DTranspose(*arguments)
    # The order is that of the Keras 2.4 documentation; Keras 3 puts data_format and dilation_rate elsewhere.
    names = [
        "filters", "kernel_size", "strides", "padding", "output_padding", "data_format", "dilation_rate", "activation",
        "use_bias", "kernel_initializer", "bias_initializer", "kernel_regularizer", "bias_regularizer",
        "activity_regularizer", "kernel_constraint", "bias_constraint",
    ]  # fmt: skip
    assert [getattr(ours, name) for name in names] == list(arguments)
    theirs = keras.layers.Conv3DTranspose(
        **dict(zip(names, arguments, strict=True)),
    )
    x = inputs()
    theirs.build(x.shape)
    params = {weight.name: jnp.asarray(weight.value) for weight in theirs.weights}
    np.testing.assert_allclose(ours.apply({"params": params}, x), theirs(x), rtol=2e-5, atol=2e-5)


SHARED_ACTIVATIONS = sorted(set(_activations.FUNCTIONS) - {"threshold"})


def test_every_keras_activation_name_is_known() -> None:
    assert set(keras.src.activations.ALL_OBJECTS_DICT) == set(_activations.FUNCTIONS)


@pytest.mark.parametrize("name", SHARED_ACTIVATIONS)
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_activations_mean_what_keras_means(name, data_format) -> None:
    theirs, ours, variables = both_layers(filters=4, kernel_size=(2, 2, 1), activation=name, data_format=data_format)
    x = 3 * inputs(first=data_format == "channels_first")
    np.testing.assert_allclose(ours.apply(variables, x), theirs(x), rtol=1e-4, atol=1e-5)


ACTIVATION_CONFIGS = [
    {"class_name": "LeakyReLU", "config": {"negative_slope": 0.1}},
    {"class_name": "LeakyReLU", "config": {}},
    {"class_name": "ReLU", "config": {"max_value": 1.5, "negative_slope": 0.1, "threshold": 0.2}},
    {"class_name": "ReLU", "config": {"negative_slope": 0.1}},
    {"class_name": "ELU", "config": {"alpha": 0.5}},
    {"class_name": "Softmax", "config": {"axis": 1}},
]


@pytest.mark.parametrize("config", ACTIVATION_CONFIGS, ids=str)
def test_activation_configs_mean_what_keras_means(config) -> None:
    theirs = keras.layers.deserialize({"module": "keras.layers", "registered_name": None, **config})
    x = 3 * inputs()
    np.testing.assert_allclose(_activations.get("activation", config)(jnp.asarray(x)), theirs(x), rtol=1e-5, atol=1e-6)


def test_activation_function_configs_and_callables() -> None:
    x = jnp.asarray(inputs())
    written = {"module": "builtins", "class_name": "function", "config": "relu6", "registered_name": "function"}
    threshold = {"class_name": "threshold", "config": {"threshold": 0.5, "default_value": -1.0}}
    np.testing.assert_array_equal(_activations.get("activation", written)(x), jax.nn.relu6(x))
    np.testing.assert_array_equal(_activations.get("activation", threshold)(x), jnp.where(x > 0.5, x, -1.0))
    np.testing.assert_array_equal(_activations.get("activation", jnp.sin)(x), jnp.sin(x))
    np.testing.assert_array_equal(_activations.get("activation", keras.activations.relu)(x), jax.nn.relu(x))


def keras_names():
    known = keras.src.initializers.ALL_OBJECTS_DICT
    unusable = {
        "Initializer",
        "initializer",
        "Identity",
        "identity",
        "IdentityInitializer",
        "STFT",
        "stft",
        "STFTInitializer",
    }
    return sorted(set(known) - unusable)


@pytest.mark.parametrize("name", [name for name in keras_names() if name.lower() != "constant"])  # Keras wants a value
def test_initializers_draw_from_keras_distributions(name) -> None:
    """Mean, standard deviation, kurtosis and bounds of the kernel of a real Keras layer and of ours."""
    arguments = {"filters": 24, "kernel_size": (3, 4, 5), "kernel_initializer": name}
    theirs = keras.layers.Conv3DTranspose(**arguments)
    theirs.build((None, 4, 4, 4, 40))
    ours = c3t.Conv3DTranspose(**arguments).init(jax.random.key(0), jnp.ones((1, 1, 1, 1, 40)))
    a, b = np.asarray(theirs.kernel.value, np.float64), np.asarray(ours["params"]["kernel"], np.float64)
    assert a.shape == b.shape
    spread = a.std()
    assert abs(a.mean() - b.mean()) <= 5 * spread / np.sqrt(a.size / 2)
    assert b.std() == pytest.approx(spread, rel=0.02)
    if spread:
        fourth = [((v - v.mean()) ** 4).mean() / v.std() ** 4 for v in (a, b)]
        assert fourth[0] == pytest.approx(fourth[1], rel=0.04)  # 1.8 uniform, 2.4 truncated, 3 normal
        assert np.abs(b).max() == pytest.approx(np.abs(a).max(), rel=0.01 if fourth[0] < 2.8 else 0.35)


SEEDED = [
    ("GlorotUniform", {}), ("HeNormal", {}), ("LecunUniform", {}), ("GlorotNormal", {}),
    ("RandomNormal", {"mean": 1.0, "stddev": 2.0}), ("TruncatedNormal", {"mean": -1.0, "stddev": 0.5}),
    ("RandomUniform", {"minval": 2.0, "maxval": 3.0}), ("Orthogonal", {"gain": 2.0}),
    ("VarianceScaling", {"scale": 3.0, "mode": "fan_out", "distribution": "untruncated_normal"}),
    ("VarianceScaling", {"scale": 3.0, "mode": "fan_avg", "distribution": "uniform"}),
    ("VarianceScaling", {"input_axes": [0, 1, 2, 4], "output_axes": [3], "scale": 2.0, "mode": "fan_out"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "config"), SEEDED, ids=str)
def test_a_seed_gives_the_very_values_of_keras(name, config) -> None:
    theirs, spec = getattr(keras.initializers, name)(**config, seed=7), c3t.Conv3DTransposeSpec(4, (2, 3, 2))
    for identifier in (
        {"class_name": name, "config": {**config, "seed": 7}},
        keras.saving.serialize_keras_object(theirs),
        theirs,
    ):
        init = functools.partial(c3t.init, spec=spec, in_channels=6, kernel_initializer=identifier)
        kernel = jax.jit(init)(jax.random.key(5))["kernel"]
        np.testing.assert_allclose(kernel, theirs((2, 3, 2, 4, 6)), rtol=1e-4, atol=1e-5)


def test_constant_and_callable_initializers() -> None:
    by_config = c3t.Conv3DTranspose(
        2, 1, kernel_initializer={"class_name": "Constant", "config": {"value": 0.5}}, bias_initializer="ones"
    )
    params = by_config.init(jax.random.key(0), jnp.ones((1, 1, 1, 1, 3)))["params"]
    np.testing.assert_array_equal(params["kernel"], 0.5)
    np.testing.assert_array_equal(params["bias"], 1.0)
    for function in (jax.nn.initializers.constant(2.0), lambda shape, dtype=None: np.full(shape, 2.0, dtype)):
        layer = c3t.Conv3DTranspose(2, 1, kernel_initializer=function)
        kernel = layer.init(jax.random.key(0), jnp.ones((1, 1, 1, 1, 3)))["params"]["kernel"]
        np.testing.assert_array_equal(kernel, 2.0)
        assert kernel.dtype == jnp.float32


def test_initializer_classes_arrays_and_old_configs() -> None:
    make = lambda **kwargs: c3t.Conv3DTranspose(2, 1, **kwargs).init(jax.random.key(0), jnp.ones((1, 1, 1, 1, 3)))[
        "params"
    ]
    np.testing.assert_array_equal(make(kernel_initializer=keras.initializers.Ones)["kernel"], 1.0)
    per_filter = {"class_name": "Constant", "config": {"value": [1.0, 2.0]}}
    np.testing.assert_array_equal(make(bias_initializer=per_filter)["bias"], [1.0, 2.0])
    old = {"class_name": "RandomUniform", "config": {"minval": 1.0, "maxval": 2.0, "seed": None, "dtype": "float32"}}
    assert make(kernel_initializer=old)["kernel"].min() >= 1


def test_every_keras_initializer_name_is_known() -> None:
    for name in keras_names():
        assert callable(_initializers.get("kernel_initializer", name))
