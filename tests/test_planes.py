"""`matmul` with the filters second: the kernel times the inputs, in planes and lines."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export

import conv3dt_jax as c3t
from conv3dt_jax import _choice
from conv3dt_jax.lowerings import _laid_out, _matmul_plans, _planes, _tiles, matmul
from conv3dt_jax.lowerings._work import Call
from tests import oracle
from tests.helpers import quick_jit
from tests.test_choice import form
from tests.test_kernel_rows import ORIGINS, axes_of, by_origin, calls

KERAS = ("NCHW", "HWIO", "NCHW"), True
EQUINOX = ("NCHW", "OIHW", "NCHW"), False


def by_planes(x, w, b, geometry, origin, spans, in_runs=False):
    """Of a kernel ``(kd, kh, kw, F, C)`` that was made as its origin says, in float64, with the filters last."""
    static = {"precision": None, "accumulate": jnp.float64, "result": jnp.float64, "origin": origin}
    with jax.enable_x64(True):
        run = quick_jit(lambda x, w, b: _planes.outputs(x, w, geometry, spans, bias=b, in_runs=in_runs, **static))
        return np.moveaxis(run(x, w, b), 1, -1)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    call=calls(),
    origin=st.sampled_from(ORIGINS),
    batch=st.integers(1, 4),
    blocks=st.tuples(st.integers(1, 4), st.integers(1, 5)),
    with_bias=st.booleans(),
)
def test_planes_are_as_defined_in_blocks_of_samples_and_filters(call, origin, batch, blocks, with_bias) -> None:
    geometry = axes_of(*call)
    if any(axis.out < 1 for axis in geometry):
        return
    space, window, strides, dilation, padding, more = call
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(batch, *space, 3)), rng.normal(size=(*window, 5, 3))
    b = rng.normal(size=5) if with_bias else None
    want = oracle.conv3d_transpose(
        x, w, b, strides=strides, padding=padding, dilation_rate=dilation, output_padding=more
    )  # fmt: skip
    spans = _tiles.Span(batch, min(blocks[0], batch)), _tiles.Span(5, blocks[1])
    np.testing.assert_allclose(by_planes(x, w, b, geometry, origin, spans), want, rtol=1e-12, atol=1e-12)


@by_origin
@pytest.mark.parametrize("space", [(1, 3, 5), (1, 9, 9)], ids=["planes brought together", "each sample's own"])
@pytest.mark.parametrize("strides", [(1, 2, 2), (1, 3, 4)], ids=str)
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_short_and_long_planes_of_several_samples_are_as_defined(space, strides, padding, origin) -> None:
    """Where phases are put in order as they are added up, and where each is written first; cells that stick out."""
    rng = np.random.default_rng(1)
    x, w = rng.normal(size=(3, *space, 4)), rng.normal(size=(1, 5, 5, 2, 4))
    geometry = axes_of(space, (1, 5, 5), strides, (1, 1, 1), padding, None)
    whole = _tiles.Span(3, 3), _tiles.Span(2, 2)
    want = oracle.conv3d_transpose(x, w, strides=strides, padding=padding)
    np.testing.assert_allclose(by_planes(x, w, None, geometry, origin, whole), want, rtol=1e-12, atol=1e-12)


@by_origin
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_lines_made_of_runs_of_taps_are_as_defined_in_blocks_of_samples_and_filters(data, origin) -> None:
    batch, n, k, s = (data.draw(st.integers(*bounds)) for bounds in ((1, 4), (1, 9), (2, 11), (1, 6)))
    padding, at = data.draw(st.sampled_from(["same", "valid"])), data.draw(st.integers(0, 2))
    space, window, strides = (tuple(size if axis == at else 1 for axis in range(3)) for size in (n, k, s))
    spans = _tiles.Span(batch, data.draw(st.integers(1, batch))), _tiles.Span(3, data.draw(st.integers(1, 3)))
    rng = np.random.default_rng(0)
    x, w, b = rng.normal(size=(batch, *space, 4)), rng.normal(size=(*window, 3, 4)), rng.normal(size=3)
    want = oracle.conv3d_transpose(x, w, b, strides=strides, padding=padding)
    geometry = axes_of(space, window, strides, (1, 1, 1), padding, None)
    found = by_planes(x, w, b, geometry, origin, spans, in_runs=True)
    np.testing.assert_allclose(found, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "bfloat16", "float16", "complex64"])
@pytest.mark.parametrize(
    ("space", "window", "strides", "filters"),
    [((1, 6, 7), (1, 4, 4), (1, 2, 2), 2), ((9, 1, 1), (4, 1, 1), (2, 1, 1), 2), ((9, 1, 1), (8, 1, 1), (4, 1, 1), 16)],
    ids=["plane", "line", "runs"],
)
def test_every_dtype_has_its_planes(space, window, strides, filters, dtype) -> None:
    rng = np.random.default_rng(2)
    x, w, b = (
        jnp.asarray(rng.integers(0, 5, shape), dtype) for shape in ((2, 3, *space), (*window, filters, 3), (filters,))
    )  # whole numbers, whose sums are exact
    call = functools.partial(c3t.conv3d_transpose, strides=strides, padding="same", data_format="channels_first")
    got = jax.jit(functools.partial(call, implementation="matmul"))(x, w, b)
    want = oracle.conv3d_transpose(
        np.moveaxis(np.asarray(x, complex), 1, -1), np.asarray(w, complex), np.asarray(b, complex), strides=strides,
        padding="same",
    )  # fmt: skip
    assert got.dtype == call(x, w, b).dtype
    np.testing.assert_array_equal(np.asarray(got, complex), np.moveaxis(want, -1, 1))


def described(batch=1, space=(1, 16, 16), channels=64, filters=32, kernel=(1, 4, 4), platform="cpu", **changes):
    strides = tuple(min(k, 2) for k in kernel)
    plane = form(kernel, strides, channels, filters, space, "same")
    plane = dataclasses.replace(plane, **{"channels_first": True} | changes)
    return Call.of(plane, batch, _choice.room_for(platform, plane, batch))


def test_planes_and_lines_with_the_filters_second_are_made_as_such_on_a_cpu() -> None:
    assert _matmul_plans.by_planes(described())
    assert _matmul_plans.by_planes(described(space=(1, 1, 100), kernel=(1, 1, 9)))
    assert not _matmul_plans.by_planes(described(channels_first=False))
    assert not _matmul_plans.by_planes(described(groups=2))
    assert not _matmul_plans.by_planes(described(batch=0))
    assert not _matmul_plans.by_planes(described(platform="cuda"))
    assert not _matmul_plans.by_planes(described(space=(4, 4, 4), kernel=(3, 3, 3)))
    assert not _matmul_plans.by_planes(described(channels=1, kernel=(1, 2, 2)))  # one multiplication for an output
    assert _matmul_plans.by_planes(described(channels=1))


def in_runs(stride=4, taps=5, space=(1, 1, 128), dilation=(1, 1, 1), filters=16, batch=2, channels=8):
    window, strides = (tuple(min(size, n) for n in space) for size in (taps, stride))
    geometry = axes_of(space, window, strides, dilation, "same", None)
    return _matmul_plans.in_runs(Call(geometry, batch, channels, filters, 1, 4, 1 << 18, channels_first=True))


def test_short_lines_with_long_strides_are_made_of_runs_of_taps() -> None:
    assert in_runs()
    assert in_runs(space=(128, 1, 1))
    assert in_runs(stride=8, taps=16, space=(1, 32, 1))
    assert not in_runs(stride=3)
    assert not in_runs(taps=4)  # nothing overlaps
    assert not in_runs(space=(1, 1, 129))
    assert not in_runs(filters=15)
    assert not in_runs(batch=1)
    assert in_runs(channels=256)
    assert not in_runs(channels=257)  # more values of the kernel than products
    assert not in_runs(space=(1, 8, 8))
    assert not in_runs(dilation=(1, 1, 2))
    assert in_runs(dilation=(2, 2, 1))


def chosen(kind="outputs", batch=8, space=(1, 32, 32), kernel=(1, 2, 2), **changes):
    strides = tuple(min(k, 2) for k in kernel)
    plane = dataclasses.replace(form(kernel, strides, 64, 32, space, "same"), **{"channels_first": True} | changes)
    return _choice.choose(kind, "cpu", plane, batch)


def test_planes_with_the_filters_second_cost_no_more_than_others() -> None:
    assert chosen() == chosen(kind="affine") == chosen(channels_first=False) == "matmul"
    assert chosen(space=(1, 1, 500), kernel=(1, 1, 2)) == "matmul"
    assert chosen(space=(8, 8, 8), kernel=(2, 2, 2)) == "phases"  # whose products are transposed


PLANES = functools.partial(
    c3t.conv3d_transpose, strides=(1, 2, 2), padding="same", data_format="channels_first", implementation="matmul"
)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_module_for_any_batch_has_planes_with_the_filters_second(batch) -> None:
    rng = np.random.default_rng(3)
    (size,) = export.symbolic_shape("batch")
    described = [jax.ShapeDtypeStruct(shape, "float32") for shape in ((size, 3, 1, 5, 6), (1, 4, 4, 2, 3))]
    x, w = (jnp.asarray(rng.normal(size=shape), "float32") for shape in ((batch, 3, 1, 5, 6), (1, 4, 4, 2, 3)))
    got = export.export(jax.jit(PLANES))(*described).call(x, w)
    assert got.shape == (batch, 2, 1, 10, 12)
    np.testing.assert_allclose(got, PLANES(x, w), rtol=1e-5, atol=1e-5)


def test_no_samples_have_no_planes() -> None:
    assert jax.jit(PLANES)(jnp.ones((0, 3, 1, 5, 6)), jnp.ones((1, 4, 4, 2, 3))).shape == (0, 2, 1, 10, 12)


def blocks(*arguments, **named):
    """Of samples and filters."""
    samples, filters = _matmul_plans.plane_spans(described(*arguments, **named))
    return samples.block, filters.block


def test_planes_have_blocks_where_their_products_leave_the_cache() -> None:
    assert blocks(26) == (26, 32)  # 13 MiB
    assert blocks(27) == (7, 32)  # 3.5 MiB, and the fewest twice
    assert blocks(27, channels=1024, filters=512, space=(1, 4, 4)) == (27, 512)  # a kernel of 32 MiB
    assert blocks(70, channels=1024, filters=512, space=(1, 4, 4)) == (35, 512)
    assert blocks(2, space=(1, 64, 64)) == (1, 32)  # 8 MiB each
    assert blocks(2, space=(1, 64, 72)) == (1, 16)
    assert blocks(2, space=(1, 64, 72), channels=577) == (1, 32)  # the kernel is the more that is read again
    assert blocks(1, space=(1, 64, 64), channels=1024, filters=512, kernel=(1, 3, 3)) == (1, 128)  # of 72 MiB
    assert blocks(1, space=(1, 256, 256), filters=8) == (1, 8)  # as much as the inputs twice
    assert blocks(1, space=(1, 256, 256), filters=12, channels=32) == (1, 4)


def put_in_order(strides, window=5, space=(1, 6, 6)):
    """Whether phases are written one after the other first, and then moved."""
    window, strides = (tuple(size if n > 1 else 1 for n in space) for size in (window, strides))
    geometry = axes_of(space, window, strides, (1, 1, 1), "same", None)
    taps = jax.ShapeDtypeStruct((*window, 2, *space), "float32")
    return " transpose[" in str(jax.make_jaxpr(lambda t: _laid_out.lay_out_planes(t, geometry, mirrored=False))(taps))


def test_phases_are_written_first_where_planes_overlap_in_strides_of_three_and_more() -> None:
    assert put_in_order(3)
    assert not put_in_order(2)
    assert not put_in_order(5)  # nothing overlaps
    assert not put_in_order(3, space=(6, 1, 1))


def test_the_temporaries_of_planes_are_those_of_a_block() -> None:
    assert matmul.work(described(26), gradients=0).temporary_bytes == 2 * 13 << 20
    assert matmul.work(described(27), gradients=0).temporary_bytes == 2 * 7 << 19
    assert matmul.work(described(2, space=(1, 64, 72)), gradients=0).temporary_bytes == 2 * (16 * 64 * 72 * 16 * 4)


def compiled(layout, inputs, kernel, strides=(2, 2)):
    """The text of the program, without the operations of products."""
    numbers, transposed = layout
    call = functools.partial(c3t.lax.conv_transpose, strides=strides, padding="SAME", dimension_numbers=numbers)
    operands = (jax.ShapeDtypeStruct(shape, "float32") for shape in (inputs, kernel))
    text = jax.jit(functools.partial(call, transpose_kernel=transposed)).lower(*operands).compile().as_text()
    return text.replace("copy_", "")


def moved(text) -> list[int]:
    """Sizes of what is copied, transposed or turned around."""
    found = re.findall(r"= \w+\[([\d,]+)\]\S* (?:copy|transpose|reverse)\(", text)
    return [int(np.prod([int(size) for size in shape.split(",")])) for shape in found]


def test_nothing_is_moved_for_a_sample_and_a_kernel_of_keras() -> None:
    assert moved(compiled(KERAS, (1, 64, 16, 16), (4, 4, 32, 64))) == []


def test_of_a_kernel_of_equinox_one_copy_is_made_and_nothing_is_turned_around() -> None:
    text = compiled(EQUINOX, (1, 64, 16, 16), (32, 64, 4, 4))
    assert set(moved(text)) == {32 * 64 * 16}
    assert " reverse(" not in text


def test_a_kernel_is_turned_around_rather_than_more_products() -> None:
    text = compiled((("NHWC", "OIHW", "NHWC"), False), (4, 16, 16, 64), (32, 64, 4, 4))
    assert 4 * 32 * 16 * 256 not in moved(text)


def test_of_several_samples_the_inputs_are_moved_and_not_the_result() -> None:
    assert set(moved(compiled(KERAS, (4, 64, 16, 16), (4, 4, 32, 64)))) <= {4 * 64 * 256, 4 * 32 * 1024}
    assert 4 * 32 * 16 * 256 not in moved(compiled(KERAS, (4, 64, 16, 16), (4, 4, 32, 64)))


@pytest.mark.parametrize(
    ("numbers", "transposed", "shape"),
    [
        (("NCH", "OIH", "NCH"), False, (16, 8, 9)),
        (("NCH", "HIO", "NCH"), True, (9, 16, 8)),
        (("NCH", "HIO", "NCH"), False, (9, 8, 16)),
    ],
    ids=["equinox", "keras", "jax"],
)
def test_runs_of_taps_give_what_jax_gives(numbers, transposed, shape, monkeypatch) -> None:
    rng = np.random.default_rng(4)
    x, w = (jnp.asarray(rng.normal(size=size), "float32") for size in ((3, 8, 20), shape))
    made = []
    in_runs = _planes._in_runs
    monkeypatch.setattr(_planes, "_in_runs", lambda *a, **more: made.append(1) or in_runs(*a, **more))
    ours, theirs = (
        jax.jit(lambda x, w, f=f: f(x, w, (4,), "SAME", dimension_numbers=numbers, transpose_kernel=transposed))(x, w)
        for f in (c3t.lax.conv_transpose, jax.lax.conv_transpose)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert made
