"""Monte-Carlo tree search over pooling positions: a SuperNet trained along promising paths, a baseline of the paper.

    python -m extras.mcts                       # CIFAR-10, 100 epochs
    python -m extras.mcts --dataset synthetic   # a minute or two on a laptop

Each step walks down a tree that chooses where the first pooling is, then where the second is. It takes one SGD step
through the configuration at the end, scores it on one batch of the other half of the images, and updates every node on
the way. With this scoring a step costs 1.3 to 1.9 steps of search_supernet.py: more where expensive ones are drawn.

Paper: Javan, Toews, Pedersoli, AutoML 2023, arXiv 2306.11982, table 2, without code or constants: the temperatures and
the running mean are ours. UCT: Kocsis and Szepesvari, ECML 2006. Writes mcts.json and .pt; another seed than 0 writes
mcts-seed1.json and so on.
"""
import math
import time
from collections import Counter

import numpy as np
import torch

from common import cosine_lr, derive_seed, log_epoch, parse, run_main, save_checkpoint, training_batches
from search_supernet import begin_search, finish_search, make_learner

BLOCK = 36  # steps between two updates of the tree: one wait for the device instead of 36


class Tree:
    """Configurations as a tree. A node is where they pool: (), (4,) and (4, 7) lead to [4,3,3].

    leaves: how many lie below a node; with its logarithm in the logits equal values mean uniform draws. explore:
    weight of the UCT bonus; state: what a checkpoint needs, of each node its visits and mean reward (running, 0.9)."""

    def __init__(self, configs, explore=1.0):
        self.cuts = [tuple(cuts) for cuts in np.cumsum(configs, 1)[:, :-1].tolist()]
        self.leaves = Counter(cuts[:level] for cuts in self.cuts for level in range(len(cuts) + 1))
        self.children = {node: [child for child in self.leaves if child and child[:-1] == node] for node in self.leaves}
        self.explore, self.state = explore, {"visits": {}, "means": {}}

    def path(self, leaf):
        """The nodes that a walk from the root to a configuration, an index, comes to. It ends where one is left."""
        cuts = self.cuts[leaf]
        return [cuts[:level + 1] for level in range(len(cuts)) if self.leaves[cuts[:level]] > 1]

    def value(self, node, parent):
        """UCT: mean reward + explore * sqrt(ln(visits of the parent) / visits)."""
        visits, mean = self.state["visits"][node], self.state["means"].get(node, 0.0)
        return mean + self.explore * math.sqrt(math.log(parent) / visits)

    def probabilities(self, node, temperature):
        """p(child) of a node: one never visited, else softmax(value / temperature + ln(leaves))."""
        children, visits = self.children[node], self.state["visits"]
        new = np.array([child not in visits for child in children])
        if new.any():
            return new / new.sum()
        parent = sum(visits[child] for child in children)
        logits = [self.value(child, parent) / temperature + math.log(self.leaves[child]) for child in children]
        weights = np.exp(np.array(logits) - max(logits))
        return weights / weights.sum()

    def visit(self, leaf):
        """Count a visit, before its reward is known, so that a block of steps spreads out."""
        for node in self.path(leaf):
            self.state["visits"][node] = self.state["visits"].get(node, 0) + 1

    def draw(self, steps, temperature, rng):
        """Walk down the tree once for each of the next steps: a list of indices."""
        drawn = []
        for _ in range(steps):
            node = ()
            while self.leaves[node] > 1:
                p = self.probabilities(node, temperature)
                node = self.children[node][rng.choice(len(p), p=p)]
            drawn.append(next(leaf for leaf, cuts in enumerate(self.cuts) if cuts[:len(node)] == node))
            self.visit(drawn[-1])
        return drawn

    def update(self, drawn, rewards):
        """Record the rewards of what was drawn, in the order of the steps."""
        means = self.state["means"]
        for leaf, reward in zip(drawn, rewards):
            for node in self.path(leaf):
                means[node] = 0.9 * means[node] + 0.1 * reward if node in means else reward


def main():
    args = parse(__doc__, synthetic_epochs=24)
    search = begin_search(args, "mcts")
    learner = make_learner(search, args)
    tree = Tree(search.configs)
    history, counts, steps = [], np.zeros(len(search.configs), int), search.steps
    if search.state:
        learner.load_state_dict(search.state["learner"])
        history, counts, tree.state = search.state["history"], np.array(search.state["counts"]), search.state["tree"]

    for epoch in range(len(history), args.epochs):
        began = time.monotonic()
        log = torch.zeros(steps, 3, device=args.device)  # loss and accuracy of each step, and that of scoring
        rng = np.random.default_rng(derive_seed("draw", args.seed, epoch))
        train_batches, score_batches = (
            training_batches(*half, args.batch_size, args.device, derive_seed(name, args.seed, epoch), augment)
            for half, name, augment in ((search.training, "order", True), (search.scoring, "scoring order", False)))
        for start in range(0, steps, BLOCK):
            block = range(start, min(start + BLOCK, steps))
            temperature = 0.7 * (0.01 / 0.7) ** ((epoch * steps + start) / (args.epochs * steps))  # falls over the run
            drawn = tree.draw(len(block), temperature, rng)
            for step, choice, (x, y), scored in zip(block, drawn, train_batches, score_batches):  # block ends first
                lr = cosine_lr(epoch * steps + step, args.epochs * steps, args.lr, args.warm_up)
                log[step, :2] = learner.train(x, y, search.configs[choice], lr)
                log[step, 2] = learner.score(*scored, search.configs[choice])
                counts[choice] += 1
            tree.update(drawn, log[block.start:block.stop, 2].tolist())  # waits for the device
        measures = dict(zip(("loss", "train_acc"), log.mean(0).tolist()))
        history.append(log_epoch(epoch, args.epochs, args, measures, began, steps, search.label))
        save_checkpoint(search.checkpoint, {"history": history, "counts": counts.tolist(), "tree": tree.state,
                                            "learner": learner.state_dict(), "args": search.settings})
    finish_search(search, args, [learner], history, [{"steps": int(count)} for count in counts])


if __name__ == "__main__":
    run_main(main)
