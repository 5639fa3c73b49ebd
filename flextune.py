"""Flex-tuning: find the one unit of a pretrained network to fine-tune on different-looking data.

Royer & Lampert, "A Flexible Selection Scheme for Minimum-Effort Transfer Learning", WACV 2020.
This file needs PyTorch alone, so it can be copied into any project:

    selection = flex(net, (x_train, y_train), (x_val, y_val))
    selection.chosen, selection.result.accuracy, selection.result.net

The network N = N_L o ... o N_1 is an `nn.Sequential` whose children are its units, numbered 1 to L
from the input, and gives logits [N, classes]. Data are pairs (x, y) of tensors: x [N, C, H, W]
uint8 or float, y [N] int64. uint8 images enter the network as float32 in [0, 1] (x / 255).
No function here changes the network it is given, or uses the global random state.
"""

import contextlib
import copy
import functools
import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from itertools import takewhile

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrize

Data = tuple[torch.Tensor, torch.Tensor]
Units = int | str | Iterable[int]  # one unit, "all", or several units

CHUNK = {False: 128, True: 512}  # images per forward pass without gradients; True: on CUDA


@dataclass(frozen=True)
class Settings:
    """The training protocol (section 5.1), the same for every network of a selection."""

    lr: float = 1e-3  # of Adam; the paper: 1e-3 for the small networks, 1e-4 for Inception2
    batch_size: int = 64  # images per step; the last batch of an epoch may be smaller
    check_every: int = 5  # epochs from one validation to the next; the paper: 5 to 10
    patience: int = 5  # validations in a row without a better accuracy that end the training
    max_epochs: int = 300  # the training ends here even if the accuracy still improves
    batch_statistics: bool = False  # BatchNorm in tuned units: use and update the batch's
    top_k: int = 1  # an image counts as right if its class is among the k largest logits
    seed: int = 0  # of the order of the images and of dropout
    device: str | None = None  # None: CUDA where there is one, else the CPU
    cache_bytes: int = 2 << 30  # the frozen units' output is kept up to this size, else recomputed
    bfloat16: bool = False  # train with bfloat16 products, for which many processors have units
    cuda_graph: bool = True  # on CUDA: capture the step; a network that waits for the GPU cannot be

    def __post_init__(self):
        for name in ("batch_size", "check_every", "patience", "max_epochs", "top_k"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be at least 1, not {value} (a whole number)")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive and finite, not {self.lr}")


@dataclass
class Result:
    """One fine-tuned network."""

    net: nn.Sequential  # in evaluation mode; frozen units are shared, `copy.deepcopy` has its own
    units: tuple[int, ...]  # the tuned units
    accuracy: float  # top-k accuracy of `net` on the validation set, in [0, 1]
    epochs: int  # epochs run, those after the returned checkpoint included
    seconds: float  # wall time
    history: list[tuple[int, float]]  # (epoch, validation accuracy); epoch 0 is the source network
    trained: int  # number of scalars trained
    diverged: bool  # the loss or a weight stopped being finite; `net` is from before that


@dataclass
class Selection:
    """What a selection algorithm chose, and all that it looked at."""

    chosen: int | str  # N_flex: a unit, or "all"
    best: int | str  # the arg max: line 7, 7 and 6; in fast-flex before line 10 looks at ft-all
    tuned: dict[int | str, Result]  # every network fine-tuned on the way
    proxies: dict[int, float] = field(default_factory=dict)  # each unit's, on the validation set

    @property
    def result(self) -> Result:
        """The fine-tuned network N_flex."""
        return self.tuned[self.chosen]

    @property
    def epochs(self) -> int:
        """Epochs of all the fine-tunings (Table 1)."""
        return sum(result.epochs for result in self.tuned.values())

    @property
    def seconds(self) -> float:
        """Wall time of all the fine-tunings; the proxies' forward passes are not in it."""
        return sum(result.seconds for result in self.tuned.values())


# ---------------------------------------------------------------- networks


def candidates(net: nn.Sequential) -> list[int]:
    """Numbers of the units that have parameters, in order.

    Raises ValueError if `net` is not a plain `nn.Sequential` of independent units, or has none.
    """
    if not isinstance(net, nn.Sequential) or type(net).forward is not nn.Sequential.forward:
        raise ValueError(f"the network must be a plain nn.Sequential of units, not {type(net)}")
    counts = [len(list(unit.parameters())) for unit in net]
    if sum(counts) != len(list(net.parameters())):
        raise ValueError("two units share parameters: one cannot be tuned without the other")
    if not any(counts):
        raise ValueError("no unit of the network has parameters")
    return [number for number, count in enumerate(counts, 1) if count]


def surgery(net: nn.Sequential, tuned: nn.Sequential, unit: int) -> nn.Sequential:
    """`net` with `unit` (from 1), its parameters and buffers, of `tuned`. No unit is copied.

    Raises ValueError if there is no such unit.
    """
    if unit not in range(1, len(net) + 1):
        raise ValueError(f"units are numbered 1 to {len(net)}: there is no {unit}")
    name = _names(net)[unit - 1]
    return nn.Sequential(OrderedDict(zip(_names(net), net)) | {name: tuned[unit - 1]})


def _names(net: nn.Sequential) -> list[str]:
    """Of the units; `named_children` has a module that is two of them, an activation say, once."""
    return list(net._modules)


@contextlib.contextmanager
def _enough_memory():
    """Running out of it is a MemoryError, which says what to lower."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            hint = "out of memory: lower Settings.cache_bytes, then batch_size"
            raise MemoryError(hint) from error
        raise


def accuracy(net: nn.Sequential, data: Data, settings: Settings = Settings()) -> float:
    """Top-k accuracy of `net`, in evaluation mode, on `data`: in [0, 1].

    Raises ValueError for a network or data that cannot be worked with.
    """
    return correct(net, data, settings).sum().item() / len(data[1])


@_enough_memory()
def correct(net: nn.Sequential, data: Data, settings: Settings = Settings()) -> torch.Tensor:
    """Is each image of `data` right by `top_k`? bool [N], on the CPU. Raises as `accuracy`."""
    source = _SOURCE.get() or _Source(net, settings)
    units, load = source.prepare(net, settings, data=data)
    rest, x = source.run(units, source.common(units), load, settings.cache_bytes, data[0])
    return _correct(lambda x: rest(load(x)), x, data[1], settings.top_k).cpu()


def _accuracy(forward, x: torch.Tensor, y: torch.Tensor, top_k: int) -> float:
    return _correct(forward, x, y, top_k).sum().item() / len(y)


def _exact():
    """On CUDA, convolutions that do not vary, and that round to TF32 only if matrix products do."""
    tf32 = torch.get_float32_matmul_precision() != "highest"
    return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=tf32)


@torch.no_grad()
@_exact()
def _correct(forward, x: torch.Tensor, y: torch.Tensor, top_k: int) -> torch.Tensor:
    """Of equal logits the first counts as larger; NaN are never right."""
    hits = []
    for images, classes in zip(x.split(CHUNK[x.is_cuda]), y.split(CHUNK[x.is_cuda])):
        logits = forward(images)  # (B, classes)
        own = classes.to(logits.device)[:, None]  # (B, 1)
        a, index = logits.gather(1, own), torch.arange(logits.shape[1], device=logits.device)
        ahead = (logits > a) | ((logits == a) & (index < own))  # (B, classes)
        hits.append((ahead.sum(1) < top_k) & ~logits.isnan().any(1))
    return torch.cat(hits)


def _load(x: torch.Tensor, net: nn.Sequential, layout=torch.contiguous_format) -> torch.Tensor:
    """A batch as `net` takes it: on its device, in its precision, in the memory layout.

    It is a copy: a network that begins with an in-place layer must not change the data.
    """
    weight = next(net.parameters())
    batch = x.detach().to(weight.device, copy=True).to(weight.dtype)
    if x.dtype == torch.uint8:
        batch.div_(255)
    return batch.contiguous(memory_format=layout if x.dim() == 4 else torch.contiguous_format)


@torch.no_grad()
def _layout(net: nn.Sequential, x: torch.Tensor) -> torch.memory_format:
    """Brings `net` to the faster layout, channels-last, if it works in that: `view` may not."""
    try:
        net.to(memory_format=torch.channels_last)(_load(x[:1], net, torch.channels_last))
        return torch.channels_last
    except RuntimeError:
        net.to(memory_format=torch.contiguous_format)
        return torch.contiguous_format


def _check_pair(name: str, data: Data) -> None:
    """Raises ValueError, in one line, for what is no pair of images and labels."""
    if not (isinstance(data, tuple | list) and len(data) == 2):
        raise ValueError(f"{name}: must be a pair (images, labels), not {type(data)}")
    x, y = data
    if not all(isinstance(tensor, torch.Tensor) and tensor.dim() for tensor in data):
        raise ValueError(f"{name}: images and labels must be tensors, not {type(x)}, {type(y)}")
    if len(x) == 0:
        raise ValueError(f"{name}: there are no images")
    if y.dtype != torch.int64 or y.shape != x.shape[:1]:
        raise ValueError(
            f"{name}: {len(x)} images need int64 labels [{len(x)}], not {y.dtype} {list(y.shape)}"
        )
    if x.dtype != torch.uint8 and not (x.is_floating_point() and x.isfinite().all()):
        raise ValueError(f"{name}: images must be uint8, or float without NaN and infinity")


@torch.no_grad()
def _check(net: nn.Sequential, name: str, data: Data, settings: Settings) -> None:
    """Raises ValueError, in one line, for data that `net` cannot be trained or tested on."""
    _check_pair(name, data)
    x, y = data
    try:
        logits = net(_load(x[:2], net))
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise ValueError(f"{name}: images {list(x.shape[1:])} do not fit: {reason}") from error
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2:
        raise ValueError("the network must give logits [N, classes]")
    classes = logits.shape[1]
    if y.min() < 0 or y.max() >= classes:
        raise ValueError(f"{name}: labels {y.min()}...{y.max()}, but {classes} classes in the net")
    if settings.top_k > classes:
        raise ValueError(f"top_k is {settings.top_k}, but there are {classes} classes")


# ---------------------------------------------------------------- what networks share

_SOURCE = ContextVar("_SOURCE", default=None)


@contextlib.contextmanager
def sharing(net: nn.Sequential, settings: Settings = Settings()):
    """Within it, the networks tuned from `net` share its units, and what these compute.

    Neither `net` nor the data may be changed meanwhile, and all is on one device. The selection
    algorithms do this by themselves; around several of them it saves their common work.
    """
    token = _SOURCE.set(_source(net, settings))
    try:
        yield
    finally:
        _SOURCE.reset(token)


def _source(net: nn.Sequential, settings: Settings) -> "_Source":
    shared = _SOURCE.get()
    return shared if shared and shared.net is net else _Source(net, settings)


def _shared(algorithm):
    @functools.wraps(algorithm)
    def within(net, train, val, settings=Settings(), tune=fine_tune):
        with sharing(net, settings):
            return algorithm(net, train, val, settings, tune)

    return within


class _Source:
    """A source network, frozen, and what is the same for all networks that are tuned from it.

    They share its units, of which one copy stands on the device, and what these compute.
    """

    def __init__(self, net: nn.Sequential, settings: Settings):
        candidates(net)
        self.net, self.names = net, _names(net)
        home = next(net.parameters()).device
        device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device {device}: {str(error).splitlines()[0]}") from error
        self.units = self._copies(device)
        self.device = next(nn.ModuleList(self.units).parameters()).device
        self.home = self.units if home == self.device else self._copies(home)
        self.copies = dict(zip((*net, *self.home, *self.units), self.units * 3))
        self.kept = {}  # images: (number of units, their output)
        self.accuracies = {}  # images, labels, k: accuracy of the source network

    def _copies(self, device) -> list[nn.Module]:
        """Each unit by itself, since two may share a dropout layer."""
        return [copy.deepcopy(unit).to(device).eval().requires_grad_(False) for unit in self.net]

    def prepare(self, net: nn.Sequential, settings: Settings, **sets: Data):
        """The units of `net` on the device, the source's own where they are its, and `_load`.

        Raises ValueError if `net` cannot work on one of the `sets`.
        """
        candidates(net)
        units = [
            self.copies[unit] if unit in self.copies else copy.deepcopy(unit).to(self.device).eval()
            for unit in net
        ]
        net = nn.Sequential(*units).eval()
        for name, data in sets.items():
            _check(net, name, data, settings)
        x, _ = data
        return units, functools.partial(_load, net=net, layout=_layout(net, x))

    def common(self, units: list[nn.Module]) -> int:
        """How many of the lowest units are the source's."""
        pairs = zip(units, self.units)
        return sum(1 for _ in takewhile(lambda pair: pair[0] is pair[1], pairs))

    @torch.no_grad()
    @_exact()
    def run(self, units: list[nn.Module], frozen: int, load, cache_bytes: int, *sets: torch.Tensor):
        """What remains to be run of `units` for every batch, and the tensors to run it on.

        The output of the lowest `frozen` units, which are the source's, is the same every time. It
        is kept on the device, from as high as it fits `cache_bytes`; of no unit, that is the images
        themselves, and uint8 stays uint8.
        """
        images, place, one = sum(map(len, sets)), 0, sets[0][:1]
        out = load(one)
        for number, unit in enumerate(units[:frozen], 1):
            out = unit(out)
            # Units may hand on more than a tensor.
            if isinstance(out, torch.Tensor) and out.nbytes * images <= cache_bytes:
                place, one = number, out
        rest = nn.Sequential(*units[place:])
        if one.nbytes * images > cache_bytes:
            return rest, *sets
        return rest, *(self._output(x, place, one, load) for x in sets)

    def _output(self, x: torch.Tensor, place: int, one: torch.Tensor, load) -> torch.Tensor:
        """The output of the lowest `place` units on `x`; `one` is that of an image."""
        done, out = self.kept.get(x, (0, x))
        if done > place:
            done, out = 0, x
        if place == 0:
            out = out.to(self.device)
        elif done < place:
            below, before = nn.Sequential(*self.units[done:place]), out
            last = one.dim() == 4 and one.is_contiguous(memory_format=torch.channels_last)
            layout = torch.channels_last if last else torch.contiguous_format
            shape = len(x), *one.shape[1:]
            out = torch.empty(shape, dtype=one.dtype, device=self.device, memory_format=layout)
            for start in range(0, len(x), CHUNK[out.is_cuda]):
                part = slice(start, start + CHUNK[out.is_cuda])
                out[part] = below(load(before[part]))
        self.kept[x] = place, out
        return out

    def network(self, tuned: dict[int, nn.Module]) -> nn.Sequential:
        """The source network with its units of some numbers replaced, on its own device."""
        home = next(nn.ModuleList(self.home).parameters()).device
        units = [
            tuned[number].to(home) if number in tuned else unit
            for number, unit in enumerate(self.home, 1)
        ]
        return nn.Sequential(OrderedDict(zip(self.names, units))).eval()


# ---------------------------------------------------------------- training (section 5.1)


@_enough_memory()
def fine_tune(
    net: nn.Sequential,
    units: Units,
    train: Data,
    val: Data,
    settings: Settings = Settings(),
    epochs: int | None = None,
    report: Callable[[int, float], None] = lambda epoch, accuracy: None,
) -> Result:
    """Fine-tune `units` of `net` on `train` until the accuracy on `val` stops improving.

    `units` is a number from 1 to L, several of them, or "all". The state with the best validation
    is returned, the source network not being one of them; with a number of `epochs`, the last
    state. In the units every parameter is trained, whatever its `requires_grad`, and BatchNorm
    keeps its statistics unless the settings say otherwise. All else is frozen: parameters and
    buffers stay as they are, dropout is off. Protocol of section 5.1.
    `report(epoch, accuracy)` is called after each validation.

    Raises ValueError for a network, units or data that cannot be worked with, and MemoryError.
    """
    start = time.perf_counter()
    if epochs is not None and epochs < 1:
        raise ValueError(f"epochs must be at least 1, not {epochs}")
    numbers = _numbers(net, units)
    source = _source(net, settings)
    all_units, load = source.prepare(net, settings, train=train, val=val)
    trained = nn.ModuleList(copy.deepcopy(all_units[number - 1]) for number in numbers)
    trained.requires_grad_(True)
    for number, unit in zip(numbers, trained):
        all_units[number - 1] = unit
    below, images = numbers[0] - 1, (train[0], val[0])
    if images[0].shape[1:] != images[1].shape[1:]:
        sizes = " and ".join(str(list(x.shape[1:])) for x in images)
        raise ValueError(f"images for training and validation differ in size: {sizes}")
    rest, x_train, x_val = source.run(all_units, below, load, settings.cache_bytes, *images)
    y_train, y_val = train[1].to(x_train.device), val[1].to(x_val.device)
    captured = settings.cuda_graph and x_train.is_cuda
    device, precision = source.device.type, next(trained.parameters()).dtype

    def forward(x):
        return rest(load(x))

    def validate():
        trained.eval()
        return _accuracy(forward, x_val, y_val, settings.top_k)

    def step(batch):
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, settings.bfloat16, cache_enabled=False):
            logits = forward(x_train[batch])
        loss = cross_entropy(logits.to(precision), y_train[batch].to(source.device))
        loss.backward()
        optimizer.step()
        losses.add_(loss.detach())

    with _reproducible(source.device, settings.seed), _same_dropout(trained), torch.enable_grad():
        order = torch.Generator().manual_seed(settings.seed)
        optimizer = torch.optim.Adam(
            trained.parameters(), lr=settings.lr, fused=True, capturable=captured
        )
        take = _Captured(step, source.device) if captured else step
        key = *val, settings.top_k
        if key not in source.accuracies:
            source.accuracies[key] = validate()
        history = [(0, source.accuracies[key])]
        best, state, stale = history[0], copy.deepcopy(trained.state_dict()), 0
        losses, diverged = torch.zeros((), device=source.device), False  # looked at when validating
        last = settings.max_epochs if epochs is None else epochs
        for epoch in range(1, last + 1):
            _train_mode(trained, settings.batch_statistics)
            shuffled = torch.randperm(len(x_train), generator=order).to(x_train.device)
            for batch in shuffled.split(settings.batch_size):
                take(batch)
            if epoch % settings.check_every and epoch < last:
                continue
            sums = [weight.detach().sum() for weight in trained.parameters()]
            diverged = not torch.stack([losses, *sums]).isfinite().all().item()
            if diverged:
                break
            history.append((epoch, validate()))
            report(*history[-1])
            if epochs or best[0] == 0 or history[-1][1] > best[1]:
                best, state, stale = history[-1], copy.deepcopy(trained.state_dict()), 0
            else:
                stale += 1
                if stale == settings.patience:
                    break
        optimizer.zero_grad()  # no memory for gradients in the result

    trained.load_state_dict(state)
    return Result(
        net=source.network(dict(zip(numbers, trained.eval()))),
        units=numbers,
        accuracy=best[1],
        epochs=epoch,
        seconds=time.perf_counter() - start,
        history=history,
        trained=sum(weight.numel() for weight in trained.parameters()),
        diverged=diverged,
    )


def _numbers(net: nn.Sequential, units: Units) -> tuple[int, ...]:
    """`units` as sorted numbers. Raises ValueError if there is nothing to tune in them."""
    tunable, numbers = candidates(net), range(1, len(net) + 1)
    if units != "all":
        chosen = list(units) if isinstance(units, Iterable) else [units]
        if any(unit not in numbers for unit in chosen):
            raise ValueError(f"units are numbered 1 to {len(net)}: there is no {units}")
        numbers = sorted({int(unit) for unit in chosen})
    if not set(numbers) & set(tunable):
        raise ValueError(f"units {list(numbers)} have no parameters; those that do: {tunable}")
    return tuple(numbers)


@contextlib.contextmanager
def _reproducible(device: torch.device, seed: int):
    """Dropout from `seed`, the random state outside untouched; on CUDA, no kernel that varies."""
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus), _exact():
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        yield


@contextlib.contextmanager
def _same_dropout(units: nn.Module):
    """Masks are drawn in the order of memory: the plain one, whatever the layout of the rest."""
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
        for module in units.modules()
        if isinstance(module, nn.modules.dropout._DropoutNd)
    ]
    yield
    for hook in hooks:
        hook.remove()


class _Captured:
    """A training step as CUDA graphs, one for each size of batch.

    The kernels of a small network take less time than their launches, which a graph saves.
    """

    EAGER = 100  # steps of a size before it is captured, which takes about as long as they do

    def __init__(self, step, device):
        self.step, self.steps, self.graphs = step, Counter(), {}
        self.stream = torch.cuda.Stream(device)  # capture needs one of its own

    def __call__(self, batch):
        size, current = len(batch), torch.cuda.current_stream(batch.device)
        self.steps[size] += 1
        if self.steps[size] <= self.EAGER:
            self.stream.wait_stream(current)
            with torch.cuda.stream(self.stream):
                self.step(batch)
            current.wait_stream(self.stream)
            return
        if size not in self.graphs:
            graph, place = torch.cuda.CUDAGraph(), batch.clone()
            try:
                with torch.cuda.graph(graph, stream=self.stream):
                    self.step(place)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise ValueError("the network needs Settings(cuda_graph=False)") from error
            self.graphs[size] = graph, place
        graph, place = self.graphs[size]
        place.copy_(batch)
        graph.replay()


def _train_mode(units: nn.Module, batch_statistics: bool) -> None:
    """Dropout on; BatchNorm's statistics as the setting says."""
    units.train()
    for module in units.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.train(batch_statistics)


# ---------------------------------------------------------------- selection (sections 3 and 4)
#
# The number after each line is that of the pseudo-code. `tune` stands for "fine-tune ... on D_train
# until accuracy on D_val stops improving"; a caller that needs a network in several algorithms
# passes a `fine_tune` that remembers. Units without parameters are no candidates.
# `max` returns the first of equals: the smallest unit, and a single unit before "all".


@_shared
def flex(net, train: Data, val: Data, settings=Settings(), tune=fine_tune) -> Selection:
    """Algorithm 1: tune each unit alone, tune all, take the best on the validation set.

    Raises ValueError as `fine_tune` does.
    """
    tuned, a = {}, {}
    for unit in candidates(net):  # 1
        tuned[unit] = tune(net, unit, train, val, settings)  # 2
        a[unit] = tuned[unit].accuracy  # 3
    # 4: end for
    tuned["all"] = tune(net, "all", train, val, settings)  # 5
    a["all"] = tuned["all"].accuracy  # 6
    best = max(a, key=a.get)  # 7
    return Selection(chosen=best, best=best, tuned=tuned)


@_shared
def fast_flex(net, train: Data, val: Data, settings=Settings(), tune=fine_tune) -> Selection:
    """Algorithm 2: tune all units, choose by the proxies' accuracy, tune the chosen unit.

    Raises ValueError as `fine_tune` does.
    """
    tuned, a = {}, {}
    tuned["all"] = tune(net, "all", train, val, settings)  # 1
    a_all = tuned["all"].accuracy  # 2
    for unit in candidates(net):  # 3
        proxy = surgery(net, tuned["all"].net, unit)  # 4
        a[unit] = accuracy(proxy, val, settings)  # 5
    # 6: end for
    best = max(a, key=a.get)  # 7
    tuned[best] = tune(net, best, train, val, settings)  # 8
    a_best = tuned[best].accuracy  # 9
    chosen = best if a_best >= a_all else "all"  # 10
    return Selection(chosen=chosen, best=best, tuned=tuned, proxies=a)


@_shared
def faster_flex(net, train: Data, val: Data, settings=Settings(), tune=fine_tune) -> Selection:
    """Algorithm 3: as fast-flex, with the proxies from a single epoch and without ft-all.

    Raises ValueError as `fine_tune` does.
    """
    tuned, a = {}, {}
    tuned["all"] = tune(net, "all", train, val, settings, epochs=1)  # 1
    for unit in candidates(net):  # 2
        proxy = surgery(net, tuned["all"].net, unit)  # 3
        a[unit] = accuracy(proxy, val, settings)  # 4
    # 5: end for
    best = max(a, key=a.get)  # 6
    tuned[best] = tune(net, best, train, val, settings)  # 7
    return Selection(chosen=best, best=best, tuned=tuned, proxies=a)


@dataclass
class Certainty:
    """How sure flex's choice is, accuracies in [0, 1]. See `certainty`."""

    runner_up: int | str  # the best of the other candidates, the first of equals
    lead: float  # validation accuracy of the chosen network minus that of the runner-up
    error: float  # standard error of the lead: both networks see the same images
    bound: float  # on |validation - expected accuracy|, for all candidates at once


def certainty(
    selection: Selection, val: Data, settings: Settings = Settings(), delta: float = 0.05
) -> Certainty:
    """The lead of flex's choice on `val`, and the bound of section 3.3, O(sqrt(log L / |D_val|)).

    For a fixed network, Hoeffding's inequality bounds the probability that its accuracies on n
    images and in expectation are more than b apart by 2 exp(-2 n b^2). With a union over the
    candidates, in flex L + 1, all are within sqrt(log(2 (L + 1) / delta) / 2n) with probability
    1 - delta. Both figures take the networks as given, but the epoch of each was chosen on the same
    images. For flex alone: the other algorithms do not train every candidate.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta must be between 0 and 1, not {delta}")
    others = [unit for unit in selection.tuned if unit != selection.chosen]
    runner_up = max(others, key=lambda unit: selection.tuned[unit].accuracy)
    won, lost = (
        correct(selection.tuned[unit].net, val, settings).double()
        for unit in (selection.chosen, runner_up)
    )
    n = len(won)
    return Certainty(
        runner_up=runner_up,
        lead=(won - lost).mean().item(),
        error=(won - lost).std(correction=0).item() / n**0.5,
        bound=math.sqrt(math.log(2 * len(selection.tuned) / delta) / (2 * n)),
    )


# ---------------------------------------------------------------- baselines (section 5.1)


def source(net, train: Data, val: Data, settings=Settings(), tune=fine_tune) -> Result:
    """The source network as it is; `train` and `tune` are there to be called like the others."""
    start = time.perf_counter()
    a = accuracy(net, val, settings)
    return Result(
        net=copy.deepcopy(net).eval(),
        units=(),
        accuracy=a,
        epochs=0,
        seconds=time.perf_counter() - start,
        history=[(0, a)],
        trained=0,
        diverged=False,
    )


def ft_all(net, train: Data, val: Data, settings=Settings(), tune=fine_tune) -> Result:
    """Fine-tune all units."""
    return tune(net, "all", train, val, settings)


def ft_fc(net, train: Data, val: Data, settings=Settings(), n: int = 1, tune=fine_tune) -> Result:
    """Fine-tune the last `n` units (of those that have parameters). Raises ValueError if n < 1."""
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    return tune(net, candidates(net)[-n:], train, val, settings)


def ft_ss(net, train: Data, val: Data, settings=Settings(), tune=fine_tune) -> Result:
    """Fine-tune the last unit and, in every layer below it, scales and shifts of frozen weights.

    After Sun et al., "Meta-Transfer Learning for Few-Shot Learning", CVPR 2019: a convolution has
    a scale for each kernel (output, input), a linear layer for each output, starting at 1; both
    have a shift of each output, starting at 0. Everything else, BatchNorm too, stays as it is.
    The returned network has the scales and shifts multiplied and added into weights and biases,
    so a layer that had no bias now has one. Raises ValueError as `fine_tune` does, and for weights
    that are parametrized or stand in two layers.
    """
    last = candidates(net)[-1]
    scaled = copy.deepcopy(net)
    layers, tuned_whole, seen = [], set(scaled[last - 1].modules()), set()
    for name, layer in list(scaled.named_modules()):
        if layer in tuned_whole:
            continue
        own = set(layer.parameters(recurse=False))
        if own & seen or parametrize.is_parametrized(layer):
            raise ValueError(f"ft-ss: the weights of layer {name} are shared or parametrized")
        seen |= own
        for key, weight in list(layer.named_parameters(recurse=False)):
            delattr(layer, key)
            layer.register_buffer(key, weight.detach())  # a buffer is not trained
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            # Training a bias is training a shift from 0 that is added to it.
            shift = layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias
            layer.bias = nn.Parameter(shift)
            parametrize.register_parametrization(layer, "weight", _Scale(layer.weight))
            layers.append(name)
    result = tune(scaled, "all", train, val, settings)
    plain = copy.deepcopy(surgery(net, result.net, last))
    for name in layers:
        layer = result.net.get_submodule(name)
        plain.get_submodule(name).weight.data = layer.weight.detach()
        plain.get_submodule(name).bias = nn.Parameter(layer.bias.detach())
    return replace(result, net=plain.eval())


class _Scale(nn.Module):
    def __init__(self, weight):  # convolution [out, in, ...]; linear layer [out, in]
        super().__init__()
        each = weight.shape[:2] if weight.dim() > 2 else weight.shape[:1]
        ones = weight.new_ones(each + (1,) * (weight.dim() - len(each)))
        self.scale = nn.Parameter(ones)

    def forward(self, weight):
        return weight * self.scale


# ---------------------------------------------------------------- retrieval (section 5.3)


def retrieval(
    net: nn.Sequential,
    tuned: nn.Sequential,
    gallery: Data,
    queries: Data,
    settings: Settings = Settings(),
    k: int = 10,
) -> float:
    """Mean AP@k over target `queries`, seen by `tuned`, in a source `gallery`, seen by `net`.

    A feature is the input of the last unit, a map averaged over its pixels. Of a query's k nearest
    images (Euclidean distance, the first of equals) those of its class are relevant, and

        AP@k = sum of P(i) over the places i at which a relevant image stands / min(k, R)

    with P(i) the share of relevant images among the nearest i, and R the number of relevant images
    in the gallery; 0 where there are none. Gallery labels may be negative: no query's class.
    Raises ValueError for networks or images that cannot be worked with.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    _check_pair("gallery", gallery)
    _check_pair("queries", queries)
    there, labels = _features(net, gallery[0], settings), gallery[1]
    total = 0.0
    features = _features(tuned, queries[0], settings)
    if features.shape[1] != there.shape[1]:
        raise ValueError(f"features of {there.shape[1]} and of {features.shape[1]} numbers")
    for query, y in zip(features.split(256), queries[1].split(256)):
        distance = torch.cdist(query, there, compute_mode="donot_use_mm_for_euclid_dist")
        nearest = distance.sort(stable=True).indices[:, :k].cpu()  # (B, k)
        relevant = (labels[nearest] == y[:, None]).double()
        places = torch.arange(1, relevant.shape[1] + 1)
        precision = relevant.cumsum(1) / places
        most = (labels == y[:, None]).sum(1).clamp(1, k)  # min(k, R)
        total += ((precision * relevant).sum(1) / most).sum().item()
    return total / len(features)


@torch.no_grad()
@_exact()
@_enough_memory()
def _features(net: nn.Sequential, x: torch.Tensor, settings: Settings) -> torch.Tensor:
    """The input of the last unit: [N, D]."""
    unlabelled = x, torch.zeros(len(x), dtype=torch.int64)
    source = _SOURCE.get() or _Source(net, settings)
    units, load = source.prepare(net, settings, images=unlabelled)
    *below, _ = units
    below, x = source.run(below, source.common(below), load, settings.cache_bytes, x)
    features = []
    for chunk in x.split(CHUNK[x.is_cuda]):
        out = below(load(chunk))
        features.append(out.mean((2, 3)) if out.dim() == 4 else out.flatten(1))
    return torch.cat(features)
