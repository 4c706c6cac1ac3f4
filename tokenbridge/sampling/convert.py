"""Published files as model folders of diffusers."""

from __future__ import annotations

from pathlib import Path

from tokenbridge.models.registry import find_preset, load_published, load_published_tokenizer
from tokenbridge.sampling.load import weights_file
from tokenbridge.tokenizers.published import TOKENIZERS
from tokenbridge.utils.files import replacing_folder
from tokenbridge.weights.diffusers import check_replaceable


def convert(path: Path | str, folder: Path | str, name: str, *, ema: bool = True) -> None:
    """Write a published file as a diffusers model folder: config.json and one safetensors, in the file's number type.

    Args:
        path: the official file, or its folder.
        folder: what to write; whole or not at all, replacing what is there.
        name: of a preset of any system, or of a tokenizer (`TOKENIZERS`).
        ema: take the moving average of the weights, as published, where a file has one; or the last ones.

    Raises:
        MissingFileError: there is no such file.
        UserError: an unknown name; a file that is damaged or of another model; `check_replaceable`.
    """
    check_replaceable(folder, "config.json")
    path = Path(path)
    if name in TOKENIZERS:
        model = load_published_tokenizer(TOKENIZERS[name], weights_file(path, name))
    else:
        system, preset = find_preset(name)
        model = load_published(system, weights_file(path, preset.name), preset.name, ema=ema)
    with replacing_folder(folder) as temporary:
        # One file whatever its size: what `load_model` reads.
        model.save_pretrained(temporary, safe_serialization=True, max_shard_size="1TB")
