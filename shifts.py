"""Data: downloads, readers, splits, domain shifts, and built-in images.

A domain is a dictionary of splits, name: (images, labels). Images are uint8 [N, channels, H, W],
labels int64 [N]. A source domain has the splits "source" (its network is trained on these images),
"pool" (target training sets are drawn from it), "val" and "test". A target domain has only the last
three, and so does the real ILSVRC, whose network is already trained. No image is in two splits of a
domain. The splits, and the random numbers of a shift, depend only on DATA_SEED: they are the same
in every run.

Where nothing else is said, splits and shifts are those of the authors' code. It works on images in
[0, 1]. Here, the result of each shift is rounded to uint8, which needs a quarter of the memory.
"""

import gzip
import hashlib
import http.client
import io
import math
import re
import shutil
import struct
import tarfile
import time
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial, wraps
from itertools import islice
from pathlib import Path, PurePosixPath
from secrets import token_hex
from typing import BinaryIO
from urllib.parse import quote

import numpy as np
import torch
from torch.nn.functional import interpolate

DATA_SEED = 0

Data = tuple[torch.Tensor, torch.Tensor]  # images and labels
Report = Callable[[str], None]  # called with a line about the progress


class DataError(ValueError):
    """Data that cannot be used. The message says in one line what is wrong and what to do."""


class MissingError(DataError):
    """Data that is not there and could not be downloaded."""


# ---------------------------------------------------------------- domains

# Targets with images of their own. The other targets are shifted images of their source.
NATURAL = ("svhn", "cifar", "quickdraw", "art", "cartoon", "sketch")
# What the network of a source takes: number of channels, and side in pixels.
INPUT_SHAPES = {"mnist": (1, 28), "cifar": (3, 32), "quickdraw": (1, 32)}


def needs(source: str, target: str) -> list[str]:
    """The names in DATASETS of the data sets that a scenario reads."""
    if target in PACS:  # of its source, ILSVRC, only the network is needed
        return [target]
    if target in NATURAL:
        return [source, target]
    if target == "mnist-m":
        return [source, "bsds500"]
    return [source]


def provide(names: list[str], root: Path, report: Report = lambda text: None) -> None:
    """Download the data sets that are not in `root` yet. Raises DataError."""
    if any(name in ("bsds500", "ilsvrc", *PACS) for name in names):
        _pillow()  # if it is missing, say so before anything is downloaded
    for name in names:
        if not is_complete(name, root):
            DATASETS[name].download(root, report)


def load(
    source: str, target: str | None, root: Path | None, report: Report = lambda text: None
) -> dict[str, Data]:
    """A source domain, or one of its targets, as images that the source's network takes.

    Args:
        source: "mnist", "cifar", "quickdraw" or "ilsvrc".
        target: A target of this source, or None for the source domain itself.
        root: The folder of the real data, or None for built-in images.
        report: Called with lines about the progress.

    Raises DataError.
    """
    name = target if target in NATURAL else source
    shift = SHIFTS.get((source, target), _unshifted)
    if target == "mnist-m":
        photos = _photos(root) if root else draw_photos()
        shift = partial(shift, photos=photos)
    if root and name == "ilsvrc":
        return _ilsvrc(root, report, shift)
    if root and name in PACS:
        return _pacs(name, root, report, shift)

    domain = REAL_DOMAINS[name](root) if root else _built_in(name)
    splits = ("pool", "val", "test") if target else list(domain)
    inputs = {}
    for split in splits:
        images, labels = domain[split]
        images = shift(images, _generator(f"{source} {target} {split}"))
        if source in INPUT_SHAPES:
            images = _to_input(images, *INPUT_SHAPES[source])
        inputs[split] = images, labels
    return inputs


def _unshifted(x: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    return x


def _to_input(x: torch.Tensor, channels: int, side: int) -> torch.Tensor:
    """Resize images, and average their channels or repeat their only one."""
    if x.shape[2] != side:
        x = _resized(x, side)
    if x.shape[1] > channels:
        x = _map_chunks(lambda chunk: chunk.mean(1, keepdim=True), x)
    return x.expand(-1, channels, -1, -1)


def subsample(data: Data, ratio: int, largest_ratio: int, seed: int) -> Data:
    """Draw the share ratio / largest_ratio of each class, rounded up (section 5.1, Table 2).

    At the largest ratio, all images are taken.
    """
    images, labels = data
    if ratio == largest_ratio:  # no second copy of a large pool
        return data
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen = []
    for label in labels.unique():
        indices = order[labels[order] == label]
        chosen.append(indices[: math.ceil(ratio * len(indices) / largest_ratio)])
    chosen = torch.cat(chosen)
    return images[chosen], labels[chosen]


def _generator(name: str) -> torch.Generator:
    """Random numbers that depend only on a name and on DATA_SEED."""
    return torch.Generator().manual_seed(DATA_SEED + zlib.crc32(name.encode()))


# ---------------------------------------------------------------- shifts
#
# A shift takes images [N, channels, H, W] and a random number generator, and returns new images.
# Floats are always float32, so that PyTorch's default dtype does not change an image.


def blur(x: torch.Tensor, rng: torch.Generator, taps: int, reach: float) -> torch.Tensor:
    """Convolve with a kernel of taps x taps pixels. Outside of the image is black.

    As in the authors' code, the kernel is the outer product of sqrt(p) with itself, divided by its
    sum, where p[i] is the probability of a standard normal variable in the i-th of `taps` equal
    intervals. They cover `reach` standard deviations on both sides of 0, and a margin of
    (reach + 0.5) / taps. An even kernel has one pixel more on the right and below its center.
    """
    edge = reach + (reach + 0.5) / taps
    bounds = torch.linspace(-edge, edge, taps + 1, dtype=torch.float32)
    kernel_1d = torch.special.ndtr(bounds).diff().sqrt()
    kernel_1d = kernel_1d / kernel_1d.sum()

    # matrix[i, j] is the weight of input pixel j in output pixel i: a tap of the kernel, or 0 where
    # the kernel around i does not reach j. So matrix @ x convolves columns, x @ matrix.T rows.
    pixel = torch.arange(x.shape[2])
    tap_index = pixel - pixel[:, None] + (taps - 1) // 2
    is_in_kernel = (0 <= tap_index) & (tap_index < taps)
    matrix = kernel_1d[tap_index.clamp(0, taps - 1)].where(is_in_kernel, 0)
    return _map_chunks(lambda chunk: matrix @ chunk @ matrix.T, x)


def occlude(x: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """A black square, half as high and half as wide as the image, at a random place.

    Its first row and column are floor(u * side / 2), with u uniform in [0, 1).
    """
    side = x.shape[2]
    start = (_rand(2, len(x), 1, rng=rng) * side / 2).long()
    pixel = torch.arange(side)
    is_covered = (start <= pixel) & (pixel < start + side // 2)  # (2, N, side)
    columns, rows = is_covered
    return x.masked_fill(rows[:, None, :, None] & columns[:, None, None, :], 0)


def noise(x: torch.Tensor, rng: torch.Generator, sigma: float) -> torch.Tensor:
    """floor(x + sigma n), clipped to 0...255; n is standard normal for each pixel and channel."""

    def noisy(chunk):
        return (chunk + sigma * _randn(*chunk.shape, rng=rng)).floor()

    return _map_chunks(noisy, x)


def photo_background(
    x: torch.Tensor, rng: torch.Generator, photos: list[torch.Tensor]
) -> torch.Tensor:
    """MNIST-M: random patches of photos, inverted where x > 0. Returns images [N, 3, H, W].

    `photos` are uint8 [3, h, w] each. Ganin's original is |patch - x|, with the grey values of x.
    """
    num_images, _, height, width = x.shape
    photo_of_image = torch.randint(len(photos), (num_images,), generator=rng)
    place = _rand(2, num_images, rng=rng)
    patches = x.new_empty(num_images, 3, height, width)
    for number, photo in enumerate(photos):
        indices = (photo_of_image == number).nonzero()[:, 0]
        windows = photo.unfold(1, height, 1).unfold(2, width, 1)  # (3, rows, columns, H, W)
        row = (place[0, indices] * windows.shape[1]).long()
        column = (place[1, indices] * windows.shape[2]).long()
        patches[indices] = windows[:, row, column].transpose(0, 1)
    return torch.where(x > 0, 255 - patches, patches)


def transform_random(x: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """An affine map for each image, with uniform parameters (see `affine`).

    The angle is in [-1.5, 1.5). For x and for y, the scale is in [1, 2.5), and the move, in pixels,
    in [-(scale - 1) / 2, (scale - 1) / 2): at most 0.75 pixels, as in the authors' code.
    """
    u = _rand(5, len(x), rng=rng)
    angle = 3 * u[0] - 1.5
    scale = 1 + 1.5 * u[1:3].T  # (N, 2)
    move = (u[3:5].T - 0.5) * (scale - 1)  # (N, 2)
    return affine(x, angle, scale, move)


def transform_fixed(x: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """One affine map for all images, with the parameters of the authors' code."""
    return affine(x, angle=[-0.3764], scale=[[2.4261, 2.0980]], move=[[-0.1407, 0.3777]])


def affine(x: torch.Tensor, angle, scale, move) -> torch.Tensor:
    """Each output pixel is the input pixel at the mapped place, or black outside of the image.

        input = center + S R (output - center) + move, rounded to the nearest pixel,
        R = [[cos(angle), -sin(angle)], [sin(angle), cos(angle)]], S = diag(scale), on (x, y)

    Args:
        x: Images [N, channels, H, W].
        angle: [N] in radians. Positive angles turn the image anti-clockwise.
        scale: [N, 2] for x and y. Larger values make the image smaller.
        move: [N, 2] for x and y, in pixels.

    The parameters may also have one row for all images.
    """
    angle = torch.as_tensor(angle, dtype=torch.float32)
    scale = torch.as_tensor(scale, dtype=torch.float32)
    move = torch.as_tensor(move, dtype=torch.float32)
    height, width = x.shape[2:]
    center = torch.tensor([width / 2, height / 2], dtype=torch.float32)
    row_and_column = torch.cartesian_prod(torch.arange(height), torch.arange(width))  # (H W, 2)
    offset = row_and_column.flip(1) - center  # output - center, as (x, y)

    def mapped(chunk, angle, scale, move):
        cos, sin = angle.cos(), angle.sin()
        transposed_rotation = torch.stack([cos, sin, -sin, cos], 1).view(-1, 2, 2)
        scaled = (offset @ transposed_rotation) * scale[:, None]
        place = scaled + center + move[:, None]  # (N, H W, 2)
        column, row = (place + 0.5).floor().long().unbind(2)
        is_inside = (0 <= column) & (column < width) & (0 <= row) & (row < height)
        index = (row * width + column).where(is_inside, 0)[:, None]  # (N, 1, H W)
        pixels = chunk.flatten(2).gather(2, index.expand(*chunk.shape[:2], -1))
        return pixels.where(is_inside[:, None], 0).view_as(chunk)

    if len(angle) == 1:  # the same parameters for all chunks of images
        return _map_chunks(lambda chunk: mapped(chunk, angle, scale, move), x)
    return _map_chunks(mapped, x, angle, scale, move)


def rotate(x: torch.Tensor, rng: torch.Generator, angle: float) -> torch.Tensor:
    """Turn all images anti-clockwise by `angle` radians.

    A mirrored border of a quarter of the side is added first. After the rotation, the middle three
    quarters of the larger image are resized to the old size.
    """
    side = x.shape[2]
    padded = _with_mirrored_border(x, side // 4)
    rotated = affine(padded, angle=[angle], scale=[[1, 1]], move=[[0, 0]])
    cut = padded.shape[2] // 8
    return _resized(rotated[:, :, cut:-cut, cut:-cut], side)


def scaling_symmetric(x: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Add a mirrored border of 40 % of the side, and resize to the old size."""
    side = x.shape[2]
    return _resized(_with_mirrored_border(x, int(0.4 * side)), side)


def scaling_stretch(x: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Add mirrored borders of 1, 2, 4, ... pixels one after the other, and resize to the old size.

    For images of 224 pixels, the last border has 64. Each border also mirrors the borders before
    it, so the few pixels at the edge are repeated again and again, which looks stretched.
    """
    side = x.shape[2]
    max_border = side * 64 // 224
    padded = x
    border = 1
    while border <= max_border:
        padded = _with_mirrored_border(padded, border)
        border *= 2
    return _resized(padded, side)


def _with_mirrored_border(x: torch.Tensor, border: int) -> torch.Tensor:
    """Mirror the image at its edges. The pixels at the edge appear twice (NumPy's "symmetric")."""
    x = torch.cat([x[:, :, :border].flip(2), x, x[:, :, -border:].flip(2)], 2)
    return torch.cat([x[..., :border].flip(3), x, x[..., -border:].flip(3)], 3)


def _resized(x: torch.Tensor, side: int) -> torch.Tensor:
    """Square images of another size: bilinear, without antialiasing."""
    return _map_chunks(partial(interpolate, size=(side, side), mode="bilinear"), x)


def yuv(x: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Analogue Y, U and V in place of R, G and B: a linear map, clipped to 0...255.

    Clipping removes the negative halves of U and V.
    """
    y = [0.299, 0.587, 0.114]
    u = [-0.14714, -0.28887, 0.43601]
    v = [0.61498, -0.51497, -0.10001]
    matrix = torch.tensor([y, u, v], dtype=torch.float32)
    return _map_chunks(lambda chunk: torch.einsum("oc,nchw->nohw", matrix, chunk), x)


def hsv(x: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Hue, saturation and value in place of R, G and B, each from 0 to 255. The hue of grey is 0.

    With value = max(R, G, B) and span = value - min(R, G, B), saturation = 255 span / value, and
    hue = 255 / 6 (sixths mod 6), where

        sixths = (G - B) / span      if R is the largest,
                 (B - R) / span + 2  if G is the largest,
                 (R - G) / span + 4  if B is the largest.
    """

    def converted(chunk):
        value, largest_channel = chunk.max(1)
        span = value - chunk.amin(1)
        red, green, blue = chunk.unbind(1)
        differences = torch.stack([green - blue, blue - red, red - green], 1)
        difference = differences.gather(1, largest_channel[:, None])[:, 0]
        sixths = difference / span.clamp(min=1) + 2 * largest_channel
        hue = (sixths % 6 / 6 * 255).masked_fill(span == 0, 0)
        saturation = span / value.clamp(min=1) * 255
        return torch.stack([hue, saturation, value], 1)

    return _map_chunks(converted, x)


def _map_chunks(function, x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
    """Apply a function to the images in float32, and round and clip the result to uint8.

    The function takes a chunk of the images, and of each of the parameters, which have one row per
    image. All images in float32 at once would need much memory.
    """
    chunk_size = 250
    results = []
    for start in range(0, len(x), chunk_size):
        chunk = slice(start, start + chunk_size)
        chunk_parameters = [parameter[chunk] for parameter in parameters]
        result = function(x[chunk].float(), *chunk_parameters)
        results.append(result.round().clamp(0, 255).byte())
    return torch.cat(results)


def _rand(*shape: int, rng: torch.Generator) -> torch.Tensor:
    return torch.rand(shape, generator=rng, dtype=torch.float32)


def _randn(*shape: int, rng: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=rng, dtype=torch.float32)


SHIFTS = {  # by source and target; sizes and strengths are those of the authors' code
    ("mnist", "blurry"): partial(blur, taps=8, reach=1.0),
    ("mnist", "occluded"): occlude,
    ("mnist", "mnist-m"): photo_background,
    ("mnist", "transform-random"): transform_random,
    ("mnist", "transform-fixed"): transform_fixed,
    ("cifar", "noisy"): partial(noise, sigma=30),
    ("cifar", "blurry"): partial(blur, taps=4, reach=0.5),
    ("quickdraw", "noisy"): partial(noise, sigma=30),
    ("quickdraw", "blurry"): partial(blur, taps=5, reach=0.5),
    ("ilsvrc", "yuv"): yuv,
    ("ilsvrc", "hsv"): hsv,
    ("ilsvrc", "rotation"): partial(rotate, angle=0.6),
    ("ilsvrc", "scaling-symmetric"): scaling_symmetric,
    ("ilsvrc", "scaling-stretch"): scaling_stretch,
}


# ---------------------------------------------------------------- downloads

TIMEOUT = 5  # seconds without an answer after which a download is given up
MIN_BYTES_PER_SECOND = 1000  # a download that is slower on average is given up, too
MAX_READ_BYTES = 1 << 28  # of a file that is read or unpacked; CIFAR's archive has 184 million
MAX_DOWNLOAD_BYTES = 4 * MAX_READ_BYTES
REPLACE_HINT = "replace it, or delete the data set, which is then downloaded again"


class _SizeLimited:
    """A file that raises ValueError where more than MAX_READ_BYTES would be read in all.

    So no file can fill the memory, whatever it unpacks to.
    """

    def __init__(self, file: BinaryIO):
        self.file = file
        self.num_left = MAX_READ_BYTES

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > self.num_left:
            size = self.num_left + 1  # one more than allowed, to notice it
        content = self.file.read(size)
        self.num_left -= len(content)
        if self.num_left < 0:
            raise ValueError(f"it has more than {MAX_READ_BYTES} bytes")
        return content


@dataclass(frozen=True)
class Files:
    """A data set of single files."""

    url: str | None  # of the folder with the files; None: it cannot be downloaded freely
    files: dict[str, str | None]  # path in the folder of the data: MD5, where one is known
    num_bytes: int | None = None  # how many bytes of each file are needed; None: all

    def paths(self, root: Path) -> list[Path]:
        return [_unzipped(root / file) for file in self.files]

    def download(self, root: Path, report: Report) -> None:
        """Raises MissingError."""
        for file, md5 in self.files.items():
            path = root / file
            if not self.url:
                raise MissingError(
                    f"{path} is missing, and cannot be downloaded freely: put ILSVRC2012's "
                    "validation images there, <wnid>/*.JPEG"
                )
            if not _unzipped(path).exists():
                fetch(self.url + quote(path.name), path, md5, report, self.num_bytes)


@dataclass(frozen=True)
class Archive:
    """A data set in a zip or tar.gz archive. Data sets of the same archive are unpacked together."""

    url: str
    md5: str | None
    member_pattern: str  # of the data set's files in the archive; its group is the path in `folder`
    folder: str
    num_files: int

    def paths(self, root: Path) -> list[Path]:
        return [root / self.folder]

    def download(self, root: Path, report: Report) -> None:
        """Raises MissingError."""
        # Several processes may download at once, so the name has to be unique.
        path = root / f"{token_hex(4)}-{PurePosixPath(self.url).name}"
        fetch(self.url, path, self.md5, report, path_in_message=root / self.folder)
        try:
            for name, other in DATASETS.items():
                if other.url == self.url and not is_complete(name, root):
                    _unpack(path, other, root / other.folder)
        finally:
            path.unlink()


# CIFAR's classes without deer, in CIFAR's order
QUICKDRAW = ("airplane", "car", "bird", "cat", "dog", "frog", "horse", "cruise ship", "truck")
QUICKDRAW_ROWS = 10000  # drawings of each class that are used
# Domain: its folder, and its number of images, including the class "person", which is not used.
PACS = {"art": ("art_painting", 2048), "cartoon": ("cartoon", 2344), "sketch": ("sketch", 3929)}
PACS_URL = (
    "https://github.com/MachineLearning2020/Homework3-PACS/archive/"
    "d586a6cf3db84896fb6cc465c7bf51bdaf6d65d8.zip"
)


def _pacs_archive(name: str) -> Archive:
    folder, num_images = PACS[name]
    return Archive(
        url=PACS_URL,
        md5=None,
        member_pattern=rf".*/{folder}/(\w+/[\w-]+\.(?:jpg|png))",
        folder=f"pacs/{folder}",
        num_files=num_images,
    )


DATASETS = {
    "mnist": Files(
        url="https://ossci-datasets.s3.amazonaws.com/mnist/",
        files={
            "mnist/train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "mnist/train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
            "mnist/t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
            "mnist/t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
        },
    ),
    "svhn": Files(
        url="http://ufldl.stanford.edu/housenumbers/",
        files={
            "svhn/train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
            "svhn/test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
        },
    ),
    "cifar": Archive(
        url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        md5="c32a1d4ab5d03f1284b67883e8d87530",
        member_pattern=r"cifar-10-batches-bin/(\w+\.bin)",
        folder="cifar-10-batches-bin",
        num_files=6,
    ),
    "quickdraw": Files(
        url="https://storage.googleapis.com/quickdraw_dataset/full/numpy_bitmap/",
        files={f"quickdraw/{name}.npy": None for name in QUICKDRAW},
        num_bytes=QUICKDRAW_ROWS * 784 + 1024,  # with the header
    ),
    "bsds500": Archive(
        url="http://www.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/BSR/BSR_bsds500.tgz",
        md5=None,
        member_pattern=r"BSR/BSDS500/data/images/train/(\w+\.jpg)",
        folder="bsds500",
        num_files=200,
    ),
    "ilsvrc": Files(url=None, files={"ilsvrc/val": None}),
    "inception2": Files(
        url="https://github.com/taehoonlee/deep-learning-models/releases/download/inception/",
        files={"inception2.npz": "0476b876a5d35a99e2747f98248d856d"},
    ),
    "art": _pacs_archive("art"),
    "cartoon": _pacs_archive("cartoon"),
    "sketch": _pacs_archive("sketch"),
}


def is_complete(name: str, root: Path) -> bool:
    """Whether all files of a data set are there."""
    return all(path.exists() for path in DATASETS[name].paths(root))


@cache
def checksum(name: str, root: Path) -> str:
    """The MD5 of a data set: of the names and contents of all files but hidden ones."""
    md5 = partial(hashlib.md5, usedforsecurity=False)
    names_and_digests = md5()
    for path in DATASETS[name].paths(root):
        # In a folder there are files, or folders of files.
        paths = [path, *path.glob("[!.]*"), *path.glob("[!.]*/[!.]*")]
        for file_path in sorted(filter(Path.is_file, paths)):
            with open(file_path, "rb") as file:
                digest = hashlib.file_digest(file, md5).hexdigest()
            line = f"{file_path.relative_to(root)} {digest}\n"
            names_and_digests.update(line.encode(errors="surrogateescape"))
    return names_and_digests.hexdigest()


def _unzipped(path: Path) -> Path:
    """The path without .gz, if the unpacked file is there instead."""
    if path.suffix == ".gz" and path.with_suffix("").exists():
        return path.with_suffix("")
    return path


def fetch(
    url: str,
    path: Path,
    md5: str | None,
    report: Report,
    num_bytes: int | None = None,
    path_in_message: Path | None = None,
) -> None:
    """Download `url`, or its first `num_bytes` bytes, to `path`, which exists only when complete.

    Raises MissingError. Its message asks the user to provide `path_in_message`, by default `path`.
    """
    part = path.with_name(f"{path.name}.{token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = _download(url, part, path.name, report, num_bytes)
        if md5 and digest != md5:
            raise OSError(f"its MD5 is not {md5}")
        part.replace(path)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = f"downloading {url} failed ({_one_line(error)})"
        missing = path_in_message or path
        raise MissingError(f"{missing} is missing, and {reason}: put it there") from error
    finally:
        part.unlink(missing_ok=True)


def _download(url: str, part: Path, name: str, report: Report, num_bytes: int | None) -> str:
    """Write what the server sends to `part`, and return its MD5."""
    request = urllib.request.Request(url)
    if num_bytes:
        request.add_header("Range", f"bytes=0-{num_bytes - 1}")
    limit = num_bytes or MAX_DOWNLOAD_BYTES  # also where a server ignores the range
    digest = hashlib.md5(usedforsecurity=False)
    received = 0
    start = time.monotonic()
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response, open(part, "wb") as file:
        total = int(response.headers.get("Content-Length") or 0)
        expected = min(total, limit)
        while received < limit:
            chunk = response.read1(min(1 << 18, limit - received))
            if not chunk:
                break
            file.write(chunk)
            digest.update(chunk)
            received += len(chunk)
            report(f"downloading {name}, {received >> 20} of {expected >> 20} MiB")
            if time.monotonic() - start > TIMEOUT + received / MIN_BYTES_PER_SECOND:
                raise OSError("it is too slow")
    if received < expected:
        raise OSError(f"it ended after {received} of {expected} bytes")
    if received == MAX_DOWNLOAD_BYTES:
        raise OSError(f"it has {MAX_DOWNLOAD_BYTES} bytes or more")
    return digest.hexdigest()


def _unpack(path: Path, archive: Archive, folder: Path) -> None:
    """Unpack the files of a data set to `folder`, which exists only when complete.

    Raises MissingError.
    """
    part = folder.with_name(f"{folder.name}.{token_hex(4)}.part")
    names = set()
    try:
        part.mkdir(parents=True)
        for member_name, file in _members(path):
            match = re.fullmatch(archive.member_pattern, member_name)
            if not match:
                continue
            name = match[1]  # the patterns allow no "..", so it is inside of the folder
            names.add(name)
            if len(names) > archive.num_files:
                raise ValueError("it has more files than it should")
            (part / name).parent.mkdir(exist_ok=True)
            (part / name).write_bytes(_SizeLimited(file).read())
        if len(names) != archive.num_files:
            raise ValueError(f"it has {len(names)} of {archive.num_files} files")
        if not folder.exists():  # another process may have been faster
            part.rename(folder)
    except Exception as error:  # a broken archive may raise anything
        reason = f"unpacking {archive.url} failed ({_one_line(error)})"
        raise MissingError(f"{folder} is missing, and {reason}: put the files there") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _members(path: Path) -> Iterator[tuple[str, BinaryIO]]:
    """The name of each file in a zip or tar.gz archive, and the file, opened."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise ValueError("its compression is not supported")
                yield member.filename, archive.open(member)
    else:
        with gzip.open(path) as file:
            limited_file = _SizeLimited(file)
            with tarfile.open(fileobj=limited_file, mode="r|") as archive:
                for member in archive:
                    if member.isfile():
                        yield member.name, archive.extractfile(member)
            limited_file.read()  # read the rest, so that gzip verifies its checksum


# ---------------------------------------------------------------- readers


def _file_reader(parse):
    """Decorator that turns parse(bytes) into read(path).

    Files that end in .gz are unpacked. Whatever goes wrong becomes a DataError.
    """

    @wraps(parse)
    def read(path: Path):
        try:
            if path.exists() and not path.is_file():
                raise ValueError("it is no file")  # reading a pipe could wait forever
            with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
                return parse(_SizeLimited(file).read())
        except Exception as error:  # a broken file may raise anything
            raise DataError(
                f"{path} cannot be read ({_one_line(error)}): {REPLACE_HINT}"
            ) from error

    return read


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@_file_reader
def read_idx(content: bytes) -> torch.Tensor:
    """The uint8 array of an IDX file."""
    if content[:3] != b"\0\0\x08":
        raise ValueError("it is not an IDX file of bytes")
    num_dimensions = content[3]
    start = 4 + 4 * num_dimensions
    shape = np.frombuffer(content[4:start], ">u4")
    return torch.from_numpy(np.frombuffer(content[start:], np.uint8).reshape(shape).copy())


CIFAR_RECORDS = 10000  # images in a file


@_file_reader
def read_cifar(content: bytes) -> Data:
    """Images [N, 3, 32, 32] and labels [N] of CIFAR-10's binary format."""
    records = torch.from_numpy(np.frombuffer(content, np.uint8).copy()).view(-1, 3073)
    labels = records[:, 0]
    if len(records) != CIFAR_RECORDS or labels.max() > 9:
        raise ValueError(f"it is not {CIFAR_RECORDS} images of CIFAR-10")
    return records[:, 1:].unflatten(1, (3, 32, 32)), labels.long()


@_file_reader
def read_drawings(content: bytes) -> np.ndarray:
    """The first drawings, uint8 [N, 784], of one of QuickDraw's .npy files.

    Of the file, only the beginning may be there.
    """
    file = io.BytesIO(content)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("it is not a .npy file of version 1.0")
    shape, is_fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype != np.uint8 or is_fortran_order or shape[1:] != (784,):
        raise ValueError(f"it holds {dtype} {shape}, not uint8 (N, 784)")
    if len(content) - file.tell() > shape[0] * 784:
        raise ValueError("it is longer than it says")
    num_rows = min(shape[0], QUICKDRAW_ROWS)
    return np.frombuffer(file.read(num_rows * 784), np.uint8).reshape(num_rows, 784)


MAT_DTYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8"}
MAT_COMPRESSED = 15


@_file_reader
def read_mat(content: bytes) -> dict[str, np.ndarray]:
    """The first two arrays of a little-endian MATLAB-5 file, by name."""
    if content[126:128] != b"IM":
        raise ValueError("it is not a little-endian MATLAB-5 file")
    arrays = {}
    for kind, element in islice(_mat_elements(content[128:]), 2):
        if kind == MAT_COMPRESSED:
            unpacked = zlib.decompressobj().decompress(element, MAX_READ_BYTES)
            [(_, element)] = _mat_elements(unpacked)  # exactly one
        # An array consists of its flags, shape, name and values, each as (kind, bytes).
        parts = islice(_mat_elements(element), 4)
        _, (_, shape_bytes), (_, name_bytes), (value_kind, value_bytes) = parts
        values = np.frombuffer(value_bytes, MAT_DTYPES[value_kind])
        shape = np.frombuffer(shape_bytes, "<u4")
        arrays[name_bytes.decode()] = values.reshape(shape, order="F")
    return arrays


def _mat_elements(content: bytes) -> Iterator[tuple[int, bytes]]:
    """The type and the content of each data element."""
    position = 0
    while position < len(content):
        kind, size = struct.unpack_from("<II", content, position)
        start = position + 8
        if kind > 0xFFFF:  # a small element: the upper half is its size, and the content follows
            size = kind >> 16
            kind = kind & 0xFFFF
            start = position + 4
        end = start + size
        if end > len(content):
            raise ValueError("it ends early")
        yield kind, content[start:end]
        position = end
        if kind != MAT_COMPRESSED:
            position += -position % 8  # the others are padded to eight bytes


MAX_PIXELS = 1 << 25


@_file_reader
def read_image(content: bytes) -> torch.Tensor:
    """An RGB image, uint8 [3, H, W], of a JPEG or PNG file. Transparency is drawn on white."""
    pillow = _pillow()
    pillow.open(io.BytesIO(content), formats=("JPEG", "PNG")).verify()  # checks a PNG's checksums
    with pillow.open(io.BytesIO(content), formats=("JPEG", "PNG")) as file:
        if math.prod(file.size) > MAX_PIXELS:
            raise ValueError(f"it has {file.size} pixels")
        if file.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK"):
            raise ValueError(f"its colours are of mode {file.mode}: save it with 8 bits")
        image = file
        if file.mode in ("LA", "RGBA") or "transparency" in file.info:
            white = pillow.new("RGBA", file.size, "white")
            image = pillow.alpha_composite(white, file.convert("RGBA"))
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _pillow():
    try:
        from PIL import Image
    except ImportError:
        raise DataError("images are read with Pillow: pip install pillow") from None
    return Image


# ---------------------------------------------------------------- real domains

MIN_IMAGES = 60  # of MNIST's and SVHN's files: enough for an image in every split


@cache
def _mnist(root: Path) -> dict[str, Data]:
    """The first 5,000 training images are "val", then 25,000 random ones "source", 30,000 "pool"."""
    train_images, train_labels, test_images, test_labels = DATASETS["mnist"].files
    images, labels = _digits(root, train_images, train_labels)
    num_val = len(labels) * 5 // 60  # in proportion, so that shorter files work, too
    rest = images[num_val:], labels[num_val:]
    splits = _random_split(rest, "mnist", source=25, pool=30)
    splits["val"] = images[:num_val], labels[:num_val]
    splits["test"] = _digits(root, test_images, test_labels)
    return splits


def _digits(root: Path, images_file: str, labels_file: str) -> Data:
    images = read_idx(_unzipped(root / images_file))
    labels = read_idx(_unzipped(root / labels_file))
    has_shapes = images.shape[1:] == (28, 28) and labels.shape == images.shape[:1]
    if not has_shapes or len(labels) < MIN_IMAGES or labels.max() > 9:
        raise DataError(f"{root / 'mnist'}: the files are not MNIST's: delete them")
    return images[:, None], labels.long()


@cache
def _svhn(root: Path) -> dict[str, Data]:
    """The first 10,000 of the 73,257 training images are "val", all others "pool"."""
    train_file, test_file = DATASETS["svhn"].files
    images, labels = _house_numbers(root / train_file)
    num_val = len(labels) * 10000 // 73257  # in proportion, so that shorter files work, too
    return {
        "pool": (images[num_val:], labels[num_val:]),
        "val": (images[:num_val], labels[:num_val]),
        "test": _house_numbers(root / test_file),
    }


def _house_numbers(path: Path) -> Data:
    arrays = read_mat(path)
    images = arrays.get("X", np.empty(0))  # (32, 32, 3, N)
    labels = arrays.get("y", np.empty(0))  # (N, 1)
    has_shapes = images.shape == (32, 32, 3, len(labels)) and labels.shape == (len(labels), 1)
    has_labels = len(labels) >= MIN_IMAGES and np.isin(labels, range(1, 11)).all()
    if images.dtype != np.uint8 or not has_shapes or not has_labels:
        raise DataError(f"{path} does not hold images and labels of SVHN: {REPLACE_HINT}")
    images = np.ascontiguousarray(images.transpose(3, 2, 0, 1))
    labels = labels[:, 0].astype(np.int64) % 10  # the label of zero is 10
    return torch.from_numpy(images), torch.from_numpy(labels)


@cache
def _cifar(root: Path) -> dict[str, Data]:
    """CIFAR-10 without deer. Training batches 1, 2 are "source", 3, 4 "pool", 5 "val"."""
    files = {
        "source": ["data_batch_1.bin", "data_batch_2.bin"],
        "pool": ["data_batch_3.bin", "data_batch_4.bin"],
        "val": ["data_batch_5.bin"],
        "test": ["test_batch.bin"],
    }
    deer = 4
    splits = {}
    for split, names in files.items():
        batches = [read_cifar(root / "cifar-10-batches-bin" / name) for name in names]
        images = torch.cat([batch_images for batch_images, _ in batches])
        labels = torch.cat([batch_labels for _, batch_labels in batches])
        is_kept = labels != deer
        labels = labels - (labels > deer).long()  # without a gap
        splits[split] = images[is_kept], labels[is_kept]
    return splits


@cache
def _quickdraw(root: Path) -> dict[str, Data]:
    """The first 10,000 drawings of each class, dark on white [N, 1, 28, 28], shuffled together.

    Of these 90,000, 35,000 are "source", 30,000 "pool", 5,000 "val", 15,000 "test", 5,000 unused.
    """
    drawings = [255 - read_drawings(root / file) for file in DATASETS["quickdraw"].files]
    images = torch.from_numpy(np.concatenate(drawings)).view(-1, 1, 28, 28)
    num_drawings = torch.tensor([len(class_drawings) for class_drawings in drawings])
    labels = torch.arange(len(drawings)).repeat_interleave(num_drawings)
    shares = {"source": 35, "pool": 30, "val": 5, "test": 15, "unused": 5}
    splits = _random_split((images, labels), "quickdraw", **shares)
    del splits["unused"]
    return splits


def _random_split(data: Data, name: str, **shares: int) -> dict[str, Data]:
    """Shuffle the images, and divide them into splits with sizes in proportion to the shares."""
    images, labels = data
    order = torch.randperm(len(labels), generator=_generator(name))
    splits = {}
    start = 0
    cumulative_share = 0
    for split, share in shares.items():
        cumulative_share += share
        end = len(labels) * cumulative_share // sum(shares.values())
        if end == start:
            raise DataError(f"{name}: {len(labels)} images are too few for its splits")
        splits[split] = images[order[start:end]], labels[order[start:end]]
        start = end
    return splits


SIDE = 224  # pixels of an image of ILSVRC and of PACS
PACS_CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house")  # without "person"


def _ilsvrc(root: Path, report: Report, shift: Callable) -> dict[str, Data]:
    """ILSVRC2012's validation images, shuffled: 25,000 "pool", 5,000 "val", 20,000 "test".

    The central square, with 224 / 256 of the shorter side, is resized to 224 x 224 pixels.
    """
    folder = root / "ilsvrc" / "val"
    classes = sorted(path.name for path in folder.glob("*") if path.is_dir())
    if len(classes) != 1000 or not all(re.fullmatch(r"n\d{8}", name) for name in classes):
        found = f"{len(classes)}, the first {classes[:1]}"
        raise DataError(f"{folder} should have 1000 folders named by WordNet id, not {found}")
    paths, labels = _image_folder(folder, classes)
    indices = torch.arange(len(labels))
    splits = _random_split((indices, labels), "ilsvrc", pool=25, val=5, test=20)
    return _read_images(paths, splits, report, shift, crop=224 / 256)


def _pacs(name: str, root: Path, report: Report, shift: Callable) -> dict[str, Data]:
    """A domain of PACS, split within each class: 70 % "pool", 10 % "val", 20 % "test"."""
    paths, labels = _image_folder(root / DATASETS[name].folder, PACS_CLASSES)
    splits_of_class = []
    for label in range(len(PACS_CLASSES)):
        indices = (labels == label).nonzero()[:, 0]
        data = indices, labels[indices]
        splits_of_class.append(_random_split(data, f"{name} {label}", pool=7, val=1, test=2))

    splits = {}
    for split in ("pool", "val", "test"):
        indices = torch.cat([class_splits[split][0] for class_splits in splits_of_class])
        splits[split] = indices, labels[indices]
    return _read_images(paths, splits, report, shift)


def _image_folder(folder: Path, classes) -> tuple[list[Path], torch.Tensor]:
    """The paths of all images, folder/class/*, and their labels. The case of names is ignored."""
    class_folders = {path.name.lower(): path for path in folder.glob("*")}
    paths = []
    labels = []
    for label, name in enumerate(classes):
        class_paths = []
        if name.lower() in class_folders:
            for path in sorted(class_folders[name.lower()].glob("*")):
                if path.suffix.lower() in (".jpg", ".jpeg", ".png"):
                    class_paths.append(path)
        if len(class_paths) < 10:  # a split of the class would be empty
            problem = f"{folder / name} has {len(class_paths)} images"
            raise DataError(f"{problem}: put 10 or more there, or delete {folder}")
        paths += class_paths
        labels += [label] * len(class_paths)
    return paths, torch.tensor(labels)


def _read_images(
    paths: list[Path],
    splits: dict[str, Data],
    report: Report,
    shift: Callable,
    crop: float | None = None,
) -> dict[str, Data]:
    """Read, crop, resize and shift images: shifting them later would need a second copy of all.

    `splits` has indices into `paths` in the place of images. `crop` is the side of a central square
    relative to the shorter side of an image. Without it, the whole image is resized.
    """

    def read(index):
        image = read_image(paths[index])
        if crop is not None:
            image = _center_crop(image, side=round(min(image.shape[1:]) * crop))
        return _resized(image[None], SIDE)

    domain = {}
    with ThreadPoolExecutor() as threads:
        for split, (indices, labels) in splits.items():
            images = torch.empty(len(labels), 3, SIDE, SIDE, dtype=torch.uint8)
            for start in range(0, len(labels), 256):
                batch = slice(start, start + 256)
                resized = torch.cat(list(threads.map(read, indices[batch])))
                images[batch] = shift(resized, None)  # these shifts draw no random numbers
                report(f"reading images of the {split} split, {start} of {len(labels)}")
            domain[split] = images, labels
    return domain


def _center_crop(image: torch.Tensor, side: int) -> torch.Tensor:
    """The central square [3, side, side] of an image [3, H, W]."""
    height, width = image.shape[1:]
    top = (height - side) // 2
    left = (width - side) // 2
    return image[:, top : top + side, left : left + side]


@cache
def _photos(root: Path) -> list[torch.Tensor]:
    """The training photos of BSDS500, each uint8 [3, h, w]."""
    photos = [read_image(path) for path in sorted((root / "bsds500").glob("*.jpg"))]
    if not photos or min(min(photo.shape[1:]) for photo in photos) < 28:
        folder = root / "bsds500"
        raise DataError(f"{folder} has no .jpg, or one smaller than 28 x 28: {REPLACE_HINT}")
    return photos


REAL_DOMAINS = {"mnist": _mnist, "svhn": _svhn, "cifar": _cifar, "quickdraw": _quickdraw}


# ---------------------------------------------------------------- built-in domains
#
# Images that are drawn by a program, so that everything runs without a file. They stand in for the
# data sets of the paper. They do not look like them, and results on them do not compare with the
# paper's.

STROKES = [  # the digits 0 to 9, each one stroke through points (x, y) on a grid of 10 x 10
    [(5, 1), (7.5, 3), (7.5, 7), (5, 9), (2.5, 7), (2.5, 3), (5, 1)],
    [(3, 3), (5, 1), (5, 9)],
    [(2, 3), (4, 1), (7, 1.5), (7.5, 4), (2, 9), (8, 9)],
    [(2, 2), (6, 1), (7.5, 3), (4.5, 5), (7.5, 7), (6, 9), (2, 8)],
    [(6.5, 9), (6.5, 1), (2, 6), (8.5, 6)],
    [(7.5, 1), (3, 1), (2.7, 4.5), (6, 4.2), (7.8, 6.5), (6, 9), (2, 8.3)],
    [(7, 1), (3.5, 4), (2.3, 7), (4.5, 9), (7.3, 7.3), (5.5, 5), (2.6, 6.5)],
    [(2, 1), (8, 1), (4, 9)],
    [(5, 5), (7.4, 3), (5, 1), (2.6, 3), (5, 5), (7.8, 7), (5, 9), (2.2, 7), (5, 5)],
    [(7.4, 3.5), (5, 5), (2.6, 3.5), (4.5, 1), (7.2, 2.5), (6.8, 6), (5, 9)],
]


def draw_digits(num_images: int, rng: torch.Generator) -> Data:
    """Digits in light strokes on black [N, 1, 28, 28], and their classes.

    Random in each image: the points of the stroke, rotation, slant, size, place and stroke width.
    """
    images = torch.empty(num_images, 1, 28, 28, dtype=torch.uint8)
    labels = torch.arange(num_images) % len(STROKES)
    pixels = torch.arange(28, dtype=torch.float32)[:, None] - 13.5  # (28, 1), from the center

    # A stroke is drawn as a row of dots. Each is a Gaussian, g(row) * g(column), so the sum of all
    # dots is a matrix product.
    def gaussians(positions, width):
        return torch.exp(-(((positions[:, None] - pixels) / width) ** 2))  # (n, 28, dots)

    for digit, stroke in enumerate(STROKES):
        n = int((labels == digit).sum())
        points = torch.tensor(stroke, dtype=torch.float32)  # (points, 2)
        points = points + 0.35 * _randn(n, len(stroke), 2, rng=rng)
        num_dots = 12 * len(stroke)
        dots = interpolate(points.mT, size=num_dots, mode="linear", align_corners=True)
        angle = _plus_minus(n, rng, 0.2)[:, None]  # (n, 1)
        slant = _plus_minus(n, rng, 0.25)[:, None]  # (n, 1)
        zoom = _plus_minus(n, rng, 0.15)[:, None, None]  # (n, 1, 1)
        dots = (dots - 5) * 2.1 * (1 + zoom)  # (n, 2, dots): in pixels, from the center
        x, y = dots.unbind(1)
        x = x + slant * y
        rotated_x = x * angle.cos() - y * angle.sin() + _plus_minus(n, rng, 2)[:, None]
        rotated_y = x * angle.sin() + y * angle.cos() + _plus_minus(n, rng, 2)[:, None]
        width = (1 + _plus_minus(n, rng, 0.3))[:, None, None]
        dot_sum = gaussians(rotated_y, width) @ gaussians(rotated_x, width).mT  # (n, 28, 28)
        ink = 1 - torch.exp(-dot_sum)
        images[labels == digit] = (ink * 255).round().byte()[:, None]
    return images, labels


@cache
def draw_photos(num_photos: int = 40) -> list[torch.Tensor]:
    """Textures like those of photos, each uint8 [3, 160, 160]: colour noise of many sizes."""
    cells = [(n, n) for n in (2, 4, 8, 16, 32)]
    texture = _texture(num_photos, _generator("photos"), 160, *cells)
    return list(((3 * texture).sigmoid() * 255).round().byte())


def draw_house_numbers(num_images: int, rng: torch.Generator) -> Data:
    """Digits [N, 3, 28, 28] in one random colour on another."""
    digits, labels = draw_digits(num_images, rng)
    background = _rand(num_images, 3, 1, 1, rng=rng)
    # Ink and background differ by .35 to .65 in each channel, also where the sum exceeds 1 and wraps.
    ink = (background + 0.35 + 0.3 * _rand(num_images, 3, 1, 1, rng=rng)) % 1
    images = (background + digits.float() / 255 * (ink - background)) * 255
    images = images + 15 * _texture(num_images, rng, 28, (4, 4))
    return images.round().clamp(0, 255).byte(), labels


OBJECTS = {  # capsules (x, y, x, y, radius) in a square from -100 to 100, y downwards
    "dog": [
        (-45, 10, 40, 10, 20),
        (-50, 10, -52, 70, 8),
        (-30, 20, -30, 70, 7),
        (42, 10, 45, 70, 8),
        (25, 20, 25, 70, 7),
        (60, -30, 80, -22, 15),
        (50, -35, 45, -5, 7),
        (-60, 0, -85, -40, 6),
    ],
    "elephant": [
        (-30, 0, 25, 0, 38),
        (-45, 20, -45, 75, 13),
        (25, 20, 25, 75, 13),
        (60, -15, 60, -15, 24),
        (80, -10, 88, 55, 8),
        (42, -25, 42, -5, 18),
        (-65, 0, -80, 30, 4),
    ],
    "giraffe": [
        (-40, 15, 15, 10, 17),
        (-47, 20, -50, 90, 6),
        (-30, 20, -30, 90, 5),
        (20, 20, 25, 90, 6),
        (20, 5, 50, -75, 9),
        (50, -80, 75, -68, 9),
        (-55, 10, -65, 45, 4),
    ],
    "guitar": [
        (-45, 42, -45, 42, 33),
        (-12, 10, -12, 10, 23),
        (-10, 8, 60, -65, 6),
        (60, -65, 75, -80, 10),
    ],
    "horse": [
        (-40, 5, 35, 5, 20),
        (-50, 10, -55, 80, 7),
        (-35, 10, -30, 80, 6),
        (40, 10, 45, 80, 7),
        (28, 10, 25, 80, 6),
        (40, 0, 65, -50, 12),
        (65, -55, 90, -32, 10),
        (-60, 0, -80, 45, 8),
    ],
    "house": [
        (-35, 45, 35, 45, 30),
        (-35, 10, 35, 10, 30),
        (-70, -5, 0, -65, 8),
        (0, -65, 70, -5, 8),
        (-12, -20, 12, -20, 25),
        (42, -65, 42, -35, 8),
    ],
    "airplane": [
        (-75, 0, 70, 0, 13),
        (10, 0, -25, 70, 9),
        (10, 0, -25, -70, 9),
        (-70, 0, -88, -35, 6),
        (-70, 0, -88, 35, 6),
    ],
    "car": [
        (-60, 20, 60, 20, 20),
        (-25, -12, 25, -12, 20),
        (-42, 45, -42, 45, 17),
        (42, 45, 42, 45, 17),
    ],
    "ship": [
        (-55, 50, 55, 50, 16),
        (-80, 35, 80, 35, 7),
        (-20, 10, 30, 10, 15),
        (0, 10, 0, -80, 4),
        (10, -65, 45, -15, 6),
        (10, -15, 45, -15, 6),
    ],
}


def draw_objects(
    num_images: int, rng: torch.Generator, style: str, classes: int = 9, side: int = 32
) -> Data:
    """Images [N, 3, side, side] of the first `classes` kinds of OBJECTS, and their classes.

    `style` is one of STYLES; a "drawing" has one channel. Random in each image: the parts of the
    object, rotation, size, place, direction and colours.
    """
    labels = torch.arange(num_images) % classes
    images = [_paint(style, part, rng, side) for part in labels.split(500)]
    return torch.cat(images), labels


def _paint(style: str, labels: torch.Tensor, rng: torch.Generator, side: int) -> torch.Tensor:
    distance = _distance(labels, rng, side)  # (n, 1, side, side)
    color = _rand(len(labels), 3, 1, 1, rng=rng)
    images = STYLES[style](labels, distance, color, rng)
    return (images * 255).round().clamp(0, 255).byte()


# A style takes labels [n], the distance of each pixel to the object's outline [n, 1, side, side]
# (in pixels, negative inside), random colours [n, 3, 1, 1], and the generator. It returns images
# with values in [0, 1].


def _photo(labels, distance, color, rng) -> torch.Tensor:
    """Shaded objects in a colour that is typical of the class, on a bright or dark background."""
    n, side = len(labels), distance.shape[-1]
    hue = _typical_hue(labels, rng)
    is_lit_at_rim = torch.randint(2, (n, 1, 1, 1), generator=rng)  # else in the middle
    depth = (-distance / side * 12).clamp(0, 1)  # 0 at the outline, 1 in the middle
    shade = 0.35 + 0.65 * (is_lit_at_rim - depth).abs()
    body = (0.15 + 0.8 * _rainbow(hue)) * shade + 0.08 * _texture(n, rng, side, (16, 16))
    background = 0.2 + 0.8 * color + 0.12 * _texture(n, rng, side, (2, 2), (5, 5))
    background = background * _rand(n, 1, 1, 1, rng=rng)
    return _over(background, body, distance) + 0.02 * _randn(n, 3, side, side, rng=rng)


def _art(labels, distance, color, rng) -> torch.Tensor:
    """Brush strokes: horizontal in the object, vertical behind it."""
    n, side = len(labels), distance.shape[-1]
    hue = _typical_hue(labels, rng)
    vertical = _texture(n, rng, side, (4, side // 2), (3, side // 4))
    horizontal = _texture(n, rng, side, (side // 2, 4))
    background = 0.15 + 0.75 * color + 0.2 * vertical
    body = 0.2 + 0.6 * _rainbow(hue) + 0.2 * horizontal
    return _over(background, body, distance)


def _cartoon(labels, distance, color, rng) -> torch.Tensor:
    """Plain colours, and a dark outline."""
    body = _rainbow(_rand(len(labels), rng=rng))
    background = 0.6 + 0.4 * color
    return _over(background, body, distance) * (distance.abs() - 0.5).clamp(0, 1)


def _sketch(labels, distance, color, rng) -> torch.Tensor:
    """A dark outline on white."""
    return (0.15 + 0.85 * distance.abs().clamp(0, 1)).expand(-1, 3, -1, -1)


def _drawing(labels, distance, color, rng) -> torch.Tensor:
    """QuickDraw's dark strokes on white, but with random widths and strengths. One channel."""
    width, strength = _rand(2, len(labels), 1, 1, 1, rng=rng)
    return 1 - (1 + 3 * width - distance.abs()).clamp(0, 1) * (0.2 + 0.8 * strength)


STYLES = {
    "photo": _photo,
    "art": _art,
    "cartoon": _cartoon,
    "sketch": _sketch,
    "drawing": _drawing,
}


def _over(background: torch.Tensor, body: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
    """The object in front of the background."""
    inside = (0.5 - distance).clamp(0, 1)
    return background + inside * (body - background)


def _distance(labels: torch.Tensor, rng: torch.Generator, side: int) -> torch.Tensor:
    """Distances [n, 1, side, side], in pixels, to the outline of the object; negative inside."""
    n = len(labels)
    num_parts = max(len(parts) for parts in OBJECTS.values())
    capsules = []
    for parts in OBJECTS.values():
        # In a tensor, all objects need equally many parts: repeat the first one.
        padding = [parts[0]] * (num_parts - len(parts))
        capsules.append(parts + padding)
    capsules = torch.tensor(capsules, dtype=torch.float32)[labels] / 100  # (n, parts, 5)
    ends, radius = capsules.split([4, 1], 2)  # (n, parts, 4) and (n, parts, 1)
    ends = ends.reshape(n, 2 * num_parts, 2)  # (x, y) of both ends of each part
    ends = ends + 0.04 * _randn(n, 2 * num_parts, 2, rng=rng)

    angle = _plus_minus(n, rng, 0.25)
    zoom = _plus_minus(n, rng, 0.15)
    stretch = _plus_minus(n, rng, 0.15)
    thickness = _plus_minus(n, rng, 0.2)
    flip = torch.randint(2, (n,), generator=rng) * 2 - 1
    x_scale = flip * (1 + stretch)
    # Points are rows: a point @ row_transform is flipped and stretched in x, and then rotated.
    row_transform = [angle.cos() * x_scale, angle.sin() * x_scale, -angle.sin(), angle.cos()]
    row_transform = torch.stack(row_transform, 1).view(n, 2, 2)
    size = (0.85 * (1 + zoom))[:, None, None]  # (n, 1, 1)
    move = 0.3 * _rand(n, 1, 2, rng=rng) - 0.15
    ends = (size * ends) @ row_transform + move
    # (n, parts, start or end, x or y), and two dimensions for the pixels
    ends = ends.view(n, num_parts, 2, 2, 1, 1)
    radius_scale = size * (1 + thickness[:, None, None])  # (n, 1, 1)
    radius = radius[..., None] * radius_scale[:, None]  # (n, parts, 1, 1)

    x = (torch.arange(side, dtype=torch.float32) + 0.5) * 2 / side - 1  # (side)
    y = x[:, None]  # (side, 1)
    nearest = torch.full((n, side, side), torch.inf, dtype=torch.float32)
    for part in range(num_parts):
        start, end = ends[:, part].unbind(1)  # (n, 2, 1, 1)
        start_x, start_y = start.unbind(1)  # (n, 1, 1)
        end_x, end_y = end.unbind(1)
        dx = end_x - start_x
        dy = end_y - start_y
        # The nearest point of the segment is `along` of the way from its start to its end.
        along = ((x - start_x) * dx + (y - start_y) * dy) / (dx**2 + dy**2 + 1e-6)
        along = along.clamp(0, 1)
        to_segment = torch.hypot(x - start_x - along * dx, y - start_y - along * dy)
        nearest = torch.minimum(nearest, to_segment - radius[:, part])
    return nearest[:, None] * side / 2


def _plus_minus(n: int, rng: torch.Generator, limit: float) -> torch.Tensor:
    """Random numbers [n] from -limit to limit."""
    return (_rand(n, rng=rng) * 2 - 1) * limit


def _typical_hue(labels: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Random hues [n] near that of the class."""
    return labels.float() / len(OBJECTS) + 0.15 * _randn(len(labels), rng=rng)


def _rainbow(hue: torch.Tensor) -> torch.Tensor:
    """Colours [n, 3, 1, 1] of hues [n]. A hue from 0 to 1 is once around the colour wheel."""
    angle = 2 * math.pi * (hue[:, None] - torch.arange(3, dtype=torch.float32) / 3)
    return 0.5 + 0.5 * angle.cos()[..., None, None]


def _texture(n: int, rng: torch.Generator, side: int, *cells: tuple[int, int]) -> torch.Tensor:
    """Colour noise [n, 3, side, side]: the mean of random grids, one for each (rows, columns)."""
    grids = [_randn(n, 3, *size, rng=rng) for size in cells]
    resized = [interpolate(grid, size=(side, side), mode="bilinear") for grid in grids]
    return sum(resized) / len(resized)


@dataclass(frozen=True)
class BuiltIn:
    """How a domain is drawn."""

    draw: Callable[[int, torch.Generator], Data]
    num_images: dict[str, int]  # by split


NUM_DIGITS = {"source": 5000, "pool": 30000, "val": 1000, "test": 2000}
NUM_OBJECTS = {"source": 5400, "pool": 18000, "val": 900, "test": 1800}
# The built-in ILSVRC has the six classes of PACS, so that it is a source for both.
NUM_PACS_OBJECTS = {"source": 4200, "pool": 1200, "val": 300, "test": 1200}
_draw_pacs_objects = partial(draw_objects, classes=6, side=40)
BUILT_IN = {
    "mnist": BuiltIn(draw_digits, NUM_DIGITS),
    "svhn": BuiltIn(draw_house_numbers, NUM_DIGITS),
    "cifar": BuiltIn(partial(draw_objects, style="photo"), NUM_OBJECTS),
    "quickdraw": BuiltIn(partial(draw_objects, style="drawing", side=28), NUM_OBJECTS),
    "ilsvrc": BuiltIn(partial(_draw_pacs_objects, style="photo"), NUM_PACS_OBJECTS),
    "art": BuiltIn(partial(_draw_pacs_objects, style="art"), NUM_PACS_OBJECTS),
    "cartoon": BuiltIn(partial(_draw_pacs_objects, style="cartoon"), NUM_PACS_OBJECTS),
    "sketch": BuiltIn(partial(_draw_pacs_objects, style="sketch"), NUM_PACS_OBJECTS),
}


@cache
def _built_in(name: str) -> dict[str, Data]:
    domain = {}
    for split, num_images in BUILT_IN[name].num_images.items():
        domain[split] = BUILT_IN[name].draw(num_images, _generator(f"{name} {split}"))
    return domain
