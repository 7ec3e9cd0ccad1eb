"""ASHA looks for a learning rate and a clip on the calculator task; most trials end early.

What: six draws of three settings, two trials at a time.  ASHA compares trials after two and four
iterations and lets the better half go on.

How: samplers such as `tune.loguniform` in place of values, and a `tune_config` with a scheduler.
What a trial takes of the machine, and sharing one cold start: docs/sweeps.md.

    rllib train file tuned_examples/sweep_asha.py
    python tuned_examples/sweep_asha.py --stop training_iteration=2

Results to expect: draws differ from run to run.  Trials with lr below 1.5e-4 end after two
iterations with the 0.48 that they began with; 3e-4 reaches 0.78 in four, and 7e-4 reaches 0.84 and
falls again.  About five minutes on two cores.
"""

from ray import tune
from ray.tune.schedulers import ASHAScheduler

from rllib_gtpo import GTPOConfig
from rllib_gtpo_envs import Calculator

ITERATIONS = 8

config = (
    GTPOConfig()
    .environment(Calculator)
    .language_model(
        call_format="fenced",
        cold_start={"data": "expert", "steps": 400, "batch_size": 32, "lr": 2e-3},
    )
    .rollouts(max_turn_tokens=24)
    .training(
        lr=tune.loguniform(1e-5, 1e-3),
        clip_high=tune.uniform(0.2, 0.4),
        group_size=tune.choice([4, 8]),
        groups_per_step=8,
    )
    .resources(num_cpus_for_main_process=0.5)
    .learners(num_cpus_per_learner=0.5)
    .debugging(seed=0)
)
stop = {"training_iteration": ITERATIONS}
tune_config = tune.TuneConfig(
    metric="accuracy",
    mode="max",
    num_samples=6,
    max_concurrent_trials=2,
    scheduler=ASHAScheduler(max_t=ITERATIONS, grace_period=2, reduction_factor=2),
)

if __name__ == "__main__":
    import sys

    from rllib_gtpo.cli import main

    sys.exit(main(["train", "file", __file__, *sys.argv[1:]]))
