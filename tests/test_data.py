"""The digits in the competition's layout, what reading a folder refuses, and a loader that behaves as a DataLoader."""

import hashlib
import io
import json
import os
import pickle
import reprlib
import shutil
import struct
import warnings
import zlib
from collections import Counter
from dataclasses import fields, replace
from itertools import count
from pathlib import Path

import numpy as np
import pandas as pd
import prepare
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, RandomSampler

from evaluator.data import COLUMNS, TENSORS, Data, Examples, Loader, load, splits
from evaluator.files import Problem
from evaluator.pixels import read_image
from evaluator.training import Recipe

# Preparing.


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "digits"
    assert prepare.main(["digits", "--folder", str(folder)]) == 0
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_same_files_on_every_run(digits, tmp_path):
    np.random.seed(1)  # of no influence
    torch.manual_seed(1)
    assert prepare.main(["digits", "--folder", str(tmp_path / "digits")]) == 0
    assert digests(tmp_path / "digits") == digests(digits)


@pytest.mark.parametrize("name", prepare.SOURCES)
def test_help_names_every_source(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # no line is broken
    for arguments in (["--help"], [name, "--help"]):
        with pytest.raises(SystemExit, match=r"^0$"):
            prepare.main(arguments)
        assert prepare.SOURCES[name].help in capsys.readouterr().out


def test_the_competitions_layout(digits):
    names = {"validation.csv", "test.csv", "age_class_weights.json", "dataset.json"}
    names |= {f"{split}/{part}.csv" for split in splits(digits, "*") for part in ("retain", "forget")}
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


def test_twelve_writers_are_forget_sets(digits):
    names = {kind: splits(digits, f"{kind}*") for kind in ("public", "private")}
    assert names == {kind: [kind, *(f"{kind}-{number}" for number in range(2, 7))] for kind in names}
    loaded = [load(digits, split) for split in (*names["public"], *names["private"])]
    assert all(data.train.equals(loaded[0].train) for data in loaded)
    writers = [set(data.forget.person_id.tolist()) for data in loaded]
    assert all(len(writer) == 1 for writer in writers) and len(set.union(*writers)) == 12
    assert all(103 <= len(data.forget) <= 121 for data in loaded)
    # A last batch of one image is more than batch norm can train on.
    assert all(len(data.forget) % Recipe.of(data).batch_size > 1 for data in loaded)


def test_names_and_patterns_of_splits(tmp_path):
    for name in ("private", "private-10", "private-2", "public"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "retain.csv").touch()
    (tmp_path / "images").mkdir()
    assert splits(tmp_path, "private*") == ["private", "private-2", "private-10"]
    assert splits(tmp_path, "*") == ["private", "private-2", "private-10", "public"]
    assert splits(tmp_path, "private-?") == ["private-2"]
    assert splits(tmp_path, "anything") == ["anything"]  # `load` says whether there is such a split
    with pytest.raises(Problem, match=r"no split matches 'x.'; there are: 'private', 'private-2', 'private-10', 'public'"):
        splits(tmp_path, "x*")
    with pytest.raises(Problem, match="no such data folder"):
        splits(tmp_path / "nowhere", "*")
    kaggle = tmp_path / "kaggle"
    kaggle.mkdir()
    (kaggle / "retain.csv").touch()
    assert splits(kaggle, "private*") == ["kaggle"]


def test_small_digits_have_splits_too(small_digits):
    for split in ("public", "private", "private-2"):
        data = load(small_digits, split)
        assert len(data.forget) >= 30 and len(data.retain) >= 150 and len(data.test) == 30


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
    with warnings.catch_warnings(), pytest.raises(Problem) as problem:
        warnings.simplefilter("error")
        load(folder, split)
    message = str(problem.value)
    assert message.isprintable() and len(message) < 1000
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
    assert message.startswith(f"{image}: 9x8 pixels, it must be 8x8")


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
    shown = label if label in ("10", "-1") else repr(label)
    assert f"age_group is {shown}," in message


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


def change_json(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("file", ["dataset.json", "age_class_weights.json"])
@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1, 2]", "must hold a JSON object, not list"),
        (b"[" * 100_000 + b"]" * 100_000, "not valid JSON ("),
        (b'{"0": ' * 10_000 + b"1" + b"}" * 10_000, ": "),  # newer Pythons read it
        (b'{"classes": ' + b"9" * 10_000_000 + b"}", "not valid JSON (Exceeds the limit"),
        (b'{"classes": 2, "classes": 10}', "not valid JSON (duplicate key 'classes')"),
        (b'{"name": "\xe9"}', "not UTF-8 text"),
        ('{"name": "few"}'.encode("utf-16"), "not UTF-8 text"),
        (b'{"name\0": 1}', "not valid JSON"),
        (b'{"na\\u001b[31mme": 1}', r"'na\x1b[31mme' is unknown; allowed are '"),
        (b'{"' + b"x" * 10_000_000 + b'": 1}', "is unknown; allowed are '"),
        (None, "not a file"),
    ],
    ids=count(),
)
def test_bad_json(folder, file, content, words):
    (folder / file).unlink()
    (folder / file).mkdir() if content is None else (folder / file).write_bytes(content)
    assert refused(folder).startswith(f"{folder / file}: ") and words in refused(folder)


NAMED = (
    "it must be made of letters (a-z, A-Z), digits, '.', '_' and '-', beginning with a letter or digit, "
    "at most 100 characters"
)


@pytest.mark.parametrize(
    "name", ["../../evil", "", ".hidden", "a/b", "a b", "a\n", "é", "x" * 101, "-x", "a\\b", 7, None, ["a"]], ids=count()
)
def test_a_name_is_one_of_a_folder(folder, name):
    change_json(folder / "dataset.json", name=name)
    assert refused(folder) == f"{folder / 'dataset.json'}: name is {reprlib.repr(name)}, {NAMED}"


@pytest.mark.parametrize("split", ["../few/public", "", ".", "..", "public/", "/", "a\0b", "x" * 101], ids=count())
def test_a_split_is_a_folders_name(folder, split):
    assert refused(folder, split) == f"{folder}: split is {reprlib.repr(split)}, {NAMED}"


def test_without_a_name_it_is_the_folders(folder, tmp_path, monkeypatch):
    (folder / "dataset.json").write_text("{}")
    monkeypatch.chdir(folder)
    assert load(".").name == load("../few/").name == "few"
    folder.rename(tmp_path / "my few")
    assert f"no name in dataset.json, so the folder's is used: name is 'my few', {NAMED}" in refused(tmp_path / "my few")
    change_json(tmp_path / "my few" / "dataset.json", name="few")
    assert load(tmp_path / "my few").name == "few"


NUMBERS = [True, "8", None, 8.0, -1, 0, 10**9, float("nan"), float("inf"), [8], {}]


@pytest.mark.parametrize(
    "field, value, words",
    [("image_size", value, "an integer from 1 to 1024") for value in NUMBERS]
    + [("classes", value, "an integer from 2 to 100000") for value in ["ten", 1, *NUMBERS]]
    + [("recipe", value, "an object") for value in (None, [], "epochs", 3)],
)
def test_a_wrong_field_of_dataset_json(folder, field, value, words):
    change_json(folder / "dataset.json", **{field: value})
    assert refused(folder) == f"{folder / 'dataset.json'}: {field} is {value!r}, it must be {words}"


def test_an_unknown_field_of_dataset_json(folder):
    change_json(folder / "dataset.json", clases=10)
    allowed = "'name', 'image_size', 'classes', 'recipe', 'note'"
    assert refused(folder) == f"{folder / 'dataset.json'}: 'clases' is unknown; allowed are {allowed}"


@pytest.mark.parametrize("note", ["", " ", "two\nlines", "\x1b[2J", "x" * 301, None, 3, ["a"], "\ud800"], ids=count())
def test_a_note_is_one_line(folder, note):
    change_json(folder / "dataset.json", note=note)
    words = "one line of 1 to 300 printable characters"
    assert refused(folder) == f"{folder / 'dataset.json'}: note is {reprlib.repr(note)}, it must be {words}"


@pytest.mark.parametrize("note", ["drawn by code, not photographs", "é & <b>", "x" * 300])
def test_a_note_changes_no_result(folder, small_digits, note):
    change_json(folder / "dataset.json", note=note)
    data, before = load(folder), load(small_digits)
    assert (data.note, data.title) == (note, f"small_digits ({note})")
    assert (before.note, before.title, before.digest) == ("", "small_digits", data.digest)


def test_image_size_is_that_of_the_images(folder):
    change_json(folder / "dataset.json", image_size=32)
    assert "8x8 pixels, it must be 32x32 like the first image or image_size in dataset.json" in refused(folder)


@pytest.mark.parametrize("described", [True, False])
@pytest.mark.parametrize(
    "change, words",
    [
        ({"0": value}, f"0 is {reprlib.repr(value)}, it must be a number from 0 to 1e9")
        for value in (-1, "3", None, True, [1], 10**400)
    ]
    + [({"0": float(value)}, f"0 is {value}, it must be") for value in ("nan", "inf")]
    + [({key: 3}, f"{key!r} is unknown; allowed are '0', '1'") for key in ("12", "-1", "00", "one", "", " 1", "1.0")],
)
def test_a_wrong_class_count(folder, described, change, words):
    if not described:  # as in the competition's folder, where the file fixes the number of classes
        (folder / "dataset.json").write_text("{}")
    change_json(folder / "age_class_weights.json", **change)
    assert refused(folder).startswith(f"{folder / 'age_class_weights.json'}: {words}")


def test_class_counts_that_are_left_out(folder):
    counts = folder / "age_class_weights.json"
    counts.write_text('{"3": 2.5}')
    assert load(folder).class_counts.tolist() == [0, 0, 0, 2.5] + [0] * 6
    (folder / "dataset.json").write_text("{}")
    assert refused(folder) == f"{counts}: classes is 1, it must be an integer from 2 to 100000"
    counts.write_text('{"0": 1, "0": 2}')
    assert refused(folder) == f"{counts}: not valid JSON (duplicate key '0')"


IDS = ["../x-1", "a-../../x", "a/b", "a\\b", "a-b\0", ".a-b", "-x", "/etc/passwd", "a b", "é-1", "x" * 101, "", "\x1b[2J"]


@pytest.mark.parametrize("image_id", IDS, ids=count())
def test_an_image_id_that_is_none(folder, image_id):
    """Refused as such, before a file is looked for."""

    def change(table):
        table.loc[3, "image_id"] = image_id

    edit(folder / "validation.csv", change)
    shutil.rmtree(folder / "images")
    assert refused(folder) == f"{folder / 'validation.csv'}: row 5: image_id is {reprlib.repr(image_id)}, {NAMED}"


@pytest.mark.parametrize("link", ["image", "its folder", "away and back"])
def test_links_out_of_images(folder, tmp_path, link):
    image = first_image(folder)
    if link == "image":
        image.rename(tmp_path / "elsewhere.png")
        image.symlink_to(tmp_path / "elsewhere.png")
    elif link == "its folder":
        image.parent.rename(tmp_path / "elsewhere")
        image.parent.symlink_to(tmp_path / "elsewhere")
    else:
        other = folder / "images_"  # begins as images/ does
        image.parent.rename(other)
        image.parent.symlink_to(other)
    message = refused(folder)
    assert message.startswith(f"{folder / 'public' / 'forget.csv'}: row 2: {image} is a link to a place outside ")


def test_links_that_are_followed(folder, tmp_path, small_digits):
    """images/ itself, the folder, and one within images/."""
    (folder / "images").rename(tmp_path / "elsewhere")
    (folder / "images").symlink_to(tmp_path / "elsewhere")
    image = first_image(folder)
    image.rename(image.with_name("another.png"))
    image.symlink_to("another.png")
    (tmp_path / "link").symlink_to(folder)
    assert load(tmp_path / "link").digest == load(small_digits).digest
    image.unlink()
    image.symlink_to(image.name)
    assert refused(folder) == f"{image}: missing image"


def alias(folder: Path, image_id: str) -> str:
    """Another id of the same image."""
    image = folder / "images" / f"{image_id.replace('-', '/')}.png"
    image.with_name("alias.png").symlink_to(image.name)
    return image_id.split("-")[0] + "-alias"


def add(path: Path, image_id: str) -> None:
    with path.open("a") as file:
        file.write(f"{image_id},1,1,1\n")


@pytest.mark.parametrize(
    "file, other",
    [("public/forget.csv", "public/retain.csv")]
    + [(f"public/{part}.csv", f"{other}.csv") for part in ("retain", "forget") for other in ("validation", "test")],
)
@pytest.mark.parametrize("linked", [False, True])
def test_a_training_image_is_in_one_set(folder, file, other, linked):
    image_id = pd.read_csv(folder / file, dtype=str).image_id[0]
    add(folder / other, alias(folder, image_id) if linked else image_id)
    assert refused(folder) == f"{folder / file}: 1 images are also in {Path(other).name}; the first is {image_id}"


def test_an_image_listed_under_two_ids(folder):
    image_id = pd.read_csv(folder / "test.csv", dtype=str).image_id[0]
    add(folder / "test.csv", alias(folder, image_id))
    other = image_id.split("-")[0] + "-alias"
    row = f"{folder / 'test.csv'}: row 32"
    assert refused(folder) == f"{row}: image_id {other!r} is listed twice, the first time as {image_id!r}"


HEADER = ",".join(COLUMNS)


@pytest.mark.parametrize(
    "content, words",
    [
        ("{header}\n{id},1,1,0\0\n", "row 2: person_id is '0\\x00', it must be an integer"),
        ("\0\0\0\0", "no column 'image_id'; its columns are '\\x00\\x00\\x00\\x00'"),
        ("{header},age\n{id},1,1,0,1\n", "more than one column 'age'; its columns are 'image_id', 'age_group', "),
        ("{header},\x1b[2J\n{id},1,1,0\n", "row 2: 4 fields, the first row has 5"),
        ('"image\nid",\x1b[2J\n', "no column 'image_id'; its columns are 'image\\nid', '\\x1b[2J'"),
        ("{id},1,1,0\n", "no column 'image_id'; its columns are '"),
        ("image_id;age_group;age;person_id\n", "no column 'image_id'; its columns are 'image_id;age_group;"),
        ("x" * 100_000 + "\n", "no column 'image_id'"),
        ("{header}\n{id},1,1,0,\n", "row 2: 5 fields, the first row has 4"),
        ("{header}\n{id},1\n", "row 2: 2 fields, the first row has 4"),
        ("{header}\n{id},1," + "9" * 10_000_000 + ",0\n", "row 2: not a readable CSV file (field larger than"),
        ("{header}\n{id},1," + "9" * 100_000 + ",0\n", "row 2: age is '999"),
        ("{header}\n{id},1," + "9" * 19 + ",0\n", "age is '9999999999999999999', it must be an integer of at most 18"),
        ("{header}\n{id},1,1e3,0\n", "row 2: age is '1e3', it must be an integer"),
        ("{header}\n{id},1,nan,0\n", "row 2: age is 'nan', it must be an integer"),
        ("{header}\n{id},1,1_0,0\n", "row 2: age is '1_0', it must be an integer"),
        ("{header}\n{id},1,٣,0\n", "row 2: age is '٣', it must be an integer"),
        ("{header}\n{id},True,1,0\n", "row 2: age_group is 'True', it must be an integer from 0 to 9"),
        ('{header}\n{id},1,1,"0\n', "row 2: not a readable CSV file (unexpected end of data)"),
        ('{header}\n"{id}"x,1,1,0\n', "row 2: not a readable CSV file ("),
        ("{header}\n{id},1,1,é\n".encode("latin-1"), "not UTF-8 text"),
        ("{header}\n{id},1,1,0\n".encode("utf-16"), "not UTF-8 text"),
        ("{header}\n\n\n", "empty: it lists no image"),
        (Path.mkdir, "not a file"),
        (os.mkfifo, "not a file"),
        (lambda path: path.symlink_to(path.name), "cannot be read ("),
    ],
    ids=count(),
)
def test_a_csv_that_is_refused(folder, content, words):
    path = folder / "test.csv"
    image_id = pd.read_csv(path, dtype=str).image_id[0]
    path.unlink()
    if callable(content):
        content(path)
    else:
        content = content.encode() if isinstance(content, str) else content
        path.write_bytes(content.replace(b"{header}", HEADER.encode()).replace(b"{id}", image_id.encode()))
    message = refused(folder)
    assert message.startswith(f"{path}: ") and words in message


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "\ufeff" + text,
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace("\n", "\r"),
        lambda text: text.replace("\n", "\n\n").rstrip(),
        lambda text: "\n".join('"' + row.replace(",", '","') + '"' for row in text.split()),
        lambda text: "\n".join([HEADER, *(row + ".0" for row in reversed(text.split()[1:]))]),
        lambda text: text.replace(",", ", ").replace(", age", ",age").replace(", person", ",person"),
        lambda text: "\n".join(f'{row},"é\n{row}"' for row in text.split()),
    ],
    ids=count(),
)
def test_a_csv_that_is_read(folder, small_digits, change):
    path = folder / "public" / "forget.csv"
    path.write_bytes(change(path.read_text()).encode())
    assert load(folder).digest == load(small_digits).digest


def header_of(width: int, height: int, bits: int = 8, kind: int = 2) -> bytes:
    """Of a PNG, and no pixels: nothing is decoded where that is refused."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + b"\0\0\0\0IDAT"


def saved(picture: Image.Image, kind: str = "PNG", **settings) -> bytes:
    content = io.BytesIO()
    picture.save(content, kind, **settings)
    return content.getvalue()


PICTURE = Image.fromarray(np.random.RandomState(0).randint(256, size=(8, 8, 3)).astype(np.uint8))
GREY = PICTURE.convert("L")
TEXT = PngInfo()
TEXT.add_text("a bomb", "x" * 10_000_000, zip=True)


@pytest.mark.parametrize(
    "content, words",
    [
        (header_of(20_000, 20_000), "not a readable image (Image size (400000000 pixels) exceeds"),
        (header_of(10_000, 10_000), "not a readable image (10000x10000 pixels, at most 1024 per side are allowed)"),
        (header_of(1025, 1), "not a readable image (1025x1 pixels, at most 1024 per side are allowed)"),
        (header_of(2**31 - 1, 2**31 - 1), "not a readable image ("),
        (header_of(0, 8), "not a readable image ("),
        (header_of(8, 8), "not a readable image ("),
        (header_of(8, 8, bits=7), "not a readable image ("),
        (saved(PICTURE)[:-30], "not a readable image ("),
        (saved(PICTURE, pnginfo=TEXT), "not a readable image ("),
        (saved(Image.fromarray(np.full((8, 8), 300, np.uint16))), "only 8 bits per channel are allowed"),
        (saved(PICTURE.convert("CMYK"), "JPEG"), "only 8 bits per channel are allowed"),
        (saved(PICTURE, "GIF"), "not a readable image (cannot identify image file"),
        (b"<svg/>", "not a readable image (cannot identify image file"),
        (saved(PICTURE.resize((8, 9))), "8x9 pixels, it must be 8x8"),
        (Path.mkdir, "missing image"),
        (os.mkfifo, "missing image"),
    ],
    ids=count(),
)
def test_an_image_that_is_refused(folder, content, words):
    image = first_image(folder)
    image.unlink()
    content(image) if callable(content) else image.write_bytes(content)
    message = refused(folder)
    assert message.startswith(f"{image}: ") and words in message


@pytest.mark.parametrize(
    "content, expected",
    [
        (saved(PICTURE), PICTURE),
        (saved(PICTURE) + b"more", PICTURE),
        (saved(GREY), GREY),
        (saved(GREY.convert("1")), GREY.convert("1")),
        (saved(GREY.convert("LA")), GREY),
        (saved(PICTURE.convert("RGBA")), PICTURE),
        (saved(PICTURE.quantize(16)), PICTURE.quantize(16)),
        (saved(PICTURE.quantize(16), transparency=bytes(range(16))), PICTURE.quantize(16)),
        (saved(PICTURE, save_all=True, append_images=[GREY.convert("RGB")]), PICTURE),  # animated
        (saved(PICTURE, "JPEG"), Image.open(io.BytesIO(saved(PICTURE, "JPEG")))),
    ],
    ids=count(),
)
def test_an_image_that_is_read(folder, content, expected, recwarn):
    image = first_image(folder)
    image.write_bytes(content)
    forget = load(folder).forget
    row = forget.image_ids.index(f"{image.parent.name}-{image.stem}")
    assert forget.images[row].permute(1, 2, 0).tolist() == np.array(expected.convert("RGB")).tolist()
    assert not recwarn.list


def test_damaged_images(folder):
    """Whatever byte is wrong, it is read or refused."""
    image, source = first_image(folder), np.random.RandomState(0)
    for content in (saved(PICTURE, dpi=(1, 1)), saved(PICTURE, "JPEG"), saved(PICTURE.quantize(16))):
        for _ in range(150):
            damaged = bytearray(content)
            for place in source.randint(len(content), size=3):
                damaged[place] = source.randint(256)
            image.write_bytes(damaged[: source.choice([len(content), source.randint(len(content))])])
            try:
                pixels = read_image(image)
            except Problem as problem:
                assert str(problem).startswith(f"{image}: not a readable image (") and str(problem).isprintable()
            else:
                assert pixels.dtype == torch.uint8 and pixels.shape[0] == 3


def test_images_are_missing(folder, tmp_path):
    shutil.rmtree(folder / "images")
    assert refused(folder).startswith(f"{folder / 'images'}{os.sep}") and refused(folder).endswith(": missing image")
    (folder / "images").write_text("")
    assert refused(folder).startswith(f"{folder / 'images'}{os.sep}") and refused(folder).endswith(": missing image")


def test_sets_have_images_of_one_size(folder):
    """Without an image_size too."""
    (folder / "dataset.json").write_text("{}")
    for image_id in pd.read_csv(folder / "test.csv", dtype=str).image_id:
        (folder / "images" / f"{image_id.replace('-', '/')}.png").write_bytes(saved(PICTURE.resize((9, 9))))
    assert "9x9 pixels, it must be 8x8 like the first image" in refused(folder)


def test_missing_files(folder, tmp_path):
    assert str(tmp_path / "nothing") in refused(tmp_path / "nothing")
    nowhere = Path(prepare.__file__).parent / "nowhere"
    hint = "; if the kit makes it: python data/prepare.py nowhere (see data/README.md)"
    assert refused(nowhere) == f"{nowhere}: no such data folder{hint}"
    assert "'third'" in refused(folder, "third") and "'private', 'private-2', 'public'" in refused(folder, "third")
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


@pytest.mark.parametrize("name", TENSORS)
def test_the_digest_is_of_every_tensor(small_digits, name):
    data = load(small_digits).retain
    assert data.clone().equals(data) and data.clone().digest == data.digest
    other = data.clone()
    getattr(other, name)[3] += 1
    assert not other.equals(data) and other.digest != data.digest


def test_the_digest_is_of_the_images_shape():
    images, numbers = torch.zeros(2, 3, 4, 9, dtype=torch.uint8), [torch.zeros(2, dtype=torch.int64)] * 3
    digests = {Examples(["1-1", "1-2"], images.view(2, 3, *shape), *numbers).digest for shape in ((4, 9), (6, 6), (9, 4))}
    assert len(digests) == 3


def test_the_digest_of_the_data(small_digits):
    data = load(small_digits)
    changed = [
        replace(data, classes=11),
        replace(data, class_counts=data.class_counts + 1),
        *(replace(data, **{part: data.held_out}) for part in ("retain", "forget", "validation")),
        replace(data, test=data.validation),
    ]
    assert len({data.digest, *(other.digest for other in changed)}) == len(changed) + 1
    assert replace(data, folder=Path("elsewhere"), name="other", split="other").digest == data.digest


def test_the_train_set_is_the_same_under_every_split(small_digits, digits):
    for folder in (small_digits, digits):
        public, private = load(folder, "public"), load(folder, "private")
        assert public.train.digest == private.train.digest and public.digest != private.digest


def same_data(one: Data, other: Data) -> bool:
    sets = ("retain", "forget", "validation", "test")
    rest = [field.name for field in fields(Data) if field.name not in (*sets, "class_counts")]
    return (
        all(getattr(one, name) == getattr(other, name) for name in rest)
        and torch.equal(one.class_counts, other.class_counts)
        and all(getattr(one, name).equals(getattr(other, name)) for name in sets if getattr(one, name))
    )


def test_data_goes_to_a_device_and_through_pickle(small_digits):
    data = load(small_digits)
    _ = data.train, data.train.digest  # what is kept of them does not get in the way
    moved = data.to("meta")
    assert {moved.class_counts.device.type, moved.test.images.device.type, moved.retain.age.device.type} == {"meta"}
    assert moved.train.person_id.device.type == "meta"
    same = data.to("cpu")
    assert same_data(same, data) and same.retain.images.data_ptr() == data.retain.images.data_ptr()
    for part in (data, replace(data, test=None)):
        copy = pickle.loads(pickle.dumps(part.to("cpu")))
        assert same_data(copy, part) and copy.digest == part.digest and copy.train.equals(data.train)
        assert (copy.test is None) == (part.test is None)


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
