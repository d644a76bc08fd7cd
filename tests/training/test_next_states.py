"""openclaw and follow_up from a user's words to new weights: online on the user environment, offline on rows."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import world
from small import small
from tropism.api import Lines
from tropism.config import Train
from tropism.envs import open_source
from tropism.envs.user import PLEASED, TASTES, judge
from tropism.errors import ConfigError, GuardStopped
from tropism.methods.follow_up import FollowUp
from tropism.methods.openclaw import OpenClaw
from tropism.recipe import resolve
from tropism.rollout.play import play
from tropism.signals.contexts import Opening, available
from tropism.signals.frozen import measure
from tropism.signals.judge import Panel, by_function
from tropism.signals.teacher import Tutor
from tropism.teacher import Teacher
from tropism.training.collate import collate
from tropism.training.run import run
from tropism.training.teachers import openings
from tropism.types import Output, Rollout, SamplingParams, Turn

HYBRID = {"openclaw": {"gap": 1.0, "teacher": {"top_k": 4, "select": "sequence"}}}


class Watching(Lines):
    def __init__(self):
        super().__init__()
        self.metrics = []

    def step(self, step, metrics, rollouts):
        self.metrics.append(metrics)


def trained(folder, stage):
    """(metrics of every step, recorded turns of the last one, weights before, weights after)"""
    recipe = {"name": "run", "output": str(folder), "seed": 3, "model": world.MODEL, "stages": [{"name": "s", **stage}]}
    watcher = Watching()
    done = run(resolve(recipe), watcher)
    started = small_world().module.state_dict()
    recorded = done.runs[0].path / "rollouts" / f"step-{len(watcher.metrics)}.parquet"
    rows = []
    if recorded.exists():
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(recorded).to_pylist()
    return watcher.metrics, rows, started, load_file(done.model / "model.safetensors")


def small_world():
    from tropism.config import Model
    from tropism.training.model import load_policy

    return load_policy(Model(**world.MODEL), 3)


def moved(before, after):
    return any(not torch.equal(before[name], after[name]) for name in after)


def online(method, **changes):
    stage = {
        "method": method,
        "env": {"user": {"taste": "lower"}},
        "sampling": {"groups": 4, "group_size": 1, "max_tokens": 6},
        "train": {"steps": 3, "learning_rate": 1e-2, "threads": 1},
    }
    return stage | changes


# -------------------------------------------------------------------------------------------------------------- online


@pytest.mark.parametrize("method", ["openclaw", HYBRID], ids=["sampled", "likeliest"])
def test_openclaw_learns_from_what_the_user_says_next(tmp_path, method):
    stage = online(method, judge="tropism.envs.user:judge", rewards={"judge": 1.0})
    metrics, rows, before, after = trained(tmp_path, stage)
    assert len(metrics) == 3 and moved(before, after)
    assert all(step["failures"] == 0 and step["updates"] == 1 for step in metrics)
    assert any(0 < step["teacher/share"] < 1 for step in metrics) and any(step["teacher/kl"] != 0 for step in metrics)
    complaint, seen = TASTES["lower"][1], set()
    for row in rows:
        following = next((r for r in rows if (r["episode"], r["turn"]) == (row["episode"], row["turn"] + 1)), None)
        said = json.loads(following["prompt"])[-1]["content"] if following else ""
        score, hint = (1.0, None) if said.startswith(PLEASED) else (-1.0, complaint) if said else (0.0, None)
        assert (row["reward"], row["hints"]) == (score, hint)
        assert all(weight == 0 for weight in row["weight"]) is (score == 0)
        assert "Use small letters" not in json.loads(row["prompt"])[0]["content"]
        seen.add(score)
    assert seen == {1.0, -1.0, 0.0}, "the batch shows a pleased user, one who complains, and last turns"


def test_follow_up_learns_from_what_the_user_says_next(tmp_path):
    metrics, rows, before, after = trained(tmp_path, online("follow_up"))
    assert len(metrics) == 3 and moved(before, after)
    assert all(abs(step["teacher/share"] - 2 / 3) < 1e-6 and step["updates"] == 1 for step in metrics)
    for row in rows:
        last = row["turn"] == 2
        assert all(weight == 0 for weight in row["weight"]) is last
        assert last or abs(sum(row["advantage"])) < 1e-4
        assert (row["teacher_logp"] == row["proximal_logp"]) is last


def test_a_hint_that_nobody_gives_is_refused_before_the_run_starts(tmp_path):
    with pytest.raises(ConfigError, match="reads a hint, but stage 's' has no judge"):
        trained(tmp_path, online("openclaw"))


def test_a_judge_that_cannot_answer_stops_the_run_with_its_reason(tmp_path):
    away = {"who": "http://127.0.0.1:9/v1", "model": "m"}
    stage = online("openclaw", judge=away, rewards={"judge": 1.0})
    with pytest.raises(Exception, match=r"no valid vote of 1: http://127\.0\.0\.1:9/v1 gave URLError") as stopped:
        trained(tmp_path, stage)
    assert stopped.value.code == 3


# ------------------------------------------------------------------------------------------------------------- offline

U = {"role": "user", "content": "Name one bird."}
A = {"role": "assistant", "content": "A Grey Heron"}
NO = {"role": "user", "content": "Use small letters only."}
B = {"role": "assistant", "content": "a heron"}
TOOL = {"role": "tool", "content": "found"}


def offline(folder, rows, method="follow_up", steps=3):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = {"steps": steps, "batch": len(rows), "learning_rate": 1e-3, "threads": 1}
    return trained(folder, {"method": method, "data": str(path), "train": train})


@pytest.mark.parametrize(
    ("row", "share"),
    [
        ({"messages": [U, A, NO]}, 1.0),
        ({"messages": [U, A, NO, B]}, 0.5),
        ({"messages": [U, A, TOOL, B, NO]}, 0.5),
        ({"prompt": [U], "completion": [A, NO]}, 1.0),
        ({"prompt": [U], "completion": [A], "follow_up": "Use small letters only."}, 1.0),
        ({"prompt": "Name one bird: ", "completion": "A Grey Heron", "follow_up": "Use small letters only."}, 1.0),
    ],
    ids=["user_ends", "assistant_ends", "tool_between", "completion", "column", "text"],
)
def test_rows_in_which_a_user_answers_are_learned_from(tmp_path, row, share):
    metrics, _, before, after = offline(tmp_path, [row, row])
    assert moved(before, after) and all(step["teacher/share"] == share for step in metrics)
    assert all(step["updates"] == 1 and step["teacher/kl"] != 0 for step in metrics)


def test_offline_the_step_is_the_raw_credit_without_a_ratio(tmp_path):
    """The gradient of -sum A log p / n, n tokens after the first two; so AdamW's first step has its sign."""
    row = {"messages": [U, A, NO]}
    _, _, before, after = offline(tmp_path, [row], steps=1)
    policy, method = small_world(), FollowUp()
    turn = Turn(context=policy.words.context((U,)), action=policy.words.action((U,), A["content"]), prompt=(U,))
    rollout = Rollout(task=replace(resolve_task(), columns={"follow_up": NO["content"]}), group=0, turns=(turn,))
    batch = taught(policy, method.teacher, [rollout])
    assert batch.behavior_logp is None
    told = (batch.teacher_logp - batch.proximal_logp) * (batch.action_mask.cumsum(1) > 2)
    count = (batch.action_mask.cumsum(1) > 2).logical_and(batch.action_mask).sum()
    (-(told * policy.forward(batch).logp * batch.action_mask).sum() / count).backward()
    for name, parameter in policy.module.named_parameters():
        if name in after and parameter.grad is not None:
            clear = parameter.grad.abs() > 1e-4
            assert (torch.sign(before[name] - after[name])[clear] == torch.sign(parameter.grad)[clear]).all()
    assert max(p.grad.abs().max() for p in policy.module.parameters() if p.grad is not None) > 1e-3


def test_rows_that_nobody_answers_teach_nothing_and_the_run_says_so(tmp_path):
    with pytest.raises(GuardStopped, match="taught nothing"):
        offline(tmp_path, [{"messages": [U, A]}], steps=30)


def test_openclaw_is_not_for_data(tmp_path):
    with pytest.raises(ConfigError, match="learns from its own rollouts"):
        offline(tmp_path, [{"messages": [U, A, NO]}], "openclaw")


# ---------------------------------------------------------------------------------------------------------------- signs


def resolve_task():
    return open_source("user", {}, split="train", seed=0).task(0)


def taught(policy, teacher, rollouts, model=None, *, policy_says=None, heat=1.0):
    """The measured batch of these rollouts, every turn a row.

    Args:
        heat: temperature of the policy, but not of its teacher.
    """
    forward = policy_says or policy.measuring(heat, Train())
    tutor = Tutor(
        teacher=teacher,
        student=forward,
        models={"": model or policy.measuring(1.0, Train())},
        words=policy.words,
        room=1000,
        vocabulary=262,
    )
    batch = collate(rollouts, codes={}, apart=True)
    batch = measure(batch, FollowUp().needs, policy=forward, exact=False)
    return tutor.measure(batch, openings(rollouts, apart=True))[0]


def conversation(policy, taste, *replies):
    """What the scripted user and a policy that says these said to each other, judged."""

    def saying(prompts, params):
        said = [replies[min(turn[0], len(replies) - 1)] for _ in prompts]
        turn[0] += 1
        actions = [policy.words.action((U,), reply) for reply in said]
        return [
            Turn(context=context, action=ids, logp=[-1.0] * len(ids))
            for context, ids in zip(prompts, actions, strict=True)
        ]

    turn, source = [0], open_source("user", {"taste": taste, "turns": len(replies)}, split="train", seed=0)
    played = play([(source.task(0), 0, 0)], source, saying, policy.words, SamplingParams(), max_turns=9)
    return Panel(by_function(judge)).read(played)[0]


def flat(batch, top_k=0):
    """A policy that finds every token as likely as any other."""
    return Output(logp=-3.0 * batch.action_mask, entropy=0.0 * batch.action_mask)


def reader(policy):
    """A teacher that can read: told to use small letters it finds capitals less likely and the rest a little likelier;
    told anything else it is the policy."""

    def said(batch, top_k=0):
        logp = flat(batch).logp
        for row, (tokens, mask) in enumerate(zip(batch.tokens, batch.action_mask, strict=True)):
            asked = policy.tokenizer.decode(tokens[: int(mask.int().argmax())])
            _, _, told = asked.rpartition("<|user|>")[2].partition("\n\n")
            if TASTES["lower"][1] in told:
                letters = [policy.tokenizer.decode([token]) for token in tokens.tolist()]
                capital = torch.tensor([letter.isupper() for letter in letters])
                logp[row] += torch.where(capital, -2.0, 0.1) * mask
        return Output(logp=logp, entropy=flat(batch).entropy)

    return said


@pytest.mark.parametrize("method", [FollowUp(), OpenClaw(w_rl=0.0)], ids=["follow_up", "hint"])
def test_the_letters_that_the_user_complains_of_get_negative_credit_and_no_others(method):
    policy = small()
    rollouts = conversation(policy, "lower", "A Grey Heron", "a heron", "Oak")
    batch = taught(policy, method.teacher, rollouts, reader(policy), policy_says=flat)
    told = method.credit(batch).advantage[0][batch.action_mask[0]]
    letters = [policy.tokenizer.decode([token]) for token in batch.tokens[0][batch.action_mask[0]].tolist()]
    named = torch.tensor([letter.isupper() for letter in letters])
    assert letters[:3] == ["A", " ", "G"] and int(named.sum()) == 3
    assert (told[named] < -1).all() and (told[~named] > 0).all()
    praised = method.credit(batch).advantage[1][batch.action_mask[1]]
    assert praised.abs().max() == 0, "the user was pleased, so nothing is to blame"
    assert (method.weights(batch)[2] == 0).all(), "nobody answered the last reply"


def test_without_anything_to_read_the_teachers_context_is_the_students_and_credit_is_0():
    policy = small()
    rollouts = conversation(policy, "lower", "A Grey Heron", "a heron")
    batch = taught(policy, Teacher(), rollouts)
    assert batch.has_teacher.all() and (batch.teacher_logp - batch.proximal_logp).abs().max() < 1e-5
    heated = taught(policy, Teacher(), rollouts, heat=0.6)
    assert (heated.teacher_logp - heated.proximal_logp).abs().max() > 0.01, "another temperature is another policy"
    turn = replace(rollouts[0].turns[0], hints=("",))
    blank = Opening(replace(rollouts[0], turns=(turn,)), 0, rollouts)
    assert available(blank, ("hint",)) == {}


def test_the_reaction_of_another_user_is_another_signal():
    """Replacing what was said moves the credit: it depends on the words, not only on there being more to read."""
    policy = small()
    own = conversation(policy, "lower", "A Grey Heron", "a heron")
    other = conversation(policy, "closing", "A Grey Heron", "a heron")
    found = []
    for rollouts in (own, other):
        batch = taught(policy, FollowUp().teacher, rollouts)
        found.append(FollowUp().credit(batch).advantage[0][batch.action_mask[0]])
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_a_reaction_that_says_nothing_of_the_reply_deserves_nothing_of_it():
    """A policy that minds what it was told: one user's taste moves it, another's does not."""
    policy, size = small(), {}
    for taste in ("lower", "closing"):
        said = conversation(policy, taste, "A Grey Heron", "a heron")
        batch = taught(policy, FollowUp().teacher, said, reader(policy), policy_says=flat)
        size[taste] = float(FollowUp().credit(batch).advantage[0][batch.action_mask[0]].abs().mean())
    assert size["closing"] == 0 and size["lower"] > 0.7
