"""Published files that are missing: one rule of downloading for all commands, and options that the command has."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import typer
from conftest import Run
from PIL import Image

from tokenbridge.cli.options import app
from tokenbridge.weights.artifacts import ARTIFACTS, FOLDER_VARIABLE

NEEDED = (  # of each command, the files that it cannot do without
    ("evaluate images --reference images --allow-few", ["inception"]),
    ("reference images --out stats.npz", ["inception"]),
    ("audit --samples images --claim table3/tokenbridge-l/fid", ["inception", "adm-statistics"]),
    ("sample tokenbridge-l", ["tokenbridge-l", "kl16"]),
    ("sample givt-causal-256", ["givt-causal-256", "givt-vae"]),
    ("reproduce tokenbridge-l", ["tokenbridge-l", "kl16", "inception", "adm-statistics", "adm-reference"]),
    ("reproduce llamagen", ["llamagen-3b-384", "llamagen-vq16", "inception", "adm-statistics", "adm-reference"]),
    ("reproduce table1", ["imagenet", "kl16", "inception", "adm-statistics"]),
)


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand in a folder with images and nothing else; return the hosts that were asked for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "images").mkdir()
    for number in range(4):
        Image.new("RGB", (256, 256), (number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
    asked: list[str] = []

    def unknown(host: Any, *_: Any, **__: Any) -> None:
        asked.append(str(host))
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    return asked


def missing(text: str) -> dict[str, str]:
    """Return the lines about missing files, by key."""
    return dict(re.findall(r"^- ([\w-]+): (.*)$", text, re.MULTILINE))


def options_of(command: str) -> set[str]:
    found: Any = typer.main.get_command(app)
    return {option for parameter in found.commands[command].params for option in parameter.opts}


@pytest.mark.parametrize(("line", "keys"), NEEDED)
def test_what_a_command_cannot_do_without_is_downloaded(
    line: str, keys: list[str], run_command: Run, nowhere: list[str]
) -> None:
    code, out, err = run_command(*line.split())
    assert (code, out) == (2, "")
    assert list(missing(err)) == keys
    for told in missing(err).values():
        option = told.rpartition("or name it with ")[2].rstrip(".")
        assert option in options_of(line.split()[0])
        assert "did not send it (" in told or "imagenet" in keys
    assert bool(nowhere) == ("imagenet" not in keys)  # no data set is downloaded, and then nothing is


@pytest.mark.parametrize(("line", "keys"), NEEDED)
def test_offline_is_obeyed_by_every_command(line: str, keys: list[str], run_command: Run, nowhere: list[str]) -> None:
    code, out, err = run_command(*line.split(), "--offline")
    assert (code, out) == (2, "")
    assert list(missing(err)) == keys
    for key, told in missing(err).items():
        assert "--offline, or HF_HUB_OFFLINE=1, was asked for" in told or ARTIFACTS[key].is_dataset
    assert nowhere == []


def test_extras_are_used_if_they_are_here_and_the_command_that_fetches_them_is_named(
    run_command: Run, nowhere: list[str]
) -> None:
    code, out, _ = run_command("reconstruct", "digits", "--limit", "4", "--levels", "8")
    assert code == 0
    assert "rFID not run: inception: " in out
    assert "`tokenbridge artifacts inception --download` does" in out
    assert nowhere == []


def test_several_targets_download_nothing(run_command: Run, nowhere: list[str]) -> None:
    code, out, _ = run_command("reproduce", "mar-b", "givt")
    assert code == 0
    assert "missing: mar-b, kl16, inception" in out
    assert nowhere == []


def test_the_command_that_downloads_has_no_option_for_a_file(run_command: Run, nowhere: list[str]) -> None:
    code, _, err = run_command("artifacts", "kl16", "inception", "--download")
    assert code == 2
    assert nowhere
    assert "name it with" not in err
    assert err.count("Put it at $TOKENBRIDGE_ARTIFACTS/") == 2
