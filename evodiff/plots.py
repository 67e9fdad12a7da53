"""The figures: image grids, and a metric against NFE."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

from evodiff.files import whole_file

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  the backend comes first

COLOURS = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#D55E00",
    "#56B4E9",
    "#7F7F7F",
    "#8C564B",
    "#000000",
    "#B8A900",
)
"""Okabe and Ito's palette, told apart by readers with colour-blindness, and a few more."""
MARKERS = "osD^vP*X<>"


def save_grid(path: Path, images: np.ndarray, columns: int, scale: int = 2) -> None:
    """uint8 [N, C, H, W] as one PNG, row by row, with a thin gap; every pixel `scale` x `scale`."""
    n, channels, height, width = images.shape
    rows = -(-n // columns)
    canvas = np.full((rows * (height + 1) + 1, columns * (width + 1) + 1, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = (i // columns) * (height + 1) + 1, (i % columns) * (width + 1) + 1
        canvas[y : y + height, x : x + width] = image.transpose(1, 2, 0) if channels == 3 else image[0][..., None]
    with whole_file(path) as temporary:
        plt.imsave(temporary, canvas.repeat(scale, 0).repeat(scale, 1))


def save_pngs(folder: Path, seeds: Sequence[int], images: np.ndarray) -> None:
    """uint8 [N, C, H, W] as `000012.png` for seed 12, each file whole or absent; compressed without loss."""
    for seed, image in zip(seeds, images, strict=True):
        pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
        with whole_file(folder / f"{seed:06d}.png") as temporary:
            Image.fromarray(pixels).save(temporary)


def save_sample_sheet(path: Path, sheets: Mapping[str, Mapping[int, np.ndarray]], across: int = 3) -> None:
    """The same seeds by every solver (rows) at every NFE (columns): uint8 [across^2 or more, C, H, W] in each cell."""
    nfes = sorted({nfe for row in sheets.values() for nfe in row})
    figure, axes = plt.subplots(
        len(sheets), len(nfes), figsize=(1.6 * len(nfes) + 1.2, 1.6 * len(sheets)), squeeze=False
    )
    for i, (label, cells) in enumerate(sheets.items()):
        for axis, nfe in zip(axes[i], nfes, strict=True):
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set_visible(False)
            if nfe in cells:
                axis.imshow(mosaic(cells[nfe], across), cmap="gray")
            if i == 0:
                axis.set_title(f"NFE {nfe}", fontsize=10)
        axes[i][0].set_ylabel(label, fontsize=9, rotation=0, ha="right", va="center")
    figure.tight_layout(pad=0.4)
    _save(figure, path)


def mosaic(images: np.ndarray, across: int) -> np.ndarray:
    """The first `across`^2 images [N, C, H, W] as one [across H, across W, C], without gaps."""
    _, channels, height, width = images.shape
    tiles = images[: across**2].reshape(across, across, channels, height, width)
    return tiles.transpose(0, 3, 1, 4, 2).reshape(across * height, across * width, channels)


def save_curves(
    paths: Sequence[Path],
    curves: Mapping[str, Mapping[int, float]],
    ylabel: str,
    lines: Mapping[str, float] | None = None,
    title: str = "",
) -> None:
    """One line per solver over NFE, logarithmic; `lines` are levels such as the noise floor."""
    figure, axis = plt.subplots(figsize=(7, 4.4))
    for i, (label, points) in enumerate(curves.items()):
        nfes = sorted(points)
        axis.plot(
            nfes,
            [points[n] for n in nfes],
            MARKERS[i % 10] + "-",
            color=COLOURS[i % 10],
            label=label,
            ms=4.5,
            lw=1.6,
        )
    for label, value in (lines or {}).items():
        axis.axhline(value, color="#555555", lw=1, ls=":" if "floor" in label else "--")
        axis.annotate(f"{label} {value:.3g}", (1, value), xycoords=("axes fraction", "data"), xytext=(-4, 3),
                      textcoords="offset points", ha="right", fontsize=8, color="#555555")  # fmt: skip
    nfes = sorted({n for points in curves.values() for n in points})
    axis.set(xlabel="NFE", ylabel=ylabel, title=title, yscale="log")
    axis.set_xticks(nfes if len(nfes) <= 12 else nfes[::5])
    axis.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda v, _: f"{v:g}"))
    axis.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axis.grid(True, which="both", alpha=0.25)
    axis.legend(fontsize=9, frameon=False)
    figure.tight_layout()
    for path in paths:
        _save(figure, path, close=False)
    plt.close(figure)


def _save(figure: plt.Figure, path: Path, close: bool = True) -> None:
    # no date and a fixed id salt: the same records give the same file
    plt.rcParams["svg.hashsalt"] = "evodiff"
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    if close:
        plt.close(figure)


def save_loss_curve(path: Path, log: Sequence[tuple[float, float]], xlabel: str) -> None:
    """Training loss, logarithmic, over images or epochs seen."""
    figure, axis = plt.subplots(figsize=(6, 3.2))
    axis.plot(*zip(*log, strict=True), color=COLOURS[0], lw=1.2)
    axis.set(xlabel=xlabel, ylabel="training loss", yscale="log")
    axis.grid(True, which="both", alpha=0.25)
    figure.tight_layout()
    _save(figure, path)
