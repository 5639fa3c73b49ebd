"""Flex-tuning: find the one unit of a pretrained network to fine-tune on different-looking data.

Royer & Lampert, "A Flexible Selection Scheme for Minimum-Effort Transfer Learning", WACV 2020.
This file needs PyTorch alone, so it can be copied into any project:

    task = Task(net, (x_train, y_train), (x_val, y_val), Settings(lr=1e-4))
    selection = flex(task)  # or fast_flex, faster_flex
    selection.chosen, selection.result.accuracy, selection.result.net

`net` is an `nn.Sequential` whose children are its units, numbered from 1, and gives logits [N,
classes]. x [N, ...] is uint8 (enters as x / 255), float, or int64 tokens; y is int64 [N]. No
function changes what it is given. `net.to(memory_format=torch.channels_last)` can be faster. On
CUDA, `torch.backends.cudnn.deterministic = True` gives the same result every time.
"""

from __future__ import annotations

import contextlib
import copy
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_iter, tree_map, tree_map_only


@dataclass(frozen=True)
class Settings:
    """The training protocol (section 5.1), the same for every network of a selection."""

    lr: float = 1e-3  # of Adam; the paper: 1e-3 for the small networks, 1e-4 for Inception2
    batch_size: int = 64  # images per step; the last batch of an epoch may be smaller
    check_every: int = 5  # epochs from one validation to the next; the paper: 5 to 10
    patience: int = 5  # the training ends after so many validations without a better accuracy
    max_epochs: int = 300  # the training ends here even if the accuracy still improves
    batch_statistics: bool = False  # BatchNorm in tuned units: use the batch's, move the averages
    top_k: int = 1  # an image counts as right if its class is among the k largest logits
    seed: int = 0  # of the order of the images and of dropout
    device: str | None = None  # None: CUDA where there is one, else the CPU
    cache_bytes: int = 2 << 30  # memory for what frozen units make of both sets, to run them once
    bfloat16: bool = False  # train with bfloat16 products, for which many processors have units
    augment: Callable | None = None  # a function of every batch of training images, as it enters
    loss: Callable = nn.functional.cross_entropy  # of logits [B, classes] and labels [B]

    def __post_init__(self):
        for name in ("batch_size", "check_every", "patience", "max_epochs", "top_k"):
            _whole(name, getattr(self, name))
        for name in ("seed", "cache_bytes"):
            _whole(name, getattr(self, name), least=0)
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be above 0, not {self.lr}")


def _whole(name: str, value, least: int = 1) -> None:
    if not hasattr(value, "__index__") or value < least:
        raise ValueError(f"{name} must be a whole number from {least}, not {value!r}")


@dataclass
class Result:
    """One fine-tuned network."""

    net: nn.Sequential  # in evaluation mode, on the device; its frozen units are the task's own
    units: tuple[int, ...]  # the tuned units
    accuracy: float  # top-k accuracy of `net` on the validation set, in [0, 1]
    epochs: int  # epochs run, those after the returned state included
    seconds: float  # wall time
    history: list[tuple[int, float]]  # (epoch, validation accuracy); epoch 0 is the source network
    trained: int  # number of scalars trained
    diverged: bool = False  # a weight stopped being finite; `net` is from before that


@dataclass
class Selection:
    """What a selection algorithm chose, and all that it looked at."""

    chosen: int | str  # N_flex: a unit, or "all"
    best: int | str  # the arg max: line 7, 7, 6 of Algorithms 1, 2, 3; line 10 comes after it
    tuned: dict[int | str, Result]  # every network fine-tuned on the way
    proxies: dict[int, float] = field(default_factory=dict)  # validation accuracy of each proxy

    @property
    def result(self) -> Result:
        """The fine-tuned network N_flex."""
        return self.tuned[self.chosen]

    @property
    def tied(self) -> list[int | str]:
        """The candidates that share the arg max. `best`, the smallest unit, is the first."""
        a = self.proxies or {unit: one.accuracy for unit, one in self.tuned.items()}
        return [unit for unit in a if a[unit] == a[self.best]]


# ---------------------------------------------------------------- selection (sections 3 and 4)
# The numbers are the lines of the pseudo-code, whose inputs, N, D_train and D_val, are in a `Task`.
# `max` returns the first of equals: the smallest unit, and a single unit before "all".


def flex(task: Task) -> Selection:
    """Algorithm 1: tune each unit alone, tune all, take the best on the validation set."""
    tuned = {}
    for unit in candidates(task.net):  # 1
        tuned[unit] = fine_tune(task, unit)  # 2, and 3: its `.accuracy`
    tuned["all"] = fine_tune(task, "all")  # 5, and 6
    best = max(tuned, key=lambda unit: tuned[unit].accuracy)  # 7
    return Selection(chosen=best, best=best, tuned=tuned)


def fast_flex(task: Task) -> Selection:
    """Algorithm 2: tune all units, choose by the proxies' accuracy, tune the chosen unit."""
    ft_all, a = fine_tune(task, "all"), {}  # 1, and 2
    for unit in candidates(task.net):  # 3
        proxy = surgery(task.net, ft_all.net, unit)  # 4
        a[unit] = task.accuracy(proxy, shared=unit - 1)  # 5
    best = max(a, key=a.get)  # 7
    ft_best = fine_tune(task, best)  # 8, and 9
    chosen = best if ft_best.accuracy >= ft_all.accuracy else "all"  # 10
    return Selection(chosen=chosen, best=best, tuned={"all": ft_all, best: ft_best}, proxies=a)


def faster_flex(task: Task) -> Selection:
    """Algorithm 3: as fast-flex, with the proxies from a single epoch and without ft-all."""
    epoch, a = fine_tune(task, "all", epochs=1), {}  # 1
    for unit in candidates(task.net):  # 2
        proxy = surgery(task.net, epoch.net, unit)  # 3
        a[unit] = task.accuracy(proxy, shared=unit - 1)  # 4
    best = max(a, key=a.get)  # 6
    ft_best = fine_tune(task, best)  # 7
    return Selection(chosen=best, best=best, tuned={"all": epoch, best: ft_best}, proxies=a)


def candidates(net: nn.Sequential) -> list[int]:
    """Numbers of the units with parameters, in order. Others (a dropout) are on in "all" alone."""
    plain = isinstance(net, nn.Sequential) and type(net).forward is nn.Sequential.forward
    parts = vars(net).items() if plain else ()
    if [name for name, part in parts if isinstance(part, dict) and part] != ["_modules"]:
        raise ValueError("the network must be an nn.Sequential of units that adds nothing to them")
    counts = [len(list(unit.parameters())) for unit in net]
    if not any(counts) or sum(counts) != len(list(net.parameters())):
        raise ValueError("the units have no parameters, or two of them share some")
    return [number for number, count in enumerate(counts, 1) if count]


def surgery(net: nn.Sequential, tuned: nn.Sequential, unit: int) -> nn.Sequential:
    """`net` with `unit` (from 1), its parameters and buffers, of `tuned`. No unit is copied."""
    _whole("unit", unit)
    proxy = net[:]
    proxy[unit - 1] = tuned[unit - 1]
    return proxy


def certainty(task: Task, selection: Selection, delta: float = 0.05) -> dict:
    """How sure flex's choice is: its lead on D_val, and the bound O(sqrt(log L / |D_val|)) of 3.3.

    "lead" over the "runner_up", with its standard "error"; "bound": with probability 1 - delta all
    L + 1 accuracies are so near to those expected (Hoeffding, as if no epoch were chosen on D_val).
    """
    if selection.proxies or not 0 < delta < 1:
        raise ValueError("certainty is of flex alone, which tunes every candidate; 0 < delta < 1")
    others = {unit: one for unit, one in selection.tuned.items() if unit != selection.chosen}
    runner_up = max(others, key=lambda unit: others[unit].accuracy)
    won, lost = (task.right(one.net).double() for one in (selection.result, others[runner_up]))
    lead, n = won - lost, len(won)
    error = lead.std(correction=0).item() / n**0.5
    bound = math.sqrt(math.log(2 * len(selection.tuned) / delta) / (2 * n))
    return {"runner_up": runner_up, "lead": lead.mean().item(), "error": error, "bound": bound}


# ---------------------------------------------------------------- baselines (section 5.1)


def ft_all(task: Task) -> Result:
    """Fine-tune all units."""
    return fine_tune(task, "all")


def ft_fc(task: Task, n: int = 1) -> Result:
    """Fine-tune the last `n` units that have parameters."""
    _whole("n", n)
    return fine_tune(task, candidates(task.net)[-n:])


def ft_ss(task: Task) -> Result:
    """Fine-tune the last unit and, in every layer below it, scales and shifts of frozen weights.

    After Sun et al., "Meta-Transfer Learning for Few-Shot Learning", CVPR 2019: a scale from 1 for
    each kernel (output, input) of a convolution or output of a linear layer, a shift from 0 for
    each output. All else, BatchNorm too, stays as it is. In the returned network they are
    multiplied and added into the weights and biases, of which every such layer then has one.
    """
    scaled, last = copy.deepcopy(task.net), candidates(task.net)[-1]
    for layer in list(scaled[: last - 1].modules()):
        if parametrize.is_parametrized(layer):
            raise ValueError("ft_ss: a weight is parametrized already, as by weight_norm")
        for name, weight in list(layer.named_parameters(recurse=False)):
            delattr(layer, name)
            layer.register_buffer(name, weight.detach())  # a buffer is not trained
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            # Training a bias is training a shift from 0 that is added to it.
            zero = layer.weight.new_zeros(len(layer.weight))
            layer.bias = nn.Parameter(zero if layer.bias is None else layer.bias)
            parametrize.register_parametrization(layer, "weight", _Scale(layer.weight))
    settings = replace(task.settings, batch_statistics=False)
    result = fine_tune(replace(task, net=scaled, settings=settings), "all")
    plain = copy.deepcopy(surgery(task.net, result.net, last)).eval()
    for name, layer in result.net[: last - 1].named_modules():
        if hasattr(layer, "parametrizations") and "bias" in layer._parameters:
            plain.get_submodule(name).weight = nn.Parameter(layer.weight.detach())
            plain.get_submodule(name).bias = nn.Parameter(layer.bias.detach())
    return replace(result, net=plain)


class _Scale(nn.Module):
    def __init__(self, weight):  # convolution [out, in, ...]; linear layer [out, in]
        super().__init__()
        each = weight.shape[:2] if weight.dim() > 2 else weight.shape[:1]
        self.scale = nn.Parameter(weight.new_ones(each + (1,) * (weight.dim() - len(each))))

    def forward(self, weight):
        return weight * self.scale


# ---------------------------------------------------------------- training (section 5.1)


def fine_tune(task: Task, units: int | str | Iterable, epochs: int | None = None) -> Result:
    """Fine-tune `units` of N on D_train until the accuracy on D_val stops improving.

    `units`: a number from 1 to L, a name, several of these, or "all". The training ends as
    `Settings.patience` and `max_epochs` say. Returned is the state that validates best, the source
    network not among them; with a number of `epochs`, the last one; if a weight stops being finite,
    the one before. Every parameter of the units is trained, BatchNorm as the settings say. All else
    is frozen: its parameters and buffers stay as they are to the bit, its dropout is off.
    """
    numbers = task.numbers(units)
    if epochs is not None:
        _whole("epochs", epochs)
    if not task.results:  # first each unit takes a step on two images, or on one if a batch has one
        few = 1 if len(task.train[1]) % task.settings.batch_size == 1 else 2
        small, (x, y) = copy.copy(task), [tensor[:few] for tensor in task.train]
        small.train, small.val, small._outputs = (x, y), (x, y), (0, x, x)
        small.report = lambda text: None
        for unit in reversed(candidates(task.net)):  # the highest that fails is at fault
            with _refused(f"unit {label(task.net, unit)}, in training"):
                _train(small, (unit,), epochs=1)
    with _refused(f"unit {label(task.net, *numbers)}"):
        result = task.results.get((numbers, epochs)) or _train(task, numbers, epochs)
        if not result.trained:
            raise ValueError("no gradient reaches it: is there a no_grad in it, or above?")
    return task.results.setdefault((numbers, epochs), result)


def _train(task: Task, numbers: tuple[int, ...], epochs: int | None) -> Result:
    """`fine_tune` of these units, with no look at what was tuned before."""
    start, settings, below = time.perf_counter(), task.settings, numbers[0] - 1
    shared, x, _ = task.outputs(0 if settings.augment else below)
    frozen = {id(unit): unit for number, unit in enumerate(task.net, 1) if number not in numbers}
    net, y = copy.deepcopy(task.net, {**frozen}), task.train[1]  # copies share what is frozen
    tuned = nn.ModuleList(net[number - 1] for number in numbers).requires_grad_(True)
    optimizer = torch.optim.Adam(tuned.parameters(), settings.lr, fused=True)
    order = torch.Generator().manual_seed(settings.seed)
    history = [(0, task.source_accuracy)]
    best, state, diverged = history[0], copy.deepcopy(net, {**frozen}), False
    last = epochs or settings.max_epochs
    with torch.random.fork_rng(range(torch.cuda.device_count())), torch.enable_grad():
        torch.manual_seed(settings.seed)
        for epoch in range(1, last + 1):
            for module in tuned.train().modules():
                if isinstance(module, nn.modules.batchnorm._NormBase):
                    module.train(settings.batch_statistics)
            shuffled = torch.randperm(len(x), generator=order, device="cpu").to(x.device)
            for batch in shuffled.split(settings.batch_size):
                images = task.enter(x[batch], shared)
                images = settings.augment(images) if settings.augment else images
                with torch.autocast(x.device.type, torch.bfloat16, settings.bfloat16):
                    logits = net[shared:](images)  # (B, classes)
                loss = settings.loss(logits.float() if settings.bfloat16 else logits, y[batch])
                if loss.requires_grad:  # a unit may skip a batch, as with stochastic depth
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
            if not optimizer.state:
                break  # no gradient reaches the units
            if epoch % settings.check_every and epoch < last:
                continue
            if diverged := any(not weight.isfinite().all() for weight in tuned.parameters()):
                break  # after a loss that is NaN the weights are, too
            a = task.accuracy(net.eval(), below)
            history.append((epoch, a))
            left = (time.perf_counter() - start) * (last / epoch - 1)
            what = f"unit {label(net, *numbers)}: epoch {epoch}, validation {a:.3f}"
            task.report(f"{what}, at most {left:.0f} s left")
            if epochs or best[0] == 0 or a > best[1]:
                best, state = history[-1], copy.deepcopy(net, {**frozen})
            elif len(history) - history.index(best) > settings.patience:
                break
    trained, seconds = sum(w.numel() for w in optimizer.state), time.perf_counter() - start
    return Result(state.eval(), numbers, best[1], epoch, seconds, history, trained, diverged)


def show(text: str) -> None:
    """A line of progress on standard error, rewritten on a terminal: `Task(..., report=show)`."""
    if sys.stderr:  # it may be closed
        terminal, width = sys.stderr.isatty(), shutil.get_terminal_size().columns
        line = f"\r{text[: width - 1]}\x1b[K" if terminal else f"{text}\n" * bool(text)
        print(line, end="", file=sys.stderr, flush=True)


@dataclass(eq=False)
class Task:
    """N, D_train and D_val: what every algorithm is given, and what its networks have in common.

    Functions that are given the same task share N's frozen units (`net`), what these make of both
    sets (`outputs`), and the networks tuned so far (`results`), which are not tuned again.
    `report` gets a line of text after each validation.
    """

    net: nn.Sequential  # here a copy: frozen, in evaluation mode, on the device
    train: tuple[torch.Tensor, torch.Tensor]  # (x, y)
    val: tuple[torch.Tensor, torch.Tensor]
    settings: Settings = Settings()
    report: Callable[[str], None] = lambda text: None

    @torch.no_grad()
    def __post_init__(self):
        candidates(self.net)
        given, self.net, sets = self.net, nn.Sequential(), (self.train, self.val)
        with _refused("train and val: x must be uint8, float or int64 of one size, y int64 [N]"):
            for x, y in sets:
                good = x.dtype in (torch.uint8, torch.int64) or x.is_floating_point()
                good &= y.dtype == torch.int64 and y.dim() == 1 and len(y) > 0
                good &= x.shape == (len(y), *self.train[0].shape[1:])
                if not good:
                    raise ValueError(f"x is {x.dtype} {[*x.shape]}, y {y.dtype} {[*y.shape]}")
                if not x.isfinite().all():
                    raise ValueError("x has NaN or infinite values")
        device = self.settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
        with _refused(f"device {device}"):
            self.like = next(given.parameters()).to(device)  # the network's device and precision
        self.train, self.val = ([tensor.detach().to(device) for tensor in data] for data in sets)
        self.results: dict[tuple, Result] = {}
        self._outputs, self._kept = (0, self.train[0], self.val[0]), [0]
        labels, x = torch.cat([self.train[1], self.val[1]]), self.train[0]
        most = self.settings.cache_bytes / len(labels)  # bytes of a unit's output for one image
        one, two = self.enter(x[:1]), self.enter(x[[0, -1]])
        for number, (name, unit) in enumerate(given._modules.items(), 1):
            with _refused(f"unit {label(given, number)}"):
                # Each by itself: two units may share a dropout layer, which is on in one alone.
                unit = copy.deepcopy(unit).to(device).eval().requires_grad_(False)
                self.net.add_module(name, unit)
                two, *again = (unit(copy.deepcopy(two)) for _ in range(8))
                same = (two.nan_to_num().equal(other.nan_to_num()) for other in again)
                if torch.is_tensor(two) and not all(same):
                    raise ValueError("random in evaluation mode: frozen, it would run once")
                with contextlib.suppress(Exception):  # some units take no single image
                    one = unit(one)
                    if (len(one), len(two)) == (1, 2) and one.nbytes <= most:
                        self._kept.append(number)
        with _refused("the network must give logits [N, classes]"):
            classes = two.shape[1]
        if not 0 <= labels.min() <= labels.max() < classes or self.settings.top_k > classes:
            raise ValueError(f"labels and top_k must fit the network's {classes} classes")
        with _refused("the validation images"):
            self.source_accuracy = self.accuracy(self.net)

    def numbers(self, units: int | str | Iterable) -> tuple[int, ...]:
        """Units, by number or name or "all", as sorted numbers."""
        every, can = range(1, len(self.net) + 1), candidates(self.net)
        known = {label(self.net, n).partition(" ")[2]: n for n in every} | {n: n for n in every}
        wanted = every if units == "all" else units
        several = isinstance(wanted, Iterable) and not isinstance(wanted, str)
        numbers = {known.get(unit) for unit in (wanted if several else [wanted])}
        if None in numbers or not numbers & {*can}:
            raise ValueError(f"{units}: the units to tune are {[label(self.net, n) for n in can]}")
        return tuple(sorted(numbers))

    def outputs(self, most: int) -> tuple[int, torch.Tensor, torch.Tensor]:
        """(n, x_train, x_val): both sets after N's lowest n units; after none, the images.

        Frozen units give the same in every epoch, so they run once. n is the largest number up to
        `most` whose outputs can be kept. The units above it run again for every batch.
        """
        n = max(n for n in self._kept if n <= most)
        done, *sets = self._outputs if self._outputs[0] <= n else (0, self.train[0], self.val[0])
        if done < n:
            sets = [self.run(self.net[:n], x, done) for x in sets]
            self._outputs = n, *sets
        return n, *sets

    def right(self, net: nn.Sequential, shared: int = 0) -> torch.Tensor:
        """Is each image of D_val right? bool [N]. The `shared` lowest units of `net` are N's.

        Of equal logits the first counts as larger, as for `argmax`. NaN are never right.
        """
        n, _, x = self.outputs(shared)
        logits = self.run(net, x, n)  # (N, classes)
        largest = logits.argsort(dim=1, descending=True, stable=True)[:, : self.settings.top_k]
        return (largest == self.val[1][:, None]).any(1) & ~logits.isnan().any(1)

    def accuracy(self, net: nn.Sequential, shared: int = 0) -> float:
        """Top-k accuracy of `net` on D_val, in [0, 1]. Its `shared` lowest units are N's."""
        return self.right(net, shared).double().mean().item()

    @torch.no_grad()
    def run(self, net: nn.Sequential, x: torch.Tensor, n: int = 0) -> torch.Tensor:
        """The output of `net` for all of x, which is past its lowest n units, about 128 at once."""
        parts = x.tensor_split(math.ceil(len(x) / 128))  # of one image only if there is one
        return torch.cat([net[n:](self.enter(part, n)) for part in parts])

    def enter(self, x: torch.Tensor, n: int = 0) -> torch.Tensor:
        """A copy of a batch, which is past n units, for the next one, which may overwrite it.

        Images get the network's precision, uint8 as x / 255. Tokens, and what units hand on, stay.
        """
        if n or x.dtype == torch.int64:
            return x.to(self.like.device, copy=True)
        batch = x.to(self.like, copy=True)
        return batch.div_(255) if x.dtype == torch.uint8 else batch


def accuracy(net: nn.Sequential, data: tuple, settings: Settings = Settings()) -> float:
    """Top-k accuracy of `net`, in evaluation mode, on `data`: in [0, 1]."""
    return Task(net, tuple(part[:2] for part in data), data, settings).source_accuracy


def label(net: nn.Sequential, *units: int | str) -> str:
    """Units for a reader, by number and, where they have one, by name: "8 layer4.0"."""
    if units == ("all",) or len(units) == len(net) > 1:
        return "all"
    names = ["" if name.isdigit() else f" {name.replace('/', '.')}" for name in net._modules]
    return ", ".join(f"{unit}{names[unit - 1]}" for unit in units)


@contextlib.contextmanager
def _refused(what: str):
    """Whatever goes wrong is a ValueError of one line that begins with `what`."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(f"{what}: {reason}") from error


# ---------------------------------------------------------------- any model as units


def split(model: nn.Module, x: torch.Tensor, units: int | str | Iterable[str] = 1) -> nn.Sequential:
    """`model` as an `nn.Sequential` of units that shares its weights, found by running it on x.

    It is cut where one tensor passes. Modules stay whole but for `nn.Sequential`s, module lists,
    those that `units` names, and, where it is a number, the largest until there are so many units.
    What has no weight matrix, like a norm, joins the unit before. Of a dictionary or tuple the
    logits are taken.
    Raises ValueError unless the units give what the model gives, to the bit: in evaluation mode on
    x [N, ...] and x[:1], and in training mode on x.
    """
    opened = {units} if isinstance(units, str) else set() if isinstance(units, int) else {*units}
    sizes = {name: sum(w.numel() for w in m.parameters()) for name, m in model.named_modules()}
    if unknown := opened - {*sizes}:
        raise ValueError(f"the model has no modules of these names: {', '.join(unknown)}")
    with _refused("cannot split (write the nn.Sequential, assert torch.equal(net(x), model(x)))"):
        net = _cut(model, x, opened)
    for name in sorted(sizes, key=sizes.get, reverse=True)[1:] if isinstance(units, int) else ():
        if len(net) < units and sizes[name] * units > sizes[""]:  # it is larger than its share
            with contextlib.suppress(Exception):
                more = _cut(model, x, opened | {name})
                if len(more) > len(net):
                    net, opened = more, opened | {name}
    return net


def original(net: nn.Sequential, model: nn.Module) -> dict[str, torch.Tensor]:
    """The state of `model` with the weights of `net`, which was split from it, by its own names."""
    state = model.state_dict()
    state.update({name.split(".body.", 1)[1]: w for name, w in net.state_dict().items()})
    return state


@torch.no_grad()
def _cut(model: nn.Module, x: torch.Tensor, opened: set[str]) -> nn.Sequential:
    """`split` with these modules opened. Raises whatever goes wrong."""
    calls, twin, parts = [], copy.deepcopy(model).eval(), {}  # parts: the modules that stay whole
    lists = nn.Sequential, nn.ModuleList, nn.ModuleDict
    for name, module in model.named_modules():
        opens = type(module) in lists or any(f"{one}.".startswith(f"{name}.") for one in opened)
        if name and not opens and not any(name.startswith(f"{part}.") for part in parts):
            parts[name] = module
            record = partial(lambda name, _, *call: calls.append((name, *call)), name)
            twin.get_submodule(name).register_forward_hook(record, with_kwargs=True)
    logits, names = _tensor(twin(x)), [name for name, *_ in calls]
    weights = [{*parts[name].parameters()} for name in names]
    matrix = [any(weight.dim() > 1 for weight in some) for some in weights]
    outs = {name: out for name, *_, out in calls} | {"": x}
    outs = tree_map_only(torch.Tensor, lambda v: v.to("meta"), outs)
    unit, starts = partial(_Unit, model, parts, outs), [0]
    for place, (name, *given, _) in enumerate(calls):
        shared = set().union(*weights[:place]) & set().union(*weights[place:])
        if any(matrix[:place]) and matrix[place] and not shared:
            with contextlib.suppress(Exception):
                rest = copy.deepcopy(unit(names[place:], name)).eval()
                if torch.equal(rest(_tensor(given)), logits):
                    starts.append(place)
    net = nn.Sequential()
    for start, end in zip(starts, [*starts[1:], len(names)]):
        title = names[matrix.index(True, start)].replace(".", "/")
        net.add_module(title, unit(names[start:end], names[start] if start else ""))
    for images, training in ((x, False), (x[:1], False), (x, True)):
        given = []
        for one in (model, net):
            with torch.random.fork_rng(range(torch.cuda.device_count())):
                torch.manual_seed(0)
                given.append(_tensor(copy.deepcopy(one).train(training)(images)))
        if not torch.equal(*given):
            raise ValueError(f"the units differ for {len(images)} images, {training=}")
    return net


def _tensor(value) -> torch.Tensor:
    """The logits that a model gives, or the first tensor that a module is called with."""
    value = value["logits"] if isinstance(value, dict) else value
    return next(leaf for leaf in tree_iter(value) if torch.is_tensor(leaf))


class _End(BaseException):
    """The end of a unit, with what it hands on."""


class _Unit(nn.Module):
    """The model's `forward` from the call of a module, `start`, to that of one of the next unit.

    In the place of other units' modules are stubs. They give NaN until `start` is called. After
    that the call of one ends the unit.
    """

    def __init__(self, model, parts, outs, own, start):
        super().__init__()
        self.outs, self.start = outs, start
        kept = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        for name, part in parts.items():
            stub = nn.Module()
            stub.forward = partial(self.stub, name)
            kept[id(part)] = part if name in own or not part.state_dict() else stub
        self.body = copy.deepcopy(model, kept)
        inside = {weight for part in parts.values() for weight in part.parameters()}
        for module in self.body.modules() if start else ():  # other weights are the first unit's
            for name, weight in [*module.named_parameters(recurse=False)]:
                if weight not in inside:
                    delattr(module, name)
                    module.register_buffer(name, weight.detach() * math.nan, persistent=False)

    def forward(self, x):
        self.rows, self.device, self.begun = len(x), x.device, False
        start, before = self.body.get_submodule(self.start), contextlib.ExitStack()
        before.enter_context(torch.random.fork_rng([x.device] if x.is_cuda else []))
        begin = partial(self.begin, x, before)
        try:
            with before, start.register_forward_pre_hook(begin, with_kwargs=True, prepend=True):
                return _tensor(self.body(self.stub("")))
        except _End as end:
            return end.args[0]

    def begin(self, x, before, _, *given):
        """From here on all is real: the tensor given, and random numbers."""
        before.close()
        self.begun, first = True, _tensor(given)
        return tree_map(lambda v: x if v is first else v, given)

    def stub(self, name, *given, **named):
        if self.begun:
            raise _End(_tensor((given, named)))
        return tree_map_only(torch.Tensor, self.nothing, self.outs[name])

    def nothing(self, v):
        """NaN or 0 in the shape of v, with a row for each image."""
        shape = (self.rows, *v.shape[1:]) if v.shape[:1] == self.outs[""].shape[:1] else v.shape
        value = math.nan if v.is_floating_point() else 0
        return torch.full(shape, value, dtype=v.dtype, device=self.device)
