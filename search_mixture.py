"""Stage 3, the balanced mixture of SuperNets: M sets of weights share out the configurations.

    python search_mixture.py                             # CIFAR-10: M = 4 models, 100 epochs each
    python search_mixture.py --dataset food101           # Food-101 at 128 pixels
    python search_mixture.py --dataset path/to/images    # train/<class>/* and test/<class>/*
    python search_mixture.py --dataset synthetic         # made-up images: minutes on a laptop
    python search_mixture.py --sampler cost              # ours: draws by multiply-adds
    torchrun --nproc_per_node=3 search_mixture.py        # seeds 0, 1, 2, each on a GPU of its own

W is a table with a row for each configuration and a column for each model. W[a, m] is a running
estimate of the accuracy of configuration a with the weights of model m, on images that never train.
It starts at 1, so pairs that were not tried yet look promising.

Each step draws a configuration a, then a model m with the probability p(m | a). It trains model m
through a on a training batch, scores the same pair on a batch of the scoring half, and moves
W[a, m] towards that score. Every 36 steps p(m | a) is computed anew from W: a softmax of each row,
sharper as the run goes on, then rescaled so that every model expects equally many configurations.

At the end every configuration is scored with its most probable model on the whole scoring half.

Paper: Javan, Toews, Pedersoli, AutoML 2023, arXiv 2306.11982, section 4. The authors' program
differs in one thing: it computes p(m | a) at each step, but its balancing factors only once, at the
start of each epoch. Writes mixture.json, and the weights to mixture.pt. By cost the names are
mixture-cost.*, and with another seed than 0 they end with -seed1 and so on.
"""
import time

import numpy as np
import torch

from common import (add_sampler, at_least, begin_search, config_text, cosine_lr, derive_seed,
                    draw_probabilities, finish_search, log_epoch, make_learner, parse, print_table,
                    run_main, save_checkpoint, training_batches)

# Steps between two updates of p(m | a); in a space of more configurations it is their number. An
# update must wait for the device, so it is not made at each step.
BLOCK = 36


def balance(probs, tolerance=1e-8, rounds=10_000):
    """Rescale p(model | configuration) so that all models get equal shares of the configurations.

    probs: float tensor (configurations, M), each row with the sum 1. The share of a model is the
    mean of its column. Divide each column by its share, then each row by its sum. Repeat until
    KL(shares || uniform) < tolerance, or `rounds` times. This is Sinkhorn's algorithm (paper,
    section 4). The paper's tolerance is 1e-4; a stricter one costs little.

    Returns a tensor like probs, with rows that sum to 1 and columns that nearly sum to
    configurations / M. Zeros count as 1e-30, since no factor could lift a column of zeros. Raises
    ValueError for negative entries and for NaN or infinity.
    """
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
    """The table W of the paper, which tells which model trains which configuration (section 4).

    configs, models: how many there are. momentum: how much of an entry stays when a score is
    recorded (paper: 0.9). W: float64 (configs, models), 1 at the start. counts: int64 of the same
    shape, how often each pair was trained.
    """

    def __init__(self, configs, models, momentum=0.9):
        self.W = torch.ones(configs, models, dtype=torch.float64)
        self.counts = torch.zeros(configs, models, dtype=torch.int64)
        self.momentum = momentum

    def probabilities(self, progress, balanced=True):
        """p(model | configuration), float64 (configs, models).

        progress: the part of the run that is over, 0 to 1. With it the inverse temperature of the
        softmax grows from 1 to 100. balanced: False leaves `balance` out.
        """
        probs = torch.softmax((1 + 99 * progress) * self.W, dim=1)
        return balance(probs) if balanced else probs

    def draw(self, probs, configs, rng):
        """Draw a model for each step from the row of its configuration.

        probs: from `probabilities`. configs: indices, int (B,). rng: a NumPy Generator. Returns the
        indices of the models, int (B,).
        """
        edges = probs.cumsum(1).numpy()[configs, :-1]  # without the last, which is 1
        return (rng.random((len(configs), 1)) >= edges).sum(1)

    def update(self, configs, models, accuracies):
        """Record the scores of steps, in their order. All three are (B,); accuracies are 0 to 1."""
        for a, m, accuracy in zip(configs, models, accuracies):
            self.W[a, m] = self.momentum * self.W[a, m] + (1 - self.momentum) * accuracy
            self.counts[a, m] += 1


def main():
    def options(add):
        add_sampler(add)
        add("--models", type=at_least(1), default=4, help="M, the sets of weights; default 4")
        add("--no-balance", action="store_true", help="leave out balancing, to see what happens")
    args = parse(__doc__, options, synthetic_epochs=24)
    search = begin_search(args, "mixture", "sampler", "models", "no_balance",
                          step_cost=4 / 3)  # a score takes a third of a training step
    learners = [make_learner(search, args, m) for m in range(args.models)]  # first weights differ
    assignment, balanced = Assignment(len(search.configs), args.models), not args.no_balance
    draws = draw_probabilities(search.macs, args.sampler)
    history, steps = [], search.steps
    epochs = args.epochs * args.models  # passes over the images; each batch trains one model
    size = max(BLOCK, len(search.configs))  # of a block of steps
    if search.state:  # go on after the last epoch of a run that was stopped
        history = search.state["history"]
        assignment.W, assignment.counts = search.state["W"], search.state["counts"]
        for learner, saved in zip(learners, search.state["learners"]):
            learner.load_state_dict(saved)
    print(f"{epochs} epochs in all, {args.epochs} for each of {args.models} models on average")

    for epoch in range(len(history), epochs):
        began = time.monotonic()
        torch.manual_seed(derive_seed("dropout", args.seed, epoch))  # if the network has any
        log = torch.zeros(steps, 2, device=args.device)  # training loss and score of each step
        rng = np.random.default_rng(derive_seed("draw", args.seed, epoch))
        train_batches = training_batches(
            search.training.images, search.training.labels, args.batch_size, args.device,
            derive_seed("order", args.seed, epoch))
        score_batches = training_batches(
            search.scoring.images, search.scoring.labels, args.batch_size, args.device,
            derive_seed("scoring order", args.seed, epoch), augment=False)
        # ---- the method: draw pairs, train each, score each, and record the scores in W ----------
        for start in range(0, steps, size):
            block = range(start, min(start + size, steps))
            progress = (epoch * steps + start) / (epochs * steps)
            configs = rng.choice(len(search.configs), len(block), p=draws)
            models = assignment.draw(assignment.probabilities(progress, balanced), configs, rng)
            # `block` stands first: zip then stops before it takes a batch of the next block
            pairs = zip(block, configs, models, train_batches, score_batches)
            for step, a, m, (x, y), (score_x, score_y) in pairs:
                config = search.configs[a]
                lr = cosine_lr(epoch * steps + step, epochs * steps, args.lr, args.warm_up)
                log[step, 0] = learners[m].train(x, y, config, lr)[0]
                log[step, 1] = learners[m].score(score_x, score_y, config).float().mean()
            assignment.update(configs, models, log[block.start:block.stop, 1].tolist())
        # ------------------------------------------------------------------------------------------
        loss, accuracy = log.mean(0).tolist()
        history.append(log_epoch(epoch, epochs, args, {"loss": loss, "val_acc": accuracy}, began,
                                 steps, learners))
        save_checkpoint(search.checkpoint, {
            "history": history, "W": assignment.W, "counts": assignment.counts,
            "learners": [learner.state_dict() for learner in learners], "args": args.settings})

    # ---- the most probable model of a configuration owns it, and scores it -----------------------
    probs = assignment.probabilities(1.0, balanced)
    owners, counts = probs.argmax(1).tolist(), assignment.counts.tolist()
    show_assignment(search.configs, probs, owners, counts)
    own_keys = [{"model": owner, "steps": sum(row)} for owner, row in zip(owners, counts)]
    finish_search(search, args, learners, history, own_keys, trained=counts,
                  configs=[list(config) for config in search.configs],
                  probabilities=[[round(p, 6) for p in row] for row in probs.tolist()],
                  W=[[round(w, 6) for w in row] for row in assignment.W.tolist()])


def show_assignment(configs, probs, owners, counts):
    """Print p(m | a) with a star at its owner, and how often each pair was trained."""
    models = range(len(counts[0]))
    mean = np.mean(counts)
    if mean < 10:
        print(f"each pair of a configuration and a model was trained {mean:.1f} times on average, "
              f"which is too few for W to mean anything: raise --epochs")
        return
    rows, shown = [], 60  # more would not fit on a screen; all are in the JSON
    for config, row, owner, trained in zip(configs[:shown], probs.tolist(), owners, counts):
        cells = [f"{p:.2f}{'*' if m == owner else ' '}" for m, p in enumerate(row)]
        rows.append([config_text(config), *cells, *trained])
    print("\np(model | configuration), * marks the owner, and how often each pair was trained")
    print_table(["configuration", *(f"model {m}" for m in models), *(f"steps {m}" for m in models)],
                rows)
    if len(configs) > shown:
        print(f"... and {len(configs) - shown} more, in the JSON")
    owned = ", ".join(str(owners.count(m)) for m in models)
    print(f"configurations owned by each model: {owned}")


if __name__ == "__main__":
    run_main(main)
