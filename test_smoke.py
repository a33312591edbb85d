"""Tests: the mathematics against independent definitions, every loader, and the scripts as a user runs them.

    python -m pytest -q test_smoke.py
"""
import contextlib
import importlib.util
import itertools
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.datasets
from PIL import Image

import common
from common import (Dataset, Learner, ResNet20, Split, UserError, balanced_order, batches, check_config, count_macs,
                    count_params, crop_and_flip, default_config, evaluate, halves, kendall_tau, load_dataset, load_json,
                    pareto, parse_macs, pooling_configs, rank_report, save_json)
from results import report
from search_mixture import Assignment, balance
from search_supernet import Pools, extract_network

HERE, CPU = Path(__file__).parent, torch.device("cpu")
TINY = ["--dataset", "synthetic", "--layers", "4", "--scales", "2", "--limit-train", "96", "--limit-test", "40",
        "--batch-size", "16", "--epochs", "2", "--amp", "off", "--device", "cpu"]  # 3 configurations


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def start(script, *words, launcher=()):
    """Start a script as a user does, one thread."""
    return subprocess.Popen([sys.executable, *launcher, str(HERE / script), *map(str, words)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})


def finish(process, code=0):
    """Wait for a started script: (standard output, standard error), after checking its exit code."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, (process.returncode, out, err)
    return out, err


def call(monkeypatch, capsys, script, *words):
    """Run a script's main in this process: (exit code, standard output, standard error)."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
    code = 0
    try:
        common.run_main(importlib.import_module(script.removesuffix(".py")).main)
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def timeless(value):
    """JSON without what may differ between equal runs: seconds."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if "seconds" not in k and k != "chosen_by"}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def files(folder):
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(Path(folder).rglob("*"))}


def made_up(n=64, classes=4, side=32):
    """A Dataset of noise."""
    rng = np.random.default_rng(0)
    pixels, labels = torch.from_numpy(rng.integers(0, 256, (n, side, side, 3), np.uint8)), torch.arange(n) % classes
    split = Split(pixels, torch.arange(n), labels, [120.0] * 3, [60.0] * 3)
    return Dataset("made up", split, split, [str(c) for c in range(classes)])


# ---- the mathematics -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("layers, scales", [(10, 3), (4, 2), (7, 1), (6, 6), (9, 4)])
def test_space_is_every_composition_in_order(layers, scales):
    brute = [c for c in itertools.product(range(1, layers + 1), repeat=scales) if sum(c) == layers]
    assert pooling_configs(layers, scales) == brute


def test_the_papers_space():
    configs = pooling_configs()
    assert (len(configs), configs[0], configs[-1], default_config()) == (36, (1, 1, 8), (8, 1, 1), (4, 3, 3))


@pytest.mark.parametrize("config", [(4, 3), (4, 3, 4), (0, 5, 5), (-1, 6, 5), (), (4.0, 3, 3), (1, 1, 1, 1, 1, 1, 4)])
def test_configurations_that_do_not_fit_are_refused(config):
    with pytest.raises(ValueError):
        check_config(config, 10, 7 if len(config) == 7 else 3)


@pytest.mark.parametrize("stem", [1, 4])
def test_macs_agree_with_the_flop_counter(stem):
    from torch.utils.flop_counter import FlopCounterMode
    net, x = ResNet20(3, 7, stem), torch.zeros(1, 3, 32 * stem, 32 * stem)
    for config in pooling_configs() if stem == 1 else [(1, 1, 8), (4, 3, 3)]:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(x, config)
        assert 2 * count_macs(config, 3, 7, stem) == counter.get_total_flops(), config


def test_published_costs():
    assert [round(count_macs(c) / 1e6, 1) for c in ((1, 1, 8), (4, 3, 3), (8, 1, 1))] == [18.6, 40.8, 149.3]


@pytest.mark.parametrize("norm", ["own", "shared"])
@pytest.mark.parametrize("shape", [(3, 10, 1, 10), (1, 5, 2, 4), (3, 101, 4, 13)])
def test_parameters_are_counted(norm, shape):
    channels, classes, stem, layers = shape
    net = ResNet20(channels, classes, stem, layers, norm)
    assert count_params(layers, channels, classes, stem, norm) == sum(p.numel() for p in net.parameters())


def test_every_configuration_pools_where_it_says():
    net, sides = ResNet20(norm="shared"), []
    for layer in net.layers:
        layer.register_forward_hook(lambda module, inputs, output: sides.append(output.shape[-1]))
    for config in pooling_configs():
        sides.clear()
        net(torch.zeros(2, 3, 32, 32), config)
        assert sides == [32] * config[0] + [16] * config[1] + [8] * config[2]


def test_shared_norm_keeps_no_state_and_uses_the_batch():
    net, x = ResNet20(norm="shared").eval(), torch.randn(8, 3, 32, 32)
    assert not list(net.buffers())
    normal = net.layers[1].norm1(torch.randn(64, 16, 8, 8) * 5 + 3)
    assert normal.mean().abs() < 1e-5 and abs(normal.std() - 1) < 1e-2
    assert not torch.allclose(net(x, (4, 3, 3))[:2], net(x[:2], (4, 3, 3)), atol=1e-4)


@pytest.mark.parametrize("models", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["random", "peaked", "one-sided", "one-hot"])
def test_balance(models, kind):
    rng = torch.Generator().manual_seed(models)
    probs = {"random": torch.rand(36, models, generator=rng) + 1e-3,
             "peaked": torch.softmax(100 * torch.rand(36, models, generator=rng), 1),
             "one-sided": torch.softmax(100 * torch.tensor([[1.0] + [0.0] * (models - 1)]).repeat(36, 1), 1),
             "one-hot": torch.eye(models)[torch.zeros(36, dtype=int)]}[kind]
    balanced = balance(probs / probs.sum(1, keepdim=True))
    assert balanced.dtype == probs.dtype and balanced.shape == probs.shape and (balanced >= 0).all()
    assert torch.allclose(balanced.sum(1), torch.ones(36), atol=1e-5)
    assert torch.allclose(balanced.sum(0), torch.full((models,), 36 / models), atol=0.01)


def test_balance_is_a_scaling_of_rows_and_columns():
    probs = torch.rand(36, 4, dtype=torch.float64) + 0.01
    ratio = (balance(probs / probs.sum(1, keepdim=True)) / probs).log()  # log ratio = row term + column term: rank one
    centred = ratio - ratio.mean(0) - ratio.mean(1, keepdim=True) + ratio.mean()
    assert centred.abs().max() < 1e-9


def test_balance_refuses_what_is_no_probability():
    with pytest.raises(ValueError):
        balance(torch.tensor([[1.0, float("nan")]]))


def test_assignment_draws_by_its_probabilities_and_averages():
    a = Assignment(3, 2)
    probs = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.25, 0.75]], dtype=torch.float64)
    configs, models = a.draw(probs, 30_000, seed=1)
    assert np.abs(np.bincount(configs) / 30_000 - 1 / 3).max() < 0.02
    assert (models[configs == 0] == 0).all() and (models[configs == 1] == 1).all()
    assert abs(models[configs == 2].mean() - 0.75) < 0.02
    a.update([0, 0, 2], [1, 1, 0], [0.5, 0.25, 0.0])
    assert a.W[0, 1].item() == pytest.approx(0.9 * (0.9 * 1 + 0.1 * 0.5) + 0.1 * 0.25)
    assert a.W[2, 0].item() == pytest.approx(0.9) and a.W[1, 0] == 1 and a.counts.sum() == 3
    assert a.probabilities(0, balanced=False)[0, 0].item() == pytest.approx(
        1 / (1 + np.exp(a.W[0, 1].item() - 1)))  # inverse temperature 1 at the start


def brute_tau(x, y):
    pairs = list(itertools.combinations(range(len(x)), 2))
    concordant = sum((x[i] - x[j]) * (y[i] - y[j]) > 0 for i, j in pairs)
    discordant = sum((x[i] - x[j]) * (y[i] - y[j]) < 0 for i, j in pairs)
    untied = [sum(v[i] != v[j] for i, j in pairs) for v in (x, y)]
    return (concordant - discordant) / (untied[0] * untied[1]) ** 0.5


def test_tau_against_a_count_of_pairs():
    rng = random.Random(0)
    for n in (2, 3, 10, 36):
        x, y = ([rng.randrange(1 + n // 2) for _ in range(n)] for _ in range(2))
        x[0], y[0] = -1, -2
        assert kendall_tau(x, y) == pytest.approx(brute_tau(x, y))
        within = [(i, j) for i, j in itertools.combinations(range(n), 2) if i % 3 == j % 3]
        total = sum(np.sign((x[i] - x[j]) * (y[i] - y[j])) for i, j in within)
        untied = [sum(v[i] != v[j] for i, j in within) for v in (x, y)]
        again = report.tau_within(x, y, [i % 3 for i in range(n)])
        assert again is None if 0 in untied else again == pytest.approx(total / (untied[0] * untied[1]) ** 0.5)
    assert kendall_tau([1, 1], [1, 2]) is None


def test_published_truth_and_its_ranking_by_cost():
    truth = load_json(common.PUBLISHED)["results"]
    assert [tuple(r["config"]) for r in truth] == pooling_configs()
    costs = [count_macs(r["config"]) for r in truth]
    assert kendall_tau(costs, [r["test_acc"] for r in truth]) == pytest.approx(0.50, abs=5e-3)


def test_regret_pareto_and_budgets_by_hand():
    found = [(10, 0.5), (20, 0.4), (30, 0.7), (40, 0.6)]
    results = [{"config": [i], "macs": macs, "val_acc": accuracy} for i, (macs, accuracy) in enumerate(found)]
    truth = {(0,): 0.50, (1,): 0.58, (2,): 0.60, (3,): 0.65}
    assert [r["config"] for r in pareto(results, "val_acc")] == [[0], [2]]
    report = rank_report(results, truth, "x")
    assert report["regret"] == pytest.approx(0.05)  # chose 2, best 3
    assert report["mean_regret"] == pytest.approx((0 + 0.08 + 0 + 0.05) / 4)  # within 10, 20, 30, 40
    assert rank_report(results, truth, "x", max_macs=25)["regret"] == pytest.approx(0.08)
    assert report["kendall_tau_macs"] == 1.0 and rank_report(results, {(0,): 1.0}, "x") is None


@pytest.mark.parametrize("text, value", [("60M", 60e6), ("0.06G", 60e6), ("1234", 1234), ("2.5k", 2500)])
def test_macs_are_read(text, value):
    assert parse_macs(text) == pytest.approx(value)


# ---- data and steps --------------------------------------------------------------------------------------------------

def test_every_prefix_of_the_shuffle_is_balanced_and_halves_are_stratified():
    labels = torch.tensor([0] * 50 + [1] * 31 + [2] * 19)
    order = balanced_order(labels)
    assert sorted(order.tolist()) == list(range(100))
    for n in range(1, 101):
        share = torch.bincount(labels[order[:n]], minlength=3) - n * torch.tensor([0.50, 0.31, 0.19])
        assert share.abs().max() <= 1.5
    split = Split(torch.zeros(100, 1, 1, 3), torch.arange(100), labels)
    one, two = halves(split, seed=3)
    assert sorted(one.index.tolist() + two.index.tolist()) == list(range(100))
    assert (torch.bincount(one.labels) - torch.bincount(two.labels)).abs().max() <= 1
    assert halves(split, seed=4)[0].index.tolist() != one.index.tolist()


def test_crop_and_flip_against_numpy():
    images = torch.randint(0, 256, (20, 32, 32, 3), dtype=torch.uint8)
    top, left, flip = torch.randint(0, 9, (20,)), torch.randint(0, 9, (20,)), torch.rand(20) < 0.5
    for got, image, y, x, f in zip(crop_and_flip(images, top, left, flip, 4), images.numpy(), top, left, flip):
        cut = np.pad(image, ((4, 4), (4, 4), (0, 0)))[y:y + 32, x:x + 32]
        assert np.array_equal(got.numpy(), cut[:, ::-1] if f else cut)


def test_an_epoch_can_be_entered_anywhere_and_shared_out():
    data = made_up(50)
    whole = list(batches(data.train, 8, CPU, seed=5, augment=True))
    later = list(batches(data.train, 8, CPU, seed=5, augment=True, start=4))
    assert len(whole) == 6 and whole[0][0].is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(whole[4:], later))
    parts = [list(batches(data.train, 8, CPU, seed=5, augment=True, shard=(r, 2))) for r in range(2)]
    for step, (x, y) in enumerate(whole):
        assert torch.equal(torch.cat([part[step][0] for part in parts]), x)
        assert torch.equal(torch.cat([part[step][1] for part in parts]), y)
    assert sum(len(y) for _, y in batches(data.train, 8, CPU)) == 50  # without a seed: every image once


def test_a_step_is_plain_sgd():
    torch.manual_seed(0)
    net, x, y = ResNet20(classes=4, layers=4), torch.randn(8, 3, 32, 32), torch.arange(8) % 4
    twin = ResNet20(classes=4, layers=4)
    twin.load_state_dict(net.state_dict())
    learner = Learner(net, CPU, momentum=0.9, weight_decay=0.01)
    velocity = [torch.zeros_like(p) for p in twin.parameters()]
    for lr in (0.1, 0.05):
        loss = F.cross_entropy(twin(x, (2, 2)), y)
        grads = torch.autograd.grad(loss, list(twin.parameters()))
        with torch.no_grad():
            for p, g, v in zip(twin.parameters(), grads, velocity):
                v.mul_(0.9).add_(g + 0.01 * p)
                p.sub_(lr * v)
        assert learner.train(x, y, (2, 2), lr)[0].item() == pytest.approx(loss.item(), rel=1e-4)
    for p, q in zip(net.parameters(), twin.parameters()):
        assert torch.allclose(p, q, atol=1e-5)


def test_a_learner_continues_from_its_state():
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8) % 4
    one, two = (Learner(ResNet20(classes=4, layers=4), CPU) for _ in range(2))
    one.train(x, y, (2, 2), 0.1)
    buffer = Path("state.pt")
    torch.save(one.state_dict(), buffer)
    two.load_state_dict(torch.load(buffer, weights_only=True))
    assert one.train(x, y, (1, 3), 0.1)[0] == two.train(x, y, (1, 3), 0.1)[0]
    assert all(torch.equal(p, q) for p, q in zip(one.model.parameters(), two.model.parameters()))


def test_an_extracted_network_answers_one_image_as_a_batch():
    data = made_up(256)
    net = ResNet20(classes=4, norm="shared")
    single = extract_network(net.state_dict(), [2, 5, 3], batches(data.train, 64, CPU, seed=1), classes=4)
    x, _ = next(batches(data.train, 256, CPU))
    with torch.no_grad():
        batch, alone = single(x), torch.cat([single(image[None]) for image in x])
        assert torch.equal(batch.argmax(1), alone.argmax(1)) and torch.allclose(batch, alone, atol=1e-4)
        close = torch.nn.functional.cosine_similarity(batch, net(x, (2, 5, 3)), dim=1)
    assert close.mean() > 0.9  # and much as the SuperNet does with the statistics of a batch
    assert sum(p.numel() for p in single.parameters()) == count_params(classes=4)


def test_pools_explore_then_exploit_and_drop_the_worst():
    pools = Pools([count_macs(c) for c in pooling_configs()], 6, 2)
    costs = [[count_macs(pooling_configs()[i]) for i in members] for members in pools.classes]
    assert all(max(a) <= min(b) for a, b in zip(costs, costs[1:])) and sum(map(len, costs)) == 36
    assert len(set(pools.draw(2000, 0.0, 1))) == 36
    first = pools.classes[0]
    pools.update(first[:3], [1.0, 3.0, 2.0])
    assert sorted(pools.members[0]) == sorted([first[0], first[2]])  # the worst left
    pools.update([first[0]], [2.0])
    assert pools.score[first[0]] == pytest.approx(-1.1)
    drawn = np.array(pools.draw(2000, 1.0, 1))
    assert (drawn == first[0]).mean() > 0.97  # temperature 0.01, one draw in a hundred explores


def test_no_balance_lets_shares_drift():
    a = Assignment(36, 4)
    a.W[:, 0] += 0.2
    assert a.probabilities(1.0, balanced=False).mean(0)[0] > 0.99
    assert a.probabilities(1.0).mean(0)[0].item() == pytest.approx(0.25, abs=1e-3)


def test_graphs_run_once_then_capture_then_replay(monkeypatch):
    """Without a GPU: the order of things, on stand-ins for CUDA's streams and graphs."""
    calls, replays = [], []

    class Graph:
        def replay(self):
            replays.append(self)

    class Stream:
        def wait_stream(self, other):
            pass
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    step = common.graphed(lambda x, y, key: calls.append((x, key)) or x, torch.device("cuda"))
    inputs, y = [torch.full((2,), float(i)) for i in range(4)], torch.zeros(2)
    assert step(inputs[0], y, "a") is inputs[0] and not replays  # eagerly, on the caller's own tensors
    out = step(inputs[1], y, "a")
    still = calls[1][0]
    assert still is not inputs[1] and torch.equal(still, inputs[1]) and len(replays) == 1 and out is still
    step(inputs[2], y, "a")
    assert len(calls) == 2 and len(replays) == 2 and torch.equal(still, inputs[2])  # copied in, replayed
    step(inputs[3], y, "b")
    assert calls[2] == (inputs[3], "b") and len(replays) == 2  # another key starts over
    assert common.graphed(step, CPU) is step


def test_evaluate_counts_every_image():
    data = made_up(50)
    class Parrot(torch.nn.Module):
        def forward(self, x, config):
            return F.one_hot(x.new_zeros(len(x), dtype=torch.int64), 4).float()
    assert evaluate(Parrot(), data.train, None, CPU, batch_size=16) == pytest.approx(13 / 50)


# ---- loaders ---------------------------------------------------------------------------------------------------------

def picture(path, mode="RGB", size=(40, 30), seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).convert(mode).save(path, **options)


def folder(root, classes=("cat", "dog"), n=4, test="test"):
    for part, count in (("train", n), (test, 2)):
        for c, i in itertools.product(classes, range(count)):
            picture(root / part / c / f"{i}.png", seed=hash((part, c, i)) % 1000)
    return root


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_in_its_own_layout(name, tmp_path, monkeypatch):
    kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    base, rng, stored = tmp_path / kind.base_folder, np.random.default_rng(0), {}
    base.mkdir()
    labels = "labels" if name == "cifar10" else "fine_labels"
    for file, _ in kind.train_list + kind.test_list:
        stored[file] = rng.integers(0, 256, (20, 3072), np.uint8)
        (base / file).write_bytes(pickle.dumps({"data": stored[file], labels: [i % 10 for i in range(20)]}))
    (base / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: [f"c{i}" for i in range(10)]}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *a: True)  # their checksums differ
    data = load_dataset(name, tmp_path)
    assert len(data.train) == 20 * len(kind.train_list) and len(data.test) == 20 and data.classes[3] == "c3"
    everything = np.concatenate([stored[file] for file, _ in kind.train_list]).reshape(-1, 3, 32, 32)
    i = data.train.index[5].item()
    assert np.array_equal(data.train.pixels[i].numpy(), everything[i].transpose(1, 2, 0))
    assert data.train.labels[5] == i % 10
    assert np.allclose(data.train.mean, everything.mean((0, 2, 3)))
    assert np.allclose(data.test.std, everything.std((0, 2, 3)))


def test_food101_is_decoded_once(tmp_path, monkeypatch):
    root = tmp_path / "food-101"
    meta = {"train": {}, "test": {}}
    for c, (part, ids) in itertools.product(("apple_pie", "waffles"), (("train", range(5)), ("test", range(5, 7)))):
        meta[part][c] = [f"{c}/{i}" for i in ids]
        for i in ids:
            picture(root / "images" / c / f"{i}.jpg", size=(200, 150), seed=i)
    (root / "meta").mkdir()
    for part in meta:
        (root / "meta" / f"{part}.json").write_text(json.dumps(meta[part]))
    first = load_dataset("food101", tmp_path, workers=2)
    assert first.train.pixels.shape == (14, 128, 128, 3) and len(first.train) == 10 and len(first.test) == 4
    monkeypatch.setattr(common, "read_image", None)  # a second start reads no JPEG
    again = load_dataset("food101", tmp_path)
    assert np.array_equal(again.train.pixels, first.train.pixels) and again.test.mean == first.train.mean
    monkeypatch.undo()
    picture(root / "images" / "waffles" / "0.jpg", size=(300, 150), seed=9)
    changed = load_dataset("food101", tmp_path, workers=0)
    assert not np.array_equal(changed.train.pixels, first.train.pixels)
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1  # the stale one is gone


def test_images_of_every_kind(tmp_path):
    root = folder(tmp_path / "pets", test="val")
    target = root / "train" / "cat"
    for mode, name in (("L", "grey.png"), ("P", "palette.gif"), ("RGBA", "alpha.png"), ("CMYK", "print.jpg")):
        picture(target / name, mode)
    wide = np.zeros((20, 40, 3), np.uint8)
    wide[:, :20] = 255  # left half white; the tag says: turn it by 90 degrees clockwise, so white goes to the top
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(wide).save(target / "turned.jpg", exif=turned, quality=95)
    data = load_dataset(str(root), tmp_path, workers=0)
    assert len(data.train) == 13 and data.classes == ["cat", "dog"] and data.name == "pets"
    upright = common.read_image(target / "turned.jpg", 32)
    assert upright[:12].mean() > 230 and upright[-12:].mean() < 25
    few = load_dataset(str(root), tmp_path, limit_train=4, limit_test=2, workers=0)
    assert len(few.train) == 4 and torch.bincount(few.train.labels).tolist() in ([3, 1], [2, 2])


def test_bad_images_are_all_listed(tmp_path):
    root = folder(tmp_path / "pets")
    (root / "train" / "cat" / "notes.txt").write_text("no image")
    whole = tmp_path / "whole.jpg"
    picture(whole, size=(100, 100))
    (root / "test" / "dog" / "cut.jpg").write_bytes(whole.read_bytes()[:1500])
    with pytest.raises(UserError, match=r"2 files.*notes\.txt.*cut\.jpg"):
        load_dataset(str(root), tmp_path, workers=0)
    assert not list((tmp_path / "cache").glob("*"))


def test_synthetic_is_fixed_and_balanced():
    one, two = common.synthetic_images(200, 1), common.synthetic_images(200, 1)
    assert np.array_equal(one[0], two[0]) and np.bincount(one[1]).tolist() == [20] * 10
    assert one[0].shape == (200, 32, 32, 3) and one[0].dtype == np.uint8
    assert not np.array_equal(one[0], common.synthetic_images(200, 2)[0])


# ---- the scripts, as a user runs them --------------------------------------------------------------------------------

def test_the_four_stages():
    out, _ = finish(start("train_single.py", *TINY, "--config", "all"))
    assert "[2,2]" in out and "wrote runs/synthetic/single.json" in out
    single = load_json("runs/synthetic/single.json", "single", "synthetic")
    assert {tuple(r["config"]) for r in single["results"]} == set(pooling_configs(4, 2))
    assert single["results"][0] == single["best"] and single["n_test"] == 40
    finish(start("train_single.py", *TINY, "--config", "2,2", "--seed", "1"))
    twice = next(r for r in load_json("runs/synthetic/single.json")["results"] if r["config"] == [2, 2])
    assert [r["seed"] for r in twice["runs"]] == [0, 1] and twice["std"] is not None

    out, _ = finish(start("search_supernet.py", *TINY, "--pools", "3", "--test"))
    naive = load_json("runs/synthetic/supernet.json", "supernet")
    assert len(naive["results"]) == 3 and naive["rank"]["against"] == "single.json" and naive["rank"]["n"] == 3
    assert [b["macs"] for b in naive["budgets"]] == sorted(count_macs(c) for c in pooling_configs(4, 2))
    assert (naive["n_train"], naive["n_val"]) == (48, 48) and "Kendall" in out

    out, _ = finish(start("search_mixture.py", *TINY, "--models", "2"))
    mixture = load_json("runs/synthetic/mixture.json", "mixture")
    assert np.allclose(np.sum(mixture["probabilities"], 0), 3 / 2, atol=0.01) and np.sum(mixture["trained"]) == 2 * 3
    assert "owned" in out and len(mixture["history"]) == 2

    out, _ = finish(start("retrain.py", *TINY, "--runs", "2"))
    final = load_json("runs/synthetic/retrain.json", "retrain")
    assert {"default"} <= {k for r in final["results"] for k in r["chosen_by"]} and "gain" in out
    assert all(len(r["runs"]) == 2 for r in final["results"])
    alone = next(r for r in single["results"] if r["config"] == [2, 2])
    again = next(r for r in final["results"] if r["config"] == [2, 2])
    assert timeless(again["runs"][0]) == timeless(alone["runs"][0])  # the same network, in either stage


def test_prioritised_sampling_and_shared_start(monkeypatch, capsys):
    code, out, err = call(monkeypatch, capsys, "search_supernet.py", *TINY, "--sampler", "prioritized", "--pools", "2",
                          "--pool-size", "1", "--max-macs", "20M")
    assert code == 0, err
    supernet = load_json("runs/synthetic/supernet.json")
    assert supernet["best"]["macs"] <= 20e6 and len(supernet["results"]) == 3 and supernet["image_passes"] == 2 * 48 * 3
    code, out, err = call(monkeypatch, capsys, "search_mixture.py", *TINY, "--models", "2", "--shared-epochs", "1")
    mixture = load_json("runs/synthetic/mixture.json")
    assert code == 0 and np.sum(mixture["trained"]) == 3  # the second epoch's steps


def test_a_folder_of_images_end_to_end(tmp_path, monkeypatch, capsys):
    folder(tmp_path / "pets", n=16)
    words = ["--dataset", "pets", *TINY[2:6], "--batch-size", "8", "--epochs", "1", "--device", "cpu"]
    results = []
    for workers in (0, 2):
        shutil.rmtree("data", ignore_errors=True)
        code, _, err = call(monkeypatch, capsys, "search_mixture.py", *words, "--workers", workers,
                            "--out", f"w{workers}")
        assert code == 0, err
        results.append(timeless(load_json(f"w{workers}/mixture.json")))
    assert results[0] == results[1] and results[0]["dataset"] == "pets" and results[0]["num_classes"] == 2


def test_two_ranks_give_the_same_baseline_as_one_process():
    finish(start("train_single.py", *TINY, "--config", "all", "--out", "one"))
    finish(start("train_single.py", *TINY, "--config", "all", "--out", "two",
                 launcher=["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]))
    one, two = load_json("one/single.json"), load_json("two/single.json")
    assert timeless(one["results"]) == timeless(two["results"]) and timeless(one["history"]) == timeless(two["history"])
    assert not list(Path("two").glob("*.pt"))


@pytest.mark.parametrize("script", ["search_supernet.py", "search_mixture.py"])
def test_searches_run_data_parallel(script):
    words = [*TINY, "--models", "2"] if "mixture" in script else [*TINY, "--pools", "3"]
    finish(start(script, *words, launcher=["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]))
    data = load_json(f"runs/synthetic/{script[7:-3]}.json")
    assert data["env"]["ranks"] == 2 and len(data["results"]) == 3 and len(data["history"]) == 2


# ---- killed, stopped, misled -----------------------------------------------------------------------------------------

LONG = {"train_single.py": ["--config", "all", "--epochs", "4"],
        "search_supernet.py": ["--pools", "3", "--epochs", "12"],
        "search_mixture.py": ["--models", "2", "--epochs", "8"]}


@pytest.mark.parametrize("script, kills", [("train_single.py", 7), ("search_supernet.py", 6), ("search_mixture.py", 7)])
def test_killed_at_any_moment_it_ends_the_same(script, kills):
    words, stage = [*TINY, *LONG[script], "--limit-train", "160"], script[:-3].split("_")[1]
    began = time.monotonic()
    finish(start(script, *words, "--out", "whole"))
    length, rng = time.monotonic() - began, random.Random(script)
    for _ in range(kills):
        process = start(script, *words, "--out", "killed")
        time.sleep(rng.uniform(0.5 * length, 1.0 * length))
        process.kill()
        process.communicate()
        for path in Path("killed").glob("*.json"):
            load_json(path)
        for path in Path("killed").glob("*.pt"):
            common.read_checkpoint(path)
    finish(start(script, *words, "--out", "killed"))
    assert timeless(load_json(f"killed/{stage}.json")) == timeless(load_json(f"whole/{stage}.json"))
    assert not list(Path("killed").glob("*.tmp"))


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_checkpoint_inside_the_epoch(number, code):
    words = [*TINY, "--models", "2", "--epochs", "3", "--limit-train", "640"]
    finish(start("search_mixture.py", *words, "--out", "whole"))
    process = start("search_mixture.py", *words, "--out", "stopped")
    process.stdout.readline()  # the first epoch is over
    process.send_signal(number)
    out, _ = finish(process, code)
    assert "goes on from there" in out
    out, _ = finish(start("search_mixture.py", *words, "--out", "stopped"))
    assert "going on" in out
    assert timeless(load_json("stopped/mixture.json")) == timeless(load_json("whole/mixture.json"))


def test_time_limit_and_other_settings(monkeypatch, capsys):
    words = [*TINY, "--models", "2", "--time-limit"]
    code, out, _ = call(monkeypatch, capsys, "search_mixture.py", *words, "0.001")
    assert code == 3 and "goes on" in out
    before = files("runs")
    code, _, err = call(monkeypatch, capsys, "search_mixture.py", *TINY, "--models", "3", "--lr", "0.2")
    assert code == 2 and "--models (2 there, 3 here)" in err and "--lr" in err and "--fresh" in err
    assert files("runs") == before
    code, out, _ = call(monkeypatch, capsys, "search_mixture.py", *words, "1e9")
    assert code == 0 and "going on with mixture after epoch 0, step 1" in out
    code, out, _ = call(monkeypatch, capsys, "search_mixture.py", *TINY, "--models", "3", "--lr", "0.2", "--fresh")
    assert code == 0 and "going on" not in out and Path("runs/synthetic/mixture.json.old").exists()


def test_a_damaged_checkpoint_is_left_out_for_the_one_before(monkeypatch, capsys):
    words = [*TINY, "--pools", "3", "--epochs", "3"]
    call(monkeypatch, capsys, "search_supernet.py", *words, "--out", "whole")
    call(monkeypatch, capsys, "search_supernet.py", *words)
    damaged, content = Path("runs/synthetic/supernet.pt"), Path("runs/synthetic/supernet.pt").read_bytes()
    for broken in (content[:len(content) // 2], b"", content[:9000] + bytes([content[9000] ^ 1]) + content[9001:]):
        damaged.write_bytes(broken)  # the one before it is whole: the search's last step done again
        code, out, err = call(monkeypatch, capsys, "search_supernet.py", *words)
        assert code == 0 and "supernet.pt is damaged" in err and "going on" in out
        assert timeless(load_json("runs/synthetic/supernet.json")) == timeless(load_json("whole/supernet.json"))


def test_two_at_once_and_a_lock_left_behind():
    first = start("search_mixture.py", *TINY, "--models", "2", "--epochs", "500")
    first.stdout.readline()
    _, err = finish(start("search_supernet.py", *TINY, "--pools", "3"), 2)
    assert "in use" in err and len(err.strip().splitlines()) == 1
    first.kill()
    first.communicate()
    finish(start("search_supernet.py", *TINY, "--pools", "3"))


def test_divergence_stops_and_keeps_the_checkpoint(monkeypatch, capsys):
    code, _, err = call(monkeypatch, capsys, "search_supernet.py", *TINY, "--pools", "3", "--lr", "1e38")
    assert code == 2 and "not finite in epoch 1" in err and "--lr" in err
    assert not Path("runs/synthetic/supernet.json").exists()


def test_json_is_strict_and_whole():
    with pytest.raises(ValueError):
        save_json("x.json", {"results": [float("nan")]})
    save_json("x.json", {"results": [{"config": [1]}], "a": 1})
    before = Path("x.json").read_text()
    with pytest.raises(ValueError):
        save_json("x.json", {"results": float("inf")})
    assert Path("x.json").read_text() == before and os.listdir() == ["x.json"]


BAD = {
    "unknown data set": ("search_mixture.py --dataset nothing", "--dataset nothing"),
    "configuration too short": ("train_single.py --dataset synthetic --config 4,3", "4,3"),
    "configuration of a wrong sum": ("train_single.py --dataset synthetic --config 4,3,4", "11 layers"),
    "configuration with a zero": ("train_single.py --dataset synthetic --config 0,5,5", "at least 1"),
    "configuration with a minus": ("train_single.py --dataset synthetic --config=-1,6,5", "at least 1"),
    "configuration of words": ("train_single.py --dataset synthetic --config four,3,3", "four,3,3"),
    "one configuration of two wrong": ("train_single.py --dataset synthetic --config 4,3,3 9", "configuration 9"),
    "too many scales": ("search_mixture.py --dataset synthetic --scales 7", "--scales"),
    "more scales than layers": ("search_mixture.py --dataset synthetic --layers 4 --scales 5", "--scales"),
    "zero epochs": ("search_mixture.py --epochs 0", "--epochs"),
    "negative epochs": ("search_mixture.py --epochs -3", "--epochs"),
    "epochs of words": ("search_mixture.py --epochs ten", "--epochs"),
    "zero batch": ("search_supernet.py --batch-size 0", "--batch-size"),
    "zero models": ("search_mixture.py --models 0", "--models"),
    "zero limit": ("train_single.py --limit-train 0", "--limit-train"),
    "zero test limit": ("train_single.py --limit-test -1", "--limit-test"),
    "zero learning rate": ("train_single.py --lr 0", "--lr"),
    "learning rate nan": ("train_single.py --lr nan", "--lr"),
    "negative decay": ("train_single.py --weight-decay -1", "--weight-decay"),
    "no runs": ("retrain.py --runs 0", "--runs"),
    "batch larger than the data": ("search_mixture.py --dataset synthetic --limit-train 40", "--batch-size"),
    "unknown option": ("search_mixture.py --model 4", "--model"),
    "unknown sampler": ("search_supernet.py --sampler best", "--sampler"),
    "image size": ("search_mixture.py --dataset synthetic --image-size 48", "--image-size"),
    "image size of the data set": ("search_mixture.py --dataset synthetic --image-size 64", "--image-size"),
    "unknown device": ("search_mixture.py --dataset synthetic --device gpu", "--device"),
    "absent device": ("search_mixture.py --dataset synthetic --device cuda:7", "--device"),
    "precision of another device": ("search_mixture.py --dataset synthetic --device cpu --amp fp16", "--amp"),
    "unknown precision": ("search_mixture.py --amp int8", "--amp"),
    "unreadable budget": ("search_mixture.py --max-macs lots", "--max-macs"),
    "zero budget": ("search_mixture.py --max-macs 0", "--max-macs"),
    "budget below everything": ("search_mixture.py --dataset synthetic --max-macs 1M", "--max-macs"),
    "more pools than configurations": ("search_supernet.py --dataset synthetic --pools 37", "--pools"),
    "no search to retrain": ("retrain.py --dataset synthetic", "search_mixture.py --dataset synthetic"),
    "no truth": ("search_mixture.py --dataset synthetic --truth absent.json", "absent.json"),
    "no train folder": ("search_mixture.py --dataset empty", "train/"),
    "one class": ("search_mixture.py --dataset one", "two classes"),
    "an empty class": ("search_mixture.py --dataset hollow", "dog"),
    "other classes in test": ("search_mixture.py --dataset odd", "bird"),
    "a file that is no image": ("search_mixture.py --dataset text", "notes.txt"),
    "output is a file": ("search_mixture.py --dataset synthetic --out occupied", "occupied"),
    "output below a file": ("search_mixture.py --dataset synthetic --out occupied/run", "occupied"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_touches_nothing(case, monkeypatch, capsys):
    for name in ("pets", "one", "hollow", "odd", "text"):
        folder(Path(name), classes=("cat",) if name == "one" else ("cat", "dog"), n=1)
    Path("empty").mkdir()
    for path in Path("hollow/train/dog").iterdir():
        path.unlink()
    Path("odd/test/dog").rename("odd/test/bird")
    Path("text/train/cat/notes.txt").write_text("x")
    Path("occupied").write_text("mine")
    command, names = BAD[case]
    before = files(".")
    code, _, err = call(monkeypatch, capsys, *command.split())
    assert code == 2 and len(err.splitlines()) == 1 and names in err and "Traceback" not in err, err
    assert {k: v for k, v in files(".").items() if not Path(k).is_dir() and "cache" not in k} == {
        k: v for k, v in before.items() if not Path(k).is_dir()}


GOOD = {"schema": 1, "stage": "mixture", "dataset": "synthetic", "space": {"layers": 10, "scales": 3, "size": 36},
        "seconds": 1.0, "results": [{"config": [4, 3, 3], "macs": 1, "val_acc": 0.5}]}


@pytest.mark.parametrize("change", [
    "", "{", "[]", {"stage": "single"}, {"dataset": "cifar10"}, {"schema": 2}, {"results": []},
    {"space": {"layers": 4, "scales": 2, "size": 3}}, {"results": [{"config": [4, 3, 3]}]}])
def test_an_earlier_stage_that_does_not_fit(change, monkeypatch, capsys):
    Path("runs/synthetic").mkdir(parents=True)
    text = change if isinstance(change, str) else json.dumps({**GOOD, **change})
    Path("runs/synthetic/mixture.json").write_text(text)
    before = files("runs")
    code, _, err = call(monkeypatch, capsys, "retrain.py", "--dataset", "synthetic")
    assert code == 2 and "mixture.json" in err and len(err.splitlines()) == 1 and files("runs") == before


@pytest.mark.parametrize("name", ["cifar10", "food101"])
def test_missing_data_without_a_network(name, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise OSError("no network")
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    code, _, err = call(monkeypatch, capsys, "search_mixture.py", "--dataset", name)
    assert code == 2 and "fetch http" in err.splitlines()[-1] and "--data-dir" in err and not os.listdir()


def test_a_full_disk_is_one_line_and_loses_nothing(monkeypatch, capsys):
    call(monkeypatch, capsys, "search_mixture.py", *TINY, "--models", "2", "--time-limit", "0.001")
    before = {k: v for k, v in files("runs").items() if k.endswith(".pt")}
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    code, _, err = call(monkeypatch, capsys, "search_mixture.py", *TINY, "--models", "2")
    assert code == 2 and "make room" in err and {k: v for k, v in files("runs").items() if k.endswith(".pt")} == before
    monkeypatch.setattr(os, "fsync", real)
    code, out, _ = call(monkeypatch, capsys, "search_mixture.py", *TINY, "--models", "2")
    assert code == 0 and "going on" in out


# ---- the report and the README ---------------------------------------------------------------------------------------

def test_the_report_needs_matplotlib_for_its_pictures_only(tmp_path, monkeypatch, capsys):
    for file in (HERE / "results" / "synthetic").glob("*.json"):
        shutil.copy(file, tmp_path)
    if importlib.util.find_spec("matplotlib"):
        code, out, _ = call(monkeypatch, capsys, "results.report", tmp_path, "--truth", common.PUBLISHED)
        assert code == 0 and {p.name for p in tmp_path.glob("*.png")} == {"pooling.png", "searches.png"}
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were missing
    code, out, err = call(monkeypatch, capsys, "results.report", tmp_path)
    assert code == 2 and err.count("\n") == 1 and "pip install matplotlib" in err and "| naive SuperNet |" in out
    code, _, err = call(monkeypatch, capsys, "results.report", tmp_path / "none")
    assert code == 2 and err.count("\n") == 1 and "single.json" in err


@pytest.mark.parametrize("name", ["synthetic", "cifar10-jpeg"])
def test_the_readmes_results_are_the_files(name):
    text, folder = (HERE / "README.md").read_text(), HERE / "results" / name
    single = load_json(folder / "single.json", "single", name)
    truths = {"own": {tuple(r["config"]): r["test_acc"] for r in single["results"]}}
    assert set(truths["own"]) == set(pooling_configs())
    if name != "synthetic":
        truths["published"] = {tuple(r["config"]): r["test_acc"] for r in load_json(common.PUBLISHED)["results"]}
    searches = [load_json(path) for path in sorted(folder.rglob("*.json"), reverse=True)]
    searches = [search for search in searches if search["stage"] in ("supernet", "mixture")]
    lines = report.table(searches, truths)
    assert len(lines) > 3 and all(line in text for line in lines)
    for search in searches:  # the figures of a line against pairs counted here
        true = [truths["own"][tuple(r["config"])] for r in search["results"]]
        tau, best = brute_tau([r["val_acc"] for r in search["results"]], true), true[0]
        assert any(f"[{','.join(map(str, search['best']['config']))}]" in line and f" {tau or 0:.2f}" in line and
                   f" {1 + sum(v > best for v in true)} ({100 * (max(true) - best):.2f})" in line for line in lines)
    for entry in (single["results"][0], single["default"]):
        assert re.search(rf"\[{','.join(map(str, entry['config']))}\] .*{entry['test_acc']:.4f}", text)
    for path in folder.rglob("*unbalanced.json"):
        shares = sorted(np.mean(load_json(path)["probabilities"], 0), reverse=True)
        assert ", ".join(f"{share:.2f}" for share in shares) in " ".join(text.split())
    for path in folder.glob("retrain.json"):
        for entry in load_json(path)["results"]:
            config, figures = ",".join(map(str, entry["config"])), f"{entry['test_acc']:.4f} +{entry['std']:.4f}"
            assert re.search(rf"\[{config}\] .* {figures} +{len(entry['runs'])} ", text)
