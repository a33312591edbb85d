"""Stage 4, the answer: what each search chose, trained from scratch beside the default, with several seeds.

    python retrain.py                               # CIFAR-10: the default and the best of each search in --out
    python retrain.py --runs 5                      # more seeds of each: smaller errors
    python retrain.py --config 5,3,2 7,1,2          # further configurations beside them
    torchrun --nproc_per_node=4 retrain.py          # four trainings at a time, each on the GPU of its number

Reads the scores of every search in --out (seeds of one search are averaged) and the runs of single.json that were
trained the same way. A search chose on training images, so no test image took part in the choice, and all of them are
reported. Weights go to the folder `retrain`; what is there is not trained again. Writes retrain.json.

Paper: Javan, Toews, Pedersoli, AutoML 2023, arXiv 2306.11982, section 5.
"""
import json
import math

import numpy as np

from common import (RANK, SAME, WORLD, UserError, at_least, check_settings, config_text, default_config, describe,
                    gather, load_json, parse, pooling_configs, print_table, run_main, say, settings_of, write_results)
from train_single import check_runs, finished_runs, load_for_training, parse_configs, summarise, train_network

TRAINED = ["configuration", "M multiply-adds", "val acc", "test acc", "deviation", "runs", "gain", "error, seeds",
           "error, images", "why"]


def load_searches(args, settings):
    """The searches in --out: {names of the files: {configuration: mean score of the seeds}}, a key for each setting.

    A JSON that is no search of these images is left alone, and one line says why."""
    groups = {}
    for path in sorted(args.out.glob("*.json")):
        if path.stem in ("single", "retrain", "propose"):
            continue
        try:
            search = load_json(path, "val_acc")
            check_settings(path, search.get("args", {}), {name: settings[name] for name in SAME})
            scores = {tuple(r["config"]): r["val_acc"] for r in search["results"]}
            if sorted(scores) != pooling_configs(args.layers, args.scales):
                raise UserError(f"{path} does not score the whole space")
        except UserError as error:
            say(f"left alone: {error}")
            continue
        setting = json.dumps([search.get("stage"), {**search["args"], "seed": None, "amp": None}], sort_keys=True)
        groups.setdefault(setting, []).append((path.name, scores))
    return {", ".join(name for name, _ in group): {config: np.mean([scores[config] for _, scores in group])
                                                   for config in group[0][1]} for group in groups.values()}


def known_runs(args, settings, stage):
    """The runs of `stage` with these settings: {(configuration, seed): run}. Says how many have others."""
    runs = finished_runs(args.out / stage)
    same = {key: run for key, run in runs.items() if run["args"] == settings}
    if len(same) < len(runs):
        say(f"{len(runs) - len(same)} runs in {args.out / stage} are left alone, trained with other settings")
    return same


def errors_of_gain(entry, base, images):
    """Standard errors of a gain in accuracy, as fractions: (of the seeds, of the number of test images).

    entry, base: as from `summarise`. Seeds: None with fewer than two runs of each. Images: as if each network had been
    tested on other images, so it is at most this."""
    both = entry, base
    seeds = [None if r["std"] is None else r["std"] ** 2 / len(r["runs"]) for r in both]
    sampling = [r["test_acc"] * (1 - r["test_acc"]) / images for r in both]
    return None if None in seeds else math.sqrt(sum(seeds)), math.sqrt(sum(sampling))


def trained_rows(data):
    """Rows of TRAINED from the content of retrain.json or propose.json: in the order of training, or the best first.

    Accuracies in %; gains over the default and their errors (`errors_of_gain`) in points."""
    def points(fraction, sign=""):
        return "-" if fraction is None else f"{100 * fraction:{sign}.2f}"
    rows, base = [], data["default"]
    for r in sorted(data["results"], key=lambda r: (r.get("order") or math.inf, -r["test_acc"])):
        gain, errors = None, [None, None]
        if base and r["config"] != base["config"]:
            gain, errors = r["test_acc"] - base["test_acc"], errors_of_gain(r, base, data["n_test"])
        rows.append([config_text(r["config"]), f"{r['macs'] / 1e6:.1f}", points(r.get("val_acc")),
                     points(r["test_acc"]), points(r["std"]), len(r["runs"]), points(gain, "+"), *map(points, errors),
                     r["why"]])
    return rows


def main():
    def options(add):
        add("--runs", type=at_least(1), default=3, help="seeds of each, from --seed up; default 3")
        add("--config", nargs="+", default=[], help="further configurations to train, such as 5,3,2 7,1,2, or all")
    args = parse(__doc__, options)
    usual, settings = default_config(args.layers, args.scales), settings_of(args)
    why = {usual: "default"}
    for names, scores in gather(load_searches(args, settings))[0].items():  # the first rank's, with a disk of its own
        best = max(scores, key=scores.get)
        why[best] = f"{why[best]}; {names}" if best in why else f"best of {names}"
    for config in parse_configs(args.config, args):
        why.setdefault(config, "--config")
    if len(why) == 1 and why[usual] == "default" and not args.config:
        raise UserError(f"{args.out} holds no search of these images and this network: run search_supernet.py "
                        f"or search_mixture.py first, or name configurations with --config")
    check_runs(args.out / "retrain", settings)
    say(f"retraining {', '.join(f'{config_text(config)} ({reason})' for config, reason in why.items())}")
    data = load_for_training(args)
    single = known_runs(args, settings, "single")
    runs = single | known_runs(args, settings, "retrain")
    wanted = [(config, seed) for seed in range(args.seed, args.seed + args.runs) for config in why]
    for config, seed in [key for key in wanted if key not in runs][RANK::WORLD]:
        train_network(config, seed, data, args, settings, args.out / "retrain")

    runs = {key: run for key, run in (single | finished_runs(args.out / "retrain")).items() if key[0] in why}
    results = [{**describe(config, args, len(data[2])), **entry, "why": why[config]}
               for config, entry in summarise(runs).items()]
    if RANK == 0:
        images = len(data[1].labels)
        found = write_results(args, "retrain", settings, data[2], results, "test_acc",
                              (len(data[0].labels), 0, images), sum(run["seconds"] for run in runs.values()),
                              table=False, history=[entry for run in runs.values() for entry in run["history"]])
        say(f"accuracy on {images} test images, %; gain over the default, points; its standard error by the seeds, and "
            f"by the number of test images (at most)")
        print_table(TRAINED[:2] + TRAINED[3:], [row[:2] + row[3:] for row in trained_rows(found)])  # none of val acc


if __name__ == "__main__":
    run_main(main)
