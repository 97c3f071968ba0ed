"""Plants faults in the science, one at a time, and asks whether the tests notice.

python tests/planted_faults.py [NUMBER ...]

Each fault replaces one piece of code in a copy of the project and runs the test files named with it. Exit code 1 if a
fault goes unnoticed. All of them take some 20 minutes.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# (module of paperlib, or path without .py, code, what replaces it, test files that should notice, what would be wrong)
FAULTS = [
    ("snp", "class_means.permute(2, 0, 1), readout_weight", "readout_weight.permute(2, 0, 1), readout_weight", "snp",
     "fields of weights instead of activations"),
    ("snp", "maximum.where(maximum > 0, torch.inf)", "fields.abs().amax(dim=(1, 2), keepdim=True)", "snp",
     "threshold relative to the largest size, not the maximum"),
    ("snp", "torch.inf)) > threshold", "torch.inf)) >= threshold", "snp", "threshold not strict"),
    ("snp", "mutual = booleans & booleans.transpose(1, 2)", "mutual = booleans", "snp",
     "one-way confusion joins labels"),
    ("snp", "internal = (sizes * (sizes - 1))", "internal = (sizes * sizes)", "snp", "diagonal counted as noise"),
    ("snp", "ones - labels - internal", "ones - internal", "snp", "signal counted as external noise"),
    ("snp", "pairs = num_labels * (num_labels - 1)", "pairs = num_labels * num_labels", "snp", "noise over L^2 pairs"),
    ("snp", "pooled_cluster_size=_quotient(labels, clusters)", "pooled_cluster_size=_quotient(labels, count)", "snp",
     "labels per node called cluster size"),
    ("snp", "offset = fields.mean(dim=1", "offset = fields.mean(dim=2", "snp", "offset over outputs, not inputs"),
    ("snp", "return sums / counts.view(-1, 1, 1)", "return sums / counts.float().mean()", "snp readouts",
     "class means wrong for unequal numbers of images"),
    ("readouts", 'group["rate"] * schedule', '0 * group["rate"] * schedule', "readouts", "readouts do not learn"),
    ("readouts", "weights[name] / scales[tap]", "weights[name] * scales[tap]", "readouts", "RMS not absorbed"),
    ("readouts", "fields = heads.sum(dim=1)", "fields = heads[:, 0]", "readouts", "the first head speaks for all"),
    ("taps", '"attn": ("self_attn.proj", "input")', '"attn": ("self_attn.proj", "output")', "readouts models",
     "heads recorded after they are mixed"),
    ("taps", "return activation.flatten(2).transpose(1, 2)", "return activation.flatten(2)", "readouts",
     "pixels taken for filters"),
    ("andc", "labels_out.float() @ labels_in.float().T > 0", "labels_out.float() @ labels_in.float().T > 1", "andc",
     "two shared labels needed"),
    ("andc", "score.flatten().topk(int(mask.sum())).indices",
     "score.flatten().topk(int(mask.sum()), largest=False).indices", "andc", "controls keep the smallest"),
    ("andc", "return 1 - sum(int(mask.sum())", "return sum(int(mask.sum())", "andc", "kept called dilution"),
    ("andc", "~(reached & heard)", "~(reached | heard)", "andc", "nodes with one dead side kept"),
    ("andc", "block.activation(block.linear1.bias) * gone", "block.linear1.bias * gone", "andc",
     "constants folded without the activation"),
    ("heads", "return _by_head(booleans.diagonal(dim1=1, dim2=2), num_heads).sum(dim=1)",
     "return _by_head(booleans.any(dim=1), num_heads).sum(dim=1)", "heads", "any answer counts as recognition"),
    ("heads", "dealt = head[torch.rand(64, nodes, generator=generator).argsort(dim=1)]",
     "dealt = head[None].expand(64, -1)", "heads", "the null is the observation"),
    ("heads", "own = slice(head * width, (head + 1) * width)", "own = slice(0, width)", "heads",
     "head 0 always silenced"),
    ("heads", "intact.int() - ablated.int()", "ablated.int() - intact.int()", "heads", "losses with the wrong sign"),
    ("heads", "return attention_map(q, k).mean(dim=2)", "return attention_map(q, k).mean(dim=3)", "heads",
     "attention given, not received"),
    ("macroscopic", "(square - mean.square()).clamp(min=0)", "square", "macroscopic", "second moment called variance"),
    ("macroscopic", "low = middle  # too good: more noise", "high = middle", "macroscopic", "factor never found"),
    ("muon", "0.2 * max(shape) ** 0.5", "0.2 * min(shape) ** 0.5", "muon", "steps scaled by the shorter side"),
    ("training", "generator(seed, \"batches\", epoch)", "generator(seed, \"batches\")", "training",
     "every epoch in the same order"),
    ("notebooks/verdicts", "met = all(effect > 0", "met = any(effect > 0", "verdicts", "one seed is enough"),
    ("notebooks/verdicts", "error[control], error.andc)).all()", "error[control], error.andc)).any()", "verdicts",
     "C4: masks beaten in one seed"),
    ("notebooks/verdicts", "(trained.excess > random.excess).all()", "(trained.excess > random.excess).any()",
     "verdicts", "C5: random network beaten in one seed"),
    ("notebooks/verdicts", "(trained.gap > trained.gap_null_high).all()", "(trained.gap > trained.gap_null_high).any()",
     "verdicts", "C5: dealt owners beaten in one seed"),
    ("notebooks/verdicts", "text, met = f\"{statistic} of {tap}, last - first encoder; rank trend > 0\", all(beaten)",
     "text, met = f\"{statistic} of {tap}, last - first encoder; rank trend > 0\", any(beaten)", "verdicts",
     "C3: random network beaten in one seed"),
    ("notebooks/verdicts", "low if trend_low > 0 else min(low, 0.0)", "low", "verdicts", "the trend may be uncertain"),
    ("notebooks/verdicts", "[tuple(map(min, *pair)) for pair", "[pair[0] for pair", "verdicts",
     "C1: the CNN may be uncertain"),
    ("notebooks/verdicts", "all(all(part) for _, _, part, *_ in found)", "all(found[0][2])", "verdicts",
     "C1: the CNN's random network is not looked at"),
    ("notebooks/stages/nodes", "x, y = images.x_train[held], images.y_train[held]",
     "x, y = images.x_test, images.y_test", "stages", "test images decide the masks"),
    ("notebooks/stages/pruned", "return output + shift", "return output", "stages",
     "later layers do not hear the mended ones"),
    ("notebooks/stages/pruned", "    mend(pruned)\n", "", "stages", "the mended network is not scored"),
    ("notebooks/verdicts", "all(sharper(point, curves[kind][0]) for kind in nulls)",
     "sharper(point, curves[\"random\"][0])", "verdicts", "C1: the CNN's second null is not looked at"),
    ("notebooks/stages/nodes", "if kind == CALIBRATED:", "if False:", "stages", "the second null is the first again"),
    ("notebooks/stages/division", "fields <= target)) / 2 - 0.5", "fields <= target)) / 2", "stages",
     "a label is compared with itself"),
    ("notebooks/stages/division", "ablated[encoder - 1], labels, owner)\n                #",
     "ablated[encoder - 1], labels, owned.owner)\n                #", "stages",
     "C5: owners are chosen on the test images"),
    ("notebooks/stages/nodes", "labelled_batches(network, places, unseen, y_unseen, images)",
     "labelled_batches(network, places, images.x_test, images.y_test, images)", "stages",
     "C6: test images predict themselves"),
    ("notebooks/stages/nodes", "GROUP_L2 / scale**2", "GROUP_L2 / scale", "stages", "another penalty than the group's"),
    ("notebooks/stages/nodes", "    if shuffled:", "    if False:", "stages", "labels are not shuffled"),
    ("notebooks/stages/pruned", "len(drop) ** 0.5", "len(drop)", "stages", "C4: a standard error too small"),
    ("notebooks/stages/pruned", "slice(draw % draws, None, draws) if", "slice(0, None, draws) if", "stages",
     "C4: all draws see the same images"),
    ("notebooks/verdicts", "max(candidates, key=lambda row: row[:2])", "max(candidates, key=lambda row: row[1])",
     "verdicts", "C4: the cheapest dilution decides, whatever the controls say"),
    ("notebooks/verdicts", "[right[images].mean(axis=0) for", "[right.mean(axis=0) for", "verdicts",
     "accuracy without uncertainty"),
    ("figures", "scale * grouped.mean()", "scale * grouped.max()", "figures", "the best seed is drawn"),
    ("notebooks/stages/division", "1 / own.shape[2] + sets.float() @ (alone - 1 / own.shape[2])",
     "sets.float() @ alone", "stages", "chance is added up with the nodes"),
]  # fmt: skip


def planted(root: Path, fault: tuple) -> tuple[Path, str]:
    """The file and its text with the fault in place; ValueError if the code is not there to be replaced."""
    module, code, wrong, *_ = fault
    path = root / (f"{module}.py" if "/" in module else f"paperlib/{module}.py")
    text = path.read_text(encoding="utf-8")
    if text.count(code) != 1:
        raise ValueError(f"{module}.py has {code!r} {text.count(code)} times")
    return path, text.replace(code, wrong)


def noticed(fault: tuple) -> bool:
    """Whether the tests fail with the fault in place."""
    *_, tests, _ = fault
    with tempfile.TemporaryDirectory() as folder:
        for part in ("paperlib", "tests", "notebooks", "pyproject.toml"):
            source = ROOT / part
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, Path(folder) / part)
        path, text = planted(Path(folder), fault)
        path.write_text(text, encoding="utf-8")
        files = [f"tests/test_{name}.py" for name in tests.split()]
        environment = {**os.environ, "PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode not in (0, 1):
            raise ValueError(f"the tests could not run: {done.stdout[-500:]}")
        return done.returncode == 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "numbers", nargs="*", type=int, metavar="NUMBER", help=f"which faults, 0 to {len(FAULTS) - 1} (default: all)"
    )
    chosen, missed = parser.parse_args().numbers or range(len(FAULTS)), 0
    if not set(chosen) <= set(range(len(FAULTS))):
        parser.error(f"faults are numbered from 0 to {len(FAULTS) - 1}")
    for number in chosen:
        found = noticed(FAULTS[number])
        missed += not found
        print(
            f"{number:2} {'noticed' if found else 'NOT NOTICED':12} {FAULTS[number][0]}: {FAULTS[number][4]}",
            flush=True,
        )
    print(f"{missed} of {len(chosen)} faults not noticed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
