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
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrize

Data = tuple[torch.Tensor, torch.Tensor]
Units = int | str | Iterable[int]  # one unit, "all", or several units

CHUNK = 256  # images per forward pass where no gradient is needed


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

    def __post_init__(self):
        for name in ("batch_size", "check_every", "patience", "max_epochs", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive and finite, not {self.lr}")


@dataclass
class Result:
    """One fine-tuned network."""

    net: nn.Sequential  # in evaluation mode, on the device of the network it came from
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
    """A copy of `net` with `unit` (from 1), its parameters and buffers, taken from `tuned`."""
    proxy = copy.deepcopy(net)
    proxy[unit - 1] = copy.deepcopy(tuned[unit - 1])
    return proxy


def accuracy(net: nn.Sequential, data: Data, settings: Settings = Settings()) -> float:
    """Top-k accuracy of `net`, in evaluation mode, on `data`: in [0, 1].

    Raises ValueError for a network or data that cannot be worked with.
    """
    return correct(net, data, settings).sum().item() / len(data[1])


def correct(net: nn.Sequential, data: Data, settings: Settings = Settings()) -> torch.Tensor:
    """Is each image of `data` right by `top_k`? bool [N], on the CPU. Raises as `accuracy`."""
    net, load = _working_copy(net, settings, data=data)
    return _correct(lambda x: net(load(x)), *data, settings.top_k).cpu()


def _accuracy(forward, x: torch.Tensor, y: torch.Tensor, top_k: int) -> float:
    return _correct(forward, x, y, top_k).sum().item() / len(y)


def _exact():
    """On CUDA, convolutions that do not vary and do not round to TF32."""
    return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)


@torch.no_grad()
@_exact()
def _correct(forward, x: torch.Tensor, y: torch.Tensor, top_k: int) -> torch.Tensor:
    """Of equal logits the first counts as larger; NaN are never right."""
    hits = []
    for images, classes in zip(x.split(CHUNK), y.split(CHUNK)):
        logits = forward(images)  # (B, classes)
        own = classes.to(logits.device)[:, None]  # (B, 1)
        a, index = logits.gather(1, own), torch.arange(logits.shape[1], device=logits.device)
        ahead = (logits > a) | ((logits == a) & (index < own))  # (B, classes)
        hits.append((ahead.sum(1) < top_k) & ~logits.isnan().any(1))
    return torch.cat(hits)


def _working_copy(net: nn.Sequential, settings: Settings, **sets: Data):
    """A copy of `net` on the device, in evaluation mode, and the function that loads its batches.

    Raises ValueError if it cannot work on one of the `sets`.
    """
    candidates(net)
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    net = copy.deepcopy(net).to(device).eval()
    for place, unit in enumerate(net):
        net[place] = copy.deepcopy(unit)  # two units may share a dropout layer
    for name, data in sets.items():
        _check(net, name, data, settings)
    x, _ = data
    return net, partial(_load, net=net, layout=_layout(net, x))


def _load(x: torch.Tensor, net: nn.Sequential, layout=torch.contiguous_format) -> torch.Tensor:
    """A batch as `net` takes it: on its device, in its precision, in the memory layout.

    It is a copy: a network that begins with an in-place layer must not change the data.
    """
    weight = next(net.parameters())
    batch = x.to(weight.device, copy=True).to(weight.dtype)
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


@torch.no_grad()
def _check(net: nn.Sequential, name: str, data: Data, settings: Settings) -> None:
    """Raises ValueError, in one line, for data that `net` cannot be trained or tested on."""
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
    try:
        logits = net(_load(x[:1], net))
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise ValueError(f"{name}: images {list(x.shape[1:])} do not fit: {reason}") from error
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2:
        raise ValueError("the network must give logits [N, classes]")
    classes = logits.shape[1]
    if y.min() < 0 or y.max() >= classes:
        raise ValueError(f"{name}: labels {y.min()}...{y.max()}, but {classes} classes in the net")
    if settings.top_k > classes:
        raise ValueError(f"top_k is {settings.top_k}, but there are {classes} classes")


# ---------------------------------------------------------------- training (section 5.1)


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

    Raises ValueError for a network, units or data that cannot be worked with.
    """
    start = time.perf_counter()
    if epochs is not None and epochs < 1:
        raise ValueError(f"epochs must be at least 1, not {epochs}")
    numbers = _numbers(net, units)
    tuned, load = _working_copy(net, settings, train=train, val=val)
    tuned.requires_grad_(False)
    trained = nn.ModuleList(tuned[number - 1] for number in numbers).requires_grad_(True)
    device, first = next(trained.parameters()).device, numbers[0] - 1
    frozen, rest = (nn.Sequential(*part) for part in (list(tuned)[:first], list(tuned)[first:]))
    frozen, x_train, x_val = _run_once(frozen, load, train[0], val[0], settings.cache_bytes)
    y_train, y_val = train[1].to(x_train.device), val[1].to(x_val.device)

    def forward(x):
        return rest(frozen(load(x)))

    def validate():
        trained.eval()
        return _accuracy(forward, x_val, y_val, settings.top_k)

    with _reproducible(device, settings.seed), torch.enable_grad():
        order = torch.Generator().manual_seed(settings.seed)
        optimizer = torch.optim.Adam(trained.parameters(), lr=settings.lr, fused=True)
        history = [(0, validate())]
        best, state, stale = history[0], copy.deepcopy(trained.state_dict()), 0
        losses, diverged = torch.zeros((), device=device), False  # looked at when validating
        last = settings.max_epochs if epochs is None else epochs
        for epoch in range(1, last + 1):
            _train_mode(trained, settings.batch_statistics)
            shuffled = torch.randperm(len(x_train), generator=order).to(x_train.device)
            for batch in shuffled.split(settings.batch_size):
                optimizer.zero_grad()
                loss = cross_entropy(forward(x_train[batch]), y_train[batch].to(device))
                loss.backward()
                optimizer.step()
                losses += loss.detach()
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

    trained.load_state_dict(state)
    for mine, theirs in zip(tuned.parameters(), net.parameters()):
        mine.requires_grad_(theirs.requires_grad)
    tuned.to(next(net.parameters()).device, memory_format=torch.contiguous_format)
    return Result(
        net=tuned.eval(),
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


@torch.no_grad()
@_exact()
def _run_once(frozen: nn.Sequential, load, x_train, x_val, cache_bytes: int):
    """What remains of `frozen` to be run for every batch, and the tensors to run it on.

    Its output is the same in every epoch: it is kept on the device, and nothing remains, if it fits
    `cache_bytes`. Where `frozen` is empty, that is the images themselves; uint8 stays uint8.
    """
    batch = load(x_train[:1])
    one = frozen(batch) if len(frozen) else x_train[:1]
    whole = isinstance(one, torch.Tensor)  # units may hand on more than a tensor
    if not whole or one.nbytes * (len(x_train) + len(x_val)) > cache_bytes:
        return frozen, x_train, x_val
    if not len(frozen):
        return frozen, x_train.to(batch.device), x_val.to(batch.device)

    def output(x):
        last = one.dim() == 4 and one.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        shape = len(x), *one.shape[1:]
        out = torch.empty(shape, dtype=one.dtype, device=one.device, memory_format=layout)
        for start in range(0, len(x), CHUNK):
            out[start : start + CHUNK] = frozen(load(x[start : start + CHUNK]))
        return out

    return nn.Sequential(), output(x_train), output(x_val)


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
    plain = surgery(net, result.net, last)
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
    there, labels = _features(net, gallery[0], settings), gallery[1]
    total = 0.0
    features = _features(tuned, queries[0], settings)
    for query, y in zip(features.split(CHUNK), queries[1].split(CHUNK)):
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
def _features(net: nn.Sequential, x: torch.Tensor, settings: Settings) -> torch.Tensor:
    """The input of the last unit: [N, D]."""
    unlabelled = x, torch.zeros(len(x), dtype=torch.int64)
    net, load = _working_copy(net, settings, images=unlabelled)
    below, features = nn.Sequential(*list(net)[:-1]), []
    for chunk in x.split(CHUNK):
        out = below(load(chunk))
        features.append(out.mean((2, 3)) if out.dim() == 4 else out.flatten(1))
    return torch.cat(features)
