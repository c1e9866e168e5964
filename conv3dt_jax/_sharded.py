"""The operation over a mesh of devices, its arrays cut as it is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from conv3dt_jax import _operands
from conv3dt_jax._convolution_spec import check_spec
from conv3dt_jax._operation import run
from conv3dt_jax._placement import MeshAxes, Placement
from conv3dt_jax._spec import Conv3DSpec, Conv3DTransposeSpec


@dataclasses.dataclass(frozen=True)
class Sharded:
    """What `sharded` returns: a function of ``(inputs, kernel, bias=None)``, and where its arrays lie.

    The shardings are for `jax.device_put`, with one axis of batch.

    Attributes:
      mesh: of devices.
      spec: the operation.
      mesh_axes: the axes of the mesh by dimension.

    Example:
      >>> import jax
      >>> import conv3dt_jax as c3t
      >>> spec = c3t.Conv3DTransposeSpec(filters=2, kernel_size=3)
      >>> run = c3t.sharded(jax.make_mesh((jax.device_count(),), ("depth",)), spec, depth="depth")
      >>> run.mesh_axes, run.sharding("inputs").spec
      (MeshAxes(depth='depth'), P(None, 'depth', None, None, None))
    """

    mesh: Mesh | AbstractMesh
    spec: Conv3DTransposeSpec | Conv3DSpec
    mesh_axes: MeshAxes

    @property
    def _placement(self) -> Placement:
        return Placement(self.mesh, self.mesh_axes)

    def sharding(self, name: str) -> NamedSharding:
        """The sharding of the "inputs", the "kernel", the "bias" or the "outputs"."""
        names = ("inputs", "kernel", "bias", "outputs")
        if name not in names:
            raise ValueError(f"`name={name!r}` must be one of {', '.join(map(repr, names))}.")
        return NamedSharding(self.mesh, self._placement.spec_of(self.spec, name))

    def __call__(
        self,
        inputs: ArrayLike,
        kernel: ArrayLike,
        bias: ArrayLike | None = None,
        *,
        output_size: Sequence[int] | None = None,
    ) -> jax.Array:
        """The result of `conv3d_transpose`, or `conv3d`, cut as declared.

        Args:
          inputs: as there. Outside of `jax.jit` arrays that lie elsewhere are moved.
          kernel: likewise.
          bias: ``(F,)``, or None where ``spec.use_bias`` is False.
          output_size: the wanted ``(D, H, W)`` of a transposed convolution, in place of an output padding.
        """
        _operands.check_bias_given(self.spec, bias)
        self._check_devices(inputs)
        inputs, kernel = self._moved("inputs", inputs), self._moved("kernel", kernel)
        bias = None if bias is None else self._moved("bias", bias)
        kernel = _operands.kernel(kernel, self.spec.kernel_layout)
        return run(inputs, kernel, bias, self.spec, output_size, placement=self._placement)

    def _check_devices(self, inputs: Any) -> None:
        """An `AbstractMesh` has none: outside of programs they must be known in another way."""
        if isinstance(self.mesh, Mesh) or isinstance(inputs, jax.core.Tracer):
            return
        lies_on = getattr(getattr(inputs, "sharding", None), "mesh", None)
        if jax.sharding.get_abstract_mesh().empty and getattr(lies_on, "abstract_mesh", None) != self.mesh:
            raise ValueError(
                "`mesh` is an AbstractMesh, which has no devices; call this under jax.set_mesh, or make it with the "
                "jax.sharding.Mesh of the devices."
            )

    def _moved(self, name: str, value: Any) -> Any:
        """An array outside of programs, on its devices: piece by piece where its sizes divide, else whole."""
        if isinstance(value, jax.core.Tracer) or not isinstance(self.mesh, Mesh) or not hasattr(value, "shape"):
            return value
        spec = tuple(self.sharding(name).spec)
        more = len(value.shape) - len(spec)
        if more < 0:  # no axis of batch
            spec = spec[-more:]
        elif more > 0:
            spec = (spec[0], *[None] * more, *spec[1:])
        entries = [
            entry if size % self._placement.over(entry) == 0 else None
            for entry, size in zip(spec, value.shape, strict=True)
        ]
        return jax.device_put(value, NamedSharding(self.mesh, PartitionSpec(*entries)))


def sharded(
    mesh: Mesh | AbstractMesh,
    spec: Conv3DTransposeSpec | Conv3DSpec,
    *,
    batch: str | Sequence[str] | None = None,
    depth: str | Sequence[str] | None = None,
    height: str | Sequence[str] | None = None,
    width: str | Sequence[str] | None = None,
    channels: str | Sequence[str] | None = None,
    filters: str | Sequence[str] | None = None,
    groups: str | Sequence[str] | None = None,
) -> Sharded:
    """`conv3d_transpose`, or `conv3d`, on a mesh of devices: every dimension may be cut, and only halos travel.

    Each device holds a piece of the arrays and computes a piece of the result. Along a cut axis of space it gets from
    its neighbours the few elements that the kernel reaches (`jax.lax.ppermute` in a `jax.shard_map`), and sends them
    its own. Cut channels are summed up over their devices. Both gradients, tangents and all higher derivatives are
    computed in the same way, each with its own halos: values are those of one device to rounding.

    Sizes need not divide: pieces are of equal size, rounded up, and the last ones shorter. Outside of `jax.jit` JAX
    knows no such arrays, and a result whose size does not divide is put together there; inside it stays cut.

    Dimensions that are not cut are whole on every device, and so is an axis of `jax.vmap`, unless it lies over axes of
    its own: by its type, or by ``spmd_axis_name``. Under `jax.jit` a mesh with Explicit axes is set by `jax.set_mesh`,
    as JAX wants it.

    Args:
      mesh: of devices, as `jax.make_mesh` makes them, with axes of type Auto or Explicit.
      spec: the operation, a `Conv3DTransposeSpec` or a `Conv3DSpec`.
      batch: the name of the mesh axis over which it is cut, several names, or None, as all below; see `MeshAxes`.
      depth: likewise.
      height: likewise.
      width: likewise.
      channels: likewise; their number must divide.
      filters: likewise; their number must divide.
      groups: likewise; where there are several, in place of channels and filters.

    Returns:
      A `Sharded`: a function of ``(inputs, kernel, bias=None)``, for `jax.jit` and all other transformations.

    Raises:
      TypeError, ValueError: an axis that the mesh does not have, or for two dimensions; channels that do not divide;
        on a call, a kernel that reaches beyond the neighbour's piece (plain `jax.jit` with a `NamedSharding` takes
        such, with more exchanges), and what `apply` refuses.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import conv3dt_jax as c3t
      >>> mesh = jax.make_mesh((1, jax.device_count()), ("data", "depth"))
      >>> spec = c3t.Conv3DTransposeSpec(filters=2, kernel_size=3, strides=2, padding="same", use_bias=False)
      >>> upsample = c3t.sharded(mesh, spec, batch="data", depth="depth")
      >>> upsample(jnp.ones((1, 16, 8, 8, 4)), jnp.ones((3, 3, 3, 2, 4))).shape
      (1, 32, 16, 16, 2)
      >>> upsample.sharding("outputs").spec
      P('data', 'depth', None, None, None)

    References:
      Jin et al., Spatially Parallel Convolutions, ICLR 2018 workshop.
      Dryden et al., Improving Strong-Scaling of CNN Training by Exploiting Finer-Grained Parallelism, arXiv:1903.06681.
    """
    check_spec(spec)
    axes = MeshAxes(batch, depth, height, width, channels, filters, groups)
    Placement(mesh, axes)
    return Sharded(mesh, spec, axes)
