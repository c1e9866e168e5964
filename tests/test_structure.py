"""The house: imports point down only, the import is quick, and every public name is documented."""

import ast
import inspect
import pathlib
import subprocess
import sys

import pytest

import conv3dt_jax as c3t

PACKAGE = pathlib.Path(c3t.__file__).parent

# From the bottom up; a module may import from lower floors (and, where listed together, not from its neighbours).
FLOORS = [
    {"_geometry", "_identifiers"},
    {"_arguments"},
    {
        "_activations",
        "_dtype_policy",
        "_initializers",
        "_keras_config",
        "constraints",
        "regularizers",
        "lowerings._products",
        "lowerings._origin",
        "lowerings._triton",
        "lowerings._walks",
        "lowerings._work",
    },
    {"initializers"},
    {
        "lowerings._blocks",
        "lowerings._gather",
        "lowerings._minimal",
        "lowerings._reduce",
        "lowerings._side_by_side",
        "lowerings._tiles",
        "lowerings._transposes",
        "lowerings._turn",
    },
    {"_convolution_spec", "lowerings._pallas_plans", "lowerings._result"},
    {"_spec"},
    {"lowerings._cells"},
    {"lowerings._lines", "lowerings._depthwise", "lowerings._laid_out"},
    {
        "lowerings._adjoint",
        "lowerings._correlation",
        "lowerings._kernel_rows",
        "lowerings._planes",
        "lowerings._samples",
    },
    {"lowerings._matmul_plans"},
    {"lowerings._matmul_work"},
    {"lowerings.dilated", "lowerings.matmul", "lowerings.pallas", "lowerings.phases", "lowerings.winograd"},
    {"_operands", "lowerings"},
    {"_candidates", "_slabs"},
    {"_choice"},
    {"_cut", "_halos"},
    {"_shards"},
    {"_partition"},
    {"_primitives"},
    {"_batching"},
    {"_arrangement", "_placement"},
    {"_operation"},
    {"_parameters", "_plans", "functional"},
    {"_lifted"},
    {"_accelerate", "lax"},
    {"_mesh_plan", "_slab_sizes"},
    {"_explain"},
    {"_streaming"},
    {"_sharded", "_tiled"},
    {"_given_weights"},
    {"_layer"},
    {"_config"},
    {"_nnx", "linen"},
    {"nnx"},
    {"_models"},
    {"_training"},
    {"interop._common"},
    {"interop._keras_files", "interop._pytorch", "interop._windows"},
    {"interop._equinox_haiku", "interop._flax", "interop._keras_writing"},
    {"interop._keras"},
    {"interop._convert"},
    {"interop"},
    {"__main__"},
    {""},
]
FLOOR = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(path: pathlib.Path) -> set[str]:
    """The project's modules that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "conv3dt_jax":
            base = node.module.removeprefix("conv3dt_jax").lstrip(".")
            names = [".".join(filter(None, (base, alias.name))) for alias in node.names]
            found |= {name if name in MODULES else base for name in names}
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("conv3dt_jax.") for a in node.names if a.name.startswith("conv3dt_jax.")}
    return found


def test_every_module_has_a_floor() -> None:
    assert set(MODULES) == set(FLOOR)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_down(module) -> None:
    for other in imported(MODULES[module]):
        assert FLOOR[other] < FLOOR[module], f"{module or 'the package'} imports {other}"


def test_geometry_is_plain_python() -> None:
    for node in ast.walk(ast.parse(MODULES["_geometry"].read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert all(name.split(".")[0] in sys.stdlib_module_names for name in names)


PUBLIC = [(c3t, name) for name in c3t.__all__] + [
    (module, name)
    for module in (c3t.constraints, c3t.initializers, c3t.interop, c3t.nnx, c3t.regularizers)
    for name in module.__all__
    if not name.isupper()  # constants are explained where they are defined
]


@pytest.mark.parametrize(("module", "name"), PUBLIC, ids=lambda value: getattr(value, "__name__", value))
def test_public_names_are_documented_with_an_example(module, name) -> None:
    documentation = inspect.getdoc(getattr(module, name))
    assert documentation
    assert ">>>" in documentation


def test_no_file_is_long() -> None:
    assert {name: n for name, path in MODULES.items() if (n := len(path.read_text().splitlines())) > 350} == {}


def test_import_does_not_load_flax_or_optional_packages() -> None:
    program = (
        "import sys, conv3dt_jax as c3t; "
        "print([m for m in ('flax', 'optax', 'keras', 'torch', 'tensorflow', 'h5py', 'safetensors') if m in sys.modules]); "
        "c3t.Conv3DTranspose; print('flax' in sys.modules, 'Conv3DTranspose' in dir(c3t))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "True True"]


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Conv2DTranspose'"):
        c3t.Conv2DTranspose  # noqa: B018
