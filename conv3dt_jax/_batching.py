"""`jax.vmap` of the primitives: a mapped axis joins the batch, the channels, the filters or the groups.

Channels and filters are ordered by group: ``C = (G, C / G)``. An axis that only the inputs have joins the batch; one
that only the kernel has joins the filters, or, for its adjoint, the channels; one that both have becomes groups.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import batching
from jax.sharding import PartitionSpec

from conv3dt_jax import _primitives as p
from conv3dt_jax._primitives import Form


def _front(array: jax.Array, dim: Any) -> jax.Array:
    return jnp.moveaxis(array, dim, 0)


def _through_batch(compute: Callable[[jax.Array], jax.Array], array: jax.Array, dim: Any) -> tuple[jax.Array, int]:
    """Computes with the mapped axis in the batch: before it, or behind one whose type says that it is cut."""
    array = _front(array, dim)
    behind = _is_cut(array, 1)
    array = jnp.moveaxis(array, 0, 1) if behind else array
    first, second = array.shape[:2]
    found = compute(array.reshape(-1 if first and second else 0, *array.shape[2:]))
    return found.reshape(first, second, *found.shape[1:]), int(behind)


def _into(array: jax.Array, dim: int, parts: int, behind: bool = False) -> jax.Array:
    """Puts the leading axis into the axis ``dim`` (counted without it), behind its ``parts`` groups, or ``behind``."""
    size, shape = array.shape[0], array.shape[1:]
    merged = (*shape[:dim], shape[dim] * size, *shape[dim + 1 :])
    if behind:
        return jnp.moveaxis(array, 0, dim + 1).reshape(merged)
    if parts == 1:
        array = _whole(array, dim + 1)
    split = array.reshape(size, *shape[:dim], parts, shape[dim] // parts, *shape[dim + 1 :])
    return jnp.moveaxis(split, 0, dim + 1).reshape(merged)


def _out_of(array: jax.Array, dim: int, parts: int, size: int, behind: bool = False) -> jax.Array:
    """Takes the axis out again and puts it first."""
    shape = array.shape
    if behind:
        split = array.reshape(*shape[:dim], shape[dim] // size, size, *shape[dim + 1 :])
        return jnp.moveaxis(split, dim + 1, 0)
    split = array.reshape(*shape[:dim], parts, size, shape[dim] // parts // size, *shape[dim + 1 :])
    return jnp.moveaxis(split, dim + 1, 0).reshape(size, *shape[:dim], shape[dim] // size, *shape[dim + 1 :])


def _is_cut(array: jax.Array, dim: int) -> bool:
    """Whether the type of an array says so: its pieces stay where they are if other axes come behind."""
    return jax.typeof(array).sharding.spec[dim] is not None


def _whole(array: jax.Array, dim: int) -> jax.Array:
    if not _is_cut(array, dim):
        return array
    cut = jax.typeof(array).sharding
    entries = (entry if i != dim else None for i, entry in enumerate(cut.spec))
    return jax.sharding.reshard(array, cut.update(spec=PartitionSpec(*entries)))


def _outputs(operands: Any, dims: Any, *, form: Form) -> Any:
    (x, w), (xd, wd) = operands, dims
    if wd is None:
        return _through_batch(lambda x: p.outputs(x, w, form), x, xd)
    w = _front(w, wd)
    size = w.shape[0]
    if xd is None:
        behind = _is_cut(w, 4)
        y = p.outputs(x, _into(w, 3, 1, behind), form.with_filters(size))
        return _out_of(y, form.filters_dim, form.groups, size, behind), 0
    y = p.outputs(_into(_front(x, xd), 4, 1), _into(w, 4, 1), form.with_groups(size))
    return _out_of(y, form.filters_dim, 1, size), 0


def _affine(operands: Any, dims: Any, *, form: Form) -> Any:
    (x, w, b), (xd, wd, bd) = operands, dims
    if wd is None and bd is None:
        return _through_batch(lambda x: p.affine(x, w, b, form), x, xd)
    sums = dataclasses.replace(form, dtypes=(*form.dtypes[:2], form.sums))
    y = p.outputs(x, w, sums)[None] if xd is None and wd is None else _front(*_outputs((x, w), (xd, wd), form=sums))
    b = b[None] if bd is None else _front(b, bd)
    b = lax.expand_dims(b, [dim for dim in range(1, 6) if dim != 1 + form.filters_dim])
    return (y + b).astype(form.dtypes[2]), 0


def _inputs(operands: Any, dims: Any, *, form: Form) -> Any:
    (w, y), (wd, yd) = operands, dims
    if wd is None:
        return _through_batch(lambda y: p.inputs(w, y, form), y, yd)
    w = _front(w, wd)
    size = w.shape[0]
    if yd is None:
        behind = form.groups == 1 and _is_cut(w, 5)
        x = p.inputs(_into(w, 4, form.groups, behind), y, form.with_channels(size))
        return _out_of(x, 4, form.groups, size, behind), 0
    x = p.inputs(_into(w, 4, 1), _into(_front(y, yd), form.filters_dim, 1), form.with_groups(size))
    return _out_of(x, 4, 1, size), 0


def _kernel(operands: Any, dims: Any, *, form: Form) -> Any:
    (x, y), (xd, yd) = operands, dims
    size = operands[0].shape[xd] if xd is not None else operands[1].shape[yd]
    if yd is None:
        x = _front(x, xd)
        behind = form.groups == 1 and _is_cut(x, 5)
        w = p.kernel(_into(x, 4, form.groups, behind), y, form.with_channels(size))
        return _out_of(w, 4, form.groups, size, behind), 0
    if xd is None:
        y = _front(y, yd)
        behind = form.groups == 1 and _is_cut(y, 1 + form.filters_dim)
        w = p.kernel(x, _into(y, form.filters_dim, form.groups, behind), form.with_filters(size))
        return _out_of(w, 3, 1, size, behind), 0
    w = p.kernel(_into(_front(x, xd), 4, 1), _into(_front(y, yd), form.filters_dim, 1), form.with_groups(size))
    return _out_of(w, 4, 1, size), 0


def _tangent(operands: Any, dims: Any, *, form: Form) -> Any:
    def both(dx: jax.Array, dw: jax.Array, x: jax.Array, w: jax.Array) -> jax.Array:
        return p.outputs(dx, w, form) + p.outputs(x, dw, form)

    return jax.vmap(both, dims)(*operands), 0


def _gradients(operands: Any, dims: Any, *, form: Form) -> Any:
    def both(x: jax.Array, w: jax.Array, y: jax.Array) -> list[jax.Array]:
        return [p.inputs(w, y, form), p.kernel(x, y, form)]

    return jax.vmap(both, dims)(*operands), [0, 0]


batching.primitive_batchers[p.outputs_p] = _outputs
batching.primitive_batchers[p.affine_p] = _affine
batching.primitive_batchers[p.inputs_p] = _inputs
batching.primitive_batchers[p.kernel_p] = _kernel
batching.primitive_batchers[p.tangent_p] = _tangent
batching.primitive_batchers[p.gradients_p] = _gradients
