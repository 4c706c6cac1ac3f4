"""Golden files: run numbers of the official code against ours (format 1 of shared/goldens/README.md).

A golden file (`.npz`) holds inputs, outputs, the official constructor's arguments and a rule that makes the
weights from the official parameter names. Here: TokenBridge and the KL-16 VAE. What cannot be run is a failure with
its reason, never a skip and never an exception.

Shape letters: B batch, L positions, C channels, H height, W width, V levels, N positions of any image, D width.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from tokenbridge.backbone import BackboneConfig, MaskedBackbone
from tokenbridge.generator import TokenBridge
from tokenbridge.heads import ARHead, HeadConfig
from tokenbridge.official import create_kl16, layout, load_official
from tokenbridge.orders import OFFICIAL_CHANNEL_ORDER
from tokenbridge.presets import find_preset
from tokenbridge.quantizer import ScalarQuantizer, gaussian_bin_edges, gaussian_codebook
from tokenbridge.sampling import ImageNoise, SamplingConfig, generate_tokens
from tokenbridge.transformer import take

FORMAT = 1
RULE = "fan-in-normal-v1"
TIE = 1e-6  # latents this near to a midpoint may round to either level: float32 error of the map to normalised units

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Outcome:
    """What became of one output of a golden file, or of the whole file (name "file") if it could not be run."""

    name: str
    error: float | None  # largest absolute difference; None if there was none to take
    tolerance: str
    verdict: Literal["pass", "fail"]
    reason: str = ""  # of a failure; or what the tolerance let through


@dataclass(frozen=True)
class Report:
    """The outcomes of one file."""

    path: str
    outcomes: list[Outcome]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every output passed."""
        return all(outcome.verdict == "pass" for outcome in self.outcomes)


@dataclass(frozen=True)
class Golden:
    """A golden file, read."""

    meta: dict[str, Any]
    inputs: Arrays
    outputs: Arrays

    def tensor(self, name: str) -> Tensor:
        """Return an input as a float32 or int64 tensor."""
        array = self.inputs[name]
        return torch.from_numpy(array.astype(np.float32 if np.issubdtype(array.dtype, np.floating) else np.int64))


@dataclass
class Computed:
    """Our outputs, and what is needed to judge them."""

    outputs: dict[str, Tensor]
    # Where a token may differ: distance of the quantised value to the nearest midpoint, by output.
    midpoint_distances: dict[str, Tensor] = field(default_factory=dict)
    # Float outputs that follow from an integer one: judged only where that one agrees.
    follows: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """One kind of golden: the arrays it must have, the arguments it may have, what computes it."""

    inputs: frozenset[str]
    outputs: frozenset[str]
    run: Callable[[Golden], Computed]
    arguments: frozenset[str] = frozenset()


def run_file(path: Path | str) -> list[Outcome]:
    """Run one golden file; one outcome for each of its outputs, or one failure if it cannot be run."""
    try:
        golden = read_golden(path)
        entry = _entry_of(golden)
        with torch.inference_mode():
            computed = entry.run(golden)
        return [_judge(name, golden, computed) for name in golden.outputs]
    except Exception as error:  # a file that breaks anything at all is a failure of that file, not of the run
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        return [Outcome("file", None, "", "fail", reason)]


def run_files(paths: Iterable[Path | str]) -> list[Report]:
    """Run golden files; a folder stands for all `.npz` files in it. Progress goes to stderr."""
    reports = []
    for path in _expand(paths):
        print(f"conformance: {path}", file=sys.stderr, flush=True)
        start = time.monotonic()
        reports.append(Report(str(path), run_file(path), round(time.monotonic() - start, 2)))
    return reports


def conformance(paths: Iterable[Path | str], *, as_json: bool = False) -> bool:
    """Run golden files, print what came out on stdout, and tell whether all passed.

    Args:
        paths: `.npz` files, or folders of them.
        as_json: print JSON instead of a table.
    """
    reports = run_files(paths)
    passed = bool(reports) and all(report.passed for report in reports)
    if as_json:
        files = [{**asdict(report), "passed": report.passed} for report in reports]
        print(json.dumps({"passed": passed, "files": files}, indent=2, allow_nan=False))
    else:
        print_reports(reports)
    return passed


def print_reports(reports: Iterable[Report]) -> None:
    """Print a table: file, output, largest error, tolerance, verdict; reasons below it."""
    reports = list(reports)
    table = Table(title="Conformance with the official code", title_justify="left", title_style="bold")
    for name in ("file", "output", "largest error", "tolerance", "verdict"):
        table.add_column(name, justify="right" if name == "largest error" else "left", overflow="fold")
    for report in reports:
        for i, outcome in enumerate(report.outcomes):
            colour = "green" if outcome.verdict == "pass" else "bold red"
            error = "" if outcome.error is None else f"{outcome.error:.2g}"
            cells = [Path(report.path).name if i == 0 else "", outcome.name, error, outcome.tolerance]
            table.add_row(*map(escape, cells), f"[{colour}]{outcome.verdict}[/]")
    # Not cut to 80 columns where the output goes to a file or a log.
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    console = Console(soft_wrap=True)
    for report in reports:
        for outcome in report.outcomes:
            if outcome.reason:
                line = f"{report.path}, {outcome.name}: {outcome.verdict}: {outcome.reason}"
                console.print(line, highlight=False, markup=False)
    num_passed = sum(report.passed for report in reports)
    console.print(f"{num_passed} of {len(reports)} files pass.", highlight=False)


def read_golden(path: Path | str) -> Golden:
    """Read and check a golden file; nothing pickled is loaded.

    Raises:
        ValueError: a file that is damaged or not of this format.
        OSError: a file that is not there.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except OSError:
        raise
    except Exception as error:  # zipfile, zlib and numpy have many ways to say that bytes are damaged
        raise ValueError(f"The file is damaged or no .npz file ({type(error).__name__}: {error}).") from error
    if "meta" not in arrays:
        raise ValueError("The file has no 'meta'.")
    meta = json.loads(str(arrays.pop("meta")))
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        version = meta.get("format") if isinstance(meta, dict) else None
        raise ValueError(f"Format version {version!r} is unknown; this runner reads version {FORMAT}.")
    needed = ("system", "entry", "config", "arguments", "weights", "tolerance")
    if absent := [key for key in needed if key not in meta]:
        raise ValueError(f"'meta' lacks {', '.join(absent)}.")
    if strange := [name for name in arrays if not name.startswith(("in.", "out."))]:
        raise ValueError(f"Unknown array {strange[0]!r}.")
    inputs = {name[3:]: value for name, value in arrays.items() if name.startswith("in.")}
    outputs = {name[4:]: value for name, value in arrays.items() if name.startswith("out.")}
    return Golden(meta, inputs, outputs)


def rule_state(module: nn.Module, weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """Draw the golden weights of `module` by official name, float32; one tensor at a time for each thread.

    Args:
        module: as `official.layout`; the meta device will do.
        weights: {"rule": "fan-in-normal-v1", "salt": ...}.

    Raises:
        ValueError: another rule.
    """
    if weights.get("rule") != RULE or "salt" not in weights:
        raise ValueError(f"The rule for weights {dict(weights)} is unknown; there is {RULE!r}, with a salt.")
    shapes = {name: place.shape for name, place in layout(module).items()}

    def draw(name: str) -> Tensor:
        seed = zlib.crc32(f"{weights['salt']}/{name}".encode())
        shape = shapes[name]
        # The rule names numpy's legacy generator; it lets other threads run while it draws.
        x = np.random.RandomState(seed).standard_normal(shape).astype(np.float32)
        if x.ndim >= 2:
            x /= np.float32(math.sqrt(math.prod(shape[1:])))
        else:
            x *= np.float32(0.1)
            x += np.float32(name.endswith(("weight", "scale")))
        return torch.from_numpy(x)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return dict(zip(shapes, pool.map(draw, shapes), strict=True))


# ---------------------------------------------------------------------------------------------- TokenBridge

# Defaults of the official constructor (models/tokenbridge.py, class TokenBridge). `norm_layer_eps` stands for its
# argument `norm_layer`: torch's own default in the bare class.
TOKENBRIDGE_DEFAULTS: dict[str, Any] = {
    "img_size": 256,
    "vae_stride": 16,
    "patch_size": 1,
    "encoder_embed_dim": 1024,
    "encoder_depth": 16,
    "encoder_num_heads": 16,
    "decoder_embed_dim": 1024,
    "decoder_depth": 16,
    "decoder_num_heads": 16,
    "channel_embed_dim": 256,
    "channel_depth": 4,
    "channel_heads": 8,
    "mlp_ratio": 4.0,
    "norm_layer_eps": 1e-5,
    "quant_levels": 32,
    "vae_embed_dim": 16,
    "class_num": 1000,
    "buffer_size": 64,
    "quant_min": -5.0,
    "quant_max": 5.0,
    "std_range": 3.0,
}
# Defaults of the official `sample_tokens`; `labels` tells whether labels are given.
SAMPLE_DEFAULTS: dict[str, Any] = {
    "num_iter": 64,
    "cfg": 1.0,
    "cfg_schedule": "linear",
    "labels": True,
    "temperature": 1.0,
}
# Arguments that play no part in evaluation; the official code stores `use_quantized_value` nowhere.
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
    """Complete official keyword arguments by their preset, if there is one, and the constructor's defaults.

    Raises:
        ValueError: an unknown preset or argument.
    """
    if unknown := sorted(set(given) - set(TOKENBRIDGE_DEFAULTS) - TRAINING_ARGUMENTS - {"preset"}):
        raise ValueError(f"Unknown configuration keys: {', '.join(unknown)}.")
    config = dict(TOKENBRIDGE_DEFAULTS)
    if "preset" in given:
        config |= _official_sizes(str(given["preset"]))
    return config | {key: value for key, value in given.items() if key in TOKENBRIDGE_DEFAULTS}


def _official_sizes(preset_name: str) -> dict[str, Any]:
    """Return what an official preset function passes on; the rest stays at the constructor's defaults."""
    preset = find_preset(preset_name)
    if preset.official_name is None:
        raise ValueError(f"{preset_name!r} is no preset of the official code.")
    model = preset.model
    sides = {
        f"{side}_{theirs}": model[ours]
        for side in ("encoder", "decoder")
        for theirs, ours in (("embed_dim", "width"), ("depth", f"{side}_depth"), ("num_heads", "num_heads"))
    }
    head = {"channel_embed_dim": "head_width", "channel_depth": "head_depth", "channel_heads": "head_num_heads"}
    return {**sides, **{theirs: model[ours] for theirs, ours in head.items()}, "norm_layer_eps": model["norm_eps"]}


def make_quantizer(config: Mapping[str, Any]) -> ScalarQuantizer:
    """Return the quantiser of an official configuration; its range need not be symmetric about 0."""
    half = (config["quant_max"] - config["quant_min"]) / 2
    centre = (config["quant_max"] + config["quant_min"]) / 2
    codebook = gaussian_codebook(config["quant_levels"], value_range=half, num_sigmas=config["std_range"])
    return ScalarQuantizer(codebook + centre)


def make_backbone(config: Mapping[str, Any]) -> MaskedBackbone:
    """Return the backbone of an official configuration, on the meta device."""
    with torch.device("meta"):
        return MaskedBackbone(
            BackboneConfig(
                num_positions=_side(config) ** 2,
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
    """Return the head of an official configuration, on the meta device."""
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
    """Return the whole model of an official configuration, on the meta device.

    Raises:
        ValueError: a configuration with which the official code itself cannot run the whole model.
    """
    num_channels = len(OFFICIAL_CHANNEL_ORDER)
    if config["vae_embed_dim"] != num_channels or config["patch_size"] != 1:
        raise ValueError(
            f"The official channel order is a constant for {num_channels} channels and patch size 1; with "
            f"{config['vae_embed_dim']} channels and patch size {config['patch_size']} the official code has no "
            "logits or samples either (features and the head alone can be run)."
        )
    with torch.device("meta"):
        model = TokenBridge(
            latent_size=_side(config),
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


def _side(config: Mapping[str, Any]) -> int:
    """Return height and width of the positions."""
    return int(config["img_size"] // config["vae_stride"] // config["patch_size"])


def _with_rule_weights(module: Any, golden: Golden) -> Any:
    load_official(module, rule_state(module, golden.meta["weights"]))
    return module


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
    _check_shapes(golden, config)
    quantizer = make_quantizer(config)
    backbone = _with_rule_weights(make_backbone(config), golden)
    x = _patches(golden.tensor("latents"), config)
    tokens = quantizer.encode(x)
    visible, _ = _split(golden.tensor("mask"))
    embedding = backbone.embed_class(golden.tensor("labels"))
    encoder = backbone.encode(quantizer.lookup(take(tokens, visible)), visible, embedding)
    outputs = {"tokens": tokens, "encoder": encoder, "z": backbone.decode(encoder, visible)}
    return Computed(outputs, {"tokens": _to_midpoint(quantizer, x)})


def _run_training_logits(golden: Golden) -> Computed:
    config = tokenbridge_config(golden.meta["config"])
    _check_shapes(golden, config)
    model = _with_rule_weights(make_model(config), golden)
    x = _patches(golden.tensor("latents"), config)
    tokens = model.quantizer.encode(x)
    visible, masked = _split(golden.tensor("mask"))
    logits = model(tokens, golden.tensor("labels"), visible, masked, first="training-consistent").flatten(0, 1)
    order = list(model.channel_order)
    targets = take(tokens, masked)[..., order].flatten(0, 1)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    distances = take(_to_midpoint(model.quantizer, x), masked)[..., order].flatten(0, 1)
    return Computed({"logits": logits, "loss": loss, "targets": targets}, {"targets": distances})


def _run_head(golden: Golden) -> Computed:
    """Force the given tokens through the cached sampling path, and collect the logits it picks from."""
    head = _with_rule_weights(make_head(tokenbridge_config(golden.meta["config"])), golden)
    tokens, seen = golden.tensor("tokens"), []

    def pick(logits: Tensor, place: int) -> Tensor:
        seen.append(logits)
        return tokens[:, place]

    head.sample(golden.tensor("features"), pick, first="official")
    return Computed({"logits": torch.stack(seen, dim=1)})


def _run_sample(golden: Golden) -> Computed:
    arguments = SAMPLE_DEFAULTS | golden.meta["arguments"]
    if arguments["temperature"] != 0:
        raise ValueError(f"Temperature {arguments['temperature']} draws from a random stream that the file lacks.")
    model = _with_rule_weights(make_model(tokenbridge_config(golden.meta["config"])), golden)
    orders = golden.tensor("orders")
    if not torch.equal(orders.sort(dim=1).values, torch.arange(model.num_positions).expand_as(orders)):
        raise ValueError(f"in.orders are no permutations of {model.num_positions} positions.")
    config = SamplingConfig(
        num_iterations=arguments["num_iter"],
        guidance_scale=arguments["cfg"],
        # Quirk kept: any schedule but "linear" is constant in the official sample_tokens.
        guidance_schedule="linear" if arguments["cfg_schedule"] == "linear" else "constant",
        temperature=0.0,
        first_element="official",
    )
    noise = ImageNoise(orders, torch.zeros(*orders.shape, model.num_channels))  # greedy: the uniforms play no part
    labels = golden.tensor("labels") if arguments["labels"] else None
    tokens = generate_tokens(model, labels, config, noise)
    return Computed({"tokens": tokens, "latents": model.to_latents(tokens)}, follows={"latents": "tokens"})


def _check_shapes(golden: Golden, config: Mapping[str, Any]) -> None:
    """Refuse latents and masks of another size: gathers by index would not notice."""
    side = _side(config)
    sizes = {"latents": (config["vae_embed_dim"], *[side * config["patch_size"]] * 2), "mask": (side**2,)}
    for name, size in sizes.items():
        if (shape := golden.inputs[name].shape)[1:] != size:
            raise ValueError(f"in.{name} has the shape {list(shape)}; the configuration asks for [B, *{list(size)}].")


def _patches(latents: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Take latents [B, C, H, W] to patches [B, L, C p p], channels before rows before columns of a patch."""
    return F.pixel_unshuffle(latents, config["patch_size"]).flatten(2).transpose(1, 2).contiguous()


def _split(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return visible [B, n] and masked [B, L - n] positions of a mask [B, L], 1 for masked, both rising.

    Raises:
        ValueError: rows that mask different numbers of positions, which neither code can run as one batch.
    """
    hidden = mask != 0
    counts = hidden.sum(dim=1)
    if (counts != counts[0]).any():
        raise ValueError(f"The rows of the mask hide different numbers of positions: {counts.tolist()}.")
    order = hidden.to(torch.int8).argsort(dim=1, stable=True)
    num_visible = mask.shape[1] - int(counts[0])
    return order[:, :num_visible], order[:, num_visible:]


def _to_midpoint(quantizer: ScalarQuantizer, x: Tensor) -> Tensor:
    """Return the distance of every value to the nearest midpoint of two levels, in latent units."""
    places = torch.searchsorted(quantizer.midpoints, x.contiguous())
    ends = quantizer.midpoints[torch.stack([places - 1, places]).clamp(0, len(quantizer.midpoints) - 1)]
    return (ends - x).abs().amin(0)


# --------------------------------------------------------------------------------------------------- KL-16

KL16_KEYS = frozenset({"embed_dim", "ch", "ch_mult", "num_res_blocks", "attn_resolutions", "resolution"})


def _run_kl16(golden: Golden) -> Computed:
    given = golden.meta["config"]
    if unknown := sorted(set(given) - KL16_KEYS):
        raise ValueError(f"Unknown configuration keys: {', '.join(unknown)}.")
    sizes: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    vae = _with_rule_weights(create_kl16(**sizes), golden)
    posterior = vae.encode(golden.tensor("image")).latent_dist
    decoded = vae.decode(posterior.mean).sample
    return Computed({"mean": posterior.mean, "logvar": posterior.logvar, "decoded": decoded})


# ------------------------------------------------------------------------------------------- entries, verdicts


def _entry(inputs: str, outputs: str, run: Callable[[Golden], Computed], arguments: str = "") -> Entry:
    return Entry(frozenset(inputs.split()), frozenset(outputs.split()), run, frozenset(arguments.split()))


ENTRIES: dict[str, dict[str, Entry]] = {
    "tokenbridge": {
        "quantizer": _entry("x", "indices dequantized reconstruction_values boundaries", _run_quantizer),
        "features": _entry("latents labels mask", "tokens encoder z", _run_features),
        "training-logits": _entry("latents labels mask", "logits loss targets", _run_training_logits),
        "head-sampling-logits": _entry("features tokens", "logits", _run_head),
        "sample": _entry("labels orders", "latents tokens", _run_sample, " ".join(SAMPLE_DEFAULTS)),
    },
    "kl16": {"vae": _entry("image", "mean logvar decoded", _run_kl16)},
}


def _entry_of(golden: Golden) -> Entry:
    """Return what runs the case, after checking that the case is whole and says nothing unknown."""
    system, name = golden.meta["system"], golden.meta["entry"]
    if system not in ENTRIES:
        raise ValueError(f"System {system!r} is unknown here; there are {', '.join(ENTRIES)}.")
    if name not in ENTRIES[system]:
        raise ValueError(f"Entry {name!r} of {system} is unknown; there are {', '.join(ENTRIES[system])}.")
    entry = ENTRIES[system][name]
    for kind, expected, there in (("in", entry.inputs, golden.inputs), ("out", entry.outputs, golden.outputs)):
        if absent := sorted(expected - set(there)):
            raise ValueError(f"Arrays are missing: {', '.join(f'{kind}.{array}' for array in absent)}.")
        if unknown := sorted(set(there) - expected):
            raise ValueError(f"Unknown arrays: {', '.join(f'{kind}.{array}' for array in unknown)}.")
    if unknown := sorted(set(golden.meta["arguments"]) - entry.arguments):
        raise ValueError(f"Unknown arguments: {', '.join(unknown)}.")
    tolerance = golden.meta["tolerance"]
    if unknown := sorted(set(tolerance) - {"atol", "rtol"} - set(golden.outputs)):
        raise ValueError(f"The tolerance speaks of unknown outputs: {', '.join(unknown)}.")
    numbers = [tolerance.get(key) for key in ("atol", "rtol")]
    if not all(isinstance(number, int | float) and 0 <= number < math.inf for number in numbers):
        raise ValueError(f"The tolerance {tolerance} lacks atol or rtol.")
    if empty := [name for name, array in golden.outputs.items() if array.size == 0]:
        raise ValueError(f"There is nothing to compare in out.{empty[0]}.")
    return entry


def _judge(name: str, golden: Golden, computed: Computed) -> Outcome:
    """Compare one output with the golden's, by the case's own tolerance."""
    expected = golden.outputs[name]
    ours = computed.outputs[name].numpy()
    tolerance = golden.meta["tolerance"]
    words = tolerance.get(name)
    integer = np.issubdtype(expected.dtype, np.integer)
    stated = words or ("equal" if integer else f"{tolerance['atol']:g} + {tolerance['rtol']:g} |b|")
    if ours.shape != expected.shape:
        reason = f"shape {list(ours.shape)} instead of {list(expected.shape)}"
        return Outcome(name, None, stated, "fail", reason)
    # Equal infinities differ by NaN; a NaN of ours or theirs stays one, and fails.
    with np.errstate(invalid="ignore"):
        error = np.where(ours == expected, 0.0, np.abs(ours.astype(np.float64) - expected.astype(np.float64)))
    largest = float(error.max(initial=0.0))
    distances = computed.midpoint_distances.get(name)
    if words is not None:
        good, note = _judge_words(str(words), error, None if distances is None else distances.numpy())
    elif integer:
        allowed = np.zeros(error.shape, bool) if distances is None else distances.numpy() <= TIE
        good = bool(((error == 0) | allowed).all())
        note = _count(error != 0, "differ") + (", all on a midpoint of two levels" if good and error.any() else "")
    else:
        leader = computed.follows.get(name)
        same = np.ones(error.shape, bool) if leader is None else _agree(leader, golden, computed, error.shape)
        within = error <= tolerance["atol"] + tolerance["rtol"] * np.abs(expected.astype(np.float64))
        good, note = bool((within | ~same).all()), _count(~within & same, "are outside")
        largest = float(error[same].max(initial=0.0))
    finite = math.isfinite(largest)
    reason = note if finite else f"{note}; NaN or infinite"
    return Outcome(name, largest if finite else None, str(stated), "pass" if good else "fail", reason)


def _judge_words(words: str, error: NDArray[np.float64], distances: NDArray[Any] | None) -> tuple[bool, str]:
    """Judge integers by a tolerance in words; unknown words fail."""
    differ = error != 0
    if (match := re.search(r"at least ([\d.]+) ?% equal", words)) is not None:
        return bool((~differ).mean() * 100 >= float(match[1])), _count(differ, "differ")
    if (match := re.search(r"within ([\d.e-]+) of the midpoint", words)) is not None and distances is not None:
        good = bool((~differ | (distances <= float(match[1]))).all())
        return good, _count(differ, "differ")
    return False, f"these words are not understood: {words!r}"


def _agree(leader: str, golden: Golden, computed: Computed, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Return where the integer output `leader` agrees, in the layout of what follows from it."""
    agree = computed.outputs[leader].numpy() == golden.outputs[leader]
    if agree.shape == shape:
        return agree
    return agree.swapaxes(1, 2).reshape(shape)  # tokens [B, L, C], latents [B, C, H, W]


def _count(where: NDArray[Any], verb: str) -> str:
    return f"{int(where.sum())} of {where.size} {verb}" if where.any() else ""


def _expand(paths: Iterable[Path | str]) -> list[Path]:
    """Replace folders by their golden files; a folder without any stays, and fails."""
    files: list[Path] = []
    for path in map(Path, paths):
        files += (sorted(path.glob("*.npz")) or [path]) if path.is_dir() else [path]
    return files
