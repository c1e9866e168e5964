"""The contestants by name. Importing this imports no framework: a worker process loads the one module it runs.

Each module has ``prepare(case, kind, variant) -> Prepared``, and takes its operands in its own layout, made once.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from types import ModuleType

OURS, LAX, FLOOR, REFERENCE = "auto", "jax.lax", "floor", "reference"

PEERS: dict[str, tuple[str, str]] = {
    LAX: ("lax", ""),
    "flax": ("flax", ""),
    "keras": ("keras", ""),
    "equinox": ("equinox", ""),
    "haiku": ("haiku", ""),
    "tensorflow": ("tensorflow", ""),
    "torch": ("pytorch", "contiguous"),
    "torch-cl": ("pytorch", "channels_last_3d"),
}
"""Name: (module of this package, variant)."""

TORCH = ("torch", "torch-cl")
OTHER_FRAMEWORKS = ("tensorflow", *TORCH)
GPU_LOWERINGS = ("dilated", "matmul", "phases", "winograd")
"""Those that XLA compiles for a GPU; "pallas" is what "auto" takes there, and takes minutes on a CPU."""

SPECIAL = {FLOOR: ("floor", ""), REFERENCE: ("reference", "")}

NETWORKS: dict[str, tuple[str, str]] = {
    "ours": ("network_jax", "ours"),
    "flax": ("network_jax", "flax"),
    "torch": ("network_torch", "contiguous"),
    "torch-cl": ("network_torch", "channels_last_3d"),
}
"""Those of ``--network``: whole training steps."""


def gpu_contestants() -> dict[str, tuple[str, str]]:
    """Those of ``--platform gpu``."""
    ours = {name: ("ours", name) for name in (OURS, *GPU_LOWERINGS)}
    torch = {name: ("pytorch_device", PEERS[name][1]) for name in TORCH}
    return {**ours, LAX: PEERS[LAX], **torch, FLOOR: ("floor_device", "")}


def lowering_names() -> list[str]:
    """Of a CPU; asked of another process: the orchestrator itself must not load JAX."""
    code = "from conv3dt_jax.lowerings import LOWERINGS; print(*(name for name in LOWERINGS if name != 'pallas'))"
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()


def contestants() -> dict[str, tuple[str, str]]:
    """All that can be timed on a case: ours, every lowering, the peers, the floor."""
    ours = {name: ("ours", name) for name in (OURS, *lowering_names())}
    return {**ours, **PEERS, FLOOR: SPECIAL[FLOOR]}


def load(module: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.contestants.{module}")
