"""Write the artifact of the current format version that every later version must load.

Run once for a new format version, from the project's root, and never again for a version that was
released: `PYTHONPATH=tests python tests/golden/make_golden.py`. It writes `tests/golden/vN/`, the artifact, and
`tests/golden/vN.safetensors`, a fixed input and the model's output for it.

The model is a two-block ViT of width 16 that uses all the format has: selected units, gathered
features, factors, merged tokens, class names, preprocessing, a record and a step.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from conftest import build, images
from vitailor import artifact, surgery
from vitailor.hosts import shape_of
from vitailor.plan import BlockPlan, Plan
from vitailor.preprocessing import resolve_preprocessing
from vitailor.provenance import Provenance, Step, weights_hash
from vitailor.shape import FORMAT_VERSION, Ranks

HERE = Path(__file__).parent

PLAN = Plan(
    blocks=(
        BlockPlan(
            heads=(1,),
            qk_dims=((0, 2, 5),),
            neurons=tuple(range(0, 64, 2)),
            attn_features=(0, 1, 2, 3, 5, 8, 13),
            num_tokens_out=8,
            ranks=Ranks(q=2, out=4),
        ),
        BlockPlan(
            v_dims=((0, 1, 2, 3), (4, 5, 6, 7)),
            mlp_features=tuple(range(1, 16)),
            num_tokens_out=4,
            ranks=Ranks(fc1=6),
        ),
    )
)


def main() -> None:
    target = HERE / f"v{FORMAT_VERSION}"
    dense = build("vit_tiny_patch16_224")
    model = surgery.apply(dense, PLAN)
    step = Step(
        source="vit_tiny_patch16_224",
        weights_hash=weights_hash(dense),
        method="closed-form",
        settings={"criterion": "magnitude"},
        budget="macs 0.6",
        seed=0,
        versions={"torch": "2"},
        plan=PLAN,
    )
    model.vitailor = Provenance(
        shape=shape_of(model),
        steps=(step,),
        record={"top1": {"before": 72.5, "after": 70.25, "interval": [-3.5, -1.0]}},
        preprocessing=resolve_preprocessing(dense),
        class_names=("ant", "bee", "cat", "dog", "eel"),
    )
    artifact.save(model, target)
    x = images(model)
    with torch.inference_mode():
        save_file({"input": x, "output": model(x)}, f"{target}.safetensors")


if __name__ == "__main__":
    main()
