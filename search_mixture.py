"""Stage 3, the balanced mixture of SuperNets: M sets of weights that share out the pooling configurations.

    python search_mixture.py                                 # CIFAR-10: M = 4 models share 100 epochs of steps
    python search_mixture.py --epochs 400                    # 100 for each model, probably the paper's setting
    python search_mixture.py --dataset food101               # Food-101 at 128 pixels, stem of stride 4
    python search_mixture.py --dataset path/to/images        # a folder with train/<class>/* and test/<class>/*
    python search_mixture.py --dataset synthetic             # a few minutes on a laptop
    python search_mixture.py --shared-epochs 30              # small budgets: start all models from one SuperNet
    python search_mixture.py --sampler cost                  # not in the paper: configurations drawn by their cost
    torchrun --nproc_per_node=3 search_mixture.py            # seeds 0, 1 and 2, each on the GPU of its number

W (configurations x M) estimates the validation accuracy of configuration a under model m. Once a block of 36 steps it
is turned into balanced probabilities p(m | a) (the authors do so at each step, with balancing factors of the epoch's
start). Each step draws a uniformly and m from p(m | a), trains model m through a, scores the pair on one validation
batch, and moves W[a, m] towards that score. No earlier stage is needed.

Paper: Javan, Toews, Pedersoli, AutoML 2023, arXiv 2306.11982, section 4. Writes mixture.json and mixture.pt; another
seed than 0 writes mixture-seed1.json and so on.
"""
import time

import numpy as np
import torch

from common import (RANK, WORLD, Learner, ResNet20, UserError, cosine_lr, default_config, derive_seed, evaluate, halves,
                    identity, judge, load_checkpoint, load_json, log_epoch, open_stage, parse, pooling_configs,
                    print_rank, print_results, print_table, result_fields, run_main, save_checkpoint, say, show,
                    steps_per_epoch, training_batches, with_seed, write_stage)
from search_supernet import BLOCK, SAMPLERS


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

    W: float64 (configurations, M), running estimate of validation accuracy, 1 at the start (section 4); counts: int64
    of the same shape, how often each pair was trained; momentum: of the running estimate (paper: 0.9)."""

    def __init__(self, configs, models, momentum=0.9):
        self.W = torch.ones(configs, models, dtype=torch.float64)
        self.counts = torch.zeros(configs, models, dtype=torch.int64)
        self.momentum = momentum

    def probabilities(self, progress, balanced=True):
        """p(model | configuration) at `progress` 0..1 of the run: the inverse temperature grows from 1 to 100."""
        probs = torch.softmax((1 + 99 * progress) * self.W, dim=1)
        return balance(probs) if balanced else probs

    def draw(self, probs, configs, rng):
        """Draw a model for each of `configs` (a list of B indices) from its row of p(model | configuration): (B,)."""
        edges = probs.cumsum(1).numpy()[configs, :-1]  # without the last edge rounding cannot fall off the end
        return (rng.random((len(configs), 1)) >= edges).sum(1)

    def update(self, configs, models, accuracies):
        """Record scored steps in their order."""
        for a, m, accuracy in zip(configs, models, accuracies):
            self.W[a, m] = self.momentum * self.W[a, m] + (1 - self.momentum) * accuracy
            self.counts[a, m] += 1


def main():
    def options(add):
        add("--models", type=int, default=4, help="M, the sets of weights; default 4")
        add("--sampler", choices=["uniform", "cost", "fair"], default="uniform", help="how configurations are drawn, "
            "as in search_supernet.py; default uniform (paper)")
        add("--shared-epochs", type=int, default=0, help="extension, not in the paper: epochs that train one shared "
            "SuperNet, whose weights then start all models; default 0")
        add("--no-balance", action="store_true", help="leave p(model | configuration) unbalanced, to see what happens")
        add("--all-pairs", action="store_true", help="score each configuration with every model, not with the most "
            "probable one alone; also after a search that has ended")
    args = parse(__doc__, options, synthetic_epochs=24)
    if args.shared_epochs >= args.epochs:
        raise UserError(f"--shared-epochs {args.shared_epochs}: must be below the {args.epochs} epochs of the run")
    args.seed += RANK
    name = with_seed("mixture", args.seed)
    search(args, *open_stage(args, name, ignore={"limit_test", "all_pairs"}), name)


def search(args, data, settings, name):
    """The search of the paper, section 4, from the arguments to mixture.json."""
    configs = pooling_configs(args.layers, args.scales)
    device = args.device
    checkpoint = args.out / f"{name}.pt"
    fields = [result_fields(config, data, args) for config in configs]
    sampler = SAMPLERS[args.sampler](configs, [entry["macs"] for entry in fields])
    training, scoring = halves(data.train, args.seed)
    steps = steps_per_epoch(training, args.batch_size)
    learners = []
    for m in range(args.models):
        torch.manual_seed(derive_seed("weights", args.seed, m))
        network = ResNet20(classes=len(data.classes), stem=args.stem, layers=args.layers, norm="shared")
        learners.append(Learner(network, device, args.amp, args.weight_decay))
    assignment = Assignment(len(configs), args.models)
    history = []
    state = load_checkpoint(checkpoint)
    if state:
        history, assignment.W, assignment.counts = state["history"], state["W"], state["counts"]
        for learner, saved in zip(learners, state["learners"]):
            learner.load_state_dict(saved)
        say(f"{name} goes on after epoch {len(history)}", every_rank=True)

    # ---- the search -------------------------------------------------------------------------------------------------
    for epoch in range(len(history), args.epochs):
        began = time.monotonic()
        log = torch.zeros(steps, 2, device=device)  # loss and validation accuracy
        rng = np.random.default_rng(derive_seed("draw", args.seed, epoch))
        shared = epoch < args.shared_epochs
        train_batches = training_batches(training, args.batch_size, device, derive_seed("order", args.seed, epoch))
        score_batches = training_batches(scoring, args.batch_size, device,
                                         derive_seed("scoring order", args.seed, epoch), augment=False)
        for start in range(0, steps, BLOCK):
            block = range(start, min(start + BLOCK, steps))
            progress = (epoch * steps + start) / (args.epochs * steps)
            drawn = sampler.draw(len(block), progress, rng)
            owners = assignment.draw(assignment.probabilities(progress, not args.no_balance), drawn, rng)
            if shared:
                owners = np.zeros_like(owners)
            for step, a, m, (x, y), scored in zip(block, drawn, owners, train_batches, score_batches):
                lr = cosine_lr(epoch * steps + step, args.epochs * steps, args.lr, args.warm_up)
                log[step, 0] = learners[m].train(x, y, configs[a], lr)[0]
                log[step, 1] = learners[m].score(*scored, configs[a])
            if not shared:
                assignment.update(drawn, owners, log[block.start:block.stop, 1].tolist())
        if epoch + 1 == args.shared_epochs:
            for learner in learners[1:]:
                learner.load_state_dict(learners[0].state_dict())
        loss, accuracy = log.mean(0).tolist()
        label = f"seed {args.seed}  " if WORLD > 1 else ""
        history.append(log_epoch(epoch, args, {"loss": loss, "val_acc": accuracy}, began, steps, label))
        save_checkpoint(checkpoint, {"history": history, "W": assignment.W, "counts": assignment.counts,
                                     "learners": [learner.state_dict() for learner in learners], "args": settings})

    # ---- every configuration on the whole scoring half, with its most probable model ---------------------------------
    began = time.monotonic()
    results = []
    pairs = []
    probs = assignment.probabilities(1.0, not args.no_balance)
    counts = assignment.counts.tolist()
    for config, entry, owner, trained in zip(configs, fields, probs.argmax(1).tolist(), counts):
        models = range(args.models) if args.all_pairs else [owner]
        scores = {m: round(evaluate(learners[m].score, scoring, config, device, args.batch_size), 6) for m in models}
        results.append({**entry, "val_acc": scores[owner], "model": owner, "steps": sum(trained)})
        pairs.append(list(scores.values()))
    seconds = sum(entry["seconds"] for entry in history) + time.monotonic() - began
    rank = judge(args, results, identity(args, data.digest))
    extra = {"pairs": pairs} if args.all_pairs else {}
    write_stage(args, name, data, settings, results, "val_acc", (len(training), len(scoring), 0), seconds,
                rank=rank, configs=[list(config) for config in configs],
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
    naive = args.out / "supernet.json"
    if naive.exists():
        print_rank(naive.name, judge(args, load_json(naive, "val_acc")["results"], identity(args, data.digest)))
    print_rank(f"{name}.json", rank)
    say(f"wrote {args.out / name}.json", every_rank=True)


if __name__ == "__main__":
    run_main(main)
