"""One's own images of any kind become a data folder, or one line says what is wrong with which."""

import json
import os
from pathlib import Path

import numpy as np
import own
import pandas as pd
import prepare
import pytest
from PIL import Image

from evaluator.data import load, splits
from evaluator.files import Problem

FEW = {"forget_sets": 1, "forget_share": 0.1}


def noise(number: int, width: int = 6, height: int = 6) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8))


def saved(path: Path, image: Image.Image, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def listed(folder: Path, rows: list[tuple], header: str = "path,label") -> Path:
    """A CSV file, and an image for each of its rows that has none."""
    names = header.split(",")
    for number, row in enumerate(rows):
        if not os.path.lexists(folder / row[0]):
            saved(folder / row[0], noise(number))
    pd.DataFrame(rows, columns=names).to_csv(folder / "list.csv", index=False)
    return folder / "list.csv"


def made(folder: Path, count: int = 40, classes: int = 2, **options):
    """From `count` images, the classes taking turns."""
    return own.folder(listed(folder, [(f"{row:03}.png", f"c{row % classes}") for row in range(count)]), **FEW | options)


# What is written.


def test_a_csv_becomes_a_data_folder(tmp_path, capsys):
    rows = [(f"a/{row:02}.png", ["dog", "cat"][row % 2], f"owner {row // 4}", "ignored") for row in range(60)]
    path = listed(tmp_path / "pets", rows, "path,label,subject,source")
    folder = tmp_path / "data" / "pets"
    command = ["folder", "--csv", str(path), "--folder", str(folder), "--forget-sets", "2", "--size", "6"]
    assert prepare.main(command) == 0
    assert "2 classes, numbered from 0 as in labels.json: 'cat', 'dog'\n" in capsys.readouterr().out
    assert json.loads((folder / "labels.json").read_text()) == {"0": "cat", "1": "dog"}
    sources = pd.read_csv(folder / "sources.csv").set_index("image_id").source
    assert sources["0-0"] == "a/00.png" and sources["14-59"] == "a/59.png" and len(sources) == 60
    with Image.open(folder / "images" / "14" / "59.png") as image:
        assert np.array_equal(image, noise(59))

    assert splits(folder, "*") == ["private", "private-2", "public", "public-2"]
    parts = [load(folder, split) for split in splits(folder, "*")]
    for data in parts:
        people = set(data.retain.person_id.tolist()), set(data.forget.person_id.tolist())
        assert not people[0] & people[1] and 2 <= len(data.forget) <= 4
        assert len(data.retain) + len(data.forget) == 48 and len(data.validation) == len(data.test) == 6
        for part in (data.retain, data.forget, data.validation, data.test):
            for image_id, label in zip(part.image_ids, part.age_group.tolist(), strict=True):
                row = int(image_id.split("-")[1])
                assert label == (row + 1) % 2 and image_id.startswith(f"{row // 4}-")
    forgotten = [image for data in parts for image in data.forget.image_ids]
    assert len(forgotten) == len(set(forgotten))

    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert prepare.main(command) == 0
    assert before == {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert prepare.main([*command, "--forget-sets", "1"]) == 0
    assert splits(folder, "*") == ["private", "public"]  # none is left of those drawn before


def test_one_folder_per_class(tmp_path, capsys):
    for row in range(40):
        saved(tmp_path / f"{['élan', 'a b'][row % 2]}" / f"sub{row % 3}" / f"{row}.JPG", noise(row), format="JPEG")
    saved(tmp_path / "stray.png", noise(99))
    saved(tmp_path / "a b" / ".trash" / "hidden.png", noise(98))
    (tmp_path / "a b" / "Thumbs.db").write_text("not an image")
    found = own.folder(images=tmp_path, **FEW)
    assert found.labels == ["a b", "élan"] and len(found.table) == 40
    assert (found.table.age_group == found.table.source.str.startswith("élan")).all()
    said = capsys.readouterr().out
    assert "1 files are not images: 'a b/Thumbs.db'" in said
    assert "1 images are in no class's folder: 'stray.png'" in said
    assert "by image" in found.note


def test_names_with_anything_in_them(tmp_path):
    names = [
        "a b.png",
        "comma,name.png",
        "line\nbreak.png",
        "naïve ñ 猫.png",
        'quo"te.png',
        "-dash.png",
        "a-b-c.png",
        " .png",
    ]
    rows = [(name, "x" if row % 2 else "y") for row, name in enumerate(names + [f"{row}.png" for row in range(32)])]
    found = own.folder(listed(tmp_path, rows), **FEW)
    assert set(found.table.source) == {name for name, _ in rows}
    assert found.table.image_id.str.fullmatch(r"\d+-\d+").all() and found.table.image_id.is_unique


@pytest.mark.parametrize(
    ("labels", "expected"),
    [(["10", "9", "-1"], ["-1", "9", "10"]), (["b", "10", "9"], ["10", "9", "b"]), (["é", "z", "NA"], ["NA", "z", "é"])],
)
def test_labels_are_numbered_in_their_order(tmp_path, labels, expected):
    found = own.folder(listed(tmp_path, [(f"{row}.png", labels[row % 3]) for row in range(60)]), **FEW)
    assert found.labels == expected and found.classes == 3
    name = found.table.age_group.map(dict(enumerate(expected)))
    rows = found.table.source.str.removesuffix(".png").astype(int)
    assert (name == rows.map(lambda row: labels[row % 3])).all()


def test_spaces_around_a_label_and_a_byte_order_mark_do_not_count(tmp_path):
    for row in range(40):
        saved(tmp_path / f"{row}.png", noise(row))
    lines = ["path, label", *(f"{row}.png, {['a ', 'b'][row % 2]}" for row in range(40))]
    (tmp_path / "list.csv").write_text("\n".join(lines), encoding="utf-8-sig")
    assert own.folder(tmp_path / "list.csv", **FEW).labels == ["a", "b"]


# Images.


def read(path: Path, size: int = 2) -> list:
    return own.picture(path, "row", size).tolist()


GREY = np.array([[0, 64], [128, 255]], np.uint8)
AS_RGB = [[[0, 0, 0], [64, 64, 64]], [[128, 128, 128], [255, 255, 255]]]


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("grey.png", Image.fromarray(GREY)),
        ("grey-16.png", Image.fromarray(GREY.astype(np.uint16) * 257)),
        ("grey-16.tif", Image.fromarray(GREY.astype(np.uint16) * 257)),
        ("grey-16.pgm", Image.fromarray(GREY.astype(np.uint16) * 257)),
        ("grey-32.tif", Image.fromarray(GREY.astype(np.int32) * 257)),
        ("palette.png", Image.fromarray(GREY).convert("P")),
        ("palette.gif", Image.fromarray(GREY).convert("P")),
        ("grey.webp", Image.fromarray(GREY).convert("RGB")),
        ("grey.ppm", Image.fromarray(GREY).convert("RGB")),
        ("grey.bmp", Image.fromarray(GREY)),
        ("alpha.png", Image.fromarray(GREY).convert("LA")),
    ],
)
def test_every_kind_of_image_has_the_same_pixels(tmp_path, name, image):
    assert read(saved(tmp_path / name, image, **({"lossless": True} if name.endswith("webp") else {}))) == AS_RGB


def test_cmyk_one_bit_transparency_and_animations(tmp_path):
    cmyk = saved(tmp_path / "c.jpg", Image.new("CMYK", (16, 16), (255, 0, 0, 0)), quality=100)
    assert np.abs(np.array(read(cmyk)) - [0, 255, 255]).max() <= 3  # cyan, within what JPEG loses
    assert read(saved(tmp_path / "1.png", Image.new("1", (4, 4), 1))) == [[[255] * 3] * 2] * 2
    assert read(saved(tmp_path / "a.png", Image.new("RGBA", (4, 4), (10, 20, 30, 0)))) == [[[255] * 3] * 2] * 2
    red, blue = Image.new("RGB", (4, 4), (255, 0, 0)), Image.new("RGB", (4, 4), (0, 0, 255))
    for name in ("a.gif", "a.webp", "apng.png", "a.tif"):
        assert read(saved(tmp_path / name, red, save_all=True, append_images=[blue], lossless=True))[0][0] == [255, 0, 0]


def test_the_camera_was_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise: https://exiftool.org/TagNames/EXIF.html
    assert read(saved(tmp_path / "a.png", Image.fromarray(GREY), exif=exif)) == [
        AS_RGB[1][:1] + AS_RGB[0][:1],
        AS_RGB[1][1:] + AS_RGB[0][1:],
    ]


def test_the_middle_square_is_kept(tmp_path):
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 200
    for name, pixels in {"wide.png": wide, "tall.png": wide.transpose(1, 0, 2)}.items():
        path = saved(tmp_path / name, Image.fromarray(pixels))
        values = np.array(read(path, 4))  # at the edge some of what is beyond is averaged in
        assert (values[1:3, 1:3] == 200).all() and values.min() > 150
        assert own.picture(path, "row", 32).shape == (32, 32, 3)
    assert read(saved(tmp_path / "thin.png", Image.new("RGB", (1, 500), (1, 2, 3))), 3) == [[[1, 2, 3]] * 3] * 3


def damaged(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def gigantic(path: Path) -> None:
    Image.new("1", (own.LARGEST // 1000 + 1, 1000)).save(path)


SPOILED = {
    "half": (damaged, "not a readable image"),
    "gigantic": (gigantic, r"100001x1000 pixels, at most 100,000,000 in all are read"),
    "text": (lambda path: path.write_text("<svg/>"), "not a readable image"),
    "empty": (lambda path: path.write_bytes(b""), "not a readable image"),
    "numbers": (lambda path: Image.fromarray(np.ones((4, 4), np.float32)).save(path, format="TIFF"), "pixel mode F"),
    "32 bits": (
        lambda path: Image.fromarray(np.full((4, 4), 70000, np.int32)).save(path, format="TIFF"),
        "neither 8 nor 16",
    ),
    "missing": (lambda path: path.unlink(), "missing"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "missing"),
    "loop": (lambda path: (path.unlink(), path.symlink_to(path)), "'5.png'"),
}


@pytest.mark.parametrize("how", SPOILED)
def test_an_image_that_cannot_be_read_is_named_with_its_row(tmp_path, how):
    path = listed(tmp_path, [(f"{row}.png", "ab"[row % 2]) for row in range(20)])
    spoil, says = SPOILED[how]
    spoil(tmp_path / "5.png")
    with pytest.raises(Problem, match=says) as raised:
        own.folder(path, **FEW)
    assert f"{path}: row 7: '5.png'" in str(raised.value) and "\n" not in str(raised.value)


# Rows.


@pytest.mark.parametrize("name", ["../out.png", "sub/../../out.png", "{}/out.png", "link.png", "linked/out.png"])
def test_no_image_outside_the_csvs_folder(tmp_path, name):
    saved(tmp_path / "out.png", noise(1))
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "out.png")
    (tmp_path / "in" / "linked").symlink_to(tmp_path)
    path = listed(tmp_path / "in", [("a.png", "x"), (name.format(tmp_path), "y")])
    with pytest.raises(Problem, match=r"list\.csv: row 3: .* is outside .*in; copy it there"):
        own.folder(path, **FEW)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no columns 'path'"),
        ("path,label\n", "it lists no image"),
        ("path,kind\na.png,x\n", "no columns 'label'; its columns are path, kind"),
        ("path,label,label\na.png,x,y\n", "2 columns 'label'"),
        ("path,label\na.png\n", "row 2: 1 fields, the first row has 2"),
        ("path,label\na,b.png,x\n", "row 2: 3 fields.*in quotes"),
        ("path,label\na.png,x\nb.png,\n", "row 3: no label"),
        ("path,label\na.png,x\n\nb.png, \n", "row 4: no label"),
        ("path,label\na.png,x\n./a.png,x\n", r"row 3: './a\.png' is listed twice"),
        ("path,label,subject\na.png,x,p\nb.png,y,\n", r"row 3: no subject; .*\(other rows have one\)"),
        ("path,label,subject\na.png,x,\nb.png,y,\n", "row 2: no subject; fill it in, or leave the column out"),
        ("path,label\na.png,x\nb.png,x\n", "1 class"),
        ("path,label\na.png,x\nb.png,x\nc.png,y\n", "class 'y' has 1"),
        (f"path,label\n{'n' * 300}.png,x\n", "row 2: .*(no file's path|missing)"),
        ('path,label\n"a.png,x\n', "not a readable CSV file"),
        (b"path,label\n\xff.png,x\n", "not a readable CSV file in UTF-8"),
        (b"path,label\na\0.png,x\n", "not a readable CSV file|no file's path"),
        (None, "No such file"),
    ],
)
def test_what_is_wrong_with_a_csv_is_one_line(tmp_path, text, says):
    for row, name in enumerate("abc"):
        saved(tmp_path / f"{name}.png", noise(row))
    path = tmp_path / "list.csv"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(Problem, match=says) as raised:
        own.folder(path, **FEW)
    assert str(raised.value).startswith(str(path)) and "\n" not in str(raised.value)


def test_what_is_wrong_with_folders(tmp_path):
    with pytest.raises(Problem, match="no such folder"):
        own.folder(images=tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(Problem, match="must hold one folder per class"):
        own.folder(images=tmp_path)
    saved(tmp_path / "empty" / "a.png", noise(1))
    with pytest.raises(Problem, match="1 class; two images"):
        own.folder(images=tmp_path)
    damaged(tmp_path / "empty" / "a.png")
    with pytest.raises(Problem, match=r"'empty/a\.png' is not a readable image"):
        own.folder(images=tmp_path)
    (tmp_path / "empty" / os.fsdecode(b"\xff.png")).write_bytes(b"")
    with pytest.raises(Problem, match=r"the name 'empty/.udcff\.png' is not UTF-8: rename it"):
        own.folder(images=tmp_path)


# Copies and subjects.


def test_copies_are_dropped_and_those_whose_labels_differ_altogether(tmp_path, capsys):
    rows = [(f"{row:02}.png", "ab"[row % 2]) for row in range(40)]
    saved(tmp_path / "40.png", noise(0))  # a copy with the same label
    saved(tmp_path / "41.tif", noise(0))  # another, in another file format
    saved(tmp_path / "42.png", noise(1))  # labelled otherwise
    path = listed(tmp_path, [*rows, ("40.png", "a"), ("41.tif", "a"), ("42.png", "a")])
    table = own.folder(path, size=6, **FEW).table
    assert sorted(set(range(43)) - set(table.image_id.str.split("-").str[1].astype(int))) == [1, 40, 41, 42]
    said = capsys.readouterr().out
    assert "left out: 2 copies differ in label (distinct: 1): '01.png', '42.png'\n" in said
    assert "left out: 2 are copies of others with the same label: '40.png', '41.tif'\n" in said


def test_subjects_that_share_an_image_count_as_one(tmp_path, capsys):
    rows = [(f"{row:02}.png", "ab"[row % 2], f"p{row // 4}") for row in range(80)]
    for row, of in ((80, 0), (81, 4), (82, 77)):  # p0 = p1 through p20, and p19 = p21
        saved(tmp_path / f"{row:02}.png", noise(of))
    more = [("80.png", "a", "p20"), ("81.png", "a", "p20"), ("82.png", "b", "p21")]
    table = own.folder(listed(tmp_path, rows + more, "path,label,subject"), size=6, **FEW).table
    people = table.groupby("person_id").source.agg(list)
    assert people[0] == [f"{row:02}.png" for row in range(8)]
    assert people[people.index[-1]] == [f"{row:02}.png" for row in range(76, 80)]
    assert len(people) == 19 and "joined: 22 subjects are 19, as some share an image" in capsys.readouterr().out


# Sets.


def test_shares_of_the_sets(tmp_path):
    found = made(tmp_path, 100, validation=0.2, test=0.3, forget_share=0.1, forget_sets=3)
    assert (len(found.train), len(found.validation), len(found.test)) == (50, 20, 30)
    assert sorted([*found.train, *found.validation, *found.test]) == list(range(100))
    assert list(found.forget) == ["public", "private", "public-2", "private-2", "public-3", "private-3"]
    rows = np.concatenate(list(found.forget.values()))
    assert len(rows) == len(set(rows)) == 30 and set(rows) <= set(found.train)


def test_the_seed_decides_what_is_drawn(tmp_path):
    first, again, other = (made(tmp_path, seed=seed).forget["public"].tolist() for seed in (1, 1, 2))
    assert first == again != other


def test_only_the_first_classes_are_forgotten(tmp_path):
    for options in ({}, {"stratified": True}):
        found = made(tmp_path, 120, 4, forget_classes=2, **options)
        forgotten = found.table.age_group.iloc[np.concatenate(list(found.forget.values()))]
        assert set(forgotten) == {0, 1}


def test_stratified_sets_have_the_classes_shares(tmp_path):
    rows = [(f"{row:03}.png", "a" if row < 100 else "b" if row < 150 else "c") for row in range(160)]
    found = own.folder(listed(tmp_path, rows), forget_sets=2, forget_share=0.1, stratified=True)
    trained = found.table.age_group.iloc[found.train].value_counts().sort_index()
    for rows in found.forget.values():
        counts = found.table.age_group.iloc[rows].value_counts().reindex(range(3), fill_value=0).sort_index()
        assert counts.tolist() == np.ceil(0.1 * trained).astype(int).tolist()


def test_by_example_subjects_are_divided(tmp_path):
    rows = [(f"{row:02}.png", "ab"[row % 2], f"p{row // 10}") for row in range(60)]
    path = listed(tmp_path, rows, "path,label,subject")
    assert own.folder(path, **FEW | {"forget_share": 0.2}).note == ""
    found = own.folder(path, by="example", **FEW)
    people = found.table.person_id
    forgotten = found.forget["public"]
    assert len(forgotten) == 5 and set(people[forgotten]) & set(people[np.setdiff1d(found.train, forgotten)])
    assert "by image" in found.note


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"forget_share": 0.03}, "batch norm cannot train"),
        ({"forget_sets": 30}, "only .* of 60 forget sets of 3 images"),
        ({"by": "subject"}, "--by subject needs subjects"),
        ({"validation": 0.01}, "too few for validation and test"),
        ({"validation": 0.5, "test": 0.45}, "less than a tenth"),
        ({"size": 0}, "size is 0, it must be an integer from 1 to 1024"),
        ({"size": 5000}, "size is 5000"),
        ({"forget_sets": 0}, "forget_sets is 0"),
        ({"forget_share": float("nan")}, "forget_share is nan"),
        ({"forget_share": 0.0}, r"forget_share is 0\.0, it must be a number above 0 and below 1"),
        ({"validation": -0.1}, "validation is -0.1"),
        ({"test": 1.0}, r"test is 1\.0"),
        ({"forget_classes": 0}, "forget_classes is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"by": "person"}, "by is 'person', it must be subject or example"),
    ],
)
def test_options_that_mean_nothing(tmp_path, options, says):
    with pytest.raises(Problem, match=says):
        made(tmp_path, **options)


def test_more_to_forget_than_to_retain(tmp_path):
    rows = [(f"{row:02}.png", "ab"[row % 2], f"p{max(row - 35, 0)}") for row in range(40)]
    path = listed(tmp_path, rows, "path,label,subject")
    says = r"a forget set would be [23]\d of 32 training images, over half: lower --forget-share"
    with pytest.raises(Problem, match=says):
        for seed in range(20):  # until one draws the subject with most of the images
            own.folder(path, forget_sets=1, forget_share=0.05, seed=seed)


def test_a_class_that_cannot_be_trained(tmp_path):
    rows = [(f"{row:02}.png", "rare" if row in (3, 4) else "often") for row in range(40)]
    path = listed(tmp_path, rows)
    held_out = {
        seed: set(own.hold_out(40, 0.4, 0.4, seed)[0]) | set(own.hold_out(40, 0.4, 0.4, seed)[2]) for seed in range(20)
    }
    seed = next(seed for seed, rows in held_out.items() if {3, 4} <= rows)
    with pytest.raises(Problem, match="every image of class 'rare' was drawn for validation or test"):
        own.folder(path, validation=0.4, test=0.4, seed=seed, forget_sets=1, forget_share=0.3)
