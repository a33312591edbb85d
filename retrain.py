"""Stage 4: find the best configuration by training a handful of them from scratch, one after the other.

    python retrain.py                               # CIFAR-10: six trainings, then three seeds of best and default
    python retrain.py --trainings 10 --epochs 200   # more trainings, each longer
    python retrain.py --max-macs 60M                # none that costs more than 60 million multiply-adds
    python retrain.py --propose-only                # train nothing: what to train next, by all that lies in --out
    torchrun --nproc_per_node=2 retrain.py          # the ranks share each batch, so the order of trainings is the same

Reads the scores of every search in --out (at least one) and the runs of single.json that were trained the same way. A
Gaussian process over pooling positions, cost and scores says what to expect of every configuration; the next to be
trained is the one with the highest upper confidence bound, and each result sharpens the next proposal.

Papers: Javan, Toews, Pedersoli, AutoML 2023, arXiv 2306.11982, section 5 (training); Rasmussen and Williams, Gaussian
Processes for Machine Learning, 2006; Srinivas, Krause, Kakade, Seeger, Gaussian Process Optimization in the Bandit
Setting, ICML 2010, arXiv 0912.3995 (proposals). Writes retrain.json.
"""
import math
from pathlib import Path

import numpy as np

from common import (RANK, WORLD, UserError, default_config, from_rank_0, load_json, open_stage, pareto, parse,
                    pooling_configs, print_table, result_fields, run_main, say, show, write_stage)
from train_single import finished_runs, summarise, train_network


# ---- Proposals ------------------------------------------------------------------------------------------------------

def gaussian_process(expected, features, positions, values, noise, length):
    """What to believe about n values of which some are known (Rasmussen and Williams, 2006, sections 2.2 and 2.7).

    Before any is known they are `expected`, (n,), give or take: one level for all, a straight line of slope 0.5 over
    each of the `features`, (n, d), something smooth over `positions`, (n, p), within about `length`, and a bit each.
    values: (n,) in percentage points, NaN where unknown; noise: the deviation of known ones, (n,).
    Returns mean and deviation, (n,) each, of the values without noise. Deviations grow where the known values fit
    badly, so that a spread of tens of points needs no other setting."""
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


def standardise(values, space):
    """{configuration: value} as an array in the order of `space`: mean 0, deviation 1, and 0 where one is missing."""
    array = np.array([values.get(config, math.nan) for config in space], float)
    return np.nan_to_num((array - np.nanmean(array)) / max(np.nanstd(array), 1e-9))


def believe(macs, scores, observed, noise=0.002):
    """What is believed about every configuration's accuracy: arrays mean and deviation, in the order of `macs`.

    macs: {configuration: multiply-adds}, the whole space; scores: {configuration: accuracy} of each search, a list;
    observed: {configuration: (mean accuracy, runs)}; noise: the deviation between seeds. Accuracies are fractions.
    One deviation of the mean score is taken for half a point, and one of cost as well. Cost counts by its rank: else
    the few most expensive, far from all others, would be tried for being unknown."""
    order = sorted(macs.values())
    cost = standardise({config: order.index(macs[config]) for config in macs}, macs)
    searched = np.array([standardise(search, macs) for search in scores] or [0 * cost])
    accuracies, runs = np.array([observed.get(config, (math.nan, 1)) for config in macs], float).T
    mean, deviation = gaussian_process(
        expected=0.5 * (cost + searched.mean(0)), features=np.stack([cost, *searched / len(searched) ** 0.5], axis=1),
        positions=np.cumsum(list(macs), axis=1)[:, :-1], length=sum(next(iter(macs))) / 4,
        values=100 * accuracies, noise=100 * noise / np.sqrt(runs))
    return mean / 100, deviation / 100


def propose(macs, scores, observed, max_macs=None):
    """The configuration to train next, why, and what is believed of all: {configuration: (mean, deviation, chance)}.

    First the default; then the best-scored of the most expensive third, for searches score what is expensive too low,
    and this shows by how much; then the largest mean plus half a deviation (an upper confidence bound, Srinivas et
    al., 2010): promising before unknown. `chance` is the probability to beat the best so far. Arguments as for
    `believe`. None is proposed once all within `max_macs` are trained."""
    allowed = sorted((c for c in macs if macs[c] <= (max_macs or math.inf)), key=macs.get, reverse=True)
    todo = [config for config in allowed if config not in observed]
    best = max((observed[config][0] for config in allowed if config in observed), default=0.0)
    mean, deviation = believe(macs, scores, observed)
    beliefs = dict(zip(macs, zip(mean, deviation, chance_above(best, mean, deviation))))

    default = default_config(sum(next(iter(macs))), len(next(iter(macs))))
    expensive = allowed[:max(1, len(allowed) // 3)]
    if not todo:
        return None, None, beliefs
    if default in todo:
        return default, "default", beliefs
    if not observed.keys() & expensive:
        score = sum((standardise(search, macs) for search in scores), np.zeros(len(macs)))
        return max(expensive, key=dict(zip(macs, score)).get), "best of its cost class", beliefs
    return max(todo, key=dict(zip(macs, mean + 0.5 * deviation)).get), "proposed", beliefs


# ---- The stage ------------------------------------------------------------------------------------------------------

def multiply_adds(text):
    """A number of multiply-adds from text: "60M", "0.06G" or a plain number."""
    units = {"k": 1e3, "M": 1e6, "G": 1e9}
    return float(text[:-1]) * units[text[-1]] if text[-1:] in units else float(text)


def load_scores(args):
    """The searches in --out: ({configuration: multiply-adds}, a list of {configuration: score}). Raises UserError."""
    macs, scores = {}, []
    for path in sorted(args.out.glob("*.json")):
        if load_json(path).get("stage") in ("supernet", "mixture"):
            name = Path(args.dataset).resolve().name
            results = load_json(path, "val_acc", dataset=name, space=args.space)["results"]
            macs = {tuple(r["config"]): r["macs"] for r in sorted(results, key=lambda r: r["config"])}
            scores.append({tuple(r["config"]): r["val_acc"] for r in results})
            if list(macs) != pooling_configs(args.layers, args.scales):
                raise UserError(f"{path} does not score each configuration once: delete it and search again")
    if not scores:
        raise UserError(f"{args.out} holds no search: run `python search_supernet.py --dataset {args.dataset} "
                        f"--out {args.out}` first")
    if args.max_macs and args.max_macs < min(macs.values()):
        raise UserError(f"--max-macs {args.max_macs:.4g} is below the cheapest configuration, {min(macs.values()):.4g}")
    return macs, scores


def known_runs(args, settings):
    """The runs of this stage, and those of single.json with these settings: {(configuration, seed): run}."""
    single = finished_runs(args, "single")
    same = {key: {**run, "why": "single.json"} for key, run in single.items()
            if all(run["args"].get(name) == value for name, value in settings.items() if name != "seed")}
    return {**same, **finished_runs(args, "retrain")}


def print_beliefs(macs, scores, observed, max_macs):
    """Print what is expected of every configuration, the best first, and which to train next."""
    config, _, beliefs = propose(macs, scores, observed, max_macs)
    rows = []
    for other, (mean, deviation, chance) in sorted(beliefs.items(), key=lambda item: -item[1][0]):
        rows.append([show(other), f"{macs[other] / 1e6:.1f}", f"{mean:.4f}", f"{deviation:.4f}", f"{chance:.2f}",
                     f"{observed[other][0]:.4f}" if other in observed else None])
    print_table(["configuration", "M multiply-adds", "expected", "deviation", "chance to be best", "trained"], rows)
    say(f"next: {show(config) if config else 'none'}")


def main():
    def options(add):
        add("--trainings", type=int, default=6, help="configurations trained in all, with the default; default 6")
        add("--runs", type=int, default=3, help="seeds of the best and of the default, from --seed up; default 3")
        add("--max-macs", type=multiply_adds, help="of the most expensive configuration to train, such as 60M")
        add("--propose-only", action="store_true", help="train and write nothing, print what to train next")
    args = parse(__doc__, options)
    macs, scores = from_rank_0(load_scores(args) if RANK == 0 else None)
    if args.propose_only:
        earlier = args.out / "retrain.json"
        runs = known_runs(args, load_json(earlier)["args"] if earlier.exists() else {})
        observed = {config: (entry["test_acc"], len(entry["runs"])) for config, entry in summarise(runs).items()}
        print_beliefs(macs, scores, observed, args.max_macs)
    else:
        with open_stage(args, "retrain", ignore={"seed"}) as (args, data, settings):
            train_best(args, data, settings, macs, scores)


def train_best(args, data, settings, macs, scores):
    """From the scores to retrain.json."""
    default = default_config(args.layers, args.scales)

    # ---- the loop: what is promising, one after the other; then more seeds of the default and of the best ------------
    while True:
        runs = known_runs(args, settings)
        entries = summarise(runs)
        observed = {config: (entry["test_acc"], len(entry["runs"])) for config, entry in entries.items()}
        config, why, beliefs = from_rank_0(propose(macs, scores, observed, args.max_macs))
        number, seed = 1 + sum("order" in run for run in runs.values()), args.seed
        if config and number <= args.trainings:
            note = {"why": why, "order": number}
            text = f"training {number} of {args.trainings}: {show(config)}, {why}"
            if observed:
                text += "; expected {:.4f} +- {:.4f}, chance to beat the best so far {:.2f}".format(*beliefs[config])
            say(text)
        else:
            allowed = [c for c in observed if macs[c] <= (args.max_macs or math.inf)]
            if not allowed:
                raise UserError(f"--max-macs {args.max_macs:.4g}: none that cheap is trained yet; raise --trainings")
            best = max(allowed, key=observed.get)
            missing = [(c, seed) for seed in range(args.seed, args.seed + args.runs) for c in (best, default)
                       if c in allowed and (c, seed) not in runs]
            if not missing:
                break
            config, seed = missing[0]
            note = {}
            say(f"another seed of {show(config)}, {'the best so far' if config == best else 'the default'}")
        train_network(config, seed, data, args, settings, args.out / "retrain", WORLD > 1, note)

    # ---- report -----------------------------------------------------------------------------------------------------
    results = []
    for config, entry in entries.items():
        first = next((run for run in entry["runs"] if "why" in run), {})
        notes = {"why": first.get("why"), "order": first.get("order")}
        results.append({**result_fields(config, data, args), **entry, **notes})
    write_stage(args, "retrain", data, settings, results, "test_acc", (len(data.train), 0, len(data.test)),
                seconds=sum(run["seconds"] for run in runs.values()),
                history=[entry for run in runs.values() for entry in run["history"]])
    base, front, rows = entries.get(default, {}).get("test_acc"), pareto(results, "test_acc"), []
    for r in sorted(results, key=lambda r: -r["test_acc"]):
        rows.append([show(r["config"]), r["why"], r["order"], f"{r['macs'] / 1e6:.1f}", f"{r['test_acc']:.4f}",
                     f"{r['std']:.4f}" if r["std"] is not None else None, len(r["runs"]),
                     f"{100 * (r['test_acc'] - base):+.2f}" if base else None, "*" if r in front else ""])
    say()
    print_table(["configuration", "why", "trained as", "M multiply-adds", "test acc", "deviation", "runs",
                 "gain, points", "Pareto"], rows)
    later = [run["test_acc"] for run in entries[best]["runs"][1:]]
    if later and base and best != default:
        say(f"{show(best)} by the seeds that took no part in its choice: {100 * (np.mean(later) - base):+.2f} points")
    open_ones = [c for c in macs if c not in observed and macs[c] <= (args.max_macs or math.inf)]
    if open_ones:
        likely = max(open_ones, key=lambda c: beliefs[c][2])
        say("not trained: the most promising is {}, expected {:.4f} +- {:.4f}, chance to beat the best {:.2f}".format(
            show(likely), *beliefs[likely]))
    say(f"wrote {args.out / 'retrain.json'}")


if __name__ == "__main__":
    run_main(main)
