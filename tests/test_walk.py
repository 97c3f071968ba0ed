"""Whole walks: the profiles that take hours, cut short but at their real shapes. (nbval runs the profile quick.)"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest

from paperlib import files, paths, provenance
from paperlib.cli import main
from paperlib.cli import run as cli_run
from paperlib.cli.check import all_verdicts, differing_nodes
from paperlib.cli.run import run_notebook
from paperlib.experiment.settings import load_settings, open_run

# Real image sizes and networks; few images, labels, steps and thresholds
CUT = ["epochs=1", "max_steps=2", "seeds=[0]", "readout_epochs=1", "prune_thresholds=[0.3]", "prune_draws=1"]
CUT += ["threshold_sweep=[0.3]", "permutations=100"]
CUT += ["penalties=[]", "penalty_epochs=2", "penalty_taps=[block]", "taps_once=[norm, weighed, seqpool, pooled]"]
CUT += ["prune_attention=true", "cnn=vgg_11x16"]
CUT += ["batch_size=16", "readout_batch_size=16"]
CACHES = {"cifar100": ("cifar100.npz", 30, 32), "flowers102": ("flowers102-224.npz", 30, 224)}
FIGURES = {
    "learning_curve", "snr_per_encoder", "threshold_sweep", "node", "node_distributions", "node_gallery", "penalties",
    "predicted_accuracies", "accuracy_against_dilution", "head_map", "head_matrices", "head_experts",
    "head_specialisation", "cooperation", "attention_maps", "cnn_learning_curve", "two_halves",
    "cnn_accuracy_against_dilution", "node_versions", "turned_nodes",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["cifar100", "flowers102"])
def test_gpu_profiles_train_and_measure_when_cut_short(profile, folders, write_cache):
    """What differs in them: image sizes, networks, the published recipe. What follows is the same for all profiles."""
    settings = load_settings(profile)
    name, labels, size = CACHES[settings.data]
    write_cache(folders / "data" / name, labels, size, train=2, test=1)
    assert main(["run", profile, "--only", "01,03", "--set", *CUT, "taps=[attn, block]", "retrain_thresholds=[]"]) == 0
    (output,) = (folders / "runs" / profile).glob("changed-*")
    summary = json.loads((output / "summary.json").read_text())
    assert summary["results"].keys() == {"01_train_cct", "03_andc_pruning"}


def test_another_projects_kernel_is_not_taken(tmp_path, monkeypatch):
    """JUPYTER_PATH comes first for jupyter, and a `python3` there may be anybody's."""
    kernel = tmp_path / "foreign" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    text = json.dumps({"argv": ["/bin/false", "{connection_file}"], "display_name": "x", "language": "python"})
    (kernel / "kernel.json").write_text(text)
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "foreign"))
    write = f"open({str(tmp_path / 'summary.json')!r}, 'w').write('{{}}')"
    python = {"kernelspec": {"name": "python3", "display_name": "", "language": "python"}}
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(write)], metadata=python)
    nbformat.write(notebook, tmp_path / "x.ipynb")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "summary.json").symlink_to(tmp_path / "summary.json")
    assert run_notebook(tmp_path / "x.ipynb", tmp_path / "out", "quick", {}) is None
    assert os.environ["JUPYTER_PATH"] == str(tmp_path / "foreign")


ENDS = {
    "__import__('os').kill(__import__('os').getpid(), 9)": "its kernel died",
    "1 / 0": "ZeroDivisionError: division by zero",
    "pass": "it ended without writing",
}


@pytest.mark.parametrize(("code", "sentence"), ENDS.items(), ids=["killed", "an error", "nothing written"])
def test_how_a_notebook_may_end(code, sentence, tmp_path):
    notebook = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "", "language": "python"}}
    )
    notebook.cells = [nbformat.v4.new_code_cell("", metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(code)]
    nbformat.write(notebook, tmp_path / "01_short.ipynb")
    (tmp_path / "out").mkdir()
    said = run_notebook(tmp_path / "01_short.ipynb", tmp_path / "out", "quick", {})
    assert said.startswith(sentence) and "\n" not in said


def test_stopping_a_walk_by_hand_is_one_sentence(tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(papermill, "execute_notebook", interrupted)
    said = run_notebook(tmp_path / "01.ipynb", tmp_path, "quick", {})
    assert said == "stopped by hand: the same command goes on from here"


def test_a_notebook_runs_again_only_if_something_has_changed(folders, monkeypatch):
    ran = []

    def execute(notebook, folder, profile, changes):
        ran.append(notebook.stem[:2])
        nbformat.write(nbformat.read(notebook, as_version=4), folder / notebook.name)
        (folder / f"{notebook.stem}.png").write_text("a figure")
        files.write_json(folder / "summary.json", {"verdicts": [], "results": {}})

    def walk(*options):
        ran.clear()
        assert main(["run", "quick", *options]) == 0
        return ran

    monkeypatch.setattr(cli_run, "run_notebook", execute)
    monkeypatch.setattr(cli_run.report, "write", lambda folder: folder)
    every = ["01", "02", "03", "04", "05", "06", "08", "09", "00"]
    assert walk() == every and walk() == []
    assert walk("--again", "--only", "02") == ["02"] and walk() == []
    (folders / "runs" / "quick" / "walk" / "03_andc_pruning.png").unlink()
    assert walk() == ["03", "00"]  # and what reads the others' results
    (folders / "runs" / "quick" / "walk" / "06_explorer.ipynb").write_text("{")
    assert walk() == ["06", "00"]
    assert walk("--set", "threshold=0.4") == every and walk() == []
    monkeypatch.setattr(provenance, "code_sha256", lambda: "other")
    assert walk() == every


@pytest.mark.slow
def test_a_profile_walks_when_cut_short(folders, write_cache, capsys):
    profile = "cifar100-cpu"
    settings = load_settings(profile)
    name, labels, size = CACHES[settings.data]
    write_cache(folders / "data" / name, labels, size, train=2, test=1)
    assert main(["run", profile, "--set", *CUT, "weights=trained", "retrain_thresholds=[0.3]"]) == 0
    (figures,) = (folders / "runs" / profile).glob("changed-*")
    named = {f"{name}.{kind}" for name in FIGURES for kind in ("png", "pdf", "svg", "csv")}
    left = {path.name for path in figures.iterdir() if path.suffix != ".ipynb" and not path.name.startswith(".")}
    assert left == {"summary.json", "report.html"} | named
    summary = json.loads((figures / "summary.json").read_text())
    assert summary["config"]["max_steps"] == 2 and summary["data"]["name"] == settings.data
    assert {row["claim"] for row in summary["verdicts"]} == {"C1", "C2", "C3", "C4", "C5", "C6"}
    for row in summary["verdicts"]:
        assert row["verdict"].startswith("not tested") and row["data"] == settings.data and row["n"] == 1
    run = open_run(profile, summary["config"])
    assert all_verdicts(run, summary["results"]) == summary["verdicts"] and not differing_nodes(run)
    assert (figures / "report.html").stat().st_size > 1e6
    text = capsys.readouterr().out
    assert "05_cnn_counterpart" in text and str(figures) in text and "failed" not in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "papermill {notebook} {out} -p profile quick -y '{{settings: {{epochs: 1, max_steps: 2}}}}'",
        "jupyter nbconvert --to notebook --execute {notebook} --output {out}",
    ],
    ids=["papermill", "nbconvert"],
)
def test_notebooks_run_by_plain_tools_from_the_projects_folder(command, folders):
    """Their kernel finds the package and the profiles whatever the working directory."""
    out = folders / "out.ipynb"
    words = shlex.split(command.format(notebook="notebooks/01_train_cct.ipynb", out=out))
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(words, cwd=paths.root(), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "image/png" in out.read_text() and list((folders / "runs" / "quick").rglob("learning_curve.png"))


@pytest.mark.slow
def test_a_run_touches_no_tracked_file(folders):
    """The README's first two commands in this order: what the first leaves must not fail the second."""

    def tracked():
        done = subprocess.run(["git", "status", "--porcelain"], cwd=paths.root(), capture_output=True, text=True)
        return done.returncode, done.stdout

    before = tracked()
    assert main(["run", "quick", "--only", "01,06", "--set", "epochs=1", "max_steps=2", "readout_epochs=1"]) == 0
    assert tracked() == before
