"""A baseline of the paper: a SuperNet that trains more often what scored well (Boltzmann sampling).

    python -m extras.boltzmann                        # CIFAR-10, 100 epochs
    python -m extras.boltzmann --dataset synthetic    # made-up images: a minute or two on a laptop
    torchrun --nproc_per_node=3 -m extras.boltzmann   # seeds 0, 1, 2, each on a GPU of its own

Each step draws a configuration, with probabilities in proportion to exp(R / T). It takes one SGD
step through it, on one half of the training images, and scores it on one batch of the other half.
R is the running mean of the scores of a configuration. The temperature T falls exponentially from
0.7 to 0.01 over the run. At the end every configuration is scored with the shared weights on that
whole other half.

Scoring alone makes a step cost 1.33 steps of search_supernet.py, with what is drawn 1.2 to 1.7.

Paper: Javan, Toews, Pedersoli, AutoML 2023, arXiv 2306.11982, table 2. It gives neither code nor
constants: the temperatures and the running mean are ours. Writes boltzmann.json, and the weights to
boltzmann.pt. With another seed than 0 the names end with -seed1 and so on.
"""
import time

import numpy as np
import torch

from common import (begin_search, cosine_lr, derive_seed, finish_search, log_epoch, make_learner,
                    parse, run_main, save_checkpoint, training_batches)

BLOCK = 36  # steps between two updates of R; each update waits for the device


class Boltzmann:
    """Draws configurations, given by their index, by softmax(R / T).

    n: the number of configurations. visits: how often each was drawn, a list of n integers. means:
    R, a list of n running means that keep 0.9; None where nothing is scored yet.
    """

    def __init__(self, n):
        self.visits, self.means = [0] * n, [None] * n

    def probabilities(self, temperature):
        """How likely each configuration is drawn: a float array (n,) with the sum 1.

        Configurations that were never drawn come first, all equally likely.
        """
        new = np.array(self.visits) == 0
        if new.any():
            return new / new.sum()
        logits = np.array([mean or 0.0 for mean in self.means]) / temperature
        weights = np.exp(logits - logits.max())
        return weights / weights.sum()

    def draw(self, steps, progress, rng):
        """Draw configurations for the next steps. Returns a list of `steps` indices.

        progress: the part of the run that is over, 0 to 1. rng: a NumPy Generator. A visit counts
        before its score is known, so that the first steps draw each configuration once.
        """
        drawn = []
        for _ in range(steps):
            p = self.probabilities(0.7 * (0.01 / 0.7) ** progress)
            drawn.append(int(rng.choice(len(p), p=p)))
            self.visits[drawn[-1]] += 1
        return drawn

    def update(self, drawn, scores):
        """Record the scores of what was drawn, in the order of the steps. Both are (B,)."""
        for a, score in zip(drawn, scores):
            mean = self.means[a]
            self.means[a] = score if mean is None else 0.9 * mean + 0.1 * score


def main():
    args = parse(__doc__, synthetic_epochs=24)
    search = begin_search(args, "boltzmann", step_cost=4 / 3)
    learner = make_learner(search, args)
    sampler = Boltzmann(len(search.configs))
    history, steps = [], search.steps
    if search.state:  # go on after the last epoch of a run that was stopped
        learner.load_state_dict(search.state["learner"])
        history = search.state["history"]
        sampler.visits, sampler.means = search.state["visits"], search.state["means"]

    for epoch in range(len(history), args.epochs):
        began = time.monotonic()
        torch.manual_seed(derive_seed("dropout", args.seed, epoch))  # if the network has any
        log = torch.zeros(steps, 3, device=args.device)  # loss, accuracy and score of each step
        rng = np.random.default_rng(derive_seed("draw", args.seed, epoch))
        train_batches = training_batches(
            search.training.images, search.training.labels, args.batch_size, args.device,
            derive_seed("order", args.seed, epoch))
        score_batches = training_batches(
            search.scoring.images, search.scoring.labels, args.batch_size, args.device,
            derive_seed("scoring order", args.seed, epoch), augment=False)
        # ---- the method: draw by the scores so far, train, score, and record the scores in R -----
        for start in range(0, steps, BLOCK):
            block = range(start, min(start + BLOCK, steps))
            progress = (epoch * steps + start) / (args.epochs * steps)
            drawn = sampler.draw(len(block), progress, rng)
            # `block` stands first, for zip then takes no batch that the next block would miss
            pairs = zip(block, drawn, train_batches, score_batches)
            for step, a, (x, y), (score_x, score_y) in pairs:
                config = search.configs[a]
                lr = cosine_lr(epoch * steps + step, args.epochs * steps, args.lr, args.warm_up)
                log[step, :2] = learner.train(x, y, config, lr)
                log[step, 2] = learner.score(score_x, score_y, config).float().mean()
            sampler.update(drawn, log[block.start:block.stop, 2].tolist())
        # ------------------------------------------------------------------------------------------
        loss, accuracy, _ = log.mean(0).tolist()
        history.append(log_epoch(epoch, args.epochs, args, {"loss": loss, "train_acc": accuracy},
                                 began, steps, [learner]))
        save_checkpoint(search.checkpoint, {
            "history": history, "visits": sampler.visits, "means": sampler.means,
            "learner": learner.state_dict(), "args": args.settings})
    finish_search(search, args, [learner], history, [{"steps": count} for count in sampler.visits])


if __name__ == "__main__":
    run_main(main)
