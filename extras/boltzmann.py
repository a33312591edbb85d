"""Boltzmann sampling: a SuperNet that trains more often what scored well, a baseline of the paper.

    python -m extras.boltzmann                         # CIFAR-10, 100 epochs
    python -m extras.boltzmann --dataset synthetic     # a minute or two on a laptop
    torchrun --nproc_per_node=3 -m extras.boltzmann    # seeds 0, 1 and 2, each on the GPU of its number

Each step draws a configuration in proportion to exp(R / T), takes one SGD step through it, and scores it on one batch
of the other half of the images. R is the running mean of a configuration's scores; the temperature T falls
exponentially from 0.7 to 0.01 over the run. Scoring makes a step cost 1.33 steps of search_supernet.py, and with what
is drawn 1.2 to 1.7.

Paper: Javan, Toews, Pedersoli, AutoML 2023, arXiv 2306.11982, table 2, without code or constants: the temperatures and
the running mean are ours. Writes boltzmann.json and .pt; another seed than 0 writes boltzmann-seed1.json and so on.
"""
import time

import numpy as np
import torch

from common import cosine_lr, derive_seed, log_epoch, parse, run_main, save_checkpoint, training_batches
from search_supernet import begin_search, finish_search, make_learner

BLOCK = 36  # steps between two updates of R: one wait for the device instead of 36


class Boltzmann:
    """Draws by softmax(R / T). visits: how often each of n configurations was drawn; means: its R, None at first."""

    def __init__(self, n):
        self.visits, self.means = [0] * n, [None] * n

    def probabilities(self, temperature):
        """How likely each configuration is drawn, (n,). Those that were never drawn come first."""
        new = np.array(self.visits) == 0
        if new.any():
            return new / new.sum()
        logits = np.array([mean or 0.0 for mean in self.means]) / temperature
        weights = np.exp(logits - logits.max())
        return weights / weights.sum()

    def draw(self, steps, progress, rng):
        """Draw configurations for the next steps, a list of indices. progress: 0..1 of the run."""
        drawn = []
        for _ in range(steps):
            p = self.probabilities(0.7 * (0.01 / 0.7) ** progress)
            drawn.append(int(rng.choice(len(p), p=p)))
            self.visits[drawn[-1]] += 1  # before its reward is known, so that the first block draws each once
        return drawn

    def update(self, drawn, rewards):
        """Record the scores, fractions, of what was drawn, in the order of the steps."""
        for i, reward in zip(drawn, rewards):
            self.means[i] = reward if self.means[i] is None else 0.9 * self.means[i] + 0.1 * reward


def main():
    args = parse(__doc__, synthetic_epochs=24)
    search = begin_search(args, "boltzmann")
    learner = make_learner(search, args)
    sampler = Boltzmann(len(search.configs))
    history, steps = [], search.steps
    if search.state:
        learner.load_state_dict(search.state["learner"])
        history, sampler.visits, sampler.means = (search.state[key] for key in ("history", "visits", "means"))

    for epoch in range(len(history), args.epochs):
        began = time.monotonic()
        log = torch.zeros(steps, 3, device=args.device)  # loss and accuracy of each step, and that of scoring
        rng = np.random.default_rng(derive_seed("draw", args.seed, epoch))
        train_batches, score_batches = (
            training_batches(*half, args.batch_size, args.device, derive_seed(name, args.seed, epoch), augment)
            for half, name, augment in ((search.training, "order", True), (search.scoring, "scoring order", False)))
        for start in range(0, steps, BLOCK):
            block = range(start, min(start + BLOCK, steps))
            drawn = sampler.draw(len(block), (epoch * steps + start) / (args.epochs * steps), rng)
            for step, choice, (x, y), scored in zip(block, drawn, train_batches, score_batches):  # block ends first
                lr = cosine_lr(epoch * steps + step, args.epochs * steps, args.lr, args.warm_up)
                log[step, :2] = learner.train(x, y, search.configs[choice], lr)
                log[step, 2] = learner.score(*scored, search.configs[choice])
            sampler.update(drawn, log[block.start:block.stop, 2].tolist())  # waits for the device
        measures = dict(zip(("loss", "train_acc"), log.mean(0).tolist()))
        history.append(log_epoch(epoch, args.epochs, args, measures, began, steps, search.label))
        save_checkpoint(search.checkpoint, {"history": history, "visits": sampler.visits, "means": sampler.means,
                                            "learner": learner.state_dict(), "args": search.settings})
    finish_search(search, args, [learner], history, [{"steps": visits} for visits in sampler.visits])


if __name__ == "__main__":
    run_main(main)
