"""Regularizers and constraints against the real Keras layer: the same losses, and the same weights after training."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import conv3dt_jax as c3t
from conv3dt_jax import constraints, regularizers
from tests.helpers import label

keras = pytest.importorskip("keras")

pytestmark = [pytest.mark.lenient, pytest.mark.usefixtures("quick_compiles")]

X = np.random.default_rng(0).normal(size=(3, 2, 3, 2, 3)).astype(np.float32)
LAYER = {"filters": 4, "kernel_size": (2, 3, 2), "strides": 2, "padding": "same"}

REGULARIZERS = [
    "l1", "l2", "L2", {"class_name": "L2", "config": {"l2": 0.3}}, {"class_name": "L1L2", "config": {"l1": 0.1, "l2": 0.2}},
    {"module": "keras.regularizers", "class_name": "L1", "config": {"l1": 0.25}, "registered_name": None},
    keras.regularizers.L1L2(0.02, 0.03), keras.regularizers.L1, "l1l2", lambda x: 0.1 * abs(x).sum() ** 0.5,
]  # fmt: skip
CONSTRAINTS = [
    "max_norm", "non_neg", "unit_norm", "min_max_norm", "MaxNorm", keras.constraints.NonNeg(), keras.constraints.UnitNorm,
    {"class_name": "MaxNorm", "config": {"max_value": 0.4, "axis": [0, 1, 2, 4]}},
    {"class_name": "MinMaxNorm", "config": {"min_value": 0.3, "max_value": 0.5, "rate": 0.7, "axis": [0, 1, 2]}},
    {"class_name": "UnitNorm", "config": {"axis": -1}},
    keras.constraints.MinMaxNorm(0.1, 0.2, rate=0.5, axis=(1, 2)), lambda w: w * 0.5,
]  # fmt: skip


def keras_layer(**kwargs):
    layer = keras.layers.Conv3DTranspose(**LAYER, **kwargs, bias_initializer="random_normal")
    layer.build(X.shape)
    return layer, {weight.name: jnp.array(weight.value, copy=True) for weight in layer.weights}  # Keras donates its own


@pytest.mark.parametrize("regularizer", REGULARIZERS, ids=label)
def test_the_losses_are_those_of_the_keras_layer(regularizer) -> None:
    names = dict.fromkeys(("kernel_regularizer", "bias_regularizer", "activity_regularizer"), regularizer)
    theirs, params = keras_layer(**names)
    theirs(X)
    ours = c3t.Conv3DTranspose(**LAYER, **names)
    outputs, state = ours.apply({"params": params}, X, mutable=["losses"])
    total = c3t.regularization_loss({"params": params, **state}, ours)
    assert total.shape == ()
    np.testing.assert_allclose(total, sum(map(float, theirs.losses)), rtol=1e-6)
    np.testing.assert_allclose(outputs, ours.apply({"params": params}, X))
    weights_alone = sum(float(loss) for loss in theirs.losses[1:])
    np.testing.assert_allclose(c3t.regularization_loss(params, ours), weights_alone, rtol=1e-6)
    np.testing.assert_allclose(c3t.regularization_loss(state), theirs.losses[0], rtol=1e-6)


def trained_by_keras(**kwargs):
    layer, params = keras_layer(**kwargs)
    model = keras.Sequential([keras.Input(X.shape[1:]), layer])
    model.compile(optimizer=keras.optimizers.SGD(0.02, momentum=0.9), loss="mse")
    target = np.random.default_rng(1).normal(size=(3, 4, 6, 4, 4)).astype(np.float32)
    for _ in range(3):
        model.train_on_batch(X, target)
    return params, target, {weight.name: np.asarray(weight.value) for weight in layer.weights}


def trained_here(params, target, **kwargs):
    layer = c3t.Conv3DTranspose(**LAYER, **kwargs)
    optimizer = c3t.constrain(optax.sgd(0.02, momentum=0.9), layer)

    def loss(params):
        outputs, state = layer.apply({"params": params}, X, mutable=["losses"])
        return jnp.square(outputs - target).mean() + c3t.regularization_loss({"params": params, **state}, layer)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(3):
        params, state = step(params, state)
    return params


@pytest.mark.parametrize("regularizer", REGULARIZERS[3:6] + REGULARIZERS[-1:], ids=label)
def test_three_steps_with_a_regularizer_give_keras_weights(regularizer) -> None:
    names = dict.fromkeys(("kernel_regularizer", "bias_regularizer", "activity_regularizer"), regularizer)
    params, target, want = trained_by_keras(**names)
    got = trained_here(params, target, **names)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-6, atol=1e-6)
        assert np.abs(want[name] - params[name]).max() > 1e-4


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=label)
def test_three_steps_with_a_constraint_give_keras_weights(constraint) -> None:
    names = {"kernel_constraint": constraint}
    if not (isinstance(constraint, (dict, keras.constraints.MinMaxNorm))):
        names["bias_constraint"] = constraint
    params, target, want = trained_by_keras(**names)
    got = trained_here(params, target, **names)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_after_the_update_the_parameters_satisfy_the_constraint(dtype) -> None:
    layer = c3t.Conv3DTranspose(**LAYER, param_dtype=dtype, kernel_constraint="non_neg", bias_constraint="non_neg")
    params = layer.init(jax.random.key(0), X)["params"]
    gradient = jax.tree.map(lambda p: jax.random.normal(jax.random.key(1), p.shape, p.dtype), params)
    optimizer = c3t.constrain(optax.sgd(0.3), layer)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    new = optax.apply_updates(params, updates)
    assert all((leaf >= 0).all() and leaf.dtype == dtype for leaf in jax.tree.leaves(new))
    free = optax.apply_updates(params, optax.sgd(0.3).update(gradient, optax.sgd(0.3).init(params))[0])
    np.testing.assert_array_equal(new["kernel"], np.maximum(free["kernel"], 0))


def test_activity_losses_are_divided_by_the_batch_whatever_its_dimensions() -> None:
    layer = c3t.Conv3DTranspose(2, 2, activity_regularizer="l1")
    variables = layer.init(jax.random.key(0), X)
    assert set(variables) == {"params"}

    def loss(x):
        return c3t.regularization_loss(layer.apply(variables, x, mutable=["losses"])[1])

    want = 0.01 * np.abs(layer.apply(variables, X)).sum() / 3
    np.testing.assert_allclose(loss(X), want, rtol=1e-6)
    np.testing.assert_allclose(loss(X[None]), want, rtol=1e-6)
    np.testing.assert_allclose(loss(X[0]) + loss(X[1]) + loss(X[2]), 3 * want, rtol=1e-6)
    assert loss(X[:0]) == 0
    assert jax.jit(loss)(X) == pytest.approx(float(want), rel=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_summed_in_float32(dtype) -> None:
    layer = c3t.Conv3DTranspose(64, 2, dtype=dtype, activity_regularizer="l2", kernel_initializer="ones")
    x = jnp.full((1, 8, 8, 8, 2), 40, dtype)
    _, state = layer.apply(layer.init(jax.random.key(0), x), x, mutable=["losses"])
    loss = c3t.regularization_loss(state)
    assert loss.dtype == jnp.float32
    assert jnp.isfinite(loss)


def test_a_layer_that_is_not_trained_gets_no_gradient_and_no_penalty() -> None:
    layer = c3t.Conv3DTranspose(**LAYER, trainable=False, kernel_regularizer="l2", activity_regularizer="l2")
    theirs, params = keras_layer(trainable=False, kernel_regularizer="l2", activity_regularizer="l2")
    theirs(X)

    def loss(params, x):
        outputs, state = layer.apply({"params": params}, x, mutable=["losses"])
        return jnp.square(outputs).sum() + c3t.regularization_loss({"params": params, **state}, layer)

    gradients, through = jax.grad(loss, (0, 1))(params, X)
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradients))
    assert through.any()
    _, state = layer.apply({"params": params}, X, mutable=["losses"])
    np.testing.assert_allclose(
        c3t.regularization_loss({"params": params, **state}, layer), sum(map(float, theirs.losses)), rtol=1e-6
    )


def test_half_precision_norms_are_taken_in_float32() -> None:
    large, zero = jnp.full((2, 2, 2, 3, 3), 100, "float16"), jnp.zeros((2, 2, 2, 3, 3), "float16")
    axis = (0, 1, 2, 4)
    np.testing.assert_allclose(constraints.MaxNorm(1.0)(jnp.array([3, 4])), [0.6, 0.8], rtol=1e-6)
    for constraint in (
        constraints.UnitNorm(axis),
        constraints.MaxNorm(1.0, axis),
        constraints.MinMaxNorm(0, 1, axis=axis),
    ):
        got = constraint(large)
        assert got.dtype == jnp.float16
        np.testing.assert_allclose(np.square(got.astype("float32")).sum(axis), 1, rtol=1e-2)
        assert not constraint(zero).any()


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"kernel_regularizer": "l3"}, ValueError, "`kernel_regularizer='l3'` is not a name that Keras knows"),
        ({"kernel_regularizer": 0.1}, TypeError, "`kernel_regularizer=0.1` must be a Keras name"),
        ({"bias_regularizer": {"class_name": "L2", "config": {"l1": 1.0}}}, ValueError, "does not fit 'L2'"),
        ({"activity_regularizer": {"class_name": "L2", "config": {"l2": -1.0}}}, ValueError, "at least 0"),
        ({"activity_regularizer": {"class_name": "L2", "config": {"l2": "a"}}}, ValueError, "must be a number, not str"),
        ({"kernel_regularizer": {"class_name": "OrthogonalRegularizer", "config": {"mode": "x"}}}, ValueError, "'rows' or 'columns'"),
        ({"kernel_constraint": "max"}, ValueError, "`kernel_constraint='max'` is not a name that Keras knows"),
        ({"kernel_constraint": 2}, TypeError, "`kernel_constraint=2` must be a Keras name"),
        ({"kernel_constraint": {"class_name": "MaxNorm", "config": {"axis": 5}}}, ValueError, "the parameter has 5 axes"),
        ({"bias_constraint": {"class_name": "MaxNorm", "config": {"axis": [0, 1, 2]}}}, ValueError, "the parameter has 1 axes"),
        ({"kernel_constraint": {"class_name": "MaxNorm", "config": {"axis": [0, -5]}}}, ValueError, "names an axis twice"),
        ({"kernel_constraint": {"class_name": "MaxNorm", "config": {"axis": 0.5}}}, ValueError, "must be an integer"),
        ({"kernel_constraint": {"class_name": "MinMaxNorm", "config": {"min_value": 2.0}}}, ValueError, "must not be above"),
        ({"kernel_constraint": {"class_name": "MaxNorm", "config": {"max_value": -1}}}, ValueError, "at least 0"),
        ({"trainable": 1}, TypeError, "`trainable=1` must be True or False"),
    ],
)  # fmt: skip
def test_what_the_layer_refuses(arguments, kind, message) -> None:
    with pytest.raises(kind, match=message):
        c3t.Conv3DTranspose(4, 2, **arguments)


def test_what_is_refused_in_use() -> None:
    orthogonal = c3t.Conv3DTranspose(4, 2, kernel_regularizer="orthogonal_regularizer")
    params = orthogonal.init(jax.random.key(0), X)["params"]
    with pytest.raises(ValueError, match=r"`kernel_regularizer` does not take an array of shape .*takes matrices"):
        c3t.regularization_loss(params, orthogonal)
    vector = c3t.Conv3DTranspose(4, 2, kernel_regularizer=lambda w: w.sum(0))
    with pytest.raises(ValueError, match="it must return a scalar"):
        c3t.regularization_loss(params, vector)
    with pytest.raises(ValueError, match="the parameters have no 'up/kernel': the top holds"):
        c3t.regularization_loss(params, {"up": c3t.Conv3DTranspose(4, 2, kernel_regularizer="l2")})
    for variables in (params, {"params": params, "losses": {"activity_regularizer": (1.0,)}}):
        with pytest.raises(ValueError, match="needs the layers"):
            c3t.regularization_loss(variables)
    with pytest.raises(TypeError, match="use find_layers"):
        c3t.regularization_loss(params, nn.Dense(3))
    with pytest.raises(TypeError, match="must be an NNX model, or a dict"):
        c3t.regularization_loss([params], orthogonal)
    optimizer = c3t.constrain(optax.sgd(0.1), c3t.Conv3DTranspose(4, 2, kernel_constraint=lambda w: w[0]))
    with pytest.raises(ValueError, match="constrain needs the parameters"):
        optimizer.update(params, optimizer.init(params))
    with pytest.raises(TypeError, match="must be an optax transformation, not int"):
        c3t.constrain(3, orthogonal)
    with pytest.raises(TypeError, match=r"must be a flax\.linen\.Module or a flax\.nnx\.Module, not int"):
        c3t.find_layers(3, X)
    with pytest.raises(ValueError, match="the shape must stay"):
        optimizer.update(params, optimizer.init(params), params)


def test_the_orthogonal_regularizer_is_that_of_keras() -> None:
    matrix = np.random.default_rng(2).normal(size=(4, 6)).astype(np.float32)
    for mode in ("rows", "columns"):
        want = keras.regularizers.OrthogonalRegularizer(0.3, mode)(jnp.asarray(matrix))
        np.testing.assert_allclose(regularizers.OrthogonalRegularizer(0.3, mode)(jnp.asarray(matrix)), want, rtol=1e-5)
    kernel = np.random.default_rng(3).normal(size=(2, 2, 2, 3, 4)).astype(np.float32)
    flat = c3t.Conv3DTranspose(
        3, 2, kernel_regularizer=lambda w: regularizers.OrthogonalRegularizer()(w.reshape(-1, 4).T)
    )
    assert c3t.regularization_loss({"kernel": kernel, "bias": np.zeros(3, np.float32)}, flat) > 0


def test_every_name_of_keras_is_known() -> None:
    for theirs, ours in ((keras.regularizers, regularizers), (keras.constraints, constraints)):
        for name in dir(theirs):
            kind = getattr(theirs, name)
            if isinstance(kind, type) and name not in ("Regularizer", "Constraint"):
                rank = {"rank": 5} if ours is constraints else {}
                found = ours.get("argument", name, **rank)
                assert type(found).__name__ == kind.__name__
    assert regularizers.get("argument", "l1_l2") == regularizers.L1L2(0.01, 0.01)  # as Keras documents the name
