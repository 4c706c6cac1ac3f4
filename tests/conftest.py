"""What the test files share: the golden cases, models with the goldens' weights, real latents."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from official_names import with_rule_weights
from torch import Tensor

from tokenbridge.cli import main as cli
from tokenbridge.configs.scales import SCALES
from tokenbridge.conformance.golden import read_golden
from tokenbridge.conformance.tokenbridge import make_model, tokenbridge_config
from tokenbridge.models.tokenbridge.model import TokenBridge
from tokenbridge.weights.rule import RULE

if TYPE_CHECKING:
    from mini_scale import World

ROOT = Path(__file__).resolve().parents[1]
GOLDENS = ROOT / "reference_results" / "goldens"  # computed with the official code; README.md there
REAL_DATA = ROOT.parent / "shared" / "data"  # CIFAR-10 and real latents: not ours to distribute, tests of them skip

Run = Callable[..., tuple[int, str, str]]  # what `run_command` returns

pytest.register_assert_rewrite("scored_images")
torch.set_num_threads(1)  # the models here are tiny, and test processes run side by side
settings.register_profile("tokenbridge", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("tokenbridge")

TINY: dict[str, Any] = {
    "latent_size": 4,
    "num_channels": 4,
    "num_classes": 5,
    "num_levels": 8,
    "channel_order": (2, 0, 3, 1),
    "width": 32,
    "encoder_depth": 1,
    "decoder_depth": 2,
    "num_heads": 2,
    "num_buffer": 2,
    "head_width": 32,
    "head_depth": 2,
    "head_num_heads": 2,
}


def tiny_model(**changes: Any) -> TokenBridge:
    """Return a model of 16 positions, 4 channels and 8 levels, in evaluation mode.

    Its weights are drawn by the goldens' rule: at initialisation the adaLN projections are zero, and much of the
    head does nothing.
    """
    return with_rule_weights(TokenBridge(**{**TINY, **changes}), {"rule": RULE, "salt": "tiny"})


@dataclass(frozen=True)
class Golden:
    """A golden case: what goes in, what the official code made of it, how close one must come."""

    meta: dict[str, Any]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]

    def model(self) -> TokenBridge:
        return with_rule_weights(make_model(tokenbridge_config(self.meta["config"])), self.meta["weights"])

    def close(self, name: str, ours: Tensor) -> bool:
        """Tell whether `ours` is within the case's own tolerance: float32 sums in another order."""
        tolerance = self.meta["tolerance"]
        return torch.allclose(ours, self.outputs[name], atol=tolerance["atol"], rtol=tolerance["rtol"])

    def visible_and_masked(self) -> tuple[Tensor, Tensor]:
        """Return visible [B, n] and masked [B, L - n] positions of the case's mask, both rising."""
        mask = self.inputs["mask"]
        order = mask.argsort(dim=1, stable=True)
        num_visible = int((mask[0] == 0).sum())
        return order[:, :num_visible], order[:, num_visible:]


@cache
def load_golden(name: str) -> Golden:
    """Load the golden case tokenbridge-`name`."""
    golden = read_golden(GOLDENS / f"tokenbridge-{name}.npz")
    inputs, outputs = (
        {key: torch.from_numpy(array) for key, array in arrays.items()} for arrays in (golden.inputs, golden.outputs)
    )
    return Golden(golden.meta, inputs, outputs)


@pytest.fixture(scope="session")
def real_latents() -> Tensor:
    """KL latents of ten photographs [10, 32, 32, 32], float32, of unit standard deviation."""
    path = REAL_DATA / "real_latents.npz"
    if not path.is_file():
        pytest.skip(f"real latents {path} are absent")
    latents = torch.from_numpy(np.load(path)["latents"]).float()
    return latents / latents.std()


@pytest.fixture
def run_command(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs the command `tokenbridge`: (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tokenbridge", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        out, err = capfd.readouterr()
        return code, out, err

    return call


@pytest.fixture(scope="session")
def built_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Train the miniature scale once."""
    import mini_scale

    root = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", root / "cache")
        return mini_scale.build_world(root)


@pytest.fixture(scope="module")
def world(built_world: World) -> Iterator[World]:
    """Stand in the folder of the miniature scale."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(built_world.root)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", built_world.root / "cache")
        yield built_world


@pytest.fixture
def run(world: World, monkeypatch: pytest.MonkeyPatch, run_command: Run) -> Run:
    """Return `run_command`, with the miniature as a scale."""
    import mini_scale

    monkeypatch.setitem(SCALES, "mini", mini_scale.MINI)
    return run_command


def error_of(result: tuple[int, str, str]) -> str:
    """Check that a command failed with one message on stderr and nothing else, and return the message."""
    code, out, err = result
    assert code == 2
    assert out == ""
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1
    return lines[0]
