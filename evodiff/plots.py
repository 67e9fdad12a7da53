"""The figures: a metric against NFE, and samples side by side."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np

from evodiff.files import whole_file
from evodiff.pictures import mosaic

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
STYLES = ("-", "--", ":", "-.")
TICKS = (3, 5, 10, 20, 50, 100, 200, 500, 1000)
CELLS = "Cells"
MANY = 20
"""Methods that one figure can tell apart."""
UPRIGHT: dict[str, Any] = {"rotation": 0, "ha": "right", "va": "center"}
BESIDE: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1), "borderaxespad": 0}


def save_sample_sheet(path: Path, sheets: Mapping[str, Mapping[int, np.ndarray]], across: int = 3) -> None:
    """The same seeds by every solver (rows) at every NFE (columns): uint8 [across^2 or more, C, H, W] in each cell. The
    PNG says in its text CELLS how many cells it has."""
    nfes = sorted({nfe for row in sheets.values() for nfe in row})
    figure, axes = plt.subplots(
        len(sheets), len(nfes), figsize=(1.6 * len(nfes) + 1.2, 1.6 * len(sheets)), squeeze=False
    )
    for i, (label, cells) in enumerate(sheets.items()):
        for axis, nfe in zip(axes[i], nfes, strict=True):
            _bare(axis)
            if nfe in cells:
                axis.imshow(mosaic(cells[nfe], across), cmap="gray", vmin=0, vmax=255)
            if i == 0:
                axis.set_title(f"NFE {nfe}", fontsize=10)
        axes[i][0].set_ylabel(label, fontsize=9, **UPRIGHT)
    figure.tight_layout(pad=0.4)
    _save(figure, path, told={CELLS: str(sum(map(len, sheets.values())))}, fitted=True)


class Curve(NamedTuple):
    """One method over NFE: our values, half the width of their 95 % confidence, and what its paper reports."""

    values: dict[int, float]
    half_widths: dict[int, float]
    papers: dict[int, float]


def foremost(curves: Mapping[str, Curve]) -> list[str]:
    """The methods to tell apart by colour: all, or where they are too many, those that have one of the three least
    values at some NFE."""
    if len(curves) <= MANY:
        return list(curves)
    columns = ({label: c.values[n] for label, c in curves.items() if n in c.values} for n in nfes_of(curves))
    leading = {label for column in columns for label in sorted(column, key=column.__getitem__)[:3]}
    return [label for label in curves if label in leading]


def nfes_of(curves: Mapping[str, Curve]) -> list[int]:
    return sorted({n for curve in curves.values() for n in (*curve.values, *curve.papers)})


def save_curves(
    paths: Sequence[Path],
    curves: Mapping[str, Curve],
    ylabel: str,
    lines: Mapping[str, float] | None = None,
    title: str = "",
    named: Collection[str] | None = None,
) -> None:
    """One line per method over NFE, logarithmic, with its confidence; papers' points are hollow; `lines` are levels.

    Of methods that are not `named` (None: all are) there is a thin grey line.
    """
    others = [curve for label, curve in curves.items() if named is not None and label not in named]
    shown = {label: curve for label, curve in curves.items() if named is None or label in named}
    many = len(curves) > 10
    # a logarithmic axis has no place for 0, the distance of a run from itself
    positive = any(v > 0 for curve in curves.values() for v in (*curve.values.values(), *curve.papers.values()))
    figure, axis = plt.subplots(figsize=(10, max(6, 0.21 * len(shown))) if many else (7, 4.4))
    for curve in others:
        label = f"{len(others)} others" if curve is others[-1] else None
        axis.plot(*zip(*sorted(curve.values.items()), strict=True), color="#c8c8c8", lw=0.7, zorder=1, label=label)
    for i, (label, curve) in enumerate(shown.items()):
        nfes, colour, marker = sorted(curve.values), COLOURS[i % 10], MARKERS[i % 10]
        style = STYLES[i // 10 % len(STYLES)]
        ours = [curve.values[n] if curve.values[n] > 0 or not positive else np.nan for n in nfes]
        axis.plot(nfes, ours, marker + style, color=colour, label=label, ms=4.5, lw=1.6)
        if curve.half_widths:
            half = np.array([curve.half_widths.get(n, 0.0) for n in nfes])
            low = np.maximum(
                np.array(ours) - half, np.array(ours) / 10
            )  # a logarithmic axis has no place for less than 0
            axis.fill_between(nfes, low, np.array(ours) + half, color=colour, alpha=0.18, lw=0)
        if curve.papers:
            papers = sorted(curve.papers)
            axis.plot(papers, [curve.papers[n] for n in papers], marker, mfc="none", mec=colour, ms=7, alpha=0.8)
            if not nfes:  # nothing of ours in the legend
                axis.plot([], [], marker, mfc="none", mec=colour, ms=7, label=f"{label} (paper)")
    for label, value in (lines or {}).items():
        if positive and value <= 0:
            continue
        axis.axhline(value, color="#555555", lw=1, ls=":" if "floor" in label else "--", label=f"{label}: {value:.3g}")
    nfes = nfes_of(curves)
    wide = bool(nfes) and nfes[-1] > 8 * nfes[0]
    scales = {"yscale": "log" if positive else "linear", "xscale": "log" if wide else "linear"}
    axis.set(xlabel="NFE", ylabel=ylabel, title=title, **scales)
    if wide:
        axis.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axis.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda v, _: f"{v:g}"))
        axis.set_xticks([n for n in TICKS if nfes[0] <= n <= nfes[-1]])
    else:
        axis.set_xticks(nfes if len(nfes) <= 12 else nfes[::5])
    low, high = axis.get_ylim()
    if positive and high < 10 * low:  # a power of ten or none would be all that is labelled
        axis.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
    axis.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda v, _: f"{v:g}"))
    axis.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axis.grid(True, which="both", alpha=0.25)
    axis.legend(fontsize=8 if many else 9, edgecolor="none", **(BESIDE if many else {}))  # white behind it, not lines
    figure.tight_layout()
    for path in paths:
        _save(figure, path, close=False)
    plt.close(figure)


def save_trajectories(path: Path, rows: Mapping[str, tuple[np.ndarray, np.ndarray]], title: str) -> None:
    """For each method uint8 images [NFE + 1, C, H, W] at falling kappas [NFE], the last image being the sample."""
    columns = max(len(images) for images, _ in rows.values())
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(0.95 * columns + 1.6, 1.15 * len(rows) + 0.4), squeeze=False
    )
    for line, (label, (images, kappas)) in zip(axes, rows.items(), strict=True):
        names = [f"{kappa:.2g}" for kappa in kappas] + ["sample"]
        for axis in line:
            _bare(axis)
        for axis, image, name in zip(line, images, names, strict=False):
            axis.imshow(image.transpose(1, 2, 0), cmap="gray", vmin=0, vmax=255)
            axis.set_title(name, fontsize=7, pad=2)
        line[0].set_ylabel(label, fontsize=8, **UPRIGHT)
    figure.tight_layout(pad=0.3)
    figure.suptitle(f"D at each noise-to-signal ratio, {title}", fontsize=9, y=1.0, va="bottom")  # above all labels
    _save(figure, path, fitted=True)


def _bare(axis: plt.Axes) -> None:
    """Without frame and ticks, though with its labels, for which tight_layout makes room."""
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set_visible(False)


def _save(
    figure: plt.Figure, path: Path, close: bool = True, told: dict[str, str] | None = None, fitted: bool = False
) -> None:
    """`fitted` to what is drawn, for labels beside images of a fixed shape may be wider than what was left for them."""
    # no date and a fixed id salt: the same records give the same file
    plt.rcParams["svg.hashsalt"] = "evodiff"
    with whole_file(path) as temporary:
        metadata = {"Date": None} if path.suffix == ".svg" else told
        figure.savefig(temporary, dpi=150, metadata=metadata, bbox_inches="tight" if fitted else None, pad_inches=0.05)
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
