"""The figures in README and docs are those of the committed records, so that none goes stale.

Every figure is compared at the precision that it is printed with. Nothing here is a measured
number: a table that was made anew from new records passes, one that was not is named.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from omega_qvla.evaluation.statistics import wilson

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
#: The run behind README's table: `summary.json` of a `make demo`.
DEMO = RESULTS / "demo" / "summary.json"
#: Columns of the tables over all cells, in their order.
CELLS = {
    "π0.5 plain": ("pi05", "plain"),
    "π0.5 outliers": ("pi05", "outliers"),
    "GR00T plain": ("groot_n15", "plain"),
    "GR00T outliers": ("groot_n15", "outliers"),
}
FAMILIES = {"π0.5": "pi05", "GR00T": "groot_n15"}
ARMS = {
    "full precision": "full-precision",
    "naive W4A4": "rtn",
    "omega-paper (emulated)": "omega-paper",
    "omega (integers)": "omega",
}
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")

Row = list[str]


def tables(text: str) -> Iterator[tuple[Row, list[Row]]]:
    """(head, rows) of every Markdown table, without emphasis and with plain minus signs."""
    lines = text.replace("**", "").replace("−", "-").replace("–", "-").splitlines()
    rows = [
        [cell.strip() for cell in line.strip().strip("|").split("|")] if line[:1] == "|" else None
        for line in lines
    ]
    start = 0
    for i in range(len(rows) + 1):
        if i == len(rows) or rows[i] is None:
            found = [row for row in rows[start:i] if row is not None]
            if len(found) > 2:
                yield found[0], found[2:]
            start = i + 1


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def summary(name: str) -> dict[str, Any]:
    return dict(json.loads((RESULTS / name / "summary.json").read_text(encoding="utf-8")))


def drifts() -> dict[tuple[str, str, str], dict[str, Any]]:
    """(checkpoint, variant, arm) -> record; an arm of both runs has the comparison's."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for run in ("ablations", "comparison"):
        for line in (RESULTS / run / "drift.jsonl").read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            found[record["checkpoint"], record["variant"], record["arm"]] = record
    return found


def prints(text: str, value: float) -> bool:
    """Whether the number `text` is `value`, rounded to the digits that it is printed with."""
    decimals = len(text.partition(".")[2])
    return abs(float(text) - value) <= 0.5 * 10.0**-decimals + 1e-9


def thousandths(record: Mapping[str, Any]) -> tuple[float, float, float]:
    """Median, worst hundredth and worst 1 - cosine."""
    drift = record["drift"]
    cosines = (drift["cosine_median"], record["cosine_p01"], drift["cosine_min"])
    median, rare, worst = (1000 * (1 - cosine) for cosine in cosines)
    return median, rare, worst


def columns_of_cells(head: Row) -> list[int]:
    """Where the four cells stand, if the table is one over all cells."""
    return [head.index(name) for name in CELLS] if set(CELLS) <= set(head) else []


def test_drift_in_the_comparison_is_that_on_record() -> None:
    """Of every row that begins with a recipe's name."""
    records, checked = drifts(), []
    faults = []
    for head, rows in tables(read("docs/comparison.md")):
        places = columns_of_cells(head)
        for row in rows:
            name = re.fullmatch(r"`([^`]+)`", row[0])
            if not places or name is None or "/" not in row[places[0]]:
                continue
            of_arm = [records[*cell, name[1]] for cell in CELLS.values()]
            checked.append(name[1])
            for place, record in zip(places, of_arm, strict=True):
                shown = NUMBER.findall(row[place])
                expected = thousandths(record)[: len(shown)]
                if not all(map(prints, shown, expected)):
                    faults.append(f"{name[1]}: {row[place]}; on record {expected}")
            share = 100 * max(r["layer_bytes"] / r["layer_bytes_16bit"] for r in of_arm)
            shown = NUMBER.findall(row[-1])
            if head[-1].startswith("bytes") and not prints(shown[0], share):
                faults.append(f"{name[1]}: {row[-1]} of the bytes; on record {share}")
    assert not faults, "\n".join(faults)
    assert {"omega", "omega-paper", "rtn"} <= set(checked), "the table is not found any more"


def test_episodes_in_the_comparison_are_those_on_record() -> None:
    """Solved episodes, and the paired difference where it is given."""
    on_record, checked, faults = summary("comparison"), set(), []
    for head, rows in tables(read("docs/comparison.md")):
        places = columns_of_cells(head)
        for row in rows:
            arms = re.findall(r"`([^`]+)`", row[0])
            if row[0] == "full precision":
                arms = ["full-precision"]
            if not places or not arms or any("/" in row[place] for place in places):
                continue
            for arm in arms:
                checked.add(arm)
                for place, (family, variant) in zip(places, CELLS.values(), strict=True):
                    values = on_record[family][variant][arm]
                    expected = [float(values["successes"])]
                    if "(" in row[place]:
                        paired = values["paired"]
                        bounds = (paired["difference"], *paired["interval"])
                        expected += [100 * bound for bound in bounds]
                    shown = NUMBER.findall(row[place])
                    same = len(shown) == len(expected) and all(map(prints, shown, expected))
                    if not same:
                        faults.append(f"{arm}: {row[place]}; on record {expected}")
    assert not faults, "\n".join(faults)
    assert {"full-precision", "omega", "rtn"} <= checked, "the table is not found any more"


def measured() -> list[tuple[str, str, str, Row]]:
    """README's table: (family, variant, arm, cells from the success on)."""
    text = read("README.md")
    block = text[text.index("<!-- measured:begin -->") : text.index("<!-- measured:end -->")]
    (_, rows), family, variant, found = next(tables(block)), "", "", []
    for row in rows:
        family = next((f for word, f in FAMILIES.items() if row[0].startswith(word)), family)
        variant = {"as trained": "plain", "outlier channels": "outliers"}.get(row[1], variant)
        found.append((family, variant, ARMS[row[2]], row[3:]))
    return found


def episodes_of_readme() -> int:
    found = re.search(r"^(\d+) episodes per arm", read("README.md"), re.MULTILINE)
    assert found is not None
    return int(found[1])


def show(values: Mapping[str, Any], reference: bool) -> Row:
    """A row as README has it, from what a demo found."""
    low, high = (f"{100 * bound:.0f}" for bound in values["interval"])
    size = f"{values['layer_bytes'] / 2**20:.1f} MiB"
    share = f" ({100 * values['layer_bytes'] / values['layer_bytes_16bit']:.0f}%)"
    cosines = [f"{values['cosine'][key]:.4f}" for key in ("median", "min")]
    return [
        f"{100 * values['success']:.0f}% ({low}-{high})",
        *(["1", "1"] if reference else cosines),
        size + ("" if reference else share),
    ]


def test_the_readme_has_every_cell_and_arm_and_proper_intervals() -> None:
    rows, count = measured(), episodes_of_readme()
    keys = [key for *key, _ in rows]
    assert sorted(keys) == sorted([f, v, a] for f, v in CELLS.values() for a in ARMS.values())
    for family, variant, arm, (success, *_) in rows:
        rate, low, high = (float(number) for number in re.findall(r"\d+", success))
        solved = round(rate / 100 * count)
        bounds = [round(100 * bound) for bound in wilson(solved, count)]
        assert [low, high] == bounds, f"{family}, {variant}, {arm}: {success} of {count} episodes"


def test_bytes_in_the_readme_are_those_on_record() -> None:
    on_record = summary("comparison")
    for family, variant, arm, row in measured():
        values = on_record[family][variant][arm]
        assert row[-1] == show(values, arm == "full-precision")[-1], (family, variant, arm)


@pytest.mark.skipif(not DEMO.exists(), reason="the run behind the table has no record yet")
def test_the_readme_shows_the_demo_on_record() -> None:
    found = json.loads(DEMO.read_text(encoding="utf-8"))
    expected = [
        (f, v, arm, show(found[f][v][arm], arm == "full-precision")) for f, v, arm, _ in measured()
    ]
    assert measured() == expected
    counts = {values["episodes"] for vs in found.values() for a in vs.values() for values in
              a.values()}  # fmt: skip
    assert counts == {episodes_of_readme()}


def test_drift_of_the_long_demo_is_that_on_record() -> None:
    """docs/results/README.md: three arms to a cell of the table."""
    on_record, arms = summary("demo-120"), ("rtn", "omega-paper", "omega")
    ((_, rows),) = [
        found for found in tables(read("docs/results/README.md")) if "cosine median" in found[0]
    ]
    assert len(rows) == len(CELLS)
    for row in rows:
        family = next(f for word, f in FAMILIES.items() if row[0].startswith(word))
        for cell, key in ((row[3], "median"), (row[4], "min")):
            shown: Sequence[str] = cell.split(" / ")
            values = [on_record[family][row[1]][arm]["cosine"][key] for arm in arms]
            assert all(map(prints, shown, values)), (family, row[1], key, cell, values)


def test_a_stale_figure_is_seen() -> None:
    assert prints("0.16", 0.1649) and not prints("0.16", 0.1651)
    assert prints("183", 182.6) and not prints("183", 181.9)
    assert prints("-3.3", -3.333) and not prints("0.0", 0.06)
    text = "a\n| x | y |\n|---|---|\n| **1** | −2 |\n\n| z |\n|---|\n"
    assert list(tables(text)) == [(["x", "y"], [["1", "-2"]])]
