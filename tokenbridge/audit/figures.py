"""Pictures and loss curves of the page, as data URIs and SVG."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from PIL import Image

from tokenbridge.utils.console import log
from tokenbridge.utils.errors import UserError, reading
from tokenbridge.utils.files import read_bytes

LOSSLESS_BYTES = 150_000  # smaller pictures are stored without loss; the page stays below 3 MB
LARGEST_PICTURE = 2**25  # bytes of a picture file
MOST_PIXELS = 2**24
LOSSY_QUALITY = 82  # of WebP, for larger pictures


@dataclass(frozen=True)
class Picture:
    """A picture of the reference results, and the picture of the same name from a user's run."""

    name: str
    reference: str | None  # data URI
    own: str | None  # data URI; None if the run has no such picture, or the same file
    same: bool  # the run's picture is the reference's, byte for byte
    size: tuple[int, int]  # width, height in pixels


def pictures(reference: Path, runs: Path | None) -> list[Picture]:
    """Return the grids of samples in both folders, TokenBridge's first, and of these the one with most levels first."""

    def rank(name: str) -> tuple[bool, bool, int, str]:
        levels = re.search(r"\d+", name)
        return "tokenbridge" not in name, "confidence" in name, -int(levels[0]) if levels else 0, name

    names = {path.name for folder in (reference, runs) if folder for path in folder.glob("samples-*.png")}
    return [found for name in sorted(names, key=rank) if (found := picture_pair(name, reference, runs))]


def picture_pair(name: str, reference: Path, runs: Path | None) -> Picture | None:
    """Return the picture `name` of the reference and of a user's run, or None if neither has it.

    A picture of the user that cannot be read is left out, because it is no evidence; a line on stderr says so.
    """
    stored, own = reference / name, None if runs is None else runs / name
    stored_picture = _read(stored) if stored.is_file() else None
    own_picture, same = None, False
    if own is not None and own.exists():
        try:
            with reading(own, "a picture"):
                same = stored_picture is not None and read_bytes(own, LARGEST_PICTURE) == stored.read_bytes()
                own_picture = None if same else _read(own)
        except UserError as error:
            log(f"The page leaves out a picture of the run: {error}")
    either = stored_picture or own_picture
    if either is None:
        return None
    stored_uri, own_uri = (found and found[0] for found in (stored_picture, own_picture))
    return Picture(name.removeprefix("samples-").removesuffix(".png"), stored_uri, own_uri, same, either[1])


def _read(path: Path) -> tuple[str, tuple[int, int]]:
    """Return a picture as data URI, and its width and height; its pixels are read only if they are few enough."""
    content = read_bytes(path, LARGEST_PICTURE)
    with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
        if image.width * image.height > MOST_PIXELS:
            raise UserError(f"{path} has {image.width} x {image.height} pixels, more than a picture of a run has.")
        return data_uri(image), image.size


def data_uri(image: Image.Image) -> str:
    """Return a picture as WebP in a data URI, without loss if that takes at most `LOSSLESS_BYTES`."""
    picture = image.convert("RGB")  # the grids are opaque
    content = _webp(picture, lossless=True)
    if len(content) > LOSSLESS_BYTES:
        content = _webp(picture, quality=LOSSY_QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(content).decode('ascii')}"


def _webp(picture: Image.Image, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="WEBP", method=4, **settings)
    return buffer.getvalue()


INK, MUTED, ACCENT = "#010101", "#020202", "#030303"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
}


@dataclass(frozen=True)
class Curve:
    """The training loss of one model."""

    name: str
    svg: Markup
    num_parameters: int
    num_images_seen: int
    seconds: float
    last: float


def loss_curves(folder: Path) -> list[Curve]:
    """Draw the loss in every training log `*.json` of a folder."""
    curves = []
    for path in sorted(folder.glob("*.json")):
        log = json.loads(path.read_text(encoding="utf-8"))
        steps, losses = zip(*log["loss"], strict=True)
        with matplotlib.rc_context(STYLE | {"svg.hashsalt": path.stem}):
            figure = Figure(figsize=(4.2, 2.6), layout="constrained")
            axes = figure.add_subplot()
            axes.plot(steps, losses, color=ACCENT, linewidth=1)
            if min(losses) > 0:
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
                axes.yaxis.set_minor_formatter(NullFormatter())
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
            axes.set_xlabel("step")
            axes.set_ylabel("loss")
            axes.set_xlim(0, steps[-1])
            what = f"Training loss of {path.stem}: {losses[0]:.4g} at step {steps[0]}, {losses[-1]:.4g} at {steps[-1]}."
            svg = inline_svg(figure, f"loss-{path.stem}", what)
        curves.append(Curve(path.stem, svg, log["num_parameters"], log["num_images_seen"], log["seconds"], losses[-1]))
    return curves


def inline_svg(figure: Figure, name: str, description: str) -> Markup:
    """Return a figure as SVG that can be embedded in a page with others.

    Args:
        figure: drawn with `STYLE`.
        name: prefix of every id, since matplotlib's ids are unique within one figure only.
        description: text for readers who cannot see the figure.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    view_box = re.search(r'viewBox="[^"]*"', svg)
    assert view_box is not None
    svg = svg[svg.index(">", svg.index("<svg")) + 1 :]  # after the opening tag, which is replaced below
    svg = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>|<!--.*?-->", "", svg, flags=re.DOTALL)
    prefix = re.sub(r"[^A-Za-z0-9-]", "-", name)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}-", svg)
    svg = re.sub(r'xlink:href="#', f'href="#{prefix}-', svg)
    for colour, variable in ((INK, "ink"), (MUTED, "muted"), (ACCENT, "accent")):
        svg = svg.replace(colour, f"var(--{variable})")
    start = Markup('<svg role="img" aria-label="{}" {}>').format(description, Markup(view_box[0]))  # noqa: S704
    return start + Markup(svg)  # noqa: S704 - matplotlib has escaped the names in it
