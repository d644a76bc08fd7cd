"""Words to tokens and back: the one place that knows the tokenizer.

A context continues the conversation token for token: what was sampled stays as sampled, and only the words that came
after it are tokenized. Where the chat template rewrites its past (drops old reasoning, trims), that is impossible, and
the context is made afresh; the learner then sees a new row.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from tropism.errors import ConfigError
from tropism.types import Message, Prompt, Stop, Turn


class Render:
    """Turns prompts into token ids for one tokenizer."""

    def __init__(self, tokenizer: Any, stop_ids: Sequence[int]) -> None:
        if not stop_ids:
            raise ConfigError(
                "The tokenizer has no end-of-sequence token, so no reply could ever end by itself. Set eos_token in "
                "tokenizer_config.json or eos_token_id in generation_config.json."
            )
        self.tokenizer = tokenizer
        self.stop_ids = tuple(stop_ids)
        self.chat = bool(getattr(tokenizer, "chat_template", None))
        self._encode = lru_cache(maxsize=65536)(self._tokenize)
        self._template = lru_cache(maxsize=65536)(self._render)  # games ask about the same board again and again

    def context(self, prompt: Prompt, before: Turn | None = None) -> list[int]:
        """Token ids to answer `prompt` after. `before` is the same seat's latest turn, if it has spoken."""
        if before is not None and before.prompt:
            words = self.added(prompt, before)
            if words is not None:
                return [*before.context, *before.action, *self.following(words)]
        if isinstance(prompt, str):
            return list(self._encode(prompt, True)) or [self.start()]
        return list(self._encode(self.text(prompt, opening=True), not self.chat))

    def added(self, prompt: Prompt, before: Turn) -> str | None:
        """The words that `prompt` adds after what `before` has said; None where its past reads differently."""
        if isinstance(prompt, str) and isinstance(before.prompt, str):
            past, now = before.prompt + before.reply, prompt
        elif isinstance(prompt, str) or isinstance(before.prompt, str):
            return None
        else:
            past, now = self.text(before.prompt, opening=True) + before.reply, self.text(prompt, opening=True)
        if not now.startswith(past):
            return None
        words = now[len(past) :]
        if before.stop is Stop.finished:
            end = self.tokenizer.decode([before.action[-1]])
            words = words.removeprefix(end)
        return words

    def text(self, messages: Sequence[Message], *, opening: bool = False) -> str:
        """The conversation as the model reads it; `opening` adds what comes before the assistant's next words."""
        if self.chat:
            return self._template(tuple(tuple(message.items()) for message in messages), opening)
        return "".join(message["content"] + "\n" for message in messages)

    def action(self, prompt: Prompt, reply: str) -> list[int]:
        """Token ids of a given reply to `prompt`, the stop token included: what a demonstration trains."""
        end = self.stop_ids[0]
        if not isinstance(prompt, str) and self.chat:
            opening = self.text(prompt, opening=True)
            whole = self.text([*prompt, {"role": "assistant", "content": reply}])
            rest = whole[len(opening) :] if whole.startswith(opening) else ""
            # A template may end a turn by another stop token than eos: Gemma's <end_of_turn>, Phi's <|end|>.
            marks = {stop: mark for stop in self.stop_ids if (mark := self.tokenizer.decode([stop])) and mark in rest}
            if marks:
                end = min(marks, key=lambda stop: rest.index(marks[stop]))
                reply = rest.split(marks[end])[0]
        return [*self.following(reply), end]

    def reply(self, action: Sequence[int]) -> str:
        """The words of an action, without the stop token."""
        ids = action[:-1] if action and action[-1] in self.stop_ids else action
        return str(self.tokenizer.decode(ids))

    def following(self, text: str) -> Sequence[int]:
        """Token ids of words that do not open the text: SentencePiece would put a space before an opening word."""
        end = self.stop_ids[0]
        ids = self._encode(self.tokenizer.decode([end]) + text, False)
        return ids[1:] if ids[:1] == (end,) else self._encode(text, False)

    def start(self) -> int:
        """The token that stands before an empty prompt."""
        bos = self.tokenizer.bos_token_id
        return int(self.stop_ids[0] if bos is None else bos)

    def _render(self, messages: tuple[tuple[tuple[str, str], ...], ...], opening: bool) -> str:
        talk = [dict(message) for message in messages]
        return str(self.tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=opening))

    def _tokenize(self, text: str, special: bool) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=special).input_ids)
