"""A sampling run: N images of any system into a folder, by one or many processes, killed and resumed at will.

The work is cut into fixed batches of image numbers, dealt to the processes in turn. What is finished is known from
the disk: a batch whose images are all there is never made again. `run.json` holds the run's recipe; a folder never
holds images of two recipes.

Two kinds of randomness:

- ``"per-image"``: every image has a stream of its own, made from (seed, image number), so that it depends neither on
  the batch nor on the process that made it, beyond the rounding of sums in batches of other sizes.
- ``"official"``: as engine_tokenbridge.py draws: numpy's and torch's global streams, seeded with seed + rank, run on
  through all batches of a process (the last one is filled up with label 0; random labels are drawn before each batch,
  as LlamaGen's sample_c2i_ddp.py does). Images depend on batch size and number
  of processes, so both belong to the recipe; the streams' state is saved with every batch, so a resumed run goes on
  where it was. This is the order of the official draws, on the device the official code runs on; whether the very
  same images come out hangs on the rounding of the logits too, and nobody promises it across devices or versions.

Shape letters: N images of the run, B batch, C channels, H height, W width.
"""

from __future__ import annotations

import errno
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from tokenbridge.sampling.store import STORES, read_first_images, remove
from tokenbridge.utils import console, provenance
from tokenbridge.utils.devices import peak_memory, process_state
from tokenbridge.utils.errors import StorageError, UnusableImageError, UserError
from tokenbridge.utils.files import replacing, write_json

RECIPE_FILE = "run.json"
NUM_LISTED = 8  # differences in an error message


class Sampler(Protocol):
    """A system that makes images of classes: a model with its settings."""

    @property
    def name(self) -> str:
        """What runs and pictures are called; says so if the weights are stand-ins."""
        ...

    @property
    def stand_in(self) -> bool:
        """Whether the weights are drawn by a rule: the images prove the path, and are no result."""
        ...

    @property
    def num_classes(self) -> int:
        """Labels are 0 to `num_classes` - 1."""
        ...

    @property
    def image_size(self) -> int:
        """Height and width of the images."""
        ...

    @property
    def channels(self) -> int:
        """Colour channels of the images: 1 or 3."""
        ...

    def images(self, labels: Tensor, indices: Sequence[int], seed: int | None) -> Tensor:
        """Make a batch of images.

        Args:
            labels: [B].
            indices: numbers of the images in the run, B of them.
            seed: image i is drawn from the stream (seed, i); None draws from the global streams of numpy and torch.

        Returns:
            uint8 pixels [B, C, H, W] on the CPU, rounded after clamping (`data.images_to_pixels`).

        Raises:
            BadImageError: an image is NaN before it is rounded.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Return, as JSON values, all that the images depend on: settings, precision, the weights' SHA-256."""
        ...


class BadImageError(FloatingPointError):
    """An image that cannot be one; `row` is its place in the batch."""

    def __init__(self, row: int, what: str) -> None:
        super().__init__(what)
        self.row = row


def refuse(bad: Tensor, what: str) -> None:
    """Raise BadImageError for the first row where `bad` [B] is true; `what` follows "image 7 "."""
    if bool(bad.any()):
        raise BadImageError(int(bad.nonzero()[0]), what)


@dataclass(frozen=True)
class RunReport:
    """What a run left, and what it took this time."""

    samples: Path  # a folder of PNG files, or an .npz
    num_images: int
    num_made: int  # by this call; the others were there
    seconds: float  # for these
    images_per_second: float | None  # None if there was nothing to make
    peak_memory_gib: float  # of this process: of its accelerator if it has one


def run_recipe(sampler: Sampler, config: RunConfig, num_processes: int = 1) -> dict[str, Any]:
    """Return, as JSON values, all that decides which images a run makes."""
    labels = ",".join(map(str, config.labels)) if isinstance(config.labels, tuple) else config.labels or "balanced"
    recipe = {"sampler": {"name": sampler.name, **sampler.describe()}, **asdict(config), "labels": labels}
    if config.randomness == "official":
        recipe["num_processes"] = num_processes
    if sampler.stand_in:
        recipe["no_result"] = "The weights are stand-ins drawn by a rule: these images say nothing about the model."
    return json.loads(json.dumps(recipe))


def sampling_run(sampler: Sampler, config: RunConfig, folder: Path | str, *, show_progress: bool = True) -> RunReport:
    """Make the images of a run in `folder`, or those that a killed run left undone.

    Every process of a distributed run calls this. Images go to `images/000000.png`, ..., or, by way of
    `parts/`, to `samples.npz` in the format of ADM's evaluation: `arr_0` uint8 [N, H, W, 3] (a grey channel three
    times) and, unless they were drawn with the images, the labels `arr_1` [N]. Stand-ins go to `no-result/` or
    `no-result.npz` instead.

    Args:
        sampler: what makes the images; it must be the same in every process.
        config: how many, of which classes, and how.
        folder: empty or new, or that of the same run.
        show_progress: tell images/s, time left and peak memory on stderr.

    Raises:
        ValueError: labels that are no classes; a folder that holds something else, or a run of another recipe; a
            batch too large for the accelerator's memory.
        FloatingPointError: an image is NaN or black; what was made before stays.
        OSError: the folder cannot be written to, or the disk is full; what was made before stays.
    """
    folder = Path(folder)
    labels = run_labels(config, sampler.num_classes)
    state = process_state()
    store = STORES[config.format](folder, config, "no-result" if sampler.stand_in else None)
    with _storage_errors(folder):
        left: list[Any] = [None]
        if state.is_main_process:
            _claim(folder, run_recipe(sampler, config, state.num_processes))
            _clear_leftovers(folder, store.pieces)
            left = [store.present()]
        # One process looks at the disk, and all go by what it saw; others might look while a first one writes.
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
    """Draw the first images of a finished run as one picture, ten in a row."""
    if samples.suffix == ".npz":
        pixels = read_first_images(samples, num_images)
    else:
        paths = sorted(samples.glob("*.png"))[:num_images]
        pixels = to_pixels([Image.open(path) for path in paths])
    starts = range(0, len(pixels), 10)
    save_grid(path, [pixels[i : i + 10] for i in starts], [str(i) for i in starts], title)


def _make(
    sampler: Sampler,
    config: RunConfig,
    labels: Tensor | None,
    number: int,
    seed: int | None,
    device: torch.device,
) -> Tensor:
    """Return the pixels of a batch, looked at."""
    indices = config.batch(number)
    full = range(indices.start, indices.start + config.batch_size)
    if labels is None:  # for the whole of a last batch too, as the official script
        wanted = torch.randint(0, sampler.num_classes, (len(full),), device=device).cpu()
    else:
        wanted = labels[indices.start : indices.stop]
    try:
        if seed is None:
            # Quirk kept: the official engine fills up its last batch with class 0, which takes random numbers too.
            padding = wanted.new_zeros(len(full) - len(wanted))
            pixels = sampler.images(torch.cat([wanted, padding]), full, None)[: len(indices)]
        else:
            pixels = sampler.images(wanted, indices, seed)
        refuse((pixels == 0).flatten(1).all(dim=1), "is black")
    except BadImageError as error:
        raise UnusableImageError(
            f"Image {indices.start + error.row} (seed {config.seed}, class {int(wanted[error.row])}) "
            f"of {sampler.name} {error}. The images made before stay."
        ) from error
    except torch.OutOfMemoryError as error:
        raise UserError(f"{config.batch_size} images at a time need too much memory: lower the batch size.") from error
    shape = (len(indices), sampler.channels, sampler.image_size, sampler.image_size)
    assert pixels.dtype == torch.uint8, pixels.dtype
    assert tuple(pixels.shape) == shape, (pixels.shape, shape)
    return pixels


# ------------------------------------------------------------------------------------------- who makes which batch


def _batches(
    config: RunConfig, present: set[int], state: PartialState, folder: Path
) -> Iterator[tuple[int, int | None]]:
    """Yield this process's batches, and the seed of each: None for the global streams, set as they must be."""
    rank, world_size = state.process_index, state.num_processes
    undone = [number for number in range(config.num_batches) if not present.issuperset(config.batch(number))]
    if config.randomness == "per-image":
        for number in undone[rank::world_size]:
            yield number, config.seed
        return
    # The streams run on through a process's batches, so these are dealt out once and for all, as official.
    own = range(rank, config.num_batches, world_size)
    if not (mine := [number for number in own if number in undone]):
        return
    streams = folder / f"streams-{rank:04d}.pt"
    first = own.start
    if streams.exists():
        saved = torch.load(streams, weights_only=True)
        if saved["next"] <= mine[0]:  # or else an image was lost that only the whole stream makes again
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
    """Make the folder this recipe's, unless it is another's."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RECIPE_FILE
    if not path.exists():
        if others := sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")):
            raise UserError(f"{folder} is not empty and holds no run ({others[0]} is there). Name another folder.")
        write_json(path, {"recipe": recipe, "command": provenance.command(), **provenance.origin()})
        return
    try:
        there = json.loads(path.read_text(encoding="utf-8"))["recipe"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged, or no run's recipe. Name another folder.") from error
    if differences := _differences(there, recipe):
        more = f"; and {len(differences) - NUM_LISTED} more" if len(differences) > NUM_LISTED else ""
        raise UserError(
            f"{folder} holds a run of another recipe: {'; '.join(differences[:NUM_LISTED])}{more}. Images of two "
            "recipes must not mix: name another folder, or ask for the same images."
        )


def _clear_leftovers(*folders: Path) -> None:
    """Remove what killed processes had begun to write (see `files.replacing`)."""
    begun = re.compile(r"\.(run|streams-\d+|samples|no-result|grid|\d+)-\w{8}\.\w+")
    for folder in folders:
        remove(path for path in folder.glob(".*") if begun.fullmatch(path.name))


def _differences(there: Any, now: Any, name: str = "") -> list[str]:
    """Name the leaves in which two JSON values differ."""
    if isinstance(there, dict) and isinstance(now, dict):
        keys = [*there, *(key for key in now if key not in there)]
        prefix = f"{name}." if name else ""
        return [text for key in keys for text in _differences(there.get(key), now.get(key), f"{prefix}{key}")]
    short = [f"{text[:60]}..." if len(text) > 60 else text for text in (json.dumps(there), json.dumps(now))]
    return [] if there == now else [f"{name} was {short[0]} and is now {short[1]}"]


@contextmanager
def _storage_errors(folder: Path) -> Iterator[None]:
    """Say what the disk refused, and that what is there stays."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                f"There is no space left for {folder}. The images that are there stay: make room, and the same command "
                "goes on with the others."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise StorageError(f"{folder} cannot be written to: {error.strerror} ({error.filename}).") from error
        raise
