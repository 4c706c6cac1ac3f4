"""Our computation of the golden cases of LlamaGen and its VQ tokenizers.

Shape letters: B batch, T tokens, V codes, h, w height and width of the token grid.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenbridge.conformance.golden import Computed, Entry, Golden, choose_preset, complete, entry, with_rule_weights
from tokenbridge.models.llamagen.checkpoint import llamagen_layout
from tokenbridge.models.llamagen.model import LlamaGen
from tokenbridge.models.llamagen.presets import SIZES
from tokenbridge.models.llamagen.sampling import filter_logits
from tokenbridge.tokenizers import llamagen_vq
from tokenbridge.tokenizers.llamagen_vq import LlamaGenVQ, vq_layout
from tokenbridge.utils.errors import UserError

# Defaults of the official ModelArgs (gpt.py).
GPT_DEFAULTS: dict[str, Any] = {
    "dim": 4096,
    "n_layer": 32,
    "n_head": 32,
    "n_kv_head": None,
    "multiple_of": 256,
    "ffn_dim_multiplier": None,
    "rope_base": 10000,
    "norm_eps": 1e-5,
    "num_classes": 1000,
    "class_dropout_prob": 0.1,
    "model_type": "c2i",
    "vocab_size": 16384,
    "cls_token_num": 1,
    "block_size": 256,
}
# Arguments that do not change the evaluation; the last three have no meaning for a class-conditional model.
GPT_UNUSED = frozenset(
    {
        "initializer_range",
        "token_dropout_p",
        "attn_dropout_p",
        "resid_dropout_p",
        "ffn_dropout_p",
        "drop_path_rate",
        "caption_dim",
        "max_batch_size",
        "max_seq_len",
    }
)
# Defaults of the official `generate` and `sample`.
GENERATE_DEFAULTS: dict[str, Any] = {
    "cfg_scale": 1.0,
    "cfg_interval": -1,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "sample_logits": True,
}
# Defaults of the official ModelArgs (vq_model.py), and its arguments that do not change the evaluation.
VQ_DEFAULTS: dict[str, Any] = {
    "codebook_size": 16384,
    "codebook_embed_dim": 8,
    "codebook_l2_norm": True,
    "encoder_ch_mult": [1, 1, 2, 2, 4],
    "decoder_ch_mult": [1, 1, 2, 2, 4],
    "z_channels": 256,
}
VQ_UNUSED = frozenset({"codebook_show_usage", "commit_loss_beta", "entropy_loss_ratio", "dropout_p"})


def gpt_config(given: Mapping[str, Any]) -> dict[str, Any]:
    """Complete the official arguments of a GPT; see `complete`."""
    words = {"width": "dim", "depth": "n_layer", "num_heads": "n_head"}
    presets = {name: {words[ours]: value for ours, value in sizes.items()} for name, sizes in SIZES.items()}
    return complete(given, GPT_DEFAULTS, lambda name: _choose_preset(presets, name), unused=GPT_UNUSED)


def _choose_preset(presets: Mapping[str, Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    return choose_preset(presets, name.replace("_", "-"))  # the official function GPT_B builds GPT-B


def make_gpt(config: Mapping[str, Any]) -> LlamaGen:
    """Build the model of an official configuration on the meta device.

    Raises:
        UserError: the model is not class-conditional, or its number of positions is not a square.
    """
    if config["model_type"] != "c2i":
        raise UserError(f"The model type {config['model_type']!r} is not built here: class-conditional ('c2i') only.")
    side = math.isqrt(config["block_size"])
    if side**2 != config["block_size"]:
        raise UserError(f"block_size {config['block_size']} is not a square number of positions.")
    with torch.device("meta"):
        return LlamaGen(
            latent_size=side,
            num_codes=config["vocab_size"],
            num_classes=config["num_classes"],
            width=config["dim"],
            depth=config["n_layer"],
            num_heads=config["n_head"],
            num_kv_heads=config["n_kv_head"],
            hidden_factor=config["ffn_dim_multiplier"],
            hidden_multiple=config["multiple_of"],
            rotary_base=config["rope_base"],
            norm_eps=config["norm_eps"],
            num_zero_rows=config["cls_token_num"],
        ).eval()


def gpt_with_rule_weights(golden: Golden) -> tuple[LlamaGen, bool]:
    """Return the case's model with its weights, and whether it has an embedding for "no class"."""
    config = gpt_config(golden.meta["config"])
    # With class_dropout_prob 0 the official table lacks its last row. The rule draws the other rows alike.
    return with_rule_weights(make_gpt(config), llamagen_layout, golden), config["class_dropout_prob"] > 0


def _run_logits(golden: Golden) -> Computed:
    model, has_null = gpt_with_rule_weights(golden)
    if not has_null:
        raise UserError("With class_dropout_prob 0 there is no embedding for 'no class', and no logits_null.")
    tokens, labels = golden.tensor("tokens"), golden.tensor("labels")
    logits = model(tokens, labels)
    loss = F.cross_entropy(logits.flatten(0, 1), golden.tensor("targets").flatten())
    logits_null = model(tokens, torch.full_like(labels, model.num_classes))
    return Computed({"logits": logits, "logits_null": logits_null, "loss": loss})


def _run_greedy(golden: Golden) -> Computed:
    model, has_null = gpt_with_rule_weights(golden)
    labels = golden.tensor("labels")
    arguments = {"batch": len(labels), "max_new_tokens": model.num_positions}
    arguments |= GENERATE_DEFAULTS | golden.meta["arguments"]
    if arguments["batch"] != len(labels):
        raise UserError(f"The arguments say {arguments['batch']} images; in.labels has {len(labels)}.")
    if arguments["sample_logits"] and arguments["top_k"] != 1:
        raise UserError("sample_logits draws from a random stream that the file lacks, unless top_k is 1.")
    if arguments["cfg_scale"] > 1 and not has_null:
        raise UserError("With class_dropout_prob 0 there is no embedding for 'no class', and no guidance.")
    seen = []

    def choose(logits: Tensor, place: int) -> Tensor:
        seen.append(logits)
        return logits.argmax(-1)  # temperature, top-k and top-p leave the most likely token where it is

    interval = arguments["cfg_interval"]  # counts decode steps, which begin with the second token; may be a fraction
    tokens = model.sample(
        labels,
        choose,
        guidance_scale=arguments["cfg_scale"],
        num_guided=math.floor(interval) + 2 if interval > -1 else None,
        num_tokens=arguments["max_new_tokens"],
    )
    return Computed({"tokens": tokens, "logits": torch.stack(seen, dim=1)})


def _run_filter(golden: Golden) -> Computed:
    """Filter in.logits or in.tied_logits as the names of the outputs say: `filtered_k5_p0.9`, `tied_filtered_k3`."""
    named = {f"filtered_k{top_k}_p{top_p}" for top_k, top_p in golden.meta["arguments"].get("combos", [])}
    if absent := sorted(named - set(golden.outputs)):
        raise UserError(f"Arrays are missing: {', '.join(f'out.{name}' for name in absent)}.")
    outputs, used = {}, set()
    for name in golden.outputs:
        match = re.fullmatch(r"(tied_)?filtered_k(\d+)(?:_p([\d.e-]+))?", name)
        source = f"{match[1] or ''}logits" if match else ""
        if match is None or (name not in named and not match[1]):
            raise UserError(f"Unknown arrays: out.{name}.")
        if source not in golden.inputs:
            raise UserError(f"Arrays are missing: in.{source}.")
        outputs[name] = filter_logits(golden.tensor(source), top_k=int(match[2]), top_p=float(match[3] or 1))
        used.add(source)
    if unknown := sorted(set(golden.inputs) - used):
        raise UserError(f"Unknown arrays: in.{unknown[0]}.")
    return Computed(outputs)


def vq_config(given: Mapping[str, Any]) -> dict[str, Any]:
    """Complete the official arguments of a VQ model; see `complete`."""
    presets = {
        str(preset.official_name): {
            f"{side}_ch_mult": preset.model[f"{side}_multipliers"] for side in ("encoder", "decoder")
        }
        for preset in llamagen_vq.PRESETS.values()
    }
    return complete(given, VQ_DEFAULTS, lambda name: _choose_preset(presets, name), unused=VQ_UNUSED)


def make_vq(config: Mapping[str, Any]) -> LlamaGenVQ:
    """Build the tokenizer of an official configuration on the meta device."""
    with torch.device("meta"):
        return LlamaGenVQ(
            num_codes=config["codebook_size"],
            code_channels=config["codebook_embed_dim"],
            l2_norm=config["codebook_l2_norm"],
            encoder_multipliers=tuple(config["encoder_ch_mult"]),
            decoder_multipliers=tuple(config["decoder_ch_mult"]),
            latent_channels=config["z_channels"],
        ).eval()


def _run_vq(golden: Golden) -> Computed:
    vq = with_rule_weights(make_vq(vq_config(golden.meta["config"])), vq_layout, golden)
    z = vq.latents(golden.tensor("image"))
    tokens = vq.nearest(z)
    codes = vq.lookup(tokens)
    normalised = vq.normalise(z, dim=1)
    quantized = normalised + (codes - normalised)  # the straight-through value, which is the code up to rounding
    outputs = {
        "z": z,
        "indices": tokens.flatten(),
        "quantized": quantized,
        "codebook_entry": codes,
        "decoded": vq.raw_images(codes),
        "forward": vq.raw_images(quantized),
    }
    return Computed(outputs)


ENTRIES: dict[str, dict[str, Entry]] = {
    "llamagen": {
        "logits": entry("tokens targets labels", "logits logits_null loss", _run_logits),
        "greedy": entry(
            "labels", "tokens logits", _run_greedy, " ".join(["batch", "max_new_tokens", *GENERATE_DEFAULTS])
        ),
        "filter-logits": Entry(None, None, _run_filter, frozenset({"combos"})),
        "vq": entry("image", "z indices quantized codebook_entry decoded forward", _run_vq),
    }
}
