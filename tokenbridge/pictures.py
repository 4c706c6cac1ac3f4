"""Pictures to look at: grids of samples and of reconstructions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from PIL import Image

from tokenbridge.files import replacing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def save_images(folder: Path | str, pixels: Tensor) -> None:
    """Save uint8 images [N, C, H, W] as numbered PNG files, each whole or not at all."""
    for i, image in enumerate(pixels):
        array = image.permute(1, 2, 0).numpy()
        with replacing(Path(folder) / f"{i:06d}.png") as temporary:
            Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array).save(temporary)


def save_grid(
    path: Path | str,
    rows: Sequence[Tensor],
    row_names: Sequence[str],
    title: str,
    *,
    column_names: Sequence[str] | None = None,
    cell_inches: float = 0.55,
) -> None:
    """Draw uint8 images in rows, each row named at its left.

    Args:
        path: PNG to write.
        rows: for each row, images [N, C, H, W] of one size.
        row_names: a name for each row.
        title: above the grid.
        column_names: names above the columns, if any.
        cell_inches: size of an image in the picture.
    """
    num_columns = max(len(row) for row in rows)
    margin = 0.25 + 0.075 * max(len(name) for name in row_names)
    size = (num_columns * cell_inches + margin, len(rows) * cell_inches + 0.75)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=9)
    axes = figure.subplots(len(rows), num_columns, squeeze=False, gridspec_kw={"wspace": 0.03, "hspace": 0.03})
    for i, (images, name) in enumerate(zip(rows, row_names, strict=True)):
        for j in range(num_columns):
            axis = axes[i, j]
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if i == 0 and column_names is not None:
                axis.set_title(column_names[j], fontsize=6, pad=2)
            if j == 0:
                axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=7)
            if j < len(images):
                image = images[j].permute(1, 2, 0).numpy()
                grey = image.shape[-1] == 1
                axis.imshow(image.squeeze(-1) if grey else image, cmap="gray" if grey else None, vmin=0, vmax=255)
    with replacing(path) as temporary:
        figure.savefig(temporary)
