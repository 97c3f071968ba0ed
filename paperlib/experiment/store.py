"""Stages and what they leave: the only module that knows about the files of a run.

A stage is a folder of tables and arrays, `<stages>/<name>/<key>`, with a manifest (`stage.json`) that is written last.
The key is the hash of the stage's name, of the settings that decide it and of what it reads: what has not changed is
not computed again, what has is computed beside the old one, never over it.

A committed stage is the same folder with fewer files: its large ones (safetensors) are made again where they are read.

Code is not part of the key: hours of work stay when a module changes. The manifest says which code computed; where it
has changed since, the log, summary.json and the report say so, and `recompute` makes it anew.
"""

import errno
import fnmatch
import hashlib
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from filelock import FileLock, SoftFileLock, Timeout
from pydantic import BaseModel

from paperlib import data, files, limit, provenance, training

MANIFEST = "stage.json"
ANEW = "anew.json"  # beside a stage's folders: stamp of a run -> when it asked for the stage to be computed anew
STARTED = "started.json"  # which code began a stage that is not finished
LARGE = ".safetensors"  # files that are not committed
KEPT = (".csv", ".npz", LARGE)  # what a stage leaves; checkpoints and logs are its own business


@dataclass(frozen=True)
class Stage:
    """A finished stage: its folder, and what its manifest says."""

    folder: Path
    manifest: dict[str, Any]
    again: Callable[[], "Stage"] | None = None  # computes the whole of it, where large files are missing
    fresh: bool = False  # computed by this process
    outdated: tuple[str, ...] | None = ()  # modules that have changed since; None: its code is not known

    @property
    def sha256(self) -> str:
        """Hash of all that it left, committed or not."""
        return self.manifest["sha256"]

    def table(self, name: str) -> pd.DataFrame:
        return pd.read_csv(files.there(self.folder / f"{name}.csv"))

    def arrays(self, name: str) -> dict[str, torch.Tensor]:
        return files.load_arrays(self.folder / f"{name}.npz")

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Large arrays, computed again if they are missing."""
        path = self.folder / f"{name}{LARGE}"
        return files.load_tensors(path) if path.exists() or not self.again else self.again().tensors(name)


@dataclass(frozen=True)
class Run:
    """One experiment: its settings and images, and where its stages and figures are."""

    profile: str
    settings: BaseModel
    images: data.Images
    stages: Path  # where stages are computed
    output: Path  # where figures, tables, summary.json and executed notebooks go
    committed: Path | None = None  # stages that are taken before those of the run
    known_sha256: str | None = None  # of images that are not at hand: then nothing is computed
    log: Callable[[str], None] = print
    prefix: str = ""  # of its stages' names, for a run within a run
    finished_only: bool = False  # a stage that is not finished is an error, not computed
    finished: dict[Path, Stage] = field(default_factory=dict)  # stages of this process, by folder

    @cached_property
    def data_sha256(self) -> str:
        return self.known_sha256 or self.images.sha256

    @property
    def stamp(self) -> str:
        """What a figure carries (see `stamp_of`)."""
        return stamp_of(self.settings.model_dump(), self.data_sha256)

    def config(self, *names: str) -> dict[str, Any]:
        """The named settings, as part of a stage's key."""
        return {name: getattr(self.settings, name) for name in names}

    def stage(self, name: str, config: dict[str, Any], inputs: dict[str, str], make: Callable[[Path], None]) -> Stage:
        """Run `make(folder)` unless this very stage is done, and say why it runs.

        inputs: name -> hash of what the stage reads. `make` writes files into its folder, which survives an
        interruption (so that training resumes); the stage counts as done once its manifest stands there.
        """
        record = {"stage": self.prefix + name, "config": config, "inputs": inputs}
        key = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]
        folder = self.stages / record["stage"] / key
        if folder not in self.finished:
            stage = self._committed(record, key, make) or self._computed(folder, record, make)
            self.finished[folder] = self._dated(stage, make.__module__, inputs)
        return self.finished[folder]

    def _dated(self, stage: Stage, module: str, inputs: dict[str, str]) -> Stage:
        """The stage with the modules that have changed since it, or what it reads, was computed; said once for each set
        of them."""
        if "code" not in stage.manifest:
            return replace(stage, outdated=None)
        now = provenance.made_by(module)
        changed = set(provenance.changed(stage.manifest["code"], now))
        for other in self.finished.values():
            if other.sha256 in inputs.values():
                changed |= {*(other.outdated or ())}
        outdated = tuple(sorted(changed))
        if outdated and not any(other.outdated == outdated for other in self.finished.values()):
            self.log(
                f"{stage.manifest['stage']}: computed before {', '.join(outdated)} changed, and taken as it is, like "
                f"what summary.json names so (run {self.profile} --recompute STAGE computes anew)"
            )
        return replace(stage, outdated=outdated)

    def _committed(self, record: dict, key: str, make: Callable[[Path], None]) -> Stage | None:
        folder = self.committed / record["stage"] / key if self.committed else None
        if not folder or not (folder / MANIFEST).exists() or self._anew(record["stage"]):
            return None
        manifest = read_manifest(folder)
        if changed_files(folder, manifest, without=LARGE):
            raise ValueError(f"{folder}: files do not fit their {MANIFEST}: restore them, or remove the folder")

        @cache  # hashing gigabytes once is enough
        def again() -> Stage:
            made = self.stages / record["stage"] / key
            if not (made / MANIFEST).exists():
                took = f"{manifest['seconds'] / 60:.0f} minutes"
                self.log(f"{record['stage']}: its large files are not committed; making them took {took}")
            whole = replace(self, finished_only=False)._computed(made, record, make)
            if whole.sha256 != manifest["sha256"]:
                self.log(f"{record['stage']}: not bit for bit the committed one (another kind of machine?)")
            return whole

        return Stage(folder, manifest, again)

    def _computed(self, folder: Path, record: dict, make: Callable[[Path], None]) -> Stage:
        if self.known_sha256:
            raise FileNotFoundError(f"{record['stage']} is not among the committed results, or not with these settings")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = locked(folder.parent / ".lock")
        except Timeout:
            self.log(f"{record['stage']}: another run is working on it: waiting until it is done, or stopped")
            lock = locked(folder.parent / ".lock", seconds=-1)
        with lock:
            return self._found(folder, record) or self._made(folder, record, make)

    def _anew(self, stage: str) -> float:
        """When this run asked for a stage to be computed anew (seconds since 1970), or 0."""
        path = self.stages / stage / ANEW
        return files.read_json(path).get(self.stamp, 0.0) if path.exists() else 0.0

    def _found(self, folder: Path, record: dict) -> Stage | None:
        """The stage in its folder if it is complete and nobody has changed its files, or asked for it anew."""
        for old in (*folder.glob(MANIFEST), *folder.glob("*.pt"), *folder.glob(STARTED)):
            if old.stat().st_mtime < self._anew(record["stage"]):
                old.unlink()
        if not (folder / MANIFEST).exists():
            self.log(f"{record['stage']}: {_reason(folder, record)}{self._cost(record['stage'])}")
            return None
        manifest = read_manifest(folder)
        if changed_files(folder, manifest):
            (folder / MANIFEST).unlink()
            self.log(f"{record['stage']}: computed again, its files were changed from outside")
            return None
        return Stage(folder, manifest)

    def _cost(self, stage: str) -> str:
        """How long this stage took with other settings, where that was long enough to be said before it starts."""
        places = [self.stages, *([self.committed] if self.committed else [])]
        finished = (path.parent for place in places for path in (place / stage).glob(f"*/{MANIFEST}"))
        known = [read_manifest(folder)["seconds"] for folder in finished]
        longest = max(known, default=0)
        return f"; with other settings it took {longest / 60:.0f} minutes" if longest >= 60 else ""

    def _made(self, folder: Path, record: dict, make: Callable[[Path], None]) -> Stage:
        if self.finished_only:
            raise FileNotFoundError(
                f"{record['stage']} is not finished with these settings: python -m paperlib measure {self.profile}, "
                "with the same --set"
            )
        limit.before(record["stage"])
        start = time.monotonic()
        provenance.peak_gb(forget=True)
        if not ((folder / STARTED).exists() and any(folder.glob("*.pt"))):  # what is resumed is of the code that began
            code = {"code": provenance.made_by(make.__module__), "revision": provenance.revision()}
            files.write_json(folder / STARTED, code)
        make(folder)
        outputs = {path.name: files.sha256(path) for path in sorted(folder.iterdir()) if path.suffix in KEPT}
        manifest = {
            **record,
            "outputs": outputs,
            "sha256": _sum(outputs),
            "seconds": round(time.monotonic() - start, 2),
            "peak_gb": provenance.peak_gb(),
            **files.read_json(folder / STARTED),
            "environment": provenance.environment(self.settings.precision),
        }
        files.write_json(folder / MANIFEST, manifest)
        for leftover in (
            *folder.glob("*.pt"),
            *folder.glob(".*.part"),
            folder / STARTED,
        ):  # only now is nothing lost without them
            leftover.unlink()
        return Stage(folder, manifest, fresh=True)

    def recompute(self, patterns: list[str]) -> None:
        """Have the stages whose names match, such as `snr-*`, computed anew where this run, or another one of the same
        settings and data, asks for them; what is finished or committed with other settings stays. ValueError for a
        pattern that none matches."""
        places = [self.stages, *([self.committed] if self.committed else [])]
        known = sorted({path.parent.parent.name for place in places for path in place.glob(f"*/*/{MANIFEST}")})
        for pattern in patterns:
            found = fnmatch.filter(known, pattern)
            if not found:
                raise ValueError(f"no finished stage is called {pattern}: there are {', '.join(known) or 'none'}")
            for name in found:
                path = self.stages / name / ANEW
                path.parent.mkdir(parents=True, exist_ok=True)
                asked = files.read_json(path) if path.exists() else {}
                files.write_json(path, asked | {self.stamp: time.time()})
        self.finished.clear()

    def record(self, notebook: str, results: dict[str, Any], verdicts: list[dict]) -> None:
        """Put a notebook's results and verdicts into summary.json, beside those of the others.

        What other notebooks wrote stays if it was made with the same settings and data; else it is dropped, and said.
        """
        path = self.output / "summary.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock = locked(path.with_name(".summary.lock"), seconds=120)
        except Timeout:
            raise RuntimeError(f"another notebook holds {path} for minutes: stop it") from None
        with lock:
            files.write_json(path, self._summary(path, notebook, results, verdicts))

    def _summary(self, path: Path, notebook: str, results: dict[str, Any], verdicts: list[dict]) -> dict[str, Any]:
        config = self.settings.model_dump()
        old = files.read_json(path) if path.exists() else {}
        if old and (old["config"] != config or old["data"]["sha256"] != self.data_sha256):
            others = ", ".join(sorted(old["results"].keys() - {notebook}))
            if others:
                self.log(f"{path.name}: dropped, since settings or data were others: {others}")
            old = {}
        claims = {verdict["claim"] for verdict in verdicts}
        kept = [verdict for verdict in old.get("verdicts", []) if verdict["claim"] not in claims]
        used = {stage.manifest["stage"]: stage for stage in self.finished.values()}
        return {
            "profile": self.profile,
            "config": config,
            "seeds": self.settings.seeds,
            "environment": provenance.environment(self.settings.precision),
            "device": str(training.best_device()),
            "data": {
                "name": self.images.name,
                "sha256": self.data_sha256,
                "classes": self.images.classes,
                "vocabulary": self.images.vocabulary,
            },
            "revision": provenance.revision(),
            "results": dict(sorted({**old.get("results", {}), notebook: results}.items())),
            "verdicts": sorted(kept + verdicts, key=lambda verdict: verdict["claim"]),
            "stages": old.get("stages", {}) | {name: _entry(stage) for name, stage in used.items()},
        }


def _entry(stage: Stage) -> dict[str, Any]:
    """What summary.json says of a stage: its key, what it cost, and what computed it."""
    made = stage.manifest
    return {
        "key": stage.folder.name,
        "seconds": made["seconds"],
        "peak_gb": made["peak_gb"],
        "revision": made.get("revision"),
        "machine": provenance.machine(made["environment"]) if "environment" in made else None,
        "changed_since": None if stage.outdated is None else list(stage.outdated),
    }


def locked(path: Path, seconds: float = 0) -> AbstractContextManager:
    """A lock to hold in a `with` block; Timeout after so many seconds (-1: never). On a file system without locks (some
    of clusters have none) a second file is one, while the process that made it lives."""
    try:
        return FileLock(path).acquire(timeout=seconds)
    except OSError as error:
        if isinstance(error, Timeout) or error.errno not in (errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS):
            raise
    return SoftFileLock(path.with_suffix(".soft")).acquire(timeout=seconds)


def stamp_of(config: dict[str, Any], data_sha256: str) -> str:
    """Short hash of a run's settings and data: figures and summaries of one run have the same."""
    return hashlib.sha256(json.dumps([config, data_sha256], sort_keys=True).encode()).hexdigest()[:12]


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a finished stage says of itself; ValueError if it is damaged, or does not say enough."""
    manifest = files.read_json(folder / MANIFEST)
    with files.reading(folder / MANIFEST, files.ANEW):
        wanted = {"stage": str, "config": dict, "inputs": dict, "outputs": dict, "sha256": str, "seconds": int | float}
        for name, kind in (wanted | {"peak_gb": int | float}).items():
            if not isinstance(manifest.get(name), kind):
                raise ValueError(f"it does not tell {name}")
    return manifest


def changed_files(folder: Path, manifest: dict[str, Any], without: str = "") -> list[str]:
    """The files of a stage that are not as its manifest says, but for those that end in `without`. ValueError if the
    manifest does not even fit itself."""
    with files.reading(folder / MANIFEST, files.ANEW):
        if _sum(manifest["outputs"]) != manifest["sha256"]:
            raise ValueError("its hashes do not fit each other")
    outputs = manifest["outputs"].items()
    return [
        name
        for name, value in outputs
        if not (without and name.endswith(without)) and files.sha256(folder / name) != value
    ]


def _sum(outputs: dict[str, str | None]) -> str:
    return hashlib.sha256(json.dumps(outputs, sort_keys=True).encode()).hexdigest()


def _reason(folder: Path, record: dict) -> str:
    """Why a stage runs: what differs from its latest finished sibling."""
    if any(folder.glob("*.pt")):
        return "goes on where it was interrupted"
    siblings = sorted(folder.parent.glob(f"*/{MANIFEST}"), key=lambda path: path.stat().st_mtime)
    if not siblings:
        return "computed for the first time"
    last = read_manifest(siblings[-1].parent)
    for part, word in (("config", ""), ("inputs", "input ")):
        for name, value in record[part].items():
            if last[part].get(name) != value:
                change = "" if word else f" ({last[part].get(name)} -> {value})"
                return f"computed again, {word}{name} changed{change}"
    return "computed again"
