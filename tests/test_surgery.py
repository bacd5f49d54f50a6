"""Surgery: what it builds is the dense model without what was removed, and nothing else changes."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from conftest import build, build_t2t, images
from plans import plans
from vitailor import artifact, layers, surgery
from vitailor.errors import PlanError, UnsupportedModelError
from vitailor.hosts import shape_of
from vitailor.plan import BlockPlan, Plan
from vitailor.provenance import weights_hash
from vitailor.shape import DENSE, Ranks

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("vit_tiny_patch16_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "layer scale": ("deit3_small_patch16_224", {}),
    "registers": ("vit_small_patch14_reg4_dinov2", {}),
    "averaged": ("vit_tiny_patch16_224", {"global_pool": "avg"}),  # beside a class token
    "attention pooling": ("vit_base_patch16_siglip_224", {}),
    "qk norm": ("vit_tiny_patch16_224", {"qk_norm": True}),
    "no biases": ("vit_tiny_patch16_224", {"qkv_bias": False, "proj_bias": False}),
    "t2t": ("t2t", {}),
}
SIZES = {"num_heads": 4, "mlp_ratio": 1.5}


def dense(kind: str = "plain") -> nn.Module:
    name, overrides = KINDS[kind]
    if name == "t2t":
        return build_t2t(**SIZES).double()
    return build(name, **SIZES, **overrides).double()


DENSE_MODELS = {kind: dense(kind) for kind in KINDS}
IMAGES = {kind: images(model) for kind, model in DENSE_MODELS.items()}
X = IMAGES["plain"]
kinds = st.sampled_from(list(KINDS))


def assert_equal(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    assert found.shape == expected.shape
    assert expected.abs().max() > 0.1
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@torch.no_grad()
def masked(model: nn.Module, plan: Plan) -> nn.Module:
    """The dense model with what the plan removes set to zero, and as few tokens as in the plan."""
    model = copy.deepcopy(model)
    for block, p in zip(model.blocks, plan.blocks, strict=True):
        attn, mlp = block.attn, block.mlp
        h, k = attn.num_heads, attn.head_dim
        heads = range(h) if p.heads is None else p.heads
        keep = {name: torch.zeros(h, k) for name in ("qk", "v", "head")}
        for i, head in enumerate(heads):
            keep["head"][head] = 1
            keep["qk"][head, list(p.qk_dims[i] if p.qk_dims else range(k))] = 1
            keep["v"][head, list(p.v_dims[i] if p.v_dims else range(k))] = 1
        rows = torch.cat([keep["qk"].flatten(), keep["qk"].flatten(), keep["v"].flatten()])
        attn.qkv.weight.mul_(rows[:, None])
        if attn.qkv.bias is not None:
            attn.qkv.bias.mul_(rows)
        attn.proj.weight.mul_(keep["head"].flatten())
        if p.neurons is not None:
            mlp.fc2.weight.mul_(indicator(p.neurons, mlp.fc2.in_features))
        if p.attn_features is not None:
            attn.qkv.weight.mul_(indicator(p.attn_features, attn.qkv.in_features))
        if p.mlp_features is not None:
            mlp.fc1.weight.mul_(indicator(p.mlp_features, mlp.fc1.in_features))
    fewer = tuple(BlockPlan(num_tokens_out=p.num_tokens_out, fuses=p.fuses) for p in plan.blocks)
    return surgery.apply(model, plan.model_copy(update={"blocks": fewer}))


def indicator(kept: tuple[int, ...], n: int) -> Tensor:
    return torch.zeros(n).index_fill(0, torch.tensor(kept), 1)


# -- promises ------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.data(), kinds)
def test_masked_equals_sliced(data, kind):
    model = DENSE_MODELS[kind]
    plan = data.draw(plans(shape_of(model)))
    with torch.inference_mode():
        x = IMAGES[kind]
        assert_equal(surgery.apply(model, plan)(x), masked(model, plan)(x))


@pytest.mark.parametrize("kind", KINDS)
def test_masking_changes_the_outputs(kind):
    """Else the test above would compare a model with itself."""
    model, x = DENSE_MODELS[kind], IMAGES[kind]
    units = {
        "heads": (0, 2, 3),
        "v_dims": ((0, 1, 3),) * 4,
        "neurons": tuple(range(20)),
        "attn_features": tuple(range(12)),
        "mlp_features": tuple(range(12)),
        "num_tokens_out": model.num_prefix_tokens + 6,
    }
    if not shape_of(model).qk_norm:
        units["qk_dims"] = ((1, 2, 3),) * 4
    for field, kept in units.items():
        plan = Plan(blocks=(BlockPlan(**{field: kept}), BlockPlan()))
        change = (masked(model, plan)(x) - model(x)).abs().max()
        assert change > 1e-4, field


@given(st.data(), kinds)
def test_cost_of_random_plans_is_what_is_counted(data, kind):
    model = DENSE_MODELS[kind]
    plan = data.draw(plans(shape_of(model), ranks=True))
    small = surgery.apply(model, plan).requires_grad_(False)
    shape = shape_of(small)
    assert shape == plan.result(shape_of(model))
    assert shape.params == sum(p.numel() for p in small.parameters())
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        small(IMAGES[kind][:1])
    assert 2 * shape.macs == counter.get_total_flops()


@pytest.mark.parametrize("fuses", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_fewer_tokens_cost_what_is_counted(kind, fuses):
    model = DENSE_MODELS[kind]
    block = BlockPlan(num_tokens_out=model.num_prefix_tokens + 6, fuses=fuses)
    small = surgery.apply(model, Plan(blocks=(block, BlockPlan()), matching="attention"))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        small.requires_grad_(False)(IMAGES[kind][:1])
    assert 2 * shape_of(small).macs == counter.get_total_flops()


@pytest.mark.parametrize("kind", KINDS)
def test_full_rank_factorisation(kind):
    model = DENSE_MODELS[kind]
    full = Ranks(q=16, k=16, v=16, out=16, fc1=16, fc2=16)
    factored = surgery.apply(model, Plan(blocks=(BlockPlan(ranks=full), BlockPlan(ranks=full))))
    assert isinstance(factored.blocks[0].attn.q, layers.LowRankLinear)
    assert_equal(factored(IMAGES[kind]), model(IMAGES[kind]))


@given(st.data(), kinds)
def test_factors_multiply_out(data, kind):
    model = DENSE_MODELS[kind]
    factored = surgery.apply(model, data.draw(plans(shape_of(model), ranks=True)))
    back = surgery.merge_back(factored)
    assert all(b.ranks == DENSE for b in shape_of(back).blocks)
    with torch.inference_mode():
        assert_equal(back(IMAGES[kind]), factored(IMAGES[kind]))


@given(st.data(), st.sampled_from(["plain", "layer scale", "no biases", "qk norm"]))
def test_what_is_cut_of_factors_is_what_is_cut_of_their_product(data, kind):
    model, x = DENSE_MODELS[kind], IMAGES[kind]
    factored = surgery.apply(model, data.draw(plans(shape_of(model), ranks=True)))
    before = shape_of(factored)
    plan = data.draw(plans(before))
    small = surgery.apply(factored, plan)
    shape = shape_of(small)
    assert shape == plan.result(before)
    assert shape.params == sum(p.numel() for p in small.parameters())
    for i, (was, now) in enumerate(zip(before.linears(), shape.linears(), strict=True)):
        for name, rank in shape.blocks[i].ranks:
            had = getattr(before.blocks[i].ranks, name)
            fan_in, fan_out = now[name]
            saves = had is not None and had * (fan_in + fan_out) < fan_in * fan_out
            assert rank == (had if saves or was[name] == now[name] else None)
    with torch.inference_mode():
        assert_equal(small(x), surgery.apply(surgery.merge_back(factored), plan)(x))


def test_what_was_frozen_stays_frozen():
    model = dense()
    model.blocks[0].requires_grad_(False)
    model.blocks[1].mlp.fc1.requires_grad_(False)
    plan = BlockPlan(heads=(0, 2), neurons=tuple(range(9)), ranks=Ranks(q=2, fc1=3, fc2=3))
    small = surgery.apply(model, Plan(blocks=(plan, plan)))
    assert not any(p.requires_grad for p in small.blocks[0].parameters())
    frozen = {n for n, p in small.blocks[1].named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in small.blocks[1].named_parameters() if "fc1" in n}


def test_factors_of_nothing_can_be_trained():
    """Where both factors were zero, neither would ever get a gradient."""
    model = dense()
    with torch.no_grad():
        model.blocks[0].mlp.fc2.weight.zero_()
    plan = Plan(blocks=(BlockPlan(ranks=Ranks(fc2=3)), BlockPlan()))
    small = surgery.apply(model, plan)
    assert_equal(small(X), model(X))
    small(X).square().sum().backward()
    fc2 = small.blocks[0].mlp.fc2
    assert sum(float(half.weight.grad.abs().sum()) for half in (fc2.up, fc2.down)) > 0


@pytest.mark.parametrize("name", Ranks.model_fields)
def test_a_rank_truncates_one_projection(name):
    """The factored projection has that rank, and is the best approximation of that rank."""
    model = DENSE_MODELS["plain"]
    plan = Plan(blocks=(BlockPlan(ranks=Ranks(**{name: 3})), BlockPlan()))
    before, after = weights_of(model), weights_of(surgery.apply(model, plan))
    for key, weight in before.items():
        values = torch.linalg.svdvals(weight)
        error = torch.linalg.matrix_norm(after[key] - weight)
        if key == name:
            assert torch.linalg.matrix_rank(after[key]) == 3
            torch.testing.assert_close(error, values[3:].square().sum().sqrt())
        else:
            assert error < 1e-12


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Weight matrices of the first block by projection."""
    from vitailor.hosts import host_of

    host = host_of(model)
    t = host.read(host.block(model, 0))
    found = {n: t[f"{n}.weight"].flatten(0, 1) for n in "qkv"}
    return found | {
        "out": t["out.weight"].flatten(1),
        "fc1": t["fc1.weight"],
        "fc2": t["fc2.weight"],
    }


@given(st.data())
def test_order_of_units_does_not_matter(data):
    """A model with its neurons and heads in another order, cut in that order, is the same function."""
    model = DENSE_MODELS["plain"]
    plan = data.draw(plans(shape_of(model)))
    shuffled, blocks = copy.deepcopy(model), []
    with torch.no_grad():
        for block, p in zip(shuffled.blocks, plan.blocks, strict=True):
            heads = data.draw(st.permutations(range(4)))
            neurons = data.draw(st.permutations(range(24)))
            qkv, proj = block.attn.qkv, block.attn.proj
            for t in (qkv.weight, qkv.bias):
                t.copy_(t.unflatten(0, (3, 4, 4))[:, heads].flatten(0, 2))
            proj.weight.copy_(proj.weight.unflatten(1, (4, 4))[:, heads].flatten(1))
            for t in (block.mlp.fc1.weight, block.mlp.fc1.bias):
                t.copy_(t[neurons])
            block.mlp.fc2.weight.copy_(block.mlp.fc2.weight[:, neurons])
            kept = list(range(4)) if p.heads is None else list(p.heads)
            order = sorted(range(len(kept)), key=lambda i: heads.index(kept[i]))
            changes = {
                "heads": tuple(heads.index(kept[i]) for i in order),
                "qk_dims": p.qk_dims and tuple(p.qk_dims[i] for i in order),
                "v_dims": p.v_dims and tuple(p.v_dims[i] for i in order),
                "neurons": p.neurons and tuple(sorted(neurons.index(n) for n in p.neurons)),
            }
            blocks.append(p.model_copy(update=changes))
    with torch.inference_mode():
        expected = surgery.apply(model, plan)(X)
        assert_equal(
            surgery.apply(shuffled, plan.model_copy(update={"blocks": tuple(blocks)}))(X), expected
        )


# -- compressing what is compressed --------------------------------------------------------------


@given(st.data(), kinds)
def test_two_plans_in_a_row_are_one(data, kind):
    model = DENSE_MODELS[kind]
    first = data.draw(plans(shape_of(model), tokens=False))
    once = surgery.apply(model, first)
    second = data.draw(plans(shape_of(once), tokens=False))
    both = Plan(blocks=tuple(map(composed, first.blocks, second.blocks)))
    with torch.inference_mode():
        expected = surgery.apply(model, both)(IMAGES[kind])
        assert_equal(surgery.apply(once, second)(IMAGES[kind]), expected)


def composed(first: BlockPlan, second: BlockPlan) -> BlockPlan:
    heads = through(first.heads, second.heads)
    surviving = range(len(first.heads or range(4))) if second.heads is None else second.heads
    fields: dict[str, Any] = {"heads": heads}
    for name in ("qk_dims", "v_dims"):
        a, b = getattr(first, name), getattr(second, name)
        kept = None if a is None else tuple(a[i] for i in surviving)
        if kept is not None and b is not None:
            fields[name] = tuple(map(through, kept, b))
        else:
            fields[name] = b if kept is None else kept
    for name in ("neurons", "attn_features", "mlp_features"):
        fields[name] = through(getattr(first, name), getattr(second, name))
    return BlockPlan(**fields)


def through(first: Any, second: Any) -> Any:
    if first is None or second is None:
        return second if first is None else first
    return tuple(first[i] for i in second)


@given(st.data())
def test_merging_schedules_can_be_lowered_again(data):
    model = DENSE_MODELS["plain"]
    once = surgery.apply(model, data.draw(plans(shape_of(model))))
    plan = data.draw(plans(shape_of(once)))
    again = surgery.apply(once, plan)
    assert shape_of(again) == plan.result(shape_of(once))
    assert again(X).shape == (2, 5)


@given(st.data())
def test_selecting_from_full_rank_factors_is_selecting_from_the_dense_model(data):
    model = DENSE_MODELS["plain"]
    full = Ranks(q=16, k=16, v=16, out=16, fc1=16, fc2=16)
    factored = surgery.apply(model, Plan(blocks=(BlockPlan(ranks=full),) * 2))
    plan = data.draw(plans(shape_of(model)))
    small = surgery.apply(factored, plan)
    for block in shape_of(small).blocks:
        assert max((r for _, r in block.ranks if r is not None), default=0) <= 16
    with torch.inference_mode():
        assert_equal(small(X), surgery.apply(model, plan)(X))


# -- what does not change ------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_the_input_model_is_untouched(training):
    model = dense().train(training)
    model.blocks[0].mlp.eval()
    model.blocks[1].norm1.weight.requires_grad_(False)
    calls: list[int] = []
    model.blocks[0].attn.register_forward_hook(lambda *_: calls.append(1))

    def facts():
        return (
            weights_hash(model),
            [(n, type(m), id(m), m.training) for n, m in model.named_modules()],
            [(n, id(p), p.requires_grad, p.grad) for n, p in model.named_parameters()],
            [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
            sorted(vars(model)),
            torch.get_rng_state().tolist(),
        )

    before = facts()
    half = tuple(range(0, 24, 2))
    plan = Plan(
        blocks=(
            BlockPlan(heads=(0, 2), qk_dims=((0, 1), (1, 2)), num_tokens_out=5),
            BlockPlan(neurons=half, attn_features=(1, 2), ranks=Ranks(fc1=3, v=1)),
        )
    )
    small = surgery.apply(model, plan)
    surgery.merge_back(small)
    assert facts() == before
    assert not calls
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in small.parameters()}
    assert not shared
    assert small.blocks[0].attn.training is training
    assert small.blocks[0].mlp.training is False


def test_blocks_without_changes_keep_the_hosts_own_modules():
    model = DENSE_MODELS["plain"]
    small = surgery.apply(model, Plan(blocks=(BlockPlan(neurons=(1, 2)), BlockPlan())))
    assert type(small) is type(model)
    assert type(small.blocks) is nn.Sequential
    types = [[type(m) for m in b.modules()] for b in (small.blocks[1], model.blocks[1])]
    assert types[0] == types[1]
    assert type(small.blocks[0].attn) is type(model.blocks[0].attn)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_stays(dtype):
    model = dense().to(dtype)
    plan = Plan(blocks=(BlockPlan(heads=(1,), mlp_features=(0, 3)), BlockPlan(neurons=(0,))))
    small = surgery.apply(model, plan)
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert small(X.to(dtype)).isfinite().all()


def test_plans_and_models_that_do_not_fit_are_refused():
    model = DENSE_MODELS["plain"]
    with pytest.raises(PlanError, match=r"blocks\.1\.neurons names unit 24"):
        surgery.apply(model, Plan(blocks=(BlockPlan(), BlockPlan(neurons=(24,)))))
    with pytest.raises(PlanError, match=r"blocks\.0\.attn_features names unit 16"):
        surgery.apply(model, Plan(blocks=(BlockPlan(attn_features=(16,)), BlockPlan())))
    with pytest.raises(UnsupportedModelError):
        surgery.apply(nn.Linear(2, 2), Plan(blocks=(BlockPlan(),)))


def test_saved_models_are_bit_equal_in_a_fresh_process(tmp_path):
    units = BlockPlan(
        heads=(0, 3), qk_dims=((0,), (2,)), v_dims=((0, 1), (1, 3)), neurons=tuple(range(11))
    )
    plans_by_name = {
        "identity": BlockPlan(),
        "units": units,
        "features": BlockPlan(attn_features=(1, 3, 8), mlp_features=(0, 15)),
        "ranks": BlockPlan(ranks=Ranks(q=2, out=3, fc1=4, fc2=5)),
        "gathered ranks": BlockPlan(attn_features=(1, 3, 8), ranks=Ranks(v=2)),
    }
    x = images(build())
    expected = {"input": x}
    for name, plan in plans_by_name.items():
        for kind in ("plain", "registers", "attention pooling"):
            model = dense(kind).float()
            merging = plan.model_copy(update={"num_tokens_out": model.num_prefix_tokens + 4})
            small = surgery.apply(model, Plan(blocks=(plan, merging)))
            key = f"{name} {kind}".replace(" ", "_")
            artifact.save(small, tmp_path / key)
            with torch.inference_mode():
                expected[key] = small(x)
    factored = surgery.apply(
        dense().float(), Plan(blocks=(BlockPlan(ranks=Ranks(q=2)), BlockPlan()))
    )
    artifact.save(surgery.merge_back(factored), tmp_path / "back")
    with torch.inference_mode():
        expected["back"] = surgery.merge_back(factored)(x)
    save_file(expected, tmp_path / "expected.safetensors")
    code = (
        "import sys, pathlib, torch\n"
        "from safetensors.torch import load_file\n"
        "from vitailor import artifact\n"
        "torch.set_num_threads(1)\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "expected = load_file(folder / 'expected.safetensors')\n"
        "x = expected.pop('input')\n"
        "with torch.inference_mode():\n"
        "    for name, y in expected.items():\n"
        "        if not torch.equal(artifact.load(folder / name)(x), y): print('differs:', name)\n"
        "print('compared', len(expected))\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True
    ).stdout
    assert found == "compared 16\n"
