"""Discrepancies of the baselines' code."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor

from tokenbridge.data.images import images_to_pixels
from tokenbridge.models.givt import density
from tokenbridge.models.givt import model as givt
from tokenbridge.models.givt import sampling as givt_sampling
from tokenbridge.models.llamagen import model as llamagen
from tokenbridge.models.llamagen import sampling as llamagen_sampling
from tokenbridge.models.noise import PerImage
from tokenbridge.reproduction.discrepancies.study import (
    BATCH_SIZE,
    Arm,
    Scores,
    Study,
    has_weights,
    no_weights,
    not_run_row,
    row_of,
    rows_of,
    share,
)
from tokenbridge.results.schema import Row
from tokenbridge.sampling.sample import image_batches, sample_pixels

NUM_GIVT_IMAGES = 100  # they have enough tokens, and 1,000 proposals for each token take memory


class EnvelopedDensity(density.GuidedDensity):
    """The guided density of GIVT, under a constant that makes the proposal a true envelope."""

    def bound(self) -> Tensor:
        """Return the least constant [N, C] with density <= constant * proposal everywhere; infinite if none is."""
        c, u, w = self.conditional, self.unconditional, self.weight
        # The log of density over proposal is a parabola in x.
        curvature = (1 + w) / c.scale.square() - w / u.scale.square() - 1 / self.proposal.scale.square()
        top = c.loc + w * (c.loc - u.loc) / u.scale.square() / curvature
        height = (self.log_prob(top) - self.proposal.log_prob(top)).exp()
        return torch.where(curvature > 0, height, torch.inf)

    def standardised(self, x: Tensor) -> Tensor:
        """Return x [N, C] in units of the density, where that is a Gaussian; NaN elsewhere."""
        c, u, w = self.conditional, self.unconditional, self.weight
        precision = (1 + w) / c.scale.square() - w / u.scale.square()
        mean = ((1 + w) * c.loc / c.scale.square() - w * u.loc / u.scale.square()) / precision
        return (x - mean) * precision.sqrt()


def givt_guidance(study: Study) -> list[Row]:
    """Compare GIVT's rejection sampling of the guided density with sampling under a true envelope, token by token.

    The official constant is searched on 1,001 points and divided by the proposal's highest density, so it may be
    too small. The tokens belong to images sampled the official way, and both arms see the same densities and proposals.
    """
    arms: dict[str, tuple[str, type[density.GuidedDensity]]] = {
        "official": ("constant of the official code", density.GuidedDensity),
        "envelope": ("true envelope", EnvelopedDensity),
    }
    if not has_weights(study, "givt"):
        reason = no_weights("givt")
        return [not_run_row(f"givt-guidance-rejection-{name}", label, reason) for name, (label, _) in arms.items()]
    model, config = _givt(study)
    mixtures = givt_mixtures(model, config, study.labels[:NUM_GIVT_IMAGES], study.seed)
    draws, densities = zip(
        *(draw_by(kind, mixtures, config, study.seed + 1, model) for _, kind in arms.values()), strict=True
    )
    true = EnvelopedDensity(densities[0].conditional, densities[0].unconditional, densities[0].weight)
    envelope = true.bound()
    # Both arms are judged by the same tokens, those that both drew from the density where it is a Gaussian.
    standardised = [true.standardised(draw.values) for draw in draws]
    both = torch.stack([_first(d) >= 0 for d in draws]).all(0) & standardised[0].isfinite()
    rows = []
    for (name, (label, _)), draw, drawn in zip(arms.items(), draws, standardised, strict=True):
        first, bound = _first(draw), draw.bound
        assert bound is not None
        metrics = {
            "fallbacks": share(first < 0),
            "acceptance": (first >= 0).sum().item() / max(1, (first[first >= 0] + 1).sum().item()),
            # The slack is needed because the two constants are computed in different ways, in float32.
            "not covered": share((bound < envelope * (1 - 1e-4)) & bound.isfinite()),
            "deviation of draws": drawn[both].double().std().item(),
        }
        rows.append(row_of(f"givt-guidance-rejection-{name}", label, metrics))
    return rows


@torch.inference_mode()
def givt_mixtures(
    model: givt.GIVT, config: givt_sampling.GivtSampling, labels: Tensor, seed: int
) -> tuple[density.Mixture, density.Mixture]:
    """Return conditional and unconditional mixtures [N L] of every token of images sampled the official way."""
    labels = labels.to(model.device)
    latents = givt_sampling.generate(model, labels, config, PerImage(seed, range(len(labels))))
    sequence = model.to_sequence(latents)
    none = torch.ones_like(labels, dtype=torch.bool)
    logits = [model(sequence, labels, dropped=dropped).flatten(0, 1) for dropped in (~none, none)]
    conditional, unconditional = (
        model.mixture(part, temperature=config.temperature, temp_probs=config.temp_probs) for part in logits
    )
    return conditional, unconditional


def draw_by(
    kind: type[density.GuidedDensity],
    mixtures: tuple[density.Mixture, density.Mixture],
    config: givt_sampling.GivtSampling,
    seed: int,
    model: givt.GIVT,
) -> tuple[givt_sampling.Draw, density.GuidedDensity]:
    """Draw every token again from a density of the given kind, as `givt_sampling.draw_token` does.

    Every token has its own stream of random numbers.
    """
    conditional, unconditional = mixtures
    noise = givt_sampling.StreamNoise(seed, list(range(len(conditional.log_weights))), 0, model)
    component = (conditional.log_weights + noise.gumbels()).argmax(-1)
    plain = conditional.component(component)
    values = plain.at(noise.normals(component))
    density = kind(plain, unconditional.component(component), config.guidance_weight)
    return givt_sampling.draw_guided(density, values, noise, config.num_proposals), density


def _first(draw: givt_sampling.Draw) -> Tensor:
    assert draw.first_accepted is not None
    return draw.first_accepted


def givt_no_class(study: Study) -> list[Row]:
    """Compare a trained embedding for "no class", which guidance needs, with one that stayed as it was initialised.

    The trainer published with GIVT never passes on the switch for label dropout, so that row gets no gradient in it
    (big_vision, trainers/proj/givt/generative.py).
    """
    trained, untrained = "trained with label dropout", "as initialised (published trainer)"
    if not has_weights(study, "givt"):
        reason = no_weights("givt")
        return [
            not_run_row(f"givt-no-class-{n}", t, reason) for n, t in (("trained", trained), ("untrained", untrained))
        ]
    model, _ = _givt(study)

    sampler = study.bench.sampler("givt")

    def scores(model: givt.GIVT) -> list[Scores]:
        changed = replace(sampler, model=model)
        made = (sample_pixels(changed, study.labels, seed, show_progress=False) for seed in study.seeds)
        return [study.score(p, study.labels) for p in made]

    return rows_of(
        "givt-no-class",
        Arm("trained", trained, scores(model)),
        Arm("untrained", untrained, scores(without_class_training(model, study.seed))),
    )


def without_class_training(model: givt.GIVT, seed: int) -> givt.GIVT:
    """Return a copy of the model whose embedding for "no class" is drawn again from N(0, 1), as `nn.Embedding` does."""
    model = copy.deepcopy(model)
    fresh = torch.randn(model.class_emb.embedding_dim, generator=torch.Generator().manual_seed(seed))
    model.class_emb.weight.data[-1] = fresh
    return model


def _givt(study: Study) -> tuple[givt.GIVT, givt_sampling.GivtSampling]:
    config = study.bench.scale.recipe("givt").sampling
    assert isinstance(config, givt_sampling.GivtSampling)
    return study.bench.model("givt"), config


def llamagen_zero_row(study: Study) -> list[Row]:
    """Compare two rotary rows for LlamaGen's class token: the zeros of the code, and no rotation (cosine 1, sine 0).

    With zeros the class token's key is zero, and every query gives it the score 0, whatever the class is. The weights
    are trained with zeros, and the comparison shows how much they depend on that.
    """
    official, turned = "zeros (official code)", "cosine 1, sine 0"
    if not (has_weights(study, "llamagen") and has_weights(study, "vq")):
        reason = no_weights("llamagen or vq")
        return [
            not_run_row(f"llamagen-zero-row-{n}", t, reason) for n, t in (("official", official), ("rotated", turned))
        ]
    model: llamagen.LlamaGen = study.bench.model("llamagen")
    config = study.bench.scale.recipe("llamagen").sampling
    assert isinstance(config, llamagen_sampling.LlamaGenSampling)

    def generate(model: llamagen.LlamaGen, seed: int) -> Tensor:
        batches = image_batches(study.num_images, BATCH_SIZE, show_progress=False)
        return torch.cat(
            [llamagen_sampling.generate(model, study.labels[i], config, PerImage(seed, i)) for i in batches]
        )

    def scores(tokens: Tensor) -> Scores:
        grids = tokens.unflatten(1, (model.latent_size, model.latent_size)).split(BATCH_SIZE)
        return study.score(torch.cat([images_to_pixels(study.bench.vq.decode(g)).cpu() for g in grids]), study.labels)

    tokens = [[generate(m, seed) for seed in study.seeds] for m in (model, rotated(model))]
    differ = [share(torch.stack(arm) != torch.stack(tokens[0])) for arm in tokens]
    named = zip(("official", "rotated"), (official, turned), tokens, differ, strict=True)
    return rows_of(
        "llamagen-zero-row",
        *(
            Arm(name, label, [scores(t) for t in arm], {"generated tokens that differ": d})
            for name, label, arm, d in named
        ),
    )


def rotated(model: llamagen.LlamaGen) -> llamagen.LlamaGen:
    """Return a copy of the model whose class token is rotated by the angle 0 and not multiplied by zero."""
    model = copy.deepcopy(model)
    rows = model.rotary_rows()
    rows[: model.rotary[2], :, 0] = 1.0
    model.rotary_rows = lambda: rows  # type: ignore[method-assign]
    return model
