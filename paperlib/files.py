"""Files that are there whole or not at all, and what cannot be read or written in one sentence."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import torch


@contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes its name only when it is complete and on the disk; OSError where it is not."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")  # other hosts may write to the same folder
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch has its own for a full disk
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        raise OSError(f"{path} was not written ({reason}), what was there before stays: make room for it") from error
    finally:
        with suppress(OSError):  # its folder may not even be one
            partial.unlink(missing_ok=True)


@contextmanager
def reading(path: Path, way_out: str) -> Iterator[None]:
    """Whatever a damaged or foreign file makes a library raise in the block becomes a ValueError of one sentence; what
    the machine refuses (memory, permissions) stays what it is, since the file may be good."""
    try:
        yield
    except Exception as error:  # zipfile, zlib, pickle, PIL, safetensors and JSON raise some twenty kinds
        refused = (MemoryError, torch.OutOfMemoryError, getattr(torch, "AcceleratorError", MemoryError))
        if isinstance(error, refused) or getattr(error, "errno", None):
            raise
        reason = str(error).split(". ")[0].split("\n")[0].rstrip(":") or type(error).__name__
        raise ValueError(f"{path} cannot be used ({reason}): {way_out}") from error
