"""Published files: where they are found, what is said when they are not, and hashes that are kept."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenbridge.utils.errors import UserError
from tokenbridge.weights import artifacts
from tokenbridge.weights.artifacts import (
    ARTIFACTS,
    FOLDER_VARIABLE,
    LOCK_FILE,
    Artifact,
    MissingArtifactsError,
    accept,
    fingerprint,
    resolve,
    status,
)

TABLE1 = ("imagenet", "kl16", "inception", "adm-statistics")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in an empty folder, with empty caches and no way out."""
    for name in ("cwd", "hub", "torch"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder that the environment variable names."""
    path = tmp_path / "artifacts"
    path.mkdir()
    monkeypatch.setenv(FOLDER_VARIABLE, str(path))
    return path


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Serve a folder on this machine; yield its address and the folder."""
    root = tmp_path / "served"
    root.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def copyfile(self, source: Any, outputfile: Any) -> None:
            """Break off in the middle where the name says so."""
            with contextlib.suppress(ConnectionError):  # who only asks for a file hangs up
                outputfile.write(source.read(3) if "half" in self.path else source.read())

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=root)) as httpd:
        threading.Thread(target=httpd.serve_forever, args=[0.02], daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}", root
        httpd.shutdown()


def declare(monkeypatch: pytest.MonkeyPatch, key: str, **changes: Any) -> Artifact:
    """Change a declaration for one test."""
    changed = replace(ARTIFACTS[key], **changes)
    monkeypatch.setitem(ARTIFACTS, key, changed)
    return changed


def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


def put(path: Path, content: bytes = b"weights") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def put_in_hub_cache(tmp_path: Path, repository: str, file: str, kind: str = "models", content: bytes = b"w") -> Path:
    """Lay a file out as huggingface_hub does: a blob, a link from the snapshot, the commit of main."""
    root = tmp_path / "hub" / f"{kind}--{repository.replace('/', '--')}"
    blob = put(root / "blobs" / hashlib.sha256(content).hexdigest(), content)
    put(root / "refs" / "main", COMMIT.encode())
    link = root / "snapshots" / COMMIT / file
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(blob)
    return link


def lock_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / LOCK_FILE).read_text())


# Declarations


def test_every_declaration_can_be_acted_upon() -> None:
    for key, artifact in ARTIFACTS.items():
        assert key == artifact.key
        assert artifact.hub or (artifact.url or "").startswith("https://")
        assert artifact.option.startswith("--")
        assert not Path(artifact.file).is_absolute()
        assert all((artifact.what, artifact.format, artifact.licence, artifact.origin))
    files = [artifact.file for artifact in ARTIFACTS.values()]
    assert len(set(files)) == len(files)  # two of one name would be taken for each other


def test_git_names_contents_as_git_does(tmp_path: Path) -> None:
    # `echo 'test content' | git hash-object --stdin`, from the book Pro Git, chapter 10.2.
    file = put(tmp_path / "file", b"test content\n")
    assert artifacts.git_sha1_of(file) == "d670460b4b4aece5915caf5c68d12f560a9fe3e4"


# Where files are found


@pytest.mark.parametrize("place", ["kl16.ckpt", "vae/kl16.ckpt"])
def test_found_in_the_folder_or_one_below(place: str, folder: Path) -> None:
    file = put(folder / place)
    assert resolve(["kl16"]) == {"kl16": file}


def test_official_layout_is_found_as_it_is(folder: Path) -> None:
    files = {
        "tokenbridge-l": put(folder / "tokenbridge" / "tokenbridge_large" / "checkpoint-last.pth", b"L"),
        "tokenbridge-h": put(folder / "tokenbridge" / "tokenbridge_huge" / "checkpoint-last.pth", b"H"),
        "mar-b": put(folder / "mar" / "mar_base" / "checkpoint-last.pth", b"B"),
    }
    assert resolve(files) == files


def test_what_is_named_comes_first_then_the_folder_then_the_caches(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts, "_check", lambda *_: None)  # five files of one key, each its own
    at_address = put(tmp_path / "torch" / "hub" / "checkpoints" / "kl16.ckpt")
    assert resolve(["kl16"])["kl16"] == at_address
    on_hub = put_in_hub_cache(tmp_path, "Epiphqny/TokenBridge", "vae/kl16.ckpt")
    assert resolve(["kl16"])["kl16"] == on_hub
    by_variable = put(folder / "kl16.ckpt")
    assert resolve(["kl16"])["kl16"] == by_variable
    by_argument = put(tmp_path / "elsewhere" / "kl16.ckpt")
    assert resolve(["kl16"], folder=by_argument.parent)["kl16"] == by_argument
    named = put(tmp_path / "my-vae.ckpt")
    assert resolve(["kl16"], given={"kl16": named})["kl16"] == named
    assert resolve(["kl16"], given={"kl16": by_argument.parent})["kl16"] == by_argument
    assert resolve(["kl16"], given={"kl16": None})["kl16"] == by_variable


def test_a_named_folder_may_be_the_checkpoints_own(tmp_path: Path) -> None:
    file = put(tmp_path / "tokenbridge_large" / "checkpoint-last.pth")
    assert resolve(["tokenbridge-l"], given={"tokenbridge-l": file.parent})["tokenbridge-l"] == file


def test_wrong_name_is_not_passed_over(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(folder / "kl16.ckpt")
    with pytest.raises(MissingArtifactsError, match="--vae names /not/there, and the file is not there"):
        resolve(["kl16"], given={"kl16": "/not/there"})
    with pytest.raises(ValueError, match="no file 'kl-16'"):
        resolve(["kl-16"])
    monkeypatch.setenv(FOLDER_VARIABLE, "/not/there")
    with pytest.raises(ValueError, match="TOKENBRIDGE_ARTIFACTS is /not/there, which is not a folder"):
        resolve(["kl16"])


def test_hub_cache_of_the_files_wherever_they_lie_in_the_repository(tmp_path: Path) -> None:
    large = put_in_hub_cache(tmp_path, "Epiphqny/TokenBridge", "pretrained/tokenbridge_large/checkpoint-last.pth")
    assert resolve(["tokenbridge-l"]) == {"tokenbridge-l": large}
    with pytest.raises(MissingArtifactsError):
        resolve(["tokenbridge-h"])


def test_imagenet_is_a_folder_or_the_hubs_parquet_files(folder: Path, tmp_path: Path) -> None:
    put_in_hub_cache(tmp_path, "ILSVRC/imagenet-1k", "README.md", "datasets")
    with pytest.raises(MissingArtifactsError):
        resolve(["imagenet"])
    shard = put_in_hub_cache(tmp_path, "ILSVRC/imagenet-1k", "data/train-00000-of-00294.parquet", "datasets", b"p")
    assert resolve(["imagenet"]) == {"imagenet": shard.parents[1]}
    (folder / "imagenet").mkdir()
    assert resolve(["imagenet"]) == {"imagenet": folder / "imagenet"}
    assert not (folder / LOCK_FILE).exists()  # nothing to hash


# What is missing


@settings(max_examples=25)
@given(keys=st.lists(st.sampled_from(sorted(ARTIFACTS)), min_size=1, unique=True))
def test_one_error_lists_everything_that_is_missing(keys: list[str]) -> None:
    with pytest.raises(MissingArtifactsError) as error:
        resolve(keys, given=dict.fromkeys(keys))
    assert [missing.artifact.key for missing in error.value.missing] == keys
    text = str(error.value)
    for key in keys:
        artifact = ARTIFACTS[key]
        (line,) = (line for line in text.splitlines() if line.startswith(f"- {key}: "))
        for part in (artifact.origin, f"${FOLDER_VARIABLE}/{artifact.file}", artifact.option, artifact.licence):
            assert part in line


def test_places_are_exact_where_there_is_a_folder(folder: Path) -> None:
    with pytest.raises(MissingArtifactsError) as error:
        resolve(TABLE1, given=dict.fromkeys(TABLE1))
    for key in TABLE1:
        assert f"Put it at {folder / ARTIFACTS[key].file}, or" in str(error.value)


def test_offline_means_no_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("no connection may be tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(MissingArtifactsError, match="HF_HUB_OFFLINE=1, was asked for"):
        resolve(["tokenbridge-l", "inception"])
    online(monkeypatch)
    with pytest.raises(MissingArtifactsError, match="`tokenbridge artifacts tokenbridge-l --download` does"):
        resolve(["tokenbridge-l", "inception"], download=False)


def test_no_network_fails_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    online(monkeypatch)

    def unreachable(*_: Any, **__: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    start = time.perf_counter()
    with pytest.raises(MissingArtifactsError) as error:
        resolve(["tokenbridge-l", "kl16", "inception", "adm-statistics"])
    assert time.perf_counter() - start < 5
    assert len(error.value.missing) == 4
    assert "huggingface.co did not send it (" in str(error.value)
    assert "github.com did not send it (" in str(error.value)


def test_a_silent_host_is_given_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    online(monkeypatch)
    monkeypatch.setattr(artifacts, "TIMEOUT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, never answers
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        declare(monkeypatch, "kl16", url=f"{address}/file")
        declare(monkeypatch, "inception", url=f"{address}/file")

        def refuse(*_: Any, **__: Any) -> None:
            raise AssertionError("the hub's client found the host silent: nobody may wait for it again")

        monkeypatch.setattr(urllib.request, "urlopen", refuse)
        with pytest.raises(MissingArtifactsError) as error:
            resolve(["kl16", "inception"])
    reasons = [missing.reason for missing in error.value.missing]
    assert [reason.count("did not send it (") for reason in reasons] == [2, 1]  # the hub and the address; the address
    assert all("Timeout" in reason for reason in reasons)
    assert list(folder.iterdir()) == []


def test_a_server_that_falls_silent_is_given_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    online(monkeypatch)
    monkeypatch.setattr(artifacts, "TIMEOUT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        connections: list[socket.socket] = []

        def serve() -> None:
            for _ in range(2):  # it is asked, and then it is to send
                connection = listening.accept()[0]
                connections.append(connection)
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\nPK")

        threading.Thread(target=serve, daemon=True).start()
        declare(monkeypatch, "adm-reference", url=f"http://127.0.0.1:{listening.getsockname()[1]}/file")
        with pytest.raises(MissingArtifactsError, match="did not send it \\(TimeoutError"):
            resolve(["adm-reference"])
        assert len(connections) == 2
        for connection in connections:
            connection.close()
    assert list(folder.iterdir()) == []


def test_nothing_is_downloaded_if_a_file_cannot_be(
    server: tuple[str, Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    online(monkeypatch)
    address, root = server
    put(root / "batch.npz")
    declare(monkeypatch, "adm-reference", url=f"{address}/batch.npz")
    with pytest.raises(MissingArtifactsError) as error:
        resolve(["adm-reference", "imagenet", "inception"], given={"inception": "/not/there"})
    first, second, third = error.value.missing
    assert "once the other files are in place" in first.reason
    assert "Data sets are not downloaded" in second.reason
    assert "and the file is not there" in third.reason
    assert list(folder.iterdir()) == []


def test_what_a_server_does_not_have_is_found_before_the_first_download(
    server: tuple[str, Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    online(monkeypatch)
    address, root = server
    put(root / "batch.npz")
    declare(monkeypatch, "adm-reference", url=f"{address}/batch.npz")
    declare(monkeypatch, "adm-statistics", url=f"{address}/not-there.npz")
    with pytest.raises(MissingArtifactsError) as error:
        resolve(["adm-reference", "adm-statistics"])
    reasons = {missing.artifact.key: missing.reason for missing in error.value.missing}
    assert "404" in reasons["adm-statistics"]
    assert "once the other files are in place" in reasons["adm-reference"]
    assert list(folder.iterdir()) == []


def test_what_was_downloaded_stays_where_another_fails(
    server: tuple[str, Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    online(monkeypatch)
    address, root = server
    put(root / "batch.npz")
    put(root / "half.npz", b"a longer file")
    declare(monkeypatch, "adm-reference", url=f"{address}/batch.npz")
    declare(monkeypatch, "adm-statistics", url=f"{address}/half.npz")
    with pytest.raises(MissingArtifactsError) as error:
        resolve(["adm-statistics", "adm-reference"])
    (missing,) = error.value.missing
    assert missing.artifact.key == "adm-statistics"
    assert "cut off: 3 of 13 bytes" in missing.reason
    assert [path.name for path in folder.iterdir()] == [ARTIFACTS["adm-reference"].file]


# Downloads


def test_download_from_an_address(server: tuple[str, Path], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    online(monkeypatch)
    address, root = server
    content = bytes(range(256)) * 5000
    put(root / "batch.npz", content)
    declare(monkeypatch, "adm-reference", url=f"{address}/batch.npz")
    path = resolve(["adm-reference"])["adm-reference"]
    assert path == folder / "VIRTUAL_imagenet256_labeled.npz"
    assert path.read_bytes() == content
    assert lock_of(folder)["adm-reference"]["sha256"] == hashlib.sha256(content).hexdigest()


def test_download_without_a_folder_goes_to_torch_hubs_cache(
    server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    online(monkeypatch)
    address, root = server
    put(root / "w.pth")
    artifact = declare(monkeypatch, "mar-b", url=f"{address}/w.pth")
    expected = tmp_path / "torch" / "hub" / "checkpoints" / artifact.file
    assert resolve(["mar-b"]) == {"mar-b": expected}
    assert resolve(["mar-b"], download=False) == {"mar-b": expected}


def test_a_web_page_or_half_a_file_is_not_taken(
    server: tuple[str, Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    online(monkeypatch)
    address, root = server
    for text in (b"<html>Sign in</html>", b"\xef\xbb\xbf\n  <!DOCTYPE html>", b'{"error": "quota"}', b"\r\n<html>"):
        put(root / "page.html", text)
        declare(monkeypatch, "adm-reference", url=f"{address}/page.html")
        with pytest.raises(MissingArtifactsError, match="a web page or a message, not the file"):
            resolve(["adm-reference"])

    np.savez(root / "half.npz", arr_0=np.zeros(10))
    declare(monkeypatch, "adm-reference", url=f"{address}/half.npz")
    with pytest.raises(MissingArtifactsError, match="the file was cut off"):
        resolve(["adm-reference"])
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("where", ["start", "middle", "end"])
def test_a_damaged_archive_is_not_taken(
    where: str, server: tuple[str, Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server announces the length of what it has, so only the archive itself can tell."""
    online(monkeypatch)
    address, root = server
    np.savez(root / "batch.npz", arr_0=np.arange(1000))
    content = (root / "batch.npz").read_bytes()
    place = {"start": 5, "middle": len(content) // 2, "end": len(content) - 10}[where]
    damaged = content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]
    put(root / "batch.npz", damaged if where == "middle" else damaged[: place + 1])
    declare(monkeypatch, "adm-reference", url=f"{address}/batch.npz")
    with pytest.raises(MissingArtifactsError, match="cut off or damaged on its way"):
        resolve(["adm-reference"])
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ("Content-Encoding: gzip\r\nContent-Length: 4", "the answer is packed with gzip"),
        ("Content-Length: 999999999999999", r"no space for .*: it has 999,999,999,999,999 bytes, and [\d,]+ are free"),
        ("Transfer-Encoding: chunked", "IncompleteRead"),  # ends within a chunk
    ],
)
def test_what_the_headers_say_is_heard(
    headers: str, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    online(monkeypatch)

    class Odd(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.wfile.write(f"HTTP/1.1 200 OK\r\n{headers}\r\nConnection: close\r\n\r\n".encode())
            self.wfile.write(b"ff\r\nbytes" if "chunked" in headers else b"byte")

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Odd) as httpd:
        threading.Thread(target=httpd.serve_forever, args=[0.02], daemon=True).start()
        declare(monkeypatch, "adm-reference", url=f"http://127.0.0.1:{httpd.server_port}/batch.npz")
        with pytest.raises(UserError, match=message):
            resolve(["adm-reference"])
        httpd.shutdown()
    assert list(folder.iterdir()) == []


def test_an_empty_answer_is_not_taken(server: tuple[str, Path], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    online(monkeypatch)
    address, root = server
    put(root / "empty.ckpt", b"")
    declare(monkeypatch, "kl16", hub=None, url=f"{address}/empty.ckpt")
    with pytest.raises(MissingArtifactsError, match="the answer is empty"):
        resolve(["kl16"])
    assert list(folder.iterdir()) == []


def test_a_file_of_another_hash_is_not_taken(
    server: tuple[str, Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    online(monkeypatch)
    address, root = server
    put(root / "inception.pth")
    declare(monkeypatch, "inception", url=f"{address}/inception.pth")
    with pytest.raises(MissingArtifactsError, match="the answer is not the published inception: it has 7 bytes"):
        resolve(["inception"])
    declare(monkeypatch, "inception", url=f"{address}/inception.pth", size=7)
    with pytest.raises(MissingArtifactsError, match="the answer is not the published inception: its SHA-256 is"):
        resolve(["inception"])
    assert list(folder.iterdir()) == []


def test_download_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    online(monkeypatch)
    fetched = put(tmp_path / "fetched.pth")

    class Info:
        siblings = tuple(
            huggingface_hub.hf_api.RepoSibling(rfilename=name)
            for name in (
                "README.md",
                "tokenbridge_large/checkpoint-last.pth",
                "not_tokenbridge_huge/checkpoint-last.pth",
                "a/tokenbridge_huge/checkpoint-last.pth",
                "b/kl16.ckpt",
                "c/kl16.ckpt",
            )
        )

    asked: list[tuple[Any, ...]] = []

    def download(*arguments: Any, **_: Any) -> str:
        asked.append(arguments)
        return str(fetched)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: Info())
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert resolve(["tokenbridge-h"]) == {"tokenbridge-h": fetched}
    assert asked == [("Epiphqny/TokenBridge", "a/tokenbridge_huge/checkpoint-last.pth")]
    declare(monkeypatch, "kl16", url=None)
    with pytest.raises(MissingArtifactsError, match=r"has 2 files …kl16\.ckpt"):
        resolve(["kl16"])


def test_the_address_is_asked_where_the_hub_fails(
    server: tuple[str, Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    online(monkeypatch)
    address, root = server
    put(root / "kl16.ckpt", b"vae")

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no way")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    declare(monkeypatch, "kl16", url=f"{address}/kl16.ckpt")
    assert resolve(["kl16"])["kl16"].read_bytes() == b"vae"


# The command, in a process of its own: modules that another command imports first must not be needed.

COMMAND = """
import dataclasses, sys
from tokenbridge.weights.artifacts import ARTIFACTS
key, url = sys.argv.pop(1), sys.argv.pop(1)
ARTIFACTS[key] = dataclasses.replace(ARTIFACTS[key], url=url, git_sha1=None, hub=None)
from tokenbridge.cli.main import main
main()
"""


def in_a_fresh_process(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | variables
    path = {"PYTHONPATH": str(Path(artifacts.__file__).parents[2])}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment | path, capture_output=True, text=True, check=False
    )


def test_the_command_downloads_in_a_fresh_process(server: tuple[str, Path], tmp_path: Path) -> None:
    address, root = server
    np.savez(root / "stats.npz", mu=np.zeros(4))
    command = ("-c", COMMAND, "adm-statistics", f"{address}/stats.npz", "artifacts", "adm-statistics", "--download")
    done = in_a_fresh_process(*command, "--folder", "new/folder")
    assert (done.returncode, done.stderr) == (0, "")
    assert Path("new/folder/adm_in256_stats.npz").read_bytes() == (root / "stats.npz").read_bytes()
    assert "adm-statistics" in done.stdout


def test_the_command_without_a_network_says_what_is_missing_in_a_fresh_process() -> None:
    closed = "http://127.0.0.1:9"  # a proxy that nobody is
    command = ("-m", "tokenbridge", "artifacts", "adm-statistics", "--download", "--folder", ".")
    done = in_a_fresh_process(*command, https_proxy=closed, http_proxy=closed)
    assert (done.returncode, done.stdout) == (2, "")
    assert "raw.githubusercontent.com did not send it (ConnectionRefusedError" in done.stderr
    assert "Put it at adm_in256_stats.npz." in done.stderr  # `artifacts` has no option that names the file
    assert "Traceback" not in done.stderr


# Hashes


@settings(max_examples=20)
@given(content=st.binary(max_size=200), other=st.binary(max_size=200))
def test_hash_is_recorded_at_first_use_and_checked_from_then_on(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, other: bytes
) -> None:
    folder = tmp_path_factory.mktemp("folder")
    file = put(folder / "kl16.ckpt", content)
    sha256 = hashlib.sha256(content).hexdigest()
    resolve(["kl16"], folder=folder)
    assert lock_of(folder)["kl16"]["sha256"] == sha256 == fingerprint(file, folder=folder)
    resolve(["kl16"], folder=folder)

    elsewhere = put(folder / "elsewhere.ckpt", other)
    if other == content:  # the same file in another place is the same file
        resolve(["kl16"], folder=folder, given={"kl16": elsewhere})
        return
    before = (folder / LOCK_FILE).read_text()
    with pytest.raises(ValueError, match="not the kl16 that was used before") as error:
        resolve(["kl16"], folder=folder, given={"kl16": elsewhere})
    for part in (sha256, hashlib.sha256(other).hexdigest(), "tokenbridge artifacts --accept kl16", LOCK_FILE):
        assert part in str(error.value)
    assert (folder / LOCK_FILE).read_text() == before
    accept("kl16", folder=folder, given={"kl16": elsewhere})
    resolve(["kl16"], folder=folder, given={"kl16": elsewhere})
    with pytest.raises(ValueError, match="used before"):
        resolve(["kl16"], folder=folder)


def test_unchanged_file_is_hashed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = put(folder / "kl16.ckpt")
    resolve(["kl16"])

    def refuse(_: Any) -> str:
        raise AssertionError("hashed again")

    monkeypatch.setattr(artifacts, "sha256_of", refuse)
    resolve(["kl16"])
    assert fingerprint(file) == hashlib.sha256(b"weights").hexdigest()
    file.write_bytes(b"Weights")  # as many bytes, another time of change
    with pytest.raises(AssertionError, match="hashed again"):
        resolve(["kl16"])


def test_no_entry_of_another_process_is_lost(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashing takes minutes. What another process records meanwhile stays, and is checked."""
    first, second = put(folder / "kl16.ckpt"), put(folder / "VIRTUAL_imagenet256_labeled.npz")
    of_publisher = artifacts._published_hash

    def meanwhile(artifact: Artifact, path: Path) -> str:
        sha256 = of_publisher(artifact, path)
        if artifact.key == "kl16":
            resolve(["adm-reference"])
        return sha256

    monkeypatch.setattr(artifacts, "_published_hash", meanwhile)
    resolve(["kl16"])
    assert {key: entry["path"] for key, entry in lock_of(folder).items()} == {
        "kl16": str(first),
        "adm-reference": str(second),
    }
    assert not list(folder.glob(".tokenbridge*"))


def test_deleting_the_entry_accepts_too(folder: Path) -> None:
    put(folder / "kl16.ckpt", b"one")
    put(folder / "adm-reference.npz")
    resolve(["kl16"])
    put(folder / "kl16.ckpt", b"two!")
    with pytest.raises(ValueError, match="used before"):
        resolve(["kl16"])
    (folder / LOCK_FILE).write_text(json.dumps({k: v for k, v in lock_of(folder).items() if k != "kl16"}))
    resolve(["kl16"])


def test_published_hashes_are_checked_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inception = put(folder / ARTIFACTS["inception"].file)
    with pytest.raises(ValueError, match="has 7 bytes, not 95,628,359"):
        resolve(["inception"])
    declare(monkeypatch, "inception", size=7)
    with pytest.raises(ValueError, match=r"SHA-256 is [0-9a-f]{64}, not 6726825d0af5"):
        resolve(["inception"])
    with pytest.raises(ValueError, match="not the published inception"):
        accept("inception")
    put(folder / "adm_in256_stats.npz")
    with pytest.raises(ValueError, match=r"its git hash is [0-9a-f]{40}, not 1da4c176"):
        resolve(["adm-statistics"])
    assert not (folder / LOCK_FILE).exists()
    declare(monkeypatch, "inception", size=7, sha256=hashlib.sha256(inception.read_bytes()).hexdigest())
    assert resolve(["inception"]) == {"inception": inception}


def test_lock_is_in_the_folder_if_it_can_be_written_to_else_here(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(folder / "kl16.ckpt")
    monkeypatch.setattr(os, "access", lambda *_: False)
    resolve(["kl16"])
    assert (tmp_path / "cwd" / LOCK_FILE).is_file()
    assert not (folder / LOCK_FILE).exists()
    monkeypatch.undo()
    assert artifacts.lock_file(folder) == folder / LOCK_FILE


DAMAGED_LOCKS = [
    "{",
    "[1]",
    '{"kl16": {"sha256": "0"}}',
    '{"kl16": 3}',
    "[" * 100_000,
    "1" * 10_000,
    '{"kl16": {"path": 1, "size": 1, "mtime_ns": 1, "sha256": 2}}',
    '{"kl16": {"path": "x", "size": "1", "mtime_ns": 1, "sha256": "0"}}',
]


@pytest.mark.parametrize("text", DAMAGED_LOCKS)
def test_damaged_lock_is_one_clear_error(text: str, folder: Path) -> None:
    put(folder / "kl16.ckpt")
    (folder / LOCK_FILE).write_text(text)
    for use in (resolve, status):
        with pytest.raises(UserError, match=rf"{LOCK_FILE} is damaged"):
            use(["kl16"])


# Status


def test_a_published_hash_is_told_from_one_that_was_only_recorded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = put(folder / "kl16.ckpt")
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setitem(ARTIFACTS, "kl16", replace(ARTIFACTS["kl16"], sha256=sha256))
    resolve(["kl16"])
    assert [s.state for s in status(["kl16"])] == ["matches the published hash"]
    # Whatever the lock file says, another hash than the published one is no match.
    monkeypatch.setitem(ARTIFACTS, "kl16", replace(ARTIFACTS["kl16"], sha256="0" * 64))
    assert [s.state for s in status(["kl16"])] == ["changed"]


def test_status_tells_without_hashing(folder: Path) -> None:
    def state() -> str:
        (only,) = status(["kl16"])
        return only.state

    assert state() == "missing"
    file = put(folder / "kl16.ckpt")
    assert state() == "present"
    resolve(["kl16"])
    assert state() == "recorded here, no hash was published"
    file.write_bytes(b"another size")
    assert state() == "changed"
    accept("kl16")
    (now,) = status(["kl16"])
    assert now.as_dict() == {
        "key": "kl16",
        "state": "recorded here, no hash was published",
        "path": str(file),
        "size": 12,
        "sha256": hashlib.sha256(b"another size").hexdigest(),
        "published_sha256": None,
        "what": ARTIFACTS["kl16"].what,
        "file": "kl16.ckpt",
        "format": ARTIFACTS["kl16"].format,
        "licence": "MIT",
        "origin": ARTIFACTS["kl16"].origin,
    }
    assert [s.artifact.key for s in status()] == list(ARTIFACTS)


def test_nothing_to_accept(folder: Path) -> None:
    with pytest.raises(MissingArtifactsError, match="nothing to accept"):
        accept("kl16")
    with pytest.raises(ValueError, match="imagenet is a data set"):
        accept("imagenet")
