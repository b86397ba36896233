"""The digits in the competition's layout, what reading a folder refuses, and a loader that behaves as a DataLoader."""

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, RandomSampler

from evaluator.data import COLUMNS, Examples, Loader, load
from evaluator.files import Problem

# Preparing.


@pytest.fixture(scope="module")
def digits(prepare, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "digits"
    prepare.prepare_digits(folder)
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_same_files_on_every_run(prepare, digits, tmp_path):
    np.random.seed(1)  # of no influence
    torch.manual_seed(1)
    prepare.prepare_digits(tmp_path / "digits")
    assert digests(tmp_path / "digits") == digests(digits)


def test_the_competitions_layout(digits):
    names = {"validation.csv", "test.csv", "age_class_weights.json", "dataset.json"}
    names |= {f"{split}/{part}.csv" for split in ("public", "private") for part in ("retain", "forget")}
    files = set(digests(digits))
    assert names <= files
    images = files - names
    assert len(images) == 1797 and all(name.startswith("images/") and name.endswith(".png") for name in images)
    tables = {name: pd.read_csv(digits / name, dtype={"image_id": str}) for name in names if name.endswith(".csv")}
    for table in tables.values():
        assert list(table.columns) == COLUMNS
        assert {f"images/{image_id.replace('-', '/')}.png" for image_id in table.image_id} <= images
        assert table.image_id.str.fullmatch(r"\d+-\d+").all()
    image = Image.open(digits / sorted(images)[0])
    assert image.size == (8, 8) and image.mode == "RGB"
    train = pd.concat([tables["public/retain.csv"], tables["public/forget.csv"]])
    counts = json.loads((digits / "age_class_weights.json").read_text())
    assert counts == {str(label): int((train.age_group == label).sum()) for label in range(10)}
    described = json.loads((digits / "dataset.json").read_text())
    assert {"name": "digits", "image_size": 8, "classes": 10}.items() <= described.items()
    assert described["recipe"]["small_images"]


def test_the_images_and_labels_are_the_digits(digits):
    original = load_digits()
    data = load(digits)
    assert sum(map(len, (data.train, data.validation, data.test))) == 1797
    for part in (data.retain, data.forget, data.validation, data.test):
        rows = [int(image_id.split("-")[1]) for image_id in part.image_ids]
        expected = torch.from_numpy(np.round(original.images[rows] * 255 / 16))
        assert (part.images == expected[:, None].to(torch.uint8)).all()
        assert part.age_group.tolist() == original.target[rows].tolist()


def test_splits(digits):
    public, private = load(digits, "public"), load(digits, "private")
    assert (public.split, private.split) == ("public", "private")
    assert public.train.equals(private.train)
    assert public.validation.equals(private.validation) and public.test.equals(private.test)
    assert not set(public.forget.image_ids) & set(private.forget.image_ids)
    assert public.digest != private.digest
    for data in (public, private):
        assert len(data.forget) >= 100
        assert not set(data.retain.person_id.tolist()) & set(data.forget.person_id.tolist())
        sets = [set(part.image_ids) for part in (data.retain, data.forget, data.validation, data.test)]
        assert len(set.union(*sets)) == sum(map(len, sets)) == 1797
        assert set(data.retain.age_group.tolist()) == set(range(10))
    assert len(public.validation) == len(public.test) == 179


def test_small_digits_have_two_splits_too(small_digits):
    for split in ("public", "private"):
        data = load(small_digits, split)
        assert len(data.forget) >= 50 and len(data.retain) >= 50 and len(data.test) == 30


# Reading.


@pytest.fixture
def folder(small_digits, tmp_path) -> Path:
    """A copy to break."""
    return shutil.copytree(small_digits, tmp_path / "few", ignore=shutil.ignore_patterns("original_model.pth"))


def edit(path: Path, change) -> None:
    """change: edits the table, or returns another."""
    table = pd.read_csv(path, dtype=object)
    changed = change(table)
    table = table if changed is None else changed
    table.to_csv(path, index=False)


def refused(folder: Path, split: str = "public") -> str:
    with pytest.raises(Problem) as problem:
        load(folder, split)
    message = str(problem.value)
    assert "\n" not in message
    return message


def first_image(folder: Path) -> Path:
    image_id = pd.read_csv(folder / "public" / "forget.csv", dtype=str).image_id[0]
    return folder / "images" / f"{image_id.replace('-', '/')}.png"


def test_missing_image(folder):
    image = first_image(folder)
    image.unlink()
    assert str(image) in refused(folder) and "missing" in refused(folder)


@pytest.mark.parametrize("content", [b"", b"not a png", "cut"])
def test_corrupt_image(folder, content):
    image = first_image(folder)
    image.write_bytes(image.read_bytes()[:40] if content == "cut" else content)
    assert str(image) in refused(folder) and "not a readable image" in refused(folder)


def test_image_of_another_size(folder):
    image = first_image(folder)
    Image.new("RGB", (9, 8)).save(image)
    message = refused(folder)
    assert "8x9" in message and "8x8" in message and str(folder / "images") in message


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("file", ["public/retain.csv", "test.csv"])
def test_csv_without_a_column(folder, file, column):
    edit(folder / file, lambda table: table.drop(columns=column))
    message = refused(folder)
    assert str(folder / file) in message and f"'{column}'" in message


@pytest.mark.parametrize("label", ["10", "-1", "1.5", "three", "", "1e30"])
def test_label_outside_the_classes(folder, label):
    def change(table):
        table.loc[3, "age_group"] = label

    edit(folder / "validation.csv", change)
    message = refused(folder)
    assert f"{folder / 'validation.csv'}: row 5: age_group" in message and "0 to 9" in message  # the header is row 1
    shown = {"": "nan", "1e30": "1e+30"}.get(label, label)
    assert f"age_group is '{shown}'," in message


@pytest.mark.parametrize("column", ["age", "person_id"])
def test_a_number_that_is_no_integer(folder, column):
    def change(table):
        table.loc[0, column] = "old"

    edit(folder / "public" / "forget.csv", change)
    message = refused(folder)
    assert f"{folder / 'public' / 'forget.csv'}: row 2: {column}" in message and "old" in message


@pytest.mark.parametrize("part", ["retain", "forget"])
def test_empty_set(folder, part):
    path = folder / "public" / f"{part}.csv"
    path.write_text(",".join(COLUMNS) + "\n")
    assert str(path) in refused(folder) and "empty" in refused(folder)
    path.write_text("")
    assert str(path) in refused(folder)


def test_overlapping_retain_and_forget(folder):
    retain, forget = (pd.read_csv(folder / "public" / f"{part}.csv", dtype=str) for part in ("retain", "forget"))
    pd.concat([forget, retain.iloc[[4, 7]]]).to_csv(folder / "public" / "forget.csv", index=False)
    message = refused(folder)
    assert str(folder / "public" / "forget.csv") in message and "2 images" in message
    assert min(retain.image_id[4], retain.image_id[7]) in message


def test_an_image_listed_twice(folder):
    def change(table):
        table.loc[5, "image_id"] = table.loc[2, "image_id"]

    edit(folder / "test.csv", change)
    message = refused(folder)
    assert f"{folder / 'test.csv'}: row 7" in message and "twice" in message


@pytest.mark.parametrize("file", ["dataset.json", "age_class_weights.json"])
@pytest.mark.parametrize("content", ["{", "[1, 2]", ""])
def test_bad_json(folder, file, content):
    (folder / file).write_text(content)
    assert str(folder / file) in refused(folder)


def test_missing_files(folder, tmp_path):
    assert str(tmp_path / "nothing") in refused(tmp_path / "nothing")
    assert "data/prepare.py digits" in refused(tmp_path / "digits")
    assert "'third'" in refused(folder, "third") and "private, public" in refused(folder, "third")
    (folder / "validation.csv").unlink()
    assert str(folder / "validation.csv") in refused(folder)
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in refused(tmp_path / "empty")


def test_the_unchanged_folder_of_the_competition(small_digits, tmp_path):
    """No dataset.json, no splits, no test labels."""
    kaggle = tmp_path / "neurips-2023-machine-unlearning"
    kaggle.mkdir()
    shutil.copytree(small_digits / "images", kaggle / "images")
    for name in ("validation.csv", "age_class_weights.json", "public/retain.csv", "public/forget.csv"):
        shutil.copy(small_digits / name, kaggle)
    data, prepared = load(kaggle), load(small_digits)
    for part in ("retain", "forget", "validation"):
        assert getattr(data, part).equals(getattr(prepared, part))
    assert data.test is None and data.held_out is data.validation
    assert (data.split, data.classes, data.recipe, data.name) == ("kaggle", 10, {}, kaggle.name)
    assert data.class_counts.tolist() == prepared.class_counts.tolist()


def test_rows_are_in_the_order_of_their_image_paths(folder):
    """As in the competition, and whatever the order in the file."""
    before = load(folder)
    edit(folder / "public" / "retain.csv", lambda table: table.sort_values("image_id", ascending=False))
    after = load(folder)
    assert before.retain.equals(after.retain)
    paths = [image_id.replace("-", "/") + ".png" for image_id in after.retain.image_ids]
    assert paths == sorted(paths)


def test_the_digest_tells_images_and_labels_apart(small_digits):
    data = load(small_digits).retain
    other = data.clone()
    assert other.equals(data) and other.digest == data.digest
    other = data.clone()
    other.age_group[3] += 1
    assert not other.equals(data) and other.digest != data.digest
    other = data.clone()
    other.images[3, 0, 0, 0] += 1
    assert not other.equals(data) and other.digest != data.digest


# Loading.


def examples(count: int) -> Examples:
    source = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, 4, 4), generator=source).to(torch.uint8)
    numbers = torch.arange(count)
    return Examples([f"1-{index}" for index in range(count)], images, numbers % 10, numbers + 20, numbers // 5)


def order_of(loader) -> list[str]:
    return [image_id for batch in loader for image_id in batch["image_id"]]


def test_loader_behaves_as_a_data_loader():
    data = examples(50)
    loader = Loader(data, 16)
    assert isinstance(loader, DataLoader)
    assert len(loader) == 4 and loader.batch_size == 16 and loader.dataset is data and len(loader.dataset) == 50
    assert [len(batch["image"]) for batch in loader] == [16, 16, 16, 2]
    assert isinstance(loader.sampler, RandomSampler)
    first, second = order_of(loader), order_of(loader)
    assert sorted(first) == sorted(second) == sorted(data.image_ids)
    assert first != second != data.image_ids
    assert len(next(iter(loader))["image"]) == 16
    paired = list(zip(loader, loader, strict=True))  # two epochs at the same time
    assert len(paired) == 4
    assert sorted(image_id for batch, _ in paired for image_id in batch["image_id"]) == sorted(data.image_ids)


def test_batches_are_what_a_data_loader_would_collate():
    data = examples(20)
    ours = list(Loader(data, 8, shuffle=False))
    theirs = list(DataLoader(data, batch_size=8))
    assert len(ours) == len(theirs) == 3
    for own, expected in zip(ours, theirs, strict=True):
        assert list(own) == list(expected) == ["image", "image_id", "age_group", "age", "person_id"]
        assert own["image_id"] == expected["image_id"]
        for name in ("image", "age_group", "age", "person_id"):
            assert own[name].dtype == expected[name].dtype and torch.equal(own[name], expected[name])
    batch = ours[0]
    assert batch["image"].dtype == torch.float32 and batch["image"].max() > 200 and batch["image"].min() >= 0
    assert batch["age_group"].dtype == torch.int64


def test_a_sample():
    data = examples(20)
    sample = data[7]
    assert torch.equal(sample["image"], data.images[7].float()) and sample["image"].dtype == torch.float32
    assert {name: sample[name] for name in COLUMNS} == {"image_id": "1-7", "age_group": 7, "age": 27, "person_id": 1}
    assert data[-1]["image_id"] == "1-19"
    subset = torch.utils.data.Subset(data, [3, 5])
    assert [sample["image_id"] for sample in subset] == ["1-3", "1-5"]


def test_it_is_a_base_for_the_users_own_loader():
    loader = Loader(examples(20), 8)
    own = DataLoader(loader.dataset, batch_size=5, shuffle=True, drop_last=True)
    assert Counter(order_of(own)) == Counter(loader.dataset.image_ids)
    assert next(iter(own))["image"].shape == (5, 3, 4, 4)


def test_what_a_method_does_to_a_batch_stays_in_the_batch():
    data = examples(20)
    before = data.clone()
    for batch in Loader(data, 8):
        batch["image"].zero_()
        batch["age_group"].zero_()
    data[0]["image"].zero_()
    assert data.equals(before)


def test_orders_come_from_the_generators():
    data = examples(30)

    def sources(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    loader = Loader(data, 8, sources(1, 2, 3))
    assert len(loader) == 4
    epochs = [[], [], []]
    for _ in range(2):
        for batch in loader:
            count = len(batch["image"]) // 3
            assert len(batch["image"]) in (24, 18)
            for k in range(3):
                epochs[k] += batch["image_id"][k * count : (k + 1) * count]
    for k, seed in enumerate((1, 2, 3)):
        alone = Loader(data, 8, sources(seed))
        assert epochs[k] == order_of(alone) + order_of(alone)
        assert sorted(epochs[k][:30]) == sorted(epochs[k][30:]) == sorted(data.image_ids)
    assert epochs[0] != epochs[1] != epochs[2]
    torch.manual_seed(1)
    assert order_of(Loader(data, 8)) == epochs[0][:30]  # None is torch's global generator


def test_another_batch_size():
    data = examples(30)
    source = torch.Generator().manual_seed(1)
    loader = Loader(data, 8, [source])
    other = loader.with_batch_size(20)
    assert (other.batch_size, len(other), other.dataset) == (20, 2, data) and loader.batch_size == 8
    assert other.generators[0] is source
    assert order_of(Loader(data, 8, shuffle=False).with_batch_size(7)) == data.image_ids
