"""What the tests compare the package with is part of the repository, whole: no test of it can be skipped."""

from __future__ import annotations

from conftest import GOLDENS
from golden_cases import listed_goldens
from published import published_checkpoints, published_numbers

from tokenbridge.models.registry import all_presets
from tokenbridge.tokenizers.llamagen_vq import PRESETS as VQ_PRESETS
from tokenbridge.utils.files import sha256_of


def test_names_and_shapes_of_every_published_checkpoint_are_here() -> None:
    presets = [preset for _, preset in all_presets().values()] + list(VQ_PRESETS.values())
    official = {preset.official_name for preset in presets if preset.official_name} | {"kl16", "givt_vae"}
    assert official | {"givt_causal_256_unrolled"} == published_checkpoints().keys()
    assert all(shapes for shapes in published_checkpoints().values())


def test_published_numbers_are_here() -> None:
    numbers = published_numbers()
    assert "arXiv 2503.16430 v1" in numbers["source"]["paper"]
    tables = [f"table_{name}" for name in ("1a", "1b", "2a", "2b", "2c", "2d", "2e", "3", "5")]
    assert all(numbers[name]["rows"] for name in tables)
    assert numbers.keys() - tables == {"source", "table_4", "official_commands", "counted"}


def test_golden_cases_are_here() -> None:
    assert len(listed_goldens()) == 33
    assert all(sha256_of(GOLDENS / name) == sha256 for name, sha256 in listed_goldens().items())
