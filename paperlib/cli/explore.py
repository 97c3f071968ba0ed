"""Write one page to look at single nodes and heads by hand, for any browser: move the threshold, and see matrices,
statistics and the rules of claims C2 and C3 follow. It shows what `python -m paperlib measure PROFILE` has measured,
asks for nothing from outside, and needs no kernel.
"""

import argparse

from paperlib import page_explorer
from paperlib.cli import add_changes
from paperlib.experiment import settings
from paperlib.files import write_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("profile", metavar="PROFILE")
    add_changes(parser)


def execute(options: argparse.Namespace) -> int:
    run = settings.open_run(options.profile, settings.changes_of(options.set))
    path = run.output / "explorer.html"
    write_text(path, page_explorer.page(run))
    print(path)
    return 0
