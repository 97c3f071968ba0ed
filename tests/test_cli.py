"""./run_all.sh: wrong arguments are one sentence and exit code 2, before anything runs."""

import re
import subprocess
import sys

import parameters
import pytest
from walk import main

from paperlib import runs

MISTAKES = [
    (["qick"], "unknown profile 'qick' (did you mean 'quick'?)"),
    (["quick", "--set", "epoch=3"], "unknown parameter 'epoch' (did you mean 'epochs'?)"),
    (["quick", "--set", "epochs=many"], "parameter 'epochs'"),
    (["quick", "--set", "epochs=2.5"], "parameter 'epochs'"),
    (["quick", "--set", "epochs=0"], "parameter 'epochs'"),
    (["quick", "--set", "epochs=true"], "parameter 'epochs'"),
    (["quick", "--set", "flip=1"], "parameter 'flip'"),
    (["quick", "--set", "lr=-1"], "parameter 'lr'"),
    (["quick", "--set", "seeds=[]"], "parameter 'seeds'"),
    (["quick", "--set", "seeds=0"], "parameter 'seeds'"),
    (["quick", "--set", "seeds=[0, 1, 0]"], "names a seed twice"),
    (["quick", "--set", "stochastic_depth=1"], "parameter 'stochastic_depth'"),
    (["quick", "--set", "threshold=1.5"], "parameter 'threshold'"),
    (["quick", "--set", "precision=fp64"], "parameter 'precision'"),
    (["quick", "--set", "data=imagenet"], "unknown data set 'imagenet'"),
    (["quick", "--set", "data=folder:/no/such/place"], "folder:/no/such/place"),
    (["quick", "--set", "model=vit_b"], "unknown model 'vit_b'"),
    (["quick", "--set", "heads=3"], "3 heads do not divide"),
    (["quick", "--set", "taps=[attn, block, blok]"], "unknown tap 'blok'"),
    (["quick", "--set", "taps=[ff2]"], "'taps'"),
    (["quick", "--set", "retrain_thresholds=[0.99]"], "parameter 'retrain_thresholds'"),
    (["quick", "--set", "epochs"], "not of the form NAME=VALUE"),
    (["quick", "--set", "seeds=[0"], "is not a value"),
    (["quick", "--only", "07"], "there is no notebook '07'"),
    (["quick", "--from", "x"], "there is no notebook"),
]


@pytest.mark.parametrize(("arguments", "sentence"), MISTAKES, ids=[" ".join(words) for words, _ in MISTAKES])
def test_mistakes_are_named(arguments, sentence, folders, capsys, monkeypatch):
    monkeypatch.setattr("walk.papermill.execute_notebook", lambda *a, **k: pytest.fail("it ran"))
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert not (folders / "runs").exists()


def test_unknown_option_exits_with_2():
    with pytest.raises(SystemExit) as stop:
        main(["--colour"])
    assert stop.value.code == 2


def test_list_names_profiles_notebooks_and_parameters(capsys):
    assert main(["--list"]) == 0
    text = capsys.readouterr().out
    for word in [*parameters.profiles(), "01_train_cct", "04_head_modus_vivendi", *parameters.Settings.model_fields]:
        assert word in text


@pytest.mark.parametrize("profile", parameters.profiles())
def test_profiles_are_complete(profile):
    assert isinstance(parameters.load_settings(profile), parameters.Settings)


def test_numbers_without_a_dot_are_numbers():
    assert parameters.load_settings("quick", {"lr": "1e-3"}).lr == 1e-3


def test_a_failing_notebook_gives_exit_code_1_and_its_reason(folders):
    """For real, in a process of its own: a learning rate at which training diverges."""
    arguments = [sys.executable, "notebooks/walk.py", "quick", "--only", "1"]
    arguments += ["--set", "lr=1.0e+30", "epochs=1", "max_steps=3"]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folders), "PYTHONPATH": str(runs.root())}
    environment |= {f"PAPERLIB_{kind}": str(folders / kind.lower()) for kind in ("RUNS", "FIGURES", "DATA")}
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, cwd=runs.root(), timeout=300)
    assert done.returncode == 1
    assert "01_train_cct failed" in done.stdout
    assert re.search("training diverged at step [1-3] of epoch 1: lower lr", done.stdout)
    assert (folders / "runs" / "quick" / "01_train_cct.ipynb").exists()


def test_wrong_data_are_named_before_a_notebook_runs(folders):
    """For real, in a process of its own: CIFAR-100 without the data and, through a dead proxy, without network."""
    arguments = [sys.executable, "notebooks/walk.py", "cifar100-cpu", "--only", "1"]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folders), "PYTHONPATH": str(runs.root())}
    environment |= {"https_proxy": "http://127.0.0.1:9"}
    environment |= {f"PAPERLIB_{kind}": str(folders / kind.lower()) for kind in ("RUNS", "FIGURES", "DATA")}
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, cwd=runs.root(), timeout=300)
    assert done.returncode == 2
    assert "cifar100.npz" in done.stderr  # says what to put where
    assert not (folders / "runs").exists()
