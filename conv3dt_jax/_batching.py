"""`jax.vmap` of the primitives: a mapped axis joins the batch, the channels, the filters or the groups.

Channels and filters are ordered by group: ``C = (G, C / G)``. An axis that only the inputs have joins the batch; one
that only the kernel has joins the filters, or, for its adjoint, the channels; one that both have becomes groups.

Where a form is cut over a mesh, a mapped axis that lies over mesh axes of its own (by its type, or by
``spmd_axis_name``) brings them along, and one that does not comes behind what is cut, which so stays where it is.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import batching

from conv3dt_jax import _primitives as p
from conv3dt_jax._cut import Names, entry_of, names_of, reshaped
from conv3dt_jax._primitives import Form


def _front(array: jax.Array, dim: Any) -> jax.Array:
    return jnp.moveaxis(array, dim, 0)


@dataclasses.dataclass(frozen=True)
class Joined:
    """A mapped axis of ``size`` over the mesh axes ``names``, and one of the form over ``own`` that it joins.

    It stands before that one, but behind its ``parts`` groups; or behind all of it.
    """

    size: int
    names: Names
    own: Names
    parts: int = 1

    @property
    def behind(self) -> bool:
        return bool(self.own) and not self.names and self.parts == 1

    @property
    def cut(self) -> Names:
        return self.names + self.own

    def merged(self, array: jax.Array, dim: int) -> jax.Array:
        """Puts the leading axis into the axis ``dim`` (counted without it)."""
        shape = array.shape[1:]
        size = self.size * shape[dim] if self.size and shape[dim] else 0
        if self.behind:
            array = jnp.moveaxis(array, 0, dim + 1)
        elif self.parts == 1:
            array = jnp.moveaxis(array, 0, dim)
        else:
            split = (*shape[:dim], self.parts, shape[dim] // self.parts, *shape[dim + 1 :])
            array = jnp.moveaxis(array.reshape(self.size, *split), 0, dim + 1)
        entries = _entries(array)
        others = entries[:dim], entries[dim + (2 if self.parts == 1 else 3) :]
        return reshaped(array, (*shape[:dim], size, *shape[dim + 1 :]), (*others[0], entry_of(self.cut), *others[1]))

    def split(self, array: jax.Array, dim: int) -> jax.Array:
        """Takes it out again and puts it first."""
        shape, entries = array.shape, _entries(array)
        one = shape[dim] // self.size
        sizes: tuple[int, ...] = (self.size, one)
        cuts: tuple[Any, ...] = (entry_of(self.names), entry_of(self.own))
        if self.behind:
            sizes, cuts = sizes[::-1], cuts[::-1]
        elif self.parts > 1:
            sizes, cuts = (self.parts, self.size, one // self.parts), (cuts[1], cuts[0], None)
        array = reshaped(
            array, (*shape[:dim], *sizes, *shape[dim + 1 :]), (*entries[:dim], *cuts, *entries[dim + 1 :])
        )  # fmt: skip
        array = jnp.moveaxis(array, dim + (1 if self.behind or self.parts > 1 else 0), 0)
        return array if self.parts == 1 else array.reshape(self.size, *shape[:dim], one, *shape[dim + 1 :])


def _entries(array: jax.Array) -> tuple[Any, ...]:
    return tuple(jax.typeof(array).sharding.spec)


def _joined(axis: Any, form: Form, dimension: str, parts: int = 1) -> Joined:
    names = () if form.cut is None else names_of(axis.spmd_name or axis.explicit_mesh_axis)
    return Joined(axis.size, names, () if form.cut is None else getattr(form.cut, dimension), parts)


def _with(form: Form, **cuts: Any) -> Form:
    return form if form.cut is None else dataclasses.replace(form, cut=dataclasses.replace(form.cut, **cuts))


def _through_batch(
    axis: Any, compute: Callable[[jax.Array, Form], jax.Array], array: jax.Array, dim: Any, form: Form
) -> tuple[jax.Array, int]:
    """Computes with the mapped axis in the batch."""
    joined = _joined(axis, form, "batch")
    found = compute(joined.merged(_front(array, dim), 0), _with(form, batch=joined.cut))
    return joined.split(found, 0), 0


def _through_groups(axis: Any, form: Form) -> tuple[Joined, Form]:
    """Where all operands have the mapped axis: each of its elements is groups of its own."""
    form = form.with_groups(axis.size)
    joined = _joined(axis, form, "groups")
    return joined, _with(form, groups=joined.cut)


def _outputs(axis: Any, operands: Any, dims: Any, *, form: Form) -> Any:
    (x, w), (xd, wd) = operands, dims
    if wd is None:
        return _through_batch(axis, lambda x, form: p.outputs(x, w, form), x, xd, form)
    w = _front(w, wd)
    if xd is None:
        joined = _joined(axis, form, "filters", form.groups)
        kernel = dataclasses.replace(joined, parts=1).merged(w, 3)
        y = p.outputs(x, kernel, _with(form.with_filters(axis.size), filters=joined.cut))
        return joined.split(y, form.filters_dim), 0
    joined, grouped = _through_groups(axis, form)
    y = p.outputs(joined.merged(_front(x, xd), 4), joined.merged(w, 4), grouped)
    return joined.split(y, form.filters_dim), 0


def _affine(axis: Any, operands: Any, dims: Any, *, form: Form) -> Any:
    (x, w, b), (xd, wd, bd) = operands, dims
    if wd is None and bd is None:
        return _through_batch(axis, lambda x, form: p.affine(x, w, b, form), x, xd, form)
    sums = dataclasses.replace(form, dtypes=(*form.dtypes[:2], form.sums))
    if xd is None and wd is None:
        y = p.outputs(x, w, sums)[None]
    else:
        y = _front(*_outputs(axis, (x, w), (xd, wd), form=sums))
    b = b[None] if bd is None else _front(b, bd)
    b = p.beside(b, y)
    b = lax.expand_dims(b, [dim for dim in range(1, 6) if dim != 1 + form.filters_dim])
    return (y + b).astype(form.dtypes[2]), 0


def _inputs(axis: Any, operands: Any, dims: Any, *, form: Form) -> Any:
    (w, y), (wd, yd) = operands, dims
    if wd is None:
        return _through_batch(axis, lambda y, form: p.inputs(w, y, form), y, yd, form)
    w = _front(w, wd)
    if yd is None:
        joined = _joined(axis, form, "channels", form.groups)
        x = p.inputs(joined.merged(w, 4), y, _with(form.with_channels(axis.size), channels=joined.cut))
        return joined.split(x, 4), 0
    joined, grouped = _through_groups(axis, form)
    x = p.inputs(joined.merged(w, 4), joined.merged(_front(y, yd), form.filters_dim), grouped)
    return joined.split(x, 4), 0


def _kernel(axis: Any, operands: Any, dims: Any, *, form: Form) -> Any:
    (x, y), (xd, yd) = operands, dims
    if yd is None:
        joined = _joined(axis, form, "channels", form.groups)
        w = p.kernel(joined.merged(_front(x, xd), 4), y, _with(form.with_channels(axis.size), channels=joined.cut))
        return joined.split(w, 4), 0
    y = _front(y, yd)
    if xd is None:
        joined = _joined(axis, form, "filters", form.groups)
        filters = _with(form.with_filters(axis.size), filters=joined.cut)
        w = p.kernel(x, joined.merged(y, form.filters_dim), filters)
        return dataclasses.replace(joined, parts=1).split(w, 3), 0
    joined, grouped = _through_groups(axis, form)
    w = p.kernel(joined.merged(_front(x, xd), 4), joined.merged(y, form.filters_dim), grouped)
    return joined.split(w, 4), 0


def _tangent(axis: Any, operands: Any, dims: Any, *, form: Form) -> Any:
    pairs = (operands[0], operands[3]), (operands[2], operands[1])
    found = [
        _one(axis, pair, where, functools.partial(p.outputs, form=form), _outputs, form)
        for pair, where in zip(pairs, ((dims[0], dims[3]), (dims[2], dims[1])), strict=True)
    ]
    return found[0] + found[1], 0


def _gradients(axis: Any, operands: Any, dims: Any, *, form: Form) -> Any:
    (x, w, y), (xd, wd, yd) = operands, dims
    dx = _one(axis, (w, y), (wd, yd), functools.partial(p.inputs, form=form), _inputs, form)
    dw = _one(axis, (x, y), (xd, yd), functools.partial(p.kernel, form=form), _kernel, form)
    return [dx, dw], [0, 0]


def _one(axis: Any, operands: Any, dims: Any, alone: Callable[..., Any], rule: Callable[..., Any], form: Form) -> Any:
    """The value with its mapped axis in front; one that no operand has is made."""
    if any(dim is not None for dim in dims):
        return _front(*rule(axis, operands, dims, form=form))
    found = alone(*operands)
    return jnp.broadcast_to(found[None], (axis.size, *found.shape))


def _empty(primitive: Any, operands: Any, dims: Any, form: Form) -> Any:
    """What a mapped axis without elements gives: nothing can be merged with it and split off again."""
    one = [
        jax.ShapeDtypeStruct([size for at, size in enumerate(array.shape) if at != dim], array.dtype)
        for array, dim in zip(operands, dims, strict=True)
    ]
    alone = dataclasses.replace(form, cut=None)
    shapes = jax.eval_shape(functools.partial(primitive.bind, form=alone), *one)
    found = jax.tree.map(lambda aval: jnp.zeros((0, *aval.shape), aval.dtype), shapes)
    return found, [0] * len(found) if primitive.multiple_results else 0


def _register(primitive: Any, rule: Callable[..., Any]) -> None:
    def batched(axis: Any, operands: Any, dims: Any, *, form: Form) -> Any:
        if any(dim is not None for dim in dims):
            empty = isinstance(axis.size, int) and axis.size == 0
            return _empty(primitive, operands, dims, form) if empty else rule(axis, operands, dims, form=form)
        found = primitive.bind(*operands, form=form)
        return found, [None] * len(found) if primitive.multiple_results else None

    batching.fancy_primitive_batchers[primitive] = batched


_register(p.outputs_p, _outputs)
_register(p.affine_p, _affine)
_register(p.inputs_p, _inputs)
_register(p.kernel_p, _kernel)
_register(p.tangent_p, _tangent)
_register(p.gradients_p, _gradients)
