"""PSS-Net, a SuperNet that is good at every budget of multiply-adds: prioritised pools, taught by a sandwich.

    python -m extras.pss_net                         # CIFAR-10, 6 pools of 3 configurations, 100 epochs
    python -m extras.pss_net --pools 36              # a pool for each configuration: uniform draws, the sandwich alone
    python -m extras.pss_net --dataset synthetic     # a few minutes on a laptop

Each step trains the most expensive configuration on the labels, and the cheapest and a drawn one on its output. At the
end a table shows the best of each pool: its accuracy with the shared weights, and calibrated, as an ordinary network
with batch-norm statistics of its own (`extract_network`). A step costs 4.4 steps of search_supernet.py.

Chen, Lin, Ji, Cao, TPAMI 2023, arXiv 2109.05432. Its space is huge; here 36 configurations are cut along the cost into
classes of equal size. Writes pss_net.json, with `budgets`, and .pt; another seed than 0 pss_net-seed1.json and so on.
"""
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import (Learner, ResNet20, at_least, cosine_lr, derive_seed, evaluate, log_epoch, make_network, parse,
                    print_table, run_main, save_checkpoint, save_json, training_batches)
from search_supernet import begin_search, finish_search, make_learner

BLOCK = 36  # steps between two updates of the pools: one wait for the device instead of 36


class Pools:
    """Classes of equal size, cut along the multiply-adds (n,); a pool keeps the `size` best of each.

    pools: for each class {configuration: running mean (0.9) of minus its loss}; what leaves a pool is forgotten."""

    def __init__(self, macs, classes, size):
        order = np.argsort(macs, kind="stable")
        self.classes = [part.tolist() for part in np.array_split(order, min(classes, len(macs)))]
        self.size, self.pools = size, [{} for _ in self.classes]

    def draw(self, steps, progress, rng):
        """Draw a class, then from all of it with probability 0.01 ** progress and while its pool is not full, else from
        the pool by softmax(score / 0.01 ** progress). progress: 0..1 of the run. Returns indices, a list."""
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
        """Record the losses of what was drawn, in the order of the steps; the worst leaves a pool that is too full."""
        for i, loss in zip(drawn, losses):
            pool = next(pool for pool, members in zip(self.pools, self.classes) if i in members)
            pool[i] = 0.9 * pool[i] - 0.1 * loss if i in pool else -loss
            if len(pool) > self.size:
                del pool[min(pool, key=pool.get)]


class SandwichLearner(Learner):
    """A Learner for triples of configurations: the first learns the labels, the others its output (KL divergence)."""

    def loss(self, x, y, path):
        loss, teacher = super().loss(x, y, path[0])
        target = teacher.detach().log_softmax(1)
        for student in path[1:]:
            logits = self.network(x, student).float()
            loss = loss + F.kl_div(logits.log_softmax(1), target, reduction="batchmean", log_target=True)
        return loss, logits


@torch.no_grad()
def extract_network(weights, config, feed, network=None):
    """Turn weights of a SuperNet and a configuration into an ordinary network, with batch-norm statistics of its own.

    weights: ["learner"]["network"] of a checkpoint; feed: training batches, normalised (B, C, S, S), over which the
    statistics are averaged; network: a new one, default ResNet20() for 10 classes. Returns it in eval mode, on the
    weights' device: network(x) runs `config`. Raises RuntimeError where the weights are of another network."""
    network = (network or ResNet20(layers=sum(config))).to(next(iter(weights.values())).device).train()
    network.config = tuple(config)
    norms = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)]
    own = {f"{name}.{key}": value for name, norm in norms for key, value in norm.state_dict().items()}
    network.load_state_dict(own | weights)  # a SuperNet's norms have none: scale 1, shift 0, statistics to come
    for _, norm in norms:
        norm.momentum = None  # a plain average over the batches
    for x in feed:
        network(x, config)
    return network.eval()


def main():
    def options(add):
        add("--pools", type=at_least(1), default=6, help="classes of cost, at most one a configuration; default 6")
        add("--pool-size", type=at_least(1), default=3, help="configurations that a pool keeps; default 3")
    args = parse(__doc__, options, synthetic_epochs=24)
    search = begin_search(args, "pss_net", "pools", "pool_size")
    learner = make_learner(search, args, kind=SandwichLearner)
    sampler = Pools(search.macs, args.pools, args.pool_size)
    history, counts, steps = [], np.zeros(len(search.configs), int), search.steps
    if search.state:
        learner.load_state_dict(search.state["learner"])
        history, counts = search.state["history"], np.array(search.state["counts"])
        sampler.pools = search.state["pools"]

    for epoch in range(len(history), args.epochs):
        began = time.monotonic()
        log = torch.zeros(steps, 2, device=args.device)  # loss and accuracy of the drawn configuration
        rng = np.random.default_rng(derive_seed("draw", args.seed, epoch))
        order = derive_seed("order", args.seed, epoch)
        batches = training_batches(*search.training, args.batch_size, args.device, order)
        for start in range(0, steps, BLOCK):
            block, progress = range(start, min(start + BLOCK, steps)), (epoch * steps + start) / (args.epochs * steps)
            drawn = sampler.draw(len(block), progress, rng)
            for step, choice, (x, y) in zip(block, drawn, batches):  # block ends first, so that no batch is lost
                lr = cosine_lr(epoch * steps + step, args.epochs * steps, args.lr, args.warm_up)
                trained = [search.macs.argmax(), search.macs.argmin(), choice]
                log[step] = learner.train(x, y, tuple(search.configs[i] for i in trained), lr)
                np.add.at(counts, trained, 1)
            sampler.update(drawn, log[block.start:block.stop, 0].nan_to_num().tolist())  # waits for the device
        measures = dict(zip(("loss", "train_acc"), log.mean(0).tolist()))
        history.append(log_epoch(epoch, args.epochs, args, measures, began, steps, search.label))
        save_checkpoint(search.checkpoint, {"history": history, "counts": counts.tolist(), "pools": sampler.pools,
                                            "learner": learner.state_dict(), "args": search.settings})

    found = finish_search(search, args, [learner], history, [{"steps": count} for count in counts.tolist()])
    # ---- the best of each pool, or of a class that was never drawn, as a network of its own -------------------------
    scores = {tuple(r["config"]): r["val_acc"] for r in found["results"]}
    batches = training_batches(*search.training, args.batch_size, args.device, derive_seed("calibration", args.seed))
    feed, budgets = [x for _, (x, _) in zip(range(8), batches)], []
    for pool, members in zip(sampler.pools, sampler.classes):
        best = max(pool or members, key=lambda i: scores[search.configs[i]])
        network = make_network(args, len(search.classes))
        extract_network(learner.network.state_dict(), search.configs[best], feed, network)
        score = Learner(network, args.device, args.amp).score
        calibrated = evaluate(score, search.scoring, network.config, args.device)
        budgets.append({"budget": int(max(search.macs[members])), **search.fields[best],
                        "val_acc": scores[network.config], "calibrated_val_acc": round(calibrated, 6)})
    print_table([*budgets[0]], [[*row.values()] for row in budgets])
    save_json(args.out / f"{search.name}.json", {**found, "budgets": budgets})


if __name__ == "__main__":
    run_main(main)
