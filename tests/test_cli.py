"""./run_all.sh: wrong arguments are one sentence and exit code 2, before anything runs."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from paperlib import paths
from paperlib.cli import main
from paperlib.experiment.settings import Settings, _float_or_same, changes_of, load_settings, profiles

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
    (["quick", "--set", "prune_thresholds=[0.3, 0.3]"], "must rise, each named once"),
    (["quick", "--set", "prune_thresholds=[0.6, 0.3]"], "must rise, each named once"),
    (["quick", "--set", "epochs"], "not of the form NAME=VALUE"),
    (["quick", "--set", "seeds=[0"], "is not a value"),
    (["quick", "--only", "07"], "there is no notebook '07'"),
    (["quick", "--from", "x"], "there is no notebook"),
    (["quick", "--only", ""], "there is no notebook"),
]


@pytest.mark.parametrize(("arguments", "sentence"), MISTAKES, ids=[" ".join(words) for words, _ in MISTAKES])
def test_mistakes_are_named(arguments, sentence, folders, capsys, monkeypatch):
    monkeypatch.setattr("paperlib.cli.run.papermill.execute_notebook", lambda *a, **k: pytest.fail("it ran"))
    assert main(["run", *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert not (folders / "runs").exists()


numbers = st.integers(-3, 2000) | st.floats() | st.sampled_from(["1e-3", "nan", "0.3"])
values = st.none() | st.booleans() | numbers | st.text(max_size=6) | st.lists(numbers | st.text(max_size=3), max_size=3)
near = {  # values of the right type, so that many a configuration is taken
    "seeds": st.lists(st.integers(-1, 5), max_size=4),
    "taps": st.lists(st.sampled_from(["attn", "block", "ff1", "pooled", "stem", "blok"]), max_size=5),
    "heads": st.integers(-1, 9),
    "many_heads": st.lists(st.integers(0, 9), max_size=3),
    "image_size": st.integers(0, 64),
    "prune_thresholds": st.lists(st.sampled_from([0.0, 0.3, 0.4, 1.0]), max_size=3),
    "retrain_thresholds": st.lists(st.sampled_from([0.3, 0.4, 0.5]), max_size=2),
    "lr": st.floats(-1, 1),
    "threshold": st.floats(-0.5, 1.5),
    "model": st.sampled_from(["cct_2_3x2", "cct_4_7x1", "cct_3_3x1", "cct_2_0x1"]),
    "cnn": st.sampled_from(["vgg_11x16", "vgg_11x0", "vgg_12x8"]),
}
changed = st.sampled_from(sorted(near)).flatmap(lambda name: st.tuples(st.just(name), near[name]))
changed |= st.tuples(st.sampled_from(sorted(Settings.model_fields)) | st.text(max_size=6), values)


@given(st.lists(changed, max_size=3).map(dict))
def test_any_configuration_is_taken_as_it_is_or_refused_in_one_sentence(changes):
    try:
        settings = load_settings("quick", changes)
    except ValueError as error:
        assert changes and len(str(error).splitlines()) == 1
        return
    profile = load_settings("quick").model_dump()
    meant = {name: _float_or_same(value) for name, value in changes.items()}
    texts = {name: value for name, value in changes.items() if isinstance(profile[name], str)}
    assert settings.model_dump() == profile | meant | texts
    # what a run records is what opens it again, and so is what the command line would be given
    assert load_settings("quick", settings.model_dump()) == settings
    words = [f"{name}={yaml.safe_dump(value, default_flow_style=True)}" for name, value in changes.items()]
    assert load_settings("quick", changes_of(words)) == settings


def test_unknown_option_exits_with_2():
    with pytest.raises(SystemExit) as stop:
        main(["run", "--colour"])
    assert stop.value.code == 2


def test_list_names_profiles_notebooks_and_parameters(capsys):
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    for word in [*profiles(), "01_train_cct", "04_head_modus_vivendi", *Settings.model_fields]:
        assert word in text


@pytest.mark.parametrize("profile", profiles())
def test_profiles_are_complete(profile):
    assert isinstance(load_settings(profile), Settings)


def test_numbers_without_a_dot_are_numbers():
    assert load_settings("quick", {"lr": "1e-3"}).lr == 1e-3


def test_a_failing_notebook_gives_exit_code_1_and_its_reason(folders):
    """For real, in a process of its own: a learning rate at which training diverges."""
    arguments = [sys.executable, "-m", "paperlib", "run", "quick", "--only", "1"]
    arguments += ["--set", "lr=1.0e+30", "epochs=1", "max_steps=3"]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folders), "PYTHONPATH": str(paths.root())}
    environment |= {f"PAPERLIB_{kind}": str(folders / kind.lower()) for kind in ("RUNS", "DATA")}
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, cwd=paths.root(), timeout=300)
    assert done.returncode == 1
    assert "01_train_cct failed" in done.stdout
    assert re.search("training diverged at step [1-3] of epoch 1: lower lr", done.stdout)
    assert any((folders / "runs" / "quick").glob("changed-*/01_train_cct.ipynb"))


def test_wrong_data_are_named_before_a_notebook_runs(folders):
    """For real, in a process of its own: CIFAR-100 without the data and, through a dead proxy, without network."""
    arguments = [sys.executable, "-m", "paperlib", "run", "cifar100-cpu", "--only", "1"]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folders), "PYTHONPATH": str(paths.root())}
    environment |= {"https_proxy": "http://127.0.0.1:9"}
    environment |= {f"PAPERLIB_{kind}": str(folders / kind.lower()) for kind in ("RUNS", "DATA")}
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, cwd=paths.root(), timeout=300)
    assert done.returncode == 2
    assert "cifar100.npz" in done.stderr  # says what to put where
    assert not (folders / "runs").exists()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("exit 1", "Python 3.11 or newer is needed, and there is none on the PATH."),
        ('case "$2" in *venv*) exit 1;; *version_info\\[*) echo python3.12;; esac', "install python3.12-venv"),
    ],
)
def test_a_missing_or_cut_python_is_one_sentence(answer, said, tmp_path):
    """Every name that the scripts try is answered by a stub: too old, or without the means to make an environment."""
    for name in ("run_all.sh", "environment.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(paths.root() / name, tmp_path)
    (tmp_path / "bin").mkdir()
    for name in ("python", "python3", *(f"python3.{minor}" for minor in range(11, 15))):
        stub = tmp_path / "bin" / name
        stub.write_text(f'#!/bin/sh\ncase "$1" in -c) ;; *) exit 1;; esac\n{answer}\n')
        stub.chmod(0o755)
    environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}
    done = subprocess.run(["bash", "run_all.sh"], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 1 and said in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / ".venv").exists()


def test_packages_go_into_the_environment_wherever_pip_is_told_to_put_them(tmp_path):
    """PIP_USER=1 and the like are common in people's profiles; the stub writes down what pip would see."""
    for name in ("run_tests.sh", "environment.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(paths.root() / name, tmp_path)
    for place in ("bin", ".venv/bin"):
        (tmp_path / place).mkdir(parents=True)
    (tmp_path / "bin" / "python3").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / ".venv" / "bin" / "python").write_text('#!/bin/sh\ncase "$*" in *install*) env >seen;; esac\n')
    for stub in ("bin/python3", ".venv/bin/python"):
        (tmp_path / stub).chmod(0o755)
    wishes = {"PIP_USER": "1", "PIP_TARGET": "/x", "PIP_PREFIX": "/x", "PIP_ROOT": "/x", "PIP_INDEX_URL": "kept"}
    environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", **wishes}
    subprocess.run(["bash", "run_tests.sh"], env=environment, cwd=tmp_path, capture_output=True)
    seen = (tmp_path / "seen").read_text().splitlines()
    assert [line for line in seen if line.startswith("PIP_")] == ["PIP_INDEX_URL=kept"]


# --- terminals, pipes and schedulers


@pytest.mark.parametrize(
    ("line", "changes"),
    [
        ("{python} -m paperlib list | head -n 1", {}),
        ("{python} -m paperlib list", {"PYTHONIOENCODING": "ascii"}),
        ("{python} -m paperlib list", {"PYTHONSAFEPATH": "1"}),
    ],
)
def test_what_reads_the_output_may_stop_or_know_no_signs(line, changes):
    environment = os.environ | changes
    command = ["bash", "-o", "pipefail", "-c", line.format(python=sys.executable)]
    done = subprocess.run(command, cwd=paths.root(), env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout and not done.stderr


def test_a_scheduler_that_stops_a_training_gets_a_sentence(folders):
    command = [sys.executable, "-m", "paperlib", "train", "quick", "--set", "epochs=50"]
    process = subprocess.Popen(command, cwd=paths.root(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("epoch 2/"):  # the state after the first is on the disk
            break
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143
    assert said.splitlines()[-1] == "paperlib train: stopped by SIGTERM: the same command goes on from here"
    assert list((folders / "runs").rglob("checkpoint.pt"))
