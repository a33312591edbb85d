"""MCT-NAS: a SuperNet whose draws walk down a tree, by training losses that its nodes share.

    python -m extras.mct_nas                        # CIFAR-10, 100 epochs
    python -m extras.mct_nas --dataset synthetic    # made-up images: a minute or two on a laptop
    torchrun --nproc_per_node=3 -m extras.mct_nas   # seeds 0, 1, 2, each on a GPU of its own

Each step draws a configuration and takes one SGD step through it, on one half of the training
images. In the first half of the run draws are uniform. In the second half they walk down the tree
of mcts.py. The reward is the running mean of all training losses over the loss of this step, so no
batch is scored. At the end every configuration is scored with the shared weights on the other half
of the images.

Node communication: the value of a node also holds G, the running mean of the rewards of all nodes
that have the same pooling at the same level, whatever comes before it.

With what it draws, a step costs about 1.2 steps of search_supernet.py.

After Su et al., CVPR 2021, arXiv 2103.11922. No code of its search is public: the constants are
ours. It scores a few that the tree leads to in the end; here every configuration is scored. Writes
mct_nas.json, and the weights to mct_nas.pt; with another seed than 0, mct_nas-seed1.* and so on.
"""
import time

import numpy as np
import torch

from common import (begin_search, cosine_lr, derive_seed, finish_search, log_epoch, make_learner,
                    parse, run_main, save_checkpoint, training_batches)
from extras.mcts import BLOCK, Tree

TEMPERATURE = 0.025  # of the walk
EXPLORE, SHARED = 0.05, 0.2  # the weights of the UCT bonus and of G in the value of a node


class LossTree(Tree):
    """The tree of mcts.py, which is told training losses, with node communication.

    configs: as for Tree. Its `state` has two more entries. "G": {(level, pooling): a running mean
    that keeps 0.9}. "loss": the running mean of all losses, which keeps 0.95, or None at first.
    """

    def __init__(self, configs):
        super().__init__(configs, EXPLORE)
        self.state |= {"G": {}, "loss": None}

    def value(self, node, parent):
        """How good a visited node is: UCT as in Tree + SHARED * G. Returns a float."""
        shared = self.state["G"].get((len(node), node[-1]), 1.0)
        return super().value(node, parent) + SHARED * shared

    def update(self, drawn, losses):
        """Record the losses of what was drawn, in the order of the steps. Both are (B,)."""
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
    if search.state:  # go on after the last epoch of a run that was stopped
        learner.load_state_dict(search.state["learner"])
        history, counts = search.state["history"], np.array(search.state["counts"])
        tree.state = search.state["tree"]

    for epoch in range(len(history), args.epochs):
        began = time.monotonic()
        torch.manual_seed(derive_seed("dropout", args.seed, epoch))  # if the network has any
        log = torch.zeros(steps, 2, device=args.device)  # loss and accuracy of each step
        rng = np.random.default_rng(derive_seed("draw", args.seed, epoch))
        batches = training_batches(search.training.images, search.training.labels, args.batch_size,
                                   args.device, derive_seed("order", args.seed, epoch))
        # ---- the method: draw uniformly, later by the tree, train, and record the losses ---------
        for start in range(0, steps, BLOCK):
            block = range(start, min(start + BLOCK, steps))
            if epoch * steps + start < args.epochs * steps / 2:
                drawn = rng.integers(len(search.configs), size=len(block)).tolist()
                for a in drawn:
                    tree.visit(a)
            else:
                drawn = tree.draw(len(block), TEMPERATURE, rng)
            # `block` stands first, for zip then takes no batch that the next block would miss
            for step, a, (x, y) in zip(block, drawn, batches):
                lr = cosine_lr(epoch * steps + step, args.epochs * steps, args.lr, args.warm_up)
                log[step] = learner.train(x, y, search.configs[a], lr)
                counts[a] += 1
            tree.update(drawn, log[block.start:block.stop, 0].nan_to_num().tolist())
        # ------------------------------------------------------------------------------------------
        loss, accuracy = log.mean(0).tolist()
        history.append(log_epoch(epoch, args.epochs, args, {"loss": loss, "train_acc": accuracy},
                                 began, steps, [learner]))
        save_checkpoint(search.checkpoint, {
            "history": history, "counts": counts.tolist(), "tree": tree.state,
            "learner": learner.state_dict(), "args": args.settings})
    finish_search(search, args, [learner], history, [{"steps": count} for count in counts.tolist()])


if __name__ == "__main__":
    run_main(main)
