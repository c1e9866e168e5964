"""What was measured on: facts that figures need beside them. Standard library only."""

from __future__ import annotations

import os
import pathlib
import platform
import subprocess
from importlib import metadata
from typing import Any

from benchmarks.pool import ALLOCATORS

PACKAGES = ("jax", "jaxlib", "flax", "keras", "equinox", "dm-haiku", "tensorflow-cpu", "torch", "numpy", "conv3dt-jax")
GPU_PACKAGES = ("jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "triton")


def cpu_model() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    named = {key.strip(): value.strip() for key, value in fields.items()}
    numbers = [named[key] for key in ("cpu family", "model") if key in named]
    return f"{named.get('model name', platform.machine())} (family/model {'/'.join(numbers) or 'unknown'})"


def gpu() -> dict[str, str] | None:
    """Name, driver and memory of the first GPU, by NVIDIA's own tool; None where there is none."""
    fields = ("name", "driver_version", "memory.total")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return None
    return dict(zip(fields, (value.strip() for value in lines[0].split(",")), strict=True)) if lines else None


def memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def facts(allocator: str, device: str = "cpu") -> dict[str, Any]:
    versions = {}
    for package in (*PACKAGES, *(GPU_PACKAGES if device == "gpu" else ())):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            if package in PACKAGES:
                versions[package] = "not installed"
    return {
        "cpu": cpu_model(),
        "threads": len(os.sched_getaffinity(0)),
        "memory_gib": memory_gib(),
        "system": f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}",
        "python": platform.python_version(),
        "gpu": gpu() if device == "gpu" else None,
        "allocator": allocator,
        "GLIBC_TUNABLES": ALLOCATORS[allocator],
        "versions": versions,
    }
