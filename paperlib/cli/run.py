"""Run the notebooks of a profile headless, one after the other: train, measure, prune, look at the heads.

Stages whose inputs have not changed are kept, so an interrupted run goes on where it stopped; a notebook is not run
again if neither it nor the code, the settings or the data have changed since (--again runs it nevertheless). Executed
notebooks, figures, tables, summary.json and report.html go to a folder of runs/<profile>; tracked files are never
touched.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

import nbformat
import papermill
from ipykernel.kernelspec import RESOURCES, get_kernel_dict
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from paperlib import files, notebooks, provenance
from paperlib.cli import add_changes, report
from paperlib.experiment import networks, settings
from paperlib.experiment.store import Run
from paperlib.files import read_json


class OwnKernel(AsyncKernelManager):
    """A kernel of the Python that runs this, whatever JUPYTER_PATH or a user's folder call `python3`."""

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(resource_dir=RESOURCES, **get_kernel_dict())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("profile", nargs="?", default="quick", metavar="PROFILE", help="see `list` (default: quick)")
    parser.add_argument("--from", dest="start", metavar="NN", help="start with this notebook, e.g. 02")
    parser.add_argument("--only", metavar="NN,NN", help="run these notebooks only")
    parser.add_argument("--again", action="store_true", help="run notebooks again that have not changed")
    parser.add_argument(
        "--recompute", nargs="+", default=[], metavar="STAGE", help="compute these finished stages anew, e.g. 'snr-*'"
    )
    add_changes(parser)


def execute(options: argparse.Namespace) -> int:
    changes = settings.changes_of(options.set)
    named = settings.load_settings(options.profile, changes)
    chosen = _chosen(options.start, options.only, notebooks.notebooks_of(named.data))
    run = settings.open_run(options.profile, changes)  # the data too, before a notebook starts
    if any(path.stem.startswith("05") for path in chosen):
        networks.cnn_half(run)
    if options.recompute:
        run.recompute(options.recompute)
    os.environ["PAPERLIB_HEADLESS"] = "1"
    print(f"profile {options.profile}: {len(chosen)} notebooks; executed copies, figures and report in {run.output}")
    times, failed = {}, None
    for path in chosen:
        print(f"\n{path.stem}", flush=True)
        start, key = time.time(), _key(path, run)
        others = all(seconds is None for seconds in times.values())  # 00 reads what they leave
        kept = not (options.again or options.recompute) and _is_done(run.output / path.name, key)
        if kept and (others or path.stem != notebooks.START):
            times[path.stem] = None
            continue
        failed = run_notebook(path, run.output, options.profile, changes)
        times[path.stem] = time.time() - start
        if failed:
            break
        _mark_done(run.output / path.name, key, start)
    print(_table(times, failed))
    if failed:
        return 1
    summary = read_json(run.output / "summary.json")
    print(_verdicts(summary), f"\nreport: {report.write(run.output)}")
    return 0


def _chosen(start: str | None, only: str | None, files: list[Path]) -> list[Path]:
    """Those of some notebooks that are to be run, in order; raises ValueError for a number that none of them has."""
    by_number = {path.name[:2]: path for path in files}
    named = [] if only is None else [number.strip() for number in only.split(",")]
    for number in [*named, *([] if start is None else [start])]:
        if not number or number.zfill(2) not in by_number:
            raise ValueError(f"there is no notebook {number!r}: use one of {', '.join(by_number)}")
    order = list(by_number)
    wanted = [number.zfill(2) for number in named]
    later = order[order.index(start.zfill(2)) :] if start else order
    if wanted and not set(wanted) & set(later):
        raise ValueError(f"--from {start} leaves none of --only {only}: take one of the two")
    return [by_number[number] for number in later if not wanted or number in wanted]


def _key(notebook: Path, run: Run) -> str:
    """Hash of all that decides what a notebook shows: its cells, the settings, the data, the package's code."""
    cells = [cell.source for cell in nbformat.read(notebook, as_version=4).cells]
    decides = [cells, run.settings.model_dump(), run.data_sha256, provenance.code_sha256()]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def _is_done(copy: Path, key: str) -> bool:
    """Whether this very notebook was executed to its end, and what it left is still there."""
    if not copy.exists():
        return False
    with suppress(ValueError), files.reading(copy, files.ANEW):  # a damaged copy is made anew
        done = nbformat.read(copy, as_version=4).metadata.get("paperlib", {})
        return done.get("key") == key and all((copy.parent / name).exists() for name in done["left"])
    return False


def _mark_done(copy: Path, key: str, start: float) -> None:
    notebook = nbformat.read(copy, as_version=4)
    left = sorted(path.name for path in copy.parent.iterdir() if path.is_file() and path.stat().st_mtime >= start)
    notebook.metadata["paperlib"] = {"key": key, "left": [name for name in left if name != copy.name]}
    files.write_text(copy, nbformat.writes(notebook) + "\n")


def run_notebook(notebook: Path, folder: Path, profile: str, changes: dict) -> str | None:
    """Run one notebook into a folder; returns None, or one sentence that says what went wrong."""
    summary = folder / "summary.json"
    before = summary.stat().st_mtime_ns if summary.exists() else 0
    try:
        papermill.execute_notebook(
            notebook,
            folder / notebook.name,
            parameters={"profile": profile, "settings": changes},
            kernel_name="python3",
            cwd=notebook.parent,
            progress_bar=False,
            start_timeout=600,  # a busy machine; cells have no limit
            stdout_file=sys.stdout,
            stderr_file=sys.stderr,
            extra_arguments=["--log-level=40"],  # the kernel's own chatter: errors only
            kernel_manager_class=OwnKernel,
        )
    except PapermillExecutionError as error:
        return f"{error.ename}: {error.evalue} (all of it: {folder / notebook.name})"
    except DeadKernelError:
        return "its kernel died, most likely for lack of memory"
    except KeyboardInterrupt:
        return "stopped by hand: the same command goes on from here"
    except OSError as error:  # papermill could not write the executed copy
        return f"{folder / notebook.name} was not written ({error}): make room for it, and start again"
    except RuntimeError as error:  # what jupyter_client raises
        return f"its kernel did not start ({str(error).splitlines()[0]})"
    recorded = summary.exists() and summary.stat().st_mtime_ns != before
    if not recorded and notebook.stem != notebooks.START:
        return f"it ended without writing {summary}"
    return None


def _table(times: dict[str, float | None], failed: str | None) -> str:
    """What happened, notebook by notebook; None: it was not run again."""
    lines = ["", f"{'notebook':28}{'seconds':>8}  result"]
    for number, (name, seconds) in enumerate(times.items(), start=1):
        result = "failed" if failed and number == len(times) else "unchanged" if seconds is None else "done"
        lines.append(f"{name:28}{seconds or 0:8.0f}  {result}")
    lines.append(f"{'together':28}{sum(filter(None, times.values())):8.0f}")
    if failed:
        lines += ["", f"{list(times)[-1]} failed. {failed}"]
    return "\n".join(lines)


def _verdicts(summary: dict) -> str:
    """The verdicts so far, as lines for a terminal."""
    lines = ["", f"{'claim':6}{'effect':>10} {'±':>9}  verdict"]
    for row in summary["verdicts"]:
        numbers = "" if row["effect"] is None else f"{row['effect']:10.4f} {row['uncertainty']:9.4f}"
        lines.append(f"{row['claim']:6}{numbers:20}  {row['verdict']}")
        lines.append(f"{'':28}{row['statistic']}")
    return "\n".join(lines)
