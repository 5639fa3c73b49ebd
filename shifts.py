"""Data: readers and downloads, splits and subsampling, domain shifts, and a built-in stand-in.

Images are uint8 tensors [N, 3, H, W], labels int64 tensors [N]. A domain is a dictionary of
splits, name: (images, labels). A source has "source" (what its network is trained on), and it and
its targets have "pool" (what target training sets are drawn from), "val" and "test"; no image is
in two of them. The splits and what a shift draws depend on DATA_SEED alone, never on a run.
"""

import contextlib
import gzip
import hashlib
import http.client
import math
import os
import shutil
import tarfile
import urllib.request
import zlib
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import affine_grid, grid_sample, interpolate

DATA_SEED = 0

Data = tuple[torch.Tensor, torch.Tensor]
Report = Callable[[str, int, int], None]  # (what is being done, how much of it, of how much)


class DataError(Exception):
    """Data that cannot be used; the message says in a line what is wrong and what to do."""


class MissingError(DataError):
    """Data that is neither there nor can be downloaded."""


def silent(text: str, done: int, total: int) -> None:
    """A `Report` that says nothing."""


# ---------------------------------------------------------------- domains


def provide(source: str, target: str, root: Path, report: Report = silent) -> None:
    """Download to `root` what a scenario needs and is not there.

    Raises MissingError where that fails, and DataError if the photos could not be read anyway.
    """
    there = present(source, target, root)
    if "bsds500" in there:
        _pillow()  # before anything is downloaded
    for name, md5 in MNIST.items():
        if not _idx_path(root, name):
            fetch(f"{MNIST_URL}{name}.gz", root / "mnist" / f"{name}.gz", md5, report)
    if not there.get("bsds500", True):
        archive = fetch(BSDS500_URL, root / "BSR_bsds500.tgz", report=report)
        try:
            _unpack_photos(archive, root / "bsds500")
        finally:
            archive.unlink()


def present(source: str, target: str, root: Path) -> dict[str, bool]:
    """For each data set that a scenario needs: is it in `root`?"""
    there = {"mnist": all(_idx_path(root, name) for name in MNIST)}
    if target == "mnist-m":
        there["bsds500"] = (root / "bsds500").exists()
    return there


def load(source: str, target: str | None, root: Path | None) -> dict[str, Data]:
    """The domain of a source, or of one of its targets if `target` is given.

    `root` is the folder of the real data; None means the built-in images. Raises DataError.
    """
    digits = _mnist(root) if root else _builtin_digits()
    if target is None:
        return digits
    if target == "mnist-m":
        shift = partial(photo_background, photos=_photos(root) if root else _builtin_photos())
    else:
        shift = SHIFTS[source, target]
    domain = {}
    for split in ("pool", "val", "test"):
        images, labels = digits[split]
        domain[split] = shift(images, draw=_generator(f"{source} {target} {split}")), labels
    return domain


def subsample(data: Data, ratio: int, seed: int) -> Data:
    """A draw of ratio x classes images, in proportion to the classes, at least one of each.

    Raises DataError where there are not so many.
    """
    x, y = data
    pool = y.bincount()  # images of each class
    pool_size, classes = len(y), int((pool > 0).sum())
    total = ratio * classes
    if total > pool_size:
        raise DataError(
            f"ratio {ratio} needs {total} images; the largest that {pool_size} images of "
            f"{classes} classes allow is {pool_size // classes}"
        )
    share = pool * total / pool_size
    counts = share.long().clamp(min=1).minimum(pool)
    while counts.sum() != total:  # the class that is furthest from its share gives or takes one
        over = counts.sum() > total
        rest = (counts - share).masked_fill(counts == 1, -math.inf) if over else share - counts
        counts[rest.masked_fill(pool == 0, -math.inf).argmax()] += -1 if over else 1
    order = torch.randperm(pool_size, generator=torch.Generator().manual_seed(seed))
    chosen = torch.cat([order[y[order] == c][:n] for c, n in enumerate(counts)])
    return x[chosen], y[chosen]


def _generator(name: str) -> torch.Generator:
    """The random numbers that belong to a name, the same in every run."""
    return torch.Generator().manual_seed(DATA_SEED + zlib.crc32(name.encode()))


# ---------------------------------------------------------------- shifts
#
# Each takes images and a generator `draw`, which the fixed ones do not use, and gives new images.


def blur(x: torch.Tensor, draw: torch.Generator, sigma: float) -> torch.Tensor:
    """Gaussian blur of `sigma` pixels, the edge repeated outwards."""
    rows, columns = _blur(x.shape[2], sigma), _blur(x.shape[3], sigma)
    return _by_chunks(lambda chunk: rows @ chunk @ columns.T, x)


def _blur(size: int, sigma: float) -> torch.Tensor:
    """The matrix [size, size] that blurs a line of pixels."""
    offsets = torch.arange(-math.ceil(3 * sigma), math.ceil(3 * sigma) + 1)
    weights = torch.exp(-(offsets**2) / (2 * sigma**2))
    sources = (torch.arange(size)[:, None] + offsets).clamp(0, size - 1)  # (size, offsets)
    return torch.zeros(size, size).scatter_add(
        1, sources, (weights / weights.sum()).expand(size, -1)
    )


def occlude(x: torch.Tensor, draw: torch.Generator, area: float) -> torch.Tensor:
    """A black rectangle over the share `area` of each image; drawn: aspect (1:2 to 2:1), place."""
    n, _, height, width = x.shape
    aspect = 2 ** _uniform(n, draw, 1)[:, None]  # (N, 1)

    def covered(pixels, side):  # (N, pixels)
        start = torch.rand(n, 1, generator=draw) * (pixels - side)
        centres = torch.arange(pixels) + 0.5
        return (start < centres) & (centres < start + side)

    rows = covered(height, height * (area * aspect).sqrt())
    columns = covered(width, width * (area / aspect).sqrt())
    return x.masked_fill(rows[:, None, :, None] & columns[:, None, None, :], 0)


def transform_random(x: torch.Tensor, draw: torch.Generator, strength: float) -> torch.Tensor:
    """An affine map drawn for each image.

    With strength 1: up to 90 degrees, shear 0.5, 0.7 to 1.4 times the size, and a quarter of the
    image, all of them either way.
    """
    angle, shear, zoom, *move = (_uniform(len(x), draw, strength) for _ in range(5))
    return affine(x, angle * math.pi / 2, shear * 0.5, 2 ** (zoom * 0.5), [m * 0.25 for m in move])


def transform_fixed(x: torch.Tensor, draw: torch.Generator, angle: float) -> torch.Tensor:
    """One affine map for all: `angle` degrees, shear 0.25, 0.8 times the size, a small move."""
    one = torch.ones(1)
    return affine(x, one * math.radians(angle), one * 0.25, one * 0.8, [one * 0.05, one * 0.05])


def affine(x: torch.Tensor, angle, shear, zoom, move) -> torch.Tensor:
    """Rotate anti-clockwise, shear, scale and move each image; black outside, bilinear inside.

    `angle` (radians), `shear`, `zoom` and the pair `move` (in widths and heights of the image,
    before the rotation) are each [N], or [1] for all images.
    """
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    rows = [cos, -sin + shear * cos, -2 * move[0], sin, cos + shear * sin, -2 * move[1]]
    theta = torch.stack([row.expand(len(x)) for row in rows], 1).view(-1, 2, 3)  # output to input

    def mapped(x, theta):
        grid = affine_grid(theta, x.shape, align_corners=False)
        return grid_sample(x, grid, align_corners=False)

    return _by_chunks(mapped, x, theta)


def photo_background(x: torch.Tensor, draw: torch.Generator, photos: list) -> torch.Tensor:
    """MNIST-M: |photo patch - digit| per channel, the patch drawn from `photos` [3, h, w]."""
    n, _, height, width = x.shape
    which = torch.randint(len(photos), (n,), generator=draw)
    place = torch.rand(2, n, generator=draw)
    patches = torch.empty_like(x)
    for number, photo in enumerate(photos):
        mine = (which == number).nonzero()[:, 0]
        windows = photo.unfold(1, height, 1).unfold(2, width, 1)  # (3, rows, columns, H, W)
        row = (place[0, mine] * windows.shape[1]).long()
        column = (place[1, mine] * windows.shape[2]).long()
        patches[mine] = windows[:, row, column].transpose(0, 1)
    return (patches.short() - x.short()).abs().byte()


def _uniform(n: int, draw: torch.Generator, limit: float) -> torch.Tensor:
    """n numbers drawn from -limit to limit."""
    return (torch.rand(n, generator=draw) * 2 - 1) * limit


def _by_chunks(shift, x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
    """`shift` on float chunks of the images (all at once would need much memory), as uint8."""
    chunks = zip(*(tensor.split(1000) for tensor in (x, *parameters)))
    return torch.cat(
        [shift(chunk.float(), *rest).round_().clamp_(0, 255).byte() for chunk, *rest in chunks]
    )


# Each strength was fitted once, to the base accuracy of Table 2 alone (mean of three source
# networks, real MNIST), before any method ran. The comments give ours and the paper's.
SHIFTS = {
    ("mnist", "blurry"): partial(blur, sigma=2.65),  # 0.750, 0.748
    ("mnist", "occluded"): partial(occlude, area=0.29),  # 0.582, 0.581
    ("mnist", "transform-random"): partial(transform_random, strength=0.77),  # 0.321, 0.322
    ("mnist", "transform-fixed"): partial(transform_fixed, angle=70),  # 0.159, 0.160
}


# ---------------------------------------------------------------- real data

MNIST = {  # file: MD5 of the .gz that is downloaded
    "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c",
}
MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
BSDS500_URL = (
    "http://www.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/BSR/BSR_bsds500.tgz"
)
PHOTOS, PHOTOS_COUNT = "BSR/BSDS500/data/images/train", 200  # inside the archive
TIMEOUT = 5  # seconds without an answer that end a download


def fetch(url: str, path: Path, md5: str | None = None, report: Report = silent) -> Path:
    """Download `url` to `path`, which is there only when whole. Raises MissingError."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    digest = hashlib.md5()
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            total = int(answer.headers.get("Content-Length") or 0)
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "wb") as file:
                while chunk := answer.read(1 << 18):
                    digest.update(chunk)
                    file.write(chunk)
                    report(f"downloading {path.name}", file.tell(), total)
                if file.tell() < total:
                    raise OSError(f"it ended after {file.tell()} of {total} bytes")
        if md5 and digest.hexdigest() != md5:
            raise OSError(f"its MD5 is {digest.hexdigest()}, not {md5}")
        part.replace(path)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise MissingError(
            f"{path} is missing, and downloading {url} failed ({reason}): put the file there"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    return path


def read_idx(path: Path) -> torch.Tensor:
    """The uint8 array of an IDX file, plain or gzipped (by its .gz ending). Raises DataError."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            magic = file.read(4)
            if magic[:3] != b"\0\0\x08" or magic[3:] not in (b"\1", b"\2", b"\3"):
                raise DataError(f"{path} is not an IDX file of bytes: delete it")
            header = file.read(4 * magic[3])
            shape = [int.from_bytes(header[i : i + 4], "big") for i in range(0, len(header), 4)]
            size = math.prod(shape)
            values = file.read(min(size, 1 << 28) + 1)  # a broken header may promise terabytes
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}): delete it") from error
    if len(header) < 4 * magic[3] or len(values) != size:
        raise DataError(f"{path} does not hold what its header promises: delete it")
    return torch.from_numpy(np.frombuffer(values, np.uint8).reshape(shape).copy())


def _idx_path(root: Path, name: str) -> Path | None:
    paths = [root / "mnist" / name, root / "mnist" / f"{name}.gz"]
    return next((path for path in paths if path.exists()), None)


@cache
def _mnist(root: Path) -> dict[str, Data]:
    """MNIST: of each 60 training images 25 for the source, 5 for validation, 30 as target pool."""
    images, labels, test_images, test_labels = (
        read_idx(_idx_path(root, name) or root / "mnist" / name) for name in MNIST
    )
    x, y = _digits(images, labels, root)
    order = torch.randperm(len(y), generator=_generator("mnist"))
    source, val, pool = order.tensor_split([len(y) * 25 // 60, len(y) * 30 // 60])
    return {
        "source": (x[source], y[source]),
        "pool": (x[pool], y[pool]),
        "val": (x[val], y[val]),
        "test": _digits(test_images, test_labels, root),
    }


def _digits(x: torch.Tensor, y: torch.Tensor, root: Path) -> Data:
    if x.shape[1:] != (28, 28) or y.shape != x.shape[:1] or len(y) < 60 or y.max() > 9:
        raise DataError(
            f"{root / 'mnist'}: images {list(x.shape)} with labels {list(y.shape)} are not MNIST, "
            "or a label is above 9: delete the files"
        )
    return x[:, None].expand(-1, 3, -1, -1), y.long()


def _pillow():
    try:
        from PIL import Image
    except ImportError:
        raise DataError("photos are read with Pillow: pip install pillow") from None
    return Image


@cache
def _photos(root: Path) -> list[torch.Tensor]:
    """The training photos of BSDS500: uint8 [3, h, w] each."""
    image, folder = _pillow(), root / "bsds500"
    photos = []
    for path in sorted(folder.glob("*.jpg")):
        try:
            with image.open(path) as photo:
                photos.append(torch.from_numpy(np.array(photo.convert("RGB"))).permute(2, 0, 1))
        except (OSError, ValueError, SyntaxError, image.DecompressionBombError) as error:
            raise DataError(f"{path} cannot be read as a photo ({error}): delete it") from error
        if min(photos[-1].shape[1:]) < 28:
            raise DataError(f"{path} is smaller than a patch of 28 x 28: delete it")
    if not photos:
        raise DataError(f"{folder} has no .jpg: put BSDS500's training photos there, or delete it")
    return photos


def _unpack_photos(archive: Path, folder: Path) -> None:
    """The photos in BSDS500's archive to `folder`, which is there only when whole.

    Raises MissingError.
    """
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    try:
        part.mkdir()
        with tarfile.open(archive) as tar:
            for member in tar:
                inside, _, name = member.name.rpartition("/")
                if inside == PHOTOS and name.endswith(".jpg") and member.isfile():
                    (part / name).write_bytes(tar.extractfile(member).read())
        if len(list(part.iterdir())) != PHOTOS_COUNT:
            raise tarfile.TarError(f"{PHOTOS} should have {PHOTOS_COUNT} photos")
        part.rename(folder)
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise MissingError(f"{BSDS500_URL} is not BSDS500 ({error}): fill {folder}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


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


@cache
def _builtin_digits() -> dict[str, Data]:
    sizes = {"source": 5000, "pool": 30000, "val": 1000, "test": 2000}
    return {split: draw_digits(size, _generator(split)) for split, size in sizes.items()}


def draw_digits(count: int, draw: torch.Generator) -> Data:
    """`count` images [count, 3, 28, 28] of digits in light strokes on black, and their classes.

    Drawn for each: the points of its stroke, and its rotation, slant, size, place and width.
    """
    x = torch.empty(count, 3, 28, 28, dtype=torch.uint8)
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
def _builtin_photos() -> list[torch.Tensor]:
    return list(draw_photos(40, _generator("photos")))


def draw_photos(count: int, draw: torch.Generator, side: int = 160) -> torch.Tensor:
    """`count` photo-like textures uint8 [count, 3, side, side]: coloured noise of many sizes."""
    photos = torch.zeros(count, 3, side, side)
    for cells in (2, 4, 8, 16, 32, 64):
        grey = torch.randn(count, 1, cells, cells, generator=draw)
        colour = torch.randn(count, 3, cells, cells, generator=draw)
        photos += interpolate(grey + 0.5 * colour, size=(side, side), mode="bilinear") / cells**0.5
    return (photos.sigmoid() * 255).round().byte()
