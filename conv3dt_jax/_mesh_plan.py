"""What each device of a mesh would hold, compute and send, in numbers, without the devices."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from conv3dt_jax import _shards
from conv3dt_jax._convolution_spec import ConvolutionSpec
from conv3dt_jax._cut import ROLES, Cut, Names
from conv3dt_jax._geometry import AXIS_NAMES, Axis
from conv3dt_jax._placement import Placement
from conv3dt_jax._plans import plan_of, size_text
from conv3dt_jax.lowerings._work import GRADIENTS


@dataclasses.dataclass(frozen=True)
class Exchange:
    """What all devices send at once.

    Attributes:
      kind: "collective-permute", a halo, or "all-reduce", a sum over devices.
      what: the axis of space of a halo, or the array that is summed up.
      axes: those of the mesh.
      distance: how far from the sender the receiver of a halo is, along these; negative for the other direction.
      bytes: that a device sends; of a sum, the array that is summed up.
    """

    kind: str
    what: str
    axes: Names
    distance: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class DevicePlan:
    """What one device does for the result, or for both gradients.

    ``multiply_adds`` are those made, zeros and halos included; ``peak_bytes`` an estimate of all that is held at a
    time: its shards of operands and results, their windows with halos, and temporaries.
    """

    lowering: str
    multiply_adds: int
    peak_bytes: int


@dataclasses.dataclass(frozen=True)
class MeshPlan:
    """An operation over a mesh, for each of its devices; they all do the same.

    Attributes:
      mesh: the sizes of its axes.
      input_shape: of one device's shard, the largest where they differ, with one axis of batch; likewise below.
      kernel_shape: likewise.
      output_shape: likewise.
      forward: a `DevicePlan` for each platform.
      gradients: likewise, for both gradients, and that of a bias.
      result_exchanges: what devices send for the result.
      gradient_exchanges: what they send for the gradients.

    Example:
      >>> import conv3dt_jax as c3t
      >>> from jax.sharding import AbstractMesh
      >>> mesh, spec = AbstractMesh((4,), ("z",)), c3t.Conv3DTransposeSpec(8, 3, 2, "same", use_bias=False)
      >>> plan = c3t.explain((1, 64, 32, 32, 8), spec, platforms=["cpu"], mesh=mesh, mesh_axes={"depth": "z"}).mesh
      inputs  ...
      >>> [(exchange.what, exchange.distance, exchange.bytes) for exchange in plan.result_exchanges]
      [('depth', -1, 32768)]
      >>> plan.input_shape, plan.link_bytes
      ((1, 16, 32, 32, 8), {('z',): 141440})
    """

    mesh: dict[str, int]
    input_shape: tuple[int, ...]
    kernel_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    forward: dict[str, DevicePlan]
    gradients: dict[str, DevicePlan]
    result_exchanges: tuple[Exchange, ...]
    gradient_exchanges: tuple[Exchange, ...]

    @property
    def link_bytes(self) -> dict[Names, int]:
        """The bytes that cross a link between neighbours, in its busier direction, for result and gradients.

        By the axes of the mesh, each of which is taken for a ring of its own: a halo from the second neighbour crosses
        two links, and a sum over n devices sends 2 (n - 1) / n of its array over each, as the best algorithms do.
        """
        halos: dict[Names, list[int]] = {}
        sums: dict[Names, int] = {}
        for exchange in (*self.result_exchanges, *self.gradient_exchanges):
            directions = halos.setdefault(exchange.axes, [0, 0])
            if exchange.kind == "all-reduce":
                devices = math.prod(self.mesh[name] for name in exchange.axes)
                sums[exchange.axes] = sums.get(exchange.axes, 0) - (-2 * (devices - 1) * exchange.bytes // devices)
            else:
                directions[exchange.distance > 0] += abs(exchange.distance) * exchange.bytes
        return {axes: max(directions) + sums.get(axes, 0) for axes, directions in halos.items()}

    def __str__(self) -> str:
        sizes = ", ".join(f"{name}={size}" for name, size in self.mesh.items())
        rows = [
            f"mesh    {sizes}: on each device inputs {self.input_shape}, kernel {self.kernel_shape}, "
            f"outputs {self.output_shape}"
        ]
        for title, plans, exchanges in (
            ("result", self.forward, self.result_exchanges),
            ("both gradients", self.gradients, self.gradient_exchanges),
        ):
            for platform, plan in plans.items():
                rows.append(
                    f"{platform:5s} {title} on a device: {plan.lowering}, {plan.multiply_adds:,} multiply-adds, about "
                    f"{size_text(plan.peak_bytes)} held"
                )
            for exchange in exchanges:
                where = " and ".join(map(repr, exchange.axes))
                if exchange.kind == "all-reduce":
                    said = f"{exchange.what} summed up over {where}, {size_text(exchange.bytes)}"
                else:
                    said = f"halo of {exchange.what} from {exchange.distance:+d} along {where}, "
                    said += size_text(exchange.bytes)
                rows.append(f"      {title}: {said}")
        rows += [
            f"a link along {' and '.join(map(repr, axes))}: {size_text(sent)} a step"
            for axes, sent in self.link_bytes.items()
        ]
        return "\n".join(rows)


def plan_over_mesh(
    placement: Placement,
    spec: ConvolutionSpec,
    reading: Any,
    batch: int,
    channels: int,
    platforms: Sequence[str],
    ends: Sequence[tuple[Axis, tuple[int, int]]],
) -> MeshPlan:
    """The plan for one step of training: the result, then both gradients of it.

    ``ends`` are the axes as they were before they got some of their other end, and how much of it stands before and
    behind them.
    """
    form, cut = reading.form, placement.cut(spec, (batch,), channels, reading)
    forward, backward = (["outputs"], ["gradients"]) if reading.outputs else (["inputs"], ["outputs", "kernel"])
    empty = batch == 0 or any(axis.is_empty for axis in form.geometry)
    exchanges = [
        () if empty else tuple(exchange for kind in kinds for exchange in _exchanges(kind, form, cut, batch))
        for kinds in (forward, backward)
    ]
    if not reading.outputs:  # the kernel's gradient reads the windows that the result was computed from
        again = [exchange for exchange in exchanges[0] if exchange.kind == "collective-permute"]
        exchanges[1] = _without(exchanges[1], again)
    if not empty:
        around = tuple(_of_other_ends(form, cut, batch, ends))
        back = tuple(dataclasses.replace(exchange, distance=-exchange.distance) for exchange in reversed(around))
        exchanges = [around + exchanges[0], exchanges[1] + back]
        exchanges[1] += tuple(_of_bias(reading, cut)) if spec.use_bias else ()
    shapes = _shard_shapes(form, cut, batch)
    first, second = ("x", "y") if reading.outputs else ("y", "x")
    return MeshPlan(
        mesh=dict(cut.mesh.shape),
        input_shape=_outer(shapes[first], spec),
        kernel_shape=_kernel(shapes["w"], reading, cut),
        output_shape=_outer(shapes[second], spec, first=second == "y" and form.channels_first),
        forward={platform: _device(forward, platform, form, cut, batch) for platform in platforms},
        gradients={platform: _device(backward, platform, form, cut, batch) for platform in platforms},
        result_exchanges=exchanges[0],
        gradient_exchanges=exchanges[1],
    )


def _without(exchanges: Sequence[Exchange], some: Sequence[Exchange]) -> tuple[Exchange, ...]:
    left = list(exchanges)
    for exchange in some:
        left.reverse()
        left.remove(exchange)  # the last one
        left.reverse()
    return tuple(left)


def _outer(shape: tuple[int, ...], spec: ConvolutionSpec, first: bool = False) -> tuple[int, ...]:
    """The shape as the operation's arrays have it; the form may have the channels last where they have them first."""
    if spec.data_format == "channels_last" or first:
        return shape
    return shape[0], shape[4], *shape[1:4]


def _kernel(shape: tuple[int, ...], reading: Any, cut: Cut) -> tuple[int, ...]:
    """Without strides a convolution's kernel lies the other way round in the form."""
    if not reading.turned:
        return shape
    groups = reading.form.groups // cut.shards(cut.groups)
    return *shape[:3], shape[4] // groups, shape[3] * groups


def _shard_shapes(form: Any, cut: Cut, batch: int) -> dict[str, tuple[int, ...]]:
    whole = {"x": form.inputs_shape(batch), "w": form.kernel_shape(), "y": form.outputs_shape(batch)}
    return {
        role: tuple(
            (size + missing) // shards
            for size, missing, shards in zip(shape, cut.missing(role, form, shape), cut.counts(role, form), strict=True)
        )
        for role, shape in whole.items()
    }


def _exchanges(kind: str, form: Any, cut: Cut, batch: int) -> Iterator[Exchange]:
    """Of one primitive, in their order."""
    part, lines = _shards.part_of(kind, form, cut)
    read = "y" if GRADIENTS[kind] else "x"
    shapes = _shard_shapes(form, cut, batch)
    held, first = list(shapes[read]), 2 if read == "y" and form.channels_first else 1
    dtypes = dict(zip("xwy", form.dtypes, strict=True))
    for dim, (name, line) in enumerate(zip(AXIS_NAMES, lines, strict=True), start=first):
        if line is None:
            continue
        others = math.prod(held) // held[dim] * dtypes[read].itemsize
        for each in (*line.exchange.before, *line.exchange.after):
            yield Exchange("collective-permute", name, line.names, each.distance, each.size * others)
        held[dim] = line.exchange.size
    titles = {"x": "inputs", "w": "kernel", "y": "outputs"}
    for role, names in _shards.summed(kind, cut).items():
        if names and role in ROLES[kind][1]:
            partial = dict(zip("xwy", part.dtypes, strict=True))[role]
            yield Exchange("all-reduce", titles[role], names, 0, math.prod(shapes[role]) * partial.itemsize)


def _of_other_ends(form: Any, cut: Cut, batch: int, ends: Sequence[tuple[Axis, tuple[int, int]]]) -> Iterator[Exchange]:
    """Of circular convolutions whose stride does not divide the inputs: they are the outputs of the form."""
    held = list(_shard_shapes(form, cut, batch)["y"])
    sizes = [axis.out if axis.wraps else None for axis, _ in ends]
    for dim, (size, names) in enumerate(zip(sizes, cut.space, strict=True), start=1):
        held[dim] = held[dim] if size is None else -(-size // cut.shards(names))
    for dim, (name, names, (axis, (low, high))) in enumerate(zip(AXIS_NAMES, cut.space, ends, strict=True), start=1):
        shards = cut.shards(names)
        if (low, high) == (0, 0) or shards == 1:
            continue
        exchange, piece = _shards.around(axis.out, low, high, shards)
        others = math.prod(held) // held[dim] * form.dtypes[2].itemsize
        for each in (*exchange.before, *exchange.after):
            yield Exchange("collective-permute", name, names, each.distance, each.size * others)
        held[dim] = piece


def _of_bias(reading: Any, cut: Cut) -> Iterator[Exchange]:
    """Its gradient, summed over batch and space."""
    names = (*cut.batch, *(name for names in cut.space for name in names))
    filters, over = (
        (reading.form.filters, cut.filters) if reading.outputs else (reading.form.channels, cut.channels)
    )  # fmt: skip
    if cut.shards(names) > 1:
        size = filters // cut.shards(cut.groups or over) * reading.form.sums.itemsize
        yield Exchange("all-reduce", "bias", names, 0, size)


def _device(kinds: Sequence[str], platform: str, form: Any, cut: Cut, batch: int) -> DevicePlan:
    samples = -(-batch // cut.shards(cut.batch))
    plans, held = [], []
    for kind in kinds:
        part, lines = _shards.part_of(kind, form, cut)
        plan = plan_of([kind], platform, part, samples)
        plans.append(plan)
        windows = 0
        if any(lines):
            read, dtype = (
                (part.outputs_shape, form.dtypes[2]) if GRADIENTS[kind] else (part.inputs_shape, form.dtypes[0])
            )
            windows = math.prod(read(samples)) * dtype.itemsize
        held.append(windows + plan.temporary_bytes)
    shapes = _shard_shapes(form, cut, batch)
    x, w, y = (
        math.prod(shapes[role]) * dtype.itemsize for role, dtype in zip("xwy", form.dtypes, strict=True)
    )  # fmt: skip
    # Beside operands and cotangent: the gradients of the kernel and of the operation's inputs, a side of the form.
    results = {("gradients",): w + x, ("outputs", "kernel"): w + y}.get(tuple(kinds), 0)
    return DevicePlan(
        lowering=" and ".join(dict.fromkeys(plan.lowering for plan in plans)),
        multiply_adds=sum(plan.multiply_adds for plan in plans),
        peak_bytes=max(held) + x + w + y + results,
    )
