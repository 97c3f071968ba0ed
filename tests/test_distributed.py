"""Two gloo ranks give the result of one process: networks, learning curve, class means, answers."""

import os
import re
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from paperlib import distributed, experiment, files, paths, readouts
from paperlib.cli import main
from paperlib.data import channel_statistics
from paperlib.experiment import settings
from paperlib.experiment.store import Stage
from paperlib.models import cct
from paperlib.taps import cct_taps

SETTINGS = {"limit": 200, "epochs": 2, "batch_size": 48, "precision": "fp32", "flip": True}  # last batch: 8 images


def torchrun(folder):
    words = [f"{name}={str(value).lower()}" for name, value in SETTINGS.items()]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch += ["-m", "paperlib", "train", "quick", "--set", *words]
    environment = os.environ | {"PAPERLIB_RUNS": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(launch, env=environment, cwd=paths.root(), capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_two_ranks_train_the_network_of_one(folders):
    alone = experiment.networks.train(settings.open_run("quick", SETTINGS), seed=0)
    manifest = folders / "two" / "quick" / "stages" / "train-seed0" / alone.folder.name / "stage.json"
    first = torchrun(folders / "two")
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("epoch 2/2") == 1  # one rank speaks
    written = manifest.stat().st_mtime_ns
    second = torchrun(folders / "two")
    assert second.returncode == 0, second.stderr
    assert "epoch" not in second.stdout and "computed" not in second.stdout  # what is there is not trained again
    assert manifest.stat().st_mtime_ns == written and len(list(manifest.parents[1].glob("*/stage.json"))) == 1
    together = Stage(manifest.parent, files.read_json(manifest))
    for name, weights in alone.tensors("weights").items():
        if name.endswith("attention_pool.bias"):
            continue  # a softmax does not see it: its gradient is rounding alone, which Adam scales up
        assert torch.allclose(weights, together.tensors("weights")[name], atol=2e-4), name
    assert (alone.table("curve") - together.table("curve")).abs().max().max() < 0.02
    assert abs(alone.table("curve").loss - together.table("curve").loss).max() < 1e-4


@pytest.mark.slow
def test_what_stops_one_rank_ends_the_others(folders):
    (folders / "file").write_text("not a folder")
    done = torchrun(folders / "file")
    assert done.returncode == 1 and re.search("^paperlib train: .* cannot be written to", done.stderr, flags=re.M)


def test_more_processes_than_gpus_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert main(["train", "quick"]) == 2
    assert "at most" in capsys.readouterr().err


def measured(network, images, labels):
    places = cct_taps(network, ["attn", "block"])
    generator = torch.Generator().manual_seed(0)
    weights = {place.name: torch.randn(5, 16, 128, generator=generator) for place in places}
    return readouts.measure(network, places, weights, images, labels, *channel_statistics(images))


def small_case():
    torch.manual_seed(0)
    network = cct("cct_2_3x2", num_classes=5, image_size=16)
    return network, torch.randint(0, 256, (31, 3, 16, 16), dtype=torch.uint8), torch.arange(31) % 5


def one_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    result = measured(*small_case())
    if rank == 1:  # every rank has the whole result
        answers = result.correct | {f"heads/{name}": value for name, value in result.head_correct.items()}
        torch.save({"means": result.class_means, "answers": answers}, folder / "result.pt")
    dist.barrier()
    dist.destroy_process_group()


def one_rank_of_two_data_sets(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    distributed.check_same("images", "images")
    with pytest.raises(ValueError, match="rank 1 has other images than rank 0"):
        distributed.check_same(f"images of rank {rank}", "images")
    dist.barrier()
    dist.destroy_process_group()


def test_ranks_with_other_images_are_told_so(tmp_path):
    mp.spawn(one_rank_of_two_data_sets, args=(tmp_path,), nprocs=2)
    distributed.check_same("alone", "images")


def test_two_ranks_measure_what_one_measures(tmp_path):
    mp.spawn(one_rank, args=(tmp_path,), nprocs=2)
    both = torch.load(tmp_path / "result.pt", weights_only=True)
    alone = measured(*small_case())
    for name, means in alone.class_means.items():
        assert torch.allclose(means, both["means"][name], atol=1e-5)
    answers = alone.correct | {f"heads/{name}": value for name, value in alone.head_correct.items()}
    assert answers.keys() == both["answers"].keys()
    assert all(torch.equal(value, both["answers"][name]) for name, value in answers.items())
