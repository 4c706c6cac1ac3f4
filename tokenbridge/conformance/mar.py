"""Our computation of the golden cases of MAR.

The rule draws weights by official name, so that parts which an entry does not use may have any size. Entries of the
backbone run with the smallest head, and entries of the head with the smallest backbone.

Shape letters: B batch, L positions, C channels, N positions of any image, S diffusion steps, R noises of a position.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokenbridge.conformance.golden import Computed, Entry, Golden, complete, entry, with_rule_weights
from tokenbridge.conformance.tokenbridge import (
    BACKBONE_DEFAULTS,
    backbone_sizes,
    check_shapes,
    positions_a_side,
    split_mask,
)
from tokenbridge.models.layers import take
from tokenbridge.models.mar.checkpoint import mar_layout
from tokenbridge.models.mar.diffusion import NUM_TIMESTEPS, Diffusion
from tokenbridge.models.mar.model import MAR, DiffusionHead, guide, sinusoid
from tokenbridge.models.mar.presets import PRESETS
from tokenbridge.models.mar.sampling import LatentNoise, MarSampling, generation
from tokenbridge.utils.errors import UserError
from tokenbridge.weights.published import find_preset

# Defaults of the official constructor (models/mar.py, class MAR).
MAR_DEFAULTS: dict[str, Any] = {
    **BACKBONE_DEFAULTS,
    "label_drop_prob": 0.1,
    "attn_dropout": 0.1,
    "proj_dropout": 0.1,
    "diffloss_d": 3,
    "diffloss_w": 1024,
    "num_sampling_steps": "100",
    "diffusion_batch_mul": 4,
}
UNUSED = frozenset({"mask_ratio_min", "grad_checkpointing"})  # the mask rate is stored, checkpointing changes nothing
# Defaults of the official `sample_tokens`. `labels` says whether labels are given; `bsz` and `progress` change nothing.
SAMPLE_DEFAULTS: dict[str, Any] = {
    "bsz": None,
    "num_iter": 64,
    "cfg": 1.0,
    "cfg_schedule": "linear",
    "labels": True,
    "temperature": 1.0,
    "progress": False,
}


def mar_config(given: Mapping[str, Any]) -> dict[str, Any]:
    """Complete the official arguments of a MAR; see `complete`."""
    # The official preset functions leave the head to their caller.
    return complete(given, MAR_DEFAULTS, lambda name: backbone_sizes(find_preset(name, PRESETS)), unused=UNUSED)


def make_mar(config: Mapping[str, Any]) -> MAR:
    """Build the model of an official configuration on the meta device."""
    with torch.device("meta"):
        return MAR(
            latent_size=positions_a_side(config) * config["patch_size"],
            num_channels=config["vae_embed_dim"],
            num_classes=config["class_num"],
            patch_size=config["patch_size"],
            width=config["encoder_embed_dim"],
            encoder_depth=config["encoder_depth"],
            decoder_depth=config["decoder_depth"],
            num_heads=config["encoder_num_heads"],
            num_buffer=config["buffer_size"],
            head_width=config["diffloss_w"],
            head_depth=config["diffloss_d"],
            norm_eps=config["norm_layer_eps"],
            decoder_width=config["decoder_embed_dim"],
            decoder_num_heads=config["decoder_num_heads"],
            mlp_ratio=config["mlp_ratio"],
        ).eval()


def _head(golden: Golden) -> tuple[DiffusionHead, Diffusion]:
    """Return the diffusion head with the case's weights, and its diffusion process."""
    config = mar_config(golden.meta["config"])
    smallest = {"img_size": config["vae_stride"] * config["patch_size"], "encoder_depth": 0, "decoder_depth": 0}
    model = with_rule_weights(make_mar(config | smallest), mar_layout, golden)
    return model.head, Diffusion(config["num_sampling_steps"])


def _run_features(golden: Golden) -> Computed:
    config = mar_config(golden.meta["config"])
    check_shapes(golden, config)
    model = with_rule_weights(make_mar(config | {"diffloss_w": 1, "diffloss_d": 0}), mar_layout, golden)
    sequence = model.to_sequence(golden.tensor("latents"))
    visible, _ = split_mask(golden.tensor("mask"))
    embedding = model.backbone.embed_class(golden.tensor("labels"))
    encoder = model.backbone.encode(take(sequence, visible), visible, embedding)
    return Computed({"tokens": sequence, "encoder": encoder, "z": model.backbone.decode(encoder, visible)})


def _run_training_loss(golden: Golden) -> Computed:
    config = mar_config(golden.meta["config"])
    check_shapes(golden, config)
    if config["attn_dropout"] or config["proj_dropout"]:
        raise UserError("Dropout draws from a random stream that the file lacks.")
    model = with_rule_weights(make_mar(config), mar_layout, golden)
    orders = golden.tensor("orders")
    batch, length = orders.shape
    masked = orders[:, : math.ceil(length * golden.inputs["mask_rate"].item())]
    mask = torch.zeros(batch, length).scatter(1, masked, 1.0)
    visible, masked = split_mask(mask)
    # The case has a row for every noise, image and position; rows of visible positions are not used.
    rows = (config["diffusion_batch_mul"], batch, length)
    t = golden.tensor("t").view(rows).gather(2, masked.expand(rows[0], -1, -1))
    noise = golden.tensor("noise").view(*rows, model.num_channels)
    noise = torch.stack([take(each, masked) for each in noise])
    dropped = golden.tensor("label_drop_u") < config["label_drop_prob"]
    sequence = model.to_sequence(golden.tensor("latents"))
    loss = model(sequence, golden.tensor("labels"), visible, masked, t, noise, dropped=dropped).mean()
    return Computed({"loss": loss, "mask": mask})


def _run_sample(golden: Golden) -> Computed:
    arguments = SAMPLE_DEFAULTS | golden.meta["arguments"]
    config = mar_config(golden.meta["config"])
    check_shapes(golden, config)
    model = with_rule_weights(make_mar(config), mar_layout, golden)
    orders = golden.tensor("orders")
    if not torch.equal(orders.sort(dim=1).values, torch.arange(model.num_positions).expand_as(orders)):
        raise UserError(f"in.orders are not permutations of {model.num_positions} positions.")
    draws = iter(range(arguments["num_iter"]))

    def draw(num_drawn: int, num_steps: int) -> Tensor:
        """Return the noise of the next iteration. Rows run over images, then positions; a second half is not used."""
        number = next(draws)
        initial, steps = golden.tensor(f"init_noise_{number}"), golden.tensor(f"step_noise_{number}")
        if len(steps) != num_steps or len(initial) != len(orders) * num_drawn:
            raise UserError(
                f"in.step_noise_{number} has {len(steps)} steps of {len(initial)} positions; the configuration asks "
                f"for {num_steps} of {len(orders) * num_drawn}."
            )
        return torch.cat([initial[None], steps[:, : len(initial)]]).unflatten(1, (len(orders), num_drawn))

    settings = MarSampling(
        num_iterations=arguments["num_iter"],
        guidance_scale=arguments["cfg"],
        guidance_schedule=arguments["cfg_schedule"],
        temperature=arguments["temperature"],
        num_diffusion_steps=config["num_sampling_steps"],
    )
    labels = golden.tensor("labels") if arguments["labels"] and "labels" in golden.inputs else None
    steps = list(generation(model, labels, settings, LatentNoise(orders, draw)))
    outputs = {
        "latents": model.to_latents(steps[-1].sequence),
        # The official mask length never falls to 0, although the last iteration predicts all positions.
        "mask_len": torch.tensor([max(1, step.iteration.still_masked) for step in steps]),
        "cfg_iter": torch.tensor([step.iteration.guidance for step in steps]),
        "num_pred": torch.tensor([step.positions.numel() for step in steps]),
    }
    for number, step in enumerate(steps):
        # Without a class, the two halves of the official batch are equal.
        halves = 2 if arguments["cfg"] != 1 and len(step.context) == len(orders) else 1
        outputs[f"z_{number}"] = step.context.repeat(halves, 1, 1).flatten(0, 1)
        outputs[f"tokens_{number}"] = step.predicted.flatten(0, 1)
    return Computed(outputs)


def _run_diffusion_net(golden: Golden) -> Computed:
    head, _ = _head(golden)
    x, t, context = (golden.tensor(name) for name in ("x", "t", "c"))
    # The official forward_with_cfg uses the first half of x twice, but t and c row by row.
    both = head(x[: len(x) // 2].repeat(2, 1), t, context)
    variance = both[:, head.num_channels :]
    guided = guide(both, golden.meta["arguments"].get("cfg_scale", 1.0))
    return Computed(
        {
            "out": head(x, t, context),
            "out_cfg": torch.cat([guided[:, : head.num_channels].repeat(2, 1), variance], dim=1),
            "t_embed": head.time_embed(t),
            "t_freq": sinusoid(t),
        }
    )


def _run_diffusion_training_loss(golden: Golden) -> Computed:
    head, _ = _head(golden)
    process = Diffusion(NUM_TIMESTEPS)
    start, t, noise, context, mask = (golden.tensor(name) for name in ("x_start", "t", "noise", "c", "mask"))
    x = process.add_noise(start, noise, t)
    mse, vb = process.losses(start, x, noise, t, head(x, process.timesteps[t], context))
    loss = mse + vb
    mean = (loss * mask).sum() / mask.sum()
    return Computed({"loss": loss, "mse": mse, "vb": vb, "masked_mean_loss": mean})


def _run_diffusion_step(golden: Golden) -> Computed:
    head, process = _head(golden)
    x, t, context, noise = (golden.tensor(name) for name in ("x", "t", "c", "noise"))
    output = head(x, process.timesteps[t], context)
    reverse = process.reverse(x, t, output)
    temperature = golden.meta["arguments"].get("temperature", 1.0)
    rows = [
        process.step(x[i : i + 1], step, output[i : i + 1], noise[i : i + 1], temperature)
        for i, step in enumerate(t.tolist())
    ]
    return Computed(
        {
            "mean": reverse.mean,
            "log_variance": reverse.log_variance,
            "pred_xstart": reverse.start,
            "sample": torch.cat(rows),
            "timestep_map": process.timesteps,
        }
    )


def _run_diffusion_sample(golden: Golden) -> Computed:
    head, process = _head(golden)
    arguments = golden.meta["arguments"]
    initial, steps = golden.tensor("init_noise"), golden.tensor("step_noise")
    trajectory = head.sample(
        process,
        golden.tensor("z"),
        torch.cat([initial[None], steps[:, : len(initial)]]),
        guidance=arguments.get("cfg", 1.0),
        temperature=arguments.get("temperature", 1.0),
    )
    xs = torch.stack(list(trajectory))
    return Computed({"sample": xs[-1], "trajectory": xs, "timestep_map": process.timesteps})


ENTRIES: dict[str, dict[str, Entry]] = {
    "mar": {
        "features": entry("latents labels mask orders", "tokens encoder z", _run_features, "num_masked"),
        "training-loss": entry("latents labels orders mask_rate label_drop_u t noise", "loss mask", _run_training_loss),
        "sample": entry(
            "orders init_noise_* step_noise_*",
            "latents mask_len cfg_iter num_pred z_* tokens_*",
            _run_sample,
            " ".join(SAMPLE_DEFAULTS),
            optional="labels",
        ),
        "diffusion-net": entry("x t c", "out out_cfg t_embed t_freq", _run_diffusion_net, "cfg_scale"),
        "diffusion-training-loss": entry(
            "x_start t noise c mask", "loss mse vb masked_mean_loss", _run_diffusion_training_loss
        ),
        "diffusion-step": entry(
            "x t c noise", "mean log_variance pred_xstart sample timestep_map", _run_diffusion_step, "temperature"
        ),
        "diffusion-sample": entry(
            "z init_noise step_noise", "sample trajectory timestep_map", _run_diffusion_sample, "temperature cfg"
        ),
    },
}
