"""GTPO on GSM8K with a Python tool: Qwen2.5-0.5B-Instruct, on one GPU of 24 GiB.

What: grade school problems; the model may run Python, in a session that lasts as long as the
rollout, and answers with \\boxed{}.  The answer is graded by value.  Model and data set are fetched
from the Hugging Face hub when the run starts.

How: no cold start, since the model knows Qwen's tool calls.  16 groups of 8 rollouts an iteration,
of at most 4 turns and 1024 tokens, prompt included.  Learner, rollouts and evaluation are three
processes that share the GPU, each with its own copy of the weights (494 M parameters, 1.84 GiB as
float32; with bfloat16 weights an update of lr 1e-6 would be rounded away):

    learner      weights, gradients and two moments of AdamW         4 x 1.84    7.4 GiB
                 activations, 2.5 MiB a token, of `token_budget` tokens           2.5
                 log-probabilities: 3 x 1024 x 151,936 floats, head's gradient    2.3
    two runners  weights                                             2 x 1.84    3.7
                 keys and values, 24 KiB a token, of `cache_tokens`  2 x 1.1     2.3
    three CUDA contexts and what runs in between, about                          2.0
                                                                        sum     20.2 GiB

That is arithmetic, not a measurement on such a GPU.  On a CPU, a backward pass over 1024 tokens
before AdamW has moments peaked at 7.1 GiB, where the lines above add up to 8.5.  For less memory
lower `engine_config.cache_tokens`, or leave out the evaluation's runner:
`--override evaluation_interval=null --override evaluation_num_env_runners=0`.

    rllib train file tuned_examples/gtpo_qwen2_5_0_5b_gsm8k.py
    rllib train file tuned_examples/gtpo_qwen2_5_0_5b_gsm8k.py --override estimator=grpo_sum

    # All 1,319 test problems, 8 rollouts each: avg@8, pass@8, maj@8 with 95% intervals.
    rllib evaluate runs/NAME --split test --samples-per-task 8

Results to expect: not measured yet.  Before it learns anything, `tool/invalid_rate` should be well
below a half; if it is not, cold start it on demonstrations (cold_start.data, `rllib convert`).
Rollouts run on transformers' own forward passes; expect them to take most of the time.
"""

from rllib_gtpo import GTPOConfig
from rllib_gtpo_envs import PythonMath

ITERATIONS = 100

config = (
    GTPOConfig()
    .environment(PythonMath, env_config={"tasks": "openai/gsm8k:main", "columns": "gsm8k"})
    .language_model(model="Qwen/Qwen2.5-0.5B-Instruct", call_format="hermes", dtype="float32")
    .rollouts(
        max_turns=4,
        max_turn_tokens=256,
        max_tokens=1024,
        engine_config={"max_batch": 64, "cache_tokens": 48 * 1024},
    )
    .env_runners(num_env_runners=1, num_gpus_per_env_runner=0.3)
    .learners(num_gpus_per_learner=0.4)
    .training(lr=1e-6, gamma=0.9, group_size=8, groups_per_step=16, token_budget=1024)
    .evaluation(
        evaluation_interval=20,
        evaluation_num_env_runners=1,
        evaluation_duration=256,
        split="test",
    )
    .debugging(seed=0)
)
stop = {"training_iteration": ITERATIONS}

if __name__ == "__main__":
    import sys

    from rllib_gtpo.cli import main

    sys.exit(main(["train", "file", __file__, *sys.argv[1:]]))
