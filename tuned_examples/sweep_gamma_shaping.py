"""A grid of discount and shaping on the calculator task, two trials at a time on two CPU cores.

What: does it pay to discount later turns (gamma), and to give failed rollouts partial credit
(shaping)?  Four combinations from the same cold start settings and seed.

How: `tune.grid_search` in place of a value makes a sweep of any experiment file.  Each trial takes
half a core of Ray's bookkeeping, so that two run at once where one thread each is enough; see
docs/sweeps.md, also for sharing one cold start among all trials.

    rllib train file tuned_examples/sweep_gamma_shaping.py
    python tuned_examples/sweep_gamma_shaping.py --stop training_iteration=2

Results to expect: accuracy goes from 0.48 to about 0.86 within 8 iterations for all four, which so
short runs cannot tell apart; four to five minutes.  The table at the end names the best, and
sweep.html in the run's directory draws the curves and the grid.
"""

from ray import tune

from rllib_gtpo import GTPOConfig
from rllib_gtpo_envs import Calculator

config = (
    GTPOConfig()
    .environment(Calculator)
    .language_model(
        call_format="fenced",
        cold_start={"data": "expert", "steps": 400, "batch_size": 32, "lr": 2e-3},
    )
    .rollouts(max_turn_tokens=24)
    .training(lr=2e-4, gamma=tune.grid_search([0.9, 1.0]), group_size=8, groups_per_step=8)
    .rewards(shaping=tune.grid_search(["none", "mean"]))
    .resources(num_cpus_for_main_process=0.5)
    .learners(num_cpus_per_learner=0.5)
    .debugging(seed=0)
)
stop = {"training_iteration": 8}
tune_config = tune.TuneConfig(metric="accuracy", mode="max", max_concurrent_trials=2)

if __name__ == "__main__":
    import sys

    from rllib_gtpo.cli import main

    sys.exit(main(["train", "file", __file__, *sys.argv[1:]]))
