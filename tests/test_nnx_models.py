"""NNX models: their layers found, the losses of their regularizers, their constraints in an optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import conv3dt_jax as c3t
from conv3dt_jax.nnx import RegularizationLoss
from tests.nnx_layers import UP, X, make, params_of

# optax, Flax and Keras promote implicitly
pytestmark = [pytest.mark.lenient, pytest.mark.usefixtures("quick_compiles")]


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
    keras = pytest.importorskip("keras")
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


def test_parameters_of_something_else_are_refused() -> None:
    """A constraint that finds nothing to constrain must not pass for one that is kept."""
    model = Autoencoder(nnx.Rngs(0))
    optimizer = c3t.constrain(optax.sgd(1.0), model)
    state = nnx.state(model, nnx.Param)
    for params in (model, {"model": nnx.to_pure_dict(state)}, {"params": nnx.to_pure_dict(state)}):
        with pytest.raises(ValueError, match="the parameters are not those of the model"):
            optimizer.update(params, optimizer.init(params), params)


def test_a_state_may_hold_a_layer_named_params() -> None:
    model = Tied(nnx.Rngs(0))
    layers = {path: layer for path, layer in c3t.find_layers(model).items() if path == ("params",)}
    model.params.kernel = nnx.Param(2 * model.a.kernel[...])
    want = 0.01 * jnp.square(model.params.kernel[...]).sum()
    np.testing.assert_allclose(c3t.regularization_loss(nnx.state(model), layers), want, rtol=1e-6)
