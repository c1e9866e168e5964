"""The picture: three planes (image, truth, prediction), the loss and the Dice by step."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from examples.brain_segmentation.data import Subject

_COLOURS = ["#1b1e23", "#e8a33d", "#f4f1e8", "#3b7ea1"]
_INK, _PAPER, _MUTED = "#f2f2f2", "#111316", "#9aa0a6"
_COLUMNS = ("image", "truth", "prediction")


Curves = Mapping[str, tuple[Mapping[str, Sequence[float]], Mapping[str, Sequence[float]]]]
_STYLES = ("-", "--", ":")


def draw(path: pathlib.Path, subject: Subject, prediction: np.ndarray, curves: Curves) -> None:
    """Writes the figure as PNG; ``curves`` are (losses, scores) by network, as `logs.series` reads them."""
    planes = _planes(subject, prediction)
    shapes = [panels[0].shape for _, panels, _ in planes]
    figure = Figure(figsize=(11.5, 8.2), facecolor=_PAPER)
    FigureCanvasAgg(figure)
    outer = figure.add_gridspec(1, 2, width_ratios=[1.6, 1], left=0.035, right=0.98, top=0.89, bottom=0.04, wspace=0.1)
    heights = [height / width for height, width in shapes]
    grid = outer[0].subgridspec(3, 3, height_ratios=heights, hspace=0.05, wspace=0.04)
    for row, (name, panels, mark) in enumerate(planes):
        for column, panel in enumerate(panels):
            axes = figure.add_subplot(grid[row, column])
            _show(axes, panel, len(subject.names), grey=column == 0, mark=mark)
            if row == 0:
                axes.set_title(_COLUMNS[column], color=_INK, fontsize=12)
            if column == 0:
                axes.set_ylabel(name, color=_MUTED, fontsize=10)
    side = outer[1].subgridspec(4, 1, height_ratios=[0.75, 1.3, 1.3, 0.12], hspace=0.32)
    _legend(figure.add_subplot(side[0]), subject)
    _loss(figure.add_subplot(side[1]), curves)
    _dice(figure.add_subplot(side[2]), subject, curves)
    figure.suptitle(
        "A 3-D U-Net with Conv3DTranspose, beyond the dashed line lies what it never saw",
        color=_INK,
        fontsize=14,
        x=0.035,
        ha="left",
    )
    figure.savefig(path, dpi=130, facecolor=_PAPER)


def _planes(subject: Subject, prediction: np.ndarray) -> list[tuple[str, list[np.ndarray], tuple[str, float] | None]]:
    """Coronal, axial and sagittal planes through the held-out part, each as (name, [image, truth, prediction], mark).

    Shown as radiologists do: superior or anterior up, the patient's left on the right of the picture. ``mark`` is where
    the held-out part begins, along which side of the picture.
    """
    box, begin = _bounding_box(subject.labels), subject.split.test
    volumes = [volume[box] for volume in (_brightness(subject), subject.labels, prediction)]
    begin -= box[1].start
    labelled = np.argwhere(volumes[1][:, begin:] > 0)
    x, y, z = np.median(labelled, 0).astype(int) if len(labelled) else np.array(volumes[1].shape) // 2
    y = min(int(y) + begin, volumes[1].shape[1] - 1)
    x = min(int(x) + max(2, volumes[1].shape[0] // 10), volumes[1].shape[0] - 1)  # beside the midline: more tissue
    spacing, scale = subject.spacing, min(subject.spacing)
    coronal = [_upright(volume[::-1, y], spacing[0], spacing[2]) for volume in volumes]
    axial = [_upright(volume[::-1, :, z], spacing[0], spacing[1]) for volume in volumes]
    sagittal = [_upright(volume[x], spacing[1], spacing[2]) for volume in volumes]
    anterior = volumes[1].shape[1] - begin
    return [
        ("coronal, held out", coronal, None),
        ("axial", axial, ("y", anterior * round(spacing[1] / scale))),
        ("sagittal", sagittal, ("x", begin * round(spacing[1] / scale))),
    ]


def _bounding_box(labels: np.ndarray) -> tuple[slice, ...]:
    """The labelled part and a few voxels around it."""
    where = np.argwhere(labels > 0)
    low, high = where.min(0) - 4, where.max(0) + 5
    return tuple(slice(max(0, a), min(b, size)) for a, b, size in zip(low, high, labels.shape, strict=True))


def _upright(plane: np.ndarray, across: float, up: float) -> np.ndarray:
    """A plane (across, up) as picture rows from the top, its voxels made square."""
    unit = min(across, up)
    plane = np.repeat(np.repeat(plane, max(1, round(across / unit)), 0), max(1, round(up / unit)), 1)
    return plane.T[::-1]


def _brightness(subject: Subject) -> np.ndarray:
    low, high = np.percentile(subject.image[subject.labels > 0], [0.5, 99.8])
    return np.clip((subject.image - low) / (high - low), 0, 1)


def _palette(classes: int) -> ListedColormap:
    if classes <= len(_COLOURS):
        return ListedColormap(_COLOURS[:classes])
    spread = matplotlib.colormaps["turbo"](np.linspace(0.1, 0.95, classes - 1))
    return ListedColormap([_COLOURS[0], *spread])


def _show(axes: Any, panel: np.ndarray, classes: int, *, grey: bool, mark: tuple[str, float] | None) -> None:
    limits = (
        {"cmap": "gray", "vmin": 0, "vmax": 1}
        if grey
        else {"cmap": _palette(classes), "vmin": -0.5, "vmax": classes - 0.5}
    )
    axes.imshow(panel, interpolation="bilinear" if grey else "nearest", **limits)
    if mark is not None:
        line = axes.axhline if mark[0] == "y" else axes.axvline
        line(mark[1] - 0.5, color="#ff5a5f", linewidth=1.2, linestyle=(0, (4, 3)))
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _legend(axes: Any, subject: Subject) -> None:
    colours: Any = _palette(len(subject.names)).colors
    shown = list(zip(subject.names, colours, strict=True))[1:9]
    handles: list[Any] = [Patch(facecolor=colour, label=name) for name, colour in shown]
    handles.append(
        matplotlib.lines.Line2D([], [], color="#ff5a5f", linestyle="--", label="held-out part: in front of this line")
    )
    axes.axis("off")
    axes.legend(handles=handles, loc="upper left", frameon=False, labelcolor=_INK, fontsize=10, borderaxespad=0)


def _loss(axes: Any, curves: Curves) -> None:
    for style, (name, (table, _)) in zip(itertools.cycle(_STYLES), curves.items()):
        steps, losses = table["step"], table["loss"]
        width = max(1, min(10, len(losses)))
        smooth = np.convolve(losses, np.ones(width) / width, "valid") if losses else np.zeros(0)
        axes.plot(steps[width - 1 :], smooth, style, color=_COLOURS[1], linewidth=1.6, label=name)
    _finish(axes, "training loss (cross-entropy + 1 - Dice)")
    if len(curves) > 1:
        axes.legend(frameon=False, labelcolor=_INK, fontsize=9)


def _dice(axes: Any, subject: Subject, curves: Curves) -> None:
    colours: Any = _palette(len(subject.names)).colors
    for style, (_, scores) in zip(itertools.cycle(_STYLES), curves.values()):
        for name, colour in list(zip(subject.names, colours, strict=True))[1:9]:
            axes.plot(scores["step"], scores[f"held out {name}"], style, color=colour, linewidth=1.6, marker=".")
    axes.set_ylim(0, 1)
    _finish(axes, "held-out Dice")
    axes.set_xlabel("step", color=_MUTED)


def _finish(axes: Any, title: str) -> None:
    axes.set_facecolor(_PAPER)
    axes.set_title(title, color=_INK, fontsize=11, loc="left")
    axes.tick_params(colors=_MUTED, labelsize=9)
    axes.grid(color="#2a2d31", linewidth=0.6)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_MUTED)
