"""The experiments of Royer & Lampert, "A Flexible Selection Scheme for Minimum-Effort Transfer
Learning", WACV 2020: every method on one transfer scenario, on several, or on all.

    python run_all.py --target sketch --ratio 20                  # one scenario, all methods
    python run_all.py --target svhn occluded --ratio 3 30         # four scenarios
    python run_all.py --target art --ratio 20 --methods flex ft-all --runs 3 --data DIR
    python run_all.py --list                                      # all scenarios, and their data

Results are appended to results/results.jsonl, a line per scenario, run and method.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import nn

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
    stand_in: Settings | None = None  # the tuning on built-in data, where it is another


SEVEN_LAYERS = {
    "ratios": (2, 20, 200, 2000),
    "network": "7-layer",
    "build": models.cifar_net,
    "pretraining": Settings(lr=1e-3, max_epochs=30),
    "tuning": Settings(lr=1e-3),
}
INCEPTION2 = {  # on built-in data a narrow network, on small images
    "network": "Inception2",
    "build": partial(models.inception2, classes=6, width=0.25),
    "pretraining": Settings(lr=1e-3, max_epochs=9, check_every=1, batch_statistics=True),
    "stand_in": Settings(lr=1e-3, patience=3),
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

METHODS = {
    "source": flextune.source,
    "ft-fc-1": partial(flextune.ft_fc, n=1),
    "ft-fc-2": partial(flextune.ft_fc, n=2),
    "ft-ss": flextune.ft_ss,
    "ft-all": flextune.ft_all,
    "flex": flextune.flex,
    "fast-flex": flextune.fast_flex,
    "faster-flex": flextune.faster_flex,
}

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


def paper(source: str, target: str, ratio: int, method: str) -> float | None:
    """The test accuracy that the paper published, if it did."""
    if method == "source":
        return TABLE_2[source, target]
    return TABLE_3.get((source, target, ratio), {}).get(method)


# ---------------------------------------------------------------- progress


class Progress:
    """On standard error: what is being done, and about how long the rest takes.

    On a terminal one line that is rewritten; elsewhere plain lines, one for each step and, in a
    long step, one each ten seconds.
    """

    def __init__(self, steps: int):
        self.steps, self.done = steps, 0
        self.start = self.printed = time.perf_counter()
        self.terminal = sys.stderr.isatty()

    def show(self, text: str, part: float = 0.0) -> None:
        """Say what is under way; of the present step, `part` (0 to 1) is done."""
        now = time.perf_counter()
        done = self.done + part
        left = (now - self.start) / done * (self.steps - done) if done else math.inf
        line = f"[{self.done}/{self.steps}] " * (self.steps > 0) + text
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


class Once:
    """`fine_tune` that trains each network of a scenario-run once, whichever methods need it.

    The recorded epochs and seconds are charged to each method that uses the network (Table 1).
    """

    def __init__(self, net: nn.Sequential, progress: Progress, title: str):
        self.net, self.progress, self.title, self.results = net, progress, title, {}

    def __call__(self, net, units, train, val, settings, epochs=None):
        numbers = units if isinstance(units, list) else [units]
        if net is not self.net:
            numbers = ["ss"]  # the one method that brings a network of its own
        name = "ft-" + "-".join(map(str, numbers)) + ", one epoch" * (epochs == 1)

        def report(epoch, accuracy):
            text = f"{self.title}: {name}, epoch {epoch}, validation {accuracy:.3f}"
            self.progress.show(text, min(0.9, epoch / settings.max_epochs))

        if name not in self.results:
            result = flextune.fine_tune(net, units, train, val, settings, epochs, report)
            self.results[name] = result
            self.progress.step(f"{self.title}: {name}, validation {result.accuracy:.3f}")
        return self.results[name]


def run(scenario: dict, methods, net, domain, settings: Settings, progress: Progress):
    """Every method on one draw of the training images: its result row and its network, each."""
    train = shifts.subsample(domain["pool"], scenario["ratio"], settings.seed)
    title = f"{scenario['target']}, ratio {scenario['ratio']}, run {scenario['run']}"
    tune = Once(net, progress, title)
    test = cache(lambda net: flextune.accuracy(net, domain["test"], settings))

    def record(result):
        fields = ("units", "epochs", "seconds", "trained", "diverged", "history")
        accuracies = {"val": result.accuracy, "test": test(result.net)}
        return accuracies | {field: getattr(result, field) for field in fields}

    rows, nets = [], {}
    for method in methods:
        progress.show(f"{title}: {method}")
        outcome = METHODS[method](net, train, domain["val"], settings=settings, tune=tune)
        row = scenario | {"method": method, "images": len(train[1]), "settings": asdict(settings)}
        if isinstance(outcome, flextune.Selection):
            result = outcome.result
            row |= record(result) | {
                "epochs": outcome.epochs,
                "seconds": outcome.seconds,
                "chosen": str(outcome.chosen),
                "best": str(outcome.best),
                "proxies": {str(unit): a for unit, a in outcome.proxies.items()},
                "candidates": {str(unit): record(one) for unit, one in outcome.tuned.items()},
            }
        else:
            result = outcome
            row |= record(result)
        rows.append(row)
        nets[method] = result.net
    return rows, nets


@cache
def unit_names(family: Family) -> list[str]:
    """The names of the source network's units, in order."""
    with torch.device("meta"):  # no weights, no random numbers
        return [name for name, _ in family.build().named_children()]


def methods_of(family: Family, asked: list[str] | None) -> list[str]:
    """The methods to run, in Table 3's order; of Inception2 the paper tunes one last unit alone."""
    without = {"ft-fc-2"} if family.network == "Inception2" else set()
    return [method for method in METHODS if method in (asked or METHODS.keys() - without)]


def trainings(methods: list[str], family: Family) -> int:
    """How many networks a run fine-tunes at the most, one that several methods need once."""
    last = len(unit_names(family))
    needs = {
        "source": [],
        "ft-fc-1": [last],
        "ft-fc-2": ["last two"],
        "ft-ss": ["scales"],
        "ft-all": ["all"],
        "flex": [*range(1, last + 1), "all"],
        "fast-flex": ["all", "fast"],
        "faster-flex": ["one epoch", "faster"],
    }
    needed = {network for method in methods for network in needs[method]}
    return len(needed - ({"fast", "faster"} if "flex" in methods else set()))


def source_network(family: Family, root: Path | None, out: Path, device: str | None):
    """The source network: read, or trained once on the source's images and then kept in `out`."""
    name = family.source
    if root and family.weights:
        path = root / "inception2.npz"
        print(f"{name}: {family.network}, weights from {path}")
        return family.weights(path)
    domain = shifts.load(name, None, root)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        net = family.build()
    made_of = hashlib.md5(f"{net} {family.pretraining}".encode())
    for tensor in (*domain["source"], *domain["val"]):
        made_of.update(tensor.numpy())
    path = out / f"source-{name}-{'real' if root else 'builtin'}.pt"
    state = kept_network(path, made_of.hexdigest())
    if state is None:
        progress = Progress(1)

        def report(epoch, accuracy):
            text = f"pretraining on {name}: epoch {epoch}, validation {accuracy:.3f}"
            progress.show(text, epoch / settings.max_epochs)

        settings = replace(family.pretraining, device=device)
        data = domain["source"], domain["val"]
        state = flextune.fine_tune(net, "all", *data, settings, None, report).net.state_dict()
        clear_line()
        save({"made_of": made_of.hexdigest(), "net": state}, path)
    net.load_state_dict(state)
    own = flextune.accuracy(net, domain["test"], replace(family.pretraining, device=device))
    network = "narrow " * bool(family.weights) + family.network
    where = f"data in {root}" if root else "built-in data"
    print(f"{name}: {network} network, {own:.3f} on its own test images, {where}")
    return net


def kept_network(path: Path, made_of: str) -> dict | None:
    """The state in `path`, if it is of a network that was made of the same."""
    try:
        kept = torch.load(path, weights_only=True)
        return kept["net"] if kept["made_of"] == made_of else None
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError, EOFError, LookupError, TypeError, ValueError, UnpicklingError):
        print(f"{path} cannot be read: the source network is trained anew", file=sys.stderr)
        return None


def append(rows: list[dict], path: Path) -> None:
    """Add result rows to a file, all or none of them. Raises OSError."""
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    with open(path, "ab", buffering=0) as file:
        before = file.tell()
        if file.write(text) < len(text):
            file.truncate(before)
            raise OSError(f"{path}: no space left for the results")


def save(content, path: Path) -> None:
    """Write a file for `torch.load(path, weights_only=True)`, whole or not. Raises OSError."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        torch.save(content, part)
        part.replace(path)
    except RuntimeError as error:  # a full disk
        raise OSError(f"{path} cannot be written: {str(error).splitlines()[0]}") from error
    finally:
        part.unlink(missing_ok=True)


# ---------------------------------------------------------------- tables

BUILT_IN = "BUILT-IN DATA: drawn by shifts.py, no figure compares with the paper's"


def print_scenario(rows: list[dict]) -> None:
    """The tables of one scenario: means over its runs."""
    first = rows[0]
    names = unit_names(SCENARIOS[first["source"], first["target"]])
    runs = len({row["run"] for row in rows})
    print(f"\n{first['source']} -> {first['target']}, ratio {first['ratio']}", end=": ")
    print(f"{first['images']} training images, {runs} run{'s' * (runs > 1)}", end=", ")
    print(f"top-{first['settings']['top_k']} accuracy")
    print("real data" if first["data"] == "real" else BUILT_IN)
    print_methods(rows, names)
    if any("candidates" in row for row in rows):
        print_units(rows, names)


def print_methods(rows: list[dict], names: list[str]) -> None:
    """A line for each method, with the paper's figure where the data are real."""
    table = [["method", "tuned", "validation", "test", "paper", "epochs", "seconds"]]
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        first = mine[0]
        worse = any(row["val"] < row["history"][0][1] for row in mine)
        published = paper(first["source"], first["target"], first["ratio"], method)
        table.append(
            [
                method + "*" * worse + "!" * any(row["diverged"] for row in mine),
                tuned(mine, names),
                *(mean([row[key] for row in mine]) for key in ("val", "test")),
                f"{published:.3f}" if published else "not published",
                f"{statistics.mean(row['epochs'] for row in mine):.0f}",
                f"{statistics.mean(row['seconds'] for row in mine):.1f}",
            ]
        )
    if rows[0]["data"] != "real":
        table = [line[:4] + line[5:] for line in table]
    print_columns(table, left=2)
    marks = "".join(line[0][-2:] for line in table)
    if "*" in marks:
        print("* worse on the validation set than the source network, in a run or more")
    if "!" in marks:
        print("! diverged, in a run or more: its network is from before that")


def print_units(rows: list[dict], names: list[str]) -> None:
    """A line for each candidate: its accuracies, and which algorithms chose it (how often)."""
    columns = ("validation", "test", "proxy (fast-flex)", "proxy (faster-flex)")
    runs = len({row["run"] for row in rows})
    table = [["unit", *columns, "chosen by"]]
    for unit, name in [*((str(n), name) for n, name in enumerate(names, 1)), ("all", "")]:
        found = {column: {} for column in columns}  # column: run: accuracy
        chosen_by = Counter()
        for row in rows:
            method, run = row["method"], row["run"]
            if unit in row.get("proxies", ()):
                found[f"proxy ({method})"][run] = row["proxies"][unit]
            # Algorithm 3 tunes all units for a single epoch: that is not ft-all.
            if unit in row.get("candidates", ()) and (unit, method) != ("all", "faster-flex"):
                found["validation"][run] = row["candidates"][unit]["val"]
                found["test"][run] = row["candidates"][unit]["test"]
            chosen_by[method] += row.get("chosen") == unit
        how_often = (f"{m}" + f" ({n} of {runs})" * (runs > 1) for m, n in chosen_by.items() if n)
        bars = (bar(list(by_run.values()), runs) for by_run in found.values())
        table.append([f"{unit} {name}", *bars, ", ".join(how_often)])
    used = [column for column in zip(*table) if set(column[1:]) != {"-"}]
    print()
    print_columns([*zip(*used)], left=len(used))


def tuned(rows: list[dict], names: list[str]) -> str:
    """What a method tuned, by number and name; where its runs differ, each with how often."""

    def label(row):
        if row["method"] == "ft-ss":
            return f"{len(names)} {names[-1]}, scales"
        if len(row["units"]) == len(names):
            return "all"
        return ", ".join(f"{unit} {names[unit - 1]}" for unit in row["units"]) or "-"

    labels = Counter(map(label, rows)).most_common()
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


# ---------------------------------------------------------------- command line


class UsageError(Exception):
    """Options that do not go together; the message says in a line what to do."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}; see --help\n")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, not {text}")
    return int(text)


def device(text: str) -> str:
    if text.split(":")[0] not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text} is neither cpu nor cuda")
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text}: {str(error).splitlines()[0]}") from error
    return text


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
    add("--seed", type=int, default=0, help="of the first run, the next ones count up from it")
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
        help="folder of results.jsonl and the source networks; default: results",
    )
    add(
        "--save",
        type=Path,
        metavar="FILE",
        help="write the network that flex chose (without flex, that of the last method); for one run",
    )
    add("--list", action="store_true", help="show all scenarios, and whether their data are there")
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
        shifts.provide(source, target, root, Progress(1).part)
        return root
    except shifts.MissingError as error:
        if data:
            raise
        missing = error
    finally:
        clear_line()
    print(f"{'*' * 99}\n{source} -> {target}: {missing}.\n{BUILT_IN}\n{'*' * 99}")
    return None


def run_scenarios(args, pairs: list[tuple[str, str]]) -> None:
    """Run, record and print every scenario asked for."""
    plan = [
        (pair, ratio, args.runs or (20 if ratio == SCENARIOS[pair].ratios[0] else 1))
        for pair in pairs
        for ratio in sorted(set(args.ratio or SCENARIOS[pair].ratios))
    ]
    if args.data not in (None, "builtin") and not Path(args.data).is_dir():
        raise UsageError(f"--data: there is no folder {args.data}; for the drawn images: builtin")
    if args.save and args.save.is_dir():
        raise UsageError(f"--save takes the name of a file, and {args.save} is a folder")
    if args.save and sum(runs for *_, runs in plan) > 1:
        raise UsageError("--save keeps one network: give one --target, one --ratio and --runs 1")
    # What is missing or cannot be written is better found now than after the training.
    results = args.out / "results.jsonl"
    for folder in (args.out, args.save.parent if args.save else args.out):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    append([], results)
    if args.data != "builtin":
        for pair in pairs:
            shifts.check(*pair)
    roots, networks = {pair: locate(*pair, args.data) for pair in pairs}, {}
    methods = {pair: methods_of(SCENARIOS[pair], args.methods) for pair in pairs}
    steps = {pair: trainings(methods[pair], SCENARIOS[pair]) for pair in pairs}
    progress = Progress(sum(runs * steps[pair] for pair, _, runs in plan))
    for pair, ratios in itertools.groupby(plan, key=lambda step: step[0]):
        paused, root, family = time.perf_counter(), roots[pair], SCENARIOS[pair]
        ratios = list(ratios)
        domain = None  # before the next: one in memory at a time
        domain = shifts.load(*pair, root, Progress(1).part)
        clear_line()
        shifts.draw_size(domain["pool"][1], max(ratio for _, ratio, _ in ratios))  # too large?
        if (family, root) not in networks:
            networks[family, root] = source_network(family, root, args.out, args.device)
        progress.start += time.perf_counter() - paused
        tuning = family.tuning if root else family.stand_in or family.tuning
        for _, ratio, runs in ratios:
            rows = []
            for number in range(1, runs + 1):
                ends_at = progress.done + steps[pair]
                settings = replace(tuning, seed=args.seed + number - 1, device=args.device)
                scenario = {
                    "source": family.source,
                    "target": pair[1],
                    "ratio": ratio,
                    "run": number,
                    "seed": settings.seed,
                    "data": "real" if root else "built-in",
                }
                net = networks[family, root]
                new, nets = run(scenario, methods[pair], net, domain, settings, progress)
                append(new, results)
                rows += new
                progress.done = ends_at
            clear_line()
            print_scenario(rows)
    print(f"\nevery figure, candidate and history: {results}")
    if args.save:
        method = "flex" if "flex" in nets else [*nets][-1]
        save(nets[method].state_dict(), args.save)
        print(f"the network of {method} is in {args.save}")


def main(argv: list[str] | None = None) -> None:
    parse = parser()
    args = parse.parse_args(argv)
    try:
        pairs = scenarios(args)
        if args.list:
            print_scenarios(pairs, args.data)
        else:
            run_scenarios(args, pairs)
    except (UsageError, shifts.DataError, models.WeightsError, OSError) as error:
        clear_line()
        parse.exit(2, f"{parse.prog}: error: {error}\n")
    except KeyboardInterrupt:
        clear_line()
        parse.exit(130, f"{parse.prog}: interrupted; finished runs are in {args.out}\n")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace", line_buffering=True)  # where there is no UTF-8
    main()
