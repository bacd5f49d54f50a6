"""Multi-dimensional compression: every candidate is on the budget, judged as told, and nothing is done twice."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch
from timm.data import dataset_factory
from torch import Tensor
from torch.utils.data import IterableDataset
from torchvision.transforms.functional import to_pil_image

import vitailor as vt
from conftest import build
from vitailor import dependence
from vitailor.data import loader, open_images, resolve_preprocessing, timm_datasets
from vitailor.hosts import shape_of
from vitailor.methods import candidates, multi_dim, ranking, weight_sharing
from vitailor.methods.multi_dim import JOURNAL
from vitailor.policy import sized, sizes_of
from vitailor.provenance import weights_hash
from vitailor.shape import DENSE
from vitailor.simulate import divergence

HALF = vt.Budget(macs=0.6)
#: Images to judge candidates on.
REWARD = 12
DIMENSIONS = ("neurons", "heads", "tokens")
SMALL = {"token_blocks": (2,), "trials": 5}
TRAINING = {"epochs": 1, "batch_size": 8, "lr": 1e-3, "checkpoint_every": 1}


@cache
def dense() -> torch.nn.Module:
    return build(depth=3, num_heads=4, num_classes=6)


@cache
def labeled() -> list[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(30, 3, *dense().patch_embed.img_size, generator=generator)
    with torch.inference_mode():
        return list(zip(x, dense()(x).argmax(-1).tolist(), strict=True))


def found(folder=None, *, data=None, budget=HALF, **settings):
    method = vt.MultiDim(**(SMALL | settings))
    images = labeled() if data is None else data
    return vt.search(dense(), budget, data=images, method=method, folder=folder)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"compensation": False, "round_to": 1, "stages": None},
        {"criterion": "output_error", "dimensions": ("neurons", "qk", "v", "tokens")},
        {"tokens": "attention", "reward": "accuracy"},
        {"tokens_apart": True, "token_blocks": (1, 3)},
        {"tokens": "fuse-dependence", "criterion": "output_error"},
        {"space": "harm", "tokens": "ward", "dimensions": ("neurons", "heads", "v", "tokens")},
        {"sampler": "random", "bandwidths": "median", "estimator": "unbiased"},
        {"dimensions": ("neurons", "ranks", "tokens"), "sampler": "random"},
        {"dimensions": ("heads", "ranks"), "compensation": False, "round_to": 1},
    ],
)
def test_every_candidate_and_the_result_are_on_the_budget(settings):
    result = found(**settings)
    limit = HALF.limit(shape_of(dense()))
    assert len(result.trials) == SMALL["trials"]
    assert all(0.9 * limit < trial["macs"] <= limit for trial in result.trials)
    assert result.best["reward"] == max(trial["reward"] for trial in result.trials)
    shape = shape_of(result.model)
    assert shape.macs == result.best["macs"]
    assert sizes_of(shape, settings.get("dimensions", DIMENSIONS)) == result.best["policy"]
    fused = [block.fuses for block in shape.blocks]
    fusing = settings.get("tokens", "fuse").startswith("fuse")
    assert any(fused) == (fusing and shape.merges_tokens)
    assert len({json.dumps(trial["policy"]) for trial in result.trials}) > 1


@pytest.mark.parametrize("sharing", [None, TRAINING | {"lr": 0.1}])
def test_the_reward_is_how_close_the_outputs_come_on_images_that_nothing_else_sees(
    monkeypatch, sharing
):
    seen: list[Tensor] = []
    score = dependence.score

    def listening(model, batches, **more):
        seen.extend(x for images, _ in batches for x in images)
        return score(model, batches, **more)

    monkeypatch.setattr(dependence, "score", listening)
    result = vt.search(
        dense(),
        HALF,
        data=labeled(),
        train=None if sharing is None else labeled(),
        method=vt.MultiDim(
            token_blocks=(2,), compensation=False, reward_images=12, trials=3, sharing=sharing
        ),
    )
    small = result.model
    judged = [i for i, (x, _) in enumerate(labeled()) if not any(torch.equal(x, y) for y in seen)]
    assert len(judged) == 12
    x = torch.stack([labeled()[i][0] for i in judged])
    with torch.inference_mode():
        harm = divergence(small(x), dense()(x), 6).mean()
    assert -harm.item() == pytest.approx(result.best["reward"], rel=1e-4)


def test_accuracy_as_reward_is_that_of_the_candidate():
    judged = labeled()[:14]
    result = vt.search(
        dense(),
        HALF,
        data=[x for x, _ in labeled()[14:]],
        reward=judged,
        method=vt.MultiDim(**SMALL, reward="accuracy", compensation=False),
    )
    got = vt.evaluate(result.model, judged)
    assert got.top1 == pytest.approx(result.best["reward"])


def test_of_streamed_images_only_those_that_candidates_are_judged_on_are_kept(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    pictures = [to_pil_image(torch.rand(3, 24, 24, generator=generator)) for _ in range(3 * REWARD)]

    class Stream(IterableDataset):
        def __iter__(self):
            return ((picture, i % 6) for i, picture in enumerate(pictures))

    kept: list[int] = []
    add = timm_datasets.Memory.add
    monkeypatch.setattr(
        timm_datasets.Memory, "add", lambda *args, **more: kept.append(1) or add(*args, **more)
    )
    monkeypatch.setattr(dataset_factory, "create_dataset", lambda *_, **__: Stream())
    method = vt.MultiDim(**(SMALL | {"trials": 1}), reward_images=REWARD)
    result = vt.search(dense(), HALF, data=labeled(), reward="wds/name", method=method)
    assert len(kept) == len(labeled()) + REWARD
    assert result.model.vitailor.record["facts"]["judged_on"]["images"] == REWARD


def calibrated(monkeypatch) -> list[int]:
    """How many images each dependence is estimated on, from now on."""
    seen: list[int] = []
    score = dependence.score

    def listening(model, batches, **more):
        seen.append(sum(len(x) for x, _ in batches))
        return score(model, batches, **more)

    monkeypatch.setattr(dependence, "score", listening)
    return seen


def test_nothing_is_calibrated_on_what_candidates_are_judged_on(monkeypatch, tmp_path):
    seen = calibrated(monkeypatch)
    # Tensors have numbers for names, so other ones are others, and the same ones the same.
    other = [(x + 1, label) for x, label in labeled()[:12]]
    method = vt.MultiDim(**(SMALL | {"trials": 1}))
    vt.search(dense(), HALF, data=labeled(), reward=other, method=method)
    whole = labeled()
    few = vt.MultiDim(**(SMALL | {"trials": 1, "reward_images": 12}))
    vt.search(dense(), HALF, data=whole, reward=whole, method=few)
    assert seen == [30, 18]
    vt.search(dense(), HALF, data=whole[:14], reward=whole, method=few)
    assert seen.pop() == 14  # the others are enough to judge by
    # A folder is the same however it is spelled, and so is a part of it.
    from PIL import Image

    for i in range(12):
        place = tmp_path / "photos" / "ab"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((24, 24), 50 + i).convert("RGB").save(place / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    transform = resolve_preprocessing(dense())
    opened = [open_images(name, transform, split="train") for name in ("photos", "photos/a")]
    sources = [one.source for one in opened]
    two = vt.MultiDim(**(SMALL | {"trials": 1, "reward_images": 4}))
    for reward in (str(tmp_path / "photos"), "photos/../photos", "photos/a", *opened):
        for data in ("photos", open_images("photos", transform, split="train")):
            vt.search(dense(), HALF, data=data, reward=reward, method=two)
    assert seen[2:] == [8] * 10
    assert [one.source for one in opened] == sources
    with pytest.raises(vt.UsageError, match="among those that candidates may be judged on"):
        vt.search(
            dense(),
            HALF,
            data="photos/a",
            evaluate="photos",
            class_map={"a": 0, "b": 1},
            method=two,
        )


def test_what_was_judged_on_is_recorded():
    facts = found(trials=1, reward_images=7).model.vitailor.record["facts"]
    assert facts["judged_on"]["images"] == 7
    assert len(facts["judged_on"]["list_hash"]) == 64


def test_weights_are_shared_among_policies_of_the_budget_on_other_images(monkeypatch):
    trained: list[set[str]] = []
    shapes = []
    fit, resize = weight_sharing.fit, weight_sharing.resize

    def listening(model, config, images, **more):
        trained.append(set(images.identities))
        return fit(model, config, images, **more)

    def watching(model, shape, orders):
        shapes.append(shape)
        resize(model, shape, orders)

    monkeypatch.setattr(weight_sharing, "fit", listening)
    monkeypatch.setattr(weight_sharing, "resize", watching)
    whole = labeled()
    for train in (whole, [(x.clone(), label) for x, label in whole]):
        for seed in (0, 1):
            shapes.clear()
            vt.compress(
                dense(),
                vt.MultiDim(**(SMALL | {"trials": 1, "reward_images": 8}), sharing=TRAINING),
                HALF,
                data=whole,
                reward=whole,
                train=train,
                seed=seed,
            )
            judged = open_images(whole, None).draw(8, seed)
            assert len(trained[-1]) == 22
            assert not trained[-1] & set(judged.identities)
            limit = HALF.limit(shape_of(dense()))
            assert all(0.9 * limit < shape.macs <= limit for shape in shapes)
            assert len({shape.to_json() for shape in shapes}) == len(shapes) == 3
            # The last one is what the model computes with.
            trained.append({str(shapes)})
    assert trained[1] != trained[3]  # another seed draws others


@pytest.mark.parametrize("sharing", [None, TRAINING])
def test_rewards_and_results_are_compensated_on_calibration_images_alone(monkeypatch, sharing):
    seen: list[tuple[str, Tensor]] = []

    def listening(name, real):
        def call(*args, **more):
            seen.extend(
                (name, x)
                for batches in args
                if hasattr(batches, "batches")
                for images, _ in batches
                for x in images
            )
            return real(*args, **more)

        return call

    places = {
        "result": (multi_dim, "cut"),
        "shared": (multi_dim, "dense_sweep"),
        "dense": (ranking, "dense_sweep"),
    }
    for name, (module, function) in places.items():
        monkeypatch.setattr(module, function, listening(name, getattr(module, function)))
    method = vt.MultiDim(**(SMALL | {"trials": 1, "reward_images": 8}), sharing=sharing)
    train = None if sharing is None else labeled()
    vt.compress(dense(), method, HALF, data=labeled(), train=train)
    judged = [x for x, _ in open_images(labeled(), None).draw(8, 0)]
    names = {name for name, _ in seen}
    assert names == {"result", "dense"} | ({"shared"} if sharing else set())
    assert len(seen) == 22 * len(names)
    assert not any(torch.equal(x, y) for _, x in seen for y in judged)


def test_single_cuts_are_measured_from_the_weights_that_are_cut(monkeypatch):
    """Not from the model before weights were shared, whose distance every cut would seem to cost."""
    uncut: list[float] = []
    measure = candidates.measure

    def listening(simulator, *args):
        uncut.append(simulator.trial(simulator.dense, 0).harm)
        return measure(simulator, *args)

    monkeypatch.setattr(candidates, "measure", listening)
    method = vt.MultiDim(
        **(SMALL | {"trials": 1}), space="harm", tokens="attention", sharing=TRAINING | {"lr": 0.1}
    )
    vt.compress(dense(), method, HALF, data=labeled(), train=labeled())
    assert uncut == [pytest.approx(0, abs=1e-6)]


def test_settings_reach_what_they_are_for(monkeypatch):
    told: list[dict] = []
    score = dependence.score

    def listening(model, batches, **more):
        told.append(more)
        return score(model, batches, **more)

    monkeypatch.setattr(dependence, "score", listening)
    own = {"bandwidths": (3.0,), "estimator": "unbiased"}
    found(trials=1, redundancy=0.7, relevance=1.0, **own)
    assert told == [own | {"redundancy_weight": 0.7, "tokens": False}]
    shares: list[float] = []
    mix = dependence.UnitScores.neurons
    monkeypatch.setattr(
        dependence.UnitScores,
        "neurons",
        lambda self, relevance: shares.append(relevance) or mix(self, relevance),
    )
    found(trials=1, relevance=0.3)
    assert shares == [0.3] * 3


def test_the_sampler_the_largest_ratio_and_the_step_are_those_asked_for(monkeypatch):
    samplers: list[str] = []
    search = candidates.search
    monkeypatch.setattr(
        candidates,
        "search",
        lambda *args, sampler, **more: (
            samplers.append(sampler) or search(*args, sampler=sampler, **more)
        ),
    )
    policies = [
        [trial["policy"] for trial in found(sampler=sampler, initial=1).trials]
        for sampler in ("random", "gp")
    ]
    assert samplers == ["random", "gp"]
    assert policies[0] != policies[1]
    full = shape_of(dense()).blocks[0].mlp_dim
    for trial in found(most=0.45, budget=vt.Budget(macs=0.7)).trials:
        assert min(trial["policy"]["mlp_dim"]) >= 0.5 * full  # rounded to what kernels like
    odd = found(round_to=1, compensation=False).trials
    assert any(size % 2 for trial in odd for size in trial["policy"]["mlp_dim"])


def test_images_of_both_trainings_are_augmented_alike():
    unlike = vt.MultiDim(**SMALL, sharing=TRAINING, training=TRAINING | {"scale": (0.5, 1.0)})
    with pytest.raises(vt.UsageError, match=r"sharing\.scale is None, training\.scale"):
        vt.compress(dense(), unlike, HALF, data=labeled(), train=labeled())
    vt.MultiDim.paper(token_blocks=(2,)).check(shape_of(dense()), HALF)


def test_checkpoints_need_a_folder(tmp_path):
    file = tmp_path / "file"
    file.write_text("kept")
    with pytest.raises(vt.UsageError, match="is not a folder"):
        found(file)
    assert file.read_text() == "kept"


@pytest.mark.parametrize("bad", [{"token_blocks": ()}, {"bandwidths": ()}])
def test_nothing_is_not_a_choice(bad):
    with pytest.raises(vt.UsageError, match=next(iter(bad))):
        vt.MultiDim(**bad)


def test_batches_are_never_too_small_to_tell(monkeypatch):
    monkeypatch.setattr("vitailor.methods.ranking.BATCH", 4)
    assert found(
        trials=1, reward_images=17
    ).trials  # 13 are left: not three batches of 4 and one of 1


def test_batches_of_any_number_of_images_are_about_as_large():
    for images in range(1, 60_000, 31):
        size = ranking.batch_size(images)
        assert min(images, 64) <= (images % size or size) <= size <= max(images % 256, 192)


def test_half_precision():
    model = build(depth=3, num_heads=4, num_classes=6).bfloat16()
    method = vt.MultiDim(**(SMALL | {"trials": 2}))
    small = vt.compress(model, method, HALF, data=labeled())
    assert next(small.parameters()).dtype == torch.bfloat16


def test_a_budget_in_parameters_leaves_tokens_alone():
    result = found(budget=vt.Budget(params=0.8))
    assert all("num_tokens_out" not in trial["policy"] for trial in result.trials)
    assert not shape_of(result.model).merges_tokens
    with pytest.raises(vt.UsageError, match="no parameters"):
        found(budget=vt.Budget(params=0.8), dimensions=("tokens",))


def test_a_model_that_merges_already_goes_on_merging():
    merging = vt.compress(dense(), vt.TokenMerge(), vt.Budget(macs=0.9))
    method = vt.MultiDim(**(SMALL | {"trials": 2, "dimensions": ("neurons",)}))
    small = vt.compress(merging, method, vt.Budget(macs=0.8), data=labeled())
    assert not any(block.fuses for block in shape_of(small).blocks)
    more = vt.compress(merging, vt.MultiDim(**SMALL), vt.Budget(macs=0.5), data=labeled())
    before = shape_of(merging).blocks
    for block, old in zip(shape_of(more).blocks, before, strict=True):
        fewer = block.num_tokens_out < min(block.num_tokens_in, old.num_tokens_out)
        assert block.fuses <= fewer
    # What was judged is what is built: later blocks go on merging.
    first = vt.MultiDim(**SMALL | {"token_blocks": (1,), "dimensions": ("tokens",)})
    result = vt.search(merging, vt.Budget(macs=0.7), data=labeled(), method=first)
    built = shape_of(result.model)
    assert (built.macs, built.params) == (result.best["macs"], result.best["params"])
    assert [block.fuses for block in built.blocks] == [True, False, False]
    weighed = vt.MultiDim(**SMALL, tokens="fuse-dependence")
    with pytest.raises(vt.UsageError, match="fewer tokens in later blocks"):
        vt.compress(merging, weighed, vt.Budget(macs=0.5), data=labeled())


@pytest.mark.parametrize("compensation", [True, False])
@pytest.mark.parametrize("budget", [vt.Budget(macs=0.75), vt.Budget(params=0.75)])
def test_ranks_of_the_mlp_are_searched_and_load_again(budget, compensation, tmp_path):
    settings = {"dimensions": ("heads", "ranks"), "compensation": compensation, "initial": 0}
    result = found(budget=budget, **settings)
    shape, own = shape_of(result.model), shape_of(dense())
    assert any(b.ranks != DENSE for b in shape.blocks)
    # The first candidate cuts everything alike.
    first = sized(own, result.trials[0]["policy"])
    assert all(
        b.ranks.fc1 and b.ranks.fc2 and b.num_heads < own.blocks[0].num_heads for b in first.blocks
    )
    x = torch.stack([x for x, _ in labeled()[:4]])
    vt.save(result.model, tmp_path / "small")
    again = vt.load(tmp_path / "small")
    assert shape_of(again).blocks == shape.blocks
    with torch.inference_mode():
        assert torch.equal(again(x), result.model(x))
    # A model with factors is cut further by what it has.
    vt.compress(result.model, vt.MultiDim(**SMALL), vt.Budget(macs=0.6), data=labeled())


def test_ranks_are_refused_where_nothing_is_known_of_them():
    low = vt.compress(
        dense(), vt.LowRank(projections=("fc1",)), vt.Budget(params=0.9), data=labeled()
    )
    ranks = ("neurons", "ranks")
    cases = [
        (low, {}, "low-rank projections already"),
        (dense(), {"space": "harm"}, "harm of lower ranks is not measured"),
        (dense(), {"sharing": TRAINING}, "cannot be shared over ranks"),
    ]
    for model, settings, why in cases:
        method = vt.MultiDim(**SMALL, dimensions=ranks, **settings)
        with pytest.raises(vt.UsageError, match=why):
            vt.compress(model, method, vt.Budget(params=0.7), data=labeled(), train=labeled())


def test_where_candidates_were_kept_is_not_recorded(tmp_path):
    secret = f"sqlite:///{tmp_path / 'secret.db'}"
    result = found(storage=secret, trials=1)
    (step,) = result.model.vitailor.steps
    assert "secret" not in json.dumps(step.settings)
    assert "secret" not in json.dumps(result.model.vitailor.record["facts"])
    assert vt.MultiDim(**step.settings).trials == 1
    with pytest.raises(vt.UsageError, match=r"unknown://\*\*\*@host") as refused:
        found(storage="unknown://me:pass@word@host/db", trials=1)
    assert "word" not in str(refused.value)


def test_a_model_of_no_fixed_number_of_tokens_is_refused_before_any_work():
    model = build(depth=3, num_heads=4, num_classes=6, dynamic_img_size=True)
    told: list[int] = []
    for method in (vt.MultiDim(**SMALL), vt.ClosedForm()):
        with pytest.raises(vt.UnsupportedModelError, match="fixed number of tokens"):
            vt.compress(
                model,
                method,
                HALF,
                data=labeled(),
                progress=lambda *_: told.append(0),
                on_trial=lambda *_: told.append(0),
            )
    assert not told
    widths = vt.MultiDim(dimensions=("neurons", "heads"), trials=2)
    assert vt.compress(model, widths, vt.Budget(macs=0.7), data=labeled())


def test_candidates_are_kept_as_they_come(tmp_path):
    lines: list[list[dict]] = []

    def look(*_):
        text = (tmp_path / "trials.jsonl").read_text("utf-8")
        lines.append([json.loads(line) for line in text.splitlines()])

    result = vt.search(
        dense(),
        HALF,
        data=labeled(),
        method=vt.MultiDim(**SMALL),
        folder=tmp_path,
        on_trial=look,
    )
    assert [len(so_far) for so_far in lines] == [1, 2, 3, 4, 5]
    assert lines[-1] == result.trials


def test_what_was_changed_is_named(tmp_path):
    def run(**settings):
        method = vt.MultiDim(**(SMALL | {"trials": 1, "training": TRAINING} | settings))
        more = {"data": labeled(), "train": labeled(), "folder": tmp_path, "resume": True}
        return vt.compress(dense(), method, HALF, **more)

    run()
    with pytest.raises(vt.UsageError, match=r"cut\.pt was made with another trials: 1, not 2\."):
        run(trials=2)
    with pytest.raises(vt.UsageError, match=r"another redundancy: 0\.1, not 0\.2\."):
        run(redundancy=0.2)


def test_units_go_by_dependence_on_the_predictions():
    result = found(compensation=False, reward_images=10, trials=2)
    (step,) = result.model.vitailor.steps
    images = open_images(labeled(), result.model.vitailor.preprocessing, split="train")
    judged = images.draw(10, 0)
    rest = images.subset(i for i, name in enumerate(images.names) if name not in set(judged.names))
    scores = dependence.score(dense(), loader(rest, batch_size=len(rest)))
    checked = 0
    for plan, own in zip(step.plan.blocks, scores, strict=True):
        for kept, score in ((plan.neurons, own.neurons()), (plan.heads, own.heads)):
            if kept is None:
                continue
            best = score.argsort(descending=True, stable=True)[: len(kept)]
            assert sorted(best.tolist()) == list(kept)
            checked += 1
    assert checked


def test_weights_on_harms_begin_with_the_closed_form_s_allocation():
    dimensions = ("neurons", "heads", "qk", "v", "tokens")
    method = vt.MultiDim(
        space="harm",
        criterion="output_error",
        tokens="attention",
        dimensions=dimensions,
        trials=3,
        initial=1,
    )
    data, judged = labeled()[:20], [(x, 0) for x, _ in labeled()[20:]]
    result = vt.search(dense(), HALF, data=data, reward=judged, method=method)
    closed = vt.ClosedForm(dimensions=dimensions, tune_images=0)
    small = shape_of(vt.compress(dense(), closed, HALF, data=data))
    first = result.trials[0]["policy"]
    for name, sizes in first.items():
        assert [getattr(block, name) for block in small.blocks] == sizes
    assert any(trial["policy"] != first for trial in result.trials)


def test_places_weigh_what_depends_on_the_predictions():
    result = found(tokens="fuse-dependence", reward_images=10, trials=2)
    images = open_images(labeled(), result.model.vitailor.preprocessing, split="train")
    judged = images.draw(10, 0)
    rest = images.subset(i for i, name in enumerate(images.names) if name not in set(judged.names))
    scores = dependence.score(dense(), loader(rest, batch_size=len(rest)), tokens=True)
    (step,) = result.model.vitailor.steps
    torch.testing.assert_close(
        torch.tensor(step.plan.token_weights), torch.stack([s.tokens for s in scores]).float()
    )
    assert all(s.tokens.min() == 0 and s.tokens.max() == 1 for s in scores)
    assert shape_of(result.model).weighs_tokens


def test_a_search_goes_on_where_it_stopped(tmp_path):
    first = found(tmp_path, trials=3)
    assert (tmp_path / JOURNAL).exists()
    more = found(tmp_path, trials=5)
    assert more.trials[:3] == first.trials
    again = found(tmp_path, trials=5)
    assert again.trials == more.trials
    assert again.model.vitailor.record["facts"]["own_trials"] == 0
    assert weights_hash(again.model) == weights_hash(more.model)
    # In one go it comes to the same.
    parts = tmp_path / "parts"
    found(parts, trials=2)
    assert found(parts, trials=5).best["policy"] == more.best["policy"]
    assert [t["policy"] for t in found(parts, trials=5).trials] == [
        t["policy"] for t in more.trials
    ]
    # Other images, another budget or model are another study.
    shifted = [(x + 1, label) for x, label in labeled()]
    fresh = found(tmp_path, trials=2, data=shifted)
    assert fresh.model.vitailor.record["facts"]["own_trials"] == 2
    for offset in (2, 3):
        judged = [(x + offset, label) for x, label in labeled()[:5]]
        method = vt.MultiDim(**(SMALL | {"trials": 1}))
        fresh = vt.search(
            dense(), HALF, data=labeled(), reward=judged, method=method, folder=tmp_path
        )
        assert fresh.model.vitailor.record["facts"]["own_trials"] == 1
    other = found(tmp_path, trials=3, budget=vt.Budget(macs=0.7))
    assert other.model.vitailor.record["facts"]["own_trials"] == 3


def test_shared_weights_and_fine_tuning_resume_bit_for_bit(tmp_path):
    def run(folder, resume=False):
        method = vt.MultiDim(
            **SMALL, sharing=TRAINING | {"distill": "soft"}, training=TRAINING | {"distill": "soft"}
        )
        return vt.compress(
            dense(),
            method,
            HALF,
            data=labeled(),
            train=labeled(),
            folder=folder,
            resume=resume,
        )

    whole = run(tmp_path / "whole")
    facts = whole.vitailor.record["facts"]
    assert facts["sharing"]["losses"]
    assert facts["finetune"]["losses"]
    cut_off = tmp_path / "cut off"
    run(cut_off)
    for gone in ("finetune", "cut.pt", JOURNAL):
        path = cut_off / gone
        if path.is_dir():
            for file in path.iterdir():
                file.unlink()
        else:
            path.unlink()
    assert weights_hash(run(cut_off, resume=True)) == weights_hash(whole)
    with pytest.raises(vt.UsageError, match="calibration"):
        vt.compress(
            dense(),
            vt.MultiDim(
                **SMALL,
                sharing=TRAINING | {"distill": "soft"},
                training=TRAINING | {"distill": "soft"},
            ),
            HALF,
            data=[(x + 1, label) for x, label in labeled()],
            train=labeled(),
            folder=cut_off,
            resume=True,
        )
    plain = vt.compress(dense(), vt.MultiDim(**SMALL), HALF, data=labeled())
    assert weights_hash(plain) != weights_hash(whole)


def test_presets_are_as_published():
    paper, released = vt.MultiDim.paper(), vt.MultiDim.released()
    assert (paper.stages, paper.round_to, paper.most) == (None, 1, 0.5)
    assert (paper.initial, paper.trials, paper.reward) == (100, 200, "accuracy")
    assert paper.sharing is not None
    assert released.sharing is None
    assert (paper.relevance, paper.tokens) == (1.0, "fuse-dependence")
    assert (released.relevance, released.tokens) == (0.1, "fuse")
    assert released.redundancy == paper.redundancy == 0.1
    assert paper.training.distill == "soft"
    assert released.training.distill is None
    for training in (paper.training, released.training):
        assert (training.epochs, training.batch_size, training.lr) == (300, 1024, 1e-3)
        assert (training.mixup, training.cutmix, training.ema) == (0.8, 1.0, 0.99996)
    assert released.compensation is paper.compensation is False
    assert vt.MultiDim.paper(trials=3).trials == 3


@pytest.mark.parametrize(
    ("settings", "budget", "error", "text"),
    [
        ({}, vt.Budget(latency_ms=1.0), vt.UsageError, "not a latency"),
        ({}, vt.Budget(macs=0.01), vt.BudgetError, "No policy meets"),
        ({"token_blocks": (9,)}, HALF, vt.UsageError, "Tokens cannot go in blocks"),
        ({"space": "harm"}, HALF, vt.UsageError, "fused tokens is not measured"),
        (
            {"space": "harm", "tokens": "ward"},
            vt.Budget(macs=0.01),
            vt.BudgetError,
            "No plan meets",
        ),
        (
            {"space": "harm", "tokens": "ward", "token_blocks": (9,), "sharing": TRAINING},
            HALF,
            vt.UsageError,
            "Tokens cannot go in blocks",
        ),
        ({"reward_images": 30}, HALF, vt.DataError, "none is left to calibrate on"),
        (
            {"dimensions": ("v",), "sharing": TRAINING},
            HALF,
            vt.UsageError,
            "Weights cannot be shared over v",
        ),
    ],
)
def test_what_cannot_be_is_refused(settings, budget, error, text):
    with pytest.raises(error, match=text):
        vt.compress(dense(), vt.MultiDim(**(SMALL | settings)), budget, data=labeled())


def test_labels_are_asked_for_where_they_are_read():
    unlabeled = [x for x, _ in labeled()]
    with pytest.raises(vt.DataError, match="needs labels"):
        found(data=unlabeled, reward="accuracy")
    assert found(data=unlabeled, trials=2).trials


def test_a_budget_that_is_met_leaves_nothing_to_search():
    with pytest.raises(vt.UsageError, match="trials"):
        vt.search(dense(), HALF, data=labeled(), method=vt.MultiDim(**SMALL), trials=0)
    method = vt.MultiDim(**SMALL | {"trials": 9})
    asked = vt.search(dense(), HALF, data=labeled(), method=method, trials=2, sampler="random")
    assert len(asked.trials) == 2
    with pytest.raises(vt.UsageError, match="nothing to search"):
        found(budget=vt.Budget(macs=1.0))
    same = vt.compress(dense(), vt.MultiDim(**SMALL), vt.Budget(macs=1.0), data=labeled())
    x = torch.stack([x for x, _ in labeled()[:2]])
    with torch.inference_mode():
        assert torch.equal(same(x), dense()(x))
