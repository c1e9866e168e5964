"""The lowerings, by name. Each has `outputs`, `gradients`, `work` (what they cost) and `refusal` (why not, or None)."""

from types import ModuleType

from conv3dt_jax.lowerings import dilated, matmul, phases, winograd

LOWERINGS: dict[str, ModuleType] = {"dilated": dilated, "matmul": matmul, "phases": phases, "winograd": winograd}
