"""Look-ups: the worlds, the environment, and demonstrations that tell the truth about both."""

import random

import pytest

from rllib_gtpo.chat import call_format
from rllib_gtpo.errors import ConfigError
from rllib_gtpo.models import build_tokenizer
from rllib_gtpo.types import StopReason, ToolError
from rllib_gtpo_envs import Lookup
from rllib_gtpo_envs.lookup import DEMONSTRATIONS, MARKUP, SLIPS

SMALL = {"train": 300, "validation": 60, "test": 60}
SPLITS = ("train", "validation", "test")
NO_SLIPS = {"slips": {}}


def tasks(split="train", **env_config):
    return list(Lookup({**SMALL, **env_config}).tasks(split))


def call(entry):
    return f"```look\n{entry}\n```"


def play(task, texts, env_config=None):
    """Plays the texts; returns the environment and what it said to each."""
    env = Lookup(env_config)
    env.reset(options={"task": task})
    answers = []
    for text in texts:
        observation, *_ = env.step(text)
        answers.append("".join(m["content"] for m in observation.messages))
    return env, answers


def read(shown):
    """A record's entries and what is left, by other means than the environment's."""
    left, record = shown.removeprefix("left: ").split("\n")
    return dict(entry.split(":") for entry in record.split(" ")), left.split(":")[:-1]


class TestTasks:
    def test_no_problem_is_in_two_splits_or_twice_in_one(self):
        rows = {split: tasks(split) for split in SPLITS}
        questions = [row["question"] for split in SPLITS for row in rows[split]]
        assert {split: len(rows[split]) for split in SPLITS} == SMALL
        assert len(set(questions)) == len(questions)

    def test_splits_are_disjoint_whatever_the_seeds(self):
        few = {"hops": [1, 1], "decoys": 5, "train": 60, "test": 6}  # of 156 questions
        train = {r["question"] for seed in range(3) for r in tasks("train", seed=seed, **few)}
        test = {r["question"] for seed in range(3) for r in tasks("test", seed=seed, **few)}
        assert train
        assert not train & test

    @pytest.mark.parametrize("split", SPLITS)
    def test_tasks_are_a_function_of_seed_and_split(self, split):
        assert tasks(split, seed=1) == tasks(split, seed=1)
        assert tasks(split, seed=1) != tasks(split, seed=2)

    def test_answers_follow_from_the_records_that_the_tool_shows(self):
        for row in tasks(hops=[2, 4])[:40]:
            env = Lookup()
            env.reset(options={"task": row})
            shown = row["question"]
            for turn in range(row["hops"] + 1):
                record, left = read(shown)
                assert len(left) == row["hops"] + 1 - turn in range(1, 6)
                observation, *_ = env.step(call(f"{left[-1]}:{record[left[-1]]}"))
                shown = observation.messages[0]["content"]
            assert shown == f"left: none\nvalue={row['answer']}"

    def test_worlds_are_as_asked(self):
        env = Lookup({**SMALL, "decoys": 4, "keys": 20})
        for row in env.tasks("train")[:20]:
            world = env.world(row)
            assert len(world.records) == 20
            assert len(set(world.values.values())) == 20
            for key, record in world.records.items():
                assert len(record) == len(set(record.values())) == 5
                assert key not in record.values()
            for relation in record:  # one to one
                assert len({r[relation] for r in world.records.values()}) == 20

    def test_changing_a_row_changes_no_other_readers_row(self):
        tasks()[0]["answer"] = "spoilt"
        assert tasks()[0]["answer"] != "spoilt"

    def test_no_such_split(self):
        with pytest.raises(ConfigError, match="train, validation, test"):
            Lookup().tasks("dev")


@pytest.mark.parametrize(
    ("env_config", "message"),
    [
        ({"hop": [1, 2]}, "did you mean 'hops'"),
        ({"hops": [0, 2]}, "1 to 8"),
        ({"hops": [3, 2]}, "1 to 8"),
        ({"hops": 3}, r"\[least, most\], 1 to 8"),
        ({"decoys": 0}, "at least 1"),
        ({"decoys": 6}, "at most 5"),
        ({"keys": 11}, "at least 12"),
        ({"keys": 27}, "at most 26"),
        ({"spare_turns": -1}, "at least 0"),
        ({"train": 0}, "at least 1"),
        ({"seed": True}, "a whole number"),
        ({"instructions": "yes"}, "true or false"),
        ({"demonstrations": {"wrong_turns": 1}}, "did you mean 'wrong_turn'"),
        ({"demonstrations": {"guess": 0}}, "above 0"),
        ({"demonstrations": "solve"}, "by name"),
        ({"slips": {"typos": 0.1}}, "did you mean 'typo'"),
        ({"slips": {"typo": -0.1}}, "at least 0"),
        ({"slips": {"typo": 0.5, "malformed": 0.5}}, "below 1"),
        ({"slips": 0.1}, "by name"),
    ],
)
def test_bad_knobs_say_what_is_valid(env_config, message):
    with pytest.raises(ConfigError, match=message):
        Lookup(env_config)


class TestEnvironment:
    TASK = tasks(hops=[3, 3])[0]

    def path(self, wrong_at=None):
        """The entries on the way and the value; at one hop, a decoy and what follows from it."""
        world = Lookup().world(self.TASK)
        (start,), (*relations, _) = (list(part) for part in self.split())
        entries, record = [f"start:{start}"], world.records[start]
        for hop, relation in enumerate(reversed(relations)):
            chosen = next(r for r in record if r != relation) if hop == wrong_at else relation
            entries.append(f"{chosen}:{record[chosen]}")
            key, record = record[chosen], world.records[record[chosen]]
        return entries, world.values[key]

    def split(self):
        record, left = read(self.TASK["question"])
        return record.values(), left

    def test_each_look_up_leads_to_the_next(self):
        entries, value = self.path()
        env, answers = play(self.TASK, [*map(call, entries), value])
        _, relations = self.split()
        assert [read(answer)[1] for answer in answers[:3]] == [
            relations[:3],
            relations[:2],
            relations[:1],
        ]
        assert answers[3:] == [f"left: none\nvalue={value}", ""]
        assert value == self.TASK["answer"]
        assert env.trajectory.stop_reason is StopReason.ANSWER
        assert [t.rewards for t in env.trajectory.turns] == [
            *[{"format": 0.0}] * 4,
            {"format": 0.0, "accuracy": 1.0},
        ]
        assert env.trajectory.correct
        assert env.trajectory.code == "\n".join(entries)

    @pytest.mark.parametrize("hop", range(3))
    def test_a_wrong_turn_shows_only_at_the_end(self, hop):
        entries, value = self.path(wrong_at=hop)
        env, answers = play(self.TASK, [*map(call, entries), value])
        assert value != self.TASK["answer"]
        assert answers[3] == f"left: none\nvalue={value}"
        assert [t.reward for t in env.trajectory.turns] == [0.0] * 5
        assert env.trajectory.turns[-1].rewards == {"format": 0.0, "accuracy": 0.0}

    @pytest.mark.parametrize("entry", ["boss:A", "zzz:a", "", "boss", "a:b:c", "start:"])
    def test_an_entry_that_the_record_lacks_costs_the_turn(self, entry):
        entries, _ = self.path()
        env, answers = play(self.TASK, [call(entries[0]), call(entry), call(entries[1])])
        assert answers[1] == f"no such entry\n{answers[0]}"
        assert env.trajectory.turns[1].results[0].error is ToolError.RAISED
        assert env.trajectory.turns[1].rewards == {"format": 0.0}
        assert read(answers[2])[1] == read(answers[0])[1][:-1]  # goes on as if nothing had been

    def test_the_same_entry_is_not_in_the_next_record(self):
        entries, _ = self.path()
        _, answers = play(self.TASK, [call(entries[0])] * 2)
        assert answers[1].startswith("no such entry")

    def test_nothing_is_left_to_look_up_behind_the_value(self):
        entries, value = self.path()
        _, answers = play(self.TASK, map(call, [*entries, entries[-1]]))
        assert answers[-1] == f"no such entry\nleft: none\nvalue={value}"

    def test_an_unclosed_call_is_penalised_and_changes_nothing(self):
        entries, _ = self.path()
        env, answers = play(self.TASK, [f"```look\n{entries[0]}", call(entries[0])])
        assert answers[0].startswith("Error: ")
        assert answers[1] == play(self.TASK, [call(entries[0])])[1][0]
        assert [t.rewards["format"] for t in env.trajectory.turns] == [-0.1, 0.0]

    def test_no_call_at_all(self):
        env, _ = play(self.TASK, [self.TASK["answer"]])
        assert env.trajectory.turns[0].rewards == {"format": -0.1, "accuracy": 1.0}

    def test_turns_are_limited_a_little_above_what_it_takes(self):
        env, _ = play(self.TASK, [call("A1")] * 7, {"hops": [1, 3], "spare_turns": 2})
        assert env.trajectory.stop_reason is StopReason.MAX_TURNS
        assert not env.trajectory.correct

    def test_reset_forgets(self):
        entries, _ = self.path()
        env, answers = play(self.TASK, [call(entries[0]), call(entries[1])])
        env.reset(options={"task": self.TASK})
        observation, *_ = env.step(call(entries[0]))
        assert observation.messages[0]["content"] == answers[0]

    def test_prompt(self):
        assert Lookup().prompt(self.TASK) == self.TASK["question"]
        explained = Lookup({"instructions": True}).prompt(self.TASK)
        left, entry = self.TASK["question"].split("\n")
        assert call(entry) in explained and left in explained


class TestDemonstrations:
    @pytest.mark.parametrize("format_name", ["fenced", "hermes"])
    @pytest.mark.parametrize("behaviour", DEMONSTRATIONS)
    @pytest.mark.parametrize("slips", [{}, {"typo": 0.4}, {"malformed": 0.4}], ids=str)
    def test_the_environment_really_says_that(self, behaviour, format_name, slips):
        """Played against the environment, a demonstration gets the very messages that it holds."""
        env = Lookup({**SMALL, "hops": [1, 4], "slips": slips})
        env.call_format = call_format(format_name)
        penalised = failed = 0
        for row in env.tasks("train")[:25]:
            env.reset(options={"task": row})
            demonstration = env.demonstrate(row, behaviour, random.Random(row["id"]))
            heard = [m["content"] for m in demonstration if m["role"] == "tool"]
            answers = []
            for message in demonstration:
                if message["role"] == "assistant":
                    observation, *_ = env.step(message["content"])
                    answers += [m["content"] for m in observation.messages]
            assert answers == heard
            assert env.trajectory.stop_reason is StopReason.ANSWER
            assert env.trajectory.correct == (behaviour == "solve"), demonstration
            turns = env.trajectory.turns[1:]
            penalised += sum(t.rewards["format"] == -0.1 for t in turns)
            failed += sum(r.error is ToolError.RAISED for t in turns for r in t.results)
        calls = behaviour != "guess"
        assert (penalised > 0) == (calls and "malformed" in slips)
        assert (failed > 0) == (calls and "typo" in slips)

    def test_what_each_behaviour_looks_like(self):
        env = Lookup({**SMALL, **NO_SLIPS, "hops": [3, 3]})
        row = env.tasks("train")[0]
        rng = random.Random(0)
        shown = {b: [m["content"] for m in env.demonstrate(row, b, rng)] for b in DEMONSTRATIONS}
        solve, wrong, early = shown["solve"], shown["wrong_turn"], shown["stop_early"]
        assert len(solve) == len(wrong) == 9
        assert solve[-1] == row["answer"] != wrong[-1]
        assert wrong[-2] == f"left: none\nvalue={wrong[-1]}"
        assert early[:-1] == solve[: len(early) - 1]
        assert solve[len(early) - 1].endswith(f":{early[-1]}\n```")
        assert len(shown["guess"]) == 1

    def test_a_slip_leaves_enough_turns(self):
        env = Lookup({**SMALL, "slips": {"typo": 0.5, "malformed": 0.4}})
        for row in env.tasks("train")[:100]:
            messages = env.demonstrate(row, "solve", random.Random(row["id"]))
            assert sum(m["role"] == "assistant" for m in messages) <= env.turn_limit

    def test_expert_is_a_function_of_the_id_and_follows_the_weights(self):
        config = {**SMALL, **NO_SLIPS, "train": 1000, "demonstrations": {"solve": 1, "guess": 3}}
        env = Lookup(config)
        rows = env.tasks("train")
        first = [next(iter(env.expert(row))) for row in rows]
        again = [next(iter(Lookup(config).expert(row))) for row in reversed(rows)]
        assert first == again[::-1]
        assert 700 < sum(len(demonstration) == 1 for demonstration in first) < 800

    def test_defaults_solve_rarely(self):
        assert sum(DEMONSTRATIONS.values()) == pytest.approx(1.0)
        assert DEMONSTRATIONS["solve"] <= 0.3
        assert 0.1 <= sum(SLIPS.values()) <= 0.25


def test_the_markup_keeps_turns_short():
    tokenizer = build_tokenizer(MARKUP)
    env = Lookup({**SMALL, "slips": {"typo": 0.1, "malformed": 0.1}})
    for row in env.tasks("train")[:50]:
        for message in next(iter(env.expert(row))):
            tokens = len(tokenizer.encode(message["content"]))
            assert tokens <= (4 if message["role"] == "assistant" else 22), message
