"""The HTML page: all numbers are recomputed here from the run's files; untrusted text is escaped."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from dataclasses import replace
from decimal import Decimal
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pipeline import rng
from pipeline.data.loading.loader import Loader
from pipeline.data.loading.sampling import whole_image_crops
from pipeline.evaluation.chunks import write_verdicts
from pipeline.evaluation.measures.pgd import Pgd
from pipeline.evaluation.statistics import paired_interval, wilson_interval
from pipeline.models import build_network
from pipeline.models.export import write_model
from pipeline.models.state import layer_counts
from pipeline.recipe.file import dump_recipe, load_recipe
from pipeline.recipe.objective import TECHNIQUES
from pipeline.recipe.stages import stages_of
from pipeline.recipe.technique import Bounding
from pipeline.recipe.threat_model import ThreatModel
from pipeline.report.build import PAGE, build_report
from pipeline.report.charts import accuracy_chart
from pipeline.report.comparison import headline, within_noise
from pipeline.report.examples import Examples, RunExamples, examples
from pipeline.report.history import passes_per_step, read_history, stage_cost
from pipeline.report.pictures import example_cards
from pipeline.report.results import NetworkResult, compare_all, read_runs
from pipeline.report.run_charts import MOST_POINTS, training_charts
from pipeline.robustness.objectives import ObjectiveInput, build_objective
from pipeline.run.files import sha256_of
from tests.support.techniques import usual_objective
from tests.unit.report.test_report import ACCURACY, IMAGES, RECIPE, edit, evaluation, verdicts, write_run

pytestmark = pytest.mark.usefixtures("no_pictures")
STEPS_PER_EPOCH, BATCH = 4, 128
PER_STAGE = {"pretrain": 5, "prune": 2, "finetune": 3, "magnitude": 5}
"""Epochs in the recipe."""


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The PNGs are tested elsewhere."""
    monkeypatch.setattr("pipeline.report.build.draw_accuracy", lambda *_: None)
    monkeypatch.setattr("pipeline.report.build.draw_layers", lambda run, path: None)


class Page(HTMLParser):
    """Tags with their attributes, the text of the body, and rows of table cells."""

    VOID = ("meta", "link", "br", "img")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.open: list[str] = []
        self._drawing = ""
        self.feed(html)
        self.close()
        assert self.open == [], "what is opened is closed"
        self.text = " ".join(self.text.split())
        self.rows = [[" ".join(cell.split()) for cell in row] for row in self.rows]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def row(self, *start: str) -> list[str]:
        (row,) = [row for row in self.rows if row[: len(start)] == list(start)]
        return row


def page_of(runs: list[Path]) -> Page:
    build_report(runs)
    return Page((runs[0] / "report" / PAGE).read_text(encoding="utf-8"))


def write_history(run: Path, rows_per_epoch: int = 2, steps_per_epoch: int = STEPS_PER_EPOCH) -> None:
    """stage.json and metrics.jsonl of every stage of a written run, and its provenance."""
    recipe = load_recipe(run / "recipe.yaml")
    for stage in stages_of(recipe):
        folder = run / stage.name
        folder.mkdir(parents=True, exist_ok=True)
        described = stage.describe(steps_per_epoch) | {"batch_per_step": BATCH}
        (folder / "stage.json").write_text(json.dumps(described))
        count = stage.optimisation.epochs * rows_per_epoch
        rows = []
        for n in range(1, count + 1):
            step = n * steps_per_epoch // rows_per_epoch
            position = {"step": step, "epoch": step / steps_per_epoch}
            seconds_in = {"data": 0.25, "attack": 1.5, "update": 0.5, "checkpoint": 0.25}
            timing = {"images_per_s": 100.0, "seconds": 2.5, "seconds_in": seconds_in}
            images = BATCH * steps_per_epoch // rows_per_epoch
            facts = {"lr": 0.1 * (1 - n / count), "loss": 2.0 / n, "clean_accuracy": None, "robust_accuracy": n / count}
            rows.append({"kind": "train", **position, **facts, "images": images, "timing": timing})
            if n % rows_per_epoch == 0:
                measured = {"clean_accuracy": 0.9, "robust_accuracy": 0.5, "images": 100, "timing": {"seconds": 0.5}}
                rows.append({"kind": "validation", **position, **measured})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    origin = {
        "commit": "c" * 40,
        "command": ["launch", "run", "a b"],
        "host": "node-7",
        "processor": "Processor <9>",
        "cores": 16,
        "gpus": ["NVIDIA H100, driver 550", "NVIDIA H100, driver 550"],
        "versions": {"torch": "2.11.0"},
    }
    (run / "provenance.json").write_text(json.dumps({**origin, "data_sha256": {"data.train_file": "d" * 64}}))


def same_verdicts(run: Path, stage: str, other: str, flipped: int) -> None:
    """Give `stage` the verdicts of `other` with `flipped` images swapped each way: no lead at all."""
    right = verdicts(run, other).copy()
    for value in (True, False):
        right[np.flatnonzero(right == value)[:flipped]] ^= True
    folder = run / stage / "evaluate"
    columns = {"sample_id": np.arange(IMAGES), "clean_correct": right, "robust_correct": right}
    pq.write_table(pa.table(columns), folder / "pgd.parquet")
    model = json.loads((run / stage / "result.json").read_text())["model_sha256"]
    (folder / "pgd.json").write_text(json.dumps(evaluation(right, right, model)))


def test_numbers_intervals_and_differences(tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo")
    page = page_of([run])
    hydra, magnitude = verdicts(run, "keep-0.01/finetune"), verdicts(run, "keep-0.01/magnitude")
    low, high = (100 * bound for bound in wilson_interval(int(hydra.sum()), IMAGES))
    row = page.row("HYDRA", "99 %")
    assert row[3:] == [f"{100 * hydra.mean():.2f} {low:.2f} to {high:.2f}", f"{IMAGES:,}"]
    row = page.row("magnitude, 99 %")
    assert row[1].split()[0] == f"{100 * (hydra.mean() - magnitude.mean()):+.2f}"
    assert row[2] == "HYDRA ahead"
    assert re.match(r"p = \d\.\de-\d\d", row[3])
    assert [int(cell) for cell in row[4:]] == [(hydra & ~magnitude).sum(), (magnitude & ~hydra).sum()]
    assert f"has {100 * hydra.mean():.1f} % robust accuracy (95 % interval {low:.1f} to {high:.1f}); it is" in page.text
    interval = paired_interval(int((hydra & ~magnitude).sum()), int((magnitude & ~hydra).sum()), IMAGES)
    first, last = (f"{100 * bound:+.1f}" for bound in interval)
    lead = f"by {100 * (hydra.mean() - magnitude.mean()):.1f} percentage points"
    lead += f" (95 % interval of the difference {first} to {last}, McNemar's p = "
    assert f"it is significantly ahead of magnitude pruning, {lead}" in page.text
    for text in ("fashion_mnist", "small_cnn", "pgd, 3 steps of 1/20", "linf, eps 1/10", "PGD-20, linf eps 1/10"):
        assert text in page.text


def test_a_difference_within_noise_is_labelled(tmp_path: Path) -> None:
    run = write_run(tmp_path / "even")
    same_verdicts(run, "keep-0.01/magnitude", "keep-0.01/finetune", flipped=20)
    assert re.search(r"^magnitude +99 %.* \+0\.00 +p = 1\.000, within noise$", build_report([run]), re.MULTILINE)
    page = page_of([run])
    assert "its difference of 0.0 percentage points from magnitude pruning is within noise" in page.text
    assert page.row("magnitude, 99 %")[2:4] == ["within noise", "p = 1.000"]
    assert "mark magnitude hollow" in [values.get("class") for tag, values in page.tags if tag == "g"]


def test_curves_have_hollow_marks_within_noise(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"seed{seed}", seed) for seed in range(2)]
    same_verdicts(runs[1], "keep-0.01/magnitude", "keep-0.01/finetune", flipped=20)
    read = read_runs(runs)
    comparisons = compare_all(read)
    root = ET.fromstring(accuracy_chart(read, comparisons, "robust").svg())
    marks = {
        (keep, i): f"{100 * verdicts(runs[i], f'keep-{keep}/magnitude').mean():.2f} % ["
        for keep in ("0.1", "0.01")
        for i in range(2)
    }
    near = {(str(keep), i) for (i, _, keep), test in comparisons.items() if test is not None and within_noise(test)}
    assert ("0.01", 1) in near
    assert ("0.01", 0) not in near
    for kind, expected in (("mark magnitude hollow", near), ("mark magnitude", marks.keys() - near)):
        (group,) = [g for g in root if g.get("class") == kind]
        notes = [title.text or "" for title in group.iter("title")]
        assert len(notes) == len(expected)
        assert all(any(marks[one] in note for note in notes) for one in expected)
        assert all(note.endswith(", within noise of HYDRA") == ("hollow" in kind) for note in notes)
        assert f"fill:var(--{'card' if 'hollow' in kind else 'magnitude'})" in group.attrib["style"]
        assert "opacity:0.6" in group.attrib["style"], "marks of several seeds are faint"
    assert re.search(r"% at 99 % pruned, within noise of HYDRA in 1 of 2 seeds", root.attrib["aria-label"])
    clean = ET.fromstring(accuracy_chart(read, comparisons, "clean").svg())
    assert not [g for g in clean if "hollow" in (g.get("class") or "")]


def test_hydra_behind_a_baseline_is_labelled(tmp_path: Path) -> None:
    run = write_run(tmp_path / "behind")
    for name in ("pgd.json", "pgd.parquet"):
        first, second = (run / "keep-0.01" / stage / "evaluate" / name for stage in ("finetune", "magnitude"))
        worse, better = second.read_bytes(), first.read_bytes()
        first.write_bytes(worse)
        second.write_bytes(better)
    for stage in ("finetune", "magnitude"):
        edit(
            run / "keep-0.01" / stage / "evaluate" / "pgd.json",
            lambda values, stage=stage: values.update(model_sha256=f"keep-0.01/{stage}-0"),
        )
    page = page_of([run])
    assert re.search(r"it is significantly behind magnitude pruning, by \d\.\d percentage points", page.text)
    (row,) = [row for row in page.rows if "HYDRA behind" in row]
    assert row[1].startswith("\N{MINUS SIGN}")


def test_every_seed_is_compared(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"seed{seed}", seed) for seed in range(3)]
    same_verdicts(runs[2], "keep-0.01/magnitude", "keep-0.01/finetune", flipped=20)
    page = page_of(runs)
    values = [100 * verdicts(run, "keep-0.01/finetune").mean() for run in runs]
    assert f"{np.mean(values):.1f} % robust accuracy on average over 3 seeds" in page.text
    assert f"({min(values):.1f} to {max(values):.1f})" in page.text
    assert "significantly ahead in 2, within noise in 1 of 3 seeds" in page.text
    span = [f"{np.mean(values):.2f} {min(values):.2f} to {max(values):.2f}", "3 of 3"]
    assert page.row("HYDRA", "99 %")[3:] == span
    assert [len([r for r in page.rows if r and r[0].endswith(f" seed{seed}")]) for seed in range(3)] == [5 + 2] * 3


def test_a_missing_seed_is_counted(tmp_path: Path) -> None:
    page = page_of([write_run(tmp_path / "a", 0), write_run(tmp_path / "b", 1, stages=["pretrain"])])
    assert page.row("HYDRA", "99 %")[-1] == "1 of 2"
    assert page.row("dense", "0 %")[-1] == "2 of 2"
    assert page.row("magnitude b", "99 %", "missing: not evaluated yet")
    assert page.row("magnitude, 99 % b", "missing: one of the two networks is not evaluated yet")


def test_a_run_that_has_just_started(tmp_path: Path) -> None:
    page = page_of([write_run(tmp_path / "new", stages=[])])
    for text in (
        "No pruned network is evaluated yet.",
        "Not available: no pruned network is finished.",
        "No metrics yet.",
        "No pruned network is finished yet.",
        "no stage has started",
        "provenance.jsonmissing",
    ):
        assert text in page.text
    assert page.row("HYDRA", "99 %")[-1] == "missing: not evaluated yet"


def test_without_a_baseline_nothing_is_compared(tmp_path: Path) -> None:
    alone = ("sparsity.baselines=[]",)
    run = write_run(tmp_path / "alone", stages=["pretrain", "keep-0.1/finetune"], overrides=alone)
    page = page_of([run])
    assert "With 90 % of its connections pruned" in page.text
    assert "there is no baseline at this sparsity" in page.text
    assert "McNemar" not in page.text


class Requests(Page):
    """URLs that a browser would fetch, and tags that it would run."""

    @property
    def fetched(self) -> list[str]:
        names = ("src", "href", "srcset", "data", "action", "xlink:href", "poster", "formaction")
        urls = [values[name] or "" for _, values in self.tags for name in names if name in values]
        return [url for url in urls if not url.startswith(("data:", "#"))]

    @property
    def runs(self) -> list[str]:
        tags = [tag for tag, _ in self.tags if tag in ("script", "iframe", "object", "embed", "base", "form")]
        return tags + [name for _, values in self.tags for name in values if name.startswith("on")]


STRANGE = '"><script>alert(1)<img src=x onerror=alert(1)>&amp;'


def test_untrusted_names_are_escaped(tmp_path: Path) -> None:
    run = write_run(tmp_path / STRANGE)
    write_history(run)
    edit(run / "provenance.json", lambda values: values.update(processor=f"{STRANGE}\u202e", commit=STRANGE))
    for stage in ACCURACY:
        edit(run / stage / "result.json", lambda values: values["layers"][0].update(name=STRANGE))
    check = {"name": STRANGE, "verdict": "warn", "figure": STRANGE, "meaning": STRANGE}
    checked = {"model_sha256": "keep-0.1/finetune-0", "checks": [check]}
    (run / "keep-0.1" / "finetune" / "honesty.json").write_text(json.dumps(checked))
    build_report([run])
    html = (run / "report" / PAGE).read_text(encoding="utf-8")
    page = Requests(html)
    assert page.fetched == page.runs == []
    assert "<script" not in html.lower()
    assert page.text.count(STRANGE) >= 10
    assert (page.text.count("\\u202e"), html.count("\u202e")) == (1, 0), "it would turn the text around"
    assert page.row(f"warn{STRANGE}") == [f"warn{STRANGE}", f"{STRANGE}{STRANGE}"]


def test_the_page_makes_no_requests(tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo")
    write_history(run)
    build_report([run])
    html = (run / "report" / PAGE).read_text(encoding="utf-8")
    page = Requests(html)
    assert page.fetched == page.runs == []
    assert not re.search(r"https?:|@import|url\(", html)
    policy = {
        "http-equiv": "Content-Security-Policy",
        "content": "default-src 'none'; style-src 'unsafe-inline'; img-src data:",
    }
    assert ("meta", policy) in page.tags
    assert Requests('<a href="x"><img src="//y"></a>').fetched == ["x", "//y"], "requests are detected"


def test_headers_have_scopes_and_charts_have_text_alternatives(tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo")
    write_history(run)
    page = page_of([run])
    assert {values.get("scope") for tag, values in page.tags if tag == "th"} <= {"col", "row", "rowgroup"}
    drawings = [values for tag, values in page.tags if tag == "svg"]
    assert len(drawings) > 10
    for values in drawings:
        assert "aria-hidden" in values or (values["role"] == "img" and len(values["aria-label"] or "") > 20)
    ids = [values["id"] for _, values in page.tags if "id" in values]
    assert len(set(ids)) == len(ids)
    linked = {(values["href"] or "")[1:] for tag, values in page.tags if tag == "a"}
    assert linked <= set(ids)
    assert len(linked) == 7


def heights(path: ET.Element) -> list[float]:
    return [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", path.attrib["d"])]


def axis_of(root: ET.Element) -> Any:
    """Map from y in SVG units to value, read off the chart's own grid and tick labels."""
    lines = [float(heights(path)[0]) for path in root.iter("path") if "var(--line)" in path.get("style", "")]
    numbers = [float(t.text or "") for t in root if t.tag == "text" and "text-anchor:end" in t.get("style", "")]
    ticks = list(zip(lines, numbers, strict=True))
    (y0, first), (y1, last) = ticks[0], ticks[-1]
    return lambda y: first + (y - y0) * (last - first) / (y1 - y0)


def test_markers_and_intervals_are_at_their_values(tmp_path: Path) -> None:
    runs = read_runs([write_run(tmp_path / "demo")])
    root = ET.fromstring(accuracy_chart(runs, {}, "robust").svg())
    value_at = axis_of(root)
    groups = {kind: [g for g in root if g.get("class") == kind] for kind in {g.get("class") for g in root}}
    for name in ("HYDRA", "magnitude"):
        (marks,) = groups[f"mark {name.lower()}"]
        bars = [path for group in groups[f"interval {name.lower()}"] for path in group.findall("path")]
        assert len(bars) == 2
        for keep, mark, bar in zip((0.1, 0.01), marks.findall("use"), bars, strict=True):
            network = next(n for n in runs[0].networks if (n.name, float(n.keep_fraction)) == (name, keep))
            assert network.evaluation is not None
            true = network.evaluation.robust_accuracy
            assert f"{100 * true.value:.2f} % [" in "".join(mark.itertext())
            assert value_at(float(mark.attrib["y"])) == pytest.approx(100 * true.value, abs=0.1)
            assert value_at(max(heights(bar))) == pytest.approx(100 * true.low, abs=0.1)
            assert value_at(min(heights(bar))) == pytest.approx(100 * true.high, abs=0.1)
    ((level,),) = groups["line dense"]
    assert value_at(heights(level)[0]) == pytest.approx(100 * verdicts(runs[0].folder, "pretrain").mean(), abs=0.1)


def test_training_curves_are_complete_and_averaged(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "long")
    write_history(folder, rows_per_epoch=400, steps_per_epoch=400)
    (run,) = read_runs([folder])
    charts = training_charts(run, read_history(run), run.recipe.sparsity.keep_fractions[0])
    assert [chart.title.removesuffix(", %") for chart in charts] == [
        "Loss",
        "Robust accuracy",
        "Clean accuracy",
        "Learning rate",
    ]
    root = ET.fromstring(charts[1].svg())
    lines = [heights(path) for group in root if (group.get("class") or "").startswith("line ") for path in group]
    assert len(lines) == 2 * 4
    assert max(map(len, lines)) <= MOST_POINTS
    value_at, longest = axis_of(root), lines[0]
    assert len(longest) > MOST_POINTS / 2
    # Rows rise evenly from 0 to 100 %, and so do their means.
    assert [value_at(y) for y in longest] == pytest.approx(np.linspace(0.25, 99.75, len(longest)).tolist(), abs=0.6)
    assert "keep-0.1/prune" in root.attrib["aria-label"]
    assert "keep-0.01" not in root.attrib["aria-label"]


def test_costs_are_the_sums_of_the_rows(tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo")
    write_history(run)
    page = page_of([run])
    for stage, epochs in PER_STAGE.items():
        name = stage if stage == "pretrain" else f"keep-0.1/{stage}"
        row = page.row(name, "trained" if stage != "prune" else "in progress")
        # PGD-3: three attack passes and one update pass; 2 rows of 2.5 s and 0.5 s on held-out images per epoch.
        seconds = [f"{5 * epochs:.1f} s", f"{0.5 * epochs:.1f} s"]
        assert row[2:] == [str(epochs), str(4 * epochs), f"{4 * epochs:.1f}", *seconds, f"{256 / 2.5:.0f}", row[-1]]
    assert page.row("Total")[2:5] == ["25", "100", "100.0"]
    assert (
        sum(int(row[-1].removesuffix(" %")) for row in page.rows if row[1:2] in (["trained"], ["in progress"])) == 100
    )


def test_breakdown_of_training_time(tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo")
    write_history(run)
    slow = run / "pretrain" / "metrics.jsonl"  # waits for its images
    slow.write_text(slow.read_text().replace('"data": 0.25', '"data": 2.5'))
    older = run / "keep-0.1" / "finetune" / "metrics.jsonl"  # its rows have no breakdown
    rows = [json.loads(line) for line in older.read_text().splitlines()]
    for row in rows:
        row["timing"].pop("seconds_in", None)
    older.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = page_of([run])
    assert page.row("pretrain", "31.6 %") == ["pretrain", "31.6 %", "52.6 %", "10.5 %", "5.3 %"]
    assert page.row("keep-0.1/prune", "60.0 %")[1:] == ["60.0 %", "10.0 %", "20.0 %", "10.0 %"]
    assert page.row("keep-0.1/finetune", "\u2013")[1:] == ["\u2013"] * 4
    assert page.row("All stages")[1] == f"{100 * 44 * 1.5 / (10 * 4.75 + 34 * 2.5):.1f} %"


class Counting(nn.Module):
    """A network that counts the images in its forward and backward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 4 * 4, 5)
        self.passes = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.layer(x.flatten(1))
        if logits.requires_grad:
            logits.register_hook(self.count)
        return logits

    def count(self, gradient: torch.Tensor) -> None:
        self.passes += len(gradient)


@pytest.mark.parametrize(
    ("name", "level"),
    [
        *((n, 0) for n in ("clean", "pgd", "fgsm", "nfgsm", "fgsm_pgi", "free", "trades")),
        *((n, 0) for n in ("noise", "stability", "smoothadv")),
        ("fgsm", 2),
    ],
)
def test_pass_counts_match_the_objective(name: str, level: int) -> None:
    objective = usual_objective(name)
    threat_model = ThreatModel.model_validate({"norm": "l2" if name == "smoothadv" else "linf", "eps": "1/10"})
    network, x = Counting(), torch.rand(6, 3, 4, 4)
    noise = torch.from_numpy(rng.sample_keys(np.arange(6), 0, "attack").view(np.int64))
    given = ObjectiveInput(network, network, x, torch.arange(6) % 5, noise, noise=torch.zeros_like(x))
    outcome = build_objective(objective, threat_model, "pretrain", level)(given)
    outcome.loss.backward()
    assert passes_per_step(objective, level) == network.passes / 6


def test_bounds_do_not_count_as_passes() -> None:
    bounding = [name for name, technique in TECHNIQUES.items() if issubclass(technique, Bounding)]
    assert bounding == ["ibp", "crown_ibp", "mixtrain"]
    assert [passes_per_step(usual_objective(name)) for name in bounding] == [None] * 3


def test_a_strengthened_attack_costs_more(tmp_path: Path) -> None:
    guarded = ("objective={name: fgsm, step_size: 1/10}", "evaluation.validation_steps=3")
    folder = write_run(tmp_path / "guarded", overrides=guarded)
    write_history(folder)
    rows = [json.loads(line) for line in (folder / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row["attack_level"] = int(row["epoch"] > 3)  # of five epochs the last two, with PGD of two steps
    (folder / "pretrain" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run,) = read_runs([folder])
    first = read_history(run)[0]
    assert stage_cost(first).pass_epochs == pytest.approx(3 * 2 + 2 * 3)


def test_s2ap_costs_another_update(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "sharp", overrides=("sparsity.baselines=[s2ap]",))
    write_history(folder)
    (run,) = read_runs([folder])
    (hydra,) = (history for history in read_history(run) if history.stage.name == "keep-0.1/prune")
    sharp = replace(next(stage for stage in stages_of(run.recipe) if stage.name == "keep-0.1/s2ap/prune"), name="any")
    epochs = PER_STAGE["prune"]
    assert stage_cost(hydra).pass_epochs == pytest.approx(4 * epochs)
    assert stage_cost(replace(hydra, stage=sharp)).pass_epochs == pytest.approx(5 * epochs)


def test_provenance_parents_and_recipe(tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo")
    write_history(run)
    page = page_of([run])
    for text in ("c" * 40, "torch 2.11.0", "d" * 64, "Processor <9>", "550; NVIDIA"):
        assert text in page.text
    assert (
        page.row("keep-0.1/finetune", "keep-0.1/prune")[3] == "keep-0.1/fin"
    )  # the first 12 characters of the model's hash
    assert "step_size: 1/20" in page.text
    assert " ".join(dump_recipe(load_recipe(RECIPE)).removesuffix("slurm: null\n").split()) in page.text
    for hidden in ("launch run", "node-7", "slurm"):
        assert hidden not in page.text


def test_an_unknown_commit_is_labelled(tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo")
    write_history(run)
    edit(run / "provenance.json", lambda values: values.update(commit=None))
    assert "unknown: not run from a git checkout" in page_of([run]).text


def test_networks_with_equal_layers_share_a_column(tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo")
    page = page_of([run])
    head = next(row for row in page.rows if row[:2] == ["#", "Layer"])
    assert head[3:] == ["90 % prunedHYDRA, magnitude", "99 % prunedHYDRA, magnitude"]
    assert page.row("2", "conv2.weight")[2:] == ["18,432", "1,844 10 %", "185 1 %"]
    edit(run / "keep-0.01" / "magnitude" / "result.json", lambda values: values["layers"][1].update(kept=92))
    page = page_of([run])
    assert page.row("2", "conv2.weight")[3:] == ["1,844 10 %", "185 1 %", "92 0.499 %"]


def test_honesty_checks_are_shown_if_present(tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo")
    assert "Honesty" not in page_of([run]).text
    path = run / "keep-0.01" / "finetune" / "honesty.json"
    good = {"name": "more steps", "verdict": "pass", "figure": "0.3 points", "meaning": "PGD-100 helps little"}
    checks = [good, good | {"name": "large eps", "verdict": "warn"}]
    path.write_text(json.dumps({"model_sha256": "of the network before", "checks": checks}))
    assert "Honesty" not in page_of([run]).text
    path.write_text(json.dumps({"model_sha256": "keep-0.01/finetune-0", "checks": checks}))
    page = page_of([run])
    assert page.row("passmore steps") == ["passmore steps", "0.3 points"]
    assert page.row("warnlarge eps") == ["warnlarge eps", "0.3 pointsPGD-100 helps little"]
    assert len([row for row in page.rows if row == ["HYDRA, 99 % pruned"]]) == 2
    assert "1 checks pass" in page.text
    html = (run / "report" / PAGE).read_text(encoding="utf-8")
    section = html[html.index('id="honesty"') : html.index("</section>", html.index('id="honesty"'))]
    assert section.index("large eps") < section.index("<details>") < section.index("more steps"), "passes are folded"
    for broken, message in (
        ({"checks": [good | {"verdict": "fine"}]}, "'fine' is neither pass nor warn"),
        ({"checks": [{"name": "x"}]}, "lacks one of name, verdict"),
        ([], "no list of checks"),
    ):
        path.write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=message) as caught:
            build_report([run])
        assert str(path) in str(caught.value)


def test_the_page_is_replaced_atomically(tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo", stages=["pretrain"])
    assert "No pruned network" in page_of([run]).text
    for stage in ("keep-0.1/finetune", "keep-0.1/magnitude"):
        source = write_run(tmp_path / stage.replace("/", "-"), stages=[stage]) / stage
        (run / stage).parent.mkdir(exist_ok=True)
        source.rename(run / stage)
    assert "With 90 % of its connections pruned" in page_of([run]).text
    assert {path.name for path in (run / "report").iterdir()} == {
        PAGE,
        *("robust_accuracy.csv", "kept_fraction.csv", "per_class_accuracy.csv", "confusion.csv"),
    }


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (5, 0), (12, 4), (30, 30)])
def test_paired_interval_is_symmetric_and_contains_the_difference(only_first: int, only_second: int) -> None:
    low, high = paired_interval(only_first, only_second, 200)
    mirrored = paired_interval(only_second, only_first, 200)
    assert (low, high) == pytest.approx((-mirrored[1], -mirrored[0]))
    assert -1 <= low < (only_first - only_second) / 200 < high <= 1


@pytest.mark.parametrize(("first", "second"), [(0.05, 0.05), (0.3, 0.1), (0.02, 0.2)])
def test_paired_interval_has_its_nominal_coverage(first: float, second: float) -> None:
    """Exact, over all outcomes of 60 images: each is correct for only one network, only the other, or neither."""
    total, covered, whole = 60, 0.0, 0.0
    rest = 1 - first - second
    for a, b in itertools.product(range(total + 1), repeat=2):
        if a + b > total:
            continue
        ways = math.comb(total, a) * math.comb(total - a, b)
        chance = ways * first**a * second**b * rest ** (total - a - b)
        low, high = paired_interval(a, b, total)
        covered += chance * (low <= first - second <= high)
        whole += chance
    assert whole == pytest.approx(1)
    assert 0.94 < covered < 0.99


@pytest.mark.parametrize("counts", [(-1, 0, 10), (6, 5, 10), (0, 0, 0)])
def test_paired_interval_refuses_invalid_counts(counts: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="not counts of discordant images"):
        paired_interval(*counts)


def attack(eps: str | None = "1/10") -> Pgd:
    threat_model = ThreatModel.model_validate({"norm": "linf", "eps": eps}) if eps else None
    return Pgd(threat_model, steps=5, step_size=0.04, restarts=1, seed=3)


def images(network: nn.Module, count: int = 4) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Images of the classes that the network assigns them to."""
    x = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return x, network(x).argmax(dim=1), np.arange(10, 10 + count)


def test_examples_are_in_the_ball_with_their_predictions() -> None:
    torch.manual_seed(0)
    network = Counting()
    x, y, ids = images(network)
    batch = examples(network, x, y, ids, attack())
    assert batch is not None
    assert batch.clean == pytest.approx(x.numpy())
    assert np.abs(batch.adversarial - batch.clean).max() == pytest.approx(0.1, abs=1e-6)
    assert batch.adversarial.min() >= 0
    assert batch.adversarial.max() <= 1
    for pictures, classes, shares in (
        (batch.clean, batch.clean_prediction, batch.clean_confidence),
        (batch.adversarial, batch.adversarial_prediction, batch.adversarial_confidence),
    ):
        shown = network(torch.from_numpy(pictures)).softmax(dim=1)
        assert classes.tolist() == shown.argmax(dim=1).tolist()
        assert shares == pytest.approx(shown.amax(dim=1).detach().numpy(), abs=1e-6)
    losses = [F.cross_entropy(network(torch.from_numpy(p)), y) for p in (batch.clean, batch.adversarial)]
    assert losses[1] > losses[0]
    verdicts = attack().verdicts(network, x, y, ids)["robust_correct"]
    stays = (batch.clean_prediction == batch.labels) & (batch.adversarial_prediction == batch.labels)
    assert stays.tolist() == verdicts.tolist(), "the same attack as the evaluation's"


def test_examples_stop_in_time_and_need_a_threat_model() -> None:
    network = Counting()
    x, y, ids = images(network)
    one, unchanged = examples(network, x, y, ids, attack(), most_s=0.0), examples(network, x, y, ids, attack(None))
    assert one is not None
    assert unchanged is not None
    assert one.ids.tolist() == [10]
    assert unchanged.adversarial == pytest.approx(x.numpy())


def test_examples_are_of_images_that_were_right_before() -> None:
    network = Counting()
    x, y, ids = images(network, 6)
    wrong = torch.tensor([True, False, True, False, False, False])
    batch = examples(network, x, torch.where(wrong, (y + 1) % 5, y), ids, attack(), count=3)
    assert batch is not None
    assert batch.ids.tolist() == [11, 13, 14]
    assert batch.clean_prediction.tolist() == batch.labels.tolist()
    assert examples(network, x, (y + 1) % 5, ids, attack()) is None


def predictions_on(path: Path, network: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and what the network answers, of all images of a file."""
    with Loader(path, image_size=28, threads=1, compiled=False) as loader:
        ids = np.arange(loader.num_samples)
        x, y = loader.read(ids, whole_image_crops(loader.heights, loader.widths)).to(torch.device("cpu"))
    with torch.no_grad():
        return y.numpy(), network.eval()(x).argmax(dim=1).numpy()


@pytest.mark.slow
def test_examples_are_on_the_page(tmp_path: Path, fashion_data: Path) -> None:
    test_file = tmp_path / "test.beton"
    for name in ("test.beton", "test.beton.manifest.json"):
        shutil.copy(fashion_data / name, tmp_path)
    overrides = (f"data.test_file={test_file}", "evaluation.steps=2")
    run = write_run(tmp_path / "demo", overrides=overrides)
    assert "Not available: no pruned network is finished" in page_of([run]).text
    recipe = load_recipe(run / "recipe.yaml")
    network = build_network(recipe.model, 0, recipe.data.image_size)
    model = run / "keep-0.01/finetune/model.safetensors"
    write_model(model, network.backbone.state_dict(), recipe.model, {"image_size": 28})
    facts = {"model_sha256": sha256_of(model)}
    edit(run / "keep-0.01/finetune/evaluate/pgd.json", lambda values: values.update(facts))
    edit(run / "keep-0.01/finetune/result.json", lambda values: values.update(facts))
    for stage in ACCURACY:
        edit(run / stage / "result.json", lambda values: values.update(layers=layer_counts(network)))
    assert "the test file has changed since the evaluation" in page_of([run]).text
    sha256 = json.loads((tmp_path / "test.beton.manifest.json").read_text())["sha256"]
    for stage in ACCURACY:
        edit(run / stage / "evaluate" / "pgd.json", lambda values: values.update(data_sha256=sha256))
    labels, predictions = predictions_on(test_file, network)
    right = predictions == labels
    assert 8 <= right.sum() < len(labels) / 2, "most images are wrong, and are not shown"
    columns = {"label": labels, "clean_prediction": predictions, "clean_correct": right, "robust_correct": right}
    counts = {
        key: value
        for key, value in evaluation(right, right, "").items()
        if key == "images" or key.startswith(("clean", "robust"))
    }
    for stage in ACCURACY:
        path = run / stage / "evaluate" / "pgd.parquet"
        write_verdicts(path, {"sample_id": np.arange(len(right)), **columns})
        edit(path.with_suffix(".json"), lambda values: values.update(counts))
    page = page_of([run])
    titles = [values["alt"] or "" for tag, values in page.tags if tag == "img"]
    shown = [int(title.split()[2].rstrip(",")) for title in titles if title.startswith("Test image")]
    assert set(shown) <= set(np.flatnonzero(right).tolist())
    assert shown == sorted(shown)
    assert shown[0] < len(right) / 4 < len(right) / 2 < shown[-1], "spread over the file"
    pictures = [values for tag, values in page.tags if tag == "img"]
    assert len(pictures) == 3 * 8
    assert all((values["src"] or "").startswith("data:image/png;base64,") and values["alt"] for values in pictures)
    assert "HYDRA, 99 % pruned, run demo, under PGD-2, linf eps 1/10" in page.text
    assert page.text.count("largest change of a pixel: 25.5/255") == 8
    test_file.unlink()
    assert "the test file is not on this machine" in page_of([run]).text


def test_large_images_are_compressed() -> None:
    noise = np.random.default_rng(0).random((1, 3, 224, 224), np.float32)
    one, sure = np.zeros(1, np.int64), np.ones(1, np.float32)
    network = NetworkResult(Path(), "keep-0.1/finetune", "HYDRA", Decimal("0.1"), None, ())
    batch = Examples(one, one, noise, np.clip(noise + 0.01, 0, 1), one, one, sure, sure)
    (card,) = example_cards(RunExamples(network, "PGD", [STRANGE], batch))
    assert card["clean"].startswith("data:image/jpeg")
    assert len(card["clean"]) < 150_000
    assert card["verdict"] == "robust"


def test_headline_is_about_the_sparsest_evaluated_network(tmp_path: Path) -> None:
    runs = read_runs([write_run(tmp_path / "half", stages=["pretrain", "keep-0.1/finetune"])])
    assert headline(runs, []).startswith("With 90 % of its connections pruned")
    sparsity = runs[0].recipe.sparsity.model_copy(update={"structure": "channel"})
    of_channels = replace(runs[0], recipe=runs[0].recipe.model_copy(update={"sparsity": sparsity}))
    assert headline([of_channels], []).startswith("With 90 % of its multiply-accumulates pruned")
