"""Images: folders, class numbering, draws, errors, Python sources, the digits."""

from __future__ import annotations

import copy
import json
import os
from collections import Counter
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder

from vitailor import data
from vitailor.data import (
    ImageSet,
    Preprocessing,
    UnreadableImageError,
    imageset,
    loader,
    open_images,
    readers,
    resolve_preprocessing,
    timm_datasets,
)
from vitailor.digits import digit_images, split_indices
from vitailor.errors import DataError, UsageError
from vitailor.training import Augmentation, TrainConfig

REAL = Path(os.environ.get("VITAILOR_DATA") or Path(__file__).parents[2] / "shared" / "data")
real_data = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real images at {REAL}")

SMALL = Preprocessing(
    input_size=(3, 8, 8),
    crop_pct=1.0,
    interpolation="bilinear",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)


def picture(path: Path, grey: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (10, 12), (grey,) * 3).save(path)


def folder(root: Path, counts: dict[str, int], suffix: str = ".png") -> Path:
    for c, (name, count) in enumerate(counts.items()):
        for i in range(count):
            picture(root / name / f"{i:03}{suffix}", grey=20 * c)
    return root


@pytest.fixture
def three_classes(tmp_path: Path) -> Path:
    return folder(tmp_path / "images", {"b": 4, "a": 2, "c": 30})


# -- preprocessing


def test_preprocessing_of_a_timm_model_is_timms_and_round_trips_as_json() -> None:
    model = timm.create_model("vit_tiny_patch16_224")
    found = resolve_preprocessing(model)
    assert found.input_size == (3, 224, 224)
    assert (found.crop_pct, found.interpolation) == (0.9, "bicubic")
    assert found.mean == found.std == (0.5, 0.5, 0.5)
    assert Preprocessing.from_json(found.to_json()) == found
    image = Image.new("RGB", (300, 260), (255, 0, 255))
    torch.testing.assert_close(
        found.transform()(image), torch.tensor([1.0, -1.0, 1.0])[:, None, None].expand(3, 224, 224)
    )


def test_a_model_built_for_another_size_gets_images_of_that_size() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=96)
    assert resolve_preprocessing(model).input_size == (3, 96, 96)


def test_what_a_model_stores_counts_and_overrides_win() -> None:
    class Facts:
        preprocessing = SMALL

    model: Any = torch.nn.Identity()
    model.vitailor = Facts()
    assert resolve_preprocessing(model) == SMALL
    changed = resolve_preprocessing(
        model, input_size=32, crop_pct=0.5, interpolation="bicubic", mean=0.1, std=[0.2, 0.3, 0.4]
    )
    assert changed.input_size == (3, 32, 32)
    assert (changed.crop_pct, changed.interpolation) == (0.5, "bicubic")
    assert changed.mean == (0.1, 0.1, 0.1)
    assert changed.std == (0.2, 0.3, 0.4)


@pytest.mark.parametrize(
    "wrong",
    [
        {"interpolation": "magic"},
        {"crop_pct": 0.0},
        {"std": 0.0},
        {"mean": [0.1, 0.2]},
        {"input_size": (1, 8, 8)},
    ],
)
def test_settings_out_of_range_are_usage_errors_that_name_them(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        resolve_preprocessing(torch.nn.Identity(), **wrong)


# -- folders


def test_class_folders_are_numbered_in_sorted_order(three_classes: Path) -> None:
    images = open_images(three_classes, SMALL, num_classes=3, labels_needed=True)
    assert images.class_names == ("a", "b", "c")
    assert Counter(images.labels) == {0: 2, 1: 4, 2: 30}
    assert images.labeled
    assert images.num_images == len(images) == 36
    assert images.source == str(three_classes)
    x, label = images[2]
    assert x.shape == (3, 8, 8)
    assert label == 1  # "b", written with grey 0
    assert torch.equal(x, torch.full((3, 8, 8), -1.0))


def test_known_extensions_in_any_case_count_and_hidden_files_do_not(tmp_path: Path) -> None:
    for name in ("a/1.PNG", "a/2.JPEG", "a/3.webp", "a/deeper/4.bmp", "a/.5.png", ".b/6.png"):
        picture(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    images = open_images(tmp_path, SMALL)
    assert images.names == ("a/1.PNG", "a/2.JPEG", "a/3.webp", "a/deeper/4.bmp")
    assert images.class_names == ("a",)


def test_an_empty_class_folder_keeps_its_number(three_classes: Path) -> None:
    (three_classes / "aa").mkdir()
    images = open_images(three_classes, SMALL, num_classes=4)
    assert set(images.labels) == {0, 2, 3}


def test_a_folder_without_class_folders_is_unlabeled(tmp_path: Path) -> None:
    for i in range(3):
        picture(tmp_path / f"{i}.jpg")
    images = open_images(tmp_path, SMALL, num_classes=7)
    assert not images.labeled
    assert images[0][1] == -1
    with pytest.raises(DataError, match="no labels"):
        open_images(tmp_path, SMALL, labels_needed=True)


@pytest.mark.parametrize("num_classes", [2, 4, 1000])
def test_folders_that_do_not_fit_the_head_are_refused(
    three_classes: Path, num_classes: int
) -> None:
    with pytest.raises(DataError, match=rf"3 class folders.* {num_classes} classes.*--class-map"):
        open_images(three_classes, SMALL, num_classes=num_classes)


def test_synsets_map_to_imagenet_indices_for_a_thousand_classes_only(tmp_path: Path) -> None:
    folder(tmp_path, {"n01440764": 1, "n01443537": 1, "n15075141": 1})
    images = open_images(tmp_path, SMALL, num_classes=1000)
    assert images.labels == (0, 1, 999)
    assert images.class_names[999] == "n15075141"
    assert open_images(tmp_path, SMALL, num_classes=3).labels == (0, 1, 2)
    picture(tmp_path / "n99999999" / "0.png")
    with pytest.raises(DataError, match="n99999999"):
        open_images(tmp_path, SMALL, num_classes=1000)


def test_a_class_map_overrides(three_classes: Path, tmp_path: Path) -> None:
    text, mapping = tmp_path / "map.txt", tmp_path / "map.json"
    text.write_text("c\nunseen\nb\na\n")
    mapping.write_text(json.dumps({"c": 0, "b": 2, "a": 3}))
    counts = {0: 30, 2: 4, 3: 2}
    for class_map in (text, str(mapping), {"c": 0, "b": 2, "a": 3}):
        images = open_images(three_classes, SMALL, num_classes=1000, class_map=class_map)
        assert Counter(images.labels) == counts
        assert images.class_names[2] == "b"


def test_a_published_list_of_described_synsets_is_a_class_map(tmp_path: Path) -> None:
    root = folder(tmp_path / "images", {"n01443537": 1})
    text = tmp_path / "synset_words.txt"
    text.write_text("n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\n")
    assert open_images(root, SMALL, num_classes=2, class_map=text).labels == (1,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\nb\n", "c .*not in the class map"),
        ("a\nb\nc\na\n", "names a twice"),
        ('{"a": 0, "b": 1, "c": 5}', "index 5"),
        ('{"a": 0, "b": 1, "c": -1}', "index -1"),
        ('{"a": 0, "b": 1, "c": "x"}', "not an integer"),
        ('{"a": 0,', "not valid JSON"),
    ],
)
def test_a_bad_class_map_is_named(
    three_classes: Path, tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "map"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        open_images(three_classes, SMALL, num_classes=5, class_map=path)


def test_a_class_map_that_is_missing_or_for_no_folder_is_refused(three_classes: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        open_images(three_classes, SMALL, class_map="nowhere.txt")
    with pytest.raises(UsageError, match="class map"):
        open_images("digits", SMALL, class_map={"0": 0})


# -- draws


def test_a_draw_is_spread_over_classes_as_equally_as_possible(three_classes: Path) -> None:
    drawn = open_images(three_classes, SMALL, images=12)
    assert Counter(drawn.labels) == {0: 2, 1: 4, 2: 6}
    assert list(drawn.names) == sorted(drawn.names)
    assert len(set(open_images(three_classes, SMALL, images=3).labels)) == 3


def test_a_draw_depends_on_seed_and_list_alone(three_classes: Path) -> None:
    torch.manual_seed(1)
    first = open_images(three_classes, SMALL, images=9, seed=3)
    torch.manual_seed(2)
    state = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    again = open_images(three_classes, SMALL, num_classes=3, images=9, seed=3)
    renumbered = open_images(
        three_classes, SMALL, images=9, seed=3, class_map={"a": 2, "b": 1, "c": 0}
    )
    assert first.names == again.names == renumbered.names
    assert first.list_hash == again.list_hash != renumbered.list_hash
    assert open_images(three_classes, SMALL, images=9, seed=4).names != first.names
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1] == np.random.get_state()[1].tolist()  # noqa: NPY002


def test_the_drawn_list_never_changes(tmp_path: Path) -> None:
    # Written down: a new version of anything must draw the same images.
    names = [f"{c}/{i}.png" for c in "ab" for i in range(5)]
    assert imageset.draw_positions(names, [0] * 5 + [1] * 5, 5, 0, "") == [1, 2, 4, 8, 9]


def test_a_larger_draw_contains_a_smaller_one(three_classes: Path) -> None:
    draws = [set(open_images(three_classes, SMALL, images=n).names) for n in (5, 11, 36)]
    assert draws[0] < draws[1] < draws[2]


def test_drawing_more_than_there_are_names_both_numbers(three_classes: Path) -> None:
    with pytest.raises(DataError, match=r"36 images.* 37"):
        open_images(three_classes, SMALL, images=37)
    with pytest.raises(UsageError, match="0 images"):
        open_images(three_classes, SMALL, images=0)


def test_the_hash_is_of_relative_paths_and_labels(tmp_path: Path) -> None:
    counts = {"a": 2, "b": 1}
    here = open_images(folder(tmp_path / "here", counts), SMALL)
    there = open_images(folder(tmp_path / "there", counts), SMALL)
    other = open_images(folder(tmp_path / "other", {"a": 1, "b": 2}), SMALL)
    assert here.list_hash == there.list_hash != other.list_hash
    assert here.subset([2, 0, 1]).list_hash == here.list_hash
    lines = "a/000.png\t0\na/001.png\t0\nb/000.png\t1\n"
    assert here.list_hash == sha256(lines.encode()).hexdigest()


# -- what goes wrong


def test_missing_empty_and_mixed_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing-here cannot be opened: No such file"):
        open_images(tmp_path / "nothing-here", SMALL)
    (tmp_path / "empty" / "a").mkdir(parents=True)
    with pytest.raises(DataError, match="has no images"):
        open_images(tmp_path / "empty", SMALL)
    (tmp_path / "file.tar").write_bytes(b"")
    with pytest.raises(DataError, match="is a file"):
        open_images(tmp_path / "file.tar", SMALL)
    mixed = folder(tmp_path / "mixed", {"a": 1})
    picture(mixed / "loose.png")
    with pytest.raises(DataError, match=r"loose\.png"):
        open_images(mixed, SMALL)


def test_an_unreadable_folder_is_named(
    three_classes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir

    def deny(path: Any) -> Any:
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", deny)
    with pytest.raises(DataError, match=r"b cannot be read: Permission denied\. .*permissions"):
        open_images(three_classes, SMALL)


def test_no_readable_image_is_an_error_at_once(tmp_path: Path) -> None:
    for i in range(2):
        (tmp_path / f"{i}.png").write_text("not a picture")
    with pytest.raises(DataError, match="None of the 2 images"):
        open_images(tmp_path, SMALL)


def error_of(batches: DataLoader[Any]) -> DataError | None:
    try:
        list(batches)
    except DataError as error:
        # A kept traceback keeps workers alive, which workers forked later would wait for.
        return error.with_traceback(None)
    return None


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["truncated", "garbage"])
def test_a_corrupt_image_is_named_when_read(tmp_path: Path, workers: int, damage: str) -> None:
    root = folder(tmp_path, {"a": 5}, suffix=".jpg")
    bad = root / "a" / "003.jpg"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(bad)
    bad.write_bytes(bad.read_bytes()[:2000] if damage == "truncated" else b"\xff\xd8 garbage")
    images = open_images(root, SMALL)
    for data_loader in (
        loader(images, batch_size=2, workers=workers),
        DataLoader(images, 2, num_workers=workers),
    ):
        error = error_of(data_loader)
        assert isinstance(error, UnreadableImageError)
        assert error.message.startswith(f"{bad} cannot be read as an image: ")
        assert error.fix == "Replace or remove the file."
        assert str(error) == f"{error.message} {error.fix}"
        assert "\n" not in str(error)


# -- the same image


def test_an_image_is_the_same_in_other_sets(three_classes, tmp_path):
    here = open_images(three_classes, SMALL)
    linked = tmp_path / "some"
    linked.mkdir()
    for name in here.names[:3]:
        (linked / name.replace("/", "-")).symlink_to(three_classes / name)
    assert set(open_images(linked, SMALL).identities) == set(here.identities[:3])
    assert here.subset([2, 0]).identities == (here.identities[2], here.identities[0])
    folder = ImageFolder(three_classes)
    assert open_images(folder, SMALL).identities == here.identities
    part = Subset(Subset(folder, [4, 1, 3]), [2, 0])
    assert open_images(part, SMALL).identities == (here.identities[3], here.identities[4])
    tensors = TensorDataset(torch.randn(4, 3, 8, 8), torch.arange(4))
    own = open_images(tensors, None).identities
    assert len(set(own)) == 4
    assert open_images(Subset(tensors, [3]), None).identities == own[3:]
    assert not set(open_images(copy.deepcopy(tensors), None).identities) & set(own)


def test_an_image_in_memory_is_the_same_by_its_content():
    x = torch.randn(3, 3, 8, 8)
    first, second = (open_images(source, None).identities for source in (x, [x[2], x[0].clone()]))
    assert second == (first[2], first[0])
    # A picture is the same however it is augmented.
    pictures = [Image.effect_noise((12, 12), 50 + i).convert("RGB") for i in range(3)]
    crops = Augmentation.of(SMALL, TrainConfig(scale=(0.2, 0.5)))
    plain, augmented = open_images(pictures, SMALL), open_images(pictures, crops)
    assert not torch.equal(plain[0][0], augmented[0][0])
    assert plain.identities == augmented.identities
    assert len(set(plain.identities)) == 3


# -- loading


@pytest.mark.parametrize(
    ("device", "cores", "processes", "method", "asked", "expected"),
    [
        ("cpu", 16, 1, "fork", None, 0),
        ("cuda", 16, 1, "fork", None, 8),
        ("cuda", 6, 1, "fork", None, 6),
        ("cuda", 16, 4, "fork", None, 4),
        ("cuda", 2, 4, "fork", None, 1),
        ("cuda", 16, 1, "spawn", None, 0),
        ("cuda", 16, 1, "fork", 3, 3),
        ("cpu", 16, 1, "fork", 2, 2),
    ],
)
def test_an_accelerator_gets_its_share_of_readers(
    three_classes, monkeypatch, device, cores, processes, method, asked, expected
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr("torch.multiprocessing.get_start_method", lambda allow_none=False: method)
    images = open_images(three_classes, SMALL)
    assert readers(images, torch.device(device), asked) == expected
    held = open_images([torch.zeros(3, 8, 8)], None)
    assert readers(held, torch.device(device), asked) == (asked or 0)
    monkeypatch.setattr(data, "LEAST_SHARED", 2**60)
    assert readers(images, torch.device(device), asked) == (asked or 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_order_with_the_last_one_and_leave_the_random_state(
    three_classes: Path, workers: int
) -> None:
    images = open_images(three_classes, SMALL, images=7)
    state = torch.get_rng_state()
    batches = list(loader(images, batch_size=3, workers=workers))
    assert torch.equal(state, torch.get_rng_state())
    assert [len(x) for x, _ in batches] == [3, 3, 1]
    x_all, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert labels.dtype == torch.int64
    assert labels.tolist() == list(images.labels)
    assert torch.equal(x_all, torch.stack([x for x, _ in images]))


X = torch.arange(5 * 3 * 4 * 4, dtype=torch.float32).reshape(5, 3, 4, 4)
Y = torch.tensor([2, 0, 1, 1, 0])


@pytest.mark.parametrize(
    "data",
    [
        X,
        list(X),
        [X[:2], X[2:]],
        iter([X[:4], X[4]]),
        [(X[:3], Y[:3]), (X[3:], Y[3:])],
        [(X[i], int(Y[i])) for i in range(5)],
        [(X[:3], Y[:3].numpy()), (X[3:], Y[3:].tolist())],
        TensorDataset(X),
        TensorDataset(X, Y),
        DataLoader(TensorDataset(X, Y), batch_size=2),
        Subset(TensorDataset(torch.cat((X, X)), torch.cat((Y, Y))), range(5, 10)),
    ],
)
def test_python_sources_give_their_tensors(data: Any) -> None:
    images = open_images(data, None, num_classes=3)
    (x, labels), *rest = list(loader(images, batch_size=8))
    assert not rest
    assert torch.equal(x, X)
    assert labels.tolist() == (Y.tolist() if images.labeled else [-1] * 5)
    drawn = open_images(images, None, images=3)
    assert not images.labeled or set(drawn.labels) == {0, 1, 2}


def test_a_loader_takes_tensors_as_they_are() -> None:
    assert torch.equal(next(iter(loader([X], batch_size=5)))[0], X)


def test_a_dataset_of_pictures_goes_through_the_preprocessing() -> None:
    class Pictures(Dataset[Any]):
        classes = ("black", "white")

        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> Any:
            return Image.new("L", (9, 9), 255 * (index % 2)), index % 2

    images = open_images(Pictures(), SMALL)
    assert images[1][0].unique().tolist() == [1.0]
    assert images.labeled
    assert images.class_names == ("black", "white")
    assert len(open_images(Pictures(), SMALL, images=3)) == 3
    with pytest.raises(DataError, match=r"label 1.* 1 classes"):
        open_images(Pictures(), SMALL, num_classes=1)[1]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "gave no images"),
        (TensorDataset(X[:0]), "no images"),
        ([X.to(torch.uint8)], "uint8"),
        ([X[0, 0]], r"shape \(4, 4\)"),
        (["cat.png"], "A str"),
        ([(X[:2], Y[:1])], "1 labels with 2 images"),
        ([(X[0], 0), X[1]], "some images only"),
        ([(X[0], 0.7)], "float"),
        ([X[0], X[0, :, :2]], "differ in size"),
        (7, "int is not a source"),
        ([(X[0], 9)], "label 9"),
    ],
)
def test_other_python_objects_are_refused_with_the_reason(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_images(data, None, num_classes=3)


def test_an_endless_iterator_stops_at_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imageset, "MAX_BYTES_IN_MEMORY", 10 * X.nbytes)

    def forever() -> Any:
        while True:
            yield X

    with pytest.raises(DataError, match="GiB"):
        open_images(forever(), None)


def test_image_files_need_a_preprocessing(three_classes: Path) -> None:
    with pytest.raises(UsageError, match="preprocessing"):
        open_images(three_classes, None)


# -- the digits and timm's datasets


def test_the_digits_have_a_fixed_split() -> None:
    train, test = split_indices("train"), split_indices("test")
    assert (len(train), len(test)) == (1297, 500)
    assert sorted(train + test) == list(range(1797))
    assert test[:6] == [1, 6, 16, 17, 19, 23]
    grey, labels = digit_images("test")
    assert grey.shape == (500, 8, 8)
    assert grey.dtype == np.uint8
    assert grey.max() == 255
    assert set(labels.tolist()) == set(range(10))


def test_digits_open_by_name() -> None:
    train = open_images("digits:train", SMALL, num_classes=10, labels_needed=True)
    test = open_images("digits:test", SMALL, num_classes=1000)
    assert not set(train.names) & set(test.names)
    assert open_images("digits", SMALL).list_hash == test.list_hash
    assert open_images("digits", SMALL, split="train").list_hash == train.list_hash
    assert set(Counter(open_images("digits:train", SMALL, images=40).labels).values()) == {4}
    x, label = test[0]
    grey, labels = digit_images("test")
    assert label == labels[0]
    torch.testing.assert_close(x[1], torch.tensor(grey[0] / 127.5 - 1, dtype=torch.float32))
    with pytest.raises(UsageError, match="validate"):
        open_images("digits:validate", SMALL)
    with pytest.raises(DataError, match=r"label 9.* 5 classes"):
        open_images("digits", SMALL, num_classes=5)


def test_timm_readers_open_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder(tmp_path, {"a": 2, "b": 3})
    files = sorted(root.rglob("*.png"))
    asked = {}

    class Reader:
        def __init__(self) -> None:
            self.class_to_idx = {"a": 0, "b": 1}

        def __getitem__(self, index: int) -> Any:
            return files[index].open("rb"), int(files[index].parent.name == "b")

        def __len__(self) -> int:
            return len(files)

        def __iter__(self) -> Any:
            return ((Image.open(BytesIO(f.read_bytes())), int(f.parent.name == "b")) for f in files)

        def iter_targets(self) -> Any:
            return iter([0, 0, 1, 1, 1])

    def random_access(name: str, **options: Any) -> Any:
        asked.update(options, name=name)
        return timm.data.ImageDataset("", reader=Reader())

    def stream(name: str, **options: Any) -> Any:
        return timm.data.IterableImageDataset("", reader=Reader())

    from timm.data import dataset_factory

    monkeypatch.setattr(dataset_factory, "create_dataset", random_access)
    images = open_images("hfds/owner/name:test@somewhere", SMALL, num_classes=2, labels_needed=True)
    assert asked == {"name": "hfds/owner/name", "split": "test", "root": "somewhere"}
    assert images.class_names == ("a", "b")
    monkeypatch.setattr(dataset_factory, "create_dataset", stream)
    streamed = open_images("wds/name", SMALL)
    assert streamed.list_hash == images.list_hash
    assert torch.equal(streamed[4][0], images[4][0])
    assert (
        open_images("wds/name", SMALL, images=3).list_hash
        == open_images(images, SMALL, images=3).list_hash
    )
    files[1].write_bytes(b"broken")
    with pytest.raises(DataError, match="Image 1 of hfds"):
        images[1]


def test_a_timm_dataset_that_cannot_be_opened_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for name in (f"torch/cifar10@{REAL / 'nowhere'}", "hfds/a/b@nowhere", "wds/nowhere"):
        assert name.startswith(timm_datasets.PREFIXES)
        with pytest.raises(DataError, match=f"timm cannot open {name}"):
            open_images(name, SMALL)
    assert capsys.readouterr().out == ""


# -- real images


@real_data
def test_tiny_imagenet_opens_as_it_is() -> None:
    images = open_images(REAL / "tiny_imagenet" / "validation", SMALL, num_classes=200)
    assert isinstance(images, ImageSet)
    assert len(images) == 5000
    assert len(images.class_names) == len(set(images.labels)) == 200
    assert images[4999][0].shape == (3, 8, 8)
    assert set(Counter(images.draw(400).labels).values()) == {2}
    with pytest.raises(DataError, match=r"200 class folders.* 100 classes.*--class-map"):
        open_images(REAL / "tiny_imagenet" / "validation", SMALL, num_classes=100)


@real_data
def test_imagenet_photographs_map_to_imagenet_indices() -> None:
    root = REAL / "imagenet" / "validation"
    images = open_images(root, SMALL, num_classes=1000, labels_needed=True)
    by_map = open_images(
        root, SMALL, num_classes=1000, class_map=REAL / "imagenet" / "synset_words.txt"
    )
    assert len(images) == 1000
    assert len(set(images.labels)) == 430
    assert images.labels == by_map.labels
    assert images.list_hash == by_map.list_hash
