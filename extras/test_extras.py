"""Tests of the extras, with the helpers of test_smoke.py: python -m pytest -q extras

As in test_smoke.py, the tests that run a script come before those that train in this process.
"""
import importlib
import itertools
import math
import re
import timeit
from pathlib import Path
from statistics import NormalDist

from test_smoke import (  # noqa  # before torch, since it sets one thread
    COSTS, CPU, SNIPPETS, SPACE, TINY, ends, ends_the_same, failing, files, in_an_empty_folder,
    load, refused, run, run_two_ranks)
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common import (Learner, ResNet20, batch_statistics_norm, count_macs, load_json, pack_right,
                    pooling_configs, save_json)
from extras import (boltzmann, cross_path, mct_nas, mcts, pss_net, resolution_norms,
                    split_by_resolution)
from extras.propose import believe, chance_above, gaussian_process, propose

METHODS = {  # each with the number of configurations that a step trains
    "boltzmann": 1,
    "mcts": 1,
    "mct_nas": 1,
    "cross_path": 2,
    "pss_net --pools 2 --pool-size 1": 3,
    "pss_net": 3,
    "split_by_resolution": 1,
    "resolution_norms --sampler cost": 1,
}
PROPOSE = ["extras/propose.py", *TINY, "--trainings", "3", "--runs", "2"]


@pytest.mark.parametrize("method, paths", METHODS.items())
def test_every_method_writes_its_json_and_ends_the_same_after_a_stop(method, paths):
    stage, *options = method.split()
    words = [f"extras/{stage}.py", *TINY, "--limit-train", "160", "--batch-size", "2", *options]
    run(*words, "--out", "x")
    name = f"{stage}-cost" if "cost" in options else stage  # of the files
    found = load(f"x/{name}.json")
    assert found["stage"] == stage
    assert sum(result["steps"] for result in found["results"]) == paths * 2 * 40

    stop = failing("common.save_checkpoint", None, 2)  # in the second epoch
    run(*words, "--out", "y", prepare=stop, codes=(-9,))
    assert "goes on after epoch 1" in run(*words, "--out", "y")
    assert load(f"y/{name}.json") == found


def test_propose_counts_other_runs_and_keeps_a_budget_and_propose_only_writes_nothing():
    def what_is_next(*words):
        return run(*PROPOSE, "--propose-only", *words).splitlines()[-1]
    cheapest = ["--max-macs", count_macs((1, 3), image_size=16)]
    assert what_is_next() == "next: [2,2]"
    assert what_is_next(*cheapest) == "next: [1,3]"
    assert not files(".")

    run("train_single.py", *TINY, "--config", "2,2")
    run("retrain.py", *TINY, "--runs", "1", "--config", "3,1")
    run(*PROPOSE, *cheapest)
    assert load("runs/synthetic/propose.json")["best"]["config"] == [1, 3]
    assert what_is_next() == "next: none"
    assert "epoch" not in run(*PROPOSE, "--runs", "1")
    results = load("runs/synthetic/propose.json")["results"]
    why = {tuple(result["config"]): result["why"] for result in results}
    assert why == {(1, 3): "two thirds up in cost", (2, 2): "single.json", (3, 1): "retrain.json"}

    assert "--max-macs" in refused(*PROPOSE, "--max-macs", "1k")
    assert "--lr" in refused(*PROPOSE, "--lr", "0.1")


def test_the_first_seed_chooses_by_half_of_the_images_and_all_seeds_report_the_other_half():
    def pretend(name, *accuracies):  # of a run on the two halves of the 40 test images
        right = np.zeros(40, bool)
        for half, accuracy in enumerate(accuracies):
            right[half::2] = np.arange(20) < round(20 * accuracy)
        path = Path(f"x/propose/{name}.json")
        save_json(path, {**load_json(path), "right": pack_right(right)})
    run(*PROPOSE, "--out", "x", "--runs", 1)
    pretend("1-3-seed0", 0.9, 0.1)
    pretend("2-2-seed0", 0.8, 0.7)
    pretend("3-1-seed0", 0.7, 1.0)
    run(*PROPOSE, "--out", "x", "--runs", 2)
    pretend("1-3-seed1", 0.0, 0.3)
    assert "chose [1,3];" in run(*PROPOSE, "--out", "x")
    best = load("x/propose.json")["best"]
    assert best["config"] == [1, 3]
    assert (best["val_acc"], best["test_acc"]) == pytest.approx((0.9, 0.2))


def test_a_network_with_four_resolutions_is_searched_proposed_and_reported():
    snippet = next(text for text in SNIPPETS if "DEFAULT" in text)
    Path("plain.py").write_text(snippet.replace("DEFAULT = (2, 2, 2)", "DEFAULT = (3, 1, 1, 1)"))
    words = [*TINY[:2], *TINY[6:], "--network", "plain.py", "--out", "x"]
    for method in ("mcts", "pss_net --pools 2", "cross_path", "split_by_resolution"):
        name, *options = method.split()
        run(f"extras/{name}.py", *words, *options)
        assert load(f"x/{name}.json")["space"] == {"layers": 6, "scales": 4, "size": 10}
    run("extras/propose.py", *words, "--trainings", "2", "--runs", "1")
    assert load("x/propose.json")["default"]["config"] == [3, 1, 1, 1]
    out = run("results/report.py", "x")
    assert "[3,1,1,1]" in out and ("scores-mcts.png" in out)


@ends
def test_propose_stopped_at_every_write_ends_the_same(error, code):
    words = [*PROPOSE, "--epochs", "1", "--out"]
    run(*words, "whole")
    ends_the_same([*words, "x"], "x/propose.json", "whole/propose.json", error, code)


def test_two_ranks_train_one_proposal_each():
    def trained(path):
        return {tuple(r["config"]): (r["val_acc"], r["test_acc"], len(r["runs"]))
                for r in load(path)["results"]}
    run(*PROPOSE, "--out", "one")
    run_two_ranks(*PROPOSE, "--out", "two")
    one, two = trained("one/propose.json"), trained("two/propose.json")
    assert one == two and len(one) == 3
    assert list(Path("other/two/propose").glob("*.json"))


@pytest.mark.parametrize("known", [1, 2, 7, 20])
def test_the_gaussian_process_equals_its_information_form(known):
    rng, values = np.random.default_rng(known), np.full(20, math.nan)
    noise, positions = rng.uniform(0.05, 1, 20), rng.uniform(1, 9, (20, 2))
    values[rng.permutation(20)[:known]] = 90 + 4 * rng.standard_normal(known)
    expected, features = rng.standard_normal(20), rng.standard_normal((20, 3))
    covariance = np.empty((20, 20))
    for i, j in itertools.product(range(20), repeat=2):
        squared_distance = ((positions[i] - positions[j]) ** 2).sum()
        smooth = math.exp(-squared_distance / (2 * 2.5 ** 2))
        linear = 0.25 * np.dot(features[i], features[j])
        covariance[i, j] = 100 + linear + 0.1 * (i == j) + smooth

    information = np.where(np.isnan(values), 0, noise ** -2)  # none in a value that is not known
    prior = expected + np.nanmean(values - expected)
    surprise = np.nan_to_num(values - prior)
    posterior = np.linalg.inv(np.linalg.inv(covariance) + np.diag(information))
    weighted = information * surprise
    mean = prior + posterior @ weighted
    misfit = (weighted * surprise).sum() - weighted @ posterior @ weighted
    deviation = np.sqrt((1 + misfit) / known * posterior.diagonal())

    found = gaussian_process(expected, features, positions, values, noise, 2.5)
    np.testing.assert_allclose(found, [mean, deviation], rtol=1e-5)
    chances = [NormalDist(-m, d).cdf(-90) for m, d in zip(*found)]
    np.testing.assert_allclose(chance_above(90, *found), chances, rtol=0, atol=1e-9)


def test_proposals_start_with_the_default_then_follow_the_bound_and_never_repeat():
    values, runs, proposed = np.full(36, math.nan), np.zeros(36), []
    scores = [[config[0] / 10 for config in SPACE]]
    limit, default = np.median(COSTS), SPACE.index((4, 3, 3))
    while proposals := propose(SPACE, COSTS, scores, values, runs, default, limit):
        index = proposals[0][0]
        mean, deviation = believe(SPACE, COSTS, scores, values, runs)
        todo = (COSTS <= limit) & np.isnan(values)
        bound = np.where(todo, mean + 0.5 * deviation, -math.inf)
        assert index == (bound.argmax() if proposed else default)
        values[index], runs[index] = 0.9 + len(proposed) % 4 / 100, 1
        proposed.append(index)
    assert sorted(proposed) == np.flatnonzero(COSTS <= limit).tolist()


def test_a_proposal_that_is_expected_to_be_perfect_is_no_obstacle_to_the_next():
    values = np.full(36, math.nan)
    values[[0, 35]] = 0.99, 1.0
    proposals = propose(SPACE, COSTS, [], values, np.ones(36), 0, images=100, count=4)
    assert len({index for index, *_ in proposals}) == 4
    assert np.isfinite([expected for _, _, *expected in proposals]).all()


def test_the_fewer_images_measured_an_accuracy_the_less_certain_it_is():
    values, deviations = np.full(36, math.nan), []
    values[[5, 20]] = 0.7, 0.74
    for images in (80, 10_000, math.inf):
        _, deviation = believe(SPACE, COSTS, [], values, np.ones(36), images)
        deviations.append(deviation[20])
    few, many, endless = deviations
    assert few > 0.01 > many > endless


def test_boltzmann_draws_by_mean_reward_and_a_falling_temperature():
    rng, sampler = np.random.default_rng(0), boltzmann.Boltzmann(3)
    rewards = np.array([0.1, 0.2, 0.3])
    drawn = sampler.draw(3, 0.0, rng)  # each once
    sampler.update(drawn, rewards[drawn].tolist())
    for progress, temperature in ((0.0, 0.7), (0.5, 0.7 * 70 ** -0.5), (1.0, 0.01)):
        weights = np.exp(rewards / temperature)
        share = np.bincount(sampler.draw(6000, progress, rng), minlength=3) / 6000
        np.testing.assert_allclose(share, weights / weights.sum(), atol=0.03)
    sampler.update([2, 2], [0.5, 1.0])  # the first brings 0.3 to 0.32
    assert sampler.means == pytest.approx([0.1, 0.2, 0.9 * 0.32 + 0.1])


@pytest.mark.parametrize("kind, explore, shared", [
    (mcts.Tree, 1, 0), (mct_nas.LossTree, 0.05, 0.2)])
def test_both_trees_draw_by_all_draws_and_rewards_so_far(kind, explore, shared):
    def running_means(values, keep=0.9):
        return [*itertools.accumulate(values, lambda mean, new: keep * mean + (1 - keep) * new)]

    def mean_reward(leaves):
        return running_means([reward for leaf, reward in zip(drawn, rewards) if leaf in leaves])[-1]
    # the leaves of each node; there is none for the second cut of [3,1,1], which has no sibling
    below = {(): range(6), (1,): (0, 1, 2), (2,): (3, 4), (3,): (5,),
             (1, 2): (0,), (1, 3): (1,), (1, 4): (2,), (2, 3): (3,), (2, 4): (4,)}
    alike = {(3,): (1, 3), (4,): (2, 4)}  # the leaves with the same second cut, by that cut
    tree, rng = kind(pooling_configs(5, 3)), np.random.default_rng(0)
    drawn, told = [], []
    for steps in (1, 2, 5, 36, 36):
        block = tree.draw(steps, 0.1, rng)
        losses = rng.uniform(0.5, 2, steps).tolist()
        tree.update(block, losses)
        drawn, told, rewards = drawn + block, told + losses, told + losses
        if shared:
            rewards = [mean / loss for mean, loss in zip(running_means(told, 0.95), told)]
        for node, temperature in itertools.product([(), (1,), (2,)], (0.7, 0.05)):
            children = [child for child in below if child and child[:-1] == node]
            visits = [sum(leaf in below[child] for leaf in drawn) for child in children]
            weights = [count == 0 for count in visits]
            if 0 not in visits:
                for number, child in enumerate(children):
                    leaves = below[child]
                    bonus = math.sqrt(math.log(sum(visits)) / visits[number])
                    others = mean_reward(alike.get(child[1:], leaves))
                    value = mean_reward(leaves) + explore * bonus + shared * others
                    weights[number] = len(leaves) * math.exp(value / temperature)
            wanted = np.divide(weights, sum(weights))
            np.testing.assert_allclose(tree.probabilities(node, temperature), wanted)


def test_pools_draw_a_class_first_explore_until_they_are_full_and_forget_what_leaves():
    sampler, rng = pss_net.Pools(COSTS, 4, 2), np.random.default_rng(0)
    p = np.full(36, 1 / 36)  # as long as no pool is full
    share = np.bincount(sampler.draw(20_000, 1.0, rng)) / 20_000
    np.testing.assert_allclose(share, p, atol=0.01)

    one, two, three = sampler.classes[0][:3]
    sampler.update([one, two, three], [1.0, 3.0, 2.0])
    assert [*sampler.pools[0]] == [one, three]  # the worst has left
    sampler.update([one, two], [2.0, 1.5])
    assert sampler.pools[0] == pytest.approx({one: -1.1, two: -1.5})

    level = 0.01 ** 0.25  # the temperature, and the part of the draws that explores
    better = 1 / (1 + math.exp((-1.5 + 1.1) / level))
    p[sampler.classes[0]] *= level
    p[[one, two]] += (1 - level) / 4 * np.array([better, 1 - better])
    share = np.bincount(sampler.draw(20_000, 0.25, rng)) / 20_000
    np.testing.assert_allclose(share, p, atol=0.01)


def test_partners_are_far_apart_and_two_views_show_one_image():
    rng, middle = np.random.default_rng(0), SPACE.index((3, 3, 4))
    far = {i for i, (a, b, _) in enumerate(SPACE)  # by the two layers where each pools
           if abs(a - 3) + abs(a + b - 6) >= 2}
    assert {cross_path.partner(middle, SPACE, rng) for _ in range(600)} == far

    numbers = torch.arange(50)
    images = numbers.to(torch.uint8)[:, None, None, None].expand(50, 32, 32, 3)  # of one grey each
    for x, y in cross_path.two_views(images, numbers, 8, CPU, seed=5):
        middles = x[:, 0, 16, 16]  # never cut off
        assert (127.5 * middles + 127.5).round().int().tolist() == [*y.tolist(), *y.tolist()]
        assert not torch.equal(*x.chunk(2))


def test_norms_scale_and_shift_for_each_resolution_by_the_statistics_of_the_batch():
    scales, shifts = torch.rand(3, 5) + 0.5, torch.randn(3, 5)
    norm = resolution_norms.ResolutionNorm(5, 16, 3)
    for resolution, (each, scale, shift) in enumerate(zip(norm, scales, shifts, strict=True)):
        each.weight.data, each.bias.data = scale, shift
        x = torch.randn(6, 5, 16 >> resolution, 16 >> resolution)
        wanted = F.batch_norm(x, None, None, scale, shift, training=True)
        assert torch.allclose(norm.eval()(x), wanted, atol=1e-5)


def test_the_losses_equal_their_formulas():
    def kl(teacher, student):
        p, q = teacher.detach().softmax(1), student.softmax(1)
        return (p * (p / q).log()).sum() / len(p)

    def check(found, wanted):  # the gradients of both
        grads = (torch.autograd.grad(loss, weights) for loss in (found, wanted))
        assert all(torch.allclose(mine, other, atol=1e-4) for mine, other in zip(*grads))
    network, twin = (ResNet20(4, layers=4, norm=batch_statistics_norm).double() for _ in range(2))
    weights = list(network.parameters())
    x, y = torch.randn(16, 3, 32, 32, dtype=torch.float64), torch.arange(16) % 4

    largest, smallest, drawn = paths = (2, 1, 1), (1, 1, 2), (1, 2, 1)
    teacher = network(x, largest)
    wanted = F.cross_entropy(teacher, y)
    wanted = wanted + kl(teacher, network(x, smallest)) + kl(teacher, network(x, drawn))
    check(pss_net.SandwichLearner(network, CPU).loss(x, y, paths)[0], wanted)

    cross = cross_path.CrossPathLearner(network, CPU, steps=10)
    twin.load_state_dict(network.state_dict())
    (view, other), labels = x.chunk(2), y[:8]
    for weight in (0.5, 1, 1):
        with torch.no_grad():
            for p, q in zip(weights, twin.parameters()):
                p += 0.05 * torch.randn_like(p)  # as a step would
                q += 0.01 * (p - q)
        one, two = network(view, largest), network(other, smallest)
        crossed = kl(twin(other, smallest), one) + kl(twin(view, largest), two)
        wanted = F.cross_entropy(one, labels) + F.cross_entropy(two, labels) + weight * crossed
        check(cross.loss(x, labels, (largest, smallest))[0], wanted / 2)


def test_split_weights_begin_equal_and_train_apart():
    shared, split = (ResNet20(4, norm=batch_statistics_norm) for _ in range(2))
    split.load_state_dict(shared.state_dict())
    split_by_resolution.split_by_resolution(split, 3, 32)
    x, path = torch.randn(64, 3, 32, 32), (2, 5, 3)
    for config in SPACE:
        assert torch.equal(split(x[:8], config), shared(x[:8], config))

    before = {name: value.clone() for name, value in split.state_dict().items()}
    Learner(split, CPU).train(x, torch.arange(64) % 4, path, 0.1)
    resolutions = np.repeat(range(3), path)
    used = [f"layers.{layer}.copies.{r}." for layer, r in enumerate(resolutions)]
    for name, value in split.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith((*used, "head."))


def test_an_extracted_network_has_statistics_of_its_own_and_predicts_as_before():
    shared, path = ResNet20(4, norm=batch_statistics_norm), (2, 5, 3)
    x = torch.randn(64, 3, 32, 32)
    single = pss_net.extract_network(shared.state_dict(), path, [x], ResNet20(4))
    assert torch.allclose(single(x)[:1], single(x[:1]), atol=1e-4)  # one image as a batch
    assert F.cosine_similarity(single(x), shared(x, path), dim=1).mean() > 0.9


def test_speed_shows_every_tenth_configuration(monkeypatch, capsys):
    words = "speed --device cpu --amp off --batch-size 2"
    monkeypatch.setattr("sys.argv", words.split())
    monkeypatch.setattr(timeit.Timer, "autorange", lambda timer: (1, 0.0))
    monkeypatch.setattr(timeit.Timer, "repeat", lambda timer, *times: [timer.timeit(1)])
    importlib.import_module("results.speed").main()
    assert len(re.findall(r"^\[\d,\d,\d\] +\d+\.\d +\d+ +\d+ ", capsys.readouterr().out, re.M)) == 6
