"""What a kernel was made from: a lowering that undoes that reads it as it lies in memory."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Origin:
    """How a kernel ``(kd, kh, kw, F, C)`` was made from what its caller holds.

    XLA drops a transposition or a reversal that is undone, and copies the kernel for one that is not.

    Attributes:
      mirrored: its taps were reversed along all three axes.
      filters_last: its filters and channels were exchanged.
    """

    mirrored: bool = False
    filters_last: bool = False

    def restored(self, kernel: jax.Array) -> jax.Array:
        """The kernel as it lies: ``(kd, kh, kw, F, C)``, or ``(kd, kh, kw, C, F)`` with ``filters_last``."""
        kernel = jnp.flip(kernel, (0, 1, 2)) if self.mirrored else kernel
        return kernel.swapaxes(3, 4) if self.filters_last else kernel

    def turned(self) -> Origin:
        """Of what `turned_kernel` makes of such a kernel."""
        return Origin(not self.mirrored, not self.filters_last)


AS_GIVEN = Origin()
