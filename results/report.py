"""A folder of results as tables and pictures: where to pool, what it costs, how well searches and proposals do.

    python -m results.report results/cifar10 --truth results/published_cifar10_resnet20.json --simulate

Prints a table of all searches in the folder and below, judged by the folder's single.json and by what --truth names,
and one of how the models of mixtures share out the space.
pooling.png shows these truths, searches.png scores against the last of them, retrain.png what stage 4 expects and has
found, simulation.png how soon its proposals find the best. Pictures need matplotlib and three resolutions.
"""
import itertools
import math
from argparse import RawDescriptionHelpFormatter
from functools import partial
from pathlib import Path

import numpy as np

from common import (Parser, UserError, count_macs, default_config, kendall_tau, load_json, pareto, pooling_configs,
                    run_main, say, show)
from retrain import believe, propose
from search_supernet import exposure


def markdown(header, rows):
    """A Markdown table as a list of lines."""
    return ["| " + " | ".join(map(str, cells)) + " |" for cells in (header, ["---"] * len(header), *rows)]


# ---- How well the searches rank -------------------------------------------------------------------------------------

def words_for(args):
    """A search in words, from the settings in its JSON."""
    words = f"mixture, M = {args['models']}" if "models" in args else "SuperNet"
    sampler, teach = args.get("sampler", "uniform"), args.get("teach", "labels")
    words += {"uniform": "" if "models" in args else ", naive", "cost": ", by cost"}.get(sampler, f", {sampler}")
    if sampler == "cost" and args.get("exponent", 1) != 1:
        words += f" to the power {args['exponent']:g}"
    if teach != ("sandwich" if sampler == "prioritized" else "labels"):
        words += f", {teach}"
    if args.get("split_at", 1) < 1:
        words += f", split at {args['split_at']:g}"
    if args.get("shared_epochs"):
        words += f", first {args['shared_epochs']} epochs shared"
    return words + (", not balanced" if args.get("no_balance") else "")


def by_setting(searches):
    """Searches (dicts as in their JSON) as {(words, images, steps): those of different seeds}, the longest first."""
    groups = {}
    for search in sorted(searches, key=lambda search: search["args"]["seed"]):
        steps = len(search["history"]) * (search["n_train"] // search["args"]["batch_size"])
        key = words_for(search["args"]), search["n_train"] + search["n_val"], steps
        while any(search["args"]["seed"] == other["args"]["seed"] for other in groups.get(key, [])):
            key = f"{key[0]}, again", *key[1:]  # other images, or settings without a word of their own
        groups.setdefault(key, []).append(search)
    return dict(sorted(groups.items(), key=lambda item: (-item[0][2], "mixture" in item[0][0], item[0])))


FIGURES = ["tau", "tau with exposure", "tau with cost", "within a model", "fitted line", "regret"]


def figures_of(results, truth):
    """FIGURES of a search's results by the truth {configuration: accuracy}; None where too few are known.

    Tau of the scores with the truth, with `exposure` and with multiply-adds; tau with the truth of each model over what
    it owns (mean), and of a line in score and log2 of multiply-adds, fitted to the truth by least squares; regret of
    the best-scored, in points."""
    known = [r for r in results if tuple(r["config"]) in truth]
    if len(known) < max(3, len(results) / 2):
        return [None] * len(FIGURES)
    fed = dict(zip((tuple(r["config"]) for r in results), exposure([r["config"] for r in results])))
    score, fed, cost, true, model = np.array([
        (r["val_acc"], fed[tuple(r["config"])], math.log2(r["macs"]), truth[tuple(r["config"])], r.get("model", 0))
        for r in known]).T
    taus = [kendall_tau(score, other) or 0 for other in (true, fed, cost)]
    within = [kendall_tau(score[model == m], true[model == m]) for m in np.unique(model)]
    within = [tau for tau in within if tau is not None] or [0]  # a model that owns a single one has no order
    features = np.stack([np.ones(len(known)), score, cost], axis=1)
    line = features @ np.linalg.lstsq(features, true, rcond=None)[0]
    regret = 100 * (true.max() - true[score.argmax()])
    return [*taus, np.mean(within), kendall_tau(line.round(9), true) or 0, regret]


def readings(search):
    """What a search says of the configurations, {words: results}: by the most probable model, as in its JSON.

    Where it scored all `pairs`, also by the best model and by the mean over the models."""
    ordered, found = sorted(search["results"], key=lambda r: r["config"]), {"": search["results"]}
    for words, rule in ((", by the best model", max), (", by the mean of models", np.mean)):
        if "pairs" in search:
            found[words] = [{**r, "val_acc": float(rule(scores)), "model": int(np.argmax(scores))}
                            for r, scores in zip(ordered, search["pairs"])]
    return found


def mean_of(searches):
    """The results of several searches with the mean of their scores, and no owners."""
    scores = {tuple(r["config"]): [] for r in searches[0]["results"]}
    for r in itertools.chain.from_iterable(search["results"] for search in searches):
        scores[tuple(r["config"])].append(r["val_acc"])
    return [{**r, "val_acc": float(np.mean(scores[tuple(r["config"])])), "model": 0} for r in searches[0]["results"]]


def table(searches, truth):
    """Markdown lines on searches: one for each setting and reading, the figures of its seeds side by side, and where
    there are several seeds one for the mean of their scores."""
    results = sorted(searches[0]["results"], key=lambda r: r["config"])
    by_cost = [{**r, "val_acc": math.log2(r["macs"]), "model": 0} for r in results]
    alone = {("multiply-adds alone", 0, 0): [{"results": by_cost, "seconds": 0}]}
    rows = {}

    def add(words, results, seconds):
        chosen = show(max(results, key=lambda r: r["val_acc"])["config"])
        figures = ["-" if figure is None else f"{figure:.2f}" for figure in figures_of(results, truth)]
        rows.setdefault(words, []).append([chosen, *figures, f"{seconds:.0f}"])
    for (words, images, steps), group in {**by_setting(searches), **alone}.items():
        for search in group:
            for rule, results in readings(search).items():
                add((words + rule, images, steps), results, search["seconds"])
        if len(group) > 1:
            add((f"{words}, mean of {len(group)} seeds", images, steps), mean_of(group),
                sum(search["seconds"] for search in group))
    cells = [[*key, *map(", ".join, zip(*columns))] for key, columns in rows.items()]
    return markdown(["search", "images", "steps", "chosen", *FIGURES, "seconds"], cells)


OWNERS = ["late below middle, points", "largest p", "neighbours with one owner"]


def owners(search):
    """OWNERS of a search: how it sees late pooling, and how the models of a mixture share out the space.

    By how many points, in the mean, configurations with six or more layers before the first pooling score below those
    with three or four; the mean over the configurations of the largest p(model | configuration); the part of all
    neighbours, which differ by one layer in one pooling position, that the same model owns. None where there is none.
    """
    results = sorted(search["results"], key=lambda r: r["config"])
    positions = np.cumsum([r["config"] for r in results], axis=1)[:, :-1]
    score, first = np.array([(r["val_acc"], r["config"][0]) for r in results]).T
    late, middle = score[first >= 6], score[(first == 3) | (first == 4)]
    lag = 100 * (middle.mean() - late.mean()) if len(late) and len(middle) else None
    neighbours = np.abs(positions[:, None] - positions).sum(2) == 1
    if "probabilities" not in search or not neighbours.any():
        return [lag, None, None]
    p, owner = np.array(search["probabilities"]), np.array([r["model"] for r in results])
    return [lag, p.max(1).mean(), (owner[:, None] == owner)[neighbours].mean()]


def owners_table(searches):
    """Markdown lines: `owners` of each setting, its seeds side by side."""
    rows = []
    for key, group in by_setting(searches).items():
        columns = zip(*map(owners, group))
        rows.append([*key, *("-" if None in column else ", ".join(f"{v:.2f}" for v in column) for column in columns)])
    return markdown(["search", "images", "steps", *OWNERS], rows)


# ---- How soon stage 4 finds the best: its proposals, simulated on a truth that is known -----------------------------

def simulate(truth, searches, rule="process", trainings=10, draws=50, noise=0.0015, at_once=1):
    """Regret in points of what looks best after 1, 2, ... trainings, the default first: (searches x draws, trainings).

    truth: {configuration: accuracy} of a whole space; searches: a list of {configuration: score}; rule: as named in
    `simulation`; noise: the deviation between seeds, drawn anew `draws` times for each search; at_once: proposals of
    each round."""
    space = sorted(truth)
    macs, true = np.array([count_macs(config) for config in space]), np.array([truth[config] for config in space])
    trainings = min(trainings, len(space))
    regrets = []
    for search, _ in itertools.product(searches, range(draws)):
        rng = np.random.default_rng(len(regrets))
        measured = true + noise * rng.standard_normal(len(true))
        values = np.full(len(true), math.nan)
        score = np.array([search[config] for config in space])
        order = []
        if rule in ("in random order", "process with shuffled scores"):
            score = rng.permutation(score)
        scores = [] if rule == "process without scores" else [score]
        while len(order) < trainings:
            count = min(at_once, trainings - len(order))
            if order and "order" in rule:
                chosen = [int(np.where(np.isnan(values), score, -math.inf).argmax())]
            else:
                runs = np.isfinite(values).astype(int)
                chosen = [i for i, *_ in propose(space, macs, scores, values, runs, count=count)]
            values[chosen] = measured[chosen]
            order += chosen
        leaders = itertools.accumulate(order, lambda *pair: max(pair, key=lambda i: measured[i]))
        regrets.append([100 * (true.max() - true[i]) for i in leaders])
    return np.array(regrets)


def simulation(truth, searches):
    """{name: what `simulate` returns}: of each rule, of stage 4 with all searches, and with those of each setting."""
    rules = "in random order", "in order of score", "process without scores", "process with shuffled scores"
    scores = {f"process, {name}, {images} images, {steps} steps ({len(group)})":
              [{tuple(r["config"]): r["val_acc"] for r in search["results"]} for search in group]
              for (name, images, steps), group in by_setting(searches).items()}
    rows = {rule: simulate(truth, sum(scores.values(), []), rule) for rule in rules}
    each = {name: simulate(truth, group) for name, group in scores.items()}
    return {**rows, f"process, all searches ({len(searches)})": np.concatenate(list(each.values())), **each}


# ---- Pictures -------------------------------------------------------------------------------------------------------

def triangle(ax, accuracies, title, order=()):
    """{configuration: accuracy} over the pooling positions; a square marks the default, numbers the `order` trained."""
    x, y = np.cumsum(list(accuracies), axis=1).T[:2]
    percent = 100 * np.array(list(accuracies.values()))
    low = np.sort(percent)[len(percent) // 4] - 1  # a few failures would take the whole range
    colours = ax.scatter(x, y, c=percent, s=620, marker="s", cmap="viridis", vmin=low)
    ax.figure.colorbar(colours, ax=ax, extend="min")
    for a, b, value in zip(x, y, percent):
        colour = "black" if value > (low + percent.max()) / 2 else "white"
        ax.annotate(f"{value:.1f}", (a, b), ha="center", va="center", fontsize=7.5, color=colour)
    for number, (a, b, _) in enumerate(order, 1):
        ax.annotate(number, (a - 0.22, b + a + 0.24), fontsize=7, ha="center", va="center",
                    bbox={"boxstyle": "circle,pad=0.2", "facecolor": "white", "edgecolor": "tab:red"})
    a, b, _ = default_config(sum(next(iter(accuracies))))
    ax.scatter(a, a + b, s=760, marker="s", facecolors="none", edgecolors="black", linewidths=1.6)
    ax.set(xlabel="layers before the first pooling", ylabel="before the second", title=title, xmargin=0.1, ymargin=0.1)


def cost(ax, results):
    """Test accuracy against multiply-adds, with the names of the Pareto front and of the default."""
    front, usual = pareto(results, "test_acc"), list(default_config(sum(results[0]["config"])))
    ax.scatter([r["macs"] / 1e6 for r in results], [100 * r["test_acc"] for r in results], s=18, color="tab:grey")
    ax.step([r["macs"] / 1e6 for r in front], [100 * r["test_acc"] for r in front], "o-", where="post", color="tab:red")
    for r in [*front, *(r for r in results if r["config"] == usual and r not in front)]:
        ax.annotate(f"{show(r['config'])}  ", (r["macs"] / 1e6, 100 * r["test_acc"]), fontsize=7, rotation=-45,
                    ha="right", va="bottom")
    ax.set(xscale="log", xlabel="million multiply-adds", ylabel="test accuracy, %", xmargin=0.1, ymargin=0.1)
    ax.xaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")


def agreement(ax, search, truth, title):
    """A search's scores against {configuration: true accuracy}, a colour for each model and what it owns."""
    results = search["results"]
    ax.scatter([100 * r["val_acc"] for r in results], [100 * truth[tuple(r["config"])] for r in results], s=26,
               c=[r.get("model", 0) for r in results], cmap="tab10", vmin=0, vmax=9)
    ax.set(xlabel="accuracy in the search, %", ylabel="true accuracy, %", title=title)


def curves(ax, rows, label):
    """A line for each row, {name: values after 1, 2, ... trainings}."""
    for name, values in rows.items():
        ax.plot(range(1, 1 + len(values)), values, marker="o", markersize=3.5, label=name)
    ax.set(xlabel="configurations trained, the default included", ylabel=label, xticks=range(1, 1 + len(values)))
    ax.legend(fontsize=8)


def stage_4(results, searches, truth):
    """Panels from retrain.json's results in their order: what is expected, what looked best after each training."""
    space = pooling_configs(sum(results[0]["config"]))
    found = {tuple(r["config"]): r for r in results}
    tables = [{tuple(r["config"]): r["val_acc"] for r in search["results"]} for search in searches]
    values = np.array([np.mean([run.get("val_acc", run["test_acc"]) for run in found[config]["runs"]])
                       if config in found else math.nan for config in space])
    runs = np.array([len(found[config]["runs"]) if config in found else 0 for config in space])
    mean, _ = believe(space, np.array([count_macs(config) for config in space]),
                      [np.array([table[config] for config in space]) for table in tables], values, runs)
    first = {config: r.get("val_acc", r["test_acc"]) for config, r in found.items()}
    leaders = list(itertools.accumulate(first, lambda *pair: max(pair, key=first.get)))
    lines, label = [100 * first[config] for config in leaders], "best accuracy so far, %"
    if set(space) <= set(truth):
        lines, label = [100 * (max(truth.values()) - truth[config]) for config in leaders], "regret, points"
    return [partial(triangle, accuracies=dict(zip(space, mean)), title="expected accuracy, %", order=list(first)),
            partial(curves, rows={"best so far": lines}, label=label)]


def main():
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with the JSON of any stages, there or below")
    parser.add_argument("--truth", type=Path, help="another JSON with true accuracies, such as the published ones")
    parser.add_argument("--simulate", action="store_true", help="stage 4's proposals, on the last truth")
    args = parser.parse_args()
    files = {path: data for path in sorted(args.folder.rglob("*.json")) if "stage" in (data := load_json(path))}
    known = [r["config"] for data in files.values() for r in data.get("results", [])]
    if not known:
        raise UserError(f"{args.folder} holds no JSON of a stage: name the --out of one, such as runs/cifar10")
    searches = {path: load_json(path, "val_acc") for path, data in files.items()
                if data["stage"] in ("supernet", "mixture")}
    here = {path: search for path, search in searches.items() if path.parent == args.folder}
    space = {tuple(r["config"]) for search in searches.values() for r in search["results"]}
    own, truth, pictures = {}, {}, {"pooling": [], "searches": [], "retrain": [], "simulation": []}
    truths = [path for path in (args.folder / "single.json", args.truth) if path in {*files, args.truth} - {None}]
    for path in truths:
        results = load_json(path, "test_acc")["results"]
        results = [{**r, "macs": r.get("macs") or count_macs(r["config"])} for r in results]
        truth = {tuple(r["config"]): r["test_acc"] for r in results}
        own = own or truth
        pictures["pooling"] += [partial(triangle, accuracies=truth, title=f"{path}, %"), partial(cost, results=results)]
        if searches:
            say("\n".join([f"\nThe searches, judged by {path}:\n", *table(list(searches.values()), truth)]))
    if searches and not truths:
        say("\n".join(table(list(searches.values()), truth)))
    if searches:
        say("\n".join(["", *owners_table(list(searches.values()))]))
    if space <= set(truth):
        pictures["searches"] = [partial(agreement, search=search, truth=truth, title=p) for p, search in here.items()]
    retrain = files.get(args.folder / "retrain.json", {"results": []})["results"]
    if any(r.get("order") for r in retrain) and len(known[0]) == 3:
        pictures["retrain"] = stage_4(sorted(retrain, key=lambda r: r["order"] or 0), here.values(), own)
    if args.simulate:
        if space != set(truth):
            raise UserError("--simulate needs a truth of just what was searched: name one with --truth")
        rows = simulation(truth, list(searches.values()))
        shown = [n for n in (3, 4, 5, 6, 8, 10) if n <= len(truth)]
        cells = [[name, *(f"{regrets[:, n - 1].mean():.2f} ({regrets[:, n - 1].std():.2f})" for n in shown)]
                 for name, regrets in rows.items()]
        say("\n".join(["", *markdown(["regret in points after so many trainings", *shown], cells)]))
        rows = {name: regrets.mean(0) for name, regrets in list(rows.items())[:7]}  # the other settings would crowd it
        pictures["simulation"] = [partial(curves, rows=rows, label="mean regret, points")]
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return say("the pictures need matplotlib: pip install matplotlib")
    for name, panels in pictures.items():
        if panels and (name == "simulation" or len(known[0]) == 3):
            lines, columns = math.ceil(len(panels) / 2), min(2, len(panels))
            figure = Figure(figsize=(6.5 * columns, 5 * lines), layout="constrained")
            for number, panel in enumerate(panels, 1):
                panel(figure.add_subplot(lines, columns, number))
            figure.savefig(args.folder / f"{name}.png", dpi=100)
            say(f"wrote {args.folder / name}.png")


if __name__ == "__main__":
    run_main(main)
