"""What TensorBoard's own reader and renderer make of the events."""

import html
import re

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.text import text_plugin
from tensorboard.util import tensor_util

from rllib_gtpo import record
from rllib_gtpo.ops.advantages import ESTIMATORS
from rllib_gtpo.record.location import Location
from rllib_gtpo.report import tensorboard
from rllib_gtpo.report.tensorboard import TensorBoardLog, arrange
from tests.record.samples import write_record

METRICS = {"accuracy": 0.5, "advantage/by_turn/0": 0.1, "reward/format": -0.1, "odd": float("nan")}
HOSTILE = (
    "<script>alert(1)</script>\n<img src=x onerror=alert(1)>\n\n# heading\n```\n</code></pre>"
    "<b>bold</b>\n[link](javascript:alert(1))\n![x](http://evil/x.png)\n<!-- \n&lt;i&gt;\n"
    "| a | b |\n|---|---|\n| 1 | 2 |\n<iframe src=//evil>\n\r\x0b<details>\x85<svg onload=alert(1)>"
    "\x02klzzwxh:0001\x03 \u2028<p>para</p>\ud800\x1b[31m"
)


def events(directory):
    found = EventAccumulator(str(directory), size_guidance={"tensors": 0, "histograms": 0})
    return found.Reload()


def rendered(found, tag):
    """The HTML that TensorBoard shows for the last text under a tag."""
    proto = found.Tensors(f"{tag}/text_summary")[-1].tensor_proto
    return text_plugin.text_array_to_html(tensor_util.make_ndarray(proto), True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    write_record(directory, iterations=3, groups=4, text=HOSTILE, output=HOSTILE)
    board = TensorBoardLog(directory, Location.of(directory))
    for step in (1, 2, 3):
        board.write(METRICS if step < 3 else {**METRICS, "evaluation/accuracy": 0.7}, step)
    board.close()
    return directory


def test_scalars_have_the_names_of_the_results(run):
    found = events(run)
    scalars = [t for t in found.Tags()["scalars"] if not t.startswith("estimators/")]
    assert sorted(scalars) == [
        "accuracy",
        "advantage/by_turn/0",
        "evaluation/accuracy",
        "reward/format",
    ]
    assert [(e.step, e.value) for e in found.Scalars("accuracy")] == [(1, 0.5), (2, 0.5), (3, 0.5)]


def test_histograms_are_of_all_recorded_advantages_by_turn(run):
    found = events(run)
    tags = found.Tags()["histograms"]
    assert sorted(tags) == [f"advantage_histogram/turn_{k}" for k in range(3)]
    file = record.record_files(run)[1]
    for k, tag in enumerate(sorted(tags)):
        assert [event.step for event in found.Histograms(tag)] == [1, 2, 3]
        shown = found.Histograms(tag)[1].histogram_value
        values = [row["turns"][k]["advantage"] for row in file.read(["turns"]).to_pylist()]
        assert shown.num == len(values) == 16
        assert (shown.min, shown.max) == (min(values), max(values))
        assert shown.sum == pytest.approx(sum(values))
        assert sum(shown.bucket) == 16


def test_histograms_of_advantages_that_hardly_differ():
    for values in ([0.5], [0.5, 0.5 + 1e-16], [1e6, 1e6 + 1e-9], [-1.0, 2.0]):
        edges = tensorboard._edges(np.array(values))
        counts, _ = np.histogram(values, edges)
        assert counts.sum() == len(values) and (np.diff(edges) > 0).all()


def test_the_used_estimator_agrees_with_itself_and_others_less(run):
    found = events(run)
    tags = [t for t in found.Tags()["scalars"] if t.startswith("estimators/correlation/")]
    names = {tag.rpartition("/")[2] for tag in tags}
    assert names <= set(ESTIMATORS) and {"gtpo", "grpo", "rloo"} <= names
    assert [event.step for event in found.Scalars("estimators/correlation/grpo")] == [1, 2, 3]
    file = record.record_files(run)[2]
    rows = file.read().to_pylist()
    from rllib_gtpo.connectors.learner import credit_of

    groups = record.groups_of_rows(rows)
    used = [turn["advantage"] for row in rows for turn in row["turns"]]
    for name in ("gtpo", "grpo"):
        credit = credit_of(groups, name, 0.9, {}).advantages.tolist()
        expected = np.corrcoef(used, credit)[0, 1]
        shown = found.Scalars(f"estimators/correlation/{name}")[-1].value
        assert shown == pytest.approx(expected, abs=1e-6)
    assert shown < found.Scalars("estimators/correlation/gtpo")[-1].value == pytest.approx(1.0)


def test_what_models_say_stays_text(run):
    found = events(run)
    for tag in ("transcript/highest_reward", "transcript/lowest_reward"):
        page = rendered(found, tag)
        inside = re.fullmatch(
            r"<table>\s*<tbody>\s*<tr>\s*<td><pre><code>(.*)</code></pre></td>\s*</tr>\s*</tbody>"
            r"\s*</table>",
            page.strip(),
            re.DOTALL,
        )
        assert inside, page[:500]
        assert "<" not in inside[1]  # not one element that is the model's
        shown = html.unescape(inside[1])
        for line in (
            "<script>alert(1)</script>",
            "```",
            "[link](javascript:alert(1))",
            "# heading",
        ):
            assert f"\n{line}\n" in shown
        assert "assistant, turn 1: reward " in shown and "advantage " in shown
        assert "\\x1b[31m" in shown and "&lt;i&gt;" in shown
    best = html.unescape(rendered(found, "transcript/highest_reward"))
    worst = html.unescape(rendered(found, "transcript/lowest_reward"))
    rewards = [float(re.search(r"reward ([-+.\d]+), stopped", text)[1]) for text in (best, worst)]
    assert rewards[0] > rewards[1]


def test_the_layout_shows_what_there_is(run):
    found = events(run)
    proto = found.Tensors("custom_scalars__config__")[-1].tensor_proto
    layout = layout_pb2.Layout.FromString(tensor_util.make_ndarray(proto).item())
    charts = {c.title: list(c.multiline.tag) for part in layout.category for c in part.chart}
    assert [part.title for part in layout.category] == ["Learning", "Credit"]
    scalars = found.Tags()["scalars"]
    for title, patterns in charts.items():
        assert any(re.match(p, tag) for p in patterns for tag in scalars), title
    # A chart of an evaluation with its interval, once there is one.
    names = ["evaluation/avg@4", "evaluation/avg@4_low", "evaluation/avg@4_high"]
    assert arrange(names)[0] == {"Learning": {"held out, with interval": ["Margin", names]}}


def test_a_resumed_run_takes_back_what_came_later(tmp_path):
    write_record(tmp_path, iterations=2)
    for last, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        board = TensorBoardLog(tmp_path, Location.of(tmp_path), last)
        for step in steps:
            board.write(METRICS, step)
        board.close()
    found = events(tmp_path)
    assert [event.step for event in found.Scalars("accuracy")] == [1, 2, 3, 4]
    assert len(found.Histograms("advantage_histogram/turn_0")) == 2


def test_a_run_without_a_record_has_its_scalars(tmp_path, capsys):
    board = TensorBoardLog(tmp_path, Location.of(tmp_path))
    board.write({"accuracy": 0.25}, 1)
    board.close()
    assert events(tmp_path).Scalars("accuracy")[0].value == 0.25
    assert capsys.readouterr().err == ""
