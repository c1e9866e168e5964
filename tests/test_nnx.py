"""The NNX layer: to the bit what the Linen layer computes, and at home in NNX's transformations."""

import dataclasses
import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import conv3dt_jax as c3t
from conv3dt_jax.nnx import RegularizationLoss
from tests.helpers import label
from tests.nnx_layers import UP, X, make, params_of

# optax, Flax and Keras promote implicitly
pytestmark = [pytest.mark.lenient, pytest.mark.usefixtures("quick_compiles")]


def test_it_takes_what_the_linen_layer_takes() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(c3t.Conv3DTranspose) if field.name != "parent"}
    signature = inspect.signature(c3t.nnx.Conv3DTranspose.__init__).parameters
    taken = [name for name, parameter in signature.items() if parameter.kind is not parameter.KEYWORD_ONLY]
    assert taken == ["self", "in_features", *(name for name in fields if name != "name"), "name"]
    assert {name: signature[name].default for name in fields if name not in ("filters", "kernel_size", "name")} == {
        name: default for name, default in fields.items() if name not in ("filters", "kernel_size", "name")
    }
    assert c3t.nnx.Convolution3DTranspose is c3t.nnx.Conv3DTranspose


@pytest.mark.thinned
@pytest.mark.parametrize(
    "arguments",
    [
        {}, UP, {"groups": 3, "filters": 6, "strides": (1, 2, 3), "padding": ((0, 1), (1, 0), (0, 2))},
        {"data_format": "channels_first", "dilation_rate": 2}, {"use_bias": False, "padding": "circular", "strides": 2},
        {"dtype": "bfloat16", "output_padding": 1, "strides": 2}, {"param_dtype": "bfloat16"}, {"trainable": False},
        {"strides": 2, "implementation": "phases", "precision": "highest"}, {"dtype": "mixed_float16", "strides": 3},
        {"weights": [np.full((3, 3, 3, 4, 3), 0.5), np.ones(4)], "input_shape": (3, 4, 2, 3)},
        {"kernel_initializer": "icnr", "strides": 2, "bias_initializer": "ones", "activation": {"class_name": "softmax", "config": {}}},
    ],
    ids=label,
)  # fmt: skip
def test_the_same_parameters_give_the_same_bits(arguments) -> None:
    arguments = {"filters": 4, "kernel_size": 3, **arguments}
    x = np.moveaxis(X, -1, 1) if arguments.get("data_format") == "channels_first" else X
    layer = c3t.nnx.Conv3DTranspose(3, **arguments, rngs=nnx.Rngs(0))
    linen = c3t.Conv3DTranspose(**arguments)
    params = params_of(layer)
    want = linen.init(jax.random.key(0), x)["params"]
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), want
    )
    for sizes in (
        (),
        ((7, 10, 5),)
        if arguments.get("strides") == 2 and "output_padding" not in arguments and "padding" not in arguments and x is X
        else (),
    ):
        np.testing.assert_array_equal(layer(x, *sizes), linen.apply({"params": params}, x, *sizes))

    def square(y):
        return jnp.square(y.astype(jnp.float32)).sum()

    gradients = nnx.grad(lambda layer: square(layer(x)))(layer)
    wanted = jax.grad(lambda params: square(linen.apply({"params": params}, x)))(params)
    for name, gradient in wanted.items():
        np.testing.assert_array_equal(gradients[name][...], gradient)
    assert layer.compute_output_shape((None, *x.shape[1:])) == linen.compute_output_shape((None, *x.shape[1:]))


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"in_features": 0}, ValueError, "`in_features=0`"), ({"in_features": 2.0}, TypeError, "`in_features=2.0`"),
        ({"groups": 2}, ValueError, "3 channels, which `groups=2` does not divide"),
        ({"strides": 2, "dilation_rate": 2}, ValueError, "dilation_rate"), ({"padding": "causal"}, ValueError, "causal"),
        ({"kernel_initializer": lambda key, shape, dtype: jnp.zeros(3)}, ValueError, "`kernel_initializer` returned shape"),
        ({"input_shape": (4, 4, 4, 8)}, ValueError, "other channels than `in_features=3`"),
        ({"batch_input_shape": (None, 8, 4, 4, 4), "data_format": "channels_first"}, ValueError, "`batch_input_shape="),
        ({"kernel_metadata": ("a", "b")}, TypeError, "`kernel_metadata=.*must be a dict"), ({"bias_metadata": None}, TypeError, "`bias_metadata=None`"),
        ({"rngs": nnx.Rngs(dropout=0)}, ValueError, "`rngs` has the streams .'dropout'.; parameters need one named 'params'"),
        ({"name": 3}, TypeError, "`name=3` must be a string"), ({"rngs": 0}, TypeError, "`rngs` must be a flax.nnx.Rngs"),
        ({"filters": True}, TypeError, "`filters=True`"), ({"colour": 1}, TypeError, "colour"),
    ],
    ids=label,
)  # fmt: skip
def test_what_is_refused_on_construction(arguments, kind, message) -> None:
    with pytest.raises(kind, match=message):
        c3t.nnx.Conv3DTranspose(**{"in_features": 3, "filters": 4, "kernel_size": 3, "rngs": nnx.Rngs(0), **arguments})


def test_what_is_refused_in_use() -> None:
    with pytest.raises(ValueError, match="the inputs have 2 channels, but the kernel of shape"):
        make()(X[..., :2])
    with pytest.raises(ValueError, match="was made for `input_shape"):
        make(input_shape=(3, 4, 3, 3))(X)
    with pytest.raises(TypeError, match="an NNX model alone"):
        c3t.find_layers(make(), X)
    with pytest.raises(TypeError, match="an NNX model holds its layers"):
        c3t.regularization_loss(make(), make())


def test_initial_values_come_from_the_streams_as_in_flax() -> None:
    keys, normal = nnx.Rngs(0), jax.nn.initializers.normal()
    want = (
        jax.nn.initializers.glorot_uniform()(keys.params(), (2, 2, 2, 4, 3), jnp.float32),
        normal(keys.params(), (4,)),
    )
    for rngs in (nnx.Rngs(0), nnx.Rngs(params=0), nnx.Rngs(0).params):
        layer = make(4, 2, bias_initializer=normal, rngs=rngs)
        np.testing.assert_allclose(layer.bias[...], want[1], rtol=1e-6)
        np.testing.assert_allclose(layer.kernel[...], want[0], rtol=1e-6)


def test_attributes_set_after_construction() -> None:
    layer = make(4, 3, activity_regularizer="l2")
    config = layer.get_config()
    layer(X)
    assert nnx.pop(layer, RegularizationLoss)
    layer(X)
    assert c3t.regularization_loss(layer) > 0
    layer.activity_regularizer = None
    assert c3t.regularization_loss(layer) == 0
    layer.set_attributes(dtype="bfloat16", strides=2, trainable=False)
    assert layer(X).dtype == jnp.bfloat16
    expected = {
        **config,
        "strides": [2, 2, 2],
        "trainable": False,
        "activity_regularizer": None,
        "dtype": "mixed_bfloat16",
    }
    assert layer.get_config() == expected
    other = make(4, 3)
    other.set_attributes(activity_regularizer="l2")
    other(X)
    assert c3t.regularization_loss(other) > 0
    for use_bias, held in ((False, "a"), (True, "no")):
        layer = make(4, 3, use_bias=not use_bias)
        layer.use_bias = use_bias
        with pytest.raises(ValueError, match=f"`use_bias={use_bias}` was set on a layer that holds {held} bias"):
            layer(X)
    layer = make(4, 3)
    layer.filters = 5
    with pytest.raises(ValueError, match="the kernel has shape"):
        layer(X)


def test_split_merge_clone_eval_shape_and_jit() -> None:
    layer = make(4, 3, **UP, activity_regularizer="l2")
    want = layer(X)
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    np.testing.assert_array_equal(nnx.merge(graph, params, rest)(X), want)
    np.testing.assert_array_equal(jax.tree.map(jnp.copy, layer)(X), want)
    np.testing.assert_array_equal(nnx.clone(layer)(X), want)
    np.testing.assert_allclose(nnx.jit(lambda layer, x: layer(x))(layer, X), want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(nnx.remat(lambda layer, x: layer(x))(layer, X), want, rtol=1e-5, atol=1e-6)
    abstract = nnx.eval_shape(lambda: make(4, 3, **UP))
    assert abstract.kernel.get_value() == jax.ShapeDtypeStruct((3, 3, 3, 4, 3), jnp.float32)
    assert hash(graph) == hash(nnx.graphdef(make(4, 3, **UP, activity_regularizer="l2")))


def test_calls_do_not_compile_again() -> None:
    layer, traces = (
        make(4, 2, activity_regularizer="l2", activation=jnp.tanh, weights=[np.ones((2, 2, 2, 4, 3)), np.ones(4)]),
        [],
    )

    @nnx.jit
    def call(layer, x):
        traces.append(x.shape)
        return layer(x)

    for _ in range(3):
        call(layer, X)
    assert len(traces) == 1


def test_an_ensemble_by_vmap_and_a_tower_by_scan() -> None:
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def ensemble(rngs):
        return c3t.nnx.Conv3DTranspose(
            3, 3, 3, padding="same", activity_regularizer="l2", kernel_regularizer="l1", rngs=rngs
        )

    layers = ensemble(nnx.Rngs(0))
    one = [jax.tree.map(lambda leaf, i=i: leaf[i], layers) for i in range(3)]
    outputs = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(layers, X)
    for i in range(3):
        np.testing.assert_allclose(outputs[i], one[i](X), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        c3t.regularization_loss(layers), sum(c3t.regularization_loss(layer) for layer in one), rtol=1e-5
    )
    shared = make(3, 3, padding="same")
    np.testing.assert_allclose(
        nnx.vmap(lambda layer, x: layer(x), in_axes=(None, 0))(shared, X), shared(X), rtol=1e-5, atol=1e-5
    )

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def tower(layer, x):
        return layer(x)

    want = X
    for layer in one:
        want = layer(want)
    np.testing.assert_allclose(tower(layers, X), want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(layers.activity_loss[2], one[2].activity_loss[...], rtol=1e-4)


def test_higher_derivatives_through_the_functional_form() -> None:
    layer = make(2, 2, 2)
    graph, params = nnx.split(layer)

    def loss(params):
        return jnp.tanh(nnx.merge(graph, params)(X)).sum()

    direction = jax.tree.map(jnp.ones_like, params)
    product = jax.jvp(jax.grad(loss), (params,), (direction,))[1]
    assert np.isfinite(product["kernel"][...]).all()
    assert np.abs(product["kernel"][...]).max() > 0


def test_export_empty_batches_and_float64(x64) -> None:
    layer = make(4, 3, **UP, param_dtype="float64", activity_regularizer="l2")
    x = X.astype(np.float64)
    want = layer(x)
    assert want.dtype == layer.activity_loss.get_value().dtype == np.float64
    narrow = make(4, 3, activity_regularizer="l2")
    before = jax.typeof(narrow.activity_loss.get_value())
    assert narrow(X).dtype == np.float32
    assert jax.typeof(narrow.activity_loss.get_value()) == before
    np.testing.assert_allclose(layer(x[0]), want[0], rtol=1e-12, atol=1e-12)
    assert layer(x[:0]).shape == (0, 6, 8, 4, 4)
    assert c3t.regularization_loss(layer) == 0
    graph, state = nnx.split(layer)
    batch = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("n"), *X.shape[1:]), x.dtype)
    exported = jax.export.export(jax.jit(lambda state, x: nnx.merge(graph, state)(x)))(nnx.to_pure_dict(state), batch)
    again = jax.export.deserialize(exported.serialize())
    np.testing.assert_allclose(again.call(nnx.to_pure_dict(state), x), want, rtol=1e-12, atol=1e-12)


def test_config_round_trip_with_linen_and_keras() -> None:
    keras = pytest.importorskip("keras")
    layer = make(6, 2, 2, groups=3, kernel_regularizer="l2", name="up", dtype="bfloat16")
    config = json.loads(json.dumps(layer.get_config()))
    assert c3t.nnx.Conv3DTranspose.from_config(config, in_features=3, rngs=nnx.Rngs(1)).get_config() == config
    assert c3t.Conv3DTranspose.from_config(config).get_config() == config
    theirs = keras.layers.Conv3DTranspose.from_config(make(6, 2, 2, kernel_regularizer="l2").get_config())
    theirs.build(X.shape)
    ours = c3t.nnx.Conv3DTranspose.from_config(theirs.get_config(), in_features=3, rngs=nnx.Rngs(0))
    nnx.update(ours, {"kernel": theirs.kernel.value, "bias": theirs.bias.value})
    np.testing.assert_allclose(ours(X), theirs(X), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="did you mean 'strides'"):
        c3t.nnx.Conv3DTranspose.from_config(config | {"stride": 2}, in_features=3, rngs=nnx.Rngs(0))
