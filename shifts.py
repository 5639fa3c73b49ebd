"""Data: readers and downloads, splits and subsampling, domain shifts, and a built-in stand-in.

Images are uint8 tensors [N, channels, H, W], labels int64 tensors [N]. A domain is a dictionary of
splits, name: (images, labels). A source has "source" (what its network is trained on), and it and
its targets have "pool" (what target training sets are drawn from), "val" and "test"; no image is
in two of them. The splits and what a shift draws depend on DATA_SEED alone, never on a run.

Splits and shifts are those of the paper's authors' code, where nothing else is said. They work on
numbers in [0, 1]; here each shift's result is rounded to uint8, which is a quarter of the memory.
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
from itertools import accumulate, islice
from pathlib import Path, PurePosixPath
from secrets import token_hex
from typing import BinaryIO
from urllib.parse import quote

import numpy as np
import torch
from torch.nn.functional import interpolate

DATA_SEED = 0

Data = tuple[torch.Tensor, torch.Tensor]
Report = Callable[[str], None]  # what is being done


class DataError(ValueError):
    """Data that cannot be used; the message says in a line what is wrong and what to do."""


class MissingError(DataError):
    """Data that is neither there nor can be downloaded."""


def _line(error) -> str:
    """What went wrong, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


# ---------------------------------------------------------------- domains

NATURAL = ("svhn", "cifar", "quickdraw", "art", "cartoon", "sketch")  # no shifts of their source
INPUTS = {"mnist": (1, 28), "cifar": (3, 32), "quickdraw": (1, 32)}  # channels and side, by source


def needs(source: str, target: str) -> list[str]:
    """The data sets of a scenario, of ORIGINS."""
    names = [source, *[target] * (target in NATURAL), *["bsds500"] * (target == "mnist-m")]
    return names[1:] if target in PACS else names


def provide(names: list[str], root: Path, report: Report = lambda text: None) -> None:
    """Download to `root` those data sets that are not there. Raises DataError."""
    if {"bsds500", "ilsvrc", *PACS} & {*names}:
        _pillow()  # if it is missing, that is found before anything is downloaded
    for name in names:
        if not ORIGINS[name].there(root):
            ORIGINS[name].download(root, report)


def load(source: str, target: str | None, root: Path | None, report: Report = lambda text: None):
    """The domain of a source, or of one of its targets, as the source's network takes images.

    `root` is the folder of the real data; None means the built-in images. Raises DataError.
    """
    name = target if target in NATURAL else source
    shift = SHIFTS.get((source, target), lambda x, draw: x)
    if target == "mnist-m":
        shift = partial(shift, photos=_photos(root) if root else draw_photos())
    if root and name in ("ilsvrc", *PACS):  # shifted while read: too large for two copies in memory
        read = _ilsvrc if name == "ilsvrc" else partial(_pacs, name)
        return read(root, report, partial(shift, draw=None))
    real = {"mnist": _mnist, "svhn": _svhn, "cifar": _cifar, "quickdraw": _quickdraw}
    domain = real[name](root) if root else _builtin(name)
    splits, inputs = ("pool", "val", "test") if target else domain, {}
    for split in splits:
        x, y = domain[split]
        x = shift(x, draw=_generator(f"{source} {target} {split}"))
        inputs[split] = _to_input(x, *INPUTS.get(source, x.shape[1:3])), y
    return inputs


def _to_input(x: torch.Tensor, channels: int, side: int) -> torch.Tensor:
    """Images of another size, and of the mean of their channels, or of their one repeated."""
    x = x if x.shape[2] == side else _resized(x, side)
    if channels < x.shape[1]:
        x = _by_chunks(lambda chunk: chunk.mean(1, keepdim=True), x)
    return x.expand(-1, channels, -1, -1)


def subsample(data: Data, ratio: int, largest: int, seed: int) -> Data:
    """The share ratio / largest of each class, rounded up, drawn by `seed` (ratios: Table 2)."""
    x, y = data
    if ratio == largest:  # no second copy of a large pool
        return data
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    classes = (order[y[order] == label] for label in y.unique())
    chosen = torch.cat([mine[: -(-ratio * len(mine) // largest)] for mine in classes])
    return x[chosen], y[chosen]


def _generator(name: str) -> torch.Generator:
    """The random numbers that belong to a name, the same in every run."""
    return torch.Generator().manual_seed(DATA_SEED + zlib.crc32(name.encode()))


# ---------------------------------------------------------------- shifts
#
# Each takes images and a generator `draw`, which the fixed ones do not use, and gives new images.


def blur(x: torch.Tensor, draw: torch.Generator, taps: int, sigma: float) -> torch.Tensor:
    """Convolution with a bell of `taps` x `taps` pixels, black outside.

    A line of it: the square root of a standard normal's probability in each of `taps` equal
    intervals, which cover -sigma to sigma and half of (2 sigma + 1) / taps on either side. Of an
    even number, one tap more is on the right and below.
    """
    edge = sigma + (sigma + 0.5) / taps
    bell = torch.special.ndtr(torch.linspace(-edge, edge, taps + 1)).diff().sqrt()
    place = torch.arange(x.shape[2])
    tap = place - place[:, None] + (taps - 1) // 2  # the one that takes a pixel to another
    line = (bell / bell.sum())[tap.clamp(0, taps - 1)].where((0 <= tap) & (tap < taps), 0)
    return _by_chunks(lambda chunk: line @ chunk @ line.T, x)


def occlude(x: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """A black square over a quarter of each image, half as high and wide; its place is drawn."""
    side = x.shape[2]
    start = (torch.rand(2, len(x), 1, generator=draw) * side / 2).long()
    columns, rows = (start <= torch.arange(side)) & (torch.arange(side) < start + side // 2)
    return x.masked_fill(rows[:, None, :, None] & columns[:, None, None, :], 0)


def noise(x: torch.Tensor, draw: torch.Generator, sigma: float) -> torch.Tensor:
    """Gaussian noise of deviation `sigma` (of 255) on every pixel and channel, clipped, cut off."""

    def noisy(chunk):
        return (chunk + sigma * torch.randn(chunk.shape, generator=draw)).floor()

    return _by_chunks(noisy, x)


def photo_background(x: torch.Tensor, draw: torch.Generator, photos: list) -> torch.Tensor:
    """MNIST-M: |photo patch - digit| per channel [N, 3, H, W], the digit all black or white.

    The patch is drawn from `photos`, each [3, h, w]. Ganin's original has grey digits, too.
    """
    n, _, height, width = x.shape
    which = torch.randint(len(photos), (n,), generator=draw)
    place = torch.rand(2, n, generator=draw)
    patches = x.new_empty(n, 3, height, width)
    for number, photo in enumerate(photos):
        mine = (which == number).nonzero()[:, 0]
        windows = photo.unfold(1, height, 1).unfold(2, width, 1)  # (3, rows, columns, H, W)
        row = (place[0, mine] * windows.shape[1]).long()
        column = (place[1, mine] * windows.shape[2]).long()
        patches[mine] = windows[:, row, column].transpose(0, 1)
    return torch.where(x > 0, 255 - patches, patches)


def transform_random(x: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """An affine map drawn for each image: up to 1.5 radians either way, 1 to 2.5 times smaller in x
    and in y, and a move of up to (scale - 1) / 2 pixels."""
    angle, *scale_and_move = torch.rand(5, len(x), generator=draw)
    scale = 1 + 1.5 * torch.stack(scale_and_move[:2], 1)  # (N, 2)
    move = (torch.stack(scale_and_move[2:], 1) - 0.5) * (scale - 1)
    return affine(x, 3 * angle - 1.5, scale, move)


def affine(x: torch.Tensor, angle, scale, move) -> torch.Tensor:
    """Where a pixel comes from: centre + S R (place - centre) + move. Nearest, black outside.

    `angle` [N] in radians, R = ((cos, -sin), (sin, cos)) on (x, y), is anti-clockwise; `scale`
    [N, 2] is S, larger numbers make smaller; `move` [N, 2] in pixels. Each may have N = 1, for all.
    """
    angle, scale, move = map(torch.as_tensor, (angle, scale, move))
    height, width = x.shape[2:]
    centre = torch.tensor([width / 2, height / 2])
    place = torch.cartesian_prod(torch.arange(height), torch.arange(width)).flip(1) - centre

    def mapped(chunk, angle, scale, move):
        cos, sin = angle.cos(), angle.sin()
        rotation = torch.stack([cos, sin, -sin, cos], 1).view(-1, 2, 2)  # transposed
        there = (place @ rotation) * scale[:, None] + centre + move[:, None]  # (N, H W, 2)
        column, row = (there + 0.5).floor().long().unbind(2)
        inside = (0 <= column) & (column < width) & (0 <= row) & (row < height)
        index = (row * width + column).where(inside, 0)[:, None]  # (N, 1, H W)
        pixels = chunk.flatten(2).gather(2, index.expand(*chunk.shape[:2], -1))
        return pixels.where(inside[:, None], 0).view_as(chunk)

    if len(angle) == 1:
        return _by_chunks(lambda chunk: mapped(chunk, angle, scale, move), x)
    return _by_chunks(mapped, x, angle, scale, move)


def rotate(x: torch.Tensor, draw: torch.Generator, angle: float) -> torch.Tensor:
    """All images turned anti-clockwise by `angle` radians, in a mirrored border of a quarter of the
    side; of that the middle three quarters, at the old size."""
    wide = _mirrored(x, [x.shape[2] // 4])
    turned, cut = affine(wide, [angle], [[1.0, 1.0]], [[0.0, 0.0]]), wide.shape[2] // 8
    return _resized(turned[:, :, cut:-cut, cut:-cut], x.shape[2])


def shrink(x: torch.Tensor, draw: torch.Generator, borders: Callable) -> torch.Tensor:
    """The image in mirrored borders of `borders(side)` pixels, one by one; then at the old size."""
    return _resized(_mirrored(x, borders(x.shape[2])), x.shape[2])


def _mirrored(x: torch.Tensor, borders: list[int]) -> torch.Tensor:
    for border in borders:
        place = torch.arange(-border, x.shape[2] + border) % (2 * x.shape[2])
        place = place.minimum(2 * x.shape[2] - 1 - place)
        x = x[:, :, place][..., place]
    return x


def _resized(x: torch.Tensor, side: int) -> torch.Tensor:
    """Square images at another size: bilinear, without antialiasing."""
    return _by_chunks(partial(interpolate, size=(side, side), mode="bilinear"), x)


def yuv(x: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Analogue Y, U and V in place of R, G and B. The negative halves of U and V are cut off."""
    matrix = [[0.299, 0.587, 0.114], [-0.14714, -0.28887, 0.43601], [0.61498, -0.51497, -0.10001]]
    return _by_chunks(lambda chunk: torch.einsum("oc,nchw->nohw", torch.tensor(matrix), chunk), x)


def hsv(x: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Hue, saturation and value in place of R, G and B, each scaled to 0...255; grey has hue 0."""

    def converted(chunk):
        value, largest = chunk.max(1)
        span = value - chunk.amin(1)
        red, green, blue = chunk.unbind(1)
        sixths = torch.stack([green - blue, blue - red, red - green], 1)
        sixths = sixths.gather(1, largest[:, None])[:, 0] / span.clamp(min=1) + 2 * largest
        hue = (sixths % 6 / 6 * 255).masked_fill(span == 0, 0)
        return torch.stack([hue, span / value.clamp(min=1) * 255, value], 1)

    return _by_chunks(converted, x)


def _by_chunks(shift, x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
    """`shift` on float chunks of the images (all at once would need much memory), as uint8."""
    chunks = zip(*(tensor.split(250) for tensor in (x, *parameters)))
    return torch.cat(
        [shift(chunk.float(), *rest).round_().clamp_(0, 255).byte() for chunk, *rest in chunks]
    )


SHIFTS = {  # by source and target; sizes and strengths are those of the authors' code
    ("mnist", "blurry"): partial(blur, taps=8, sigma=1.0),
    ("mnist", "occluded"): occlude,
    ("mnist", "mnist-m"): photo_background,
    ("mnist", "transform-random"): transform_random,
    # One map for all, which the authors drew with seed 42 of NumPy's legacy generator.
    ("mnist", "transform-fixed"): lambda x, draw: affine(
        x, angle=[-0.3764], scale=[[2.4261, 2.0980]], move=[[-0.1407, 0.3777]]
    ),
    ("cifar", "noisy"): partial(noise, sigma=30),
    ("cifar", "blurry"): partial(blur, taps=4, sigma=0.5),
    ("quickdraw", "noisy"): partial(noise, sigma=30),
    ("quickdraw", "blurry"): partial(blur, taps=5, sigma=0.5),
    ("ilsvrc", "yuv"): yuv,
    ("ilsvrc", "hsv"): hsv,
    ("ilsvrc", "rotation"): partial(rotate, angle=0.6),
    ("ilsvrc", "scaling-symmetric"): partial(shrink, borders=lambda side: [int(side * 0.4)]),
    ("ilsvrc", "scaling-stretch"): partial(  # 1, 2, 4, ... 64 pixels of 224: it looks stretched
        shrink, borders=lambda side: [2**n for n in range(8) if 2**n <= side * 2 / 7]
    ),
}


# ---------------------------------------------------------------- downloads

TIMEOUT = 5  # seconds without an answer that end a download
LEAST_RATE = 1000  # bytes a second, on average: less ends it, too
MEND = "replace it, or delete the data set, which is then downloaded anew"
MOST = 1 << 28  # bytes of a file, or of one in an archive; the largest, SVHN's, have 182 million


@dataclass(frozen=True)
class Files:
    """A data set of single files."""

    url: str | None  # None: it cannot be downloaded freely, and has to be put there
    md5: dict[str, str | None]  # by the file's place in the folder of the data
    first: int | None = None  # bytes of each file that are needed; None: all

    def there(self, root: Path) -> bool:
        return all(_unzipped(root / file).exists() for file in self.md5)

    def download(self, root: Path, report: Report) -> None:
        """Raises MissingError."""
        for file, md5 in self.md5.items():
            path = root / file
            if not self.url:
                what = "and cannot be downloaded freely: put ILSVRC2012's validation images there"
                raise MissingError(f"{path} is missing, {what}, <wnid>/*.JPEG")
            if not _unzipped(path).exists():
                fetch(self.url + quote(path.name), path, md5, report, self.first)


@dataclass(frozen=True)
class Archive:
    """A data set in a zip or tar.gz file."""

    url: str
    md5: str | None
    members: str  # its files in the archive: a pattern, whose group is the name in the folder
    folder: str
    count: int  # of these files

    def there(self, root: Path) -> bool:
        return (root / self.folder).exists()

    def download(self, root: Path, report: Report) -> None:
        """Raises MissingError."""
        path = root / f"{token_hex(4)}-{PurePosixPath(self.url).name}"
        fetch(self.url, path, self.md5, report, missing=root / self.folder)
        try:
            for other in ORIGINS.values():
                if other.url == self.url and not other.there(root):
                    _unpack(path, other, root / other.folder)
        finally:
            path.unlink()


QUICKDRAW = ("airplane", "car", "bird", "cat", "dog", "frog", "horse", "cruise ship", "truck")
QUICKDRAW_ROWS = 10000  # drawings used of each class
# Domain: its folder, and the number of its images, persons included.
PACS = {"art": ("art_painting", 2048), "cartoon": ("cartoon", 2344), "sketch": ("sketch", 3929)}
ORIGINS = {
    "mnist": Files(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        {
            "mnist/train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "mnist/train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
            "mnist/t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
            "mnist/t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
        },
    ),
    "svhn": Files(
        "http://ufldl.stanford.edu/housenumbers/",
        {
            "svhn/train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
            "svhn/test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
        },
    ),
    "quickdraw": Files(
        "https://storage.googleapis.com/quickdraw_dataset/full/numpy_bitmap/",
        {f"quickdraw/{name}.npy": None for name in QUICKDRAW},
        first=QUICKDRAW_ROWS * 784 + 1024,  # with the header
    ),
    "inception2": Files(
        "https://github.com/taehoonlee/deep-learning-models/releases/download/inception/",
        {"inception2.npz": "0476b876a5d35a99e2747f98248d856d"},
    ),
    "cifar": Archive(
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        "c32a1d4ab5d03f1284b67883e8d87530",
        r"cifar-10-batches-bin/(\w+\.bin)",
        "cifar-10-batches-bin",
        6,
    ),
    "bsds500": Archive(
        "http://www.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/BSR/BSR_bsds500.tgz",
        None,
        r"BSR/BSDS500/data/images/train/(\w+\.jpg)",
        "bsds500",
        200,
    ),
    "ilsvrc": Files(None, {"ilsvrc/val": None}),
} | {
    name: Archive(
        "https://github.com/MachineLearning2020/Homework3-PACS/archive/"
        "d586a6cf3db84896fb6cc465c7bf51bdaf6d65d8.zip",
        None,
        rf".*/{folder}/(\w+/[\w-]+\.(?:jpg|png))",
        f"pacs/{folder}",
        count,
    )
    for name, (folder, count) in PACS.items()
}


def _unzipped(path: Path) -> Path:
    """The file without its .gz, where that is there instead."""
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    return plain if plain.exists() else path


def fetch(url: str, path: Path, md5, report: Report, first=None, missing=None) -> Path:
    """Download `url`, or its `first` bytes, to `path`, which is there only when whole.

    Raises MissingError, which names `path`, or what else is `missing`.
    """
    part, start = path.with_name(f"{path.name}.{token_hex(4)}.part"), time.monotonic()
    digest = hashlib.md5(usedforsecurity=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        headers = {"Range": f"bytes=0-{first - 1}"} if first else {}
        request = urllib.request.Request(url, headers=headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer, open(part, "wb") as file:
            total = int(answer.headers.get("Content-Length") or 0)
            most = first or 4 * MOST  # `first`: where the server knows no ranges
            while chunk := answer.read1(min(1 << 18, most - file.tell())):
                file.write(chunk)
                digest.update(chunk)
                done = file.tell()
                report(f"downloading {path.name}, {done >> 20} of {min(total, most) >> 20} MiB")
                if time.monotonic() - start > TIMEOUT + done / LEAST_RATE:
                    raise OSError("it is too slow")
            if file.tell() < min(total, most) or file.tell() == 4 * MOST:
                raise OSError(f"it ended after {file.tell()} of {total} bytes")
        if md5 and digest.hexdigest() != md5:
            raise OSError(f"its MD5 is not {md5}")
        return part.replace(path)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = f"downloading {url} failed ({_line(error)})"
        raise MissingError(f"{missing or path} is missing, and {reason}: put it there") from error
    finally:
        part.unlink(missing_ok=True)


def _unpack(path: Path, archive: Archive, folder: Path) -> None:
    """The archive's members to `folder`, which is there only when whole. Raises MissingError."""
    part, found = folder.with_name(f"{folder.name}.{token_hex(4)}.part"), set()
    try:
        part.mkdir(parents=True)
        for name, content in _members(path):
            match = re.fullmatch(archive.members, name)
            if match:  # no name that it finds climbs out of a folder
                found.add(match[1])
                if len(found) > archive.count:
                    raise ValueError("it has more files than it should")
                (part / match[1]).parent.mkdir(exist_ok=True)
                (part / match[1]).write_bytes(_Bounded(content).read())
        if len(found) != archive.count:
            raise ValueError(f"it has {len(found)} of {archive.count} files")
        if not folder.exists():  # else another process was faster
            part.rename(folder)
    except Exception as error:
        reason = f"unpacking {archive.url} failed ({_line(error)})"
        raise MissingError(f"{folder} is missing, and {reason}: fill it") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _members(path: Path) -> Iterator[tuple[str, BinaryIO]]:
    """The names of the files in a zip or tar.gz archive, and each opened."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            for member in file.infolist():
                if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise ValueError("it is compressed in a way that knows no bounds")
                yield member.filename, file.open(member)
    else:
        with gzip.open(path) as file, tarfile.open(fileobj=_Bounded(file), mode="r|") as tar:
            yield from ((member.name, tar.extractfile(member)) for member in tar if member.isfile())
            _Bounded(file).read()  # to the end, where its checksum is


# ---------------------------------------------------------------- readers


class _Bounded:
    """A file that cannot fill the memory, whatever it says of its size or unpacks to."""

    def __init__(self, file: BinaryIO):
        self.file = file

    def read(self, size: int = MOST + 1) -> bytes:
        content = self.file.read(min(size, MOST + 1))
        if len(content) > MOST:
            raise ValueError(f"it has more than {MOST} bytes")
        return content


def strict(read):
    """A reader of files, made of one of bytes. Whatever goes wrong is a DataError."""

    @wraps(read)
    def reader(path: Path):
        try:
            if path.exists() and not path.is_file():
                raise ValueError("it is no file")  # a pipe would be waited for
            with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
                return read(_Bounded(file).read())
        except Exception as error:
            raise DataError(f"{path} cannot be read ({_line(error)}): {MEND}") from error

    return reader


@strict
def read_idx(content: bytes) -> torch.Tensor:
    """The uint8 array of an IDX file."""
    if content[:3] != b"\0\0\x08":
        raise ValueError("it is not an IDX file of bytes")
    start = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:start], ">u4")
    return torch.from_numpy(np.frombuffer(content[start:], np.uint8).reshape(shape).copy())


CIFAR_RECORDS = 10000  # in each file


@strict
def read_cifar(content: bytes) -> Data:
    """Images [N, 3, 32, 32] and labels of CIFAR-10's binary format."""
    records = torch.from_numpy(np.frombuffer(content, np.uint8).copy()).view(-1, 3073)
    if len(records) != CIFAR_RECORDS or records[:, 0].max() > 9:
        raise ValueError(f"it is not {CIFAR_RECORDS} images of CIFAR-10")
    return records[:, 1:].unflatten(1, (3, 32, 32)), records[:, 0].long()


@strict
def read_drawings(content: bytes) -> np.ndarray:
    """The first rows [n, 784] of a .npy file of QuickDraw, of which there may be no more."""
    file = io.BytesIO(content)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("it is not a .npy file of version 1.0")
    shape, columns_first, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype != np.uint8 or columns_first or shape[1:] != (784,):
        raise ValueError(f"it holds {dtype} {shape}, not uint8 (N, 784)")
    if len(content) - file.tell() > shape[0] * 784:
        raise ValueError("it is longer than it says")
    rows = min(shape[0], QUICKDRAW_ROWS)
    return np.frombuffer(file.read(rows * 784), np.uint8).reshape(rows, 784)


MAT_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8"}
MAT_COMPRESSED = 15


@strict
def read_mat(content: bytes) -> dict[str, np.ndarray]:
    """The first two real arrays of a little-endian MATLAB-5 file, by name."""
    if content[126:128] != b"IM":
        raise ValueError("it is not a little-endian MATLAB-5 file")
    arrays = {}
    for kind, element in islice(_elements(content[128:]), 2):
        if kind == MAT_COMPRESSED:
            element = zlib.decompressobj().decompress(element, MOST)
            ((kind, element),) = _elements(element)
        _, (_, shape), (_, name), (kind, values) = islice(_elements(element), 4)
        values = np.frombuffer(values, MAT_TYPES[kind])
        arrays[name.decode()] = values.reshape(np.frombuffer(shape, "<u4"), order="F")
    return arrays


def _elements(content: bytes) -> Iterator[tuple[int, bytes]]:
    """The type and the content of each data element."""
    at = 0
    while at < len(content):
        kind, size = struct.unpack_from("<II", content, at)
        start = at + 8
        if kind > 0xFFFF:  # a small one: its size is in the upper half, its content comes at once
            kind, size, start = kind & 0xFFFF, kind >> 16, at + 4
        if start + size > len(content):
            raise ValueError("it ends early")
        yield kind, content[start : start + size]
        at = start + size
        if kind != MAT_COMPRESSED:
            at += -at % 8


LARGEST_IMAGE = 1 << 25  # pixels


@strict
def read_image(content: bytes) -> torch.Tensor:
    """An RGB image [3, H, W] of a JPEG or PNG file; what is transparent is laid on white."""
    pillow = _pillow()
    pillow.open(io.BytesIO(content), formats=("JPEG", "PNG")).verify()  # checksums of a PNG
    with pillow.open(io.BytesIO(content), formats=("JPEG", "PNG")) as file:
        if math.prod(file.size) > LARGEST_IMAGE:
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


@cache
def _mnist(root: Path) -> dict[str, Data]:
    """MNIST: the first 5,000 training images for validation, 25,000 for the source, 30,000 pool."""
    x, y, *test = (read_idx(_unzipped(root / file)) for file in ORIGINS["mnist"].md5)
    for images, labels in ((x, y), test):
        shapes = images.shape[1:] == (28, 28) and labels.shape == images.shape[:1]
        if not shapes or len(labels) < 60 or labels.max() > 9:
            raise DataError(f"{root / 'mnist'}: the files are not MNIST's: delete them")
    val, x, y, test_x, test_y = len(y) * 5 // 60, x[:, None], y.long(), test[0][:, None], test[1]
    parts = _parts((x[val:], y[val:]), "mnist", source=25, pool=30)
    return parts | {"val": (x[:val], y[:val]), "test": (test_x, test_y.long())}


@cache
def _svhn(root: Path) -> dict[str, Data]:
    """SVHN: of its 73,257 training images the first 10,000 for validation, all others pool."""
    (x, y), test = (_house_numbers(root / file) for file in ORIGINS["svhn"].md5)
    first = len(y) * 10000 // 73257
    return {"pool": (x[first:], y[first:]), "val": (x[:first], y[:first]), "test": test}


def _house_numbers(path: Path) -> Data:
    arrays = read_mat(path)
    x, y = (arrays.get(name, np.empty(0)) for name in "Xy")  # x [32, 32, 3, N], y [N, 1]
    shapes = x.shape == (32, 32, 3, len(y)) and y.shape == (len(y), 1)
    if x.dtype != np.uint8 or not shapes or len(y) < 60 or not np.isin(y, range(1, 11)).all():
        raise DataError(f"{path} does not hold images and labels of SVHN: {MEND}")
    x = torch.from_numpy(np.ascontiguousarray(x.transpose(3, 2, 0, 1)))
    return x, torch.from_numpy(y[:, 0].astype(np.int64)) % 10  # a zero has label 10


@cache
def _cifar(root: Path) -> dict[str, Data]:
    """CIFAR-10 without deer: batches 1 and 2 for the source, 3 and 4 as pool, 5 for validation."""
    folder, deer, splits = root / "cifar-10-batches-bin", 4, {}
    batches = {"source": (1, 2), "pool": (3, 4), "val": (5,)}
    files = {split: [f"data_batch_{n}.bin" for n in numbers] for split, numbers in batches.items()}
    for split, names in (files | {"test": ["test_batch.bin"]}).items():
        x, y = (torch.cat(part) for part in zip(*(read_cifar(folder / name) for name in names)))
        splits[split] = x[y != deer], (y - (y > deer).long())[y != deer]
    return splits


@cache
def _quickdraw(root: Path) -> dict[str, Data]:
    """QuickDraw, dark on white [N, 1, 28, 28], all classes shuffled together: of 90,000 drawings
    35,000 for the source, 30,000 pool, 5,000 to validate, 15,000 to test."""
    drawings = [255 - read_drawings(root / file) for file in ORIGINS["quickdraw"].md5]
    y = torch.arange(len(drawings)).repeat_interleave(torch.tensor([*map(len, drawings)]))
    x = torch.from_numpy(np.concatenate(drawings)).view(-1, 1, 28, 28)
    return _parts((x, y), "quickdraw", source=35, pool=30, val=5, test=15, unused=5)


def _parts(data: Data, name: str, **shares: int) -> dict[str, Data]:
    """Splits of the images, shuffled, with sizes in proportion to the shares."""
    x, y = data
    *cuts, _ = (len(y) * n // sum(shares.values()) for n in accumulate(shares.values()))
    order = torch.randperm(len(y), generator=_generator(name))
    parts = order.tensor_split(cuts)
    if not all(map(len, parts)):
        raise DataError(f"{name}: {len(y)} images are too few for its splits")
    return {split: (x[part], y[part]) for split, part in zip(shares, parts) if split != "unused"}


SIDE = 224  # pixels of an image of ILSVRC and of PACS
PACS_CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house")  # person is left out


def _ilsvrc(root: Path, report: Report, shift: Callable) -> dict[str, Data]:
    """ILSVRC2012's validation images, shuffled together: 25,000 pool, 5,000 to validate, 20,000 to
    test. The shorter side to 256 pixels, of that the middle 224."""
    folder = root / "ilsvrc" / "val"
    classes = sorted(path.name for path in folder.glob("*") if path.is_dir())
    if len(classes) != 1000 or not all(re.fullmatch(r"n\d{8}", name) for name in classes):
        found = f"{len(classes)}, the first {classes[:1]}"
        raise DataError(f"{folder} should have 1000 folders named by WordNet id, not {found}")
    paths, y = _image_folder(folder, classes)
    parts = _parts((torch.arange(len(y)), y), "ilsvrc", pool=25, val=5, test=20)
    return _read_images(parts, paths, 224 / 256, report, shift)


def _pacs(name: str, root: Path, report: Report, shift: Callable) -> dict[str, Data]:
    """A domain of PACS: within each class 70 % as pool, 10 % to validate, 20 % to test."""
    paths, y = _image_folder(root / ORIGINS[name].folder, PACS_CLASSES)
    classes = [(y == label).nonzero()[:, 0] for label in range(len(PACS_CLASSES))]
    each = [_parts((n, y[n]), f"{name} {y[n[0]]}", pool=7, val=1, test=2) for n in classes]
    parts = {split: [*map(torch.cat, zip(*(one[split] for one in each)))] for split in each[0]}
    return _read_images(parts, paths, None, report, shift)


def _image_folder(folder: Path, classes) -> tuple[list[Path], torch.Tensor]:
    """The images of each class, folder/class/*, whatever their case, and their labels."""
    there, paths, labels = {path.name.lower(): path for path in folder.glob("*")}, [], []
    for label, name in enumerate(classes):
        found = there[name.lower()].glob("*") if name.lower() in there else ()
        found = [path for path in found if path.suffix.lower() in (".jpg", ".jpeg", ".png")]
        if len(found) < 10:  # a split of the class would be empty
            few = f"{folder / name} has {len(found)} images"
            raise DataError(f"{few}: put 10 or more there, or delete {folder}")
        paths += sorted(found)
        labels += [label] * len(found)
    return paths, torch.tensor(labels)


def _read_images(parts, paths: list[Path], crop: float | None, report: Report, shift: Callable):
    """A domain of images, of `parts` that have numbers of paths in their place.

    Whole images, or with a `crop` the middle square, `crop` times as large as the shorter side, are
    brought to 224 x 224 pixels and shifted while they are read.
    """

    def read(number):
        x = read_image(paths[number])
        if crop:
            side = round(min(x.shape[1:]) * crop)
            top, left = ((length - side) // 2 for length in x.shape[1:])
            x = x[:, top : top + side, left : left + side]
        return _resized(x[None], SIDE)

    domain = {}
    with ThreadPoolExecutor() as pool:
        for split, (numbers, y) in parts.items():
            x = torch.empty(len(y), 3, SIDE, SIDE, dtype=torch.uint8)
            for start in range(0, len(y), 256):
                part = slice(start, start + 256)
                x[part] = shift(torch.cat([*pool.map(read, numbers[part])]))
                report(f"reading images of the {split} split, {start} of {len(y)}")
            domain[split] = x, y
    return domain


@cache
def _photos(root: Path) -> list[torch.Tensor]:
    """The training photos of BSDS500: uint8 [3, h, w] each."""
    photos = [read_image(path) for path in sorted((root / "bsds500").glob("*.jpg"))]
    if not photos or min(min(photo.shape[1:]) for photo in photos) < 28:
        raise DataError(f"{root / 'bsds500'} has no .jpg, or one smaller than 28 x 28: {MEND}")
    return photos


# ---------------------------------------------------------------- built-in data
#
# Procedural stand-ins, so that everything runs without a file. They are not the paper's data.

STROKES = [  # the digits 0 to 9, each one stroke through points (x, y) of a 10 x 10 grid
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


def draw_digits(count: int, draw: torch.Generator) -> Data:
    """`count` images [count, 1, 28, 28] of digits in light strokes on black, and their classes.

    Drawn for each: the points of its stroke, and its rotation, slant, size, place and width.
    """
    x = torch.empty(count, 1, 28, 28, dtype=torch.uint8)
    y = torch.arange(count) % len(STROKES)
    pixels = torch.arange(28)[:, None] - 13.5  # (28, 1), from the centre
    for digit, stroke in enumerate(STROKES):
        n = int((y == digit).sum())
        points = torch.tensor(stroke) + 0.35 * torch.randn(n, len(stroke), 2, generator=draw)
        dots = interpolate(points.mT, size=12 * len(stroke), mode="linear", align_corners=True)
        angle, slant, zoom = (_uniform(n, draw, limit)[:, None] for limit in (0.2, 0.25, 0.15))
        right, down = ((dots - 5) * 2.1 * (1 + zoom[:, None])).unbind(1)  # (n, dots), in pixels
        right = right + slant * down
        right, down = (
            right * angle.cos() - down * angle.sin() + _uniform(n, draw, 2)[:, None],
            right * angle.sin() + down * angle.cos() + _uniform(n, draw, 2)[:, None],
        )
        width = (1 + _uniform(n, draw, 0.3))[:, None, None]
        # A dot is a Gaussian, so rows times columns; the ink of all dots is a matrix product.
        rows, columns = (
            torch.exp(-(((at[:, None] - pixels) / width) ** 2)) for at in (down, right)
        )  # (n, 28, dots)
        ink = 1 - torch.exp(-rows @ columns.mT)  # (n, 28, 28)
        x[y == digit] = (ink * 255).round().byte()[:, None]
    return x, y


@cache
def draw_photos(count: int = 40) -> list[torch.Tensor]:
    """Photo-like textures uint8 [3, 160, 160]: coloured noise of many sizes."""
    noise = _texture(count, _generator("photos"), 160, *((n, n) for n in (2, 4, 8, 16, 32)))
    return list(((3 * noise).sigmoid() * 255).round().byte())


def draw_house_numbers(count: int, draw: torch.Generator) -> Data:
    """The same digits [count, 3, 28, 28] in one colour on another, both drawn for each image."""
    x, y = draw_digits(count, draw)
    back = torch.rand(count, 3, 1, 1, generator=draw)
    ink = (back + 0.35 + 0.3 * torch.rand(count, 3, 1, 1, generator=draw)) % 1
    x = (back + x / 255 * (ink - back)) * 255 + 15 * _texture(count, draw, 28, (4, 4))
    return x.round_().clamp_(0, 255).byte(), y


# fmt: off
OBJECTS = {  # capsules (x, y, x, y, radius) in a square from -100 to 100, y downwards
    "dog": [(-45, 10, 40, 10, 20), (-50, 10, -52, 70, 8), (-30, 20, -30, 70, 7),
        (42, 10, 45, 70, 8), (25, 20, 25, 70, 7), (60, -30, 80, -22, 15), (50, -35, 45, -5, 7),
        (-60, 0, -85, -40, 6)],
    "elephant": [(-30, 0, 25, 0, 38), (-45, 20, -45, 75, 13), (25, 20, 25, 75, 13),
        (60, -15, 60, -15, 24), (80, -10, 88, 55, 8), (42, -25, 42, -5, 18), (-65, 0, -80, 30, 4)],
    "giraffe": [(-40, 15, 15, 10, 17), (-47, 20, -50, 90, 6), (-30, 20, -30, 90, 5),
        (20, 20, 25, 90, 6), (20, 5, 50, -75, 9), (50, -80, 75, -68, 9), (-55, 10, -65, 45, 4)],
    "guitar": [(-45, 42, -45, 42, 33), (-12, 10, -12, 10, 23), (-10, 8, 60, -65, 6),
        (60, -65, 75, -80, 10)],
    "horse": [(-40, 5, 35, 5, 20), (-50, 10, -55, 80, 7), (-35, 10, -30, 80, 6),
        (40, 10, 45, 80, 7), (28, 10, 25, 80, 6), (40, 0, 65, -50, 12), (65, -55, 90, -32, 10),
        (-60, 0, -80, 45, 8)],
    "house": [(-35, 45, 35, 45, 30), (-35, 10, 35, 10, 30), (-70, -5, 0, -65, 8),
        (0, -65, 70, -5, 8), (-12, -20, 12, -20, 25), (42, -65, 42, -35, 8)],
    "airplane": [(-75, 0, 70, 0, 13), (10, 0, -25, 70, 9), (10, 0, -25, -70, 9),
        (-70, 0, -88, -35, 6), (-70, 0, -88, 35, 6)],
    "car": [(-60, 20, 60, 20, 20), (-25, -12, 25, -12, 20), (-42, 45, -42, 45, 17),
        (42, 45, 42, 45, 17)],
    "ship": [(-55, 50, 55, 50, 16), (-80, 35, 80, 35, 7), (-20, 10, 30, 10, 15),
        (0, 10, 0, -80, 4), (10, -65, 45, -15, 6), (10, -15, 45, -15, 6)],
}
# fmt: on


def draw_objects(
    count: int, draw: torch.Generator, style: str, classes: int = 9, side: int = 32
) -> Data:
    """`count` images [count, 3, side, side] of the first objects, and their classes.

    `style`: photo, art, cartoon, sketch or drawing, which has one channel. Drawn for each: the
    parts of its object, its rotation, size, place and direction, and the colours.
    """
    y = torch.arange(count) % classes
    return torch.cat([_paint(style, part, draw, side) for part in y.split(500)]), y


def _paint(style: str, y: torch.Tensor, draw: torch.Generator, side: int) -> torch.Tensor:
    n = len(y)
    d = _distance(y, draw, side)  # (n, 1, side, side)
    inside = (0.5 - d).clamp(0, 1)
    colour = torch.rand(n, 3, 1, 1, generator=draw)
    if style == "photo":  # shaded bodies, of a colour that is usual for the class
        hue = y / len(OBJECTS) + 0.15 * torch.randn(n, generator=draw)
        rim = torch.randint(2, (n, 1, 1, 1), generator=draw)  # dark or light
        shade = 0.35 + 0.65 * (rim - (-d / side * 12).clamp(0, 1)).abs()
        body = (0.15 + 0.8 * _rainbow(hue)) * shade + 0.08 * _texture(n, draw, side, (16, 16))
        back = 0.2 + 0.8 * colour + 0.12 * _texture(n, draw, side, (2, 2), (5, 5))
        back = back * torch.rand(n, 1, 1, 1, generator=draw)  # by day and by night
        x = back + inside * (body - back) + 0.02 * torch.randn(n, 3, side, side, generator=draw)
    elif style == "art":  # brush strokes, across in the object and down behind it
        hue = y / len(OBJECTS) + 0.15 * torch.randn(n, generator=draw)
        back = 0.15 + 0.75 * colour + 0.2 * _texture(n, draw, side, (4, side // 2), (3, side // 4))
        body = 0.2 + 0.6 * _rainbow(hue) + 0.2 * _texture(n, draw, side, (side // 2, 4))
        x = back + inside * (body - back)
    elif style == "cartoon":  # plain colours with an outline
        body, back = _rainbow(torch.rand(n, generator=draw)), 0.6 + 0.4 * colour
        x = (back + inside * (body - back)) * (d.abs() - 0.5).clamp(0, 1)
    elif style == "sketch":  # dark outlines on white
        x = (0.15 + 0.85 * d.abs().clamp(0, 1)).expand(-1, 3, -1, -1)
    else:  # QuickDraw's dark strokes on white, here of many widths and strengths
        width, strength = torch.rand(2, n, 1, 1, 1, generator=draw)
        x = 1 - (1 + 3 * width - d.abs()).clamp(0, 1) * (0.2 + 0.8 * strength)
    return (x * 255).round_().clamp_(0, 255).byte()


def _distance(y: torch.Tensor, draw: torch.Generator, side: int) -> torch.Tensor:
    """Pixels from each pixel to the outline of an object of class y, negative inside."""
    n, most = len(y), max(map(len, OBJECTS.values()))
    parts = [[*parts, *parts[:1] * (most - len(parts))] for parts in OBJECTS.values()]
    ends, radius = (torch.tensor(parts)[y] / 100).split([4, 1], 2)  # (n, parts, 4), (n, parts, 1)
    ends = ends.reshape(n, 2 * most, 2) + 0.04 * torch.randn(n, 2 * most, 2, generator=draw)
    angle, zoom, stretch, thick = (_uniform(n, draw, limit) for limit in (0.25, 0.15, 0.15, 0.2))
    flip = (torch.randint(2, (n,), generator=draw) * 2 - 1) * (1 + stretch)
    turn = torch.stack([angle.cos() * flip, angle.sin() * flip, -angle.sin(), angle.cos()], 1)
    size = (0.85 * (1 + zoom))[:, None, None]
    move = 0.3 * torch.rand(n, 1, 2, generator=draw) - 0.15
    ends = (size * ends @ turn.view(n, 2, 2) + move).view(n, most, 2, 2, 1, 1)
    radius = radius[..., None] * (size * (1 + thick[:, None, None]))[:, None]  # (n, parts, 1, 1)
    right = (torch.arange(side) + 0.5) * 2 / side - 1
    down = right[:, None]
    distance = torch.full((n, side, side), torch.inf)
    for part in range(most):  # to the segment from a to b
        (ax, ay), (bx, by) = (end.unbind(1) for end in ends[:, part].unbind(1))  # (n, 1, 1) each
        dx, dy = bx - ax, by - ay
        along = ((right - ax) * dx + (down - ay) * dy) / (dx**2 + dy**2 + 1e-6)
        along.clamp_(0, 1)
        away = torch.hypot(right - ax - along * dx, down - ay - along * dy)
        distance = torch.minimum(distance, away - radius[:, part])
    return distance[:, None] * side / 2


def _uniform(n: int, draw: torch.Generator, limit: float) -> torch.Tensor:
    """n numbers drawn from -limit to limit."""
    return (torch.rand(n, generator=draw) * 2 - 1) * limit


def _rainbow(hue: torch.Tensor) -> torch.Tensor:
    """Colours [n, 3, 1, 1] for hues [n], of which 0 to 1 is the whole circle."""
    circle = 2 * math.pi * (hue[:, None] - torch.arange(3) / 3)
    return 0.5 + 0.5 * circle.cos()[..., None, None]


def _texture(n: int, draw: torch.Generator, side: int, *cells: tuple[int, int]) -> torch.Tensor:
    """Coloured noise [n, 3, side, side], the mean of grids of so many cells."""
    grids = [torch.randn(n, 3, *size, generator=draw) for size in cells]
    return sum(interpolate(grid, size=(side, side), mode="bilinear") for grid in grids) / len(grids)


DIGITS = {"source": 5000, "pool": 30000, "val": 1000, "test": 2000}
SMALL = {"source": 5400, "pool": 18000, "val": 900, "test": 1800}
LARGE = {"source": 4200, "pool": 1200, "val": 300, "test": 1200}
BUILT_IN = {  # domain: what draws it, and its sizes
    "mnist": (draw_digits, DIGITS),
    "svhn": (draw_house_numbers, DIGITS),
    "cifar": (partial(draw_objects, style="photo"), SMALL),
    "quickdraw": (partial(draw_objects, style="drawing", side=28), SMALL),
    "ilsvrc": (partial(draw_objects, style="photo", classes=6, side=40), LARGE),
} | {
    style: (partial(draw_objects, style=style, classes=6, side=40), LARGE)
    for style in ("art", "cartoon", "sketch")
}


@cache
def _builtin(name: str) -> dict[str, Data]:
    draw, sizes = BUILT_IN[name]
    return {split: draw(n, _generator(f"{name} {split}")) for split, n in sizes.items()}
