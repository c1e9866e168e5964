"""How `matmul` makes its products for a call: all at once, by taps or rows, or in blocks."""

from __future__ import annotations

import math
from typing import Any

from conv3dt_jax._geometry import Geometry
from conv3dt_jax.lowerings import _blocks, _kernel_rows, _tiles
from conv3dt_jax.lowerings._cells import cells, is_still, shifts, span
from conv3dt_jax.lowerings._laid_out import in_one_pass, is_written_apart
from conv3dt_jax.lowerings._origin import Origin
from conv3dt_jax.lowerings._work import Call

WHOLE, WHOLE_ROWS = 20 << 20, 8 << 20
"""Bytes of products up to which there are no blocks where there is little to lay out, since a block copies its inputs
first; and where blocks write the rows of their products as they are."""

WHOLE_PLANE, FEW_TERMS, MANY_CHANNELS = 30 << 20, 4, 128
"""The same of planes and lines on a CPU, where blocks read the kernel again, and the heap keeps so much; or as much as
the kernel holds. Not with more products in an output than these, of fewer channels: blocks keep sums in the cache."""

OUT_OF_CACHE, LARGER = 8 << 20, 2
"""Bytes of a kernel from which on no more of it stays in the cache than a tap: planes and lines have no blocks then, up
to so many times its bytes of products, with or without phases that are written apart; nor have rows of a volume."""

WHOLE_CELLS, CACHED = 15 << 20, 256 << 10
"""The same of planes and lines whose blocks write rows as they are, where the result is as large as the products, and
the heap would keep both; and bytes of a kernel that stays in the cache from block to block."""

LITTLE = 8
"""Channels for each product of an input from which on planes and lines have no blocks: these copy their inputs, of
which all products are an eighth at most."""

REPEATED, KEPT = 2.0, 32 << 20
"""Products that blocks make for each that is needed, since they share their rims, beyond which there are no blocks
either; and the bytes of products up to which that is so: what the heap keeps, so that no page is new at a call."""

LEAST_COLUMNS, FEW_CELLS, MOST_ROWS = 32, 64, _tiles.FEW_SLICES
"""Of a product for a row of the kernel: narrower ones are slow; up to so many cells it is no more than a copy of the
kernel's row; and each is compiled."""

WIDE, WIDE_TAPS, WIDE_CHANNELS = 512, 4, 128
"""Columns, taps and channels from which on rows of a plane stay in the cache with what they read, where all do not."""

COPIES, MANY_ROWS, ONE_THREAD = 4 / 5, 64, (1_500_000, 6_000_000)
"""Of a product for each tap, where they are added along two axes at most: inputs for each filter up to which their
copies cost less than a transposed copy of the kernel. Not from so many inputs on where a tap has so many multiply-adds:
too many for one thread, which makes all that are too few for two."""

VOLUME_COPIES, MOST_CELLS, SHORT = 1 / 2, 128, 48
"""The same where they are added along three, and rows are quicker than longer products of taps; and, than a copy of a
kernel that stays in the cache, than these."""

LONG_PRODUCT, COMPILED_TAPS = 224, 36
"""Inputs up to which planes and lines with kernels `OUT_OF_CACHE` have a product for each tap in any case; and from
which on these are laid out as they are made, up to so many taps, since each is compiled."""

PART, MOST_PARTS = 4 << 20, 16
"""Bytes of a tap that stay in the cache as they are packed and multiplied; and parts of a larger one, at most."""

LONG_ROWS, FEW_ROWS = 128, 4
"""Values of a cell's row, and rows of a cell, where blocks write the rows of their products as they are."""

KERNELS, LARGE_BLOCK = 4, 20 << 20
"""Products of a block, in bytes of the kernel, which every block reads again; and their bytes, if these are more than
of other blocks."""

PLANES_WHOLE, PLANES_BLOCK = 13 << 20, 4 << 20
"""Bytes of products up to which a result with the filters second has no blocks, and of a block of several samples, or
as much as the kernel holds."""

LONG_STRIDE, SHORT_LINE, RUN_FILTERS = 4, 128, 16
"""Of several such lines: strides and filters from which on, and inputs up to which, moving runs of taps costs less than
putting single values in order. Not where the kernel, which is copied for it, is the larger."""

FILTERS_BLOCK, READ_AGAIN, FEW_CHANNELS = 8 << 20, 2, 8
"""Bytes of products of a block of filters; or so many times what a sample holds. Where a channel has so many times as
many values as there are channels, else from `WHOLE_PLANE` on: each block copies its part of the kernel."""

OPERANDS = 4
"""`tile_bytes` in the bytes of operands and result: as much may the products of all rows hold, and a block at least."""


def is_elementwise(call: Call) -> bool:
    """Whether every output is one multiplication: XLA makes one pass of it, which holds nothing on the way."""
    return call.channels == call.groups and not any(axis.overlaps for axis in call.geometry)


def block_bytes(call: Call) -> int:
    """Bytes of the products of a block."""
    enough = min(KERNELS * kernel_values(call) * call.itemsize, LARGE_BLOCK)
    overlaps = any(axis.overlaps for axis in call.geometry)
    again = on_cpu(call) and _is_lifted(call.geometry) and overlaps and call.groups == 1
    return enough if again and enough > _tiles.LARGEST else call.tile_bytes


def in_blocks(call: Call) -> bool:
    """Whether the products are too many to be made all at once."""
    if is_elementwise(call):
        return False
    products = math.prod(axis.k for axis in call.geometry) * call.filters
    bytes_held, lifted = held(call), on_cpu(call) and _is_lifted(call.geometry)
    kernel, room = kernel_values(call) * call.itemsize, block_bytes(call)
    if lifted and products * LITTLE <= call.channels:
        return False
    whole = max(WHOLE_PLANE, kernel * (LARGER if kernel >= OUT_OF_CACHE else 1)) if lifted else WHOLE
    if products < call.channels or sum(axis.overlaps for axis in call.geometry) <= 1:  # little to lay out
        if rows_apart(call) and not lifted:
            whole = WHOLE_ROWS
        elif rows_apart(call) and kernel <= CACHED:
            whole = WHOLE_CELLS
        return bytes_held > max(room, whole)
    if is_plane(call.geometry) and in_one_pass(call.geometry):
        terms = math.prod(axis.k / min(axis.s, axis.k) for axis in call.geometry)
        most = WHOLE if terms > FEW_TERMS and call.channels < MANY_CHANNELS else whole
        bytes_held += _phases_apart(call) if kernel < OUT_OF_CACHE else 0
    elif by_rows(call):
        most = max(OPERANDS * call.tile_bytes, _tiles.LARGEST, LARGER * kernel)
    elif inputs_of(call) <= FEW_CELLS:
        most = max(OPERANDS * call.tile_bytes, _tiles.LARGEST)
    else:
        most = room
    if bytes_held <= most:
        return False
    return bytes_held > room and (bytes_held > KEPT or repeated(call) <= REPEATED)


def by_rows(call: Call) -> bool:
    """Whether there is a product for each row of the kernel, where there are no blocks; on a CPU."""
    depth, height, width = call.geometry
    if not on_cpu(call) or call.groups > 1 or depth.wraps or height.wraps:
        return False
    if not all(isinstance(axis.out, int) for axis in call.geometry):
        return False
    wide = width.k > 1 and width.k * call.filters >= LEAST_COLUMNS
    adds = depth.overlaps or height.overlaps
    few = max(depth.k * height.k, depth.s * height.s) <= MOST_ROWS
    if not (adds and wide and few and inputs_of(call) > FEW_CELLS):
        return False
    if not is_plane(call.geometry):
        return True
    in_cache = width.k >= WIDE_TAPS and width.k * call.filters >= WIDE and call.channels >= WIDE_CHANNELS
    return in_cache and _kernel_rows.kept(call.geometry) < math.prod(axis.n * axis.k for axis in call.geometry)


def by_taps(call: Call, origin: Origin) -> bool:
    """Whether there is a product for each tap, where there are no blocks; on a CPU."""
    if not on_cpu(call) or call.groups > 1 or not all(isinstance(axis.out, int) for axis in call.geometry):
        return False
    rows = inputs_of(call)
    if _is_lifted(call.geometry) and parts_of_taps(call) and rows < LONG_PRODUCT:
        return origin.filters_last
    if is_plane(call.geometry):
        least, enough = ONE_THREAD
        if rows >= MANY_ROWS and least <= rows * call.channels * call.filters < enough:
            return False
        most = COPIES * call.filters
    else:
        large = kernel_values(call) * call.itemsize > _tiles.LARGEST
        most = min(VOLUME_COPIES * call.filters, MOST_CELLS if large else SHORT)
    return origin.filters_last and rows <= most


def parts_of_taps(call: Call) -> int:
    """Parts of the channels of which these are made in turn; none where all are made at once, of a small kernel."""
    kernel = kernel_values(call) * call.itemsize
    if kernel < OUT_OF_CACHE:
        return 0
    tap = kernel // math.prod(axis.k for axis in call.geometry)
    few = (parts for parts in range(1, MOST_PARTS + 1) if tap <= parts * PART and call.channels % parts == 0)
    return next(few, 1)


def one_by_one(call: Call, origin: Origin) -> bool:
    """Whether these are products of their own, of all inputs each; in planes and lines, on a CPU."""
    lifted, overlaps = _is_lifted(call.geometry), any(axis.overlaps for axis in call.geometry)
    if not (on_cpu(call) and lifted and overlaps and call.groups == 1 and origin.filters_last):
        return False
    if not all(isinstance(axis.out, int) and not axis.wraps for axis in call.geometry):
        return False
    large = kernel_values(call) * call.itemsize >= OUT_OF_CACHE
    return large and inputs_of(call) >= LONG_PRODUCT and math.prod(axis.k for axis in call.geometry) <= COMPILED_TAPS


def by_samples(call: Call) -> bool:
    """Whether blocks are whole samples, which share no rims; their outputs are written in one piece."""
    overlaps = any(axis.overlaps for axis in call.geometry)
    return overlaps and call.groups == 1 and call.batch > 1 and held(call) <= call.batch * block_bytes(call)


def samples(call: Call) -> _tiles.Span:
    """Blocks of them."""
    each = max(held(call) // call.batch, 1)
    return _tiles.plan((call.batch, 1, 1, 1, 1), each, block_bytes(call))[0]


def by_planes(call: Call) -> bool:
    """Whether a result with the filters second is made as such, see `_planes`; on a CPU."""
    lifted = on_cpu(call) and _is_lifted(call.geometry)
    if not (call.channels_first and lifted and call.groups == 1 and call.batch) or is_elementwise(call):
        return False
    return all(isinstance(axis.out, int) and not axis.wraps for axis in call.geometry)


def in_runs(call: Call) -> bool:
    """Whether lines of such a result are made of the taps of an input each, which are neighbours there."""
    moving = [axis for axis in call.geometry if not is_still(axis)]
    if len(moving) != 1 or call.batch < 2 or call.filters < RUN_FILTERS or products_of(call) < kernel_values(call):
        return False
    (line,) = moving
    return line.overlaps and line.d == 1 and line.s >= LONG_STRIDE and line.n <= SHORT_LINE


def plane_spans(call: Call) -> tuple[_tiles.Span, _tiles.Span]:
    """Blocks of samples and of filters then: several samples, one of them, or some filters of one.

    Each reads its part of the kernel again, and those of filters the sample.
    """
    kernel, filters = kernel_values(call) * call.itemsize, _tiles.Span(call.filters, call.filters)
    if held(call) <= PLANES_WHOLE:
        return _tiles.Span(call.batch, call.batch), filters
    each, values = held(call) // call.batch, inputs_of(call) // call.batch
    samples = _tiles.plan((call.batch, 1, 1, 1, 1), each, max(PLANES_BLOCK, kernel))[0]
    room = max(FILTERS_BLOCK, READ_AGAIN * values * call.channels * call.itemsize)
    if each > (room if call.channels * FEW_CHANNELS <= values else max(room, WHOLE_PLANE)):
        filters = _tiles.Span(call.filters, _tiles.block_of(call.filters, max(room * call.filters // each, 1)))
    return samples, filters


def rows_apart(call: Call) -> bool:
    """Whether a block has a product for each row of the kernel, which is a row of the result as it is."""
    depth, height, width = call.geometry
    as_it_is = all(shifts(axis) == [0] and not axis.overlaps for axis in call.geometry) and width.k == width.s
    filters = call.filters // _blocks.count(call.groups, call.channels, call.filters)
    return as_it_is and width.k * filters >= LONG_ROWS and depth.k * height.k <= FEW_ROWS


def inputs_of(call: Call) -> int:
    """Places of all samples, one row of a product each."""
    return call.batch * math.prod(axis.n for axis in call.geometry)


def products_of(call: Call) -> int:
    """One for every input, tap and filter."""
    return inputs_of(call) * math.prod(axis.k for axis in call.geometry) * call.filters


def held(call: Call) -> int:
    """Bytes of all products."""
    return products_of(call) * call.itemsize


def _phases_apart(call: Call) -> int:
    """Bytes of phases that are written beside the products before they are put in order."""
    if not is_written_apart(call.geometry):
        return 0
    return call.batch * math.prod(cells(axis) * axis.s for axis in call.geometry) * call.filters * call.itemsize


def kernel_values(call: Call) -> int:
    """Of the whole kernel."""
    return math.prod(axis.k for axis in call.geometry) * call.filters * call.channels // call.groups


def _is_lifted(geometry: Geometry) -> bool:
    """Whether it is a plane or a line, with an axis that does nothing."""
    return any(map(is_still, geometry))


def is_plane(geometry: Geometry) -> bool:
    """Whether products are added along two axes at most."""
    return not all(axis.overlaps for axis in geometry)


def on_cpu(call: Call) -> bool:
    return call.tile_bytes <= _tiles.LARGEST


def repeated(call: Call) -> float:
    """How many products blocks make for each that is needed: a block takes all the inputs that reach it."""
    if by_samples(call):
        cut = samples(call)
        return cut.count * cut.block / call.batch
    blocks = _blocks.count(call.groups, call.channels, call.filters)
    batch, _, depth, height = spans(
        call.geometry, call.batch, blocks, call.filters // blocks, call.itemsize, block_bytes(call)
    )
    width = cells(call.geometry[2])
    made = batch.count * batch.block
    for cut, axis in zip((depth, height, _tiles.Span(width, width)), call.geometry, strict=True):
        made *= cut.count * (cut.block + span(axis))
    return made / max(inputs_of(call), 1)


def spans(
    geometry: Geometry, batch: Any, blocks: int, filters: int, itemsize: int, tile_bytes: int
) -> tuple[_tiles.Span, ...]:
    """Blocks of cells, by the products that they take, for ``filters`` of one of the ``blocks`` of groups."""
    largest = max(math.prod(axis.k for axis in geometry), math.prod(axis.s for axis in geometry))
    return _tiles.plan((batch, blocks, *map(cells, geometry)), largest * filters * itemsize, tile_bytes)
