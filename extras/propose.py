"""What to train next: a Gaussian process over pooling positions, cost and search scores picks each training.

    python -m extras.propose                              # CIFAR-10: six trainings, then seeds of best and default
    python -m extras.propose --trainings 10 --epochs 200  # more trainings, each longer
    python -m extras.propose --max-macs 60M               # only configurations of at most 60 million multiply-adds
    python -m extras.propose --propose-only               # train nothing: what to train next, given all in --out
    torchrun --nproc_per_node=4 -m extras.propose         # four at a time, each on the GPU of its number

`retrain.py` trusts the searches. This script learns from its own trainings as well: it trains the default, then, one
after the other, what looks most promising so far. It reads every search in --out, and uses the runs of train_single and
retrain there that have the same settings. One half of the test images chooses (`val_acc`); the other half, which took
no part in any choice, is reported (`test_acc`).

Papers: Javan, Toews, Pedersoli, AutoML 2023, arXiv 2306.11982, section 5 (training); Rasmussen and Williams, Gaussian
Processes for Machine Learning, 2006; Srinivas, Krause, Kakade, Seeger, Gaussian Process Optimization in the Bandit
Setting, ICML 2010, arXiv 0912.3995 (proposals). Writes propose.json, and the weights to the folder `propose`.
"""
import math

import numpy as np

from common import (RANK, WORLD, UserError, at_least, config_text, default_config, describe, gather, parse,
                    pooling_configs, print_table, run_main, say, settings_of, write_results)
from retrain import TRAINED, known_runs, load_searches, trained_rows
from train_single import check_runs, load_for_training, summarise, train_network

# ---- The prior: what is believed before the first training, in percentage points of accuracy -------------------------
# Example: [4,3,3] was trained and has 90 %. A configuration with one pooling a layer later or earlier, with the same
# score and one deviation cheaper, is expected to have SLOPE less, 89.5 %. The deviation of this is the root of
# SLOPE^2 + 2 SMOOTH^2 (1 - exp(-1^2 / (2 x 2.5^2))) + 2 OWN_VARIANCE + NOISE^2, 0.80: a chance of 0.27 to be better.

LEVEL = 10.0  # deviation of the level that all configurations share
SLOPE = 0.5  # what one deviation of cost, or of the mean score, is worth, and the deviation of that guess
SMOOTH = 1.0  # deviation of what the pooling positions explain, alike for configurations that are near each other
LENGTH = 0.25  # how near: the length of that kernel, as a part of all layers (2.5 of 10)
OWN_VARIANCE = 0.1  # variance of what each configuration has for itself
NOISE = 0.2  # deviation between seeds
BOUND = 0.5  # deviations above the mean that a proposal counts with (upper confidence bound)


# ---- Proposals: arrays over the n configurations of a space, in the order of `pooling_configs` -----------------------

def gaussian_process(expected, features, positions, values, noise, length):
    """What to believe about n values of which some are known (Rasmussen and Williams, 2006, sections 2.2 and 2.7).

    The prior has the mean `expected` (n,), moved to the level of the known values, and the covariance
    k(i, j) = LEVEL^2 + SLOPE^2 f_i . f_j + SMOOTH^2 exp(-|p_i - p_j|^2 / (2 length^2)) + OWN_VARIANCE [i = j]
    with the rows f of `features` (n, d) and p of `positions` (n, q), and `length` in the units of p. values: (n,) in
    percentage points, NaN where unknown; noise: the deviation of known ones, (n,). Returns mean and deviation, (n,)
    each, of the values without noise. All deviations grow where the known values fit this badly and shrink where they
    fit well, so that a spread of tens of points needs no other prior."""
    seen = np.isfinite(values)
    distance = np.linalg.norm(positions[:, None] - positions, axis=-1)
    covariance = LEVEL ** 2 + SLOPE ** 2 * features @ features.T + SMOOTH ** 2 * np.exp(-0.5 * (distance / length) ** 2)
    covariance += OWN_VARIANCE * np.eye(len(values))
    if seen.any():
        expected = expected + (values - expected)[seen].mean()
    surprise = (values - expected)[seen]

    inverse = np.linalg.inv(covariance[seen][:, seen] + np.diag(noise[seen] ** 2))
    gain = covariance[:, seen] @ inverse
    mean = expected + gain @ surprise
    variance = covariance.diagonal() - (gain * covariance[:, seen]).sum(1)
    scale = (1 + surprise @ inverse @ surprise) / max(1, seen.sum())  # 1 at first, then told by the known values
    return mean, np.sqrt(scale * variance)


def chance_above(best, mean, deviation):
    """Probability that a normal variable of this mean and deviation (above 0) exceeds `best`; numbers or arrays."""
    return np.vectorize(math.erfc, otypes=[float])((best - mean) / (deviation * math.sqrt(2))) / 2


def believe(space, macs, scores, values, runs):
    """What is believed about the accuracy of every configuration: mean and deviation, (n,) each, fractions.

    space: the n configurations; macs: (n,) multiply-adds; scores: (searches, n), perhaps none; values: (n,) measured
    accuracies, NaN where there is none; runs: (n,) how many runs each is the mean of. Cost counts by its rank, or
    the few most expensive, far from all others, would be tried only because they are unknown."""
    def standardise(numbers):
        return (numbers - np.mean(numbers)) / max(np.std(numbers), 1e-9)
    cost = standardise(np.searchsorted(np.sort(macs), macs))
    searched = np.array([standardise(score) for score in scores]).reshape(-1, len(space))
    expected = SLOPE * (cost + (searched.mean(0) if len(searched) else 0))
    mean, deviation = gaussian_process(
        expected, features=np.stack([cost, *searched / max(1, len(searched)) ** 0.5], axis=1),
        positions=np.cumsum(space, axis=1)[:, :-1], length=LENGTH * sum(space[0]),
        values=100 * values, noise=NOISE / np.sqrt(np.maximum(runs, 1)))
    return mean / 100, deviation / 100


def propose(space, macs, scores, values, runs, max_macs=math.inf, count=1):
    """The `count` configurations to train next: a list of (index, why, expected accuracy, deviation, chance).

    First the default; then the largest mean plus BOUND deviations (Srinivas et al., 2010): promising before unknown.
    Without scores the second is the cheapest of the most expensive third: by cost alone it would be the most expensive
    of all, which may fail. chance: the probability to beat the best so far. A second proposal believes the mean of the
    first, and so on. There are fewer once all within `max_macs` are listed. Arguments as for `believe`."""
    values, runs = values.copy(), runs.copy()
    allowed = macs <= max_macs
    best = np.nanmax(values, initial=0.0, where=np.isfinite(values) & allowed)
    default = space.index(default_config(sum(space[0]), len(space[0])))
    expensive = sorted(np.flatnonzero(allowed), key=lambda i: -macs[i])[:max(1, allowed.sum() // 3)]
    proposals = []
    while len(proposals) < count and (todo := allowed & np.isnan(values)).any():
        mean, deviation = believe(space, macs, scores, values, runs)
        if todo[default]:
            index, why = default, "default"
        elif not len(scores) and np.isnan(values[expensive]).all():
            index, why = expensive[-1], "two thirds up in cost"
        else:
            index, why = np.argmax(np.where(todo, mean + BOUND * deviation, -math.inf)), "proposed"
        chance = chance_above(best, mean[index], deviation[index])
        proposals.append((int(index), why, mean[index], deviation[index], float(chance)))
        values[index], runs[index] = mean[index], 1
    return proposals


# ---- The script -----------------------------------------------------------------------------------------------------

def multiply_adds(text):
    """A number of multiply-adds from text: "60M", "0.06G" or a plain number."""
    return float(text.translate({ord("k"): "e3", ord("M"): "e6", ord("G"): "e9"}))


def runs_of(args, settings, *stages):
    """The finished runs of these stages with these settings: {(configuration, seed): run}.

    Each has val_acc and test_acc, on the half of the test images that chooses and on the other. Proposals and the
    choice go by the runs with a reason, `why`; those without are further seeds, which only measure what was chosen."""
    runs = {}
    for stage in stages:
        for key, run in known_runs(args, settings, stage).items():
            run["val_acc"], run["test_acc"] = run["halves"]
            runs[key] = run if stage == "propose" else {**run, "why": f"{stage}.json"}
    return runs


def observe(space, runs):
    """What the runs with a reason measured: val_acc (n,), NaN where there is none, and numbers of runs (n,)."""
    entries = summarise({key: run for key, run in runs.items() if "why" in run}, "val_acc")
    return (np.array([entries[config]["val_acc"] if config in entries else math.nan for config in space]),
            np.array([len(entries[config]["runs"]) if config in entries else 0 for config in space]))


def main():
    def options(add):
        add("--trainings", type=at_least(1), default=6, help="configurations trained in all, those in the folders "
            "single and retrain included; default 6")
        add("--runs", type=at_least(1), default=3, help="seeds of the best and the default, from --seed up; default 3")
        add("--max-macs", type=at_least(1, multiply_adds), default=math.inf, help="multiply-adds of the most expensive "
            "configuration to consider, such as 60M; default: no limit")
        add("--propose-only", action="store_true", help="train and write nothing, print what to train next")
    args = parse(__doc__, options)
    space, settings, folder = pooling_configs(args.layers, args.scales), settings_of(args), args.out / "propose"
    check_runs(folder, settings)
    searches = load_searches(args, settings)
    say(f"goes by pooling positions, cost, and the scores of {'; '.join(searches) or 'no search (none in --out)'}")
    scores = [[search[config] for config in space] for search in searches.values()]
    data = None if args.propose_only else load_for_training(args)
    fields = [describe(config, args, len(data[2]) if data else 10) for config in space]
    macs = np.array([f["macs"] for f in fields])
    allowed, usual = macs <= args.max_macs, space.index(default_config(args.layers, args.scales))
    if not allowed.any():
        raise UserError(f"--max-macs {args.max_macs:.4g} is below the cheapest configuration, {macs.min():.4g}")
    taken = runs_of(args, settings, "single", "retrain")

    while True:  # rounds: each process trains one proposal, made from all that is finished
        runs = taken | runs_of(args, settings, "propose")
        values, counts = observe(space, runs)
        if args.propose_only:
            return print_beliefs(space, macs, scores, values, counts, args.max_macs)
        known = int((counts > 0)[allowed].sum())
        total = max(min(args.trainings, allowed.sum()), known + (allowed[usual] and not counts[usual]))
        proposals = propose(space, macs, scores, values, counts, args.max_macs, min(WORLD, total - known))
        proposals = gather(proposals)[0]  # the first rank's, since other machines may round otherwise
        if not proposals:
            break
        for number, (index, why, mean, deviation, chance) in enumerate(proposals, known + 1):
            say(f"training {number} of {total}: {config_text(space[index])}, {why}" + (
                f"; expected {mean:.4f} +- {deviation:.4f}, chance to beat the best so far {chance:.2f}" * (known > 0)))
        for index, why, *_ in proposals[RANK:RANK + 1]:  # none where there are more processes than proposals
            train_network(space[index], args.seed, data, args, settings, folder, why=why, order=known + 1 + RANK)

    best = int(np.nanargmax(np.where(allowed, values, math.nan)))  # the choice; further seeds only measure it
    wanted = [(space[index], seed) for seed in range(args.seed, args.seed + args.runs)
              for index in dict.fromkeys([best, usual]) if allowed[index]]
    for config, seed in [key for key in wanted if key not in runs][RANK::WORLD]:
        train_network(config, seed, data, args, settings, folder)
    report(args, settings, data, taken | runs_of(args, settings, "propose"), fields, values)


def report(args, settings, data, runs, fields, values):
    """Write propose.json and print what was trained, within --max-macs, with its gain over the default.

    runs: from `runs_of`; fields: from `describe`, values: from `observe`, both for the whole space."""
    within = {tuple(f["config"]): {**f, "val_acc": round(float(value), 6)} for f, value in zip(fields, values)
              if f["macs"] <= args.max_macs and math.isfinite(value)}
    runs = dict(sorted((key, run) for key, run in runs.items() if key[0] in within))
    results = []
    for config, entry in summarise(runs).items():
        reason = next(run for run in entry["runs"] if "why" in run)
        results.append({**within[config], **entry, "why": reason["why"], "order": reason.get("order")})
    chose, reported = (len(half) for half in np.array_split(data[1].labels, 2))
    if RANK == 0:
        found = write_results(args, "propose", settings, data[2], results, "val_acc",
                              (len(data[0].labels), chose, reported), sum(run["seconds"] for run in runs.values()),
                              table=False, history=[entry for run in runs.values() for entry in run["history"]])
        say(f"\nval acc, %, on {chose} test images, chose {config_text(found['best']['config'])}; test acc, %, on the "
            f"{reported} others; gain over the default, points; its standard error by the seeds, and by the number of "
            f"test images (at most)")
        print_table(TRAINED, trained_rows(found))


def print_beliefs(space, macs, scores, values, counts, max_macs):
    """Print what is expected of every configuration, the best first, and which to train next."""
    mean, deviation = believe(space, macs, scores, values, counts)
    best = np.nanmax(values, initial=0.0, where=np.isfinite(values) & (macs <= max_macs))
    chance = chance_above(best, mean, deviation)
    if not counts.any():
        say("nothing is trained yet: what is expected is relative to the mean of all")
    print_table(["configuration", "M multiply-adds", "expected", "deviation", "trained", "chance to beat the best"], [
        [config_text(space[i]), f"{macs[i] / 1e6:.1f}", f"{mean[i]:.4f}", f"{deviation[i]:.4f}",
         f"{values[i]:.4f}" if counts[i] else None, f"{chance[i]:.2f}" if best and not counts[i] else None]
        for i in np.argsort(-mean)])
    proposals = propose(space, macs, scores, values, counts, max_macs)
    say(f"next: {config_text(space[proposals[0][0]]) if proposals else 'none'}")


if __name__ == "__main__":
    run_main(main)
