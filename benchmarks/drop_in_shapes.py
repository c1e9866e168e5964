"""Times `conv3dt_jax.lax.conv_transpose` beside JAX's own in many random planes and lines, forward.

`python -m benchmarks.drop_in_shapes`: one process, compiled ahead, medians of interleaved rounds. Planes and lines, as
XLA has a product for these, with strides that are shorter than the kernels, and inputs that the kernels fit into: where
they do not, XLA exchanges both, and takes many times as long. Each with the channels last and with the channels first.
"""

from __future__ import annotations

import argparse
import math
import pathlib
import random
import statistics
from collections.abc import Sequence

from tqdm import tqdm

from benchmarks import drop_in, machine
from benchmarks.drop_in import Call
from benchmarks.report import milliseconds, table, times, write_parts

LEAST, MOST, OUTPUTS = 1e6, 1.5e9, 1e7
"""Multiply-adds of a call, and outputs at most."""

SHOWN = 8
"""Of the slowest, by their ratio."""


def shape(seed: int) -> Call:
    """Of a layer that a network might have."""
    draw = random.Random(seed)
    while True:
        dims = draw.choice([1, 2, 2, 2])
        size = draw.choice([32, 100, 256, 500, 1000, 4000] if dims == 1 else [4, 7, 8, 14, 16, 28, 32, 64])
        channels = draw.choice([16, 32, 64, 128, 256, 512])
        filters = draw.choice([channels // 2, channels // 2, channels, 3, 32])
        kernel, stride = draw.choice([3, 4, 8, 16] if dims == 1 else [3, 3, 4, 4, 5]), draw.choice([2, 2, 2, 3, 4, 8])
        batch = draw.choice([1, 1, 2, 4, 8, 16, 32])
        work = batch * (size * kernel) ** dims * channels * filters
        fits = stride < kernel <= size and batch * (size * stride) ** dims * filters < OUTPUTS
        if fits and LEAST < work < MOST:
            inputs, window = (batch, *[size] * dims, channels), (*[kernel] * dims, channels, filters)
            return Call(inputs, window, (stride,) * dims, draw.choice(["SAME", "SAME", "VALID"]))


def described(call: Call) -> str:
    """For a row of a table."""
    size, kernel = ("x".join(map(str, shape)) for shape in (call.inputs[:-1], call.kernel[:-2]))
    return f"{size}, {call.kernel[-2]} to {call.kernel[-1]}, {kernel}, strides of {call.strides[0]}, {call.padding}"


Found = tuple[float, float, float, Call]
"""JAX's time in ours, both times in seconds, and what was called."""


def summary(found: Sequence[Found]) -> str:
    """Of all and of each kind."""
    groups = {
        "all": found,
        "lines": [row for row in found if len(row[3].strides) == 1],
        "planes, SAME": [row for row in found if len(row[3].strides) == 2 and row[3].padding == "SAME"],
        "planes, VALID": [row for row in found if len(row[3].strides) == 2 and row[3].padding == "VALID"],
        "a millisecond of JAX's and more": [row for row in found if row[1] >= 1e-3],
    }
    rows = [
        [
            name,
            str(len(group)),
            times(math.exp(statistics.fmean(math.log(row[0]) for row in group))),
            str(sum(row[0] < 1 for row in group)),
            times(group[0][0]),
            times(group[-1][0]),
        ]
        for name, group in groups.items()
        if group
    ]
    return table(["calls", "count", "faster, geometric mean", "slower", "least", "most"], rows)


def slowest(found: Sequence[Found]) -> str:
    rows = [[described(call), milliseconds(plain), milliseconds(fast), times(r)] for r, plain, fast, call in found]
    return table(["call", "JAX, ms", "ours, ms", "faster"], rows[:SHOWN])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drop_in_shapes", description=__doc__)
    parser.add_argument("--shapes", type=int, default=150)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/bench"))
    args = parser.parse_args()
    found: dict[str, list[Found]] = {"last": [], "first": []}
    for seed, layout in tqdm([(seed, layout) for seed in range(args.shapes) for layout in found]):
        call = shape(seed)._replace(layout=layout)
        plain, fast = drop_in.measure(drop_in.forward_of(call))
        found[layout].append((plain / fast, plain, fast, call))
    facts = machine.facts("default")
    parts = [
        "## Drop-in, random shapes",
        f"{facts['cpu']}, {facts['threads']} threads; float32, forward; medians. jax {facts['versions']['jax']}",
    ]
    for layout, rows in found.items():
        rows.sort(key=lambda row: row[0])
        parts += [f"With the channels {layout}:", summary(rows), "The least:", slowest(rows)]
    write_parts(parts, args.out / "drop-in-shapes.md")


if __name__ == "__main__":
    main()
