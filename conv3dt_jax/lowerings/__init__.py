"""The lowerings, by name. Each file has `lower` (the computation) and `refusal` (why it cannot, or None)."""

from types import ModuleType

from conv3dt_jax.lowerings import dilated, matmul, phases

LOWERINGS: dict[str, ModuleType] = {"dilated": dilated, "matmul": matmul, "phases": phases}
