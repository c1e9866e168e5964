"""The NNX layer: to the bit what the Linen layer computes, and at home in NNX's transformations, optimizer and bridge."""

import dataclasses
import inspect
import json
import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import conv3dt_jax as c3t
from conv3dt_jax import initializers
from conv3dt_jax.nnx import RegularizationLoss
from tests.helpers import label

pytestmark = [
    pytest.mark.lenient,
    pytest.mark.usefixtures("quick_compiles"),
]  # optax, Flax and Keras promote implicitly

X = np.random.default_rng(0).normal(size=(2, 3, 4, 2, 3)).astype(np.float32)
UP = {"strides": 2, "padding": "same", "activation": "tanh"}


def make(*arguments, rngs=None, **options) -> c3t.nnx.Conv3DTranspose:
    return c3t.nnx.Conv3DTranspose(3, *(arguments or (4, 3)), **options, rngs=rngs or nnx.Rngs(0))


def params_of(layer) -> dict:
    return {name: value[...] for name, value in (("kernel", layer.kernel), ("bias", layer.bias)) if value is not None}


def test_it_takes_what_the_linen_layer_takes() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(c3t.Conv3DTranspose) if field.name != "parent"}
    signature = inspect.signature(c3t.nnx.Conv3DTranspose.__init__).parameters
    taken = [name for name, parameter in signature.items() if parameter.kind is not parameter.KEYWORD_ONLY]
    assert taken == ["self", "in_features", *(name for name in fields if name != "name"), "name"]
    assert {name: signature[name].default for name in fields if name not in ("filters", "kernel_size", "name")} == {
        name: default for name, default in fields.items() if name not in ("filters", "kernel_size", "name")
    }
    assert c3t.nnx.Convolution3DTranspose is c3t.nnx.Conv3DTranspose


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


class Autoencoder(nnx.Module):
    """Layers in a list, one twice, one alone; with everything that leaves a loss or a constraint."""

    def __init__(self, rngs) -> None:
        shared = c3t.nnx.Conv3DTranspose(3, 3, 1, activity_regularizer="l2", kernel_regularizer="l1", rngs=rngs)
        self.ups = nnx.List([shared, nnx.Conv(3, 3, (1, 1, 1), rngs=rngs), shared])
        self.head = c3t.nnx.Conv3DTranspose(
            3, 1, 2, 2, bias_regularizer="l2", bias_initializer="ones", kernel_constraint="non_neg", rngs=rngs
        )
        self.fixed = c3t.nnx.Conv3DTranspose(1, 1, 1, trainable=False, kernel_regularizer="l2", rngs=rngs)

    def __call__(self, x):
        for layer in self.ups:
            x = layer(x)
        return self.fixed(self.head(x))


def test_layers_are_found_by_their_paths() -> None:
    model = Autoencoder(nnx.Rngs(0))
    layers = c3t.find_layers(model)
    assert set(layers) == {("ups", 0), ("head",), ("fixed",)}
    assert layers["head",] is model.head
    assert {path[:-1] for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))} == {*layers, ("ups", 1)}
    assert c3t.find_layers(model.head) == {(): model.head}


def test_losses_are_of_a_type_of_their_own_and_add_up() -> None:
    model = Autoencoder(nnx.Rngs(0))
    shared = model.ups[0]
    weights = 0.01 * (jnp.abs(shared.kernel[...]).sum() + 1)
    assert [path for path, _ in nnx.to_flat_state(nnx.state(model, RegularizationLoss))] == [
        ("ups", 0, "activity_loss")
    ]
    np.testing.assert_allclose(c3t.regularization_loss(model), weights, rtol=1e-6)

    first = shared(X)
    latest = 0.01 * jnp.square(shared(model.ups[1](first))).sum() / 2
    once = 0.01 * jnp.square(first).sum() / 2
    structure = jax.tree.structure(nnx.state(model))
    _, losses = nnx.capture(model, RegularizationLoss)(X)
    np.testing.assert_allclose(c3t.regularization_loss(model), weights + latest, rtol=1e-5)
    np.testing.assert_allclose(c3t.regularization_loss(model, losses=losses), weights + latest + once, rtol=1e-5)
    assert jax.tree.structure(nnx.state(model)) == structure
    whole = c3t.regularization_loss(nnx.state(model), c3t.find_layers(model))
    np.testing.assert_allclose(whole, c3t.regularization_loss(model), rtol=1e-6)


def test_losses_reach_the_gradient_under_jit() -> None:
    layer = make(4, 2, 2, activity_regularizer="l2", kernel_regularizer="l1")
    linen = c3t.Conv3DTranspose(4, 2, 2, activity_regularizer="l2", kernel_regularizer="l1")

    @nnx.jit
    def gradient(layer):
        def loss(layer):
            return layer(X).mean() + c3t.regularization_loss(layer)

        return nnx.value_and_grad(loss)(layer)

    def linen_loss(params):
        y, state = linen.apply({"params": params}, X, mutable=["losses"])
        return y.mean() + c3t.regularization_loss({"params": params, **state}, linen)

    value, gradients = gradient(layer)
    want, wanted = jax.value_and_grad(linen_loss)(params_of(layer))
    np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_allclose(gradients["kernel"][...], wanted["kernel"], rtol=1e-5, atol=1e-7)
    assert layer.activity_loss[...] > 0  # what was left in the transformation came out of it


def test_no_loss_is_lost_in_a_transformation_that_closes_over_the_layer() -> None:
    layer = make(4, 2, activity_regularizer="l2")
    for call in (jax.jit(lambda x: layer(x)), jax.checkpoint(lambda x: layer(x)), jax.vmap(layer)):
        with pytest.raises(ValueError, match="closes over the layer cannot change: pass the layer"):
            call(X)
    layer(X)
    with pytest.raises(ValueError, match="left outside of the transformation"):
        jax.jit(lambda: c3t.regularization_loss(layer))()
    layer.eval()
    assert c3t.regularization_loss(layer) == 0
    for call in (jax.jit(lambda x: layer(x)), jax.checkpoint(lambda x: layer(x)), jax.vmap(layer)):
        assert call(X).shape == (2, 4, 5, 3, 4)
    layer.train()
    nnx.jit(nnx.remat(lambda layer, x: layer(x)))(layer, X)
    assert c3t.regularization_loss(layer) == layer.activity_loss[...] > 0


@pytest.mark.parametrize("regularizer", ["l2", lambda y: 0.1 * jnp.square(y).sum(), lambda y: 0.1])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_loss_keeps_its_dtype(regularizer, dtype) -> None:
    layer = make(3, 3, padding="same", dtype=dtype, activity_regularizer=regularizer)
    before = jax.typeof(layer.activity_loss.get_value())

    @nnx.scan(length=3, in_axes=(nnx.Carry, None), out_axes=(nnx.Carry, 0))
    def repeated(layer, x):
        return layer, layer(x)

    repeated(layer, X)
    assert jax.typeof(layer.activity_loss.get_value()) == before
    assert layer.activity_loss[...] > 0


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


class Tied(nnx.Module):
    """Two layers with one kernel, one of them under a name that Linen uses for something else."""

    def __init__(self, rngs) -> None:
        self.a = c3t.nnx.Conv3DTranspose(3, 3, 2, kernel_constraint="non_neg", kernel_regularizer="l2", rngs=rngs)
        self.params = c3t.nnx.Conv3DTranspose(3, 3, 2, kernel_constraint="non_neg", kernel_regularizer="l2", rngs=rngs)
        self.params.kernel = self.a.kernel

    def __call__(self, x):
        return self.params(self.a(x))


def test_shared_parameters_are_penalized_and_constrained_once() -> None:
    model = Tied(nnx.Rngs(0))
    np.testing.assert_allclose(c3t.regularization_loss(model), 0.01 * jnp.square(model.a.kernel[...]).sum(), rtol=1e-6)
    optimizer = nnx.Optimizer(model, c3t.constrain(optax.sgd(1.0), model), wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda model: model(X).sum())(model))
    assert (model.a.kernel[...] >= 0).all()
    assert model.params.kernel is model.a.kernel


def test_an_optimizer_of_a_part_of_the_model() -> None:
    model = Autoencoder(nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    part = nnx.All(nnx.Param, nnx.PathContains("head"))
    for layers in (model, {"head": model.head}):
        optimizer = nnx.Optimizer(model, c3t.constrain(optax.sgd(1.0), layers), wrt=part)
        gradient = nnx.grad(lambda model: model(X).sum(), argnums=nnx.DiffState(0, part))(model)
        optimizer.update(model, gradient)
        assert (model.head.kernel[...] >= 0).all()
    np.testing.assert_array_equal(model.ups[0].kernel[...], before["ups"][0]["kernel"][...])
    optimizer = nnx.Optimizer(model, c3t.constrain(optax.sgd(1.0), c3t.find_layers(model)), wrt=part)
    with pytest.raises(ValueError, match="the parameters have no 'fixed/"):
        optimizer.update(model, gradient)


def test_models_that_look_like_something_else() -> None:
    class Wrapper(nnx.Module):
        """It hands an argument on, and keeps it."""

        def __init__(self) -> None:
            self.kernel_constraint = "non_neg"
            self.up = make(3, 2, kernel_constraint=self.kernel_constraint)

    for model in (Wrapper(), nnx.Dict(wrapped=nnx.Dict(up=make(3, 2, kernel_constraint="non_neg")))):
        optimizer = nnx.Optimizer(model, c3t.constrain(optax.sgd(9.0), model), wrt=nnx.Param)
        optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
        (layer,) = c3t.find_layers(model).values()
        assert (layer.kernel[...] == 0).all()


def test_an_optimizer_constrains_as_keras_does() -> None:
    """Three steps of SGD against `train_on_batch`."""
    arguments = {"kernel_regularizer": "l2", "activity_regularizer": "l1", "kernel_constraint": "max_norm", **UP}
    theirs = keras.Sequential([keras.layers.Conv3DTranspose(4, 3, bias_constraint="non_neg", **arguments)])
    theirs.build(X.shape)
    theirs.compile(keras.optimizers.SGD(0.5, 0.9), "mse")
    weights = [np.asarray(weight.value) for weight in theirs.weights]
    layer = make(4, 3, bias_constraint="non_neg", weights=weights, **arguments)
    target = np.random.default_rng(1).normal(size=(2, 6, 8, 4, 4)).astype(np.float32)
    optimizer = nnx.Optimizer(layer, c3t.constrain(optax.sgd(0.5, 0.9), layer), wrt=nnx.Param)

    @nnx.jit
    def step(layer, optimizer):
        gradients = nnx.grad(lambda layer: ((layer(X) - target) ** 2).mean() + c3t.regularization_loss(layer))(layer)
        optimizer.update(layer, gradients)

    for _ in range(3):
        theirs.train_on_batch(X, target)
        step(layer, optimizer)
    for ours, their in zip((layer.kernel[...], layer.bias[...]), theirs.weights, strict=True):
        np.testing.assert_allclose(ours, np.asarray(their.value), rtol=1e-5, atol=1e-6)


def test_a_whole_model_is_constrained() -> None:
    model = Autoencoder(nnx.Rngs(0))
    for layers in (model, c3t.find_layers(model), {"head": model.head, "ups/0": model.ups[0], "fixed": model.fixed}):
        fixed = model.fixed.kernel[...]
        optimizer = nnx.Optimizer(model, c3t.constrain(optax.adamw(0.5), layers), wrt=nnx.Param)
        optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
        assert (model.head.kernel[...] >= 0).all()
        np.testing.assert_array_equal(model.fixed.kernel[...], fixed)


def test_constraints_take_states_of_variables_too() -> None:
    layer = make(4, 2, kernel_constraint="non_neg")
    state = nnx.state(layer, nnx.Param)
    optimizer = c3t.constrain(optax.sgd(10.0), layer)
    updates, _ = optimizer.update(state, optimizer.init(state), state)
    nnx.update(layer, optax.apply_updates(state, updates))
    assert (layer.kernel[...] >= 0).all()
    np.testing.assert_allclose(
        c3t.regularization_loss(state, c3t.Conv3DTranspose(4, 2, kernel_regularizer="l1")),
        0.01 * layer.kernel[...].sum(), rtol=1e-6,
    )  # fmt: skip


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
    np.testing.assert_allclose(layer(x[0]), want[0], rtol=1e-12, atol=1e-12)
    assert layer(x[:0]).shape == (0, 6, 8, 4, 4)
    assert c3t.regularization_loss(layer) == 0
    graph, state = nnx.split(layer)
    batch = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("n"), *X.shape[1:]), x.dtype)
    exported = jax.export.export(jax.jit(lambda state, x: nnx.merge(graph, state)(x)))(nnx.to_pure_dict(state), batch)
    again = jax.export.deserialize(exported.serialize())
    np.testing.assert_allclose(again.call(nnx.to_pure_dict(state), x), want, rtol=1e-12, atol=1e-12)


def test_config_round_trip_with_linen_and_keras() -> None:
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


def test_the_bridge_from_linen() -> None:
    linen = c3t.Conv3DTranspose(4, 3, **UP, activity_regularizer="l2")
    bridged = nnx.bridge.lazy_init(nnx.bridge.ToNNX(linen, rngs=nnx.Rngs(0)), X)
    assert isinstance(bridged.kernel, nnx.Param)
    params = params_of(bridged)
    np.testing.assert_array_equal(bridged(X), linen.apply({"params": params}, X))
    assert c3t.find_layers(nnx.Dict(up=bridged)) == {("up",): linen}
    bridged(X, mutable=["losses"])
    assert isinstance(bridged.activity_regularizer, RegularizationLoss)
    activity = c3t.regularization_loss(bridged)
    assert activity > 0
    bridged.to_nnx__module = linen.copy(kernel_regularizer="l1")
    penalty = 0.01 * jnp.abs(bridged.kernel[...]).sum()
    np.testing.assert_allclose(c3t.regularization_loss(bridged), activity + penalty, rtol=1e-5)


def test_the_bridge_to_linen() -> None:
    model = nnx.bridge.to_linen(c3t.nnx.Conv3DTranspose, 3, 4, 3, **UP, activity_regularizer="l2")
    variables = model.init(jax.random.key(0), X)
    linen = c3t.Conv3DTranspose(4, 3, **UP, activity_regularizer="l2")
    want, state = linen.apply({"params": variables["params"]}, X, mutable=["losses"])
    np.testing.assert_array_equal(model.apply(variables, X), want)
    got, left = model.apply(variables, X, mutable=["losses"])
    np.testing.assert_array_equal(got, want)
    assert jax.tree.leaves(left["losses"]) == jax.tree.leaves(state["losses"])
    np.testing.assert_allclose(c3t.regularization_loss(left), c3t.regularization_loss(state))


MESH_AXES = ("data", "model")
RULES = (("filters", "model"), ("channels", None))
SPEC = P(None, None, None, "model", None)


def plain(spec: P) -> P:
    """Without the trailing axes that are not split."""
    parts = list(spec)
    while parts and parts[-1] is None:
        parts.pop()
    return P(*parts)


def annotated(kind: str):
    """A layer with a sharding annotation of each kind that Flax knows, and the specification that comes of it."""
    glorot = initializers.get("kernel_initializer", "glorot_uniform")
    if kind in ("nnx.with_partitioning", "nnx from nn.with_partitioning"):
        box = nnx.with_partitioning if kind == "nnx.with_partitioning" else nn.with_partitioning
        layer = make(8, 2, kernel_initializer=box(glorot, tuple(SPEC)))
    elif kind == "nnx logical":
        layer = make(8, 2, kernel_metadata={"out_sharding": initializers.KERNEL_AXES, "sharding_rules": RULES})
    else:
        names = tuple(SPEC) if kind == "nn.with_partitioning" else initializers.KERNEL_AXES
        box = nn.with_partitioning if kind == "nn.with_partitioning" else nn.with_logical_partitioning
        linen = c3t.Conv3DTranspose(8, 2, kernel_initializer=box(glorot, names))
        specs = nn.get_partition_spec(jax.eval_shape(linen.init, jax.random.key(0), X))
        return linen, nn.logical_to_mesh(specs, RULES) if "logical" in kind else specs
    return layer, nnx.get_partition_spec(nnx.state(layer))


@pytest.mark.parametrize(
    "kind",
    [
        "nnx.with_partitioning",
        "nnx from nn.with_partitioning",
        "nnx logical",
        "nn.with_partitioning",
        "nn.with_logical_partitioning",
    ],
)
def test_sharding_annotations_survive_into_jit(kind) -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), MESH_AXES)
    with nnx.use_eager_sharding(False):
        layer, specs = annotated(kind)
    if kind.startswith("nnx"):
        assert plain(specs["kernel"].get_value()) == plain(SPEC)
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
        lowered = jax.jit(lambda: nnx.state(nnx.clone(layer)), out_shardings=shardings).lower()
    else:
        assert plain(specs["params"]["kernel"]) == plain(SPEC)
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
        lowered = jax.jit(lambda: layer.init(jax.random.key(0), X), out_shardings=shardings).lower()
    text = lowered.as_text()
    assert '{}, {}, {}, {"model"}, {}' in text


EIGHT_DEVICES = """
import jax, jax.numpy as jnp, optax
from flax import nnx
import conv3dt_jax as c3t
from conv3dt_jax.initializers import KERNEL_AXES

mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
rules = (("filters", "model"), ("channels", None))
with jax.set_mesh(mesh):
    layer = c3t.nnx.Conv3DTranspose(
        3, 8, 2, 2, kernel_metadata={"out_sharding": KERNEL_AXES, "sharding_rules": rules}, rngs=nnx.Rngs(0)
    )
    optimizer = nnx.Optimizer(layer, optax.adam(1e-3), wrt=nnx.Param)
    x = jax.device_put(jnp.ones((4, 4, 4, 4, 3)), jax.NamedSharding(mesh, jax.P("data")))

    @nnx.jit
    def step(layer, optimizer, x):
        gradients = nnx.grad(lambda layer: jnp.square(layer(x)).mean())(layer)
        optimizer.update(layer, gradients)
        return layer(x)

    y = step(layer, optimizer, x)
    moments = [leaf for leaf in jax.tree.leaves(optimizer.opt_state) if leaf.ndim == 5]
    for array in (layer.kernel[...], *moments, y):
        print(array.sharding.shard_shape(array.shape))
"""


def test_a_training_step_on_eight_devices_keeps_the_kernel_split() -> None:
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run([sys.executable, "-c", EIGHT_DEVICES], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    *kernels, output = done.stdout.splitlines()
    assert kernels == ["(2, 2, 2, 2, 3)"] * 3  # the kernel and its two moments
    assert output.startswith("(2, 8, 8, 8,")
