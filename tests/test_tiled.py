"""`tiled`: slab by slab the result is that of the whole, in bounded memory, on the device and from host to host."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import conv3dt_jax as c3t
from conv3dt_jax import _slab_sizes
from conv3dt_jax._geometry import Axis, part_of_outputs
from conv3dt_jax._operation import read
from conv3dt_jax.lowerings import _products
from tests import oracle, test_conv3d, test_properties
from tests.helpers import quick_jit

SETTINGS = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
FORMATS = ["channels_last", "channels_first"]
close = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10)
counts = st.tuples(*[st.integers(1, 5)] * 3)


@st.composite
def problems(draw):
    """Either operation: its spec, operands in float64, what it should give, and slabs."""
    transposed = draw(st.booleans())
    batch, space, kernel_shape, kwargs = draw((test_properties if transposed else test_conv3d).calls())
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    channels = kernel_shape[4] if transposed else kernel_shape[3] * kwargs["groups"]
    filters = kernel_shape[3] * kwargs["groups"] if transposed else kernel_shape[4]
    kind = c3t.Conv3DTransposeSpec if transposed else c3t.Conv3DSpec
    data_format = draw(st.sampled_from(FORMATS))
    spec = kind(filters, kernel_shape[:3], **kwargs, data_format=data_format)
    x, w, b = (rng.normal(size=size) for size in ((*batch, *space, channels), kernel_shape, filters))
    try:
        shape = spec.output_shape(layout(x, data_format).shape)
    except ValueError:  # no output: other tests hold the error
        assume(False)
    batch, out, _ = spec.split_shape(shape)
    slabs = tuple(min(count, max(size, 1)) for count, size in zip(draw(counts), out, strict=True))
    flat = x.reshape(-1 if x.size else int(np.prod(batch)), *x.shape[-4:])
    want = (oracle.conv3d_transpose if transposed else oracle.conv3d)(flat, w, **kwargs) + b
    ct = rng.normal(size=want.shape)
    adjoints = (oracle.vjp if transposed else oracle.conv3d_vjp)(flat, w, ct, **kwargs)
    wanted = [want.reshape(*batch, *want.shape[1:]), adjoints[0].reshape(x.shape), adjoints[1]]
    return spec, (x, w, b), ct.reshape(wanted[0].shape), wanted, slabs


def layout(value, data_format):
    return np.moveaxis(value, -1, -4) if data_format == "channels_first" else np.asarray(value)


def back(value, data_format):
    return np.moveaxis(np.asarray(value), -4, -1) if data_format == "channels_first" else np.asarray(value)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(*[st.integers(1, 5)] * 3, st.integers(0, 9), st.integers(1, 12), st.integers(0, 4))
def test_a_part_of_an_axis_has_the_inputs_that_reach_it_and_no_more(k, s, d, lo, length, cell) -> None:
    first, part = part_of_outputs(Axis(40, k, s, d, lo, 99), length)
    reaching = {
        i
        for i in range(-60, 60)
        for t in range(k)
        if 0 <= i * s + t * d - lo - cell * s < length
    }  # fmt: skip
    taken = set(range(cell + first, cell + first + part.n))
    assert reaching <= taken
    assert part.lo >= 0  # a window of the full result never begins before it
    assert len(taken) <= max(reaching, default=cell) - min(reaching, default=cell) + 3
    assert part.lo - lo == -first * s


@SETTINGS
@given(problem=problems())
def test_values_and_gradients_are_those_of_the_definition(problem) -> None:
    spec, (x, w, b), ct, (want, want_dx, want_dw), slabs = problem
    move = functools.partial(layout, data_format=spec.data_format)

    def run(x, w, b, ct):
        y, pullback = jax.vjp(lambda *operands: c3t.tiled(*operands, spec=spec, slabs=slabs), x, w, b)
        return y, *pullback(ct)

    with jax.enable_x64(True):
        y, dx, dw, db = quick_jit(run)(move(x), w, b, move(ct))
    close(back(y, spec.data_format), want)
    close(back(dx, spec.data_format), want_dx)
    close(dw, want_dw)
    close(db, ct.reshape(-1, ct.shape[-1]).sum(0))


def operands(shape=(1, 12, 10, 8, 3), kernel=(3, 3, 3, 4, 3), dtype=np.float32, filters=None):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=size), dtype) for size in (shape, kernel, filters or kernel[3])]


@pytest.mark.thinned
@pytest.mark.parametrize("implementation", ["matmul", "phases"])
@pytest.mark.parametrize(
    ("window", "strides", "padding"), [(2, 2, "valid"), (3, 2, "same"), (4, 2, 1), (3, 1, "same"), (5, 3, "circular")]
)
def test_where_the_same_lowering_sums_the_same_products_the_bits_are_equal(
    implementation, window, strides, padding, monkeypatch
) -> None:
    """And where the same library multiplies: which one is a matter of how many rows there are."""
    jax.clear_caches()
    monkeypatch.setattr(_products, "LEAST", 1 << 40)
    x, w, b = operands((1, 16, 12, 12, 16), (window,) * 3 + (8, 16))
    keywords = {"strides": strides, "padding": padding, "implementation": implementation}
    whole = c3t.conv3d_transpose(x, w, b, **keywords)
    for slabs in (5, (2, 3, 1)):
        assert (np.asarray(c3t.tiled(x, w, b, **keywords, slabs=slabs)) == np.asarray(whole)).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int8])
def test_every_dtype_is_rounded_as_the_whole_is(dtype) -> None:
    x, w, b = (3 * a for a in operands())
    x, w, b = (a.astype(dtype) for a in (x, w, b))
    b = b.astype(jnp.int32) if dtype == jnp.int8 else b
    keywords = {"strides": 2, "padding": "same", "implementation": "phases"}
    whole = c3t.conv3d_transpose(x, w, b, **keywords)
    slabs = c3t.tiled(x, w, b, **keywords, slabs=(3, 2, 1))
    out = np.zeros(whole.shape, whole.dtype)
    c3t.tiled(np.asarray(x), w, b, **keywords, slabs=(3, 2, 1), out=out, progress=False)
    assert slabs.dtype == whole.dtype
    np.testing.assert_array_equal(np.asarray(slabs, np.float64), np.asarray(whole, np.float64))
    np.testing.assert_array_equal(out.astype(np.float64), np.asarray(whole, np.float64))


def test_transformations_compose() -> None:
    x, w, b = operands()
    keywords = {"strides": 2, "padding": "same"}

    def loss(call, x, w, b):
        return jnp.sum(jnp.tanh(call(x, w, b, **keywords)))

    tiled = functools.partial(loss, functools.partial(c3t.tiled, slabs=(2, 3, 1)))
    whole = functools.partial(loss, c3t.conv3d_transpose)
    tangents = operands()
    for transform in (
        lambda f: jax.jvp(f, (x, w, b), tuple(tangents)),
        lambda f: jax.jvp(jax.grad(f, (0, 1, 2)), (x, w, b), tuple(tangents)),
        lambda f: jax.grad(jax.checkpoint(f), (0, 1))(x, w, b),
        lambda f: jax.vmap(jax.grad(f, (0, 1)), (0, None, None))(jnp.stack([x, 2 * x]), w, b),
        lambda f: jax.lax.scan(lambda carry, x: (carry + f(x, w, b), None), 0.0, jnp.stack([x, x]))[0],
    ):
        for got, want in zip(jax.tree.leaves(transform(tiled)), jax.tree.leaves(transform(whole)), strict=True):
            np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("kind", ["result", "gradients"])
def test_temporaries_shrink_with_the_slabs_and_the_estimate_holds_them(kind) -> None:
    x, w, b = operands((1, 64, 48, 48, 16), (3, 3, 3, 16, 16))

    def temporaries(**how) -> int:
        def run(x, w, b):
            call = functools.partial(c3t.tiled, strides=2, padding="same", **how)
            return call(x, w, b) if kind == "result" else jax.grad(lambda *o: call(*o).sum(), (0, 1))(x, w, b)

        analysis = jax.jit(run).lower(x, w, b).compile().memory_analysis()
        cotangent = 4 * 16 * 128 * 96 * 96 if kind == "gradients" else 0  # which `sum` makes
        return analysis.temp_size_in_bytes - cotangent

    whole, few, many = temporaries(slabs=1), temporaries(slabs=8), temporaries(slabs=(32, 4, 1))
    assert many < few / 2
    assert many < whole / 2
    limit = 3 << 20
    assert temporaries(memory_limit=limit) <= limit


# Operation, kernel, strides, padding, dilation: every axis in slabs that do not divide it.
TABLE = {
    "circular": (c3t.Conv3DTransposeSpec, 3, 2, "circular", 1),
    "circular around itself": (c3t.Conv3DTransposeSpec, (9, 2, 4), 1, "circular", 2),
    "circular convolution": (c3t.Conv3DSpec, 3, 2, "circular", 1),
    "circular convolution, uneven": (c3t.Conv3DSpec, 4, 3, "circular", 1),
    "gaps before the first input": (c3t.Conv3DTransposeSpec, 1, (4, 3, 5), ((3, 0), (2, 1), (4, 1)), 1),
    "gaps": (c3t.Conv3DTransposeSpec, 2, 5, 1, 1),
    "strides and dilation": (c3t.Conv3DTransposeSpec, 3, 2, ((3, 1), (0, 2), (1, 0)), 3),
    "padded beyond the kernel": (c3t.Conv3DSpec, 2, 1, 4, 1),
}


@pytest.mark.thinned
@pytest.mark.parametrize("implementation", ["auto", "dilated"])
@pytest.mark.parametrize("name", TABLE)
def test_every_geometry_is_the_same_in_slabs(name, implementation, x64) -> None:
    kind, window, strides, padding, dilation = TABLE[name]
    spec = kind(3, window, strides, padding, dilation_rate=dilation, implementation=implementation)
    x, w, b = operands((2, 7, 10, 5, 2), spec.kernel_shape(2), np.float64, filters=3)

    def train(x, w, b, **how):
        call = functools.partial(c3t.tiled, spec=spec, **how)
        y, pullback = jax.vjp(call, x, w, b)
        return y, *pullback(jnp.cos(y))

    whole = quick_jit(functools.partial(train, slabs=1))(x, w, b)
    slabs = tuple(min(pair) for pair in zip((3, 2, 2), spec.output_shape(x.shape)[1:4], strict=True))
    for got, want in zip(quick_jit(functools.partial(train, slabs=slabs))(x, w, b), whole, strict=True):
        close(got, want)
    out = np.full(whole[0].shape, np.nan)
    close(c3t.tiled(np.asarray(x), w, b, spec=spec, slabs=slabs, out=out, progress=False), whole[0])


def test_the_estimate_is_of_the_result_or_both_gradients_whichever_holds_more(capsys) -> None:
    for spec in (c3t.Conv3DTransposeSpec(8, 3, 2, "same"), c3t.Conv3DTransposeSpec(2, 2, 2), c3t.Conv3DSpec(32, 3, 2)):
        shape = (1, 24, 24, 24, 8)
        plan = c3t.explain(shape, spec, platforms=["cpu"])
        both = plan.forward["cpu"].temporary_bytes, plan.gradients["cpu"].temporary_bytes
        assert both[0] != both[1]
        assert _slab_sizes.held(reading_of(spec, shape), 1, (1, 1, 1)) == max(both)


def test_a_limit_takes_the_fewest_slabs_that_stay_below_it() -> None:
    spec = c3t.Conv3DTransposeSpec(8, 3, 2, "same")
    reading, found = reading_of(spec, (1, 32, 32, 32, 8)), []
    for limit in ("1GiB", "4MiB", "1MiB", 300_000):
        chosen = _slab_sizes.counts_within(limit, reading, 1)
        assert _slab_sizes.held(reading, 1, chosen) <= _slab_sizes.byte_count("memory_limit", limit)
        found.append(chosen)
    assert found[0] == (1, 1, 1)
    assert found == sorted(found)
    assert found[-1][1] > 1  # slices of the depth were not enough


def reading_of(spec, shape):
    dtype = np.dtype(np.float32)
    return read(spec, spec.geometry(shape[1:4]), shape[4], dtype, dtype, dtype)


def test_a_limit_that_cannot_be_met_says_the_smallest_that_can() -> None:
    x, w, b = operands()
    with pytest.raises(ValueError, match=r"`memory_limit='10kB'` cannot be met.*\((\d+) bytes\)") as error:
        c3t.tiled(x, w, b, strides=2, memory_limit="10kB")
    least = int(str(error.value).split("(")[-1].split()[0])
    assert c3t.tiled(x, w, b, strides=2, memory_limit=least).shape == (1, 25, 21, 17, 4)
    with pytest.raises(ValueError, match="cannot be met"):
        c3t.tiled(x, w, b, strides=2, memory_limit=least - 1)


X, W, B = (np.asarray(a) for a in operands())
OUT = np.zeros((1, 25, 21, 17, 4), np.float32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"slabs": 2, "memory_limit": "1GiB"}, ValueError, "both say how many slabs"),
        ({"slabs": 0}, ValueError, "`slabs=0` must be at least 1"),
        ({"slabs": 2.0}, TypeError, "`slabs=2.0` must be an integer"),
        ({"slabs": (2, 22, 1)}, ValueError, "22 slabs along height, where the result has 21"),
        ({"memory_limit": "2 parsecs"}, ValueError, "`memory_limit='2 parsecs'` must be a number of bytes"),
        ({"memory_limit": 0}, ValueError, "`memory_limit=0` must be at least 1"),
        ({"memory_limit": 1.5}, TypeError, "`memory_limit=1.5` must be a number of bytes"),
        ({"dtype": "float32"}, ValueError, "is for `out`"),
        ({"out": OUT[..., :3]}, ValueError, r"`out` has shape \(1, 25, 21, 17, 3\); the result has"),
        ({"out": OUT.astype(np.float16)}, TypeError, "`out` has dtype float16, which does not hold"),
        ({"out": [1, 2]}, TypeError, "`out` must have a shape and a dtype"),
        ({"out": OUT, "progress": 1}, TypeError, "`progress=1` must be True or False"),
        ({"spec": c3t.Conv3DSpec(4, 3), "strides": 2}, ValueError, "`strides=2` is part of `spec`"),
        ({"spec": "same"}, TypeError, "`spec` must be a Conv3DTransposeSpec or a Conv3DSpec"),
        ({"spec": c3t.Conv3DTransposeSpec(4, 3, use_bias=False)}, ValueError, "a bias is given"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_an_error(arguments, error, message) -> None:
    strides = {} if "spec" in arguments else {"strides": 2}
    with pytest.raises(error, match=message):
        c3t.tiled(X, W, B, **{**strides, **arguments})


def test_inputs_that_are_no_array_are_refused() -> None:
    with pytest.raises(TypeError, match="`inputs` must have a shape and take slices"):
        c3t.tiled(7, W, B, strides=2, out=OUT)
