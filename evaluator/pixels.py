"""Image files -> pixels in memory. Those of a large folder are kept in its file .pixels, and decoded only once.

The file is a line of text, [images, 2] uint64 (key, fingerprint) and [images, 3, H, W] uint8. An image is read from it while
its key (which names the file and its present state) is there, and the pixels have their fingerprint: whatever changed or was
damaged is decoded anew. It may be deleted at any time.
"""

import contextlib
import functools
import hashlib
import os
import stat
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

from evaluator.files import Problem, one_line, write_atomically

LARGEST_IMAGE = 1024  # pixels per side
MODES = ("1", "L", "LA", "P", "RGB", "RGBA")  # that Pillow converts to RGB; it would clip 16-bit grey at 255
KEPT = ".pixels"
KEPT_FROM = 4_000  # images; fewer are decoded in half a second
VERSION = 1  # of what `read_image` returns, and of the file
SETTLED = 2_000_000_000  # ns: a second change so soon may leave a file with the same dates (FAT counts in 2 s)


class Listed(NamedTuple):
    """The images of one set. keys: [n] uint64, as `finder` gives them."""

    ids: list[str]
    keys: np.ndarray


class Pixels(NamedTuple):
    """images: [n, 3, H, W] uint8; fingerprints: [n] uint64, equal for equal images."""

    images: Tensor
    fingerprints: np.ndarray


def image_path(image_id: str) -> str:
    """Below images/."""
    return image_id.replace("-", "/", 1) + ".png"


def finder(images: Path) -> Callable[[str], tuple[str, int]]:
    """A function that finds image files: image_id -> (its real path, the key of its present state; 0: decode it anew).

    The real path is what os.path.realpath gives, but a folder is looked up once and a file only if it is a link.
    """
    now = time.time_ns()

    @functools.cache
    def real_folder(name: str) -> str:
        return os.path.join(os.path.realpath(images / name), "")

    def find(image_id: str) -> tuple[str, int]:
        path = image_path(image_id)
        folder, _, name = path.rpartition("/")
        real = real_folder(folder) + name
        try:
            found = os.lstat(real)
            if stat.S_ISLNK(found.st_mode):
                real = os.path.realpath(real)
                found = os.stat(real)
        except OSError:  # said when it is read
            return real, 0
        if now - found.st_ctime_ns < SETTLED:
            return real, 0
        state = f"{path} {found.st_ino} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"
        return real, _hash(state.encode())

    return find


def read(images: Path, sets: Mapping[str, Listed], size: Sequence[int] | None) -> dict[str, Pixels]:
    """The pixels of each set. size: height and width that the images must have; None: those of the first.

    Raises Problem naming the first image that cannot be read or has another size, or when memory does not suffice.
    """
    kept, found, decoded = images.with_name(KEPT), {}, False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about images that it reads all the same
        height, width = size or read_image(images / image_path(next(iter(sets.values())).ids[0])).shape[1:]
        for part, (ids, keys) in sets.items():
            try:
                rows = np.empty((len(ids), 3, height, width), np.uint8)
            except MemoryError as error:
                raise Problem(f"{images}: {len(ids)} images of {width}x{height} pixels do not fit into memory") from error
            recalled, fingerprints = _recall(kept, keys, rows)
            for row in np.flatnonzero(~recalled):
                path = images / image_path(ids[row])
                pixels = read_image(path)
                if pixels.shape[1:] != (height, width):
                    asked = f"it must be {width}x{height} like the first image or image_size in dataset.json"
                    raise Problem(f"{path}: {pixels.shape[2]}x{pixels.shape[1]} pixels, {asked}")
                rows[row] = pixels
                fingerprints[row] = _hash(rows[row])
            decoded = decoded or keys[~recalled].any()
            found[part] = Pixels(torch.from_numpy(rows), fingerprints)
    if decoded and sum(len(ids) for ids, _ in sets.values()) >= KEPT_FROM:
        _keep(kept, [(sets[part].keys, *found[part]) for part in sets])
    return found


def read_image(path: Path) -> Tensor:
    """[3, H, W] uint8. Raises Problem."""
    if not os.path.isfile(path):
        raise Problem(f"{path}: missing image")
    try:
        with Image.open(path, formats=["PNG", "JPEG"]) as image:
            if max(image.size) > LARGEST_IMAGE:
                raise ValueError(f"{image.width}x{image.height} pixels, at most {LARGEST_IMAGE} per side are allowed")
            if image.mode not in MODES:
                raise ValueError(f"pixel mode {image.mode}; only 8 bits per channel are allowed")
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
    except Exception as error:  # Pillow raises many kinds for a damaged file
        raise Problem(f"{path}: not a readable image ({one_line(error)})") from error


def _hash(content: bytes | np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _header(height: int, width: int) -> bytes:
    return f"pixels {VERSION}, decoded by Pillow {PIL.__version__}, 3 x {height} x {width}\n".encode()


def _recall(kept: Path, keys: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fill the rows whose keys are in a kept file: ([n] bool, which; [n] uint64, their fingerprints)."""
    recalled, fingerprints = np.zeros(len(keys), bool), np.zeros(len(keys), np.uint64)
    with contextlib.suppress(Exception):  # whatever is wrong with the file, the images are there
        if os.path.isfile(kept):
            with open(kept, "rb", buffering=0) as file:
                header, each = _header(*rows.shape[2:]), rows[0].nbytes
                count, more = divmod(os.fstat(file.fileno()).st_size - len(header), each + 16)
                if file.read(len(header)) != header or more:
                    return recalled, fingerprints
                index = np.fromfile(file, "<u8", 2 * count).reshape(-1, 2)
                order = index[:, 0].argsort()
                places = order[np.searchsorted(index[:, 0], keys, sorter=order).clip(max=count - 1)]
                fingerprints[:] = index[places, 1]
                for row in np.flatnonzero(index[places, 0] == keys):
                    file.seek(len(header) + 16 * count + each * int(places[row]))
                    recalled[row] = file.readinto(rows[row]) == each and _hash(rows[row]) == fingerprints[row]
    return recalled, fingerprints


def _keep(kept: Path, sets: list[tuple[np.ndarray, Tensor, np.ndarray]]) -> None:
    """Write the file, of the images that have a key; a folder that cannot be written does without.

    sets: keys, images and fingerprints of each.
    """

    def write(file: BinaryIO) -> None:
        file.write(_header(*sets[0][1].shape[2:]))
        for keys, _, fingerprints in sets:
            file.write(np.stack([keys, fingerprints], 1)[keys != 0].astype("<u8").tobytes())
        for keys, images, _ in sets:
            for row in np.flatnonzero(keys):
                file.write(images[row].numpy())

    with contextlib.suppress(Problem):
        write_atomically(kept, write)
