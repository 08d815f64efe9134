"""The platform that programs are made for: the one at hand, unless a program is compiled for another."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax

_TARGET: ContextVar[str] = ContextVar("target", default="")


def target_platform() -> str:
    """cpu, gpu or tpu."""
    return _TARGET.get() or jax.default_backend()


@contextmanager
def compiling_for(name: str) -> Iterator[None]:
    """What is traced inside takes the kernels of platform `name`, which need not be at hand."""
    token = _TARGET.set(name)
    try:
        yield
    finally:
        _TARGET.reset(token)
