"""Draws the pictures of concepts.md into docs/images: `python docs/pictures.py`.

The numbers in them come from rllib_gtpo.ops, so that they cannot differ from what is computed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from xml.sax.saxutils import escape

import torch

from rllib_gtpo.ops.advantages import TurnCredit, turn_credit

IMAGES = Path(__file__).parent / "images"
INK, FAINT, EDGE = "#1f2933", "#5f6c7b", "#c3ccd6"
CONTEXT, SAMPLED, ENGINE, LEARNER = "#eef1f4", "#cfe3ff", "#dff3e4", "#ffe8cc"

WHAT = (  # a group of four trajectories: what each turn does, and its reward
    (("call", 0.0), ("call", 0.0), ("right answer", 1.0)),
    (("invalid call", -0.1), ("call", 0.0), ("right answer", 1.0)),
    (("call", 0.0), ("wrong answer", 0.0)),
    (("guess, no call", -0.1),),
)


def group_credit(estimator: str, **options: float) -> TurnCredit:
    """The credit of the group `WHAT`."""
    rewards = torch.tensor([reward for turns in WHAT for _, reward in turns], dtype=torch.float64)
    trajectory = torch.tensor([index for index, turns in enumerate(WHAT) for _ in turns])
    return turn_credit(
        rewards, trajectory, torch.zeros_like(trajectory), estimator=estimator, **options
    )


class Picture:
    """An SVG that is read on light and dark pages alike."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
            f'font-family="system-ui, sans-serif" font-size="14"><title>{escape(title)}</title>',
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" '
            f'markerHeight="8" orient="auto"><path d="M0 0L8 4L0 8z" fill="{FAINT}"/></marker>'
            "</defs>",
            f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>',
        ]

    def box(self, x: float, y: float, width: float, height: float, fill: str) -> None:
        """A rounded rectangle."""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="5" fill="{fill}" '
            f'stroke="{EDGE}"/>'
        )

    def text(
        self, x: float, y: float, text: str, *, anchor: str = "middle", faint: bool = False
    ) -> None:
        """One line of text; `y` is its base line."""
        size = ' font-size="12"' if faint else ""
        self.parts.append(
            f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{FAINT if faint else INK}"{size}>'
            f"{escape(text)}</text>"
        )

    def arrow(self, *points: tuple[float, float]) -> None:
        """A line through the points, with a tip at its end."""
        path = " ".join(f"{x},{y}" for x, y in points)
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{FAINT}" stroke-width="1.5" '
            'marker-end="url(#tip)"/>'
        )

    def labelled(self, x: float, y: float, width: float, lines: list[str], fill: str) -> None:
        """A box with a heading and smaller lines below it."""
        self.box(x, y, width, 24 + 18 * len(lines), fill)
        for number, line in enumerate(lines):
            self.text(x + width / 2, y + 24 + 18 * number, line, faint=number > 0)

    def svg(self) -> str:
        """The file's text."""
        return "\n".join([*self.parts, "</svg>", ""])


def turns() -> Picture:
    """One trajectory as a stream of tokens."""
    picture = Picture(880, 190, "A trajectory as a stream of tokens")
    pieces = [
        ("prompt", "12+7*3, tools", CONTEXT, 130),
        ("sampled", "print(12+7)", SAMPLED, 120),
        ("context", "tool: 19", CONTEXT, 100),
        ("sampled", "print(19*3)", SAMPLED, 120),
        ("context", "tool: 57", CONTEXT, 100),
        ("sampled", "57", SAMPLED, 90),
    ]
    x, turn = 20.0, 0
    for kind, text, fill, width in pieces:
        picture.box(x, 50, width, 56, fill)
        picture.text(x + width / 2, 74, text)
        picture.text(x + width / 2, 94, kind, faint=True)
        if kind == "sampled":
            told = f"reward {int(turn == 2)}, advantage A{'₀₁₂'[turn]}"
            picture.text(x + width / 2, 36, f"turn {turn}")
            picture.text(x + width / 2, 128, told, faint=True)
            turn += 1
        x += width + 30
        if x < 830:
            picture.arrow((x - 26, 78), (x - 4, 78))
    legend = (
        "Blue is trained, each token with the advantage of its turn. Grey is context: only read."
    )
    picture.text(440, 168, legend, faint=True)
    return picture


def shade(advantage: float) -> str:
    """Green for what is encouraged, red for what is discouraged."""
    strength = min(abs(advantage) / 1.6, 1.0) ** 0.7
    strong = (96, 190, 120) if advantage > 0 else (240, 128, 118)
    return "#" + "".join(f"{round(255 + (c - 255) * strength):02x}" for c in strong)


def credit() -> Picture:
    """The group, and what two estimators say of it."""
    picture = Picture(860, 680, "A group of four trajectories: the credit of turns, and of wholes")
    for top, name, options in ((20, "gtpo", {"gamma": 0.9}), (350, "grpo_sum", {})):
        found = group_credit(name, **options)
        told = "one advantage for each turn" if name == "gtpo" else "one for each trajectory"
        picture.text(20, top + 18, f"{name}: {told}", anchor="start")
        row = 0
        for index, members in enumerate(WHAT):
            y = top + 32 + index * 70
            picture.text(20, y + 35, f"trajectory {index}", anchor="start", faint=True)
            for number, (what, reward) in enumerate(members):
                x = 120 + number * 240
                advantage = float(found.advantages[row])
                picture.box(x, y, 226, 62, shade(advantage))
                picture.text(x + 113, y + 19, what)
                told = f"reward {reward:g}, return {float(found.returns[row]):.2f}"
                picture.text(x + 113, y + 36, told, faint=True)
                picture.text(x + 113, y + 53, f"advantage {advantage:+.2f}", faint=True)
                row += 1
    return picture


def iteration() -> Picture:
    """What an iteration does, and what goes from where to where."""
    picture = Picture(860, 330, "One iteration: rollouts, credit and update, new weights")
    picture.labelled(16, 40, 160, ["tasks", "groups_per_step of them"], CONTEXT)
    picture.labelled(
        230,
        20,
        270,
        [
            "env runners (num_env_runners)",
            "each task group_size times, all at once",
            "chat template, tools, rewards",
            "a group is scored when all have ended",
        ],
        SAMPLED,
    )
    picture.labelled(
        560,
        20,
        280,
        [
            "learners (num_learners)",
            "whole groups: returns, baseline, advantage",
            "packed tokens, clipped objective",
            "one optimizer step, or several",
        ],
        LEARNER,
    )
    picture.labelled(
        230,
        200,
        270,
        ["engine", '"hf" inside the runner, or', '"vllm": num_engines actors'],
        ENGINE,
    )
    saved = ["run directory", "metrics, checkpoints, and", "the record: rllib report"]
    picture.labelled(620, 200, 220, saved, CONTEXT)
    picture.arrow((176, 66), (226, 66))
    picture.arrow((500, 66), (556, 66))
    picture.text(528, 56, "groups", faint=True)
    picture.arrow((330, 116), (330, 196))
    picture.text(322, 160, "context", anchor="end", faint=True)
    picture.arrow((400, 200), (400, 120))
    picture.text(408, 160, "sampled ids, log-probs", anchor="start", faint=True)
    picture.arrow((590, 116), (590, 230), (504, 230))
    picture.text(598, 160, "weights, with a version", anchor="start", faint=True)
    picture.arrow((780, 116), (780, 196))
    picture.text(
        430,
        312,
        "Rollouts, update, weights: one after the other. What is sampled is what is trained on.",
        faint=True,
    )
    return picture


PICTURES = {"turns.svg": turns, "credit.svg": credit, "iteration.svg": iteration}

if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else IMAGES
    for name, draw in PICTURES.items():
        (folder / name).write_text(draw().svg(), encoding="utf-8")
