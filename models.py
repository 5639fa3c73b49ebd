"""The networks of the paper (section 5.1), each an `nn.Sequential` whose children are its units.

They take float images [N, channels, H, W] in [0, 1] and give logits [N, classes]. The two small
ones are those of the authors' code. Inception2 is TensorNets', as in the paper: Ioffe & Szegedy's
BN-Inception (arXiv 1502.03167) with the weights of TF-slim.
"""

import copy
import hashlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import affine_grid, grid_sample, pad


def mnist_net(channels: int = 1) -> nn.Sequential:
    """The 4-layer network for digits of 28 x 28: two convolutional, two fully connected units.

    Pooling and flattening stand inside a unit, so that there are exactly four.
    """
    return _small_net(
        conv1=_conv_relu(channels, 32, 5, pool=True),
        conv2=_conv_relu(32, 64, 5, pool=True),
        fc1=_hidden(64 * 7 * 7, 1024),
        fc2=nn.Linear(1024, 10),
    )


def cifar_net(channels: int = 3, width: float = 1.0) -> nn.Sequential:
    """The 7-layer network for objects of 32 x 32: five convolutional, two fully connected units.

    `width` scales the number of channels.
    """
    a, b, c, d, e, hidden = (round(n * width) for n in (32, 64, 128, 256, 512, 1024))
    return _small_net(
        conv1=_conv_relu(channels, a, 3, pool=False),
        conv2=_conv_relu(a, b, 3, pool=True),
        conv3=_conv_relu(b, c, 3, pool=True),
        conv4=_conv_relu(c, d, 3, pool=True),
        conv5=_conv_relu(d, e, 3, pool=True),
        fc1=_hidden(e * 2 * 2, hidden),
        fc2=nn.Linear(hidden, 9),
    )


def _conv_relu(inputs: int, outputs: int, kernel: int, pool: bool) -> nn.Sequential:
    """SAME padding. The authors' ReLU is before the pooling: the same for four times the work."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
    return nn.Sequential(conv, *([nn.MaxPool2d(2)] if pool else []), nn.ReLU())


def _hidden(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(0.5))


def _small_net(**units: nn.Module) -> nn.Sequential:
    """The units, with weights that start as Glorot uniform and biases that start as zero."""
    net = _named(**units)
    for weight in net.parameters():
        nn.init.xavier_uniform_(weight) if weight.dim() > 1 else nn.init.zeros_(weight)
    return net


# ---------------------------------------------------------------- Inception2

BLOCKS = {  # widths: 1x1; 3x3 reduce, 3x3; double 3x3 reduce, double 3x3 (twice); pool projection
    "block3a": (64, (64, 64), (64, 96), 32),
    "block3b": (64, (64, 96), (64, 96), 64),
    "block3c": (None, (128, 160), (64, 96), None),  # halves the image, as does block4e
    "block4a": (224, (64, 96), (96, 128), 128),
    "block4b": (192, (96, 128), (96, 128), 128),
    "block4c": (160, (128, 160), (128, 160), 96),
    "block4d": (96, (128, 192), (160, 192), 96),
    "block4e": (None, (128, 192), (192, 256), None),
    "block5a": (352, (192, 320), (160, 224), 128),
    "block5b": (352, (192, 320), (192, 224), 128),
}
PACS_ROWS = {  # class of PACS: the row of ILSVRC's head that it is (from 0; authors' code)
    "dog": 167,
    "elephant": 385,
    "giraffe": 354,
    "guitar": 402,
    "horse": 339,
    "house": 449,
}


def inception2(classes: int = 1000, width: float = 1.0) -> nn.Sequential:
    """Inception2, 13 units: block1, block2, 3a to 3c, 4a to 4e, 5a and 5b, logits.

    Images may be of any size; the paper's are 224 x 224. `width` scales the number of channels.
    Layers have TensorNets' names, by which `load_inception2` finds them.
    """

    def scaled(channels):
        return max(1, round(channels * width))

    channels = scaled(192)
    units = OrderedDict(
        block1=_named(
            signed=Signed(),
            pad=Same(7),
            depthwise=nn.Conv2d(3, 3 * scaled(8), 7, stride=2, groups=3, bias=False),
            pointwise=nn.Conv2d(3 * scaled(8), scaled(64), 1),
            relu=nn.ReLU(),
            pool=_halving_pool(),
        ),
        block2=_named(
            **{"1": _conv(scaled(64), scaled(64), 1), "2": _conv(scaled(64), channels, 3)},
            pool=_halving_pool(),
        ),
    )
    for name, (one, three, (reduce, double), projection) in BLOCKS.items():
        stride = 1 if projection else 2
        branches = {
            "3x3": _convs(channels, [scaled(n) for n in three], stride),
            "d3x3": _convs(channels, [scaled(n) for n in (reduce, double, double)], stride),
        }
        outputs = scaled(three[1]) + scaled(double)
        if projection:
            average = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
            pool = nn.MaxPool2d(3, stride=1, padding=1) if name == "block5b" else average
            branches = {"1x1": _conv(channels, scaled(one), 1)} | branches
            branches["proj"] = _conv(channels, scaled(projection), 1, pool=pool)
            channels = outputs + scaled(one) + scaled(projection)
        else:
            branches["pool"] = _halving_pool()
            channels += outputs
        units[name] = Concatenated(branches)
    units["logits"] = _named(
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        dropout=nn.Dropout(0.2),
        linear=nn.Linear(channels, classes),
    )
    return nn.Sequential(units)


class Signed(nn.Module):
    """[0, 1] to [-1, 1], on which Inception2 was trained."""

    def forward(self, x):
        return x * 2 - 1


class Same(nn.Module):
    """TensorFlow's SAME padding before a stride of 2: an odd pixel goes to the bottom and right."""

    def __init__(self, kernel: int, value: float = 0.0):
        super().__init__()
        self.kernel, self.value = kernel, value

    def forward(self, x):
        sides = []
        for size in (x.shape[3], x.shape[2]):
            total = self.kernel - 2 + size % 2
            sides += [total // 2, total - total // 2]
        return pad(x, sides, value=self.value)


class Concatenated(nn.ModuleDict):
    """The outputs of all branches, one after the other."""

    def forward(self, x):
        return torch.cat([branch(x) for branch in self.values()], 1)


def _named(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def _halving_pool() -> nn.Sequential:
    return nn.Sequential(Same(3, -torch.inf), nn.MaxPool2d(3, stride=2))


def _conv(inputs: int, outputs: int, kernel: int, stride=1, **before) -> nn.Sequential:
    """Convolution with SAME padding, BatchNorm with a shift but without a scale, ReLU."""
    if stride == 2:
        before["pad"] = Same(kernel)
    padding = 0 if stride == 2 else kernel // 2
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
    bn = nn.BatchNorm2d(outputs, eps=1e-3)
    bn.register_parameter("weight", None)
    return _named(**before, conv=conv, bn=bn, relu=nn.ReLU())


def _convs(inputs: int, widths: list[int], stride: int) -> nn.Sequential:
    """A 1x1 convolution that reduces, then 3x3 convolutions, the last of them with the stride."""
    layers, (*names, last) = {}, "r12"[: len(widths)]
    for name, width in zip([*names, last], widths):
        kernel = 1 if name == "r" else 3
        layers[name] = _conv(inputs, width, kernel, stride if name == last else 1)
        inputs = width
    return _named(**layers)


def pacs_head(net: nn.Sequential) -> nn.Sequential:
    """A copy with the six classes of PACS alone, each a row of its last layer, ILSVRC's."""
    net, rows = copy.deepcopy(net), list(PACS_ROWS.values())
    *_, last = [None] + [layer for layer in net.modules() if isinstance(layer, nn.Linear)]
    if last is None or last.out_features != 1000:
        raise ValueError("the last layer of the network must be a linear one of 1000 classes")
    for name, old in list(last.named_parameters()):
        setattr(last, name, nn.Parameter(old.detach()[rows]))
    return net


# ---------------------------------------------------------------- image-to-image (section 5.4)
#
# Units to stand before a network: images [N, channels, H, W] to images. Each starts as the
# identity, so that the network is at first what it was. The paper gives their kinds; all else is
# ours. (In its authors' code the U-Net is deeper, with instance norm, the map has one angle, two
# scales and two moves, and the colours end in a sigmoid.)


class Pixelwise(nn.Module):
    """x plus 1x1 convolutions of it: a map of colours."""

    def __init__(self, channels: int, width: int = 32):
        super().__init__()
        last = _zero(nn.Conv2d(width, channels, 1))
        self.change = nn.Sequential(nn.Conv2d(channels, width, 1), nn.ReLU(), last)

    def forward(self, x):
        return x + self.change(x)


class SpatialTransformer(nn.Module):
    """An affine map of each image, found by a small network (Jaderberg et al., NIPS 2015).

    Bilinear, black outside. The small network sees the image at 28 x 28.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.locate = nn.Sequential(
            nn.AdaptiveAvgPool2d(28),
            *(nn.Conv2d(channels, 16, 5, stride=2, padding=2), nn.ReLU()),
            *(nn.Conv2d(16, 32, 5, stride=2, padding=2), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(32 * 7 * 7, 64), nn.ReLU()),
            _zero(nn.Linear(64, 6)),
        )
        self.register_buffer("identity", torch.eye(2, 3))

    def forward(self, x):
        theta = self.identity + self.locate(x).view(-1, 2, 3)
        return grid_sample(x, affine_grid(theta, x.shape, align_corners=False), align_corners=False)


class UNet(nn.Module):
    """x plus a small Pix2Pix U-Net of it (Isola et al., CVPR 2017), without a norm.

    H and W must be multiples of 4.
    """

    def __init__(self, channels: int, width: int = 32):
        super().__init__()
        sizes = {"kernel_size": 4, "stride": 2, "padding": 1}
        self.down1 = nn.Sequential(nn.Conv2d(channels, width, **sizes), nn.LeakyReLU(0.2))
        self.down2 = nn.Sequential(nn.Conv2d(width, 2 * width, **sizes), nn.LeakyReLU(0.2))
        self.up2 = nn.Sequential(nn.ConvTranspose2d(2 * width, width, **sizes), nn.ReLU())
        self.up1 = _zero(nn.ConvTranspose2d(2 * width, channels, **sizes))

    def forward(self, x):
        half = self.down1(x)
        return x + self.up1(torch.cat([half, self.up2(self.down2(half))], 1))


def _zero(layer: nn.Module) -> nn.Module:
    """The layer with an output of zero at first."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


# ---------------------------------------------------------------- TensorNets' weights

TENSORNETS = "0476b876a5d35a99e2747f98248d856d"  # the MD5 of their inception2.npz


class WeightsError(ValueError):
    """A file of weights that cannot be used; the message says in a line what is wrong."""


def load_inception2(path: Path, md5: str = TENSORNETS) -> nn.Sequential:
    """Inception2 with the weights of TensorNets' `inception2.npz`. Raises WeightsError.

    The arrays are pickled, and a pickle may run any program: no other file than this is opened.
    """
    digest = hashlib.md5(usedforsecurity=False)
    if path.is_file():
        with open(path, "rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
    if digest.hexdigest() != md5:
        raise WeightsError(f"{path} must be TensorNets' file, of MD5 {md5}: delete any other")
    with np.load(path, allow_pickle=True, encoding="latin1") as file:
        names, values = file["names"].astype(str), file["values"]  # as bytes, too
    names = [name.split(":")[0] for name in names]  # or with :0
    net, arrays = inception2(), {_key(name): _tensor(name, a) for name, a in zip(names, values)}
    net.load_state_dict(net.state_dict() | arrays)
    return net


def _key(name: str) -> str:
    """The name of an array in TensorNets, as ours in the network's state."""
    for theirs, ours in (
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
        name = name.replace(theirs, ours)
    return name


def _tensor(name: str, array: np.ndarray) -> torch.Tensor:
    """Convolutions are height x width x in x out, there; the linear layer is in x out."""
    array = torch.from_numpy(array.astype(np.float32))
    if "depthwise" in name:  # height x width x in x multiplier
        return array.permute(2, 3, 0, 1).flatten(0, 1)[:, None]
    return array.permute(3, 2, 0, 1) if array.dim() == 4 else array.T if array.dim() == 2 else array
