"""A supervised cross-path mean teacher: two configurations learn from each other through a teacher.

    python -m extras.cross_path                        # CIFAR-10, 100 epochs
    python -m extras.cross_path --dataset synthetic    # made-up images: a few minutes on a laptop
    torchrun --nproc_per_node=3 -m extras.cross_path   # seeds 0, 1, 2, each on a GPU of its own

The teacher is a second SuperNet, whose weights are a running mean of the weights that train. Each
step draws two configurations and augments each image twice, on one half of the training images.
Each configuration learns the labels on its own view of an image. It also learns what the teacher
says through the other configuration on the other view. At the end every configuration is scored
with the shared weights, not with the teacher's, on the other half.

A step costs 2.67 steps of search_supernet.py.

After Pi-NAS (Peng et al., ICCV 2021, arXiv 2108.09671), from which it has the crossing and the
teacher. It is no Pi-NAS, which learns without labels: here labels take the place of its negatives.
Weights and rates are ours. Writes cross_path.json, and the weights to cross_path.pt. With another
seed than 0 the names end with -seed1 and so on.
"""
import copy
import time
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from common import (Learner, begin_search, cosine_lr, crop_and_flip, derive_seed, finish_search,
                    log_epoch, make_learner, normalise, parse, run_main, save_checkpoint)


class CrossPathLearner(Learner):
    """A Learner that trains two configurations at once on two views of each image, with a teacher.

    network, device, amp, weight_decay: as for Learner. steps: of the whole run. The teacher moves
    towards the weights by 0.001 of the way in each step, in runs of fewer than 5,000 steps by 0.01.
    There are too many pairs of configurations for a CUDA graph of each, so it uses none.
    """

    def __init__(self, network, device, amp="off", weight_decay=0.0, steps=5000):
        super().__init__(network, device, amp, weight_decay, graphs=False)
        self.teacher = copy.deepcopy(network).requires_grad_(False)
        self.rate, self.steps, self.taken = 0.001 if steps >= 5000 else 0.01, steps, 0

    def loss(self, x, y, configs):
        """Cross-entropy on the labels + KL(teacher || student), the mean of both configurations.

        KL is the Kullback-Leibler divergence. Its weight rises from 0 to 1 over the first fifth of
        the run. The teacher moves first.

        x: float (2 B, C, S, S), one view of every image, then the other. y: int64 (B,). configs: a
        pair of tuples. Returns the loss, and what is logged of the first configuration, float (2,):
        its cross-entropy and its accuracy.
        """
        logits, targets = [], []
        self.taken += 1
        with torch.no_grad():
            for mine, theirs in zip(self.teacher.parameters(), self.network.parameters()):
                mine.lerp_(theirs, self.rate)
        for view, config in zip(x.chunk(2), configs):
            logits.append(self.network(view, config).float())
            with torch.no_grad():
                targets.append(self.teacher(view, config).float().log_softmax(1))
        one, other = (F.cross_entropy(each, y) for each in logits)
        loss = (one + other) / 2
        weight = min(1.0, 5 * self.taken / self.steps)
        for student, target in zip(logits, reversed(targets)):
            divergence = F.kl_div(student.log_softmax(1), target, reduction="batchmean",
                                  log_target=True)
            loss = loss + weight / 2 * divergence
        accuracy = (logits[0].argmax(1) == y).float().mean()
        return loss, torch.stack([one.detach(), accuracy])

    def state_dict(self):
        """What a checkpoint needs: as of Learner, and the teacher and the number of steps taken."""
        more = {"teacher": self.teacher.state_dict(), "taken": self.taken}
        return super().state_dict() | more

    def load_state_dict(self, state):
        """Go on from a `state_dict`, also one from another kind of device."""
        super().load_state_dict(state)
        self.teacher.load_state_dict(state["teacher"])
        self.taken = state["taken"]


def two_views(images, labels, batch_size, device, seed):
    """Go once over the images in random order, as `training_batches`, with two views of each.

    A view is an image that is padded, cropped and flipped by chance. Yields pairs (x, y) on
    `device`. x: normalised images, float32 (2 B, C, H, W), one view of every image, then the other.
    y: their labels, (B,). The arguments are as for `training_batches`.
    """
    rng = torch.Generator().manual_seed(seed)
    count, pad = len(labels), images.shape[1] // 8
    order = torch.randperm(count, generator=rng)
    top, left = torch.randint(0, 2 * pad + 1, (2, 2, count), generator=rng).to(device)
    flip = (torch.rand(2, count, generator=rng) < 0.5).to(device)
    rows, labels = order.to(images.device), labels[order].to(device)
    for start in range(0, count - batch_size + 1, batch_size):
        batch = slice(start, start + batch_size)
        x = images[rows[batch]].to(device)
        views = [crop_and_flip(x, top[view, batch], left[view, batch], flip[view, batch], pad)
                 for view in (0, 1)]
        yield normalise(torch.cat(views)), labels[batch]


def partner(a, configs, rng):
    """Draw a second configuration for configuration a, uniformly from those far enough from it.

    They are far enough when their poolings are two layers or more apart, all poolings together. In
    a space that is too small for that, they are as far as can be. a: an index. configs: tuples.
    rng: a NumPy Generator. Returns an index.
    """
    positions = np.cumsum(configs, 1)
    apart = np.abs(positions - positions[a]).sum(1)
    return int(rng.choice(np.flatnonzero(apart >= min(2, apart.max()))))


def main():
    args = parse(__doc__, synthetic_epochs=24)
    search = begin_search(args, "cross_path", step_cost=8 / 3)
    history, counts, steps = [], np.zeros(len(search.configs), int), search.steps
    kind = partial(CrossPathLearner, steps=args.epochs * steps)
    learner = make_learner(search, args, kind=kind)
    if search.state:  # go on after the last epoch of a run that was stopped
        learner.load_state_dict(search.state["learner"])
        history, counts = search.state["history"], np.array(search.state["counts"])

    for epoch in range(len(history), args.epochs):
        began = time.monotonic()
        torch.manual_seed(derive_seed("dropout", args.seed, epoch))  # if the network has any
        log = torch.zeros(steps, 2, device=args.device)  # loss and accuracy of the first ones
        # ---- the method: draw two configurations, and take one SGD step through both -------------
        rng = np.random.default_rng(derive_seed("draw", args.seed, epoch))
        drawn = rng.integers(len(search.configs), size=steps)
        batches = two_views(search.training.images, search.training.labels, args.batch_size,
                            args.device, derive_seed("order", args.seed, epoch))
        for step, (a, (x, y)) in enumerate(zip(drawn, batches)):
            b = partner(a, search.configs, rng)
            lr = cosine_lr(epoch * steps + step, args.epochs * steps, args.lr, args.warm_up)
            log[step] = learner.train(x, y, (search.configs[a], search.configs[b]), lr)
            counts[a] += 1
            counts[b] += 1
        # ------------------------------------------------------------------------------------------
        loss, accuracy = log.mean(0).tolist()  # waits for the device, once an epoch
        history.append(log_epoch(epoch, args.epochs, args, {"loss": loss, "train_acc": accuracy},
                                 began, steps, [learner]))
        save_checkpoint(search.checkpoint, {"history": history, "counts": counts.tolist(),
                                            "learner": learner.state_dict(), "args": args.settings})
    finish_search(search, args, [learner], history, [{"steps": count} for count in counts.tolist()])


if __name__ == "__main__":
    run_main(main)
