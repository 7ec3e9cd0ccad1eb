"""GTPO as its paper trained it: Qwen2.5-7B-Instruct on DAPO-17K with a Python tool.

What: a cold start on 1.2K pairs of problem and trajectory, then 40 iterations of 1024 rollouts with
lr 1e-6, gamma 0.9, and partial credit (alpha 0.5) for failed rollouts whose code resembles that of
correct ones.  Evaluated on AIME 2024, MATH-500 and SVAMP as avg@8, pass@k and maj@8, each with its
95% interval, under `evaluation/split/NAME/`.  Problems of these sets, and near copies of them, are
left out of the training data.

What must come before it is practical: this package has, today, no sharding, no LoRA, no activation
checkpointing; its vLLM engine was never run on a GPU.  As float32, 7.6 G parameters are 28.4 GiB; a
learner holds
weights, gradients and two moments, 113.5 GiB, and 11.3 MiB of activations for each token of
`token_budget`, 45 GiB for 4096.  That is more than a GPU of 80 or 141 GiB has, and more learners
do not make it less: each holds all of it.  (As bfloat16 the half would do, but updates of lr 1e-6
would be rounded away.)  Rollouts run on transformers' forward passes, with 28.4 GiB of weights and
112 KiB a token of keys and values on each runner's GPU; 1024 of them, of up to 4096 tokens, take
long, and as many GPUs again wait for the evaluations.  So this file is the protocol in settings
that exist, and a test runs it on a tiny model; gtpo_qwen2_5_0_5b_gsm8k.py is for a GPU of today.

How: `cold_start.data` is a JSON-lines file of yours.  Best are rows with the environment's own
prompt, {"task": {"question": ..., "answer": ...}, "messages": [assistant, tool, ...]}; `rllib
convert IN OUT --from sharegpt` makes rows of traces (see rllib_gtpo.traces).

    rllib train file tuned_examples/gtpo_qwen2_5_7b_dapo.py --override cold_start.data=FILE
    rllib train file tuned_examples/gtpo_qwen2_5_7b_dapo.py --override embedder=titan

The paper embeds with Amazon Titan, which needs AWS credentials and sends the code there; the
default here works offline.  Not known to us, and decided here: groups of 8 (so 128 problems an
iteration), the limits of turns and tokens, the cold start's schedule, the temperature, and 8
samples per task.

Results to expect: not measured here.  The paper's abstract reports +3.0% relative over GRPO on
average, on five mathematical sets, of which the two unnamed ones are missing here.
"""

from rllib_gtpo import GTPOConfig
from rllib_gtpo_envs import PythonMath

ITERATIONS = 40
SAMPLES = 8
LARGEST_SET = 500

config = (
    GTPOConfig()
    .environment(
        PythonMath,
        env_config={
            "tasks": {
                "train": "BytedTsinghua-SIA/DAPO-Math-17k",
                "aime24": "HuggingFaceH4/aime_2024[train]",
                "math500": "HuggingFaceH4/MATH-500[test]",
                "svamp": "ChilleD/SVAMP[test]",
            },
            "columns": {
                "train": "dapo-math-17k",
                "aime24": "aime-2024",
                "math500": "math-500",
                "svamp": "svamp",
            },
        },
    )
    .language_model(
        model="Qwen/Qwen2.5-7B-Instruct",
        call_format="hermes",
        cold_start={
            "data": "dapo_trajectories.jsonl",
            "demonstrations": 1200,
            "steps": 108,  # about three times through them
            "batch_size": 32,
            "lr": 1e-5,
        },
    )
    .rollouts(max_turns=6, max_turn_tokens=1536, max_tokens=4096)
    .env_runners(num_env_runners=7, num_gpus_per_env_runner=1)
    .learners(num_gpus_per_learner=1)
    .training(lr=1e-6, gamma=0.9, group_size=8, groups_per_step=128, token_budget=4096)
    .rewards(shaping="mean", shaping_alpha=0.5, embedder="python_tokens")
    .evaluation(
        evaluation_interval=10,
        evaluation_num_env_runners=7,
        evaluation_duration=SAMPLES * LARGEST_SET,
        samples_per_task=SAMPLES,
        split=["aime24", "math500", "svamp"],
    )
    .debugging(seed=0)
)
stop = {"training_iteration": ITERATIONS}

if __name__ == "__main__":
    import sys

    from rllib_gtpo.cli import main

    sys.exit(main(["train", "file", __file__, *sys.argv[1:]]))
