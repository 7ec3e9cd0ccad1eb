"""Problems: each one once, none in training that is held out, and answers of every type."""

import json

import pytest

from rllib_gtpo.errors import DataError
from rllib_gtpo.problems import load_problems, normal_form

LONG = "Let $m$ and $n$ be positive integers with $m + n = 40$. Find the largest value of $mn$."


def rows(*pairs):
    return [{"question": question, "answer": answer} for question, answer in pairs]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class TestOnce:
    def test_repeats_are_taken_once_and_told(self, capsys):
        source = rows(("What is 1+1?", 2), ("what is  $1+1$", "2"), ("What is 1+1?", 2), ("b", 1))
        assert [p["question"] for p in load_problems(source, "test")] == ["What is 1+1?", "b"]
        assert capsys.readouterr().out == "test: 2 problems; left out: 2 repeats\n"

    def test_a_problem_with_two_answers_is_left_out(self, capsys):
        source = rows(("a", 1), ("A.", 2), ("b", 1))
        assert [p["question"] for p in load_problems(source, "train")] == ["b"]
        assert "1 with different answers" in capsys.readouterr().out

    def test_nothing_to_tell(self, capsys):
        load_problems(rows(("a", 1)), "train")
        assert capsys.readouterr().out == ""

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ("What is $1 + 1$?", "what is 1+1"),
            ("\\( \\dfrac{1}{2} \\)", "$\\frac12$".replace("12", "{1}{2}")),
            ("$\\left( a \\right)\\,b$", "(a)b"),
            ("\uff11 cup\u00a0of tea", "1 cup of tea"),
        ],
    )
    def test_the_same_problem(self, one, other):
        assert normal_form(one) == normal_form(other)

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ("1+1", "1-1"),
            ("1.5", "15"),
            ("5! + 1", "5 + 1"),
            ("$x_1$", "$x_2$"),
            ("\\leftarrow", "\\rightarrow"),
        ],
    )
    def test_another_problem(self, one, other):
        assert normal_form(one) != normal_form(other)


class TestHeldOut:
    def test_what_is_held_out_is_not_trained_on(self, capsys):
        source = {
            "train": rows(("a", 1), ("b", 2), ("c", 3), ("d", 4)),
            "validation": rows(("B?", 2)),
            "aime": rows(("C", 3)),
        }
        assert [p["question"] for p in load_problems(source, "train")] == ["a", "d"]
        assert capsys.readouterr().out == "train: 2 problems; left out: 2 also held out\n"
        assert len(load_problems(source, "aime")) == 1

    def test_a_directory_with_a_file_per_split(self, tmp_path):
        write(tmp_path / "train.jsonl", rows(("a", 1), ("b", 2)))
        write(tmp_path / "test.jsonl", rows(("B", 2)))
        assert [p["question"] for p in load_problems(str(tmp_path), "train")] == ["a"]

    def test_near_copies(self, capsys):
        near = "Solve this. " + LONG.replace("largest", "greatest") + " Explain your answer."
        other = LONG.replace("40", "50").replace("positive integers", "primes")
        source = {"train": rows((near, 400), (other, 1)), "test": rows((LONG, 400))}
        assert [p["question"] for p in load_problems(source, "train")] == [other]
        assert "1 near copies of held-out ones" in capsys.readouterr().out

    def test_a_phrase_that_problems_share_is_no_copy(self):
        end = (
            "can be written as m/n where m and n are relatively prime positive integers. Find m+n."
        )
        one = (
            f"A fair coin is thrown until it has shown heads twice in a row; the mean number {end}"
        )
        two = (
            f"The area of the largest triangle that lies inside a square of side two, halved, {end}"
        )
        source = {"train": rows((one, 7)), "test": rows((two, 2))}
        assert len(load_problems(source, "train")) == 1

    def test_columns_for_each_split(self, tmp_path):
        source = {
            "train": write(tmp_path / "a.jsonl", [{"problem": "a", "solution": "\\boxed{1}"}]),
            "test": write(tmp_path / "b.jsonl", [{"Body": "b", "Question": "c", "Answer": 2.0}]),
        }
        columns = {"train": "math", "test": "svamp"}
        assert load_problems(source, "train", columns) == rows(("a", "1"))
        assert load_problems(source, "test", columns) == rows(("b c", "2"))

    def test_nothing_is_left(self):
        source = {"train": rows(("a", 1)), "test": rows(("a", 1))}
        with pytest.raises(DataError, match="no problem is left: 1 also held out"):
            load_problems(source, "train")

    def test_a_single_file_is_not_held_out_from_itself(self, tmp_path):
        file = write(tmp_path / "rows.jsonl", rows(("a", 1)))
        assert load_problems(file, "train") == rows(("a", "1"))


class TestRows:
    @pytest.mark.parametrize(
        ("answer", "text"),
        [
            (142, "142"),
            (142.0, "142"),
            (-0.5, "-0.5"),
            (1e22, "10000000000000000000000"),
            (" \\frac{1}{2} ", "\\frac{1}{2}"),
            (["72"], "72"),
            ([3.0], "3"),
            (0, "0"),
        ],
    )
    def test_answers_of_every_type(self, answer, text):
        assert load_problems(rows(("a", answer)), "test")[0]["answer"] == text

    @pytest.mark.parametrize(
        ("answer", "kind"),
        [
            (None, "empty"),
            ("  ", "empty|'  '"),
            ([], "empty"),
            ([1, 2], "a list of 2"),
            (True, "True"),
            (float("nan"), "nan"),
            ({"value": 1}, "value"),
        ],
    )
    def test_no_answer(self, answer, kind, tmp_path):
        file = write(tmp_path / "rows.jsonl", rows(("a", 1), ("b", answer)))
        with pytest.raises(
            DataError, match=rf"rows\.jsonl, row 2: the answer is .*({kind}).*mend the row"
        ):
            load_problems(file, "test")

    @pytest.mark.parametrize("question", ["", " \n"])
    def test_an_empty_problem(self, question):
        with pytest.raises(DataError, match=r"^tasks, row 2: the question is empty: mend the row"):
            load_problems(rows(("a", 1), (question, 1)), "test")

    def test_a_chat_where_a_text_should_be(self):
        with pytest.raises(DataError, match=r"no text but list: .*'prompt\.0\.content'"):
            load_problems(rows(([{"role": "user", "content": "a"}], 1)), "test")

    def test_a_dataset_without_the_columns(self):
        with pytest.raises(
            DataError, match=r"row 1: no 'question' \(it has \['answer', 'problem'\]\).*gsm8k"
        ):
            load_problems([{"problem": "a", "answer": 1}], "test")

    def test_two_problems_with_one_id(self):
        source = [{"id": 7, **row} for row in rows(("a", 1), ("b", 2))]
        with pytest.raises(DataError, match=r"row 2: id 7 is taken by row 1; .*make them unique"):
            load_problems(source, "test")
        source = [{"id": 7, **row} for row in rows(("a", 1), ("a", 1))]
        assert len(load_problems(source, "test")) == 1  # the same problem, which is taken once
