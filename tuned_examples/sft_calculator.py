"""The cold start of the calculator examples as a run of its own, for sweeps to begin from.

What: supervised training on demonstrations.  Trials of a sweep would each do it again; this does it
once, and the exported model is where all of them start (docs/sweeps.md).

    rllib train file tuned_examples/sft_calculator.py --out runs/cold_start
    rllib export runs/cold_start runs/cold_start/model
    rllib train file tuned_examples/sweep_gamma_shaping.py \
        --override model=runs/cold_start/model --override cold_start=null

Results to expect: a held-out loss of about 0.23 after 400 steps, in a minute on two cores.
"""

from rllib_gtpo import SFTConfig
from rllib_gtpo_envs import Calculator

config = (
    SFTConfig()
    .environment(Calculator)
    .language_model(
        call_format="fenced",
        cold_start={"data": "expert", "steps": 400, "batch_size": 32, "lr": 2e-3},
    )
    .rollouts(max_turn_tokens=24)
    .training(steps_per_iteration=100)
    .debugging(seed=0)
)
stop = {"training_iteration": 4}

if __name__ == "__main__":
    import sys

    from rllib_gtpo.cli import main

    sys.exit(main(["train", "file", __file__, *sys.argv[1:]]))
