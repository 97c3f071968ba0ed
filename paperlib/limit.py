"""A time limit for work in pieces: before each piece, when all others are saved, it asks whether there is time for it.

Whatever has no limit is never stopped. Nothing that is computed depends on one: what is stopped here goes on as after
any other interruption.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_end: ContextVar[float] = ContextVar("end", default=math.inf)  # in time.monotonic()'s seconds


class TimeIsUp(Exception):
    """The limit has passed; says which piece would have come next."""


@contextmanager
def limited(minutes: float | None) -> Iterator[None]:
    """A block whose pieces start within so many minutes (None: without a limit); ValueError for one without time."""
    if minutes is not None and not minutes > 0:
        raise ValueError(f"--minutes must be above 0, not {minutes:g}")
    token = _end.set(math.inf if minutes is None else time.monotonic() + 60 * minutes)
    try:
        yield
    finally:
        _end.reset(token)


def before(piece: str) -> None:
    """Raise `TimeIsUp` if the limit has passed; called where everything before this piece is saved."""
    if time.monotonic() >= _end.get():
        raise TimeIsUp(piece)
