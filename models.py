"""The networks of the paper (section 5.1), and `split`, which makes units out of any model.

The networks are `nn.Sequential`s whose children are the units. They take float images
[N, channels, H, W] in [0, 1] and return logits [N, classes]. The two small networks are those of
the authors' code. Inception2 is TensorNets', as in the paper: BN-Inception (Ioffe & Szegedy, arXiv
1502.03167) with the weights of TF-slim.
"""

import contextlib
import copy
import hashlib
import math
from collections import OrderedDict
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.functional import affine_grid, grid_sample, pad
from torch.utils._pytree import tree_iter, tree_map, tree_map_only

# ---------------------------------------------------------------- the small networks


def mnist_net(channels: int = 1) -> nn.Sequential:
    """The 4-layer network for digits of 28 x 28 pixels: two convolutional and two linear units."""
    net = _named(
        conv1=_conv_relu_pool(channels, 32, kernel_size=5),
        conv2=_conv_relu_pool(32, 64, kernel_size=5),
        fc1=_hidden(64 * 7 * 7, 1024),
        fc2=nn.Linear(1024, 10),
    )
    return _glorot_start(net)


def cifar_net(channels: int = 3, width: float = 1.0) -> nn.Sequential:
    """The 7-layer network for objects of 32 x 32 pixels: five convolutional and two linear units.

    `width` scales the number of channels.
    """
    c1, c2, c3, c4, c5, hidden = (round(width * n) for n in (32, 64, 128, 256, 512, 1024))
    net = _named(
        conv1=nn.Sequential(nn.Conv2d(channels, c1, 3, padding=1), nn.ReLU()),
        conv2=_conv_relu_pool(c1, c2, kernel_size=3),
        conv3=_conv_relu_pool(c2, c3, kernel_size=3),
        conv4=_conv_relu_pool(c3, c4, kernel_size=3),
        conv5=_conv_relu_pool(c4, c5, kernel_size=3),
        fc1=_hidden(c5 * 2 * 2, hidden),
        fc2=nn.Linear(hidden, 9),
    )
    return _glorot_start(net)


def _conv_relu_pool(inputs: int, outputs: int, kernel_size: int) -> nn.Sequential:
    """A convolution with SAME padding, ReLU, and max pooling by 2.

    ReLU after the pooling gives what it gives before it, for a quarter of the work.
    """
    conv = nn.Conv2d(inputs, outputs, kernel_size, padding=kernel_size // 2)
    return nn.Sequential(conv, nn.MaxPool2d(2), nn.ReLU())


def _hidden(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(0.5))


def _named(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def _glorot_start(net: nn.Sequential) -> nn.Sequential:
    """Draw the weights from Glorot's uniform distribution, and set the biases to zero."""
    for weight in net.parameters():
        if weight.dim() > 1:
            nn.init.xavier_uniform_(weight)
        else:
            nn.init.zeros_(weight)
    return net


# ---------------------------------------------------------------- Inception2


class Branches(NamedTuple):
    """Output channels of the convolutions in an inception or reduction module."""

    conv1: int | None  # 1x1; None in a reduction module
    conv3: tuple[int, int]  # 1x1 that reduces, 3x3
    double: tuple[int, int, int]  # 1x1 that reduces, 3x3, 3x3
    projection: int | None  # 1x1 after a pooling; None in a reduction module


REDUCTION_MODULES = ("block3c", "block4e")  # they halve the size of the image
BRANCHES = {
    "block3a": Branches(64, (64, 64), (64, 96, 96), 32),
    "block3b": Branches(64, (64, 96), (64, 96, 96), 64),
    "block3c": Branches(None, (128, 160), (64, 96, 96), None),
    "block4a": Branches(224, (64, 96), (96, 128, 128), 128),
    "block4b": Branches(192, (96, 128), (96, 128, 128), 128),
    "block4c": Branches(160, (128, 160), (128, 160, 160), 96),
    "block4d": Branches(96, (128, 192), (160, 192, 192), 96),
    "block4e": Branches(None, (128, 192), (192, 256, 256), None),
    "block5a": Branches(352, (192, 320), (160, 224, 224), 128),
    "block5b": Branches(352, (192, 320), (192, 224, 224), 128),
}


def inception2(classes: int = 1000, width: float = 1.0) -> nn.Sequential:
    """Inception2, 13 units: block1, block2, 3a to 3c, 4a to 4e, 5a and 5b, logits.

    Images may be of any size; the paper's are 224 x 224. `width` scales the number of channels.
    The layers are named so that `load_inception2` finds TensorNets' weights for them.
    """

    def scaled(channels: int) -> int:
        return max(1, round(width * channels))

    units = OrderedDict()
    units["block1"] = _named(
        scale=ScaleToSigned(),
        pad=SamePad(7),
        depthwise=nn.Conv2d(3, 3 * scaled(8), 7, stride=2, groups=3, bias=False),
        pointwise=nn.Conv2d(3 * scaled(8), scaled(64), 1),
        relu=nn.ReLU(),
        pool=_halving_pool(),
    )
    block2 = {
        "1": _conv_bn_relu(scaled(64), scaled(64), 1),
        "2": _conv_bn_relu(scaled(64), scaled(192), 3),
        "pool": _halving_pool(),
    }
    units["block2"] = nn.Sequential(OrderedDict(block2))
    channels = scaled(192)
    for name, branches in BRANCHES.items():
        conv3 = [scaled(n) for n in branches.conv3]
        double = [scaled(n) for n in branches.double]
        if name in REDUCTION_MODULES:
            units[name] = _reduction_module(channels, conv3, double)
            channels += conv3[-1] + double[-1]
        else:
            conv1 = scaled(branches.conv1)
            projection = scaled(branches.projection)
            pool = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
            if name == "block5b":
                pool = nn.MaxPool2d(3, stride=1, padding=1)
            units[name] = _inception_module(channels, conv1, conv3, double, projection, pool)
            channels = conv1 + conv3[-1] + double[-1] + projection
    units["logits"] = _named(
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        dropout=nn.Dropout(0.2),
        linear=nn.Linear(channels, classes),
    )
    return nn.Sequential(units)


class ScaleToSigned(nn.Module):
    """Scale images from [0, 1] to [-1, 1], on which Inception2 was trained."""

    def forward(self, x):
        return x * 2 - 1


class SamePad(nn.Module):
    """TensorFlow's SAME padding before a layer of stride 2.

    Of an odd number of pixels, the additional one goes to the bottom and to the right.
    """

    def __init__(self, kernel_size: int, value: float = 0.0):
        super().__init__()
        self.kernel_size = kernel_size
        self.value = value

    def forward(self, x):
        padding = []  # left, right, top, bottom
        for size in (x.shape[3], x.shape[2]):
            total = self.kernel_size - 2 + size % 2
            padding += [total // 2, total - total // 2]
        return pad(x, padding, value=self.value)


class ConcatBranches(nn.ModuleDict):
    """Apply all branches to the same input and concatenate their output channels."""

    def forward(self, x):
        return torch.cat([branch(x) for branch in self.values()], dim=1)


def _inception_module(
    inputs: int, conv1: int, conv3: list[int], double: list[int], projection: int, pool: nn.Module
) -> ConcatBranches:
    return ConcatBranches(
        {
            "1x1": _conv_bn_relu(inputs, conv1, 1),
            "3x3": _conv_stack(inputs, conv3),
            "d3x3": _conv_stack(inputs, double),
            "proj": _conv_bn_relu(inputs, projection, 1, pool=pool),
        }
    )


def _reduction_module(inputs: int, conv3: list[int], double: list[int]) -> ConcatBranches:
    """An inception module that halves the size of the image."""
    return ConcatBranches(
        {
            "3x3": _conv_stack(inputs, conv3, stride=2),
            "d3x3": _conv_stack(inputs, double, stride=2),
            "pool": _halving_pool(),
        }
    )


def _conv_stack(inputs: int, widths: list[int], stride: int = 1) -> nn.Sequential:
    """A 1x1 convolution that reduces, then 3x3 convolutions, the last of them with the stride."""
    layers = OrderedDict()
    layers["r"] = _conv_bn_relu(inputs, widths[0], 1)
    last = len(widths) - 1
    for number in range(1, len(widths)):
        layer_stride = stride if number == last else 1
        layers[str(number)] = _conv_bn_relu(widths[number - 1], widths[number], 3, layer_stride)
    return nn.Sequential(layers)


def _conv_bn_relu(
    inputs: int, outputs: int, kernel_size: int, stride: int = 1, **before: nn.Module
) -> nn.Sequential:
    """A convolution with SAME padding, BatchNorm with a shift but without a scale, ReLU."""
    padding = kernel_size // 2
    if stride == 2:
        before["pad"] = SamePad(kernel_size)
        padding = 0
    bn = nn.BatchNorm2d(outputs, eps=1e-3)
    bn.register_parameter("weight", None)
    conv = nn.Conv2d(inputs, outputs, kernel_size, stride, padding, bias=False)
    return _named(**before, conv=conv, bn=bn, relu=nn.ReLU())


def _halving_pool() -> nn.Sequential:
    return nn.Sequential(SamePad(3, value=-math.inf), nn.MaxPool2d(3, stride=2))


PACS_ROWS = {  # class of PACS: its row in ILSVRC's last layer, counted from 0 (authors' code)
    "dog": 167,
    "elephant": 385,
    "giraffe": 354,
    "guitar": 402,
    "horse": 339,
    "house": 449,
}


def pacs_head(net: nn.Sequential) -> nn.Sequential:
    """A copy of `net` whose last layer keeps only the ILSVRC rows of the six PACS classes."""
    net = copy.deepcopy(net)
    linear_layers = [layer for layer in net.modules() if isinstance(layer, nn.Linear)]
    if not linear_layers or linear_layers[-1].out_features != 1000:
        raise ValueError("the last layer of the network must be a linear one of 1000 classes")
    last_layer = linear_layers[-1]
    rows = list(PACS_ROWS.values())
    for name, weight in list(last_layer.named_parameters()):
        setattr(last_layer, name, nn.Parameter(weight.detach()[rows]))
    last_layer.out_features = len(rows)
    return net


# ---------------------------------------------------------------- TensorNets' weights

TENSORNETS_MD5 = "0476b876a5d35a99e2747f98248d856d"  # of inception2.npz


class WeightsError(ValueError):
    """A file of weights that cannot be used; the message says in a line what is wrong."""


def load_inception2(path: Path, md5: str = TENSORNETS_MD5) -> nn.Sequential:
    """Inception2 with the weights of TensorNets' `inception2.npz`.

    The file is only opened if it has this MD5, because its arrays are pickled, and unpickling
    can run any program. Raises WeightsError if it is another file.
    """
    digest = None
    if path.is_file():
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, partial(hashlib.md5, usedforsecurity=False))
    if digest is None or digest.hexdigest() != md5:
        raise WeightsError(f"{path} must be TensorNets' file, of MD5 {md5}: delete any other")

    net = inception2()
    state = net.state_dict()
    with np.load(path, allow_pickle=True, encoding="latin1") as file:
        for name, array in zip(file["names"].astype(str), file["values"]):
            state[_torch_name(name)] = _torch_layout(name, array)
    net.load_state_dict(state)
    return net


def _torch_name(name: str) -> str:
    """The name in our state_dict of an array of TensorNets."""
    name = name.split(":")[0]  # TensorFlow ends the names of variables in ":0"
    for old, new in (
        ("block1/biases", "block1/pointwise_biases"),
        ("logits/", "logits/linear/"),
        ("wise_", "wise/"),
        ("weights", "weight"),
        ("biases", "bias"),
        ("beta", "bias"),
        ("moving_mean", "running_mean"),
        ("moving_variance", "running_var"),
        ("/", "."),
    ):
        name = name.replace(old, new)
    return name


def _torch_layout(name: str, array: np.ndarray) -> torch.Tensor:
    """An array of TensorNets with its dimensions in the order of PyTorch."""
    tensor = torch.from_numpy(array.astype(np.float32))
    if "depthwise" in name:  # (height, width, in, multiplier)
        return tensor.permute(2, 3, 0, 1).flatten(0, 1).unsqueeze(1)
    if tensor.dim() == 4:  # convolution: (height, width, in, out)
        return tensor.permute(3, 2, 0, 1)
    if tensor.dim() == 2:  # linear: (in, out)
        return tensor.T
    return tensor


# ---------------------------------------------------------------- image-to-image (section 5.4)
#
# Units to put in front of a network. They map images [N, channels, H, W] to images of the same
# shape. Each starts as the identity, so that the network starts as what it was. The paper says what
# kinds of units it uses; all else is our choice. (In the authors' code the U-Net is deeper and has
# instance norm, the affine map has one angle, two scales and two moves, and the unit for colors
# ends in a sigmoid.)


class Pixelwise(nn.Module):
    """Add to each pixel the output of two 1x1 convolutions: a map of colors."""

    def __init__(self, channels: int, width: int = 32):
        super().__init__()
        self.change = nn.Sequential(
            nn.Conv2d(channels, width, 1),
            nn.ReLU(),
            _zero_start(nn.Conv2d(width, channels, 1)),
        )

    def forward(self, x):
        return x + self.change(x)


class SpatialTransformer(nn.Module):
    """Transform each image by an affine map (Jaderberg et al., NIPS 2015).

    A small network finds the map; it sees the image at 28 x 28 pixels. Pixels are interpolated
    bilinearly, and black outside of the image.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.locate = nn.Sequential(
            nn.AdaptiveAvgPool2d(28),
            nn.Conv2d(channels, 16, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 7 * 7, 64),
            nn.ReLU(),
            _zero_start(nn.Linear(64, 6)),
        )
        self.register_buffer("identity", torch.eye(2, 3))

    def forward(self, x):
        theta = self.identity + self.locate(x).view(-1, 2, 3)  # (N, 2, 3)
        grid = affine_grid(theta, x.shape, align_corners=False)  # (N, H, W, 2)
        return grid_sample(x, grid, align_corners=False)


class UNet(nn.Module):
    """Add to the image the output of a small Pix2Pix U-Net without norms (Isola et al., CVPR 2017).

    H and W must be multiples of 4.
    """

    def __init__(self, channels: int, width: int = 32):
        super().__init__()
        down = partial(nn.Conv2d, kernel_size=4, stride=2, padding=1)
        up = partial(nn.ConvTranspose2d, kernel_size=4, stride=2, padding=1)
        self.down1 = nn.Sequential(down(channels, width), nn.LeakyReLU(0.2))
        self.down2 = nn.Sequential(down(width, 2 * width), nn.LeakyReLU(0.2))
        self.up2 = nn.Sequential(up(2 * width, width), nn.ReLU())
        self.up1 = _zero_start(up(2 * width, channels))

    def forward(self, x):
        half = self.down1(x)  # (N, width, H / 2, W / 2)
        quarter = self.down2(half)  # (N, 2 width, H / 4, W / 4)
        skip = torch.cat([half, self.up2(quarter)], dim=1)  # (N, 2 width, H / 2, W / 2)
        return x + self.up1(skip)


def _zero_start(layer: nn.Module) -> nn.Module:
    """The layer, with zero as its initial output."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


# ---------------------------------------------------------------- any model as units
#
# A model's `forward` is arbitrary code, so `split` does not read it but runs it. One run shows in
# which order the model calls its modules. Where a single tensor passes from the modules called so
# far to all that follows, the model can be cut, and a unit is what `forward` does between two cuts.
#
# A unit contains a copy of the model in which only the unit's own modules are real. All others are
# replaced by stubs. The unit runs the model's own `forward` from the beginning:
#
#   - The stub of an earlier module returns placeholders in the shape of the module's output.
#   - When the unit's first module is called, its input is replaced by the input of the unit.
#   - The stub of a later module ends the run. What it is called with is the output of the unit.
#
# What is computed from a placeholder is a placeholder, too. So whether the model can be cut
# somewhere is found out by trying: if more than one tensor passes there, the unit that follows
# returns a placeholder instead of the model's logits.


def split(
    model: nn.Module, x: torch.Tensor, num_units: int = 8, open: Iterable[str] = ()
) -> nn.Sequential:
    """Make an `nn.Sequential` of units out of any model that passes single tensors on.

    The units run the model's own code and share its weights, so tuned weights are written into the
    model by `net.load_state_dict(selection.result.net.state_dict())`. A layer without a weight
    matrix, such as a norm, belongs to the unit of the layer before it. Weights that belong to none
    of the modules that are called, such as a position embedding, belong to the first unit.

    Args:
        model: Called with one tensor; returns logits [N, classes], or a tuple that begins with
            them, or a dictionary with the key "logits".
        x: Two or more inputs of the model [N, ...], on its device.
        num_units: The modules with most layers are opened, that is, cut inside, until there are
            this many units, or all others have less than a unit's share of the layers.
        open: Names of modules to open in any case, as in `model.named_modules()`.

    Raises ValueError if the model cannot be cut, or if the units would not return the same logits
    as the model, bit for bit: in evaluation mode for x and for x[:1], in training mode for x.
    """
    modules = dict(model.named_modules())  # "" is the model itself
    unknown = set(open) - set(modules)
    if unknown:
        raise ValueError(f"the model has no modules of these names: {', '.join(unknown)}")
    if len(x) < 2:
        raise ValueError("split needs two or more inputs, to tell their number from other sizes")

    num_layers = {}
    for name, module in modules.items():
        if list(module.children()):
            num_layers[name] = sum(weight.dim() > 1 for weight in module.parameters())

    called = _called_modules(model, x)
    opened = set(open)
    net = None
    problem = "it is a single layer"
    for name in sorted(num_layers, key=num_layers.get, reverse=True):  # "" is the first
        is_small = num_layers[name] * num_units < num_layers[""]
        is_enough = net is not None and len(net) >= num_units
        if is_small or is_enough:
            break
        try:
            finer_net = _cut(model, x, called, opened | {name})
        except ValueError as error:
            problem = error
            continue
        if net is None or len(finer_net) > len(net):
            net = finer_net
            opened.add(name)
    if net is None:
        raise ValueError(f"the model cannot be split into units: {problem}")
    return net


@torch.no_grad()
def _called_modules(model: nn.Module, x: torch.Tensor) -> set[str]:
    """The names of the modules that the model calls. An `nn.ModuleList`, for one, is never called."""
    called = set()
    model = copy.deepcopy(model).eval()
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda module, args, name=name: called.add(name))
    model(x.clone())
    return called


@torch.no_grad()
def _cut(model: nn.Module, x: torch.Tensor, called: set[str], opened: set[str]) -> nn.Sequential:
    """Cut the model between all modules where it is possible, and inside the opened ones.

    Raises ValueError if there is no cut, or the units do not return what the model returns.
    """
    closed = _closed_modules(model, called, opened)
    calls, outputs, logits = _record_calls(model, x, closed)
    names = [name for name, _ in calls]
    weights = [{id(weight) for weight in closed[name].parameters()} for name in names]
    is_layer = [any(weight.dim() > 1 for weight in closed[name].parameters()) for name in names]
    make_unit = partial(_Unit, model, _without_weights(model), closed, outputs)

    starts = [0]  # index of the first call of each unit
    problem = "it calls fewer than two modules with weights (is it wrapped or compiled?)"
    for index in range(1, len(calls)):
        name, tensor = calls[index]
        if tensor is None or not is_layer[index] or not any(is_layer[:index]):
            continue
        if set().union(*weights[:index]) & set().union(*weights[index:]):
            problem = f"{name} and modules before it use the same weights"
            continue
        rest = make_unit(names[index:], name)
        difference = _difference(rest, tensor, logits, training=False)
        if difference is None:
            starts.append(index)
        else:
            problem = f"{name} cannot begin a unit: {difference}"
    if len(starts) == 1:
        raise ValueError(problem)

    net = nn.Sequential()
    for start, end in zip(starts, [*starts[1:], len(calls)]):
        first_layer = names[is_layer.index(True, start)]
        start_name = names[start] if start > 0 else ""
        unit = make_unit(names[start:end], start_name)
        net.add_module(first_layer.replace(".", "/"), unit)  # names may not have a dot

    for inputs, training in ((x, False), (x[:1], False), (x, True)):
        difference = _difference(net, inputs, _run(model, inputs, training), training)
        if difference is not None:
            raise ValueError(f"for {len(inputs)} inputs and training={training}, {difference}")
    return net


def _closed_modules(model: nn.Module, called: set[str], opened: set[str]) -> dict[str, nn.Module]:
    """The outermost modules that are called and not opened, by name. No cut is inside of them."""
    closed = {}
    for name, module in model.named_modules():
        is_open = any(f"{other}.".startswith(f"{name}.") for other in opened)  # or around one
        is_inside = any(name.startswith(f"{other}.") for other in closed)
        if name in called and name != "" and not is_open and not is_inside:
            closed[name] = module
    return closed


def _record_calls(model: nn.Module, x: torch.Tensor, closed: Iterable[str]) -> tuple:
    """Run the model on x and record the calls of the closed modules.

    Returns (calls, outputs, logits): the calls in their order as (name, first tensor among the
    arguments), the outputs of each module without values (on the meta device), and the logits.
    """
    calls = []
    outputs = {"": x.to("meta")}  # what the model itself is called with

    def record_input(name, module, args, kwargs):
        tensor = _first_tensor((args, kwargs))
        if tensor is not None:
            tensor = tensor.clone()  # later modules may change it in place
        calls.append((name, tensor))

    def record_output(name, module, args, output):
        outputs[name] = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), output)

    model = copy.deepcopy(model).eval()
    for name in closed:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(partial(record_input, name), with_kwargs=True)
        module.register_forward_hook(partial(record_output, name))
    logits = _logits(model(x.clone()))
    return calls, outputs, logits


def _without_weights(model: nn.Module) -> nn.Module:
    """A copy whose weights are NaN. They keep shape and dtype but take no memory."""
    model = copy.deepcopy(model)
    for weight in model.parameters():
        if weight.is_floating_point():
            weight.data = weight.data.new_full((), math.nan).expand_as(weight)
    return model


def _run(model: nn.Module, x: torch.Tensor, training: bool) -> torch.Tensor:
    """The logits of a copy of the model, with random numbers from a fixed seed."""
    model = copy.deepcopy(model).train(training)
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(0)
        return _logits(model(x.clone()))


def _difference(
    units: nn.Module, x: torch.Tensor, expected: torch.Tensor, training: bool
) -> str | None:
    """How the logits of the units differ from the expected ones; None if they are equal."""
    try:
        logits = _run(units, x, training)
    except Exception as error:  # noqa: BLE001 (cut in pieces, the model's code may fail in any way)
        return str(error) or repr(error)
    if torch.equal(logits, expected):
        return None
    return "the logits are not those of the model"


def _logits(output) -> torch.Tensor:
    if isinstance(output, dict):
        return output["logits"]
    return _first_tensor(output)


def _first_tensor(arguments) -> torch.Tensor | None:
    for leaf in tree_iter(arguments):
        if torch.is_tensor(leaf):
            return leaf
    return None


class _Placeholder(torch.Tensor):
    """Stands for a tensor of another unit. What is computed from it is a placeholder, too.

    PyTorch takes care of that, as it does for any subclass of `torch.Tensor`.
    """


class _EndOfUnit(BaseException):
    """Ends the run of a unit. An `except Exception` in the model's own code does not catch it."""

    def __init__(self, output: torch.Tensor):
        super().__init__()
        self.output = output


class _Unit(nn.Module):
    """What the model's `forward` does from the call of one module to that of the next unit's first.

    Args:
        model: The model that is split.
        weightless_model: A copy of it without weights.
        closed: The modules in which there is no cut, by name.
        outputs: Their outputs, on the meta device.
        own_names: The names of the unit's modules.
        start: The name of the first of them, "" for the model itself.
    """

    def __init__(self, model, weightless_model, closed, outputs, own_names, start):
        super().__init__()
        self.outputs = outputs
        self.start = start
        # `memo` tells deepcopy what is copied already: weights and the unit's own modules stand for
        # themselves, so they are shared, and other modules with weights are replaced by stubs.
        memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        for name, module in closed.items():
            if name in own_names or not module.state_dict():
                memo[id(module)] = module
            else:
                memo[id(module)] = _Stub(self, name, weightless_model.get_submodule(name))
        self.body = copy.deepcopy(model, memo)
        if start != "":
            self._drop_other_weights(closed)

    def _drop_other_weights(self, closed):
        """Replace weights that belong to no closed module, and thus to the first unit, by NaN."""
        kept = {id(weight) for module in closed.values() for weight in module.parameters()}
        for module in self.body.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                if id(weight) not in kept:
                    delattr(module, name)
                    nothing = torch.full_like(weight, math.nan)
                    module.register_buffer(name, nothing, persistent=False)

    def forward(self, x):
        self.num_inputs = len(x)
        self.device = x.device
        self.has_started = False
        before_start = contextlib.ExitStack()

        def start(module, args, kwargs):
            """Before the first module is called: replace its input by that of the unit."""
            if self.has_started:
                return None  # it is called again in the same unit
            self.has_started = True
            before_start.close()
            placeholder = _first_tensor((args, kwargs))
            return tree_map(lambda value: x if value is placeholder else value, (args, kwargs))

        module = self.body.get_submodule(self.start)
        try:
            with before_start, module.register_forward_pre_hook(start, with_kwargs=True):
                # What is computed before the start must not use up random numbers.
                before_start.enter_context(torch.random.fork_rng([x.device] if x.is_cuda else []))
                output = _logits(self.body(self.placeholder("")))
        except _EndOfUnit as end:
            output = end.output
        if type(output) is _Placeholder:
            raise ValueError("the model passes more than one tensor on")
        return output

    def placeholder(self, name):
        """What a module returns for these inputs, with placeholders for its tensors."""

        def fill(tensor):
            shape = list(tensor.shape)
            if shape[:1] == [len(self.outputs[""])]:
                shape[0] = self.num_inputs
            value = math.nan if tensor.is_floating_point() else 0
            filled = torch.full(shape, value, dtype=tensor.dtype, device=self.device)
            return filled.as_subclass(_Placeholder)

        return tree_map_only(torch.Tensor, fill, self.outputs[name])


class _Stub(nn.Module):
    """Stands for a module of another unit.

    The model's code may read attributes of the module, such as the dtype of a weight, or call its
    methods. They are looked up in a module without weights.
    """

    def __init__(self, unit, name, weightless_module):
        super().__init__()
        # By way of __dict__, nn.Module does not take them for submodules, whose weights it owns.
        self.__dict__.update(unit=unit, name=name, weightless_module=weightless_module)

    def forward(self, *args, **kwargs):
        if self.unit.has_started:
            raise _EndOfUnit(_first_tensor((args, kwargs)))
        return self.unit.placeholder(self.name)

    def __getattr__(self, name):  # called for what the stub itself does not have
        return getattr(self.__dict__["weightless_module"], name)

    def __deepcopy__(self, memo):
        """A stub for a copy of its unit. The module without weights is shared."""
        return _Stub(copy.deepcopy(self.unit, memo), self.name, self.weightless_module)
