"""Inception-v3 as torch-fidelity has it: which weights, and the network.

FID and Inception Score are defined by one file of weights. Scores by any other weights are not FID, so the file is
checked by its hash; other weights must be asked for as such, and label every score that rests on them.
"""

from __future__ import annotations

import io
import pickle  # for its exception alone
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from tokenbridge.utils.errors import UserError
from tokenbridge.utils.files import replacing, sha256_of
from tokenbridge.weights.artifacts import INCEPTION, fingerprint, resolve

FEATURES = "2048"  # torch-fidelity's names of its outputs
LOGITS = "logits_unbiased"  # what the Inception Score is made of


@dataclass(frozen=True)
class InceptionWeights:
    """A file that may be unpickled, and whether scores by it are those that papers mean."""

    path: Path
    sha256: str
    published: bool


def find_inception(
    path: Path | str | None = None,
    *,
    other: Path | str | None = None,
    folder: Path | str | None = None,
    download: bool = False,
) -> InceptionWeights:
    """Return the published weights, or `other` ones, checked.

    Args:
        path: of the published file, or a folder that holds it; None looks in the usual places (artifacts.py).
        other: weights that are not the published ones, in torch-fidelity's format.
        folder: see `artifacts.resolve`.
        download: see `artifacts.resolve`.

    Raises:
        MissingArtifactsError: the published file is not there.
        ValueError: `path` is another file, both are given, or `other` is no file of tensors alone.
    """
    if other is None:
        found = resolve([INCEPTION], folder=folder, given={INCEPTION: path}, download=download)[INCEPTION]
        return InceptionWeights(found, fingerprint(found, folder=folder), published=True)
    if path is not None:
        raise UserError(f"Scores need one file of Inception's weights, not both {path} and {other}.")
    try:
        # torch-fidelity unpickles whatever is in the file; what loads here holds nothing but tensors.
        torch.load(other, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zipfile and pickle have many ways to say that bytes are damaged
        raise UserError(f"{other} holds no weights of Inception ({type(error).__name__}).") from error
    return InceptionWeights(Path(other), sha256_of(other), published=False)


def load_inception(weights: InceptionWeights) -> nn.Module:
    """Return torch-fidelity's Inception-v3, in evaluation mode.

    It maps uint8 images [B, 3, H, W] to features [B, 2048] and logits without bias [B, 1008], both float32.
    torch-fidelity unpickles the file it is given; here pickled code is never run: it gets a copy of the tensors.

    Raises:
        ValueError: the file does not hold Inception's weights.
    """
    content = io.BytesIO()
    try:
        torch.save(torch.load(weights.path, map_location="cpu", weights_only=True), content)
        content.seek(0)
        return FeatureExtractorInceptionV3(
            "inception-v3-compat", [FEATURES, LOGITS], feature_extractor_weights_path=content
        )
    except (RuntimeError, pickle.UnpicklingError, EOFError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(f"{weights.path} does not hold the weights of torch-fidelity's Inception: {reason}") from error


def write_random_inception(path: Path | str, seed: int = 0) -> None:
    """Write random weights in torch-fidelity's format: a stand-in for tests and dry runs, worth nothing else."""

    class Unloaded(FeatureExtractorInceptionV3):
        """The network as made; the constructor always loads a file."""

        def load_state_dict(self, *_: object, **__: object) -> None:  # type: ignore[override]
            pass

    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(seed)
        empty = Path(folder) / "empty.pth"
        torch.save({}, empty)
        network = Unloaded("inception-v3-compat", [FEATURES, LOGITS], str(empty))
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)  # as made, the features fade to 0
    with replacing(path) as temporary, temporary.open("wb") as file:  # torch takes no path of a hidden file
        torch.save(network.state_dict(), file)
