"""Files that are there whole or not at all; what cannot be read or written is said in one sentence."""

import errno
import gzip
import hashlib
import json
import math
import os
import time
import uuid
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save

PACKED = ".gz"  # what the name of a packed file ends in
ANEW = "restore it, or remove it, and it is made anew"


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
        full = reason.errno in (errno.ENOSPC, errno.EDQUOT)
        way_out = "make room for it" if full else "see what stands in its way"
        raise OSError(f"{path} was not written ({reason}), what was there before stays: {way_out}") from error
    finally:
        with suppress(OSError):  # its folder may not even be one
            partial.unlink(missing_ok=True)
            for stray in path.parent.glob(f".{path.name}.*.part"):  # of a process that was killed
                if time.time() - stray.stat().st_mtime > 3600:
                    stray.unlink()


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


def read_json(path: Path) -> dict[str, Any]:
    """What `write_text` wrote as JSON; ValueError if it is damaged."""
    with reading(path, ANEW):
        return {**json.loads(path.read_text(encoding="utf-8"))}


def json_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """A table as JSON rows: nan becomes null."""
    return json.loads(table.to_json(orient="records", double_precision=6))


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8."""
    with whole(path) as file:
        file.write(text.encode())


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON, without numbers that JSON does not know (ValueError)."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write tensors as safetensors."""
    with whole(path) as file:
        file.write(save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """What `save_tensors` wrote."""
    with reading(path, ANEW):
        return load_file(path)


def save_arrays(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write tensors as compressed NumPy arrays, Boolean ones as bits."""
    arrays = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
    for name in [name for name, array in arrays.items() if array.dtype == bool]:
        arrays |= {name: np.packbits(arrays[name]), f"{name}:shape": np.array(arrays[name].shape)}
    with whole(path) as file:
        np.savez_compressed(file, **arrays)


def load_arrays(path: Path) -> dict[str, torch.Tensor]:
    """What `save_arrays` wrote."""
    with reading(path, ANEW):
        check_npz(path)
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: torch.from_numpy(file[key]) for key in file}
    shapes = {key: arrays.pop(f"{key}:shape").tolist() for key in list(arrays) if f"{key}:shape" in arrays}
    for key, shape in shapes.items():
        bits = np.unpackbits(arrays[key].numpy(), count=math.prod(shape))
        arrays[key] = torch.from_numpy(bits).bool().reshape(shape)
    return arrays


def check_npz(path: Path) -> None:
    """Raise ValueError if an array of a .npz file claims more than the file holds: it would ask for that memory."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(file)
                fits = dtype.hasobject or file.tell() + math.prod(shape) * dtype.itemsize == member.file_size
                if not fits:  # of Python objects NumPy says no itself
                    raise ValueError(f"{member.filename} is not as large as its header says")


def save_table(path: Path, rows: list[dict] | pd.DataFrame) -> None:
    """Write a table as CSV."""
    write_text(path, pd.DataFrame(rows).to_csv(index=False, lineterminator="\n"))


def sha256(path: Path) -> str | None:
    """Hash of a file, packed or not (`pack`); None where there is none, or none that can be unpacked."""
    found = there(path)
    unreadable = FileNotFoundError, IsADirectoryError, EOFError, gzip.BadGzipFile, zlib.error
    with suppress(*unreadable), open(path, "rb") if found == path else gzip.open(found) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
    return None


def there(path: Path) -> Path:
    """Where a file's content is: in the file, or where there is none, in its packed copy."""
    packed = path.with_name(path.name + PACKED)
    return packed if packed.is_file() and not path.exists() else path


def pack(path: Path) -> None:
    """Replace a file by a packed one, the same bytes for the same content."""
    with whole(path.with_name(path.name + PACKED)) as file:
        file.write(gzip.compress(path.read_bytes(), mtime=0))
    path.unlink()
