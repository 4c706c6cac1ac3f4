"""A system: all that the rest of the package has to know of a generator. README.md here says how to add one.

Each system's folder ends in a `system.py` with one `System`, and `registry.py` lists it. Commands, training, sampling
runs, plans and tables go by these fields and name no system.

Shape letters: B batch, L positions, C channels, h, w latent height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from tokenbridge.models.noise import Noise
from tokenbridge.tokenizers.published import PublishedTokenizer
from tokenbridge.utils.devices import Dtype
from tokenbridge.utils.errors import UserError
from tokenbridge.weights.official import Layout
from tokenbridge.weights.published import Preset

FLOP = dict[str, float]
PRECISION_RECALL_NOTE = "Precision and recall as published: TokenBridge's table 3 (arXiv 2503.16430 v1)."


@dataclass(frozen=True)
class Evaluation:
    """How the published numbers of a system were made, as far as it is known."""

    dtype: Dtype  # of the generator on a GPU
    published: str  # where the numbers are
    labels: Literal["random"] | None = None  # None: balanced
    notes: tuple[str, ...] = ()  # what one has to know before one compares


@dataclass(frozen=True)
class System:
    """What one has to say of a system, once."""

    name: str
    model: Any  # class, a diffusers ModelMixin
    settings: type  # dataclass of sampling settings; its fields are options of `tokenbridge sample`
    # (model, labels [B], settings, noise) -> tokens [B, L, C] or [B, L] int64, -1 where logits are NaN; or latents
    # [B, C, h, w]. What a seed gives must not depend on the batch.
    generate: Callable[[Any, Tensor, Any, Noise], Tensor]
    # (model in training mode, latents [B, C, h, w] or codes [B, L], labels [B], **options of a recipe) -> scalar
    loss: Callable[..., Tensor]
    layout: Callable[[Any], Layout]  # official names of the parameters
    load: Callable[..., Any]  # (published file, preset's name) -> model; with ema= if `has_average`
    tokenizer: PublishedTokenizer  # that the published model was trained with
    count_flop: Callable[[Any, Any], FLOP]  # (model on the meta device, settings) -> of one image by part
    describe_tokens: Callable[[Mapping[str, Any]], tuple[int, str]]  # sizes -> tokens of an image, and what one is
    evaluation: Evaluation
    presets: Mapping[str, Preset] = field(default_factory=dict)
    default_size: str = ""  # of `reproduce NAME`, without the system's name
    # What the tokenizer decodes, of what `generate` returns: latents [B, C, h, w], or codes [B, h, w].
    to_latents: Callable[[Any, Tensor], Tensor] = lambda model, generated: generated
    # Constructor arguments that are measured on training latents [N, C, h, w], as a recipe asks: (latents, **wishes).
    measure: Callable[..., dict[str, Any]] | None = None
    facts: Callable[[Any], dict[str, Any]] = lambda model: {}  # of a loaded model, for a run's record
    codes: bool = False  # it models the codes of a VQ tokenizer, and not latents
    has_average: bool = False  # its files hold the weights' moving average beside the last ones
    has_official_noise: bool = False  # torch can draw in the order of the official code
    casts_weights: bool = False  # half precision is that of the weights, and not autocast around them
    compiled_part: str | None = None  # submodule that nearly all the work is in; None gains nothing by compilation
    quick: Mapping[str, Any] = field(default_factory=dict)  # settings of stand-ins; the official ones otherwise

    @property
    def recipe(self) -> Literal["vae", "vq"]:
        """The recipe of its tokenizer at the scales that are trained here."""
        return "vq" if self.codes else "vae"


def change_settings(owner: str, settings: Any, changes: Mapping[str, Any]) -> Any:
    """Return sampling settings with some of them replaced; `owner` is whose they are, for the message.

    Raises:
        UserError: settings that there are not, or values out of range.
    """
    known = [each.name for each in fields(settings)]
    if unknown := sorted(changes.keys() - set(known)):
        raise UserError(f"{owner} has no setting {', '.join(unknown)}; it has {', '.join(known)}.")
    return replace(settings, **changes)


def read_settings(owner: str, settings: Any, words: Mapping[str, str]) -> Any:
    """Return sampling settings with some of them replaced by what a user typed; otherwise as `change_settings`."""
    types = get_type_hints(type(settings))
    changes: dict[str, Any] = {}
    for name, word in words.items():
        try:
            changes[name] = TypeAdapter(types.get(name, Any)).validate_python(yaml.safe_load(word))
        except (ValidationError, yaml.YAMLError) as error:
            raise UserError(f"The setting {name} of {owner} cannot be {word!r}.") from error
    return change_settings(owner, settings, changes)
