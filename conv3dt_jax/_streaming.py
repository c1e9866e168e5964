"""Slabs from the host and back: what neither fits the device nor memory, read and written piece by piece."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from conv3dt_jax import _arguments as args
from conv3dt_jax import _operands, _slab_sizes
from conv3dt_jax._convolution_spec import ConvolutionSpec
from conv3dt_jax._geometry import Geometry
from conv3dt_jax._operation import Reading, computed, is_constant, opened, read
from conv3dt_jax._slabs import Line, lines, part_of

AT_ONCE = 2
"""Slabs held at a time: one is computed while the next is read."""


class Source:
    """Inputs on the host: their shape, with an axis for a single channel, and the dtype they are computed in."""

    def __init__(self, array: Any, spec: ConvolutionSpec, channels: int, dtype: Any) -> None:
        for name in ("shape", "__getitem__"):
            if not hasattr(array, name):
                raise TypeError(
                    f"`inputs` must have a shape and take slices, as arrays do, not {type(array).__name__}."
                )
        shape = tuple(int(size) for size in array.shape)
        self.array, self.spec = array, spec
        self.bare = len(shape) == 3 and channels == 1
        self.shape = spec.join_shape((), shape, 1) if self.bare else shape
        self.dtype = args.dtype_value("dtype", dtype) or self._found()

    def _found(self) -> np.dtype:
        """The dtype as it is read: one that is scaled on the way, as NIfTI's, is not the one stored."""
        corner = np.asarray(self.array[(slice(0, 1),) * len(self.array.shape)])
        return _operands.array("inputs", corner).dtype

    def read(self, sample: Sequence[int], places: Sequence[np.ndarray]) -> np.ndarray:
        """``(d, h, w, C)``, or ``(C, d, h, w)``: the elements at these places of the axes, zeros for places of -1."""
        _, _, channels = self.spec.split_shape(self.shape)
        shape = self.spec.join_shape((), [len(where) for where in places], channels)
        window = np.zeros(shape, self.dtype)
        view = window[0] if self.bare and self._first else window[..., 0] if self.bare else window
        for runs in itertools.product(*map(_runs, places)):
            to = tuple(slice(start, start + length) for start, _, length in runs)
            source = tuple(slice(place, place + length) for _, place, length in runs)
            found = np.asarray(self.array[(*sample, *self._around(source))])
            view[self._around(to)] = found.astype(self.dtype, copy=False)
        return window

    @property
    def _first(self) -> bool:
        return self.spec.data_format == "channels_first"

    def _around(self, spatial: tuple[slice, ...]) -> tuple[slice, ...]:
        return spatial if self.bare else _whole_channels(spatial, self._first)


def _runs(places: np.ndarray) -> list[tuple[int, int, int]]:
    """Neighbours among places, -1 left out: ``(index, place, length)``."""
    breaks = np.flatnonzero(np.diff(places) != 1) + 1
    pieces = zip([0, *breaks], [*breaks, len(places)], strict=True)
    return [(int(a), int(places[a]), int(b - a)) for a, b in pieces for a in [a + int(places[a] < 0)] if b > a]


def stream(
    inputs: Source,
    kernel: jax.Array,
    bias: jax.Array | None,
    spec: ConvolutionSpec,
    geometry: Geometry,
    out: Any,
    *,
    slabs: Any,
    memory_limit: Any,
    progress: bool,
) -> Any:
    """The operation from ``inputs`` to ``out``, slab by slab and sample by sample."""
    batch, _, channels = spec.split_shape(inputs.shape)
    sums, result = _operands.result_dtypes(spec, inputs, kernel)
    shape = spec.join_shape(batch, spec.space(geometry), spec.filters)
    target = Target(out, shape, spec, result)
    axes, around = opened(geometry)
    reading = read(spec, axes, channels, inputs.dtype, sums, result)
    bias = None if bias is None else bias.astype(sums)
    constant = is_constant(batch, geometry)
    samples = 0 if constant else 1  # of a slab
    counts = _slab_sizes.choose(slabs, memory_limit, spec.space(geometry), reading, samples, at_once=AT_ONCE)
    if constant:
        target.fill(bias)
        return out
    cut = lines("outputs" if reading.outputs else "inputs", dataclasses.replace(reading.form, slabs=counts))
    part = dataclasses.replace(reading, form=part_of(reading.form, cut))
    lengths = [axis.n if reading.outputs else axis.out for axis in reading.form.geometry]
    total = math.prod(batch) * math.prod(line.span.count for line in cut)
    waiting: list[tuple[Any, ...]] = []
    with _bar(progress, total) as advance:
        for sample, starts in _walk(batch, cut):
            places = [_places(*every) for every in zip(cut, starts, lengths, around, strict=True)]
            made = _slab(inputs.read(sample, places), kernel, bias, reading=part, spec=spec)
            corner = [start * line.step for start, line in zip(starts, cut, strict=True)]
            waiting.append((sample, corner, made))
            while len(waiting) >= AT_ONCE:  # one is computed while the one before is written, and the next one read
                target.write(*waiting.pop(0))
                advance()
        for last in waiting:
            target.write(*last)
            advance()
    return out


class Target:
    """What the result is written to."""

    def __init__(self, out: Any, shape: tuple[int, ...], spec: ConvolutionSpec, result: np.dtype) -> None:
        for name in ("shape", "dtype", "__setitem__"):
            if not hasattr(out, name):
                raise TypeError(f"`out` must have a shape and a dtype and take slices, not {type(out).__name__}.")
        found = tuple(int(size) for size in out.shape)
        self.out, self.shape, self.spec, self.result = out, shape, spec, result
        self.bare = len(found) == 3 and shape == spec.join_shape((), found, 1)
        if found != shape and not self.bare:
            raise ValueError(f"`out` has shape {found}; the result has {shape}.")
        dtype = np.dtype(getattr(out.dtype, "numpy_dtype", out.dtype))  # TensorStore has dtypes of its own
        if not np.can_cast(result, dtype, "safe"):
            raise TypeError(f"`out` has dtype {dtype}, which does not hold the result's {result}.")

    def write(self, sample: Sequence[int], corner: Sequence[int], made: Any) -> None:
        """One slab of one sample from a corner on."""
        slab = np.asarray(made)[0]
        first = self.spec.data_format == "channels_first"
        space = slab.shape[1:] if first else slab.shape[:-1]
        where = tuple(slice(start, start + size) for start, size in zip(corner, space, strict=True))
        if self.bare:
            self.out[where] = slab[0] if first else slab[..., 0]
        else:
            self.out[(*sample, *_whole_channels(where, first))] = slab

    def fill(self, bias: Any) -> None:
        """The bias everywhere, or zeros."""
        batch, space, filters = self.spec.split_shape(self.shape)
        value = np.zeros(filters, self.result) if bias is None else np.asarray(bias.astype(self.result))
        first = self.spec.data_format == "channels_first"
        for sample, depth in itertools.product(itertools.product(*map(range, batch)), range(space[0])):
            shape = self.spec.join_shape((1,), (1, *space[1:]), filters)
            self.write(sample, (depth, 0, 0), np.broadcast_to(value[:, None, None, None] if first else value, shape))


def _whole_channels(space: tuple[slice, ...], first: bool) -> tuple[slice, ...]:
    return (slice(None), *space) if first else (*space, slice(None))


def _walk(batch: Sequence[int], cut: Sequence[Line]) -> Iterator[tuple[tuple[int, ...], list[int]]]:
    """Every sample and the first cells of every slab."""
    for sample in itertools.product(*map(range, batch)):
        for index in itertools.product(*(range(line.span.count) for line in cut)):
            yield sample, [_start(line, i) for line, i in zip(cut, index, strict=True)]


def _start(line: Line, index: int) -> int:
    return min(index * line.span.block, line.span.length - line.span.block)


def _places(line: Line, start: int, length: int, around: tuple[int, int]) -> np.ndarray:
    """The elements of an axis that a slab takes, -1 for zeros; ``around`` counts what repeats the other end."""
    places = line.scale * start + line.offset + np.arange(line.size)
    if line.wraps:
        return places % length
    inside = (places >= 0) & (places < length)
    return np.where(inside, (places - around[0]) % (length - sum(around)), -1)


@functools.partial(jax.jit, static_argnames=("reading", "spec"))
def _slab(
    slab: jax.Array, kernel: jax.Array, bias: jax.Array | None, *, reading: Reading, spec: ConvolutionSpec
) -> jax.Array:
    return computed(slab[None], kernel, bias, reading, spec)


@contextlib.contextmanager
def _bar(shown: bool, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on standard error; yields what moves it on by a slab."""
    if not shown:
        yield lambda: None
        return
    from rich.console import Console  # comes with Flax; here, so that the function alone does not load it
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("slabs"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("slabs", total=total)
        yield lambda: bar.advance(task)
