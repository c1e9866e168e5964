"""`conv3d`: the whole argument space against the definition, its adjointness to `conv3d_transpose`, dtypes, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from jax import lax

import conv3dt_jax as c3t
from tests import oracle
from tests.helpers import quick_jit
from tests.test_lowerings import DTYPES, IMPLEMENTATIONS, RESULTS

triples = st.tuples
SETTINGS = settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
close = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10)


@st.composite
def calls(draw):
    """Shapes of the operands and keyword arguments; the kernel may be larger than the padded inputs."""
    space = draw(triples(*[st.sampled_from([4, 3, 5, 2, 1, 6, 7, 4, 5, 0])] * 3))
    window = draw(triples(*[st.integers(1, 4)] * 3))
    unstrided = draw(st.booleans())
    strides = (1, 1, 1) if unstrided else draw(triples(*[st.integers(1, 4)] * 3))
    dilation = draw(triples(*[st.sampled_from([1, 1, 2])] * 3))
    pad = st.integers(0, 4)
    explicit = pad | triples(pad, pad, pad) | triples(*[st.tuples(pad, pad)] * 3)
    padding = draw(st.sampled_from(["valid", "same", "SAME", "circular"]) | explicit)
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels, filters = draw(st.integers(1, 2)) * groups, draw(st.integers(1, 2)) * groups
    batch = draw(st.sampled_from([(), (2,), (1,), (2,), (1, 2), (0,)]))
    kwargs = {"strides": strides, "padding": padding, "dilation_rate": dilation, "groups": groups}
    return tuple(batch), space, (*window, channels // groups, filters), kwargs


def outputs(space, window, kwargs):
    pads = oracle._pads(kwargs["padding"])
    sizes = zip(space, window, kwargs["strides"], kwargs["dilation_rate"], pads, strict=True)
    return [oracle.convolution_window(*axis)[1] for axis in sizes]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@SETTINGS
@given(call=calls(), channels_first=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_value_and_gradients_are_those_of_the_definition(implementation, call, channels_first, seed) -> None:
    batch, space, kernel_shape, kwargs = call
    n = outputs(space, kernel_shape[:3], kwargs)
    channels = kernel_shape[3] * kwargs["groups"]
    spec = c3t.Conv3DSpec(kernel_shape[4], kernel_shape[:3], **kwargs)
    if any(size < 1 <= m for size, m in zip(n, space, strict=True)):
        with pytest.raises(ValueError, match="leaves no output along"):
            spec.output_shape((*batch, *space, channels))
        return
    assert spec.output_shape((*batch, *space, channels)) == (*batch, *n, kernel_shape[4])
    rng = np.random.default_rng(seed)
    x, w, b = (
        rng.normal(size=(*batch, *space, channels)),
        rng.normal(size=kernel_shape),
        rng.normal(size=kernel_shape[4]),
    )
    flat = x.reshape(int(np.prod(batch)), *x.shape[len(batch) :])
    want = oracle.conv3d(flat, w, b, **kwargs)
    ct = rng.normal(size=want.shape)
    want_gx, want_gw = oracle.conv3d_vjp(flat, w, ct, **kwargs)

    def run(x, w, b, ct):
        options = {**kwargs, "implementation": implementation}
        options["data_format"] = "channels_first" if channels_first else "channels_last"
        y, pullback = jax.vjp(lambda *operands: c3t.conv3d(*operands, **options), x, w, b)
        return y, *pullback(ct)

    def layout(value):
        return np.moveaxis(value, -1, -4) if channels_first else value

    with jax.enable_x64(True):
        y, gx, gw, gb = quick_jit(run)(layout(x), w, b, layout(ct.reshape(*batch, *ct.shape[1:])))
    last = (lambda value: np.moveaxis(np.asarray(value), -4, -1)) if channels_first else np.asarray
    close(last(y).reshape(want.shape), want)
    close(last(gx).reshape(flat.shape), want_gx)
    close(gw, want_gw)
    close(gb, ct.sum((0, 1, 2, 3)))


@SETTINGS
@given(call=calls(), seed=st.integers(0, 2**32 - 1))
def test_it_is_the_adjoint_of_the_transposed_convolution(call, seed) -> None:
    """``<conv(x), y> = <x, conv_transpose(y)>`` with the same kernel and arguments, the size given."""
    _, space, kernel_shape, kwargs = call
    n = outputs(space, kernel_shape[:3], kwargs)
    assume(min(n) >= 1 <= min(space))
    if kwargs["padding"] == "circular":  # a transposed one makes whole strides
        assume(all(m == size * s for m, size, s in zip(space, n, kwargs["strides"], strict=True)))
    rng = np.random.default_rng(seed)
    x, w = rng.normal(size=(2, *space, kernel_shape[3] * kwargs["groups"])), rng.normal(size=kernel_shape)
    y = rng.normal(size=(2, *n, kernel_shape[4]))
    with jax.enable_x64(True):
        there = quick_jit(lambda x: c3t.conv3d(x, w, **kwargs))(x)
        back = quick_jit(lambda y: c3t.conv3d_transpose(y, w, **kwargs, output_size=space))(y)
    assert back.shape == x.shape
    assert np.vdot(there, y) == pytest.approx(np.vdot(x, back), rel=1e-11, abs=1e-11)


# What decides between the ways to compute: (space, kernel, strides, padding, dilation, groups, channels, filters).
TABLE = {
    "unstrided": ((4, 5, 6), (3, 3, 3), 1, "same", 1, 1, 3, 4),
    "strided": ((6, 5, 8), (3, 3, 3), 2, "same", 1, 1, 3, 4),
    "strided_in_part": ((4, 5, 6), (1, 3, 3), (1, 2, 2), 1, 1, 1, 4, 3),
    "patches": ((4, 6, 8), (2, 3, 4), (2, 3, 4), "valid", 1, 1, 3, 4),
    "gaps": ((7, 6, 8), (1, 2, 1), (2, 3, 2), "valid", 1, 1, 3, 4),
    "pointwise": ((4, 5, 6), (1, 1, 1), 1, "valid", 1, 1, 3, 4),
    "dilated": ((6, 5, 8), (3, 2, 3), 1, "same", 2, 1, 3, 4),
    "dilated_and_strided": ((9, 8, 9), (3, 2, 3), 2, 2, 2, 1, 3, 4),
    "padded_beyond_the_kernel": ((4, 5, 6), (2, 3, 2), 1, ((3, 0), (0, 4), (2, 2)), 1, 1, 3, 4),
    "groups": ((6, 5, 8), (3, 2, 3), 2, "same", 1, 2, 4, 6),
    "groups_unstrided": ((4, 5, 6), (3, 2, 3), 1, "same", 1, 2, 4, 6),
    "depthwise": ((6, 5, 8), (3, 3, 3), 2, "same", 1, 4, 4, 4),
    "depthwise_unstrided": ((4, 5, 6), (3, 3, 3), 1, "same", 1, 4, 4, 4),
    "one_channel": ((6, 5, 8), (5, 5, 5), 2, 2, 1, 1, 1, 4),
    "circular": ((6, 4, 8), (3, 3, 2), 2, "circular", 1, 1, 3, 4),
    "circular_uneven": ((7, 5, 9), (3, 4, 2), (2, 3, 1), "circular", 1, 1, 3, 4),
    "larger_than_the_volume": ((2, 3, 2), (5, 5, 5), 1, "same", 1, 1, 3, 4),
}
by_call = pytest.mark.parametrize("call", TABLE)


def arguments(call, dtype=np.float64):
    space, window, strides, padding, dilation, groups, channels, filters = TABLE[call]
    rng = np.random.default_rng(0)
    shapes = (2, *space, channels), (*window, channels // groups, filters), (filters,)
    if np.issubdtype(dtype, np.integer):
        operands = [rng.integers(0, 100, shape).astype(dtype) for shape in shapes]
    else:
        operands = [rng.normal(size=shape) for shape in shapes]
        operands = [
            a + 1j * rng.normal(size=a.shape) if np.issubdtype(dtype, np.complexfloating) else a for a in operands
        ]
    kwargs = {"strides": strides, "padding": padding, "dilation_rate": dilation, "groups": groups}
    return [np.asarray(a, dtype) for a in operands], kwargs


@pytest.mark.thinned
@pytest.mark.usefixtures("quick_compiles")
@by_call
@pytest.mark.parametrize("direction", ["forward", "gradients"])
def test_it_is_what_lax_computes(call, direction, x64) -> None:
    """`jax.lax.conv_general_dilated` with the same padding in pairs; circular padding put around before."""
    (x, w, b), kwargs = arguments(call)
    spec = c3t.Conv3DSpec(w.shape[4], w.shape[:3], **kwargs)
    geometry = spec.geometry(x.shape[1:4])
    pads = [(axis.lo, (axis.n - 1) * axis.s + axis.ke - axis.out - axis.lo) for axis in geometry]

    def peer(x, w, b):
        inside = pads
        if spec.padding == "circular":
            x = jnp.pad(x, [(0, 0), *((low, max(high, 0)) for low, high in pads), (0, 0)], mode="wrap")
            inside = [(0, min(high, 0)) for _, high in pads]
        y = lax.conv_general_dilated(
            x, w, spec.strides, inside, rhs_dilation=spec.dilation_rate, feature_group_count=spec.groups,
            dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        )  # fmt: skip
        return y + b.reshape(1, 1, 1, 1, -1)

    run = lambda *operands: c3t.conv3d(*operands, **kwargs)
    if direction == "gradients":
        run, peer = (jax.grad(lambda *a, f=f: jnp.sin(f(*a)).sum(), (0, 1, 2)) for f in (run, peer))
    for got, want in zip(
        jax.tree.leaves(quick_jit(run)(x, w, b)), jax.tree.leaves(quick_jit(peer)(x, w, b)), strict=True
    ):
        close(got, want)


@pytest.mark.thinned
@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize("dtype", [*DTYPES])
@pytest.mark.parametrize("call", ["strided"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_each_dtype_is_exact_to_its_rounding(call, dtype, implementation) -> None:
    """With the bias: sums are in 32 bits, and rounded once."""
    (x, w, b), kwargs = arguments(call, jnp.dtype(dtype))
    b = b.astype(RESULTS.get(dtype, dtype))
    y = c3t.conv3d(x, w, b, implementation=implementation, **kwargs)
    assert y.dtype == RESULTS.get(dtype, dtype)
    want = oracle.conv3d(x, w, b, **kwargs)
    scale = oracle.conv3d(np.abs(x), np.abs(w), np.abs(b), **kwargs).real
    error = np.abs(np.asarray(y).astype(want.dtype) - want)
    assert np.all(error <= DTYPES[dtype] * np.abs(want) + (2e-6 if DTYPES[dtype] else 0) * scale)


@pytest.mark.thinned
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("call", ["unstrided", "strided"])
@pytest.mark.parametrize(
    ("dtype", "preferred"), [("bfloat16", "float32"), ("int8", "float32"), ("int8", "int32"), ("float32", "float64")]
)
def test_preferred_element_type_is_the_results_dtype(call, dtype, preferred, implementation, x64) -> None:
    (x, w, b), kwargs = arguments(call, jnp.dtype(dtype))
    y = c3t.conv3d(x, w, b, preferred_element_type=preferred, implementation=implementation, **kwargs)
    assert y.dtype == preferred
    np.testing.assert_allclose(y, oracle.conv3d(x, w, b, **kwargs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("call", ["unstrided", "strided"])
def test_gradients_keep_the_operands_dtypes(call) -> None:
    (x, w, b), kwargs = arguments(call, jnp.bfloat16)
    y, pullback = jax.vjp(lambda *operands: c3t.conv3d(*operands, **kwargs), x, w, b)
    for operand, gradient in zip((x, w, b), pullback(jnp.ones_like(y)), strict=True):
        assert (gradient.dtype, gradient.shape) == (operand.dtype, operand.shape)
    gx, gw = oracle.conv3d_vjp(x, w, np.ones(y.shape), **kwargs)
    np.testing.assert_allclose(pullback(jnp.ones_like(y))[0].astype("f4"), gx, rtol=2**-7, atol=2**-7)
    np.testing.assert_allclose(pullback(jnp.ones_like(y))[1].astype("f4"), gw, rtol=2**-7, atol=2**-4)


def test_parameters_apart_from_compute() -> None:
    spec = c3t.Conv3DSpec(6, (2, 3, 4), strides=2, padding="same", groups=3)
    params = c3t.init(jax.random.key(0), spec, 3)
    assert jax.tree.map(jnp.shape, params) == {"kernel": (2, 3, 4, 1, 6), "bias": (6,)}
    limit = np.sqrt(6 / (24 * (1 + 6)))  # Keras's fans: the last two axes
    assert 0.9 * limit < np.abs(params["kernel"]).max() <= limit
    x = np.random.default_rng(0).normal(size=(2, 5, 6, 7, 3)).astype(np.float32)
    want = oracle.conv3d(x, params["kernel"], params["bias"], strides=2, padding="same", groups=3)
    np.testing.assert_allclose(c3t.apply(params, x, spec), want, rtol=1e-5, atol=1e-5)
    for name in ("icnr", c3t.initializers.Trilinear(2)):
        with pytest.raises(ValueError, match="makes kernels of transposed convolutions alone"):
            c3t.init(jax.random.key(0), spec, 3, kernel_initializer=name)
        with pytest.raises(ValueError, match="makes kernels alone"):
            c3t.init(jax.random.key(0), spec, 3, bias_initializer=name)
    assert hash(spec) == hash(c3t.Conv3DSpec(6, [2, 3, 4], (2, 2, 2), "SAME", groups=3))


X, W = np.ones((1, 4, 4, 4, 2), np.float32), np.ones((3, 3, 3, 2, 4), np.float32)
WRONG = [
    ((X[0, 0], W), {}, ValueError, "the inputs have rank 3"),
    ((X, W[0]), {}, ValueError, r"`kernel` has rank 4 .* in_channels // groups, filters\)"),
    ((X, W[..., :0]), {}, ValueError, "every one of its sizes must be at least 1"),
    ((X[..., :1], W), {}, ValueError, r"the inputs have 1 channels, but the kernel .* takes 2 \(kernel.shape\[3\] \* groups"),
    ((X, W), {"groups": 2}, ValueError, "takes 4"),
    ((X, W[..., :1, :3]), {"groups": 2}, ValueError, r"has 3 filters \(its last axis\), which `groups=2` does not divide"),
    ((X, W, np.ones(3, np.float32)), {}, ValueError, r"it must be \(4,\): one value per filter \(kernel.shape\[4\] of them\)"),
    ((X, W, np.ones(4, np.int32)), {}, TypeError, "`bias` has dtype int32"),
    ((X, W.astype(np.float16)), {}, TypeError, "they must be the same"),
    ((X, W), {"padding": "causal"}, ValueError, "causal padding has no meaning"),
    ((X, W), {"padding": "full"}, ValueError, "what is added at the start and the end"),
    ((X, W), {"padding": -1}, ValueError, "at least 0"),
    ((X, W), {"strides": 0}, ValueError, "at least 1"),
    ((X, W), {"strides": 2.0}, TypeError, "must be an integer"),
    ((X, W), {"dilation_rate": 2}, ValueError, "leaves no output along depth: an input of 4 .* covers 5"),
    ((X, W), {"implementation": "fft"}, ValueError, "implementation"),
    ((X, W), {"implementation": "winograd", "padding": "circular"}, NotImplementedError, "cannot run this"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("operands", "kwargs", "error", "message"),
    WRONG,
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "",
)
def test_bad_arguments_are_named(operands, kwargs, error, message) -> None:
    with pytest.raises(error, match=message):
        c3t.conv3d(*operands, **kwargs)


def test_an_output_size_is_for_transposed_convolutions() -> None:
    spec = c3t.Conv3DSpec(4, 3, use_bias=False)
    with pytest.raises(ValueError, match="is for transposed convolutions"):
        c3t.apply({"kernel": W}, X, spec, output_size=(2, 2, 2))
    with pytest.raises(TypeError, match="output_padding"):
        c3t.Conv3DSpec(4, 3, output_padding=1)


def test_a_kernel_that_is_long_where_others_are_not_padded_does_not_end_the_process() -> None:
    """The shapes, as a convolution, with which XLA:CPU ends the process."""
    x, w = np.ones((1, 3, 3, 1, 1), np.float32), np.ones((2, 4, 1, 1, 1), np.float32)
    for padding in (0, ((0, 0), (1, 1), (0, 0)), "same"):
        for implementation in IMPLEMENTATIONS:
            if padding == 0:
                with pytest.raises(ValueError, match="leaves no output along height"):
                    c3t.conv3d(x, w, padding=padding, implementation=implementation)
                continue
            y = c3t.conv3d(x, w, padding=padding, implementation=implementation)
            np.testing.assert_allclose(y, oracle.conv3d(x, w, padding=padding))


# Channels and filters that differ so much that gradients, or results, are computed from the other side, or the cells of
# the width side by side: (channels, filters, width, strides, padding).
LOPSIDED = [
    (1, 8, 8, 1, "same"), (2, 8, 8, 1, "valid"), (2, 12, 10, 1, ((2, 0), (1, 1), (0, 2))), (8, 1, 8, 1, "same"), (8, 2, 12, 1, 1),
    (1, 8, 16, 2, "same"), (2, 6, 12, 2, "valid"), (1, 4, 8, (2, 1, 2), "circular"), (2, 8, 8, 1, "circular"), (1, 3, 7, 2, 2),
]  # fmt: skip


@pytest.mark.thinned
@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize("call", LOPSIDED, ids=str)
@pytest.mark.parametrize("operation", ["conv3d", "conv3d_transpose"])
@pytest.mark.parametrize(
    ("data_format", "dtype"),
    [("channels_first", "float64"), ("channels_last", "bfloat16")],
)
def test_few_channels_or_few_filters(call, operation, data_format, dtype, x64) -> None:
    channels, filters, width, strides, padding = call
    kwargs = {"strides": strides, "padding": padding}
    rng = np.random.default_rng(0)
    sides = (channels, filters) if operation == "conv3d" else (filters, channels)
    x, w, b = (
        jnp.asarray(rng.normal(size=shape), dtype)
        for shape in ((2, 4, 5, width, channels), (2, 3, 3, *sides), (filters,))
    )
    y = getattr(oracle, operation)(x, w, b, **kwargs)
    ct = jnp.asarray(rng.normal(size=y.shape), dtype)
    first = data_format == "channels_first"
    move = (
        (lambda a, back=False: jnp.moveaxis(a, *((1, -1) if back else (-1, 1)))) if first else (lambda a, back=False: a)
    )
    run = lambda x, w, b: getattr(c3t, operation)(x, w, b, data_format=data_format, **kwargs)
    got, pullback = jax.vjp(jax.jit(run), move(x), w, b)
    gx, gw, gb = pullback(move(ct))
    vjp = oracle.conv3d_vjp if operation == "conv3d" else oracle.vjp
    want = (y, *vjp(x, w, ct, **kwargs), np.asarray(ct, np.float64).sum((0, 1, 2, 3)))
    rounding = 1e-10 if dtype == "float64" else 2**-7
    for mine, theirs in zip((move(got, True), move(gx, True), gw, gb), want, strict=True):
        assert mine.dtype == dtype
        np.testing.assert_allclose(mine.astype("f8"), theirs, rtol=rounding, atol=rounding * np.abs(theirs).max())
