"""Stage 2, the naive SuperNet (single path one-shot): one set of weights for all pooling configurations.

    python search_supernet.py                              # CIFAR-10, the paper's 100 epochs
    python search_supernet.py --dataset synthetic          # minutes on a laptop
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
import timeit

import numpy as np
import torch
import torch.nn.functional as F

from common import (Learner, ResNet20, Run, UserError, autocast, batches, cosine_lr, count_macs, derive_seed, evaluate,
                    halves, load_truth, number, parse, pooling_configs, print_table, rank_report, run_main, say, shard,
                    show)


class Pools:
    """Prioritised subnet sampling (PSS-Net): configurations of similar cost compete in a pool.

    macs: multiply-adds of each configuration. The source samples a huge space and fills pools with what it meets;
    with 36 configurations the classes of cost are small, so `pools` classes of equal number are cut along the cost
    (none is empty), and a pool keeps the `size` best of its class. Scores are updated once an epoch, not once a
    step, so that no step waits for its loss.
    score: running average (0.9) of minus the loss, None before the first; members: the pool of each class."""

    def __init__(self, macs, pools, size):
        if pools > len(macs):
            raise UserError(f"--pools {pools} is more than the {len(macs)} configurations: lower it")
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


def prioritized_step(learner, largest, smallest):
    """The PSS-Net step: a function (x, y, config) that trains three configurations at once with one SGD step.

    The largest learns the labels, the smallest and the drawn one the largest one's output (KL divergence). Returns
    the drawn one's (cross-entropy on the labels, accuracy), as `Learner.train_step` does."""
    def step(x, y, config):
        learner.model.train()
        learner.optimizer.zero_grad()
        with autocast(learner.device, learner.amp):
            teacher, *students = (learner.model(x, c).float() for c in (largest, smallest, config))
        target = teacher.detach().log_softmax(1)
        learner.update(F.cross_entropy(teacher, y) + sum(
            F.kl_div(student.log_softmax(1), target, reduction="batchmean", log_target=True) for student in students))
        logits = students[-1].detach()
        return F.cross_entropy(logits, y), (logits.argmax(1) == y).float().mean()
    return step


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
    def options(parser):
        o = parser.add_argument
        o("--sampler", choices=["uniform", "prioritized"], default="uniform", help="uniform single path, or PSS-Net's "
          "prioritised sampling, whose steps train three configurations; default uniform")
        o("--pools", type=number(), help="classes of multiply-adds, the rows of the budget table; default 6, or one "
          "for each configuration where there are fewer")
        o("--pool-size", type=number(), default=3, help="configurations that a prioritised pool keeps; default 3")
        o("--test", action="store_true", help="also test the networks of the budget table on the test images")
    args = parse(__doc__, "search", options)
    args.pools = args.pools or min(6, len(pooling_configs(args.layers, args.scales)))
    truth, against = load_truth(args)
    hidden = {"limit_test", *(("pools", "pool_size") if args.sampler == "uniform" else ())}  # these change no training
    with Run(args, "supernet", hidden=hidden) as run:
        search(args, run, truth, against)


def search(args, run, truth, against):
    """From the arguments to supernet.json."""
    pools = Pools([count_macs(c, stem=run.stem) for c in run.configs], args.pools, args.pool_size)
    data, device, configs, prioritized = run.load_data(), run.device, run.configs, args.sampler == "prioritized"
    training, scoring = halves(data.train, args.seed)
    steps = run.steps(training)
    torch.manual_seed(derive_seed(args.seed, 0))
    shape = {"channels": training.pixels.shape[-1], "classes": len(data.classes), "stem": run.stem}
    net = ResNet20(**shape, layers=args.layers, norm="shared")
    learner = Learner(net, device, run.amp, weight_decay=args.weight_decay, parallel=shard()[1] > 1)
    if prioritized:
        by_cost = sorted(configs, key=count_macs)
        learner.use(prioritized_step(learner, by_cost[-1], by_cost[0]))
    state = run.load() or {"epoch": 0, "step": 0, "history": [], "scores": [], "log": torch.zeros(2, steps)}
    history, scores = state["history"], state["scores"]
    if "learner" in state:
        learner.load_state_dict(state["learner"])
        pools.score, pools.members = state["score"], state["members"]

    def snapshot(epoch, step):
        run.agree(log)
        return {"epoch": epoch, "step": step, "history": history, "scores": scores, "log": log.cpu(),
                "score": pools.score, "members": pools.members, "learner": learner.state_dict()}

    # ---- the search -------------------------------------------------------------------------------------------------
    log = state["log"].to(device)  # loss and accuracy of each step, read once an epoch
    for epoch in range(state["epoch"], args.epochs):
        start = state["step"] if epoch == state["epoch"] else 0
        progress = epoch / max(1, args.epochs - 1) if prioritized else 0.0  # at 0 every draw is uniform
        drawn = pools.draw(steps, progress, derive_seed(args.seed, epoch, 2))
        feed = batches(training, args.batch_size, device, derive_seed(args.seed, epoch, 0), True, start, shard())
        for step, (x, y) in enumerate(feed, start):
            lr = cosine_lr(epoch * steps + step, args.epochs * steps, args.lr)
            log[0, step], log[1, step] = learner.train(x, y, configs[drawn[step]], lr)
            run.tick(snapshot, epoch, step, steps)
        run.agree(log)
        pools.update(drawn, log[0].tolist())
        history.append(run.epoch_line(epoch, steps, {"loss": log[0], "train_acc": log[1]}))
        run.save(snapshot(epoch + 1, 0))

    # ---- every configuration on the whole scoring half ---------------------------------------------------------------
    for i in range(len(scores), len(configs)):
        accuracy = evaluate(net, scoring, configs[i], device, run.amp, args.batch_size)
        scores.append({**run.entry(configs[i], data, "shared"), "val_acc": accuracy})
        run.save(snapshot(args.epochs, i + 1))
        run.tick(snapshot, args.epochs, i, len(configs))

    # ---- one network for each budget ---------------------------------------------------------------------------------
    budgets = []
    for members, kept in zip(pools.classes, pools.members):
        best = max((scores[i] for i in (kept if prioritized and kept else members)), key=lambda r: r["val_acc"])
        feed = batches(training, args.batch_size, device, derive_seed(args.seed, 0, 3))
        single = extract_network(net.state_dict(), best["config"], itertools.islice(feed, 8), **shape)
        image, _ = next(batches(training, 1, device))
        with torch.no_grad():
            timed = timeit.repeat(lambda: single(image).sum().item(), number=1, repeat=21)  # item() waits
        budgets.append({"budget": max(scores[i]["macs"] for i in members), "config": best["config"],
                        "macs": best["macs"], "val_acc": best["val_acc"],
                        "calibrated_val_acc": evaluate(single, scoring, best["config"], device, run.amp),
                        "seconds_per_image": statistics.median(timed)})
        if args.test:
            budgets[-1]["test_acc"] = evaluate(single, data.test, best["config"], device, run.amp)
    passes = args.epochs * steps * args.batch_size * (3 if prioritized else 1)
    rank = rank_report(scores, truth, against, args.max_macs)
    run.report(data, scores, "val_acc", (len(training), len(scoring), len(data.test) if args.test else 0),
               run.seconds(), args.max_macs, rank=rank, budgets=budgets, image_passes=passes, history=history)
    say("\nbudgets, in multiply-adds: the configuration kept, with the shared weights, and calibrated by itself")
    print_table(["budget", "configuration", "M multiply-adds", "val acc", "calibrated", "ms per image", "test acc"], [
        [f"{b['budget'] / 1e6:.1f}M", show(b["config"]), f"{b['macs'] / 1e6:.1f}", f"{b['val_acc']:.4f}",
         f"{b['calibrated_val_acc']:.4f}", f"{1e3 * b['seconds_per_image']:.2f}",
         f"{b['test_acc']:.4f}" if args.test else None] for b in budgets])
    say()
    run.print_results(scores, "val_acc", rank)


if __name__ == "__main__":
    run_main(main)
