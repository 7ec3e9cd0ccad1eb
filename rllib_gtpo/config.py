"""Every setting, by its one name: fluent calls in Python, the same keys flat in YAML and
overrides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ray.rllib.algorithms.algorithm_config import AlgorithmConfig, NotProvided
from ray.rllib.core.rl_module.rl_module import RLModuleSpec

from rllib_gtpo.chat import ChatCodec
from rllib_gtpo.checks import DEFAULT_GAMMA, check
from rllib_gtpo.engines.base import RolloutEngine
from rllib_gtpo.errors import ConfigError, did_you_mean
from rllib_gtpo.models import TINY_QWEN2, load_tokenizer
from rllib_gtpo.ops.losses import Objective
from rllib_gtpo.optimizers import LRSchedule, build_optimizer
from rllib_gtpo.record.settings import DEFAULT_SHARE, RecordSettings
from rllib_gtpo.rewards.embedders import build_embedder
from rllib_gtpo.rewards.overlong import OverlongPenalty
from rllib_gtpo.rewards.rubric import Rubric
from rllib_gtpo.rewards.shaping import Shaping
from rllib_gtpo.strategies.base import Strategy

# RLlib's own attribute `model` is a dict of the old stack; ours is kept under another name.
_ATTRIBUTE = {
    "model": "language_model_source",
    "split": "evaluation_split",
    "samples_per_task": "evaluation_samples_per_task",
}


class GTPOConfig(AlgorithmConfig):
    """Configuration of GTPO.

    Example:
        ```python
        config = (
            GTPOConfig()
            .environment(Handbook)
            .language_model(model="Qwen/Qwen2.5-0.5B-Instruct")
            .training(lr=1e-6, group_size=8, groups_per_step=16)
        )
        ```
    """

    ALGORITHM: ClassVar[str] = "GTPO"
    ESTIMATOR: ClassVar[str] = "gtpo"
    engine_pool: str | None = None  # the name of the vLLM engines, set by who starts them
    learner_bundles: Any = None  # the placement group of learners, if they share it with engines

    def __init__(self, algo_class: Any = None) -> None:
        super().__init__(algo_class=algo_class or self._algorithm_class())
        # language_model
        self.language_model_source: Any = dict(TINY_QWEN2)
        self.tokenizer: Any = None
        self.chat_template: str | None = None
        self.dtype = "float32"
        self.call_format = "hermes"
        self.lora: dict[str, Any] | None = None
        self.cold_start: dict[str, Any] | None = None
        # rollouts
        self.engine = "hf"
        self.engine_config: dict[str, Any] = {}
        self.num_engines = 1
        self.placement = "separate"
        self.temperature = 1.0
        self.top_p = 1.0
        self.max_turns: int | None = None
        self.max_turn_tokens = 512
        self.max_tokens: int | None = None
        self.max_concurrency = 256
        self.max_invalid_calls: int | None = None
        self.stragglers = "wait"
        self.oversample = 0.0
        # learners
        self.strategy = "auto"
        self.strategy_options: dict[str, Any] = {}
        self.activation_checkpointing = False
        self.torch_compile = False
        # training
        self.lr = 1e-6
        self.gamma = DEFAULT_GAMMA
        self.grad_clip = 1.0
        self.group_size = 8
        self.groups_per_step = 16
        self.estimator = self.ESTIMATOR
        self.estimator_options: dict[str, Any] = {}
        self.uniform_groups = "keep"
        self.resample_groups = 0
        self.overlong = "keep"
        self.overlong_penalty = 1.0
        self.overlong_buffer: int | None = None
        for name in _objective_names():
            setattr(self, name, getattr(Objective(), name))
        self.mini_batches = 1
        self.epochs = 1
        self.token_budget = 16_384
        self.optimizer: dict[str, Any] = {"name": "AdamW", "weight_decay": 0.0}
        self.lr_schedule: dict[str, Any] | None = None
        # rewards
        self.format_penalty = 0.1
        self.penalize_tool_errors = 0.0
        self.shaping = "none"
        self.shaping_alpha = 0.5
        self.shaping_input = "code"
        self.embedder: str | dict[str, Any] = "python_tokens"
        self.on_embedder_failure = "stop"
        # evaluation
        self.evaluation_split = "validation"
        self.evaluation_samples_per_task = 1
        self.evaluation_temperature = 1.0
        # reporting, debugging
        self.progress = True
        self.record: str | float | dict[str, Any] = DEFAULT_SHARE
        self.deterministic = False
        self._rllib_defaults()

    @classmethod
    def _algorithm_class(cls) -> Any:
        from rllib_gtpo.algorithm import GTPO

        return GTPO

    def _rllib_defaults(self) -> None:
        """RLlib settings whose stock values do not fit whole-group text rollouts."""
        from rllib_gtpo.env_runner import GTPOEnvRunner
        from rllib_gtpo.evaluation import evaluate_split

        self.framework_str = "torch"
        self.env_runner_cls = GTPOEnvRunner
        self.num_env_runners = 0
        self.create_local_env_runner = True
        self.batch_mode = "complete_episodes"
        self.sample_timeout_s = None
        self.episodes_to_numpy = False
        self.merge_env_runner_states = False
        self.broadcast_env_runner_states = False
        self.add_default_connectors_to_env_to_module_pipeline = False
        self.add_default_connectors_to_module_to_env_pipeline = False
        self.add_default_connectors_to_learner_pipeline = False
        self.restart_failed_env_runners = True
        self.log_gradients = False
        self.custom_evaluation_function = evaluate_split
        self.evaluation_duration = 256
        self.evaluation_duration_unit = "episodes"

    # Fluent calls.

    def language_model(
        self,
        *,
        model: Any = NotProvided,
        tokenizer: Any = NotProvided,
        chat_template: str | None = NotProvided,
        dtype: str = NotProvided,
        call_format: str = NotProvided,
        lora: dict[str, Any] | None = NotProvided,
        cold_start: dict[str, Any] | None = NotProvided,
    ) -> GTPOConfig:
        """The policy.

        Args:
            model: A directory, a hub id, or a dict with which a model is made from scratch.
            tokenizer: The same for the tokenizer; None takes the model's.
            chat_template: Text or file of a template, in place of the tokenizer's.
            dtype: "float32" or "bfloat16", of what learners and engines compute with.  Learners
                step on float32 weights even so, or small updates would be rounded away.
            call_format: How the policy writes tool calls: "hermes", "llama3_json", "mistral",
                "mistral_args", "qwen3_coder", "glm", "response_template" (the tokenizer's own),
                "auto" (what the chat template writes), "fenced", or one of your own
                (`rllib_gtpo.chat.register_call_format`).
            lora: Train an adapter of low rank and leave the model as it is: {"rank": 8, "alpha":
                16, "targets": "all-linear" or a list, "dropout", "rslora"}; see
                rllib_gtpo.lora.LoRASettings.  Needs the extra `lora`.
            cold_start: Supervised training before RL: {"data": "expert" or a path, "steps",
                "batch_size", "lr", ...}; see rllib_gtpo.cold_start.ColdStart, and
                rllib_gtpo.traces for what a file holds.
        """
        return self._set(
            model=model,
            tokenizer=tokenizer,
            chat_template=chat_template,
            dtype=dtype,
            call_format=call_format,
            lora=lora,
            cold_start=cold_start,
        )

    def rollouts(
        self,
        *,
        engine: str = NotProvided,
        engine_config: dict[str, Any] = NotProvided,
        num_engines: int = NotProvided,
        placement: str = NotProvided,
        temperature: float = NotProvided,
        top_p: float = NotProvided,
        max_turns: int | None = NotProvided,
        max_turn_tokens: int = NotProvided,
        max_tokens: int | None = NotProvided,
        max_concurrency: int = NotProvided,
        max_invalid_calls: int | None = NotProvided,
        stragglers: str = NotProvided,
        oversample: float = NotProvided,
    ) -> GTPOConfig:
        """How trajectories are sampled.

        Args:
            engine: "hf", in the process of each env runner, or "vllm", actors of their own.
            engine_config: Keyword arguments of rllib_gtpo.engines.hf.HFEngine, or those of vLLM's
                AsyncEngineArgs and "weight_transfer"; see docs/vllm.md.
            num_engines: How many vLLM engines all env runners share.
            placement: "separate", vLLM engines on devices of their own, or "shared": each has the
                device of a learner, and sleeps while that one works; see docs/placement.md.
            temperature: Of sampling, and of the log-probabilities that are trained.
            top_p: Nucleus sampling; below 1 the sampler is no longer the policy, see the docs.
            max_turns: Most turns of a trajectory; None leaves it to the environment.
            max_turn_tokens: Most tokens of one turn.
            max_tokens: Most tokens of a trajectory, prompt and tool output included; None: the
                model's.
            max_concurrency: Trajectories (and their environments) open at a time per env runner.
            max_invalid_calls: Turns in a row whose calls are all invalid that end a trajectory;
                None leaves it to the environment.
            stragglers: "wait" for every group, or "drop" the slowest, whose tasks come first in the
                next step and are not dropped again; see docs/rollouts.md.
            oversample: With "drop", the share of groups that are rolled out beyond those needed.
        """
        return self._set(
            engine=engine,
            engine_config=engine_config,
            num_engines=num_engines,
            placement=placement,
            temperature=temperature,
            top_p=top_p,
            max_turns=max_turns,
            max_turn_tokens=max_turn_tokens,
            max_tokens=max_tokens,
            max_concurrency=max_concurrency,
            max_invalid_calls=max_invalid_calls,
            stragglers=stragglers,
            oversample=oversample,
        )

    def learners(
        self,
        *,
        strategy: str = NotProvided,
        strategy_options: dict[str, Any] = NotProvided,
        activation_checkpointing: bool = NotProvided,
        torch_compile: bool = NotProvided,
        **rllib: Any,
    ) -> GTPOConfig:
        """How the model is spread over learners.

        Args:
            strategy: "single", "ddp", "fsdp2", "deepspeed"; "auto": "ddp" for two learners or
                more.
            strategy_options: fsdp2: offload.  deepspeed: stage (1, 2, 3), offload, config.
            activation_checkpointing: Keep the inputs of layers only, and compute each layer again
                in the backward pass: about a third more time for much less memory.
            torch_compile: Compile each layer; on CPU this needs a C++ compiler.
            **rllib: RLlib's own: num_learners, num_gpus_per_learner, ...
        """
        super().learners(**rllib)
        return self._set(
            strategy=strategy,
            strategy_options=strategy_options,
            activation_checkpointing=activation_checkpointing,
            torch_compile=torch_compile,
        )

    def training(
        self,
        *,
        group_size: int = NotProvided,
        groups_per_step: int = NotProvided,
        estimator: str = NotProvided,
        estimator_options: dict[str, Any] = NotProvided,
        uniform_groups: str = NotProvided,
        resample_groups: int = NotProvided,
        overlong: str = NotProvided,
        overlong_penalty: float = NotProvided,
        overlong_buffer: int | None = NotProvided,
        clip_low: float = NotProvided,
        clip_high: float = NotProvided,
        dual_clip: float | None = NotProvided,
        kl_coeff: float = NotProvided,
        kl_estimator: str = NotProvided,
        aggregation: str = NotProvided,
        constant: float | None = NotProvided,
        ratio_level: str = NotProvided,
        importance_sampling: str = NotProvided,
        importance_cap: float = NotProvided,
        entropy_coeff: float = NotProvided,
        mini_batches: int = NotProvided,
        epochs: int = NotProvided,
        token_budget: int = NotProvided,
        optimizer: dict[str, Any] = NotProvided,
        lr_schedule: dict[str, Any] | None = NotProvided,
        **kwargs: Any,
    ) -> GTPOConfig:
        """Credit, objective and optimisation; `lr`, `gamma`, `grad_clip` are RLlib's.

        Args:
            group_size: Trajectories of one prompt.
            groups_per_step: Prompts of one iteration.
            estimator: Who gets credit: "gtpo", "grpo", "grpo_sum", ... (rllib_gtpo.ops.advantages).
            estimator_options: Its options, e.g. {"normalize": "group"}.
            uniform_groups: "keep" all groups, "drop_solved" ones, or "drop" also those whose
                members cannot be told apart; see rllib_gtpo.connectors.learner.CreditRule.keeps.
            resample_groups: Most groups that a step samples in place of dropped ones.
            overlong: Trajectories that max_tokens or max_turn_tokens cut off: "keep" them like any
                other; "mask" their tokens in the loss, while their group is still compared with
                them (DAPO's overlong filtering); or "penalty": DAPO's soft punishment of long ones
                before they reach max_tokens, as the reward component "overlong".
            overlong_penalty: What reaching max_tokens costs.
            overlong_buffer: How many tokens before max_tokens the penalty starts; None: a fifth.
            clip_low, clip_high, dual_clip, ratio_level, aggregation, constant: See
                rllib_gtpo.ops.losses.Objective.
            kl_coeff, kl_estimator, importance_sampling, importance_cap, entropy_coeff: See the
                same.
            mini_batches: Optimizer steps per pass over an iteration's groups.
            epochs: Passes over an iteration's groups.
            token_budget: Tokens of a micro-batch, padding included; memory, not the result.  A
                longer trajectory gets one of its own, counted as `packing/over_budget`.
            optimizer: {"name": a class of torch.optim, ...its keyword arguments}.
            lr_schedule: {"warmup": iterations, "decay": "linear" or "cosine", "iterations" of the
                run, "final_frac"}; see rllib_gtpo.optimizers.LRSchedule.
        """
        super().training(**kwargs)
        given = {k: v for k, v in locals().items() if k not in ("self", "kwargs", "__class__")}
        return self._set(**given)

    def rewards(
        self,
        *,
        format_penalty: float = NotProvided,
        penalize_tool_errors: float = NotProvided,
        shaping: str = NotProvided,
        shaping_alpha: float = NotProvided,
        shaping_input: str = NotProvided,
        embedder: str | dict[str, Any] = NotProvided,
        on_embedder_failure: str = NotProvided,
    ) -> GTPOConfig:
        """Reward components besides the environment's.

        Args:
            format_penalty, penalize_tool_errors: See rllib_gtpo.rewards.Rubric.
            shaping: Partial credit for failed trajectories, by the similarity of their code to that
                of correct siblings: "none", "mean", "max", or a control, "constant" or "shuffled".
            shaping_alpha: What a perfect copy of correct code is worth.
            shaping_input: What is compared: "code", or the whole "trajectory".
            embedder: "python_tokens" (offline), "titan", or a dict with its settings; see
                rllib_gtpo.rewards.embedders.
            on_embedder_failure: "stop" with the error, or "skip" shaping in the groups concerned,
                counted as `env_runners/unshaped_groups`.
        """
        given = {k: v for k, v in locals().items() if k != "self"}
        return self._set(**given)

    def evaluation(
        self,
        *,
        split: str | list[str] = NotProvided,
        samples_per_task: int = NotProvided,
        temperature: float = NotProvided,
        **kwargs: Any,
    ) -> GTPOConfig:
        """RLlib's evaluation settings, and what to evaluate on.

        Args:
            split: The environment's split, or several, each a dataset of its own whose results are
                under `evaluation/split/NAME/`.  `evaluation_duration` counts trajectories of each.
            samples_per_task: Trajectories per task; above 1 there are pass@k and maj@k, too.
            temperature: Of sampling during evaluation.
            **kwargs: RLlib's `evaluation_interval`, `evaluation_duration`, ...  With
                `evaluation_parallel_to_training=True` and `evaluation_num_env_runners` above 0 an
                evaluation is of the weights that its iteration starts with.  See
                docs/evaluation.md.
        """
        own = {
            name: kwargs.pop(f"evaluation_{name}", value)
            for name, value in (
                ("split", split),
                ("samples_per_task", samples_per_task),
                ("temperature", temperature),
            )
        }
        super().evaluation(**kwargs)
        return self._set(**{f"evaluation_{name}": value for name, value in own.items()})

    def reporting(
        self,
        *,
        progress: bool = NotProvided,
        record: str | float | dict[str, Any] = NotProvided,
        **kwargs: Any,
    ) -> GTPOConfig:
        """RLlib's reporting settings, and what a run says of itself.

        Args:
            progress: Whether to draw progress bars.
            record: Which share of each iteration's groups is recorded with all that was sampled and
                learned, 0 to 1, or "none"; or {"share": 0.25, "path": "s3://bucket/records"} for
                a place other than the run's directory.  See docs/record.md.
            **kwargs: RLlib's.
        """
        super().reporting(**kwargs)
        return self._set(progress=progress, record=record)

    def debugging(self, *, deterministic: bool = NotProvided, **kwargs: Any) -> GTPOConfig:
        """RLlib's `seed` and more.

        Args:
            deterministic: Engine and tools step in a fixed order, so that tokens, rewards and
                metrics (times aside) repeat exactly under one seed.  Slower where tools are slow.
            **kwargs: RLlib's.
        """
        super().debugging(**kwargs)
        return self._set(deterministic=deterministic)

    def _set(self, **settings: Any) -> GTPOConfig:
        for name, value in settings.items():
            if value is not NotProvided:
                setattr(self, _ATTRIBUTE.get(name, name), value)
        return self

    # Dicts, YAML, overrides.

    def attribute_name(self, key: str) -> str:
        """Where the setting `key` is kept."""
        return _ATTRIBUTE.get(key, key)

    def update_from_dict(self, config_dict: Mapping[str, Any]) -> GTPOConfig:
        """RLlib's, but an unknown key is an error that names the nearest valid one."""
        known = self.setting_names()
        translated: dict[str, Any] = {}
        for key, value in config_dict.items():
            if key == "model" and isinstance(value, Mapping) and "fcnet_hiddens" in value:
                continue  # RLlib's old-stack attribute, from a config that was turned into a dict
            if key == "model_config":
                raise ConfigError(
                    "model_config is set by language_model(); use model, dtype, ... instead."
                )
            if key.startswith("__") and key.endswith("__"):
                continue  # Tune's own additions
            if key not in known:
                public = [name for name in known if not name.startswith("_")]
                raise ConfigError(f"unknown setting {key!r}{did_you_mean(key, public)}")
            if key == "env_config" and isinstance(value, Mapping):
                value = {**self.env_config, **value}
            translated[_ATTRIBUTE.get(key, key)] = value
        optimizer = translated.pop("optimizer", None)
        super().update_from_dict(translated)
        if optimizer is not None:
            self.optimizer = dict(optimizer)
        return self

    def setting_names(self) -> set[str]:
        """Every key that `update_from_dict` takes."""
        own = {name for name in vars(self) if name != "_is_frozen"}
        return own | set(self.to_dict()) | set(_ATTRIBUTE)

    # What the settings make.

    def build_codec(self) -> ChatCodec:
        """Tokenizer, template and call format."""
        return ChatCodec(self.load_tokenizer(), self.call_format)

    def load_tokenizer(self) -> Any:
        """The policy's tokenizer with its template."""
        source = self.tokenizer if self.tokenizer is not None else self.language_model_source
        return load_tokenizer(source, chat_template=self.chat_template)

    @property
    def record_settings(self) -> RecordSettings:
        """What `record` says."""
        return RecordSettings.of(self.record)

    def build_strategy(self) -> Strategy:
        """How the model is spread over learners."""
        from rllib_gtpo.strategies import build_strategy

        return build_strategy(
            self.strategy,
            self.strategy_options,
            self.num_learners,
            self.dtype,
            # An adapter's weights are float32 already.
            master_weights=self.dtype == "bfloat16" and self.lora is None,
        )

    def build_learner_group(self, **kwargs: Any) -> Any:
        """RLlib's, in the placement group that learners share with engines, if there is one."""
        return super().build_learner_group(**{"placement_group": self.learner_bundles, **kwargs})

    def build_engine(self, module: Any) -> RolloutEngine:
        """What an env runner samples with; `module`: the runner's RLModule."""
        max_context = min(self.max_tokens or 2**31, module.max_context)
        if self.engine == "vllm":
            from rllib_gtpo.engines.vllm import VLLMEngine

            return VLLMEngine(
                self.engine_pool,
                max_context=max_context,
                vocab_size=module.vocab_size,
                follows_policy=self.lora is not None,
            )
        from rllib_gtpo.engines.hf import HFEngine

        return HFEngine(module.model, max_context=max_context, **self.engine_config)

    def build_rubric(self) -> Rubric:
        """Reward components besides the environment's."""
        return Rubric(self.format_penalty, self.penalize_tool_errors)

    def build_shaping(self) -> Shaping | None:
        """Partial credit for failed trajectories of training groups, if it is on."""
        if self.shaping == "none" or self.in_evaluation:
            return None
        return Shaping(
            build_embedder(self.embedder),
            self.shaping,
            self.shaping_alpha,
            self.shaping_input,
            self.on_embedder_failure,
        )

    def build_overlong_penalty(self, max_context: int) -> OverlongPenalty | None:
        """The punishment of long trajectories, if it is on; `max_context`: where they are cut."""
        if self.overlong != "penalty":
            return None
        buffer = self.overlong_buffer or max(1, max_context // 5)
        return OverlongPenalty(max_context, buffer, self.overlong_penalty)

    def build_credit_rule(self) -> Any:
        """The rllib_gtpo.connectors.learner.CreditRule of these settings."""
        from rllib_gtpo.connectors.learner import CreditRule

        return CreditRule(
            self.estimator, self.gamma, self.estimator_options, self.uniform_groups, self.overlong
        )

    def build_objective(self) -> Objective:
        """The loss."""
        return Objective(**{name: getattr(self, name) for name in _objective_names()})

    def build_optimizer(self, parameters: Any) -> Any:
        """The torch optimizer over `parameters`; `lr` is set by RLlib's schedule."""
        return build_optimizer(self.optimizer, parameters)

    def build_lr_schedule(self) -> LRSchedule | None:
        """How `lr` changes over iterations, if it does."""
        return LRSchedule.of(self.lr_schedule, self.lr)

    def get_default_rl_module_spec(self) -> RLModuleSpec:
        """See AlgorithmConfig."""
        from rllib_gtpo.rl_module import LLMModule

        return RLModuleSpec(
            module_class=LLMModule,
            model_config={
                "model": self.language_model_source,
                "tokenizer": self.tokenizer,
                "dtype": self.dtype,
                "lora": self.lora,
                "seed": self.seed or 0,
                "temperature": self.temperature,
            },
        )

    @property
    def _model_config_auto_includes(self) -> dict[str, Any]:
        return {}

    def get_default_learner_class(self) -> Any:
        """See AlgorithmConfig."""
        from rllib_gtpo.learner import GTPOLearner

        return GTPOLearner

    def build_env_to_module_connector(
        self,
        env: Any = None,
        spaces: Any = None,
        device: Any = None,
        codec: ChatCodec | None = None,
    ) -> Any:
        """The user's pieces, then messages to tokens."""
        from rllib_gtpo.connectors.chat import MessagesToTokens

        pipeline = super().build_env_to_module_connector(env=env, spaces=spaces, device=device)
        pipeline.append(MessagesToTokens(codec=codec or self.build_codec()))
        return pipeline

    def build_module_to_env_connector(
        self, env: Any = None, spaces: Any = None, codec: ChatCodec | None = None
    ) -> Any:
        """Tokens to turns, then the user's pieces."""
        from rllib_gtpo.connectors.chat import TokensToTurns

        pipeline = super().build_module_to_env_connector(env=env, spaces=spaces)
        pipeline.prepend(TokensToTurns(codec=codec or self.build_codec()))
        return pipeline

    def build_learner_connector(
        self, input_observation_space: Any, input_action_space: Any, device: Any = None
    ) -> Any:
        """The user's pieces, then turn credit and token sequences."""
        from rllib_gtpo.connectors.learner import GroupTurnAdvantages, TokenSequences

        pipeline = super().build_learner_connector(
            input_observation_space, input_action_space, device=device
        )
        rule = self.build_credit_rule()
        pipeline.append(GroupTurnAdvantages(rule=rule, device=device))
        pipeline.append(TokenSequences(rule=rule))
        return pipeline

    # Validation.

    def validate(self) -> None:
        """Refuses what is unknown, contradictory or without effect, with how to mend it."""
        super().validate()
        check(self)


class GRPOConfig(GTPOConfig):
    """GRPO on the same rollouts: one scalar per trajectory, min(accuracy, format)."""

    ALGORITHM = "GRPO"
    ESTIMATOR = "grpo"

    @classmethod
    def _algorithm_class(cls) -> Any:
        from rllib_gtpo.algorithm import GRPO

        return GRPO


def _objective_names() -> tuple[str, ...]:
    return tuple(Objective.__dataclass_fields__)
