"""Where the products of `matmul` come to lie: phases, put in order."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import conv3dt_jax as c3t
from conv3dt_jax._geometry import Axis
from conv3dt_jax.lowerings import _laid_out
from conv3dt_jax.lowerings._cells import cells
from tests.helpers import quick_jit


@st.composite
def axes(draw):
    """Of which an output belongs to a cell and a place in it."""
    strides = draw(st.lists(st.integers(1, 3), min_size=2, max_size=3))
    found = []
    for s in strides:
        k = draw(st.integers(1, 6))
        out = draw(st.integers(1, 9))
        found.append(Axis(draw(st.integers(1, 4)), k, s, 1, 0, out))
    return found


@settings(max_examples=60, deadline=None, derandomize=True)
@given(axes=axes(), rows=st.booleans(), data=st.data())
def test_phases_are_put_in_order(axes, rows, data) -> None:
    """Output ``o`` is at ``o // s`` of phase ``o % s``; a phase that no tap gives is zero; nothing else is lost."""
    rng = np.random.default_rng(0)
    trailing = (5, 2) if rows else (2,)
    shape = (2, *map(cells, axes), *trailing)
    places = list(itertools.product(*(range(axis.s) for axis in axes)))
    kept = data.draw(st.lists(st.sampled_from(places), min_size=1, unique=True))
    phases = {place: rng.normal(size=shape).astype(np.float32) for place in kept}
    got = _laid_out.interleaved({place: jnp.asarray(phase) for place, phase in phases.items()}, axes)
    want = np.zeros((2, *(axis.out for axis in axes), *trailing), np.float32)
    for output in itertools.product(*(range(axis.out) for axis in axes)):
        cell, place = zip(*(divmod(o, axis.s) for o, axis in zip(output, axes, strict=True)), strict=True)
        if place in phases:
            want[:, *output] = phases[place][:, *cell]
    np.testing.assert_array_equal(got, want)


@st.composite
def geometries(draw):
    """Three axes as a transposed convolution has them."""
    found = []
    for _ in range(3):
        n, k, s, d = (draw(st.integers(1, most)) for most in (3, 3, 3, 2))
        full = (n - 1) * s + (k - 1) * d + 1
        lo = draw(st.integers(0, full - 1))
        found.append(Axis(n, k, s, d, lo, draw(st.integers(1, full - lo + 1))))
    return tuple(found)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(geometry=geometries())
def test_one_pass_lays_out_what_axis_after_axis_does(geometry) -> None:
    check_laid_out(geometry)


@pytest.mark.parametrize(
    ("k", "s", "lo", "cut", "is_one"),
    [
        (7, 2, 2, 5, True), (7, 3, 3, 3, True), (12, 5, 1, 4, True), (12, 4, 4, 8, True), (13, 4, 4, 8, False),
    ],
)  # fmt: skip
def test_planes_of_many_taps_are_laid_out_in_one_pass(k, s, lo, cut, is_one) -> None:
    axis = Axis(3, k, s, 1, lo, 2 * s + k - cut)
    geometry = (Axis(1, 1, 1, 1, 0, 1), axis, axis)
    assert _laid_out.in_one_pass(geometry) == is_one
    check_laid_out(geometry)


def test_lines_are_laid_out_along_their_axis_and_volumes_of_many_taps_too() -> None:
    still, axis = Axis(1, 1, 1, 1, 0, 1), Axis(3, 4, 2, 1, 1, 6)
    assert not _laid_out.in_one_pass((still, still, axis))
    assert not _laid_out.in_one_pass((axis, axis, axis))
    assert not _laid_out.in_one_pass((Axis(3, 2, 2, 1, 0, 6), axis, axis))
    assert _laid_out.in_one_pass((Axis(3, 3, 2, 1, 1, 6),) * 3)
    for geometry in ((still, still, axis), (axis, axis, axis)):
        check_laid_out(geometry)


def check_laid_out(geometry) -> None:
    """Whole numbers, so that each sum is exact; both ways against a sum over places."""
    rng = np.random.default_rng(2)
    shape = (2, *(axis.n for axis in geometry), *(axis.k for axis in geometry), 2)
    taps = rng.integers(-9, 10, shape).astype(np.float32)
    want = np.zeros((2, *(axis.out for axis in geometry), 2), np.float32)
    for inputs in itertools.product(*(range(axis.n) for axis in geometry)):
        for window in itertools.product(*(range(axis.k) for axis in geometry)):
            place = [i * a.s + t * a.d - a.lo for i, t, a in zip(inputs, window, geometry, strict=True)]
            if all(0 <= p < axis.out for p, axis in zip(place, geometry, strict=True)):
                want[:, *place] += taps[:, *inputs, *window]
    for phase_by_phase in (False, True):
        lay_out = functools.partial(_laid_out.lay_out, geometry=geometry, phase_by_phase=phase_by_phase)
        np.testing.assert_array_equal(quick_jit(lay_out)(taps), want)
        got = quick_jit(functools.partial(lay_out, taps_first=True))(np.moveaxis(taps, (4, 5, 6), (0, 1, 2)))
        np.testing.assert_array_equal(got, want)


def test_rows_of_taps_are_for_results_that_begin_with_a_cell() -> None:
    still = Axis(1, 1, 1, 1, 0, 1)

    def in_rows(k, s, lo, out):
        return _laid_out._in_rows((still, Axis(8, k, s, 1, lo, out), Axis(8, k, s, 1, lo, out)))

    assert in_rows(3, 2, 0, 17)
    assert in_rows(3, 2, 0, 16)
    assert in_rows(4, 2, 0, 18)
    assert not in_rows(4, 2, 1, 16)
    assert not in_rows(5, 2, 0, 19)  # the phases are written apart
    assert not in_rows(3, 1, 0, 10)


PLANES = {
    "rows": (3, 2, "VALID"),
    "spread": (3, 2, [(1, 1), (1, 1)]),
    "side by side": (5, 2, "VALID"),
    "nine side by side": (4, 3, "VALID"),
}


@pytest.mark.parametrize(("size", "stride", "padding"), PLANES.values(), ids=PLANES)
def test_cells_that_stick_out_are_cut_from_a_plane(size, stride, padding) -> None:
    """Whole numbers, so that each sum is exact."""
    rng = np.random.default_rng(1)
    x, w = (rng.integers(-3, 4, shape).astype(np.float32) for shape in ((2, 7, 6, 8), (size, size, 8, 16)))
    got, want = (f(x, w, (stride, stride), padding) for f in (c3t.lax.conv_transpose, jax.lax.conv_transpose))
    assert any(size % stride for size in want.shape[1:3])
    np.testing.assert_array_equal(got, want)
