"""`matmul` for many small volumes: blocks of whole samples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import conv3dt_jax as c3t
from conv3dt_jax import _choice
from conv3dt_jax._geometry import resolve_axis
from conv3dt_jax.lowerings import _matmul_plans, _products, _samples, _tiles
from conv3dt_jax.lowerings._work import Call
from tests import oracle
from tests.helpers import quick_jit
from tests.test_choice import form
from tests.test_kernel_rows import axes_of, calls


@settings(max_examples=60, deadline=None, derandomize=True)
@given(call=calls(), batch=st.integers(1, 5), block=st.integers(1, 5), with_bias=st.booleans())
def test_blocks_of_samples_give_the_defined_result(call, batch, block, with_bias) -> None:
    geometry = axes_of(*call)
    if any(axis.out < 1 for axis in geometry):
        return
    space, window, strides, dilation, padding, more = call
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(batch, *space, 3)), rng.normal(size=(*window, 2, 3))
    b = rng.normal(size=2) if with_bias else None
    want = oracle.conv3d_transpose(
        x, w, b, strides=strides, padding=padding, dilation_rate=dilation, output_padding=more
    )  # fmt: skip
    static = {"product": _products.plain, "precision": None, "accumulate": jnp.float64, "result": jnp.float64}
    span = _tiles.Span(batch, min(block, batch))
    with jax.enable_x64(True):
        got = quick_jit(lambda x, w, b: _samples.outputs(x, w, geometry, span, bias=b, **static))(x, w, b)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


def test_circular_samples_wrap_within_themselves() -> None:
    rng = np.random.default_rng(1)
    x, w = rng.normal(size=(3, 4, 3, 5, 2)), rng.normal(size=(3, 3, 3, 2, 2))
    geometry = tuple(resolve_axis(n, 3, 2, 1, "circular", None) for n in x.shape[1:4])
    static = {
        "product": _products.plain,
        "precision": None,
        "accumulate": jnp.float64,
        "result": jnp.float64,
        "bias": None,
    }
    with jax.enable_x64(True):
        got = jax.jit(lambda x, w: _samples.outputs(x, w, geometry, _tiles.Span(3, 2), **static))(x, w)
    want = oracle.conv3d_transpose(x, w, strides=2, padding="circular")
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


def described(batch, space=(1, 16, 16), channels=128, filters=64, kernel=(1, 4, 4), strides=(1, 2, 2)):
    call = form(kernel, strides, channels, filters, space, "same")
    return Call.of(call, batch, _choice.room_for("cpu", call, batch))


def test_whole_samples_are_for_batches_whose_products_are_many_and_overlap() -> None:
    assert _matmul_plans.in_blocks(described(32))
    assert _matmul_plans.by_samples(described(32))
    assert _matmul_plans.samples(described(32)).block == 2
    assert not _matmul_plans.in_blocks(described(16))  # 17 MB of them stay in the heap
    assert not _matmul_plans.by_samples(described(1, (1, 128, 128)))
    assert not _matmul_plans.by_samples(described(8, (1, 256, 256)))  # a sample's are too many
    assert not _matmul_plans.by_samples(described(32, kernel=(1, 2, 2)))


LAYER = ((64, 8, 8, 256), (4, 4, 256, 128))


def test_a_batch_of_planes_holds_the_products_of_a_few() -> None:
    """One loop, and a fourth of all 34 MB of products, beside their sums and the kernel."""
    x, w = (jax.ShapeDtypeStruct(shape, "float32") for shape in LAYER)
    compiled = jax.jit(lambda x, w: c3t.lax.conv_transpose(x, w, (2, 2), "SAME")).lower(x, w).compile()
    assert compiled.as_text().count(" while(") == 1
    products = 64 * 8 * 8 * 4 * 4 * 128 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < products / 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
def test_a_batch_in_blocks_equals_its_samples_one_by_one(dtype) -> None:
    """To the bit, of small integers."""
    rng = np.random.default_rng(2)
    x, w = (jnp.asarray(rng.integers(-3, 3, shape), dtype) for shape in ((65, 8, 8, 64), (4, 4, 64, 256)))
    assert _matmul_plans.by_samples(described(65, (1, 8, 8), 64, 256))
    run = functools.partial(c3t.conv3d_transpose, strides=(1, 2, 2), padding="same", implementation="matmul")
    kernel = w.swapaxes(2, 3)[None]
    whole = run(x[:, None], kernel)
    assert whole.dtype == ("int32" if dtype == "int8" else dtype)
    for sample in (0, 31, 64):
        np.testing.assert_array_equal(whole[sample], run(x[sample : sample + 1, None], kernel)[0])


def test_gradients_through_blocks_of_samples() -> None:
    x, w = (jax.random.normal(jax.random.key(3), shape) for shape in LAYER)
    arguments = ((2, 2), "SAME")
    ct = jax.random.normal(jax.random.key(4), (64, 16, 16, 128))
    got, want = (
        jax.jit(lambda x, w, ct, op=op: jax.vjp(lambda x, w: op(x, w, *arguments), x, w)[1](ct))(x, w, ct)
        for op in (c3t.lax.conv_transpose, jax.lax.conv_transpose)
    )
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3 * float(jnp.abs(other).max()))
