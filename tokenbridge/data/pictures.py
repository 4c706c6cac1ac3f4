"""Writing images as PNG files, and as grids of samples or reconstructions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from matplotlib.figure import Figure

from tokenbridge.data.images import to_pil
from tokenbridge.utils.files import flush, replacing
from tokenbridge.utils.text import plain

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor


def save_images(folder: Path | str, pixels: Tensor, numbers: Iterable[int] | None = None) -> None:
    """Save uint8 images [N, C, H, W] as PNG files, atomically; they are numbered from 0, or by `numbers`.

    They are on the disk at the end. After a power cut before it, the last ones may be damaged, as any reader sees.
    """
    names = [f"{i:06d}.png" for i in (range(len(pixels)) if numbers is None else numbers)]
    for name, image in zip(names, to_pil(pixels), strict=True):
        with replacing(Path(folder) / name, flushed=False) as temporary:
            image.save(temporary)
    if names:
        flush(folder, names)


def save_grid(
    path: Path | str,
    rows: Sequence[Tensor],
    row_names: Sequence[str],
    title: str,
    *,
    column_names: Sequence[str] | None = None,
    cell_inches: float = 0.5,
) -> None:
    """Write a PNG of uint8 images in rows, with the name of each row at its left.

    Args:
        rows: for each row, images [N, C, H, W]; all images have the same size.
        row_names: a name for each row.
        title: text above the grid.
        column_names: names above the columns, if any.
        cell_inches: width of an image in the picture.
    """
    num_columns = max(len(row) for row in rows)
    _, channels, height, width = rows[0].shape
    gap = max(1, height // 24)
    canvas = torch.full((len(rows) * (height + gap) - gap, num_columns * (width + gap) - gap, channels), 255)
    for i, images in enumerate(rows):
        for j, image in enumerate(images):
            top, left = i * (height + gap), j * (width + gap)
            canvas[top : top + height, left : left + width] = image.permute(1, 2, 0)
    # The size of the picture is that of the grid in inches, plus margins for the names around it.
    grid_width = num_columns * cell_inches
    grid_height = len(rows) * cell_inches * height / width
    margin_left = 0.15 + 0.062 * max(len(name) for name in row_names)
    margin_top, margin = 0.5 if column_names else 0.3, 0.08
    size = (margin_left + grid_width + margin, margin_top + grid_height + margin)
    figure = Figure(figsize=size, dpi=150)
    box = (margin_left / size[0], margin / size[1], grid_width / size[0], grid_height / size[1])
    axes = figure.add_axes(box)
    picture = canvas.numpy()
    if channels == 1:
        axes.imshow(picture[..., 0], cmap="gray", vmin=0, vmax=255, interpolation="nearest", aspect="auto")
    else:
        axes.imshow(picture, interpolation="nearest", aspect="auto")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, pad=3, labelsize=7, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.set_yticks([i * (height + gap) + height / 2 for i in range(len(rows))], list(row_names))
    names = list(column_names or [])
    axes.set_xticks([j * (width + gap) + width / 2 for j in range(len(names))], names)
    # The names in a title are not mathematics, and the fonts have no control characters.
    figure.text(0.5, 1 - 0.1 / size[1], plain(title), ha="center", va="top", fontsize=8, wrap=True, parse_math=False)
    with replacing(path) as temporary:
        figure.savefig(temporary)
