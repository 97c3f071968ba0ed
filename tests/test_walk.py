"""Whole walks: the profiles that take hours, cut short but at their real shapes. (nbval runs the profile quick.)"""

import json
import signal

import nbformat
import parameters
import pytest
import regenerate
import remeasure
import walk
from walk import main

# Real image sizes and networks; few images, labels, steps and thresholds
CUT = ["epochs=1", "max_steps=2", "seeds=[0]", "readout_epochs=1", "prune_thresholds=[0.3]", "prune_draws=1"]
CUT += ["threshold_sweep=[0.3]", "retrain_thresholds=[0.3]", "permutations=100"]
CUT += ["penalties=[]", "penalty_epochs=2", "penalty_taps=[block]", "taps_once=[norm, weighed, seqpool, pooled]"]
CUT += ["prune_attention=true", "cnn=vgg_11x16"]
CUT += ["batch_size=16", "readout_batch_size=16"]
CACHES = {"cifar100": ("cifar100.npz", 30, 32), "flowers102": ("flowers102-224.npz", 30, 224)}
FIGURES = {
    "learning_curve", "snr_per_encoder", "threshold_sweep", "node", "node_distributions", "node_gallery", "penalties",
    "predicted_accuracies", "accuracy_against_dilution", "head_map", "head_experts", "head_specialisation",
    "cooperation", "attention_maps", "cnn_learning_curve", "two_halves", "cnn_accuracy_against_dilution",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["cifar100", "flowers102"])
def test_gpu_profiles_train_and_measure_when_cut_short(profile, folders, write_cache):
    """What differs in them: image sizes, networks, the published recipe. What follows is the same for all profiles."""
    settings = parameters.load_settings(profile)
    name, labels, size = CACHES[settings.data]
    write_cache(folders / "data" / name, labels, size, train=2, test=1)
    assert main([profile, "--only", "01,03", "--set", *CUT, "taps=[attn, block]", "retrain_thresholds=[]"]) == 0
    summary = json.loads((folders / "figures" / profile / "summary.json").read_text())
    assert summary["results"].keys() == {"01_train_cct", "03_andc_pruning"}


ENDS = {
    "__import__('os').kill(__import__('os').getpid(), 9)": "its kernel died",
    "__import__('time').sleep(300)": "stopped after the profile's time limit",
    "1 / 0": "ZeroDivisionError: division by zero",
    "pass": "it ended without writing",
}


@pytest.mark.parametrize(("code", "sentence"), ENDS.items(), ids=["killed", "too long", "an error", "nothing written"])
def test_how_a_notebook_may_end(code, sentence, tmp_path):
    notebook = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "", "language": "python"}}
    )
    notebook.cells = [nbformat.v4.new_code_cell("", metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(code)]
    nbformat.write(notebook, tmp_path / "01_short.ipynb")
    (tmp_path / "out").mkdir()
    minutes = 0.1 if "sleep" in code else 5
    said = walk._execute(tmp_path / "01_short.ipynb", tmp_path / "out", tmp_path, "quick", {}, minutes=minutes)
    assert said.startswith(sentence) and "\n" not in said
    assert signal.getsignal(signal.SIGALRM) in (signal.SIG_DFL, None)


def test_stopping_a_walk_by_hand_is_one_sentence(tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(walk.papermill, "execute_notebook", interrupted)
    said = walk._execute(tmp_path / "01.ipynb", tmp_path, tmp_path, "quick", {}, minutes=1)
    assert said == "stopped by hand: the same command goes on from here"


@pytest.mark.slow
def test_a_profile_walks_when_cut_short(folders, write_cache, capsys):
    profile = "cifar100-cpu"
    settings = parameters.load_settings(profile)
    name, labels, size = CACHES[settings.data]
    write_cache(folders / "data" / name, labels, size, train=2, test=1)
    assert main([profile, "--set", *CUT, "weights=trained"]) == 0
    figures = folders / "figures" / profile
    assert {path.name for path in figures.iterdir()} == {"summary.json"} | {
        f"{name}.{kind}" for name in FIGURES for kind in ("png", "pdf", "svg", "csv")
    }
    summary = json.loads((figures / "summary.json").read_text())
    assert summary["config"]["max_steps"] == 2 and summary["data"]["name"] == settings.data
    assert {row["claim"] for row in summary["verdicts"]} == {"C1", "C2", "C3", "C4", "C5", "C6"}
    for row in summary["verdicts"]:
        assert row["verdict"].startswith("not tested") and row["data"] == settings.data and row["n"] == 1
    stages = ["--stages", str(folders / "runs" / profile / "stages")]
    assert regenerate.main([profile, *stages]) == 0
    assert remeasure.main([profile, *stages]) == 0  # the same numbers
    assert remeasure.main([profile, "--seed", "7", *stages]) == 2  # there are no results of it
    assert (folders / "runs" / profile / "report.html").stat().st_size > 1e6
    text = capsys.readouterr().out
    assert "05_cnn_counterpart" in text and str(figures) in text and "failed" not in text
