"""A SuperNet whose norms learn a scale and a shift for each resolution: shared weights, but norms of their own.

    python -m extras.resolution_norms                         # CIFAR-10, uniform draws, 100 epochs
    python -m extras.resolution_norms --sampler cost          # draws in proportion to multiply-adds
    python -m extras.resolution_norms --dataset synthetic     # a minute on a laptop
    torchrun --nproc_per_node=3 -m extras.resolution_norms    # seeds 0, 1 and 2, each on the GPU of its number

A layer of a SuperNet sees its input at several resolutions, with one set of weights and a norm that learns nothing.
Here each norm has one scale and one shift for each resolution. The statistics are still those of the batch. A step
costs as much as in search_supernet.py, and first weights, draws and batches are the same for the same seed, so that
the two can be compared in pairs.

Ours, after the switchable batch normalisation of slimmable networks, which have one for each width (Yu et al., ICLR
2019, arXiv 1812.08928, section 3). It is not in the paper that this project reproduces. Writes resolution_norms.json
and .pt; another seed than 0 writes resolution_norms-seed1.json and so on.
"""
import time
from functools import partial

import numpy as np
import torch
import torch.nn as nn

from common import (UserError, cosine_lr, derive_seed, log_epoch, parse, run_main, save_checkpoint,
                    training_batches)
from search_supernet import add_sampler, begin_search, draw_probabilities, finish_search, make_learner


class ResolutionNorm(nn.ModuleList):
    """Batch normalisation with a learned scale and shift for each resolution, by the statistics of the batch.

    (B, channels, S, S) to the same shape. size: S in pixels at resolution 0, which each resolution after it halves;
    scales: how many there are. A step leaves those of other resolutions alone: they get no gradient at all, so neither
    momentum nor weight decay moves them. UserError for larger inputs."""

    def __init__(self, channels, size=32, scales=3):
        super().__init__(nn.BatchNorm2d(channels, track_running_stats=False) for _ in range(scales))
        self.size = size

    def forward(self, x):
        if x.shape[-1] > self.size:
            raise UserError(f"resolution_norms needs a network that is searched from {self.size} pixels down")
        return self[(self.size // x.shape[-1]).bit_length() - 1](x)


def main():
    args = parse(__doc__, add_sampler, synthetic_epochs=24)
    search = begin_search(args, "resolution_norms", "sampler")
    size = min(32, args.image_size)  # of the first searched layer; the stem of larger images has come down to it too
    learner = make_learner(search, args, norm=partial(ResolutionNorm, size=size, scales=args.scales))
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


if __name__ == "__main__":
    run_main(main)
