"""What the plans of the Pallas kernels cover, and when the kernels are chosen."""

import dataclasses
import functools
import itertools
import warnings

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax import export

import conv3dt_jax as c3t
from conv3dt_jax import _choice, _primitives, _spec
from conv3dt_jax._geometry import Axis, resolve_axis
from conv3dt_jax.lowerings import _pallas_plans, _reduce, _triton, _walks, pallas
from conv3dt_jax.lowerings._triton import Tile
from conv3dt_jax.lowerings._work import Call
from tests import oracle
from tests.test_pallas import SHAPES, errors, value_and_gradients

# What a plan covers.

axes = st.builds(
    lambda n, k, s, d, padding: resolve_axis(n, k, s, d, padding, None),
    st.integers(1, 6),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from(["valid", "same", "circular"]),
).filter(lambda axis: axis.out > 0)


def meetings(walk: _walks.Walk) -> tuple[list[int], set[tuple[int, int, int]]]:
    """The places that are written, and all (place, place taken, tap)."""
    written, met = [], set()
    for q, (r, taps) in itertools.product(range(walk.cells), enumerate(walk.taps)):
        for e in range(walk.merged):
            place = q * walk.stride + walk.offsets[r] + e
            if not 0 <= place < walk.length:
                assert not walk.fills
                continue
            written.append(place)
            for j in range(walk.counts[r]):
                taken, tap = q * walk.scale + walk.first[r] + j * walk.step, taps[j][e]
                assert not walk.stays_inside or 0 <= taken < walk.size
                if walk.wraps:
                    taken %= walk.size
                if tap is not None and 0 <= taken < walk.size:
                    met.add((place, taken, tap))
    return written, met


def defined(axis: Axis) -> set[tuple[int, int, int]]:
    """All (output, input, tap) of the definition."""
    found = set()
    for i, t in itertools.product(range(axis.n), range(axis.k)):
        place = i * axis.s + t * axis.d - axis.lo
        place = place % axis.out if axis.wraps else place
        if 0 <= place < axis.out:
            found.add((place, i, t))
    return found


@given(axes, st.integers(0, 4))
@settings(max_examples=300, deadline=None)
def test_a_walk_to_the_outputs_meets_what_the_definition_says(axis: Axis, inputs: int) -> None:
    written, met = meetings(_walks.outputs_walk(axis, inputs))
    assert sorted(written) == list(range(axis.out))
    assert met == defined(axis)


@given(axes, st.integers(1, 4))
@settings(max_examples=300, deadline=None)
def test_a_walk_to_the_inputs_meets_what_the_definition_says(axis: Axis, inputs: int) -> None:
    written, met = meetings(_walks.inputs_walk(axis, inputs))
    assert sorted(written) == list(range(axis.n))
    assert {(o, i, t) for i, o, t in met} == defined(axis)


@given(
    st.tuples(axes, axes, axes),
    st.integers(1, 4),
    st.sampled_from([1, 3, 16, 40, 256]),
    st.sampled_from([1, 3, 16, 40, 256]),
    st.sampled_from([1, 2]),
    st.sampled_from(["half", "tf32", "two", "three"]),
)
@settings(max_examples=150, deadline=None)
def test_plans_fit_a_multiprocessor(geometry, batch, channels, filters, groups, way) -> None:
    """Powers of two, no more than 128 sums a thread, and stages that fit its 227 KiB."""
    sizes = (geometry, batch, channels, filters, groups)
    dtype = jnp.bfloat16 if way == "half" else jnp.float32
    reduce, own = _pallas_plans.kernel_reduce(*sizes, way)
    plans = [_pallas_plans.outputs_gather(*sizes, dtype, way), _pallas_plans.inputs_gather(*sizes, dtype, way), reduce]
    assert own in ("half", "tf32", "two", "three", "float32")
    for plan in plans:
        tile = plan.tile
        assert all(size & (size - 1) == 0 for size in dataclasses.astuple(tile)[:4])
        assert tile.rows * tile.columns <= 128 * 32 * tile.warps
        held = (tile.rows + tile.columns) * tile.depth * jnp.dtype(dtype).itemsize * tile.stages
        assert held * 3 // 2 <= 227 * 1024 * 3 // 2
        assert held <= 227 * 1024
    assert 1 <= reduce.shares <= max(1, reduce.cells)
    assert reduce.shares * reduce.share >= reduce.cells


def test_the_gradient_of_the_kernel_is_summed_in_shares(monkeypatch) -> None:
    """Of cells that do not divide; and of operands that are taken apart before."""
    case = SHAPES["overlap"]
    plan = _pallas_plans.kernel_reduce

    def shared(*arguments):
        reduce, way = plan(*arguments)
        return dataclasses.replace(reduce, shares=3, tile=dataclasses.replace(reduce.tile, depth=16), parts=3), way

    monkeypatch.setattr(_pallas_plans, "kernel_reduce", shared)
    jax.clear_caches()
    got, want = value_and_gradients(case, precision="highest")
    jax.clear_caches()
    assert max(errors(got, want)) < 1e-6


def test_the_work_counts_the_copies_of_operands_that_are_taken_apart() -> None:
    geometry = tuple(resolve_axis(16, 3, 2, 1, "same", None) for _ in range(3))
    reduce, _ = _pallas_plans.kernel_reduce(geometry, 2, 256, 128, 1, "tf32")
    assert reduce.parts == 2
    call = Call(geometry, 2, 256, 128, 1, 4, 0)
    copies = 2 * 2 * (2 * 16**3 * 256 + 2 * 32**3 * 128)
    rest = pallas.work(call, gradients=1).temporary_bytes + 4 * reduce.shares * reduce.size
    assert pallas.work(call, gradients=2).temporary_bytes == rest + copies


@pytest.mark.parametrize("line", [_reduce.TAP, _reduce.WIDTH, _reduce.ALL])
@pytest.mark.parametrize("name", ["groups", "dilated", "circular", "gaps"])
def test_every_line_gives_the_same_gradient(name: str, line: int) -> None:
    case = SHAPES[name]
    x, w, _ = case.operands()
    spec = c3t.Conv3DTransposeSpec(case.filters, case.kernel, **case.kwargs)
    geometry = spec.geometry(case.space)
    ct = np.random.default_rng(1).normal(size=oracle.conv3d_transpose(x, w, **case.kwargs).shape).astype(np.float32)
    _, want = oracle.vjp(x.astype(np.float64), w.astype(np.float64), ct.astype(np.float64), **case.kwargs)
    g = case.groups
    reduce = _reduce.Reduce(geometry, 2, case.channels // g, case.filters // g, g, line, 2, Tile(32, 16, 16))
    got = _reduce.run(jnp.asarray(x), jnp.asarray(ct), reduce, arithmetic="float32", interpret=True)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


# When it is chosen.


def form(
    channels=8, filters=8, groups=1, dtype="float32", sums="float32", precision=None, padding="same", space=(4, 4, 4)
):
    spec = _spec.Conv3DTransposeSpec(filters, 3, 2, padding, groups=groups)
    numbers = (np.dtype(jnp.dtype(dtype)),) * 3
    return _primitives.Form(
        spec.geometry(space), channels, filters, groups, numbers, np.dtype(sums), precision, "auto"
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["outputs", "affine", "tangent", "inputs", "kernel", "gradients"])
@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": "bfloat16"}, {"dtype": "float16"}, {"groups": 2}, {"groups": 8}, {"precision": "highest"}],
    ids=str,
)
def test_hopper_gathers(kind: str, options: dict) -> None:
    name, reason = _choice.decide(kind, "hopper", form(**options), 2)
    assert name == "pallas"
    assert reason


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float64", "sums": "float64"},
        {"dtype": "int32", "sums": "int32"},
        {"dtype": "complex64", "sums": "complex64"},
        {"groups": 4},
        {"channels": 8, "filters": 16, "groups": 8},
        {"precision": jax.lax.DotAlgorithmPreset.F64_F64_F64},
        {"space": (1024, 1024, 1024)},
    ],
    ids=str,
)
def test_hopper_leaves_to_xla_what_the_kernels_do_not_take(options: dict) -> None:
    assert _choice.decide("outputs", "hopper", form(**options), 2)[0] in ("phases", "matmul")


@pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm", "tpu"])
def test_no_other_platform_gathers(platform: str) -> None:
    assert _choice.decide("outputs", platform, form(), 2)[0] != "pallas"


def test_without_pallas_the_choice_falls_back_and_the_name_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(_triton, "toolkit", lambda: None)
    assert _choice.decide("outputs", "hopper", form(), 2)[0] == "phases"
    with pytest.raises(NotImplementedError, match="this JAX has no Pallas for Triton"):
        c3t.conv3d_transpose(jnp.ones((1, 2, 2, 2, 4)), jnp.ones((2, 2, 2, 4, 4)), implementation="pallas")


def test_circular_convolutions_whose_stride_does_not_divide_are_refused_by_name() -> None:
    x, w = jnp.ones((1, 5, 5, 5, 4)), jnp.ones((3, 3, 3, 4, 4))
    with pytest.raises(NotImplementedError, match="it takes circular axes only where the stride divides the outputs"):
        c3t.conv3d(x, w, strides=2, padding="circular", implementation="pallas")


def test_an_unknown_precision_is_refused() -> None:
    x, w = jnp.ones((1, 2, 2, 2, 4)), jnp.ones((2, 2, 2, 4, 4))
    with jax.default_matmul_precision("F64_F64_F64"), pytest.raises(NotImplementedError, match="precision"):
        c3t.conv3d_transpose(x, w, implementation="pallas")


def test_other_floating_point_numbers_are_left_to_xla() -> None:
    options = {"dtype": "float8_e4m3fn"}
    assert _choice.decide("outputs", "hopper", form(**options), 2)[0] != "pallas"
    x, w = jnp.ones((1, 2, 2, 2, 4), "float8_e4m3fn"), jnp.ones((2, 2, 2, 4, 4), "float8_e4m3fn")
    with pytest.raises(NotImplementedError, match="takes float32, bfloat16 and float16, not float8_e4m3fn"):
        c3t.conv3d_transpose(x, w, implementation="pallas", preferred_element_type="float32")


def test_more_values_than_32_bits_address_are_refused() -> None:
    run = functools.partial(c3t.conv3d_transpose, strides=2, implementation="pallas")
    x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((8, 256, 256, 256, 64), (2, 2, 2, 64, 64)))
    with pytest.raises(NotImplementedError, match="cannot address 68,719,476,736 values in 32 bits"):
        jax.jit(run).lower(x, w)


def test_long_kernels_are_cut_in_phases() -> None:
    """Cells of them would have more columns than a product may have."""
    axis = resolve_axis(1000, 4096, 1024, 1, "valid", None)
    still = resolve_axis(1, 1, 1, 1, "valid", None)
    plan = _pallas_plans.outputs_gather((axis, still, still), 1, 512, 1, 1, jnp.bfloat16, "half")
    assert plan.axes[0].pieces == 1024
    assert plan.axes[0].counts == (4,) * 1024


def test_a_precision_is_read_as_jax_reads_it() -> None:
    names = ["default", "high", "highest", "bfloat16_3x", "float32", "tensorfloat32", jax.lax.Precision.HIGHEST]
    found = [_pallas_plans.arithmetic_of("float32", name) for name in names]
    assert found == ["tf32", "two", "three", "two", "three", "two", "three"]
    assert _pallas_plans.arithmetic_of("float32", ("default", "highest")) == "three"
    assert _pallas_plans.arithmetic_of("bfloat16", "highest") == "half"
    with jax.default_matmul_precision("highest"):
        assert _pallas_plans.arithmetic_of("float32", None) == "three"


def lowered(run, *arrays) -> str:
    try:
        return jax.jit(run).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    except RuntimeError as error:
        if "No supported GPU devices" in str(error):
            pytest.skip("this JAX lowers kernels only beside a GPU")
        raise


def test_on_hopper_a_program_is_three_kernels_and_no_convolution(monkeypatch) -> None:
    """Without a word on how long this part of Pallas will be there."""
    monkeypatch.setattr(_triton, "is_hopper", lambda: True)
    x, w = jnp.ones((2, 4, 4, 4, 16)), jnp.ones((3, 3, 3, 8, 16))
    run = functools.partial(c3t.conv3d_transpose, strides=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = lowered(lambda x, w, ct: (*jax.vjp(run, x, w)[1](ct), run(x, w)), x, w, run(x, w))
    assert text.count("__gpu$xla.gpu.triton") == 3
    assert "stablehlo.convolution" not in text
    assert "stablehlo.dot_general" not in text


def test_an_exported_module_holds_no_kernels(monkeypatch) -> None:
    """JAX does not promise that their form will be understood later."""
    monkeypatch.setattr(_triton, "is_hopper", lambda: True)
    x, w = jnp.ones((2, 4, 4, 4, 16)), jnp.ones((3, 3, 3, 8, 16))
    run = jax.jit(functools.partial(c3t.conv3d_transpose, strides=2))
    module = export.export(run, platforms=["cpu", "cuda", "tpu"])(x, w)
    assert "triton" not in module.mlir_module()
    np.testing.assert_allclose(module.call(x, w), run(x, w), rtol=1e-5)


def test_this_machine_is_told_apart() -> None:
    gpus = [d for d in jax.devices() if d.platform == "gpu"]
    assert _triton.is_hopper() == bool(gpus and all(str(d.compute_capability).startswith("9.") for d in gpus))
