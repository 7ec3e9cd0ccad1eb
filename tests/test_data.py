import json
import random

import pytest

from rllib_gtpo.data import NoSuchSplit, has_splits, load_tasks
from rllib_gtpo.errors import ConfigError, DataError
from tests.s3 import S3

ROWS = [{"id": 1, "question": "a"}, {"id": 2, "question": "b"}]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    """What `datasets` keeps of loaded files goes where the test's own files go."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


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
        with pytest.raises(NoSuchSplit, match=r"no split 'validation'; it has \['test', 'train'\]"):
            load_tasks(str(tmp_path), "validation")

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
        assert load_tasks(f"{tmp_path / 'saved'}[train]", "test") == ROWS

    def test_a_clone_of_a_hub_dataset(self, tmp_path):
        """Files in a folder, as `git clone` leaves them; this is how `datasets` loads the hub."""
        (tmp_path / "data").mkdir()
        write(tmp_path / "data" / "train-00000-of-00001.jsonl", ROWS)
        assert load_tasks(str(tmp_path), "train") == ROWS
        assert load_tasks(f"{tmp_path}[train[1:]]", "test") == ROWS[1:]
        with pytest.raises(NoSuchSplit, match=r"no split 'test'; it has \['train'\]: .*\[train\]'"):
            load_tasks(str(tmp_path), "test")

    def test_several_one_after_the_other(self, tmp_path):
        files = [write(tmp_path / f"{i}.jsonl", [row]) for i, row in enumerate(ROWS)]
        assert load_tasks(files, "train") == ROWS
        with pytest.raises(DataError, match=r"0\.jsonl, row 1: id 1 is taken by .*0\.jsonl, row 1"):
            load_tasks([files[0], write(tmp_path / "again0.jsonl", ROWS[:1])][::-1], "train")

    def test_columns(self, tmp_path):
        file = write(tmp_path / "rows.jsonl", [{"problem": "a", "meta": {"answer": 3}}])
        columns = {"question": "problem", "answer": "meta.answer"}
        assert load_tasks(file, "train", columns) == [{"question": "a", "answer": 3}]
        by_split = {"train": columns, "test": {"question": "problem"}}
        assert load_tasks(file, "test", by_split) == [{"question": "a"}]
        assert load_tasks(file, "validation", by_split) == load_tasks(file, "validation")
        own = {"aime": file, "train": file}
        by_name = {"train": columns, "aime": {"question": "problem"}}
        assert load_tasks(own, "aime", by_name) == [{"question": "a"}]

    def test_which_sources_have_splits(self, tmp_path):
        file = write(tmp_path / "rows.jsonl", ROWS)
        without = [ROWS, file, [file, file], "s3://bucket/rows.jsonl", "openai/gsm8k:main[train]"]
        assert not any(map(has_splits, without))
        assert all(map(has_splits, [{"train": file}, str(tmp_path), "openai/gsm8k:main"]))


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

    def test_a_file_has_no_splits(self, tmp_path):
        file = write(tmp_path / "rows.jsonl", ROWS)
        with pytest.raises(
            DataError, match=r"rows\.jsonl: a file has no splits: leave out \[test\]"
        ):
            load_tasks(f"{file}[test]", "train")

    def test_a_column_that_is_not_there(self, tmp_path):
        file = write(tmp_path / "rows.jsonl", [{"problem": "a"}, {"problems": "b"}])
        with pytest.raises(
            DataError, match=r"rows\.jsonl, row 2: no column 'problem' .*did you mean 'problems'"
        ):
            load_tasks(file, "train", {"question": "problem"})

    def test_an_unknown_mapping(self):
        with pytest.raises(ConfigError, match="did you mean 'gsm8k'"):
            load_tasks(ROWS, "train", "gsm8")


class TestS3:
    @pytest.fixture
    def s3(self, monkeypatch, tmp_path):
        """A server that boto3 is sent to, with credentials that it accepts."""
        lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
        objects = {"bucket/a b/rows.jsonl": lines, "bucket/bad.jsonl": b'{"a": 1}\n{"a": \n'}
        server = S3({**objects, "bucket/secret.jsonl": lines}, forbidden={"bucket/secret.jsonl"})
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield server
        server.close()

    def test_json_lines(self, s3):
        assert load_tasks("s3://bucket/a b/rows.jsonl", "train") == ROWS
        assert {(m, name) for m, name, _ in s3.requests} >= {("GET", "bucket/a b/rows.jsonl")}

    def test_parquet_in_parts(self, s3, tmp_path):
        """Larger than what boto3 fetches with one request."""
        import datasets

        rows = [{"id": i, "question": random.Random(i).randbytes(4000).hex()} for i in range(1500)]
        datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
        s3.objects["bucket/rows.parquet"] = (tmp_path / "rows.parquet").read_bytes()
        assert load_tasks({"test": "s3://bucket/rows.parquet"}, "test") == rows
        assert sum(wanted is not None for _, _, wanted in s3.requests) > 1

    def test_a_bad_row_is_named_with_the_address(self, s3):
        with pytest.raises(DataError, match=r"^s3://bucket/bad\.jsonl, row 2: not JSON"):
            load_tasks("s3://bucket/bad.jsonl", "train")

    @pytest.mark.parametrize("key", ["secret.jsonl", "nowhere.jsonl"])
    def test_an_object_that_cannot_be_read(self, s3, key):
        status = "403" if key == "secret.jsonl" else "404"
        message = rf"^s3://bucket/{key}: .*{status}.*Check the address.*s3:GetObject"
        with pytest.raises(DataError, match=message):
            load_tasks(f"s3://bucket/{key}", "train")

    def test_no_credentials(self, s3, monkeypatch):
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        with pytest.raises(DataError, match=r"Unable to locate credentials.*instance role"):
            load_tasks("s3://bucket/a b/rows.jsonl", "train")

    def test_an_unreachable_endpoint(self, s3, monkeypatch):
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
        with pytest.raises(DataError, match=r"Could not connect.*Check the address"):
            load_tasks("s3://bucket/a b/rows.jsonl", "train")

    @pytest.mark.parametrize("address", ["s3://bucket", "s3:///rows.jsonl", "s3://bucket/rows.csv"])
    def test_an_address_without_a_usable_key(self, address):
        with pytest.raises(DataError, match="s3://bucket/key"):
            load_tasks(address, "train")
