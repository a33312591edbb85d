"""PSS-Net: a SuperNet that is good at every budget of multiply-adds, with pools and a sandwich.

    python -m extras.pss_net                       # CIFAR-10, 6 pools of 3 configurations
    python -m extras.pss_net --pools 36            # the sandwich alone: draws are uniform
    python -m extras.pss_net --dataset synthetic   # made-up images: a few minutes on a laptop

The configurations are cut along their cost into classes. The pool of a class keeps its best ones.
Each step draws a class, then a configuration, more and more from the pool. The sandwich: one SGD
step trains the most expensive configuration on the labels, and the cheapest and the drawn one on
the output of the most expensive. It uses one half of the training images.

At the end every configuration is scored with the shared weights on the other half. A table then
shows the best of each pool, also as an ordinary network that has batch-norm statistics of its own
(`extract_network`).

A step costs 4.4 steps of search_supernet.py.

Chen, Lin, Ji, Cao, TPAMI 2023, arXiv 2109.05432. Its space is huge; here 36 configurations are cut
into classes of equal size. Writes pss_net.json, which holds the table as `budgets`, and the weights
to pss_net.pt. With another seed than 0 the names end with -seed1 and so on.
"""
import itertools
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import (Learner, at_least, begin_search, config_text, cosine_lr, derive_seed,
                    evaluate, finish_search, log_epoch, make_learner, make_network, parse,
                    print_table, run_main, save_checkpoint, save_json, training_batches)

BLOCK = 36  # steps between two updates of the pools; each update waits for the device


class Pools:
    """Classes of configurations, cut along their cost, and the best configurations of each.

    Configurations are given by their index. macs: their multiply-adds, (n,). classes: the number of
    classes, at most n are made. size: how many configurations a pool keeps.

    self.classes: lists of configurations, cheapest class first, of equal sizes as far as can be.
    self.pools: for each class {configuration: minus the running mean of its losses, which keeps
    0.9}. What leaves a pool is forgotten.
    """

    def __init__(self, macs, classes, size):
        order = np.argsort(macs, kind="stable")
        self.classes = [part.tolist() for part in np.array_split(order, min(classes, len(macs)))]
        self.size, self.pools = size, [{} for _ in self.classes]

    def draw(self, steps, progress, rng):
        """Draw configurations for the next steps. Returns a list of `steps` indices.

        A step draws a class first. It draws from all of the class while the pool is not full, and
        later with the probability `level`, which falls from 1 to 0.01 over the run. Otherwise it
        draws from the pool, by softmax(entry / level). progress: the part of the run that is over,
        0 to 1. rng: a NumPy Generator.
        """
        level, drawn = 0.01 ** progress, []
        for number in rng.integers(len(self.classes), size=steps):
            pool, members = self.pools[number], self.classes[number]
            if len(pool) < min(self.size, len(members)) or rng.random() < level:
                drawn.append(members[rng.integers(len(members))])
            else:
                weights = np.exp((np.array([*pool.values()]) - max(pool.values())) / level)
                drawn.append(int(rng.choice([*pool], p=weights / weights.sum())))
        return drawn

    def update(self, drawn, losses):
        """Record the losses of what was drawn, in the order of the steps. Both are (B,).

        The worst configuration leaves a pool that is too full.
        """
        for a, loss in zip(drawn, losses):
            pool = next(pool for pool, members in zip(self.pools, self.classes) if a in members)
            pool[a] = 0.9 * pool[a] - 0.1 * loss if a in pool else -loss
            if len(pool) > self.size:
                del pool[min(pool, key=pool.get)]


class SandwichLearner(Learner):
    """A Learner that trains several configurations at once. The first one teaches the others."""

    def loss(self, x, y, configs):
        """Cross-entropy of the first configuration + KL(first || other) for each of the others.

        KL is the Kullback-Leibler divergence. The first configuration does not learn from it.

        x: float (B, C, S, S). y: int64 (B,). configs: two tuples or more. Returns the loss, and
        what is logged of the last configuration, float (2,): its cross-entropy on the labels and
        its accuracy.
        """
        teacher = self.network(x, configs[0]).float()
        loss = F.cross_entropy(teacher, y)
        target = teacher.detach().log_softmax(1)
        for config in configs[1:]:
            logits = self.network(x, config).float()
            loss = loss + F.kl_div(logits.log_softmax(1), target, reduction="batchmean",
                                   log_target=True)
        logits = logits.detach()
        accuracy = (logits.argmax(1) == y).float().mean()
        return loss, torch.stack([F.cross_entropy(logits, y), accuracy])


def add_own_config(network, inputs):
    """Turn the inputs of network(x) into those of network(x, network.config)."""
    return inputs if len(inputs) > 1 else (*inputs, network.config)


@torch.no_grad()
def extract_network(weights, config, feed, network):
    """Make an ordinary network of one configuration of a SuperNet, with its own norm statistics.

    weights: the state dict of the SuperNet, in a checkpoint ["learner"]["network"]. config: a
    tuple. feed: training batches, normalised, float (B, C, S, S) each, on the device of the
    weights; nn.BatchNorm2d gets the average of their statistics. network: a new one of
    the same kind, with nn.BatchNorm2d; it takes (x, config).

    Returns the network in eval mode, on the device of the weights. It keeps the configuration as
    `network.config`, and network(x) runs it. A network that had no attribute `config`, unlike
    ResNet20, gets a hook, `add_own_config`, which hands it to forward. Raises RuntimeError where
    the weights are of another network.
    """
    network.to(next(iter(weights.values())).device).train()
    if not hasattr(network, "config"):
        network.register_forward_pre_hook(add_own_config)
    network.config = tuple(config)
    own, norms = {}, []
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            norms.append(module)
            own |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
    network.load_state_dict(own | weights)  # the norms of a SuperNet have no entries in `weights`
    for norm in norms:
        norm.momentum = None  # a plain average over the batches
    for x in feed:
        network(x, network.config)
    return network.eval()


def main():
    def options(add):
        add("--pools", type=at_least(1), default=6, help="classes of cost, each with a pool, at "
            "most one for each configuration; default 6")
        add("--pool-size", type=at_least(1), default=3, help="configurations that a pool keeps; "
            "default 3")
    args = parse(__doc__, options, synthetic_epochs=24)
    search = begin_search(args, "pss_net", "pools", "pool_size", step_cost=4.4)
    learner = make_learner(search, args, kind=SandwichLearner)
    sampler = Pools(search.macs, args.pools, args.pool_size)
    history, counts, steps = [], np.zeros(len(search.configs), int), search.steps
    largest, smallest = search.macs.argmax(), search.macs.argmin()
    if search.state:  # go on after the last epoch of a run that was stopped
        learner.load_state_dict(search.state["learner"])
        history, counts = search.state["history"], np.array(search.state["counts"])
        sampler.pools = search.state["pools"]

    for epoch in range(len(history), args.epochs):
        began = time.monotonic()
        torch.manual_seed(derive_seed("dropout", args.seed, epoch))  # if the network has any
        log = torch.zeros(steps, 2, device=args.device)  # loss and accuracy of the drawn ones
        rng = np.random.default_rng(derive_seed("draw", args.seed, epoch))
        batches = training_batches(search.training.images, search.training.labels, args.batch_size,
                                   args.device, derive_seed("order", args.seed, epoch))
        # ---- the method: draw by the pools, train, and record the losses in the pools ------------
        for start in range(0, steps, BLOCK):
            block = range(start, min(start + BLOCK, steps))
            progress = (epoch * steps + start) / (args.epochs * steps)
            drawn = sampler.draw(len(block), progress, rng)
            # `block` stands first, for zip then takes no batch that the next block would miss
            for step, a, (x, y) in zip(block, drawn, batches):
                lr = cosine_lr(epoch * steps + step, args.epochs * steps, args.lr, args.warm_up)
                trained = [largest, smallest, a]
                log[step] = learner.train(x, y, tuple(search.configs[i] for i in trained), lr)
                np.add.at(counts, trained, 1)  # the drawn one may be the largest or the smallest
            sampler.update(drawn, log[block.start:block.stop, 0].nan_to_num().tolist())
        # ------------------------------------------------------------------------------------------
        loss, accuracy = log.mean(0).tolist()
        history.append(log_epoch(epoch, args.epochs, args, {"loss": loss, "train_acc": accuracy},
                                 began, steps, [learner]))
        save_checkpoint(search.checkpoint, {
            "history": history, "counts": counts.tolist(), "pools": sampler.pools,
            "learner": learner.state_dict(), "args": args.settings})

    found = finish_search(search, args, [learner], history,
                          [{"steps": count} for count in counts.tolist()])
    # ---- the best of each pool, as a network of its own ------------------------------------------
    scores = {tuple(result["config"]): result["val_acc"] for result in found["results"]}
    batches = training_batches(search.training.images, search.training.labels, args.batch_size,
                               args.device, derive_seed("calibration", args.seed))
    feed = [x for x, _ in itertools.islice(batches, 8)]
    budgets, rows = [], []
    for pool, members in zip(sampler.pools, sampler.classes):
        trained = [a for a in pool or members if search.configs[a] in scores]
        if not trained:  # in a short run a class may never be drawn
            continue
        best = max(trained, key=lambda a: scores[search.configs[a]])
        config, budget = search.configs[best], int(max(search.macs[members]))
        network = extract_network(learner.network.state_dict(), config, feed,
                                  make_network(args, len(search.classes)))
        score = Learner(network, args.device, args.amp).score
        calibrated = evaluate(score, search.scoring, config, args.device).double().mean().item()
        budgets.append({"budget": budget, **search.described[best], "val_acc": scores[config],
                        "calibrated_val_acc": round(calibrated, 6)})
        rows.append([f"{budget / 1e6:.1f}", config_text(config), f"{search.macs[best] / 1e6:.1f}",
                     f"{100 * scores[config]:.2f}", f"{100 * calibrated:.2f}"])
    print("\nthe best of each pool, with the shared weights, and as an ordinary network")
    print_table(["budget, million multiply-adds", "configuration", "million multiply-adds",
                 "accuracy, %", "by its own statistics, %"], rows)
    save_json(args.out / f"{search.name}.json", {**found, "budgets": budgets})


if __name__ == "__main__":
    run_main(main)
