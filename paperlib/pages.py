"""Results -> Markdown: tables of verdicts and networks, and the places of README and docs where they stand."""

import re

from paperlib import claims, models
from paperlib.models import cards, reference

CLAIMS = {
    "C1": "[CNNs and transformers share the mechanism](notebooks/05_cnn_counterpart.ipynb)",
    "C2": "[each node identifies small clusters of labels](notebooks/02_snr_per_encoder.ipynb)",
    "C3": "[features sharpen along the encoders](notebooks/02_snr_per_encoder.ipynb)",
    "C4": "[ANDC pruning does not affect the accuracy](notebooks/03_andc_pruning.ipynb)",
    "C5": "[each head becomes expert in its own labels](notebooks/04_head_modus_vivendi.ipynb)",
    "C6": "[accuracy follows from single nodes](notebooks/02_snr_per_encoder.ipynb)",
}
ANSWERS = ("<!-- answers of {}: made by python -m paperlib publish -->", "<!-- end of answers -->")
HEADLINE = ("<!-- in short, {}: made by python -m paperlib publish -->", "<!-- end of in short -->")
NAMES = {claim: text.partition("]")[0].removeprefix("[") for claim, text in CLAIMS.items()}
NOT_YET = "not measured yet"  # a claim whose notebook is not among those of the run
REFERENCES = ("<!-- reference networks: made by python -m paperlib publish -->", "<!-- end of networks -->")
MARKS = ("<!-- verdicts of {}: made by python -m paperlib publish -->", "<!-- end of verdicts -->")


def headline(summary: dict) -> str:
    """How many claims hold, and which do not, in one bold sentence."""
    words = claims.of_claims(summary["verdicts"])
    held = [claim for claim in CLAIMS if words.get(claim) == "supported"]
    others = [f"{claim} ({text}) is {words.get(claim, NOT_YET)}" for claim, text in NAMES.items() if claim not in held]
    n, data = len(summary["seeds"]), summary["data"]["name"]
    networks, rest = "network" if n == 1 else "networks", f": {'; '.join(others)}" if others else ""
    return f"**{len(held)} of {len(CLAIMS)} claims hold by our rules, {n} {networks}, {data}{rest}.**"


def answer_table(summary: dict) -> str:
    """One row a claim: what it says, the verdict, and the effect of each row that decides it with its null."""
    lines = ["| claim of the abstract | our verdict | by what |", "|---|---|---|"]
    words = claims.of_claims(summary["verdicts"])
    for claim, text in CLAIMS.items():
        rows = [row for row in summary["verdicts"] if row["claim"] == claim and not row["beside"]]
        numbers = "<br>".join(
            f"{row['statistic'].split(',')[0].replace(' - 0.8', ' above 0.8')}: {_number(row)}" for row in rows
        )
        lines.append(f"| {claim}: {text} | **{words.get(claim, NOT_YET)}** | {numbers} |")
    return "\n".join(lines)


def _number(row: dict) -> str:
    if row["effect"] is None:
        return row["verdict"]
    return f"{row['effect']:.3f} ({row['numbers'] or row['null'].partition(': ')[2]})"


def verdict_table(summary: dict) -> str:
    """The rows of a summary.json that decide a claim as a Markdown table; a claim is named in its first row."""
    lines = ["| claim (abstract) | measured | effect ± uncertainty | null | verdict |", "|---|---|---|---|---|"]
    words = claims.of_claims(summary["verdicts"])
    for claim, text in CLAIMS.items():
        name = f"{claim}: {text}: **{words.get(claim, NOT_YET)}**"
        rows = [row for row in summary["verdicts"] if row["claim"] == claim and not row["beside"]]
        for number, row in enumerate(rows):
            lines.append(f"| {'' if number else name} | {_cells(row)} |")
        if not rows:
            lines.append(f"| {name} | | | | |")
    return "\n".join(lines)


def claim_table(rows: list[dict]) -> str:
    """The verdict on one claim in bold, all its rows as a Markdown table, and below it each seed's effect and interval
    and the notes, row by row."""
    if not rows:
        return f"**{NOT_YET[0].upper()}{NOT_YET[1:]}.**"
    lines = [f"**{word[0].upper()}{word[1:]}.**\n" for word in claims.of_claims(rows).values()]
    lines += ["| measured | effect ± uncertainty | null | verdict |", "|---|---|---|---|"]
    lines += [f"| {_cells(row)}{claims.BESIDE * row['beside']} |" for row in rows]
    lines += ["", "<details><summary>by seed, and notes</summary>", ""]
    for row in rows:
        seeds = ", ".join(f"{effect:.3f} [{low:.3f}, {high:.3f}]" for effect, low, high in row["by_seed"])
        lines.append(f"* {row['statistic']}: " + "; ".join(text for text in (seeds, row["notes"]) if text))
    return "\n".join([*lines, "", "</details>"])


def _cells(row: dict) -> str:
    effect = "" if row["effect"] is None else f"{row['effect']:.3f} ± {row['uncertainty']:.3f}"
    numbers = f"<br>{row['numbers']}" if row["numbers"] else ""
    return f"{row['statistic']}{numbers} | {effect} | {row['null']} | {row['verdict']}"


def network_table() -> str:
    """The committed networks as a Markdown table."""
    lines = ["| network | data | split | epochs | hours | test accuracy | published |", "|---|---|---|---|---|---|---|"]
    lines += [f"| {' | '.join(cards.row(name, reference.card(name)))} |" for name in models.references()]
    return "\n".join(lines)


def with_results(page: str, summary: dict, to_root: str = "") -> str:
    """The page with answers and verdicts of a run, and the table of networks, wherever it has the marks for them.

    to_root is the way from the page to the project, which links get in front: "../" for a page in docs.
    """
    profile = summary["profile"]
    blocks = {HEADLINE[0].format(profile): (HEADLINE[1], headline(summary))}
    blocks[ANSWERS[0].format(profile)] = ANSWERS[1], answer_table(summary)
    blocks[MARKS[0].format(profile)] = MARKS[1], verdict_table(summary)
    blocks[REFERENCES[0]] = REFERENCES[1], network_table()
    for claim in CLAIMS:
        rows = [row for row in summary["verdicts"] if row["claim"] == claim]
        blocks[MARKS[0].format(f"{profile}, {claim}")] = MARKS[1], claim_table(rows)
    for mark, (end, lines) in blocks.items():
        if mark in page:
            page = with_lines(page, (mark, end), re.sub(r"\]\((?=notebooks/|paperlib/)", f"]({to_root}", lines))
    return page


def with_lines(page: str, marks: tuple[str, str], lines: str) -> str:
    """The page with what stands between two marks replaced; ValueError if they are not there once."""
    if page.count(marks[0]) != 1 or marks[1] not in page.partition(marks[0])[2]:
        raise ValueError(f"the lines {marks[0]} and, below it, {marks[1]} must be there once")
    before, rest = page.split(marks[0])
    return f"{before}{marks[0]}\n{lines}\n{marks[1]}{rest.split(marks[1], 1)[1]}"


def without_links(markdown: str) -> str:
    """Markdown without its links to other pages of the project, which whoever downloads a page does not have."""
    return re.sub(r"\[([^\]]+)\]\((?!https:)[^)]*\)", r"\1", markdown)
