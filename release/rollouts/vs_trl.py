"""A training iteration on the calculator, here and with TRL's GRPOTrainer, and what each learns.

    python release/rollouts/vs_trl.py               # under ten minutes on two cores
    python release/rollouts/vs_trl.py --full        # 40 iterations instead of 20
    python release/rollouts/vs_trl.py --json FILE --plot FILE --markdown docs/speed.md

Both start from one cold-started directory and have the same two cores: after each iteration of TRL
comes one of ours, so that whatever else the machine does meets both.  Each sees the same 16 tasks
in the same order, samples 8 completions of each at temperature 1 with the same limits (24 tokens a
turn, 192 of turns and tool output together, turns), runs the same sandboxed tool, has the same
reward, and makes one AdamW step with the same learning rate, clipping and loss (a mean over
tokens).  For TRL that is its native tool loop over an environment with its interface around the
same calculator, and of its options those that are fastest on processors; it uses both cores by the
threads of its process.  We use them by two environment runners, each of which samples half of the
groups (`--runners 0`: in this process, as TRL does).

`forwards` and `positions` are of all runners; positions are what goes through the model, padding
included: in rollouts, and in the update.  `cpu_s` is the processor time of this process and of the
runners, the sandbox left out; `cpu_ratio` is ours by TRL's.

What differs: credit (ours each turn's, TRL's the trajectory's; `--ours grpo` for the same), random
numbers, and that an unclosed call is answered with an error here and run there, which fails.  TRL's
other ways to generate without a server, transformers' continuous batching and smaller batches of
the update, are slower on processors; two data-parallel processes of it are 7% faster than one.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as `rllib` does
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from ray.rllib.core import DEFAULT_MODULE_ID

from release.results import Report, markdown, renewed
from release.rollouts.start import save_cold_started
from rllib_gtpo import GRPOConfig, GTPOConfig
from rllib_gtpo.command.quiet import silence
from rllib_gtpo.env_runner import GroupJob, GTPOEnvRunner
from rllib_gtpo.episodes import trajectory_of
from rllib_gtpo.models import load_model, load_tokenizer
from rllib_gtpo_envs import Calculator

Row = dict[str, float]
SEED, PROMPTS, MEMBERS, LR = 0, 16, 8, 2e-4
TURN_TOKENS, COMPLETION_TOKENS = 24, 192
MICRO_BATCH = 128  # of TRL: the fastest here
TESTED = 256  # held-out tasks
WARM_UP = 2  # iterations that are not timed
THRESHOLDS = {
    "ratio": {"max": 0.5},
    "ours_gain": {"min": 0.1},
    "trl_gain": {"min": 0.1},
}
# The built-in template, and the calls of a message as the fenced format writes them.
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}"
    "{{ '```' + call['function']['name'] }}"
    "{% for name, value in call['function']['arguments'].items() %}"
    "{{ '\n' + (value if name == 'code' else name + value) + '\n```' }}"
    "{% endfor %}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
RESPONSE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open": "```python\n",
            "close_pattern": r"\n?```\s*",
            "repeats": True,
            "content": "text",
            "transform": {
                "type": "function",
                "function": {"name": "python", "arguments": {"code": "{content}"}},
            },
        },
        "content": {"close_pattern": r"<\|im_end\|>\s*", "content": "text"},
    },
}


class TRLCalculator:
    """The calculator behind the interface that TRL gives environments."""

    def __init__(self) -> None:
        self._calculator = Calculator()

    def reset(self, **row: Any) -> None:
        """Starts the row's task."""
        self._calculator.reset(options={"task": row})

    async def python(self, code: str) -> str:
        """Run Python and see what it prints and what is left of the chain.

        Args:
            code: the code.
        """
        return (await self._calculator.python(code)).content

    def _close(self) -> None:  # TRL takes every public method for a tool
        self._calculator.close()


def accuracy(completions: list[list[dict[str, Any]]], answer: list[str], **_: Any) -> list[float]:
    """1 for the right number as the whole answer: the calculator's own reward."""
    return [float(_answer(c) == right) for c, right in zip(completions, answer, strict=True)]


def _answer(completion: list[dict[str, Any]]) -> str | None:
    last = completion[-1]
    if last["role"] != "assistant" or last.get("tool_calls"):
        return None
    return str(last["content"]).strip()


class Clock:
    """Seconds in named parts of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def wrap(self, owner: Any, method: str, part: str) -> None:
        """From now on, `owner.method` is timed as `part`."""
        inner: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                taken = time.perf_counter() - began
                self.seconds[part] = self.seconds.get(part, 0.0) + taken

        setattr(owner, method, timed)

    def take(self) -> dict[str, float]:
        """What was measured since the last call."""
        seconds, self.seconds = self.seconds, {}
        return seconds


class Ours:
    """The algorithm, an iteration at a time."""

    def __init__(self, model: Path, longest_prompt: int, estimator: str, runners: int) -> None:
        config = (GRPOConfig() if estimator == "grpo" else GTPOConfig()).environment(Calculator)
        config.language_model(model=str(model), call_format="fenced")
        config.rollouts(max_turn_tokens=TURN_TOKENS, max_tokens=longest_prompt + COMPLETION_TOKENS)
        config.env_runners(num_env_runners=runners)
        config.training(
            lr=LR, group_size=MEMBERS, groups_per_step=PROMPTS, clip_low=0.2, clip_high=0.2
        )
        config.rewards(format_penalty=0.0).reporting(progress=False).debugging(seed=SEED)
        self.algorithm = config.build_algo()
        self.rows: list[Row] = []

    def step(self) -> None:
        """One iteration; its seconds, parts, accuracy, and what went through the model."""
        self._each_runner(lambda runner: runner.engine.reset_stats())
        began, cpu = time.perf_counter(), self._cpu_seconds()
        result = self.algorithm.train()
        seconds, cpu = time.perf_counter() - began, self._cpu_seconds() - cpu
        stats = self._each_runner(lambda runner: runner.engine.stats)
        learner = result["learners"][DEFAULT_MODULE_ID]
        self.rows.append(
            {
                "seconds": seconds,
                "cpu": cpu,
                "rollout": result["time"]["rollout_s"],
                "accuracy": result["accuracy"],
                "sampled": float(sum(s.tokens for s in stats)),
                "forwards": float(sum(s.forwards for s in stats)),
                "positions": float(sum(s.rows + s.prefill_computed for s in stats)),
                "trained_positions": float(learner["computed_tokens"]),
            }
        )

    @property
    def model(self) -> Any:
        """The trained model."""
        return self.algorithm.env_runner.module.model

    def _each_runner(self, call: Callable[[Any], Any]) -> list[Any]:
        """Of every runner, with that of this process, which samples only if there is no other."""
        answers: list[Any] = self.algorithm.env_runner_group.foreach_env_runner(call)
        return answers

    def _cpu_seconds(self) -> float:
        """Of this process and those of the runners, until now."""
        return sum(self._each_runner(lambda runner: time.process_time()))


class Counter:
    """Counts forwards and the positions that go through them, padding included: those of rollouts
    while `sampling`, others as trained."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.sampling = False
        self.reset()
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def reset(self) -> None:
        """Starts at zero."""
        self.forwards = self.positions = self.trained = 0

    def _count(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        count = kwargs["input_ids"].numel()
        if self.sampling:
            self.forwards += 1
            self.positions += count
        else:
            self.trained += count


class Theirs:
    """TRL's trainer; `after_step` is called between its iterations."""

    def __init__(
        self,
        model: Path,
        tasks: Sequence[Mapping[str, Any]],
        iterations: int,
        turns: int,
        scratch: Path,
        after_step: Callable[[], None],
    ) -> None:
        from datasets import Dataset
        from transformers.trainer_callback import PrinterCallback
        from trl import GRPOConfig as TRLConfig
        from trl import GRPOTrainer

        tokenizer = load_tokenizer(model, chat_template=TEMPLATE)
        tokenizer.response_template = RESPONSE
        tokenizer.padding_side = "left"
        rows = [
            {**task, "prompt": [{"role": "user", "content": task["question"]}]} for task in tasks
        ]
        settings = TRLConfig(
            output_dir=str(scratch / "trl"),
            max_steps=iterations,
            per_device_train_batch_size=MICRO_BATCH,
            gradient_accumulation_steps=PROMPTS * MEMBERS // MICRO_BATCH,
            num_generations=MEMBERS,
            max_completion_length=COMPLETION_TOKENS,
            max_tool_calling_iterations=turns - 1,
            generation_kwargs={"max_new_tokens": TURN_TOKENS},
            learning_rate=LR,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            epsilon=0.2,
            epsilon_high=0.2,
            beta=0.0,
            loss_type="dapo",
            temperature=1.0,
            shuffle_dataset=False,
            seed=SEED,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            optim="adamw_torch",
            save_strategy="no",
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
        )
        self.clock = Clock()
        self.rows: list[Row] = []
        self._environments: list[TRLCalculator] = []
        self.trainer = GRPOTrainer(
            model=load_model(model),
            reward_funcs=accuracy,
            args=settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            environment_factory=self._open,
            callbacks=[self._callback(after_step)],
        )
        self.trainer.remove_callback(PrinterCallback)
        self.counter = Counter(self.trainer.model)
        self._watch()

    def train(self) -> None:
        """All iterations."""
        self.trainer.train()

    @property
    def model(self) -> Any:
        """The trained model."""
        return self.trainer.model

    def close(self) -> None:
        """Ends the sessions of the environments, which TRL keeps."""
        for environment in self._environments:
            environment._close()

    def _open(self) -> TRLCalculator:
        self._environments.append(TRLCalculator())
        return self._environments[-1]

    def _watch(self) -> None:
        """Times what an iteration consists of, and counts the generation's forwards."""
        trainer = self.trainer
        generate = trainer._generate_single_turn

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.counter.sampling = True
            try:
                return generate(*args, **kwargs)
            finally:
                self.counter.sampling = False

        trainer._generate_single_turn = counted
        self.clock.wrap(trainer, "_generate_single_turn", "generation")
        self.clock.wrap(trainer, "_generate", "rollout")

    def _callback(self, after_step: Callable[[], None]) -> Any:
        from transformers import TrainerCallback

        theirs = self

        class Steps(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                theirs.counter.reset()
                theirs.clock.take()
                self.began, self.cpu = time.perf_counter(), time.process_time()

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                cpu = time.process_time() - self.cpu
                theirs._record(time.perf_counter() - self.began, cpu)
                after_step()

        return Steps()

    def _record(self, seconds: float, cpu: float) -> None:
        metrics = self.trainer._metrics["train"]
        count = PROMPTS * MEMBERS
        self.rows.append(
            {
                "seconds": seconds,
                "cpu": cpu,
                **self.clock.take(),
                "accuracy": metrics["rewards/accuracy/mean"][-1],
                "sampled": metrics["completions/mean_length"][-1] * count,
                "forwards": float(self.counter.forwards),
                "positions": float(self.counter.positions),
                "trained_positions": float(self.counter.trained),
            }
        )


class Tasks:
    """The training tasks in our order, and the accuracy of a model on held-out ones."""

    def __init__(self, model: Path) -> None:
        config = GTPOConfig().environment(Calculator).reporting(progress=False)
        config.language_model(model=str(model), call_format="fenced")
        config.rollouts(max_turn_tokens=TURN_TOKENS).debugging(seed=SEED)
        self._config = config
        self._runner = GTPOEnvRunner(config=config, env_creator=Calculator, worker_index=0)

    def first(self, count: int) -> list[Mapping[str, Any]]:
        """The first tasks that training will see."""
        found = (self._runner.tasks.find(position) for position in range(count))
        return [task for task in found if not isinstance(task, str)]

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt of any task."""
        codec, env = self._runner.codec, self._runner.env
        tasks = env.tasks("train")
        return max(len(codec.prompt_ids(env.first_messages(task))) for task in tasks)

    @property
    def turns(self) -> int:
        """Most turns of a trajectory."""
        return self._runner.env.turn_limit

    def held_out_accuracy(self, model: Any) -> float:
        """The share of held-out tasks that the model solves, at temperature 1."""
        runner = GTPOEnvRunner(
            config=self._config.copy(copy_frozen=False).update_from_dict({"in_evaluation": True}),
            env_creator=Calculator,
            worker_index=0,
        )
        runner.module.model.load_state_dict(model.state_dict())
        jobs = [GroupJob(p, 1, 0, "test") for p in range(TESTED)]
        trajectories = [trajectory_of(e) for e in runner.sample_groups(jobs).episodes]
        runner.stop()
        return sum(t.correct for t in trajectories) / len(trajectories)

    def close(self) -> None:
        """Ends the runner."""
        self._runner.stop()


def figures(side: str, rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Medians of one side's iterations, and its curve."""
    counted = rows[WARM_UP:]

    def mid(name: str) -> float:
        return median(row[name] for row in counted)

    return {
        "side": side,
        "seconds": mid("seconds"),
        "cpu_s": mid("cpu"),
        "rollout_s": mid("rollout"),
        "rest_s": median(row["seconds"] - row["rollout"] for row in counted),
        "sampled": mid("sampled"),
        "forwards": mid("forwards"),
        "positions": mid("positions"),
        "trained_positions": mid("trained_positions"),
        **({"generation_s": mid("generation")} if "generation" in counted[0] else {}),
        "curve": [round(row["accuracy"], 4) for row in rows],
        "each_s": [round(row["seconds"], 3) for row in rows],
    }


def compare(
    model: Path, iterations: int, estimator: str, runners: int, scratch: Path
) -> list[dict[str, Any]]:
    """Trains both, in turns; a row for each, and one of ratios."""
    tasks = Tasks(model)
    started_at = tasks.held_out_accuracy(load_model(model))
    ours = Ours(model, tasks.longest_prompt, estimator, runners)
    theirs = Theirs(
        model, tasks.first(iterations * PROMPTS), iterations, tasks.turns, scratch, ours.step
    )
    theirs.train()
    rows = []
    for side, done in (("ours", ours), ("trl", theirs)):
        ended_at = tasks.held_out_accuracy(done.model)
        row = figures(side, done.rows)
        row |= {"before": started_at, "after": ended_at, f"{side}_gain": ended_at - started_at}
        rows.append(row)
    ours.algorithm.stop()
    theirs.close()
    tasks.close()
    return [*rows, {"side": "ours/trl", **ratios(ours.rows, theirs.rows)}]


def ratios(ours: Sequence[Row], theirs: Sequence[Row]) -> Row:
    """Of the iterations after the first, pair by pair: ours by TRL's."""
    pairs = list(zip(ours[WARM_UP:], theirs[WARM_UP:], strict=True))
    wall = [mine["seconds"] / other["seconds"] for mine, other in pairs]
    cpu = median(mine["cpu"] / other["cpu"] for mine, other in pairs)
    return {"ratio": median(wall), "ratio_min": min(wall), "ratio_max": max(wall), "cpu_ratio": cpu}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of the docs."""
    head = ["", "s per iteration", "of it rollouts", "forwards of the rollouts"]
    head += ["positions in them", "and in the update", "sampled tokens", "held-out accuracy"]
    names = {"ours": "rllib_gtpo", "trl": "TRL"}
    body = [
        [
            names[row["side"]],
            f"{row['seconds']:.2f}",
            f"{row['rollout_s']:.2f}",
            f"{row['forwards']:.0f}",
            f"{row['positions']:.0f}",
            f"{row['trained_positions']:.0f}",
            f"{row['sampled']:.0f}",
            f"{row['before']:.2f} to {row['after']:.2f}",
        ]
        for row in rows
        if row["side"] in names
    ]
    return markdown(head, body)


def plot(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Accuracy of the training rollouts over iterations and over seconds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    for row in rows:
        if "curve" not in row:
            continue
        seconds = torch.tensor(row["each_s"]).cumsum(0).tolist()
        left.plot(range(1, len(row["curve"]) + 1), row["curve"], label=row["side"])
        right.plot(seconds, row["curve"], label=row["side"])
    left.set(xlabel="iteration", ylabel="accuracy of the rollouts", ylim=(0, 1))
    right.set(xlabel="seconds of its iterations")
    left.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains both and checks the thresholds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="40 iterations instead of 20")
    parser.add_argument("--iterations", type=int, help="instead of 20")
    parser.add_argument("--ours", choices=("gtpo", "grpo"), default="gtpo", help="our estimator")
    parser.add_argument("--runners", type=int, default=2, help="our environment runners (2)")
    parser.add_argument("--model", type=Path, metavar="DIR", help="a cold-started model")
    parser.add_argument("--cold-start", type=int, default=600, metavar="STEPS")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="renew the table in FILE")
    args = parser.parse_args(argv)
    silence()
    import ray

    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR")
    report = Report("vs_trl", THRESHOLDS, [SEED])
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model or Path(scratch) / "model"
        if not (model / "config.json").exists():
            save_cold_started(model, args.cold_start)
        iterations = args.iterations or (40 if args.full else 20)
        for row in compare(model, iterations, args.ours, args.runners, Path(scratch)):
            report.add(row)
    ray.shutdown()
    if args.plot:
        plot(report.rows, args.plot)
    if args.markdown:
        args.markdown.write_text(renewed(args.markdown.read_text(), {"vs_trl": table(report.rows)}))
    return report.finish(args.json)


if __name__ == "__main__":
    sys.exit(main())
