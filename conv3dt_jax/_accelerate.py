"""Models that others wrote go through this package: while it lasts, JAX's transposed convolutions are ours.

Flax, Haiku and Keras call `jax.lax.conv_transpose`, Equinox `jax.lax.conv_general_dilated` with dilated inputs, by the
names in that module. While acceleration lasts anywhere, the two names hold functions that look whether it lasts here,
in a context of JAX: one of its kind is of a thread, and part of the key under which `jax.jit` keeps what it traced.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax

from conv3dt_jax import _lifted

LOGGER = logging.getLogger("conv3dt_jax")

_lasting = jax.make_user_context(default_value=False)
_listening: contextvars.ContextVar[tuple[Acceleration, ...]] = contextvars.ContextVar("listening", default=())
_lock = threading.RLock()
_holders = 0
_originals: dict[str, Callable[..., Any]] = {}
_ours: dict[str, Callable[..., Any]] = {}
_everywhere: Acceleration | None = None


@dataclasses.dataclass(frozen=True)
class Traced:
    """A call that was met: the function of `jax.lax`, the shapes, and why it was left to JAX, or nothing."""

    function: str
    shapes: tuple[tuple[int, ...], ...]
    left: str = ""

    def __str__(self) -> str:
        shapes = " and ".join(map(str, self.shapes))
        return f"jax.lax.{self.function} of {shapes}: {f'left to JAX, {self.left}' if self.left else 'accelerated'}"


class Acceleration:
    """What `accelerated` and `accelerate` give: the functions that stand for JAX's, and the calls that were met.

    A call is met when it is traced, not when a compiled program runs. Of equal calls one is listed, and ordinary
    convolutions are not.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import conv3dt_jax as c3t
      >>> with c3t.accelerated() as found:
      ...     y = jax.lax.conv_transpose(jnp.ones((1, 4, 2)), jnp.ones((3, 2, 5)), (2,), "SAME")
      >>> found
      <Acceleration: 1 calls accelerated, 0 left to JAX>
      >>> found.calls[0].function, found.calls[0].shapes
      ('conv_transpose', ((1, 4, 2), (3, 2, 5)))
    """

    replaced = ("jax.lax.conv_transpose", "jax.lax.conv_general_dilated")

    def __init__(self) -> None:
        self.calls: list[Traced] = []

    def __str__(self) -> str:
        return "\n".join([f"in the place of {' and '.join(self.replaced)}:", *(f"  {call}" for call in self.calls)])

    def __repr__(self) -> str:
        left = sum(bool(call.left) for call in self.calls)
        return f"<Acceleration: {len(self.calls) - left} calls accelerated, {left} left to JAX>"


@contextlib.contextmanager
def accelerated() -> Iterator[Acceleration]:
    """While it lasts, transposed convolutions of Flax, Haiku, Keras and Equinox are computed by this package.

    A context manager, and a decorator. It takes those that are met in this thread, by calls or while a function is
    traced, in one, two or three dimensions; weights and code stay as they are, and so do results, to rounding. What it
    cannot take goes to JAX as before: other numbers of dimensions, mixed dtypes, symbolic sizes, "same" and "valid" in
    lower case, which JAX reads otherwise. It may be nested. Afterwards the functions of `jax.lax` are the very ones
    that they were.

    `jax.jit` traces anew inside and outside: a function that was compiled before is compiled once more, and the
    accelerated program is used inside alone. Programs that were compiled ahead, by ``lower().compile()`` or
    `jax.export`, stay what they are.

    Returns:
      A context manager for an `Acceleration`, which says what was replaced and which calls were met.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> import conv3dt_jax as c3t
      >>> model = nn.ConvTranspose(4, (3, 3), strides=(2, 2))
      >>> x = jnp.ones((1, 8, 8, 2))
      >>> params = model.init(jax.random.key(0), x)
      >>> with c3t.accelerated() as found:
      ...     y = jax.jit(model.apply)(params, x)
      >>> print(found)
      in the place of jax.lax.conv_transpose and jax.lax.conv_general_dilated:
        jax.lax.conv_transpose of (1, 8, 8, 2) and (3, 3, 2, 4): accelerated

    Source:
      The frameworks' own layers; `jax.make_user_context` for the key of `jax.jit`.
    """
    found = Acceleration()
    token = _listening.set((*_listening.get(), found))
    try:
        with _installed(), _lasting(True):
            yield found
    finally:
        _listening.reset(token)


def accelerate() -> Acceleration:
    """As `accelerated`, for the whole process, in all threads, until `restore`. A second call changes nothing.

    Returns:
      The `Acceleration`, which says what was replaced and which calls were met.

    Example:
      >>> import conv3dt_jax as c3t
      >>> c3t.accelerate()
      <Acceleration: 0 calls accelerated, 0 left to JAX>
      >>> c3t.restore()
    """
    global _everywhere
    with _lock:
        if _everywhere is None:
            _install()
            _everywhere = Acceleration()
            _lasting.set_global(True)
            LOGGER.info("conv3dt_jax stands in the place of %s", " and ".join(Acceleration.replaced))
        return _everywhere


def restore() -> None:
    """Ends what `accelerate` began; without it nothing happens.

    Example:
      >>> import conv3dt_jax as c3t
      >>> c3t.restore()
    """
    global _everywhere
    with _lock:
        if _everywhere is not None:
            _everywhere = None
            _lasting.set_global(False)
            _remove()


@contextlib.contextmanager
def _installed() -> Iterator[None]:
    _install()
    try:
        yield
    finally:
        _remove()


def _install() -> None:
    """Puts the functions that look whether acceleration lasts in the place of JAX's, for one more holder."""
    global _holders
    with _lock:
        _holders += 1
        if _holders == 1:
            for name, read in READERS.items():
                _originals[name] = getattr(jax.lax, name)
                _ours[name] = _looking(name, _originals[name], read)
                setattr(jax.lax, name, _ours[name])


def _remove() -> None:
    """The last holder puts JAX's back, unless others have put theirs over ours."""
    global _holders
    with _lock:
        _holders -= 1
        if _holders == 0:
            for name, original in _originals.items():
                if getattr(jax.lax, name) is _ours[name]:
                    setattr(jax.lax, name, original)
            _originals.clear()


def _read_as_jax_does(lhs: Any, rhs: Any, strides: Any, padding: Any, *more: Any, **named: Any) -> _lifted.Call:
    """`read_transposed`, but what JAX makes of other names for its paddings is left to JAX."""
    call = _lifted.read_transposed(lhs, rhs, strides, padding, *more, **named)
    if isinstance(padding, str):
        if padding not in ("SAME", "VALID"):
            return dataclasses.replace(call, reason=f"its padding {padding!r} is not what it says")
    elif not all(isinstance(pair, tuple | list) for pair in padding):
        return dataclasses.replace(call, reason="its padding is not of pairs")
    return call


READERS: dict[str, Callable[..., _lifted.Call]] = {
    "conv_transpose": _read_as_jax_does,
    "conv_general_dilated": _lifted.read_dilated,
}


def _looking(name: str, original: Callable[..., Any], read: Callable[..., _lifted.Call]) -> Callable[..., Any]:
    """The function that takes what it can where acceleration lasts, and else hands its arguments on as they are."""

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not _lasting.value:
            return original(*args, **kwargs)
        try:
            taken = read(*args, **kwargs)
        except Exception as error:  # JAX shall say what it makes of these arguments
            LOGGER.debug("jax.lax.%s is left to JAX: %s", name, error)
            return original(*args, **kwargs)
        if taken.reason == _lifted.ORDINARY:
            return original(*args, **kwargs)
        taken = dataclasses.replace(taken, original=functools.partial(original, *args, **kwargs))
        result, left = taken.outcome()
        _note(Traced(name, taken.shapes, left))
        return result

    return call


def _note(traced: Traced) -> None:
    LOGGER.debug("%s", traced)
    everywhere = _everywhere
    for found in (*_listening.get(), *([] if everywhere is None else [everywhere])):
        if traced not in found.calls:
            found.calls.append(traced)
