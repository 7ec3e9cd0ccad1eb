"""What to change when a run does not fit: single settings, each tried on the cost model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from rllib_gtpo.planning.cost import FLOAT32, LearnerWork, ModelCost
from rllib_gtpo.planning.needs import Needs, fits

ADAPTER = 0.01  # of a model's parameters: about what LoRA of rank 8 to 16 trains


def remedies(needs: Needs, host: float | None, device: float | None) -> list[str]:
    """The mildest change of each kind after which everything fits.

    Args:
        needs: Of the run that does not fit.
        host, device: As for `fits`.
    """
    found: dict[str, str] = {}
    for kind, label, changed in (*_work(needs), *_model(needs), *_rollouts(needs)):
        if kind not in found and fits(changed, host, device):
            found[kind] = label
    return list(found.values())


def _work(needs: Needs) -> Iterator[tuple[str, str, Needs]]:
    work = needs.learner

    def of(kind: str, label: str, **changes: object) -> tuple[str, str, Needs]:
        changed: LearnerWork = replace(work, **changes)  # type: ignore[arg-type]
        return kind, label, replace(needs, learner=changed, learners=changed.world)

    tokens, local = work.tokens, needs.learners == 0
    while tokens > needs.rollout.context:
        tokens = max(tokens // 2, needs.rollout.context)
        parts = -(-work.tokens * work.micro_batches // tokens)
        smaller = replace(work, tokens=tokens, micro_batches=parts)
        yield "tokens", f"token_budget={tokens}", replace(needs, learner=smaller)
    if not work.recomputes:
        kept = replace(work, recomputes=True)
        yield "recompute", "activation_checkpointing=True", replace(needs, learner=kept)
    if work.strategy in ("single", "ddp"):
        for world in (2, 4, 8, 16):
            if world >= work.world:
                label = f"strategy='fsdp2' with num_learners={world}"
                yield of("shard", label, strategy="fsdp2", world=world)
    elif work.on_device and not work.offload and not local:
        yield of("offload", "strategy_options={'offload': True}", offload=True)


def _model(needs: Needs) -> Iterator[tuple[str, str, Needs]]:
    model = needs.model
    if not model.adapter:
        trained = max(1, int(model.parameters * ADAPTER))
        adapter = replace(
            model,
            trained=trained,
            largest=min(model.largest, trained),
            head=0,
            trained_element=FLOAT32,
        )
        without = replace(needs.learner, master=False)
        yield "lora", "lora={'rank': 8}", replace(needs, model=adapter, learner=without)
    if model.element == FLOAT32:
        yield (
            "dtype",
            "dtype='bfloat16'",
            replace(
                needs,
                model=_in_half(model),
                learner=replace(needs.learner, master=not model.adapter),
            ),
        )


def _in_half(model: ModelCost) -> ModelCost:
    return replace(
        model,
        element=2,
        trained_element=FLOAT32 if model.adapter else 2,
        saved_layer=model.saved_layer / 2,
        saved_rest=model.saved_rest / 2,
        boundary=model.boundary / 2,
        kv=model.kv / 2,
    )


def _rollouts(needs: Needs) -> Iterator[tuple[str, str, Needs]]:
    rollout = needs.rollout
    concurrent = rollout.trajectories
    while needs.engine is None and concurrent > 1:
        concurrent //= 2
        fewer = replace(rollout, trajectories=concurrent)
        yield "rows", f"max_concurrency={concurrent}", replace(needs, rollout=fewer)
    if needs.runners > 1 and needs.engine is None:
        for count in range(needs.runners - 1, 0, -1):
            more = -(-rollout.trajectories * needs.runners // count)
            fewer = replace(rollout, trajectories=more)
            label = f"num_env_runners={count}"
            yield "runners", label, replace(needs, rollout=fewer, runners=count)
