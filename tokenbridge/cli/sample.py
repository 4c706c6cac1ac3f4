"""`tokenbridge sample` and `tokenbridge models`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from pydantic_core import to_jsonable_python

from tokenbridge.cli.options import DtypeName, FileFormat, Json, Offline, Randomness, SettingsCommand, app, settings_of
from tokenbridge.utils.console import print_line, print_table
from tokenbridge.utils.errors import UserError


@app.command(cls=SettingsCommand)
def sample(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(help="A preset (tokenbridge-l, mar-l ...), SCALE/RECIPE (tiny/mar), or a path with --preset."),
    ] = "tokenbridge-tiny",
    preset: Annotated[str | None, typer.Option(help="The preset of the model at the path MODEL.")] = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="Of a preset: checkpoint, its folder, or converted; of a scale: its folder of models."),
    ] = None,
    vae: Annotated[
        Path | None, typer.Option(help="The tokenizer's file (kl16.ckpt, vq_ds16_c2i.pt ...), or its diffusers folder.")
    ] = None,
    num_images: Annotated[
        int | None,
        typer.Option(help="The number of images; 100 by default, or as many as there are labels."),
    ] = None,
    label: Annotated[int | None, typer.Option(help="The class of all images.")] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            help="A class for each image (3,7,7), or balanced, or random; by default as published, mostly balanced."
        ),
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option(
            help="Which of a preset's settings: official (the default); some presets have paper or unguided too."
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(min=0, help="The seed; an image is a function of the seed, its number and its label."),
    ] = 0,
    randomness: Annotated[
        Randomness, typer.Option(help="Random numbers of each image's own stream, or of the official global streams.")
    ] = ("per-image"),
    batch_size: Annotated[int, typer.Option(help="The number of images at a time in each process.")] = 16,
    dtype: Annotated[
        DtypeName | None, typer.Option(help="By default as published on GPUs, and fp32 elsewhere.")
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the backbone and the VAE's decoder.")] = False,
    file_format: Annotated[
        FileFormat,
        typer.Option("--format", help="png: a folder of images; npz: one file, as ADM's evaluation reads it."),
    ] = "png",
    out: Annotated[Path | None, typer.Option(help="The folder of the run; runs/MODEL-samples by default.")] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what it would take, and do nothing; exit code 2 if files are missing.")
    ] = False,
    stand_in: Annotated[
        bool,
        typer.Option(
            "--stand-in", help="Prove the path with weights drawn by a rule and few images: this is no result."
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Remove the images of an earlier run first.")] = False,
    accept_other_code: Annotated[
        bool, typer.Option("--accept-other-code", help="Go on with a run of other code or libraries; run.json says so.")
    ] = False,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Generate images, in one process or under torchrun; a run that was killed goes on where it was.

    The model's own sampling settings are options too: --guidance-scale 3 (GIVT: --guidance-weight), --temperature 0.9,
    --num-iterations 64, --top-k, --top-p, --num-diffusion-steps, --position-order, --first-element. A wrong one is
    refused with the list of those that the model has; `tokenbridge models` shows the published values.
    """
    from tokenbridge.sampling.sample import choose_run, plan_sampling, sample_model
    from tokenbridge.utils.processes import process_state

    named, config = choose_run(
        model,
        preset=preset,
        variant=variant,
        weights=weights,
        vae=vae,
        num_images=num_images,
        label=label,
        labels=_labels(labels),
        seed=seed,
        randomness=randomness,
        batch_size=batch_size,
        format=file_format,
        stand_in=stand_in,
        **settings_of(context),
    )
    if plan:
        planned = plan_sampling(named, config, out, dtype=dtype, stand_in=stand_in)
        if as_json:
            print(json.dumps(planned.as_json(), indent=2))
        else:
            print_table(f"Plan: {planned.name}", ["", ""], planned.rows())
        if planned.missing:
            sys.exit(2)
        return
    done = sample_model(
        named,
        config,
        out,
        dtype=dtype,
        compiled=compiled,
        stand_in=stand_in,
        overwrite=overwrite,
        accept_other_code=accept_other_code,
    )
    if not process_state().is_main_process:
        return
    name, report = done.sampler.name, done.report
    if as_json:
        print(json.dumps({"folder": str(done.folder), "model": name, **to_jsonable_python(report)}, indent=2))
    else:
        made = f"1 image ({name}) is" if report.num_images == 1 else f"{report.num_images} images ({name}) are"
        print_line(f"{made} in {report.samples}, an overview in {done.overview}.")


def _labels(text: str | None) -> tuple[int, ...] | Literal["balanced", "random"] | None:
    """Return what the option --labels names: a way to choose the classes, or one for each image."""
    if text is None:
        return None
    if text == "balanced":
        return "balanced"
    if text == "random":
        return "random"
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError as error:
        raise UserError(f"Labels are whole numbers separated by commas, balanced or random, not {text!r}.") from error


@app.command()
def models(as_json: Json = False) -> None:
    """List the models of all systems: size, tokens, source and licence of the weights, published scores, settings."""
    from tokenbridge.reproduction.listing import list_presets

    listed = list_presets()
    if as_json:
        print(json.dumps(to_jsonable_python(listed), indent=2))
        return
    body = []
    for listing in listed:
        scores = [f"{listing.published[name]:g}" if name in listing.published else "–" for name in ("FID", "IS")]
        settings = next(iter(listing.settings.values()), {})
        shown = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in settings.items() if k != "source" and v is not None)
        tokens = f"{listing.num_tokens:,}: {listing.token}"
        parameters = f"{listing.num_parameters:,}"
        body.append(
            [listing.name, parameters, tokens, *scores, shown or "not published", listing.licence, listing.source]
        )
    header = ["", "parameters", "tokens of an image", "FID", "IS", "settings", "licence", "weights"]
    print_table("Models, and what was published of them (50,000 images, ImageNet 256 x 256)", header, body)
