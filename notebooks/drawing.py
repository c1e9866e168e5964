"""Pictures of transposed convolutions, for the first notebook and the README.

What is drawn is read off `conv3dt_jax.conv3d_transpose` itself, with one-hot inputs and one-hot kernels. The README's
picture, `notebooks/picture.png`, is written by ``python -m notebooks.drawing`` in the root of the repository, or by
``python notebooks/drawing.py``; it needs the extra "examples" and `benchmarks/results/drop-in.md`.
"""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.collections import PolyCollection
from matplotlib.patches import Polygon, Rectangle
from PIL import Image

import conv3dt_jax as c3t

Array = np.ndarray[Any, Any]
TAPS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")  # Okabe and Ito: told apart by colour-blind readers
ISOMETRIC = np.array([[-0.866, -0.5], [0.866, -0.5], [0, 1]])  # of the axes x, y and z on paper
INK, FAINT, INPUT, ACCENT = "#333333", "#b8b8b8", "#cfe3f2", "#D55E00"


def connectivity(
    n: int, kernel: int, stride: int = 1, dilation: int = 1, padding: Any = "valid", output_padding: int | None = None
) -> Array:
    """What `conv3d_transpose` connects on one axis: ``(out, n, kernel)``, 1 where a tap takes an input to an output.

    One call answers: sample i of the batch is the i-th unit vector, filter t is the kernel with tap t alone.
    """
    outputs = c3t.conv3d_transpose(
        np.eye(n, dtype=np.float32).reshape(n, 1, 1, n, 1),
        np.eye(kernel, dtype=np.float32).reshape(1, 1, kernel, kernel, 1),
        strides=(1, 1, stride),
        dilation_rate=(1, 1, dilation),
        padding=padding if isinstance(padding, str) else ((0, 0), (0, 0), padding),
        output_padding=None if output_padding is None else (0, 0, output_padding),
    )
    return np.asarray(outputs)[:, 0, 0].transpose(1, 0, 2).round().astype(int)


def _finish(ax: Any, title: str, loc: str = "center", **limits: Any) -> None:
    ax.set(aspect="equal", **limits)
    ax.axis("off")
    ax.set_title(title, loc=loc, fontsize=10, color=INK)


def _square(ax: Any, x: Any, y: float, label: str, **style: Any) -> None:
    ax.add_patch(Rectangle((x - 0.44, y - 0.44), 0.88, 0.88, **style))
    ax.text(x, y, label, ha="center", va="center", fontsize=8, color=style.get("edgecolor", INK))


def draw_axis(ax: Any, taps: Array, full: Array, lo: int, stride: int, title: str = "", text: str = "") -> None:
    """One axis: inputs below, `stride` apart, outputs above, a line for each tap, in the colour of the tap.

    `taps` is the `connectivity` of the call to be drawn, `full` that of the same call before cropping, in which the
    first output is element `lo`. What is cropped is hatched, its lines faint; lines that wrap around are dashed.
    """
    out, n, _ = taps.shape
    centre, top = np.flatnonzero(full[:, 0].sum(-1))[[0, -1]].mean(), 2.6
    window = np.pad(full, ((0, out), (0, 0), (0, 0)))[lo : lo + out]
    lines: list[Any] = [(lo + o, i, t, {"lw": 1.6}) for o, i, t in np.argwhere(np.minimum(taps, window))]
    lines += [(lo + o, i, t, {"ls": (0, (3, 2)), "lw": 1.3}) for o, i, t in np.argwhere(taps > window)]
    outside = np.ones(len(full), bool)
    outside[lo : lo + out] = False
    lines += [(o, i, t, {"alpha": 0.25, "lw": 1.2}) for o, i, t in np.argwhere(full) if outside[o]]
    for o, i, t, style in lines:
        ax.plot([i * stride + centre, o], [0.44, top - 0.44], color=TAPS[t], **style)
    for i in range(n):
        _square(ax, i * stride + centre, 0, str(i), facecolor=INPUT, edgecolor=INK, lw=1)
    for o in np.flatnonzero(outside):
        _square(ax, o, top, "", facecolor="white", edgecolor=FAINT, lw=0.8, hatch="/////")
    for o, count in enumerate(taps.sum((1, 2))):
        shade = ("white", "#fdebc8", "#f9cf86", "#f2ae43")[min(count, 3)]
        _square(ax, lo + o, top, str(o), facecolor=shade, edgecolor=INK, lw=1)
    right = max(len(full), lo + out)
    ax.text(right, top / 2, text, fontsize=9, va="center", color=INK, linespacing=1.5)
    _finish(ax, title, "left", xlim=(-0.6, right - 0.4), ylim=(-0.6, top + 0.6), anchor="W")


def draw_matrix(ax: Any, taps: Array, title: str, rows: str, columns: str) -> None:
    """The matrix of a convolution on one axis, ``(rows, columns, kernel)``, its elements in the colours of the taps."""
    for row, column, tap in np.argwhere(taps):
        _square(ax, column, row, f"w{tap}", facecolor=TAPS[tap], edgecolor="white", lw=0)
    height, width = taps.shape[:2]
    ax.hlines(np.arange(height + 1) - 0.5, -0.5, width - 0.5, color="#dddddd", lw=0.7, zorder=0)
    ax.vlines(np.arange(width + 1) - 0.5, -0.5, height - 0.5, color="#dddddd", lw=0.7, zorder=0)
    ax.set(xticks=range(width), yticks=range(height), xlabel=columns, ylabel=rows, aspect="equal")
    ax.set(xlim=(-0.6, width - 0.4), ylim=(height - 0.4, -0.6))
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_title(title, fontsize=10, color=INK)


def draw_patches(ax: Any, parts: Array, title: str) -> None:
    """Who reaches which output, ``(inputs, height, width)``: an element is striped in the colours of its inputs."""
    height, width = parts.shape[1:]
    for row, column in np.ndindex(height, width):
        inputs = np.flatnonzero(parts[:, row, column])
        for place, i in enumerate(inputs):
            part, left = 1 / len(inputs), column + place / len(inputs)
            ax.add_patch(Rectangle((left, row), part, 1, facecolor=TAPS[i], alpha=0.8, lw=0))
        ax.add_patch(Rectangle((column, row), 1, 1, facecolor="none", edgecolor="white" if len(inputs) else FAINT))
    _finish(ax, title, xlim=(-0.1, width + 0.1), ylim=(height + 0.1, -0.1))


def _oblique(row: float, column: float, level: float) -> tuple[float, float]:
    return column + 0.5 * row, level - 0.55 * row


def _cell(ax: Any, row: float, column: float, level: float, size: float = 1, label: str = "", **style: Any) -> None:
    corners = [(row, column), (row, column + size), (row + size, column + size), (row + size, column)]
    ax.add_patch(Polygon([_oblique(r, c, level) for r, c in corners], **{"edgecolor": INK, "lw": 0.8, **style}))
    ax.text(*_oblique(row + size / 2, column + size / 2, level), label, ha="center", va="center", fontsize=9)


def draw_step(ax: Any, inputs: Array, total: Array, kernel: int, stride: int, step: int, high: float) -> None:
    """Inputs below, the output above; number `step` of the inputs adds its patch. `high` is the largest output."""
    rows, columns = total.shape
    shift, level, done = (kernel - 1) / 2, rows * 0.55 + 1.2, step == inputs.size
    for index, (i, j) in enumerate(np.ndindex(inputs.shape)):
        style: Any = {"label": f"{inputs[i, j]:g}", "facecolor": ACCENT if index == step else INPUT}
        _cell(ax, i * stride + shift, j * stride + shift, 0, **style)
    for (row, column), value in np.ndenumerate(total):
        colour = plt.get_cmap("YlGnBu")(0.65 * value / high) if value else "white"
        _cell(ax, row, column, level, label=f"{value:g}" if value else "", facecolor=colour, edgecolor="#777777")
    if not done:
        i, j = (stride * index for index in divmod(step, inputs.shape[1]))
        _cell(ax, i, j, level, kernel, facecolor="none", edgecolor=ACCENT, lw=2.5)
        for r, c in np.ndindex(2, 2):
            ends = _oblique(i + shift + r, j + shift + c, 0), _oblique(i + r * kernel, j + c * kernel, level)
            ax.plot(*zip(*ends, strict=True), color=ACCENT, lw=0.8, alpha=0.7)
    ax.text(0, level + 0.35, "output" if done else "output, the sum so far", fontsize=10)
    ax.text(0, -0.55 * rows / 2, "input", fontsize=10)
    _finish(ax, "", xlim=(-0.4, columns + rows / 2 + 0.4), ylim=(-0.55 * (rows - shift), level + 1))


def _image(figure: Any) -> Any:
    figure.canvas.draw()
    return (
        Image.fromarray(np.asarray(figure.canvas.buffer_rgba()))
        .convert("RGB")
        .quantize(256, Image.Quantize.MAXCOVERAGE, 3)
    )


def animate(inputs: Array, sums: Array, kernel: int, stride: int, milliseconds: int = 800) -> bytes:
    """A GIF of `draw_step`: ``sums[i]`` is the uncropped output after the inputs up to number i."""
    figure, frames = plt.figure(figsize=(5.4, 4.6), dpi=80, facecolor="white"), []
    for step in range(inputs.size + 1):
        figure.clear()
        ax = figure.add_axes((0, 0, 1, 1))
        draw_step(ax, inputs, sums[min(step, inputs.size - 1)], kernel, stride, step, sums.max())
        frames.append(_image(figure))
    plt.close(figure)
    stored, durations = io.BytesIO(), [milliseconds] * inputs.size + [3 * milliseconds]
    frames[0].save(stored, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return stored.getvalue()


def draw_voxels(ax: Any, colours: Array, filled: Array, origin: Any = (0, 0), size: float = 1, lw: float = 0.5) -> None:
    """Voxels ``(x, y, z)`` seen from the corner where all three are largest, in `colours` ``(x, y, z, RGB)``."""
    axes = size * ISOMETRIC
    padded = np.pad(filled, ((0, 1),) * 3)
    depths, polygons, faces = [], [], []
    for axis, light in enumerate((0.86, 0.7, 1.0)):
        u, v = (axes[other] for other in range(3) if other != axis)
        where = np.argwhere(filled & ~np.roll(padded, -1, axis)[:-1, :-1, :-1])
        corner = np.asarray(origin) + where @ axes + axes[axis]
        polygons.append(corner[:, None] + np.array([0 * u, u, u + v, v]))
        faces.append(colours[tuple(where.T)][:, :3] * light)
        depths.append(where.sum(-1))
    order = np.argsort(np.concatenate(depths), kind="stable")
    shapes: Any = np.concatenate(polygons)[order]  # the nearest last
    style: Any = {"facecolors": np.concatenate(faces)[order], "edgecolors": (0.2, 0.2, 0.2, 0.55), "linewidths": lw}
    ax.add_collection(PolyCollection(shapes, **style))
    _finish(ax, "")


def _draw_brain(ax: Any, volume: Array, cut: Sequence[int], patch: tuple[slice, ...], tint: Array, left: float) -> None:
    """A brain without its octant from `cut` on, the block `patch` in the colours `tint`; about 38 units wide."""
    filled = volume > 0.45
    filled[tuple(slice(start, None) for start in cut)] = False
    filled[patch] = True
    colours = plt.get_cmap("gray")(0.2 + 0.8 * np.clip(volume, 0, 1) ** 0.8)[..., :3]
    colours[patch] = tint
    size = 82 / sum(volume.shape[:2])
    draw_voxels(ax, colours, filled, (left, 23), size, lw=0.35 * size**0.5)


def _draw_speed(ax: Any, table: Path) -> None:
    """Bars: times faster than `jax.lax`, forward and with gradients, from the rows of 3-D U-Nets in `drop-in.md`."""
    row = r"^\| U-Net, 3-D, (k\d s\d) \|(?:[^|]*\|){2} ([\d.]+) x \|(?:[^|]*\|){2} ([\d.]+) x \|$"
    last, _, _ = table.read_text().partition("with the channels first")  # the same layers follow
    rows = re.findall(row, last, re.M)
    assert rows, f"{table} has no rows of 3-D U-Nets"
    threads = re.findall(r"(\d+) threads; (\w+)", table.read_text())[0]
    for place, (name, *values) in enumerate(rows):
        for y, value, label, colour in zip((0, 0.8), map(float, values), ("forward", "gradients"), TAPS, strict=False):
            ax.barh(2 * place + y, value, 0.7, color=colour, alpha=0.85)
            ax.text(1, 2 * place + y, label, va="center", color="white", fontsize=11)
            ax.text(value + 1, 2 * place + y, f"{value:.0f} x", va="center", color=INK, fontsize=13)
        ax.text(-2, 2 * place + 0.4, name, ha="right", va="center", color=INK, fontsize=12, family="monospace")
    ax.set(ylim=(2 * len(rows) - 0.7, -0.5))
    ax.axis("off")
    ax.text(0, 1.12, "Times faster than\njax.lax.conv_transpose", transform=ax.transAxes, fontsize=13, color=INK)
    note = '3-D U-Net layers, {} CPU threads, {};\n"gradients": with both gradients'.format(*threads)
    ax.text(0, -0.07, note, transform=ax.transAxes, fontsize=10, color="#666666", va="top")


def picture(path: Path, table: Path) -> None:
    """Write the README's picture: a coarse brain, a kernel, the brain `conv3d_transpose` makes of them, its speed."""
    from nilearn.datasets import load_mni152_template

    brain = load_mni152_template(resolution=10).get_fdata(dtype=np.float32)
    coarse = brain[None, ..., None] / brain.max()
    tent = np.array([0.5, 1, 0.5], np.float32)
    kernel = np.einsum("i,j,k->ijk", tent, tent, tent)[..., None, None]
    fine = np.asarray(c3t.conv3d_transpose(coarse, kernel, strides=2, padding="same"))

    figure = plt.figure(figsize=(16, 5.2), dpi=100, facecolor="white")
    ax = figure.add_axes((0.03, 0.215, 0.7, 0.745))
    tint = plt.get_cmap("YlOrBr")(0.15 + 0.55 * kernel[..., 0, 0])[..., :3]
    cut = [length // 2 for length in brain.shape]
    voxel = (cut[0] + 3, cut[1] + 4, cut[2] - 1)  # one of those laid open, and what it adds to
    one, patch = (tuple(slice(i * step, i * step + width) for i in voxel) for step, width in ((1, 1), (2, 3)))
    _draw_brain(ax, coarse[0, ..., 0], cut, one, tint[1, 1, 1], 17)
    _draw_brain(ax, fine[0, ..., 0], [2 * i for i in cut], patch, tint, 91)
    draw_voxels(ax, tint, np.ones((3, 3, 3), bool), (55.5, 20.5), 2.7, lw=0.8)
    for start in (40, 64.5):
        arrow = {"arrowstyle": "-|>", "lw": 2, "mutation_scale": 22, "color": INK}
        ax.annotate("", (start + 7, 20.5), (start, 20.5), arrowprops=arrow)
    ax.text(55.5, 8.5, "each voxel of x adds\na patch, 2 steps apart", ha="center", va="top", fontsize=13, color=INK)
    for name, array, centre in (("x", coarse, 19.3), ("w", kernel, 55.5), ("y", fine, 93.3)):
        ax.text(centre, -1, f"{name}  {array.shape}", ha="center", va="top", fontsize=13, color=INK, family="monospace")
    call, box = 'y = c3t.conv3d_transpose(x, w, strides=2, padding="same")', {"fc": "#f4f4f4", "ec": FAINT, "pad": 9}
    ax.text(56, -8.4, call, ha="center", va="center", fontsize=16, color=INK, family="monospace", bbox=box)
    ax.set(xlim=(0, 112), ylim=(0, 38.74))
    _draw_speed(figure.add_axes((0.785, 0.31, 0.17, 0.42)), table)
    _image(figure).save(path, optimize=True)
    plt.close(figure)


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    picture(here / "picture.png", here.parent / "benchmarks" / "results" / "drop-in.md")
