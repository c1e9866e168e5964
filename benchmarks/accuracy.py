"""Rounding errors of the lowerings in float32, against the same sums in float64: ``python -m benchmarks.accuracy``.

For every size the error of the result and of both gradients, relative to their root mean square: of the direct sum
("phases"), and that of "winograd" as a multiple of it, root mean square and largest.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

import conv3dt_jax as c3t

SIZES = [
    (space, channels, filters, dilation)
    for space in ((16, 16, 16), (9, 21, 14), (32, 32, 32))
    for channels, filters in ((2, 3), (8, 8), (32, 32), (64, 16), (128, 128))
    for dilation in (1, 2)
    if space[0] * channels <= 16 * 128
]
PARTS = ("result", "inputs", "kernel")


def results(operands: list[np.ndarray], dilation: int, implementation: Any) -> list[np.ndarray]:
    """The result and both gradients, in the dtype of the operands."""
    x, w, ct = operands

    @jax.jit
    def run(x: jax.Array, w: jax.Array, ct: jax.Array) -> tuple[jax.Array, ...]:
        def operation(x: jax.Array, w: jax.Array) -> jax.Array:
            return c3t.conv3d_transpose(
                x, w, padding="same", dilation_rate=dilation, implementation=implementation
            )  # fmt: skip

        y, pullback = jax.vjp(operation, x, w)
        return (y, *pullback(ct))

    return [np.asarray(value, np.float64) for value in run(x, w, ct)]


def errors(space: tuple[int, ...], channels: int, filters: int, dilation: int) -> list[list[float]]:
    """For each part: the direct sum's relative error, the multiples of its root mean square and of its largest."""
    rng = np.random.default_rng(0)
    shapes = [(1, *space, channels), (3, 3, 3, filters, channels), (1, *space, filters)]
    operands = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    with jax.enable_x64(True):
        exact = results([operand.astype(np.float64) for operand in operands], dilation, "phases")
    direct, filtered = (results(operands, dilation, name) for name in ("phases", "winograd"))
    rows = []
    for want, one, other in zip(exact, direct, filtered, strict=True):
        rms = [np.sqrt(np.mean((got - want) ** 2)) for got in (one, other)]
        largest = [np.abs(got - want).max() for got in (one, other)]
        rows.append([rms[0] / np.sqrt(np.mean(want**2)), rms[1] / rms[0], largest[1] / largest[0]])
    return rows


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    print("| volume | channels | filters | dilation | of | direct | winograd, rms | winograd, largest |")
    print("| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: |")
    worst = [0.0, 0.0]
    for space, channels, filters, dilation in SIZES:
        for part, (direct, rms, largest) in zip(PARTS, errors(space, channels, filters, dilation), strict=True):
            size = f"{'x'.join(map(str, space))} | {channels} | {filters} | {dilation} | {part}"
            print(f"| {size} | {direct:.1e} | {rms:.1f} x | {largest:.1f} x |")
            worst = [max(worst[0], rms), max(worst[1], largest)]
    print(f"\nwinograd / direct at most: {worst[0]:.2f} x root mean square, {worst[1]:.2f} x largest")


if __name__ == "__main__":
    main()
