"""The experiments of Royer & Lampert, "A Flexible Selection Scheme for Minimum-Effort Transfer
Learning", WACV 2020: every method on one transfer scenario, on several, or on all.

    python run_all.py --target sketch --ratio 20                  # one scenario, all methods
    python run_all.py --target svhn occluded --ratio 3 30         # four scenarios
    python run_all.py --target art --ratio 20 --methods flex ft-all --runs 3 --data DIR
    python run_all.py --list                                      # all scenarios, and their data
    torchrun --nproc-per-node 8 run_all.py --image-to-image --table 1 3 4 --figures figures

Results are appended to results/results.jsonl, a line per scenario, run and method. What is there
already is not run again, so a command that was interrupted goes on where it stopped, and tables
and figures can be had once more.
"""

import argparse
import base64
import contextlib
import copy
import ctypes
import hashlib
import io
import json
import math
import os
import pickle
import shutil
import statistics
import sys
import tempfile
import time
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from secrets import token_hex

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

import flextune
import models
import shifts
from flextune import Settings

# ---------------------------------------------------------------- scenarios


@dataclass(frozen=True)
class Family:
    """The targets of a source that share a network and a protocol (a line of Table 2)."""

    source: str
    targets: tuple[str, ...]
    ratios: tuple[int, ...]  # images per class, the smallest first
    network: str
    build: Callable[[], nn.Sequential]
    pretraining: Settings
    tuning: Settings
    weights: Callable[[Path], nn.Sequential] | None = None  # of real data: read, not trained
    built_in: dict = field(default_factory=dict, hash=False)  # what is other on built-in data
    cost: float = 1.0  # of an image in training, about, against the others': for the time left


SEVEN_LAYERS = {
    "ratios": (2, 20, 200, 2000),
    "network": "7-layer",
    "build": models.cifar_net,
    "pretraining": Settings(lr=1e-3, max_epochs=30),
    "tuning": Settings(lr=1e-3),
    "built_in": {"pretraining": Settings(lr=1e-3, max_epochs=10)},
    "cost": 5.0,
}
INCEPTION2 = {  # on built-in data a narrow network, on small images
    "network": "Inception2",
    "build": partial(models.inception2, classes=6, width=0.25),
    "pretraining": Settings(lr=1e-3, max_epochs=9, check_every=1, batch_statistics=True),
    "built_in": {"tuning": Settings(lr=1e-3, patience=3), "cost": 3.0},
    "cost": 400.0,
}
FAMILIES = (
    Family(
        source="mnist",
        targets=("blurry", "occluded", "mnist-m", "transform-random", "svhn", "transform-fixed"),
        ratios=(3, 30, 300, 3000),
        network="4-layer",
        build=models.mnist_net,
        pretraining=Settings(lr=1e-3, max_epochs=20),
        tuning=Settings(lr=1e-3),
    ),
    Family(
        source="cifar",
        targets=("noisy", "blurry", "quickdraw"),
        **SEVEN_LAYERS,
    ),
    Family(
        source="quickdraw",
        targets=("blurry", "noisy", "cifar"),
        **SEVEN_LAYERS,
    ),
    Family(
        source="ilsvrc",
        targets=("yuv", "hsv", "rotation", "scaling-symmetric", "scaling-stretch"),
        ratios=(2, 12, 25),
        tuning=Settings(lr=1e-4, top_k=5),
        weights=models.load_inception2,
        **INCEPTION2,
    ),
    Family(
        source="ilsvrc",
        targets=("art", "cartoon", "sketch"),
        ratios=(2, 20, 200),
        tuning=Settings(lr=1e-4),
        weights=lambda path: models.pacs_head(models.load_inception2(path)),
        **INCEPTION2,
    ),
)
SCENARIOS = {(family.source, target): family for family in FAMILIES for target in family.targets}


def family_of(pair: tuple[str, str], root: Path | None) -> Family:
    """The family of a scenario (source, target), with the data in `root` or built-in."""
    family = SCENARIOS[pair]
    return family if root else replace(family, **family.built_in)


BASELINES = {
    "ft-fc-1": partial(flextune.ft_fc, n=1),
    "ft-fc-2": partial(flextune.ft_fc, n=2),
    "ft-ss": flextune.ft_ss,
    "ft-all": flextune.ft_all,
}
SELECTIONS = {
    "flex": flextune.flex,
    "fast-flex": flextune.fast_flex,
    "faster-flex": flextune.faster_flex,
}
METHODS = {"source": flextune.source} | BASELINES | SELECTIONS


def flex_i2i(net, train, val, settings, tune, unit: nn.Module) -> flextune.Selection:
    """Algorithm 1 with one more candidate, 0: `unit` before N, and nothing else tuned (5.4)."""
    tuned = flextune.flex(net, train, val, settings, tune).tuned
    before = tune(nn.Sequential(unit, *net), 1, train, val, settings)
    tuned[0] = replace(before, units=(0,))
    best = max(tuned, key=lambda unit: tuned[unit].accuracy)  # of equals, a part of N
    return flextune.Selection(chosen=best, best=best, tuned=tuned)


def image_to_image(target: str) -> type[nn.Module]:
    """The image-to-image unit for a target: special where the kind of shift is known."""
    if target in ("yuv", "hsv"):
        return models.Pixelwise
    affine = target.startswith(("transform-", "scaling-")) or target == "rotation"
    return models.SpatialTransformer if affine else models.UNet


TABLE_2 = {  # test accuracy of the source network; for QuickDraw from Table 3
    ("mnist", "blurry"): 0.748,
    ("mnist", "occluded"): 0.581,
    ("mnist", "mnist-m"): 0.439,
    ("mnist", "transform-random"): 0.322,
    ("mnist", "svhn"): 0.211,
    ("mnist", "transform-fixed"): 0.160,
    ("cifar", "noisy"): 0.540,
    ("cifar", "blurry"): 0.324,
    ("cifar", "quickdraw"): 0.291,
    ("quickdraw", "blurry"): 0.19,
    ("quickdraw", "noisy"): 0.63,
    ("quickdraw", "cifar"): 0.20,
    ("ilsvrc", "yuv"): 0.841,
    ("ilsvrc", "hsv"): 0.384,
    ("ilsvrc", "rotation"): 0.743,
    ("ilsvrc", "scaling-symmetric"): 0.519,
    ("ilsvrc", "scaling-stretch"): 0.440,
    ("ilsvrc", "art"): 0.532,
    ("ilsvrc", "cartoon"): 0.346,
    ("ilsvrc", "sketch"): 0.142,
}
_SMALL = ("flex", "fast-flex", "faster-flex", "ft-fc-1", "ft-fc-2", "ft-ss", "ft-all")
_LARGE = tuple(method for method in _SMALL if method != "ft-fc-2")
TABLE_3 = {  # test accuracy of each method
    scenario: dict(zip(_LARGE if scenario[0] == "ilsvrc" else _SMALL, figures))
    for scenario, figures in {
        ("mnist", "blurry", 30): (0.926, 0.926, 0.926, 0.921, 0.928, 0.928, 0.921),
        ("mnist", "occluded", 30): (0.806, 0.806, 0.801, 0.785, 0.801, 0.792, 0.806),
        ("mnist", "mnist-m", 30): (0.683, 0.683, 0.671, 0.615, 0.670, 0.675, 0.683),
        ("mnist", "svhn", 30): (0.669, 0.669, 0.572, 0.451, 0.595, 0.657, 0.669),
        ("mnist", "transform-random", 30): (0.644, 0.644, 0.644, 0.573, 0.638, 0.624, 0.625),
        ("mnist", "transform-fixed", 30): (0.908, 0.887, 0.879, 0.839, 0.875, 0.866, 0.887),
        ("cifar", "blurry", 20): (0.577, 0.577, 0.512, 0.444, 0.501, 0.569, 0.577),
        ("cifar", "noisy", 20): (0.624, 0.624, 0.624, 0.583, 0.597, 0.618, 0.621),
        ("cifar", "quickdraw", 20): (0.518, 0.517, 0.517, 0.475, 0.525, 0.495, 0.501),
        ("quickdraw", "blurry", 20): (0.642, 0.631, 0.560, 0.426, 0.468, 0.707, 0.631),
        ("quickdraw", "noisy", 20): (0.801, 0.801, 0.795, 0.788, 0.792, 0.805, 0.801),
        ("quickdraw", "cifar", 20): (0.424, 0.424, 0.401, 0.333, 0.347, 0.388, 0.424),
        ("ilsvrc", "yuv", 12): (0.893, 0.893, 0.893, 0.835, 0.699, 0.808),
        ("ilsvrc", "hsv", 12): (0.856, 0.856, 0.856, 0.533, 0.646, 0.687),
        ("ilsvrc", "scaling-stretch", 12): (0.724, 0.696, 0.696, 0.502, 0.584, 0.653),
        ("ilsvrc", "scaling-symmetric", 12): (0.770, 0.757, 0.757, 0.663, 0.650, 0.716),
        ("ilsvrc", "rotation", 12): (0.826, 0.832, 0.812, 0.667, 0.652, 0.771),
        ("ilsvrc", "art", 2): (0.669, 0.703, 0.655, 0.626, 0.630, 0.628),
        ("ilsvrc", "cartoon", 2): (0.639, 0.683, 0.593, 0.618, 0.647, 0.507),
        ("ilsvrc", "sketch", 2): (0.625, 0.606, 0.414, 0.554, 0.581, 0.337),
        ("ilsvrc", "art", 20): (0.870, 0.851, 0.861, 0.729, 0.849, 0.724),
        ("ilsvrc", "cartoon", 20): (0.912, 0.893, 0.841, 0.820, 0.887, 0.709),
        ("ilsvrc", "sketch", 20): (0.852, 0.638, 0.638, 0.766, 0.801, 0.542),
        ("ilsvrc", "art", 200): (0.906, 0.906, 0.823, 0.791, 0.887, 0.746),
        ("ilsvrc", "cartoon", 200): (0.958, 0.956, 0.952, 0.868, 0.956, 0.925),
        ("ilsvrc", "sketch", 200): (0.924, 0.924, 0.890, 0.767, 0.916, 0.875),
    }.items()
}


TABLE_4 = {  # AP@10 in retrieval; the paper does not say at which ratio
    target: dict(zip(("ft-fc-1", "ft-all", "flex"), figures))
    for target, figures in {
        "yuv": (0.80, 0.75, 0.85),
        "hsv": (0.47, 0.52, 0.85),
        "art": (0.66, 0.80, 0.88),
        "cartoon": (0.53, 0.83, 0.86),
        "sketch": (0.39, 0.85, 0.86),
    }.items()
}
TALLY = {"flex": 60, "fast-flex": 41, "ft-all": 26}  # of 72, section 5.2


def paper(source: str, target: str, ratio: int, method: str) -> float | None:
    """The test accuracy that the paper published, if it did."""
    if method == "source":
        return TABLE_2[source, target]
    return TABLE_3.get((source, target, ratio), {}).get(method)


# ---------------------------------------------------------------- ranks
#
# Under torchrun every rank runs this program. Rank 0 plans, the ranks take the scenario-runs one
# by one from a common counter, and rank 0 prints.

TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ
RANK, RANKS = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE")) if TORCHRUN else (0, 1)


@cache
def store():
    """What the ranks have in common: torchrun's store of keys and values."""
    from torch.distributed.rendezvous import rendezvous

    common, *_ = next(rendezvous("env://"))
    common.set_timeout(timedelta(days=30))
    return common


def from_rank_0(make: Callable):
    """What `make()` gives in rank 0, in every rank."""
    if RANKS == 1:
        return make()
    if RANK == 0:
        store().set("plan", pickle.dumps(make()))
    return pickle.loads(store().get("plan"))


def wait_for_all(name: str) -> None:
    """Every rank comes here before any goes on."""
    if RANKS > 1:
        store().set(f"{name} {RANK}", "")
        store().wait([f"{name} {rank}" for rank in range(RANKS)])


def shared(steps: int) -> Iterator[int]:
    """The numbers below `steps`, each in one rank only: whichever is free takes the next."""
    if RANKS == 1:
        yield from range(steps)
    else:
        while (step := store().add("taken", 1) - 1) < steps:
            yield step


# ---------------------------------------------------------------- progress


class Progress:
    """On standard error: what is being done, and about how long the rest takes.

    On a terminal one line that is rewritten; elsewhere plain lines, one for each step and, in a
    long step, one each ten seconds. Of several ranks the first speaks for all.
    """

    def __init__(self, costs: list[float]):
        self.costs, self.done = costs, 0  # what each step takes, in any unit; steps done
        self.start = self.printed = time.perf_counter()
        self.terminal = sys.stderr.isatty()

    def show(self, text: str, part: float = 0.0) -> None:
        """Say what is under way; of the present step, `part` (0 to 1) is done."""
        if RANK:
            return
        now = time.perf_counter()
        done = sum(self.costs[: self.done]) + part * sum(self.costs[self.done :][:1])
        left = (now - self.start) * (sum(self.costs) / done - 1) if done else math.inf
        line = f"[{self.done}/{len(self.costs)}] {text}"
        if now - self.start > 2 and 0 < left < math.inf:
            line += f", about {duration(left)} left"
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{line[:width]}\x1b[K", end="", file=sys.stderr, flush=True)
        elif part == 0 or now - self.printed > 10:
            print(line, file=sys.stderr, flush=True)
            self.printed = now

    def step(self, text: str) -> None:
        """Say what has been done."""
        self.done += 1
        self.show(text)

    def part(self, text: str, done: int, total: int) -> None:
        """A `shifts.Report`."""
        self.show(text, done / max(total, done))


def clear_line() -> None:
    """Leave the line of the progress to other output."""
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Rounded for a reader: 45 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


# ---------------------------------------------------------------- running


@dataclass(frozen=True)
class Run:
    """A scenario-run: the methods on one draw of the training images."""

    pair: tuple[str, str]  # source, target
    ratio: int
    root: Path | None  # of the real data; None: the built-in ones
    settings: Settings  # with the seed
    methods: tuple[str, ...]

    @property
    def family(self) -> Family:
        return family_of(self.pair, self.root)

    def head(self, method: str) -> dict:
        """What a result row begins with, and is known by."""
        return {
            "source": self.pair[0],
            "target": self.pair[1],
            "ratio": self.ratio,
            "seed": self.settings.seed,
            "data": "real" if self.root else "built-in",
            "method": method,
            "settings": asdict(self.settings),
        }

    def trainings(self) -> list[float]:
        """About what each network costs that has to be fine-tuned; several methods share one."""
        last = len(unit_names(self.family))
        units = [*range(1, last + 1), "all"]
        needs = {
            "source": [],
            "ft-fc-1": [last],
            "ft-fc-2": ["last two"],
            "ft-ss": ["scales"],
            "ft-all": ["all"],
            "flex": units,
            "fast-flex": ["all", "fast"],
            "faster-flex": ["one epoch", "faster"],
            "flex-i2i": [*units, "image-to-image"],
        }
        needed = {network for method in self.methods for network in needs[method]}
        if {"flex", "flex-i2i"} & set(self.methods):
            needed -= {"fast", "faster"}
        return [self.family.cost * (self.ratio + 100)] * len(needed)  # 100: of the validations


class Once:
    """`fine_tune` that trains each network of a scenario-run once, whichever methods need it.

    The recorded epochs and seconds are charged to each method that uses the network (Table 1).
    """

    def __init__(self, net: nn.Sequential, progress: Progress, title: str):
        self.net, self.progress, self.title, self.results = net, progress, title, {}

    def __call__(self, net, units, train, val, settings, epochs=None):
        numbers = units if isinstance(units, list) else [units]
        if net is not self.net:  # two methods bring a network of their own
            numbers = ["ss"] if len(net) == len(self.net) else ["image-to-image"]
        name = "ft-" + "-".join(map(str, numbers)) + ", one epoch" * (epochs == 1)

        def report(epoch, accuracy):
            text = f"{self.title}: {name}, epoch {epoch}, validation {accuracy:.3f}"
            self.progress.show(text, min(0.9, epoch / settings.max_epochs))

        if name not in self.results:
            result = flextune.fine_tune(net, units, train, val, settings, epochs, report)
            self.results[name] = result
            self.progress.step(f"{self.title}: {name}, validation {result.accuracy:.3f}")
        return self.results[name]


RETRIEVAL = ("ft-fc-1", "ft-all", "flex")  # the methods of Table 4
DELTA = 0.05  # how improbable it is that a candidate is outside the bound of `certainty`


def execute(run: Run, net: nn.Sequential, domain, gallery, progress: Progress):
    """The methods of a scenario-run: its result rows, and the network of each.

    `gallery`: the source images that the methods of Table 4 are tried on, or None.
    """
    settings, (x, _) = run.settings, domain["test"]
    train = shifts.subsample(domain["pool"], run.ratio, settings.seed)
    title = f"{run.pair[1]}, ratio {run.ratio}, seed {settings.seed}"
    tune = Once(net, progress, title)
    test = cache(lambda net: flextune.accuracy(net, domain["test"], settings))
    unit = seeded(image_to_image(run.pair[1]), settings.seed)
    methods = METHODS | {"flex-i2i": partial(flex_i2i, unit=unit)}

    def record(result):
        fields = ("units", "epochs", "seconds", "trained", "diverged", "history")
        accuracies = {"val": result.accuracy, "test": test(result.net)}
        return accuracies | {field: getattr(result, field) for field in fields}

    rows, nets = [], {}
    for method in run.methods:
        progress.show(f"{title}: {method}")
        result = methods[method](net, train, domain["val"], settings=settings, tune=tune)
        row = run.head(method) | {"images": len(train[1])}
        if isinstance(result, flextune.Selection):
            choice, result = result, result.result
            row |= record(result) | {
                "epochs": choice.epochs,
                "seconds": choice.seconds,
                "chosen": str(choice.chosen),
                "best": str(choice.best),
                "proxies": {str(unit): a for unit, a in choice.proxies.items()},
                "candidates": {str(unit): record(one) for unit, one in choice.tuned.items()},
            }
            if method == "flex":
                sure = flextune.certainty(choice, domain["val"], settings, DELTA)
                row["certainty"] = asdict(sure) | {"runner_up": str(sure.runner_up)}
            if method == "flex-i2i":
                row["pairs"] = image_pairs(choice.tuned[0].net[0], x[:4])
        else:
            row |= record(result)
        if gallery and method in RETRIEVAL:
            queries = domain["test"]
            row["retrieval"] = flextune.retrieval(net, result.net, gallery, queries, settings)
        rows.append(row)
        nets[method] = result.net
    return rows, nets


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A new network, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build()


@torch.no_grad()
def image_pairs(unit: nn.Module, x: torch.Tensor) -> dict:
    """Images [N, 3, H, W] before and after an image-to-image unit, for a JSON file (Figure 3)."""
    before = x.to(next(unit.parameters()).device) / 255
    pairs = torch.stack([before, unit(before).clamp(0, 1)], 1).flatten(0, 1)
    if pairs.shape[2] > 64:
        pairs = nn.functional.interpolate(pairs, (64, 64), mode="bilinear", antialias=True)
    pixels = (pairs * 255).round().byte().permute(0, 2, 3, 1).cpu()  # (2N, H, W, 3)
    text = base64.b64encode(zlib.compress(pixels.numpy().tobytes())).decode()
    return {"shape": [len(x), 2, *pixels.shape[1:]], "zlib": text}


@cache
def unit_names(family: Family) -> list[str]:
    """The names of the source network's units, in order."""
    with torch.device("meta"):  # no weights, no random numbers
        return [name for name, _ in family.build().named_children()]


def methods_of(family: Family, asked: list[str] | None = None) -> list[str]:
    """The methods to run, in Table 3's order; of Inception2 the paper tunes one last unit alone."""
    without = {"ft-fc-2"} if family.network == "Inception2" else set()
    return [method for method in METHODS if method in (asked or METHODS.keys() - without)]


def source_network(family: Family, root: Path | None, out: Path, device: str | None):
    """The source network: read, or trained once on the source's images and then kept in `out`."""
    name = family.source
    if root and family.weights:
        path = root / "inception2.npz"
        print(f"{name}: {family.network}, weights from {path}")
        return family.weights(path)
    domain = shifts.load(name, None, root)
    net = seeded(family.build, 0)
    made_of = digest(net, family.pretraining, *domain["source"], *domain["val"])
    path = out / f"source-{name}-{'real' if root else 'builtin'}.pt"
    settings = replace(family.pretraining, device=device)
    state = kept_network(path, made_of)
    if state is None:
        progress = Progress([1])

        def report(epoch, accuracy):
            text = f"pretraining on {name}: epoch {epoch}, validation {accuracy:.3f}"
            progress.show(text, epoch / settings.max_epochs)

        data = domain["source"], domain["val"]
        state = flextune.fine_tune(net, "all", *data, settings, None, report).net.state_dict()
        clear_line()
        kept = {"made_of": made_of, "net": state, "md5": digest(made_of, *state, *state.values())}
        save(kept, path)
    net.load_state_dict(state)
    own = flextune.accuracy(net, domain["test"], settings)
    network = "narrow " * bool(family.weights) + family.network
    where = f"data in {root}" if root else "built-in data"
    print(f"{name}: {network} network, {own:.3f} on its own test images, {where}")
    return net


def kept_network(path: Path, made_of: str) -> dict | None:
    """The state in `path`, if it is of a network that was made of the same."""
    try:
        with zipfile.ZipFile(path) as file:
            if any(part.compress_type != zipfile.ZIP_STORED for part in file.infolist()):
                raise ValueError  # it may be any size when it is unpacked
        kept = torch.load(path, weights_only=True)
        state = kept["net"]
        if kept["md5"] != digest(kept["made_of"], *state, *state.values()):  # torch does not look
            raise ValueError
        return state if kept["made_of"] == made_of else None
    except FileNotFoundError:
        return None
    except Exception:  # noqa: BLE001 a broken file may raise anything
        print(f"{path} cannot be read: the source network is trained anew", file=sys.stderr)
        return None


def digest(*parts) -> str:
    """The MD5 of tensors, and of anything else as text."""
    md5 = hashlib.md5()
    for part in parts:
        if isinstance(part, torch.Tensor):
            md5.update(part.contiguous().numpy())
            part = part.shape
        md5.update(str(part).encode())
    return md5.hexdigest()


def has_gallery(run: Run) -> bool:
    """Are the source's validation images there? PACS can be run without ILSVRC, save for Table 4."""
    source, _ = run.pair
    return not run.root or source != "ilsvrc" or shifts.present(source, "yuv", run.root)[source]


def source_gallery(family: Family, root: Path | None) -> shifts.Data:
    """The source's validation images, of ILSVRC's for PACS with the classes of its head, or -1."""
    x, y = shifts.load(family.source, None, root, Progress([1]).part)["val"]
    if root and family.targets[0] in shifts.PACS:
        groups = torch.full((1000,), -1)
        for label, group in enumerate(models.PACS_GROUPS.values()):
            groups[list(group)] = label
        y = groups[y]
    return x, y


# ---------------------------------------------------------------- results
#
# Each rank appends to a file of its own, since not every file system lets several share one.


def append(rows: list[dict], out: Path) -> None:
    """Add those result rows that are new to this rank's file, all or none. Raises OSError."""
    path = out / f"results{f'-{RANK}' * (RANK > 0)}.jsonl"
    with open(path, "a+b", buffering=0) as file:
        lock(file)  # another sweep may use the folder, too
        known = read(out) if rows else {}
        new = [row for row in rows if not row.keys() <= known.get(key(row), {}).keys()]
        text = "".join(json.dumps(row | {"crc": crc(row)}) + "\n" for row in new).encode()
        before = file.seek(0, os.SEEK_END)
        file.seek(max(0, before - 1))
        if file.read(1) not in (b"", b"\n"):
            text = b"\n" + text  # after a line that was cut
        if file.write(text) < len(text):
            file.truncate(before)
            raise OSError(f"{path}: no space left for the results")


def lock(file) -> None:
    """Wait until no other process has locked the file, and lock it until it is closed."""
    with contextlib.suppress(ImportError, OSError):  # Windows, some network file systems
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)


def read(out: Path) -> dict[str, dict]:
    """All result rows, by `key`; those of the same key complete each other."""
    rows = {}
    for path in (*out.glob("results.jsonl"), *sorted(out.glob("results-[0-9]*.jsonl"))):
        broken = []
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            if not line:
                continue
            try:
                row = json.loads(line)
                if row.pop("crc") != crc(row):
                    raise ValueError
                rows[key(row)] = rows.get(key(row), {}) | row
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                broken.append(number)
        if broken:
            count = f"{len(broken)} line{'s' * (len(broken) > 1)}, the first is {broken[0]}"
            warn(f"{path}: not a result of this version, passed over: {count}")
    return rows


@cache
def warn(text: str) -> None:
    """Say it once."""
    print(text, file=sys.stderr)


def crc(row: dict) -> int:
    """What tells whether a row is as it was written."""
    return zlib.crc32(json.dumps(row, sort_keys=True).encode())


def key(row: dict) -> str:
    """What makes a result: its scenario-run, method and settings, on whichever device."""
    no_matter = {"device", "cache_bytes", "cuda_graph"}
    settings = {name: row["settings"][name] for name in row["settings"].keys() - no_matter}
    head = [row[name] for name in ("source", "target", "ratio", "seed", "data", "method")]
    return json.dumps([*head, settings], sort_keys=True)


def save(content, path: Path) -> None:
    """Write a file for `torch.load(path, weights_only=True)`, whole or not. Raises OSError."""
    part = path.with_name(f"{path.name}.{token_hex(4)}.part")
    buffer = io.BytesIO()
    torch.save(content, buffer)
    try:
        part.write_bytes(buffer.getbuffer())
        part.replace(path)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)


# ---------------------------------------------------------------- tables

BUILT_IN = "BUILT-IN DATA: drawn by shifts.py, no figure compares with the paper's"
Groups = dict[tuple, dict[str, list[dict]]]


def grouped(rows: list[dict]) -> Groups:
    """For each scenario (source, target, ratio, data): the rows of each method."""
    groups = defaultdict(lambda: defaultdict(list))
    for row in rows:
        scenario = row["source"], row["target"], row["ratio"], row["data"]
        groups[scenario][row["method"]].append(row)
    return groups


def by_network(groups: Groups) -> dict[tuple, Groups]:
    """The scenarios of each network, by (source, network, top-k, kind of data)."""
    parts = defaultdict(dict)
    for scenario, methods in groups.items():
        source, target, _, data = scenario
        (row, *_), *_ = methods.values()
        network = SCENARIOS[source, target].network
        parts[source, network, row["settings"]["top_k"], data][scenario] = methods
    return parts


def label(data: str) -> str:
    return "real data" if data == "real" else BUILT_IN


def average(rows: list[dict], field: str = "test") -> float:
    return statistics.mean(row[field] for row in rows)


def print_scenario(scenario: tuple, methods: dict[str, list[dict]]) -> None:
    """The tables of one scenario: means over its runs."""
    source, target, ratio, data = scenario
    names = unit_names(SCENARIOS[source, target])
    rows = [row for mine in methods.values() for row in mine]
    runs, first = len({row["seed"] for row in rows}), rows[0]
    print(f"\n{source} -> {target}, ratio {ratio}: {first['images']} training images", end=", ")
    print(f"{runs} run{'s' * (runs > 1)}, top-{first['settings']['top_k']} accuracy")
    print(label(data))
    print_methods(scenario, methods, names)
    if any("candidates" in row for row in rows):
        print_units(rows, names, runs)
    print_certainty([row for row in methods.get("flex", ()) if "certainty" in row], names)


def print_methods(scenario: tuple, methods: dict[str, list[dict]], names: list[str]) -> None:
    """A line for each method, with the paper's figure where the data are real."""
    *scenario, data = scenario
    table = [["method", "tuned", "validation", "test", "paper", "epochs", "seconds"]]
    for method, rows in methods.items():
        worse = any(row["val"] < row["history"][0][1] for row in rows)
        published = paper(*scenario, method)
        table.append(
            [
                method + "*" * worse + "!" * any(row["diverged"] for row in rows),
                tuned(rows, names),
                *(mean([row[key] for row in rows]) for key in ("val", "test")),
                f"{published:.3f}" if published else "not published",
                f"{average(rows, 'epochs'):.0f}",
                f"{average(rows, 'seconds'):.1f}",
            ]
        )
    if data != "real":
        table = [line[:4] + line[5:] for line in table]
    print_columns(table, left=2)
    marks = "".join(line[0][-2:] for line in table)
    if "*" in marks:
        print("* worse on the validation set than the source network, in a run or more")
    if "!" in marks:
        print("! diverged, in a run or more: its network is from before that")


def print_units(rows: list[dict], names: list[str], runs: int) -> None:
    """A line for each candidate: its accuracies, and which algorithms chose it (how often)."""
    columns = ("validation", "test", "proxy (fast-flex)", "proxy (faster-flex)")
    table = [["unit", *columns, "chosen by"]]
    for unit in ("0", *map(str, range(1, len(names) + 1)), "all"):
        found = {column: {} for column in columns}  # column: seed: accuracy
        chosen_by = Counter()
        for row in rows:
            method, seed = row["method"], row["seed"]
            if unit in row.get("proxies", ()):
                found[f"proxy ({method})"][seed] = row["proxies"][unit]
            # Algorithm 3 tunes all units for a single epoch: that is not ft-all.
            if unit in row.get("candidates", ()) and (unit, method) != ("all", "faster-flex"):
                found["validation"][seed] = row["candidates"][unit]["val"]
                found["test"][seed] = row["candidates"][unit]["test"]
            chosen_by[method] += row.get("chosen") == unit
        how_often = (f"{m}" + f" ({n} of {runs})" * (runs > 1) for m, n in chosen_by.items() if n)
        bars = (bar(list(by_seed.values()), runs) for by_seed in found.values())
        if unit != "0" or found["test"]:
            table.append([named(unit, names), *bars, ", ".join(how_often)])
    used = [column for column in zip(*table) if set(column[1:]) != {"-"}]
    print()
    print_columns([*zip(*used)], left=len(used))


def print_certainty(rows: list[dict], names: list[str]) -> None:
    """How sure flex's choice is: a line for each that it made, the mean of those runs."""
    choices = defaultdict(list)
    for row in rows:
        choices[row["chosen"], row["certainty"]["runner_up"]].append(row["certainty"])
    for units, runs in choices.items():
        chosen, other = (named(unit, names) for unit in units)
        lead = f"{average(runs, 'lead'):.3f} ± {average(runs, 'error'):.3f}"
        count = f" in {len(runs)} of {len(rows)} runs" * (len(rows) > 1)
        print(f"flex: {chosen} leads {other} by {lead}{count} (validation, paired standard error)")
    if rows:
        bound = f"{rows[0]['certainty']['bound']:.3f} of its validation accuracy"
        print(
            f"With probability {1 - DELTA:.0%}, each candidate's expected accuracy is within {bound}"
        )
        print("(Hoeffding's inequality, as if their epochs were not chosen on the same images).")


def named(unit: str, names: list[str]) -> str:
    """A candidate by number and name."""
    if unit == "all":
        return unit
    return f"{unit} {names[int(unit) - 1]}" if unit != "0" else "0 image-to-image"


def tuned(rows: list[dict], names: list[str]) -> str:
    """What a method tuned, by number and name; where its runs differ, each with how often."""

    def what(row):
        if row["method"] == "ft-ss":
            return f"{len(names)} {names[-1]}, scales"
        if len(row["units"]) == len(names):
            return "all"
        return ", ".join(named(str(unit), names) for unit in row["units"]) or "-"

    labels = Counter(map(what, rows)).most_common()
    return "; ".join(text + f" ({n})" * (len(labels) > 1) for text, n in labels)


def mean(values: list[float]) -> str:
    """The mean, and over several runs the standard deviation."""
    spread = f" \u00b1 {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def bar(values: list[float], runs: int) -> str:
    """The mean accuracy as a number and a bar, and of how many runs if not of all."""
    if not values:
        return "-"
    a = statistics.mean(values)
    return f"{a:.3f} {'#' * round(a * 12):.<12}" + f" ({len(values)})" * (len(values) < runs)


def print_columns(table: list[list[str]], left: int) -> None:
    """The columns side by side, the first `left` of them aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*table)]
    for line in table:
        cells = [
            f"{cell:<{width}}" if place < left else f"{cell:>{width}}"
            for place, (cell, width) in enumerate(zip(line, widths))
        ]
        print("  ".join(cells).rstrip())


# ---------------------------------------------------------------- the paper's tables

FORMULAS = {  # Table 1, of L, E_one c_one, E_all c_all and c_all
    "flex": ("L E_one c_one + E_all c_all", lambda n, one, whole, epoch: n * one + whole),
    "fast-flex": ("E_one c_one + E_all c_all", lambda n, one, whole, epoch: one + whole),
    "faster-flex": ("E_one c_one + c_all", lambda n, one, whole, epoch: one + epoch),
    "ft-fc-1": ("E_one c_one", lambda n, one, whole, epoch: one),
    "ft-all": ("E_all c_all", lambda n, one, whole, epoch: whole),
}


def print_table_1(groups: Groups) -> None:
    """Per network: what each method cost, and what the formula makes of E and c as measured.

    The mean over the scenarios, of each the mean over its runs.
    """

    def means(rows):
        return {field: average(rows, field) for field in ("epochs", "seconds")}

    for (source, network, _, data), part in by_network(groups).items():
        print(f"\nTable 1, {source}, {network} network, mean of {len(part)} scenarios")
        print(label(data))
        measured, single, whole = defaultdict(list), [], []
        for methods in part.values():
            for method, rows in methods.items():
                measured[method].append(means(rows))
            if "flex" in methods:
                tuned = [pair for row in methods["flex"] for pair in row["candidates"].items()]
                single.append(means([result for unit, result in tuned if unit != "all"]))
                whole.append(means([result for unit, result in tuned if unit == "all"]))
                units = len(methods["flex"][0]["candidates"]) - 1
        if not single:
            print("needs the results of flex")
            continue
        one, every = means(single), means(whole)
        c_one, c_all = (cost["seconds"] / cost["epochs"] for cost in (one, every))
        print(f"L = {units}, E_one = {one['epochs']:.1f} epochs, c_one = {c_one:.3f} s", end=", ")
        print(f"E_all = {every['epochs']:.1f} epochs, c_all = {c_all:.3f} s")
        table = [["method", "formula", "by formula, s", "measured, s", "epochs", "s per epoch"]]
        for method, mine in measured.items():
            if method in FORMULAS:
                formula, cost = FORMULAS[method]
                computed = f"{cost(units, one['seconds'], every['seconds'], c_all):.1f}"
            else:
                formula = computed = "-"
            epochs, seconds = means(mine).values()
            per_epoch = f"{seconds / epochs:.3f}" if epochs else "-"
            table.append([method, formula, computed, f"{seconds:.1f}", f"{epochs:.1f}", per_epoch])
        print_columns(table, left=2)
        print(
            "E and c come from flex and ft-all; what the proxies' accuracies take is in no column"
        )


def print_table_3(groups: Groups) -> None:
    """Test accuracy of each method, its deviation over the runs, and where the paper published
    figures, those and the gap."""
    for (source, network, top_k, data), part in by_network(groups).items():
        methods = [*SELECTIONS, *(b for b in BASELINES if any(b in rows for rows in part.values()))]
        print(f"\nTable 3, {source}, {network} network, top-{top_k} test accuracy")
        print(label(data))
        columns = ["source", *methods]
        table = [["target, ratio", "runs", *columns]]
        for scenario, rows in part.items():
            _, target, ratio, _ = scenario
            tests = {m: [row["test"] for row in rows[m]] for m in columns if m in rows}
            ours = {m: statistics.mean(a) for m, a in tests.items()}
            runs = max(map(len, tests.values()))
            lines = {(f"{target}, {ratio}", f"{runs}"): marked(ours, scenario)}
            spread = {m: f"{statistics.stdev(a):.3f} " for m, a in tests.items() if len(a) > 1}
            if spread:
                lines["  deviation", ""] = spread
            if data == "real" and scenario[:3] in TABLE_3:
                theirs = {m: a for m in columns if (a := paper(*scenario[:3], m))}
                lines["  paper", ""] = marked(theirs, scenario)
                common = ours.keys() & theirs.keys()
                lines["  difference", ""] = {m: f"{ours[m] - theirs[m]:+.3f} " for m in common}
            table += [[*head, *(line.get(m, "") for m in columns)] for head, line in lines.items()]
        print_columns(table, left=1)
        print("* better than every baseline (ft-)")


def marked(figures: dict[str, float], scenario: tuple) -> dict[str, str]:
    """Accuracies in Table 3's three decimals, with a star where a selection method beats all
    baselines, if these are all there."""
    rounded = {method: round(a, 3) for method, a in figures.items()}
    needed = [b for b in methods_of(SCENARIOS[scenario[:2]]) if b in BASELINES]
    to_beat = max(rounded.get(baseline, 1) for baseline in needed)
    return {
        method: f"{a:.3f}" + (" ", "*")[method in SELECTIONS and a > to_beat]
        for method, a in rounded.items()
    }


def print_tally(groups: Groups) -> None:
    """How often each method is best; ties, in three decimals, count for every tied method."""
    for kind in ("real", "built-in"):
        best, complete = Counter(), 0
        for (source, target, _, data), rows in groups.items():
            needed = [m for m in methods_of(SCENARIOS[source, target]) if m != "source"]
            if data == kind and rows.keys() >= {*needed}:
                figures = {m: round(average(rows[m]), 3) for m in needed}
                best.update(m for m in needed if figures[m] == max(figures.values()))
                complete += 1
        if complete:
            print(f"\nBest in how many of {complete} scenarios, ties counting for each")
            print(label(kind))
            print(", ".join(f"{m} {best[m]}" for m in (*SELECTIONS, *BASELINES)))
            if kind == "real":
                print("the paper, of 72: " + ", ".join(f"{m} {n}" for m, n in TALLY.items()))


def print_table_4(groups: Groups) -> None:
    """AP@10 of the target's test images in the source's validation images."""
    for (source, network, _, data), part in by_network(groups).items():
        print(f"\nTable 4, {source}, {network} network, mean AP@10")
        print(label(data))
        table = [["target, ratio", *RETRIEVAL]]
        for (_, target, ratio, _), methods in part.items():
            found = [
                [row["retrieval"] for row in methods.get(m, ()) if "retrieval" in row]
                for m in RETRIEVAL
            ]
            table.append(
                [f"{target}, {ratio}", *(mean(values) if values else "-" for values in found)]
            )
            if data == "real" and target in TABLE_4 and ratio in (12, 20):
                table.append(["  paper", *(f"{TABLE_4[target][m]:.2f}" for m in RETRIEVAL)])
        print_columns(table, left=1)
        if any("-" in line for line in table):
            print(
                "- not run" + ", or ILSVRC's validation images are not there" * (source == "ilsvrc")
            )


def print_image_to_image(groups: Groups) -> None:
    """What the image-to-image unit does as a further candidate of flex (section 5.4)."""
    table = [["scenario", "unit 0", "flex without it", "flex with it", "chosen", "data"]]
    for (source, target, ratio, data), methods in groups.items():
        if not (rows := methods.get("flex-i2i")):
            continue
        own = [row["candidates"]["0"]["test"] for row in rows]
        without = [best_without(row["candidates"])["test"] for row in rows]
        chosen = sum(row["chosen"] == "0" for row in rows)
        accuracies = (mean(values) for values in (own, without, [row["test"] for row in rows]))
        kind = image_to_image(target).__name__
        title = f"{source} -> {target}, {ratio}, {kind}"
        table.append([title, *accuracies, f"{chosen} of {len(rows)}", data])
    if len(table) > 1:
        print("\nThe image-to-image unit (section 5.4), test accuracy")
        print_columns(table, left=1)


def best_without(candidates: dict[str, dict]) -> dict:
    """What flex chooses where there is no candidate 0."""
    return max((one for unit, one in candidates.items() if unit != "0"), key=lambda one: one["val"])


def shades_and_picks(groups: Groups) -> dict:
    """Figure 2: by (source, network, data), and by target, the units' shades and the picks.

    The units are ranked by test accuracy at each ratio; a shade is the sum of the ranks, of which
    1 is the largest. `picks` has for each method the columns, from 0, that it chose in most runs
    of a ratio, fast-flex before its line 10; the column after the last unit is "all".
    """
    panels = defaultdict(dict)
    for (source, target, _, data), methods in groups.items():
        if "flex" not in methods:
            continue
        *units, _ = columns = [*methods["flex"][0]["candidates"]]
        network = SCENARIOS[source, target].network
        sums, picks = panels[source, network, data].setdefault(
            target, ([0] * len(units), {method: set() for method in SELECTIONS})
        )
        tests = [average([row["candidates"][u] for row in methods["flex"]]) for u in units]
        sums[:] = [total + sum(a > b for b in tests) for total, a in zip(sums, tests)]
        for method in SELECTIONS:
            field = "best" if method == "fast-flex" else "chosen"
            for unit, _ in Counter(row[field] for row in methods.get(method, ())).most_common(1):
                picks[method].add(columns.index(unit))
    return {
        panel: {
            target: ([total / max(1, *sums) for total in sums], picks)
            for target, (sums, picks) in targets.items()
        }
        for panel, targets in panels.items()
    }


MARKS = {"flex": "F", "fast-flex": "f", "faster-flex": "s"}


def print_figure_2(groups: Groups) -> None:
    """Figure 2 in letters: a line for each target, a column for each unit."""
    panels = shades_and_picks(groups)
    for (source, network, data), targets in panels.items():
        print(f"\nFigure 2, {source}, {network} network")
        print(label(data))
        table = []
        for target, (shades, picks) in targets.items():
            cells = [" .:+#"[round(4 * shade)] * 3 for shade in shades] + [""]
            for method, mark in MARKS.items():
                for column in picks[method]:
                    cells[column] += mark
            table.append([target, *cells])
        heads = ["", *map(str, range(1, len(table[0]) - 1)), "all"]
        print_columns([heads, *table], left=len(heads))
    if panels:
        print("darker: better on the test images (ranks, summed over the ratios)")
        print("picks at any ratio: F flex, f fast-flex before line 10, s faster-flex")


# ---------------------------------------------------------------- figures


def draw_figures(groups: Groups, folder: Path) -> None:
    """Figures 1, 2 and 3 as PNG files, from the result rows alone. Raises OSError."""
    figures = [*figures_1(groups), *figures_2(groups), *figures_3(groups)]
    if not figures:
        print("no figures: they need the results of flex")
    for name, figure in figures:
        figure.savefig(folder / f"{name}.png", dpi=150)
        print(folder / f"{name}.png")


def canvas(width: float, height: float, rows: int = 1, columns: int = 1):
    """A figure of matplotlib's, in inches, and its axes [rows, columns]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def figures_1(groups: Groups):
    """For each target: accuracies of each candidate, a line per ratio, flex's pick marked."""
    targets = defaultdict(dict)
    for (source, target, ratio, data), methods in groups.items():
        if "flex" in methods:
            targets[source, target, data][ratio] = methods["flex"]
    for (source, target, data), ratios in targets.items():
        figure, ((axes,),) = canvas(7, 4)
        names = [*unit_names(SCENARIOS[source, target]), "all"]
        for number, (ratio, rows) in enumerate(ratios.items()):
            units, color = [*rows[0]["candidates"]], f"C{number}"
            val, test = (
                [average([row["candidates"][unit] for row in rows], split) for unit in units]
                for split in ("val", "test")
            )
            axes.plot(names, val, "-", color=color, label=f"ratio {ratio}")
            axes.plot(names, test, "--", color=color)
            ((pick, _),) = Counter(row["chosen"] for row in rows).most_common(1)
            axes.plot(units.index(pick), val[units.index(pick)], "v", color="blue", markersize=9)
        axes.set(title=f"{source} → {target}, {data} data", ylabel="accuracy")
        axes.tick_params(axis="x", rotation=45)
        title = "validation –\ntest - -\nflex's pick ▼"
        figure.legend(title=title, fontsize="small", loc="outside right upper")
        yield f"figure-1-{source}-{target}-{data}", figure


def figures_2(groups: Groups):
    """For each network and target: the units' shades, and the picks as triangles."""
    panels = shades_and_picks(groups)
    if not panels:
        return
    figure, axes = canvas(7, 3 * len(panels), len(panels))
    for ((source, network, data), targets), (ax,) in zip(panels.items(), axes):
        shades = [[*shades, 0] for shades, _ in targets.values()]
        ax.imshow(shades, cmap="Greys", vmin=0, vmax=1.5, aspect="auto")
        for place, (method, color) in enumerate(zip(SELECTIONS, ("blue", "green", "red"))):
            picked = [
                (x, y) for y, (_, picks) in enumerate(targets.values()) for x in picks[method]
            ]
            x, y = [x + place / 4 - 0.25 for x, _ in picked], [y for _, y in picked]
            ax.plot(x, y, "^", color=color, label=method + " (line 7)" * (method == "fast-flex"))
        names = unit_names(SCENARIOS[source, next(iter(targets))])
        ax.set_yticks(range(len(targets)), targets)
        ax.set_xticks(range(len(names) + 1), [*names, "all\n(no rank)"], rotation=45)
        ax.set_title(f"{source}, {network} network, {data} data (darker: better)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    yield "figure-2", figure


def figures_3(groups: Groups):
    """For each target, at its largest ratio: images before and after the image-to-image unit."""
    last = {(*s[:2], s[3]): m["flex-i2i"][0] for s, m in groups.items() if "flex-i2i" in m}
    if not last:
        return
    shape = next(iter(last.values()))["pairs"]["shape"]
    figure, axes = canvas(1.8 * shape[0], 1.1 * len(last), len(last), shape[0])
    for ((source, target, data), row), line in zip(last.items(), axes):
        pixels = bytearray(zlib.decompress(base64.b64decode(row["pairs"]["zlib"])))
        images = torch.frombuffer(pixels, dtype=torch.uint8).view(row["pairs"]["shape"]).numpy()
        for ax, (before, after) in zip(line, images):
            ax.imshow(np.concatenate([before, after], 1))
            ax.set_axis_off()
        title = f"{source} → {target}, ratio {row['ratio']}, {data} data: before, after unit 0"
        line[0].set_title(title, fontsize="x-small", loc="left")
    yield "figure-3", figure


# ---------------------------------------------------------------- benchmark


@dataclass
class Case:
    """What flex is timed on: by the literal algorithm and by ours."""

    title: str
    net: nn.Sequential
    train: shifts.Data
    val: shifts.Data
    settings: Settings

    def flex(self, tune: Callable, bfloat16: bool, **settings) -> flextune.Selection:
        settings = replace(self.settings, bfloat16=bfloat16, **settings)
        return flextune.flex(self.net, self.train, self.val, settings, tune)


def literal(net, units, train, val, settings):
    """`flextune.fine_tune`, as anyone would write it: the whole network in every step."""
    start = time.perf_counter()
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    net = copy.deepcopy(net).to(device).eval().requires_grad_(False)
    tuned = net if units == "all" else net[units - 1]
    optimizer = torch.optim.Adam(tuned.requires_grad_(True).parameters(), lr=settings.lr)
    train, val = TensorDataset(*train), TensorDataset(*val)
    order = torch.Generator().manual_seed(settings.seed)

    def logits(x):
        return net(x.to(device) / 255 if x.dtype == torch.uint8 else x.to(device))

    def batches(data, sampler=None):  # a generator of its own: the default one is for dropout
        return DataLoader(data, settings.batch_size, sampler=sampler, generator=torch.Generator())

    best, state, stale, history = -1.0, None, 0, []
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        for epoch in range(1, settings.max_epochs + 1):
            tuned.train()
            for module in tuned.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
            for x, y in batches(train, torch.randperm(len(train), generator=order).tolist()):
                optimizer.zero_grad()
                cross_entropy(logits(x), y.to(device)).backward()
                optimizer.step()
            if epoch % settings.check_every and epoch < settings.max_epochs:
                continue
            net.eval()
            with torch.no_grad():
                largest = (
                    (logits(x).topk(settings.top_k).indices.cpu(), y) for x, y in batches(val)
                )
                hits = sum((top == y[:, None]).any(1).sum().item() for top, y in largest)
            history.append((epoch, hits / len(val)))
            if history[-1][1] > best:
                best, state, stale = history[-1][1], copy.deepcopy(net.state_dict()), 0
            else:
                stale += 1
                if stale == settings.patience:
                    break
    net.load_state_dict(state)
    seconds, count = time.perf_counter() - start, sum(w.numel() for w in tuned.parameters())
    return flextune.Result(net, (units,), best, epoch, seconds, history, count, False)


def benchmark_cases(args, pairs: list[tuple[str, str]]) -> Iterator[Case]:
    """The scenario of --target, or the standard ones; all end after the same few epochs."""
    short = {"device": args.device, "seed": args.seed, "max_epochs": args.max_epochs or 10}
    for pair in pairs if args.target else [("mnist", "mnist-m"), ("cifar", "blurry")]:
        root = locate(*pair, args.data) if args.target or args.data else None
        family = family_of(pair, root)
        domain = shifts.load(*pair, root, Progress([1]).part)
        net = source_network(family, root, args.out, args.device)
        for ratio in args.ratio or family.ratios[1:2]:
            train = shifts.subsample(domain["pool"], ratio, args.seed)
            title = f"{pair[0]} -> {pair[1]}, ratio {ratio}, {'real' if root else 'built-in'} data"
            yield Case(title, net, train, domain["val"], replace(family.tuning, **short))
    if not args.target:
        noise = torch.Generator().manual_seed(0)
        net = seeded(partial(models.inception2, classes=6), 0)
        for size, counts, epochs in ((64, (120, 300), short["max_epochs"]), (224, (64, 32), 1)):
            train, val = (
                (
                    torch.randint(256, (n, 3, size, size), dtype=torch.uint8, generator=noise),
                    torch.randint(6, (n,), generator=noise),
                )
                for n in counts
            )
            title = f"Inception2, {size} pixels, random weights and images"
            settings = Settings(lr=1e-4, **short | {"max_epochs": epochs})
            yield Case(title, net, train, val, settings)


def run_benchmark(args, pairs: list[tuple[str, str]]) -> None:
    """flex by the literal algorithm and by ours, by turns: what each takes and what it gives."""
    check_options(args, pairs)
    ways = {"literal": (literal, False), "ours": (flextune.fine_tune, False)}
    if args.bfloat16:
        ways["ours, bfloat16"] = flextune.fine_tune, True
    for case in benchmark_cases(args, pairs):
        flops, rates, found = {}, [], {way: [] for way in ways}
        progress = Progress([1] * len(ways) * (1 + (args.runs or 3)))
        for way, how in ways.items():
            with FlopCounterMode(display=False) as counter:  # too slow to be timed: a warm-up
                case.flex(*how, cuda_graph=False)
            flops[way] = counter.get_total_flops()
            progress.step(f"{case.title}: warm-up, {way}")
        for _ in range(args.runs or 3):
            rates.append(matrix_rate(args.device))
            for way, how in ways.items():
                reset_peak_memory()
                start = time.perf_counter()
                selection = case.flex(*how)
                found[way].append((time.perf_counter() - start, peak_memory(), selection))
                progress.step(f"{case.title}: {way}, {found[way][-1][0]:.1f} s")
        clear_line()
        print_benchmark(case, flops, statistics.median(rates), found)


def print_benchmark(case: Case, flops: dict, rate: float, found: dict) -> None:
    counts = f"{len(case.train[1])} training and {len(case.val[1])} validation images"
    print(f"\n{case.title}: {counts}, at most {case.settings.max_epochs} epochs")
    costs = ["seconds", "least, most", "times as fast", "flex / ft-all", "peak MB"]
    work = ["GFLOP", "of the matrix rate"]
    table = [["flex", *costs, *work, "accuracies differ by", "chosen"]]
    (_, _, literal), *_ = found["literal"]
    for way, runs in found.items():
        seconds, peaks, selections = zip(*runs)
        middle, tuned = statistics.median(seconds), selections[0].tuned
        faster = [a / b for (a, *_), b in zip(found["literal"], seconds)]
        price = [all_of / one.tuned["all"].seconds for all_of, one in zip(seconds, selections)]
        gap = max(abs(literal.tuned[unit].accuracy - tuned[unit].accuracy) for unit in tuned)
        table.append(
            [
                way,
                f"{middle:.2f}",
                f"{min(seconds):.2f}, {max(seconds):.2f}",
                f"{statistics.median(faster):.2f}",
                f"{statistics.median(price):.2f}",
                f"{statistics.median(peaks) / 1e6:.0f}",
                f"{flops[way] / 1e9:.0f}",
                f"{flops[way] / middle / rate:.2f}",
                f"{gap:.4f}",
                str(selections[0].chosen),
            ]
        )
    print_columns(table, left=1)
    print(f"the matrix rate: {rate / 1e9:.0f} GFLOP/s, of large float32 products")


def matrix_rate(device: str | None) -> float:
    """Operations a second of this machine's matrix products, float32."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    size, seconds = 8192 if "cuda" in device else 2048, []
    a = torch.rand(size, size, device=device)
    for _ in range(10):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds)


def reset_peak_memory() -> None:
    """Of the GPU, or on Linux of the process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif LINUX:
        LIBC.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> float:
    """Bytes, since the last reset."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if not LINUX:
        return math.nan
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


# ---------------------------------------------------------------- command line


class UsageError(Exception):
    """Options that do not go together; the message says in a line what to do."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}; see --help\n")


def whole(text: str, least: int = 0, digits: int = 9) -> int:
    if not text.isdecimal() or len(text) > digits or int(text) < least:
        wrong = f"not {text[:20]} (at most {digits} digits)"
        raise argparse.ArgumentTypeError(f"must be a whole number from {least}, {wrong}")
    return int(text)


positive = partial(whole, least=1, digits=5)


def gib(text: str) -> float:
    try:
        if 0 <= float(text) <= 1e6:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be a number from 0, not {text} (at most 1e6)")


def device(text: str) -> str:
    if text.split(":")[0] not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text} is neither cpu nor cuda")
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text}: {str(error).splitlines()[0]}") from error
    return text


LINUX = sys.platform == "linux"
LIBC = ctypes.CDLL(None) if LINUX else None


def keep_freed_memory() -> None:
    """Leave freed memory with the process: to get it anew from Linux in every step takes longer
    than the arithmetic of a small network."""
    if LINUX and hasattr(LIBC, "mallopt"):
        LIBC.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        LIBC.mallopt(-1, -1)  # M_TRIM_THRESHOLD


TABLES = {1: print_table_1, 3: print_table_3, 4: print_table_4}


def parser() -> Parser:
    result = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = result.add_argument
    add(
        "--source",
        choices=dict.fromkeys(source for source, _ in SCENARIOS),
        help="source domain; default: that of the targets",
    )
    add("--target", nargs="+", metavar="NAME", help="target domains (--list); default: all")
    add("--ratio", nargs="+", type=positive, metavar="N", help="images per class; default: all")
    add(
        "--methods",
        nargs="+",
        choices=METHODS,
        metavar="NAME",
        help=f"default: {' '.join(METHODS)} (Inception2: without ft-fc-2)",
    )
    add(
        "--runs",
        type=positive,
        metavar="N",
        help="draws of the training images; default: 20 at the smallest ratio, else 1",
    )
    add("--seed", type=whole, default=0, help="of the first run, the next ones count up from it")
    add(
        "--max-epochs",
        type=positive,
        metavar="N",
        help="end every fine-tuning after N epochs, if it has not stopped before",
    )
    add(
        "--bfloat16",
        action="store_true",
        help="fine-tune with bfloat16 products, faster where the processor has units for them",
    )
    add(
        "--cache-gib",
        type=gib,
        default=2,
        metavar="G",
        help="memory for the frozen units' output, recomputed beyond it; default: 2",
    )
    add(
        "--image-to-image",
        action="store_true",
        help="also flex with an image-to-image unit before the network as a further candidate",
    )
    add(
        "--table",
        nargs="+",
        type=int,
        choices=TABLES,
        default=[],
        help="print these tables of the paper; default: 3 where no --target is given",
    )
    add("--figures", type=Path, metavar="DIR", help="draw the paper's figures (needs matplotlib)")
    add(
        "--data",
        metavar="DIR",
        help="folder of the real data, or builtin; default: data/, else the built-in images",
    )
    add("--device", type=device, help="cpu, cuda or cuda:N; default: CUDA where there is one")
    add(
        "--out",
        type=Path,
        default=Path("results"),
        metavar="DIR",
        help="folder of results.jsonl and the source networks; default: results. A run whose result "
        "is there is not run again",
    )
    add(
        "--save",
        type=Path,
        metavar="FILE",
        help="train, and write the network that flex chose (without flex, that of the last method); "
        "for one run, outside --out",
    )
    add("--list", action="store_true", help="show all scenarios, and whether their data are there")
    add(
        "--benchmark",
        action="store_true",
        help="time flex against the literal algorithm, on a --target or on standard cases, for "
        "--runs alternations (3) of --max-epochs (10); with --bfloat16 also by this",
    )
    return result


def scenarios(args) -> list[tuple[str, str]]:
    """The (source, target) pairs asked for. Raises UsageError for an unknown or unclear target."""
    pairs = [pair for pair in SCENARIOS if args.source in (None, pair[0])]
    for name in args.target or ():
        sources = [source for source, target in pairs if target == name]
        if not sources:
            known = ", ".join(dict.fromkeys(target for _, target in pairs))
            of = f" of source {args.source}" if args.source else ""
            raise UsageError(f"unknown target {name}{of}: choose from {known}")
        if len(sources) > 1 and not args.list:
            raise UsageError(f"target {name} needs --source: {' or '.join(sources)}")
    return [pair for pair in pairs if not args.target or pair[1] in args.target]


def print_scenarios(pairs: list[tuple[str, str]], data: str | None) -> None:
    where = "data" if data == "builtin" else f"data in {data or 'data'}/"
    table = [["source", "network", "target", "ratios", "accuracy", where]]
    for source, target in pairs:
        family, there = SCENARIOS[source, target], {"built-in images": True}
        if data != "builtin":
            there = shifts.present(source, target, Path(data or "data"))
        table.append(
            [
                source,
                family.network,
                target,
                " ".join(map(str, family.ratios)),
                f"top-{1 if data == 'builtin' else family.tuning.top_k}",
                ", ".join(f"{what} {'there' if is_ else 'missing'}" for what, is_ in there.items()),
            ]
        )
    print_columns(table, left=len(table[0]))
    if any("missing" in line[-1] for line in table):
        print("What is missing is downloaded when it is needed; ilsvrc has to be put there.")


def locate(source: str, target: str, data: str | None) -> Path | None:
    """The folder that has the data of a scenario, or None for the built-in data; see `--data`."""
    if data == "builtin":
        return None
    root = Path(data or "data")
    try:
        shifts.provide(source, target, root, Progress([1]).part)
        return root
    except shifts.MissingError as error:
        if data:
            raise
        missing = error
    finally:
        clear_line()
    print(f"{'*' * 99}\n{source} -> {target}: {missing}.\n{BUILT_IN}\n{'*' * 99}")
    return None


def check_options(args, pairs: list[tuple[str, str]]) -> None:
    """What is missing or cannot be written is better found now than after the training."""
    if args.data not in (None, "builtin") and not (args.data and Path(args.data).is_dir()):
        raise UsageError(f"--data: there is no folder {args.data}; for the drawn images: builtin")
    if args.save and args.save.exists() and not args.save.is_file():  # a device, even
        raise UsageError(f"--save takes the name of a file, and {args.save} is none")
    if args.save and args.save.resolve().parent == args.out.resolve():
        raise UsageError(f"--save: name a file that is not in {args.out}, the folder of --out")
    for pair in pairs:
        largest = SCENARIOS[pair].ratios[-1]
        if max(args.ratio or [0]) > largest:
            raise UsageError(f"--ratio: the largest of {' -> '.join(pair)} is {largest}")
    if args.save and sum(len(runs_of(pair, None, args)) for pair in pairs) > 1:
        raise UsageError("--save keeps one network: give one --target, one --ratio and --runs 1")
    if args.figures:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise UsageError("--figures needs matplotlib: pip install matplotlib") from None
    parent = args.save and args.save.parent
    for option, folder in (("--out", args.out), ("--figures", args.figures), ("--save", parent)):
        try:
            if folder:
                folder.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            reason = f"no file can be written in {folder}: {error.strerror}"
            raise UsageError(f"{option}: {reason}") from error
    append([], args.out)


def runs_of(pair: tuple[str, str], root: Path | None, args) -> list[Run]:
    """The scenario-runs of a scenario that are asked for, with their data in `root`."""
    family = family_of(pair, root)
    methods = methods_of(family, args.methods) + ["flex-i2i"] * args.image_to_image
    own = {"device": args.device, "bfloat16": args.bfloat16}
    settings = replace(family.tuning, **own, cache_bytes=int(args.cache_gib * 2**30))
    if args.max_epochs:
        settings = replace(settings, max_epochs=min(settings.max_epochs, args.max_epochs))
    return [
        Run(pair, ratio, root, replace(settings, seed=args.seed + number), tuple(methods))
        for ratio in sorted(set(args.ratio or family.ratios))
        for number in range(args.runs or (20 if ratio == family.ratios[0] else 1))
    ]


def missing(run: Run, rows: dict[str, dict], args) -> Run | None:
    """The run with those of its methods that have no result, or None if all have."""
    retrieval = RETRIEVAL if 4 in args.table and has_gallery(run) else ()

    def there(method):
        row = rows.get(key(run.head(method)), ())
        return row and (method not in retrieval or "retrieval" in row)

    left = tuple(m for m in run.methods if args.save or not there(m))
    return replace(run, methods=left) if left else None


def plan(args, pairs: list[tuple[str, str]]) -> tuple[list[Run], list[Run]]:
    """All scenario-runs asked for, and what is still to be run of them.

    Data are looked for, and downloaded, only where something is to be run.
    """
    rows, real = read(args.out), args.data != "builtin"
    runs = {
        pair: runs_of(pair, Path(args.data or "data") if real else None, args) for pair in pairs
    }
    unfinished = [pair for pair in pairs if any(missing(run, rows, args) for run in runs[pair])]
    if real:
        for pair in unfinished:
            shifts.check(*pair)
        for pair in unfinished:
            runs[pair] = runs_of(pair, locate(*pair, args.data), args)
    wanted = [run for pair in pairs for run in runs[pair]]
    todo = [left for run in wanted if (left := missing(run, rows, args))]
    if len(todo) < len(wanted):
        done = f"{len(wanted) - len(todo)} of {len(wanted)} runs"
        print(f"{done} have their results in {args.out} already (for others: --out or --seed)")
    return wanted, todo


def run_scenarios(args, pairs: list[tuple[str, str]]) -> None:
    """Run and record what has no result yet, in this rank's share, and show all results."""
    check_options(args, pairs)
    wanted, todo = from_rank_0(lambda: plan(args, pairs))
    todo = [replace(run, settings=replace(run.settings, device=args.device)) for run in todo]
    network = cache(partial(source_network, out=args.out, device=args.device))
    gallery = cache(source_gallery)
    if RANKS > 1:
        sources = {(run.pair[0], run.root): run for run in todo}
        for number, run in enumerate(sources.values()):
            if number % RANKS == RANK:
                network(run.family, run.root)
        wait_for_all("pretrained")
    costs = [run.trainings() for run in todo]
    progress = Progress([cost for each in costs for cost in each])
    kept = "flex" if "flex" in wanted[0].methods else wanted[0].methods[-1]
    loaded = None
    for number in shared(len(todo)):
        run, paused = missing(todo[number], read(args.out), args), time.perf_counter()
        if run is None:  # another sweep in this folder has it
            continue
        if loaded != (run.pair, run.root):
            domain, loaded = None, (run.pair, run.root)  # one in memory at a time
            wants_gallery = 4 in args.table and has_gallery(run)
            searched = gallery(run.family, run.root) if wants_gallery else None
            domain = shifts.load(*run.pair, run.root, Progress([1]).part)
            largest = max(other.ratio for other in todo if other.pair == run.pair)
            shifts.draw_size(domain["pool"][1], largest)  # is there that much?
        clear_line()
        net = network(run.family, run.root)
        progress.start += time.perf_counter() - paused
        progress.done = sum(map(len, costs[:number]))
        with flextune.sharing(net, run.settings):
            rows, nets = execute(run, net, domain, searched, progress)
        append(rows, args.out)
        if args.save:
            save(nets[kept].state_dict(), args.save.resolve())
    if RANKS > 1:
        progress.show("waiting for the other ranks")
    wait_for_all("finished")
    clear_line()
    if RANK:
        return
    rows = read(args.out)
    show(args, grouped([rows[key(run.head(m))] for run in wanted for m in run.methods]))
    print(f"\nevery figure, candidate and history: {args.out / 'results*.jsonl'}")
    if args.save:
        print(f"the network of {kept} is in {args.save}")


def show(args, groups: Groups) -> None:
    """The scenarios of a --target each by itself, the tables and figures asked for."""
    if args.target:
        for scenario, methods in groups.items():
            print_scenario(scenario, methods)
    tables = args.table or [3] * (not args.target)
    for number in tables:
        TABLES[number](groups)
    if 3 in tables:
        print_tally(groups)
        print_figure_2(groups)
    if args.image_to_image:
        print_image_to_image(groups)
    if args.figures:
        draw_figures(groups, args.figures)


def main(argv: list[str] | None = None) -> None:
    parse = parser()
    args = parse.parse_args(argv)
    keep_freed_memory()
    if RANK:
        sys.stdout = None  # rank 0 speaks
    if TORCHRUN and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # a sum depends on the threads: the same for any number of ranks
    if args.device in (None, "cuda") and torch.cuda.is_available() and RANKS > 1:
        local = int(os.environ.get("LOCAL_RANK", RANK))
        args.device = f"cuda:{local % torch.cuda.device_count()}"
    try:
        pairs = scenarios(args)
        if args.list:
            print_scenarios(pairs, args.data)
        elif args.benchmark:
            run_benchmark(args, pairs)
        else:
            run_scenarios(args, pairs)
    except (UsageError, shifts.DataError, models.WeightsError, OSError) as error:
        clear_line()
        parse.exit(2, f"{parse.prog}: error: {error}\n")
    except MemoryError:
        clear_line()
        hint = f"try less than --cache-gib {args.cache_gib:g}"
        parse.exit(2, f"{parse.prog}: error: out of memory: {hint}\n")
    except KeyboardInterrupt:
        clear_line()
        parse.exit(130, f"{parse.prog}: interrupted; finished runs are in {args.out}\n")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace", line_buffering=True)  # where there is no UTF-8
    try:
        main()
    finally:
        with contextlib.suppress(OSError):
            sys.__stdout__.close()  # if nothing can be printed, it has been said: not once more
