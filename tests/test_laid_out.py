"""Where the products of `matmul` come to lie: phases, put in order."""

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


PLANES = {"spread": (3, 2), "side by side": (5, 2), "nine side by side": (4, 3)}


@pytest.mark.parametrize(("size", "stride"), PLANES.values(), ids=PLANES)
def test_cells_that_stick_out_are_cut_from_a_plane(size, stride) -> None:
    """Whole numbers, so that each sum is exact."""
    rng = np.random.default_rng(1)
    x, w = (rng.integers(-3, 4, shape).astype(np.float32) for shape in ((2, 7, 6, 8), (size, size, 8, 16)))
    got, want = (f(x, w, (stride, stride), "VALID") for f in (c3t.lax.conv_transpose, jax.lax.conv_transpose))
    assert any(size % stride for size in want.shape[1:3])
    np.testing.assert_array_equal(got, want)
