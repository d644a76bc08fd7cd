"""What was said, made fit for a screen: nothing invisible, nothing shown twice, tokens as the words they spell."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

Decode = Callable[[Sequence[int]], str]
"""Token ids -> text."""

SHOWN = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {0x7F: "\u2421"}
HIDDEN = [*range(0x80, 0xA0), 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
SYMBOLS = SHOWN | dict.fromkeys(HIDDEN, "\ufffd")


def visible(text: str) -> str:
    """Control characters as symbols. Left alone, a model's ESC moves the cursor and its U+202E turns the page."""
    return text.translate(SYMBOLS)


def say(text: str) -> str:
    """Text for HTML, with nothing invisible in it."""
    return escape(visible(text))


def messages(prompt: str | None) -> list[Mapping[str, str]]:
    """A recorded prompt: its messages, or one without a role if it was plain text."""
    try:
        found = json.loads(prompt or "")
    except ValueError:
        found = None
    chat = isinstance(found, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in found)
    if chat and found:
        return [{name: str(value) for name, value in message.items()} for message in found]
    return [{"role": "", "content": prompt}] if prompt else []


def news(turns: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, str]]]:
    """What each turn saw for the first time; a prompt that does not extend the turn before is shown whole."""
    fresh, before, reply = [], "", ""
    for turn in turns:
        prompt = turn.get("prompt") or ""
        now, old = messages(prompt), messages(before)
        if old and not old[0]["role"] and prompt.startswith(before):
            now = messages(prompt[len(before) :].removeprefix(reply).strip("\n"))
        elif old and old[0]["role"] and now[: len(old)] == old:
            now = now[len(old) :]
            if now and now[0]["role"] == "assistant" and now[0]["content"] == reply:
                now = now[1:]
        fresh.append(now)
        before, reply = prompt, turn.get("reply") or ""
    return fresh


def pieces(ids: Sequence[int], decode: Decode) -> list[tuple[str, range]]:
    """The text, cut where tokens end: (text, the tokens that spell it).

    Tokens are decoded together with their neighbours on the left, since many tokenizers drop a leading space; bytes
    that only make a letter together stay together. Tokens that spell nothing, such as the stop token, come last as "".
    """
    found, start, read = [], 0, 0
    for end in range(1, len(ids) + 1):
        before, now = decode(ids[start:read]), decode(ids[start:end])
        if len(now) > len(before) and (not now.endswith("\ufffd") or end - read >= 4):
            found.append((now[len(before) :], range(read, end)))
            start, read = read, end
    if read < len(ids):
        found.append((decode(ids[start:])[len(decode(ids[start:read])) :], range(read, len(ids))))
    return found
