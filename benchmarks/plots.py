"""Pictures of stored runs, for a README: about 1000 pixels wide."""

from __future__ import annotations

import pathlib
from typing import Any

from benchmarks.contestants import FLOOR, LAX, OURS, TORCH
from benchmarks.report import Results

DPI = 100
MARKS: dict[str, tuple[str, str, str]] = {
    LAX: ("jax.lax (Flax, Keras, Haiku)", "#c0392b", "o"),
    "tensorflow": ("TensorFlow", "#e67e22", "s"),
    "torch": ("PyTorch (better of two layouts)", "#8e44ad", "^"),
    FLOOR: ("matmul of the same multiply-adds + one write", "#7f8c8d", "|"),
}
"""Contestant: label, colour, marker."""


def marks(suite: str) -> dict[str, tuple[str, str, str]]:
    """Those of a suite: a GPU has floors of its own, and of both layouts the better of eager and compiled."""
    if suite != "gpu":
        return MARKS
    _, colour, marker = MARKS[FLOOR]
    return MARKS | {
        "torch": ("PyTorch (best of four ways)", *MARKS["torch"][1:]),
        FLOOR: ("bytes or products at full pace", colour, marker),
    }


def draw(run: dict[str, Any], out: pathlib.Path) -> pathlib.Path | None:
    """The picture of a run, or None where it has none."""
    import matplotlib as mpl

    mpl.use("Agg")
    figures = {"volume": volume, "network": network}
    results = Results(run)
    if not any("median" in record for record in run["results"]):
        return None
    figure = figures.get(run["suite"], ratios)(results)
    path = out / f"{run['suite']}.png"
    figure.savefig(path, dpi=DPI)
    return path


def _time(results: Results, case: str, kind: str, name: str) -> float | None:
    """As `Results.time`, with PyTorch as the better of its two layouts."""
    best = results.best(case, kind, TORCH if name == "torch" else (name,))
    return best[1] if best else None


def _axes(results: Results, height: float, **options: Any) -> Any:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results.kinds), figsize=(10, height), squeeze=False, **options)
    for ax, kind in zip(axes[0], results.kinds, strict=True):
        ax.set_title(kind)
        ax.grid(True, which="major", color="#e4e4e4", linewidth=0.7)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def ratios(results: Results) -> Any:
    """A row a case, a mark a contestant: its time as a multiple of ours, on a logarithmic axis."""
    figure, axes = _axes(results, 1.6 + 0.27 * len(results.cases), sharey=True, layout="constrained")
    for ax, kind in zip(axes, results.kinds, strict=True):
        ax.axvline(1, color="#1f6fb2", linewidth=2, label="ours")
        for name, (label, colour, marker) in marks(results.run["suite"]).items():
            points = []
            for y, case in enumerate(results.cases):
                own, other = results.time(case, kind, OURS), _time(results, case, kind, name)
                points += [(other / own, y)] if own and other else []
            if points:
                ax.scatter(
                    *zip(*points, strict=True),
                    color=colour,
                    marker=marker,
                    s=90 if marker == "|" else 42,
                    linewidth=1.5 if marker == "|" else 0,
                    label=label,
                )
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("")
        ax.set_xlabel("time / ours (right of the line: slower than ours)")
    axes[0].set_yticks(range(len(results.cases)), results.cases)
    axes[0].set_ylim(len(results.cases) - 0.5, -0.5)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    return figure


def volume(results: Results) -> Any:
    """Time against the side of the output, both axes logarithmic."""
    figure, axes = _axes(results, 4.4, sharey=True, layout="constrained")
    sides = {case["name"]: case["outputs"][1] for case in results.run["cases"]}
    marks = {OURS: ("ours", "#1f6fb2", "D"), **{name: mark for name, mark in MARKS.items() if name != FLOOR}}
    for ax, kind in zip(axes, results.kinds, strict=True):
        for name, (label, colour, marker) in marks.items():
            points = [(side, t) for case, side in sides.items() if (t := _time(results, case, kind, name))]
            if points:
                xs, ys = zip(*points, strict=True)
                ax.plot(xs, [1e3 * y for y in ys], color=colour, marker=marker, markersize=5, label=label)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xticks(list(sides.values()), [f"{side}³" for side in sides.values()])
        ax.minorticks_off()
        ax.set_xlabel("output voxels (16 to 16 channels, 3x3x3, stride 2)")
    axes[0].set_ylabel("milliseconds")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return figure


def network(results: Results) -> Any:
    """A bar a contestant: milliseconds of a training step."""
    bars = [
        (f"{name}  {case}" if len(results.cases) > 1 else name, 1e3 * time)
        for case in results.cases
        for name in results.contestants
        if (time := results.time(case, "step", name))
    ]
    figure, (ax, *_) = _axes(results, 1.2 + 0.4 * len(bars), layout="constrained")
    labels, lengths = zip(*bars, strict=True)
    drawn = ax.barh(labels, lengths, color=["#1f6fb2" if label.startswith("ours") else "#b8c4ce" for label in labels])
    ax.bar_label(drawn, fmt="%.0f ms", padding=3)
    ax.invert_yaxis()
    ax.margins(x=0.1)
    ax.set_title("training step of the demo's U-Net")
    return figure
