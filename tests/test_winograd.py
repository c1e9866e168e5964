"""`winograd`: the defined result and gradients with fewer products, within four times the rounding of the direct sum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from jax import export

import conv3dt_jax as c3t
from conv3dt_jax import _choice, _primitives
from conv3dt_jax.lowerings import winograd
from tests import oracle
from tests.helpers import quick_jit


@st.composite
def calls(draw):
    space = tuple(draw(st.integers(1, 11)) for _ in range(3))
    strides = tuple(draw(st.sampled_from([1, 1, 2, 3])) for _ in range(3))
    window = tuple(draw(st.integers(1, 3 if s == 1 else 2 * s + 1)) for s in strides)
    dilation = tuple(
        draw(st.sampled_from([1, 2, 3])) if s == 1 or k < 3 else 1 for k, s in zip(window, strides, strict=True)
    )
    groups = draw(st.sampled_from([1, 2]))
    channels, filters = draw(st.integers(1, 3)) * groups, draw(st.integers(1, 3)) * groups
    padding = draw(st.sampled_from(["valid", "same", 1]))
    if padding == 1:
        padding = tuple(min(1, (k - 1) * d // 2) for k, d in zip(window, dilation, strict=True))
    layout = draw(st.sampled_from(["channels_last", "channels_first"]))
    kwargs = {
        "strides": strides,
        "padding": padding,
        "dilation_rate": dilation,
        "groups": groups,
        "data_format": layout,
    }
    spec = c3t.Conv3DTransposeSpec(filters, window, strides, padding, dilation_rate=dilation)
    assume(all(n > 0 for n in spec.output_shape((1, *space, channels))))
    assume(winograd.refusal(spec.geometry(space), np.float32) is None)
    return (draw(st.integers(1, 2)), *space, channels), (*window, filters // groups, channels), kwargs


@settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
@given(call=calls(), seed=st.integers(0, 2**32 - 1))
def test_value_and_gradients_are_those_of_the_definition(call, seed) -> None:
    shape, kernel_shape, kwargs = call
    rng = np.random.default_rng(seed)
    x, w, b = rng.normal(size=shape), rng.normal(size=kernel_shape), rng.normal(size=kernel_shape[3] * kwargs["groups"])
    first = kwargs.pop("data_format") == "channels_first"
    want = oracle.conv3d_transpose(x, w, b, **kwargs)
    ct = rng.normal(size=want.shape)
    want_gx, want_gw = oracle.vjp(x, w, ct, **kwargs)

    def run(x, w, ct):
        def last(x, w):
            x = jnp.moveaxis(x, -1, 1) if first else x
            layout = "channels_first" if first else "channels_last"
            y = c3t.conv3d_transpose(x, w, b, implementation="winograd", data_format=layout, **kwargs)
            return jnp.moveaxis(y, 1, -1) if first else y

        y, pullback = jax.vjp(last, x, w)
        return y, *pullback(ct)

    with jax.enable_x64(True):
        y, gx, gw = quick_jit(run)(x, w, ct)
    np.testing.assert_allclose(y, want, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(gx, want_gx, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(gw, want_gw, rtol=1e-10, atol=1e-10)


@pytest.mark.thinned
@pytest.mark.parametrize(
    ("space", "kernel", "strides"),
    [
        ((9, 30, 8), 3, 1),
        ((32, 32, 32), 3, 1),
        ((9, 20, 8), 4, 2),
        ((20, 17, 12), (5, 4, 3), (2, 2, 3)),
        ((8, 40, 9), (3, 6, 4), (1, 3, 2)),
    ],
    ids=str,
)
@pytest.mark.usefixtures("quick_compiles")
def test_volumes_of_many_blocks_are_seamless(space, kernel, strides) -> None:
    """Blocks that begin early do some tiles again: neither the result nor the kernel's gradient counts them twice."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(2, *space, 8)), rng.normal(size=(*np.broadcast_to(kernel, 3), 4, 8))
    kwargs = {"strides": strides, "padding": "same"}
    want = oracle.conv3d_transpose(x, w, **kwargs)
    ct = rng.normal(size=want.shape)
    want_gx, want_gw = oracle.vjp(x, w, ct, **kwargs)
    with jax.enable_x64(True):
        run = lambda x, w: c3t.conv3d_transpose(x, w, implementation="winograd", **kwargs)
        y, pullback = jax.vjp(jax.jit(run), x, w)
        gx, gw = pullback(jnp.asarray(ct))
    np.testing.assert_allclose(y, want, atol=1e-10)
    np.testing.assert_allclose(gx, want_gx, atol=1e-10)
    np.testing.assert_allclose(gw, want_gw, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("channels", "filters", "kernel", "strides"),
    [(8, 8, 3, 1), (64, 16, 3, 1), (8, 8, 4, 2), (64, 16, 3, 2), (8, 8, 5, 2)],
)
def test_rounding_stays_within_four_times_that_of_the_direct_sum(channels, filters, kernel, strides) -> None:
    rng = np.random.default_rng(0)
    space = (12, 16, 16) if strides == 1 else (7, 8, 9)
    kwargs = {"strides": strides, "padding": "same"}
    x = rng.normal(size=(1, *space, channels)).astype(np.float32)
    w = rng.normal(size=(kernel, kernel, kernel, filters, channels)).astype(np.float32)
    want = oracle.conv3d_transpose(x, w, **kwargs)
    ct = rng.normal(size=want.shape).astype(np.float32)
    wanted = (want, *oracle.vjp(x, w, ct, **kwargs))

    def errors(implementation):
        run = lambda x, w: c3t.conv3d_transpose(x, w, implementation=implementation, **kwargs)
        y, pullback = jax.vjp(run, x, w)
        found = [np.asarray(got, np.float64) for got in (y, *pullback(ct))]
        return [np.sqrt(np.mean((got - exact) ** 2)) for got, exact in zip(found, wanted, strict=True)]

    for mine, direct in zip(errors("winograd"), errors("phases"), strict=True):
        assert 0 < mine < 4 * direct


def form(space=(32, 32, 32), channels=32, filters=32, dtype="float32", precision=None, kernel=3, **kwargs):
    spec = c3t.Conv3DTransposeSpec(filters, kernel_size=kernel, padding="same", precision=precision, **kwargs)
    dtype = np.dtype(dtype)
    return _primitives.Form(
        spec.geometry(space), channels, filters, 1, (dtype,) * 3, np.dtype("float32"), spec.precision, "auto"
    )


@pytest.mark.parametrize("kind", ["outputs", "inputs", "kernel", "gradients"])
def test_auto_takes_it_for_sums_in_float32_at_the_default_precision_only(kind) -> None:
    choose = lambda **kwargs: _choice.choose(kind, "cpu", form(**kwargs), 1)
    assert choose() == choose(precision="default") == choose(dilation_rate=2) == choose(dtype="bfloat16") == "winograd"
    assert choose(strides=2, kernel=4) == choose(strides=2, kernel=5) == "winograd"
    assert choose(precision="highest") == choose(dtype="complex64") == choose(strides=3, kernel=4) == "phases"
    assert choose(strides=2, dtype="bfloat16") == "phases"  # multiplied twice as fast there
    with jax.default_matmul_precision("float32"):
        assert choose() == "phases"


def test_auto_does_not_transform_kernels_larger_than_the_volume() -> None:
    assert _choice.choose("outputs", "cpu", form((4, 4, 4), 256, 256), 1) != "winograd"


@pytest.mark.parametrize(
    ("kwargs", "shape", "dtype", "message"),
    [
        ({"padding": "circular"}, (3, 3, 3), "float32", "other paddings than circular"),
        ({}, (4, 3, 3), "float32", "here they are 4 and 3"),
        ({"strides": 2}, (3, 8, 3), "float32", "here they are 2 and 4"),
        ({"strides": 2}, (2, 2, 2), "float32", "here they are 1 and 1"),
        ({}, (3, 3, 3), "int32", "fractions, which int32 does not hold"),
    ],
)
def test_it_refuses_by_name_what_it_cannot_do(kwargs, shape, dtype, message) -> None:
    x, w = jnp.ones((1, 4, 4, 4, 2), dtype), jnp.ones((*shape, 2, 2), dtype)
    with pytest.raises(NotImplementedError, match=message):
        c3t.conv3d_transpose(x, w, implementation="winograd", **kwargs)


@pytest.mark.usefixtures("quick_compiles")
def test_it_differentiates_twice_maps_and_exports_with_a_symbolic_batch() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(2, 5, 6, 4, 2)), rng.normal(size=(3, 3, 3, 3, 2))
    with jax.enable_x64(True):

        def energy(implementation):
            run = lambda x, w: c3t.conv3d_transpose(x, w, padding="same", implementation=implementation)
            return lambda x, w: jnp.sum(jnp.tanh(run(x, w)) ** 2)

        mine, reference = (
            jax.jit(jax.jacfwd(jax.grad(energy(name), 1), 1))(x, w) for name in ("winograd", "dilated")
        )  # fmt: skip
        np.testing.assert_allclose(mine, reference, atol=1e-9)
        apply = lambda x: c3t.conv3d_transpose(x, w, padding="same", implementation="winograd")
        np.testing.assert_allclose(jax.vmap(apply)(x), apply(x), atol=1e-12)
        (batch,) = export.symbolic_shape("b")
        exported = export.export(jax.jit(apply))(jax.ShapeDtypeStruct((batch, 5, 6, 4, 2), x.dtype))
        np.testing.assert_allclose(exported.call(x), apply(x), atol=1e-12)


@pytest.mark.usefixtures("quick_compiles")
def test_bfloat16_is_rounded_once_with_the_bias() -> None:
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=shape), "bfloat16") for shape in ((1, 12, 16, 16, 8), (3, 3, 3, 8, 8)))
    b = jnp.asarray(rng.normal(size=8), "bfloat16")
    want = oracle.conv3d_transpose(*(np.asarray(a, np.float64) for a in (x, w, b)), padding="same")
    y, pullback = jax.vjp(
        lambda x, w, b: c3t.conv3d_transpose(x, w, b, padding="same", implementation="winograd"), x, w, b
    )
    gx, gw, gb = pullback(jnp.ones_like(y))
    assert y.dtype == gx.dtype == gw.dtype == gb.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float64), want, rtol=2**-8, atol=1e-4)
    assert float(gb[0]) == 12 * 16 * 16
