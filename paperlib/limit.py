"""A time limit for work in pieces: before each piece, when all others are saved, it asks whether there is time for it.

Whatever has no limit is never stopped. The time counts from the first piece, which always begins, so that every call
gets on. Nothing that is computed depends on a limit: what is stopped here goes on as after any other interruption.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_limit: ContextVar[dict | None] = ContextVar("limit", default=None)  # seconds, and end by time.monotonic()


class TimeIsUp(Exception):
    """The limit has passed; says which piece would have come next."""


@contextmanager
def limited(minutes: float | None) -> Iterator[None]:
    """A block whose pieces start within so many minutes of the first one (None: without a limit); ValueError for one
    without time."""
    if minutes is not None and not minutes > 0:
        raise ValueError(f"--minutes must be above 0, not {minutes:g}")
    token = _limit.set(None if minutes is None else {"seconds": 60 * minutes})
    try:
        yield
    finally:
        _limit.reset(token)


def before(piece: str) -> None:
    """Raise `TimeIsUp` if the limit has passed; called where everything before this piece is saved."""
    limit = _limit.get()
    if limit is None:
        return
    now = time.monotonic()
    if now > limit.setdefault("end", now + limit["seconds"]):
        raise TimeIsUp(piece)
