"""Every mistake a caller can make gets a ValueError or TypeError that names the argument, the value and the remedy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import conv3dt_jax as c3t

X = np.ones((1, 3, 4, 5, 4), np.float32)

# (arguments of the layer, what the message must say: the argument, the value received and the rule)
CONSTRUCTION = [
    ({"filters": 0}, ValueError, "`filters=0` must be at least 1"),
    ({"filters": -3}, ValueError, "`filters=-3` must be at least 1"),
    ({"filters": 4.0}, TypeError, "`filters=4.0` must be an integer, not float"),
    ({"filters": True}, TypeError, "`filters=True` must be an integer, not a boolean"),
    ({"filters": None}, TypeError, "`filters=None` must be an integer"),
    ({"filters": "8"}, TypeError, "`filters='8'` must be an integer"),
    ({"filters": (4,)}, TypeError, "`filters=(4,)` must be an integer"),
    ({"filters": np.bool_(True)}, TypeError, "must be an integer, not a boolean"),
    ({"kernel_size": 0}, ValueError, "`kernel_size=0` must be at least 1"),
    ({"kernel_size": -1}, ValueError, "`kernel_size=-1` must be at least 1"),
    ({"kernel_size": (3, 0, 3)}, ValueError, "`kernel_size=(3, 0, 3)` must be at least 1"),
    ({"kernel_size": 2.5}, TypeError, "`kernel_size=2.5` must be an integer, not float"),
    ({"kernel_size": (3, 3.0, 3)}, TypeError, "`kernel_size=(3, 3.0, 3)` must be an integer, not float"),
    ({"kernel_size": True}, TypeError, "`kernel_size=True` must be an integer, not a boolean"),
    ({"kernel_size": (True, 3, 3)}, TypeError, "must be an integer, not a boolean"),
    ({"kernel_size": (3, 3)}, ValueError, "`kernel_size=(3, 3)` must be an integer or 3 integers"),
    ({"kernel_size": (3,)}, ValueError, "`kernel_size=(3,)` must be an integer or 3 integers"),
    ({"kernel_size": (3, 3, 3, 3)}, ValueError, "(depth, height, width), not 4"),
    ({"kernel_size": ()}, ValueError, "`kernel_size=()` must be an integer or 3 integers"),
    ({"kernel_size": "3"}, TypeError, "`kernel_size='3'` must be an integer or 3 integers"),
    ({"kernel_size": None}, TypeError, "`kernel_size=None` must be an integer or 3 integers"),
    ({"kernel_size": {2, 3, 4}}, TypeError, "must be an integer or 3 integers"),
    ({"kernel_size": np.array([3.0, 3.0, 3.0])}, TypeError, "must be an integer, not"),
    ({"strides": 0}, ValueError, "`strides=0` must be at least 1"),
    ({"strides": (1, -1, 1)}, ValueError, "`strides=(1, -1, 1)` must be at least 1"),
    ({"strides": 1.5}, TypeError, "`strides=1.5` must be an integer, not float"),
    ({"strides": (2, 2)}, ValueError, "`strides=(2, 2)` must be an integer or 3 integers"),
    ({"strides": False}, TypeError, "`strides=False` must be an integer, not a boolean"),
    ({"strides": None}, TypeError, "`strides=None` must be an integer or 3 integers"),
    ({"padding": "causal"}, ValueError, "causal padding has no meaning"),
    ({"padding": "full"}, ValueError, "`padding='full'` must be one of 'valid', 'same', 'circular'"),
    ({"padding": None}, TypeError, "`padding=None` must be one of"),
    ({"padding": -1}, ValueError, "`padding=-1` must be at least 0"),
    ({"padding": 0.5}, TypeError, "`padding=0.5` must be an integer, not float"),
    ({"padding": True}, TypeError, "`padding=True` must be an integer, not a boolean"),
    ({"padding": (1, 1)}, ValueError, "`padding=(1, 1)` must be one of"),
    ({"padding": ((1, 1), (0, 0), (1, 2, 3))}, ValueError, "has an axis with 3 values"),
    ({"padding": ((1, -1), 0, 0)}, ValueError, "must be at least 0"),
    ({"output_padding": 1}, ValueError, "reduce depth from 1 to at most 0"),
    ({"output_padding": (0, 2, 0), "strides": (1, 2, 1)}, ValueError, "reduce height from 2 to at most 1"),
    ({"output_padding": -1, "strides": 2}, ValueError, "`output_padding=-1` must be at least 0"),
    ({"output_padding": 0.5, "strides": 2}, TypeError, "`output_padding=0.5` must be an integer"),
    ({"output_padding": (1, 1), "strides": 2}, ValueError, "`output_padding=(1, 1)` must be an integer or 3 integers"),
    ({"output_padding": True, "strides": 2}, TypeError, "`output_padding=True` must be an integer, not a boolean"),
    ({"output_padding": 2, "dilation_rate": 3}, ValueError, "must be below `strides=(1, 1, 1)`"),
    ({"output_padding": 0, "padding": "circular"}, ValueError, "has no meaning with `padding='circular'`"),
    ({"data_format": "NDHWC"}, ValueError, "must be 'channels_last' or 'channels_first'"),
    ({"data_format": 3}, TypeError, "`data_format=3` must be 'channels_last' or 'channels_first'"),
    ({"dilation_rate": 0}, ValueError, "`dilation_rate=0` must be at least 1"),
    ({"dilation_rate": 1.0}, TypeError, "`dilation_rate=1.0` must be an integer, not float"),
    ({"dilation_rate": 2, "strides": 2}, ValueError, "cannot both be above 1"),
    ({"dilation_rate": (1, 1, 2), "strides": (2, 1, 1)}, ValueError, "`dilation_rate=(1, 1, 2)` cannot both be above 1"),
    ({"activation": "rleu"}, ValueError, "`activation='rleu'` is not a name that Keras knows; did you mean 'relu'?"),
    ({"activation": 3}, TypeError, "`activation=3` must be a Keras name"),
    ({"activation": {"config": {}}}, ValueError, "must be a config dict with 'class_name'"),
    ({"activation": "threshold"}, ValueError, "needs a threshold and a default_value"),
    ({"activation": {"class_name": "LeakyReLU", "config": {"slope": 1}}}, ValueError, "unknown keys ['slope']"),
    ({"use_bias": "no"}, TypeError, "`use_bias='no'` must be True or False"),
    ({"use_bias": None}, TypeError, "`use_bias=None` must be True or False"),
    ({"kernel_initializer": "glorot"}, ValueError, "`kernel_initializer='glorot'` is not a name that Keras knows"),
    ({"kernel_initializer": None}, TypeError, "`kernel_initializer=None` must be a Keras name"),
    ({"kernel_initializer": 0.1}, TypeError, "`kernel_initializer=0.1` must be a Keras name"),
    ({"kernel_initializer": "identity"}, ValueError, "makes no convolution parameters"),
    ({"kernel_initializer": {"class_name": "HeNormal", "config": {"gain": 2}}}, ValueError, "does not fit 'HeNormal'"),
    ({"kernel_initializer": {"class_name": "HeNormal", "config": {"seed": 1.5}}}, ValueError, "the seed 1.5 must be"),
    ({"kernel_initializer": {"class_name": "RandomUniform", "config": {"minval": 1, "maxval": -1}}}, ValueError, "must not be above"),
    ({"kernel_initializer": {"class_name": "RandomNormal", "config": {"stddev": -1}}}, ValueError, "at least 0"),
    ({"kernel_initializer": {"class_name": "RandomNormal", "config": {"stddev": "2"}}}, ValueError, "must be a number, not str"),
    ({"kernel_initializer": {"class_name": "VarianceScaling", "config": {"scale": "2"}}}, ValueError, "must be a number, not str"),
    ({"kernel_initializer": {"class_name": "Constant", "config": {"value": "a"}}}, ValueError, "must be a number, or numbers"),
    ({"kernel_initializer": {"class_name": "HeNormal", "config": {"seed": {"config": [1]}}}}, ValueError, "the seed {'config': [1]} must be"),
    ({"bias_initializer": "zeroes"}, ValueError, "`bias_initializer='zeroes'`"),
    ({"groups": 0}, ValueError, "`groups=0` must be at least 1"),
    ({"groups": 2.0}, TypeError, "`groups=2.0` must be an integer, not float"),
    ({"groups": 3}, ValueError, "`filters=4` must be divisible by `groups=3`; the nearest are 3 and 6"),
    ({"dtype": "float33"}, TypeError, "`dtype='float33'` is no dtype"),
    ({"dtype": "int32"}, TypeError, "`dtype=int32` must be a floating or complex dtype"),
    ({"dtype": "float64"}, TypeError, "needs 64-bit types, which JAX has switched off"),
    ({"param_dtype": None}, TypeError, "`param_dtype=None` must be a dtype"),
    ({"precision": "best"}, ValueError, "`precision='best'` must be None, 'default', 'high', 'highest'"),
    ({"implementation": "fastest"}, ValueError, "must be 'auto', 'dilated', 'matmul', 'phases', 'winograd' or 'pallas'"),
    ({"implementation": None}, TypeError, "`implementation=None` must be"),
    ({"activation": {"class_name": "relu", "config": {"foo": 1}}}, ValueError, "does not fit 'relu'"),
    ({"activation": {"class_name": "relu", "config": {"negative_slope": "a"}}}, ValueError, "does not fit 'relu'"),
    ({"kernel_initializer": {"class_name": "VarianceScaling", "config": {"distribution": 3}}}, ValueError, "`distribution='3'`"),
    ({"input_shape": (4, 4, 3)}, ValueError, "`input_shape=(4, 4, 3)` must be the 4 sizes of an input without its batch"),
    ({"input_shape": (4, 4.0, 4, 3)}, TypeError, "must be an integer, not float"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "kind", "message"), CONSTRUCTION, ids=lambda value: str(value)[:60])
def test_layer_refuses_at_construction(arguments, kind, message) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        c3t.Conv3DTranspose(**{"filters": 4, "kernel_size": 3, **arguments})


AT_CALL = [
    ({}, np.ones((3, 4, 5), np.float32), ValueError, "the inputs have rank 3 (shape (3, 4, 5))"),
    ({}, np.ones((4,), np.float32), ValueError, "the inputs have rank 1"),
    ({}, np.float32(1), TypeError, "`inputs` must be a JAX or NumPy array, not float32"),
    ({}, X.tolist(), TypeError, "`inputs` must be a JAX or NumPy array, not list"),
    ({}, None, TypeError, "`inputs` must be a JAX or NumPy array, not NoneType"),
    ({}, "volume", TypeError, "`inputs` must be a JAX or NumPy array, not str"),
    ({}, X > 0, TypeError, "`inputs` must hold numbers, not bool"),
    ({}, np.full(X.shape, "a"), TypeError, "`inputs` must hold numbers"),
    ({"input_shape": (3, 4, 6, 4)}, X, ValueError, "shape (1, 3, 4, 5, 4), but the layer was made for `input_shape=(3, 4, 6"),
    ({"groups": 2}, X[..., :3], ValueError, "3 channels, which `groups=2` does not divide; the nearest"),
    ({"padding": 4}, X, ValueError, "`padding=((4, 4), (4, 4), (4, 4))` leaves no output along depth: an input of 3"),
    ({"padding": (0, 0, 4)}, X, ValueError, "leaves no output along width: an input of 5"),
    ({"padding": "same", "kernel_size": 2, "strides": 2, "output_padding": 0}, X[:, :1], ValueError, "no output along depth"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "inputs", "kind", "message"), AT_CALL, ids=lambda value: str(value)[:40])
def test_layer_refuses_at_the_call(arguments, inputs, kind, message) -> None:
    layer = c3t.Conv3DTranspose(**{"filters": 4, "kernel_size": 3, **arguments})
    with pytest.raises(kind, match=re.escape(message)):
        layer.init(jax.random.key(0), inputs)


def test_layer_names_both_channel_counts() -> None:
    layer = c3t.Conv3DTranspose(4, 3)
    variables = layer.init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=r"the inputs have 3 channels.*\(3, 3, 3, 4, 4\) was made for 4"):
        layer.apply(variables, X[..., :3])


@pytest.mark.parametrize(
    ("size", "kind", "message"),
    [
        ((9, 8, 10), ValueError, "`output_size` asks for depth 9, but an input of 3 with kernel 3, stride 2"),
        ((6, 8, 4), ValueError, "asks for width 4"),
        ((6, 8), ValueError, "must be 3 integers"),
        (6, ValueError, "must be 3 integers"),
        ((6.0, 8, 10), TypeError, "must be an integer, not float"),
        ((6, -8, 10), ValueError, "must be at least 0"),
    ],
)
def test_output_size_out_of_reach_gives_the_range(size, kind, message) -> None:
    layer = c3t.Conv3DTranspose(4, 3, strides=2, padding="same")
    with pytest.raises(kind, match=re.escape(message)):
        layer.init(jax.random.key(0), X, output_size=size)
    with pytest.raises(ValueError, match="reaches 5 to 6"):
        layer.init(jax.random.key(0), X, output_size=(9, 8, 10))


W = np.ones((3, 3, 3, 2, 4), np.float32)
CALLS = [
    ({"kernel": W[0]}, ValueError, "`kernel` has rank 4"),
    ({"kernel": W[..., :3]}, ValueError, "the inputs have 4 channels, but the kernel of shape (3, 3, 3, 2, 3) takes 3"),
    ({"kernel": W[:0]}, ValueError, "`kernel` has shape (0, 3, 3, 2, 4); every one of its sizes must be at least 1"),
    ({"kernel": W.tolist()}, TypeError, "`kernel` must be a JAX or NumPy array, not list"),
    ({"kernel": W.astype(jnp.bfloat16)}, TypeError, "`inputs` have dtype float32 and `kernel` has dtype bfloat16"),
    ({"bias": np.ones((3,), np.float32)}, ValueError, "`bias` has shape (3,); it must be (2,)"),
    ({"bias": np.ones((1, 2), np.float32)}, ValueError, "`bias` has shape (1, 2); it must be (2,)"),
    ({"bias": np.ones((2,), np.int32)}, TypeError, "`bias` has dtype int32; it must be float32"),
    ({"bias": 0.0}, TypeError, "`bias` must be a JAX or NumPy array, not float"),
    ({"inputs": X[0, 0]}, ValueError, "the inputs have rank 3"),
    ({"groups": 3}, ValueError, "4 channels, which `groups=3` does not divide"),
    ({"groups": True}, TypeError, "`groups=True` must be an integer, not a boolean"),
    ({"output_padding": 2, "strides": 2}, ValueError, "must be below the larger of `strides=(2, 2, 2)`"),
    ({"output_padding": 0, "output_size": (5, 6, 7)}, ValueError, "both set the output's size"),
    ({"output_size": (5, 6, 9)}, ValueError, "asks for width 9, but an input of 5 with kernel 3, stride 1, dilation 1 and padding 'valid' reaches only 7"),
    ({"padding": "circular", "output_size": (4, 4, 5)}, ValueError, "reaches only 3"),
    ({"preferred_element_type": "float16"}, TypeError, "cannot hold a result of float32 inputs"),
    ({"preferred_element_type": "int32"}, TypeError, "cannot hold a result of float32 inputs"),
    ({"preferred_element_type": "bool"}, TypeError, "must be a numeric dtype"),
    ({"implementation": "cudnn"}, ValueError, "must be 'auto', 'dilated', 'matmul', 'phases', 'winograd' or 'pallas'"),
    ({"strides": 10**12}, ValueError, "more bytes than can be addressed; reduce `strides`"),
    ({"padding": "valid\n"}, ValueError, "`padding='valid\\n'` must be one of"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "kind", "message"), CALLS, ids=lambda value: str(value)[:60])
@pytest.mark.parametrize("traced", [False, True], ids=["eager", "jit"])
def test_function_refuses(arguments, kind, message, traced) -> None:
    arrays = {"inputs": X, "kernel": W, "bias": None}
    given = {**arrays, **arguments}
    static = {key: given.pop(key) for key in list(given) if not isinstance(given[key], np.ndarray)}
    run = lambda given: c3t.conv3d_transpose(**given, **static)
    with pytest.raises(kind, match=re.escape(message)):
        (jax.jit(run) if traced else run)(given)


def test_traced_sizes_are_refused() -> None:
    with pytest.raises(TypeError, match=r"`strides=.* must be a static integer; a traced value cannot set a shape"):
        jax.jit(lambda s: c3t.conv3d_transpose(X, W, strides=s))(2)


@pytest.mark.parametrize(
    ("params", "message"),
    [({"kernel": W}, "['bias', 'kernel']"), ({"kernel": W, "bias": 0, "scale": 0}, "'scale'"), ([W, None], "not list")],
)
def test_apply_wants_just_the_parameters_of_the_spec(params, message) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        c3t.apply(params, X, c3t.Conv3DTransposeSpec(2, 3))


@pytest.mark.parametrize(
    ("dtype", "message"), [("int32", "`dtype=int32`"), ("foo", "`dtype='foo'`"), (None, "`dtype=None`")]
)
def test_init_wants_a_dtype_that_can_be_trained(dtype, message) -> None:
    with pytest.raises(TypeError, match=message):
        c3t.init(jax.random.key(0), c3t.Conv3DTransposeSpec(2, 3), 4, dtype=dtype)


def test_an_initializer_that_returns_another_shape_is_named() -> None:
    layer = c3t.Conv3DTranspose(4, 3, kernel_initializer=lambda key, shape, dtype: jnp.zeros((1,), dtype))
    with pytest.raises(ValueError, match=r"`kernel_initializer` returned shape \(1,\) where \(3, 3, 3, 4, 4\)"):
        layer.init(jax.random.key(0), X)


def test_apply_compares_the_kernel_with_the_spec() -> None:
    with pytest.raises(ValueError, match=re.escape("(3, 3, 3, 2, 4), but the specification wants (2, 2, 2, 2, 4)")):
        c3t.apply({"kernel": W}, X, c3t.Conv3DTransposeSpec(2, 2, use_bias=False))
    with pytest.raises(TypeError, match="must be a Conv3DTransposeSpec or a Conv3DSpec, not dict"):
        c3t.apply({"kernel": W}, X, {})


@pytest.mark.parametrize(
    "arguments",
    [
        {"filters": np.int64(4)}, {"kernel_size": np.int32(3)}, {"kernel_size": np.array([3, 3, 3])},
        {"kernel_size": [3, 3, 3]}, {"strides": np.array(2)}, {"output_padding": [np.int64(1), 0, 1], "strides": 2},
        {"padding": np.array([[0, 1], [1, 0], [1, 1]])}, {"padding": jnp.array([[0, 1], [1, 0], [1, 1]])},
        {"dtype": float, "param_dtype": float}, {"padding": [1, (0, 1), 1]}, {"use_bias": np.bool_(False)},
        {"input_shape": (3, None, 5, 4)}, {"padding": "SaMe"}, {"data_format": "channels_first"}, {"precision": ("high", None)},
    ],
    ids=str,
)  # fmt: skip
def test_numpy_integers_and_lists_are_taken(arguments) -> None:
    layer = c3t.Conv3DTranspose(**{"filters": 4, "kernel_size": 3, **arguments})
    variables = jax.eval_shape(jax.jit(layer.init), jax.random.key(0), X)
    assert jax.eval_shape(jax.jit(layer.apply), variables, X).ndim == 5
