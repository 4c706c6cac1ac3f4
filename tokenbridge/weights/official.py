"""Published checkpoints: official tensors by their official names, into our modules and back.

A `Layout` says which parameter each official tensor becomes; every system and tokenizer makes its own, in its folder.
Loading is strict: every tensor is used once, every parameter is filled, and shapes agree. Reading the files is the
work of `torch_files` and `flax_files`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from tokenbridge.utils.errors import UserError

NUM_LISTED = 5  # names of each kind in an error message

State = dict[str, Tensor]


@dataclass(frozen=True)
class ParamMapping:
    """The parameter of ours that an official tensor becomes, and how its shape changes on the way."""

    name: str  # of the parameter in our module
    shape: tuple[int, ...]  # official; ours may drop trailing ones (1 × 1 convolutions that are linear layers here)
    kernel: bool = False  # laid out as in Flax: [in, out] however split further, or [height, width, in, out]
    part: tuple[int, int] | None = None  # (i, n): it is the i-th of n equal parts of ours, along the first dimension

    def to_official(self, ours: Tensor) -> Tensor:
        """Return the official tensor, from the whole of ours."""
        if self.part is not None:
            ours = ours.chunk(self.part[1])[self.part[0]]
        if self.kernel:
            ours = ours.permute(2, 3, 1, 0) if ours.ndim == 4 else ours.T
        return ours.reshape(self.shape)

    def from_official(self, official: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return our tensor of this shape, or the part of it that this is; the inverse of `to_official`."""
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
    name: str  # of the model, for messages
    buffers: Mapping[str, Tensor] = field(default_factory=dict)  # official tensors that follow from the sizes
    buffer_tolerance: float = 0.0  # absolute; what the rounding of other libraries makes of the buffers


class WrongStateError(UserError):
    """A state dict of another model than the one it was read for; `shapes` are its own."""

    def __init__(self, message: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__(message)
        self.shapes = dict(shapes)


def flat_layout(module: nn.Module, name: str | None = None) -> Layout:
    """Return the layout of a module whose parameters have the official names and shapes."""
    mappings = {key: ParamMapping(key, tuple(parameter.shape)) for key, parameter in module.named_parameters()}
    return Layout(mappings, name or type(module).__name__)


def to_official(module: nn.Module, layout: Layout) -> State:
    """Return the official state dict of `module`: all parameters, and the buffers of the layout.

    The official class loads it with `strict=True`. Tensors share memory with the module's where layouts agree. This is
    the inverse of `from_official`.
    """
    ours = dict(module.named_parameters())
    state = {name: mapping.to_official(ours[mapping.name].detach()) for name, mapping in layout.mappings.items()}
    return {**state, **layout.buffers}


def from_official(module: nn.Module, state: Mapping[str, Tensor], layout: Layout) -> State:
    """Return `state`, an official state dict, under our names and in our shapes, ready for `load_state_dict`.

    Buffers may be there or not; one that is there must agree with the layout's. Tensors are views where layouts agree.

    Raises:
        WrongStateError: tensors missing, left over, of another shape or type, or buffers of another model; the message
            lists the first of each kind and counts the rest.
    """
    mappings, buffers = layout.mappings, layout.buffers
    problems = [
        *_listed("missing", [name for name in mappings if name not in state]),
        *_listed("left over", [name for name in state if name not in mappings and name not in buffers]),
        *_listed("of another shape", _wrong_shapes(mappings, state)),
        *_listed("not floating point", _wrong_types(mappings, state)),
        *_listed("of another model", _wrong_buffers(layout, state)),
    ]
    if problems:
        count = sum(parameter.numel() for parameter in module.parameters())
        raise WrongStateError(
            f"This is not the state of {layout.name} ({count:,} parameters): {'; '.join(problems)}.",
            {name: tuple(value.shape) for name, value in state.items() if name not in buffers},
        )
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    parts: dict[str, list[Tensor]] = {}
    for name, mapping in mappings.items():
        parts.setdefault(mapping.name, []).append(mapping.from_official(state[name], shapes[mapping.name]))
    return {name: tensors[0] if len(tensors) == 1 else torch.cat(tensors) for name, tensors in parts.items()}


def load_official(module: nn.Module, state: Mapping[str, Tensor], layout: Layout) -> None:
    """Put an official state dict into `module`, which may be on the meta device, without copying a tensor.

    Raises:
        WrongStateError: as `from_official`.
    """
    parameters = from_official(module, state, layout)
    # Our buffers (the codebook) are not in the checkpoint: they stay as the constructor made them.
    module.load_state_dict({**dict(module.named_buffers()), **parameters}, assign=True)


def load_state(module: nn.Module, state: Mapping[str, Tensor], layout: Layout, path: Path | str) -> None:
    """Put a state that was read from `path` into `module`, as `load_official`; the path begins its errors."""
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


def _wrong_buffers(layout: Layout, state: Mapping[str, Tensor]) -> list[str]:
    def agrees(ours: Tensor, theirs: Tensor) -> bool:
        return ours.shape == theirs.shape and torch.allclose(theirs.float(), ours, atol=layout.buffer_tolerance)

    return [name for name, ours in layout.buffers.items() if name in state and not agrees(ours, state[name])]
