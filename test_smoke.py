"""Tests: the mathematics against independent definitions, every loader, and the scripts as a user runs them.

    python -m pytest -q test_smoke.py

A script runs in a fork of this process, which has imported torch already: a tenth of a second instead of three. So
these tests want Linux or a Mac, and every test that forks stands before those that train in this process.
"""
import ast
import builtins
import dis
import importlib
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import time
import unicodedata
from pathlib import Path
from types import SimpleNamespace

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: a fork of many threads would hang
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asks for a GPU without starting CUDA, which no fork survives

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.datasets
from PIL import Image, PngImagePlugin

import common
from common import (Learner, ResNet20, Split, balanced_order, batch_statistics_norm, config_text, count_macs,
                    crop_and_flip, default_config, derive_seed, evaluate, halves, kendall_tau, load_dataset, normalise,
                    pareto, pooling_configs, read_image, save_json, scoring_batches, training_batches)
from results import report
from retrain import errors_of_gain
from search_mixture import Assignment, balance

HERE, CPU, FORK = Path(__file__).parent, torch.device("cpu"), multiprocessing.get_context("fork")
RESULTS, PUBLISHED, SPACE = HERE / "results", "published_cifar10_resnet20.json", pooling_configs()
COSTS = np.array([count_macs(config) for config in SPACE])
TINY = ["--dataset", "synthetic", "--layers", "4", "--scales", "2", "--limit-train", "96", "--batch-size", "16",
        "--epochs", "2", "--amp", "off", "--device", "cpu"]  # [1,3], [2,2] and [3,1]
STAGES = {"single": ["train_single.py", *TINY, "--config", "all"],
          "supernet": ["search_supernet.py", *TINY],
          "mixture": ["search_mixture.py", *TINY, "--models", "2"],
          "retrain": ["retrain.py", *TINY, "--runs", "2"]}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ---- running scripts -------------------------------------------------------------------------------------------------

def as_a_user(script, words, printed, prepare, environment):
    os.dup2(printed[0].fileno(), 1), os.dup2(printed[1].fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w")
    os.environ.update(environment)
    for name in [name for name in sys.modules if (HERE / f"{name.replace('.', '/')}.py").exists()]:
        del sys.modules[name]  # they ask for their rank when they are imported
    importlib.import_module("common").SYNTHETIC = 160, 40  # drawing all of them would take most of the time
    if prepare:
        prepare()
    sys.argv = [script, *map(str, words)]
    runpy.run_module(script.removesuffix(".py").replace("/", "."), run_name="__main__", alter_sys=True)


def start(script, *words, prepare=None, **environment):
    """Start a script: (process, files of what it prints). prepare() is called in the process, before the script."""
    printed = [tempfile.NamedTemporaryFile("w+") for _ in range(2)]  # standard output and standard error
    process = FORK.Process(target=as_a_user, args=(script, words, printed, prepare, environment), daemon=True)
    process.start()
    return process, printed


def finish(started, code=0, limit=240):
    """Wait for a script and check its exit code (None: any; 2: with one line on standard error): (output, errors)."""
    process, printed = started
    process.join(limit)
    process.kill(), process.join()  # where it has not ended by itself
    out, err = (Path(file.name).read_text() for file in printed)
    assert code in (None, process.exitcode) and "Traceback" not in err, (process.exitcode, out[-5000:], err)
    assert code != 2 or err.count("\n") == 1, err
    return out, err


def run(*words, code=0, prepare=None, **environment):
    return finish(start(*words, prepare=prepare, **environment), code)


def refused(*words, prepare=None):
    return run(*words, code=2, prepare=prepare)[1]


def run_two_ranks(*words, dying=None, prepare=(None, None), limit=240):  # where one dies, torchrun kills the other
    with socket.create_server(("127.0.0.1", 0)) as free:
        world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    started = [start(*words, prepare=prepare[r], RANK=str(r), LOCAL_RANK=str(r), TORCHELASTIC_RUN_ID="x", **world)
               for r in range(2)]
    if dying is None:
        return [finish(each, limit=limit) for each in started]
    finish(started[dying], -signal.SIGKILL)
    started[1 - dying][0].kill()


def failing(functions, error, first=1):
    """A `prepare`: calls of these functions, counted together, raise `error` from number `first` on; None: SIGKILL."""
    def prepare():
        calls = itertools.count(1)
        for module, name in [function.rsplit(".", 1) for function in functions.split()]:
            def replaced(*words, real=getattr(importlib.import_module(module), name), **options):
                if next(calls) < first:
                    return real(*words, **options)
                if error is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise error
            setattr(importlib.import_module(module), name, replaced)
    return prepare


def stop(*words, epochs=1):  # run a script, and kill it after so many epochs
    run(*words, prepare=failing("common.save_checkpoint", None, epochs + 1), code=-signal.SIGKILL)


def files(folder):
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def strict(path):
    return json.loads(Path(path).read_text(), parse_constant=lambda word: pytest.fail(f"{word} in {path}"))


def timeless(value):
    """JSON, or that of a file, without what may differ between equal runs: seconds."""
    value = strict(value) if isinstance(value, Path) else value
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if "seconds" not in k}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def noise(n):
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), np.uint8))
    return Split(pixels, torch.arange(n) % 4)


def made_up_search(out, name="earlier", scores=(0.1, 0.2, 0.3), **change):
    Path(out).mkdir(parents=True, exist_ok=True)  # the JSON of a search, whose scores name [3,1] the best
    settings = {"dataset": "synthetic", "data_digest": "", "image_size": 16, "layers": 4, "scales": 2}
    save_json(Path(out, f"{name}.json"), {
        "schema": 1, "stage": "mixture", "args": settings | change, "seconds": 1.0, "results": [
            {"config": [a, 4 - a], "macs": 1, "val_acc": score} for a, score in enumerate(scores, 1)]})
    return out


# ---- the mathematics -------------------------------------------------------------------------------------------------

def test_the_space_is_every_composition_multiply_adds_are_counted_and_the_network_pools_where_it_should():
    for layers, scales in ((10, 3), (4, 2), (7, 1), (6, 6), (9, 4)):
        brute = [c for c in itertools.product(range(1, layers + 1), repeat=scales) if sum(c) == layers]
        assert pooling_configs(layers, scales) == brute
    assert len(SPACE) == 36 and default_config() == (4, 3, 3)
    widths, macs = [3] + [16] * 4 + [32] * 3 + [64] * 3, []
    for config in SPACE:
        sides, total = np.repeat([32, 16, 8], config), 640
        for inputs, outputs, side, first in zip(widths, widths[1:], sides, [True] + [False] * 9):
            weights = 9 * inputs * outputs + (0 if first else 9 * outputs ** 2) + (
                inputs * outputs if inputs != outputs and not first else 0)
            total += int(weights * side ** 2)
        macs.append(total)
    assert COSTS.tolist() == macs and macs[SPACE.index((4, 3, 3))] == 40_813_184
    with torch.device("meta"):
        assert count_macs((4, 3, 3), ResNet20(101, 128), 128) == 45_144_384
    assert count_macs((1,) * 6) < count_macs((2, 2, 2))
    net, x = ResNet20(norm=batch_statistics_norm).requires_grad_(False), torch.randn(2, 3, 32, 32)
    for config in SPACE:
        layers, y = iter(net.layers), x
        for part, count in enumerate(config):
            y = F.max_pool2d(y, 2) if part else y
            for _ in range(count):
                y = next(layers)(y)
        assert torch.equal(net(x, config), net.head(y.mean((2, 3)))), config
    assert not list(net.buffers()) and not torch.allclose(net.eval()(x)[:1], net(x[:1]), atol=1e-3)  # the batch's norm
    with pytest.raises(ValueError, match="does not share out 10 layers"):
        net(x, (4, 3, 4))


def agrees(drawn, weights):  # whether each index was drawn in proportion to its weight, to within five deviations
    n, p = len(drawn), np.asarray(weights) / np.sum(weights)
    return (np.abs(np.bincount(drawn, minlength=len(p)) - n * p) <= 5 * np.sqrt(n * p * (1 - p))).all()


@pytest.mark.parametrize("models", [1, 2, 4, 8])
def test_balance_against_scaling_rows_and_columns_in_turn(models):
    spread, one = torch.rand(36, models), torch.eye(models)[torch.zeros(36, dtype=int)]
    for scores in (spread, 100 * spread, 100 * one, 1e4 * one):
        probs = torch.softmax(scores, 1)  # even, peaked, all on one model, and that without any doubt
        balanced = balance(probs)
        assert torch.allclose(balanced.sum(1), torch.ones(36), atol=1e-5)
        assert torch.allclose(balanced.sum(0), torch.full((models,), 36 / models), atol=0.01)
        if scores.max() <= 100:
            columns, matrix = np.ones(models), probs.numpy().astype(float)
            for _ in range(2000):
                rows = 1 / (matrix @ columns)
                columns = 36 / models / (rows @ matrix)
            assert np.abs(rows[:, None] * matrix * columns - balanced.numpy()).max() < 2e-3


def test_the_assignment_draws_and_averages_tau_against_a_count_of_pairs_and_pareto_by_hand():
    a, probs = Assignment(3, 2), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.25, 0.75]], dtype=torch.float64)
    models = np.array(a.draw(probs, [0, 1, 2, 2] * 5000, rng := np.random.default_rng(1)))
    assert (models[0::4] == 0).all() and (models[1::4] == 1).all() and agrees(models[2::4], [0.25, 0.75])
    a.update([0, 0, 2], [1, 1, 0], [0.5, 0.25, 0.0])
    assert a.W.flatten().tolist() == pytest.approx([1, 0.9 * (0.9 * 1 + 0.1 * 0.5) + 0.1 * 0.25, 1, 1, 0.9, 1])
    probability = 1 / (1 + math.exp(100 * (a.W[0, 1].item() - 1)))  # inverse temperature 100 at the end
    assert a.probabilities(1.0, balanced=False)[0, 0].item() == pytest.approx(probability)
    for n in (2, 3, 10, 36):
        x, y = np.concatenate([[[-1], [-2]], rng.integers(0, 1 + n // 2, (2, n - 1))], axis=1)
        pairs = list(itertools.combinations(range(n), 2))
        total = sum(np.sign((x[i] - x[j]) * (y[i] - y[j])) for i, j in pairs)
        untied = math.prod(sum(v[i] != v[j] for i, j in pairs) for v in (x, y))
        assert kendall_tau(x, y) == pytest.approx(total / untied ** 0.5)
    found = [(10, 0.5), (20, 0.4), (30, 0.7), (40, 0.6), (10, 0.45), (50, 0.7)]
    results = [{"macs": macs, "val_acc": accuracy} for macs, accuracy in found]
    assert pareto(results, "val_acc") == [results[0], results[2]] and kendall_tau([1, 1], [1, 2]) is None


def test_an_epoch_is_fixed_by_its_seed_and_scoring_counts_every_image_once():
    images, split = torch.randint(0, 256, (20, 32, 32, 3), dtype=torch.uint8), noise(50)
    top, left, flip = torch.randint(0, 9, (20,)), torch.randint(0, 9, (20,)), torch.rand(20) < 0.5
    for got, image, y, x, f in zip(crop_and_flip(images, top, left, flip, 4), images.numpy(), top, left, flip):
        cut = np.pad(image, ((4, 4), (4, 4), (0, 0)))[y:y + 32, x:x + 32]
        assert np.array_equal(got.numpy(), cut[:, ::-1] if f else cut)
    everything, plain = normalise(split.images), list(training_batches(*split, 8, CPU, seed=5, augment=False))
    first, again, other = (next(training_batches(*split, 8, CPU, seed=seed))[0] for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)
    seen = [(everything == image).flatten(1).all(1).nonzero().item() for x, _ in plain for image in x]
    assert len(set(seen)) == 48 and [i % 4 for i in seen] == torch.cat([y for _, y in plain]).tolist()
    for found, wanted in zip(zip(*scoring_batches(*split, 16, CPU)), (everything, split.labels)):
        assert torch.equal(torch.cat(found), wanted)
    assert {len(y) for _, y in scoring_batches(*noise(3), 2, CPU)} == {3}  # never one alone
    assert evaluate(lambda x, y, config: config * (y == 0).float().mean(), split, 2, CPU, 16) == pytest.approx(26 / 50)


def test_every_prefix_of_the_shuffle_is_balanced_halves_are_stratified_and_seeds_differ():
    labels = torch.tensor([0] * 50 + [1] * 31 + [2] * 19)
    order = balanced_order(labels)
    assert sorted(order.tolist()) == list(range(100))
    for n in range(1, 101):
        share = torch.bincount(labels[order[:n]], minlength=3) - n * torch.tensor([0.50, 0.31, 0.19])
        assert share.abs().max() <= 1.5
    one, two = halves(Split(torch.arange(100, dtype=torch.uint8)[:, None], labels), seed=3)
    assert sorted(one.images.flatten().tolist() + two.images.flatten().tolist()) == list(range(100))
    assert all(torch.equal(labels[half.images.flatten().long()], half.labels) for half in (one, two))
    assert (torch.bincount(one.labels) - torch.bincount(two.labels)).abs().max() <= 1
    parts = [("weights", 0, 0), ("weights", 0), ("weights", 0, 1), ("weights", 1, 0), ("order", 0, 0), ("weights", 10)]
    assert len({derive_seed(*p) for p in parts}) == 6 and derive_seed("a", 1) == derive_seed("a", 1) >= 0


def test_a_gain_has_the_error_of_the_seeds_and_that_of_the_number_of_images():
    entry, base = {"test_acc": 0.9, "std": 0.03, "runs": [0] * 3}, {"test_acc": 0.8, "std": 0.04, "runs": [0] * 4}
    seeds, images = errors_of_gain(entry, base, 60)
    assert seeds == pytest.approx((0.03 ** 2 / 3 + 0.04 ** 2 / 4) ** 0.5)
    right = np.random.default_rng(0).binomial(60, (0.9, 0.8), (100_000, 2)) / 60
    assert images == pytest.approx((right[:, 0] - right[:, 1]).std(), rel=0.02)
    assert errors_of_gain(entry, base | {"std": None}, 60) == (None, images)


# ---- images ----------------------------------------------------------------------------------------------------------

def picture(path, mode="RGB", size=(40, 30), seed=0, **options):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)


def folder(root, classes=("cat", "dog"), n=4, test="test", size=(40, 30)):
    for (number, c), i in itertools.product(enumerate(classes), range(n + 2)):
        picture(Path(root, "train" if i < n else test, c, f"{i}.png"), seed=2 * i + number, size=size)
    return Path(root)


def test_images_of_every_kind_are_read_whatever_is_attached_to_them_and_turned_upright(monkeypatch):
    wide, turned, broken = np.zeros((20, 40, 3), np.uint8), Image.Exif(), b"Exif\0\0MM\0*\0\0\0\x08\xff\xff broken"
    wide[:, :20] = 255  # left half white; the tag says: turn it by 90 degrees clockwise, so white goes to the top
    turned[0x0112] = 6
    Image.fromarray(wide).save("turned.jpg", exif=turned, quality=95)
    Image.fromarray(wide).save("turned.tiff", exif=turned)
    for upright in (read_image("turned.jpg", 32), read_image("turned.tiff", 32)):
        assert upright[:12].mean() > 230 and upright[-12:].mean() < 25
    for mode, name in (("RGBA", "a.png"), ("CMYK", "b.jpg"), ("L", "c.jfif"), ("P", "d.gif"), ("1", "e.pbm")):
        picture(name, mode, **({"format": "JPEG"} if name == "c.jfif" else {}))
        assert read_image(name, 8).shape == (8, 8, 3)
    Image.new("LA", (9, 9), (0, 0)).save("clear.png"), Image.new("P", (9, 9)).save("clear.gif", transparency=0)
    assert all(read_image(f"clear.{kind}", 8).min() == 255 for kind in ("png", "gif"))  # on white
    text = PngImagePlugin.PngInfo()
    text.add_text("long", "x" * 2_000_000, zip=True)
    picture("plain.png"), picture("text.png", pnginfo=text), picture("profile.png", icc_profile=bytes(2_000_000))
    picture("plain.jpg"), picture("exif.jpg", exif=broken)
    for name in ("text.png", "profile.png", "exif.jpg"):
        assert np.array_equal(read_image(name, 16), read_image(f"plain{name[-4:]}", 16)), name
    Image.new("1", (20_000, 10_000)).save("large.png")
    assert read_image("large.png", 8).max() == 0  # 200 million pixels
    Path("huge.ppm").write_bytes(b"P6 60000 60000 255\n")
    Image.fromarray(np.zeros((9, 9), np.uint16)).save("deep.png")
    for name, reason in (("huge.ppm", "too many"), ("deep.png", "8 bits")):
        with pytest.raises(ValueError, match=reason):
            read_image(name, 8)


def test_a_folder_is_listed_as_a_person_sees_it_and_one_line_says_what_was_passed_over():
    root, accent = folder("pets", test="val"), "br\u00fbl\u00e9e"
    for name in ("train/cat/._0.png", "train/.ipynb_checkpoints/cat/0.png", "train/cat/.ipynb_checkpoints/0.png",
                 "train/__MACOSX/cat/0.png", "train/cat/more/5.GIF", "train/cat/6.tiff", "test/unlabelled.png"):
        picture(root / name)
    picture(root / "train/cat/7.jfif", format="JPEG"), (root / "train/cat/notes.txt").write_text("a cat")
    (root / "train/cat/up").symlink_to("../.."), picture(root / "val/new" / "0.png")
    (root / "train/all").symlink_to("../train"), (root / "train/kitty").symlink_to("cat")
    picture(root / "test/images/0.jpg"), (root / "train/labels.csv").write_text("0")
    for part, form in (("train", "NFC"), ("val", "NFD")):  # as a Mac and Linux write it
        picture(root / part / unicodedata.normalize(form, accent) / "0.png")
    with pytest.raises(common.UserError, match="see new$"):
        load_dataset("pets")
    shutil.rmtree(root / "val/new")
    train, test, classes = load_dataset("pets")
    assert classes == [accent, "cat", "dog"] and torch.bincount(train.labels).tolist() == [1, 7, 4]
    assert torch.bincount(test.labels).tolist() == [1, 2, 2]
    out, _ = run("train_single.py", *TINY[2:], "--batch-size", "4", "--epochs", "1", "--dataset", "pets")
    assert out.count("pets: 3 classes; 8 files passed over") == 1 and "trains on 12 images and tests on 5" in out


def test_images_are_decoded_once_a_damaged_cache_anew_and_what_changed_is_seen(monkeypatch):
    decoded, real = [], read_image
    monkeypatch.setattr(common, "read_image", lambda *words: [decoded.append(words), real(*words)][1])
    before = load_dataset(str(folder("pets")))[0].images.clone()
    assert len(decoded) == 12 and torch.equal(load_dataset("pets")[0].images, before) and len(decoded) == 12
    assert torch.equal(load_dataset("pets", limit_train=4)[0].images, before[:4]) and len(decoded) == 16
    for path in Path("data/cache").iterdir():
        path.write_bytes(path.read_bytes()[:-100])
    assert torch.equal(load_dataset("pets")[0].images, before) and len(decoded) == 16 + 12
    picture("pets/train/cat/0.png", seed=99)
    assert not torch.equal(load_dataset("pets")[0].images, before)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    Path("mounted").mkdir(), load_dataset("pets", "mounted")
    assert not files("mounted")
    for error in (OSError(5, "I/O error"), MemoryError()):
        monkeypatch.setattr(common, "read_image", lambda *words: (_ for _ in ()).throw(error))
        with pytest.raises(type(error)):
            load_dataset("pets", image_size=16)


def unpack(place, kind):
    """CIFAR's files with 20 images each, or Food-101's layout with two classes of seven."""
    place.mkdir(parents=True)
    if kind == torchvision.datasets.Food101:
        (place / "meta").mkdir()
        for part, ids in (("train", range(5)), ("test", range(5, 7))):
            names = {c: [f"{c}/{i}" for i in ids] for c in ("apple_pie", "waffles")}
            save_json(place / "meta" / f"{part}.json", names)
            for name in itertools.chain(*names.values()):
                picture(place / "images" / f"{name}.jpg", size=(200, 150))
        return
    content = {"data": np.zeros((20, 3072), np.uint8), "labels": [0, 1] * 10, kind.meta["key"]: list(range(10))}
    content |= {"fine_labels": [0, 1] * 10} if "fine" in kind.meta["key"] else {}
    for file, _ in [*kind.train_list, *kind.test_list, (kind.meta["filename"], None)]:
        (place / file).write_bytes(pickle.dumps(content))


@pytest.mark.parametrize("name, place, kind, method", [
    ("cifar10", "cifar-10-batches-py", torchvision.datasets.CIFAR10, "download"),
    ("cifar100", "cifar-100-python", torchvision.datasets.CIFAR100, "download"),
    ("food101", "food-101", torchvision.datasets.Food101, "_download")])
def test_the_public_data_sets_are_downloaded_and_what_fails_is_one_line(name, place, kind, method, monkeypatch):
    words = ["train_single.py", "--dataset", name, *TINY[2:], "--batch-size", "4"]
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, *words: os.path.exists(path))
    monkeypatch.setattr(kind, method, lambda self: (_ for _ in ()).throw(RuntimeError("connection lost")))
    assert "connection lost" in refused(*words) and not files(".")
    monkeypatch.setattr(kind, method, lambda self: Path(self.root, place).exists() or unpack(
        Path(self.root, place), kind))
    assert len(load_dataset(name)[1].labels) == (4 if name == "food101" else 20)
    if name == "food101":
        assert "trains on 10 images" in run(*words)[0]
        Path("data", place, "meta/train.json").write_text('{"apple_pie": [')
        assert "meta/train.json is damaged" in refused(*words)


# ---- the stages ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    found, place = {}, tmp_path_factory.mktemp("whole")  # every stage alone: {stage: (JSON, seconds)}
    for stage, words in STAGES.items():
        began = time.monotonic()
        run(*words, "--out", made_up_search(place / stage))
        found[stage] = strict(place / stage / f"{stage}.json"), time.monotonic() - began
    return found


def test_the_four_stages(whole, monkeypatch):
    read = {stage: Path(f"runs/synthetic/{stage}.json") for stage in STAGES}
    out, before = run(*STAGES["single"])[0], files("runs/synthetic/single")
    assert "[2,2]" in out and f"wrote {read['single']}" in out and len(before) == 6  # a file and its weights each
    assert "trains on 96 images and tests on 40" in out
    run("train_single.py", *TINY, "--config", "2,2", "--seed", "1")
    assert before.items() <= files("runs/synthetic/single").items()  # adds a run, trains nothing again
    single = strict(read["single"])
    alone = {(*r["config"], run["seed"]): run for r in single["results"] for run in r["runs"]}
    assert len(alone) == 4 and all(r["test_acc"] == pytest.approx(np.mean(r["halves"])) for r in alone.values())
    assert single["default"]["std"] == pytest.approx(np.std([alone[2, 2, seed]["test_acc"] for seed in (0, 1)], ddof=1))
    monkeypatch.setattr(common, "SYNTHETIC", (160, 40))
    test, network = load_dataset("synthetic", limit_train=96)[1], ResNet20(layers=4)
    network.load_state_dict(torch.load("runs/synthetic/single/3-1-seed0.pt")["learner"]["network"])
    correct = network.eval()(normalise(test.images), (3, 1)).argmax(1) == test.labels
    assert correct.float().mean().item() == pytest.approx(alone[3, 1, 0]["test_acc"])
    out, _ = run(*STAGES["supernet"])
    naive, truth = strict(read["supernet"]), {tuple(r["config"]): r["test_acc"] for r in single["results"]}
    assert naive["rank"]["regret"] == pytest.approx(max(truth.values()) - truth[tuple(naive["best"]["config"])])
    assert "supernet trains on 48 images and scores on 48" in out and sum(r["steps"] for r in naive["results"]) == 6
    out, _ = run(*STAGES["mixture"])
    mixture = strict(read["mixture"])
    assert len(mixture["history"]) == 4 and np.sum(mixture["trained"]) == 4 * 3  # two passes for each of two models
    assert np.allclose(np.sum(mixture["probabilities"], 0), 3 / 2, atol=0.01)
    assert "trained 2.0 times on average" in out and "raise --epochs" in out
    out, _ = run("retrain.py", *TINY, "--runs", "1")
    assert "epoch" not in out  # single.json knows all
    retrain, best = strict(read["retrain"]), {tuple(strict(read[s])["best"]["config"]) for s in ("supernet", "mixture")}
    assert {tuple(r["config"]) for r in retrain["results"]} == best | {(2, 2)}
    assert "default" in retrain["default"]["why"]
    for r in retrain["results"]:
        assert all(run["test_acc"] == alone[(*r["config"], run["seed"])]["test_acc"] for run in r["runs"])
        assert r["config"] == [2, 2] or re.search(r"best of (supernet|mixture).json", r["why"])
    for stage, data in ((stage, strict(path)) for stage, path in read.items()):
        assert data.keys() >= set("schema stage dataset image_size num_classes n_train n_val n_test space args env "
                                  "seconds classes results best default pareto history".split())
        key = "test_acc" if stage in ("single", "retrain") else "val_acc"
        assert data["best"] == max(data["results"], key=lambda r: r[key])


def test_retrain_averages_the_seeds_of_a_search_names_what_it_leaves_alone_and_wants_something_to_do():
    for name, scores, change in (("a", (0.3, 0.2, 0.1), {"seed": 0}), ("a-seed1", (0.1, 0.3, 0.5), {"seed": 1}),
                                 ("b", (0.3, 0.2, 0.1), {"models": 8}), ("other", (9, 0, 0), {"data_digest": "1"})):
        made_up_search("x", name, scores, **change)
    Path("x/list.json").write_text("[1]")
    out, _ = run("retrain.py", *TINY, "--runs", "1", "--epochs", "1", "--out", "x")
    assert re.search(r"retraining \[2,2\] \(default\), \[3,1\] \(best of a-seed1.json, a.json\), "
                     r"\[1,3\] \(best of b.json\)", out)
    assert out.count("left alone") == 2 and "other images" in out and "x/list.json is damaged" in out
    out, _ = run("retrain.py", *TINY, "--runs", "2", "--epochs", "1", "--out", "y", "--config", "1,3")
    assert {tuple(r["config"]): len(r["runs"]) for r in strict("y/retrain.json")["results"]} == {(1, 3): 2, (2, 2): 2}
    assert "on 40 test images" in out and "--config" in out
    err = refused("retrain.py", *TINY, "--out", "z")
    assert "search_supernet.py" in err and "--config" in err


@pytest.mark.parametrize("stage, dying", [("single", 0), ("retrain", 0), ("retrain", 1)])
def test_two_ranks_share_out_networks_without_a_shared_disk_and_go_on_where_one_died(stage, dying, whole):
    Path("other").mkdir()
    words, apart = [*STAGES[stage], "--out"], lambda: os.chdir("other")
    run_two_ranks(*words, made_up_search("whole"), prepare=(None, apart))
    data, runs = strict(f"whole/{stage}.json"), list(Path().glob(f"**/whole/{stage}/*.json"))
    assert sorted(path.stem for path in runs) == sorted(  # each once
        f"{'-'.join(map(str, r['config']))}-seed{run['seed']}" for r in data["results"] for run in r["runs"])
    assert {path.parts[0] for path in runs} == {"other", "whole"}
    assert timeless(data["results"]) == timeless(whole[stage][0]["results"])
    death = failing("common.save_checkpoint", None, 2)
    run_two_ranks(*words, made_up_search("stopped"), dying=dying,
                  prepare=[(death, apart), (None, lambda: [apart(), death()])][dying])
    assert list(Path("other" if dying else ".", "stopped").rglob("*.pt"))
    run_two_ranks(*words, "stopped", prepare=(None, apart))
    assert timeless(Path(f"stopped/{stage}.json")) == timeless(data) and not list(Path("other").glob(f"*/{stage}.json"))


@pytest.mark.parametrize("stage", ["supernet", "mixture"])
def test_two_ranks_search_with_two_seeds(stage, whole):
    run_two_ranks(*STAGES[stage], "--out", "two")
    run(*STAGES[stage], "--out", "one", "--seed", "1")
    both = timeless(Path(f"two/{stage}.json")), timeless(Path(f"two/{stage}-seed1.json"))
    assert both == (timeless(whole[stage][0]), timeless(Path(f"one/{stage}-seed1.json")))
    assert both[0]["results"] != both[1]["results"]


def ends_the_same_however_it_is_stopped(words, name, wanted, seconds):
    """Kill a run at random moments, then at its first write, the second and so on; Ctrl-C and full disks likewise."""
    def check_it_goes_on():
        run(*words)
        assert timeless(Path(f"x/{name}.json")) == timeless(wanted) and not list(Path("x").rglob("*.tmp"))
        shutil.rmtree("x"), made_up_search("x")
    words, disk = [*words, "--out", made_up_search("x")], OSError(28, "No space left on device")
    for moment in np.random.default_rng(0).uniform(0.2, 0.9, 4):  # of the time of a whole run
        started = start(*words)
        time.sleep(moment * seconds)
        started[0].kill()
        finish(started, code=None)
    for ends in ([(-signal.SIGKILL, None)], [(130, KeyboardInterrupt()), (2, disk)]):
        check_it_goes_on()
        for number in range(1, 99):
            code, error = ends[number % len(ends)]
            started = start(*words, prepare=failing("os.replace os.unlink", error, number))
            out, err = finish(started, code=None)
            if "wrote" in out:
                break
            assert started[0].exitcode == code and ("No space left" in err) == (code == 2)
        assert number > 3
    check_it_goes_on()


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_random_moments_then_stopped_at_the_first_write_the_second_and_so_on_it_ends_the_same(stage, whole):
    ends_the_same_however_it_is_stopped(STAGES[stage], stage, *whole[stage])


@pytest.mark.parametrize("stage", STAGES)
def test_other_settings_are_refused_before_images_are_decoded_and_a_loss_that_is_not_finite_is_said(stage):
    words = [*STAGES[stage], "--lr", "0.1", "--batch-size", "4", "--dataset", folder("pets"), "--out", "x"]
    words += ["--config", "1,3"] * (stage == "retrain")
    stop(*words)
    before, decoding = files("x"), failing("common.decode", AssertionError("decoded"))
    err = refused(*words, "--lr", "0.2", "--weight-decay", "0.1", prepare=decoding)
    assert "--lr (0.1 there, 0.2 here)" in err and "--weight-decay" in err and "--epochs" not in err
    assert "choose another --out, or delete the folder" in err and files("x") == before
    picture("pets/train/cat/0.png", size=(41, 30))
    assert "other images" in refused(*words, prepare=decoding) and files("x") == before
    err = refused(*STAGES[stage], "--lr", "1e38", "--out", made_up_search("y"))
    assert "not finite in epoch" in err and "--lr" in err and not Path(f"y/{stage}.json").exists()


def test_the_same_images_elsewhere_go_on_a_truth_of_others_judges_nothing_and_what_is_damaged_is_named():
    words = [*TINY[2:], "--batch-size", "4", "--epochs", "4", "--out", "x", "--dataset"]
    folder("pets"), stop("train_single.py", *words, "pets")
    shutil.copytree("pets", "copy/pets", copy_function=shutil.copy)  # with times of their own
    stop("train_single.py", *words, "copy/pets")
    assert "[2,2] goes on after epoch 2" in run("train_single.py", *words, "pets")[0]
    run("train_single.py", *words, "pets", "--out", "whole")
    assert timeless(Path("x/single.json")) == timeless(Path("whole/single.json"))
    for truth in (RESULTS / "synthetic/single.json", RESULTS / PUBLISHED):
        shutil.copy(truth, "x/single.json")
        assert run("search_supernet.py", *words, "pets")[0].count("not judged") == 1
    checkpoint = Path("x/supernet.pt")
    for function, error in itertools.product(("json.loads", "torch.load"), (OSError(5, "I/O error"), MemoryError())):
        err = refused("search_supernet.py", *words, "pets", prepare=failing(function, error))
        assert "damaged" not in err and ("I/O error" in err or "out of memory" in err)
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    assert "supernet.pt is damaged" in refused("search_supernet.py", *words, "pets")


def test_a_folder_in_use_a_disk_without_locks_a_presets_of_ranks_a_missing_output_and_a_gpu_without_kernels():
    other = start(*STAGES["supernet"], "--epochs", "500")
    while "epoch 1" not in Path(other[1][0].name).read_text():
        time.sleep(0.01)
    assert "in use" in refused(*STAGES["mixture"])
    other[0].kill(), finish(other, -signal.SIGKILL)
    out, _ = run(*STAGES["mixture"], prepare=failing("fcntl.flock", OSError(38, "Function not implemented")))
    assert out.count("no locks here ([Errno 38] Function not implemented)") == 1
    for environment in ({"WORLD_SIZE": "4", "RANK": "2"}, {"WORLD_SIZE": "", "RANK": ""}):  # of something else
        run(*STAGES["supernet"], "--out", "alone", **environment)

    def nowhere():
        sys.stdout = None

    def pretended_gpu():
        torch.cuda.is_available, torch.cuda.device_count = (lambda: True), lambda: 1
        def ones(*words, device=None, real=torch.ones, **options):
            if str(device).startswith("cuda"):
                raise RuntimeError("no kernel image is available")
            return real(*words, device=device, **options)
        torch.ones = ones
    run(*STAGES["supernet"], "--out", "silent", prepare=nowhere)
    words = [word for word in STAGES["supernet"] if word not in ("--device", "cpu")]
    out, _ = run(*words, "--out", "old", prepare=pretended_gpu)
    assert out.count("no kernel image") == 1 and strict("old/supernet.json")["env"]["device"] == "cpu"
    full = failing("torch.stack", RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    assert "out of memory" in refused(*STAGES["supernet"], "--out", "full", prepare=full)
    assert "scored 3 of 3, 0.0 min left" in run(*STAGES["supernet"], "--out", "slow", prepare=slow_clock)[0]


def slow_clock():
    time.monotonic = lambda count=itertools.count(): 11.0 * next(count)


@pytest.mark.parametrize("flags, amp", [("sse2 avx512_bf16 avx2", "bf16"), ("amx_bf16", "bf16"), ("avx2", "off")])
def test_the_precision_on_a_cpu_is_what_the_processor_has(flags, amp, monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda self: f"flags\t: {flags}\n" if "cpuinfo" in str(self) else "")
    assert common.pick_amp("auto", CPU) == amp and common.pick_amp("off", CPU) == "off"


MADE = "--dataset synthetic --device cpu"
BAD = [(f"{script} {case}", case.split()[0]) for script, cases in {  # what is typed, and what the line must say
    "train_single.py": "--limit-train 0, --lr 0, --lr nan, --weight-decay -1, --seed -1, --batch-size 1",
    "search_supernet.py": "--sampler best, --image-size 48, --device gpu, --device cuda:77, --dataset missing",
    "search_mixture.py": "--model 4, --models 0, --epochs 0, --epochs ten, --scales 7, --layers 2, --amp int8, "
                         f"--batch-size 64 --limit-train 40 {MADE}",
    "retrain.py": f"--runs 0, --config 4,4,4 {MADE}",
    "results/report.py": "empty"}.items() for case in cases.split(", ")] + [
    (f"train_single.py {MADE} --config 4,3,3 9,1", "10 in all"), ("search_mixture.py --dataset empty", "train/"),
    ("search_mixture.py --dataset odd", "see bird, dog"),
    ("train_single.py --layers 6 --scales 6 --batch-size 1", "2 or"),
    ("search_mixture.py --dataset damaged", "13 files.*drawing.jpg .cannot identify")]


@pytest.mark.parametrize("command, message", BAD, ids=[command for command, _ in BAD])
def test_bad_input_is_one_line_and_touches_nothing(command, message):
    folder("odd", n=1), folder("damaged", n=1), Path("empty").mkdir()
    Path("odd/test/dog").rename("odd/test/bird")
    Image.new("RGB", (40, 30)).save("damaged/train/cat/drawing.jpg", "EPS")  # which is a program
    for number in range(12):
        Path(f"damaged/train/cat/notes{number:02}.jpg").write_text("no image")
    os.mkfifo("damaged/train/dog/pipe.png")  # to open it would wait for ever
    before, err = files("."), refused(*command.split())
    assert re.search(message, err) and files(".") == before and err.count("notes") <= 2 * 10, err


# ---- the evidence --------------------------------------------------------------------------------------------------

def test_the_tables_of_the_evidence_are_the_files():
    page = (RESULTS / "README.md").read_text()
    assert len(page.splitlines()) <= 170 and len(page.encode()) <= 16384
    for folder in ("cifar10", "synthetic"):
        shutil.copytree(RESULTS / folder, folder, ignore=lambda _, names: {"propose.json"} & {*names})
        out, _ = run("results/report.py", folder, "--truth", RESULTS / PUBLISHED, "--markdown")
        rows = [line for line in out.splitlines() if line.startswith("| ")]
        assert len(rows) > 12 and not set(rows) - set(page.splitlines())
    for folder in ("cifar10/fifty-thousand", "cifar100-25k", "food101-10"):
        data = strict(RESULTS / folder / "propose.json")
        trained = {row[0]: row for row in report.trained_rows(data)}
        best = trained[config_text(data["best"]["config"])]
        assert f"| {', '.join(trained)} | {best[0]} | {' | '.join(best[4:7])} |\n" in page


def test_the_report_on_new_and_on_earlier_files_with_pictures(whole, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "module://of.a.notebook")
    Path("new").mkdir(), Path("old/part").mkdir(parents=True)
    for stage, (data, _) in whole.items():
        save_json(f"new/{stage}.json", data)
    out, _ = run("results/report.py", "new")
    assert "new/single.json knows 3 configurations" in out and "  regret: true accuracy" in out
    assert re.search(r"^SuperNet, uniform +96 +6 +\[", out, re.M) and re.search(r"^\[2,2\] .* default", out, re.M)
    for file in "fifty-thousand/long/mixture-seed2.json", "fifty-thousand/propose.json":
        shutil.copy(RESULTS / "cifar10" / file, "old")
    shutil.copy(RESULTS / "synthetic/single.json", "old/part"), shutil.copy(RESULTS / PUBLISHED, "one.json")
    out, _ = run("results/report.py", "old", "--truth", "one.json")
    assert re.search(r"^mixture, M = 4, uniform +50000  78000  \[4,3,3\]  0.53 .* 1.49$", out, re.M)
    assert re.search(r"^\[5,1,4\] +88.00 +87.29 +3 +-0.23 +0.23 +0.66 +proposed$", out, re.M)
    run("results/report.py", "one.json")
    pictures = {"pooling.png", "old/pooling.png", "old/searches.png", "old/propose.png"}
    assert out.endswith("pip install matplotlib\n") or pictures <= files(".").keys()


def test_exposure_against_a_count_and_a_truth_that_knows_a_part_of_the_configurations():
    pooled = [[sum(layer >= cut for cut in itertools.accumulate(c[:-1])) for layer in range(10)] for c in SPACE]
    fed = [sum(math.log([other[n] for other in pooled].count(mine[n]) / 36) / 10 for n in range(10)) for mine in pooled]
    np.testing.assert_allclose(report.exposure(SPACE), fed, atol=1e-9)
    results = [{"config": list(c), "macs": c[0], "val_acc": -c[0]} for c in SPACE]  # the best are unknown
    figures = report.figures_of(results, {c: 0.01 * c[0] for c in SPACE if c[0] != 1})
    assert figures == pytest.approx([-1, -kendall_tau([c[0] for c in SPACE], np.round(fed, 9)), -1, 6])
    assert report.figures_of(results, {c: 0.5 for c in SPACE[:17]}) == [None, *figures[1:3], None]


def test_every_way_is_compared_and_no_run_is_repeated():
    truth = {tuple(r["config"]): r["test_acc"] for r in strict(RESULTS / "synthetic/single.json")["results"]}

    def pretended_runs():
        def search(command, **options):
            out, seed, epochs = (command[command.index(name) + 1] for name in ("--out", "--seed", "--epochs"))
            stage, by_cost = re.sub("search_|extras.", "", command[2]), "cost" in command
            passes = int(epochs) * (4 if stage == "mixture" else 1)  # of nine steps
            save_json(Path(out, f"{stage}-seed{seed}.json".replace("-seed0", "")), {
                "stage": stage, "args": {"seed": int(seed), "batch_size": 100, "amp": "off", "models": 4},
                "n_train": 900, "n_val": 900, "history": [{}] * passes, "results": [
                    {"config": list(c), "macs": int(cost), "val_acc": truth[c] * (1 if by_cost else -1),
                     "steps": passes / 4 * (1 + by_cost)} for c, cost in zip(SPACE, COSTS)]})
            return SimpleNamespace(returncode=0)
        importlib.import_module("subprocess").run = search
    words = ["results/compare.py", "--truth", RESULTS / "synthetic/single.json", "--seeds", "2", "--epochs", "8",
             "--out", "x", "--amp", "off"]
    out, _ = run(*words, prepare=pretended_runs)
    ways = strict("x/compare.json")["ways"]
    assert len(ways) == 16 and {len(values) for values in ways.values()} == {2}
    for way, cost in (("uniform", 1), ("cost", 2), ("mixture", 4 / 3), ("mixture, cost", 8 / 3), ("mcts", 4 / 3)):
        tau, _, regret, step = ways[way][1]
        assert (tau == 1) == (regret == 0) == ("cost" in way) and step == pytest.approx(cost, abs=1e-5)
    assert re.search(r"^cost  .* \+2.00 \+- 0.00$", out, re.M) and re.search(r"^mcts  .* \+0.00 \+- 0.00$", out, re.M)
    assert {path.name for path in Path("x").glob("mixture*")} == {
        f"mixture{draws}{length}" for draws in ("", "-cost") for length in ("-epochs2", "-4-x-the-steps-epochs8")}
    again, _ = run(*words, prepare=failing("subprocess.run", AssertionError("run again")))
    table = out[out.index("\nway  "):]
    assert again.endswith(table) and table in run("results/report.py", "x")[0]
    assert "name that with --amp" in refused(*words[:-1], "bf16")


# ---- the README ------------------------------------------------------------------------------------------------------

def definitions(path):
    """The imports of a file from elsewhere than this project, and its definitions: (source, {name: source})."""
    source, imports, found = path.read_text(), [], {}
    for node in ast.parse(source).body:
        text = ast.get_source_segment(source, node)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = "\n".join([f"@{ast.unparse(d)}" for d in node.decorator_list] + [text])
        elif isinstance(node, ast.Assign):
            found |= {name.id: text for name in ast.walk(node) if isinstance(getattr(name, "ctx", None), ast.Store)}
        elif isinstance(node, (ast.Import, ast.ImportFrom)) and not (
                HERE / f"{(getattr(node, 'module', None) or node.names[0].name).replace('.', '/')}.py").exists():
            imports.append(text)
    return "\n".join(imports), found


def test_each_row_of_the_copy_table_works_with_what_it_names_and_nothing_else():
    page = (HERE / "README.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| `([\w/]+\.py)` \|([^|]*)\|$", page, re.M)
    assert len(rows) >= 8
    common_imports, shared = definitions(HERE / "common.py")
    for purpose, take, path, along in rows:
        imports, found = definitions(HERE / path)
        names = re.findall(r"`(\w+)`", take + along)
        source = "\n\n".join([imports, common_imports, *((shared | found)[name] for name in names)])
        module = {"__name__": "copied"}
        exec(compile(source, purpose, "exec"), module)
        codes = [compile(source, purpose, "exec")]
        for code in codes:  # the list grows by what is defined within
            codes += [constant for constant in code.co_consts if hasattr(constant, "co_code")]
            used = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
            assert not used - module.keys() - set(dir(builtins)), (purpose, code.co_name)


def code_block(word):
    """The Python code block of the README that holds a word."""
    codes = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    return next(code for code in codes if word in code)


def test_your_own_network_as_in_the_readme():
    def replace():
        source = code_block("class PlainCNN")
        exec(source, module := importlib.import_module("common").__dict__)
        assert module["make_network"].__code__.co_filename != common.make_network.__code__.co_filename
    words = ["--layers", "6", "--scales", "3", *TINY[6:], "--dataset", "synthetic", "--epochs", "1", "--out", "x"]
    run("search_mixture.py", *words, "--models", "2", prepare=replace)
    run("retrain.py", *words, "--runs", "1", prepare=replace)
    assert "make_network (another network)" in refused("search_mixture.py", *words, "--models", "2")
    assert len(strict("x/mixture.json")["results"]) == 10 and len(strict("x/retrain.json")["results"]) in (1, 2)
    assert strict("x/mixture.json")["best"]["params"] != sum(p.numel() for p in ResNet20(layers=6).parameters())


def test_the_network_that_stage_4_found_is_used_as_in_the_readme():
    folder("my_images"), picture("a.jpg")
    run("retrain.py", *TINY[6:], "--dataset", "my_images", "--image-size", "64", "--batch-size", "4", "--epochs", "1",
        "--runs", "1", "--config", "5,3,2")
    exec(code_block("my_images"), module := {"print": lambda name: module.setdefault("printed", name)})
    assert module["printed"] in ("cat", "dog")


# ---- steps: after all that forks, since where there is a GPU they start threads --------------------------------------

def test_a_step_is_plain_sgd_and_a_learner_goes_on_from_its_state():
    net, twin, again = (ResNet20(classes=4, layers=4).double() for _ in range(3))
    x, y = torch.randn(8, 3, 32, 32, dtype=torch.float64), torch.arange(8) % 4
    twin.load_state_dict(net.state_dict())
    learner, later = (Learner(each, CPU, weight_decay=0.01) for each in (net, again))
    velocity = [torch.zeros_like(p) for p in twin.parameters()]
    for lr in (0.1, 0.05):
        logits = twin(x, (2, 2))
        loss, accuracy = F.cross_entropy(logits, y), (logits.argmax(1) == y).float().mean()
        grads = torch.autograd.grad(loss, list(twin.parameters()))
        with torch.no_grad():
            for p, g, v in zip(twin.parameters(), grads, velocity):
                v.mul_(0.9).add_(g + 0.01 * p)
                p.sub_(lr * v)
        assert learner.train(x, y, (2, 2), lr).tolist() == pytest.approx([loss.item(), accuracy.item()], rel=1e-4)
        assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(learner.network.parameters(), twin.parameters()))
    later.load_state_dict(learner.state_dict())
    assert torch.equal(*(each.train(x, y, (3, 1), 0.1) for each in (learner, later)))
    assert all(map(torch.equal, again.parameters(), net.parameters()))
    assert torch.equal(learner.score(x, y, (2, 2)), (net.eval()(x, (2, 2)).argmax(1) == y).float().mean())


def test_a_first_step_that_fp16_skips_leaves_momentum_zero():
    factor = [math.inf, 1.0]

    class Overflowing(Learner):
        def loss(self, x, y, path):
            loss, logits = super().loss(x, y, path)
            return loss * factor.pop(0), logits
    learner = Overflowing(ResNet20(classes=4, layers=4), CPU, "fp16")
    weights = list(learner.network.parameters())
    momentum = [learner.optimizer.state[p]["momentum_buffer"] for p in weights]  # before any step is taken
    before, batch = [p.clone() for p in weights], (torch.randn(8, 3, 32, 32), torch.arange(8) % 4, (2, 2), 0.1)
    learner.train(*batch)
    assert not any(velocity.any() for velocity in momentum) and all(map(torch.equal, weights, before))
    learner.train(*batch)
    assert all(torch.allclose(p, q - 0.1 * v, atol=1e-6) and v.any() for p, q, v in zip(weights, before, momentum))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_take_the_steps_that_eager_ones_take_and_a_failing_capture_goes_on_eagerly(capsys):
    split, device, found = noise(256), torch.device("cuda"), []
    for graphs in (True, False):
        torch.manual_seed(0)
        learner = Learner(ResNet20(classes=4, layers=4), device, graphs=graphs)
        for step in range(12):
            x, y = next(training_batches(*split, 64, device, seed=step))
            learner.train(x, y, ((2, 2), (3, 1))[step % 2], 0.1 / (1 + step))  # the rate must reach the graph
            assert learner.score(x, y, (2, 2)).item() <= 1
        found.append(torch.cat([p.detach().flatten() for p in learner.network.parameters()]))
    assert (found[0] - found[1]).abs().max() < 1e-3 and common.graph_place(device).works
    for _ in range(2):  # what fails once is not tried again
        step = common.graphed(lambda x, y: x * x.sum().item(), device)  # item() waits, so that capturing fails
        for x in torch.arange(4.0, device=device)[:, None].expand(4, 8):
            assert torch.equal(step(x, x), 8 * x * x)
    assert len(capsys.readouterr().out.splitlines()) == 1
