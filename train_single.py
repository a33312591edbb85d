"""Stage 1, the baseline: train pooling configurations alone, from scratch, on all training images, and test them.

    python train_single.py                                   # CIFAR-10, the default configuration [4,3,3]
    python train_single.py --config all                      # all 36: the truth that a search is judged by
    python train_single.py --config 4,3,3 7,1,2 --seed 1     # two of them, another seed: adds runs to single.json
    python train_single.py --dataset synthetic --config all  # minutes on a laptop
    torchrun --nproc_per_node=8 train_single.py --config all # ranks share the configurations, and GPUs round robin

Several machines: `torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500
train_single.py --config all` on each. Configurations with a run of the same seed in single.json are skipped.

Paper: Javan, Toews, Pedersoli, AutoML 2023, arXiv 2306.11982, section 5. Writes single.json.
"""
import json
import statistics
import time

import torch

from common import (RANK, WORLD, Learner, ResNet20, Run, UserError, batches, check_config, cosine_lr, count_macs,
                    default_config, derive_seed, evaluate, load_json, parse, pooling_configs, run_main, say, shard,
                    show)


def train_network(config, data, run, seed, name):
    """Train one ResNet20 from scratch on the training split and test it (stages 1 and 4; paper, section 5).

    run: the open Run, for its arguments and checkpoints; seed: of this network, whose initial weights and batches
    depend on it and on the configuration alone. Returns {"seed", "test_acc", "loss", "train_acc", "seconds"} and the
    list of its epochs."""
    args, device, (rank, world) = run.args, run.device, shard()
    torch.manual_seed(derive_seed(seed, *config))
    model = ResNet20(data.train.pixels.shape[-1], len(data.classes), run.stem, sum(config))
    learner = Learner(model, device, run.amp, weight_decay=args.weight_decay, parallel=world > 1)
    steps = run.steps(data.train)
    state = run.load(name) or {"epoch": 0, "step": 0, "history": [], "log": torch.zeros(2, steps)}
    if "learner" in state:
        learner.load_state_dict(state["learner"])
    history, log = state["history"], state["log"].to(device)  # loss and accuracy of each step, read once an epoch
    averages = [b for b in model.buffers() if b.is_floating_point()]  # running statistics, each rank's own

    def snapshot(epoch, step):
        run.agree(log, *averages)
        return {"epoch": epoch, "step": step, "history": history, "log": log.cpu(), "learner": learner.state_dict()}

    for epoch in range(state["epoch"], args.epochs):
        start = state["step"] if epoch == state["epoch"] else 0
        feed = batches(data.train, args.batch_size, device, derive_seed(seed, epoch, *config), True, start,
                       (rank, world))
        for step, (x, y) in enumerate(feed, start):
            lr = cosine_lr(epoch * steps + step, args.epochs * steps, args.lr)
            log[0, step], log[1, step] = learner.train(x, y, config, lr)
            run.tick(snapshot, epoch, step, steps, name)
        run.agree(log, *averages)
        history.append(run.epoch_line(epoch, steps, {"loss": log[0], "train_acc": log[1]}, f"{show(config)} "))
        run.save(snapshot(epoch + 1, 0), name)
    result = {"seed": seed, "test_acc": evaluate(model, data.test, config, device, run.amp),
              "loss": history[-1]["loss"], "train_acc": history[-1]["train_acc"], "seconds": run.seconds(name)}
    return result, [{"config": list(config), "seed": seed, **entry} for entry in history]


def add_run(results, fields, run):
    """Add a run to its configuration's entry in `results`, a dict by configuration, with mean and deviation."""
    entry = results.setdefault(tuple(fields["config"]), {**fields, "test_acc": None, "std": None, "runs": []})
    entry["runs"] = sorted([r for r in entry["runs"] if r["seed"] != run["seed"]] + [run], key=lambda r: r["seed"])
    accuracies = [r["test_acc"] for r in entry["runs"]]
    entry["test_acc"] = round(statistics.fmean(accuracies), 6)
    entry["std"] = round(statistics.stdev(accuracies), 6) if len(accuracies) > 1 else None


def earlier(run):
    """The results and histories that the folder's JSON of this stage holds: (dict by configuration, list)."""
    path = run.out / f"{run.stage}.json"
    data = load_json(path, run.stage) if path.exists() else {"results": []}
    if not all(isinstance(r.get("runs"), list) for r in data["results"]):
        raise UserError(f"{path} has a result without its runs; use --fresh to set it aside and start over")
    return {tuple(r["config"]): r for r in data["results"]}, data.get("history", [])


def write(run, data, results, history, **extra):
    """Write the stage's JSON, then drop the checkpoints of the runs that it holds."""
    seconds = round(sum(r["seconds"] for entry in results.values() for r in entry["runs"]), 2)
    order = sorted(history, key=lambda h: (h["config"], h["seed"], h["epoch"]))
    run.report(data, list(results.values()), "test_acc", (len(data.train), 0, len(data.test)), seconds,
               history=order, **extra)
    for entry in results.values():
        for r in entry["runs"]:
            for suffix in (".pt", ".prev.pt"):
                (run.out / f"{run_name(run, entry['config'], r['seed'])}{suffix}").unlink(missing_ok=True)


def run_name(run, config, seed):
    """The name of one network's checkpoint."""
    return f"{run.stage}-{'-'.join(map(str, config))}-seed{seed}"


def main():
    def options(parser):
        parser.add_argument("--config", nargs="+", help="configurations such as 4,3,3 7,1,2, or all; default: the "
                            "usual one, pooling where the channels double")
    args = parse(__doc__, "alone", options)
    words = args.config or [",".join(map(str, default_config(args.layers, args.scales)))]
    configs = pooling_configs(args.layers, args.scales) if words == ["all"] else [
        parse_config(word, args.layers, args.scales) for word in words]
    with Run(args, "single", independent=True, hidden={"seed"}) as run:
        data = run.load_data()
        results, history = earlier(run)
        todo = [c for c in dict.fromkeys(configs)
                if args.seed not in [r["seed"] for r in results.get(c, {"runs": []})["runs"]]]
        todo.sort(key=count_macs, reverse=True)  # dearest first: no rank gets a long tail
        todo = [tuple(config) for config in run.same(todo)]  # rank 0 knows what single.json holds

        def record(config, result, entries):
            config = tuple(config)
            add_run(results, run.entry(config, data), result)
            history.extend(entries)
            write(run, data, results, history)

        missing = set(range(len(todo))) if WORLD > 1 and RANK == 0 else set()

        def collect():  # rank 0 writes down what the ranks have finished since
            for number in sorted(n for n in missing if run.store.check([f"result {n}"])):
                record(*json.loads(run.store.get(f"result {number}")))
                missing.remove(number)

        # ---- the loop: train each configuration, write it down as it finishes ----------------------------------------
        for number, config in claim(run, todo):
            result, entries = train_network(config, data, run, args.seed, run_name(run, config, args.seed))
            if WORLD == 1:
                record(config, result, entries)
            else:
                run.store.set(f"result {number}", json.dumps([config, result, entries]))
                collect()
        while missing:
            collect()
            if code := run.stopping():
                raise SystemExit(code)
            time.sleep(0.1)
        say()
        run.print_results(list(results.values()), "test_acc")


def parse_config(text, layers=10, scales=3, size=32):
    """A configuration from text, "4,3,3" to (4, 3, 3). Raises UserError when it does not fit."""
    try:
        return check_config([int(part) for part in text.strip("[]()").split(",")], layers, scales, size)
    except ValueError as error:
        reason = error if str(error).startswith("configuration") else f"configuration {text}: not whole numbers"
        example = ",".join(map(str, default_config(layers, scales)))
        raise UserError(f"--config: {reason}; write it like {example}") from None


def claim(run, todo):
    """Yield (number, item) of what this rank is to do: all, or under torchrun whatever is next when it is free."""
    if WORLD == 1:
        yield from enumerate(todo)
    while WORLD > 1 and (number := run.store.add("claimed", 1) - 1) < len(todo):
        yield number, todo[number]


if __name__ == "__main__":
    run_main(main)
