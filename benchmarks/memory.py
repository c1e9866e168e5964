"""Peak memory against volume, of the whole and of slabs: ``python -m benchmarks.memory``.

Each figure is a process of its own, which loads, compiles and computes once; memory is its anonymous resident memory
(pages of files, which the system takes back when it needs them, are left out), less what it is with JAX loaded and no
volume. The host form reads from and writes to memory maps.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

SIZES = (64, 128, 192, 256, 320, 384)
FORMS = ("whole", "tiled", "host")
CHANNELS, FILTERS, KERNEL = 8, 2, 3
LIMIT = "64MiB"
INTERVAL = 0.002
"""Seconds between two looks at the memory."""


def anonymous_bytes() -> int:
    """Of this process, resident."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("the system does not tell anonymous memory (RssAnon)")


class Peak(threading.Thread):
    """The most anonymous memory while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes, self.over = 0, threading.Event()

    def run(self) -> None:
        while not self.over.wait(INTERVAL):
            self.bytes = max(self.bytes, anonymous_bytes())


def measure(form: str, size: int) -> dict[str, float]:
    """The peak, and the seconds with compilation, for ``size``^3 outputs."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import conv3dt_jax as c3t

    kernel = jnp.ones((KERNEL, KERNEL, KERNEL, FILTERS, CHANNELS), jnp.float32)
    keywords: dict[str, Any] = {"strides": 2, "padding": "same"}
    jax.block_until_ready(kernel + 1)
    peak, before = Peak(), anonymous_bytes()
    half = size // 2
    with tempfile.TemporaryDirectory(dir=pathlib.Path.cwd()) as folder:
        peak.start()
        started = time.perf_counter()
        if form == "host":
            paths = [pathlib.Path(folder, name) for name in ("in.npy", "out.npy")]
            shapes = [(1, half, half, half, CHANNELS), (1, size, size, size, FILTERS)]
            x, y = (
                np.lib.format.open_memmap(path, "w+", np.float32, shape)
                for path, shape in zip(paths, shapes, strict=True)
            )
            c3t.tiled(x, kernel, **keywords, memory_limit=LIMIT, out=y, progress=False)
        else:
            volume = jnp.ones((1, half, half, half, CHANNELS), jnp.float32)
            keywords |= {"memory_limit": LIMIT} if form == "tiled" else {"slabs": 1}
            jax.block_until_ready(c3t.tiled(volume, kernel, **keywords))
        seconds = time.perf_counter() - started
        peak.over.set()
        peak.join()
    return {"bytes": peak.bytes - before, "seconds": seconds}


def operands_bytes(size: int) -> int:
    """Inputs and outputs."""
    return 4 * (CHANNELS * (size // 2) ** 3 + FILTERS * size**3)


def table(found: dict[tuple[str, int], dict[str, float]], sizes: Sequence[int]) -> str:
    heads = [
        "outputs",
        "inputs and outputs, MiB",
        *(f"{form}, MiB" for form in FORMS),
        *(f"{form}, s" for form in FORMS),
    ]
    rows = [heads, ["---:"] * len(heads)]
    for size in sizes:
        cells = [f"{size}^3", f"{operands_bytes(size) / 2**20:.0f}"]
        cells += [f"{found[form, size]['bytes'] / 2**20:.0f}" for form in FORMS]
        cells += [f"{found[form, size]['seconds']:.2f}" for form in FORMS]
        rows.append(cells)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def draw(found: dict[tuple[str, int], dict[str, float]], sizes: Sequence[int], path: pathlib.Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    marks = {"whole": ("the whole", "#c0392b", "s"), "tiled": ("tiled, on the device", "#1f6fb2", "o")}
    marks["host"] = ("tiled, from host to host", "#27ae60", "^")
    voxels = [size**3 / 1e6 for size in sizes]
    ax.plot(voxels, [operands_bytes(size) / 2**20 for size in sizes], "--", color="#7f8c8d", label="inputs and outputs")
    for form, (label, colour, marker) in marks.items():
        ax.plot(voxels, [found[form, size]["bytes"] / 2**20 for size in sizes], marker + "-", color=colour, label=label)
    ax.set(xlabel="million output voxels", ylabel="peak memory, MiB", ylim=(0, None))
    ax.grid(True, color="#e4e4e4", linewidth=0.7)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, metavar="N", help="N^3 outputs")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/bench"))
    parser.add_argument("--one", nargs=2, metavar=("FORM", "N"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], int(args.one[1]))))
        return
    found = {}
    for size, form in tqdm([(size, form) for size in args.sizes for form in FORMS]):
        command = [sys.executable, "-m", "benchmarks.memory", "--one", form, str(size)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[form, size] = json.loads(done.stdout)
    args.out.mkdir(parents=True, exist_ok=True)
    text = f"## Peak memory against volume\n\n{CHANNELS} to {FILTERS} channels, kernel {KERNEL}, stride 2, float32; "
    text += f"`memory_limit={LIMIT!r}`. Seconds with compilation.\n\n{table(found, args.sizes)}\n"
    (args.out / "memory.md").write_text(text)
    draw(found, args.sizes, args.out / "memory.png")
    print(text)


if __name__ == "__main__":
    main()
