"""The Inception-v3 networks of torch-fidelity and clean-fid, and the published weights of each.

FID and Inception Score are defined by one file of weights. Scores by any other weights are not FID, so the file is
checked by its hash. A caller must ask for other weights expressly, and every score that rests on them is labelled.
The only file that is run as code is clean-fid's published one, whose hash is known.
"""

from __future__ import annotations

import hashlib
import io
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from cleanfid.inception_torchscript import InceptionV3W
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from tokenbridge.results.score import OTHER_INCEPTION
from tokenbridge.utils.devices import best_device
from tokenbridge.utils.errors import UserError, reading
from tokenbridge.utils.files import read_bytes, replacing
from tokenbridge.utils.hashed import read_hashed
from tokenbridge.weights.artifacts import ARTIFACTS, INCEPTION, resolve

if TYPE_CHECKING:
    from collections.abc import Callable

FEATURES = "2048"  # torch-fidelity's names of its outputs
LOGITS = "logits_unbiased"  # the output that the Inception Score is computed from
NUM_FEATURES = 2048  # the width of the last pooling layer
NUM_LOGITS = 1008

# The hash that k-diffusion checks and several public repositories quote for NVIDIA's TorchScript file.
CLEANFID_FILE = "inception-2015-12-05.pt"
CLEANFID_URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{CLEANFID_FILE}"
LARGEST_FILE = 2**29  # bytes; clean-fid's file has 91 MB
CLEANFID_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"


@dataclass(frozen=True)
class Inception:
    """A network whose scores may be called FID only if its weights are the published ones."""

    network: Callable[[Tensor], tuple[Tensor, ...]]
    sha256: str  # the hash of the file of weights
    published: bool

    @property
    def extractor(self) -> str | None:
        """The label of the scores by this network. It is None for the published weights, which papers use."""
        return None if self.published else OTHER_INCEPTION


def loaded(inception: Inception | Callable[[], Inception]) -> Inception:
    """Return Inception, which may be given as a function that loads it.

    So its weights are looked for only after the images, and a wrong folder is not reported as missing weights.
    """
    return inception if isinstance(inception, Inception) else inception()


def find_inception(path: Path | str | None = None, *, folder: Path | str | None = None, download: bool = True) -> Path:
    """Return the path of torch-fidelity's published weights, checked by their hash.

    Args:
        path: the file, or a folder that holds it. None stands for the usual places (artifacts.py).
        folder: a folder of published files, as `artifacts.resolve` takes it.
        download: whether the file is downloaded if it is missing. A command downloads what it cannot do without, and
            uses an extra if it is here.

    Raises:
        MissingArtifactsError: the file was not found, and was not downloaded.
        UserError: `path` is another file.
    """
    return resolve([INCEPTION], folder=folder, given={INCEPTION: path}, download=download)[INCEPTION]


def load_inception(path: Path | str, *, allow_other: bool = False) -> Inception:
    """Load torch-fidelity's Inception-v3, in evaluation mode, on the GPU if there is one.

    The network maps uint8 images [B, 3, H, W] to features [B, 2048] and logits without bias [B, 1008], both float32.
    torch-fidelity would unpickle the file and run the code in it, so it is given a copy of the tensors instead.

    Args:
        path: the file of weights, in torch-fidelity's format.
        allow_other: whether other weights than the published ones are accepted. Their scores are labelled.

    Raises:
        UserError: there is no such file, it does not hold Inception's weights, or they are not the published ones.
    """
    declared = ARTIFACTS[INCEPTION]
    assert declared.sha256 is not None
    if not Path(path).is_file():
        raise UserError(f"There is no file of Inception weights at {path}.")
    content = read_hashed(path, LARGEST_FILE)
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != declared.sha256 and not allow_other:
        raise UserError(
            f"{path} is not the published {declared.file}: its SHA-256 is {sha256}, not {declared.sha256}. Scores by "
            f"other weights are not FID. With --allow-other-inception they are computed and labelled "
            f"FID-{OTHER_INCEPTION}."
        )
    try:
        tensors = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zipfile and pickle raise many classes for damaged bytes
        raise UserError(f"{path} does not hold the weights of torch-fidelity's Inception: {_reason(error)}") from error
    copy = io.BytesIO()
    torch.save(tensors, copy)
    copy.seek(0)
    try:
        network: Any = FeatureExtractorInceptionV3(
            "inception-v3-compat", [FEATURES, LOGITS], feature_extractor_weights_path=copy
        )
    except (RuntimeError, TypeError, AttributeError) as error:  # the file holds other tensors, or none
        raise UserError(f"{path} does not hold the weights of torch-fidelity's Inception: {_reason(error)}") from error
    return Inception(network.to(best_device()), sha256, sha256 == declared.sha256)


def load_cleanfid_inception(path: Path | str) -> Inception:
    """Load clean-fid's Inception, on the GPU if there is one. It returns features [B, 2048].

    The file is TorchScript, which is a program: it can do whatever torch can, and write files. It is therefore loaded
    only if its hash is the published one, and from the very bytes that were hashed. No option allows another file.

    Raises:
        UserError: there is no such file, or it is not the published one.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no file of Inception weights at {path}.")
    content = read_bytes(path, LARGEST_FILE)
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != CLEANFID_SHA256:
        raise UserError(
            f"{path} is not the published {CLEANFID_FILE}: its SHA-256 is {sha256}, not {CLEANFID_SHA256}. The file is "
            "a program (TorchScript), and another one is never run, whatever the options."
        )
    with tempfile.TemporaryDirectory() as folder:  # clean-fid takes a folder that holds a file of its name
        (Path(folder) / CLEANFID_FILE).write_bytes(content)
        with reading(path, "clean-fid's Inception"):
            network: Any = InceptionV3W(folder, download=False)
    network.to(best_device())

    def extract(images: Tensor) -> tuple[Tensor, ...]:
        # Floats were resized to 299 x 299 by clean-fid; the network resizes uint8 pixels itself, as TensorFlow does.
        network.resize_inside = images.dtype == torch.uint8
        return (network(images.float()),)

    return Inception(extract, sha256, published=True)


def write_random_inception(path: Path | str, seed: int = 0) -> None:
    """Write random weights in torch-fidelity's format: a stand-in for tests and dry runs only."""

    class Unloaded(FeatureExtractorInceptionV3):
        """The network with its initial weights. The constructor always loads a file, so loading does nothing here."""

        def load_state_dict(self, *_: object, **__: object) -> None:  # type: ignore[override]
            pass

    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(seed)
        empty = Path(folder) / "empty.pth"
        torch.save({}, empty)
        network = Unloaded("inception-v3-compat", [FEATURES, LOGITS], str(empty))
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)  # with the initial weights, the features fade to 0
    with replacing(path) as temporary, temporary.open("wb") as file:  # torch refuses the path of a hidden file
        torch.save(network.state_dict(), file)


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
