import json

import pytest

from rllib_gtpo.data import load_tasks
from rllib_gtpo.errors import DataError

ROWS = [{"id": 1, "question": "a"}, {"id": 2, "question": "b"}]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class TestSources:
    def test_a_list(self):
        assert load_tasks(ROWS, "train") == ROWS

    def test_json_lines(self, tmp_path):
        assert load_tasks(write(tmp_path / "rows.jsonl", ROWS), "train") == ROWS

    def test_json(self, tmp_path):
        (tmp_path / "rows.json").write_text(json.dumps(ROWS))
        assert load_tasks(str(tmp_path / "rows.json"), "train") == ROWS

    def test_parquet(self, tmp_path):
        import datasets

        datasets.Dataset.from_list(ROWS).to_parquet(str(tmp_path / "rows.parquet"))
        assert load_tasks(str(tmp_path / "rows.parquet"), "train") == ROWS

    def test_a_directory_with_a_file_per_split(self, tmp_path):
        write(tmp_path / "train.jsonl", ROWS[:1])
        write(tmp_path / "test.jsonl", ROWS[1:])
        assert load_tasks(str(tmp_path), "test") == ROWS[1:]

    def test_a_dict_of_splits(self, tmp_path):
        source = {"train": write(tmp_path / "a.jsonl", ROWS), "test": ROWS[:1]}
        assert load_tasks(source, "train") == ROWS
        assert load_tasks(source, "test") == ROWS[:1]
        with pytest.raises(DataError, match=r"no split 'validation'.*test.*train"):
            load_tasks(source, "validation")

    def test_a_saved_hugging_face_dataset(self, tmp_path):
        import datasets

        data = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})
        data.save_to_disk(str(tmp_path / "saved"))
        assert load_tasks(str(tmp_path / "saved"), "train") == ROWS
        with pytest.raises(DataError, match="no split 'test'"):
            load_tasks(str(tmp_path / "saved"), "test")


class TestBadInput:
    def test_the_row_is_named(self, tmp_path):
        path = tmp_path / "rows.jsonl"
        path.write_text('{"a": 1}\n{"a": \n')
        with pytest.raises(DataError, match=r"rows\.jsonl, row 2: not JSON"):
            load_tasks(str(path), "train")
        path.write_text('{"a": 1}\n[1]\n')
        with pytest.raises(DataError, match=r"row 2: expected an object, got list"):
            load_tasks(str(path), "train")

    def test_not_utf8(self, tmp_path):
        path = tmp_path / "rows.jsonl"
        path.write_bytes(b'{"a": 1}\n{"a": "\xff"}\n')
        with pytest.raises(DataError, match="not UTF-8"):
            load_tasks(str(path), "train")

    def test_empty(self, tmp_path):
        with pytest.raises(DataError, match="no rows"):
            load_tasks(write(tmp_path / "rows.jsonl", []), "train")

    def test_repeated_ids(self):
        with pytest.raises(DataError, match="row 3: id 1 is taken by row 1"):
            load_tasks([*ROWS, {"id": 1}], "train")

    def test_missing_file(self):
        with pytest.raises(DataError, match="no such file"):
            load_tasks("./nowhere.jsonl", "train")

    def test_broken_parquet(self, tmp_path):
        (tmp_path / "rows.parquet").write_bytes(b"nonsense")
        with pytest.raises(DataError, match="not a readable Parquet"):
            load_tasks(str(tmp_path / "rows.parquet"), "train")

    def test_unknown_kind_of_file(self, tmp_path):
        (tmp_path / "rows.csv").write_text("a,b\n")
        with pytest.raises(DataError, match="unknown kind"):
            load_tasks(str(tmp_path / "rows.csv"), "train")

    def test_an_s3_address_without_a_key(self):
        with pytest.raises(DataError, match="s3://bucket/key"):
            load_tasks("s3://bucket", "train")

    def test_an_unreachable_s3_object_says_what_to_check(self, monkeypatch):
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        with pytest.raises(DataError, match="credentials"):
            load_tasks("s3://bucket/rows.jsonl", "train")
