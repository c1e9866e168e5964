"""`conv3d` under every JAX transformation, against float64 references that do not use that transformation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import conv3dt_jax as c3t
from tests import oracle
from tests.helpers import quick_jit
from tests.test_conv3d import arguments

pytestmark = pytest.mark.usefixtures("x64", "quick_compiles")

# With and without strides: the two ways in which it is computed.
CHOSEN = ["unstrided", "strided", "groups", "circular"]
by_call = pytest.mark.parametrize("call", CHOSEN)
COMBINED = [*(("auto", call) for call in CHOSEN), ("dilated", "strided"), ("dilated", "circular"), ("matmul", "groups")]
by_both = pytest.mark.parametrize(("implementation", "call"), COMBINED)
close = functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-11)


def prepared(call, implementation="auto"):
    """The operands, the function of them, and the same by the oracle."""
    operands, kwargs = arguments(call)
    run = functools.partial(c3t.conv3d, implementation=implementation, **kwargs)
    return operands, run, functools.partial(oracle.conv3d, **kwargs), functools.partial(oracle.conv3d_vjp, **kwargs)


def others(operands):
    rng = np.random.default_rng(1)
    return [rng.normal(size=operand.shape) for operand in operands]


@by_call
def test_eager_and_jit_agree(call) -> None:
    operands, run, reference, _ = prepared(call)
    close(jax.jit(run)(*operands), reference(*operands))
    with jax.disable_jit():
        close(run(*operands), reference(*operands))


@by_both
def test_jvp_is_the_product_rule(call, implementation) -> None:
    (x, w, b), run, reference, _ = prepared(call, implementation)
    dx, dw, db = others((x, w, b))
    for dx_, dw_ in ((dx, dw), (0 * dx, dw), (dx, 0 * dw)):
        _, dy = quick_jit(lambda *tangents: jax.jvp(run, (x, w, b), tangents))(dx_, dw_, db)
        close(dy, reference(dx_, w) + reference(x, dw_, db))


@by_both
def test_gradients_of_second_order(call, implementation) -> None:
    """Of ``|conv(x, w)|^2 / 2``: the Hessian applied to a direction, by the oracle's linear maps alone."""
    (x, w, _), run, reference, vjp = prepared(call, implementation)
    dx, dw, _ = others((x, w, x))
    gradients = jax.grad(lambda x, w: (run(x, w) ** 2).sum() / 2, (0, 1))
    got = quick_jit(lambda *tangents: jax.jvp(gradients, (x, w), tangents)[1])(dx, dw)
    y, dy = reference(x, w), reference(dx, w) + reference(x, dw)
    along_y = vjp(x, w, dy)
    # the derivative of vjp(x, w, y) in x and w, with y fixed
    moved = vjp(x, dw, y)[0], vjp(dx, w, y)[1]
    for mine, linear, bilinear in zip(got, along_y, moved, strict=True):
        close(mine, linear + bilinear, atol=1e-9)


def test_third_derivatives() -> None:
    """With one tap ``y = x * w``: d3 (y^3) / dx dx dw = 18 x w^2."""
    one = lambda value: value.reshape(1, 1, 1, 1, 1)
    for strides in (1, 2):
        f = lambda x, w, s=strides: c3t.conv3d(one(x), one(w), strides=s).sum() ** 3
        third = jax.jacfwd(jax.jacrev(jax.grad(f, 0), 0), 1)(jnp.float64(2.0), jnp.float64(3.0))
        close(third, 6 * 3 * 2.0 * 3.0**2)


@pytest.mark.thinned
@pytest.mark.parametrize("call", ["unstrided", "strided", "groups"])
@pytest.mark.parametrize("axes", [(0, None, None), (None, 0, None), (0, 0, 0), (None, None, 0)], ids=str)
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_vmap_of_values_and_gradients(call, axes, data_format) -> None:
    first = data_format == "channels_first"
    operands, run, reference, vjp = prepared(call)
    last = lambda y: jnp.moveaxis(y, 1, -1) if first else y
    layout = lambda x: np.moveaxis(x, -1, 1) if first else x

    def value_and_gradients(x, w, b):
        y, pullback = jax.vjp(lambda x, w, b: last(run(x, w, b, data_format=data_format)), x, w, b)
        gx, gw, gb = pullback(jnp.sin(y))
        return y, last(gx), gw, gb

    pairs = list(zip(operands, others(operands), strict=True))
    given = [np.stack(pair) if axis == 0 else pair[0] for pair, axis in zip(pairs, axes, strict=True)]
    given[0] = np.stack([layout(x) for x in given[0]]) if axes[0] == 0 else layout(given[0])
    found = quick_jit(jax.vmap(value_and_gradients, axes))(*given)
    for i in range(2):
        x, w, b = (pair[i] if axis == 0 else pair[0] for pair, axis in zip(pairs, axes, strict=True))
        y = reference(x, w, b)
        for got, want in zip(found, (y, *vjp(x, w, np.sin(y)), np.sin(y).sum((0, 1, 2, 3))), strict=True):
            close(got[i], want, rtol=1e-10, atol=1e-9)


@by_call
def test_checkpoint_scan_and_empty_batches(call) -> None:
    (x, w, b), run, reference, vjp = prepared(call)

    def loss(x, w):
        _, ys = lax.scan(lambda carry, x: (carry, jax.checkpoint(run)(x, w, b)), 0.0, x[:, None])
        return jnp.sin(ys).sum()

    gx, gw = quick_jit(jax.grad(loss, (0, 1)))(x, w)
    want_gx, want_gw = vjp(x, w, np.cos(reference(x, w, b)))
    close(gx, want_gx)
    close(gw, want_gw)
    empty = run(x[:0], w, b)
    assert empty.shape == (0, *reference(x, w).shape[1:])
    assert not jax.grad(lambda w: run(x[:0], w, b).sum())(w).any()


@by_both
def test_one_exported_module_serves_every_platform_and_batch(call, implementation) -> None:
    (x, w, b), run, reference, vjp = prepared(call, implementation)
    (n,) = export.symbolic_shape("n")
    shape = jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype)
    exported = export.export(jax.jit(run), platforms=["cpu", "cuda", "tpu"])(shape, w, b)
    loaded = export.deserialize(exported.serialize(vjp_order=1))
    for batch in (1, 2):
        close(loaded.call(x[:batch], w, b), reference(x[:batch], w, b))
    gx, gw = jax.grad(lambda x, w: loaded.call(x, w, b).sum(), (0, 1))(x, w)
    want_gx, want_gw = vjp(x, w, np.ones(reference(x, w).shape))
    close(gx, want_gx)
    close(gw, want_gw)


SYMBOLIC = [
    "unstrided", "strided", "strided_in_part", "patches", "gaps", "dilated", "dilated_and_strided", "groups", "circular",
]  # fmt: skip


@pytest.mark.thinned
@pytest.mark.parametrize("call", SYMBOLIC)
def test_export_with_symbolic_spatial_sizes(call) -> None:
    """The result and all gradients."""
    (x, w, b), run, reference, vjp = prepared(call)
    n, d, h, k = export.symbolic_shape("n, d, h, k", constraints=["d >= 4", "h >= 4", "k >= 4"])
    shape = jax.ShapeDtypeStruct((n, d, h, k, x.shape[-1]), x.dtype)

    def value_and_gradients(x, w, b):
        y, pullback = jax.vjp(run, x, w, b)
        return y, *pullback(jnp.sin(y))

    exported = export.export(jax.jit(value_and_gradients))(shape, w, b)
    for volume in (x, np.concatenate([x, x[:, :3]], 1)[:1], np.concatenate([x, x, x], 3)):
        y = reference(volume, w, b)
        for got, want in zip(exported.call(volume, w, b)[:3], (y, *vjp(volume, w, np.sin(y))), strict=True):
            close(got, want, atol=1e-9)


@pytest.mark.parametrize(("kernel", "strides"), [(2, 1), (3, 1), (3, 2), (2, 2), (5, 3)])
def test_gradients_of_circular_transposed_convolutions_with_symbolic_sizes(kernel, strides) -> None:
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(2, 3, 4, 5, 2)), rng.normal(size=(kernel,) * 3 + (2, 2))
    run = functools.partial(c3t.conv3d_transpose, strides=strides, padding="circular")
    n, d, h, k = export.symbolic_shape("n, d, h, k")
    shape = jax.ShapeDtypeStruct((n, d, h, k, 2), x.dtype)
    exported = export.export(jax.jit(jax.grad(lambda x, w: jnp.sin(run(x, w)).sum(), (0, 1))))(shape, w)
    y = oracle.conv3d_transpose(x, w, strides=strides, padding="circular")
    for got, want in zip(
        exported.call(x, w), oracle.vjp(x, w, np.cos(y), strides=strides, padding="circular"), strict=True
    ):
        close(got, want)


@by_call
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_sharding_over_the_batch(call, kind) -> None:
    """By `jax.shard_map`, and by the types of the arrays."""
    (x, w, b), run, reference, vjp = prepared(call)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(kind,))
    want_gw = vjp(x, w, np.ones(reference(x, w).shape))[1]
    if kind is AxisType.Auto:
        rows, all_of_it = PartitionSpec("data"), PartitionSpec()
        run = jax.shard_map(run, mesh=mesh, in_specs=(rows, all_of_it, all_of_it), out_specs=rows)
    else:
        x = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
        w, b = (jax.device_put(a, NamedSharding(mesh, PartitionSpec())) for a in (w, b))
    with jax.set_mesh(mesh):
        close(jax.jit(run)(x, w, b), reference(x, w, b))
        close(jax.jit(jax.grad(lambda w: run(x, w, b).sum()))(w), want_gw)


def test_a_spec_is_a_static_argument_that_does_not_recompile() -> None:
    traces = []

    @functools.partial(jax.jit, static_argnames="spec")
    def run(params, x, spec):
        traces.append(spec)
        return c3t.apply(params, x, spec)

    for strides, padding in ((2, "SAME"), ((2, 2, 2), "same"), ([2, 2, 2], "Same")):
        spec = c3t.Conv3DSpec(2, 3, strides=strides, padding=padding)
        run(c3t.init(jax.random.key(0), spec, 3), jnp.ones((1, 4, 4, 4, 3), jnp.float32), spec)
    assert len(traces) == 1
