"""A folder of results as pictures and a table: where to pool, what it costs, how well the searches rank.

    python -m results.report results/cifar10-jpeg      # in the project's folder; pictures need `pip install matplotlib`
    python -m results.report runs/my_images            # your own

Prints a Markdown table of all searches in the folder and below, one line for each setting, its seeds side by side.
pooling.png shows the configurations of single.json: a triangle over the two pooling positions, and test accuracy
against multiply-adds with the Pareto front. searches.png shows the scores of the searches in the folder itself.
The truth to compare with is the folder's single.json and, where --truth names one, another file.
"""
import argparse
import math
from pathlib import Path

import numpy as np

from common import (Parser, UserError, count_macs, default_config, kendall_tau, load_json, pareto, run_main, show,
                    whole_file)


def triangle(ax, results, title):
    """Draw accuracies of three-resolution configurations over their two pooling positions.

    ax: matplotlib axes; results: entries with `config` [a, b, c] and `test_acc`. A square marks the default, a circle
    the best. Returns what a colour bar needs."""
    x, y = [r["config"][0] for r in results], [r["config"][0] + r["config"][1] for r in results]
    accuracies = [100 * r["test_acc"] for r in results]
    # colours from the lower quartile up: a few failed configurations would take the whole range
    low = sorted(accuracies)[len(accuracies) // 4] - 1
    shown = ax.scatter(x, y, c=accuracies, s=620, marker="s", cmap="viridis", vmin=low)
    for a, b, accuracy in zip(x, y, accuracies):
        ax.annotate(f"{accuracy:.1f}", (a, b), ha="center", va="center", fontsize=7.5,
                    color="black" if accuracy > (low + max(accuracies)) / 2 else "white")
    best = max(range(len(x)), key=accuracies.__getitem__)
    a, b, c = default_config(sum(results[0]["config"]))
    ax.scatter([a], [a + b], s=760, marker="s", facecolors="none", edgecolors="black", linewidths=1.6)
    ax.scatter([x[best]], [y[best]], s=900, marker="o", facecolors="none", edgecolors="tab:red", linewidths=1.8)
    ax.set(xlabel="layers before the first pooling", ylabel="layers before the second pooling", title=title,
           xticks=range(1, a + b + c - 1), yticks=range(2, a + b + c))
    ax.margins(0.09)
    return shown


def cost(ax, results, title):
    """Draw accuracy against multiply-adds (entries with `config`, `macs`, `test_acc`) with the Pareto front."""
    front, usual = pareto(results, "test_acc"), list(default_config(sum(results[0]["config"])))
    ax.scatter([r["macs"] / 1e6 for r in results], [100 * r["test_acc"] for r in results], s=18, color="tab:grey")
    ax.step([r["macs"] / 1e6 for r in front], [100 * r["test_acc"] for r in front], where="post", marker="o",
            color="tab:red", label="Pareto front")
    for r in results:
        if r["config"] == usual:
            ax.annotate(show(r["config"]), (r["macs"] / 1e6, 100 * r["test_acc"]), fontsize=8, weight="bold",
                        xytext=(5, -9), textcoords="offset points")
        elif r in front:
            ax.annotate(show(r["config"]), (r["macs"] / 1e6, 100 * r["test_acc"]), fontsize=7, ha="right",
                        xytext=(-5, 4), textcoords="offset points")
    ax.set(xscale="log", xlabel="million multiply-adds", ylabel="test accuracy, %", title=title)
    ax.set_xticks([20, 30, 50, 80, 150], ["20", "30", "50", "80", "150"])
    ax.set_xticks([], minor=True)
    ax.legend(loc="lower right")


def agreement(ax, search, truth, title):
    """Draw a search's scores against {config tuple: true accuracy}; a colour for each model and what it owns."""
    known = [r for r in search["results"] if tuple(r["config"]) in truth]
    x, y = ([100 * v for v in values] for values in zip(*((r["val_acc"], truth[tuple(r["config"])]) for r in known)))
    ax.scatter(x, y, c=[r.get("model", 0) for r in known], cmap="tab10", vmin=0, vmax=9, s=26)
    usual, best = list(default_config(sum(known[0]["config"]))), known[max(range(len(y)), key=y.__getitem__)]["config"]
    for r, a, b in zip(known, x, y):
        words = [w for w, config in (("best", best), ("default", usual), ("chosen", search["best"]["config"]))
                 if r["config"] == config]
        if words:
            ax.annotate(f"{show(r['config'])} {', '.join(words)}", (a, b), fontsize=8, ha="center",
                        xytext=(0, -14 if words[-1] == "chosen" else 7), textcoords="offset points")
    ax.set(xlabel="accuracy in the search, %", ylabel="true accuracy, %",
           title=f"{title}: Kendall's tau {kendall_tau(x, y) or 0:.2f}")


def setting(search):
    """What was searched how, in words: the same for runs that differ in their seed only."""
    a = search["args"]
    name = {"supernet": "naive SuperNet", "mixture": f"mixture, M = {a.get('models')}"}[search["stage"]]
    name = "prioritised SuperNet" if a.get("sampler") == "prioritized" else name
    name += f", first {a['shared_epochs']} epochs shared" if a.get("shared_epochs") else ""
    return name + (", not balanced" if a.get("no_balance") else "")


def tau_within(x, y, groups):
    """Kendall's tau-b of x and y (equal lengths) over the pairs that share a group; None where there is none.

    Among configurations with the same owner: how well each model of a mixture ranks what it owns, whatever the
    models' levels."""
    x, y, groups = (np.asarray(v, float) for v in (x, y, groups))
    same = groups[:, None] == groups
    x, y = (np.sign(np.subtract.outer(v, v)) * same for v in (x, y))
    scale = math.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / scale) if scale else None


def table(searches, truths):
    """Markdown lines on searches (dicts as in their JSON): one for each setting, the values of its seeds side by side.

    truths: {name: {config tuple: accuracy}}. For each of them Kendall's tau, in brackets over the pairs of
    configurations that the same model owns, and, of the chosen configuration, its true rank and, in brackets, its
    regret: the best accuracy minus its own, in points."""
    columns = [f"{what}, {name}" for name in truths for what in ("tau", "rank (regret)")]
    lines = ["| " + " | ".join(["search", "images", "steps", "chosen", *columns, "seconds"]) + " |",
             "| --- " * (5 + len(columns)) + "|"]
    groups, searches = {}, list(searches)
    for search in searches:
        steps = len(search["history"]) * (search["n_train"] // search["args"]["batch_size"])
        groups.setdefault((setting(search), search["n_train"] + search["n_val"], steps), []).append(search)
    if searches:  # ranked by cost alone, without any training: what a search has to beat
        cost = [{"config": r["config"], "val_acc": r["macs"]} for r in searches[0]["results"]]
        groups["by multiply-adds alone", "-", 0] = [{"results": cost, "best": max(cost, key=lambda r: r["val_acc"])}]
    for (name, images, steps), group in sorted(groups.items(), key=lambda g: (-g[0][2], "mixture" in g[0][0], g[0][0])):
        group.sort(key=lambda search: search["args"]["seed"] if "args" in search else 0)
        cells = [name, images, steps, ", ".join(show(search["best"]["config"]) for search in group)]
        for truth in truths.values():
            best, taus, regrets = max(truth.values()), [], []
            for search in group:
                known = [r for r in search["results"] if tuple(r["config"]) in truth]
                x, y = [r["val_acc"] for r in known], [truth[tuple(r["config"])] for r in known]
                taus.append(f"{kendall_tau(x, y) or 0:.2f}")
                if len({r.get("model") for r in known}) > 1:
                    taus[-1] += f" ({tau_within(x, y, [r['model'] for r in known]) or 0:.2f})"
                chosen = truth.get(tuple(search["best"]["config"]))
                regrets.append("-" if chosen is None else
                               f"{1 + sum(v > chosen for v in truth.values())} ({100 * (best - chosen):.2f})")
            cells += [", ".join(taus), ", ".join(regrets)]
        cells.append(", ".join(f"{search['seconds']:.0f}" if "seconds" in search else "-" for search in group))
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def save(figure, path):
    """Write a matplotlib figure as PNG, whole or not at all."""
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=110)
    print(f"wrote {path}")


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with single.json and, there or below, the searches' files")
    parser.add_argument("--truth", type=Path, help="another JSON with true accuracies, such as the published ones")
    args = parser.parse_args()
    single = args.folder / "single.json"
    truths = {}
    for path in [single] * single.exists() + [args.truth] * bool(args.truth):
        results = load_json(path)["results"]
        truths[path] = [{"macs": count_macs(r["config"]), **r} for r in results]
        if not all(isinstance(r.get("test_acc"), float) and len(r["config"]) == 3 for r in results):
            raise UserError(f"{path} needs test_acc of configurations of three resolutions: name another file")
    if not truths:
        raise UserError(f"{args.folder} holds no single.json: train_single.py writes it, or name a truth with --truth")
    by_config = {"own" if path == single else path.stem.split("_")[0]:
                 {tuple(r["config"]): r["test_acc"] for r in results} for path, results in truths.items()}
    searches = {path: load_json(path) for path in sorted(args.folder.rglob("*.json"), reverse=True)}
    searches = {path: data for path, data in searches.items() if data.get("stage") in ("supernet", "mixture")}
    print("\n".join(table(searches.values(), by_config)))

    try:
        import matplotlib
    except ImportError:
        raise UserError("the pictures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(truths), 2, figsize=(12, 5.2 * len(truths)), squeeze=False, layout="constrained")
    for (path, results), (left, right) in zip(truths.items(), axes):
        figure.colorbar(triangle(left, results, f"{path}: test accuracy, %"), ax=left, extend="min")
        cost(right, results, path)
    save(figure, args.folder / "pooling.png")

    here = {path: data for path, data in searches.items() if path.parent == args.folder}
    if here:
        name, truth = list(by_config.items())[-1]
        figure, axes = plt.subplots(1, len(here), figsize=(6 * len(here), 4.8), squeeze=False, layout="constrained")
        for (path, search), ax in zip(here.items(), axes[0]):
            agreement(ax, search, truth, f"{path.stem} against {name}")
        save(figure, args.folder / "searches.png")


if __name__ == "__main__":
    run_main(main)
