"""What two or more of the scripts share: search space, ResNet20, data, training steps, ranking, runs.

Every public function stands alone: it takes tensors and plain numbers, so copy what you need.
Run as a script, this file measures what your machine gives:

    python common.py                                  # training and scoring speed, cheapest to dearest
    python common.py --device cpu --amp off --batch-size 64

Sections: errors and JSON | search space | network | data | training | ranking | runs | command line | benchmark.
"Paper" below is Javan, Toews, Pedersoli, "Balanced Mixture of SuperNets for Learning the CNN Pooling
Architecture", AutoML 2023, arXiv 2306.11982.
"""
import argparse
import contextlib
import ctypes
import errno
import hashlib
import io
import itertools
import json
import math
import mmap
import os
import re
import signal
import statistics
import sys
import tempfile
import time
import timeit
import zipfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

RANK, WORLD, LOCAL_RANK = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
START = time.monotonic()  # --time-limit counts from here


# ---- Errors and JSON ------------------------------------------------------------------------------------------------

class UserError(Exception):
    """Something a person can put right: shown as one line on standard error, exit code 2."""


def say(text=""):
    """Print on the first rank only."""
    if RANK == 0:
        print(text, flush=True)


@contextlib.contextmanager
def whole_file(path, keep=None):
    """Open a binary file that appears under `path` whole, when the block ends without an exception, or not at all.

    It is written beside `path`, synced and renamed. keep: path under which the file that was there stays."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and Path(path).exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say where
        raise
    finally:
        temporary.unlink(missing_ok=True)


def save_json(path, data):
    """Write a dict as strict JSON (NaN raises ValueError), one line per key and per entry of a list of entries."""
    def entry(value):
        if isinstance(value, list) and value and isinstance(value[0], (dict, list)):
            return "[\n    " + ",\n    ".join(json.dumps(v, allow_nan=False) for v in value) + "\n  ]"
        return json.dumps(value, allow_nan=False)
    text = "{\n" + ",\n".join(f"  {json.dumps(k)}: {entry(v)}" for k, v in data.items()) + "\n}\n"
    with whole_file(path) as file:
        file.write(text.encode())


def load_json(path, stage=None, dataset=None, space=None):
    """Read a stage's JSON. Raises UserError, naming the file, when it is missing, no JSON, or of another kind."""
    def wrong(why):
        return UserError(f"{path} {why}; name another file or make it again")
    try:
        data = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise wrong("does not exist") from None
    except (ValueError, OSError) as error:
        raise wrong(f"cannot be read as JSON ({error})") from None
    if not isinstance(data, dict) or not isinstance(data.get("results"), list) or not data["results"]:
        raise wrong("has no list of results")
    if data.get("schema", 1) != 1:
        raise wrong(f"has schema {data['schema']}, and this version reads schema 1")
    for key, want in (("stage", stage), ("dataset", dataset), ("space", space)):
        if want is not None and data.get(key) != want:
            raise wrong(f"is of another {key}: {data.get(key)} instead of {want}")
    if not all(isinstance(r, dict) and isinstance(r.get("config"), list) for r in data["results"]):
        raise wrong("has a result without a configuration")
    return data


def print_table(header, rows):
    """Print rows of strings and numbers in aligned columns; None shows as a dash."""
    cells = [list(header)] + [["-" if v is None else str(v) for v in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for row in cells:
        say("  ".join(v.ljust(w) if i == 0 else v.rjust(w) for i, (v, w) in enumerate(zip(row, widths))).rstrip())


# ---- Search space (paper, section 3): a configuration says how many layers run at each resolution -------------------

def pooling_configs(layers=10, scales=3):
    """All compositions of `layers` into `scales` positive parts, as tuples in lexicographic order.

    pooling_configs(10, 3) is the paper's space: 36 configurations, (1, 1, 8) first, (8, 1, 1) last.
    Raises ValueError when there is none."""
    if not 1 <= scales <= layers:
        raise ValueError(f"{layers} layers cannot run at {scales} scales: each scale needs a layer")
    cuts = itertools.combinations(range(1, layers), scales - 1)
    return [tuple(b - a for a, b in zip((0, *cut), (*cut, layers))) for cut in cuts]


def even_split(total, parts):
    """`total` as `parts` whole numbers as equal as they can be, larger ones first: (10, 3) gives (4, 3, 3)."""
    return tuple(total // parts + (i < total % parts) for i in range(parts))


def default_config(layers=10, scales=3):
    """The usual choice: resolutions change where the channels double, (4, 3, 3) in a ResNet20."""
    return even_split(layers, scales)


def check_config(config, layers=10, scales=None, size=32):
    """Return `config` as a tuple. Raises ValueError when it does not fit `layers`, `scales` or `size` pixels."""
    config, text = tuple(config), ",".join(map(str, config))
    if not config or any(not isinstance(part, int) or part < 1 for part in config):
        raise ValueError(f"configuration {text}: every resolution needs a whole number of layers, at least 1")
    if scales is not None and len(config) != scales:
        raise ValueError(f"configuration {text} has {len(config)} resolutions instead of {scales}")
    if sum(config) != layers:
        raise ValueError(f"configuration {text} has {sum(config)} layers instead of {layers}")
    if size >> (len(config) - 1) < 1:
        raise ValueError(f"{len(config)} scales are too many: {size} pixels can be halved {int(math.log2(size))} times")
    return config


def show(config):
    """A configuration as people write it: [4,3,3]."""
    return "[" + ",".join(map(str, config)) + "]"


def layer_channels(layers=10):
    """Output channels of each layer, which never move: 16 x4, 32 x3, 64 x3 in a ResNet20."""
    return [width for width, n in zip((16, 32, 64), even_split(layers, 3)) for _ in range(n)]


def _convolutions(layers, channels, stem):
    """Every convolution of a ResNet20: (searched layer or -1 for the stem, kernel, inputs, outputs)."""
    widths = layer_channels(layers)
    yield from [(-1, 2 * stem - 1, channels, 16)] if stem > 1 else []
    yield 0, 3, 16 if stem > 1 else channels, widths[0]
    for i, (a, b) in enumerate(zip(widths, widths[1:]), 1):
        yield from [(i, 3, a, b), (i, 3, b, b), *([(i, 1, a, b)] if a != b else [])]


def count_macs(config, channels=3, classes=10, stem=1, size=32):
    """Multiply-adds of one image: convolutions and the last linear layer, in closed form.

    `size`: side in pixels at the first searched layer (after the stem, which reduces by `stem`).
    40.8 M for (4, 3, 3); normalisation, pooling and additions are not counted, as is usual."""
    layers = sum(config)
    sides = [size >> scale for scale, n in enumerate(config) for _ in range(n)] + [size]  # the last: index -1, the stem
    return layer_channels(layers)[-1] * classes + sum(
        kernel ** 2 * a * b * sides[i] ** 2 for i, kernel, a, b in _convolutions(layers, channels, stem))


def count_params(layers=10, channels=3, classes=10, stem=1, norm="own"):
    """Trained parameters in closed form; the same for every configuration, which is why weights can be shared."""
    affine = 2 if norm == "own" else 0
    return (layer_channels(layers)[-1] + 1) * classes + sum(
        (kernel ** 2 * a + affine) * b for _, kernel, a, b in _convolutions(layers, channels, stem))


# ---- Network --------------------------------------------------------------------------------------------------------

def make_norm(channels, norm):
    """Batch normalisation: "own" learns scale and shift and keeps running statistics; "shared", for supernets, has
    neither and always uses the batch's statistics, since averages over different paths would mix (paper, section 4)."""
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
        self.shortcut = nn.Identity() if inputs == outputs else nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, bias=False), make_norm(outputs, norm))

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x), inplace=True)


class ResNet20(nn.Module):
    """ResNet20 for small images whose pooling is an argument: `forward(x, config)`.

    x: (B, channels, S, S) normalised images, S = 32 x stem; result: (B, classes) logits. Without a configuration it
    runs `self.config`, at first the usual one, pooling where the channels double.
    layers: searched layers, one 3x3 convolution and layers - 1 residual blocks. A 2x2 max pooling stands
    before the first layer of every resolution after the first (paper, section 3).
    stem: 1 for 32-pixel images; 2 or 4 puts a convolution of that stride before the searched layers.
    norm: "own" for networks trained alone, "shared" for supernets (see `make_norm`)."""

    def __init__(self, channels=3, classes=10, stem=1, layers=10, norm="own"):
        super().__init__()
        if stem not in (1, 2, 4):
            raise ValueError(f"stem {stem}: must be 1, 2 or 4")
        if layers < 3:
            raise ValueError(f"{layers} layers: at least 3 are needed, one for each width")

        def conv(inputs, kernel, stride=1):
            return nn.Sequential(nn.Conv2d(inputs, 16, kernel, stride, kernel // 2, bias=False), make_norm(16, norm),
                                 nn.ReLU(inplace=True))
        widths = layer_channels(layers)
        self.stem = conv(channels, 2 * stem - 1, stem) if stem > 1 else nn.Identity()
        self.layers = nn.ModuleList([conv(16 if stem > 1 else channels, 3)])
        self.layers.extend(Block(a, b, norm) for a, b in zip(widths, widths[1:]))
        self.head = nn.Linear(widths[-1], classes)
        self.config = default_config(layers)

    def forward(self, x, config=None):
        x, config = self.stem(x), config or self.config
        check_config(config, len(self.layers), size=x.shape[-1])
        pools = set(itertools.accumulate(config[:-1]))
        for i, layer in enumerate(self.layers):
            if i in pools:
                x = F.max_pool2d(x, 2)
            x = layer(x)
        return self.head(x.mean((2, 3)))


# ---- Data: every data set ends as uint8 images (N, H, W, C) plus labels; batches are cut and augmented on the device

@dataclass
class Split:
    """Labelled images: the rows `index` of a uint8 array (N, H, W, C) that several splits may share.

    pixels: a tensor on any device, or a NumPy memmap; index, labels: int64 CPU tensors of equal length;
    mean, std: per channel, of 0..255, with which `batches` normalises."""
    pixels: object
    index: torch.Tensor
    labels: torch.Tensor
    mean: tuple = (127.5, 127.5, 127.5)
    std: tuple = (127.5, 127.5, 127.5)

    def __len__(self):
        return len(self.index)

    def take(self, rows):
        """The split of these rows (int64 tensor), without copying pixels."""
        return replace(self, index=self.index[rows], labels=self.labels[rows])

    def fetch(self, rows):
        """Pixels of the rows of `index` given, uint8 (len(rows), H, W, C), from a tensor or from the mapped file."""
        if torch.is_tensor(self.pixels):
            return self.pixels[rows]
        pixels = torch.from_numpy(np.asarray(self.pixels[rows.numpy()]))
        if hasattr(mmap, "MADV_DONTNEED"):  # pages that were read count as resident memory until they are given back
            self.pixels._mmap.madvise(mmap.MADV_DONTNEED)
        return pixels


@dataclass
class Dataset:
    """A data set: two splits and the names of the classes."""
    name: str
    train: Split
    test: Split
    classes: list
    version: str = ""  # changes when a folder's files do


def balanced_order(labels, seed=0):
    """A shuffle (int64 tensor) in which every prefix holds the classes in proportion, to within one image each."""
    labels, rng = np.asarray(labels), np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    position = np.empty(len(labels))
    for label in np.unique(labels):
        mine = order[labels[order] == label]
        position[mine] = (np.arange(len(mine)) + rng.random(len(mine))) / len(mine)
    return torch.from_numpy(np.argsort(position, kind="stable"))


def halves(split, seed=0):
    """Cut a split into two halves, stratified by class: one trains weights, one scores (paper, section 4)."""
    order = balanced_order(split.labels, seed + 1)
    rank = torch.empty(len(order), dtype=torch.int64)
    for shift, label in enumerate(split.labels.unique()):  # odd classes give their extra image to alternate halves
        mine = order[split.labels[order] == label]
        rank[mine] = torch.arange(len(mine)) + shift
    return split.take(order[rank[order] % 2 == 0]), split.take(order[rank[order] % 2 == 1])


def channel_stats(split, chunk=512):
    """Mean and standard deviation per channel, in units of 0..255, from exact integer sums: two lists of C floats."""
    total = squares = n = 0
    for rows in split.index.sort().values.split(chunk):
        x = np.asarray(split.fetch(rows)).reshape(-1, split.pixels.shape[-1]).astype(np.int64)
        total, squares, n = total + x.sum(0), squares + (x * x).sum(0), n + len(x)
    mean = total / n
    return mean.tolist(), np.sqrt(np.maximum(squares / n - mean ** 2, 1.0)).tolist()


@contextlib.contextmanager
def locked(folder, wait):
    """Hold an exclusive lock on a folder, made if missing and removed again if it stays empty.

    The lock is the kernel's, on the folder itself: it ends with the process however that ends, and leaves no file.
    Without `wait`, a folder in use raises UserError."""
    folder, handle = Path(folder), None
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            import fcntl  # not on Windows, where there is no lock
            handle = os.open(folder, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(f"{folder} is in use by another run: wait for it or choose another --out") from None
        except ImportError:
            pass
        yield
    finally:
        if handle is not None:
            os.close(handle)
        with contextlib.suppress(OSError):
            for parent in made:
                parent.rmdir()


def read_image(path, size):
    """Decode an image of any mode to uint8 (size, size, 3): upright, shorter side resized, centre square."""
    from PIL import Image, ImageOps
    with Image.open(path) as image:
        image.draft("RGB", (size, size))  # a JPEG is decoded at the smallest scale that is large enough
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit grey
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        image = image.convert("RGBA" if image.mode == "P" else "RGB").convert("RGB")
        return np.array(ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR))


class _Decoded(torch.utils.data.Dataset):
    def __init__(self, root, files, size):
        self.root, self.files, self.size = root, files, size

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        try:
            return read_image(self.root / self.files[i], self.size), ""
        except Exception as error:  # decoders raise many kinds; all bad files are listed before giving up
            return np.zeros((self.size, self.size, 3), np.uint8), f"{self.files[i]} ({error})"


def decode_cached(root, files, size, cache, workers):
    """Decode image files once, in `workers` processes, to a mapped file in the folder `cache`.

    Returns (uint8 memmap (N, size, size, 3), the file). The file's name holds a digest of all names, lengths and
    times, so that a changed source is decoded anew. Raises UserError that lists every file that is no image."""
    def line(name):
        stat = os.stat(root / name)
        return f"{name} {stat.st_size} {stat.st_mtime_ns}\n"
    place = f"{root.name}-{hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:8]}-{size}-"
    digest = hashlib.sha256("".join(map(line, files)).encode()).hexdigest()[:16]
    path = Path(cache) / f"{place}{digest}.npy"
    if not path.exists():
        with locked(cache, wait=True):
            if not path.exists():
                stale = list(Path(cache).glob(f"{place}*"))
                _decode(root, files, size, path, workers)
                for old in stale:
                    old.unlink()
    return np.load(path, mmap_mode="r"), path


def _decode(root, files, size, path, workers):
    loader = torch.utils.data.DataLoader(_Decoded(root, files, size), batch_size=32, num_workers=workers,
                                         worker_init_fn=_ignore_interrupt)
    bad, done, shown = [], 0, time.monotonic()
    with whole_file(path) as file:
        shape = {"descr": "|u1", "fortran_order": False, "shape": (len(files), size, size, 3)}
        np.lib.format.write_array_header_1_0(file, shape)
        for images, errors in loader:
            file.write(images.numpy())
            bad += [error for error in errors if error]
            done += len(images)
            if time.monotonic() > shown + 2 or done == len(files):
                shown = time.monotonic()
                say(f"decoding {root}: {done} of {len(files)} images")
        if bad:
            raise UserError(f"{root}: {len(bad)} files are no images, remove or replace them: {'; '.join(bad)}")


def _ignore_interrupt(worker):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _folder_files(root):
    """Class names and (file, label) lists of the training and the test images of a folder of images."""
    test = next((part for part in ("test", "val") if (root / part).is_dir()), None)
    if not (root / "train").is_dir() or test is None:
        raise UserError(f"{root} needs the folders train/<class>/ and test/<class>/ (or val/<class>/)")
    splits, classes = [], {}
    for part in ("train", test):
        classes[part] = sorted(d.name for d in (root / part).iterdir() if d.is_dir() and not d.name.startswith("."))
        found = []
        for label, name in enumerate(classes[part]):
            files = sorted(f.name for f in (root / part / name).iterdir() if f.is_file() and f.name[0] != ".")
            if not files:
                raise UserError(f"{root / part / name} holds no images: add some or remove the class")
            found += [(f"{part}/{name}/{file}", label) for file in files]
        splits.append(found)
    if classes["train"] != classes[test]:
        odd = sorted(set(classes["train"]) ^ set(classes[test]))
        raise UserError(f"{root}: train/ and {test}/ need the same classes; only one of them has {', '.join(odd)}")
    if len(classes["train"]) < 2:
        raise UserError(f"{root / 'train'} needs at least two classes, one folder each")
    return classes["train"], *splits


def _torchvision(name, data_dir):
    """CIFAR-10, CIFAR-100 or Food-101 through torchvision, downloaded when missing: its (train, test) data sets."""
    import torchvision.datasets as sets
    kind, url, keywords = {
        "cifar10": (sets.CIFAR10, sets.CIFAR10.url, ({"train": True}, {"train": False})),
        "cifar100": (sets.CIFAR100, sets.CIFAR100.url, ({"train": True}, {"train": False})),
        "food101": (sets.Food101, "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz",
                    ({"split": "train"}, {"split": "test"}))}[name]
    try:
        return [kind(data_dir, **k) for k in keywords]
    except (RuntimeError, OSError, ValueError):
        pass
    try:
        with locked(data_dir, wait=True), contextlib.redirect_stdout(sys.stderr):
            return [kind(data_dir, download=True, **k) for k in keywords]
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(f"{name} is not in {data_dir} and could not be downloaded ({error}): "
                        f"fetch {url} and unpack it there, or name its place with --data-dir") from None


SYNTHETIC = 10_000, 2_000  # training and test images
TILES = ("0101 0101 0101 0101", "1111 0000 1111 0000", "0101 1010 0101 1010", "0011 0011 1100 1100",
         "0011 1001 1100 0110")


def synthetic_images(n, seed):
    """Ten balanced classes on which it matters where a network pools: (uint8 (n, 32, 32, 3), int64 (n,)).

    A class is a fine texture, one of five tiles of 4x4 pixels, and the direction of the bar that it fills, 10x22 or
    22x10 pixels anywhere. The tile's phase and mirroring, colour gain and offset vary. On top lies Gaussian noise whose
    deviation varies from image to image between 60 and 400 (of 255), easy to hopeless: several layers must look at
    full resolution before the texture can be pooled, and some must be left after pooling to see the bar.
    `seed` draws the images; the classes are fixed."""
    tiles = np.array([[[int(cell) for cell in row] for row in tile.split()] for tile in TILES])
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % 10)
    high, wide = (np.where(labels < 5, a, b)[:, None, None] for a, b in ((22, 10), (10, 22)))
    top, left = ((rng.random((n, 1, 1)) * (33 - side)).astype(int) for side in (high, wide))
    (down, across), mirror = rng.integers(0, 4, (2, n, 1, 1)), rng.choice([-1, 1], (n, 1, 1))
    row, column = np.arange(32)[:, None], np.arange(32)
    inside = (row >= top) & (row < top + high) & (column >= left) & (column < left + wide)
    texture = inside * (2.0 * tiles[labels[:, None, None] % 5, (row + down) % 4, (mirror * column + across) % 4] - 1)
    images = rng.uniform(90, 160, (n, 1, 1, 3)) + rng.uniform(40, 90, (n, 1, 1, 3)) * texture[..., None]
    images += rng.uniform(60, 400, (n, 1, 1, 1)) * rng.standard_normal((n, 32, 32, 3), np.float32)
    return images.clip(0, 255).astype(np.uint8), labels


def load_dataset(name, data_dir="data", image_size=None, limit_train=None, limit_test=None, workers=None):
    """Load `cifar10`, `cifar100`, `food101`, `synthetic` or a folder of images with train/ and test/ (or val/).

    data_dir: where data sets are kept and downloaded to; decoded images are cached in its folder `cache`
    (in data/cache where data_dir is marked read-only). image_size: pixels; default 128 for Food-101, else 32.
    limit_train, limit_test: only the first images of a fixed class-balanced shuffle. workers: decoding processes.
    Returns a Dataset on the CPU. Raises UserError with what to fetch, make or mend."""
    size = image_size or default_image_size(name)
    stored, version = None, ""
    if name in ("cifar10", "cifar100", "synthetic"):
        if size != 32:
            raise UserError(f"--image-size {size}: the images of {name} have 32 pixels")
        if name == "synthetic":
            (a, train_labels), (b, test_labels) = synthetic_images(SYNTHETIC[0], 1), synthetic_images(SYNTHETIC[1], 2)
            classes = [str(c) for c in range(10)]
        else:
            train, test = _torchvision(name, data_dir)
            a, train_labels, b, test_labels, classes = train.data, train.targets, test.data, test.targets, train.classes
        pixels = torch.from_numpy(np.concatenate([a, b]))
    else:
        if name == "food101":
            _torchvision(name, data_dir)
            root = Path(data_dir) / "food-101"
            meta = [json.loads((root / "meta" / f"{part}.json").read_text()) for part in ("train", "test")]
            classes = sorted(meta[0])
            parts = [[(f"images/{file}.jpg", classes.index(c)) for c in classes for file in m[c]] for m in meta]
        else:
            root = Path(name)
            if not root.is_dir():
                raise UserError(f"--dataset {name}: neither a folder nor one of cifar10, cifar100, food101, synthetic")
            classes, *parts = _folder_files(root)
        files = [file for part in parts for file, _ in part]
        missing = [file for file in files if not (root / file).is_file()]
        if missing:
            raise UserError(f"{root}: {len(missing)} listed images are missing: {', '.join(missing[:5])}")
        train_labels, test_labels = ([label for _, label in part] for part in parts)
        readonly = Path(data_dir).is_dir() and not Path(data_dir).stat().st_mode & 0o222
        cache = Path("data" if readonly else data_dir) / "cache"
        workers = os.cpu_count() if workers is None else workers
        pixels, stored = decode_cached(root, files, size, cache, workers)
        version = hashlib.sha256("".join(f"{f} {os.stat(root / f).st_size}\n" for f in files).encode()).hexdigest()[:16]
    labels = torch.tensor([*train_labels, *test_labels])
    n = len(train_labels)
    rows = torch.arange(len(labels))
    whole = [Split(pixels, part, labels[part]) for part in (rows[:n], rows[n:])]
    known = stored and stored.with_suffix(".json")  # reading all of a large data set takes a while
    if known and known.exists():
        mean, std = json.loads(known.read_text())["stats"]
    else:
        mean, std = channel_stats(whole[0])
        if known:
            save_json(known, {"stats": [mean, std]})
    train, test = (replace(split, mean=mean, std=std).take(balanced_order(split.labels)[:limit])
                   for split, limit in zip(whole, (limit_train, limit_test)))
    return Dataset(Path(name).name, train, test, list(classes), version)


def to_device(data, device):
    """Move a Dataset's pixels to a GPU when they take at most half of its free memory; else leave them mapped."""
    pixels = data.train.pixels
    if device.type == "cpu" or (device.type == "cuda" and pixels.nbytes > torch.cuda.mem_get_info(device)[0] / 2):
        return data
    there = torch.empty(pixels.shape, dtype=torch.uint8, device=device)
    for rows in torch.arange(len(pixels)).split(4096):
        there[rows[0]:rows[-1] + 1] = data.train.fetch(rows).to(device)
    return replace(data, train=replace(data.train, pixels=there), test=replace(data.test, pixels=there))


def crop_and_flip(images, top, left, flip, pad):
    """Pad with black by `pad` pixels, cut a window of the old size, mirror: a whole batch in one gather.

    images: uint8 (B, H, W, C); top, left: int64 (B,) in 0..2 pad; flip: bool (B,), all on one device."""
    count, height, width, _ = images.shape
    padded = F.pad(images, (0, 0, pad, pad, pad, pad))
    across = torch.arange(width, device=images.device)
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = left[:, None] + torch.where(flip[:, None], across.flip(0), across)
    return padded[torch.arange(count, device=images.device)[:, None, None], rows[:, :, None], columns[:, None, :]]


def normalise(images, mean, std):
    """uint8 (B, H, W, C) to float32 (B, C, H, W), channels-last in memory; mean, std: (C,) tensors, of 0..255."""
    return images.permute(0, 3, 1, 2).float().sub_(mean[:, None, None]).div_(std[:, None, None])


def batches(split, size, device, seed=None, augment=False, start=0, shard=(0, 1)):
    """Yield (images float32 (B, C, H, W), labels int64 (B,)) on the device.

    With a seed: one epoch of `len(split) // size` shuffled batches from number `start`, with pad-and-crop (1/8 of
    the side, 4 pixels of 32) and flip if `augment`. Everything random is drawn here, from the seed alone, so an
    epoch can be entered anywhere and is the same on every device. `shard` (rank, world) takes a part of each batch.
    Without a seed: every image once, in batches of nearly equal size; `shard` takes every world-th batch."""
    n, pad, (rank, world) = len(split), split.pixels.shape[1] // 8, shard
    rng = torch.Generator().manual_seed(seed or 0)
    if seed is None:
        order = torch.arange(n)
        parts = list(torch.tensor_split(order, max(1, round(n / size))))[rank::world]
    else:
        order = torch.randperm(n, generator=rng)
        local = size // world
        parts = [torch.arange(i * size + rank * local, i * size + (rank + 1) * local) for i in range(start, n // size)]
    shifts = torch.randint(0, 2 * pad + 1, (2, n), generator=rng).to(device)
    flips = (torch.rand(n, generator=rng) < 0.5).to(device)
    rows, labels = split.index[order], split.labels[order].to(device)
    mean, std = (torch.tensor(v, dtype=torch.float32, device=device) for v in (split.mean, split.std))
    if torch.is_tensor(split.pixels):
        rows = rows.to(split.pixels.device)
        images = (split.fetch(rows[part[0]:part[-1] + 1]) for part in parts)
    else:
        images = _read_ahead(split, [rows[part] for part in parts], device)
    for part, x in zip(parts, images):
        chosen = slice(part[0], part[-1] + 1)
        if augment:
            x = crop_and_flip(x, shifts[0, chosen], shifts[1, chosen], flips[chosen], pad)
        yield normalise(x, mean, std), labels[chosen]


def _read_ahead(split, parts, device, depth=3):
    """Read mapped pixels in a thread, `depth` batches ahead, through pinned memory on the way to a GPU."""
    def read(rows):
        pixels = split.fetch(rows)
        return pixels.pin_memory() if device.type == "cuda" else pixels
    with ThreadPoolExecutor(1) as pool:
        queue = deque()
        for rows in itertools.chain(parts, [None] * depth):
            if rows is not None:
                queue.append(pool.submit(read, rows))
            if queue and (rows is None or len(queue) > depth):
                yield queue.popleft().result().to(device, non_blocking=True)


# ---- Training -------------------------------------------------------------------------------------------------------

def derive_seed(*parts):
    """One 63-bit seed from several whole numbers, e.g. (seed, epoch): independent streams without shared state.

    Zeros at the end do not count: (0, 1) and (0, 1, 0) give the same."""
    return int(np.random.SeedSequence([int(p) for p in parts]).generate_state(1, np.uint64)[0] >> 1)


def cosine_lr(step, steps, lr, floor=0.01):
    """Learning rate of step 0..steps-1: from `lr` down to floor * lr along a cosine (paper: 0.1 to 0.001)."""
    return lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / max(1, steps))))


def pick_device(name="auto"):
    """The torch.device named; `auto` takes CUDA, then MPS, then the CPU. Ranks share the GPUs round robin."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None and torch.cuda.is_available():
            device = torch.device("cuda", LOCAL_RANK % torch.cuda.device_count())
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used here ({reason}): use auto, cpu or another") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def pick_amp(name, device):
    """Mixed precision for a device: "bf16", "fp16" or "off".

    `auto`: bf16 where the hardware is fast at it, fp16 on older GPUs, off elsewhere. On CPUs that means AMX: with
    it bf16 steps of [4,3,3] ran 1.7 times as fast as float32, with AVX512-BF16 alone slower (2 cores)."""
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device)[0] >= 8
        if name == "bf16" and not fast:
            raise UserError("--amp bf16: this GPU has no bf16; use fp16 or off")
        return ("bf16" if fast else "fp16") if name == "auto" else name
    if name == "fp16":
        raise UserError(f"--amp fp16 needs a CUDA device, and this one is {device.type}: use bf16 or off")
    if name == "auto":
        info = Path("/proc/cpuinfo")
        return "bf16" if device.type == "cpu" and info.exists() and "amx_bf16" in info.read_text() else "off"
    return name


def autocast(device, amp):
    """The autocast context of "bf16", "fp16" or "off" on a device."""
    return torch.autocast(device.type, torch.float16 if amp == "fp16" else torch.bfloat16, enabled=amp != "off")


def keep_freed_memory():
    """Tell glibc to keep freed memory instead of returning it to the kernel; without glibc do nothing.

    A training step frees and asks again for the same activations. By default glibc unmaps them, and the kernel zeroes
    every page again: half the time of a bf16 step of [4,3,3] on 2 cores (700 against 1380 images/s)."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: allocate from the heap below 1 GiB
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: do not shrink the heap


def graphed(step, device):
    """On CUDA, replay `step(x, y, *key)` as one CUDA graph per key; elsewhere return `step` unchanged.

    At batch 128 a ResNet20 step is some 400 kernels of a few microseconds, so that launching them is what takes the
    time; a graph launches them at once. The first call of a key runs eagerly (and warms up the libraries), the
    second captures, later ones replay. `step` takes and returns tensors of fixed shapes and must not synchronise.
    What it returns is overwritten by the next call."""
    if device.type != "cuda" or shard()[1] > 1:  # collectives stay outside graphs
        return step
    graphs, stream, pool, still = {}, torch.cuda.Stream(device), torch.cuda.graph_pool_handle(), {}

    def run(x, y, *key):
        key = (tuple(x.shape), key)
        if key not in graphs:
            graphs[key] = None
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                result = step(x, y, *key[1])
            torch.cuda.current_stream().wait_stream(stream)
            return result
        if key[0] not in still:
            still[key[0]] = torch.empty_like(x), torch.empty_like(y)
        inputs = still[key[0]]
        for place, value in zip(inputs, (x, y)):
            place.copy_(value)
        if graphs[key] is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                result = step(*inputs, *key[1])
            graphs[key] = graph, result
        graphs[key][0].replay()
        return graphs[key][1]
    return run


class Learner:
    """A network with its optimiser and gradient scaler: SGD steps and scores on single batches, never waiting.

    model: takes (x, config); lr is given at each step; amp: "bf16", "fp16" or "off".
    parallel: average the gradients over the ranks of the process group, each with its part of the batch."""

    def __init__(self, model, device, amp="off", momentum=0.9, weight_decay=0.0, parallel=False):
        self.model = model.to(device, memory_format=torch.channels_last)
        self.device, self.amp, self.parallel = device, amp, parallel
        cuda = device.type == "cuda"
        self.lr = torch.zeros((), device=device) if cuda else 0.0  # a tensor, so that a graph reads its new value
        self.optimizer = torch.optim.SGD(model.parameters(), self.lr, momentum, weight_decay=weight_decay,
                                         fused=True if cuda else None)
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
        self._score = graphed(self.score_step, device)
        self.use(self.train_step)

    def use(self, step):
        """Let `train` take another kind of step: a function like `train_step`."""
        self._train = graphed(step, self.device)

    def train_step(self, x, y, config):
        """One SGD step through `config`: (loss, accuracy) of the batch as tensors on the device."""
        self.model.train()
        self.optimizer.zero_grad()
        with autocast(self.device, self.amp):
            logits = self.model(x, config).float()
        loss = F.cross_entropy(logits, y)
        self.update(loss)
        return loss.detach(), (logits.detach().argmax(1) == y).float().mean()

    def update(self, loss):
        """Back-propagate a loss and let the optimiser take its step."""
        self.scaler.scale(loss).backward()
        if self.parallel:
            average([p.grad for p in self.model.parameters()])
        self.scaler.step(self.optimizer)
        self.scaler.update()

    @torch.no_grad()
    def score_step(self, x, y, config):
        """Accuracy of the batch through `config`, as a tensor on the device."""
        self.model.eval()
        with autocast(self.device, self.amp):
            return (self.model(x, config).argmax(1) == y).float().mean()

    def train(self, x, y, config, lr):
        """`train_step` at learning rate `lr`, as a CUDA graph where there is CUDA."""
        group = self.optimizer.param_groups[0]
        group["lr"] = self.lr.fill_(lr) if torch.is_tensor(self.lr) else lr
        return self._train(x, y, config)

    def score(self, x, y, config):
        """`score_step`, as a CUDA graph where there is CUDA."""
        return self._score(x, y, config)

    def state_dict(self):
        return {"model": self.model.state_dict(), "momentum": self.optimizer.state_dict()["state"],
                "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["momentum"], "param_groups": groups})
        self.scaler.load_state_dict(state["scaler"])


def average(tensors):
    """Replace tensors, in place, by their mean over all ranks: one all-reduce of one flat buffer."""
    flat = torch.cat([t.reshape(-1).float() for t in tensors])
    dist.all_reduce(flat)
    for tensor, mean in zip(tensors, (flat / dist.get_world_size()).split([t.numel() for t in tensors])):
        tensor.copy_(mean.view_as(tensor))


def shard():
    """(rank, world) for data-parallel work: of the process group where there is one, else (0, 1)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


@torch.no_grad()
def evaluate(model, split, config, device, amp="off", batch_size=256):
    """Accuracy, a fraction, of model(x, config) on a Split. Under data parallelism the ranks share the batches.

    With batch statistics ("shared" norm) the answer depends a little on `batch_size`, not on the number of ranks."""
    model.eval()
    correct = torch.zeros((), device=device)
    for x, y in batches(split, batch_size, device, shard=shard()):
        with autocast(device, amp):
            correct += (model(x, config).argmax(1) == y).sum()
    if shard()[1] > 1:
        dist.all_reduce(correct)
    return correct.item() / len(split)


# ---- Ranking --------------------------------------------------------------------------------------------------------

def kendall_tau(x, y):
    """Kendall's tau-b of two equally long sequences, ties handled (Kendall, 1945); None where it is undefined."""
    x, y = (np.sign(np.subtract.outer(v, v)) for v in (np.asarray(x, float), np.asarray(y, float)))
    scale = math.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / scale) if scale else None


def pareto(results, key):
    """The entries that no other beats: none is as cheap in `macs` and better in `key`. Cheapest first."""
    front = []
    for entry in sorted(results, key=lambda r: (r["macs"], -r[key])):
        if not front or entry[key] > front[-1][key]:
            front.append(entry)
    return front


def choose(results, key, max_macs=None):
    """The best entry within a budget of multiply-adds. Raises UserError when nothing is that cheap."""
    affordable = [r for r in results if max_macs is None or r["macs"] <= max_macs]
    if not affordable:
        raise UserError(f"--max-macs {max_macs:.4g} is below the cheapest configuration, "
                        f"{min(r['macs'] for r in results):.4g} multiply-adds: raise it")
    return max(affordable, key=lambda r: r[key])


def rank_report(results, truth, against, max_macs=None):
    """How well searched results rank against the true accuracies {config tuple: accuracy}; None below two in common.

    kendall_tau: tau-b of val_acc; kendall_tau_macs: of multiply-adds alone. regret: true accuracy of the best
    affordable configuration minus that of the one chosen, a fraction; mean_regret: the same averaged over every
    distinct cost as the budget."""
    known = [r for r in results if tuple(r["config"]) in truth]
    if len(known) < 2:
        return None
    true = [truth[tuple(r["config"])] for r in known]

    def regret(budget):
        best = max(truth[tuple(r["config"])] for r in known if r["macs"] <= budget)
        return best - truth[tuple(choose(known, "val_acc", budget)["config"])]
    budgets = sorted({r["macs"] for r in known})
    return {"kendall_tau": kendall_tau([r["val_acc"] for r in known], true),
            "kendall_tau_macs": kendall_tau([r["macs"] for r in known], true),
            "regret": regret(budgets[-1]) if max_macs is None else regret(max(max_macs, budgets[0])),
            "mean_regret": sum(map(regret, budgets)) / len(budgets), "against": against, "n": len(known)}


# ---- Runs: one stage in one output folder, with its lock, checkpoints, signals and clock ----------------------------

PUBLISHED = Path(__file__).parent / "results" / "published_cifar10_resnet20.json"
NOT_SETTINGS = {"data_dir", "out", "device", "amp", "time_limit", "fresh", "workers", "truth", "max_macs", "config",
                "runs", "test"}  # options that do not change what is trained, or, like amp, are resolved first


class Run:
    """One stage writing to one folder: `with Run(args, "mixture") as run:`.

    args: from `parse`. Holds the folder's lock; turns Ctrl-C, SIGTERM and --time-limit into a checkpoint at the end
    of the step and the exit codes 130, 143 and 3. Under torchrun, `independent` ranks train networks of their own;
    the others work on parts of the same batches. settings: what determines the result; `hidden` options do not."""

    def __init__(self, args, stage, independent=False, hidden=()):
        self.args, self.stage, self.out, self.device, self.amp = args, stage, Path(args.out), args.device, args.amp
        self.configs, self.stem = pooling_configs(args.layers, args.scales), args.image_size // 32
        self.space = {"layers": args.layers, "scales": args.scales, "size": len(self.configs)}
        self.independent, self.hidden = independent, {*NOT_SETTINGS, *hidden}
        self.stop, self.graceful, self.control, self.store, self.shared = 0, False, None, None, 0
        self.started, self.before, self.epoch_started, self.epoch_steps, self.shown = {}, {}, None, 0, 0.0

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            for number in (signal.SIGINT, signal.SIGTERM):
                stack.callback(signal.signal, number, signal.signal(number, self._signal))
            if RANK == 0:
                stack.enter_context(locked(self.out, wait=False))
                tempfile.TemporaryFile(dir=self.out).close()  # not writable? better now than after the first epoch
            if WORLD > 1:
                self.store, rank, world = next(dist.rendezvous("env://"))
                if not self.independent:  # NCCL wants a GPU for each rank
                    gpus = torch.cuda.device_count() if self.device.type == "cuda" else 0
                    nccl = int(os.environ["LOCAL_WORLD_SIZE"]) <= gpus
                    dist.init_process_group("nccl" if nccl else "gloo", store=self.store, rank=rank, world_size=world,
                                            timeout=timedelta(days=1))
                    stack.callback(dist.destroy_process_group)
                    self.control = dist.new_group(backend="gloo", timeout=timedelta(days=1))
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *_):
        self.stack.close()

    def _signal(self, number, frame):
        if self.stop or not self.graceful:  # a second signal, or no step to finish
            raise SystemExit(128 + number)
        self.stop = 128 + number

    def load_data(self):
        """The Dataset that the arguments name, on the device. Compares the settings with those of an earlier result
        in the folder, which `--fresh` sets aside (as *.old)."""
        args = self.args
        data = load_dataset(args.dataset, args.data_dir, args.image_size, args.limit_train, args.limit_test,
                            args.workers)
        self.settings = {**{k: v for k, v in sorted(vars(args).items()) if k not in self.hidden},
                         "dataset": data.name, "amp": self.amp, "data_version": data.version}
        if RANK == 0:
            path = self.out / f"{self.stage}.json"
            if args.fresh:
                for old in (*self.out.glob(f"{self.stage}*.pt"), *self.out.glob(path.name)):
                    os.replace(old, f"{old}.old")
            elif path.exists():
                self._compare(path, load_json(path, self.stage, data.name, self.space).get("args", {}))
        if WORLD > 1:
            self.store.set("ready", "") if RANK == 0 else self.store.wait(["ready"], timedelta(days=1))
        if getattr(args, "max_macs", None):
            choose([self.entry(c, data) for c in self.configs], "macs", args.max_macs)  # better now than at the end
        return to_device(data, self.device)

    def _compare(self, path, saved):
        differ = [f"--{k.replace('_', '-')} ({saved.get(k)} there, {v} here)"
                  for k, v in self.settings.items() if saved.get(k) != v]
        if differ:
            raise UserError(f"{path} was made with other settings: {', '.join(differ)}; "
                            f"use those, another --out, or --fresh to start over")

    def steps(self, split):
        """Training steps of one epoch on a split."""
        if len(split) < self.args.batch_size:
            raise UserError(f"--batch-size {self.args.batch_size} is larger than the {len(split)} images to train on")
        if self.args.batch_size % shard()[1]:
            raise UserError(f"--batch-size {self.args.batch_size} cannot be shared equally among {WORLD} ranks")
        return len(split) // self.args.batch_size

    def load(self, name=None):
        """The last readable checkpoint of `name` (default: the stage) made with the same settings, or None."""
        name, state = name or self.stage, None
        if RANK == 0 or self.independent:
            for path in (self.out / f"{name}.pt", self.out / f"{name}.prev.pt"):
                if path.exists() and state is None:
                    try:
                        state = read_checkpoint(path)
                    except Exception as error:  # whatever a damaged file makes zip and unpickler raise
                        print(f"{path} is damaged and set aside ({error})", file=sys.stderr, flush=True)
                        os.replace(path, f"{path}.damaged")
                    else:
                        self._compare(path, state["settings"])
        if self.control is not None:
            box = [state]
            dist.broadcast_object_list(box, group=self.control)
            state = box[0]
        self.before[name], self.started[name] = (state or {}).get("seconds", 0.0), time.monotonic()
        if state and state.get("step", 0) + state["epoch"] > 0:
            say(f"going on with {name} after epoch {state['epoch']}, step {state['step']}")
        self.epoch_started = time.monotonic()
        return state

    def save(self, state, name=None):
        """Write a checkpoint (a dict of tensors and plain values), keeping the one before it as *.prev.pt.

        Raises UserError instead when the losses in state["log"] are not finite."""
        name = name or self.stage
        if not torch.isfinite(state["log"]).all():
            raise UserError(f"the loss is not finite in epoch {state['epoch'] + (state['step'] > 0)}: lower --lr "
                            f"(now {self.args.lr:g}); the checkpoint before it is kept")
        if RANK == 0 or self.independent:
            buffer = io.BytesIO()  # torch.save to a full disk would not raise OSError
            torch.save({**state, "settings": self.settings, "seconds": self.seconds(name)}, buffer)
            path = self.out / f"{name}.pt"
            with whole_file(path, keep=self.out / f"{name}.prev.pt") as file:
                file.write(buffer.getvalue())

    def same(self, value):
        """Rank 0's value, as it comes back from JSON, on every rank."""
        self.shared += 1
        if WORLD > 1 and RANK == 0:
            self.store.set(f"same {self.shared}", json.dumps(value))
        return json.loads(json.dumps(value) if WORLD == 1 else self.store.get(f"same {self.shared}"))

    def seconds(self, name=None):
        """Seconds spent on `name` (default: the stage) since `load`, earlier runs counted in."""
        return round(self.before[name or self.stage] + time.monotonic() - self.started[name or self.stage], 2)

    def agree(self, *tensors):
        """Data-parallel ranks: replace tensors by their mean over the ranks, in place. Alone: nothing."""
        if self.control is not None:
            average(tensors)

    def stopping(self, every=True):
        """The exit code to stop with (a signal's, or 3 at --time-limit), or 0; data-parallel ranks agree on it."""
        limit = self.args.time_limit
        code = self.stop or (3 if limit and time.monotonic() - START >= limit else 0)
        if self.control is not None:
            if not every:  # asking the others costs a little, so not at every step
                return 0
            box = torch.tensor(code)
            dist.all_reduce(box, dist.ReduceOp.MAX, group=self.control)
            code = int(box)
        return code

    def tick(self, snapshot, epoch, step, steps, name=None):
        """After a step: show progress on a terminal; when it is time to stop, save snapshot(epoch, step + 1), exit."""
        self.graceful = True
        self.epoch_steps += 1
        place = f"epoch {epoch + 1}, step" if epoch < self.args.epochs else "scoring, configuration"
        if sys.stderr.isatty() and RANK == 0 and time.monotonic() > self.shown + 0.5:
            self.shown = time.monotonic()
            print(f"\r{name or self.stage}: {place} {step + 1} of {steps} ", end="", file=sys.stderr, flush=True)
        if code := self.stopping(step % 8 == 7 or step == steps - 1):
            self.save(snapshot(epoch, step + 1), name)
            say(f"stopped after {place} {step + 1} of {steps}; the same command goes on from there")
            raise SystemExit(code)

    def epoch_line(self, epoch, steps, measures, label=""):
        """Print an epoch's line; measures: {name: tensor of one value per step}. Returns its entry for the history."""
        args, means = self.args, {k: round(v.mean().item(), 6) for k, v in measures.items()}  # waits for the device
        took = time.monotonic() - self.epoch_started
        rate = self.epoch_steps * args.batch_size / took
        left = (args.epochs - epoch - 1) * steps * args.batch_size / max(rate, 1e-9)
        lr = round(cosine_lr(epoch * steps, args.epochs * steps, args.lr), 6)
        clear = "\r\033[K" if sys.stderr.isatty() else ""
        text = f"{clear}{label}epoch {epoch + 1}/{args.epochs}  " + "  ".join(f"{k} {v:.4f}" for k, v in means.items())
        if RANK == 0 or self.independent:
            print(f"{text}  lr {lr:.4f}  {rate:.0f} images/s  {left / 60:.1f} min left", flush=True)
        self.epoch_started, self.epoch_steps = time.monotonic(), 0
        return {"epoch": epoch + 1, **means, "lr": lr, "seconds": round(took, 2)}

    def entry(self, config, data, norm="own"):
        """The fields of a result that follow from the configuration: config, macs, params."""
        shape = data.train.pixels.shape[-1], len(data.classes), self.stem
        return {"config": list(config), "macs": count_macs(config, *shape),
                "params": count_params(sum(config), *shape, norm)}

    def report(self, data, results, key, counts, seconds, max_macs=None, **extra):
        """Write the stage's JSON: results best first by `key`, with the choice, the default and the Pareto set.

        counts: images that train, score and test."""
        results = sorted(results, key=lambda r: -r[key])
        default = list(default_config(self.args.layers, self.args.scales))
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        if RANK == 0:
            save_json(self.out / f"{self.stage}.json", {
                "schema": 1, "stage": self.stage, "dataset": data.name, "image_size": self.args.image_size,
                "num_classes": len(data.classes), **dict(zip(("n_train", "n_val", "n_test"), counts)),
                "space": self.space, "args": self.settings, "seconds": seconds,
                "env": {"torch": torch.__version__, "device": device, "amp": self.amp, "ranks": WORLD},
                "results": results, "best": choose(results, key, max_macs),
                "default": next((r for r in results if r["config"] == default), None),
                "pareto": [r["config"] for r in pareto(results, key)], **extra})

    def print_results(self, results, key, rank=None):
        """Print the best five results, the default and the Pareto set (*), and how well they rank."""
        front, ranked = [r["config"] for r in pareto(results, key)], sorted(results, key=lambda r: -r[key])
        default = list(default_config(self.args.layers, self.args.scales))
        print_table(["configuration", "M multiply-adds", key.replace("_", " "), "rank", "Pareto"], [
            [show(r["config"]) + " default" * (r["config"] == default), f"{r['macs'] / 1e6:.1f}", f"{r[key]:.4f}", i,
             "*" * (r["config"] in front)]
            for i, r in enumerate(ranked, 1) if i <= 5 or r["config"] in front or r["config"] == default])
        if rank:
            say(f"against {rank['against']} ({rank['n']} configurations): Kendall's tau {rank['kendall_tau'] or 0:.2f}"
                f", by multiply-adds alone {rank['kendall_tau_macs'] or 0:.2f}; regret of the choice "
                f"{100 * rank['regret']:.2f} points, {100 * rank['mean_regret']:.2f} on average over budgets")
        say(f"wrote {self.out / self.stage}.json")


def read_checkpoint(path):
    """Read a checkpoint without executing anything from it. Raises an exception when it is damaged."""
    with zipfile.ZipFile(path) as archive:
        if (bad := archive.testzip()) is not None:
            raise ValueError(f"{bad} does not match its checksum")
    return torch.load(path, map_location="cpu", weights_only=True)


def load_truth(args):
    """The true accuracies that a ranking is compared with: ({config tuple: test accuracy}, file name).

    --truth; else single.json in --out; else, for cifar10, the paper's published figures; else ({}, None)."""
    own = Path(args.out) / "single.json"
    path = Path(args.truth) if args.truth else own if own.exists() else PUBLISHED if args.dataset == "cifar10" else None
    if path is None:
        return {}, None
    data = load_json(path)
    if "stage" in data:
        load_json(path, "single", Path(args.dataset).name)
    truth = {tuple(r["config"]): r.get("test_acc") for r in data["results"]}
    if not all(isinstance(v, (int, float)) for v in truth.values()):
        raise UserError(f"{path} has results without test_acc: name a single.json with --truth")
    if args.truth and not set(truth) & set(pooling_configs(args.layers, args.scales)):
        raise UserError(f"{path} holds no configuration of {args.layers} layers at {args.scales} scales: name another")
    return truth, path.name


# ---- Command line ---------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message):
        raise UserError(f"{message} (--help lists the options)")


def number(kind=int, least=1, above=None):
    """An argparse type: a finite number of at least `least`, or greater than `above`."""
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and (value > above if above is not None else value >= least)):
            bound = f"above {above}" if above is not None else f"of at least {least}"
            raise argparse.ArgumentTypeError(f"'{text}' is not a {'whole ' * (kind is int)}number {bound}")
        return value
    return convert


def parse_macs(text):
    """Multiply-adds from text: "60M", "0.1G" or a plain number. Raises argparse.ArgumentTypeError."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?(?:e\d+)?)([kMG]?)", text.strip())
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"'{text}' is no number of multiply-adds: write 60M, 0.06G or 60000000")
    return float(match[1]) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[match[2]]


def default_image_size(dataset):
    """Pixels fed in: 128 for Food-101, else 32."""
    return 128 if dataset == "food101" else 32


EPOCHS = {"synthetic": {"alone": 4, "retrain": 4, "search": 30}}  # other data sets: the paper's 100


def parse(doc, kind, add=lambda parser: None):
    """Parse the command line. doc: the script's docstring; kind: "alone", "search" or "retrain"; add: a function that
    adds the script's own options to the parser.

    Returns the namespace with defaults filled in, `device` a torch.device and `amp` resolved. Raises UserError."""
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    o = parser.add_argument
    o("--dataset", default="cifar10", help="cifar10, cifar100, food101, synthetic, or a folder with train/<class>/* "
      "and test/<class>/* (or val/) images; default cifar10")
    o("--data-dir", default="data", help="folder where data sets are kept and downloaded to; default data")
    o("--out", help="folder of the run's JSON files and checkpoints; default runs/<dataset>")
    o("--image-size", type=number(), help="side of the square images in pixels, 32, 64 or 128; default 128 for "
      "food101, else 32")
    o("--epochs", type=number(), help="passes over the training images; default 100 (paper), on synthetic 4 for a "
      "network alone and 30 for a search")
    o("--batch-size", type=number(), default=128, help="images per step, over all ranks; default 128 (paper)")
    o("--lr", type=number(float, above=0), default=0.1, help="first learning rate, falls to 1%% of it along a cosine; "
      "default 0.1 (paper)")
    o("--weight-decay", type=number(float, 0), default=0.0, help="L2 penalty; default 0 (paper)")
    o("--seed", type=number(int, 0), default=0, help="of everything random; default 0")
    o("--layers", type=number(int, 3), default=10, help="searched layers; default 10, a ResNet20")
    o("--scales", type=number(), default=3, help="resolutions; default 3")
    o("--device", default="auto", help="auto (cuda, then mps, then cpu) or a torch device; default auto")
    o("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto", help="mixed precision; default auto")
    o("--limit-train", type=number(), help="use only the first N training images of a fixed class-balanced shuffle")
    o("--limit-test", type=number(), help="use only the first N test images of a fixed class-balanced shuffle")
    o("--workers", type=number(int, 0), help="processes that decode images; default one per core")
    o("--time-limit", type=number(float, above=0), help="seconds after which to stop with a checkpoint, exit code 3")
    o("--fresh", action="store_true", help="set earlier results and checkpoints aside (*.old) and start over")
    if kind != "alone":
        o("--max-macs", type=parse_macs, help="multiply-adds of the dearest configuration that may be chosen, e.g. 60M")
    if kind == "search":
        o("--truth", help="JSON with the true accuracies to compare the ranking with; default single.json in --out, "
          "else for cifar10 the published ones")
    add(parser)
    args = parser.parse_args()
    if args.image_size is None:
        args.image_size = default_image_size(args.dataset)
    if args.image_size not in (32, 64, 128):
        raise UserError(f"--image-size {args.image_size}: must be 32, 64 or 128")
    try:
        check_config(default_config(args.layers, args.scales), args.layers, args.scales)
    except ValueError as error:
        raise UserError(f"--scales {args.scales}: {error}") from None
    args.epochs = args.epochs or EPOCHS.get(args.dataset, {}).get(kind, 100)
    args.out = args.out or os.path.join("runs", Path(args.dataset).name)
    args.device = pick_device(args.device)
    args.amp = pick_amp(args.amp, args.device)
    keep_freed_memory()
    return args


def run_main(main):
    """Run a script's main: what a person can put right becomes one line on standard error and exit code 2."""
    try:
        return main()
    except UserError as error:
        message = str(error)
    except (torch.OutOfMemoryError, MemoryError):
        message = "out of memory: lower --batch-size, or choose another --device; the last checkpoint is kept"
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "make room and run the same command again" if full else "check the path and its permissions"
        message = f"{error.filename or 'writing'}: {error.strerror or error}; {advice}"
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    raise SystemExit(2)


# ---- Benchmark -------------------------------------------------------------------------------------------------------

def main():
    args = parse(__doc__, "alone", lambda parser: parser.set_defaults(dataset="synthetic"))
    data = to_device(load_dataset(args.dataset, args.data_dir, args.image_size, workers=args.workers), args.device)
    shape, size = (data.train.pixels.shape[-1], len(data.classes), args.image_size // 32), args.batch_size
    ranked = sorted(pooling_configs(args.layers, args.scales), key=count_macs)
    handful = {*(ranked[i * (len(ranked) - 1) // 4] for i in range(5)), default_config(args.layers, args.scales)}

    def endless():
        for epoch in itertools.count():
            yield from batches(data.train, size, args.device, epoch, True)
    print(f"{args.device}, --amp {args.amp}, batch {size}, {torch.get_num_threads()} threads, {torch.__version__}")

    def clock():
        if args.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    def rate(work):
        """Images/s of a call that handles one batch: the median of five rounds of 0.2 s or more."""
        timer = timeit.Timer(work, timer=clock)
        calls, _ = timer.autorange()
        return size * calls / statistics.median(timer.repeat(5, calls))

    rows = []
    for config in sorted(handful, key=count_macs):
        learner, feed = Learner(ResNet20(*shape, args.layers), args.device, args.amp), endless()
        x, y = next(feed)
        train = rate(lambda: learner.train(*next(feed), config, 1e-3))
        score = rate(lambda: learner.score(x, y, config))
        fetch = rate(lambda: next(feed))
        macs = count_macs(config, *shape)
        rows.append([show(config), f"{macs / 1e6:.1f}", f"{train:.0f}", f"{score:.0f}", f"{3 * macs * train / 1e9:.0f}",
                     f"{100 * train / fetch:.1f}%"])
    print_table(["configuration", "M multiply-adds", "train images/s", "score images/s", "G multiply-adds/s",
                 "waiting for data"], rows)
    print("G multiply-adds/s: of training, a backward pass counted as two forward passes")


if __name__ == "__main__":
    run_main(main)
