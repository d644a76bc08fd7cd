from __future__ import annotations

import json

from tropism.view.words import messages, news, pieces, visible


def utf8(ids: list[int]) -> str:
    """A byte-level tokenizer: id = byte, 256 = stop, which spells nothing."""
    return bytes(i for i in ids if i < 256).decode("utf-8", "replace")


def spaced(ids: list[int]) -> str:
    """A tokenizer that drops the space before its first word."""
    return "".join([" the", " cat", "s", " sat"][i] for i in ids).removeprefix(" ")


def test_no_character_that_steers_a_terminal_or_a_page_is_left() -> None:
    text = visible("a\x1b[2J\x00\r\x9b\u202eb\x7f\n\tü")
    assert text == "a\u241b[2J\u2400\u240d\ufffd\ufffdb\u2421\n\tü"


def test_pieces_spell_the_text_and_use_every_token_once() -> None:
    ids = [*"naïve 🌱!".encode(), 256]
    cut = pieces(ids, utf8)
    assert "".join(text for text, _ in cut) == "naïve 🌱!"
    assert [place for _, places in cut for place in places] == list(range(len(ids)))
    assert ("ï", range(2, 4)) in cut and ("🌱", range(7, 11)) in cut and cut[-1] == ("", range(12, 13))


def test_bytes_that_spell_nothing_are_shown_and_do_not_swallow_the_rest() -> None:
    ids = [0xFF, 0xFF, 0xFF, 0xFF, 0xFF, *b"abc"]
    cut = pieces(ids, utf8)
    assert [place for _, places in cut for place in places] == list(range(len(ids)))
    assert "".join(text for text, _ in cut).endswith("abc") and len(cut) > 2


def test_the_space_before_a_word_is_kept() -> None:
    assert [text for text, _ in pieces([0, 1, 2, 3], spaced)] == ["the", " cat", "s", " sat"]
    assert pieces([], spaced) == []


def test_a_prompt_is_messages_only_if_it_looks_like_messages_throughout() -> None:
    chat = [{"role": "user", "content": "hi"}]
    assert messages(json.dumps(chat)) == chat
    for text in ("[1, 2]", "{}", '[{"role": "user"}]', "plain", "[]", "7"):
        assert messages(text) == [{"role": "", "content": text}]
    assert messages(None) == messages("") == []


def test_a_conversation_shows_every_message_once() -> None:
    one = [{"role": "system", "content": "s"}, {"role": "user", "content": "u1"}]
    two = [*one, {"role": "assistant", "content": "a1"}, {"role": "user", "content": "u2"}]
    turns = [{"prompt": json.dumps(one), "reply": "a1"}, {"prompt": json.dumps(two), "reply": "a2"}]
    assert news(turns) == [one, [{"role": "user", "content": "u2"}]]


def test_a_text_that_grows_shows_what_was_added_and_a_new_board_is_shown_whole() -> None:
    grown = [{"prompt": "Q: 1\nA:", "reply": " x\n"}, {"prompt": "Q: 1\nA: x\nQ: 2\nA:", "reply": "y"}]
    assert [[m["content"] for m in turn] for turn in news(grown)] == [["Q: 1\nA:"], ["Q: 2\nA:"]]
    boards = [{"prompt": "...\n", "reply": "5"}, {"prompt": "xo.\n", "reply": "3"}]
    assert [[m["content"] for m in turn] for turn in news(boards)] == [["...\n"], ["xo.\n"]]
