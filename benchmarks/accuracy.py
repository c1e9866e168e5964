"""Rounding errors of the lowerings in float32, against the same sums in float64: ``python -m benchmarks.accuracy``.

For every size the error of the result and of both gradients, relative to their root mean square: of the direct sum
("phases"), and that of "winograd" as a multiple of it, root mean square and largest.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

import conv3dt_jax as c3t

CHANNELS = ((2, 3), (8, 8), (32, 32), (64, 16), (128, 128))
SIZES = [
    (space, channels, filters, 3, 1, dilation)
    for space in ((16, 16, 16), (9, 21, 14), (32, 32, 32))
    for channels, filters in CHANNELS
    for dilation in (1, 2)
    if space[0] * channels <= 16 * 128
] + [
    ((9, 14, 12), channels, filters, kernel, stride, 1)
    for kernel, stride in ((4, 2), (3, 2), (5, 3), (5, 2), (6, 2))
    for channels, filters in CHANNELS
]
"""Volume, channels, filters, kernel, stride and dilation."""
PARTS = ("result", "inputs", "kernel")


def results(operands: list[np.ndarray], implementation: Any, **window: Any) -> list[np.ndarray]:
    """The result and both gradients, in the dtype of the operands."""
    x, w, ct = operands

    @jax.jit
    def run(x: jax.Array, w: jax.Array, ct: jax.Array) -> tuple[jax.Array, ...]:
        def operation(x: jax.Array, w: jax.Array) -> jax.Array:
            return c3t.conv3d_transpose(x, w, padding="same", implementation=implementation, **window)

        y, pullback = jax.vjp(operation, x, w)
        return (y, *pullback(ct))

    return [np.asarray(value, np.float64) for value in run(x, w, ct)]


def errors(
    space: tuple[int, ...], channels: int, filters: int, kernel: int, stride: int, dilation: int
) -> list[list[float]]:
    """For each part: the direct sum's relative error, the multiples of its root mean square and of its largest."""
    rng = np.random.default_rng(0)
    window = {"strides": stride, "dilation_rate": dilation}
    out = [n * stride for n in space]
    shapes = [(1, *space, channels), (kernel,) * 3 + (filters, channels), (1, *out, filters)]
    operands = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    with jax.enable_x64(True):
        exact = results([operand.astype(np.float64) for operand in operands], "phases", **window)
    direct, filtered = (results(operands, name, **window) for name in ("phases", "winograd"))
    rows = []
    for want, one, other in zip(exact, direct, filtered, strict=True):
        rms = [np.sqrt(np.mean((got - want) ** 2)) for got in (one, other)]
        largest = [np.abs(got - want).max() for got in (one, other)]
        rows.append([rms[0] / np.sqrt(np.mean(want**2)), rms[1] / rms[0], largest[1] / largest[0]])
    return rows


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    print(
        "| volume | channels | filters | kernel | stride | dilation | of | direct | winograd, rms | winograd, largest |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: |")
    worst = [0.0, 0.0]
    for space, *sizes in SIZES:
        for part, (direct, rms, largest) in zip(PARTS, errors(space, *sizes), strict=True):
            size = " | ".join(["x".join(map(str, space)), *map(str, sizes), part])
            print(f"| {size} | {direct:.1e} | {rms:.1f} x | {largest:.1f} x |")
            worst = [max(worst[0], rms), max(worst[1], largest)]
    print(f"\nwinograd / direct at most: {worst[0]:.2f} x root mean square, {worst[1]:.2f} x largest")


if __name__ == "__main__":
    main()
