"""`c3t.lax.conv_transpose` is `jax.lax.conv_transpose`, argument for argument, in one, two and three dimensions."""

import functools
import inspect
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import conv3dt_jax as c3t

pytestmark = pytest.mark.usefixtures("quick_compiles")

LAYOUTS = {
    1: [None, ("NCH", "OIH", "NCH"), ("NHC", "HOI", "NCH"), ("CNH", "IHO", "HNC")],
    2: [None, ("NCHW", "OIHW", "NCHW"), ("NHWC", "HWIO", "NCHW"), ("NWHC", "HWIO", "CHWN")],
    3: [None, ("NCHWD", "OIHWD", "NCHWD"), ("NHWDC", "OIHWD", "NHWDC"), ("CDNHW", "DIOHW", "WNCHD")],
}
DEFAULT = {1: ("NHC", "HIO", "NHC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NHWDC", "HWDIO", "NHWDC")}
STRIDES = {1: [(1,), (2,), (3,)], 2: [(1, 1), (1, 2), (2, 1), (2, 2), (3, 3)], 3: [(1, 1, 1), (1, 2, 1), (2, 2, 2)]}


def operands(dims, layout, taps, *, transposed=False, dtype=np.float32, channels=3, filters=2):
    """Inputs and a kernel, laid out as the layout says."""
    lhs_spec, rhs_spec, _ = layout or DEFAULT[dims]
    space = dict(zip("HWD", (9, 6, 4), strict=True))
    inner, outer = (filters, channels) if transposed else (channels, filters)
    lhs = [{"N": 2, "C": channels, **space}[letter] for letter in lhs_spec]
    rhs = [{"I": inner, "O": outer, **dict.fromkeys("HWD", taps)}[letter] for letter in rhs_spec]
    rng = np.random.default_rng(0)
    values = [rng.normal(size=shape) for shape in (lhs, rhs)]
    if np.issubdtype(dtype, np.complexfloating):
        values = [value + 1j * rng.normal(size=value.shape) for value in values]
    if np.issubdtype(dtype, np.integer):
        values = [rng.integers(-9, 9, shape) for shape in (lhs, rhs)]
    return [jnp.asarray(value, dtype) for value in values]


def check(*arguments, rounding=2e-6, **named):
    want = jax.lax.conv_transpose(*arguments, **named)
    got = c3t.lax.conv_transpose(*arguments, **named)
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    scale = np.abs(np.asarray(want, np.complex128)).max(initial=0)
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=0, atol=rounding * scale)


def test_it_has_the_signature_of_this_jax() -> None:
    ours, theirs = (inspect.signature(f).parameters for f in (c3t.lax.conv_transpose, jax.lax.conv_transpose))
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]


@pytest.mark.thinned
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize(
    ("dims", "strides", "taps"),
    [
        (dims, strides, taps)
        for dims in (1, 2, 3)
        for strides in STRIDES[dims]
        for taps in (3, 4, 5)
        if dims < 3 or taps < 5
    ],
    ids=str,
)
def test_the_parameters_of_jax_s_own_tests(dims, strides, taps, padding) -> None:
    for transposed, dilation in itertools.product((False, True), (None, (2,) * dims)):
        lhs, rhs = operands(dims, None, taps, transposed=transposed)
        check(lhs, rhs, strides, padding, rhs_dilation=dilation, transpose_kernel=transposed)


@pytest.mark.parametrize(("dims", "layout"), [(dims, layout) for dims in LAYOUTS for layout in LAYOUTS[dims]], ids=str)
def test_any_layout(dims, layout) -> None:
    lhs, rhs = operands(dims, layout, 3)
    check(lhs, rhs, STRIDES[dims][-1], "SAME", dimension_numbers=layout)
    numbers = jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, layout or DEFAULT[dims])
    check(lhs, rhs, STRIDES[dims][-1], "SAME", dimension_numbers=numbers)


@pytest.mark.parametrize("consistent", [False, True])
@pytest.mark.parametrize(
    "padding", [[(0, 0), (0, 0)], [(1, 2), (0, 3)], [(4, 5), (2, 2)], [(-1, 2), (3, -2)], [(2, 2), (1, 1)]], ids=str
)
def test_padding_by_numbers(padding, consistent) -> None:
    """Less than a kernel reaches crops; more is zeros."""
    lhs, rhs = operands(2, None, 3)
    check(lhs, rhs, (2, 3), padding, use_consistent_padding=consistent)


def test_an_int_is_the_same_at_both_ends() -> None:
    lhs, rhs = operands(2, None, 3)
    got = c3t.lax.conv_transpose(lhs, rhs, (2, 2), [1, 2])
    np.testing.assert_array_equal(got, c3t.lax.conv_transpose(lhs, rhs, (2, 2), [(1, 1), (2, 2)]))


@pytest.mark.parametrize("name", ["same", "valid", "Same"])
def test_names_mean_what_they_say_in_any_case(name) -> None:
    lhs, rhs = operands(2, None, 4)
    got = c3t.lax.conv_transpose(lhs, rhs, (2, 2), name)
    np.testing.assert_array_equal(got, c3t.lax.conv_transpose(lhs, rhs, (2, 2), name.upper()))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "complex64", "int8", "int32"])
def test_dtypes(dtype) -> None:
    lhs, rhs = operands(2, None, 3, dtype=jnp.dtype(dtype))
    rounding = {"bfloat16": 2**-7, "float16": 2**-10, "complex64": 2e-6}.get(dtype, 0)
    check(lhs, rhs, (2, 2), "SAME", rounding=rounding)
    if dtype in ("bfloat16", "float16"):
        check(lhs, rhs, (2, 2), "SAME", preferred_element_type=jnp.float32, rounding=1e-5)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_transformations(dims) -> None:
    lhs, rhs = operands(dims, None, 3)
    results = []
    for function in (c3t.lax.conv_transpose, jax.lax.conv_transpose):
        run = functools.partial(function, strides=(2,) * dims, padding="SAME")
        loss = lambda x, w, run=run: (run(x, w) ** 2).sum()
        results.append(
            (
                jax.jit(jax.grad(loss, (0, 1)))(lhs, rhs),
                jax.vmap(run, (0, None))(jnp.stack([lhs, -lhs]), rhs),
                jax.jvp(loss, (lhs, rhs), (lhs, rhs))[1],
            )
        )
    got, want = map(jax.tree.leaves, results)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def moved(program, least):
    """How many arrays of at least so many elements are copied or transposed."""
    found = re.findall(r"= \w+\[([\d,]+)\]\S* (?:copy|transpose)\(", program.as_text())
    return sum(np.prod([int(size) for size in shape.split(",")]) >= least for shape in found)


@pytest.mark.parametrize("dims", [1, 2])
def test_lifting_costs_nothing(dims) -> None:
    """The program is that of a volume with axes of one element: no copies, no temporaries more."""
    lhs, rhs = jnp.ones((2, *(40, 30)[:dims], 8)), jnp.ones((*(4, 4)[:dims], 8, 8))
    shape = jax.lax.conv_transpose(lhs, rhs, (2,) * dims, "VALID", transpose_kernel=True).shape
    ones = [1] * (3 - dims)
    space, taps = ([*size, *ones] if dims == 1 else [*ones, *size] for size in (lhs.shape[1:-1], rhs.shape[:-2]))
    strides = [2, 1, 1] if dims == 1 else [1, 2, 2]
    x, w = lhs.reshape(2, *space, 8), rhs.reshape(*taps, 8, 8)
    whole = jax.jit(functools.partial(c3t.conv3d_transpose, strides=strides)).lower(x, w).compile()
    ours = functools.partial(c3t.lax.conv_transpose, strides=(2,) * dims, padding="VALID", transpose_kernel=True)
    lifted = jax.jit(ours).lower(lhs, rhs).compile()
    assert lifted.out_info.shape == shape
    assert moved(lifted, lhs.size) <= moved(whole, lhs.size)
    memory = [program.memory_analysis().temp_size_in_bytes for program in (lifted, whole)]
    assert memory[0] <= memory[1]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (((2, 2), "full"), ValueError, r"`padding='full'` must be 'SAME', 'VALID'"),
        (((2, 2), [(1, 1), (1.5, 1)]), ValueError, r"must be an int or a pair for each of 2 dimensions"),
        (((2, 2), [(1, 1, 1), (1, 1, 1)]), ValueError, r"must be an int or a pair for each of 2 dimensions"),
        (((2, 2), [(1, 1)]), ValueError, r"must be an int or a pair for each of 2 dimensions"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        c3t.lax.conv_transpose(*operands(2, None, 3), *arguments)


def test_what_jax_refuses_is_refused_by_jax() -> None:
    lhs, rhs = operands(2, None, 3)
    with pytest.raises(TypeError):
        c3t.lax.conv_transpose(lhs, rhs.astype(jnp.bfloat16), (2, 2), "SAME")
    with pytest.raises((TypeError, ValueError)):
        c3t.lax.conv_transpose(lhs, rhs[:, :, :2], (2, 2), "SAME")


@pytest.mark.parametrize("name", ["precision", "channels", "filters"])
def test_what_this_package_does_not_take_jax_computes(name) -> None:
    lhs, rhs = operands(2, None, 3)
    if name == "channels":
        lhs, rhs = lhs[..., :0], rhs[:, :, :0]
    if name == "filters":
        rhs = rhs[..., :0]
    named = {"precision": jax.lax.DotAlgorithmPreset.F32_F32_F32} if name == "precision" else {}
    check(lhs, rhs, (2, 2), "SAME", **named)


def test_numbers_of_numpy() -> None:
    lhs, rhs = (np.asarray(array) for array in operands(2, None, 3))
    got = c3t.lax.conv_transpose(lhs, rhs, np.array([2, 2]), [np.int64(1), np.int64(2)], np.array([1, 1]))
    np.testing.assert_array_equal(got, c3t.lax.conv_transpose(lhs, rhs, (2, 2), [(1, 1), (2, 2)]))


@pytest.mark.parametrize("shape", [(0, 5, 5, 3), (2, 0, 5, 3)], ids=str)
def test_empty_arrays(shape) -> None:
    check(jnp.ones(shape), jnp.ones((3, 3, 3, 2)), (2, 2), "SAME")
