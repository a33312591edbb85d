"""Every way to search, side by side, with several seeds: how well it ranks and what its choice costs.

    python -m results.compare                                          # in the project's folder; some hours
    python -m results.compare --seeds 2 --ways uniform cost            # two of the ways
    python -m results.compare --dataset cifar10 --truth runs/cifar10/single.json

Runs the scripts as a user does, one thread each, as many at a time as there are cores. All take the same number of
steps, but for the mixtures whose models take as many each. Every run is a folder in --out and is not repeated; one that
was stopped goes on. The truth is the accuracy of each configuration trained alone: a single.json. Writes compare.json
to --out, which results/report.py shows as well.
"""
import os
import subprocess
import sys
import time
from argparse import RawDescriptionHelpFormatter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from common import (ARRAYS, Parser, UserError, at_least, load_dataset, load_json, other_settings, pick_amp, pick_device,
                    run_main, save_json)
from results.report import FIGURES, figures_of, show_ways, steps_of

WAYS = {  # name: (command, epochs as a part of those of a uniform search, passes without training for each)
    "uniform": ("search_supernet", 1, 0),
    "cost": ("search_supernet --sampler cost", 1, 0),
    "mixture": ("search_mixture --models 4", 1 / 4, 1),
    "mixture, cost": ("search_mixture --models 4 --sampler cost", 1 / 4, 1),
    "mixture, 4 x the steps": ("search_mixture --models 4", 1, 1),
    "mixture, cost, 4 x the steps": ("search_mixture --models 4 --sampler cost", 1, 1),
    "mcts": ("extras.mcts", 1, 1),
    "boltzmann": ("extras.boltzmann", 1, 1),
    "mct_nas": ("extras.mct_nas", 1, 0),
    "pss_net": ("extras.pss_net", 1, 0),
    "pss_net, uniform": ("extras.pss_net --pools 36", 1, 0),
    "cross_path": ("extras.cross_path", 1, 1),
    "split_by_resolution": ("extras.split_by_resolution", 1, 0),
    "split_by_resolution, cost": ("extras.split_by_resolution --sampler cost", 1, 0),
    "resolution_norms": ("extras.resolution_norms", 1, 0),
    "resolution_norms, cost": ("extras.resolution_norms --sampler cost", 1, 0)}


def figures(search, read, truth):
    """FIGURES of one search, from its JSON. read: passes that only score or teach, for each path trained.

    The cost of a step is in multiply-adds, where training the average configuration, three passes, is 1. Scores that
    are all alike rank with a tau of 0. Raises UserError where the truth knows too few."""
    tau, with_exposure, _, regret = figures_of(search["results"], truth)
    if regret is None:
        raise UserError("--truth knows fewer than half of the configurations: name another, or --dataset")
    macs, steps = np.array([(r["macs"], r["steps"]) for r in search["results"]]).T
    cost = (3 + read) / 3 * float((macs * steps).sum()) / steps_of(search) / float(macs.mean())
    return [tau or 0.0, with_exposure or 0.0, regret, cost]


def main():
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", default="synthetic", help="as in the scripts; default synthetic")
    add("--truth", type=Path, help="a single.json; needed, but for synthetic, whose own is in results")
    add("--out", type=Path, help="folder of the runs; default runs/compare/<dataset>")
    add("--seeds", type=at_least(2), default=5, help="runs of each way; default 5")
    add("--epochs", type=at_least(4), default=24, help="of a uniform search; default 24")
    add("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="which, beside uniform; default all")
    add("--device", default="cpu", help="of all runs; default cpu")
    add("--amp", choices=["auto", "bf16", "off"], default="auto", help="precision of all runs; default auto, as in the "
        "scripts")
    args = parser.parse_args()
    if not args.truth and args.dataset != "synthetic":
        parser.error(f"--truth: name the single.json of {args.dataset}")
    args.truth = args.truth or Path("results/synthetic/single.json")
    truth = {tuple(r["config"]): r["test_acc"] for r in load_json(args.truth, "test_acc")["results"]}
    out = args.out or Path("runs/compare", Path(args.dataset).resolve().name)
    amp = pick_amp(args.amp, pick_device(args.device))
    digest = "" if args.dataset in ARRAYS else load_dataset(args.dataset, "data")[1].digest

    def run(way, seed):
        """One search in a process of its own, unless it has ended before: its JSON."""
        command, part, _ = WAYS[way]
        module, *options = command.split()
        epochs = max(1, round(part * args.epochs))
        folder = out / f"{way.replace(' ', '-').replace(',', '')}-epochs{epochs}" / f"seed{seed}"
        stage = module.removeprefix("search_").removeprefix("extras.") + "-cost" * ("--sampler cost" in command)
        path = folder / f"{stage}-seed{seed}.json" if seed else folder / f"{stage}.json"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, "-m", module, "--dataset", args.dataset, "--epochs", str(epochs), "--seed",
                       str(seed), "--amp", amp, "--device", args.device, "--out", str(folder), *options]
            with open(folder / "log.txt", "a") as log:
                ended = subprocess.run(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
            if ended.returncode:
                raise UserError(f"a search ended with code {ended.returncode}: see {folder / 'log.txt'}")
        search = load_json(path, "val_acc")
        wanted = {"dataset": Path(args.dataset).resolve().name, "data_digest": digest, "amp": amp}
        if differ := other_settings(search["args"], wanted):
            raise UserError(f"{path} is of a run with other settings: {differ}; choose another --out")
        return search

    ways = list(dict.fromkeys(["uniform", *args.ways]))  # all others are measured by uniform draws
    jobs = [(way, seed) for seed in range(args.seeds) for way in ways]
    found, began = {way: [] for way in ways}, time.monotonic()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for number, ((way, seed), search) in enumerate(zip(jobs, pool.map(lambda job: run(*job), jobs)), 1):
            found[way].append([round(f, 6) for f in figures(search, WAYS[way][2], truth)])
            print(f"{number} of {len(jobs)} done: {way}, seed {seed}; {(time.monotonic() - began) / 60:.0f} min")
    show_ways(found, args.dataset)
    save_json(out / "compare.json", {"schema": 1, "stage": "compare", "dataset": args.dataset, "truth": str(args.truth),
                                     "epochs": args.epochs, "amp": amp, "figures": FIGURES, "ways": found})


if __name__ == "__main__":
    run_main(main)
