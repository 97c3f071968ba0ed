"""Profiles, stages and artefacts: the only module that knows about the files of a run.

A run is a folder, runs/<profile>/, of stages. A stage's folder is named by a key: the hash of its configuration, of
the artefacts that it reads and of a version that is raised by hand when its meaning changes. What has not changed is
not computed again; what has is computed beside the old artefact, never over it.
"""

import difflib
import hashlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import torch
import yaml
from filelock import FileLock, Timeout
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from safetensors.torch import load_file, save_file

from paperlib import data, files, models, taps, training
from paperlib.models import reference
from paperlib.models.vgg import parse as parse_vgg

# YAML reads 6e-4 (without a dot) as text; here it is the number that its author meant.
Number = Annotated[float, BeforeValidator(lambda value: _float_or_same(value))]
Rate = Annotated[Number, Field(ge=0, lt=1)]
Share = Annotated[Number, Field(ge=0, le=1)]
Threshold = Annotated[Number, Field(gt=0, lt=1)]


class Settings(BaseModel):
    """Every parameter of a walk. A profile gives each of them a value; there are no defaults elsewhere."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    data: str = Field(description="data set: glyphs100, cifar100, flowers102 or folder:<path>")
    image_size: int = Field(ge=8, le=1024, description="side of the images in pixels")
    limit: int = Field(ge=0, description="use only this many training and test images (0: all)")
    model: str = Field(description="network: cct_<blocks>_<kernel>x<convs>")
    heads: int = Field(ge=0, description="attention heads (0: the model's own number)")
    cnn: str = Field(description="the CNN beside it: vgg_<layers>x<filters>")
    positional_embedding: Literal["learnable", "sine", "none"] = Field(description="positions of the tokens")
    attention_dropout: Rate = Field(description="dropout of attention weights")
    stochastic_depth: Rate = Field(description="drop rate of the last block's branches, rising linearly from 0")
    seeds: list[Annotated[int, Field(ge=0)]] = Field(min_length=1, description="one network is measured for each")
    weights: Literal["trained", "reference"] = Field(description="train here, or start from the committed networks")
    epochs: int = Field(ge=1, description="epochs of training")
    cnn_epochs: int = Field(ge=1, description="epochs of the CNN's training, by AdamW")
    batch_size: int = Field(ge=1, description="images in a training step")
    optimizer: Literal["adamw", "muon"] = Field(description="of the encoders' matrices; the rest takes AdamW")
    token_share: Number = Field(gt=0, le=1, description="random share of the tokens in the first 80 % of the steps")
    lr: Number = Field(gt=0, description="largest learning rate")
    cnn_lr: Number = Field(gt=0, description="largest learning rate of the CNN")
    weight_decay: Number = Field(ge=0, description="decoupled weight decay")
    warmup: Share = Field(description="share of the steps in which the learning rate rises")
    decay: Literal["linear", "cosine"] = Field(description="how the learning rate falls to 0 after that")
    label_smoothing: Share = Field(description="label smoothing of the cross-entropy")
    augmentation: Literal["light", "published"] = Field(
        description="in training: light (shift, flip) or CCT's published"
    )
    shift: int = Field(ge=0, description="light augmentation: largest random shift in pixels")
    flip: bool = Field(description="light augmentation: mirror half of the images")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        description="of the network in training steps; auto: bf16 where it is fast"
    )
    max_steps: int = Field(ge=0, description="steps in an epoch, to cut a walk short (0: all)")
    held_out: Share = Field(description="share of the training images that readouts never see (they decide masks)")
    taps: list[str] = Field(min_length=1, description="taps measured in notebook 02, attn and block among them")
    taps_once: list[str] = Field(description="further taps, measured for the first seed only")
    readout_epochs: int = Field(ge=1, description="epochs of readout training")
    readout_batch_size: int = Field(ge=1, description="images in a readout step")
    readout_lr: Number = Field(gt=0, description="learning rate of a readout, times the root of its features")
    readout_l2: Number = Field(ge=0, description="L2 penalty of the readouts")
    penalties: list[Number] = Field(description="L2 penalties that are compared, beside the group's own (first seed)")
    penalty_taps: list[str] = Field(description="taps of that comparison, at the first, middle and last encoder")
    penalty_epochs: int = Field(ge=2, description="epochs of its readouts; half as many show what is still moving")
    threshold: Threshold = Field(description="a field above this share of the node's maximum counts")
    threshold_sweep: list[Threshold] = Field(description="thresholds for the sweep of notebook 02")
    prune_thresholds: list[Threshold] = Field(min_length=1, description="thresholds of the dilution sweep")
    prune_once: list[Literal["attention", "classifier"]] = Field(description="pruned beside the FF layers (first seed)")
    prune_draws: int = Field(ge=1, description="random and permuted masks at each dilution")
    retrain_thresholds: list[Threshold] = Field(description="which of prune_thresholds are retrained")
    retrain_epochs: int = Field(ge=1, description="epochs of the short retraining")
    retrain_lr: Number = Field(gt=0, description="largest learning rate of the short retraining")
    many_heads: list[Annotated[int, Field(ge=1)]] = Field(description="numbers of heads that are compared (none: [])")
    permutations: int = Field(ge=1, description="draws of the null for head specialisation")
    minutes: int = Field(ge=1, description="time limit of each notebook")


def root() -> Path:
    """The project: the folder with pyproject.toml and notebooks/ at or above the working directory, else around the
    package."""
    here = Path.cwd()
    for folder in (here, *here.parents, Path(__file__).resolve().parent.parent):
        if (folder / "notebooks").is_dir() and (folder / "pyproject.toml").is_file():
            return folder
    raise FileNotFoundError("no project folder (with pyproject.toml and notebooks/) at or above the working directory")


def folder_of(kind: str) -> Path:
    """Where `runs`, `figures` or `data` live: $PAPERLIB_RUNS, ... (relative to the project), else inside it."""
    return (root() / os.environ.get(f"PAPERLIB_{kind.upper()}", kind)).resolve()


def _located(name: str) -> str:
    """A data set's name, with the path of folder:<path> counted from the project, wherever a notebook runs."""
    return f"folder:{root() / Path(name.removeprefix('folder:')).expanduser()}" if name.startswith("folder:") else name


def profiles() -> list[str]:
    """Names of the profiles, as used on the command line."""
    return sorted(path.stem for path in (root() / "notebooks" / "profiles").glob("*.yaml"))


def load_settings(profile: str, changes: dict[str, Any] | None = None) -> Settings:
    """Read a profile and replace single values; raises ValueError, in one sentence, for whatever does not fit."""
    if profile not in profiles():
        raise ValueError(f"unknown profile {profile!r}{_hint(profile, profiles())}: use one of {', '.join(profiles())}")
    path = root() / "notebooks" / "profiles" / f"{profile}.yaml"
    values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    try:
        settings = Settings.model_validate({**values, **(changes or {})})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise ValueError(f"unknown parameter {name!r}{_hint(name, list(Settings.model_fields))}") from None
        if first["type"] == "missing":
            raise ValueError(f"{path.name} gives no value for {name!r}") from None
        raise ValueError(
            f"parameter {name!r}: {first['msg'][0].lower()}{first['msg'][1:]}, not {first['input']!r}"
        ) from None
    if not {"attn", "block"} <= set(settings.taps):
        raise ValueError("parameter 'taps': attn (for the heads) and block must be among them")
    data.check_name(_located(settings.data))
    if len(set(settings.seeds)) < len(settings.seeds):
        raise ValueError(f"parameter 'seeds': {settings.seeds} names a seed twice")
    kinds = [*settings.taps, *settings.taps_once, *settings.penalty_taps]
    with training.seeded(0):  # finds a wrong model, number of heads or tap
        taps.cct_taps(models.cct(settings.model, 2, settings.image_size, heads=settings.heads or None), kinds)
    parse_vgg(settings.cnn)
    check_references(settings)
    odd = set(settings.retrain_thresholds) - set(settings.prune_thresholds)
    if odd:
        raise ValueError(f"parameter 'retrain_thresholds': {sorted(odd)[0]} is not one of prune_thresholds")
    return settings


def reference_name(settings: Settings, seed: int) -> str:
    """What the committed network of these settings is called."""
    return f"{settings.data}-{settings.image_size}-{settings.model}-seed{seed}"


def check_references(settings: Settings) -> None:
    """Raise ValueError if a walk that starts from committed networks asks for one that does not exist, or was trained
    otherwise."""
    for seed in settings.seeds if settings.weights == "reference" else ():
        name = reference_name(settings, seed)
        for part, value in reference.card(name)["recipe"].items():
            if getattr(settings, part) != value:
                raise ValueError(
                    f"{name} was trained with {part}={value}, not {getattr(settings, part)}: "
                    "add weights=trained to train anew"
                )


def changes_of(assignments: list[str]) -> dict[str, Any]:
    """What --set name=value ... replaces; ValueError for what is not of that form."""
    changes = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set {text!r} is not of the form NAME=VALUE")
        try:
            changes[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(
                f"--set {name}: {value!r} is not a value: write a number, a word or a list like [0, 1]"
            ) from None
    return changes


@dataclass(frozen=True)
class Artefact:
    """A finished stage: its folder, and the hash of what is in it."""

    folder: Path
    sha256: str
    seconds: float
    fresh: bool = False  # computed by this process

    def table(self, name: str) -> pd.DataFrame:
        return pd.read_csv(self.folder / f"{name}.csv")

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / f"{name}.safetensors")


@dataclass(frozen=True)
class Run:
    """One walk: its settings and images, and where its artefacts and figures are."""

    profile: str
    settings: Settings
    images: data.Images
    folder: Path
    figures: Path
    log: Callable[[str], None] = print
    prefix: str = ""  # of its stages' names, for a walk within a walk
    finished: dict[str, "Artefact"] = field(default_factory=dict)  # stages of this process, by folder
    seconds: dict[str, float] = field(default_factory=dict)  # stage -> how long it took when it was computed

    @cached_property
    def data_sha256(self) -> str:
        return self.images.sha256

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
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder.parent / ".lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise RuntimeError(f"another run is working on {folder.parent}: wait for it, or stop it") from None
            try:
                self.finished[str(folder)] = self._checked(folder, record) or self._made(folder, record, make)
            finally:
                lock.release()
        self.seconds[name] = self.finished[str(folder)].seconds
        return self.finished[str(folder)]

    def _checked(self, folder: Path, record: dict) -> "Artefact | None":
        """The stage's artefact if it is complete and nobody has changed its files."""
        done = folder / "stage.json"
        if not done.exists():
            self.log(f"{record['stage']}: {_reason(folder, record)}")
            return None
        finished = json.loads(done.read_text(encoding="utf-8"))
        if _hashes(folder, finished["outputs"]) != finished["outputs"]:
            done.unlink()
            self.log(f"{record['stage']}: computed again, its files were changed from outside")
            return None
        self.log(f"{record['stage']}: unchanged, not computed again")
        return Artefact(folder, finished["sha256"], finished["seconds"])

    def _made(self, folder: Path, record: dict, make: Callable[[Path], None]) -> "Artefact":
        start = time.monotonic()
        make(folder)
        for checkpoint in folder.glob("*.pt"):
            checkpoint.unlink()
        outputs = _hashes(folder, sorted(p.name for p in folder.iterdir() if p.suffix in (".csv", ".safetensors")))
        sha256 = hashlib.sha256(json.dumps(outputs, sort_keys=True).encode()).hexdigest()
        seconds = round(time.monotonic() - start, 2)
        record = {**record, "outputs": outputs, "sha256": sha256, "seconds": seconds, "revision": revision()}
        write_text(folder / "stage.json", json.dumps(record, indent=1))
        return Artefact(folder, sha256, seconds, fresh=True)

    def record(self, notebook: str, results: dict[str, Any], verdicts: list[dict]) -> None:
        """Put a notebook's results and verdicts into figures/<profile>/summary.json, beside those of the others.

        What other notebooks wrote stays if it was made with the same settings and data.
        """
        path = self.figures / "summary.json"
        config = self.settings.model_dump()
        old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if old.get("config") != config or old.get("data", {}).get("sha256") != self.data_sha256:
            old = {}
        claims = {verdict["claim"] for verdict in verdicts}
        kept = [verdict for verdict in old.get("verdicts", []) if verdict["claim"] not in claims]
        summary = {
            "profile": self.profile,
            "config": config,
            "seeds": self.settings.seeds,
            "environment": environment(),
            "device": str(training.best_device()),
            "seconds": {**old.get("seconds", {}), **self.seconds},
            "data": {"name": self.images.name, "sha256": self.data_sha256},
            "revision": revision(),
            "results": {**old.get("results", {}), notebook: results},
            "verdicts": sorted(kept + verdicts, key=lambda verdict: verdict["claim"]),
        }
        write_text(path, json.dumps(summary, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def open_run(profile: str, changes: dict[str, Any] | None = None) -> Run:
    """Check the settings, load the data, and open (or make) the folders of a run. Raises ValueError or OSError."""
    settings = load_settings(profile, changes)
    images = data.limit(data.load(_located(settings.data), folder_of("data"), settings.image_size), settings.limit)
    run = Run(profile, settings, images, folder_of("runs") / profile, folder_of("figures") / profile)
    for folder in (run.folder, run.figures):
        folder.mkdir(parents=True, exist_ok=True)
    return run


def card(settings: Settings) -> pd.DataFrame:
    """Every setting of a run: name, value, meaning."""
    rows = [(name, str(getattr(settings, name)), field.description) for name, field in Settings.model_fields.items()]
    return pd.DataFrame(rows, columns=["parameter", "value", "meaning"]).set_index("parameter")


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
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, file.name)


def save_table(path: Path, rows: list[dict] | pd.DataFrame) -> None:
    """Write a table as CSV."""
    write_text(path, pd.DataFrame(rows).to_csv(index=False, lineterminator="\n"))


def environment() -> dict[str, Any]:
    """Versions and hardware of this process, for the run card."""
    packages = ("paperlib", "torch", "torchvision", "numpy", "matplotlib", "pandas")
    return {
        "python": platform.python_version(),
        **{name: package_version(name) for name in packages},
        "platform": platform.platform(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "training_precision": "bf16" if training.fast_bf16(training.best_device().type) else "fp32",
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


def _reason(folder: Path, record: dict) -> str:
    """Why a stage runs: what differs from its latest finished sibling."""
    if any(folder.glob("*.pt")):
        return "goes on where it was interrupted"
    siblings = sorted(folder.parent.glob("*/stage.json"), key=lambda path: path.stat().st_mtime)
    if not siblings:
        return "computed for the first time"
    last = json.loads(siblings[-1].read_text())
    if last["version"] != record["version"]:
        return f"computed again, the stage's version changed ({last['version']} -> {record['version']})"
    for part, word in (("config", ""), ("inputs", "input ")):
        for name, value in record[part].items():
            if last[part].get(name) != value:
                change = "" if word else f" ({last[part].get(name)} -> {value})"
                return f"computed again, {word}{name} changed{change}"
    return "computed again"


def _hint(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _float_or_same(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
