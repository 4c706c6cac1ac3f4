"""Our computation of the golden cases of GIVT and its VAE.

Shape letters: B batch, L positions, C channels, M components of the mixture, D channels of any density, K proposals.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tokenbridge.conformance.golden import (
    Computed,
    Entries,
    Entry,
    Golden,
    check_keys,
    choose_preset,
    complete,
    entry,
    with_rule_weights,
)
from tokenbridge.models.givt.checkpoint import givt_layout, scan, unroll
from tokenbridge.models.givt.density import Gaussian, GuidedDensity, Mixture
from tokenbridge.models.givt.model import GIVT
from tokenbridge.models.givt.sampling import Draw, GivtSampling, draw_guided, draw_token, generate_draws
from tokenbridge.tokenizers.givt_vae import GivtVAE, givt_vae_layout
from tokenbridge.utils.errors import UserError
from tokenbridge.weights.official import load_official
from tokenbridge.weights.rule import draw_rule

# Defaults of the official constructor (models/proj/givt/givt.py, class Model).
GIVT_DEFAULTS: dict[str, Any] = {
    "num_heads": 8,
    "num_layers": 0,
    "num_decoder_layers": 6,
    "mlp_dim": 2048,
    "emb_dim": 512,
    "num_labels": 1000,
    "seq_len": 256,
    "posemb_type": "learn",
    "style": "ar",
    "num_mixtures": 4,
    "multivariate": False,
    "out_dim": 32,
    "scale_tol": 1e-6,
    "drop_labels_probability": 0.0,
    "fix_square_plus": False,
    "per_channel_mixtures": True,
    "scan": False,
}
# Arguments that do not change the evaluation of a causal model without an encoder.
GIVT_UNUSED = frozenset(
    {
        "enc_dropout_rate",
        "dec_dropout_rate",
        "patches",
        "input_size",
        "zero_decoder_seq",
        "zero_embedding_init",
        "mask_schedule_train",
        "min_masking_rate_training",
        "mask_style",
        "remat_policy",
    }
)
# Sizes by name (configs/proj/givt/givt_imagenet2012.py, GIVT_MODELS), and the arguments that all of them share.
IMAGENET: dict[str, Any] = {
    "num_mixtures": 16,
    "out_dim": 16,
    "drop_labels_probability": 0.1,
    "fix_square_plus": True,
    "per_channel_mixtures": False,
    "scan": True,
}
GIVT_PRESETS: dict[str, dict[str, Any]] = {
    name: {"num_decoder_layers": depth, "num_heads": heads, "mlp_dim": mlp, "emb_dim": width, **IMAGENET}
    for name, depth, heads, mlp, width in (
        ("base", 12, 12, 3072, 768),
        ("default", 24, 16, 4096, 1024),
        ("large", 48, 16, 8192, 1536),
        ("givt_causal_256", 24, 16, 4096, 1024),
    )
}
# The only values that our GIVT supports, which is the causal model for ImageNet.
GIVT_FIXED: dict[str, tuple[Any, str]] = {
    "num_layers": (0, "an encoder needs an image, which these cases lack"),
    "posemb_type": ("learn", "the official code asserts it"),
    "style": ("ar", "the masked (MaskGIT) model is not built here"),
    "multivariate": (False, "full covariances are not built here; no ImageNet model has them"),
    "per_channel_mixtures": (False, "mixtures of single channels are not built here; no ImageNet model has them"),
}

# Defaults of the official constructor (models/proj/givt/cnn.py and vae.py, class Model).
VAE_DEFAULTS: dict[str, Any] = {
    "codeword_dim": None,
    "filters": 128,
    "num_res_blocks": 2,
    "channel_multipliers": (),
    "conv_downsample": False,
    "activation_fn": "swish",
    "norm_type": "GN",
    "output_dim": 3,
    "malib_ckpt": False,
    "pixel_shuffle_patch_size": (1, 1),
}
VAE_UNUSED = frozenset({"code_len", "code_dropout", "dtype"})  # used in training only, or with a single possible value
VAE_PRESETS: dict[str, dict[str, Any]] = {
    "givt_vae": {"codeword_dim": 16, "channel_multipliers": (1, 1, 2, 2, 4), "malib_ckpt": True}
}
VAE_FIXED: dict[str, tuple[Any, str]] = {
    "norm_type": ("GN", "no other normalisation is built here; no ImageNet model has one"),
    "pixel_shuffle_patch_size": ((1, 1), "patches of latents are not built here; only the 512 px model has them"),
}

# Defaults of the official sampling functions, which also replace None in a case.
SAMPLE_DEFAULTS: dict[str, Any] = {
    "temp": 1.0,
    "temp_probs": 1.0,
    "cfg_inference_weight": 0.0,
    "max_samples": 1000,
}


def givt_config(given: Mapping[str, Any]) -> dict[str, Any]:
    """Complete the official arguments of a GIVT; see `complete`."""
    find_sizes = partial(choose_preset, GIVT_PRESETS)
    return complete(_without_null_preset(given), GIVT_DEFAULTS, find_sizes, unused=GIVT_UNUSED, fixed=GIVT_FIXED)


def vae_config(given: Mapping[str, Any]) -> dict[str, Any]:
    """Complete the official arguments of GIVT's VAE; see `complete`."""
    find_sizes = partial(choose_preset, VAE_PRESETS)
    return complete(_without_null_preset(given), VAE_DEFAULTS, find_sizes, unused=VAE_UNUSED, fixed=VAE_FIXED)


def _without_null_preset(given: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in given.items() if key != "preset" or value is not None}


def make_givt(given: Mapping[str, Any]) -> GIVT:
    """Build the model of an official configuration on the meta device.

    Raises:
        UserError: the configuration is refused by `complete`, or the model has no labels or never uses them.
    """
    config = givt_config(given)
    if config["num_labels"] is None:
        raise UserError("num_labels None cannot be run: a model without labels is not built here.")
    if config["drop_labels_probability"] >= 0.999:
        raise UserError("drop_labels_probability 0.999 or more cannot be run: such a model never uses its labels.")
    with torch.device("meta"):
        return GIVT(
            num_positions=config["seq_len"],
            num_channels=config["out_dim"],
            num_classes=config["num_labels"],
            num_components=config["num_mixtures"],
            width=config["emb_dim"],
            depth=config["num_decoder_layers"],
            num_heads=config["num_heads"],
            mlp_width=config["mlp_dim"],
            null_class=config["drop_labels_probability"] > 0,
            fix_square_plus=config["fix_square_plus"],
            scale_floor=config["scale_tol"],
        ).eval()


def make_vae(given: Mapping[str, Any]) -> GivtVAE:
    """Build the VAE of an official configuration on the meta device."""
    config = vae_config(given)
    with torch.device("meta"):
        return GivtVAE(
            latent_channels=config["codeword_dim"],
            width=config["filters"],
            width_multipliers=config["channel_multipliers"],
            num_res_blocks=config["num_res_blocks"],
            image_channels=config["output_dim"],
            activation=config["activation_fn"],
            conv_downsample=config["conv_downsample"],
            unit_images=config["malib_ckpt"],
        ).eval()


def _givt(golden: Golden) -> GIVT:
    """Return the case's model with its weights, which the rule draws in the scanned or the unrolled layout."""
    given = golden.meta["config"]
    model = make_givt(given)
    _check_count(model, golden)
    layout = givt_layout(model)
    shapes = {name: mapping.shape for name, mapping in layout.mappings.items()}
    if givt_config(given)["scan"]:
        empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        shapes = {name: tuple(tensor.shape) for name, tensor in scan(empty).items()}
    load_official(model, unroll(draw_rule(shapes, golden.meta["weights"])), layout)
    return model


def _check_count(module: torch.nn.Module, golden: Golden) -> None:
    count, expected = sum(p.numel() for p in module.parameters()), golden.meta["arguments"].get("num_params")
    if expected not in (None, count):
        raise UserError(f"The model has {count:,} parameters; the case says {expected:,}.")


def _sampling(golden: Golden) -> GivtSampling:
    """Return the case's sampling settings."""
    given = {key: value for key, value in golden.meta["arguments"].items() if value is not None}
    arguments = SAMPLE_DEFAULTS | given
    return GivtSampling(
        temperature=arguments["temp"],
        temp_probs=arguments["temp_probs"],
        guidance_weight=arguments["cfg_inference_weight"],
        num_proposals=arguments["max_samples"],
    )


@dataclass
class StoredNoise:
    """The random numbers of one position, which a golden file holds."""

    gumbel: Tensor | None = None  # [B, M]
    normal: Tensor | None = None  # [B, M, C] for every component, or [B, C]
    simple_noise: Tensor | None = None  # [K, B, C]
    uniform: Tensor | None = None  # [K, B, C]
    tried: int = 0

    def gumbels(self) -> Tensor:
        """Return the Gumbel noise of the components, [B, M]."""
        assert self.gumbel is not None
        return self.gumbel

    def normals(self, component: Tensor) -> Tensor:
        """Return the normal noise of the chosen components, [B, C]."""
        assert self.normal is not None
        return self.normal if self.normal.ndim == 2 else self.normal[torch.arange(len(component)), component]

    def proposals(self, rows: Tensor, num: int) -> tuple[Tensor, Tensor]:
        """Return the normal and the uniform noise of the next proposals, each [num, len(rows), C]."""
        assert self.simple_noise is not None
        assert self.uniform is not None
        if self.tried + num > len(self.simple_noise):
            raise UserError(f"The case needs more proposals than the {len(self.simple_noise)} for which it has noise.")
        which = slice(self.tried, self.tried + num)
        self.tried += num
        return self.simple_noise[which, rows], self.uniform[which, rows]


def _mixture_outputs(mixture: Mixture, prefix: str = "") -> dict[str, Tensor]:
    return {
        f"{prefix}mixture_logprobs": mixture.log_weights,
        f"{prefix}mixture_probs": mixture.log_weights.exp(),
        f"{prefix}locs": mixture.locs,
        f"{prefix}scales": mixture.scales,
    }


def _likelihood_outputs(model: GIVT, latents: Tensor, logits: Tensor) -> dict[str, Tensor]:
    mixture = model.mixture(logits)
    nll = -mixture.log_prob(latents)
    sums = {"nll": nll, "nll_sum": nll.sum(1), "nll_mean": nll.mean(1)}
    return {"logits": logits, **_mixture_outputs(mixture), **sums}


def _run_logits(golden: Golden) -> Computed:
    model, latents, labels = _givt(golden), golden.tensor("latents"), golden.tensor("labels")
    return Computed(_likelihood_outputs(model, latents, model(latents, labels)))


def _run_nolabel(golden: Golden) -> Computed:
    model, latents, labels = _givt(golden), golden.tensor("latents"), golden.tensor("labels")
    dropped, mixed = (golden.tensor(name).bool() for name in ("drop_labels", "drop_labels_mixed"))
    outputs = _likelihood_outputs(model, latents, model(latents, labels, dropped=dropped))
    return Computed(outputs | {"logits_mixed": model(latents, labels, dropped=mixed)})


def _run_sample_step(golden: Golden) -> Computed:
    model, config = _givt(golden), _sampling(golden)
    prefix, labels = golden.tensor("prefix"), golden.tensor("labels")
    if prefix.shape[1] != golden.meta["arguments"].get("prefix_len", prefix.shape[1]):
        raise UserError(f"in.prefix has {prefix.shape[1]} positions, not prefix_len.")
    rows = torch.cat([labels, model.without_class(labels)])
    cache, x = model.empty_cache(len(rows)), model.class_emb(rows)
    for position in range(prefix.shape[1]):
        model.next_logits(x, cache, position)
        x = model.latent_proj(prefix[:, position]).repeat(2, 1)
    logits = model.next_logits(x, cache, prefix.shape[1]).chunk(2)
    mixtures = [model.mixture(part, temperature=config.temperature, temp_probs=config.temp_probs) for part in logits]
    stored = {name: golden.tensor(name) for name in ("gumbel", "simple_noise", "uniform", "fallback_noise")}
    stored = {name: value.flatten(-3, -2) for name, value in stored.items()}  # joins the batch with the single position
    plain = StoredNoise(stored["gumbel"], golden.tensor("plain_noise")[:, 0])
    sample = draw_token(mixtures[0], None, config, plain).values
    guided = StoredNoise(stored["gumbel"], stored["fallback_noise"], stored["simple_noise"], stored["uniform"])
    # The official Gumbel noise chooses in.component. If it chooses another component here, the outputs differ.
    draw = draw_token(mixtures[0], mixtures[1], config, guided)
    component = (mixtures[0].log_weights + stored["gumbel"]).argmax(-1)
    conditional, unconditional = (mixture.component(component) for mixture in mixtures)
    density = GuidedDensity(conditional, unconditional, config.guidance_weight)
    log_prob = density.log_prob(golden.tensor("candidates")[:, :, 0])
    outputs = {
        "logits_cond": logits[0],
        "logits_uncond": logits[1],
        **_mixture_outputs(mixtures[0], "cond_"),
        **_mixture_outputs(mixtures[1], "uncond_"),
        "proposal_loc": density.proposal.loc,
        "plain_sample": sample,
        "plain_log_prob": mixtures[0].log_prob(sample),
        **_density_outputs(density, draw),
    }
    outputs = {name: value[:, None] for name, value in outputs.items()}
    return Computed(outputs | {"cfg_log_prob": log_prob[:, :, None], "cfg_prob": log_prob[:, :, None].exp()})


def _density_outputs(density: GuidedDensity, draw: Draw) -> dict[str, Tensor]:
    assert draw.bound is not None
    assert draw.first_accepted is not None
    return {
        "cfg_loc_c": density.conditional.loc,
        "cfg_scale_c": density.conditional.scale,
        "cfg_loc_u": density.unconditional.loc,
        "cfg_scale_u": density.unconditional.scale,
        "proposal_scale": density.proposal.scale,
        "cfg_fac": draw.bound,
        "cfg_sample": draw.values,
        "cfg_accepted": draw.first_accepted >= 0,
        "cfg_first_accept": draw.first_accepted,
    }


def _run_density(golden: Golden) -> Computed:
    """Run the rejection sampler alone on given mixtures."""
    config = golden.meta["config"]
    check_keys(config, {"cfg_inference_weight", "max_samples"})
    log_weights = golden.tensor("mixture_logits").log_softmax(-1)
    mixtures = [Mixture(log_weights, golden.tensor(f"locs_{side}"), golden.tensor(f"scales_{side}")) for side in "cu"]
    batch, length = log_weights.shape[:2]

    def rows(name: str) -> Tensor:
        return golden.tensor(name).flatten(-3, -2)  # joins batch and positions

    component = (log_weights + golden.tensor("gumbel")).argmax(-1)
    parts = [mixture.component(component) for mixture in mixtures]
    conditional, unconditional = (Gaussian(part.loc.flatten(0, 1), part.scale.flatten(0, 1)) for part in parts)
    density = GuidedDensity(conditional, unconditional, config["cfg_inference_weight"])
    noise = StoredNoise(simple_noise=rows("simple_noise"), uniform=rows("uniform"))
    fallback = density.conditional.at(rows("fallback_noise"))
    draw = draw_guided(density, fallback, noise, config.get("max_samples", SAMPLE_DEFAULTS["max_samples"]))
    outputs = _density_outputs(density, draw) | {"cfg_log_prob": density.log_prob(rows("candidates"))}
    return Computed({name: value.unflatten(-2, (batch, length)) for name, value in outputs.items()})


def _run_decode(golden: Golden) -> Computed:
    model, config, labels = _givt(golden), _sampling(golden), golden.tensor("labels")
    names = {"gumbel": "gumbel", "simple_noise": "simple_noise", "uniform": "uniform"}
    names["normal"] = "normal" if "normal" in golden.inputs else "fallback_noise"
    stored = {field: golden.tensor(name) for field, name in names.items() if name in golden.inputs}

    def noise(position: int) -> StoredNoise:
        now: dict[str, Any] = {field: value[position] for field, value in stored.items()}
        return StoredNoise(**now)

    draws = list(generate_draws(model, labels, config, noise))
    # The official loop returns 0 as log-probabilities unless it searches with beams.
    outputs = {
        "sequences": torch.stack([draw.values for draw in draws], 1),
        "returned_logprobs": torch.zeros(len(labels)),
    }
    if config.guidance_weight > 0:
        first = torch.stack([draw.first_accepted for draw in draws if draw.first_accepted is not None], 1)
        outputs["fac"] = torch.stack([draw.bound for draw in draws if draw.bound is not None], 1)
        outputs |= {"first_accept": first, "accepted": first >= 0}
    return Computed(outputs)


def _run_vae(golden: Golden) -> Computed:
    vae = make_vae(golden.meta["config"])
    _check_count(vae, golden)
    with_rule_weights(vae, givt_vae_layout, golden)
    images = golden.tensor("image").permute(0, 3, 1, 2)
    posterior = vae.encode(images).latent_dist
    mean, log_variance = posterior.mean, posterior.logvar
    if not vae.unit_images:
        log_variance = vae.moments(images).chunk(2, dim=1)[1]  # without malib_ckpt the official code does not limit it
    size = tuple(mean.shape[2:])
    z = golden.tensor("z").transpose(1, 2).unflatten(2, size)
    mu, logvar = (part.flatten(2).transpose(1, 2) for part in (mean, log_variance))
    outputs = {
        "mu": mu,
        "logvar": logvar,
        "z_sampled": mu + (0.5 * logvar).exp() * golden.tensor("eps"),
    }
    pictures = {
        "decoded": vae.decode(z).sample,
        "decoder_raw": vae.decoder(z),
        "reconstruction": vae.decode(mean).sample,
    }
    return Computed(outputs | {name: picture.permute(0, 2, 3, 1) for name, picture in pictures.items()})


def _decode_entry(golden: Golden) -> Entry:
    """Return the entry of plain or of guided decoding."""
    arguments = f"num_params {' '.join(SAMPLE_DEFAULTS)}"
    if golden.meta["arguments"].get("cfg_inference_weight"):  # as in the official code, 0 means no guidance
        noise, trace = "simple_noise uniform fallback_noise", "accepted first_accept fac"
    else:
        noise, trace = "normal", ""
    return entry(f"labels gumbel {noise}", f"sequences returned_logprobs {trace}", _run_decode, arguments)


_MIXTURE = "mixture_logprobs mixture_probs locs scales"
_LIKELIHOOD = f"logits {_MIXTURE} nll nll_sum nll_mean"
_DENSITY = "cfg_loc_c cfg_scale_c cfg_loc_u cfg_scale_u proposal_scale cfg_fac cfg_log_prob"
_DRAW = "cfg_sample cfg_accepted cfg_first_accept"
_PROPOSALS = "gumbel simple_noise uniform fallback_noise candidates"
_STEP = [f"{side}_{name}" for side in ("cond", "uncond") for name in _MIXTURE.split()]

ENTRIES: Entries = {
    "givt": {
        "causal-logits": entry("latents labels", _LIKELIHOOD, _run_logits, "num_params"),
        "causal-nolabel": entry(
            "latents labels drop_labels drop_labels_mixed", f"{_LIKELIHOOD} logits_mixed", _run_nolabel, "num_params"
        ),
        "sample-step": entry(
            f"prefix labels component plain_noise {_PROPOSALS}",
            f"logits_cond logits_uncond {' '.join(_STEP)} proposal_loc {_DENSITY} cfg_prob {_DRAW} "
            "plain_sample plain_log_prob",
            _run_sample_step,
            f"num_params prefix_len {' '.join(SAMPLE_DEFAULTS)}",
        ),
        "cfg-density": entry(
            f"mixture_logits locs_c scales_c locs_u scales_u {_PROPOSALS}", f"{_DENSITY} {_DRAW}", _run_density
        ),
        "decode": _decode_entry,
        "vae": entry(
            "image eps z", "mu logvar z_sampled decoded decoder_raw reconstruction", _run_vae, "num_params image_size"
        ),
    }
}
