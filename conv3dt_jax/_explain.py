"""What a call will do on each platform, in numbers, without computing it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike

from conv3dt_jax import _arguments as args
from conv3dt_jax import _choice, _operands
from conv3dt_jax._convolution_spec import check_spec
from conv3dt_jax._mesh_plan import MeshPlan, plan_over_mesh
from conv3dt_jax._operation import opened, read
from conv3dt_jax._placement import MeshAxes, Placement, mesh_axes_of
from conv3dt_jax._plans import Plan, plan_of, size_text
from conv3dt_jax._spec import Conv3DSpec, Conv3DTransposeSpec


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `explain` returns; ``print`` shows it as a table.

    ``multiply_adds`` are those of the definition: every input, tap, channel and filter once, before cropping.
    ``forward`` and ``gradients`` hold a `Plan` for each platform; ``mesh`` is None without one.

    Example:
      >>> import conv3dt_jax as c3t
      >>> spec = c3t.Conv3DTransposeSpec(filters=1, kernel_size=3, strides=2, padding="same")
      >>> plan = c3t.explain((1, 64, 64, 32, 64), spec, platforms=["cpu"])  # doctest: +ELLIPSIS
      inputs  (1, 64, 64, 32, 64) float32, 32.0 MiB
      ...
      >>> plan.multiply_adds, plan.forward["cpu"].lowering, plan.gradients["cpu"].lowering
      (226492416, 'matmul', 'phases')
    """

    input_shape: tuple[int, ...]
    kernel_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    dtype: str
    multiply_adds: int
    input_bytes: int
    kernel_bytes: int
    output_bytes: int
    forward: dict[str, Plan]
    gradients: dict[str, Plan]
    mesh: MeshPlan | None = None

    def __str__(self) -> str:
        rows = [
            f"inputs  {self.input_shape} {self.dtype}, {size_text(self.input_bytes)}",
            f"kernel  {self.kernel_shape}, {size_text(self.kernel_bytes)}",
            f"outputs {self.output_shape}, {size_text(self.output_bytes)}",
            f"{self.multiply_adds:,} multiply-adds",
        ]
        for title, plans in (("result", self.forward), ("both gradients", self.gradients)):
            for platform, plan in plans.items():
                rows.append(
                    f"{platform:5s} {title}: {plan.lowering}, {plan.multiply_adds:,} multiply-adds, "
                    f"about {size_text(plan.temporary_bytes)} of temporaries; {plan.reason}"
                )
        return "\n".join(rows if self.mesh is None else [*rows, str(self.mesh)])


def explain(
    input_shape: Sequence[int],
    spec: Conv3DTransposeSpec | Conv3DSpec,
    *,
    dtype: DTypeLike = jnp.float32,
    output_size: Sequence[int] | None = None,
    platforms: Sequence[str] = ("cpu", "cuda", "hopper", "tpu"),
    mesh: Mesh | AbstractMesh | None = None,
    mesh_axes: MeshAxes | Mapping[str, Any] | None = None,
) -> Explanation:
    """Prints and returns what `apply` would do with inputs of this shape: sizes, lowering and why, work and memory.

    Args:
      input_shape: ``(..., D, H, W, C)``, or ``(..., C, D, H, W)`` with "channels_first".
      spec: the operation.
      dtype: of the inputs and the kernel.
      output_size: as in `apply`.
      platforms: of "cpu", "cuda", "hopper" (NVIDIA GPUs of compute capability 9), "rocm" and "tpu".
      mesh: of devices, which need not be there: a `jax.sharding.AbstractMesh` does as well.
      mesh_axes: over which of its axes the dimensions are cut, as in `sharded`: a `MeshAxes`, or a dict such as
        ``{"batch": "data", "depth": "z"}``.

    Returns:
      An `Explanation`: output shape, multiply-adds, bytes, and for every platform the lowering of the result and of
      both gradients with its reason, its multiply-adds and its temporaries. With a mesh, its ``mesh`` is a `MeshPlan`:
      the shapes that a device holds, what it computes and holds at most, and the bytes that cross each link in a step.

    Raises:
      TypeError, ValueError: as `apply` and `sharded` do; an unknown platform; one of ``mesh`` and ``mesh_axes`` alone.

    Example:
      >>> import conv3dt_jax as c3t
      >>> spec = c3t.Conv3DTransposeSpec(filters=8, kernel_size=2, strides=2)
      >>> plan = c3t.explain((1, 4, 4, 4, 3), spec, platforms=["cpu"])
      inputs  (1, 4, 4, 4, 3) float32, 768 B
      kernel  (2, 2, 2, 8, 3), 768 B
      outputs (1, 8, 8, 8, 8), 16.0 KiB
      12,288 multiply-adds
      cpu   result: matmul, 12,288 multiply-adds, about 16.0 KiB of temporaries; no outputs overlap: ...
      cpu   both gradients: phases, 24,576 multiply-adds, about 33.5 KiB of temporaries; one gathering ...
      >>> plan.forward["cpu"].lowering
      'matmul'

      4096 devices that nobody has here:

      >>> from jax.sharding import AbstractMesh
      >>> mesh, axes = AbstractMesh((16, 16, 16), ("x", "y", "z")), {"depth": "x", "height": "y", "width": "z"}
      >>> spec = c3t.Conv3DTransposeSpec(filters=16, kernel_size=3, strides=2, padding="same")
      >>> plan = c3t.explain((1, 2048, 2048, 2048, 32), spec, platforms=["tpu"], mesh=mesh, mesh_axes=axes)
      inputs  (1, 2048, 2048, 2048, 32) float32, 1024.0 GiB
      ...
      >>> plan.mesh.output_shape, plan.mesh.link_bytes[("x",)]
      ((1, 256, 256, 256, 16), 4194304)
    """
    check_spec(spec)
    for platform in platforms:
        args.choice("platforms", platform, (*_choice.PLATFORMS, _choice.HOPPER))
    shape = args.shape("input_shape", input_shape)
    batch_dims, spatial, channels = spec.split_shape(shape)
    kernel_shape = spec.kernel_shape(channels)
    _operands.check_shapes(spec, channels, kernel_shape, None)
    operand = jax.ShapeDtypeStruct((), args.dtype_value("dtype", dtype) or jnp.float32)
    sums, result = _operands.result_dtypes(spec, operand, operand)
    geometry = spec.geometry(spatial, output_size)
    reading = read(spec, geometry, channels, operand.dtype, sums, result)
    forward, backward = (["outputs"], ["gradients"]) if reading.outputs else (["inputs"], ["outputs", "kernel"])
    batch = math.prod(batch_dims)
    output_shape = spec.output_shape(shape, output_size)
    over_mesh = None
    if (placement := _placement_of(mesh, mesh_axes)) is not None:
        axes, around = opened(geometry, placement.pieces)
        over = read(spec, axes, channels, operand.dtype, sums, result)
        over_mesh = plan_over_mesh(
            placement, spec, over, batch, channels, platforms, list(zip(geometry, around, strict=True))
        )
    explanation = Explanation(
        input_shape=shape,
        kernel_shape=kernel_shape,
        output_shape=output_shape,
        dtype=str(operand.dtype),
        multiply_adds=batch * math.prod(axis.n for axis in geometry) * math.prod(kernel_shape),
        input_bytes=math.prod(shape) * operand.dtype.itemsize,
        kernel_bytes=math.prod(kernel_shape) * operand.dtype.itemsize,
        output_bytes=math.prod(output_shape) * result.itemsize,
        forward={platform: plan_of(forward, platform, reading.form, batch) for platform in platforms},
        gradients={platform: plan_of(backward, platform, reading.form, batch) for platform in platforms},
        mesh=over_mesh,
    )
    print(explanation)
    return explanation


def _placement_of(mesh: Any, axes: Any) -> Placement | None:
    found = mesh_axes_of(axes)
    if (mesh is None) != (found is None):
        given, missing = ("mesh", "mesh_axes") if found is None else ("mesh_axes", "mesh")
        raise ValueError(f"`{given}` is given without `{missing}`; give both, or none.")
    return None if found is None else Placement(mesh, found)
