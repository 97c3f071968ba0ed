"""Stages: done once, computed again for a stated reason, never torn, never over an older artefact."""

import errno
import json
import os
import shutil
import threading

import pytest
import torch
from PIL import Image

from paperlib import files, paths, provenance
from paperlib.data import Images
from paperlib.experiment import settings, store


@pytest.fixture
def run(folders):
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    labels = torch.tensor([0, 0, 1, 1])
    data = Images("toy", images, labels, images, labels, ("a", "b"))
    said = []
    run = store.Run(
        "quick", settings.load_settings("quick"), data, folders / "run", folders / "figures", log=said.append
    )
    run.output.mkdir()
    run.said = said  # what the log was told, for the tests below
    return run


@pytest.fixture(autouse=True)
def allow_notes(monkeypatch):
    monkeypatch.setattr(store.Run, "__setattr__", object.__setattr__)


def fresh(run):
    """The same run in a new process: nothing remembered."""
    run.finished.clear()
    run.said.clear()
    return run


def writer(calls):
    def make(folder):
        calls.append(folder)
        files.save_table(folder / "table.csv", [{"value": len(calls)}])

    return make


def test_an_unchanged_stage_is_not_run_again(run):
    calls = []
    first = run.stage("s", {"epochs": 2}, {"data": "x"}, writer(calls))
    again = fresh(run).stage("s", {"epochs": 2}, {"data": "x"}, writer(calls))
    assert len(calls) == 1
    assert (again.folder, again.sha256) == (first.folder, first.sha256)
    assert run.said == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_stage_says_what_it_was_made_with(run, precision):
    """Stages of one walk may come from several machines, whose precisions differ."""
    run.settings = run.settings.model_copy(update={"precision": precision})
    record = files.read_json(run.stage("s", {}, {}, writer([])).folder / "stage.json")
    assert torch.__version__.startswith(record["environment"]["torch"])
    assert record["environment"]["training_precision"] == precision


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"config": {"epochs": 3}}, "epochs changed (2 -> 3)"), ({"inputs": {"data": "y"}}, "input data changed")],
)
def test_a_changed_stage_says_why_and_keeps_the_old_artefact(run, change, reason):
    calls = []
    arguments = {"config": {"epochs": 2}, "inputs": {"data": "x"}}
    old = run.stage("s", **arguments, make=writer(calls))
    new = fresh(run).stage("s", **{**arguments, **change}, make=writer(calls))
    assert len(calls) == 2
    assert run.said == [f"s: computed again, {reason}"]
    assert old.folder != new.folder
    assert old.table("table").value.item() == 1


def test_a_table_changed_together_with_its_hash_is_noticed(run):
    stage = run.stage("s", {}, {}, writer([]))
    (stage.folder / "table.csv").write_text("value\n9\n")
    manifest = stage.manifest | {"outputs": {"table.csv": files.sha256(stage.folder / "table.csv")}}
    files.write_json(stage.folder / "stage.json", manifest)
    with pytest.raises(ValueError, match="its hashes do not fit each other"):
        fresh(run).stage("s", {}, {}, writer([]))


@pytest.mark.parametrize("key", ["outputs", "sha256"])
def test_a_manifest_without_a_key_is_named(run, key):
    stage = run.stage("s", {}, {}, writer([]))
    files.write_json(stage.folder / "stage.json", {k: v for k, v in stage.manifest.items() if k != key})
    with pytest.raises(ValueError, match=r"stage\.json cannot be used"):
        fresh(run).stage("s", {}, {}, writer([]))


def test_files_changed_from_outside_are_noticed(run):
    calls = []
    artefact = run.stage("s", {}, {}, writer(calls))
    (artefact.folder / "table.csv").write_text("value\n9\n")
    again = fresh(run).stage("s", {}, {}, writer(calls))
    assert len(calls) == 2
    assert again.table("table").value.item() == 2
    assert "changed from outside" in run.said[0]


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak cannot be forgotten here")
def test_a_stage_says_how_much_memory_it_took(run):
    def hungry(folder):
        block = torch.ones(100_000_000)  # 0.4 GB
        files.save_table(folder / "table.csv", [{"value": block.sum().item()}])

    small = run.stage("small", {}, {}, writer([])).manifest["peak_gb"]
    large = run.stage("large", {}, {}, hungry).manifest["peak_gb"]
    again = run.stage("small again", {}, {}, writer([])).manifest["peak_gb"]
    assert 0.35 < large - small < 0.6 and again < small + 0.1
    assert fresh(run).stage("large", {}, {}, hungry).manifest["peak_gb"] == large


def test_an_interrupted_stage_is_not_taken_for_done(run):
    def breaks(folder):
        (folder / "checkpoint.pt").write_bytes(b"epoch 1")
        (folder / ".weights.safetensors.0123.part").write_bytes(b"of a process that was killed")
        files.save_table(folder / "table.csv", [{"value": 0}])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.stage("s", {}, {}, breaks)
    seen = []

    def resumes(folder):
        seen.extend(path.name for path in folder.glob("*.pt"))
        files.save_table(folder / "table.csv", [{"value": 1}])

    artefact = fresh(run).stage("s", {}, {}, resumes)
    assert seen == ["checkpoint.pt"]
    assert "goes on where it was interrupted" in run.said[0]
    assert artefact.table("table").value.item() == 1
    assert {path.name for path in artefact.folder.iterdir()} == {"table.csv", "stage.json"}


def test_a_checkpoint_stays_until_the_stage_counts_as_done(run, monkeypatch):
    def make(folder):
        (folder / "checkpoint.pt").write_bytes(b"all epochs")
        files.save_table(folder / "table.csv", [{"value": 1}])

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(provenance, "environment", interrupted)
        run.stage("s", {}, {}, make)
    assert list(run.stages.rglob("checkpoint.pt"))
    assert not list(fresh(run).stage("s", {}, {}, make).folder.glob("*.pt"))


def heavy(calls):
    def make(folder):
        calls.append(folder)
        files.save_table(folder / "table.csv", [{"value": 7}])
        files.save_tensors(folder / "weights.safetensors", {"w": torch.arange(3.0)})

    return make


def test_a_committed_stage_needs_its_large_files_only_where_they_are_read(run, tmp_path):
    calls = []
    done = run.stage("s", {}, {}, heavy(calls))
    copy = tmp_path / "committed" / "s" / done.folder.name
    shutil.copytree(done.folder, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.rmtree(run.stages)
    run.committed = tmp_path / "committed"
    found = fresh(run).stage("s", {}, {}, heavy(calls))
    assert found.table("table").value.item() == 7 and len(calls) == 1
    assert (found.folder, found.sha256) == (copy, done.sha256)
    assert torch.equal(found.tensors("weights")["w"], torch.arange(3.0)) and len(calls) == 2
    assert found.tensors("weights") and len(calls) == 2  # made once
    again = fresh(run).stage("s", {}, {}, heavy(calls))
    assert again.sha256 == done.sha256 and again.tensors("weights") and len(calls) == 2  # kept in the run's folder
    (copy / "table.csv").write_text("value\n8\n")
    with pytest.raises(ValueError, match="files do not fit"):
        fresh(run).stage("s", {}, {}, heavy(calls))


def test_arrays_come_back_as_they_were(run):
    tensors = {"a/b": torch.rand(5, 3, 3) > 0.5, "empty": torch.zeros(0, 4).bool(), "real": torch.randn(2, 2)}
    artefact = run.stage("s", {}, {}, lambda folder: files.save_arrays(folder / "some.npz", tensors))
    back = artefact.arrays("some")
    assert set(back) == set(tensors)
    assert all(torch.equal(back[name], value) and back[name].dtype == value.dtype for name, value in tensors.items())


def test_a_run_waits_for_another_one_that_is_working_on_a_stage(run):
    """And takes what that one has made; two notebooks may be open at once."""
    calls, begun, found = [], threading.Event(), []

    def slow(folder):
        writer(calls)(folder)
        begun.set()
        waiting.wait(10)

    waiting, said = threading.Event(), []

    def log(text):
        said.append(text)
        waiting.set()

    other = store.Run("quick", run.settings, run.images, run.stages, run.output, log=log)
    first = threading.Thread(target=lambda: run.stage("s", {}, {}, slow))
    first.start()
    assert begun.wait(10)
    second = threading.Thread(target=lambda: found.append(other.stage("s", {}, {}, writer(calls))))
    second.start()
    for thread in (first, second):
        thread.join(20)
    assert len(calls) == 1 and found[0].table("table").value.item() == 1
    assert said == ["s: another run is working on it: waiting until it is done, or stopped"]


def test_summary_gathers_notebooks_and_forgets_other_settings(run):
    verdict = {"claim": "C2", "effect": 1.0}
    run.record("02", {"b": 2}, [verdict])
    run.record("01", {"a": 1}, [])
    run.record("02", {"b": 3}, [{**verdict, "effect": 2.0}])
    summary = json.loads((run.output / "summary.json").read_text())
    assert [*summary["results"].items()] == [("01", {"a": 1}), ("02", {"b": 3})]  # in order, whatever ran last
    assert [row["effect"] for row in summary["verdicts"]] == [2.0]
    assert " ".join(summary) == "profile config seeds environment device data revision results verdicts stages"
    assert set(summary["data"]) == {"name", "sha256", "classes", "vocabulary"}
    other = settings.load_settings("quick", {"epochs": run.settings.epochs + 1})
    said = []
    store.Run("quick", other, run.images, run.stages, run.output, log=said.append).record("03", {}, [])
    assert list(json.loads((run.output / "summary.json").read_text())["results"]) == ["03"]
    assert said == ["summary.json: dropped, since settings or data were others: 01, 02"]


def records(run, notebook):
    for value in range(20):
        run.record(f"{notebook}-{value}", {"value": value}, [])


def test_notebooks_that_record_at_once_lose_nothing(run):
    at_once = [threading.Thread(target=records, args=(run, notebook)) for notebook in range(4)]
    for thread in at_once:
        thread.start()
    for thread in at_once:
        thread.join()
    assert len(json.loads((run.output / "summary.json").read_text())["results"]) == 80


# --- code that has changed since


def of_the_package(calls):
    """A stage that the module `snp` would compute."""
    make = writer(calls)
    make.__module__ = "paperlib.snp"
    return make


@pytest.fixture
def edited(monkeypatch):
    """edited(module): as if its code were another from now on."""
    read = provenance._read

    def edit(name):
        path = provenance._source(name)
        monkeypatch.setattr(provenance, "_read", lambda p: ("other", []) if p == path else read(p))

    return edit


def stages_of(run):
    run.record("02", {}, [])
    return json.loads((run.output / "summary.json").read_text())["stages"]


def test_a_result_of_other_code_stays_and_says_so(run, edited):
    calls = []
    run.stage("s", {}, {}, of_the_package(calls))
    assert stages_of(fresh(run)) == {} and run.stage("s", {}, {}, of_the_package(calls)).outdated == ()
    assert stages_of(run)["s"]["changed_since"] == [] and run.said == []
    edited("figures")  # draws, but computes nothing
    assert fresh(run).stage("s", {}, {}, of_the_package(calls)).outdated == ()
    edited("snp")
    for name in "st":
        fresh(run).stage(name, {}, {}, of_the_package(calls))
    assert len(calls) == 2  # t is new
    edited("taps")  # which snp does not import
    found = fresh(run).stage("t", {}, {}, of_the_package(calls))
    assert found.outdated == ("snp",)  # it was computed by the other code, which has changed back
    entry = stages_of(run)["t"]
    assert entry["changed_since"] == ["snp"] and "threads" in entry["machine"]
    assert run.said == [
        "t: computed before snp changed, and taken as it is, like what summary.json names so "
        "(run quick --recompute STAGE computes anew)"
    ]


def test_stages_are_recomputed_on_request(run, edited, refuses):
    calls = []
    for name in ("snr-seed0", "snr-seed1", "heads-seed0"):
        run.stage(name, {}, {}, of_the_package(calls))
    edited("snp")
    fresh(run).recompute(["snr-*"])
    for name in ("snr-seed0", "snr-seed1", "heads-seed0"):
        run.stage(name, {}, {}, of_the_package(calls))
    assert len(calls) == 5
    assert {name: stage["changed_since"] for name, stage in stages_of(run).items()} == {
        "snr-seed0": [], "snr-seed1": [], "heads-seed0": ["snp"],
    }  # fmt: skip
    with refuses("no finished stage is called snt: there are heads-seed0, snr-seed0, snr-seed1"):
        run.recompute(["snt"])


def test_recomputing_forgets_no_other_settings(run):
    """Hours of another run, and what it would take from here."""
    calls = []
    run.stage("s", {"epochs": 1}, {}, writer(calls))
    other = run.settings.model_copy(update={"threshold": 0.4})
    theirs = store.Run("quick", other, run.images, run.stages, run.output, log=run.said.append)
    theirs.recompute(["s"])
    fresh(run).stage("s", {"epochs": 1}, {}, writer(calls))
    assert len(calls) == 1
    theirs.stage("s", {"epochs": 1}, {}, writer(calls))
    assert len(calls) == 2
    theirs.finished.clear()
    theirs.stage("s", {"epochs": 1}, {}, writer(calls))
    assert len(calls) == 2  # once is enough


def test_code_that_changes_while_a_stage_computes_did_not_compute_it(run, edited):
    def make(folder):
        files.save_table(folder / "table.csv", [{"value": 1}])
        edited("snp")

    make.__module__ = "paperlib.snp"
    run.stage("s", {}, {}, make)
    assert fresh(run).stage("s", {}, {}, of_the_package([])).outdated == ("snp",)


def test_what_is_resumed_is_of_the_code_that_began_it(run, edited):
    """A checkpoint of other code is in the result; one that is recomputed begins anew."""

    def make(folder):
        if not (folder / "checkpoint.pt").exists():
            (folder / "checkpoint.pt").write_bytes(b"half")
            raise KeyboardInterrupt
        files.save_table(folder / "table.csv", [{"value": 1}])

    make.__module__ = "paperlib.snp"
    for outdated in (("snp",), ()):
        with pytest.raises(KeyboardInterrupt):
            run.stage("s", {}, {}, make)
        edited("snp")
        assert fresh(run).stage("s", {}, {}, make).outdated == outdated
        fresh(run).recompute(["s"])


def test_what_reads_an_outdated_stage_is_outdated(run, edited):
    first = run.stage("readouts", {}, {}, of_the_package([]))
    edited("snp")
    first = fresh(run).stage("readouts", {}, {}, of_the_package([]))
    assert run.stage("nodes", {}, {"readouts": first.sha256}, writer([])).outdated == ("snp",)
    assert run.stage("others", {}, {"data": "x"}, writer([])).outdated == ()


def test_code_that_nobody_recorded_is_not_known(run):
    stage = run.stage("s", {}, {}, writer([]))
    files.write_json(stage.folder / "stage.json", {k: v for k, v in stage.manifest.items() if k != "code"})
    assert fresh(run).stage("s", {}, {}, writer([])).outdated is None
    assert stages_of(run)["s"]["changed_since"] is None


def test_a_committed_stage_is_recomputed_beside_it(run, tmp_path):
    calls = []
    done = run.stage("s", {}, {}, writer(calls))
    run.committed = tmp_path / "committed"
    shutil.move(done.folder.parent, run.committed / "s")
    assert fresh(run).stage("s", {}, {}, writer(calls)).folder.is_relative_to(run.committed)
    run.recompute(["s"])
    for _ in range(2):
        assert fresh(run).stage("s", {}, {}, writer(calls)).table("table").value.item() == 2
    assert (run.committed / "s" / done.folder.name / "table.csv").read_text() == "value\n1\n"


def test_code_is_what_is_executed(tmp_path):
    """Comments, docstrings and layout are none; a constant and an operator are."""

    def code(text):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.py"
        path.write_text(text)
        return provenance._read(path)[0]

    plain = code("def f(x):\n    return x > 0.3\n")
    assert plain == code('"""Doc."""\n\ndef f(\n    x,\n):\n    """Doc."""\n    # why\n    return (x > 0.3)\n')
    others = ("def f(x):\n    return x >= 0.3\n", "def f(x):\n    return x > 0.4\n", "def f(y):\n    return y > 0.3\n")
    assert len({plain, *map(code, others)}) == 4


def test_a_stage_knows_what_computes_it():
    found = provenance.made_by("paperlib.experiment.measure").keys()
    assert found >= {"snp", "optimum", "taps", "training", "data.images", "models.cct", "experiment.measure"}
    assert not found & {"figures", "claims", "verdicts", "answers", "files", "experiment.heads", "experiment.store"}


# --- file systems without locks


@pytest.mark.parametrize("reason", [errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS])
def test_without_locks_a_file_is_one(run, monkeypatch, reason):
    def none(self, **_):
        raise OSError(reason, "no locks here")

    monkeypatch.setattr(store.FileLock, "acquire", none)
    test_a_run_waits_for_another_one_that_is_working_on_a_stage(run)
    assert not list(run.stages.rglob("*.soft"))


def test_a_refused_lock_is_no_missing_one(run, monkeypatch):
    def none(self, **_):
        raise PermissionError(errno.EACCES, "not yours")

    monkeypatch.setattr(store.FileLock, "acquire", none)
    with pytest.raises(PermissionError):
        run.stage("s", {}, {}, writer([]))


def test_write_text_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    files.write_text(path, "old")
    monkeypatch.setattr(files.os, "replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        files.write_text(path, "new")
    assert path.read_text() == "old"


def test_a_relative_folder_counts_from_the_project(folders, monkeypatch):
    """Notebooks run in notebooks/, the command line in the project or below it."""
    project = folders / "project"
    for part in ("train", "test"):
        for label in ("a", "b"):
            place = project / "pictures" / part / label
            place.mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (8, 8), (number * 99, 0, 0)).save(place / f"{number}.png")
    shutil.copytree(paths.root() / "notebooks", project / "notebooks")
    (project / "pyproject.toml").touch()
    for where in (project, project / "notebooks"):
        monkeypatch.chdir(where)
        run = settings.open_run("quick", {"data": "folder:pictures", "image_size": 24})
        assert run.images.classes == ("a", "b") and len(run.images.x_train) == 4
