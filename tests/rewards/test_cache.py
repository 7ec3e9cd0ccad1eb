"""The embedders' cache: what is asked once, what survives a process, and what damage does."""

from __future__ import annotations

import multiprocessing
import os

import numpy as np
import pytest

from rllib_gtpo.errors import ConfigError, EmbedderError
from rllib_gtpo.rewards.embedders.cache import CachedEmbedder

WRITERS = 3
TEXTS = [f"text {i}" for i in range(40)]


class Counting:
    """Embeds everything but texts with "bad" in them, and counts what it is asked."""

    def __init__(self, identity="counting"):
        self.identity = identity
        self.asked = []

    def embed(self, texts):
        self.asked += texts
        return [EmbedderError(t) if "bad" in t else vector_of(t) for t in texts]


def vector_of(text):
    vector = np.array([len(text), *text.encode("utf-8", "replace")[-8:]], dtype=np.float32)
    return vector / np.linalg.norm(vector)


def test_a_text_is_asked_once_and_order_is_kept():
    inner = Counting()
    cached = CachedEmbedder(inner)
    vectors = cached.embed(["b", "a", "b"])
    assert inner.asked == ["b", "a"]
    assert all(np.array_equal(v, vector_of(t)) for v, t in zip(vectors, "bab", strict=True))
    cached.embed(["c", "a"])
    assert inner.asked == ["b", "a", "c"]


def test_failures_are_never_kept(tmp_path):
    inner = Counting()
    cached = CachedEmbedder(inner, str(tmp_path))
    for _ in range(2):
        assert isinstance(cached.embed(["bad"])[0], EmbedderError)
    assert inner.asked == ["bad", "bad"]
    assert [f for f in tmp_path.rglob("*") if f.is_file()] == []


def test_the_disk_outlives_the_process(tmp_path):
    CachedEmbedder(Counting(), str(tmp_path)).embed(["a", "ä\ud83d"])
    inner = Counting()
    vectors = CachedEmbedder(inner, str(tmp_path)).embed(["ä\ud83d", "a", "b"])
    assert inner.asked == ["b"]
    assert np.array_equal(vectors[1], vector_of("a")) and vectors[1].dtype == np.float32


def test_another_identity_is_another_cache(tmp_path):
    CachedEmbedder(Counting("one"), str(tmp_path)).embed(["a"])
    inner = Counting("other")
    CachedEmbedder(inner, str(tmp_path)).embed(["a"])
    assert inner.asked == ["a"]


def test_memory_is_bounded_and_keeps_what_was_used_last(monkeypatch):
    monkeypatch.setattr("rllib_gtpo.rewards.embedders.cache._IN_MEMORY", 2)
    inner = Counting()
    cached = CachedEmbedder(inner)
    for text in ("a", "b", "a", "c"):
        cached.embed([text])
    inner.asked.clear()
    cached.embed(["a", "c", "b"])
    assert inner.asked == ["b"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:3],
        lambda data: data[:-4],
        lambda data: data[:-1],
        lambda data: data + b"more",
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: bytes(len(data)),
        lambda data: b"x" * 100_000,
    ],
    ids=["empty", "stub", "a number less", "a byte less", "longer", "a bit", "zeros", "junk"],
)
def test_a_damaged_file_is_written_anew(tmp_path, damage):
    CachedEmbedder(Counting(), str(tmp_path)).embed(["a"])
    (file,) = (f for f in tmp_path.rglob("*") if f.is_file())
    sound = file.read_bytes()
    file.write_bytes(damage(sound))
    inner = Counting()
    (vector,) = CachedEmbedder(inner, str(tmp_path)).embed(["a"])
    assert inner.asked == ["a"] and np.array_equal(vector, vector_of("a"))
    assert file.read_bytes() == sound


def test_a_directory_that_cannot_be_written_costs_only_the_saving(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    inner = Counting()
    cached = CachedEmbedder(inner, str(tmp_path / "file" / "below"))
    for text in ("a", "b"):
        assert np.array_equal(cached.embed([text])[0], vector_of(text))
    assert len([r for r in caplog.records if "cannot be written" in r.message]) == 1


def test_impossible_directories_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        CachedEmbedder(Counting(), str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="give an absolute path"):
        CachedEmbedder(Counting(), "embeddings")
    with pytest.raises(ConfigError, match="cache=3: give a directory"):
        CachedEmbedder(Counting(), 3)


def _write(directory, start):
    start.wait()
    for _ in range(5):
        for result in CachedEmbedder(Counting(), directory).embed(TEXTS):
            assert not isinstance(result, Exception)
        for file in os.scandir(directory):
            assert file.is_dir()


def test_several_processes_write_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(WRITERS)
    writers = [context.Process(target=_write, args=(str(tmp_path), start)) for _ in range(WRITERS)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0] * WRITERS
    inner = Counting()
    vectors = CachedEmbedder(inner, str(tmp_path)).embed(TEXTS)
    assert inner.asked == []
    assert all(np.array_equal(v, vector_of(t)) for v, t in zip(vectors, TEXTS, strict=True))
    assert len([f for f in tmp_path.rglob("*") if f.is_file()]) == len(TEXTS)  # nothing partial
