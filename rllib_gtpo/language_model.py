"""What is computed with a causal LM in training: log-probabilities of trained tokens of a batch.

Without ray, so that it also runs where there is only torch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rllib_gtpo.attention import PACKED_ATTENTION, PackedLengths, why_not_packed
from rllib_gtpo.ops.logprobs import selected_logprobs
from rllib_gtpo.packing import NOT_TRAINED, TokenBatch, TokenSequence, collate


def trained_logprobs(
    model: Any, tokens: TokenBatch, *, temperature: float = 1.0, with_entropy: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of the trained tokens of a batch, and entropy at them, in its order.

    Without trained tokens they still have a graph, so that every rank runs a backward pass.
    """
    head = model.get_output_embeddings()
    hidden_BTH = hidden_states(model, tokens)
    logprobs_N, entropy_N = selected_logprobs(
        hidden_BTH.flatten(0, 1)[tokens.positions_N],
        head.weight,
        tokens.targets_N,
        temperature=temperature,
        bias=head.bias,
        with_entropy=with_entropy,
    )
    if not len(logprobs_N):
        logprobs_N = logprobs_N + hidden_BTH.sum() * 0.0
    return logprobs_N, entropy_N


def hidden_states(model: Any, tokens: TokenBatch) -> Tensor:
    """The decoder's last hidden states [B, T, H].  Never with a cache: with one, transformers takes
    a packed row for one sequence."""
    packed: dict[str, Any] = {}
    if tokens.lengths is not None:
        packed = {
            "position_ids": tokens.position_ids_BT,
            "packed_lengths": PackedLengths(tokens.lengths),
            "packed_bounds": tokens.bounds,
        }
    decoder = model.get_decoder()
    hidden: Tensor = decoder(
        input_ids=tokens.input_ids_BT, use_cache=False, **packed
    ).last_hidden_state
    return hidden


def switch_to_packed(model: Any) -> bool:
    """Gives a model packed attention, if its sequences, packed, are what each is alone; says
    whether they are.

    That is tried, since nothing but its own code says whether a model hands the bounds on to its
    attention; a difference counts as none if it is small beside what one sequence that saw another
    would make.
    """
    config = model.config.get_text_config(decoder=True)
    if not getattr(model, "_supports_attention_backend", False) or why_not_packed(config):
        return False
    vocabulary = model.get_output_embeddings().weight.shape[0]
    probes = [[(7 * i + n) % vocabulary for i in range(n)] for n in (6, 11, 11, 9)]
    sequences = [TokenSequence(ids, [NOT_TRAINED] * len(ids), [0.0] * len(ids)) for ids in probes]
    own, training = model.config._attn_implementation, model.training
    model.eval()
    try:
        with torch.no_grad():
            row = collate(sequences, range(len(probes)), packed=True).to(model.device)
            alone = [hidden_states(model, collate([s], [0]).to(model.device))[0] for s in sequences]
            seeing = hidden_states(model, replace(row, lengths=None))[0]
            model.set_attn_implementation(PACKED_ATTENTION)
            error = (hidden_states(model, row)[0] - torch.cat(alone)).abs().max()
            leak = (seeing - torch.cat(alone)).abs().max()
        packs = bool(error < leak / 4)
    except (TypeError, ValueError, RuntimeError):
        packs = False
    finally:
        model.train(training)
    if not packs:
        model.set_attn_implementation(own)
    return packs
