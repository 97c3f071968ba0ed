"""Profiles: every parameter of an experiment, its meaning and its range, and how an experiment is opened."""

import difflib
import hashlib
import re
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pandas as pd
import torch
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from torch import nn

from paperlib import data, models, taps, training
from paperlib.experiment.store import Run
from paperlib.files import read_json, reading
from paperlib.models import reference
from paperlib.models.vgg import parse as parse_vgg
from paperlib.paths import folder_of, root

# Others' YAML reads 6e-4 (without a dot) as text; here it is the number that its author meant.
DECIMAL = r"[-+]?(?:0|[1-9][0-9]*)?(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?"
Number = Annotated[float, BeforeValidator(lambda value: _float_or_same(value))]
Rate = Annotated[Number, Field(ge=0, lt=1)]
Share = Annotated[Number, Field(ge=0, le=1)]
Threshold = Annotated[Number, Field(gt=0, lt=1)]
Penalty = Annotated[Number, Field(ge=0)]

WALK = "walk"  # where the figures of a profile's own settings go
BASE = "base"  # the profile that every other one starts from


class Settings(BaseModel):
    """Every parameter of an experiment. profiles/base.yaml gives each of them a value, a profile replaces some."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    data: str = Field(description="data set: glyphs100, cifar100, flowers102(-resplit) or folder:<path>")
    image_size: int = Field(ge=8, le=1024, description="side of the images in pixels, or words of a text")
    limit: int = Field(ge=0, description="use only this many training and test images (0: all)")
    model: str = Field(description="network: cct_<blocks>_<kernel>x<convs>")
    heads: int = Field(ge=0, description="attention heads (0: the model's own number)")
    cnn: str = Field(description="the CNN beside it: vgg_<layers>x<filters>")
    positional_embedding: Literal["learnable", "sine", "none"] = Field(description="positions of the tokens")
    attention_dropout: Rate = Field(description="dropout of attention weights")
    stochastic_depth: Rate = Field(description="drop rate of the last block's branches, rising linearly from 0")
    seeds: list[Annotated[int, Field(ge=0)]] = Field(
        min_length=1, max_length=100, description="one network is measured for each"
    )
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
    augmentation: Literal["light", "mixed", "published"] = Field(
        description="light: shift, flip; mixed: half of the batches by mixup or cutmix, too; published: CCT's"
    )
    shift: int = Field(ge=0, description="largest random shift in pixels (light, mixed; of readouts always)")
    flip: bool = Field(description="mirror half of the images (light, mixed; of readouts always)")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        description="of the network in training steps; auto: bf16 where it is fast"
    )
    max_steps: int = Field(ge=0, description="steps in an epoch, to cut a walk short (0: all)")
    held_out: Threshold = Field(description="share of training images that readouts never see (for masks and owners)")
    blind: bool = Field(description="networks never see the held-out images either")
    taps: list[str] = Field(min_length=1, description="taps measured in notebook 02, attn and block among them")
    taps_once: list[str] = Field(description="further taps, measured for the first seed only")
    readout_epochs: int = Field(ge=1, description="epochs of readout training")
    readout_batch_size: int = Field(ge=1, description="images in a readout step")
    readout_lr: Number = Field(gt=0, description="learning rate of a readout, divided by the root of its features")
    readout_l2: Penalty = Field(description="L2 penalty of the readouts")
    penalties: list[Penalty] = Field(description="L2 penalties that are compared, beside the group's own (first seed)")
    penalty_taps: list[str] = Field(min_length=1, description="taps of that comparison; first, middle and last encoder")
    penalty_epochs: int = Field(ge=2, description="epochs of its readouts; half as many show what is still moving")
    threshold: Threshold = Field(description="a field above this share of the node's maximum counts")
    threshold_sweep: list[Threshold] = Field(description="thresholds for the sweep of notebook 02")
    prune_thresholds: list[Threshold] = Field(min_length=1, description="thresholds of the dilution sweep")
    prune_attention: bool = Field(description="qkv and proj are pruned too, for the first seed")
    prune_draws: int = Field(ge=1, description="random and permuted masks at each dilution")
    retrain_thresholds: list[Threshold] = Field(description="which of prune_thresholds are retrained")
    retrain_epochs: int = Field(ge=1, description="epochs of the short retraining")
    retrain_lr: Number = Field(gt=0, description="largest learning rate of the short retraining")
    many_heads: list[Annotated[int, Field(ge=1)]] = Field(description="numbers of heads that are compared (none: [])")
    permutations: int = Field(ge=1, description="draws of the null for head specialisation")


class PlainYaml(yaml.SafeLoader):
    """YAML whose numbers are decimal and whose words are words: 010 is no 8, 1:30 no 90, `no` not false; a name that
    stands twice is refused."""

    yaml_implicit_resolvers: ClassVar[dict] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [self.construct_object(key, deep=deep) for key, _ in node.value]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{twice[0]!r} stands twice")
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("bool", r"^(?:true|false)$", "tf"),
    ("int", r"^[-+]?(?:0|[1-9][0-9]*)$", "-+0123456789"),
    ("float", rf"^(?=.*[0-9]){DECIMAL}$|^[-+]?\.(?:inf|nan)$", "-+.0123456789"),
    ("null", r"^(?:null|~|)$", ["n", "~", ""]),
):
    PlainYaml.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


def profiles() -> list[str]:
    """Names of the profiles, as used on the command line."""
    return sorted(path.stem for path in _folder().glob("*.yaml") if path.stem != BASE)


def headline(profile: str) -> str:
    """The first line of a profile, which says what it is."""
    return (_folder() / f"{profile}.yaml").read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")


def _folder() -> Path:
    return root() / "notebooks" / "profiles"


def _values(profile: str) -> dict[str, Any]:
    path = _folder() / f"{profile}.yaml"
    with reading(path, "write plain YAML, one NAME: VALUE a line"):
        return {**(yaml.load(path.read_text(encoding="utf-8"), PlainYaml) or {})}


def load_settings(profile: str, changes: dict[str, Any] | None = None) -> Settings:
    """Read a profile and replace single values; raises ValueError, in one sentence, for whatever does not fit."""
    profile = str(profile)  # papermill -p profile 1 gives a number
    if profile not in profiles():
        raise ValueError(f"unknown profile {profile!r}{_hint(profile, profiles())}: use one of {', '.join(profiles())}")
    values = _values(BASE) | _values(profile)
    try:
        settings = Settings.model_validate({**values, **_as_changes(changes)})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise ValueError(f"unknown parameter {name!r}{_hint(name, list(Settings.model_fields))}") from None
        if first["type"] == "missing":
            raise ValueError(f"neither {BASE}.yaml nor {profile}.yaml gives a value for {name!r}") from None
        raise ValueError(
            f"parameter {name!r}: {first['msg'][0].lower()}{first['msg'][1:]}, not {first['input']!r}"
        ) from None
    _check_together(settings)
    return settings


def _check_together(settings: Settings) -> None:
    """Raise ValueError for values that do not fit each other, or name what does not exist."""
    if not {"attn", "block"} <= set(settings.taps):
        raise ValueError("parameter 'taps': attn (for the heads) and block must be among them")
    if "block" not in settings.penalty_taps:
        raise ValueError("parameter 'penalty_taps': block must be among them, C1 and C3 ask for every penalty of it")
    data.check_name(_located(settings.data))
    for name, one in (("seeds", "seed"), ("taps", "tap"), ("taps_once", "tap"), ("penalty_taps", "tap")):
        if len(set(values := getattr(settings, name))) < len(values):
            raise ValueError(f"parameter {name!r}: {values} names a {one} twice")
    kinds = [*settings.taps, *settings.taps_once, *settings.penalty_taps]
    _check_texts(settings)
    with training.seeded(0):  # finds a wrong model, number of heads or tap
        for heads in (settings.heads or None, *settings.many_heads):
            taps.cct_taps(_smallest(settings, heads), kinds)
    if settings.data not in data.TEXTS:
        parse_vgg(settings.cnn, settings.image_size)
    if settings.weights == "reference":
        check_references(settings)
    if settings.prune_thresholds != sorted(set(settings.prune_thresholds)):  # the first ones are taken for the smallest
        raise ValueError(f"parameter 'prune_thresholds': {settings.prune_thresholds} must rise, each named once")
    odd = set(settings.retrain_thresholds) - set(settings.prune_thresholds)
    if odd:
        raise ValueError(f"parameter 'retrain_thresholds': {sorted(odd)[0]} is not one of prune_thresholds")


def _check_texts(settings: Settings) -> None:
    """Raise ValueError if a transformer of texts is to read images, or the other way round, or texts are to be treated
    like images."""
    is_text = settings.data in data.TEXTS
    if is_text != settings.model.startswith("text"):
        raise ValueError(f"parameter 'model': {settings.model} does not read {settings.data}: take another of the two")
    if settings.data == "clinc150" and round(120 * settings.held_out) != 20:
        raise ValueError("parameter 'held_out': 0.16667 keeps the validation texts of CLINC150 from networks")
    if is_text and (settings.augmentation != "light" or settings.token_share < 1):
        raise ValueError("texts are taken as they are: augmentation must be light, and token_share 1")


def _smallest(settings: Settings, heads: int | None) -> nn.Module:
    """The transformer of these settings for two labels and three words."""
    shape = (settings.model, 2, settings.image_size)
    text = settings.model.startswith("text")
    return models.text_transformer(*shape, 3, heads=heads) if text else models.cct(*shape, heads=heads)


def reference_name(settings: Settings, seed: int) -> str:
    """What the committed network of these settings is called."""
    blind = "-blind" if settings.blind else ""
    return f"{settings.data}-{settings.image_size}-{settings.model}{blind}-seed{seed}"


def check_references(settings: Settings) -> None:
    """Raise ValueError if a committed network of these settings does not exist, or was trained otherwise."""
    for seed in settings.seeds:
        name = reference_name(settings, seed)
        if name not in reference.references():
            raise ValueError(f"there is no committed network {name}: add weights=trained to train one")
        card = reference.card(name)
        card["cct_options"].pop("vocabulary", None)  # the data decide it
        for part, value in (card["recipe"] | card["cct_options"]).items():
            if getattr(settings, part) != (value or 0):  # heads: None in a card, 0 in a profile
                raise ValueError(
                    f"{name} was trained with {part}={value}, not {getattr(settings, part)}: "
                    "add weights=trained to train anew"
                )


def check_data(settings: Settings, images: data.Images) -> None:
    """Raise ValueError if the committed networks were trained on other images than these."""
    for name in (reference_name(settings, seed) for seed in settings.seeds):
        if not reference.is_trained_on(reference.card(name), images):
            raise ValueError(f"{name} was trained on another {settings.data}: add weights=trained to train anew")


def check_batches(settings: Settings, images: int) -> None:
    """Raise ValueError if a training step of the CNN would have one image that it shrinks to one pixel: batch norm
    needs two values."""
    steps = -(-images // settings.batch_size)
    whole = steps <= (settings.max_steps or steps)
    if (
        settings.data not in data.TEXTS
        and settings.image_size < 32
        and (settings.batch_size == 1 or (whole and images % settings.batch_size == 1))
    ):
        raise ValueError(
            f"parameter 'batch_size': {settings.batch_size} leaves one of {images} training images alone in its step, "
            f"which the CNN cannot take at {settings.image_size} pixels: take another batch_size or limit"
        )


def changes_of(assignments: list[str]) -> dict[str, Any]:
    """What --set name=value ... replaces; ValueError for what is not of that form."""
    changes = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set {text!r} is not of the form NAME=VALUE")
        if name in changes:
            raise ValueError(f"--set names {name} twice: say once what it is")
        try:
            changes[name] = value if " #" in value else yaml.load(value, PlainYaml)  # no comment on a command line
        except Exception:  # yaml's own errors, and whatever its tags !!int, !!bool, !!timestamp raise
            raise ValueError(
                f"--set {name}: {value!r} is not a value: write a number, a word or a list like [0, 1]"
            ) from None
    return changes


def _as_changes(changes: Any) -> dict[str, Any]:
    """The parameter `settings` of a notebook: a dictionary, or its text, as `papermill -p` passes it."""
    if isinstance(changes, str):
        with suppress(Exception):  # what is no dictionary is said below
            changes = yaml.load(changes, PlainYaml)
    if not isinstance(changes or {}, dict):
        raise ValueError(f"settings must be a dictionary such as {{'epochs': 3}}, not {changes!r}")
    return changes or {}


def open_run(profile: str, changes: dict[str, Any] | None = None) -> Run:
    """Check the settings, load the data, and open (or make) the folders of a run. Raises ValueError or OSError.

    What a run with changed settings shows lies in a folder of its own, so that it never mixes with the profile's."""
    settings = load_settings(profile, changes)
    pd.set_option("display.max_rows", 300, "display.max_colwidth", None)  # tables are shown whole
    images = data.load(_located(settings.data), folder_of("data"), settings.image_size)
    if settings.weights == "reference":
        check_data(settings, images)
    images = data.limit(images, settings.limit)
    held = data.hold_out(images, settings.held_out)  # finds a label with too few images
    images = held if settings.blind else images
    check_batches(settings, len(images.x_train))
    output = _output(profile, settings)
    try:
        output.mkdir(parents=True, exist_ok=True)
        for folder in (output, output.parent / "stages"):
            folder.mkdir(exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
    except OSError as error:
        reason = error.strerror
        raise OSError(f"{output.parent} cannot be written to ({reason}): set PAPERLIB_RUNS elsewhere") from error
    return Run(profile, settings, images, output.parent / "stages", output, committed_stages(profile))


def results(profile: str, changes: dict[str, Any] | None = None) -> Path:
    """The folder with figures, tables and summary.json of a walk, or, where there was none, of the published results.
    ValueError where there are neither."""
    settings = load_settings(profile, changes)
    walked, published = _output(profile, settings), root() / "figures" / profile
    for folder in (walked, *([] if walked.name != WALK else [published])):
        if (folder / "summary.json").exists():
            return folder
    raise ValueError(f"there are no results of {profile} with these settings: start with ./run_all.sh {profile}")


def _output(profile: str, settings: Settings) -> Path:
    """Where a walk's figures go: with changed settings, into a folder of their own."""
    changed = settings != load_settings(profile)
    return folder_of("runs") / profile / (f"changed-{_short_hash(settings)}" if changed else WALK)


def committed_stages(profile: str) -> Path:
    """Where a profile's committed measurements are."""
    return root() / "figures" / profile / "stages"


def _short_hash(settings: Settings) -> str:
    return hashlib.sha256(settings.model_dump_json().encode()).hexdigest()[:8]


def card(settings: Settings) -> pd.DataFrame:
    """Every setting of a run: name, value, meaning."""
    rows = [(name, str(getattr(settings, name)), field.description) for name, field in Settings.model_fields.items()]
    return pd.DataFrame(rows, columns=["parameter", "value", "meaning"]).set_index("parameter")


def open_committed(profile: str) -> Run:
    """The run behind figures/<profile>/summary.json without its images: committed stages only."""
    summary = read_json(root() / "figures" / profile / "summary.json")
    settings = load_settings(profile, summary["config"])
    known, nothing = summary["data"], torch.zeros(0)
    images = data.Images(known["name"], *[nothing] * 4, tuple(known["classes"]))
    if known["name"] in data.TEXTS:  # a network of texts has as many embeddings
        images = data.Texts(known["name"], *[nothing] * 4, images.classes, words=("",) * (known["vocabulary"] - 2))
    stages = committed_stages(profile)
    return Run(profile, settings, images, stages, stages, stages, summary["data"]["sha256"])


def _located(name: str) -> str:
    """A data set's name, with the path of folder:<path> counted from the project, wherever a notebook runs."""
    return f"folder:{root() / Path(name.removeprefix('folder:')).expanduser()}" if name.startswith("folder:") else name


def _hint(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _float_or_same(value: Any) -> Any:
    return float(value) if isinstance(value, str) and value and re.fullmatch(DECIMAL, value) else value
