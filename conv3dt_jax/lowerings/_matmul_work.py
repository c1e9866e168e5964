"""What `matmul` costs for a call, by how it makes its products (`_matmul_plans`)."""

from __future__ import annotations

import dataclasses
import math

from conv3dt_jax._geometry import Geometry, tap_phases
from conv3dt_jax.lowerings import _kernel_rows, _matmul_plans
from conv3dt_jax.lowerings._laid_out import in_one_pass
from conv3dt_jax.lowerings._work import Call, Work

MANY_TERMS, UNSTRIDED = 12, 4
"""Products in an output from which on each costs more to lay out; without strides a fourth of them count."""

IN_CACHE, WRITTEN, FOLDED, ONCE, IN_ROWS = 0.3, 2.0, 0.6, 0.2, 0.4
"""What a product costs within a block, a value that a block writes, and a product for each axis beyond the first along
which it is added to others, or for all of these in one pass, or in rows of a plane, in values that leave the cache."""

GROUPED, MOVED, WALKED = 2.2, 1.4, 1.15
"""What a product of a group costs, and an input that is moved to its group, likewise; how much more blocks cost that
walk groups too."""


def work(call: Call, *, gradients: int) -> Work:
    """A product for every input, tap and filter, each laid out and added; the kernel, as it is read.

    Temporaries: the products; and, but in one pass, a transposed copy and the sums so far.
    """
    found = _work(call, gradients)
    if gradients or not _matmul_plans.by_planes(call):
        return found
    samples, filters = _matmul_plans.plane_spans(call)
    block = _matmul_plans.held(call) * samples.block * filters.block // (call.batch * call.filters)
    return dataclasses.replace(found, temporary_bytes=2 * block)


def _work(call: Call, gradients: int) -> Work:
    products = _matmul_plans.products_of(call)
    bytes_held = _matmul_plans.held(call)
    kernel = _matmul_plans.kernel_values(call)
    multiply_adds = products * call.channels // call.groups
    laid_out = products * _laid_out(call.geometry)
    if _matmul_plans.is_elementwise(call) and not gradients:
        return Work(multiply_adds, products, 0)
    if gradients:
        return Work(gradients * multiply_adds, int(gradients * laid_out), 3 * bytes_held)
    written = call.batch * math.prod(axis.out for axis in call.geometry) * call.filters
    if _matmul_plans.in_blocks(call):
        more = _matmul_plans.repeated(call)
        values = (IN_CACHE * laid_out * more + WRITTEN * written) * (WALKED if call.groups > 1 else 1)
        return Work(int(multiply_adds * more), int(values), 3 * min(bytes_held, _matmul_plans.block_bytes(call)))
    if _matmul_plans.by_rows(call):
        kept = call.batch * _kernel_rows.kept(call.geometry) * call.filters
        values = int(written + IN_ROWS * kept) if _matmul_plans.is_plane(call.geometry) else kept
        return Work(kept * call.channels, values + kernel, 2 * bytes_held + kernel * call.itemsize)
    if call.groups > 1:
        moved = _matmul_plans.inputs_of(call) * call.channels
        return Work(multiply_adds, int(GROUPED * laid_out + MOVED * moved) + kernel, 3 * bytes_held)
    strided = any(axis.s > 1 for axis in call.geometry)  # then one axis is folded as the result is written
    folds = max(sum(axis.overlaps for axis in call.geometry) - strided, 0)
    at_once = in_one_pass(call.geometry)
    each = min(folds, 1) * ONCE if at_once else folds * FOLDED
    values = written + each * laid_out + kernel
    copied = not (at_once or folds == 0) or not _matmul_plans.on_cpu(call)
    return Work(multiply_adds, int(values), bytes_held * (3 if copied else 1))


def _laid_out(geometry: Geometry) -> float:
    """What laying out a product costs, in products that few others are added to."""
    terms = math.prod(len({block for block, _ in tap_phases(axis)}) for axis in geometry)
    many = MANY_TERMS * (UNSTRIDED if all(axis.s == 1 for axis in geometry) else 1)
    return max(1.0, terms / many)
