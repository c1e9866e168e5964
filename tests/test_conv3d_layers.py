"""`Conv3D` in Linen and NNX: what Keras's layer computes, trains and writes; the same bits in both; errors."""

import dataclasses
import inspect
import json
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import conv3dt_jax as c3t
from tests import oracle
from tests.helpers import label
from tests.nnx_layers import params_of

keras = pytest.importorskip("keras")

pytestmark = [pytest.mark.lenient, pytest.mark.usefixtures("quick_compiles")]

SPACE = (5, 4, 6)
X = np.random.default_rng(0).normal(size=(2, *SPACE, 4)).astype(np.float32)

# What Keras takes as well.
SHARED = [
    {}, {"kernel_size": (2, 3, 1), "strides": (2, 1, 3)}, {"strides": 2, "padding": "SAME"}, {"padding": "same", "kernel_size": (4, 3, 2)},
    {"data_format": "channels_first", "strides": 2, "padding": "same"}, {"dilation_rate": (2, 1, 2)}, {"dilation_rate": 2, "padding": "same"},
    {"groups": 2, "padding": "same"}, {"groups": 4, "filters": 8, "strides": 2}, {"use_bias": False}, {"activation": "softplus"},
    {"kernel_initializer": "he_normal", "kernel_regularizer": "l2", "kernel_constraint": "max_norm", "bias_constraint": "non_neg"},
    {"dtype": "mixed_bfloat16"}, {"name": "down_1", "trainable": False}, {"activity_regularizer": {"class_name": "L1", "config": {"l1": 0.5}}},
]  # fmt: skip
# What it does not.
OURS = [
    {"padding": "circular", "strides": 2}, {"padding": ((1, 0), (0, 1), (2, 2))}, {"param_dtype": "bfloat16"},
    {"implementation": "phases", "precision": "highest"}, {"weights": [np.full((3, 3, 3, 4, 6), 0.5), np.ones(6)]},
    {"input_shape": (5, 4, 6, 4)},
]  # fmt: skip


def filled(arguments):
    return {"filters": 6, "kernel_size": 3, **arguments}


def inputs(arguments):
    return np.moveaxis(X, -1, 1) if arguments.get("data_format") == "channels_first" else X


@pytest.mark.parametrize("arguments", SHARED, ids=label)
def test_it_computes_what_keras_computes(arguments) -> None:
    arguments = filled(arguments)
    theirs, x = keras.layers.Conv3D(**arguments, bias_initializer="random_normal"), inputs(arguments)
    want = np.asarray(theirs(x))
    ours = c3t.Conv3D(**arguments)
    params = {weight.name: jnp.asarray(weight.value) for weight in theirs.weights}
    got = ours.apply({"params": params}, x)
    assert got.shape == want.shape == ours.compute_output_shape(x.shape)
    tolerance = 2e-2 if arguments.get("dtype") == "mixed_bfloat16" else 2e-5
    np.testing.assert_allclose(got.astype("f4"), want.astype("f4"), rtol=tolerance, atol=tolerance)
    assert jax.tree.map(jnp.shape, ours.init(jax.random.key(0), x)["params"]) == jax.tree.map(jnp.shape, params)
    unknown = tuple(None if n in SPACE else n for n in x.shape)
    assert ours.compute_output_shape(unknown) == theirs.compute_output_shape(unknown)


def test_a_keras_call_runs_unchanged_with_positional_arguments() -> None:
    arguments = (
        6, (3, 3, 3), (2, 2, 2), "same", "channels_last", (1, 1, 1), 2, "relu", True, "he_normal", "ones", None, None,
        None, None, None,
    )  # fmt: skip
    names = [*inspect.signature(keras.layers.Conv3D.__init__).parameters][1 : 1 + len(arguments)]
    theirs = keras.layers.Conv3D(*arguments)
    want = np.asarray(theirs(X))
    params = {weight.name: jnp.asarray(weight.value) for weight in theirs.weights}
    for ours in (c3t.Convolution3D(*arguments), c3t.nnx.Convolution3D(4, *arguments, rngs=nnx.Rngs(0))):
        assert [getattr(ours, name) for name in names] == list(arguments)
    np.testing.assert_allclose(c3t.Conv3D(*arguments).apply({"params": params}, X), want, rtol=2e-5, atol=2e-5)


def test_nnx_takes_what_linen_takes() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(c3t.Conv3D) if field.name != "parent"}
    signature = inspect.signature(c3t.nnx.Conv3D.__init__).parameters
    taken = [name for name, parameter in signature.items() if parameter.kind is not parameter.KEYWORD_ONLY]
    assert taken == ["self", "in_features", *(name for name in fields if name != "name"), "name"]
    shared = set(fields) - {"filters", "kernel_size", "name"}
    assert {name: signature[name].default for name in shared} == {name: fields[name] for name in shared}
    assert set(fields) == {field.name for field in dataclasses.fields(c3t.Conv3DTranspose)} - {
        "output_padding",
        "parent",
    }
    assert c3t.nnx.Convolution3D is c3t.nnx.Conv3D
    assert c3t.Convolution3D is c3t.Conv3D


@pytest.mark.thinned
@pytest.mark.parametrize("arguments", [*SHARED, *OURS], ids=label)
def test_the_same_parameters_give_the_same_bits_in_both(arguments) -> None:
    arguments = filled(arguments)
    x = inputs(arguments)
    layer, linen = c3t.nnx.Conv3D(4, **arguments, rngs=nnx.Rngs(0)), c3t.Conv3D(**arguments)
    params = params_of(layer)
    leaf = lambda value: (value.shape, value.dtype)
    assert jax.tree.map(leaf, params) == jax.tree.map(leaf, linen.init(jax.random.key(0), x)["params"])
    square = lambda y: jnp.square(y.astype(jnp.float32)).sum()
    np.testing.assert_array_equal(layer(x), linen.apply({"params": params}, x))
    gradients = nnx.grad(lambda layer: square(layer(x)))(layer)
    for name, want in jax.grad(lambda params: square(linen.apply({"params": params}, x)))(params).items():
        np.testing.assert_array_equal(gradients[name][...], want)


@pytest.mark.parametrize("arguments", [*SHARED, *OURS], ids=label)
def test_configs_survive_json_pickle_and_nnx(arguments) -> None:
    layer = c3t.Conv3D(**filled(arguments))
    config = json.loads(json.dumps(layer.get_config()))
    assert c3t.Conv3D.from_config(config) == layer
    assert c3t.Conv3D.from_config({"class_name": "Conv3D", "config": config}) == layer
    assert pickle.loads(pickle.dumps(layer)) == layer
    assert c3t.nnx.Conv3D.from_config(config, in_features=4, rngs=nnx.Rngs(0)).get_config() == config


@pytest.mark.parametrize("arguments", SHARED, ids=label)
def test_configs_go_to_keras_and_back(arguments) -> None:
    layer = c3t.Conv3D(**filled(arguments))
    theirs = keras.layers.Conv3D.from_config(layer.get_config())
    back = c3t.Conv3D.from_config(theirs.get_config())
    assert keras.layers.Conv3D.from_config(back.get_config()).get_config() == theirs.get_config()
    for name in ("filters", "kernel_size", "strides", "padding", "data_format", "dilation_rate", "groups", "use_bias"):
        assert getattr(back, name) == getattr(layer, name)
    assert set(layer.get_config()) <= set(theirs.get_config())
    assert set(c3t.Conv3D(1, 1, groups=1).get_config()) == set(keras.layers.Conv3D(1, 1).get_config())


def test_a_config_of_the_other_layer_is_refused() -> None:
    config = c3t.Conv3DTranspose(2, 3, 2, output_padding=1).get_config()
    with pytest.raises(ValueError, match="unknown key 'output_padding'"):
        c3t.Conv3D.from_config(config)
    with pytest.raises(ValueError, match="this is the config of 'Conv3DTranspose'; a layer of 'Conv3D' is wanted"):
        c3t.Conv3D.from_config({"class_name": "Conv3DTranspose", "config": config})


WRONG = [
    ({"strides": 2, "dilation_rate": 2}, ValueError, "cannot both be above 1"), ({"padding": "causal"}, ValueError, "causal"),
    ({"filters": 5, "groups": 2}, ValueError, "groups"), ({"filters": 0}, ValueError, "filters"), ({"strides": 1.5}, TypeError, "strides"),
    ({"kernel_initializer": "icnr"}, ValueError, "makes kernels of transposed convolutions alone"),
    ({"kernel_initializer": c3t.initializers.Trilinear()}, ValueError, "makes kernels of transposed convolutions alone"),
    ({"weights": [np.ones((3, 3, 3, 6, 4))]}, ValueError, r"in_channels // groups, filters\)"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG, ids=label)
def test_bad_arguments_are_refused_at_construction(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        c3t.Conv3D(**filled(arguments))
    with pytest.raises(error, match=message):
        c3t.nnx.Conv3D(4, **filled(arguments), rngs=nnx.Rngs(0))


def test_inputs_that_do_not_fit_are_refused() -> None:
    layer = c3t.Conv3D(6, 3, groups=2)
    variables = layer.init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=r"have 2 channels, but the layer's kernel .* was made for 4"):
        layer.apply(variables, X[..., :2])
    with pytest.raises(ValueError, match="`groups=2` does not divide"):
        layer.init(jax.random.key(0), X[..., :3])
    with pytest.raises(ValueError, match="takes 4"):
        c3t.nnx.Conv3D(4, 6, 3, rngs=nnx.Rngs(0))(X[..., :2])


class Network(nn.Module):
    """Both layers, as in every U-Net."""

    @nn.compact
    def __call__(self, x):
        x = c3t.Conv3D(
            6, 3, 2, "same", activation="tanh", kernel_regularizer="l2", activity_regularizer="l1", kernel_constraint="unit_norm"
        )(x)  # fmt: skip
        return c3t.Conv3DTranspose(1, 2, 2, kernel_constraint="non_neg")(x)


def test_training_with_penalties_and_constraints_is_what_keras_does() -> None:
    """Three steps of plain descent."""
    theirs = keras.Sequential([
        keras.Input((4, 4, 4, 2)),
        keras.layers.Conv3D(
            6, 3, 2, "same", activation="tanh", kernel_regularizer="l2", activity_regularizer="l1", kernel_constraint="unit_norm"
        ),
        keras.layers.Conv3DTranspose(1, 2, 2, kernel_constraint="non_neg"),
    ])  # fmt: skip
    theirs.compile(keras.optimizers.SGD(0.1), "mse")
    x, target = X[:, :4, :, :4, :2], np.ones((2, 4, 4, 4, 1), np.float32)
    network = Network()
    params = {
        f"{kind}_0": {weight.name: jnp.array(weight.value) for weight in layer.weights}  # Keras donates its own
        for kind, layer in zip(("Conv3D", "Conv3DTranspose"), theirs.layers, strict=True)
    }
    layers = c3t.find_layers(network, x)
    assert {path: type(layer) for path, layer in layers.items()} == {
        ("Conv3D_0",): c3t.Conv3D, ("Conv3DTranspose_0",): c3t.Conv3DTranspose
    }  # fmt: skip
    optimizer = c3t.constrain(optax.sgd(0.1), layers)

    @jax.jit
    def step(params, state):
        def loss(params):
            y, kept = network.apply({"params": params}, x, mutable=["losses"])
            return jnp.mean((y - target) ** 2) + c3t.regularization_loss({"params": params, **kept}, layers)

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    state = optimizer.init(params)
    for _ in range(3):
        want = theirs.train_on_batch(x, target)
        params, state, value = step(params, state)
        assert float(value) == pytest.approx(float(want), rel=1e-5)
    for kind, layer in zip(("Conv3D", "Conv3DTranspose"), theirs.layers, strict=True):
        for weight in layer.weights:
            np.testing.assert_allclose(params[f"{kind}_0"][weight.name], weight.value, rtol=1e-4, atol=1e-5)


def test_an_nnx_model_finds_penalizes_and_jits_both() -> None:
    options = {"kernel_regularizer": "l2", "activity_regularizer": "l1", "rngs": nnx.Rngs(0)}
    model = nnx.Sequential(c3t.nnx.Conv3D(4, 6, 2, 2, **options), c3t.nnx.Conv3DTranspose(6, 1, 2, 2, **options))
    assert [type(layer) for layer in c3t.find_layers(model).values()] == [c3t.nnx.Conv3D, c3t.nnx.Conv3DTranspose]
    first, second = model.layers

    @nnx.jit
    def run(model):
        y = model(X)
        return y, c3t.regularization_loss(model)

    y, loss = run(model)
    middle = oracle.conv3d(X, first.kernel[...], strides=2)
    want = sum(0.01 * np.square(layer.kernel[...]).sum() for layer in (first, second))
    want += sum(0.01 * np.abs(value).sum() / 2 for value in (middle, y))
    assert float(loss) == pytest.approx(want, rel=1e-4)


def test_axes_of_the_kernel_have_names_for_sharding() -> None:
    make = nn.with_logical_partitioning(
        c3t.initializers.get("kernel_initializer", "ones"), c3t.initializers.CONV3D_KERNEL_AXES
    )
    variables = c3t.Conv3D(6, 2, kernel_initializer=make).init(jax.random.key(0), X)
    assert tuple(nn.get_partition_spec(variables)["params"]["kernel"]) == (None, None, None, "channels", "filters")
