"""TokenBridge as a diffusers pipeline, which makes images from class names and seeds and is saved as one folder.

The pipeline makes the same image as a sampling run with per-image randomness does from the same seed, image number and
label.
"""

from __future__ import annotations

import difflib
import operator
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput

from tokenbridge.data.images import finite, images_to_pixels, to_pil
from tokenbridge.models.noise import ImageNoise, image_noise
from tokenbridge.models.tokenbridge.checkpoint import load_tokenbridge
from tokenbridge.models.tokenbridge.model import TokenBridge
from tokenbridge.models.tokenbridge.presets import PRESETS
from tokenbridge.models.tokenbridge.sampling import TokenBridgeSampling, generate_tokens
from tokenbridge.sampling.convert import check_free
from tokenbridge.tokenizers.base import LatentTokenizer
from tokenbridge.tokenizers.kl16 import load_kl16
from tokenbridge.utils.errors import UnusableImageError, UserError
from tokenbridge.utils.files import check_replaceable, replacing_folder
from tokenbridge.weights.diffusers import WEIGHTS_FILE, load_model
from tokenbridge.weights.published import find_preset

# Large weights are split into several files, which an index lists.
FILES = (
    "model_index.json",
    *(f"{part}/{name}" for part in ("transformer", "vae") for name in ("config.json", "diffusion_pytorch_model*.*")),
)
NUM_SUGGESTED = 5  # an error message suggests at most this many class names


class TokenBridgePipeline(DiffusionPipeline):
    """Class-conditional image generation.

    `save_pretrained` writes a folder with the sub-folders `transformer` and `vae`, which `from_pretrained` reads. The
    folder's `model_index.json` holds the class names and the default sampling settings.

    Args:
        transformer: the model that generates the tokens.
        vae: the autoencoder that decodes the latents; its `scaling_factor` is that of the latents.
        id2label: class number to name, with synonyms separated by commas. If None, calls accept only numbers.
        sampling: fields of `TokenBridgeSampling`. They are the defaults of a call, and a call cannot change the
            guidance schedule, the position order and the first element. None means the defaults of
            `TokenBridgeSampling`.

    Raises:
        UserError: the components do not fit each other or lack weights, or a class that does not exist has a name.
    """

    transformer: TokenBridge
    vae: AutoencoderKL

    def __init__(
        self,
        transformer: TokenBridge,
        vae: AutoencoderKL,
        id2label: dict[int, str] | dict[str, str] | None = None,
        sampling: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for name, module in (("transformer", transformer), ("vae", vae)):
            # If a folder lacks tensors, diffusers only prints a warning and leaves them on the meta device.
            if absent := [key for key, value in module.named_parameters() if value.is_meta]:
                raise UserError(f"The {name} lacks {len(absent)} weights: {', '.join(absent[:3])}.")
        if vae.config.latent_channels != transformer.num_channels:
            raise UserError(
                f"The VAE has {vae.config.latent_channels} latent channels, the transformer {transformer.num_channels}."
            )
        names = {int(number): name for number, name in (id2label or {}).items()}  # JSON turned the numbers into text
        if unknown := sorted(set(names) - set(range(transformer.num_classes))):
            raise UserError(f"Class {unknown[0]} has a name; the transformer has {transformer.num_classes} classes.")
        self.register_modules(transformer=transformer.eval(), vae=vae.eval())
        self.register_to_config(id2label=names, sampling=asdict(TokenBridgeSampling(**(sampling or {}))))

    def register_modules(self, **modules: Any) -> None:
        """Record the classes of the components under names that do not depend on the layout of this package."""
        super().register_modules(**modules)
        self.register_to_config(transformer=("tokenbridge", "TokenBridge"))

    @classmethod
    def from_pretrained(cls, name: Path | str, **options: Any) -> Any:
        """Load a pipeline from a folder or from the hub, each model as strictly as `load_model` does.

        Args:
            name: the folder, or the name on the hub.
            options: those of diffusers. Models that are given here are not read.

        Raises:
            UserError: a model is damaged, or it lacks weights.
        """
        folder = Path(name) if Path(name).is_dir() else Path(cls.download(name, **options))
        variant, dtype = options.get("variant"), options.get("torch_dtype")
        file = WEIGHTS_FILE if variant is None else WEIGHTS_FILE.replace(".", f".{variant}.", 1)
        for part, model_class in (("transformer", TokenBridge), ("vae", AutoencoderKL)):
            if part not in options:
                options[part] = load_model(model_class, folder / part, weights_file=file)
                for parameter in options[part].parameters() if isinstance(dtype, torch.dtype) else ():
                    parameter.data = parameter.data.to(dtype)
        return super().from_pretrained(folder, **options)

    @classmethod
    def load_config(cls, *arguments: Any, **options: Any) -> Any:
        """Read a saved configuration, whose class names may come from this or an earlier layout of the package.

        diffusers looks for a class in the module that the configuration names, which must also contain `ModelMixin`.
        """
        loaded = super().load_config(*arguments, **options)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        library, name = config.get("transformer") or (None, None)
        if name == "TokenBridge" and str(library).partition(".")[0] == "tokenbridge":
            config["transformer"] = [TokenBridge.__module__, name]
        return loaded

    @classmethod
    def from_preset(
        cls, name: str, checkpoint: Path | str, vae: Path | str, *, variant: str | None = None, ema: bool = True
    ) -> TokenBridgePipeline:
        """Build the pipeline of the preset `name` from its official files.

        Args:
            checkpoint: `checkpoint-last.pth`, or the folder that holds it.
            vae: `kl16.ckpt`.
            variant: name of the preset's sampling settings; None means the default ones, or those of
                `TokenBridgeSampling` if none were published (tokenbridge-b).
            ema: load the moving average of the weights, which the published evaluations used, and not the last
                weights.

        Raises:
            MissingFileError: a file does not exist.
            UserError: the preset or the variant is unknown, or a file is damaged.
            WrongStateError: a file holds another model.
        """
        preset = find_preset(name, PRESETS)
        published = variant is not None or preset.sampling
        return cls(
            transformer=load_tokenbridge(checkpoint, name, ema=ema),
            vae=load_kl16(vae),
            id2label=imagenet_labels() if preset.official_name else None,
            sampling=asdict(preset.sampling_config(variant)) if published else None,
        )

    def __call__(
        self,
        class_labels: int | str | Sequence[int | str],
        *,
        seed: int | Sequence[int] = 0,
        guidance_scale: float | None = None,
        num_iterations: int | None = None,
        temperature: float | None = None,
        output_type: Literal["pil", "np", "pt"] = "pil",
    ) -> ImagePipelineOutput:
        """Generate one image for each label, all in one batch.

        Random numbers do not come from a `torch.Generator`. Every image has a stream of its own, seeded with (seed,
        index), so it is the same in every batch and on every device, apart from rounding.

        Args:
            class_labels: class numbers or names (see `class_number`).
            seed: one seed, with which image i has the stream (seed, i). Or one seed for each image, with which image i
                has the stream (seed[i], 0), which is the stream of an image that is made alone.
            guidance_scale: at least 0, where 1 turns guidance off; the pipeline's own if None.
            num_iterations: from 1 to the number of positions; the pipeline's own if None.
            temperature: at least 0, where 0 chooses the most likely token; the pipeline's own if None.
            output_type: ``"pil"``, or floats in [0, 1] that are not rounded: ``"np"`` [B, H, W, C] or ``"pt"``
                [B, C, H, W].

        Returns:
            The `images`, in the order of the labels.

        Raises:
            UserError: there are no labels, a label is unknown, ambiguous or out of range, a setting is out of range,
                or the number of seeds is not that of the labels.
            UnusableImageError: the logits of an image are NaN, or its pixels NaN or infinite.
        """
        if output_type not in ("pil", "np", "pt"):
            raise UserError(f"Unknown output type {output_type!r}; there are 'pil', 'np' and 'pt'.")
        labels = self.class_numbers(class_labels)
        if not labels:
            raise UserError("The number of images must be at least 1.")
        given = {"guidance_scale": guidance_scale, "num_iterations": num_iterations, "temperature": temperature}
        changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        config = replace(TokenBridgeSampling(**self.config.sampling), **changes)
        noise = self._noise(seed, len(labels))
        with self.progress_bar(total=config.num_iterations) as bar:
            tokens = generate_tokens(self.transformer, torch.tensor(labels), config, noise, on_iteration=bar.update)
        if int(tokens.min()) < 0:
            raise UnusableImageError("The logits are NaN, so the weights are damaged or need a higher precision.")
        images = finite(LatentTokenizer(self.vae).images(self.transformer.to_latents(tokens)))
        if output_type == "pil":
            return ImagePipelineOutput(to_pil(images_to_pixels(images)))
        images = (images + 1) / 2
        return ImagePipelineOutput(images if output_type == "pt" else images.permute(0, 2, 3, 1).cpu().numpy())

    def class_numbers(self, class_labels: int | str | Sequence[int | str]) -> list[int]:
        """Return the class numbers of labels, each of which may be a number or a name (see `class_number`)."""
        labels = [class_labels] if isinstance(class_labels, int | str) else class_labels
        names = self.config.id2label
        return [class_number(label, names) if isinstance(label, str) else operator.index(label) for label in labels]

    def _noise(self, seed: int | Sequence[int], num_images: int) -> ImageNoise:
        sizes = self.transformer.num_positions, self.transformer.num_channels
        if isinstance(seed, int):
            return image_noise(seed, list(range(num_images)), *sizes)
        if len(seed) != num_images:
            raise UserError(f"There are {len(seed)} seeds for {num_images} images.")
        noises = [image_noise(each, [0], *sizes) for each in seed]
        return ImageNoise(torch.cat([n.orders for n in noises]), torch.cat([n.uniforms for n in noises]))


def class_number(name: str, id2label: Mapping[int, str]) -> int:
    """Return the number of the class called `name`.

    Case matters only if two names differ in nothing else. In ImageNet these are "Cardigan" (a dog) and "cardigan".

    Args:
        name: a class name or one of its synonyms.
        id2label: class number to name, with synonyms separated by commas.

    Raises:
        UserError: no class has this name, in which case the message suggests similar names, or several classes do.
    """
    name = name.strip()
    synonyms = [(synonym.strip(), number) for number, label in id2label.items() for synonym in label.split(",")]
    found = {number: synonym for synonym, number in synonyms if synonym == name}
    found = found or {number: synonym for synonym, number in synonyms if synonym.casefold() == name.casefold()}
    if len(found) == 1:
        return next(iter(found))
    if found:
        several = " or ".join(f"class {number} ({synonym})" for number, synonym in found.items())
        raise UserError(f"The class name {name!r} may mean {several}; give the number.")
    if not id2label:
        raise UserError(f"This model's classes have no names; give a number instead of {name!r}.")
    spellings = {synonym.casefold(): synonym for synonym, _ in synonyms}
    within = [spelling for spelling in spellings if name and name.casefold() in spelling]
    near = within + difflib.get_close_matches(name.casefold(), spellings, n=NUM_SUGGESTED)
    suggested = [repr(spellings[spelling]) for spelling in dict.fromkeys(near)][:NUM_SUGGESTED]
    raise UserError(f"There is no class {name!r}" + (f"; similar: {', '.join(suggested)}." if suggested else "."))


def imagenet_labels() -> dict[int, str]:
    """Return the names of ImageNet's 1,000 classes from torchvision, which has one name for each, all different."""
    from torchvision.models import ResNet50_Weights

    return dict(enumerate(ResNet50_Weights.IMAGENET1K_V1.meta["categories"]))


def convert_pipeline(
    checkpoint: Path | str,
    vae: Path | str,
    folder: Path | str,
    name: str,
    *,
    ema: bool = True,
    overwrite: bool = False,
) -> None:
    """Write the published files of the preset `name` as a pipeline folder for `TokenBridgePipeline.from_pretrained`.

    Args:
        checkpoint: `checkpoint-last.pth`, or the folder that holds it.
        vae: `kl16.ckpt`.
        folder: the pipeline folder, which is written atomically.
        ema: convert the moving average of the weights, which the published evaluations used, and not the last weights.

    Raises:
        MissingFileError: a file does not exist.
        UserError: the preset is unknown, a file is damaged, or `folder` holds something else.
        WrongStateError: a file holds another model.
    """
    check_replaceable(folder, FILES)
    check_free(folder, overwrite)
    pipeline = TokenBridgePipeline.from_preset(name, checkpoint, vae, ema=ema)
    with replacing_folder(folder, FILES) as temporary:
        pipeline.save_pretrained(temporary)
