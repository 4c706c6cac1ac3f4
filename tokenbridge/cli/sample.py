"""`tokenbridge sample` and `tokenbridge models`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer
from rich.markup import escape

from tokenbridge.cli.options import Json, app
from tokenbridge.utils.console import print_table
from tokenbridge.utils.errors import UserError


@app.command()
def sample(
    model: Annotated[
        str,
        typer.Argument(help="A preset (tokenbridge-l, mar-l ...), SCALE/RECIPE (tiny/mar), or a path and --preset."),
    ] = "tokenbridge-tiny",
    preset: Annotated[str | None, typer.Option(help="Which model is at the path MODEL.")] = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="Of a preset: checkpoint, its folder, or converted; of a scale: its folder of models."),
    ] = None,
    vae: Annotated[
        Path | None, typer.Option(help="The tokenizer's file (kl16.ckpt, vq_ds16_c2i.pt ...) or a diffusers folder.")
    ] = None,
    num_images: Annotated[int | None, typer.Option(help="How many; 100, or as many as labels, by default.")] = None,
    label: Annotated[int | None, typer.Option(help="One class for all images.")] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            help="A class for each image (3,7,7), balanced or random; by default as published: mostly balanced."
        ),
    ] = None,
    variant: Annotated[
        str | None, typer.Option(help="Of a preset's settings: official (default), or paper, unguided, if it has them.")
    ] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="1 is no guidance; the model's own by default.")] = None,
    guidance_weight: Annotated[float | None, typer.Option(help="Of GIVT; 0 is no guidance.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest token.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Of LlamaGen; 0 keeps all codes.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Of LlamaGen; 1 keeps all codes.")] = None,
    num_diffusion_steps: Annotated[str | None, typer.Option(help="Of MAR: a number, or another spacing.")] = None,
    num_iterations: Annotated[int | None, typer.Option(help="At most the number of positions.")] = None,
    position_order: Annotated[str | None, typer.Option(help="random, raster or confidence.")] = None,
    first_element: Annotated[str | None, typer.Option(help="Of the AR head: official or training-consistent.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="An image is a function of seed, number and label.")] = 0,
    randomness: Annotated[str, typer.Option(help="per-image, or official: global streams.")] = "per-image",
    batch_size: Annotated[int, typer.Option(help="Images at a time in each process.")] = 16,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16; by default as published for such models on GPUs, else fp32.")
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile backbone and VAE decoder.")] = False,
    file_format: Annotated[str, typer.Option("--format", help="png: a folder; npz: one file as ADM reads.")] = "png",
    out: Annotated[Path | None, typer.Option(help="Folder of the run; runs/MODEL-samples by default.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what it would take, and do nothing.")] = False,
    stand_in: Annotated[
        bool, typer.Option("--stand-in", help="Weights drawn by a rule, few images and iterations: no result.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Generate images, in one process or under torchrun; a run that was killed goes on where it was."""
    from tokenbridge.sampling.config import RunConfig
    from tokenbridge.sampling.load import STAND_IN_IMAGES, find_system, with_artifacts
    from tokenbridge.sampling.plan import plan_run
    from tokenbridge.sampling.run import sampling_run, save_overview
    from tokenbridge.utils.devices import process_state

    system = find_system(model, preset=preset, variant=variant, weights=weights, vae=vae)
    if stand_in:
        system = system.for_stand_in()
        if num_images is None and labels in (None, "balanced", "random"):
            num_images = STAND_IN_IMAGES
    steps = num_diffusion_steps
    given = {
        "guidance_scale": guidance_scale,
        "guidance_weight": guidance_weight,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "num_diffusion_steps": int(steps) if steps is not None and steps.isdecimal() else steps,
        "num_iterations": num_iterations,
        "position_order": position_order,
        "first_element": first_element,
    }
    system = system.sampled(**{key: value for key, value in given.items() if value is not None})
    chosen_labels = system.labels if label is None and labels is None else _labels(label, labels, num_images)
    if num_images is None:
        num_images = len(chosen_labels) if isinstance(chosen_labels, tuple) else 100
    config = RunConfig(
        num_images,
        labels=chosen_labels,
        seed=seed,
        randomness=cast("Any", randomness),
        batch_size=batch_size,
        format=cast("Any", file_format),
    )
    system.check(config)
    out = out or Path("runs") / f"{system.name.replace('/', '-')}-{'stand-in' if stand_in else 'samples'}"
    state = process_state()
    chosen_dtype = system.dtype(dtype, state.device)
    if plan:
        planned = plan_run(
            system,
            config,
            out,
            device=state.device,
            dtype=chosen_dtype,
            num_processes=state.num_processes,
            missing=[] if stand_in else system.missing(),
        )
        if as_json:
            print(json.dumps(planned.as_json(), indent=2))
        else:
            print_table(f"Plan: {planned.name}", ["", ""], planned.rows())
        return
    if system.is_published and not stand_in:
        system = with_artifacts(system)
    make = system.stand_in if stand_in else system.load
    sampler = make(state.device, dtype=chosen_dtype, compiled=compiled)
    report = sampling_run(sampler, config, out)
    if not state.is_main_process:
        return
    save_overview(out / "grid.png", report.samples, f"{sampler.name}, seed {seed}, {report.num_images} images")
    if as_json:
        print(json.dumps({"folder": str(out), "model": sampler.name, **report.as_json()}, indent=2))
    else:
        print(f"{report.num_images} images ({sampler.name}) are in {report.samples}, an overview in {out}/grid.png.")


def _labels(
    label: int | None, labels: str | None, num_images: int | None
) -> tuple[int, ...] | Literal["random"] | None:
    """Return the labels that the options --label and --labels ask for; None for balanced ones."""
    if label is not None and labels is not None:
        raise UserError("--label gives one class for all images, --labels one for each: name one of them.")
    if label is not None:
        return (label,) * (100 if num_images is None else num_images)
    if labels is None or labels == "balanced":
        return None
    if labels == "random":
        return "random"
    try:
        return tuple(int(number) for number in labels.split(","))
    except ValueError as error:
        raise UserError(f"Labels are whole numbers separated by commas, balanced or random, not {labels!r}.") from error


@app.command()
def models(as_json: Json = False) -> None:
    """List the models of all systems: size, tokens, source and licence of the weights, published scores, settings."""
    from tokenbridge.models.listing import list_presets

    listed = list_presets()
    if as_json:
        print(json.dumps([listing.as_json() for listing in listed], indent=2))
        return
    body = []
    for listing in listed:
        scores = [f"{listing.published[name]:g}" if name in listing.published else "–" for name in ("FID", "IS")]
        settings = next(iter(listing.settings.values()), {})
        shown = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in settings.items() if k != "source" and v is not None)
        tokens = f"{listing.num_tokens:,}: {listing.token}"
        parameters = f"{listing.num_parameters:,}"
        source, licence = escape(listing.source), escape(listing.licence)
        body.append([listing.name, parameters, tokens, *scores, shown or "not published", licence, source])
    header = ["", "parameters", "tokens of an image", "FID", "IS", "settings", "licence", "weights"]
    print_table("Models, and what was published of them (50,000 images, ImageNet 256 x 256)", header, body)
