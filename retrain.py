"""Stage 4, the answer: train candidates from scratch beside the default, with several seeds.

    python retrain.py --config 6,1,3 7,1,2          # no search: the default and two that pool late
    python retrain.py                               # the best three of each search in --out as well
    python retrain.py --top 1 --runs 5              # only the best one of each; more seeds
    python retrain.py --max-macs 60M                # no candidate above 60 million multiply-adds
    torchrun --nproc_per_node=4 retrain.py          # four trainings at a time, a GPU for each

Reads the scores of every search in --out; the seeds of one search are averaged. It tries the best
three of each, since the best one is often there by chance: of 26 searches on CIFAR-10 five put one
first that is worse than the default, but among the first three there was always a better one.

A search chooses by training images, so no test image took part in its choice, and all of them are
used here. Runs of train_single.py with the same settings count. What is trained is not trained
again: the weights lie in the folder `retrain`. Writes retrain.json, and with matplotlib
retrain.png, the gains over the default against the cost.

Paper: Javan, Toews, Pedersoli, AutoML 2023, arXiv 2306.11982, section 5.
"""
import json
import math
import os
import statistics
from typing import NamedTuple

import numpy as np

from common import (RANK, TIED_PART, WORLD, UserError, at_least, config_text, describe, gather,
                    load_json, near_the_best, other_data, parse, pooling_configs, print_table,
                    run_main, unpack_right, visible_files, whole_file)
from train_single import (finished_runs, load_for_training, multiply_adds, parse_configs,
                          refuse_to_lose, train_all, write_trained)

NO_SEARCHES = "single", "retrain", "propose"  # what stages 1 and 4 leave, by their names
TRAINED = ["configuration", "M multiply-adds", "val acc", "test acc", "deviation", "runs", "gain",
           "error, seeds", "error, images", "why"]


def load_searches(args):
    """The searches in --out: {the names of their files: {configuration: score}}.

    Seeds of one search are one entry, with the means of their scores. A second file of the same
    search and seed is a copy and does not count. A search that chose nothing (`near_the_best`) has
    no scores. Other JSON files are left alone. A line says each of these.
    """
    searches = {}
    paths = visible_files(args.out, "*.json")
    for path in sorted(paths, key=lambda path: len(path.name)):  # copies have longer names
        if path.stem in NO_SEARCHES:
            continue
        try:
            search = load_json(path, "val_acc")
            if differ := other_data(search.get("args", {}), args.settings):
                raise UserError(f"{path} is of {differ}")
            scores = {tuple(r["config"]): r["val_acc"] for r in search["results"]}
            if not set(scores) <= set(pooling_configs(args.layers, args.scales)):
                raise UserError(f"{path} is of another space")
        except UserError as error:
            print(f"left alone: {error}")
            continue
        own = search["args"]
        setting = [search.get("stage"), {**own, "seed": None, "amp": None}]
        setting = json.dumps(setting, sort_keys=True)
        seeds = searches.setdefault(setting, {})
        if own.get("seed") in seeds:
            print(f"left alone: {path}, a copy of {seeds[own['seed']][0]}")
        else:
            count = search.get("n_val") or 0
            seeds[own.get("seed")] = path.name, scores, count, count + (search.get("n_train") or 0)
    found = {}
    for seeds in searches.values():
        names, all_scores, counts, all_images = zip(*seeds.values())
        images = max(all_images)  # the halves of several seeds overlap
        means = {}
        for config in sorted(set().union(*all_scores)):  # some seeds may have never trained one
            own = [scores[config] for scores in all_scores if config in scores]
            means[config] = float(np.mean(own))
        near, margin = near_the_best(means.values(), min(sum(counts), images))
        if margin is not None and near >= TIED_PART * len(means):
            print(f"{', '.join(names)} chose nothing: {near} of {len(means)} scores lie within two "
                  f"standard errors of the best ({100 * margin:.1f} points)")
            means = {}
        found[", ".join(names)] = means
    return found


def errors_of_gain(entry, base, counts):
    """Standard errors of a gain in accuracy: (by the seeds, by the test images, paired), fractions.

    entry, base: results with `std` and `runs`, the one that gains and the default. counts: the test
    images of each class, or their number.

    By the seeds: how much the gain would move with other seeds; None with fewer than two runs of
    each. By the test images: how much it would move with other test images. Both networks see the
    same images, so this is the error of the difference, image by image, averaged over the runs;
    paired is True. Runs of older versions did not keep which images are right. Then the error is
    as if each network had test images of its own, which is too large; paired is False.
    """
    both, count = (entry, base), int(np.sum(counts))
    parts = [None if r["std"] is None else r["std"] ** 2 / len(r["runs"]) for r in both]
    seeds = None if None in parts else math.sqrt(sum(parts))
    if all("right" in run for r in both for run in r["runs"]):
        means = []  # for each image, the part of the runs that are right
        for r in both:
            right = [unpack_right(run["right"], count) for run in r["runs"]]
            means.append(np.mean(right, axis=0))
        return seeds, float((means[0] - means[1]).std(ddof=1)) / math.sqrt(count), True
    variances = [r["test_acc"] * (1 - r["test_acc"]) / count for r in both]
    return seeds, math.sqrt(sum(variances)), False


class Gain(NamedTuple):
    """What a configuration gains over the default, with the errors of `errors_of_gain`."""
    gain: float  # a fraction, like the errors
    by_seeds: float | None
    by_images: float
    paired: bool
    own_part: float  # of the variance of the gain: what is not the default's

    @property
    def error(self):
        """The larger of both errors, a fraction."""
        return max(self.by_seeds or 0.0, self.by_images)


def gains_of(data):
    """The Gain of each configuration, from the content of a retrain.json: a dict.

    Empty where the default was not trained.
    """
    base = data["default"]
    gains = {}
    for r in data["results"] if base else ():
        if r["config"] != base["config"]:
            errors = errors_of_gain(r, base, data.get("test_counts") or data["n_test"])
            own_part = len(base["runs"]) / (len(base["runs"]) + len(r["runs"]))
            gain = Gain(r["test_acc"] - base["test_acc"], *errors, own_part)
            gains[tuple(r["config"])] = gain
    return gains


def best_by_chance(gains):
    """How large the best of these gains looks on average where none is real, a fraction.

    gains: from `gains_of`. Each is taken to be normal, with the mean 0 and the larger of its two
    errors. All gains share the default's error, which moves them together. So only the own error
    of each makes it look better than the others.
    """
    if not gains:
        return 0.0
    variances = [gain.error ** 2 * gain.own_part for gain in gains.values()]
    normal, steps = statistics.NormalDist(), 1000
    largest = statistics.fmean(normal.inv_cdf(((step + 0.5) / steps) ** (1 / len(gains)))
                               for step in range(steps))  # the mean of the largest of so many
    return largest * math.sqrt(statistics.fmean(variances))


def trained_rows(data):
    """Rows of TRAINED from the content of retrain.json or propose.json.

    In the order of training, or the best first. Accuracies in %, gains and their errors in points.
    """
    def points(fraction, sign=""):
        return "-" if fraction is None else f"{100 * fraction:{sign}.2f}"
    rows, gains = [], gains_of(data)
    for r in sorted(data["results"], key=lambda r: (r.get("order") or math.inf, -r["test_acc"])):
        gain, seeds, images, paired, _ = gains.get(tuple(r["config"]), (None, None, None, True, 0))
        rows.append([config_text(r["config"]), f"{r['macs'] / 1e6:.1f}", points(r.get("val_acc")),
                     points(r["test_acc"]), points(r["std"]), len(r["runs"]), points(gain, "+"),
                     points(seeds), "at most " * (not paired) + points(images), r["why"]])
    return rows


def verdict(gains, default):
    """Say in one line which configurations are worth taking, from the dict of `gains_of`.

    That is what gains more than luck would show (`best_by_chance`) and twice its larger error
    together. With one run it is not known how much a seed changes, so no single run is worth it.
    """
    judged = {config: gain for config, gain in gains.items() if gain.by_seeds is not None}
    if not judged:
        return "One run cannot tell a gain from the luck of its seed: train more seeds (--runs 3)."
    luck = best_by_chance(gains) if len(gains) > 1 else 0.0
    excess, texts = {}, {}
    for config, gain in judged.items():
        needed = luck + 2 * gain.error
        excess[config] = gain.gain - needed
        texts[config] = (f"{config_text(config)} gains {100 * gain.gain:.1f} points and needs "
                         f"{100 * needed:.1f}")
    if worth := [text for config, text in texts.items() if excess[config] > 0]:
        return f"Better than {default} by more than luck and two errors: {'; '.join(worth)}."
    return (f"None is better than {default} by more than luck and two errors (nearest: "
            f"{texts[max(excess, key=excess.get)]}). Keep it, or test on more images, or train "
            f"more seeds (--runs).")


def show_trained(data):
    """Print the rows of `trained_rows`, what luck alone would show, and the verdict."""
    rows = trained_rows(data)
    used = [i for i in range(len(TRAINED)) if any(row[i] != "-" for row in rows)]
    print_table([TRAINED[i] for i in used], [[row[i] for i in used] for row in rows])
    if gains := gains_of(data):
        print(f"The gain is over the default, in points. Its standard error: by the seeds, and by "
              f"the {data['n_test']} test images.")
        if len(gains) > 1:
            print(f"If none were better than the default, the best of {len(gains)} would by luck "
                  f"still look {100 * best_by_chance(gains):.1f} points better, on average.")
        print(verdict(gains, config_text(data["default"]["config"])))


def draw_gains(figure, data):
    """Draw the gains over the default against the cost, each with the larger of its errors."""
    gains, ax = gains_of(data), figure.subplots()
    macs = {tuple(r["config"]): r["macs"] / 1e6 for r in data["results"]}
    default = tuple(data["default"]["config"])
    ax.axhline(0, color="tab:grey", linewidth=1)
    ax.plot(macs[default], 0, "ks", label=f"the default, {config_text(default)}")
    ax.annotate(config_text(default), (macs[default], 0), (5, 5), textcoords="offset points")
    label = "gain, and the larger of its two standard errors"
    for config, gain in gains.items():
        place = macs[config], 100 * gain.gain
        ax.errorbar(*place, 100 * gain.error, fmt="o", color="tab:blue", capsize=3, label=label)
        ax.annotate(config_text(config), place, (5, 5), textcoords="offset points")
        label = None  # once in the legend
    ax.set(xlabel="million multiply-adds", ylabel="gain over the default, points",
           title=f"{data['dataset']}: trained from scratch, {data['n_test']} test images")
    ax.margins(x=0.15)
    ax.legend()


def save_picture(path, draw, *content):
    """Save what draw(figure, *content) draws as a PNG file. One line says so if it cannot."""
    os.environ.pop("MPLBACKEND", None)  # that of a notebook, which need not be installed here
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print(f"{path.name} needs matplotlib: pip install matplotlib, then run this again")
    figure = Figure(layout="constrained")
    draw(figure, *content)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    print(f"wrote {path}")


def candidates(searches, args, macs):
    """What to train: {configuration: why}. Begins with the default.

    searches: from `load_searches`. macs: {configuration: multiply-adds}, of the whole space.
    """
    reasons = {args.default: ["default"]}
    for names, scores in searches.items():
        allowed = [config for config in scores if macs[config] <= args.max_macs]
        best = sorted(allowed, key=scores.get, reverse=True)[:args.top]
        for place, config in enumerate(best, 1):
            number = f"number {place}" if place > 1 else "best"
            reasons.setdefault(config, []).append(f"{number} of {names}")
    for config in parse_configs(args.config, args):
        if macs[config] <= args.max_macs:
            reasons.setdefault(config, ["--config"])
        else:
            print(f"left out by --max-macs: {config_text(config)}, {macs[config] / 1e6:.1f}M")
    return {config: "; ".join(texts) for config, texts in reasons.items()}


def main():
    def options(add):
        add("--config", nargs="+", default=[], help="further configurations to train, such as "
            "6,1,3 7,1,2, or all")
        add("--top", type=at_least(0), default=3, help="how many of the best of each search to "
            "train; default 3")
        add("--runs", type=at_least(1), default=3, help="seeds of each, from --seed up; default 3")
        add("--max-macs", type=multiply_adds, default=math.inf, help="multiply-adds of the most "
            "expensive candidate, such as 60M; default: no limit")
    args = parse(__doc__, options)
    folder = args.out / "retrain"
    finished_runs(folder, args.settings)  # refused now, since decoding images may take long
    refuse_to_lose(args.out / "retrain.json", folder, args.out / "single")
    named = parse_configs(args.config, args)  # refused now, as well
    space = pooling_configs(args.layers, args.scales)
    late = "6,1,3 7,1,2" if len(space) == 36 else ",".join(map(str, space[2 * len(space) // 3]))
    nothing = UserError(f"{args.out} holds no search of these images and this network: name "
                        f"candidates, as in --config {late}, or run search_supernet.py first")
    others = [path for path in visible_files(args.out, "*.json") if path.stem not in NO_SEARCHES]
    if not args.config and not gather(others)[0]:
        raise nothing
    data = load_for_training(args)
    finished_runs(folder, args.settings)  # and again, now that the images are known
    searches = gather(load_searches(args))[0]  # the first rank's; each may have a disk of its own
    if not args.config and not searches:
        raise nothing

    described = describe(space, args, len(data[2]))
    macs = {config: d["macs"] for config, d in zip(space, described)}
    if args.max_macs < min(macs.values()):
        raise UserError(f"--max-macs {args.max_macs:.4g} is below the cheapest configuration, "
                        f"{min(macs.values()):.4g}")
    why = candidates(searches, args, macs)
    if len(why) == 1 and args.default not in named:
        lonely = (f"nothing is left to compare with the default, {config_text(args.default)}: name "
                  f"candidates, as in --config {late}")
        if args.max_macs < math.inf:
            raise UserError(f"{lonely}, or raise --max-macs")
        print(lonely)  # the searches chose nothing; who runs all stages in turn goes on
    listed = ", ".join(f"{config_text(config)} ({reason})" for config, reason in why.items())
    print(f"retraining {listed}")
    single = finished_runs(args.out / "single", args.settings, refuse=False)
    known = single | finished_runs(folder, args.settings)
    wanted = [(config, seed) for seed in range(args.seed, args.seed + args.runs) for config in why]
    train_all([key for key in wanted if key not in known][RANK::WORLD], data, args, folder, macs)

    runs = single | finished_runs(folder, args.settings)
    runs = {key: run for key, run in runs.items() if key[0] in why}
    if RANK == 0:
        found = write_trained(args, "retrain", data, runs, lambda config: {"why": why[config]})
        if gains_of(found):
            save_picture(args.out / "retrain.png", draw_gains, found)
        print(f"\naccuracy on {found['n_test']} test images, %")
        show_trained(found)


if __name__ == "__main__":
    run_main(main)
