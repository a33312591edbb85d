"""What two or more of the scripts share, in the order in which a reader needs it.

    basics         errors for people, which process this is, printing, files that appear whole or not at all
    space          pooling configurations: how many layers run at each resolution
    network        a ResNet20 whose pooling is an argument, and its cost
    data           CIFAR, Food-101, a folder of images, a made-up set; batches cut and augmented on the device
    step           one SGD step with automatic mixed precision, replayed as a CUDA graph; scoring
    checkpoint     a run goes on from the end of its last epoch; its settings; what several processes share
    results        rankings, tables, the JSON of a stage
    command line   the options of every script, errors as one line

Network, data and step take tensors and plain numbers, so copy what you need; the rest serves the scripts.
"Paper": Javan, Toews, Pedersoli, "Balanced Mixture of SuperNets for Learning the CNN Pooling Architecture", AutoML
2023, arXiv 2306.11982.
"""
import argparse
import contextlib
import ctypes
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import sys
import time
import timeit
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

# ---- Basics ---------------------------------------------------------------------------------------------------------

RANK = int(os.environ.get("RANK", 0))  # torchrun's number of this process, of WORLD in all, LOCAL_RANK on this machine
WORLD = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))


class UserError(Exception):
    """Something a person can put right: shown as one line on standard error, exit code 2."""


def say(text="", every_rank=False):
    """Print a line, on the first rank only or on every one. Where nobody reads any more, as behind `| head`, go on."""
    if RANK == 0 or every_rank:
        try:
            print(text, flush=True)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def whole_file(path):
    """Open a binary file that appears under `path` whole, when the block ends without an exception, or not at all."""
    temporary = Path(f"{path}.rank{RANK}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ---- Space (paper, section 3) ---------------------------------------------------------------------------------------

def pooling_configs(layers=10, scales=3):
    """All compositions of `layers` into `scales` positive parts, as tuples in lexicographic order.

    pooling_configs(10, 3) is the paper's space: 36 configurations, (1, 1, 8) first, (8, 1, 1) last."""
    configs = []
    for cuts in itertools.combinations(range(1, layers), scales - 1):
        edges = (0, *cuts, layers)
        configs.append(tuple(end - start for start, end in itertools.pairwise(edges)))
    return configs


def default_config(layers=10, scales=3):
    """The usual choice, parts as equal as they can be, larger ones first: (4, 3, 3) in a ResNet20."""
    return tuple(layers // scales + (part < layers % scales) for part in range(scales))


def show(config):
    """A configuration as people write it: [4,3,3]."""
    return "[" + ",".join(map(str, config)) + "]"


# ---- Network --------------------------------------------------------------------------------------------------------

def make_norm(channels, norm):
    """Batch normalisation. "own" learns scale and shift and keeps running statistics. "shared", for supernets, has
    neither and always uses the batch's statistics: averages over different paths would mix (paper, section 4)."""
    own = {"own": True, "shared": False}[norm]
    return nn.BatchNorm2d(channels, affine=own, track_running_stats=own)


class Block(nn.Module):
    """Basic residual block (He et al., 2016), stride 1: conv-BN-ReLU-conv-BN plus shortcut, then ReLU.

    (B, inputs, H, W) to (B, outputs, H, W); the shortcut is a 1x1 convolution + BN where channels change."""

    def __init__(self, inputs, outputs, norm="own"):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm1 = make_norm(outputs, norm)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = make_norm(outputs, norm)
        self.shortcut = nn.Identity()
        if inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), make_norm(outputs, norm))

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x), inplace=True)


class ResNet20(nn.Module):
    """ResNet20 for small images whose pooling is an argument: `forward(x, config)` (paper, section 3).

    x: (B, channels, S, S) normalised images; result: (B, classes) logits. A 2x2 max pooling stands before the first
    layer of every resolution after the first. Without a configuration it runs `self.config`, at first the usual one.
    layers: searched layers, one 3x3 convolution and layers - 1 blocks; stem: 1, or for larger images 2 or 4, the
    stride of a convolution before them; norm: "own" or "shared" (see `make_norm`). Raises ValueError for what does
    not fit."""

    def __init__(self, channels=3, classes=10, stem=1, layers=10, norm="own"):
        super().__init__()
        if stem not in (1, 2, 4) or layers < 3:
            raise ValueError(f"stem {stem} must be 1, 2 or 4, and layers {layers} at least 3, one for each width")

        def convolution(inputs, kernel, stride):
            return nn.Sequential(nn.Conv2d(inputs, 16, kernel, stride, kernel // 2, bias=False), make_norm(16, norm),
                                 nn.ReLU(inplace=True))
        self.stem = nn.Identity() if stem == 1 else convolution(channels, kernel=2 * stem - 1, stride=stem)
        self.layers = nn.ModuleList([convolution(channels if stem == 1 else 16, kernel=3, stride=1)])
        widths = []
        for width, count in zip((16, 32, 64), default_config(layers, 3)):  # 16 x4, 32 x3, 64 x3: these never move
            widths += [width] * count
        for inputs, outputs in itertools.pairwise(widths):
            self.layers.append(Block(inputs, outputs, norm))
        self.head = nn.Linear(widths[-1], classes)
        self.config = default_config(layers)

    def forward(self, x, config=None):
        config = config or self.config
        if sum(config) != len(self.layers) or min(config) < 1:
            raise ValueError(f"configuration {show(config)} does not share out {len(self.layers)} layers")
        pooled = set(itertools.accumulate(config[:-1]))
        x = self.stem(x)
        for number, layer in enumerate(self.layers):
            if number in pooled:
                x = F.max_pool2d(x, 2)
            x = layer(x)
        return self.head(x.mean((2, 3)))


def count_macs(config, channels=3, classes=10, stem=1, size=32):
    """Multiply-adds of one image: convolutions and the last linear layer, as is usual. 40.8 M for (4, 3, 3).

    size: side in pixels at the first searched layer. A weight of a convolution takes one for each pixel it puts out."""
    with torch.device("meta"):  # shapes only
        network = ResNet20(channels, classes, stem, sum(config))

    def weights(part):
        return sum(layer.weight.numel() for layer in part.modules() if isinstance(layer, nn.Conv2d))
    macs = network.head.weight.numel() + weights(network.stem) * size ** 2
    for layer, resolution in zip(network.layers, np.repeat(np.arange(len(config)), config).tolist()):
        macs += weights(layer) * (size >> resolution) ** 2
    return macs


# ---- Data: every data set ends as uint8 images (N, H, W, C) plus labels ---------------------------------------------

@dataclass
class Split:
    """Labelled images: the rows `index` of a uint8 tensor (N, H, W, C) that several splits may share.

    pixels: on any device, or mapped from a file; index, labels: int64 CPU tensors of equal length."""
    pixels: torch.Tensor
    index: torch.Tensor
    labels: torch.Tensor

    def __len__(self):
        return len(self.index)

    def take(self, positions):
        """The split of these positions (int64 tensor), without copying pixels."""
        return Split(self.pixels, self.index[positions], self.labels[positions])


@dataclass
class Dataset:
    """A data set: two splits, the names of the classes, and a digest of its files' names and sizes ("" if none)."""
    name: str
    train: Split
    test: Split
    classes: list
    digest: str = ""


def balanced_order(labels, seed=0):
    """A shuffle (int64 tensor) in which every prefix holds the classes in the proportions of the whole, nearly."""
    labels = np.asarray(labels)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    position = np.empty(len(labels))
    for label in np.unique(labels):
        mine = order[labels[order] == label]
        position[mine] = (np.arange(len(mine)) + rng.random(len(mine))) / len(mine)
    return torch.from_numpy(np.argsort(position, kind="stable"))


def halves(split, seed=0):
    """Cut a split into two halves, stratified by class: one trains weights, one scores (paper, section 4)."""
    order = balanced_order(split.labels, seed + 1)
    middle = len(order) // 2
    return split.take(order[:middle]), split.take(order[middle:])


SYNTHETIC = 6_000, 4_000  # training and test images
GLYPHS = ("010110100 110010010", "010010110 100101010", "011100100 001111000", "101100010 100101001",
          "100110100 110100100", "011000101 001010101", "000100111 000011011", "101001001 100100101",
          "100110001 001101001", "010001011 010110010")  # a class a string: its two glyphs, 3x3 cells row by row


def synthetic_images(n, seed):
    """Ten balanced classes on which it matters where a network pools: (uint8 (n, 16, 16, 3), int64 (n,)).

    A class is a pair of glyphs of 3x3 pixels. Five times one of the two is drawn at a random place of the upper half;
    the lower half shows, twice, glyphs of another class, which do not count. Each is mirrored or not (so that flips as
    augmentation change nothing), bright or dark, and drawn over what was there. Colours and noise vary from image to
    image; the noise's deviation is 10 to 40 (of 255).
    What: glyphs of different classes may differ in a single pixel, which an early pooling blurs, and 16 channels are
    too few to tell 20 glyphs in four guises, so wider layers must still see single pixels. Where: which half a glyph
    is in shows only to layers with a wide view, so with nearly every layer at full resolution it is learned late.
    `seed` draws the images; the classes are fixed. 16 pixels, not 32, allow four times the steps in the same time."""
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
    """Decode an image of any mode to uint8 (size, size, 3): upright, shorter side resized, centre square.

    Deep images (more than 8 bits, or floating point) are stretched from their darkest to their brightest value;
    transparent ones lie on white."""
    from PIL import Image, ImageOps
    with Image.open(path, formats=["JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF"]) as image:  # none that runs code
        image.draft("RGB", (size, size))  # a JPEG is decoded at the smallest scale that is large enough
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":
            values = np.nan_to_num(np.asarray(image, float), posinf=0, neginf=0)
            values -= values.min()
            image = Image.fromarray((255 * values / max(values.max(), 1e-9)).astype(np.uint8))
        elif image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return np.array(ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR))


def decode(files, size):
    """Decode image files in threads: a generator of uint8 (size, size, 3), in the order of the files.

    Raises UserError, at the end, that lists every file that is no image."""
    bad = []

    def read(file):
        try:
            if not os.path.isfile(file):  # to open a pipe would wait for ever
                raise ValueError("no regular file")
            return read_image(file, size)
        except Exception as error:  # decoders raise many kinds; all bad files are listed before giving up
            bad.append(f"{file} ({error})")
            return np.zeros((size, size, 3), np.uint8)
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(files), 4096):  # part by part, so that decoded images do not pile up in memory
            say(f"decoding {start} of {len(files)} images")
            yield from pool.map(read, files[start:start + 4096])
    if bad:
        raise UserError(f"{len(bad)} files are no images, remove or replace them: {'; '.join(sorted(bad))}")


def decoded_once(files, size, path):
    """Image files as a uint8 tensor (N, size, size, 3), mapped from the file `path`, which is written when missing.

    path: its name ends in "-" and what changes with the files; what was written for the same files before is removed.
    """
    with locked(path.parent, wait=True):  # another process may be decoding the same files
        if not path.exists():
            with whole_file(path) as output:
                output.writelines(decode(files, size))
            for other in path.parent.glob("*.bin"):
                if other != path and other.stem.rpartition("-")[0] == path.stem.rpartition("-")[0]:
                    other.unlink()
    count = len(files) * size * size * 3
    return torch.from_file(str(path), size=count, dtype=torch.uint8).view(-1, size, size, 3)


def torchvision_set(name, data_dir):
    """CIFAR-10, CIFAR-100 or Food-101: torchvision's class, and the folder in `data_dir`, downloaded when missing.

    It is unpacked beside and then renamed, so a folder of that name is whole. Raises UserError."""
    import torchvision.datasets as sets
    kind, folder = {"cifar10": (sets.CIFAR10, "cifar-10-batches-py"), "cifar100": (sets.CIFAR100, "cifar-100-python"),
                    "food101": (sets.Food101, "food-101")}[name]
    place, beside = Path(data_dir, folder), Path(data_dir, f"{folder}.tmp")
    if place.exists():
        return kind, place
    try:
        with locked(data_dir, wait=True):
            if not place.exists():  # another process may have unpacked it meanwhile
                shutil.rmtree(beside, ignore_errors=True)
                kind(beside, download=True)
                os.replace(beside / folder, place)
                shutil.rmtree(beside)
    except (RuntimeError, OSError, EOFError) as error:
        raise UserError(f"{name} could not be downloaded ({error}): unpack its archive so that {place} exists, "
                        f"or name its place with --data-dir") from None
    return kind, place


def list_images(name, data_dir):
    """Food-101, or a folder with train/<class>/* and test/<class>/* (or val/): (classes, training, test images).

    The images are lists of (path, class number). Raises UserError where the folder is not like that."""
    from torchvision.datasets import ImageFolder
    if name == "food101":
        _, root = torchvision_set(name, data_dir)
        images = []
        root = root.resolve()
        for part in ("train", "test"):
            by_class = json.loads((root / "meta" / f"{part}.json").read_text())
            classes = sorted(by_class)
            images.append([(f"{root}/images/{file}.jpg", classes.index(c)) for c in classes for file in by_class[c]])
        return classes, *images
    root = Path(name).resolve()
    if not root.is_dir():
        raise UserError(f"--dataset {name}: neither a folder nor one of cifar10, cifar100, food101, synthetic")
    try:
        train = ImageFolder(root / "train")
        test = ImageFolder(root / ("test" if (root / "test").is_dir() else "val"))
    except FileNotFoundError as error:
        raise UserError(f"{name} needs images in train/<class>/ and test/<class>/ (or val/<class>/): {error}") from None
    if train.classes != test.classes or len(train.classes) < 2:
        raise UserError(f"{name} needs the same classes, two or more, for training and test: it has "
                        f"{', '.join(train.classes)} and {', '.join(test.classes)}")
    return train.classes, train.samples, test.samples


IMAGE_SIZE = {"food101": 128, "synthetic": 16}  # pixels fed in; all others 32


def as_text(name):
    """The name of a file or folder as text, also where its bytes are not UTF-8."""
    return os.fsencode(str(name)).decode(errors="replace")


def short_hash(value):
    """16 hexadecimal digits that stand for whatever `repr` shows of a value."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def load_dataset(name, data_dir="data", image_size=None, limit_train=None, limit_test=None):
    """Load `cifar10`, `cifar100`, `food101`, `synthetic` or a folder of images with train/ and test/ (or val/).

    data_dir: where data sets are kept and downloaded to; decoded images are cached in its folder `cache`, or in
    data/cache where data_dir cannot be written. limit_train, limit_test: only the first images of a fixed
    class-balanced shuffle. Returns a Dataset on the CPU. Raises UserError with what to fetch, make or mend."""
    usual = IMAGE_SIZE.get(name, 32)
    digest = ""
    files = []
    size = image_size or usual
    if name in ("cifar10", "cifar100", "synthetic") and size != usual:
        raise UserError(f"--image-size {size}: the images of {name} have {usual} pixels")
    if name == "synthetic":
        classes, parts = range(10), [synthetic_images(count, seed) for seed, count in enumerate(SYNTHETIC, 1)]
    elif name in ("cifar10", "cifar100"):
        kind, place = torchvision_set(name, data_dir)
        try:
            sets = kind(data_dir, train=True), kind(data_dir, train=False)
        except RuntimeError as error:
            raise UserError(f"{place} is damaged ({error}): delete it to have it unpacked again") from None
        classes, parts = sets[0].classes, [(part.data, part.targets) for part in sets]
    else:
        classes, *listed = list_images(name, data_dir)
        parts = [tuple(zip(*images)) for images in listed]
        files = [*parts[0][0], *parts[1][0]]
        facts = []
        for part, images in zip(("train", "test"), listed):
            facts += [(part, classes[label], os.path.basename(file), os.path.getsize(file)) for file, label in images]
        digest = short_hash(facts)  # the same for a copy elsewhere

    train_labels, test_labels = (torch.tensor(labels) for _, labels in parts)
    train_rows = balanced_order(train_labels)[:limit_train]
    test_rows = balanced_order(test_labels)[:limit_test]
    labels = torch.cat([train_labels[train_rows], test_labels[test_rows]])
    rows = torch.cat([train_rows, len(train_labels) + test_rows])
    place = Path(name).resolve()
    if files:
        writable = os.access(data_dir, os.W_OK) or not os.path.exists(data_dir)
        version = short_hash([digest, *(os.stat(file).st_mtime_ns for file in files)])
        name = f"{as_text(place.name)}-{size}-{short_hash(place)}-{version}.bin"
        path = Path(data_dir if writable else "data", "cache", name)
        if len(rows) == len(files) or path.exists():
            pixels = decoded_once(files, size, path)
        else:  # a part is decoded to memory alone
            pixels = torch.from_numpy(np.stack(list(decode([files[row] for row in rows], size))))
            rows = torch.arange(len(rows))
    else:
        pixels = torch.from_numpy(np.concatenate([images for images, _ in parts]))
    whole = Split(pixels, rows, labels)
    count = len(train_rows)
    return Dataset(as_text(place.name), whole.take(slice(0, count)), whole.take(slice(count, None)),
                   [as_text(label) for label in classes], digest)


def to_device(data, device):
    """Move a Dataset's pixels to a CUDA GPU that has twice the room; else leave them mapped or in main memory."""
    pixels = data.train.pixels
    if device.type == "cuda" and 2 * pixels.nbytes < torch.cuda.mem_get_info(device)[0]:
        data.train.pixels = data.test.pixels = pixels.to(device)
    return data


def crop_and_flip(images, top, left, flip, pad):
    """Pad with black by `pad` pixels, cut a window of the old size, mirror: a whole batch in one gather.

    images: uint8 (B, H, W, C); top, left: int64 (B,) in 0..2 pad; flip: bool (B,), all on one device."""
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


def training_batches(split, batch_size, device, seed, augment=True, views=1):
    """One epoch of len(split) // batch_size shuffled batches: (images float32 (B, C, H, W), labels int64 (B,)).

    augment: pad-and-crop (1/8 of the side, 4 pixels of 32) and flip (paper, section 5). views: with 2, the images are
    (2 B, C, H, W), each image once in each half, augmented independently. All that is random is drawn here, from the
    seed alone, so it is the same on every device."""
    rng = torch.Generator().manual_seed(seed)
    count = len(split)
    pad = split.pixels.shape[1] // 8
    order = torch.randperm(count, generator=rng)
    top, left = torch.randint(0, 2 * pad + 1, (2, views, count), generator=rng).to(device)
    flip = (torch.rand(views, count, generator=rng) < 0.5).to(device)
    rows, labels = split.index[order].to(split.pixels.device), split.labels[order].to(device)
    for start in range(0, count - batch_size + 1, batch_size):
        batch = slice(start, start + batch_size)
        images = split.pixels[rows[batch]].to(device)
        if augment:
            images = torch.cat([crop_and_flip(images, top[view, batch], left[view, batch], flip[view, batch], pad)
                                for view in range(views)])
        yield normalise(images), labels[batch]


def scoring_batches(split, batch_size, device):
    """Every image once, unchanged: (images float32 (B, C, H, W), labels int64 (B,)) in batches of nearly equal size."""
    rows, labels = split.index.to(split.pixels.device), split.labels.to(device)
    for positions in torch.arange(len(split)).tensor_split(max(1, round(len(split) / batch_size))):
        batch = slice(int(positions[0]), int(positions[-1]) + 1)
        yield normalise(split.pixels[rows[batch]].to(device)), labels[batch]


# ---- Step -----------------------------------------------------------------------------------------------------------

def derive_seed(*parts):
    """One 63-bit seed from words and whole numbers, such as ("order", seed, epoch): independent streams."""
    return int(short_hash(parts), 16) >> 1


def cosine_lr(step, steps, lr, warm_up=0.0, floor=0.01):
    """Learning rate of step 0..steps-1: from `lr` down to floor * lr along a cosine (paper: 0.1 to 0.001).

    warm_up: the part of the steps, 0 to 1, in which it first rises in proportion."""
    rising = min(1.0, (step + 1) / (warm_up * steps)) if warm_up else 1.0
    return rising * lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / steps)))


def autocast(device, amp):
    """The autocast context of "bf16", "fp16" or "off" on a device."""
    return torch.autocast(device.type, torch.float16 if amp == "fp16" else torch.bfloat16, enabled=amp != "off")


def label_loss(network, x, y, config):
    """Cross-entropy of network(x, config) on the labels: (loss to minimise, logits (B, classes) of the path)."""
    logits = network(x, config).float()
    return F.cross_entropy(logits, y), logits


def train_step(network, optimizer, scaler, amp, loss, x, y, config):
    """One SGD step through `config`. Returns float (2,): cross-entropy on the labels and accuracy of the batch.

    loss: a function like `label_loss`; scaler: a torch.amp.GradScaler, which does nothing unless amp is "fp16"."""
    network.train()
    optimizer.zero_grad()
    with autocast(x.device, amp):
        objective, logits = loss(network, x, y, config)
    scaler.scale(objective).backward()
    scaler.step(optimizer)
    scaler.update()
    logits = logits.detach()
    return torch.stack([F.cross_entropy(logits, y), (logits.argmax(1) == y).float().mean()])


@torch.no_grad()
def score_step(network, amp, x, y, config):
    """Accuracy of the batch through `config`, as a tensor on the device."""
    network.eval()
    with autocast(x.device, amp):
        return (network(x, config).argmax(1) == y).float().mean()


def evaluate(score, split, config, device, batch_size=256):
    """Accuracy, a fraction, on a Split; score(x, y, config) is that of one batch, such as `Learner.score`.

    With batch statistics ("shared" norm) the answer depends a little on `batch_size` and on the order of the split,
    which in the scripts makes every batch class-balanced (`balanced_order`)."""
    correct = torch.zeros((), device=device)
    for x, y in scoring_batches(split, batch_size, device):
        correct += score(x, y, config) * len(y)
    return correct.item() / len(split)


@functools.cache
def graph_place(device):
    """What all CUDA graphs on a device share: stream and memory pool, for no two run at the same time, and whether
    capturing works."""
    return SimpleNamespace(stream=torch.cuda.Stream(device), pool=torch.cuda.graph_pool_handle(), works=True)


def graphed(step, device):
    """On CUDA, replay `step(x, y, *step_args)` as one CUDA graph per shape and step_args; elsewhere return `step`.

    At batch 128 a ResNet20 step is a thousand kernels of about two microseconds (H100); a graph launches them at once.
    The first call runs eagerly (and warms up the libraries), the second captures, later ones replay. `step` returns a
    tensor, which the next call of any graph on this device may overwrite; it must not wait for the device. Where
    capturing fails, one line says so and all later steps run eagerly."""
    if device.type != "cuda":
        return step
    place = graph_place(device)
    seen = set()
    captured = {}
    static_inputs = {}

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
                say(f"no CUDA graphs here, going on without ({str(error).splitlines()[0]})", every_rank=True)
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

    network: takes (x, config); amp: "bf16", "fp16" or "off"; loss: a function like `label_loss`;
    graphs: whether steps are replayed as CUDA graphs, of which there is one for each config."""

    def __init__(self, network, device, amp="off", weight_decay=0.0, loss=label_loss, graphs=True):
        self.network = network.to(device, memory_format=torch.channels_last)
        on_cuda = device.type == "cuda"
        self.lr = torch.zeros((), device=device) if on_cuda else 0.0  # a tensor, so that a graph reads its new value
        self.optimizer = torch.optim.SGD(network.parameters(), self.lr, momentum=0.9, weight_decay=weight_decay,
                                         fused=True if on_cuda else None)
        self.velocities = [torch.zeros_like(parameter) for parameter in network.parameters()]
        for parameter, velocity in zip(network.parameters(), self.velocities):  # here, since fp16 may skip a first step
            self.optimizer.state[parameter]["momentum_buffer"] = velocity
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
        self.step = partial(train_step, network, self.optimizer, self.scaler, amp, loss)
        self.score = partial(score_step, network, amp)
        if graphs:
            self.step, self.score = graphed(self.step, device), graphed(self.score, device)

    def train(self, x, y, config, lr):
        """`train_step` at learning rate `lr`."""
        if torch.is_tensor(self.lr):
            self.lr.fill_(lr)
        else:
            self.optimizer.param_groups[0]["lr"] = lr
        return self.step(x, y, config)

    def state_dict(self):
        """What a checkpoint needs: weights, momentum, loss scale."""
        return {"network": self.network.state_dict(), "momentum": self.velocities, "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state):
        """Go on from `state_dict()`, also on another kind of device: values are copied, settings stay those of here."""
        self.network.load_state_dict(state["network"])
        self.scaler.load_state_dict(state["scaler"])
        for mine, saved in zip(self.velocities, state["momentum"]):
            mine.copy_(saved)


def keep_freed_memory():
    """Tell glibc to keep freed memory instead of returning it to the kernel; without glibc do nothing.

    A training step frees and asks again for the same activations. By default glibc unmaps them, and the kernel zeroes
    every page again: half the time of a bf16 step of [4,3,3] on 2 cores (700 against 1380 images/s)."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30) or libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: heap below 1 GiB; older: 32 MiB
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: do not shrink the heap


def pick_device(name="auto", local_rank=0):
    """The torch.device named; `auto` takes CUDA, then MPS, then the CPU. Ranks share the GPUs round robin.

    Raises UserError when it does not work here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", local_rank % max(1, torch.cuda.device_count()))
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used here ({reason}): use auto, cpu or another") from None
    return device


def pick_amp(name, device):
    """Mixed precision for a device: "bf16", "fp16" or "off". Raises UserError for what the device does not have.

    `auto`: bf16 on GPUs that have it, fp16 on older ones, off on MPS. Whether a CPU is fast at bf16 depends on its
    kind (AMX: yes; AVX512-BF16: on some), so there a step of each is timed, in about a second."""
    cuda = device.type == "cuda"
    modern = cuda and torch.cuda.get_device_capability(device)[0] >= 8
    if (name == "fp16" and not cuda) or (name == "bf16" and cuda and not modern):
        raise UserError(f"--amp {name} does not work on this device ({device.type}): use auto or off")
    if name != "auto":
        return name
    if device.type != "cpu":
        return "bf16" if modern else "fp16" if cuda else "off"
    x, y = torch.zeros(32, 3, 32, 32).contiguous(memory_format=torch.channels_last), torch.arange(32) % 10
    milliseconds = {}
    for amp in ("off", "bf16"):
        step = partial(Learner(ResNet20(), device, amp).train, x, y, (4, 3, 3), 0.1)
        milliseconds[amp] = 1e3 * min(timeit.repeat(step, number=1, repeat=4))
    choice = min(milliseconds, key=milliseconds.get)
    say(f"--amp {choice}: a step takes {milliseconds['bf16']:.0f} ms in bf16, {milliseconds['off']:.0f} in float32")
    return choice


# ---- Checkpoint -----------------------------------------------------------------------------------------------------

def gather(value):
    """The value of every rank, in their order, as a list. Over gloo: the one thing that processes do together."""
    if WORLD == 1:
        return [value]
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(days=7))  # a rank may have much to train before it comes
    values = [None] * WORLD
    dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def locked(folder, wait):
    """Make a folder and hold the kernel's lock on it, which ends with the process however that ends.

    Without `wait`, a folder in use raises UserError. Windows has no such lock and does without."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    if os.name == "nt":
        yield
        return
    import fcntl
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"{folder} is in use by another run: wait for it or choose another --out") from None
    finally:
        os.close(handle)


def save_checkpoint(path, state):
    """Write a dict of tensors and plain values, whole or not at all."""
    buffer = io.BytesIO()  # torch.save to a full disk would not raise OSError
    torch.save(state, buffer)
    with whole_file(path) as file:
        file.write(buffer.getbuffer())


def load_checkpoint(path):
    """What `save_checkpoint` wrote, on the CPU; None where there is no file. Raises UserError when it is damaged."""
    if not Path(path).exists():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # whatever a damaged file makes zip and unpickler raise
        raise UserError(f"{path} is damaged ({error}): delete it to start over") from None


def with_seed(stage, seed):
    """The name of a search's files: seed 0 keeps the stage's, others lie beside it, such as supernet-seed1."""
    return f"{stage}-seed{seed}" if seed else stage


HELD = contextlib.ExitStack()  # what this process holds until it ends
NOT_SETTINGS = {"data_dir", "out", "device", "stem", "space"}


def earlier_settings(out, name):
    """The settings of what a stage has left in the folder `out`, from the first of its files; None if it has none."""
    for path in [out / f"{name}.json", out / f"{name}.pt", *sorted(out.glob(f"{name}/*"))]:
        if path.exists() and path.suffix in (".json", ".pt"):
            return (load_json(path) if path.suffix == ".json" else load_checkpoint(path)).get("args", {})
    return None


def open_stage(args, name, ignore=()):
    """Load the data and lock the folder --out for this process: (data, settings).

    settings: the options that determine the results, except those to `ignore`. Where the stage was begun with others,
    raises UserError, naming them. Settles args.amp: `auto` keeps the precision that the stage was begun with."""
    data = load_dataset(args.dataset, args.data_dir, args.image_size, args.limit_train, args.limit_test)
    args.out.mkdir(parents=True, exist_ok=True)
    if RANK == 0:
        HELD.enter_context(locked(args.out, wait=False))
    earlier = earlier_settings(args.out, name)
    kept = gather((earlier or {}).get("amp") if args.amp == "auto" else None)
    kept = kept[RANK] or next(filter(None, kept), None)  # a rank that begins now does as one that goes on
    args.amp = pick_amp(kept, args.device) if kept else gather(pick_amp(args.amp, args.device))[0]  # else one measures
    settings = {key: value for key, value in sorted(vars(args).items()) if key not in {*NOT_SETTINGS, *ignore}}
    settings.update(dataset=data.name, data_digest=data.digest)
    differ = {key: f"--{key.replace('_', '-')} ({earlier.get(key)} there, {value} here)"
              for key, value in settings.items() if earlier is not None and earlier.get(key) != value}
    if "data_digest" in differ:
        differ["data_digest"] = "--dataset (other images)"
    if differ:
        raise UserError(f"{args.out} holds a {name} run with other settings: {', '.join(differ.values())}; "
                        f"use those, choose another --out, or delete the folder")
    return to_device(data, args.device), settings


def steps_per_epoch(split, batch_size):
    """Training steps of one epoch. Raises UserError when there is none."""
    if len(split) < batch_size:
        raise UserError(f"--batch-size {batch_size} is more than the {len(split)} images that train, in a search half "
                        f"of all: lower it")
    return len(split) // batch_size


def log_epoch(epoch, args, measures, began, steps, label=""):
    """Print an epoch's line. measures: {name: value}; began: time.monotonic() at its start. Returns its history entry.

    Raises UserError when the loss is not finite."""
    if not math.isfinite(measures["loss"]):
        raise UserError(f"the loss is not finite in epoch {epoch + 1}: lower --lr (now {args.lr:g})")
    seconds, lr = time.monotonic() - began, cosine_lr(epoch * steps, args.epochs * steps, args.lr, args.warm_up)
    text = "  ".join(f"{name} {value:.4f}" for name, value in measures.items())
    speed, left = steps * args.batch_size / seconds, (args.epochs - epoch - 1) * seconds / 60
    say(f"{label}epoch {epoch + 1}/{args.epochs}  {text}  lr {lr:.4f}  {speed:.0f} images/s  {left:.1f} min left",
        every_rank=True)
    rounded = {name: round(value, 6) for name, value in measures.items()}
    return {"epoch": epoch + 1, **rounded, "lr": round(lr, 6), "seconds": round(seconds, 2)}


# ---- Results --------------------------------------------------------------------------------------------------------

def kendall_tau(x, y):
    """Kendall's tau-b of two equally long sequences, ties handled (Kendall, 1945); None where it is undefined."""
    x_order, y_order = (np.sign(np.subtract.outer(v, v)) for v in (np.asarray(x, float), np.asarray(y, float)))
    scale = math.sqrt((x_order ** 2).sum() * (y_order ** 2).sum())
    return float((x_order * y_order).sum() / scale) if scale else None


def pareto(results, key):
    """The entries that no other beats: none is as cheap in `macs` and better in `key`. Cheapest first."""
    front = []
    for entry in sorted(results, key=lambda r: (r["macs"], -r[key])):
        if not front or entry[key] > front[-1][key]:
            front.append(entry)
    return front


def judge(args, results, expected):
    """How well searched results rank, by the test accuracies in single.json of --out: the JSON's `rank`.

    kendall_tau: tau-b of val_acc; kendall_tau_macs: of multiply-adds alone. regret: the best true accuracy minus that
    of the configuration with the best val_acc, a fraction. None where fewer than half of the results are known there,
    or where it is not of the images, size and space `expected` (see `load_json`), which one line says."""
    path = args.out / "single.json"
    try:
        single = load_json(path, "test_acc", **expected)["results"] if path.exists() else []
    except UserError as error:
        say(f"not judged: {error}", every_rank=True)
        return None
    truth = {tuple(entry["config"]): entry["test_acc"] for entry in single}
    known = [r for r in results if tuple(r["config"]) in truth]
    if len(known) < max(2, len(results) / 2):
        return None
    true = [truth[tuple(r["config"])] for r in known]
    chosen = max(known, key=lambda r: r["val_acc"])
    return {"kendall_tau": kendall_tau([r["val_acc"] for r in known], true),
            "kendall_tau_macs": kendall_tau([r["macs"] for r in known], true),
            "regret": max(true) - truth[tuple(chosen["config"])], "against": path.name, "n": len(known)}


def print_rank(name, rank):
    """Print what `judge` found, where it found something."""
    if rank:
        say(f"{name} against {rank['against']}, {rank['n']} configurations: Kendall's tau "
            f"{rank['kendall_tau'] or 0:.2f}, by multiply-adds alone {rank['kendall_tau_macs'] or 0:.2f}; "
            f"its choice is {100 * rank['regret']:.2f} points below the best", every_rank=True)


def print_table(header, rows):
    """Print rows of strings and numbers in aligned columns; None shows as a dash."""
    cells = [["-" if value is None else str(value) for value in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        words = [word.rjust(width) for word, width in zip(row, widths)]
        say("  ".join([row[0].ljust(widths[0]), *words[1:]]).rstrip())


def print_results(results, key, default):
    """Print the best five results, the default and the Pareto set (*)."""
    front = [r["config"] for r in pareto(results, key)]
    rows = []
    for place, r in enumerate(sorted(results, key=lambda r: -r[key]), 1):
        usual = r["config"] == list(default)
        if place <= 5 or usual or r["config"] in front:
            name = show(r["config"]) + (" default" if usual else "")
            rows.append([name, f"{r['macs'] / 1e6:.1f}", f"{r[key]:.4f}", place, "*" if r["config"] in front else ""])
    print_table(["configuration", "M multiply-adds", key.replace("_", " "), "rank", "Pareto"], rows)


def save_json(path, data):
    """Write a dict as strict JSON (NaN raises ValueError), one line per key and per entry of a list of entries."""
    lines = []
    for key, value in data.items():
        text = json.dumps(value, allow_nan=False)
        if isinstance(value, list) and value and isinstance(value[0], (dict, list)):
            text = "[\n    " + ",\n    ".join(json.dumps(entry, allow_nan=False) for entry in value) + "\n  ]"
        lines.append(f"  {json.dumps(key)}: {text}")
    with whole_file(path) as file:
        file.write(("{\n" + ",\n".join(lines) + "\n}\n").encode())


def load_json(path, key=None, **expected):
    """Read a JSON object. Raises UserError, naming the file, when it is damaged, when an entry of its `results` has no
    configuration or no number `key`, or when it is not as expected, for example dataset="cifar10"."""
    try:
        data = dict(json.loads(Path(path).read_bytes()))
        differ = [f"{name} {data.get(name)} instead of {want}" for name, want in expected.items()
                  if data.get(name) != want]
        if key and not (data["results"] and all(r["config"] and math.isfinite(r[key]) for r in data["results"])):
            raise ValueError(f"no results with config and {key}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error!r}): delete it and make it again") from None
    if differ:
        raise UserError(f"{path} has {', '.join(differ)}")
    return data


def identity(args, digest=None):
    """What two stages' JSON must share for one to use the other: keywords for `load_json`. digest: that of the data,
    left out where they are not at hand."""
    same = {"dataset": as_text(Path(args.dataset).resolve().name), "image_size": args.image_size, "space": args.space}
    return same if digest is None else {**same, "data_digest": digest}


def result_fields(config, data, args):
    """The fields of a result that follow from the configuration: itself, multiply-adds, trained parameters."""
    network = {"classes": len(data.classes), "stem": args.stem}
    with torch.device("meta"):
        params = sum(p.numel() for p in ResNet20(**network, layers=args.layers).parameters())
    return {"config": list(config), "macs": count_macs(config, **network, size=args.image_size // args.stem),
            "params": params}


def write_stage(args, name, data, settings, results, key, counts, seconds, **extra):
    """Write a stage's JSON, `name`.json: results best first by `key`, the best, the default and the Pareto set.

    name: as from `with_seed`; counts: the images that train, score and test."""
    results = sorted(results, key=lambda r: -r[key])
    default = list(default_config(args.layers, args.scales))
    device = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else args.device.type
    save_json(args.out / f"{name}.json", {
        "schema": 1, "stage": name.partition("-")[0], "dataset": data.name, "image_size": args.image_size,
        "num_classes": len(data.classes), "n_train": counts[0], "n_val": counts[1], "n_test": counts[2],
        "data_digest": data.digest,
        "space": args.space, "args": settings, "env": {"torch": torch.__version__, "device": device, "amp": args.amp},
        "seconds": round(seconds, 2), "classes": data.classes, "results": results, "best": results[0],
        "default": next((r for r in results if r["config"] == default), None),
        "pareto": [r["config"] for r in pareto(results, key)], **extra})


# ---- Command line ---------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def parse(doc, add_options=lambda add: None, synthetic_epochs=7):
    """Parse the command line. doc: the script's docstring; add_options(add): adds the script's own options.

    Returns the namespace with defaults filled in and `device` a torch.device. Raises UserError."""
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--dataset", default="cifar10", help="cifar10 (default), cifar100, food101, synthetic, or a folder of images")
    add("--data-dir", default="data", help="folder where data sets are kept and downloaded to; default data")
    add("--out", type=Path, help="folder of the JSON files and checkpoints; default runs/<dataset>")
    add("--image-size", type=int, help="side of the square images in pixels, 16, 32, 64 or 128; default 32 "
        "(food101 128, synthetic 16)")
    add("--epochs", type=int, help="passes over the training images; default 100 (paper), on synthetic 7 for a network "
        "alone and 24 for a search")
    add("--batch-size", type=int, help="images per step; default 128 (paper; synthetic 64)")
    add("--lr", type=float, help="first learning rate, falls to 1%% of it along a cosine; default 0.1 (paper; "
        "synthetic 0.015)")
    add("--warm-up", type=float, help="part of the steps, 0 to 1, in which the rate rises; default 0 (paper; "
        "synthetic 0.2)")
    add("--weight-decay", type=float, default=0.0, help="L2 penalty; default 0 (paper)")
    add("--seed", type=int, default=0, help="of everything random; default 0; a search under torchrun adds its rank")
    add("--layers", type=int, default=10, help="searched layers; default 10, a ResNet20")
    add("--scales", type=int, default=3, help="resolutions; default 3")
    add("--device", default="auto", help="auto (default: cuda, then mps, then cpu) or a torch device")
    add("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto", help="mixed precision; default auto: what "
        "the GPU has, on a CPU what a short measurement finds faster")
    add("--limit-train", type=int, help="use only the first N training images of a fixed class-balanced shuffle")
    add("--limit-test", type=int, help="use only the first N test images of a fixed class-balanced shuffle")
    add_options(add)
    args = parser.parse_args()
    least = {"weight_decay": 0, "warm_up": 0, "seed": 0, "shared_epochs": 0, "split_at": 0, "layers": 3,
             "limit_test": 2, "lr": sys.float_info.min, "exponent": sys.float_info.min}
    most = {"warm_up": 1, "split_at": 1}
    for name, value in vars(args).items():
        low, high = least.get(name, 1), most.get(name, sys.float_info.max)
        if type(value) in (int, float) and not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be from {low:.3g} to {high:.3g}")
    synthetic = args.dataset == "synthetic"  # few steps: at a rate of 0.1 some configurations would not begin to learn
    args.epochs = args.epochs or (synthetic_epochs if synthetic else 100)
    args.batch_size = args.batch_size or (64 if synthetic else 128)
    args.lr = args.lr or (0.015 if synthetic else 0.1)
    if args.warm_up is None:
        args.warm_up = 0.2 if synthetic else 0.0
    args.image_size = args.image_size or IMAGE_SIZE.get(args.dataset, 32)
    if args.image_size not in (16, 32, 64, 128):
        raise UserError(f"--image-size {args.image_size}: must be 16, 32, 64 or 128")
    args.stem = max(1, args.image_size // 32)
    most_scales = min(args.layers, (args.image_size // args.stem).bit_length())
    if args.scales > most_scales:
        raise UserError(f"--scales {args.scales}: {args.layers} layers and this image size allow {most_scales}")
    args.space = {"layers": args.layers, "scales": args.scales, "size": len(pooling_configs(args.layers, args.scales))}
    args.out = args.out or Path("runs", Path(args.dataset).resolve().name)
    args.device = pick_device(args.device, LOCAL_RANK)
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
    return args


def run_main(main):
    """Run a script's main. A UserError and its like are one line on standard error, exit code 2."""
    try:
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be text
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
