"""Small files of each published set's format become what its data folder must hold; archives and downloads that fail."""

import random
import tarfile
import zipfile
from itertools import product
from pathlib import Path

import casia_surf
import numpy as np
import pandas as pd
import people
import prepare
import pytest
from PIL import Image
from test_own import noise, saved

from evaluator.data import load, splits
from evaluator.files import Problem

FEW = {"forget_sets": 1, "forget_share": 0.1}


def numbers(sources: pd.Series) -> list[int]:
    return sources.str.extract(r"(\d+)\.jpg", expand=False).astype(int).tolist()


# Age groups.


def test_age_groups_are_of_equal_width():
    ages = pd.Series([1, 12, 13, 24, 25, 36, 105, 106, 116])
    groups, labels = people.age_groups(ages)  # 11.6 years wide
    assert groups.tolist() == [0, 0, 1, 1, 2, 3, 8, 9, 9]
    assert labels == ["1-12", "13-24", "25-35", "36-47", "48-58", "59-70", "71-82", "83-93", "94-105", "106-116"]
    groups, labels = people.age_groups(pd.Series([20, 22]))
    assert groups.tolist() == [0, 6] and labels[0] == "20-20" and labels.count("no age") == 7


# UTKFace.


def utkface(folder: Path, count: int = 120) -> Path:
    """Ages 1 to 10 in turn, and what the real set has: copies, copies at other ages, malformed names."""
    for row in range(count):
        saved(folder / "part1" / f"{row % 10 + 1}_{row % 2}_{row % 5}_{20170109150557000 + row}.jpg.chip.jpg", noise(row))
    saved(folder / "part2" / "1_0_0_20170109150557999.jpg", noise(0))
    saved(folder / "part2" / "9_0_0_20170109150557998.jpg", noise(1))
    for name in ("61_1_20170109142408075.jpg.chip.jpg", "24_0_1_20170116220224657 .jpg.chip.jpg", "face.jpg"):
        saved(folder / "part2" / name, noise(7))
    return folder


def test_utkface(tmp_path, capsys):
    made = people.utkface(utkface(tmp_path), forget_classes=2, **FEW | {"forget_share": 0.05})
    assert len(made.table) == 119  # of 120 faces; there is no telling how old the other is
    assert made.classes == 10 and (made.table.age_group == made.table.age - 1).all()
    assert made.labels == [f"{age}-{age}" for age in range(1, 11)]
    assert [len(rows) for rows in made.forget.values()] == [5, 5]
    assert set(made.table.age_group.iloc[np.concatenate(list(made.forget.values()))]) <= {0, 1}
    assert made.table.person_id.is_unique and "no subject ids" in made.note
    assert made.pictures.shape == (119, 32, 32, 3) and made.recipe == {}
    said = capsys.readouterr().out
    assert "3 have malformed names: 'part2/24_0_1_20170116220224657 .jpg.chip.jpg', 'part2/61_1_" in said
    assert "2 copies differ in label (distinct: 1)" in said and "1 are copies of others with the same label" in said


def test_the_order_of_files_on_disk_does_not_matter(tmp_path):
    first = people.utkface(utkface(tmp_path / "a"), **FEW)
    for path in sorted((tmp_path / "a").rglob("*.jpg"), reverse=True):
        saved(tmp_path / "b" / path.relative_to(tmp_path / "a"), noise(0)).write_bytes(path.read_bytes())
    again = people.utkface(tmp_path / "b", **FEW)
    assert first.table.equals(again.table) and np.array_equal(first.pictures, again.pictures)


# AgeDB.


def agedb(folder: Path) -> Path:
    """Twelve people of five photographs each."""
    for row in range(60):
        saved(
            folder / "AgeDB" / f"{row}_{'MariaCallas' if row < 5 else f'Ann_{row // 5}'}_{20 + row % 30}_f.jpg", noise(row)
        )
    return folder


def test_agedb(tmp_path):
    made = people.agedb(agedb(tmp_path), **FEW)
    rows = numbers(made.table.source.str.replace(r"AgeDB/(\d+)_.*", r"\1.jpg", regex=True))
    assert made.table.age.tolist() == [20 + row % 30 for row in rows]
    assert made.table.age_group.tolist() == [row % 30 // 3 for row in rows]
    same = pd.DataFrame({"person": made.table.person_id, "true": [row // 5 for row in rows]}).drop_duplicates()
    assert len(same) == 12
    for forgotten in made.forget.values():
        retained = np.setdiff1d(made.train, forgotten)
        assert not set(made.table.person_id[forgotten]) & set(made.table.person_id[retained]) and made.note == ""


@pytest.mark.parametrize("below", ["", "meta/"])
def test_agedb_with_its_csv(tmp_path, below):
    agedb(tmp_path)
    names = sorted(path.name for path in (tmp_path / "AgeDB").iterdir())
    path = tmp_path / below / "agedb.csv"
    path.parent.mkdir(exist_ok=True)
    table = pd.DataFrame({"age": [row % 50 + 1 for row in range(60)], "path": [f"AgeDB/{name}" for name in names]})
    table.assign(split="train").to_csv(path, index=False)
    made = people.agedb(tmp_path, **FEW)
    assert made.table.age.tolist() == table.age.tolist() and made.table.person_id.nunique() == 12
    table.assign(age=["unknown", *table.age[1:]]).to_csv(path, index=False)
    with pytest.raises(Problem, match=r"agedb\.csv: row 2: age is 'unknown', it must be whole years"):
        people.agedb(tmp_path)
    table.assign(path=["../out.jpg", *table.path[1:]]).to_csv(path, index=False)
    with pytest.raises(Problem, match=r"row 2: '\.\./out\.jpg' is (outside|missing)"):
        people.agedb(tmp_path)


# MUFAC.


def mufac(folder: Path) -> Path:
    """Families of two people, of four photographs each; family 1's D is family 2's, and a test image is a training image."""
    rows, number = {"train": [], "val": [], "test": []}, 0
    for part, family in [*product(["train"], range(1, 11)), ("val", 11), ("test", 12)]:
        for person, photograph in product("DM", range(4)):
            age = "abcdefgh"[number % 8]
            name = f"F{family:04}_AGE_{person}_40_{age}{photograph}.{'JPG' if number % 3 else 'jpg'}"
            image = 0 if (family, person, photograph) in [(2, "D", 0), (12, "D", 0)] else number
            rows[part].append((f"F{family:04}", person, age, name))
            saved(folder / f"{part}_images" / name, noise(image), format="JPEG")
            number += 1
    for part, listed in rows.items():
        table = pd.DataFrame(listed, columns=["family_id", "person_id", "age_class", "image_path"])
        table.to_csv(folder / f"custom_{part}_dataset.csv", index=False)
    return folder


def test_mufac(tmp_path, capsys):
    made = people.mufac(mufac(tmp_path), **FEW)
    table = made.table
    assert len(table) == 94 and made.classes == 8 and made.labels[0] == "0-6"
    letters = table.source.str.extract(r"_40_([a-h])", expand=False)
    assert table.age_group.tolist() == ["abcdefgh".index(letter) for letter in letters]
    assert table.age.tolist() == [[0, 7, 13, 20, 31, 46, 56, 67]["abcdefgh".index(letter)] for letter in letters]
    person = table.source.str.extract(r"(F\d+_AGE_.)", expand=False)
    of = dict(zip(person, table.person_id, strict=True))
    assert of["F0001_AGE_D"] == of["F0002_AGE_D"] == of["F0012_AGE_D"] != of["F0001_AGE_M"]
    assert table.person_id.nunique() == 22 and table.groupby(person).person_id.nunique().eq(1).all()
    said = capsys.readouterr().out
    assert "2 are copies of others with the same label" in said and "24 subjects are 22" in said
    assert [len(rows) for rows in made.forget.values()] and {"public", "private"} == set(made.forget)


def test_what_is_wrong_with_mufac(tmp_path):
    mufac(tmp_path)
    path = tmp_path / "custom_val_dataset.csv"
    text = path.read_text()
    path.write_text(text.replace(",c,", ",i,", 1))
    with pytest.raises(Problem, match=r"custom_val_dataset\.csv: row \d: age_class is 'i', it must be one of a, b, c"):
        people.mufac(tmp_path)
    path.write_text(text.replace("F0011_AGE", "F9999_AGE", 1))
    with pytest.raises(Problem, match=r"row 2: 'val_images/F9999.* is missing"):
        people.mufac(tmp_path)
    path.unlink()
    with pytest.raises(Problem, match=r"custom_val_dataset\.csv: not a readable CSV file"):
        people.mufac(tmp_path)


# LFW.


def test_lfw(tmp_path):
    for first, (person, photographs) in enumerate({"Ana_Ivanovic": 30, "Bo_Li": 25, "Cy_Young": 3, "Björk": 40}.items()):
        for number in range(photographs):
            saved(tmp_path / "lfw" / person / f"{person}_{number:04}.jpg", noise(first * 100 + number))
    made = people.lfw(tmp_path, **FEW)
    assert made.labels == ["Ana_Ivanovic", "Björk", "Bo_Li"]
    assert made.table.age_group.value_counts().sort_index().tolist() == [30, 40, 25]
    assert [made.labels[label] for label in made.table.age_group] == [source.split("/")[1] for source in made.table.source]
    assert "by image" in made.note
    with pytest.raises(Problem, match="fewer than two people have 31 photographs"):
        people.lfw(tmp_path, photographs=31)


# CASIA-SURF.


def casia(folder: Path, subjects: int = 40) -> list[tuple]:
    """The original tree; returns (subject, age, pixels) of its images in the organisers' order."""
    names = [f"CLKJ_{'AC'[row % 2]}S{row:04}" for row in range(subjects)]
    ages = {name: 20 + row % 4 if row < 38 else 59 for row, name in enumerate(names)}
    lines = [f"{name} {age} {'MF'[age % 2]}\n" for name, age in ages.items()]
    folder.mkdir(exist_ok=True)
    (folder / "Age_Gender.txt").write_text("".join(reversed(lines)))
    found = []
    for row, name in enumerate(names[:-1]):  # the last has no image
        color = folder / "WBackground" / ["Train", "Val", "Val-1"][row % 3] / name / "real.rssdk" / "color"
        for number in (8, 9, 10):
            shade = row * 3 + number
            saved(color / f"{number:04}.jpg", Image.new("RGB", (50, 70), (shade, shade, shade)), quality=100)
            found.append((str(color.parent.parent), f"{number:04}.jpg", name, ages[name], shade))
        saved(color.parent / "depth" / "0008.jpg", noise(1))
    return [row[2:] for row in sorted(found)]


def test_casia_surf_is_the_organisers_split(tmp_path):
    images = casia(tmp_path)
    made = casia_surf.casia_surf(tmp_path, 1)
    order = sorted({name for name, _, _ in images} | {"CLKJ_CS0039"})
    assert made.table.person_id.tolist() == [order.index(name) for name, _, _ in images]
    assert made.table.age.tolist() == [age for _, age, _ in images]
    assert made.table.age_group.tolist() == [(age - 20) // 4 for _, age, _ in images]  # ten groups of 20 to 59
    assert np.abs(made.pictures.mean((1, 2, 3)) - [shade for *_, shade in images]).max() < 1
    shuffled = list(range(117))
    random.Random(43).shuffle(shuffled)
    assert made.train.tolist() == shuffled[:93] and made.validation.tolist() == shuffled[93:105]
    assert made.test.tolist() == shuffled[105:]
    first = sorted({made.table.person_id[row] for row in shuffled[:93]})[:15]
    assert made.forget["public"].tolist() == [row for row in shuffled[:93] if made.table.person_id[row] in first]
    others = set(made.table.person_id[made.forget["private"]])
    assert len(others) == 15 and not others & set(first) and set(made.table.age_group[made.forget["private"]]) <= {0, 1}
    assert "organisers'" in made.note


def test_casia_surf_unpacked_beside(tmp_path):
    casia(tmp_path)
    first = casia_surf.casia_surf(tmp_path, 1)
    (tmp_path / "WBackground").rename(tmp_path / "moved")
    (tmp_path / "CASIA_SURF_live").mkdir()
    (tmp_path / "moved").rename(tmp_path / "CASIA_SURF_live" / "WBackground")
    again = casia_surf.casia_surf(tmp_path, 1)
    assert first.table.drop(columns="source").equals(again.table.drop(columns="source"))


def test_what_is_wrong_with_casia_surf(tmp_path):
    with pytest.raises(Problem, match=r"Age_Gender\.txt: cannot be read"):
        casia_surf.casia_surf(tmp_path)
    images = casia(tmp_path)
    with pytest.raises(Problem, match=r"only \d+ subjects to forget, 15 are needed for each set: lower --forget-sets"):
        casia_surf.casia_surf(tmp_path, 2)
    with pytest.raises(Problem, match="forget_sets is 0"):
        casia_surf.casia_surf(tmp_path, 0)
    image = next(tmp_path.rglob("color/0008.jpg"))
    image.write_bytes(image.read_bytes()[:100])
    with pytest.raises(Problem, match=r"0008\.jpg: not a readable image"):
        casia_surf.casia_surf(tmp_path, 1)
    listed = tmp_path / "Age_Gender.txt"
    lines = listed.read_text().splitlines()
    for text, says in {
        "\n".join([*lines, lines[0]]): f"line 41: {lines[0]!r}, it must be a new subject",
        "\n".join([lines[0].replace("59", "old"), *lines[1:]]): "line 1: .*old",
        "\n".join(line for line in lines if images[0][0] not in line): f"no subject '{images[0][0]}'",
        "": "it lists no subject",
    }.items():
        listed.write_text(text)
        with pytest.raises(Problem, match=says):
            casia_surf.casia_surf(tmp_path, 1)


# Archives and downloads.


def packed(folder: Path, archive: Path) -> Path:
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as content:
            for path in sorted(folder.rglob("*")):
                content.write(path, path.relative_to(folder))
    else:
        with tarfile.open(archive, "w:gz") as content:
            content.add(folder, arcname=".")
    return archive


@pytest.mark.parametrize("name", ["faces.zip", "faces.tar.gz"])
def test_archives(tmp_path, name):
    folder = utkface(tmp_path / "faces")
    archive = packed(folder, tmp_path / name)
    assert people.utkface(archive, **FEW).table.equals(people.utkface(folder, **FEW).table)
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    with pytest.raises(Problem, match=r"cannot be unpacked .*; get it anew"):
        people.utkface(archive)
    with pytest.raises(Problem, match=r"cannot be unpacked .*neither a folder nor a whole"):
        people.utkface(saved(tmp_path / "no.png", noise(1)))
    with pytest.raises(Problem, match="none: cannot be unpacked"):
        people.utkface(tmp_path / "none")


def test_nothing_leaves_the_folder_of_an_archive(tmp_path):
    inside = tmp_path / "in" / "side"
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("../out.txt", "out")
        link = zipfile.ZipInfo("link")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    inside.mkdir(parents=True)
    people.unpack(tmp_path / "a.zip", inside)
    assert not (tmp_path / "in" / "out.txt").exists() and not (inside / "link").is_symlink()
    for name, kind, target in [("link", tarfile.SYMTYPE, "/etc/passwd"), ("hard", tarfile.LNKTYPE, "../../a.zip")]:
        with tarfile.open(tmp_path / "a.tar", "w") as archive:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            archive.addfile(member)
        people.unpack(tmp_path / "a.tar", inside)
        assert not (inside / name).is_symlink() and not (inside / "hard").exists()
    with tarfile.open(tmp_path / "b.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("../out.txt"))
    with pytest.raises(Problem, match=r"cannot be unpacked .*outside the destination"):
        people.unpack(tmp_path / "b.tar", inside)
    assert not (tmp_path / "in" / "out.txt").exists()


def kaggle(folder: Path, monkeypatch, says: str) -> None:
    """In place of the kaggle command: a module of that name."""
    (folder / "kaggle.py").write_text(says)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setattr(people, "DOWNLOADS", folder / "downloads")


def test_a_data_set_of_kaggles(tmp_path, monkeypatch):
    archive = packed(utkface(tmp_path / "faces"), tmp_path / "utkface-new.zip")
    copy = "import sys, pathlib, shutil\nto = pathlib.Path(sys.argv[sys.argv.index('-p') + 1])\nto.mkdir(parents=True)\n"
    copy += f"assert sys.argv[1:4] == ['datasets', 'download', 'me/utkface-new']\nshutil.copy({str(archive)!r}, to)\n"
    kaggle(tmp_path, monkeypatch, copy)
    first = people.utkface(kaggle="me/utkface-new", **FEW)
    kaggle(tmp_path, monkeypatch, "raise SystemExit('not asked again')")
    assert first.table.equals(people.utkface(kaggle="me/utkface-new", **FEW).table)


@pytest.mark.parametrize(
    ("does", "says"),
    [
        ("import sys; sys.exit('Authentication required to call the Kaggle API.\\n\\n')", "run kaggle auth login"),
        ("import sys; sys.exit('403 - Forbidden')", "403 - Forbidden"),
        ("import sys; sys.exit('Failed to resolve api.kaggle.com')", "Failed to resolve"),
        ("import sys; sys.exit(1)", "the kaggle command failed"),
        ("", "the kaggle command failed"),
        ("import sys; sys.exit('No module named kaggle')", "the kaggle command is missing: pip install"),
    ],
)
def test_a_download_that_fails(tmp_path, monkeypatch, does, says):
    kaggle(tmp_path, monkeypatch, does)
    with pytest.raises(Problem, match=f"me/faces: not downloaded .*{says}.*give it with --from") as raised:
        people.agedb(kaggle="me/faces")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["faces", "a/b/c", "../x", "-p/x", "a/b c", "a/.."])
def test_a_name_that_is_none_of_kaggles(tmp_path, monkeypatch, name):
    kaggle(tmp_path, monkeypatch, "raise SystemExit('must not be asked')")
    with pytest.raises(Problem, match="must be OWNER/NAME"):
        people.lfw(kaggle=name)


# On the command line.


def test_the_commands(tmp_path, capsys):
    sources = {"mufac": mufac(tmp_path / "a"), "agedb": agedb(tmp_path / "b")}
    for name, path in sources.items():
        folder = tmp_path / "data" / name
        command = [name, "--from", str(path), "--folder", str(folder), "--forget-sets", "1", "--size", "8"]
        assert prepare.main([*command, "--forget-share", "0.1"]) == 0
        assert load(folder).retain.images.shape[1:] == (3, 8, 8) and splits(folder, "*") == ["private", "public"]
    assert prepare.main(["lfw", "--from", str(tmp_path / "none"), "--folder", str(tmp_path / "x")]) == 1
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("error: ") and not (tmp_path / "x").exists()


def test_the_competitions_own_folder_loads(tmp_path):
    rows = [(f"{row // 2}-{row}", row % 10, 20 + row, row // 2) for row in range(20)]
    table = pd.DataFrame(rows, columns=["image_id", "age_group", "age", "person_id"])
    for image_id, *_ in rows:
        saved(tmp_path / "images" / f"{image_id.replace('-', '/')}.png", noise(1, 32, 32))
    for part, some in {"retain": table[:12], "forget": table[12:16], "validation": table[16:]}.items():
        some.to_csv(tmp_path / f"{part}.csv", index=False)
    (tmp_path / "age_class_weights.json").write_text(str({str(label): 2 for label in range(10)}).replace("'", '"'))
    data = load(tmp_path)
    assert (data.split, len(data.retain), len(data.forget), data.test) == ("kaggle", 12, 4, None)
    assert data.held_out is data.validation and np.array_equal(
        data.retain.images[0], np.array(noise(1, 32, 32)).transpose(2, 0, 1)
    )
