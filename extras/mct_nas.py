"""MCT-NAS: Monte-Carlo tree search by the training loss, whose nodes share what they learn about one pooling.

    python -m extras.mct_nas                         # CIFAR-10, 100 epochs
    python -m extras.mct_nas --dataset synthetic     # a minute or two on a laptop
    torchrun --nproc_per_node=3 -m extras.mct_nas    # seeds 0, 1 and 2, each on the GPU of its number

Draws are uniform in the first half of the run, and in the second half walk down the tree of mcts.py. The reward is the
running mean of all training losses over the loss of this step, so no batch is scored. Node communication: a node's
value also holds G, the running mean of the rewards of all nodes with the same pooling at the same level, whatever
comes before it. With what it draws, a step costs about 1.2 steps of search_supernet.py.

After Su et al., CVPR 2021, arXiv 2103.11922. No code of its search is public: the constants are ours, and in the end
every configuration is scored, instead of a few that the tree leads to. Writes mct_nas.json and .pt; another seed than
0 writes mct_nas-seed1.json and so on.
"""
import time

import numpy as np
import torch

from common import cosine_lr, derive_seed, log_epoch, parse, run_main, save_checkpoint, training_batches
from extras.mcts import BLOCK, Tree
from search_supernet import begin_search, finish_search, make_learner

TEMPERATURE, EXPLORE, SHARED = 0.025, 0.05, 0.2  # of the walk; weights of the UCT bonus and of G


class LossTree(Tree):
    """The tree of mcts.py, told of training losses, with node communication."""

    def __init__(self, configs):
        super().__init__(configs, EXPLORE)
        self.state |= {"G": {}, "loss": None}  # G: {(level, pooling): mean}; loss: running mean (0.95) of all

    def value(self, node, parent):
        """UCT + SHARED * G."""
        return super().value(node, parent) + SHARED * self.state["G"].get((len(node), node[-1]), 1.0)

    def update(self, drawn, losses):
        """Record the training losses of what was drawn, in the order of the steps."""
        G = self.state["G"]
        for leaf, loss in zip(drawn, losses):
            mean = self.state["loss"]
            self.state["loss"] = loss if mean is None else 0.95 * mean + 0.05 * loss
            reward = self.state["loss"] / max(loss, 1e-9)
            super().update([leaf], [reward])
            for node in self.path(leaf):
                key = len(node), node[-1]
                G[key] = 0.9 * G[key] + 0.1 * reward if key in G else reward


def main():
    args = parse(__doc__, synthetic_epochs=24)
    search = begin_search(args, "mct_nas")
    learner = make_learner(search, args)
    tree = LossTree(search.configs)
    history, counts, steps = [], np.zeros(len(search.configs), int), search.steps
    if search.state:
        learner.load_state_dict(search.state["learner"])
        history, counts, tree.state = search.state["history"], np.array(search.state["counts"]), search.state["tree"]

    for epoch in range(len(history), args.epochs):
        began = time.monotonic()
        log = torch.zeros(steps, 2, device=args.device)  # loss and accuracy of each step
        rng = np.random.default_rng(derive_seed("draw", args.seed, epoch))
        order = derive_seed("order", args.seed, epoch)
        batches = training_batches(*search.training, args.batch_size, args.device, order)
        for start in range(0, steps, BLOCK):
            block = range(start, min(start + BLOCK, steps))
            if epoch * steps + start < args.epochs * steps / 2:
                drawn = rng.integers(len(search.configs), size=len(block)).tolist()
                for choice in drawn:
                    tree.visit(choice)
            else:
                drawn = tree.draw(len(block), TEMPERATURE, rng)
            for step, choice, (x, y) in zip(block, drawn, batches):  # block ends first, so that no batch is lost
                lr = cosine_lr(epoch * steps + step, args.epochs * steps, args.lr, args.warm_up)
                log[step] = learner.train(x, y, search.configs[choice], lr)
                counts[choice] += 1
            tree.update(drawn, log[block.start:block.stop, 0].nan_to_num().tolist())  # waits for the device
        loss, accuracy = log.mean(0).tolist()
        measures = {"loss": loss, "train_acc": accuracy}
        history.append(log_epoch(epoch, args.epochs, args, measures, began, steps, search.label))
        save_checkpoint(search.checkpoint, {"history": history, "counts": counts.tolist(), "tree": tree.state,
                                            "learner": learner.state_dict(), "args": search.settings})
    finish_search(search, args, [learner], history, [{"steps": int(count)} for count in counts])


if __name__ == "__main__":
    run_main(main)
