"""Fashion-MNIST and CIFAR-10: from small files of their own formats to data folders, and how that can fail."""

import gzip
import hashlib
import io
import json
import os
import pickle
import re
import socket
import struct
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import download
import fashion
import numpy as np
import pandas as pd
import prepare
import pytest
from cifar10 import cifar10, read_batch
from fashion import KINDS, fashion_small, read, subjects
from layout import split_names
from torchvision.datasets import CIFAR10, FashionMNIST

from evaluator.data import load, splits
from evaluator.files import Problem

NAMES = [Path(name).stem for name, _ in FashionMNIST.resources]
GROUPS, SIZE = 20, 5  # of each kind: so many pictures, each so many times with a little noise


def fashion_arrays() -> dict[str, np.ndarray]:
    """Of each of ten kinds 80 training and 20 test images; an image is of kind number % 10 and group number // 10 % 20."""
    random = np.random.RandomState(0)
    base = random.randint(0, 250, (GROUPS * 10, 28, 28))
    repeated = np.tile(base, (SIZE, 1, 1)) + random.randint(0, 6, (SIZE * GROUPS * 10, 28, 28))
    pictures, kinds = repeated.astype(np.uint8), np.tile(np.arange(10), SIZE * GROUPS).astype(np.uint8)
    return dict(zip(NAMES, (pictures[:800], kinds[:800], pictures[800:], kinds[800:]), strict=True))


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture(scope="module", autouse=True)
def small_groups():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fashion, "SUBJECT", SIZE)
        yield


@pytest.fixture(scope="module")
def clothes(tmp_path_factory) -> Path:
    """The four files, two of them gzipped. Not to be changed."""
    folder = tmp_path_factory.mktemp("clothes and\nnaïve names")
    for number, (name, array) in enumerate(fashion_arrays().items()):
        if number % 2:
            (folder / name).write_bytes(idx(array))
        else:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array), 1, mtime=0))
    return folder


@pytest.fixture(scope="module")
def prepared(clothes, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "fashion"
    assert prepare.main(["fashion", "--from", str(clothes), "--folder", str(folder)]) == 0
    return folder


@pytest.fixture
def few(clothes, tmp_path) -> Path:
    """The four files, to be damaged."""
    folder = tmp_path / "few"
    folder.mkdir()
    for path in clothes.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def rows(image_ids) -> np.ndarray:
    return np.array([int(image_id.split("-")[1]) for image_id in image_ids])


def test_fashion_has_the_images_and_labels_of_its_files(prepared):
    arrays = fashion_arrays()
    pictures = np.concatenate([arrays[NAMES[0]], arrays[NAMES[2]]])
    kinds = np.concatenate([arrays[NAMES[1]], arrays[NAMES[3]]])
    data = load(prepared)
    for part in (data.retain, data.forget, data.validation, data.test):
        row = rows(part.image_ids)
        assert (part.images.numpy() == pictures[row][:, None]).all()
        assert kinds[row].tolist() == [KINDS[label] for label in part.age_group]
    assert (data.classes, len(data.validation), len(data.test)) == (10, 22, 22)
    everything = np.concatenate([part.age_group for part in (data.train, data.validation, data.test)])
    # 100 of the first kind are 45% of 222 images
    assert np.bincount(everything).tolist() == [100, 56, 22, 13, 11, 7, 4, 4, 2, 2]


def test_fashion_forgets_whole_groups_of_the_first_two_classes(prepared):
    forgotten, labels = set(), set()
    for name in split_names(6):
        retain, forget = (pd.read_csv(prepared / name / f"{part}.csv") for part in ("retain", "forget"))
        labels |= set(forget.age_group)
        gone, kept = ({(row // 10 % GROUPS, row % 10) for row in rows(table.image_id)} for table in (forget, retain))
        assert not gone & (kept | forgotten)
        assert 0.02 <= len(forget) / (len(forget) + len(retain)) <= 0.02 + SIZE / 177
        forgotten |= gone
    assert labels == {0, 1}


def test_groups_of_near_copies_are_found(clothes):
    pictures, kinds = read(clothes)
    found = subjects(pictures[kinds == 3])
    expected = np.arange(len(found)) % GROUPS
    assert len(set(found)) == GROUPS == len(set(zip(found, expected, strict=True)))


def test_fashion_small_is_the_mean_of_four_pixels(clothes):
    made, again = fashion_small(clothes, 200), fashion_small(clothes, 200)
    assert made.pictures.shape == (200, 14, 14) and made.table.equals(again.table)
    whole = read(clothes)[0][rows(made.table.image_id)].astype(float)
    assert np.abs(made.pictures[:, 3, 5] - whole[:, 6:8, 10:12].mean((1, 2))).max() <= 0.5
    assert made.table.age_group.value_counts().sort_index().tolist() == [90, 50, 20, 12, 10, 6, 4, 4, 2, 2]


# What cannot be read.


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        (NAMES[0], lambda content: content[:1000], "cannot be read .*end-of-stream"),
        (NAMES[0], lambda content: content[:20] + bytes(50) + content[70:], "cannot be read"),
        (NAMES[0], lambda content: gzip.compress(b"not idx"), "not an idx file of images of 28 x 28"),
        (NAMES[0], lambda content: b"", "not an idx file"),
        (NAMES[0], lambda content: idx(np.zeros((5, 32, 32), np.uint8)), "not an idx file of images of 28 x 28"),
        (NAMES[0], lambda content: idx(np.zeros(5, np.uint8)), "not an idx file of images"),
        (NAMES[1], lambda content: idx(np.zeros(5, np.uint8)), "5 labels for 800 images"),
        (NAMES[1], lambda content: content[:-1], "807 bytes, 808 for its 800 labels"),
        (NAMES[1], lambda content: content + b"1", "809 bytes, 808 for its 800 labels"),
        (NAMES[1], lambda content: content[:-1] + b"\x0a", "a label is 10, it must be 0 to 9"),
        (NAMES[3], lambda content: None, "missing, also as .gz"),
    ],
)
def test_a_damaged_file_of_fashion_is_named(few, name, damage, says, capsys):
    path = next(few.glob(f"{name}*"))
    content = damage(path.read_bytes())
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert prepare.main(["fashion", "--from", str(few), "--folder", str(few / "made")]) == 1
    error = capsys.readouterr().err
    assert re.search(says, error) and name in error and error.count("\n") == 1 and "dataset-fashion-mnist" in error
    assert not (few / "made").exists()


def test_too_few_images_of_a_kind(tmp_path):
    for name, array in fashion_arrays().items():
        (tmp_path / name).write_bytes(idx(array[:100]))
    with pytest.raises(Problem, match="T-shirt/top: 20 images, too few for a share of 45% among 100"):
        fashion_small(tmp_path)


# Where it is looked for, and downloads: from this computer to itself.


def test_debians_folder_is_used_where_it_is_complete(clothes, few, monkeypatch):
    monkeypatch.setattr(fashion, "download", lambda *_: pytest.fail("downloads"))
    monkeypatch.setattr(fashion, "DEBIAN", clothes)
    assert len(read()[0]) == 1000


class Mirror:
    """Serves a folder; `asked` are the files that were asked for. A folder's file may be changed at any time."""

    def __init__(self, folder: Path):
        self.asked = []
        mirror = self

        class Handler(SimpleHTTPRequestHandler):
            def do_GET(self):
                mirror.asked.append(self.path.strip("/"))
                super().do_GET()

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """An empty folder that is served, and downloads that go to another empty one."""
    (tmp_path / "served").mkdir()
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "DOWNLOADS", tmp_path / "downloads")
    monkeypatch.setattr(fashion, "DEBIAN", tmp_path / "no such folder")
    made = Mirror(tmp_path / "served")
    yield made
    made.close()


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def test_a_download_of_fashion_resumes(mirror, tmp_path, monkeypatch):
    content = {f"{name}.gz": gzip.compress(idx(array)) for name, array in fashion_arrays().items()}
    for name in content:
        (tmp_path / "served" / name).write_bytes(content[name])
    monkeypatch.setattr(FashionMNIST, "mirrors", [mirror.url])
    monkeypatch.setattr(FashionMNIST, "resources", [(name, md5(content[name])) for name in content])
    third = list(content)[2]
    for broken in (None, content[third][:5000], b"<html>log in</html>"):  # no such file, half of it, another one
        (tmp_path / "served" / third).unlink(missing_ok=True)
        if broken is not None:
            (tmp_path / "served" / third).write_bytes(broken)
        with pytest.raises(
            Problem, match=f"downloads/fashion-mnist/{third}: {mirror.url}{third} was not downloaded"
        ) as error:
            read()
        assert "run again, or install Debian's package" in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "served" / third).write_bytes(content[third])
    mirror.asked.clear()
    assert len(read()[0]) == 1000
    assert set(mirror.asked) == set(list(content)[2:])  # the first two were there
    mirror.asked.clear()
    assert len(read()[0]) == 1000 and not mirror.asked


def dead_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/"


def test_no_network(mirror, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(FashionMNIST, "mirrors", [dead_port()])
    assert prepare.main(["fashion-small", "--folder", str(tmp_path / "made")]) == 1
    error = capsys.readouterr().err
    assert "train-images-idx3-ubyte.gz was not downloaded" in error and "refused" in error and error.count("\n") == 1
    monkeypatch.setattr(CIFAR10, "url", dead_port() + CIFAR10.filename)
    assert prepare.main(["cifar10", "--folder", str(tmp_path / "made")]) == 1
    error = capsys.readouterr().err
    assert "cifar-10-python.tar.gz was not downloaded" in error and "by --from" in error and error.count("\n") == 1
    assert not (tmp_path / "made").exists()


# CIFAR-10.


class Python2(pickle._Pickler):
    """Writes text and bytes alike as the str of Python 2, which wrote the published files."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_string(self, value: str | bytes) -> None:
        value = value.encode() if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)

    dispatch[str] = dispatch[bytes] = save_string


def batch(number: int, images: int = 20) -> dict:
    random = np.random.RandomState(number)
    labels = random.permutation(images) % 10
    return {
        "batch_label": f"batch {number}",
        "labels": labels.tolist(),
        "data": random.randint(0, 256, (images, 3072)).astype(np.uint8),
        "filenames": [f"image_{row}.png" for row in range(images)],
    }


BATCHES = [*(name for name, _ in CIFAR10.train_list), "test_batch"]


@pytest.fixture(scope="module")
def batches(tmp_path_factory) -> Path:
    """A folder with cifar-10-batches-py: 100 training and 20 test images. Not to be changed."""
    folder = tmp_path_factory.mktemp("cifar") / CIFAR10.base_folder
    folder.mkdir()
    for number, name in enumerate(BATCHES):
        content = io.BytesIO()
        Python2(content, 2).dump(batch(number))
        (folder / name).write_bytes(content.getvalue().replace(b"numpy._core.", b"numpy.core."))
    return folder.parent


@pytest.fixture(scope="module")
def archive(batches, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("archive") / CIFAR10.filename
    with tarfile.open(path, "w:gz") as content:
        content.add(batches / CIFAR10.base_folder, CIFAR10.base_folder)
    return path


def test_cifar10_has_the_images_and_labels_of_its_files(batches, tmp_path):
    folder = tmp_path / "cifar10"
    assert prepare.main(["cifar10", "--from", str(batches), "--folder", str(folder)]) == 0
    data = load(folder)
    assert [len(part) for part in (data.retain, data.forget, data.validation, data.test)] == [90, 10, 10, 10]
    parts = [batch(number) for number in range(6)]
    planes = np.concatenate([part["data"] for part in parts]).reshape(-1, 3, 32, 32)
    labels = np.concatenate([part["labels"] for part in parts])
    for part in (data.retain, data.forget, data.validation, data.test):
        row = rows(part.image_ids)
        assert (part.images.numpy() == planes[row]).all()
        assert part.age_group.tolist() == labels[row].tolist() and part.person_id.tolist() == row.tolist()
        assert (row >= 100).all() == (row >= 100).any() == (part in (data.validation, data.test))
    assert data.recipe == {}
    names = splits(folder, "*")
    forgotten = [image for name in names for image in load(folder, name).forget.image_ids]
    assert len(names) == 8 and len(set(forgotten)) == len(forgotten) == 80
    assert "no subjects" in json.loads((folder / "dataset.json").read_text())["note"]


def test_cifar10_from_an_archive_or_what_is_in_it(batches, archive):
    expected = cifar10(batches)
    for path in (archive, archive.parent, batches / CIFAR10.base_folder):
        made = cifar10(path, "3x3")
        assert made.table.equals(expected.table) and (made.pictures == expected.pictures).all()
        assert made.recipe == {"small_images": True}


def test_cifar10_is_downloaded_once(archive, mirror, tmp_path, monkeypatch):
    content = archive.read_bytes()
    served = tmp_path / "served" / CIFAR10.filename
    monkeypatch.setattr(CIFAR10, "url", mirror.url + CIFAR10.filename)
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(content))
    served.write_bytes(content[: len(content) // 2])
    with pytest.raises(Problem, match=r"was not downloaded .*corrupted.*run again, or get cifar-10-python\.tar\.gz"):
        cifar10()
    served.write_bytes(content)
    assert len(cifar10().table) == 120
    mirror.asked.clear()
    assert len(cifar10().table) == 120 and not mirror.asked


class Harmful:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_would_run_something_is_refused(tmp_path, protocol):
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps(batch(1) | {"extra": Harmful(tmp_path / "made")}, protocol))
    with pytest.raises(Problem, match=r"data_batch_1: not a readable batch of CIFAR-10 \(names \w+.mkdir\)"):
        read_batch(path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>",
        pickle.dumps([1, 2]),
        pickle.dumps({b"labels": [1]}),
        pickle.dumps({b"data": b"123", b"labels": [1]}),
        pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}),
        pickle.dumps({b"data": np.zeros((1, 3000), np.uint8), b"labels": [1]}),
        pickle.dumps({b"data": np.zeros((1, 3072)), b"labels": [1]}),
        pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}),
        pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [0.5]}),
        pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [1]})[:-40],
    ],
)
def test_a_damaged_batch_is_named(tmp_path, content):
    path = tmp_path / "data_batch_1"
    path.write_bytes(content)
    with pytest.raises(Problem, match="data_batch_1: not a readable batch of CIFAR-10") as error:
        read_batch(path)
    assert "\n" not in str(error.value)


def test_damaged_archives_and_missing_batches(archive, batches, tmp_path):
    broken = tmp_path / CIFAR10.filename
    broken.write_bytes(archive.read_bytes()[:100_000])
    with pytest.raises(Problem, match=f"{CIFAR10.filename}: cannot be unpacked"):
        cifar10(broken)
    with pytest.raises(Problem, match="data_batch_1: not a readable batch"):
        cifar10(archive.parent.parent)
    with pytest.raises(Problem, match="nowhere"):
        cifar10(tmp_path / "nowhere")
