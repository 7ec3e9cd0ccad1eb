"""The columns of the record, one row a trajectory; docs/record.md says the same to its readers."""

from __future__ import annotations

import pyarrow as pa

VERSION = 1
METADATA = b"rllib_gtpo.record"  # key of a file's own metadata: JSON, with "version"
DIRECTORY = "record"  # in a run's directory
FILE_NAME = "iteration_{:06d}.parquet"
FILE_PATTERN = "iteration_*.parquet"

_TEXT, _REAL, _WHOLE = pa.string(), pa.float64(), pa.int32()

MESSAGE = pa.struct({"role": _TEXT, "content": _TEXT, "other": _TEXT})
CALL = pa.struct({"name": _TEXT, "arguments": _TEXT, "raw": _TEXT, "error": _TEXT})
RESULT = pa.struct({"name": _TEXT, "content": _TEXT, "error": _TEXT, "seconds": _REAL})
REWARD = pa.struct({"name": _TEXT, "value": _REAL})
TURN = pa.struct(
    {
        "index": _WHOLE,
        "text": _TEXT,
        "content": _TEXT,
        "thinking": _TEXT,
        "finish": _TEXT,
        "calls": pa.list_(CALL),
        "results": pa.list_(RESULT),
        "invalid": pa.bool_(),
        "prompt_tokens": _WHOLE,
        "sampled_tokens": _WHOLE,
        "rewards": pa.list_(REWARD),
        "reward": _REAL,
        "return": _REAL,
        "baseline": _REAL,
        "scale": _REAL,
        "advantage": _REAL,
        "weights_version": _WHOLE,
        "last_version": _WHOLE,
        "seconds": _REAL,
    }
)
SIMILARITY = pa.struct({"member": _WHOLE, "similarity": _REAL})

TRAJECTORY_FIELDS: dict[str, pa.DataType] = {
    "iteration": _WHOLE,
    "split": _TEXT,
    "group_id": pa.int64(),
    "member": _WHOLE,
    "task_id": _TEXT,
    "task": _TEXT,
    "tools": _TEXT,
    "messages": pa.list_(MESSAGE),
    "stop_reason": _TEXT,
    "error": _TEXT,
    "answer": _TEXT,
    "correct": pa.bool_(),
    "reward": _REAL,
    "in_batch": pa.bool_(),
    "trained": pa.bool_(),
    "turns": pa.list_(TURN),
    "similarities": pa.list_(SIMILARITY),
}
TOKEN_FIELDS: dict[str, pa.DataType] = {
    "tokens": _TEXT,
    "token_ids": _WHOLE,
    "turn_ids": pa.int16(),
    "mask": pa.bool_(),
    "logprobs": pa.float32(),
    "learner_logprobs": pa.float32(),
    "ratios": pa.float32(),
    "clipped": pa.bool_(),
}
"""Elements of the lists that are aligned with the tokens of a trajectory."""

SHOWN_COLUMNS = (
    *(name for name in TRAJECTORY_FIELDS if name not in ("tools", "split")),
    "token_ids",
)
"""What a reader needs who shows trajectories and credits them again."""

SCHEMA = pa.schema(
    {**TRAJECTORY_FIELDS, **{name: pa.list_(kind) for name, kind in TOKEN_FIELDS.items()}}
)
