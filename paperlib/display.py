"""What notebooks show beside figures: a bold sentence, a table that folds, the parameters, the verdict on a claim."""

import html
from dataclasses import dataclass

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import Markdown
from IPython.display import display as show_all
from matplotlib.figure import Figure

from paperlib import pages
from paperlib.experiment.settings import card
from paperlib.experiment.store import Run

# The parameters that say what a walk is; the others are folded.
MAIN = ("data", "model", "cnn", "seeds", "weights", "epochs", "taps", "threshold")


def say(sentence: str) -> Markdown:
    """A sentence in bold, as Markdown."""
    return Markdown(f"**{sentence}**")


def picture(figure: Figure, sentence: str) -> None:
    """Show a picture and, in bold below it, what it says."""
    show_all(figure, say(sentence))
    plt.close(figure)  # a notebook shows open figures again


@dataclass(frozen=True)
class Folded:
    """A table behind a line that opens it; as plain text, the whole table."""

    table: pd.DataFrame
    title: str
    above: str = ""  # HTML that stays in sight

    def _repr_html_(self) -> str:
        if not len(self.table):
            return f"<em>{html.escape(self.title)}: not part of this profile</em>"
        rows = f"{len(self.table)} row{'s' * (len(self.table) != 1)}"
        summary = f"<summary>{html.escape(self.title)} ({rows})</summary>"
        return f"{self.above}<details>{summary}{self.table.to_html(notebook=True)}</details>"

    def __repr__(self) -> str:
        return f"{self.title}\n{self.table if len(self.table) else 'not part of this profile'}"


def parameters(run: Run) -> Folded:
    """The parameters of a run, but for the main ones folded."""
    table = card(run.settings)
    rest = table.drop(index=list(MAIN))
    return Folded(rest, f"{run.profile}: all other parameters", table.loc[list(MAIN)].to_html(notebook=True))


def verdicts(run: Run, *claims: str) -> Markdown:
    """The verdicts on some claims with their plain answers, from what the run has recorded (`Run.record`)."""
    return Markdown("\n\n".join(pages.card(run.output, claim) for claim in claims))
