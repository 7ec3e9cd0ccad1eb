"""GTPO on word problems with a Python session: a tiny model from scratch, on two CPU cores.

What: "Ann has 23 pens. Monday: gets 17 more. Tuesday: loses 8. How many pens has Ann now?", worked
out with one call of a Python tool per day; a call uses the variable of the one before, which the
session keeps.  The answer, in \\boxed{}, is graded by value.  The environment is the one for real
datasets (see `rllib_gtpo_envs.PythonMath`), without a dataset.  The policy is a Qwen2 of 0.3 M
parameters made from a config.

How: a cold start on demonstrations of mixed behaviour (two in five solve the task; the others
guess, stop early, or ignore an error) teaches the skill and leaves the behaviour to be learned.
Then GTPO: 16 groups of 8 rollouts an iteration.

    rllib train file tuned_examples/gtpo_python_math_tiny.py
    python tuned_examples/gtpo_python_math_tiny.py --stop training_iteration=5

Results to expect: held-out accuracy, sampled at temperature 1 on 256 problems of the test split,
went from 0.31 after the cold start to 0.92 after 25 iterations; calls that fail went from 0.15 to
0.01.  The run took six minutes on two cores that other work kept busy.
"""

from rllib_gtpo import GTPOConfig
from rllib_gtpo.models import build_tokenizer
from rllib_gtpo_envs import PythonMath
from rllib_gtpo_envs.word_problems import MARKUP

ITERATIONS = 25

config = (
    GTPOConfig()
    .environment(PythonMath)
    .language_model(
        tokenizer=build_tokenizer(MARKUP),
        call_format="fenced",
        cold_start={"data": "expert", "steps": 1000, "batch_size": 32, "lr": 2e-3},
    )
    .rollouts(max_turn_tokens=16)
    .training(lr=2e-4, group_size=8, groups_per_step=16)
    .evaluation(evaluation_interval=ITERATIONS, evaluation_duration=256, split="test")
    .debugging(seed=0)
)
stop = {"training_iteration": ITERATIONS}

if __name__ == "__main__":
    import sys

    from rllib_gtpo.cli import main

    sys.exit(main(["train", "file", __file__, *sys.argv[1:]]))
