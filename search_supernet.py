"""Stage 2, the naive SuperNet (single path one-shot): one set of weights for all configurations.

    python search_supernet.py                            # CIFAR-10, 100 epochs, as in the paper
    python search_supernet.py --sampler cost             # draws in proportion to multiply-adds
    python search_supernet.py --dataset synthetic        # made-up images: a minute on a laptop
    python search_supernet.py --dataset path/to/images   # train/<class>/* and test/<class>/*
    torchrun --nproc_per_node=3 search_supernet.py       # seeds 0, 1, 2, each on a GPU of its own

Each step draws a configuration and takes one SGD step through it, on one half of the training
images. At the end every configuration is scored with the shared weights on the other half.

With uniform draws the scores on CIFAR-10 mostly say how often the layers of a configuration were
trained at its resolutions. Draws by cost are ours, not the paper's. They train expensive
configurations more often, on the guess that these are better. A step then costs 1.32 times as much.

Paper: Javan, Toews, Pedersoli, AutoML 2023, arXiv 2306.11982, section 4; Guo et al., ECCV 2020.
Writes supernet.json, and the weights to supernet.pt. By cost the names are supernet-cost.*, and
with another seed than 0 they end with -seed1 and so on.
"""
import time

import numpy as np
import torch

from common import (add_sampler, begin_search, cosine_lr, derive_seed, draw_probabilities,
                    finish_search, log_epoch, make_learner, parse, run_main, save_checkpoint,
                    training_batches)


def main():
    args = parse(__doc__, add_sampler, synthetic_epochs=24)
    search = begin_search(args, "supernet", "sampler")
    learner = make_learner(search, args)
    probabilities = draw_probabilities(search.macs, args.sampler)
    history, counts, steps = [], np.zeros(len(search.configs), int), search.steps
    if search.state:  # go on after the last epoch of a run that was stopped
        learner.load_state_dict(search.state["learner"])
        history, counts = search.state["history"], np.array(search.state["counts"])

    for epoch in range(len(history), args.epochs):
        began = time.monotonic()
        torch.manual_seed(derive_seed("dropout", args.seed, epoch))  # if the network has any
        log = torch.zeros(steps, 2, device=args.device)  # loss and accuracy of each step
        # ---- the method: draw configurations, and take one SGD step through each -----------------
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
