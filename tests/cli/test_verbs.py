"""Every verb on a tiny checkpoint, in the order in which a user would call them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli.fakes import TASKS, collect
from omega_qvla.calibration.samples import SampleMeta, read_observations, write_observations
from omega_qvla.cli.main import main
from omega_qvla.errors import CalibrationError
from omega_qvla.policies.registry import save_policy
from policies.tiny import tiny_pi05

Run = Any


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a checkpoint, observations, two packs and their merger."""
    folder = tmp_path_factory.mktemp("cli")
    save_policy(tiny_pi05(num_steps=2), folder / "checkpoint")
    episodes = [(task, seed) for task in TASKS for seed in (1, 2)]
    found = [(task, seed, *item) for task, seed in episodes for item in collect(task, seed)]
    write_observations(
        folder / "observations.safetensors",
        [observation for *_, observation in found],
        [SampleMeta(seed, step, task) for task, seed, step, _ in found],
        "a test",
    )
    source = ["--observations", f"{folder}/observations.safetensors", "--num-samples", "6"]
    words = [f"{folder}/checkpoint", *source, "--out", f"{folder}/calibration.safetensors"]
    assert main(["calibrate", *words, "--quiet"]) == 0
    for side in ("backbone", "action_head"):
        words = ["quantize", f"{folder}/checkpoint", "--side", side, "--quiet"]
        words += ["--calibration", f"{folder}/calibration.safetensors"]
        assert main([*words, "--out", f"{folder}/{side}.safetensors"]) == 0
    parts = [f"{folder}/backbone.safetensors", f"{folder}/action_head.safetensors"]
    assert main(["merge", *parts, "--out", f"{folder}/omega.safetensors"]) == 0
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Calls the command with --json; returns its exit code and the object it printed."""

    def call(*words: object) -> tuple[int, Any]:
        code = main([*map(str, words), "--json", "--quiet"])
        out = capsys.readouterr().out
        return code, json.loads(out) if out else None

    return call


def test_info_describes_the_machine(run: Run) -> None:
    code, data = run("info")
    assert code == 0
    assert set(data) == {"environment", "backends", "presets", "families"}
    assert {"omega", "omega-paper", "rtn", "w4a16"} <= set(data["presets"])
    emulated = next(b for b in data["backends"] if b["name"] == "emulated")
    assert emulated["available"] is True


def test_info_describes_a_checkpoint(place: Path, run: Run) -> None:
    code, data = run("info", place / "checkpoint", "--recipe", "omega-paper")
    assert code == 0
    assert (data["family"], data["num_steps"], data["image_size"]) == ("pi05", 2, 32)
    assert data["parameters"]["backbone"] > 0
    # Two blocks of seven layers; the last block of the language model ends at its keys.
    assert len(data["quantized"]["action_head"]["layers"]) == 14
    assert len(data["quantized"]["backbone"]["layers"]) == 9
    assert len(data["quantized"]["backbone"]["unused"]) == 5


def test_inspect_lists_every_layer(place: Path, run: Run) -> None:
    code, data = run("inspect", place / "omega.safetensors")
    assert code == 0
    assert len(data["layers"]) == 23
    assert data["recipe"]["name"] == "omega"
    assert data["calibration"]["count"] == 6
    # The action head's rank-4 residual weighs more than that on layers this narrow.
    layer = next(x for x in data["layers"] if x["side"] == "backbone")
    assert layer["scheme"] == "W4A4 per_token_group/64, smooth, hadamard/64, gptq/row"
    assert 0.25 < layer["bytes"] / layer["bytes_16bit"] < 0.3
    assert data["layer_bytes"] == sum(x["bytes"] for x in data["layers"])


def test_building_both_sides_at_once_gives_the_merged_pack(place: Path, run: Run) -> None:
    out = place / "both.safetensors"
    source = ["--observations", place / "observations.safetensors", "--num-samples", 6]
    code, data = run("quantize", place / "checkpoint", *source, "--out", out)
    assert (code, data["layers"]) == (0, 23)
    # 0.311: layers of 128 channels; the bundled policies stay under 0.3 (test_assets.py).
    assert data["layer_bytes"] < 0.315 * data["layer_bytes_16bit"]
    assert out.read_bytes() == (place / "omega.safetensors").read_bytes()


def test_include_and_exclude_narrow_the_recipe(place: Path, run: Run) -> None:
    out = place / "few.safetensors"
    words = [
        "--recipe",
        "rtn",
        "--side",
        "action_head",
        "--include",
        r"\.mlp\.",
        "--exclude",
        "down",
    ]
    code, data = run("quantize", place / "checkpoint", *words, "--out", out)
    assert (code, data["layers"]) == (0, 4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--include", "no_such_layer"], "RecipeError"),
        (["--include", "action_out_proj", "--side", "action_head"], "protected"),
        (["--recipe", "nonsense"], "neither a preset"),
        ([], "needs calibration: give --observations"),
        (["--tasks", "push"], "go with --env"),
        (["--observations", "{place}/omega.safetensors"], "not a file of observations"),
        (["--observations", "{place}/observations.safetensors", "--num-samples", "99"], "only 28"),
        (["--observations", "{place}/x", "--env", "metaworld"], "not both"),
        (["--device", "nonsense"], "--device nonsense: not on this machine"),
        (["--device", "meta"], "--device meta: not on this machine"),
    ],
)
def test_quantize_refuses(
    words: list[str], message: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = place / "refused.safetensors"
    words = [word.format(place=place) for word in words]
    assert main(["quantize", f"{place}/checkpoint", *words, "--out", str(out), "--quiet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not list(place.glob("refused*"))


@pytest.mark.parametrize("verb", ["quantize", "calibrate", "merge", "collect"])
def test_what_is_no_file_of_that_kind_is_not_replaced(
    verb: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mistyped --out may be a checkpoint's file; a pack is replaced by a pack."""
    target = tmp_path / "model.safetensors"
    target.write_bytes((place / "checkpoint" / "model.safetensors").read_bytes())
    (tmp_path / "folder").mkdir()
    observations = ["--observations", f"{place}/observations.safetensors", "--num-samples", "2"]
    words = {
        "quantize": ["quantize", f"{place}/checkpoint", *observations],
        "calibrate": ["calibrate", f"{place}/checkpoint", *observations],
        "merge": ["merge", f"{place}/backbone.safetensors", f"{place}/action_head.safetensors"],
    }
    before = target.read_bytes()
    for out in (target, tmp_path / "folder"):
        if verb == "collect":
            read = read_observations(place / "observations.safetensors")
            with pytest.raises(CalibrationError, match="exists and is no omega-qvla observations"):
                write_observations(out, read.observations, read.meta)
            continue
        assert main([*words[verb], "--out", str(out), "--quiet"]) == 2
        assert "exists and is no omega-qvla" in capsys.readouterr().err
    assert target.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "model.safetensors"]


def test_merge_refuses_overlapping_packs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packs = [f"{place}/omega.safetensors", f"{place}/backbone.safetensors"]
    assert main(["merge", *packs, "--out", f"{place}/overlap.safetensors"]) == 2
    assert "disjoint" in capsys.readouterr().err
    assert not (place / "overlap.safetensors").exists()


def test_verify_against_the_checkpoint(place: Path, run: Run) -> None:
    code, data = run("verify", place / "omega.safetensors", place / "checkpoint")
    assert (code, data["passed"]) == (0, True)
    assert sum(check["what"] == "weight" for check in data["checks"]) == 23


def test_verify_against_another_checkpoint_fails(place: Path, run: Run) -> None:
    other = save_policy(tiny_pi05(seed=5, num_steps=2), place / "other")
    code, data = run("verify", place / "omega.safetensors", other)
    assert (code, data["passed"]) == (2, False)
    assert any(check["what"] == "source" and not check["passed"] for check in data["checks"])


def test_verify_names_a_flipped_byte(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = bytearray((place / "omega.safetensors").read_bytes())
    data[-100] ^= 1
    (place / "flipped.safetensors").write_bytes(data)
    assert main(["verify", f"{place}/flipped.safetensors"]) == 2
    assert "altered tensor data" in capsys.readouterr().err


@pytest.fixture(scope="module")
def results(place: Path) -> Path:
    out = place / "results.jsonl"
    words = [
        "--arm",
        f"omega={place}/omega.safetensors",
        "--arm",
        f"bb={place}/backbone.safetensors",
    ]
    words += ["--env", "cli.fakes:DriftEnv", "--tasks", *TASKS, "--episodes", "3"]
    assert main(["eval", f"{place}/checkpoint", *words, "--workers", "0", "--out", str(out)]) == 0
    return out


def test_eval_goes_on_with_the_same_file(place: Path, results: Path, run: Run) -> None:
    before = results.read_text().splitlines()
    assert len(before) == 1 + 3 * 6
    words = ["--env", "cli.fakes:DriftEnv", "--tasks", *TASKS, "--workers", 0, "--out", results]
    code, data = run("eval", place / "checkpoint", *words, "--episodes", 4)
    assert code == 0
    arm = data["arms"]["pi05/plain/full-precision"]
    assert arm["episodes"] == 8
    assert arm["interval"][0] <= arm["success"] <= arm["interval"][1]
    assert results.read_text().splitlines()[1:19] == before[1:]
    assert len(results.read_text().splitlines()) == 1 + 18 + 2


def test_eval_refuses_a_label_that_is_taken(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--arm", "full-precision=x", "--out", f"{place}/r.jsonl"]
    assert main(["eval", f"{place}/checkpoint", *words]) == 2
    assert "full-precision" in capsys.readouterr().err


def test_compare_pairs_and_measures_drift(place: Path, results: Path, run: Run) -> None:
    words = ["--checkpoint", place / "checkpoint", "--pack", f"omega={place}/omega.safetensors"]
    words += ["--observations", place / "observations.safetensors", "--num-samples", 6]
    table = place / "table.md"
    code, data = run("compare", results, *words, "--markdown", table)
    assert code == 0
    arms = data["families"]["pi05"]["plain"]
    assert set(arms) == {"full-precision", "omega", "bb"}
    assert arms["omega"]["paired"]["episodes"] == 6
    assert 0.9 < arms["omega"]["cosine"]["median"] <= 1
    assert arms["bb"]["cosine"] is None
    lines = table.read_text().splitlines()
    assert len(lines) == 2 + 3
    assert len({line.count("|") for line in lines}) == 1


def test_compare_with_drift_alone(place: Path, run: Run) -> None:
    words = ["--checkpoint", place / "checkpoint", "--pack", f"omega={place}/omega.safetensors"]
    code, data = run("compare", *words, "--observations", place / "observations.safetensors")
    assert code == 0
    assert data["families"]["pi05"]["plain"]["omega"]["layer_bytes"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to compare"),
        (["{results}", "--arms", "nobody"], "no episodes of nobody"),
        (["--pack", "omega={place}/omega.safetensors"], "--observations together"),
        (["--recipes", "rtn"], "--checkpoint DIR (perhaps several) and --out DIR"),
        (["--episode", "1"], "one --checkpoint, --pack LABEL=FILE"),
        (["r.jsonl", "--episode", "1"], "leave out the results files"),
        (["--out", "x"], "--out goes with --recipes and --episode"),
    ],
)
def test_compare_refuses(
    words: list[str],
    message: str,
    place: Path,
    results: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["compare", *(w.format(results=results, place=place) for w in words)]) == 2
    assert message in capsys.readouterr().err


def test_bench_times_every_arm(place: Path, run: Run) -> None:
    source = ["--observations", place / "observations.safetensors", "--threads", 1]
    words = [place / "checkpoint", "--pack", place / "omega.safetensors", *source, "--rounds", 2]
    code, data = run("bench", *words, "--no-bf16")
    assert code == 0
    arms = {row["arm"]: row["ms"] for row in data["results"]}
    assert len(arms) == 4 and {"fp32", "control", "omega emulated"} <= set(arms)
    for stages in arms.values():
        assert set(stages) == {"vision", "prefix", "step", "chunk"}
        assert 0 < stages["step"]["p50"] < stages["chunk"]["p50"] <= stages["chunk"]["p95"]
        assert stages["vision"]["p50"] > 0 and stages["prefix"]["p50"] > 0
    # Every quantized layer is in one of the kinds, with the times of every arm.
    quantized = 2 * 7 * 2 - 5  # two stacks of two blocks, less what inference never runs
    counted = sum(kind["count"] * len(kind["name"].split(" + ")) for kind in data["layers"])
    assert counted == quantized
    assert all(set(kind["ms"]) == set(arms) for kind in data["layers"])
    memory = {row["arm"]: row["bytes"] for row in data["memory"]}
    assert set(memory) == {"fp32", "control", "emulated", "auto"} or not memory
    for peaks in memory.values():
        assert 0 < peaks["base"] < peaks["load"] and peaks["base"] < peaks["run"]


def test_bench_leaves_out_what_it_is_told_to(place: Path, run: Run) -> None:
    source = ["--observations", place / "observations.safetensors", "--threads", 1]
    words = [place / "checkpoint", "--pack", place / "omega.safetensors", *source, "--rounds", 1]
    code, data = run(
        "bench", *words, "--no-bf16", "--no-layers", "--no-memory", "--backends", "auto"
    )
    assert code == 0 and not data["layers"] and not data["memory"] and len(data["results"]) == 3


def test_inspect_diagnoses_layers(place: Path, run: Run, tmp_path: Path) -> None:
    words = ["--checkpoint", place / "checkpoint", "--num-samples", 3, "--out", tmp_path / "out"]
    words += ["--observations", place / "observations.safetensors", "--backend", "emulated"]
    code, data = run("inspect", place / "omega.safetensors", "--layers", *words)
    assert code == 0
    rows = {row["name"]: row for row in data["layers"]}
    assert len(rows) == len(run("inspect", place / "omega.safetensors")[1]["layers"])
    assert all(row["error"] > 0 and row["alone"] > 0 for row in rows.values())
    assert [len(entry["layers"]) for entry in data["leave_out"]] == [0, 1, 2, 4, 8, 16]
    assert data["leave_out"][0]["error"] == pytest.approx(data["everything"])
    assert data["leave_out"][-1]["error"] < data["everything"]
    assert json.loads((tmp_path / "out" / "layers.json").read_text()) == data
    lines = (tmp_path / "out" / "layers.csv").read_text().splitlines()
    assert len(lines) == 1 + len(rows)
    assert (tmp_path / "out" / "layers.html").read_text().count("<svg") == 5


def test_inspect_of_layers_needs_something_to_run(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["inspect", f"{place}/omega.safetensors", "--layers"]
    assert main(words) == 2
    assert "--checkpoint" in capsys.readouterr().err
    assert main([*words, "--checkpoint", f"{place}/checkpoint"]) == 2
    assert "--observations PATH" in capsys.readouterr().err
