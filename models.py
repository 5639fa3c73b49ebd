"""The networks of the paper (section 5.1), each an `nn.Sequential` whose children are its units.

They take float images [N, 3, H, W] in [0, 1] and give logits [N, classes]. What the paper leaves
open of the two small ones, the widths above all, is ours; the README says how it was chosen.
Inception2 is TensorNets': Ioffe & Szegedy's BN-Inception (arXiv 1502.03167) with the weights of
TF-slim.
"""

import copy
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZIP_STORED

import numpy as np
import torch
from torch import nn
from torch.nn.functional import affine_grid, grid_sample, pad
from torch.nn.utils import skip_init


def mnist_net(classes: int = 10) -> nn.Sequential:
    """The 4-layer network for digits of 28 x 28: two convolutional, two fully connected units.

    Pooling and flattening stand inside a unit, so that there are exactly four. ReLU gives the same
    before a max-pooling, for four times the work.
    """
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()),
            conv2=nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()),
            fc1=nn.Sequential(nn.Flatten(), nn.Linear(64 * 7 * 7, 128), nn.ReLU()),
            fc2=nn.Linear(128, classes),
        )
    )


def cifar_net(classes: int = 9) -> nn.Sequential:
    """The 7-layer network for objects of 32 x 32: five convolutional, two fully connected units."""

    def conv(width, out):
        return nn.Sequential(nn.Conv2d(width, out, 3, padding=1), nn.ReLU())

    def halving(width, out):
        conv = nn.Conv2d(width, out, 3, padding=1)
        return nn.Sequential(conv, nn.MaxPool2d(2), nn.ReLU(), nn.Dropout(0.2))

    return nn.Sequential(
        OrderedDict(
            conv1=conv(3, 32),
            conv2=halving(32, 32),
            conv3=conv(32, 64),
            conv4=halving(64, 64),
            conv5=halving(64, 128),
            fc1=nn.Sequential(
                nn.Flatten(), nn.Linear(128 * 4 * 4, 256), nn.ReLU(), nn.Dropout(0.5)
            ),
            fc2=nn.Linear(256, classes),
        )
    )


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
PACS_GROUPS = {  # class of PACS: the classes of ILSVRC (from 0, by sorted WordNet id) that it is
    "dog": range(151, 269),
    "elephant": (101, 385, 386),
    "giraffe": (351, 352, 353),  # ILSVRC has none: hartebeest, impala and gazelle stand in
    "guitar": (402, 546),
    "horse": (339,),
    "house": (449, 580, 660),
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

    def extra_repr(self):
        return f"{self.kernel}, {self.value}"


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
    """A copy of Inception2 with the six classes of PACS: each the mean of its ILSVRC classes."""
    net = copy.deepcopy(net)
    old = net.logits.linear
    new = net.logits.linear = skip_init(nn.Linear, old.in_features, len(PACS_GROUPS))
    for row, group in enumerate(PACS_GROUPS.values()):
        new.weight.data[row] = old.weight.data[list(group)].mean(0)
        new.bias.data[row] = old.bias.data[list(group)].mean()
    return net


# ---------------------------------------------------------------- image-to-image (section 5.4)
#
# Units to stand before a network: images [N, 3, H, W] to images. Each starts as the identity, so
# that the network is at first what it was.


class Pixelwise(nn.Module):
    """x plus 1x1 convolutions of it: a map of colours."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.change = nn.Sequential(
            nn.Conv2d(3, width, 1), nn.ReLU(), _zero(nn.Conv2d(width, 3, 1))
        )

    def forward(self, x):
        return x + self.change(x)


class SpatialTransformer(nn.Module):
    """An affine map of each image, found by a small network (Jaderberg et al., NIPS 2015).

    Bilinear, black outside. The small network sees the image at 28 x 28.
    """

    def __init__(self):
        super().__init__()
        self.locate = nn.Sequential(
            nn.AdaptiveAvgPool2d(28),
            *(nn.Conv2d(3, 16, 5, stride=2, padding=2), nn.ReLU()),
            *(nn.Conv2d(16, 32, 5, stride=2, padding=2), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(32 * 7 * 7, 64), nn.ReLU()),
            _zero(nn.Linear(64, 6)),
        )
        self.register_buffer("identity", torch.eye(2, 3))

    def forward(self, x):
        theta = self.identity + self.locate(x).view(-1, 2, 3)
        return grid_sample(x, affine_grid(theta, x.shape, align_corners=False), align_corners=False)


class UNet(nn.Module):
    """x plus a small Pix2Pix U-Net of it (Isola et al., CVPR 2017); H and W multiples of 4.

    Pix2Pix has BatchNorm, too, whose statistics would stay at their start here.
    """

    def __init__(self, width: int = 32):
        super().__init__()
        sizes = {"kernel_size": 4, "stride": 2, "padding": 1}
        self.down1 = nn.Sequential(nn.Conv2d(3, width, **sizes), nn.LeakyReLU(0.2))
        self.down2 = nn.Sequential(nn.Conv2d(width, 2 * width, **sizes), nn.LeakyReLU(0.2))
        self.up2 = nn.Sequential(nn.ConvTranspose2d(2 * width, width, **sizes), nn.ReLU())
        self.up1 = _zero(nn.ConvTranspose2d(2 * width, 3, **sizes))

    def forward(self, x):
        half = self.down1(x)
        return x + self.up1(torch.cat([half, self.up2(self.down2(half))], 1))


def _zero(layer: nn.Module) -> nn.Module:
    """The layer with an output of zero at first."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


# ---------------------------------------------------------------- TensorNets' weights


class WeightsError(Exception):
    """A file of weights that cannot be used; the message says in a line what is wrong."""


def load_inception2(path: Path) -> nn.Sequential:
    """Inception2 with the weights of TensorNets' `inception2.npz`. Raises WeightsError."""
    try:
        if not path.is_file():
            raise OSError("No such file")
        with zipfile.ZipFile(path) as file:
            names, values = (_object_array(file, f"{name}.npy") for name in ("names", "values"))
        names = np.array(names).astype(str)  # as bytes, too
        arrays = {
            _key(name): _tensor(name, _numbers(stored))
            for name, stored in zip((name.split(":")[0] for name in names), values)  # or with :0
        }
    except Exception as error:  # a broken pickle may raise anything
        raise WeightsError(f"{path} cannot be read ({error!r}): delete it") from error
    net = inception2()
    state = net.state_dict()
    own = {key: value.shape for key, value in state.items() if "num_batches" not in key}
    if own != {name: array.shape for name, array in arrays.items()}:
        raise WeightsError(f"{path} does not hold the {len(own)} arrays of Inception2: delete it")
    net.load_state_dict(state | arrays)
    return net


BYTES = 1 << 27  # more than the weights take: 45 million, in old pickles half as many again


def _object_array(file: zipfile.ZipFile, name: str) -> list:
    """The elements of an array. One of arrays is pickled, and NumPy believes what a pickle says of
    the memory: unpickled here without NumPy."""
    member = file.getinfo(name)
    if member.file_size > BYTES or member.compress_type not in (ZIP_STORED, ZIP_DEFLATED):
        raise ValueError(f"{name} is too large, or of an unknown compression")
    with file.open(name) as array:
        version = np.lib.format.read_magic(array)
        read = getattr(np.lib.format, "read_array_header_{}_{}".format(*version))
        if read(array)[2].hasobject:
            return _Unpickler(array, encoding="latin1").load().state[-1]  # Python 2's, too
        array.seek(0)
        return list(np.lib.format.read_array(array, allow_pickle=False))


class _Stored:
    """What a pickle says of an array or of its dtype."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __setstate__(self, state):
        self.state = state


ALLOWED = {
    "numpy.ndarray": _Stored,
    "numpy.dtype": _Stored,
    "numpy.core.multiarray._reconstruct": _Stored,
    "numpy._core.multiarray._reconstruct": _Stored,
    "_codecs.encode": lambda text, encoding: text.encode("latin1"),  # bytes in old pickles
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if f"{module}.{name}" not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return ALLOWED[f"{module}.{name}"]


def _numbers(stored: _Stored) -> np.ndarray:
    """An array of floats."""
    _, shape, dtype, by_columns, content = stored.state
    kind, order = dtype.arguments[0], dtype.state[1]
    if kind not in ("f4", "f8"):
        raise ValueError(f"an array of {kind}")
    return np.frombuffer(content, order + kind).reshape(shape, order="F" if by_columns else "C")


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
