"""A folder of results as tables and pictures: how well searches rank, what was trained, where to pool, what it costs.

    python -m results.report runs/cifar10                               # in the project's folder: what the scripts left
    python -m results.report results/cifar10 --truth results/published_cifar10_resnet20.json
    python -m results.report results/published_cifar10_resnet20.json    # a single file: its picture
    python -m results.report results/synthetic --markdown               # the same tables for a page

Reads the JSON of all stages in the folder and below. The folder's single.json and --truth judge the searches. Pictures
need matplotlib: pooling.png (the last truth over the two pooling positions and against cost, three resolutions only),
searches.png (scores against it) and propose.png (best so far), both of the files in the folder itself.
"""
import itertools
import math
import os
from argparse import RawDescriptionHelpFormatter
from functools import partial
from pathlib import Path

import numpy as np

from common import (Parser, UserError, config_text, count_macs, default_config, kendall_tau, load_json, pareto,
                    print_table, run_main, say, whole_file)
from retrain import errors_of_gain

MEANING = {  # of columns
    "images": "training images: one half trains, the other scores",
    "steps": "of SGD in all; the M models of a mixture share them",
    "chosen": "the best-scored configuration, as layers at each resolution; runs of one setting side by side, by seed",
    "tau": "Kendall's tau of scores and truth: 1 for the same order, 0 for none, -1 for the reverse",
    "tau with exposure": "of the scores with how often uniform draws train a configuration's layers at its resolutions",
    "tau with cost": "of the scores with multiply-adds",
    "regret": "true accuracy of the best minus that of the chosen one, in points",
    "cost of a step": "multiply-adds with scoring; training the average configuration is 1",
    "above uniform": "tau minus that of uniform draws with the same seed: mean and its standard error",
    "val acc": "%, of the first seed on the test images that chose, where some did",
    "test acc": "%, mean over the runs, on test images that chose nothing",
    "gain": "over the default, in points",
    "error, seeds": "standard error of the gain by the seeds",
    "error, images": "standard error of the gain by the number of test images, at most"}
SEARCH = ["search", "images", "steps", "chosen", "tau", "tau with exposure", "tau with cost", "regret"]
TRAINED = ["configuration", "val acc", "test acc", "runs", "gain", "error, seeds", "error, images", "why"]
WAYS = ["way", "seeds", "tau", "tau with exposure", "regret", "cost of a step", "above uniform"]
OTHERS = "single", "retrain", "propose", "compare"  # stages that are no searches


def exposure(configs):
    """How well uniform draws feed each configuration: (n,), the mean over its layers of log(share), where share is the
    part of all draws that train this layer at the resolution at which this configuration runs it."""
    resolutions = np.array([np.repeat(np.arange(len(config)), config) for config in configs])  # (n, layers)
    return np.log((resolutions[:, None] == resolutions).mean(1)).mean(1).round(9)  # so that ties are ties


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
    """Print rows (lists of cells, None where there is nothing), aligned and with what their columns mean."""
    say(f"\n{title}\n")
    if markdown:
        rows = [["-" if cell is None else str(cell) for cell in row] for row in rows]
        return say("\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)))
    print_table(header, rows)
    say("\n".join(f"  {name}: {MEANING[name]}" for name in header if name in MEANING))


def search_rows(searches, truth):
    """Rows of SEARCH: one for each setting, the longest first, and one for ranking by cost, without any search."""
    groups = {}
    for search in sorted(searches, key=lambda search: search["args"]["seed"]):
        args, stage, sampler = search["args"], search["stage"], search["args"].get("sampler")
        words = {"supernet": "SuperNet", "mixture": f"mixture, M = {args.get('models')}"}.get(stage, stage)
        words += {None: "", "cost": ", by cost"}.get(sampler, f", {sampler}")
        words += ", not balanced" if args.get("no_balance") else ""
        steps = len(search["history"]) * (search["n_train"] // args["batch_size"])
        groups.setdefault((words, search["n_train"] + search["n_val"], steps), []).append(search["results"])
    groups = dict(sorted(groups.items(), key=lambda item: (-item[0][2], -item[0][1], item[0][0])))
    groups["multiply-adds alone", 0, 0] = [[{**r, "val_acc": r["macs"]} for r in searches[0]["results"]]]
    rows = []
    for key, group in groups.items():
        cells = [[config_text(max(results, key=lambda r: r["val_acc"])["config"]),
                  *("-" if f is None else f"{f:.2f}" for f in figures_of(results, truth))] for results in group]
        rows.append([*key, *map(", ".join, zip(*cells))])
    return rows


def trained_rows(data):
    """Rows of TRAINED from the content of retrain.json or propose.json: in the order of training, or the best first."""
    rows, base = [], data["default"]
    for r in sorted(data["results"], key=lambda r: (r.get("order") or math.inf, -r["test_acc"])):
        figures = [r.get("val_acc"), r["test_acc"], None, None, None]
        if base and r["config"] != base["config"]:
            figures[2:] = r["test_acc"] - base["test_acc"], *errors_of_gain(r, base, data["n_test"])
        figures = [None if f is None else f"{100 * f:{sign}.2f}" for f, sign in zip(figures, ["", "", "+", "", ""])]
        rows.append([config_text(r["config"]), *figures[:2], len(r["runs"]), *figures[2:], r["why"]])
    return rows


def way_rows(ways):
    """Rows of WAYS. ways: {name: [[tau, tau with exposure, regret, cost of a step] of each seed]}, with "uniform"."""
    rows = []
    for name, values in ways.items():
        values, base = np.array(values), np.array(ways["uniform"])
        above = values[:, 0] - base[:, 0]
        rows.append([name, len(values), *(f"{mean:.2f} ({deviation:.2f})" for mean, deviation
                                          in zip(values.mean(0), values.std(0, ddof=1))),
                     f"{above.mean():+.2f} +- {above.std(ddof=1) / len(above) ** 0.5:.2f}"])
    return rows


# ---- Pictures: each function draws on one axis ----------------------------------------------------------------------

def mark(ax, results, place, size):
    """Squares around the default and the best of results (best first); place(r): where r is drawn."""
    default = [r for r in results if r["config"] == list(default_config(sum(r["config"])))]
    for name, colour, marked in (("default", "black", default), ("best", "tab:red", results[:1])):
        for r in marked:
            ax.scatter(*place(r), s=size, marker="s", facecolors="none", edgecolors=colour, linewidths=2, zorder=3,
                       label=f"{name} {config_text(r['config'])}: {100 * r['test_acc']:.1f} %")
    ax.legend(loc="lower right", markerscale=9 / math.sqrt(size))


def positions(ax, results, title):
    """Test accuracy over the two pooling positions."""
    percent = 100 * np.array([r["test_acc"] for r in results])
    low = np.sort(percent)[len(percent) // 4] - 1  # a few failures would take the whole range
    x, y = np.cumsum([r["config"] for r in results], axis=1).T[:2]
    colours = ax.scatter(x, y, c=percent, s=640, marker="s", vmin=low)
    ax.figure.colorbar(colours, ax=ax, extend="min", label="test accuracy, %")
    for a, b, value in zip(x, y, percent):
        ax.text(a, b, f"{value:.1f}", ha="center", va="center", fontsize=8,
                color="black" if value > (low + percent.max()) / 2 else "white")
    ax.set(xlabel="layers before the first pooling", ylabel="before the second", title=title, xmargin=0.08,
           ymargin=0.08)
    mark(ax, results, lambda r: np.cumsum(r["config"])[:2], 680)


def costs(ax, results):
    """Test accuracy against multiply-adds. Names stand above and left of the Pareto front, where nothing else is."""
    def place(r):
        return r["macs"] / 1e6, 100 * r["test_acc"]
    front, apart = pareto(results, "test_acc"), 0.035 * (results[0]["test_acc"] - results[-1]["test_acc"])
    ax.scatter(*zip(*map(place, results)), s=22, color="tab:grey")
    ax.step(*zip(*map(place, front)), "o-", where="post", color="tab:red", markersize=4)
    height = math.inf
    for r in reversed(front):
        if r["test_acc"] < height - apart:  # else its name would touch the one above
            ax.annotate(config_text(r["config"]), place(r), (-1, 7), textcoords="offset points", fontsize=8, ha="right")
            height = r["test_acc"]
    ax.set(xlabel="million multiply-adds", ylabel="test accuracy, %", xmargin=0.15, ymargin=0.1,
           title="the line is the Pareto front")
    ax.set_xscale("log", subs=[2, 5])
    ax.xaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
    mark(ax, results, place, 90)


def agreement(ax, search, truth, title):
    """A search's scores against {configuration: true accuracy}, a colour for each model and what it owns."""
    def place(r):
        return 100 * r["val_acc"], 100 * truth[tuple(r["config"])]
    results, (tau, *_, regret) = search["results"], figures_of(search["results"], truth)
    for model in sorted({r.get("model") for r in results}):
        ax.scatter(*zip(*(place(r) for r in results if r.get("model") == model)), s=22,
                   label=None if model is None else f"model {model}")
    best = max(results, key=lambda r: r["val_acc"])
    ax.scatter(*place(best), s=110, facecolors="none", edgecolors="black",
               label=f"choice {config_text(best['config'])}, regret {regret:.2f}")
    ax.set(xlabel="accuracy in the search, %", ylabel="true accuracy, %", title=f"{title}: tau {tau or 0:.2f}")
    ax.legend(fontsize=8)


def progress(ax, results):
    """The accuracy of each training of propose.json on the images that choose, and the best so far as steps."""
    ordered = sorted((r for r in results if r.get("order")), key=lambda r: r["order"])
    reached = [100 * r.get("val_acc", r["runs"][0]["test_acc"]) for r in ordered]
    names = [f"{number}\n{config_text(r['config'])}" for number, r in enumerate(ordered, 1)]
    ax.step(names, list(itertools.accumulate(reached, max)), where="post", label="best so far")
    ax.scatter(names, reached, color="tab:grey", label="this training")
    ax.set(xlabel="trained as", ylabel="accuracy on the images that choose, %")
    ax.legend(fontsize=8)


def main():
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with the JSON of any stages, there or below; or a single file")
    parser.add_argument("--truth", type=Path, help="another JSON with true accuracies, such as the published ones")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    args = parser.parse_args()
    single, folder = args.folder.is_file(), args.folder.parent if args.folder.is_file() else args.folder
    files = {path: {"stage": "single", **load_json(path)} for path in
             ([args.folder] if single else sorted(folder.rglob("*.json")))}
    files = {path: data for path, data in files.items() if "results" in data or "ways" in data}
    if not files:
        raise UserError(f"{args.folder} holds no JSON of a stage: name the --out of one, such as runs/cifar10")
    searches = [load_json(path, "val_acc") for path, data in files.items() if data["stage"] not in OTHERS]
    truth, panels = {}, {"pooling": [], "searches": [], "propose": []}
    truths = [path for path, data in files.items() if data["stage"] == "single" and path.parent == folder
              and (single or path.name == "single.json")]
    for path in truths + [args.truth] * bool(args.truth):
        results = load_json(path, "test_acc")["results"]
        results = sorted(({"macs": count_macs(r["config"]), **r} for r in results), key=lambda r: -r["test_acc"])
        truth = {tuple(r["config"]): r["test_acc"] for r in results}
        say(f"{path} knows {len(truth)} configurations, the best is {config_text(results[0]['config'])}")
        if len(results[0]["config"]) == 3:
            panels["pooling"] = [partial(positions, results=results, title=path.stem), partial(costs, results=results)]
        if searches:
            show_table(f"The searches, judged by {path}", SEARCH, search_rows(searches, truth), args.markdown)
    if searches and not truth:
        show_table("The searches, not judged", SEARCH, search_rows(searches, truth), args.markdown)
    for path, data in files.items():
        here, known = path.parent == folder, all(tuple(r["config"]) in truth for r in data.get("results", []))
        if data["stage"] not in OTHERS and here and known:
            panels["searches"].append(partial(agreement, search=data, truth=truth, title=path.stem))
        if data["stage"] in ("retrain", "propose"):
            show_table(f"What was trained, {path}", TRAINED, trained_rows(data), args.markdown)
            if here and any(r.get("order") for r in data["results"]):
                panels["propose"].append(partial(progress, results=data["results"]))
        if data["stage"] == "compare":
            show_table(f"Every way to search, {path}", WAYS, way_rows(data["ways"]), args.markdown)
    os.environ.pop("MPLBACKEND", None)  # that of a notebook, which need not be installed here
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return say("the pictures need matplotlib: pip install matplotlib")
    for name, drawn in panels.items():
        if drawn:
            lines, columns = math.ceil(len(drawn) / 3), min(3, len(drawn))
            figure = Figure(figsize=(6.5 * columns, 5 * lines), layout="constrained")
            for number, panel in enumerate(drawn, 1):
                panel(figure.add_subplot(lines, columns, number))
            with whole_file(folder / f"{name}.png") as temporary:
                figure.savefig(temporary, format="png", dpi=100)
            say(f"wrote {folder / name}.png")


if __name__ == "__main__":
    run_main(main)
