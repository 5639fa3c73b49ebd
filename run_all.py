"""The experiments of Royer & Lampert, "A Flexible Selection Scheme for Minimum-Effort Transfer
Learning", WACV 2020: every method on one transfer scenario, on several, or on all.

    python run_all.py --target sketch --ratio 20                  # one scenario, all methods
    python run_all.py --target svhn occluded --ratio 3 30         # four scenarios
    python run_all.py --target art --ratio 20 --methods flex ft-all --runs 3 --data DIR
    python run_all.py --list                                      # all scenarios, and their data
    torchrun --nproc-per-node 8 run_all.py --image-to-image --table 1 3 4 --figures figures

Every result is a file in results/, written when it is done. What is there is not run again: an
interrupted command goes on where it stopped, and tables and figures can be had once more.
"""

import argparse
import contextlib
import copy
import ctypes
import hashlib
import io
import json
import math
import os
import re
import runpy
import shutil
import statistics
import sys
import tempfile
import time
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cache, partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from secrets import token_hex

import numpy as np
import torch
from torch import nn

import flextune
import models
import shifts
from flextune import Result, Selection, Settings, Task

# ---------------------------------------------------------------- scenarios and published figures
#
# Table 2's accuracy of the source network on each target (QuickDraw's of Table 3), and the first
# units in the order of their proxies' validation accuracy, fast-flex's at each ratio and then
# faster-flex's, of the unpublished supplement (authors' code). A digit is a unit, a to d are units
# 10 to 13, and 0 is the source network itself. (PACS's source was tuned on PACS photos before.)
TARGETS = """
    mnist blurry .748 34012 32401 32401 32401 32140 32410 32401 32401
    mnist occluded .581 32410 32140 32140 32140 32410 32410 32410 32410
    mnist mnist-m .439 32140 32140 32140 31204 32140 32140 32140 32140
    mnist transform-random .322 32140 32410 32410 32410 32140 32410 32410 32410
    mnist svhn .211 31240 32140 32140 31420 32140 32140 32140 31240
    mnist transform-fixed .160 32140 32140 32140 32140 32140 32140 32140 32140
    cifar noisy .540 21354 21435 21456 24165 21354 21534 23514 23541
    cifar blurry .324 25436 25436 24536 23564 15423 52143 54231 25431
    cifar quickdraw .291 45362 54632 54632 54637 54132 54326 54316 54361
    quickdraw blurry .19 21367 13506 21340 21607 14253 12345 12340 12305
    quickdraw noisy .63 56473 54673 56743 56740 52361 54632 54673 56473
    quickdraw cifar .20 54167 54361 54367 43657 54136 52436 54263 54362
    ilsvrc yuv .841 27105 2750c 2705c 72a80 27580 27501
    ilsvrc hsv .384 24789 24783 24735 2738b 27489 24785
    ilsvrc rotation .743 785a9 68794 68975 98a73 8679a 89765
    ilsvrc scaling-symmetric .519 8759a 85749 85764 8793a 8759a 8759a
    ilsvrc scaling-stretch .440 867a3 87654 8675a 876a3 867a5 876a3
    ilsvrc art .532 478bc 27845 78659 3ad01 97ad0 6879a
    ilsvrc cartoon .346 96b82 bc685 b987c 936d5 b6987 97c8b
    ilsvrc sketch .142 65ab7 45973 9b753 678c2 65473 bc694
"""
TARGETS = {  # (source, target): (accuracy, orders)
    (source, target): (float(figure), orders)
    for source, target, figure, *orders in map(str.split, TARGETS.strip().splitlines())
}
SELECTIONS = ("flex", "fast-flex", "faster-flex")
PROXIES = SELECTIONS[1:]  # the methods that look at proxies
BASELINES = ("ft-fc-1", "ft-fc-2", "ft-ss", "ft-all")
# Test accuracies of Table 3.
PUBLISHED = """ratio  flex  fast  faster  fc-1  fc-2  ss  all
    mnist blurry             30  .926 .926 .926 .921 .928 .928 .921
    mnist occluded           30  .806 .806 .801 .785 .801 .792 .806
    mnist mnist-m            30  .683 .683 .671 .615 .670 .675 .683
    mnist svhn               30  .669 .669 .572 .451 .595 .657 .669
    mnist transform-random   30  .644 .644 .644 .573 .638 .624 .625
    mnist transform-fixed    30  .908 .887 .879 .839 .875 .866 .887
    cifar blurry             20  .577 .577 .512 .444 .501 .569 .577
    cifar noisy              20  .624 .624 .624 .583 .597 .618 .621
    cifar quickdraw          20  .518 .517 .517 .475 .525 .495 .501
    quickdraw blurry         20  .642 .631 .560 .426 .468 .707 .631
    quickdraw noisy          20  .801 .801 .795 .788 .792 .805 .801
    quickdraw cifar          20  .424 .424 .401 .333 .347 .388 .424
    ilsvrc yuv               12  .893 .893 .893 .835 - .699 .808
    ilsvrc hsv               12  .856 .856 .856 .533 - .646 .687
    ilsvrc scaling-stretch   12  .724 .696 .696 .502 - .584 .653
    ilsvrc scaling-symmetric 12  .770 .757 .757 .663 - .650 .716
    ilsvrc rotation          12  .826 .832 .812 .667 - .652 .771
    ilsvrc art                2  .669 .703 .655 .626 - .630 .628
    ilsvrc cartoon            2  .639 .683 .593 .618 - .647 .507
    ilsvrc sketch             2  .625 .606 .414 .554 - .581 .337
    ilsvrc art               20  .870 .851 .861 .729 - .849 .724
    ilsvrc cartoon           20  .912 .893 .841 .820 - .887 .709
    ilsvrc sketch            20  .852 .638 .638 .766 - .801 .542
    ilsvrc art              200  .906 .906 .823 .791 - .887 .746
    ilsvrc cartoon          200  .958 .956 .952 .868 - .956 .925
    ilsvrc sketch           200  .924 .924 .890 .767 - .916 .875"""
PUBLISHED = {
    (source, target, int(ratio), method): float(figure)
    for source, target, ratio, *figures in map(str.split, PUBLISHED.splitlines()[1:])
    for method, figure in zip(SELECTIONS + BASELINES, figures)
    if figure != "-"
}
TABLE_4 = {  # AP@10 of RETRIEVAL's methods; the paper does not say at which ratio
    "yuv": (0.80, 0.75, 0.85),
    "hsv": (0.47, 0.52, 0.85),
    "art": (0.66, 0.80, 0.88),
    "cartoon": (0.53, 0.83, 0.86),
    "sketch": (0.39, 0.85, 0.86),
}
RETRIEVAL = ("ft-fc-1", "ft-all", "flex")
TALLY = "flex 60, fast-flex 41, ft-all 26"  # of 72, section 5.2


@dataclass(frozen=True)
class Family:
    """A line of Table 2: targets of a source that share a network and a protocol."""

    network: str
    build: Callable[[], nn.Sequential]
    ratios: tuple[int, ...]  # images per class, about; the largest is the whole pool
    tuning: Settings  # but for what depends on the ratio and on the command line
    steps: tuple[tuple[int, int, int], ...]  # by ratio, the smallest first: see `protocol`
    pretraining: Settings
    epochs: int | None = None  # of pretraining, to the last state; None: stop early, at the best
    weights: Callable[[Path], nn.Sequential] | None = None  # reads a network pretrained elsewhere
    files: tuple[str, ...] = ()  # what it reads, as shifts.DATASETS names it
    code: tuple[bytes, ...] = ()  # of the file that --network names
    head: Callable[[nn.Sequential], nn.Sequential] = copy.copy  # what becomes of its last layer
    built_in: dict = field(default_factory=dict)  # what is other on built-in data
    left_out: tuple[str, ...] = ()  # methods that the paper does not run here

    def protocol(self, ratio: int) -> tuple[int, int, int]:
        """Batch size, most epochs, steps between validations: of this ratio, or the next below."""
        return self.steps[max(sum(ratio >= other for other in self.ratios) - 1, 0)]


# When a training ends is ours (Settings.patience): the authors' ends at the first validation worse
# than the one before by .0025 (PACS .025), and its last state is kept.
MNIST = Family(
    network="4-layer",
    build=models.mnist_net,
    ratios=(3, 30, 300, 3000),
    tuning=Settings(lr=1e-4),  # authors' code; section 5.1 has 1e-3
    steps=((16, 1000, 20), (32, 500, 50), (32, 100, 500), (32, 25, 4000)),  # authors' code
    pretraining=Settings(lr=1e-4, batch_size=50),  # authors' code
    epochs=13,  # authors' code: 12.5, that is 6,250 steps
)
CIFAR = Family(
    network="7-layer",
    build=models.cifar_net,
    ratios=(2, 20, 200, 2000),
    tuning=Settings(lr=1e-3),  # section 5.1; the authors' code does not say
    steps=MNIST.steps,  # not published
    pretraining=Settings(lr=1e-3, batch_size=50, max_epochs=50, check_every=3, patience=3),
    built_in={
        "build": partial(models.cifar_net, width=0.25),
        "pretraining": Settings(lr=1e-3, max_epochs=10),
    },
)
ILSVRC = Family(
    network="Inception2",
    build=partial(models.inception2, classes=6, width=0.25),  # on built-in data alone
    ratios=(2, 12, 25),  # Table 2; the authors' code takes .01, .5 and 1 of the pool
    tuning=Settings(lr=1e-4, top_k=5),  # section 5.1; the authors' code stops by top-1
    steps=((8, 2000, 100), (8, 1000, 150), (8, 150, 800)),  # authors' code for PACS
    pretraining=Settings(lr=1e-3, max_epochs=9, check_every=1, batch_statistics=True),
    weights=lambda root: models.load_inception2(root / "inception2.npz"),
    files=("inception2",),
    built_in={"tuning": Settings(lr=1e-3, patience=3), "steps": ((32, 300, 20),) * 3},
    left_out=("ft-fc-2",),  # it has a single fully connected unit (section 5.1)
)
GREY = partial(models.cifar_net, channels=1)
NARROW = CIFAR.built_in | {"build": partial(GREY, width=0.25)}
QUICKDRAW = replace(CIFAR, build=GREY, built_in=NARROW)
PACS = replace(ILSVRC, ratios=(2, 20, 200), tuning=Settings(lr=1e-4), head=models.pacs_head)
FAMILIES = {"mnist": MNIST, "cifar": CIFAR, "quickdraw": QUICKDRAW, "ilsvrc": ILSVRC}
SCENARIOS = {pair: PACS if pair[1] in shifts.PACS else FAMILIES[pair[0]] for pair in TARGETS}


def comparable(scenario: tuple) -> bool:
    """Is it (see `grouped`) the paper's network on real data?"""
    source, target, _, data, network = scenario
    return data == "real" and network == SCENARIOS[source, target].network


def paper(scenario: tuple, method: str) -> float | None:
    """The test accuracy that the paper published for a scenario, if it did."""
    source, target, ratio, *_ = scenario
    figures = PUBLISHED | {(source, target, ratio, "source"): TARGETS[source, target][0]}
    return figures.get((source, target, ratio, method)) if comparable(scenario) else None


def supplement(scenario: tuple, method: str) -> list[int]:
    """The first units in the paper's order of the proxies of fast-flex or faster-flex, or []."""
    source, target, ratio, *_ = scenario
    places = product(PROXIES, SCENARIOS[source, target].ratios)
    order = dict(zip(places, TARGETS[source, target][1])).get((method, ratio), "")
    return [int(unit, 16) for unit in order if unit != "0" and comparable(scenario)]


# ---------------------------------------------------------------- running and recording


def image_to_image(target: str) -> type[nn.Module]:
    """The image-to-image unit for a target: special where the kind of shift is known."""
    if target.startswith(("transform-", "scaling-", "rotation")):
        return models.SpatialTransformer
    return models.Pixelwise if target in ("yuv", "hsv") else models.UNet


def flex_i2i(task: Task, target: str) -> Selection:
    """Algorithm 1 with one more candidate, 0: a unit before N, and nothing else tuned (5.4)."""
    unit = seeded(partial(image_to_image(target), task.train[0].shape[1]), task.settings.seed)
    net = nn.Sequential(unit, *task.net)
    before = flextune.fine_tune(Task(net, task.train, task.val, task.settings, task.report), 1)
    tuned = flextune.flex(task).tuned | {0: replace(before, units=(0,))}
    best = max(tuned, key=lambda unit: tuned[unit].accuracy)  # of equals, a part of N
    return Selection(chosen=best, best=best, tuned=tuned)


def source(task: Task) -> Result:
    """The source network as it is."""
    return Result(
        net=task.net,
        units=(),
        accuracy=task.source_accuracy,
        best_epoch=0,
        epochs=0,
        seconds=0,
        history=[(0, task.source_accuracy)],
        num_trained=0,
    )


METHODS = {
    "source": source,
    "ft-fc-1": partial(flextune.ft_fc, n=1),
    "ft-fc-2": partial(flextune.ft_fc, n=2),
    "ft-ss": flextune.ft_ss,
    "ft-all": flextune.ft_all,
    "flex": flextune.flex,
    "fast-flex": flextune.fast_flex,
    "faster-flex": flextune.faster_flex,
}


def retrieval(
    source_net: nn.Sequential,
    tuned_net: nn.Sequential,
    gallery: shifts.Data,
    queries: shifts.Data,
    k: int = 10,
) -> float:
    """Mean AP@k of target `queries`, as `tuned_net` sees them, in a `gallery` of source images.

    Of a query's k nearest images (Euclidean distance of `features`; ties go to the first) those of
    its class are relevant. AP@k is the sum of P(i) over the ranks i of relevant images / min(k, R),
    where P(i) is the share of relevant images among the nearest i, and R the number of relevant
    images in the gallery; 0 if there are none. Gallery labels may be negative: no query's class.
    """
    gallery_features = features(source_net, gallery[0])  # (G, D)
    gallery_labels = gallery[1]
    query_features = features(tuned_net, queries[0])  # (N, D)
    total = 0.0
    for query, y in zip(query_features.split(256), queries[1].split(256)):
        exact = "donot_use_mm_for_euclid_dist"
        distance = torch.cdist(query, gallery_features, compute_mode=exact)  # (B, G)
        nearest = distance.sort(stable=True).indices[:, :k].cpu()  # (B, k)
        relevant = (gallery_labels[nearest] == y[:, None]).double()  # (B, k)
        precision = relevant.cumsum(1) / torch.arange(1, relevant.shape[1] + 1)  # (B, k)
        num_relevant = (gallery_labels == y[:, None]).sum(1)  # (B)
        total += ((precision * relevant).sum(1) / num_relevant.clamp(1, k)).sum().item()
    return total / len(queries[1])


def features(net: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """The input of the last unit, a map averaged over its pixels: [N, D]."""
    outputs = flextune.run_units(net, x, stop=-1)
    if outputs.dim() == 4:
        return outputs.mean((2, 3))
    return outputs.flatten(1)


def print_progress(text: str) -> None:
    """Print a line of progress to stderr. On a terminal it replaces the one before."""
    if sys.stderr is None:  # it is closed
        return
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns
        print(f"\r{text[: width - 1]}\x1b[K", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


# Under torchrun every rank runs this program. The ranks take the work piece by piece from counters
# in torchrun's store. Rank 0 downloads before, and prints after. When torchrun starts all ranks
# again, the store still has the keys of the attempt before: keys begin with the attempt's number.

TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ
RANK, RANKS = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE")) if TORCHRUN else (0, 1)


@cache
def store():
    from torch.distributed import PrefixStore, rendezvous

    common, *_ = next(rendezvous("env://"))
    common.set_timeout(timedelta(days=30))
    return PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], common)


def reached(point: str) -> None:
    """Wait until all ranks are at this point of the program."""
    if RANKS > 1:
        store().set(f"{point} {RANK}", "")
        store().wait([f"{point} {rank}" for rank in range(RANKS)])


def shared(what: str, steps: int) -> Iterator[int]:
    """The numbers below `steps`, each in one rank only: whichever is free takes the next."""
    if RANKS == 1:
        yield from range(steps)
    else:
        while (step := store().add(what, 1) - 1) < steps:
            yield step


class Progress:
    """On rank 0's standard error: what is under way, and about how long all of it takes.

    On a terminal it is one line. Elsewhere a step begins a line, then comes one in ten seconds.
    """

    def __init__(self, *costs: float):
        self.costs, self.step, self.title = costs, 0, ""  # of each step; in any unit
        self.start = self.printed = time.perf_counter()

    def begin(self, step: int, title: str) -> None:
        self.step, self.printed = step, -math.inf
        self.title = f"[{step + 1}/{len(self.costs)}] {title}"
        self(0, "")

    def __call__(self, part: float, text: str) -> None:
        """`part` of the present step, from 0 to 1, is done."""
        now, stream = time.perf_counter(), sys.stderr
        done = sum(self.costs[: self.step]) + part * self.costs[self.step]
        left = (now - self.start) * (sum(self.costs) / done - 1) / 60 if done else 0
        line = ", ".join(filter(None, [self.title, text]))
        if not RANK and stream and (stream.isatty() or now - self.printed > 10):
            print_progress(line + (f"; all: about {left:.0f} min" if left else ""))
            self.printed = now


@dataclass(frozen=True)
class Run:
    """A scenario-run: the methods on one draw of the training images."""

    pair: tuple[str, str]  # source, target
    ratio: int
    root: Path | None  # of the real data; None: the built-in ones
    network: int  # the seed of the source network
    settings: Settings  # with the seed of the draw, but for how often it is validated
    methods: tuple[str, ...]
    family: Family
    searched: tuple[str, ...] = ()  # the methods that retrieve images, for Table 4

    def title(self) -> str:
        return f"{' -> '.join(self.pair)}, ratio {self.ratio}, seed {self.settings.seed}"

    def source(self) -> tuple:
        """What the source network depends on."""
        return self.pair[0], self.family.head, self.root, self.network

    def head(self, method: str) -> dict:
        """What a result begins with, and is known by."""
        data = "real" if self.root else "built-in"
        names = "source", "target", "ratio", "data", "network", "source_network", "seed", "method"
        values = self.ratio, data, self.family.network, self.network, self.settings.seed, method
        return dict(zip(names, (*self.pair, *values)))

    def path(self, method: str, out: Path) -> Path:
        """The file of a result: named by its head, and by its settings on whichever device."""
        key = md5(as_row(self.settings), self.family.protocol(self.ratio), *self.family.code)[:8]
        return out / f"{'_'.join(map(str, self.head(method).values()))}_{key}.json"

    def task(self, net: nn.Sequential, domain, report: Callable | None = None) -> Task:
        """The draw of training images, validated as often as the family's protocol says."""
        (_, _, steps), seed = self.family.protocol(self.ratio), self.settings.seed
        train = shifts.subsample(domain["pool"], self.ratio, self.family.ratios[-1], seed)
        epochs = max(1, round(steps / math.ceil(len(train[1]) / self.settings.batch_size)))
        settings = replace(self.settings, check_every=epochs)
        return Task(net, train, domain["val"], settings, report)

    def cost(self) -> float:
        """About how long it takes, for the time left: only the proportions of runs matter."""
        trainings = 12 if "flex" in self.methods else len(self.methods)  # about: flex has most
        image = {"4-layer": 1, "7-layer": 10}.get(self.family.network, 300 if self.root else 6)
        return trainings * image * (self.ratio + 100)  # to validate takes as long as ratio 100


def as_row(settings: Settings) -> dict:
    """What of the settings makes a result another one."""
    others = ("device", "cache_bytes", "augment", "loss")  # the last two are no options here
    return {name: value for name, value in vars(settings).items() if name not in others}


def md5(*parts) -> str:
    """The checksum of tensors, and of anything else as text."""
    digest = hashlib.md5(usedforsecurity=False)
    for part in parts:
        if isinstance(part, torch.Tensor):
            digest.update(part.contiguous().numpy())
            part = part.shape
        digest.update(str(part).encode())
    return digest.hexdigest()


def write(path: Path, content: bytes) -> None:
    """The whole file or none. Raises OSError."""
    part = path.with_name(f"{path.name}.{token_hex(4)}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_row(path: Path) -> dict | None:
    """A result as it was written; None if there is none, or a broken one."""
    with contextlib.suppress(Exception):  # a broken file may raise anything
        row = json.loads(path.read_bytes())
        return row if row.pop("md5") == md5(json.dumps(row)) else None


def read_network(path: Path) -> dict | None:
    """The state of a network as it was written; None if there is none, or a broken one."""
    with contextlib.suppress(Exception), zipfile.ZipFile(path) as file:
        if not any(part.compress_type for part in file.infolist()):  # else it could fill the memory
            kept = torch.load(path, weights_only=True)
            return kept["net"] if kept["md5"] == md5(*kept["net"], *kept["net"].values()) else None


def execute(run: Run, net: nn.Sequential, domain, images, args, progress: Callable) -> None:
    """The methods of a scenario-run, each with its result written to args.out.

    `images` gives a source's validation images.
    """

    def report(text: str) -> None:
        """Called in the loop below: `task` and `method` are those of the present training."""
        num_trainings = len(net) + 6  # of all methods together, about
        progress(len(task.results) / num_trainings, f"{method}, {text}")

    task = run.task(net, domain, report)
    test = domain["test"]
    methods = METHODS | {"flex-i2i": partial(flex_i2i, target=run.pair[1])}
    accuracy = cache(partial(flextune.accuracy, data=test, top_k=run.settings.top_k))

    def record(result: Result) -> dict:
        row = {"val": result.accuracy, "test": accuracy(result.net)} | vars(result)
        return {name: value for name, value in row.items() if name not in ("net", "accuracy")}

    for method in run.methods:
        choice = methods[method](task)
        result = choice.result if isinstance(choice, Selection) else choice
        row = run.head(method) | {"images": len(task.train[1]), "settings": as_row(task.settings)}
        row["names"] = [flextune.label(net, unit) for unit in range(1, len(net) + 1)]
        row |= record(result)
        if isinstance(choice, Selection):
            trainings = list(choice.tuned.values())
            if choice.one_epoch:
                trainings.append(choice.one_epoch)
            row |= {
                "epochs": sum(training.epochs for training in trainings),
                "seconds": sum(training.seconds for training in trainings),
                "chosen": str(choice.chosen),
                "best": str(choice.best),
                "tied": [str(unit) for unit in choice.tied],
                "proxies": choice.proxies,
                "candidates": {unit: record(one) for unit, one in choice.tuned.items()},
            }
            if method == "flex":
                row["certainty"] = flextune.certainty(task, choice)
            if method == "flex-i2i":
                row["pairs"] = image_pairs(choice.tuned[0].net[0], test[0][:4])
        if method in run.searched:
            x, y = images(run.pair[0], run.root)
            gallery = x, gallery_labels(run.pair, run.root, y)
            row["retrieval"] = retrieval(task.net, result.net, gallery, test)
        write(run.path(method, args.out), json.dumps(row | {"md5": md5(json.dumps(row))}).encode())
        if args.save and method == ("flex" if "flex" in run.methods else run.methods[-1]):
            write(args.save, saved(result.net.state_dict()))


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A new network, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build()


@torch.no_grad()
def image_pairs(unit: nn.Module, x: torch.Tensor) -> dict:
    """Images [N, channels, H, W] before and after an image-to-image unit, for a JSON file."""
    before = x.to(next(unit.parameters()).device) / 255
    pairs = torch.stack([before, unit(before).clamp(0, 1)], 1).flatten(0, 1)
    side = min(64, pairs.shape[2])
    pairs = nn.functional.interpolate(pairs, (side, side), mode="bilinear", antialias=True)
    pixels = (pairs * 255).round().byte().permute(0, 2, 3, 1).cpu().contiguous().numpy()
    return {"shape": [len(x), 2, *pixels.shape[1:]], "hex": pixels.tobytes().hex()}


def source_network(run: Run, args) -> nn.Sequential:
    """The source network: read, or trained once on the source's images and then kept in --out."""
    family, name = run.family, run.pair[0]
    if run.root and family.weights:
        return family.head(family.weights(run.root)).to(memory_format=torch.channels_last)
    domain, net = shifts.load(name, None, run.root), seeded(family.build, run.network)
    settings = replace(family.pretraining, seed=run.network, device=args.device)
    data, weights = (*domain["source"], *domain["val"]), net.state_dict().values()
    parts = *weights, as_row(settings), family.epochs, *data, *family.code
    path = args.out / f"{name}-{md5(*parts)}.pt"
    net = net.to(memory_format=torch.channels_last)  # 1.1 to 1.7 times as fast
    if (state := read_network(path)) is None:
        progress = Progress(1)
        progress.begin(0, f"pretraining on {name}")
        task = Task(net, domain["source"], domain["val"], settings, partial(progress, 0))
        state = flextune.fine_tune(task, "all", family.epochs).net.cpu().state_dict()
        write(path, saved({"net": state, "md5": md5(*state, *state.values())}))
        print_progress("")
    net.load_state_dict(state)
    own = flextune.accuracy(net, domain["test"], settings.top_k)
    print(f"{name}: {family.network} network, {own:.3f} on its own test images")
    return net


def saved(content: dict) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def gallery_labels(pair: tuple[str, str], root: Path | None, y: torch.Tensor) -> torch.Tensor:
    """The labels of the source's images: of ILSVRC's for PACS the classes of its head, or -1."""
    if not root or pair[1] not in shifts.PACS:
        return y
    rows = torch.full((1000,), -1)
    rows[list(models.PACS_ROWS.values())] = torch.arange(len(models.PACS_ROWS))
    return rows[y]


def literal(task: Task, units: list[int], epochs: int | None = None):
    """`flextune.fine_tune` as anyone would write it: the whole network in every step. The tests
    compare ours with it. Returns (network, accuracy, epochs)."""
    net, settings, last = copy.deepcopy(task.net), task.settings, epochs or task.settings.max_epochs
    tuned = nn.ModuleList(net[unit - 1] for unit in units).requires_grad_(True)
    optimizer = torch.optim.Adam(tuned.parameters(), lr=settings.lr)
    order, best, stale = torch.Generator().manual_seed(settings.seed), -1.0, 0
    x, y = flextune.prepare_batch(net, task.train[0]), task.train[1]
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        for epoch in range(1, last + 1):
            for module in tuned.train().modules():
                module.training &= not isinstance(module, nn.BatchNorm2d)
            for batch in torch.randperm(len(y), generator=order).split(settings.batch_size):
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
                optimizer.step()
            if epoch % settings.check_every and epoch < last:
                continue
            a = task.accuracy(net.eval())
            stale = 0 if epochs or a > best else stale + 1
            if not stale:
                best, state = a, copy.deepcopy(net.state_dict())
            elif stale == settings.patience:
                break
    net.load_state_dict(state)
    return net, best, epoch


def run_benchmark(runs: list[Run], args) -> None:
    """flex by the literal loop and by ours, by turns: what each takes and what it gives."""
    for run in runs:
        net, domain = source_network(run, args), shifts.load(*run.pair, run.root)
        print(f"\n{run.title()}, flex: seconds, and validation accuracies of the candidates")
        for _ in range(3):
            task, start = run.task(net, domain), time.perf_counter()
            units = *([unit] for unit in flextune.candidates(net)), [*range(1, len(net) + 1)]
            theirs = [literal(task, mine)[1] for mine in units]
            middle = time.perf_counter()
            ours = [one.accuracy for one in flextune.flex(task).tuned.values()]
            times = middle - start, time.perf_counter() - middle
            for name, seconds, all_ in zip(("literal", "ours"), times, (theirs, ours)):
                print(f"{name:7} {seconds:8.1f} ", *(f"{a:.4f}" for a in all_))
            print(f"{times[0] / times[1]:.2f} times as fast")


# ---------------------------------------------------------------- tables

BUILT_IN = "BUILT-IN DATA: drawn by shifts.py, no figure compares with the paper's"
DATA = {"real": "real data", "built-in": BUILT_IN}
Groups = dict[tuple, dict[str, list[dict]]]


def grouped(rows: list[dict]) -> Groups:
    """The result rows, by scenario and by method: all that tables and figures are made of."""
    groups = defaultdict(lambda: defaultdict(list))
    for row in rows:
        scenario = tuple(row[n] for n in ("source", "target", "ratio", "data", "network"))
        groups[scenario][row["method"]].append(row)
    return groups


def by_network(groups: Groups, title: str) -> Iterator[Groups]:
    """The scenarios of each network, its name and kind of data printed below the title."""
    parts = defaultdict(dict)
    for scenario, methods in groups.items():
        source, _, _, data, network = scenario
        top_k = next(iter(methods.values()))[0]["settings"]["top_k"]
        parts[f"{source}, {network} network, top-{top_k}, {DATA[data]}"][scenario] = methods
    for kind, part in parts.items():
        print(f"\n{title}, {kind}")
        yield part


def average(rows: list[dict], name: str = "test") -> float:
    return statistics.mean(row[name] for row in rows)


def mean(rows: Iterable[dict], name: str) -> str:
    """The mean over the rows that have it, and of several the standard deviation."""
    values = [row[name] for row in rows if name in row]
    spread = f" \u00b1 {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}" if values else "-"


def print_columns(table: list[list[str]], left: int) -> None:
    """The columns side by side, the first `left` of them aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*table)]
    for line in table:
        cells = [cell.rjust(width) for cell, width in zip(line, widths)]
        cells[:left] = [cell.ljust(width) for cell, width in zip(line[:left], widths)]
        print("  ".join(cells).rstrip())


def print_scenario(scenario: tuple, methods: dict[str, list[dict]]) -> None:
    """The tables of one scenario: its methods, its units, and how sure flex is."""
    source, target, ratio, data, _ = scenario
    rows = [row for mine in methods.values() for row in mine]
    first, runs = rows[0], len({row["seed"] for row in rows})
    numbered = {str(number): name for number, name in enumerate(first["names"], 1)}
    print(f"\n{source} -> {target}, ratio {ratio}: {first['images']} training images", end=", ")
    print(f"{runs} run{'s' * (runs > 1)}, top-{first['settings']['top_k']} accuracy\n{DATA[data]}")
    known = comparable(scenario)
    table = [["method", "validation", "test", "epochs", "seconds", *["paper"] * known, ""]]
    for method, mine in methods.items():
        worse = any(row["val"] < row["history"][0][1] for row in mine)  # in a run or more
        notes = ["below the source"] * worse + ["diverged"] * any(row["diverged"] for row in mine)
        costs = f"{average(mine, 'epochs'):.0f}", f"{average(mine, 'seconds'):.1f}"
        theirs = [str(paper(scenario, method) or "not published")] * known
        accuracies = mean(mine, "val"), mean(mine, "test")
        table.append([method, *accuracies, *costs, *theirs, ", ".join(notes)])
    print_columns(table, left=1)
    if any("candidates" in row for row in rows):
        print_units(rows, {"0": "0 image-to-image", **numbered, "all": "all"}, runs)
    for method in PROXIES:
        if method in methods and (order := supplement(scenario, method)):
            best = ", ".join(numbered[str(unit)] for unit in order[:4])
            print(f"best proxies of {method} in the paper's supplement: {best}, ...")
    if flex := [row["certainty"] for row in methods.get("flex", ())]:
        lead, error, bound = (average(flex, name) for name in ("lead", "standard_error", "bound"))
        print(f"flex's choice leads the next by {lead:.3f} \u00b1 {error:.3f} on the", end=" ")
        print(f"validation set (there, with probability 95%, all are within {bound:.3f})")
        if ties := sum(len(row["tied"]) > 1 for row in methods["flex"]):
            print(f"it is tied in {ties} of {runs} runs: the smallest unit is taken")


def print_units(rows: list[dict], candidates: dict[str, str], runs: int) -> None:
    """A line for each candidate: its accuracies, and which algorithms chose it (how often)."""
    table = [["unit", "validation", "test", *(f"proxy ({m})" for m in PROXIES), "chosen by"]]
    proxies = [[row["proxies"] for row in rows if row["method"] == m] for m in PROXIES]
    for unit, name in candidates.items():
        tuned = {
            row["seed"]: row["candidates"][unit]
            for row in rows
            if unit in row.get("candidates", ())
        }
        found = [mean(tuned.values(), "val"), mean(tuned.values(), "test")]
        found += [mean(mine, unit) for mine in proxies]
        chosen = Counter(row["method"] for row in rows if row.get("chosen") == unit)
        how_often = (m + f" ({n} of {runs})" * (runs > 1) for m, n in chosen.items())
        if {*found} != {"-"}:  # else there is nothing to show
            table.append([name, *found, ", ".join(how_often)])
    print()
    print_columns(table, left=len(table[0]))


FORMULAS = {  # Table 1, of L, E_one c_one, E_all c_all and c_all
    "flex": ("L E_one c_one + E_all c_all", lambda n, one, whole, epoch: n * one + whole),
    "fast-flex": ("E_one c_one + E_all c_all", lambda n, one, whole, epoch: one + whole),
    "faster-flex": ("E_one c_one + c_all", lambda n, one, whole, epoch: one + epoch),
    "ft-fc-1": ("E_one c_one", lambda n, one, whole, epoch: one),
    "ft-all": ("E_all c_all", lambda n, one, whole, epoch: whole),
}


def print_table_1(groups: Groups) -> None:
    """Per network: what each method cost, in the mean of all runs, and by the formula."""
    for part in by_network(groups, "Table 1"):
        rows = {m: [row for mine in part.values() for row in mine.get(m, ())] for m in FORMULAS}
        pairs = [pair for row in rows["flex"] for pair in row["candidates"].items()]
        ones = [one for unit, one in pairs if unit != "all"]
        alls = [one for unit, one in pairs if unit == "all"]
        e_one, e_all = average(ones, "epochs"), average(alls, "epochs")
        one, whole = average(ones, "seconds"), average(alls, "seconds")
        n, c_all = len(ones) // len(alls), whole / e_all
        print(f"L = {n}, E_one = {e_one:.1f} epochs, c_one = {one / e_one:.3f} s", end=", ")
        print(f"E_all = {e_all:.1f} epochs, c_all = {c_all:.3f} s")
        table = [["method", "formula", "by formula, s", "epochs", "measured, s"]]
        for method, (formula, cost) in FORMULAS.items():
            if mine := rows[method]:
                measured = average(mine, "epochs"), average(mine, "seconds")
                costs = cost(n, one, whole, c_all), *measured
                table.append([method, formula, *(f"{cost:.1f}" for cost in costs)])
        print_columns(table, left=2)


def print_table_3(groups: Groups) -> None:
    """Test accuracy of each method, its deviation over the runs, and where the paper published
    figures, those and the gap. How often each method is best, and the first proxy the paper's."""
    for part in by_network(groups, "Table 3, test accuracy"):
        present = {method for methods in part.values() for method in methods}
        columns = [m for m in ("source", *SELECTIONS, *BASELINES) if m in present]
        table, best, first = [["target, ratio (runs)", *columns]], Counter(), defaultdict(list)
        for scenario, rows in part.items():
            source, target, ratio, *_ = scenario
            runs = {m: [row["test"] for row in rows[m]] for m in columns if m in rows}
            ours = {m: round(statistics.mean(a), 3) for m, a in runs.items()}
            theirs = {m: a for m in columns if (a := paper(scenario, m))}
            baselines = {*BASELINES} - {*SCENARIOS[source, target].left_out}
            spread = {m: f"{statistics.stdev(a):.3f} " for m, a in runs.items() if len(a) > 1}
            name = f"{target}, {ratio} ({max(map(len, runs.values()))})"
            lines = {name: marked(ours, baselines), "  deviation": spread}
            if len(theirs) > 1:
                common = ours.keys() & theirs.keys()
                lines["  paper"] = marked(theirs, baselines)
                lines["  difference"] = {m: f"{ours[m] - theirs[m]:+.3f} " for m in common}
            for name, line in lines.items():
                if line:
                    table.append([name, *(line.get(m, "") for m in columns)])
            highest = max(a for m, a in ours.items() if m != "source" or len(ours) == 1)
            best.update(m for m in ours if ours[m] == highest)
            for method in PROXIES:
                order = supplement(scenario, method)
                if order and (proxies := [row["proxies"] for row in rows.get(method, ())]):
                    unit = max(proxies[0], key=partial(average, proxies))
                    first[method].append(int(unit) == order[0])
        print_columns(table, left=1)
        print("* better than every baseline (ft-)")
        print(f"best in how many of {len(part)} scenarios, ties counting for each:", end=" ")
        print(", ".join(f"{m} {best[m]}" for m in columns if best[m]), f"(paper, of 72: {TALLY})")
        for method, same in first.items():
            print(f"{method}: the best proxy is the supplement's in {sum(same)} of {len(same)}")


def marked(figures: dict[str, float], baselines: set[str]) -> dict[str, str]:
    """Accuracies, with a star where a selection method beats all baselines, if these are there."""
    to_beat = max(figures.get(m, 1) for m in baselines)
    return {m: f"{a:.3f}" + " *"[m in SELECTIONS and a > to_beat] for m, a in figures.items()}


def print_table_4(groups: Groups) -> None:
    """AP@10 of the target's test images in the source's validation images."""
    for part in by_network(groups, "Table 4, mean AP@10"):
        table = [["target, ratio", *RETRIEVAL]]
        for scenario, methods in part.items():
            _, target, ratio, *_ = scenario
            found = (mean(methods.get(m, ()), "retrieval") for m in RETRIEVAL)
            table.append([f"{target}, {ratio}", *found])
            if comparable(scenario) and target in TABLE_4 and ratio in (12, 20):
                table.append(["  paper", *(f"{a:.2f}" for a in TABLE_4[target])])
        print_columns(table, left=1)
        print("- was not run, or the source's images are not there")


# ---------------------------------------------------------------- figures


def canvas(width: float, height: float, rows: int = 1, columns: int = 1):
    """A figure of matplotlib's, in inches, and its axes [rows, columns]."""
    os.environ.pop("MPLBACKEND", None)  # a notebook's, which is not needed and may not be there
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def figures_1(groups: Groups):
    """For each target: accuracies of each candidate, a line per ratio, flex's pick marked."""
    targets = defaultdict(dict)
    for (source, target, ratio, data, network), methods in groups.items():
        targets[source, target, data, network][ratio] = methods["flex"]
    for (source, target, data, network), ratios in targets.items():
        figure, ((axes,),) = canvas(7, 4)
        for number, (ratio, rows) in enumerate(ratios.items()):
            *units, _ = candidates = [*rows[0]["candidates"]]
            names = [*(rows[0]["names"][int(unit) - 1] for unit in units), "all"]
            for split, line in (("test", "--"), ("val", "-")):
                a = [average([row["candidates"][u] for row in rows], split) for u in candidates]
                axes.plot(names, a, line, color=f"C{number}", label=f"{split}, ratio {ratio}")
            place = candidates.index(statistics.mode(row["chosen"] for row in rows))
            axes.plot(place, a[place], "v", color="blue", markersize=9)
        axes.set(title=f"{source} → {target}, {network}, {data} data", ylabel="accuracy")
        axes.tick_params(axis="x", rotation=45)
        figure.legend(title="▼ flex's pick", fontsize="small", loc="outside right upper")
        yield f"figure-1-{source}-{target}-{network}-{data}", figure


def ranks_and_picks(groups: Groups) -> dict:
    """Figure 2: by (source, network, data), and by target, the units' ranks and the picks.

    The units are ranked by test accuracy at each ratio, from 0 for the worst, and the ranks summed.
    `picks` has for each method the columns, from 0, that it chose in most runs of a ratio. Of
    fast-flex that is before its line 10. The column after the last unit is "all".
    """
    panels = defaultdict(dict)
    for (source, target, _, data, network), methods in groups.items():
        *units, _ = columns = [*methods["flex"][0]["candidates"]]
        nothing = dict.fromkeys(units, 0), {method: set() for method in SELECTIONS}
        sums, picks = panels[source, network, data].setdefault(target, nothing)
        tests = {u: average([row["candidates"][u] for row in methods["flex"]]) for u in units}
        sums.update({u: sums[u] + sum(a > b for b in tests.values()) for u, a in tests.items()})
        for method in SELECTIONS:
            name = "best" if method == "fast-flex" else "chosen"
            if mine := methods.get(method):
                picks[method].add(columns.index(statistics.mode(row[name] for row in mine)))
    return panels


def figures_2(groups: Groups):
    """For each network and target: the units' ranks as shades, and the picks as triangles."""
    panels = ranks_and_picks(groups)
    figure, axes = canvas(7, 3 * len(panels), len(panels))
    for ((source, network, data), targets), (ax,) in zip(panels.items(), axes):
        ranks, picks = zip(*targets.values())
        shades = [np.array([*sums.values(), 0]) / max(1, *sums.values()) for sums in ranks]
        ax.imshow(shades, cmap="Greys", vmin=0, vmax=1.5, aspect="auto")
        for place, (method, color) in enumerate(zip(SELECTIONS, ("blue", "green", "red"))):
            at = [(x + place / 4 - 0.25, y) for y, mine in enumerate(picks) for x in mine[method]]
            name = method + " (line 7)" * (method == "fast-flex")
            ax.plot([x for x, _ in at], [y for _, y in at], "^", color=color, label=name)
        ax.set_yticks(range(len(targets)), targets)
        ax.set_xticks(range(len(ranks[0]) + 1), [*ranks[0], "all\n(no rank)"])
        ax.set_title(f"{source}, {network} network, {data} data (darker: better)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    yield "figure-2", figure


def figures_3(groups: Groups):
    """For each target, at its largest ratio: images before and after the image-to-image unit."""
    last = {(*s[:2], s[3]): m["flex-i2i"][0] for s, m in groups.items() if "flex-i2i" in m}
    if not last:
        return
    figure, axes = canvas(7.2, 1.1 * len(last), len(last), 4)
    for ((source, target, data), row), line in zip(last.items(), axes):
        images = np.frombuffer(bytes.fromhex(row["pairs"]["hex"]), np.uint8)
        for ax, pair in zip(line, images.reshape(row["pairs"]["shape"])):  # [2, H, W, channels]
            ax.imshow(np.concatenate([*pair], 1).squeeze(), cmap="gray", vmin=0, vmax=255)
            ax.set_axis_off()
        title = f"{source} → {target}, ratio {row['ratio']}, {data} data: before, after unit 0"
        line[0].set_title(title, fontsize="x-small", loc="left")
    yield "figure-3", figure


# ---------------------------------------------------------------- command line

TABLES = {1: print_table_1, 3: print_table_3, 4: print_table_4}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message}; see --help")


def whole(text: str, least: int = 1) -> int:
    if not text.isdecimal() or len(text) > 5 or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a whole number from {least} to 99999")
    return int(text)


def network(text: str) -> tuple[str, Callable[[], nn.Sequential], bytes]:
    """The name and the function of FILE.py:FUNCTION, and what is in the file."""
    file, _, function = text.rpartition(":")
    try:
        code, build = Path(file).read_bytes(), runpy.run_path(file)[function]
        flextune.check_units(build())
    except Exception as error:
        what = "must be FILE.py:FUNCTION, whose function gives an nn.Sequential of units"
        raise argparse.ArgumentTypeError(f"{what} ({error!r})") from error
    return f"{Path(file).stem}.{function}", build, code


def device(text: str) -> str:
    try:
        name = torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError("must be cpu, cuda or cuda:N") from error
    if name.type == "cuda" and (name.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"there is no {text} on this machine")
    return text


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    (sources, targets), zero = map(dict.fromkeys, zip(*SCENARIOS)), partial(whole, least=0)

    def add(name, help, **options):
        options = {"metavar": "X", **options} if options else {"action": "store_true"}
        parser.add_argument(name, help=help, **options)

    add("--source", f"default: that of the targets; {' '.join(sources)}", choices=sources)
    add("--target", "target domains (--list); default: all", nargs="+", choices=targets)
    add("--ratio", "images per class, about (a share); default: all", nargs="+", type=whole)
    add("--methods", f"default: all, {' '.join(METHODS)}", nargs="+", choices=METHODS)
    add("--runs", "draws of the images; default: 20 at the smallest ratio, else 1", type=whole)
    add("--seed", "of the first run, the next ones count up from it", type=zero, default=0)
    add("--source-networks", "that the runs take by turns; default: 1", type=whole, default=1)
    add("--max-epochs", "end every fine-tuning after so many epochs", type=whole)
    add("--bfloat16", "fine-tune with bfloat16 products, faster where there are units for them")
    add("--cache-gib", "memory for outputs of frozen units; default: 2", type=zero, default=2)
    add("--network", "FILE.py:FUNCTION that gives another nn.Sequential of units", type=network)
    add("--image-to-image", "flex also with an image-to-image unit before the network")
    add("--table", "default: 3, if no --target", nargs="+", type=int, choices=TABLES, default=[])
    add("--figures", "folder to draw the paper's figures in (needs matplotlib)", type=Path)
    add("--data", "folder of real data, or builtin; default: data/, else built-in", type=str)
    add("--device", "cpu, cuda or cuda:N; default: CUDA where there is one", type=device)
    add("--out", "folder of the results; default: results", type=Path, default=Path("results"))
    add("--save", "train, and write the network of flex, or else the last method", type=Path)
    add("--list", "show all scenarios, and their data")
    add("--benchmark", "time flex against the literal algorithm")
    return parser.parse_args(argv)


def scenarios(args) -> list[tuple[str, str]]:
    """The (source, target) pairs asked for. Raises ValueError."""
    pairs = [pair for pair in SCENARIOS if args.source in (None, pair[0])]
    for name in args.target or ():
        sources = [source for source, target in pairs if target == name]
        if not sources:
            raise ValueError(f"{args.source} has no target {name}: see --list")
        if len(sources) > 1 and not args.list:
            raise ValueError(f"target {name} needs --source: {' or '.join(sources)}")
    pairs = [pair for pair in pairs if not args.target or pair[1] in args.target]
    for pair in pairs:
        largest = SCENARIOS[pair].ratios[-1]
        if max(args.ratio or [0]) > largest:
            raise ValueError(f"--ratio: the largest of {' -> '.join(pair)} is {largest}")
    if args.data not in (None, "builtin") and not Path(args.data or "-").is_dir():
        raise ValueError(f"--data: there is no folder {args.data}; for the drawn images: builtin")
    runs = [run for pair in pairs for run in runs_of(pair, Path(), args)]
    if args.save and (len(runs) > 1 or args.save.exists() and not args.save.is_file()):
        raise ValueError("--save: name a file, and one --target, one --ratio and --runs 1")
    if args.benchmark and (args.save or args.figures or args.table):
        raise ValueError("--benchmark keeps nothing: leave out --save, --figures and --table")
    if (args.figures or 1 in args.table) and "flex" not in (args.methods or METHODS):
        raise ValueError("--figures and --table 1 need flex among the --methods")
    if args.figures and not find_spec("matplotlib"):
        raise ValueError("--figures needs matplotlib: pip install matplotlib")
    return pairs


def print_scenarios(pairs: list[tuple[str, str]], data: str | None) -> None:
    table = [["source", "network", "target", "ratios", "accuracy", "data"]]
    for source, target in pairs:
        family, found = SCENARIOS[source, target], []
        for name in [*shifts.needs(source, target), *family.files]:
            there = shifts.DATASETS[name].is_complete(Path(data or "data"))
            found.append(f"{name} {'there' if there else 'missing'}")
        found = ["built-in images"] if data == "builtin" else found
        ratios, accuracy = " ".join(map(str, family.ratios)), f"top-{family.tuning.top_k}"
        table.append([source, family.network, target, ratios, accuracy, ", ".join(found)])
    print_columns(table, left=len(table[0]))


def plan(pairs: list[tuple[str, str]], args) -> list[Run]:
    """All scenario-runs asked for. Data are looked for only where something is to be run."""
    runs, root = [], None if args.data == "builtin" else Path(args.data or "data")
    for pair in pairs:
        mine = runs_of(pair, root, args)
        if root and any(missing(run, args) for run in mine):
            names = [*shifts.needs(*pair), *mine[0].family.files]
            try:
                shifts.provide(names, root, partial(Progress(1), 0))
            except shifts.MissingError as error:
                if args.data:
                    raise
                print(f"{'*' * 99}\n{' -> '.join(pair)}: {error}.\n{BUILT_IN}\n{'*' * 99}")
                mine = runs_of(pair, None, args)
        runs += mine
    return runs


def runs_of(pair: tuple[str, str], root: Path | None, args) -> list[Run]:
    """The scenario-runs of a scenario that are asked for, with their data in `root`."""
    family, runs = SCENARIOS[pair], []
    family = family if root else replace(family, **family.built_in)
    if args.network:
        name, build, code = args.network
        if family.weights and not root:
            raise ValueError("--network: in the place of Inception2 it needs real data (--data)")
        weights = family.weights and (lambda root: build())
        family = replace(family, network=name, build=build, weights=weights, files=(), code=(code,))
    asked = args.methods or METHODS.keys() - family.left_out
    methods = tuple(m for m in METHODS if m in asked) + ("flex-i2i",) * args.image_to_image
    # Images to search are the source's: PACS can be run without those of ILSVRC.
    there = not root or pair[0] != "ilsvrc" or shifts.DATASETS["ilsvrc"].is_complete(root)
    searched = RETRIEVAL if there and 4 in args.table else ()
    networks = 1 if root and family.weights else args.source_networks  # only one can be read
    for ratio in sorted(set(args.ratio or family.ratios)):
        batch_size, most, _ = family.protocol(ratio)
        for number in range(args.runs or (20 if ratio <= family.ratios[0] else 1)):
            settings = replace(
                family.tuning,
                batch_size=batch_size,
                max_epochs=min(most, args.max_epochs or most),
                seed=args.seed + number,
                device=args.device,
                cache_bytes=args.cache_gib << 30,
                bfloat16=args.bfloat16,
            )
            source = number % networks
            runs.append(Run(pair, ratio, root, source, settings, methods, family, searched))
    return runs


def missing(run: Run, args) -> tuple[str, ...]:
    """The methods of a run without a result, with one of an older program, or without Table 4's
    figure."""
    rows = {m: read_row(run.path(m, args.out)) or {} for m in run.methods}
    # "num_trained" had another name in results of an older program.
    wanted = {m: "retrieval" if m in run.searched else "num_trained" for m in run.methods}
    return tuple(m for m in run.methods if args.save or wanted[m] not in rows[m])


def run_scenarios(pairs: list[tuple[str, str]], args) -> None:
    """Run what has no result yet, in this rank's share, and show all results."""
    for folder in filter(None, (args.out, args.figures, args.save and args.save.parent)):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # it is better found now than after the training
    if RANK:  # rank 0 downloads, then the others see what is there
        reached("planned")
    runs = plan(pairs, args)
    if RANK == 0:
        reached("planned")
    if args.benchmark:
        return run_benchmark(runs, args)
    left = [missing(run, args) for run in runs]
    if done := left.count(()):
        print(f"{done} of {len(runs)} runs have results in {args.out} (for others: --out, --seed)")
    sources = {run.source(): run for run, methods in zip(runs, left) if methods}
    network = cache(lambda key: source_network(sources[key], args))
    images = cache(lambda source, root: shifts.load(source, None, root)["val"])
    for number in shared("sources", len(sources)):
        network([*sources][number])
    reached("pretrained")
    progress = Progress(*(run.cost() * bool(methods) for run, methods in zip(runs, left)))
    loaded = None
    for number in shared("runs", len(runs)):
        run = replace(runs[number], methods=missing(runs[number], args))
        if run.methods:
            progress.begin(number, run.title())
            if loaded != (run.pair, run.root):
                domain, loaded = None, (run.pair, run.root)  # one in memory at a time
                domain = shifts.load(*run.pair, run.root, partial(progress, 0))
            execute(run, network(run.source()), domain, images, args, progress)
    print_progress("")
    reached("finished")
    if RANK == 0:
        rows = [read_row(run.path(m, args.out)) for run in runs for m in run.methods]
        if None in rows:
            raise OSError(f"a result in {args.out} is gone since it was written: run this again")
        show(grouped(rows), args)


def show(groups: Groups, args) -> None:
    """The scenarios of a --target each by itself, the tables and figures asked for."""
    for scenario, methods in groups.items() if args.target else ():
        print_scenario(scenario, methods)
    for table in args.table or [3] * (not args.target):
        TABLES[table](groups)
    for draw in (figures_1, figures_2, figures_3) if args.figures else ():
        for name, figure in draw(groups):
            figure.savefig(args.figures / f"{name}.png", dpi=150)
            print(args.figures / f"{name}.png")
    print(f"\nevery figure, candidate and history: {args.out}/*.json")
    if args.save:
        print(f"the network is in {args.save}")


def main(argv: list[str] | None = None) -> None:
    with contextlib.suppress(AttributeError, OSError, TypeError):
        # Keep freed memory: to get it anew in every step takes a third of a small network's time.
        ctypes.CDLL(None).mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        ctypes.CDLL(None).mallopt(-1, -1)  # M_TRIM_THRESHOLD
    torch.backends.cudnn.deterministic = True  # on CUDA: the same seed gives the same result
    if TORCHRUN and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # a sum depends on the threads: the same for any number of ranks
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # where "\u00b1" cannot be encoded, it is "?"
    status, problem, args = 2, "", None
    try:
        args = parse(argv)
        if args.device in (None, "cuda") and torch.cuda.is_available() and RANKS > 1:
            args.device = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
        with contextlib.redirect_stdout(None) if RANK else contextlib.nullcontext():
            pairs = scenarios(args)
            print_scenarios(pairs, args.data) if args.list else run_scenarios(pairs, args)
        print(end="", flush=True)  # what cannot be printed is found here
    except KeyboardInterrupt:
        status, problem = 130, "interrupted; finished runs are in the folder of results"
    except (OSError, MemoryError, RuntimeError, ValueError) as error:
        notes = getattr(error, "__notes__", [])  # which unit was tuned
        message = " ".join(str(error).split())  # in one line
        problem = ", ".join([f"error: {message}", *notes])
        if args and re.search("out ?of ?memory|allocate|MemoryError|a primitive", repr(error)):
            problem = f"error: out of memory: try less than --cache-gib {args.cache_gib}"
        elif type(error) is RuntimeError and not (args and args.network):
            raise
    if problem:
        print_progress("")
        print(f"run_all.py: {problem}", file=sys.stderr)
        flush_or_close_stdout()
        sys.exit(status)


def flush_or_close_stdout() -> None:
    """Write what was printed; what cannot be written is dropped.

    Otherwise the interpreter would try again at its end and exit with another status.
    """
    try:
        print(end="", flush=True)
    except OSError:
        sys.stdout = None


if __name__ == "__main__":
    main()
