"""What to train next: a Gaussian process predicts every configuration, and picks each training.

    python -m extras.propose                              # six trainings, then seeds of the best
    python -m extras.propose --trainings 10 --epochs 200  # more trainings, each longer
    python -m extras.propose --max-macs 60M               # at most 60 million multiply-adds
    python -m extras.propose --propose-only               # trains nothing: says what comes next
    torchrun --nproc_per_node=4 -m extras.propose         # four at a time, a GPU for each

retrain.py goes by the searches alone. This script also learns from its own trainings. It trains the
default first. Then it trains, one after the other, what looks most promising so far, by pooling
positions, cost and the scores of all searches in --out. Runs of train_single.py and retrain.py
there with the same settings count as trained.

Every second test image chooses: the accuracy on these is `val_acc`. The others took no part in any
choice: the accuracy on them is `test_acc`, and it is the one that is reported.

Papers: Javan, Toews, Pedersoli, AutoML 2023, arXiv 2306.11982, section 5 (training); Rasmussen and
Williams, Gaussian Processes for Machine Learning, 2006; Srinivas, Krause, Kakade, Seeger, Gaussian
Process Optimization in the Bandit Setting, ICML 2010, arXiv 0912.3995 (proposals). Writes
propose.json, and the weights to the folder `propose`.
"""
import math

import numpy as np

from common import (RANK, WORLD, UserError, at_least, config_text, describe, gather, pack_right,
                    parse, pooling_configs, print_table, run_main, unpack_right, write_results)
from retrain import load_searches, show_trained
from train_single import (finished_runs, load_for_training, multiply_adds, summarise, train_network)

# ---- The prior: what is believed before the first training, in percentage points of accuracy -----
# Example: [4,3,3] was trained and has 90 %. A configuration that pools once a layer later or
# earlier, with the same score and one deviation cheaper, is expected to have SLOPE less, 89.5 %.
# The deviation of this is the root of
# SLOPE^2 + 2 SMOOTH^2 (1 - exp(-1^2 / (2 x 2.5^2))) + 2 OWN_VARIANCE + NOISE^2,
# which is 0.80. So the chance that it is better is 0.27.

LEVEL = 10.0  # deviation of the level that all configurations share
SLOPE = 0.5  # what one deviation of cost, or of the mean score, is worth; also how sure this is
SMOOTH = 1.0  # deviation of what pooling positions explain, alike for configurations that are near
LENGTH = 0.25  # how near: the length of that kernel, as a part of all layers (2.5 of 10)
OWN_VARIANCE = 0.1  # variance of what each configuration has for itself
NOISE = 0.2  # deviation between seeds
BOUND = 0.5  # a proposal counts with this many deviations above its mean (upper confidence bound)


# ---- Proposals: arrays over the n configurations of a space, in the order of `pooling_configs` ---

def gaussian_process(expected, features, positions, values, noise, length):
    """Predict n values of which some are known (Rasmussen and Williams, 2006, 2.2 and 2.7).

    The prior has the mean `expected` (n,), moved to the level of the known values, and the
    covariance
    k(i, j) = LEVEL^2 + SLOPE^2 f_i . f_j + SMOOTH^2 exp(-|p_i - p_j|^2 / (2 length^2))
              + OWN_VARIANCE [i = j]
    where f are the rows of `features` (n, d) and p those of `positions` (n, q). length: in the
    units of p. values: (n,) in percentage points, NaN where unknown. noise: the deviation of each
    known value, (n,).

    Returns mean and deviation of the values without noise, (n,) each. All deviations grow where the
    known values fit this badly, and shrink where they fit well. So a data set on which accuracies
    spread over tens of points needs no other prior.
    """
    seen = np.isfinite(values)
    distance = np.linalg.norm(positions[:, None] - positions, axis=-1)
    covariance = LEVEL ** 2 + SLOPE ** 2 * features @ features.T
    covariance = covariance + SMOOTH ** 2 * np.exp(-0.5 * (distance / length) ** 2)
    covariance += OWN_VARIANCE * np.eye(len(values))
    if seen.any():
        expected = expected + (values - expected)[seen].mean()
    surprise = (values - expected)[seen]

    inverse = np.linalg.inv(covariance[seen][:, seen] + np.diag(noise[seen] ** 2))
    gain = covariance[:, seen] @ inverse
    mean = expected + gain @ surprise
    variance = covariance.diagonal() - (gain * covariance[:, seen]).sum(1)
    scale = (1 + surprise @ inverse @ surprise) / max(1, seen.sum())  # 1 as long as none is known
    return mean, np.sqrt(scale * variance)


def chance_above(best, mean, deviation):
    """How likely a normal variable exceeds `best`: numbers or arrays; deviation is above 0."""
    distance = (best - mean) / (deviation * math.sqrt(2))
    return np.vectorize(math.erfc, otypes=[float])(distance) / 2


def believe(space, macs, scores, values, runs, images=math.inf):
    """Predict the accuracy of every configuration: mean and deviation, (n,) each, fractions.

    space: the n configurations. macs: (n,) multiply-adds. scores: (searches, n), perhaps none.
    values: (n,) measured accuracies, NaN where there is none. runs: (n,) how many runs each is the
    mean of. images: how many test images measured them; a value is never believed more exactly
    than they allow. Cost counts by its rank. Otherwise the few most expensive, far from all
    others, would be tried only because they are unknown.
    """
    def standardise(numbers):
        return (numbers - np.mean(numbers)) / max(np.std(numbers), 1e-9)
    cost = standardise(np.searchsorted(np.sort(macs), macs))
    searched = np.array([standardise(score) for score in scores]).reshape(-1, len(space))
    expected = SLOPE * (cost + (searched.mean(0) if len(searched) else 0))
    parts = np.clip(values, 0, 1)  # what is only expected may lie above 1
    of_images = 100 ** 2 * parts * (1 - parts) / images  # variance by the number of images
    noise = np.sqrt(NOISE ** 2 / np.maximum(runs, 1) + np.nan_to_num(of_images))
    mean, deviation = gaussian_process(
        expected, features=np.stack([cost, *searched / max(1, len(searched)) ** 0.5], axis=1),
        positions=np.cumsum(space, axis=1)[:, :-1], length=LENGTH * sum(space[0]),
        values=100 * values, noise=noise)
    return mean / 100, deviation / 100


def propose(space, macs, scores, values, runs, default, max_macs=math.inf, images=math.inf,
            count=1):
    """What to train next: a list of (index, why, expected accuracy, deviation, chance).

    The default, an index, comes first. Then comes the largest mean plus BOUND deviations (Srinivas
    et al., 2010): promising before unknown. Without scores the second training is the cheapest of
    the most expensive third, since by cost alone it would be the most expensive of all, which may
    fail. chance: the probability to beat the best so far. Of `count` proposals each believes the
    means of those before it. There are fewer once all within `max_macs` are trained. The other
    arguments are as for `believe`.
    """
    values, runs = values.copy(), runs.copy()
    allowed = macs <= max_macs
    best = np.nanmax(values, initial=0.0, where=np.isfinite(values) & allowed)
    by_cost = sorted(np.flatnonzero(allowed), key=lambda i: -macs[i])
    expensive = by_cost[:max(1, allowed.sum() // 3)]
    proposals = []
    while len(proposals) < count and (todo := allowed & np.isnan(values)).any():
        mean, deviation = believe(space, macs, scores, values, runs, images)
        if todo[default]:
            index, why = default, "default"
        elif not len(scores) and np.isnan(values[expensive]).all():
            index, why = expensive[-1], "two thirds up in cost"
        else:
            bound = np.where(todo, mean + BOUND * deviation, -math.inf)
            index, why = np.argmax(bound), "proposed"
        chance = chance_above(best, mean[index], deviation[index])
        proposals.append((int(index), why, mean[index], deviation[index], float(chance)))
        values[index], runs[index] = mean[index], 1
    return proposals


# ---- The script ----------------------------------------------------------------------------------

def halve_test(run, counts):
    """Let every second test image of a run choose: `val_acc` is the accuracy on these.

    counts: the test images of each class. `test_acc` and `right` are then of the other images.
    """
    right = unpack_right(run["right"], sum(counts))
    return {**run, "val_acc": float(right[::2].mean()), "test_acc": float(right[1::2].mean()),
            "right": pack_right(right[1::2])}


def runs_of(args, counts, *stages):
    """The finished runs of these stages with these settings: {(configuration, seed): run}.

    Each is as `halve_test` makes it. Proposals and the choice go by the runs with a reason, `why`.
    Those without are further seeds, which only measure what was chosen. Runs of older versions,
    which did not keep which images are right, are left alone.
    """
    runs = {}
    for stage in stages:
        own = stage == "propose"
        for key, run in finished_runs(args.out / stage, args.settings, refuse=own).items():
            if "right" in run:
                run = halve_test(run, counts)
                runs[key] = run if own else {**run, "why": f"{stage}.json"}
    return runs


def observe(space, runs):
    """What runs with a reason measured: val_acc (n,), NaN where unknown, and how many runs (n,)."""
    entries = summarise({key: run for key, run in runs.items() if "why" in run}, "val_acc")
    values = [entries[config]["val_acc"] if config in entries else math.nan for config in space]
    counts = [len(entries[config]["runs"]) if config in entries else 0 for config in space]
    return np.array(values), np.array(counts)


def main():
    def options(add):
        add("--trainings", type=at_least(1), default=6, help="configurations trained in all, those "
            "of train_single.py and retrain.py included; default 6")
        add("--runs", type=at_least(1), default=3, help="seeds of the best and the default, from "
            "--seed up; default 3")
        add("--max-macs", type=multiply_adds, default=math.inf, help="multiply-adds of the most "
            "expensive configuration to consider, such as 60M; default: no limit")
        add("--propose-only", action="store_true", help="train and write nothing, print what to "
            "train next")
    args = parse(__doc__, options)
    space, folder = pooling_configs(args.layers, args.scales), args.out / "propose"
    finished_runs(folder, args.settings)  # refused now, since decoding images may take long
    data = load_for_training(args)
    counts_of_test = data[1].labels.bincount(minlength=len(data[2])).tolist()
    choosing = -(-sum(counts_of_test) // 2)
    searches = load_searches(args)
    whole = {names: search for names, search in searches.items() if set(search) == set(space)}
    names = "; ".join(whole) or "no search (none in --out scores the whole space)"
    print(f"goes by pooling positions, cost, and the scores of {names}")
    scores = [[search[config] for config in space] for search in whole.values()]
    described = describe(space, args, len(data[2]))
    macs = np.array([d["macs"] for d in described])
    allowed, default = macs <= args.max_macs, space.index(args.default)
    if not allowed.any():
        raise UserError(f"--max-macs {args.max_macs:.4g} is below the cheapest configuration, "
                        f"{macs.min():.4g}")
    taken = runs_of(args, counts_of_test, "single", "retrain")

    while True:  # rounds: each process trains one proposal, made from all that is finished
        runs = taken | runs_of(args, counts_of_test, "propose")
        values, counts = observe(space, runs)
        if args.propose_only:
            return print_beliefs(space, macs, scores, values, counts, default, args.max_macs,
                                 choosing)
        known = int((counts > 0)[allowed].sum())
        total = min(args.trainings, allowed.sum())
        total = max(total, known + (allowed[default] and not counts[default]))
        proposals = propose(space, macs, scores, values, counts, default, args.max_macs, choosing,
                            min(WORLD, total - known))
        proposals = gather(proposals)[0]  # the first rank's; other machines may round otherwise
        if not proposals:
            break
        for number, (index, why, mean, deviation, chance) in enumerate(proposals, known + 1):
            line = f"training {number} of {total}: {config_text(space[index])}, {why}"
            if known:
                line += (f"; expected {mean:.4f} +- {deviation:.4f}, chance to beat the best so "
                         f"far {chance:.2f}")
            print(line)
        for index, why, *_ in proposals[RANK:RANK + 1]:  # none for ranks beyond the proposals
            train_network(space[index], args.seed, data, args, folder, why=why,
                          order=known + 1 + RANK)

    # The choice is made. Further seeds of it and of the default only measure it.
    best = int(np.nanargmax(np.where(allowed, values, math.nan)))
    measured = [index for index in dict.fromkeys([best, default]) if allowed[index]]
    wanted = [(space[index], seed) for seed in range(args.seed, args.seed + args.runs)
              for index in measured]
    for config, seed in [key for key in wanted if key not in runs][RANK::WORLD]:
        train_network(config, seed, data, args, folder)
    report(args, data, taken | runs_of(args, counts_of_test, "propose"), described, values)


def report(args, data, runs, described, values):
    """Write propose.json and print what was trained, within --max-macs, with its gain.

    runs: from `runs_of`. described: from `describe`, values: from `observe`, of the whole space.
    """
    within = {}
    for entry, value in zip(described, values):
        if entry["macs"] <= args.max_macs and math.isfinite(value):
            within[tuple(entry["config"])] = {**entry, "val_acc": round(float(value), 6)}
    runs = dict(sorted((key, run) for key, run in runs.items() if key[0] in within))
    results = []
    for config, entry in summarise(runs).items():
        reason = next(run for run in entry["runs"] if "why" in run)
        results.append({**within[config], **entry, "why": reason["why"],
                        "order": reason.get("order")})
    classes, total = data[2], len(data[1].labels)
    choosing, reported = total - total // 2, total // 2
    if RANK == 0:
        history = [entry for run in runs.values() for entry in run["history"]]
        found = write_results(args, "propose", "propose", classes, results, "val_acc",
                              (len(data[0].labels), choosing, reported),
                              sum(run["seconds"] for run in runs.values()), history=history)
        best = config_text(found["best"]["config"])
        print(f"\nval acc, %, on {choosing} test images, chose {best}; test acc, %, on the "
              f"{reported} others")
        show_trained(found)


def print_beliefs(space, macs, scores, values, counts, default, max_macs, images):
    """Print what is expected of every configuration within `max_macs`, and which to train next."""
    mean, deviation = believe(space, macs, scores, values, counts, images)
    best = np.nanmax(values, initial=0.0, where=np.isfinite(values) & (macs <= max_macs))
    chance = chance_above(best, mean, deviation)
    if not counts.any():
        print("nothing is trained yet: what is expected is relative to the mean of all")
    rows = []
    for i in sorted(np.flatnonzero(macs <= max_macs), key=lambda i: -mean[i]):
        rows.append([config_text(space[i]), f"{macs[i] / 1e6:.1f}", f"{mean[i]:.4f}",
                     f"{deviation[i]:.4f}", f"{values[i]:.4f}" if counts[i] else None,
                     f"{chance[i]:.2f}" if best and not counts[i] else None])
    print_table(["configuration", "M multiply-adds", "expected", "deviation", "trained",
                 "chance to beat the best"], rows)
    proposals = propose(space, macs, scores, values, counts, default, max_macs, images)
    print(f"next: {config_text(space[proposals[0][0]]) if proposals else 'none'}")


if __name__ == "__main__":
    run_main(main)
