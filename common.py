"""What two or more of the scripts share: space, network, data, training step, runs, results, command line.

Most functions up to the training step take tensors and plain numbers, to be copied; the rest serves the scripts.
"Paper": Javan, Toews, Pedersoli, "Balanced Mixture of SuperNets for Learning the CNN Pooling Architecture", AutoML
2023, arXiv 2306.11982.
"""
import argparse
import contextlib
import ctypes
import hashlib
import io
import itertools
import json
import math
import os
import re
import sys
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.resnet import BasicBlock
from torchvision.ops import Conv2dNormActivation


class UserError(Exception):
    """Something a person can put right: shown as one line on standard error, exit code 2."""


# ---- Space (paper, section 3) ---------------------------------------------------------------------------------------

def pooling_configs(layers=10, scales=3):
    """All compositions of `layers` into `scales` positive parts, as tuples in lexicographic order.

    pooling_configs(10, 3) is the paper's space: 36 configurations, (1, 1, 8) first, (8, 1, 1) last."""
    return [tuple(end - start for start, end in itertools.pairwise((0, *cuts, layers)))
            for cuts in itertools.combinations(range(1, layers), scales - 1)]


def default_config(layers=10, scales=3):
    """The usual choice, parts as equal as they can be, larger ones first: (4, 3, 3) in a ResNet20."""
    return tuple(layers // scales + (part < layers % scales) for part in range(scales))


def config_text(config):
    """A configuration as people write it: (4, 3, 3) to "[4,3,3]"."""
    return "[" + ",".join(map(str, config)) + "]"


# ---- Network --------------------------------------------------------------------------------------------------------

# The norm of a SuperNet learns no scale and always uses the statistics of the batch: running averages over different
# paths would mix (paper, section 4). Networks trained alone have ordinary batch normalisation.
batch_statistics_norm = partial(nn.BatchNorm2d, affine=False, track_running_stats=False)


class ResNet20(nn.Module):
    """ResNet20 for small images (He et al., 2016) whose pooling is an argument: forward(x, config) (paper, section 3).

    x: (B, 3, S, S) normalised images; result: (B, classes) logits. A 2x2 max pooling stands before the first layer of
    each resolution but the first. config: by default `self.config`, at first the usual one; ValueError if it does not
    fit. image_size: S in pixels; from 64 on a first convolution, which is not searched, brings it to 32. layers: a 3x3
    convolution and layers - 1 residual blocks. norm: makes a normalisation of so many channels."""

    def __init__(self, classes=10, image_size=32, layers=10, norm=nn.BatchNorm2d):
        super().__init__()
        stride = max(1, image_size // 32)
        self.stem, channels = nn.Identity(), 3
        if stride > 1:
            self.stem, channels = Conv2dNormActivation(3, 16, 2 * stride - 1, stride, norm_layer=norm), 16
        self.layers = nn.ModuleList([Conv2dNormActivation(channels, 16, norm_layer=norm)])
        widths = np.repeat([16, 32, 64], default_config(layers, 3)).tolist()  # 16 x4, 32 x3, 64 x3: these never move
        for inputs, outputs in itertools.pairwise(widths):
            block = BasicBlock(inputs, outputs, norm_layer=norm)
            if inputs != outputs:
                block.downsample = Conv2dNormActivation(inputs, outputs, 1, norm_layer=norm, activation_layer=None)
            self.layers.append(block)
        self.head = nn.Linear(widths[-1], classes)
        self.config = default_config(layers)

    def forward(self, x, config=None):
        config = config or self.config
        if sum(config) != len(self.layers) or min(config) < 1:
            raise ValueError(f"configuration {config_text(config)} does not share out {len(self.layers)} layers")
        pooled = set(itertools.accumulate(config[:-1]))
        x = self.stem(x)
        for number, layer in enumerate(self.layers):
            if number in pooled:
                x = F.max_pool2d(x, 2)
            x = layer(x)
        return self.head(x.mean((2, 3)))


def make_network(args, classes, norm=nn.BatchNorm2d):
    """The network of every script: this is the place for another one ("Your own network" in the README).

    args: has image_size and layers; norm: as for ResNet20, `batch_statistics_norm` in a SuperNet."""
    return ResNet20(classes, args.image_size, args.layers, norm)


def count_macs(config, network=None, image_size=32):
    """Multiply-adds of one image in convolutions and linear layers: 40.8 million for (4, 3, 3).

    network: takes (x, config), on the "meta" device; by default a ResNet20 of 10 classes. image_size: in pixels."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        network = network or ResNet20(10, image_size, sum(config), nn.Identity)
        network(torch.empty(1, 3, image_size, image_size), config)
    return counter.get_total_flops() // 2


# ---- Data: every data set ends as uint8 images (N, H, W, 3) and labels ----------------------------------------------

class Split(NamedTuple):
    """Images, uint8 (N, H, W, 3) on any device or mapped from a file, and their labels, int64 (N,) on the CPU."""
    images: torch.Tensor
    labels: torch.Tensor


ARRAYS = "cifar10", "cifar100", "synthetic"  # these come as arrays of pixels, all others as files
IMAGE_SIZE = {"food101": 128, "synthetic": 16}  # pixels fed in; all others 32
SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".ppm", ".pgm", ".pbm", ".bmp", ".tif", ".tiff", ".webp", ".gif"}


def balanced_order(labels, seed=0):
    """A shuffle (int64 tensor) in which every prefix holds the classes in the proportions of the whole, nearly."""
    labels = np.asarray(labels)
    rng, position = np.random.default_rng(seed), np.empty(len(labels))
    order = rng.permutation(len(labels))
    for label in np.unique(labels):
        mine = order[labels[order] == label]
        position[mine] = (np.arange(len(mine)) + rng.random(len(mine))) / len(mine)
    return torch.from_numpy(np.argsort(position, kind="stable"))


def halves(split, seed=0):
    """Cut a split into two halves, stratified by class: one trains weights, one scores (paper, section 4)."""
    order = balanced_order(split.labels, seed + 1)
    return [Split(split.images[rows.to(split.images.device)], split.labels[rows]) for rows in order.tensor_split(2)]


SYNTHETIC = 6_000, 4_000  # training and test images
GLYPHS = ("010110100 110010010", "010010110 100101010", "011100100 001111000", "101100010 100101001",
          "100110100 110100100", "011000101 001010101", "000100111 000011011", "101001001 100100101",
          "100110001 001101001", "010001011 010110010")  # a class a string: its two glyphs, 3x3 cells row by row


def synthetic_images(n, seed):
    """Ten balanced classes on which it matters where a network pools: (uint8 (n, 16, 16, 3), int64 (n,)).

    A class is a pair of glyphs of 3x3 pixels. The upper half of an image shows five of its class, the lower half two of
    another, which do not count. `seed` draws the images, not the classes. Glyphs may differ in a single pixel, which an
    early pooling blurs. Which half they are in shows only to a wide view, which a network that pools late has late."""
    glyphs = np.array([[int(cell) for cell in pair.replace(" ", "")] for pair in GLYPHS]).reshape(10, 2, 3, 3) * 2 - 1
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % 10)
    others = (labels + rng.integers(1, 10, n)) % 10
    image, cell = np.arange(n)[:, None, None], np.arange(3)
    drawing = np.zeros((n, 16, 16))
    for shown, first in [(labels, 0)] * 5 + [(others, 8)] * 2:
        glyph = glyphs[shown, rng.integers(0, 2, n)]
        mirrored, sign = rng.random((n, 1, 1)) < 0.5, rng.choice([-1, 1], (n, 1, 1))
        top, left = first + rng.integers(0, 6, (n, 1, 1)), rng.integers(0, 14, (n, 1, 1))
        drawing[image, top + cell[:, None], left + cell] = sign * np.where(mirrored, glyph[:, :, ::-1], glyph)
    ground, contrast = rng.uniform(90, 160, (n, 1, 1, 3)), rng.uniform(40, 90, (n, 1, 1, 3))
    noise = rng.uniform(10, 40, (n, 1, 1, 1)) * rng.standard_normal((n, 16, 16, 3), np.float32)
    return (ground + contrast * drawing[..., None] + noise).clip(0, 255).astype(np.uint8), labels


def read_image(path, size):
    """Decode an image file to uint8 (size, size, 3): upright, shorter side resized, centre square, on white.

    What is attached to it (EXIF, colour profile, text) never decides whether it is read; for that Pillow's limits on
    the text of PNGs are lifted in the whole process. Raises what Pillow raises for no image or one of more than 179
    million pixels, and ValueError for grey ones of more than 8 bits."""
    from PIL import Image, ImageOps, PngImagePlugin
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 1 << 30
    with Image.open(path, formats=["JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF"]) as image:  # none that runs code
        image.draft("RGB", (size, size))  # a JPEG is decoded at the smallest scale that is large enough
        if image.mode[0] in "IF":
            raise ValueError("more than 8 bits a channel, convert it to 8")
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            plain = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        else:
            plain = image.convert("RGB")
        turn = None
        with contextlib.suppress(Exception):  # broken EXIF raises many kinds
            turn = image.getexif().get(0x0112)  # asked now, since a TIFF is turned when it is loaded
        plain = ImageOps.fit(plain.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
        turns = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270",
                 7: "TRANSVERSE", 8: "ROTATE_90"}  # of a square, so that it may come last
        return np.array(plain.transpose(Image.Transpose[turns[turn]]) if turn in turns else plain)


def decode(files, size, path):
    """Decode image files, in threads, into the file `path`, once: uint8 tensor (N, size, size, 3), mapped from there.

    Raises UserError that lists the files that are no images; an error of the disk or of memory is raised as it is."""
    bad = []

    def read(file):
        try:
            return read_image(file, size)
        except Exception as error:  # decoders raise many kinds; all bad files are listed before giving up
            if isinstance(error, MemoryError) or getattr(error, "errno", None):
                raise
            bad.append(f"{file} ({error})")
            return np.empty(0, np.uint8)
    shape = len(files), size, size, 3
    if not path.exists() or path.stat().st_size != math.prod(shape):  # missing, or cut short
        with whole_file(path) as temporary, open(temporary, "wb") as output, ThreadPoolExecutor() as pool:
            for start in range(0, len(files), 4096):  # part by part, so that images do not pile up in memory
                say(f"decoding {start} of {len(files)} images")
                output.writelines(pool.map(read, files[start:start + 4096]))
            if bad:
                raise UserError(f"{len(bad)} files are no images that can be used, repair or remove them: "
                                f"{'; '.join(sorted(bad)[:10])}")
    return torch.from_numpy(np.memmap(path, np.uint8, "c", shape=shape))


def list_folder(root):
    """The images below root/<class>/: ({class: files}, how many files and folders were skipped).

    Skipped: what is hidden, __MACOSX, no image by its suffix, and links to folders, unless to a class kept elsewhere.
    Names are composed (NFC), so that two ways to write an accent are one class. OSError is raised as it is."""
    found, skipped, seen = {}, 0, {root.resolve(), *root.resolve().parents}

    def fail(error):
        raise error
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        paths = []
        if folder.is_dir() and folder.resolve() not in seen:
            seen.add(folder.resolve())
            paths = sorted(Path(place, name) for place, _, names in os.walk(folder, onerror=fail) for name in names)
        images = [str(path) for path in paths if path.suffix.lower() in SUFFIXES and path.is_file() and not
                  any(part.startswith((".", "__MACOSX")) for part in path.relative_to(root).parts)]
        skipped += max(1, len(paths)) - len(images)
        if images:
            found.setdefault(unicodedata.normalize("NFC", folder.name), []).extend(images)
    return found, skipped


def list_images(name, data_dir):
    """The files of Food-101, or of a folder with train/<class>/* and test/<class>/* (or val/).

    Returns (training and test {class: files}, how many files were skipped). Raises UserError."""
    if name == "food101":
        root = Path(data_dir, "food-101")
        if not (root / "meta").exists():
            fetch("Food101", data_dir)
        listed = [load_json(root / "meta" / f"{part}.json") for part in ("train", "test")]
        return [{c: [f"{root}/images/{file}.jpg" for file in part[c]] for c in part} for part in listed], 0
    if not Path(name).is_dir():
        raise UserError(f"--dataset {name}: neither a folder nor one of cifar10, cifar100, food101, synthetic")
    train, *others = [list_folder(Path(name, part)) for part in ("train", "test", "val")]
    test = min(others, key=lambda other: len(other[0].keys() ^ train[0].keys()))
    differ = sorted(train[0].keys() ^ test[0].keys())
    if differ or len(train[0]) < 2:
        raise UserError(f"{name} needs images of two classes or more in train/<class>/, and of the same classes in "
                        f"test/<class>/ or val/<class>/ (there are {len(train[0])} and {len(test[0])}): see "
                        f"{', '.join(differ[:10]) or 'train/'}")
    return [train[0], test[0]], train[1] + test[1]


def digest_images(name, data_dir):
    """Of the names and sizes of a data set's files, the same for a copy elsewhere; "" for arrays. Says how many."""
    if name in ARRAYS:
        return ""
    parts, skipped = list_images(name, data_dir)
    files = [(c, Path(f).name, os.path.getsize(f)) for part in parts for c in part for f in part[c]]
    say(f"{name}: {len(parts[0])} classes, {len(files)} images; skipped {skipped} files (hidden, linked twice, or no "
        f"images by their names)")
    return f"{derive_seed(files):x}"


def fetch(kind, data_dir, **options):
    """A data set of torchvision.datasets, downloaded if missing, by one process at a time. Raises UserError."""
    import torchvision.datasets
    try:
        with lock(data_dir, wait=True):
            return getattr(torchvision.datasets, kind)(data_dir, download=True, **options)
    except (RuntimeError, OSError, EOFError) as error:
        raise UserError(f"{kind} could not be downloaded to {data_dir} ({error}): unpack its archive there, or name "
                        f"its place with --data-dir") from None


def load_dataset(name, data_dir="data", image_size=None, limit_train=None, device=torch.device("cpu")):
    """Load `cifar10`, `cifar100`, `food101`, `synthetic` or a folder of images with train/ and test/ (or val/).

    data_dir: where data sets are kept and downloaded to, and decoded images cached (in data/cache if it is read-only).
    image_size: side in pixels, by default IMAGE_SIZE; pixel arrays have no other. limit_train: only the first images of
    a fixed class-balanced shuffle, which is the order of every split. device: a GPU to move them to, if it has three
    times the room. Returns (training Split, test Split, names of the classes). Raises UserError."""
    usual = IMAGE_SIZE.get(name, 32)
    size = image_size or usual
    if name in ARRAYS and size != usual:
        raise UserError(f"--image-size {size}: the images of {name} have {usual} pixels")
    if name == "synthetic":
        classes, parts = range(10), [synthetic_images(count, seed) for seed, count in enumerate(SYNTHETIC, 1)]
    elif name in ARRAYS:
        sets = [fetch(name.upper(), data_dir, train=train) for train in (True, False)]
        classes, parts = sets[0].classes, [(part.data, part.targets) for part in sets]
    else:
        listed = list_images(name, data_dir)[0]
        classes = sorted(listed[0])
        parts = [zip(*[(file, label) for label, c in enumerate(classes) for file in part[c]]) for part in listed]
    splits = []
    for (images, labels), limit in zip(parts, (limit_train, None)):
        order = balanced_order(labels)[:limit]
        if name in ARRAYS:
            images = torch.from_numpy(images)[order]
        else:
            files = [images[row] for row in order]
            version = derive_seed([(os.path.abspath(file), os.stat(file).st_mtime_ns) for file in files])
            cache = Path(data_dir if os.access(data_dir, os.W_OK) or not os.path.exists(data_dir) else "data", "cache")
            with lock(cache, wait=True):  # another process may be decoding the same files
                images = decode(files, size, cache / f"{Path(name).resolve().name}-{size}-{version:x}.bin")
        if device.type == "cuda" and 3 * images.nbytes < torch.cuda.mem_get_info(device)[0]:
            images = images.to(device)
        splits.append(Split(images, torch.tensor(labels)[order]))
    return *splits, list(classes)


def crop_and_flip(images, top, left, flip, pad):
    """Pad with black by `pad` pixels, cut a window of the old size, mirror: a whole batch in one gather.

    images: uint8 (B, H, W, C); top, left: int64 (B,), 0 to 2 pad; flip: bool (B,), all on one device."""
    count, height, width, _ = images.shape
    padded = F.pad(images, (0, 0, pad, pad, pad, pad))
    across = torch.arange(width, device=images.device)
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = left[:, None] + torch.where(flip[:, None], across.flip(0), across)
    return padded[torch.arange(count, device=images.device)[:, None, None], rows[:, :, None], columns[:, None, :]]


def normalise(images):
    """uint8 (B, H, W, C) to float32 (B, C, H, W) from -1 to 1, channels-last in memory.

    One constant for every data set: the first batch normalisation takes out level and scale anyway."""
    return images.permute(0, 3, 1, 2).float().sub_(127.5).div_(127.5)


def training_batches(images, labels, batch_size, device, seed, augment=True):
    """One epoch of N // batch_size shuffled batches: (normalised float32 (B, C, H, W), labels int64 (B,)) on `device`.

    images: uint8 (N, H, W, C) on any device; labels: int64 (N,). augment: pad (by 1/8 of the side), crop and flip
    (paper, section 5). The seed alone decides what is random, on every device alike."""
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


# ---- Step -----------------------------------------------------------------------------------------------------------

def derive_seed(*parts):
    """A 63-bit number that stands for what `repr` shows of `parts`: ("order", seed, epoch) seeds its own stream."""
    return int(hashlib.sha256(repr(parts).encode()).hexdigest()[:16], 16) >> 1


def cosine_lr(step, steps, lr, warm_up=0.0):
    """Learning rate of step 0..steps-1: from `lr` down to 1 % of it along a cosine.

    Paper: 0.1 to 0.001, changed once an epoch. warm_up: the part of the steps, 0 to 1, in which it first rises."""
    rising = min(1.0, (step + 1) / (warm_up * steps)) if warm_up else 1.0
    return rising * lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))


@cache
def graph_place(device):
    """What all CUDA graphs on a device share, for no two run at the same time, and whether capturing works."""
    return SimpleNamespace(stream=torch.cuda.Stream(device), pool=torch.cuda.graph_pool_handle(), works=True)


def graphed(step, device):
    """On CUDA, replay `step(x, y, *step_args)` as one CUDA graph per shape and step_args; elsewhere return `step`.

    A ResNet20 step is a thousand kernels of two microseconds (H100, batch 128); a graph launches them at once. `step`
    must not wait for the device; the next call may overwrite the tensor that it returns. The first call runs eagerly,
    the second captures, later ones replay. Where capturing fails, all run eagerly."""
    if device.type != "cuda":
        return step
    place, seen, captured, static_inputs = graph_place(device), set(), {}, {}

    def run(x, y, *step_args):
        shape, key = tuple(x.shape), (tuple(x.shape), step_args)
        if place.works and key in seen and key not in captured:
            inputs = static_inputs.setdefault(shape, (torch.empty_like(x), torch.empty_like(y)))
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool=place.pool, stream=place.stream, capture_error_mode="thread_local"):
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


class Learner:
    """A network with its optimiser and gradient scaler: training and scoring of single batches, never waiting.

    network: takes x, float (B, C, S, S), and path, a tuple; y: labels, int64 (B,), both on the device, a torch.device;
    amp: "bf16", "fp16" or "off"; graphs: replay steps as CUDA graphs, one for each path, whose results the next step
    overwrites. To learn otherwise, override `loss`."""

    def __init__(self, network, device, amp="off", weight_decay=0.0, graphs=True):
        self.network = network.to(device, memory_format=torch.channels_last)
        on_cuda = device.type == "cuda"
        self.lr = torch.zeros((), device=device) if on_cuda else 0.0  # a tensor, so that a graph reads its new value
        self.optimizer = torch.optim.SGD(network.parameters(), self.lr, momentum=0.9, weight_decay=weight_decay,
                                         fused=True if on_cuda else None)
        self.velocities = [torch.zeros_like(parameter) for parameter in network.parameters()]
        for parameter, velocity in zip(network.parameters(), self.velocities):  # here, since fp16 may skip a first step
            self.optimizer.state[parameter]["momentum_buffer"] = velocity
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")  # does nothing unless amp is "fp16"
        self.autocast = partial(torch.autocast, device.type, torch.float16 if amp == "fp16" else torch.bfloat16,
                                enabled=amp != "off")
        self.step, self.score = ((graphed(step, device) if graphs else step)
                                 for step in (self.one_step, self.one_score))

    def loss(self, x, y, path):
        """Cross-entropy on the labels: (loss to minimise, logits (B, classes) whose accuracy is logged)."""
        logits = self.network(x, path).float()
        return F.cross_entropy(logits, y), logits

    def one_step(self, x, y, path):
        """One SGD step. Returns float (2,): cross-entropy on the labels and accuracy of the batch."""
        self.network.train()
        self.optimizer.zero_grad()
        with self.autocast():
            loss, logits = self.loss(x, y, path)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        logits = logits.detach()
        return torch.stack([F.cross_entropy(logits, y), (logits.argmax(1) == y).float().mean()])

    @torch.no_grad()
    def one_score(self, x, y, path):
        """Accuracy of the batch through `path`, a tensor on the device."""
        self.network.eval()
        with self.autocast():
            return (self.network(x, path).argmax(1) == y).float().mean()

    def train(self, x, y, path, lr):
        """`one_step` at learning rate `lr`, as a CUDA graph where there are such; `score` is `one_score` likewise."""
        self.optimizer.param_groups[0]["lr"] = self.lr.fill_(lr) if torch.is_tensor(self.lr) else lr
        return self.step(x, y, path)

    def state_dict(self):
        """What a checkpoint needs: weights, momentum, loss scale."""
        return {"network": self.network.state_dict(), "momentum": self.velocities, "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state):
        """Go on from `state_dict()`, also on another kind of device: values are copied, settings stay those of here."""
        self.network.load_state_dict(state["network"])
        self.scaler.load_state_dict(state["scaler"])
        for mine, saved in zip(self.velocities, state["momentum"]):
            mine.copy_(saved)


def evaluate(score, split, path, device, batch_size=256):
    """Accuracy, a fraction, on a Split; score(x, y, path) is that of one batch, such as `Learner.score`.

    Batches have nearly equal sizes. A SuperNet's score depends a little on them, since it uses their statistics."""
    correct, count = torch.zeros((), device=device), len(split.labels)
    batches = max(1, min(round(count / batch_size), count // 2))  # the statistics of a batch need two images
    for images, y in zip(*(column.tensor_split(batches) for column in split)):
        correct += score(normalise(images.to(device)), y.to(device), path) * len(y)
    return correct.item() / count


def keep_freed_memory():
    """Tell glibc, if there is one, to keep freed memory, whose pages the kernel would zero again in every step.

    That is half the time of a bf16 step on two cores with AVX512-BF16; in float32 with AVX2 it is 0 to 15 %."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        if libc.mallopt(-3, 1 << 30) or libc.mallopt(-3, 1 << 25):  # M_MMAP_THRESHOLD; 32 MiB is what mallopt(3) grants
            libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: do not shrink the heap


def pick_device(name="auto", number=0):
    """The torch.device named; `auto` takes CUDA, then MPS, then the CPU, whichever first can compute here.

    number: of this process on this machine, since processes share the GPUs round robin. Raises UserError."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    for candidate in [kind for kind in there if there[kind]] if name == "auto" else [name]:
        try:
            device = torch.device(candidate)
            if device.type == "cuda" and device.index is None:
                device = torch.device("cuda", number % max(1, torch.cuda.device_count()))
            torch.ones(8, device=device).mul(2).sum().item()  # there are GPUs that torch has no kernels for
            return device
        except (RuntimeError, AssertionError, ImportError) as error:
            problem = f"--device {candidate} cannot be used here ({str(error).splitlines()[0]})"
            if name != "auto":
                raise UserError(f"{problem}: use auto, cpu or another") from None
            print(f"{problem}, going on without", flush=True)


def pick_amp(name, device):
    """Mixed precision for a device: "bf16", "fp16" or "off". Raises UserError for what the device does not have.

    `auto`: what a GPU has, off on MPS; on a CPU bf16 with AMX or AVX512-BF16, else it is up to 11 times slower."""
    cuda = device.type == "cuda"
    modern = cuda and torch.cuda.get_device_capability(device)[0] >= 8
    if (name == "fp16" and not cuda) or (name == "bf16" and cuda and not modern):
        raise UserError(f"--amp {name} does not work on this device ({device.type}): use auto or off")
    if name != "auto":
        return name
    if device.type == "cpu":
        with contextlib.suppress(OSError):  # Linux alone has the file
            modern = re.search(r"\b(amx_bf16|avx512_bf16)\b", Path("/proc/cpuinfo").read_text())
    return "bf16" if modern else "fp16" if cuda else "off"


# ---- Runs -----------------------------------------------------------------------------------------------------------

RANK, LOCAL_RANK, WORLD = 0, 0, 1  # the number of this process, that on its machine, how many there are
if dist.is_torchelastic_launched():  # by torchrun; the variables alone may be somebody else's
    RANK, LOCAL_RANK, WORLD = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))


def say(text="", every_rank=False):
    """Print a line, on the first rank only or on every one."""
    if RANK == 0 or every_rank:
        print(text, flush=True)


def gather(value):
    """The value of every rank, in their order, as a list. Over gloo: the one thing that processes do together."""
    if WORLD == 1:
        return [value]
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(days=7))  # a rank may have much to train before it comes
    values = [None] * WORLD
    dist.all_gather_object(values, value)
    return values


def lock(folder, wait):
    """Make a folder and lock it for this process: an ExitStack that unlocks it, as the end of the process does.

    A folder in use is waited for, or raises UserError. Without locks (Windows, some network disks) go on."""
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
        if not wait:  # once, for --out
            say(f"no locks here ({error}): start no second run in a folder")
    return held


@contextlib.contextmanager
def whole_file(path):
    """The name of a temporary file that appears under `path` when the block ends without exception, or not at all."""
    temporary = Path(f"{path}.rank{RANK}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_json(path, data):
    """Write a dict as strict JSON (NaN raises ValueError), one line per key and per entry of a list of entries."""
    lines = []
    for key, value in data.items():
        text = json.dumps(value, allow_nan=False)
        if isinstance(value, list) and value and isinstance(value[0], (dict, list)):
            text = "[\n    " + ",\n    ".join(json.dumps(entry, allow_nan=False) for entry in value) + "\n  ]"
        lines.append(f"  {json.dumps(key)}: {text}")
    with whole_file(path) as temporary:
        temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def load_json(path, key=None):
    """Read a JSON object. Raises UserError when it is damaged, or an entry of its `results` has no number `key`."""
    try:
        data = dict(json.loads(Path(path).read_bytes()))
        if key and not (data["results"] and all(r["config"] and math.isfinite(r[key]) for r in data["results"])):
            raise ValueError(f"no results with config and {key}")
        return data
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged or of another kind ({type(error).__name__}: {error}): delete it or name "
                        f"another") from None


def save_checkpoint(path, state):
    """Write a dict of tensors and plain values, whole or not at all."""
    buffer = io.BytesIO()  # torch.save to a full disk would not raise OSError
    torch.save(state, buffer)
    with whole_file(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_checkpoint(path, settings):
    """What `save_checkpoint` wrote, or None. Raises UserError if it is damaged or has other settings than these."""
    if not Path(path).exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = state["args"]
    except (OSError, MemoryError):
        raise
    except Exception:  # whatever a damaged file makes zip and unpickler raise
        raise UserError(f"{path} is damaged: delete it to start over") from None
    check_settings(path, found, settings)
    return state


SETTINGS = ("dataset", "data_digest", "image_size", "layers", "scales", "epochs", "batch_size", "lr", "warm_up",
            "weight_decay", "limit_train", "amp", "network")  # what determines a training, with configuration and seed
SAME = *SETTINGS[:5], "network"  # what a search must share with a training that judges it or follows it


def settings_of(args, *own):
    """The options that determine a result, for its file: SETTINGS, and those of a script's `own`."""
    return {name: getattr(args, name) for name in (*SETTINGS, *own)} | {"dataset": Path(args.dataset).resolve().name}


def check_settings(path, found, settings):
    """Raise UserError, naming the options, where the settings `found` in the file `path` are not those of here."""
    other = {"data_digest": "--dataset (other images)", "network": "make_network (another network)"}
    differ = [other.get(name) or f"--{name.replace('_', '-')} ({found.get(name)} there, {value} here)"
              for name, value in settings.items() if found.get(name) != value]
    if differ:
        raise UserError(f"{path} is of a run with other settings: {', '.join(differ)}; use those, choose another "
                        f"--out, or delete the .json and .pt of that run")


def steps_per_epoch(split, batch_size):
    """Training steps of one epoch. Raises UserError when there is none."""
    if len(split.labels) < batch_size:
        raise UserError(f"--batch-size {batch_size} is more than the {len(split.labels)} images that train, in a "
                        f"search half of all: lower it")
    return len(split.labels) // batch_size


def log_epoch(epoch, epochs, args, measures, began, steps, label=""):
    """Print an epoch's line. measures: {name: value}; began: time.monotonic() at its start. Returns its history entry.

    Raises UserError when the loss is not finite."""
    if not math.isfinite(measures["loss"]):
        raise UserError(f"the loss is not finite in epoch {epoch + 1}: lower --lr (now {args.lr:g})")
    seconds, lr = time.monotonic() - began, cosine_lr(epoch * steps, epochs * steps, args.lr, args.warm_up)
    text = "  ".join(f"{name} {value:.4f}" for name, value in measures.items())
    speed, left = steps * args.batch_size / seconds, (epochs - epoch - 1) * seconds / 60
    say(f"{label}epoch {epoch + 1}/{epochs}  {text}  lr {lr:.4f}  {speed:.0f} images/s  {left:.1f} min left", True)
    rounded = {name: round(value, 6) for name, value in {**measures, "lr": lr}.items()}
    return {"epoch": epoch + 1, **rounded, "seconds": round(seconds, 2)}


# ---- Results --------------------------------------------------------------------------------------------------------

def kendall_tau(x, y):
    """Kendall's tau-b of two equally long sequences, ties handled (Kendall, 1945); None where it is undefined."""
    x_order, y_order = (np.sign(np.subtract.outer(v, v)) for v in (np.asarray(x, float), np.asarray(y, float)))
    scale = math.sqrt((x_order ** 2).sum() * (y_order ** 2).sum())
    return float((x_order * y_order).sum() / scale) if scale else None


def pareto(results, key):
    """The entries that beat, in `key`, every other of at most their `macs`; of equals one. Cheapest first."""
    front = []
    for entry in sorted(results, key=lambda r: (r["macs"], -r[key])):
        if not front or entry[key] > front[-1][key]:
            front.append(entry)
    return front


def describe(config, args, classes):
    """The fields of a result that follow from the configuration: itself, multiply-adds, parameters."""
    with torch.device("meta"):
        network = make_network(args, classes).eval()
    return {"config": list(config), "macs": count_macs(config, network, args.image_size),
            "params": sum(p.numel() for p in network.parameters())}


def print_table(header, rows):
    """Print rows of strings and numbers in aligned columns; None shows as a dash."""
    cells = [["-" if value is None else str(value) for value in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        words = [word.rjust(width) for word, width in zip(row, widths)]
        say("  ".join([row[0].ljust(widths[0]), *words[1:]]).rstrip())


def write_results(args, name, settings, classes, results, key, counts, seconds, table=True, **extra):
    """Write a stage's JSON, `name`.json in --out; with `table` print the best five, the default and the Pareto set.

    results: entries from `describe` with an accuracy `key`; counts: the images that train, score and test. Returns the
    content of the JSON."""
    results = sorted(results, key=lambda r: -r[key])
    usual = list(default_config(args.layers, args.scales))
    front = [r["config"] for r in pareto(results, key)]
    default = next((r for r in results if r["config"] == usual), None)
    device = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else args.device.type
    data = {
        "schema": 1, "stage": name.partition("-seed")[0], "dataset": settings["dataset"], "image_size": args.image_size,
        "num_classes": len(classes), "n_train": counts[0], "n_val": counts[1], "n_test": counts[2],
        "space": {"layers": args.layers, "scales": args.scales, "size": math.comb(args.layers - 1, args.scales - 1)},
        "args": settings, "env": {"torch": torch.__version__, "device": device, "amp": args.amp},
        "seconds": round(seconds, 2), "classes": classes, "results": results, "best": results[0],
        "default": default, "pareto": front, **extra}
    save_json(args.out / f"{name}.json", data)
    rows = [[config_text(r["config"]) + (" default" if r is default else ""), f"{r['macs'] / 1e6:.1f}",
             f"{r[key]:.4f}", place, "*" if r["config"] in front else ""]
            for place, r in enumerate(results, 1) if place <= 5 or r is default or r["config"] in front]
    if table:
        say()
        print_table(["configuration", "M multiply-adds", key.replace("_", " "), "place", "Pareto"], rows)
    say(f"wrote {args.out / name}.json", True)
    return data


# ---- Command line ---------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def at_least(low, kind=int):
    """An argparse type: a number of this kind, not below `low`, which float32 can hold."""
    def number(text):
        value = kind(text)
        if not low <= value < 3e38:  # the largest of float32
            raise argparse.ArgumentTypeError(f"{text} is not from {low:g} to 3e38")
        return value
    return number


def parse(doc, add_options=lambda add: None, synthetic_epochs=7):
    """Parse the command line and lock --out. doc: the script's docstring; add_options(add) adds its own options.

    Returns the options with defaults, `device` a torch.device, digests of images and network. Raises UserError."""
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--dataset", default="cifar10", help="cifar10 (default), cifar100, food101, synthetic, or a folder of images")
    add("--data-dir", default="data", help="folder where data sets are kept and downloaded to; default data")
    add("--out", type=Path, help="folder of the JSON files and checkpoints; default runs/<dataset>")
    add("--image-size", type=int, choices=[16, 32, 64, 128], help="pixels; default 32, food101 128, synthetic 16")
    add("--epochs", type=at_least(1), help=f"passes over the images, in a mixture for each model; default 100, "
        f"synthetic {synthetic_epochs}")
    add("--batch-size", type=at_least(2), help="images per step; default 128 (paper), synthetic 64")
    add("--lr", type=at_least(1e-9, float), help="learning rate, falls along a cosine to 1%%; default 0.1 (paper), "
        "synthetic 0.015, to which it rises in the first fifth of the steps")
    add("--weight-decay", type=at_least(0, float), default=0.0, help="L2 penalty; default 0 (paper)")
    add("--seed", type=at_least(0), default=0, help="default 0; a search under torchrun adds the process's number")
    add("--layers", type=at_least(3), default=10, help="searched layers; default 10, a ResNet20")
    add("--scales", type=at_least(1), default=3, help="resolutions; default 3")
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
    most = min(args.layers, min(32, args.image_size).bit_length())
    if args.scales > most:
        raise UserError(f"--scales {args.scales}: {args.layers} layers and this image size allow {most}")
    args.out = args.out or Path("runs", os.path.basename(os.path.abspath(args.dataset)))  # of a link its own name
    if args.out.resolve() == Path(args.data_dir).resolve():  # both are locked
        raise UserError(f"--out and --data-dir are the same folder, {args.out}: choose another --out")
    args.device = pick_device(args.device, LOCAL_RANK)
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
    args.amp = pick_amp(args.amp, args.device)
    args.data_digest = digest_images(args.dataset, args.data_dir)
    with torch.device("meta"):
        args.network = f"{derive_seed([(name, *p.shape) for name, p in make_network(args, 10).named_parameters()]):x}"
    args.out.mkdir(parents=True, exist_ok=True)  # each rank may have a disk of its own
    if RANK == 0:
        lock(args.out, wait=False)  # until the process ends, since nobody closes it
    return args


def run_main(main):
    """Run a script's main. A UserError and its like are one line on standard error, exit code 2."""
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="backslashreplace")  # for names that a terminal or a log cannot show
    try:
        keep_freed_memory()
        return main()
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not re.search("out of memory|can't allocate memory", str(error)):
            raise
        message = "out of memory: lower --batch-size, or choose another --device; the last checkpoint is kept"
    except OSError as error:  # a full disk, a folder without permission
        message = f"{error}; put that right and run the same command again"
    except UserError as error:
        message = str(error)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    raise SystemExit(2)
