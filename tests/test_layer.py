"""The Linen layer: parameters, dtypes, the Keras configuration file, and life inside Flax."""

import copy
import json
import pathlib
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import conv3dt_jax as c3t
from tests import oracle

pytestmark = pytest.mark.usefixtures("quick_compiles")

X = np.random.default_rng(0).normal(size=(2, 3, 4, 2, 3)).astype(np.float32)


def test_parameters_have_keras_names_and_layout() -> None:
    layer = c3t.Conv3DTranspose(6, (2, 3, 4), groups=3)
    params = layer.init(jax.random.key(0), X)["params"]
    assert {name: value.shape for name, value in params.items()} == {"kernel": (2, 3, 4, 2, 3), "bias": (6,)}
    assert "bias" not in c3t.Conv3DTranspose(6, 2, use_bias=False).init(jax.random.key(0), X)["params"]
    assert c3t.Convolution3DTranspose is c3t.Conv3DTranspose


def test_default_initialization_is_glorot_uniform_and_zeros() -> None:
    params = c3t.Conv3DTranspose(6, (2, 3, 4)).init(jax.random.key(0), X)["params"]
    limit = np.sqrt(6 / (24 * (6 + 3)))
    assert 0.9 * limit < np.abs(params["kernel"]).max() <= limit
    assert not params["bias"].any()


@pytest.mark.parametrize(
    "kwargs",
    [
        {"strides": 2, "padding": "same"}, {"padding": ((0, 1), (1, 0), (0, 2)), "strides": 2, "output_padding": 1},
        {"padding": "circular", "strides": 2}, {"groups": 3, "strides": 2}, {"dilation_rate": 2},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_output_is_activation_of_the_operation(kwargs, data_format) -> None:
    layer = c3t.Conv3DTranspose(
        6, (2, 3, 4), **kwargs, data_format=data_format, activation="tanh", bias_initializer="normal"
    )  # fmt: skip
    x = np.moveaxis(X, -1, 1) if data_format == "channels_first" else X
    variables = layer.init(jax.random.key(0), x)
    params = variables["params"]
    want = np.tanh(oracle.conv3d_transpose(X, params["kernel"], params["bias"], **kwargs))
    got = layer.apply(variables, x)
    np.testing.assert_allclose(np.moveaxis(got, 1, -1) if x is not X else got, want, rtol=1e-5, atol=1e-5)


def test_any_number_of_batch_dimensions() -> None:
    layer = c3t.Conv3DTranspose(6, 2)
    variables = layer.init(jax.random.key(0), X)
    want = layer.apply(variables, X)
    np.testing.assert_allclose(layer.apply(variables, X[0]), want[0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(layer.apply(variables, X[None, :, None])[0, :, 0], want, rtol=1e-6, atol=1e-6)


def test_output_size_serves_skip_connections_of_odd_sizes() -> None:
    layer = c3t.Conv3DTranspose(6, 3, strides=2, padding="same", output_padding=0)
    variables = layer.init(jax.random.key(0), X)
    params = variables["params"]
    got = layer.apply(variables, X, output_size=(5, 8, 3))
    want = oracle.conv3d_transpose(X, params["kernel"], strides=2, padding="same", output_padding=(0, 1, 0))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "dtype", "param_dtype", "result"),
    [
        ("float32", None, "float32", "float32"),
        ("bfloat16", None, "float32", "float32"),
        ("bfloat16", None, "bfloat16", "bfloat16"),
        ("float32", "bfloat16", "float32", "bfloat16"),
        ("int32", None, "float32", "float32"),
        ("uint8", "bfloat16", "float32", "bfloat16"),
        ("complex64", None, "complex64", "complex64"),
    ],
)
@pytest.mark.lenient
def test_dtype_rules_are_those_of_flax(inputs, dtype, param_dtype, result) -> None:
    layer = c3t.Conv3DTranspose(4, 2, strides=2, dtype=dtype, param_dtype=param_dtype)
    x = jnp.ones((1, 2, 2, 2, 3), inputs)
    variables = layer.init(jax.random.key(0), x)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(variables)} == {param_dtype}
    assert layer.apply(variables, x).dtype == result
    peer = nn.ConvTranspose(4, (2, 2, 2), dtype=dtype, param_dtype=param_dtype)
    assert peer.apply(peer.init(jax.random.key(0), x), x).dtype == result


@pytest.fixture
def keras_home(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    return tmp_path / "keras.json"


def test_data_format_none_is_the_keras_configuration(keras_home: pathlib.Path) -> None:
    layer = c3t.Conv3DTranspose(4, 2)
    assert layer.init(jax.random.key(0), X)["params"]["kernel"].shape[-1] == 3
    keras_home.write_text(json.dumps({"image_data_format": "channels_first", "floatx": "float32"}))
    layer = c3t.Conv3DTranspose(4, 2)
    assert layer.init(jax.random.key(0), np.moveaxis(X, -1, 1))["params"]["kernel"].shape[-1] == 3
    assert c3t.Conv3DTranspose(4, 2, data_format="channels_last").init(jax.random.key(0), X)


def test_data_format_none_reads_the_home_directory(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("KERAS_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".keras").mkdir()
    (tmp_path / ".keras" / "keras.json").write_text('{"image_data_format": "channels_first"}')
    x = np.moveaxis(X, -1, 1)
    assert c3t.Conv3DTranspose(4, 2).init(jax.random.key(0), x)["params"]["kernel"].shape[-1] == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "keras.json is no valid JSON"),
        ("[]", "holds no JSON object"),
        ('{"image_data_format": "NCDHW"}', "image_data_format='NCDHW'"),
        (None, "cannot be read"),
    ],
)
def test_a_broken_keras_configuration_is_reported(keras_home: pathlib.Path, text, message) -> None:
    if text is None:
        keras_home.mkdir()
    else:
        keras_home.write_text(text)
    with pytest.raises(ValueError, match=message):
        c3t.Conv3DTranspose(4, 2)
    c3t.Conv3DTranspose(4, 2, data_format="channels_last")


def test_the_layer_is_hashable_whatever_it_was_given() -> None:
    layer = c3t.Conv3DTranspose(
        4, [2, 2, 2], kernel_initializer={"class_name": "VarianceScaling", "config": {"input_axes": [3], "output_axes": [4]}}
    )  # fmt: skip
    variables = jax.jit(layer.init)(jax.random.key(0), X)
    assert jax.jit(layer.apply)(variables, X).shape == (2, 4, 5, 3, 4)
    assert layer == layer.clone()
    assert layer.copy(filters=5).init(jax.random.key(0), X)["params"]["bias"].shape == (5,)


class Decoder(nn.Module):
    """Two layers in a stack, one of them rematerialized and partitioned, as users combine them."""

    @nn.compact
    def __call__(self, x):
        partitioned = nn.with_partitioning(jax.nn.initializers.normal(), (None, None, None, None, "model"))
        x = c3t.Conv3DTranspose(4, 2, 2, activation=nn.relu, kernel_initializer=partitioned, name="up")(x)
        return nn.remat(c3t.Conv3DTranspose)(1, 3, padding="same", name="head")(x)


@pytest.mark.lenient
def test_an_optax_training_step_inside_a_larger_module() -> None:
    model = Decoder()
    target = np.random.default_rng(1).normal(size=(2, 6, 8, 4, 1)).astype(np.float32)
    variables = nn.unbox(model.init(jax.random.key(0), X))
    assert set(variables["params"]) == {"up", "head"}
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, state):
        loss, gradient = jax.value_and_grad(lambda params: ((model.apply({"params": params}, X) - target) ** 2).mean())(
            params
        )
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, loss

    params, state, losses = variables["params"], optimizer.init(variables["params"]), []
    for _ in range(60):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]


def test_boxed_parameters_are_taken_and_checked() -> None:
    model = Decoder()
    variables = model.init(jax.random.key(0), X)
    assert isinstance(variables["params"]["up"]["kernel"], nn.Partitioned)
    np.testing.assert_array_equal(model.apply(variables, X), model.apply(nn.unbox(variables), X))
    with pytest.raises(ValueError, match="the inputs have 2 channels"):
        model.apply(variables, X[..., :2])


@pytest.mark.lenient
def test_a_real_dtype_does_not_drop_imaginary_parts() -> None:
    layer = c3t.Conv3DTranspose(4, 2, dtype="float32")
    with pytest.raises(TypeError, match="`dtype=float32` would drop the imaginary part"):
        layer.init(jax.random.key(0), jnp.ones((1, 2, 2, 2, 3), "complex64"))


def test_the_layer_can_be_pickled_and_copied() -> None:
    layer = c3t.Conv3DTranspose(
        4, [2, 2, 2], activation="relu", kernel_initializer={"class_name": "HeNormal", "config": {}}
    )
    variables = layer.init(jax.random.key(0), X)
    for twin in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer), copy.copy(layer)):
        assert twin == layer
        np.testing.assert_array_equal(twin.apply(variables, X), layer.apply(variables, X))


def test_lifted_transforms() -> None:
    ensemble = nn.vmap(c3t.Conv3DTranspose, variable_axes={"params": 0}, split_rngs={"params": True})(4, 2, 2)
    variables = ensemble.init(jax.random.key(0), X)
    assert variables["params"]["kernel"].shape == (2, 2, 2, 2, 4, 3)
    one = jax.tree.map(lambda leaf: leaf[1], variables)
    want = c3t.Conv3DTranspose(4, 2, 2).apply(one, X[1])
    np.testing.assert_allclose(ensemble.apply(variables, X)[1], want, rtol=1e-6, atol=1e-6)


def test_tabulate_counts_the_parameters() -> None:
    text = c3t.Conv3DTranspose(4, 2, 2).tabulate(jax.random.key(0), X, console_kwargs={"width": 200})
    assert "[2,2,2,4,3]" in text
