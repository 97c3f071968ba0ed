"""What made a result: versions, hardware, revision, code, memory."""

import ast
import ctypes
import hashlib
import platform
import re
import resource
import subprocess
from contextlib import suppress
from functools import cache
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

import torch

from paperlib import __version__, training
from paperlib.paths import root


def environment(precision: str = "auto") -> dict[str, Any]:
    """Versions and hardware of this process, for manifests and the run card."""
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


def machine(environment: dict[str, Any]) -> str:
    """What computed, of an `environment`: the GPU, or threads and kind of CPU."""
    return environment["gpu"] or f"{environment['threads']} CPU threads ({environment['cpu_capability']})"


def revision() -> str | None:
    """The git commit of the project, with "+changes" if code differs from it; None where the project is no checkout of
    its own (a folder inside of another repository is none)."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root(), capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root().resolve():
            return None
        commit = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "paperlib")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit[:12]}+changes" if changed else commit[:12]


# Modules that decide where results are and how they are told, not what they are
BESIDE = ("files", "paths", "provenance", "experiment", "experiment.settings", "experiment.store")


def made_by(module: str) -> dict[str, str]:
    """Code that a function of this module may run: module of the package -> hash, for all that it imports, directly or
    not, but for those `BESIDE` the point."""
    found, todo = {}, [module.removeprefix("paperlib.")]
    while todo:
        name = todo.pop()
        path = _source(name)
        if name not in found and name not in BESIDE and path.is_file():
            found[name], imported = _read(path)
            todo += imported
    return dict(sorted(found.items()))


def changed(then: dict[str, str], now: dict[str, str]) -> list[str]:
    """The modules whose code differs between two results of `made_by`."""
    return sorted(name for name in then.keys() | now if then.get(name) != now.get(name))


def _source(name: str) -> Path:
    path = Path(__file__).parent.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def _read(path: Path) -> tuple[str, list[str]]:
    """Hash of a module's code, without comments, docstrings and layout, and the package's modules that it imports."""
    tree, names = ast.parse(path.read_text(encoding="utf-8")), []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "paperlib":
            place = node.module.removeprefix("paperlib").removeprefix(".")
            names += [place, *(f"{place}.{alias.name}".removeprefix(".") for alias in node.names)]
    return hashlib.sha256(repr(_meaning(tree)).encode()).hexdigest()[:12], [name for name in names if name]


def _meaning(node: Any) -> Any:
    """A syntax tree as nested tuples, the same for every version of Python: no positions, nothing empty."""
    if isinstance(node, list):
        return tuple(_meaning(part) for part in node if not _is_text(part))
    if not isinstance(node, ast.AST):
        return node
    fields = [(name, _meaning(value)) for name, value in ast.iter_fields(node) if value not in (None, [])]
    return (type(node).__name__, *fields)


def _is_text(node: Any) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


@cache
def code_sha256() -> str:
    """Hash of the package's code."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(str(path.relative_to(Path(__file__).parent)).encode() + path.read_bytes())
    return digest.hexdigest()


def peak_gb(forget: bool = False) -> float:
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
