"""Counts of operations: those of whole generations by small models, and of every preset as they were by formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import TINY, tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tokenbridge.models.cost import backbone_flop
from tokenbridge.models.givt import cost as givt_cost
from tokenbridge.models.givt.model import GIVT
from tokenbridge.models.givt.sampling import GivtSampling, StreamNoise
from tokenbridge.models.givt.sampling import generate_latents as generate_givt
from tokenbridge.models.llamagen import cost as llamagen_cost
from tokenbridge.models.llamagen.model import LlamaGen
from tokenbridge.models.llamagen.sampling import LlamaGenSampling
from tokenbridge.models.llamagen.sampling import generate_tokens as generate_llamagen
from tokenbridge.models.mar import cost as mar_cost
from tokenbridge.models.mar.model import MAR
from tokenbridge.models.mar.sampling import MarSampling, generate_latents, latent_noise
from tokenbridge.models.noise import image_noise
from tokenbridge.models.registry import all_presets
from tokenbridge.models.tokenbridge import cost as tokenbridge_cost
from tokenbridge.models.tokenbridge.model import TokenBridge
from tokenbridge.models.tokenbridge.sampling import TokenBridgeSampling, generate_tokens
from tokenbridge.sampling.load import find_model, on_meta

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
    counted = on_meta(TokenBridge, {**TINY, **changes})
    ours = tokenbridge_cost.count_flop(counted, sampling)
    assert sum(ours.values()) == counter.get_total_flops()
    other = backbone_flop(counted.backbone, sampling, asks_all_masked=position_order == "random")
    assert other["encoder"] == ours["encoder"]
    assert other["decoder"] != ours["decoder"]  # mutation: what the loop skips would be seen


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
    assert sum(mar_cost.count_flop(on_meta(MAR, sizes), sampling).values()) == counter.get_total_flops()


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
    assert llamagen_cost.count_flop(on_meta(LlamaGen, sizes), sampling) == {"transformer": counter.get_total_flops()}


@pytest.mark.parametrize("guidance_weight", [0.0, 0.4])
def test_givt(guidance_weight: float) -> None:
    sizes = {"num_positions": 9, "num_channels": 3, "num_classes": 5, "num_components": 4}
    sizes |= {"width": 32, "depth": 2, "num_heads": 4, "mlp_width": 48}
    model = GIVT(**sizes).eval()  # type: ignore[arg-type]
    sampling = GivtSampling(guidance_weight=guidance_weight)
    with Counter() as counter:
        generate_givt(model, LABEL, sampling, lambda position: StreamNoise(0, [0], position, model))
    assert givt_cost.count_flop(on_meta(GIVT, sizes), sampling) == {"transformer": counter.get_total_flops()}


# Operations of an image by part, as hand-written formulas gave them before torch counted.
PRESETS: dict[str, tuple[int, ...]] = {
    "tokenbridge-b": (8_726_096_904_192, 13_896_266_022_912, 358_688_489_472),
    "tokenbridge-l": (40_895_244_140_544, 65_972_979_367_936, 637_299_326_976),
    "tokenbridge-h": (79_319_767_449_600, 128_919_483_187_200, 946_956_402_688),
    "tokenbridge-tiny": (226_838_528, 446_480_384, 83_132_416),
    "mar-b": (17_452_193_808_384, 27_792_532_045_824, 3_508_921_171_968),
    "mar-l": (40_895_244_140_544, 65_972_979_367_936, 7_154_727_649_280),
    "mar-h": (79_319_767_449_600, 128_919_483_187_200, 15_129_190_072_320),
    "llamagen-b-256": (102_283_345_920,),
    "llamagen-b-384": (236_932_300_800,),
    "llamagen-l-256": (169_663_791_104,),
    "llamagen-l-384": (781_606_453_248,),
    "llamagen-xl-256": (391_268_270_080,),
    "llamagen-xl-384": (1_794_681_077_760,),
    "llamagen-xxl-256": (718_371_028_992,),
    "llamagen-xxl-384": (3_287_027_810_304,),
    "llamagen-3b-256": (1_567_031_296_000,),
    "llamagen-3b-384": (7_108_263_936_000,),
    "givt-causal-256": (316_267_298_816,),
}
WITH_DECODER: dict[str, tuple[int, ...]] = {
    "tiny/tokenbridge-64": (226_838_528, 446_480_384, 83_132_416, 95_256_576),
    "tiny/tokenbridge-16": (226_838_528, 446_480_384, 81_559_552, 95_256_576),
    "tiny/parallel-64": (226_838_528, 446_480_384, 84_115_456, 95_256_576),
    "tiny/mar": (226_838_528, 446_480_384, 1_531_887_616, 95_256_576),
    "tiny/llamagen": (59_277_312, 95_252_480),
    "tiny/givt": (62_758_912, 95_256_576),
    "mar-b": (17_452_193_808_384, 27_792_532_045_824, 3_508_921_171_968, 250_135_838_720),
    "llamagen-b-256": (102_283_345_920, 252_716_253_184),
    "llamagen-b-384": (236_932_300_800, 570_121_519_104),
    "givt-causal-256": (316_267_298_816, 185_979_633_664),
}
MASKED = ["encoder", "decoder", "head"]
PARTS = {"tokenbridge": MASKED, "mar": MASKED, "llamagen": ["transformer"], "givt": ["transformer"]}


def test_every_preset_has_expected_counts() -> None:
    assert list(PRESETS) == list(all_presets())


@pytest.mark.parametrize("name", PRESETS)
def test_preset(name: str) -> None:
    system, preset = all_presets()[name]
    settings = preset.sampling_config() if preset.sampling else system.settings()
    counted = system.count_flop(on_meta(system.model, preset.model), settings)
    assert counted == dict(zip(PARTS[system.name], PRESETS[name], strict=True))


@pytest.mark.parametrize("name", WITH_DECODER)
def test_system_with_its_decoder(name: str) -> None:
    system = find_model(name)
    counted = system.flop_per_image()
    assert tuple(counted.values()) == WITH_DECODER[name]
    assert list(counted) == [*PARTS[system.system.name], "VQ decoder" if "llamagen" in name else "VAE decoder"]


def test_others_of_published_size() -> None:
    """The same table: MAR-L has the backbone of TokenBridge-L, LlamaGen-3B makes 576 tokens."""
    mar = find_model("mar-l").flop_per_image()
    assert round(mar["encoder"] / 1e12, 1) == 40.9
    # The official head embeds timestep and context for every row of every step; ours each once.
    width, context_width, rows, steps = 1280, 1024, 2 * 256, 100
    times, condition = 2 * width * (256 + width) * steps, 2 * width * context_width
    official = mar["head"] + (rows - 256) * times + (steps - 1) * rows * condition
    assert round(official / 1e12, 2) == 7.39
    llamagen = find_model("llamagen-3b-384").flop_per_image()
    # The official attention goes over all 577 slots of the cache for every token, the filled ones and the others.
    unfilled = 2 * 24 * 4 * 3200 * sum(577 - (place + 1) for place in range(576))
    counts = (llamagen["transformer"] + unfilled, llamagen["VQ decoder"], sum(llamagen.values()) + unfilled)
    assert [round(count / 1e12, 2) for count in counts] == [7.21, 0.57, 7.78]
