"""Rehearses a Kaggle run on this machine: makes the input folder, runs the notebook, checks and scores its zip.

    python notebooks/rehearse.py                    8 runs on 240 of the handwritten digits, enlarged to 32 x 32
    python notebooks/rehearse.py --runs 16 --images 1000 --data my_faces

As on Kaggle: the input folder (CSVs, 32 x 32 PNGs, original_model.pth of torchvision's resnet18(num_classes=10),
age_class_weights.json, no test labels); a fresh process that sees neither the kit nor this shell's environment; no internet
(Python's sockets refuse everything but this machine). Not as on Kaggle: the GPUs, and the number of runs.
At the end the networks in the zip must equal those that `evaluate.py notebooks/submission.ipynb` makes with the same seeds.
"""

import functools
import os
import shutil
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import nbclient
import nbformat
import pandas as pd
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.models import resnet18

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import build

import evaluate
from evaluator import command
from evaluator.data import Data, Examples, load
from evaluator.files import Problem, read_json, write_atomically, write_bytes, write_json
from evaluator.training import Recipe, original_network

# One run at a time, as on Kaggle; a short training, as the network need not be good here.
RECIPE = {"epochs": 4, "learning_rate": 1e-3, "networks_at_once": 1}
NO_NETWORK = """
import socket

def only_here(function):
    def connect(self, address, *rest):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"no network, as on Kaggle: {address}")
        return function(self, address, *rest)
    return connect

socket.socket.connect = only_here(socket.socket.connect)
socket.socket.connect_ex = only_here(socket.socket.connect_ex)
"""


def make_input(data: Data, folder: Path, images: int, recipe: dict = RECIPE) -> Path:
    """Make folder/input as the competition mounts it, from some of a data set's images, and folder/data: the same with a
    recipe, which the evaluator needs to retrain. Returns folder/input."""
    if data.classes > 10:
        raise Problem(f"{data.folder}: has {data.classes} classes, the competition's network 10")
    source, scored = folder / "input", folder / "data"
    shutil.rmtree(source, ignore_errors=True)
    shutil.rmtree(scored, ignore_errors=True)
    shares = {"retain": 0.8, "forget": 0.1, "validation": 0.1}
    train = []
    for name, share in shares.items():
        table = _write_images(getattr(data, name), source / "images", max(2, round(share * images)))
        write_bytes(source / f"{name}.csv", table.to_csv(index=False).encode())
        train += table.age_group.tolist() if name != "validation" else []
    write_json(source / "age_class_weights.json", {str(label): train.count(label) for label in range(10)})
    shutil.copytree(source, scored)
    described = {"name": "rehearsal", "image_size": 32, "classes": 10, "recipe": recipe}
    write_json(scored / "dataset.json", described)
    prepared = load(scored)
    original_network(prepared, Recipe.of(prepared))
    shutil.copy(scored / "original_model.pth", source)
    return source


def _write_images(examples: Examples, folder: Path, count: int) -> pd.DataFrame:
    rows = torch.linspace(0, len(examples) - 1, min(count, len(examples))).round().long()
    sized = F.interpolate(examples.images[rows].float(), (32, 32), mode="bilinear").round().to(torch.uint8)
    ids = [examples.image_ids[row] for row in rows.tolist()]
    for image_id, image in zip(ids, sized, strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        write_atomically(folder / f"{image_id.replace('-', '/', 1)}.png", functools.partial(picture.save, format="PNG"))
    labels = {name: getattr(examples, name)[rows].numpy() for name in ("age_group", "age", "person_id")}
    return pd.DataFrame({"image_id": ids, **labels})


def play(notebook: Path, source: Path, folder: Path, **settings: object) -> Path:
    """Run a notebook from top to bottom as Kaggle would; returns its working folder.

    folder: gets tmp/, working/ and the notebook with its outputs. settings: further REHEARSAL_ variables.
    Raises Problem with the notebook's own message when it stops.
    """
    book = nbformat.read(notebook, as_version=4)
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "SYSTEMROOT", "TEMP") if name in os.environ}
    with tempfile.TemporaryDirectory() as elsewhere:  # not in the kit, so that the notebook does not find it
        (Path(elsewhere) / "sitecustomize.py").write_text(NO_NETWORK)
        told = {"INPUT": source, "TMP": folder / "tmp", "WORKING": folder / "working", **settings}
        env = {**kept, "PYTHONPATH": elsewhere, **{f"REHEARSAL_{name}": str(value) for name, value in told.items()}}
        client = nbclient.NotebookClient(
            book,
            timeout=None,
            kernel_name="python3",
            resources={"metadata": {"path": elsewhere}},
            extra_arguments=["--log-level=ERROR"],
        )
        try:
            client.execute(env=env)
        except nbclient.exceptions.CellExecutionError as error:
            raise Problem(f"{notebook}: {error.evalue or error.ename}") from None
        finally:
            write_bytes(folder / notebook.name, nbformat.writes(book).encode())
    return folder / "working"


def check_zip(path: Path, runs: int) -> None:
    """Check that there are exactly the float16 checkpoints 0 to runs - 1, and each loads into the competition's network."""
    net = resnet18(num_classes=10)
    with zipfile.ZipFile(path) as archive:
        expected = [f"kaggle/tmp/unlearned_checkpoint_{run}.pth" for run in range(runs)]
        if archive.namelist() != expected:
            raise Problem(f"{path}: holds {len(archive.namelist())} entries, not exactly {expected[0]} to {expected[-1]}")
        for entry in expected:
            with archive.open(entry) as file:
                state = torch.load(file, weights_only=True)
            wide = [name for name, tensor in state.items() if tensor.is_floating_point() and tensor.dtype != torch.float16]
            if wide:
                raise Problem(f"{path}: {entry}: '{wide[0]}' is {state[wide[0]].dtype}, not float16")
            net.load_state_dict(state)


def compare(path: Path, networks: Path, runs: int) -> None:
    """Check that the zip's networks are those in `networks`, to the last bit of float16."""
    with zipfile.ZipFile(path) as archive:
        for run in range(runs):
            with archive.open(f"kaggle/tmp/unlearned_checkpoint_{run}.pth") as file:
                uploaded = torch.load(file, weights_only=True)
            scored = torch.load(networks / f"network_{run:05d}.pth", weights_only=True)
            for name, tensor in scored.items():
                if not torch.equal(tensor.to(uploaded[name].dtype), uploaded[name]):
                    raise Problem(f"run {run}: '{name}' in {path} is not what the evaluator makes with the same seed")


def rehearse(method: Path, data: str, split: str, runs: int, images: int, results: Path, how: list[str]) -> None:
    start = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - start:4.0f} s] {text}", flush=True)

    folder = results / "rehearsal"
    notebook = build.write("submission", method=method)
    source = make_input(load(Path(data) if Path(data).is_dir() else HERE.parent / "data" / data, split), folder, images)
    say(f"{source}: {', '.join(sorted(path.name for path in source.iterdir()))}")
    for name in ("tmp", "working"):
        shutil.rmtree(folder / name, ignore_errors=True)
    archive = play(notebook, source, folder, RUNS=runs) / "submission.zip"
    check_zip(archive, runs)
    say(f"{archive}: {runs} float16 checkpoints, each loads into resnet18(num_classes=10)")

    common = ["--data", str(folder / "data"), "--runs", str(runs), "--results", str(results), *how]
    scored = results / "rehearsal" / "kaggle"
    for arguments in ([str(notebook), "--keep-networks"], ["--checkpoints", str(archive)]):
        if evaluate.main([*arguments, *common]):
            raise Problem("the rehearsal's networks could not be scored; the line above says why")
    summaries = {name: read_json(scored / name / "summary.json") for name in ("submission.zip", notebook.stem)}
    compare(archive, scored / notebook.stem / summaries[notebook.stem]["made_of"]["unlearned"], runs)
    uploaded, direct = (summary["score"] for summary in summaries.values())
    if abs(uploaded - direct) > 0.02:
        raise Problem(f"{archive} scores {uploaded:.4f}, the same seeds scored directly {direct:.4f}")
    say(f"networks equal in float16; score from the zip {uploaded:.4f}, directly {direct:.4f} (N = {runs} is only a check)")


def main(arguments: list[str] | None = None) -> int:
    parser = command.parser(__doc__, "split", runs=8)
    parser.add_argument("method", nargs="?", type=Path, default=build.OURS, help="the file that is submitted")
    parser.add_argument("--images", type=int, default=240, help="images of the input folder (default: %(default)s)")
    args = parser.parse_args(arguments)
    how = ["--device", args.device, *(["--jobs", str(args.jobs)] if args.jobs else [])]
    return command.run(
        lambda: rehearse(args.method.resolve(), args.data, args.split, args.runs, args.images, args.results.resolve(), how)
    )


if __name__ == "__main__":
    sys.exit(main())
