"""Which library multiplies on a CPU, and how many columns, and that nothing of it shows in results."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import conv3dt_jax as c3t
from conv3dt_jax.lowerings import _products, matmul
from tests import oracle
from tests.helpers import quick_jit
from tests.test_kernel_rows import ORIGINS, axes_of


@settings(max_examples=40, deadline=None, derandomize=True)
@given(columns=st.integers(1, 70), space=st.lists(st.integers(0, 3), max_size=3), channels=st.integers(1, 5))
def test_a_product_has_its_columns_and_no_more(columns, space, channels) -> None:
    rng = np.random.default_rng(0)
    values, matrix = (rng.integers(-9, 9, shape) for shape in ((*space, channels), (columns, channels)))
    got = _products.on_cpu(
        jnp.asarray(values, "int8"), jnp.asarray(matrix, "int8"), 1, precision=None, accumulate="int32"
    )
    assert got.dtype == "int32"
    np.testing.assert_array_equal(got, values @ matrix.T)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    others=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    space=st.lists(st.integers(0, 3), max_size=3),
    channels=st.integers(1, 5),
    last=st.booleans(),
)
def test_a_product_by_eigen_has_the_axes_of_both_in_order(others, space, channels, last) -> None:
    """Of whole numbers, whose sums are exact."""
    rng = np.random.default_rng(1)
    values, kernel = (rng.integers(-9, 9, shape) for shape in ((*space, channels), (*others, channels)))
    dim = len(others) if last else max(len(others) - 1, 0)
    lies = np.moveaxis(kernel, -1, dim)
    static = {"precision": None, "accumulate": jnp.float32}
    with mock.patch.multiple(_products, EVEN=1 << 20, LEAST=0, ROWS=0, TURNED=0):
        got = _products.on_cpu(jnp.asarray(values, "float32"), jnp.asarray(lies, "float32"), dim, **static)
    np.testing.assert_array_equal(got, np.tensordot(values, kernel, (-1, -1)))


def test_long_products_are_for_eigen_sooner_where_their_columns_are_uneven() -> None:
    f32, bf16, f64 = jnp.float32, jnp.bfloat16, jnp.float64
    assert _products.is_for_eigen(4096, 16, 800, f32, f32)
    assert not _products.is_for_eigen(100, 512, 800, f32, f32)  # few rows
    assert not _products.is_for_eigen(400, 32, 800, f32, f32)  # a short product
    assert _products.is_for_eigen(512, 128, 832, f32, f32)
    assert not _products.is_for_eigen(4096, 16, 832, f32, f32)
    assert not _products.is_for_eigen(2047, 512, 832, f32, f32)
    assert _products.is_for_eigen(2048, 512, 832, f32, f32)  # many rows
    assert not any(_products.is_for_eigen(9999, 256, 2048 * times, f32, f32) for times in (1, 2))  # lines in the cache
    assert _products.is_for_eigen(9999, 256, 2048 + 1024, f32, f32)
    assert not _products.is_for_eigen(200, 256, 832, f32, f32)
    assert not _products.is_for_eigen(256, 64, 832, f32, f32)
    assert not _products.is_for_eigen(512, 128, 832, f32, f32, turned=True)  # a copy of the kernel, for few rows
    assert _products.is_for_eigen(1024, 128, 832, f32, f32, turned=True)
    assert _products.is_for_eigen(1024, 128, 800, f32, f32, turned=True)
    assert not _products.is_for_eigen(1023, 128, 800, f32, f32, turned=True)
    assert not _products.is_for_eigen(4096, 128, 800, f32, bf16)
    assert not _products.is_for_eigen(4096, 128, 800, f64, f64)


def test_long_products_of_planes_are_for_eigen_unless_their_lines_fall_together() -> None:
    def library(rows, channels, columns, dtype="float32"):
        operands = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((rows, channels), (channels, columns)))
        product = functools.partial(_products.of_planes, precision=None, accumulate=dtype)
        return "Eigen" if "stablehlo.convolution" in jax.jit(product).lower(*operands).as_text() else "YNNPACK"

    assert library(1024, 256, 128) == library(4608, 1024, 784) == library(1024, 256, 1024) == "Eigen"
    assert library(1023, 256, 128) == library(1024, 255, 128) == library(1024, 256, 127) == "YNNPACK"
    assert library(1024, 256, 2048) == library(1024, 256, 4096) == "YNNPACK"
    assert library(1024, 256, 128, "bfloat16") == "YNNPACK"


def test_planes_are_multiplied_where_they_lie_in_short_products() -> None:
    assert _products.is_batched(4, 64, 32, 250)
    assert not _products.is_batched(1, 64, 32, 250)
    assert not _products.is_batched(4, 512, 32, 49)  # a copy of the kernel for each sample
    assert _products.is_batched(4, 196, 32, 49)
    assert not _products.is_batched(4, 197, 32, 49)
    assert _products.is_batched(4, 250, 16, 250)
    assert not _products.is_batched(4, 251, 16, 250)  # above 4 million
    assert _products.is_batched(32, 27, 216, 784)
    assert not _products.is_batched(32, 27, 215, 784)
    assert not _products.is_batched(1, 27, 216, 784)


CALLS = {
    "a plane at once": ((1, 1, 32, 32, 64), (1, 5, 5, 16, 64), "valid", "channels_last"),
    "a plane with its channels second": ((1, 256, 1, 32, 33), (1, 5, 5, 64, 256), "valid", "channels_first"),
    "samples": ((16, 8, 8, 8, 32), (3, 3, 3, 32, 32), "same", "channels_last"),
    "blocks of cells": ((1, 48, 48, 48, 64), (2, 2, 2, 20, 64), "same", "channels_last"),
}


def product_of(window, padding, layout):
    strides = tuple(min(k, 2) for k in window[:3])
    return functools.partial(
        c3t.conv3d_transpose, strides=strides, padding=padding, data_format=layout, implementation="matmul"
    )


@pytest.mark.parametrize("looped", [False, True], ids=["at once", "in a loop"])
@pytest.mark.parametrize(("inputs", "window", "padding", "layout"), CALLS.values(), ids=CALLS)
def test_eigen_is_handed_products_not_convolutions(inputs, window, padding, layout, looped) -> None:
    """Which XLA makes of convolutions late, and not of all: not where one would read a transposed operand, in loops."""
    call = product_of(window, padding, layout)
    x, w = jax.ShapeDtypeStruct((2, *inputs), "float32"), jax.ShapeDtypeStruct(window, "float32")
    run = jax.jit(lambda x, w: jax.lax.map(lambda x: call(x, w), x) if looped else call(x[0], w))
    lowered = run.lower(x, w)
    assert "stablehlo.convolution" in lowered.as_text()
    compiled = lowered.compile().as_text()
    assert " dot(" in compiled
    assert " convolution(" not in compiled


@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 1)], ids=["inputs", "kernel", "both"])
def test_gradients_of_products_by_eigen_are_products(wanted) -> None:
    """The transpose of a convolution is one whose window is the cotangent."""
    inputs, window, padding, layout = CALLS["a plane at once"]
    call = product_of(window, padding, layout)
    run = jax.jit(jax.grad(lambda x, w: call(x, w).sum(), wanted))
    x, w = jax.ShapeDtypeStruct(inputs, "float32"), jax.ShapeDtypeStruct(window, "float32")
    assert "stablehlo.convolution" not in run.lower(x, w).as_text()


def test_columns_are_added_to_narrow_products_that_few_complete() -> None:
    changed = {n: _products.filled(n) for n in range(1, 1000) if _products.filled(n) != n}
    assert changed == {27: 32, 28: 32, 29: 32, 30: 32, 31: 32} | dict.fromkeys(range(54, 64), 64)


WINDOWS = {"27, three filters": ((1, 3, 3), 3), "27, one": ((3, 3, 3), 1), "54": ((3, 3, 3), 2), "28": ((1, 2, 2), 7)}


@pytest.mark.parametrize("tile_bytes", [1 << 9, 1 << 12, 1 << 20])
@pytest.mark.parametrize("origin", ORIGINS, ids=str)
@pytest.mark.parametrize(("window", "filters"), WINDOWS.values(), ids=WINDOWS)
def test_results_of_few_filters_are_as_defined(window, filters, origin, tile_bytes) -> None:
    """At once, in blocks of samples and in blocks of cells, whichever way the kernel lies."""
    rng = np.random.default_rng(2)
    space = (1, 6, 5) if window[0] == 1 else (4, 3, 5)
    strides = tuple(min(k, 2) for k in window)
    x, w, b = rng.normal(size=(3, *space, 8)), rng.normal(size=(*window, filters, 8)), rng.normal(size=filters)
    geometry = axes_of(space, window, strides, (1, 1, 1), "same", None)
    static = {"groups": 1, "precision": None, "accumulate": jnp.float64, "tile_bytes": tile_bytes, "origin": origin}
    with jax.enable_x64(True):
        got = quick_jit(lambda x, w, b: matmul.outputs(x, w, geometry, bias=b, **static))(x, w, b)
    want = oracle.conv3d_transpose(x, w, b, strides=strides, padding="same")
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


def described(platform, filters):
    """The module of a plane of that many filters, under a kernel of 3x3."""
    x, w = jax.ShapeDtypeStruct((4, 16, 16, 64), "float32"), jax.ShapeDtypeStruct((3, 3, 64, filters), "float32")
    run = jax.jit(lambda x, w: c3t.lax.conv_transpose(x, w, (2, 2), "SAME"))
    return run.trace(x, w).lower(lowering_platforms=(platform,)).as_text()


def test_a_cpu_makes_32_columns_of_27_and_a_gpu_27() -> None:
    products = {
        filters: [line for line in described("cpu", filters).splitlines() if "dot_general" in line]
        for filters in (3, 4)
    }
    assert len(products[3]) == 1
    assert "x32xf32>" in products[3][0]
    assert "x4xf32>" in products[4][0]
    assert "x32xf32>" not in described("cuda", 3)


def test_no_copy_is_made_to_leave_the_added_columns_out() -> None:
    x, w = jax.ShapeDtypeStruct((1, 32, 32, 32, 64), "float32"), jax.ShapeDtypeStruct((3, 3, 3, 1, 64), "float32")
    compiled = jax.jit(lambda x, w: c3t.conv3d_transpose(x, w, strides=2, padding="same")).lower(x, w).compile()
    products = 32**3 * 32 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 1.1 * products
