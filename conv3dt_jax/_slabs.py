"""A primitive slab by slab: parts along the spatial axes, one after the other, so that little is held at a time.

What results from other elements is computed in slabs of its own elements: the outputs from the inputs that reach them,
the inputs from the outputs that they reach. The kernel, which all of them make up, is summed over slabs of the inputs.
All slabs have one shape: the last one begins earlier where it would stick out, and computes a few elements again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from conv3dt_jax._geometry import Axis, part_of_inputs, part_of_outputs
from conv3dt_jax.lowerings import _tiles
from conv3dt_jax.lowerings._tiles import Span, Window
from conv3dt_jax.lowerings._work import GRADIENTS

WHOLE = (1, 1, 1)
"""One slab along each axis."""


@dataclasses.dataclass(frozen=True)
class Line:
    """The slabs of one axis.

    Attributes:
      axis: of one slab; where there is but one, that of the whole.
      span: the slabs, in cells: an input, or the outputs of a stride.
      wraps: whether what is read begins again at either end.
      scale: elements read for a cell.
      offset: of the first element read, for the first cell.
      size: elements read for a slab.
      step: elements written for a cell.
    """

    axis: Axis
    span: Span
    wraps: bool
    scale: int
    offset: int
    size: int
    step: int

    def window(self, start: Any) -> Window:
        """What a slab that begins at a cell reads."""
        extent = self.size - self.scale * (self.span.block - 1) - 1
        return Window.of(self.span, start, scale=self.scale, offset=self.offset, extent=extent)


def lines(kind: str, form: Any) -> tuple[Line, Line, Line]:
    """The slabs of the three axes of a form, for one of the primitives."""
    depth, height, width = (
        (_line_of_inputs if GRADIENTS[kind] else _line_of_outputs)(axis, count)
        for axis, count in zip(form.geometry, form.slabs, strict=True)
    )
    return depth, height, width


def _line_of_outputs(axis: Axis, count: int) -> Line:
    cells = max(axis.out // axis.s, 1)
    span = _span(cells, count)
    if span.count == 1:
        return Line(axis, Span(1, 1), False, 1, 0, axis.n, 1)
    first, part = part_of_outputs(axis, span.block * axis.s + axis.out - cells * axis.s)
    return Line(part, span, axis.wraps, 1, first, part.n, axis.s)


def _line_of_inputs(axis: Axis, count: int) -> Line:
    span = _span(axis.n, count)
    if span.count == 1:
        return Line(axis, Span(1, 1), False, 1, 0, axis.out, 1)
    first, part = part_of_inputs(axis, span.block)
    return Line(part, span, axis.wraps, axis.s, first, part.out, 1)


def _span(cells: int, count: int) -> Span:
    return Span(cells, -(-cells // min(count, cells)))


def part_of(form: Any, axes: Sequence[Line]) -> Any:
    """The form of one slab."""
    return dataclasses.replace(form, geometry=tuple(line.axis for line in axes), slabs=WHOLE)


def run(compute: Callable[..., Any], kind: str, form: Any, operands: Sequence[jax.Array]) -> Any:
    """``compute(form, *operands)``, one of the primitives, slab by slab."""
    axes = lines(kind, form)
    part = part_of(form, axes)
    if GRADIENTS[kind]:
        return _gradients(compute, kind, form, part, axes, operands)
    return _outputs(compute, form, part, axes, operands, gathered=(0, 2) if kind == "tangent" else (0,))


def _outputs(
    compute: Callable[..., Any],
    form: Any,
    part: Any,
    axes: Sequence[Line],
    operands: Sequence[jax.Array],
    gathered: Sequence[int],
) -> jax.Array:
    """Slabs of the outputs, from the operands that are inputs, ``gathered``."""
    batch, dtype = operands[0].shape[0], form.dtypes[2]

    def body(starts: list[Any], found: jax.Array) -> jax.Array:
        slab = list(operands)
        for place in gathered:
            slab[place] = _read(operands[place], axes, starts, first=1)
        made = _tiles.bits(compute(part, *slab))
        corner = [start * line.step for start, line in zip(starts, axes, strict=True)]
        return _tiles.put(found, made, _tiles.ordered(form.channels_first, 0, *corner, 0))

    found = _tiles.bits(jnp.zeros(form.outputs_shape(batch), dtype))
    return _tiles.values(_tiles.for_each_tile([line.span for line in axes], body, found), dtype)


def _gradients(
    compute: Callable[..., Any], kind: str, form: Any, part: Any, axes: Sequence[Line], operands: Sequence[jax.Array]
) -> Any:
    """Slabs of the inputs, and of the sum that the kernel is, from the outputs."""
    x_dtype, w_dtype, y_dtype = form.dtypes
    part = dataclasses.replace(part, dtypes=(x_dtype, form.sums, y_dtype))
    spans = [line.span for line in axes]
    y = operands[-1]

    def body(starts: list[Any], carry: tuple[Any, Any]) -> tuple[Any, Any]:
        dx, dw = carry
        slab = [*operands[:-1], _read(y, axes, starts, first=2 if form.channels_first else 1)]
        if kind != "inputs":
            sizes = (operands[0].shape[0], *(line.axis.n for line in axes), form.channels)
            x = _tiles.Held.of(operands[0]).cut((0, *starts, 0), sizes)
            slab[0] = _tiles.once(_tiles.values(x, operands[0].dtype), spans, starts, dims=(1, 2, 3))
        made = compute(part, *slab)
        more_x, more_w = made if kind == "gradients" else (made, made)
        dx = None if dx is None else _tiles.put(dx, _tiles.bits(more_x), (0, *starts, 0))
        return dx, None if dw is None else dw + more_w

    dx = None if kind == "kernel" else _tiles.bits(jnp.zeros(form.inputs_shape(y.shape[0]), x_dtype))
    dw = None if kind == "inputs" else jnp.zeros(form.kernel_shape(), form.sums)
    dx, dw = _tiles.for_each_tile(spans, body, (dx, dw))
    found = [None if dx is None else _tiles.values(dx, x_dtype), None if dw is None else dw.astype(w_dtype)]
    return found if kind == "gradients" else next(value for value in found if value is not None)


def _read(array: jax.Array, axes: Sequence[Line], starts: Sequence[Any], first: int) -> jax.Array:
    """What a slab takes of an array whose spatial axes are ``first`` and the next two."""
    windows = [Window(0, size, 0, 0) for size in array.shape]
    part = array
    for dim, (line, start) in enumerate(zip(axes, starts, strict=True), start=first):
        if line.wraps:
            places = (line.scale * start + line.offset + jnp.arange(line.size)) % array.shape[dim]
            part = _tiles.values(jnp.take(_tiles.bits(part), places, axis=dim), array.dtype)
            windows[dim] = Window(0, line.size, 0, 0)
        else:
            windows[dim] = line.window(start)
    return _tiles.values(_tiles.read(_tiles.Held.of(part), windows), array.dtype)
