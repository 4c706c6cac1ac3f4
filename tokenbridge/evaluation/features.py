"""The features of images by Inception-v3, computed batch by batch, with a cache."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tokenbridge.data.decode import PIXELS_VERSION
from tokenbridge.data.image_sets import ImageArray, ImageSet
from tokenbridge.evaluation.inception import NUM_FEATURES, NUM_LOGITS, Inception
from tokenbridge.utils.console import track
from tokenbridge.utils.devices import best_device
from tokenbridge.utils.errors import UserError, reading
from tokenbridge.utils.files import check_writable, replacing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


CACHE = Path("runs") / "features"
NUM_WORKERS = 4  # processes that decode images for a GPU; without one, the network needs all cores


def inception_features(
    images: ImageSet, inception: Inception, *, batch_size: int = 64, cache: Path | str = CACHE
) -> tuple[Tensor, Tensor]:
    """Return features [N, F] and logits [N, K], float32 on the CPU. Those extracted before come from the cache.

    Raises:
        UserError: the features are not finite, or their file in the cache is damaged.
    """
    version = importlib.metadata.version("torch-fidelity")
    key = f"{images.sha256}-{inception.sha256[:16]}-pixels-{PIXELS_VERSION}-torch-fidelity-{version}"
    file = Path(cache) / f"{key}.safetensors"
    if file.is_file():
        return _read_cached(file, len(images))
    check_writable(file)
    batches = [outputs for _, outputs in forward(images, inception.network, batch_size, "features")]
    features, logits = (torch.cat(parts) for parts in zip(*batches, strict=True))
    if not (features.isfinite().all() and logits.isfinite().all()):
        raise UserError(f"Inception's features of {images.name} are not finite, so its weights must be damaged.")
    with replacing(file) as temporary:
        save_file({"features": features, "logits": logits}, temporary)
    return features, logits


def _read_cached(file: Path, num_images: int) -> tuple[Tensor, Tensor]:
    """Return the features [N, F] and logits [N, K] in a file of the cache, which somebody may have changed."""
    expected = {"features": [num_images, NUM_FEATURES], "logits": [num_images, NUM_LOGITS]}
    with reading(file, "cached features, so it is damaged and must be deleted"):
        stored = load_file(file)
    for name, shape in expected.items():
        found = stored.get(name)
        if found is None or list(found.shape) != shape or found.dtype != torch.float32 or not found.isfinite().all():
            held = "absent" if found is None else f"{found.dtype} {list(found.shape)}"
            raise UserError(f"The cached {name} in {file} are {held}, not finite {shape}. Delete this damaged file.")
    return stored["features"], stored["logits"]


def _collate(items: list[Tensor | UserError]) -> Tensor | UserError:
    """Return a batch, or the first error in it: torch would put the traceback of its worker into an error's message."""
    error = next((item for item in items if isinstance(item, UserError)), None)
    return torch.stack([item for item in items if isinstance(item, Tensor)]) if error is None else error


@dataclass(frozen=True)
class _WithErrors(Dataset["Tensor | UserError"]):
    """Images, of which those that cannot be read are the error that says so."""

    images: Any  # any object that has a length and items

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor | UserError:
        try:
            return self.images[index]
        except UserError as error:
            return UserError(str(error))


def forward(
    images: Dataset[Tensor] | Tensor,
    network: Callable[[Tensor], tuple[Tensor, ...]],
    batch_size: int,
    what: str,
    prepare: Callable[[Tensor], Tensor] = lambda pixels: pixels,
) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
    """Yield pixels [B, 3, H, W] and the network's outputs, on the CPU, batch by batch.

    Convolutions are computed in float32 on a GPU too, because TF32, PyTorch's default there, keeps only 10 bits of
    each factor.

    Args:
        images: a data set of uint8 pixels [3, H, W], or a tensor [N, 3, H, W].
        network: the network that takes the prepared pixels, on the GPU if there is one.
        batch_size: images per forward pass.
        what: the name of the work, for the progress bar.
        prepare: a function of the pixels of a batch, which runs on the CPU.
    """
    device = best_device()
    # The images of an .npz are read in order by one process, and a tensor needs no reading.
    num_workers = NUM_WORKERS if device.type == "cuda" and not isinstance(images, ImageArray | Tensor) else 0
    loader: Iterable[Tensor | UserError] = DataLoader(
        _WithErrors(images), batch_size=batch_size, num_workers=num_workers, collate_fn=_collate
    )
    for pixels in track(loader, what):
        if isinstance(pixels, UserError):
            raise pixels
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            outputs = network(prepare(pixels).to(device))
        yield pixels, tuple(x.cpu() for x in outputs)
