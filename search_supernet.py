"""Stage 2, the naive SuperNet (single path one-shot): one set of weights for all pooling configurations.

    python search_supernet.py                              # CIFAR-10, the paper's 100 epochs
    python search_supernet.py --dataset synthetic          # a minute on a laptop
    python search_supernet.py --dataset path/to/images     # a folder with train/<class>/* and test/<class>/*
    python search_supernet.py --sampler prioritized        # PSS-Net: good at every budget of multiply-adds
    torchrun --nproc_per_node=2 search_supernet.py         # data-parallel, the same global batch

Each step draws a configuration uniformly and takes one SGD step through it, on one half of the training images.
Then every configuration is scored with the shared weights on the other half. The paper's point: this ranks badly.
Last comes a table of budgets: the best of each cost class, as a network to deploy (`extract_network`).

Papers: Javan, Toews, Pedersoli, AutoML 2023, arXiv 2306.11982; single path one-shot: Guo et al., ECCV 2020;
prioritised sampling: Chen, Lin, Ji, Cao, "Prioritized Subnet Sampling for Resource-Adaptive Supernet Training"
(PSS-Net), TPAMI 2023, arXiv 2109.05432. Writes supernet.json, and the weights to supernet.pt.
"""
import itertools
import statistics
import time
import timeit
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from common import (RANK, WORLD, Learner, ResNet20, UserError, average_over_ranks, cosine_lr, count_macs,
                    default_config, derive_seed, evaluate, from_rank_0, halves, label_loss, load_checkpoint, log_epoch,
                    open_stage, parse, pooling_configs, print_ranks, print_results, print_table, rank_against_single,
                    result_fields, run_main, save_checkpoint, say, show, steps_per_epoch, training_batches,
                    write_stage)


class Pools:
    """Prioritised subnet sampling (PSS-Net): configurations of similar cost compete in a pool.

    macs: multiply-adds of each configuration. The source samples a huge space and fills pools with what it meets;
    with 36 configurations the classes of cost are small, so `pools` classes of equal number are cut along the cost
    (none is empty), and a pool keeps the `size` best of its class. Scores are updated once an epoch, not once a
    step, so that no step waits for its loss.
    score: running average (0.9) of minus the loss, None before the first; members: the pool of each class."""

    def __init__(self, macs, pools, size):
        order = np.argsort(macs, kind="stable")
        self.classes = [part.tolist() for part in np.array_split(order, pools)]
        self.size, self.score, self.members = size, [None] * len(macs), [[] for _ in self.classes]

    def draw(self, steps, progress, seed, floor=0.01):
        """Draw `steps` configurations (list of indices) at `progress` 0..1 of the run.

        The probability to explore the whole space and the temperature both fall exponentially from 1 to `floor`."""
        rng, level, drawn = np.random.default_rng(seed), floor ** progress, []
        pools = [pool for pool in self.members if pool]
        for _ in range(steps):
            if not pools or rng.random() < level:
                drawn.append(int(rng.integers(len(self.score))))
            else:
                pool = pools[rng.integers(len(pools))]
                weights = np.array([self.score[i] for i in pool]) / level
                weights = np.exp(weights - weights.max())
                drawn.append(int(rng.choice(pool, p=weights / weights.sum())))
        return drawn

    def update(self, drawn, losses):
        """Record the losses of drawn configurations in their order; the worst leaves a pool that is over-full."""
        for i, loss in zip(drawn, losses):
            self.score[i] = -loss if self.score[i] is None else 0.9 * self.score[i] - 0.1 * loss
            pool = self.members[next(k for k, members in enumerate(self.classes) if i in members)]
            if i not in pool:
                pool.append(i)
            if len(pool) > self.size:
                pool.remove(min(pool, key=lambda j: self.score[j]))


def prioritized_loss(largest, smallest, network, x, y, config):
    """PSS-Net's loss, a function like `label_loss` when the first two configurations are given.

    The largest learns the labels, the smallest and the drawn one the largest one's output (KL divergence)."""
    loss, teacher = label_loss(network, x, y, largest)
    target = teacher.detach().log_softmax(1)
    for student in (smallest, config):
        logits = network(x, student).float()
        loss = loss + F.kl_div(logits.log_softmax(1), target, reduction="batchmean", log_target=True)
    return loss, logits


@torch.no_grad()
def extract_network(weights, config, feed, classes=10, channels=3, stem=1):
    """Turn (SuperNet weights, configuration) into an ordinary network with statistics of its own.

    weights: state dict of a ResNet20 with norm="shared"; feed: a few (normalised images (B, C, S, S), labels) training
    batches, over which the batch-norm statistics are averaged. Returns a ResNet20 in eval mode, on the weights'
    device, whose net(x) runs `config` and gives one image the same answer as a batch."""
    net = ResNet20(channels, classes, stem, sum(config), "own")
    net.load_state_dict(weights, strict=False)  # what is missing: scale 1, shift 0 and the statistics
    net.config = tuple(config)
    norms = [module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # a plain average over the batches
    net.to(next(iter(weights.values())).device).train()
    for x, _ in feed:
        net(x)
    return net.eval()


def main():
    def options(add):
        add("--sampler", choices=["uniform", "prioritized"], default="uniform", help="uniform (default) single "
            "path, or PSS-Net's prioritised sampling, whose steps train three configurations")
        add("--pools", type=int, default=6, help="classes of multiply-adds, rows of the budget table; default 6")
        add("--pool-size", type=int, default=3, help="configurations that a prioritised pool keeps; default 3")
    args = parse(__doc__, options, synthetic_epochs=24)
    if args.pools > args.space["size"]:
        raise UserError(f"--pools {args.pools} is more than the {args.space['size']} configurations: lower it")
    unused = {"pools", "pool_size"} if args.sampler == "uniform" else set()  # they shape the table of budgets only
    with open_stage(args, "supernet", ignore={"limit_test", *unused}) as stage:
        search(*stage)


def search(args, data, settings):
    """From the arguments to supernet.json."""
    configs, device, checkpoint = pooling_configs(args.layers, args.scales), args.device, args.out / "supernet.pt"
    fields = [result_fields(config, data, args) for config in configs]
    training, scoring = halves(data.train, args.seed)
    steps = steps_per_epoch(training, args.batch_size, WORLD)
    pools, loss = Pools([entry["macs"] for entry in fields], args.pools, args.pool_size), label_loss
    if args.sampler == "prioritized":
        by_cost = sorted(configs, key=count_macs)
        loss = partial(prioritized_loss, by_cost[-1], by_cost[0])
    torch.manual_seed(derive_seed("weights", args.seed))
    channels, classes = data.train.pixels.shape[-1], len(data.classes)
    net = ResNet20(channels, classes, args.stem, args.layers, norm="shared")
    learner = Learner(net, device, args.amp, args.weight_decay, loss=loss, parallel=WORLD > 1)
    history, state = [], from_rank_0(load_checkpoint(checkpoint))
    if state:
        learner.load_state_dict(state["learner"])
        history, pools.score, pools.members = state["history"], state["score"], state["members"]
        say(f"going on after epoch {len(history)}")

    # ---- the search -------------------------------------------------------------------------------------------------
    for epoch in range(len(history), args.epochs):
        began, log = time.monotonic(), torch.zeros(steps, 2, device=device)  # loss and accuracy, read once an epoch
        progress = epoch / max(1, args.epochs - 1) if args.sampler == "prioritized" else 0.0  # at 0: uniform
        drawn = pools.draw(steps, progress, derive_seed("draw", args.seed, epoch))
        order = derive_seed("order", args.seed, epoch)
        feed = training_batches(training, args.batch_size, device, order, rank=RANK, world=WORLD)
        for step, (x, y) in enumerate(feed):
            lr = cosine_lr(epoch * steps + step, args.epochs * steps, args.lr, args.warm_up)
            log[step] = learner.train(x, y, configs[drawn[step]], lr)
        average_over_ranks(log)
        pools.update(drawn, log[:, 0].tolist())
        mean_loss, accuracy = log.mean(0).tolist()
        if RANK == 0:
            history.append(log_epoch(epoch, args, {"loss": mean_loss, "train_acc": accuracy}, began, steps))
            save_checkpoint(checkpoint, {"history": history, "score": pools.score, "members": pools.members,
                                         "learner": learner.state_dict(), "args": settings})

    # ---- every configuration on the whole scoring half ---------------------------------------------------------------
    began, results = time.monotonic(), []
    for config, entry in zip(configs, fields):
        accuracy = evaluate(net, scoring, config, device, args.amp, args.batch_size)
        results.append({**entry, "val_acc": round(accuracy, 6)})

    # ---- one network for each budget ---------------------------------------------------------------------------------
    budgets = []
    for members, kept in zip(pools.classes, pools.members):
        budget = max(results[i]["macs"] for i in members)
        if args.sampler == "prioritized" and kept:
            members = kept
        best = max((results[i] for i in members), key=lambda r: r["val_acc"])
        feed = training_batches(training, args.batch_size, device, derive_seed("calibration", args.seed))
        feed = list(itertools.islice(feed, 8))
        single = extract_network(net.state_dict(), best["config"], feed, classes, channels, args.stem)
        image = feed[0][0][:1]
        with torch.no_grad():
            timed = timeit.repeat(lambda: single(image).sum().item(), number=1, repeat=21)  # item() waits
        budgets.append({"budget": budget, **best,
                        "calibrated_val_acc": evaluate(single, scoring, best["config"], device, args.amp),
                        "seconds_per_image": statistics.median(timed)})
    seconds = sum(entry["seconds"] for entry in history) + time.monotonic() - began
    write_stage(args, "supernet", data, settings, results, "val_acc", (len(training), len(scoring), 0), seconds,
                rank=rank_against_single(args, results), budgets=budgets, history=history)

    say("\nbudgets, in multiply-adds: the configuration kept, with the shared weights, and calibrated by itself")
    print_table(["budget", "configuration", "M multiply-adds", "val acc", "calibrated", "ms per image"], [
        [f"{b['budget'] / 1e6:.1f}M", show(b["config"]), f"{b['macs'] / 1e6:.1f}", f"{b['val_acc']:.4f}",
         f"{b['calibrated_val_acc']:.4f}", f"{1e3 * b['seconds_per_image']:.2f}"] for b in budgets])
    say()
    print_results(results, "val_acc", default_config(args.layers, args.scales))
    print_ranks(args)
    say(f"wrote {args.out / 'supernet.json'}")


if __name__ == "__main__":
    run_main(main)
