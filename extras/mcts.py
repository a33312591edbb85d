"""A baseline of the paper: a SuperNet whose draws walk down a tree (Monte-Carlo tree search).

    python -m extras.mcts                        # CIFAR-10, 100 epochs
    python -m extras.mcts --dataset synthetic    # made-up images: a minute or two on a laptop
    torchrun --nproc_per_node=3 -m extras.mcts   # seeds 0, 1, 2, each on a GPU of its own

The tree chooses where the first pooling is, then where the second is, and so on. Each step walks
down to a configuration. It takes one SGD step through it, on one half of the training images, and
scores it on one batch of the other half. Every node on the way moves its mean reward towards that
score. At the end every configuration is scored with the shared weights on that whole other half.

A step costs 1.3 to 1.9 steps of search_supernet.py: more where expensive configurations are drawn.

Paper: Javan, Toews, Pedersoli, AutoML 2023, arXiv 2306.11982, table 2. It gives neither code nor
constants: the temperatures and the running mean are ours. UCT: Kocsis and Szepesvari, ECML 2006.
Writes mcts.json, and the weights to mcts.pt; with another seed than 0, mcts-seed1.* and so on.
"""
import math
import time
from collections import Counter

import numpy as np
import torch

from common import (begin_search, cosine_lr, derive_seed, finish_search, log_epoch, make_learner,
                    parse, run_main, save_checkpoint, training_batches)

BLOCK = 36  # steps between two updates of the tree; each update waits for the device


class Tree:
    """All configurations as a tree, whose nodes say after which layers they pool.

    The root is (). Below it, (4,) holds what pools first after layer 4, and (4, 7) is [4,3,3].
    Configurations are given by their index.

    configs: tuples, all of the same length. explore: the weight of the bonus in `value`. leaves:
    {node: how many configurations it holds}. children: {node: list of nodes}. state: what a
    checkpoint needs, the visits of each node and its mean reward, a running mean that keeps 0.9.
    """

    def __init__(self, configs, explore=1.0):
        self.cuts = [tuple(cuts) for cuts in np.cumsum(configs, 1)[:, :-1].tolist()]
        self.leaves = Counter()
        for cuts in self.cuts:
            self.leaves.update(cuts[:level] for level in range(len(cuts) + 1))
        self.children = {node: [] for node in self.leaves}
        for node in self.leaves:
            if node:
                self.children[node[:-1]].append(node)
        self.explore, self.state = explore, {"visits": {}, "means": {}}

    def path(self, leaf):
        """The nodes on the walk to a configuration. It ends where no other one is left."""
        cuts = self.cuts[leaf]
        return [cuts[:level + 1] for level in range(len(cuts)) if self.leaves[cuts[:level]] > 1]

    def value(self, node, parent):
        """How good a visited node is, by UCT: mean reward + explore * sqrt(ln(parent) / visits).

        parent: the visits of all its siblings and its own. Returns a float.
        """
        visits, mean = self.state["visits"][node], self.state["means"].get(node, 0.0)
        return mean + self.explore * math.sqrt(math.log(parent) / visits)

    def probabilities(self, node, temperature):
        """How likely a walk goes from a node to each of its children: a float array with the sum 1.

        Children that were never visited come first, all equally likely. After that it is
        softmax(value / temperature + ln(leaves)): equal values then mean uniform draws.
        """
        children, visits = self.children[node], self.state["visits"]
        new = np.array([child not in visits for child in children])
        if new.any():
            return new / new.sum()
        parent = sum(visits[child] for child in children)
        logits = [self.value(child, parent) / temperature + math.log(self.leaves[child])
                  for child in children]
        weights = np.exp(np.array(logits) - max(logits))
        return weights / weights.sum()

    def visit(self, leaf):
        """Count a visit before its reward is known, so that the steps of a block spread out."""
        for node in self.path(leaf):
            self.state["visits"][node] = self.state["visits"].get(node, 0) + 1

    def draw(self, steps, temperature, rng):
        """Walk down the tree once for each of the next steps, and count the visits.

        rng: a NumPy Generator. Returns a list of `steps` indices.
        """
        drawn = []
        for _ in range(steps):
            node = ()
            while self.leaves[node] > 1:
                p = self.probabilities(node, temperature)
                node = self.children[node][rng.choice(len(p), p=p)]
            below = (leaf for leaf, cuts in enumerate(self.cuts) if cuts[:len(node)] == node)
            drawn.append(next(below))
            self.visit(drawn[-1])
        return drawn

    def update(self, drawn, rewards):
        """Record the rewards of what was drawn, in the order of the steps. Both are (B,)."""
        means = self.state["means"]
        for leaf, reward in zip(drawn, rewards):
            for node in self.path(leaf):
                means[node] = 0.9 * means[node] + 0.1 * reward if node in means else reward


def main():
    args = parse(__doc__, synthetic_epochs=24)
    search = begin_search(args, "mcts", step_cost=4 / 3)
    learner = make_learner(search, args)
    tree = Tree(search.configs)
    history, counts, steps = [], np.zeros(len(search.configs), int), search.steps
    if search.state:  # go on after the last epoch of a run that was stopped
        learner.load_state_dict(search.state["learner"])
        history, counts = search.state["history"], np.array(search.state["counts"])
        tree.state = search.state["tree"]

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
        # ---- the method: walk down the tree, train, score, and record the scores in the tree -----
        for start in range(0, steps, BLOCK):
            block = range(start, min(start + BLOCK, steps))
            progress = (epoch * steps + start) / (args.epochs * steps)
            drawn = tree.draw(len(block), 0.7 * (0.01 / 0.7) ** progress, rng)
            # `block` stands first, for zip then takes no batch that the next block would miss
            pairs = zip(block, drawn, train_batches, score_batches)
            for step, a, (x, y), (score_x, score_y) in pairs:
                config = search.configs[a]
                lr = cosine_lr(epoch * steps + step, args.epochs * steps, args.lr, args.warm_up)
                log[step, :2] = learner.train(x, y, config, lr)
                log[step, 2] = learner.score(score_x, score_y, config).float().mean()
                counts[a] += 1
            tree.update(drawn, log[block.start:block.stop, 2].tolist())
        # ------------------------------------------------------------------------------------------
        loss, accuracy, _ = log.mean(0).tolist()
        history.append(log_epoch(epoch, args.epochs, args, {"loss": loss, "train_acc": accuracy},
                                 began, steps, [learner]))
        save_checkpoint(search.checkpoint, {
            "history": history, "counts": counts.tolist(), "tree": tree.state,
            "learner": learner.state_dict(), "args": args.settings})
    finish_search(search, args, [learner], history, [{"steps": count} for count in counts.tolist()])


if __name__ == "__main__":
    run_main(main)
