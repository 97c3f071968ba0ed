"""One page about a finished run: verdicts, figures with captions, tables, run card, deviations; self-contained, for any
browser. It asks for nothing from outside, runs no script, and shows names from data as text.
"""

import argparse
import base64
from pathlib import Path

import jinja2
import mistune
import pandas as pd
from PIL import Image

from paperlib.answers import CLAIMS
from paperlib.claims import BESIDE, of_claims
from paperlib.experiment import settings
from paperlib.experiment.store import stamp_of
from paperlib.files import read_json, write_text
from paperlib.pages import without_links
from paperlib.paths import folder_of, root

EMBEDDED_BYTES = 300_000  # a larger table is named, not embedded
# Figures of the first seed only
FIRST_SEED = {
    "penalties", "node", "node_gallery", "head_map", "head_matrices", "attention_maps", "node_versions", "turned_nodes",
    "kept_connections",
}  # fmt: skip
NO_NULL = "none, this shows what is counted; see node_distributions."
BY_HEADS = "none in this picture; see head_specialisation."
# figure -> (notebook, claim, what it shows, against which null)
CAPTIONS = {
    "learning_curve": ("01 07", "", "Training loss and test accuracy of the CCT, epoch by epoch.", "Dotted: chance."),
    "snr_per_encoder": (
        "02", "C2, C3",
        "Accuracy of linear readouts (left) and raw signal-to-noise ratio of single nodes (right) along the encoders.",
        "Dashed: the same network with random weights, its readouts trained alike. Dash-dotted: readouts trained on "
        "randomly reassigned labels, first seed. Dotted: 1, exchangeable labels.",
    ),
    "threshold_sweep": (
        "02 07", "C3", "SNR of one tap along the encoders for several thresholds.", "Dashed: random weights.",
    ),
    "node_distributions": (
        "02 07", "C2", "Labels, clusters and noise of single nodes; bars hold the middle 50 % and 95 % of the nodes.",
        "The random network beside the trained one.",
    ),
    "penalties": (
        "02", "C3",
        "Readout accuracy and SNR for several L2 penalties; faint: after half the epochs.",
        "Dashed: random weights.",
    ),
    "node": ("02", "C2", "Field and Boolean matrix of a typical node of the last encoder; clusters framed.", NO_NULL),
    "node_gallery": (
        "02 07", "C2",
        "Typical and extreme nodes of three encoders, labels ordered by cluster, clusters framed.", NO_NULL,
    ),
    "predicted_accuracies": (
        "02", "C6", "Accuracy of random sets of nodes: predicted from single nodes against measured.",
        "A curve that knows the number of nodes only.",
    ),
    "accuracy_against_dilution": (
        "03", "C4", "Test accuracy against the share of pruned connections, and what is lost, with C4's half point as "
        "a line; open symbols: after a short retraining.",
        "Random, permuted, magnitude and activation masks of equal dilution in every layer.",
    ),
    "head_matrices": (
        "04 07", "C5", "For how many of a head's nodes an image of one label (row) makes another one (column) answer; "
        "labels by owner, own labels framed.", "Random weights, where a row says so; see the specialisation of heads.",
    ),
    "head_map": (
        "04", "C5", "How many nodes of each head recognise the labels that a head owns.",
        "Below: the same nodes randomly reassigned to the heads.",
    ),
    "head_experts": (
        "04", "C5", "Margins of owners; accuracy of a label's owner alone against the best other head; accuracy lost "
        "by silencing each head on each owner's labels.", BY_HEADS,
    ),
    "head_specialisation": (
        "04", "C5",
        "Excess specialisation of heads, and accuracy lost on own labels less that on others when a head is silenced.",
        "Nodes permuted among heads; random weights; owners randomly reassigned.",
    ),
    "cooperation": (
        "04", "C5", "How well sets of a head's nodes recognise the head's own labels, and which of these it is.",
        "Grey: nodes randomly reassigned to as many heads, on labels of their own.",
    ),
    "attention_maps": (
        "04", "C5", "Attention received by each token, for images of a head's own labels and of others.",
        "Owners of randomly reassigned labels: the table in notebook 04.",
    ),
    "cnn_learning_curve": ("05", "", "Training loss and test accuracy of the CNN, epoch by epoch.", "Dotted: chance."),
    "two_halves": (
        "05", "C1", "The CCT's encoders and the CNN's layers on one axis of relative depth.", "Dashed: random weights.",
    ),
    "cnn_accuracy_against_dilution": (
        "05", "C4", "Test accuracy of the CNN against the share of pruned connections between filters, and what is "
        "lost; open symbols: after a short retraining.",
        "Random, permuted, magnitude and activation masks of equal dilution.",
    ),
    "along_depth": (
        "07", "C2, C3", "Accuracy, raw and centred SNR of single nodes along the encoders.",
        "Dotted: rotated nodes. Dashed: random weights.",
    ),
    "which_node": (
        "07", "C2", "SNR of native nodes over that of rotated ones, which carry the same information.",
        "Dashed: random weights. 1: single nodes mean no more than other directions.",
    ),
    "heads_along_depth": (
        "07", "C5", "Specialisation of heads, what silencing one costs its own labels, and how well it chooses among "
        "them.", "Permuted and rotated nodes, random weights, reassigned owners, as many nodes of all heads.",
    ),
    "silenced_heads": (
        "07", "C5", "Accuracy lost on each owner's labels by silencing each head.",
        "Off the diagonal: the labels of other heads.",
    ),
    "kept_connections": (
        "07", "C4", "What ANDC keeps of a readout: a node's connections to the labels that it recognises.",
        "Grey: what it removes.",
    ),
    "pruned_readouts": (
        "07", "C4", "Accuracy lost by a readout whose nodes stay connected to the labels that they recognise.",
        "Random, permuted, magnitude and activation masks of equal dilution.",
    ),
    "removed_connections": (
        "07", "C4", "Left: accuracy lost by ANDC of a readout, with and without the mean of what was removed. Right: "
        "how much of what was removed is alike for all inputs.", "Masks of equal dilution by other criteria.",
    ),
    "late_layers": (
        "07", "C4", "Accuracy lost by pruned layers of the last encoders against the epochs of their retraining.",
        "Random, permuted, magnitude and activation masks of equal dilution; the layer removed.",
    ),
    "predicted_sets": (
        "07", "C6", "Accuracy of random sets of nodes: predicted from single nodes against measured.",
        "A curve that knows the number of nodes, in the same encoder.",
    ),
    "your_network": (
        "08", "", "Readout accuracy, raw and centred SNR of a network of another library, stage by stage.",
        "Crosses: the same network with random weights. Dotted: rotated nodes.",
    ),
    "node_versions": (
        "09", "", "The clearest node of the last FF layer: field matrix, Boolean matrix, clusters framed.",
        "Rotated twin, which carries the same information; the same network with random weights.",
    ),
    "turned_nodes": (
        "09", "", "Above: the Boolean matrix of one node while it turns. Below: SNR and recognised labels of all nodes "
        "of the last FF layer.", "Crosses: the same network with random weights, turned alike.",
    ),
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("profile", metavar="PROFILE", choices=settings.profiles())


def execute(options: argparse.Namespace) -> int:
    print(write(folder_of("runs") / options.profile / "walk"))
    return 0


def page(folder: Path) -> str:
    """The report of the run whose figures and summary.json are in the folder, as HTML."""
    summary = read_json(folder / "summary.json")
    found = {path.stem for path in folder.glob("*.png")}
    if missing := found - set(CAPTIONS):
        raise ValueError(f"no caption for the figure {sorted(missing)[0]}: add it to CAPTIONS")
    walked = {name[:2] for name in summary["results"]}  # figures of other notebooks may be of other settings
    check_stamps(folder, summary, [name for name, caption in CAPTIONS.items() if walked & {*caption[0].split()}])
    figures = [
        {"name": name, "claim": claim, "text": text, "null": null, "image": _uri(folder / f"{name}.png", "image/png"),
         "table": _table(folder / f"{name}.csv"), "n": 1 if name in FIRST_SEED else len(summary["seeds"])}
        for name, (notebook, claim, text, null) in CAPTIONS.items() if name in found and walked & {*notebook.split()}
    ]  # fmt: skip
    used = settings.load_settings(summary["profile"], summary["config"])
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("report.html.j2").render(
        summary=summary,
        words=of_claims(summary["verdicts"]),
        beside=BESIDE,
        claims={claim: text for claim, (text, _) in CLAIMS.items()},
        figures=figures,
        card=settings.card(used).itertuples(name=None),
        hours=sum(stage["seconds"] for stage in summary["stages"].values()) / 3600,
        verdict_csv=_data("text/csv", pd.DataFrame(summary["verdicts"]).to_csv(index=False).encode()),
        outdated=[name for name, stage in summary["stages"].items() if stage["changed_since"]],
        deviations=_html(root() / "docs" / "deviations.md"),
    )


def check_stamps(folder: Path, summary: dict, names: list[str]) -> None:
    """Raise ValueError if one of these figures was drawn with other settings or data than the summary is of."""
    stamp = stamp_of(summary["config"], summary["data"]["sha256"])
    for path in (folder / f"{name}.png" for name in names):
        if path.exists():
            with Image.open(path) as image:
                drawn = image.info.get("Comment")
            if drawn != stamp:
                raise ValueError(f"{path} was drawn with other settings or data than summary.json says: run it again")


def write(folder: Path) -> Path:
    """Write report.html beside a run's figures and summary.json, and return its path."""
    path = folder / "report.html"
    write_text(path, page(folder))
    return path


def _table(path: Path) -> dict:
    """A download of a CSV file, or its name where it is large."""
    size = path.stat().st_size
    return {
        "name": path.name,
        "kilobytes": round(size / 1000),
        "href": _uri(path, "text/csv") if size <= EMBEDDED_BYTES else None,
    }


def _html(page: Path) -> str:
    """A page of the documentation."""
    text = without_links(page.read_text(encoding="utf-8"))
    return mistune.create_markdown(escape=True, plugins=["table"])(text)


def _uri(path: Path, kind: str) -> str:
    return _data(kind, path.read_bytes())


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
