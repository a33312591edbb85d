"""A SuperNet that is split on the way: each layer then has its own weights for each resolution.

    python -m extras.split_by_resolution                        # CIFAR-10, split after 50 epochs
    python -m extras.split_by_resolution --split-at 0.8         # later
    python -m extras.split_by_resolution --sampler cost         # draws by multiply-adds
    python -m extras.split_by_resolution --dataset synthetic    # made-up images: a minute
    torchrun --nproc_per_node=3 -m extras.split_by_resolution   # seeds 0, 1, 2, each on its own GPU

Each step draws a configuration and takes one SGD step through it, on one half of the training
images. At the end every configuration is scored on the other half. Until the split that is the
naive SuperNet of search_supernet.py. Then every layer is copied for each resolution at which it can
run: 24 copies in all for 10 layers and 3 resolutions. Momentum begins anew. A step costs the same
as before, but trains fewer of the weights.

After the progressive training of Yang et al., arXiv 2108.05866, who copy the layers of a SuperNet
for each width, and go on at a tenth of the rate. Here the cosine goes on. Writes
split_by_resolution.json, and the weights to split_by_resolution.pt. By cost the names are
split_by_resolution-cost.*, and with another seed than 0 they end with -seed1 and so on.
"""
import copy
import time

import numpy as np
import torch
import torch.nn as nn

from common import (Learner, UserError, add_sampler, at_least, begin_search, cosine_lr, derive_seed,
                    draw_probabilities, finish_search, log_epoch, make_learner, parse, run_main,
                    save_checkpoint, training_batches)


class PerResolution(nn.Module):
    """Copies of a layer, one for each resolution. The size of its input tells which one runs.

    forward(x) takes float (B, channels, S, S) and returns what the layer returns. layer: the module
    to copy. size: S in pixels at resolution 0; each further resolution has half of it. resolutions:
    the numbers of those at which the layer can run. Another size raises UserError.
    """

    def __init__(self, layer, size, resolutions):
        super().__init__()
        self.size = size
        self.copies = nn.ModuleDict({str(r): copy.deepcopy(layer) for r in resolutions})

    def forward(self, x):
        resolution = str((self.size // x.shape[-1]).bit_length() - 1)
        if resolution not in self.copies:
            raise UserError(f"split_by_resolution needs a network whose first resolution has "
                            f"{self.size} pixels")
        return self.copies[resolution](x)


def split_by_resolution(network, scales, size):
    """Give each layer its own weights for each resolution, in place. All copies begin equal.

    network: has its layers in `layers`. The first layer runs at the first resolution only, the last
    layer at the last. scales: the number of resolutions. size: the side at the first one, pixels.
    """
    layers = len(network.layers)
    for number, layer in enumerate(network.layers):
        resolutions = range(max(0, scales - layers + number), min(scales - 1, number) + 1)
        network.layers[number] = PerResolution(layer, size, resolutions)


def split_learner(learner, args):
    """Split the network of a Learner, in place. Returns a new Learner, for it has new weights."""
    size = min(32, args.image_size)  # a stem has brought larger images to 32 pixels
    split_by_resolution(learner.network, args.scales, size)
    return Learner(learner.network, args.device, args.amp, args.weight_decay)


def main():
    def options(add):
        add_sampler(add)
        add("--split-at", type=at_least(0, float), default=0.5, help="part of the run, 0 to 1, "
            "after which the layers are split; default 0.5")
    args = parse(__doc__, options, synthetic_epochs=24)
    if args.split_at > 1:
        raise UserError(f"--split-at {args.split_at:g}: must be from 0 to 1, a part of the run")
    search = begin_search(args, "split_by_resolution", "sampler", "split_at")
    learner = make_learner(search, args)
    if not hasattr(learner.network, "layers"):  # says so now, and not after half of the run
        raise UserError("split_by_resolution needs a network that has its layers in `layers`")
    probabilities = draw_probabilities(search.macs, args.sampler)
    history, counts, steps = [], np.zeros(len(search.configs), int), search.steps
    split_epoch = round(args.split_at * args.epochs)
    if search.state:  # go on after the last epoch of a run that was stopped
        history, counts = search.state["history"], np.array(search.state["counts"])
        if len(history) > split_epoch:
            learner = split_learner(learner, args)
        learner.load_state_dict(search.state["learner"])

    for epoch in range(len(history), args.epochs):
        began = time.monotonic()
        torch.manual_seed(derive_seed("dropout", args.seed, epoch))  # if the network has any
        log = torch.zeros(steps, 2, device=args.device)  # loss and accuracy of each step
        # ---- the method: a naive SuperNet, whose layers are split after a part of the run --------
        if epoch == split_epoch:
            learner = split_learner(learner, args)
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
