"""Strict loading of official state dicts into our modules, and the way back.

A `Layout` says which of our parameters each official tensor becomes. Every system and every tokenizer defines its own.
Loading is strict: every tensor is used once, every parameter is filled, and all shapes agree. The modules
`torch_files` and `flax_files` read the files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from tokenbridge.utils.errors import UserError

NUM_LISTED = 5  # an error message lists this many names of each kind

State = dict[str, Tensor]
Value = TypeVar("Value")
WRAPPERS = ("module.", "_orig_mod.")  # put before every name by DataParallel and by torch.compile


@dataclass(frozen=True)
class ParamMapping:
    """Which of our parameters an official tensor becomes, and how its shape changes."""

    name: str  # our parameter's name
    # The official shape. Ours may lack trailing dimensions of size 1: 1 × 1 convolutions are linear layers here.
    shape: tuple[int, ...]
    # The official tensor is a kernel of Flax: [in, out], where `in` or `out` may be split into several dimensions, or
    # [height, width, in, out].
    kernel: bool = False
    part: tuple[int, int] | None = None  # (i, n): the tensor is the i-th of n equal parts of our first dimension

    def to_official(self, ours: Tensor) -> Tensor:
        """Return the official tensor, given our whole parameter."""
        if self.part is not None:
            ours = ours.chunk(self.part[1])[self.part[0]]
        if self.kernel:
            ours = ours.permute(2, 3, 1, 0) if ours.ndim == 4 else ours.T
        return ours.reshape(self.shape)

    def from_official(self, official: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return our parameter of this shape, or the part of it that the official tensor is.

        This is the inverse of `to_official`.
        """
        if self.part is not None:
            shape = (shape[0] // self.part[1], *shape[1:])
        if not self.kernel:
            return official.reshape(shape)
        if len(shape) == 4:
            return official.permute(3, 2, 0, 1).contiguous()
        return official.reshape(shape[::-1]).T.contiguous()


@dataclass(frozen=True)
class Layout:
    """How the tensors of an official state dict map to the parameters of a module."""

    mappings: Mapping[str, ParamMapping]  # by official name
    name: str  # the model's name in error messages
    buffers: Mapping[str, Tensor] = field(default_factory=dict)  # official tensors that the sizes determine
    buffer_tolerance: float = 0.0  # absolute difference that the rounding of other libraries may cause in the buffers


class WrongStateError(UserError):
    """A state dict does not fit the model that it was read for.

    `shapes` are those of its tensors by name, by which it may be recognised as that of another model. They are empty if
    names and shapes are those of the model that it was read for.
    """

    def __init__(self, message: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__(message)
        self.shapes = dict(shapes)


def flat_layout(module: nn.Module, name: str | None = None) -> Layout:
    """Return the layout of a module whose own names and shapes are the official ones."""
    mappings = {key: ParamMapping(key, tuple(parameter.shape)) for key, parameter in module.named_parameters()}
    return Layout(mappings, name or type(module).__name__)


def plain_names(state: Mapping[str, Value]) -> dict[str, Value]:
    """Return a state dict without the prefixes that wrappers of a model put before every name."""
    for prefix in WRAPPERS:
        if state and all(name.startswith(prefix) for name in state):
            return plain_names({name.removeprefix(prefix): value for name, value in state.items()})
    return dict(state)


def is_finite(tensor: Tensor) -> bool:
    """Return whether no number of a tensor is NaN or infinite, without a copy of it."""
    return not tensor.numel() or all(math.isfinite(float(limit)) for limit in tensor.aminmax())


def to_official(module: nn.Module, layout: Layout) -> State:
    """Return the official state dict of `module`: all its parameters, and the buffers of the layout.

    The official class loads it with `strict=True`. A tensor shares memory with our parameter if its layout is the
    same. This is the inverse of `from_official`.
    """
    ours = dict(module.named_parameters())
    state = {name: mapping.to_official(ours[mapping.name].detach()) for name, mapping in layout.mappings.items()}
    return {**state, **layout.buffers}


def from_official(module: nn.Module, state: Mapping[str, Tensor], layout: Layout) -> State:
    """Return the tensors of an official state dict under our names and in our shapes, ready for `load_state_dict`.

    The state may lack the layout's buffers, but those that it holds must agree with the layout. A tensor is a view if
    its layout is the same.

    Raises:
        WrongStateError: tensors are missing, left over, or of another shape or type, or buffers disagree. The message
            lists the first names of each kind and counts the rest.
    """
    mappings, buffers = layout.mappings, layout.buffers
    problems = [
        *_listed("missing", [name for name in mappings if name not in state]),
        *_listed("left over", [name for name in state if name not in mappings and name not in buffers]),
        *_listed("of another shape", _wrong_shapes(mappings, state)),
    ]
    known = {name: tuple(value.shape) for name, value in state.items() if name not in buffers} if problems else {}
    problems += [
        *_listed("not floating point", _wrong_types(mappings, state)),
        *_listed("NaN or infinite", _not_finite(mappings, state) if not problems else []),
        *_listed("of another model", _wrong_buffers(layout, state)),
    ]
    if problems:
        count = sum(parameter.numel() for parameter in module.parameters())
        raise WrongStateError(
            f"This is not the state of {layout.name} ({count:,} parameters): {'; '.join(problems)}.", known
        )
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    parts: dict[str, list[Tensor]] = {}
    for name, mapping in mappings.items():
        parts.setdefault(mapping.name, []).append(mapping.from_official(state[name], shapes[mapping.name]))
    return {name: tensors[0] if len(tensors) == 1 else torch.cat(tensors) for name, tensors in parts.items()}


def load_official(module: nn.Module, state: Mapping[str, Tensor], layout: Layout) -> None:
    """Load an official state dict into `module`, which may be on the meta device; views are not copied.

    Raises:
        WrongStateError: the state is that of another model (see `from_official`).
    """
    parameters = from_official(module, state, layout)
    # The checkpoint does not hold our buffers (the codebook), so they stay as the constructor made them.
    module.load_state_dict({**dict(module.named_buffers()), **parameters}, assign=True)


def load_state(module: nn.Module, state: Mapping[str, Tensor], layout: Layout, path: Path | str) -> None:
    """Load an official state dict that was read from `path` (see `load_official`); error messages begin with `path`."""
    try:
        load_official(module, state, layout)
    except WrongStateError as error:
        raise WrongStateError(f"{path}: {error}", error.shapes) from error


def _listed(kind: str, names: Iterable[str]) -> list[str]:
    names = list(names)
    if not names:
        return []
    rest = f" and {len(names) - NUM_LISTED} more" if len(names) > NUM_LISTED else ""
    return [f"{len(names)} {kind}: {', '.join(names[:NUM_LISTED])}{rest}"]


def _wrong_shapes(mappings: Mapping[str, ParamMapping], state: Mapping[str, Tensor]) -> list[str]:
    return [
        f"{name} {list(state[name].shape)} instead of {list(mapping.shape)}"
        for name, mapping in mappings.items()
        if name in state and tuple(state[name].shape) != mapping.shape
    ]


def _wrong_types(mappings: Mapping[str, ParamMapping], state: Mapping[str, Tensor]) -> list[str]:
    return [f"{n} {state[n].dtype}" for n in mappings if n in state and not state[n].is_floating_point()]


def _not_finite(mappings: Mapping[str, ParamMapping], state: Mapping[str, Tensor]) -> list[str]:
    return [n for n in mappings if not state[n].is_meta and not is_finite(state[n])]


def _wrong_buffers(layout: Layout, state: Mapping[str, Tensor]) -> list[str]:
    def agrees(ours: Tensor, theirs: Tensor) -> bool:
        return ours.shape == theirs.shape and torch.allclose(theirs.float(), ours, atol=layout.buffer_tolerance)

    return [name for name, ours in layout.buffers.items() if name in state and not agrees(ours, state[name])]
