"""What this machine gives: images per second in training and in scoring, from the cheapest configuration to the most
expensive, and how much of the training time goes into waiting for data.

    python -m results.speed                                           # in the project's folder; about a minute
    python -m results.speed --device cpu --amp off --batch-size 64
    python -m results.speed --image-size 128                          # as for Food-101, behind a stem of stride 4

The images are random and lie in main memory, or on a GPU where a data set of their size would. One process.
"""
import itertools
import statistics
import time
import timeit
from argparse import RawDescriptionHelpFormatter
from functools import partial

import torch

from common import (Learner, Parser, ResNet20, Split, at_least, config_text, count_macs, default_config, pick_amp,
                    pick_device, pooling_configs, print_table, run_main, training_batches)


def main():
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto (default: cuda, then mps, then cpu) or a torch device")
    parser.add_argument("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto", help="mixed precision; "
                        "default auto, as in the scripts")
    parser.add_argument("--batch-size", type=at_least(2), default=128, help="images per step; default 128")
    parser.add_argument("--image-size", type=int, choices=[32, 64, 128], default=32, help="side of the images in "
                        "pixels; default 32")
    args = parser.parse_args()
    device, size = pick_device(args.device), args.batch_size
    amp = pick_amp(args.amp, device)
    count = max(4096, 8 * size)
    images = torch.randint(256, (count, args.image_size, args.image_size, 3), dtype=torch.uint8)
    data = Split(images.to(device), torch.arange(count) % 10)

    def clock():
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    def images_per_second(work):
        """Of a call that handles one batch: the median of five rounds of 0.2 s or more."""
        for _ in range(3):  # warms up; on CUDA the second call captures a graph
            work()
        timer = timeit.Timer(work, timer=clock)
        calls, _ = timer.autorange()
        return size * calls / statistics.median(timer.repeat(5, calls))

    ranked = sorted(pooling_configs(), key=count_macs)
    rows = []
    for config in sorted({*ranked[::9], ranked[-1], default_config()}, key=count_macs):
        learner = Learner(ResNet20(image_size=args.image_size), device, amp)
        feed = itertools.chain.from_iterable(training_batches(
            data.images, data.labels, size, device, seed) for seed in itertools.count())
        x, y = next(feed)
        training = images_per_second(lambda: learner.train(*next(feed), config, 1e-3))
        scoring = images_per_second(partial(learner.score, x, y, config))
        fetching = images_per_second(partial(next, feed))
        rows.append([config_text(config), f"{count_macs(config, image_size=args.image_size) / 1e6:.1f}",
                     f"{training:.0f}", f"{scoring:.0f}", f"{100 * training / fetching:.1f}"])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print(f"{name}, --amp {amp}, batch {size}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}")
    print_table(["configuration", "M multiply-adds", "training, images/s", "scoring, images/s", "waiting for data, %"],
                rows)


if __name__ == "__main__":
    run_main(main)
