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

from common import config_text, kendall_tau, load_json, near_the_best, pooling_configs, print_table, run_main
from retrain import save_picture

HERE, DEFAULT = Path(__file__).parent, (4, 3, 3)
STUDENT = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13,
           2.12, 2.11, 2.10, 2.09, 2.09]  # 97.5 %, by degrees of freedom from 1 on
ALL, PART, BOTH = "CIFAR-10, 50,000 images", "CIFAR-10, 10,000 images", "CIFAR-10, both"
SEARCHES = {  # data set: {search: files, one for each seed}
    ALL: {"uniform": "cifar10/fifty-thousand/long/uniform-*", "by cost": "cifar10/fifty-thousand/long/cost-*",
          "mixture": "cifar10/fifty-thousand/long/mixture-*"},
    PART: {"uniform": "cifar10/ten-thousand/uniform-*", "by cost": "cifar10/ten-thousand/cost-seed*",
           "mixture": "cifar10/ten-thousand/mixture-seed*", "mixture, by cost": "cifar10/ten-thousand/mixture-cost-*"},
    "CIFAR-100, 25,000 images": {"uniform": "cifar100-25k/uniform*", "by cost": "cifar100-25k/supernet*",
                                 "mixture": "cifar100-25k/mixture*"},
    "Food-101, ten classes": {"uniform": "food101-10/uniform-*", "by cost": "food101-10/cost-*",
                              "mixture": "food101-10/mixture-seed*", "mixture, by cost": "food101-10/mixture-cost-*"}}
SHORT = {"uniform": "cifar10/fifty-thousand/uniform-*", "by cost": "cifar10/fifty-thousand/cost-*"}  # half as long
TRAINED = {"CIFAR-100, 25,000 images": "cifar100-25k/single-40*", "Food-101, ten classes": "food101-10/[sp]*"}
LATE = {"Food-101, ten classes, 60 epochs": "food101-10/[sp]*",
        "Food-101, ten classes, 20 epochs": "food101-10/retrain",
        "made-up images, 7 epochs": "synthetic/chain/retrain",
        "720 photos, four classes, 50 epochs": "photos/retrain"}
PAPER = {"uniform": 0.14, "mixture": 0.60}  # Kendall's tau: one run, and the mean scores of three runs
COLOURS = {"uniform": "C0", "by cost": "C1", "mixture": "C2", "mixture, by cost": "C3"}


def scores_of(pattern):
    """The scores of each seed of a search: a list of {configuration: accuracy}."""
    found = []
    for path in sorted(HERE.glob(f"{pattern}.json")):
        found.append({tuple(r["config"]): r["val_acc"] for r in load_json(path, "val_acc")["results"]})
    return found


def accuracies_of(data):
    """What each configuration reaches when trained alone: {configuration: [% of each run]}."""
    if data in TRAINED:
        return trained_alone(TRAINED[data])
    published = load_json(HERE / "published_cifar10_resnet20.json", "test_acc")["results"]
    return {tuple(r["config"]): [100 * r["test_acc"]] for r in published}


def trained_alone(pattern):
    """The accuracies of all runs in some files: {configuration: [% of each run]}."""
    found = {}
    for path in sorted(HERE.glob(f"{pattern}.json")):
        for r in load_json(path, "test_acc")["results"]:
            found.setdefault(tuple(r["config"]), []).extend(100 * run["test_acc"] for run in r["runs"])
    return found


def interval(values, others=()):
    """Mean, standard error, and the ends of the 95 % interval of the mean; None for one value.

    With `others`, of the difference of the two means, where both vary alike.
    """
    groups = [group for group in (values, others) if group]
    freedom = sum(len(group) - 1 for group in groups)
    mean = statistics.fmean(values) - (statistics.fmean(others) if others else 0)
    if freedom == 0:
        return mean, None, None, None
    variance = sum((len(group) - 1) * statistics.variance(group) for group in groups if len(group) > 1) / freedom
    error = math.sqrt(variance * sum(1 / len(group) for group in groups))
    return mean, error, mean - STUDENT[freedom - 1] * error, mean + STUDENT[freedom - 1] * error


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


def mean_scores(searches):
    """The mean score of each configuration over several searches."""
    return {config: statistics.fmean(scores[config] for scores in searches) for config in searches[0]}


def tell(values, others=(), digits=2):
    """Write what `interval` returns, and the runs: mean, standard error, 95 % interval, runs."""
    mean, error, low, high = interval(values, others)
    if error is None:
        return [f"{mean:+.{digits}f}", "-", "-", len(values)]
    return [f"{mean:+.{digits}f}", f"{error:.{digits}f}", f"{low:+.{digits}f} to {high:+.{digits}f}", len(values)]


def draw_dots(ax, place, values, colour):
    """Draw values as dots beside each other, their mean as a bar, the 95 % interval as a line."""
    ax.plot(place + 0.09 * (np.arange(len(values)) - (len(values) - 1) / 2), values, "o", color=colour, markersize=5)
    mean, _, low, high = interval(values)
    ax.plot(place, mean, "_", color="black", markersize=18)
    if low is not None:
        ax.plot([place, place], [low, high], color=colour, linewidth=1.5, zorder=0)


def draw_claims(figure, found):
    """Draw taus with the paper's as lines, gains of choices for each data set, and what was chosen."""
    figure.set_size_inches(15, 10)
    grid, truth, limit = figure.subplots(2, 3), accuracies_of(ALL), 4
    ax, ticks = grid[0, 0], {}
    for place, (data, searches) in enumerate({ALL: found[ALL], "50,000,\nhalf as long": found["short"],
                                              PART: found[PART]}.items()):
        ticks[4.5 * place + (len(searches) - 1) / 2] = data.replace("CIFAR-10, ", "").replace(" images", "")
        for number, (search, part) in enumerate(searches.items()):
            draw_dots(ax, 4.5 * place + number, part["taus"], COLOURS[search])
            if len(part["taus"]) > 1:
                ax.plot(4.5 * place + number, part["tau of means"], "D", markerfacecolor="none",
                        color=COLOURS[search])
    for search, tau in PAPER.items():
        ax.axhline(tau, color=COLOURS[search], linestyle="--")
        ax.text(17, tau + 0.01, f"the paper's {search}", color=COLOURS[search], fontsize=8, ha="right")
    ax.axhline(0.50, color="grey", linestyle=":")
    ax.text(17, 0.51, "multiply-adds alone", color="grey", fontsize=8, ha="right")
    ax.set(ylabel="Kendall's tau with the paper's accuracies", title="CIFAR-10: how well searches rank", ylim=(-0.2, 1),
           xlim=(-1, 17.2), xticks=list(ticks), xticklabels=ticks.values(), xlabel="training images")
    ax.plot([], [], "D", markerfacecolor="none", color="black", label="tau of the mean scores of the seeds")
    ax.legend(fontsize=8, loc="upper left")
    for ax, data in zip([grid[0, 1], grid[0, 2], grid[1, 0], grid[1, 1]], SEARCHES):
        for number, (search, part) in enumerate(found[data].items()):
            draw_dots(ax, number, part["first"], COLOURS[search])
            _, error, low, high = interval(part["first"])
            if error is not None and high > limit:
                ax.plot(number, limit - 0.1, "^", number, 0.1 - limit, "v", color=COLOURS[search])
                ax.text(number + 0.1, limit - 0.3, f"{low:+.0f} to {high:+.0f}", fontsize=8)
        ax.axhline(0, color="grey", linewidth=1)
        ax.set(title=f"{data}: gain of the first choice", xticks=range(len(found[data])), ylim=(-limit, limit),
               xlim=(-0.5, len(found[data]) - 0.5), xticklabels=found[data], ylabel="points over the default")
    ax = grid[1, 2]
    positions = np.cumsum(list(truth), axis=1)
    cells = ax.scatter(positions[:, 0], positions[:, 1], c=[accuracy for accuracy, in truth.values()], s=560,
                       marker="s", cmap="Greys", vmin=86, vmax=101)  # light enough to write on
    figure.colorbar(cells, ax=ax, label="accuracy trained alone, by the paper, %", boundaries=np.linspace(86, 92, 49))
    shifts = {"uniform": (-0.2, 0.2), "by cost": (0.2, 0.2), "mixture": (-0.2, -0.2), "mixture, by cost": (0.2, -0.2)}
    for search, shift in shifts.items():
        chosen = [max(scores, key=scores.get) for data in (ALL, PART) for scores in
                  found[data].get(search, {"scores": []})["scores"]]
        for config in set(chosen):
            first, second, _ = np.cumsum(config)
            ax.text(first + shift[0], second + shift[1], chosen.count(config), color=COLOURS[search], ha="center",
                    va="center", fontsize=11, weight="bold")
    for config, text in ((DEFAULT, "default"), (max(truth, key=truth.get), "best")):
        first, second, _ = np.cumsum(config)
        ax.scatter(first, second, s=560, marker="s", facecolors="none", edgecolors="black")
        ax.annotate(f"{text} {config_text(config)}", (first, second), (first + 0.2, second - 2.2), fontsize=9,
                    arrowprops={"arrowstyle": "-"})
    ax.set(xlabel="layers before the first pooling", ylabel="layers before the second pooling", xlim=(0.4, 8.8),
           ylim=(1.2, 9.6), title="CIFAR-10: how many searches chose each")
    for search, colour in COLOURS.items():
        figure.axes[0].plot([], [], "o", color=colour, label=search)
    handles = figure.axes[0].get_legend_handles_labels()[0][1:]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, title="A dot is a search with one seed, a bar "
                  "the mean, a line its 95 % interval (none for one seed)")


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


def made_up_pairs():
    """Figures of searches on the made-up images: {way: {seed: (tau, regret in points)}}.

    Of each model of a mixture as many steps as of a uniform search.
    """
    names = {"uniform": "uniform", "cost": "by cost", "mixture, 4 x the steps": "mixture of 4",
             "mixture, cost, 4 x the steps": "mixture of 4, by cost"}
    found = {}
    for way, rows in load_json(HERE / "synthetic/compare.json")["ways"].items():
        if way in names:
            found[names[way]] = {seed: (row[0], row[2]) for seed, row in enumerate(rows)}
    for way, rows in load_json(HERE / "synthetic/pairs.json")["pairs"].items():
        found.setdefault(way, {}).update({int(seed): (row[0], row[2]) for seed, row in rows.items()})
    return found


def print_pairs(found):
    """Print how well each way ranks on the made-up images, and its difference to another in pairs of a seed."""
    rows = []
    for way, runs in found.items():
        mean_regret = statistics.fmean(regret for _, regret in runs.values())
        rows.append([way, *tell([tau for tau, _ in runs.values()])[:3], f"{mean_regret:.2f}", len(runs)])
    print_table(["way", "tau", "error", "95 % interval", "regret", "seeds"], rows)
    print()
    pairs = [("mixture of 2", "uniform"), ("mixture of 4", "uniform"), ("mixture of 8", "uniform"),
             ("by cost", "uniform"), ("mixture of 4, by cost", "by cost"),
             ("mixture of 8", "mixture of 2"), ("mixture of 4", "mixture of 4, no balance")]
    rows = []
    for one, other in pairs:
        shared = sorted(found[one].keys() & found[other].keys())
        for number, name in enumerate(("tau", "regret")):
            difference = [found[one][seed][number] - found[other][seed][number] for seed in shared]
            rows.append([f"{name}, {one} minus {other}", *tell(difference)])
    print_table(["difference", "mean", "error", "95 % interval", "pairs"], rows)


def print_owned():
    """Print how many of the 36 configurations the largest of four models owns, with and without balancing."""
    owned = load_json(HERE / "synthetic/pairs.json")["owned by the largest model"]
    rows = []
    for way, counts in owned.items():
        mean, _, ends, _ = tell([*counts.values()], digits=0)
        rows.append([way, ", ".join(map(str, counts.values())), mean, ends])
    print_table(["way", "owned by the largest model, each seed", "mean", "95 % interval"], rows)


def late_rows():
    """What late pooling gains over the default, without a search, from the files in LATE."""
    rows = []
    for data, pattern in LATE.items():
        runs = trained_alone(pattern)
        rows += [[data, config_text(config), *tell(runs[config], runs[DEFAULT])] for config in ((7, 1, 2), (6, 1, 3))]
    return rows


def main():
    found, rows, ties = {}, [], []
    for data, searches in {**SEARCHES, "short": SHORT}.items():
        truth, found[data] = accuracies_of(data), {}
        for search, pattern in searches.items():
            scores = scores_of(pattern)
            first, three = gains_of_choices(data, scores, truth)
            part = found[data][search] = {"scores": scores, "first": first, "three": three}
            if data not in TRAINED:
                part["taus"], part["tau of means"] = taus(scores, truth), taus([mean_scores(scores)], truth)[0]
    found[BOTH] = {search: {key: found[ALL][search][key] + found[PART][search][key]
                            for key in ("scores", "first", "three")} for search in SHORT}
    for data in (*SEARCHES, BOTH):
        for search, part in found[data].items():
            chosen = ", ".join(config_text(max(s, key=s.get)) for s in part["scores"])
            three = tell(part["three"])[0] if part["three"] else "-"
            rows.append([data, search, chosen, *tell(part["first"])[:3], three])
    print("Gain of each search's first choice over the default, points\n")
    print_table(["data", "search", "chosen", "gain", "error", "95 % interval", "best of three"], rows)
    truth = accuracies_of(ALL)
    gains = [accuracy - truth[DEFAULT][0] for accuracy, in truth.values()]
    by_luck = statistics.fmean(map(max, itertools.combinations(gains, 3)))
    print(f"\nOn CIFAR-10 a configuration drawn at random gains {statistics.fmean(gains):+.2f}, the best of three "
          f"{by_luck:+.2f}")

    print("\nKendall's tau with the published accuracies of CIFAR-10\n")
    rows = [[data, search, *tell(part["taus"]), f"{part['tau of means']:.2f}"]
            for data in (ALL, "short", PART) for search, part in found[data].items()]
    every = {search: [tau for data in (ALL, PART, "short") for tau in found[data][search]["taus"]] for search in SHORT}
    rows += [["all", search, *tell(values), "-"] for search, values in every.items()]
    print_table(["data", "search", "tau", "error", "95 % interval", "runs", "tau of the mean scores"], rows)

    print("\nDifferences in pairs of the same seed\n")
    pairs = [("tau, mixture minus uniform, 50,000", found[ALL]["mixture"]["taus"], found[ALL]["uniform"]["taus"]),
             ("tau, by cost minus uniform, all", every["by cost"], every["uniform"]),
             ("gain, mixture minus uniform, 50,000", found[ALL]["mixture"]["first"], found[ALL]["uniform"]["first"]),
             ("gain, by cost minus uniform, both", found[BOTH]["by cost"]["first"], found[BOTH]["uniform"]["first"])]
    print_table(["difference", "mean", "error", "95 % interval", "pairs"], [
        [name, *tell([one - other for one, other in zip(ours, theirs)])] for name, ours, theirs in pairs])

    print("\nHow many of 36 scores lie within two standard errors of the best\n")
    searches = {data: [scores for part in found[data].values() for scores in part["scores"]] for data in SEARCHES}
    searches["720 photos, four classes"] = scores_of("photos/supernet*")
    for count, (data, every) in zip((25000, 5000, 12500, 1875, 360), searches.items()):
        tied = sorted(near_the_best(scores.values(), count)[0] for scores in every)
        ties.append([data, count, ", ".join(map(str, tied))])
    print_table(["data", "images that score", "tied with the best, each search"], ties)

    print("\nSearches on the made-up images, equal steps for each model\n")
    print_pairs(made_up_pairs())
    print()
    print_owned()
    print("\nLate pooling, gain over the default in points; the interval is by the seeds\n")
    print_table(["data", "configuration", "gain", "error", "95 % interval", "runs"], late_rows())
    print("\nHow many steps a search needs, made-up images\n")
    print_table(["draws", "epochs", "steps for each", "seeds", "tau", "tau between seeds", "regret"], steps_rows())
    save_picture(HERE / "claims.png", draw_claims, found)


if __name__ == "__main__":
    run_main(main)
