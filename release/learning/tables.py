"""Records of runs to tables, a plot and text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from release.learning.study import Study
from release.learning.training import record_of
from release.results import markdown
from rllib_gtpo.intervals import difference, mean_interval, relative_gain, sign_flip_p

METRICS = ("final", "area")
TURNS = 7  # in the table of advantages by turn; few rollouts have more
_LABEL = {"final": "final accuracy", "area": "area under the curve"}

Values = dict[str, dict[str, dict[int, dict[str, Any]]]]  # task -> arm -> seed -> metric


def area(tokens: Sequence[float], values: Sequence[float], budget: float) -> float:
    """Mean height of the curve over [0, budget] tokens (trapezoids; flat beyond its last point)."""
    inside = [t for t in tokens if t < budget]
    grid = [*inside, budget]
    heights = np.interp(grid, tokens, values)
    return float(np.trapezoid(heights, grid) / budget)


def summary(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the recorded results keep of a run."""
    tokens = [point["tokens"] for point in record["curve"]]
    accuracy = [point["accuracy"] for point in record["curve"]]

    def late(key: str) -> float:
        """Mean over the last quarter of the iterations."""
        values = record["iterations"].get(key, [0.0])
        return round(float(np.mean(values[-max(1, len(values) // 4) :])), 4)

    return {
        "task": record["task"],
        "settings": record["settings"],
        "seed": record["seed"],
        "start": accuracy[0],
        "final": accuracy[-1],
        "area": round(area(tokens, accuracy, record["budget"]), 4),
        "tokens": [int(t) for t in tokens],
        "accuracy": accuracy,
        "turns": record["curve"][-1]["turns"],
        "invalid": round(record["curve"][-1]["invalid"], 4),
        "no_signal": late("group/zero_std_frac"),
        "shaping": late("reward/shaping"),
        "gradient": late("grad/norm"),
        "advantage_by_turn": [
            float(np.mean(record["iterations"].get(f"advantage/by_turn/{k}", [0.0])))
            for k in range(TURNS)
        ],
        "seconds": round(record["seconds"], 1),
    }


def read(study: Study, records: Path) -> tuple[Values, list[dict[str, Any]]]:
    """The finished runs of a study."""
    values: Values = {task: {arm: {} for arm in study.arms} for task in study.tasks}
    rows = []
    for task in study.tasks:
        for arm in study.arms:
            for seed in study.seeds:
                file = record_of(study.run(task, arm, seed), records)
                if file.exists():
                    row = {"arm": arm, **summary(json.loads(file.read_text()))}
                    values[task][arm][seed] = row
                    rows.append(row)
    return values, rows


def compare(study: Study, values: Values) -> list[dict[str, Any]]:
    """Each arm on each task, and over all tasks: means with intervals, and pairs with baselines."""
    rows = []
    for task in (*study.tasks, "all") if len(study.tasks) > 1 else study.tasks:
        tasks = study.tasks if task == "all" else (task,)
        for arm in study.arms:
            row: dict[str, Any] = {"task": task, "arm": arm}
            row["seeds"] = min(len(values[t][arm]) for t in tasks)
            if row["seeds"] < 2:
                continue
            if task != "all":
                row["start"] = float(np.mean([v["start"] for v in values[task][arm].values()]))
            for metric in METRICS:
                ours = [list(_of(values[t][arm], metric).values()) for t in tasks]
                row[metric] = float(np.mean([np.mean(v) for v in ours]))
                if task != "all":
                    interval = mean_interval(ours[0])
                    row[f"{metric}_interval"] = [interval.low, interval.high]
                for baseline in study.baselines:
                    if baseline != arm:
                        pairs = [_pairs(values[t], arm, baseline, metric) for t in tasks]
                        row.update(_against(f"{metric}_vs_{baseline}", pairs))
            rows.append(row)
    return rows


def _of(seeds: Mapping[int, Mapping[str, float]], metric: str) -> dict[int, float]:
    return {seed: row[metric] for seed, row in sorted(seeds.items())}


def _pairs(
    arms: Mapping[str, Mapping[int, Mapping[str, float]]], arm: str, baseline: str, metric: str
) -> tuple[list[float], list[float]]:
    shared = sorted(set(arms[arm]) & set(arms[baseline]))
    ours, theirs = _of(arms[arm], metric), _of(arms[baseline], metric)
    return [ours[s] for s in shared], [theirs[s] for s in shared]


def _against(name: str, pairs: Sequence[tuple[list[float], list[float]]]) -> dict[str, Any]:
    if min(len(ours) for ours, _ in pairs) < 2:
        return {}
    ours, theirs = [p[0] for p in pairs], [p[1] for p in pairs]
    gap, gain = difference(ours, theirs), relative_gain(ours, theirs)
    flat = [a - b for one, other in pairs for a, b in zip(one, other, strict=True)]
    return {
        name: [gap.estimate, gap.low, gap.high],
        f"{name}_relative": [gain.estimate, gain.low, gain.high],
        f"{name}_p": sign_flip_p(flat),
    }


def table(study: Study, rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of a study, as the docs show it."""
    head = ["task", "arm", "seeds", "start", *(_LABEL[m] for m in METRICS)]
    for baseline in study.baselines:
        head += [f"final - {baseline}", *(f"{m} gain over {baseline}" for m in METRICS)]
    body = []
    for row in rows:
        cells = [row["task"], row["arm"], str(row["seeds"]), _number(row.get("start"))]
        cells += [_with(row[m], row.get(f"{m}_interval")) for m in METRICS]
        for baseline in study.baselines:
            cells.append(_interval(row.get(f"final_vs_{baseline}")))
            cells += [_percent(row.get(f"{m}_vs_{baseline}_relative")) for m in METRICS]
        body.append(cells)
    return markdown(head, body)


def by_turn_table(study: Study, values: Values) -> str:
    """Mean advantage of the first turns, over iterations and seeds."""
    head = ["task", "arm", *(f"turn {k + 1}" for k in range(TURNS))]
    body = []
    for task in study.tasks:
        for arm in study.arms:
            rows = [row["advantage_by_turn"] for row in values[task][arm].values()]
            if rows:
                body.append([task, arm, *(f"{mean:+.2f}" for mean in np.mean(rows, axis=0))])
    return markdown(head, body)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _with(value: float, bounds: Sequence[float] | None) -> str:
    return _number(value) + (f" [{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else "")


def _interval(values: Sequence[float] | None) -> str:
    return "" if values is None else f"{values[0]:+.3f} [{values[1]:+.3f}, {values[2]:+.3f}]"


def _percent(values: Sequence[float] | None) -> str:
    if values is None:
        return ""
    return f"{100 * values[0]:+.1f}% [{100 * values[1]:+.1f}, {100 * values[2]:+.1f}]"


def plot(values: Values, file: Path) -> None:
    """Mean held-out accuracy over sampled tokens, with the range over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = [task for task, arms in values.items() if any(arms.values())]
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(4.6 * len(tasks), 3.6), squeeze=False, sharey=True
    )
    for axis, task in zip(axes[0], tasks, strict=True):
        for arm, seeds in values[task].items():
            curves = list(seeds.values())
            if not curves:
                continue
            grid = np.linspace(0.0, min(c["tokens"][-1] for c in curves), 50)
            heights = [np.interp(grid, c["tokens"], c["accuracy"]) for c in curves]
            (line,) = axis.plot(grid / 1000, np.mean(heights, axis=0), label=arm)
            low, high = np.min(heights, axis=0), np.max(heights, axis=0)
            axis.fill_between(grid / 1000, low, high, alpha=0.12, color=line.get_color())
        axis.set(title=task, xlabel="sampled tokens (thousands)")
    axes[0][0].set_ylabel("held-out accuracy")
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)
