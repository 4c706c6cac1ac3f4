"""The recipe of a run, `run.json`: all that decides its images, and what a later call in the same folder may change.

A later call may ask for more images and for another batch size if the random numbers are each image's own, because the
images stay the same, apart from the rounding of sums in batches of other sizes. It may use other code or libraries only
if the user says so. `run.json` lists each such change together with the images that were there before it. Every other
difference is refused by its name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tokenbridge.sampling.config import RunConfig, run_labels
from tokenbridge.utils import provenance
from tokenbridge.utils.errors import UserError, reading
from tokenbridge.utils.files import read_bytes, write_json

RECIPE_FILE = "run.json"
NUM_LISTED = 8  # an error message lists at most this many differences
CODE = "made_with"  # the field of a recipe with the versions of code and libraries
_LIBRARIES = ("torch", "diffusers", "numpy")


def recipe_of(described: Mapping[str, Any], config: RunConfig, num_processes: int, device: str) -> dict[str, Any]:
    """Return all that decides the images of a run as JSON values.

    Args:
        described: the name of the sampler, and its description (`run.Sampler.describe`).
        num_processes: images of official randomness depend on it.
        device: the kind of device, `cpu` or `cuda`.
    """
    labels = ",".join(map(str, config.labels)) if isinstance(config.labels, tuple) else config.labels or "balanced"
    versions = provenance.versions()
    recipe = {
        "sampler": dict(described),
        **asdict(config),
        "labels": labels,
        CODE: {
            "tokenbridge": provenance.code_sha256(),
            **{name: versions[name] for name in _LIBRARIES},
            "device": device,
        },
    }
    if config.randomness == "official":
        recipe["num_processes"] = num_processes
    return dict(json.loads(json.dumps(recipe)))


@dataclass(frozen=True)
class Record:
    """The content of a `run.json` that agrees with what is asked for now."""

    path: Path
    content: dict[str, Any]
    changes: list[str]  # what is now other than it was, in words
    is_new: bool = False

    def write(self, present: Iterable[int]) -> None:
        """Write the file if it is new, or with the changes and the numbers of the images that they do not concern."""
        if self.changes:
            origin = {"command": provenance.command(), **provenance.origin()}
            entry = {"changes": self.changes, "images before": _ranges(present), **origin}
            self.content.setdefault("continued", []).append(entry)
        if self.changes or self.is_new:
            write_json(self.path, self.content)


def claim(
    folder: Path, recipe: dict[str, Any], num_classes: int, *, overwrite: bool = False, accept_other_code: bool = False
) -> Record:
    """Check that the images of a recipe may be made in a folder, which is empty or holds a run; write nothing.

    Args:
        overwrite: the images of the run have just been removed, so its recipe does not matter.
        accept_other_code: whether other code or other libraries may go on with the run.

    Raises:
        UserError: the folder holds something else, its `run.json` is damaged, or its images are other ones.
    """
    path = folder / RECIPE_FILE
    if overwrite or not path.exists():
        if not path.exists() and (others := sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))):
            raise UserError(f"{folder} is not empty and holds no run ({others[0]} is in it). Name another folder.")
        origin = {"command": provenance.command(), **provenance.origin()}
        return Record(path, {"recipe": recipe, **origin}, [], is_new=True)
    content, there = read_recipe(path)
    of_code, harmless, other = [], [], []
    both_own = there.get("randomness") == recipe["randomness"] == "per-image"
    for name, text in _differences(there, recipe):
        if name.startswith(CODE) or (name == "sampler.config" and "config" not in there["sampler"]):
            of_code.append(text)
        elif name == "labels" or (name in ("num_images", "batch_size") and both_own):
            harmless.append(text)
        else:
            other.append(text)
    if not other and (disagreement := _labels_that_differ(path, there, recipe, num_classes)):
        other.append(disagreement)
    if other:
        listed = [*other, *harmless, *of_code]
        more = f"; and {len(listed) - NUM_LISTED} more" if len(listed) > NUM_LISTED else ""
        raise UserError(
            f"{folder} holds a run of another recipe: {'; '.join(listed[:NUM_LISTED])}{more}. Images of two recipes "
            "must not be mixed, so name another folder, ask for the same images, or start anew with --overwrite."
        )
    if of_code and not accept_other_code:
        raise UserError(
            f"{folder} holds a run that was made with other code or libraries: {'; '.join(of_code)}. Its images could "
            "be others, so install what it was made with, or name another folder. `tokenbridge sample "
            "--accept-other-code` goes on nevertheless and says so in run.json; --overwrite starts anew."
        )
    return Record(path, {**content, "recipe": recipe}, [*harmless, *of_code])


def read_recipe(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the content of a `run.json`, and the recipe in it.

    Raises:
        UserError: the file is damaged, or it is something else.
    """
    try:
        content = json.loads(read_bytes(path))
        recipe = content["recipe"]
        changes = [change for entry in content.get("continued", []) for change in entry["changes"]]
        kinds = ((recipe, dict), (recipe["sampler"], dict), (recipe["num_images"], int), *((c, str) for c in changes))
        if not all(isinstance(value, kind) for value, kind in kinds):
            raise UserError("a field is of another type")
    except Exception as error:
        raise UserError(
            f"{path} is damaged or is not the recipe of a run ({type(error).__name__}: {error}). Name another folder."
        ) from error
    return content, recipe


def _labels_that_differ(path: Path, there: Mapping[str, Any], now: Mapping[str, Any], num_classes: int) -> str | None:
    """Say which label is not what it was; None if the labels of all images that both recipes have agree."""
    both = []
    for recipe in (there, now):
        with reading(path, "the recipe of a run"):
            given = recipe["labels"]
            labels: Any = {"balanced": None, "random": "random"}.get(given, given)
            if labels not in (None, "random"):
                labels = tuple(int(label) for label in given.split(","))
            names = ("num_images", "seed", "randomness", "batch_size", "format")
            config = RunConfig(**{name: recipe[name] for name in names}, labels=labels)
            both.append(run_labels(config, num_classes))
    first, second = both
    if first is None or second is None:  # they are drawn with the images, and num_images is the same
        return None
    common = min(len(first), len(second))
    differ = torch.nonzero(first[:common] != second[:common]).flatten().tolist()
    if not differ:
        return None
    i, balanced = differ[0], there["labels"] == now["labels"] == "balanced"
    why = " (balanced labels depend on the number of images, random ones do not)" if balanced else ""
    changed = "" if there["labels"] == now["labels"] else f"{_short('labels', there['labels'], now['labels'])}; "
    return f"{changed}the label of image {i} was {int(first[i])} and is now {int(second[i])}{why}"


def _differences(there: Any, now: Any, name: str = "") -> list[tuple[str, str]]:
    """Return the leaves in which two JSON values differ, each with its name and a text."""
    if isinstance(there, dict) and isinstance(now, dict):
        keys = [*there, *(key for key in now if key not in there)]
        prefix = f"{name}." if name else ""
        return [pair for key in keys for pair in _differences(there.get(key), now.get(key), f"{prefix}{key}")]
    return [] if there == now and type(there) is type(now) else [(name, _short(name, there, now))]


def _short(name: str, there: Any, now: Any) -> str:
    short = [f"{text[:60]}..." if len(text) > 60 else text for text in (json.dumps(there), json.dumps(now))]
    return f"{name} was {short[0]} and is now {short[1]}"


def _ranges(numbers: Iterable[int]) -> list[list[int]]:
    """Return numbers as ranges [first, last]."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ranges
