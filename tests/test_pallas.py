"""The Pallas kernels, in the interpreter: values, gradients, rounding and transformations."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import conv3dt_jax as c3t
from conv3dt_jax.lowerings import _triton
from tests import oracle
from tests.cases import CASES, Case

pytestmark = pytest.mark.usefixtures("quick_compiles")

# Every way through the kernels: short and long channels, wide products, groups, one channel in each, cells of all sizes.
SHAPES = {
    "one_filter": Case("", (3, 4, 2), (3, 3, 3), 20, 1, kwargs={"strides": 2, "padding": "same"}),
    "one_channel": Case("", (3, 4, 2), (3, 3, 3), 1, 18, kwargs={"strides": 2, "padding": "same"}),
    "no_overlap": Case("", (3, 4, 2), (2, 2, 2), 17, 33, kwargs={"strides": 2}),
    "gaps": Case("", (3, 4, 2), (2, 1, 2), 5, 6, kwargs={"strides": 3}),
    "overlap": Case("", (3, 4, 2), (4, 4, 4), 33, 20, kwargs={"strides": 2, "padding": "same"}),
    "stride_one": Case("", (4, 5, 3), (3, 3, 3), 18, 18, kwargs={"padding": "same"}),
    "dilated": Case("", (4, 5, 3), (3, 2, 3), 18, 4, kwargs={"dilation_rate": 2, "strides": (1, 3, 2)}),
    "groups": Case("", (3, 4, 2), (3, 3, 3), 12, 24, kwargs={"strides": 2, "groups": 3}),
    "depthwise": Case("", (3, 4, 2), (3, 4, 3), 5, 5, kwargs={"strides": (2, 2, 1), "groups": 5, "padding": "same"}),
    "circular": Case("", (3, 4, 2), (3, 5, 4), 8, 24, kwargs={"strides": 2, "padding": "circular"}),
    "circular_depthwise": Case("", (3, 4, 2), (3, 3, 3), 4, 4, kwargs={"groups": 4, "padding": "circular"}),
}  # fmt: skip


def value_and_gradients(case: Case, dtype="float32", **options):
    """Computed by the kernels, and wanted: the result and the gradients of inputs and kernel."""
    x, w, b = case.operands(np.float64)
    rounded = [np.asarray(jnp.asarray(array, dtype), np.float64) for array in (x, w, b)]
    want = oracle.conv3d_transpose(*rounded, **case.kwargs)
    ct = np.asarray(jnp.asarray(np.random.default_rng(1).normal(size=want.shape), dtype), np.float64)
    gradients = oracle.vjp(rounded[0], rounded[1], ct, **case.kwargs)
    run = functools.partial(c3t.conv3d_transpose, implementation="pallas", **options, **case.kwargs)
    arrays = [jnp.asarray(array, dtype) for array in (*rounded, ct)]
    y, pullback = jax.vjp(run, *arrays[:3])
    return (y, *pullback(arrays[3])[:2]), (want, *gradients)


def errors(got, want):
    """The largest of each part, relative to the largest value; of a part that is zero, as it is."""
    found = []
    for a, e in zip(got, want, strict=True):
        largest = np.abs(e).max()
        found.append(np.abs(np.asarray(a, np.float64) - e).max() / (largest or 1))
    return found


@pytest.mark.thinned
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_value_and_gradients_are_those_of_the_definition(case: Case) -> None:
    assert max(errors(*value_and_gradients(case, precision="highest"))) < 1e-6


@pytest.mark.parametrize("name", SHAPES)
def test_every_way_through_the_kernels_gives_the_definition(name: str) -> None:
    assert max(errors(*value_and_gradients(SHAPES[name], precision="highest"))) < 1e-6


@pytest.mark.parametrize(
    ("dtype", "precision", "rounding"),
    [
        ("float32", None, 2e-5),  # the interpreter does not round to TF32; the kernel's gradient is made of halves
        ("float32", "high", 2e-5),
        ("float32", "highest", 5e-7),
        ("bfloat16", None, 2**-7),
        ("float16", None, 2**-10),
    ],
)
@pytest.mark.parametrize("name", ["overlap", "no_overlap"])
def test_each_precision_rounds_as_it_says(name: str, dtype: str, precision: str | None, rounding: float) -> None:
    assert max(errors(*value_and_gradients(SHAPES[name], dtype, precision=precision))) < rounding


def test_products_of_three_parts_round_no_more_than_those_of_float32() -> None:
    case = dataclasses.replace(SHAPES["overlap"], channels=128, filters=128, space=(4, 4, 4))
    x, w, _ = case.operands()
    want = oracle.conv3d_transpose(np.asarray(x, np.float64), np.asarray(w, np.float64), **case.kwargs)
    run = functools.partial(c3t.conv3d_transpose, precision="highest", **case.kwargs)
    kernels, plain = (np.abs(run(x, w, implementation=name) - want).max() for name in ("pallas", "matmul"))
    assert kernels < 2 * plain


def test_parts_of_what_is_not_finite_are_in_the_first_alone() -> None:
    values = jnp.asarray([1.2345678, -np.inf, np.nan, 0.0], jnp.float32)
    for taken in (_triton.parts, _triton.taken_apart):
        first, *rest = taken(values, 3)
        np.testing.assert_array_equal(np.isnan(first), [False, False, True, False])
        assert all(np.isfinite(np.asarray(part, np.float32)).all() for part in rest)
        total = sum(np.asarray(part, np.float64) for part in (first, *rest))
        assert abs(total[0] - np.float64(values[0])) < 2**-24


def test_operands_are_taken_apart_by_roundings_that_xla_keeps() -> None:
    """A conversion to bfloat16 and back it may leave out: all parts but the first would be zero."""
    text = jax.jit(lambda value: _triton.taken_apart(value, 3)).lower(jnp.ones(4)).as_text()
    assert text.count("stablehlo.reduce_precision") == 3


def test_all_transformations(x64: None) -> None:
    """In float32 though integers have 64 bits: indices keep to 32."""
    case = SHAPES["one_filter"]
    x, w, _ = (jnp.asarray(array, jnp.float32) for array in case.operands())
    run = functools.partial(c3t.conv3d_transpose, implementation="pallas", precision="highest", **case.kwargs)
    reference = functools.partial(c3t.conv3d_transpose, implementation="dilated", precision="highest", **case.kwargs)

    def transformed(function):
        energy = lambda x, w: (function(x, w) ** 2).sum()
        return (
            jax.jvp(energy, (x, w), (x, w))[1],
            jax.vmap(function, (0, None))(jnp.stack([x, 2 * x]), w),
            jax.grad(lambda x: jax.grad(energy)(x, w).sum())(x),
            jax.grad(lambda w: jax.checkpoint(energy)(x, w))(w),
            jax.lax.scan(lambda c, x: (c, function(x, w)), 0, jnp.stack([x, x]))[1],
            function(x[:0], w),
        )

    for got, want in zip(transformed(run), transformed(reference), strict=True):
        assert got.dtype == want.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5 * np.abs(want).max(initial=1))


def test_shard_map_with_its_checks() -> None:
    """Under which the result of a kernel must say over which axes of the mesh it varies."""
    case = SHAPES["overlap"]
    x, w, _ = case.operands()
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    call = functools.partial(c3t.conv3d_transpose, implementation="pallas", precision="highest", **case.kwargs)
    run = jax.shard_map(call, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    want = oracle.conv3d_transpose(np.asarray(x, np.float64), np.asarray(w, np.float64), **case.kwargs)
    _, want_gradient = oracle.vjp(np.asarray(x, np.float64), np.asarray(w, np.float64), want, **case.kwargs)
    gradient = jax.jit(jax.grad(lambda w: (run(x, w) ** 2).sum() / 2))(jnp.asarray(w))
    assert max(errors((jax.jit(run)(x, w), gradient), (want, want_gradient))) < 2e-6
