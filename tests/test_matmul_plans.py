"""Which way `matmul` makes its products: tap by tap, row by row, all at once or in blocks."""

import dataclasses
import functools
from unittest import mock

import jax
import pytest

import conv3dt_jax as c3t
from conv3dt_jax import _choice
from conv3dt_jax.lowerings import _matmul_plans
from conv3dt_jax.lowerings._origin import Origin
from conv3dt_jax.lowerings._work import Call
from tests.test_choice import form


def taps_call(batch=1, space=(1, 4, 4), kernel=(1, 4, 4), channels=1024, filters=512, groups=1, platform="cpu"):
    strides = tuple(min(k, 2) for k in kernel)
    described = dataclasses.replace(form(kernel, strides, channels, filters, space, "same"), groups=groups)
    return Call.of(described, batch, _choice.room_for(platform, described, batch))


def test_products_tap_by_tap_are_for_few_cells_and_kernels_with_their_filters_last() -> None:
    last = Origin(mirrored=True, filters_last=True)
    assert _matmul_plans.by_taps(taps_call(), last)
    assert _matmul_plans.by_taps(taps_call(25), last)
    assert not _matmul_plans.by_taps(taps_call(26), last)  # more inputs than four fifths of the filters
    small = functools.partial(taps_call, channels=1000, filters=128)  # 7.8 MiB
    assert _matmul_plans.by_taps(small(6), last)
    assert not _matmul_plans.by_taps(small(7), last)
    assert not _matmul_plans.by_taps(taps_call(), Origin(mirrored=True))
    assert not _matmul_plans.by_taps(taps_call(groups=2), last)
    assert not _matmul_plans.by_taps(taps_call(platform="cuda"), last)


def test_taps_of_a_kernel_out_of_the_cache_are_in_turn_up_to_where_long_products_begin() -> None:
    last = Origin(mirrored=True, filters_last=True)
    large = functools.partial(taps_call, filters=128)  # 8 MiB
    assert _matmul_plans.by_taps(large(7), last)
    assert _matmul_plans.by_taps(large(13), last)  # 208 rows
    assert not _matmul_plans.by_taps(large(14), last)
    assert not _matmul_plans.by_taps(large(7), Origin(mirrored=True))
    assert not _matmul_plans.by_taps(taps_call(7, filters=127), last)
    assert not _matmul_plans.by_taps(large(7, space=(4, 2, 2), kernel=(4, 2, 2)), last)  # a volume


def test_a_tap_is_multiplied_in_parts_of_four_mebibytes() -> None:
    parts = lambda channels, filters: _matmul_plans.parts_of_taps(taps_call(channels=channels, filters=filters))
    assert parts(1024, 127) == 0  # less than 8 MiB in all
    assert parts(1024, 128) == 1
    assert parts(1024, 1024) == 1
    assert parts(1024, 1025) == 2
    assert parts(1026, 2048) == 3
    assert parts(2048, 2049) == 8  # five parts are not whole
    assert parts(1031, 2048) == 1  # a prime


def test_products_tap_by_tap_are_not_for_one_thread_where_they_are_long() -> None:
    """Rows times channels times filters of each: too many for one thread, and too few for two."""
    last = Origin(mirrored=True, filters_last=True)
    plane = functools.partial(taps_call, 1, (1, 8, 8), channels=128)
    assert _matmul_plans.by_taps(plane(filters=183), last)
    assert not _matmul_plans.by_taps(plane(filters=184), last)
    assert not _matmul_plans.by_taps(plane(filters=732), last)
    assert _matmul_plans.by_taps(plane(filters=733), last)
    assert _matmul_plans.by_taps(taps_call(1, (1, 7, 9), channels=128, filters=256), last)  # 63 rows


@pytest.mark.parametrize(("padding", "in_blocks"), [("valid", True), ("same", False)])
def test_phases_that_are_written_apart_count_as_products_do(padding, in_blocks) -> None:
    """Where the last cells stick out of the result: 25 MiB of products and 16 MiB of phases, which are new pages."""
    described = form((1, 5, 5), (1, 4, 4), 128, 64, (1, 32, 32), padding)
    call = Call.of(described, 4, _choice.room_for("cpu", described, 4))
    assert _matmul_plans.held(call) == 25 << 20
    assert _matmul_plans.in_blocks(call) == in_blocks


def test_phases_apart_do_not_count_beside_a_kernel_out_of_the_cache() -> None:
    """24.5 MiB of products, and 15 of phases."""
    described = form((1, 4, 4), (1, 3, 3), 512, 512, (1, 28, 28), "valid")
    assert not _matmul_plans.in_blocks(Call.of(described, 1, _choice.room_for("cpu", described, 1)))
    smaller = form((1, 4, 4), (1, 3, 3), 255, 512, (1, 28, 28), "valid")
    assert _matmul_plans.in_blocks(Call.of(smaller, 1, _choice.room_for("cpu", smaller, 1)))


def test_one_tap_after_the_other_is_for_long_products_with_kernels_out_of_the_cache() -> None:
    last = Origin(mirrored=True, filters_last=True)
    line = functools.partial(taps_call, 1, (1, 1, 224), (1, 1, 16), channels=1024)
    assert _matmul_plans.one_by_one(line(filters=128), last)
    plane = functools.partial(taps_call, space=(1, 14, 16), kernel=(1, 4, 4), channels=1024, filters=128)  # 8 MiB
    assert _matmul_plans.one_by_one(plane(1), last)
    assert not _matmul_plans.one_by_one(plane(1, space=(1, 13, 17)), last)  # 221 rows
    assert not _matmul_plans.one_by_one(plane(1, filters=127), last)
    assert not _matmul_plans.one_by_one(plane(1), Origin(mirrored=True))
    assert not _matmul_plans.one_by_one(plane(1, groups=2, filters=256), last)
    assert not _matmul_plans.one_by_one(plane(1, platform="cuda"), last)
    assert not _matmul_plans.one_by_one(plane(1, kernel=(1, 7, 7)), last)  # 49 products to compile
    assert not _matmul_plans.one_by_one(plane(1, space=(2, 14, 16), kernel=(2, 4, 4)), last)
    assert not _matmul_plans.one_by_one(plane(1, kernel=(1, 2, 2), filters=2048), last)  # nothing overlaps


def test_in_a_volume_tap_by_tap_gives_way_to_rows_earlier_but_not_where_nothing_overlaps() -> None:
    last = Origin(mirrored=True, filters_last=True)
    volume = functools.partial(taps_call, space=(2, 4, 4), kernel=(4, 4, 4), filters=256)
    assert _matmul_plans.by_taps(volume(4), last)
    assert not _matmul_plans.by_taps(volume(5), last)
    assert _matmul_plans.by_taps(volume(1, channels=16), last)
    assert not _matmul_plans.by_taps(volume(2, channels=16), last)  # the kernel's copy stays in the cache
    assert _matmul_plans.by_taps(taps_call(5, space=(2, 4, 4), kernel=(2, 2, 2), filters=256), last)


def test_rows_of_a_plane_are_for_wide_ones_that_leave_out_products() -> None:
    plane = functools.partial(taps_call, 1, (1, 16, 16))
    assert _matmul_plans.by_rows(plane(filters=128))
    assert not _matmul_plans.by_rows(plane(filters=127))
    assert not _matmul_plans.by_rows(plane(filters=128, channels=127))
    assert not _matmul_plans.by_rows(plane(filters=512, kernel=(1, 3, 3)))
    everything = form((1, 4, 4), (1, 2, 2), 1024, 128, (1, 16, 16), "valid")
    assert not _matmul_plans.by_rows(Call.of(everything, 1, _choice.room_for("cpu", everything, 1)))


@pytest.mark.parametrize(
    ("channels", "filters", "expected"),
    [
        (256, 113, 4 << 20),  # the kernel is less than 1 MiB: blocks stay in the cache
        (256, 114, 4 * 4 * 9 * 256 * 114),
        (512, 256, 4 * 4 * 9 * 512 * 256),
        (1024, 512, 20 << 20),
    ],
)
def test_blocks_of_planes_and_lines_grow_with_the_kernel_that_each_reads(channels, filters, expected) -> None:
    call = taps_call(8, (1, 64, 64), (1, 3, 3), channels, filters)
    assert _matmul_plans.block_bytes(call) == expected


def test_blocks_are_as_large_as_that() -> None:
    """Of whole samples; and of rows of one, which are counted as they are traced."""
    span = _matmul_plans.samples(taps_call(64, (1, 8, 8), (1, 4, 4), 256, 128))  # half a MiB each
    assert (span.count, span.block) == (4, 16)
    assert _matmul_plans.by_samples(taps_call(4, (1, 28, 28), (1, 3, 3)))  # 13.8 MiB each
    assert not _matmul_plans.by_samples(taps_call(4, (1, 34, 34), (1, 3, 3)))  # 20.3
    x, w = jax.ShapeDtypeStruct((1, 64, 64, 1024), "float32"), jax.ShapeDtypeStruct((3, 3, 1024, 512), "float32")
    with mock.patch.object(_matmul_plans, "spans", wraps=_matmul_plans.spans) as asked:
        jax.jit(functools.partial(c3t.lax.conv_transpose, strides=(2, 2), padding="SAME")).lower(x, w)
    assert {call.args[-1] for call in asked.call_args_list} == {20 << 20}


def test_blocks_of_others_stay_in_the_cache() -> None:
    call = functools.partial(taps_call, 8, space=(1, 64, 64), kernel=(1, 3, 3))
    assert _matmul_plans.block_bytes(call()) == 20 << 20
    for other in (call(groups=2), call(kernel=(1, 2, 2)), call(space=(2, 64, 64), kernel=(3, 3, 3))):
        assert _matmul_plans.block_bytes(other) == 4 << 20
    elsewhere = call(platform="cuda")
    assert _matmul_plans.block_bytes(elsewhere) == elsewhere.tile_bytes


def test_rows_of_a_volume_are_in_blocks_beyond_twice_the_kernel() -> None:
    volume = functools.partial(taps_call, space=(4, 4, 4), kernel=(4, 4, 4), filters=256)
    assert not _matmul_plans.in_blocks(volume(16, channels=512))
    assert _matmul_plans.in_blocks(volume(17, channels=512))


@pytest.mark.parametrize(
    ("batch", "space", "kernel", "channels", "filters", "in_blocks"),
    [
        (2, (1, 64, 64), (1, 2, 2), 64, 96, False),
        (4, (1, 64, 64), (1, 2, 2), 128, 64, True),  # 16 MiB, and as much of result
        (4, (1, 48, 48), (1, 2, 2), 256, 128, False),  # 18 MiB, with a kernel that blocks would read again
        (4, (1, 64, 64), (1, 4, 4), 64, 32, True),
        (2, (1, 32, 32), (1, 3, 3), 1024, 512, False),  # twice the kernel, which blocks would read again
        (2, (1, 32, 32), (1, 3, 3), 1023, 512, True),
        (1, (1, 60, 60), (1, 3, 3), 512, 256, True),  # 31.6 MiB
        (1, (1, 1, 1000), (1, 1, 16), 1024, 512, False),
        (2, (16, 16, 16), (2, 2, 2), 64, 64, True),  # a volume
        (64, (1, 1, 16000), (1, 1, 8), 512, 8, False),  # 31 MiB, and blocks would copy eight times as much
        (64, (1, 1, 16000), (1, 1, 8), 511, 8, True),
        (8, (1, 32, 32), (1, 5, 5), 64, 32, True),  # six products in an output, of few channels
        (8, (1, 32, 32), (1, 5, 5), 128, 32, False),
    ],
)
def test_planes_and_lines_are_in_blocks_where_the_heap_keeps_no_products(
    batch, space, kernel, channels, filters, in_blocks
) -> None:
    assert _matmul_plans.in_blocks(taps_call(batch, space, kernel, channels, filters)) == in_blocks
