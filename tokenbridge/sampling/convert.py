"""Conversion of published files to model folders of diffusers."""

from __future__ import annotations

from pathlib import Path

from tokenbridge.models.registry import find_preset, load_published, load_published_tokenizer
from tokenbridge.sampling.load import weights_file
from tokenbridge.tokenizers.published import TOKENIZERS
from tokenbridge.utils.errors import UserError
from tokenbridge.utils.files import check_replaceable, replacing_folder
from tokenbridge.weights.diffusers import MODEL_FILES


def convert(path: Path | str, folder: Path | str, name: str, *, ema: bool = True, overwrite: bool = False) -> None:
    """Write a published file as a model folder of diffusers: config.json and one safetensors file.

    The weights keep the number type of the published file.

    Args:
        path: the official file, or the folder that holds it.
        folder: the model folder, which is written atomically.
        name: a preset of any system, or a tokenizer (`TOKENIZERS`).
        ema: convert the moving average of the weights, which the published evaluations used, and not the last weights.
            LlamaGen, GIVT and the tokenizers have only one set of weights.
        overwrite: replace a model that was converted before.

    Raises:
        MissingFileError: the official file does not exist.
        UserError: the name is unknown, the file is damaged, or `folder` holds something else.
        WrongStateError: the file holds another model.
    """
    check_replaceable(folder, MODEL_FILES)
    check_free(folder, overwrite)
    path = Path(path)
    if name in TOKENIZERS:
        model = load_published_tokenizer(TOKENIZERS[name], weights_file(path, name))
    else:
        system, preset = find_preset(name)
        model = load_published(system, weights_file(path, preset.name), preset.name, ema=ema)
    with replacing_folder(folder, MODEL_FILES) as temporary:
        # `load_model` reads one file, so the weights must not be split, whatever their size is.
        model.save_pretrained(temporary, safe_serialization=True, max_shard_size="1TB")


def check_free(folder: Path | str, overwrite: bool) -> None:
    """Check that nothing was converted to a folder before, unless it may be replaced.

    Raises:
        UserError: the folder is not empty.
    """
    if not overwrite and Path(folder).is_dir() and any(Path(folder).iterdir()):
        raise UserError(
            f"{folder} already holds a converted model; name another folder, or replace it with --overwrite."
        )
