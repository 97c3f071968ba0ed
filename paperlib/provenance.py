"""What made a result: versions, hardware, revision, memory."""

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
