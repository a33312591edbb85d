"""Tests: the mathematics against independent definitions, every loader, and the scripts as a user runs them.

    python -m pytest -q test_smoke.py

A script runs in a fork of this process, which has imported torch already: a tenth of a second instead of three. So
these tests want Linux or a Mac, and every test that forks stands before those that train in this process.
"""
import importlib
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import time
import timeit
from pathlib import Path
from statistics import NormalDist

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: a fork of many threads would hang
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asks for a GPU without starting CUDA, which no fork survives

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.datasets
from PIL import Image

import common
from common import (Learner, ResNet20, Split, balanced_order, count_macs, crop_and_flip, default_config, derive_seed,
                    evaluate, halves, kendall_tau, label_loss, load_dataset, normalise, pareto, pooling_configs,
                    read_image, save_json, scoring_batches, show, training_batches)
from results import report
from retrain import believe, chance_above, gaussian_process, propose, standardise
from search_mixture import Assignment, balance
from search_supernet import Pools, extract_network

HERE, CPU, FORK = Path(__file__).parent, torch.device("cpu"), multiprocessing.get_context("fork")
RESULTS, PUBLISHED = HERE / "results", "published_cifar10_resnet20.json"
SPACE = pooling_configs()
MACS = {config: count_macs(config) for config in SPACE}
TINY = ["--dataset", "synthetic", "--layers", "4", "--scales", "2", "--limit-train", "96", "--limit-test", "40",
        "--batch-size", "16", "--epochs", "2", "--amp", "off", "--device", "cpu"]  # [1,3], [2,2] and [3,1]
STAGES = {"single": ["train_single.py", *TINY, "--config", "all"],
          "supernet": ["search_supernet.py", *TINY, "--pools", "3"],
          "mixture": ["search_mixture.py", *TINY, "--models", "2"],
          "retrain": ["retrain.py", *TINY, "--trainings", "2", "--runs", "2"]}
WRITES = "os.fsync os.replace os.unlink"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ---- running scripts -------------------------------------------------------------------------------------------------

def as_a_user(script, words, printed, prepare, environment):
    for number, file in enumerate(printed, 1):
        os.dup2(file.fileno(), number)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w")
    os.environ.update(environment)
    for name in ("common", "train_single"):
        sys.modules.pop(name, None)  # they ask for their rank when they are imported
    importlib.import_module("common").SYNTHETIC = 160, 60  # drawing all of them would take most of the time
    if prepare:
        prepare()
    sys.argv = [str(HERE / script), *map(str, words)]
    runpy.run_path(sys.argv[0], run_name="__main__")


def start(script, *words, prepare=None, **environment):
    """Start a script: (process, files of what it prints). prepare() is called in the process, before the script."""
    printed = [tempfile.NamedTemporaryFile("w+") for _ in range(2)]  # standard output and standard error
    process = FORK.Process(target=as_a_user, args=(script, words, printed, prepare, environment))
    process.start()
    return process, printed


def finish(started, code=0):
    """Wait for a started script: (standard output, standard error), after checking its exit code (None: any)."""
    process, printed = started
    process.join(240)
    out, err = (Path(file.name).read_text() for file in printed)
    assert code in (None, process.exitcode) and "Traceback" not in err, (process.exitcode, out, err)
    return out, err


def run(*words, code=0, prepare=None):
    return finish(start(*words, prepare=prepare), code)


def refused(*words):
    """Run a script that must end with one line on standard error and exit code 2: that line."""
    _, err = run(*words, code=2)
    assert len(err.splitlines()) == 1, err
    return err


def run_two_ranks(*words, code=0, prepare=(None, None)):
    """Run a script as two processes. Where the first must end otherwise than well, the second is killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = [start(*words, prepare=prepare[rank], RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank),
                     LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for rank in range(2)]
    finish(started[0], code)
    if code:
        started[1][0].kill()
    finish(started[1], None if code else 0)


def failing(functions, error, first=1):
    """A `prepare`: calls of these functions, counted together, raise `error` from number `first` on; None: SIGKILL."""
    def prepare():
        calls = itertools.count(1)
        for module, name in [function.rsplit(".", 1) for function in functions.split()]:
            def replaced(*words, real=getattr(importlib.import_module(module), name), **options):
                if next(calls) < first:
                    return real(*words, **options)
                if error is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise error
            setattr(importlib.import_module(module), name, replaced)
    return prepare


def files(folder):
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def strict(path):
    """A JSON file, which must not hold NaN and the like."""
    return json.loads(Path(path).read_text(), parse_constant=lambda word: pytest.fail(f"{word} in {path}"))


def timeless(value):
    """JSON without what may differ between equal runs: seconds."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if "seconds" not in k}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def made_up(n=64, classes=4):
    """A Split of noise."""
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), np.uint8))
    return Split(pixels, torch.arange(n), torch.arange(n) % classes)


def made_up_search(out, **change):
    """What retrain.py needs: the JSON of a search, whose scores name [3,1] the best. Returns `out`."""
    Path(out).mkdir(parents=True, exist_ok=True)
    results = [{"config": [a, 4 - a], "macs": 10_000_000 * 2 ** (a - 1), "val_acc": a / 10} for a in (3, 2, 1)]
    save_json(Path(out, "earlier.json"), {
        "schema": 1, "stage": "mixture", "dataset": "synthetic", "space": {"layers": 4, "scales": 2, "size": 3},
        "args": {}, "seconds": 1.0, "results": results, **change})
    return out


# ---- space, network, cost --------------------------------------------------------------------------------------------

def test_the_space_is_every_composition_and_multiply_adds_are_those_of_a_closed_form():
    for layers, scales in ((10, 3), (4, 2), (7, 1), (6, 6), (9, 4)):
        brute = [c for c in itertools.product(range(1, layers + 1), repeat=scales) if sum(c) == layers]
        assert pooling_configs(layers, scales) == brute
    assert (len(SPACE), SPACE[0], SPACE[-1], default_config()) == (36, (1, 1, 8), (8, 1, 1), (4, 3, 3))
    earlier = strict(RESULTS / "cifar10-jpeg/more/m4-epochs100.json")["results"]  # its macs: a closed form
    assert {tuple(r["config"]): r["macs"] for r in earlier} == MACS
    assert count_macs((4, 3, 3), classes=101, stem=4) == 45_144_384


def test_the_network_pools_where_the_configuration_says():
    net, x = ResNet20(norm="shared"), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for config in SPACE:
            layers, y = iter(net.layers), x
            for part, count in enumerate(config):
                y = F.max_pool2d(y, 2) if part else y
                for _ in range(count):
                    y = next(layers)(y)
            assert torch.equal(net(x, config), net.head(y.mean((2, 3)))), config
    assert not list(net.buffers()) and not torch.allclose(net.eval()(x)[:1], net(x[:1]), atol=1e-3)  # the batch's norm


# ---- the mathematics of the searches and of what to train next -------------------------------------------------------

@pytest.mark.parametrize("models", [1, 2, 4, 8])
def test_balance_against_scaling_rows_and_columns_in_turn(models):
    spread, one = torch.rand(36, models), torch.eye(models)[torch.zeros(36, dtype=int)]
    for scores in (spread, 100 * spread, 100 * one, 1e4 * one):
        probs = torch.softmax(scores, 1)  # even, peaked, all on one model, and that without any doubt
        balanced = balance(probs)
        assert torch.allclose(balanced.sum(1), torch.ones(36), atol=1e-5)
        assert torch.allclose(balanced.sum(0), torch.full((models,), 36 / models), atol=0.01)
        if scores.max() <= 100:
            columns, matrix = np.ones(models), probs.numpy().astype(float)
            for _ in range(2000):
                rows = 1 / (matrix @ columns)
                columns = 36 / models / (rows @ matrix)
            assert np.abs(rows[:, None] * matrix * columns - balanced.numpy()).max() < 2e-3


def test_the_assignment_draws_by_its_probabilities_and_averages():
    a = Assignment(3, 2)
    probs = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.25, 0.75]], dtype=torch.float64)
    configs, models = a.draw(probs, 30_000, seed=1)
    assert np.abs(np.bincount(configs) / 30_000 - 1 / 3).max() < 0.02
    assert (models[configs == 0] == 0).all() and (models[configs == 1] == 1).all()
    assert abs(models[configs == 2].mean() - 0.75) < 0.02
    a.update([0, 0, 2], [1, 1, 0], [0.5, 0.25, 0.0])
    assert a.W.flatten().tolist() == pytest.approx([1, 0.9 * (0.9 * 1 + 0.1 * 0.5) + 0.1 * 0.25, 1, 1, 0.9, 1])
    probability = 1 / (1 + math.exp(100 * (a.W[0, 1].item() - 1)))  # inverse temperature 100 at the end
    assert a.probabilities(1.0, balanced=False)[0, 0].item() == pytest.approx(probability)


def test_pools_explore_then_exploit_and_drop_the_worst():
    pools = Pools(list(MACS.values()), 6, 2)
    costs = [[MACS[SPACE[i]] for i in members] for members in pools.classes]
    assert all(max(a) <= min(b) for a, b in zip(costs, costs[1:])) and sum(map(len, costs)) == 36
    assert len(set(pools.draw(2000, 0.0, 1))) == 36
    first = pools.classes[0]
    pools.update(first[:3], [1.0, 3.0, 2.0])
    assert sorted(pools.members[0]) == sorted([first[0], first[2]])  # the worst left
    pools.update([first[0]], [2.0])
    assert pools.score[first[0]] == pytest.approx(-1.1)
    drawn = np.array(pools.draw(2000, 1.0, 1))
    assert (drawn == first[0]).mean() > 0.97  # temperature 0.01, one draw in a hundred explores


def test_tau_against_a_count_of_pairs_and_pareto_by_hand():
    rng = random.Random(0)
    for n in (2, 3, 10, 36):
        x, y = ([rng.randrange(1 + n // 2) for _ in range(n)] for _ in range(2))
        x[0], y[0] = -1, -2
        pairs = list(itertools.combinations(range(n), 2))
        total = sum(np.sign((x[i] - x[j]) * (y[i] - y[j])) for i, j in pairs)
        untied = math.prod(sum(v[i] != v[j] for i, j in pairs) for v in (x, y))
        assert kendall_tau(x, y) == pytest.approx(total / untied ** 0.5)
    assert kendall_tau([1, 1], [1, 2]) is None
    found = [(10, 0.5), (20, 0.4), (30, 0.7), (40, 0.6), (10, 0.45), (50, 0.7)]
    results = [{"macs": macs, "val_acc": accuracy} for macs, accuracy in found]
    assert pareto(results, "val_acc") == [results[0], results[2]]


@pytest.mark.parametrize("known", [1, 2, 7, 20])
def test_the_gaussian_process_against_its_information_form(known):
    rng = np.random.default_rng(known)
    values, noise, positions = np.full(20, math.nan), rng.uniform(0.05, 1, 20), rng.uniform(1, 9, (20, 2))
    values[rng.permutation(20)[:known]] = 90 + 4 * rng.standard_normal(known)
    expected, features = rng.standard_normal(20), rng.standard_normal((20, 3))
    covariance = np.array([[100 + 0.25 * np.dot(features[i], features[j]) + 0.1 * (i == j) + math.exp(
        -((positions[i] - positions[j]) ** 2).sum() / (2 * 2.5 ** 2)) for j in range(20)] for i in range(20)])
    told = np.where(np.isnan(values), 0, noise ** -2)  # the information in each value, none where it is not known
    prior = expected + np.nanmean(values - expected)
    surprise = np.nan_to_num(values - prior)
    posterior = np.linalg.inv(np.linalg.inv(covariance) + np.diag(told))
    mean = prior + posterior @ (told * surprise)
    misfit = (told * surprise ** 2).sum() - (told * surprise) @ posterior @ (told * surprise)
    found = gaussian_process(expected, features, positions, values, noise, 2.5)
    np.testing.assert_allclose(found, [mean, np.sqrt((1 + misfit) / known * posterior.diagonal())], rtol=1e-5)
    chances = [NormalDist(-m, d).cdf(-90) for m, d in zip(*found)]  # the other way round
    np.testing.assert_allclose(chance_above(90, *found), chances, atol=1e-9)


@pytest.mark.parametrize("layers, scales", [(10, 3), (7, 4), (5, 1), (3, 3)])
def test_proposals_never_repeat_and_keep_to_the_budget(layers, scales):
    macs = {config: count_macs(config) for config in pooling_configs(layers, scales)}
    limits = math.inf, sorted(macs.values())[len(macs) // 2]
    for limit, scores in itertools.product(limits, ([{c: 0.1 for c in macs}], [{min(macs): 0.2}], [])):
        observed = {}
        while config := propose(macs, scores, observed, limit)[0]:
            assert config not in observed and macs[config] <= limit
            observed[config] = (len(observed) % 4 / 4, 1)
        assert len(observed) == sum(m <= limit for m in macs.values())


def test_it_starts_with_the_default_and_the_best_scored_of_the_most_expensive():
    scores, both = {config: config[0] / 10 for config in SPACE}, {(4, 3, 3): (0.9, 1), (7, 1, 2): (0.92, 3)}
    assert propose(MACS, [scores], {})[:2] == ((4, 3, 3), "default")
    assert propose(MACS, [scores], {(4, 3, 3): (0.9, 1)})[:2] == ((8, 1, 1), "best of its cost class")
    assert propose(MACS, [scores], {(4, 3, 3): (0.9, 1)}, max_macs=45e6)[1] == "proposed"  # the default is of the third
    assert list(standardise({"a": 1.0, "b": 3.0, "c": math.nan}, "abcd")) == [-1, 1, 0, 0]
    np.testing.assert_allclose(believe(MACS, [scores], both), believe(MACS, [scores] * 2, both))
    bound = {c: mean + 0.5 * deviation for c, mean, deviation in zip(MACS, *believe(MACS, [scores], both))}
    assert propose(MACS, [scores], both)[:2] == (max(bound.keys() - both, key=bound.get), "proposed")


# ---- batches and steps -----------------------------------------------------------------------------------------------

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


def test_crop_and_flip_against_numpy_and_seeds_that_differ_whatever_they_are_made_of():
    images = torch.randint(0, 256, (20, 32, 32, 3), dtype=torch.uint8)
    top, left, flip = torch.randint(0, 9, (20,)), torch.randint(0, 9, (20,)), torch.rand(20) < 0.5
    for got, image, y, x, f in zip(crop_and_flip(images, top, left, flip, 4), images.numpy(), top, left, flip):
        cut = np.pad(image, ((4, 4), (4, 4), (0, 0)))[y:y + 32, x:x + 32]
        assert np.array_equal(got.numpy(), cut[:, ::-1] if f else cut)
    parts = [("weights", 0, 0), ("weights", 0), ("weights", 0, 1), ("weights", 1, 0), ("order", 0, 0), ("weights", 10)]
    assert len({derive_seed(*p) for p in parts}) == 6 and derive_seed("a", 1) == derive_seed("a", 1) >= 0
    (images, labels), again = (common.synthetic_images(200, 1) for _ in range(2))
    assert np.array_equal(images, again[0]) and len(set(np.bincount(labels).tolist())) == 1


def test_an_epoch_is_fixed_by_its_seed_and_shared_out_and_scoring_counts_every_image_once():
    split, mapped = made_up(50), made_up(50)
    everything = normalise(split.pixels)
    np.save("pixels.npy", split.pixels.numpy())
    mapped.pixels = np.load("pixels.npy", mmap_mode="r")
    whole = list(training_batches(split, 8, CPU, seed=5))
    assert not torch.equal(next(training_batches(split, 8, CPU, seed=6))[0], whole[0][0])
    parts = [list(training_batches(mapped, 8, CPU, seed=5, rank=rank, world=2)) for rank in range(2)]
    for (x, y), first, second in zip(whole, *parts):
        assert torch.equal(torch.cat([first[0], second[0]]), x) and torch.equal(torch.cat([first[1], second[1]]), y)
    plain = list(training_batches(split, 8, CPU, seed=5, augment=False))
    seen = [(everything == image).flatten(1).all(1).nonzero().item() for x, _ in plain for image in x]
    assert len(set(seen)) == 48 and [i % 4 for i in seen] == torch.cat([y for _, y in plain]).tolist()
    scored = list(scoring_batches(mapped, 16, CPU))
    assert torch.equal(torch.cat([x for x, _ in scored]), everything)
    assert torch.equal(torch.cat([y for _, y in scored]), split.labels)
    parrot = torch.nn.Module()
    parrot.forward = lambda x, config: F.one_hot(torch.zeros(len(x), dtype=torch.int64), 4)
    assert evaluate(parrot, split, None, CPU, batch_size=16) == pytest.approx(13 / 50)


def test_an_extracted_network_answers_one_image_as_a_batch():
    split, net = made_up(128), ResNet20(classes=4, norm="shared")
    single = extract_network(net.state_dict(), [2, 5, 3], training_batches(split, 64, CPU, seed=1), classes=4)
    x, _ = next(scoring_batches(split, 128, CPU))
    with torch.no_grad():
        batch, alone = single(x), torch.cat([single(image[None]) for image in x[:32]])
        close = F.cosine_similarity(batch, net(x, (2, 5, 3)), dim=1)
    assert torch.allclose(batch[:32], alone, atol=1e-4)
    assert close.mean() > 0.9  # and much as the SuperNet does with the statistics of a batch


# ---- loaders ---------------------------------------------------------------------------------------------------------

def picture(path, mode="RGB", size=(40, 30), seed=0):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).convert(mode).save(path)


def folder(root, classes=("cat", "dog"), n=4, test="test", size=(40, 30)):
    for c, i in itertools.product(classes, range(n + 2)):
        picture(Path(root, "train" if i < n else test, c, f"{i}.png"), seed=2 * i + (c == "dog"), size=size)
    return Path(root)


def write_cifar(root, kind):
    """CIFAR's files with 20 images each."""
    base, labels = Path(root, kind.base_folder), [i % 10 for i in range(20)]
    base.mkdir(parents=True)
    for file, _ in kind.train_list + kind.test_list:
        content = {"data": np.zeros((20, 3072), np.uint8), "labels": labels, "fine_labels": labels}
        (base / file).write_bytes(pickle.dumps(content))
    (base / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: list(range(10))}))


def write_food(root, kind):
    """Food-101's layout with two classes of seven images."""
    base, classes = Path(root, "food-101"), ("apple_pie", "waffles")
    for c, i in itertools.product(classes, range(7)):
        picture(base / "images" / c / f"{i}.jpg", size=(200, 150), seed=i)
    (base / "meta").mkdir()
    for part, ids in (("train", range(5)), ("test", range(5, 7))):
        (base / "meta" / f"{part}.json").write_text(json.dumps({c: [f"{c}/{i}" for i in ids] for c in classes}))


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("name, place, kind, method, write", [
    ("cifar10", "cifar-10-batches-py", torchvision.datasets.CIFAR10, "download", write_cifar),
    ("cifar100", "cifar-100-python", torchvision.datasets.CIFAR100, "download", write_cifar),
    ("food101", "food-101", torchvision.datasets.Food101, "_download", write_food)])
def test_an_archive_unpacked_in_part_is_unpacked_again(name, place, kind, method, write, killed, monkeypatch):
    def interrupted(self):
        Path(self.root, place, "half").mkdir(parents=True)
        if killed:
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("connection lost")
    words = ["train_single.py", "--dataset", name, *TINY[2:]]
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, *words: os.path.exists(path))
    monkeypatch.setattr(kind, method, interrupted)
    assert run(*words, code=-signal.SIGKILL) if killed else "connection lost" in refused(*words)
    assert not Path("data", place).exists()
    monkeypatch.setattr(kind, method, lambda self: write(self.root, kind))
    assert len(load_dataset(name).test) == (4 if name == "food101" else 20) and not Path("data", place, "half").exists()


def test_images_of_every_kind_are_decoded_and_a_changed_one_is_noticed():
    target = folder("pets", test="val") / "train" / "cat"
    picture(target / "alpha.png", "RGBA"), picture(target / "print.jpg", "CMYK")
    Image.fromarray(np.full((40, 40), 200 * 256 + 7, np.uint16)).save(target / "deep.png")
    wide, turned = np.zeros((20, 40, 3), np.uint8), Image.Exif()
    wide[:, :20] = 255  # left half white; the tag says: turn it by 90 degrees clockwise, so white goes to the top
    turned[0x0112] = 6
    Image.fromarray(wide).save(target / "turned.jpg", exif=turned, quality=95)
    data = load_dataset("pets", limit_test=2)
    assert (len(data.train), len(data.test), data.classes, data.name) == (12, 2, ["cat", "dog"], "pets")
    upright = read_image(target / "turned.jpg", 32)
    assert upright[:12].mean() > 230 and upright[-12:].mean() < 25
    assert (read_image(target / "deep.png", 32) == 200).all()
    picture(target / "0.png", seed=99)
    assert not np.array_equal(load_dataset("pets").train.pixels, data.train.pixels)


def test_data_that_cannot_be_written_is_named_by_a_dot_or_read_by_two_processes_at_once(monkeypatch):
    Path("mounted").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode, real=os.access: str(path) != "mounted" and real(path, mode))
    load_dataset(str(folder("pets")), "mounted")
    assert not files("mounted") and len(files("data/cache")) == 1
    monkeypatch.chdir("pets")
    run("train_single.py", "--dataset", ".", *TINY[2:], "--batch-size", "4")
    assert strict("runs/pets/single.json")["dataset"] == "pets" == load_dataset(".").name
    words = ["search_mixture.py", "--dataset", folder("new", n=40, size=(400, 300)), *TINY[2:], "--data-dir", "fresh"]
    for started in [start(*words, "--out", out) for out in ("one", "two")]:  # at the same time
        finish(started)
    assert timeless(strict("one/mixture.json")) == timeless(strict("two/mixture.json")) and len(files("fresh")) == 1


# ---- the scripts, as a user runs them, in one process and in several -------------------------------------------------

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Every stage alone, never interrupted: {stage: (JSON, seconds)}."""
    found, place = {}, tmp_path_factory.mktemp("whole")
    for stage, words in STAGES.items():
        began = time.monotonic()
        run(*words, "--out", made_up_search(place / stage))
        found[stage] = strict(place / stage / f"{stage}.json"), time.monotonic() - began
    return found


def test_the_four_stages(whole):
    read = {stage: Path(f"runs/synthetic/{stage}.json") for stage in STAGES}
    out, _ = run(*STAGES["single"])
    first, before = strict(read["single"]), files("runs/synthetic/single")
    assert "[2,2]" in out and "wrote runs/synthetic/single.json" in out and first["n_test"] == 40
    run("train_single.py", *TINY, "--config", "2,2", "--seed", "1")
    assert before.items() <= files("runs/synthetic/single").items()  # adds a run, trains nothing again
    single = strict(read["single"])
    two = [r["test_acc"] for r in single["default"]["runs"]]
    found = [single["default"][key] for key in ("test_acc", "std")]
    assert found == pytest.approx([np.mean(two), np.std(two, ddof=1)], abs=1e-6)
    run(*STAGES["supernet"])
    naive, truth = strict(read["supernet"]), {tuple(r["config"]): r["test_acc"] for r in single["results"]}
    assert naive["rank"]["regret"] == pytest.approx(max(truth.values()) - truth[tuple(naive["best"]["config"])])
    run(*STAGES["mixture"])
    mixture = strict(read["mixture"])
    assert np.allclose(np.sum(mixture["probabilities"], 0), 3 / 2, atol=0.01) and np.sum(mixture["trained"]) == 2 * 3
    run(*STAGES["mixture"], "--all-pairs")  # after the search has ended: scores, trains nothing
    again = strict(read["mixture"])
    assert again["history"] == mixture["history"] and again["results"] == mixture["results"]
    pairs = dict(zip(map(tuple, again["configs"]), again["pairs"]))
    assert all(pairs[tuple(r["config"])][r["model"]] == r["val_acc"] for r in again["results"])
    out, _ = run("retrain.py", *TINY, "--runs", "1")
    assert "epoch" not in out and "gain" in out  # single.json knows all
    run("retrain.py", *TINY, "--runs", "2")
    final = strict(read["retrain"])
    alone, taken = ({(*r["config"], run["seed"]): run["test_acc"] for r in data["results"] for run in r["runs"]}
                    for data in (single, final))
    assert alone.items() <= taken.items() and len(final["best"]["runs"]) == 2 == len(final["default"]["runs"])
    for stage, path in read.items():
        data = strict(path)
        assert data.keys() >= set("schema stage dataset image_size num_classes n_train n_val n_test space args env "
                                  "seconds results best default pareto history".split())
        assert data["best"] == max(data["results"], key=lambda r: r["test_acc" if "runs" in r else "val_acc"])
    assert whole["retrain"][0]["default"]["runs"][0]["test_acc"] == first["default"]["test_acc"]  # the same network


def test_propose_only_writes_nothing_and_a_budget_is_kept():
    assert "search_supernet.py --dataset synthetic" in refused("retrain.py", *TINY)
    made_up_search("runs/synthetic")  # 10, 20 and 40 million multiply-adds

    def what_is_next(*words):
        return run("retrain.py", *TINY, "--propose-only", *words)[0].splitlines()[-1]
    before = files("runs")
    assert what_is_next() == "next: [2,2]" and files("runs") == before
    run("train_single.py", *TINY, "--config", "2,2", "3,1")
    assert what_is_next() == "next: [1,3]" and what_is_next("--max-macs", "15M") == "next: [1,3]"
    run("retrain.py", *TINY, "--max-macs", "15M", "--runs", "2")  # no more of what is known and too expensive
    assert {path.stem for path in Path("runs/synthetic/retrain").glob("*.json")} == {"1-3-seed0", "1-3-seed1"}
    assert what_is_next() == "next: none"


def test_prioritised_sampling_a_shared_start_and_halves_that_differ_by_a_batch():
    run("search_supernet.py", *TINY, "--sampler", "prioritized", "--pools", "2", "--pool-size", "1")
    assert len(strict("runs/synthetic/supernet.json")["budgets"]) == 2
    run("search_mixture.py", *TINY, "--models", "2", "--shared-epochs", "1")
    assert np.sum(strict("runs/synthetic/mixture.json")["trained"]) == 3  # the second epoch's steps
    for images in (63, 65):
        run("search_mixture.py", *TINY, "--limit-train", images, "--batch-size", "8", "--out", images)
        assert np.sum(strict(f"{images}/mixture.json")["trained"]) == 2 * (images // 2 // 8)


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_are_stopped_after_the_first_epoch_and_go_on_and_need_not_share_a_disk(stage, whole):
    words = [*STAGES[stage], "--out"]
    Path("other").mkdir()
    if stage == "retrain":  # which reads the searches on every disk
        made_up_search("other/whole")
    run_two_ranks(*words, made_up_search("whole"), prepare=(None, lambda: os.chdir("other")))
    run_two_ranks(*words, made_up_search("stopped"), code=-signal.SIGKILL, prepare=(failing(WRITES, None, 4), None))
    assert list(Path("stopped").rglob("*.pt"))
    run_two_ranks(*words, "stopped")
    assert not Path(f"other/whole/{stage}.json").exists()
    if stage == "single":  # which is shared out by networks, so that nothing changes
        assert timeless(strict("whole/single.json")["results"]) == timeless(whole[stage][0]["results"])
    assert timeless(strict(f"stopped/{stage}.json")) == timeless(strict(f"whole/{stage}.json"))


# ---- killed, stopped, misled -----------------------------------------------------------------------------------------

def check_it_goes_on(stage, whole):
    """Run a stage to its end where it was stopped: the same JSON as without a stop, and nothing half left over."""
    run(*STAGES[stage], "--out", "stopped")
    assert timeless(strict(f"stopped/{stage}.json")) == timeless(whole[stage][0])
    assert not list(Path("stopped").rglob("*.tmp"))


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_random_moments_then_at_the_first_write_the_second_and_so_on_it_ends_the_same(stage, whole):
    words = [*STAGES[stage], "--out", made_up_search("stopped")]
    for moment in random.Random(0).choices(range(20, 90), k=4):  # % of the time of a whole run
        started = start(*words)
        time.sleep(moment / 100 * whole[stage][1])
        started[0].kill()
        finish(started, code=None)
    check_it_goes_on(stage, whole)
    shutil.rmtree("stopped")
    made_up_search("stopped")
    for number in range(1, 99):
        out, _ = finish(start(*words, prepare=failing(WRITES, None, number)), code=None)
        if "wrote" in out:
            break
    assert number > 4
    check_it_goes_on(stage, whole)


@pytest.mark.parametrize("stage, function, code, first", [
    ("single", "common.evaluate", 130, 1), ("supernet", "timeit.repeat", 130, 1),  # in the table of budgets
    ("mixture", "common.evaluate", 130, 2), ("mixture", "os.fsync", 2, 2), ("retrain", "os.replace", 2, 2)])
def test_ctrl_c_and_a_full_disk_lose_nothing(stage, function, code, first, whole):
    error = {130: KeyboardInterrupt(), 2: OSError(28, "No space left on device")}[code]
    _, err = run(*STAGES[stage], "--out", made_up_search("stopped"), code=code, prepare=failing(function, error, first))
    assert err.count("\n") == ("No space left" in err) == (code == 2)
    assert not Path(f"stopped/{stage}.json").exists() and not list(Path("stopped").rglob("*.tmp"))
    assert len(list(Path("stopped").rglob("*.pt"))) == 1
    check_it_goes_on(stage, whole)


@pytest.mark.parametrize("stage", STAGES)
def test_other_settings_are_refused_by_name_and_so_is_divergence(stage):
    words = [*STAGES[stage], "--out", made_up_search("x"), "--epochs", "1", "--lr", "0.1"]
    run(*words, prepare=failing(WRITES, None, 4), code=-signal.SIGKILL)
    before = files("x")
    err = refused(*words, "--lr", "0.2", "--weight-decay", "0.1")
    assert "--lr (0.1 there, 0.2 here)" in err and "--weight-decay" in err and "--epochs" not in err
    assert "choose another --out, or delete the folder" in err and files("x") == before
    err = refused(*words, "--lr", "1e38", "--out", made_up_search("y"))
    assert "not finite in epoch" in err and "--lr" in err and not Path(f"y/{stage}.json").exists()


def test_a_run_that_goes_on_keeps_its_precision():
    words = [word for word in STAGES["mixture"] if word not in ("--amp", "off")]
    run(*words, "--amp", "bf16", prepare=failing(WRITES, None, 4), code=-signal.SIGKILL)
    for _ in range(2):  # from its checkpoint, then from its JSON
        out, _ = run(*words, prepare=failing("timeit.repeat", AssertionError("measured")))
        assert "going on after epoch" in out and strict("runs/synthetic/mixture.json")["env"]["amp"] == "bf16"
    assert "--amp (bf16 there, off here)" in refused(*words, "--amp", "off")


def test_two_runs_in_one_folder_a_lock_left_behind_and_a_damaged_checkpoint():
    first = start(*STAGES["mixture"], "--epochs", "500")
    while "epoch 1" not in Path(first[1][0].name).read_text():
        time.sleep(0.01)
    assert "in use" in refused(*STAGES["supernet"])
    first[0].kill()
    finish(first, -signal.SIGKILL)
    run(*STAGES["supernet"])
    damaged = Path("runs/synthetic/supernet.pt")
    damaged.write_bytes(damaged.read_bytes()[:1000])
    assert "supernet.pt is damaged" in refused(*STAGES["supernet"])


MADE = "--dataset synthetic --device cpu"
BAD = [(f"{script} {case}", case.split()[0]) for script, cases in {  # what is typed, and what the line must say
    "train_single.py": "--limit-train 0, --limit-test -1, --lr 0, --lr nan, --weight-decay -1, --seed -1",
    "search_supernet.py": "--sampler best, --pools 0, --image-size 48, --device gpu, --device cuda:77",
    "search_mixture.py": "--model 4, --models 0, --epochs 0, --epochs ten, --scales 7, --layers 2, --amp int8",
    "retrain.py": "--runs 0, --trainings 0, --max-macs 0, --max-macs lots"}.items() for case in cases.split(", ")] + [
    (f"train_single.py {MADE} --config 4,3,4", "10 in all"), (f"train_single.py {MADE} --config 4,3,3 9", "--config 9"),
    (f"search_mixture.py {MADE} --limit-train 40", "batch-size"), (f"search_supernet.py {MADE} --pools 37", "--pools"),
    (f"retrain.py {MADE} --layers 4 --scales 2 --max-macs 1M --out earlier", "--max-macs"),
    (f"retrain.py {MADE} --out earlier", "earlier.json"), ("search_mixture.py --dataset empty", "train/"),
    (f"retrain.py {MADE} --layers 4 --scales 2 --out none", "none"), ("results/report.py empty", "no search"),
    ("search_mixture.py --dataset odd", "bird"), ("search_mixture.py --dataset damaged", "2 files.*cut.jpg.*notes.jpg")]


@pytest.mark.parametrize("command, message", BAD, ids=[command for command, _ in BAD])
def test_bad_input_is_one_line_and_touches_nothing(command, message):
    folder("odd", n=1), folder("damaged", n=1)
    made_up_search("earlier"), made_up_search("none", results=[])
    Path("empty").mkdir()
    Path("odd/test/dog").rename("odd/test/bird")
    Path("damaged/train/cat/notes.jpg").write_text("no image")
    Path("damaged/test/dog/cut.jpg").write_bytes(Path("damaged/test/dog/2.png").read_bytes()[:1500])
    before = files(".")
    err = refused(*command.split())
    assert re.search(message, err) and files(".") == before, err


# ---- results/ --------------------------------------------------------------------------------------------------------

def test_the_report_prints_tables_and_draws_where_matplotlib_is():
    Path("x").mkdir()
    for name in ("single.json", "supernet.json"):
        shutil.copy(RESULTS / "cifar10-jpeg" / name, "x")
    words, row = ("results/report.py", "x", "--truth", RESULTS / PUBLISHED), "| 50000 | 19500 | [3,3,4] | 0.42 "
    out, _ = run(*words, prepare=lambda: sys.modules.update({"matplotlib": None, "matplotlib.figure": None}))
    assert out.count(row) == 2 and out.endswith("pip install matplotlib\n") and len(files("x")) == 2
    if importlib.util.find_spec("matplotlib"):
        out, _ = run(*words)
        assert out.count(row) == 2 and {"x/pooling.png", "x/searches.png"} <= files("x").keys()


def test_the_tables_in_the_readme_are_the_files():
    lines = (RESULTS / "README.md").read_text().splitlines()
    truth = {tuple(r["config"]): r["test_acc"] for r in strict(RESULTS / PUBLISHED)["results"]}
    searches = [s for s in map(strict, sorted(RESULTS.glob("cifar10-jpeg/**/*.json"))) if "val_acc" in s["best"]]
    rows, found = report.table(searches, truth), []
    assert set(rows) <= set(lines)
    for row in (row for row in rows[2:-1] if ", by the " not in row):  # without header, cost alone, other readings
        cells = row[2:-2].split(" | ")
        found += zip(*(cells[i].split(", ") for i in (3, 4, 7, -1)))  # choice, tau, regret and seconds of each seed
    for search in searches:
        score, true = zip(*((r["val_acc"], truth[tuple(r["config"])]) for r in search["results"]))
        pairs = [np.sign([a - b, c - d]) for (a, c), (b, d) in itertools.combinations(zip(score, true), 2)]
        tau = sum(a * b for a, b in pairs) / math.prod(np.abs(pairs).sum(0)) ** 0.5
        best = search["results"][score.index(max(score))]["config"]
        regret = 100 * (max(true) - truth[tuple(best)])
        found.remove((show(best), f"{tau:.2f}", f"{regret:.2f}", f"{search['seconds']:.0f}"))
    assert not found


def test_accuracies_of_several_seeds_stand_in_the_readme():
    told = [r for r in strict(RESULTS / "synthetic/single.json")["results"] if len(r["runs"]) > 1]
    for data in map(strict, RESULTS.glob("*/retrain*.json")):
        told += [data["best"], data["default"]] if "order" in data["results"][0] else []
    for r in told:
        pattern = re.escape(show(r["config"])) + rf".*\b{100 * r['test_acc']:.1f}\b"
        assert re.search(pattern, (RESULTS / "README.md").read_text()), pattern


def test_a_search_that_is_right_finds_the_best_sooner_than_chance(monkeypatch):
    monkeypatch.setattr(report, "count_macs", MACS.get)  # which takes most of the time
    truth = {(a, b, c): 0.9 - 0.002 * ((a - 6) ** 2 + (b - 2) ** 2) for a, b, c in SPACE}
    right, chance = (report.simulate(truth, [truth], rule, trainings=6, draws=5, noise=0)
                     for rule in ("process", "in random order"))
    assert right.shape == (5, 6) and right[:, 5].mean() < chance[:, 5].mean()
    assert (np.diff(right) <= 0).all() and (np.diff(chance) <= 0).all()


# ---- steps: after all that forks, since where there is a GPU they start threads --------------------------------------

def test_a_step_is_plain_sgd():
    net, twin = (ResNet20(classes=4, layers=4).double() for _ in range(2))
    x, y = torch.randn(8, 3, 32, 32, dtype=torch.float64), torch.arange(8) % 4
    twin.load_state_dict(net.state_dict())
    learner = Learner(net, CPU, momentum=0.9, weight_decay=0.01)
    velocity = [torch.zeros_like(p) for p in twin.parameters()]
    for lr in (0.1, 0.05):
        logits = twin(x, (2, 2))
        loss, accuracy = F.cross_entropy(logits, y), (logits.argmax(1) == y).float().mean()
        grads = torch.autograd.grad(loss, list(twin.parameters()))
        with torch.no_grad():
            for p, g, v in zip(twin.parameters(), grads, velocity):
                v.mul_(0.9).add_(g + 0.01 * p)
                p.sub_(lr * v)
        assert learner.train(x, y, (2, 2), lr).tolist() == pytest.approx([loss.item(), accuracy.item()], rel=1e-4)
        assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(learner.model.parameters(), twin.parameters()))


def test_a_first_step_that_fp16_skips_leaves_momentum_zero():
    factor = [math.inf, 1.0]

    def overflowing(network, x, y, config):
        loss, logits = label_loss(network, x, y, config)
        return loss * factor.pop(0), logits
    learner = Learner(ResNet20(classes=4, layers=4), CPU, "fp16", loss=overflowing)
    weights = list(learner.model.parameters())
    momentum = [learner.optimizer.state[p]["momentum_buffer"] for p in weights]  # before any step is taken
    before, batch = [p.clone() for p in weights], (torch.randn(8, 3, 32, 32), torch.arange(8) % 4, (2, 2), 0.1)
    learner.train(*batch)
    assert not any(velocity.any() for velocity in momentum) and all(map(torch.equal, weights, before))
    learner.train(*batch)
    assert all(torch.allclose(p, q - 0.1 * v, atol=1e-6) and v.any() for p, q, v in zip(weights, before, momentum))


@pytest.mark.parametrize("faster", ["off", "bf16"])
def test_the_precision_on_a_cpu_is_chosen_by_measurement(faster, monkeypatch, capsys):
    used, relu = [], F.relu

    def noting_relu(*words, **options):
        used.append("bf16" if torch.is_autocast_enabled("cpu") else "off")
        return relu(*words, **options)
    monkeypatch.setattr(F, "relu", noting_relu)
    monkeypatch.setattr(timeit, "repeat", lambda step, **options: [step() is None or 1 + (used[-1] != faster)])
    assert common.pick_amp("auto", CPU) == faster and {"off", "bf16"} <= set(used)
    assert f"--amp {faster}" in capsys.readouterr().out and common.pick_amp("bf16", CPU) == "bf16"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_take_the_steps_that_eager_ones_take_and_a_failing_capture_goes_on_eagerly(monkeypatch, capsys):
    split, device, found = made_up(256), torch.device("cuda"), []
    step = common.graphed(lambda x, y: x * x.sum().item(), device)  # item() waits, so that capturing fails
    for value in range(4):
        x = torch.full((8,), float(value), device=device)
        assert torch.equal(step(x, x), 8 * value * x)
    assert len(capsys.readouterr().out.splitlines()) == 1
    for graphed in (common.graphed, lambda step, device: step):
        monkeypatch.setattr(common, "graphed", graphed)
        torch.manual_seed(0)
        learner = Learner(ResNet20(classes=4, layers=4), device)
        for step in range(12):
            x, y = next(training_batches(split, 64, device, seed=step))
            learner.train(x, y, ((2, 2), (3, 1))[step % 2], 0.1 / (1 + step))  # the rate must reach the graph
            assert learner.score(x, y, (2, 2)).item() <= 1
        found.append(torch.cat([p.detach().flatten() for p in learner.model.parameters()]))
    assert (found[0] - found[1]).abs().max() < 1e-3
