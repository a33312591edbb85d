"""Tests of what goes beyond the paper, with the helpers of test_smoke.py: python -m pytest -q extras

As there, every test that runs a script stands before those that train in this process.
"""
import itertools
import math
from pathlib import Path
from statistics import NormalDist

from test_smoke import (COSTS, CPU, SPACE, TINY, ends, ends_the_same, failing, files, in_an_empty_folder, load,  # noqa
                        refused, run, run_two_ranks)  # before torch, since it sets one thread
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common import Learner, ResNet20, batch_statistics_norm, count_macs, load_json, pooling_configs, save_json
from extras import boltzmann, cross_path, mct_nas, mcts, pss_net, resolution_norms, split_by_resolution
from extras.propose import believe, chance_above, gaussian_process, propose

METHODS = {"boltzmann": 1, "mcts": 1, "mct_nas": 1, "cross_path": 2, "pss_net --pools 2 --pool-size 1": 3,
           "pss_net": 3, "split_by_resolution": 1, "resolution_norms --sampler cost": 1}
PROPOSE = ["extras/propose.py", *TINY, "--trainings", "3", "--runs", "2"]


@pytest.mark.parametrize("method, paths", METHODS.items())  # paths that a step trains
def test_every_method_leaves_its_json_and_stopped_after_an_epoch_it_ends_the_same(method, paths):
    stage, *options = method.split()
    words = [f"extras/{stage}.py", *TINY, "--limit-train", "160", "--batch-size", "2", *options, "--out"]
    run(*words, "x")
    found = load(f"x/{stage}.json")
    assert found["stage"] == stage and sum(r["steps"] for r in found["results"]) == paths * 2 * 40
    run(*words, "y", prepare=failing("common.save_checkpoint", None, 2), codes=(-9,))
    assert "goes on after epoch 1" in run(*words, "y") and load(f"y/{stage}.json") == found


def test_propose_only_writes_nothing_runs_of_other_scripts_count_and_a_budget_is_kept():
    def what_is_next(*words):
        return run(*PROPOSE, "--propose-only", *words).splitlines()[-1]
    cheapest = ["--max-macs", count_macs((1, 3), image_size=16)]
    assert what_is_next() == "next: [2,2]" and what_is_next(*cheapest) == "next: [1,3]" and not files(".")
    run("train_single.py", *TINY, "--config", "2,2")
    run("retrain.py", *TINY, "--runs", "1", "--config", "3,1")
    run(*PROPOSE, *cheapest)
    assert load("runs/synthetic/propose.json")["best"]["config"] == [1, 3]
    assert what_is_next() == "next: none" and "epoch" not in run(*PROPOSE, "--runs", "1")
    why = {tuple(r["config"]): r["why"] for r in load("runs/synthetic/propose.json")["results"]}
    assert why == {(1, 3): "two thirds up in cost", (2, 2): "single.json", (3, 1): "retrain.json"}
    assert "--max-macs" in refused(*PROPOSE, "--max-macs", "1k") and "--lr" in refused(*PROPOSE, "--lr", "0.1")


def test_the_first_seed_chooses_by_one_half_of_the_images_and_all_seeds_are_reported_by_the_other():
    for runs, pretended in ((1, {"1-3-seed0": (0.9, 0.1), "2-2-seed0": (0.8, 0.7), "3-1-seed0": (0.7, 1.0)}),
                            (2, {"1-3-seed1": (0.0, 0.3)})):
        run(*PROPOSE, "--out", "x", "--runs", runs)
        for name, halves in pretended.items():
            path = Path(f"x/propose/{name}.json")
            save_json(path, {**load_json(path), "halves": halves})
    assert "chose [1,3];" in run(*PROPOSE, "--out", "x")
    best = load("x/propose.json")["best"]
    assert best["config"] == [1, 3] and (best["val_acc"], best["test_acc"]) == pytest.approx((0.9, 0.2))


@ends
def test_stopped_at_every_write_it_ends_the_same(error, code):
    words = [*PROPOSE, "--epochs", "1", "--out"]
    run(*words, "whole")
    ends_the_same([*words, "x"], "x/propose.json", "whole/propose.json", error, code)


def test_two_ranks_train_a_proposal_each():
    run(*PROPOSE, "--out", "one")
    run_two_ranks(*PROPOSE, "--out", "two")
    one, two = ({tuple(r["config"]): (r["val_acc"], r["test_acc"], len(r["runs"])) for r in load(path)["results"]}
                for path in ("one/propose.json", "two/propose.json"))
    assert one == two and len(one) == 3 and list(Path("other/two/propose").glob("*.json"))


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


def test_proposals_start_with_the_default_go_on_by_the_bound_and_never_repeat():
    values, runs, scores = np.full(36, math.nan), np.zeros(36), [[config[0] / 10 for config in SPACE]]
    limit, proposed = np.median(COSTS), []
    while proposals := propose(SPACE, COSTS, scores, values, runs, limit):
        index = proposals[0][0]
        mean, deviation = believe(SPACE, COSTS, scores, values, runs)
        bound = np.where((COSTS <= limit) & np.isnan(values), mean + 0.5 * deviation, -math.inf)
        assert index == (bound.argmax() if proposed else SPACE.index((4, 3, 3)))
        values[index], runs[index] = 0.9 + len(proposed) % 4 / 100, 1
        proposed.append(index)
    assert sorted(proposed) == np.flatnonzero(COSTS <= limit).tolist()


def test_boltzmann_draws_by_the_mean_rewards_and_a_falling_temperature():
    rng, rewards, sampler = np.random.default_rng(0), np.array([0.1, 0.2, 0.3]), boltzmann.Boltzmann(3)
    drawn = sampler.draw(3, 0.0, rng)  # each once
    sampler.update(drawn, rewards[drawn].tolist())
    for progress, temperature in ((0.0, 0.7), (0.5, 0.7 * 70 ** -0.5), (1.0, 0.01)):
        weights, drawn = np.exp(rewards / temperature), sampler.draw(6000, progress, rng)
        np.testing.assert_allclose(np.bincount(drawn, minlength=3) / 6000, weights / weights.sum(), atol=0.03)
    sampler.update([2, 2], [0.5, 1.0])
    assert sampler.means == pytest.approx([0.1, 0.2, 0.9 * 0.32 + 0.1])


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
    sampler, rng, p = pss_net.Pools(COSTS, 4, 2), np.random.default_rng(0), np.full(36, 1 / 36)
    np.testing.assert_allclose(np.bincount(sampler.draw(20_000, 1.0, rng)) / 20_000, p, atol=0.01)  # none is full
    one, two, three = sampler.classes[0][:3]
    sampler.update([one, two, three], [1.0, 3.0, 2.0])
    assert [*sampler.pools[0]] == [one, three]  # the worst has left
    sampler.update([one, two], [2.0, 1.5])
    assert sampler.pools[0] == pytest.approx({one: -1.1, two: -1.5})
    level = 0.01 ** 0.25  # the temperature, and the part of the draws that explores
    better = 1 / (1 + math.exp((-1.5 + 1.1) / level))
    p[sampler.classes[0]] *= level
    p[[one, two]] += (1 - level) / 4 * np.array([better, 1 - better])
    np.testing.assert_allclose(np.bincount(sampler.draw(20_000, 0.25, rng)) / 20_000, p, atol=0.01)


def test_partners_differ_and_two_views_are_of_one_image():
    far = {i for i, (a, b, _) in enumerate(SPACE) if abs(a - 3) + abs(a + b - 6) >= 2}  # from [3,3,4]
    rng, middle = np.random.default_rng(0), SPACE.index((3, 3, 4))
    assert {cross_path.partner(middle, SPACE, rng) for _ in range(600)} == far
    images = torch.arange(50, dtype=torch.uint8)[:, None, None, None].expand(50, 32, 32, 3)  # each shows its number
    for x, y in cross_path.two_views(images, torch.arange(50), 8, CPU, seed=5):
        numbers = (127.5 * x[:, 0, 16, 16] + 127.5).round().int()  # in the middle, which is never cut off
        assert numbers.tolist() == 2 * y.tolist() and not torch.equal(*x.chunk(2))


def test_norms_have_a_scale_and_a_shift_for_each_resolution_and_the_statistics_of_the_batch():
    scales, shifts, norm = torch.rand(3, 5) + 0.5, torch.randn(3, 5), resolution_norms.ResolutionNorm(5, 16, 3)
    for row, each in enumerate(norm):
        each.weight.data, each.bias.data, x = scales[row], shifts[row], torch.randn(6, 5, 16 >> row, 16 >> row)
        assert torch.allclose(norm.eval()(x), F.batch_norm(x, None, None, scales[row], shifts[row], True), atol=1e-5)


def test_the_losses_against_their_formulas():
    network, twin = (ResNet20(4, layers=4, norm=batch_statistics_norm).double() for _ in range(2))
    x, y, weights = torch.randn(16, 3, 32, 32, dtype=torch.float64), torch.arange(16) % 4, list(network.parameters())

    def kl(told, logits):
        p, q = told.detach().softmax(1), logits.softmax(1)
        return (p * (p / q).log()).sum() / len(p)

    def check(found, wanted):
        grads = (torch.autograd.grad(loss, weights) for loss in (found, wanted))
        assert all(torch.allclose(mine, other, atol=1e-4) for mine, other in zip(*grads))
    paths = (2, 1, 1), (1, 1, 2), (1, 2, 1)  # the largest, the smallest, the drawn one
    one, two, three = (network(x, path) for path in paths)
    sandwich = F.cross_entropy(one, y) + kl(one, two) + kl(one, three)
    check(pss_net.SandwichLearner(network, CPU).loss(x, y, paths)[0], sandwich)
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
        check(cross.loss(x, labels, paths[:2])[0], wanted / 2)


def test_weights_for_each_resolution_begin_equal_and_train_apart_and_a_path_is_extracted():
    path, (shared, split) = (2, 5, 3), (ResNet20(4, norm=batch_statistics_norm) for _ in range(2))
    split.load_state_dict(weights := shared.state_dict())
    split_by_resolution.split_by_resolution(split, 3, 32)
    x, before = torch.randn(64, 3, 32, 32), {name: value.clone() for name, value in split.state_dict().items()}
    assert all(torch.equal(split(x[:8], config), shared(x[:8], config)) for config in SPACE)
    Learner(split, CPU).train(x, torch.arange(64) % 4, path, 0.1)
    used = *(f"layers.{layer}.copies.{r}." for layer, r in enumerate(np.repeat(range(3), path))), "head."
    assert all(torch.equal(value, before[k]) != k.startswith(used) for k, value in split.state_dict().items())
    single = pss_net.extract_network(weights, path, [x], ResNet20(4))
    assert torch.allclose(single(x)[:1], single(x[:1]), atol=1e-4)  # one image as a batch
    assert F.cosine_similarity(single(x), shared(x, path), dim=1).mean() > 0.9
