"""Peak memory and time of the log-probabilities of many tokens over a large vocabulary.

    python release/learner/heads.py ours 8192 151936 128        # prints a line of JSON

One way in one fresh process: forward and backward of a policy loss, from hidden states to the
gradients of hidden states and head, in float32 on the processor.  Peak is the most resident memory
beyond what there was when only the head's weight was there.

    ours    rllib_gtpo.ops.logprobs, entropy included
    full    all logits, as a plain loop would
    liger   liger-kernel's fused linear GRPO loss, in sequences of 1,024; without entropy
    trl     the function behind TRL's fused head, entropy included
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CHUNK, FLOAT = 1024, 4
NEEDED = {"liger": "liger_kernel", "trl": "trl"}


def allowed_bytes(tokens: int, vocabulary: int, width: int) -> int:
    """Hidden states and their gradient, the head's float32 gradient, and two chunks of logits."""
    return FLOAT * (2 * tokens * width + vocabulary * width + 2 * CHUNK * vocabulary)


def is_there(way: str) -> bool:
    """Whether the package behind it is installed."""
    return way not in NEEDED or importlib.util.find_spec(NEEDED[way]) is not None


def measured(way: str, tokens: int, vocabulary: int, width: int) -> dict[str, float]:
    """Peak bytes and seconds of one way, in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, way, str(tokens), str(vocabulary), str(width)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        check=True,
    )
    row: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return row


def loss_of(way: str) -> Callable[..., Any]:
    """hidden [N, H], weight [V, H], targets [N], advantages [N / 1024 or 1] -> a loss."""
    import torch

    def policy(logprobs: Any, advantages: Any) -> Any:
        ratio = (logprobs - logprobs.detach()).exp().view(len(advantages), -1)
        return -(ratio * advantages[:, None]).mean()

    if way == "ours":
        from rllib_gtpo.ops.logprobs import selected_logprobs

        return lambda h, w, t, a: policy(selected_logprobs(h, w, t, with_entropy=True)[0], a)
    if way == "trl":
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction

        options = (1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs", "entropy"))
        return lambda h, w, t, a: policy(
            _ChunkedLogProbFunction.apply(h, w, None, t, *options)[0], a
        )
    if way == "liger":
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        fused = LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False)

        def liger(h: Any, w: Any, t: Any, a: Any) -> Any:
            rows = t.view(len(a), -1)
            return fused(h.view(*rows.shape, -1), w, rows, torch.ones_like(rows), a)[0]

        return liger
    return lambda h, w, t, a: policy(
        -torch.nn.functional.cross_entropy(h @ w.T, t, reduction="none"), a
    )


def measure(way: str, tokens: int, vocabulary: int, width: int) -> dict[str, float]:
    """Peak bytes and seconds in this process."""
    import torch

    def inputs(tokens: int, vocabulary: int) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(0)
        weight = 0.1 * torch.randn(vocabulary, width, generator=generator)
        targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
        advantages = torch.randn(max(1, tokens // CHUNK), generator=generator)
        return weight.requires_grad_(), targets, advantages, generator

    loss = loss_of(way)
    for sizes in ((2 * CHUNK, 500), (tokens, vocabulary)):  # the first warms up
        weight, targets, advantages, generator = inputs(*sizes)
        start = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak is sought from now on
        began = time.perf_counter()
        hidden = torch.randn(sizes[0], width, generator=generator).requires_grad_()
        loss(hidden, weight, targets, advantages).backward()
        seconds = time.perf_counter() - began
        peak = _resident("VmHWM") - start
    norm = float(weight.grad.norm() / (hidden.grad.norm() + 1e-30))
    return {"peak_bytes": peak, "seconds": seconds, "gradients": norm}


def _resident(what: str) -> int:
    """Bytes of this process in memory: now (VmRSS), or at the peak (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"the kernel does not say {what}")


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], *map(int, sys.argv[2:]))))
