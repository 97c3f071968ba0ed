"""Single nodes and heads by hand, without a kernel: one HTML page, from what version 2 of the measure left of a run.

Matrices are kept as levels, one byte an entry: how many hundredths of the node's largest entry it exceeds (below zero:
its share of the largest entry, rounded). A slider that moves by hundredths then shows exactly the Boolean matrices of
`snp.boolean_matrices`; half precision takes twice the room, and rounds what lies beside a threshold across it.
"""

import base64
import io
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from paperlib import heads, macroscopic, snp, taps, verdicts
from paperlib.data import PADDING, TEXTS, Images, balanced
from paperlib.experiment import division, measure, networks
from paperlib.experiment.store import Run
from paperlib.readouts import head_fields

TAPS = (verdicts.FF, verdicts.MHA, verdicts.STREAM)
THRESHOLDS = [number / 100 for number in range(1, 100)]
EXAMPLES = 3  # training images (or texts) that show what a label is
DRIVERS = 4  # test images that drive a node
SIDE = 32  # pixels of a picture


def page(run: Run) -> str:
    """The page of a run's first seed, as HTML. FileNotFoundError, with the command to run, for what is not measured.

    Trained and random network, and rotated nodes of the trained one; first, middle and last encoder."""
    run = replace(run, finished_only=True)
    rules = claim_rules(run)
    found = [view for kind in networks.NETWORKS for view in views(run, run.settings.seeds[0], kind)]
    matrices = [view.pop("levels") for view in found]
    for view, start in zip(found, np.cumsum([0, *map(len, matrices)]).tolist(), strict=False):
        view["start"] = start
    whole = torch.cat(matrices).numpy().tobytes()
    content = {
        "classes": run.images.classes,
        "threshold": round(100 * run.settings.threshold),
        "levels": base64.b64encode(zlib.compress(whole, 9)).decode(),
        "views": found,
        "rules": rules,
    }
    examples = balanced(run.images.y_train)[: EXAMPLES * len(run.images.classes)]
    drivers = sorted({image for view in found for matrix in view["drivers"] for image, _ in matrix})
    content |= {"examples": run.images.y_train[examples].tolist(), "tests": drivers}
    content |= {"truth": run.images.y_test[drivers].tolist(), "texts": [], "columns": 0}
    shown, texts = torch.cat([run.images.x_train[examples], run.images.x_test[drivers]]), run.settings.data in TEXTS
    if texts:
        content["texts"], sheet = [_text(run.images, row) for row in shown.tolist()], ""
    else:
        sheet, content["columns"] = _sheet(shown)
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, undefined=jinja2.StrictUndefined
    )
    script = (folder / "page_explorer.js").read_text(encoding="utf-8")
    things = "text" if texts else "image"
    return environment.get_template("page_explorer.html.j2").render(
        run=run, content=content, sheet=sheet, side=SIDE, things=things, script=script
    )


def views(run: Run, seed: int, kind: str) -> Iterator[dict]:
    """What the page knows of each tap of a trained network (native, then rotated nodes) or a random one: network,
    encoder, tap, accuracy, snr (of the tap, at `THRESHOLDS`), nodes (what each matrix is of), stops (name -> number of
    its matrix), levels (matrices, L, L), owned (labels of each head), drivers (for each matrix (test image, label that
    the node takes it for))."""
    source, read = measure.nodes(run, seed, kind), measure.readouts(run, seed, kind)
    weights, means, table = read.tensors("weights"), source.tensors("means"), source.table("taps")
    owners = division.specialisation(run, seed, kind).table("owners")
    network, _ = networks.load_network(run, seed, kind)
    images, found = measure.prepared(run, seed, kind, network), []
    places = taps.places_first_middle_last(network, TAPS)
    for place in places:
        weight = weights[f"{place.name}/best"]
        accuracy = table[(table.encoder == place.encoder) & (table.tap == place.kind)].accuracy.iloc[0]
        bases = {"native": torch.eye(weight.shape[2])}
        if kind == "trained":
            bases["rotated-0"] = measure.rotations(seed, place, weight.shape[2])[0]
        for basis, turn in bases.items():
            readout, own = snp.rotated(weight, turn), snp.rotated(means[place.name], turn)
            view = {"network": kind if basis == "native" else "rotated", "encoder": place.encoder, "tap": place.kind}
            known, nodes = _matrices(snp.field_matrices(readout, own), place.heads, run.settings.threshold)
            owner = owners[(owners.encoder == place.encoder) & (owners.basis == basis)]
            owned = [owner[owner.owner == head].label.tolist() for head in range(place.heads)]
            found.append((place, readout, turn, nodes, view | known | {"accuracy": accuracy, "owned": owned}))
    answers = [[] for _ in found]
    for batch in taps.activations(network, places, images.x_test, *images.statistics):
        for (place, readout, turn, nodes, _), said in zip(found, answers, strict=True):
            activations = snp.rotated(batch[place.name].cpu(), turn)
            fields = macroscopic.node_fields(activations[..., nodes], readout[..., nodes])
            if place.heads:
                fields = torch.cat([fields, head_fields(activations, readout, place.heads).transpose(0, 1)])
            said.append(fields.max(dim=2))
    for (*_, view), said in zip(found, answers, strict=True):
        fields, taken = (torch.cat(part, dim=1) for part in zip(*said, strict=True))
        strongest = fields.topk(min(DRIVERS, fields.shape[1])).indices
        yield view | {"drivers": torch.stack([strongest, taken.gather(1, strongest)], dim=2).tolist()}


def _matrices(fields: Tensor, num_heads: int, threshold: float) -> tuple[dict, list[int]]:
    """From the fields (D, L, L) of a tap: snr, nodes, stops, levels as in `views`; and the numbers of the nodes."""
    names = stops(fields, threshold)
    nodes, whole = sorted(set(names.values())), [f"head {head}" for head in range(num_heads)]
    numbers = {name: nodes.index(node) for name, node in names.items()}
    numbers |= {name: len(nodes) + head for head, name in enumerate(whole)}
    matrices = [fields[nodes], *([heads.head_matrices(fields, num_heads)] if num_heads else [])]
    known = {
        "nodes": [f"node {node}" for node in nodes] + whole,
        "stops": numbers,
        "levels": levels(torch.cat(matrices)),
    }
    return known | {"snr": tap_snr(levels(fields))}, nodes


def levels(fields: Tensor) -> Tensor:
    """Fields (D, L, L) -> levels, int8: above zero how many of `THRESHOLDS`, as shares of the node's largest entry, an
    entry exceeds, so that a Boolean matrix at k / 100 is level >= k; else the share in percent, -100 or more."""
    maximum = fields.amax(dim=(1, 2), keepdim=True)
    share = fields / maximum.where(maximum > 0, torch.inf)  # as `snp.boolean_matrices` divides
    exceeded = torch.bucketize(share, torch.tensor(THRESHOLDS))
    return torch.where(share > 0, exceeded, (100 * share).round().clamp(min=-100)).to(torch.int8)


def tap_snr(level: Tensor) -> list[float | None]:
    """SNR of all nodes of a tap (D, L, L) together at each of `THRESHOLDS`; None where there is no noise."""
    labels, found = level.shape[1], []
    recognised = level.diagonal(dim1=1, dim2=2).flatten().clamp(min=0).bincount(minlength=100)
    every = level.flatten().clamp(min=0).bincount(minlength=100)
    signal, ones = (part.flip(0).cumsum(0).flip(0)[1:] for part in (recognised, every))
    for own, noise in zip(signal.tolist(), (ones - signal).tolist(), strict=True):
        found.append(round(own * (labels - 1) / noise, 3) if noise else None)
    return found


def stops(fields: Tensor, threshold: float) -> dict[str, int]:
    """Nodes worth a look: those of `snp.chosen_nodes`, and others; one node may be several of them."""
    found = snp.node_statistics(snp.boolean_matrices(fields, threshold))
    noise = found.internal + found.external
    others = {
        "most clusters": found.clusters,
        "strongest": fields.amax(dim=(1, 2)),
        "clearest": found.labels / (1 + noise),
        "noisiest": noise,
    }
    return snp.chosen_nodes(found) | {name: int(value.argmax()) for name, value in others.items()}


def claim_rules(run: Run) -> dict:
    """The rules of C2 and C3 at every threshold that was measured: thresholds (hundredths), status (of each claim, at
    each threshold), rows (claim, name, at: [effect, low, high, met] at each threshold). All seeds."""
    parts = [measure.nodes(run, seed, kind) for seed in run.settings.seeds for kind in networks.NETWORKS]
    tables = {name: pd.concat([part.table(name) for part in parts], ignore_index=True) for name in ("taps", "folds")}
    rows, status = {}, {"C2": [], "C3": []}
    thresholds = sorted(tables["taps"].threshold.unique())
    for threshold in thresholds:
        at = measure.at_threshold(tables, threshold)
        found = [row for tap in (verdicts.FF, verdicts.MHA) for row in verdicts.clusters(at, tap)]
        found += [row for row in verdicts.sharpening(at) if not row.beside]
        for claim, words in status.items():
            words.append(verdicts.of_rows([row for row in found if row.claim == claim], run.images.name).status)
        for row in found:
            numbers = [
                float(f"{value:.3g}") if np.isfinite(value) else None for value in (row.effect, row.low, row.high)
            ]
            rows.setdefault((row.claim, row.name), []).append([*numbers, row.met])
    listed = [{"claim": claim, "name": name, "at": at} for (claim, name), at in rows.items()]
    return {"thresholds": [round(100 * threshold) for threshold in thresholds], "status": status, "rows": listed}


def _sheet(images: Tensor) -> tuple[str, int]:
    """Images (n, 3, S, S) uint8 as one JPEG, row by row: base64, and how many stand in a row."""
    columns = int(np.ceil(len(images) ** 0.5))
    sheet = Image.new("RGB", (columns * SIDE, -(-len(images) // columns) * SIDE))
    for number, image in enumerate(images.permute(0, 2, 3, 1).contiguous().cpu().numpy()):
        small = Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        sheet.paste(small, (number % columns * SIDE, number // columns * SIDE))
    file = io.BytesIO()
    sheet.save(file, "JPEG", quality=85, subsampling=0)
    return base64.b64encode(file.getvalue()).decode(), columns


def _text(images: Images, numbers: list[int]) -> str:
    """A text in words; those that the network does not know as dots."""
    return " ".join(images.words[number - 2] if number > 1 else "…" for number in numbers if number != PADDING)
