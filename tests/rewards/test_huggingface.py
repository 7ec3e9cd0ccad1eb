"""Hugging Face encoders, on tiny ones with random weights that are saved here."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

from rllib_gtpo.errors import ConfigError, EmbedderError
from rllib_gtpo.rewards.embedders import build_embedder, huggingface
from rllib_gtpo.rewards.embedders.huggingface import HuggingFace

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "print",
    "(",
    ")",
    "x",
    "=",
    "+",
    *"0123456789",
]
VOCABULARY = {word: index for index, word in enumerate(WORDS)}
TEXTS = ["x = 1", "print ( x + 2 )", "7", "x = 1 + 2 + 3 + 4 + 5 + 6 + 7"]
SIZES = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    BertModel(BertConfig(**SIZES, max_position_embeddings=24)).save_pretrained(directory)
    BertTokenizerFast(vocab=VOCABULARY).save_pretrained(directory)
    return directory


@pytest.fixture
def copy(bert, tmp_path):
    return shutil.copytree(bert, tmp_path / "copy")


def by_hand(directory, text, max_tokens=24):
    """The mean over the tokens of one text alone, so that nothing is padded."""
    tokenizer, model = (
        AutoTokenizer.from_pretrained(directory),
        AutoModel.from_pretrained(directory),
    )
    ids = tokenizer(text, truncation=True, max_length=max_tokens, return_tensors="pt")
    with torch.no_grad():
        mean = model.eval()(**ids).last_hidden_state[0].mean(dim=0).numpy()
    return mean / np.linalg.norm(mean)


def test_padding_counts_for_nothing_and_order_is_kept(bert):
    assert AutoTokenizer.from_pretrained(bert)(TEXTS[0])["input_ids"] == [2, 8, 9, 12, 3]
    vectors = HuggingFace(str(bert), batch_size=3).embed(TEXTS)
    for vector, text in zip(vectors, TEXTS, strict=True):
        assert vector.dtype == np.float32
        assert vector == pytest.approx(by_hand(bert, text), abs=1e-5)


def test_long_texts_are_cut_off_at_what_the_model_holds(bert):
    long = "x + " * 100
    (vector,) = HuggingFace(str(bert)).embed([long])
    assert vector == pytest.approx(by_hand(bert, long), abs=1e-5)
    (short,) = HuggingFace(str(bert), max_tokens=8).embed([long])
    assert short == pytest.approx(by_hand(bert, long, 8), abs=1e-5)
    assert short != pytest.approx(vector, abs=1e-3)


def test_positions_that_start_behind_the_padding(tmp_path):
    torch.manual_seed(0)
    config = RobertaConfig(**SIZES, max_position_embeddings=12, pad_token_id=1)
    RobertaModel(config).save_pretrained(tmp_path)
    BertTokenizerFast(vocab=VOCABULARY, pad_token="[UNK]").save_pretrained(tmp_path)
    (vector,) = HuggingFace(str(tmp_path)).embed(["x + " * 100])
    assert vector == pytest.approx(by_hand(tmp_path, "x + " * 100, 10), abs=1e-5)


def test_a_tokenizer_without_padding(copy):
    tokenizer = AutoTokenizer.from_pretrained(copy, pad_token=None, eos_token="[SEP]")
    tokenizer.save_pretrained(copy)
    assert AutoTokenizer.from_pretrained(copy).pad_token is None
    vectors = HuggingFace(str(copy)).embed(TEXTS)
    assert vectors[0] == pytest.approx(by_hand(copy, TEXTS[0]), abs=1e-5)


def test_half_a_character(bert):
    (vector,) = HuggingFace(str(bert)).embed(["x \ud83d"])
    assert np.linalg.norm(vector) == pytest.approx(1.0)


def test_a_text_that_fails_is_told_alone(bert, monkeypatch):
    embedder = HuggingFace(str(bert))
    encode = embedder._encode

    def out_of_memory(texts):
        if any("7" in text for text in texts):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(texts)

    monkeypatch.setitem(embedder.__dict__, "_encode", out_of_memory)
    first, second, failure, other_failure = embedder.embed(TEXTS)
    assert isinstance(failure, EmbedderError) and isinstance(other_failure, EmbedderError)
    assert "CUDA out of memory" in str(failure)
    assert first == pytest.approx(by_hand(bert, TEXTS[0]), abs=1e-5)
    assert second == pytest.approx(by_hand(bert, TEXTS[1]), abs=1e-5)


def test_weights_that_give_no_number(copy):
    model = AutoModel.from_pretrained(copy)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[WORDS.index("7")] = float("nan")
    model.save_pretrained(copy)
    good, failure = HuggingFace(str(copy)).embed(["x = 1", "7"])
    assert np.isfinite(good).all() and isinstance(failure, EmbedderError)


def test_identity_follows_what_is_in_the_directory(bert, copy):
    identity = HuggingFace(str(copy)).identity
    assert identity == HuggingFace(str(copy)).identity
    assert identity != HuggingFace(str(copy), max_tokens=5).identity
    assert identity.split()[2] == HuggingFace(str(bert)).identity.split()[2]
    assert HuggingFace(str(copy), batch_size=1, device="cpu").identity == identity
    model = AutoModel.from_pretrained(copy)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[0, 0] += 1.0
    model.save_pretrained(copy)
    assert HuggingFace(str(copy)).identity != identity


def test_through_the_cache(bert, tmp_path):
    settings = {"name": "huggingface", "model": str(bert), "cache": str(tmp_path)}
    first = build_embedder(settings).embed(TEXTS)
    again = build_embedder(settings)
    assert all(map(np.array_equal, first, again.embed(TEXTS)))
    assert "_encode" not in vars(again.embedder)  # the model was not even loaded


def test_what_is_no_model(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="cannot be loaded"):
        HuggingFace(str(tmp_path)).embed(["x"])
    with pytest.raises(ConfigError, match="neither a directory nor a model on the hub"):
        HuggingFace("not a/valid/name").embed(["x"])


class TestSentenceTransformers:
    @pytest.fixture(autouse=True)
    def directory(self, copy):
        """A sentence-transformers model that pools by mean, as that package writes it."""
        kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
        modules = [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(kinds)
        ]
        (copy / "modules.json").write_text(json.dumps(modules))
        (copy / "2_Normalize").mkdir()
        (copy / "1_Pooling").mkdir()
        self.pool(copy, "mean_tokens")
        return copy

    def pool(self, directory, mode):
        modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
        settings = {f"pooling_mode_{m}": m == mode for m in modes}
        settings["word_embedding_dimension"] = 16
        (directory / "1_Pooling" / "config.json").write_text(json.dumps(settings))

    def without_the_package(self, monkeypatch):
        found = huggingface.importlib.util.find_spec
        monkeypatch.setattr(
            huggingface.importlib.util,
            "find_spec",
            lambda name: None if name == "sentence_transformers" else found(name),
        )

    def test_the_plain_mean_needs_no_package(self, directory, monkeypatch):
        self.without_the_package(monkeypatch)
        vectors = HuggingFace(str(directory)).embed(TEXTS)
        assert vectors[1] == pytest.approx(by_hand(directory, TEXTS[1]), abs=1e-5)

    def test_other_pooling_does(self, directory, monkeypatch):
        self.without_the_package(monkeypatch)
        self.pool(directory, "cls_token")
        with pytest.raises(ConfigError, match=r"pip install 'rllib-gtpo\[sentence-transformers\]'"):
            HuggingFace(str(directory)).embed(TEXTS)

    def test_with_the_package(self, directory):
        package = pytest.importorskip("sentence_transformers")
        mean = HuggingFace(str(directory)).embed(TEXTS)
        assert mean[1] == pytest.approx(by_hand(directory, TEXTS[1]), abs=1e-5)
        self.pool(directory, "cls_token")
        first = HuggingFace(str(directory), max_tokens=8)
        vectors = first.embed(TEXTS)
        model = package.SentenceTransformer(str(directory), device="cpu")
        model.max_seq_length = 8
        expected = model.encode(TEXTS, normalize_embeddings=True)
        assert np.array(vectors) == pytest.approx(expected, abs=1e-5)
        assert vectors[1] != pytest.approx(mean[1], abs=1e-3)
        assert "sentence-transformers" in first.identity
