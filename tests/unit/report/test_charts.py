"""Charts: one colour, marker and line per method, reproducible files, escaped names."""

from __future__ import annotations

import itertools
import math
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any, get_args
from xml.etree import ElementTree as ET

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.colors import same_color, to_rgb
from matplotlib.figure import Figure
from matplotlib.markers import MarkerStyle

from pipeline.recipe.methods import TITLES, Allocation, Method, Structure
from pipeline.report.chart_style import Chart, drawing, legend_key, method_colours, plot_line
from pipeline.report.charts import (
    MOST_NUMBERS,
    accuracy_chart,
    accuracy_figure,
    certified_charts,
    difference_chart,
    draw_accuracy,
)
from pipeline.report.comparison import differences
from pipeline.report.history import read_history
from pipeline.report.method_style import METHODS, css_name
from pipeline.report.results import RunResult, certified_curves, compare_all, read_runs
from pipeline.report.run_charts import draw_layers, layer_chart, training_charts
from pipeline.run.records import KeptCount
from tests.unit.report.test_page import write_history
from tests.unit.report.test_report import ACCURACY, OTHERS, edit, png_size, write_run

STRANGE = "a$b^{c}<script>&$\"]'"
EVERY = ("sparsity.baselines=[snip, random, magnitude]",)
DRAWN = ("dense", "HYDRA", "magnitude", "random", "SNIP")
"""The networks of `run`."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """With several baselines, and an untrusted layer name."""
    folder = write_run(tmp_path_factory.mktemp("charts") / STRANGE, 0, [*ACCURACY, *OTHERS], overrides=EVERY)
    write_history(folder)
    for stage in [*ACCURACY, *OTHERS]:
        edit(folder / stage / "result.json", lambda values: values["layers"][0].update(name=STRANGE))
    (run,) = read_runs([folder])
    return run


def charts_of(run: RunResult) -> list[Chart]:
    comparisons, histories = compare_all([run]), read_history(run)
    charts: list[Chart | None] = [
        accuracy_chart([run], comparisons, "robust"),
        accuracy_chart([run], comparisons, "clean"),
    ]
    charts.append(difference_chart(differences([run], comparisons), [run]))
    for keep in run.recipe.sparsity.keep_fractions:
        charts += [*training_charts(run, histories, keep), layer_chart(run, keep)]
    return [chart for chart in charts if chart is not None]


def test_every_method_has_a_distinct_colour_marker_and_line() -> None:
    styles = {name: METHODS[name] for name in ("dense", *TITLES.values())}
    for values in zip(*styles.values(), strict=True):
        if not isinstance(values[0], float):
            assert len(set(values)) == len(styles), "methods differ in colour, and in marker and line without colour"


def test_allocations_and_structures_have_the_colour_and_line_of_their_method_and_a_marker_of_their_own() -> None:
    choices = itertools.product(TITLES, (None, *get_args(Allocation)), (None, *get_args(Structure)))
    for name, allocation, structure in choices:
        own, style = METHODS[TITLES[name]], METHODS[Method(name=name, allocation=allocation, structure=structure).title]
        assert (style.colour, style.dark, style.dashes) == (own.colour, own.dark, own.dashes)
        if style.mark:
            MarkerStyle(style.mark)  # it is one
    assert len({(style.mark, style.dashes) for style in METHODS.values()}) == len(METHODS), "distinct in greyscale"
    assert len({css_name(name) for name in METHODS}) == len(METHODS) == 2 + 8 * 6 * 9, (
        "dense, and files of an unknown method"
    )


def test_png_and_page_share_colours_markers_and_lines(run: RunResult) -> None:
    comparisons = compare_all([run])
    figure = accuracy_figure([run], comparisons)
    root = ET.fromstring(accuracy_chart([run], comparisons, "robust").svg())
    for name, method in {name: METHODS[name] for name in DRAWN}.items():
        (line,) = [line for line in figure.axes[0].lines if line.get_gid() == f'["line {name.lower()}"]']
        assert same_color(line.get_color(), method.colour)
        ((drawn,),) = [group for group in root if group.get("class") == f"line {name.lower()}"]
        assert f"stroke:var(--{name.lower()})" in drawn.attrib["style"]
        assert ("stroke-dasharray" in drawn.attrib["style"]) == (method.dashes != "-")
        light, dark = re.findall(rf"--{name.lower()}: (#[0-9a-f]+);", method_colours())
        assert (light, dark) == (method.colour, method.dark)


VISIONS = (
    ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
)
"""Of linear RGB: full, and red-, green- and blue-blind (Machado, Oliveira and Fernandes, 2009)."""
LMS = ((0.412221, 0.536333, 0.051446), (0.211904, 0.680700, 0.107397), (0.088302, 0.281719, 0.629979))
LAB = (
    (0.21045426, 0.79361779, -0.00407205),
    (1.97799850, -2.42859221, 0.45059371),
    (0.02590404, 0.78277177, -0.80867577),
)
"""OKLab, a perceptually uniform space (Ottosson, 2020): linear RGB to cones, and their cube roots to Lab."""


@pytest.mark.parametrize("part", ["colour", "dark"])
@pytest.mark.parametrize("vision", VISIONS, ids=["all", "protan", "deutan", "tritan"])
def test_colours_differ_for_any_colour_vision(part: str, vision: tuple[tuple[float, ...], ...]) -> None:
    """Okabe and Ito's own palette has a least distance of 0.076."""
    labs = []
    for method in (METHODS[name] for name in ("dense", *TITLES.values())):
        values = np.asarray(to_rgb(getattr(method, part)))
        linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
        seen = np.clip(np.asarray(vision) @ linear, 0, 1)
        labs.append(np.asarray(LAB) @ np.cbrt(np.asarray(LMS) @ seen))
    assert min(math.dist(a, b) for a, b in itertools.combinations(labs, 2)) > 0.055


def test_untrusted_names_are_escaped(run: RunResult, tmp_path: Path) -> None:
    keep = run.recipe.sparsity.keep_fractions[0]
    chart = layer_chart(run, keep)
    assert chart is not None
    svg = chart.svg()
    assert "<script" not in svg
    notes = [title.text for title in ET.fromstring(svg).iter("title")]
    assert notes.count(f"{STRANGE}: 44 of 432") == 4, "one for each network"
    named = layer_chart(run, keep, named=True)
    assert named is not None
    assert STRANGE in [text.text for text in ET.fromstring(named.svg()).iter("text")], "no formula is made of it"
    draw_layers(run, tmp_path / "layers.png")
    assert png_size(tmp_path / "layers.png")[0] >= 1200


def test_charts_share_no_ids_and_make_no_requests(run: RunResult) -> None:
    drawings = [chart.svg() for chart in charts_of(run)]
    drawings += [legend_key(name, place) for name in ("dense", *TITLES.values()) for place in ("results", "layers")]
    drawings += [legend_key("HYDRA", "results", held_out=True)]
    assert len(drawings) == 3 + 2 * 5 + 2 * (1 + len(TITLES)) + 1
    roots = [ET.fromstring(svg) for svg in drawings]
    ids = [element.attrib["id"] for root in roots for element in root.iter() if "id" in element.attrib]
    assert len(set(ids)) == len(ids) > 50
    for root, svg in zip(roots, drawings, strict=True):
        mine = {element.get("id") for element in root.iter()}
        links = [element.attrib["href"] for element in root.iter() if "href" in element.attrib]
        assert {link.removeprefix("#") for link in links} <= mine
        assert not re.search(r"https?:|url\(|<style|font-family|#[0-9a-f]{6};|nan", svg)


def test_charts_are_reproducible_whatever_the_matplotlibrc(run: RunResult, tmp_path: Path) -> None:
    chart, other = charts_of(run)[0], charts_of(run)[0]
    draw_accuracy([run], compare_all([run]), tmp_path / "first.png")
    first = chart.svg()
    mine: dict[Any, Any] = {"axes.edgecolor": "red", "svg.fonttype": "path", "font.size": 30.0, "lines.linewidth": 9.0}
    with matplotlib.rc_context(mine):
        assert other.svg() == chart.svg() == first
        draw_accuracy([run], compare_all([run]), tmp_path / "second.png")
        assert {key: matplotlib.rcParams[key] for key in mine} == mine, "and they stay as they are"
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()


def test_threads_may_draw_concurrently(run: RunResult) -> None:
    charts = charts_of(run)[:4]
    expected = [chart.svg() for chart in charts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(Chart.svg, charts * 2)) == expected * 2


def test_certified_curves_have_bands_and_the_eps_of_the_threat_model(tmp_path: Path) -> None:
    smoothed = ("objective={name: noise, sigma: 1/4}", "threat_model={norm: l2, eps: 1/4}", "evaluation.attacks=[]")
    runs = read_runs([write_run(tmp_path / "smoothed", measure="certified", overrides=smoothed)])
    charts = certified_charts(runs, certified_curves(runs))
    assert [chart.title for chart in charts] == [f"Certified accuracy, %, {p} % pruned" for p in (90, 99)]
    root = ET.fromstring(charts[0].svg())
    lines = [group.get("class") for group in root if (group.get("class") or "").startswith("line ")]
    assert lines == ["line dense", "line hydra", "line magnitude"]
    assert "eps 1/4" in [text.text for text in root.iter("text")]
    bands = [use for use in root.findall("use") if "opacity:0.14" in use.attrib["style"]]
    assert len(bands) == 3


def test_a_loss_that_is_not_finite_leaves_a_gap(run: RunResult) -> None:
    histories = read_history(run)
    places = [place for place, row in enumerate(histories[0].rows) if row.kind == "train"]
    for place, loss in ((places[2], math.nan), (places[3], math.inf)):
        histories[0].rows[place] = histories[0].rows[place].model_copy(update={"loss": loss})
    chart = training_charts(run, histories, run.recipe.sparsity.keep_fractions[0])[0].svg()
    root = ET.fromstring(chart)
    dense = next(group for group in root if group.get("class") == "line dense")
    assert dense[0].attrib["d"].count("M") == 2
    assert not re.search("nan|inf", dense[0].attrib["d"])


def test_charts_grow_with_the_number_of_layers(run: RunResult) -> None:
    layers = tuple(KeptCount(name=f"layer{i}", kept=10 * (i + 1), total=1000) for i in range(54))
    networks = [n for n in run.networks if n.name == "HYDRA"]
    large = RunResult(run.folder, run.recipe, [type(n)(**{**vars(n), "layers": layers}) for n in networks])
    chart = layer_chart(large, Decimal("0.1"))
    assert chart is not None
    root = ET.fromstring(chart.svg())
    (marks,) = [group for group in root if group.get("class") == "mark hydra"]
    heights = [float(mark.attrib["y"]) for mark in marks.findall("use")]
    assert len(heights) == 54
    assert min(b - a for a, b in itertools.pairwise(heights)) > 5
    numbers = [int(t.text or "") for t in root.iter("text") if "text-anchor:end" in t.attrib["style"]]
    assert numbers == list(range(1, 55, 6))
    assert chart.words == "HYDRA keeps 1 % to 54 % of a layer."


@pytest.mark.parametrize("count", [3, 16])
def test_the_legend_of_any_number_of_methods_is_inside_the_picture(run: RunResult, count: int) -> None:
    """And of more than fit beside their markers, no means are written into the chart."""
    methods = [Method(name=name, allocation=allocation) for name in TITLES for allocation in (None, "erk")]
    chosen = [method for method in methods if method.title != "HYDRA"][: count - 2]
    sparsity = run.recipe.sparsity.model_copy(update={"baselines": tuple(chosen)})
    networks = [network for network in run.networks if network.name in ("dense", "HYDRA")]
    networks += [replace(networks[-1], name=method.title) for method in chosen]
    many = replace(run, recipe=run.recipe.model_copy(update={"sparsity": sparsity}), networks=networks)
    figure = accuracy_figure([many], {})
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert len(legend.get_texts()) == count
    box = legend.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.x1
    assert 0 <= box.y0 < box.y1 <= figure.axes[0].get_window_extent().y0
    numbers = [text for text in figure.axes[0].texts if text.get_text()]
    assert (len(numbers) > 1) == (count <= MOST_NUMBERS), "more than the dense network's"


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5))
def test_ticks_are_round_few_and_on_the_axis(values: list[float]) -> None:
    def paint(axes: Axes) -> None:
        plot_line(axes, "HYDRA", range(len(values)), values)

    with drawing():
        axes = Figure().subplots()
        Chart("", "", paint).draw(axes)
        low, high = axes.get_ylim()
        places = [float(place) for place in axes.get_yticks() if low <= place <= high]
        texts = axes.yaxis.get_major_formatter().format_ticks(places)
        unit = axes.yaxis.get_major_formatter().get_offset() or "1"
    assert low <= min(values) <= max(values) <= high
    assert 2 <= len(places) <= 7
    step = places[1] - places[0]
    mantissa = step / 10.0 ** math.floor(math.log10(step) + 1e-6)
    assert any(mantissa == pytest.approx(round_one, rel=1e-3) for round_one in (1, 2, 5, 10))
    assert len(set(texts)) == len(places)
    scale, *numbers = (float(text.replace("\N{MINUS SIGN}", "-")) for text in (unit, *texts))
    assert [scale * number for number in numbers] == pytest.approx(places, abs=0.01 * (high - low))
