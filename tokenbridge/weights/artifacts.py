"""Published files (weights of generators, VAEs and Inception, reference statistics, ImageNet), and where to find them.

Each file is declared once, in `artifacts.yaml`, with its origin and the size and hash that were published. A fact is
declared only if the publisher or several public repositories state it. A file is looked for in this order:

1. where a command's option says, which names the file or a folder that holds it;
2. in the folder that $TOKENBRIDGE_ARTIFACTS names, directly or one folder down, so that the official layout
   (`pretrained_models/vae/kl16.ckpt`) is found unchanged;
3. in the hub's cache or, for plain addresses, in the cache of torch hub, where torch-fidelity keeps its own download;
4. at its origin. `huggingface_hub` downloads into the hub's cache. From a plain address a file goes into
   $TOKENBRIDGE_ARTIFACTS, or into the cache of torch hub if the variable is not set. Data sets are never downloaded.
   `--offline`, or HF_HUB_OFFLINE=1, stops all downloads.

All origins are asked before the first download, so that hours of downloads do not end with a 404: nothing is
downloaded while any requested file has to be put in place by hand. One error names every missing file, its origin and
its place. A server is given up when it is silent for `TIMEOUT` seconds, and is not asked for other files then.

A download is taken only if it is as long as the server announced, is what its publisher states (size, hash), and can be
read to its end if it is a ZIP archive, which checkpoints of torch and NumPy archives are.

The SHA-256 of a file is computed at its first use and written to `artifacts.lock.json`, which lies in
$TOKENBRIDGE_ARTIFACTS if that folder can be written to, else in the working directory. From then on a file with
another hash is refused until `tokenbridge artifacts --accept KEY`. The lock file also holds the size and the time of
the last change, so that later runs need not hash gigabytes again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import huggingface_hub
import yaml
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from tokenbridge.utils.console import progress
from tokenbridge.utils.errors import FullDiskError, StorageError, UserError, reading
from tokenbridge.utils.files import read_bytes, replacing, sha256_of, write_json
from tokenbridge.utils.locks import in_turn

FOLDER_VARIABLE = "TOKENBRIDGE_ARTIFACTS"
LOCK_FILE = "artifacts.lock.json"
TEXT, ZIP = (b"<", b"{"), b"PK"  # what files begin with: a web page or a message in JSON; an archive
TIMEOUT = 10.0  # seconds that a server may be silent

INCEPTION = "inception"
KL16_VAE = "kl16"
STATISTICS = "adm-statistics"
REFERENCE_BATCH = "adm-reference"
IMAGENET = "imagenet"

PathLike = Path | str


@dataclass(frozen=True)
class Artifact:
    """A published file or data set, and what its publisher says about it. None stands for what was not published."""

    key: str
    what: str
    file: str  # its path below a folder of files; the path on the hub ends in it
    format: str
    licence: str
    option: str  # the option by which commands take it
    hub: str | None = None  # repository on the Hugging Face hub
    url: str | None = None  # plain address, tried after the hub
    size: int | None = None  # bytes
    sha256: str | None = None
    git_sha1: str | None = None  # hash of its contents (blob) in the publisher's git repository
    is_dataset: bool = False

    @property
    def has_published_hash(self) -> bool:
        """Whether anything but the record of the first use says what the file's contents are."""
        return self.sha256 is not None or self.git_sha1 is not None

    @property
    def origin(self) -> str:
        """The addresses it comes from, for messages and tables."""
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
class Download:
    """A file that an origin has: `run` downloads it, and returns its path."""

    host: str
    run: Callable[[], Path]


@dataclass(frozen=True)
class Missing:
    """A file that was not found, and why it was not downloaded."""

    artifact: Artifact
    place: str  # the path at which it would be found
    reason: str
    has_option: bool = False  # whether the command takes the file by an option

    def __str__(self) -> str:
        a, named = self.artifact, f", or name it with {self.artifact.option}" if self.has_option else ""
        return f"{a.key}: {a.what}. From {a.origin}; licence: {a.licence}. {self.reason} Put it at {self.place}{named}."


class MissingArtifactsError(UserError):
    """Published files are missing; one message lists all of them."""

    def __init__(self, missing: list[Missing]) -> None:
        self.missing = missing
        count = "1 file is" if len(missing) == 1 else f"{len(missing)} files are"
        super().__init__("\n".join([f"{count} missing.", *(f"- {m}" for m in missing)]))


State = Literal["missing", "present", "matches the published hash", "recorded here, no hash was published", "changed"]
"""`present`: the file was found but is not hashed yet. `changed`: it is not the file of the first use, or the hash that
was recorded is not the published one. Where no hash was published, nothing proves whose file was recorded."""


@dataclass(frozen=True)
class Status:
    """What is known about a file on this machine without reading it."""

    artifact: Artifact
    state: State
    path: Path | None
    size: int | None  # bytes; None for a folder
    sha256: str | None  # recorded at first use

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, together with those of the declaration."""
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
    """Find or download files, check them against their published and recorded hashes, and return their paths by key.

    Args:
        keys: keys of `ARTIFACTS`.
        folder: the folder of the files; None takes $TOKENBRIDGE_ARTIFACTS.
        given: by key, the files that the user named by options, or folders that hold them. Where the value is None,
            the usual places are searched; a key that is absent has no option.
        download: whether to download missing files. Nothing is downloaded if one of them cannot be.

    Raises:
        MissingArtifactsError: files are missing; the message lists all of them.
        UserError: a key is unknown, the folder does not exist, or a file is not the published or recorded one.
        OSError: the lock file cannot be written.
    """
    chosen, given, folder = [find_artifact(key) for key in keys], given or {}, artifacts_folder(folder)
    found = {a.key: path for a in chosen if (path := _locate(a, folder, given.get(a.key))) is not None}
    absent = [a for a in chosen if a.key not in found]
    reasons = {a.key: reason for a in absent if (reason := _why_not_fetched(a, given.get(a.key), download))}
    if not reasons:
        downloads, reasons = _find_downloads(absent, folder)
    for artifact in [] if reasons else absent:
        try:
            found[artifact.key] = _first_that_works(downloads[artifact.key])
        except UserError as error:
            reasons[artifact.key] = f"Not downloaded: {str(error).rstrip('.')}."
    if reasons:
        waiting = "Its download will be tried once the other files are in place."
        missing = [a for a in absent if a.key not in found]
        raise MissingArtifactsError(
            [Missing(a, _place(a, folder), reasons.get(a.key, waiting), a.key in given) for a in missing]
        )
    for artifact in chosen:
        if not found[artifact.key].is_dir():
            _check(artifact, found[artifact.key], lock_file(folder))
    return {a.key: found[a.key] for a in chosen}


def status(
    keys: Iterable[str] | None = None,
    *,
    folder: PathLike | None = None,
    given: Mapping[str, PathLike | None] | None = None,
) -> list[Status]:
    """Return the status of files, by default of all; nothing is downloaded or hashed.

    Raises:
        UserError: a key is unknown, or the folder does not exist.
    """
    folder, given = artifacts_folder(folder), given or {}
    lock = _read_lock(lock_file(folder))
    listed = []
    for artifact in [find_artifact(key) for key in (ARTIFACTS if keys is None else keys)]:
        path = _locate(artifact, folder, given.get(artifact.key))
        entry = lock.get(artifact.key)
        sha256 = entry["sha256"] if entry else None
        size = path.stat().st_size if path is not None and path.is_file() else None
        state: State = "present"
        if path is None:
            state = "missing"
        elif entry is not None:
            if entry["size"] != size or sha256 != (artifact.sha256 or sha256):
                state = "changed"
            elif _is_recorded(path, entry):
                published = artifact.has_published_hash
                state = "matches the published hash" if published else "recorded here, no hash was published"
        listed.append(Status(artifact, state, path, size, sha256))
    return listed


def how_to_fetch(keys: Iterable[str], folder: PathLike | None = None) -> list[str]:
    """Return the commands that fetch missing files: one for all files, one for each data set."""
    chosen = [find_artifact(key) for key in keys]
    files = [artifact.key for artifact in chosen if not artifact.is_dataset]
    place = "" if folder is None else f" --folder {folder}"
    commands = [f"tokenbridge artifacts {' '.join(files)} --download{place}"] if files else []
    return [*commands, *(_hub_command(artifact) for artifact in chosen if artifact.is_dataset)]


def _hub_command(artifact: Artifact) -> str:
    return f"hf download --repo-type dataset {artifact.hub}"


def accept(key: str, *, folder: PathLike | None = None, given: Mapping[str, PathLike | None] | None = None) -> Path:
    """Replace the recorded hash of a file by that of the file found now, and return its path.

    Raises:
        MissingArtifactsError: the file is missing.
        UserError: the key is unknown or that of a data set, or the file is not the published one.
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
    with in_turn(lock.parent):  # so that no entry of another process is lost
        write_json(lock, {**_read_lock(lock), key: {**_identity(path), "sha256": sha256}})
    return path


def fingerprint(path: PathLike, *, folder: PathLike | None = None) -> str:
    """Return the SHA-256 of a file, from the lock file if the file is the same and no hash was published."""
    entries = _read_lock(lock_file(artifacts_folder(folder))).items()
    unpublished = (entry for key, entry in entries if key in ARTIFACTS and not ARTIFACTS[key].has_published_hash)
    recorded = (entry["sha256"] for entry in unpublished if _is_recorded(Path(path), entry))
    return next(recorded, None) or sha256_of(path)


def find_artifact(key: str) -> Artifact:
    """Return the declaration of `key`.

    Raises:
        UserError: no file has this key.
    """
    if key not in ARTIFACTS:
        raise UserError(f"There is no file {key!r}; there are {', '.join(ARTIFACTS)}.")
    return ARTIFACTS[key]


def artifacts_folder(folder: PathLike | None = None) -> Path | None:
    """Return `folder`, or the folder that $TOKENBRIDGE_ARTIFACTS names; None if neither is set.

    Raises:
        UserError: the folder does not exist, since a wrong setting must not be ignored.
    """
    named = folder or os.environ.get(FOLDER_VARIABLE)
    if named is None or named == "":
        return None
    if not Path(named).is_dir():
        source = "The folder of the published files" if folder else f"${FOLDER_VARIABLE}"
        raise UserError(f"{source} is {named}, which is not a folder.")
    return Path(named)


def lock_file(folder: Path | None) -> Path:
    """Return the path of the lock file: in `folder` if it can be written to, else in the working directory."""
    writable = folder is not None and os.access(folder, os.W_OK)
    return (folder if folder is not None and writable else Path.cwd()) / LOCK_FILE


def _locate(artifact: Artifact, folder: Path | None, named: PathLike | None) -> Path | None:
    """Return where the file lies on this machine. A file that the user named is looked for at that place only."""
    if named is not None:
        path = Path(named)
        if artifact.is_dataset or path.is_file() or _is_converted(path):
            return path if path.exists() else None
        return _in_folder(artifact, path) or _existing(path / Path(artifact.file).name)
    in_folder = _in_folder(artifact, folder) if folder is not None else None
    return in_folder or (_in_hub_cache(artifact) if artifact.hub else None) or _existing(_address_cache(artifact))


def _is_converted(path: Path) -> bool:
    """Whether a folder holds a model or a pipeline of diffusers (`tokenbridge convert`), which is read as it is."""
    return any((path / name).is_file() for name in ("config.json", "model_index.json"))


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
    """Return the path at which torch hub caches a file from a plain address."""
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
    """Return why a missing file will not be downloaded; None if a download can be tried."""
    if named is not None:
        return f"{artifact.option} names {named}, and the file is not there."
    if artifact.is_dataset:
        return f"Data sets are not downloaded here; `{_hub_command(artifact)}` does, after its terms are accepted."
    if not download:
        return f"Not downloaded here; `tokenbridge artifacts {artifact.key} --download` does."
    if constants.HF_HUB_OFFLINE:
        return "Not downloaded: --offline, or HF_HUB_OFFLINE=1, was asked for."
    return None


def _find_downloads(
    absent: Iterable[Artifact], folder: Path | None
) -> tuple[dict[str, list[Download]], dict[str, str]]:
    """Ask the origins for files, before any of them is downloaded.

    Returns:
        By key the downloads from the origins that have the file, and by key why no origin has it.
    """
    downloads: dict[str, list[Download]] = {}
    reasons: dict[str, str] = {}
    silent: dict[str, str] = {}  # by host, what happened; it would cost `TIMEOUT` seconds to ask for each file again
    for artifact in absent:
        found, refused = [], []
        for origin, ask in ((constants.ENDPOINT if artifact.hub else None, _ask_hub), (artifact.url, _ask_address)):
            if origin is None:
                continue
            host = urlsplit(origin).netloc
            try:
                if host in silent:
                    raise UserError(silent[host])
                found.append(Download(host, ask(artifact, folder)))
            except StorageError:
                raise
            except Exception as error:  # the hub's client and sockets raise dozens of unrelated types
                why = _in_a_line(error)
                refused.append(f"{host} did not send it ({why})")
                if not isinstance(error, UserError | urllib.error.HTTPError | HfHubHTTPError):
                    silent[host] = why
        downloads[artifact.key] = found
        if not found:
            reasons[artifact.key] = f"Not downloaded: {'; '.join(refused)}."
    return downloads, reasons


def _first_that_works(downloads: Iterable[Download]) -> Path:
    """Download a file from the first origin that sends it; the file appears whole or not at all.

    Raises:
        UserError: no origin sent it; the message says what each of them did.
        StorageError: the file cannot be written.
    """
    reasons = []
    for download in downloads:
        try:
            return download.run()
        except StorageError:
            raise
        except Exception as error:  # as above
            reasons.append(f"{download.host} did not send it ({_in_a_line(error)})")
    raise UserError("; ".join(reasons))


def _in_a_line(error: Exception) -> str:
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    cause = cause if isinstance(cause, Exception) and not isinstance(error, urllib.error.HTTPError) else error
    line = (str(cause) or "no message").splitlines()[0]
    return line if isinstance(cause, UserError) else f"{type(cause).__name__}: {line}"


def _ask_hub(artifact: Artifact, folder: Path | None) -> Callable[[], Path]:
    """Find the one file of the repository whose path ends in `artifact.file`; return its download into the hub's cache.

    The official README names the folder of each checkpoint, but not where the folder lies in the repository.
    """
    repository = artifact.hub
    assert repository is not None
    siblings = huggingface_hub.HfApi().model_info(repository, timeout=TIMEOUT).siblings or []
    paths = [s.rfilename for s in siblings if f"/{s.rfilename}".endswith(f"/{artifact.file}")]
    if len(paths) != 1:
        raise UserError(f"{repository} has {len(paths)} files …{artifact.file}")
    return lambda: Path(huggingface_hub.hf_hub_download(repository, paths[0], etag_timeout=TIMEOUT))


def _ask_address(artifact: Artifact, folder: Path | None) -> Callable[[], Path]:
    """Look at the beginning of a file at a plain address; return its download, into `folder` or torch hub's cache.

    Raises:
        FullDiskError: the file is longer than what is free.
    """
    target = folder / artifact.file if folder is not None else _address_cache(artifact)
    assert target is not None
    with _open_address(artifact) as response:
        length = response.length or 0
        _refuse_text(response.read1(64))
    free = shutil.disk_usage(next(place for place in target.absolute().parents if place.exists())).free
    if length > free:
        raise FullDiskError(f"There is no space for {target}: it has {length:,} bytes, and {free:,} are free.")
    return partial(_download, artifact, target)


def _download(artifact: Artifact, target: Path) -> Path:
    """Download a file from its plain address; it is checked before it appears."""
    with replacing(target) as temporary:
        with _open_address(artifact) as response, temporary.open("wb") as file:
            announced: int | None = response.length
            count, megabytes = 0, (announced or 0) // 10**6
            words = "{done} of {total} MB", "{rate:.1f} MB/s, {left} left"
            with progress(f"download {artifact.key}", megabytes, *words, show=megabytes > 0) as advance:
                while chunk := response.read(2**20):
                    before, count = count // 10**6, count + file.write(chunk)
                    if count // 10**6 > before:
                        advance(count // 10**6, "")
        if announced is not None and count != announced:
            raise UserError(f"the file was cut off: {count:,} of {announced:,} bytes came")
        _check_content(artifact, temporary)
    return target


def _open_address(artifact: Artifact) -> Any:
    assert artifact.url is not None
    request = urllib.request.Request(artifact.url, headers={"User-Agent": "tokenbridge"})  # noqa: S310  declared here
    response = urllib.request.urlopen(request, timeout=TIMEOUT)  # noqa: S310
    if (encoding := response.headers.get("Content-Encoding", "identity")) != "identity":
        response.close()
        raise UserError(f"the answer is packed with {encoding}, which was not asked for")
    return response


def _refuse_text(start: bytes) -> None:
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(TEXT):
        raise UserError("the answer is a web page or a message, not the file")


def _check_content(artifact: Artifact, path: Path) -> None:
    """Check a download by everything that is known of it.

    Raises:
        UserError: it is empty, a web page, a damaged archive, or not what the publisher states.
    """
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise UserError("the answer is empty")
    _refuse_text(start)
    if start.startswith(ZIP):
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip() is not None  # reads all of it
        except Exception:  # zlib and struct have errors of their own
            damaged = True
        if damaged:
            raise UserError("the file was cut off or damaged on its way")
    try:
        _published_hash(artifact, path)
    except UserError as error:
        raise UserError(str(error).replace(str(path), "the answer").rstrip(".")) from error


def _check(artifact: Artifact, path: Path, lock_path: Path) -> None:
    """Compare a file with its published and recorded hashes, and record its hash at the first use."""
    entry = _read_lock(lock_path).get(artifact.key)
    # Whoever can write a file can set its times, and an entry of the lock file, so a published hash is always compared.
    if entry is not None and not artifact.has_published_hash and _is_recorded(path, entry):
        return
    sha256 = _published_hash(artifact, path)
    with in_turn(lock_path.parent):
        lock = _read_lock(lock_path)  # again: hashing takes minutes, in which another process may have written
        entry = lock.get(artifact.key)
        if entry is not None and entry["sha256"] != sha256:
            raise UserError(
                f"{path} is not the {artifact.key} that was used before: its SHA-256 is {sha256}, and {lock_path} has "
                f"{entry['sha256']} (of {entry['path']}). If the new file is right, run `tokenbridge artifacts "
                f"--accept {artifact.key}`, or delete the entry."
            )
        write_json(lock_path, {**lock, artifact.key: {**_identity(path), "sha256": sha256}})


def _published_hash(artifact: Artifact, path: Path) -> str:
    """Return the SHA-256 of a file, after comparing the file with everything that its publisher states."""
    size = path.stat().st_size
    if artifact.size is not None and size != artifact.size:
        raise UserError(f"{path} is not the published {artifact.key}: it has {size:,} bytes, not {artifact.size:,}.")
    sha256 = sha256_of(path)
    if artifact.sha256 is not None and sha256 != artifact.sha256:
        raise UserError(f"{path} is not the published {artifact.key}: its SHA-256 is {sha256}, not {artifact.sha256}.")
    if artifact.git_sha1 is not None and (found := git_sha1_of(path)) != artifact.git_sha1:
        raise UserError(
            f"{path} is not the published {artifact.key}: its git hash is {found}, not {artifact.git_sha1}."
        )
    return sha256


def git_sha1_of(path: Path) -> str:
    """Return git's hash of a file's contents (`git hash-object`)."""
    with path.open("rb") as file:
        header = f"blob {path.stat().st_size}\0".encode()
        return hashlib.file_digest(file, lambda: hashlib.sha1(header, usedforsecurity=False)).hexdigest()


def _identity(path: Path) -> dict[str, Any]:
    stat = path.stat()
    identity = {"path": str(path.absolute()), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    return {**identity, "ctime_ns": stat.st_ctime_ns, "inode": stat.st_ino}  # these cannot be set by hand


def _is_recorded(path: Path, entry: Mapping[str, Any]) -> bool:
    """Return whether the entry belongs to this file and the file is unchanged since."""
    return {**_identity(path), "sha256": entry["sha256"]} == entry


def _read_lock(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    fields = {"path": str, "size": int, "mtime_ns": int, "sha256": str}  # older files have these alone
    known = (fields, fields | {"ctime_ns": int, "inode": int})
    try:
        with reading(path, "a lock file"):
            lock = json.loads(read_bytes(path))
        entries = lock.values() if isinstance(lock, dict) else [lock]
        if not all(isinstance(e, dict) and {name: type(value) for name, value in e.items()} in known for e in entries):
            raise UserError("its entries have path, size, mtime_ns and sha256")
    except UserError as error:
        raise UserError(f"{path} is damaged ({error}); correct it, or delete it and let it be written anew.") from error
    return dict(lock)
