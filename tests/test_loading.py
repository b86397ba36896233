"""Pixels that are kept are those of the files as they are now, whatever was done to either; sets that may not be meant."""

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from benchmarks import loading
from evaluator import data, pixels
from evaluator.data import load
from evaluator.files import Problem

SIZE = (5, 7)  # height and width


def save(path: Path, seed: int) -> None:
    """An image of noise; the file is as long for every seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.RandomState(seed).randint(256, size=(*SIZE, 3)).astype(np.uint8)
    Image.fromarray(noise).save(path, "PNG", compress_level=0)


def write_sets(folder: Path, **sets: list[str]) -> None:
    for name, ids in sets.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame({"image_id": ids, "age_group": 1, "age": 30, "person_id": 2}).to_csv(f"{path}.csv", index=False)


IDS = [f"{row // 3}-{row}" for row in range(24)]


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "noise"
    for row, image_id in enumerate(IDS):
        save(folder / "images" / pixels.image_path(image_id), row)
    write_sets(folder, public__retain=IDS[4:16], public__forget=IDS[:4], validation=IDS[16:20], test=IDS[20:])
    write_sets(folder, private__retain=IDS[:12], private__forget=IDS[12:16])
    (folder / "age_class_weights.json").write_text('{"0": 1, "1": 15}')
    (folder / "dataset.json").write_text("{}")
    data.say.cache_clear()
    return folder


@pytest.fixture
def keeping(monkeypatch) -> None:
    """Few images are kept as many are, and as if their files were old."""
    monkeypatch.setattr(pixels, "KEPT_FROM", 1)
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + 2 * pixels.SETTLED)


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """The names of the images that are decoded, except the first, which tells the size."""
    names, read_image = [], pixels.read_image

    def note(path: Path) -> torch.Tensor:
        names.append(path.name)
        return read_image(path)

    monkeypatch.setattr(pixels, "read_image", note)
    return names


def image_of(folder: Path, image_id: str) -> Path:
    return folder / "images" / pixels.image_path(image_id)


def is_right(folder: Path, split: str = "public") -> bool:
    """Whether what is loaded is what the files hold now."""
    found = load(folder, split)
    return all(
        np.array_equal(image.permute(1, 2, 0), np.array(Image.open(image_of(folder, image_id))))
        for part in (found.retain, found.forget, found.validation, found.test)
        for image_id, image in zip(part.image_ids, part.images, strict=True)
    )


def test_images_are_decoded_once(folder, keeping, decoded):
    first = load(folder)
    assert len(decoded) == 1 + len(IDS)
    del decoded[:]
    assert load(folder).digest == first.digest and is_right(folder)
    assert is_right(folder, "private")  # other sets of the same images
    assert len(decoded) == 3  # one a load
    assert len(list(folder.glob(".*"))) == 1
    (folder / "dataset.json").write_text(json.dumps({"image_size": 7}))
    with pytest.raises(Problem, match="7x5 pixels, it must be 7x7 like"):
        load(folder)


def test_a_small_folder_is_left_alone(folder):
    before = sorted(folder.rglob("*"))
    load(folder)
    assert sorted(folder.rglob("*")) == before


def test_a_file_that_may_change_unnoticed_is_not_kept(folder, monkeypatch, decoded):
    """Soon after a change another one may leave its dates: the file system's clock goes on in steps."""
    monkeypatch.setattr(pixels, "KEPT_FROM", 1)
    load(folder)
    assert not (folder / pixels.KEPT).exists()
    image = image_of(folder, IDS[5])
    wait_for_another_date_than(image)
    save(image, 99)
    os.utime(image, (0, 0))  # only the date of its last change tells
    monkeypatch.setattr(time, "time_ns", lambda: image.stat().st_ctime_ns + pixels.SETTLED - 1)
    load(folder)
    for _ in range(2):
        del decoded[:]
        assert is_right(folder) and decoded[1:] == [image.name]
    monkeypatch.setattr(time, "time_ns", lambda: image.stat().st_ctime_ns + pixels.SETTLED)
    load(folder)
    del decoded[:]
    assert is_right(folder) and len(decoded) == 1


def wait_for_another_date_than(image: Path) -> None:
    clock = image.with_name("clock")
    clock.touch()
    while clock.stat().st_ctime_ns <= image.stat().st_ctime_ns:
        clock.touch()


def edited(image: Path) -> None:
    save(image, 100)


def replaced(image: Path) -> None:
    save(image.with_name("new.png"), 101)
    image.with_name("new.png").replace(image)


def exchanged(image: Path) -> None:
    other = image.with_name(f"{int(image.stem) + 1}.png")
    other.rename(image.with_name("aside.png"))
    image.rename(other)
    image.with_name("aside.png").rename(image)


def linked(image: Path) -> None:
    save(image.with_name("target.png"), 102)
    image.unlink()
    image.symlink_to("target.png")


def moved(image: Path) -> None:
    """Its folder is now another one, and the old one is a link to it."""
    shutil.copytree(image.parent, image.parent.with_name("x"))
    save(image.parent.with_name("x") / image.name, 103)
    shutil.rmtree(image.parent)
    image.parent.symlink_to("x")


@pytest.mark.parametrize("change", [edited, replaced, exchanged, linked, moved])
def test_a_changed_image_is_read_anew(folder, keeping, decoded, change):
    """Also when it has the same length and its dates were put back."""
    image = image_of(folder, IDS[3])
    load(folder)
    before = image.stat()
    wait_for_another_date_than(image)
    change(image)
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = image.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    del decoded[:]
    assert is_right(folder) and image.name in decoded[1:] and len(decoded) <= 4
    del decoded[:]
    assert is_right(folder) and len(decoded) == 1


def test_a_link_to_another_image_is_read_anew(folder, keeping):
    image = image_of(folder, IDS[3])
    for seed in (104, 105):
        save(image.with_name(f"{seed}.png"), seed)
    image.unlink()
    image.symlink_to("104.png")
    assert is_right(folder)
    os.utime(image.with_name("105.png"), ns=(0, image.stat().st_mtime_ns))
    image.unlink()
    image.symlink_to("105.png")
    assert is_right(folder)


def test_what_is_wrong_with_an_image_is_still_said(folder, keeping):
    load(folder)
    image = image_of(folder, IDS[5])
    image.write_bytes(image.read_bytes()[:50])
    with pytest.raises(Problem, match=r"5\.png: not a readable image"):
        load(folder)
    image.unlink()
    with pytest.raises(Problem, match=r"5\.png: missing image"):
        load(folder)
    outside = folder.parent / "outside.png"
    save(outside, 5)
    image.symlink_to(outside)
    with pytest.raises(Problem, match="is a link to a place outside"):
        load(folder)


def flip(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: b"\n" * 10_000,
        lambda content: content[:20],
        lambda content: content[: content.index(b"\n") + 1],
        lambda content: content[:-1],
        lambda content: content[: -len(content) // 2],
        lambda content: content[: -3 * SIZE[0] * SIZE[1] - 16],  # as long as a file of one image fewer
        lambda content: content + content,
        lambda content: content.replace(b"5 x 7", b"7 x 5"),
        lambda content: flip(content, 7),
        *(
            lambda content, place=place: flip(content, content.index(b"\n") + 1 + place)
            for place in (0, 8, 100, 383, 384, 2000)
        ),
        lambda content: flip(content, -1),
        lambda content: content[: content.index(b"\n") + 1 + 16 * 24] + bytes(24 * 105),
    ],
)
def test_a_damaged_file_is_made_anew(folder, keeping, decoded, damage):
    load(folder)
    kept = folder / pixels.KEPT
    whole = kept.read_bytes()
    assert len(whole) == whole.index(b"\n") + 1 + 24 * (16 + 105)
    kept.write_bytes(damage(whole))
    assert is_right(folder) and kept.read_bytes() == whole
    del decoded[:]
    assert is_right(folder) and len(decoded) == 1


@pytest.mark.parametrize(
    "other", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to(path.name)], ids=["folder", "pipe", "loop"]
)
def test_something_else_in_its_place(folder, keeping, other):
    other(folder / pixels.KEPT)
    assert is_right(folder) and is_right(folder)


def test_pixels_of_another_version_are_not_used(folder, keeping, decoded, monkeypatch):
    load(folder)
    for where, name, value in ((pixels, "VERSION", 0), (pixels.PIL, "__version__", "1.0")):
        del decoded[:]
        monkeypatch.setattr(where, name, value)
        assert is_right(folder) and len(decoded) == 1 + len(IDS)


def test_a_folder_that_cannot_be_written(folder, keeping):
    def refuse(path, write):
        raise Problem(f"{path}: cannot be written")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pixels, "write_atomically", refuse)
        assert is_right(folder)
    assert not (folder / pixels.KEPT).exists()


def test_a_renamed_folder_keeps_its_pixels(folder, keeping, decoded):
    load(folder)
    del decoded[:]
    new = folder.rename(folder.with_name("a name\nof two línes"))
    (new / "dataset.json").write_text('{"name": "noise"}')
    assert is_right(new) and len(decoded) == 1


def test_more_images_than_memory(folder):
    (folder / "dataset.json").write_text('{"image_size": 7}')
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(Problem, match="12 images of 7x7 pixels do not fit into memory"),
    ):
        patch.setattr(np, "empty", lambda *_: (_ for _ in ()).throw(MemoryError()))
        load(folder)


def test_the_benchmarks_folder_is_one(tmp_path, capsys):
    loading.make(tmp_path / "noise", 200)
    found = load(tmp_path / "noise")
    assert [len(part) for part in (found.retain, found.forget, found.validation, found.test)] == [156, 4, 20, 20]
    cost = loading.loading(tmp_path / "noise")
    assert cost.seconds > 0 and cost.bytes_per_value >= 0
    assert capsys.readouterr().err == ""


# Warnings.


def test_equal_images_in_two_sets(folder, capsys):
    for copy, image_id in ((IDS[22], IDS[9]), (IDS[20], IDS[2]), (IDS[23], IDS[8]), (IDS[17], IDS[1]), (IDS[3], IDS[10])):
        image_of(folder, copy).write_bytes(image_of(folder, image_id).read_bytes() + b"another file, the same pixels")
    expected = [
        f"{folder}/public/forget.csv: 1 of 4 images are also, pixel for pixel, in retain.csv (the first: 1-3 = 3-10)",
        f"{folder}/validation.csv: 1 of 4 images are also, pixel for pixel, in the training images (the first: 5-17 = 0-1)",
        f"{folder}/test.csv: 3 of 4 images are also, pixel for pixel, in the training images (the first: 6-20 = 0-2)",
    ]
    load(folder)
    assert capsys.readouterr().err.splitlines() == [f"warning: {line}" for line in expected]
    load(folder)
    load(folder, "private")
    assert capsys.readouterr().err == ""  # each is said once; 1-3 and 3-10 are both kept under private


def test_images_that_are_nearly_equal_are_not(folder, capsys):
    one = np.array(Image.open(image_of(folder, IDS[0])))
    one[4, 6, 2] ^= 1
    Image.fromarray(one).save(image_of(folder, IDS[20]))
    load(folder)
    assert capsys.readouterr().err == ""


def test_sets_of_odd_sizes(folder, capsys):
    write_sets(folder, public__forget=IDS[:1])
    assert len(load(folder).forget) == 1
    said = "forget.csv: one image: its score is mostly chance, and batch norm may fail on a batch of one image"
    assert capsys.readouterr().err == f"warning: {folder}/public/{said}\n"
    write_sets(folder, public__forget=IDS[:12], public__retain=IDS[12:16])
    assert len(load(folder).forget) == 12
    said = "forget.csv: 12 images are to be forgotten and 4 kept; are the two files swapped?"
    assert capsys.readouterr().err == f"warning: {folder}/public/{said}\n"
    write_sets(folder, public__retain=IDS[12:13])
    with pytest.raises(Problem, match=r"retain.csv: one image only; networks are trained on 2 or more$"):
        load(folder)
