"""Stage 2, the naive SuperNet (single path one-shot): one set of weights for all pooling configurations.

    python search_supernet.py                              # CIFAR-10, the paper's naive SuperNet, 100 epochs
    python search_supernet.py --sampler cost               # the same steps, drawn in proportion to multiply-adds
    python search_supernet.py --dataset synthetic          # a minute on a laptop
    python search_supernet.py --dataset path/to/images     # a folder with train/<class>/* and test/<class>/*
    torchrun --nproc_per_node=3 search_supernet.py         # seeds 0, 1 and 2, each on the GPU of its number

Each step draws a configuration and takes one SGD step through it, on one half of the training images. Then every
configuration is scored with the shared weights on the other half. On CIFAR-10 the ranking by uniform draws mostly
reflects how often the layers of a configuration were trained at its resolutions. Draws by cost (ours, not the paper's)
train expensive configurations more often: a guess that they are better, at 1.32 times the multiply-adds of a step.

Paper: Javan, Toews, Pedersoli, AutoML 2023, arXiv 2306.11982, section 4; Guo et al., ECCV 2020. Writes supernet.json
and the weights to supernet.pt; another seed than 0 writes supernet-seed1.json and so on. Below the SuperNet stands
what every search of this project shares.
"""
import time
from types import SimpleNamespace

import numpy as np
import torch

from common import (RANK, SAME, WORLD, Learner, UserError, batch_statistics_norm, check_settings, cosine_lr,
                    derive_seed, describe, evaluate, halves, kendall_tau, load_checkpoint, load_dataset, load_json,
                    log_epoch, make_network, parse, pooling_configs, run_main, save_checkpoint, say, settings_of,
                    steps_per_epoch, training_batches, write_results)


def draw_probabilities(sampler, macs):
    """How likely a step draws each configuration, (n,): "uniform" or "cost", in proportion to multiply-adds (n,)."""
    weights = np.asarray(macs, float) ** {"uniform": 0, "cost": 1}[sampler]
    return weights / weights.sum()


def main():
    args = parse(__doc__, add_sampler, synthetic_epochs=24)
    search = begin_search(args, "supernet", "sampler")
    learner = make_learner(search, args)
    probabilities = draw_probabilities(args.sampler, search.macs)
    history, counts, steps = [], np.zeros(len(search.configs), int), search.steps
    if search.state:
        learner.load_state_dict(search.state["learner"])
        history, counts = search.state["history"], np.array(search.state["counts"])

    for epoch in range(len(history), args.epochs):
        began = time.monotonic()
        log = torch.zeros(steps, 2, device=args.device)  # loss and accuracy of each step, read once an epoch
        rng = np.random.default_rng(derive_seed("draw", args.seed, epoch))
        drawn = rng.choice(len(search.configs), steps, p=probabilities)
        order = derive_seed("order", args.seed, epoch)
        batches = training_batches(*search.training, args.batch_size, args.device, order)
        for step, (choice, (x, y)) in enumerate(zip(drawn, batches)):
            lr = cosine_lr(epoch * steps + step, args.epochs * steps, args.lr, args.warm_up)
            log[step] = learner.train(x, y, search.configs[choice], lr)
            counts[choice] += 1
        loss, accuracy = log.mean(0).tolist()  # waits for the device
        measures = {"loss": loss, "train_acc": accuracy}
        history.append(log_epoch(epoch, args.epochs, args, measures, began, steps, search.label))
        save_checkpoint(search.checkpoint, {"history": history, "counts": counts.tolist(),
                                            "learner": learner.state_dict(), "args": search.settings})
    finish_search(search, args, [learner], history, [{"steps": int(count)} for count in counts])


# ---- What every search shares ---------------------------------------------------------------------------------------

def add_sampler(add):
    """The option --sampler."""
    add("--sampler", choices=["uniform", "cost"], default="uniform", help="how configurations are drawn: uniform "
        "(default, the paper's) or cost, in proportion to their multiply-adds")


def begin_search(args, stage, *options):
    """Everything before the first epoch. Under torchrun each process searches with a seed of its own.

    options: the script's own options that determine the result. Returns a namespace: name, checkpoint (path), settings,
    label of log lines, state (a checkpoint or None), configs, their fields and macs, training and scoring (Split),
    classes, steps of an epoch (of the smaller half). Raises UserError where a run with other settings is there."""
    args.seed += RANK
    name = f"{stage}-seed{args.seed}" if args.seed else stage
    checkpoint, written = args.out / f"{name}.pt", args.out / f"{name}.json"
    settings = settings_of(args, "seed", *options)
    if written.exists():
        check_settings(written, load_json(written).get("args", {}), settings)
    state = load_checkpoint(checkpoint, settings)
    train, _, classes = load_dataset(args.dataset, args.data_dir, args.image_size, args.limit_train, args.device)
    training, scoring = halves(train, args.seed)
    done = f", goes on after epoch {len(state['history'])}" if state else ""
    say(f"{name} trains on {len(training.labels)} images and scores on {len(scoring.labels)}, {len(classes)} classes, "
        f"on {args.device}, --amp {args.amp}{done}", every_rank=True)
    configs = pooling_configs(args.layers, args.scales)
    fields = [describe(config, args, len(classes)) for config in configs]
    return SimpleNamespace(
        name=name, checkpoint=checkpoint, settings=settings, state=state, classes=classes, configs=configs,
        label=f"seed {args.seed}  " if WORLD > 1 else "", fields=fields, macs=np.array([f["macs"] for f in fields]),
        training=training, scoring=scoring, steps=steps_per_epoch(scoring, args.batch_size))


def make_learner(search, args, *number, kind=Learner, norm=batch_statistics_norm):
    """A SuperNet with first weights that depend on --seed and perhaps a number, as a Learner or another `kind`."""
    torch.manual_seed(derive_seed("weights", args.seed, *number))
    network = make_network(args, len(search.classes), norm)
    return kind(network, args.device, args.amp, args.weight_decay)


def finish_search(search, args, learners, history, notes, **extra):
    """Score every configuration on the whole scoring half, judge the ranking by single.json, write, print, return it.

    notes: for each configuration what its result holds beside its score; "model" names the learner that scores it."""
    began = shown = time.monotonic()
    results = []
    for config, fields, note in zip(search.configs, search.fields, notes):
        score = learners[note.get("model", 0)].score
        accuracy = evaluate(score, search.scoring, config, args.device, args.batch_size)
        results.append({**fields, "val_acc": round(accuracy, 6), **note})
        if time.monotonic() - shown > 10:
            shown = time.monotonic()
            left = (shown - began) / 60 * (len(search.configs) / len(results) - 1)
            say(f"{search.label}scored {len(results)} of {len(search.configs)}, {left:.1f} min left", every_rank=True)
    rank = judge(args.out / "single.json", search.settings, results)
    seconds = sum(entry["seconds"] for entry in history) + time.monotonic() - began
    data = write_results(args, search.name, search.settings, search.classes, results, "val_acc",
                         (len(search.training.labels), len(search.scoring.labels), 0), seconds, rank=rank, **extra,
                         history=history)
    if rank:
        say(f"{search.name}.json against single.json, {rank['n']} configurations: Kendall's tau "
            f"{rank['kendall_tau'] or 0:.2f}, by multiply-adds alone {rank['kendall_tau_macs'] or 0:.2f}; its choice "
            f"is {100 * rank['regret']:.2f} points below the best", every_rank=True)
    return data


def judge(path, settings, results):
    """How well searched results rank, by the test accuracies in a single.json: the `rank` of the search's JSON.

    kendall_tau: tau-b of val_acc; kendall_tau_macs: of multiply-adds alone; regret: the best true accuracy minus that
    of the configuration with the best val_acc, a fraction. None where single.json is not there, knows fewer than half
    of the results, or is of other images, which one line says."""
    if not path.exists():
        return None
    try:
        single = load_json(path, "test_acc")
        check_settings(path, single.get("args", {}), {name: settings[name] for name in SAME})
    except UserError as error:
        say(f"not judged: {error}", every_rank=True)
        return None
    truth = {tuple(entry["config"]): entry["test_acc"] for entry in single["results"]}
    known = [r for r in results if tuple(r["config"]) in truth]
    if len(known) < max(2, len(results) / 2):
        return None
    true = [truth[tuple(r["config"])] for r in known]
    chosen = max(known, key=lambda r: r["val_acc"])
    return {"kendall_tau": kendall_tau([r["val_acc"] for r in known], true),
            "kendall_tau_macs": kendall_tau([r["macs"] for r in known], true),
            "regret": max(true) - truth[tuple(chosen["config"])], "against": path.name, "n": len(known)}


if __name__ == "__main__":
    run_main(main)
