"""A folder of results as tables and pictures: how well searches rank, what was trained, where to pool, what it costs.

    python -m results.report runs/cifar10                              # in the project's folder: what the scripts left
    python -m results.report results/cifar10 --truth results/published_cifar10_resnet20.json
    python -m results.report results/published_cifar10_resnet20.json   # a single file: its picture, results/pooling.png
    python -m results.report results/synthetic --markdown              # the same tables for a page

Reads the JSON of all stages in the folder and below. The truth that searches are judged by is --truth, else the
folder's single.json. With matplotlib it draws two pictures into the folder: pooling.png shows the truth over the two
pooling positions and against cost (three resolutions only), searches.png the scores of the folder's own searches.
"""
import math
import os
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np

from common import (Parser, UserError, config_text, count_macs, default_config, kendall_tau, load_json, pareto,
                    print_table, run_main, say, whole_file)
from retrain import TRAINED, trained_rows

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
    "error, images": "by the number of test images, at most"}


def exposure(configs):
    """How well uniform draws feed each configuration: (n,), the mean over its layers of log(share), where share is the
    part of all draws that train this layer at the resolution at which this configuration runs it."""
    resolutions = np.array([np.repeat(np.arange(len(config)), config) for config in configs])  # (n, layers)
    return np.log((resolutions[:, None] == resolutions).mean(1)).mean(1).round(9)  # so that ties are ties


def steps_of(search):
    """The steps that a search took, from its JSON: an epoch has those of the smaller half of the images."""
    return len(search["history"]) * (min(search["n_train"], search["n_val"]) // search["args"]["batch_size"])


def figures_of(results, truth):
    """Of a search's results: tau with the truth, with `exposure`, with multiply-adds, and regret in points.

    truth: {configuration: accuracy}; the first and the last are None where it knows less than half of them."""
    score, macs, true = np.array([(r["val_acc"], r["macs"], truth.get(tuple(r["config"]), math.nan))
                                  for r in results]).T
    known = np.isfinite(true)
    taus = [kendall_tau(score, exposure([r["config"] for r in results])), kendall_tau(score, macs)]
    if known.sum() < max(2, len(results) / 2):
        return [None, *taus, None]
    score, true = score[known], true[known]
    return [kendall_tau(score, true), *taus, 100 * float(true.max() - true[score.argmax()])]


# ---- Tables ---------------------------------------------------------------------------------------------------------

def show_table(title, header, rows, markdown=False):
    """Print rows of strings and numbers, as Markdown, or aligned and with what their columns mean."""
    say(f"\n{title}\n")
    if markdown:
        return say("\n".join(f"| {' | '.join(map(str, row))} |" for row in (header, ["---"] * len(header), *rows)))
    print_table(header, rows)
    say("\n".join(f"  {name}: {MEANING[name]}" for name in header if name in MEANING))


def search_rows(searches, truth):
    """Rows of SEARCH: one for each setting, the longest first, and one for ranking by cost, without any search."""
    groups = {("multiply-adds alone", 0, 0): [[{**r, "val_acc": r["macs"]} for r in searches[0]["results"]]]}
    for search in sorted(searches, key=lambda search: search["args"]["seed"]):
        args, sampler = search["args"], search["args"].get("sampler")
        words = [search["stage"].replace("supernet", "SuperNet"), f"M = {args['models']}" if "models" in args else "",
                 "by cost" if sampler == "cost" else sampler, "not balanced" if args.get("no_balance") else "",
                 f"weight decay {args['weight_decay']:g}" if args["weight_decay"] else "",
                 *(f"{name} {args[name]:g}" for name in ("pools", "pool_size", "split_at") if args.get(name, 1) != 1)]
        key = (", ".join(filter(None, words)), search["n_train"] + search["n_val"], steps_of(search),
               *(str(args.get(name)) for name in ("dataset", "image_size", "layers", "scales", "batch_size", "lr")))
        groups.setdefault(key, []).append(search["results"])
    rows = []
    for key in sorted(groups, key=lambda key: (-key[2], -key[1], key[0])):
        runs = [[config_text(max(results, key=lambda r: r["val_acc"])["config"]),
                 *("-" if f is None else f"{f:.2f}" for f in figures_of(results, truth))]
                for results in groups[key]]
        rows.append([*key[:3], *map(", ".join, zip(*runs))])
    return rows


# ---- Pictures -------------------------------------------------------------------------------------------------------

def draw_pooling(figure, results):
    """Test accuracy over the two pooling positions, coloured by rank, and against cost. results: the best first."""
    percent, macs = np.array([(100 * r["test_acc"], r["macs"] / 1e6) for r in results]).T
    first, second, _ = np.cumsum([r["config"] for r in results], axis=1).T
    front = [results.index(r) for r in pareto(results, "test_acc")]
    figure.set_size_inches(13, 5)
    left, right = figure.subplots(1, 2)
    left.scatter(first, second, c=range(len(results)), s=800, marker="s", cmap="summer_r", alpha=0.7)
    left.set(xlabel="layers before the first pooling", ylabel="layers before the second pooling", xmargin=0.08,
             ymargin=0.08, title="test accuracy, %; bold: nothing cheaper is as good")
    right.scatter(macs, percent, color="tab:grey")
    right.step(macs[front], percent[front], where="post", color="black")
    right.set(xlabel="million multiply-adds", ylabel="test accuracy, %", title="the line joins the bold ones")
    for i, r in enumerate(results):
        left.text(first[i], second[i], f"{percent[i]:.1f}", ha="center", va="center", fontsize=9,
                  weight="bold" if i in front else "normal")
        default = tuple(r["config"]) == default_config(sum(r["config"]))
        if default or i == 0:
            square = {"marker": "s", "facecolors": "none", "edgecolors": "black" if default else "tab:red"}
            left.scatter(first[i], second[i], s=800, linewidths=2, **square,
                         label=f"{'default' if default else 'best'} {config_text(r['config'])}")
            right.scatter(macs[i], percent[i], s=90, linewidths=2, zorder=3, **square)
    left.legend(loc="lower right", markerscale=0.4)


def draw_searches(figure, searches, truth):
    """Scores against true accuracies, for each search {name: results}; a colour for each model and what it owns."""
    columns, lines = min(3, len(searches)), math.ceil(len(searches) / 3)
    figure.set_size_inches(6.5 * columns, 5 * lines)
    for number, (name, results) in enumerate(searches.items(), 1):
        results = sorted(results, key=lambda r: -r["val_acc"])
        score, true = 100 * np.array([(r["val_acc"], truth[tuple(r["config"])]) for r in results]).T
        tau, *_, regret = figures_of(results, truth)
        ax = figure.add_subplot(lines, columns, number)
        dots = ax.scatter(score, true, c=[r.get("model", 0) for r in results], s=22, cmap="tab10", vmin=0, vmax=9)
        ax.scatter(score[0], true[0], s=110, facecolors="none", edgecolors="black")
        if "model" in results[0]:
            ax.legend(*dots.legend_elements(num=None), title="model")
        ax.set(xlabel="accuracy in the search, %", ylabel="true accuracy, %", title=f"{name}: tau {tau or 0:.2f}, "
               f"chose {config_text(results[0]['config'])}, regret {regret or 0:.2f}")


def main():
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with the JSON of any stages, there or below; or a single file")
    parser.add_argument("--truth", type=Path, help="another JSON with true accuracies, such as the published ones")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    args = parser.parse_args()
    folder, paths, own = args.folder, sorted(args.folder.rglob("*.json")), args.folder / "single.json"
    if args.folder.is_file():
        folder, paths, own = args.folder.parent, [args.folder], args.folder
    files = {path: {"stage": "single", **load_json(path)} for path in paths}
    files = {path: data for path, data in files.items() if "results" in data or "ways" in data}
    if not files:
        raise UserError(f"{args.folder} holds no JSON of a stage: name the --out of one, such as runs/cifar10")
    searches = {path: load_json(path, "val_acc") for path, data in files.items()
                if data["stage"] not in ("single", "retrain", "propose", "compare")}
    judge = args.truth or (own if files.get(own, {}).get("stage") == "single" else None)
    truth, pictures = {}, {}
    if judge:
        results = [r if "macs" in r else {**r, "macs": count_macs(r["config"])}
                   for r in load_json(judge, "test_acc")["results"]]
        results.sort(key=lambda r: -r["test_acc"])
        truth = {tuple(r["config"]): r["test_acc"] for r in results}
        say(f"{judge} knows {len(truth)} configurations, the best is {config_text(results[0]['config'])}")
        if len(results[0]["config"]) == 3:
            pictures["pooling"] = draw_pooling, results
    if searches:
        title = f"The searches, judged by {judge or 'nothing'}"
        show_table(title, SEARCH, search_rows([*searches.values()], truth), args.markdown)
    for path, data in files.items():
        if data["stage"] in ("retrain", "propose"):
            show_table(f"What was trained, {path}", TRAINED, trained_rows(data), args.markdown)
        if data["stage"] == "compare":
            from results.compare import show_ways  # here, since it imports this file
            show_ways(data["ways"], path, args.markdown)

    here = {path.stem: search["results"] for path, search in searches.items() if path.parent == folder
            and truth.keys() >= {tuple(r["config"]) for r in search["results"]}}
    if here:
        pictures["searches"] = draw_searches, here, truth
    os.environ.pop("MPLBACKEND", None)  # that of a notebook, which need not be installed here
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return say("the pictures need matplotlib: pip install matplotlib")
    for name, (draw, *content) in pictures.items():
        draw(figure := Figure(layout="constrained"), *content)
        with whole_file(folder / f"{name}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=100)
        say(f"wrote {folder / name}.png")


if __name__ == "__main__":
    run_main(main)
