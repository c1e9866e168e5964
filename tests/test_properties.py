"""The whole argument space, drawn by hypothesis: every lowering, values and both gradients, or the right refusal."""

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import conv3dt_jax as c3t
from conv3dt_jax import _geometry
from tests import oracle
from tests.helpers import quick_jit
from tests.test_lowerings import IMPLEMENTATIONS

triples = st.tuples
SETTINGS = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def calls(draw, sizes=st.sampled_from([3, 2, 4, 1, 3, 2, 4, 5, 0])):
    """Shapes of the operands and keyword arguments, valid but for an output that may be empty."""
    space = draw(triples(sizes, sizes, sizes))
    window = draw(triples(*[st.integers(1, 4)] * 3))
    strides = draw(triples(*[st.integers(1, 4)] * 3))
    dilation = draw(triples(*[st.sampled_from([1, 1, 2, 3])] * 3))
    crop = st.integers(0, 5)
    explicit = crop | triples(crop, crop, crop) | triples(*[st.tuples(crop, crop)] * 3)
    padding = draw(st.sampled_from(["valid", "same", "circular"]) | explicit)
    output_padding = None
    if padding != "circular" and draw(st.booleans()):
        output_padding = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(strides, dilation, strict=True))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels, filters = draw(st.integers(1, 2)) * groups, draw(st.integers(1, 2)) * groups
    batch = draw(st.sampled_from([(), (2,), (1,), (2,), (1, 2), (3,), (0,), (2, 0)]))
    kwargs = {
        "strides": strides, "padding": padding, "output_padding": output_padding,
        "dilation_rate": dilation, "groups": groups,
    }  # fmt: skip
    return tuple(batch), space, (*window, filters // groups, channels), kwargs


def windows(space, kernel_shape, kwargs):
    problem = oracle.Problem(space, kernel_shape[:3], *(kwargs[key] for key in
        ("strides", "padding", "output_padding", "dilation_rate")))  # fmt: skip
    return problem.out


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@SETTINGS
@given(call=calls(), channels_first=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_value_and_gradients(implementation, call, channels_first, seed) -> None:
    batch, space, kernel_shape, kwargs = call
    out = windows(space, kernel_shape, kwargs)
    if any(o < 1 <= n for o, n in zip(out, space, strict=True)):
        with pytest.raises(ValueError, match="leaves no output along"):
            c3t.output_shape((*batch, *space, kernel_shape[-1]), kernel_shape, **kwargs)
        return
    rng = np.random.default_rng(seed)
    x, w = rng.normal(size=(*batch, *space, kernel_shape[-1])), rng.normal(size=kernel_shape)
    flat = x.reshape(int(np.prod(batch)), *x.shape[len(batch) :])
    want = oracle.conv3d_transpose(flat, w, **kwargs)
    ct = rng.normal(size=want.shape)
    want_gx, want_gw = oracle.vjp(flat, w, ct, **kwargs)

    def run(x, w, ct):
        options = {**kwargs, "implementation": implementation}
        options["data_format"] = "channels_first" if channels_first else "channels_last"
        y, pullback = jax.vjp(lambda x, w: c3t.conv3d_transpose(x, w, **options), x, w)
        return y, *pullback(ct)

    def layout(value):
        return np.moveaxis(value, -1, -4) if channels_first else value

    with jax.enable_x64(True):
        y, gx, gw = quick_jit(run)(layout(x), w, layout(ct.reshape(*batch, *ct.shape[1:])))
    last = (lambda value: np.moveaxis(np.asarray(value), -4, -1)) if channels_first else np.asarray
    np.testing.assert_allclose(last(y).reshape(want.shape), want, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(last(gx).reshape(flat.shape), want_gx, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(gw, want_gw, rtol=1e-10, atol=1e-10)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(call=calls())
def test_output_shape_is_that_of_the_definition(call) -> None:
    batch, space, kernel_shape, kwargs = call
    out = windows(space, kernel_shape, kwargs)
    assume(not any(o < 1 <= n for o, n in zip(out, space, strict=True)))
    shape = c3t.output_shape((*batch, *space, kernel_shape[-1]), kernel_shape, **kwargs)
    assert shape == (*batch, *out, kernel_shape[3] * kwargs["groups"])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(call=calls(sizes=st.integers(1, 5)), data=st.data())
def test_output_size_reaches_just_what_output_paddings_reach(call, data) -> None:
    """Any size in the range is had, with the window that some output padding (or None) places; no other is."""
    _, space, kernel_shape, kwargs = call
    axis = data.draw(st.integers(0, 2))
    n, k = space[axis], kernel_shape[axis]
    s, d = kwargs["strides"][axis], kwargs["dilation_rate"][axis]
    padding = kwargs["padding"] if isinstance(kwargs["padding"], str) else (1, 2)
    choices = [None] if padding == "circular" else [None, *range(max(s, d))]
    reached = {}
    for a in choices:
        lo, out = oracle.window(n, k, s, d, padding, a)
        reached.setdefault(out, set()).add(lo)
    assume(max(reached) >= 1)
    low, high = _geometry.reachable_sizes(n, k, s, d, padding, max(s, d))
    assert {size for size in reached if size >= 1} <= set(range(low, high + 1))
    assert low >= 1
    assert high == max(reached)
    for size in range(low, high + 1):
        assert size in reached
        chosen = _geometry.resolve_axis_to_size(n, k, s, d, padding, size)
        assert chosen.out == size
        assert chosen.lo in reached[size]
