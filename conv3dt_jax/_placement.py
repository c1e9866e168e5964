"""Where the arrays of an operation lie on a mesh of devices: names of mesh axes for its dimensions, checked once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import export
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from conv3dt_jax import _arguments as args
from conv3dt_jax._convolution_spec import ConvolutionSpec
from conv3dt_jax._cut import Cut, Names, is_explicit, names_of
from conv3dt_jax._geometry import AXIS_NAMES, Axis, part_of_inputs, part_of_outputs
from conv3dt_jax._spec import Conv3DSpec


@dataclasses.dataclass(frozen=True)
class MeshAxes:
    """The axes of a mesh over which the dimensions of a 3-D convolution are cut, transposed or not.

    Each is the name of a mesh axis, several of them (the first is the outermost), or None for a dimension that every
    device holds as a whole.

    Attributes:
      batch: N, of inputs and outputs.
      depth: D, likewise. A device holds a piece of the axis, and gets from its neighbours what the kernel reaches.
      height: H, likewise.
      width: W, likewise.
      channels: C, of inputs and kernel; the devices' results are summed up.
      filters: F, of kernel, bias and outputs.
      groups: whole groups of channels and filters; in place of these two where there are several.

    Raises:
      TypeError, ValueError: what is no name; a name for two dimensions.

    Example:
      >>> import conv3dt_jax as c3t
      >>> c3t.MeshAxes(batch="data", depth=("rack", "host"))
      MeshAxes(batch='data', depth=('rack', 'host'))
    """

    batch: Any = None
    depth: Any = None
    height: Any = None
    width: Any = None
    channels: Any = None
    filters: Any = None
    groups: Any = None

    def __post_init__(self) -> None:
        used: dict[str, str] = {}
        for field in dataclasses.fields(self):
            names = _axis_names(field.name, getattr(self, field.name))
            for name in names:
                if name in used:
                    both = "twice for" if used[name] == field.name else f"for `{used[name]}` and"
                    raise ValueError(
                        f"the mesh axis {name!r} is given {both} `{field.name}`; it can cut one dimension, once."
                    )
                used[name] = field.name
            object.__setattr__(self, field.name, names[0] if len(names) == 1 else names or None)

    def __repr__(self) -> str:
        return f"MeshAxes({', '.join(f'{name}={value!r}' for name, value in self.as_dict().items())})"

    def as_dict(self) -> dict[str, Any]:
        """The dimensions that are cut."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def names(self, dimension: str) -> Names:
        """The mesh axes of a dimension."""
        return _axis_names(dimension, getattr(self, dimension))

    def translated(self, rules: Mapping[str, Any]) -> MeshAxes:
        """With logical names replaced by those of mesh axes, or by none."""
        found = {}
        for dimension in self.as_dict():
            names = [_axis_names(dimension, rules.get(name, name)) for name in self.names(dimension)]
            found[dimension] = tuple(name for each in names for name in each)
        return MeshAxes(**found)


def mesh_axes_of(value: Any) -> MeshAxes | None:
    """The argument ``mesh_axes``: a `MeshAxes`, or a mapping of dimensions to names."""
    if value is None or isinstance(value, MeshAxes):
        return value
    known = [field.name for field in dataclasses.fields(MeshAxes)]
    if not isinstance(value, Mapping):
        raise TypeError(
            f"{args.received('mesh_axes', value)} must be a MeshAxes, or a mapping from dimensions "
            f"({', '.join(known)}) to names of mesh axes."
        )
    unknown = [name for name in value if name not in known]
    if unknown:
        raise ValueError(f"`mesh_axes` has no dimension {unknown[0]!r}; it has {', '.join(known)}.")
    return MeshAxes(**value)


def _axis_names(dimension: str, value: Any) -> Names:
    names = tuple(value) if args.is_sequence(value) else () if value is None else (value,)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"{args.received(dimension, value)} must be the name of a mesh axis, a sequence of names, or None."
        )
    return names


@dataclasses.dataclass(frozen=True)
class Placement:
    """Axes of a mesh that has them."""

    mesh: Mesh | AbstractMesh
    axes: MeshAxes

    def __post_init__(self) -> None:
        if not isinstance(self.mesh, Mesh | AbstractMesh):
            raise TypeError(f"`mesh` must be a jax.sharding.Mesh, not {type(self.mesh).__name__}; see jax.make_mesh.")
        kinds = dict(zip(self.mesh.axis_names, self.mesh.axis_types, strict=True))
        for dimension in self.axes.as_dict():
            for name in self.axes.names(dimension):
                if name not in kinds:
                    raise ValueError(
                        f"`{dimension}={name!r}` is no axis of the mesh, which has "
                        f"{', '.join(f'{axis!r} ({size})' for axis, size in self.mesh.shape.items()) or 'none'}."
                    )
                if kinds[name] == AxisType.Manual:
                    raise ValueError(
                        f"`{dimension}={name!r}` is a manual axis here, inside of jax.shard_map, where all arrays are "
                        "those of one device; leave it out, or call this outside."
                    )
                if is_explicit(self.mesh) and kinds[name] != AxisType.Explicit:
                    raise ValueError(
                        f"`{dimension}={name!r}` is an axis of type Auto in a mesh that has Explicit ones too; cut "
                        "over these, or make a mesh with axes of one type."
                    )

    def cut(self, spec: ConvolutionSpec, batch: Sequence[Any], channels: int, reading: Any) -> Cut:
        """How the form of an operation is cut."""
        self._check_features(spec, channels)
        sizes = (*batch, *(axis.n for axis in reading.form.geometry), *(axis.out for axis in reading.form.geometry))
        if any(export.is_symbolic_dim(size) for size in sizes):
            raise ValueError(
                f"`inputs` have symbolic sizes, ({', '.join(map(str, sizes[: len(batch) + 3]))}); over a mesh "
                f"({self.axes}) they must be numbers."
            )
        space = tuple(self.axes.names(name) for name in AXIS_NAMES)
        for name, axis in zip(AXIS_NAMES, reading.form.geometry, strict=True):
            self._check_axis(name, axis, reading.outputs)
        first, second = ("channels", "filters") if reading.outputs else ("filters", "channels")
        return Cut(
            mesh=self.mesh,
            batch=self.axes.names("batch"),
            space=space,  # type: ignore[arg-type]
            channels=self.axes.names(first),
            filters=self.axes.names(second),
            groups=self.axes.names("groups"),
        )

    def spec_of(self, spec: ConvolutionSpec, role: str) -> PartitionSpec:
        """Of the "inputs", the "kernel", the "bias" or the "outputs" of an operation, with one axis of batch."""
        entries = self.axes.as_dict()
        get: Callable[[str], Any] = entries.get
        channels, filters = get("groups") or get("channels"), get("groups") or get("filters")
        if role == "bias":
            return PartitionSpec(filters)
        if role == "kernel":
            last = (get("channels"), filters) if isinstance(spec, Conv3DSpec) else (get("filters"), channels)
            return PartitionSpec(None, None, None, *last)
        space, features = [get(name) for name in AXIS_NAMES], channels if role == "inputs" else filters
        if spec.data_format == "channels_first":
            return PartitionSpec(get("batch"), features, *space)
        return PartitionSpec(get("batch"), *space, features)

    def shards(self, dimension: str) -> int:
        """Over how many devices a dimension is cut."""
        return self.over(self.axes.names(dimension))

    @property
    def pieces(self) -> tuple[int, int, int]:
        """Of depth, height and width."""
        return self.shards("depth"), self.shards("height"), self.shards("width")

    def over(self, entry: Any) -> int:
        """The number of devices of an entry of a `PartitionSpec`."""
        return Cut(self.mesh).shards(names_of(entry))

    def _received(self, dimension: str) -> str:
        return args.received(dimension, getattr(self.axes, dimension))

    def _check_features(self, spec: ConvolutionSpec, channels: int) -> None:
        sizes = {"groups": spec.groups, "channels": channels, "filters": spec.filters}
        if spec.groups > 1:
            for dimension in ("channels", "filters"):
                if self.axes.names(dimension):
                    raise ValueError(
                        f"{self._received(dimension)} cuts one of {spec.groups} groups; give `groups` instead, "
                        "which cuts channels and filters where groups end."
                    )
        for dimension, size in sizes.items():
            shards = self.shards(dimension)
            if size % shards:
                raise ValueError(
                    f"{self._received(dimension)} cuts {size} {dimension} over {shards} "
                    "devices, which do not divide them; use a mesh axis of a size that does."
                )

    def _check_axis(self, name: str, axis: Axis, outputs: bool) -> None:
        """A halo comes from the next neighbour alone."""
        shards = self.shards(name)
        size = axis.n if outputs else axis.out
        if shards == 1 or axis.is_empty:
            return
        if shards > size:
            raise ValueError(
                f"{self._received(name)} cuts {size} elements of the inputs' {name} over {shards} devices; give "
                f"it at most {size}."
            )
        piece, reach = -(-size // shards), halo(axis, outputs)
        if reach > piece:
            most = size // reach
            advice = f"cut it over {most} at most" if most > 1 else "leave it whole"
            raise ValueError(
                f"{self._received(name)} cuts {size} elements of the inputs' {name} over {shards} devices, "
                f"{piece} each, but the kernel reaches {reach} into the neighbours'; {advice}."
            )


def halo(axis: Axis, outputs: bool) -> int:
    """Elements that are read of one neighbour at most: for outputs from inputs, or else for inputs from outputs."""
    if outputs:
        first, part = part_of_outputs(axis, axis.s)
        window, own = part.n, 1
    else:
        first, part = part_of_inputs(axis, 1)
        window, own = part.out, min(axis.s, part.out)
    before = min(max(-first, 0), window - own)
    return max(before, window - own - before)


def current_mesh() -> Mesh | AbstractMesh | None:
    """The mesh of `jax.set_mesh`, or None."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh
