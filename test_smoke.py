"""Tests: the mathematics against independent definitions, every loader, and the scripts as a user runs them.

    python -m pytest -q test_smoke.py

A script runs in a fork of this process, which has imported torch already: a tenth of a second instead of three. So
these tests want Linux or a Mac, and every test that forks stands before those that train in this process.
"""
import ast
import importlib
import itertools
import json
import math
import multiprocessing
import os
import re
import runpy
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: a fork of many threads would hang
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asks for a GPU without starting CUDA, which no fork survives

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, PngImagePlugin

import common
from common import (Learner, ResNet20, Split, balanced_order, count_macs, crop_and_flip, evaluate, kendall_tau,
                    load_dataset, near_the_best, normalise, pack_right, pareto, pooling_configs, read_image, save_json,
                    split_in_halves, training_batches, unpack_right)
from retrain import Gain, best_by_chance, errors_of_gain, trained_rows, verdict
from search_mixture import Assignment, balance

HERE, CPU, FORK = Path(__file__).parent, torch.device("cpu"), multiprocessing.get_context("fork")
README, RESULTS, PUBLISHED = (HERE / "README.md").read_text(), HERE / "results", "published_cifar10_resnet20.json"
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.S)
SPACE = pooling_configs()
COSTS = np.array([count_macs(config) for config in SPACE])
TINY = ["--dataset", "synthetic", "--layers", "4", "--scales", "2", "--limit-train", "96", "--batch-size", "16",
        "--epochs", "2", "--amp", "off", "--device", "cpu"]  # three configurations: [1,3], [2,2] and [3,1]
PETS = [*TINY, "--dataset", "pets", "--batch-size", "4"]  # of an option named twice the last one counts
STAGES = {"single": ["train_single.py", *TINY, "--config", "all"],
          "supernet": ["search_supernet.py", *TINY],
          "mixture": ["search_mixture.py", *TINY, "--models", "2"],
          "retrain": ["retrain.py", *TINY, "--runs", "2", "--config", "all"]}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ---- running scripts -------------------------------------------------------------------------------------------------

def start(script, *words, prepare=lambda: None, tied_part=9, **environment):
    """Start a script: (process, files of what it prints). prepare() is called in the process, before the script.

    tied_part: common.TIED_PART. With 9 a search chooses although so few images tell nothing apart.
    """
    printed = [tempfile.NamedTemporaryFile() for _ in range(2)]  # standard output and standard error

    def as_a_user():
        sys.stdout, sys.stderr = (open(file.name, "w") for file in printed)
        os.environ.update(environment)
        for name in [name for name in sys.modules if (HERE / f"{name.replace('.', '/')}.py").exists()]:
            del sys.modules[name]  # they ask for their rank when they are imported
        common = importlib.import_module("common")
        common.SYNTHETIC, common.TIED_PART = (160, 40), tied_part  # drawing all images would take most of the time
        prepare()
        sys.argv = [script, *map(str, words)]
        runpy.run_module(script.removesuffix(".py").replace("/", "."), run_name="__main__", alter_sys=True)
    process = FORK.Process(target=as_a_user, daemon=True)
    process.start()
    return process, printed


def finish(started, codes=(0,)):
    """Wait for a script and check its exit code, where it is 2 one line on standard error: (output, errors)."""
    process, printed = started
    process.join(240)
    out, err = (Path(file.name).read_text() for file in printed)
    assert process.exitcode in codes and "Traceback" not in err, (process.exitcode, out[-5000:], err)
    assert process.exitcode != 2 or err.count("\n") == 1, err
    return out, err


def run(*words, codes=(0,), **options):
    return finish(start(*words, **options), codes)[0]


def refused(*words, **options):
    return finish(start(*words, **options), codes=(2,))[1]


def failing(function, error, first=1):
    """A `prepare`: from call number `first` on, a function raises `error`, or kills the process where that is None."""
    def prepare():
        module, name = function.rsplit(".", 1)
        module, calls = importlib.import_module(module), itertools.count(1)
        real = getattr(module, name)

        def replaced(*words, **options):
            if next(calls) < first:
                return real(*words, **options)
            if error is None:
                os.kill(os.getpid(), signal.SIGKILL)
            raise error
        setattr(module, name, replaced)
    return prepare


def without_pictures():
    sys.modules["matplotlib"] = None  # so that importing it fails


def run_two_ranks(*words):
    """Run a script as torchrun would on two machines: rank 1 works in the folder `other`."""
    Path("other").mkdir(exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    ranks = [start(*words, prepare=partial(os.chdir, place), RANK=str(rank), LOCAL_RANK=str(rank),
                   TORCHELASTIC_RUN_ID="x", **world) for rank, place in enumerate((".", "other"))]
    for rank in ranks:
        finish(rank)


def files(folder):
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def load(path):
    """A JSON file, which must be strict, without what may differ between equal runs: seconds."""
    return json.loads(Path(path).read_text(), parse_constant=lambda word: pytest.fail(f"{word} in {path}"),
                      object_hook=lambda entry: {k: v for k, v in entry.items() if "seconds" not in k})


# ---- the mathematics -------------------------------------------------------------------------------------------------

def test_the_space_is_every_composition_and_its_cost_that_of_convolutions_and_the_linear_layer():
    assert SPACE == [c for c in itertools.product(range(1, 11), repeat=3) if sum(c) == 10] and len(SPACE) == 36
    widths = [3] + [16] * 4 + [32] * 3 + [64] * 3
    for config, cost in zip(SPACE, COSTS):
        total = 64 * 10
        for layer, side in enumerate(np.repeat([32, 16, 8], config)):
            inputs, outputs = widths[layer:layer + 2]
            weights = 9 * inputs * outputs
            if layer > 0:  # a block: a second convolution, and one of 1x1 beside them where channels double
                weights += 9 * outputs ** 2 + inputs * outputs * (inputs != outputs)
            total += weights * side ** 2
        assert cost == total


def test_the_network_pools_where_the_configuration_says():
    net, x = ResNet20().requires_grad_(False), torch.randn(2, 3, 32, 32)
    for config in SPACE:
        layers, y = iter(net.layers), x
        for part, count in enumerate(config):
            y = F.max_pool2d(y, 2) if part else y
            for _ in range(count):
                y = next(layers)(y)
        assert torch.equal(net(x, config), net.head(y.mean((2, 3)))), config


@pytest.mark.parametrize("models", [1, 2, 4, 8])
def test_balance_against_scaling_rows_and_columns_in_turn(models):
    even, one_model = torch.rand(36, models), torch.eye(models)[[0] * 36]
    for scores in (even, 100 * even, 100 * one_model):
        probs = torch.softmax(scores, 1)
        matrix, columns = probs.numpy().astype(float), np.ones(models)
        for _ in range(2000):
            rows = 1 / (matrix @ columns)
            columns = 36 / models / (rows @ matrix)
        np.testing.assert_allclose(balance(probs), rows[:, None] * matrix * columns, atol=2e-3)


def test_the_assignment_draws_models_by_their_probabilities_and_averages_their_scores():
    a, probs = Assignment(3, 2), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.25, 0.75]], dtype=torch.float64)
    models = np.array(a.draw(probs, [0, 1, 2] * 5000, np.random.default_rng(1)))
    assert (models[0::3] == 0).all() and (models[1::3] == 1).all() and abs(models[2::3].mean() - 0.75) < 0.03
    a.update([0, 0, 2], [1, 1, 0], [0.5, 0.25, 0.0])
    assert a.W.flatten().tolist() == pytest.approx([1, 0.9 * (0.9 * 1 + 0.1 * 0.5) + 0.1 * 0.25, 1, 1, 0.9, 1])
    probability = 1 / (1 + math.exp(100 * (a.W[0, 1].item() - 1)))  # inverse temperature 100 at the end
    assert a.probabilities(1.0, balanced=False)[0, 0].item() == pytest.approx(probability)


def test_kendall_tau_against_a_count_of_pairs_and_the_pareto_front_by_hand():
    for n in (3, 10, 36):
        x, y = np.random.default_rng(n).integers(0, 1 + n // 2, (2, n))  # with ties
        pairs = list(itertools.combinations(range(n), 2))
        total = sum(np.sign((x[i] - x[j]) * (y[i] - y[j])) for i, j in pairs)
        untied = math.prod(sum(v[i] != v[j] for i, j in pairs) for v in (x, y))
        assert kendall_tau(x, y) == pytest.approx(total / untied ** 0.5)
    assert kendall_tau([1, 1], [1, 2]) is None
    results = [{"macs": macs, "val_acc": score} for macs, score in ((10, 5), (20, 4), (30, 7), (10, 3), (50, 7))]
    assert pareto(results, "val_acc") == [results[0], results[2]]


def test_a_gain_has_the_error_of_the_seeds_and_that_of_the_test_images():
    entry, base = {"test_acc": 0.9, "std": 0.03, "runs": [{}] * 3}, {"test_acc": 0.8, "std": 0.04, "runs": [{}] * 4}
    seeds, images, paired = errors_of_gain(entry, base, 60)
    assert seeds == pytest.approx((0.03 ** 2 / 3 + 0.04 ** 2 / 4) ** 0.5) and not paired
    rng = np.random.default_rng(0)
    right = rng.binomial(60, (0.9, 0.8), (100_000, 2)) / 60
    assert images == pytest.approx((right[:, 0] - right[:, 1]).std(), rel=0.02)
    # paired: as often as not both see the same images, so draw the images anew and look at the gains
    easy, seen = rng.random((2, 90)), rng.random((2, 3, 90))
    mine, its = seen[0] < 0.3 + 0.6 * easy[0], seen[1] < 0.2 + 0.6 * easy[0]
    runs = [[{"right": pack_right(run)} for run in part] for part in (mine, its)]
    entry, base = ({"test_acc": 0, "std": 0.01, "runs": part} for part in runs)
    gains = []
    for _ in range(20_000):
        drawn = rng.integers(90, size=90)
        gains.append(mine[:, drawn].mean() - its[:, drawn].mean())
    for counts in (90, [40, 50]):
        assert errors_of_gain(entry, base, counts)[1:] == (pytest.approx(np.std(gains), rel=0.03), True)
    assert np.array_equal(unpack_right(runs[0][0]["right"], 90), mine[0])


def test_the_best_of_gains_that_are_none_against_a_simulation():
    rng = np.random.default_rng(0)
    for count in (1, 2, 5, 36):
        accuracies = rng.standard_normal((40_000, count + 1)) * 0.02 / 2 ** 0.5  # the last is the default's
        largest = (accuracies[:, :-1] - accuracies[:, -1:]).max(1).mean()
        gains = {number: Gain(0.1, None, 0.02, True, 0.5) for number in range(count)}
        assert best_by_chance(gains) == pytest.approx(largest, abs=3e-4)
    assert near_the_best([0.5, 0.41, 0.39], 100) == (2, 0.1) and near_the_best([1.0, 1.0, 0.9], 9) == (2, 0.0)


def test_a_gain_is_worth_taking_only_if_it_is_more_than_luck_and_two_errors():
    def said(*gains):
        return verdict({(number, 1): Gain(*gain, True, 0.5) for number, gain in enumerate(gains)}, "[2,2]")
    assert said((0.041, 0.02, 0.01)) == "Better than [2,2] by more than luck and two errors: [0,1] gains 4.1 points " \
                                        "and needs 4.0."
    assert said((0.039, 0.01, 0.02)).startswith("None is better than [2,2]") and "more seeds" in said((9, None, 0.01))
    # of five with the error 2 points the best is by luck 1.645 points up, as the mean of the largest of five normals is
    # 1.163, of which the default's half of the variance has no part
    five = said(*[(0.0563, 0.02, 0.01)] * 4, (0.0565, 0.02, 0.01))
    assert five.endswith(": [4,1] gains 5.7 points and needs 5.6.")


def test_batches_are_cut_and_mirrored_and_take_every_image_once_in_scoring_never_one_alone():
    images = torch.randint(0, 256, (20, 32, 32, 3), dtype=torch.uint8)
    top, left, flip = torch.randint(0, 9, (20,)), torch.randint(0, 9, (20,)), torch.rand(20) < 0.5
    for got, image, y, x, mirrored in zip(crop_and_flip(images, top, left, flip, 4), images, top, left, flip):
        window = np.pad(image, ((4, 4), (4, 4), (0, 0)))[y:y + 32, x:x + 32]
        assert np.array_equal(got, window[:, ::-1] if mirrored else window)
    images = torch.arange(50, dtype=torch.uint8)[:, None, None, None].expand(50, 32, 32, 3)  # each shows its number
    labels, seen = torch.arange(50) % 4, []

    def score(x, y, path=None):
        numbers = (127.5 * x[:, 0, 16, 16] + 127.5).round().int()  # in the middle, which is never cut off
        assert len(y) > 1 and torch.equal(numbers % 4, y.int())
        seen.extend(numbers.tolist())
        return y == 0
    for x, y in training_batches(images, labels, 8, CPU, seed=5):
        score(x, y)
    assert len(seen) == len(set(seen)) == 48
    for n, batch_size in ((50, 16), (3, 2)):
        seen.clear()
        right = evaluate(score, Split(images[:n], labels[:n]), None, CPU, batch_size)
        assert seen == list(range(n)) and torch.equal(right, labels[:n] == 0)


def test_every_prefix_of_the_shuffle_is_balanced_and_halves_are_stratified():
    labels = torch.tensor([0] * 50 + [1] * 31 + [2] * 19)
    order = balanced_order(labels)
    for n in range(1, 101):
        share = torch.bincount(labels[order[:n]], minlength=3) - n * torch.tensor([0.50, 0.31, 0.19])
        assert share.abs().max() <= 1.5
    one, two = split_in_halves(Split(torch.arange(100), labels), seed=3)
    assert sorted([*one.images.tolist(), *two.images.tolist()]) == list(range(100))
    assert all(torch.equal(labels[half.images], half.labels) for half in (one, two))
    assert (torch.bincount(one.labels) - torch.bincount(two.labels)).abs().max() <= 1


# ---- images ----------------------------------------------------------------------------------------------------------

def picture(path, size=(40, 30), seed=0, **options):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)


def folder(root, test="test"):
    """A data set of eight training images and four test images."""
    for (number, name), i in itertools.product(enumerate(("cat", "dog")), range(6)):
        picture(Path(root, "train" if i < 4 else test, name, f"{i}.png"), seed=2 * i + number)
    return Path(root)


def test_an_image_is_read_upright_on_white_whatever_is_attached_to_it():
    text, exif = PngImagePlugin.PngInfo(), Image.Exif()
    text.add_text("long", "x" * 2_000_000, zip=True)
    for name, attached in (("text.png", {"pnginfo": text}), ("profile.png", {"icc_profile": bytes(2_000_000)}),
                           ("exif.png", {"exif": b"broken"})):
        picture(name, **attached)
        picture(f"plain-{name}")
        assert np.array_equal(read_image(name, 16), read_image(f"plain-{name}", 16)), name
    for turn, name in itertools.product(range(1, 9), ("turned.png", "turned.tiff")):
        exif[0x0112] = turn
        picture(name, size=(16, 16), exif=exif)
        assert np.array_equal(read_image(name, 16), ImageOps.exif_transpose(Image.open(name))), (name, turn)
    Image.new("LA", (9, 9), (0, 0)).save("clear.png")
    Image.new("P", (9, 9)).save("clear.gif", transparency=0)
    assert read_image("clear.png", 8).min() == read_image("clear.gif", 8).min() == 255


def test_a_folder_is_listed_as_a_person_sees_it_and_what_is_skipped_is_counted_by_its_reason():
    root = folder("pets", test="val")
    for name in ("train/cat/._0.png", "train/.ipynb_checkpoints/cat/0.png", "train/cat/.ipynb_checkpoints/0.png",
                 "train/__MACOSX/cat/0.png", "train/cat/more/5.GIF", "test/unlabelled.png",
                 "train/br\u00fbl\u00e9e/0.png", "val/bru\u0302le\u0301e/0.png"):  # two ways to write the accents
        picture(root / name)
    picture(root / "train/cat/6.jfif", format="JPEG")
    for name in ("train/cat/notes.txt", "train/dog/a.HEIC", "train/dog/b.heic", "train/dog/none"):
        (root / name).touch()
    for link, target in (("train/cat/up", "../.."), ("train/all", "../train"), ("train/kitty", "cat"),
                         ("train/dog/gone.png", "/nowhere.png")):
        (root / link).symlink_to(target)
    train, test, classes = load_dataset("pets")
    assert classes == ["br\u00fbl\u00e9e", "cat", "dog"]
    assert torch.bincount(train.labels).tolist() == [1, 6, 4] and torch.bincount(test.labels).tolist() == [1, 2, 2]
    line = next(line for line in run("train_single.py", *PETS).splitlines() if "skipped" in line)
    assert line.startswith("pets: skipped ")
    for reason in ("2 .heic", "1 .txt", "1 no suffix", "1 links that lead nowhere", "2 linked twice", "3 hidden"):
        assert reason in line, line


@pytest.mark.parametrize("spoil, message", [
    (lambda root: shutil.rmtree(root / "train"), "It holds the folders test: "),
    (lambda root: (root / "train").rename(root / "Train"), "It holds the folders Train, test: "),
    (lambda root: [(root / part).rename(root / f"old-{part}") for part in ("train", "test")], "old-test, old-train"),
    (lambda root: shutil.rmtree(root / "test"), "It holds the folders train: "),
    (lambda root: shutil.rmtree(root / "test/cat"), "pets/test lacks classes that the other part has: cat"),
    (lambda root: shutil.rmtree(root / "train/dog"), "pets/train lacks classes that the other part has: dog"),
    (lambda root: [path.rename(path.with_suffix(".heic")) for path in root.rglob("dog/*")],
     "the class pets/train/dog has no image that can be read (in it: 4 .heic)"),
    (lambda root: (root / "test/owl").mkdir(), "the class pets/test/owl has no image that can be read (in it: noth"),
    (lambda root: [shutil.rmtree(path) for path in root.glob("*/dog")], "two classes or more, in train/<class>/: th")])
def test_a_folder_of_another_shape_is_told_what_it_holds_and_what_is_missing(spoil, message):
    spoil(folder("pets"))
    assert message in refused("train_single.py", *PETS) and not Path("data").exists()


def test_images_are_decoded_once_and_again_where_their_files_changed_or_the_cache_is_damaged(monkeypatch):
    decoded = []
    monkeypatch.setattr(common, "read_image", lambda *words: decoded.append(words) or read_image(*words))
    folder("pets")
    before = load_dataset("pets")
    before = [split._replace(images=split.images.clone()) for split in before[:2]]
    assert torch.equal(load_dataset("pets")[0].images, before[0].images) and len(decoded) == 12
    assert torch.equal(load_dataset("pets", limit_train=3)[0].images, before[0].images[:3]) and len(decoded) == 12
    for path in Path("data/cache").glob("*.bin"):
        path.write_bytes(path.read_bytes()[:-100])
    assert torch.equal(load_dataset("pets")[0].images, before[0].images) and len(decoded) == 24
    changed = Path("pets/train/cat/0.png")
    found = changed.stat()
    picture(changed, seed=99)
    changed.write_bytes(changed.read_bytes().ljust(found.st_size, b"\0")[:max(found.st_size, changed.stat().st_size)])
    os.utime(changed, ns=(found.st_atime_ns, found.st_mtime_ns))  # as `tar --mtime` and `touch -d` leave it
    train, test, _ = load_dataset("pets")
    assert len(decoded) == 25 and not torch.equal(train.images, before[0].images)  # the others are not decoded again
    assert train.digest != before[0].digest and test.digest == before[1].digest
    shutil.copytree("pets", "elsewhere/pets")
    assert [split.digest for split in load_dataset("elsewhere/pets")[:2]] == [train.digest, test.digest]
    assert len(list(Path("data/cache").iterdir())) == 4  # a file for each part of each place, none left over


def test_files_that_are_no_images_are_listed_but_a_failing_disk_and_too_little_memory_are_called_what_they_are():
    cats, words = folder("pets") / "train/cat", ["search_supernet.py", *PETS]
    assert "I/O error; put that right" in refused(*words, prepare=failing("PIL.Image.open", OSError(5, "I/O error")))
    assert "out of memory" in refused(*words, prepare=failing("PIL.Image.open", MemoryError()))
    assert "out of memory" in refused(*words, prepare=failing("torch.stack", RuntimeError("CUDA out of memory")))
    Image.new("RGB", (40, 30)).save(cats / "a.jpg", "EPS")  # which is a program
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(cats / "b.png")
    (cats / "c.ppm").write_bytes(b"P6 60000 60000 255\n")
    os.mkfifo(cats / "pipe.png")  # to open it would wait for ever
    for number in range(12):
        (cats / f"notes{number}.jpg").touch()
    err = refused(*words)
    assert re.search("15 files .*a.jpg .cannot identify.*8 bits.*exceeds limit", err) and err.count("notes") < 20


def test_cifar_and_food101_are_read_and_a_failing_download_is_one_line(monkeypatch):
    def cifar(data_dir, train, download):
        return SimpleNamespace(data=np.zeros((20, 32, 32, 3), np.uint8), targets=[0, 1] * 10, classes=["a", "b"])
    monkeypatch.setattr("torchvision.datasets.CIFAR10", cifar)
    assert load_dataset("cifar10")[1].labels.sum() == 10
    words = ["train_single.py", *TINY, "--dataset", "food101", "--batch-size", "4"]
    assert "no network" in refused(*words, prepare=failing("torchvision.datasets.Food101", RuntimeError("no network")))
    place = Path("data/food-101")
    for part in ("train", "test"):
        listed = {name: [f"{name}/{part}{number}" for number in range(5)] for name in ("pie", "tart")}
        for file in listed["pie"] + listed["tart"]:
            picture(place / f"images/{file}.jpg")
        (place / "meta").mkdir(exist_ok=True)
        save_json(place / f"meta/{part}.json", listed)
    assert "trains on 10 images and tests on 10, 2 classes" in run(*words)
    (place / "meta/train.json").write_text('{"pie": [')
    assert "meta/train.json is not a JSON object, or damaged" in refused(*words)


# ---- the stages ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder in which the four stages ran one after the other."""
    place = tmp_path_factory.mktemp("whole")
    for words in STAGES.values():
        run(*words, "--out", place)
    return place


def test_each_stage_leaves_the_json_that_the_next_one_reads(whole, monkeypatch):
    single, naive, mixture, retrain = (load(whole / f"{stage}.json") for stage in STAGES)
    truth = {tuple(r["config"]): r["test_acc"] for r in single["results"]}
    monkeypatch.setattr(common, "SYNTHETIC", (160, 40))
    test, network = load_dataset("synthetic", limit_train=96)[1], ResNet20(layers=4)
    network.load_state_dict(torch.load(whole / "single/3-1-seed0.pt")["learner"]["network"])
    right = network.eval()(normalise(test.images), (3, 1)).argmax(1) == test.labels
    assert len(truth) == 3 and right.float().mean().item() == pytest.approx(truth[3, 1])
    assert naive["rank"]["regret"] == pytest.approx(max(truth.values()) - truth[tuple(naive["best"]["config"])])
    assert np.sum(mixture["trained"]) == 2 * 2 * 3  # two epochs for each of two models
    np.testing.assert_allclose(np.sum(mixture["probabilities"], 0), 3 / 2, atol=0.01)
    assert [r["config"] for r in retrain["results"] if "default" in r["why"]] == [[2, 2]]
    for search, name in ((naive, "supernet.json"), (mixture, "mixture.json")):
        best = [r["config"] for r in retrain["results"] if f"best of {name}" in r["why"]]
        assert best == [search["best"]["config"]]
    for r in retrain["results"]:
        assert r["runs"][0]["test_acc"] == truth[tuple(r["config"])]  # known from single.json
        assert r["test_acc"] == pytest.approx(np.mean([run["test_acc"] for run in r["runs"]]), abs=1e-6)


def test_results_whose_runs_are_gone_are_not_overwritten_and_dropout_goes_on_as_before(whole):
    Path("x").mkdir()
    shutil.copy(whole / "single.json", "x")
    assert "would be lost: move single.json away" in refused(*STAGES["single"], "--out", "x")
    text = next(snippet for snippet in SNIPPETS if "DEFAULT" in snippet)
    Path("plain.py").write_text(text.replace("self.head(", "self.head(F.dropout(", 1).replace(
        "x.mean((2, 3)))", "x.mean((2, 3)), 0.5, self.training))"))
    words = ["train_single.py", *TINY[:2], *TINY[6:], "--network", "plain.py", "--epochs", "3", "--out"]
    run(*words, "a")
    run(*words, "b", prepare=failing("common.save_checkpoint", None, 2), codes=(-signal.SIGKILL,))
    run(*words, "b")
    one, two = (torch.load(f"{place}/single/2-2-2-seed0.pt")["learner"]["network"] for place in "ab")
    assert all(torch.equal(one[name], two[name]) for name in one)


def write_searches(place, like, *searches):
    """Pretend searches: (file name, scores of [1,3], [2,2], [3,1], settings that differ from `like`)."""
    Path(place).mkdir(exist_ok=True)
    for name, scores, own in searches:
        results = [{"config": [a, 4 - a], "val_acc": score} for a, score in enumerate(scores, 1) if score is not None]
        save_json(f"{place}/{name}.json", {"args": like | own, "n_val": 1000, "results": results})


def test_retrain_averages_the_seeds_of_a_search_and_says_what_it_leaves_alone(whole):
    like = load(whole / "supernet.json")["args"]
    write_searches("x", like, ("a", (0.3, 0.2, 0.1), {"seed": 0}), ("a-seed1", (0.1, 0.3, 0.5), {"seed": 1}),
                   ("b", (0.3, 0.2, 0.1), {"models": 8}), ("other", (0.9, 0, 0), {"data_digest": "1"}),
                   ("a (copy)", (0.9, 0.2, 0.1), {"seed": 0}), ("c", (0.3, None, 0.2), {"models": 2}),
                   ("tied", (0.3, 0.3, 0.3), {"models": 3}), ("._a", (0.9, 0.2, 0.1), {"models": 5}))
    Path("x/list.json").write_text("[1]")
    save_json("x/notes.json", {"what": "of another program"})
    words = ["retrain.py", *TINY, "--runs", "1", "--out", "x"]
    out = run(*words, "--top", "1", tied_part=0.75)
    assert "[2,2] (default), [3,1] (best of a.json, a-seed1.json), [1,3] (best of b.json; best of c.json)" in out
    assert "x/a (copy).json, a copy of a.json" in out and "tied.json chose nothing: 3 of 3 scores" in out
    assert out.count("left alone") == 4 and "other images" in out and "x/list.json is not a JSON object" in out
    assert "x/notes.json has no results" in out
    for copy in ("a (copy)", "list", "notes", "other", "tied"):
        os.remove(f"x/{copy}.json")
    out = run(*words, "--top", "2")
    assert "[3,1] (best of a.json, a-seed1.json; number 2 of c.json)" in out
    cheapest = count_macs((1, 3), image_size=16)
    out = run(*words, "--max-macs", cheapest, "--config", "3,1")
    assert "retraining [2,2] (default), [1,3] (" in out and "left out by --max-macs: [3,1]" in out
    assert "below the cheapest" in refused(*words, "--max-macs", "1k")
    assert "such as 60M" in refused(*words, "--max-macs", "none")


def test_a_search_that_can_tell_nothing_apart_chooses_nothing(whole):
    flat = ["search_supernet.py", *TINY, "--lr", "1e-9", "--epochs", "1"]
    out = run(*flat, "--limit-train", "32", "--out", "x", tied_part=0.75)
    assert "1 steps of 16 images, 0.3 for each of 3" in out and "take --batch-size 16 --epochs" in out
    found = load("x/supernet.json")
    assert "2 configurations were never trained and are not ranked" in out and len(found["results"]) == 1
    words = ["retrain.py", *TINY, "--lr", "1e-9", "--epochs", "1", "--limit-train", "32", "--runs", "1", "--out", "x"]
    assert "chooses nothing" in out and found["best"] is None
    out = run(*words, tied_part=0.75)
    assert "supernet.json chose nothing" in out and "nothing is left to compare with the default, [2,2]" in out
    assert [r["why"] for r in load("x/retrain.json")["results"]] == ["default"]
    cheapest = count_macs((1, 3), image_size=16)
    assert "raise --max-macs" in refused(*words, "--config", "3,1", "--max-macs", cheapest, tied_part=0.75)


@pytest.mark.parametrize("stage", ["single", "retrain"])
def test_two_ranks_without_a_shared_disk_share_out_what_is_left_to_train(stage, whole):
    shutil.copytree(whole, "x", ignore=shutil.ignore_patterns(f"{stage}*"))
    words = [*STAGES[stage], "--out", "x"]
    run(*words, prepare=failing("common.save_checkpoint", None, 2), codes=(-signal.SIGKILL,))
    run_two_ranks(*words)
    assert load(f"x/{stage}.json") == load(whole / f"{stage}.json")
    trained = list(Path().glob(f"**/x/{stage}/*.json"))
    assert {path.parts[0] for path in trained} == {"x", "other"}
    assert sorted(path.name for path in trained) == sorted(path.name for path in whole.glob(f"{stage}/*.json"))
    run_two_ranks(*words, "--seed", "5")  # what the JSON holds lies on two disks
    assert len(load(f"x/{stage}.json")["results"][0]["runs"]) > len(load(whole / f"{stage}.json")["results"][0]["runs"])


def test_two_ranks_search_with_two_seeds():
    run_two_ranks(*STAGES["mixture"], "--out", "two")
    for seed, path in ((0, "two/mixture.json"), (1, "other/two/mixture-seed1.json")):
        assert "raise --epochs" in run(*STAGES["mixture"], "--out", "one", "--seed", seed)
        assert load(path) == load(Path("one", Path(path).name))


ends = pytest.mark.parametrize("error, code", [
    (None, -signal.SIGKILL), (KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 2)])


def ends_the_same(words, path, wanted, error, code):
    """Stop a run at its first write, at the second when it goes on, and so on: in the end it leaves what is wanted."""
    for stops in range(99):
        out = run(*words, prepare=failing("os.replace", error, first=2 if stops else 1), codes=(0, code))
        if "wrote" in out:
            break
    assert stops > 2 and load(path) == load(wanted)


@ends
@pytest.mark.parametrize("stage", STAGES)
def test_stopped_at_every_write_a_stage_ends_the_same(stage, error, code, whole):
    shutil.copytree(whole, "x", ignore=shutil.ignore_patterns(f"{stage}*"))
    ends_the_same([*STAGES[stage], "--out", "x"], f"x/{stage}.json", whole / f"{stage}.json", error, code)


@pytest.mark.parametrize("command", ["train_single.py --config 1,3", "search_mixture.py", "retrain.py --config 1,3"])
def test_other_settings_or_images_are_refused_before_any_is_decoded_and_what_is_damaged_is_named(command):
    words = [*command.split(), *PETS, "--lr", "0.1", "--out", "x"]
    folder("pets")
    run(*words, prepare=failing("common.save_checkpoint", None, 2), codes=(-signal.SIGKILL,))
    before, decoding = files("x"), failing("common.decode", AssertionError("decoded"))
    err = refused(*words, "--lr", "0.2", "--weight-decay", "0.1", prepare=decoding)
    assert "--lr (0.1 there, 0.2 here)" in err and "--weight-decay" in err and "--epochs" not in err
    picture("pets/train/cat/0.png", size=(41, 30))
    assert "other training images" in refused(*words) and files("x") == before
    for path in Path("x").rglob("*.pt"):
        path.write_bytes(path.read_bytes()[:1000])
    assert ".pt is damaged" in refused(*words)


def test_who_deletes_what_a_refusal_names_can_go_on(whole):
    shutil.copytree(whole, "x")
    words = [*STAGES["single"], "--lr", "0.2", "--out", "x"]
    for path in shlex.split(refused(*words).split("delete the files of that run: ")[1]):
        os.remove(path)
    assert "wrote x/single.json" in run(*words)


@pytest.mark.parametrize("said, prepare, environment", [
    ("no locks here", failing("fcntl.flock", OSError(38, "Function not implemented")), {}),
    # a clock that goes on by eleven seconds whenever it is looked at
    ("scored 3 of 3, 0 s left", partial(setattr, time, "monotonic", itertools.count(0, 11.0).__next__), {}),
    ("", partial(setattr, sys, "stdout", None), {}),
    ("wrote k\\xe4", lambda: sys.stdout.reconfigure(encoding="ascii"), {}),
    ("wrote", lambda: None, {"WORLD_SIZE": "4", "RANK": "2"}),
    ("wrote", lambda: None, {"WORLD_SIZE": "", "RANK": ""})])
def test_a_search_ends_where_the_disk_is_odd_or_slow_output_is_missing_or_ranks_are_preset(said, prepare, environment):
    assert said in run(*STAGES["supernet"], "--out", "k\xe4", prepare=prepare, **environment)
    assert load("k\xe4/supernet.json")["best"]


def test_a_gpu_without_kernels_is_left_alone_and_a_cpu_has_bf16_where_its_flags_say_so(monkeypatch, capsys):
    def ones(count, device):
        if device != CPU:
            raise RuntimeError("no kernel image")
        return torch.zeros(count)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", ones)
    assert common.pick_device("auto") == CPU and "no kernel image" in capsys.readouterr().out
    for flags, amp in (("sse2 avx512_bf16 avx2", "bf16"), ("amx_bf16", "bf16"), ("avx2", "off")):
        monkeypatch.setattr(Path, "read_text", lambda path: f"flags\t: {flags}\n")
        assert common.pick_amp("auto", CPU) == amp


@pytest.mark.parametrize("command, message", [
    ("train_single.py --lr nan", "--lr"),
    ("train_single.py --dataset synthetic --config 4,3,3 9,1", "10 in all"),
    ("train_single.py --layers 6 --scales 6 --batch-size 1", "at least 2"),
    ("train_single.py --weight-decay 1e300", "--weight-decay"),
    ("search_supernet.py --device cuda:77", "--device cuda:77"),
    ("search_supernet.py --dataset missing", "missing: neither"),
    ("search_mixture.py --dataset .", "It holds the folders"),
    ("search_mixture.py --dataset synthetic --out busy", "in use"),
    ("search_mixture.py --dataset synthetic --batch-size 64 --limit-train 40", "--batch-size 64"),
    (f"search_mixture.py {' '.join(TINY)} --limit-train 31", "the 15 images"),  # the smaller half
    ("train_single.py --out data/", "where data sets are kept"),
    ("train_single.py --out data/cache", "where data sets are kept"),
    ("train_single.py --epochs 0", "at least 1"),
    (f"search_mixture.py {' '.join(TINY)} --lr 1e38", "has left the finite numbers"),
    ("retrain.py --dataset synthetic", "run search_supernet.py"),
    ("results/report.py .", ". holds no JSON"),
    ("results/compare.py --dataset cifar10", "--truth")])
def test_a_mistake_is_one_line_and_touches_nothing(command, message):
    with common.lock("busy", wait=False):
        assert message in refused(*command.split()) and not files(".")


# ---- the pages -------------------------------------------------------------------------------------------------------

def test_the_tables_of_the_evidence_are_the_files():
    page = (RESULTS / "tables.md").read_text()
    for name in ("cifar10", "synthetic"):
        shutil.copytree(RESULTS / name, name, ignore=shutil.ignore_patterns("propose.json"))
        out = run("results/report.py", name, "--truth", RESULTS / PUBLISHED, "--markdown")
        rows = [line for line in out.splitlines() if line.startswith("| ")]
        assert len(rows) > 12 and not set(rows) - set(page.splitlines())
    for name in ("food101-10/retrain.json", "photos", "resnet18/retrain.json"):
        rows = re.findall(r"^\| (?:\[|SuperNet).*", run("results/report.py", RESULTS / name, "--markdown",
                                                         prepare=without_pictures, tied_part=0.75), re.M)
        assert len(rows) > 3 and not set(rows) - set(page.splitlines())
    for name in ("cifar10/fifty-thousand", "cifar100-25k", "food101-10"):
        data = load(RESULTS / name / "propose.json")
        trained = {row[0]: row for row in trained_rows(data)}
        best = trained[common.config_text(data["best"]["config"])]
        assert f"| {', '.join(trained)} | {best[0]} | {' | '.join(best[6:9])} |\n" in page


def test_the_intervals_on_both_pages_are_those_of_the_files():
    out, interval = run("results/claims.py", prepare=without_pictures), r"[+-]\d+\.\d\d to [+-]\d+\.\d\d"
    for page in ("README.md", "tables.md"):
        found = re.findall(interval, (RESULTS / page).read_text())
        assert len(found) > 9 and not set(found) - set(re.findall(interval, out))


def test_the_report_shows_a_new_folder_with_pictures_and_a_single_file(whole, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "module://of.a.notebook")
    shutil.copy(RESULTS / PUBLISHED, "one.json")
    out = run("results/report.py", whole) + run("results/report.py", "one.json")
    assert "single.json knows 3 configurations" in out and "one.json knows 36 configurations" in out
    assert re.search(r"^SuperNet, uniform +96 +6 +\[", out, re.M) and re.search(r"^\[2,2\] .* default", out, re.M)
    assert "pip install matplotlib" in out or Path("pooling.png").exists() and Path(whole, "searches.png").exists()


def test_the_report_sets_side_by_side_what_differs_in_its_seed_alone(whole):
    Path("x").mkdir()
    for name, own in (("a", {"seed": 0}), ("b", {"seed": 1}), ("c", {"lr": 0.3})):
        search = load(whole / "supernet.json")
        save_json(f"x/{name}.json", search | {"args": search["args"] | own})
    rows = re.findall(r"^SuperNet, uniform +96 +6 +(.*?  )", run("results/report.py", "x"), re.M)
    assert sorted(row.count("[") for row in rows) == [1, 2]


def test_every_way_is_compared_and_no_run_is_repeated(monkeypatch):
    def search(command, **options):
        out, seed, module = (command[command.index(name) + 1] for name in ("--out", "--seed", "-m"))
        stage, sampler = re.sub("search_|extras.", "", module), "cost" if "cost" in command else "uniform"
        stage += "-cost" * (sampler == "cost")
        name = f"{stage}-seed{seed}.json" if int(seed) else f"{stage}.json"
        search = load(RESULTS / f"cifar10/ten-thousand/{sampler}-seed{seed}.json")
        save_json(Path(out, name), search | {"args": search["args"] | {"dataset": "synthetic", "data_digest": ""}})
        return SimpleNamespace(returncode=0)
    monkeypatch.setattr("subprocess.run", search)
    words = ["results/compare.py", "--truth", RESULTS / PUBLISHED, "--seeds", "2", "--amp", "bf16", "--out", "x"]
    table = re.search(r"\nway  .*", run(*words), re.S)[0]
    told = " ".join(table.split())
    assert "uniform 2 0.36 (0.00) 0.69 (0.15) 1.42 (0.03) 1.00 (0.01) +0.00 +- 0.00" in told
    assert "mixture, cost 2 0.63 (0.01) 0.45 (0.05) 0.67 (0.70) 1.76 (0.02) +0.27 +- 0.01" in told  # with scoring
    monkeypatch.setattr("subprocess.run", None)
    assert table in run(*words) and table in run("results/report.py", "x")
    assert "--dataset (synthetic there, cifar10 here)" in refused(*words, "--dataset", "cifar10")


COPIED = {  # what a copier may do with the first name of each row
    "ResNet20": "assert ResNet20()(torch.zeros(2, 3, 32, 32), (5, 3, 2)).shape == (2, 10)",
    "pooling_configs": "assert count_macs(pooling_configs()[-1]) == 149340800",
    "training_batches": """
for x, y in training_batches(torch.zeros(9, 8, 8, 3, dtype=torch.uint8), torch.zeros(9), 4, torch.device("cpu"), 0):
    assert x.shape == (4, 3, 8, 8) and x.min() == -1""",
    "Learner": """
class Net(torch.nn.Linear):
    def forward(self, x, config):
        return super().forward(x.flatten(1))
x, y = torch.eye(3)[:, :, None, None], torch.arange(3)
learner = Learner(Net(3, 3), torch.device("cpu"), "bf16")
losses = [learner.train(x, y, (1,), 1.0)[0].item() for _ in range(20)]
assert losses[-1] < losses[0] and learner.score(x, y, (1,)).all()""",
    "read_image": """
from PIL import Image
Image.new("RGB", (9, 5), "white").save("white.png")
assert read_image("white.png", 4).shape == (4, 4, 3)""",
    "kendall_tau": "assert kendall_tau([1, 2], [1, 2]) == 1 and pareto([{'macs': 1, 'a': 2}], 'a')",
    "balance": """
assignment = Assignment(36, 4)
assert torch.allclose(balance(torch.rand(36, 4)).mean(0), torch.full((4,), 0.25), atol=1e-3)
assert assignment.probabilities(0.5).shape == (36, 4)""",
    "extract_network": """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.Linear(4, 2)
    def forward(self, x, config):
        return self.head(self.layer(x)[:, :, ::config[0], ::config[0]].mean((2, 3)))
weights = {name: value for name, value in Net().state_dict().items() if not name.startswith("layer.1")}
found = extract_network(weights, (2, 1), [torch.randn(8, 3, 9, 9)], Net())
assert found(torch.zeros(1, 3, 9, 9), (2, 1)).shape == (1, 2)""",
    "gaussian_process": """
mean, deviation = gaussian_process(np.zeros(3), np.eye(3), np.eye(3), np.array([1, 2, np.nan]), np.ones(3), 1.0)
assert mean.shape == deviation.shape == (3,)"""}


def source_of(name, path):
    """The lines that define a name at the top level of a file."""
    text = (HERE / path).read_text()
    for node in ast.parse(text).body:
        own = node.targets[0].id if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) else ""
        if name in (getattr(node, "name", None), own):
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            return "\n".join(text.splitlines()[first - 1:node.end_lineno])


def import_of(name, path):
    """The import statement at the top of a file that brings a name."""
    imports = [node for node in ast.walk(ast.parse((HERE / path).read_text())) if hasattr(node, "module")
               or isinstance(node, ast.Import)]
    for node in imports:
        for alias in node.names:
            if name == (alias.asname or alias.name):
                words = f"import {alias.name}" + (f" as {alias.asname}" if alias.asname else "")
                return f"from {node.module} {words}" if isinstance(node, ast.ImportFrom) else words


def test_each_row_of_the_copy_table_works_alone_in_an_empty_file():
    rows = re.findall(r"^\| [^|]+ \| (`[^|]+`) \| `([\w/]+\.py)` \| `([^|]+)` \|$", README, re.M)
    assert {re.match("`(\\w+)`", take)[1] for take, _, _ in rows} == COPIED.keys()
    for take, path, imports in rows:
        names = re.findall(r"`(\w+)`", take)
        lines = [import_of(name, path) for name in imports.split(", ")]
        sources = [source_of(name, path) or source_of(name, "common.py") for name in names]
        content = {}
        exec("\n\n".join([*lines, *sources]), content)
        exec("import torch\n" + COPIED[names[0]], content)


def test_a_network_file_as_in_the_readme_is_searched_trained_and_loaded_again(capsys):
    Path("plain.py").write_text(next(snippet for snippet in SNIPPETS if "DEFAULT" in snippet))
    words = [*TINY[:2], *TINY[6:], "--network", "plain.py", "--epochs", "8", "--out", "x"]
    run("search_mixture.py", *words, "--models", "2")
    run("retrain.py", *words, "--runs", "1", "--config", "1,1,4")
    found = load("x/retrain.json")
    assert found["default"]["config"] == [2, 2, 2] and len(load("x/mixture.json")["results"]) == 10
    assert found["space"] == {"layers": 6, "scales": 3, "size": 10}
    loaded = common.load_network("x", (1, 1, 4))
    common.SYNTHETIC, before = (160, 40), common.SYNTHETIC
    test = load_dataset("synthetic", limit_train=96)[1]
    common.SYNTHETIC = before
    right = loaded.network(normalise(test.images), (1, 1, 4)).argmax(1) == test.labels
    assert right.float().mean().item() == pytest.approx(
        next(r["test_acc"] for r in found["results"] if r["config"] == [1, 1, 4]))
    with open("plain.py", "a") as file:
        file.write("# changed\n")
    assert "--network (another network)" in refused("search_mixture.py", *words, "--models", "2")
    assert "holds no search" in refused("retrain.py", *words[:-1], "y")
    assert "--layers" in refused("search_supernet.py", *words, "--layers", "6")


@pytest.mark.parametrize("old, new, message", [
    ("DEFAULT = (2, 2, 2)", "", "needs DEFAULT"),
    ("DEFAULT = (2, 2, 2)", "DEFAULT = 2, 0", "needs DEFAULT"),
    ("DEFAULT = (2, 2, 2)", "DEFAULT = 2, 2, 4", "cost the same, so layer"),  # two layers are not there
    ("DEFAULT = (2, 2, 2)", "DEFAULT = 1, 1, 1, 1, 1, 1", "cannot run [1,1,1,1,1,1] on images of 16 pixels: Run"),
    ("if number in pooled", "if number in (2, 4)", "cost the same, so layer"),  # ignores its configuration
    ("def make_network", "def make", "a function make_network"),
    ("return PlainCNN(classes, norm)", "PlainCNN(classes, norm)", "must return a module"),
    ("widths[-1], classes)", "widths[-1], classes + 1)", "has the shape (1, 11), not (1, 10)"),
    ("DEFAULT = (2, 2, 2)", "DEFAULT = 9, 9, 9, 9, 9", "too many to score"),
    ("import itertools", "import itertools, missing_package", "ModuleNotFoundError: No module named 'missing_package'"),
    ("self.layers):", "self.layers", "SyntaxError")])
def test_a_network_file_that_does_not_fit_is_one_line(old, new, message):
    text = next(snippet for snippet in SNIPPETS if "DEFAULT" in snippet)
    Path("plain.py").write_text(text.replace(old, new))
    err = refused("search_supernet.py", *TINY[:2], *TINY[6:], "--network", "plain.py", "--out", "x")
    assert message in err and not list(Path("x").glob("*.*"))


def test_the_network_that_stage_4_found_is_used_as_in_the_readme(capsys, monkeypatch):
    for i, name in itertools.product(range(10), ("cat", "dog")):
        picture(f"photos/{name}/{i}.png", seed=i)
    split, use, _ = SNIPPETS
    exec(split, {})
    assert len(list(Path("my_images/test/dog").iterdir())) == 2 and len(list(Path("my_images").glob("*/*/*"))) == 20
    picture("a.jpg")
    run("retrain.py", *PETS[:2], *PETS[6:], "--dataset", "my_images", "--image-size", "64", "--runs", "1",
        "--config", "5,3,2")
    shutil.copytree("runs/my_images", "elsewhere/runs/my_images")
    shutil.copy("a.jpg", "elsewhere")
    monkeypatch.chdir("elsewhere")
    exec(use, {})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert sorted(name for _, name in lines) == ["cat", "dog"]
    assert sum(float(chance) for chance, _ in lines) == pytest.approx(1, abs=0.002)


# ---- steps: after all that forks, since where there is a GPU they start threads --------------------------------------

def test_a_step_is_plain_sgd():
    net, twin = (ResNet20(classes=4, layers=4).double() for _ in range(2))
    twin.load_state_dict(net.state_dict())
    x, y = torch.randn(8, 3, 32, 32, dtype=torch.float64), torch.arange(8) % 4
    learner, velocity = Learner(net, CPU, weight_decay=0.01), [torch.zeros_like(p) for p in twin.parameters()]
    for lr in (0.1, 0.05):
        loss = F.cross_entropy(twin(x, (2, 2)), y)
        grads = torch.autograd.grad(loss, list(twin.parameters()))
        with torch.no_grad():
            for p, g, v in zip(twin.parameters(), grads, velocity):
                v.mul_(0.9).add_(g + 0.01 * p)
                p.sub_(lr * v)
        assert learner.train(x, y, (2, 2), lr)[0].item() == pytest.approx(loss.item(), rel=1e-4)
        assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(net.parameters(), twin.parameters()))


def test_a_first_step_that_fp16_skips_leaves_momentum_zero():
    learner, x, y = Learner(ResNet20(classes=4, layers=4), CPU, "fp16"), torch.randn(8, 3, 32, 32), torch.arange(8) % 4
    weights = list(learner.network.parameters())
    momentum, before = [learner.optimizer.state[p]["momentum_buffer"] for p in weights], [p.clone() for p in weights]
    learner.train(math.inf * x, y, (2, 2), 0.1)
    assert not any(velocity.any() for velocity in momentum) and all(map(torch.equal, weights, before))
    learner.train(x, y, (2, 2), 0.1)
    assert all(torch.allclose(p, q - 0.1 * v, atol=1e-6) and v.any() for p, q, v in zip(weights, before, momentum))


def test_a_learner_learns_soft_labels_and_numbers_where_its_loss_is_overridden():
    class Soft(Learner):
        def loss(self, x, y, config):
            loss = F.cross_entropy(self.network(x, config).float(), y)
            return loss, loss.detach()[None]

    class Regression(Soft):
        def loss(self, x, y, config):
            error = self.network(x, config).float()[:, 0] - y
            return error.square().mean(), torch.stack([error.detach().abs().mean()])

        @torch.no_grad()
        def right(self, x, y, config):
            return (self.network(x, config)[:, 0] - y).abs() < 1
    torch.manual_seed(0)
    images, numbers = torch.randint(0, 256, (64, 16, 16, 3), dtype=torch.uint8), torch.rand(64)
    for kind, targets in ((Soft, torch.rand(64, 4).softmax(1)), (Regression, numbers)):
        learner, logged = kind(ResNet20(4, 16, layers=4), CPU), []
        for epoch in range(4):
            for x, y in training_batches(images, targets, 16, CPU, epoch):
                logged.append(learner.train(x, y, (2, 2), 0.05))
        assert logged[0].shape == (1,) and sum(logged[-4:]) < sum(logged[:4])
    kept = torch.rand(2, 3, 3, 3)
    assert torch.equal(normalise(kept.clone()), normalise(kept)) and evaluate(
        learner.score, Split(images, numbers), (2, 2), CPU, 16).dtype == torch.bool


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_take_the_steps_that_eager_ones_take_and_a_failing_capture_goes_on_eagerly(capsys):
    device, found = torch.device("cuda"), []
    images, labels = torch.randint(0, 256, (256, 32, 32, 3), dtype=torch.uint8), torch.arange(256) % 4
    for graphs in (True, False):
        torch.manual_seed(0)
        learner = Learner(ResNet20(classes=4, layers=4), device, graphs=graphs)
        for step in range(12):
            x, y = next(training_batches(images, labels, 64, device, seed=step))
            learner.train(x, y, ((2, 2), (3, 1))[step % 2], 0.1 / (1 + step))  # the rate must reach the graph
        found.append(torch.cat([p.detach().flatten() for p in learner.network.parameters()]))
    assert (found[0] - found[1]).abs().max() < 1e-3 and common.graph_place(device).works
    step = common.graphed(lambda x, y: x * x.sum().item(), device)  # item() waits, so that capturing fails
    for x in torch.arange(4.0, device=device)[:, None].expand(4, 8):
        assert torch.equal(step(x, x), 8 * x * x)
    assert len(capsys.readouterr().out.splitlines()) == 1
