import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from omega_qvla.evaluation.report import ReportData, render_report, write_report
from omega_qvla.evaluation.report.heatmap import CLASSES, heat_class
from omega_qvla.evaluation.report.names import short_name, split_name
from omega_qvla.evaluation.report.plots import _thinned
from omega_qvla.evaluation.report.tables import headline_table
from omega_qvla.evaluation.report.theme import SENTINELS, arm_colours
from omega_qvla.evaluation.report.traces import _at, _thin

from .synthetic import ARMS, report_data

_VOID = {"meta", "link", "img", "br", "source", "path", "rect", "use", "line"}


class Checker(HTMLParser):
    """Collects ids and outside references, and checks that tags nest."""

    def __init__(self) -> None:
        super().__init__()
        self.ids, self.references, self.open = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in _VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "srcset", "xlink:href"):
                self.references.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in _VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def data():
    return report_data(episodes=12, blocks=2)


@pytest.fixture(scope="module")
def page(data):
    return render_report(data)


@pytest.fixture(scope="module")
def parsed(page):
    checker = Checker()
    checker.feed(page)
    return checker


def test_tags_nest_and_ids_are_unique(parsed):
    assert parsed.open == []
    assert len(parsed.ids) == len(set(parsed.ids))


def test_nothing_is_loaded_from_outside(page, parsed):
    for reference in parsed.references:
        assert reference.startswith(("#", "data:")), reference[:80]
        if reference.startswith("#"):
            assert reference[1:] in parsed.ids
    assert not re.search(r"url\((?!#)", page)
    assert "@import" not in page
    assert "<script" not in page


def test_every_figure_is_well_formed_and_themed(page):
    figures = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(figures) > 10
    for figure in figures:
        ElementTree.fromstring(figure)
        assert "aria-label" in figure[:200]
    assert not any(sentinel in page for sentinel in SENTINELS.values())


def test_every_colour_is_defined_in_both_themes(page):
    used = set(re.findall(r"var\(--(\w+)\)", page)) - {"arms"}
    light, dark = page.split("prefers-color-scheme: dark", 1)
    for name in used:
        assert f"--{name}:" in light, name
        assert f"--{name}:" in dark.split("* {", 1)[0], name


def test_numbers_of_the_summary_are_on_the_page(data, page):
    omega = data.summary["pi05"]["outliers"]["omega"]
    assert f"{omega['cosine']['median']:.4f}" in page
    assert f"{100 * omega['success']:.0f}%" in page
    for arm in ARMS:
        assert arm in page
    assert "Some CPU &lt;2 cores&gt;" in page
    assert "omega-qvla demo --out runs/demo" in page


def test_a_report_with_only_a_summary_says_what_is_missing(data):
    one = {"pi05": {"plain": {"full-precision": data.summary["pi05"]["plain"]["full-precision"]}}}
    page = render_report(ReportData(summary=one))
    assert page.count("not measured in this run") == 5
    checker = Checker()
    checker.feed(page)
    assert checker.open == []


def test_a_report_on_drift_alone_has_no_columns_for_success(data):
    """Empty ones would read as arms that solved nothing."""
    of_episodes = ("episodes", "success", "interval", "paired", "jerk_ratio", "tasks")
    alone = {
        family: {
            variant: {
                arm: {key: value for key, value in values.items() if key not in of_episodes}
                for arm, values in arms.items()
            }
            for variant, arms in variants.items()
        }
        for family, variants in data.summary.items()
    }
    heads = {}
    for name, summary in (("played", data.summary), ("alone", alone)):
        table = headline_table(replace(data, summary=summary))
        heads[name] = re.findall(r"<th>(.*?)</th>", table)
        rows = [row for row in table.split("<tr") if "scope=" in row]
        assert rows and {row.count("<td>") for row in rows} == {len(heads[name]) - 1}
        assert f'colspan="{len(heads[name])}"' in table
    left = ["arm", "cosine<br>median", "cosine<br>min", "quantized layers"]
    assert heads["alone"] == left
    assert len(heads["played"]) == 9 and "success" in heads["played"]


def test_names_are_escaped_and_unknown_arms_get_a_colour(data):
    arms = dict(data.summary["pi05"]["plain"])
    arms["<b>mine</b>"] = arms.pop("omega")
    page = render_report(
        ReportData(summary={"a<i>": {"plain": arms}}, title="T<script>", episodes=data.episodes)
    )
    assert "<b>mine" not in page
    assert "<script" not in page
    assert "a<i>" not in page


def test_episodes_without_frames_still_show_their_actions(data):
    episode = data.episodes[0]
    blind = {
        arm: replace(trace, frames=trace.frames[:0], frame_steps=trace.frame_steps[:0])
        for arm, trace in episode.traces.items()
    }
    page = render_report(replace(data, episodes=(replace(episode, traces=blind),)))
    assert "image/webp" not in page
    assert "actions in drawer-open" in page


def test_written_whole(data, tmp_path, monkeypatch):
    path = write_report(replace(data, layer_drift=(), episodes=()), tmp_path / "out" / "r.html")
    assert path.read_text(encoding="utf-8").endswith("</html>\n")
    assert [p.name for p in path.parent.iterdir()] == ["r.html"]
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        write_report(replace(data, layer_drift=(), episodes=(), title="x"), path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["r.html"]


def test_layer_names_in_few_words():
    name = "paligemma_with_expert.gemma_expert.model.layers.3.mlp.up_proj"
    assert split_name(name) == ("gemma_expert", 3, "mlp.up_proj")
    assert short_name(name) == "gemma_expert block 3 mlp.up_proj"
    name = "action_head.model.transformer_blocks.11.attn1.to_out.0"
    assert split_name(name) == ("action_head", 11, "attn1.to_out.0")
    assert short_name("mlp1") == "mlp1"


def test_heat_classes_cover_the_scale():
    classes = [heat_class(10.0**e) for e in np.linspace(-5, 1, 200)]
    assert classes == sorted(classes)
    assert set(classes) == set(range(CLASSES))
    assert heat_class(0.0) == 0


def test_colours_are_fixed_for_known_arms_and_distinct():
    colours = arm_colours(["full-precision", "mine", "omega", "other"])
    assert (colours["full-precision"], colours["omega"]) == ("s0", "s1")
    assert len(set(colours.values())) == 4


def test_thinning_keeps_spikes_and_ends():
    values = np.ones(5000)
    values[4321] = 9.0
    xs, heights = _thinned(values)
    assert len(xs) <= 1024
    assert heights.max() == 9.0
    assert abs(xs[heights.argmax()] - 4321) < 5
    steps = _thin(list(range(0, 100, 3)), 6)
    assert (len(steps), steps[0], steps[-1]) == (6, 0, 99)


def test_a_finished_episode_is_framed_by_its_outcome(data):
    trace = next(iter(data.episodes[0].traces.values()))
    last = _at(trace, 10_000)
    assert last[0, 0].tolist() == [32, 150, 84]
    np.testing.assert_array_equal(last[10:-10, 10:-10], trace.frames[-1][10:-10, 10:-10])
    failed = _at(replace(trace, success=False), 10_000)
    assert failed[0, 0].tolist() == [200, 60, 48]
    np.testing.assert_array_equal(_at(trace, 4), trace.frames[1])


def test_template_and_style_are_packaged():
    import omega_qvla.evaluation.report as report

    folder = Path(report.__file__).parent
    assert (folder / "template.html").is_file()
    assert (folder / "style.css").is_file()
