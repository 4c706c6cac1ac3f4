"""A system: all that the rest of the package has to know about a generator. README.md says how to add one.

Each system's folder has a module `system.py` with one `System`, which `registry.py` lists. Commands, training, sampling
runs, plans and tables use only the fields of `System`; they need no change for a new one.

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
    """How the published numbers of a system were measured, as far as that is known."""

    dtype: Dtype  # the generator's precision on a GPU
    published: str  # where the numbers were published
    labels: Literal["random"] | None = None  # None means balanced labels
    notes: tuple[str, ...] = ()  # what a reader must know before comparing our numbers with the published ones


@dataclass(frozen=True)
class System:
    """A generator: its model, how it is sampled, trained, loaded and counted, and how it was evaluated."""

    name: str
    model: Any  # class of the model, a diffusers ModelMixin
    settings: type  # dataclass of sampling settings; `tokenbridge sample` has an option for each of its fields
    # (model, labels [B], settings, noise) -> latents [B, C, h, w], or int64 tokens [B, L, C] or [B, L], which are -1
    # where logits are NaN. The image of a seed must not depend on the batch.
    generate: Callable[[Any, Tensor, Any, Noise], Tensor]
    # (model in training mode, latents [B, C, h, w] or codes [B, L], labels [B], **options of a recipe) -> scalar
    loss: Callable[..., Tensor]
    layout: Callable[[Any], Layout]  # model -> the official names of its parameters
    load: Callable[..., Any]  # (published file, preset's name) -> model; it takes ema= if `has_average`
    tokenizer: PublishedTokenizer  # the tokenizer that the published model was trained with
    count_flop: Callable[[Any, Any], FLOP]  # (model on the meta device, settings) -> operations of one image, by part
    # Sizes of the model -> the number of an image's tokens, and a description of one token.
    describe_tokens: Callable[[Mapping[str, Any]], tuple[int, str]]
    evaluation: Evaluation
    presets: Mapping[str, Preset] = field(default_factory=dict)
    default_size: str = ""  # the size that `reproduce NAME` takes, without the system's name
    # (model, the result of `generate`) -> what the tokenizer decodes: latents [B, C, h, w] or codes [B, h, w].
    to_latents: Callable[[Any, Tensor], Tensor] = lambda model, generated: generated
    # (training latents [N, C, h, w], **`measured` of a recipe) -> arguments of the model's constructor.
    measure: Callable[..., dict[str, Any]] | None = None
    facts: Callable[[Any], dict[str, Any]] = lambda model: {}  # model -> JSON values for the record of a run
    codes: bool = False  # the system models the codes of a VQ tokenizer, and not latents
    has_average: bool = False  # its published files hold the moving average of the weights beside the last weights
    has_official_noise: bool = False  # torch can draw the random numbers in the order of the official code
    casts_weights: bool = False  # in half precision, the weights are cast and autocast is not used
    compiled_part: str | None = None  # the submodule that is worth compiling; None if compilation gains nothing
    quick: Mapping[str, Any] = field(default_factory=dict)  # changes to the settings that make a stand-in quick

    @property
    def recipe(self) -> Literal["vae", "vq"]:
        """The name of its tokenizer's recipe at every scale."""
        return "vq" if self.codes else "vae"


def change_settings(owner: str, settings: Any, changes: Mapping[str, Any]) -> Any:
    """Return sampling settings with some of them replaced.

    Args:
        owner: name of the model that has the settings, for error messages.

    Raises:
        UserError: a setting does not exist, or its value is out of range.
    """
    known = [each.name for each in fields(settings)]
    if unknown := sorted(changes.keys() - set(known)):
        raise UserError(f"{owner} has no setting {', '.join(unknown)}; it has {', '.join(known)}.")
    return replace(settings, **changes)


def read_settings(owner: str, settings: Any, values: Mapping[str, Any]) -> Any:
    """Return sampling settings with some of them replaced by what a user asks for.

    Args:
        owner: name of the model that has the settings, for error messages.
        values: setting to value. Text, as it is typed, is read as YAML; all is converted to the setting's type.

    Raises:
        UserError: a setting does not exist, or its value is out of range or of another type.
    """
    types = get_type_hints(type(settings))
    changes: dict[str, Any] = {}
    for name, value in values.items():
        try:
            plain = yaml.safe_load(value) if isinstance(value, str) else value
            if isinstance(plain, bool) and types.get(name, bool) is not bool:  # YAML reads "yes" so
                raise UserError(f"The setting {name} of {owner} cannot be {value!r}.")
            changes[name] = TypeAdapter(types.get(name, Any)).validate_python(plain)
        except ValidationError as error:
            raise UserError(
                f"The setting {name} of {owner} cannot be {value!r}: {error.errors()[0]['msg']}."
            ) from error
        except yaml.YAMLError as error:
            raise UserError(f"The setting {name} of {owner} cannot be {value!r}.") from error
    return change_settings(owner, settings, changes)
