"""The entry of GIVT in the registry of systems."""

from __future__ import annotations

from tokenbridge.models.givt.checkpoint import givt_layout, load_givt
from tokenbridge.models.givt.cost import count_flop
from tokenbridge.models.givt.model import GIVT, givt_loss
from tokenbridge.models.givt.presets import PRESETS, README
from tokenbridge.models.givt.sampling import GivtSampling, generate
from tokenbridge.models.system import PRECISION_RECALL_NOTE, Evaluation, System
from tokenbridge.tokenizers.published import GIVT_VAE

SYSTEM = System(
    name="givt",
    model=GIVT,
    settings=GivtSampling,
    generate=generate,
    loss=givt_loss,
    presets=PRESETS,
    default_size="causal-256",
    layout=givt_layout,
    load=load_givt,
    tokenizer=GIVT_VAE,
    describe_tokens=lambda sizes: (sizes["num_positions"], f"a vector of {sizes['num_channels']}"),
    count_flop=count_flop,
    evaluation=Evaluation(
        dtype="fp32",
        published=README,
        notes=(
            "The evaluation behind the published FID is not in the repository: balanced labels and rounded pixels "
            "are this project's.",
            PRECISION_RECALL_NOTE,
        ),
    ),
)
