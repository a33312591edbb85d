"""Tests of what goes beyond the paper, with the helpers of test_smoke.py.

    python -m pytest -q extras

As there, every test that runs a script stands before those that train in this process.
"""
import itertools
import math
import os
import time
from functools import partial
from pathlib import Path
from statistics import NormalDist

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: a fork of many threads would hang
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asks for a GPU without starting CUDA, which no fork survives

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common import (Learner, ResNet20, batch_statistics_norm, config_text, count_macs, pooling_configs, save_json)
from extras import boltzmann, cross_path, mct_nas, mcts, pss_net, resolution_norms, split_by_resolution
from extras.propose import believe, chance_above, gaussian_process, propose
from test_smoke import (COSTS, CPU, SPACE, TINY, agrees, ends_the_same_however_it_is_stopped, failing,  # noqa: F401
                        files, in_an_empty_folder, made_up_search, refused, run, run_two_ranks, stop, strict, timeless)

METHODS = {"boltzmann": 1, "mcts": 1, "mct_nas": 1, "cross_path": 2, "pss_net --pools 2 --pool-size 1": 3,
           "pss_net --sampler uniform --seed 4": 3, "split_by_resolution --split-at 0": 1,
           "split_by_resolution --sampler cost": 1, "resolution_norms --sampler cost": 1}  # configurations of a step

PROPOSE = ["extras/propose.py", *TINY, "--trainings", "3", "--runs", "2"]
CHEAPEST = ["--max-macs", count_macs((1, 3), image_size=16)]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_leaves_its_json_and_stopped_after_an_epoch_it_ends_the_same(method):
    stage, *options = method.split()
    name = f"{stage}-seed4" if "--seed" in method else stage
    words = [f"extras/{stage}.py", *TINY, "--limit-train", "160", "--batch-size", "2", *options, "--out"]
    run(*words, "x")
    found, weights = strict(f"x/{name}.json"), torch.load(f"x/{name}.pt")["learner"]["network"]
    assert found["stage"] == stage and found["rank"] is None
    assert sum(r["steps"] for r in found["results"]) == METHODS[method] * 2 * 40  # an epoch is more than a block
    assert any("copies" in key for key in weights) == (stage == "split_by_resolution")
    stop(*words, "stopped")
    assert f"{name} goes on after epoch 1" in run(*words, "stopped")[0]
    assert timeless(Path(f"stopped/{name}.json")) == timeless(Path(f"x/{name}.json"))
    if stage == "pss_net":
        scores = {tuple(r["config"]): r["val_acc"] for r in found["results"]}
        assert [b["val_acc"] for b in found["budgets"]] == [scores[tuple(b["config"])] for b in found["budgets"]]
        assert len(found["budgets"]) == (2 if "--pools" in method else 3)
        assert pss_net.extract_network(weights, (3, 1), [torch.randn(4, 3, 16, 16)], ResNet20(10, 16, 4))


def test_propose_only_writes_nothing_runs_of_other_scripts_count_and_a_budget_is_kept():
    def what_is_next(*words):
        return run(*PROPOSE, "--propose-only", *words)[0].splitlines()[-1]
    before = files(made_up_search("runs/synthetic"))
    assert what_is_next() == "next: [2,2]" and what_is_next(*CHEAPEST) == "next: [1,3]"
    assert files("runs/synthetic") == before
    run("train_single.py", *TINY, "--config", "2,2"), run("retrain.py", *TINY, "--runs", "1")  # which trains [3,1]
    assert what_is_next() == "next: [1,3]" and what_is_next("--lr", "0.1") == "next: [2,2]"
    assert "training 1 of 1: [1,3]" in run(*PROPOSE, *CHEAPEST)[0]
    assert [r["config"] for r in strict("runs/synthetic/propose.json")["results"]] == [[1, 3]]
    assert what_is_next() == "next: none" and "epoch" not in run(*PROPOSE, "--runs", "1")[0]
    assert {tuple(r["config"]): (r["why"], r["order"]) for r in strict("runs/synthetic/propose.json")["results"]} == {
        (1, 3): ("proposed", 1), (2, 2): ("single.json", None), (3, 1): ("retrain.json", None)}
    before = files(".")
    for words in ("--runs 0", "--trainings 0", "--max-macs lots", "--max-macs nan", "--max-macs 1k", "--lr 0.1"):
        assert words.split()[0] in refused(*PROPOSE, *words.split()) and files(".") == before


def test_half_of_the_images_chooses_by_the_first_seeds_and_the_other_is_reported_by_all():
    words = [*PROPOSE, "--out", "x", "--runs", "3"]
    assert "training 2 of 3: [3,1], two thirds up in cost" in run(*words, "--runs", "1")[0]
    for pretended, best, reported in (
            ({"1-3-seed0": (0.9, 0.1), "2-2-seed0": (0.8, 0.7), "3-1-seed0": (0.7, 1.0)}, [1, 3], None),
            ({"1-3-seed1": (0.0, 0.4), "1-3-seed2": (0.1, 0.1), "2-2-seed1": (1.0, 1.0), "2-2-seed2": (1.0, 0.4)},
             [1, 3], {(0.7, 1.0), (0.8, 0.7), (0.9, 0.2)})):
        for name, pair in pretended.items():
            path = Path(f"x/propose/{name}.json")
            save_json(path, {**strict(path), "halves": pair})
        out, data = run(*words)[0], strict("x/propose.json")
        assert data["best"]["config"] == best and f"chose {config_text(best)};" in out and data["n_val"] == 20
        assert reported in (None, {(r["val_acc"], round(r["test_acc"], 6)) for r in data["results"]})
        assert {path.stem for path in Path("x/propose").glob("*.json")} == {
            "3-1-seed0", *(f"{config}-seed{seed}" for config in ("1-3", "2-2") for seed in range(3))}


def test_it_ends_the_same_however_it_is_stopped():
    words, began = [*PROPOSE, "--epochs", "1"], time.monotonic()
    run(*words, "--out", made_up_search("whole"))
    data = strict("whole/propose.json")
    assert sorted(r["order"] for r in data["results"]) == [1, 2, 3] and len(data["best"]["runs"]) == 2
    ends_the_same_however_it_is_stopped(words, "propose", data, time.monotonic() - began)


@pytest.mark.parametrize("dying", [0, 1])
def test_two_ranks_train_a_proposal_each_and_go_on_where_one_died(dying):
    def accuracies(out):
        return {tuple(r["config"]): (r["val_acc"], r["test_acc"], len(r["runs"]))
                for r in strict(f"{out}/propose.json")["results"]}
    Path("other/two").mkdir(parents=True), Path("other/stopped").mkdir()
    apart, death = lambda: os.chdir("other"), failing("common.save_checkpoint", None, 2)
    run(*PROPOSE, "--out", made_up_search("one"))
    run_two_ranks(*PROPOSE, "--out", made_up_search("two"), prepare=(None, apart))
    assert sorted(r["order"] for r in strict("two/propose.json")["results"]) == [1, 2, 3]
    run_two_ranks(*PROPOSE, "--out", made_up_search("stopped"), dying=dying,
                  prepare=[(death, apart), (None, lambda: [apart(), death()])][dying])
    run_two_ranks(*PROPOSE, "--out", "stopped", prepare=(None, apart))
    assert accuracies("one") == accuracies("two") == accuracies("stopped")
    assert len(list(Path().glob("**/stopped/propose/*.json"))) == sum(n for *_, n in accuracies("stopped").values())


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
    example = np.array([0, -0.5]), np.array([[0], [-1]]), np.array([[4, 7], [5, 7]]), np.array([90, math.nan])
    (_, mean), (_, deviation) = gaussian_process(*example, np.full(2, 0.2), 2.5)  # the one beside the prior
    assert (mean, round(deviation, 2), chance_above(90, mean, deviation).round(2)) == (89.5, 0.80, 0.27)


def test_proposals_start_with_the_default_and_go_on_by_the_bound_and_a_round_believes_its_own_means():
    score, values, runs = np.array([config[0] / 10 for config in SPACE]), np.full(36, math.nan), np.zeros(36)
    first, second, third = (SPACE.index(config) for config in ((4, 3, 3), (7, 1, 2), (1, 1, 8)))
    assert {propose(SPACE, COSTS, scores, values, runs)[0][:2] for scores in ([], [score])} == {(first, "default")}
    values[first], runs[first] = 0.9, 1
    index, why, *_ = propose(SPACE, COSTS, [], values, runs)[0]
    assert (COSTS[index], why) == (sorted(COSTS)[-12], "two thirds up in cost")
    values[[second, third]], runs[[second, third]] = (0.92, 0.85), (3, 1)
    twice, known, counts = believe(SPACE, COSTS, [score] * 2, values, runs), values.copy(), runs.copy()
    np.testing.assert_allclose(believe(SPACE, COSTS, [score], values, runs), twice)
    for index, why, *told in propose(SPACE, COSTS, [score], values, runs, count=4):
        mean, deviation = believe(SPACE, COSTS, [score], known, counts)
        chance = 1 - NormalDist(mean[index], deviation[index]).cdf(0.92)
        assert (index, why) == (np.where(np.isnan(known), mean + 0.5 * deviation, -math.inf).argmax(), "proposed")
        assert told == pytest.approx([mean[index], deviation[index], chance])
        known[index], counts[index] = mean[index], 1


@pytest.mark.parametrize("layers, scales", [(10, 3), (7, 4), (5, 1), (3, 3)])
def test_proposals_never_repeat_and_keep_to_the_budget(layers, scales):
    space = pooling_configs(layers, scales)
    macs, runs = np.array([count_macs(config) for config in space]), np.zeros(len(space))
    for limit, scores, count in itertools.product((math.inf, np.median(macs)), ([], [macs, -macs]), (1, 3)):
        values, seen = np.full(len(space), math.nan), []
        while proposals := propose(space, macs, scores, values, runs, limit, count):
            seen += [index for index, *_ in proposals]
            values[seen] = np.arange(len(seen)) % 4 / 4
        assert sorted(seen) == np.flatnonzero(macs <= limit).tolist()


def test_boltzmann_draws_by_rewards_and_temperature_and_in_a_tree_equal_rewards_mean_uniform_draws():
    rng, rewards = np.random.default_rng(0), np.array([0.1, 0.2, 0.3])
    flat, even = boltzmann.Boltzmann(3), mcts.Tree(SPACE, explore=0.0)
    flat.update(drawn := flat.draw(3, 0.0, rng), rewards[drawn].tolist())  # each once
    for progress, temperature in ((0.0, 0.7), (0.5, 0.7 * 70 ** -0.5), (1.0, 0.01)):
        assert agrees(flat.draw(6000, progress, rng), np.exp(rewards / temperature))
    flat.update([2, 2], [0.5, 1.0])
    assert flat.means == pytest.approx([0.1, 0.2, 0.9 * 0.32 + 0.1])
    for _ in range(30):
        even.update(even.draw(36, 0.7, rng), [0.5] * 36)
    assert agrees(even.draw(9000, 0.1, rng), np.ones(36))


@pytest.mark.parametrize("kind, explore, shared", [(mcts.Tree, 1, 0), (mct_nas.LossTree, 0.05, 0.2)])
def test_trees_against_the_list_of_all_that_was_drawn(kind, explore, shared):
    def running(values, keep=0.9):
        return list(itertools.accumulate(values, lambda mean, value: keep * mean + (1 - keep) * value))
    tree, rng, seen, told = kind(pooling_configs(5, 3)), np.random.default_rng(0), [], []
    below = {(): range(6), (1,): (0, 1, 2), (2,): (3, 4), (3,): (5,), (1, 2): (0,), (1, 3): (1,), (1, 4): (2,),
             (2, 3): (3,), (2, 4): (4,)}  # of each node; [3,1,1] has no sibling at its second cut
    same = {(3,): (1, 3), (4,): (2, 4)}  # those with the same second cut, by that cut
    for steps in (1, 2, 5, 36, 36):
        drawn, losses = tree.draw(steps, 0.1, rng), rng.uniform(0.5, 2, steps).tolist()
        tree.update(drawn, losses)
        seen, told = seen + drawn, told + losses
        rewards = [mean / loss for mean, loss in zip(running(told, 0.95), told)] if shared else told
        for node, temperature in itertools.product([(), (1,), (2,)], (0.7, 0.05)):
            children = [child for child in below if child and child[:-1] == node]
            visits = [sum(leaf in below[child] for leaf in seen) for child in children]
            weights = [n == 0 for n in visits]
            for number, child in enumerate(children if 0 not in visits else []):
                own, others = (running([r for i, r in zip(seen, rewards) if i in part])[-1]
                               for part in (below[child], same.get(child[1:], below[child])))
                value = own + explore * math.sqrt(math.log(sum(visits)) / visits[number]) + shared * others
                weights[number] = len(below[child]) * math.exp(value / temperature)
            np.testing.assert_allclose(tree.probabilities(node, temperature), np.divide(weights, sum(weights)))


def test_pools_draw_a_class_first_explore_until_they_are_full_and_forget_what_leaves_them():
    sampler, rng, p = pss_net.Pools(COSTS, 5, 2), np.random.default_rng(0), np.zeros(36)
    costs, first = [COSTS[i] for i in sampler.classes], sampler.classes[0]
    assert all(max(a) <= min(b) for a, b in zip(costs, costs[1:])) and sorted(map(len, costs)) == [7, 7, 7, 7, 8]
    for members in sampler.classes:
        p[members] = 1 / len(members)
    sampler.update(first[:1], [1.0])
    assert agrees(sampler.draw(20_000, 1.0, rng), p)  # one of two: not full
    for told, losses, kept in ((first[1:3], [3.0, 2.0], [first[0], first[2]]), (first[:2], [2.0, 1.5], first[:2])):
        sampler.update(told, losses)
        assert [*sampler.pools[0]] == kept
    assert [*sampler.pools[0].values()] == pytest.approx([-1.1, -1.5])
    level = 0.01 ** 0.25  # the temperature, and the part of the draws that explores
    weights = np.exp(np.array([-1.1, -1.5]) / level)
    p[first] = level / len(first)
    p[first[:2]] += (1 - level) * weights / weights.sum()
    assert agrees(sampler.draw(20_000, 0.25, rng), p)


def test_partners_differ_and_two_views_are_of_one_image():
    far = {i for i, (a, b, _) in enumerate(SPACE) if abs(a - 3) + abs(a + b - 6) >= 2}  # from [3,3,4]
    rng, middle = np.random.default_rng(0), SPACE.index((3, 3, 4))
    assert {cross_path.partner(middle, SPACE, rng) for _ in range(600)} == far
    images, seen = torch.arange(100, 150, dtype=torch.uint8)[:, None, None, None].expand(50, 32, 32, 3), []
    for x, y in cross_path.two_views(images, torch.arange(50) % 4, 8, CPU, seed=5):
        (one, two), middle = x.chunk(2), x[:, 0, 16, 16].chunk(2)  # which is never cut off, and tells the image
        seen += (127.5 * middle[0] + 27.5).round().int().tolist()
        assert torch.equal(*middle) and [i % 4 for i in seen[-8:]] == y.tolist() and not torch.equal(one, two)
    assert len(seen) == len(set(seen)) == 48


def test_norms_for_each_resolution_against_a_formula_and_they_begin_as_a_supernet_without():
    scales, shifts, norm = torch.rand(3, 5) + 0.5, torch.randn(3, 5), resolution_norms.ResolutionNorm(5, 16, 3)
    for row, each in enumerate(norm):
        each.weight.data, each.bias.data, x = scales[row], shifts[row], torch.randn(6, 5, 16 >> row, 16 >> row)
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
        wanted = (x - mean) / (var + 1e-5).sqrt() * scales[row, :, None, None] + shifts[row, :, None, None]
        assert all(torch.allclose(mode(x), wanted, atol=1e-5) for mode in (norm.train(), norm.eval()))
    for size in (16, 32, 64, 128):  # from 64 on with a stem
        nets, x = [], torch.randn(4, 3, size, size)
        for kind in (batch_statistics_norm, partial(resolution_norms.ResolutionNorm, size=min(32, size), scales=3)):
            torch.manual_seed(0)
            nets.append(ResNet20(10, size, norm=kind))
        with torch.no_grad():
            assert all(torch.equal(*(net(x, config) for net in nets)) for config in SPACE[::5])
    Learner(nets[1], CPU, weight_decay=0.1).train(x, torch.arange(4), (4, 3, 3), 0.1)
    assert [bool(each.bias.any()) for each in nets[1].layers[-1].bn1] == [False, False, True]


def test_the_losses_against_their_formulas():
    network, twin = (ResNet20(4, layers=4, norm=batch_statistics_norm).double() for _ in range(2))
    x, y, weights = torch.randn(16, 3, 32, 32, dtype=torch.float64), torch.arange(16) % 4, list(network.parameters())

    def kl(told, logits):
        p, q = told.detach().softmax(1), logits.softmax(1)
        return (p * (p / q).log()).sum() / len(p)

    def check(found, wanted):
        assert found[0].item() == pytest.approx(wanted[0].item(), abs=1e-5)
        assert torch.allclose(found[1].double(), wanted[1], atol=1e-5)  # the logits
        grads = (torch.autograd.grad(loss, weights) for loss in (found[0], wanted[0]))
        assert all(torch.allclose(mine, other, atol=1e-4) for mine, other in zip(*grads))
    paths = (2, 1, 1), (1, 1, 2), (1, 2, 1)  # the largest, the smallest, the drawn one
    one, two, three = (network(x, path) for path in paths)
    check(pss_net.SandwichLearner(network, CPU).loss(x, y, paths),
          (F.cross_entropy(one, y) + kl(one, two) + kl(one, three), three))
    cross, (view, other), labels = cross_path.CrossPathLearner(network, CPU, steps=10), x.chunk(2), y[:8]
    twin.load_state_dict(network.state_dict())
    for weight in (0.5, 1, 1):
        with torch.no_grad():
            for p, q in zip(weights, twin.parameters()):
                p += 0.05 * torch.randn_like(p)  # as a step would
                q += 0.01 * (p - q)
        one, two = network(view, paths[0]), network(other, paths[1])
        crossed = kl(twin(other, paths[1]), one) + kl(twin(view, paths[0]), two)
        wanted = F.cross_entropy(one, labels) + F.cross_entropy(two, labels) + weight * crossed
        check(cross.loss(x, labels, paths[:2]), (wanted / 2, one))


def test_weights_for_each_resolution_begin_equal_and_train_apart_and_a_path_is_extracted():
    path, (shared, split) = (2, 5, 3), (ResNet20(4, norm=batch_statistics_norm) for _ in range(2))
    split.load_state_dict(weights := shared.state_dict())
    split_by_resolution.split_by_resolution(split, 3, 32)
    assert ["".join(layer.copies) for layer in split.layers] == ["0", "01", *["012"] * 6, "12", "2"]
    x, before = torch.randn(64, 3, 32, 32), {name: value.clone() for name, value in split.state_dict().items()}
    with torch.no_grad():
        assert all(torch.equal(split(x[:8], config), shared(x[:8], config)) for config in SPACE)
    Learner(split, CPU).train(x, torch.arange(64) % 4, path, 0.1)
    used = *(f"layers.{layer}.copies.{r}." for layer, r in enumerate(np.repeat(range(3), path))), "head."
    assert all(torch.equal(value, before[k]) != k.startswith(used) for k, value in split.state_dict().items())
    single = pss_net.extract_network(weights, path, [x], ResNet20(4))
    with torch.no_grad():  # one image as a batch, and much as the SuperNet does with the statistics of a batch
        assert torch.allclose(single(x)[:8], torch.cat([single(image[None]) for image in x[:8]]), atol=1e-4)
        assert F.cosine_similarity(single(x), shared(x, path), dim=1).mean() > 0.9
    for other in (weights | {"more": x}, dict([*weights.items()][1:]), ResNet20(4, layers=4).state_dict()):
        with pytest.raises(RuntimeError, match="state_dict"):
            pss_net.extract_network(other, path, [], ResNet20(4))
