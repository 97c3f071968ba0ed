"""Training: learns, repeats itself, survives interruptions, and says when it diverged."""

import itertools
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import paperlib
from paperlib import training
from paperlib.data import Images, channel_statistics
from paperlib.models import cct

RECIPE = training.Recipe(
    epochs=3,
    batch_size=8,
    lr=0.01,
    weight_decay=0.01,
    warmup=0.2,
    label_smoothing=0.1,
    shift=1,
    flip=True,
    precision="fp32",
)  # 3 steps an epoch on the toy below


def quiet(line):
    pass


def train(*arguments, **keywords):
    """The learning curve without its times, which nobody repeats."""
    curve = training.train(*arguments, **keywords)
    assert all(row["seconds"] >= 0 for row in curve)
    return [{name: value for name, value in row.items() if name != "seconds"} for row in curve]


def toy(n_train=24, n_test=9):
    """Three labels: the brightest of three colour channels, 8 x 8 pixels."""
    generator = torch.Generator().manual_seed(0)
    parts = []
    for n in (n_train, n_test):
        labels = torch.arange(n) % 3
        noise = torch.randint(0, 150, (n, 3, 8, 8), generator=generator)
        noise[torch.arange(n), labels] += 60
        parts += [noise.to(torch.uint8), labels]
    return Images("toy", *parts, classes=("red", "green", "blue"))


def small(seed=0):
    """A network with dropout, so that training draws random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Dropout(0.1), nn.Linear(192, 3))


def state_of(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def at_step(network, number, action):
    """Call `action` before the forward pass of the number-th training step (from 1)."""
    count = itertools.count(1)

    def before(module, args):
        if module.training and next(count) == number:
            action()

    return network.register_forward_pre_hook(before)


def test_a_long_curve_is_scored_at_some_epochs_and_at_the_last(monkeypatch):
    curve, network = train(small(), toy(), replace(RECIPE, epochs=5), 0, log=quiet), small()
    monkeypatch.setattr(training, "CURVE_POINTS", 3)
    lines = []
    sparse = train(network, toy(), replace(RECIPE, epochs=5), 0, log=lines.append)
    assert [row["test_accuracy"] is not None for row in sparse] == [False, True, False, True, True]
    assert [dense | {"test_accuracy": row["test_accuracy"]} for dense, row in zip(curve, sparse, strict=True)] == sparse
    assert sparse[3] == curve[3] and sparse[4] == curve[4] and ["accuracy" in line for line in lines].count(True) == 3
    data = toy()
    unscored = replace(data, x_test=data.x_test[:0], y_test=data.y_test[:0])
    rows = train(small(), unscored, replace(RECIPE, epochs=5), 0, log=quiet)
    assert [row | {"test_accuracy": None} for row in curve] == rows


# --- interruption


def train_cct(checkpoint, initial_seed, killed_at=None):
    """Train the smallest CCT with all its sources of randomness; optionally die in the middle of a step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(initial_seed)
        network = cct("cct_2_3x2", num_classes=3, image_size=8, attention_dropout=0.2, stochastic_depth=0.3)
    if killed_at:
        at_step(network, killed_at, lambda: os.kill(os.getpid(), signal.SIGKILL))
    curve = train(
        network, toy(), replace(RECIPE, epochs=4, optimizer="muon", token_share=0.5), 5, checkpoint, log=quiet
    )
    return curve, state_of(network)


def test_killed_training_ends_like_an_uninterrupted_one(tmp_path):
    checkpoint = tmp_path / "killed.pt"
    process = subprocess.run(
        [sys.executable, __file__, checkpoint, str(torch.get_num_threads())],
        env=os.environ | {"PYTHONPATH": str(Path(paperlib.__file__).parents[1])},
        capture_output=True,
        timeout=300,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    assert [row["epoch"] for row in torch.load(checkpoint, weights_only=True)["curve"]] == [1, 2]
    resumed, weights = train_cct(checkpoint, initial_seed=99)  # what it starts from must not matter
    uninterrupted, expected = train_cct(None, initial_seed=0)
    assert resumed == uninterrupted and len(resumed) == 4
    assert same(weights, expected)


def test_a_finished_training_is_only_loaded(tmp_path):
    network, again = small(), small(1)
    curve = train(network, toy(), RECIPE, 0, tmp_path / "c.pt", quiet)
    at_step(again, 1, lambda: pytest.fail("trained again"))
    assert train(again, toy(), RECIPE, 0, tmp_path / "c.pt", quiet) == curve
    assert same(state_of(again), state_of(network))


@pytest.mark.parametrize("began_in_bf16", [True, False])
def test_an_interrupted_training_keeps_its_precision(began_in_bf16, tmp_path, monkeypatch):
    """What `auto` means differs between machines, and from one look to the next; the rest of the epochs must not."""
    recipe = replace(RECIPE, optimizer="muon", precision="bf16" if began_in_bf16 else "fp32")

    def weights(recipe, checkpoint=None, stop=False):
        torch.manual_seed(0)
        network = cct("cct_2_3x2", num_classes=3, image_size=8)
        if stop:
            at_step(network, 5, lambda: 1 / 0)  # in the second epoch
        with pytest.raises(ZeroDivisionError) if stop else nullcontext():
            train(network, toy(), recipe, 0, checkpoint, quiet)
        return state_of(network)

    monkeypatch.setattr(training, "fast_bf16", lambda device_type: began_in_bf16)
    weights(replace(recipe, precision="auto"), tmp_path / "c.pt", stop=True)
    monkeypatch.setattr(training, "fast_bf16", lambda device_type: not began_in_bf16)
    assert same(weights(replace(recipe, precision="auto"), tmp_path / "c.pt"), weights(recipe))


@pytest.mark.parametrize(
    "seed, changed", [(1, {}), (0, {"lr": 0.02}), (0, {"epochs": 4}), (0, {"flip": False}), (0, {"precision": "bf16"})]
)
def test_a_checkpoint_of_something_else_is_refused(seed, changed, tmp_path, refuses):
    checkpoint = tmp_path / "c.pt"
    train(small(), toy(), RECIPE, 0, checkpoint, quiet)
    written = checkpoint.read_bytes()
    with refuses("c.pt"):
        train(small(), toy(), replace(RECIPE, **changed), seed, checkpoint, quiet)
    assert checkpoint.read_bytes() == written


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    checkpoint = tmp_path / "c.pt"
    expected = train(small(), toy(), RECIPE, 0, log=quiet)
    save, calls = torch.save, itertools.count(1)

    def full_disk(state, file):
        if next(calls) == 2:
            file.write(b"half")
            raise OSError("no space left on device")
        save(state, file)

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="space"):
        train(small(), toy(), RECIPE, 0, checkpoint, quiet)
    assert len(torch.load(checkpoint, weights_only=True)["curve"]) == 1
    assert train(small(), toy(), RECIPE, 0, checkpoint, quiet) == expected


# --- divergence


def test_a_loss_that_is_not_finite_is_located(tmp_path):
    """Weights become NaN before step 5, the second of epoch 2; the checkpoint of epoch 1 is still good."""
    checkpoint, network = tmp_path / "c.pt", small()
    at_step(network, 5, lambda: nn.init.constant_(network[2].weight, float("nan")))
    with pytest.raises(FloatingPointError, match="step 2 of epoch 2"):
        train(network, toy(), RECIPE, 0, checkpoint, quiet)
    saved = torch.load(checkpoint, weights_only=True)
    assert len(saved["curve"]) == 1 and all(value.isfinite().all() for value in saved["network"].values())
    resumed, uninterrupted = small(1), small()
    curve = train(resumed, toy(), RECIPE, 0, checkpoint, quiet)
    assert curve == train(uninterrupted, toy(), RECIPE, 0, log=quiet)
    assert same(state_of(resumed), state_of(uninterrupted))


@pytest.mark.parametrize("epochs", [1, 3])
def test_weights_that_diverge_in_an_epochs_last_step_are_not_saved(epochs, tmp_path):
    """All losses of epoch 1 are finite, but its last gradient is not."""
    checkpoint, network = tmp_path / "c.pt", small()
    at_step(network, 3, lambda: network[2].weight.register_hook(lambda gradient: gradient * float("nan")))
    with pytest.raises(FloatingPointError):
        train(network, toy(), replace(RECIPE, epochs=epochs), 0, checkpoint, quiet)
    assert not checkpoint.exists()


def test_compiled_steps_are_the_same_steps(monkeypatch):
    """Of all shapes: all tokens and a share of them, whole batches and the last one. What is compiled is traced here
    and then run as it is, so that bits can be compared."""
    recipe = replace(RECIPE, batch_size=10, token_share=0.5)
    calls, traced = [], partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", lambda network, dynamic, options: calls.append(1) or traced(network))
    weights = []
    for compiling in (False, True):
        torch.manual_seed(0)
        network = cct("cct_2_3x2", num_classes=3, image_size=8, attention_dropout=0.2, stochastic_depth=0.3)
        train(network, toy(), recipe, 0, log=quiet, compiling=compiling)
        weights.append(state_of(network))
    assert same(*weights) and calls == [1]


# --- randomness


def test_the_seed_decides_the_weights():
    results = []
    for seed in (0, 0, 1):
        network = small()
        train(network, toy(), RECIPE, seed, log=quiet)
        results.append(state_of(network))
    assert same(results[0], results[1]) and not same(results[0], results[2])


@pytest.mark.parametrize("noise", ["dropout", "augmentation"])
def test_epochs_draw_other_numbers(noise):
    """Without learning, every epoch's loss is that of its own dropout or augmentation."""
    recipe = replace(RECIPE, lr=0.0, batch_size=24, shift=2 * (noise == "augmentation"), flip=False)
    network = small().append(nn.Dropout(0.5 * (noise == "dropout")))
    network[1].p = 0.0
    losses = [row["loss"] for row in train(network, toy(), recipe, 0, log=quiet)]
    assert len({round(loss, 5) for loss in losses}) == 3


def test_training_leaves_the_global_generator_alone():
    network = small()
    before = torch.get_rng_state()
    train(network, toy(), RECIPE, 0, log=quiet)
    assert torch.equal(torch.get_rng_state(), before)


def test_generators_differ_by_seed_and_purpose():
    purposes = [(0, "a", 1), (0, "a", 2), (0, "b", 1), (1, "a", 1), (0, "a"), (0, "a1")]
    drawn = {tuple(torch.rand(4, generator=training.generator(*purpose)).tolist()) for purpose in purposes}
    assert len(drawn) == len(purposes)
    again = torch.rand(4, generator=training.generator(0, "a", 1))
    assert tuple(again.tolist()) in drawn


def test_seeded_block_repeats_and_leaves_nothing_behind():
    before = torch.get_rng_state()
    drawn = []
    for seed in (0, 0, 1):
        with training.seeded(seed, "start"):
            drawn.append(torch.rand(3).tolist())
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.get_rng_state(), before)


# --- schedule and optimizer


@given(st.integers(1, 400), st.floats(0, 1), st.sampled_from(["linear", "cosine"]))
def test_schedule_rises_to_1_and_falls(steps, warmup, decay):
    factors = [training.schedule(step, steps, warmup, decay) for step in range(steps)]
    assert max(factors) == pytest.approx(1) and min(factors) > 0
    peak = factors.index(max(factors))
    assert abs(peak + 1 - warmup * steps) <= 0.5 + 1e-9 or (peak == 0 and warmup * steps < 1)
    assert all(a < b for a, b in itertools.pairwise(factors[: peak + 1]))
    assert all(a > b for a, b in itertools.pairwise(factors[peak:]))
    if warmup <= 0.5:
        assert factors[-1] <= 2 / steps


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_only_matrices_decay(optimizer):
    network = cct("cct_2_3x2", num_classes=3, image_size=8)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(1)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for part in training.optimizers(network, replace(RECIPE, optimizer=optimizer, lr=0.1, weight_decay=0.5)):
        part.step()
    for name, parameter in network.named_parameters():
        matrix = parameter.ndim > 1 and name != "classifier.positional_emb"
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, 0.95 if matrix else 1.0))


def test_muon_takes_the_encoders_matrices_and_adamw_the_rest():
    network = cct("cct_2_3x2", num_classes=3, image_size=8)
    adamw, muon = training.optimizers(network, replace(RECIPE, optimizer="muon"))
    names = {weight: name for name, weight in network.named_parameters()}
    found = {names[weight] for group in muon.param_groups for weight in group["params"]}
    layers = ("self_attn.qkv", "self_attn.proj", "linear1", "linear2")
    assert found == {f"classifier.blocks.{index}.{layer}.weight" for index in range(2) for layer in layers}
    rest = {names[weight] for group in adamw.param_groups for weight in group["params"]}
    assert rest == set(names.values()) - found


def test_muon_without_encoders_is_refused(refuses):
    with refuses("adamw"):
        training.optimizers(small(), replace(RECIPE, optimizer="muon"))


def test_a_share_of_the_tokens_in_the_first_four_fifths_of_the_steps():
    network, seen = cct("cct_2_3x2", num_classes=3, image_size=8), []
    network.classifier.blocks[0].register_forward_pre_hook(
        lambda module, args: seen.append(args[0].shape[1]) if module.training else None
    )
    train(network, toy(), replace(RECIPE, epochs=5, max_steps=2, token_share=0.5), 0, log=quiet)
    assert seen == 8 * [2] + 2 * [4]


def test_a_network_without_tokens_refuses_a_share_of_them(refuses):
    with refuses("token_share"):
        train(small(), toy(), replace(RECIPE, token_share=0.5), 0, log=quiet)


# --- the curve


def test_training_learns_the_colours():
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
    nn.init.zeros_(network[2].weight)
    curve = train(network, toy(), replace(RECIPE, epochs=40, lr=0.1, label_smoothing=0.0), 0, log=quiet)
    assert [row["epoch"] for row in curve] == list(range(1, 41))
    assert curve[-1]["test_accuracy"] == 1 and curve[-1]["loss"] < 0.5 * curve[0]["loss"]
    assert not network.training


def test_curve_holds_mean_loss_and_test_accuracy():
    """At a learning rate of 0 and without augmentation, both follow from the initial weights."""
    data, network = toy(), small()
    network[1].p = 0.0
    curve = train(network, data, replace(RECIPE, lr=0.0, shift=0, flip=False), 0, log=quiet)
    pixels = data.x_train.double() / 255
    mean, std = pixels.mean(dim=(0, 2, 3)), pixels.transpose(0, 1).flatten(1).std(dim=1, unbiased=False)
    logits = []
    for images in (data.x_train, data.x_test):
        normal = (images.double() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        logits.append(normal.flatten(1) @ network[2].weight.double().T + network[2].bias.double())
    log_share = logits[0].log_softmax(dim=1)
    target = torch.full((24, 3), 0.1 / 3).double()
    target[torch.arange(24), data.y_train] += 0.9
    loss = -(target * log_share).sum(dim=1).mean().item()
    accuracy = sum(a == b for a, b in zip(logits[1].argmax(1).tolist(), data.y_test.tolist(), strict=True)) / 9
    for row in curve:
        assert row["loss"] == pytest.approx(loss, rel=1e-5)
        assert row["test_accuracy"] == pytest.approx(accuracy)


def test_learning_rate_of_the_curve_follows_the_schedule():
    curve = train(small(), toy(), replace(RECIPE, epochs=10, warmup=0.1), 0, log=quiet)
    rates = [row["lr"] for row in curve]
    assert rates[0] == pytest.approx(0.01)  # warm-up is the first epoch
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.001


@pytest.mark.parametrize("max_steps, steps", [(0, 3), (1, 1), (2, 2), (50, 3)])
def test_max_steps_shortens_an_epoch(max_steps, steps):
    network, taken = small(), []
    network.register_forward_pre_hook(lambda module, args: taken.append(len(args[0])) if module.training else None)
    curve = train(network, toy(20), replace(RECIPE, max_steps=max_steps), 0, log=quiet)
    assert len(curve) == 3
    assert taken == [8, 8, 4][:steps] * 3
    assert all(0 < row["loss"] < 10 for row in curve)  # a mean over the steps taken


def test_bf16_rounds_the_training_not_the_weights():
    curves = {}
    for precision in ("fp32", "bf16"):
        network = small()
        curves[precision] = train(network, toy(), replace(RECIPE, precision=precision), 0, log=quiet)
        assert network[2].weight.dtype == torch.float32
    a, b = curves["fp32"][0]["loss"], curves["bf16"][0]["loss"]
    assert a != b and a == pytest.approx(b, rel=0.02)


# --- predictions


def test_predictions_are_in_order_and_without_dropout():
    data, network = toy(), small()
    mean, std = channel_statistics(data.x_train)
    logits = training.predict(network.train(), data.x_train, mean, std, batch_size=7)
    network.eval()
    expected = torch.cat([network((image[None].float() / 255 - mean) / std) for image in data.x_train])
    torch.testing.assert_close(logits, expected.detach())
    assert not logits.requires_grad


def test_accuracy_is_the_share_of_right_answers():
    data, network = toy(n_test=50), small()
    mean, std = channel_statistics(data.x_train)
    right = (training.predict(network, data.x_test, mean, std).argmax(dim=1) == data.y_test).tolist()
    assert 0 < sum(right) < 50
    assert training.accuracy(network, data) == sum(right) / 50


if __name__ == "__main__":  # the process that is killed, in the middle of epoch 3
    torch.set_num_threads(int(sys.argv[2]))
    train_cct(Path(sys.argv[1]), initial_seed=0, killed_at=8)
