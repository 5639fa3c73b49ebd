"""Tests of behaviour: the paper transcribed naively as oracle, known values, and invariants.

They need no network and no data; the whole suite takes about two minutes on two cores.
"""

import colorsys
import contextlib
import copy
import gzip
import hashlib
import http.server
import importlib.util
import io
import json
import math
import os
import random
import re
import runpy
import shutil
import struct
import subprocess
import sys
import tarfile
import threading
import time
import types
import zipfile
import zlib
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import flextune
import models
import run_all
import shifts
from flextune import Result, Settings, Task

HERE = Path(__file__).parent
FAST = Settings(lr=1e-2, batch_size=16, check_every=2, patience=3, max_epochs=40, device="cpu")

# ---------------------------------------------------------------- a small problem


def fine_tune(net, units, train, val, settings=FAST, epochs=None):
    return flextune.fine_tune(Task(net, train, val, settings), units, epochs)


def images(n, seed, shifted=False):
    """n uint8 images [n, 3, 8, 8] of 4 classes, a brighter quarter each; shifted: tinted, noisy."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 4
    x = torch.randint(0, 100, (n, 3, 8, 8), generator=draw)
    for quarter, (row, column) in enumerate(((0, 0), (0, 4), (4, 0), (4, 4))):
        x[y == quarter, :, row : row + 4, column : column + 4] += 60
    if shifted:
        x = x // 3 + torch.tensor([120, 60, 0])[:, None, None]
        x += torch.randint(-100, 100, x.shape, generator=draw)
    return x.clamp(0, 255).byte(), y


def small_net(dropout=0.2):
    """Five units, the third of them without parameters; BatchNorm, and dropout in the fourth."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        nn.MaxPool2d(2),
        nn.Sequential(nn.Flatten(), nn.Linear(128, 16), nn.ReLU(), nn.Dropout(dropout)),
        nn.Linear(16, 4),
    )


@pytest.fixture(scope="module")
def source():
    """A network pretrained on the unshifted images, with BatchNorm statistics of its own."""
    torch.manual_seed(0)
    net, (x, y) = small_net(), images(200, seed=1)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        cross_entropy(net(x / 255), y).backward()
        optimizer.step()
    return net.train()  # as a user may hand it over


@pytest.fixture(scope="module")
def train():
    return images(33, seed=2, shifted=True)  # with batches of 16, the last one is a single image


@pytest.fixture(scope="module")
def val():
    return images(100, seed=3, shifted=True)


def same(a, b):
    """Are two networks or units, or states, the same, bit for bit, buffers included?"""
    a, b = (each.state_dict() if isinstance(each, nn.Module) else each for each in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---------------------------------------------------------------- the oracle


def naive_accuracy(net, data):
    with torch.no_grad():
        return (net.eval()(data[0] / 255).argmax(1) == data[1]).float().mean().item()


def naive_proxies(net, tuned, val):
    a = {}
    for unit in (1, 2, 4, 5):
        proxy = copy.deepcopy(net)
        proxy[unit - 1] = copy.deepcopy(tuned[unit - 1])
        a[unit] = naive_accuracy(proxy, val)
    return a


def arg_max(a):
    return next(key for key in a if a[key] == max(a.values()))


@pytest.fixture(scope="module", params=[0, 1, 2], ids="seed {}".format)
def both(request, source, train, val):
    """The settings, and the naive fine-tuning of every candidate and of one epoch of all."""
    settings = replace(FAST, seed=request.param)
    everything = {1: [1], 2: [2], 4: [4], 5: [5], "all": [1, 2, 3, 4, 5]}
    task = Task(source, train, val, settings)
    naive = {name: run_all.literal(task, units) for name, units in everything.items()}
    naive["epoch"] = run_all.literal(task, everything["all"], epochs=1)
    return settings, naive


def test_flex_is_algorithm_1(source, train, val, both):
    settings, naive = both
    a = {name: naive[name][1] for name in (1, 2, 4, 5, "all")}
    ours = flextune.flex(Task(source, train, val, settings))
    assert {name: result.accuracy for name, result in ours.tuned.items()} == pytest.approx(a)
    assert {name: result.epochs for name, result in ours.tuned.items()} == {
        name: naive[name][2] for name in a
    }
    assert ours.chosen == ours.best == arg_max(a)
    for name, result in ours.tuned.items():
        for mine, theirs in zip(result.net.parameters(), naive[name][0].parameters()):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_fast_flex_is_algorithm_2(source, train, val, both):
    settings, naive = both
    proxies = naive_proxies(source, naive["all"][0], val)
    best = arg_max(proxies)
    ours = flextune.fast_flex(Task(source, train, val, settings))
    assert ours.proxies == pytest.approx(proxies)
    assert ours.best == best
    assert ours.chosen == (best if naive[best][1] >= naive["all"][1] else "all")
    assert ours.result.accuracy == pytest.approx(max(naive[best][1], naive["all"][1]))


def test_faster_flex_is_algorithm_3(source, train, val, both):
    settings, naive = both
    proxies = naive_proxies(source, naive["epoch"][0], val)
    ours = flextune.faster_flex(Task(source, train, val, settings))
    assert ours.proxies == pytest.approx(proxies)
    assert ours.chosen == ours.best == arg_max(proxies)
    assert ours.result.accuracy == pytest.approx(naive[ours.chosen][1])
    assert ours.tuned["all"].epochs == 1


# ---------------------------------------------------------------- selection


def scripted(source, train, val, accuracies):
    """A task in which networks of these accuracies have been tuned: all of them the source."""
    task = Task(source, train, val, FAST)
    for unit, a in accuracies.items():
        units = (1, 2, 3, 4, 5) if unit == "all" else (unit,)
        task.results[units, None] = Result(task.net, units, a, 1, 0.0, [], 0)
    return task


@pytest.mark.parametrize(
    "accuracies, chosen",
    [
        ({1: 0.5, 2: 0.7, 4: 0.7, 5: 0.6, "all": 0.7}, 2),  # the smallest unit; a unit before all
        ({1: 0.5, 2: 0.6, 4: 0.7, 5: 0.7, "all": 0.7}, 4),
        ({1: 0.5, 2: 0.6, 4: 0.7, 5: 0.7, "all": 0.8}, "all"),
    ],
)
def test_flex_breaks_ties(source, train, val, accuracies, chosen):
    assert flextune.flex(scripted(source, train, val, accuracies)).chosen == chosen


@pytest.mark.parametrize("a_best, chosen", [(0.7, 1), (0.6, "all")])
def test_fast_flex_breaks_ties(source, train, val, a_best, chosen):
    """All proxies are the source network here, so unit 1 is the arg max of line 7."""
    selection = flextune.fast_flex(scripted(source, train, val, {"all": 0.7, 1: a_best}))
    assert (selection.best, selection.chosen) == (1, chosen)


def test_a_single_epoch_that_lowers_the_accuracy_still_makes_proxies(source, val):
    """Algorithm 3, line 1, keeps the last state: with the best one, proxies would be the source."""
    x, y = images(200, seed=1)
    harmful, good = (x, (y + 1) % 4), images(100, seed=4)
    epoch = fine_tune(source, "all", harmful, good, FAST, epochs=1)
    assert epoch.accuracy < epoch.history[0][1] == 1
    selection = flextune.faster_flex(Task(source, harmful, good, FAST))
    assert min(selection.proxies.values()) < 1
    assert not same(selection.tuned["all"].net, source)


def test_surgery_takes_parameters_and_buffers_of_one_unit(source):
    other, before = small_net(), copy.deepcopy(source)
    other[1][1].running_mean += 1
    for unit in (1, 2, 4, 5):
        proxy = flextune.surgery(source, other, unit)
        for number in range(1, 6):
            assert same(proxy[number - 1], (other if number == unit else source)[number - 1])
    assert same(source, before)


def test_candidates_are_the_units_with_parameters(source):
    assert flextune.candidates(source) == [1, 2, 4, 5]


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("units", [1, 2, 4, 5, [4, 5], [1, 4], "all"], ids=str)
def test_only_the_named_units_change(source, train, val, units):
    before, random = copy.deepcopy(source), torch.get_rng_state()
    data = [tensor.clone() for tensor in (*train, *val)]
    result = fine_tune(source, units, train, val, FAST)
    assert same(source, before) and source.training
    assert all(weight.requires_grad for weight in source.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(a, b) for a, b in zip(data, (*train, *val)))
    for number, (mine, theirs) in enumerate(zip(result.net, source), 1):
        assert same(mine, theirs) == (number not in result.units or number == 3)
        for a, b in zip(mine.buffers(), theirs.buffers()):
            assert torch.equal(a, b)  # BatchNorm's statistics, in tuned units too
        tuned = number in result.units  # what stays frozen is shared: nothing should train it
        assert all(weight.requires_grad == tuned for weight in mine.parameters())
    assert not result.net.training
    numbers = range(1, 6) if units == "all" else units if isinstance(units, list) else [units]
    assert result.units == tuple(numbers)
    assert result.trained == sum(
        weight.numel() for number in numbers for weight in source[number - 1].parameters()
    )


def test_the_result_has_the_accuracy_it_says(source, train, val):
    result = fine_tune(source, 2, train, val, FAST)
    assert result.accuracy == flextune.accuracy(result.net, val)
    assert result.accuracy == pytest.approx(naive_accuracy(copy.deepcopy(result.net), val))
    assert result.accuracy == max(a for epoch, a in result.history if epoch > 0)
    assert result.history[0] == (0, flextune.accuracy(source, val))
    assert [epoch for epoch, _ in result.history] == list(range(0, result.epochs + 1, 2))


def test_dropout_is_off_in_frozen_units_and_on_in_tuned_ones(source, train, val):
    def with_dropout(p):
        net = small_net(dropout=p)
        net.load_state_dict(source.state_dict())
        return net

    for unit, matters in ((5, False), (1, False), (4, True), ("all", True)):
        tuned = [fine_tune(with_dropout(p), unit, train, val, FAST).net for p in (0.0, 0.9)]
        assert same(*tuned) != matters


def script_scores(monkeypatch, script):
    """The accuracies of the validations to come."""
    scores = iter(script)
    monkeypatch.setattr(Task, "right", lambda *_: torch.tensor([next(scores)]))
    return scores


@pytest.mark.parametrize(
    "script, epochs, best",
    [
        ([0.1, 0.3, 0.2, 0.3, 0.1], 10, 4),  # a tie is no improvement; epoch 0 does not count
        ([0.5, 0.4, 0.3, 0.6, 0.1, 0.1, 0.1], 14, 8),
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], 11, 11),  # the cap, and a last check at it
    ],
)
def test_early_stopping(monkeypatch, source, train, val, script, epochs, best):
    settings = replace(FAST, max_epochs=11 if epochs == 11 else 40)
    state = fine_tune(source, 2, train, val, settings, epochs=best).net
    reported = []
    task = Task(source, train, val, settings, reported.append)
    scores = script_scores(monkeypatch, script)
    result = flextune.fine_tune(task, 2)
    assert result.epochs == epochs
    assert result.accuracy == pytest.approx(script[-(-best // 2) - 1])
    assert len(reported) == len(result.history) - 1
    assert reported[0].startswith(f"unit 2: epoch 2, validation {script[0]:.3f}, at most ")
    assert same(result.net, state)
    assert next(scores, None) is None


def test_a_number_of_epochs_returns_the_last_state(monkeypatch, source, train, val):
    task = Task(source, train, val, FAST)
    script_scores(monkeypatch, [0.5, 0.4, 0.3, 0.2, 0.1])
    result = flextune.fine_tune(task, 2, epochs=9)
    assert (result.epochs, result.accuracy) == (9, pytest.approx(0.1))


def test_the_same_seed_gives_the_same_result_whatever_ran_before(source, train, val):
    def run(unit, seed=0):
        return fine_tune(source, unit, train, val, replace(FAST, seed=seed))

    first = {unit: run(unit) for unit in (1, 4, "all")}
    torch.manual_seed(99)
    again = {unit: run(unit) for unit in ("all", 4, 1)}
    for unit, result in first.items():
        assert same(result.net, again[unit].net)
        assert result.history == again[unit].history
    assert not same(first[4].net, run(4, seed=1).net)
    with torch.device("meta"):  # as another default device: what is made here is made where x is
        assert same(first[4].net, run(4).net)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
@pytest.mark.parametrize("cache_bytes", [1 << 30, 0])
def test_cuda_is_reproducible_and_agrees_with_the_cpu(source, train, val, cache_bytes):
    random = torch.cuda.get_rng_state()
    settings = replace(FAST, device="cuda", cache_bytes=cache_bytes)
    cpu = flextune.flex(Task(source, train, val, FAST))
    one, two = (flextune.flex(Task(source, train, val, settings)) for _ in range(2))
    assert torch.equal(torch.cuda.get_rng_state(), random)
    for unit, result in one.tuned.items():
        assert next(result.net.parameters()).device.type == "cuda"
        assert same(result.net, two.tuned[unit].net)
        assert result.accuracy == pytest.approx(cpu.tuned[unit].accuracy, abs=0.05)


@pytest.mark.parametrize("unit", [1, 4, "all"])
def test_beyond_the_cache_budget_the_result_is_the_same(source, train, val, unit):
    kept, recomputed = (
        fine_tune(source, unit, train, val, replace(FAST, cache_bytes=n)) for n in (1 << 30, 0)
    )
    assert kept.accuracy == recomputed.accuracy and kept.epochs == recomputed.epochs
    for a, b in zip(kept.net.parameters(), recomputed.net.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_uint8_images_are_floats_from_0_to_1(source, train, val):
    as_float = [(x / 255, y) for x, y in (train, val)]
    a, b = fine_tune(source, 2, train, val, FAST), fine_tune(source, 2, *as_float, FAST)
    assert same(a.net, b.net) and a.accuracy == b.accuracy


def test_in_place_layers_do_not_change_the_data(train, val):
    net = nn.Sequential(
        nn.Sequential(nn.LeakyReLU(0.5, inplace=True), nn.Linear(192, 8)),
        nn.Sequential(nn.LeakyReLU(0.5, inplace=True), nn.Linear(8, 4)),
    )
    train, val = ((x.flatten(1) / 255 - 0.5, y) for x, y in (train, val))
    before = val[0].clone()
    result = fine_tune(net, 2, train, val, FAST)
    assert torch.equal(val[0], before)
    assert result.accuracy == flextune.accuracy(result.net, val)
    assert torch.equal(val[0], before)


@pytest.mark.parametrize("kind", [torch.float64, torch.uint8])
def test_images_are_brought_to_the_precision_of_the_network(source, val, kind):
    x = val[0] if kind == torch.uint8 else (val[0] / 255).to(kind)
    double = copy.deepcopy(source).double()
    expected = flextune.accuracy(source, val)
    assert flextune.accuracy(double, (x, val[1])) == expected
    assert flextune.accuracy(source, (x, val[1])) == expected


def test_a_dropout_layer_in_two_units_is_off_in_the_frozen_one(source, train, val):
    def net(*dropouts):
        units = nn.Sequential(nn.Flatten(), nn.Linear(192, 16)), nn.Linear(16, 16)
        torch.manual_seed(0)
        return nn.Sequential(
            *(nn.Sequential(unit, dropout) for unit, dropout in zip(units, dropouts)),
            nn.Linear(16, 4),
        )

    shared = nn.Dropout(0.5)
    one, two = net(shared, shared), net(nn.Dropout(0.5), nn.Dropout(0.5))
    two.load_state_dict(one.state_dict())
    for unit in (1, 2):
        assert same(*(fine_tune(each, unit, train, val, FAST).net for each in (one, two)))


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm1d(8), nn.InstanceNorm1d(8, track_running_stats=True)]
)
def test_every_norm_keeps_its_statistics(train, val, norm):
    net = nn.Sequential(
        nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.Unflatten(1, (8, 2)), norm),
        nn.Sequential(nn.Flatten(), nn.Linear(16, 4)),
    )
    tuned = fine_tune(net, "all", train, val, FAST).net
    assert not same(tuned, net)
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, tuned.get_buffer(name))


def test_the_frozen_units_run_once(monkeypatch, source, train, val):
    seen = []

    class Counting(nn.Module):
        def forward(self, x):
            seen.append(len(x))
            return x

    net = nn.Sequential(Counting(), *copy.deepcopy(source))
    epochs = fine_tune(net, 5, train, val, FAST).epochs
    assert epochs > 2 and sum(seen) < 270  # 133 images, 100 for epoch 0, and those of the trial
    seen.clear()
    fine_tune(net, 5, train, val, replace(FAST, cache_bytes=0))
    assert sum(seen) > epochs * 33


def test_in_a_selection_the_source_runs_once_on_each_image(train, val, source):
    seen = []

    class Counting(nn.Module):
        def forward(self, x):
            seen.append(len(x))
            return x

    net, settings = nn.Sequential(Counting(), *source), replace(FAST, max_epochs=1)
    flextune.flex(Task(net, train, val, settings))
    flex = sum(seen)
    seen.clear()
    fine_tune(net, "all", train, val, settings)
    whole = sum(seen)
    assert flex - whole < 300  # 133 images, twice 100 for epoch 0 and its candidates, single ones
    seen.clear()
    flextune.faster_flex(Task(net, train, val, settings))
    assert sum(seen) - whole < 300  # five proxies have 100 images each


def test_networks_of_a_selection_share_what_is_frozen(source, train, val):
    tuned = flextune.flex(Task(source, train, val, replace(FAST, max_epochs=1))).tuned

    def memory(*units):
        return {tensor.data_ptr() for unit in units for tensor in unit.state_dict().values()}

    for number in (1, 2, 4, 5):
        own, other = tuned[number].net, tuned[4 if number != 4 else 5].net
        for place in {1, 2, 4, 5} - {number, *tuned[4 if number != 4 else 5].units}:
            assert memory(own[place - 1]) == memory(other[place - 1])
        assert not memory(own[number - 1]) & memory(other, source)
        assert not memory(own) & memory(source)
        assert all(weight.grad is None for weight in own.parameters())


def test_top_k_is_the_measure_everywhere(source, train, val):
    two = replace(FAST, top_k=2)
    task = Task(source, train, val, two)
    selection = flextune.fast_flex(task)
    best = selection.tuned[selection.best]
    assert best.accuracy == flextune.accuracy(best.net, val, two) > flextune.accuracy(best.net, val)
    for unit, a in selection.proxies.items():
        proxy = flextune.surgery(task.net, selection.tuned["all"].net, unit)
        assert a == flextune.accuracy(proxy, val, two)


def test_a_class_without_training_images(source, train, val):
    x, y = train
    result = fine_tune(source, "all", (x[y > 0], y[y > 0]), val, FAST)
    assert not result.diverged and 0 < result.accuracy <= 1


def test_one_training_image_and_one_validation_image(source):
    result = fine_tune(source, "all", images(1, seed=5), images(1, seed=6), FAST)
    assert result.accuracy in (0, 1) and not result.diverged


def test_a_diverged_candidate_is_the_source(source, train, val):
    result = fine_tune(source, "all", train, val, replace(FAST, lr=1e30))
    assert result.diverged and same(result.net, source)
    assert result.accuracy == result.history[0][1] == flextune.accuracy(source, val)
    # A single step: its loss is finite, only the weights are not.
    step = fine_tune(source, "all", images(4, 5), val, replace(FAST, lr=1e38), epochs=1)
    assert step.diverged and same(step.net, source)


def test_a_candidate_that_diverges_later_keeps_its_best_state(monkeypatch, source, train, val):
    expected = fine_tune(source, 2, train, val, replace(FAST, max_epochs=4))
    steps = iter(range(10**6))

    def loss(*batch):  # 3 steps an epoch: NaN from epoch 6 on
        return cross_entropy(*batch) * (torch.nan if next(steps) >= 15 else 1)

    task = Task(source, train, val, replace(FAST, loss=loss))
    steps = iter(range(10**6))
    result = flextune.fine_tune(task, 2)
    assert result.diverged and result.epochs == 6
    assert same(result.net, expected.net) and result.accuracy == expected.accuracy


class Wrapped(nn.Sequential):
    def forward(self, x):
        return super().forward(x * 2)


def tied():
    layer = nn.Linear(4, 4)
    return nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), layer, nn.ReLU(), layer)


X, Y = images(8, seed=0)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"net": nn.Linear(3, 3)}, "must be an nn.Sequential of units"),
        ({"net": Wrapped(nn.Flatten(), nn.Linear(192, 4))}, "must be an nn.Sequential of units"),
        ({"net": tied()}, "two of them share some"),
        ({"net": nn.Sequential(nn.Flatten())}, "have no parameters"),
        ({"units": 0}, "0: the units that can be tuned are 1, 2, 4, 5"),
        ({"units": [[5]]}, "units [[5]]: unhashable"),
        ({"units": [5, 6]}, "the units that can be tuned are 1, 2, 4, 5"),
        ({"units": 3}, "3: the units that can be tuned are 1, 2, 4, 5"),
        ({"units": "fc"}, "fc: the units that can be tuned are 1, 2, 4, 5"),
        ({"train": (X, Y[:7])}, "[8, 3, 8, 8], y torch.int64 [7]"),
        ({"train": (X, Y.int())}, "y torch.int32 [8]"),
        ({"train": (X[:0], Y[:0])}, "[0, 3, 8, 8], y torch.int64 [0]"),
        ({"train": X}, "train and val must be (x, y)"),
        ({"val": (X.numpy(), Y.numpy())}, "train and val must be (x, y)"),
        ({"train": (X, Y + 1)}, "labels and top_k must fit the network's 4 classes"),
        ({"val": (X, Y - 1)}, "labels and top_k must fit the network's 4 classes"),
        ({"train": (X.int(), Y)}, "x is torch.int32 [8, 3, 8, 8]"),
        ({"val": (X / torch.zeros(1), Y)}, "x has NaN"),
        ({"val": (X[..., :7], Y)}, "images of another size"),
        ({"settings": replace(FAST, top_k=5)}, "must fit the network's 4 classes"),
        ({"settings": replace(FAST, device="cuda:99")}, "device cuda:99: "),
    ],
)
def test_what_would_pass_unnoticed_is_an_error(source, wrong, message):
    good = {"net": source, "units": 5, "train": (X, Y), "val": (X, Y), "settings": FAST}
    with pytest.raises(ValueError, match=re.escape(message)):
        fine_tune(**good | wrong)


class Do(nn.Module):
    """A unit of a function of (module, x), with parameters."""

    def __init__(self, do, **parameters):
        super().__init__()
        self.do = do
        for name, value in parameters.items():
            setattr(self, name, nn.Parameter(value, value.is_floating_point()))

    def forward(self, x):
        return self.do(self, x)


def around(*units, features=192, head=4):
    """A network of `units`, a linear one before them and one after."""
    before = nn.Sequential(nn.Flatten(), nn.Linear(192, features))
    return nn.Sequential(before, *units, nn.Linear(features, head))


def hooked():
    net = around()
    net.register_forward_pre_hook(lambda module, args: (args[0] / 2,))
    return net


def buffered():
    net = around()
    net.register_buffer("version", torch.zeros(1))
    return net


def auxiliary(unit, x):
    return (x * unit.gain, x) if unit.training else x * unit.gain


GAIN = {"gain": torch.ones(1)}


@pytest.mark.parametrize(
    "net, message",
    [
        (hooked, "must be an nn.Sequential of units that adds nothing"),
        (buffered, "must be an nn.Sequential of units that adds nothing"),
        (lambda: around(Do(auxiliary, **GAIN)), "unit 2, in training: "),
        (lambda: around(Do(lambda unit, x: x.features)), "unit 2: 'Tensor' object has no"),
        (lambda: around(Do(lambda unit, x: x * unit.q, q=torch.ones(1).char())), "unit 2, in trai"),
        (lambda: around(Do(lambda unit, x: x + torch.rand_like(x))), "unit 2 is random in eval"),
        (lambda: around(torch.jit.script(nn.Linear(192, 192))), "unit 2: "),
        (lambda: around(nn.utils.weight_norm(nn.Linear(192, 192))), "unit 2: "),
        (lambda: around(nn.Sequential(Do(lambda unit, x: x.long().clamp(0, 9)),
            nn.Embedding(10, 1, sparse=True), nn.Flatten())), "unit 2, in training: "),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_units_that_cannot_be_worked_with_are_named_before_the_training(net, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        Task(net(), (X, Y), (X, Y), FAST)
    assert "\n" not in str(caught.value)


def test_units_that_no_gradient_reaches_are_named(train, val):
    task = Task(around(Do(lambda unit, x: x.detach())), train, val, FAST)
    assert fine_tune(task.net, 3, train, val).epochs
    with pytest.raises(ValueError, match="unit 1: no gradient reaches it"):
        flextune.flex(task)
    with torch.inference_mode(), pytest.raises(ValueError, match="no gradient reaches it"):
        Task(around(), train, val, FAST)


@pytest.mark.parametrize(
    "below, above",
    [
        (lambda _, x: (x.clamp(0, 1) * 255).round().byte(), lambda _, x: x.float() / 255),
        (lambda _, x: x.bfloat16(), lambda _, x: x.float()),
        (lambda _, x: x.long(), lambda _, x: x.float()),
        (lambda _, x: x.view(len(x), 4, 4, 12).permute(0, 3, 1, 2).contiguous(), None),
        (lambda _, x: x.view(len(x), 4, 48).transpose(0, 1), lambda _, x: x.transpose(0, 1)),
        (lambda _, x: (x, 2 * x), lambda _, x: x[0] + x[1]),
        (lambda _, x: x.unflatten(1, (192, 1)).squeeze(), None),
    ],
    ids=["uint8", "bfloat16", "int64", "view", "time first", "tuple", "squeeze"],
)
@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_what_units_hand_on_reaches_the_next_as_it_is(train, val, below, above, cache_bytes):
    flat = nn.Sequential(Do(above or (lambda _, x: x)), Do(lambda _, x: x.view(len(x), -1)))
    torch.manual_seed(0)
    net = around(Do(below), nn.Sequential(flat, nn.Linear(192, 8), nn.Linear(8, 192)))
    train = [tensor[:32] for tensor in train]  # without a batch of one image, for `squeeze`
    result = fine_tune(net, 3, train, val, replace(FAST, cache_bytes=cache_bytes))
    assert result.accuracy == pytest.approx(naive_accuracy(result.net, val))
    assert result.history[0][1] == pytest.approx(naive_accuracy(copy.deepcopy(net), val))


class Centre(nn.Module):
    """Keeps a mean as a buffer that is not in its state_dict, and a count as an attribute."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1), persistent=False)
        self.seen, self.gain = 0, nn.Parameter(torch.ones(1))

    def forward(self, x):
        if self.training:
            self.mean.lerp_(x.detach().mean(), 0.5)
            self.seen += len(x)
        return (x - self.mean - self.seen / 1e4) * self.gain


def test_the_best_state_is_all_of_the_module(train, val):
    result = fine_tune(around(Centre()), "all", train, val, replace(FAST, lr=0.3))
    assert result.epochs > max(result.history, key=lambda pair: pair[1])[0]  # it went on after it
    assert result.accuracy == flextune.accuracy(result.net, val)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_memory_layout_stays(source, train, val, layout):
    net = copy.deepcopy(source).to(memory_format=layout)
    result = fine_tune(net, [1, 4], train, val)
    for mine, theirs in zip(result.net.parameters(), net.parameters()):
        assert mine.stride() == theirs.stride()


def test_large_finite_weights_of_float16_are_no_divergence(train, val):
    net = around(Do(lambda unit, x: x + unit.w.mean(), w=torch.full((9000,), 60.0))).half()
    assert not fine_tune(net, 2, train, val, replace(FAST, lr=1e-4)).diverged


def test_tokens_and_tables():
    tokens, y = torch.randint(9, (40, 6), generator=generator()), torch.arange(40) % 3
    text = nn.Sequential(nn.Embedding(9, 8), nn.LSTM(8, 8, batch_first=True),
        nn.Sequential(Do(lambda _, x: x[0][:, -1]), nn.Linear(8, 3)))  # fmt: skip
    for net, x in ((text, tokens), (nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)), tokens / 9)):
        selection = flextune.flex(Task(net, (x, y), (x, y), FAST))
        assert selection.result.accuracy == flextune.accuracy(selection.result.net, (x, y))


def test_augment_sees_every_training_batch_alike_and_no_other(source, train, val):
    seen = []

    def augment(x):
        seen.append(x.sum((1, 2, 3)).tolist())
        return x.flip(3)

    task = Task(source, train, val, replace(FAST, augment=augment, max_epochs=2))
    batches = []
    for unit in (1, 5, "all"):
        seen.clear()
        flextune.fine_tune(task, unit)
        batches.append(copy.copy(seen))
    assert batches[0] == batches[1] == batches[2] and sum(map(len, batches[0])) == 2 * 33
    flipped = fine_tune(source, 5, (train[0].flip(3), train[1]), val, replace(FAST, max_epochs=2))
    assert flextune.fine_tune(task, 5).history == flipped.history


def test_a_loss_of_the_users(source, train, val):
    smooth = partial(cross_entropy, label_smoothing=0.3)
    plain, other = (fine_tune(source, 5, train, val, replace(FAST, loss=loss)).net
        for loss in (cross_entropy, smooth))  # fmt: skip
    assert not same(plain, other)


def test_after_an_interrupt_the_task_goes_on(source, train, val):
    lines = []

    def report(text):
        lines.append(text)
        if len(lines) == 9:
            raise KeyboardInterrupt

    task = Task(source, train, val, FAST, report)
    with pytest.raises(KeyboardInterrupt):
        flextune.flex(task)
    kept = [*task.results]
    assert kept
    selection = flextune.flex(task)
    assert [*task.results][: len(kept)] == kept
    again = flextune.flex(Task(source, train, val, FAST))
    assert {u: one.history for u, one in selection.tuned.items()} == {
        u: one.history for u, one in again.tuned.items()
    }


def test_units_have_names(train, val):
    names = {"stem": nn.Flatten(), "layer4/0": nn.Linear(192, 8), "fc": nn.Linear(8, 4)}
    net = nn.Sequential()
    for name, unit in names.items():
        net.add_module(name, unit)
    lines = []
    task = Task(net, train, val, FAST, lines.append)
    assert flextune.fine_tune(task, ["layer4.0", 3]).units == (2, 3)
    assert lines[0].startswith("unit 2 layer4.0, 3 fc: epoch 2, validation 0.")
    assert flextune.label(net, "all") == "all" and flextune.label(net, 2) == "2 layer4.0"
    with pytest.raises(ValueError, match="layer5: the units that can be tuned are 2 layer4.0, 3 f"):
        flextune.fine_tune(task, "layer5")


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_line_and_on_a_terminal_rewritten(monkeypatch, capsys, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    for text in ("one", "two" * 99, ""):
        flextune.show(text)
    rows = capsys.readouterr().err
    assert rows.startswith("\rone\x1b[K\rtwo" if terminal else "one\ntwotwo")
    assert rows.endswith("\r\x1b[K" if terminal else "two\n") and ("\n" not in rows) == terminal


def test_a_layer_that_is_two_units(train, val):
    relu = nn.ReLU()
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))
    net = nn.Sequential(nn.Conv2d(3, 4, 3), relu, nn.Conv2d(4, 4, 3), relu, head)
    for select in (flextune.flex, flextune.fast_flex):
        result = select(Task(net, train, val, FAST)).result
        assert len(result.net) == 5 and flextune.accuracy(result.net, val) == result.accuracy
    assert flextune.ft_ss(Task(net, train, val, FAST)).net(val[0] / 255).shape == (100, 4)


def test_top_k_accuracy():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 4, bias=False))
    net[1].weight.data = torch.eye(4)

    def top(logits, y):
        data = logits[:, :, None, None], torch.tensor(y)
        return [flextune.accuracy(net, data, replace(FAST, top_k=k)) for k in (1, 2, 3, 4)]

    logits = torch.tensor([[3.0, 2, 1, 0], [0, 1, 2, 3], [0, 3, 1, 2]])
    assert top(logits, [1, 3, 0]) == pytest.approx([1 / 3, 2 / 3, 2 / 3, 1])
    assert top(torch.ones(4, 4), [0, 1, 2, 3]) == [1 / 4, 1 / 2, 3 / 4, 1]  # as argmax ranks equals
    net[1].weight.data[0, 0] = torch.nan
    assert top(logits, [1, 3, 0]) == [0, 0, 0, 0]


# ---------------------------------------------------------------- baselines


def test_ft_fc_tunes_the_last_units(source, train, val):
    task = Task(source, train, val, FAST)
    for n, units in ((1, (5,)), (2, (4, 5)), (3, (2, 4, 5))):
        assert flextune.ft_fc(task, n).units == units


def test_ft_all_tunes_all_units(source, train, val):
    expected = fine_tune(source, "all", train, val, FAST)
    assert same(flextune.ft_all(Task(source, train, val, FAST)).net, expected.net)


def test_the_source_baseline_is_untouched(source, train, val):
    result = run_all.source(Task(source, train, val, FAST))
    assert same(result.net, source) and result.trained == result.epochs == 0
    assert result.accuracy == flextune.accuracy(source, val)


def test_ft_ss_tunes_scales_shifts_and_the_last_unit(source, train, val):
    before = copy.deepcopy(source)
    result = flextune.ft_ss(Task(source, train, val, FAST))
    net = result.net
    # Scales: a kernel (output, input), or an output of the linear layer; shifts: an output.
    assert result.trained == (8 * 3 + 8) + (8 * 8 + 8) + (16 + 16) + (16 * 4 + 4)
    assert same(source, before) and source.training and not net.training
    assert result.accuracy == flextune.accuracy(net, val)
    for layer, old in ((net[0][0], source[0][0]), (net[1][0], source[1][0])):
        scales = layer.weight / old.weight  # (output, input, 3, 3)
        torch.testing.assert_close(scales, scales[:, :, :1, :1].expand_as(scales))
        assert scales.std() > 0
    scales = net[3][1].weight / source[3][1].weight
    torch.testing.assert_close(scales, scales[:, :1].expand_as(scales))
    assert source[0][0].bias is None and net[0][0].bias.abs().min() > 0
    for mine, theirs in ((net[0][1], source[0][1]), (net[1][1], source[1][1])):
        assert same(mine, theirs)  # BatchNorm: affine parameters and statistics
    assert not same(net[4], source[4])


def test_ft_ss_keeps_the_statistics_whatever_the_settings_say(source, train, val):
    result = flextune.ft_ss(Task(source, train, val, replace(FAST, batch_statistics=True)))
    assert same(result.net[0][1], source[0][1])
    assert result.accuracy == flextune.accuracy(result.net, val)


def test_ft_ss_starts_from_the_source(source, train, val):
    result = flextune.ft_ss(Task(source, train, val, replace(FAST, lr=1e-12)))
    assert result.accuracy == flextune.accuracy(source, val)


# ---------------------------------------------------------------- certainty and retrieval


def answering(*right):
    """A network that has the i-th of one-hot images right, class 0, if right[i]."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(len(right), 2, bias=False))
    net[1].weight.data = torch.tensor([right, [1 - a for a in right]]).float()
    return net


def test_certainty_known_values():
    patterns = {
        1: (1, 1, 1, 1, 1, 1, 0, 0),
        2: (1, 1, 1, 1, 1, 1, 1, 0),
        "all": (0, 1, 1, 1, 1, 1, 1, 0),  # ties with 1, which comes first
    }
    val = torch.eye(8)[:, :, None, None], torch.zeros(8, dtype=torch.int64)
    task = Task(answering(*patterns[1]), val, val, FAST)
    tuned = {
        unit: Result(answering(*right), (), sum(right) / 8, 1, 0.0, [], 0)
        for unit, right in patterns.items()
    }
    sure = flextune.certainty(task, flextune.Selection(2, 2, tuned))
    assert sure["runner_up"] == 1
    assert sure["lead"] == pytest.approx(1 / 8)
    # The differences are one 1 and seven 0: their variance is 1/8 - 1/64.
    assert sure["error"] == pytest.approx(((1 / 8 - 1 / 64) / 8) ** 0.5)
    assert sure["bound"] == pytest.approx((np.log(2 * 3 / 0.05) / 16) ** 0.5)
    assert flextune.Selection(2, 2, tuned).tied == [2]
    assert flextune.Selection(1, 1, {1: tuned[1], "all": tuned["all"]}).tied == [1, "all"]
    with pytest.raises(ValueError, match="of flex alone"):
        flextune.certainty(task, flextune.Selection(2, 2, tuned, {1: 0.5, 2: 0.6}))


def test_average_precision_by_hand():
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 3))
    far = nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(1, 1)), nn.Linear(1, 3))
    far[0][1].weight.data[:], far[0][1].bias.data[:] = 1, 6  # sees a query 6 to the right
    gallery = torch.arange(1.0, 6)[:, None, None, None], torch.tensor([0, 1, 0, 0, -1])
    task = Task(net, *[(gallery[0], torch.zeros(5, dtype=torch.int64))] * 2, FAST)

    def ap(tuned, *labels, k=10):
        queries = torch.zeros(len(labels), 1, 1, 1), torch.tensor(labels)
        return run_all.retrieval(task, tuned, gallery, queries, k)

    # Relevant at places 1, 3 and 4, with precisions 1, 2/3 and 3/4.
    assert ap(net, 0) == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
    assert ap(net, 0, k=3) == pytest.approx((1 + 2 / 3) / 3)
    assert ap(net, 0, k=2) == pytest.approx(1 / 2)
    assert ap(net, 1) == pytest.approx(1 / 2)  # one relevant image, at place 2
    assert ap(net, 2) == 0  # none
    assert ap(net, 0, 1, 2, k=3) == pytest.approx((5 / 9 + 1 / 2 + 0) / 3)
    assert ap(far, 0) == pytest.approx((1 / 2 + 2 / 3 + 3 / 5) / 3)  # from the other end


def test_features_are_the_input_of_the_last_unit_averaged_over_pixels(source, val):
    features = run_all.features(Task(source, val, val, FAST), source, val[0])
    expected = copy.deepcopy(source).eval()[:4](val[0] / 255)
    torch.testing.assert_close(features, expected.detach())
    maps = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Sequential(nn.Flatten(), nn.Linear(180, 4)))
    features = run_all.features(Task(maps, val, val, FAST), maps, val[0])
    torch.testing.assert_close(features, maps[0](val[0] / 255).mean((2, 3)).detach())


# ---------------------------------------------------------------- image-to-image units


@pytest.mark.parametrize("kind", [models.Pixelwise, models.SpatialTransformer, models.UNet])
def test_image_to_image_units_start_as_the_identity_and_learn(source, train, val, kind):
    unit = run_all.seeded(partial(kind, 3), 0)
    for size in ((8, 8), (28, 28), (32, 40)):
        x = torch.rand(3, 3, *size, generator=generator())
        torch.testing.assert_close(unit(x), x, rtol=0, atol=1e-5)
    settings = FAST
    if kind is models.SpatialTransformer:  # is not for colours and noise
        settings = replace(FAST, lr=1e-3)
        train, val = (
            (shifts.affine(x, [0.0], [[1.0, 1.0]], [[-2.0, 0.0]]), y)
            for x, y in (images(33, seed=2), images(100, seed=3))
        )
    result = fine_tune(nn.Sequential(unit, *source), 1, train, val, settings)
    assert result.history[0][1] == flextune.accuracy(source, val)
    assert not same(result.net[0], unit)
    assert all(same(a, b) for a, b in zip(result.net[1:], source))
    assert result.accuracy > result.history[0][1]


def test_a_spatial_transformer_can_undo_an_affine_shift():
    x, _ = shifts.draw_digits(50, generator())
    moved = shifts.affine(x, [0.0], [[1.0, 1.0]], [[-7.0, 0.0]])  # 7 pixels to the right
    unit = models.SpatialTransformer(1)
    unit.locate[-1].bias.data[2] = 0.5  # of the image's half width
    back = unit(moved / 255) * 255
    assert (back[..., :20] - x[..., :20]).abs().max() <= 1


def test_flex_with_an_image_to_image_unit_is_flex_with_one_more_candidate(source, train, val):
    plain = flextune.flex(Task(source, train, val, FAST))
    more = run_all.flex_i2i(Task(source, train, val, FAST), "yuv")
    assert [*more.tuned] == [1, 2, 4, 5, "all", 0]
    assert all(same(more.tuned[unit].net, plain.tuned[unit].net) for unit in plain.tuned)
    assert more.tuned[0].units == (0,) and len(more.tuned[0].net) == 6
    assert more.chosen == arg_max({unit: result.accuracy for unit, result in more.tuned.items()})


def test_the_kind_of_image_to_image_unit_follows_the_shift():
    kinds = {target: run_all.image_to_image(target) for _, target in run_all.SCENARIOS}
    by_kind = {kind: {t for t in kinds if kinds[t] is kind} for kind in kinds.values()}
    assert by_kind.pop(models.Pixelwise) == {"yuv", "hsv"}
    affine = {"rotation", "scaling-symmetric", "scaling-stretch"}
    affine |= {"transform-random", "transform-fixed"}
    assert by_kind.pop(models.SpatialTransformer) == affine
    assert [*by_kind] == [models.UNet]


# ---------------------------------------------------------------- shifts


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", shifts.SHIFTS, ids=str)
def test_every_shift_gives_uint8_images_the_same_for_the_same_seed(name):
    shift = shifts.SHIFTS[name]
    if name[1] == "mnist-m":
        shift = partial(shift, photos=shifts.draw_photos(3))
    x, _ = shifts.BUILT_IN[name[0]][0](30, generator())
    before = x.clone()
    a, b, c = (shift(x, draw=generator(seed)) for seed in (0, 0, 1))
    channels = 3 if name[1] == "mnist-m" else x.shape[1]
    assert a.dtype == torch.uint8 and a.shape == (30, channels, *x.shape[2:])
    assert torch.equal(x, before) and not torch.equal(a, x.expand_as(a))
    assert torch.equal(a, b)
    drawn = name[1] in ("occluded", "transform-random", "mnist-m", "noisy")
    assert torch.equal(a, c) != drawn


@pytest.mark.parametrize("taps, sigma", [(8, 1.0), (4, 0.5), (5, 0.5)])
def test_blur_is_the_convolution_of_the_protocol(taps, sigma):
    """Literally: intervals of a normal distribution, the root of an outer product, SAME padding."""
    half = (2 * sigma + 1) / (2 * taps)
    edges = np.linspace(-sigma - half, sigma + half, taps + 1)
    tap = np.diff([math.erf(edge / 2**0.5) / 2 for edge in edges])
    kernel = np.sqrt(np.outer(tap, tap))
    kernel /= kernel.sum()
    x = torch.randint(0, 256, (2, 1, 9, 9), generator=generator(), dtype=torch.uint8)
    before, after = (taps - 1) // 2, taps // 2
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (before, after), (before, after)))
    y = shifts.blur(x, None, taps, sigma).numpy()
    for row in range(9):
        for column in range(9):
            window = padded[:, 0, row : row + taps, column : column + taps]
            expected = (window * kernel).sum((1, 2))
            assert np.abs(y[:, 0, row, column] - expected).max() <= 0.51


def test_occlude_covers_a_square_of_half_the_side():
    x = torch.full((400, 1, 28, 28), 255, dtype=torch.uint8)
    covered = shifts.occlude(x, generator())[:, 0] == 0  # (400, 28, 28)
    rows, columns = covered.any(2), covered.any(1)
    assert torch.equal(covered, rows[:, :, None] & columns[:, None, :])
    for lines in (rows, columns):
        assert (lines.sum(1) == 14).all()
        starts = lines.int().argmax(1)
        assert (lines.int().diff(dim=1).abs().sum(1) <= 2).all()  # in one piece
        assert set(starts.tolist()) == {*range(14)}  # the corner is in the first half


def test_affine_known_maps():
    x, _ = shifts.draw_digits(10, generator())
    one, still = [[1.0, 1.0]], [[0.0, 0.0]]
    assert torch.equal(shifts.affine(x, [0.0], one, still), x)
    # About (14, 14), so that the first row and column go out of the image.
    turned = shifts.affine(x, [torch.pi / 2], one, still)
    assert torch.equal(turned[..., 1:, 1:], x.rot90(1, (2, 3))[..., :-1, 1:])  # anti-clockwise
    moved = shifts.affine(x, [0.0], one, [[-7.0, 0.0]])  # 7 pixels to the right
    assert torch.equal(moved[..., 7:], x[..., :-7]) and moved[..., :7].max() == 0
    small = shifts.affine(torch.full_like(x, 255), [0.0], [[2.0, 1.0]], still)
    assert (small > 0).float().mean().item() == pytest.approx(0.5)  # half as wide
    each = shifts.affine(
        x[:2], torch.tensor([0.0, torch.pi / 2]), torch.ones(2, 2), torch.zeros(2, 2)
    )
    assert torch.equal(each[0], x[0]) and torch.equal(each[1], turned[1])


def test_affine_is_the_map_of_the_protocol():
    """Literally, for one image: input = centre + S R (output - centre) + move."""
    x = torch.randint(1, 256, (1, 1, 28, 28), generator=generator(), dtype=torch.uint8)
    angle, scale, move = -0.3764, np.array([2.4261, 2.0980]), np.array([-0.1407, 0.3777])
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    y = shifts.SHIFTS["mnist", "transform-fixed"](x, None)
    for row in range(28):
        for column in range(28):
            there = 14 + scale * (turn @ np.array([column - 14, row - 14])) + move
            from_column, from_row = np.floor(there + 0.5).astype(int)
            inside = 0 <= from_column < 28 and 0 <= from_row < 28
            assert y[0, 0, row, column] == (x[0, 0, from_row, from_column] if inside else 0)


def test_transform_random_draws_within_its_limits(monkeypatch):
    drawn = []
    monkeypatch.setattr(shifts, "affine", lambda x, *parameters: drawn.extend(parameters))
    shifts.transform_random(torch.zeros(5000, 1, 28, 28, dtype=torch.uint8), generator())
    angle, scale, move = drawn
    assert angle.abs().max() <= 1.5 and angle.std().item() == pytest.approx(1.5 / 3**0.5, abs=0.03)
    assert 1 <= scale.min() < 1.01 and 2.49 < scale.max() <= 2.5
    assert (move.abs() <= (scale - 1) / 2).all() and (move.abs() > 0.4 * (scale - 1)).any()


def test_noise_is_gaussian_truncated_and_clipped():
    x = torch.full((300, 3, 8, 8), 128, dtype=torch.uint8)
    y = shifts.noise(x, generator(), sigma=20).float()
    assert y.mean().item() == pytest.approx(127.5, abs=0.5)  # cut off, not rounded
    assert y.std().item() == pytest.approx(20, abs=0.5)
    y = shifts.noise(x, generator(), sigma=1000)
    assert ((y == 0) | (y == 255)).float().mean() > 0.8


def test_yuv_and_hsv_known_colours():
    rgb = torch.randint(0, 256, (50, 3, 1, 1), generator=generator(), dtype=torch.uint8)
    rgb[:5, :, 0, 0] = torch.tensor([[0] * 3, [255] * 3, [255, 0, 0], [0, 0, 255], [255, 255, 0]])
    for got, (r, g, b) in zip(shifts.hsv(rgb, None)[..., 0, 0], (rgb[..., 0, 0] / 255).tolist()):
        expected = torch.tensor(colorsys.rgb_to_hsv(r, g, b)) * 255
        assert (got - expected).abs().max() <= 0.51
    got = shifts.yuv(rgb, None)[:5, :, 0, 0].tolist()  # negative halves are cut off
    assert got == [[0, 0, 0], [255, 0, 0], [76, 0, 157], [29, 111, 0], [226, 0, 26]]


def test_mirrored_borders_and_their_sizes():
    row = torch.arange(1, 9, dtype=torch.uint8) * 20
    x = row.expand(1, 3, 8, 8)
    one = shifts._mirrored(x, [2])[0, 0, 5].tolist()
    assert one == [40, 20, *row.tolist(), 160, 140]
    two = shifts._mirrored(x, [1, 2])[0, 0, 5].tolist()  # one after the other: it stretches
    assert two == [20, 20, 20, *row.tolist(), 160, 160, 160]
    borders = shifts.SHIFTS["ilsvrc", "scaling-stretch"].keywords["borders"]
    assert borders(224) == [1, 2, 4, 8, 16, 32, 64]
    for target, scale in (("scaling-symmetric", 402 / 224), ("scaling-stretch", 478 / 224)):
        square = torch.zeros(1, 3, 224, 224, dtype=torch.uint8)
        square[..., 92:132, 92:132] = 255  # forty pixels in the middle
        small = shifts.SHIFTS["ilsvrc", target](square, None) > 127
        assert small.shape == square.shape
        assert small[0, 0, 112, 82:142].sum().item() == pytest.approx(40 / scale, abs=1.5)


def test_rotate_is_anti_clockwise_in_a_mirrored_border():
    x = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    x[..., 30:34, 48:60] = 255  # a bar on the right
    y = shifts.rotate(x, None, angle=torch.pi / 2)[0, 0]
    assert y[:24].float().mean() > 5 * y[40:].float().mean() + 1  # is at the top
    flat = torch.full((1, 3, 64, 64), 99, dtype=torch.uint8)
    turned = shifts.rotate(flat, None, angle=0.6)
    assert (turned == 99).float().mean() > 0.98  # where the border ends, a corner is black


def test_mnist_m_is_the_difference_of_patch_and_binary_digit():
    x, _ = shifts.draw_digits(20, generator())
    flat = [torch.tensor([10, 100, 255], dtype=torch.uint8)[:, None, None].expand(3, 40, 30)]
    y = shifts.photo_background(x, generator(), flat)
    for channel, value in enumerate((10, 100, 255)):
        expected = (value - 255 * (x[:, 0] > 0).int()).abs()
        assert torch.equal(y[:, channel].int(), expected)
    ramp = torch.arange(60 * 60).remainder(251).byte().view(1, 60, 60).expand(3, -1, -1)
    patches = shifts.photo_background(torch.zeros_like(x), generator(), [ramp])
    windows = ramp[0].unfold(0, 28, 1).unfold(1, 28, 1).flatten(0, 1)  # every patch of the photo
    assert all((windows == patch[0]).all((1, 2)).any() for patch in patches)


def test_images_are_given_as_the_network_takes_them(monkeypatch):
    monkeypatch.setattr(shifts, "_builtin", few_images)
    sizes = {"mnist": (1, 28, 28), "cifar": (3, 32, 32), "quickdraw": (1, 32, 32)}
    for source, target in run_all.SCENARIOS:
        if source in sizes and target in ("mnist-m", "svhn", "quickdraw", "cifar", "noisy"):
            for x, _ in shifts.load(source, target, None).values():
                assert x.dtype == torch.uint8 and x.shape[1:] == sizes[source]
    colour, _ = shifts.BUILT_IN["svhn"][0](5, generator())
    grey = shifts._to_input(colour, 1, 28)
    assert (grey - colour.float().mean(1, keepdim=True)).abs().max() <= 0.51
    drawings = shifts.load("cifar", "quickdraw", None)["test"][0]
    assert torch.equal(drawings[:, 0], drawings[:, 2])
    assert drawings.float().mean() > 128  # dark on white


# ---------------------------------------------------------------- splits and subsampling


@pytest.mark.parametrize(
    "sizes, ratio, expected",
    [
        ([300, 300, 300], 10, [10, 10, 10]),
        ([600, 301, 100], 10, [20, 11, 4]),  # a thirtieth, rounded up
        ([960, 20, 1], 1, [4, 1, 1]),  # one of each
        ([10, 20, 30], 300, [10, 20, 30]),  # the largest ratio is the whole pool
    ],
)
def test_subsample_takes_the_share_of_each_class(sizes, ratio, expected):
    y = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    x = torch.arange(len(y))
    drawn, classes = shifts.subsample((x, y), ratio, 300, seed=0)
    assert classes.bincount().tolist() == expected
    assert len(drawn.unique()) == len(drawn) and torch.equal(y[drawn], classes)
    assert torch.equal(drawn, shifts.subsample((x, y), ratio, 300, seed=0)[0])
    other = shifts.subsample((x, y), ratio, 300, seed=1)[0]
    assert torch.equal(drawn.sort()[0], other.sort()[0]) == (expected == sizes)
    more = set(shifts.subsample((x, y), min(300, 2 * ratio), 300, seed=0)[0].tolist())
    assert set(drawn.tolist()) <= more  # of the same order


def idx(array):
    """The bytes of an IDX file."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


@pytest.fixture
def mnist(tmp_path):
    """A folder with 600 + 200 images in MNIST's format; the first bytes number the images."""
    for half, n, ending in (("train", 600, ".gz"), ("t10k", 200, "")):
        x = np.random.default_rng(n).integers(0, 256, (n, 28, 28), np.uint8)
        x[:, 0, 0], x[:, 0, 1] = np.arange(n) // 256 + (half == "t10k") * 100, np.arange(n) % 256
        y = (np.arange(n) % 10).astype(np.uint8)
        for kind, array in (("images-idx3", x), ("labels-idx1", y)):
            path = tmp_path / "mnist" / f"{half}-{kind}-ubyte{ending}"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(gzip.compress(idx(array)) if ending else idx(array))
    return tmp_path


def test_mnist_splits_share_no_image_and_depend_on_nothing(mnist):
    domain = shifts.load("mnist", None, mnist)
    assert {split: len(y) for split, (_, y) in domain.items()} == {
        "source": 250,
        "pool": 300,
        "val": 50,
        "test": 200,
    }
    numbers = [x[:, 0, 0, :2].tolist() for x, _ in domain.values()]
    together = [tuple(number) for split in numbers for number in split]
    assert len(set(together)) == len(together) == 800
    for x, y in domain.values():
        assert x.dtype == torch.uint8 and x.shape[1:] == (1, 28, 28) and y.dtype == torch.int64
        index = x[:, 0, 0, 0].long() % 100 * 256 + x[:, 0, 0, 1]
        assert torch.equal(y, index % 10)
    assert domain["val"][0][:, 0, 0, 1].tolist() == list(range(50))  # the first ones
    shifts._mnist.cache_clear()
    torch.manual_seed(5)
    assert torch.equal(shifts.load("mnist", None, mnist)["pool"][0], domain["pool"][0])


def test_a_target_shifts_the_splits_it_is_tuned_and_tested_on(mnist):
    plain = shifts.load("mnist", None, mnist)
    shifted = shifts.load("mnist", "transform-fixed", mnist)
    assert shifted.keys() == {"pool", "val", "test"}
    for split, (x, y) in shifted.items():
        assert x.shape == plain[split][0].shape and torch.equal(y, plain[split][1])
    alike = {split: (x[:50], y) for split, (x, y) in plain.items()}
    alike = dict.fromkeys(alike, alike["val"])
    with pytest.MonkeyPatch.context() as patch:  # each split draws its own
        patch.setattr(shifts, "_mnist", lambda root: alike)
        shifted = shifts.load("mnist", "occluded", mnist)
    assert not torch.equal(shifted["val"][0], shifted["test"][0])


# ---------------------------------------------------------------- files and downloads

ARRAY = np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 28, 28)


@pytest.mark.parametrize("name, content", [("a", idx(ARRAY)), ("a.gz", gzip.compress(idx(ARRAY)))])
def test_read_idx(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    array = shifts.read_idx(tmp_path / name)
    assert array.dtype == torch.uint8 and np.array_equal(array, ARRAY)


@pytest.mark.parametrize(
    "name, content",
    {
        "empty": b"",
        "empty.gz": b"",
        "magic": b"\1" + idx(ARRAY)[1:],
        "type": b"\0\0\x0d\3" + idx(ARRAY)[4:],
        "header": idx(ARRAY)[:9],
        "short": idx(ARRAY)[:-1],
        "long": idx(ARRAY) + b"\0",
        "promise": b"\0\0\x08\3" + b"\xff" * 12,  # 2^96 bytes
        "plain.gz": idx(ARRAY),
        "early.gz": gzip.compress(idx(ARRAY))[:-20],
        "flipped.gz": gzip.compress(idx(ARRAY))[:30] + b"!" + gzip.compress(idx(ARRAY))[31:],
        "folder": None,
    }.items(),
)
def test_read_idx_says_what_is_wrong(tmp_path, name, content):
    (tmp_path / name).write_bytes(content) if content is not None else (tmp_path / name).mkdir()
    with pytest.raises(shifts.DataError, match=re.escape(str(tmp_path / name))) as caught:
        shifts.read_idx(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_files_that_are_not_mnist(mnist):
    for labels in (np.zeros(7, np.uint8), np.zeros(0, np.uint8), np.full(200, 10, np.uint8)):
        (mnist / "mnist" / "t10k-labels-idx1-ubyte").write_bytes(idx(labels))
        with pytest.raises(shifts.DataError, match="are not MNIST"):
            shifts.load("mnist", None, mnist)


@pytest.fixture
def server():
    """An HTTP server of the test's own: a dictionary of path to (headers, body[, pause after it,
    how often]), and its URL."""
    pages = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            page = pages.get(self.path, ({}, None))
            headers, body, seconds, times = page + (0, 1)[len(page) - 2 :]
            wanted = re.fullmatch(r"bytes=0-(\d+)", self.headers.get("Range", ""))
            if wanted and headers.get("Accept-Ranges"):
                body = body[: int(wanted[1]) + 1]
            status = 404 if body is None else 206 if wanted else 200
            self.send_response(302 if "Location" in headers else status)
            for name, value in ({"Content-Length": len(body or b"")} | headers).items():
                self.send_header(name, str(value))
            self.end_headers()
            with contextlib.suppress(OSError):  # the client may have had enough
                for _ in range(times):
                    self.wfile.write(body or b"")
                    self.wfile.flush()
                    time.sleep(seconds)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield pages, f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@contextlib.contextmanager
def no_file_larger_than(size):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_fetch_gets_the_whole_file_or_none(tmp_path, server, monkeypatch):
    pages, url = server
    body = bytes(range(256)) * 4000
    pages["/good"] = {}, body
    pages["/cut"] = {"Content-Length": len(body) + 1}, body
    right = hashlib.md5(body).hexdigest()
    seen = []
    path = shifts.fetch(f"{url}/good", tmp_path / "new" / "good", right, lambda *a: seen.append(a))
    assert path.read_bytes() == body
    assert seen[-1] == ("downloading good, 0 of 0 MiB",)
    pages["/loop"] = {"Location": "/loop"}, b""
    pages["/away"] = {"Location": "file:///etc/hostname"}, b""
    pages["/length"] = {"Content-Length": "many"}, body
    pages["/slow"] = {"Content-Length": len(body) + 1}, body, 1
    pages["/dripping"] = {"Content-Length": 1 << 20}, b"drop", 0.02, 200
    pages["/endless"] = {"Content-Length": ""}, body, 0, 99
    monkeypatch.setattr(shifts, "TIMEOUT", 0.3)
    monkeypatch.setattr(shifts, "MOST", 1 << 20)
    for page, md5, reason in (
        ("good", "0" * 32, f"its MD5 is not {'0' * 32}"),
        ("cut", None, "ended|IncompleteRead"),
        ("none", None, "404|Not Found"),
        ("loop", None, "infinite loop"),
        ("away", None, "not allowed"),
        ("length", None, "many"),
        ("slow", None, "timed out"),
        ("dripping", None, "too slow"),
        ("endless", None, "it ended after 4194304 of 0 bytes"),
    ):
        with pytest.raises(shifts.MissingError, match=reason) as caught:
            shifts.fetch(f"{url}/{page}", tmp_path / page, md5)
        assert "\n" not in str(caught.value)
    full = pytest.raises(shifts.MissingError, match="File too large")  # nearly as on a full disk
    with no_file_larger_than(1 << 18), full:
        shifts.fetch(f"{url}/good", tmp_path / "full", right)
    with pytest.raises(shifts.MissingError, match="refused"):
        shifts.fetch("http://127.0.0.1:1/x", tmp_path / "refused")
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "good"]


@pytest.mark.parametrize("headers", [{}, {"Accept-Ranges": "bytes"}], ids=["whole", "range"])
def test_fetch_gets_the_first_bytes(tmp_path, server, headers):
    pages, url = server
    body = bytes(range(256)) * 4000
    pages["/x"] = headers, body
    assert shifts.fetch(f"{url}/x", tmp_path / "a", first=1000).read_bytes() == body[:1000]
    assert shifts.fetch(f"{url}/x", tmp_path / "b", first=10**9).read_bytes() == body


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_of_quickdraw_only_the_first_rows_are_downloaded(tmp_path, server, monkeypatch):
    pages, url = server
    monkeypatch.setattr(shifts, "QUICKDRAW_ROWS", 90)
    origin = shifts.ORIGINS["quickdraw"]
    fewer = replace(origin, url=f"{url}/", first=90 * 784 + 128)
    monkeypatch.setitem(shifts.ORIGINS, "quickdraw", fewer)
    rng = np.random.default_rng(0)
    for name in shifts.QUICKDRAW:
        drawings = npy(rng.integers(0, 256, (300, 784), np.uint8))
        pages[f"/{name.replace(' ', '%20')}.npy"] = {"Accept-Ranges": "bytes"}, drawings
    shifts.provide(shifts.needs("quickdraw", "noisy"), tmp_path)
    assert {path.name for path in (tmp_path / "quickdraw").iterdir()} == {
        f"{name}.npy" for name in shifts.QUICKDRAW
    }
    cat = shifts.read_drawings(tmp_path / "quickdraw" / "cat.npy")
    assert cat.shape == (90, 784)
    domain = shifts._quickdraw(tmp_path)
    sizes = {"source": 315, "pool": 270, "val": 45, "test": 135}  # of 810; 45 are not used
    assert {split: len(y) for split, (_, y) in domain.items()} == sizes
    together = torch.cat([x for x, _ in domain.values()])
    assert together.shape == (765, 1, 28, 28) and len(together.unique(dim=0)) == 765
    drawn = {bytes(255 - drawing) for drawing in cat}  # dark on white
    for x, y in domain.values():
        assert all((bytes(image.numpy()) in drawn) == (label == 3) for image, label in zip(x, y))


@pytest.mark.parametrize(
    "content",
    {
        "empty": b"",
        "type": npy(np.zeros((9, 784))),
        "shape": npy(np.zeros((9, 28, 28), np.uint8)),
        "objects": npy(np.array([{}], object)),
        "short": npy(np.zeros((9, 784), np.uint8))[:-1],
        "version": b"\x93NUMPY\x09\x00" + bytes(200),
        "header": npy(np.zeros((9, 784), np.uint8)).replace(b"}", b"("),
    }.items(),
)
def test_read_drawings_says_what_is_wrong(tmp_path, content):
    path = tmp_path / content[0]
    path.write_bytes(content[1])
    with pytest.raises(shifts.DataError, match=str(path)):
        shifts.read_drawings(path)


def records(n, seed):
    """n records of CIFAR-10's binary format, all classes in turn."""
    content = np.random.default_rng(seed).integers(0, 256, (n, 3073), np.uint8)
    content[:, 0] = np.arange(n) % 10
    return content


def tar(members):
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as file:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return archive.getvalue()


def test_cifar_is_downloaded_and_split_by_batches_without_deer(tmp_path, server, monkeypatch):
    pages, url = server
    monkeypatch.setattr(shifts, "CIFAR_RECORDS", 20)
    names = [*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"]
    batches = {name: records(20, seed) for seed, name in enumerate(names)}
    members = {f"cifar-10-batches-bin/{name}": batch.tobytes() for name, batch in batches.items()}
    body = tar(members | {"cifar-10-batches-bin/../../out.bin": b"", "readme.html": b""})
    pages["/cifar.tar.gz"] = {}, body
    here = {"url": f"{url}/cifar.tar.gz", "md5": hashlib.md5(body).hexdigest()}
    monkeypatch.setitem(shifts.ORIGINS, "cifar", replace(shifts.ORIGINS["cifar"], **here))
    shifts.provide(shifts.needs("cifar", "noisy"), tmp_path / "data")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["cifar-10-batches-bin"]
    domain = shifts.load("cifar", None, tmp_path / "data")
    for split, parts in {"source": "12", "pool": "34", "val": "5", "test": "t"}.items():
        files = [name for name in names if name.split("_")[-1][0] in parts or name[0] == parts]
        expected = [c for name in files for c in batches[name] if c[0] != 4]
        x, y = domain[split]
        assert torch.equal(x.flatten(1), torch.tensor(np.array(expected)[:, 1:]))
        assert y.tolist() == [c[0] - (c[0] > 4) for c in expected]
    path = tmp_path / "data" / "cifar-10-batches-bin" / "data_batch_1.bin"
    for content in (b"", path.read_bytes()[:-1], bytes([10]) + path.read_bytes()[1:]):
        path.write_bytes(content)
        with pytest.raises(shifts.DataError, match="data_batch_1.bin cannot be read"):
            shifts.read_cifar(path)


def mat(arrays, compressed):
    """A MATLAB-5 file of uint8 arrays."""

    def element(kind, content):
        return struct.pack("<II", kind, len(content)) + content + bytes(-len(content) % 8)

    out = b"MATLAB 5.0".ljust(124) + struct.pack("<H", 0x0100) + b"IM"
    for name, array in arrays.items():
        small = struct.pack("<HH", 1, len(name)) + name.encode().ljust(4, b"\0")
        flags, shape = struct.pack("<II", 9, 0), struct.pack(f"<{array.ndim}i", *array.shape)
        values = element(2, array.tobytes(order="F"))
        matrix = element(14, element(6, flags) + element(5, shape) + small + values)
        packed = zlib.compress(matrix)
        out += struct.pack("<II", 15, len(packed)) + packed if compressed else matrix
    return out


@pytest.mark.parametrize("compressed", [False, True])
def test_svhn(tmp_path, compressed):
    (tmp_path / "svhn").mkdir()
    rng, arrays = np.random.default_rng(0), {}
    for half, n in (("train", 280), ("test", 70)):
        x = np.full((32, 32, 3, n), 200, np.uint8)
        x[:, :, 0] = np.arange(n) % 251
        arrays = {"X": x, "y": (rng.integers(0, 10, (n, 1)) + 1).astype(np.uint8)}
        (tmp_path / "svhn" / f"{half}_32x32.mat").write_bytes(mat(arrays, compressed))
    read = shifts.read_mat(tmp_path / "svhn" / "test_32x32.mat")
    assert all(np.array_equal(read[name], arrays[name]) for name in ("X", "y"))
    domain = shifts.load("mnist", "svhn", tmp_path)
    x, y = domain["test"]
    assert x.shape == (70, 1, 28, 28)
    assert torch.equal(x[:, 0, 5, 5], ((torch.arange(70) + 400) / 3).round().byte())
    assert y.tolist() == [label % 10 for label in arrays["y"][:, 0].tolist()]
    assert {split: len(y) for split, (_, y) in domain.items()} == {
        "pool": 242,
        "val": 38,
        "test": 70,
    }
    path = tmp_path / "svhn" / "test_32x32.mat"
    good = path.read_bytes()
    wrong = (b"", good[:100], good[:-9], good[:126] + b"??" + good[128:], mat({}, False))
    for content in (*wrong, mat({"X": arrays["X"], "y": arrays["y"] + 1}, compressed)):
        path.write_bytes(content)
        shifts._svhn.cache_clear()
        with pytest.raises(shifts.DataError, match="test_32x32.mat"):
            shifts.load("mnist", "svhn", tmp_path)


def photo_file(color, size=(30, 20), kind="PNG"):
    file = io.BytesIO()
    pytest.importorskip("PIL.Image").new("RGB", size, color).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("target", shifts.PACS)
def test_pacs_is_downloaded_without_persons_in_the_splits(tmp_path, server, monkeypatch, target):
    folder = {"art": "art_painting"}.get(target, target)
    pages, url = server
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for label, name in enumerate([*shifts.PACS_CLASSES, "person"]):
            for number in range(10):
                content = photo_file((label * 30, number * 20, 9))
                archive.writestr(f"Homework3/PACS/{folder}/{name}/n0_{number}-1.png", content)
        archive.writestr(f"Homework3/PACS/{folder}/../x.png", b"")
    pages["/pacs.zip"] = {}, file.getvalue()
    for name in shifts.PACS:
        here = {"url": f"{url}/pacs.zip", "count": 70 if name == target else 0}
        monkeypatch.setitem(shifts.ORIGINS, name, replace(shifts.ORIGINS[name], **here))
    shifts.provide(shifts.needs("ilsvrc", target), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pacs"]
    seen = []
    domain = shifts.load("ilsvrc", target, tmp_path, lambda *a: seen.append(a))
    assert seen[-1] == ("reading images of the test split, 0 of 12",)
    for split, each in {"pool": 7, "val": 1, "test": 2}.items():  # of each class
        assert domain[split][1].bincount().tolist() == [each] * 6
    x, y = (torch.cat(part) for part in zip(*domain.values()))
    assert x.shape == (60, 3, 224, 224) and len(x[:, :, 0, 0].unique(dim=0)) == 60
    assert torch.equal(x[:, 0, 100, 100].long(), y * 30)  # dog 0, ..., house 5
    (tmp_path / "pacs" / folder / "dog" / "n0_1-1.png").write_text("no image")
    with pytest.raises(shifts.DataError, match="n0_1-1.png cannot be read"):
        shifts.load("ilsvrc", target, tmp_path)
    shutil.rmtree(tmp_path / "pacs" / folder / "horse")
    with pytest.raises(shifts.DataError, match="horse has 0 images"):
        shifts.load("ilsvrc", target, tmp_path)


def test_ilsvrc_has_to_be_put_there(tmp_path):
    pytest.importorskip("PIL")
    with pytest.raises(shifts.MissingError, match="cannot be downloaded freely.*<wnid>/"):
        shifts.provide(shifts.needs("ilsvrc", "yuv"), tmp_path)
    for names in (["n01440764"], map(str, range(1000))):  # too few, and others than WordNet's
        for name in names:
            (tmp_path / "ilsvrc" / "val" / name).mkdir(parents=True)
        with pytest.raises(shifts.DataError, match="should have 1000 folders named by WordNet id"):
            shifts.load("ilsvrc", "yuv", tmp_path)
        shutil.rmtree(tmp_path / "ilsvrc")


def test_ilsvrc_images_are_shuffled_together_cropped_and_shifted(tmp_path, monkeypatch):
    image = torch.full((3, 16, 20), 255, dtype=torch.uint8)
    colour = torch.tensor([10, 20, 30], dtype=torch.uint8)[:, None, None]
    image[:, 1:15, 3:17] = colour  # the middle 14 of 16: nothing else is seen
    for label in range(1000):
        folder = tmp_path / "ilsvrc" / "val" / f"n{label:08}"
        folder.mkdir(parents=True)
        for number in range(10):
            (folder / f"{number}.JPEG").touch()
    monkeypatch.setattr(shifts, "read_image", lambda path: image)
    monkeypatch.setattr(shifts, "SIDE", 7)
    domain = shifts.load("ilsvrc", "hsv", tmp_path)
    for split, total in {"pool": 5000, "val": 1000, "test": 4000}.items():
        x, y = domain[split]
        assert len(y) == total and len(y.bincount().unique()) > 1  # not so many of each class
        # hue 210 of 360 degrees, saturation 2 / 3, value 30
        assert (x == torch.tensor([149, 170, 30], dtype=torch.uint8)[:, None, None]).all()


def test_mnist_is_downloaded_where_it_is_missing(tmp_path, mnist, server, monkeypatch):
    pages, url = server
    for path in (mnist / "mnist").iterdir():
        raw = gzip.decompress(path.read_bytes()) if path.suffix else path.read_bytes()
        pages[f"/{path.stem if path.suffix else path.name}.gz"] = {}, gzip.compress(raw, mtime=0)
    sums = {
        name: hashlib.md5(pages[name.removeprefix("mnist")][1]).hexdigest()
        for name in shifts.ORIGINS["mnist"].md5
    }
    monkeypatch.setitem(shifts.ORIGINS, "mnist", shifts.Files(f"{url}/", sums))
    expected = shifts.load("mnist", None, mnist)["pool"][0]
    shifts.provide(shifts.needs("mnist", "blurry"), tmp_path / "new")
    downloaded = shifts.load("mnist", None, tmp_path / "new")
    assert torch.equal(downloaded["pool"][0], expected)
    assert len(list((tmp_path / "new" / "mnist").iterdir())) == 4
    pages["/t10k-images-idx3-ubyte.gz"] = {}, b"another file"
    with pytest.raises(shifts.MissingError, match="its MD5 is"):
        shifts.provide(shifts.needs("mnist", "blurry"), tmp_path / "wrong")


def photo_archive():
    folder, sizes = "BSR/BSDS500/data/images/train", ((48, 32), (32, 48))
    photos = (photo_file((200, 100, 50), size, "JPEG") for size in sizes)
    return tar({f"{folder}/{number}.jpg": photo for number, photo in enumerate(photos)})


def test_photos_are_downloaded_and_unpacked(mnist, server, monkeypatch):
    pages, url = server
    pages["/bsds.tgz"] = {}, photo_archive()
    for count in (200, 2):
        here = replace(shifts.ORIGINS["bsds500"], url=f"{url}/bsds.tgz", count=count)
        monkeypatch.setitem(shifts.ORIGINS, "bsds500", here)
        assert shifts.needs("mnist", "mnist-m") == ["mnist", "bsds500"] and not here.there(mnist)
        if count == 200:
            with pytest.raises(shifts.MissingError, match="2 of 200 files"):
                shifts.provide(shifts.needs("mnist", "mnist-m"), mnist)
    shifts.provide(shifts.needs("mnist", "mnist-m"), mnist)
    digits = shifts.load("mnist", None, mnist)["test"][0]
    x, _ = shifts.load("mnist", "mnist-m", mnist)["test"]
    mean = 350 / 3  # of the photos' colour (200, 100, 50), on which digits are inverted
    assert (x - torch.where(digits > 0, 255 - mean, mean)).abs().max() <= 2  # JPEG rounds
    assert here.there(mnist)
    assert sorted(path.name for path in mnist.iterdir()) == ["bsds500", "mnist"]


def test_a_broken_photo_and_an_empty_folder(mnist):
    pytest.importorskip("PIL.Image")
    (mnist / "bsds500").mkdir()
    with pytest.raises(shifts.DataError, match="has no .jpg"):
        shifts.load("mnist", "mnist-m", mnist)
    (mnist / "bsds500" / "1.jpg").write_text("no photo")
    with pytest.raises(shifts.DataError, match="1.jpg cannot be read"):
        shifts.load("mnist", "mnist-m", mnist)


def test_without_pillow_nothing_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setattr(shifts, "fetch", lambda *_: pytest.fail("downloads"))
    with pytest.raises(shifts.DataError, match="pip install pillow"):
        shifts.provide(shifts.needs("mnist", "mnist-m"), tmp_path)


# ---------------------------------------------------------------- built-in digits


def test_built_in_digits_are_the_same_every_time_and_balanced():
    (a, y), (b, _) = (shifts.draw_digits(500, generator(3)) for _ in range(2))
    assert torch.equal(a, b) and y.bincount().tolist() == [50] * 10
    assert a.shape == (500, 1, 28, 28) and a.dtype == torch.uint8 and a.max() > 200


def test_the_4_layer_network_learns_the_built_in_digits_and_every_shift_hurts(monkeypatch):
    splits = {"source": 2000, "pool": 10, "val": 10, "test": 500}
    digits = {split: shifts.draw_digits(n, generator(n)) for split, n in splits.items()}
    numbers = {split: shifts.draw_house_numbers(n, generator(n)) for split, n in splits.items()}
    monkeypatch.setattr(shifts, "_builtin", {"mnist": digits, "svhn": numbers}.get)
    own, settings = shifts.load("mnist", None, None), Settings(device="cpu")
    net = run_all.seeded(models.mnist_net, 0).to(memory_format=torch.channels_last)
    net = fine_tune(net, "all", own["source"], own["val"], settings, epochs=4).net
    assert flextune.accuracy(net, own["test"]) >= 0.97
    for _, target in [pair for pair in run_all.SCENARIOS if pair[0] == "mnist"]:
        shifted = shifts.load("mnist", target, None)["test"]
        assert flextune.accuracy(net, shifted) < 0.87, target


@pytest.mark.parametrize("channels", [1, 3])
def test_the_4_layer_network_is_the_authors(channels):
    net = models.mnist_net(channels)
    assert [name for name, _ in net.named_children()] == ["conv1", "conv2", "fc1", "fc2"]
    shapes = [tuple(weight.shape) for weight in net.parameters()]
    convs = [(32, channels, 5, 5), (32,), (64, 32, 5, 5), (64,)]
    assert shapes == [*convs, (1024, 3136), (1024,), (10, 1024), (10,)]
    assert net(torch.rand(2, channels, 28, 28)).shape == (2, 10)
    assert [module.p for module in net.modules() if isinstance(module, nn.Dropout)] == [0.5]


@pytest.mark.parametrize("channels", [1, 3])
def test_the_7_layer_network_is_the_authors(channels):
    net = models.cifar_net(channels)
    names = [name for name, _ in net.named_children()]
    assert names == ["conv1", "conv2", "conv3", "conv4", "conv5", "fc1", "fc2"]
    widths = [channels, 32, 64, 128, 256, 512]
    shapes = [(out, width, 3, 3) for width, out in pairwise(widths)]
    shapes += [(1024, 2048), (9, 1024)]
    assert [tuple(w.shape) for w in net.parameters() if w.dim() > 1] == shapes
    assert net(torch.rand(2, channels, 32, 32)).shape == (2, 9)


def test_the_small_networks_start_as_glorot_uniform_and_zero():
    for net in (models.mnist_net(), models.cifar_net()):
        for weight in net.parameters():
            if weight.dim() == 1:
                assert (weight == 0).all()
                continue
            size = weight[0, 0].numel() if weight.dim() > 2 else 1
            limit = (6 / (size * (weight.shape[0] + weight.shape[1]))) ** 0.5
            assert 0.9 * limit < weight.abs().max() <= limit
            assert weight.std().item() == pytest.approx(limit / 3**0.5, rel=0.1)


# ---------------------------------------------------------------- Inception2


def tensornets():
    """Names and values, in the order of TensorNets' file, of weights that can be drawn again."""
    rng, weights = np.random.default_rng(0), {}
    for key, tensor in models.inception2().state_dict().items():
        *layers, kind = key.split(".")
        layer = layers[-1]
        array = tensor.numpy()
        if kind == "num_batches_tracked":
            continue
        if array.ndim == 4:
            array = array.transpose(2, 3, 1, 0)
        if layer == "depthwise":
            array = array.reshape(7, 7, 3, 8)
        shape = array.T.shape if array.ndim == 2 else array.shape
        name = {
            "weight": "weights",
            "running_mean": "moving_mean",
            "running_var": "moving_variance",
        }
        name = name.get(kind, "beta" if layer == "bn" else "biases")
        if layer in ("depthwise", "pointwise", "linear"):
            layers.pop()
            name = f"{layer}_weights" * (name == "weights" and layer != "linear") or name
        if name == "moving_variance":
            array = rng.uniform(0.5, 1.5, shape)
        elif name in ("moving_mean", "beta", "biases"):
            array = rng.normal(0, 0.1, shape)
        else:
            array = rng.normal(0, (2 / np.prod(shape[:-1])) ** 0.5, shape)
        weights["/".join([*layers, name])] = array.astype(np.float32)
    return weights, rng


def save_weights(path, weights, kind="U"):
    values = np.empty(len(weights), object)
    values[:] = list(weights.values())
    np.savez(path, names=np.array(list(weights), kind), values=values)


def test_inception2_is_tensornets(tmp_path):
    """What TensorNets 0.4.6 computes for these weights and images."""
    weights, rng = tensornets()

    def load(path):
        return models.load_inception2(path, hashlib.md5(path.read_bytes()).hexdigest())

    assert len(weights) == 277 and list(weights)[-1] == "logits/biases"
    save_weights(tmp_path / "inception2.npz", weights)
    net = load(tmp_path / "inception2.npz").eval()
    # Python 2 has names of bytes, and TensorFlow ends those of variables in :0.
    save_weights(tmp_path / "old.npz", {f"{name}:0": a for name, a in weights.items()}, kind="S")
    old = load(tmp_path / "old.npz").state_dict()
    assert all(torch.equal(old[name], tensor) for name, tensor in net.state_dict().items())
    assert len(net) == 13 and flextune.candidates(net) == [*range(1, 14)]
    x = torch.from_numpy(rng.uniform(-1, 1, (2, 224, 224, 3)).astype(np.float32))
    with torch.no_grad():
        logits = net((x.permute(0, 3, 1, 2) + 1) / 2)
    expected = torch.tensor(
        [[2.605820, 10.158383, -1.355881, -5.800961], [2.669776, 10.081590, -1.250955, -5.664542]]
    )
    torch.testing.assert_close(logits[:, [0, 1, 499, 999]], expected, rtol=0, atol=1e-4)
    head = models.pacs_head(net)
    with torch.no_grad():
        six = head((x.permute(0, 3, 1, 2) + 1) / 2)
    # dog, elephant, giraffe, guitar, horse, house
    assert torch.equal(six, logits[:, [167, 385, 354, 402, 339, 449]])


@pytest.mark.parametrize("size", [5, 6, 7, 8, 32, 33])
@pytest.mark.parametrize("kernel", [3, 7])
def test_same_padding_is_tensorflows(size, kernel):
    x = torch.randn(1, 1, size, size + 1, generator=generator())
    weight = torch.randn(1, 1, kernel, kernel, generator=generator())
    got = nn.functional.conv2d(models.Same(kernel)(x), weight, stride=2)[0, 0]
    top, left = (max((-(-n // 2) - 1) * 2 + kernel - n, 0) // 2 for n in x.shape[2:])
    assert got.shape == tuple(-(-n // 2) for n in x.shape[2:])
    for row in range(got.shape[0]):
        for column in range(got.shape[1]):
            total = 0.0
            for i in range(kernel):
                for j in range(kernel):
                    r, c = row * 2 - top + i, column * 2 - left + j
                    if 0 <= r < size and 0 <= c <= size:
                        total += (x[0, 0, r, c] * weight[0, 0, i, j]).item()
            assert got[row, column].item() == pytest.approx(total, abs=1e-4)


@pytest.mark.parametrize("size", [(31, 45), (40, 40), (96, 65)])
def test_inception2_takes_images_of_any_size(size):
    net = models.inception2(classes=6, width=0.1).eval()
    x, shapes = torch.rand(2, 3, *size), []
    with torch.no_grad():
        for unit in net:
            x = unit(x)
            shapes.append(tuple(x.shape[2:]))
    halved = [size]
    for _ in range(5):
        halved.append(tuple(-(-n // 2) for n in halved[-1]))
    assert [shapes[unit] for unit in (0, 1, 4, 9)] == halved[2:]
    assert x.shape == (2, 6)


def test_no_other_file_of_weights_is_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("opens it"))
    save_weights(tmp_path / "few.npz", {"logits/biases": np.zeros(1000, np.float32)})
    for name in ("few", "none"):
        with pytest.raises(models.WeightsError, match="not TensorNets' file"):
            models.load_inception2(tmp_path / f"{name}.npz")


def test_statistics_of_the_batch_where_they_are_asked_for(source, train, val):
    settings = replace(FAST, batch_statistics=True, batch_size=11)
    result = fine_tune(source, [1, 5], train, val, settings)
    assert not torch.equal(result.net[0][1].running_mean, source[0][1].running_mean)
    assert torch.equal(result.net[1][1].running_mean, source[1][1].running_mean)
    assert result.accuracy == flextune.accuracy(result.net, val)


# ---------------------------------------------------------------- built-in objects


@pytest.mark.parametrize(
    "name", ["cifar", "quickdraw", "ilsvrc", "art", "cartoon", "sketch", "svhn"]
)
def test_built_in_images_are_the_same_every_time_and_balanced(name):
    draw, sizes = shifts.BUILT_IN[name]
    (a, y), (b, _) = (draw(180, generator(3)) for _ in range(2))
    assert torch.equal(a, b) and a.dtype == torch.uint8 and a.dim() == 4
    assert len(set(y.bincount().tolist())) == 1
    assert len(a.unique(dim=0)) == 180
    classes = len(y.unique())
    for (source, target), family in run_all.SCENARIOS.items():
        if name in (source, target):  # the paper's largest ratio
            assert family.ratios[-1] * classes <= sizes["pool"]


# ---------------------------------------------------------------- command line


@cache
def few_images(name):
    """A built-in domain, smaller."""
    draw, sizes = shifts.BUILT_IN[name]
    return {split: draw(300 if split == "pool" else 60, generator()) for split in sizes}


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Runs the command line in an empty folder, with short trainings and few images."""
    make_quick(monkeypatch)
    monkeypatch.chdir(tmp_path)
    return lambda command: run_all.main(f"--device cpu {command}".split())


def make_quick(monkeypatch):
    for pair, family in run_all.SCENARIOS.items():
        train = replace(family.pretraining, max_epochs=1)
        once = {"pretraining": train, "epochs": 1, "steps": ((64, 2, 1),) * 4}
        built_in = family.built_in | once
        if pair[0] == "ilsvrc":
            built_in["build"] = partial(models.inception2, classes=6, width=0.1)
        short = replace(family, **once, built_in=built_in)
        monkeypatch.setitem(run_all.SCENARIOS, pair, short)
    monkeypatch.setattr(shifts, "_builtin", few_images)
    monkeypatch.setattr(shifts, "fetch", no_network)


def no_network(url, path, *_):
    raise shifts.MissingError(f"{path} is missing, and downloading {url} failed (no network)")


def fails(capsys, run, status=2):
    """The one line of a command that ends with `status`."""
    with pytest.raises(SystemExit) as caught:
        run()
    assert caught.value.code == status
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def results():
    """In the order in which they were written."""
    paths = sorted(Path("results").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    return [json.loads(path.read_text()) for path in paths]


def test_every_method_from_start_to_finish(quick, capsys):
    quick("--target mnist-m --ratio 30 --runs 2 --seed 7 --data builtin")
    out, err = capsys.readouterr()
    assert "mnist: 4-layer network, " in out
    assert "mnist -> mnist-m, ratio 30: 10 training images, 2 runs" in out
    assert "BUILT-IN DATA" in out and "paper" not in out.replace("the paper's", "")
    table = {line.split()[0].rstrip("*!"): line for line in out.splitlines() if "  " in line}
    assert table.keys() >= {*run_all.METHODS, "unit", "1", "2", "3", "4", "all"}
    assert table["source"].count("\u00b1") == 2  # mean and standard deviation
    begun = [line for line in err.splitlines() if "epoch" not in line]  # plain on a pipe
    assert begun[0] == "[1/1] pretraining on mnist"
    assert begun[1] == "[1/2] mnist -> mnist-m, ratio 30, seed 7"
    assert re.fullmatch(r"\[2/2\] .*, seed 8; all: about \d+ min", begun[2])
    rows = results()
    assert [(row["seed"], row["method"]) for row in rows] == [
        (seed, method) for seed in (7, 8) for method in run_all.METHODS
    ]
    assert {row["data"] for row in rows} == {"built-in"}
    by = {row["method"]: row for row in rows[:8]}
    assert by["ft-fc-1"]["units"] == [4] and by["ft-fc-2"]["units"] == [3, 4]
    assert by["ft-all"]["history"] != rows[8 + 4]["history"]  # another draw of the images
    assert by["flex"]["candidates"].keys() == {"1", "2", "3", "4", "all"}
    assert by["flex"]["val"] == max(one["val"] for one in by["flex"]["candidates"].values())
    assert by["flex"]["candidates"]["all"]["test"] == by["ft-all"]["test"]
    assert by["fast-flex"]["proxies"].keys() == {"1", "2", "3", "4"}
    assert by["source"]["val"] == by["flex"]["history"][0][1]


def test_runs_take_the_source_networks_by_turns(quick):
    quick(
        "--target mnist-m --ratio 30 --runs 3 --source-networks 2 --data builtin --methods source"
    )
    assert len([*Path("results").glob("mnist-*.pt")]) == 2
    assert [row["source_network"] for row in results()] == [0, 1, 0]


def test_there_are_72_scenarios():
    assert sum(len(family.ratios) for family in run_all.SCENARIOS.values()) == 72


@pytest.mark.parametrize("source", run_all.FAMILIES)
def test_every_scenario_runs(quick, source):
    """At each of the paper's ratios. All methods run on MNIST's smallest, cheap ones elsewhere."""
    families = {pair: family for pair, family in run_all.SCENARIOS.items() if pair[0] == source}
    command = f"--source {source} --runs 1 --data builtin --methods"
    quick(f"{command} source ft-fc-1")
    ran = [(row["target"], row["ratio"], row["method"]) for row in results()]
    assert ran == [
        (target, ratio, method)
        for (_, target), family in families.items()
        for ratio in family.ratios
        for method in ("source", "ft-fc-1")
    ]
    if source == "mnist":
        quick(f"{command} {' '.join(run_all.METHODS)} --ratio 3")
        assert len(results()) == len(ran) + 6 * 6


PROTOCOL = {  # by source and target: rate, images per step, most epochs, steps to a validation
    ("mnist", "blurry"): (1e-4, (16, 32, 32, 32), (1000, 500, 100, 25), (20, 50, 500, 4000)),
    ("ilsvrc", "sketch"): (1e-4, (8, 8, 8), (2000, 1000, 150), (100, 150, 800)),
}


@pytest.mark.parametrize("pair", PROTOCOL, ids=" to ".join)
def test_the_authors_protocol(pair):
    lr, *steps = PROTOCOL[pair]
    args = run_all.parse(["--runs", "1"])
    runs = run_all.runs_of(pair, Path("data"), args)
    assert {run.settings.lr for run in runs} == {lr}
    found = [run.family.protocol(run.ratio) for run in runs]
    assert [*zip(*found)] == steps
    assert [(run.settings.batch_size, run.settings.max_epochs) for run in runs] == [
        (size, most) for size, most, _ in found
    ]
    for ratio, same in ((1, 0), (5, 0), (150, 1)):  # others have the next smaller one's
        assert runs[0].family.protocol(ratio) == found[same]


def test_a_validation_comes_after_the_authors_steps(source):
    pair, settings = ("mnist", "blurry"), Settings(batch_size=16, device="cpu")
    x, y = torch.zeros(3000, 3, 8, 8, dtype=torch.uint8), torch.arange(3000) % 4
    for ratio, count in ((3, 4), (300, 300)):  # 20 steps of a batch; 500 of 19
        run = run_all.Run(pair, ratio, Path("data"), 0, settings, (), run_all.SCENARIOS[pair])
        task = run.task(source, {"pool": (x, y), "val": (x[:4], y[:4])})
        assert len(task.train[1]) == count
        assert task.settings.check_every == {3: 20, 300: round(500 / 19)}[ratio]


# Typed once more from the paper, in its own order: Table 2's accuracies, then Table 3's columns.
FIGURES = """
2    Art       0.532  0.669 0.703 0.655 0.626 0.630 0.628
2    Cartoon   0.346  0.639 0.683 0.593 0.618 0.647 0.507
2    Sketch    0.142  0.625 0.606 0.414 0.554 0.581 0.337
20   Art       0.532  0.870 0.851 0.861 0.729 0.849 0.724
20   Cartoon   0.346  0.912 0.893 0.841 0.820 0.887 0.709
20   Sketch    0.142  0.852 0.638 0.638 0.766 0.801 0.542
200  Art       0.532  0.906 0.906 0.823 0.791 0.887 0.746
200  Cartoon   0.346  0.958 0.956 0.952 0.868 0.956 0.925
200  Sketch    0.142  0.924 0.924 0.890 0.767 0.916 0.875
30   mnist/Blurry            0.748  0.926 0.926 0.926 0.921 0.928 0.928 0.921
30   mnist/Occluded          0.581  0.806 0.806 0.801 0.785 0.801 0.792 0.806
30   mnist/MNIST-M           0.439  0.683 0.683 0.671 0.615 0.670 0.675 0.683
30   mnist/SVHN              0.211  0.669 0.669 0.572 0.451 0.595 0.657 0.669
30   mnist/Transform-random  0.322  0.644 0.644 0.644 0.573 0.638 0.624 0.625
30   mnist/Transform-fixed   0.160  0.908 0.887 0.879 0.839 0.875 0.866 0.887
20   cifar/Blurry            0.324  0.577 0.577 0.512 0.444 0.501 0.569 0.577
20   cifar/Noisy             0.540  0.624 0.624 0.624 0.583 0.597 0.618 0.621
20   cifar/QuickDraw         0.291  0.518 0.517 0.517 0.475 0.525 0.495 0.501
20   quickdraw/Blurry        0.19   0.642 0.631 0.560 0.426 0.468 0.707 0.631
20   quickdraw/Noisy         0.63   0.801 0.801 0.795 0.788 0.792 0.805 0.801
20   quickdraw/CIFAR         0.20   0.424 0.424 0.401 0.333 0.347 0.388 0.424
12   YUV                     0.841  0.893 0.893 0.893 0.835 0.699 0.808
12   HSV                     0.384  0.856 0.856 0.856 0.533 0.646 0.687
12   Scaling-stretch         0.440  0.724 0.696 0.696 0.502 0.584 0.653
12   Scaling-symmetric       0.519  0.770 0.757 0.757 0.663 0.650 0.716
12   Rotation                0.743  0.826 0.832 0.812 0.667 0.652 0.771"""


def test_the_figures_of_the_paper():
    columns = ["source", *run_all.SELECTIONS, "ft-fc-1", "ft-fc-2", "ft-ss", "ft-all"]
    for line in FIGURES.strip().splitlines():
        ratio, name, *figures = line.split()
        source, target = name.lower().split("/") if "/" in name else ("ilsvrc", name.lower())
        names = columns if "/" in name else [column for column in columns if column != "ft-fc-2"]
        for method, figure in zip(names, figures, strict=True):
            scenario = source, target, int(ratio), "real", run_all.SCENARIOS[source, target].network
            assert run_all.paper(scenario, method) == float(figure), line
            for other in ("built-in", *scenario[4:]), ("real", "mine"):
                assert run_all.paper((*scenario[:3], *other), method) is None
    assert len(run_all.PUBLISHED) == 9 * 6 + 12 * 7 + 5 * 6 and len(run_all.TARGETS) == 20
    assert run_all.paper(("cifar", "blurry", 2, "real", "7-layer"), "flex") is None
    table_4 = dict(zip(("yuv", "hsv", "art", "cartoon", "sketch"), zip(
        (0.80, 0.47, 0.66, 0.53, 0.39),  # ft-fc
        (0.75, 0.52, 0.80, 0.83, 0.85),  # ft-all
        (0.85, 0.85, 0.88, 0.86, 0.86),  # flex
    )))  # fmt: skip
    assert run_all.TABLE_4 == table_4 and run_all.RETRIEVAL == ("ft-fc-1", "ft-all", "flex")


def test_the_supplement_has_each_unit_once_at_each_ratio():
    for (source, target), family in run_all.SCENARIOS.items():
        assert len(run_all.TARGETS[source, target][1]) == 2 * len(family.ratios)
        units = {"4-layer": 4, "7-layer": 7, "Inception2": 13}[family.network]
        for method in ("fast-flex", "faster-flex"):
            for ratio in family.ratios:
                scenario = source, target, ratio, "real", family.network
                order = run_all.supplement(scenario, method)
                assert len(order) >= 4 and len({*order}) == len(order) and max(order) <= units
            assert run_all.supplement((source, target, 7, "real", family.network), method) == []
    art = "ilsvrc", "art", 2, "real", "Inception2"  # 0, the source itself, is left out
    assert run_all.supplement(art, "faster-flex") == [3, 10, 13, 1]
    assert run_all.supplement(("mnist", "blurry", 3, "real", "4-layer"), "fast-flex") == [
        3,
        4,
        1,
        2,
    ]


def test_every_method_on_inception2(quick, capsys):
    quick("--target sketch --ratio 2 --runs 1 --data builtin --methods flex ft-ss")
    assert results()[1]["candidates"].keys() == {*map(str, range(1, 14)), "all"}


def row(method, seed, val, source=0.5, **more):
    """A result row of an imaginary run."""
    scenario = {"source": "mnist", "target": "blurry", "ratio": 30, "images": 300, "data": "real"}
    result = {"method": method, "seed": seed, "val": val, "test": val, "history": [(0, source)]}
    other = {"network": "4-layer", "settings": {"top_k": 1}, "diverged": False, "tied": []}
    other["names"] = ["conv1", "conv2", "fc1", "fc2"]
    return scenario | result | other | {"units": [1], "epochs": 10, "seconds": 1.0} | more


def test_the_tables_mark_what_a_reader_should_know(capsys):
    one, two, epoch = ({"val": a, "test": a} for a in (0.9, 0.7, 0.1))
    first = {"proxies": {"1": 0.4}, "chosen": "1", "candidates": {"1": one, "all": epoch}}
    second = {"proxies": {"1": 0.4}, "chosen": "2", "candidates": {"2": two, "all": epoch}}
    ((scenario, methods),) = run_all.grouped(
        [
            row("ft-all", 1, 0.4, units=[1, 2, 3, 4]),
            row("ft-ss", 1, 0.5, diverged=True),
            row("faster-flex", 1, 0.9, **first),
            row("ft-all", 2, 0.6, units=[1, 2, 3, 4]),
            row("faster-flex", 2, 0.7, **second),
        ]
    ).items()
    run_all.print_scenario(scenario, methods)
    lines = capsys.readouterr().out.splitlines()
    table = {line.split("  ")[0]: line for line in lines}
    assert "0.500 \u00b1 0.141  0.500 \u00b1 0.141" in table["ft-all"]
    assert table["ft-all"].endswith("below the source")  # in one of the two runs
    assert "0.928" in table["ft-ss"] and table["ft-ss"].endswith("diverged")
    assert "0.900 " in table["1 conv1"]  # tuned in one of the two runs
    assert table["1 conv1"].endswith("faster-flex (1 of 2)")
    assert table["all"].split() == ["all", "-", "-", "-", "-"]  # one epoch of all is not ft-all


def flex_row(seed, tests, chosen, **more):
    """A result row of flex: test (and validation) accuracies of the candidates."""
    ones = {u: {"val": a, "test": a, "epochs": 10, "seconds": 2.0} for u, a in tests.items()}
    ones["all"] |= {"epochs": 20, "seconds": 8.0}
    figures = {"epochs": 60, "seconds": 16.0, "candidates": ones, "chosen": chosen, "best": chosen}
    return row("flex", seed, tests[chosen], **figures | more)


def others(accuracies, **more):
    """Result rows of all methods but flex."""
    return [row(method, 0, a, proxies=PROXIES, **more) for method, a in accuracies.items()]


PROXIES = {"1": 0.1, "2": 0.4, "3": 0.3, "4": 0.2}
ACCURACIES = {
    "source": 0.751,
    "ft-fc-1": 0.9,
    "ft-fc-2": 0.9,
    "ft-ss": 0.9,
    "ft-all": 0.912,
    "fast-flex": 0.9119,
    "faster-flex": 0.93,
}
TESTS = {"1": 0.8, "2": 0.93, "3": 0.9, "4": 0.7, "all": 0.912}


def printed(capsys, show, rows):
    show(run_all.grouped(rows))
    return [line.strip() for line in capsys.readouterr().out.splitlines()]


def test_table_1_is_measured_and_computed(capsys):
    rows = [flex_row(0, TESTS, "2"), row("ft-fc-1", 0, 0.9, epochs=5, seconds=3.0)]
    lines = printed(capsys, run_all.print_table_1, rows)
    assert (
        "L = 4, E_one = 10.0 epochs, c_one = 0.200 s, E_all = 20.0 epochs, c_all = 0.400 s" in lines
    )
    table = {line.split()[0]: line.split()[-3:] for line in lines if " c_" in line}
    assert table["flex"] == ["16.0", "60.0", "16.0"]  # 4 * 10 * 0.2 + 20 * 0.4
    assert table["ft-fc-1"] == ["2.0", "5.0", "3.0"]
    assert "fast-flex" not in table
    more = [row | {"ratio": 3, "seed": seed, "epochs": 45} for row in rows for seed in (1, 2, 3)]
    lines = printed(capsys, run_all.print_table_1, rows + more)
    table = {line.split()[0]: line.split()[-3:] for line in lines if " c_" in line}
    assert table["ft-fc-1"] == ["2.0", "35.0", "3.0"]  # the mean of all runs
    assert printed(capsys, run_all.print_table_1, rows[1:])[-1] == "needs the results of flex"


def test_table_3_has_the_papers_figures_stars_and_differences(capsys):
    rows = [flex_row(0, TESTS, "2"), flex_row(1, TESTS | {"2": 0.934}, "2"), *others(ACCURACIES)]
    lines = printed(capsys, run_all.print_table_3, rows)
    ours, spread, theirs, gap = (
        next(line for line in lines if line.startswith(start)) for start in ("bl", "de", "pa", "di")
    )
    # 0.9119 is no better than 0.912, in three decimals.
    figures = "blurry, 30 (2) 0.751 0.932* 0.912 0.930* 0.900 0.900 0.900 0.912"
    assert ours.split() == figures.split()
    assert spread.split() == ["deviation", "0.003"]  # of flex alone are there two runs
    figures = "paper 0.748 0.926 0.926 0.926 0.921 0.928 0.928 0.921"
    assert theirs.split() == figures.split()
    gaps = "difference +0.003 +0.006 -0.014 +0.004 -0.021 -0.028 -0.028 -0.009"
    assert gap.split() == gaps.split()
    best = "best in how many of 1 scenarios, ties counting for each: flex 1 (paper, of 72: "
    assert any(line.startswith(best) for line in lines)
    for other in ({"ratio": 300}, {"data": "built-in"}, {"network": "mine"}):
        changed = [row | other for row in rows]
        lines = printed(capsys, run_all.print_table_3, changed)
        assert not any(line.startswith(("paper", "difference")) for line in lines)
    partly = [row for row in rows if row["method"] != "ft-ss"]  # not all baselines, no stars
    assert "*" not in printed(capsys, run_all.print_table_3, partly)[4]
    # The paper's own stars: all three methods on HSV, whose Inception2 has no ft-fc-2.
    hsv = {"source": "ilsvrc", "target": "hsv", "ratio": 12, "network": "Inception2"}
    lines = printed(capsys, run_all.print_table_3, [row | hsv for row in rows])
    figures = "paper 0.384 0.856* 0.856* 0.856* 0.533 0.646 0.687"
    assert next(line for line in lines if line.startswith("paper")).split() == figures.split()


def test_table_3_counts_the_first_proxies_that_are_the_supplements(capsys):
    near = row("fast-flex", 0, 0.9, proxies={"1": 0.1, "2": 0.5, "3": 0.4, "4": 0.3})
    rows = [
        near,  # of the mean of two runs, 3 is the best, as in the supplement
        near | {"seed": 1, "proxies": {"1": 0.1, "2": 0.2, "3": 0.9, "4": 0.3}},
        near | {"ratio": 3},  # there it is 2
        near | {"ratio": 7},  # not a ratio of the paper's
        near | {"data": "built-in"},
        near | {"method": "faster-flex", "target": "occluded"},
    ]
    lines = printed(capsys, run_all.print_table_3, rows)
    assert "fast-flex: the best proxy is the supplement's in 1 of 2" in lines
    assert "faster-flex: the best proxy is the supplement's in 0 of 1" in lines
    run_all.print_scenario(*next(iter(run_all.grouped(rows).items())))
    out = capsys.readouterr().out
    first = "best proxies of fast-flex in the paper's supplement: 3 fc1, 2 conv2, 4 fc2, 1 conv1"
    assert first in out and "best proxies of faster-flex" not in out


def test_figure_2_sums_the_ranks_over_the_ratios(capsys):
    small = {"1": 0.8, "2": 0.5, "3": 0.8, "4": 0.7, "all": 0.9}
    choice = {"val": 0.9, "chosen": "all", "best": "3"}
    rows = [
        flex_row(0, TESTS, "2"),
        flex_row(0, small, "all", ratio=3),
        row("fast-flex", 0, ratio=3, **choice),
    ]
    ((panel, targets),) = run_all.ranks_and_picks(run_all.grouped(rows)).items()
    assert panel == ("mnist", "4-layer", "real")
    ranks, picks = targets["blurry"]
    assert ranks == {"1": 1 + 2, "2": 3 + 0, "3": 2 + 2, "4": 0 + 1}  # how many are below each
    assert picks == {"flex": {1, 4}, "fast-flex": {2}, "faster-flex": set()}


def test_certainty_is_printed_with_the_choice(capsys):
    sure = {"runner_up": "all", "lead": 0.018, "error": 0.004, "bound": 0.023}

    def shown(rows):
        for scenario, methods in run_all.grouped(rows).items():
            run_all.print_scenario(scenario, methods)
        return capsys.readouterr().out

    rows = [flex_row(0, TESTS, "2", certainty=sure)]
    out = shown(rows)
    assert "flex's choice leads the next by 0.018 \u00b1 0.004 on the validation set (there," in out
    assert "with probability 95%, all are within 0.023)" in out and "tied" not in out
    rows.append(flex_row(1, TESTS, "3", tied=["3", "4"], certainty=sure | {"lead": 0.020}))
    out = shown(rows)
    assert "leads the next by 0.019 \u00b1 0.004" in out
    assert "it is tied in 1 of 2 runs: the smallest unit is taken" in out


def test_retrieval_for_pacs_is_in_all_of_ilsvrc_by_the_classes_of_the_head(monkeypatch, tmp_path):
    y = torch.tensor([0, 167, 168, 385, 402, 339, 449, 999])
    asked = []

    def load(*args):
        asked.append(args[:3])
        return {"val": (torch.arange(8), y)}

    monkeypatch.setattr(shifts, "load", load)
    pacs, ilsvrc = ("ilsvrc", "sketch"), ("ilsvrc", "yuv")
    x, labels = run_all.source_gallery(pacs, tmp_path)
    assert asked == [("ilsvrc", None, tmp_path)] and len(x) == 8
    assert labels.tolist() == [-1, 0, -1, 1, 3, 4, 5, -1]
    assert torch.equal(run_all.source_gallery(ilsvrc, tmp_path)[1], y)
    assert torch.equal(run_all.source_gallery(pacs, None)[1], y)
    args = run_all.parse(["--table", "4", "--runs", "1"])
    assert not run_all.runs_of(pacs, tmp_path, args)[0].searched  # ILSVRC has to be put there
    assert run_all.runs_of(pacs, None, args)[0].searched == run_all.RETRIEVAL


SWEEP = "--source mnist --target blurry svhn --ratio 3 30 --runs 2 --data builtin"


def test_what_has_a_result_is_not_run_again(quick, capsys, monkeypatch):
    quick(f"{SWEEP} --methods source ft-fc-1 --table 3")
    first = capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(run_all, "execute", lambda *_: pytest.fail("runs"))
        patch.setattr(shifts, "load", lambda *_: pytest.fail("loads"))
        quick(f"{SWEEP} --methods source ft-fc-1 --table 3")
    again = capsys.readouterr().out
    assert again[again.index("\nmnist -> ") :] == first[first.index("\nmnist -> ") :]
    files = {path: path.stat().st_mtime_ns for path in Path("results").glob("*.json")}
    assert len(files) == 16
    gone = min(files)
    gone.unlink()
    quick(f"{SWEEP} --methods source ft-fc-1 --table 3")
    assert {p for p in files if p.stat().st_mtime_ns != files[p]} == {gone}
    quick(f"{SWEEP} --methods source ft-fc-1 --max-epochs 1")  # other settings, other results
    assert len(results()) == 32


def test_image_to_image_retrieval_and_figures(quick, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    command = "--source mnist --target blurry transform-fixed --ratio 30 --runs 1 --data builtin"
    quick(f"{command} --methods ft-all flex")
    assert "retrieval" not in results()[0]
    capsys.readouterr()
    command += " --methods ft-all flex --image-to-image --table 3 4 --figures new/figures"
    quick(command)
    out = capsys.readouterr().out
    assert "0 image-to-image" in out
    rows = results()
    assert {row["method"] for row in rows if "retrieval" in row} == {"ft-all", "flex"}
    for row in rows:
        if row["method"] == "flex-i2i":
            assert row["candidates"].keys() == {"1", "2", "3", "4", "all", "0"}
    drawn = {"figure-2.png", "figure-3.png"}
    targets = ("blurry", "transform-fixed")
    drawn |= {f"figure-1-mnist-{target}-4-layer-built-in.png" for target in targets}
    assert {path.name for path in Path("new/figures").iterdir()} == drawn
    shutil.rmtree("new")
    monkeypatch.setattr(run_all, "execute", lambda *_: pytest.fail("runs"))
    monkeypatch.setattr(shifts, "load", lambda *_: pytest.fail("loads"))
    quick(command)  # from the results alone
    for path in Path("new/figures").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
    assert len(list(Path("new/figures").iterdir())) == 4


DRIVER = """
import os, signal, sys
sys.path.insert(0, {here!r})
import test_flextune
with test_flextune.pytest.MonkeyPatch.context() as patch:
    test_flextune.make_quick(patch)
    if os.environ.get("RANK") == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        patch.setattr(test_flextune.run_all, "execute", lambda *_: os.kill(os.getpid(), 9))
    test_flextune.run_all.main(sys.argv[1:])
"""


def test_ranks_that_are_started_again_and_killed_sweeps_end_with_the_same_table(tmp_path):
    (tmp_path / "driver.py").write_text(DRIVER.format(here=str(HERE)))
    sweep = SWEEP.replace("--ratio 3 30", "--ratio 3")
    methods = "--methods source ft-fc-1 flex --device cpu --table 3"
    options = f"driver.py {sweep} {methods} --out".split()
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "1",
    ]

    def start(out, *before):
        command, one_thread = [sys.executable, *before, *options, out], {"OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        return subprocess.Popen(command, cwd=tmp_path, env=os.environ | one_thread, **pipes)

    def table(process):
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        lines = out[out.index("\nTable 3") :].splitlines()
        return [line for line in lines if "history" not in line]

    one, killed = start("one"), start("three")
    while not list((tmp_path / "three").glob("*.json")):
        time.sleep(0.1)
    killed.kill()
    expected = table(one)
    assert table(start("two", *torchrun)) == expected  # in the first attempt, rank 1 is killed
    assert len(list((tmp_path / "two").glob("*.json"))) == 4 * 3
    at_once = start("three"), start("three")  # two sweeps in a folder
    assert [table(process) for process in at_once] == [expected, expected]


def test_each_network_is_trained_once_and_charged_to_each_method(quick):
    quick("--source mnist --target blurry --ratio 30 --runs 1 --data builtin")
    by = {row["method"]: row for row in results()}
    candidates = by["flex"]["candidates"]
    assert by["flex"]["epochs"] == sum(one["epochs"] for one in candidates.values())
    for one, other in (
        (by["ft-all"], candidates["all"]),
        (by["ft-fc-1"], candidates["4"]),
        (by["fast-flex"]["candidates"]["all"], candidates["all"]),
    ):
        assert one["seconds"] == other["seconds"] and one["history"] == other["history"]


ONE = "--source mnist --target blurry --ratio 30 --runs 1 --data builtin"


def test_the_saved_network_has_the_reported_accuracy(quick, capsys):
    quick(f"{ONE} --methods ft-all flex --save kept/net.pt")
    assert "the network is in kept/net.pt" in capsys.readouterr().out
    net = models.mnist_net()
    net.load_state_dict(torch.load("kept/net.pt", weights_only=True))
    by = {row["method"]: row for row in results()}
    val = shifts.load("mnist", "blurry", None)["val"]
    assert flextune.accuracy(net, val) == by["flex"]["val"]
    quick(f"{ONE} --methods ft-all --save kept/all.pt")  # has its result already: is run again
    net.load_state_dict(torch.load("kept/all.pt", weights_only=True))
    assert flextune.accuracy(net, val) == by["ft-all"]["val"]


def test_a_broken_source_network_or_result_is_made_anew(quick, capsys):
    quick(f"{ONE} --methods source")
    good = results()
    ((network,), (row,)) = ([*Path("results").glob(f"*.{kind}")] for kind in ("pt", "json"))
    for path in (network, row):
        whole = path.read_bytes()
        for content in (b"", whole[:-9], whole[:500] + bytes([whole[500] ^ 1]) + whole[501:]):
            path.write_bytes(content)
            row.unlink(missing_ok=path is network)
            path.write_bytes(content)
            quick(f"{ONE} --methods source")
            assert results() == good


def test_progress_tells_the_time_left(monkeypatch, capsys):
    now = iter([0, 1, 30, 31, 60, 61, 90])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    progress = run_all.Progress(1.0, 3.0)
    progress.begin(0, "first")
    progress(0.5, "half")  # 30 s for an eighth
    progress(0.6, "not within ten seconds")
    progress.begin(1, "second")  # 60 s for a quarter
    progress(0.1, "not within ten seconds")
    progress(1.0, "done")
    assert capsys.readouterr().err.splitlines() == [
        "[1/2] first",
        "[1/2] first, half; all: about 4 min",
        "[2/2] second; all: about 3 min",
        "[2/2] second, done",
    ]


def test_without_data_and_network_the_built_in_digits_are_announced(quick, capsys):
    quick("--source mnist --target blurry --ratio 30 --runs 1 --methods source")
    out = capsys.readouterr().out
    assert "train-images-idx3-ubyte.gz is missing" in out and "***" in out
    assert out.count("BUILT-IN DATA") == 2
    assert "paper" not in out.replace("the paper's", "")


def test_real_data_are_shown_beside_the_paper(quick, capsys, mnist):
    command = "--source mnist --target blurry --ratio 3 30 --runs 1 --methods source ft-all --data"
    quick(f"{command} {mnist}")
    out = capsys.readouterr().out
    assert "BUILT-IN" not in out and out.count("real data") == 2
    lines = [line for line in out.splitlines() if line.startswith(("source ", "ft-all"))]
    for line, paper in zip(lines, ("0.748", "not published", "0.748", "0.921"), strict=True):
        assert line.endswith(paper)


def test_list_shows_every_scenario_and_its_data(quick, capsys, mnist):
    quick(f"--list --data {mnist}")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 20
    assert re.search("mnist +4-layer +blurry +3 30 300 3000 +top-1 +mnist there", lines[1])
    assert any(line.endswith("mnist there, bsds500 missing") for line in lines)
    quick("--list --data builtin")
    assert capsys.readouterr().out.count("built-in images") == 20


def test_benchmark(quick, capsys):
    quick(f"{ONE} --benchmark")
    out = capsys.readouterr().out
    literal, ours = (
        [line.split() for line in out.splitlines() if line.startswith(n)] for n in "lo"
    )
    for one, other in zip(literal, ours, strict=True):
        assert [float(a) for a in one[2:]] == pytest.approx([float(a) for a in other[2:]], abs=0.02)
        assert len(one) == 2 + 5
    assert len(ours) == 3 and len(re.findall(r"\n\d+\.\d\d times as fast\n", out)) == 3


@pytest.mark.parametrize(
    "command, message",
    [
        ("--target sketchy", "argument --target: invalid choice: 'sketchy'"),
        ("--source cifar --target sketch", "cifar has no target sketch: see --list"),
        ("--source mnist --target blurry --ratio 0", "--ratio: must be a whole number from 1"),
        ("--source mnist --target blurry --runs 999999999", "a whole number from 1 to 99999"),
        ("--ratio 30 --data builtin", "--ratio: the largest of ilsvrc -> yuv is 25"),
        ("--target blurry", "target blurry needs --source: mnist or cifar or quickdraw"),
        ("--source mnist --target blurry --ratio 3 --data there", "there is no folder there"),
        ("--source mnist --target blurry --ratio 3 --data .", "train-images-idx3-ubyte.gz is miss"),
        (f"{ONE} --out /dev/null/x", "/dev/null"),
        (f"{ONE} --save /dev/full", "--save: name a file"),
        (f"{ONE} --runs 2 --save net.pt", "--save: name a file, and one --target"),
        (f"{ONE} --cache-gib -1", "--cache-gib: must be a whole number from 0"),
        ("--source allocate", "argument --source: invalid choice: 'allocate'"),
        ("--methods flexing", "invalid choice: 'flexing'"),
    ],
)
def test_usage_errors_are_one_line(quick, capsys, command, message):
    assert message in fails(capsys, lambda: quick(command))


NETWORKS = """
from torch import nn

def build():
    first = nn.Sequential(nn.Flatten(), nn.Linear(784, 16))
    return nn.Sequential(first, nn.ReLU(), nn.Linear(16, 10))

def few():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 3))

def module():
    return nn.Linear(784, 10)
"""


@pytest.mark.parametrize(
    "command, message",
    [
        (f"{ONE} --device cuda:99", "device cuda:99: "),
        (f"{ONE} --device gpu", "device gpu: "),
        (f"{ONE} --network none.py:build", "none.py:build: FileNotFoundError"),
        (f"{ONE} --network net.py", "net.py: "),
        (f"{ONE} --network net.py:other", "net.py:other: KeyError('other')"),
        (f"{ONE} --network broken.py:build", "broken.py:build: SyntaxError"),
        (f"{ONE} --network net.py:few", "must fit the network's 3 classes"),
        (f"{ONE} --network net.py:module", "the network must be an nn.Sequential"),
        ("--target sketch --data builtin --network net.py:build", "it needs real data (--data)"),
    ],
)
def test_a_device_or_network_that_cannot_be_used_is_a_line(quick, capsys, command, message):
    Path("net.py").write_text(NETWORKS)
    Path("broken.py").write_text("def build(:")
    with pytest.raises(SystemExit) as caught:
        quick(command)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_another_network(quick, capsys, mnist):
    Path("net.py").write_text(NETWORKS)
    command = f"--source mnist --target blurry --ratio 30 --runs 1 --data {mnist}"
    figures = "--figures figures" * bool(importlib.util.find_spec("matplotlib"))
    quick(f"{command} --network net.py:build {figures}")
    out = capsys.readouterr().out
    assert "mnist: net.build network" in out and "paper" not in out
    assert {row["network"] for row in results()} == {"net.build"}
    assert results()[5]["candidates"].keys() == {"1", "3", "all"}
    Path("net.py").write_text(NETWORKS + "# changed")  # is another network
    quick(f"{command} --network net.py:build --methods source")
    assert len(results()) == 9


def test_pacs_takes_rows_of_the_last_layer_of_any_network():
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(12, 9), nn.Sequential(nn.ReLU(), nn.Linear(9, 1000))
    )
    x = torch.rand(3, 3, 2, 2)
    torch.testing.assert_close(models.pacs_head(net)(x), net(x)[:, list(models.PACS_ROWS.values())])
    for wrong in (net[:2], nn.Sequential(nn.Flatten())):
        with pytest.raises(ValueError, match="must be a linear one of 1000 classes"):
            models.pacs_head(wrong)


def test_ctrl_c_ends_with_130(quick, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_all, "execute", interrupt)
    lines = capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        quick(f"{ONE} --methods source")
    assert caught.value.code == 130
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "run_all.py: interrupted; finished runs are in the folder of results"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
        ValueError("unit 2: DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"),
    ],
)
@pytest.mark.parametrize("where", [(shifts, "load"), (run_all, "execute")])
def test_out_of_memory_names_what_to_lower(quick, capsys, monkeypatch, error, where):
    def fill(*_):
        raise error

    monkeypatch.setattr(*where, fill)
    with pytest.raises(SystemExit) as caught:
        quick(f"{ONE} --methods source")
    assert caught.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == "run_all.py: error: out of memory: try less than --cache-gib 2"


LIST = "run_all.py --list --data builtin"


@pytest.mark.parametrize(
    "command, status",
    [
        (f"{{}} {LIST}", 0),
        (f"{{}} -m cProfile {LIST}", 0),
        (f"{{}} {LIST} >&-", 0),
        (f"{{}} {LIST} 2>&-", 0),
        (f"{{}} {LIST} >/dev/full", 2),
        (f"LC_ALL=C PYTHONUTF8=0 PYTHONIOENCODING=ascii {{}} {LIST}", 0),
    ],
)
def test_any_streams(command, status):
    """Under a profiler, without a stdout or stderr, on a full disk, without UTF-8."""
    command = command.format(sys.executable)
    run = subprocess.run(command, shell=True, cwd=HERE, capture_output=True, text=True, check=False)
    assert run.returncode == status, run.stderr
    assert "Traceback" not in run.stderr and "Exception" not in run.stderr


def test_in_a_notebook(monkeypatch):
    """Its streams are no files of the interpreter."""
    monkeypatch.setattr(sys, "argv", LIST.split())
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_path(str(HERE / "run_all.py"), run_name="__main__")
    assert len(out.getvalue().splitlines()) == 21 and not sys.stdout.closed


# ---------------------------------------------------------------- broken files
#
# Every reader gives what was written or refuses: never something else, and no other error.


def mutants(content, count, seed=0):
    """Broken versions of a file: bits turned over, bytes cut, added, repeated."""
    rng = random.Random(seed)
    for _ in range(int(os.environ.get("MUTANTS", count))):
        broken = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 9))):
            place = rng.randrange(min(len(broken), rng.choice((64, 400, 10**9)))) if broken else 0
            kind = rng.randrange(4)
            if kind == 0 and broken:
                broken[place] ^= 1 << rng.randrange(8)
            elif kind == 1:
                del broken[place : place + rng.choice((1, 4, 10**9))]
            elif kind == 2:
                broken[place:place] = rng.randbytes(rng.choice((1, 4)))
            else:
                broken[place : place + 4] = rng.choice((b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff"))
        yield bytes(broken)


def right_or_refused(path, content, read, header, count=300):
    """`read(path)` gives arrays by name; what a file can say of itself ends after `header` bytes."""
    path.write_bytes(content)
    right = {name: np.asarray(array) for name, array in read(path).items()}
    for broken in mutants(content, count):
        path.write_bytes(broken)
        with contextlib.suppress(shifts.DataError):
            found = read(path)
            if not found or broken[header:] != content[header:] and len(broken) == len(content):
                continue  # other pixels: nothing in the file says that they are wrong
            for name, array in found.items():
                array = np.asarray(array)
                assert name in right and array.dtype == right[name].dtype
                assert array.shape == right[name].shape and np.array_equal(array, right[name])


def saved_network():
    state = {"0.weight": torch.eye(3)}
    return run_all.saved({"net": state, "md5": run_all.md5(*state, *state.values())})


def zipped(members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


ARRAYS = {"X": ARRAY.reshape(2, 4, 7, 28), "y": ARRAY[:, :1, :1]}
EVERYTHING = 10**9  # a checksum covers the whole file
FILES = {  # content, reader, and how long what a file says of itself is
    "idx": (idx(ARRAY), lambda p: {"x": shifts.read_idx(p)}, 16),
    "idx.gz": (gzip.compress(idx(ARRAY)), lambda p: {"x": shifts.read_idx(p)}, EVERYTHING),
    "npy": (npy(ARRAY.reshape(2, 784)), lambda p: {"x": shifts.read_drawings(p)}, 128),
    "bin": (records(4, 0).tobytes(), lambda p: dict(zip("xy", shifts.read_cifar(p))), 1),
    "mat": (mat(ARRAYS, compressed=True), shifts.read_mat, EVERYTHING),
    "png": (lambda: photo_file((9, 99, 200)), lambda p: {"x": shifts.read_image(p)}, EVERYTHING),
    "json": (json.dumps({"val": 0.5, "md5": run_all.md5(json.dumps({"val": 0.5}))}).encode(),
        run_all.read_row, EVERYTHING),
    "pt": (saved_network(), run_all.read_network, EVERYTHING),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_broken_files(tmp_path, name, monkeypatch):
    monkeypatch.setattr(shifts, "CIFAR_RECORDS", 4)
    content, read, header = FILES[name]
    content = content() if callable(content) else content  # needs Pillow
    right_or_refused(tmp_path / f"file.{name}", content, read, header)


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_broken_archives(tmp_path, kind):
    members = {"a/one.bin": b"1" * 999, "a/two.bin": bytes(range(256))}
    good, path = tar(members) if kind == "tar" else zipped(members), tmp_path / "archive"
    archive = shifts.Archive("http://x/y", None, r"a/(\w+\.bin)", "data", 2)
    for number, content in enumerate([good, *mutants(good, 150)]):
        path.write_bytes(content)
        folder = tmp_path / str(number)
        with contextlib.suppress(shifts.MissingError) if number else contextlib.nullcontext():
            shifts._unpack(path, archive, folder)
        if folder.exists():  # else nothing is left of it
            assert {f"a/{p.name}": p.read_bytes() for p in folder.iterdir()} == members
    assert not list(tmp_path.glob("*.part"))


def test_no_file_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(shifts, "MOST", 1 << 16)
    large = np.zeros((1, 300, 300), np.uint8)
    for name, content, read in (
        ("a.gz", gzip.compress(idx(large)), shifts.read_idx),
        ("a", idx(large), shifts.read_idx),
        ("a.mat", mat({"X": large}, compressed=True), shifts.read_mat),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(shifts.DataError):
            read(tmp_path / name)
    archive = shifts.Archive("http://x/y", None, r"(\w+)", "data", 1)
    for content in (tar({"a": large.tobytes()}), zipped({"a": large.tobytes()})):
        (tmp_path / "archive").write_bytes(content)
        with pytest.raises(shifts.MissingError, match="more than 65536 bytes"):
            shifts._unpack(tmp_path / "archive", archive, tmp_path / "data")
    (tmp_path / "net.pt").write_bytes(zipped({"archive/data.pkl": bytes(1 << 20)}))
    assert run_all.read_network(tmp_path / "net.pt") is None
    monkeypatch.setattr(shifts, "MOST", 1 << 20)
    (tmp_path / "a.png").write_bytes(photo_file("red", (9000, 9000)))
    with pytest.raises(shifts.DataError, match="pixels"):
        shifts.read_image(tmp_path / "a.png")


def test_two_may_download_the_same_file(tmp_path, server):
    pages, url = server
    pages["/x"] = {}, bytes(range(256)) * 4000
    get = partial(shifts.fetch, f"{url}/x", tmp_path / "x")
    threads = [threading.Thread(target=get) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "x").read_bytes() == pages["/x"][1] and len([*tmp_path.iterdir()]) == 1


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "transparent P"]
)
def test_every_mode_of_image_is_right_or_refused(tmp_path, mode):
    pil = pytest.importorskip("PIL.Image")
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    colour = {"1": 255, "L": 40, "LA": (0, 0), "RGBA": (9, 9, 9, 0), "I;16": 999, "CMYK": (0,) * 4}
    image = pil.new(mode.split()[-1], (9, 7), colour.get(mode, 0))
    image.save(path, **{"transparency": 0} if mode == "transparent P" else {})
    if mode == "I;16":
        with pytest.raises(shifts.DataError, match="of mode I;16: save it with 8 bits"):
            shifts.read_image(path)
        return
    pixels = shifts.read_image(path)
    expected = {"L": 40, "P": 0, "RGB": 0}.get(mode, 255)  # what is transparent is white
    assert pixels.shape == (3, 7, 9) and (pixels == expected).all()


# ---------------------------------------------------------------- files that are copied away


@pytest.mark.parametrize("name", ["flextune.py", "models.py", "shifts.py"])
def test_each_module_works_alone(tmp_path, name):
    """From an empty folder, with nothing else of ours to import; flextune.py with torch alone."""
    shutil.copy(HERE / name, tmp_path)
    program = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
for other in {{"flextune", "models", "shifts", "run_all"}} - {{{name!r}[:-3]}}:
    sys.modules[other] = None
if {name!r} == "flextune.py":
    sys.modules["numpy"] = None
module = __import__({name!r}[:-3])
assert module.__file__.startswith({str(tmp_path)!r})
if {name!r} == "flextune.py":
    import torch
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    data = torch.rand(9, 3, 2, 2), torch.arange(9) % 3
    for select in (module.flex, module.fast_flex, module.faster_flex):
        print(select(module.Task(net, data, data, module.Settings(max_epochs=5))).chosen)
"""
    python = [sys.executable, "-I", "-c", program]
    out = subprocess.run(python, cwd=tmp_path, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert out.split() == (["2", "2", "2"] if name == "flextune.py" else [])


# ---------------------------------------------------------------- any model as units


class Block(nn.Module):
    """A residual block as torchvision has it, in-place ReLUs included, and stochastic depth."""

    def __init__(self, width, out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(out), nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        shortcut = nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out)
        self.downsample = nn.Sequential(*shortcut) if stride > 1 else nn.Identity()

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.training:
            y = y * (torch.rand(len(y), 1, 1, 1) > 0.1)
        return self.relu(y + self.downsample(x))


class ResNet(nn.Module):
    """torchvision's ResNet-18, narrow, with a dropout that is no module.

    No narrower than 8: with one thread, torch 2.13 crashes in the backward pass of a 1 x 1
    convolution of stride 2 with 4 input channels in channels-last.
    """

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        for number, (width, out) in enumerate(((8, 8), (8, 16), (16, 16), (16, 16)), 1):
            blocks = Block(width, out, 1 if number == 1 else 2), Block(out, out, 1)
            setattr(self, f"layer{number}", nn.Sequential(*blocks))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 10)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = self.avgpool(x).flatten(1)
        return self.fc(nn.functional.dropout(x, 0.1, self.training))


class Tokens(nn.Module):
    """A small transformer: weights of its own, a loop over blocks, branches on shapes, a dict."""

    _version = 2

    def _load_from_state_dict(self, state, prefix, metadata, *others):
        assert metadata["version"] == 2  # as torchvision's MNASNet does
        super()._load_from_state_dict(state, prefix, metadata, *others)

    def __init__(self):
        super().__init__()
        self.embed, self.place = nn.Embedding(20, 8), nn.Parameter(torch.rand(1, 6, 8))
        layers = (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(3))
        self.encoder, self.head = nn.Module(), nn.Linear(8, 3)
        self.encoder.layers = nn.ModuleList(layers)
        self.encoder.forward = self.encode

    def encode(self, x, mask=None):
        for layer in self.encoder.layers:
            x = layer(x, mask)
        return x

    def forward(self, tokens):
        x = self.embed(tokens) + self.place[:, : tokens.shape[1]]
        if x.shape[0] > 99 or len(x.shape) != 3:
            raise AssertionError
        return {"hidden": x, "logits": self.head(self.encoder(x, mask=None)[:, 0])}


BLOCKS = [f"layer{n}.{m}" for n in (1, 2, 3, 4) for m in (0, 1)]
ENCODER = [f"encoder.layers.{n}" for n in range(3)]
PIXELS = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
WORDS = torch.randint(20, (4, 6), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "build, x, units, names",
    [
        (ResNet, PIXELS, 1, ["conv1", *BLOCKS, "fc"]),
        (lambda: nn.Sequential(ResNet(), nn.ReLU()), PIXELS, 1, ["0"]),
        (
            lambda: nn.Sequential(ResNet()),
            PIXELS,
            ["0"],
            [f"0.{n}" for n in ("conv1", *BLOCKS, "fc")],
        ),
        (lambda: nn.Sequential(ResNet()), PIXELS, 5, [f"0.{n}" for n in ("conv1", *BLOCKS, "fc")]),
    ],
)
def test_split_gives_what_the_model_gives(build, x, units, names):
    torch.manual_seed(0)
    model = build()
    model.train().requires_grad_(True)
    next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d)).eval()
    before, modes = copy.deepcopy(model), [module.training for module in model.modules()]
    net = flextune.split(model, x, units)
    assert [name.replace("/", ".") for name in net._modules] == names
    assert same(model, before) and modes == [module.training for module in model.modules()]
    for training in (True, False):
        for images in (x, x[:3]):
            given = []
            for one in (before, net):
                torch.manual_seed(1)
                given.append(copy.deepcopy(one).train(training)(images))
            assert torch.equal(*given)
    assert {w.data_ptr() for w in net.parameters()} == {w.data_ptr() for w in model.parameters()}
    assert flextune.original(net).keys() == model.state_dict().keys()


def test_split_and_back_again():
    """A model of tokens, whose weight of its own is the first unit's: tuned, loaded, as accurate."""
    torch.manual_seed(0)
    model, y = Tokens(), torch.tensor([0, 1, 2, 0])
    net = flextune.split(model, WORDS)
    assert [*net._modules] == ["embed", "encoder", "head"] and "place" in flextune.original(net)
    task = Task(net, (WORDS, y), (WORDS, y), FAST)
    result = flextune.flex(task).tuned["all"]
    model.load_state_dict(flextune.original(result.net))
    with torch.no_grad():
        logits = model.eval()(WORDS)["logits"]
    assert (logits.argmax(1) == y).float().mean().item() == result.accuracy
    torch.testing.assert_close(logits, result.net(WORDS), rtol=0, atol=1e-5)


def test_split_refuses_what_it_cannot_give():
    class Numpy(nn.Module):
        def forward(self, x):
            return x * float(np.random.rand()) if self.training else x

    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 8), Numpy(), nn.Linear(8, 2))
    with pytest.raises(
        ValueError, match="Sequential cannot be split .the units differ for 4 images"
    ):
        flextune.split(model, PIXELS)
    with pytest.raises(ValueError, match="cannot be split .*: write the nn.Sequential, and assert"):
        flextune.split(ResNet(), WORDS)
    with pytest.raises(ValueError, match="the model has no modules of these names: layer9"):
        flextune.split(ResNet(), PIXELS, "layer9")


# ---------------------------------------------------------------- README


def test_the_example_of_the_readme(tmp_path, monkeypatch, capsys):
    """As written, but for a small ResNet, small images and short trainings."""
    monkeypatch.chdir(tmp_path)
    x, y = images(60, seed=1)
    torch.save((nn.functional.interpolate(x, size=(32, 32)), y), "images.pt")
    torchvision = types.ModuleType("torchvision")
    torchvision.models = types.SimpleNamespace(resnet18=lambda weights: ResNet())
    normalize = lambda x, mean, deviation: (x - 0.45) / 0.22
    functional = types.SimpleNamespace(normalize=normalize)
    torchvision.transforms = types.SimpleNamespace(functional=functional)
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    (code,) = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    short = "Settings(lr=1e-2, max_epochs=5, batch_size=32"
    for old, new in (("400", "40"), ("Settings(lr=1e-4, batch_size=32", short)):
        assert old in code
        code = code.replace(old, new)
    exec(code, variables := {})  # noqa: S102
    out, err = capsys.readouterr()
    assert re.search(r"tuned: .*\ntied: .*lead", out) and "unit 1 conv1: epoch 5, validation" in err
    model = ResNet()
    model.fc = nn.Linear(16, 5)
    model.load_state_dict(torch.load("tuned.pt", weights_only=True))
    x, y = variables["val"]
    a = (model.eval()(x).argmax(1) == y).float().mean().item()
    assert a == pytest.approx(variables["selection"].result.accuracy)
