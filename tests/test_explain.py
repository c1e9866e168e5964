"""`explain` tells the truth: against what is lowered, and against XLA's own analyses."""

import math
import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

import conv3dt_jax as c3t
from benchmarks import planning

ROOT = pathlib.Path(__file__).parents[1]

FLOPS_FACTOR, BYTES_FACTOR = 2.0, 3.5
"""XLA also counts additions that lay out the products; it shares buffers as it can, and copies where it must."""

# (batch, channels, filters, space, kernel, strides, groups); each small enough to be one block, whose loop XLA's
# analysis would count once however often it runs.
CALLS = {
    "no_overlap": (1, 8, 8, 8, 2, 2, 1), "overlap": (1, 16, 16, 4, 3, 2, 1), "stride_one": (1, 8, 16, 6, 3, 1, 1),
    "one_filter": (1, 32, 1, 4, 3, 2, 1), "uneven": (1, 8, 8, 5, 5, 3, 1), "groups": (1, 16, 16, 4, 3, 2, 2),
    "batch": (4, 8, 8, 4, 4, 2, 1),
}  # fmt: skip


def _reached(space: int, k: int, s: int, output: int, tap: int) -> bool:
    """Whether an input meets this tap at an output of "same" padding."""
    place, rest = divmod(output + max(k - s, 0) // 2 - tap, s)
    return rest == 0 and 0 <= place < space


@pytest.mark.thinned
@pytest.mark.parametrize("implementation", ["auto", "matmul", "phases"])
@pytest.mark.parametrize("name", CALLS)
def test_work_is_what_xla_counts(name: str, implementation: str, capsys) -> None:
    batch, channels, filters, space, k, s, groups = CALLS[name]
    spec = c3t.Conv3DTransposeSpec(
        filters, k, s, padding="same", groups=groups, use_bias=False, implementation=implementation
    )
    shape = (batch, space, space, space, channels)
    explained = c3t.explain(shape, spec, platforms=["cpu"])
    x, w = jnp.ones(shape), jnp.ones(spec.kernel_shape(channels))
    compiled = jax.jit(lambda x, w: c3t.apply({"kernel": w}, x, spec)).lower(x, w).compile()
    plan = explained.forward["cpu"]
    assert 1 / FLOPS_FACTOR < compiled.cost_analysis()["flops"] / (2 * plan.multiply_adds) < FLOPS_FACTOR
    measured = compiled.memory_analysis().temp_size_in_bytes
    assert 1 / BYTES_FACTOR < measured / plan.temporary_bytes < BYTES_FACTOR
    reached = (sum(_reached(space, k, s, o, t) for o in range(space * s) for t in range(k)) for _ in range(3))
    assert plan.multiply_adds >= batch * math.prod(reached) * channels * filters // groups
    assert explained.output_shape == compiled.out_info.shape
    assert capsys.readouterr().out == f"{explained}\n"


@pytest.mark.parametrize(
    ("space", "kernel", "strides", "filters"),
    [((16, 16, 8), 3, 2, 1), ((1, 28, 28), (1, 4, 4), (1, 2, 2), 32), ((8, 8, 8), 2, 2, 4)],
)
def test_products_that_are_laid_out_in_one_pass_are_all_that_is_held(space, kernel, strides, filters) -> None:
    """Said to a fifth: no copy of them, and no sums beside the result."""
    spec = c3t.Conv3DTransposeSpec(filters, kernel, strides, padding="same", use_bias=False, implementation="matmul")
    plan = c3t.explain((1, *space, 16), spec, platforms=["cpu"]).forward["cpu"]
    x, w = (jax.ShapeDtypeStruct(shape, "float32") for shape in ((1, *space, 16), spec.kernel_shape(16)))
    compiled = jax.jit(lambda x, w: c3t.apply({"kernel": w}, x, spec)).lower(x, w).compile()
    assert plan.temporary_bytes == math.prod(space) * math.prod(spec.kernel_size) * filters * 4
    assert plan.temporary_bytes <= compiled.memory_analysis().temp_size_in_bytes < 1.2 * plan.temporary_bytes


def test_the_numbers_of_the_definition() -> None:
    spec = c3t.Conv3DTransposeSpec(filters=6, kernel_size=(1, 2, 3), strides=2, groups=2)
    explained = c3t.explain((2, 3, 4, 5, 8), spec, dtype="bfloat16")
    assert explained.multiply_adds == 2 * 3 * 4 * 5 * 1 * 2 * 3 * 8 * 6 // 2
    assert explained.kernel_shape == (1, 2, 3, 3, 8)
    assert explained.output_shape == (2, *c3t.output_shape((2, 3, 4, 5, 8), (1, 2, 3, 3, 8), strides=2, groups=2)[1:])
    assert explained.input_bytes == 2 * math.prod(explained.input_shape)
    assert explained.kernel_bytes == 2 * math.prod(explained.kernel_shape)
    assert explained.output_bytes == 2 * math.prod(explained.output_shape)
    assert list(explained.forward) == list(explained.gradients) == ["cpu", "cuda", "hopper", "tpu"]


@pytest.mark.parametrize(
    ("kernel", "strides", "dtype", "want"),
    [
        (2, 2, "float32", {"cpu": "matmul", "cuda": "matmul", "hopper": "pallas", "tpu": "matmul"}),
        (3, 2, "float32", {"cpu": "phases", "cuda": "phases", "hopper": "pallas", "tpu": "dilated"}),
        (3, 2, "int32", {"cpu": "phases", "cuda": "phases", "hopper": "phases", "tpu": "phases"}),
    ],
)
def test_every_platform_has_its_lowering_and_a_reason(kernel, strides, dtype, want) -> None:
    spec = c3t.Conv3DTransposeSpec(8, kernel, strides, padding="same")
    explained = c3t.explain((1, 8, 8, 8, 8), spec, dtype=dtype)
    assert {platform: plan.lowering for platform, plan in explained.forward.items()} == want
    assert all(plan.reason for plan in (*explained.forward.values(), *explained.gradients.values()))


def test_a_named_lowering_and_an_empty_batch_are_said_to_be_so() -> None:
    spec = c3t.Conv3DTransposeSpec(8, 3, 2, implementation="dilated")
    plan = c3t.explain((1, 4, 4, 4, 8), spec).forward["cpu"]
    assert (plan.lowering, plan.reason) == ("dilated", "named by `implementation`")
    assert c3t.explain((0, 4, 4, 4, 8), spec).forward["cpu"].multiply_adds == 0


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "message"),
    [
        (((1, 4, 4, 4, 8), "spec"), {}, TypeError, "`spec` must be a Conv3DTransposeSpec"),
        (((1, 4, 4, 4, 8), c3t.Conv3DTransposeSpec(8, 3)), {"platforms": ["gpu"]}, ValueError, "platforms"),
        (((4, 4), c3t.Conv3DTransposeSpec(8, 3)), {}, ValueError, "rank"),
        (((1, 4, 4, 4, 7), c3t.Conv3DTransposeSpec(8, 3, groups=2)), {}, ValueError, "groups"),
    ],
)
def test_bad_arguments_are_named(arguments, keywords, error, message) -> None:
    with pytest.raises(error, match=message):
        c3t.explain(*arguments, **keywords)


@pytest.mark.parametrize(
    ("strides", "forward", "gradients"),
    [(1, "phases", "phases"), (2, "phases", "phases"), ((1, 2, 2), "phases", "phases")],
)
def test_a_convolution_is_explained_as_it_is_lowered(strides, forward, gradients) -> None:
    """The counts are those of the definition; with strides its gradients are two primitives, each with its lowering."""
    spec = c3t.Conv3DSpec(6, (1, 2, 3), strides=strides, padding="same", groups=2, use_bias=False)
    shape = (2, 3, 4, 6, 8)
    explained = c3t.explain(shape, spec)
    out = spec.output_shape(shape)
    assert (explained.output_shape, explained.kernel_shape) == (out, (1, 2, 3, 4, 6))
    assert explained.multiply_adds == math.prod(out[:-1]) * math.prod(explained.kernel_shape)
    assert (explained.forward["cpu"].lowering, explained.gradients["cpu"].lowering) == (forward, gradients)
    assert (explained.forward["tpu"].lowering, explained.gradients["tpu"].lowering) == ("dilated", "dilated")
    assert explained.gradients["cpu"].multiply_adds >= 2 * explained.multiply_adds
    compiled = jax.jit(lambda x, w: c3t.apply({"kernel": w}, x, spec)).lower(jnp.ones(shape), jnp.ones((1, 2, 3, 4, 6)))
    assert compiled.compile().cost_analysis()["flops"] < 2 * FLOPS_FACTOR * explained.forward["cpu"].multiply_adds


def test_gradients_by_two_lowerings_are_named_both() -> None:
    spec = c3t.Conv3DSpec(64, 3, strides=2, padding="same")
    plan = c3t.explain((1, 32, 32, 32, 1), spec, platforms=["cpu"]).gradients["cpu"]
    assert plan.lowering == "matmul and phases"
    assert plan.reason.count("; ") == 1


def test_the_table_of_meshes_is_what_is_computed() -> None:
    assert (ROOT / "benchmarks/results/planning.md").read_text() == planning.report()
    shown = [line for line in planning.report().splitlines() if "^3 |" in line]
    readme = (ROOT / "README.md").read_text()
    assert len(shown) == 20
    assert sum(line in readme for line in shown) >= 8


@pytest.mark.parametrize(("mesh", "axes"), [(AbstractMesh((2,), ("x",)), None), (None, {"depth": "x"})])
def test_a_mesh_and_its_axes_belong_together(mesh, axes) -> None:
    with pytest.raises(ValueError, match=r"`mesh\w*` is given without `mesh\w*`"):
        c3t.explain((1, 8, 8, 8, 2), c3t.Conv3DTransposeSpec(2, 3), mesh=mesh, mesh_axes=axes)


@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("kind", [c3t.Conv3DSpec, c3t.Conv3DTransposeSpec])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize(("groups", "cut"), [(4, "groups"), (1, "channels"), (1, "filters")])
def test_the_shapes_of_a_device_are_those_of_the_declared_shardings(kind, strides, data_format, groups, cut) -> None:
    spec = kind(8, 3, strides, "same", groups=groups, data_format=data_format)
    mesh, shape = AbstractMesh((2, 2), ("g", "z")), spec.join_shape((2,), (4, 8, 6), 12)
    axes = {cut: "g", "height": "z"}
    plan = c3t.explain(shape, spec, platforms=["cpu"], mesh=mesh, mesh_axes=axes).mesh
    run = c3t.sharded(mesh, spec, **axes)
    wanted = {"inputs": shape, "kernel": spec.kernel_shape(12), "outputs": spec.output_shape(shape)}
    found = {"inputs": plan.input_shape, "kernel": plan.kernel_shape, "outputs": plan.output_shape}
    assert found == {name: run.sharding(name).shard_shape(size) for name, size in wanted.items()}


def test_halos_of_a_mesh_by_hand(capsys) -> None:
    spec = c3t.Conv3DTransposeSpec(2, 4, 2, padding=1)
    mesh, axes = AbstractMesh((2, 4, 2), ("n", "z", "m")), {"batch": "n", "depth": "z", "channels": "m"}
    plan = c3t.explain((4, 16, 6, 6, 8), spec, platforms=["cpu"], mesh=mesh, mesh_axes=axes).mesh
    assert (plan.input_shape, plan.kernel_shape, plan.output_shape) == (
        (2, 4, 6, 6, 4),
        (4, 4, 4, 2, 4),
        (2, 8, 12, 12, 2),
    )
    halo, outputs, ct = 2 * 6 * 6 * 4 * 4, 2 * 8 * 12 * 12 * 2 * 4, 2 * 12 * 12 * 2 * 4
    assert [(e.kind, e.what, e.axes, e.distance, e.bytes) for e in plan.result_exchanges] == [
        ("collective-permute", "depth", ("z",), -1, halo),
        ("collective-permute", "depth", ("z",), 1, halo),
        ("all-reduce", "outputs", ("m",), 0, outputs),
    ]
    kernel = 4 * 4 * 4 * 2 * 4 * 4
    assert [(e.kind, e.what, e.axes, e.distance, e.bytes) for e in plan.gradient_exchanges] == [
        ("collective-permute", "depth", ("z",), -1, ct),
        ("collective-permute", "depth", ("z",), 1, ct),
        ("all-reduce", "kernel", ("n", "z"), 0, kernel),
        ("all-reduce", "bias", ("n", "z"), 0, 8),
    ]
    assert plan.link_bytes == {("z",): halo + ct, ("m",): outputs, ("n", "z"): 2 * 7 * kernel // 8 + 2 * 7}
    assert plan.forward["cpu"].multiply_adds >= 2 * 4 * 6 * 6 * 4 * 2 * 64
    assert "      result: halo of depth from +1 along 'z', 1.1 KiB" in capsys.readouterr().out
