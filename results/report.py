"""A folder of results as tables and pictures: what searches chose, what was trained, what it costs.

    python -m results.report runs/cifar10                # in the project's folder
    python -m results.report results/cifar10 --truth results/published_cifar10_resnet20.json
    python -m results.report results/published_cifar10_resnet20.json    # a single file: its picture
    python -m results.report results/synthetic --markdown               # the tables for a page

Reads the JSON of all stages in the folder and below. The truth that searches are judged by is
--truth, or else the folder's single.json. Without a truth it shows what the searches scored. With
matplotlib it draws into the folder: pooling.png, the truth over the two pooling positions and
against cost; searches.png, the scores of the folder's own searches; retrain.png, what was trained.
"""
import math
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np

from common import (TIED_PART, Parser, UserError, config_text, count_macs, kendall_tau, load_json, near_the_best,
                    pareto, pooling_configs, print_table, run_main, unpack_right)
from retrain import NO_SEARCHES, TRAINED, draw_gains, gains_of, save_picture, show_trained, trained_rows

OTHERS = *NO_SEARCHES, "compare"  # the stages that do not search
SEARCH = ["search", "images", "steps", "chosen", "tau", "tau with exposure", "tau with cost", "regret"]
MEANING = {  # of the columns that are not plain
    "steps": "in all; the M models of a mixture share them",
    "chosen": "the configuration with the best score; runs that differ only in their seed stand side by side",
    "tau": "Kendall's tau of scores and truth: 1 for the same order, 0 for none, -1 for the reverse",
    "tau with exposure": "of the scores with how often uniform draws train a configuration's layers at its resolutions",
    "tau with cost": "of the scores with multiply-adds",
    "regret": "true accuracy of the best configuration minus that of the chosen one, in points",
    "cost of a step": "multiply-adds with scoring; training the average configuration is 1",
    "above uniform": "tau minus that of uniform draws with the same seed: mean and its standard error",
    "val acc": "%, of the first seed on the test images that chose, where some did",
    "test acc": "%, mean over the runs, on test images that chose nothing",
    "error, seeds": "standard error of the gain over the default by the seeds, in points",
    "error, images": "the same by the test images"}
FIGURES = ["tau", "tau with exposure", "regret", "cost of a step"]  # of results/compare.py


def exposure(configs):
    """How well uniform draws feed each configuration, (n,).

    It is the mean over the layers of log(share). The share of a layer is the part of all draws that
    train it at the resolution at which this configuration runs it.
    """
    resolutions = np.array([np.repeat(np.arange(len(config)), config) for config in configs])  # (n, layers)
    return np.log((resolutions[:, None] == resolutions).mean(1)).mean(1).round(9)  # so that ties are ties


def steps_of(search):
    """The steps that a search took, from its JSON: an epoch has those of the smaller half of the images."""
    return len(search["history"]) * (min(search["n_train"], search["n_val"]) // search["args"]["batch_size"])


def figures_of(results, truth):
    """Of a search: tau with the truth, with `exposure`, with multiply-adds, and regret in points.

    results: from its JSON. truth: {configuration: accuracy}. The first and the last figure are None
    where the truth knows fewer than half of the results.
    """
    rows = [(r["val_acc"], r["macs"], truth.get(tuple(r["config"]), math.nan)) for r in results]
    score, macs, true = np.array(rows).T
    known = np.isfinite(true)
    first = results[0]["config"]
    space = pooling_configs(sum(first), len(first))
    fed = dict(zip(space, exposure(space)))
    taus = [kendall_tau(score, [fed[tuple(r["config"])] for r in results]), kendall_tau(score, macs)]
    if known.sum() < max(2, len(results) / 2):
        return [None, *taus, None]
    score, true = score[known], true[known]
    chosen = true.mean() if (score == score[0]).all() else true[score.argmax()]  # no choice: any
    return [kendall_tau(score, true), *taus, 100 * float(true.max() - chosen)]


# ---- Tables ---------------------------------------------------------------------------------------------------------

def show_table(title, header, rows, markdown=False):
    """Print rows of strings and numbers, as Markdown, or aligned and with what their columns mean."""
    print(f"\n{title}\n")
    if markdown:
        for row in (header, ["---"] * len(header), *rows):
            print(f"| {' | '.join(map(str, row))} |")
        return
    print_table(header, rows)
    for name in header:
        if name in MEANING:
            print(f"  {name}: {MEANING[name]}")


def words_of(search):
    """What a search was, in words: "mixture, M = 4, by cost"."""
    args, sampler = search["args"], search["args"].get("sampler")
    words = [search["stage"].replace("supernet", "SuperNet"),
             f"M = {args['models']}" if "models" in args else "",
             "by cost" if sampler == "cost" else sampler,
             "not balanced" if args.get("no_balance") else "",
             f"weight decay {args['weight_decay']:g}" if args["weight_decay"] else ""]
    for name in ("pools", "pool_size", "split_at"):
        if args.get(name, 1) != 1:
            words.append(f"{name} {args[name]:g}")
    return ", ".join(filter(None, words))


def search_rows(searches, truth):
    """Rows of SEARCH: one for each setting, the longest first, and one for ranking by cost alone.

    searches: contents of JSON files. Those that differ in their seed alone stand side by side; a
    second one of the same seed is a copy and does not count.
    """
    by_cost = [{**r, "val_acc": r["macs"]} for r in searches[0]["results"]]
    groups = {("multiply-adds alone", 0, 0): {0: {"results": by_cost, "n_val": math.inf}}}
    for search in sorted(searches, key=lambda search: search["args"]["seed"]):
        args = search["args"]
        shared = ("dataset", "image_size", "layers", "scales", "batch_size", "lr")
        key = (words_of(search), search["n_train"] + search["n_val"], steps_of(search),
               search["results"][0]["params"], *(str(args.get(name)) for name in shared))
        groups.setdefault(key, {}).setdefault(args["seed"], search)
    rows = []
    for key in sorted(groups, key=lambda key: (-key[2], -key[1], key[0])):
        runs = []
        for search in groups[key].values():
            chosen = config_text(max(search["results"], key=lambda r: r["val_acc"])["config"])
            near, _ = near_the_best([r["val_acc"] for r in search["results"]], search["n_val"])
            if near >= TIED_PART * len(search["results"]):  # it chose nothing
                chosen += " (by chance)"
            figures = ["-" if f is None else f"{f:.2f}" for f in figures_of(search["results"], truth)]
            runs.append([chosen, *figures])
        rows.append([*key[:3], *map(", ".join, zip(*runs))])
    return rows


def show_ways(ways, source, markdown=False):
    """Print means and deviations over the seeds. ways: {name: FIGURES of each seed}, with "uniform"."""
    rows = []
    for name, values in ways.items():
        values, base = np.array(values), np.array(ways["uniform"])
        above = values[:, 0] - base[:, 0]
        cells = [f"{mean:.2f} ({deviation:.2f})" for mean, deviation
                 in zip(values.mean(0), values.std(0, ddof=1))]
        error = above.std(ddof=1) / len(above) ** 0.5
        rows.append([name, len(values), *cells, f"{above.mean():+.2f} +- {error:.2f}"])
    header = ["way", "seeds", *FIGURES, "above uniform"]
    show_table(f"Every way to search, {source}", header, rows, markdown)


def show_classes(data, source, markdown=False):
    """Print the accuracy of the best and of the default in each class, in %, for up to 20 classes."""
    counts, rows = data.get("test_counts"), []
    shown = [r for r in (data["best"], data["default"]) if r]
    if not counts or len(counts) > 20 or not all("right" in run for r in shown for run in r["runs"]):
        return
    edges, columns = np.cumsum(counts)[:-1], []
    for r in shown:
        right = np.mean([unpack_right(run["right"], sum(counts)) for run in r["runs"]], axis=0)
        columns.append([f"{100 * part.mean():.1f}" for part in np.split(right, edges)])
    for name, count, *cells in zip(data["classes"], counts, *columns):
        rows.append([name, count, *cells])
    header = ["class", "test images", *(f"{word} {config_text(r['config'])}" for word, r
                                        in zip(("best", "default"), shown))]
    show_table(f"Accuracy by class, %, {source}", header, rows, markdown)


# ---- Pictures -------------------------------------------------------------------------------------------------------

def draw_pooling(figure, results, key, default):
    """Draw accuracies over the two pooling positions, coloured by rank, and against cost.

    results: with macs and the accuracy `key`, the best first. With other numbers of resolutions
    than three only the cost is drawn.
    """
    percent, macs = np.array([(100 * r[key], r["macs"] / 1e6) for r in results]).T
    front = [results.index(r) for r in pareto(results, key)]
    what = "test accuracy" if key == "test_acc" else "score in the search"
    positions = len(results[0]["config"]) == 3
    figure.set_size_inches(13 if positions else 7, 5)
    axes = figure.subplots(1, 1 + positions, squeeze=False)[0]
    right = axes[-1]
    right.scatter(macs, percent, color="tab:grey")
    right.step(macs[front], percent[front], where="post", color="black")
    right.set(xlabel="million multiply-adds", ylabel=f"{what}, %",
              title="the line joins those that nothing cheaper reaches")
    marks = []
    for i, r in enumerate(results):
        if tuple(r["config"]) == default or i == 0:
            word = "default" if tuple(r["config"]) == default else "best"
            marks.append((i, {"marker": "s", "facecolors": "none", "linewidths": 2,
                              "edgecolors": "black" if word == "default" else "tab:red",
                              "label": f"{word} {config_text(r['config'])}"}))
    for i, mark in marks:
        right.scatter(macs[i], percent[i], s=90, zorder=3, **mark)
    right.legend(loc="lower right")
    if positions:
        left = axes[0]
        first, second, _ = np.cumsum([r["config"] for r in results], axis=1).T
        size = min(800, 800 * (9 / max(second)) ** 2)
        left.scatter(first, second, c=range(len(results)), s=size, marker="s", cmap="summer", alpha=0.7)
        left.set(xlabel="layers before the first pooling", ylabel="layers before the second pooling",
                 xmargin=0.08, ymargin=0.08, title=f"{what}, %; greener is better, bold: nothing "
                 f"cheaper reaches it")
        for i in range(len(results)) if len(results) <= 60 else ():  # more would not be legible
            left.text(first[i], second[i], f"{percent[i]:.1f}", ha="center", va="center", fontsize=9,
                      weight="bold" if i in front else "normal")
        for i, mark in marks:
            left.scatter(first[i], second[i], s=size, **mark)
        left.legend(loc="lower right", markerscale=0.4)


def draw_searches(figure, searches, truth, default):
    """Draw scores against true accuracies, a panel for each search {name: results}.

    A dot has the colour of the model that owns its configuration. All panels share the true axis.
    """
    columns, lines = min(3, len(searches)), math.ceil(len(searches) / 3)
    figure.set_size_inches(6.5 * columns, 5 * lines)
    axes = figure.subplots(lines, columns, squeeze=False, sharey=True).flat
    for ax, (name, results) in zip(axes, searches.items()):
        results = sorted(results, key=lambda r: -r["val_acc"])
        score, true = 100 * np.array([(r["val_acc"], truth[tuple(r["config"])]) for r in results]).T
        tau, *_, regret = figures_of(results, truth)
        models = [r.get("model", 0) for r in results]
        for model in sorted(set(models)):
            own = np.array(models) == model
            ax.scatter(score[own], true[own], s=22, color=f"C{model % 10}",
                       label=f"owned by model {model}" if "model" in results[0] else "a configuration")
        ax.scatter(score[0], true[0], s=110, facecolors="none", edgecolors="black", label="the choice")
        first = results[0]["config"]
        for i, r in enumerate(results):
            if tuple(r["config"]) == default:
                ax.scatter(score[i], true[i], s=110, marker="s", facecolors="none", edgecolors="tab:grey",
                           label="the default")
        ax.legend(fontsize=8)
        ax.set(xlabel="accuracy in the search, %", ylabel="true accuracy, %",
               title=f"{name}: tau {'-' if tau is None else f'{tau:.2f}'}, chose {config_text(first)}, "
                     f"regret {'-' if regret is None else f'{regret:.2f}'}")
    for ax in list(axes):  # panels that are left over
        ax.set_axis_off()


def read_stages(paths):
    """Read the JSON of stages: {path: content}. A line says what is left alone."""
    found = {}
    for path in paths:
        try:
            data = {"stage": "single", **load_json(path)}
            if "history" in data and data["stage"] not in OTHERS:
                load_json(path, "val_acc")
                data["args"]["seed"], steps_of(data), sum(r["macs"] for r in data["results"])  # what the tables need
        except UserError as error:
            print(f"left alone: {error}")
            continue
        except (KeyError, TypeError, AttributeError) as error:
            print(f"left alone: {path} is no search of this project ({type(error).__name__}: {error})")
            continue
        if "results" in data or "ways" in data:
            found[path] = data
    return found


def main():
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with the JSON of any stages, there or below; or a single file")
    parser.add_argument("--truth", type=Path, help="another JSON with true accuracies, such as the published ones")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    args = parser.parse_args()
    folder, own = args.folder, args.folder / "single.json"
    paths = [path for path in sorted(folder.rglob("*.json"))
             if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if args.folder.is_file():
        folder, paths, own = args.folder.parent, [args.folder], args.folder
    files = read_stages(paths)
    if not files:
        raise UserError(f"{args.folder} holds no JSON of a stage: name the --out of one, such as runs/cifar10")
    searches = {path: load_json(path, "val_acc") for path, data in files.items()
                if data["stage"] not in OTHERS}
    judge = args.truth or (own if files.get(own, {}).get("stage") == "single" else None)
    truth, pictures = {}, {}
    defaults = [data["default"]["config"] for data in files.values() if data.get("default")]
    default = tuple(defaults[0]) if defaults else (4, 3, 3)
    if judge:
        results = []
        for r in load_json(judge, "test_acc")["results"]:
            results.append(r if "macs" in r else {**r, "macs": count_macs(r["config"])})
        results.sort(key=lambda r: -r["test_acc"])
        truth = {tuple(r["config"]): r["test_acc"] for r in results}
        print(f"{judge} knows {len(truth)} configurations, the best is {config_text(results[0]['config'])}")
        pictures["pooling"] = draw_pooling, results, "test_acc", default
    if searches:
        title = f"The searches, judged by {judge}" if judge else "The searches; no truth to judge them by"
        show_table(title, SEARCH, search_rows([*searches.values()], truth), args.markdown)
    for path, data in files.items():
        if data["stage"] in ("retrain", "propose"):
            if args.markdown:
                show_table(f"What was trained, {path}", TRAINED, trained_rows(data), args.markdown)
            else:
                print(f"\nWhat was trained, {path}; accuracies in %\n")
                show_trained(data)
            show_classes(data, path, args.markdown)
            if path.parent == folder and gains_of(data):
                pictures[data["stage"]] = draw_gains, data
        if data["stage"] == "compare":
            show_ways(data["ways"], path, args.markdown)

    here = {path.stem: search["results"] for path, search in searches.items() if path.parent == folder}
    judged = {name: results for name, results in here.items()
              if truth.keys() >= {tuple(r["config"]) for r in results}}
    if judged:
        pictures["searches"] = draw_searches, judged, truth, default
    elif here and not judge:  # without a truth, the scores of each search over its positions
        for name, results in here.items():
            pictures[f"scores-{name}"] = draw_pooling, sorted(results, key=lambda r: -r["val_acc"]), "val_acc", default
    if not pictures:
        print(f"no picture: {folder} itself holds no single.json, no search, and no retrain.json with a default")
    for name, (draw, *content) in pictures.items():
        save_picture(folder / f"{name}.png", draw, *content)


if __name__ == "__main__":
    run_main(main)
