"""SIGKILL at random moments of a walk: nothing torn, at most one epoch repeated, the same bits in the end.

Two kills by default; PAPERLIB_KILLS=25 python -m pytest tests/test_interruptions.py for more.
"""

import json
import os
import random
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file

KILLS = int(os.environ.get("PAPERLIB_KILLS", 2))
EPOCHS = 4
WALK = f"""
import torch
torch.set_num_threads(2)
from paperlib import claims, experiment, figures
from paperlib.cli import report
cut = {{"epochs": {EPOCHS}, "max_steps": 6, "limit": 300, "readout_epochs": 2, "prune_draws": 1, "precision": "fp32",
       "prune_thresholds": [0.3], "retrain_thresholds": [0.3], "prune_attention": False, "taps": ["attn", "block"]}}
run = experiment.open_run("quick", cut)
table = experiment.pruning.pruning(run)
figures.save(figures.pruning_curve(table, run.images.name), run, "accuracy_against_dilution", table)
run.record("03_andc_pruning", {{}}, claims.pruning(table, run.images.name))
report.write(run.output)
print("finished")
"""


def start(folder):
    environment = {**os.environ, "PAPERLIB_RUNS": str(folder / "runs")}
    return subprocess.Popen(
        [sys.executable, "-c", WALK], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def results(folder):
    """Stage -> hash of what it made."""
    found = sorted((folder / "runs" / "quick" / "stages").glob("*/*/stage.json"))
    return {path.parent.parent.name: json.loads(path.read_text())["sha256"] for path in found}


def nothing_is_torn(folder):
    for path in folder.rglob("*"):
        if path.is_dir() or path.name.startswith("."):
            continue
        assert path.stat().st_size, path
        if path.suffix == ".csv":
            pd.read_csv(path)
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                assert all(file[name] is not None for name in file)
        elif path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".html":
            assert path.read_text().rstrip().endswith("</html>")
        elif path.suffix == ".png":
            assert path.read_bytes().endswith(b"IEND\xaeB`\x82"), path


@pytest.mark.slow
def test_a_killed_walk_ends_with_the_same_bits(tmp_path):
    began = time.monotonic()
    whole = start(tmp_path / "whole")
    said, _ = whole.communicate()
    duration = time.monotonic() - began
    assert whole.returncode == 0, said
    seed = int(os.environ.get("PAPERLIB_KILL_SEED", 0))
    moments, kills, epochs = random.Random(seed), 0, 0
    killed = tmp_path / "killed"
    while kills < KILLS:
        process = start(killed)
        try:
            said, _ = process.communicate(timeout=moments.uniform(0.15, 0.9) * duration)
        except subprocess.TimeoutExpired:
            process.kill()
            said, _ = process.communicate()
            kills += 1
        else:  # it had come to its end: begin anew
            assert process.returncode == 0, said
            assert results(killed) == results(tmp_path / "whole")
            (killed / "runs").rename(tmp_path / f"done-{kills}-{time.monotonic_ns()}")
            epochs = 0
            continue
        epochs += said.count("test accuracy")
        nothing_is_torn(killed)
    last = start(killed)
    said, _ = last.communicate()
    assert last.returncode == 0 and "another run" not in said, said
    assert results(killed) == results(tmp_path / "whole")
    assert epochs + said.count("test accuracy") <= EPOCHS + KILLS
    for name in ("accuracy_against_dilution.csv", "accuracy_against_dilution.png", "accuracy_against_dilution.svg"):
        whole, killed = (next(tmp_path.glob(f"{part}/runs/quick/changed-*/{name}")) for part in ("whole", "killed"))
        assert whole.read_bytes() == killed.read_bytes(), name
