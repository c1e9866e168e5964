"""Every lowering under every JAX transformation, against float64 references that do not use that transformation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.sharding import PartitionSpec

import conv3dt_jax as c3t
from tests import oracle
from tests.cases import CASES
from tests.helpers import quick_jit
from tests.test_lowerings import IMPLEMENTATIONS, by_implementation

pytestmark = pytest.mark.usefixtures("x64", "quick_compiles")

CHOSEN = [case for case in CASES if case.name in ("stride_below_kernel", "groups", "circular", "stride_equals_kernel")]
# "auto" has every case; the rules of the primitives are the same for a lowering that is named, which has two.
COMBINED = [("auto", case) for case in CHOSEN] + [
    (name, CHOSEN[(i + j) % 4]) for i, name in enumerate(IMPLEMENTATIONS) if name != "auto" for j in (0, 2)
]
by_both = pytest.mark.parametrize(
    ("implementation", "case"), COMBINED, ids=[f"{name}-{case.name}" for name, case in COMBINED]
)
close = functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-11)


def operands(case, seed=0):
    return tuple(map(jnp.asarray, case.operands(np.float64, seed)))


def convolve(implementation, case):
    return functools.partial(c3t.conv3d_transpose, implementation=implementation, **case.kwargs)


def reference(case, x, w, b=None):
    return oracle.conv3d_transpose(np.asarray(x), np.asarray(w), None if b is None else np.asarray(b), **case.kwargs)


@by_both
def test_jit_and_eager_agree(implementation, case) -> None:
    x, w, b = operands(case)
    close(jax.jit(convolve(implementation, case))(x, w, b), reference(case, x, w, b))
    with jax.disable_jit():
        close(convolve(implementation, case)(x, w, b), reference(case, x, w, b))


@by_both
def test_jvp_is_the_product_rule(implementation, case) -> None:
    (x, w, b), (dx, dw, db) = operands(case), operands(case, seed=1)
    y, dy = jax.jvp(convolve(implementation, case), (x, w, b), (dx, dw, db))
    close(y, reference(case, x, w, b))
    close(dy, reference(case, dx, w) + reference(case, x, dw, db))


@by_both
def test_grad_is_the_adjoint(implementation, case) -> None:
    x, w, b = operands(case)
    ct = np.random.default_rng(2).normal(size=reference(case, x, w).shape)
    loss = lambda x, w, b: (convolve(implementation, case)(x, w, b) * ct).sum()
    gx, gw, gb = jax.jit(jax.grad(loss, (0, 1, 2)))(x, w, b)
    want_gx, want_gw = oracle.vjp(x, w, ct, **case.kwargs)
    close(gx, want_gx)
    close(gw, want_gw)
    close(gb, ct.sum((0, 1, 2, 3)))


@by_both
def test_hessian_of_a_square_is_twice_its_gram_matrix(implementation, case) -> None:
    """For ``|A(w)|^2 / 2`` the Hessian in ``w`` is ``A^T A``, with A's columns from the oracle; mixed terms likewise."""
    x, w, _ = operands(case)
    x, w = x[:1, :2, :2, :2], w[:1, :2, :2]
    size = w.size
    columns = [reference(case, x, column.reshape(w.shape)).ravel() for column in np.eye(size)]
    loss = lambda w: (convolve(implementation, case)(x, w) ** 2).sum() / 2
    hessian = jax.jit(jax.hessian(loss))(w).reshape(size, size)
    close(hessian, np.stack(columns) @ np.stack(columns).T)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("linear_in", ["inputs", "kernel", "neither"])
def test_a_call_with_a_bias_transposes_in_what_it_is_linear_in(linear_in, data_format, x64: None) -> None:
    """`jax.linear_transpose` of the bias, alone or with the inputs or the kernel, is what `jax.vjp` gives."""
    rng = np.random.default_rng(0)
    x, w, b = rng.normal(size=(2, 3, 3, 3, 3)), rng.normal(size=(3, 2, 3, 3, 3)), rng.normal(size=3)
    fixed = {"inputs": ("kernel",), "kernel": ("inputs",), "neither": ("inputs", "kernel")}[linear_in]
    operands = {"inputs": x, "kernel": w, "bias": b}
    moving = {name: value for name, value in operands.items() if name not in fixed}
    run = lambda moving: c3t.conv3d_transpose(**(operands | moving), strides=2, data_format=data_format)
    y, pull = jax.vjp(run, moving)
    ct = rng.normal(size=y.shape)
    (got,), (want,) = jax.linear_transpose(run, moving)(ct), pull(ct)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-12, atol=1e-12), got, want)


@by_implementation
def test_third_derivatives(implementation) -> None:
    """``y = x * w`` with one tap: d3 (y^3) / dx dx dw = 18 x w^2 ... evaluated at a point."""
    f = lambda x, w: (
        c3t.conv3d_transpose(x.reshape(1, 1, 1, 1, 1), w.reshape(1, 1, 1, 1, 1), implementation=implementation).sum()
        ** 3
    )
    third = jax.jacfwd(jax.jacrev(jax.grad(f, 0), 0), 1)(jnp.float64(2.0), jnp.float64(3.0))
    close(third, 6 * 3 * 2.0 * 3.0**2)


@by_both
@pytest.mark.parametrize("mapped", ["inputs", "kernel", "both", "bias", "nested"])
def test_vmap(implementation, case, mapped) -> None:
    x, w, b = operands(case)
    x2, w2, b2 = operands(case, seed=1)
    xs, ws, bs = jnp.stack([x, x2]), jnp.stack([w, w2]), jnp.stack([b, b2])
    run = convolve(implementation, case)
    if mapped == "inputs":
        close(jax.vmap(run, (0, None, None))(xs, w, b), [reference(case, x, w, b), reference(case, x2, w, b)])
    elif mapped == "kernel":
        close(jax.vmap(run, (None, 0, None))(x, ws, b), [reference(case, x, w, b), reference(case, x, w2, b)])
    elif mapped == "both":
        close(jax.vmap(run)(xs, ws, bs), [reference(case, x, w, b), reference(case, x2, w2, b2)])
    elif mapped == "bias":
        close(jax.vmap(run, (None, None, 0), 1)(x, w, bs)[:, 1], reference(case, x, w, b2))
    else:
        table = jax.vmap(jax.vmap(run, (None, 0, None)), (0, None, None))(xs, ws, b)
        close(table[1, 0], reference(case, x2, w, b))


@by_both
def test_gradients_under_vmap_are_per_example_gradients(implementation, case) -> None:
    x, w, _ = operands(case)
    loss = lambda w, x: (convolve(implementation, case)(x, w) ** 2).sum()
    per_example = jax.vmap(jax.grad(loss), (None, 0))(w, x)
    for i in range(x.shape[0]):
        y = reference(case, x[i : i + 1], w)
        close(per_example[i], oracle.vjp(x[i : i + 1], w, 2 * y, **case.kwargs)[1])


@by_both
def test_checkpoint_keeps_values_and_gradients(implementation, case) -> None:
    x, w, b = operands(case)
    loss = lambda x, w: jnp.sin(jax.checkpoint(convolve(implementation, case))(x, w, b)).sum()
    y = reference(case, x, w, b)
    value, (gx, gw) = jax.jit(jax.value_and_grad(loss, (0, 1)))(x, w)
    close(value, np.sin(y).sum())
    want_gx, want_gw = oracle.vjp(x, w, np.cos(y), **case.kwargs)
    close(gx, want_gx)
    close(gw, want_gw)


@by_implementation
def test_scan_over_layers(implementation) -> None:
    """Three layers with stacked kernels in one `lax.scan`, differentiated."""
    rng = np.random.default_rng(0)
    x, kernels = jnp.asarray(rng.normal(size=(1, 3, 2, 4, 2))), jnp.asarray(rng.normal(size=(3, 3, 3, 3, 2, 2)))

    def loss(kernels):
        step = lambda h, k: (c3t.conv3d_transpose(h, k, padding="same", implementation=implementation), None)
        return lax.scan(step, x, kernels)[0].sum()

    hidden = [np.asarray(x)]
    for kernel in kernels:
        hidden.append(oracle.conv3d_transpose(hidden[-1], np.asarray(kernel), padding="same"))
    value, gradient = jax.jit(jax.value_and_grad(loss))(kernels)
    close(value, hidden[-1].sum(), rtol=1e-10)
    back = np.ones_like(hidden[-1])
    for i in (2, 1, 0):
        back, want = oracle.vjp(hidden[i], np.asarray(kernels[i]), back, padding="same")
        close(gradient[i], want, rtol=1e-9, atol=1e-9)


@by_both
def test_eval_shape_needs_no_values(implementation, case) -> None:
    x, w, b = (jax.ShapeDtypeStruct(value.shape, value.dtype) for value in operands(case))
    out = jax.eval_shape(convolve(implementation, case), x, w, b)
    assert (out.shape, out.dtype) == (c3t.output_shape(x.shape, w.shape, **case.kwargs), x.dtype)


@by_both
def test_one_exported_module_serves_cpu_gpu_and_tpu(implementation, case) -> None:
    x, w, b = operands(case)
    exported = export.export(jax.jit(convolve(implementation, case)), platforms=["cpu", "cuda", "tpu"])(x, w, b)
    loaded = export.deserialize(exported.serialize(vjp_order=1))
    assert set(loaded.platforms) == {"cpu", "cuda", "tpu"}
    close(loaded.call(x, w, b), reference(case, x, w, b))
    gx, gw = jax.grad(lambda x, w: loaded.call(x, w, b).sum(), (0, 1))(x, w)
    want_gx, want_gw = oracle.vjp(x, w, np.ones_like(reference(case, x, w)), **case.kwargs)
    close(gx, want_gx)
    close(gw, want_gw)


@by_both
def test_export_with_a_symbolic_batch(implementation, case) -> None:
    x, w, b = operands(case)
    (n,) = export.symbolic_shape("n")
    spec = jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype)
    exported = export.export(jax.jit(convolve(implementation, case)))(spec, w, b)
    for batch in (1, 2):
        close(exported.call(x[:batch], w, b), reference(case, x[:batch], w, b))


SYMBOLIC = [
    case
    for case in CASES
    if case.kwargs.get("padding") != "circular" and case.name.startswith(("str", "same", "dilation"))
]


@pytest.mark.thinned
@pytest.mark.parametrize("case", SYMBOLIC, ids=lambda case: case.name)
@pytest.mark.parametrize("implementation", ["auto", "dilated", "matmul"])
def test_export_with_symbolic_spatial_sizes(implementation, case) -> None:
    x, w, b = operands(case)
    n, d, h, k = export.symbolic_shape("n, d, h, k")
    spec = jax.ShapeDtypeStruct((n, d, h, k, x.shape[-1]), x.dtype)
    exported = export.export(jax.jit(convolve(implementation, case)))(spec, w, b)
    for volume in (x, x[:1, :, ::2], jnp.concatenate([x, x, x], 3)):
        close(exported.call(volume, w, b), reference(case, volume, w, b))


def test_symbolic_output_size_follows_the_skip_connection() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(1, 3, 3, 3, 2)), rng.normal(size=(2, 2, 2, 2, 2))
    (n,) = export.symbolic_shape("n")
    run = lambda x, skip: c3t.conv3d_transpose(x, w, strides=2, output_size=skip.shape[1:4])
    specs = [jax.ShapeDtypeStruct((1, size, size, size, 2), np.float64) for size in (n, 2 * n + 1)]
    exported = export.export(jax.jit(run))(*specs)
    want = oracle.conv3d_transpose(x, w, strides=2, output_padding=1)
    close(exported.call(x, np.zeros((1, 7, 7, 7, 2))), want)


def test_phases_says_that_it_cannot_take_symbolic_sizes() -> None:
    (n,) = export.symbolic_shape("n")
    run = jax.jit(lambda x: c3t.conv3d_transpose(x, jnp.ones((3, 3, 3, 1, 1)), implementation="phases"))
    with pytest.raises(NotImplementedError, match="known when it is traced"):
        export.export(run)(jax.ShapeDtypeStruct((1, n, n, n, 1), np.float64))


@by_both
def test_shard_map_over_the_batch(implementation, case) -> None:
    x, w, b = operands(case)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    run = jax.shard_map(
        convolve(implementation, case), mesh=mesh, in_specs=(PartitionSpec("data"), PartitionSpec(), PartitionSpec()),
        out_specs=PartitionSpec("data"),
    )  # fmt: skip
    close(jax.jit(run)(x, w, b), reference(case, x, w, b))
    gradient = jax.jit(jax.grad(lambda w: run(x, w, b).sum()))(w)
    close(gradient, oracle.vjp(x, w, np.ones_like(reference(case, x, w)), **case.kwargs)[1])


def test_spec_is_a_static_argument_that_does_not_recompile() -> None:
    traces = []

    @functools.partial(jax.jit, static_argnames="spec")
    def run(params, x, spec):
        traces.append(spec)
        return c3t.apply(params, x, spec)

    for strides, padding in ((2, "SAME"), ((2, 2, 2), "same"), ([2, 2, 2], "Same")):
        spec = c3t.Conv3DTransposeSpec(2, 3, strides=strides, padding=padding)
        params = c3t.init(jax.random.key(0), spec, 3)
        run(params, jnp.ones((1, 2, 2, 2, 3), jnp.float32), spec)
    assert len(traces) == 1


@pytest.mark.thinned
@pytest.mark.parametrize("case", CHOSEN[:2], ids=lambda case: case.name)
@pytest.mark.parametrize("implementation", ["auto", "phases"])  # the outputs of the others are transposed whole
@pytest.mark.parametrize("mapped", ["inputs", "kernel", "both", "bias", "nothing"])
def test_channels_first_is_channels_last_moved_under_every_derivative_and_map(implementation, case, mapped) -> None:
    """Lowerings write outputs, and read cotangents, with the filters second themselves."""
    x, w, b = operands(case)
    moved = operands(case, seed=1)
    axes = {"inputs": (0, None, None), "kernel": (None, 0, None), "both": (0, 0, None), "bias": (None, None, 0)}
    last = convolve(implementation, case)

    def first(x, w, b):
        y = convolve(implementation, case)(jnp.moveaxis(x, -1, 1), w, b, data_format="channels_first")
        return jnp.moveaxis(y, 1, -1)

    def everything(run):
        def values(x, w, b):
            y, dy = jax.jvp(run, (x, w, b), moved)
            gradients = jax.grad(lambda *operands: (run(*operands) ** 3).sum(), (0, 1, 2))
            return y, dy, jax.jvp(gradients, (x, w, b), moved)

        return quick_jit(values if mapped == "nothing" else jax.vmap(values, axes[mapped]))

    stacked = [jnp.stack(pair) for pair in zip((x, w, b), moved, strict=True)]
    called = (x, w, b)
    if mapped != "nothing":
        called = tuple(
            many if axis == 0 else one for one, many, axis in zip((x, w, b), stacked, axes[mapped], strict=True)
        )
    for got, want in zip(*(jax.tree.leaves(everything(run)(*called)) for run in (first, last)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9 * np.abs(want).max())


@pytest.mark.parametrize("in_axes", [(0, None), (None, 0), (0, 0)])
def test_a_mapped_axis_without_elements_gives_none(in_axes) -> None:
    sizes = [(0,) if axis == 0 else () for axis in in_axes]
    x, w = (jnp.ones((*size, *shape)) for size, shape in zip(sizes, ((1, 4, 3, 2, 4), (2, 3, 2, 5, 4)), strict=True))
    run = jax.vmap(lambda x, w: c3t.conv3d_transpose(x, w, strides=2), in_axes)
    assert run(x, w).shape == (0, 1, 8, 7, 4, 5)
    gradients = jax.jit(jax.grad(lambda x, w: run(x, w).sum(), (0, 1)))(x, w)
    for gradient, operand in zip(gradients, (x, w), strict=True):
        np.testing.assert_array_equal(gradient, jnp.zeros_like(operand))
    assert jax.jvp(run, (x, w), (x, w))[1].shape == (0, 1, 8, 7, 4, 5)
