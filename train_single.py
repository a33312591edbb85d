"""Stage 1, the baseline: train pooling configurations alone, from scratch, on all training images, and test them.

    python train_single.py                                   # CIFAR-10, the default configuration [4,3,3]
    python train_single.py --config all                      # all 36: the truth that a search is judged by
    python train_single.py --config 4,3,3 7,1,2 --seed 1     # two of them, another seed: adds runs to single.json
    python train_single.py --dataset synthetic --config all  # minutes on a laptop
    torchrun --nproc_per_node=8 train_single.py --config all # eight networks at a time, on the GPU of their number

Every network leaves its weights (.pt) and, when it is finished, its accuracy (.json) in the folder `single` of --out
and is not trained again; at the end single.json gathers them. Several machines: add `--nnodes=2 --rdzv-backend=c10d
--rdzv-endpoint=HOST:29500` on each.

Paper: Javan, Toews, Pedersoli, AutoML 2023, arXiv 2306.11982, section 5. Its networks alone trained with a rate that
falls in steps; ours follow the cosine of its searches.
"""
import statistics
import time

import torch

from common import (RANK, WORLD, Learner, UserError, check_settings, config_text, cosine_lr, default_config,
                    derive_seed, describe, evaluate, gather, halves, load_checkpoint, load_dataset, load_json,
                    log_epoch, make_network, parse, pooling_configs, run_main, save_checkpoint, save_json, say,
                    settings_of, steps_per_epoch, training_batches, write_results)


def train_network(config, seed, data, args, settings, folder, **notes):
    """Train one network from scratch on the training split and test it (stages 1 and 4; paper, section 5).

    Its weights and batches depend on `seed` and the configuration alone. data: as from `load_dataset`. folder: where
    it leaves a file with the accuracies, fractions, on all test images (`test_acc`) and on each half of them
    (`halves`, a fixed class-balanced cut), and the `notes`, beside the checkpoint with the trained weights."""
    folder.mkdir(parents=True, exist_ok=True)  # each rank may have a disk of its own
    written = folder / f"{'-'.join(map(str, config))}-seed{seed}.json"
    checkpoint = written.with_suffix(".pt")
    train, test, classes = data
    steps = steps_per_epoch(train, args.batch_size)
    torch.manual_seed(derive_seed("weights", seed, *config))
    learner = Learner(make_network(args, len(classes)), args.device, args.amp, args.weight_decay)
    history = []
    state = load_checkpoint(checkpoint, settings)
    if state:
        learner.load_state_dict(state["learner"])
        history = state["history"]
        say(f"{config_text(config)} goes on after epoch {len(history)}", every_rank=True)

    for epoch in range(len(history), args.epochs):
        began = time.monotonic()
        log = torch.zeros(steps, 2, device=args.device)  # loss and accuracy of each step, read once an epoch
        order = derive_seed("order", seed, epoch, *config)
        for step, (x, y) in enumerate(training_batches(*train, args.batch_size, args.device, order)):
            lr = cosine_lr(epoch * steps + step, args.epochs * steps, args.lr, args.warm_up)
            log[step] = learner.train(x, y, config, lr)
        loss, accuracy = log.mean(0).tolist()  # waits for the device
        entry = log_epoch(epoch, args.epochs, args, {"loss": loss, "train_acc": accuracy}, began, steps,
                          f"{config_text(config)} seed {seed} ")
        history.append({"config": list(config), "seed": seed, **entry})
        save_checkpoint(checkpoint, {"history": history, "learner": learner.state_dict(), "args": settings})

    all_images, *accuracies = (evaluate(learner.score, part, config, args.device) for part in (test, *halves(test)))
    save_json(written, {"config": list(config), "seed": seed, "test_acc": round(all_images, 6), "halves": accuracies,
                        "seconds": round(sum(entry["seconds"] for entry in history), 2), **notes,
                        "history": history, "args": settings})


def check_runs(folder, settings):
    """Raise UserError where a run in the folder, finished or not, was trained with other settings."""
    for path in sorted(folder.glob("*-seed*.pt")):
        load_checkpoint(path, settings)
    for path in sorted(folder.glob("*-seed*.json")):
        check_settings(path, load_json(path).get("args", {}), settings)


def finished_runs(folder):
    """The finished runs in a folder, on whichever rank's disk: {(configuration, seed): what its file holds}."""
    mine = [load_json(path) for path in sorted(folder.glob("*-seed*.json"))]
    runs = {(tuple(run["config"]), run["seed"]): run for part in gather(mine) for run in part}
    return dict(sorted(runs.items()))


def summarise(runs, key="test_acc"):
    """The runs of each configuration, the mean and standard deviation of `key`: {configuration: fields of a result}."""
    entries = {}
    for config in sorted({config for config, _ in runs}):
        own = [{name: value for name, value in run.items() if name not in ("config", "history", "args")}
               for (other, _), run in sorted(runs.items()) if other == config]
        accuracies = [run[key] for run in own]
        entries[config] = {key: round(statistics.fmean(accuracies), 6),
                           "std": round(statistics.stdev(accuracies), 6) if len(own) > 1 else None, "runs": own}
    return entries


def parse_configs(texts, args):
    """Configurations from text, ["4,3,3", ...], "all" or "default". Raises UserError for what is not in the space."""
    space, usual = pooling_configs(args.layers, args.scales), default_config(args.layers, args.scales)
    configs = []
    for text in texts:
        named = tuple(int(part) if part.strip().isdecimal() else 0 for part in text.strip("[]()").split(","))
        if text not in ("all", "default") and named not in space:
            raise UserError(f"--config {text}: must be {args.scales} numbers of layers, at least 1 each and "
                            f"{args.layers} in all, such as {','.join(map(str, usual))}")
        configs += {"all": space, "default": [usual]}.get(text, [named])
    return list(dict.fromkeys(configs))


def load_for_training(args):
    """The data set of --dataset, as from `load_dataset`. Says how many images will train."""
    data = load_dataset(args.dataset, args.data_dir, args.image_size, args.limit_train, args.device)
    say(f"trains on {len(data[0].labels)} images and tests on {len(data[1].labels)}, {len(data[2])} classes, on "
        f"{args.device}, --amp {args.amp}")
    return data


def main():
    args = parse(__doc__, lambda add: add("--config", nargs="+", default=["default"], help="configurations such as "
                                          "4,3,3 7,1,2, or all; default: pooling where the channels double"))
    configs = parse_configs(args.config, args)
    settings = settings_of(args)
    done = finished_runs(args.out / "single")
    check_runs(args.out / "single", settings)
    data = load_for_training(args)
    todo = [config for config in configs if (config, args.seed) not in done]
    todo.sort(reverse=True)  # roughly the most expensive first: no rank is left with a long tail
    for config in todo[RANK::WORLD]:
        train_network(config, args.seed, data, args, settings, args.out / "single")

    runs = finished_runs(args.out / "single")
    results = [{**describe(config, args, len(data[2])), **entry} for config, entry in summarise(runs).items()]
    if RANK == 0:
        write_results(args, "single", settings, data[2], results, "test_acc",
                      (len(data[0].labels), 0, len(data[1].labels)), seconds=sum(r["seconds"] for r in runs.values()),
                      history=[entry for run in runs.values() for entry in run["history"]])


if __name__ == "__main__":
    run_main(main)
