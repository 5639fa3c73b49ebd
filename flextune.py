"""Flex-tuning: find the one unit of a pretrained network to fine-tune on different-looking data.

Royer & Lampert, "A Flexible Selection Scheme for Minimum-Effort Transfer Learning", WACV 2020.
This file needs only PyTorch, and Python 3.11 or newer. Copy it into your project:

    task = Task(net, (x_train, y_train), (x_val, y_val), Settings(lr=1e-4))
    selection = flex(task)  # or fast_flex, faster_flex
    print(selection.chosen, selection.result.accuracy)
    print(accuracy(selection.result.net, (x_test, y_test)))

net  an nn.Sequential that returns logits [N, classes]. Its children are the units, numbered from 1
     as in the paper: unit l is net[l - 1].
x    [N, ...]: uint8 images (the network gets x / 255), float images or features, or int64 tokens
y    [N]: int64 class labels

The given network and data are never changed. Convolutional networks are often faster after
`net.to(memory_format=torch.channels_last)`. For reproducible results of them on CUDA, set
`torch.backends.cudnn.deterministic = True`.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch.nn.utils import parametrize

# ---------------------------------------------------------------- settings and results


@dataclass(frozen=True)
class Settings:
    """The training protocol (section 5.1), the same for every network of a selection."""

    lr: float = 1e-3  # of Adam; the paper: 1e-3 for the small networks, 1e-4 for Inception2
    batch_size: int = 64  # the last batch of an epoch may be smaller, down to a single image
    check_every: int = 5  # validate every this many epochs; the paper: 5 to 10
    patience: int = 5  # stop after this many validations without improvement
    max_epochs: int = 300  # upper limit on the number of epochs
    # False: BatchNorm and InstanceNorm always use their running averages.
    # True: in tuned units, they use batch statistics and update their running averages.
    batch_statistics: bool = False
    top_k: int = 1  # a prediction is correct if the label is among the k largest logits
    seed: int = 0  # for shuffling, dropout, and random numbers that augment draws from PyTorch
    device: str | torch.device | None = None  # None: CUDA if available, else the CPU
    # Memory limit for cached outputs of frozen units. Up to three times as much is in use for a
    # short time: the old outputs, the batches of new ones, and these in one tensor.
    cache_bytes: int = 2 * 1024**3
    relative_rates: bool = False  # scale lr by the relative gradient norm of each unit: see ft_rgn
    bfloat16: bool = False  # train under bfloat16 autocast; validation and caching do not use it
    # batch -> batch, for training images only; uint8 images are already divided by 255
    augment: Callable | None = None
    loss: Callable = nn.functional.cross_entropy  # loss(logits [B, classes], labels [B]) -> scalar

    def __post_init__(self):
        for name in ("batch_size", "check_every", "patience", "max_epochs", "top_k"):
            _check_int(name, getattr(self, name), minimum=1)
        for name in ("seed", "cache_bytes"):
            _check_int(name, getattr(self, name), minimum=0)
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be a positive number, not {self.lr}")


def _check_int(name: str, value, minimum: int) -> None:
    if not hasattr(value, "__index__") or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, not {value!r}")


@dataclass
class Result:
    """One fine-tuned network."""

    net: nn.Sequential  # its frozen units are those of the task: deepcopy it before changing it
    units: tuple[int, ...]  # numbers of the tuned units
    accuracy: float  # of `net` on the validation set, between 0 and 1
    best_epoch: int  # the epoch of the returned state; 0 is the source network
    epochs: int  # epochs trained, including those after the best one
    seconds: float  # wall time
    history: list[tuple[int, float]]  # (epoch, validation accuracy); epoch 0 is the source network
    num_trained: int  # number of trained parameters (scalars)
    diverged: bool = False  # a weight became NaN or infinite; `net` is the best state before that


Candidate = int | str | tuple[int, ...]  # the number of a unit, "all", or a set of units


@dataclass
class Selection:
    """The choice of a selection algorithm, and everything it is based on."""

    chosen: Candidate  # what is tuned in N_flex
    best: Candidate  # the arg max; fast_flex may still choose "all" (Algorithm 2, line 10)
    tuned: dict[Candidate, Result]  # networks trained until early stopping
    proxies: dict[int, float] = field(default_factory=dict)  # validation accuracy of each proxy
    one_epoch: Result | None = None  # Algorithm 3's N_ft-all, trained for a single epoch
    short_trainings: list[Result] = field(default_factory=list)  # of halving_flex's first rounds

    @property
    def result(self) -> Result:
        """The fine-tuned network N_flex."""
        return self.tuned[self.chosen]

    @property
    def tied(self) -> list[Candidate]:
        """All candidates that share the highest accuracy; the first of them is `best`."""
        if self.proxies:
            accuracies = self.proxies
        else:
            accuracies = {unit: result.accuracy for unit, result in self.tuned.items()}
        return [unit for unit in accuracies if accuracies[unit] == accuracies[self.best]]

    def __str__(self) -> str:
        """A table of the candidates, with a bar for the validation accuracy, for `print`.

        "tied" are those that share the highest proxy, or without proxies the highest accuracy.
        """
        tied = self.tied
        rows = [("unit", "validation", "", "proxy" if self.proxies else "", "")]
        for candidate in dict.fromkeys([*self.proxies, *self.tuned]):
            validation = bar = proxy = ""
            marks = []
            if candidate == self.chosen:
                marks.append("chosen")
            if candidate in tied and len(tied) > 1:
                marks.append("tied")
            if candidate in self.tuned:
                result = self.tuned[candidate]
                validation = f"{result.accuracy:.3f}"
                bar = "#" * round(30 * result.accuracy)
                if result.diverged:
                    marks.append("diverged")
            if candidate in self.proxies:
                proxy = f"{self.proxies[candidate]:.3f}"
            name = label(self.result.net, candidate)
            rows.append((name, validation, bar, proxy, ", ".join(marks)))
        width = max(len(row[0]) for row in rows)
        lines = []
        for name, validation, bar, proxy, marks in rows:
            line = f"{name:{width}}  {validation:10}  {bar:30}  {proxy:5}  {marks}"
            lines.append(line.rstrip())
        return "\n".join(lines)


# ---------------------------------------------------------------- selection (sections 3 and 4)
#
# The comments quote the pseudo-code. Its inputs N, D_train and D_val are in `task`. Of several
# equal accuracies, `max` takes the first: the lowest unit, and a single unit rather than "all".
# The units below unit l are the same in N and in N_prox-l: because of `num_shared`, `task.accuracy`
# starts from their cached output.


def flex(task: Task) -> Selection:
    """Algorithm 1: fine-tune each unit, then all units, and keep the best on the validation set."""
    # 1-4: for l = 1, ..., L: N_ft-l <- fine-tune unit l of N; a_ft-l <- its accuracy on D_val
    tuned = {}
    for unit in candidates(task.net):
        tuned[unit] = fine_tune(task, unit)

    # 5-6: N_ft-all <- fine-tune all units of N; a_ft-all <- its accuracy on D_val
    tuned["all"] = fine_tune(task, "all")

    # 7: N_flex <- N_best for best <- arg max over {1, ..., L, all} of a_ft-X
    best = max(tuned, key=lambda unit: tuned[unit].accuracy)
    return Selection(chosen=best, best=best, tuned=tuned)


def fast_flex(task: Task) -> Selection:
    """Algorithm 2: choose the unit by proxy networks, with units from a fully tuned network."""
    # 1-2: N_ft-all <- fine-tune all units of N; a_ft-all <- its accuracy on D_val
    all_tuned = fine_tune(task, "all")

    # 3-6: for l = 1, ..., L: a_l <- accuracy on D_val of N_prox-l
    proxies = {}
    for unit in candidates(task.net):
        proxies[unit] = task.accuracy(surgery(task.net, all_tuned.net, unit), num_shared=unit - 1)

    # 7: best <- arg max over {1, ..., L} of a_l
    best = max(proxies, key=proxies.get)

    # 8-9: N_best <- fine-tune unit best of N; a_ft-best <- its accuracy on D_val
    best_tuned = fine_tune(task, best)

    # 10: N_flex <- if a_ft-best >= a_ft-all then N_best else N_ft-all
    chosen = best if best_tuned.accuracy >= all_tuned.accuracy else "all"
    tuned = {"all": all_tuned, best: best_tuned}
    return Selection(chosen=chosen, best=best, tuned=tuned, proxies=proxies)


def faster_flex(task: Task) -> Selection:
    """Algorithm 3: like Algorithm 2, but its proxies come from a single epoch."""
    # 1: N_ft-all <- fine-tune all units of N for a single epoch
    one_epoch = fine_tune(task, "all", epochs=1)

    # 2-5: for l = 1, ..., L: a_l <- accuracy on D_val of N_prox-l
    proxies = {}
    for unit in candidates(task.net):
        proxies[unit] = task.accuracy(surgery(task.net, one_epoch.net, unit), num_shared=unit - 1)

    # 6: best <- arg max over {1, ..., L} of a_l
    best = max(proxies, key=proxies.get)

    # 7: N_flex <- fine-tune unit best of N
    tuned = {best: fine_tune(task, best)}
    return Selection(chosen=best, best=best, tuned=tuned, proxies=proxies, one_epoch=one_epoch)


def surgery(net: nn.Sequential, tuned: nn.Sequential, unit: int) -> nn.Sequential:
    """The proxy network N_prox-l: `net` with one unit (counted from 1) taken from `tuned`.

    The units are shared with the given networks, not copied.
    """
    _check_int("unit", unit, minimum=1)
    proxy = net[:]
    proxy[unit - 1] = tuned[unit - 1]
    return proxy


def candidates(net: nn.Sequential) -> list[int]:
    """The numbers of the units that have parameters, in ascending order.

    A unit without parameters, such as dropout, is not a candidate. It is only active when it is
    tuned together with other units, as in "all".
    """
    return [number for number, unit in enumerate(net, start=1) if list(unit.parameters())]


def certainty(task: Task, selection: Selection, delta: float = 0.05) -> dict:
    """How reliable the choice of `flex` is, given the task on which it was made.

    Returns a dict:
        runner_up: The second best candidate.
        lead: Validation accuracy of the choice minus that of the runner-up.
        standard_error: Standard error of the lead.
        bound: With probability at least 1 - delta, the validation accuracy of every candidate is
            within this distance of its expected accuracy. This follows from Hoeffding's
            inequality and a union bound over the candidates, and has the rate of section 3.3. It
            ignores that the best epoch of each candidate was selected on the same validation set.
    """
    has_sets = any(isinstance(candidate, tuple) for candidate in selection.tuned)
    if selection.proxies or selection.short_trainings or has_sets:
        raise ValueError("certainty needs a selection of flex, which tunes every candidate")
    if not 0 < delta < 1:
        raise ValueError(f"delta must be between 0 and 1, not {delta}")
    others = {unit: result for unit, result in selection.tuned.items() if unit != selection.chosen}
    runner_up = max(others, key=lambda unit: others[unit].accuracy)
    choice_correct = task.correct(selection.result.net).double()
    runner_up_correct = task.correct(others[runner_up].net).double()
    difference = choice_correct - runner_up_correct
    num_images = len(difference)
    num_candidates = len(selection.tuned)
    return {
        "runner_up": runner_up,
        "lead": difference.mean().item(),
        "standard_error": difference.std(correction=0).item() / math.sqrt(num_images),
        "bound": math.sqrt(math.log(2 * num_candidates / delta) / (2 * num_images)),
    }


# ---------------------------------------------------------------- baselines (section 5.1)


def ft_all(task: Task) -> Result:
    """Fine-tune all units."""
    return fine_tune(task, "all")


def ft_fc(task: Task, n: int = 1) -> Result:
    """Fine-tune the last n units that have parameters."""
    _check_int("n", n, minimum=1)
    return fine_tune(task, candidates(task.net)[-n:])


def ft_ss(task: Task) -> Result:
    """Fine-tune the last unit, and a scale and a shift for every frozen layer below it.

    After Sun et al., "Meta-Transfer Learning for Few-Shot Learning", CVPR 2019: every nn.Conv1d,
    nn.Conv2d and nn.Conv3d gets a scale (initially 1) per pair of output and input channel and a
    shift (initially 0) per output channel, and every nn.Linear gets a scale and a shift per output.
    In the returned network they are folded into the weights and biases, so layers below the last
    unit have biases even if they had none before. Dropout is active in all units, and BatchNorm
    keeps its running averages. The result is not in `task.results`: each call trains anew.
    """
    # `fine_tune` trains every parameter of a unit. So below the last unit, weights become buffers,
    # and scales and shifts are the only parameters there.
    last_unit = candidates(task.net)[-1]
    scaled_net = copy.deepcopy(task.net)
    for layer in list(scaled_net[: last_unit - 1].modules()):
        _add_scale_and_shift(layer)
    # With batch statistics, BatchNorm would subtract the shift of the layer before it.
    settings = replace(task.settings, batch_statistics=False)
    scaled_task = Task(scaled_net, task.train, task.val, settings, task.report)
    result = fine_tune(scaled_task, "all")

    # Start from the source network with the tuned last unit, and write the scaled weights and the
    # biases into the layers below it.
    folded_net = copy.deepcopy(surgery(task.net, result.net, last_unit)).eval()
    for name, layer in result.net[: last_unit - 1].named_modules():
        if parametrize.is_parametrized(layer):
            folded = folded_net.get_submodule(name)
            folded.weight = nn.Parameter(layer.weight.detach())
            folded.bias = nn.Parameter(layer.bias.detach())
    # PyTorch's norms kept their running averages, but other modules may have updated their buffers.
    for name, buffer in folded_net.named_buffers():
        buffer.data = result.net.get_buffer(name).clone()
    return replace(result, net=folded_net)


def _add_scale_and_shift(layer: nn.Module) -> None:
    """Turn the layer's parameters into buffers, and give linear and conv layers scale and shift."""
    if parametrize.is_parametrized(layer):
        raise ValueError("ft_ss cannot scale a weight that is already parametrized (weight_norm?)")
    for name, weight in list(layer.named_parameters(recurse=False)):
        delattr(layer, name)
        layer.register_buffer(name, weight.detach())
    if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        # Training the bias is the same as training a shift that is added to it.
        if layer.bias is None:
            layer.bias = nn.Parameter(layer.weight.new_zeros(len(layer.weight)))
        else:
            layer.bias = nn.Parameter(layer.bias)  # it became a buffer above
        parametrize.register_parametrization(layer, "weight", _Scale(layer.weight))


class _Scale(nn.Module):
    """Parametrization: a factor per output of a linear layer, per channel pair of a convolution."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        if weight.dim() == 2:  # linear: [out, in]
            shape = (weight.shape[0], 1)
        else:  # convolution: [out, in / groups, ...]
            shape = weight.shape[:2] + (1,) * (weight.dim() - 2)
        self.scale = nn.Parameter(weight.new_ones(shape))

    def forward(self, weight):
        return weight * self.scale


# ---------------------------------------------------------------- beyond the paper
#
# Nothing in this section is the paper's.


def halving_flex(task: Task) -> Selection:
    """Flex in less time: units that begin badly are not tuned to the end.

    Successive halving (Jamieson & Talwalkar, AISTATS 2016). All candidates are tuned for 2
    validations, the better half of them (rounded up) for 4, and the better half of these until
    early stopping. Candidates with the same accuracy as the last of the half stay as well. Each
    training starts from the source network. A round as long as `max_epochs` is left out. `tuned`
    has the networks of the last round.

    Measured on MNIST, CIFAR and PACS (see the README): it chose the same as flex in 40 of 46 runs.
    It took .3 to .6 of the time, but .6 to 1.0 on PACS, where the limit of 100 epochs left each
    training 4 validations.
    """
    survivors = [*candidates(task.net), "all"]
    short_trainings = []
    for num_validations in (2, 4):
        epochs = num_validations * task.settings.check_every
        if epochs >= task.settings.max_epochs:
            break
        results = {unit: fine_tune(task, unit, epochs) for unit in survivors}
        short_trainings += results.values()
        best_first = sorted((result.accuracy for result in results.values()), reverse=True)
        last_of_half = best_first[math.ceil(len(survivors) / 2) - 1]
        survivors = [unit for unit in survivors if results[unit].accuracy >= last_of_half]
    tuned = {unit: fine_tune(task, unit) for unit in survivors}
    best = max(tuned, key=lambda unit: tuned[unit].accuracy)
    return Selection(chosen=best, best=best, tuned=tuned, short_trainings=short_trainings)


def greedy_flex(task: Task) -> Selection:
    """Flex with sets of units as further candidates, such as (2, 3).

    The paper names sets of units as future work. Greedy search, after SubTuning (Kaplun et al.,
    2023): beginning with the best unit, add the unit with which the accuracy on D_val is highest,
    as long as that accuracy rises. Ties go to the smaller set; "all" is the largest.

    Measured on MNIST and CIFAR (see the README): better than flex in 17 of 32 runs and worse in 2.
    On MNIST it gained .002 on average. It took two to three times as long.
    """
    units = candidates(task.net)
    tuned = dict(flex(task).tuned)
    best_result = tuned[max(units, key=lambda unit: tuned[unit].accuracy)]
    while len(best_result.units) + 1 < len(units):  # "all" stands for the set of all units
        others = [unit for unit in units if unit not in best_result.units]
        larger_sets = [tuple(sorted((*best_result.units, unit))) for unit in others]
        for larger_set in larger_sets:
            tuned[larger_set] = fine_tune(task, larger_set)
        best_larger = max(larger_sets, key=lambda larger_set: tuned[larger_set].accuracy)
        if tuned[best_larger].accuracy <= best_result.accuracy:
            break
        best_result = tuned[best_larger]
    tuned["all"] = tuned.pop("all")  # the largest set comes last and loses ties
    best = max(tuned, key=lambda candidate: tuned[candidate].accuracy)
    return Selection(chosen=best, best=best, tuned=tuned)


def ft_rgn(task: Task) -> Result:
    """Fine-tune all units, each at a learning rate in proportion to its relative gradient norm.

    After auto-RGN in Lee et al., "Surgical Fine-Tuning Improves Adaptation to Distribution Shifts",
    ICLR 2023. The relative gradient norm of a unit is the norm of its gradient divided by the norm
    of its weights. At the beginning of each epoch it is averaged over five batches, or fewer if
    there are not as many. The unit with the largest average gets the rate `lr`, all others a lower
    one. The result is not in `task.results`.

    In their code, each tensor has a rate of its own, BatchNorm is not tuned, and Adam starts anew in
    each epoch. This was weaker: by .017 on average for five targets of MNIST at ratio 3, with one
    run each.

    Measured on MNIST, CIFAR and PACS (see the README): better than flex in 16 of 46 runs and worse
    in 27.
    """
    return fine_tune(task.with_settings(relative_rates=True), "all")


def refit(task: Task, result: Result) -> nn.Sequential:
    """Tune the same units of the source network again, on D_train and D_val together.

    The usual last step after a choice by a validation set. It takes as many epochs as the network
    in `result`, which must be in `task.results`. The accuracy of the returned network is unknown,
    because no images are held out: measure it on a test set.

    Measured on MNIST's five targets, with 69 training and 35 validation images and five runs each:
    the average test accuracy rose from .661 for flex's network to .689. On PACS cartoon, with 17
    and 195 images, it rose from .708 to .885 in five runs.
    """
    if not any(result is other for other in task.results.values()):
        raise ValueError("refit needs a result of this very task, not one of ft_ss or ft_rgn")
    if result.best_epoch == 0:
        raise ValueError("the training of this result diverged at once: there is nothing to refit")
    x = torch.cat([task.train[0], task.val[0]])
    y = torch.cat([task.train[1], task.val[1]])
    settings = replace(task.settings, check_every=result.best_epoch)  # once, at the end
    joint_task = Task(task.net, (x, y), task.val, settings)
    refitted = fine_tune(joint_task, result.units, epochs=result.best_epoch)
    if refitted.diverged:
        raise ValueError("the training on D_train and D_val together diverged: keep result.net")
    return refitted.net


# ---------------------------------------------------------------- training (section 5.1)


def fine_tune(task: Task, units: int | str | Iterable, epochs: int | None = None) -> Result:
    """Fine-tune some units of the source network; all the others stay frozen.

    Args:
        task: The source network, the data and the settings.
        units: A unit number (1 to L), a unit name, several of these, or "all".
        epochs: Train for exactly this many epochs and return the final state (Algorithm 3,
            line 1). By default, training stops early and the best state on D_val is returned.

    Frozen units do not change at all: no gradients, no BatchNorm updates, no dropout. In tuned
    units every parameter is trained, whatever its `requires_grad` was in the given network.
    The source network (epoch 0) does not compete for the best state, because the algorithms compare
    tuned networks. So the result can be worse than the source network. If a weight is NaN or
    infinite at a validation, training stops, and the best state before that is returned with
    `diverged` set. If that happens at the first validation, the source network is returned.
    Results are kept in `task.results`, so nothing is trained twice.

    Raises ValueError if there is no such unit or no gradient reaches it. Errors in the network, the
    loss or `augment` are passed on, with a note that names the tuned units.
    """
    if epochs is not None:
        _check_int("epochs", epochs, minimum=1)
    unit_numbers = task.unit_numbers(units)
    key = (unit_numbers, epochs)
    if key not in task.results:
        try:
            # Dropout draws from the global random generators, so seed them and restore them later.
            with (
                torch.random.fork_rng(range(torch.cuda.device_count())),
                torch.enable_grad(),
                _no_autocast(task.net),
            ):
                torch.manual_seed(task.settings.seed)
                task.results[key] = _train(task, unit_numbers, epochs)
        except Exception as error:
            error.add_note(f"while fine-tuning unit {label(task.net, *unit_numbers)}")
            raise
    return task.results[key]


def _train(task: Task, unit_numbers: tuple[int, ...], epochs: int | None) -> Result:
    """The training loop of `fine_tune`."""
    settings = task.settings
    max_epochs = epochs or settings.max_epochs
    start_time = time.perf_counter()

    # Frozen units below the tuned ones give the same output in every epoch, so training starts
    # from their cached outputs. With augmentation the images change, and it starts from the images.
    num_frozen = unit_numbers[0] - 1
    num_cached, x = task.cached_outputs("train", 0 if settings.augment else num_frozen)

    net = _copy_units(task.net, unit_numbers)
    # Earlier results share the frozen units. A caller may have put these into training mode.
    net.eval().requires_grad_(False)
    tuned = nn.ModuleList(net[number - 1] for number in unit_numbers).requires_grad_(True)
    parameters_of_units = [{"params": list(unit.parameters())} for unit in tuned]
    optimizer = torch.optim.Adam(parameters_of_units, lr=settings.lr, fused=True)
    shuffle_rng = torch.Generator().manual_seed(settings.seed)

    history = [(0, task.source_accuracy)]
    best_epoch, best_accuracy = history[0]
    best_net = _copy_units(net, unit_numbers)
    checks_without_improvement = 0
    diverged = False

    for epoch in range(1, max_epochs + 1):
        _set_train_mode(tuned, settings.batch_statistics)
        _train_one_epoch(task, net, optimizer, x, num_cached, shuffle_rng)
        if epoch % settings.check_every != 0 and epoch != max_epochs:
            continue
        if not all(weight.isfinite().all() for weight in tuned.parameters()):
            diverged = True
            break

        val_accuracy = task.accuracy(net, num_frozen)
        history.append((epoch, val_accuracy))
        if task.report is not None:
            seconds_left = (time.perf_counter() - start_time) * (max_epochs / epoch - 1)
            task.report(
                f"unit {label(net, *unit_numbers)}: epoch {epoch}, "
                f"validation {val_accuracy:.3f}, at most {seconds_left:.0f} s left"
            )

        # The first validation always counts, because the source network does not compete. With a
        # fixed number of epochs every validation counts, so the final state is returned.
        if best_epoch == 0 or val_accuracy > best_accuracy or epochs is not None:
            best_epoch, best_accuracy = epoch, val_accuracy
            best_net = _copy_units(net, unit_numbers)
            checks_without_improvement = 0
        else:
            checks_without_improvement += 1
        if checks_without_improvement == settings.patience:
            break

    trained_weights = list(optimizer.state)  # Adam has a state for what received a gradient
    if not trained_weights:
        raise ValueError("no gradient reached the tuned units: does the network use them?")
    return Result(
        net=best_net.eval(),
        units=unit_numbers,
        accuracy=best_accuracy,
        best_epoch=best_epoch,
        epochs=epoch,
        seconds=time.perf_counter() - start_time,
        history=history,
        num_trained=sum(weight.numel() for weight in trained_weights),
        diverged=diverged,
    )


def _train_one_epoch(
    task: Task,
    net: nn.Sequential,
    optimizer: torch.optim.Optimizer,
    x: torch.Tensor,
    num_cached: int,
    shuffle_rng: torch.Generator,
) -> None:
    """One pass over the training set; `x` is the output of the first `num_cached` units."""
    settings = task.settings
    y = task.train[1]

    def losses(batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        for indices in batches:
            inputs = prepare_batch(net, x[indices], num_cached)
            if settings.augment is not None:
                inputs = settings.augment(inputs)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=settings.bfloat16):
                logits = net[num_cached:](inputs)  # (B, classes)
            if settings.bfloat16:
                logits = logits.float()
            loss = settings.loss(logits, y[indices])
            if loss.requires_grad:  # not if the tuned unit skips this batch (stochastic depth)
                yield loss

    order = torch.randperm(len(x), generator=shuffle_rng, device="cpu").to(x.device)
    batches = order.split(settings.batch_size)
    if settings.relative_rates:
        _set_relative_rates(optimizer, settings.lr, losses(batches[:5]))
    for loss in losses(batches):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _set_relative_rates(
    optimizer: torch.optim.Optimizer, lr: float, losses: Iterable[torch.Tensor]
) -> None:
    """Scale the learning rate of each unit by its relative gradient norm (see `ft_rgn`)."""
    units = optimizer.param_groups
    relative_norms = torch.zeros(len(units))  # sums over the losses instead of means: same rates
    for loss in losses:
        optimizer.zero_grad()
        loss.backward()
        for index, unit in enumerate(units):
            gradients = [weight.grad for weight in unit["params"] if weight.grad is not None]
            gradient_norm = nn.utils.get_total_norm(gradients).item()
            weight_norm = nn.utils.get_total_norm(unit["params"]).item()
            relative_norms[index] += gradient_norm / max(weight_norm, 1e-12)
    if relative_norms.max() == 0:
        return  # no unit has a gradient: keep the rates
    for unit, relative_norm in zip(units, relative_norms / relative_norms.max()):
        unit["lr"] = lr * relative_norm.item()


def _copy_units(net: nn.Sequential, unit_numbers: Iterable[int]) -> nn.Sequential:
    """`net` with copies of these units; the other units are shared.

    Each unit is copied by itself: a dropout layer that a tuned unit has in common with a frozen one
    must be active in the tuned unit only.
    """
    copied = net[:]
    for number in unit_numbers:
        copied[number - 1] = copy.deepcopy(net[number - 1])
    return copied


def _set_train_mode(tuned: nn.Module, batch_statistics: bool) -> None:
    """Training mode, except for BatchNorm and InstanceNorm if `batch_statistics` is False."""
    tuned.train()
    for module in tuned.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):  # BatchNorm and InstanceNorm
            module.train(batch_statistics)


# ---------------------------------------------------------------- the task


class Task:
    """What every algorithm is given: the source network N, D_train, D_val and the settings.

    Algorithms that get the same task share its frozen units, their cached outputs, and the networks
    fine-tuned so far. A task is fixed: for other data make another one, and for other settings see
    `with_settings`. Do not modify its attributes or a returned network: later algorithms rely on
    both being unchanged.

    Args:
        net: The source network, an nn.Sequential of units. It is copied.
        train, val: (x, y) each; see the top of this file for shapes and dtypes. They are copied.
        settings: How to train.
        report: Called with a line of text after every validation, e.g. `print`.

    Attributes:
        net: A copy of the source network on the device, in evaluation mode and frozen.
        train, val: The data, on the device.
        source_accuracy: Top-k accuracy of the source network on D_val.
        results: The networks fine-tuned so far, by (unit numbers, epochs). They stay in memory;
            `results.clear()` frees it.

    Raises ValueError if the network or the data is not as described, or if units cannot be frozen
    because their output is random or depends on the other images of a batch. Exceptions of the
    network itself are passed on.
    """

    @torch.no_grad()
    def __init__(
        self,
        net: nn.Sequential,
        train: tuple[torch.Tensor, torch.Tensor],
        val: tuple[torch.Tensor, torch.Tensor],
        settings: Settings = Settings(),
        report: Callable[[str], None] | None = None,
    ):
        check_units(net)
        _check_data("train", train)
        _check_data("val", val)
        if train[0].dtype != val[0].dtype or train[0].shape[1:] != val[0].shape[1:]:
            raise ValueError(
                "x of train and val must have the same dtype and the same shape [N, ...]"
            )
        default_device = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(settings.device or default_device)
        # Units may have modules in common, such as a dropout layer. In `whole_net` they still do.
        # In `self.net` each has its own copy, as for fine-tuning. `_check_outputs` compares both.
        whole_net = copy.deepcopy(net).to(device).eval().requires_grad_(False)
        self.net = _copy_units(whole_net, range(1, len(net) + 1))
        self.train = tuple(tensor.detach().to(device, copy=True) for tensor in train)
        self.val = tuple(tensor.detach().to(device, copy=True) for tensor in val)
        self.settings = settings
        self.report = report
        self.results: dict[tuple, Result] = {}
        two_images = torch.cat([self.train[0][:1], self.val[0][-1:]])
        with _no_autocast(self.net):
            self._check_outputs(whole_net, two_images)
            self._cacheable = self._find_cacheable(two_images)
        self._cache = {"train": (0, self.train[0]), "val": (0, self.val[0])}
        source_logits = run_units(self.net, self.val[0])
        if source_logits.isnan().any():
            raise ValueError("the network returns NaN for some images of val")
        is_correct = in_top_k(source_logits, self.val[1], settings.top_k)
        self.source_accuracy = is_correct.sum().item() / len(is_correct)

    def __setattr__(self, name, value):
        """Forbid reassigning attributes: results and cached outputs depend on them."""
        if name in vars(self):
            raise AttributeError(f"a task is fixed: create a new Task to change {name}")
        super().__setattr__(name, value)

    def _check_outputs(self, whole_net: nn.Sequential, two_images: torch.Tensor) -> None:
        """Refuse networks for which copying, caching or batching would change the result.

        `whole_net` is a copy of the given network; in `self.net` each unit is copied by itself.
        The weights of `whole_net` are changed.
        """
        logits = self.net(prepare_batch(self.net, two_images))
        if not torch.is_tensor(logits) or logits.dim() != 2 or len(logits) != 2:
            raise ValueError("the network must return logits [N, classes]")

        num_classes = logits.shape[1]
        for name, (_, y) in (("train", self.train), ("val", self.val)):
            if y.min() < 0 or y.max() >= num_classes:
                raise ValueError(
                    f"{name}: labels must be from 0 to {num_classes - 1}, the network's classes, "
                    f"not from {y.min()} to {y.max()}"
                )
        if self.settings.top_k > num_classes:
            raise ValueError(f"top_k is {self.settings.top_k}, but there are {num_classes} classes")

        if _differ(whole_net(prepare_batch(self.net, two_images)), logits):
            raise ValueError(
                "units cannot be frozen: the network is random in evaluation mode, or its units "
                "exchange data other than through their inputs and outputs"
            )
        if _differ(self.net(prepare_batch(self.net, two_images[:1])), logits[:1]):
            raise ValueError(
                "units cannot be frozen: the output for an image depends on the others in its batch"
            )

        # A unit may use parameters of another one without registering them, in a list for example.
        # Its copy would keep their old values when the other unit is trained.
        copied_units = _copy_units(self.net, range(1, len(self.net) + 1))
        for weight in (*whole_net.parameters(), *copied_units.parameters()):
            weight.mul_(1 + torch.cos(1000 * weight) / 2)  # by factors from 0.5 to 1.5
        of_copied_units = copied_units(prepare_batch(self.net, two_images))
        if _differ(whole_net(prepare_batch(self.net, two_images)), of_copied_units):
            raise ValueError("some units share parameters: make them one unit")

    def _find_cacheable(self, two_images: torch.Tensor) -> list[int]:
        """Every n for which the output of the lowest n units may be cached; 0 means the images.

        An output may be cached if it is a tensor with a row for each image, and `cache_bytes`
        suffices for both sets.
        """
        num_images = len(self.train[0]) + len(self.val[0])
        cacheable = [0]
        of_two = prepare_batch(self.net, two_images)
        of_one = prepare_batch(self.net, two_images[:1])
        for number, unit in enumerate(self.net, start=1):
            of_two = unit(of_two)
            of_one = unit(of_one)
            if not torch.is_tensor(of_two) or of_two.shape[:1] != (2,) or of_one.shape[:1] != (1,):
                continue
            if of_one.nbytes * num_images <= self.settings.cache_bytes:
                cacheable.append(number)
        return cacheable

    def unit_numbers(self, units: int | str | Iterable) -> tuple[int, ...]:
        """Numbers of units given as a number, a name, several of these, or "all"."""
        if hasattr(units, "tolist"):  # a tensor or an array
            units = units.tolist()
        units = [units] if isinstance(units, (int, str)) else list(units)
        if units == ["all"]:
            return tuple(range(1, len(self.net) + 1))
        known = {number: number for number in range(1, len(self.net) + 1)}
        known.update({name: number for number, name in unit_names(self.net).items()})
        numbers = set()
        for unit in units:
            try:
                numbers.add(known[unit])
            except (KeyError, TypeError):  # TypeError: a list, for example
                trainable = [label(self.net, number) for number in candidates(self.net)]
                raise ValueError(
                    f"there is no unit {unit!r}; units to tune: {', '.join(trainable)}"
                ) from None
        if not numbers & set(candidates(self.net)):
            raise ValueError(f"units {units} have no parameters to tune")
        return tuple(sorted(numbers))

    def with_settings(self, **changes) -> Task:
        """A task with changed settings, e.g. `lr`, that shares the network, the data and the cache.

        Its results are its own. Raises ValueError for settings on which shared values depend.
        """
        for name in ("top_k", "device", "cache_bytes"):
            if name in changes:
                raise ValueError(f"create a new Task to change {name}")
        task = copy.copy(self)
        # Not by assignment, which `__setattr__` forbids.
        vars(task).update(settings=replace(self.settings, **changes), results={})
        return task

    @torch.no_grad()
    def cached_outputs(self, dataset: str, num_frozen: int) -> tuple[int, torch.Tensor]:
        """Outputs of the lowest units on "train" or "val".

        Returns (num_cached, outputs), with the largest num_cached <= num_frozen that may be cached.
        Frozen units above it run again in every batch. Only the latest outputs of each dataset are
        kept: if more units are requested, computation continues from them, and if fewer, it starts
        again from the images.
        """
        target = max(number for number in self._cacheable if number <= num_frozen)
        num_cached, outputs = self._cache[dataset]
        if num_cached > target:
            num_cached = 0
            outputs = getattr(self, dataset)[0]
        if num_cached < target:
            outputs = run_units(self.net, outputs, num_cached, target)
        self._cache[dataset] = (target, outputs)
        return target, outputs

    def accuracy(self, net: nn.Sequential, num_shared: int = 0) -> float:
        """Top-k accuracy of `net` on D_val.

        The lowest `num_shared` units of `net` must be those of the task: instead of running them,
        their cached outputs are used.
        """
        is_correct = self.correct(net, num_shared)
        return is_correct.sum().item() / len(is_correct)

    def correct(self, net: nn.Sequential, num_shared: int = 0) -> torch.Tensor:
        """Whether each validation image is classified correctly, bool [N]. See `accuracy`."""
        num_cached, x = self.cached_outputs("val", num_shared)
        logits = run_units(net, x, num_cached)  # (N, classes)
        return in_top_k(logits, self.val[1], self.settings.top_k)


# ---------------------------------------------------------------- evaluation

EVAL_BATCH_SIZE = 128


def accuracy(net: nn.Sequential, data: tuple[torch.Tensor, torch.Tensor], top_k: int = 1) -> float:
    """Top-k accuracy of `net`, in evaluation mode, on any data (x, y), e.g. the test set."""
    check_units(net)
    _check_data("data", data)
    x, y = data
    logits = run_units(copy.deepcopy(net), x)
    is_correct = in_top_k(logits, y.to(logits.device), top_k)
    return is_correct.sum().item() / len(is_correct)


@torch.no_grad()
def run_units(
    net: nn.Sequential, x: torch.Tensor, start: int = 0, stop: int | None = None
) -> torch.Tensor:
    """The output of net[start:stop], in batches. Puts `net` in evaluation mode.

    `x` is the output of the units before, net[:start], or the images if start is 0.
    """
    units = net.eval()[start:stop]
    # Batches of nearly equal size. A last batch of one image could lose its first dimension in a
    # unit that squeezes.
    batches = x.tensor_split(math.ceil(len(x) / EVAL_BATCH_SIZE))
    with _no_autocast(net):
        return torch.cat([units(prepare_batch(net, batch, start)) for batch in batches])


def _no_autocast(net: nn.Module) -> torch.autocast:
    """Context in which an autocast of the caller has no effect.

    Without `cache_enabled=False`, PyTorch would keep the casts of weights until the outermost
    autocast ends, and so use those of the first step in all later ones.
    """
    device_type = next(net.parameters()).device.type
    return torch.autocast(device_type, enabled=False, cache_enabled=False)


def prepare_batch(net: nn.Sequential, x: torch.Tensor, start: int = 0) -> torch.Tensor:
    """Copy a batch to the device of `net`, because units may modify their input in place.

    The batch is the input of net[start:]. Images and features (start = 0) are converted to the
    dtype of the weights, and uint8 is divided by 255. Tokens, and what one unit passes to the next,
    are left unchanged.
    """
    weight = next(net.parameters())
    if start > 0 or x.dtype == torch.int64:
        return x.to(weight.device, copy=True)
    batch = x.to(weight.device, weight.dtype, copy=True)
    return batch.div_(255) if x.dtype == torch.uint8 else batch


def in_top_k(logits: torch.Tensor, y: torch.Tensor, top_k: int = 1) -> torch.Tensor:
    """Whether each label [N] is among the k largest of its logits [N, classes]: bool [N].

    Among equal logits the lower class counts as larger. A row with NaN is never correct.
    `torch.topk` guarantees neither.
    """
    y = y[:, None]  # (N, 1)
    label_logit = logits.gather(1, y)  # (N, 1)
    classes = torch.arange(logits.shape[1], device=logits.device)
    is_tied_before = (logits == label_logit) & (classes < y)  # (N, classes)
    num_larger = ((logits > label_logit) | is_tied_before).sum(1)
    return (num_larger < top_k) & ~logits.isnan().any(1)


# ---------------------------------------------------------------- checks and names


def check_units(net: nn.Sequential) -> None:
    """Raise ValueError unless `net` is a plain nn.Sequential whose units share no parameters."""
    if type(net) is not nn.Sequential:  # net[:] of a subclass would call its own __init__
        raise ValueError("the network must be a plain nn.Sequential whose children are the units")
    if net._parameters or net._buffers or net._forward_hooks or net._forward_pre_hooks:
        raise ValueError("the nn.Sequential itself must have no parameters, buffers or hooks")
    if not candidates(net):
        raise ValueError("no unit has parameters")
    for weight in net.parameters():
        if weight.dtype not in (torch.float32, torch.float64):
            raise ValueError("the weights must be float32 or float64; for bfloat16 see Settings")

    owner = {}  # unit number by address, not by parameter: two parameters may share their memory
    for number, unit in enumerate(net, start=1):
        for name, weight in unit.named_parameters():
            if weight.numel() == 0:
                continue  # has no address
            other = owner.setdefault(weight.data_ptr(), number)
            if other != number:
                raise ValueError(f"units {other} and {number} share {name}: make them one unit")


def _differ(logits: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether logits differ by more than rounding."""
    tolerance = 1e-3 * expected.abs().max().item() + 1e-6
    return (logits - expected).abs().max().item() > tolerance


def _check_data(name: str, data: tuple) -> None:
    """Raise ValueError unless `data` is a pair (x, y) of the documented shapes and dtypes."""
    is_pair = isinstance(data, (tuple, list)) and len(data) == 2
    if not is_pair or not torch.is_tensor(data[0]) or not torch.is_tensor(data[1]):
        raise ValueError(f"{name} must be a tuple of two tensors (x, y)")
    x, y = data
    if x.dtype not in (torch.uint8, torch.int64) and not x.is_floating_point():
        raise ValueError(f"{name}: x must be uint8, float or int64, not {x.dtype}")
    if x.dim() == 0 or len(x) == 0:
        raise ValueError(f"{name} is empty")
    if y.dtype != torch.int64 or y.shape != (len(x),):
        raise ValueError(f"{name}: y must be int64 [{len(x)}], not {y.dtype} {[*y.shape]}")
    if not x.isfinite().all():
        raise ValueError(f"{name}: x has NaN or infinite values")


def unit_names(net: nn.Sequential) -> dict[int, str]:
    """The names of the units by number, except those that nn.Sequential gives itself (digits).

    "/" in a name stands for ".", which PyTorch does not allow in the name of a module.
    """
    names = {}
    for number, name in enumerate(net._modules, start=1):
        if not name.isdigit():
            names[number] = name.replace("/", ".")
    return names


def label(net: nn.Sequential, *units: Candidate) -> str:
    """Units as text, by number and, if they have one, by name: "8 layer4.0", or "2 conv2, 3 fc1"."""
    if len(units) == 1 and isinstance(units[0], tuple):
        units = units[0]
    are_all = len(units) == len(net) and len(net) > 1  # the unit of a one-unit network is "1"
    if units == ("all",) or are_all:
        return "all"
    names = unit_names(net)
    return ", ".join(f"{unit} {names[unit]}" if unit in names else str(unit) for unit in units)
