"""Records in a bucket, and addresses that cannot be written."""

from __future__ import annotations

import pytest

from rllib_gtpo import record
from rllib_gtpo.cli import main
from rllib_gtpo.errors import ConfigError
from rllib_gtpo.record.location import Location
from tests.record.samples import write_record
from tests.record.store import Store


@pytest.fixture
def keys(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def store(keys):
    made = Store()
    yield made
    made.close()


def test_written_and_read_in_a_bucket(store):
    write_record(store.address("bucket/run"), iterations=2, groups=2, members=3)
    names = [name for name in store.objects if name.endswith(".parquet")]
    assert names == [f"bucket/run/record/iteration_00000{i}.parquet" for i in (1, 2)]
    assert len(record.load(store.address("bucket/run"))) == 12
    assert len(record.load(store.address("bucket/run/record"))) == 12
    store.objects[names[0]] = store.objects[names[0]][:300]
    problems = []
    assert len(record.record_files(store.address("bucket/run"), problems)) == 1
    assert "half-written" in problems[0]


def test_a_run_records_into_a_bucket(store, adder_config, tmp_path):
    """Its directory says where, and a report finds it."""
    path = store.address("bucket/records")
    algorithm = adder_config().reporting(record={"share": 1.0, "path": path}).build_algo()
    algorithm.run_directory = str(tmp_path / "run")
    algorithm.train()
    algorithm.stop()
    assert "bucket/records/run/iteration_000001.parquet" in store.objects
    assert len(record.load(tmp_path / "run")) == 16
    assert main(["report", str(tmp_path / "run")]) == 0


def test_without_the_right_to_write_a_run_does_not_start(keys, adder_config):
    closed = Store(closed_to_all=True)
    config = adder_config().reporting(record={"path": closed.address("bucket/records")})
    with pytest.raises(ConfigError, match=r"cannot be written.*credentials"):
        config.build_algo()
    with pytest.raises(ConfigError, match=r"cannot be read.*credentials"):
        record.load(closed.address("bucket/records"))
    closed.close()


def test_without_credentials_the_report_says_so(monkeypatch, capsys):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    closed = Store(closed_to_all=True)
    assert main(["report", closed.address("bucket/run")]) == 2
    assert "credentials" in capsys.readouterr().err
    closed.close()


def test_an_address_that_makes_no_sense():
    with pytest.raises(ConfigError, match="ftp://"):
        Location.of("ftp://host/x")
