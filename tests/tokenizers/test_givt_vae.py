"""GIVT's VAE, and the published files and names of GIVT: converters, strictness, sizes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_cases import Arrays, changed, failed, golden, set_meta
from hypothesis import given
from hypothesis import strategies as st
from official_names import from_official, layout, load_official, rule_state, to_official
from published import published_shapes
from torch import Tensor, nn

from tokenbridge.conformance import judge as c
from tokenbridge.models.givt.checkpoint import load_givt, scan, unroll
from tokenbridge.models.givt.model import GIVT
from tokenbridge.models.givt.presets import PRESETS, create_givt
from tokenbridge.tokenizers.base import LatentTokenizer
from tokenbridge.tokenizers.givt_vae import GivtVAE, ResBlock, create_givt_vae, load_givt_vae
from tokenbridge.weights.flax_files import read_tree

SMALL_GIVT: dict[str, Any] = {
    "num_positions": 4,
    "num_channels": 3,
    "num_classes": 5,
    "num_components": 2,
    "width": 8,
    "depth": 3,
    "num_heads": 2,
    "mlp_width": 8,  # as wide as the model: kernels that are not transposed have the right shape
}
SMALL_VAE: dict[str, Any] = {"latent_channels": 3, "width": 32, "width_multipliers": (1, 2), "num_res_blocks": 1}
RULE = {"rule": "fan-in-normal-v1", "salt": "small"}


def filled(module: Any) -> Any:
    load_official(module, rule_state(module, RULE))
    return module.eval()


GIVT_MODEL = filled(GIVT(**SMALL_GIVT))
VAE = filled(GivtVAE(**SMALL_VAE))


def empty(model: nn.Module) -> nn.Module:
    with torch.device("meta"):
        return (GIVT(**SMALL_GIVT) if isinstance(model, GIVT) else GivtVAE(**SMALL_VAE)).eval()


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


# ------------------------------------------------------------------------------------------------------- VAE


@pytest.mark.parametrize(
    ("change", "outputs"),
    [
        (set_meta("weights", "salt", to="other"), {"mu", "logvar", "z_sampled", "decoded", "decoder_raw"}),
        (set_meta("config", "malib_ckpt", to=False), {"mu", "logvar", "decoded", "reconstruction"}),
        (set_meta("config", "activation_fn", to="relu"), {"mu", "logvar", "decoded", "decoder_raw"}),
    ],
)
def test_other_settings_are_noticed(
    change: Callable[[dict[str, Any], Arrays], Any], outputs: set[str], tmp_path: Path
) -> None:
    assert outputs <= failed(c.run_file(changed("givt-vae", tmp_path, change)))


def test_an_ordinary_shortcut_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Project the block's input where widths differ, as every other network does: 32 is 64 with zeros here."""

    def forward(self: ResBlock, x: Tensor) -> Tensor:
        y = self.branch(x)
        if self.mix is None:
            return y + x
        padding = max(0, y.shape[1] - x.shape[1])
        return y + self.mix(nn.functional.pad(x, (0, 0, 0, 0, 0, padding))[:, : y.shape[1]])

    monkeypatch.setattr(ResBlock, "forward", forward)
    assert {"mu", "decoder_raw"} <= failed(c.run_file(golden("givt-vae")))


def test_other_pooling_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.AvgPool2d, "forward", lambda self, x: x[..., ::2, ::2])
    assert "mu" in failed(c.run_file(golden("givt-vae")))


@torch.no_grad()
def test_no_path_around_a_block_that_changes_the_width() -> None:
    block = ResBlock(32, 64, nn.SiLU).eval()
    nn.init.zeros_(block.get_parameter("branch.5.weight"))
    assert not block(torch.randn(1, 32, 4, 4)).any()
    same = ResBlock(32, 32, nn.SiLU).eval()
    nn.init.zeros_(same.get_parameter("branch.5.weight"))
    x = torch.randn(1, 32, 4, 4)
    assert torch.equal(same(x), x)


@pytest.mark.parametrize(("size", "latent"), [(8, 4), (10, 5), (9, 5)])
@torch.no_grad()
def test_sizes(size: int, latent: int) -> None:
    images = torch.rand(2, 3, size, size) * 2 - 1
    posterior = VAE.encode(images).latent_dist
    assert posterior.mean.shape == (2, 3, latent, latent)
    decoded = VAE.decode(posterior.mean).sample
    assert decoded.shape == (2, 3, 2 * latent, 2 * latent)
    assert decoded.abs().max() <= 1


@torch.no_grad()
def test_images_are_units_inside() -> None:
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    plain = GivtVAE(**SMALL_VAE, unit_images=False).eval()
    plain.load_state_dict(VAE.state_dict())
    torch.testing.assert_close(VAE.moments(images), plain.moments((images + 1) / 2))
    latents = torch.randn(2, 3, 4, 4)
    raw = VAE.decoder(latents)
    assert raw.min() < 0  # else the clipping shows nothing
    torch.testing.assert_close(VAE.decode(latents).sample, (2 * raw - 1).clamp(-1, 1))
    torch.testing.assert_close(plain.decode(latents).sample, raw.clamp(-1, 1))


@torch.no_grad()
def test_the_log_variance_is_limited() -> None:
    vae = GivtVAE(**SMALL_VAE)
    last = vae.encoder[-1]
    nn.init.zeros_(last.weight)
    last.bias.copy_(torch.tensor([0.0, 0, 0, -50, 0, 50]))
    log_variance = vae.encode(torch.zeros(1, 3, 8, 8)).latent_dist.logvar
    assert log_variance[0, :, 0, 0].tolist() == [-30, 0, 20]


def test_it_is_a_tokenizer() -> None:
    tokenizer = LatentTokenizer(VAE)
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    latents = tokenizer.latents(images)
    with torch.no_grad():
        assert torch.equal(latents, VAE.encode(images).latent_dist.mean)  # not scaled
        assert torch.equal(tokenizer.images(latents), VAE.decode(latents).sample)
    assert tokenizer.reconstruct(images).shape == images.shape


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    VAE.save_pretrained(tmp_path / "vae")
    again = GivtVAE.from_pretrained(tmp_path / "vae")
    assert equal(again.state_dict(), VAE.state_dict())


# ----------------------------------------------------------------------------------------------------- sizes


def shapes(tree: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in tree.items()}


def on_meta(module: nn.Module) -> dict[str, Tensor]:
    return {name: torch.empty(mapping.shape, device="meta") for name, mapping in layout(module).mappings.items()}


def test_parameter_counts() -> None:
    model, vae = create_givt("givt-causal-256"), create_givt_vae()
    assert sum(p.numel() for p in model.parameters()) == 304_009_744
    counts = [sum(p.numel() for p in part.parameters()) for part in (vae, vae.encoder, vae.decoder)]
    assert counts == [53_032_611, 23_660_192, 29_372_419]
    assert counts[0] == 53_032_611
    assert create_givt("givt_causal_256").config == model.config


def test_published_names_and_shapes() -> None:
    tree = on_meta(create_givt("givt-causal-256"))
    assert shapes(tree) == published_shapes("givt_causal_256_unrolled")
    assert shapes(scan(tree)) == published_shapes("givt_causal_256")
    assert shapes(unroll(scan(tree))) == shapes(tree)
    assert shapes(on_meta(create_givt_vae())) == published_shapes("givt_vae")


def test_preset() -> None:
    config = PRESETS["givt-causal-256"].sampling_config()
    assert (config.temperature, config.temp_probs, config.guidance_weight, config.num_proposals) == (0.95, 1, 0.4, 1000)
    with pytest.raises(ValueError, match="Unknown preset 'givt-maskgit'"):
        create_givt("givt-maskgit")
    assert create_givt("givt-causal-256", depth=1).config["depth"] == 1


# ------------------------------------------------------------------------------------------------ converters


@pytest.mark.parametrize("model", [GIVT_MODEL, VAE], ids=["givt", "vae"])
def test_official_and_ours_are_inverses(model: nn.Module) -> None:
    official = to_official(model)
    assert shapes(official) == shapes(on_meta(model))
    ours = from_official(empty(model), official)
    assert equal(ours, dict(model.state_dict()))
    again = empty(model)
    load_official(again, official)
    assert equal(to_official(again), official)
    assert all(parameter.is_contiguous() for parameter in again.parameters())  # safetensors asks for it


@given(depth=st.integers(1, 12), seed=st.integers(0, 99))
def test_scan_and_unroll_are_inverses(depth: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    tree = {"decoder/pos_emb": torch.ones(1, 2)}
    for i in random.permutation(depth):  # files sort EncDecBlock10 before EncDecBlock2
        tree[f"decoder/EncDecBlock{i}/LayerNorm1/scale"] = torch.full((3,), float(i))
        tree[f"decoder/EncDecBlock{i}/SelfAttn/out/kernel"] = torch.full((2, 4, 3), float(i))
    scanned = scan(tree)
    assert scanned["decoder/EncDecBlock/LayerNorm1/scale"].shape == (3, depth)
    assert scanned["decoder/EncDecBlock/LayerNorm1/scale"][0].tolist() == list(range(depth))
    assert scanned["decoder/EncDecBlock/SelfAttn/out/kernel"].shape == (2, depth, 4, 3)
    assert equal(unroll(scanned), tree)
    assert equal(unroll(tree), tree)


def test_a_published_tree_gives_the_same_model() -> None:
    model = empty(GIVT_MODEL)
    load_official(model, unroll(scan(to_official(GIVT_MODEL))))
    latents, labels = torch.randn(2, 4, 3), torch.tensor([0, 3])
    with torch.no_grad():
        assert torch.equal(model(latents, labels), GIVT_MODEL(latents, labels))


def swap(first: str, second: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tree: {**tree, first: tree[second], second: tree[first]}


def transpose(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tree: {**tree, name: tree[name].transpose(0, -1)}


BLOCK = "decoder/EncDecBlock"


@pytest.mark.parametrize(
    "mistake",
    [
        swap(f"{BLOCK}0/MLP/Dense_0/kernel", f"{BLOCK}2/MLP/Dense_0/kernel"),
        swap(f"{BLOCK}1/SelfAttn/query/kernel", f"{BLOCK}1/SelfAttn/value/kernel"),
        swap(f"{BLOCK}1/LayerNorm1/scale", f"{BLOCK}1/LayerNorm3/scale"),
        transpose(f"{BLOCK}1/MLP/Dense_1/kernel"),
        lambda tree: {**tree, f"{BLOCK}0/SelfAttn/out/kernel": tree[f"{BLOCK}0/SelfAttn/out/kernel"].flip(0)},
    ],
)
def test_mistakes_that_shapes_do_not_show_change_the_model(mistake: Any) -> None:
    """The control of the round trips: each is another model."""
    model = empty(GIVT_MODEL)
    load_official(model, mistake(to_official(GIVT_MODEL)))
    latents, labels = torch.randn(2, 4, 3), torch.tensor([0, 3])
    with torch.no_grad():
        assert not torch.allclose(model(latents, labels), GIVT_MODEL(latents, labels), atol=1e-3)


def test_kernels_by_hand() -> None:
    """Attention as Flax defines it, from the official arrays."""
    tree = to_official(GIVT_MODEL)
    block = GIVT_MODEL.blocks[1]
    x = torch.randn(2, 4, 8)
    q, k, v = (
        torch.einsum("bld,dhe->bhle", x, tree[f"{BLOCK}1/SelfAttn/{n}/kernel"]) for n in ("query", "key", "value")
    )
    weights = (torch.einsum("bhle,bhme->bhlm", q, k) / 2).softmax(-1)  # sqrt(4)
    mixed = torch.einsum("bhlm,bhme->blhe", weights, v)
    expected = torch.einsum("blhe,hed->bld", mixed, tree[f"{BLOCK}1/SelfAttn/out/kernel"])
    with torch.no_grad():
        torch.testing.assert_close(block.attn(x), expected)
    pixel = torch.randn(32, 3, 3)  # a convolution at one place, kernel [height, width, in, out]
    kernel = tree_of_vae()["cnn_encoder/ResBlock_0/Conv_0/kernel"]
    ours = nn.functional.conv2d(pixel[None], VAE.encoder[1].branch[2].weight)[0, :, 0, 0]
    torch.testing.assert_close(ours, torch.einsum("chw,hwco->o", pixel, kernel))


def tree_of_vae() -> dict[str, Tensor]:
    return to_official(VAE)


@pytest.mark.parametrize("model", [GIVT_MODEL, VAE], ids=["givt", "vae"])
def test_strictness(model: nn.Module) -> None:
    tree = to_official(model)
    name = next(iter(tree))
    kind = type(model).__name__
    with pytest.raises(ValueError, match=rf"not the state of {kind} .*1 missing: {name}"):
        from_official(empty(model), {n: v for n, v in tree.items() if n != name})
    with pytest.raises(ValueError, match="1 left over: opt/count"):
        from_official(empty(model), {**tree, "opt/count": torch.zeros(())})
    with pytest.raises(ValueError, match=rf"1 of another shape: {name} \[2\] instead of"):
        from_official(empty(model), {**tree, name: torch.zeros(2)})
    with pytest.raises(ValueError, match=rf"1 not floating point: {name}"):
        from_official(empty(model), {**tree, name: tree[name].long()})


def test_strictness_of_scanned_trees() -> None:
    tree = scan(to_official(GIVT_MODEL))
    name = f"{BLOCK}/LayerNorm1/scale"
    with pytest.raises(ValueError, match=r"scale \[8\] has no axis 1"):
        unroll({**tree, name: torch.zeros(8)})
    with pytest.raises(ValueError, match=r"EncDecBlock\d/.* is there twice"):
        unroll({**to_official(GIVT_MODEL), **tree})
    for depth, kind in ((2, "1 missing"), (4, "1 left over")):
        with pytest.raises(ValueError, match=rf"{kind}: {BLOCK}{depth if depth == 2 else 3}/LayerNorm1/scale"):
            from_official(empty(GIVT_MODEL), unroll({**tree, name: torch.zeros(8, depth)}))


# ----------------------------------------------------------------------------------------------------- files


@pytest.fixture
def small_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the published models as small as the tests'."""
    monkeypatch.setattr("tokenbridge.models.givt.checkpoint.create_givt", lambda name: empty(GIVT_MODEL))
    monkeypatch.setattr("tokenbridge.tokenizers.givt_vae.create_givt_vae", lambda: empty(VAE))


def arrays_of(tree: dict[str, Tensor], prefix: str = "") -> dict[str, Any]:
    return {prefix + name: value.numpy() for name, value in tree.items()}


STATE: dict[str, Any] = {
    "opt/0/count": np.array(3),
    "opt/0/mu/decoder/pos_emb": np.ones(3),
    "extra": np.ones(1),
}


@pytest.mark.parametrize("scanned", [True, False])
@pytest.mark.parametrize(
    ("prefix", "others"),
    [("", {}), ("params/", STATE), ("opt/target/", {"opt/state/step": np.array(1), "extra/accum": np.ones(2)})],
)
def test_npz_files(scanned: bool, prefix: str, others: dict[str, Any], tmp_path: Path, small_presets: None) -> None:
    tree = to_official(GIVT_MODEL)
    path = tmp_path / "givt.npz"
    np.savez(path, **arrays_of(scan(tree) if scanned else tree, prefix), **others)
    model = load_givt(path)
    assert equal(dict(model.state_dict()), dict(GIVT_MODEL.state_dict()))
    assert not model.training
    np.savez(path, **arrays_of(tree_of_vae(), prefix), **others)
    assert equal(dict(load_givt_vae(path).state_dict()), dict(VAE.state_dict()))


def test_parameters_alone_may_have_no_strangers(tmp_path: Path, small_presets: None) -> None:
    path = tmp_path / "givt.npz"
    np.savez(path, **arrays_of(to_official(GIVT_MODEL)), **STATE)
    with pytest.raises(ValueError, match=r"givt\.npz: .*3 left over: opt/0/count"):
        load_givt(path)
    np.savez(path, **arrays_of(tree_of_vae()))
    with pytest.raises(ValueError, match=r"givt\.npz: This is not the state of GIVT .*missing: EmbedLabels"):
        load_givt(path)


def test_half_precision_files(tmp_path: Path, small_presets: None) -> None:
    tree = {name: value.bfloat16() for name, value in to_official(GIVT_MODEL).items()}
    path = tmp_path / "givt.npz"
    # numpy writes bfloat16 as two bytes without a type.
    arrays: dict[str, Any] = {name: value.view(torch.int16).numpy().view("V2") for name, value in tree.items()}
    np.savez(path, **arrays)
    model = load_givt(path)
    assert model.dtype == torch.float32
    assert equal(to_official(model), {name: value.float() for name, value in tree.items()})


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def test_pickled_code_is_refused_and_not_run(tmp_path: Path) -> None:
    mark, path = tmp_path / "ran", tmp_path / "evil.npz"
    np.savez(path, **arrays_of(to_official(GIVT_MODEL)), evil=np.array([Malicious(mark)], dtype=object))
    with pytest.raises(ValueError, match=r"evil\.npz .*allow_pickle"):
        read_tree(path)
    assert not mark.exists()
    np.load(path, allow_pickle=True)["evil"]  # the control: it would have run
    assert mark.exists()


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*none\.npz"):
        load_givt(tmp_path / "none.npz")
    path = tmp_path / "givt.npz"
    np.savez(path, a=np.array(["text"]))
    with pytest.raises(ValueError, match=r"givt\.npz: a has the type <U4"):
        read_tree(path)
    pytest.importorskip("msgpack", reason="what is no .npz file is read with msgpack")
    np.savez(path, **arrays_of(to_official(GIVT_MODEL)))
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"<html>404</html>", content[:-300]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"givt\.npz \({len(damaged):,} bytes\) is damaged"):
            read_tree(path)


# ------------------------------------------------------------------------------------------- Flax's msgpack


def flax_bytes(tree: Any) -> bytes:
    """Write what flax.serialization.to_bytes writes: an array is extension 1, (shape, type, bytes)."""
    msgpack = pytest.importorskip("msgpack", reason="the published VAE is a msgpack file")

    def default(value: Any) -> Any:
        assert isinstance(value, np.ndarray)
        name = "bfloat16" if value.dtype.kind == "V" else value.dtype.name
        return msgpack.ExtType(1, msgpack.packb((value.shape, name, value.tobytes())))

    content: bytes = msgpack.packb(tree, default=default, strict_types=True)
    return content


def nested(flat: dict[str, np.ndarray]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *folders, last = name.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = value
    return tree


def test_the_published_vae_file(tmp_path: Path, small_presets: None) -> None:
    """A training state: both weights, without `cnn_`, and the optimizers beside them."""
    names = {name: name.removeprefix("cnn_") for name in layout(VAE).mappings}
    ema = nested({names[name]: value.numpy() for name, value in tree_of_vae().items()})
    plain = nested({names[name]: value.numpy() + 1 for name, value in tree_of_vae().items()})
    state = {
        "step": 7,
        "ema_params": ema,
        "g_params": plain,
        "d_params": ema,
        "g_optimizer_state": {"0": {"mu": plain}},
    }
    path = tmp_path / "vae_imagenet_2012_beta_5e-5_params"
    path.write_bytes(flax_bytes(state))
    assert equal(dict(load_givt_vae(path).state_dict()), dict(VAE.state_dict()))
    assert equal(to_official(load_givt_vae(path, ema=False)), {n: v + 1 for n, v in tree_of_vae().items()})
    path.write_bytes(flax_bytes({**state, "ema_params": {}}))
    with pytest.raises(ValueError, match=r"beta_5e-5_params: .* missing: cnn_encoder/"):
        load_givt_vae(path)


def test_other_msgpack(tmp_path: Path) -> None:
    msgpack = pytest.importorskip("msgpack", reason="the published VAE is a msgpack file")
    path = tmp_path / "vae"
    half = torch.tensor([1.5, -2.0]).bfloat16()
    path.write_bytes(flax_bytes({"a": {"0": half.view(torch.int16).numpy().view("V2")}, "b": 3}))
    tree = read_tree(path)
    assert torch.equal(tree["a/0"], half)
    assert tree["b"].item() == 3
    for content in (msgpack.packb([1]), msgpack.packb({"a": msgpack.ExtType(9, b"")}), flax_bytes({"a": {}})[:-1]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is damaged, or neither"):
            read_tree(path)
