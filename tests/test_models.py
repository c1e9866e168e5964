"""Layers within models: found, regularized and constrained wherever they are, stacked, boxed or masked."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import conv3dt_jax as c3t
from conv3dt_jax import constraints

pytestmark = [pytest.mark.lenient, pytest.mark.usefixtures("quick_compiles")]

X = np.random.default_rng(0).normal(size=(3, 2, 3, 2, 3)).astype(np.float32)


class Model(nn.Module):
    """Layers by hand, in a loop, rematerialized, and called twice."""

    @nn.compact
    def __call__(self, x):
        shared = c3t.Conv3DTranspose(3, 1, activity_regularizer="l2", kernel_regularizer="l2", name="shared")
        for i in range(2):
            x = c3t.Conv3DTranspose(3, 2, kernel_regularizer="l1", kernel_constraint="non_neg", name=f"up_{i}")(
                shared(x)
            )
        x = nn.Conv(3, (1, 1, 1))(x)
        x = nn.remat(c3t.Conv3DTranspose)(
            2, 1, bias_constraint="unit_norm", trainable=False, kernel_regularizer="l2", name="head"
        )(x)
        return nn.Dropout(0.5, deterministic=False)(x)


class WithFlag(nn.Module):
    layers: int = 2

    def setup(self):
        self.ups = [c3t.Conv3DTranspose(3, 1) for _ in range(self.layers)]

    def __call__(self, x, both, scale=1.0):
        x = self.ups[0](x * scale)
        return self.ups[1](x) if both else x


def test_find_layers_takes_flags_as_they_are() -> None:
    assert list(c3t.find_layers(WithFlag(), X, True)) == [("ups_0",), ("ups_1",)]
    assert list(c3t.find_layers(WithFlag(), X, False, scale=2.0)) == [("ups_0",)]
    struct = jax.ShapeDtypeStruct((), jnp.float32)
    assert list(c3t.find_layers(WithFlag(), jax.ShapeDtypeStruct(X.shape, X.dtype), True, scale=struct)) == [
        ("ups_0",),
        ("ups_1",),
    ]


def test_find_layers_names_those_of_a_model() -> None:
    layers = c3t.find_layers(Model(), X)
    assert sorted(layers) == [("head",), ("shared",), ("up_0",), ("up_1",)]
    assert layers[("up_1",)].kernel_constraint == constraints.NonNeg()
    assert c3t.find_layers(Model(), jax.ShapeDtypeStruct(X.shape, X.dtype)) == layers
    assert list(c3t.find_layers(c3t.Conv3DTranspose(2, 2), X)) == [()]


def test_a_whole_model_is_regularized_and_constrained() -> None:
    model, layers = Model(), c3t.find_layers(Model(), X)
    params = model.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, X)["params"]
    kernels = {name: params[name]["kernel"] for name in ("shared", "up_0", "up_1")}
    want = 0.01 * (
        jnp.square(kernels["shared"]).sum() + jnp.abs(kernels["up_0"]).sum() + jnp.abs(kernels["up_1"]).sum()
    )
    np.testing.assert_allclose(c3t.regularization_loss(params, layers), want, rtol=1e-6)
    _, state = model.apply({"params": params}, X, mutable=["losses"], rngs={"dropout": jax.random.key(1)})
    assert len(jax.tree.leaves(state["losses"])) == 2  # one for each call of the shared layer

    optimizer = c3t.constrain(
        optax.adamw(0.1, weight_decay=0.1), {"/".join(path): layer for path, layer in layers.items()}
    )
    new, opt_state = params, optimizer.init(params)
    for _ in range(2):
        updates, opt_state = optimizer.update(jax.tree.map(jnp.ones_like, params), opt_state, new)
        new = optax.apply_updates(new, updates)
    assert (new["up_0"]["kernel"] >= 0).all()
    assert (new["up_1"]["kernel"] >= 0).all()
    jax.tree.map(np.testing.assert_array_equal, new["head"], params["head"])  # not trained, not even decayed
    free = optax.adamw(0.1, weight_decay=0.1)
    state, other = free.init(params), params
    for _ in range(2):
        updates, state = free.update(jax.tree.map(jnp.ones_like, params), state, other)
        other = optax.apply_updates(other, updates)
    jax.tree.map(np.testing.assert_array_equal, new["Conv_0"], other["Conv_0"])


def test_stacked_layers_are_constrained_each_on_its_own() -> None:
    layer = c3t.Conv3DTranspose(4, 2, kernel_constraint={"class_name": "UnitNorm", "config": {"axis": [0, 1, 2, 4]}})
    stack = nn.vmap(c3t.Conv3DTranspose, variable_axes={"params": 0}, split_rngs={"params": True})(4, 2)
    params = stack.init(jax.random.key(0), X)["params"]
    optimizer = c3t.constrain(optax.identity(), layer)
    zero = jax.tree.map(jnp.zeros_like, params)
    new = optax.apply_updates(params, optimizer.update(zero, optimizer.init(params), params)[0])
    np.testing.assert_allclose(jnp.square(new["kernel"]).sum((1, 2, 3, 5)), np.ones((3, 4)), rtol=1e-5)


def test_layers_stacked_along_another_axis_are_refused() -> None:
    layer = c3t.Conv3DTranspose(4, 2, kernel_constraint="unit_norm", kernel_regularizer="l2")
    stack = nn.vmap(c3t.Conv3DTranspose, variable_axes={"params": -1}, split_rngs={"params": True})(4, 2)
    params = stack.init(jax.random.key(0), X)["params"]
    optimizer = c3t.constrain(optax.sgd(0.1), layer)
    with pytest.raises(ValueError, match="must be so along the first axis"):
        optimizer.update(params, optimizer.init(params), params)
    with pytest.raises(ValueError, match="must be so along the first axis"):
        c3t.regularization_loss(params, layer)


def test_boxed_parameters_and_masks() -> None:
    layer = c3t.Conv3DTranspose(
        2, 2, kernel_constraint="non_neg", kernel_regularizer="l2",
        kernel_initializer=nn.with_partitioning(jax.nn.initializers.normal(), (None,) * 5),
    )  # fmt: skip
    params = layer.init(jax.random.key(0), X)["params"]
    assert isinstance(params["kernel"], nn.Partitioned)
    assert c3t.regularization_loss(params, layer) > 0
    optimizer = optax.masked(c3t.constrain(optax.sgd(0.1), layer), {"kernel": True, "bias": False})
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    new = optax.apply_updates(params, updates)
    assert isinstance(new["kernel"], nn.Partitioned)
    assert (new["kernel"].value >= 0).all()
