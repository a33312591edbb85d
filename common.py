"""The method first, then what makes commands of it. A reader may stop at the banner between them.

The method: the space of pooling configurations, the network, batches of images, the training step,
evaluation. These functions take tensors and plain numbers, so that each can be copied.

After the banner: data sets, devices, processes and files, results, what every search shares, and
the command line.

"Paper" means Javan, Toews, Pedersoli, "Balanced Mixture of SuperNets for Learning the CNN Pooling
Architecture", AutoML 2023, arXiv 2306.11982.
"""
import argparse
import base64
import contextlib
import ctypes
import hashlib
import io
import itertools
import json
import math
import os
import re
import shlex
import sys
import time
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

try:
    from torchvision.models.resnet import BasicBlock
    from torchvision.ops import Conv2dNormActivation
except (ImportError, RuntimeError) as error:  # one that was made for another torch fails here
    print(f"torchvision does not fit torch {torch.__version__} ({error}): install both together, "
          f"with pip install --upgrade torch torchvision", file=sys.stderr)
    raise SystemExit(2) from None

# ---- Space: where a network may pool (paper, section 3) ------------------------------------------


def pooling_configs(layers=10, scales=3):
    """List all pooling configurations. Each says how many layers run at each resolution.

    layers: the number of layers. scales: the number of resolutions; every resolution has at least
    one layer. Returns tuples of `scales` integers with the sum `layers`, in lexicographic order.
    pooling_configs(10, 3) is the paper's space of 36, from (1, 1, 8) to (8, 1, 1).
    """
    configs = []
    for cuts in itertools.combinations(range(1, layers), scales - 1):
        edges = (0, *cuts, layers)
        configs.append(tuple(end - start for start, end in itertools.pairwise(edges)))
    return configs


def default_config(layers=10, scales=3):
    """The configuration that a ResNet has by habit: equal parts, the first ones larger by a layer.

    default_config(10, 3) is (4, 3, 3), a ResNet20 that pools where its channels double.
    """
    small, larger_parts = divmod(layers, scales)
    return tuple(small + (part < larger_parts) for part in range(scales))


def config_text(config):
    """Write a configuration as people do: (4, 3, 3) becomes "[4,3,3]"."""
    return "[" + ",".join(map(str, config)) + "]"


def draw_probabilities(macs, sampler="uniform"):
    """How likely a search draws each configuration in a step.

    macs: the multiply-adds of each configuration, (n,). sampler: "uniform" (the paper's) or "cost"
    (ours: in proportion to multiply-adds). Returns a float array (n,) with the sum 1.
    """
    weights = np.asarray(macs, float) ** {"uniform": 0, "cost": 1}[sampler]
    return weights / weights.sum()


# ---- Network -------------------------------------------------------------------------------------

# A SuperNet trains many configurations with one set of weights. Running averages over them would
# mix their statistics, so its norm uses those of the batch at hand, in training and in scoring. It
# learns no scale and no shift, which the configurations would have to share (paper, section 4).
# Networks trained alone have nn.BatchNorm2d as it is.
batch_statistics_norm = partial(nn.BatchNorm2d, affine=False, track_running_stats=False)


class ResNet20(nn.Module):
    """ResNet20 for small images (He et al., 2016), whose pooling is an argument (paper, section 3).

    forward(x, config) takes normalised images, float (B, 3, S, S), and returns logits (B, classes).
    A 2x2 max pooling stands before the first layer of every resolution but the first. The weights
    are the same for every configuration. Without config it runs `self.config`, at first the
    default. A configuration that does not fit raises ValueError.

    classes: the number of classes. image_size: S, in pixels; from 64 on, one more convolution at
    the front brings the images to about 32 pixels, and is not searched. layers: a first 3x3 convolution
    and layers - 1 residual blocks. norm: called with a number of channels, makes a norm.
    """

    def __init__(self, classes=10, image_size=32, layers=10, norm=nn.BatchNorm2d):
        super().__init__()
        stride = max(1, image_size // 32)
        self.stem, channels = nn.Identity(), 3
        if stride > 1:
            self.stem = Conv2dNormActivation(3, 16, 2 * stride - 1, stride, norm_layer=norm)
            channels = 16
        self.layers = nn.ModuleList([Conv2dNormActivation(channels, 16, norm_layer=norm)])
        # Channels belong to the layer and never move: 16 four times, 32 and 64 three times each.
        widths = np.repeat([16, 32, 64], default_config(layers, 3)).tolist()
        for inputs, outputs in itertools.pairwise(widths):
            block = BasicBlock(inputs, outputs, norm_layer=norm)
            if inputs != outputs:
                block.downsample = Conv2dNormActivation(inputs, outputs, 1, norm_layer=norm,
                                                        activation_layer=None)
            self.layers.append(block)
        self.head = nn.Linear(widths[-1], classes)
        self.config = default_config(layers)

    def forward(self, x, config=None):
        config = config or self.config
        if sum(config) != len(self.layers) or min(config) < 1:
            raise ValueError(f"{config_text(config)} does not share out {len(self.layers)} layers")
        pooled = set(itertools.accumulate(config[:-1]))  # the layers that a pooling stands before
        x = self.stem(x)
        for number, layer in enumerate(self.layers):
            if number in pooled:
                x = F.max_pool2d(x, 2)
            x = layer(x)
        return self.head(x.mean((2, 3)))


def count_macs(config, network=None, image_size=32):
    """Count the multiply-adds of convolutions and linear layers for one image, an integer.

    config: the configuration. network: takes (x, config) and lies on the device "meta", which has
    shapes but no numbers; by default a ResNet20 with 10 classes. image_size: in pixels.
    count_macs((4, 3, 3)) is 40.8 million.
    """
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        network = network or ResNet20(10, image_size, sum(config), nn.Identity)
        network(torch.empty(1, 3, image_size, image_size), config)
    return counter.get_total_flops() // 2  # a multiply-add is two operations


# ---- Batches: images stay uint8 until a batch of them is used ------------------------------------


class Split(NamedTuple):
    """Images, uint8 (N, H, W, 3) on any device or mapped from a file, and labels, int64 (N,).

    digest: a text that stands for the content, where images come from files.
    """

    images: torch.Tensor
    labels: torch.Tensor
    digest: str = ""


def balanced_order(labels, seed=0):
    """Shuffle so that the first k images nearly hold the classes in the proportions of all.

    labels: integers (N,). Returns int64 (N,), the positions of the images in their new order.
    """
    labels = np.asarray(labels)
    rng, place = np.random.default_rng(seed), np.empty(len(labels))
    order = rng.permutation(len(labels))
    for label in np.unique(labels):  # spread each class evenly over 0 to 1
        members = order[labels[order] == label]
        place[members] = (np.arange(len(members)) + rng.random(len(members))) / len(members)
    return torch.from_numpy(np.argsort(place, kind="stable"))


def split_in_halves(split, seed=0):
    """Cut a Split into two halves, each class in nearly equal parts. Returns a list of two Splits.

    One half trains the weights of a search, the other scores configurations (paper, section 4).
    """
    halves = []
    for rows in balanced_order(split.labels, seed + 1).tensor_split(2):
        halves.append(Split(split.images[rows.to(split.images.device)], split.labels[rows]))
    return halves


def crop_and_flip(images, top, left, flip, pad):
    """Pad images with black, cut out a window of the old size, and mirror some, all at once.

    images: uint8 (B, H, W, C). top, left: int64 (B,), where the window begins, 0 to 2 * pad.
    flip: bool (B,). All lie on one device. pad: in pixels. Returns uint8 (B, H, W, C).
    """
    count, height, width, _ = images.shape
    padded = F.pad(images, (0, 0, pad, pad, pad, pad))
    across = torch.arange(width, device=images.device)
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = left[:, None] + torch.where(flip[:, None], across.flip(0), across)
    image = torch.arange(count, device=images.device)
    return padded[image[:, None, None], rows[:, :, None], columns[:, None, :]]


def normalise(images):
    """Turn uint8 images (B, H, W, C) into float32 (B, C, H, W) from -1 to 1.

    They stay channels last in memory, which is faster. The same constants serve every data set: the
    first norm of the network takes out level and scale.
    """
    return images.permute(0, 3, 1, 2).to(torch.float32, copy=True).sub_(127.5).div_(127.5)


def training_batches(images, labels, batch_size, device, seed, augment=True):
    """Go once over the images in random order. Yields pairs (x, y) on `device`.

    x: normalised images, float32 (B, C, H, W). y: their labels. Images that do not fill a last
    batch are left out. images: uint8 (N, H, W, C) on any device. labels: (N, ...). augment: pad by
    an eighth of the side, crop and flip (paper, section 5). The seed decides all that is random,
    on every device alike.
    """
    rng = torch.Generator().manual_seed(seed)
    count, pad = len(labels), images.shape[1] // 8
    order = torch.randperm(count, generator=rng)
    top, left = torch.randint(0, 2 * pad + 1, (2, count), generator=rng).to(device)
    flip = (torch.rand(count, generator=rng) < 0.5).to(device)
    rows, labels = order.to(images.device), labels[order].to(device)
    for start in range(0, count - batch_size + 1, batch_size):
        batch = slice(start, start + batch_size)
        x = images[rows[batch]].to(device)
        if augment:
            x = crop_and_flip(x, top[batch], left[batch], flip[batch], pad)
        yield normalise(x), labels[batch]


# ---- Step: stochastic gradient descent with automatic mixed precision ----------------------------


def derive_seed(*parts):
    """Make a seed, an integer below 2 ** 63, from anything that Python can print.

    derive_seed("order", 0, 5) shuffles epoch 5 of seed 0: each use of chance has its own stream.
    What prints differently gives another seed, such as 3 and np.int64(3).
    """
    return int(hashlib.sha256(repr(parts).encode()).hexdigest()[:16], 16) >> 1


def cosine_lr(step, steps, lr, warm_up=0.0):
    """The learning rate of step 0 to steps - 1: it falls from `lr` to 1 % of it along a cosine.

    The paper's falls from 0.1 to 0.001 and changes once an epoch; this one changes each step.
    warm_up: in this first part of all steps, 0 to 1, a factor rises evenly to 1 and multiplies it.
    """
    rising = min(1.0, (step + 1) / (warm_up * steps)) if warm_up else 1.0
    return rising * lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))


class Learner:
    """A network with its optimiser. It trains and scores single batches, and never waits for a GPU.

    network: takes x, float (B, C, S, S), and config, a tuple. device: a torch.device. amp: "bf16",
    "fp16" or "off" (float32). weight_decay: the factor of the L2 penalty. graphs: on CUDA, replay
    the kernels of a step as one CUDA graph for each configuration; a result is then overwritten
    by the next call.

    To learn something else than classes, override `loss`, and `right` if it must be scored.
    """

    def __init__(self, network, device, amp="off", weight_decay=0.0, graphs=True):
        self.network = network.to(device, memory_format=torch.channels_last)
        on_cuda = device.type == "cuda"
        self.lr = torch.zeros((), device=device) if on_cuda else 0.0  # graphs read a tensor
        self.optimizer = torch.optim.SGD(network.parameters(), self.lr, momentum=0.9,
                                         weight_decay=weight_decay, fused=True if on_cuda else None)
        for parameter in network.parameters():  # now, since fp16 may skip the step that makes them
            self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")  # else does nothing
        self.finite = torch.ones((), dtype=torch.bool, device=device)  # false once a result is not
        dtype = torch.float16 if amp == "fp16" else torch.bfloat16
        self.autocast = partial(torch.autocast, device.type, dtype, enabled=amp != "off")
        wrap = partial(graphed, device=device) if graphs else lambda function: function
        self.train_step, self.score = wrap(self.one_step), wrap(self.right)

    def loss(self, x, y, config):
        """Returns (loss, log): the scalar that a step minimises, and k numbers to log, detached.

        y: labels, int64 (B,). Here the loss is the cross-entropy, and the log holds cross-entropy
        and accuracy of the batch.
        """
        logits = self.network(x, config).float()
        loss = F.cross_entropy(logits, y)
        return loss, torch.stack([loss.detach(), (logits.argmax(1) == y).float().mean()])

    @torch.no_grad()
    def right(self, x, y, config):
        """Which images of a batch the network classifies rightly: bool (B,)."""
        self.network.eval()
        with self.autocast():
            logits = self.network(x, config)
        self.finite &= logits.isfinite().all()  # the largest of NaNs would be class 0
        return logits.argmax(1) == y

    def one_step(self, x, y, config):
        """One step of SGD. Returns what `loss` logs."""
        self.network.train()
        self.optimizer.zero_grad()
        with self.autocast():
            loss, log = self.loss(x, y, config)
        self.finite &= loss.detach().isfinite()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return log

    def train(self, x, y, config, lr):
        """`one_step` at the learning rate `lr`. Like `score` it is a CUDA graph where it can be."""
        self.optimizer.param_groups[0]["lr"] = self.lr.fill_(lr) if torch.is_tensor(self.lr) else lr
        return self.train_step(x, y, config)

    def momentum(self):
        """The momentum of each parameter, a list of tensors."""
        return [self.optimizer.state[p]["momentum_buffer"] for p in self.network.parameters()]

    def state_dict(self):
        """What a checkpoint needs: weights, momentum, and the loss scale of fp16."""
        return {"network": self.network.state_dict(), "momentum": self.momentum(),
                "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state):
        """Go on from a `state_dict`, also one from another kind of device."""
        self.network.load_state_dict(state["network"])
        self.scaler.load_state_dict(state["scaler"])
        for mine, saved in zip(self.momentum(), state["momentum"]):
            mine.copy_(saved)


# ---- Evaluation ----------------------------------------------------------------------------------


def evaluate(score, split, config, device, batch_size=256):
    """Score a configuration on all images of a Split. Returns which are right: bool (N,), CPU.

    score(x, y, config): a function that returns which images of a batch are right, bool (B,), such
    as `Learner.score`. The batches have nearly equal sizes, about `batch_size`. The norms of a
    SuperNet use the statistics of a batch, so its result depends a little on the cut.
    """
    count, right = len(split.labels), []
    batches = max(1, min(round(count / batch_size), count // 2))  # statistics need two images
    for images, y in zip(split.images.tensor_split(batches), split.labels.tensor_split(batches)):
        right.append(score(normalise(images.to(device)), y.to(device), config).clone())
    return torch.cat(right).cpu()


def kendall_tau(x, y):
    """Kendall's tau-b, how far two rankings agree: 1 the same order, 0 none, -1 the reverse.

    x, y: sequences of n numbers, which may hold ties (Kendall, 1945). Returns a float, or None
    where it is undefined, because all numbers of a sequence are equal.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    x_order, y_order = np.sign(np.subtract.outer(x, x)), np.sign(np.subtract.outer(y, y))
    scale = math.sqrt((x_order ** 2).sum() * (y_order ** 2).sum())
    return float((x_order * y_order).sum() / scale) if scale else None


def pareto(results, key):
    """The results that are more accurate than every one of at most their cost, cheapest first.

    results: dicts with "macs" and an accuracy under `key`. Of equal results the first counts.
    """
    front = []
    for result in sorted(results, key=lambda r: (r["macs"], -r[key])):
        if not front or result[key] > front[-1][key]:
            front.append(result)
    return front


# ==================================================================================================
# END OF THE METHOD. What follows makes commands of it: data sets, devices, processes and files,
# results, what every search shares, the command line. Nothing below is in the paper.
# ==================================================================================================


class UserError(Exception):
    """Something that a person can put right: one line on standard error and exit code 2."""


# ---- Network files -------------------------------------------------------------------------------


def read_network_file(text, path):
    """Run the text of a network file. Returns its DEFAULT and its make_network.

    DEFAULT: the configuration that the network has today, a tuple. make_network(classes,
    image_size, norm): returns a module with forward(x, config), where norm(channels) makes a norm.
    path: for messages. Raises UserError.
    """
    module = sys.modules["network_file"] = ModuleType("network_file")  # dataclasses look it up there
    module.__file__ = str(path)
    try:
        exec(compile(text, str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        raise UserError(f"--network {path} does not run: {type(error).__name__}: {error}") from None
    default, make = getattr(module, "DEFAULT", None), getattr(module, "make_network", None)
    fits = isinstance(default, (tuple, list)) and default and all(type(n) is int and n > 0 for n in default)
    if not fits or not callable(make):
        raise UserError(f"--network {path} needs DEFAULT = (3, 2, 2, 2), or how many layers your network runs at "
                        f"each resolution, and a function make_network(classes, image_size, norm)")
    return tuple(default), make


def make_network(args, classes, norm=nn.BatchNorm2d):
    """The network of every script: that of --network, or the ResNet20.

    args: from `parse`. norm: called with a number of channels; `batch_statistics_norm` in a SuperNet.
    """
    if not args.network_text:
        return ResNet20(classes, args.image_size, args.layers, norm)
    _, make = read_network_file(args.network_text, args.network_path)
    try:
        network = make(classes, args.image_size, norm)
        list(network.parameters())
        return network
    except Exception as error:
        raise UserError(f"--network {args.network_path}: make_network(classes, image_size, norm) must return a module, "
                        f"also on the device meta and with a norm that has no weights: {type(error).__name__}: "
                        f"{error}") from None


def load_network(folder, config=None):
    """Load a network that retrain.py or train_single.py trained. Returns a namespace.

    It has network (in eval mode; takes images as `normalise` makes them, and config), config,
    classes and image_size. folder: the --out of that run. config: which of those trained; by default the best
    in retrain.json, or in single.json where there is none. Raises UserError.
    """
    folder = Path(folder)
    stages = [stage for stage in ("retrain", "single") if (folder / f"{stage}.json").exists()]
    if not stages:
        raise UserError(f"{folder} holds no retrain.json and no single.json: run retrain.py first")
    found = load_json(folder / f"{stages[0]}.json", "test_acc")
    config = tuple(config or found["best"]["config"])
    runs = [path for stage in ("retrain", "single")  # a JSON says that it is finished
            for path in visible_files(folder / stage, f"{'-'.join(map(str, config))}-seed*.json")]
    weights = [path.with_suffix(".pt") for path in runs if path.with_suffix(".pt").exists()
               and not other_settings(load_json(path).get("args", {}), found["args"])]
    if not weights:
        raise UserError(f"{folder} holds no weights of {config_text(config)}: copy its folders retrain and single too")
    own = folder / NETWORK_COPY
    args = SimpleNamespace(image_size=found["image_size"], layers=found["space"]["layers"], network_path=own,
                           network_text=own.read_text() if own.exists() else "")
    network = make_network(args, len(found["classes"]))
    try:
        network.load_state_dict(load_checkpoint(weights[0])["learner"]["network"])
    except (RuntimeError, KeyError) as error:
        raise UserError(f"{weights[0]} is of another network than {own if own.exists() else 'the ResNet20'}: copy the "
                        f"whole folder of the run ({str(error).splitlines()[0]})") from None
    return SimpleNamespace(network=network.eval(), config=config, classes=found["classes"],
                           image_size=found["image_size"])


NETWORK_COPY = "searched_network.py"  # the copy of a network file that lies in --out, beside its weights


# ---- Data sets: each becomes uint8 images (N, H, W, 3) and labels --------------------------------

ARRAYS = "cifar10", "cifar100", "synthetic"  # these come as arrays of pixels, all others as files
IMAGE_SIZE = {"food101": 128, "synthetic": 16}  # the side that is fed in, pixels; for all others 32
FORMATS = "JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF", "AVIF"  # of Pillow; none runs code
SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".ppm", ".pgm", ".pbm", ".bmp", ".tif", ".tiff", ".webp",
            ".gif", ".avif"}

SYNTHETIC = 6_000, 4_000  # training and test images
GLYPHS = ("010110100 110010010", "010010110 100101010", "011100100 001111000", "101100010 100101001",
          "100110100 110100100", "011000101 001010101", "000100111 000011011", "101001001 100100101",
          "100110001 001101001", "010001011 010110010")  # of each class the two glyphs, row by row


def synthetic_images(n, seed):
    """Draw a small data set of ten classes on which it matters where a network pools.

    A class is a pair of glyphs, each a pattern of 3x3 pixels. The upper half of an image shows five
    glyphs of its class. The lower half shows two of another class, which do not count. Glyphs may
    differ in a single pixel, which early pooling blurs. Which half a glyph is in shows only to a
    wide view, which a network that pools late has only in its last layers.

    n: the number of images. seed: draws the images; the classes are always the same. Returns
    images, uint8 (n, 16, 16, 3), and labels, int64 (n,), as arrays; all classes are equally large.
    """
    cells = [[int(cell) for cell in pair.replace(" ", "")] for pair in GLYPHS]
    glyphs = np.array(cells).reshape(10, 2, 3, 3) * 2 - 1
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % 10)
    others = (labels + rng.integers(1, 10, n)) % 10
    image, cell = np.arange(n)[:, None, None], np.arange(3)
    drawing = np.zeros((n, 16, 16))
    for shown, first_row in [(labels, 0)] * 5 + [(others, 8)] * 2:
        glyph = glyphs[shown, rng.integers(0, 2, n)]
        mirrored, sign = rng.random((n, 1, 1)) < 0.5, rng.choice([-1, 1], (n, 1, 1))
        top, left = first_row + rng.integers(0, 6, (n, 1, 1)), rng.integers(0, 14, (n, 1, 1))
        drawn = sign * np.where(mirrored, glyph[:, :, ::-1], glyph)
        drawing[image, top + cell[:, None], left + cell] = drawn
    ground, contrast = rng.uniform(90, 160, (n, 1, 1, 3)), rng.uniform(40, 90, (n, 1, 1, 3))
    noise = rng.uniform(10, 40, (n, 1, 1, 1)) * rng.standard_normal((n, 16, 16, 3), np.float32)
    return (ground + contrast * drawing[..., None] + noise).clip(0, 255).astype(np.uint8), labels


def read_image(path, size):
    """Decode an image file to uint8 (size, size, 3): upright, its centre square, on white.

    Metadata (EXIF, colour profile, text) never decides whether an image can be read; for that,
    Pillow's limits on the text in PNG files are lifted for the whole process. Raises what Pillow
    raises for a file that is no image or has more than 179 million pixels, and ValueError for grey
    images of more than 8 bits.
    """
    from PIL import Image, ImageOps, PngImagePlugin
    Image.init()
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 1 << 30
    with Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN]) as image:
        image.draft("RGB", (size, size))  # decodes a JPEG at the smallest scale that is large enough
        if image.mode[0] in "IF":
            raise ValueError("more than 8 bits a channel, convert it to 8")
        plain, turn = image.convert("RGBA" if "A" in image.mode or "transparency" in image.info else "RGB"), None
        with contextlib.suppress(Exception):  # broken EXIF raises many kinds of exceptions
            turn = image.getexif().get(0x0112)  # asked after loading, which turns a TIFF itself
        if plain.mode == "RGBA" and not (image.format == "BMP" and plain.getextrema()[3] == (0, 0)):
            plain = Image.alpha_composite(Image.new("RGBA", plain.size, "white"), plain)
        plain = plain.convert("RGB")  # drops the alpha, also of a BMP that leaves it empty, as many do
        plain = ImageOps.fit(plain, (size, size), Image.Resampling.BILINEAR)
    turns = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
             6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"}
    return np.array(plain.transpose(Image.Transpose[turns[turn]]) if turn in turns else plain)


def file_number(path):
    """A number that changes when a file does, also where its size and its time stay the same."""
    found = os.stat(path)
    return derive_seed(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


def read_cache(path, size):
    """Read what `decode` wrote: two numbers of each image, int64 (N, 2), and the images, (N, ...).

    Nothing where the file is missing or was cut off.
    """
    count, rest = divmod(path.stat().st_size if path.exists() else 0, size * size * 3 + 16)
    if rest or not count:
        return np.empty((0, 2), np.int64), []
    images = np.memmap(path, np.uint8, "c", shape=(count, size, size, 3))
    return np.fromfile(path, np.int64, offset=images.nbytes).reshape(-1, 2), images


def decode(files, size, path):
    """Decode image files into the file `path`, once. Later runs find them there.

    Behind the images the file holds two numbers for each: its `file_number`, and one that stands
    for its pixels. Images whose files have not changed are copied. Returns images, uint8 (N, size,
    size, 3), mapped from the file, and the numbers of their pixels, int64 (N,). Raises UserError
    that lists files that are no images. Errors of the disk and of memory are raised as they are.
    """
    def read(file, number):
        try:
            pixels = done[number] if number in done else read_image(file, size)
        except Exception as error:  # decoders raise many kinds; all bad files are listed at once
            if isinstance(error, MemoryError) or getattr(error, "errno", None):
                raise
            bad.append(f"{file} ({error})")
            pixels = np.empty(0, np.uint8)
        return pixels.tobytes()
    with lock(path.parent, wait=True):  # another process may be decoding the same files
        numbers = [file_number(file) for file in files]
        known, images = read_cache(path, size)
        if known[:len(files), 0].tolist() != numbers:
            done, bad, pixel_numbers, shown = dict(zip(known[:, 0].tolist(), images)), [], [], time.monotonic()
            with whole_file(path) as temporary, open(temporary, "wb") as output, ThreadPoolExecutor() as pool:
                for start in range(0, len(files), 256):  # part by part, so that memory stays small
                    if time.monotonic() - shown > 5:
                        shown = time.monotonic()
                        print(f"decoding {start} of {len(files)} images")
                    part = slice(start, start + 256)
                    for pixels in pool.map(read, files[part], numbers[part]):
                        output.write(pixels)
                        pixel_numbers.append(int.from_bytes(hashlib.sha256(pixels).digest()[:7], "big"))
                if bad:
                    raise UserError(f"{len(bad)} files are no images that can be used, repair or remove them: "
                                    f"{'; '.join(sorted(bad)[:10])}")
                output.write(np.array([numbers, pixel_numbers], np.int64).T.tobytes())
            known, images = read_cache(path, size)
    return torch.from_numpy(images[:len(files)]), known[:len(files), 1]


def list_class(folder, skipped):
    """List the images in and below the folder of a class. What is skipped is counted by its reason.

    folder: a Path. skipped: a Counter of reasons. Returns paths, as text. OSError passes.
    """
    def fail(error):
        raise error
    images = []
    for place, folders, names in os.walk(folder, onerror=fail):
        linked = [name for name in folders if Path(place, name).is_symlink()]
        skipped["linked folders"] += len(linked)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        for name in sorted(names):
            path = Path(place, name)
            if name.startswith("."):
                skipped["hidden"] += 1
            elif path.suffix.lower() not in SUFFIXES:
                skipped[path.suffix.lower() or "no suffix"] += 1
            elif not path.is_file():
                skipped["links that lead nowhere" if path.is_symlink() else "no file"] += 1
            else:
                images.append(str(path))
    return images


def list_folder(root):
    """List the images below root/<class>/. Returns ({class: files}, a Counter of what is skipped).

    Skipped are hidden files and folders, files that are no images by their suffix, links that lead
    nowhere, and classes that are linked twice. The accents in names of classes are composed (NFC),
    since systems write them in two ways. A class without any image raises UserError.
    """
    found, skipped, seen = {}, Counter(), {root.resolve(), *root.resolve().parents}
    for folder in sorted(root.iterdir()):
        if folder.name.startswith((".", "__MACOSX")):
            skipped["hidden"] += 1
        elif not folder.is_dir():
            dead = folder.is_symlink() and not folder.exists()
            skipped["links that lead nowhere" if dead else "outside a class"] += 1
        elif folder.resolve() in seen:
            skipped["linked twice"] += 1
        else:
            seen.add(folder.resolve())
            own = Counter()
            images = list_class(folder, own)
            if not images:
                raise UserError(f"the class {folder} has no image that can be read (in it: "
                                f"{count_text(own) or 'nothing'}): convert its files to JPEG or PNG, or "
                                f"remove the class from training and test")
            found.setdefault(unicodedata.normalize("NFC", folder.name), []).extend(images)
            skipped += own
    return found, skipped


def count_text(counter):
    """Write a Counter as text: "3 .txt, 1 hidden"."""
    return ", ".join(f"{count} {name}" for name, count in counter.most_common() if count)


def list_images(name, data_dir):
    """List the files of Food-101, or of a folder with train/<class>/* and test/<class>/* (or val/).

    Returns {class: files} for training and for test, and a Counter of what was skipped. Raises
    UserError.
    """
    if name == "food101":
        root, listed = Path(data_dir, "food-101"), []
        if not (root / "meta").exists():
            fetch("Food101", data_dir)
        for part in ("train", "test"):
            of_class = load_json(root / "meta" / f"{part}.json")
            listed.append({c: [f"{root}/images/{file}.jpg" for file in of_class[c]] for c in of_class})
        return *listed, Counter()
    root = Path(name)
    if not root.is_dir():
        raise UserError(f"--dataset {name}: neither a folder nor one of cifar10, cifar100, food101, synthetic")
    inside = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    tests = [part for part in ("test", "val") if part in inside]
    if "train" not in inside or not tests:
        raise UserError(f"{name} needs the folders train/<class>/ and test/<class>/ (or val/). It holds "
                        f"{'the folders ' + ', '.join(inside[:8]) if inside else 'no folder'}"
                        f"{' and more' * (len(inside) > 8)}: rename or move them, or name another folder. "
                        f"The README tells how to set test images apart (\"Your own images\")")
    train, skipped = list_folder(root / "train")
    if len(tests) > 1:
        print(f"{name} has both test/ and val/: the one whose classes fit better is used, or else test/")
    listed = [list_folder(root / part) for part in tests]
    test, skipped_there = min(listed, key=lambda listing: len(listing[0].keys() ^ train.keys()))
    for part, classes, others in (("train", train, test), (tests[listed.index((test, skipped_there))], test, train)):
        if missing := sorted(others.keys() - classes.keys()):
            raise UserError(f"{root / part} lacks classes that the other part has: {', '.join(missing[:10])}")
    if len(train) < 2:
        raise UserError(f"{name} needs images of two classes or more, in train/<class>/: there are {len(train)}")
    return train, test, skipped + skipped_there


def fetch(kind, data_dir, **options):
    """A data set of torchvision.datasets, downloaded if it is missing. Raises UserError."""
    import torchvision.datasets
    try:
        with lock(data_dir, wait=True):  # one process downloads, the others wait
            return getattr(torchvision.datasets, kind)(data_dir, download=True, **options)
    except (RuntimeError, OSError, EOFError) as error:
        raise UserError(f"{kind} could not be downloaded to {data_dir} ({error}): unpack its archive there, "
                        f"or name its place with --data-dir") from None


def load_dataset(name, data_dir="data", image_size=None, limit_train=None, device=torch.device("cpu")):
    """Load a data set: "cifar10", "cifar100", "food101", "synthetic", or the path of a folder.

    A folder has images in train/<class>/ and in test/<class>/ or val/<class>/. data_dir: where data
    sets are kept and downloaded to; decoded images go to its folder `cache`, or where it cannot be
    written, to data/cache. image_size: the side in pixels, by default IMAGE_SIZE; arrays of pixels
    have no other. limit_train: use only the first images of a fixed shuffle that keeps the
    proportions of the classes. Both splits are in the order of that shuffle. device: a GPU takes
    the images if it has three times the room.

    Returns the training Split, the test Split, and the names of the classes. Raises UserError.
    """
    own_size = IMAGE_SIZE.get(name, 32)
    size = image_size or own_size
    if name in ARRAYS and size != own_size:
        raise UserError(f"--image-size {size}: the images of {name} have {own_size} pixels")
    if name == "synthetic":
        classes, parts = range(10), [synthetic_images(count, seed) for seed, count in enumerate(SYNTHETIC, 1)]
    elif name in ARRAYS:
        sets = [fetch(name.upper(), data_dir, train=train) for train in (True, False)]
        classes, parts = sets[0].classes, [(part.data, part.targets) for part in sets]
    else:
        *listed, skipped = list_images(name, data_dir)
        classes, parts = sorted(listed[0]), []
        for files_of in listed:
            pairs = [(file, label) for label, c in enumerate(classes) for file in files_of[c]]
            parts.append(zip(*pairs))
        if skipped:
            print(f"{name}: skipped {count_text(skipped)}")
    splits = []
    for part, (images, labels), limit in zip(("train", "test"), parts, (limit_train, None)):
        order, digest = balanced_order(labels)[:limit], ""
        labels = torch.tensor(labels)[order]
        if name in ARRAYS:
            images = torch.from_numpy(images)[order]
        else:
            place = Path(data_dir if os.access(data_dir, os.W_OK) or not os.path.exists(data_dir) else "data")
            root = Path(data_dir if name == "food101" else name).resolve()
            stem = f"{Path(name).resolve().name}-{derive_seed(str(root)):016x}-{size}-{part}.bin"
            images, numbers = decode([images[row] for row in order], size, place / "cache" / stem)
            digest = f"{derive_seed(list(classes), labels.tolist(), numbers.tolist()):x}"
        if device.type == "cuda" and 3 * images.nbytes < torch.cuda.mem_get_info(device)[0]:
            images = images.to(device)
        splits.append(Split(images, labels, digest))
    return *splits, list(classes)


# ---- Devices -------------------------------------------------------------------------------------


@cache
def graph_place(device):
    """What all CUDA graphs of a device share. Only one of them runs at a time.

    stream: where they are captured. pool: their memory. works: False once a capture has failed.
    """
    return SimpleNamespace(stream=torch.cuda.Stream(device), pool=torch.cuda.graph_pool_handle(), works=True)


def graphed(step, device):
    """On CUDA, turn `step(x, y, config)` into CUDA graphs. On other devices return it as it is.

    A step of a ResNet20 is a thousand kernels of two microseconds each (H100, batch 128). A graph
    launches them all at once. For each shape of x and each config, the first call runs `step` as
    it is, the second captures a graph, later calls replay it. `step` must not wait for the device.
    The next call may overwrite the tensor that is returned. Where capturing fails, and for all
    after the first 100 (in a large space), `step` is used as it is, since each graph takes memory.
    """
    if device.type != "cuda":
        return step
    place, seen, captured, static_inputs = graph_place(device), set(), {}, {}

    def run(x, y, *step_args):
        shape, key = tuple(x.shape), (tuple(x.shape), step_args)
        if place.works and len(captured) < 100 and key in seen and key not in captured:
            inputs = static_inputs.setdefault(shape, (torch.empty_like(x), torch.empty_like(y)))
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool=place.pool, stream=place.stream,
                                      capture_error_mode="thread_local"):
                    result = step(*inputs, *step_args)
                captured[key] = graph, result
            except RuntimeError as error:
                place.works = False
                print(f"no CUDA graphs here, going on without ({str(error).splitlines()[0]})", flush=True)
        if key not in captured:
            seen.add(key)
            place.stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(place.stream):
                result = step(x, y, *step_args)
            torch.cuda.current_stream(device).wait_stream(place.stream)
            return result
        for static, value in zip(static_inputs[shape], (x, y)):
            static.copy_(value)
        graph, result = captured[key]
        graph.replay()
        return result
    return run


def keep_freed_memory():
    """Tell the C library, if it is glibc, to keep memory that torch frees.

    Otherwise the kernel takes the pages back and fills them with zeros again in every step. That is
    half the time of a bf16 step on two cores with AVX512-BF16, and up to 15 % in float32 with AVX2.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        # M_MMAP_THRESHOLD: 1 GiB, or the 32 MiB that older versions allow
        if libc.mallopt(-3, 1 << 30) or libc.mallopt(-3, 1 << 25):
            libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: never shrink the heap


def pick_device(name="auto", number=0):
    """The torch.device of this name. "auto" takes CUDA, MPS or the CPU: the first that can compute.

    number: of this process on this machine; processes share the GPUs in turn. Raises UserError.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    candidates = [kind for kind in there if there[kind]] if name == "auto" else [name]
    for candidate in candidates:
        try:
            device = torch.device(candidate)
            if device.type == "cuda" and device.index is None:
                device = torch.device("cuda", number % max(1, torch.cuda.device_count()))
            torch.ones(8, device=device).mul(2).sum().item()  # torch has no kernels for some GPUs
            return device
        except (RuntimeError, AssertionError, ImportError) as error:
            problem = f"--device {candidate} cannot be used here ({str(error).splitlines()[0]})"
            if name != "auto":
                raise UserError(f"{problem}: use auto, cpu or another") from None
            print(f"{problem}, going on without", flush=True)


def pick_amp(name, device):
    """The mixed precision for a device: "bf16", "fp16" or "off". Raises UserError if it has no such.

    "auto" takes bf16 on GPUs that have it, fp16 on older ones, "off" on MPS. On a CPU it takes bf16
    with AMX or AVX512-BF16 and else "off", since bf16 is then up to 11 times slower than float32.
    """
    cuda = device.type == "cuda"
    has_bf16 = cuda and torch.cuda.get_device_capability(device)[0] >= 8
    if (name == "fp16" and not cuda) or (name == "bf16" and cuda and not has_bf16):
        raise UserError(f"--amp {name} does not work on this device ({device.type}): use auto or off")
    if name != "auto":
        return name
    if device.type == "cpu":
        with contextlib.suppress(OSError):  # only Linux has this file
            has_bf16 = re.search(r"\b(amx_bf16|avx512_bf16)\b", Path("/proc/cpuinfo").read_text())
    return "bf16" if has_bf16 else "fp16" if cuda else "off"


# ---- Processes and files -------------------------------------------------------------------------

# Under torchrun several processes run the same script. RANK is the number of this process,
# LOCAL_RANK its number on this machine, WORLD how many there are.
RANK, LOCAL_RANK, WORLD = 0, 0, 1
if dist.is_torchelastic_launched():  # torchrun started this; the variables alone may be left over
    RANK, LOCAL_RANK, WORLD = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))


class LabelledOutput(io.TextIOBase):
    """Standard output of one of several processes: every line begins with the number of its rank."""

    def __init__(self, stream):
        self.stream, self.begun = stream, ""

    def write(self, text):
        *lines, self.begun = (self.begun + text).split("\n")
        for line in lines:
            self.stream.write(f"rank {RANK}: {line}\n")
        return len(text)


def gather(value):
    """The values of all ranks, a list in their order. It is all that processes do together.

    A rank that fails before it comes here makes the others wait until torchrun ends them.
    """
    if WORLD == 1:
        return [value]
    if not dist.is_initialized():  # another rank may train for days before it comes here
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    values = [None] * WORLD
    dist.all_gather_object(values, value)
    return values


def lock(folder, wait):
    """Make a folder and lock it for this process. Returns an ExitStack whose end unlocks it.

    The end of the process unlocks it too. A folder that another process has locked is waited for,
    or raises UserError. Where there are no locks (Windows, some network disks), go on without.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    held = contextlib.ExitStack()
    try:
        import fcntl
        handle = os.open(folder, os.O_RDONLY)
        held.callback(os.close, handle)
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder} is in use by another run: wait for it or choose another --out") from None
    except (ImportError, OSError) as error:
        if not wait:  # says so once, for --out
            print(f"no locks here ({error}): start no second run in a folder")
    return held


@contextlib.contextmanager
def whole_file(path):
    """Write a file whole or not at all. Gives the name of a temporary file for it.

    When the block ends, the temporary file takes the name `path`; after an exception it is deleted.
    """
    temporary = Path(f"{path}.rank{RANK}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def visible_files(folder, pattern):
    """The files in a folder that match a pattern, sorted. Hidden ones, such as macOS's ._*, are not."""
    return sorted(path for path in Path(folder).glob(pattern) if not path.name.startswith("."))


def save_json(path, data):
    """Write a dict as strict JSON: a line for each key, and for each entry of a list of entries.

    NaN raises ValueError.
    """
    lines = []
    for key, value in data.items():
        text = json.dumps(value, allow_nan=False)
        if isinstance(value, list) and value and isinstance(value[0], (dict, list)):
            entries = ",\n    ".join(json.dumps(entry, allow_nan=False) for entry in value)
            text = f"[\n    {entries}\n  ]"
        lines.append(f"  {json.dumps(key)}: {text}")
    with whole_file(path) as temporary:
        temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def load_json(path, key=None):
    """Read a JSON object. key: an accuracy that every entry of its `results` must have.

    Raises UserError where the file is no JSON object, or has no such results.
    """
    try:
        data = dict(json.loads(Path(path).read_bytes()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not a JSON object, or damaged ({error}): make it anew, or move it away") from None
    try:
        if key and not (data["results"] and all(r["config"] and math.isfinite(r[key]) for r in data["results"])):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} has no results with `config` and `{key}`: name a file that has") from None
    return data


def save_checkpoint(path, state):
    """Write a dict of tensors and plain values, whole or not at all."""
    buffer = io.BytesIO()  # torch.save into a full disk would not raise OSError
    torch.save(state, buffer)
    with whole_file(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_checkpoint(path):
    """Read what `save_checkpoint` wrote; None if there is none. Raises UserError if it is damaged."""
    if not Path(path).exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {"args": {}, **state}
    except (OSError, MemoryError):
        raise
    except Exception:  # a damaged file makes zip and pickle raise many kinds
        raise UserError(f"{path} is damaged: delete it to start over") from None


# What determines a training, beside its configuration and its seed. Every file of a run holds these
# as `args`. A search adds its own options, and `load_data` what stands for the images.
SETTINGS = ("dataset", "image_size", "layers", "scales", "network", "epochs", "batch_size", "lr", "warm_up",
            "weight_decay", "limit_train", "amp")


def other_settings(found, settings):
    """Name the options that differ between the settings `found` in a file and these. "" if none."""
    names = {"data_digest": "--dataset (other images)", "train_digest": "--dataset (other training images)",
             "network": "--network (another network)"}
    differ = []
    for name, value in settings.items():
        if name == "network" and found.get("image_size") != settings.get("image_size", found.get("image_size")):
            continue  # the first layers of the ResNet20 follow from the images' size
        if found.get(name) != value:
            option = f"--{name.replace('_', '-')} ({found.get(name)} there, {value} here)"
            differ.append(names.get(name) or option)
    return ", ".join(differ)


def other_data(found, settings):
    """As `other_settings`, but only what a search shares with the trainings that judge or follow it."""
    names = ["dataset", "data_digest", "image_size", "layers", "scales", "network"]
    if found.get("limit_train") == settings["limit_train"]:
        names.append("train_digest")
    return other_settings(found, {name: settings[name] for name in names if name in settings})


def refuse_other_settings(found, settings, elsewhere="choose another --out"):
    """Raise UserError where a run has other settings than these, and name all its files.

    found: {path: what lies in the file, with the settings as "args"}. elsewhere: an advice.
    """
    differ = {}
    for path, content in found.items():
        if text := other_settings(content.get("args", {}), settings):
            differ[path] = text
    if differ:
        path, text = next(iter(differ.items()))
        files = [file for run in differ for file in (run, run.with_suffix(".pt")) if file.exists()]
        parents = [file.parent for file in files]
        files = dict.fromkeys(f"{shlex.quote(str(file.parent))}/" if parents.count(file.parent) > 8
                              else shlex.quote(str(file)) for file in files)
        raise UserError(f"{path} is of a run with other settings: {text}. Use the same settings, {elsewhere}, or "
                        f"delete the files of that run: {' '.join(files)}")


# ---- Results -------------------------------------------------------------------------------------


def pack_right(right):
    """Write which images are right, bool (N,), as a short text: base64 of its bits."""
    return base64.b64encode(np.packbits(np.asarray(right))).decode()


def unpack_right(text, count):
    """Read what `pack_right` wrote, for `count` images: a bool array (count,)."""
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=count).astype(bool)


def describe(configs, args, classes):
    """What follows from each configuration: a list of dicts with config, macs and params.

    Raises UserError where the network cannot run one of them. Moving a layer to the next lower
    resolution must change the cost. If it does not, the network lacks that layer or ignores its
    config, and that is a UserError too.
    """
    with torch.device("meta"):
        params = sum(p.numel() for p in make_network(args, classes).parameters())
        network = make_network(args, classes, nn.Identity).eval()  # norms cost no multiply-adds
    macs = {}
    for config in configs:
        try:
            if not macs:
                with torch.device("meta"), torch.no_grad():
                    shape = network(torch.empty(1, 3, args.image_size, args.image_size), config).shape
                if shape != (1, classes):
                    raise ValueError(f"the output for one image has the shape {tuple(shape)}, not (1, {classes})")
            macs[config] = count_macs(config, network, args.image_size)
        except Exception as error:
            raise UserError(f"--network {args.network_path or 'ResNet20'} cannot run {config_text(config)} on images "
                            f"of {args.image_size} pixels: {type(error).__name__}: {error}") from None
    for config in configs:
        for part in range(len(config) - 1):
            moved = *config[:part], config[part] - 1, config[part + 1] + 1, *config[part + 2:]
            if macs.get(moved) == macs[config]:
                raise UserError(f"--network {args.network_path or 'ResNet20'}: {config_text(config)} and "
                                f"{config_text(moved)} cost the same, so layer {sum(config[:part + 1])} is not there, "
                                f"does not go by config, or sees a single pixel at these images' size")
    return [{"config": list(config), "macs": macs[config], "params": params} for config in configs]


def seconds_of_step(config, args, classes):
    """Take four training steps here, and return the shorter of the last two, in seconds."""
    learner = Learner(make_network(args, classes), args.device, args.amp)
    images = torch.zeros(args.batch_size, args.image_size, args.image_size, 3, dtype=torch.uint8)
    x, y = normalise(images).to(args.device), torch.zeros(args.batch_size, dtype=torch.int64).to(args.device)
    seconds = []
    for _ in range(4):  # on CUDA the second captures a graph
        began = time.monotonic()
        learner.train(x, y, config, 0.0).tolist()  # waits for the device
        seconds.append(time.monotonic() - began)
    return min(seconds[2:])


def duration(seconds):
    """Write a time as people do: "40 s", "35 min", "3.2 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def near_the_best(scores, count):
    """How many scores lie within two standard errors of the best. Returns (how many, two errors).

    scores: accuracies, fractions. count: the images that each was measured on. The standard error
    is that of the best score by this number. Two of it are a fraction, or None if the count is 0.
    """
    scores = list(scores)
    if not count or not scores:
        return len(scores), None
    best = max(scores)
    margin = 2 * math.sqrt(max(0.0, best * (1 - best)) / count)
    return sum(score >= best - margin for score in scores), margin


def steps_per_epoch(split, batch_size):
    """The training steps of an epoch. Raises UserError when there is none."""
    if len(split.labels) < batch_size:
        raise UserError(f"--batch-size {batch_size} is more than the {len(split.labels)} images that train, "
                        f"in a search half of all: lower it")
    return len(split.labels) // batch_size


def check_finite(learners, args):
    """Raise UserError where a loss or an output of a learner was not finite."""
    if not all(learner.finite.item() for learner in learners):
        raise UserError(f"training has left the finite numbers: lower --lr (now {args.lr:g}) or --weight-decay (now "
                        f"{args.weight_decay:g})")


def log_epoch(epoch, epochs, args, measures, began, steps, learners, label=""):
    """Print the line of an epoch, and return its entry of the history.

    measures: {name: mean over the epoch}, with "loss". began: time.monotonic() at its start.
    steps: in an epoch. learners: whose weights were trained. label: what the line begins with.
    Raises UserError when a loss is not finite.
    """
    check_finite(learners, args)
    seconds = time.monotonic() - began
    lr = cosine_lr(epoch * steps, epochs * steps, args.lr, args.warm_up)
    text = "  ".join(f"{name} {value:.4f}" for name, value in measures.items())
    speed, left = steps * args.batch_size / seconds, (epochs - epoch - 1) * seconds / 60
    print(f"{label}epoch {epoch + 1}/{epochs}  {text}  lr {lr:.4f}  {speed:.0f} images/s  {left:.1f} min left")
    rounded = {name: round(value, 6) for name, value in {**measures, "lr": lr}.items()}
    return {"epoch": epoch + 1, **rounded, "seconds": round(seconds, 2)}


def print_table(header, rows):
    """Print rows of strings and numbers in aligned columns. None shows as a dash."""
    cells = [["-" if value is None else str(value) for value in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        words = [word.rjust(width) for word, width in zip(row, widths)]
        print("  ".join([row[0].ljust(widths[0]), *words[1:]]).rstrip())


def print_results(results, default, front, key):
    """Print the five best results, the default, and the Pareto set.

    results: the best first. default: one of them or None. front: configurations, as lists.
    """
    rows = []
    for place, r in enumerate(results, 1):
        if place <= 5 or r is default or r["config"] in front:
            rows.append([config_text(r["config"]) + " default" * (r is default), f"{r['macs'] / 1e6:.1f}",
                         f"{r[key]:.4f}", place, "*" if r["config"] in front else ""])
    print()
    print_table(["configuration", "M multiply-adds", key.replace("_", " "), "place", "Pareto"], rows)


def write_results(args, stage, name, classes, results, key, counts, seconds, **extra):
    """Write the JSON of a stage, `name`.json in --out, and return its content.

    results: entries of `describe`, each with an accuracy `key`. counts: the numbers of images that
    train, score and test. seconds: of all training. extra: further keys.
    """
    results = sorted(results, key=lambda r: -r[key])
    default = next((r for r in results if tuple(r["config"]) == args.default), None)
    device = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else args.device.type
    size = math.comb(args.layers - 1, args.scales - 1)
    data = {
        "schema": 1, "stage": stage, "dataset": args.settings["dataset"], "image_size": args.image_size,
        "num_classes": len(classes), "n_train": counts[0], "n_val": counts[1], "n_test": counts[2],
        "space": {"layers": args.layers, "scales": args.scales, "size": size}, "args": args.settings,
        "env": {"torch": torch.__version__, "device": device, "amp": args.amp},
        "seconds": round(seconds, 2), "classes": classes, "results": results, "best": results[0],
        "default": default, "pareto": [r["config"] for r in pareto(results, key)], **extra}
    save_json(args.out / f"{name}.json", data)
    print(f"wrote {args.out / name}.json")
    return data


# ---- What every search shares --------------------------------------------------------------------


def add_sampler(add):
    """The option --sampler of a search."""
    add("--sampler", choices=["uniform", "cost"], default="uniform", help="how a step draws its configuration: "
        "uniform (default, the paper's) or cost, in proportion to multiply-adds")


def begin_search(args, stage, *options, step_cost=1.0):
    """Everything that comes before the first epoch. Returns a namespace.

    It has stage, name (of its files), checkpoint (a path), state (what the checkpoint holds, or None),
    classes, configs, described (`describe` of each), macs (n,), training and scoring (the halves of
    the training images), and steps (of an epoch; the smaller half decides).

    options: the names of the script's own options that determine the result. step_cost: how long a
    step takes, where training one configuration takes 1. Under torchrun each process searches with
    a seed of its own. Raises UserError, also where a run with other settings is there.
    """
    args.seed += RANK
    args.settings |= {name: getattr(args, name) for name in ("seed", *options)}
    name = f"{stage}-cost" if getattr(args, "sampler", None) == "cost" else stage
    name += f"-seed{args.seed}" if args.seed else ""
    checkpoint, written = args.out / f"{name}.pt", args.out / f"{name}.json"

    def earlier_run():
        state = load_checkpoint(checkpoint)
        found = {checkpoint: state} if state else {}
        if written.exists():
            found[written] = load_json(written)
        refuse_other_settings(found, args.settings)
        return state
    earlier_run()  # refused now, since decoding images may take long
    train, _, classes = load_data(args)
    state = earlier_run()  # and again, now that the images are known
    training, scoring = split_in_halves(train, args.seed)
    for label, class_name in enumerate(classes):
        if not ((training.labels == label).any() and (scoring.labels == label).any()):
            raise UserError(f"class {class_name} has too few training images "
                            f"({int((train.labels == label).sum())}) for a search, which trains with one half of "
                            f"them and scores with the other: add some, or raise --limit-train")
    done = f", goes on after epoch {len(state['history'])}" if state else ""
    print(f"{name} trains on {len(training.labels)} images and scores on {len(scoring.labels)}, "
          f"{len(classes)} classes, on {args.device}, --amp {args.amp}{done}")
    configs = pooling_configs(args.layers, args.scales)
    described = describe(configs, args, len(classes))
    search = SimpleNamespace(
        stage=stage, name=name, checkpoint=checkpoint, state=state, classes=classes, configs=configs,
        described=described, macs=np.array([d["macs"] for d in described]), training=training, scoring=scoring,
        steps=steps_per_epoch(scoring, args.batch_size))
    announce(search, args, step_cost)
    return search


# A search is called too short below so many steps for each configuration (and model of a mixture). On
# the made-up images two seeds of a search agree with a tau of 0.2 after 1 step for each, 0.8 after 10
# and 0.9 after 61 by cost, and of 0.2, 0.5 and 0.8 by uniform draws (results/tables.md).
ENOUGH_STEPS = 30


def announce(search, args, step_cost):
    """Say how many steps a search takes, how long, and what to do if they are too few to rank by."""
    models, count = getattr(args, "models", 1), len(search.configs)
    left = args.epochs * models - (len(search.state["history"]) if search.state else 0)
    total, each = args.epochs * models * search.steps, args.epochs * search.steps / count
    if left == 0:
        return
    seconds = step_cost * seconds_of_step(args.default, args, len(search.classes))
    drawn = draw_probabilities(search.macs, getattr(args, "sampler", "uniform")) @ search.macs
    seconds *= drawn / search.macs[search.configs.index(args.default)]
    print(f"{total} steps of {args.batch_size} images, {each:.1f} for each of {count} configurations"
          f"{' and each model' * (models > 1)}; what is left takes roughly {duration(left * search.steps * seconds)}")
    if each < ENOUGH_STEPS:
        images, batch = len(search.scoring.labels), args.batch_size
        while batch >= 32 and images // batch < 20:  # smaller batches make more steps of few images
            batch //= 2
        enough = math.ceil(ENOUGH_STEPS * count / (images // batch))
        needed = enough * models * (images // batch) * seconds * batch / args.batch_size
        print(f"That is too little to rank them by. Better stop this (Ctrl-C), delete {search.name}.pt if it is there, "
              f"and take --batch-size {batch} --epochs {enough}, which takes roughly {duration(needed)} here")


def make_learner(search, args, *number, kind=Learner, norm=batch_statistics_norm):
    """A SuperNet as a Learner, or as another `kind`. --seed and `number` decide its first weights."""
    torch.manual_seed(derive_seed("weights", args.seed, *number))
    network = make_network(args, len(search.classes), norm)
    return kind(network, args.device, args.amp, args.weight_decay)


# A search chooses nothing if at least this part of its scores lie within two standard errors of the
# best. So do our three searches on 720 photos, whose best score changes with the seed, and one of six
# on Food-101; on CIFAR-10 and CIFAR-100 none does (results/README.md).
TIED_PART = 0.75


def finish_search(search, args, learners, history, own_keys, **extra):
    """Score what was trained on the whole scoring half, write the JSON, print, return its content.

    own_keys: for each configuration a dict that its result holds beside the score. "steps" says how
    often it was trained. "model" names the learner that scores it; without it that is the first.
    extra: further keys of the JSON.
    """
    began = shown = time.monotonic()
    results = []
    for number, (config, described, own) in enumerate(zip(search.configs, search.described, own_keys), 1):
        if own["steps"]:
            score = learners[own.get("model", 0)].score
            right = evaluate(score, search.scoring, config, args.device, args.batch_size)
            results.append({**described, "val_acc": round(right.double().mean().item(), 6), **own})
        if time.monotonic() - shown > 10:
            shown = time.monotonic()
            left = (shown - began) * (len(search.configs) / number - 1)
            print(f"scored {number} of {len(search.configs)}, {duration(left)} left")
    check_finite(learners, args)
    seconds = sum(entry["seconds"] for entry in history) + time.monotonic() - began
    counts = len(search.training.labels), len(search.scoring.labels), 0
    near, margin = near_the_best([r["val_acc"] for r in results], len(search.scoring.labels))
    chooses = near < TIED_PART * len(results)
    rank = rank_by_truth(args.out / "single.json", args.settings, results, chooses)
    data = write_results(args, search.stage, search.name, search.classes, results, "val_acc", counts, seconds,
                         near_the_best=near, **({} if chooses else {"best": None}), rank=rank, **extra,
                         history=history)
    if len(results) < len(search.configs):
        print(f"{len(search.configs) - len(results)} configurations were never trained and are not ranked")
    if chooses:
        print_results(data["results"], data["default"], data["pareto"], "val_acc")
    print(f"{near} of {len(results)} scores lie within two standard errors of the best ({100 * margin:.1f} points, by "
          f"{len(search.scoring.labels)} images)" + ("" if chooses else ": this search tells nothing apart and "
          "chooses nothing; search longer, with more images, or train candidates with retrain.py --config"))
    if rank:
        keys = (("kendall_tau", 1), ("kendall_tau_macs", 1), ("regret", 100))
        tau, of_macs, regret = ("-" if rank[key] is None else f"{times * rank[key]:.2f}" for key, times in keys)
        print(f"{search.name}.json against single.json, {rank['n']} configurations: Kendall's tau {tau}, by "
              f"multiply-adds alone {of_macs}" + (f"; the truth of what it chose is {regret} points below the best"
                                                  if chooses else ""))
    return data


def rank_by_truth(path, settings, results, chooses=True):
    """How well a search ranks, by the test accuracies in a single.json. Returns a dict or None.

    kendall_tau: tau-b of its scores with the true accuracies. kendall_tau_macs: tau-b of
    multiply-adds with them. regret: the true accuracy of the best configuration minus that of the
    configuration with the best score, a fraction; None if the search chooses nothing. The result is
    None where there is no such file, where it knows fewer than half of the results, or where it is
    of other images, which one line says.
    """
    if not path.exists():
        return None
    try:
        single = load_json(path, "test_acc")
        if differ := other_data(single.get("args", {}), settings):
            raise UserError(f"{path} is of {differ}")
    except UserError as error:
        print(f"not compared: {error}")
        return None
    truth = {tuple(entry["config"]): entry["test_acc"] for entry in single["results"]}
    known = [r for r in results if tuple(r["config"]) in truth]
    if len(known) < max(2, len(results) / 2):
        return None
    true = [truth[tuple(r["config"])] for r in known]
    chosen = max(known, key=lambda r: r["val_acc"])
    return {"kendall_tau": kendall_tau([r["val_acc"] for r in known], true),
            "kendall_tau_macs": kendall_tau([r["macs"] for r in known], true),
            "regret": max(true) - truth[tuple(chosen["config"])] if chooses else None,
            "against": path.name, "n": len(known)}


# ---- Command line --------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def at_least(low, kind=int):
    """A type for argparse: a number of this kind, at least `low`, which float32 can hold."""
    def number(text):
        value = kind(text)
        if not value >= low:
            raise argparse.ArgumentTypeError(f"{text} must be at least {low:g}")
        if not value < 3e38:
            raise argparse.ArgumentTypeError(f"{text} must be below 3e38")
        return value
    return number


def parse(doc, add_options=lambda add: None, synthetic_epochs=7):
    """Read the command line and lock --out. Returns the options, with `settings` (SETTINGS) beside.

    doc: the docstring of the script. add_options(add): adds its own options. synthetic_epochs: the
    default of --epochs for the made-up images. Raises UserError.
    """
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--dataset", default="cifar10", help="cifar10 (default), cifar100, food101, synthetic, or a folder of images")
    add("--data-dir", default="data", help="folder where data sets are kept and downloaded to; default data")
    add("--out", type=Path, help="folder of the JSON files and checkpoints; default runs/<dataset>")
    add("--image-size", type=int, choices=[16, *range(32, 257, 32)], help="pixels; default 32, food101 128, "
        "synthetic 16")
    add("--epochs", type=at_least(1), help=f"passes over the images, in a mixture for each model; default 100, "
        f"synthetic {synthetic_epochs}")
    add("--batch-size", type=at_least(2), help="images per step; default 128 (paper), synthetic 64")
    add("--lr", type=at_least(1e-9, float), help="learning rate, falls along a cosine to 1%%; default 0.1 (paper), "
        "synthetic 0.015, to which it rises in the first fifth of the steps")
    add("--weight-decay", type=at_least(0, float), default=0.0, help="L2 penalty; default 0 (paper)")
    add("--seed", type=at_least(0), default=0, help="default 0; a search under torchrun adds the process's number")
    add("--network", type=Path, help="a Python file with DEFAULT and make_network (README, \"Your own network\"); "
        "default: the ResNet20")
    add("--layers", type=at_least(3), help="searched layers of the ResNet20; default 10")
    add("--scales", type=at_least(1), help="resolutions of the ResNet20; default 3")
    add("--device", default="auto", help="auto (default: cuda, then mps, then cpu) or a torch device")
    add("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto", help="mixed precision; default auto: what "
        "the GPU has; on a CPU bf16 where it has AMX or AVX512-BF16, else off")
    add("--limit-train", type=at_least(1), help="first N training images of a fixed, class-balanced shuffle")
    add_options(add)
    args = parser.parse_args()
    synthetic = args.dataset == "synthetic"  # few steps: at a rate of 0.1 some configurations would not begin to learn
    args.epochs = args.epochs or (synthetic_epochs if synthetic else 100)
    args.batch_size = args.batch_size or (64 if synthetic else 128)
    args.lr = args.lr or (0.015 if synthetic else 0.1)
    args.warm_up = 0.2 if synthetic else 0.0
    args.image_size = args.image_size or IMAGE_SIZE.get(args.dataset, 32)
    args.network_path, args.network_text = args.network, ""
    if args.network:
        if args.layers or args.scales:
            raise UserError("--layers and --scales are of the ResNet20: with --network, DEFAULT in that file decides")
        try:
            args.network_text = args.network.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--network {args.network} cannot be read: {error}") from None
        args.default, _ = read_network_file(args.network_text, args.network)
        args.layers, args.scales = sum(args.default), len(args.default)
        args.network = f"{derive_seed(args.network_text):x}"
    else:
        args.layers, args.scales = args.layers or 10, args.scales or 3
        args.default = default_config(args.layers, args.scales)
        most = min(args.layers, min(32, args.image_size).bit_length())
        if args.scales > most:
            raise UserError(f"--scales {args.scales}: {args.layers} layers and this image size allow {most}")
        with torch.device("meta"):
            shapes = [(name, *p.shape) for name, p in make_network(args, 10).named_parameters()]
        args.network = f"{derive_seed(shapes):x}"
    size = math.comb(args.layers - 1, args.scales - 1)
    if size > 20_000:
        raise UserError(f"{size} configurations are too many to score: {args.layers} layers at {args.scales} "
                        f"resolutions (DEFAULT in the file of --network, or --layers and --scales)")
    args.out = args.out or Path("runs", os.path.basename(os.path.abspath(args.dataset)))  # of a link its own name
    if args.out.resolve() in (Path(args.data_dir).resolve(), Path(args.data_dir, "cache").resolve()):
        raise UserError(f"--out {args.out} is where data sets are kept: choose another folder")  # both are locked
    args.device = pick_device(args.device, LOCAL_RANK)
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
    args.amp = pick_amp(args.amp, args.device)
    args.settings = {name: getattr(args, name) for name in SETTINGS if hasattr(args, name)}
    args.settings["dataset"] = Path(args.dataset).resolve().name
    args.out.mkdir(parents=True, exist_ok=True)  # each rank may have a disk of its own
    if RANK == 0:
        lock(args.out, wait=False)  # until the process ends, since nobody closes it
    return args


def keep_network_file(args):
    """Copy the file of --network to --out, so that `load_network` finds it beside the weights."""
    if args.network_text:
        with whole_file(args.out / NETWORK_COPY) as temporary:
            temporary.write_text(args.network_text)


def load_data(args):
    """The data set of --dataset, as from `load_dataset`. Adds to args.settings what stands for images."""
    data = load_dataset(args.dataset, args.data_dir, args.image_size, args.limit_train, args.device)
    args.settings["data_digest"] = data[1].digest
    if data[0].digest:  # arrays have none
        args.settings["train_digest"] = data[0].digest
    return data


def run_main(main):
    """Run the main function of a script. What a person can put right is one line on standard error."""
    with contextlib.suppress(AttributeError):  # a line at a time, and names that a terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    if WORLD > 1:
        sys.stdout = LabelledOutput(sys.stdout)
    code = 2
    try:
        keep_freed_memory()
        return main()
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not re.search("out of memory|can't allocate memory", str(error)):
            raise
        message = "out of memory: lower --batch-size, or choose another --device; the last checkpoint is kept"
    except BrokenPipeError:  # nobody reads the output any more, as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise SystemExit(141) from None
    except OSError as error:  # a full disk, a folder without permission
        message = f"{error}; put that right and run the same command again"
    except UserError as error:
        message = str(error)
    except KeyboardInterrupt:
        message, code = "stopped; the same command goes on, a training after its last finished epoch", 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    raise SystemExit(code)
