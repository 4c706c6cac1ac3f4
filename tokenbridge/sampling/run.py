"""A sampling run: it makes N images of any system in a folder, in one or several processes, and can be resumed.

The images are divided into fixed batches, which are dealt to the processes in turn. The files on the disk show what is
finished: a batch whose images all exist, and open, is never made again. `run.json` holds the recipe of the run, and a
folder never holds images of two recipes (see `recipe`).

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

import io
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
from tokenbridge.sampling.recipe import RECIPE_FILE, claim, read_recipe, recipe_of
from tokenbridge.sampling.store import STORES, read_first_images, remove
from tokenbridge.utils import console
from tokenbridge.utils.devices import peak_memory
from tokenbridge.utils.errors import MissingFileError, UnusableImageError, UserError
from tokenbridge.utils.files import clear_leftovers, make_folder, read_bytes, replacing, storage_errors
from tokenbridge.utils.processes import process_state

NO_RESULT = "no-result"  # the name of the images of stand-in weights
SECONDS_BETWEEN_LOOKS = 10.0  # a folder of 50,000 images takes a while to list


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
    changes: tuple[str, ...] = ()  # what was other when some of the images were made (`recipe.claim`)


def run_recipe(sampler: Sampler, config: RunConfig, num_processes: int = 1) -> dict[str, Any]:
    """Return all that determines the images of a run as JSON values (see `recipe.recipe_of`)."""
    described = {"name": sampler.name, **sampler.describe()}
    recipe = recipe_of(described, config, num_processes, process_state().device.type)
    if sampler.stand_in:
        recipe["no_result"] = "The weights are stand-ins drawn by a rule: these images say nothing about the model."
    return recipe


def sampling_run(
    sampler: Sampler,
    config: RunConfig,
    folder: Path | str,
    *,
    overwrite: bool = False,
    accept_other_code: bool = False,
    show_progress: bool = True,
) -> RunReport:
    """Make the images of a run in `folder`, except those that exist already.

    Every process of a distributed run calls this function. The format "png" writes `images/000000.png` and so on. The
    format "npz" writes parts to `parts/` and assembles them to `samples.npz` in the format of ADM's evaluation: `arr_0`
    is uint8 [N, H, W, 3], where grey images repeat their channel, and `arr_1` [N] holds the labels unless they were
    drawn together with the images. Images of stand-in weights go to `no-result/` or `no-result.npz` instead.

    Args:
        sampler: makes the images; it must be the same in every process.
        folder: a folder that is new or empty, or that holds the same run, perhaps with fewer images or made in batches
            of another size.
        overwrite: remove the images of an earlier run first, whatever its recipe was.
        accept_other_code: go on with a run that other code or other libraries began; `run.json` then says so.
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
    name, shape = NO_RESULT if sampler.stand_in else None, (sampler.channels, sampler.image_size, sampler.image_size)
    store = STORES[config.format](folder, config, name, shape)
    advice = "The finished images are kept: make room, and the same command makes the others."
    with storage_errors(folder, advice):
        left: list[Any] = [None]
        if state.is_main_process:
            if overwrite:
                _start_anew(folder)
            recipe = run_recipe(sampler, config, state.num_processes)
            make_folder(folder)
            record = claim(
                folder, recipe, sampler.num_classes, overwrite=overwrite, accept_other_code=accept_other_code
            )
            for place in (folder, store.pieces):
                clear_leftovers(place)
            whole, damaged = store.inspect()
            if damaged:
                files = "1 file is" if damaged == 1 else f"{damaged:,} files are"
                console.log(f"{files} damaged in {folder}, and the images are made anew.")
            record.write(whole)
            changes = tuple(text for entry in record.content.get("continued", []) for text in entry["changes"])
            left = [(whole, changes)]
        # One process looks at the disk for all, because another might look when a third one has begun to write.
        present: set[int]
        present, changes = broadcast_object_list(left)[0]
        progress = console.progress(
            f"sample {sampler.name}",
            config.num_images,
            "{done} of {total} images",
            "{rate:.3g} images/s, {left} left, {note}",
            first=len(present),
            show=show_progress and state.is_main_process,
        )
        start = looked = time.perf_counter()
        done = len(present)
        with progress as advance:
            for number, seed in _batches(config, present, state, folder):
                pixels = _make(sampler, config, labels, number, seed, state.device)
                store.write(number, pixels, present)
                done += sum(index not in present for index in config.batch(number))
                if state.num_processes > 1 and time.perf_counter() - looked > SECONDS_BETWEEN_LOOKS:
                    done, looked = store.count(), time.perf_counter()
                advance(done, f"{peak_memory() / 2**30:.2f} GiB at most")
        state.wait_for_everyone()
        seconds = time.perf_counter() - start
        if state.is_main_process:
            if (there := store.count()) != config.num_images:
                raise UserError(
                    f"{folder} holds {there:,} of {config.num_images:,} images: somebody has removed some while others "
                    "were made. The same command makes them again."
                )
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
        changes=changes,
    )


def save_overview(path: Path, samples: Path, title: str, *, num_images: int = 100) -> None:
    """Write a picture of the first images of a finished run, ten in a row."""
    if samples.suffix == ".npz":
        pixels = read_first_images(samples, num_images)
    else:
        first = (samples / f"{i:06d}.png" for i in range(num_images))
        pixels = to_pixels([Image.open(image) for image in first if image.exists()])
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
    are_undone = set(undone)
    if config.randomness == "per-image":
        for number in undone[rank::world_size]:
            yield number, config.seed
        return
    # The streams run on through the batches of a process, so each process always has the same batches (as official).
    own = range(rank, config.num_batches, world_size)
    if not (mine := [number for number in own if number in are_undone]):
        return
    streams = folder / f"streams-{rank:04d}.pt"
    first = _set_streams(streams, own, mine[0])
    if first == own.start:
        torch.manual_seed(config.seed + rank)
        np.random.seed(config.seed + rank)  # noqa: NPY002  the official generator
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


def _set_streams(path: Path, own: range, needed: int) -> int:
    """Set the global streams as they were before a batch, which is at most `needed`, and return its number.

    It is the first batch of the process, and nothing is set, if there is no such state: if an image was lost, or if the
    file is damaged. Then the streams run from their start again.
    """
    try:
        saved = torch.load(io.BytesIO(read_bytes(path)), weights_only=True)
        first = saved["next"]
        if first not in own or first > needed:
            return own.start
        torch.set_rng_state(saved["torch"])
        if saved["cuda"] is not None:
            torch.cuda.set_rng_state(saved["cuda"])
        name, keys, *rest = saved["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    except MissingFileError:
        return own.start
    except Exception:  # a damaged file raises anything
        console.log(f"{path} is damaged; the random numbers are drawn from their start again.")
        return own.start
    return int(first)


# --------------------------------------------------------------------------------------------------- on the disk


def _start_anew(folder: Path) -> None:
    """Remove the files that an earlier run has made in a folder, and no other file.

    Raises:
        UserError: the folder holds no run, or images that the run did not make; then nothing is removed.
    """
    if not (folder / RECIPE_FILE).exists():
        return
    _, recipe = read_recipe(folder / RECIPE_FILE)
    config = RunConfig(recipe["num_images"], format=recipe.get("format", "png"))
    name = NO_RESULT if "no_result" in recipe else None
    store = STORES[config.format](folder, config, name, (1, 1, 1))
    own = store.own_files()  # files of the other format are the user's
    own += [path for path in folder.iterdir() if re.fullmatch(r"streams-\d{4}\.pt|grid\.png", path.name)]
    remove(own)
    if store.pieces.is_dir() and not any(store.pieces.iterdir()):
        store.pieces.rmdir()
