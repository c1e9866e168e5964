"""Volumes on meshes that nobody has here, by `conv3dt_jax.explain`: ``python -m benchmarks.planning``.

Nothing is measured, nothing is run: bytes and operations per device, and what they come to with the assumptions below.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import pathlib
from typing import Any

from jax.sharding import AbstractMesh

import conv3dt_jax as c3t

CHANNELS, FILTERS, KERNEL = 32, 16, 3
OUTPUTS = (512, 1024, 2048, 4096)
MESHES = ((1, 1, 1), (2, 2, 2), (4, 4, 4), (8, 8, 8), (16, 16, 16))
MEMORY_GIB = 80
"""Of a device."""
LINK_GB = 50
"""Per second, along each axis of the mesh, in each direction."""
AXES = {"depth": "x", "height": "y", "width": "z"}
PLATFORM = "tpu"
COLUMNS = (
    "outputs",
    "devices",
    "held by each, GiB",
    "TFLOP for each",
    "more than an even share, %",
    "over a link, MiB",
    "over a link, ms",
)


def plan(outputs: int, mesh: tuple[int, int, int]) -> Any:
    """Of a doubling layer in training, ``outputs``^3 of them."""
    spec = c3t.Conv3DTransposeSpec(FILTERS, KERNEL, 2, "same")
    shape = (1, *(outputs // 2,) * 3, CHANNELS)
    with contextlib.redirect_stdout(io.StringIO()):
        return c3t.explain(
            shape, spec, platforms=[PLATFORM], mesh=AbstractMesh(mesh, tuple(AXES.values())), mesh_axes=AXES
        )


def row(outputs: int, mesh: tuple[int, int, int]) -> str:
    explained = plan(outputs, mesh)
    whole = explained.forward[PLATFORM].multiply_adds + explained.gradients[PLATFORM].multiply_adds
    found = explained.mesh
    mine = found.forward[PLATFORM].multiply_adds + found.gradients[PLATFORM].multiply_adds
    peak = max(found.forward[PLATFORM].peak_bytes, found.gradients[PLATFORM].peak_bytes) / 2**30
    sent = max(found.link_bytes.values(), default=0)
    cells = [
        f"{outputs}^3",
        str(math.prod(mesh)),
        digits(peak) + ("" if peak <= MEMORY_GIB else " (too much)"),
        digits(2 * mine / 1e12),
        f"{100 * (math.prod(mesh) * mine / whole - 1):.1f}",
        digits(sent / 2**20),
        digits(1e3 * sent / (LINK_GB * 1e9)),
    ]
    return "| " + " | ".join(cells) + " |"


def digits(value: float) -> str:
    """Three of them, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}" if value else "0"


def report() -> str:
    """The table, as Markdown."""
    return "\n".join([
        "## Volumes on meshes of devices, planned",
        "",
        f"One step of training, the result and both gradients, of `Conv3DTranspose({FILTERS}, {KERNEL}, strides=2, "
        f'padding="same")` on {CHANNELS} channels in float32, a batch of one, cut over a cube of devices along depth, '
        "height and width. Computed by `conv3dt_jax.explain`; nothing is measured. Every device does the same.",
        "",
        f"Assumed: {MEMORY_GIB} GiB of memory for each device, and a torus whose links carry {LINK_GB} GB/s in each "
        "direction along each axis. Held are the shards of inputs, kernel and outputs, their cotangents and gradients, "
        "and windows with their halos; what a platform's convolution needs for itself is not known. The milliseconds "
        "are the bytes over the busiest link by its rate, the least that they can take; computing is another matter.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{' ---: |' * len(COLUMNS)}",
        *(row(outputs, mesh) for outputs in OUTPUTS for mesh in MESHES),
        "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = pathlib.Path("benchmarks/results/planning.md")
    parser.add_argument("--out", type=pathlib.Path, default=default, help="where the table goes")
    path = parser.parse_args().out
    path.write_text(report())
    print(report())


if __name__ == "__main__":
    main()
