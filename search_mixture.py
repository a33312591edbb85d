"""Stage 3, the balanced mixture of SuperNets: M sets of weights that share out the pooling configurations.

    python search_mixture.py                                 # CIFAR-10: M = 4 models, 100 epochs for each
    python search_mixture.py --dataset food101               # Food-101 at 128 pixels, behind a stride of 4
    python search_mixture.py --dataset path/to/images        # a folder with train/<class>/* and test/<class>/*
    python search_mixture.py --dataset synthetic             # a few minutes on a laptop
    python search_mixture.py --sampler cost                  # not in the paper: configurations drawn by their cost
    torchrun --nproc_per_node=3 search_mixture.py            # seeds 0, 1 and 2, each on the GPU of its number

W (configurations x M) estimates the validation accuracy of configuration a under model m. Every 36 steps it becomes
balanced probabilities p(m | a) (the authors do so at each step, with balancing factors of the epoch's start). Each step
draws a uniformly and m from p(m | a), trains model m through a, scores the pair on one validation batch, and moves
W[a, m] towards that score. No earlier stage is needed.

Paper: Javan, Toews, Pedersoli, AutoML 2023, arXiv 2306.11982, section 4. Writes mixture.json and mixture.pt; another
seed than 0 writes mixture-seed1.json and so on.
"""
import time

import numpy as np
import torch

from common import (at_least, config_text, cosine_lr, derive_seed, log_epoch, parse, print_table, run_main,
                    save_checkpoint, say, training_batches)
from search_supernet import add_sampler, begin_search, draw_probabilities, finish_search, make_learner

BLOCK = 36  # steps between two updates of p(m | a): one wait for the device instead of 36


def balance(probs, tolerance=1e-8, rounds=10_000):
    """Rescale p(model | configuration) so that every model gets the same share of the configurations.

    probs: float tensor (configurations, M), rows that sum to 1; returns the like: rows sum to 1, columns nearly to
    configurations / M. Alternately divides each column by its share (its mean) and renormalises each row, until
    KL(shares || uniform) < tolerance (paper: 1e-4, section 4; a tighter one costs a few rounds of a small matrix) or
    for `rounds` rounds. This is Sinkhorn's algorithm. Zeros are lifted to 1e-30 first: a column of zeros could not be
    scaled. Raises ValueError on negative or not finite entries."""
    if not (torch.isfinite(probs).all() and (probs >= 0).all()):
        raise ValueError("probabilities must be finite and not negative")
    p = probs.double().clamp_min(1e-30)
    p = p / p.sum(1, keepdim=True)
    for _ in range(rounds):
        share = p.mean(0)
        if (share * (share * len(share)).log()).sum() < tolerance:
            break
        p = p / share
        p = p / p.sum(1, keepdim=True)
    return p.to(probs.dtype)


class Assignment:
    """The matrix W of the paper: which model trains which configuration.

    W: float64 (configurations, M), running estimate of validation accuracy, 1 at the start (section 4); counts: int64
    of the same shape, how often each pair was trained; momentum: of the running estimate (paper: 0.9). To make one:
    how many configurations and models. Later `configs` and `models` are indices, int (B,), one pair for each step."""

    def __init__(self, configs, models, momentum=0.9):
        self.W = torch.ones(configs, models, dtype=torch.float64)
        self.counts = torch.zeros(configs, models, dtype=torch.int64)
        self.momentum = momentum

    def probabilities(self, progress, balanced=True):
        """p(model | configuration) at `progress` 0..1 of the run: the inverse temperature grows from 1 to 100."""
        probs = torch.softmax((1 + 99 * progress) * self.W, dim=1)
        return balance(probs) if balanced else probs

    def draw(self, probs, configs, rng):
        """Draw a model for each of `configs` from its row of `probs`: int (B,). rng: a NumPy Generator."""
        edges = probs.cumsum(1).numpy()[configs, :-1]  # without the last edge rounding cannot fall off the end
        return (rng.random((len(configs), 1)) >= edges).sum(1)

    def update(self, configs, models, accuracies):
        """Record scored steps in their order. accuracies: (B,), fractions."""
        for a, m, accuracy in zip(configs, models, accuracies):
            self.W[a, m] = self.momentum * self.W[a, m] + (1 - self.momentum) * accuracy
            self.counts[a, m] += 1


def main():
    def options(add):
        add_sampler(add)
        add("--models", type=at_least(1), default=4, help="M, the sets of weights; default 4")
        add("--no-balance", action="store_true", help="leave p(model | configuration) unbalanced, to see what happens")
    args = parse(__doc__, options, synthetic_epochs=8)
    search = begin_search(args, "mixture", "sampler", "models", "no_balance")
    learners = [make_learner(search, args, m) for m in range(args.models)]
    assignment = Assignment(len(search.configs), args.models)
    draws = draw_probabilities(args.sampler, search.macs)
    history, steps, epochs = [], search.steps, args.epochs * args.models  # passes in all
    if search.state:
        history, assignment.W, assignment.counts = (search.state[key] for key in ("history", "W", "counts"))
        for learner, saved in zip(learners, search.state["learners"]):
            learner.load_state_dict(saved)

    say(f"{epochs} epochs in all, {args.epochs} for each of {args.models} models on average")

    for epoch in range(len(history), epochs):
        began = time.monotonic()
        log = torch.zeros(steps, 2, device=args.device)  # loss and validation accuracy
        rng = np.random.default_rng(derive_seed("draw", args.seed, epoch))
        train_batches, score_batches = (
            training_batches(*half, args.batch_size, args.device, derive_seed(name, args.seed, epoch), augment)
            for half, name, augment in ((search.training, "order", True), (search.scoring, "scoring order", False)))
        for start in range(0, steps, BLOCK):
            block = range(start, min(start + BLOCK, steps))
            progress = (epoch * steps + start) / (epochs * steps)
            configs = rng.choice(len(search.configs), len(block), p=draws)
            models = assignment.draw(assignment.probabilities(progress, not args.no_balance), configs, rng)
            # zip asks from left to right and the block ends first, so that no batch is taken and lost at its end
            for step, a, m, (x, y), scored in zip(block, configs, models, train_batches, score_batches):
                lr = cosine_lr(epoch * steps + step, epochs * steps, args.lr, args.warm_up)
                log[step, 0] = learners[m].train(x, y, search.configs[a], lr)[0]
                log[step, 1] = learners[m].score(*scored, search.configs[a])
            assignment.update(configs, models, log[block.start:block.stop, 1].tolist())
        loss, accuracy = log.mean(0).tolist()
        measures = {"loss": loss, "val_acc": accuracy}
        history.append(log_epoch(epoch, epochs, args, measures, began, steps, search.label))
        save_checkpoint(search.checkpoint, {"history": history, "W": assignment.W, "counts": assignment.counts,
                                            "learners": [learner.state_dict() for learner in learners],
                                            "args": search.settings})

    # ---- every configuration is scored with its most probable model, which owns it -----------------------------------
    probs, counts = assignment.probabilities(1.0, not args.no_balance), assignment.counts
    owner = probs.argmax(1).tolist()
    models = range(args.models)
    if counts.double().mean() < 10:
        say(f"each pair of a configuration and a model was trained {counts.double().mean():.1f} times on average, "
            f"which is too few for W to mean anything: raise --epochs")
    else:
        say("\np(model | configuration), * where it is the owner, and how often each pair was trained")
        print_table(["configuration", *(f"model {m}" for m in models), *(f"steps {m}" for m in models)], [
            [config_text(config), *(f"{p:.2f}{'*' if m == own else ' '}" for m, p in enumerate(row)), *trained]
            for config, row, own, trained in zip(search.configs, probs, owner, counts.tolist())])
        say(f"configurations owned by each model: {', '.join(str(owner.count(m)) for m in models)}")
    finish_search(search, args, learners, history,
                  [{"model": own, "steps": sum(trained)} for own, trained in zip(owner, counts.tolist())],
                  configs=[list(config) for config in search.configs], trained=counts.tolist(),
                  probabilities=[[round(p, 6) for p in row] for row in probs.tolist()],
                  W=[[round(w, 6) for w in row] for row in assignment.W.tolist()])


if __name__ == "__main__":
    run_main(main)
