"""Images of any code base as uint8 batches: a folder, a zip, an npz, or a run of this project."""

import json
import os
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from torch import Tensor

from evodiff.errors import MetricError
from evodiff.files import sha256
from evodiff.metrics.features import check_images

EXTENSIONS = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
LOSSY = {".jpg", ".jpeg", ".webp"}
MODES = {"L": 1, "RGB": 3}

Named = tuple[str, Tensor]
"""Where images come from, and uint8 [n, C, H, W]."""
File = tuple[str, bytes]
"""Where an image file lies, and what is in it."""
AT_ONCE = 256
"""Files that are in memory."""


def read_images(path: Path, channels: int, rounding: str = "round", batch: int = 64) -> Iterator[Tensor]:
    """uint8 [batch, channels, H, W] of all images at `path`, in order of their names.

    A folder with a `manifest.json` of shards is a run of this project; any other is searched to its leaves for image
    files. An npz holds one array of images, [N, H, W, C], [N, C, H, W] or [N, H, W]; floats must be in 0..255 and are
    rounded by `rounding`. Raises MetricError, naming the file, for what is empty, corrupt, of another size or number of
    channels.
    """
    if path.is_dir():
        run = _run(path)
        chunks = _decoded(_of_folder(path), channels) if run is None else _of_run(path, run, channels, rounding)
    elif path.suffix.lower() == ".zip":
        chunks = _decoded(_of_zip(path), channels)
    elif path.suffix.lower() == ".npz":
        chunks = _of_npz(path, channels, rounding)
    else:
        raise MetricError(f"{path} is no folder, .zip or .npz; give a folder of images, a zip of images or an npz")
    return _rebatched(path, chunks, batch)


def lossy(path: Path) -> bool:
    """Whether some image file there is of a format that has changed its pixels."""
    return any(Path(name).suffix.lower() in LOSSY for name in _names(path))


def _names(path: Path) -> list[str]:
    if path.is_dir():
        found, seen = [], set()
        for folder, below, files in os.walk(path, followlinks=True):
            if (place := os.path.realpath(folder)) in seen:  # links may lead round in a circle
                below.clear()
                continue
            seen.add(place)
            below[:] = sorted(name for name in below if not name.startswith("."))
            found += [str((Path(folder) / name).relative_to(path)) for name in files if _is_image(name)]
        return sorted(found)
    if path.suffix.lower() == ".zip":
        try:
            with zipfile.ZipFile(path) as archive:
                return [entry.filename for entry in _entries(archive)]
        except (OSError, zipfile.BadZipFile) as e:
            raise MetricError(f"{path} is no readable zip: {e}") from e
    return []


def _entries(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """Not names, of which an archive may have one twice: all are read."""
    images = (e for e in archive.infolist() if not e.is_dir() and _is_image(e.filename))
    return sorted((e for e in images if "__MACOSX" not in e.filename), key=lambda e: e.filename)


def count_images(path: Path) -> int | None:
    """How many image files a folder or zip has; None for a run or an npz, which are read to be counted."""
    return None if path.is_dir() and _run(path) else len(_names(path)) or None


def _is_image(name: str) -> bool:
    path = Path(name)
    return path.suffix.lower() in EXTENSIONS and not any(part.startswith(".") for part in path.parts)


def _of_folder(path: Path) -> Iterator[File]:
    for name in _names(path):
        try:
            content = (path / name).read_bytes()
        except OSError as e:
            raise MetricError(f"{path / name} cannot be read: {e.strerror or e}") from e
        yield f"{path / name}", content


def _of_zip(path: Path) -> Iterator[File]:
    _names(path)  # raises for what is no zip
    with zipfile.ZipFile(path) as archive:
        for entry in _entries(archive):
            name = f"{entry.filename} in {path}"
            try:
                content = archive.read(entry)
            except Exception as e:  # zlib's errors among them
                raise MetricError(f"{name} cannot be read: {e}") from e
            yield name, content


def _decoded(files: Iterator[File], channels: int) -> Iterator[Named]:
    """Image files as uint8 [1, C, H, W], several at a time: Pillow lets other threads go on while it decodes."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while some := list(islice(files, AT_ONCE)):
            yield from pool.map(partial(_image, channels), some)


def _image(channels: int, file: File) -> Named:
    name, content = file
    try:
        image = Image.open(BytesIO(content))
        deep = _is_deep(image)
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # a camera's previews are no images
        image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        reason = "it is of no known format" if isinstance(e, UnidentifiedImageError) else str(e)
        raise MetricError(f"{name} is no readable image: {reason}") from e
    if deep or MODES.get(image.mode) != channels:
        expected = "grey" if channels == 1 else "RGB"
        mode = f"mode {image.mode}{', of 16 bits' if deep else ''}"
        raise MetricError(f"{name} has {mode}, but this protocol scores 8-bit {expected} images")
    if frames > 1:
        raise MetricError(f"{name} holds {frames} images; save each in a file of its own")
    pixels = torch.from_numpy(np.array(image))
    return name, pixels[None, None] if channels == 1 else pixels.permute(2, 0, 1)[None]


def _is_deep(image: ImageFile) -> bool:
    """Whether it has colours of 16 bits, of which Pillow would keep the high bytes; a PPM says the largest value."""
    largest = (args[1] for codec, _, _, args in image.tile if codec.startswith("ppm") and isinstance(args, tuple))
    return ";16" in str(image.tile) or max(largest, default=0) > 255


@dataclass(frozen=True)
class _Run:
    """First seed and sha256 of a run's shards, how many images they hold and should hold, how these became uint8."""

    shards: dict[int, str]
    images: int
    asked: int
    rounding: str


def _run(path: Path) -> _Run | None:
    """None for a folder that is no run, whatever its manifest.json is."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        shards = {int(shard["first"]): str(shard["sha256"]) for shard in manifest["shards"]}
        images = sum(shard["last"] - shard["first"] + 1 for shard in manifest["shards"])
        first, last = map(int, manifest["run"]["seeds"])
        return _Run(shards, images, last - first + 1, str(manifest["run"]["rounding"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _of_run(path: Path, run: _Run, channels: int, rounding: str) -> Iterator[Named]:
    if run.rounding != rounding:
        raise MetricError(
            f"{path} was sampled with rounding={run.rounding}, but this protocol scores images with "
            f"rounding={rounding}. Sample with that, or choose another protocol."
        )
    if run.images != run.asked:
        raise MetricError(f"{path} has {run.images} of its {run.asked} images: run the sampling again, which goes on")
    for first, digest in sorted(run.shards.items()):
        file = path / f"shard-{first:06d}.npz"
        if not file.exists() or sha256(file) != digest:
            raise MetricError(f"{file} is not what its manifest promises; run the sampling again")
        yield from _of_npz(file, channels, rounding)


def _of_npz(path: Path, channels: int, rounding: str) -> Iterator[Named]:
    try:
        with zipfile.ZipFile(path), np.load(path) as file:  # which would read other files under this name, too
            names = [n for n in ("images", "samples", "arr_0") if n in file]
            array = file[names[0]] if names else None
            held = ", ".join(sorted(file))
    except Exception as e:  # what a damaged or foreign archive makes zipfile, zlib and numpy raise has no end
        raise MetricError(f"{path} is no readable npz: {e}") from e
    if array is None or array.ndim not in (3, 4):
        raise MetricError(
            f"{path} holds {held}; expected an array `images`, `samples` or `arr_0` of shape [N, H, W, C]"
        )
    array = _as_uint8(array, path, rounding)  # under the same name: the floats are not kept
    yield str(path), _as_nchw(torch.from_numpy(array), path, channels)


def _as_nchw(images: Tensor, path: Path, channels: int) -> Tensor:
    if images.ndim == 3:
        images = images[..., None]
    if images.shape[3] == channels or images.shape[1] not in (1, 3):
        images = images.permute(0, 3, 1, 2)
    try:
        check_images(images, channels)
    except MetricError as e:
        raise MetricError(f"{path}: {e}") from e
    return images


def _as_uint8(array: np.ndarray, path: Path, rounding: str) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise MetricError(f"{path} holds {array.dtype}; expected uint8, or floats in 0..255")
    if not array.size:
        raise MetricError(f"{path} holds no images: its array is of shape {list(array.shape)}")
    low, high = float(array.min()), float(array.max())
    if low >= 0 and 1 < high <= 2:  # as uint8 these would be black
        raise MetricError(
            f"{path} holds floats from {low:g} to {high:g}, which looks like 0..1 with overshoot; expected 0..255: "
            f"clip and scale them, or save uint8"
        )
    if not (low >= 0 and 1 < high <= 255):
        raise MetricError(f"{path} holds floats from {low:g} to {high:g}; expected 0..255: scale them, or save uint8")
    return (np.rint(array) if rounding == "round" else np.floor(array)).astype(np.uint8)


def _rebatched(path: Path, chunks: Iterator[Named], batch: int) -> Iterator[Tensor]:
    waiting: list[Tensor] = []
    first: tuple[str, str] | None = None
    for name, chunk in chunks:
        size = f"{chunk.shape[3]}x{chunk.shape[2]}"
        first = first or (name, size)
        if size != first[1]:
            raise MetricError(f"{name} is {size}, but {first[0]} is {first[1]}; expected images of one size")
        waiting.append(chunk)
        if sum(map(len, waiting)) >= batch:
            *full, rest = _joined(waiting).split(batch)
            yield from full
            waiting = [rest]
    if first is None:
        raise MetricError(f"{path} holds no images ({', '.join(sorted(EXTENSIONS))})")
    yield _joined(waiting)


def _joined(parts: list[Tensor]) -> Tensor:
    """Without a copy of a single one, which may be a whole npz."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
