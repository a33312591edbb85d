"""Stage 3, the balanced mixture of SuperNets: M sets of weights that share out the pooling configurations.

    python search_mixture.py                                 # CIFAR-10: M = 4 models share 100 epochs of steps
    python search_mixture.py --epochs 400                    # 100 for each model, probably the paper's setting
    python search_mixture.py --dataset food101               # Food-101 at 128 pixels, stem of stride 4
    python search_mixture.py --dataset path/to/images        # a folder with train/<class>/* and test/<class>/*
    python search_mixture.py --dataset synthetic             # a few minutes on a laptop
    python search_mixture.py --shared-epochs 30              # small budgets: start all models from one SuperNet
    torchrun --nproc_per_node=2 search_mixture.py            # data-parallel, the same global batch

W (configurations x M) estimates the validation accuracy of configuration a under model m. Each epoch turns it into
balanced probabilities p(m | a); each step draws a uniformly and m from p(m | a), trains model m through a, scores
the pair on one validation batch, and moves W[a, m] towards that score. No earlier stage is needed.

Paper: Javan, Toews, Pedersoli, AutoML 2023, arXiv 2306.11982, section 4. Writes mixture.json, and mixture.pt.
"""
import copy
import time

import numpy as np
import torch

from common import (RANK, WORLD, Learner, ResNet20, average_over_ranks, cosine_lr, default_config, derive_seed,
                    evaluate, from_rank_0, halves, load_checkpoint, log_epoch, open_stage, parse, pooling_configs,
                    print_ranks, print_results, print_table, rank_against_single, result_fields, run_main,
                    save_checkpoint, say, show, steps_per_epoch, training_batches, write_stage)


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
    def options(add):
        add("--models", type=int, default=4, help="M, the sets of weights; default 4")
        add("--shared-epochs", type=int, default=0, help="extension, not in the paper: epochs that train one shared "
            "SuperNet, whose weights then start all models; default 0")
        add("--no-balance", action="store_true", help="leave p(model | configuration) unbalanced, to see what happens")
        add("--all-pairs", action="store_true", help="score each configuration with every model, not with the most "
            "probable one alone; also after a search that has ended")
    ignored = {"limit_test", "all_pairs"}
    with open_stage(parse(__doc__, options, synthetic_epochs=24), "mixture", ignored) as stage:
        search(*stage)


def search(args, data, settings):
    """The search of the paper, section 4, from the arguments to mixture.json."""
    configs, device, checkpoint = pooling_configs(args.layers, args.scales), args.device, args.out / "mixture.pt"
    training, scoring = halves(data.train, args.seed)
    steps = min(steps_per_epoch(half, args.batch_size, WORLD) for half in (training, scoring))
    learners = []
    for m in range(args.models):
        torch.manual_seed(derive_seed("weights", args.seed, m))
        net = ResNet20(data.train.pixels.shape[-1], len(data.classes), args.stem, args.layers, norm="shared")
        learners.append(Learner(net, device, args.amp, args.weight_decay, parallel=WORLD > 1))
    assignment = Assignment(len(configs), args.models)
    history, state = [], from_rank_0(load_checkpoint(checkpoint))
    if state:
        history, assignment.W, assignment.counts = state["history"], state["W"], state["counts"]
        for learner, saved in zip(learners, state["learners"]):
            learner.load_state_dict(saved)
        say(f"going on after epoch {len(history)}")

    # ---- the search -------------------------------------------------------------------------------------------------
    for epoch in range(len(history), args.epochs):
        began, log = time.monotonic(), torch.zeros(2, steps, device=device)  # loss and validation accuracy
        probs = assignment.probabilities(epoch / max(1, args.epochs - 1), not args.no_balance)
        drawn, owners = assignment.draw(probs, steps, derive_seed("draw", args.seed, epoch))
        if epoch < args.shared_epochs:
            owners = np.zeros_like(owners)
        feed = training_batches(training, args.batch_size, device, derive_seed("order", args.seed, epoch),
                                rank=RANK, world=WORLD)
        check = training_batches(scoring, args.batch_size, device, derive_seed("scoring order", args.seed, epoch),
                                 augment=False, rank=RANK, world=WORLD)
        for step, (train_batch, scoring_batch) in enumerate(zip(feed, check)):
            config, learner = configs[drawn[step]], learners[owners[step]]
            lr = cosine_lr(epoch * steps + step, args.epochs * steps, args.lr, args.warm_up)
            log[0, step] = learner.train(*train_batch, config, lr)[0]
            log[1, step] = learner.score(*scoring_batch, config)
        average_over_ranks(log)
        if epoch >= args.shared_epochs:
            assignment.update(drawn, owners, log[1].tolist())
        elif epoch + 1 == args.shared_epochs:
            for learner in learners[1:]:
                learner.load_state_dict(copy.deepcopy(learners[0].state_dict()))
        loss, accuracy = log.mean(1).tolist()
        if RANK == 0:
            history.append(log_epoch(epoch, args, {"loss": loss, "val_acc": accuracy}, began, steps))
            save_checkpoint(checkpoint, {"history": history, "W": assignment.W, "counts": assignment.counts,
                                         "learners": [learner.state_dict() for learner in learners], "args": settings})

    # ---- every configuration on the whole scoring half, with its most probable model ---------------------------------
    began, results, pairs = time.monotonic(), [], []
    probs = assignment.probabilities(1.0, not args.no_balance)
    for config, owner in zip(configs, probs.argmax(1).tolist()):
        asked = range(args.models) if args.all_pairs else [owner]
        scores = {m: round(evaluate(learners[m].model, scoring, config, device, args.amp, args.batch_size), 6)
                  for m in asked}
        results.append({**result_fields(config, data, args), "val_acc": scores[owner], "model": owner})
        pairs.append(list(scores.values()))
    seconds = sum(entry["seconds"] for entry in history) + time.monotonic() - began
    counts = assignment.counts.tolist()
    extra = {"pairs": pairs} if args.all_pairs else {}
    write_stage(args, "mixture", data, settings, results, "val_acc", (len(training), len(scoring), 0), seconds,
                rank=rank_against_single(args, results), configs=[list(config) for config in configs],
                probabilities=[[round(p, 6) for p in row] for row in probs.tolist()],
                W=[[round(w, 6) for w in row] for row in assignment.W.tolist()], trained=counts, history=history,
                **extra)

    say("\np(model | configuration), * where it is the owner, and how often each pair was trained")
    models = range(args.models)
    print_table(["configuration", *(f"model {m}" for m in models), *(f"steps {m}" for m in models)], [
        [show(config), *(f"{p:.2f}{'*' if m == row.argmax() else ' '}" for m, p in enumerate(row)), *trained]
        for config, row, trained in zip(configs, probs, counts)])
    for m in models:
        own = [r["val_acc"] for r in results if r["model"] == m]
        say(f"model {m} owns {len(own)} configurations, mean accuracy {np.mean(own or [0]):.4f}")
    say()
    print_results(results, "val_acc", default_config(args.layers, args.scales))
    print_ranks(args)
    say(f"wrote {args.out / 'mixture.json'}")


if __name__ == "__main__":
    run_main(main)
