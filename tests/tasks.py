"""A small task for tests: no sandbox, no files, and learnable in seconds."""

from __future__ import annotations

from rllib_gtpo import ToolEnv

MARKUP = (
    "user\n",
    "assistant\n",
    "tool\n",
    '<tool_call>{"name": "add", "arguments": {"a": ',
    ', "b": ',
    "}}</tool_call>",
    '<tool_call>{"name": "ad',
    "the call is not closed; end it with </tool_call>",
)  # one token each, so that turns are short


def add(a: int, b: int) -> int:
    """Add two numbers.  a: the first.  b: the second."""
    if a == 13:
        raise ValueError("unlucky")
    return a + b


class Adder(ToolEnv):
    """Two numbers are added by a tool, then a third; the model copies."""

    tools = [add]
    max_turns = 4

    def tasks(self, split):
        start = {"train": 0, "validation": 100, "test": 200}[split]
        count = self.env_config.get("count", 40)
        return [
            {
                "id": f"{split}-{i}",
                "question": f"{start % 7 + i % 9}+{i % 5}",
                "answer": str(start % 7 + i % 9 + i % 5),
            }
            for i in range(count)
        ]

    def expert(self, task):
        a, b = task["question"].split("+")
        call = '<tool_call>{"name": "add", "arguments": {"a": %s, "b": %s}}</tool_call>'
        bad = {"role": "assistant", "content": '<tool_call>{"name": "ad'}
        good = {"role": "assistant", "content": call % (a, b)}
        answer = {"role": "assistant", "content": task["answer"]}
        told = {"role": "tool", "content": task["answer"]}
        refused = {"role": "tool", "content": "the call is not closed; end it with </tool_call>"}
        return [
            [good, told, answer],
            [bad, refused, good, told, answer],
            [good, told, good, told, answer],
            [{"role": "assistant", "content": str(int(a) + 1)}],
        ]
