"""Every way to search, side by side: how well it ranks, what its choice costs, what it is worth to stage 4.

    python -m results.compare --dataset synthetic --seeds 5            # in the project's folder; a few hours
    python -m results.compare --seeds 2 --ways uniform cost            # two of the ways
    python -m results.compare --so-far                                 # runs nothing: the table of what has ended
    python -m results.compare --truth runs/cifar10/single.json --dataset cifar10

Runs the scripts as a user does, one thread each, as many at a time as there are cores. Every run is a folder in --out
and is not repeated; one that was stopped goes on. First all at equal steps, then all at equal multiply-adds. The truth
is the accuracy of each configuration trained alone: a single.json. All ways together are kept as compare.json in --out.
"""
import os
import subprocess
import sys
import time
from argparse import RawDescriptionHelpFormatter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from common import Parser, UserError, kendall_tau, load_json, pick_amp, pick_device, run_main, save_json, say
from results.report import figures_of, markdown, simulate
from search_supernet import TREES

WAYS = {  # name: (options, forward passes beside those of training, for each path trained)
    "uniform": ("", 0), "cost": ("--sampler cost", 0), "cost to the power 0.5": ("--sampler cost --exponent 0.5", 0),
    "cost to the power 1.5": ("--sampler cost --exponent 1.5", 0), "fair": ("--sampler fair", 0),
    "boltzmann": ("--sampler boltzmann", 1), "mcts": ("--sampler mcts", 1), "tree": ("--sampler tree", 1),
    "mct-nas": ("--sampler mct-nas", 0), "prioritized": ("--sampler prioritized", 0),
    "uniform, sandwich": ("--teach sandwich", 0), "uniform, cross-path": ("--teach cross-path", 1),
    "uniform, split at 0.5": ("--split-at 0.5", 0), "cost, split at 0.5": ("--sampler cost --split-at 0.5", 0),
    "mixture": ("--models 4", 1), "mixture, cost": ("--models 4 --sampler cost", 1),
    "mixture, 4 x the steps": ("--models 4", 1), "mixture, cost, 4 x the steps": ("--models 4 --sampler cost", 1)}

FIGURES = ["tau", "tau with exposure", "tau with steps", "regret of the choice", "stage 4 after 4", "after 6",
           "cost of a step"]


def figures(search, forwards, truth):
    """FIGURES of one search: tau of its scores with the truth, with exposure, with how often each configuration was
    trained; regret, in points, of its choice, and of stage 4 after 4 and 6 trainings (mean of simulations);
    multiply-adds of a step against those of a uniform one."""
    macs, steps, score = (np.array([r[key] for r in search["results"]]) for key in ("macs", "steps", "val_acc"))
    tau, with_exposure, *_, regret = figures_of(search["results"], truth)
    if tau is None:
        raise UserError("--truth knows fewer than half of the configurations: name another, or --dataset")
    scores = {tuple(r["config"]): r["val_acc"] for r in search["results"]}
    stage_4 = simulate(truth, [scores], trainings=6, draws=10).mean(0)
    taken = len(search["history"]) * (search["n_train"] // search["args"]["batch_size"])
    cost = (3 + forwards) / 3 * (macs * steps).sum() / taken / macs.mean()
    if search["args"].get("sampler") == "tree":
        cost += len(TREES) * 5 * len(macs) / 3 / taken  # each ranks all configurations on five batches
    return [tau, with_exposure, kendall_tau(score, steps) or 0, regret, stage_4[3], stage_4[5], cost]


def rows(found):
    """The mean and, in brackets, the deviation over seeds of each figure; tau less that of the uniform run of the same
    seed, with the standard error: {way: strings}. found: {way: list of `figures`}."""
    cells = {}
    base = np.array(found.get("uniform", [])).reshape(-1, len(FIGURES))
    for way, values in found.items():
        values = np.array(values)
        count = len(values)
        paired = values[:len(base), 0] - base[:len(values), 0]
        cells[way] = [f"{mean:.2f}" for mean in values.mean(0)] + [f"{paired.mean():+.2f}" if len(paired) else "-"]
        if count > 1:
            spread = values.std(0, ddof=1)
            cells[way] = [f"{mean} ({deviation:.2f})" for mean, deviation in zip(cells[way], spread)] + cells[way][7:]
            cells[way][7] += f" +- {paired.std(ddof=1) / count ** 0.5:.2f}" if len(paired) == count else ""
    return cells


def main():
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="synthetic", help="as in the scripts; default synthetic")
    parser.add_argument("--truth", type=Path, default=Path("results/synthetic/single.json"), help="a single.json")
    parser.add_argument("--out", type=Path, help="folder of the runs; default runs/compare/<dataset>")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each way; default 5")
    parser.add_argument("--epochs", type=int, default=24, help="of a uniform search; default 24")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="which; default all")
    parser.add_argument("--so-far", action="store_true", help="run nothing, show what has ended")
    parser.add_argument("--device", default="cpu", help="of all runs; default cpu")
    parser.add_argument("--amp", choices=["auto", "bf16", "off"], default="auto", help="precision of all runs")
    args = parser.parse_args()
    truth = {tuple(r["config"]): r["test_acc"] for r in load_json(args.truth, "test_acc")["results"]}
    out = args.out or Path("runs/compare", Path(args.dataset).name)
    amp = pick_amp(args.amp, pick_device(args.device))

    def run(way, seed, epochs):
        """One search in a process of its own, unless it has ended before: its JSON (with --so-far perhaps None)."""
        options = WAYS[way][0].split()
        script = "search_mixture" if "mixture" in way else "search_supernet"
        folder = out / f"{way.replace(' ', '-').replace(',', '')}-epochs{epochs}" / f"seed{seed}"
        name = script.removeprefix("search_") + (f"-seed{seed}" if seed else "")
        if not (folder / f"{name}.json").exists():
            if args.so_far:
                return None
            folder.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, f"{script}.py", "--dataset", args.dataset, "--epochs", str(epochs), "--seed",
                       str(seed), "--amp", amp, "--device", args.device, "--out", str(folder), *options]
            with open(folder / "log.txt", "a") as log:
                ended = subprocess.run(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
            if ended.returncode:
                raise UserError(f"a search ended with code {ended.returncode}: see {folder / 'log.txt'}")
        search = load_json(folder / f"{name}.json", "val_acc")
        if search["args"]["amp"] != amp:
            raise UserError(f"{folder} holds a run in {search['args']['amp']}, not {amp}: name that with --amp")
        return search

    def compare(title, epochs):
        """Run each way of {way: epochs}, all seeds, and print the table: {way: figures, (seeds, 7)}."""
        jobs = [(way, seed, epochs[way]) for seed in range(args.seeds) for way in epochs]
        found = {way: [] for way in epochs}
        began = time.monotonic()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for number, (job, search) in enumerate(zip(jobs, pool.map(lambda job: run(*job), jobs)), 1):
                if search and len(found[job[0]]) == job[1]:  # seeds without a gap, since they are paired
                    found[job[0]].append(figures(search, WAYS[job[0]][1], truth))
                    minutes = (time.monotonic() - began) / 60
                    say(f"{title}: {number} of {len(jobs)} done, {job[0]}, seed {job[1]}; {minutes:.0f} min, "
                        f"{minutes / number * (len(jobs) - number):.0f} left")
        found = {way: values for way, values in found.items() if values}
        say("\n".join(["", *markdown([title, "seeds", "epochs", *FIGURES, "tau above uniform's"], [
            [way, len(found[way]), epochs[way], *row] for way, row in rows(found).items()]), ""]))
        return {way: np.round(values, 6).tolist() for way, values in found.items()}

    equal_steps = compare("equal steps", {way: args.epochs * (4 if "4 x" in way else 1) for way in args.ways})
    equal_cost = compare("equal multiply-adds", {way: max(1, round(args.epochs / np.mean(values, axis=0)[6]))
                                                 for way, values in equal_steps.items() if "4 x" not in way})
    if args.ways == list(WAYS) and not args.so_far:
        save_json(out / "compare.json", {
            "schema": 1, "stage": "compare", "dataset": args.dataset, "truth": str(args.truth), "epochs": args.epochs,
            "amp": amp, "figures": FIGURES, "equal_steps": equal_steps, "equal_cost": equal_cost})


if __name__ == "__main__":
    run_main(main)
