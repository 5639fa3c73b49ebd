"""The networks of the paper (section 5.1), and `split`, which splits other models into units.

The networks are `nn.Sequential`s whose children are the units. They take float images
[N, channels, H, W] in [0, 1] and return logits [N, classes]. The two small networks are those of
the authors' code. Inception2 is the implementation of TensorNets that the paper uses: BN-Inception
(Ioffe & Szegedy, arXiv 1502.03167) with the weights of TF-slim.
"""

import contextlib
import copy
import hashlib
import math
import warnings
from collections import OrderedDict
from collections.abc import Iterable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

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
        fc2=nn.Linear(hidden, 9),  # CIFAR-10 without deer
    )
    return _glorot_start(net)


def _conv_relu_pool(inputs: int, outputs: int, kernel_size: int) -> nn.Sequential:
    """A convolution with SAME padding, ReLU, and max pooling by 2.

    ReLU and max pooling commute, and after the pooling ReLU has a quarter of the work.
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
    """Output channels of the convolutions in an inception module, or in a reduction module.

    A reduction module halves the size of the image.
    """

    conv1: int | None  # 1x1; None in a reduction module
    conv3: tuple[int, int]  # 1x1 that reduces, 3x3
    double: tuple[int, int, int]  # 1x1 that reduces, 3x3, 3x3
    projection: int | None  # 1x1 after a pooling; None in a reduction module


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

    units = {}
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
    units["block2"] = _named(**block2)
    channels = scaled(192)
    for name, branches in BRANCHES.items():
        conv3 = [scaled(n) for n in branches.conv3]
        double = [scaled(n) for n in branches.double]
        if branches.conv1 is None:
            units[name] = _reduction_module(channels, conv3, double)
            channels += conv3[-1] + double[-1]
        else:
            conv1 = scaled(branches.conv1)
            projection = scaled(branches.projection)
            if name == "block5b":
                pool = nn.MaxPool2d(3, stride=1, padding=1)
            else:
                pool = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
            units[name] = _inception_module(channels, conv1, conv3, double, projection, pool)
            channels = conv1 + conv3[-1] + double[-1] + projection
    units["logits"] = _named(
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        dropout=nn.Dropout(0.2),
        linear=nn.Linear(channels, classes),
    )
    return _named(**units)


class ScaleToSigned(nn.Module):
    """Scale images from [0, 1] to [-1, 1], on which Inception2 was trained."""

    def forward(self, x):
        return x * 2 - 1


class SamePad(nn.Module):
    """TensorFlow's SAME padding before a layer of stride 2.

    If the total padding is odd, the extra pixel goes to the bottom and to the right.
    """

    def __init__(self, kernel_size: int, value: float = 0.0):
        super().__init__()
        self.kernel_size = kernel_size
        self.value = value

    def forward(self, x):
        padding = []  # left, right, top, bottom
        for size in (x.shape[3], x.shape[2]):
            outputs = math.ceil(size / 2)
            total = (outputs - 1) * 2 + self.kernel_size - size
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
    return ConcatBranches(
        {
            "3x3": _conv_stack(inputs, conv3, stride=2),
            "d3x3": _conv_stack(inputs, double, stride=2),
            "pool": _halving_pool(),
        }
    )


def _conv_stack(inputs: int, widths: list[int], stride: int = 1) -> nn.Sequential:
    """A 1x1 convolution that reduces, then 3x3 convolutions, the last of them with the stride."""
    layers = {"r": _conv_bn_relu(inputs, widths[0], 1)}
    last = len(widths) - 1
    for number in range(1, len(widths)):
        layer_stride = stride if number == last else 1
        layers[str(number)] = _conv_bn_relu(widths[number - 1], widths[number], 3, layer_stride)
    return _named(**layers)


def _conv_bn_relu(
    inputs: int, outputs: int, kernel_size: int, stride: int = 1, **before: nn.Module
) -> nn.Sequential:
    """A convolution with SAME padding, BatchNorm with a shift but without a scale, ReLU.

    `before`: layers in front of the convolution, by name.
    """
    padding = kernel_size // 2
    if stride == 2:
        before["pad"] = SamePad(kernel_size)
        padding = 0
    bn = nn.BatchNorm2d(outputs, eps=1e-3)
    bn.register_parameter("weight", None)  # no scale
    conv = nn.Conv2d(inputs, outputs, kernel_size, stride, padding, bias=False)
    return _named(**before, conv=conv, bn=bn, relu=nn.ReLU())


def _halving_pool() -> nn.Sequential:
    return nn.Sequential(SamePad(3, value=-math.inf), nn.MaxPool2d(3, stride=2))


PACS_ROWS = {  # class of PACS: index of a class of ILSVRC, counted from 0 (authors' code)
    "dog": 167,
    "elephant": 385,
    "giraffe": 354,  # the Arabian camel, as ILSVRC has no giraffe
    "guitar": 402,
    "horse": 339,
    "house": 449,
}


def pacs_head(net: nn.Sequential) -> nn.Sequential:
    """A copy of `net` whose last layer keeps only the outputs for the classes in PACS_ROWS."""
    net = copy.deepcopy(net)
    linear_layers = [layer for layer in net.modules() if isinstance(layer, nn.Linear)]
    if not linear_layers or linear_layers[-1].out_features != 1000:
        raise ValueError("the last layer of the network must be an nn.Linear with 1000 outputs")
    last_layer = linear_layers[-1]
    rows = list(PACS_ROWS.values())
    for name, weight in list(last_layer.named_parameters()):
        setattr(last_layer, name, nn.Parameter(weight.detach()[rows]))
    last_layer.out_features = len(rows)
    return net


# ---------------------------------------------------------------- TensorNets' weights

TENSORNETS_MD5 = "0476b876a5d35a99e2747f98248d856d"  # of inception2.npz


class WeightsError(ValueError):
    """A file of weights that cannot be used; the message says in one line what is wrong."""


def load_inception2(path: Path, md5: str = TENSORNETS_MD5) -> nn.Sequential:
    """Inception2 with the weights of TensorNets' `inception2.npz`.

    The file is only unpickled if it has this MD5, because unpickling can execute arbitrary code.
    Raises WeightsError if it is another file.
    """
    if not path.is_file():
        raise WeightsError(f"{path} is missing: put TensorNets' file there")
    with open(path, "rb") as file:
        # With `usedforsecurity=False`, MD5 is also available where it is blocked for security.
        digest = hashlib.file_digest(file, partial(hashlib.md5, usedforsecurity=False))
    if digest.hexdigest() != md5:
        raise WeightsError(f"{path} is not TensorNets' file, whose MD5 is {md5}: delete it")

    net = inception2()
    state = net.state_dict()
    with np.load(path, allow_pickle=True, encoding="latin1") as file:
        for name, array in zip(file["names"].astype(str), file["values"]):
            state[_torch_name(name)] = _torch_layout(name, array)
    net.load_state_dict(state)
    return net


def _torch_name(name: str) -> str:
    """Translate the name of an array of TensorNets into its name in our state_dict.

    For example, "block1/depthwise_weights:0" becomes "block1.depthwise.weight".
    """
    name = name.split(":")[0]
    for old, new in (
        ("block1/biases", "block1/pointwise_biases"),
        ("logits/", "logits/linear/"),
        ("wise_", "wise/"),  # of depthwise and pointwise
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
    """Convert an array of TensorNets to PyTorch's order of dimensions."""
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
# shape. Each starts as the identity (up to rounding), so at first the network's output is the same.
# The paper says what kinds of units it uses; everything else is our choice. (In the authors' code
# the U-Net is deeper and uses instance norm, the affine map has one angle, two scales and two
# translations, and the unit for colors ends in a sigmoid.)


class Pixelwise(nn.Module):
    """Add to each pixel the output of two 1x1 convolutions: a transformation of the colors."""

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

    A small network finds the map; it sees the image at 28 x 28 pixels. Bilinear interpolation;
    pixels from outside the image are black.
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
    """Set the weights of a layer to zero, so that at first it returns zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


# ---------------------------------------------------------------- any model as units
#
# A model's `forward` is arbitrary code, so `split` does not read it but runs it. One run shows in
# which order the model calls its modules. Where a single tensor passes from the modules called so
# far to all that follows, and only as an argument of the next module, the model can be cut. A unit
# is what `forward` does between two cuts. A module is opened if cuts are made inside of it, else it
# is closed.
#
# For example, a model that calls the closed modules stem, block1, block2 and head is cut before
# block1, block2 and head. The unit of block1 has a copy of the model in which block1 is the model's
# own module, and the others are stubs. The unit runs the model's own `forward` from its beginning:
#
#   - The stub of stem, an earlier module, returns a placeholder in the shape of stem's output.
#   - When block1 is called, the placeholder that it gets is replaced by the input of the unit. (A
#     skip connection around block1 would still get the placeholder.)
#   - The stub of block2, a later module, ends the run. Its input is the output of the unit.
#
# `_cut` finds out where the model can be cut by trying: it runs all that follows the cut as one
# unit. What is computed from a placeholder is a placeholder, too. So if a second tensor crosses the
# cut (over a skip connection, say), this tensor is a placeholder. Then the logits are placeholders,
# and the cut is rejected.


def split(
    model: nn.Module, x: torch.Tensor, num_units: int = 8, open: Iterable[str] = ()
) -> nn.Sequential:
    """Convert a model into an `nn.Sequential` of units.

    The units run the model's own code and share its parameters. So the model is tuned by loading
    the state of a tuned network into the units:

        net = split(model, x)
        selection = flex(Task(net, train, val))
        net.load_state_dict(selection.result.net.state_dict())

    The closed modules of the model are shared, too. The model object itself and its opened modules
    are copied into each unit. So `net.eval()` affects only a part of the model: call `model.eval()`
    or `model.train()` before you use it again.

    A unit is named after its first closed module with a weight matrix (a parameter of two or more
    dimensions). It begins with the call of this module, and the first unit with the model's input.
    It ends where the next unit begins, so what follows without a weight matrix, such as a norm,
    belongs to it. Parameters and buffers that are in no closed module, such as a position
    embedding, belong to the first unit.

    For all inputs, the model must call the same modules in the same order, and they must return
    tensors of the same shapes, except for the number of inputs. The model is not cut where it later
    reads values of a tensor from before the cut, such as token ids. (That it reads them with
    `value in tensor` is not noticed.)

    Args:
        model: Called with one tensor; returns logits [N, classes], or a tuple that begins with
            them, or a dictionary with the key "logits". It must be on the device and in the dtype
            in which the units are used, and gradient checkpointing must be off.
        x: Two or more typical inputs of the model [N, ...]. The units take any number of inputs of
            the same shape.
        num_units: Target number of units. The modules with the most weight matrices are opened,
            until there are at least this many units. A module with less than 1 / num_units of the
            weight matrices stays closed. If there are fewer units than this, and weight matrices
            for more, a warning says why.
        open: Names of modules that are always opened, as in `model.named_modules()`. If a skip
            connection begins at the first layer of an opened module, the layers beside it become
            part of the unit before.

    Raises ValueError if the model cannot be cut, or if the units would not compute what the model
    computes:
        in evaluation mode, for x and for x[:1], the same logits, bit for bit;
        in training mode, for x, the same logits, bit for bit, the same state_dict afterwards, and
        the same gradients up to rounding.
    """
    num_matrices = {}  # in each module that has children; "" is the model itself
    for name, module in model.named_modules():
        if list(module.children()):
            num_matrices[name] = sum(weight.dim() > 1 for weight in module.parameters())
    opened = {open} if isinstance(open, str) else set(open)
    unknown = opened - set(num_matrices)
    if unknown:
        raise ValueError(f"the model has no modules with children named {', '.join(unknown)}")
    if num_units < 1:
        raise ValueError(f"num_units must be at least 1, not {num_units}")
    if len(x) < 2:
        raise ValueError("split needs two or more inputs, to tell the batch from other dimensions")

    called = _called_modules(model, x)
    nan_model = _with_nan_weights(model)
    net = None
    # Why the latest attempt, kept or not, found no more units; None if it made every cut.
    problem = "it has no modules inside"
    # The model itself ("") has the most matrices and comes first: it is cut between its children.
    for name in sorted(num_matrices, key=num_matrices.get, reverse=True):
        is_small = num_matrices[name] < num_matrices[""] / num_units
        is_enough = net is not None and len(net) >= num_units
        if is_small or is_enough:
            break
        try:
            finer_net, problem = _cut(model, nan_model, x, called, opened | {name})
        except Exception as error:  # noqa: BLE001 (a model run in pieces may raise anything)
            problem = _first_line(error)
            continue
        if net is None or len(finer_net) > len(net):  # else leave the module closed
            net = finer_net
            opened.add(name)
    if net is None:
        raise ValueError(f"the model cannot be split into units: {problem}")
    if len(net) < min(num_units, num_matrices[""]):
        reason = problem or "its other modules have few weight matrices or are not called"
        warnings.warn(f"split found only {len(net)} units ({reason})", stacklevel=2)
    return net


@torch.no_grad()
def _called_modules(model: nn.Module, x: torch.Tensor) -> set[str]:
    """The names of the modules that the model calls (never an `nn.ModuleList`, for example)."""
    called = set()
    model = copy.deepcopy(model).eval()
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda module, args, name=name: called.add(name))
    model(x.clone())
    return called


@torch.no_grad()
def _cut(
    model: nn.Module, nan_model: nn.Module, x: torch.Tensor, called: set[str], opened: set[str]
) -> tuple[nn.Sequential, str | None]:
    """Cut the model before all closed modules where it is possible.

    Returns the units, and why there are no more of them. Raises ValueError if there is no cut, or
    the units do not compute what the model computes.
    """
    closed = _closed_modules(model, called, opened)
    recording = _record(model, x, closed)
    make_unit = partial(_Unit, model, nan_model, closed, recording)
    num_calls = len(recording.calls)
    weights = [set(closed[call.name].parameters()) for call in recording.calls]
    # The calls of modules with a weight matrix. Every unit begins with one of them, except possibly
    # the first.
    main_calls = [n for n in range(num_calls) if any(weight.dim() > 1 for weight in weights[n])]
    if len(main_calls) < 2:
        raise ValueError("it calls fewer than two modules with weights: is it wrapped or compiled?")
    starts = [0]  # index of the first call of each unit
    problem = None
    for index in main_calls[1:]:
        call = recording.calls[index]
        if set().union(*weights[:index]) & set().union(*weights[index:]):
            reason = "modules before and after this point use the same weights"
        elif call.tensor is None:
            reason = "it is called without a tensor"
        else:
            reason = _difference(make_unit(index, num_calls), call.tensor, recording.logits)
        if reason is None:
            starts.append(index)
        else:
            problem = f"{call.name} cannot begin a unit: {reason}"
    if len(starts) == 1:
        raise ValueError(problem)

    net = nn.Sequential()
    for start, stop in pairwise([*starts, num_calls]):
        main_call = next(n for n in main_calls if n >= start)
        name = recording.calls[main_call].name.replace(".", "/")  # PyTorch allows no dot
        net.add_module(name, make_unit(start, stop))

    _check_equal(net, model, x)
    return net, problem


def _is_within(name: str, outer: str) -> bool:
    """Whether a module is `outer` itself or inside it. All are inside the model itself, ""."""
    return outer in ("", name) or name.startswith(f"{outer}.")


def _closed_modules(model: nn.Module, called: set[str], opened: set[str]) -> dict[str, nn.Module]:
    """The outermost modules that are called and not opened, by name."""
    closed = {}
    for name, module in model.named_modules():
        # An opened module also opens those around it.
        is_opened = any(_is_within(opened_name, outer=name) for opened_name in opened)
        is_in_closed = any(_is_within(name, outer=closed_name) for closed_name in closed)
        if name in called and not is_opened and not is_in_closed:
            closed[name] = module
    return closed


class _Call(NamedTuple):
    name: str  # of the called module
    tensor: torch.Tensor | None  # the first one among the arguments


class _Recording(NamedTuple):
    """A run of the model. Tensors on the meta device have a shape and a dtype, but no values."""

    model_input: torch.Tensor  # on the meta device
    calls: list[_Call]
    outputs: dict[str, Any]  # what each module returned in its last call, on the meta device
    logits: torch.Tensor


def _record(model: nn.Module, x: torch.Tensor, closed: Iterable[str]) -> _Recording:
    """Run the model on x and record the calls of the closed modules."""
    calls = []
    outputs = {}

    def record_input(name, module, args, kwargs):
        tensor = _first_tensor((args, kwargs))
        if tensor is not None:
            tensor = tensor.clone()  # later modules may change it in place
        calls.append(_Call(name, tensor))

    def record_output(name, module, args, output):
        outputs[name] = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), output)

    model = copy.deepcopy(model).eval()
    for name in closed:
        module = model.get_submodule(name)
        # Before the model's own hooks: a unit replaces the input before they are called, too.
        record = partial(record_input, name)
        module.register_forward_pre_hook(record, prepend=True, with_kwargs=True)
        module.register_forward_hook(partial(record_output, name))
    logits = _logits(model(x.clone()))
    return _Recording(x.to("meta"), calls, outputs, logits)


def _with_nan_weights(model: nn.Module) -> nn.Module:
    """A copy whose parameters are NaN. Stubs look up attributes in it."""
    model = copy.deepcopy(model)
    for weight in model.parameters():
        weight.data = _nan_like(weight)
    return model


def _nan_like(tensor: torch.Tensor) -> torch.Tensor:
    """NaN, or 0 for integers, in the shape of a tensor. It uses the memory of one element."""
    value = math.nan if tensor.is_floating_point() else 0
    return tensor.detach().new_full((), value).expand_as(tensor)


def _run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The logits of a copy of the model in evaluation mode."""
    return _logits(copy.deepcopy(model).eval()(x.clone()))


def _difference(unit: nn.Module, x: torch.Tensor, expected: torch.Tensor) -> str | None:
    """Why a unit up to the end of the model does not return the expected logits; None if it does.

    `x` is the input of the unit.
    """
    # Weights and activations of other units are NaN, which shows in the logits if they are used.
    # Integers cannot be NaN. Their value must not matter, so two values are tried.
    for integer in (0, 1):
        unit.integer = integer
        try:
            logits = _run(unit, x)
        except Exception as error:  # noqa: BLE001 (a model run in pieces may raise anything)
            return _first_line(error)
        if logits.isnan().any():
            return "it uses weights or activations of another unit"
        if not torch.equal(logits, expected):
            return "the logits differ from those of the model"
    return None


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def _first_line(error: Exception) -> str:
    return (str(error) or repr(error)).splitlines()[0]


def _check_equal(net: nn.Sequential, model: nn.Module, x: torch.Tensor) -> None:
    """Raise ValueError unless the units compute what the model computes."""
    for inputs in (x, x[:1]):
        if not torch.equal(_run(net, inputs), _run(model, inputs)):
            raise ValueError(f"the logits of the units differ for {len(inputs)} inputs")

    trained_net = copy.deepcopy(net)
    trained_model = copy.deepcopy(model)
    logits = _train_once(trained_net, x)
    if not torch.equal(logits, _train_once(trained_model, x)):
        raise ValueError("the logits of the units differ in training mode")

    # unit.body is a copy of the model without the tensors of other units: they are in stubs, or
    # replaced (see `_replace_tensors`). So the bodies together have the tensors of the model, each
    # once, under their names in the model.
    state = {}
    gradients = {}
    for unit in trained_net:
        state.update(unit.body.state_dict())
        gradients.update({name: weight.grad for name, weight in unit.body.named_parameters()})
    for name, tensor in trained_model.state_dict().items():
        if not torch.equal(state[name], tensor):
            raise ValueError(f"training updates {name} differently (gradient checkpointing?)")
    for name, weight in trained_model.named_parameters():
        gradient = gradients[name]
        if gradient is None or weight.grad is None:
            is_same = gradient is None and weight.grad is None
        else:
            difference = (gradient - weight.grad).abs().max()
            is_same = difference <= 1e-3 * weight.grad.abs().max()
        if not is_same:
            raise ValueError(f"the gradient of {name} differs (gradient checkpointing?)")


@torch.enable_grad()  # `_cut`, which calls this, runs without gradients
def _train_once(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Run the model in training mode, with a fixed seed, and compute its gradients."""
    model.train().requires_grad_(True)
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(0)
        logits = _logits(model(x.clone()))
        try:
            logits.sum().backward()
        except _EndOfUnit:
            # Checkpointing runs a part of `forward` again, in which it meets a stub.
            raise ValueError("backward calls modules again (gradient checkpointing?)") from None
    return logits


def _logits(output) -> torch.Tensor:
    """The logits in what a model returns."""
    logits = output["logits"] if isinstance(output, dict) else _first_tensor(output)
    if logits is None:
        raise ValueError(f"the model returns {type(output).__name__}, which has no logits")
    return logits


def _first_tensor(arguments) -> torch.Tensor | None:
    for leaf in tree_iter(arguments):
        if torch.is_tensor(leaf):
            return leaf
    return None


# Functions that read values of a tensor, or return a shape that depends on them, so that what the
# model does can depend on them. `__contains__` reads values, too, but is allowed: Hugging Face's
# models use it only to decide whether to print a warning about padding.
VALUE_READERS = {
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "__array__",
    "item",
    "tolist",
    "numpy",
    "equal",
    "allclose",
    "is_nonzero",
    "nonzero",
    "argwhere",
    "masked_select",
    "unique",
    "bincount",
}


class _Placeholder(torch.Tensor):
    """Stands for a tensor of another unit. What is computed from it is a placeholder, too."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        """PyTorch calls this instead of any function that receives a placeholder."""
        name = function.__name__
        index = _first_tensor(args[1:]) if name == "__getitem__" else None
        is_mask = index is not None and index.dtype == torch.bool  # x[mask]
        is_where = name == "where" and len(args) == 1  # where(mask), which is like nonzero
        if name in VALUE_READERS or is_mask or is_where:
            raise ValueError("what the model does depends on a value of another unit")
        result = super().__torch_function__(function, types, args, kwargs or {})  # a placeholder
        is_method_in_place = name.endswith("_") and not name.endswith("__")  # x.add_(y)
        is_operator_in_place = name == "__setitem__" or name.startswith("__i")  # x[0] = y, x += y
        if is_method_in_place or is_operator_in_place:
            # A placeholder was written into a tensor, which becomes one itself.
            args[0].__class__ = cls
        return result

    def __deepcopy__(self, memo):
        # A unit that is copied may hold one, in a buffer for example. PyTorch cannot copy it.
        return self


class _EndOfUnit(BaseException):
    """Ends the run of a unit. An `except Exception` in the model's own code does not catch it."""

    def __init__(self, name: str, output: torch.Tensor):
        super().__init__()
        self.name = name  # of the module that begins the next unit
        self.output = output


class _Unit(nn.Module):
    """The part of a model's `forward` from the call of one module to the call of another one.

    Args:
        model: The model that is split.
        nan_model: A copy of it whose parameters are NaN.
        closed: The closed modules by name.
        recording: A run of the model.
        start, stop: The unit has recording.calls[start:stop].
    """

    def __init__(self, model, nan_model, closed, recording, start, stop):
        super().__init__()
        self.integer = 0  # the value of integers in placeholders
        self.model_input = recording.model_input
        self.outputs = recording.outputs
        names = [call.name for call in recording.calls]
        # The first unit begins with the call of the model itself, not of its first module.
        self.first_name = names[start] if start > 0 else ""
        self.next_name = names[stop] if stop < len(names) else None  # begins the next unit
        # Where `memo` has an entry for an object, deepcopy uses it and makes no copy. So the body
        # shares all tensors with the model, and the closed modules of this unit. Other closed
        # modules become stubs. Only those without a state_dict are copied: a ReLU or a pooling is
        # often called again with another shape, and a stub knows only one.
        memo = {id(tensor): tensor for tensor in _tensors(model)}
        own_modules = []
        stubbed_modules = []
        for name, module in closed.items():
            if name in names[start:stop]:
                own_modules.append(module)
                memo[id(module)] = module
            elif module.state_dict():
                stubbed_modules.append(module)
                memo[id(module)] = _Stub(self, name, nan_model.get_submodule(name))
        self.body = copy.deepcopy(model, memo)

        own_tensors = {id(t) for module in own_modules for t in _tensors(module)}
        if start == 0:
            # Tensors that are in no closed module belong to the first unit. The model may also have
            # a tensor of a stubbed module under another name (a tied weight).
            stubbed_tensors = {id(t) for module in stubbed_modules for t in _tensors(module)}
            own_tensors |= {id(t) for t in _tensors(self.body)} - stubbed_tensors
        self._replace_tensors(own_tensors)

    def _replace_tensors(self, own_tensors: set[int]):
        """Replace all tensors of the body that do not belong to this unit.

        They are attributes of copied modules, and code that runs before the unit begins may read
        them. Parameters become NaN, so that any later use shows in the logits. Buffers become
        copies, since that code may change them. Both are no longer trained, nor part of the
        state_dict.
        """
        for module in self.body.modules():
            weights = dict(module.named_parameters(recurse=False, remove_duplicate=False))
            buffers = dict(module.named_buffers(recurse=False, remove_duplicate=False))
            for name, tensor in (weights | buffers).items():
                if id(tensor) not in own_tensors:
                    replacement = _nan_like(tensor) if name in weights else tensor.clone()
                    delattr(module, name)
                    module.register_buffer(name, replacement, persistent=False)

    def forward(self, x):
        if self.first_name == "" and x.shape[1:] != self.model_input.shape[1:]:
            expected = [*self.model_input.shape[1:]]
            raise ValueError(f"the model was split for inputs [N, ...] of shape {expected}")
        self.num_inputs = len(x)
        self.device = x.device
        self.has_begun = False
        before_unit = contextlib.ExitStack()  # what holds until the unit begins

        def begin(module, args, kwargs):
            """The first module is called: replace its input by that of the unit."""
            self.has_begun = True
            before_unit.close()  # removes this hook and restores the random generators
            placeholder = _first_tensor((args, kwargs))
            return tree_map(lambda value: x if value is placeholder else value, (args, kwargs))

        first_module = self.body.get_submodule(self.first_name)  # "" is the body itself
        hook = first_module.register_forward_pre_hook(begin, prepend=True, with_kwargs=True)
        try:
            with before_unit:  # closes it if the unit does not begin
                before_unit.callback(hook.remove)
                # What runs before the unit must not advance the random generators.
                devices = [x.device] if x.is_cuda else []
                before_unit.enter_context(torch.random.fork_rng(devices))
                # Only the last unit returns here: in the others, a stub raises _EndOfUnit.
                output = _logits(self.body(self.placeholders(self.model_input)))
        except _EndOfUnit as end:
            output = end.output
            if end.name != self.next_name:
                raise ValueError(
                    f"the model called {end.name} instead of {self.next_name}: does it skip "
                    "modules at random?"
                ) from None
        if not self.has_begun:
            raise ValueError(f"the model did not call {self.first_name}")
        if type(output) is _Placeholder:
            raise ValueError("more than one tensor passes from one unit to the next")
        return output

    def placeholders(self, recorded):
        """Placeholders for recorded tensors, in their shapes except for the number of inputs."""

        def placeholder(tensor):
            shape = list(tensor.shape)
            has_batch_dimension = len(shape) > 0 and shape[0] == len(self.model_input)
            if has_batch_dimension:
                shape[0] = self.num_inputs
            value = math.nan if tensor.is_floating_point() else self.integer
            filled = torch.full(shape, value, dtype=tensor.dtype, device=self.device)
            return filled.as_subclass(_Placeholder)

        return tree_map_only(torch.Tensor, placeholder, recorded)


class _Stub(nn.Module):
    """Stands for a module of another unit.

    The model's code may read attributes of the module, such as the dtype of a weight, or call its
    methods. They are looked up in `nan_module`, a copy of the module whose parameters are NaN.
    """

    def __init__(self, unit, name, nan_module):
        super().__init__()
        # Set in `__dict__`, so that nn.Module does not register them as submodules.
        self.__dict__.update(unit=unit, name=name, nan_module=nan_module)

    def forward(self, *args, **kwargs):
        if self.unit.has_begun:
            raise _EndOfUnit(self.name, _first_tensor((args, kwargs)))
        return self.unit.placeholders(self.unit.outputs[self.name])

    def __getattr__(self, name):  # called only for what the stub itself lacks
        return getattr(self.nan_module, name)

    def __deepcopy__(self, memo):
        """A stub for a copy of its unit. `nan_module` is shared."""
        # Stubs are only copied as a part of their unit, whose copy is in `memo` by then.
        return _Stub(copy.deepcopy(self.unit, memo), self.name, self.nan_module)
