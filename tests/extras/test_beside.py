"""What lies beside a tokenizer is read with it, and what cannot be read is left out."""

import os

import pytest
from checkpoints import refusal

import llava
from extras import beside


def test_all_that_can_be_read_is_kept(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "<pad>", "letter": "ä"}', encoding="utf-8")
    (tmp_path / "added_tokens.json").write_text("{")
    (tmp_path / "chat_template.jinja").write_text("{{ ä }}", encoding="utf-8")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("R")
    (tmp_path / "additional_chat_templates" / "notes.txt").write_text("mine")
    (tmp_path / "config.json").write_text("{}")
    assert beside.read(tmp_path) == {
        "tokenizer_config.json": {"pad_token": "<pad>", "letter": "ä"},
        "added_tokens.json": "{",  # passed on as it is
        "chat_template.jinja": "{{ ä }}",
        "additional_chat_templates/rag.jinja": "R",
    }
    assert beside.read(tmp_path / "none") == {}


@pytest.mark.parametrize("data", [
    b"{", b"[1]", b"null", b'{"a": "\xff"}', b'{"a": ' + b"[" * 100_000, b" " * beside.MOST + b"{}", b"",
], ids=range(7))  # fmt: skip
def test_what_cannot_be_read_is_left_out_unless_it_is_needed(copy, data):
    """A template is not; of the two configs some fields are, so they are refused by name."""
    (copy.folder / "chat_template.jinja").write_bytes(b"\xff")
    _, processor = llava.load(copy.write(), device="cpu")
    assert "chat_template.jinja" not in processor.tokenizer.beside
    for name in ("tokenizer_config.json", "processor_config.json"):
        (copy.folder / name).write_bytes(data)
        assert name in refusal(copy.folder)
        (copy.folder / name).unlink()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja", "additional_chat_templates/x.jinja"])
def test_a_pipe_is_not_opened(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / name)
    assert beside.read(tmp_path) == {}
