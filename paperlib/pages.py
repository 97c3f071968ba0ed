"""Results -> Markdown: tables of verdicts and networks, and the places of README and docs where they stand."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from paperlib import claims, files, models
from paperlib.answers import CLAIMS, NOT_YET, Answer, answers
from paperlib.data import TEXTS
from paperlib.models import cards, reference
from paperlib.notebooks import TEXT

MADE = "made by python -m paperlib publish"
HEADLINE = (f"<!-- in short, {{}}: {MADE} -->", "<!-- end of in short -->")
BRIEF = (f"<!-- in brief, {{}}: {MADE} -->", "<!-- end of in brief -->")
ANSWERS = (f"<!-- answers of {{}}: {MADE} -->", "<!-- end of answers -->")
MARKS = (f"<!-- verdicts of {{}}: {MADE} -->", "<!-- end of verdicts -->")
SAID = (f"<!-- said of {{}}: {MADE} -->", "<!-- end of said -->")
REFERENCES = (f"<!-- reference networks: {MADE} -->", "<!-- end of networks -->")


def headline(found: dict[str, Answer], summary: dict) -> str:
    """How many of the claims that were measured hold, and which do not, in one bold sentence."""
    found = {claim: answer for claim, answer in found.items() if answer.verdict != NOT_YET}
    held = [claim for claim, answer in found.items() if answer.verdict == "supported"]
    others = [
        f"{claim} ({CLAIMS[claim][0]}) is {answer.verdict}" for claim, answer in found.items() if claim not in held
    ]
    n, data = len(summary["seeds"]), summary["data"]["name"]
    networks, rest = "network" if n == 1 else "networks", f": {'; '.join(others)}" if others else ""
    return f"**{len(held)} of {len(found)} claims hold by our rules, {n} {networks}, {data}{rest}.**"


def brief(found: dict[str, Answer], summary: dict) -> str:
    """Which claims come to which verdict, in one line: for results beside those of the headline."""
    by_verdict: dict[str, list[str]] = {}
    for claim, answer in found.items():
        if answer.verdict != NOT_YET:
            by_verdict.setdefault(answer.verdict.partition(" (")[0], []).append(claim)
    said = "; ".join(f"{', '.join(names)} {verdict}" for verdict, names in by_verdict.items())
    return f"**{summary['data']['name']}, n = {len(summary['seeds'])}: {said}.**"


def answer_table(found: dict[str, Answer], data: str = "") -> str:
    """One row a claim: what it says, the answer in words, the number to remember, the notebook."""
    lines = ["| claim of the abstract | our answer | in numbers | notebook |", "|---|---|---|---|"]
    for claim, answer in found.items():
        text, notebook = CLAIMS[claim][0], _notebook(claim, data)
        words = f"**{answer.verdict}**" + f": {answer.words}" * bool(answer.words)
        lines.append(
            f"| {claim}: {text} | {words} | {answer.number} | [{notebook[:2]}](notebooks/{notebook}.ipynb#verdict) |"
        )
    return "\n".join(lines)


def _notebook(claim: str, data: str) -> str:
    return TEXT if data in TEXTS else CLAIMS[claim][1]


def card(folder: Path, claim: str) -> str:
    """The verdict on a claim with its plain answer, for the end of a notebook, from the results in a folder."""
    answer = answers(folder)[claim]
    text = CLAIMS[claim][0]
    said = "".join(f" {part[0].upper()}{part[1:]}." for part in (answer.words, answer.number) if part)
    return f"> **{claim}: {answer.verdict}.** *{text[0].upper()}{text[1:]}.*{said}"


def verdict_table(summary: dict) -> str:
    """The rows of a summary.json that decide a claim as a Markdown table; a claim is named in its first row."""
    lines = ["| claim (abstract) | measured | effect ± uncertainty | null | verdict |", "|---|---|---|---|---|"]
    words = claims.of_claims(summary["verdicts"])
    for claim, (text, _) in CLAIMS.items():
        notebook = _notebook(claim, summary["data"]["name"])
        name = f"{claim}: [{text}](notebooks/{notebook}.ipynb#verdict): **{words.get(claim, NOT_YET)}**"
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
        seeds = ", ".join(
            f"{effect:.3f}" + (f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else "") for effect, *ends in row["by_seed"]
        )
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


def with_results(page: str, folder: Path, to_root: str = "") -> str:
    """The page with answers, sentences and verdicts of the results in a folder, and the table of networks, wherever it
    has the marks for them.

    to_root is the way from the page to the project, which links get in front: "../" for a page in docs.
    """
    summary = files.read_json(folder / "summary.json")
    profile = summary["profile"]

    def rows(claim: str) -> list[dict]:
        return [row for row in summary["verdicts"] if row["claim"] == claim]

    blocks: dict[str, tuple[str, Callable[[], str]]] = {
        HEADLINE[0].format(profile): (HEADLINE[1], lambda: headline(answers(folder), summary)),
        BRIEF[0].format(profile): (BRIEF[1], lambda: brief(answers(folder), summary)),
        ANSWERS[0].format(profile): (ANSWERS[1], lambda: answer_table(answers(folder), summary["data"]["name"])),
        MARKS[0].format(profile): (MARKS[1], lambda: verdict_table(summary)),
        REFERENCES[0]: (REFERENCES[1], network_table),
    }
    for claim in CLAIMS:
        sentences = [text for one in summary["results"].values() for text in one.get("said", {}).get(claim, [])]
        blocks[SAID[0].format(f"{profile}, {claim}")] = SAID[1], partial("\n".join, [f"* {text}" for text in sentences])
        blocks[MARKS[0].format(f"{profile}, {claim}")] = MARKS[1], partial(claim_table, rows(claim))
    for mark, (end, made) in blocks.items():
        if mark in page:
            page = with_lines(page, (mark, end), re.sub(r"\]\((?=notebooks/|paperlib/)", f"]({to_root}", made()))
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
