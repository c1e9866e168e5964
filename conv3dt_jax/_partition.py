"""The primitives under plain `jax.jit` on several devices, where the compiler's partitioner cuts them.

It asks for the shards of the operands, given those of the result, and for the computation on them (`_shards`).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax._src import dispatch, sharding_impls  # what custom_partitioning itself takes of them has no public name
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from conv3dt_jax import _choice, _shards
from conv3dt_jax._cut import ROLES, agreed


@functools.partial(custom_partitioning, static_argnums=(0, 1, 2))
def partitioned(kind: str, platform: str, form: Any, *operands: jax.Array) -> Any:
    """`_choice.run`, which the partitioner may cut; within `jax.jit`, which keeps the constants it has."""
    return jax.jit(functools.partial(_choice.run, kind, platform, form))(*operands)


def is_asked(ctx: Any) -> bool:
    """Whether a module is lowered for several devices of one mesh, by a partitioner that calls back.

    Exported modules hold no calls back, in `jax.shard_map` everything is local, and the partitioner before Shardy wants
    rules of another kind: there the compiler cuts the programs of the lowerings as it finds them.
    """
    if not jax.config.jax_use_shardy_partitioner:  # type: ignore[attr-defined]
        return False
    module = ctx.module_context
    mesh = getattr(module.axis_context, "abstract_mesh", None)  # that of the shardings; none in a manual computation
    return mesh is not None and mesh.size > 1 and not module.lowering_parameters.for_export


def tell_devices(primitive: Primitive) -> None:
    """Has JAX tell the lowering rules of a primitive about devices and mesh, as for its own that are partitioned."""
    dispatch.prim_requires_devices_during_lowering.add(primitive)


def _refined(mesh: Mesh) -> Mesh:
    """The mesh with axes of prime sizes: a dimension may be cut over a part of an axis, as reshapes bring it about."""
    names, sizes = [], []
    for name, size in mesh.shape.items():
        for i, factor in enumerate(_primes(size)):
            names.append(f"{name}.{i}")
            sizes.append(factor)
    return Mesh(mesh.devices.reshape(sizes), names)


def _primes(number: int) -> list[int]:
    """Its prime factors; of 1, itself."""
    found, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            found.append(divisor)
            number //= divisor
        divisor += 1
    return found or [1]


def _spec(value: Any, mesh: Mesh) -> PartitionSpec:
    """How the partitioner cuts an array; one that has no words for the mesh is taken whole."""
    if value.sharding is None:
        return PartitionSpec()
    found = value.sharding._to_xla_hlo_sharding(len(value.shape))
    try:
        return sharding_impls.parse_flatten_op_sharding(found, mesh)[0]
    except Exception:  # an error here would end the compilation
        return PartitionSpec()


def _partition(kind: str, platform: str, form: Any, mesh: Any, operands: Any, results: Any) -> Any:
    roles, made = ROLES[kind]
    found = results if isinstance(results, list | tuple) else [results]
    mesh = _refined(mesh)
    specs: dict[str, PartitionSpec] = {}
    for role, value in [*zip(made, found, strict=True), *zip(roles, operands, strict=True)]:
        specs.setdefault(role, _spec(value, mesh))
    cut = agreed(kind, form, mesh, specs)
    batch = next(value.shape[0] for role, value in zip(roles, operands, strict=True) if role in "xy")

    def local(*shards: jax.Array) -> Any:
        results = _shards.local(kind, platform, form, cut, batch, *shards)
        return results if kind == "gradients" else results[0]

    shardings = {role: NamedSharding(mesh, cut.spec(role, form)) for role in "xwyb"}
    result = [shardings[role] for role in made]
    return mesh, local, result if kind == "gradients" else result[0], tuple(shardings[role] for role in roles)


def _rule(kind: str, platform: str, form: Any, mesh: Any, operands: Any, results: Any) -> tuple[str, dict[str, Any]]:
    """How the dimensions belong together: n, (d, h, w), channels c and filters f of groups g."""
    each_c, each_f = form.channels // form.groups, form.filters // form.groups
    sizes: dict[str, int] = {}
    channels, filters = "c", "f"
    if form.groups > 1:  # a factor of one element must not stand beside another
        channels, filters = ("(g c)" if each_c > 1 else "g"), ("(g f)" if each_f > 1 else "g")
        sizes = ({"c": each_c} if each_c > 1 else {}) | ({"g": form.groups} if min(each_c, each_f) > 1 else {})
    words = {
        "x": f"n d h w {channels}",
        "w": f"i j k f {channels}",
        "y": f"n {filters} d h w" if form.channels_first else f"n d h w {filters}",
        "b": filters,
    }
    roles, made = ROLES[kind]
    rule = ", ".join(words[role] for role in roles) + " -> " + ", ".join(words[role] for role in made)
    return rule, {"need_replication_factors": ("i", "j", "k"), **sizes}


partitioned.def_partition(_partition, sharding_rule=_rule, decode_shardings=False)
