"""The arguments that every Keras layer has: name, dtype, trainable, input shapes, weights; and compute_output_shape."""

import copy
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import conv3dt_jax as c3t
from tests.helpers import label

keras = pytest.importorskip("keras")

pytestmark = [pytest.mark.lenient, pytest.mark.usefixtures("quick_compiles")]

RNG = np.random.default_rng(1)
X = np.random.default_rng(0).normal(size=(2, 3, 4, 2, 3)).astype(np.float32)


def make(arguments):
    return c3t.Conv3DTranspose(**{"filters": 4, "kernel_size": 3, **arguments})


def test_given_weights_stay_read_only() -> None:
    layer = make({"weights": [RNG.normal(size=(3, 3, 3, 4, 3)), RNG.normal(size=4)]})
    for twin in (layer, pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert twin == layer
        assert make({"weights": twin.weights}).weights is twin.weights  # neither copied nor hashed at each call
        with pytest.raises(ValueError, match="read-only"):
            twin.weights[0][...] = 0


def test_base_arguments() -> None:
    kernel, bias = RNG.normal(size=(2, 2, 2, 4, 3)).astype(np.float32), RNG.normal(size=4).astype(np.float32)
    layer = c3t.Conv3DTranspose(4, 2, name="up", weights=[kernel, bias], batch_input_shape=(2, None, 4, 2, 3))
    variables = jax.jit(layer.init)(jax.random.key(0), X)
    np.testing.assert_array_equal(variables["params"]["kernel"], kernel)
    np.testing.assert_array_equal(variables["params"]["bias"], bias)
    assert layer.name == "up"
    assert hash(layer) == hash(layer.clone()) == hash(c3t.Conv3DTranspose.from_config(layer.get_config()))
    theirs = keras.layers.Conv3DTranspose(4, 2)
    theirs.build(X.shape)
    theirs.set_weights([kernel, bias])
    np.testing.assert_allclose(layer.apply(variables, X), theirs(X), rtol=1e-5, atol=1e-5)
    assert nn.Sequential([layer]).init(jax.random.key(0), X)["params"]["layers_0"]["bias"].shape == (4,)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"weights": [np.ones((3, 3, 3, 4, 3))]}, ValueError, r"the layer takes 2: \(kd, kh, kw.*and \(filters,\)"),
        ({"weights": [np.ones((3, 3, 3, 3, 4)), np.ones(4)]}, ValueError, "kernel_size=.*filters=4"),
        ({"weights": [np.ones((3, 3, 3, 4, 3)), np.ones(3)]}, ValueError, r"`weights` have the shapes"),
        ({"weights": np.ones(3)}, TypeError, "must be a list of arrays"),
        ({"weights": ["a", "b"]}, TypeError, "must hold arrays of numbers"),
        ({"weights": [1j * np.ones((3, 3, 3, 4, 3)), np.ones(4)]}, TypeError, "complex"),
        ({"batch_input_shape": (3, 4, 2, 3)}, ValueError, "must be the 5 sizes of an input with its batch"),
        ({"batch_input_shape": (1, 3, 4, 2, 3), "input_shape": (3, 4, 2, 4)}, ValueError, "differ"),
        (
            {"weights": [np.full((3, 3, 3, 4, 3), 1e6), np.ones(4)], "param_dtype": "float16"},
            ValueError,
            "beyond `param_dtype=float16`",
        ),
        ({"kernel_regularizer": np.ones(3)}, TypeError, "must be a Keras name"),
        ({"dtype": "mixed_bfloat16", "param_dtype": "bfloat16"}, ValueError, "keeps parameters in float32"),
        ({"dtype": keras.DTypePolicy("bfloat16")}, ValueError, "give param_dtype='bfloat16'"),
        ({"dtype": "mixed_float8"}, ValueError, "not a policy that Keras knows"),
    ],
)
def test_base_arguments_that_are_refused(arguments, kind, message) -> None:
    with pytest.raises(kind, match=message):
        make(arguments)


def test_given_weights_must_fit_the_inputs() -> None:
    layer = make({"weights": [np.ones((3, 3, 3, 4, 2)), np.ones(4)]})
    with pytest.raises(ValueError, match=r"`weights` hold shape .* but the inputs need"):
        layer.init(jax.random.key(0), X)


@pytest.mark.parametrize(
    "shape", [(2, 3, 4, 2, 3), (None, 3, 4, 2, 3), (2, None, 4, None, 3), (None,) * 5, (None, None, 5, 7, None)]
)
@pytest.mark.parametrize("arguments", [{}, {"strides": 2, "padding": "same"}, {"strides": (1, 2, 3), "output_padding": (0, 1, 2), "padding": "same"}, {"dilation_rate": 2}], ids=label)  # fmt: skip
def test_compute_output_shape_is_that_of_keras(shape, arguments) -> None:
    theirs = keras.layers.Conv3DTranspose(4, 3, **arguments)
    assert make(arguments).compute_output_shape(shape) == tuple(theirs.compute_output_shape(shape))
    first = (*shape[:1], shape[4], *shape[1:4])
    ours = make({**arguments, "data_format": "channels_first"}).compute_output_shape(first)
    assert ours == tuple(
        keras.layers.Conv3DTranspose(4, 3, **arguments, data_format="channels_first").compute_output_shape(first)
    )


def test_compute_output_shape_refuses_what_a_call_would() -> None:
    with pytest.raises(ValueError, match="rank 3"):
        make({}).compute_output_shape((None, 3, 3))
    with pytest.raises(ValueError, match="does not divide"):
        make({"groups": 2}).compute_output_shape((None, 3, 3, 3, 3))
    with pytest.raises(ValueError, match="leaves no output along depth"):
        make({"padding": 3}).compute_output_shape((None, 1, None, None, 3))
    with pytest.raises(TypeError, match="must be a shape"):
        make({}).compute_output_shape(5)


def test_stop_gradient_is_how_a_layer_is_frozen() -> None:
    layer = make({"trainable": False})
    params = layer.init(jax.random.key(0), X)["params"]
    optimizer = optax.sgd(1.0)
    gradients = jax.grad(lambda p: jnp.square(layer.apply({"params": p}, X)).sum())(params)
    updates, _ = optimizer.update(gradients, optimizer.init(params))
    jax.tree.map(np.testing.assert_array_equal, optax.apply_updates(params, updates), params)
