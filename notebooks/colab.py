"""What the notebooks need in Colab beside the project itself (see publish.py, whose cell calls this)."""

import subprocess
import sys
import tempfile
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement

KEPT = ("torch", "torchvision", "numpy")  # Colab's own builds fit its GPUs and each other


def missing() -> list[str]:
    """The package's requirements that this Python does not meet, as pip takes them. Those of the notebooks are left
    out: Colab has a front end, a kernel and widgets of its own, and crashes with others."""
    file = Path(__file__).parent.parent / "pyproject.toml"
    project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
    named = map(Requirement, project["dependencies"])
    return [str(one) for one in named if not one.specifier.contains(_version(one.name) or "0", prereleases=True)]


def prepare() -> None:
    """Install what is missing, replacing nothing of `KEPT`, and say so if there is no GPU."""
    if wanted := missing():
        kept = [f"{name}=={found}" for name in KEPT if (found := _version(name))]
        with tempfile.TemporaryDirectory() as folder:
            pins = Path(folder) / "kept.txt"
            pins.write_text("\n".join(kept), encoding="utf-8")
            subprocess.run([sys.executable, "-m", "pip", "install", "-q", *wanted, "-c", str(pins)], check=True)
    import torch

    if not torch.cuda.is_available():
        print("No GPU: Runtime > Change runtime type gives one. The profile quick takes minutes without it.")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
