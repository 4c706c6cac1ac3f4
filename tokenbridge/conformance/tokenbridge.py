"""Our computation of the golden cases of TokenBridge and of the KL-16 VAE.

Shape letters: B batch, L positions, C channels, H height, W width, V levels, N positions of any image, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenbridge.conformance.golden import Computed, Entry, Golden, check_keys, complete, entry, with_rule_weights
from tokenbridge.models.layers import take
from tokenbridge.models.masked import BackboneConfig, MaskedBackbone
from tokenbridge.models.noise import ImageNoise
from tokenbridge.models.tokenbridge.checkpoint import tokenbridge_layout
from tokenbridge.models.tokenbridge.heads import ARHead, HeadConfig
from tokenbridge.models.tokenbridge.model import TokenBridge
from tokenbridge.models.tokenbridge.orders import OFFICIAL_CHANNEL_ORDER
from tokenbridge.models.tokenbridge.presets import PRESETS
from tokenbridge.models.tokenbridge.sampling import TokenBridgeSampling, generate_tokens
from tokenbridge.tokenizers.kl16 import create_kl16, kl16_layout
from tokenbridge.tokenizers.quantizer import ScalarQuantizer, gaussian_bin_edges, gaussian_codebook
from tokenbridge.utils.errors import UserError
from tokenbridge.weights.official import flat_layout
from tokenbridge.weights.published import Preset, find_preset

# Defaults that the official constructors of TokenBridge and MAR share. `norm_layer_eps` stands for their argument
# `norm_layer`; the default of the bare class is that of torch.
BACKBONE_DEFAULTS: dict[str, Any] = {
    "img_size": 256,
    "vae_stride": 16,
    "patch_size": 1,
    "encoder_embed_dim": 1024,
    "encoder_depth": 16,
    "encoder_num_heads": 16,
    "decoder_embed_dim": 1024,
    "decoder_depth": 16,
    "decoder_num_heads": 16,
    "mlp_ratio": 4.0,
    "norm_layer_eps": 1e-5,
    "vae_embed_dim": 16,
    "class_num": 1000,
    "buffer_size": 64,
}
# Defaults of the official constructor (models/tokenbridge.py, class TokenBridge).
TOKENBRIDGE_DEFAULTS: dict[str, Any] = {
    **BACKBONE_DEFAULTS,
    "channel_embed_dim": 256,
    "channel_depth": 4,
    "channel_heads": 8,
    "quant_levels": 32,
    "quant_min": -5.0,
    "quant_max": 5.0,
    "std_range": 3.0,
}
# Defaults of the official `sample_tokens`; `labels` says whether labels are given.
SAMPLE_DEFAULTS: dict[str, Any] = {
    "num_iter": 64,
    "cfg": 1.0,
    "cfg_schedule": "linear",
    "labels": True,
    "temperature": 1.0,
}
# Arguments that do not change the evaluation; the official code ignores `use_quantized_value` altogether.
TRAINING_ARGUMENTS = frozenset(
    {
        "mask_ratio_min",
        "label_drop_prob",
        "attn_dropout",
        "proj_dropout",
        "grad_checkpointing",
        "use_quantized_value",
    }
)


def tokenbridge_config(given: Mapping[str, Any]) -> dict[str, Any]:
    """Complete the official arguments of a TokenBridge; see `complete`."""

    def find_sizes(name: str) -> dict[str, Any]:
        preset = find_preset(name, PRESETS)
        head = {"channel_embed_dim": "head_width", "channel_depth": "head_depth", "channel_heads": "head_num_heads"}
        return backbone_sizes(preset) | {theirs: preset.model[ours] for theirs, ours in head.items()}

    return complete(given, TOKENBRIDGE_DEFAULTS, find_sizes, unused=TRAINING_ARGUMENTS)


def backbone_sizes(preset: Preset) -> dict[str, Any]:
    """Return the arguments that an official preset function sets; the others stay at the constructor's defaults."""
    if preset.official_name is None:
        raise UserError(f"{preset.name!r} is not a preset of the official code.")
    model = preset.model
    sides = {
        f"{side}_{theirs}": model[ours]
        for side in ("encoder", "decoder")
        for theirs, ours in (("embed_dim", "width"), ("depth", f"{side}_depth"), ("num_heads", "num_heads"))
    }
    return {**sides, "norm_layer_eps": model["norm_eps"]}


def make_quantizer(config: Mapping[str, Any]) -> ScalarQuantizer:
    """Build the quantiser of an official configuration, whose range need not be symmetric about 0."""
    half = (config["quant_max"] - config["quant_min"]) / 2
    centre = (config["quant_max"] + config["quant_min"]) / 2
    codebook = gaussian_codebook(config["quant_levels"], value_range=half, num_sigmas=config["std_range"])
    return ScalarQuantizer(codebook + centre)


def make_backbone(config: Mapping[str, Any]) -> MaskedBackbone:
    """Build the backbone of an official configuration on the meta device."""
    with torch.device("meta"):
        return MaskedBackbone(
            BackboneConfig(
                num_positions=positions_a_side(config) ** 2,
                num_channels=config["vae_embed_dim"] * config["patch_size"] ** 2,
                num_classes=config["class_num"],
                width=config["encoder_embed_dim"],
                encoder_depth=config["encoder_depth"],
                decoder_depth=config["decoder_depth"],
                num_heads=config["encoder_num_heads"],
                num_buffer=config["buffer_size"],
                decoder_width=config["decoder_embed_dim"],
                decoder_num_heads=config["decoder_num_heads"],
                mlp_ratio=config["mlp_ratio"],
                norm_eps=config["norm_layer_eps"],
            )
        ).eval()


def make_head(config: Mapping[str, Any]) -> ARHead:
    """Build the head of an official configuration on the meta device."""
    with torch.device("meta"):
        return ARHead(
            HeadConfig(
                num_channels=config["vae_embed_dim"],
                num_levels=config["quant_levels"],
                context_width=config["decoder_embed_dim"],
                width=config["channel_embed_dim"],
                depth=config["channel_depth"],
                num_heads=config["channel_heads"],
                mlp_ratio=config["mlp_ratio"],
                norm_eps=config["norm_layer_eps"],
            )
        ).eval()


def make_model(config: Mapping[str, Any]) -> TokenBridge:
    """Build the whole model of an official configuration on the meta device.

    Raises:
        UserError: the official code itself cannot run the whole model with this configuration.
    """
    num_channels = len(OFFICIAL_CHANNEL_ORDER)
    if config["vae_embed_dim"] != num_channels or config["patch_size"] != 1:
        raise UserError(
            f"The official channel order is a constant for {num_channels} channels and patch size 1; with "
            f"{config['vae_embed_dim']} channels and patch size {config['patch_size']} the official code has no "
            "logits or samples either (features and the head alone can be run)."
        )
    with torch.device("meta"):
        model = TokenBridge(
            latent_size=positions_a_side(config),
            num_channels=num_channels,
            num_classes=config["class_num"],
            num_levels=config["quant_levels"],
            value_range=(config["quant_max"] - config["quant_min"]) / 2,
            num_sigmas=config["std_range"],
            width=config["encoder_embed_dim"],
            encoder_depth=config["encoder_depth"],
            decoder_depth=config["decoder_depth"],
            num_heads=config["encoder_num_heads"],
            num_buffer=config["buffer_size"],
            head_width=config["channel_embed_dim"],
            head_depth=config["channel_depth"],
            head_num_heads=config["channel_heads"],
            norm_eps=config["norm_layer_eps"],
            decoder_width=config["decoder_embed_dim"],
            decoder_num_heads=config["decoder_num_heads"],
            mlp_ratio=config["mlp_ratio"],
        ).eval()
    model.quantizer = make_quantizer(config)
    return model


def positions_a_side(config: Mapping[str, Any]) -> int:
    """Return the height of the grid of positions, which is also its width."""
    return int(config["img_size"] // config["vae_stride"] // config["patch_size"])


def _run_quantizer(golden: Golden) -> Computed:
    config = tokenbridge_config(golden.meta["config"])
    quantizer, x = make_quantizer(config), golden.tensor("x")
    tokens = quantizer.encode(x)
    per_unit = 2 * config["std_range"] / (config["quant_max"] - config["quant_min"])
    outputs = {
        "indices": tokens,
        "dequantized": quantizer.decode(tokens),
        "reconstruction_values": (quantizer.codebook - config["quant_min"]) * per_unit - config["std_range"],
        "boundaries": gaussian_bin_edges(config["quant_levels"], num_sigmas=config["std_range"]),
    }
    return Computed(outputs, {"indices": _to_midpoint(quantizer, x)}, {"dequantized": "indices"})


def _run_features(golden: Golden) -> Computed:
    config = tokenbridge_config(golden.meta["config"])
    check_shapes(golden, config)
    quantizer = make_quantizer(config)
    backbone = with_rule_weights(make_backbone(config), flat_layout, golden)
    x = _patches(golden.tensor("latents"), config)
    tokens = quantizer.encode(x)
    visible, _ = split_mask(golden.tensor("mask"))
    embedding = backbone.embed_class(golden.tensor("labels"))
    encoder = backbone.encode(quantizer.lookup(take(tokens, visible)), visible, embedding)
    outputs = {"tokens": tokens, "encoder": encoder, "z": backbone.decode(encoder, visible)}
    return Computed(outputs, {"tokens": _to_midpoint(quantizer, x)})


def _run_training_logits(golden: Golden) -> Computed:
    config = tokenbridge_config(golden.meta["config"])
    check_shapes(golden, config)
    model = with_rule_weights(make_model(config), tokenbridge_layout, golden)
    x = _patches(golden.tensor("latents"), config)
    tokens = model.quantizer.encode(x)
    visible, masked = split_mask(golden.tensor("mask"))
    logits = model(tokens, golden.tensor("labels"), visible, masked, first="training-consistent").flatten(0, 1)
    order = list(model.channel_order)
    targets = take(tokens, masked)[..., order].flatten(0, 1)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    distances = take(_to_midpoint(model.quantizer, x), masked)[..., order].flatten(0, 1)
    return Computed({"logits": logits, "loss": loss, "targets": targets}, {"targets": distances})


def _run_head(golden: Golden) -> Computed:
    """Force the given tokens through the cached sampling path, and collect the logits of each choice."""
    head = with_rule_weights(make_head(tokenbridge_config(golden.meta["config"])), flat_layout, golden)
    tokens, seen = golden.tensor("tokens"), []

    def choose(logits: Tensor, place: int) -> Tensor:
        seen.append(logits)
        return tokens[:, place]

    head.sample(golden.tensor("features"), choose, first="official")
    return Computed({"logits": torch.stack(seen, dim=1)})


def _run_sample(golden: Golden) -> Computed:
    arguments = SAMPLE_DEFAULTS | golden.meta["arguments"]
    if arguments["temperature"] != 0:
        raise UserError(f"Temperature {arguments['temperature']} draws from a random stream that the file lacks.")
    model = with_rule_weights(make_model(tokenbridge_config(golden.meta["config"])), tokenbridge_layout, golden)
    orders = golden.tensor("orders")
    if not torch.equal(orders.sort(dim=1).values, torch.arange(model.num_positions).expand_as(orders)):
        raise UserError(f"in.orders are not permutations of {model.num_positions} positions.")
    config = TokenBridgeSampling(
        num_iterations=arguments["num_iter"],
        guidance_scale=arguments["cfg"],
        # Quirk kept: any schedule but "linear" is constant in the official sample_tokens.
        guidance_schedule="linear" if arguments["cfg_schedule"] == "linear" else "constant",
        temperature=0.0,
        first_element="official",
    )
    noise = ImageNoise(orders, torch.zeros(*orders.shape, model.num_channels))  # greedy choices do not use the uniforms
    labels = golden.tensor("labels") if arguments["labels"] else None
    tokens = generate_tokens(model, labels, config, noise)
    return Computed({"tokens": tokens, "latents": model.to_latents(tokens)}, follows={"latents": "tokens"})


def check_shapes(golden: Golden, config: Mapping[str, Any]) -> None:
    """Refuse latents, masks and orders of another size, which gathering by index would not notice."""
    side = positions_a_side(config)
    length = (side**2,)
    latents = (config["vae_embed_dim"], *[side * config["patch_size"]] * 2)
    sizes = {"latents": latents, "mask": length, "orders": length}
    for name, size in sizes.items():
        if name in golden.inputs and (shape := golden.inputs[name].shape)[1:] != size:
            raise UserError(f"in.{name} has the shape {list(shape)}; the configuration needs [B, *{list(size)}].")


def _patches(latents: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Cut latents [B, C, H, W] into patches [B, L, C p p], in the order channel, row, column of a patch."""
    return F.pixel_unshuffle(latents, config["patch_size"]).flatten(2).transpose(1, 2).contiguous()


def split_mask(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the visible [B, n] and the masked [B, L - n] positions of a mask [B, L] (1 for masked), both rising.

    Raises:
        UserError: rows mask different numbers of positions, which neither code can run as one batch.
    """
    hidden = mask != 0
    counts = hidden.sum(dim=1)
    if (counts != counts[0]).any():
        raise UserError(f"The rows of the mask hide different numbers of positions: {counts.tolist()}.")
    order = hidden.to(torch.int8).argsort(dim=1, stable=True)
    num_visible = mask.shape[1] - int(counts[0])
    return order[:, :num_visible], order[:, num_visible:]


def _to_midpoint(quantizer: ScalarQuantizer, x: Tensor) -> Tensor:
    """Return the distance of every value to the nearest midpoint between two levels, in latent units."""
    places = torch.searchsorted(quantizer.midpoints, x.contiguous())
    ends = quantizer.midpoints[torch.stack([places - 1, places]).clamp(0, len(quantizer.midpoints) - 1)]
    return (ends - x).abs().amin(0)


# --------------------------------------------------------------------------------------------------- KL-16

KL16_KEYS = frozenset({"embed_dim", "ch", "ch_mult", "num_res_blocks", "attn_resolutions", "resolution"})


def _run_kl16(golden: Golden) -> Computed:
    given = golden.meta["config"]
    check_keys(given, KL16_KEYS)
    sizes: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    vae = with_rule_weights(create_kl16(**sizes), kl16_layout, golden)
    posterior = vae.encode(golden.tensor("image")).latent_dist
    decoded = vae.decode(posterior.mean).sample
    return Computed({"mean": posterior.mean, "logvar": posterior.logvar, "decoded": decoded})


ENTRIES: dict[str, dict[str, Entry]] = {
    "tokenbridge": {
        "quantizer": entry("x", "indices dequantized reconstruction_values boundaries", _run_quantizer),
        "features": entry("latents labels mask", "tokens encoder z", _run_features),
        "training-logits": entry("latents labels mask", "logits loss targets", _run_training_logits),
        "head-sampling-logits": entry("features tokens", "logits", _run_head),
        "sample": entry("labels orders", "latents tokens", _run_sample, " ".join(SAMPLE_DEFAULTS)),
    },
    "kl16": {"vae": entry("image", "mean logvar decoded", _run_kl16)},
}
