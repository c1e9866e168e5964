"""Every lowering gives the defined result and its gradients, for every case of the table and every dtype."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import conv3dt_jax as c3t
from tests import oracle
from tests.cases import CASES, Case
from tests.helpers import quick_jit

IMPLEMENTATIONS = ["auto", "dilated", "matmul", "phases"]
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
by_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def value_and_gradients(x, w, b, ct, implementation, kwargs):
    def run(x, w, b):
        return c3t.conv3d_transpose(x, w, b, implementation=implementation, **kwargs)

    y, pullback = jax.vjp(run, x, w, b)
    return y, *pullback(ct)


def check(case: Case, implementation: str) -> None:
    """Values and gradients in float64 against the oracle."""
    x, w, b = case.operands(np.float64)
    want = oracle.conv3d_transpose(x, w, b, **case.kwargs)
    ct = np.random.default_rng(1).normal(size=want.shape)
    want_gx, want_gw = oracle.vjp(x, w, ct, **case.kwargs)
    with jax.enable_x64(True):
        compiled = jax.jit if implementation == "auto" else quick_jit
        run = compiled(lambda *arrays: value_and_gradients(*arrays, implementation, case.kwargs))
        y, gx, gw, gb = run(x, w, b, ct)
    tolerance = {"rtol": 1e-12, "atol": 1e-12 * max(1, np.abs(want).max(initial=0))}
    assert y.shape == want.shape == c3t.output_shape(x.shape, w.shape, **case.kwargs)
    np.testing.assert_allclose(y, want, **tolerance)
    gradient_tolerance = {"rtol": 1e-11, "atol": 1e-11}
    np.testing.assert_allclose(gx, want_gx, **gradient_tolerance)
    np.testing.assert_allclose(gw, want_gw, **gradient_tolerance)
    np.testing.assert_allclose(gb, ct.sum((0, 1, 2, 3)), **gradient_tolerance)


@by_case
@by_implementation
def test_value_and_gradients_are_those_of_the_definition(case: Case, implementation: str) -> None:
    check(case, implementation)


# Relative rounding of one value of the result; the sums before it are in 32 bits (2e-6 covers a dozen terms) or exact.
DTYPES = {
    "float32": 2**-23, "bfloat16": 2**-8, "float16": 2**-11, "complex64": 2**-22,
    "int32": 0, "int8": 0, "uint8": 0, "int16": 0,
}  # fmt: skip
RESULTS = {"int8": "int32", "int16": "int32", "uint8": "uint32"}
DTYPE_CASES = [
    case for case in CASES if case.name in ("stride_below_kernel", "groups", "depthwise", "stride_equals_kernel")
]


@pytest.mark.parametrize("case", [case for case in CASES if case.groups == 1], ids=lambda case: case.name)
def test_the_input_gradient_alone_of_one_channel_in_each_group_is_that_of_the_definition(case: Case, x64: None) -> None:
    """It is computed in another way than beside the kernel's gradient."""
    case = dataclasses.replace(case, channels=3, filters=3, kwargs={**case.kwargs, "groups": 3})
    x, w, _ = case.operands(np.float64)
    ct = np.random.default_rng(1).normal(size=oracle.conv3d_transpose(x, w, **case.kwargs).shape)
    want, _ = oracle.vjp(x, w, ct, **case.kwargs)
    run = lambda x: c3t.conv3d_transpose(x, w, **case.kwargs)
    got = jax.jit(lambda x, ct: jax.vjp(run, x)[1](ct)[0])(x, ct)
    np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.thinned
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", DTYPE_CASES, ids=lambda case: case.name)
@by_implementation
def test_each_dtype_is_exact_to_its_rounding(case: Case, implementation: str, dtype: str) -> None:
    x, w, _ = (jnp.asarray(value) for value in case.operands(jnp.dtype(dtype)))
    y = c3t.conv3d_transpose(x, w, implementation=implementation, **case.kwargs)
    want = oracle.conv3d_transpose(np.asarray(x), np.asarray(w), **case.kwargs)
    assert y.dtype == RESULTS.get(dtype, dtype)
    error = np.abs(np.asarray(y).astype(want.dtype) - want)
    scale = oracle.conv3d_transpose(np.abs(np.asarray(x)), np.abs(np.asarray(w)), **case.kwargs).real
    summation = 2e-6 if DTYPES[dtype] else 0
    assert np.all(error <= DTYPES[dtype] * np.abs(want) + summation * scale)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@by_implementation
def test_16_bit_floats_are_summed_in_float32(implementation: str, dtype: str) -> None:
    """4096 ones: summed in 16 bits they stick at 256 (bfloat16) or 2048 (float16)."""
    x, w = jnp.ones((1, 2, 2, 2, 512), dtype), jnp.ones((2, 2, 2, 1, 512), dtype)
    y = c3t.conv3d_transpose(x, w, implementation=implementation)
    assert float(y[0, 1, 1, 1, 0]) == 4096.0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@by_implementation
def test_16_bit_gradients_are_summed_in_float32(implementation: str, dtype: str) -> None:
    x, w = jnp.ones((1, 16, 16, 16, 1), dtype), jnp.ones((1, 1, 1, 1, 1), dtype)
    gradient = jax.grad(lambda w: c3t.conv3d_transpose(x, w, implementation=implementation).sum())(w)
    assert gradient.dtype == dtype
    assert float(gradient.ravel()[0]) == 4096.0


@pytest.mark.thinned
@pytest.mark.parametrize(
    ("dtype", "preferred"),
    [("bfloat16", "float32"), ("float16", "float32"), ("bfloat16", "bfloat16"), ("float32", "float64"),
     ("int8", "int32"), ("int8", "int8"), ("int32", "int64"), ("int8", "float32"), ("uint8", "uint32"), ("complex64", "complex128")],
)  # fmt: skip
@by_implementation
def test_preferred_element_type_is_the_results_dtype(
    implementation: str, dtype: str, preferred: str, x64: None
) -> None:
    case = next(case for case in CASES if case.name == "stride_below_kernel")
    x, w, b = (jnp.asarray(value) for value in case.operands(jnp.dtype(dtype)))
    y = c3t.conv3d_transpose(
        x, w, b, implementation=implementation, preferred_element_type=preferred, **case.kwargs
    )  # fmt: skip
    assert y.dtype == preferred
    want = oracle.conv3d_transpose(np.asarray(x), np.asarray(w), np.asarray(b), **case.kwargs)
    if preferred == "int8":  # asked for: the sums wrap as int8 arithmetic does
        want = want.astype(np.int8)
    tolerance = {"bfloat16": 2**-8, "float32": 1e-5, "float64": 1e-12, "complex128": 1e-12}.get(preferred, 0)
    np.testing.assert_allclose(np.asarray(y).astype(want.dtype), want, rtol=tolerance, atol=tolerance)


@pytest.mark.thinned
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
@pytest.mark.parametrize("preferred", ["float32", "float64", "complex128"])
@by_implementation
def test_gradients_keep_the_operands_dtypes(implementation: str, dtype: str, preferred: str, x64: None) -> None:
    if (dtype == "complex64") != (preferred == "complex128"):
        preferred = None
    x, w = jnp.ones((1, 2, 2, 2, 2), dtype), jnp.ones((3, 3, 3, 2, 2), dtype)
    y, pullback = jax.vjp(
        lambda x, w: c3t.conv3d_transpose(
            x, w, strides=2, implementation=implementation, preferred_element_type=preferred
        ), x, w,
    )  # fmt: skip
    gx, gw = pullback(jnp.ones_like(y))
    assert (gx.dtype, gw.dtype) == (dtype, dtype)
    np.testing.assert_allclose(np.asarray(gx).astype(np.complex128), 54)
    np.testing.assert_allclose(np.asarray(gw).astype(np.complex128), 8)


@pytest.mark.parametrize("precision", ["highest", "default", jax.lax.Precision.HIGH, ("high", "highest")])
@by_implementation
def test_precision_is_handed_to_the_product(implementation: str, precision: object) -> None:
    x, w = jnp.ones((1, 2, 2, 2, 2)), jnp.ones((3, 3, 3, 2, 2))
    lowered = jax.jit(
        lambda x, w: c3t.conv3d_transpose(x, w, strides=2, implementation=implementation, precision=precision)
    ).lower(x, w)
    first = precision[0] if isinstance(precision, tuple) else precision
    assert jax.lax.Precision(first).name in lowered.as_text()


@pytest.mark.thinned
@pytest.mark.parametrize(
    "shape", [(0, 3, 4, 2, 3), (2, 0, 4, 2, 3), (2, 3, 0, 0, 3), (0, 0, 4, 2, 3)], ids=lambda shape: "x".join(map(str, shape))
)  # fmt: skip
@pytest.mark.parametrize("padding", ["valid", "same", "circular", 1])
@by_implementation
def test_empty_axes_give_zeros_plus_bias(implementation: str, padding: object, shape: tuple[int, ...]) -> None:
    x, w, b = jnp.ones(shape), jnp.ones((3, 3, 3, 2, 3)), jnp.arange(1.0, 3.0)
    kwargs = {"strides": 2, "padding": padding}
    want = oracle.conv3d_transpose(x, w, b, **kwargs)
    y, gx, gw, gb = value_and_gradients(x, w, b, jnp.ones(want.shape), implementation, kwargs)
    assert y.shape == want.shape
    np.testing.assert_array_equal(y, want)
    assert gx.shape == x.shape
    assert not gw.any()
    np.testing.assert_array_equal(gb, want[..., 0].size)
