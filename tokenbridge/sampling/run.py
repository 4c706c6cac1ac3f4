"""A sampling run: it makes N images of any system in a folder, in one or several processes, and can be resumed.

The images are divided into fixed batches, which are dealt to the processes in turn. The files on the disk show what is
finished: a batch whose images all exist is never made again. `run.json` holds the recipe of the run, and a folder never
holds images of two recipes.

There are two kinds of randomness:

- ``"per-image"``: every image has a stream of its own, seeded with (seed, image number). It depends neither on its
  batch nor on its process, apart from the rounding of sums in batches of other sizes.
- ``"official"``: random numbers are drawn as in engine_tokenbridge.py. numpy's and torch's global streams are seeded
  with seed + rank and run on through all batches of a process. The last batch is filled up with label 0, and random
  labels are drawn before each batch (LlamaGen's sample_c2i_ddp.py). Images depend on the batch size and on the number
  of processes, so both belong to the recipe. The state of the streams is saved with every batch, so that a resumed run
  continues them. The draws have the order of the official ones, and happen on the device that the official code uses.
  Whether the images are identical also depends on the rounding of the logits, which no one guarantees across devices
  or versions.

Shape letters: N images of the run, B batch, C channels, H height, W width.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from PIL import Image
from torch import Tensor

from tokenbridge.data.images import to_pixels
from tokenbridge.data.pictures import save_grid
from tokenbridge.sampling.config import RunConfig, run_labels
from tokenbridge.sampling.store import STORES, read_first_images
from tokenbridge.utils import console, provenance
from tokenbridge.utils.devices import peak_memory
from tokenbridge.utils.errors import UnusableImageError, UserError
from tokenbridge.utils.files import clear_leftovers, replacing, storage_errors, write_json
from tokenbridge.utils.processes import process_state

RECIPE_FILE = "run.json"
NUM_LISTED = 8  # an error message lists at most this many differences


class Sampler(Protocol):
    """What a run needs of a model that makes images of classes."""

    @property
    def name(self) -> str:
        """The name of the model in titles and messages, which mentions stand-in weights."""
        ...

    @property
    def stand_in(self) -> bool:
        """Whether the weights were drawn by a rule, so that the images test the path but are not a result."""
        ...

    @property
    def num_classes(self) -> int:
        """The number of classes; labels are in 0 .. `num_classes` - 1."""
        ...

    @property
    def image_size(self) -> int:
        """The height and width of the images."""
        ...

    @property
    def channels(self) -> int:
        """The number of color channels of the images, 1 or 3."""
        ...

    def images(self, labels: Tensor, indices: Sequence[int], seed: int | None) -> Tensor:
        """Make a batch of images.

        Args:
            labels: [B].
            indices: for each image of the batch, its number in the run.
            seed: image i is drawn from the stream (seed, i). If None, images are drawn from the global streams of numpy
                and torch.

        Returns:
            Pixels, uint8 [B, C, H, W] on the CPU.

        Raises:
            BadImageError: an image has NaN logits or pixels.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Return all that the images depend on as JSON values: settings, precision, and SHA-256 of the weights."""
        ...


class BadImageError(FloatingPointError):
    """An image of a batch is NaN or black; `row` is its index in the batch."""

    def __init__(self, row: int, what: str) -> None:
        super().__init__(what)
        self.row = row


def refuse(bad: Tensor, what: str) -> None:
    """Raise BadImageError for the first row where `bad` [B] is true; the message becomes "Image 7 ... `what`"."""
    if bool(bad.any()):
        raise BadImageError(int(bad.nonzero()[0]), what)


@dataclass(frozen=True)
class RunReport:
    """The images of a run, and what the last call took to make them."""

    samples: Path  # a folder of PNG files, or an .npz
    num_images: int
    num_made: int  # number of images that this call made; the others existed already
    seconds: float  # time that this call took
    images_per_second: float | None  # None if this call made no images
    peak_memory_gib: float  # peak memory of this process, on its GPU if it has one


def run_recipe(sampler: Sampler, config: RunConfig, num_processes: int = 1) -> dict[str, Any]:
    """Return all that determines the images of a run as JSON values."""
    labels = ",".join(map(str, config.labels)) if isinstance(config.labels, tuple) else config.labels or "balanced"
    recipe = {"sampler": {"name": sampler.name, **sampler.describe()}, **asdict(config), "labels": labels}
    if config.randomness == "official":
        recipe["num_processes"] = num_processes
    if sampler.stand_in:
        recipe["no_result"] = "The weights are stand-ins drawn by a rule: these images say nothing about the model."
    return json.loads(json.dumps(recipe))


def sampling_run(sampler: Sampler, config: RunConfig, folder: Path | str, *, show_progress: bool = True) -> RunReport:
    """Make the images of a run in `folder`, except those that exist already.

    Every process of a distributed run calls this function. The format "png" writes `images/000000.png` and so on. The
    format "npz" writes parts to `parts/` and assembles them to `samples.npz` in the format of ADM's evaluation: `arr_0`
    is uint8 [N, H, W, 3], where grey images repeat their channel, and `arr_1` [N] holds the labels unless they were
    drawn together with the images. Images of stand-in weights go to `no-result/` or `no-result.npz` instead.

    Args:
        sampler: makes the images; it must be the same in every process.
        folder: a folder that is new or empty, or that holds the same run.
        show_progress: show images per second, time left and peak memory on stderr.

    Raises:
        UserError: a label is out of range, the folder holds something else or a run of another recipe, or a batch is
            too large for the memory.
        UnusableImageError: an image is NaN or black; the finished images are kept.
        StorageError: the folder cannot be written to, or the disk is full; the finished images are kept.
    """
    folder = Path(folder)
    labels = run_labels(config, sampler.num_classes)
    state = process_state()
    store = STORES[config.format](folder, config, "no-result" if sampler.stand_in else None)
    advice = "The finished images are kept: make room, and the same command makes the others."
    with storage_errors(folder, advice):
        left: list[Any] = [None]
        if state.is_main_process:
            _claim(folder, run_recipe(sampler, config, state.num_processes))
            for place in (folder, store.pieces):
                clear_leftovers(place)
            left = [store.present()]
        # One process looks at the disk for all, because another might look when a third one has begun to write.
        present: set[int] = broadcast_object_list(left)[0]
        progress = console.progress(
            f"sample {sampler.name}",
            config.num_images,
            "{done} of {total} images",
            "{rate:.3g} images/s, {left} left, {note}",
            first=len(present),
            show=show_progress and state.is_main_process,
        )
        start = time.perf_counter()
        with progress as advance:
            for number, seed in _batches(config, present, state, folder):
                pixels = _make(sampler, config, labels, number, seed, state.device)
                store.write(number, pixels, present)
                advance(len(store.present()), f"{peak_memory() / 2**30:.2f} GiB at most")
        state.wait_for_everyone()
        seconds = time.perf_counter() - start
        if state.is_main_process:
            assert len(store.present()) == config.num_images, "every batch is some process's"
            store.finish(None if labels is None else labels.numpy())
        state.wait_for_everyone()
    num_made = config.num_images - len(present)
    return RunReport(
        samples=store.samples,
        num_images=config.num_images,
        num_made=num_made,
        seconds=round(seconds, 2),
        images_per_second=round(num_made / seconds, 3) if num_made else None,
        peak_memory_gib=round(peak_memory() / 2**30, 2),
    )


def save_overview(path: Path, samples: Path, title: str, *, num_images: int = 100) -> None:
    """Write a picture of the first images of a finished run, ten in a row."""
    if samples.suffix == ".npz":
        pixels = read_first_images(samples, num_images)
    else:
        paths = sorted(samples.glob("*.png"))[:num_images]
        pixels = to_pixels([Image.open(path) for path in paths])
    starts = range(0, len(pixels), 10)
    save_grid(path, [pixels[i : i + 10] for i in starts], [f"image {i}" for i in starts], title)


def _make(
    sampler: Sampler,
    config: RunConfig,
    labels: Tensor | None,
    number: int,
    seed: int | None,
    device: torch.device,
) -> Tensor:
    """Sample one batch and validate it; return its pixels, uint8 [B, C, H, W]."""
    indices = config.batch(number)
    full = range(indices.start, indices.start + config.batch_size)
    if labels is None:  # the official script draws as many labels for an incomplete last batch
        wanted = torch.randint(0, sampler.num_classes, (len(full),), device=device).cpu()
    else:
        wanted = labels[indices.start : indices.stop]
    try:
        if seed is None:
            # Quirk kept: the official engine fills up its last batch with class 0, which uses up random numbers.
            padding = wanted.new_zeros(len(full) - len(wanted))
            pixels = sampler.images(torch.cat([wanted, padding]), full, None)[: len(indices)]
        else:
            pixels = sampler.images(wanted, indices, seed)
        refuse((pixels == 0).flatten(1).all(dim=1), "is black")
    except BadImageError as error:
        raise UnusableImageError(
            f"Image {indices.start + error.row} (seed {config.seed}, class {int(wanted[error.row])}) "
            f"of {sampler.name} {error}. The images made before it are kept."
        ) from error
    except torch.OutOfMemoryError as error:
        raise UserError(f"{config.batch_size} images at a time need too much memory; lower the batch size.") from error
    shape = (len(indices), sampler.channels, sampler.image_size, sampler.image_size)
    assert pixels.dtype == torch.uint8, pixels.dtype
    assert tuple(pixels.shape) == shape, (pixels.shape, shape)
    return pixels


# ------------------------------------------------------------------------------------------- who makes which batch


def _batches(
    config: RunConfig, present: set[int], state: PartialState, folder: Path
) -> Iterator[tuple[int, int | None]]:
    """Yield the batches of this process with the seed of each.

    With official randomness, the seed is None and the global streams are in the state that the batch needs.
    """
    rank, world_size = state.process_index, state.num_processes
    undone = [number for number in range(config.num_batches) if not present.issuperset(config.batch(number))]
    if config.randomness == "per-image":
        for number in undone[rank::world_size]:
            yield number, config.seed
        return
    # The streams run on through the batches of a process, so each process always has the same batches (as official).
    own = range(rank, config.num_batches, world_size)
    if not (mine := [number for number in own if number in undone]):
        return
    streams = folder / f"streams-{rank:04d}.pt"
    first = own.start
    if streams.exists():
        saved = torch.load(streams, weights_only=True)
        if saved["next"] <= mine[0]:  # otherwise an image was lost, and the streams must run from their start again
            first = saved["next"]
    if first == own.start:
        torch.manual_seed(config.seed + rank)
        np.random.seed(config.seed + rank)  # noqa: NPY002  the official generator
    else:
        _set_streams(saved)
    for number in own[own.index(first) :]:
        yield number, None
        with replacing(streams) as temporary:
            torch.save({"next": number + world_size, **_get_streams()}, temporary)


def _get_streams() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
    }


def _set_streams(saved: Mapping[str, Any]) -> None:
    torch.set_rng_state(saved["torch"])
    if saved["cuda"] is not None:
        torch.cuda.set_rng_state(saved["cuda"])
    name, keys, *rest = saved["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002


# --------------------------------------------------------------------------------------------------- on the disk


def _claim(folder: Path, recipe: Mapping[str, Any]) -> None:
    """Write the recipe into a new or empty folder, or check that the folder has the same recipe already."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RECIPE_FILE
    if not path.exists():
        if others := sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")):
            raise UserError(f"{folder} is not empty and holds no run ({others[0]} is in it). Name another folder.")
        write_json(path, {"recipe": recipe, "command": provenance.command(), **provenance.origin()})
        return
    try:
        there = json.loads(path.read_text(encoding="utf-8"))["recipe"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged or is not the recipe of a run. Name another folder.") from error
    if differences := _differences(there, recipe):
        more = f"; and {len(differences) - NUM_LISTED} more" if len(differences) > NUM_LISTED else ""
        raise UserError(
            f"{folder} holds a run of another recipe: {'; '.join(differences[:NUM_LISTED])}{more}. Images of two "
            "recipes must not be mixed, so name another folder or ask for the same images."
        )


def _differences(there: Any, now: Any, name: str = "") -> list[str]:
    """Describe the leaves in which two JSON values differ, a text for each."""
    if isinstance(there, dict) and isinstance(now, dict):
        keys = [*there, *(key for key in now if key not in there)]
        prefix = f"{name}." if name else ""
        return [text for key in keys for text in _differences(there.get(key), now.get(key), f"{prefix}{key}")]
    short = [f"{text[:60]}..." if len(text) > 60 else text for text in (json.dumps(there), json.dumps(now))]
    return [] if there == now else [f"{name} was {short[0]} and is now {short[1]}"]
