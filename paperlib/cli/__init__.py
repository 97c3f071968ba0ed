"""One entry for everything that is done from a shell: python -m paperlib COMMAND ... (./run_all.sh is `run`).

A command is a module of this folder with `add_arguments(parser)` and `execute(options) -> exit code`. Wrong input, and
whatever stops a command before its work is done, is one sentence and exit code 2; a time limit (--minutes) is 124.
"""

import argparse
import importlib
import os
import signal
import sys
from contextlib import suppress

from paperlib import limit

COMMANDS = {
    "run": "run the notebooks of a profile, from training to figures",
    "list": "show profiles, notebooks and parameters",
    "train": "train networks: of a profile, on several devices too, or one to be committed",
    "measure": "measure the nodes of a profile's networks, as the notebooks would",
    "explore": "write one page to look at single nodes and heads by hand",
    "check": "compare committed networks and results with what they say of themselves",
    "publish": "put the results of a finished run where readers find them",
    "report": "write one self-contained page about a finished run",
    "site": "build the documentation as a web site",
}


def parsed(arguments: list[str]) -> argparse.Namespace:
    """Options of a command, its `execute` among them; ends the process with code 2 for what it does not know."""
    named = next((word for word in arguments if not word.startswith("-")), None)
    parser = argparse.ArgumentParser(prog="python -m paperlib", description="The companion of Koresh et al. (2025).")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, add_help=name == named)
        if name == named:  # the others need not be imported
            module = importlib.import_module(f"paperlib.cli.{name}")
            command.description, command.formatter_class = module.__doc__, argparse.RawDescriptionHelpFormatter
            command.set_defaults(execute=module.execute)
            module.add_arguments(command)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Execute one command; returns the exit code: 0 done, 1 the work failed, 2 wrong input, 124 its time was up."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without ± is no reason to stop
    options = parsed(sys.argv[1:] if arguments is None else arguments)
    with suppress(ValueError):  # of a thread, which gets no signals
        signal.signal(signal.SIGTERM, _terminated)
    try:
        with limit.limited(getattr(options, "minutes", None)):
            return options.execute(options)
    except limit.TimeIsUp as stop:
        goes_on = f"the same command goes on with {stop}"
        print(f"paperlib {options.command}: stopped after {options.minutes:g} minutes: {goes_on}", file=sys.stderr)
        return 124  # as of timeout(1)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        said = str(error).split("\n\n")[0]  # compilers add pages of advice
        print(f"paperlib {options.command}: {said}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        by = f"by {stop.args[0]}" if stop.args else "by hand"
        print(f"paperlib {options.command}: stopped {by}: the same command goes on from here", file=sys.stderr)
        return 143 if stop.args else 130


def _terminated(*_) -> None:
    """What a scheduler sends before it kills ends a command as an interruption by hand does."""
    raise KeyboardInterrupt("SIGTERM")


def add_changes(parser: argparse.ArgumentParser) -> None:
    """The option that replaces values of a profile, for every command that takes one."""
    text = "replace values of the profile, e.g. --set epochs=3 'seeds=[0, 1, 2]'"
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help=text)


def add_limit(parser: argparse.ArgumentParser) -> None:
    """The option that ends a command where it can go on, for every command whose work is in pieces."""
    text = "start no further piece (an epoch, a tap, a stage) after so many minutes, and end with exit code 124"
    parser.add_argument("--minutes", type=float, metavar="M", help=text)
