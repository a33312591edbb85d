"""Stage 3, the balanced mixture of SuperNets: M sets of weights that share out the pooling configurations.

    python search_mixture.py                                 # CIFAR-10, the paper's settings: M = 4, 100 epochs
    python search_mixture.py --dataset food101               # Food-101 at 128 pixels, stem of stride 4
    python search_mixture.py --dataset path/to/images        # a folder with train/<class>/* and test/<class>/*
    python search_mixture.py --dataset synthetic             # minutes on a laptop
    python search_mixture.py --shared-epochs 30              # small budgets: start all models from one SuperNet
    torchrun --nproc_per_node=2 search_mixture.py            # data-parallel, the same global batch

W (configurations x M) estimates the validation accuracy of configuration a under model m. Each epoch turns it into
balanced probabilities p(m | a); each step draws a uniformly and m from p(m | a), trains model m through a, scores
the pair on one validation batch, and moves W[a, m] towards that score. No earlier stage is needed.

Paper: Javan, Toews, Pedersoli, AutoML 2023, arXiv 2306.11982, section 4. Writes mixture.json, and mixture.pt.
"""
import copy

import numpy as np
import torch

from common import (Learner, ResNet20, Run, batches, cosine_lr, derive_seed, evaluate, halves, load_truth, number,
                    parse, print_table, rank_report, run_main, say, shard, show)


def balance(probs, tolerance=1e-8, rounds=10_000):
    """Rescale p(model | configuration) so that every model gets the same share of the configurations.

    probs: float tensor (configurations, M), rows that sum to 1; returns the like: rows sum to 1, columns to
    configurations / M. Alternately divides each column by its share (its mean) and renormalises each row, until
    KL(shares || uniform) < tolerance (paper: 1e-4, section 4; a tighter one costs a few rounds of a small matrix).
    This is Sinkhorn's algorithm. Zeros are lifted to 1e-30 first: a column of zeros could not be scaled.
    Raises ValueError on negative or not finite entries."""
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

    W: float64 (configurations, M), running estimate of validation accuracy, 1 at the start (section 4);
    counts: int64 of the same shape, how often each pair was trained; momentum: of the running estimate."""

    def __init__(self, configs, models, momentum=0.9):
        self.W = torch.ones(configs, models, dtype=torch.float64)
        self.counts = torch.zeros(configs, models, dtype=torch.int64)
        self.momentum = momentum

    def probabilities(self, progress, balanced=True):
        """p(model | configuration) at `progress` 0..1 of the run: the inverse temperature grows from 1 to 100."""
        probs = torch.softmax((1 + 99 * progress) * self.W, dim=1)
        return balance(probs) if balanced else probs

    def draw(self, probs, steps, seed):
        """Draw `steps` pairs: the configuration uniformly, then its model from its row. Two int64 arrays (steps,)."""
        rng = np.random.default_rng(seed)
        configs = rng.integers(0, len(probs), steps)
        edges = probs.cumsum(1).numpy()[configs, :-1]  # without the last edge rounding cannot fall off the end
        return configs, (rng.random((steps, 1)) >= edges).sum(1)

    def update(self, configs, models, accuracies):
        """Record scored steps in their order. p changes once an epoch, so this too can wait for the epoch's end."""
        for a, m, accuracy in zip(configs, models, accuracies):
            self.W[a, m] = self.momentum * self.W[a, m] + (1 - self.momentum) * accuracy
            self.counts[a, m] += 1


def main():
    def options(parser):
        parser.add_argument("--models", type=number(), default=4, help="M, the sets of weights; default 4")
        parser.add_argument("--shared-epochs", type=number(int, 0), default=0, help="extension: epochs that train one "
                            "shared SuperNet, whose weights then start all models; default 0 (paper)")
        parser.add_argument("--no-balance", action="store_true", help="leave p(model | configuration) unbalanced, to "
                            "see what happens: one model takes everything")
    args = parse(__doc__, "search", options)
    truth, against = load_truth(args)
    with Run(args, "mixture", hidden={"limit_test"}) as run:
        search(args, run, truth, against)


def search(args, run, truth, against):
    """The search of the paper, section 4, from the arguments to mixture.json."""
    data, device, configs, models = run.load_data(), run.device, run.configs, args.models
    training, scoring = halves(data.train, args.seed)
    steps = min(run.steps(training), run.steps(scoring))
    learners = []
    for m in range(models):
        torch.manual_seed(derive_seed(args.seed, m))
        net = ResNet20(training.pixels.shape[-1], len(data.classes), run.stem, args.layers, "shared")
        learners.append(Learner(net, device, run.amp, weight_decay=args.weight_decay, parallel=shard()[1] > 1))
    assignment = Assignment(len(configs), models)
    state = run.load() or {"epoch": 0, "step": 0, "history": [], "scores": [], "log": torch.zeros(2, steps)}
    history, scores = state["history"], state["scores"]
    if "learners" in state:
        assignment.W, assignment.counts = state["W"], state["counts"]
        for learner, saved in zip(learners, state["learners"]):
            learner.load_state_dict(saved)

    def snapshot(epoch, step):
        run.agree(log)
        return {"epoch": epoch, "step": step, "history": history, "scores": scores, "log": log.cpu(),
                "W": assignment.W, "counts": assignment.counts, "learners": [x.state_dict() for x in learners]}

    # ---- the search -------------------------------------------------------------------------------------------------
    log = state["log"].to(device)  # loss and validation accuracy of each step, read once an epoch
    for epoch in range(state["epoch"], args.epochs):
        start, shared = state["step"] if epoch == state["epoch"] else 0, epoch < args.shared_epochs
        probs = assignment.probabilities(epoch / max(1, args.epochs - 1), not args.no_balance)
        drawn, owners = assignment.draw(probs, steps, derive_seed(args.seed, epoch, 2))
        if shared:
            owners = np.zeros_like(owners)
        feed = batches(training, args.batch_size, device, derive_seed(args.seed, epoch, 0), True, start, shard())
        check = batches(scoring, args.batch_size, device, derive_seed(args.seed, epoch, 1), False, start, shard())
        for step, (x, y) in enumerate(feed, start):
            config, learner = configs[drawn[step]], learners[owners[step]]
            lr = cosine_lr(epoch * steps + step, args.epochs * steps, args.lr)
            log[0, step], _ = learner.train(x, y, config, lr)
            log[1, step] = learner.score(*next(check), config)
            run.tick(snapshot, epoch, step, steps)
        run.agree(log)
        if not shared:
            assignment.update(drawn, owners, log[1].tolist())
        elif epoch + 1 == args.shared_epochs:
            for learner in learners[1:]:
                learner.load_state_dict(copy.deepcopy(learners[0].state_dict()))
        history.append(run.epoch_line(epoch, steps, {"loss": log[0], "val_acc": log[1]}))
        run.save(snapshot(epoch + 1, 0))

    # ---- every configuration on the whole scoring half, with its most probable model ---------------------------------
    probs = assignment.probabilities(1.0, not args.no_balance)
    for i in range(len(scores), len(configs)):
        m = int(probs[i].argmax())
        accuracy = evaluate(learners[m].model, scoring, configs[i], device, run.amp, args.batch_size)
        scores.append({**run.entry(configs[i], data, "shared"), "val_acc": accuracy, "model": m})
        run.save(snapshot(args.epochs, i + 1))
        run.tick(snapshot, args.epochs, i, len(configs))

    # ---- report -----------------------------------------------------------------------------------------------------
    counts, rank = assignment.counts.tolist(), rank_report(scores, truth, against, args.max_macs)
    run.report(data, scores, "val_acc", (len(training), len(scoring), 0), run.seconds(), args.max_macs,
               rank=rank, configs=[list(c) for c in configs],
               probabilities=[[round(p, 6) for p in row] for row in probs.tolist()],
               W=[[round(w, 6) for w in row] for row in assignment.W.tolist()], trained=counts,
               image_passes=args.epochs * steps * args.batch_size, history=history)
    say("\np(model | configuration), * where it is the owner, and how often each pair was trained")
    print_table(["configuration", *(f"model {m}" for m in range(models)), *(f"steps {m}" for m in range(models))], [
        [show(config), *(f"{p:.2f}{'*' if m == row.argmax() else ' '}" for m, p in enumerate(row)), *counts[i]]
        for i, (config, row) in enumerate(zip(configs, probs))])
    owned = [[r["val_acc"] for r in scores if r["model"] == m] for m in range(models)]
    say("configurations owned, and their mean accuracy: " + ", ".join(
        f"model {m}: {len(own)}" + (f" ({np.mean(own):.4f})" if own else "") for m, own in enumerate(owned)) + "\n")
    run.print_results(scores, "val_acc", rank)


if __name__ == "__main__":
    run_main(main)
