"""Stage 2, a SuperNet: one set of weights for all pooling configurations, and every way to draw and to teach its paths.

    python search_supernet.py                              # CIFAR-10, the paper's naive SuperNet, 100 epochs
    python search_supernet.py --sampler cost               # the same steps, drawn in proportion to multiply-adds
    python search_supernet.py --dataset synthetic          # a minute on a laptop
    python search_supernet.py --dataset path/to/images     # a folder with train/<class>/* and test/<class>/*
    python search_supernet.py --sampler prioritized        # PSS-Net: good at every budget of multiply-adds
    torchrun --nproc_per_node=3 search_supernet.py         # seeds 0, 1 and 2, each on the GPU of its number

Each step draws a configuration and takes one SGD step through it, on one half of the training images. Then every
configuration is scored with the shared weights on the other half. Drawn uniformly, the naive SuperNet (single path
one-shot) ranks badly: its scores say how often a configuration's layers were trained (`exposure`).
Last comes a table of budgets: the best of each cost class, as a network to deploy (`extract_network`).

Paper: Javan, Toews, Pedersoli, AutoML 2023, arXiv 2306.11982. Each sampler and each loss names its own source. Writes
supernet.json and the weights to supernet.pt; another seed than 0 writes supernet-seed1.json and so on.
"""
import copy
import itertools
import math
import re
import statistics
import time
import timeit
from functools import partial

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import (RANK, WORLD, Learner, ResNet20, UserError, cosine_lr, default_config, derive_seed,
                    evaluate, halves, identity, judge, label_loss, load_checkpoint, log_epoch, open_stage, parse,
                    pooling_configs, print_rank, print_results, print_table, result_fields, run_main, save_checkpoint,
                    say, score_step, scoring_batches, show, steps_per_epoch, training_batches, with_seed, write_stage)

BLOCK = 36  # steps between two updates of what adapts: one wait for the device instead of 36
TREES = 0.4, 0.5, 0.6, 0.7, 0.8, 0.9  # parts of the run after which --sampler tree ranks all and plants a new tree


# ---- Samplers: which configuration the next steps train --------------------------------------------------------------
#
# draw(steps, progress, rng): a list of indices; progress: 0..1 of the run; rng: a NumPy Generator.
# update(drawn, rewards): told after the steps; reward: which one, "loss" (of training) or "val_acc" (of one scoring
# batch through the same path, which costs a third of a step), or None. state: all that changes, for a checkpoint.

def exposure(configs):
    """How well uniform draws feed each configuration: (n,), the mean over its layers of log(share), where share is the
    part of all draws that train this layer at the resolution at which this configuration runs it."""
    resolutions = np.array([np.repeat(np.arange(len(config)), config) for config in configs])  # (n, layers)
    share = (resolutions[:, None] == resolutions).mean(1)
    return np.log(share).mean(1)


class Proportional:
    """Independent draws, in proportion to values ** exponent.

    Exponent 0 draws uniformly: the naive SuperNet (paper, section 4; Guo et al., ECCV 2020). Multiply-adds with 1 draw
    by cost (ours: a guess that cost helps, made by training cheap ones less); a step then costs 1.32 uniform ones.
    exp(exposure) with -3 draws against exposure (ours, after the aim of FairNAS, Chu et al., ICCV 2021); a step costs
    1.20."""
    reward = None

    def __init__(self, values, exponent):
        weights = np.asarray(values, float) ** exponent
        self.probabilities, self.state = weights / weights.sum(), {}

    def draw(self, steps, progress, rng):
        return rng.choice(len(self.probabilities), steps, p=self.probabilities).tolist()

    def update(self, drawn, rewards):
        """Nothing is learned."""


def grow(node, split, level=0):
    """A tree as {node: children}; a node is the tuple of all leaves below it, split(node, level) lists its children."""
    if len(node) == 1:
        return {}
    tree = {node: split(node, level)}
    for child in tree[node]:
        tree.update(grow(child, split, level + 1))
    return tree


class TreeSearch:
    """Draws that walk down a tree of configurations, towards what was rewarded (UCT, Kocsis and Szepesvari, 2006).

    A child is drawn by softmax((R + shared * G + explore * sqrt(ln(n_parent) / n)) / T + ln(leaves)), one that was
    never visited first. R: running mean of its rewards; n: its visits; T: temperature, which falls exponentially
    between the two given (ours: the source of "rank" keeps 0.7); leaves: how many configurations lie below it, so that
    equal R mean uniform draws. The first part `uniform` of the run draws uniformly.

    tree: "flat", all configurations below the root: Boltzmann sampling with explore 0 (a baseline of the paper).
    "cuts", a level for each pooling position: Monte-Carlo tree search (another; its constants are not published).
    "rank", halves of halves of the configurations in the order of their scores (`replant`; uniform draws until then):
    "Iterative MCTS" (AutoML 2025). Scoring makes a step cost 1.33 uniform ones, with what they draw 1.3 to 1.9, and the
    rankings of "rank" come on top.
    reward "loss" and `shared`: after MCT-NAS (Su et al., CVPR 2021, arXiv 2103.11922): the reward is the running mean
    of all losses over this one; G is its running mean over all nodes with the same cut (node communication). No code
    of it is public: the constants are ours. With what it draws a step costs 1.2."""

    def __init__(self, configs, tree, reward="val_acc", explore=1.0, shared=0.0, temperatures=(0.7, 0.01), uniform=0.0):
        self.cuts = np.cumsum(configs, 1)[:, :-1].tolist()
        self.reward = reward
        self.explore, self.shared, self.temperatures = explore, shared, temperatures
        split = self.split_by_cut if tree == "cuts" else lambda node, level: [(leaf,) for leaf in node]
        self.plant(tuple(range(len(configs))), split, uniform)

    def plant(self, root, split, uniform):
        """Begin with a new tree, of which nothing is known."""
        self.state = {"root": root, "tree": grow(root, split), "uniform": uniform, "visits": {}, "means": {},
                      "cut_means": {}, "mean_loss": None}

    def split_by_cut(self, node, level):
        groups = {}
        for leaf in node:
            groups.setdefault(self.cuts[leaf][level], []).append(leaf)
        return [tuple(group) for group in groups.values()]

    def path(self, leaf):
        """The nodes from below the root to a leaf."""
        node = self.state["root"]
        while len(node) > 1:
            node = next(child for child in self.state["tree"][node] if leaf in child)
            yield node

    def probabilities(self, node, level, temperature):
        """p(child) of a node's children, (children,)."""
        children, visits = self.state["tree"][node], self.state["visits"]
        new = np.array([child not in visits for child in children], float)
        if new.any():
            return new / new.sum()
        parent = sum(visits[child] for child in children)
        logits = []
        for child in children:
            value = self.state["means"].get(child, 0.0) + self.explore * math.sqrt(math.log(parent) / visits[child])
            if self.shared:
                value += self.shared * self.state["cut_means"].get((level, self.cuts[child[0]][level]), 1.0)
            logits.append(value / temperature + math.log(len(child)))
        weights = np.exp(np.array(logits) - max(logits))
        return weights / weights.sum()

    def draw(self, steps, progress, rng):
        first, last = self.temperatures
        temperature = first * (last / first) ** progress
        drawn = []
        for _ in range(steps):
            node, level = self.state["root"], 0
            if progress < self.state["uniform"]:
                node = (int(rng.integers(len(self.cuts))),)
            while len(node) > 1:
                p = self.probabilities(node, level, temperature)
                node, level = self.state["tree"][node][rng.choice(len(p), p=p)], level + 1
            drawn.append(node[0])
            for visited in self.path(node[0]):  # counts before its reward is known, so that a block spreads out
                self.state["visits"][visited] = self.state["visits"].get(visited, 0) + 1
        return drawn

    def update(self, drawn, rewards):
        def average(table, key, reward):
            table[key] = 0.9 * table[key] + 0.1 * reward if key in table else reward
        for leaf, reward in zip(drawn, rewards):
            if self.reward == "loss":
                mean = self.state["mean_loss"]
                self.state["mean_loss"] = reward if mean is None else 0.95 * mean + 0.05 * reward
                reward = self.state["mean_loss"] / max(reward, 1e-9)
            for level, node in enumerate(self.path(leaf)):
                average(self.state["means"], node, reward)
                if self.shared:
                    average(self.state["cut_means"], (level, self.cuts[leaf][level]), reward)

    def replant(self, scores):
        """Halve the configurations recursively in the order of their scores, (n,); visits and rewards begin anew."""
        order = tuple(np.argsort(scores, kind="stable").tolist())
        self.plant(order, lambda node, level: [node[:len(node) // 2], node[len(node) // 2:]], uniform=0.0)


class Prioritized:
    """Prioritised subnet sampling (PSS-Net: Chen, Lin, Ji, Cao, TPAMI 2023, arXiv 2109.05432): classes of cost, drawn
    uniformly, in each of which the best few compete.

    macs: (n,) multiply-adds. The source fills its pools from a huge space; with 36 configurations `pools` classes of
    equal number are cut along the cost, and a pool keeps the `size` best of its class by a running average (0.9) of
    minus the loss. With probability 0.01 ** progress, and while the pool is not full, the whole class is drawn from;
    else the pool, by softmax(score / t) with t = 0.01 ** progress too. What leaves a pool is forgotten.
    The source keeps the largest and the smallest, which the sandwich trains anyway, out of its pools; here they are in
    the last and the first. Taught by the sandwich, as in the source, a step costs 4.4 uniform ones."""
    reward = "loss"

    def __init__(self, macs, pools, size):
        self.classes = [part.tolist() for part in np.array_split(np.argsort(macs, kind="stable"), pools)]
        self.class_of = {i: number for number, members in enumerate(self.classes) for i in members}
        self.size = size
        self.state = {"score": [None] * len(macs), "members": [[] for _ in self.classes]}

    def draw(self, steps, progress, rng, floor=0.01):
        level = floor ** progress
        drawn = []
        for number in rng.integers(len(self.classes), size=steps):
            pool, members = self.state["members"][number], self.classes[number]
            if len(pool) < min(self.size, len(members)) or rng.random() < level:
                drawn.append(members[rng.integers(len(members))])
            else:
                logits = np.array([self.state["score"][i] for i in pool]) / level
                weights = np.exp(logits - logits.max())
                drawn.append(int(rng.choice(pool, p=weights / weights.sum())))
        return drawn

    def update(self, drawn, losses):
        score = self.state["score"]
        for i, loss in zip(drawn, losses):
            score[i] = -loss if score[i] is None else 0.9 * score[i] - 0.1 * loss
            pool = self.state["members"][self.class_of[i]]
            if i not in pool:
                pool.append(i)
            if len(pool) > self.size:
                worst = min(pool, key=lambda j: score[j])
                pool.remove(worst)
                score[worst] = None


SAMPLERS = {  # name: what makes it, from the configurations, their multiply-adds, and options of which each has its own
    "uniform": lambda configs, macs, **_: Proportional(macs, 0.0),
    "cost": lambda configs, macs, exponent=1.0, **_: Proportional(macs, exponent),
    "fair": lambda configs, macs, **_: Proportional(np.exp(exposure(configs)), -3.0),
    "boltzmann": lambda configs, macs, **_: TreeSearch(configs, "flat", explore=0.0),
    "mcts": lambda configs, macs, **_: TreeSearch(configs, "cuts"),
    "tree": lambda configs, macs, **_: TreeSearch(configs, "rank", uniform=1.0),
    "mct-nas": lambda configs, macs, **_: TreeSearch(configs, "cuts", "loss", explore=0.05, shared=0.2,
                                                     temperatures=(0.025, 0.025), uniform=0.5),
    "prioritized": lambda configs, macs, pools=6, pool_size=3, **_: Prioritized(macs, pools, pool_size)}


# ---- Losses: what paths learn from; each is like `label_loss`, but for several configurations ------------------------

def sandwich_loss(network, x, y, paths):
    """PSS-Net's loss, a sandwich rule. paths: the largest configuration, the smallest, and the drawn one.

    The largest learns the labels, the others its output (KL divergence)."""
    loss, teacher = label_loss(network, x, y, paths[0])
    target = teacher.detach().log_softmax(1)
    for student in paths[1:]:
        logits = network(x, student).float()
        loss = loss + F.kl_div(logits.log_softmax(1), target, reduction="batchmean", log_target=True)
    return loss, logits


class CrossPathLoss:
    """Supervised cross-path mean teacher, for a pair of configurations and two views of each image.

    After Pi-NAS (Peng et al., ICCV 2021, arXiv 2108.09671), from which it has the crossing and the teacher. It is no
    Pi-NAS: labels take the place of the negatives. Each path learns the labels on its own view, and from what a
    teacher says through the other path on the other view (KL divergence), with a weight that rises from 0 to 1 over
    the first fifth of `steps`. The teacher is a running mean of the weights. A step costs 2.67 uniform ones.

    x: (2 B, C, S, S), the two views one after the other; y: (B,)."""

    def __init__(self, network, steps):
        self.teacher = copy.deepcopy(network).requires_grad_(False)
        self.rate = 0.001 if steps >= 5000 else 0.01
        self.teacher.register_buffer("weight", torch.zeros((), device=next(network.parameters()).device))
        self.rise = 5 / steps

    def __call__(self, network, x, y, paths):
        views, logits, targets = x.chunk(2), [], []
        with torch.no_grad():
            self.teacher.weight.add_(self.rise).clamp_(max=1)
            for mine, theirs in zip(self.teacher.parameters(), network.parameters()):
                mine.lerp_(theirs, self.rate)
        for view, path in zip(views, paths):
            logits.append(network(view, path).float())
            with torch.no_grad():
                targets.append(self.teacher(view, path).float().log_softmax(1))
        loss = sum(F.cross_entropy(each, y) for each in logits) / 2
        for student, target in zip(logits, reversed(targets)):
            divergence = F.kl_div(student.log_softmax(1), target, reduction="batchmean", log_target=True)
            loss = loss + self.teacher.weight / 2 * divergence
        return loss, logits[0]


def partner(choice, configs, rng):
    """A second path for the first, drawn uniformly among those whose poolings differ by two layers or more in all."""
    positions = np.cumsum(configs, 1)
    apart = np.abs(positions - positions[choice]).sum(1)
    return int(rng.choice(np.flatnonzero(apart >= min(2, apart.max()))))


# ---- Weights for each resolution, and networks of their own ----------------------------------------------------------

class PerResolution(nn.Module):
    """A layer with weights of its own for each resolution: copies of `layer`, picked by the size of what comes in.

    size: the side at resolution 0, in pixels; resolutions: those at which the layer can run. After the progressive
    training of Yang et al. (arXiv 2108.05866), who copy the layers of a SuperNet for each width and go on at a tenth
    of the rate; here the cosine goes on. A step costs 1.0."""

    def __init__(self, layer, size, resolutions):
        super().__init__()
        self.size = size
        self.copies = nn.ModuleDict({str(r): copy.deepcopy(layer) for r in resolutions})

    def forward(self, x):
        return self.copies[str((self.size // x.shape[-1]).bit_length() - 1)](x)


def split_by_resolution(network, scales, size):
    """Give each layer of a ResNet20, in place, its own weights for each resolution: 24 for 10 layers and 3 scales.

    size: side in pixels at the first searched layer."""
    layers = len(network.layers)
    for number, layer in enumerate(network.layers):
        resolutions = range(max(0, scales - layers + number), min(scales - 1, number) + 1)
        network.layers[number] = PerResolution(layer, size, resolutions)


@torch.no_grad()
def extract_network(weights, config, feed, classes=10, channels=3, stem=1):
    """Turn (SuperNet weights, configuration) into an ordinary network with statistics of its own.

    weights: state dict of a ResNet20 with norm="shared", split by resolution or not; feed: a few (normalised images
    (B, C, S, S), labels) training batches, over which the batch-norm statistics are averaged. Returns a ResNet20 in
    eval mode, on the weights' device, whose net(x) runs `config` and gives one image the same answer as a batch.
    Raises ValueError where the weights are of another network."""
    resolutions = np.repeat(np.arange(len(config)), config)
    own = {}
    for name, value in weights.items():
        copied = re.fullmatch(r"(layers\.(\d+))\.copies\.(\d+)(\..*)", name)
        if not copied:
            own[name] = value
        elif int(copied[3]) == resolutions[int(copied[2])]:
            own[copied[1] + copied[4]] = value
    net = ResNet20(channels, classes, stem, sum(config))
    norms = {name: module for name, module in net.named_modules() if isinstance(module, nn.BatchNorm2d)}
    try:
        missing, unknown = net.load_state_dict(own, strict=False)
    except RuntimeError as error:
        raise ValueError(f"weights of another network: {error}") from None
    missing = [name for name in missing if name.rpartition(".")[0] not in norms]  # norms: scale 1, shift 0, statistics
    if missing or unknown:
        raise ValueError(f"weights of another network: {len(missing)} are missing, {len(unknown)} unknown, such as "
                         f"{(missing + unknown)[0]}; a checkpoint has them in ['learner']['network']")
    net.config = tuple(config)
    for norm in norms.values():
        norm.momentum = None  # a plain average over the batches
    net.to(next(iter(weights.values())).device).train()
    for x, _ in feed:
        net(x)
    return net.eval()


# ---- The stage -------------------------------------------------------------------------------------------------------

def main():
    def options(add):
        add("--sampler", choices=list(SAMPLERS), default="uniform", help="how configurations are drawn; default "
            "uniform, the paper's naive SuperNet")
        add("--exponent", type=float, default=1.0, help="of --sampler cost: draw by multiply-adds to this power, "
            "above 0; default 1")
        add("--teach", choices=["labels", "cross-path", "sandwich"], help="what a path learns from; default labels, "
            "but sandwich for --sampler prioritized")
        add("--split-at", type=float, default=1.0, help="part of the run, 0 to 1, after which each layer has weights "
            "of its own for each resolution; default 1, never")
        add("--pools", type=int, help="classes of multiply-adds, rows of the budget table; default 6, at most "
            "one for each configuration")
        add("--pool-size", type=int, default=3, help="configurations that a prioritised pool keeps; default 3")
    args = parse(__doc__, options, synthetic_epochs=24)
    if args.teach == "cross-path" and args.split_at < 1:
        raise UserError("--teach cross-path: its teacher cannot be split, leave out --split-at")
    args.pools = args.pools or min(6, args.space["size"])
    if args.pools > args.space["size"]:
        raise UserError(f"--pools {args.pools} is more than the {args.space['size']} configurations: lower it")
    args.seed += RANK
    args.teach = args.teach or ("sandwich" if args.sampler == "prioritized" else "labels")
    unused = set() if args.sampler == "prioritized" else {"pools", "pool_size"}  # they shape the table of budgets only
    if args.sampler != "cost":
        unused.add("exponent")
    name = with_seed("supernet", args.seed)
    search(args, *open_stage(args, name, ignore={"limit_test", *unused}), name)


def search(args, data, settings, name):
    """From the arguments to supernet.json."""
    configs = pooling_configs(args.layers, args.scales)
    device = args.device
    checkpoint = args.out / f"{name}.pt"
    fields = [result_fields(config, data, args) for config in configs]
    macs = np.array([entry["macs"] for entry in fields])
    training, scoring = halves(data.train, args.seed)
    steps = steps_per_epoch(training, args.batch_size)
    sampler = SAMPLERS[args.sampler](configs, macs, exponent=args.exponent, pools=args.pools, pool_size=args.pool_size)
    split_epoch = round(args.split_at * args.epochs)
    new_tree = {round(part * args.epochs) for part in TREES}  # epochs that begin with one
    history = []
    counts = [0] * len(configs)
    state = load_checkpoint(checkpoint)
    torch.manual_seed(derive_seed("weights", args.seed))
    network = ResNet20(classes=len(data.classes), stem=args.stem, layers=args.layers, norm="shared").to(device)
    if args.teach == "cross-path":
        loss, paths_of = CrossPathLoss(network, args.epochs * steps), lambda i, rng: [i, partner(i, configs, rng)]
    elif args.teach == "sandwich":
        loss, paths_of = sandwich_loss, lambda i, rng: [int(macs.argmax()), int(macs.argmin()), i]
    else:
        loss, paths_of = label_loss, lambda i, rng: [i]
    make_learner = partial(Learner, device=device, amp=args.amp, weight_decay=args.weight_decay, loss=loss,
                           graphs=args.teach != "cross-path")  # of its pairs there are too many for graphs
    if state and len(state["history"]) > split_epoch:
        split_by_resolution(network, args.scales, args.image_size // args.stem)
    learner = make_learner(network)
    if state:
        learner.load_state_dict(state["learner"])
        history, counts, sampler.state = state["history"], state["counts"], state["sampler"]
        if args.teach == "cross-path":
            loss.teacher.load_state_dict(state["teacher"])
        say(f"{name} goes on after epoch {len(history)}", every_rank=True)

    # ---- the search -------------------------------------------------------------------------------------------------
    for epoch in range(len(history), args.epochs):
        began = time.monotonic()
        log = torch.zeros(steps, 3, device=device)  # loss, accuracy, and that of scoring
        if epoch == split_epoch:
            split_by_resolution(network, args.scales, args.image_size // args.stem)
            learner = make_learner(network)
        if args.sampler == "tree" and epoch in new_tree:
            few = list(itertools.islice(scoring_batches(scoring, args.batch_size, device), 5))
            sampler.replant([sum(learner.score(*batch, config).item() for batch in few) for config in configs])
        rng = np.random.default_rng(derive_seed("draw", args.seed, epoch))
        train_batches = training_batches(training, args.batch_size, device, derive_seed("order", args.seed, epoch),
                                         views=1 + (args.teach == "cross-path"))
        score_batches = training_batches(scoring, args.batch_size, device,
                                         derive_seed("scoring order", args.seed, epoch), augment=False)
        for start in range(0, steps, BLOCK):
            block = range(start, min(start + BLOCK, steps))
            progress = (epoch * steps + start) / (args.epochs * steps)
            drawn = sampler.draw(len(block), progress, rng)
            for step, choice, (x, y) in zip(block, drawn, train_batches):
                lr = cosine_lr(epoch * steps + step, args.epochs * steps, args.lr, args.warm_up)
                trained = paths_of(choice, rng)
                paths = tuple(configs[i] for i in trained)
                log[step, :2] = learner.train(x, y, paths if len(paths) > 1 else paths[0], lr)
                if sampler.reward == "val_acc":
                    log[step, 2] = learner.score(*next(score_batches), configs[choice])
                for i in trained:
                    counts[i] += 1
            if sampler.reward:
                rewards = log[block.start:block.stop, {"loss": 0, "val_acc": 2}[sampler.reward]].tolist()
                if math.isfinite(sum(rewards)):  # else the run has failed, which the end of the epoch says
                    sampler.update(drawn, rewards)
        mean_loss, accuracy, _ = log.mean(0).tolist()
        label = f"seed {args.seed}  " if WORLD > 1 else ""
        history.append(log_epoch(epoch, args, {"loss": mean_loss, "train_acc": accuracy}, began, steps, label))
        save_checkpoint(checkpoint, {
            "history": history, "counts": counts, "sampler": sampler.state, "learner": learner.state_dict(),
            "teacher": loss.teacher.state_dict() if args.teach == "cross-path" else None, "args": settings})

    # ---- every configuration on the whole scoring half ---------------------------------------------------------------
    began = time.monotonic()
    results = []
    for config, entry, count in zip(configs, fields, counts):
        accuracy = evaluate(learner.score, scoring, config, device, args.batch_size)
        results.append({**entry, "val_acc": round(accuracy, 6), "steps": count})

    # ---- one network for each budget ---------------------------------------------------------------------------------
    budgets = []
    feed = training_batches(training, args.batch_size, device, derive_seed("calibration", args.seed))
    feed = list(itertools.islice(feed, 8))
    for number, members in enumerate(np.array_split(np.argsort(macs, kind="stable"), args.pools)):
        budget = int(macs[members].max())
        if args.sampler == "prioritized":
            members = sampler.state["members"][number] or members
        best = max((results[i] for i in members), key=lambda r: r["val_acc"])
        single = extract_network(network.state_dict(), best["config"], feed, len(data.classes), stem=args.stem)
        score = partial(score_step, single, args.amp)
        image = feed[0][0][:1]
        with torch.no_grad():
            timed = timeit.repeat(lambda: single(image).sum().item(), number=1, repeat=21)  # item() waits
        budgets.append({"budget": budget, **best, "seconds_per_image": statistics.median(timed),
                        "calibrated_val_acc": evaluate(score, scoring, best["config"], device)})
    seconds = sum(entry["seconds"] for entry in history) + time.monotonic() - began
    rank = judge(args, results, identity(args, data.digest))
    write_stage(args, name, data, settings, results, "val_acc", (len(training), len(scoring), 0), seconds,
                rank=rank, budgets=budgets, history=history)

    say("\nbudgets, in multiply-adds: the configuration kept, with the shared weights, and calibrated by itself")
    print_table(["budget", "configuration", "M multiply-adds", "val acc", "calibrated", "ms per image"], [
        [f"{b['budget'] / 1e6:.1f}M", show(b["config"]), f"{b['macs'] / 1e6:.1f}", f"{b['val_acc']:.4f}",
         f"{b['calibrated_val_acc']:.4f}", f"{1e3 * b['seconds_per_image']:.2f}"] for b in budgets])
    say()
    print_results(results, "val_acc", default_config(args.layers, args.scales))
    print_rank(f"{name}.json", rank)
    say(f"wrote {args.out / name}.json", every_rank=True)


if __name__ == "__main__":
    run_main(main)
