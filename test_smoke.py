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
import re
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import time
from argparse import Namespace
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
from retrain import believe, chance_above, gaussian_process, load_scores, propose
from search_mixture import Assignment, balance
from search_supernet import (SAMPLERS, CrossPathLoss, Prioritized, TreeSearch, exposure, extract_network, partner,
                             sandwich_loss, split_by_resolution)

HERE, CPU, FORK = Path(__file__).parent, torch.device("cpu"), multiprocessing.get_context("fork")
RESULTS, PUBLISHED, SPACE = HERE / "results", "published_cifar10_resnet20.json", pooling_configs()
COSTS = np.array([count_macs(config) for config in SPACE])
TINY = ["--dataset", "synthetic", "--layers", "4", "--scales", "2", "--limit-train", "96", "--limit-test", "40",
        "--batch-size", "16", "--epochs", "2", "--amp", "off", "--device", "cpu"]  # [1,3], [2,2] and [3,1]
STAGES = {"single": ["train_single.py", *TINY, "--config", "all"],
          "supernet": ["search_supernet.py", *TINY],
          "mixture": ["search_mixture.py", *TINY, "--models", "2"],
          "retrain": ["retrain.py", *TINY, "--trainings", "2", "--runs", "2"]}
CHEAPEST = ["--max-macs", count_macs((1, 3), size=16)]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ---- running scripts -------------------------------------------------------------------------------------------------

def as_a_user(script, words, printed, prepare, environment):
    os.dup2(printed[0].fileno(), 1), os.dup2(printed[1].fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w")
    os.environ.update(environment)
    for name in ("common", "train_single", "search_supernet", "retrain"):
        sys.modules.pop(name, None)  # they ask for their rank when they are imported
    importlib.import_module("common").SYNTHETIC = 160, 60  # drawing all of them would take most of the time
    if prepare:
        prepare()
    sys.argv = [str(HERE / script), *map(str, words)]
    runpy.run_path(sys.argv[0], run_name="__main__")


def start(script, *words, prepare=None, **environment):
    """Start a script: (process, files of what it prints). prepare() is called in the process, before the script."""
    printed = [tempfile.NamedTemporaryFile("w+") for _ in range(2)]  # standard output and standard error
    process = FORK.Process(target=as_a_user, args=(script, words, printed, prepare, environment), daemon=True)
    process.start()
    return process, printed


def finish(started, code=0, limit=240):
    """Wait for a script and check its exit code (None: any; 2: with one line on standard error): (output, errors)."""
    process, printed = started
    process.join(limit)
    process.kill(), process.join()  # where it has not ended by itself
    out, err = (Path(file.name).read_text() for file in printed)
    assert code in (None, process.exitcode) and "Traceback" not in err, (process.exitcode, out[-5000:], err)
    assert code != 2 or err.count("\n") == 1, err
    return out, err


def run(*words, code=0, prepare=None):
    return finish(start(*words, prepare=prepare), code)


def refused(*words, prepare=None):
    return run(*words, code=2, prepare=prepare)[1]


def run_two_ranks(*words, dying=None, prepare=(None, None), limit=240):  # where one dies, torchrun kills the other
    with socket.create_server(("127.0.0.1", 0)) as free:
        world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    started = [start(*words, prepare=prepare[r], RANK=str(r), LOCAL_RANK=str(r), **world) for r in range(2)]
    if dying is None:
        return [finish(each, limit=limit) for each in started]
    finish(started[dying], -signal.SIGKILL)
    started[1 - dying][0].kill()


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


def stop(*words, epochs=1):  # run a script, and kill it after so many epochs
    run(*words, prepare=failing("common.save_checkpoint", None, epochs + 1), code=-signal.SIGKILL)


def files(folder):
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def strict(path):
    return json.loads(Path(path).read_text(), parse_constant=lambda word: pytest.fail(f"{word} in {path}"))


def timeless(value):
    """JSON, or that of a file, without what may differ between equal runs: seconds."""
    value = strict(value) if isinstance(value, Path) else value
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if "seconds" not in k}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def noise(n):
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), np.uint8))
    return Split(pixels, torch.arange(n), torch.arange(n) % 4)


def made_up_search(out, name="earlier", scores=(0.1, 0.2, 0.3), **change):
    Path(out).mkdir(parents=True, exist_ok=True)  # the JSON of a search, whose scores name [3,1] the best
    save_json(Path(out, f"{name}.json"), {
        "schema": 1, "stage": "mixture", "dataset": "synthetic", "image_size": 16, "data_digest": "", "args": {},
        "space": {"layers": 4, "scales": 2, "size": 3}, "seconds": 1.0, "results": [
            {"config": [a, 4 - a], "macs": 1, "val_acc": score} for a, score in enumerate(scores, 1)], **change})
    return out


# ---- the mathematics -------------------------------------------------------------------------------------------------

def test_the_space_is_every_composition_multiply_adds_are_counted_and_the_network_pools_where_it_should():
    for layers, scales in ((10, 3), (4, 2), (7, 1), (6, 6), (9, 4)):
        brute = [c for c in itertools.product(range(1, layers + 1), repeat=scales) if sum(c) == layers]
        assert pooling_configs(layers, scales) == brute
    assert len(SPACE) == 36 and default_config() == (4, 3, 3)
    earlier = strict(RESULTS / "cifar10-jpeg/single.json")["results"]  # its macs: counted in forward passes
    assert all(COSTS[SPACE.index(tuple(r["config"]))] == r["macs"] for r in earlier)
    assert count_macs((4, 3, 3), classes=101, stem=4) == 45_144_384 and count_macs((1,) * 6) < count_macs((2, 2, 2))
    net, x = ResNet20(norm="shared").requires_grad_(False), torch.randn(2, 3, 32, 32)
    for config in SPACE:
        layers, y = iter(net.layers), x
        for part, count in enumerate(config):
            y = F.max_pool2d(y, 2) if part else y
            for _ in range(count):
                y = next(layers)(y)
        assert torch.equal(net(x, config), net.head(y.mean((2, 3)))), config
    assert not list(net.buffers()) and not torch.allclose(net.eval()(x)[:1], net(x[:1]), atol=1e-3)  # the batch's norm


def agrees(drawn, weights):  # whether each index was drawn in proportion to its weight, to within five deviations
    n, p = len(drawn), np.asarray(weights) / np.sum(weights)
    return (np.abs(np.bincount(drawn, minlength=len(p)) - n * p) <= 5 * np.sqrt(n * p * (1 - p))).all()


def test_draws_in_proportion_and_towards_rewards_exposure_against_a_count_and_partners_that_differ():
    pooled = [[sum(layer >= cut for cut in itertools.accumulate(c[:-1])) for layer in range(10)] for c in SPACE]
    fed = [sum(math.log([other[n] for other in pooled].count(mine[n]) / 36) / 10 for n in range(10)) for mine in pooled]
    np.testing.assert_allclose(exposure(SPACE), fed)
    rng, rewards = np.random.default_rng(0), np.array([0.1, 0.2, 0.3])
    for name, weights in (("uniform", COSTS ** 0), ("cost", COSTS ** 0.5), ("fair", np.exp(fed) ** -3)):
        assert agrees(SAMPLERS[name](SPACE, COSTS, exponent=0.5).draw(40_000, 0.5, rng), weights)
    even, flat = TreeSearch(SPACE, "cuts", explore=0.0), TreeSearch(SPACE[:3], "flat", explore=0.0, uniform=0.1)
    for _ in range(30):
        even.update(even.draw(36, 0.0, rng), [0.5] * 36)
    assert agrees(even.draw(9000, 0.9, rng), np.ones(36))  # rewards are equal
    flat.update(drawn := flat.draw(3, 0.9, rng), rewards[drawn].tolist())
    for progress, temperature in ((0.09, math.inf), (0.1, 0.7 * 70 ** -0.1), (0.5, 0.7 * 70 ** -0.5), (1.0, 0.01)):
        assert agrees(flat.draw(6000, progress, rng), np.exp(rewards / temperature))
    far = {i for i, (a, b, _) in enumerate(SPACE) if abs(a - 3) + abs(a + b - 6) >= 2}  # from [3,3,4]
    assert {partner(SPACE.index((3, 3, 4)), SPACE, rng) for _ in range(600)} == far


@pytest.mark.parametrize("name, explore, shared", [
    ("boltzmann", 0, 0), ("mcts", 1, 0), ("tree", 1, 0), ("mct-nas", 0.05, 0.2)])
def test_tree_samplers_against_the_list_of_all_that_was_drawn(name, explore, shared):
    def running(values, keep=0.9):
        return list(itertools.accumulate(values, lambda mean, value: keep * mean + (1 - keep) * value))
    sampler, rng, seen, told = SAMPLERS[name](pooling_configs(5, 3), None), np.random.default_rng(0), [], []
    cuts = [(1, 2), (1, 3), (1, 4), (2, 3), (2, 4), (3, None)]  # [3,1,1] has no sibling at its second cut
    if name == "tree":
        sampler.replant([0.3, 0.1, 0.5, 0.2, 0.6, 0.4])
    tree, root = sampler.state["tree"], sampler.state["root"]
    assert tree[root] == {"boltzmann": [(i,) for i in range(6)], "tree": [(1, 3, 0), (5, 2, 4)]}.get(
        name, [(0, 1, 2), (3, 4), (5,)]) and all(sum(children, ()) == node for node, children in tree.items())
    for steps in (1, 2, 5, 36, 36):
        drawn, losses = sampler.draw(steps, 0.8, rng), rng.uniform(0.5, 2, steps).tolist()
        sampler.update(drawn, losses)
        seen, told = seen + drawn, told + losses
        rewards = [mean / loss for mean, loss in zip(running(told, 0.95), told)] if name == "mct-nas" else told
        for (node, children), temperature in itertools.product(tree.items(), (0.7, 0.05)):
            level, visits = int(len(node) < 6), [sum(leaf in child for leaf in seen) for child in children]
            weights = [n == 0 for n in visits]
            for number, child in enumerate(children if 0 not in visits else []):
                akin = [leaf for leaf in range(6) if cuts[leaf][level] == cuts[child[0]][level]]
                own, others = (running([r for i, r in zip(seen, rewards) if i in part])[-1] for part in (child, akin))
                value = own + explore * math.sqrt(math.log(sum(visits)) / visits[number]) + shared * others
                weights[number] = len(child) * math.exp(value / temperature)
            found = sampler.probabilities(node, level, temperature)
            np.testing.assert_allclose(found, np.divide(weights, sum(weights)))


def test_prioritised_pools_draw_a_class_first_explore_until_they_are_full_and_forget_what_leaves_them():
    sampler, rng, p = Prioritized(COSTS, 5, 2), np.random.default_rng(0), np.zeros(36)
    costs, first, score = [COSTS[i] for i in sampler.classes], sampler.classes[0], sampler.state["score"]
    assert all(max(a) <= min(b) for a, b in zip(costs, costs[1:])) and sorted(map(len, costs)) == [7, 7, 7, 7, 8]
    for members in sampler.classes:
        p[members] = 1 / len(members)
    sampler.update(first[:1], [1.0])
    assert agrees(sampler.draw(20_000, 1.0, rng), p)  # one of two: not full
    for told, losses, kept, left in ((first[1:3], [3.0, 2.0], first[0:3:2], 1), (first[:2], [2.0, 1.5], first[:2], 2)):
        sampler.update(told, losses)
        assert sampler.state["members"][0] == kept and score[first[left]] is None
    assert [score[i] for i in first[:2]] == pytest.approx([-1.1, -1.5])
    for progress in (0.25, 0.5):
        level = 0.01 ** progress  # the temperature, and the part of the draws that explores
        weights = np.exp(np.array([-1.1, -1.5]) / level)
        p[first] = level / len(first)
        p[first[:2]] += (1 - level) * weights / weights.sum()
        assert agrees(sampler.draw(20_000, progress, rng), p)


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


def test_the_assignment_draws_and_averages_tau_against_a_count_of_pairs_and_pareto_by_hand():
    a, probs = Assignment(3, 2), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.25, 0.75]], dtype=torch.float64)
    models = np.array(a.draw(probs, [0, 1, 2, 2] * 5000, rng := np.random.default_rng(1)))
    assert (models[0::4] == 0).all() and (models[1::4] == 1).all() and agrees(models[2::4], [0.25, 0.75])
    a.update([0, 0, 2], [1, 1, 0], [0.5, 0.25, 0.0])
    assert a.W.flatten().tolist() == pytest.approx([1, 0.9 * (0.9 * 1 + 0.1 * 0.5) + 0.1 * 0.25, 1, 1, 0.9, 1])
    probability = 1 / (1 + math.exp(100 * (a.W[0, 1].item() - 1)))  # inverse temperature 100 at the end
    assert a.probabilities(1.0, balanced=False)[0, 0].item() == pytest.approx(probability)
    for n in (2, 3, 10, 36):
        x, y = np.concatenate([[[-1], [-2]], rng.integers(0, 1 + n // 2, (2, n - 1))], axis=1)
        pairs = list(itertools.combinations(range(n), 2))
        total = sum(np.sign((x[i] - x[j]) * (y[i] - y[j])) for i, j in pairs)
        untied = math.prod(sum(v[i] != v[j] for i, j in pairs) for v in (x, y))
        assert kendall_tau(x, y) == pytest.approx(total / untied ** 0.5)
    found = [(10, 0.5), (20, 0.4), (30, 0.7), (40, 0.6), (10, 0.45), (50, 0.7)]
    results = [{"macs": macs, "val_acc": accuracy} for macs, accuracy in found]
    assert pareto(results, "val_acc") == [results[0], results[2]] and kendall_tau([1, 1], [1, 2]) is None


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
    np.testing.assert_allclose(chance_above(90, *found), [NormalDist(-m, d).cdf(-90) for m, d in zip(*found)], 0, 1e-9)


def test_it_starts_with_the_default_goes_on_by_the_bound_and_a_round_believes_its_own_means_and_keeps_to_a_budget():
    score, values, runs = np.array([config[0] / 10 for config in SPACE]), np.full(36, math.nan), np.zeros(36)
    for scores in ([], [score]):
        seen = [index for index, *_ in propose(SPACE, COSTS, scores, values, runs, 45e6, count=99)]
        assert SPACE[seen[0]] == (4, 3, 3) and sorted(seen) == np.flatnonzero(COSTS <= 45e6).tolist()
    values[seen[0]], runs[seen[0]] = 0.9, 1
    second, why, *_ = propose(SPACE, COSTS, [], values, runs)[0]
    assert (COSTS[second], why) == (sorted(COSTS)[-12], "two thirds up in cost")
    values[SPACE.index((7, 1, 2))], runs[SPACE.index((7, 1, 2))] = 0.92, 3
    twice, known, counts = believe(SPACE, COSTS, [score] * 2, values, runs), values.copy(), runs.copy()
    np.testing.assert_allclose(believe(SPACE, COSTS, [score], values, runs), twice)
    for index, why, *told in propose(SPACE, COSTS, [score], values, runs, count=4):
        mean, deviation = believe(SPACE, COSTS, [score], known, counts)
        chance = 1 - NormalDist(mean[index], deviation[index]).cdf(0.92)
        assert (index, why) == (np.where(np.isnan(known), mean + 0.5 * deviation, -math.inf).argmax(), "proposed")
        assert told == pytest.approx([mean[index], deviation[index], chance])
        known[index], counts[index] = mean[index], 1


def test_seeds_of_a_search_are_averaged_and_what_is_none_of_ours_is_named(capsys):
    others = {"image_size": 32}, {"data_digest": "1"}, {"dataset": "pets"}, {"stage": "single"}, {"scores": [0.7, 0.8]}
    for number, other in enumerate(others):
        made_up_search("x", number, **other)
    Path("x/5.json").write_text("[1]"), Path("x/6.json").write_text("{")
    for name, scores in (("a", (0.1, 0.2, 0.3)), ("a-seed1", (0.3, 0.2, 0.5)), ("b", (0.7, 0.8, 0.9))):
        made_up_search("x", name, scores, args={"models": name[0], "seed": len(name), "amp": name})
    args = Namespace(**dict(strict("x/a.json"), out=Path("x")))
    np.testing.assert_allclose(load_scores(args, pooling_configs(4, 2), ""), [[0.2, 0.2, 0.4], [0.7, 0.8, 0.9]])
    lines = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert lines == [*(f"x/{number}.json is left alone" for number in range(7)),
                     *(f"reading the scores of x/{name}.json" for name in ("a-seed1", "a", "b"))]


def test_an_epoch_is_fixed_by_its_seed_views_are_of_one_image_and_scoring_counts_every_image_once():
    images, split = torch.randint(0, 256, (20, 32, 32, 3), dtype=torch.uint8), noise(50)
    top, left, flip = torch.randint(0, 9, (20,)), torch.randint(0, 9, (20,)), torch.rand(20) < 0.5
    for got, image, y, x, f in zip(crop_and_flip(images, top, left, flip, 4), images.numpy(), top, left, flip):
        cut = np.pad(image, ((4, 4), (4, 4), (0, 0)))[y:y + 32, x:x + 32]
        assert np.array_equal(got.numpy(), cut[:, ::-1] if f else cut)
    everything, plain = normalise(split.pixels), list(training_batches(split, 8, CPU, seed=5, augment=False))
    first, again, other = (next(training_batches(split, 8, CPU, seed=seed))[0] for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)
    seen = [(everything == image).flatten(1).all(1).nonzero().item() for x, _ in plain for image in x]
    assert len(set(seen)) == 48 and [i % 4 for i in seen] == torch.cat([y for _, y in plain]).tolist()
    for found, wanted in zip(zip(*scoring_batches(split, 16, CPU)), (everything, split.labels)):
        assert torch.equal(torch.cat(found), wanted)
    assert evaluate(lambda x, y, config: config * (y == 0).float().mean(), split, 2, CPU, 16) == pytest.approx(26 / 50)
    split.pixels = torch.arange(50, dtype=torch.uint8)[:, None, None, None].expand(50, 32, 32, 3) + 100
    for x, y in training_batches(split, 8, CPU, seed=5, views=2):
        (one, two), middle = x.chunk(2), x[:, 0, 16, 16].chunk(2)  # which is never cut off, and tells the image
        assert torch.equal(*middle) and torch.equal((127.5 * middle[0] + 27.5).round().long() % 4, y)
        assert not torch.equal(one, two)


def picture(path, mode="RGB", size=(40, 30), seed=0):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def folder(root, classes=("cat", "dog"), n=4, test="test", size=(40, 30)):
    for (number, c), i in itertools.product(enumerate(classes), range(n + 2)):
        picture(Path(root, "train" if i < n else test, c, f"{i}.png"), seed=2 * i + number, size=size)
    return Path(root)


def test_images_of_every_kind_are_decoded_a_part_without_a_cache_and_changed_ones_leave_one_cache(monkeypatch):
    target, ramp, decoded = folder("pets", test="val") / "train/cat", 4 * np.arange(1024).reshape(32, 32), []
    for name, values in (("deep.png", ramp.astype(np.uint16)), ("real.tif", ramp.astype(np.float32) / 5000),
                         ("whole.tif", 1000 * ramp.astype(np.int32) - 1_000_000)):
        Image.fromarray(values).save(target / name)
        assert np.abs(read_image(target / name, 32) - 255 * ramp[..., None] / 4092).max() <= 1
    picture(target / "alpha.png", "RGBA"), picture(target / "print.jpg", "CMYK")
    Image.new("LA", (9, 9), (0, 0)).save("clear.png"), Image.new("P", (9, 9)).save("clear.gif", transparency=0)
    assert all(read_image(f"clear.{kind}", 8).min() == 255 for kind in ("png", "gif"))  # on white
    monkeypatch.setattr(common, "read_image", lambda *words: [decoded.append(words), read_image(*words)][1])
    part = load_dataset("pets", limit_train=6, limit_test=2)
    assert len(decoded) == 8 and not files("data")
    before, again = load_dataset("pets"), load_dataset("pets", limit_train=6, limit_test=2)
    assert len(decoded) == 8 + 17 and len(files("data/cache")) == 1 and before.classes == ["cat", "dog"]
    for mine, other in ((part.train, again.train), (part.test, again.test)):
        assert torch.equal(mine.pixels[mine.index], other.pixels[other.index])
    picture("pets/train/cat/0.png", seed=99), load_dataset(str(folder("other")))
    assert not torch.equal(load_dataset("pets").train.pixels, before.train.pixels)
    assert len(decoded) == 8 + 17 + 12 + 17 and len(files("data/cache")) == 2  # one of each folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    found, place = {}, tmp_path_factory.mktemp("whole")  # every stage alone: {stage: (JSON, seconds)}
    for stage, words in STAGES.items():
        began = time.monotonic()
        run(*words, "--out", made_up_search(place / stage))
        found[stage] = strict(place / stage / f"{stage}.json"), time.monotonic() - began
    return found


def test_the_four_stages(whole, monkeypatch):
    read = {stage: Path(f"runs/synthetic/{stage}.json") for stage in STAGES}
    out, before = run(*STAGES["single"])[0], files("runs/synthetic/single")
    assert "[2,2]" in out and f"wrote {read['single']}" in out and len(before) == 6  # a file and its weights each
    run("train_single.py", *TINY, "--config", "2,2", "--seed", "1")
    assert before.items() <= files("runs/synthetic/single").items()  # adds a run, trains nothing again
    single = strict(read["single"])
    alone = {(*r["config"], run["seed"]): run for r in single["results"] for run in r["runs"]}
    assert len(alone) == 4 and all(r["test_acc"] == pytest.approx(np.mean(r["halves"])) for r in alone.values())
    assert single["default"]["std"] == pytest.approx(np.std([alone[2, 2, seed]["test_acc"] for seed in (0, 1)], ddof=1))
    monkeypatch.setattr(common, "SYNTHETIC", (160, 60))
    test, network = load_dataset("synthetic", limit_train=96, limit_test=40).test, ResNet20(layers=4)
    network.load_state_dict(torch.load("runs/synthetic/single/3-1-seed0.pt")["learner"]["network"])
    correct = network.eval()(normalise(test.pixels[test.index]), (3, 1)).argmax(1) == test.labels
    assert correct.float().mean().item() == pytest.approx(alone[3, 1, 0]["test_acc"])
    run(*STAGES["supernet"])
    naive, truth = strict(read["supernet"]), {tuple(r["config"]): r["test_acc"] for r in single["results"]}
    assert naive["rank"]["regret"] == pytest.approx(max(truth.values()) - truth[tuple(naive["best"]["config"])])
    run(*STAGES["mixture"])
    mixture = strict(read["mixture"])
    assert np.allclose(np.sum(mixture["probabilities"], 0), 3 / 2, atol=0.01) and np.sum(mixture["trained"]) == 2 * 3
    run(*STAGES["mixture"], "--all-pairs")  # after the search has ended: scores, trains nothing
    again = strict(read["mixture"])
    assert again["history"] == mixture["history"] and again["results"] == mixture["results"]
    for r in again["results"]:
        row = again["configs"].index(r["config"])
        assert (r["val_acc"], r["steps"]) == (again["pairs"][row][r["model"]], sum(again["trained"][row]))
    out, _ = run("retrain.py", *TINY, "--runs", "1")
    assert "epoch" not in out and "gain" in out  # single.json knows all
    assert {f"reading the scores of {read[stage]}" for stage in ("mixture", "supernet")} <= set(out.splitlines())
    assert {key: run["halves"][1] for key, run in alone.items()} == {
        (*r["config"], run["seed"]): run["test_acc"] for r in strict(read["retrain"])["results"] for run in r["runs"]}
    for stage, data in ((stage, strict(path)) for stage, path in read.items()):
        assert data.keys() >= set("schema stage dataset image_size num_classes n_train n_val n_test data_digest space "
                                  "args env seconds classes results best default pareto history".split())
        assert data["best"] == max(data["results"], key=lambda r: r["test_acc" if stage == "single" else "val_acc"])
    assert whole["retrain"][0]["default"]["runs"][0]["test_acc"] == alone[2, 2, 0]["halves"][1]  # the same network
    assert "| mixture, M = 2 |" in run("results/report.py", "runs/synthetic")[0]  # no pictures of two resolutions


def test_propose_only_writes_nothing_and_a_budget_is_kept_by_the_cost_of_the_network_here():
    def what_is_next(*words):
        return run("retrain.py", *TINY, "--propose-only", *words)[0].splitlines()[-1]
    before = files(made_up_search("runs/synthetic"))  # which says: a single multiply-add each
    assert what_is_next() == "next: [2,2]" and what_is_next(*CHEAPEST) == "next: [1,3]"
    assert what_is_next("--image-size", "32", "--max-macs", count_macs((2, 2)) - 1) == "next: [1,3]"
    assert files("runs/synthetic") == before
    assert "nothing is trained yet" in run("retrain.py", *TINY, "--propose-only")[0]
    run("train_single.py", *TINY, "--config", "2,2", "3,1")
    assert what_is_next() == "next: [1,3]" and "nothing is" not in run("retrain.py", *TINY, "--propose-only")[0]
    assert what_is_next("--image-size", "32") == "next: [2,2]"  # what is known of other images does not count
    out, _ = run("retrain.py", *TINY, *CHEAPEST, "--runs", "2")  # no more of what is known and too expensive
    assert "training 1 of 4: [1,3]" in out  # six in all, of which two were taken over
    assert {path.stem for path in Path("runs/synthetic/retrain").glob("*.json")} == {"1-3-seed0", "1-3-seed1"}
    assert what_is_next() == "next: none"
    Path("old").mkdir(), save_json("old/retrain.json", {"args": {}, "history": [], "results": [
        {"config": [2, 2], "runs": [{"seed": 0, "test_acc": 0.5, "order": 1}]}]})
    finish(start("retrain.py", *TINY, "--propose-only", "--out", "old"), code=None)  # an earlier version: no traceback
    words = ["retrain.py", *TINY, "--trainings", "1", "--runs", "1", "--out", "new"]
    for limit in (CHEAPEST, []):  # then the default comes as a further seed only
        run(*words, *limit)
    assert strict("new/retrain.json")["default"]["why"] is None
    shutil.copytree("new", "twice"), run("train_single.py", *TINY, "--config", "1,3", "--seed", "1", "--out", "twice")
    assert "training 2 of 2: [3,1]" in run(*words, "--trainings", "2", "--out", "twice")[0]  # [1,3] counts once
    for name, change in (("2-2", {"halves": [1.0, 1.0]}), ("1-3", {"round": [1, 2]})):  # the best; of a stopped round
        save_json(f"new/retrain/{name}-seed0.json", {**strict(f"new/retrain/{name}-seed0.json"), **change})
    run(*words)
    assert strict("new/retrain.json")["best"]["config"] == [2, 2]
    assert "training 2" not in run(*words, *CHEAPEST, "--trainings", "3")[0]  # none is left for the rest of that round


def test_half_of_the_images_by_the_first_seeds_chooses_once_and_the_other_by_all_seeds_is_reported():
    words = ["retrain.py", *TINY, "--out", "x", "--trainings", "3"]
    assert run(*words, "--runs", "1")[0].startswith("no search here: going by positions and cost alone")

    def pretend(accuracies, *more):
        for name, pair in accuracies.items():
            path = Path(f"x/retrain/{name}.json")
            save_json(path, {**strict(path), "halves": list(pair), "test_acc": sum(pair) / 2})
        out, data = run(*words, *more)[0], strict("x/retrain.json")
        assert f"chose {show(data['best']['config'])};" in out
        return data["best"]["config"], *sorted((r["val_acc"], round(r["test_acc"], 6)) for r in data["results"])
    assert pretend({"1-3-seed0": (0.9, 0.1), "2-2-seed0": (0.8, 0.7), "3-1-seed0": (0.7, 1.0)})[0] == [1, 3]
    assert {path.stem for path in Path("x/retrain").glob("*.json")} == {
        "3-1-seed0", *(f"{config}-seed{seed}" for config in ("1-3", "2-2") for seed in range(3))}
    assert pretend({"1-3-seed1": (0.0, 0.4), "1-3-seed2": (0.1, 0.1), "2-2-seed1": (1.0, 1.0), "2-2-seed2": (1.0, 0.4)}
                   ) == ([1, 3], (0.7, 1.0), (0.8, 0.7), (0.9, 0.2))
    assert pretend({"2-2-seed0": (0.95, 0.7)}, *CHEAPEST)[0] == [1, 3]  # what is known and too expensive is not chosen


@pytest.mark.parametrize("way, steps, stopped", [
    ("--sampler cost --exponent 0.5", 36, False), ("--sampler fair", 36, False), ("--sampler boltzmann", 36, False),
    ("--sampler mcts", 36, True), ("--sampler tree", 36, False), ("--sampler mct-nas", 36, False),
    ("--sampler prioritized --pools 2 --pool-size 1", 108, True), ("--teach sandwich", 108, False),
    ("--sampler mcts --teach cross-path", 72, True), ("--split-at 0.34", 36, True),
    ("--models 2 --sampler cost --shared-epochs 1", 24, True)])  # of a mixture only the last two epochs count
def test_every_way_to_search_and_some_that_are_stopped_and_go_on(way, steps, stopped):
    stage = "mixture" if "models" in way else "supernet"
    words = [*STAGES[stage], "--epochs", "3", "--batch-size", "4", *way.split(), "--out"]
    run(*words, "x")
    trained = {tuple(r["config"]): r["steps"] for r in strict(f"x/{stage}.json")["results"]}
    assert sum(trained.values()) == steps and (steps < 108 or min(trained[1, 3], trained[3, 1]) >= 36)
    if stage == "supernet":
        weights = torch.load("x/supernet.pt")["learner"]["network"]
        assert any("copies" in name for name in weights) == ("split" in way) and extract_network(weights, [3, 1], [])
    if stopped:
        stop(*words, "stopped", epochs=2)
        assert f"{stage} goes on after epoch 2" in run(*words, "stopped")[0]
        assert timeless(Path(f"stopped/{stage}.json")) == timeless(Path(f"x/{stage}.json"))


@pytest.mark.parametrize("stage, dying", [("single", 0), ("retrain", 0), ("retrain", 1)])
def test_two_ranks_share_out_networks_without_a_shared_disk_and_go_on_where_one_died(stage, dying, whole):
    Path("other").mkdir()
    words, apart = [*STAGES[stage], *["--trainings", 3] * (stage == "retrain"), "--out"], lambda: os.chdir("other")
    run_two_ranks(*words, made_up_search("whole"), prepare=(None, apart))
    data, runs = strict(f"whole/{stage}.json"), list(Path().glob(f"**/whole/{stage}/*.json"))
    assert sorted(path.stem for path in runs) == sorted(  # each once
        f"{'-'.join(map(str, r['config']))}-seed{run['seed']}" for r in data["results"] for run in r["runs"])
    assert len(data["results"]) == 3 and {path.parts[0] for path in runs} == {"other", "whole"}
    if stage == "single":
        assert timeless(data["results"]) == timeless(whole[stage][0]["results"])
    else:
        assert sorted(r["order"] for r in data["results"]) == [1, 2, 3] and len(data["best"]["runs"]) == 2
    death = failing("common.save_checkpoint", None, 2)
    run_two_ranks(*words, made_up_search("stopped"), dying=dying,
                  prepare=[(death, apart), (None, lambda: [apart(), death()])][dying])
    assert list(Path("other" if dying else ".", "stopped").rglob("*.pt"))
    run_two_ranks(*words, "stopped", prepare=(None, apart))
    assert timeless(Path(f"stopped/{stage}.json")) == timeless(data) and not list(Path("other").glob(f"*/{stage}.json"))


@pytest.mark.parametrize("stage", ["supernet", "mixture"])
def test_two_ranks_search_with_two_seeds_and_end_when_too_few_configurations_are_left_for_both(stage, whole):
    run_two_ranks(*STAGES[stage], "--out", "two")
    run(*STAGES[stage], "--out", "one", "--seed", "1")
    both = timeless(Path(f"two/{stage}.json")), timeless(Path(f"two/{stage}-seed1.json"))
    assert both == (timeless(whole[stage][0]), timeless(Path(f"one/{stage}-seed1.json")))
    assert both[0]["results"] != both[1]["results"]
    run_two_ranks("retrain.py", *TINY, "--trainings", "9", "--runs", "1", "--out", "two", limit=30)
    assert len(strict("two/retrain.json")["results"]) == 3


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_random_moments_then_stopped_at_the_first_write_the_second_and_so_on_it_ends_the_same(stage, whole):
    def check_it_goes_on():
        run(*words)
        assert timeless(Path(f"x/{stage}.json")) == timeless(whole[stage][0]) and not list(Path("x").rglob("*.tmp"))
        shutil.rmtree("x"), made_up_search("x")
    words, disk = [*STAGES[stage], "--out", made_up_search("x")], OSError(28, "No space left on device")
    for moment in np.random.default_rng(0).uniform(0.2, 0.9, 4):  # of the time of a whole run
        started = start(*words)
        time.sleep(moment * whole[stage][1])
        started[0].kill()
        finish(started, code=None)
    for ends in ([(-signal.SIGKILL, None)], [(130, KeyboardInterrupt()), (2, disk)]):
        check_it_goes_on()
        for number in range(1, 99):
            code, error = ends[number % len(ends)]
            started = start(*words, prepare=failing("os.fsync os.replace os.unlink", error, number))
            out, err = finish(started, code=None)
            if "wrote" in out:
                break
            assert started[0].exitcode == code and ("No space left" in err) == (code == 2)
        assert number > 4
    check_it_goes_on()


@pytest.mark.parametrize("stage", STAGES)
def test_other_settings_are_refused_and_names_that_are_no_text_a_closed_pipe_and_a_single_pixel_are_not(stage):
    def nobody_reads():
        read, write = os.pipe()
        os.close(read)
        sys.stdout = open(write, "w")
    words = [*STAGES[stage], "--lr", "0.1", "--out", made_up_search("x")]
    stop(*words)
    before, err = files("x"), refused(*words, "--lr", "0.2", "--weight-decay", "0.1")
    assert "--lr (0.1 there, 0.2 here)" in err and "--weight-decay" in err and "--epochs" not in err
    assert "choose another --out, or delete the folder" in err and files("x") == before
    adapts = ["--sampler", "prioritized", "--batch-size", "1"] * (stage == "supernet")  # by losses
    err = refused(*words, "--lr", "1e38", "--out", made_up_search("y"), *adapts)
    assert "not finite in epoch" in err and "--lr" in err and not Path(f"y/{stage}.json").exists()
    name, classes = os.fsdecode(b"p\xe4ts"), ("cat", os.fsdecode(b"h\xfcnd"))
    deepest = ["--layers", "6", "--scales", "6"]
    run(*STAGES[stage], "--dataset", folder(name, classes), "--batch-size", "4", *deepest, prepare=nobody_reads)
    data = strict(f"runs/{name}/{stage}.json")
    assert (data["dataset"], data["classes"], data["best"]["config"]) == ("p\ufffdts", ["cat", "h\ufffdnd"], [1] * 6)


def test_the_same_images_elsewhere_go_on_and_others_of_the_same_name_are_not_mistaken_for_them():
    words = [*TINY[2:], "--batch-size", "4", "--epochs", "5", "--out", "x", "--dataset"]
    folder("pets"), stop("train_single.py", *words, "pets")
    Path("pets/train/cat/0.png").touch()
    shutil.copytree("pets", "copy/pets", copy_function=shutil.copy)  # with times of their own
    for place in (["pets"], ["copy/pets"], [Path("pets").resolve(), "--data-dir", "elsewhere"]):
        stop("train_single.py", *words, *place)
    assert "[2,2] goes on after epoch 4" in run("train_single.py", *words, "pets")[0]
    run("train_single.py", *words, "pets", "--out", "whole")
    assert timeless(Path("x/single.json")) == timeless(Path("whole/single.json"))
    run("search_supernet.py", *words, "pets")
    other = folder("other/pets", size=(41, 30))
    err = refused("search_supernet.py", *words, other)
    assert "other settings" in err and "--data-digest" not in err, err  # which is no option
    out, _ = run("retrain.py", *words, other, "--trainings", "1", "--runs", "1")
    assert "x/supernet.json is left alone" in out and "by positions and cost alone" in out
    assert "left alone, for they were trained with other images" in out and "training 1 of 1: [2,2], default" in out
    assert "not judged: x/single.json" in run("search_mixture.py", *words, other)[0]


def test_a_search_under_another_name_other_pools_and_a_truth_that_does_not_fit_are_no_hindrance(whole):
    words = [*STAGES["supernet"], "--out"]
    run(*words, "x")
    Path("x/supernet.json").rename("x/earlier.json"), Path("x/supernet.pt").unlink()
    stop(*words, "x", "--sampler", "mcts")
    out, _ = run(*words, "x", "--sampler", "mcts", "--pools", "2")
    assert "goes on after epoch 1" in out and len(strict("x/supernet.json")["budgets"]) == 2
    out, _ = run(*STAGES["retrain"], "--out", "x")
    assert {f"reading the scores of x/{name}.json" for name in ("earlier", "supernet")} <= set(out.splitlines())
    for truth in (RESULTS / "synthetic/single.json", RESULTS / PUBLISHED):
        Path(truth.stem).mkdir(), shutil.copy(truth, f"{truth.stem}/single.json")
        assert run(*words, truth.stem)[0].count("not judged") == 1
        assert timeless(Path(truth.stem, "supernet.json")) == timeless(whole["supernet"][0])
        assert "training 2 of 2" in run(*STAGES["retrain"], "--out", truth.stem)[0]
        assert "single" in refused(*STAGES["single"], "--out", truth.stem)


def test_a_run_keeps_its_precision_and_its_folder_and_says_what_is_damaged_or_cannot_be_read(monkeypatch):
    words = [word for word in STAGES["mixture"] if word not in ("--amp", "off")]
    stop(*words, "--amp", "bf16")
    for _ in range(2):  # from its checkpoint, then from its JSON
        assert "goes on" in run(*words, prepare=failing("timeit.repeat", AssertionError("measured")))[0]
        assert strict("runs/synthetic/mixture.json")["env"]["amp"] == "bf16"
    assert "--amp (bf16 there, off here)" in refused(*words, "--amp", "off")
    stop(*words, "--out", "two", "--seed", "1", "--amp", "bf16")
    run_two_ranks(*words, "--out", "two", prepare=[failing("timeit.repeat", AssertionError("measured"))] * 2)
    assert {strict(path)["env"]["amp"] for path in Path("two").glob("*.json")} == {"bf16"}
    full = failing("common.train_step", RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    assert "out of memory" in refused(*words, "--out", "full", "--amp", "off", prepare=full)
    monkeypatch.setattr("timeit.repeat", lambda *words, **options: [1])
    run("retrain.py", *words[1:-2], "--trainings", "1", "--out", made_up_search("x", args={"amp": "int8"}))
    assert strict("x/retrain.json")["env"]["amp"] == "off"
    other, checkpoint = start(*STAGES["supernet"], "--epochs", "500"), Path("runs/synthetic/mixture.pt")
    while "epoch 1" not in Path(other[1][0].name).read_text():
        time.sleep(0.01)
    assert "in use" in refused(*words)
    other[0].kill()
    finish(other, -signal.SIGKILL), run(*words)
    for function, error in itertools.product(("json.loads", "torch.load"), (OSError(5, "I/O error"), MemoryError())):
        err = refused(*words, prepare=failing(function, error))
        assert "damaged" not in err and ("I/O error" in err or "out of memory" in err)
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    assert "mixture.pt is damaged" in refused(*words)


MADE = "--dataset synthetic --device cpu"
BAD = [(f"{script} {case}", case.split()[0]) for script, cases in {  # what is typed, and what the line must say
    "train_single.py": "--limit-train 0, --limit-test -1, --lr 0, --lr nan, --weight-decay -1, --seed -1, --warm-up 5",
    "search_supernet.py": "--sampler best, --pools 0, --image-size 48, --device gpu, --device cuda:77, --split-at 2, "
                          f"--pools 37 {MADE}, --exponent 0 {MADE}, --split-at 0.5 --teach cross-path {MADE}",
    "search_mixture.py": "--model 4, --models 0, --epochs 0, --epochs ten, --scales 7, --layers 2, --amp int8, "
                         f"--shared-epochs 2 --epochs 2 {MADE}, --batch-size 64 --limit-train 40 {MADE}",
    "retrain.py": f"--runs 0, --trainings 0, --max-macs 0, --max-macs lots, --max-macs 1k {MADE}",
    "results/report.py": "empty"}.items() for case in cases.split(", ")] + [
    (f"train_single.py {MADE} --config 4,3,3 9,1", "10 in all"), ("search_mixture.py --dataset empty", "train/"),
    (f"train_single.py {MADE} --limit-train 64 --epochs 1 --limit-test 1", "--limit-test"),
    ("search_mixture.py --dataset odd", "bird"), ("search_mixture.py --dataset damaged",
     "4 files.*cut.jpg.*drawing.jpg .cannot identify.*notes.jpg.*pipe.png .no regular")]


@pytest.mark.parametrize("command, message", BAD, ids=[command for command, _ in BAD])
def test_bad_input_is_one_line_and_touches_nothing(command, message):
    folder("odd", n=1), folder("damaged", n=1), Path("empty").mkdir()
    Path("odd/test/dog").rename("odd/test/bird")
    Path("damaged/test/dog/cut.jpg").write_bytes(Path("damaged/test/dog/2.png").read_bytes()[:1500])
    Image.new("RGB", (40, 30)).save("damaged/train/cat/drawing.jpg", "EPS")  # which is a program
    Path("damaged/train/cat/notes.jpg").write_text("no image"), os.mkfifo("damaged/train/dog/pipe.png")
    before, err = files("."), refused(*command.split())
    assert re.search(message, err) and files(".") == before, err


def test_the_tables_in_the_readme_are_the_files():
    lines = set((RESULTS / "README.md").read_text().splitlines())
    truths = [{tuple(r["config"]): r["test_acc"] for r in strict(path)["results"]}
              for path in (RESULTS / PUBLISHED, RESULTS / "cifar10-jpeg/ten-thousand/single.json")]
    searches = [search for search in map(strict, sorted((RESULTS / "cifar10").rglob("*.json")))
                if search["stage"] in ("supernet", "mixture")]
    assert searches and not set(report.owners_table(searches)) - lines
    for truth in truths:
        assert not set(report.table(searches, truth)) - lines


def test_the_report_and_in_it_a_right_search_finds_the_best_soon_and_exposure_is_of_the_whole_space():
    Path("x").mkdir()
    for file in "cifar10-jpeg/single.json", "cifar10/fifty-thousand/long/uniform-seed2.json":
        shutil.copy(RESULTS / file, "x")
    out, _ = run("results/report.py", "x", "--truth", RESULTS / PUBLISHED)
    assert all(f"| 50000 | 19500 | [4,2,4] | {tau} " in out for tau in ("0.38", "0.37"))  # by each of the truths
    assert out.endswith("pip install matplotlib\n") or {"x/pooling.png", "x/searches.png"} <= files("x").keys()
    Path("alone").mkdir(), shutil.copy(RESULTS / "synthetic/retrain.json", "alone")  # stage 4 without any search
    out, _ = run("results/report.py", "alone")
    assert out.endswith("pip install matplotlib\n") or "alone/retrain.png" in files("alone")
    truth = {(a, b, c): 0.9 - 0.002 * ((a - 6) ** 2 + (b - 2) ** 2) for a, b, c in SPACE}
    right, four, chance = (report.simulate(truth, [truth], rule, trainings=6, draws=5, noise=0, at_once=at_once)
                           for rule, at_once in (("process", 1), ("process", 4), ("in random order", 1)))
    for regrets in (right, four):
        assert regrets.shape == (5, 6) and regrets[:, 5].mean() < chance[:, 5].mean() and (np.diff(regrets) <= 0).all()
    results = [{"config": list(c), "macs": COSTS[i], "val_acc": math.cos(i)} for i, c in enumerate(SPACE)]
    known = [i for i, c in enumerate(SPACE) if c[0] != 4]
    figures = report.figures_of(results, {SPACE[i]: truth[SPACE[i]] for i in known})
    assert figures[1] == pytest.approx(kendall_tau(np.cos(known), exposure(SPACE)[known]))
    mixture = strict(RESULTS / "cifar10/fifty-thousand/long/mixture-seed0.json")
    score, owner = ({tuple(r["config"]): r[key] for r in mixture["results"]} for key in ("val_acc", "model"))
    near = [(c, (a, b, 10 - a - b)) for c in SPACE for a, b in ((c[0] + 1, c[1] - 1), (c[0], c[1] + 1))]
    middle, late = ([score[c] for c in SPACE if c[0] in some] for some in ((3, 4), (6, 7, 8)))
    assert report.owners(mixture) == pytest.approx([
        100 * (np.mean(middle) - np.mean(late)), np.mean([max(row) for row in mixture["probabilities"]]),
        np.mean([owner[one] == owner[two] for one, two in near if two in owner])])


def test_images_are_turned_upright():
    wide, turned = np.zeros((20, 40, 3), np.uint8), Image.Exif()
    wide[:, :20] = 255  # left half white; the tag says: turn it by 90 degrees clockwise, so white goes to the top
    turned[0x0112] = 6
    Image.fromarray(wide).save("turned.jpg", exif=turned, quality=95)
    upright = read_image("turned.jpg", 32)
    assert upright[:12].mean() > 230 and upright[-12:].mean() < 25


def test_every_way_is_compared_and_no_run_is_repeated():
    truth = {tuple(r["config"]): r["test_acc"] for r in strict(RESULTS / "synthetic/single.json")["results"]}

    def pretended_runs():
        def search(command, **options):
            out, seed = (command[command.index(name) + 1] for name in ("--out", "--seed"))
            results = [{"config": list(c), "macs": int(cost), "val_acc": truth[c] if "cost" in command else -truth[c],
                        "steps": 1 + ("cost" in command)} for c, cost in zip(SPACE, COSTS)]
            settings = {"seed": int(seed), "batch_size": 100, "amp": "off"}
            save_json(Path(out, "supernet.json"), {"stage": "supernet", "args": settings, "n_train": 900,
                                                   "history": [{}] * 4, "results": results})
            return Namespace(returncode=0)
        importlib.import_module("subprocess").run = search
    words = ["results/compare.py", "--truth", RESULTS / "synthetic/single.json", "--ways", "uniform", "cost", "--seeds",
             "1", "--epochs", "10", "--amp", "off"]
    out, _ = run(*words, prepare=pretended_runs)
    # 36 steps are counted: uniform draws each configuration once, so a step costs 1; twice as often costs 2
    assert "| cost | 1 | 10 | 1.00 |" in out and "| cost | 1 | 5 | 1.00 |" in out
    assert {path.parent.parent.name for path in Path("runs/compare/synthetic").glob("*/*/*.json")} == {
        "uniform-epochs10", "cost-epochs10", "cost-epochs5"}
    again, _ = run(*words, prepare=failing("subprocess.run", AssertionError("run again")))
    table = [[line for line in text.splitlines() if line.startswith("|")] for text in (out, again)]
    assert table[0] == table[1] and "name that with --amp" in refused(*words[:-1], "bf16")


@pytest.mark.parametrize("layers, scales", [(10, 3), (7, 4), (5, 1), (3, 3)])
def test_proposals_never_repeat_and_keep_to_the_budget(layers, scales):
    space = pooling_configs(layers, scales)
    macs, runs = np.array([count_macs(config) for config in space]), np.zeros(len(space))
    for limit, scores, count in itertools.product((math.inf, np.median(macs)), ([], [0 * macs], [macs, -macs]), (1, 3)):
        values, seen = np.full(len(space), math.nan), []
        while proposals := propose(space, macs, scores, values, runs, limit, count):
            for index, *_ in proposals:
                values[index] = len(seen) % 4 / 4
                seen.append(index)
        assert len(seen) == len(set(seen)) and set(seen) == set(np.flatnonzero(macs <= limit))


def test_every_prefix_of_the_shuffle_is_balanced_halves_are_stratified_and_seeds_differ():
    labels = torch.tensor([0] * 50 + [1] * 31 + [2] * 19)
    order = balanced_order(labels)
    assert sorted(order.tolist()) == list(range(100))
    for n in range(1, 101):
        share = torch.bincount(labels[order[:n]], minlength=3) - n * torch.tensor([0.50, 0.31, 0.19])
        assert share.abs().max() <= 1.5
    one, two = halves(Split(torch.zeros(100, 1, 1, 3), torch.arange(100), labels), seed=3)
    assert sorted(one.index.tolist() + two.index.tolist()) == list(range(100))
    assert (torch.bincount(one.labels) - torch.bincount(two.labels)).abs().max() <= 1
    parts = [("weights", 0, 0), ("weights", 0), ("weights", 0, 1), ("weights", 1, 0), ("order", 0, 0), ("weights", 10)]
    assert len({derive_seed(*p) for p in parts}) == 6 and derive_seed("a", 1) == derive_seed("a", 1) >= 0


def unpack(place, kind):
    """CIFAR's files with 20 images each, or Food-101's layout with two classes of seven."""
    place.mkdir(parents=True)
    if kind == torchvision.datasets.Food101:
        (place / "meta").mkdir()
        for part, ids in (("train", range(5)), ("test", range(5, 7))):
            names = {c: [f"{c}/{i}" for i in ids] for c in ("apple_pie", "waffles")}
            save_json(place / "meta" / f"{part}.json", names)
            for name in itertools.chain(*names.values()):
                picture(place / "images" / f"{name}.jpg", size=(200, 150))
        return
    content = {"data": np.zeros((20, 3072), np.uint8), "labels": [0, 1] * 10, kind.meta["key"]: list(range(10))}
    for file, _ in [*kind.train_list, *kind.test_list, (kind.meta["filename"], None)]:
        (place / file).write_bytes(pickle.dumps(content))


@pytest.mark.parametrize("name, place, kind, method", [
    ("cifar10", "cifar-10-batches-py", torchvision.datasets.CIFAR10, "download"),
    ("cifar100", "cifar-100-python", torchvision.datasets.CIFAR100, "download"),
    ("food101", "food-101", torchvision.datasets.Food101, "_download")])
def test_an_archive_unpacked_in_part_is_unpacked_again(name, place, kind, method, monkeypatch):
    def interrupted(self):
        Path(self.root, place, "half").mkdir(parents=True)
        if killed:
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("connection lost")
    words = ["train_single.py", "--dataset", name, *TINY[2:]]
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, *words: os.path.exists(path))
    monkeypatch.setattr(kind, method, interrupted)
    for killed in (False, True):
        assert run(*words, code=-signal.SIGKILL) if killed else "connection lost" in refused(*words)
        assert not Path("data", place).exists()
    monkeypatch.setattr(kind, method, lambda self: unpack(Path(self.root, place), kind))
    assert len(load_dataset(name).test) == (4 if name == "food101" else 20) and not Path("data", place, "half").exists()


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
    assert timeless(Path("one/mixture.json")) == timeless(Path("two/mixture.json")) and len(files("fresh")) == 1


# ---- steps: after all that forks, since where there is a GPU they start threads --------------------------------------

def test_a_step_is_plain_sgd_and_a_learner_goes_on_from_its_state():
    net, twin, again = (ResNet20(classes=4, layers=4).double() for _ in range(3))
    x, y = torch.randn(8, 3, 32, 32, dtype=torch.float64), torch.arange(8) % 4
    twin.load_state_dict(net.state_dict())
    learner, later = (Learner(each, CPU, weight_decay=0.01) for each in (net, again))
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
        assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(learner.network.parameters(), twin.parameters()))
    later.load_state_dict(learner.state_dict())
    assert torch.equal(*(each.train(x, y, (3, 1), 0.1) for each in (learner, later)))
    assert all(map(torch.equal, again.parameters(), net.parameters()))
    assert torch.equal(learner.score(x, y, (2, 2)), (net.eval()(x, (2, 2)).argmax(1) == y).float().mean())


def test_the_losses_against_their_formulas():
    network, twin = (ResNet20(classes=4, layers=4, norm="shared").double() for _ in range(2))
    x, y, weights = torch.randn(16, 3, 32, 32, dtype=torch.float64), torch.arange(16) % 4, list(network.parameters())

    def kl(told, logits):
        p, q = told.detach().softmax(1), logits.softmax(1)
        return (p * (p / q).log()).sum() / len(p)

    def check(found, wanted):
        assert found[0].item() == pytest.approx(wanted[0].item(), abs=1e-5)
        assert torch.allclose(found[1].double(), wanted[1], atol=1e-5)  # the logits
        for mine, other in zip(torch.autograd.grad(found[0], weights), torch.autograd.grad(wanted[0], weights)):
            assert torch.allclose(mine, other, atol=1e-4)
    paths = (2, 1, 1), (1, 1, 2), (1, 2, 1)  # the largest, the smallest, the drawn one
    one, two, three = (network(x, path) for path in paths)
    check(sandwich_loss(network, x, y, paths), (F.cross_entropy(one, y) + kl(one, two) + kl(one, three), three))
    for steps, rate in ((10, 0.01), (5000, 0.001)):
        cross, (view, other), labels = CrossPathLoss(network, steps), x.chunk(2), y[:8]
        twin.load_state_dict(network.state_dict())
        for step in range(1, 4):
            with torch.no_grad():
                for p, q in zip(weights, twin.parameters()):
                    p += 0.05 * torch.randn_like(p)  # as a step would
                    q += rate * (p - q)
            one, two = network(view, paths[0]), network(other, paths[1])
            crossed = kl(twin(other, paths[1]), one) + kl(twin(view, paths[0]), two)
            wanted = F.cross_entropy(one, labels) + F.cross_entropy(two, labels) + min(1, 5 * step / steps) * crossed
            check(cross(network, x, labels, paths[:2]), (wanted / 2, one))


def test_weights_for_each_resolution_begin_equal_and_train_apart_and_a_path_is_extracted():
    split, path, (shared, network) = noise(128), (2, 5, 3), (ResNet20(classes=4, norm="shared") for _ in range(2))
    network.load_state_dict(shared.state_dict())
    split_by_resolution(network, 3, 32)
    assert [sorted(map(int, layer.copies)) for layer in network.layers] == [
        [0], [0, 1], *[[0, 1, 2]] * 6, [1, 2], [2]]  # 24 copies
    before, (x, y) = {k: v.clone() for k, v in network.state_dict().items()}, next(training_batches(split, 128, CPU, 1))
    with torch.no_grad():
        assert all(torch.equal(network(x[:8], config), shared(x[:8], config)) for config in SPACE)
    Learner(network, CPU).train(x[:32], y[:32], path, 0.1)
    weights, whole = network.state_dict(), shared.state_dict()
    used = [f"layers.{layer}.copies.{r}." for layer, r in enumerate(np.repeat(range(3), path))] + ["head."]
    own = {re.sub(r"copies.\d.", "", name): value for name, value in weights.items() if name.startswith(tuple(used))}
    assert all(torch.equal(weights[name], before[name]) != name.startswith(tuple(used)) for name in weights)
    for source, wanted in ((weights, own), (whole, whole)):  # split or not
        found = (single := extract_network(source, path, [(x, y)], classes=4)).state_dict()
        assert len(wanted) == len(whole) and all(torch.equal(found[name], wanted[name]) for name in wanted)
    with torch.no_grad():  # one image as a batch, and much as the SuperNet does with the statistics of a batch
        assert torch.allclose(single(x)[:32], torch.cat([single(image[None]) for image in x[:32]]), atol=1e-4)
        assert F.cosine_similarity(single(x), shared(x, path), dim=1).mean() > 0.9
    for other in (weights | {"more": x}, dict(list(whole.items())[1:]), ResNet20(layers=4).state_dict()):
        with pytest.raises(ValueError, match="another network"):
            extract_network(other, path, [], classes=4)


def test_a_first_step_that_fp16_skips_leaves_momentum_zero():
    factor = [math.inf, 1.0]

    def overflowing(network, x, y, config):
        loss, logits = label_loss(network, x, y, config)
        return loss * factor.pop(0), logits
    learner = Learner(ResNet20(classes=4, layers=4), CPU, "fp16", loss=overflowing)
    weights = list(learner.network.parameters())
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
    monkeypatch.setattr("timeit.repeat", lambda step, **options: [step() is None or 1 + (used[-1] != faster)])
    assert common.pick_amp("auto", CPU) == faster and {"off", "bf16"} <= set(used)
    assert f"--amp {faster}" in capsys.readouterr().out and common.pick_amp("bf16", CPU) == "bf16"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_take_the_steps_that_eager_ones_take_and_a_failing_capture_goes_on_eagerly(monkeypatch, capsys):
    split, device, found = noise(256), torch.device("cuda"), []
    for graphed in (common.graphed, lambda step, device: step):
        monkeypatch.setattr(common, "graphed", graphed)
        torch.manual_seed(0)
        learner = Learner(ResNet20(classes=4, layers=4), device)
        for step in range(12):
            x, y = next(training_batches(split, 64, device, seed=step))
            learner.train(x, y, ((2, 2), (3, 1))[step % 2], 0.1 / (1 + step))  # the rate must reach the graph
            assert learner.score(x, y, (2, 2)).item() <= 1
        found.append(torch.cat([p.detach().flatten() for p in learner.network.parameters()]))
    assert (found[0] - found[1]).abs().max() < 1e-3 and common.graph_place(device).works
    monkeypatch.undo()
    for _ in range(2):  # what fails once is not tried again
        step = common.graphed(lambda x, y: x * x.sum().item(), device)  # item() waits, so that capturing fails
        for x in torch.arange(4.0, device=device)[:, None].expand(4, 8):
            assert torch.equal(step(x, x), 8 * x * x)
    assert len(capsys.readouterr().out.splitlines()) == 1
