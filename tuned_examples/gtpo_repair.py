"""GTPO on the repair task: a tiny model learns not to try again what was seen to be wrong.

What: programs of three lines, two of which have a wrong operator.  Each submission is run, and the
answer says which lines are still wrong; the task ends when none is.  The policy is a Qwen2
of 0.3 M parameters made from a config, with a tokenizer that has a token for each operator in each
line.

How: a cold start on demonstrations of mixed behaviour (one in ten is careful; the others change
lines that were right, repeat what was wrong, or give up), then GTPO: 8 groups of 8 rollouts an
iteration.

    rllib train file tuned_examples/gtpo_repair.py
    python tuned_examples/gtpo_repair.py --stop training_iteration=5

Results to expect: not measured yet, neither the cold start's nor the training's.
"""

from rllib_gtpo import GTPOConfig
from rllib_gtpo.models import build_tokenizer
from rllib_gtpo_envs import Repair
from rllib_gtpo_envs.repair import MARKUP

ITERATIONS = 20

config = (
    GTPOConfig()
    .environment(Repair)
    .language_model(
        tokenizer=build_tokenizer(MARKUP),
        call_format="fenced",
        cold_start={"data": "expert", "steps": 600, "batch_size": 32, "lr": 2e-3},
    )
    .rollouts(max_turn_tokens=24)
    .training(lr=2e-4, group_size=8, groups_per_step=8)
    .evaluation(evaluation_interval=ITERATIONS, evaluation_duration=256, split="test")
    .debugging(seed=0)
)
stop = {"training_iteration": ITERATIONS}

if __name__ == "__main__":
    import sys

    from rllib_gtpo.cli import main

    sys.exit(main(["train", "file", __file__, *sys.argv[1:]]))
