"""Stage 1, the baseline: train configurations alone, from scratch, and test them.

    python train_single.py                               # CIFAR-10, the default, [4,3,3]
    python train_single.py --config all                  # all 36: the truth that judges a search
    python train_single.py --config 4,3,3 7,1,2 --seed 1  # another seed: adds runs to single.json
    python train_single.py --dataset synthetic --config all      # made-up images: minutes
    torchrun --nproc_per_node=8 train_single.py --config all     # eight at a time, a GPU for each

Every training uses all training images and is tested on all test images. It leaves its weights
(.pt), and when it is finished its accuracy (.json), in the folder `single` of --out. What is
finished is not trained again. At the end single.json gathers them all. For several machines add
`--nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500` to torchrun on each.

Paper: Javan, Toews, Pedersoli, AutoML 2023, arXiv 2306.11982, section 5. There the learning rate of
networks trained alone falls in steps. Here it falls along a cosine, as in the paper's searches.
"""
import argparse
import re
import statistics
import time

import torch

from common import (RANK, WORLD, Learner, UserError, check_finite, config_text, cosine_lr,
                    derive_seed, describe, duration, evaluate, gather, keep_network_file,
                    load_checkpoint, load_data, load_json, log_epoch, make_network, other_settings,
                    pack_right, parse, pooling_configs, print_results, refuse_other_settings,
                    run_main, save_checkpoint, save_json, seconds_of_step, steps_per_epoch,
                    training_batches, visible_files, write_results)


def train_network(config, seed, data, args, folder, **extra):
    """Train one network from scratch and test it (stages 1 and 4; paper, section 5).

    config, seed: they alone decide its first weights and its batches. data: from `load_data`.
    folder: where it leaves its checkpoint and, at the end, a JSON file with `test_acc`, a fraction,
    `right` (which test images it classifies rightly, class by class), and the keys of `extra`.
    Returns how long its epochs took, in seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)  # each rank may have a disk of its own
    written = folder / f"{'-'.join(map(str, config))}-seed{seed}.json"
    checkpoint = written.with_suffix(".pt")
    keep_network_file(args)
    train, test, classes = data
    steps = steps_per_epoch(train, args.batch_size)
    torch.manual_seed(derive_seed("weights", seed, *config))
    learner = Learner(make_network(args, len(classes)), args.device, args.amp, args.weight_decay)
    history, state = [], load_checkpoint(checkpoint)
    if state:  # go on after the last epoch of a run that was stopped
        learner.load_state_dict(state["learner"])
        history = state["history"]
        print(f"{config_text(config)} goes on after epoch {len(history)}")

    for epoch in range(len(history), args.epochs):
        began = time.monotonic()
        torch.manual_seed(derive_seed("dropout", seed, epoch, *config))  # if the network has any
        log = torch.zeros(steps, 2, device=args.device)  # loss and accuracy of each step
        # ---- the method: plain training with one configuration -----------------------------------
        order = derive_seed("order", seed, epoch, *config)
        batches = training_batches(train.images, train.labels, args.batch_size, args.device, order)
        for step, (x, y) in enumerate(batches):
            lr = cosine_lr(epoch * steps + step, args.epochs * steps, args.lr, args.warm_up)
            log[step] = learner.train(x, y, config, lr)
        # ------------------------------------------------------------------------------------------
        loss, accuracy = log.mean(0).tolist()  # waits for the device, once an epoch
        entry = log_epoch(epoch, args.epochs, args, {"loss": loss, "train_acc": accuracy}, began,
                          steps, [learner], f"{config_text(config)} seed {seed} ")
        history.append({"config": list(config), "seed": seed, **entry})
        save_checkpoint(checkpoint, {"history": history, "learner": learner.state_dict(),
                                     "args": args.settings})

    right = evaluate(learner.score, test, config, args.device)
    check_finite([learner], args)
    by_class = right[test.labels.argsort(stable=True)]
    seconds = sum(entry["seconds"] for entry in history)
    save_json(written, {
        "config": list(config), "seed": seed, "test_acc": round(right.double().mean().item(), 6),
        "right": pack_right(by_class), "seconds": round(seconds, 2), **extra, "history": history,
        "args": args.settings})
    return seconds


def train_all(todo, data, args, folder, macs):
    """Train networks one after the other, and say how long what is left will take.

    todo: pairs (configuration, seed). macs: {configuration: multiply-adds}. The rest is as in
    `train_network`.
    """
    spent = done = 0
    for number, (config, seed) in enumerate(todo, 1):
        if number == 1:  # a rough guess, from a few steps
            steps = args.epochs * steps_per_epoch(data[0], args.batch_size)
            rate = steps * seconds_of_step(config, args, len(data[2])) / macs[config]
        left = rate * sum(macs[later] for later, _ in todo[number - 1:])
        print(f"training {number} of {len(todo)}: {config_text(config)}, seed {seed}; all that is "
              f"left takes about {duration(left)}")
        spent += train_network(config, seed, data, args, folder)
        done += macs[config]
        rate = spent / done


def finished_runs(folder, settings, refuse=True):
    """The finished runs in a folder that have these settings: {(configuration, seed): its JSON}.

    Under torchrun those on the disk of every rank count. A run with other settings, finished or
    not, raises UserError; with refuse=False it is left alone, and one line says so.
    """
    mine = {path: load_json(path) for path in visible_files(folder, "*-seed*.json")}
    if refuse:
        weights = {path: {"args": load_checkpoint(path)["args"]}
                   for path in visible_files(folder, "*-seed*.pt")
                   if path.with_suffix(".json") not in mine}  # of trainings that were stopped
        gathered = folder.with_suffix(".json")
        gathered = {gathered: load_json(gathered)} if gathered.exists() else {}
        refuse_other_settings(mine | weights | gathered, settings, "choose another --out" + (
            "" if folder.name == "single" else " (and copy the JSON of the searches to it)"))
    same = [run for run in mine.values() if not other_settings(run.get("args", {}), settings)]
    if len(same) < len(mine):
        print(f"left alone: {len(mine) - len(same)} runs in {folder}, trained with other settings")
    runs = {}
    for part in gather(same):
        runs |= {(tuple(run["config"]), run["seed"]): run for run in part}
    return dict(sorted(runs.items()))


def refuse_to_lose(path, *folders):
    """Raise UserError where a JSON of results holds runs that are in none of the folders any more.

    It is written anew from the runs there, so these would be lost.
    """
    mine = {run.stem for folder in folders for run in visible_files(folder, "*-seed*.json")}
    there = set().union(*gather(mine))  # each rank may have a disk of its own
    if path.exists():
        for result in load_json(path).get("results", ()):
            for run in result.get("runs", ()):
                name = f"{'-'.join(map(str, result['config']))}-seed{run['seed']}"
                if name not in there:
                    raise UserError(f"{path} holds a run that is not in {folders[0]} ({name}.json) "
                                    f"and would be lost: move {path.name} away, or the run back")


def summarise(runs, key="test_acc"):
    """Mean and standard deviation of the runs of each configuration.

    runs: from `finished_runs`. key: an accuracy that each run has. Returns {configuration: {key:
    the mean, "std": None for one run, "runs": without histories}}.
    """
    entries = {}
    for config in sorted({config for config, _ in runs}):
        own = []
        for (other, _), run in sorted(runs.items()):
            if other == config:
                left_out = "config", "history", "args"
                own.append({name: value for name, value in run.items() if name not in left_out})
        accuracies = [run[key] for run in own]
        std = round(statistics.stdev(accuracies), 6) if len(own) > 1 else None
        entries[config] = {key: round(statistics.fmean(accuracies), 6), "std": std, "runs": own}
    return entries


def write_trained(args, stage, data, runs, extra_of=lambda config: {}):
    """Write the JSON of a stage that trains, `stage`.json in --out, and return its content.

    runs: from `finished_runs`. extra_of(config): further keys of the result of a configuration.
    """
    train, test, classes = data
    entries = summarise(runs)
    results = []
    for described in describe(list(entries), args, len(classes)):
        config = tuple(described["config"])
        results.append({**described, **entries[config], **extra_of(config)})
    history = [entry for run in runs.values() for entry in run["history"]]
    return write_results(args, stage, stage, classes, results, "test_acc",
                         (len(train.labels), 0, len(test.labels)),
                         seconds=sum(run["seconds"] for run in runs.values()),
                         test_counts=test.labels.bincount(minlength=len(classes)).tolist(),
                         history=history)


def parse_configs(texts, args):
    """Read configurations such as "4,3,3", or "all", or "default". Returns tuples, each once.

    Raises UserError for what is not in the space.
    """
    space = pooling_configs(args.layers, args.scales)
    default = args.default
    configs = []
    for text in texts:
        parts = text.strip("[]()").split(",")
        named = tuple(int(part) if part.strip().isdecimal() else 0 for part in parts)
        if text not in ("all", "default") and named not in space:
            raise UserError(f"--config {text}: must be {args.scales} numbers of layers, at least 1 "
                            f"each and {args.layers} in all, such as {','.join(map(str, default))}")
        configs += {"all": space, "default": [default]}.get(text, [named])
    return list(dict.fromkeys(configs))


def multiply_adds(text):
    """Read a number of multiply-adds: "60M", "60m", "0.06G" or a plain number. For argparse."""
    found = re.fullmatch(r"(\d+|\d*\.\d+)([kmg]?)", text.lower())
    if not found:
        raise argparse.ArgumentTypeError(f"{text} must be a number such as 60M, 0.06G or 60000000")
    return float(found[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}[found[2]]


def load_for_training(args):
    """The data set of --dataset, as from `load_data`. Says how many images train and test."""
    data = load_data(args)
    print(f"trains on {len(data[0].labels)} images and tests on {len(data[1].labels)}, "
          f"{len(data[2])} classes, on {args.device}, --amp {args.amp}")
    return data


def main():
    def options(add):
        add("--config", nargs="+", default=["default"], help="configurations such as 4,3,3 7,1,2, "
            "or all; default: the one that pools where the channels double")
    args = parse(__doc__, options)
    configs, folder = parse_configs(args.config, args), args.out / "single"
    finished_runs(folder, args.settings)  # refused now, since decoding images may take long
    refuse_to_lose(args.out / "single.json", folder)
    data = load_for_training(args)
    done = finished_runs(folder, args.settings)  # and again, now that the images are known
    todo = [config for config in configs if (config, args.seed) not in done]
    todo.sort(reverse=True)  # nearly the most expensive first, so that all ranks end together
    described = describe(configs, args, len(data[2]))
    macs = {config: d["macs"] for config, d in zip(configs, described)}
    train_all([(config, args.seed) for config in todo[RANK::WORLD]], data, args, folder, macs)

    runs = finished_runs(folder, args.settings)
    if RANK == 0:
        found = write_trained(args, "single", data, runs)
        print_results(found["results"], found["default"], found["pareto"], "test_acc")


if __name__ == "__main__":
    run_main(main)
