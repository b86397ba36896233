"""The page: what it shows and leaves out, that it needs nothing from outside, and how it looks in a browser."""

import base64
import html
import io
import json
import math
import re
import shlex
import shutil
import subprocess
import warnings
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from evaluate import field_value
from evaluator import report, scoring
from evaluator.evaluation import Evaluation, checksum
from evaluator.files import Problem, write_csv, write_json
from evaluator.metric import best_attacks
from evaluator.models import network_digest
from evaluator.pool import Pool
from evaluator.runs import retrained_pool

RUNS = 16
HOSTILE = ["<script>document.title='taken'<\\script>", '"quoted" & it\'s $x_1$ é', "_a name\nof two lines"]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open the page in")


def add_method(evaluation: Evaluation, name: str, noise: float = 0.5, **fields: object) -> Path:
    """A method as if it had been scored: its runs are the retrained ones with noise on their logits."""
    runs = range(evaluation.runs)
    retrained = evaluation.retrained()
    values = retrained.load(runs)
    logits = values["forget_logits"]
    values["forget_logits"] = logits + noise * torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    folder = evaluation.results / name
    pool = Pool(folder, {"kind": "unlearned", "original": network_digest(evaluation.original()), "noise": noise})
    for run in runs:
        pool.save(run, {part: value[run].numpy() for part, value in values.items()})
    summary, table = scoring.score(values, retrained.load(runs), evaluation.data)
    write_csv(folder / "examples.csv", table.assign(shift=np.linspace(-2, 2, len(table)), spread_ratio=0.5))
    summary |= {
        "method": name,
        "path": f"methods/{name}.py",
        "config": {"rate": 0.1, "text": "3", "word": "a b", "many": [1, 2], "no": None},
        "score_interval": [0.9 * summary["score"], 1.2 * summary["score"]],
        "forgetting_quality_interval": [0.0, 1.0],
        "projected_512": {"score": 0.01, "low": 0.005, "high": 0.02},
        "what_if": {"medians": 0.1, "spreads": 0.11, "both": 0.12},
        "diagnosis": f"too confident in {name}",
        "seconds_per_run": 1.5,
        "fraction_of_retraining": 0.25,
        "original": "trained by the recipe",
        "versions": scoring.versions(),
        "device": "cpu",
        "made_of": {
            "runs": evaluation.runs,
            "unlearned": pool.folder.name,
            "retrained": retrained.folder.name,
            "scoring": scoring.VERSION,
        },
    }
    rewrite(folder, summary | fields)
    return folder


def rewrite(folder: Path, summary: dict) -> None:
    summary = {name: value for name, value in summary.items() if name != "checked"}
    write_json(folder / "summary.json", summary | {"checked": checksum(summary, folder / "examples.csv")})


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def evaluation_in(results: Path, data: Path, runs: int = RUNS) -> Evaluation:
    return Evaluation.of(str(data), "public", runs, results, jobs=1, device="cpu")


@pytest.fixture(scope="module")
def scored(pools, data, tmp_path_factory) -> Path:
    """Results of hostile names and one that is left out. Not to be changed."""
    results = tmp_path_factory.mktemp("scored") / "results"
    shutil.copytree(pools, results)
    evaluation = evaluation_in(results, data)
    for number, name in enumerate(HOSTILE):
        add_method(evaluation, name, noise=0.2 + number)
    (add_method(evaluation, "half & half") / "summary.json").unlink()
    return results


@pytest.fixture(scope="module")
def page(scored, data) -> str:
    return report.write_page(evaluation_in(scored, data)).read_text(encoding="utf-8")


@pytest.fixture
def one(results, data) -> tuple[Evaluation, Path]:
    """Results of one method, to be changed, and its folder."""
    evaluation = evaluation_in(results, data)
    return evaluation, add_method(evaluation, "noisy")


class Elements(HTMLParser):
    """All elements of a page, as (tag, attributes), and the text of its style sheets."""

    def __init__(self, page: str):
        super().__init__()
        self.found, self.style, self.within = [], "", ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.found.append((tag, dict(attributes)))
        self.within = tag

    def handle_data(self, text: str) -> None:
        if self.within == "style":
            self.style += text


# The page


def test_nothing_is_loaded_from_outside(page):
    elements = Elements(page)
    assert not {tag for tag, _ in elements.found} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in elements.found:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        for name in {"src", "href", "srcset", "poster", "data", "xlink:href"} & set(attributes):
            assert attributes[name].startswith(("#", "data:image/png;base64,")), (tag, attributes[name])
        assert not re.search(r"url\((?!#)", attributes.get("style") or "")
    assert elements.style and "url(" not in elements.style and "@import" not in elements.style


def test_ids_are_unique_and_references_lead_somewhere(page):
    elements = Elements(page).found
    ids = Counter(attributes["id"] for _, attributes in elements if "id" in attributes)
    assert ids and set(ids.values()) == {1}
    used = [value for _, attributes in elements for value in attributes.values() if value]
    used = {name for value in used for name in re.findall(r"^#(.+)|url\(#(.+?)\)", value) for name in name if name}
    assert used and used <= set(ids)


def test_every_picture_has_words(page):
    pictures = [(tag, attributes) for tag, attributes in Elements(page).found if tag in ("img", "svg")]
    assert Counter(tag for tag, _ in pictures) == {"svg": 1 + 5 * len(HOSTILE), "img": 16 * len(HOSTILE)}
    assert all(len(attributes.get("alt") or attributes.get("aria-label")) > 20 for _, attributes in pictures)


def test_every_name_is_shown_and_none_is_obeyed(page):
    assert page.count("<script") == 0
    for name in HOSTILE:
        shown = html.escape(report.printable(name), quote=False).replace("'", "&#39;").replace('"', "&#34;")
        assert f">{shown}</h2>" in page and f"too confident in {shown}" in page.replace("Too", "too")
    (reason,) = re.findall(r"<li><b>half &amp; half</b>: (.*)</li>", page)
    assert reason.startswith("16 of 16 runs are made, there is no score yet")


def test_the_same_results_give_the_same_page(page, scored, data):
    assert report.write_page(evaluation_in(scored, data)).read_text(encoding="utf-8") == page


def test_a_name_that_is_not_text(results, data):
    evaluation = evaluation_in(results, data)
    add_method(evaluation, "not\udcfftext\x07")
    assert ">not�text�</h2>" in report.write_page(evaluation).read_text(encoding="utf-8")


def test_what_a_summary_lacks_is_left_out(one):
    evaluation, folder = one
    optional = ("score_interval", "forgetting_quality_interval", "projected_512", "what_if", "diagnosis")
    table = pd.read_csv(folder / "examples.csv").drop(columns=["shift", "spread_ratio"])
    write_csv(folder / "examples.csv", table)
    rewrite(folder, {name: value for name, value in summary_of(folder).items() if name not in optional})
    page = report.write_page(evaluation).read_text(encoding="utf-8")
    assert page.count("<svg") == 4 and page.count("<img") == 16
    assert not any(word in page for word in ("95%", "at 512 runs", "Shift", "What is missing", "too confident"))


def test_cautions(one):
    evaluation, folder = one
    summary = summary_of(folder)
    assert [line.split()[0] for line in report.cautions(evaluation.data, RUNS, [summary])] == ["These", "noisy:"]
    calm = summary | {"fraction_of_retraining": 0.2}
    assert report.cautions(evaluation.data, 512, [calm, calm]) == []
    other = calm | {"device": "cuda", "fraction_of_retraining": None, "original": "given"}
    assert len(report.cautions(evaluation.data, 512, [calm, other])) == 2


# What is kept, and what is not


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def changed(folder: Path, **fields: object) -> None:
    summary = summary_of(folder)
    made_of = {name: fields.pop(name) for name in summary["made_of"] if name in fields}
    rewrite(folder, summary | fields | {"made_of": summary["made_of"] | made_of})


def began_elsewhere(folder: Path) -> None:
    (old,) = folder.glob("*/made_from.json")
    pool = Pool(
        folder, {name: text for name, text in json.loads(old.read_text()).items() if name != "format"} | {"original": "x"}
    )
    for path in old.parent.glob("run_*"):
        path.rename(pool.folder / path.name)
    shutil.rmtree(old.parent)
    changed(folder, unlearned=pool.folder.name)


def half_finished(folder: Path) -> None:
    (folder / "summary.json").unlink()
    next(folder.glob("*/made_from.json")).unlink()
    for path in folder.glob("*/run_*[02468].npz"):
        path.unlink()


LEFT_OUT = {
    "no score yet": (lambda folder: (folder / "summary.json").unlink(), "16 of 16 runs are made"),
    "half of the runs": (half_finished, "8 of 16 runs are made"),
    "a summary cut off": (lambda folder: damage(folder / "summary.json"), "summary.json is damaged"),
    "a table cut off": (lambda folder: damage(folder / "examples.csv"), "is damaged or was edited"),
    "no table": (lambda folder: (folder / "examples.csv").unlink(), "is damaged or was edited"),
    "another N": (lambda folder: changed(folder, runs=4), "its score is of 4 runs, this page is of 16"),
    "another scoring": (lambda folder: changed(folder, scoring="old"), "another version of the kit"),
    "other retrained networks": (lambda folder: changed(folder, retrained="other"), "other data or another recipe"),
    "another method's": (lambda folder: changed(folder, method="other"), "its summary is that of other"),
    "a run missing": (lambda folder: next(folder.glob("*/run_00003.npz")).unlink(), "1 of its 16 runs are missing, run 3"),
    "no runs": (lambda folder: shutil.rmtree(next(folder.glob("*/"))), "are missing"),
    "made_from.json cut off": (
        lambda folder: damage(next(folder.glob("*/made_from.json"))),
        "damaged or of another version",
    ),
    "another original": (began_elsewhere, "another original_model.pth"),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_may_not_be_compared_is_named_and_left_out(one, case):
    evaluation, folder = one
    spoil, reason = LEFT_OUT[case]
    assert [row["method"] for row in report.kept(evaluation)[0]] == ["noisy"] and not report.kept(evaluation)[1]
    spoil(folder)
    summaries, left_out = report.kept(evaluation)
    assert summaries == [] and reason in left_out["noisy"] and "score it again" in left_out["noisy"]


def test_a_damaged_run_is_named_on_the_page(one):
    evaluation, folder = one
    damage(next(folder.glob("*/run_00003.npz")))
    page = report.write_page(evaluation).read_text(encoding="utf-8")
    assert "<svg" not in page and "run_00003.npz: cut off or damaged" in page and "No method has a score" in page


def test_missing_retrained_networks_are_not_trained(one):
    evaluation, _ = one
    missing = evaluation.retrained().path(5)
    missing.unlink()
    page = report.write_page(evaluation).read_text(encoding="utf-8")
    assert "1 of the retrained networks&#39; 16 runs are missing, run 5" in page and not missing.exists()


def test_a_ceiling_is_only_measured_when_nothing_must_be_trained(one):
    evaluation, folder = one
    measured = replace(evaluation, second_pool=True)
    assert report._ceiling(measured) == evaluation.ceiling()
    again = retrained_pool(evaluation.setting, evaluation.data, evaluation.recipe, 0, "retrained_again")
    for path in folder.glob("*/run_*"):
        shutil.copy(path, again.folder)
    assert report._ceiling(measured)["method"] == "(ceiling, measured)"


def test_folders_that_are_no_methods(one):
    evaluation, folder = one
    for name in ("tuning", "retrained_again"):
        shutil.copytree(folder, evaluation.results / name)
    (evaluation.results / "empty").mkdir()
    assert [row["method"] for row in report.kept(evaluation)[0]] == ["noisy"] and report.kept(evaluation)[1] == {}


# The table


def ceiling_of(score: float) -> dict:
    equal = dict.fromkeys(("ra_unlearned", "ra_retrained", "ta_unlearned", "ta_retrained"), 1.0)
    return {"method": "(ceiling, estimated)", "forgetting_quality": score, "score": score, **equal}


def test_different_numbers_of_runs_are_refused():
    rows = [ceiling_of(0.1) | {"method": name, "runs": runs} for name, runs in (("one", 64), ("two", 64), ("three", 512))]
    assert len(report.score_table(rows[:2], ceiling_of(0.2))) == 3
    with pytest.raises(Problem, match="one has 64 runs, three has 512 runs"):
        report.score_table(rows, ceiling_of(0.2))


def test_intervals_and_projections_are_columns_where_there_are_any():
    plain = ceiling_of(0.1) | {"method": "plain", "runs": 64}
    assert not {"95% interval", "at 512 runs"} & set(report.score_table([plain], ceiling_of(0.0)))
    full = plain | {
        "method": "full",
        "score_interval": [0.04212, 0.05051],
        "projected_512": {"score": 0.02, "low": 0.01, "high": 0.03},
        "seconds_per_run": 0.5,
        "fraction_of_retraining": 0.3,
    }
    table = report.score_table([plain | {"score_interval": [math.nan, math.nan]}, full], ceiling_of(0.2))
    assert table["95% interval"].tolist() == ["", "0.0421 to 0.0505", ""]
    assert table["at 512 runs"].tolist() == ["", "0.020 (0.010 to 0.030)", ""]
    assert table["of ceiling"].tolist() == ["50%", "50%", "100%"]
    assert max(map(len, table.to_string(index=False).splitlines())) <= 140


# Words


@pytest.mark.parametrize("runs", [2, 3, 16, 64])
def test_an_attack_in_words_has_the_error_rates_of_its_rule(runs):
    """The rule and its errors, read back from the words and counted again on the confidences."""
    generator = torch.Generator().manual_seed(runs)
    scale = torch.tensor([1.0, 0.3, 3.0, 1.0, 0.001, 1.0])
    unlearned = torch.randn(runs, 6, generator=generator, dtype=torch.float64) * scale + torch.tensor([0, 0, 0, 1.5, 0, 9])
    retrained = torch.randn(runs, 6, generator=generator, dtype=torch.float64)
    found = best_attacks(unlearned, retrained)
    sides = {"unlearned": unlearned, "retrained": retrained}
    for example in range(6):
        row = pd.DataFrame(
            {
                "image_id": ["1-1"],
                "age_group": [3],
                "attack": [scoring.FAMILIES[found.family[example]]],
                **{name: [getattr(found, name)[example].item()] for name in found._fields if name != "family"},
            }
        )
        shown = report._example(next(row.itertuples()), torch.zeros(3, 2, 2, dtype=torch.uint8), runs)
        says = re.search("unlearned|retrained", shown["lines"][1])[0]
        other = "retrained" if says == "unlearned" else "unlearned"
        left, right = found.left[example], found.right[example]
        inside = {
            name: int(((left <= side[:, example]) & (side[:, example] <= right)).sum()) for name, side in sides.items()
        }
        assert shown["lines"][2] == f"False positives {inside[other]}, false negatives {runs - inside[says]} of {runs}."
        assert f"{left:.2f}" in shown["lines"][1]


def test_the_command_sets_every_value_of_the_config(one):
    evaluation, folder = one
    words = shlex.split(report.command_line(evaluation, summary_of(folder)))
    at = words.index("--set")
    assert dict(map(field_value, words[at + 1 :])) == summary_of(folder)["config"]
    assert words[:at] == (
        f"python evaluate.py methods/noisy.py --data {evaluation.folder} --split public --runs 16 --device cpu "
        f"--results {evaluation.setting.results}"
    ).split(" ")
    given = summary_of(folder) | {"config": {}, "path": "a b.zip"}
    assert report.command_line(evaluation, given).startswith("python evaluate.py --checkpoints 'a b.zip' --data")
    assert " --attacks --set rate=0.1" in report.command_line(evaluation, summary_of(folder) | {"attacks": {"AUC": 0.5}})
    nothing = given | {"method": "no_unlearning", "path": "None"}
    assert report.command_line(evaluation, nothing).startswith("python evaluate.py --data")


def test_large_images_become_small():
    image = torch.randint(256, (3, 200, 100), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for shown, size in ((image, (32, 64)), (image[:, :8, :6], (6, 8))):
        kind, content = re.fullmatch("data:image/(png|jpeg);base64,(.*)", report._data_uri(shown)).groups()
        found = Image.open(io.BytesIO(base64.b64decode(content)))
        assert found.size == size and (kind == "jpeg" or torch.equal(torch.tensor(np.array(found)), shown.permute(1, 2, 0)))


# Figures of extremes


def drawn(figure) -> str:
    with warnings.catch_warnings(), matplotlib.rc_context(report.PAGE_STYLE):
        warnings.simplefilter("error")
        return report._svg(figure, "x", "words")


@pytest.mark.parametrize("runs", [2, 3, 4, 64, 512])
@pytest.mark.parametrize("epsilon", [[0.0], [50.0], [0.0, 0.2, 6.9, 50.0]])
def test_epsilons_of_any_runs(runs, epsilon):
    figure = report.epsilon_histogram(np.array(epsilon), runs)
    assert sum(bar.get_height() for bar in figure.axes[0].patches) == len(epsilon)
    assert ">beyond</text>" in drawn(figure)


def test_labels_of_epsilon_are_few_and_right():
    figure = report.epsilon_histogram(np.array([0.2, 2.2, 50.0]), 512)
    (scale,) = figure.axes[0].child_axes
    labels = dict(zip(scale.get_xticks(), (label.get_text() for label in scale.get_xticklabels()), strict=True))
    assert labels == {0.25: "1", 2.25: "1/16", 4.25: "1/256", 6.25: "1/4096", 7.25: "0"}


@pytest.mark.parametrize("shift", [[0.0], [0.0, math.inf, -math.inf], [math.nan, 1.0, 2.0]])
@pytest.mark.parametrize("ratio", [0.0, 1.0, math.inf])
@pytest.mark.parametrize("runs", [2, 512])
def test_shifts_and_spreads_of_any_size(shift, ratio, runs):
    table = pd.DataFrame({"shift": shift, "spread_ratio": ratio, "epsilon": 50.0})
    assert "spread, unlearned / retrained" in drawn(report.shift_scatter(table, runs))


def test_many_points_are_a_picture():
    table = pd.DataFrame({"shift": np.linspace(-1, 1, 3000), "spread_ratio": 1.0, "epsilon": 1.0})
    shown = drawn(report.shift_scatter(table, 512))
    assert 'href="data:image/png;base64,' in shown and len(shown) < 100_000


@pytest.mark.parametrize("value", [0.0, 103.6])
def test_confidences_that_are_all_the_same(value):
    side = torch.full((2, 1), value)
    assert ">density</text>" in drawn(report.confidence_histograms({"retrained": side, "unlearned": side}))


def test_a_leaderboard_of_zeros():
    rows = [ceiling_of(0.0) | {"method": "a" * 99, "runs": 2}]
    assert f">{'a' * 12}…{'a' * 9}</text>" in drawn(report.leaderboard(rows, ceiling_of(0.0)))


def test_two_runs_and_their_page(results, data):
    evaluation = evaluation_in(results, data, runs=2)
    add_method(evaluation, "noisy")
    page = report.write_page(evaluation).read_text(encoding="utf-8")
    assert page.count("<svg") == 6 and "These scores are of 2 runs" in page


# In a browser

# Opens the page in frames of some widths; writing into them, unlike loading, is over when the call returns.
PROBE = """<!doctype html><meta charset="utf-8"><title></title><body><script>
const found = WIDTHS.map(width => {
  const frame = document.body.appendChild(document.createElement("iframe")), page = frame.contentDocument;
  frame.style = `border: 0; width: ${width}px`;
  page.open(); page.write(PAGE); page.close();
  const of = query => getComputedStyle(page.querySelector(query));
  return {
    inner: frame.contentWindow.innerWidth, scroll: page.documentElement.scrollWidth, scripts: page.scripts.length,
    names: [...page.querySelectorAll("section h2")].map(title => title.textContent),
    paper: of("body").backgroundColor, ink: of("svg text").fill,
    text: Math.min(...[...page.querySelectorAll("svg text")].map(text => text.getBoundingClientRect().height)),
  };
});
document.title = JSON.stringify(found);
</script>"""


@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_in_a_browser(page, tmp_path, dark):
    """No sideways scrolling at three widths, legible text, the reader's colours, names as text, nothing on the console."""
    widths = (360, 800, 1400)
    probe = PROBE.replace("WIDTHS", str(list(widths))).replace("PAGE", json.dumps(page).replace("<", "\\u003c"))
    (tmp_path / "probe.html").write_text(probe, encoding="utf-8")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", scheme]
    logged = ["--enable-logging=stderr", "--v=0", "--dump-dom", f"file://{tmp_path / 'probe.html'}"]
    ended = subprocess.run([CHROMIUM, *options, *logged], capture_output=True, text=True, timeout=60)
    assert "CONSOLE" not in ended.stderr, ended.stderr
    found = json.loads(html.unescape(re.search("<title>(.*?)</title>", ended.stdout)[1]))
    assert [frame["inner"] for frame in found] == list(widths)
    for frame in found:
        assert frame["scroll"] <= frame["inner"] and frame["scripts"] == 0 and frame["text"] >= 10
        assert {report.printable(name) for name in HOSTILE} <= set(frame["names"])
        paper, ink = (sum(map(int, re.findall(r"\d+", frame[name])[:3])) for name in ("paper", "ink"))
        assert (paper < 150 and ink > 550) if dark else (paper > 700 and ink < 150)
