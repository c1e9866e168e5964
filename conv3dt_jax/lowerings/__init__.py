"""The lowerings, by name.

Each has `outputs`, `gradients`, `work` (what 0, 1 or 2 gradients cost; 0 is the result), `refusal` (why not, or None).
"""

from types import ModuleType

from conv3dt_jax.lowerings import dilated, matmul, pallas, phases, winograd

LOWERINGS: dict[str, ModuleType] = {
    "dilated": dilated, "matmul": matmul, "phases": phases, "winograd": winograd, "pallas": pallas
}  # fmt: skip
