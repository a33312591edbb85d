"""Stage 4: train the winners of the searches from scratch, against the default, and print the final table.

    python retrain.py                          # CIFAR-10: what the searches in runs/cifar10 chose, 3 seeds each
    python retrain.py --runs 5 --epochs 200
    python retrain.py --max-macs 40M           # the best choice within a budget of multiply-adds
    torchrun --nproc_per_node=2 retrain.py     # data-parallel, the same global batch

Needs supernet.json or mixture.json in --out. Trains on all training images and tests on the test images, as stage 1
does. Finished runs are kept: with a larger --runs only the new seeds are trained.

Paper: Javan, Toews, Pedersoli, AutoML 2023, arXiv 2306.11982, section 5. Writes retrain.json.
"""
from pathlib import Path

from common import (RANK, Run, UserError, choose, default_config, load_json, number, pareto, parse,
                    pooling_configs, print_table, run_main, say, show)
from train_single import add_run, earlier, run_name, train_network, write


def winners(args):
    """What to train: {configuration: {"default" or the search that chose it: seconds of finding it}}."""
    space = {"layers": args.layers, "scales": args.scales, "size": len(pooling_configs(args.layers, args.scales))}
    chosen, name = {default_config(args.layers, args.scales): {"default": 0.0}}, Path(args.dataset).name
    found = [path for path in (Path(args.out) / f"{stage}.json" for stage in ("supernet", "mixture")) if path.exists()]
    if not found:
        raise UserError(f"{args.out} holds no search result: run `python search_mixture.py --dataset {args.dataset} "
                        f"--out {args.out}` first")
    for path in found:
        search = load_json(path, path.stem, name, space)
        if not all(isinstance(r.get("val_acc"), float) and isinstance(r.get("macs"), int) for r in search["results"]):
            raise UserError(f"{path} has results without val_acc or macs: run its search again")
        best = choose(search["results"], "val_acc", args.max_macs)
        chosen.setdefault(tuple(best["config"]), {})[path.stem] = search["seconds"]
    return chosen


def main():
    def options(parser):
        parser.add_argument("--runs", type=number(), default=3, help="seeds each, counted up from --seed; default 3")
    args = parse(__doc__, "retrain", options)
    chosen = winners(args) if RANK == 0 else {}
    with Run(args, "retrain", hidden={"seed"}) as run:
        data = run.load_data()
        results, history = earlier(run)
        todo = run.same([(config, seed) for seed in range(args.seed, args.seed + args.runs) for config in chosen
                         if seed not in [r["seed"] for r in results.get(config, {"runs": []})["runs"]]])

        # ---- the loop: every winner with every seed ------------------------------------------------------------------
        for config, seed in todo:
            result, entries = train_network(tuple(config), data, run, seed, run_name(run, config, seed))
            add_run(results, run.entry(config, data), result)
            history.extend(entries)
            write(run, data, results, history)

        if RANK == 0:
            for config, entry in results.items():
                entry["chosen_by"] = chosen.get(config, {})
            write(run, data, results, history)
            table(results, results[default_config(args.layers, args.scales)]["test_acc"])
            say(f"wrote {run.out / 'retrain.json'}")


def table(results, base):
    """Print the final table; results: entries by configuration; base: the default's accuracy, a fraction."""
    say()
    header = ["configuration", "chosen by", "M multiply-adds", "test acc", "deviation", "runs", "gain", "found in",
              "Pareto"]
    front = pareto(results.values(), "test_acc")
    print_table(header, [
        [show(r["config"]), " and ".join(r["chosen_by"]) or None, f"{r['macs'] / 1e6:.1f}", f"{r['test_acc']:.4f}",
         None if r["std"] is None else f"{r['std']:.4f}", len(r["runs"]), f"{100 * (r['test_acc'] - base):+.2f} points",
         ", ".join(f"{seconds:.0f} s" for seconds in r["chosen_by"].values() if seconds) or None,
         "*" * (r in front)]
        for r in sorted(results.values(), key=lambda r: -r["test_acc"])])


if __name__ == "__main__":
    run_main(main)
