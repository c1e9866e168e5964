"""Configs: JSON and back, to and from Keras 3, from Keras 2."""

import copy
import dataclasses
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import conv3dt_jax as c3t
from conv3dt_jax import constraints, initializers, regularizers
from tests.helpers import label

keras = pytest.importorskip("keras")

pytestmark = [pytest.mark.lenient, pytest.mark.usefixtures("quick_compiles")]

X = np.random.default_rng(0).normal(size=(2, 3, 4, 2, 3)).astype(np.float32)
RNG = np.random.default_rng(1)


def my_activation(x):
    return x * 2


class MyPenalty:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, x):
        return self.factor * x.sum()

    def get_config(self):
        return {"factor": self.factor}

    def __eq__(self, other):
        return isinstance(other, MyPenalty) and self.factor == other.factor

    def __hash__(self):
        return hash(self.factor)


CUSTOM = {"my_activation": my_activation, "MyPenalty": MyPenalty}

# What Keras 3 takes as well.
SHARED = [
    {}, {"kernel_size": [2, 3, 1], "strides": (1, 2, 3), "padding": "SAME"}, {"strides": 2, "output_padding": (1, 0, 1)},
    {"data_format": "channels_first"}, {"dilation_rate": 2}, {"activation": "relu"}, {"activation": "hard_silu"},
    {"use_bias": False}, {"kernel_initializer": "he_normal", "bias_initializer": "ones"},
    {"kernel_initializer": {"class_name": "VarianceScaling", "config": {"scale": 2.0, "mode": "fan_out", "distribution": "uniform", "seed": 3}}},
    {"kernel_regularizer": "l2", "bias_regularizer": regularizers.L1L2(0.1, 0.2), "activity_regularizer": {"class_name": "L1", "config": {"l1": 0.5}}},
    {"kernel_constraint": constraints.MaxNorm(1.5, axis=(0, 1, 2)), "bias_constraint": "non_neg"},
    {"kernel_constraint": constraints.MinMaxNorm(0.1, 0.9, rate=0.5, axis=[0, 4])}, {"name": "up_1"}, {"trainable": False},
    {"dtype": "mixed_bfloat16"}, {"dtype": "mixed_float16"}, {"dtype": "float32"}, {"dtype": "bfloat16", "param_dtype": "bfloat16"},
    {"activation": {"class_name": "LeakyReLU", "config": {"negative_slope": 0.1}}},
    {"activation": jax.nn.relu}, {"activation": jnp.tanh}, {"kernel_regularizer": regularizers.L2(1e-4)},
]  # fmt: skip
# What is ours alone.
OURS = [
    {"groups": 2}, {"precision": "highest"}, {"precision": ("high", None)}, {"implementation": "dilated"},
    {"padding": "circular"}, {"padding": ((0, 1), (1, 0), (1, 1))}, {"padding": 1}, {"dtype": "bfloat16"},
    {"dtype": "float32", "param_dtype": "bfloat16"}, {"param_dtype": "float16"}, {"input_shape": (3, None, 2, 3)},
    {"batch_input_shape": (None, 3, 4, 2, 3)}, {"kernel_initializer": "icnr"},
    {"kernel_initializer": initializers.ICNR("he_normal")}, {"filters": 3, "kernel_size": 4, "kernel_initializer": initializers.Trilinear()},
    {"weights": [RNG.normal(size=(3, 3, 3, 4, 3)), RNG.normal(size=4)]},
    {"weights": [RNG.normal(size=(3, 3, 3, 4, 3))], "use_bias": False, "param_dtype": "bfloat16"},
    {"activation": my_activation, "kernel_regularizer": MyPenalty(0.5)}, {"kernel_regularizer": "l1_l2"},
]  # fmt: skip


def make(arguments):
    return c3t.Conv3DTranspose(**{"filters": 4, "kernel_size": 3, **arguments})


@pytest.mark.parametrize("arguments", SHARED + OURS, ids=label)
def test_round_trip_through_json(arguments) -> None:
    layer = make(arguments)
    config = layer.get_config()
    text = json.dumps(config)
    again = c3t.Conv3DTranspose.from_config(json.loads(text), custom_objects=CUSTOM)
    assert json.dumps(again.get_config()) == text
    x = np.moveaxis(X, -1, 1) if layer.data_format == "channels_first" else X
    x = x[..., :2] if arguments.get("groups") else x
    variables = layer.init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, variables, again.init(jax.random.key(0), x))
    np.testing.assert_array_equal(layer.apply(variables, x), again.apply(variables, x))
    assert again == layer
    assert hash(again) == hash(layer)


@pytest.mark.parametrize("arguments", SHARED, ids=label)
def test_keras_3_builds_the_same_layer_and_gives_it_back(arguments) -> None:
    ours = make(arguments)
    theirs = keras.layers.Conv3DTranspose.from_config(json.loads(json.dumps(ours.get_config())))
    x = np.moveaxis(X, -1, 1) if ours.data_format == "channels_first" else X
    theirs.build(x.shape)
    params = {weight.name: jnp.asarray(weight.value) for weight in theirs.weights}
    back = c3t.Conv3DTranspose.from_config(json.loads(json.dumps(theirs.get_config())))
    saved = c3t.Conv3DTranspose.from_config(json.loads(json.dumps(keras.saving.serialize_keras_object(theirs))))
    want = theirs(x)
    for layer in (ours, back, saved):
        got, state = layer.apply({"params": params}, x, mutable=["losses"])
        tolerance = 2e-5 if got.dtype == jnp.float32 else 0.05
        np.testing.assert_allclose(
            np.asarray(got, np.float32), np.asarray(want, np.float32), rtol=tolerance, atol=tolerance
        )
        losses = c3t.regularization_loss({"params": params, **state}, layer)
        np.testing.assert_allclose(losses, sum(map(float, theirs.losses)), rtol=1e-2 if tolerance > 1e-3 else 1e-5)
        assert layer.trainable == theirs.trainable
        assert str(got.dtype) == keras.backend.standardize_dtype(want.dtype)
        made = layer.init(jax.random.key(0), x)["params"]
        assert {name: value.dtype for name, value in made.items()} == {
            name: value.dtype for name, value in params.items()
        }
    assert theirs.name == (ours.name or theirs.name) == back.name


KERAS_2 = {
    "name": "conv3d_transpose", "trainable": True, "batch_input_shape": (None, 3, 4, 2, 3), "dtype": "float32", "filters": 4,
    "kernel_size": (2, 3, 2), "strides": (2, 2, 2), "padding": "same", "data_format": "channels_last", "groups": 1,
    "activation": "relu", "use_bias": True,
    "kernel_initializer": {"class_name": "GlorotUniform", "config": {"seed": None}},
    "bias_initializer": {"class_name": "Zeros", "config": {}},
    "kernel_regularizer": {"class_name": "L1L2", "config": {"l1": 0.009999999776482582, "l2": 0.0}},
    "bias_regularizer": {"class_name": "L2", "config": {"l2": 0.009999999776482582}}, "activity_regularizer": None,
    "kernel_constraint": {"class_name": "MaxNorm", "config": {"max_value": 2, "axis": [0, 1, 2]}},
    "bias_constraint": {"class_name": "NonNeg", "config": {}}, "output_padding": None,
}  # fmt: skip


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_config_of_keras_2_builds_ours(wrapped) -> None:
    config = {"class_name": "Conv3DTranspose", "config": KERAS_2} if wrapped else KERAS_2
    layer = c3t.Conv3DTranspose.from_config(json.loads(json.dumps(config)))
    assert layer.strides == (2, 2, 2)
    assert layer.batch_input_shape == (None, 3, 4, 2, 3)
    variables = layer.init(jax.random.key(0), X)
    assert c3t.regularization_loss(variables, layer) > 0
    with pytest.raises(ValueError, match="the layer was made for `batch_input_shape"):
        layer.init(jax.random.key(0), X[:, :2])


@pytest.mark.parametrize(
    "dtype",
    [
        {"class_name": "Policy", "config": {"name": "mixed_bfloat16"}},
        {"class_name": "PolicyV1", "config": {"name": "mixed_bfloat16", "loss_scale": None}},
        {"module": "keras", "class_name": "DTypePolicy", "config": {"name": "mixed_bfloat16"}, "registered_name": None},
        "mixed_bfloat16",
    ],
    ids=label,
)
def test_policies_of_every_keras(dtype) -> None:
    layers = [c3t.Conv3DTranspose.from_config({**KERAS_2, "dtype": dtype}), c3t.Conv3DTranspose(4, 3, dtype=dtype)]
    for layer in layers:
        outputs, variables = layer.init_with_output(jax.random.key(0), X)
        assert outputs.dtype == jnp.bfloat16
        assert variables["params"]["kernel"].dtype == jnp.float32
    assert c3t.Conv3DTranspose(4, 3, dtype=keras.DTypePolicy("mixed_bfloat16")) == layers[1]
    assert keras.layers.Conv3DTranspose(4, 3, dtype=dtype if isinstance(dtype, str) else None).compute_dtype


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"filters": 4, "kernel_size": 3, "stride": 2}, "unknown key 'stride'; did you mean 'strides'"),
        ({"filters": 4, "kernel_size": 3, "rate": 2, "zoom": 1}, "unknown keys 'rate', 'zoom'"),
        ({"filters": 4}, "lacks 'kernel_size'"),
        ({"class_name": "Conv3D", "config": {}}, "this is the config of 'Conv3D'"),
        ({"filters": 4, "kernel_size": 3, "activation": {"class_name": "function", "config": "swoosh"}}, "is not a name that Keras knows"),
        ({"filters": 4, "kernel_size": 3, "activation": {"module": "my.package", "class_name": "Swoosh", "config": {}}}, "names 'Swoosh' of my.package; pass custom_objects"),
        ({"filters": 4, "kernel_size": 3, "dtype": "mixed_int8"}, "not a policy that Keras knows"),
        ({"filters": 4, "kernel_size": 3, "dtype": {"class_name": "QuantizedDTypePolicy", "config": {"name": "int8_from_float32"}}}, "one of Keras's policies"),
    ],
)  # fmt: skip
def test_configs_that_are_refused(config, message) -> None:
    with pytest.raises(ValueError, match=message):
        c3t.Conv3DTranspose.from_config(config)
    with pytest.raises(TypeError, match="must be a dict"):
        c3t.Conv3DTranspose.from_config([config])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"activation": lambda x: x}, "`activation=.*has no name that a config can hold. Use a Keras name"),
        ({"kernel_initializer": jax.nn.initializers.he_normal()}, "`kernel_initializer=.*has no name"),
        ({"activation": jax.nn.gelu}, "is not the 'gelu' of Keras"),
        ({"activation": jax.nn.leaky_relu}, "is not the 'leaky_relu' of Keras"),
        ({"kernel_constraint": __import__("functools").partial(jnp.clip, min=0)}, "has no name"),
    ],
)
def test_callables_without_a_name_have_no_config(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        make(arguments).get_config()


@keras.saving.register_keras_serializable("tests")
class Registered(keras.regularizers.Regularizer):
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, x):
        return self.factor * abs(x).sum()

    def get_config(self):
        return {"scale": self.factor}

    @classmethod
    def from_config(cls, config):
        return cls(config["scale"])


@keras.saving.register_keras_serializable("tests")
def swoosh(x):
    return x * 3


def test_what_is_registered_with_keras_goes_both_ways() -> None:
    layer = make({"kernel_regularizer": Registered(0.5), "activation": swoosh})
    config = json.loads(json.dumps(layer.get_config()))
    theirs = keras.layers.Conv3DTranspose.from_config(config)
    assert theirs.kernel_regularizer.factor == 0.5
    assert theirs.activation is swoosh
    for one in (config, theirs.get_config(), keras.saving.serialize_keras_object(theirs)):
        again = c3t.Conv3DTranspose.from_config(json.loads(json.dumps(one)))
        assert again.kernel_regularizer.factor == 0.5
        assert again.activation is swoosh
    assert c3t.interop.layer_from_keras(theirs).activation is swoosh


def test_custom_objects_reach_the_inner_initializer() -> None:
    def ones(key, shape, dtype):
        return jnp.ones(shape, dtype)

    config = make({"kernel_size": 4, "strides": 2, "kernel_initializer": initializers.ICNR(my_activation)}).get_config()
    again = c3t.Conv3DTranspose.from_config(config, {"my_activation": ones})
    assert (again.init(jax.random.key(0), X)["params"]["kernel"] == 1).all()


def test_numpy_numbers_in_configs_are_written_as_numbers() -> None:
    layer = make({
        "kernel_regularizer": {"class_name": "L2", "config": {"l2": np.float32(0.5)}},
        "kernel_constraint": {"class_name": "MaxNorm", "config": {"axis": np.int64(0)}},
        "kernel_initializer": {"class_name": "RandomNormal", "config": {"stddev": np.float32(0.5), "seed": np.int64(1)}},
    })  # fmt: skip
    assert c3t.Conv3DTranspose.from_config(json.loads(json.dumps(layer.get_config()))) == layer


def test_classes_stand_for_their_defaults() -> None:
    layer = make({
        "kernel_regularizer": keras.regularizers.L2, "bias_regularizer": regularizers.L1, "kernel_constraint": constraints.NonNeg,
        "bias_constraint": keras.constraints.UnitNorm, "kernel_initializer": keras.initializers.HeNormal,
    })  # fmt: skip
    assert c3t.Conv3DTranspose.from_config(json.loads(json.dumps(layer.get_config()))) == layer
    assert layer.kernel_regularizer == regularizers.L2()
    assert pickle.loads(pickle.dumps(layer)) == layer == copy.deepcopy(layer)


def test_keras_objects_are_written_by_their_configs() -> None:
    layer = make({
        "kernel_initializer": keras.initializers.HeNormal(seed=3), "kernel_regularizer": keras.regularizers.L2(0.25),
        "kernel_constraint": keras.constraints.MaxNorm(3, axis=[0, 1]), "activation": keras.activations.gelu,
    })  # fmt: skip
    config = json.loads(json.dumps(layer.get_config()))
    again = c3t.Conv3DTranspose.from_config(config)
    jax.tree.map(np.testing.assert_array_equal, layer.init(jax.random.key(0), X), again.init(jax.random.key(1), X))
    theirs = keras.layers.Conv3DTranspose.from_config(config)
    assert theirs.kernel_regularizer.l2 == 0.25
    assert theirs.activation is keras.activations.gelu


TRIPLES = st.one_of(st.integers(1, 4), st.tuples(*[st.integers(1, 4)] * 3))
NORMS = st.one_of(st.none(), st.integers(0, 4), st.lists(st.integers(0, 4), min_size=1, max_size=5, unique=True))
FACTORS = st.floats(0, 10, allow_nan=False)


@st.composite
def layers(draw):
    """Arguments that Keras takes as well."""
    strides = draw(TRIPLES)
    ones = strides in (1, (1, 1, 1))
    least = strides if isinstance(strides, int) else min(strides)
    penalty = st.one_of(
        st.none(), st.sampled_from(["l1", "l2", "L1L2"]), st.builds(regularizers.L1L2, FACTORS, FACTORS),
        st.builds(lambda factor: {"class_name": "L2", "config": {"l2": factor}}, FACTORS),
    )  # fmt: skip
    norm = st.one_of(
        st.none(), st.sampled_from(["max_norm", "non_neg", "UnitNorm"]), st.builds(constraints.MaxNorm, FACTORS, NORMS),
        st.builds(lambda rate, axis: {"class_name": "MinMaxNorm", "config": {"rate": rate, "axis": axis}}, st.floats(0, 1), NORMS),
    )  # fmt: skip
    return {
        "filters": draw(st.integers(1, 9)), "kernel_size": draw(TRIPLES), "strides": strides,
        "padding": draw(st.sampled_from(["valid", "same", "SAME"])),
        "output_padding": draw(st.one_of(st.none(), st.integers(0, least - 1))),
        "data_format": draw(st.sampled_from(["channels_last", "channels_first"])),
        "dilation_rate": draw(TRIPLES) if ones else 1, "use_bias": draw(st.booleans()), "trainable": draw(st.booleans()),
        "activation": draw(st.sampled_from([None, "relu", "gelu", "softmax", "hard_sigmoid", {"class_name": "function", "config": "elu"}])),
        "kernel_initializer": draw(st.sampled_from(["he_normal", "Zeros", {"class_name": "RandomNormal", "config": {"stddev": 0.1, "seed": 5}}])),
        "kernel_regularizer": draw(penalty), "activity_regularizer": draw(penalty), "kernel_constraint": draw(norm),
        "dtype": draw(st.sampled_from([None, "float32", "mixed_bfloat16", "mixed_float16"])),
        "name": draw(st.sampled_from([None, "up", "decoder_3"])),
    }  # fmt: skip


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(arguments=layers())
def test_any_layer_goes_to_keras_and_back(arguments) -> None:
    layer = c3t.Conv3DTranspose(**arguments)
    config = json.loads(json.dumps(layer.get_config()))
    assert c3t.Conv3DTranspose.from_config(config) == layer
    theirs = keras.layers.Conv3DTranspose.from_config(config)
    back = c3t.Conv3DTranspose.from_config(json.loads(json.dumps(theirs.get_config())))
    for name in (
        "filters", "kernel_size", "strides", "padding", "output_padding", "data_format", "dilation_rate", "use_bias", "trainable",
        "kernel_constraint",
    ):  # fmt: skip
        assert getattr(back, name) == getattr(layer, name)
    for name in ("kernel_regularizer", "activity_regularizer"):
        given, got = getattr(layer, name), getattr(back, name)
        assert type(got) is type(given)
        if given is not None:  # Keras keeps some factors in float32
            assert dataclasses.astuple(got) == pytest.approx(dataclasses.astuple(given), rel=1e-6)
    assert layer.dtype in (None, back.dtype)
    assert back.param_dtype == layer.param_dtype
    shape = (None, 9, 9, 9, 9)
    try:
        want = theirs.compute_output_shape(shape)
    except ValueError:  # no output
        want = None
    if want is not None and min(want[1:]) > 0:
        assert layer.compute_output_shape(shape) == tuple(want)
