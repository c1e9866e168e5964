"""Walking a volume block by block changes nothing but the memory: values, gradients, temporaries."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import conv3dt_jax as c3t
from conv3dt_jax.lowerings import LOWERINGS, _blocks, _cells, _matmul_plans, _tiles
from tests import oracle
from tests.cases import CASES, Case
from tests.helpers import quick_jit

by_lowering = pytest.mark.parametrize("name", ["matmul", "phases"])


def specification(case: Case) -> c3t.Conv3DTransposeSpec:
    keywords = {name: value for name, value in case.kwargs.items() if name != "output_size"}
    return c3t.Conv3DTransposeSpec(filters=case.filters, kernel_size=case.kernel, **keywords)


# Blocks of one row each for every case; of a few rows, which are planned alike whatever the case, for some.
BLOCKS = [(name, {}, 1, case) for name in ("matmul", "phases") for case in CASES]
BLOCKS += [("phases", {"channels_first": True}, 1, case) for case in CASES[::3]]
BLOCKS += [(name, {}, 2000, case) for name in ("matmul", "phases") for case in CASES[1::6]]


@pytest.mark.thinned
@pytest.mark.parametrize(
    ("name", "layout", "tile_bytes", "case"), BLOCKS, ids=lambda value: getattr(value, "name", str(value))
)
@pytest.mark.usefixtures("quick_compiles")
def test_blocks_of_any_size_give_the_defined_result_and_gradients(
    name, layout: dict, case: Case, tile_bytes: int, x64: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_matmul_plans, "KEPT", 0)  # blocks, however much they repeat
    monkeypatch.setattr(_matmul_plans, "WHOLE", 0)
    x, w, _ = case.operands(np.float64)
    bias = np.random.default_rng(2).normal(size=w.shape[3] * case.kwargs.get("groups", 1))
    spec = specification(case)
    geometry = spec.geometry(x.shape[1:4], case.kwargs.get("output_size"))
    if 0 in x.shape or any(axis.is_empty for axis in geometry):
        pytest.skip("empty calls never reach a lowering")
    static = {"groups": spec.groups, "precision": None, "accumulate": x.dtype, "tile_bytes": tile_bytes}
    want = oracle.conv3d_transpose(x, w, **case.kwargs) + bias
    ct = np.random.default_rng(1).normal(size=want.shape)
    want_dx, want_dw = oracle.vjp(x, w, ct, **case.kwargs)
    lowering, static = LOWERINGS[name], {**static, **layout}
    y = quick_jit(lambda x, w: lowering.outputs(x, w, geometry, **static, bias=bias))(x, w)
    if layout:
        y, ct = np.moveaxis(y, 1, -1), np.moveaxis(ct, -1, 1)
    dx, dw = quick_jit(lambda x, w, y: lowering.gradients(x, w, y, geometry, x.shape[-1], **static))(x, w, ct)
    for got, expected in ((y, want), (dx, want_dx), (dw, want_dw)):
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("lengths", "cell", "room", "blocks"),
    [
        ((1, 1, 8, 8, 8), 4, 1 << 20, (1, 1, 8, 8)),  # all at once
        ((3, 1, 8, 8, 8), 4, 4 * 512, (1, 1, 8, 8)),  # a sample at a time
        ((3, 2, 8, 8, 8), 4, 4 * 128, (1, 1, 2, 8)),  # two planes
        ((3, 1, 8, 8, 8), 4, 4 * 16, (1, 1, 1, 2)),  # two rows
        ((3, 1, 8, 8, 8), 4, 1, (1, 1, 1, 1)),  # never less than a row
        ((1, 1, 7, 8, 8), 4, 4 * 64 * 5, (1, 1, 4, 8)),  # 4 + 4 overlap by one
    ],
)
def test_blocks_fill_from_the_innermost_axis(lengths, cell, room, blocks) -> None:
    assert tuple(span.block for span in _tiles.plan(lengths, cell, room)) == blocks


def test_windows_read_zeros_outside() -> None:
    array = jnp.arange(1.0, 7.0)
    span = _tiles.Span(6, 2)
    for start, want in ((0, [0, 0, 1, 2]), (2, [1, 2, 3, 4]), (4, [3, 4, 5, 6])):
        window = _tiles.Window.of(span, jnp.int32(start), offset=-2, extent=2)
        np.testing.assert_array_equal(jax.jit(lambda w=window: _tiles.read(_tiles.Held.of(array), [w]))(), want)
    static = _tiles.Window.of(_tiles.Span(6, 6), 0, offset=-1, extent=2)
    np.testing.assert_array_equal(_tiles.read(_tiles.Held.of(array), [static]), [0, 1, 2, 3, 4, 5, 6, 0])


@pytest.mark.parametrize(
    ("groups", "channels", "filters"), [(1, 3, 2), (4, 8, 4), (6, 6, 6), (2, 40, 40), (32, 32, 64)]
)
def test_kernels_of_merged_groups_come_apart_again(groups, channels, filters) -> None:
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 3, filters // groups, channels)))
    blocks = _blocks.split_kernel(kernel, groups)
    assert blocks.shape[0] == _blocks.count(groups, channels, filters)
    assert blocks.size * blocks.shape[0] == 6 * filters * channels
    np.testing.assert_array_equal(_blocks.join_kernel(blocks, groups, filters, channels), kernel)


@pytest.mark.thinned
@pytest.mark.parametrize("layout", [{}, {"channels_first": True}], ids=["channels_last", "channels_first"])
@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_last_blocks_that_stick_out_of_the_result_leave_the_others_alone(cut, rows, layout, x64: None) -> None:
    """Cells of 4 outputs of which the last misses some; blocks so small that a block misses more than it has."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(1, 5, 7, 3, 2)), rng.normal(size=(6, 6, 6, 2, 2))
    padding = [(1, 1 + cut)] * 3
    geometry = c3t.Conv3DTransposeSpec(2, 6, 4, padding=padding).geometry(x.shape[1:4])
    assert all(_cells.cells(axis) == axis.n and axis.out == 4 * axis.n - cut for axis in geometry)
    room = rows * 3 * 64 * 2 * x.itemsize
    static = {"groups": 1, "precision": None, "accumulate": x.dtype, "tile_bytes": room}
    y = jax.jit(lambda x, w: LOWERINGS["phases"].outputs(x, w, geometry, **static, **layout))(x, w)
    want = oracle.conv3d_transpose(x, w, strides=4, padding=padding)
    np.testing.assert_allclose(np.moveaxis(y, 1, -1) if layout else y, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("space", "loops"), [(4, 0), (16, 1)])
def test_matmul_walks_blocks_only_where_they_repeat_few_products(space: int, loops: int) -> None:
    """Blocks of 4^3 inputs under a kernel of 7 would make 700 times the products."""
    k, channels = (7, 128) if loops == 0 else (3, 32)
    x = jax.ShapeDtypeStruct((2, space, space, space, channels), "float32")
    w = jax.ShapeDtypeStruct((k, k, k, 64, channels), "float32")
    run = lambda x, w: c3t.conv3d_transpose(x, w, strides=2 if loops else 1, implementation="matmul")
    assert jax.jit(run).lower(x, w).as_text().count("stablehlo.while") == loops


SIZES = {
    "k2s2": ((1, 16, 16, 16, 32), 16, 2, 2),
    "k3s2": ((1, 24, 24, 24, 16), 16, 3, 2),
    "k3s1": ((1, 32, 32, 32, 16), 16, 3, 1),
    "k5s3": ((1, 12, 12, 12, 16), 16, 5, 3),
    "batch": ((16, 8, 8, 8, 16), 16, 3, 2),
}


@pytest.mark.thinned
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize(
    ("size", "padding"),
    [*itertools.product(SIZES, ["same", 1]), ("down_k2s2", "valid"), ("down_k3s2", "same"), ("down_k3s2", 1)],
)
def test_temporaries_stay_below_what_goes_in_and_comes_out(size: str, padding, data_format: str) -> None:
    """Whole-array patches would hold 4 to 27 times the inputs or the outputs.

    A strided convolution with the channels first copies its inputs, and their gradient, channels last.
    """
    operation, (shape, filters, k, s) = c3t.conv3d_transpose, SIZES.get(size.removeprefix("down_"), (None,) * 4)
    if size.startswith("down_"):
        operation, shape = c3t.conv3d, (1, 32, 32, 32, 16)
    x, w = jnp.ones(shape), jnp.ones((k, k, k, filters, shape[-1]))
    if data_format == "channels_first":
        x = jnp.moveaxis(x, -1, 1)
    run = lambda x, w: operation(x, w, strides=s, padding=padding, data_format=data_format)
    y = jax.eval_shape(run, x, w)
    copied = x.size if size.startswith("down_") and data_format == "channels_first" else 0
    held = 4 * (x.size + w.size + y.size)
    forward = jax.jit(run).lower(x, w).compile().memory_analysis().temp_size_in_bytes
    pull = lambda x, w, y: jax.vjp(run, x, w)[1](y)
    backward = jax.jit(pull).lower(x, w, y).compile().memory_analysis().temp_size_in_bytes
    assert forward <= held + 4 * copied
    assert backward <= held + 2 * 4 * copied


def test_a_training_step_for_one_filter_holds_less_than_goes_in_and_comes_out() -> None:
    """Its patches are held twice, tap by tap, beside the result."""
    x, w = (jax.ShapeDtypeStruct(shape, "float32") for shape in ((1, 64, 64, 32, 64), (3, 3, 3, 1, 64)))
    run = functools.partial(c3t.conv3d_transpose, strides=2, padding="same")
    y = jax.eval_shape(run, x, w)

    def step(x, w, ct):
        y, pull = jax.vjp(run, x, w)
        return y, pull(ct)

    held = jax.jit(step).lower(x, w, y).compile().memory_analysis().temp_size_in_bytes
    assert held <= 4 * (x.size + w.size + y.size)


@pytest.mark.parametrize(("name", "kernels"), [("phases", (3, 3)), ("winograd", (5, 17))])
@pytest.mark.parametrize("direction", ["forward", "training"])
def test_the_program_does_not_grow_with_the_volume_or_the_stride(direction: str, name, kernels) -> None:
    """But for one more loop over blocks, and one more run of phases."""

    def operations(space: int, k: int, s: int, channels: int = 32) -> int:
        x = jax.ShapeDtypeStruct((1, space, space, space, channels), "float32")
        w = jnp.ones((k, k, k, channels, channels))
        run = lambda x, w: c3t.conv3d_transpose(x, w, strides=s, padding="same", implementation=name).sum()
        step = run if direction == "forward" else jax.value_and_grad(run, (0, 1))
        return jax.jit(step).lower(x, w).as_text().count("stablehlo.")

    more = 300 if name == "winograd" else 40
    small, large = kernels
    for channels in (8, 32):
        assert operations(512, 3, 2, channels) <= operations(32, 3, 2, channels) + more
        assert operations(32, large, 16, channels) <= operations(32, small, 4, channels) + more
    assert operations(32, 5, 4) <= operations(32, 5, 3)


@by_lowering
def test_a_bias_is_added_as_blocks_are_written(name) -> None:
    """Not in a second pass, which would hold the result twice."""
    x, w, b = jnp.ones((1, 24, 24, 24, 16)), jnp.ones((2, 2, 2, 16, 16)), jnp.arange(16.0)
    run = functools.partial(c3t.conv3d_transpose, strides=(3, 2, 2), implementation=name)
    plain, biased = (
        jax.jit(run).lower(*operands).compile().memory_analysis().temp_size_in_bytes for operands in ((x, w), (x, w, b))
    )
    assert biased < plain + 24**3 * 12 * 16 * 4 / 2
    np.testing.assert_allclose(run(x, w, b), run(x, w) + b.reshape(1, 1, 1, 1, -1), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@by_lowering
def test_16_bit_volumes_of_many_blocks_have_gradients(name, dtype) -> None:
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((1, 16, 16, 16, 8), (3, 3, 3, 8, 8)))
    run = lambda x, w: c3t.conv3d_transpose(x, w, strides=2, implementation=name)
    y, pullback = jax.vjp(run, x, w)
    ct = jnp.asarray(rng.normal(size=y.shape), dtype)
    want_x, want_w = oracle.vjp(*(np.asarray(a, np.float64) for a in (x, w, ct)), strides=2)
    for got, want in zip(pullback(ct), (want_x, want_w), strict=True):
        assert got.dtype == dtype
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2**-8, atol=1e-4 * np.abs(want).max())


def test_the_kernel_gradient_of_bfloat16_multiplies_bfloat16() -> None:
    """XLA:CPU widens both operands where the left one is contracted along its rows."""
    x, w = jnp.ones((1, 16, 16, 16, 32), jnp.bfloat16), jnp.ones((3, 3, 3, 16, 32), jnp.bfloat16)

    @jax.jit
    def gradient(x: jax.Array, w: jax.Array, y: jax.Array) -> jax.Array:
        return jax.vjp(lambda w: c3t.conv3d_transpose(x, w, strides=2, padding="same"), w)[1](y)[0]

    y = jnp.ones((1, 32, 32, 32, 16), jnp.bfloat16)
    text = gradient.lower(x, w, y).compile().as_text()
    assert " dot(" in text
    assert not re.search(r"f32\[(\d+,)*432\]\S* convert\(", text)  # 27 taps of 16 filters: the patches
