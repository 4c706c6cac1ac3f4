"""Published files: weights, VAE, Inception's weights, reference statistics, ImageNet; and how they are had.

Each file is declared once, with its origin and what was published of it; nothing is known here that its publisher or
several public repositories do not state. A file is looked for

1. where a command's option says (the file, or a folder that holds it),
2. in the folder that $TOKENBRIDGE_ARTIFACTS names, directly or one folder down, so that the official layout
   (`pretrained_models/vae/kl16.ckpt`) is found as it is,
3. in the hub's cache or, for plain addresses, in torch hub's (where torch-fidelity keeps its own download),
4. at its origin: from the hub into the hub's cache, from an address into $TOKENBRIDGE_ARTIFACTS (torch hub's cache
   if it is not set). Data sets are never downloaded here; HF_HUB_OFFLINE=1 stops all downloads.

What cannot be had makes one error that names every missing file, its origin and its place. That takes seconds:
every origin is asked before anything is downloaded.

A file's SHA-256 is computed at first use and written to `artifacts.lock.json`: in $TOKENBRIDGE_ARTIFACTS if that
can be written to, else in the working directory. From then on a file of another hash is refused until
`tokenbridge artifacts --accept KEY`. Size and time of the last change spare later runs the hashing of gigabytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import huggingface_hub
import rich.progress
from huggingface_hub.errors import LocalEntryNotFoundError
from rich.console import Console

from tokenbridge.utils.errors import UserError
from tokenbridge.utils.files import replacing, sha256_of, write_json

FOLDER_VARIABLE = "TOKENBRIDGE_ARTIFACTS"
LOCK_FILE = "artifacts.lock.json"
TIMEOUT = 5.0  # seconds that an origin may take to answer

INCEPTION = "inception"
KL16_VAE = "kl16"
STATISTICS = "adm-statistics"
REFERENCE_BATCH = "adm-reference"
IMAGENET = "imagenet"

PathLike = Path | str


@dataclass(frozen=True)
class Artifact:
    """A published file (or data set), and what its publisher says of it. None: not published."""

    key: str
    what: str
    file: str  # its place in a folder; on the hub, the path ends so
    format: str
    licence: str
    option: str  # of the commands that use it
    hub: str | None = None  # repository on the Hugging Face hub
    url: str | None = None  # plain address; asked after the hub
    size: int | None = None  # bytes
    sha256: str | None = None
    git_sha1: str | None = None  # name of its contents in the publisher's git repository
    is_dataset: bool = False

    @property
    def origin(self) -> str:
        """Where it comes from, for people."""
        kind = "datasets/" if self.is_dataset else ""
        on_hub = (
            [f"https://huggingface.co/{kind}{self.hub}" + ("" if self.is_dataset else f" (…{self.file})")]
            if self.hub
            else []
        )
        return " or ".join(on_hub + ([self.url] if self.url else []))


_TOKENBRIDGE = "Epiphqny/TokenBridge"  # README.md of YuqingWang1029/TokenBridge at 3ede281; model card: MIT
_LLAMAGEN = "FoundationVision/LlamaGen"  # README.md of FoundationVision/LlamaGen at ce98ec4
_GIVT = "https://storage.googleapis.com/big_vision/givt/"  # proj/givt/README.md of google-research/big_vision, 0127fb6
_TORCH = "torch checkpoint (pickled tensors)"
_FLAX = "NumPy archive of a Flax parameter tree"


def _tokenbridge(name: str, official: str) -> Artifact:
    file = f"{official}/checkpoint-last.pth"
    what = f"TokenBridge-{name}: model, model_ema and training state"
    return Artifact(f"tokenbridge-{name.lower()}", what, file, _TORCH, "MIT", "--weights", hub=_TOKENBRIDGE)


def _mar(name: str, official: str, address: str) -> Artifact:
    """MAR's files lie on Dropbox (README.md of LTH14/mar at fe470ac); dl=1 asks for the file, not for a page."""
    return Artifact(
        f"mar-{name.lower()}",
        f"MAR-{name}: model, model_ema and training state",
        f"{official}/checkpoint-last.pth",
        _TORCH,
        "MIT (code repository)",
        "--weights",
        url=f"https://www.dropbox.com/scl/fi/{address}&dl=1",
    )


def _llamagen(key: str, what: str, file: str) -> Artifact:
    return Artifact(f"llamagen-{key}", what, file, _TORCH, "MIT (code repository)", "--weights", hub=_LLAMAGEN)


def _givt(key: str, what: str, file: str) -> Artifact:
    licence = "Apache-2.0 (code repository)"
    return Artifact(f"givt-{key}", what, file, _FLAX, licence, "--weights", url=_GIVT + file)


ARTIFACTS: dict[str, Artifact] = {
    artifact.key: artifact
    for artifact in (
        _tokenbridge("L", "tokenbridge_large"),
        _tokenbridge("H", "tokenbridge_huge"),
        Artifact(
            KL16_VAE,
            "the VAE of TokenBridge and MAR (KL-16)",
            "kl16.ckpt",
            _TORCH,
            "MIT",
            "--vae",
            hub=_TOKENBRIDGE,
            # util/download.py of both repositories, with dl=1
            url="https://www.dropbox.com/scl/fi/hhmuvaiacrarfg28qxhwz/kl16.ckpt?rlkey=l44xipsezc8atcffdp4q7mwmh&dl=1",
        ),
        Artifact(
            INCEPTION,
            "torch-fidelity's Inception-v3, converted from TensorFlow's of 2015",
            "weights-inception-2015-12-05-6726825d.pth",
            _TORCH,
            "Apache-2.0",
            "--inception-weights",
            url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
            "weights-inception-2015-12-05-6726825d.pth",
            # Size and hash as public repositories quote them; the hash's first digits are in the file's name.
            size=95_628_359,
            sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        ),
        Artifact(
            STATISTICS,
            "mean and covariance of Inception's features of ImageNet's training set at 256 pixels (from ADM)",
            "adm_in256_stats.npz",
            "NumPy archive: mu [2048], sigma [2048, 2048]",
            "MIT (code repository)",
            "--reference",
            url="https://raw.githubusercontent.com/YuqingWang1029/TokenBridge/"
            "3ede2818251c7b47427c470e07da9409afd66f71/fid_stats/adm_in256_stats.npz",
            # The same file in LTH14/mar at fe470ac.
            git_sha1="1da4c17607fe959d54999fd098105649a0c05e15",
        ),
        Artifact(
            REFERENCE_BATCH,
            "ADM's reference batch: the statistics, and 10,000 images for precision and recall",
            "VIRTUAL_imagenet256_labeled.npz",
            "NumPy archive: arr_0 [10000, 256, 256, 3], mu, sigma and others",
            "ImageNet's terms of access (non-commercial research)",
            "--reference",
            # evaluations/README.md of openai/guided-diffusion
            url="https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/"
            "VIRTUAL_imagenet256_labeled.npz",
        ),
        Artifact(
            IMAGENET,
            "ImageNet-1k (ILSVRC 2012): a folder with train/ and one folder a class in it, or the hub's Parquet files",
            "imagenet",
            "folder of images",
            "ImageNet's terms of access (non-commercial research); gated on the hub",
            "--imagenet",
            hub="ILSVRC/imagenet-1k",
            is_dataset=True,
        ),
        _mar("B", "mar_base", "f6dpuyjb7fudzxcyhvrhk/checkpoint-last.pth?rlkey=a6i4bo71vhfo4anp33n9ukujb"),
        _mar("L", "mar_large", "pxacc5b2mrt3ifw4cah6k/checkpoint-last.pth?rlkey=m48ovo6g7ivcbosrbdaz0ehqt"),
        _mar("H", "mar_huge", "1qmfx6fpy3k7j9vcjjs3s/checkpoint-last.pth?rlkey=4lae281yzxb406atp32vzc83o"),
        _llamagen("vq16", "LlamaGen's VQ tokenizer, down-sampling 16", "vq_ds16_c2i.pt"),
        _llamagen("vq8", "LlamaGen's VQ tokenizer, down-sampling 8", "vq_ds8_c2i.pt"),
        *(
            _llamagen(f"{size.lower()}-{pixels}", f"LlamaGen-{size} at {pixels} pixels", f"c2i_{size}_{pixels}.pt")
            for size, pixels in (
                ("B", 256),
                ("B", 384),
                ("L", 256),
                ("L", 384),
                ("XL", 384),
                ("XXL", 384),
                ("3B", 384),
            )
        ),
        _givt("vae", "GIVT's VAE, β = 5e-5", "vae_imagenet_2012_beta_5e-5_params"),
        _givt("causal-256", "GIVT-Causal at 256 pixels", "givt_imagenet_2012_causal_params.npz"),
        _givt("maskgit-256", "GIVT-MaskGIT at 256 pixels", "givt_imagenet_2012_maskgit_params.npz"),
    )
}


@dataclass(frozen=True)
class Missing:
    """A file that was not found, and why it was not fetched."""

    artifact: Artifact
    place: str  # where to put it
    reason: str

    def __str__(self) -> str:
        a = self.artifact
        return (
            f"{a.key}: {a.what}. From {a.origin}; licence: {a.licence}. {self.reason} "
            f"Put it at {self.place}, or name it with {a.option}."
        )


class MissingArtifactsError(UserError):
    """Files that cannot be had; one message lists them all.

    Attributes:
        missing: the files.
    """

    def __init__(self, missing: list[Missing]) -> None:
        self.missing = missing
        count = "1 file is" if len(missing) == 1 else f"{len(missing)} files are"
        super().__init__("\n".join([f"{count} missing.", *(f"- {m}" for m in missing)]))


@dataclass(frozen=True)
class Status:
    """What is known of a file here, without reading it."""

    artifact: Artifact
    # present: found, not hashed yet. verified: hashed, and as published or as at first use. changed: another size
    # than at first use.
    state: Literal["missing", "present", "verified", "changed"]
    path: Path | None
    size: int | None  # bytes; None for a folder
    sha256: str | None  # recorded at first use

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, with those of the declaration that tell what should be there."""
        a = self.artifact
        return {
            "key": a.key,
            "state": self.state,
            "path": None if self.path is None else str(self.path),
            "size": self.size,
            "sha256": self.sha256,
            "published_sha256": a.sha256,
            "what": a.what,
            "file": a.file,
            "format": a.format,
            "licence": a.licence,
            "origin": a.origin,
        }


def resolve(
    keys: Iterable[str],
    *,
    folder: PathLike | None = None,
    given: Mapping[str, PathLike | None] | None = None,
    download: bool = True,
) -> dict[str, Path]:
    """Return the path of each file, found or downloaded, checked against its published and its recorded hash.

    Args:
        keys: of `ARTIFACTS`.
        folder: holds the files; None takes $TOKENBRIDGE_ARTIFACTS.
        given: files named by the user, or folders that hold them, by key; None looks in the usual places.
        download: fetch what is not here. Nothing is fetched unless everything that is missing answers.

    Raises:
        MissingArtifactsError: files cannot be had; the message lists all of them.
        ValueError: an unknown key, a folder that is not there, a file that is not the published or recorded one.
        OSError: the lock file cannot be written.
    """
    chosen, given, folder = [find_artifact(key) for key in keys], given or {}, artifacts_folder(folder)
    found = {a.key: path for a in chosen if (path := _locate(a, folder, given.get(a.key))) is not None}
    absent = [a for a in chosen if a.key not in found]
    reasons: dict[str, str] = {}
    fetches: dict[str, Callable[[], Path]] = {}
    deaf: dict[str, str] = {}  # hosts that did not answer, and how; asked once
    for artifact in absent:
        if (named := given.get(artifact.key)) is not None:
            reasons[artifact.key] = f"{artifact.option} names {named}, where it is not."
            continue
        try:
            fetches[artifact.key] = _ask_origin(artifact, folder, download, deaf)
        except _NotFetchedError as error:
            reasons[artifact.key] = str(error)
    if not reasons:
        for key, fetch in fetches.items():
            try:
                found[key] = fetch()
            except Exception as error:  # the hub client and sockets raise dozens of unrelated types
                reasons[key] = f"The download failed ({type(error).__name__}: {_first_line(error)})."
    if reasons:
        waiting = "It can be downloaded, once the others are there."
        missing = [a for a in absent if a.key not in found]
        raise MissingArtifactsError([Missing(a, _place(a, folder), reasons.get(a.key, waiting)) for a in missing])
    for artifact in chosen:
        if not artifact.is_dataset:
            _check(artifact, found[artifact.key], lock_file(folder))
    return {a.key: found[a.key] for a in chosen}


def status(
    keys: Iterable[str] | None = None,
    *,
    folder: PathLike | None = None,
    given: Mapping[str, PathLike | None] | None = None,
) -> list[Status]:
    """Return what is known of files here, all of them by default; nothing is downloaded or hashed.

    Raises:
        ValueError: an unknown key, or a folder that is not there.
    """
    folder, given = artifacts_folder(folder), given or {}
    lock = _read_lock(lock_file(folder))
    listed = []
    for artifact in [find_artifact(key) for key in (ARTIFACTS if keys is None else keys)]:
        path = _locate(artifact, folder, given.get(artifact.key))
        entry = lock.get(artifact.key)
        sha256 = entry["sha256"] if entry else None
        size = path.stat().st_size if path is not None and path.is_file() else None
        state: Literal["missing", "present", "verified", "changed"] = "present"
        if path is None:
            state = "missing"
        elif entry is not None:
            state = "verified" if _is_recorded(path, entry) else "changed" if entry["size"] != size else "present"
        listed.append(Status(artifact, state, path, size, sha256))
    return listed


def accept(key: str, *, folder: PathLike | None = None, given: Mapping[str, PathLike | None] | None = None) -> Path:
    """Record the hash of the file that is here now in place of the recorded one; return its path.

    Raises:
        MissingArtifactsError: there is none.
        ValueError: an unknown key, a data set, or a file that is not the published one.
    """
    artifact, root = find_artifact(key), artifacts_folder(folder)
    if artifact.is_dataset:
        raise UserError(f"{key} is a data set; it has no recorded hash.")
    path = _locate(artifact, root, (given or {}).get(key))
    if path is None:
        reason = "There is nothing to accept."
        raise MissingArtifactsError([Missing(artifact, _place(artifact, root), reason)])
    sha256 = _published_hash(artifact, path)
    lock = lock_file(root)
    write_json(lock, {**_read_lock(lock), key: {**_identity(path), "sha256": sha256}})
    return path


def fingerprint(path: PathLike, *, folder: PathLike | None = None) -> str:
    """Return the SHA-256 of a file, from the lock file if it knows this very file (path, size, time of change)."""
    entries = _read_lock(lock_file(artifacts_folder(folder))).values()
    recorded = (entry["sha256"] for entry in entries if _is_recorded(Path(path), entry))
    return next(recorded, None) or sha256_of(path)


def find_artifact(key: str) -> Artifact:
    """Return the declaration of `key`.

    Raises:
        ValueError: there is none.
    """
    if key not in ARTIFACTS:
        raise UserError(f"There is no file {key!r}; there are {', '.join(ARTIFACTS)}.")
    return ARTIFACTS[key]


def artifacts_folder(folder: PathLike | None = None) -> Path | None:
    """Return `folder`, or the one that $TOKENBRIDGE_ARTIFACTS names; None if there is neither.

    Raises:
        ValueError: it is not there: a wrong setting is not passed over.
    """
    named = folder or os.environ.get(FOLDER_VARIABLE)
    if named is None or named == "":
        return None
    if not Path(named).is_dir():
        source = "The folder of the published files" if folder else f"${FOLDER_VARIABLE}"
        raise UserError(f"{source} is {named}, which is no folder.")
    return Path(named)


def lock_file(folder: Path | None) -> Path:
    """Return the lock file: in `folder` if there is one and it can be written to, else in the working directory."""
    writable = folder is not None and os.access(folder, os.W_OK)
    return (folder if folder is not None and writable else Path.cwd()) / LOCK_FILE


def _locate(artifact: Artifact, folder: Path | None, named: PathLike | None) -> Path | None:
    """Return where the file is on this machine. One that is named by the user is there or nowhere."""
    if named is not None:
        path = Path(named)
        if artifact.is_dataset or path.is_file():
            return path if path.exists() else None
        return _in_folder(artifact, path) or _existing(path / Path(artifact.file).name)
    in_folder = _in_folder(artifact, folder) if folder is not None else None
    return in_folder or (_in_hub_cache(artifact) if artifact.hub else None) or _existing(_address_cache(artifact))


def _in_folder(artifact: Artifact, folder: Path) -> Path | None:
    return next((p for p in (folder / artifact.file, *sorted(folder.glob(f"*/{artifact.file}"))) if p.exists()), None)


def _in_hub_cache(artifact: Artifact) -> Path | None:
    """Return the cached file of the main branch whose path ends in `artifact.file`, or the data set's folder."""
    assert artifact.hub is not None
    kind = "dataset" if artifact.is_dataset else "model"
    pattern = "data/train*" if artifact.is_dataset else f"*{artifact.file}"
    try:
        snapshot = Path(
            huggingface_hub.snapshot_download(
                artifact.hub, repo_type=kind, allow_patterns=pattern, local_files_only=True
            )
        )
    except LocalEntryNotFoundError:
        return None
    if artifact.is_dataset:
        return snapshot if any(snapshot.glob(f"{pattern}.parquet")) else None
    return next(iter(sorted(snapshot.rglob(artifact.file))), None)


def _address_cache(artifact: Artifact) -> Path | None:
    """Return where torch hub keeps a file from an address."""
    if artifact.url is None:
        return None
    import torch

    return Path(torch.hub.get_dir()) / "checkpoints" / artifact.file


def _existing(path: Path | None) -> Path | None:
    return path if path is not None and path.exists() else None


def _place(artifact: Artifact, folder: Path | None) -> str:
    if folder is None:
        return f"${FOLDER_VARIABLE}/{artifact.file} (the variable, which names a folder, is not set)"
    return str(folder / artifact.file)


class _NotFetchedError(Exception):
    """Why a file is not downloaded; the text goes into the list of missing files."""


def _ask_origin(artifact: Artifact, folder: Path | None, download: bool, deaf: dict[str, str]) -> Callable[[], Path]:
    """Ask the file's origins whether they have it; return what downloads it."""
    if artifact.is_dataset:
        command = f"hf download --repo-type dataset {artifact.hub}"
        raise _NotFetchedError(f"Data sets are not downloaded here; `{command}` does, after its terms are accepted.")
    if not download:
        raise _NotFetchedError("Not downloaded: only files on this machine were asked for.")
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise _NotFetchedError("Not downloaded: HF_HUB_OFFLINE is set.")
    reasons = []
    for address, ask in (
        (huggingface_hub.constants.ENDPOINT if artifact.hub else None, _ask_hub),
        (artifact.url, _ask_address),
    ):
        if address is None:
            continue
        host = urlsplit(address).netloc
        if host not in deaf:
            try:
                return ask(artifact, folder)
            except _NotFetchedError as error:
                reasons.append(str(error))
                continue
            except Exception as error:  # see `resolve`
                deaf[host] = f"{host} did not answer ({type(error).__name__}: {_first_line(error)})"
        reasons.append(deaf[host])
    raise _NotFetchedError(f"Not downloaded: {'; '.join(reasons)}.")


def _ask_hub(artifact: Artifact, folder: Path | None) -> Callable[[], Path]:
    """Find the one file of the repository whose path ends in `artifact.file`.

    The official README names the folder of each checkpoint, but not where it lies in the repository.
    """
    assert artifact.hub is not None
    siblings = huggingface_hub.HfApi().model_info(artifact.hub, timeout=TIMEOUT).siblings or []
    paths = [s.rfilename for s in siblings if f"/{s.rfilename}".endswith(f"/{artifact.file}")]
    if len(paths) != 1:
        raise _NotFetchedError(f"{artifact.hub} has {len(paths)} files …{artifact.file}")
    fetch = partial(huggingface_hub.hf_hub_download, artifact.hub, paths[0], etag_timeout=TIMEOUT)
    return lambda: Path(fetch())


def _ask_address(artifact: Artifact, folder: Path | None) -> Callable[[], Path]:
    assert artifact.url is not None
    with _open(artifact.url, method="HEAD"):
        pass
    target = folder / artifact.file if folder is not None else _address_cache(artifact)
    assert target is not None
    return partial(_download, artifact.url, target)


def _download(url: str, target: Path) -> Path:
    """Download a file; it appears whole or not at all."""
    with _open(url) as response, replacing(target) as temporary:
        if response.headers.get_content_type() == "text/html":
            raise UserError("the answer is a web page, not the file")
        total = int(response.headers.get("Content-Length") or 0)
        console = Console(stderr=True)
        with (
            rich.progress.wrap_file(response, total, description=target.name, console=console) as source,
            temporary.open("wb") as file,
        ):
            shutil.copyfileobj(source, file, 2**20)
        if total and temporary.stat().st_size != total:
            raise UserError(f"{temporary.stat().st_size:,} of {total:,} bytes came")
    return target


def _open(url: str, method: str = "GET") -> Any:
    # Some hosts turn Python's own user agent away. The addresses are those declared above.
    request = urllib.request.Request(url, method=method, headers={"User-Agent": "tokenbridge"})  # noqa: S310
    return urllib.request.urlopen(request, timeout=TIMEOUT)  # noqa: S310


def _check(artifact: Artifact, path: Path, lock_path: Path) -> None:
    """Compare a file with what was published and recorded of it; record it if it is used for the first time."""
    lock = _read_lock(lock_path)
    entry = lock.get(artifact.key)
    if entry is not None and _is_recorded(path, entry):
        return
    sha256 = _published_hash(artifact, path)
    if entry is not None and entry["sha256"] != sha256:
        raise UserError(
            f"{path} is not the {artifact.key} that was used before: its SHA-256 is {sha256}, and {lock_path} has "
            f"{entry['sha256']} (of {entry['path']}). If the new file is right, run `tokenbridge artifacts --accept "
            f"{artifact.key}`, or delete the entry."
        )
    write_json(lock_path, {**lock, artifact.key: {**_identity(path), "sha256": sha256}})


def _published_hash(artifact: Artifact, path: Path) -> str:
    """Return the SHA-256 of a file that is, as far as can be told, the published one."""
    size = path.stat().st_size
    if artifact.size is not None and size != artifact.size:
        raise UserError(f"{path} is not the published {artifact.key}: it has {size:,} bytes, not {artifact.size:,}.")
    sha256 = sha256_of(path)
    if artifact.sha256 is not None and sha256 != artifact.sha256:
        raise UserError(f"{path} is not the published {artifact.key}: its SHA-256 is {sha256}, not {artifact.sha256}.")
    if artifact.git_sha1 is not None and (found := _git_sha1(path)) != artifact.git_sha1:
        raise UserError(
            f"{path} is not the published {artifact.key}: git names its contents {found}, not {artifact.git_sha1}."
        )
    return sha256


def _git_sha1(path: Path) -> str:
    """Return git's name of a file's contents (`git hash-object`)."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _identity(path: Path) -> dict[str, Any]:
    stat = path.stat()
    return {"path": str(path.absolute()), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _is_recorded(path: Path, entry: Mapping[str, Any]) -> bool:
    """Whether the entry is of this very file, unchanged since."""
    return {**_identity(path), "sha256": entry["sha256"]} == entry


def _read_lock(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        lock = json.loads(path.read_text(encoding="utf-8"))
        fields = {"path", "size", "mtime_ns", "sha256"}
        if not isinstance(lock, dict) or any(entry.keys() != fields for entry in lock.values()):
            raise UserError("its entries have path, size, mtime_ns and sha256")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); correct it, or delete it and let it be written anew.") from error
    return lock


def _first_line(error: Exception) -> str:
    return (str(error) or "no message").splitlines()[0]
