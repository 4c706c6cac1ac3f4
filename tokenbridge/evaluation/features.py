"""Features of images by Inception-v3, batch by batch, with a cache."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from cleanfid.inception_torchscript import InceptionV3W
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader

from tokenbridge.data.image_sets import CroppedImages, ImageArray, ImageFiles
from tokenbridge.evaluation import inception
from tokenbridge.evaluation.inception import InceptionWeights
from tokenbridge.utils.console import track
from tokenbridge.utils.errors import UserError
from tokenbridge.utils.files import replacing, sha256_of
from tokenbridge.weights.artifacts import ARTIFACTS, INCEPTION

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


NUM_FEATURES = 2048  # of Inception's last pooling layer
OTHER = "other-inception"  # what scores by unpublished weights are labelled with
CACHE = Path("runs") / "features"
NUM_WORKERS = 4  # processes that decode images for a GPU; a CPU has no cores to spare

# The hash that k-diffusion checks and several public repositories quote for NVIDIA's TorchScript file.
CLEANFID_FILE = "inception-2015-12-05.pt"
CLEANFID_URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{CLEANFID_FILE}"
CLEANFID_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"

ImageSet = ImageFiles | ImageArray


@dataclass(frozen=True)
class Inception:
    """A network whose scores may be called FID only if its weights are the published ones."""

    network: Callable[[Tensor], tuple[Tensor, ...]]
    sha256: str  # of the file of weights
    published: bool


def load_inception(path: Path | str, *, allow_other: bool = False) -> Inception:
    """Load torch-fidelity's Inception, on the GPU if there is one; it returns features [B, F] and logits [B, K].

    Raises:
        ValueError: there is no such file, it does not hold Inception's weights, or not the published ones.
    """
    declared = ARTIFACTS[INCEPTION]
    assert declared.sha256 is not None
    sha256 = _hash_of_weights(path, declared.file, declared.sha256, allow_other)
    weights = InceptionWeights(Path(path), sha256, sha256 == declared.sha256)
    network: Any = inception.load_inception(weights).to(_device())
    return Inception(network, sha256, weights.published)


def load_cleanfid_inception(path: Path | str, *, allow_other: bool = False) -> Inception:
    """Load clean-fid's Inception, on the GPU if there is one; it returns features [B, F].

    Raises:
        ValueError: there is no such file, it has another name, or is not the published one.
    """
    path = Path(path)
    sha256 = _hash_of_weights(path, CLEANFID_FILE, CLEANFID_SHA256, allow_other)
    if path.name != CLEANFID_FILE:
        raise UserError(f"clean-fid asks for a file called {CLEANFID_FILE}, not {path.name}.")
    try:
        network: Any = InceptionV3W(str(path.parent), download=False)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(f"{path} does not hold clean-fid's Inception: {reason}") from error
    network.to(_device())

    def extract(images: Tensor) -> tuple[Tensor, ...]:
        # Pixels come from clean-fid's resizing (299 x 299), or as they are, for the network to resize as TensorFlow.
        network.resize_inside = images.dtype == torch.uint8
        return (network(images.float()),)

    return Inception(extract, sha256, sha256 == CLEANFID_SHA256)


def inception_features(
    images: ImageSet, inception: Inception, *, batch_size: int = 64, cache: Path | str = CACHE
) -> tuple[Tensor, Tensor]:
    """Return features [N, F] and logits [N, K], float32 on the CPU; from the cache, if they were extracted before.

    Raises:
        ValueError: features that are not finite, or a damaged file in the cache.
    """
    version = importlib.metadata.version("torch-fidelity")
    file = Path(cache) / f"{images.sha256}-{inception.sha256[:16]}-torch-fidelity-{version}.safetensors"
    if file.is_file():
        try:
            stored = load_file(file)
        except SafetensorError as error:
            raise UserError(f"The cached features {file} are damaged: {error}. Delete the file.") from error
        return stored["features"], stored["logits"]
    batches = [outputs for _, outputs in _forward(images, inception.network, batch_size, "features")]
    features, logits = (torch.cat(parts) for parts in zip(*batches, strict=True))
    if not (features.isfinite().all() and logits.isfinite().all()):
        raise UserError(f"Inception's features of {images.name} are not finite: the weights are damaged.")
    with replacing(file) as temporary:
        save_file({"features": features, "logits": logits}, temporary)
    return features, logits


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _forward(
    images: ImageSet | CroppedImages,
    network: Callable[[Tensor], tuple[Tensor, ...]],
    batch_size: int,
    what: str,
    prepare: Callable[[Tensor], Tensor] = lambda pixels: pixels,
) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
    """Yield pixels [B, 3, H, W] and the network's outputs, on the CPU, batch by batch.

    Convolutions are float32 on a GPU too: TF32, PyTorch's default there, keeps 10 bits of each factor.
    """
    device = _device()
    # An .npz is read in order, by one reader.
    num_workers = NUM_WORKERS if device.type == "cuda" and not isinstance(images, ImageArray) else 0
    loader: Iterable[Tensor] = DataLoader(images, batch_size=batch_size, num_workers=num_workers)
    for pixels in track(loader, what):
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            outputs = network(prepare(pixels).to(device))
        yield pixels, tuple(x.cpu() for x in outputs)


def _hash_of_weights(path: Path | str, name: str, sha256: str, allow_other: bool) -> str:
    """Return the SHA-256 of a file of weights; refuse another than the published one unless that is allowed."""
    if not Path(path).is_file():
        raise UserError(f"There is no file of Inception weights {path}.")
    found = sha256_of(path)
    if found != sha256 and not allow_other:
        raise UserError(
            f"{path} is not the published {name}: its SHA-256 is {found}, not {sha256}. Scores by other weights are "
            f"no FID; they can be asked for (--allow-other-inception) and are labelled FID-{OTHER}."
        )
    return found
