"""Tests of behaviour: the paper transcribed naively as oracle, known values, and invariants.

They need no network and no data; the whole suite takes about two minutes on two cores.
"""

import base64
import colorsys
import contextlib
import copy
import gzip
import hashlib
import http.server
import io
import json
import os
import random
import re
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
import types
import zipfile
import zlib
from collections import OrderedDict
from dataclasses import replace
from functools import cache, partial
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
from flextune import Result, Settings, fine_tune

HERE = Path(__file__).parent
FAST = Settings(lr=1e-2, batch_size=16, check_every=2, patience=3, max_epochs=40, device="cpu")

# ---------------------------------------------------------------- a small problem


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


def naive_fine_tune(net, units, train, val, settings, epochs=None):
    """The literal loop: the whole network in every step. Returns (network, accuracy, epochs)."""
    net = copy.deepcopy(net)
    trained = [p for unit in units for p in net[unit - 1].parameters()]
    optimizer = torch.optim.Adam(trained, lr=settings.lr)
    order = torch.Generator().manual_seed(settings.seed)
    torch.manual_seed(settings.seed)
    best, best_net, stale = -1, None, 0
    for epoch in range(1, (epochs or settings.max_epochs) + 1):
        net.eval()
        for unit in units:
            for module in net[unit - 1].modules():
                module.training = not isinstance(module, nn.BatchNorm2d)
        permutation = torch.randperm(len(train[0]), generator=order)
        for start in range(0, len(permutation), settings.batch_size):
            batch = permutation[start : start + settings.batch_size]
            net.zero_grad()
            cross_entropy(net(train[0][batch] / 255), train[1][batch]).backward()
            optimizer.step()
        if epochs is None and epoch % settings.check_every == 0:
            a = naive_accuracy(net, val)
            if a > best:
                best, best_net, stale = a, copy.deepcopy(net), 0
            else:
                stale += 1
            if stale == settings.patience:
                break
    if epochs is not None:
        best, best_net = naive_accuracy(net, val), net
    return best_net, best, epoch


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
    naive = {
        name: naive_fine_tune(source, units, train, val, settings)
        for name, units in everything.items()
    }
    naive["epoch"] = naive_fine_tune(source, everything["all"], train, val, settings, epochs=1)
    return settings, naive


def test_flex_is_algorithm_1(source, train, val, both):
    settings, naive = both
    a = {name: naive[name][1] for name in (1, 2, 4, 5, "all")}
    ours = flextune.flex(source, train, val, settings)
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
    ours = flextune.fast_flex(source, train, val, settings)
    assert ours.proxies == pytest.approx(proxies)
    assert ours.best == best
    assert ours.chosen == (best if naive[best][1] >= naive["all"][1] else "all")
    assert ours.result.accuracy == pytest.approx(max(naive[best][1], naive["all"][1]))


def test_faster_flex_is_algorithm_3(source, train, val, both):
    settings, naive = both
    proxies = naive_proxies(source, naive["epoch"][0], val)
    ours = flextune.faster_flex(source, train, val, settings)
    assert ours.proxies == pytest.approx(proxies)
    assert ours.chosen == ours.best == arg_max(proxies)
    assert ours.result.accuracy == pytest.approx(naive[ours.chosen][1])
    assert ours.tuned["all"].epochs == 1


# ---------------------------------------------------------------- selection


def scripted(accuracies):
    """A `fine_tune` that returns the network it is given, with the accuracy of a script."""

    def tune(net, units, train, val, settings, epochs=None):
        return Result(net, (), accuracies[units], 1, 0.0, [], 0, False)

    return tune


@pytest.mark.parametrize(
    "accuracies, chosen",
    [
        ({1: 0.5, 2: 0.7, 4: 0.7, 5: 0.6, "all": 0.7}, 2),  # the smallest unit; a unit before all
        ({1: 0.5, 2: 0.6, 4: 0.7, 5: 0.7, "all": 0.7}, 4),
        ({1: 0.5, 2: 0.6, 4: 0.7, 5: 0.7, "all": 0.8}, "all"),
    ],
)
def test_flex_breaks_ties(source, train, val, accuracies, chosen):
    assert flextune.flex(source, train, val, FAST, scripted(accuracies)).chosen == chosen


@pytest.mark.parametrize("a_best, chosen", [(0.7, 1), (0.6, "all")])
def test_fast_flex_breaks_ties(source, train, val, a_best, chosen):
    """All proxies are the source network here, so unit 1 is the arg max of line 7."""
    tune = scripted({"all": 0.7, 1: a_best})
    selection = flextune.fast_flex(source, train, val, FAST, tune)
    assert (selection.best, selection.chosen) == (1, chosen)


def test_a_single_epoch_that_lowers_the_accuracy_still_makes_proxies(source, val):
    """Algorithm 3, line 1, keeps the last state: with the best one, proxies would be the source."""
    x, y = images(200, seed=1)
    harmful, good = (x, (y + 1) % 4), images(100, seed=4)
    epoch = fine_tune(source, "all", harmful, good, FAST, epochs=1)
    assert epoch.accuracy < epoch.history[0][1] == 1
    selection = flextune.faster_flex(source, harmful, good, FAST)
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


def test_a_selection_adds_up_what_it_trained(source, train, val):
    selection = flextune.flex(source, train, val, FAST)
    assert selection.epochs == sum(result.epochs for result in selection.tuned.values())
    assert selection.seconds == sum(result.seconds for result in selection.tuned.values()) > 0


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
    assert result.accuracy == flextune.accuracy(result.net, val, FAST)
    assert result.accuracy == pytest.approx(naive_accuracy(copy.deepcopy(result.net), val))
    assert result.accuracy == max(a for epoch, a in result.history if epoch > 0)
    assert result.history[0] == (0, flextune.accuracy(source, val, FAST))
    assert [epoch for epoch, _ in result.history] == list(range(0, result.epochs + 1, 2))


def test_dropout_is_off_in_frozen_units_and_on_in_tuned_ones(source, train, val):
    def with_dropout(p):
        net = small_net(dropout=p)
        net.load_state_dict(source.state_dict())
        return net

    for unit, matters in ((5, False), (1, False), (4, True), ("all", True)):
        tuned = [fine_tune(with_dropout(p), unit, train, val, FAST).net for p in (0.0, 0.9)]
        assert same(*tuned) != matters


@pytest.mark.parametrize(
    "script, epochs, best",
    [
        ([0.9, 0.1, 0.3, 0.2, 0.3, 0.1], 10, 4),  # a tie is no improvement; epoch 0 does not count
        ([0.0, 0.5, 0.4, 0.3, 0.6, 0.1, 0.1, 0.1], 14, 8),
        ([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6], 11, 11),  # the cap, and a last check at it
    ],
)
def test_early_stopping(monkeypatch, source, train, val, script, epochs, best):
    settings = replace(FAST, max_epochs=11 if epochs == 11 else 40)
    state = fine_tune(source, 2, train, val, settings, epochs=best).net
    scores = iter(script)
    monkeypatch.setattr(flextune, "_accuracy", lambda *_: next(scores))
    reported = []
    result = fine_tune(
        source, 2, train, val, settings, report=lambda *check: reported.append(check)
    )
    assert result.epochs == epochs
    assert result.accuracy == script[-(-best // 2)]
    assert result.history[1:] == reported
    assert same(result.net, state)
    assert next(scores, None) is None


def test_a_number_of_epochs_returns_the_last_state(monkeypatch, source, train, val):
    scores = iter([0.9, 0.5, 0.4, 0.3, 0.2, 0.1])
    monkeypatch.setattr(flextune, "_accuracy", lambda *_: next(scores))
    result = fine_tune(source, 2, train, val, FAST, epochs=9)
    assert (result.epochs, result.accuracy) == (9, 0.1)


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
@pytest.mark.parametrize("cache_bytes", [1 << 30, 0])
def test_cuda_is_reproducible_and_agrees_with_the_cpu(source, train, val, cache_bytes):
    random = torch.cuda.get_rng_state()
    settings = replace(FAST, device="cuda", cache_bytes=cache_bytes)
    cpu = flextune.flex(source, train, val, FAST)
    one, two = (flextune.flex(source, train, val, settings) for _ in range(2))
    assert torch.equal(torch.cuda.get_rng_state(), random)
    for unit, result in one.tuned.items():
        assert next(result.net.parameters()).device.type == "cpu"  # where the network came from
        assert same(result.net, two.tuned[unit].net)
        assert result.accuracy == pytest.approx(cpu.tuned[unit].accuracy, abs=0.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
def test_a_captured_step_is_an_eager_step(monkeypatch, source, train, val):
    monkeypatch.setattr(flextune._Captured, "EAGER", 3)
    settings = replace(FAST, device="cuda")
    for unit in (1, 4, "all"):
        captured = fine_tune(source, unit, train, val, settings)
        eager = fine_tune(source, unit, train, val, replace(settings, cuda_graph=False))
        assert captured.history == eager.history
        for mine, theirs in zip(captured.net.parameters(), eager.net.parameters()):
            assert torch.allclose(mine, theirs, atol=1e-5)


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
    assert result.accuracy == flextune.accuracy(result.net, val, FAST)
    assert torch.equal(val[0], before)


class View(nn.Module):
    def forward(self, x):
        return x.view(len(x), -1)


def test_a_unit_that_needs_the_plain_memory_layout(train, val):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(View(), nn.Linear(144, 4)))
    for unit in (1, 2):
        result = fine_tune(net, unit, train, val, FAST)
        assert result.net(val[0] / 255).shape == (100, 4)
        assert result.accuracy == flextune.accuracy(result.net, val, FAST)


@pytest.mark.parametrize("kind", [torch.float64, torch.uint8])
def test_images_are_brought_to_the_precision_of_the_network(source, val, kind):
    x = val[0] if kind == torch.uint8 else (val[0] / 255).to(kind)
    double = copy.deepcopy(source).double()
    expected = flextune.accuracy(source, val, FAST)
    assert flextune.accuracy(double, (x, val[1]), FAST) == expected
    assert flextune.accuracy(source, (x, val[1]), FAST) == expected


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
    assert epochs > 2 and sum(seen) < 150  # 133 images, and a few to try the network on
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
    flextune.flex(net, train, val, settings)
    flex = sum(seen)
    seen.clear()
    flextune.fine_tune(net, "all", train, val, settings)
    whole = sum(seen)
    assert flex - whole < 300  # 133 images, twice 100 for epoch 0 and its candidates, single ones
    seen.clear()
    flextune.faster_flex(net, train, val, settings)
    assert sum(seen) - whole < 300  # five proxies have 100 images each


def test_networks_of_a_selection_share_what_is_frozen(source, train, val):
    tuned = flextune.flex(source, train, val, replace(FAST, max_epochs=1)).tuned

    def memory(*units):
        return {tensor.data_ptr() for unit in units for tensor in unit.state_dict().values()}

    for number in (1, 2, 4, 5):
        own, other = tuned[number].net, tuned[4 if number != 4 else 5].net
        for place in {1, 2, 4, 5} - {number, *tuned[4 if number != 4 else 5].units}:
            assert memory(own[place - 1]) == memory(other[place - 1])
        assert not memory(own[number - 1]) & memory(other, source)
        assert not memory(own) & memory(source)
        assert all(weight.grad is None for weight in own.parameters())


@pytest.mark.parametrize("cache_bytes", [2 << 30, 0])
def test_sharing_changes_no_result(source, train, val, cache_bytes):
    settings = replace(FAST, cache_bytes=cache_bytes)
    alone = {unit: fine_tune(source, unit, train, val, settings) for unit in (1, 2, 4, 5, "all")}
    proxies = {n: flextune.surgery(source, alone["all"].net, n) for n in (1, 2, 4, 5)}
    proxies = {n: flextune.accuracy(net, val, settings) for n, net in proxies.items()}
    with flextune.sharing(source, settings):
        flex = flextune.flex(source, train, val, settings)
        fast = flextune.fast_flex(source, train, val, settings)
    for unit, result in alone.items():
        assert same(result.net, flex.tuned[unit].net)
        assert result.history == flex.tuned[unit].history
    assert fast.proxies == proxies


def test_the_literal_loop_of_the_benchmark_gives_the_same(train, val):
    """In float64, where rounding does not add up; with dropout on maps, too."""
    net = small_net().double()
    net[1].append(nn.Dropout(0.3))
    train, val = ((x.double() / 255, y) for x, y in (train, val))
    literal = flextune.flex(net, train, val, FAST, run_all.literal)
    ours = flextune.flex(net, train, val, FAST)
    assert literal.chosen == ours.chosen
    for unit, result in ours.tuned.items():
        assert literal.tuned[unit].history == result.history[1:]
        for mine, theirs in zip(result.net.parameters(), literal.tuned[unit].net.parameters()):
            assert torch.allclose(mine, theirs, atol=1e-9)


def test_bfloat16_products_change_little_and_only_where_asked_for(source, train, val):
    exact = fine_tune(source, "all", train, val, FAST)
    reduced = fine_tune(source, "all", train, val, replace(FAST, bfloat16=True))
    assert not same(exact.net, reduced.net)
    assert abs(exact.accuracy - reduced.accuracy) <= 0.05
    assert all(w.dtype == torch.float32 for w in reduced.net.parameters())
    assert reduced.accuracy == flextune.accuracy(reduced.net, val, FAST)  # of the float32 network


def test_top_k_is_the_measure_everywhere(source, train, val):
    settings = replace(FAST, top_k=2)
    selection = flextune.fast_flex(source, train, val, settings)
    best = selection.tuned[selection.best]
    assert best.accuracy == flextune.accuracy(best.net, val, settings)
    assert best.accuracy > flextune.accuracy(best.net, val, FAST)
    for unit, a in selection.proxies.items():
        proxy = flextune.surgery(source, selection.tuned["all"].net, unit)
        assert a == flextune.accuracy(proxy, val, settings)


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
    assert result.accuracy == result.history[0][1] == flextune.accuracy(source, val, FAST)
    # A single step: its loss is finite, only the weights are not.
    step = fine_tune(source, "all", images(4, 5), val, replace(FAST, lr=1e38), epochs=1)
    assert step.diverged and same(step.net, source)


def test_a_candidate_that_diverges_later_keeps_its_best_state(monkeypatch, source, train, val):
    expected = fine_tune(source, 2, train, val, replace(FAST, max_epochs=4))
    steps = iter(range(10**6))

    def loss(*batch):  # 3 steps an epoch: NaN from epoch 6 on
        return cross_entropy(*batch) * (torch.nan if next(steps) >= 15 else 1)

    monkeypatch.setattr(flextune, "cross_entropy", loss)
    result = fine_tune(source, 2, train, val, FAST)
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
        ({"net": nn.Linear(3, 3)}, "must be a plain nn.Sequential"),
        ({"net": Wrapped(nn.Flatten(), nn.Linear(192, 4))}, "must be a plain nn.Sequential"),
        ({"net": tied()}, "share parameters"),
        ({"net": nn.Sequential(nn.Flatten()), "units": "all"}, "no unit of the network has"),
        ({"net": nn.Sequential(nn.Conv2d(3, 4, 3)), "units": 1}, "logits"),
        ({"net": nn.Sequential(nn.LSTM(8, 4)), "units": 1}, "do not fit"),
        ({"units": 0}, "numbered 1 to 5"),
        ({"units": "last"}, "numbered 1 to 5"),
        ({"units": [1, "all"]}, "numbered 1 to 5"),
        ({"units": 1.5}, "numbered 1 to 5"),
        ({"units": None}, "numbered 1 to 5"),
        ({"train": None}, "train: must be a pair (images, labels)"),
        ({"val": (X, Y, Y)}, "val: must be a pair (images, labels)"),
        ({"train": (X[0, 0, 0, 0], Y)}, "must be tensors"),
        ({"train": (X[:, 0, 0, 0], Y)}, "do not fit"),
        ({"units": [5, 6]}, "numbered 1 to 5"),
        ({"units": []}, "no parameters"),
        ({"units": 3}, "no parameters"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"train": (X[:0], Y[:0])}, "train: there are no images"),
        ({"val": (X[:0], Y[:0])}, "val: there are no images"),
        ({"train": (X, Y[:7])}, "8 images need int64 labels"),
        ({"train": (X, Y.int())}, "8 images need int64 labels"),
        ({"train": (X, Y + 1)}, "labels 1...4, but 4 classes"),
        ({"val": (X, Y - 1)}, "labels -1...2, but 4 classes"),
        ({"train": (X.numpy(), Y)}, "must be tensors"),
        ({"train": (X.int(), Y)}, "must be uint8, or float"),
        ({"train": (X / 0, Y)}, "without NaN and infinity"),
        ({"train": (X[:, :1], Y)}, "do not fit"),
        ({"val": (X[..., :6], Y)}, "do not fit"),
        ({"val": (X.repeat(1, 1, 2, 2)[..., :9, :9], Y)}, "differ in size"),
        ({"settings": replace(FAST, top_k=5)}, "top_k is 5, but there are 4 classes"),
    ],
)
def test_what_cannot_be_worked_with_is_a_clear_error(source, wrong, message):
    good = {"net": source, "units": 5, "train": (X, Y), "val": (X, Y), "settings": FAST}
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        fine_tune(**good | wrong)
    assert "\n" not in str(caught.value)


def test_a_layer_that_is_two_units(train, val):
    relu = nn.ReLU()
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))
    net = nn.Sequential(nn.Conv2d(3, 4, 3), relu, nn.Conv2d(4, 4, 3), relu, head)
    for select in (flextune.flex, flextune.fast_flex):
        result = select(net, train, val, FAST).result
        assert len(result.net) == 5 and flextune.accuracy(result.net, val, FAST) == result.accuracy
    assert flextune.ft_ss(net, train, val, FAST).net(val[0] / 255).shape == (100, 4)


def test_gradients_of_the_images_are_nobodys(source, train, val):
    x = (train[0] / 255).requires_grad_()
    fine_tune(source, "all", (x, train[1]), val, replace(FAST, max_epochs=1))
    assert x.grad is None


@pytest.mark.parametrize("name", ["batch_size", "check_every", "patience", "max_epochs", "top_k"])
def test_settings_are_checked(name):
    with pytest.raises(ValueError, match="whole number"):
        Settings(**{name: 1.5})
    with pytest.raises(ValueError, match=f"{name} must be at least 1, not 0"):
        Settings(**{name: 0})
    with pytest.raises(ValueError, match="lr must be positive"):
        Settings(lr=0)


def test_top_k_accuracy():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 4, bias=False))
    net[1].weight.data = torch.eye(4)
    logits = torch.tensor([[3.0, 2, 1, 0], [0, 1, 2, 3], [0, 3, 1, 2]])[:, :, None, None]
    y = torch.tensor([1, 3, 0])
    got = [flextune.accuracy(net, (logits, y), Settings(top_k=k)) for k in (1, 2, 3, 4)]
    assert got == pytest.approx([1 / 3, 2 / 3, 2 / 3, 1])
    equal = torch.ones(4, 4, 1, 1), torch.arange(4)  # the first of equals is the largest
    got = [flextune.accuracy(net, equal, Settings(top_k=k)) for k in (1, 2, 3, 4)]
    assert got == [0.25, 0.5, 0.75, 1]


def test_logits_that_are_not_numbers_are_never_right():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 4))
    net[1].weight.data[:] = torch.nan
    data = torch.ones(4, 4, 1, 1), torch.arange(4)
    assert flextune.accuracy(net, data, Settings(top_k=4)) == 0


# ---------------------------------------------------------------- baselines


def test_ft_fc_tunes_the_last_units(source, train, val):
    for n, units in ((1, (5,)), (2, (4, 5)), (3, (2, 4, 5))):
        assert flextune.ft_fc(source, train, val, FAST, n=n).units == units
    with pytest.raises(ValueError, match="n must be at least 1"):
        flextune.ft_fc(source, train, val, FAST, n=0)


def test_ft_all_tunes_all_units(source, train, val):
    expected = fine_tune(source, "all", train, val, FAST)
    assert same(flextune.ft_all(source, train, val, FAST).net, expected.net)


def test_the_source_baseline_is_untouched(source, train, val):
    result = flextune.source(source, train, val, FAST)
    assert same(result.net, source) and result.trained == result.epochs == 0
    assert result.accuracy == flextune.accuracy(source, val, FAST)


def test_ft_ss_tunes_scales_shifts_and_the_last_unit(source, train, val):
    before = copy.deepcopy(source)
    result = flextune.ft_ss(source, train, val, FAST)
    net = result.net
    # Scales: a kernel (output, input), or an output of the linear layer; shifts: an output.
    assert result.trained == (8 * 3 + 8) + (8 * 8 + 8) + (16 + 16) + (16 * 4 + 4)
    assert same(source, before) and source.training and not net.training
    assert result.accuracy == flextune.accuracy(net, val, FAST)
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


def test_ft_ss_refuses_weights_that_it_cannot_scale(train, val):
    one, two = nn.Linear(192, 192), nn.Linear(192, 192)
    two.weight = one.weight
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(192, 192))
    for below in (nn.Sequential(nn.Flatten(), one, two), nn.Sequential(nn.Flatten(), normed)):
        net = nn.Sequential(below, nn.Linear(192, 4))
        with pytest.raises(ValueError, match="shared or parametrized"):
            flextune.ft_ss(net, train, val, FAST)


def test_ft_ss_starts_from_the_source(source, train, val):
    result = flextune.ft_ss(source, train, val, replace(FAST, lr=1e-12), tune=fine_tune)
    assert result.accuracy == flextune.accuracy(source, val, FAST)


# ---------------------------------------------------------------- certainty and retrieval


def answering(*right):
    """A network that has the i-th of one-hot images right, class 0, if right[i]."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(len(right), 2, bias=False))
    net[1].weight.data = torch.tensor([right, [1 - a for a in right]]).float()
    return net


def test_certainty_known_values():
    val = torch.eye(8)[:, :, None, None], torch.zeros(8, dtype=torch.int64)
    patterns = {
        1: (1, 1, 1, 1, 1, 1, 0, 0),
        2: (1, 1, 1, 1, 1, 1, 1, 0),
        "all": (0, 1, 1, 1, 1, 1, 1, 0),  # ties with 1, which comes first
    }
    tuned = {
        unit: Result(answering(*right), (), sum(right) / 8, 1, 0.0, [], 0, False)
        for unit, right in patterns.items()
    }
    for unit, right in patterns.items():
        assert flextune.correct(tuned[unit].net, val).tolist() == [*map(bool, right)]
    sure = flextune.certainty(flextune.Selection(2, 2, tuned), val)
    assert sure.runner_up == 1
    assert sure.lead == pytest.approx(1 / 8)
    # The differences are one 1 and seven 0: their variance is 1/8 - 1/64.
    assert sure.error == pytest.approx(((1 / 8 - 1 / 64) / 8) ** 0.5)
    assert sure.bound == pytest.approx((np.log(2 * 3 / 0.05) / 16) ** 0.5)
    surer = flextune.certainty(flextune.Selection(2, 2, tuned), val, delta=0.5)
    assert surer.bound == pytest.approx((np.log(12) / 16) ** 0.5)


def test_average_precision_by_hand():
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 3))
    far = nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(1, 1)), nn.Linear(1, 3))
    far[0][1].weight.data[:], far[0][1].bias.data[:] = 1, 6  # sees a query 6 to the right
    gallery = torch.arange(1.0, 6)[:, None, None, None], torch.tensor([0, 1, 0, 0, -1])

    def ap(tuned, *labels, k=10):
        queries = torch.zeros(len(labels), 1, 1, 1), torch.tensor(labels)
        return flextune.retrieval(net, tuned, gallery, queries, FAST, k)

    # Relevant at places 1, 3 and 4, with precisions 1, 2/3 and 3/4.
    assert ap(net, 0) == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
    assert ap(net, 0, k=3) == pytest.approx((1 + 2 / 3) / 3)
    assert ap(net, 0, k=2) == pytest.approx(1 / 2)
    assert ap(net, 1) == pytest.approx(1 / 2)  # one relevant image, at place 2
    assert ap(net, 2) == 0  # none
    assert ap(net, 0, 1, 2, k=3) == pytest.approx((5 / 9 + 1 / 2 + 0) / 3)
    assert ap(far, 0) == pytest.approx((1 / 2 + 2 / 3 + 3 / 5) / 3)  # from the other end
    with pytest.raises(ValueError, match="k must be at least 1"):
        ap(net, 0, k=0)
    with pytest.raises(ValueError, match="queries: 1 images need int64 labels"):
        flextune.retrieval(net, net, gallery, (gallery[0][:1], torch.tensor([0, 1])), FAST)


def test_features_are_the_input_of_the_last_unit_averaged_over_pixels(source, val):
    features = flextune._features(source, val[0], FAST)
    expected = copy.deepcopy(source).eval()[:4](val[0] / 255)
    torch.testing.assert_close(features, expected.detach())
    maps = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Sequential(nn.Flatten(), nn.Linear(180, 4)))
    features = flextune._features(maps, val[0], FAST)
    torch.testing.assert_close(features, maps[0](val[0] / 255).mean((2, 3)).detach())


# ---------------------------------------------------------------- image-to-image units


@pytest.mark.parametrize("kind", [models.Pixelwise, models.SpatialTransformer, models.UNet])
def test_image_to_image_units_start_as_the_identity_and_learn(source, train, val, kind):
    unit = run_all.seeded(kind, 0)
    for size in ((8, 8), (28, 28), (32, 40)):
        x = torch.rand(3, 3, *size, generator=generator())
        torch.testing.assert_close(unit(x), x, rtol=0, atol=1e-5)
    settings = FAST
    if kind is models.SpatialTransformer:  # is not for colours and noise
        settings, zero = replace(FAST, lr=1e-3), torch.zeros(1)
        train, val = (
            (shifts.affine(x, zero, zero, zero + 1, [zero + 0.25, zero]), y)
            for x, y in (images(33, seed=2), images(100, seed=3))
        )
    result = fine_tune(nn.Sequential(unit, *source), 1, train, val, settings)
    assert result.history[0][1] == flextune.accuracy(source, val, settings)
    assert not same(result.net[0], unit)
    assert all(same(a, b) for a, b in zip(result.net[1:], source))
    assert result.accuracy > result.history[0][1]


def test_a_spatial_transformer_can_undo_an_affine_shift():
    x, _ = shifts.draw_digits(50, generator())
    zero, one = torch.zeros(1), torch.ones(1)
    moved = shifts.affine(x, zero, zero, one, [zero + 0.25, zero])
    unit = models.SpatialTransformer()
    unit.locate[-1].bias.data[2] = 0.5  # of the image's half width
    back = unit(moved / 255) * 255
    assert (back[..., :20] - x[..., :20]).abs().max() <= 1


def test_flex_with_an_image_to_image_unit_is_flex_with_one_more_candidate(source, train, val):
    unit = run_all.seeded(models.Pixelwise, 0)
    plain = flextune.flex(source, train, val, FAST)
    more = run_all.flex_i2i(source, train, val, FAST, fine_tune, unit)
    assert [*more.tuned] == [1, 2, 4, 5, "all", 0]
    assert all(same(more.tuned[unit].net, plain.tuned[unit].net) for unit in plain.tuned)
    assert more.tuned[0].units == (0,) and len(more.tuned[0].net) == 6
    accuracies = {unit: result.accuracy for unit, result in more.tuned.items()}
    assert more.chosen == arg_max(accuracies)
    tune = scripted({1: 0.7, 2: 0.5, 4: 0.5, 5: 0.6, "all": 0.6})  # 0.7 for candidate 0, too
    assert run_all.flex_i2i(source, train, val, FAST, tune, unit).chosen == 1


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
    photos = list(shifts.draw_photos(3, generator()))
    shift = shifts.SHIFTS[name]
    if name[1] == "mnist-m":
        shift = partial(shift, photos=photos)
    x, _ = shifts.BUILT_IN[name[0]][0](30, generator())
    before = x.clone()
    a, b, c = (shift(x, draw=generator(seed)) for seed in (0, 0, 1))
    assert a.dtype == torch.uint8 and a.shape == x.shape
    assert torch.equal(x, before) and not torch.equal(a, x)
    assert torch.equal(a, b)
    drawn = name[1] in ("occluded", "transform-random", "mnist-m", "noisy")
    assert torch.equal(a, c) != drawn


def test_blur_is_gaussian():
    x = torch.zeros(1, 3, 28, 28, dtype=torch.uint8)
    x[..., 14, 14] = 255
    y = shifts.blur(x, generator(), sigma=1.0)
    weight = torch.exp(-(torch.arange(-3, 4) ** 2) / 2)
    weight /= weight.sum()
    expected = (255 * weight[:, None] * weight).round().byte()
    assert (y[0, 1, 11:18, 11:18].int() - expected.int()).abs().max() <= 1
    flat = torch.full((2, 3, 28, 28), 77, dtype=torch.uint8)  # the edge is not darkened
    assert torch.equal(shifts.blur(flat, generator(), sigma=2.5), flat)


def test_occlude_covers_a_rectangle_of_the_area():
    x = torch.full((200, 3, 28, 28), 255, dtype=torch.uint8)
    covered = shifts.occlude(x, generator(), area=0.25) == 0  # (200, 3, 28, 28)
    assert torch.equal(covered[:, 0], covered[:, 2])
    rows, columns = covered[:, 0].any(2), covered[:, 0].any(1)
    assert torch.equal(covered[:, 0], rows[:, :, None] & columns[:, None, :])
    assert covered.float().mean().item() == pytest.approx(0.25, abs=0.01)
    places = covered[:, 0].float().mean(0)  # how often each pixel is covered
    assert places[5:-5, 5:-5].min() > 0.1 and places.max() < 0.9


def test_affine_known_maps():
    x, _ = shifts.draw_digits(10, generator())
    zero, one = torch.zeros(1), torch.ones(1)

    def close(a, b):
        return (a.int() - b.int()).abs().max() <= 1

    assert torch.equal(shifts.affine(x, zero, zero, one, [zero, zero]), x)
    turned = shifts.affine(x, one * torch.pi / 2, zero, one, [zero, zero])
    assert close(turned, x.rot90(1, (2, 3)))  # anti-clockwise
    moved = shifts.affine(x, zero, zero, one, [one * 0.25, zero])  # 7 pixels to the right
    assert close(moved[..., 7:], x[..., :-7]) and moved[..., :7].max() == 0
    sheared = shifts.affine(x, zero, one, one, [zero, zero])  # a row per row, to the left below
    for row in (4, 13, 20):
        by = 13.5 - row
        rolled = [x[..., row, :].roll(n, -1).float() for n in (int(by - 0.5), int(by + 0.5))]
        middle = ((rolled[0] + rolled[1]) / 2)[..., 10:18]
        assert (sheared[..., row, 10:18].float() - middle).abs().max() <= 1
    half = shifts.affine(torch.full_like(x, 255), zero, zero, one / 2, [zero, zero])
    assert (half > 127).float().mean().item() == pytest.approx(0.25, abs=0.02)


def test_transform_fixed_is_one_map_and_transform_random_is_not():
    x = shifts.draw_digits(1, generator())[0].expand(5, -1, -1, -1)
    fixed = shifts.transform_fixed(x, generator(), angle=70)
    assert all(torch.equal(fixed[0], image) for image in fixed)
    drawn = shifts.transform_random(x, generator(), strength=0.77)
    assert not torch.equal(drawn[0], drawn[1])


def test_noise_is_gaussian_and_clipped():
    x = torch.full((300, 3, 8, 8), 128, dtype=torch.uint8)
    y = shifts.noise(x, generator(), sigma=20).float()
    assert y.mean().item() == pytest.approx(128, abs=0.5)
    assert y.std().item() == pytest.approx(20, abs=0.5)
    y = shifts.noise(x, generator(), sigma=1000)
    assert ((y == 0) | (y == 255)).float().mean() > 0.8


def test_yuv_and_hsv_known_colours():
    rgb = torch.randint(0, 256, (50, 3, 1, 1), generator=generator(), dtype=torch.uint8)
    rgb[:5, :, 0, 0] = torch.tensor([[0] * 3, [255] * 3, [255, 0, 0], [0, 0, 255], [255, 255, 0]])
    for got, (r, g, b) in zip(shifts.hsv(rgb, None)[..., 0, 0], (rgb[..., 0, 0] / 255).tolist()):
        expected = torch.tensor(colorsys.rgb_to_hsv(r, g, b)) * 255
        assert (got - expected).abs().max() <= 0.51
    got = shifts.yuv(rgb, None)[:5, :, 0, 0].tolist()
    assert got == [[0, 128, 128], [255, 128, 128], [76, 84, 255], [29, 255, 107], [226, 0, 148]]


def test_shrink_fills_the_border():
    x = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    x[..., 4:] = 200  # dark and light half
    kept = shifts.shrink(x, None, factor=1.0, mirror=True)
    assert torch.equal(kept, x)
    mirrored, stretched = (shifts.shrink(x, None, 0.5, mirror)[0, 0, 4] for mirror in (True, False))
    assert mirrored[2] < 30 and mirrored[5] > 170
    assert torch.equal(mirrored, mirrored[[3, 2, 2, 3, 4, 5, 5, 4]])
    assert torch.equal(stretched, stretched[[2, 2, 2, 3, 4, 5, 5, 5]])


def test_rotate_is_anti_clockwise():
    x, _ = shifts.draw_digits(3, generator())
    assert (shifts.rotate(x, None, 90).int() - x.rot90(1, (2, 3)).int()).abs().max() <= 1


def test_mnist_m_is_the_difference_of_patch_and_digit():
    x, _ = shifts.draw_digits(20, generator())
    flat = [torch.tensor([10, 100, 255], dtype=torch.uint8)[:, None, None].expand(3, 40, 30)]
    y = shifts.photo_background(x, generator(), flat)
    for channel, value in enumerate((10, 100, 255)):
        assert torch.equal(y[:, channel].int(), (value - x[:, channel].int()).abs())
    ramp = torch.arange(60 * 60).remainder(251).byte().view(1, 60, 60).expand(3, -1, -1)
    patches = shifts.photo_background(torch.zeros_like(x), generator(), [ramp])
    windows = ramp[0].unfold(0, 28, 1).unfold(1, 28, 1).flatten(0, 1)  # every patch of the photo
    assert all((windows == patch[0]).all((1, 2)).any() for patch in patches)


# ---------------------------------------------------------------- splits and subsampling


@pytest.mark.parametrize(
    "sizes, ratio, expected",
    [
        ([300, 300, 300], 10, [10, 10, 10]),
        ([600, 300, 100], 10, [18, 9, 3]),
        ([960, 20, 20], 2, [4, 1, 1]),  # at least one of each
        ([500, 300, 205], 1, [1, 1, 1]),
        ([10, 20, 30], 20, [10, 20, 30]),  # the largest ratio is the whole pool
    ],
)
def test_subsample_keeps_the_proportions(sizes, ratio, expected):
    y = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    x = torch.arange(len(y))
    drawn, classes = shifts.subsample((x, y), ratio, seed=0)
    assert classes.bincount().tolist() == expected
    assert len(drawn.unique()) == len(drawn) and torch.equal(y[drawn], classes)
    assert torch.equal(drawn, shifts.subsample((x, y), ratio, seed=0)[0])
    other = shifts.subsample((x, y), ratio, seed=1)[0]
    assert torch.equal(drawn.sort()[0], other.sort()[0]) == (expected == sizes)


def test_a_ratio_beyond_the_pool_names_the_largest():
    data = torch.zeros(25), torch.arange(25) % 3
    with pytest.raises(shifts.DataError, match="the largest .* is 8$"):
        shifts.subsample(data, 9, seed=0)


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
        assert x.dtype == torch.uint8 and x.shape[1:] == (3, 28, 28) and y.dtype == torch.int64
        index = x[:, 0, 0, 0].long() % 100 * 256 + x[:, 0, 0, 1]
        assert torch.equal(y, index % 10)
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
    assert seen[-1] == ("downloading good, 0 of 0 MiB", len(body), len(body))
    pages["/loop"] = {"Location": "/loop"}, b""
    pages["/away"] = {"Location": "file:///etc/hostname"}, b""
    pages["/length"] = {"Content-Length": "many"}, body
    pages["/slow"] = {"Content-Length": len(body) + 1}, body, 1
    pages["/drip"] = {"Content-Length": 1 << 20}, body[:100], 0.2, 9
    pages["/long"] = {"Content-Length": 1 << 22}, body * 4
    monkeypatch.setattr(shifts, "TIMEOUT", 0.3)
    monkeypatch.setattr(shifts, "LARGEST_DOWNLOAD", 1 << 21)
    for page, md5, reason in (
        ("good", "0" * 32, f"its MD5 is {right}, not {'0' * 32}"),
        ("cut", None, "ended|IncompleteRead"),
        ("none", None, "404|Not Found"),
        ("loop", None, "infinite loop"),
        ("away", None, "not allowed"),
        ("length", None, "many"),
        ("slow", None, "timed out"),
        ("drip", None, "too slow"),
        ("long", None, "does not end"),
    ):
        with pytest.raises(shifts.MissingError, match=reason) as caught:
            shifts.fetch(f"{url}/{page}", tmp_path / page, md5)
        assert "\n" not in str(caught.value)
    full = pytest.raises(shifts.MissingError, match="File too large")  # nearly as on a full disk
    with no_file_larger_than(1 << 18), full:
        shifts.fetch(f"{url}/good", tmp_path / "full", right)
    with pytest.raises(shifts.MissingError, match="refused"):
        shifts.fetch("http://127.0.0.1:1/x", tmp_path / "refused")
    with pytest.raises(shifts.MissingError, match="Not a directory|File exists"):
        shifts.fetch(f"{url}/good", path / "below a file")
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
    monkeypatch.setattr(shifts, "QUICKDRAW_ROWS", 12)
    _, files = shifts.FILES["quickdraw"]
    monkeypatch.setitem(shifts.FILES, "quickdraw", (f"{url}/", files))
    rng = np.random.default_rng(0)
    for name in shifts.QUICKDRAW:
        drawings = npy(rng.integers(0, 256, (50, 784), np.uint8))
        pages[f"/{name.replace(' ', '%20')}.npy"] = {"Accept-Ranges": "bytes"}, drawings
    shifts.provide("quickdraw", "noisy", tmp_path)
    assert {path.name for path in (tmp_path / "quickdraw").iterdir()} == {
        f"{name}.npy" for name in shifts.QUICKDRAW
    }
    assert np.load(tmp_path / "quickdraw" / "cat.npy").shape == (12, 784)
    domain = shifts.load("quickdraw", None, tmp_path)
    assert {split: len(y) for split, (_, y) in domain.items()} == {
        "source": 4 * 9,
        "pool": 4 * 9,
        "val": 2 * 9,
        "test": 2 * 9,
    }
    together = torch.cat([x for x, _ in domain.values()])
    assert together.shape == (12 * 9, 3, 32, 32) and len(together.unique(dim=0)) == 12 * 9
    assert together[:, :, :2].max() == 0  # a border around 28 x 28
    (tmp_path / "quickdraw" / "cat.npy").unlink()
    pages["/cat.npy"] = {}, pages["/cat.npy"][1][:5000]
    with pytest.raises(shifts.MissingError, match="was of no use .*ends early.*put it there"):
        shifts.provide("quickdraw", "noisy", tmp_path)
    assert len(list((tmp_path / "quickdraw").iterdir())) == 8


@pytest.mark.parametrize(
    "content",
    {
        "empty": b"",
        "type": npy(np.zeros((9, 784))),
        "shape": npy(np.zeros((9, 28, 28), np.uint8)),
        "objects": npy(np.array([{}], object)),
        "short": npy(np.zeros((9, 784), np.uint8))[:-1],
        "few": npy(np.zeros((5, 784), np.uint8)),
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


def test_cifar_is_downloaded_and_split_without_deer(tmp_path, server, monkeypatch):
    pages, url = server
    monkeypatch.setattr(shifts, "CIFAR_RECORDS", 20)
    batches = {name: records(20, seed) for seed, name in enumerate(shifts.CIFAR)}
    members = {f"cifar-10-batches-bin/{name}": batch.tobytes() for name, batch in batches.items()}
    body = tar(members | {"cifar-10-batches-bin/../../out.bin": b"", "readme.html": b""})
    pages["/cifar.tar.gz"] = {}, body
    _, _, *rest = shifts.ARCHIVES["cifar"]
    archive = f"{url}/cifar.tar.gz", hashlib.md5(body).hexdigest(), *rest
    monkeypatch.setitem(shifts.ARCHIVES, "cifar", archive)
    shifts.provide("cifar", "noisy", tmp_path / "data")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["cifar-10-batches-bin"]
    domain = shifts.load("cifar", None, tmp_path / "data")
    assert {split: len(y) for split, (_, y) in domain.items()} == {
        "source": 36,
        "pool": 36,
        "val": 18,
        "test": 18,
    }
    x, y = domain["test"]
    expected = [c for c in batches["test_batch.bin"] if c[0] != 4]
    assert torch.equal(x.flatten(1), torch.tensor(np.array(expected)[:, 1:]))
    assert y.tolist() == [c[0] - (c[0] > 4) for c in expected]
    train = torch.cat([domain[split][0] for split in ("source", "pool", "val")])
    assert len(train.unique(dim=0)) == 90
    path = tmp_path / "data" / "cifar-10-batches-bin" / "data_batch_1.bin"
    for content in (b"", path.read_bytes()[:-1], bytes([10]) + path.read_bytes()[1:]):
        path.write_bytes(content)
        with pytest.raises(shifts.DataError, match="data_batch_1.bin is not 20 images"):
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
    assert x.shape == (70, 3, 28, 28) and torch.equal(x[:, 0, 5, 5], torch.arange(70).byte())
    assert y.tolist() == [label % 10 for label in arrays["y"][:, 0].tolist()]
    assert {split: len(y) for split, (_, y) in domain.items()} == {
        "pool": 114,
        "val": 19,
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
        _, *rest, _ = shifts.ARCHIVES[name]
        count = 70 if name == target else 0
        monkeypatch.setitem(shifts.ARCHIVES, name, (f"{url}/pacs.zip", *rest, count))
    (tmp_path / "inception2.npz").touch()
    shifts.provide("ilsvrc", target, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inception2.npz", "pacs"]
    seen = []
    domain = shifts.load("ilsvrc", target, tmp_path, lambda *a: seen.append(a))
    assert seen[-1] == ("reading images, 8 of 8", 8, 8)
    assert {split: len(y) for split, (_, y) in domain.items()} == {"pool": 48, "val": 4, "test": 8}
    x, y = (torch.cat(part) for part in zip(*domain.values()))
    assert x.shape == (60, 3, 224, 224) and len(x[:, :, 0, 0].unique(dim=0)) == 60
    assert torch.equal(x[:, 0, 100, 100].long(), y * 30)  # dog 0, ..., house 5
    (tmp_path / "pacs" / folder / "dog" / "n0_1-1.png").write_text("no image")
    with pytest.raises(shifts.DataError, match="n0_1-1.png cannot be read as an image"):
        shifts.load("ilsvrc", target, tmp_path)
    shutil.rmtree(tmp_path / "pacs" / folder / "horse")
    with pytest.raises(shifts.DataError, match="horse has 0 images"):
        shifts.load("ilsvrc", target, tmp_path)


def test_ilsvrc_has_to_be_put_there(tmp_path):
    pytest.importorskip("PIL")
    with pytest.raises(shifts.MissingError, match="cannot be downloaded freely.*<wnid>/"):
        shifts.provide("ilsvrc", "yuv", tmp_path)
    (tmp_path / "ilsvrc" / "val" / "n01440764").mkdir(parents=True)
    with pytest.raises(shifts.DataError, match="should have 1000 class folders"):
        shifts.load("ilsvrc", "yuv", tmp_path)


def test_ilsvrc_images_are_split_within_each_class_and_shifted(tmp_path, monkeypatch):
    content = photo_file((10, 20, 30))
    for label in range(1000):
        folder = tmp_path / "ilsvrc" / "val" / f"n{label:08}"
        folder.mkdir(parents=True)
        for number in range(5):
            (folder / f"{number}.JPEG").write_bytes(content)
    monkeypatch.setattr(shifts, "SIDE", 2)
    domain = shifts.load("ilsvrc", "hsv", tmp_path)
    for split, each in {"pool": 2, "val": 1, "test": 2}.items():
        x, y = domain[split]
        assert y.bincount().tolist() == [each] * 1000
        # hue 210 of 360 degrees, saturation 2 / 3, value 30
        assert (x == torch.tensor([149, 170, 30], dtype=torch.uint8)[:, None, None]).all()


def test_mnist_is_downloaded_where_it_is_missing(tmp_path, mnist, server, monkeypatch):
    pages, url = server
    for path in (mnist / "mnist").iterdir():
        raw = gzip.decompress(path.read_bytes()) if path.suffix else path.read_bytes()
        pages[f"/{path.stem if path.suffix else path.name}.gz"] = {}, gzip.compress(raw, mtime=0)
    sums = {
        name: hashlib.md5(pages[name.removeprefix("mnist")][1]).hexdigest()
        for name in shifts.FILES["mnist"][1]
    }
    monkeypatch.setitem(shifts.FILES, "mnist", (f"{url}/", sums))
    expected = shifts.load("mnist", None, mnist)["pool"][0]
    shifts.provide("mnist", "blurry", tmp_path / "new")
    downloaded = shifts.load("mnist", None, tmp_path / "new")
    assert torch.equal(downloaded["pool"][0], expected)
    assert len(list((tmp_path / "new" / "mnist").iterdir())) == 4
    pages["/t10k-images-idx3-ubyte.gz"] = {}, b"another file"
    with pytest.raises(shifts.MissingError, match="its MD5 is"):
        shifts.provide("mnist", "blurry", tmp_path / "wrong")


def photo_archive():
    folder, sizes = "BSR/BSDS500/data/images/train", ((48, 32), (32, 48))
    photos = (photo_file((200, 100, 50), size, "JPEG") for size in sizes)
    return tar({f"{folder}/{number}.jpg": photo for number, photo in enumerate(photos)})


def test_photos_are_downloaded_and_unpacked(mnist, server, monkeypatch):
    pages, url = server
    pages["/bsds.tgz"] = {}, photo_archive()
    _, md5, members, folder, _ = shifts.ARCHIVES["bsds500"]
    for count in (200, 2):
        archive = f"{url}/bsds.tgz", md5, members, folder, count
        monkeypatch.setitem(shifts.ARCHIVES, "bsds500", archive)
        assert shifts.present("mnist", "mnist-m", mnist) == {"mnist": True, "bsds500": False}
        if count == 200:
            with pytest.raises(shifts.MissingError, match="2 of 200 files"):
                shifts.provide("mnist", "mnist-m", mnist)
    shifts.provide("mnist", "mnist-m", mnist)
    digits = shifts.load("mnist", None, mnist)["test"][0]
    x, _ = shifts.load("mnist", "mnist-m", mnist)["test"]
    expected = (torch.tensor([200, 100, 50])[:, None, None] - digits.int()).abs()
    assert (x.int() - expected).abs().max() <= 2  # JPEG rounds
    assert shifts.present("mnist", "mnist-m", mnist) == {"mnist": True, "bsds500": True}
    assert sorted(path.name for path in mnist.iterdir()) == ["bsds500", "mnist"]


def test_a_broken_photo_and_an_empty_folder(mnist):
    pytest.importorskip("PIL.Image")
    (mnist / "bsds500").mkdir()
    with pytest.raises(shifts.DataError, match="has no .jpg"):
        shifts.load("mnist", "mnist-m", mnist)
    (mnist / "bsds500" / "1.jpg").write_text("no photo")
    with pytest.raises(shifts.DataError, match="1.jpg cannot be read as an image"):
        shifts.load("mnist", "mnist-m", mnist)


def test_without_pillow_nothing_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setattr(shifts, "fetch", lambda *_: pytest.fail("downloads"))
    with pytest.raises(shifts.DataError, match="pip install pillow"):
        shifts.provide("mnist", "mnist-m", tmp_path)


# ---------------------------------------------------------------- built-in digits


def test_built_in_digits_are_the_same_every_time_and_balanced():
    (a, y), (b, _) = (shifts.draw_digits(500, generator(3)) for _ in range(2))
    assert torch.equal(a, b) and y.bincount().tolist() == [50] * 10
    assert a.shape == (500, 3, 28, 28) and a.dtype == torch.uint8 and a.max() > 200
    sizes = {split: len(y) for split, (_, y) in shifts.load("mnist", None, None).items()}
    assert sizes == {"source": 5000, "pool": 30000, "val": 1000, "test": 2000}
    assert 3000 * 10 <= sizes["pool"]  # the paper's largest ratio


@pytest.fixture(scope="module")
def pretrained():
    torch.manual_seed(0)
    domain = shifts.load("mnist", None, None)
    settings = Settings(max_epochs=4, check_every=4, device="cpu")
    train = [tensor[:2000] for tensor in domain["source"]]
    return fine_tune(models.mnist_net(), "all", train, domain["val"], settings).net


def test_the_4_layer_network_learns_the_built_in_digits_and_every_shift_hurts(pretrained):
    own = flextune.accuracy(pretrained, shifts.load("mnist", None, None)["test"])
    assert own >= 0.97
    for target in run_all.FAMILIES[0].targets:
        shifted = flextune.accuracy(pretrained, shifts.load("mnist", target, None)["test"])
        assert shifted < own - 0.1, target


def test_the_4_layer_network_has_4_units():
    net = models.mnist_net()
    assert [name for name, _ in net.named_children()] == ["conv1", "conv2", "fc1", "fc2"]
    assert flextune.candidates(net) == [1, 2, 3, 4]
    assert net(torch.rand(2, 3, 28, 28)).shape == (2, 10)


def test_the_7_layer_network_has_7_units():
    net = models.cifar_net().eval()
    names = [name for name, _ in net.named_children()]
    assert names == ["conv1", "conv2", "conv3", "conv4", "conv5", "fc1", "fc2"]
    assert flextune.candidates(net) == [*range(1, 8)]
    assert net(torch.rand(2, 3, 32, 32)).shape == (2, 9)


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
    assert len(weights) == 277 and list(weights)[-1] == "logits/biases"
    save_weights(tmp_path / "inception2.npz", weights)
    net = models.load_inception2(tmp_path / "inception2.npz").eval()
    # Python 2 has names of bytes, and TensorFlow ends those of variables in :0.
    save_weights(tmp_path / "old.npz", {f"{name}:0": a for name, a in weights.items()}, kind="S")
    old = models.load_inception2(tmp_path / "old.npz").state_dict()
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
    groups = [[*range(151, 269)], [101, 385, 386], [351, 352, 353], [402, 546], [339]]
    for label, group in enumerate([*groups, [449, 580, 660]]):
        torch.testing.assert_close(six[:, label], logits[:, group].mean(1), rtol=1e-4, atol=1e-4)


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


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def test_weights_that_would_run_a_program_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = np.empty(1, object)
    values[:] = [Evil()]
    np.savez("evil.npz", names=np.array(["logits/biases"]), values=values)
    save_weights("few.npz", {"logits/biases": np.zeros(1000, np.float32)})
    Path("text.npz").write_text("no archive")
    for name, message in (("evil", "system"), ("few", "277"), ("text", "zip"), ("none", "No such")):
        with pytest.raises(models.WeightsError, match=message) as caught:
            models.load_inception2(Path(f"{name}.npz"))
        assert "\n" not in str(caught.value)
    assert not Path("evil").exists()


def test_statistics_of_the_batch_where_they_are_asked_for(source, train, val):
    settings = replace(FAST, batch_statistics=True, batch_size=11)
    result = fine_tune(source, [1, 5], train, val, settings)
    assert not torch.equal(result.net[0][1].running_mean, source[0][1].running_mean)
    assert torch.equal(result.net[1][1].running_mean, source[1][1].running_mean)
    assert result.accuracy == flextune.accuracy(result.net, val, FAST)


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
    return {split: draw(300 if split == "pool" else 120, generator()) for split in sizes}


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Runs the command line in an empty folder, with short trainings and few images."""
    make_quick(monkeypatch)
    monkeypatch.chdir(tmp_path)
    return lambda command: run_all.main(f"--device cpu {command}".split())


def make_quick(monkeypatch):
    for pair, family in run_all.SCENARIOS.items():
        short = replace(
            family,
            pretraining=replace(family.pretraining, max_epochs=1),
            tuning=replace(family.tuning, max_epochs=2, check_every=1),
            built_in={"tuning": Settings(max_epochs=2, check_every=1)},
        )
        monkeypatch.setitem(run_all.SCENARIOS, pair, short)
    monkeypatch.setattr(shifts, "_builtin", few_images)
    monkeypatch.setattr(shifts, "fetch", no_network)


def no_network(url, path, md5=None, report=None):
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
    return [json.loads(line) for line in Path("results/results.jsonl").read_text().splitlines()]


def test_every_method_from_start_to_finish(quick, capsys):
    quick("--target mnist-m --ratio 3 --runs 2 --seed 7 --data builtin")
    out, err = capsys.readouterr()
    assert (
        "mnist: 4-layer network, " in out and "mnist -> mnist-m, ratio 3: 30 training images" in out
    )
    assert "BUILT-IN DATA" in out and "paper  " not in out
    table = {line.split()[0].rstrip("*!"): line for line in out.splitlines() if "  " in line}
    assert table.keys() >= {*run_all.METHODS, "unit", "1", "2", "3", "4", "all"}
    assert "4 fc2" in table["ft-fc-1"] and "3 fc1, 4 fc2" in table["ft-fc-2"]
    assert table["source"].count("\u00b1") == 2  # mean and standard deviation
    assert "[16/16] mnist-m, ratio 3, seed 8: " in err and "\r" not in err  # plain on a pipe
    rows = results()
    assert [(row["seed"], row["method"]) for row in rows] == [
        (seed, method) for seed in (7, 8) for method in run_all.METHODS
    ]
    assert {row["data"] for row in rows} == {"built-in"}
    by = {row["method"]: row for row in rows[:8]}
    assert by["ft-all"]["history"] != rows[8 + 4]["history"]  # another draw of the images
    assert by["flex"]["candidates"].keys() == {"1", "2", "3", "4", "all"}
    assert by["flex"]["val"] == max(one["val"] for one in by["flex"]["candidates"].values())
    assert by["flex"]["candidates"]["all"]["test"] == by["ft-all"]["test"]
    assert by["fast-flex"]["proxies"].keys() == {"1", "2", "3", "4"}
    assert by["source"]["val"] == by["flex"]["history"][0][1]


def test_benchmark(quick, capsys):
    command = "--benchmark --bfloat16 --source mnist --target blurry --ratio 3 --data builtin"
    quick(command + " --runs 1")
    out, _ = capsys.readouterr()
    assert "mnist -> blurry, ratio 3, built-in data: 30 training and 120 validation images" in out
    head, *lines = out[out.index("flex  ") :].splitlines()[:4]
    columns = [name.strip() for name in re.split("  +", head)]
    rows = [dict(zip(columns, re.split("  +", line))) for line in lines]
    assert [row["flex"] for row in rows] == ["literal", "ours", "ours, bfloat16"]
    assert len({row["chosen"] for row in rows[:2]}) == 1
    literal, ours, reduced = (float(row["GFLOP"]) for row in rows)
    assert literal > ours == reduced > 0
    assert rows[1]["accuracies differ by"] == "0.0000" and results() == []


SMALL_RATIOS = [
    (pair, ratio)
    for pair, family in run_all.SCENARIOS.items()
    for ratio in range(1, len(family.ratios) + 1)
]


def test_there_are_72_scenarios():
    assert len(SMALL_RATIOS) == 72


@pytest.mark.parametrize("pair", run_all.SCENARIOS, ids=" to ".join)
def test_every_scenario_runs(quick, pair):
    """As many ratios as the paper has, smaller ones; the larger networks with cheap methods."""
    ratios = [str(ratio) for other, ratio in SMALL_RATIOS if other == pair]
    source, target = pair
    methods = "--methods source ft-fc-1" * (source != "mnist")
    command = f"--source {source} --target {target} --ratio {' '.join(ratios)} --runs 1"
    quick(f"{command} --data builtin {methods}")
    assert len(results()) == len(ratios) * (2 if methods else 8)


def test_the_figures_of_the_paper():
    for scenario, figure in {
        ("mnist", "occluded", 30, "ft-fc-1"): 0.785,
        ("cifar", "quickdraw", 20, "ft-fc-2"): 0.525,
        ("quickdraw", "blurry", 20, "ft-ss"): 0.707,
        ("ilsvrc", "rotation", 12, "fast-flex"): 0.832,
        ("ilsvrc", "sketch", 20, "ft-all"): 0.542,
        ("ilsvrc", "hsv", 25, "source"): 0.384,
        ("ilsvrc", "yuv", 12, "ft-fc-2"): None,
        ("cifar", "blurry", 2, "flex"): None,
    }.items():
        assert run_all.paper(*scenario) == figure, scenario


def test_every_method_on_inception2(quick, capsys):
    quick("--target sketch --ratio 1 --runs 1 --data builtin --methods flex ft-ss")
    assert "13 logits, scales" in capsys.readouterr().out
    assert results()[1]["candidates"].keys() == {*map(str, range(1, 14)), "all"}


def row(method, seed, val, source=0.5, **more):
    """A result row of an imaginary run."""
    scenario = {"source": "mnist", "target": "blurry", "ratio": 30, "images": 300, "data": "real"}
    result = {"method": method, "seed": seed, "val": val, "test": val, "history": [(0, source)]}
    other = {
        "units": [1],
        "epochs": 10,
        "seconds": 1.0,
        "diverged": False,
        "settings": {"top_k": 1},
    }
    return scenario | result | other | more


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
    assert "0.500 \u00b1 0.141  0.500 \u00b1 0.141  0.921" in table["ft-all*"]
    assert "0.928" in table["ft-ss!"] and "4 fc2, scales" in table["ft-ss!"]
    assert "* worse on the validation set than the source network, in a run or more" in lines
    assert "! diverged, in a run or more: its network is from before that" in lines
    assert "0.900 ###########. (1)" in table["1 conv1"]  # tuned in one of the two runs
    assert table["1 conv1"].endswith("faster-flex (1 of 2)")
    assert table["all"].split() == ["all", "-", "-", "-"]  # one epoch of all is not ft-all
    assert "proxy (faster-flex)" in table["unit"] and "proxy (fast-flex)" not in table["unit"]


def flex_row(seed, tests, chosen, **more):
    """A result row of flex: test (and validation) accuracies of the candidates."""
    ones = {u: {"val": a, "test": a, "epochs": 10, "seconds": 2.0} for u, a in tests.items()}
    ones["all"] |= {"epochs": 20, "seconds": 8.0}
    figures = {"epochs": 60, "seconds": 16.0, "candidates": ones, "chosen": chosen, "best": chosen}
    return row("flex", seed, tests[chosen], **figures | more)


def others(accuracies, **more):
    """Result rows of all methods but flex."""
    return [row(method, 0, a, **more) for method, a in accuracies.items()]


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
    table = {line.split()[0]: line.split()[-4:] for line in lines if " c_" in line}
    assert table["flex"] == ["16.0", "16.0", "60.0", "0.267"]  # 4 * 10 * 0.2 + 20 * 0.4
    assert table["ft-fc-1"] == ["2.0", "3.0", "5.0", "0.600"]
    assert "fast-flex" not in table
    # The mean of the scenarios, of each the mean of its runs.
    more = [row | {"ratio": 3, "seed": seed, "epochs": 45} for row in rows for seed in (1, 2, 3)]
    lines = printed(capsys, run_all.print_table_1, rows + more)
    assert "Table 1, mnist, 4-layer network, mean of 2 scenarios" in lines
    table = {line.split()[0]: line.split()[-4:] for line in lines if " c_" in line}
    assert table["ft-fc-1"] == ["2.0", "3.0", "25.0", "0.120"]
    assert printed(capsys, run_all.print_table_1, rows[1:])[-1] == "needs the results of flex"


def test_table_3_has_the_papers_figures_stars_and_differences(capsys):
    rows = [flex_row(0, TESTS, "2"), flex_row(1, TESTS | {"2": 0.934}, "2"), *others(ACCURACIES)]
    lines = printed(capsys, run_all.print_table_3, rows)
    ours, spread, theirs, gap = (
        next(line for line in lines if line.startswith(start)) for start in ("bl", "de", "pa", "di")
    )
    # 0.9119 is no better than 0.912, in three decimals.
    figures = "blurry, 30 2 0.751 0.932* 0.912 0.930* 0.900 0.900 0.900 0.912"
    assert ours.split() == figures.split()
    assert spread.split() == ["deviation", "0.003"]  # of flex alone are there two runs
    figures = "paper 0.748 0.926 0.926 0.926 0.921 0.928 0.928 0.921"
    assert theirs.split() == figures.split()
    gaps = "difference +0.003 +0.006 -0.014 +0.004 -0.021 -0.028 -0.028 -0.009"
    assert gap.split() == gaps.split()
    for other in ({"ratio": 300}, {"data": "built-in"}):
        changed = [row | other for row in rows]
        lines = printed(capsys, run_all.print_table_3, changed)
        assert not any(line.startswith(("paper", "difference")) for line in lines)
    partly = [row for row in rows if row["method"] != "ft-ss"]  # not all baselines, no stars
    assert "*" not in printed(capsys, run_all.print_table_3, partly)[4]
    # The paper's own stars: all three methods on HSV, whose Inception2 has no ft-fc-2.
    hsv = {"source": "ilsvrc", "target": "hsv", "ratio": 12}
    lines = printed(capsys, run_all.print_table_3, [row | hsv for row in rows])
    figures = "paper 0.384 0.856* 0.856* 0.856* 0.533 0.646 0.687"
    assert next(line for line in lines if line.startswith("paper")).split() == figures.split()


def test_the_tally_counts_ties_for_each(capsys):
    rows = [flex_row(0, TESTS, "2"), *others(ACCURACIES)]
    best = [row | {"ratio": 300} for row in rows]
    best[1:] = others(dict.fromkeys(ACCURACIES, 0.95), ratio=300)
    unfinished = [row | {"ratio": 3} for row in rows[:-1]]
    built_in = [row | {"data": "built-in"} for row in rows]
    lines = printed(capsys, run_all.print_tally, rows + best + unfinished + built_in)
    title = "Best in how many of {} scenarios, ties counting for each"
    assert lines == [
        "",
        title.format(2),
        "real data",
        "flex 1, fast-flex 1, faster-flex 2, ft-fc-1 1, ft-fc-2 1, ft-ss 1, ft-all 1",
        "the paper, of 72: flex 60, fast-flex 41, ft-all 26",
        "",
        title.format(1),
        run_all.BUILT_IN,
        "flex 1, fast-flex 0, faster-flex 1, ft-fc-1 0, ft-fc-2 0, ft-ss 0, ft-all 0",
    ]


def test_figure_2_sums_the_ranks_over_the_ratios(capsys):
    small = {"1": 0.8, "2": 0.5, "3": 0.8, "4": 0.7, "all": 0.9}
    choice = {"val": 0.9, "chosen": "all", "best": "3"}
    rows = [
        flex_row(0, TESTS, "2"),
        flex_row(0, small, "all", ratio=3),
        row("fast-flex", 0, ratio=3, **choice),
    ]
    ((panel, targets),) = run_all.shades_and_picks(run_all.grouped(rows)).items()
    assert panel == ("mnist", "4-layer", "real")
    shades, picks = targets["blurry"]
    # Below each: 1 + 2, 3 + 0, 2 + 2, 0 + 1 units.
    assert shades == pytest.approx([3 / 4, 3 / 4, 1, 1 / 4])
    assert picks == {"flex": {1, 4}, "fast-flex": {2}, "faster-flex": set()}
    lines = printed(capsys, run_all.print_figure_2, rows)
    assert "blurry  +++  +++F  ###f  ...  F" in lines


def test_certainty_is_printed_with_the_choice(capsys):
    sure = {"runner_up": "all", "lead": 0.018, "error": 0.004, "bound": 0.023}

    def shown(rows):
        for scenario, methods in run_all.grouped(rows).items():
            run_all.print_scenario(scenario, methods)
        return capsys.readouterr().out

    rows = [flex_row(0, TESTS, "2", certainty=sure)]
    out = shown(rows)
    assert "flex: 2 conv2 leads all by 0.018 \u00b1 0.004 (validation, paired" in out
    assert "With probability 95%, each candidate's expected accuracy is within 0.023" in out
    rows.append(flex_row(1, TESTS, "2", certainty=sure | {"lead": 0.020}))
    rows.append(flex_row(2, TESTS, "3", certainty=sure | {"runner_up": "4"}))
    out = shown(rows)
    assert "flex: 2 conv2 leads all by 0.019 \u00b1 0.004 in 2 of 3 runs" in out
    assert "flex: 3 fc1 leads 4 fc2 by 0.018 \u00b1 0.004 in 1 of 3 runs" in out


def test_retrieval_for_pacs_is_in_all_of_ilsvrc_by_the_classes_of_the_head(monkeypatch, tmp_path):
    y = torch.tensor([0, 151, 268, 386, 402, 339, 660, 999])
    asked = []

    def load(*args):
        asked.append(args[:3])
        return {"val": (torch.arange(8), y)}

    monkeypatch.setattr(shifts, "load", load)
    pacs, ilsvrc = (run_all.SCENARIOS["ilsvrc", target] for target in ("sketch", "yuv"))
    x, labels = run_all.source_gallery(pacs, tmp_path)
    assert asked == [("ilsvrc", None, tmp_path)] and len(x) == 8
    assert labels.tolist() == [-1, 0, 0, 1, 3, 4, 5, -1]
    assert torch.equal(run_all.source_gallery(ilsvrc, tmp_path)[1], y)
    assert torch.equal(run_all.source_gallery(pacs, None)[1], y)
    run = run_all.Run(("ilsvrc", "sketch"), 2, tmp_path, FAST, ())
    assert not run_all.has_gallery(run)  # ILSVRC has to be put there
    assert run_all.has_gallery(replace(run, root=None))


def test_progress_tells_the_time_left(monkeypatch, capsys):
    clock = iter([0, 10, 30])
    monkeypatch.setattr(run_all.time, "perf_counter", lambda: next(clock))
    progress = run_all.Progress([1, 1, 1, 1])
    progress.step("one")
    progress.show("two", 0.5)
    assert capsys.readouterr().err.splitlines() == [
        "[1/4] one, about 30 s left",
        "[1/4] two, about 50 s left",
    ]
    assert [run_all.duration(s) for s in (45, 720, 12600)] == ["45 s", "12 min", "3.5 h"]


def test_results_are_appended_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "results.jsonl"
    run_all.append([row("flex", 0, 0.5)], tmp_path)
    before = path.read_bytes()

    class Full(io.FileIO):
        def write(self, text):
            return super().write(text[: len(text) // 2])

    monkeypatch.setattr("builtins.open", lambda path, mode, buffering: Full(path, mode))
    with pytest.raises(OSError, match="no space left"):
        run_all.append([row("flex", 1, 0.5), row("flex", 2, 0.5)], tmp_path)
    assert path.read_bytes() == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_killed_writer_leaves_whole_rows(tmp_path):
    rng, written = random.Random(0), 0
    for _ in range(50):
        if (child := os.fork()) == 0:
            while True:
                written += 1
                run_all.append([row("flex", written, 0.5), row("ft-all", written, 0.4)], tmp_path)
        time.sleep(rng.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        rows = run_all.read(tmp_path).values()
        written = max((one["seed"] for one in rows), default=0)
        assert len(rows) == 2 * written  # none lost; what was cut was not there for anyone
        assert (tmp_path / "results.jsonl").read_bytes().count(b'"flex"') >= written
    assert written >= 10


def test_what_another_sweep_has_written_is_not_written_again(tmp_path):
    rows = [row("flex", seed, 0.5) for seed in range(3)]
    run_all.append(rows[:2], tmp_path)
    run_all.append(rows, tmp_path)
    run_all.append([rows[0] | {"retrieval": 0.3}], tmp_path)  # there is more of this one
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["seed"] for line in lines] == [0, 1, 2, 0]


def test_steps_of_unequal_cost(monkeypatch, capsys):
    clock = iter([0, 10])
    monkeypatch.setattr(run_all.time, "perf_counter", lambda: next(clock))
    run_all.Progress([1, 3]).step("one")
    assert capsys.readouterr().err == "[1/2] one, about 30 s left\n"


SWEEP = "--source mnist --target blurry svhn --ratio 3 5 --runs 2 --data builtin"


def test_what_has_a_result_is_not_run_again(quick, capsys, monkeypatch):
    quick(f"{SWEEP} --methods source ft-fc-1 --table 3")
    first = capsys.readouterr().out
    path = Path("results/results.jsonl")
    content = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(run_all, "execute", lambda *_: pytest.fail("runs"))
        patch.setattr(shifts, "load", lambda *_: pytest.fail("loads"))
        quick(f"{SWEEP} --methods source ft-fc-1 --table 3")
    again = capsys.readouterr().out
    assert again.startswith("8 of 8 runs have their results in results already")
    assert again[again.index("\nmnist -> ") :] == first[first.index("\nmnist -> ") :]
    assert path.read_bytes() == content
    lines = content.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:10]) + lines[10][:99])  # cut in the middle of a line
    quick(f"{SWEEP} --methods source ft-fc-1 --table 3")
    out, err = capsys.readouterr()
    assert err.count("not a result of this version, passed over: 1 line, the first is 11\n") == 1
    assert "5 of 8 runs have" in out
    assert (
        out[out.index("\nmnist -> blurry") :].splitlines()[:9:3]
        == (first[first.index("\nmnist -> blurry") :].splitlines()[:9:3])
    )
    assert len(run_all.read(Path("results"))) == 16
    quick(f"{SWEEP} --methods source ft-fc-1 --max-epochs 1")  # other settings, other results
    assert len(run_all.read(Path("results"))) == 32


def test_image_to_image_retrieval_and_figures(quick, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    command = "--source mnist --target blurry transform-fixed --ratio 3 --runs 1 --data builtin"
    quick(f"{command} --methods ft-all flex")
    assert "retrieval" not in results()[0]
    capsys.readouterr()
    command += " --methods ft-all flex --image-to-image --table 3 4 --figures new/figures"
    quick(command)
    out = capsys.readouterr().out
    assert "0 image-to-image" in out and "mnist -> blurry, 3, UNet" in out
    rows = run_all.read(Path("results")).values()
    assert {row["method"] for row in rows if "retrieval" in row} == {"ft-all", "flex"}
    for row in rows:
        if row["method"] == "flex-i2i":
            assert row["candidates"].keys() == {"1", "2", "3", "4", "all", "0"}
    drawn = {"figure-2.png", "figure-3.png"}
    drawn |= {f"figure-1-mnist-{target}-built-in.png" for target in ("blurry", "transform-fixed")}
    assert {path.name for path in Path("new/figures").iterdir()} == drawn
    shutil.rmtree("new")
    monkeypatch.setattr(run_all, "execute", lambda *_: pytest.fail("runs"))
    monkeypatch.setattr(shifts, "load", lambda *_: pytest.fail("loads"))
    quick(command)  # from the results alone
    for path in Path("new/figures").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
    assert len(list(Path("new/figures").iterdir())) == 4


def test_image_pairs_can_be_drawn_again():
    x = torch.randint(0, 256, (3, 3, 28, 28), dtype=torch.uint8, generator=generator())
    pairs = run_all.image_pairs(models.UNet(), x)
    pixels = np.frombuffer(zlib.decompress(base64.b64decode(pairs["zlib"])), np.uint8)
    pixels = torch.tensor(pixels).view(pairs["shape"])  # (3, 2, 28, 28, 3)
    assert torch.equal(pixels[:, 0].permute(0, 3, 1, 2), x)
    assert torch.equal(pixels[:, 0], pixels[:, 1])  # the identity, at first


DRIVER = """
import sys
sys.path.insert(0, {here!r})
import test_flextune
with test_flextune.pytest.MonkeyPatch.context() as patch:
    test_flextune.make_quick(patch)
    test_flextune.run_all.main(sys.argv[1:])
"""


def test_two_ranks_and_a_killed_sweep_end_with_the_same_table(tmp_path, monkeypatch):
    (tmp_path / "driver.py").write_text(DRIVER.format(here=str(HERE)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    methods = "--methods source ft-fc-1 flex --device cpu --table 3"
    options = f"driver.py {SWEEP} {methods} --out".split()
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

    def start(out, *before):
        command = [sys.executable, *before, *options, out]
        return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)

    def table(process):
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        lines = out[out.index("\nTable 3") :].splitlines()
        return [line for line in lines if "results" not in line]

    expected = table(start("one"))
    assert len(expected) == 3 + 1 + 4 * 2 + 1 + (3 + 1 + 2 + 2) + 1  # with Figure 2
    assert table(start("two", *ranks)) == expected
    files = {
        path.name: path.read_text().splitlines() for path in (tmp_path / "two").glob("*.jsonl")
    }
    assert files.keys() == {"results.jsonl", "results-1.jsonl"}
    assert sum(map(len, files.values())) == 8 * 3
    rng = random.Random(0)
    for _ in range(int(os.environ.get("KILLS", "2"))):  # at random moments
        killed, rows = start("three"), len(run_all.read(tmp_path / "three"))
        time.sleep(rng.uniform(2, 5))
        killed.kill()
        killed.communicate()
        assert len(run_all.read(tmp_path / "three")) >= rows
    at_once = start("three"), start("three")  # two sweeps in a folder
    assert [table(process) for process in at_once] == [expected, expected]
    lines = (tmp_path / "three" / "results.jsonl").read_text().splitlines()
    assert len([line for line in lines if line.endswith("}")]) == 8 * 3  # none lost, none twice


def test_rows_of_the_same_result_complete_each_other(tmp_path, capsys):
    for name, more in (
        ("results", {}),
        ("results-1", {"retrieval": 0.5}),
        ("results-old", {"x": 1}),
    ):
        whole = row("flex", 0, 0.9, **more)
        other = json.dumps(whole | {"val": 0.8, "crc": run_all.crc(whole)})  # changed by hand
        text = json.dumps(whole | {"crc": run_all.crc(whole)})
        old = json.dumps(whole)  # of an older version
        (tmp_path / f"{name}.jsonl").write_text(f"{text}\n{other}\n\n{old}\n[]\n{'[' * 9999}\n")
    (read,) = run_all.read(tmp_path).values()
    assert read["retrieval"] == 0.5 and "x" not in read
    assert read["val"] == 0.9
    run_all.read(tmp_path)
    err = capsys.readouterr().err
    assert err.count("of this version, passed over: 4 lines, the first is 2\n") == 2  # once a file


def test_each_network_is_trained_once_and_charged_to_each_method(quick, monkeypatch):
    quick("--source mnist --target blurry --ratio 3 --runs 1 --data builtin --methods source")
    trained = []

    def counted(net, units, *rest):
        trained.append(units)
        return fine_tune(net, units, *rest)

    monkeypatch.setattr(flextune, "fine_tune", counted)
    quick("--source mnist --target blurry --ratio 3 --runs 1 --data builtin")
    assert sorted(map(str, trained)) == ["1", "2", "3", "[3, 4]", "[4]", "all", "all", "all"]
    by = {row["method"]: row for row in results()[1:]}
    candidates = by["flex"]["candidates"]
    assert by["flex"]["epochs"] == sum(one["epochs"] for one in candidates.values())
    assert by["ft-all"]["epochs"] == candidates["all"]["epochs"]


def test_the_saved_network_has_the_reported_accuracy(quick, capsys):
    quick(
        "--source mnist --target blurry --ratio 3 --runs 1 --data builtin --methods flex source --save new/net.pt"
    )
    net = models.mnist_net()
    net.load_state_dict(torch.load("new/net.pt", weights_only=True))
    test = shifts.load("mnist", "blurry", None)["test"]
    by = {row["method"]: row["test"] for row in results()}
    assert flextune.accuracy(net, test) == by["flex"] != by["source"]
    assert "the network of flex is in new/net.pt" in capsys.readouterr().out


def test_the_source_network_is_kept_and_a_broken_one_replaced(quick, capsys, monkeypatch):
    command = "--source mnist --target blurry --ratio 3 --runs 1 --data builtin --methods source"
    kept = Path("results/source-mnist-builtin.pt")
    quick(command)
    content = kept.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(flextune, "fine_tune", lambda *_: pytest.fail("trains"))
        quick(f"{command} --seed 1")
    middle = len(content) // 2
    flipped = bytes([content[middle] ^ 1])
    for seed, rest in ((2, b""), (3, flipped + content[middle + 1 :])):
        kept.write_bytes(content[:middle] + rest)
        quick(f"{command} --seed {seed}")
        assert "cannot be read: the source network is trained anew" in capsys.readouterr().err
    first, *others = (row["test"] for row in results())
    assert others == [first, first, first]
    family = run_all.SCENARIOS["mnist", "blurry"]
    longer = replace(family, pretraining=Settings(max_epochs=2))
    monkeypatch.setitem(run_all.SCENARIOS, ("mnist", "blurry"), longer)
    quick(f"{command} --seed 4")  # other settings, another network
    assert results()[-1]["test"] != first


def test_without_data_and_network_the_built_in_digits_are_announced(quick, capsys):
    quick("--source mnist --target blurry --ratio 3 --runs 1 --methods source")
    out = capsys.readouterr().out
    assert "train-images-idx3-ubyte.gz is missing" in out and "***" in out
    assert out.count("BUILT-IN DATA") == 2
    assert "paper" not in out.replace("the paper's", "")


def test_with_data_named_what_is_missing_is_an_error(quick, capsys):
    Path("there").mkdir()
    line = fails(capsys, lambda: quick("--source mnist --target blurry --ratio 3 --data there"))
    assert re.search(r"error: there/mnist/train-images.*is missing, and downloading", line)


def test_real_data_are_shown_beside_the_paper(quick, capsys, mnist):
    quick(
        f"--source mnist --target blurry --ratio 3 30 --runs 1 --methods source ft-all --data {mnist}"
    )
    out = capsys.readouterr().out
    assert "BUILT-IN" not in out and out.count("real data") == 2
    lines = [line.split() for line in out.splitlines() if line.startswith(("source ", "ft-all"))]
    assert [line[4:-2] for line in lines] == [["0.748"], ["not", "published"], ["0.748"], ["0.921"]]
    assert fails(
        capsys, lambda: quick(f"--source mnist --target blurry --ratio 31 --data {mnist}")
    ).endswith("30")


def test_list_shows_every_scenario_and_its_data(quick, capsys, mnist):
    quick(f"--list --data {mnist}")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 20 + 1
    assert re.search("mnist +4-layer +blurry +3 30 300 3000 +top-1 +mnist there", lines[1])
    assert any(line.endswith("mnist there, bsds500 missing") for line in lines)
    quick("--list --data builtin")
    assert capsys.readouterr().out.count("built-in images there") == 20


@pytest.mark.parametrize(
    "command, message",
    [
        ("--target sketchy", "unknown target sketchy: choose from blurry, occluded"),
        ("--source cifar --target sketch", "unknown target sketch of source cifar: choose from"),
        ("--source mnist --target blurry --ratio 0", "must be a whole number from 1, not 0"),
        ("--source mnist --target blurry --ratio 2.5", "must be a whole number from 1, not 2.5"),
        ("--source mnist --target blurry --runs -1", "must be a whole number from 1, not -1"),
        ("--source mnist --target blurry --data there", "there is no folder there"),
        ("--source imagenet", "argument --source: invalid choice"),
        ("--methods magic", "argument --methods: invalid choice"),
        ("--device toaster", "argument --device: toaster is neither cpu nor cuda"),
        ("--device cpu:x", "argument --device: cpu:x: "),
        ("--source mnist --target blurry --ratio 31 --data builtin", "that 300 images"),
        ("--source mnist --ratio 3 4000", "--ratio: the largest of mnist -> blurry is 3000"),
        ("--ratio 30 --data builtin", "--ratio: the largest of ilsvrc -> yuv is 25"),
        ("--source mnist --target blurry --ratio 3 --save x", "--save keeps one network"),
        ("--source mnist --target blurry --ratio 30 --save .", "a file, and . is none"),
        ("--source mnist --target blurry --ratio 30 --save /dev/null", "/dev/null is none"),
        ("--source mnist --target blurry --ratio 30 --save /dev/null/x", "/dev/null"),
        ("--source mnist --target blurry --ratio 30 --out /dev/null/x", "/dev/null"),
        ("--source mnist --target blurry --ratio 3 --runs 1 --save results/x", "not in results"),
        ("--table 2", "argument --table: invalid choice: 2"),
        ("--nonsense", "unrecognized arguments: --nonsense"),
        ("--seed -1", "argument --seed: must be a whole number from 0, not -1"),
        ("--runs 0", "argument --runs: must be a whole number from 1, not 0"),
        (f"--runs {'9' * 30}", "argument --runs: must be a whole number from 1, not 999"),
        ("--cache-gib nan", "argument --cache-gib: must be a number from 0, not nan"),
    ],
)
def test_usage_errors_are_one_line(quick, capsys, command, message):
    assert message in fails(capsys, lambda: quick(command))


def test_a_folder_for_figures_that_cannot_be(quick, capsys):
    pytest.importorskip("matplotlib")
    command = "--source mnist --target blurry --data builtin --figures /dev/null/x"
    assert "--figures: no file can be written in /dev/null/x" in fails(
        capsys, lambda: quick(command)
    )


def test_an_empty_folder_name_is_no_default(quick, capsys):
    assert "there is no folder" in fails(capsys, lambda: run_all.main(["--data", ""]))


def test_a_target_of_several_sources_needs_the_source(quick, capsys):
    message = "target blurry needs --source: mnist or cifar or quickdraw"
    assert message in fails(capsys, lambda: quick("--target blurry"))
    quick("--target blurry --list")


def test_ctrl_c_ends_with_130(quick, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_all, "execute", interrupted)
    command = "--source mnist --target blurry --ratio 3 --data builtin --methods flex"
    with pytest.raises(SystemExit) as caught:
        quick(command)
    assert caught.value.code == 130
    assert capsys.readouterr().err.endswith("interrupted; finished runs are in results\n")


# ---------------------------------------------------------------- broken files

MUTANTS = int(os.environ.get("MUTANTS", "2000"))  # broken files for each reader
MEMORY = 1 << 30  # bytes that no reader needs for a small broken file


def mutants(content):
    """The file cut, lengthened, with bits flipped, and with parts erased, copied or replaced."""
    rng = random.Random(len(content))
    for _ in range(MUTANTS):
        broken = bytearray(content)
        for _ in range(rng.choice((1, 1, 1, 2, 8))):
            start = rng.choice((rng.randrange(len(broken) + 1), rng.randrange(64)))
            end = start + rng.choice((1, 2, 4, 8, rng.randrange(len(broken) + 1)))
            some = rng.choice(
                (rng.randbytes(4), b"\0" * 4, b"\xff" * 4, b"", broken[start:end] * 2)
            )
            bit = bytes([broken[start % len(broken)] ^ 1 << rng.randrange(8)])
            change = rng.randrange(3)
            if change == 0:
                del broken[start:]
            elif change == 1:
                broken[start : start + 1] = bit
            else:
                broken[start:end] = some
            broken = broken or bytearray(1)
        yield bytes(broken)


def check_mutants(path, content, read, sane, error=shifts.DataError):
    """What is read is sane, or there is the error (if any), in a line that names the file; soon,
    and in bounded memory."""
    path.write_bytes(content)
    assert sane(read(path))
    run_all.reset_peak_memory()
    before, right = run_all.peak_memory(), 0
    for broken in mutants(content):
        path.write_bytes(broken)
        start = time.perf_counter()
        try:
            result = read(path)
        except error as caught:
            assert str(path) in str(caught) and "\n" not in str(caught)
        else:
            assert sane(result)
            right += 1
        assert time.perf_counter() - start < 5
    assert right < MUTANTS or not error
    assert not run_all.peak_memory() - before > MEMORY


@pytest.mark.parametrize("name", ["idx", "idx.gz"])
def test_broken_idx_files(tmp_path, name):
    content = idx(ARRAY) if name == "idx" else gzip.compress(idx(ARRAY))
    check_mutants(tmp_path / name, content, shifts.read_idx, lambda x: x.dtype == torch.uint8)


def test_broken_cifar_files(tmp_path, monkeypatch):
    monkeypatch.setattr(shifts, "CIFAR_RECORDS", 4)

    def sane(data):
        return data[0].shape == (4, 3, 32, 32) and data[1].max() < 10

    check_mutants(tmp_path / "x.bin", records(4, 0).tobytes(), shifts.read_cifar, sane)


def test_broken_drawings(tmp_path):
    content = npy(np.random.default_rng(0).integers(0, 256, (9, 784), np.uint8))

    def sane(x):
        return x.dtype == np.uint8 and x.shape[1] == 784

    check_mutants(tmp_path / "x.npy", content, shifts.read_drawings, sane)


@pytest.mark.parametrize("compressed", [False, True])
def test_broken_matlab_files(tmp_path, compressed):
    arrays = {"X": ARRAY, "y": np.ones((2, 1), np.uint8)}

    def sane(found):
        return all(isinstance(array, np.ndarray) for array in found.values())

    check_mutants(tmp_path / "x.mat", mat(arrays, compressed), shifts.read_mat, sane)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_broken_images(tmp_path, kind):
    pytest.importorskip("PIL")
    content = photo_file((10, 200, 30), kind=kind)
    check_mutants(tmp_path / "x", content, shifts._decode, lambda image: image.mode == "RGB")


def test_broken_weights(tmp_path, monkeypatch):
    net = nn.Sequential(OrderedDict(logits=models._named(linear=nn.Linear(3, 2))))
    monkeypatch.setattr(models, "inception2", lambda: copy.deepcopy(net))
    weights = {"logits/weights": np.ones((3, 2), np.float32), "logits/biases": np.ones(2)}
    save_weights(tmp_path / "good.npz", weights)

    def sane(read):
        return all((weight == 1).all() for weight in read.parameters())

    content = (tmp_path / "good.npz").read_bytes()
    path = tmp_path / "x.npz"
    check_mutants(path, content, models.load_inception2, sane, models.WeightsError)


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_broken_archives(tmp_path, kind):
    members = {f"top/{number}.jpg": bytes(100) for number in range(3)}
    content, folder = tar(members), tmp_path / "to"
    if kind == "zip":
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, photo in members.items():
                archive.writestr(name, photo)
        content = file.getvalue()

    def read(path):
        shutil.rmtree(folder, ignore_errors=True)
        try:
            shifts._unpack(path, r"top/(\w+\.jpg)", folder, 3, str(path))
        except shifts.MissingError:
            assert not folder.exists()
            raise
        return folder

    check_mutants(tmp_path / "x", content, read, lambda to: len(list(to.iterdir())) == 3)
    assert {path.name for path in tmp_path.iterdir()} <= {"x", "to"}


def test_broken_source_networks(tmp_path):
    state = nn.Linear(3, 2).state_dict()
    file = io.BytesIO()
    md5 = run_all.digest("", *state, *state.values())
    torch.save({"made_of": "", "net": state, "md5": md5}, file)

    def sane(read):
        return read is None or same(read, state)

    read = partial(run_all.kept_network, made_of="")
    check_mutants(tmp_path / "x.pt", file.getvalue(), read, sane, error=())


def test_broken_results(tmp_path):
    rows = [row("flex", seed, 0.5) for seed in range(3)]
    run_all.append(rows, tmp_path)
    path, known = tmp_path / "results.jsonl", json.loads(json.dumps(rows))
    content = path.read_bytes()

    def read(path):
        return list(run_all.read(tmp_path).values())

    check_mutants(path, content, read, lambda found: all(row in known for row in found), error=())


class Vast:
    def __reduce__(self):
        return np.ndarray, ((1 << 36,), np.dtype("u1"))  # allocated, not yet written to


class Pointer:
    def __reduce__(self):
        return np.ndarray, ((1,), np.dtype("O"), b"AAAAAAAA")  # bytes as the address of an object


def png(side):
    """A black PNG file of one bit a pixel."""

    def chunk(kind, data):
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(side * (side // 8 + 1)), 1)
    parts = {b"IHDR": header, b"IDAT": pixels, b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts.items())


def pax_bomb(size):
    """A tar.gz file with a header of that size."""
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, size
    return gzip.compress(header.tobuf() + bytes(size), 1)


def zip_bomb(kind, name="a/0.jpg", size=1 << 28):
    """A zip file whose member is said to be small."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", kind) as archive:
        archive.writestr(name, bytes(size))
    return file.getvalue().replace(struct.pack("<I", size), struct.pack("<I", 100))


BOMBS = [
    *("x.gz", "x.mat", "vast.npz", "pointer.npz", "deflated.npz", "bz2.npz", "pax", "bz2.zip"),
    *("9600", "20000"),
]


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_cannot_fill_the_memory(tmp_path, name):
    zeros, path, read = bytes(1 << 28), tmp_path / name, shifts._decode
    if name == "x.gz":
        path.write_bytes(gzip.compress(b"\0\0\x08\3" + b"\xff" * 12 + zeros, 1))
        read = shifts.read_idx
    elif name == "x.mat":
        array = np.frombuffer(zeros, np.uint8)[: 3 << 26]
        packed = zlib.compress(mat({"X": array}, False)[128:], 1)
        element = struct.pack("<II", 15, len(packed)) + packed
        path.write_bytes(mat({}, False) + element * 8)
        read = shifts.read_mat
    elif name == "deflated.npz":
        np.savez_compressed(path, names=np.frombuffer(zeros, np.uint8), values=np.ones(1))
        read = models.load_inception2
    elif name == "bz2.npz":
        path.write_bytes(zip_bomb(zipfile.ZIP_BZIP2, "names.npy"))
        read = models.load_inception2
    elif name in ("pax", "bz2.zip"):
        path.write_bytes(pax_bomb(1 << 28) if name == "pax" else zip_bomb(zipfile.ZIP_BZIP2))

        def read(path):
            shifts._unpack(path, r"a/(\w+\.jpg)", tmp_path / "to", 1, str(path))

    elif name in ("vast.npz", "pointer.npz"):
        values = np.empty(1, object)
        values[:] = [Vast() if name == "vast.npz" else Pointer()]
        np.savez(path, names=np.array(["logits/biases"]), values=values)
        read = models.load_inception2
    else:
        pytest.importorskip("PIL")
        path.write_bytes(png(int(name)))
    assert path.stat().st_size < 1 << 24
    run_all.reset_peak_memory()
    before = run_all.peak_memory()
    with pytest.raises((shifts.DataError, models.WeightsError), match=str(path)):
        read(path)
    assert not run_all.peak_memory() - before > MEMORY


def test_no_member_of_an_archive_climbs_out_of_its_folder(tmp_path):
    good = {f"a/{number}.jpg": b"photo" for number in range(2)}
    file = io.BytesIO(gzip.decompress(tar(good | {"../b.jpg": b"", "/tmp/c.jpg": b""})))
    with tarfile.open(fileobj=file, mode="a") as archive:
        for name, kind in (("a/d.jpg", tarfile.SYMTYPE), ("a/e.jpg", tarfile.LNKTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "/etc/hostname"
            archive.addfile(link)
    (tmp_path / "x.tar").write_bytes(gzip.compress(file.getvalue()))
    shifts._unpack(tmp_path / "x.tar", r".*?(\w+\.jpg)", tmp_path / "to", 4, "url")
    assert sorted(path.name for path in (tmp_path / "to").iterdir()) == [
        *("0.jpg", "1.jpg", "b.jpg", "c.jpg")
    ]  # in the folder, if at all
    assert sorted(path.name for path in tmp_path.iterdir()) == ["to", "x.tar"]
    # Another process was faster: what it unpacked stays.
    (tmp_path / "to" / "0.jpg").write_text("its own")
    shifts._unpack(tmp_path / "x.tar", r"a/(\w+\.jpg)", tmp_path / "to", 2, "url")
    assert (tmp_path / "to" / "0.jpg").read_text() == "its own"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shifts, "LARGEST_MEMBER", 4)
        with pytest.raises(shifts.MissingError, match="0.jpg has 5 bytes|too large"):
            shifts._unpack(tmp_path / "x.tar", r"a/(\w+\.jpg)", tmp_path / "new", 2, "url")
    with pytest.raises(shifts.MissingError, match="one too many"):
        shifts._unpack(tmp_path / "x.tar", r"a/(\w+\.jpg)", tmp_path / "new", 1, "url")


def test_two_processes_may_download_the_same_file(tmp_path, server):
    pages, url = server
    body = bytes(range(256)) * 4000
    pages["/x"] = {}, body
    program = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import shifts
for n in range(20):
    shifts.fetch("{url}/x", shifts.Path("x"), {hashlib.md5(body).hexdigest()!r})
"""
    command = [sys.executable, "-c", program]
    both = [subprocess.Popen(command, cwd=tmp_path) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == body


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x")
    readers = [shifts.read_idx, shifts.read_cifar, shifts.read_drawings, shifts.read_mat]
    for read in (*readers, models.load_inception2):
        with pytest.raises((shifts.DataError, models.WeightsError), match="no file|No such file"):
            read(tmp_path / "x")


def test_images_that_would_be_clipped_are_refused(tmp_path):
    image = pytest.importorskip("PIL.Image")
    image.new("I;16", (30, 20), 1000).save(tmp_path / "x.png")
    with pytest.raises(shifts.DataError, match="mode I;16"):
        shifts._decode(tmp_path / "x.png")


def test_a_saved_network_that_unpacks_to_more_than_it_is_is_refused(tmp_path):
    state = {"made_of": "", "net": {"w": torch.zeros(100)}}
    state["md5"] = run_all.digest("", "w", state["net"]["w"])
    torch.save(state, tmp_path / "x.pt")
    assert run_all.kept_network(tmp_path / "x.pt", "").keys() == {"w"}
    with zipfile.ZipFile(tmp_path / "x.pt") as old:
        parts = {part.filename: old.read(part) for part in old.infolist()}
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in parts.items():
            new.writestr(name, content)
    assert run_all.kept_network(tmp_path / "x.pt", "") is None


def test_links_that_lead_nowhere(mnist):
    pytest.importorskip("PIL")
    (mnist / "bsds500").mkdir()
    (mnist / "bsds500" / "1.jpg").symlink_to("1.jpg")
    with pytest.raises(shifts.DataError, match="1.jpg cannot be read as an image"):
        shifts.load("mnist", "mnist-m", mnist)
    shutil.rmtree(mnist / "bsds500")
    (mnist / "bsds500").symlink_to("bsds500")
    assert not shifts.present("mnist", "mnist-m", mnist)["bsds500"]


def test_out_of_memory_names_the_budget(quick, capsys, monkeypatch, source, train, val):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nMore lines.")

    monkeypatch.setattr(flextune, "cross_entropy", full)
    with pytest.raises(MemoryError, match="lower Settings.cache_bytes"):
        fine_tune(source, 2, train, val, FAST)
    monkeypatch.setattr(flextune, "_correct", full)
    command = "--source mnist --target blurry --ratio 3 --data builtin --cache-gib 0.5"
    assert "try less than --cache-gib 0.5" in fails(capsys, lambda: quick(command))


@pytest.mark.parametrize("where", ["/dev/full", "a closed pipe"])
def test_where_nothing_can_be_printed(where):
    command = [sys.executable, HERE / "run_all.py", "--list", "--data", "builtin"]
    if not Path("/dev/full").is_char_device():
        pytest.skip("no /dev/full")
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe, open("/dev/full", "w") as full:
        out = {"stdout": full if where == "/dev/full" else pipe, "stderr": subprocess.PIPE}
        ended = subprocess.run(command, check=False, text=True, **out)
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1


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
        print(select(net, data, data, module.Settings(max_epochs=5)).chosen)
"""
    python = [sys.executable, "-I", "-c", program]
    out = subprocess.run(python, cwd=tmp_path, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert out.split() == (["2", "2", "2"] if name == "flextune.py" else [])


# ---------------------------------------------------------------- README


class Block(nn.Module):
    """A residual block as torchvision has it, in-place ReLUs included."""

    def __init__(self, width, out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(out), nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        shortcut = nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out)
        self.downsample = nn.Sequential(*shortcut) if stride > 1 else nn.Identity()

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += self.downsample(x)
        return self.relu(y)


class ResNet(nn.Module):
    """The parts of torchvision's ResNet-18, narrow, without its forward.

    No narrower than 8: with one thread, torch 2.13 crashes in the backward pass of a 1 x 1
    convolution of stride 2 with 4 input channels in channels-last.
    """

    def __init__(self, weights):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        for number, (width, out) in enumerate(((8, 8), (8, 16), (16, 16), (16, 16)), 1):
            blocks = Block(width, out, 1 if number == 1 else 2), Block(out, out, 1)
            setattr(self, f"layer{number}", nn.Sequential(*blocks))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 10)


class Normalize(nn.Module):
    """torchvision's, for what the example does with it."""

    def __init__(self, mean, deviation):
        super().__init__()
        self.mean, self.deviation = (torch.tensor(a)[:, None, None] for a in (mean, deviation))

    def forward(self, x):
        return (x - self.mean) / self.deviation


def test_the_example_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    torchvision = types.SimpleNamespace(
        models=types.SimpleNamespace(resnet18=ResNet),
        transforms=types.SimpleNamespace(Normalize=Normalize),
    )
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    Path("example.py").write_text(example)
    space = runpy.run_path("example.py")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 11 and lines[0].startswith("unit ")
    best = space["selection"].result
    space["net"].load_state_dict(torch.load("tuned.pt", weights_only=True))
    assert flextune.accuracy(space["net"], space["val"]) == best.accuracy


def test_continuous_integration_runs_the_second_command_of_the_readme():
    commands = re.findall(r"^    (pip install .*)", (HERE / "README.md").read_text(), re.MULTILINE)
    assert commands[1] == (HERE / ".ci/run").read_text().splitlines()[-1]


def test_every_promise_has_its_tests():
    promises = (HERE / "README.md").read_text().split("## What is promised")[1].split("\n## ")[0]
    rows = [line for line in promises.splitlines() if line.startswith("| ")][1:]
    assert all(name in globals() for row in rows for name in re.findall(r"`(\w+)`", row))
    assert all("`test_" in row for row in rows) and len(rows) > 10
