"""A reward model on disk: a sequence classifier of transformers with one label, which anybody can load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tropism.errors import ConfigError
from tropism.training.lora import merged_state
from tropism.training.model import Policy, device_of, first_line, readable, trained

SCORER = "reward_model"
"""Its folder in a checkpoint."""


def is_scorer(policy: Policy) -> bool:
    """The head scores whole answers; a critic of states has a bias."""
    return isinstance(policy.critic, torch.nn.Linear) and policy.critic.bias is None


def save_scorer(policy: Policy, path: Path) -> None:
    """What `AutoModelForSequenceClassification.from_pretrained(path)` loads, with equal scores.

    Raises:
        ConfigError: the tokenizer pads with the token that ends a reply. transformers reads the score before the first
            pad at the end, which would then be one token too early.
    """
    from transformers import AutoModelForSequenceClassification

    assert policy.critic is not None
    pad = policy.tokenizer.pad_token_id
    if pad is None or pad in policy.words.stop_ids:
        what = "there is no pad token" if pad is None else f"{policy.tokenizer.pad_token!r} pads and ends replies too"
        raise ConfigError(
            f"{what}, so transformers would read a score one token too early. Give the tokenizer its own pad token."
        )
    told = policy.module.config.to_dict() | {"pad_token_id": pad, "id2label": {0: "reward"}, "label2id": {"reward": 0}}
    with torch.random.fork_rng(devices=[]):  # what it draws is replaced, and a reward may draw from the same generator
        made = AutoModelForSequenceClassification.from_config(type(policy.module.config).from_dict(told))
    made.base_model.load_state_dict(merged_state(policy.module.base_model))
    made.score.weight.data.copy_(policy.critic.weight.data)
    made.to(getattr(torch, policy.settings.save)).save_pretrained(path)
    policy.tokenizer.save_pretrained(path)
    readable(path)


class Scorer:
    """A reward model: token ids of a prompt and an answer to one number, higher where the answer would be preferred.

    Attributes:
        vocabulary: token -> id. Ids mean the same as the policy's only where this is the same.
    """

    def __init__(self, path: str, device: str = "auto") -> None:
        """
        Args:
            path: a sequence classifier with one label, or a run or stage that trained one.

        Raises:
            ConfigError: there is none, or it has no head: a head made from nothing would score at random.
        """
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        path = scorer_in(path)
        try:
            module, told = AutoModelForSequenceClassification.from_pretrained(
                path, num_labels=1, dtype=torch.float32, output_loading_info=True
            )
            self.vocabulary: dict[str, int] = AutoTokenizer.from_pretrained(path).get_vocab()
        except Exception as error:  # somebody else's files raise anything
            raise ConfigError(f"the reward model {path} could not be loaded: {first_line(error)}") from error
        if told["missing_keys"] or told["mismatched_keys"]:
            lost = ", ".join(sorted(map(str, [*told["missing_keys"], *told["mismatched_keys"]]))[:3])
            raise ConfigError(
                f"{path} has no {lost}, so its scores would be random. Name a reward model with one label."
            )
        self.device = device_of(device)
        self.module: Any = module.to(self.device).eval()

    def __call__(self, answers: Sequence[Sequence[int]], tokens: int = 16384) -> list[float]:
        """One score per answer, in order: the one after its last token."""
        return [score for (score,) in self.at(answers, [[len(ids) - 1] for ids in answers], tokens)]

    @torch.no_grad()
    def at(
        self, answers: Sequence[Sequence[int]], places: Sequence[Sequence[int]], tokens: int = 16384
    ) -> list[list[float]]:
        """Scores after the tokens at these places of each answer.

        Args:
            tokens: at most so many in one forward pass, padding included.
        """
        found: list[list[float]] = [[] for _ in answers]
        order = sorted(range(len(answers)), key=lambda n: len(answers[n]))
        while order:
            rows = max(1, tokens // len(answers[order[-1]]))
            part, order = order[-rows:], order[:-rows]
            scores = self.scored([answers[n] for n in part])
            for row, n in enumerate(part):
                found[n] = scores[row, list(places[n])].tolist()
        return found

    def scored(self, answers: Sequence[Sequence[int]]) -> Tensor:
        """[N, T] after each token, padded on the right where causal attention does not see it."""
        ids = torch.zeros(len(answers), max(map(len, answers)), dtype=torch.long, device=self.device)
        for row, answer in enumerate(answers):
            ids[row, : len(answer)] = torch.tensor(answer)
        found: Tensor = self.module.score(self.module.base_model(input_ids=ids, use_cache=False).last_hidden_state)
        return found[..., 0]


def scorer_in(path: str) -> str:
    """A run, stage or checkpoint stands for the reward model in it; any other path for itself."""
    end = trained(path)
    if (Path(end) / SCORER).is_dir():
        return str(Path(end) / SCORER)
    if end != path:
        raise ConfigError(f"{path} holds no reward model. Name a run or stage that trained one, or its directory.")
    return path
