"""Stages and artefacts: the only module that knows about the files of a run.

A run is a folder, runs/<profile>/, of stages. A stage's folder is named by a key: the hash of its configuration, of
the artefacts that it reads and of a version that is raised by hand when its meaning changes. What has not changed is
not computed again; what has is computed beside the old artefact, never over it.

Committed results are stages without their large files (safetensors), which are computed again where they are needed.
"""

import ctypes
import hashlib
import json
import math
import os
import platform
import re
import resource
import subprocess
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from filelock import FileLock, Timeout
from pydantic import BaseModel
from safetensors.torch import load_file, save

from paperlib import __version__, data, files, training

ANEW = "restore it, or remove it, and it is made anew"


def root() -> Path:
    """The project: the folder with pyproject.toml and notebooks/ at or above the working directory, else around the
    package."""
    for folder in (Path.cwd(), *Path.cwd().parents, Path(__file__).resolve().parent.parent):
        if (folder / "notebooks").is_dir() and (folder / "pyproject.toml").is_file():
            return folder
    raise FileNotFoundError("no project folder (with pyproject.toml and notebooks/) at or above the working directory")


def folder_of(kind: str) -> Path:
    """Where `runs`, `figures` or `data` live: $PAPERLIB_RUNS, ... (relative to the project), else inside it."""
    return (root() / os.environ.get(f"PAPERLIB_{kind.upper()}", kind)).resolve()


@dataclass(frozen=True)
class Artefact:
    """A finished stage: its folder, and the hash of what is in it."""

    folder: Path
    sha256: str
    seconds: float
    peak_gb: float = 0.0  # the process's largest memory while the stage was computed
    fresh: bool = False  # computed by this process
    remade: Callable[[], "Artefact"] | None = None  # the whole of it, where large files were not committed

    def table(self, name: str) -> pd.DataFrame:
        return pd.read_csv(self.folder / f"{name}.csv")

    def arrays(self, name: str) -> dict[str, torch.Tensor]:
        """What `save_arrays` wrote."""
        path = self.folder / f"{name}.npz"
        with files.reading(path, ANEW), np.load(path, allow_pickle=False) as file:
            arrays = {key: torch.from_numpy(file[key]) for key in file}
        shapes = {key: arrays.pop(f"{key}:shape").tolist() for key in list(arrays) if f"{key}:shape" in arrays}
        for key, shape in shapes.items():
            bits = np.unpackbits(arrays[key].numpy(), count=math.prod(shape))
            arrays[key] = torch.from_numpy(bits).bool().reshape(shape)
        return arrays

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        whole = self if (self.folder / f"{name}.safetensors").exists() or not self.remade else self.remade()
        with files.reading(whole.folder / f"{name}.safetensors", ANEW):
            return load_file(whole.folder / f"{name}.safetensors")


@dataclass(frozen=True)
class Run:
    """One walk: its settings and images, and where its artefacts and figures are."""

    profile: str
    settings: BaseModel
    images: data.Images
    folder: Path
    figures: Path
    committed: Path | None = None  # stages without their large files, taken before those of the folder
    known_sha256: str | None = None  # of images that are not at hand: then nothing is computed
    log: Callable[[str], None] = print
    prefix: str = ""  # of its stages' names, for a walk within a walk
    finished: dict[str, "Artefact"] = field(default_factory=dict)  # stages of this process, by folder
    seconds: dict[str, float] = field(default_factory=dict)  # stage -> how long it took when it was computed
    peak_gb: dict[str, float] = field(default_factory=dict)  # stage -> memory of the process when it was computed
    remade: list[str] = field(default_factory=list)  # stages whose large files differ from the committed ones

    @cached_property
    def data_sha256(self) -> str:
        return self.known_sha256 or self.images.sha256

    def config(self, *names: str) -> dict[str, Any]:
        """The named settings, as part of a stage's key."""
        return {name: getattr(self.settings, name) for name in names}

    def stage(
        self, name: str, version: int, config: dict[str, Any], inputs: dict[str, str], make: Callable[[Path], None]
    ) -> Artefact:
        """Run `make(folder)` unless this very stage is done, and say why it runs.

        inputs: name -> hash of what the stage reads. `make` writes files into its folder, which survives an
        interruption (so that training resumes); the stage counts as done once `stage.json` stands there.
        """
        name = self.prefix + name
        record = {"stage": name, "version": version, "config": config, "inputs": inputs}
        key = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]
        folder = self.folder / "stages" / name / key
        if str(folder) not in self.finished:
            compute = partial(self._computed, folder, record, make)
            self.finished[str(folder)] = self._known(name, key, compute) or compute()
        self.seconds[name] = self.finished[str(folder)].seconds
        self.peak_gb[name] = self.finished[str(folder)].peak_gb
        return self.finished[str(folder)]

    def _known(self, name: str, key: str, remake: Callable[[], "Artefact"]) -> "Artefact | None":
        """The committed artefact of a stage, where there is one."""
        done = self.committed / name / key / "stage.json" if self.committed else None
        if not done or not done.exists():
            return None
        finished = read_json(done)
        small = {file: sha256 for file, sha256 in finished["outputs"].items() if not is_large(file)}
        if _hashes(done.parent, small) != small:
            raise ValueError(f"{done.parent}: files do not fit their stage.json: restore them, or remove the folder")
        self.log(f"{name}: committed, not computed again")

        def remade() -> Artefact:
            whole = remake()
            if whole.sha256 != finished["sha256"]:
                self.log(f"{name}: not bit for bit the committed one (another kind of machine?)")
                self.remade.append(name)
            return whole

        return Artefact(done.parent, finished["sha256"], finished["seconds"], finished["peak_gb"], remade=cache(remade))

    def _computed(self, folder: Path, record: dict, make: Callable[[Path], None]) -> "Artefact":
        if self.known_sha256:
            raise FileNotFoundError(f"{record['stage']} is not among the committed results, or not with these settings")
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.parent / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RuntimeError(f"another run is working on {folder.parent}: wait for it, or stop it") from None
        try:
            return self._checked(folder, record) or self._made(folder, record, make)
        finally:
            lock.release()

    def _checked(self, folder: Path, record: dict) -> "Artefact | None":
        """The stage's artefact if it is complete and nobody has changed its files."""
        done = folder / "stage.json"
        if not done.exists():
            self.log(f"{record['stage']}: {_reason(folder, record)}")
            return None
        finished = read_json(done)
        if _hashes(folder, finished["outputs"]) != finished["outputs"]:
            done.unlink()
            self.log(f"{record['stage']}: computed again, its files were changed from outside")
            return None
        self.log(f"{record['stage']}: unchanged, not computed again")
        return Artefact(folder, finished["sha256"], finished["seconds"], finished["peak_gb"])

    def _made(self, folder: Path, record: dict, make: Callable[[Path], None]) -> "Artefact":
        start = time.monotonic()
        _peak_gb(forget=True)
        make(folder)
        names = sorted(p.name for p in folder.iterdir() if p.suffix in (".csv", ".npz", ".safetensors"))
        outputs = _hashes(folder, names)
        sha256 = hashlib.sha256(json.dumps(outputs, sort_keys=True).encode()).hexdigest()
        seconds = round(time.monotonic() - start, 2)
        record = {**record, "outputs": outputs, "sha256": sha256, "seconds": seconds, "peak_gb": _peak_gb()}
        record |= {"revision": revision(), "environment": environment(self.settings.precision)}
        record |= {"remade": self.remade} if self.remade else {}
        write_text(folder / "stage.json", json.dumps(record, indent=1))
        for leftover in (*folder.glob("*.pt"), *folder.glob(".*.part")):  # only now is nothing lost without them
            leftover.unlink()
        return Artefact(folder, sha256, seconds, record["peak_gb"], fresh=True)

    def record(self, notebook: str, results: dict[str, Any], verdicts: list[dict]) -> None:
        """Put a notebook's results and verdicts into figures/<profile>/summary.json, beside those of the others.

        What other notebooks wrote stays if it was made with the same settings and data.
        """
        path = self.figures / "summary.json"
        config = self.settings.model_dump()
        old = read_json(path) if path.exists() else {}
        if old.get("config") != config or old.get("data", {}).get("sha256") != self.data_sha256:
            old = {}
        claims = {verdict["claim"] for verdict in verdicts}
        kept = [verdict for verdict in old.get("verdicts", []) if verdict["claim"] not in claims]
        summary = {
            "profile": self.profile,
            "config": config,
            "seeds": self.settings.seeds,
            "environment": environment(self.settings.precision),
            "device": str(training.best_device()),
            "seconds": {**old.get("seconds", {}), **self.seconds},
            "peak_gb": {**old.get("peak_gb", {}), **self.peak_gb},
            "stages": {**old.get("stages", {}), **{path.parent.name: path.name for path in map(Path, self.finished)}},
            "data": {"name": self.images.name, "sha256": self.data_sha256, "classes": self.images.classes},
            "revision": revision(),
            "results": dict(sorted({**old.get("results", {}), notebook: results}.items())),
            "verdicts": sorted(kept + verdicts, key=lambda verdict: verdict["claim"]),
        }
        write_text(path, json.dumps(summary, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """What `write_text` wrote as JSON; ValueError if it is damaged."""
    with files.reading(path, ANEW):
        return {**json.loads(path.read_text(encoding="utf-8"))}


def json_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """A table as JSON rows: nan becomes null."""
    return json.loads(table.to_json(orient="records", double_precision=6))


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8."""
    with files.whole(path) as file:
        file.write(text.encode())


def save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write tensors as safetensors."""
    with files.whole(path) as file:
        file.write(save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def is_large(file: str) -> bool:
    """Whether a stage's file is too large to be committed."""
    return file.endswith(".safetensors")


def save_arrays(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write tensors as compressed NumPy arrays, Boolean ones as bits (see `Artefact.arrays`)."""
    arrays = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
    for name in [name for name, array in arrays.items() if array.dtype == bool]:
        arrays |= {name: np.packbits(arrays[name]), f"{name}:shape": np.array(arrays[name].shape)}
    with files.whole(path) as file:
        np.savez_compressed(file, **arrays)


def save_table(path: Path, rows: list[dict] | pd.DataFrame) -> None:
    """Write a table as CSV."""
    write_text(path, pd.DataFrame(rows).to_csv(index=False, lineterminator="\n"))


def environment(precision: str = "auto") -> dict[str, Any]:
    """Versions and hardware of this process, for stages and the run card."""
    packages = ("torch", "torchvision", "numpy", "matplotlib", "pandas")
    return {
        "python": platform.python_version(),
        "paperlib": __version__,
        **{name: package_version(name) for name in packages},
        "platform": platform.platform(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "training_precision": "bf16" if training.in_bf16(precision, training.best_device()) else "fp32",
    }


def revision() -> str | None:
    """The git commit of the project, with "+changes" if files differ from it; None outside a git checkout."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root(), capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "paperlib", "notebooks")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit[:12]}+changes" if changed else commit[:12]


def _hashes(folder: Path, names: Iterable[str]) -> dict[str, str | None]:
    def sha256(path: Path) -> str | None:
        if not path.is_file():
            return None
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return {name: sha256(folder / name) for name in names}


def _peak_gb(forget: bool = False) -> float:
    """The process's largest memory in GB, on Linux since the last call that forgets; a GPU's where that is more."""
    if forget and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if forget:
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # what earlier stages freed, glibc may still hold
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    with suppress(OSError):
        kilobytes = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
        return round(max(gpu, int(kilobytes[1]) * 1e3 if kilobytes else 0) / 1e9, 2)
    return round(max(gpu, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1e9, 2)  # macOS counts bytes


def _reason(folder: Path, record: dict) -> str:
    """Why a stage runs: what differs from its latest finished sibling."""
    if any(folder.glob("*.pt")):
        return "goes on where it was interrupted"
    siblings = sorted(folder.parent.glob("*/stage.json"), key=lambda path: path.stat().st_mtime)
    if not siblings:
        return "computed for the first time"
    last = read_json(siblings[-1])
    if last["version"] != record["version"]:
        return f"computed again, the stage's version changed ({last['version']} -> {record['version']})"
    for part, word in (("config", ""), ("inputs", "input ")):
        for name, value in record[part].items():
            if last[part].get(name) != value:
                change = "" if word else f" ({last[part].get(name)} -> {value})"
                return f"computed again, {word}{name} changed{change}"
    return "computed again"
