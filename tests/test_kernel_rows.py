"""`matmul` where the kernel is the larger operand: row by row, as it lies; and blocks that write such rows."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import conv3dt_jax as c3t
from conv3dt_jax import _choice
from conv3dt_jax._geometry import resolve_axis
from conv3dt_jax.lowerings import _kernel_rows, _matmul_plans, _matmul_work, _products, _tiles, matmul
from conv3dt_jax.lowerings._origin import Origin
from conv3dt_jax.lowerings._turn import turned_kernel
from conv3dt_jax.lowerings._work import Call
from tests import oracle
from tests.helpers import quick_jit
from tests.test_choice import form

ORIGINS = [Origin(*flags) for flags in itertools.product([False, True], repeat=2)]
by_origin = pytest.mark.parametrize("origin", ORIGINS, ids=str)
triples = st.tuples


@st.composite
def calls(draw):
    """Space, window and keyword arguments of calls that keep something."""
    space, window = (draw(triples(*[st.integers(1, 5)] * 3)) for _ in range(2))
    strides, dilation = draw(triples(*[st.integers(1, 4)] * 3)), draw(triples(*[st.integers(1, 3)] * 3))
    crop = st.integers(0, 5)
    padding = draw(st.sampled_from(["valid", "same"]) | triples(*[st.tuples(crop, crop)] * 3))
    more = draw(st.none() | triples(*(st.integers(0, max(s, d) - 1) for s, d in zip(strides, dilation, strict=True))))
    return space, window, strides, dilation, padding, more


def axes_of(space, window, strides, dilation, padding, more):
    each = [padding] * 3 if isinstance(padding, str) else padding
    more = more or (None,) * 3
    return tuple(resolve_axis(*sizes) for sizes in zip(space, window, strides, dilation, each, more, strict=True))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(call=calls(), origin=st.sampled_from(ORIGINS), cut=st.booleans())
def test_rows_of_a_kernel_give_the_defined_result(call, origin, cut) -> None:
    geometry = axes_of(*call)
    if any(axis.out < 1 for axis in geometry):
        return
    space, window, strides, dilation, padding, more = call
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(2, *space, 3)), rng.normal(size=(*window, 2, 3))
    want = oracle.conv3d_transpose(
        x, w, strides=strides, padding=padding, dilation_rate=dilation, output_padding=more
    )  # fmt: skip
    with jax.enable_x64(True):
        lies = origin.restored(jnp.asarray(w))
        static = {"product": _products.plain, "precision": None, "accumulate": jnp.float64, "origin": origin}
        got = quick_jit(lambda x, w: _kernel_rows.outputs(x, w, geometry, cut=cut, **static))(x, lies)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(call=calls())
def test_what_is_kept_is_what_reaches_the_result(call) -> None:
    """Counted one by one along depth and height; the width is multiplied whole."""
    geometry = axes_of(*call)
    if any(axis.out < 1 for axis in geometry):
        return
    rows = [
        sum(0 <= i * axis.s + t * axis.d - axis.lo < axis.out for i in range(axis.n) for t in range(axis.k))
        for axis in geometry[:2]
    ]
    assert _kernel_rows.kept(geometry) == rows[0] * rows[1] * geometry[2].n * geometry[2].k


@by_origin
def test_turning_a_kernel_turns_its_origin(origin) -> None:
    kernel = jnp.arange(2 * 3 * 4 * 5 * 6.0).reshape(2, 3, 4, 5, 6)
    np.testing.assert_array_equal(origin.turned().restored(turned_kernel(kernel, 1)), origin.restored(kernel))


# A volume small enough for tests, and large enough for rows: 64 cells, and 32 columns of a row.
ROWS = ((2, 4, 3, 4, 5), (3, 3, 3, 12, 5))


def rows_call(batch=2, space=(4, 3, 4), kernel=3, strides=2, channels=5, filters=12, padding="same"):
    described = form(kernel, strides, channels, filters, space, padding)
    return Call.of(described, batch, _choice.room_for("cpu", described, batch))


def test_rows_are_for_many_cells_and_wide_kernels_that_overlap() -> None:
    assert _matmul_plans.by_rows(rows_call())
    assert not _matmul_plans.by_rows(rows_call(space=(4, 2, 4)))
    assert not _matmul_plans.by_rows(rows_call(filters=10))
    assert not _matmul_plans.by_rows(rows_call(kernel=2, filters=32))
    assert not _matmul_plans.by_rows(rows_call(kernel=(3, 3, 1), filters=64))
    assert not _matmul_plans.by_rows(rows_call(kernel=7))
    assert not _matmul_plans.by_rows(dataclasses.replace(rows_call(), tile_bytes=_tiles.tile_bytes("cuda", itemsize=4)))


@pytest.mark.parametrize("padding", ["same", "valid", 1])
def test_value_and_gradients_by_rows(padding, x64: None) -> None:
    rng = np.random.default_rng(1)
    x, w, b = (rng.normal(size=shape) for shape in (*ROWS, 12))
    assert _matmul_plans.by_rows(rows_call(padding=padding))
    run = lambda x, w, b: c3t.conv3d_transpose(x, w, b, strides=2, padding=padding, implementation="matmul")
    y, pullback = jax.vjp(run, x, w, b)
    want = oracle.conv3d_transpose(x, w, b, strides=2, padding=padding)
    np.testing.assert_allclose(y, want, rtol=1e-12, atol=1e-12)
    ct = rng.normal(size=y.shape)
    for got, expected in zip(pullback(ct)[:2], oracle.vjp(x, w, ct, strides=2, padding=padding), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("dtype", "rounding"), [("bfloat16", 2**-8), ("float16", 2**-11), ("int8", 0)])
def test_rows_in_other_dtypes_round_once(dtype, rounding) -> None:
    rng = np.random.default_rng(2)
    x, w = (jnp.asarray(rng.integers(-9, 9, shape), dtype) for shape in ROWS)
    got = c3t.conv3d_transpose(x, w, strides=2, padding="same", implementation="matmul")
    want = oracle.conv3d_transpose(np.asarray(x, float), np.asarray(w, float), strides=2, padding="same")
    np.testing.assert_allclose(np.asarray(got, float), want, rtol=rounding, atol=0)


@pytest.mark.parametrize("transpose_kernel", [False, True])
@pytest.mark.parametrize("numbers", [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW"), ("NHWC", "HWOI", "NCHW")])
def test_lifted_calls_hand_their_kernel_over_as_it_lies(numbers, transpose_kernel) -> None:
    """Whatever its order, and mirrored or not."""
    sizes = {"N": 8, "C": 128, "H": 4, "W": 4, "I": 128, "O": 64}
    if transpose_kernel:
        sizes |= {"I": 64, "O": 128}
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=[sizes[letter] for letter in numbers[0]]), jnp.float32)
    w = jnp.asarray(rng.normal(size=[{**sizes, "H": 4, "W": 4}[letter] for letter in numbers[1]]), jnp.float32)
    arguments = ((2, 2), "SAME", None, numbers, transpose_kernel)
    got = c3t.lax.conv_transpose(x, w, *arguments)
    want = jax.lax.conv_transpose(x, w, *arguments)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_a_large_kernel_is_not_copied_whole() -> None:
    """Of 14 MB: products and rows of the kernel take less than products and a copy of the kernel, plus a row."""
    described = form(3, 2, 512, 256, (8, 8, 8), "same")
    assert _choice.choose("outputs", "cpu", described, 1) == "matmul"
    x, w = (jax.ShapeDtypeStruct(shape, "float32") for shape in ((1, 8, 8, 8, 512), (3, 3, 3, 256, 512)))
    run = lambda x, w: c3t.conv3d_transpose(x, w, strides=2, padding="same")
    held = jax.jit(run).lower(x, w).compile().memory_analysis().temp_size_in_bytes
    call = Call.of(described, 1, _choice.room_for("cpu", described, 1))
    assert held <= _matmul_work.work(call, gradients=0).temporary_bytes


# A product for each tap.


@settings(max_examples=40, deadline=None, derandomize=True)
@given(call=calls(), mirrored=st.booleans(), parts=st.sampled_from([0, 1, 3]))
def test_a_product_for_each_tap_gives_the_same_products(call, mirrored, parts) -> None:
    space, window, *_ = call
    rng = np.random.default_rng(5)
    x, w = rng.normal(size=(2, *space, 3)), rng.normal(size=(*window, 3, 2))
    static = {"precision": None, "accumulate": jnp.float64, "origin": Origin(mirrored, filters_last=True)}
    each_tap = functools.partial(_kernel_rows.tap_by_tap, parts=parts)
    every_tap = functools.partial(_kernel_rows.every_tap, product=_products.plain)
    with jax.enable_x64(True):
        got, want = (quick_jit(lambda x, w, way=way: way(x, w, **static))(x, w) for way in (each_tap, every_tap))
    np.testing.assert_allclose(np.moveaxis(got, (0, 1, 2), (4, 5, 6)), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize(("kernel", "stride"), [(2, 2), (3, 2), (4, 2), (4, 3)])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("turned", [False, True])
def test_values_and_gradients_tap_by_tap_are_those_of_jax(
    dims, kernel, stride, padding, turned, monkeypatch, x64: None
) -> None:
    assert taken_as_jax_has_it("tap_by_tap", dims, kernel, stride, padding, turned, monkeypatch) != turned


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_values_and_gradients_of_taps_in_turn_are_those_of_jax(dims, padding, monkeypatch, x64: None) -> None:
    """Of kernels out of the cache: in parts of their channels, three here."""
    monkeypatch.setattr(_matmul_plans, "OUT_OF_CACHE", 0)
    monkeypatch.setattr(_matmul_plans, "PART", 128)
    assert taken_as_jax_has_it("_in_turn", dims, 3, 2, padding, False, monkeypatch)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_taps_in_turn_are_summed_in_float32_over_all_parts(dtype, monkeypatch) -> None:
    monkeypatch.setattr(_matmul_plans, "OUT_OF_CACHE", 0)
    monkeypatch.setattr(_matmul_plans, "PART", 1 << 12)
    monkeypatch.setattr(_choice, "decide", lambda *_: ("matmul", ""))
    taken, original = [], _kernel_rows._in_turn
    monkeypatch.setattr(_kernel_rows, "_in_turn", lambda *args: (taken.append(args[1].shape[1]), original(*args))[1])
    rng = np.random.default_rng(11)
    x, w = (jnp.asarray(rng.integers(-9, 9, shape), dtype) for shape in ((1, 4, 4, 64), (4, 4, 64, 32)))
    got = c3t.lax.conv_transpose(x, w, (2, 2), "SAME")
    want = jax.lax.conv_transpose(x.astype("float32"), w.astype("float32"), (2, 2), "SAME")
    assert taken == [2]  # parts
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, want.astype(dtype))


def test_taps_in_turn_copy_no_kernel() -> None:
    """Of 32 MiB: what is held are the products, a transposed copy of them, and a tap."""
    x, w = jax.ShapeDtypeStruct((1, 4, 4, 1024), "float32"), jax.ShapeDtypeStruct((4, 4, 1024, 512), "float32")
    compiled = jax.jit(lambda x, w: c3t.lax.conv_transpose(x, w, (2, 2), "SAME")).lower(x, w).compile()
    products, tap = 16 * 16 * 512 * 4, 1024 * 512 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * products + 2 * tap
    assert " while(" in compiled.as_text()


@pytest.mark.parametrize("padding", ["SAME", "VALID", [(3, 1), (2, 3)]])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (4, 2), (5, 2), (4, 3)])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("turned", [False, True])
def test_values_and_gradients_of_one_tap_after_the_other_are_those_of_jax(
    dims, kernel, stride, padding, turned, monkeypatch, x64: None
) -> None:
    monkeypatch.setattr(_matmul_plans, "OUT_OF_CACHE", 0)
    monkeypatch.setattr(_matmul_plans, "LONG_PRODUCT", 1)
    padding = padding if isinstance(padding, str) else (2 * padding)[:dims]
    taken = taken_as_jax_has_it("one_by_one", dims, kernel, stride, padding, turned, monkeypatch)
    assert taken == (dims < 3 and not turned)


def test_one_tap_after_the_other_copies_no_inputs() -> None:
    """What is held are the products, and a few of the taps' matrices."""
    x, w = jax.ShapeDtypeStruct((2, 28, 28, 1024), "float32"), jax.ShapeDtypeStruct((3, 3, 1024, 512), "float32")
    compiled = jax.jit(lambda x, w: c3t.lax.conv_transpose(x, w, (2, 2), "SAME")).lower(x, w).compile()
    products = 2 * 28 * 28 * 9 * 512 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < products + 2 * 1024 * 512 * 4


def taken_as_jax_has_it(way, dims, kernel, stride, padding, turned, monkeypatch) -> bool:
    """Whether the function of that name was called; a kernel whose channels lie last is read as it lies."""
    taken, original = [], getattr(_kernel_rows, way)
    monkeypatch.setattr(_kernel_rows, way, lambda *args, **kw: (taken.append(1), original(*args, **kw))[1])
    rng = np.random.default_rng(7)
    x, w = rng.normal(size=(1, *(2,) * dims, 3)), rng.normal(size=(*(kernel,) * dims, 3, 16))
    w = w.swapaxes(-1, -2) if turned else w

    def run(function, x, w):
        y = function(x, w, (stride,) * dims, padding, transpose_kernel=turned)
        return y, (jnp.sin(y)).sum()

    with monkeypatch.context() as patched:
        patched.setattr(_choice, "decide", lambda *_: ("matmul", ""))
        got, want = (
            quick_jit(jax.value_and_grad(lambda x, w, f=f: run(f, x, w)[::-1], (0, 1), has_aux=True))(x, w)
            for f in (c3t.lax.conv_transpose, jax.lax.conv_transpose)
        )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
    return bool(taken)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_the_kernel_of_a_lifted_call_on_few_cells_is_not_copied(dims) -> None:
    """The copies of the inputs, the products and their sums are all that is held: XLA drops what lifting and turning undo."""
    x, w = (jax.ShapeDtypeStruct(shape, "float32") for shape in ((1, *(2,) * dims, 128), (*(4,) * dims, 128, 512)))
    compiled = jax.jit(lambda x, w: c3t.lax.conv_transpose(x, w, (2,) * dims, "SAME")).lower(x, w).compile()
    copies_and_products = 4**dims * 2**dims * (128 + 512) * 4
    assert compiled.memory_analysis().temp_size_in_bytes < min(2 * copies_and_products, 4 * w.size)


# Blocks whose products are rows of the result.


@pytest.mark.parametrize(
    ("kernel", "strides", "dilation", "padding"),
    [
        (2, 2, 1, "valid"),
        ((1, 3, 2), (1, 3, 2), 1, "same"),
        ((1, 2, 2), (1, 2, 2), 1, "valid"),
        ((2, 2, 3), (4, 4, 3), (2, 2, 1), "valid"),  # places that no tap reaches
        ((2, 1, 3), (3, 2, 3), 1, "valid"),
        (2, 2, 1, ((0, 1), (0, 0), (0, 2))),
    ],
)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("with_bias", [False, True])
def test_blocks_that_write_rows_give_the_defined_result(
    kernel, strides, dilation, padding, groups, with_bias, monkeypatch, x64: None
) -> None:
    monkeypatch.setattr(_matmul_plans, "WHOLE_ROWS", 0)
    rng = np.random.default_rng(4)
    kwargs = {"strides": strides, "padding": padding, "dilation_rate": dilation}
    window = oracle.triple(kernel)
    x, w = rng.normal(size=(3, 4, 5, 3, 6)), rng.normal(size=(*window, 128 // groups, 6))
    b = rng.normal(size=128) if with_bias else None
    each = [padding] * 3 if isinstance(padding, str) else padding
    sizes = (oracle.triple(size) for size in (kernel, strides, dilation))
    geometry = tuple(
        resolve_axis(n, k, s, d, p, None) for n, k, s, d, p in zip(x.shape[1:4], *sizes, each, strict=True)
    )
    call = Call(geometry, 3, 6, 128, groups, 8, 1 << 14)
    assert _matmul_plans.in_blocks(call)
    static = {"groups": groups, "precision": None, "accumulate": jnp.float64, "tile_bytes": 1 << 14}
    got = quick_jit(lambda x, w, b: matmul.outputs(x, w, geometry, bias=b, **static))(x, w, b)
    want = oracle.conv3d_transpose(x, w, b, groups=groups, **kwargs)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


def test_a_plane_in_blocks_holds_a_block() -> None:
    """Neither the products of the whole plane nor a copy of the inputs, which a loop would have laid out anew."""
    x, w = jax.ShapeDtypeStruct((8, 64, 64, 128), "float32"), jax.ShapeDtypeStruct((2, 2, 128, 64), "float32")
    run = lambda x, w: c3t.lax.conv_transpose(x, w, (2, 2), "SAME")
    compiled = jax.jit(run).lower(x, w).compile()
    assert "while" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 64 * 64 * 128 * 4


@pytest.mark.parametrize("k", [4, 7])
def test_products_of_a_plane_are_laid_out_in_one_pass(k) -> None:
    """Nothing is held but the products: sums axis by axis would be as much again."""
    x, w = jax.ShapeDtypeStruct((8, 32, 32, 64), "float32"), jax.ShapeDtypeStruct((k, k, 64, 3), "float32")
    compiled = jax.jit(lambda x, w: c3t.lax.conv_transpose(x, w, (2, 2), "SAME")).lower(x, w).compile()
    products = 8 * 32 * 32 * k * k * 3 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 1.25 * products
