"""Models and tokenizers that need no download."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rllib_gtpo.chat import ChatCodec
from rllib_gtpo.errors import ChatTemplateError, ConfigError
from rllib_gtpo.models import (
    TINY_QWEN2,
    build_tokenizer,
    check_vocabulary,
    load_model,
    load_tokenizer,
)

TOKENIZER = build_tokenizer(extra=["leave\n", "  ", "print"])
SMALL = {**TINY_QWEN2, "hidden_size": 16, "intermediate_size": 16, "num_key_value_heads": 4}
MARKUP = ["```python\n", "\n```", "print(", "user\n", "leave\n", "\nleft: ", "`", "\n", " ", "é"]
TEXT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.lists(st.sampled_from(MARKUP)).map("".join),
)


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


class TestTokenizer:
    @settings(max_examples=300, deadline=None)
    @given(TEXT)
    def test_every_text_round_trips(self, text):
        ids = encode(text)
        assert TOKENIZER.decode(ids) == text
        assert len(ids) <= len(text.encode())

    @settings(max_examples=100, deadline=None)
    @given(TEXT, TEXT)
    def test_ids_joined_are_texts_joined(self, first, second):
        assert TOKENIZER.decode(encode(first) + encode(second)) == first + second

    def test_markup_is_one_token_and_the_rest_are_bytes(self):
        pieces = ["```python\n", "print(", "1", "+", "2", ")", "\n```"]
        ids = encode("".join(pieces))
        assert [TOKENIZER.decode([i]) for i in ids] == pieces
        assert len(encode("é")) == 2
        assert [len(encode(text)) for text in ("leave\n", "  ", "<|im_end|>")] == [1, 1, 1]

    def test_the_longest_token_wins(self):
        assert [TOKENIZER.decode([i]) for i in encode("print(print")] == ["print(", "print"]

    def test_every_id_has_a_text_of_its_own(self):
        tokens = TOKENIZER.convert_ids_to_tokens(range(len(TOKENIZER)))
        assert None not in tokens
        assert len(set(tokens)) == len(TOKENIZER)

    @pytest.mark.parametrize("extra", ["", "<|im_end|>", "été"])
    def test_impossible_extra_tokens_are_refused(self, extra):
        with pytest.raises(ConfigError, match="neither empty nor special"):
            build_tokenizer(extra=[extra])

    def test_a_saved_tokenizer_is_the_same(self, tmp_path):
        TOKENIZER.save_pretrained(tmp_path)
        loaded = load_tokenizer(str(tmp_path))
        text = "user\nété\n ```python\nprint(1)\n```<|im_end|>"
        assert loaded.encode(text) == TOKENIZER.encode(text)
        assert loaded.decode(loaded.encode(text)) == text
        assert loaded.chat_template == TOKENIZER.chat_template
        assert loaded.eos_token_id == TOKENIZER.eos_token_id


class TestTemplate:
    def test_it_is_chatml_with_all_roles(self):
        messages = [
            {"role": "system", "content": "s"},
            {"role": "user", "content": " u\n"},
            {"role": "assistant", "content": "\n a "},
            {"role": "tool", "content": "t", "name": "python"},
        ]
        text = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert text == (
            "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\n u\n<|im_end|>\n"
            "<|im_start|>assistant\n\n a <|im_end|>\n<|im_start|>tool\nt<|im_end|>\n"
            "<|im_start|>assistant\n"
        )

    def test_it_continues_exactly(self):
        codec = ChatCodec(TOKENIZER, "fenced")
        assert TOKENIZER.decode([codec.end_of_turn_id]) == "<|im_end|>"

    @pytest.mark.parametrize("as_file", [True, False])
    def test_a_template_of_ones_own(self, tmp_path, as_file):
        template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        file = tmp_path / "mine.jinja"
        file.write_text(template, encoding="utf-8")
        loaded = load_tokenizer(TINY_QWEN2, chat_template=str(file) if as_file else template)
        assert loaded.chat_template == template

    def test_a_template_file_that_does_not_exist(self):
        with pytest.raises(ConfigError, match="no such file"):
            load_tokenizer(TINY_QWEN2, chat_template="mine.jinja")

    def test_a_tokenizer_without_a_template_says_how_to_mend_it(self, tmp_path):
        plain = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
        plain.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=plain).save_pretrained(tmp_path)
        with pytest.raises(ChatTemplateError, match=r"no chat template.*chat_template="):
            load_tokenizer(str(tmp_path))
        assert load_tokenizer(str(tmp_path), chat_template="{{ 1 }}").chat_template == "{{ 1 }}"


class TestFromScratch:
    def test_weights_are_a_function_of_the_seed_alone(self):
        torch.manual_seed(1)
        first = load_model(SMALL, seed=5).state_dict()
        torch.manual_seed(2)
        second, other = (
            load_model(SMALL, seed=5).state_dict(),
            load_model(SMALL, seed=6).state_dict(),
        )
        assert all(torch.equal(first[k], second[k]) for k in first)
        assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])

    def test_torchs_generator_is_left_as_it_was(self):
        torch.manual_seed(3)
        expected = torch.rand(4)
        torch.manual_seed(3)
        load_model(SMALL, seed=5)
        assert torch.equal(torch.rand(4), expected)

    def test_the_vocabulary_is_the_tokenizers(self):
        assert load_model(SMALL).config.vocab_size == len(build_tokenizer())
        model = load_model(SMALL, tokenizer=TOKENIZER)
        assert model.get_output_embeddings().weight.shape[0] == len(TOKENIZER)
        assert model.config.eos_token_id == TOKENIZER.eos_token_id

    def test_the_default_is_small_and_uses_fused_attention(self):
        model = load_model(TINY_QWEN2)
        assert sum(p.numel() for p in model.parameters()) < 500_000
        assert model.config._attn_implementation == "sdpa"
        assert (
            model.config.rope_parameters["rope_theta"]
            == TINY_QWEN2["rope_parameters"]["rope_theta"]
        )

    def test_it_is_in_evaluation_mode(self):
        """As one from a directory is: dropout would set learner and sampler apart."""
        assert not any(module.training for module in load_model(SMALL).modules())

    @pytest.mark.parametrize(
        "source",
        [
            {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64},
            {**SMALL, "attention_dropout": 0.5},
        ],
    )
    def test_it_has_no_dropout_in_training_mode(self, tmp_path, source):
        """RLlib trains in that mode; GPT-2 has a tenth by default."""
        ids = torch.tensor([encode("12+7")])
        load_model(source).save_pretrained(tmp_path)
        for model in (load_model(source), load_model(str(tmp_path))):
            assert torch.equal(model.train()(ids).logits, model.eval()(ids).logits)

    def test_dtype(self):
        assert load_model(SMALL, dtype="bfloat16").dtype is torch.bfloat16
        with pytest.raises(ConfigError, match="float32, bfloat16"):
            load_model(SMALL, dtype="float8")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"model_type": None}, "model_type"),
            ({"model_type": "no-such-model"}, "does not describe a causal LM"),
            ({"vocab_size": 100}, "the model only 100"),
        ],
    )
    def test_impossible_configs(self, change, message):
        source = {k: v for k, v in {**SMALL, **change}.items() if v is not None}
        with pytest.raises(ConfigError, match=message):
            load_model(source)


class TestDirectories:
    def test_mixed_dtypes_become_the_one_that_was_asked_for(self, tmp_path, monkeypatch):
        from safetensors.torch import load_file

        mixed = load_model(SMALL, seed=1)
        mixed.get_input_embeddings().weight.data = mixed.get_input_embeddings().weight.half()
        mixed.save_pretrained(tmp_path)
        saved = load_file(tmp_path / "model.safetensors").values()
        assert {v.dtype for v in saved} == {torch.float16, torch.float32}
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
            loaded = load_model(str(tmp_path), dtype=name)
            assert {p.dtype for p in loaded.parameters()} == {dtype}
        # A model may insist on float32 for some of its weights.
        monkeypatch.setattr(type(mixed), "_keep_in_fp32_modules_strict", {"norm"})
        with pytest.raises(ConfigError, match=r"norm\.weight' stays float32.*dtype='float32'"):
            load_model(str(tmp_path), dtype="bfloat16")

    def test_the_highest_id_counts_and_not_their_number(self, tmp_path):
        class Sparse:
            def get_vocab(self):
                return {"a": 0, "b": 500}

        with pytest.raises(ConfigError, match=r"resize_token_embeddings\(501\)"):
            check_vocabulary(Sparse(), 300)
        check_vocabulary(Sparse(), 501)

    def test_a_saved_model_is_the_same(self, tmp_path):
        model = load_model(SMALL, seed=1)
        model.save_pretrained(tmp_path)
        ids = torch.tensor([encode("12+7")])
        assert torch.equal(load_model(str(tmp_path))(ids).logits, model.eval()(ids).logits)

    def test_a_tokenizer_that_does_not_fit(self, tmp_path):
        load_model(SMALL).save_pretrained(tmp_path)
        load_model(str(tmp_path), tokenizer=build_tokenizer())
        with pytest.raises(ConfigError, match="model's own tokenizer"):
            load_model(str(tmp_path), tokenizer=TOKENIZER)

    @pytest.mark.parametrize("load", [load_model, load_tokenizer])
    def test_no_such_directory(self, load):
        with pytest.raises(ConfigError, match=r"'\./nowhere'.*no such directory"):
            load("./nowhere")

    @pytest.mark.parametrize("load", [load_model, load_tokenizer])
    def test_a_directory_without_a_model(self, tmp_path, load):
        (tmp_path / "config.json").write_text(json.dumps({"a": 1}))
        with pytest.raises(ConfigError, match="cannot be loaded"):
            load(str(tmp_path))


def test_a_saved_model_and_tokenizer_load_as_they_were(tmp_path):
    """As the class that transformers chooses by the architecture of the model."""
    load_model(SMALL, tokenizer=TOKENIZER).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    for text in ["".join(MARKUP), "<|im_start|>user\nprint(1)<|im_end|>\n", "héllo wörld 12"]:
        assert loaded.encode(text, add_special_tokens=False) == encode(text)
        assert loaded.decode(encode(text)) == text
    assert ChatCodec(loaded).stop_token_ids == ChatCodec(TOKENIZER).stop_token_ids
