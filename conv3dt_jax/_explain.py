"""What a call will do on each platform, in numbers, without computing it."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from conv3dt_jax import _arguments as args
from conv3dt_jax import _choice, _operands
from conv3dt_jax._convolution_spec import check_spec
from conv3dt_jax._operation import read
from conv3dt_jax._primitives import Form
from conv3dt_jax._spec import Conv3DSpec, Conv3DTransposeSpec
from conv3dt_jax.lowerings import LOWERINGS
from conv3dt_jax.lowerings._work import GRADIENTS, Call


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one platform computes the result, or both gradients.

    ``lowering`` names two where the gradients are computed apart and differently. ``multiply_adds`` are those made,
    zeros included; ``temporary_bytes`` an estimate of the most held at a time beside operands and results (on a CPU;
    accelerators choose for themselves).
    """

    lowering: str
    reason: str
    multiply_adds: int
    temporary_bytes: int


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `explain` returns; ``print`` shows it as a table.

    ``multiply_adds`` are those of the definition: every input, tap, channel and filter once, before cropping.
    ``forward`` and ``gradients`` hold a `Plan` for each platform.

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
        return "\n".join(rows)


def explain(
    input_shape: Sequence[int],
    spec: Conv3DTransposeSpec | Conv3DSpec,
    *,
    dtype: DTypeLike = jnp.float32,
    output_size: Sequence[int] | None = None,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
) -> Explanation:
    """Prints and returns what `apply` would do with inputs of this shape: sizes, lowering and why, work and memory.

    Args:
      input_shape: ``(..., D, H, W, C)``, or ``(..., C, D, H, W)`` with "channels_first".
      spec: the operation.
      dtype: of the inputs and the kernel.
      output_size: as in `apply`.
      platforms: of "cpu", "cuda", "rocm" and "tpu".

    Returns:
      An `Explanation`: output shape, multiply-adds, bytes, and for every platform the lowering of the result and of
      both gradients with its reason, its multiply-adds and its temporaries.

    Raises:
      TypeError, ValueError: as `apply` does; an unknown platform.

    Example:
      >>> import conv3dt_jax as c3t
      >>> spec = c3t.Conv3DTransposeSpec(filters=8, kernel_size=2, strides=2)
      >>> plan = c3t.explain((1, 4, 4, 4, 3), spec, platforms=["cpu"])
      inputs  (1, 4, 4, 4, 3) float32, 768 B
      kernel  (2, 2, 2, 8, 3), 768 B
      outputs (1, 8, 8, 8, 8), 16.0 KiB
      12,288 multiply-adds
      cpu   result: matmul, 12,288 multiply-adds, about 48.0 KiB of temporaries; no outputs overlap: ...
      cpu   both gradients: phases, 24,576 multiply-adds, about 33.5 KiB of temporaries; one gathering ...
      >>> plan.forward["cpu"].lowering
      'matmul'
    """
    check_spec(spec)
    for platform in platforms:
        args.choice("platforms", platform, _choice.PLATFORMS)
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
    )
    print(explanation)
    return explanation


def plan_of(kinds: Sequence[str], platform: str, whole: Form, batch: int) -> Plan:
    """The plan for primitives that are computed one after the other."""
    if batch == 0 or any(axis.is_empty for axis in whole.geometry):
        return Plan("none", "the result is empty, or zeros and bias", 0, 0)
    plans = []
    for kind, form in itertools.chain.from_iterable(_choice.steps(kind, platform, whole) for kind in kinds):
        call = Call.of(form, batch, _choice.room_for(platform, form, batch))
        if form.implementation == "auto":
            name, reason = _choice.decide(kind, platform, form, batch)
        else:
            name, reason = form.implementation, "named by `implementation`"
        work: Any = LOWERINGS[name].work(call, gradients=GRADIENTS[kind])
        plans.append(Plan(name, reason, work.multiply_adds, work.temporary_bytes))
    return Plan(
        lowering=" and ".join(dict.fromkeys(plan.lowering for plan in plans)),
        reason="; ".join(dict.fromkeys(plan.reason for plan in plans)),
        multiply_adds=sum(plan.multiply_adds for plan in plans),
        temporary_bytes=max(plan.temporary_bytes for plan in plans),
    )


def size_text(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.1f} {unit}" if unit != "B" else f"{size} B"
        size /= 1024
    return f"{size:.1f} GiB"
