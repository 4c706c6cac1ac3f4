"""Published files: weights, VAEs, Inception's weights, reference statistics, ImageNet; and where to find each one.

Each file is declared once, in `artifacts.yaml`, with its origin and what was published of it; nothing is declared that
its publisher or several public repositories do not state. A file is looked for

1. where a command's option says (the file, or a folder that holds it),
2. in the folder that $TOKENBRIDGE_ARTIFACTS names, directly or one folder down, so that the official layout
   (`pretrained_models/vae/kl16.ckpt`) is found as it is,
3. in the hub's cache or, for plain addresses, in torch hub's (where torch-fidelity keeps its own download),
4. at its origin: `huggingface_hub` downloads from the hub into the hub's cache, `torch.hub` from an address into
   $TOKENBRIDGE_ARTIFACTS (torch hub's cache if it is not set). Data sets are never downloaded here; HF_HUB_OFFLINE=1
   stops all downloads.

One error names every file that is missing, its origin and its place. Nothing is downloaded while a file that was asked
for has to be put in place by hand. A server that is silent for `TIMEOUT` seconds is given up.

A file's SHA-256 is computed at first use and written to `artifacts.lock.json`: in $TOKENBRIDGE_ARTIFACTS if that
can be written to, else in the working directory. From then on a file of another hash is refused until
`tokenbridge artifacts --accept KEY`. Size and time of the last change spare later runs the hashing of gigabytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import huggingface_hub
import yaml
from huggingface_hub.errors import LocalEntryNotFoundError

from tokenbridge.utils.errors import UserError
from tokenbridge.utils.files import replacing, sha256_of, write_json

FOLDER_VARIABLE = "TOKENBRIDGE_ARTIFACTS"
LOCK_FILE = "artifacts.lock.json"
TIMEOUT = 10.0  # seconds that a server may be silent

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
    file: str  # its path below a folder of files; on the hub, its path ends so
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
        if self.is_dataset:
            return f"https://huggingface.co/datasets/{self.hub}"
        on_hub = f"https://huggingface.co/{self.hub} (…{self.file})" if self.hub else None
        return " or ".join(filter(None, (on_hub, self.url)))


def _read_declarations() -> dict[str, Artifact]:
    groups = yaml.safe_load(Path(__file__).with_name("artifacts.yaml").read_text(encoding="utf-8"))
    declared = [Artifact(**group["all"] | file) for group in groups.values() for file in group["files"]]
    return {artifact.key: artifact for artifact in declared}


ARTIFACTS = _read_declarations()


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
        download: fetch what is not here. Nothing is fetched if something that is missing is never downloaded.

    Raises:
        MissingArtifactsError: files cannot be had; the message lists all of them.
        UserError: an unknown key, a folder that is not there, a file that is not the published or recorded one.
        OSError: the lock file cannot be written.
    """
    chosen, given, folder = [find_artifact(key) for key in keys], given or {}, artifacts_folder(folder)
    found = {a.key: path for a in chosen if (path := _locate(a, folder, given.get(a.key))) is not None}
    absent = [a for a in chosen if a.key not in found]
    reasons = {a.key: reason for a in absent if (reason := _why_not_fetched(a, given.get(a.key), download))}
    for artifact in [] if reasons else absent:
        try:
            found[artifact.key] = _fetch(artifact, folder)
        except UserError as error:
            reasons[artifact.key] = f"Not downloaded: {error}."
    if reasons:
        waiting = "Its download will be tried once the others are there."
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
        UserError: an unknown key, or a folder that is not there.
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
        UserError: an unknown key, a data set, or a file that is not the published one.
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
        UserError: there is none.
    """
    if key not in ARTIFACTS:
        raise UserError(f"There is no file {key!r}; there are {', '.join(ARTIFACTS)}.")
    return ARTIFACTS[key]


def artifacts_folder(folder: PathLike | None = None) -> Path | None:
    """Return `folder`, or the one that $TOKENBRIDGE_ARTIFACTS names; None if there is neither.

    Raises:
        UserError: it is not there: a wrong setting is not passed over.
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


def _why_not_fetched(artifact: Artifact, named: PathLike | None, download: bool) -> str | None:
    """Return why a file that is missing will not be downloaded; None if it can be tried."""
    if named is not None:
        return f"{artifact.option} names {named}, where it is not."
    if artifact.is_dataset:
        command = f"hf download --repo-type dataset {artifact.hub}"
        return f"Data sets are not downloaded here; `{command}` does, after its terms are accepted."
    if not download:
        return "Not downloaded: only files on this machine were asked for."
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return "Not downloaded: HF_HUB_OFFLINE is set."
    return None


def _fetch(artifact: Artifact, folder: Path | None) -> Path:
    """Download a file from its first origin that sends it; it appears whole or not at all.

    Raises:
        UserError: no origin sent it; the message says what each of them answered.
    """
    reasons = []
    for origin, fetch in (
        (huggingface_hub.constants.ENDPOINT if artifact.hub else None, _fetch_from_hub),
        (artifact.url, _fetch_from_address),
    ):
        if origin is None:
            continue
        try:
            return fetch(artifact, folder)
        except Exception as error:  # the hub's client and sockets raise dozens of unrelated types
            line = (str(error) or "no message").splitlines()[0]
            what = line if isinstance(error, UserError) else f"{type(error).__name__}: {line}"
            reasons.append(f"{urlsplit(origin).netloc} did not send it ({what})")
    raise UserError("; ".join(reasons))


def _fetch_from_hub(artifact: Artifact, folder: Path | None) -> Path:
    """Download, into the hub's cache, the one file of the repository whose path ends in `artifact.file`.

    The official README names the folder of each checkpoint, but not where it lies in the repository.
    """
    assert artifact.hub is not None
    siblings = huggingface_hub.HfApi().model_info(artifact.hub, timeout=TIMEOUT).siblings or []
    paths = [s.rfilename for s in siblings if f"/{s.rfilename}".endswith(f"/{artifact.file}")]
    if len(paths) != 1:
        raise UserError(f"{artifact.hub} has {len(paths)} files …{artifact.file}")
    return Path(huggingface_hub.hf_hub_download(artifact.hub, paths[0], etag_timeout=TIMEOUT))


def _fetch_from_address(artifact: Artifact, folder: Path | None) -> Path:
    """Download a file from its address into `folder`, or into torch hub's cache."""
    import torch

    target = folder / artifact.file if folder is not None else _address_cache(artifact)
    assert artifact.url is not None
    assert target is not None
    with replacing(target) as temporary, _socket_timeout(TIMEOUT):
        torch.hub.download_url_to_file(artifact.url, str(temporary), hash_prefix=artifact.sha256)
        # torch.hub does not compare the length with the one that the server announced.
        with temporary.open("rb") as file:
            start = file.read(2)
        if start[:1] == b"<":
            raise UserError("the answer is a web page, not the file")
        if start == b"PK" and not zipfile.is_zipfile(temporary):
            raise UserError("the file was cut off")
    return target


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """Let no socket wait longer: torch.hub gives no timeout of its own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


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
    if artifact.git_sha1 is not None and (found := git_sha1_of(path)) != artifact.git_sha1:
        raise UserError(
            f"{path} is not the published {artifact.key}: git names its contents {found}, not {artifact.git_sha1}."
        )
    return sha256


def git_sha1_of(path: Path) -> str:
    """Return git's name of a file's contents (`git hash-object`)."""
    with path.open("rb") as file:
        header = f"blob {path.stat().st_size}\0".encode()
        return hashlib.file_digest(file, lambda: hashlib.sha1(header, usedforsecurity=False)).hexdigest()


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
