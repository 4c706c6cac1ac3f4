"""Counts of operations: exactly torch's own on small models, and the published table of full-size ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import TINY, tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tokenbridge.models.flop import decoder_flop, givt_flop, llamagen_flop, mar_flop, tokenbridge_flop
from tokenbridge.models.givt.model import GIVT
from tokenbridge.models.givt.sampling import GivtSampling, StreamNoise
from tokenbridge.models.givt.sampling import generate_latents as generate_givt
from tokenbridge.models.llamagen.model import LlamaGen
from tokenbridge.models.llamagen.sampling import LlamaGenSampling
from tokenbridge.models.llamagen.sampling import generate_tokens as generate_llamagen
from tokenbridge.models.mar.model import MAR
from tokenbridge.models.mar.sampling import MarSampling, generate_latents, latent_noise
from tokenbridge.models.noise import image_noise
from tokenbridge.models.registry import KINDS, all_presets
from tokenbridge.models.tokenbridge.presets import PRESETS
from tokenbridge.models.tokenbridge.sampling import TokenBridgeSampling, generate_tokens
from tokenbridge.sampling.load import find_system
from tokenbridge.tokenizers.kl16 import create_kl16

SMALL_VAE = create_kl16(embed_dim=4, ch=32, ch_mult=(1, 1), num_res_blocks=1)
LABEL = torch.tensor([1])


class Counter(FlopCounterMode):
    """Torch's count, of the plain attention: two products, which every version of torch counts."""

    def __init__(self) -> None:
        super().__init__(display=False)
        self.plain = sdpa_kernel(SDPBackend.MATH)

    def __enter__(self) -> Counter:
        self.plain.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *arguments: Any) -> None:
        super().__exit__(*arguments)
        self.plain.__exit__(*arguments)


def without_decoder(count: dict[str, float]) -> float:
    return sum(flop for part, flop in count.items() if part not in ("VAE decoder", "VQ decoder"))


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@pytest.mark.parametrize("position_order", ["random", "confidence"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head_type": "parallel"},
        {"decoder_width": 48, "decoder_num_heads": 3, "mlp_ratio": 3.0, "encoder_depth": 3, "num_buffer": 5},
    ],
)
def test_tokenbridge(guidance_scale: float, position_order: Any, changes: dict[str, Any]) -> None:
    model = tiny_model(**changes)
    sampling = TokenBridgeSampling(5, guidance_scale, position_order=position_order)
    noise = image_noise(0, [0], model.num_positions, model.num_channels)
    with Counter() as counter:
        generate_tokens(model, LABEL, sampling, noise)
    ours = tokenbridge_flop({**TINY, **changes}, sampling, SMALL_VAE)
    assert without_decoder(ours) == counter.get_total_flops()
    other = tokenbridge_flop({**TINY, **changes}, sampling, SMALL_VAE, official_backbone=True)
    assert other["decoder"] > ours["decoder"]  # mutation: what the loop skips would be seen


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@pytest.mark.parametrize("changes", [{}, {"decoder_width": 48, "decoder_num_heads": 3}, {"patch_size": 2}])
def test_mar(guidance_scale: float, changes: dict[str, Any]) -> None:
    sizes = {"latent_size": 4, "num_channels": 3, "num_classes": 5, "width": 24, "encoder_depth": 1}
    sizes |= {"decoder_depth": 2, "num_heads": 2, "num_buffer": 2, "head_width": 16, "head_depth": 2, **changes}
    model = MAR(**sizes).eval()  # type: ignore[arg-type]
    sampling = MarSampling(4, guidance_scale, num_diffusion_steps=8)
    noise = latent_noise(0, [0], model.num_positions, model.num_channels)
    with Counter() as counter:
        generate_latents(model, LABEL, sampling, noise)
    assert without_decoder(mar_flop(sizes, sampling, SMALL_VAE)) == counter.get_total_flops()


@pytest.mark.parametrize(
    "sampling",
    [LlamaGenSampling(), LlamaGenSampling(guidance_scale=2.0), LlamaGenSampling(guidance_scale=2.0, num_guided=3)],
)
@pytest.mark.parametrize("changes", [{}, {"num_kv_heads": 2, "hidden_factor": 1.5}])
def test_llamagen(sampling: LlamaGenSampling, changes: dict[str, Any]) -> None:
    sizes = {"latent_size": 3, "num_codes": 11, "num_classes": 5, "width": 32, "depth": 2, "num_heads": 4}
    sizes |= {"hidden_multiple": 16, **changes}
    model = LlamaGen(**sizes).eval()  # type: ignore[arg-type]
    with Counter() as counter:
        generate_llamagen(model, LABEL, sampling, torch.rand(1, 9))
    vq = find_system("llamagen-b-256").create_decoder()
    assert without_decoder(llamagen_flop(sizes, sampling, vq)) == counter.get_total_flops()


@pytest.mark.parametrize("guidance_weight", [0.0, 0.4])
def test_givt(guidance_weight: float) -> None:
    sizes = {"num_positions": 9, "num_channels": 3, "num_classes": 5, "num_components": 4}
    sizes |= {"width": 32, "depth": 2, "num_heads": 4, "mlp_width": 48}
    model = GIVT(**sizes).eval()  # type: ignore[arg-type]
    sampling = GivtSampling(guidance_weight=guidance_weight)
    with Counter() as counter:
        generate_givt(model, LABEL, sampling, lambda position: StreamNoise(0, [0], position, model))
    vae = create_kl16(embed_dim=3, ch=32, ch_mult=(1, 1), num_res_blocks=1)
    assert without_decoder(givt_flop(sizes, sampling, vae)) == counter.get_total_flops()


# TFLOP per image of TokenBridge-L with guidance: encoder, decoder, head, VAE decoder, all; counted from the official
# code by others. The cached rows still run the last decoder block for all positions, which sampling.py does not.
TABLE = [
    (256, False, (40.9, 69.6, 5.41, 0.25, 116.2)),
    (256, True, (40.9, 69.6, 0.64, 0.25, 111.4)),
    (64, False, (8.3, 17.4, 5.41, 0.25, 31.3)),
    (64, True, (8.3, 17.4, 0.64, 0.25, 26.6)),
]


@pytest.mark.parametrize(("num_iterations", "caches_head", "expected"), TABLE)
def test_tokenbridge_of_published_size(num_iterations: int, caches_head: bool, expected: tuple[float, ...]) -> None:
    preset = PRESETS["tokenbridge-l"]
    sampling = replace(preset.sampling_config(), num_iterations=num_iterations)
    counted = tokenbridge_flop(
        preset.model, sampling, create_kl16(), official_backbone=True, official_head=not caches_head
    )
    tera = [count / 1e12 for count in counted.values()]
    places = (1, 1, 2, 2, 1)  # as many as the table gives
    assert [round(n, p) for n, p in zip([*tera, sum(tera)], places, strict=True)] == list(expected)
    run_here = tokenbridge_flop(preset.model, sampling, create_kl16())
    assert sum(run_here.values()) < sum(counted.values())


def test_others_of_published_size() -> None:
    """The same table: MAR-L has the backbone of TokenBridge-L, LlamaGen-3B makes 576 tokens."""
    mar = find_system("mar-l").flop_per_image()
    assert round(mar["encoder"] / 1e12, 1) == 40.9
    # The official head embeds timestep and context for every row of every step; ours each once.
    width, context_width, rows, steps = 1280, 1024, 2 * 256, 100
    times, condition = 2 * width * (256 + width) * steps, 2 * width * context_width
    official = mar["head"] + (rows - 256) * times + (steps - 1) * rows * condition
    assert round(official / 1e12, 2) == 7.39
    llamagen = find_system("llamagen-3b-384").flop_per_image()
    # The official attention goes over all 577 slots of the cache for every token, the filled ones and the others.
    unfilled = 2 * 24 * 4 * 3200 * sum(577 - (place + 1) for place in range(576))
    counts = (llamagen["transformer"] + unfilled, llamagen["VQ decoder"], sum(llamagen.values()) + unfilled)
    assert [round(count / 1e12, 2) for count in counts] == [7.21, 0.57, 7.78]


def test_every_system_is_counted() -> None:
    assert {kind.name for kind, _ in all_presets().values()} == set(KINDS)
    tiny = [f"tiny/{name}" for name in ("tokenbridge-64", "mar", "llamagen", "givt")]
    for name in [*tiny, *(name for name, (_, preset) in all_presets().items() if preset.sampling)]:
        system = find_system(name)
        flop = system.flop_per_image()
        assert all(count > 0 for count in flop.values()), name
        assert decoder_flop(system.create_decoder(), system.model.get("latent_size", 2)) > 0
