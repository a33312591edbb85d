"""A supervised cross-path mean teacher: two paths learn from each other through a running mean of the weights.

    python -m extras.cross_path                         # CIFAR-10, 100 epochs
    python -m extras.cross_path --dataset synthetic     # a few minutes on a laptop
    torchrun --nproc_per_node=3 -m extras.cross_path    # seeds 0, 1 and 2, each on the GPU of its number

Each step draws two configurations and augments each image twice. Each path learns the labels on its own view, and from
what a teacher says through the other path on the other view. A step costs 2.67 steps of search_supernet.py.

After Pi-NAS (Peng et al., ICCV 2021, arXiv 2108.09671), from which it has the crossing and the teacher. It is no
Pi-NAS, which learns without labels: here labels take the place of its negatives. Weights and rates are ours. Writes
cross_path.json and .pt; another seed than 0 writes cross_path-seed1.json and so on.
"""
import copy
import time
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from common import (Learner, cosine_lr, crop_and_flip, derive_seed, log_epoch, normalise, parse, run_main,
                    save_checkpoint)
from search_supernet import begin_search, finish_search, make_learner


class CrossPathLearner(Learner):
    """A Learner for pairs of configurations and two views of each image, with a teacher in its state.

    x: (2 B, C, S, S), the two views one after the other; y: (B,). The teacher is a running mean of the weights, at
    a rate of 0.001 (0.01 in runs below 5,000 steps); its part of the loss, KL(teacher || student), rises from 0 to its
    full weight over the first fifth of `steps`. Steps are eager: there are too many pairs for a CUDA graph of each."""

    def __init__(self, network, device, amp="off", weight_decay=0.0, steps=5000):
        super().__init__(network, device, amp, weight_decay, graphs=False)
        self.teacher = copy.deepcopy(network).requires_grad_(False)
        self.rate, self.steps, self.taken = 0.001 if steps >= 5000 else 0.01, steps, 0

    def loss(self, x, y, path):
        views, logits, targets = x.chunk(2), [], []
        self.taken += 1
        with torch.no_grad():
            for mine, theirs in zip(self.teacher.parameters(), self.network.parameters()):
                mine.lerp_(theirs, self.rate)
        for view, config in zip(views, path):
            logits.append(self.network(view, config).float())
            with torch.no_grad():
                targets.append(self.teacher(view, config).float().log_softmax(1))
        loss = sum(F.cross_entropy(each, y) for each in logits) / 2
        for student, target in zip(logits, reversed(targets)):
            divergence = F.kl_div(student.log_softmax(1), target, reduction="batchmean", log_target=True)
            loss = loss + min(1.0, 5 * self.taken / self.steps) / 2 * divergence
        return loss, logits[0]

    def state_dict(self):
        return super().state_dict() | {"teacher": self.teacher.state_dict(), "taken": self.taken}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.teacher.load_state_dict(state["teacher"])
        self.taken = state["taken"]


def two_views(images, labels, batch_size, device, seed):
    """Like `training_batches`, but each image twice, augmented independently: (float32 (2 B, C, H, W), int64 (B,))."""
    rng = torch.Generator().manual_seed(seed)
    count, pad = len(labels), images.shape[1] // 8
    order = torch.randperm(count, generator=rng)
    top, left = torch.randint(0, 2 * pad + 1, (2, 2, count), generator=rng).to(device)
    flip = (torch.rand(2, count, generator=rng) < 0.5).to(device)
    rows, labels = order.to(images.device), labels[order].to(device)
    for start in range(0, count - batch_size + 1, batch_size):
        batch = slice(start, start + batch_size)
        x = images[rows[batch]].to(device)
        views = [crop_and_flip(x, top[view, batch], left[view, batch], flip[view, batch], pad) for view in (0, 1)]
        yield normalise(torch.cat(views)), labels[batch]


def partner(choice, configs, rng):
    """A second path for the first, an index, drawn uniformly where the poolings are two layers or more apart."""
    positions = np.cumsum(configs, 1)
    apart = np.abs(positions - positions[choice]).sum(1)
    return int(rng.choice(np.flatnonzero(apart >= min(2, apart.max()))))


def main():
    args = parse(__doc__, synthetic_epochs=24)
    search = begin_search(args, "cross_path")
    history, counts, steps = [], np.zeros(len(search.configs), int), search.steps
    learner = make_learner(search, args, kind=partial(CrossPathLearner, steps=args.epochs * steps))
    if search.state:
        learner.load_state_dict(search.state["learner"])
        history, counts = search.state["history"], np.array(search.state["counts"])

    for epoch in range(len(history), args.epochs):
        began = time.monotonic()
        log = torch.zeros(steps, 2, device=args.device)  # loss and accuracy of the first path, read once an epoch
        rng = np.random.default_rng(derive_seed("draw", args.seed, epoch))
        drawn = rng.integers(len(search.configs), size=steps)
        batches = two_views(*search.training, args.batch_size, args.device, derive_seed("order", args.seed, epoch))
        for step, (one, (x, y)) in enumerate(zip(drawn, batches)):
            other = partner(one, search.configs, rng)
            lr = cosine_lr(epoch * steps + step, args.epochs * steps, args.lr, args.warm_up)
            log[step] = learner.train(x, y, (search.configs[one], search.configs[other]), lr)
            np.add.at(counts, [one, other], 1)
        loss, accuracy = log.mean(0).tolist()  # waits for the device
        measures = {"loss": loss, "train_acc": accuracy}
        history.append(log_epoch(epoch, args.epochs, args, measures, began, steps, search.label))
        save_checkpoint(search.checkpoint, {"history": history, "counts": counts.tolist(),
                                            "learner": learner.state_dict(), "args": search.settings})
    finish_search(search, args, [learner], history, [{"steps": int(count)} for count in counts])


if __name__ == "__main__":
    run_main(main)
