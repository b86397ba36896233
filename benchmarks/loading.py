"""How long a data folder takes to load, the first time and again, and how much memory that takes at its peak.

    python -m benchmarks.loading                45,000 images of 32 x 32: one minute
    python -m benchmarks.loading --images 5000

The folder is made in the system's temporary folder (TMPDIR), of noise that compresses about as a photograph does, and
removed again. Each load is the whole of `evaluator.data.load` in a process of its own, without its imports. Memory is that
of a process at its peak beyond what it had after its imports, per value of a pixel (Linux only).
"""

import argparse
import multiprocessing
import re
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from PIL import Image

from evaluator.data import COLUMNS, load
from evaluator.files import write_json
from evaluator.scoring import processor

SIZE, FRAMES = 32, 20  # pixels per side, images per person
SHARES = {"public/retain": 0.78, "public/forget": 0.02, "validation": 0.1, "test": 0.1}


class Cost(NamedTuple):
    seconds: float
    processor_seconds: float
    bytes_per_value: float


def make(folder: Path, images: int) -> None:
    """A data folder of so many images."""
    source = np.random.default_rng(0)
    table = pd.DataFrame({"person_id": np.arange(images) // FRAMES, "age_group": source.integers(10, size=images)})
    table["image_id"] = [f"{person}-{row}" for row, person in enumerate(table.person_id)]
    table["age"] = table.age_group
    for person, rows in table.groupby("person_id"):
        (folder / "images" / str(person)).mkdir(parents=True)
        for row in rows.index:
            coarse = Image.fromarray(source.integers(256, size=(8, 8, 3), dtype=np.uint8)).resize((SIZE, SIZE))
            noisy = np.array(coarse) + source.integers(16, size=(SIZE, SIZE, 3))
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / "images" / str(person) / f"{row}.png")
    ends = (np.cumsum([0, *SHARES.values()]) * images).round().astype(int)
    order = source.permutation(images)
    for name, start, end in zip(SHARES, ends, ends[1:], strict=False):
        (folder / name).parent.mkdir(exist_ok=True)
        table.loc[order[start:end], COLUMNS].to_csv(folder / f"{name}.csv", index=False)
    write_json(folder / "age_class_weights.json", dict.fromkeys(map(str, range(10)), images // 10))
    write_json(folder / "dataset.json", {"image_size": SIZE, "classes": 10})


def loading(folder: Path) -> Cost:
    """What one load costs, in a process that does nothing else."""
    before = _kibibytes("VmRSS")
    start, started = time.perf_counter(), time.process_time()
    data = load(folder)
    seconds, processor_seconds = time.perf_counter() - start, time.process_time() - started
    values = sum(part.images.numel() for part in (data.retain, data.forget, data.validation, data.test))
    return Cost(seconds, processor_seconds, 1024 * (_kibibytes("VmHWM") - before) / values)


def _kibibytes(field: str) -> int:
    """VmRSS: the memory of this process; VmHWM: the most it had. Unlike getrusage, without that of the process before."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=45_000, help="how many (default: %(default)s)")
    args = parser.parse_args()
    print(processor())
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "noise"
        make(folder, args.images)
        for which in ("first", "second", "third"):
            with context.Pool(1) as pool:
                cost = pool.apply(loading, [folder])
            print(
                f"{args.images:,} images of {SIZE} x {SIZE}, {which} load: {cost.seconds:.2f} s "
                f"({cost.processor_seconds:.2f} s of a processor), {cost.bytes_per_value:.2f} bytes per pixel value",
                flush=True,
            )


if __name__ == "__main__":
    main()
