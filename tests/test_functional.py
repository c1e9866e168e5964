"""Parameters apart from compute: the spec, `init` and `apply`, and `output_shape`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import conv3dt_jax as c3t
from tests import oracle

X = np.random.default_rng(0).normal(size=(2, 3, 4, 2, 4)).astype(np.float32)


def test_spec_is_canonical_hashable_and_frozen() -> None:
    a = c3t.Conv3DTransposeSpec(8, 3, strides=2, padding="SAME", output_padding=np.int32(1), precision="highest")
    b = c3t.Conv3DTransposeSpec(
        np.int64(8), [3, 3, 3], strides=(2, 2, 2), padding="same", output_padding=(1, 1, 1),
        precision=jax.lax.Precision.HIGHEST,
    )  # fmt: skip
    assert a == b
    assert hash(a) == hash(b)
    assert c3t.Conv3DTransposeSpec(8, 3, padding=1) == c3t.Conv3DTransposeSpec(8, 3, padding=((1, 1),) * 3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        a.filters = 9
    with pytest.raises(ValueError, match="`filters=0`"):
        dataclasses.replace(a, filters=0)


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_init_and_apply(use_bias, data_format) -> None:
    spec = c3t.Conv3DTransposeSpec(6, (2, 3, 4), strides=2, groups=2, use_bias=use_bias, data_format=data_format)
    params = c3t.init(jax.random.key(0), spec, 4, bias_initializer="ones")
    x = np.moveaxis(X, -1, 1) if data_format == "channels_first" else X
    got = np.asarray(jax.jit(c3t.apply, static_argnames="spec")(params, x, spec=spec))
    want = oracle.conv3d_transpose(X, params["kernel"], params.get("bias"), strides=2, groups=2)
    np.testing.assert_allclose(np.moveaxis(got, 1, -1) if x is not X else got, want, rtol=1e-5, atol=1e-5)
    assert got.shape == spec.output_shape(x.shape)
    assert ("bias" in params) == use_bias


def test_init_takes_dtype_and_initializers() -> None:
    spec = c3t.Conv3DTransposeSpec(6, 2)
    params = c3t.init(jax.random.key(0), spec, 4, dtype=jnp.bfloat16, kernel_initializer="ones")
    assert params["kernel"].dtype == params["bias"].dtype == jnp.bfloat16
    assert bool((params["kernel"] == 1).all())
    with pytest.raises(ValueError, match="3 channels"):
        c3t.init(jax.random.key(0), c3t.Conv3DTransposeSpec(6, 2, groups=2), 3)


def test_init_is_reproducible_and_traceable() -> None:
    spec = c3t.Conv3DTransposeSpec(6, 2)
    make = lambda key: c3t.init(key, spec, 4)
    a, b = make(jax.random.key(3)), jax.jit(make)(jax.random.key(3))
    np.testing.assert_array_equal(a["kernel"], b["kernel"])
    assert not np.array_equal(a["kernel"], make(jax.random.key(4))["kernel"])
    stacked = jax.vmap(make)(jax.random.split(jax.random.key(0), 3))
    assert stacked["kernel"].shape == (3, 2, 2, 2, 6, 4)


@pytest.mark.parametrize(
    ("args", "kwargs", "want"),
    [
        (((1, 4, 5, 6, 3), (3, 3, 3, 8, 3)), {"strides": 2}, (1, 9, 11, 13, 8)),
        (((4, 5, 6, 6), (2, 2, 2, 4, 6)), {"strides": 2, "groups": 3}, (8, 10, 12, 12)),
        (((7, 1, 6, 4, 5, 6), (2, 2, 2, 4, 6)), {"data_format": "channels_first"}, (7, 1, 4, 5, 6, 7)),
        (((1, 4, 4, 4, 3), (2, 2, 2, 8, 3)), {"strides": 2, "output_size": (9, 8, 9)}, (1, 9, 8, 9, 8)),
        ((np.array((0, 4, 4, 4, 3)), (2, 2, 2, 8, 3)), {"strides": 2}, (0, 8, 8, 8, 8)),
    ],
)
def test_output_shape(args, kwargs, want) -> None:
    assert c3t.output_shape(*args, **kwargs) == want


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (((1, 4, 4, 4, 3), (2, 2, 8, 3)), "must have 5 entries"), (((4, 4, 3), (2, 2, 2, 8, 3)), "rank 3"),
        (((1, 4, 4, 4, 2), (2, 2, 2, 8, 3)), "2 channels"), ((5, (2, 2, 2, 8, 3)), "must be a shape"),
        (((1, 4, -4, 4, 3), (2, 2, 2, 8, 3)), "at least 0"), (((1, 4, 4.0, 4, 3), (2, 2, 2, 8, 3)), "integer"),
    ],
)  # fmt: skip
def test_output_shape_refuses(args, message) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        c3t.output_shape(*args)


def test_bias_may_have_the_dtype_of_the_operands_or_of_the_result() -> None:
    x, w = jnp.ones((1, 2, 2, 2, 3), jnp.bfloat16), jnp.ones((1, 1, 1, 2, 3), jnp.bfloat16)
    for dtype in (jnp.bfloat16, jnp.float32):
        y = c3t.conv3d_transpose(x, w, jnp.full((2,), 0.5, dtype), preferred_element_type=jnp.float32)
        np.testing.assert_array_equal(y, 3.5)


def test_parameters_of_flax_nnx_are_arrays_too() -> None:
    kernel, bias = nnx.Param(jnp.ones((2, 2, 2, 6, 4))), nnx.Param(jnp.ones((6,)))
    y = jax.jit(lambda x: c3t.conv3d_transpose(x, kernel, bias, strides=2))(X)
    np.testing.assert_allclose(y[0, 0, 0, 0, 0], X[0, 0, 0, 0].sum() + 1, rtol=1e-6)


def test_the_sum_and_the_bias_are_rounded_once() -> None:
    """256 + 1 + 1 = 258 in bfloat16, whose step is 2 there: rounding the sum before the bias loses both ones."""
    x, w = jnp.array([256, 1], jnp.bfloat16).reshape(1, 1, 1, 1, 2), jnp.ones((1, 1, 1, 1, 2), jnp.bfloat16)
    y = c3t.conv3d_transpose(x, w, jnp.ones((1,), jnp.bfloat16))
    assert float(y[0, 0, 0, 0, 0]) == 258
