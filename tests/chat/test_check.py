"""`python -m rllib_gtpo.chat check`."""

import pytest

from rllib_gtpo.chat.__main__ import HEADER, main
from rllib_gtpo.models import build_tokenizer


@pytest.fixture
def model(tmp_path):
    build_tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_a_model_and_a_template_get_their_rows(tmp_path, model, capsys):
    template = build_tokenizer().chat_template.replace("message['content']", "'a' ~ loop.index")
    (tmp_path / "odd.jinja").write_text(template)
    assert main(["check", model, str(tmp_path / "odd.jinja")]) == 1
    *header, good, bad = capsys.readouterr().out.splitlines()
    assert "\n".join(header) == HEADER
    assert (
        good == f"| {model} | not shown | tool messages | text only | `<\\|im_end\\|>` | nothing |"
    )
    assert bad.startswith("| odd | refused: The chat template cannot be continued turn by turn")
    assert main(["check", model]) == 0


@pytest.mark.parametrize("source", ["missing.jinja", "./missing"])
def test_what_is_not_there_is_said(source, capsys):
    assert main(["check", source]) == 1
    out = capsys.readouterr().out
    assert "refused" in out and "o such" in out


def test_it_asks_for_a_source(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["check"])
    assert exit_.value.code == 2
    assert "SOURCE" in capsys.readouterr().err
