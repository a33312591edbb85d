"""The claims of the paper against the runs in this folder: intervals, and the picture claims.png.

    python -m results.claims        # in the project's folder

A choice of a search is worth what it gains over the default when both are trained alone. On CIFAR-10 the
paper's accuracies say that (published_cifar10_resnet20.json), on the other sets our own trainings. An
interval holds the mean of all runs that could be made with a probability of 95 %, by Student's t.
"""
import itertools
import math
import statistics
from pathlib import Path

import numpy as np

from common import config_text, kendall_tau, load_json, pooling_configs, print_table, run_main
from retrain import save_picture

HERE, DEFAULT = Path(__file__).parent, (4, 3, 3)
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 8: 2.36, 9: 2.31, 12: 2.20}  # 97.5 %, by runs
ALL, PART = "CIFAR-10, 50,000 images", "CIFAR-10, 10,000 images"
SEARCHES = {  # data set: {search: files, one for each seed}
    ALL: {"uniform": "cifar10/fifty-thousand/long/uniform-*", "by cost": "cifar10/fifty-thousand/long/cost-*",
          "mixture": "cifar10/fifty-thousand/long/mixture-*"},
    PART: {"uniform": "cifar10/ten-thousand/uniform-*", "by cost": "cifar10/ten-thousand/cost-seed*",
           "mixture": "cifar10/ten-thousand/mixture-seed*", "mixture, by cost": "cifar10/ten-thousand/mixture-cost-*"},
    "CIFAR-100, 25,000 images": {"uniform": "cifar100-25k/uniform*", "by cost": "cifar100-25k/supernet*",
                                 "mixture": "cifar100-25k/mixture*"},
    "Food-101, ten classes": {"uniform": "food101-10/uniform-*", "by cost": "food101-10/cost-*",
                              "mixture": "food101-10/mixture-seed*", "mixture, by cost": "food101-10/mixture-cost-*"}}
TRAINED = {"CIFAR-100, 25,000 images": "cifar100-25k/single-40*", "Food-101, ten classes": "food101-10/[sp]*"}
PAPER = {"uniform": 0.14, "mixture": 0.60}  # Kendall's tau: one run, and the mean scores of three runs


def scores_of(pattern):
    """The scores of each seed of a search: a list of {configuration: accuracy}."""
    found = []
    for path in sorted(HERE.glob(f"{pattern}.json")):
        found.append({tuple(r["config"]): r["val_acc"] for r in load_json(path, "val_acc")["results"]})
    return found


def accuracies_of(data):
    """What each configuration reaches when trained alone: {configuration: [% of each run]}."""
    if data not in TRAINED:
        published = load_json(HERE / "published_cifar10_resnet20.json", "test_acc")["results"]
        return {tuple(r["config"]): [100 * r["test_acc"]] for r in published}
    found = {}
    for path in sorted(HERE.glob(f"{TRAINED[data]}.json")):
        for r in load_json(path, "test_acc")["results"]:
            found.setdefault(tuple(r["config"]), []).extend(100 * run["test_acc"] for run in r["runs"])
    return found


def interval(values):
    """Mean, standard error, and the ends of the 95 % interval of the mean; None for one value."""
    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return mean, None, None, None
    error = statistics.stdev(values) / math.sqrt(count)
    return mean, error, mean - STUDENT[count] * error, mean + STUDENT[count] * error


def gains_of_choices(data, searches, truth):
    """The gain of the first choice, and of the best of the first three, in points: two lists."""
    first, three = [], []
    for scores in searches:
        ranked = sorted(scores, key=scores.get, reverse=True)[:3]
        known = [statistics.fmean(truth[config]) - statistics.fmean(truth[DEFAULT]) for config in ranked
                 if config in truth]
        if ranked[0] in truth:
            first.append(known[0])
        if len(known) == 3:
            three.append(max(known))
    return first, three


def taus(searches, truth):
    """Kendall's tau of each seed with the truth."""
    configs = pooling_configs()
    true = [statistics.fmean(truth[config]) for config in configs]
    return [kendall_tau([scores[config] for config in configs], true) for scores in searches]


def tell(values, digits=2):
    """Write a list and its interval: mean, standard error, 95 % interval, runs."""
    mean, error, low, high = interval(values)
    if error is None:
        return [f"{mean:+.{digits}f}", "-", "-", 1]
    return [f"{mean:+.{digits}f}", f"{error:.{digits}f}", f"{low:+.{digits}f} to {high:+.{digits}f}", len(values)]


def draw_claims(figure, found):
    """Draw taus with the paper's as lines, gains of choices for each data set, and what was chosen."""
    figure.set_size_inches(15, 9)
    grid = figure.subplots(2, 3)
    colours = {"uniform": "C0", "by cost": "C1", "mixture": "C2", "mixture, by cost": "C3"}
    ax = grid[0, 0]
    for place, data in enumerate((ALL, PART)):
        for number, (search, part) in enumerate(found[data].items()):
            x = np.full(len(part["taus"]), 5 * place + number)
            ax.plot(x, part["taus"], "o", color=colours[search], label=search if place else None)
    for search, tau in PAPER.items():
        ax.axhline(tau, color=colours[search], linestyle="--", label=f"the paper's {search}")
    ax.axhline(0.50, color="grey", linestyle=":", label="ranking by cost alone")
    ax.set(ylabel="Kendall's tau with the published accuracies", title="how well searches rank, a dot for each seed",
           xticks=[1, 6.5], xticklabels=["50,000 images", "10,000 images"], ylim=(-0.1, 1))
    ax.legend(fontsize=8, ncols=2)
    for ax, data in zip([grid[0, 1], grid[0, 2], grid[1, 0], grid[1, 1]], found):
        for number, (search, part) in enumerate(found[data].items()):
            mean, _, low, high = interval(part["first"])
            if low is not None:
                ax.plot([number, number], [low, high], color=colours[search], linewidth=2)
            ax.plot(np.full(len(part["first"]), number), part["first"], "o", color=colours[search])
            ax.plot(number, mean, "_", color="black", markersize=18)
        ax.axhline(0, color="grey", linewidth=1)
        ax.set(title=f"{data}: gain of the first choice", xticks=range(len(found[data])), ylim=(-4, 4),
               xticklabels=found[data], ylabel="points over the default")
    grid[1, 0].set_xlabel("dots: seeds; bar: their mean; line: its 95 % interval")
    ax = grid[1, 2]
    truth = accuracies_of(ALL)
    ranked = sorted(truth, key=truth.get)
    positions = np.cumsum(ranked, axis=1)
    ax.scatter(positions[:, 0], positions[:, 1], c=range(36), s=500, marker="s", cmap="summer_r", alpha=0.6)
    shifts = {"uniform": (-0.2, 0.2), "by cost": (0.2, 0.2), "mixture": (-0.2, -0.2), "mixture, by cost": (0.2, -0.2)}
    for search, shift in shifts.items():
        chosen = [max(scores, key=scores.get) for data in (ALL, PART) for scores in
                  found[data].get(search, {"scores": []})["scores"]]
        for config in set(chosen):
            first, second, _ = np.cumsum(config)
            ax.text(first + shift[0], second + shift[1], chosen.count(config), color=colours[search], ha="center",
                    va="center", fontsize=10, weight="bold")
    ax.scatter(4, 7, s=500, marker="s", facecolors="none", edgecolors="black", label="the default")
    ax.set(xlabel="layers before the first pooling", ylabel="layers before the second pooling",
           title="CIFAR-10: how often each was chosen (colours as above)")
    ax.legend(loc="lower right", markerscale=0.5, title="greener: better by the paper")


def steps_rows():
    """How a search on the made-up images gets better with its steps, from synthetic/steps.json.

    Rows of draws, epochs, steps for each configuration, seeds, mean tau with the truth, mean tau between two seeds,
    and mean regret in points.
    """
    single = load_json(HERE / "synthetic/single.json", "test_acc")["results"]
    truth = {tuple(r["config"]): 100 * r["test_acc"] for r in single}
    groups = {}
    for name, results in load_json(HERE / "synthetic/steps.json")["runs"].items():
        sampler, epochs, _ = name.split(", ")
        key = sampler, int(epochs.split()[0]), sum(r["steps"] for r in results)
        groups.setdefault(key, []).append({tuple(r["config"]): r["val_acc"] for r in results})
    rows = []
    for (sampler, epochs, steps), searches in sorted(groups.items()):
        configs = sorted(set(truth).intersection(*searches))
        scores = [[search[config] for config in configs] for search in searches]
        with_truth = [kendall_tau(own, [truth[config] for config in configs]) for own in scores]
        between = [kendall_tau(one, other) for one, other in itertools.combinations(scores, 2)]
        regrets = [max(truth.values()) - truth[max(search, key=search.get)] for search in searches]
        rows.append([sampler, epochs, f"{steps / 36:.1f}", len(searches), *(f"{statistics.fmean(values):.2f}" for
                                                                         values in (with_truth, between, regrets))])
    return rows


def main():
    found, rows = {}, []
    for data, searches in SEARCHES.items():
        truth, found[data] = accuracies_of(data), {}
        for search, pattern in searches.items():
            scores = scores_of(pattern)
            first, three = gains_of_choices(data, scores, truth)
            part = {"scores": scores, "first": first, "three": three}
            if data not in TRAINED:
                part["taus"] = taus(scores, truth)
            found[data][search] = part
            chosen = ", ".join(config_text(max(s, key=s.get)) for s in scores)
            rows.append([data, search, chosen, *tell(first)[:3], tell(three)[0] if three else "-"])
    print("Gain of each search's first choice over the default, points\n")
    print_table(["data", "search", "chosen", "gain", "error", "95 % interval", "best of three"], rows)
    print("\nKendall's tau with the published accuracies of CIFAR-10\n")
    rows = [[data, search, *tell(part["taus"])] for data in (ALL, PART) for search, part in found[data].items()]
    several = scores_of("cifar10/fifty-thousand/uniform-*") + scores_of("cifar10/fifty-thousand/cost-*")
    truth = accuracies_of(ALL)
    extra = {"uniform": taus(several[:2], truth), "by cost": taus(several[2:], truth)}  # half as long
    every = {search: found[ALL][search]["taus"] + found[PART][search]["taus"] + extra[search] for search in extra}
    rows += [["all lengths", search, *tell(values)] for search, values in every.items()]
    print_table(["data", "search", "tau", "error", "95 % interval", "runs"], rows)
    print("\nDifferences in pairs of the same seed\n")
    pairs = [("tau, mixture minus uniform, 50,000", found[ALL]["mixture"]["taus"], found[ALL]["uniform"]["taus"]),
             ("tau, by cost minus uniform, all lengths", every["by cost"], every["uniform"]),
             ("gain, mixture minus uniform, 50,000", found[ALL]["mixture"]["first"], found[ALL]["uniform"]["first"])]
    print_table(["difference", "mean", "error", "95 % interval", "pairs"], [
        [name, *tell([one - other for one, other in zip(ours, theirs)])] for name, ours, theirs in pairs])
    first, three = [], []
    for pattern in ("cifar10/**/uniform-*", "cifar10/**/cost-seed*", "cifar10/**/mixture-*"):
        for gains, values in zip((first, three), gains_of_choices(ALL, scores_of(pattern), truth)):
            gains.extend(values)
    print(f"\nOf {len(first)} searches on CIFAR-10 {sum(gain < 0 for gain in first)} put one first that is worse than "
          f"the default; the best of the first three gains {min(three):.2f} to {max(three):.2f}")
    print("\nHow many steps a search needs, made-up images\n")
    print_table(["draws", "epochs", "steps for each", "seeds", "tau", "tau between seeds", "regret"], steps_rows())
    save_picture(HERE / "claims.png", draw_claims, found)


if __name__ == "__main__":
    run_main(main)
