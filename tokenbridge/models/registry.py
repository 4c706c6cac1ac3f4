"""The systems by name, and the look-up of their presets. Only this module names all systems."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenbridge.models.givt.system import SYSTEM as GIVT
from tokenbridge.models.llamagen.system import SYSTEM as LLAMAGEN
from tokenbridge.models.mar.system import SYSTEM as MAR
from tokenbridge.models.system import System
from tokenbridge.models.tokenbridge.system import SYSTEM as TOKENBRIDGE
from tokenbridge.tokenizers.published import TOKENIZERS, PublishedTokenizer
from tokenbridge.utils.errors import UserError
from tokenbridge.weights.artifacts import ARTIFACTS
from tokenbridge.weights.official import Layout, WrongStateError
from tokenbridge.weights.published import Preset, build_preset

SYSTEMS: dict[str, System] = {system.name: system for system in (TOKENBRIDGE, MAR, LLAMAGEN, GIVT)}
SHIPPED_PRESETS = {"tokenbridge-tiny": "tiny/tokenbridge-64"}  # presets whose weights come with the package


def all_presets() -> dict[str, tuple[System, Preset]]:
    """Return the presets of all systems by name, each with its system."""
    return {name: (system, preset) for system in SYSTEMS.values() for name, preset in system.presets.items()}


def find_preset(name: str) -> tuple[System, Preset]:
    """Return the preset called `name` and its system; `name` may be our name or the official one.

    Raises:
        UserError: no preset has this name, or several presets have it as their official name.
    """
    known = all_presets()
    if name in known:
        return known[name]
    found = [(system, preset) for system, preset in known.values() if preset.official_name == name]
    if len(found) > 1:
        raise UserError(f"{name!r} may mean {' or '.join(preset.name for _, preset in found)}; give the full name.")
    if not found:
        raise UserError(f"Unknown preset {name!r}; there are {', '.join(known)}.")
    return found[0]


def unpublished(preset: Preset) -> str | None:
    """Return why the published numbers of a preset cannot be reproduced; None if they can."""
    if preset.name in SHIPPED_PRESETS:
        return "it is this project's own, which `nox -s reproduce_tiny` measures"
    published = {"weights": preset.name in ARTIFACTS, "sampling settings": bool(preset.sampling)}
    lacking = [what for what, there in published.items() if not there]
    return f"no {' and no '.join(lacking)} were published" if lacking else None


def published_preset(name: str, size: str | None = None) -> tuple[System, Preset]:
    """Return a preset whose published numbers can be reproduced, and its system.

    Args:
        name: a preset or a system.
        size: a size of the system, such as `l` or `b-256`. Its beginning is enough (`l` for `l-384`) if only one such
            preset was published. None means the system's default size.

    Raises:
        UserError: no preset or several presets match, or their weights or settings were not published.
    """
    if name not in SYSTEMS:
        if size is not None:
            raise UserError(f"--size goes with a system ({', '.join(SYSTEMS)}), not with the preset {name!r}.")
        system, preset = find_preset(name)
        if reason := unpublished(preset):
            raise UserError(f"{preset.name} cannot be reproduced: {reason}.")
        return system, preset
    system = SYSTEMS[name]
    wanted = f"{name}-{(size or system.default_size).lower()}"
    there = [p for p in system.presets.values() if p.name == wanted or p.name.startswith(f"{wanted}-")]
    usable = [p for p in system.presets.values() if unpublished(p) is None]
    sizes = ", ".join(p.name.removeprefix(f"{name}-") for p in usable)
    found = [p for p in there if p in usable]
    if len(found) > 1:
        raise UserError(f"{name} has several of size {size}: {', '.join(p.name for p in found)}. Sizes are {sizes}.")
    if not found:
        reasons = "; ".join(f"of {p.name} {unpublished(p)}" for p in there) or "there is no such size"
        raise UserError(f"{name} of size {size!r} cannot be reproduced: {reasons}. Sizes are {sizes}.")
    return system, found[0]


def load_published(system: System, path: Path, name: str, *, ema: bool = True) -> Any:
    """Load the published file `path` of the system's preset `name`.

    Args:
        ema: load the moving average of the weights, which the published evaluations used, and not the last weights.

    Raises:
        MissingFileError: the file does not exist.
        UserError: the file is damaged, or it does not hold the weights that were asked for.
        WrongStateError: the file holds another model; the message names it if it is a published one.
    """
    if not (ema or system.has_average):
        raise UserError(f"The files of {system.name} hold one set of weights and no moving average beside it.")
    with recognised_states():
        return system.load(path, name, ema=ema) if system.has_average else system.load(path, name)


def load_published_tokenizer(tokenizer: PublishedTokenizer, path: Path) -> Any:
    """Load the published file of a tokenizer; it raises the errors of `load_published`."""
    with recognised_states():
        return tokenizer.load(path)


@contextmanager
def recognised_states() -> Iterator[None]:
    """Within the block, add the model's name to a `WrongStateError` if the state is that of a published model.

    A state is recognised by the names and shapes of its tensors.
    """
    try:
        yield
    except WrongStateError as error:
        for name, module, layout in _published_modules():
            if {official: mapping.shape for official, mapping in layout(module).mappings.items()} == error.shapes:
                raise WrongStateError(f"{error} It is the state of {name}.", error.shapes) from error
        raise


def _published_modules() -> Iterator[tuple[str, Any, Callable[[Any], Layout]]]:
    for system, preset in all_presets().values():
        if preset.official_name is not None:
            yield preset.name, build_preset(system.model, preset), system.layout
    for tokenizer in TOKENIZERS.values():
        yield tokenizer.key, tokenizer.create(), tokenizer.layout
