"""A SuperNet that is split on the way: from then on each layer has weights of its own for each resolution.

    python -m extras.split_by_resolution                         # CIFAR-10, 100 epochs, split after 50
    python -m extras.split_by_resolution --split-at 0.8          # later
    python -m extras.split_by_resolution --sampler cost          # draws in proportion to multiply-adds
    python -m extras.split_by_resolution --dataset synthetic     # a minute on a laptop
    torchrun --nproc_per_node=3 -m extras.split_by_resolution    # seeds 0, 1 and 2, each on the GPU of its number

Until then it is the naive SuperNet of search_supernet.py. Then every layer is copied for each resolution at which it
can run, 24 copies in all for 10 layers and 3 resolutions, and momentum begins anew. A step costs the same as before,
but trains fewer of the weights.

After the progressive training of Yang et al., arXiv 2108.05866, who copy the layers of a SuperNet for each width and go
on at a tenth of the rate; here the cosine goes on. Writes split_by_resolution.json and .pt; another seed than 0 writes
split_by_resolution-seed1.json and so on.
"""
import copy
import time

import numpy as np
import torch
import torch.nn as nn

from common import (Learner, UserError, at_least, cosine_lr, derive_seed, log_epoch, parse, run_main, save_checkpoint,
                    training_batches)
from search_supernet import add_sampler, begin_search, draw_probabilities, finish_search, make_learner


class PerResolution(nn.Module):
    """Copies of a layer, one for each resolution, picked by the size of what comes in.

    layer: takes (B, channels, S, S); size: S in pixels at resolution 0, which each resolution after it halves;
    resolutions: the numbers of those at which the layer can run. UserError for larger inputs."""

    def __init__(self, layer, size, resolutions):
        super().__init__()
        self.size = size
        self.copies = nn.ModuleDict({str(r): copy.deepcopy(layer) for r in resolutions})

    def forward(self, x):
        if x.shape[-1] > self.size:
            raise UserError(f"split_by_resolution needs a network that is searched from {self.size} pixels down")
        return self.copies[str((self.size // x.shape[-1]).bit_length() - 1)](x)


def split_by_resolution(network, scales, size):
    """Give each of network.layers, in place, weights of its own for each of `scales` resolutions; all begin equal.

    size: side in pixels at the first of them. Layer 1 runs at the first resolution only, the last layer at the last."""
    layers = len(network.layers)
    for number, layer in enumerate(network.layers):
        resolutions = range(max(0, scales - layers + number), min(scales - 1, number) + 1)
        network.layers[number] = PerResolution(layer, size, resolutions)


def main():
    def options(add):
        add_sampler(add)
        add("--split-at", type=at_least(0, float), default=0.5, help="part of the run, 0 to 1, after which layers are "
            "split; default 0.5")
    args = parse(__doc__, options, synthetic_epochs=24)
    if args.split_at > 1:
        raise UserError(f"--split-at {args.split_at:g}: must be from 0 to 1, a part of the run")
    search = begin_search(args, "split_by_resolution", "sampler", "split_at")
    learner = make_learner(search, args)
    probabilities = draw_probabilities(args.sampler, search.macs)
    history, counts, steps = [], np.zeros(len(search.configs), int), search.steps
    split_epoch = round(args.split_at * args.epochs)

    def split(network):
        """Split the network and begin a new learner, since it has other parameters now."""
        split_by_resolution(network, args.scales, min(32, args.image_size))  # 32 pixels are left by a stem
        return Learner(network, args.device, args.amp, args.weight_decay)
    if search.state:
        history, counts = search.state["history"], np.array(search.state["counts"])
        if len(history) > split_epoch:
            learner = split(learner.network)
        learner.load_state_dict(search.state["learner"])

    for epoch in range(len(history), args.epochs):
        began = time.monotonic()
        if epoch == split_epoch:
            learner = split(learner.network)
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
