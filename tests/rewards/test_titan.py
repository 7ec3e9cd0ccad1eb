"""Titan through real boto3 against a local server: what is tried again, what is told, and how."""

from __future__ import annotations

import json
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from rllib_gtpo.errors import ConfigError, EmbedderError
from rllib_gtpo.rewards.embedders import build_embedder, titan
from rllib_gtpo.rewards.embedders.titan import Titan
from rllib_gtpo.rewards.shaping import Shaping
from rllib_gtpo.types import Group
from tests.rewards.bedrock import Bedrock, error, raw, vector_of
from tests.rewards.test_shaping import member

MODEL = "amazon.titan-embed-text-v2:0"
THROTTLED = error("ThrottlingException", 429)


@pytest.fixture(autouse=True)
def aws(monkeypatch, tmp_path):
    """Fake credentials, no settings of the machine's own, and no way to the network."""
    for name in ("AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_BEARER_TOKEN_BEDROCK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(titan, "_MAX_WAIT_S", 0.01)


@pytest.fixture
def bedrock():
    """Starts servers, and stops them at the end."""
    servers = []

    def start(behave=lambda text, n: None):
        servers.append(Bedrock(behave))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def embedder(server, **settings):
    return Titan(**{"region": "us-east-1", "endpoint_url": server.url, **settings})


def same(vector, text, dimensions=1024):
    return np.allclose(vector, vector_of(text, dimensions), atol=1e-6)


def answer(values):
    return raw(json.dumps({"embedding": values}).encode())


@pytest.mark.parametrize("dimensions", [1024, 512, 256])
def test_request_and_answer(bedrock, dimensions):
    server = bedrock()
    vectors = embedder(server, dimensions=dimensions).embed(["a = 1", "b"])
    assert [v.shape for v in vectors] == [(dimensions,)] * 2
    assert vectors[0].dtype == np.float32
    assert same(vectors[0], "a = 1", dimensions) and same(vectors[1], "b", dimensions)
    assert (MODEL, {"inputText": "a = 1", "dimensions": dimensions, "normalize": True}) in (
        server.requests
    )


def test_an_answer_that_is_not_of_length_1_is_scaled(bedrock):
    server = bedrock(lambda text, n: answer([3.0, 4.0] + [0.0] * 254))
    (vector,) = embedder(server, dimensions=256).embed(["x"])
    assert vector[:2] == pytest.approx([0.6, 0.8])


@pytest.mark.parametrize(
    "fault",
    [
        THROTTLED,
        error("ThrottlingException", 400),
        error("ServiceUnavailableException", 503),
        error("InternalServerException", 500),
        error("ModelTimeoutException", 408),
        error("ModelNotReadyException", 429),
        (502, {}, b"<html>bad gateway</html>"),
    ],
    ids=lambda fault: f"{fault[0]}-{fault[1].get('x-amzn-ErrorType', 'html')}",
)
def test_a_passing_fault_is_tried_again(bedrock, fault):
    server = bedrock(lambda text, n: fault if n < 2 else None)
    (vector,) = embedder(server).embed(["x"])
    assert same(vector, "x")
    assert len(server.requests) == 3


def test_attempts_are_bounded_for_each_text(bedrock):
    server = bedrock(lambda text, n: THROTTLED if text != "good" else None)
    bad, good, worse = embedder(server, attempts=3).embed(["bad", "good", "worse"])
    assert same(good, "good")
    assert isinstance(bad, EmbedderError) and isinstance(worse, EmbedderError)
    assert "given up after 3 attempts" in str(bad) and "ThrottlingException" in str(bad)
    assert "lower concurrency or raise attempts" in str(bad)
    assert sorted(server.texts) == ["bad"] * 3 + ["good"] + ["worse"] * 3


def test_waits_are_random_below_a_limit_that_doubles(bedrock, monkeypatch):
    waits = []
    monkeypatch.setattr(titan, "_MAX_WAIT_S", 4.0)
    monkeypatch.setattr(titan, "time", SimpleNamespace(sleep=waits.append))  # of no other thread
    server = bedrock(lambda text, n: THROTTLED)
    patient = embedder(server, attempts=6, concurrency=1)
    patient.embed(["x"] * 10)
    tries = np.array(waits).reshape(10, 5)
    limits = np.array([1.0, 2.0, 4.0, 4.0, 4.0])
    assert (tries >= 0.0).all() and (tries <= limits).all()
    assert tries.max(axis=0) == pytest.approx(limits, rel=0.8)
    assert len(np.unique(tries)) == 50


def test_a_read_timeout_is_tried_again(bedrock):
    done = threading.Event()

    def behave(text, n):
        if n == 0:
            done.wait(5.0)

    server = bedrock(behave)
    began = time.monotonic()
    (vector,) = embedder(server, timeout_s=0.3).embed(["x"])
    done.set()
    assert same(vector, "x")
    assert time.monotonic() - began < 4.0
    assert len(server.requests) == 2


def test_a_server_that_is_not_there(bedrock):
    server = bedrock()
    server_url = server.url
    server.close()
    (failure,) = Titan(region="us-east-1", endpoint_url=server_url, attempts=2).embed(["x"])
    assert isinstance(failure, EmbedderError)
    assert "check region, endpoint_url and network" in str(failure)


@pytest.mark.parametrize(
    ("refusal", "remedy"),
    [
        (error("ExpiredTokenException", 403), "renew the AWS credentials"),
        (error("UnrecognizedClientException", 403), "check the AWS keys"),
        (error("AccessDeniedException", 403), "allow bedrock:InvokeModel"),
        (error("ValidationException", 400, "Malformed input request"), "check model and dim"),
        (error("ResourceNotFoundException", 404), "a region that offers the model"),
    ],
    ids=lambda value: value[1]["x-amzn-ErrorType"] if isinstance(value, tuple) else "",
)
def test_a_refusal_is_told_with_its_remedy_and_not_tried_again(bedrock, refusal, remedy):
    server = bedrock(lambda text, n: refusal)
    (failure,) = embedder(server).embed(["x"])
    assert isinstance(failure, EmbedderError)
    assert refusal[1]["x-amzn-ErrorType"] in str(failure) and remedy in str(failure)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "malformed",
    [
        raw(b"not json"),
        raw(b"{}"),
        raw(b"[]"),
        raw(b"\xff\xfe"),
        answer([1.0] * 7),
        answer([[1.0] * 1024]),
        answer("many"),
        answer([float("nan")] + [1.0] * 1023),
        answer([0.0] * 1024),
        answer([None] * 1024),
    ],
    ids=["text", "empty", "list", "bytes", "short", "nested", "string", "nan", "zero", "null"],
)
def test_a_malformed_answer_is_that_texts_failure(bedrock, malformed):
    server = bedrock(lambda text, n: malformed if text == "bad" else None)
    first, failure, last = embedder(server).embed(["first", "bad", "last"])
    assert same(first, "first") and same(last, "last")
    assert isinstance(failure, EmbedderError)
    assert "not an embedding of 1024 numbers" in str(failure)
    assert len(server.requests) == 3


def test_no_credentials(bedrock, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    server = bedrock()
    (failure,) = embedder(server).embed(["x"])
    assert "give AWS credentials to every machine" in str(failure)
    assert server.requests == []


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({}, "must specify a region.*region, profile or endpoint_url"),
        ({"region": "us-east-1", "profile": "nobody"}, "nobody"),
        ({"region": "us-east-1", "endpoint_url": "nowhere"}, "Invalid endpoint: nowhere"),
    ],
)
def test_settings_with_which_no_text_could_be_embedded_raise(settings, match):
    with pytest.raises(ConfigError, match=match):
        Titan(**settings).embed(["x"])


def test_profile_and_region_come_from_awss_own_files(bedrock, tmp_path, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    (tmp_path / "config").write_text(
        "[profile team]\nregion = eu-west-1\naws_access_key_id = k\naws_secret_access_key = s\n"
    )
    server = bedrock()
    (vector,) = Titan(profile="team", endpoint_url=server.url).embed(["x"])
    assert same(vector, "x")


def test_several_requests_are_in_flight(bedrock):
    together = threading.Barrier(4)

    def behave(text, n):
        together.wait(timeout=10.0)  # nobody is answered before four have asked

    server = bedrock(behave)
    texts = [f"text {i}" for i in range(8)]
    vectors = embedder(server, concurrency=4, attempts=1).embed(texts)
    assert all(same(v, t) for v, t in zip(vectors, texts, strict=True))


def test_concurrency_is_bounded(bedrock):
    flying, most, lock = [0], [0], threading.Lock()

    def behave(text, n):
        with lock:
            flying[0] += 1
            most[0] = max(most[0], flying[0])
        time.sleep(0.05)
        with lock:
            flying[0] -= 1

    embedder(bedrock(behave), concurrency=3).embed([str(i) for i in range(12)])
    assert most[0] == 3


class TestLongTexts:
    def test_more_characters_than_a_request_takes_are_cut_into_equal_pieces(self, bedrock):
        text = "".join(f"x{i} = {i}\n" for i in range(9000))
        server = bedrock()
        (vector,) = embedder(server).embed([text])
        pieces = sorted(server.texts, key=text.index)
        assert "".join(pieces) == text
        assert max(map(len, pieces)) <= 50_000 and len(pieces) == -(-len(text) // 50_000)
        assert max(map(len, pieces)) - min(map(len, pieces)) <= len(pieces)
        mean = np.mean([vector_of(piece, 1024) for piece in pieces], axis=0)
        assert vector == pytest.approx(mean / np.linalg.norm(mean), abs=1e-6)

    def test_more_tokens_than_a_request_takes(self, bedrock):
        def behave(text, n):
            if len(text) > 3000:
                message = "400 Bad Request: Too many input tokens. Max input tokens: 8192"
                return error("ValidationException", 400, message)

        text = "".join(chr(97 + i % 26) for i in range(10_000))
        server = bedrock(behave)
        (vector,) = embedder(server).embed([text])
        pieces = [text[i : i + 2500] for i in range(0, 10_000, 2500)]
        assert [t for t in server.texts if len(t) <= 3000] == pieces
        mean = np.mean([vector_of(piece, 1024) for piece in pieces], axis=0)
        assert vector == pytest.approx(mean / np.linalg.norm(mean), abs=1e-6)

    def test_a_service_that_calls_everything_too_long(self, bedrock):
        server = bedrock(
            lambda text, n: error("ValidationException", 400, "Too many input tokens.")
        )
        (failure,) = embedder(server).embed(["x" * 5000])
        assert "625 characters are refused" in str(failure)
        assert len(server.requests) == 4


def test_half_a_character_is_sent_in_a_form_that_json_has(bedrock):
    server = bedrock()
    (vector,) = embedder(server).embed(["a\ud83d"])
    assert server.texts == ["a\\ud83d"]
    assert same(vector, "a\\ud83d")


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_failure_in_the_middle_of_a_group(bedrock, policy):
    server = bedrock(lambda text, n: error("ValidationException", 400) if text == "third" else None)
    groups = [
        Group(0, {}, [member(c) for c in ("first", "second", "third")] + [member("right", True)]),
        Group(1, {}, [member("second"), member("right", True)]),
    ]
    shaping = Shaping(embedder(server), on_failure=policy)
    if policy == "stop":
        with pytest.raises(EmbedderError, match="1 of 4 texts"):
            shaping.score_groups(groups)
        return
    assert shaping.score_groups(groups) == 1
    assert all("shaping" not in t.turns[-1].rewards for t in groups[0].trajectories)
    similarity = vector_of("second", 1024) @ vector_of("right", 1024)
    got = groups[1].trajectories[0].turns[-1].rewards["shaping"]
    assert got == pytest.approx(0.5 * max(0.0, similarity), abs=1e-6)


def test_a_cached_text_asks_nobody(bedrock, tmp_path):
    server = bedrock(lambda text, n: error("ValidationException", 400) if text == "bad" else None)
    settings = {
        "name": "titan",
        "region": "us-east-1",
        "endpoint_url": server.url,
        "cache": str(tmp_path / "cache"),
    }
    first, failure = build_embedder(settings).embed(["x", "bad"])
    again, failure_again = build_embedder(settings).embed(["x", "bad"])
    assert isinstance(failure, EmbedderError) and isinstance(failure_again, EmbedderError)
    assert np.array_equal(first, again)
    assert sorted(server.texts) == ["bad", "bad", "x"]
    build_embedder({**settings, "dimensions": 512}).embed(["x"])
    assert sorted(server.texts) == ["bad", "bad", "x", "x"]
