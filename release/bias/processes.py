"""The processes of the bench.  Each isolates one thing that makes credit hard.

Limits are small so that all groups can be enumerated; `errand` grows with its limit and is sampled.
"""

from __future__ import annotations

from bias.process import Branch, Node, Process

PENALTY = -0.1


def answer(right: float, code: str = "", wrong_code: str = "") -> tuple[Branch, ...]:
    """The trajectory ends, correctly with this probability."""
    return (
        Branch(right, accuracy=1.0, code=code),
        Branch(1.0 - right, code=wrong_code),
    )


def then(name: str) -> tuple[Branch, ...]:
    """On to a node for sure."""
    return (Branch(1.0, name),)


def stop_or_go(limit: int = 4) -> Process:
    """Looking may bring certainty and costs a turn; who looks until the limit has no answer."""
    nodes = {}
    for turn in range(1, limit + 1):
        more = turn < limit
        unsure, sure = f"unsure {turn + 1}", f"sure {turn + 1}"
        looks = (Branch(0.5, unsure), Branch(0.5, sure)) if more else (Branch(1.0),)
        nodes[f"unsure {turn}"] = Node("unsure", {"look": looks, "answer": answer(0.3)})
        if turn > 1:
            again = then(sure) if more else (Branch(1.0),)
            nodes[f"sure {turn}"] = Node("sure", {"look": again, "answer": answer(0.9)})
    isolates = "the policy controls when to stop, so turn counts vary with what it did"
    return Process("stop_or_go", isolates, nodes, {"unsure 1": 1.0})


def early_choice() -> Process:
    """The plan of turn 1 decides most of what turn 4 earns."""
    nodes = {"plan": Node("plan", {"good": then("good 2"), "bad": then("bad 2")})}
    for plan, base in (("good", 0.55), ("bad", 0.05)):
        nodes[f"{plan} 2"] = Node(
            "gather", {"broad": then(f"{plan} broad 3"), "narrow": then(f"{plan} narrow 3")}
        )
        for gathered, more in (("broad", 0.15), ("narrow", 0.0)):
            last = f"{plan} {gathered} 4"
            nodes[f"{plan} {gathered} 3"] = Node("wait", {"wait": then(last)})
            nodes[last] = Node(
                "write",
                {"careful": answer(base + more + 0.2), "hasty": answer(base + more)},
            )
    isolates = "an early choice decides and shows late: turns depend strongly on each other"
    return Process("early_choice", isolates, nodes, {"plan": 1.0})


def slips(limit: int = 3) -> Process:
    """A valid call rarely solves the task; an invalid one costs 0.1 and the turn."""
    nodes = {}
    for turn in range(1, limit + 1):
        on = f"turn {turn + 1}" if turn < limit else None
        solves = 0.04 * turn
        nodes[f"turn {turn}"] = Node(
            f"turn {turn}",
            {
                "call": (Branch(solves, accuracy=1.0), Branch(1.0 - solves, on)),
                "slip": (Branch(1.0, on, format=PENALTY),),
            },
        )
    isolates = "rare success: most groups fail altogether and have only the format signal"
    return Process("slips", isolates, nodes, {"turn 1": 1.0})


def solved() -> Process:
    """The long way is right a little more often; both nearly always are."""
    nodes = {"start": Node("start", {"short": then("short 2"), "long": then("long 2")})}
    nodes["long 2"] = Node("wait", {"wait": then("long 3")})
    nodes["long 3"] = Node("wait", {"wait": then("long 4")})
    for way, last, right in (("short", "short 2", 0.92), ("long", "long 4", 0.96)):
        nodes[last] = Node(
            f"{way} answer", {"careful": answer(right + 0.03), "hasty": answer(right)}
        )
    isolates = "nearly always solved, in two turns or four: discounting prefers the shorter"
    return Process("solved", isolates, nodes, {"start": 1.0})


def difficulty() -> Process:
    """Half of the groups have an easy prompt, half a hard one; the first choice is one habit."""
    nodes = {}
    for prompt, right in (("easy", (0.8, 0.4)), ("hard", (0.02, 0.2))):
        nodes[prompt] = Node(
            "habit", {"recall": then(f"{prompt} a"), "reason": then(f"{prompt} b")}
        )
        for way, chance in zip("ab", right, strict=True):
            nodes[f"{prompt} {way}"] = Node(
                f"{prompt} answer", {"check": answer(chance + 0.04), "skip": answer(chance)}
            )
    isolates = "prompts of different difficulty: dividing by each group's std reweights them"
    return Process("difficulty", isolates, nodes, {"easy": 0.5, "hard": 0.5})


def shaping(adversarial: bool) -> Process:
    """Two plans; what a failed trajectory wrote is more or less similar to what is right.

    Honest: the better plan's failures look more like correct code.  Adversarial: the plan "copy"
    can hardly succeed and its code looks right, above all when polished.
    """
    wrong = ("odd", "odd", "copy", "polished") if adversarial else ("close", "close", "odd", "odd")
    nodes = {
        "plan": Node("plan", {"think": then("think"), "copy": then("copy")}),
        "think": Node(
            "think",
            {"test": answer(0.35, "right", wrong[0]), "rush": answer(0.25, "right", wrong[1])},
        ),
        "copy": Node(
            "copy",
            {"fix": answer(0.1, "right", wrong[2]), "polish": answer(0.02, "right", wrong[3])},
        ),
    }
    name = "shaping_adversarial" if adversarial else "shaping_honest"
    isolates = "partial credit for failed code that looks like right code"
    return Process(name, isolates, nodes, {"plan": 1.0})


SIMILARITY = {"right": 1.0, "polished": 0.95, "close": 0.8, "copy": 0.7, "odd": 0.2}
"""Cosine of each piece of code of `shaping` with the right code."""


def errand(limit: int) -> Process:
    """A plan, then work that is done after limit / 2 steps forward; success ends it.

    The plan sets the pace for good; a slip costs 0.1 and the turn; the state is only the phase.
    """
    need = limit // 2
    nodes = {"plan": Node("plan", {"direct": then("direct 2 0"), "detour": then("detour 2 0")})}
    for plan, pace in (("direct", 1.0), ("detour", 0.8)):
        for turn in range(2, limit + 1):
            for done in range(min(turn - 1, need)):

                def to(steps: int, turn: int = turn, plan: str = plan) -> str | None:
                    return f"{plan} {turn + 1} {steps}" if turn < limit else None

                def work(forward: float, done: int = done, to=to) -> tuple[Branch, ...]:
                    ends = done + 1 == need
                    ahead = Branch(forward, None if ends else to(done + 1), accuracy=float(ends))
                    return (ahead, Branch(1.0 - forward, to(done)))

                nodes[f"{plan} {turn} {done}"] = Node(
                    "early" if done < (need + 1) // 2 else "late",
                    {
                        "work": work(0.9 * pace),
                        "dither": work(0.4 * pace),
                        "slip": (Branch(1.0, to(done), format=PENALTY),),
                    },
                )
    isolates = "the number of turns grows with the limit, and so does the delay of the reward"
    return Process(f"errand_{limit}", isolates, nodes, {"plan": 1.0})


PROCESSES = [stop_or_go(), early_choice(), slips(), solved(), difficulty()]
