"""Stage 4: find the best configuration by training a handful of them from scratch, one after the other.

    python retrain.py                               # CIFAR-10: six trainings, then three seeds of best and default
    python retrain.py --trainings 10 --epochs 200   # more trainings, each longer
    python retrain.py --max-macs 60M                # none that costs more than 60 million multiply-adds
    python retrain.py --propose-only                # train nothing: what to train next, by all that lies in --out
    torchrun --nproc_per_node=4 retrain.py          # four proposals at a time, each on the GPU of its number

Reads the scores of every search in --out and the runs of single.json that were trained the same way; without a search
it goes by pooling positions and cost alone. A Gaussian process says what to expect of every configuration, the next to
be trained is the one with the highest upper confidence bound, and each result sharpens the next proposal. One half of
the test images chooses (`val_acc`), the other half, which took no part in any choice, is reported (`test_acc`).

Papers: Javan, Toews, Pedersoli, AutoML 2023, arXiv 2306.11982, section 5 (training); Rasmussen and Williams, Gaussian
Processes for Machine Learning, 2006; Srinivas, Krause, Kakade, Seeger, Gaussian Process Optimization in the Bandit
Setting, ICML 2010, arXiv 0912.3995 (proposals). Writes retrain.json, and the weights to the folder `retrain`.
"""
import json
import math

import numpy as np

from common import (RANK, WORLD, UserError, count_macs, default_config, earlier_settings, gather, identity, load_json,
                    open_stage, pareto, parse, pooling_configs, print_table, result_fields, run_main, say, show,
                    write_stage)
from train_single import finished_runs, summarise, train_network


# ---- Proposals: arrays over the n configurations of a space, in the order of `pooling_configs` -----------------------

def gaussian_process(expected, features, positions, values, noise, length):
    """What to believe about n values of which some are known (Rasmussen and Williams, 2006, sections 2.2 and 2.7).

    The prior has the mean `expected` (n,), moved to the level of the known values, and the covariance
    k(i, j) = 10^2 + 0.5^2 f_i . f_j + exp(-|p_i - p_j|^2 / (2 length^2)) + 0.1 [i = j]
    with the rows f of `features` (n, d) and p of `positions` (n, p). values: (n,) in percentage points, NaN where
    unknown; noise: the deviation of known ones, (n,). Returns mean and deviation, (n,) each, of the values without
    noise. Deviations grow where the known values fit badly, so that a spread of tens of points needs no other setting.
    """
    seen = np.isfinite(values)
    distance = np.linalg.norm(positions[:, None] - positions, axis=-1)
    covariance = 10 ** 2 + 0.5 ** 2 * features @ features.T + np.exp(-0.5 * (distance / length) ** 2)
    covariance += 0.1 * np.eye(len(values))
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


def standardise(values):
    """(n,) values to mean 0 and deviation 1."""
    return (values - np.mean(values)) / max(np.std(values), 1e-9)


def believe(space, macs, scores, values, runs, noise=0.002):
    """What is believed about every configuration's accuracy: mean and deviation, (n,) each, fractions.

    macs: (n,) multiply-adds; scores: (searches, n), perhaps none; values: (n,) measured accuracies, NaN where none;
    runs: (n,) how many runs each is the mean of; noise: the deviation between seeds. One deviation of the mean score is
    taken for half a point, and one of cost as well. Cost counts by its rank: else the few most expensive, far from all
    others, would be tried for being unknown."""
    cost = standardise(np.searchsorted(np.sort(macs), macs))
    searched = np.array([standardise(score) for score in scores]).reshape(-1, len(space))
    expected = 0.5 * (cost + (searched.mean(0) if len(searched) else 0))
    mean, deviation = gaussian_process(
        expected, features=np.stack([cost, *searched / max(1, len(searched)) ** 0.5], axis=1),
        positions=np.cumsum(space, axis=1)[:, :-1], length=sum(space[0]) / 4,
        values=100 * values, noise=100 * noise / np.sqrt(np.maximum(runs, 1)))
    return mean / 100, deviation / 100


def best_of(values, allowed):
    """The largest known one of (n,) values that are `allowed`, (n,) bool; 0 where there is none."""
    return np.nanmax(values, initial=0.0, where=np.isfinite(values) & allowed)


def propose(space, macs, scores, values, runs, max_macs=math.inf, count=1):
    """The `count` configurations to train next: a list of (index, why, expected accuracy, deviation, chance).

    First the default; then the largest mean plus half a deviation (an upper confidence bound, Srinivas et al., 2010):
    promising before unknown. Without scores the second is the cheapest of the most expensive third: by cost alone it
    would be the most expensive, which may fail. chance: the probability to beat the best so far. A second proposal
    believes the mean of the first, and so on. Fewer are listed once all within `max_macs` are. Arguments as for
    `believe`."""
    values = values.copy()
    runs = runs.copy()
    allowed = macs <= max_macs
    proposals = []
    default = space.index(default_config(sum(space[0]), len(space[0])))
    expensive = sorted(np.flatnonzero(allowed), key=lambda i: -macs[i])[:max(1, allowed.sum() // 3)]
    best = best_of(values, allowed)
    while len(proposals) < count and (todo := allowed & np.isnan(values)).any():
        mean, deviation = believe(space, macs, scores, values, runs)
        if todo[default]:
            index, why = default, "default"
        elif not len(scores) and np.isnan(values[expensive]).all():
            index, why = expensive[-1], "two thirds up in cost"
        else:
            index, why = np.argmax(np.where(todo, mean + 0.5 * deviation, -math.inf)), "proposed"
        chance = chance_above(best, mean[index], deviation[index])
        proposals.append((int(index), why, mean[index], deviation[index], float(chance)))
        values[index], runs[index] = mean[index], 1
    return proposals


# ---- The stage ------------------------------------------------------------------------------------------------------

def multiply_adds(text):
    """A number of multiply-adds from text: "60M", "0.06G" or a plain number."""
    units = {"k": 1e3, "M": 1e6, "G": 1e9}
    return float(text[:-1]) * units[text[-1]] if text[-1:] in units else float(text)


def load_scores(args, space, digest=None):
    """The scores of the searches in --out, an array (n,) for each setting: its seeds are averaged. Says what it read.

    digest: see `identity`. A file that is no search of these images is left alone, and named."""
    groups = {}
    for path in sorted(args.out.glob("*.json")):
        if path.name in ("single.json", "retrain.json"):
            continue
        try:
            if load_json(path).get("stage") not in ("supernet", "mixture"):
                raise UserError("it is no search")
            search = load_json(path, "val_acc", **identity(args, digest))
            scores = {tuple(r["config"]): r["val_acc"] for r in search["results"]}
            if sorted(scores) != space:
                raise UserError("it does not score each configuration once")
        except UserError as error:
            say(f"{path} is left alone: {error}")
            continue
        say(f"reading the scores of {path}")
        setting = {**search.get("args", {}), "stage": search["stage"], "seed": None, "amp": None}
        groups.setdefault(json.dumps(setting, sort_keys=True), []).append([scores[config] for config in space])
    if not groups:
        say("no search here: going by positions and cost alone. `python search_supernet.py` costs about as much as one "
            "training of as many epochs; simulated, its scores helped on one truth of three (results/README.md)")
    return [np.mean(seeds, axis=0) for seeds in groups.values()]


def known_runs(args, settings, stage):
    """The runs of "single" or "retrain" that have these settings: {(configuration, seed): run}. Says what others have.

    Each has val_acc and test_acc, on the half of the test images that chooses and on the other."""
    runs = {}
    other = set()
    for key, run in finished_runs(args, stage).items():
        differ = {name for name, value in settings.items() if run["args"].get(name) != value}
        other |= {"images" if name == "data_digest" else f"--{name.replace('_', '-')}" for name in differ}
        if "halves" in run:
            run["val_acc"], run["test_acc"] = run.pop("halves")
        if "val_acc" in run and not differ:
            runs[key] = {"why": "single.json", **run} if stage == "single" else run
    if other:
        say(f"runs of {stage}.json are left alone, for they were trained with other {', '.join(sorted(other))}")
    return runs


def observe(space, runs):
    """Accuracies that chose and numbers of runs, (n,) each, in the order of `space`; NaN and 0 where there is none."""
    entries = summarise(runs, "val_acc")
    return (np.array([entries[config]["val_acc"] if config in entries else math.nan for config in space]),
            np.array([len(entries[config]["runs"]) if config in entries else 0 for config in space]))


def print_beliefs(space, macs, scores, runs, max_macs):
    """Print what is expected of every configuration, the best first, and which to train next."""
    values, counts = observe(space, runs)
    mean, deviation = believe(space, macs, scores, values, counts)
    best = best_of(values, macs <= max_macs)
    chance = chance_above(best, mean, deviation)
    if not counts.any():
        say("nothing is trained yet: what is expected is relative to the mean of all")
    print_table(["configuration", "M multiply-adds", "expected", "deviation", "trained", "chance to beat the best"], [
        [show(space[i]), f"{macs[i] / 1e6:.1f}", f"{mean[i]:.4f}", f"{deviation[i]:.4f}",
         f"{values[i]:.4f}" if counts[i] else None, f"{chance[i]:.2f}" if best and not counts[i] else None]
        for i in np.argsort(-mean)])
    proposals = propose(space, macs, scores, values, counts, max_macs)
    say(f"next: {show(space[proposals[0][0]]) if proposals else 'none'}")


def main():
    def options(add):
        add("--trainings", type=int, default=6, help="configurations trained in all, with the default and "
            "with what is taken over from single.json; default 6")
        add("--runs", type=int, default=3, help="seeds of the best and of the default, from --seed up; default 3")
        add("--max-macs", type=multiply_adds, help="of the most expensive configuration to train, such as 60M")
        add("--propose-only", action="store_true", help="train and write nothing, print what to train next")
    args = parse(__doc__, options)
    args.max_macs = args.max_macs or math.inf
    space = pooling_configs(args.layers, args.scales)
    data = None
    if not args.propose_only:
        data, settings = open_stage(args, "retrain", {"seed", "trainings", "runs", "max_macs", "propose_only"})
    classes = len(data.classes) if data else 10
    macs = np.array([count_macs(c, 3, classes, args.stem, args.image_size // args.stem) for c in space])
    if macs.min() > args.max_macs:
        raise UserError(f"--max-macs {args.max_macs:.4g} is below the cheapest configuration, {macs.min():.4g}")
    scores = gather(load_scores(args, space, data and data.digest))[0]
    if args.propose_only:
        same = {"image_size": args.image_size, "dataset": identity(args)["dataset"]}
        settings = {**(earlier_settings(args.out, "retrain") or {}), **same}
        runs = {**known_runs(args, settings, "single"), **known_runs(args, settings, "retrain")}
        print_beliefs(space, macs, scores, runs, args.max_macs)
    else:
        train_best(args, data, settings, space, macs, scores)


def next_round(runs, trainings):
    """Numbers of the first and the last training of the next round, or of one that was stopped: one for each process.

    A round is proposed by what was known before it, so a stopped one is the same when it is proposed again."""
    rounds = {run["order"]: run["round"] for run in runs.values() if "order" in run}
    first, last = rounds[max(rounds)] if rounds else (1, 0)
    if all(number in rounds for number in range(first, last + 1)):
        first, last = last + 1, min(last + WORLD, trainings)
    return first, last


def train_best(args, data, settings, space, macs, scores):
    """From the scores to retrain.json."""
    default = default_config(args.layers, args.scales)
    folder = args.out / "retrain"
    taken = known_runs(args, settings, "single")
    runs = {**taken, **known_runs(args, settings, "retrain")}
    own = {config for (config, _), run in runs.items() if "order" in run}
    trainings = args.trainings - len({config for config, _ in taken} - own)

    # ---- rounds of proposals, one for each process -------------------------------------------------------------------
    while True:
        first, last = next_round(runs, trainings)
        before = {key: run for key, run in runs.items() if run.get("order", 0) < first}
        proposals = propose(space, macs, scores, *observe(space, before), args.max_macs, count=last - first + 1)
        proposals = gather(proposals)[0]  # the same on every machine, whatever its arithmetic
        todo = []
        last = first + len(proposals) - 1
        for number, (index, why, mean, deviation, chance) in enumerate(proposals, first):
            if not any(run.get("order") == number for run in runs.values()):
                todo.append((number, space[index], why))
                text = f"training {number} of {trainings}: {show(space[index])}, {why}"
                if before:
                    text += f"; expected {mean:.4f} +- {deviation:.4f}, chance to beat the best so far {chance:.2f}"
                say(text)
        if not todo:  # enough, or all that --max-macs allows, also where a round was stopped that began with another
            break
        for number, config, why in todo[RANK::WORLD]:
            train_network(config, args.seed, data, args, settings, folder, why=why, order=number, round=[first, last])
        runs = {**taken, **known_runs(args, settings, "retrain")}

    # ---- the choice, once, by the first seeds; then further seeds, which only measure it -----------------------------
    allowed = [config for config, cost in zip(space, macs) if cost <= args.max_macs]
    first_seeds = {}
    for (config, _), run in sorted(runs.items(), key=lambda item: ("why" not in item[1], item[0])):
        first_seeds.setdefault(config, run)  # a further seed, which has no reason of its own, where there is no other
    best = max((config for config in first_seeds if config in allowed), default=None,
               key=lambda config: first_seeds[config]["val_acc"])
    if best is None:
        raise UserError(f"--max-macs {args.max_macs:.4g}: none that cheap is trained yet; raise --trainings")
    missing = [(config, seed) for seed in range(args.seed, args.seed + args.runs)
               for config in dict.fromkeys([best, default]) if config in allowed and (config, seed) not in runs]
    for config, seed in missing[RANK::WORLD]:
        say(f"another seed of {show(config)}, {'the best' if config == best else 'the default'}", every_rank=True)
        train_network(config, seed, data, args, settings, folder)
    runs = dict(sorted({**taken, **known_runs(args, settings, "retrain")}.items()))

    # ---- report -----------------------------------------------------------------------------------------------------
    results = []
    for config, entry in summarise(runs).items():
        if config in allowed or config == default:
            first = first_seeds.get(config, entry["runs"][0])  # the default may have come as a further seed just now
            results.append({**result_fields(config, data, args), "val_acc": first["val_acc"], **entry,
                            "why": first.get("why"), "order": first.get("order")})
    front = pareto(results, "test_acc")
    if RANK == 0:
        chose = len(data.test) // 2
        counts = len(data.train), chose, len(data.test) - chose
        write_stage(args, "retrain", data, settings, results, "val_acc", counts,
                    seconds=sum(run["seconds"] for run in runs.values()),
                    history=[entry for run in runs.values() for entry in run["history"]],
                    best=next(r for r in results if r["config"] == list(best)),
                    pareto=[r["config"] for r in front])
    by_config = {tuple(r["config"]): r for r in results}
    base = by_config.get(default)
    rows = []
    for r in sorted(results, key=lambda r: -r["val_acc"]):
        rows.append([show(r["config"]), r["why"], r["order"], f"{r['macs'] / 1e6:.1f}", f"{r['val_acc']:.4f}",
                     f"{r['test_acc']:.4f}", f"{r['std']:.4f}" if r["std"] is not None else None, len(r["runs"]),
                     f"{100 * (r['test_acc'] - base['test_acc']):+.2f}" if base else None, "*" if r in front else ""])
    say()
    print_table(["configuration", "why", "trained as", "M multiply-adds", "val acc", "test acc", "deviation", "runs",
                 "gain, points", "Pareto"], rows)
    say(f"val acc: the half of the test images that chose {show(best)}; test acc: the other half, mean over the runs")
    if base and best != default and by_config[best]["std"] is not None and base["std"] is not None:
        pair = by_config[best], base
        error = math.sqrt(sum(r["std"] ** 2 / len(r["runs"]) for r in pair))
        say(f"{show(best)} against the default: {100 * (pair[0]['test_acc'] - pair[1]['test_acc']):+.2f} points, "
            f"standard error of the seeds {100 * error:.2f}")
    further = propose(space, macs, scores, *observe(space, runs), args.max_macs)
    if further:
        index, _, mean, deviation, chance = further[0]
        say(f"next would come {show(space[index])}, expected {mean:.4f} +- {deviation:.4f}, chance to beat the best "
            f"{chance:.2f}")
    say(f"wrote {args.out / 'retrain.json'}")


if __name__ == "__main__":
    run_main(main)
