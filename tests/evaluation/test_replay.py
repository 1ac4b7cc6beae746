import numpy as np
import pytest

from omega_qvla.errors import EvaluationError
from omega_qvla.evaluation.executor import InProcess
from omega_qvla.evaluation.records import Episode, Protocol, Trace
from omega_qvla.evaluation.replay import replay
from omega_qvla.evaluation.results import read_results, write_results
from omega_qvla.evaluation.videos import side_by_side, write_side_by_side

from .test_executor import EPISODES, arms, importable_from_workers, plan, run

__all__ = ["arms", "importable_from_workers"]  # fixtures


def test_episodes_are_played_again_as_recorded_with_frames_of_any_size(arms, tmp_path):
    out = tmp_path / "r.jsonl"
    records = run(plan(arms[:2]), out, workers=0)
    wanted = [(arm.key, EPISODES[1]) for arm in arms[:2]]
    folder = tmp_path / "traces"
    traces = replay(out, wanted, folder, InProcess(), frame_size=12, frame_every=2)
    for (key, episode), trace in traces.items():
        (record,) = [r for r in records if r.key == key and r.episode == episode]
        assert len(trace.actions) == record.steps and trace.success == record.success
        assert trace.frames.shape[1:] == (12, 12, 3)
        assert trace.frame_steps[1] == 2
    # Traces of the same arms and episodes, drawn otherwise or of other results, are others.
    large = replay(out, wanted, folder, InProcess(), frame_size=16, frame_every=2)
    assert {trace.frames.shape[1] for trace in large.values()} == {16}
    again = replay(out, wanted, folder, InProcess(), frame_size=12, frame_every=2)
    assert {trace.frames.shape[1] for trace in again.values()} == {12}
    other = tmp_path / "other.jsonl"
    quick = run(plan(arms[:2], protocol=Protocol(execute=2)), other, workers=0)
    found = replay(other, wanted, folder, InProcess(), frame_size=12, frame_every=2)
    for key, episode in wanted:
        (record,) = [r for r in quick if r.key == key and r.episode == episode]
        assert len(found[key, episode].replans) == record.replans
        assert record.replans != len(traces[key, episode].replans)
    (tmp_path / "omega").write_text("0.7")  # not needed any more: they lie there
    before = sorted(folder.iterdir())
    with pytest.raises(EvaluationError, match=r"omega\.checkpoint"):
        replay(out, wanted, folder, InProcess())
    assert sorted(folder.iterdir()) == before


def test_an_episode_that_goes_otherwise_is_an_error_and_leaves_no_trace(arms, tmp_path):
    out = tmp_path / "r.jsonl"
    run(plan(arms[:1]), out, workers=0)
    header, records = read_results(out)
    wrong = records[0].__class__(**{**records[0].to_dict(), "steps": 3})
    write_results(out, header, [wrong, *records[1:]])
    with pytest.raises(EvaluationError, match="did not go as recorded"):
        replay(out, [(wrong.key, wrong.episode)], tmp_path / "traces", InProcess())
    assert not [path for path in (tmp_path / "traces").rglob("*") if path.is_file()]


def test_a_file_without_its_arms_paths_cannot_be_replayed(arms, tmp_path):
    out = tmp_path / "r.jsonl"
    run(plan(arms[:1]), out, workers=0)
    header, records = read_results(out)
    del header["plan"]
    write_results(out, header, records)
    with pytest.raises(EvaluationError, match="older version"):
        replay(out, [(arms[0].key, EPISODES[0])], tmp_path / "t", InProcess())


def trace(steps, success, level, size=32):
    shown = np.arange(0, steps + 1, 2)
    frames = np.full((len(shown), size, size, 3), level, np.uint8)
    frames[:, 0, 0] = shown[:, None]  # a corner tells the step
    return Trace(np.zeros((steps, 2), np.float32), np.zeros(1, np.int64), frames, shown, success)


def test_a_finished_episode_stands_still_beside_the_other():
    pictures = list(side_by_side("reach", {"a": trace(4, True, 100), "b": trace(10, False, 200)}))
    assert len(pictures) == 6 + 10  # steps 0 to 10, and the last for a second
    corners = [(int(p[24, 0, 0]), int(p[24, 36, 0])) for p in pictures[:6]]
    assert corners == [(0, 0), (2, 2), (4, 4), (4, 6), (4, 8), (4, 10)]
    assert pictures[0].shape == (32 + 48, 2 * 32 + 4, 3)
    assert all(p[30, 10, 0] == 100 and p[30, 50, 0] == 200 for p in pictures)


def test_the_film_can_be_read_back(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "sub" / "film.mp4"
    write_side_by_side(path, "t", {"a": trace(4, True, 100), "b": trace(10, False, 200)})
    with av.open(str(path)) as film:
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
        assert film.streams.video[0].codec_context.name == "h264"
    assert len(frames) == 16
    assert abs(int(frames[3][40, 16, 0]) - 100) < 12 and abs(int(frames[3][40, 52, 0]) - 200) < 12


def test_an_episode_without_frames_is_named(tmp_path):
    empty = trace(4, True, 1)
    empty = Trace(empty.actions, empty.replans, empty.frames[:0], empty.frame_steps[:0], True)
    with pytest.raises(EvaluationError, match="no frames of b"):
        list(side_by_side("t", {"a": trace(4, True, 1), "b": empty}))


def test_traces_are_named_by_arm_and_episode():
    from omega_qvla.evaluation.executor import trace_name
    from omega_qvla.evaluation.records import ArmKey

    name = trace_name(ArmKey("pi05", "plain", "omega"), Episode("libero_object/pick", 3))
    assert name == "pi05__plain__omega__libero_object-pick__3.npz"
