"""Make golden cases of any configuration with the reference path: `python -m benchmarks.make_golden FOLDER`.

The cases in reference_results/goldens come from the official code, at small sizes. The reference path reproduces them
(tests/benchmarks/test_reference_path.py), so it can stand in for the official code at full size. Since it is not that
code, the files say so in their `source`. reference_results/goldens/README.md describes the format and the rule for the
weights.

Shape letters: B batch, L positions, C channels, H height, W width, N positions of any image, D width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.reference import Pick, Reference, SampleArguments, make_reference
from tokenbridge.conformance.golden import FORMAT
from tokenbridge.conformance.tokenbridge import SAMPLE_DEFAULTS, make_model, tokenbridge_config
from tokenbridge.models.tokenbridge.checkpoint import tokenbridge_layout
from tokenbridge.utils import provenance
from tokenbridge.utils.files import replacing
from tokenbridge.weights.rule import RULE, rule_state

SALT = "own"
LARGE = {"preset": "tokenbridge_large", "quant_levels": 64}
TOLERANCES: dict[str, dict[str, Any]] = {  # as in the public cases
    "features": {"atol": 2e-4, "rtol": 1e-3},
    "training-logits": {"atol": 2e-4, "rtol": 1e-3},
    "head-sampling-logits": {"atol": 2e-4, "rtol": 1e-3},
    "sample": {
        "atol": 1e-4,
        "rtol": 1e-4,
        "tokens": "at least 99 % equal (greedy ties may flip under re-association)",
    },
}

Tensors = Mapping[str, Tensor]


def rule_reference(config: Mapping[str, Any], weights: Mapping[str, Any]) -> Reference:
    """Return the reference path for the configuration and the weights' rule of a case."""
    complete = tokenbridge_config(config)
    return make_reference(rule_state(tokenbridge_layout(make_model(complete)), weights), complete)


def features(reference: Reference, inputs: Tensors, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return tokens, encoder output and context of latents [B, C, H, W], masked where `mask` [B, L] is 1."""
    tokens = reference.encode(inputs["latents"].flatten(2).transpose(1, 2))
    embedding = reference.class_embedding(inputs["labels"], len(tokens))
    encoder = reference.encoder(reference.decode(tokens), inputs["mask"], embedding)
    return {"tokens": tokens, "encoder": encoder, "z": reference.decoder(encoder, inputs["mask"])}


def training_logits(reference: Reference, inputs: Tensors, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the teacher-forced logits of all masked positions, the loss, and the true tokens."""
    computed = features(reference, inputs, arguments)
    masked = inputs["mask"].bool()
    targets = computed["tokens"][masked][:, list(reference.channel_order)]
    logits = reference.training_logits(computed["z"][masked], targets)
    return {"logits": logits, "loss": F.cross_entropy(logits.flatten(0, 1), targets.flatten()), "targets": targets}


def head_sampling_logits(reference: Reference, inputs: Tensors, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the logits that the sampler sees when it is made to choose given tokens [N, C]."""
    seen: list[Tensor] = []
    reference.sample_channels(inputs["features"], following(inputs["tokens"], seen))
    return {"logits": torch.stack(seen, dim=1)}


def following(tokens: Tensor, seen: list[Tensor]) -> Pick:
    """Return a function that chooses the given tokens [N, C] and appends the logits to `seen`."""

    def pick(logits: Tensor, place: int) -> Tensor:
        seen.append(logits)
        return tokens[:, place]

    return pick


def sample(reference: Reference, inputs: Tensors, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """Sample with given orders [B, L], at temperature 0."""
    settings = {**SAMPLE_DEFAULTS, **arguments}
    labels = inputs["labels"] if settings.pop("labels") else None
    tokens = reference.sample_tokens(labels, inputs["orders"], SampleArguments(**settings))
    side = int(tokens.shape[1] ** 0.5)
    return {"tokens": tokens, "latents": reference.decode(tokens).transpose(1, 2).unflatten(2, (side, side))}


ENTRIES: dict[str, Callable[[Reference, Tensors, Mapping[str, Any]], dict[str, Tensor]]] = {
    "features": features,
    "training-logits": training_logits,
    "head-sampling-logits": head_sampling_logits,
    "sample": sample,
}


def draw_inputs(entry: str, config: Mapping[str, Any], *, num_masked: int, num_features: int = 6) -> dict[str, Tensor]:
    """Draw the inputs of a case for one image; `entry` says what the case computes."""
    generator = torch.Generator().manual_seed(0)
    side = config["img_size"] // config["vae_stride"]
    channels = config["vae_embed_dim"]
    if entry == "head-sampling-logits":
        shape = (num_features, channels)
        return {
            "features": torch.randn(num_features, config["decoder_embed_dim"], generator=generator),
            "tokens": torch.randint(config["quant_levels"], shape, generator=generator),
        }
    labels = torch.tensor([config["class_num"] // 2])
    orders = torch.randperm(side**2, generator=generator)[None]
    if entry == "sample":
        return {"labels": labels, "orders": orders}
    mask = torch.zeros(1, side**2).scatter(1, orders[:, :num_masked], 1.0)
    return {"latents": torch.randn(1, channels, side, side, generator=generator), "labels": labels, "mask": mask}


def write_golden(
    path: Path,
    entry: str,
    reference: Reference,
    config: Mapping[str, Any],
    weights: Mapping[str, Any],
    inputs: Tensors,
    arguments: Mapping[str, Any],
) -> None:
    """Compute a case and write it, with `config` as the file will state it."""
    with torch.inference_mode():
        outputs = ENTRIES[entry](reference, inputs, arguments)
    commit = provenance.commit()
    meta = {
        "format": FORMAT,
        "system": "tokenbridge",
        "entry": entry,
        "config": dict(config),
        "arguments": dict(arguments),
        "weights": dict(weights),
        "tolerance": TOLERANCES[entry],
        "source": f"this project's reference path, benchmarks/reference.py at {commit['commit']}"
        f"{' with changes' if commit['dirty'] else ''}; NOT the official code",
        "notes": "Made by benchmarks/make_golden.py; see the README of the folder.",
    }
    arrays: dict[str, NDArray[Any]] = {
        **{f"in.{name}": value.numpy() for name, value in inputs.items()},
        **{f"out.{name}": value.numpy() for name, value in outputs.items()},
    }
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, meta=np.array(json.dumps(meta)), **arrays)


def write_goldens(
    folder: Path, name: str, config: Mapping[str, Any], *, num_iter: int, num_masked: int, cfg: float = 3.1
) -> list[Path]:
    """Write a case of every entry to `folder` and return their paths.

    Args:
        folder: it is made if needed.
        name: the files are called `tokenbridge-NAME-ENTRY.npz`.
        config: official arguments, as the files will state them.
        num_iter: iterations of the sample.
        num_masked: masked positions of features and training logits.
        cfg: guidance scale of the sample.
    """
    weights = {"rule": RULE, "salt": SALT}
    reference = rule_reference(config, weights)
    guided = {"num_iter": num_iter, "cfg": cfg, "cfg_schedule": "linear", "labels": True, "temperature": 0.0}
    paths = []
    for entry in ENTRIES:
        inputs = draw_inputs(entry, reference.config, num_masked=num_masked)
        paths.append(folder / f"tokenbridge-{name}-{entry}.npz")
        write_golden(paths[-1], entry, reference, config, weights, inputs, guided if entry == "sample" else {})
    return paths


def main(folder: Annotated[Path, typer.Argument(help="Where the files go.")]) -> None:
    """Write four cases of the L size. This takes about 2 GB of memory for the weights, and minutes on two cores."""
    for path in write_goldens(folder, "large", LARGE, num_iter=4, num_masked=16):
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    typer.run(main)
