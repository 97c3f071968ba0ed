"""The walk from the command line: runs the numbered notebooks headless, one after the other (see ./run_all.sh)."""

import argparse
import json
import os
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import papermill
import parameters
import report
import stages
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from store_outputs import notebook_files

from paperlib import runs


def main(arguments: list[str] | None = None) -> int:
    """Run the walk; returns the exit code: 0 done, 1 a notebook failed, 2 wrong arguments."""
    options = parser().parse_args(arguments)
    if options.list:
        return _list()
    try:
        changes = parameters.changes_of(options.set)
        notebooks = _chosen(options.start, options.only)
        run = parameters.open_run(options.profile, changes)  # the data too, before a notebook starts
        if any(notebook.stem.startswith("05") for notebook in notebooks):
            stages.cnn_half(run)
    except (ValueError, OSError) as error:
        print(f"run_all: {error}", file=sys.stderr)
        return 2
    os.environ["PAPERLIB_HEADLESS"] = "1"
    folder, figures = (runs.folder_of(kind) / options.profile for kind in ("runs", "figures"))
    print(f"profile {options.profile}: {len(notebooks)} notebooks; executed copies in {folder}, figures in {figures}")
    times, failed = {}, None
    for notebook in notebooks:
        print(f"\n{notebook.stem}", flush=True)
        start = time.time()
        failed = _execute(notebook, folder, figures, options.profile, changes, run.settings.minutes)
        times[notebook.stem] = time.time() - start
        if failed:
            break
    try:
        print(_table(times, failed, figures))
        if not failed:
            print(f"report: {report.write(options.profile)}")
    except (ValueError, OSError) as error:
        print(f"run_all: {error}", file=sys.stderr)
        return 1
    return 1 if failed else 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="./run_all.sh",
        description="Run the walk: train, measure, prune, look at the heads. Stages whose inputs have not changed are "
        "kept, so an interrupted walk goes on where it stopped.",
    )
    result.add_argument("profile", nargs="?", default="quick", metavar="PROFILE", help="see --list (default: quick)")
    result.add_argument("--from", dest="start", metavar="NN", help="start with this notebook, e.g. 02")
    result.add_argument("--only", metavar="NN,NN", help="run these notebooks only")
    result.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="replace values of the profile, e.g. --set epochs=3 'seeds=[0, 1, 2]'",
    )
    result.add_argument("--list", action="store_true", help="show profiles, notebooks and parameters, and stop")
    return result


def _chosen(start: str | None, only: str | None) -> list[Path]:
    """The notebooks to run, in order; raises ValueError for a number that no notebook has."""
    notebooks = {path.name[:2]: path for path in notebook_files()}
    wanted = [number.zfill(2) for number in (only.split(",") if only else [])]
    for number in [*wanted, *([start.zfill(2)] if start else [])]:
        if number not in notebooks:
            raise ValueError(f"there is no notebook {number!r}: use one of {', '.join(notebooks)}")
    first = start.zfill(2) if start else ""
    if wanted and max(wanted) < first:
        raise ValueError(f"--from {start} leaves none of --only {only}: take one of the two")
    return [path for number, path in notebooks.items() if number >= first and (not wanted or number in wanted)]


def _execute(notebook: Path, folder: Path, figures: Path, profile: str, changes: dict, minutes: float) -> str | None:
    """Run one notebook; returns None, or one sentence that says what went wrong."""
    summary = figures / "summary.json"
    before = summary.stat().st_mtime_ns if summary.exists() else 0
    try:
        with _time_limit(60 * minutes):
            papermill.execute_notebook(
                notebook,
                folder / notebook.name,
                parameters={"profile": profile, "settings": changes},
                kernel_name="python3",
                cwd=notebook.parent,
                progress_bar=False,
                stdout_file=sys.stdout,
                stderr_file=sys.stderr,
                extra_arguments=["--log-level=40"],  # the kernel's own chatter: errors only
            )
    except PapermillExecutionError as error:
        return f"{error.ename}: {error.evalue} (all of it: {folder / notebook.name})"
    except DeadKernelError:
        return "its kernel died, most likely for lack of memory"
    except KeyboardInterrupt:
        return "stopped by hand: the same command goes on from here"
    except TimeoutError:
        return f"stopped after the profile's time limit of {minutes} minutes: raise it with --set minutes=..."
    except OSError as error:  # papermill could not write the executed copy
        return f"{folder / notebook.name} was not written ({error}): make room for it, and start again"
    except RuntimeError as error:  # what jupyter_client raises
        return f"its kernel did not start ({str(error).splitlines()[0]})"
    if not summary.exists() or summary.stat().st_mtime_ns == before:
        return f"it ended without writing {summary}"
    return None


@contextmanager
def _time_limit(seconds: float):
    """Raise TimeoutError in the block after so many seconds (papermill itself limits cells, not notebooks)."""

    def stop(signum, frame):
        raise TimeoutError

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def _table(times: dict[str, float], failed: str | None, figures: Path) -> str:
    """What happened, notebook by notebook, and the verdicts so far."""
    lines = ["", f"{'notebook':28}{'seconds':>8}  result"]
    for number, (name, seconds) in enumerate(times.items(), start=1):
        lines.append(f"{name:28}{seconds:8.0f}  {'failed' if failed and number == len(times) else 'done'}")
    lines.append(f"{'together':28}{sum(times.values()):8.0f}")
    if failed:
        return "\n".join([*lines, "", f"{list(times)[-1]} failed. {failed}"])
    summary = json.loads((figures / "summary.json").read_text(encoding="utf-8"))
    lines += ["", f"{'claim':6}{'effect':>10} {'±':>9}  verdict"]
    for row in summary["verdicts"]:
        numbers = "" if row["effect"] is None else f"{row['effect']:10.4f} {row['uncertainty']:9.4f}"
        lines.append(f"{row['claim']:6}{numbers:20}  {row['verdict']}")
        lines.append(f"{'':28}{row['statistic']}")
    return "\n".join([*lines, "", f"figures, tables and summary.json: {figures}"])


def _list() -> int:
    print("profiles:")
    for name in parameters.profiles():
        text = (runs.root() / "notebooks" / "profiles" / f"{name}.yaml").read_text(encoding="utf-8")
        print(f"  {name:14} {text.splitlines()[0].removeprefix('# ')}")
    print("\nnotebooks:")
    for path in _chosen(None, None):
        print(f"  {path.stem}")
    print("\nparameters (--set NAME=VALUE):")
    for name, field in parameters.Settings.model_fields.items():
        print(f"  {name:22} {field.description}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
