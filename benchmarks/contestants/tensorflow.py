"""`tf.nn.conv3d_transpose` and `tf.nn.conv3d` inside `tf.function`, as Keras calls them; their kernels are ours."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import tensorflow as tf

from benchmarks import data
from benchmarks.cases import Case
from benchmarks.contestants.base import Prepared, UnsupportedError

THREADS = len(os.sched_getaffinity(0))
tf.config.threading.set_inter_op_parallelism_threads(THREADS)
tf.config.threading.set_intra_op_parallelism_threads(THREADS)


def prepare(case: Case, kind: str, variant: str) -> Prepared:
    """On CPU there is no channels-first kernel: the volume is transposed inside, as its users have to."""
    first = case.channels_first
    arrays = [array if i == 1 or not first else data.to_channels_first(array) for i, array in enumerate(operands(case))]
    x, w, ct = (tf.cast(tf.constant(array), case.dtype) for array in arrays)

    def operation(x: Any, w: Any) -> Any:
        if first:
            x = tf.transpose(x, (0, 2, 3, 4, 1))
        window: dict[str, Any] = {"padding": case.padding.upper(), "dilations": (1, *(case.dilation,) * 3, 1)}
        if case.transposed:
            y = tf.nn.conv3d_transpose(x, w, case.outputs, (1, *case.strides, 1), **window)
        else:
            y = tf.nn.conv3d(x, w, (1, *case.strides, 1), **window)
        return tf.transpose(y, (0, 4, 1, 2, 3)) if first else y

    @tf.function
    def forward(x: Any, w: Any, ct: Any) -> Any:
        return (operation(x, w),)

    @tf.function
    def training(x: Any, w: Any, ct: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch([x, w])
            y = operation(x, w)
        return (y, *tape.gradient(y, [x, w], output_gradients=ct))

    function = forward if kind == "forward" else training

    def call() -> Any:
        try:
            return function(x, w, ct)
        except (tf.errors.OpError, ValueError, NotImplementedError) as error:
            raise UnsupportedError(cause(error)) from error

    def parts(results: Any) -> list[np.ndarray]:
        arrays = [tf.cast(part, "float32").numpy() for part in results]
        return [data.to_channels_last(a) if first and i < 2 else a for i, a in enumerate(arrays)]

    return Prepared(call=call, parts=parts)


def operands(case: Case) -> tuple[np.ndarray, ...]:
    return data.operands(case)


def cause(error: Exception) -> str:
    """The line of TensorFlow's message that says what is wrong, without the trace before it."""
    frame = ("File ", "Graph execution error", "Detected at node")
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line and not line.startswith(frame)), str(error))[:200]
