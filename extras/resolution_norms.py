"""A SuperNet whose norms learn a scale and a shift for each resolution. All else is shared.

    python -m extras.resolution_norms                        # CIFAR-10, uniform draws, 100 epochs
    python -m extras.resolution_norms --sampler cost         # draws by multiply-adds
    python -m extras.resolution_norms --dataset synthetic    # made-up images: a minute on a laptop
    torchrun --nproc_per_node=3 -m extras.resolution_norms   # seeds 0, 1, 2, each on its own GPU

Each step draws a configuration and takes one SGD step through it, on one half of the training
images. At the end every configuration is scored with the shared weights on the other half.

A layer of a SuperNet sees its input at several resolutions, with one set of weights and a norm that
learns nothing. Here each norm has one scale and one shift for each resolution. The statistics are
still those of the batch. A step costs as much as in search_supernet.py. For the same seed the first
weights, the draws and the batches are the same too, so that the two can be compared in pairs.

This is ours, and not in the paper. It follows the switchable batch normalisation of slimmable
networks, which have one for each width (Yu et al., ICLR 2019, arXiv 1812.08928, section 3). Writes
resolution_norms.json, and the weights to resolution_norms.pt. By cost the names are
resolution_norms-cost.*, and with another seed than 0 they end with -seed1 and so on.
"""
import time
from functools import partial

import numpy as np
import torch
import torch.nn as nn

from common import (UserError, add_sampler, begin_search, cosine_lr, derive_seed,
                    draw_probabilities, finish_search, log_epoch, make_learner, parse, run_main,
                    save_checkpoint, training_batches)


class ResolutionNorm(nn.ModuleList):
    """Batch normalisation by the statistics of the batch, with a scale and a shift per resolution.

    forward(x) takes float (B, channels, S, S) and returns the same shape. The size of x tells its
    resolution. Those of other resolutions get no gradient at all, so that neither momentum nor
    weight decay moves them in a step.

    channels: of x. size: S in pixels at resolution 0; each further resolution has half of it.
    scales: the number of resolutions. Another size raises UserError.
    """

    def __init__(self, channels, size=32, scales=3):
        super().__init__(nn.BatchNorm2d(channels, track_running_stats=False) for _ in range(scales))
        self.size = size

    def forward(self, x):
        resolution = (self.size // x.shape[-1]).bit_length() - 1
        if not 0 <= resolution < len(self):
            raise UserError(f"resolution_norms needs a network whose first resolution has "
                            f"{self.size} pixels")
        return self[resolution](x)


def main():
    args = parse(__doc__, add_sampler, synthetic_epochs=24)
    search = begin_search(args, "resolution_norms", "sampler")
    size = min(32, args.image_size)  # a stem has brought larger images to 32 pixels
    norm = partial(ResolutionNorm, size=size, scales=args.scales)
    learner = make_learner(search, args, norm=norm)
    probabilities = draw_probabilities(search.macs, args.sampler)
    history, counts, steps = [], np.zeros(len(search.configs), int), search.steps
    if search.state:  # go on after the last epoch of a run that was stopped
        learner.load_state_dict(search.state["learner"])
        history, counts = search.state["history"], np.array(search.state["counts"])

    for epoch in range(len(history), args.epochs):
        began = time.monotonic()
        torch.manual_seed(derive_seed("dropout", args.seed, epoch))  # if the network has any
        log = torch.zeros(steps, 2, device=args.device)  # loss and accuracy of each step
        # ---- the method: a naive SuperNet, but for its norms -------------------------------------
        rng = np.random.default_rng(derive_seed("draw", args.seed, epoch))
        drawn = rng.choice(len(search.configs), steps, p=probabilities)
        batches = training_batches(search.training.images, search.training.labels, args.batch_size,
                                   args.device, derive_seed("order", args.seed, epoch))
        for step, (a, (x, y)) in enumerate(zip(drawn, batches)):
            lr = cosine_lr(epoch * steps + step, args.epochs * steps, args.lr, args.warm_up)
            log[step] = learner.train(x, y, search.configs[a], lr)
            counts[a] += 1
        # ------------------------------------------------------------------------------------------
        loss, accuracy = log.mean(0).tolist()  # waits for the device, once an epoch
        history.append(log_epoch(epoch, args.epochs, args, {"loss": loss, "train_acc": accuracy},
                                 began, steps, [learner]))
        save_checkpoint(search.checkpoint, {"history": history, "counts": counts.tolist(),
                                            "learner": learner.state_dict(), "args": args.settings})
    finish_search(search, args, [learner], history, [{"steps": count} for count in counts.tolist()])


if __name__ == "__main__":
    run_main(main)
