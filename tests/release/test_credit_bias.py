"""The bias bench is right about what can be known by hand, and notices a wrong estimator."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "release"))

import credit_bias
from bias.estimates import (
    Control,
    Problem,
    all_groups,
    angle,
    exact,
    figures,
    moments_of,
    sample_groups,
    sampled,
    updates,
)
from bias.paths import enumerate_paths, sample_paths
from bias.process import Branch, Node, Process, accuracy, best, expected, gradient, total, trained
from bias.processes import PROCESSES, answer, errand, shaping
from bias.shaping import bonus
from bias.tables import tables
from bias.variants import Variant, all_variants, gtpo, gtpo_variants, other_variants
from results import Report, renewed

from rllib_gtpo.ops.advantages import ESTIMATORS, TurnCredit, Turns, register_estimator

ROOT = Path(__file__).parents[2]
SMALL = [*PROCESSES, shaping(False), shaping(True), errand(4)]
LABELS = {variant.label: variant for variant in all_variants()}


def problem(process: Process, seed: int = 0) -> Problem:
    """Under a policy without symmetries."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(process.index), generator=generator, dtype=torch.float64)
    return Problem(process, "random", logits, enumerate_paths(process))


def coin() -> Process:
    """One turn: heads is right, tails is not."""
    node = Node("flip", {"heads": (Branch(1.0, accuracy=1.0),), "tails": (Branch(1.0),)})
    return Process("coin", "", {"flip": node}, {"flip": 1.0})


@pytest.mark.parametrize("process", SMALL, ids=lambda p: p.name)
def test_gradient_by_enumeration_autograd_and_differences(process):
    at = problem(process)
    paths, logits = at.paths, at.logits_D
    share = torch.tensor(list(process.prompts.values()), dtype=torch.float64)[paths.prompt_M]
    earned = paths.per_path(paths.accuracy_R + paths.format_R)
    probability = share * paths.probability_M(process, logits)
    assert float(probability.sum()) == pytest.approx(1.0, abs=1e-12)
    assert float(probability @ earned) == pytest.approx(float(expected(process, logits)))

    leaf = logits.clone().requires_grad_()
    log = paths.probability_M(process, leaf).log()
    by_score = torch.autograd.grad(log, leaf, probability * earned)[0]
    true = gradient(process, logits)
    assert torch.allclose(by_score, true, atol=1e-12)
    for entry in range(len(logits)):
        step = torch.zeros_like(logits)
        step[entry] = 1e-5
        up, down = (float(expected(process, logits + sign * step)) for sign in (1, -1))
        assert (up - down) / 2e-5 == pytest.approx(float(true[entry]), abs=1e-8)


def test_discounted_and_accuracy_targets():
    late = Branch(1.0, accuracy=1.0)
    first = Node("a", {"go": (Branch(1.0, "b", format=-0.1),)})
    process = Process("line", "", {"a": first, "b": Node("b", {"end": (late,)})}, {"a": 1.0})
    assert float(expected(process, process.uniform())) == pytest.approx(0.9)
    assert float(expected(process, process.uniform(), accuracy)) == pytest.approx(1.0)
    assert float(expected(process, process.uniform(), total, 0.5)) == pytest.approx(0.4)


def test_trained_is_halfway_to_the_best():
    process = PROCESSES[1]
    assert best(process) == pytest.approx(0.9)  # good plan 0.55, broad 0.15, careful 0.2
    start = float(expected(process, process.uniform()))
    reached = float(expected(process, trained(process, 0.5)))
    assert reached == pytest.approx(0.5 * (start + 0.9), abs=0.02)


def test_expected_update_of_two_trajectories_by_hand():
    # Groups of 2 with p(heads) = 0.5.  Only {heads, tails}, probability 0.5, has any spread:
    # rewards 1 and 0, mean 0.5, std 0.5.  grad log pi(heads) = (0.5, -0.5), of tails the opposite.
    # Centred: (0.5 * (0.5, -0.5) - 0.5 * (-0.5, 0.5)) / 2 members = (0.25, -0.25); halved: 0.125.
    # The gradient of p is p (1 - p) = 0.25; 0.125 is (G - 1)/G of it.  With std: twice as much.
    # Variance over groups: 0.125^2 * 2 components = 0.03125; times 2 trajectories: 0.0625.
    process = coin()
    at = Problem(process, "uniform", process.uniform(), enumerate_paths(process))
    assert gradient(process, at.logits_D).tolist() == pytest.approx([0.25, -0.25])
    centred, std = exact(at, LABELS["dr_grpo"], 2), exact(at, LABELS["grpo"], 2)
    assert centred.mean_D.tolist() == pytest.approx([0.125, -0.125])
    assert centred.variance == pytest.approx(0.0625)
    assert std.mean_D.tolist() == pytest.approx([0.25, -0.25], abs=1e-5)
    found = figures(centred, gradient(process, at.logits_D), (64,))
    assert found["bias"] == pytest.approx(0.5)
    assert found["bias_scaled"] == pytest.approx(0.0, abs=1e-12)
    assert found["trajectories"] == pytest.approx(2.0)  # 0.0625 / (2 * 0.125^2)
    assert found["gain_64"] == pytest.approx((1 + 2 / 64) ** -0.5)


def test_groups_are_all_orders_of_their_members():
    at = problem(PROCESSES[3])
    members, weight = all_groups(at, 3)
    probability = at.paths.probability_M(at.process, at.logits_D).tolist()
    brute: dict[tuple[int, ...], float] = {}
    for group in itertools.product(range(len(probability)), repeat=3):
        key = tuple(sorted(group))
        chance = probability[group[0]] * probability[group[1]] * probability[group[2]]
        brute[key] = brute.get(key, 0.0) + chance
    assert {tuple(m): w for m, w in zip(members.tolist(), weight.tolist(), strict=True)} == (
        pytest.approx(brute)
    )


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)
@pytest.mark.parametrize("label", [v.label for v in all_variants() if v.theorem])
def test_theorems_hold_exactly(process, label):
    at = problem(process, seed=1)
    true, group_size = gradient(process, at.logits_D), 3
    moments = exact(at, LABELS[label], group_size)
    errors = credit_bias.theorem(at, LABELS[label], moments, true, group_size)
    if not errors:
        assert LABELS[label].theorem.endswith("_at_end")
        assert process.name in ("slips", "difficulty")
    for name, value in errors.items():
        assert value < credit_bias.THRESHOLDS[name]["max"]
    if LABELS[label].theorem == "unbiased":
        assert torch.allclose(moments.mean_D, true, atol=1e-12)
    if LABELS[label].theorem == "shrunk" or ("scale_error" in errors and "centred" in label):
        assert torch.allclose(moments.mean_D, true * 2.0 / 3.0, atol=1e-12)


def test_what_is_known_to_be_biased_is_found_biased():
    at = problem(PROCESSES[0])
    true = gradient(at.process, at.logits_D)
    for label in ("gtpo turn_index gamma=1", "gtpo group gamma=0.9", "mt_grpo"):
        assert angle(exact(at, LABELS[label], 4).mean_D, true) > 1.0


def test_a_wrong_estimator_is_caught(tmp_path):
    @register_estimator("leaks_own_reward")
    def leaks_own_reward(turns: Turns) -> TurnCredit:
        """Leaves out the others instead of itself."""
        credit = ESTIMATORS["rloo"].compute(turns)
        wrong = credit.returns - 0.5 * turns.rewards_N
        return TurnCredit(credit.returns, credit.baseline, credit.scale, wrong)

    try:
        process = PROCESSES[0]
        at = problem(process)
        wrong = Variant("wrong", {"estimator": "leaks_own_reward"}, "unbiased")
        row = credit_bias.measured(at, wrong, exact(at, wrong, 4), 4)
    finally:
        del ESTIMATORS["leaks_own_reward"]
    assert row["direction_error"] > 1.0
    report = Report("credit_bias", {"direction_error": {"max": 1e-6}}, [0])
    report.add(row)
    assert report.finish(tmp_path / "out.json") == 1
    written = json.loads((tmp_path / "out.json").read_text())
    assert not written["passed"] and written["metrics"] == [row]


@pytest.mark.parametrize("label", ["gtpo group gamma=0.9", "gigpo gamma=0.9", "rloo"])
def test_sample_agrees_with_exact(label):
    at, variant = problem(PROCESSES[2]), LABELS[label]
    known = exact(at, variant, 4)
    members = sample_groups(at, 4000, 4, seed=5)
    moments = sampled(at, members, variant, 1)
    assert float((moments.mean_D - known.mean_D).norm()) < 3.0 * moments.noise
    true = gradient(at.process, at.logits_D)
    found, right = figures(moments, true, (64,)), figures(known, true, (64,))
    for name in ("trajectories", "gain_64"):
        assert abs(found[name] - right[name]) < 4.0 * found[f"{name}_se"]
    control = gtpo("leave_one_out", 0.9)
    quiet = sampled(at, members, variant, 1, control=Control(control, exact(at, control, 4).mean_D))
    assert quiet.noise < 0.9 * moments.noise
    assert float((quiet.mean_D - known.mean_D).norm()) < 4.0 * quiet.noise


@pytest.mark.parametrize("label", ["gtpo batch gamma=0.9", "reinforce_pp"])
def test_sampled_steps_agree_with_all_steps(label):
    process = Process(
        "pair", "", {"go": Node("go", {"a": answer(0.9), "b": answer(0.3)})}, {"go": 1.0}
    )
    at, variant = problem(process), LABELS[label]
    members, weight = all_groups(at, 3)
    pairs = torch.tensor(list(itertools.product(range(len(members)), repeat=2)))
    every = updates(at, members[pairs].flatten(0, 1), variant, groups_per_step=2)
    known = weight[pairs].prod(1) @ every
    moments = sampled(at, sample_groups(at, 4000, 3, seed=2), variant, 2)
    assert float((moments.mean_D - known).norm()) < 3.0 * moments.noise
    with pytest.raises(ValueError, match="whole step"):
        exact(at, variant, 3)


def test_sampled_paths_are_distributed_like_all_paths():
    at = problem(errand(4))
    drawn = sample_paths(at.process, at.logits_D, 40_000, seed=1)
    assert drawn.accuracy_R.dtype == torch.float64
    for part in ("accuracy_R", "format_R"):
        per_path = drawn.per_path(getattr(drawn, part))
        probability = at.paths.probability_M(at.process, at.logits_D)
        known = float(probability @ at.paths.per_path(getattr(at.paths, part)))
        error = float(per_path.std()) / len(per_path) ** 0.5
        assert abs(float(per_path.mean()) - known) < 4.0 * error
    turns = float(at.paths.probability_M(at.process, at.logits_D) @ at.paths.length_M.double())
    lengths = drawn.length_M.double()
    assert abs(float(lengths.mean()) - turns) < 4.0 * float(lengths.std()) / 200.0
    # Same pairs in the same order: each drawn path must be one that can happen.
    known_paths = set(
        map(tuple, (p.tolist() for p in at.paths.pair_R.split(at.paths.length_M.tolist())))
    )
    for pairs in drawn.pair_R.split(drawn.length_M.tolist())[:500]:
        assert tuple(pairs.tolist()) in known_paths


def test_variance_of_steps_is_per_trajectory():
    update = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    by_one = moments_of(update, torch.zeros_like(update), 4, 0)
    merged = update.view(1000, 4, 3).mean(1)
    by_four = moments_of(merged, torch.zeros_like(merged), 16, 0)
    assert by_four.variance == pytest.approx(by_one.variance, rel=0.1)


def test_filter_of_uniform_groups_is_the_packages_own():
    at = problem(PROCESSES[3])
    members, _ = all_groups(at, 2)
    solved = (at.paths.per_path(at.paths.accuracy_R) == 1.0)[members].all(1)
    default = LABELS["gtpo group gamma=0.9"]
    whole = updates(at, members, default, 1)
    filtered = updates(at, members, replace(default, uniform_groups="drop_solved"), 1)
    assert whole[solved].abs().sum() > 0 and not filtered[solved].any()
    assert torch.equal(whole[~solved], filtered[~solved])


def test_shaping_is_the_packages_own():
    at = problem(shaping(True))
    paths, index = at.paths, at.process.index
    right = paths.per_path(paths.accuracy_R) == 1.0
    polished = (paths.pair_R[paths.start_M + 1] == index["copy", "polish"]) & ~right
    odd = (paths.pair_R[paths.start_M + 1] == index["think", "rush"]) & ~right
    one = [int(mask.nonzero()[0]) for mask in (right, polished, odd)]
    assert bonus(at, torch.tensor([one]), "mean")[0].tolist() == (
        pytest.approx([0.0, 0.5 * 0.95, 0.5 * 0.2])
    )
    nobody = torch.tensor([[one[1], one[2], one[2]]])
    assert not bonus(at, nobody, "mean").any() and not bonus(at, nobody, "none").any()


def test_every_mode_and_estimator_is_in_the_bench():
    benched = {variant.estimator for variant in all_variants()}
    shipped = {name for name, e in ESTIMATORS.items() if e.compute.__module__.startswith("rllib_")}
    assert benched == shipped
    modes = {variant.options["normalize"] for variant in gtpo_variants(0.9)}
    assert modes == set(ESTIMATORS["gtpo"].choices["normalize"])
    assert len({v.label for v in all_variants()}) == len(all_variants())
    assert len(gtpo_variants(1.0)) == 15 and len(other_variants()) == 9


def test_a_process_that_does_not_add_up_is_refused():
    with pytest.raises(ValueError, match="must sum to 1"):
        Process("p", "", {"a": Node("a", {"go": (Branch(0.5),)})}, {"a": 1.0})
    nodes = {"a": Node("s", {"go": (Branch(1.0, "b"),)}), "b": Node("s", {"no": (Branch(1.0),)})}
    with pytest.raises(ValueError, match="must have the actions"):
        Process("p", "", nodes, {"a": 1.0})


def test_command(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.json"
    words = ["credit_bias.py", "--process", "solved", "--estimator", "rloo", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    assert credit_bias.main() == 0
    written = json.loads(out.read_text())
    assert written["passed"] and {"direction_error", "scale_error"} <= set(written["thresholds"])
    assert {row["policy"] for row in written["metrics"]} == {"uniform", "trained"}
    monkeypatch.setattr(sys, "argv", ["credit_bias.py", "--process", "nowhere"])
    assert credit_bias.main() == 2
    assert "stop_or_go" in capsys.readouterr().err


def test_the_docs_show_the_recorded_results():
    recorded = json.loads((ROOT / "release" / "results" / "credit_bias.json").read_text())
    assert recorded["passed"] and recorded["thresholds"] == credit_bias.THRESHOLDS
    docs = (ROOT / "docs" / "credit_bias.md").read_text()
    assert docs.count("<!-- table: ") >= 5
    assert renewed(docs, tables(recorded["metrics"])) == docs


def test_recorded_rows_are_what_the_code_computes():
    recorded = json.loads((ROOT / "release" / "results" / "credit_bias.json").read_text())
    rows = {
        (r["process"], r["policy"], r["estimator"]): r
        for r in recorded["metrics"]
        if r["table"] == "estimators"
    }
    chosen = [v for v in all_variants() if not v.whole_step]
    for row in credit_bias.estimator_rows(PROCESSES[3], chosen, 16):
        known = rows[row["process"], row["policy"], row["estimator"]]
        for name in ("angle", "bias", "trajectories", "gain_64"):
            assert row[name] == pytest.approx(known[name], rel=1e-4, abs=1e-6)
