"""A teacher's numbers stand at the student's tokens, and only where there was something to read."""

import copy
from dataclasses import replace

import pytest
import torch

from small import rollout, small, turn
from tropism.config import Train
from tropism.errors import ConfigError
from tropism.signals.contexts import Opening
from tropism.signals.frozen import measure
from tropism.signals.reread import reread
from tropism.signals.teacher import Tutor, blend, selected
from tropism.teacher import Teacher
from tropism.training.collate import collate, rows_of
from tropism.training.ranks import Ranks
from tropism.types import Needs, Output, Rollout, SamplingParams, Task

PROXIMAL = Needs(measured=frozenset({"proximal_logp"}))
SHORT = {"say": {"worked": "({})", "wrong": "({})", "hint": "({})", "feedback": "({})"}, "closing": "Go."}


@pytest.fixture(scope="module")
def policy():
    return small()


def played(policy, prompts=("2+2=", "1+10=", "7="), *, top_k=0, temperature=1.0, **columns):
    """One-turn rollouts of a real model, each with its own words."""
    columns = {"worked": "it is four", "wrong": "it is five"} | columns
    params = SamplingParams(max_tokens=6, temperature=temperature, top_k=top_k)
    drawn = policy.sampler([policy.words.context(prompt) for prompt in prompts], params)
    turns = [
        replace(turn, prompt=prompt, reply=policy.words.reply(turn.action))
        for turn, prompt in zip(drawn, prompts, strict=True)
    ]
    return [
        Rollout(task=Task(columns=columns, domain="abc"[n % 3]), group=0, turns=(turn,)) for n, turn in enumerate(turns)
    ]


def asked(policy, teacher, rollouts, *, models=None, exact=True, room=500, temperature=1.0, memory=4e9, proximal=True):
    student = policy.measuring(temperature, Train(micro_tokens=64))
    tutor = Tutor(
        teacher=teacher,
        student=student,
        models=models or {"": student},
        words=policy.words,
        room=room,
        vocabulary=262,
        memory=memory,
        proximal=proximal,
    )
    batch = measure(collate(rollouts, codes={}), PROXIMAL, policy=student, exact=exact)
    openings = [Opening(rollouts[r.episode], r.spans[0][1], rollouts) for r in rows_of(rollouts)]
    batch, sums = tutor.measure(batch, openings)
    return batch, Ranks().means(sums)


@torch.no_grad()
def by_hand(policy, prompt, turn, temperature=1.0):
    """log p of every action token after `prompt`, from the logits, in the plainest way."""
    context = policy.words.context(prompt)
    logits = policy.module(input_ids=torch.tensor([[*context, *turn.action]])).logits[0] / temperature
    logp = logits.log_softmax(-1)
    places = range(len(context) - 1, len(context) - 1 + len(turn.action))
    return torch.stack([logp[place] for place in places])


# ----------------------------------------------------------------------------------------------------------- alignment


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("teacher", [Teacher(), Teacher(top_k=5), Teacher(top_k=5, support="teacher")])
def test_the_students_own_prompt_and_weights_give_no_difference(policy, teacher, temperature):
    rollouts = played(policy, temperature=temperature)
    batch, numbers = asked(policy, teacher, rollouts, exact=False, temperature=temperature)
    assert batch.has_teacher.all() and numbers["teacher/share"] == 1
    assert torch.allclose(batch.teacher_logp, batch.proximal_logp, atol=1e-5)
    assert abs(numbers["teacher/kl"]) < 1e-5
    assert numbers["teacher/tokens"] == int(batch.length.sum())
    if teacher.top_k:
        assert torch.allclose(batch.teacher_topk_logp, batch.proximal_topk_logp, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_what_it_says_stands_at_the_tokens_it_is_about(policy, temperature):
    """Contexts of other lengths than the student's, rows of several lengths, against a forward pass by hand."""
    rollouts = played(policy, temperature=temperature)
    teacher = Teacher(reads=("worked",), against=("wrong",), **SHORT)
    batch, numbers = asked(policy, teacher, rollouts, temperature=temperature)
    told = [f"{one.turns[0].prompt}\n\n({text})\n\nGo." for one in rollouts for text in ("it is four", "it is five")]
    read = sum(len(policy.words.context(prompt)) for prompt in told)
    assert numbers["teacher/tokens"] == read + 2 * int(batch.action_mask.sum())
    for n, one in enumerate(rollouts):
        (turn,), mask = one.turns, batch.action_mask[n]
        for found, told in ((batch.teacher_logp, "four"), (batch.counter_logp, "five")):
            logp = by_hand(policy, f"{turn.prompt}\n\n(it is {told})\n\nGo.", turn, temperature)
            chosen = logp.gather(1, torch.tensor(turn.action)[:, None])[:, 0]
            assert torch.allclose(found[n][mask], chosen, atol=1e-4)
            assert (found[n][~mask] == 0).all()
        logp = by_hand(policy, f"{turn.prompt}\n\n(it is four)\n\nGo.", turn, temperature)
        assert torch.allclose(batch.teacher_entropy[n][mask], -(logp.exp() * logp).sum(-1), atol=1e-4)
    assert (batch.teacher_logp - batch.proximal_logp)[batch.action_mask].abs().min() > 1e-4


def test_the_student_never_sees_what_the_teacher_reads(policy):
    rollouts = played(policy, worked="SECRET")
    before = collate(rollouts, codes={})
    batch, _ = asked(policy, Teacher(reads=("worked",), **SHORT), rollouts)
    assert (batch.tokens == before.tokens).all() and (batch.length == before.length).all()
    seen = policy.tokenizer.decode(batch.tokens.flatten().tolist())
    assert "SECRET" not in seen and batch.has_teacher.all()


def test_rereading_keeps_the_action_tokens_and_moves_them(policy):
    batch = collate(played(policy), codes={})
    told, shift = reread(batch, [[9] * 3, [8] * 30, [7] * 12])
    for n, (ids, length) in enumerate([(9, 3), (8, 30), (7, 12)]):
        real = told.tokens[n][: told.length[n]]
        assert (real[:length] == ids).all()
        assert (real[length:] == batch.tokens[n][: batch.length[n]][-(len(real) - length) :]).all()
        assert (told.tokens[n][told.action_mask[n]] == batch.tokens[n][batch.action_mask[n]]).all()
        assert shift[n] == told.length[n] - batch.length[n]


# --------------------------------------------------------------------------------------------------------------- top-K


@pytest.mark.parametrize("support", ["student", "teacher", "overlap"])
def test_student_and_teacher_are_compared_on_the_likeliest_tokens(policy, support):
    rollouts = played(policy, top_k=4)
    teacher = Teacher(reads=("worked",), top_k=4, support=support, **SHORT)
    batch, _ = asked(policy, teacher, rollouts)
    assert not any(value.requires_grad for _, value in batch.tensors())
    for n, one in enumerate(rollouts):
        (turn,), mask = one.turns, batch.action_mask[n]
        student, tutor = (
            by_hand(policy, turn.prompt, turn),
            by_hand(policy, f"{turn.prompt}\n\n(it is four)\n\nGo.", turn),
        )
        mine, theirs = student.topk(4).indices, tutor.topk(4).indices
        ids = batch.topk_ids[n][mask]
        if support == "overlap":
            shared = (mine[..., None] == theirs[..., None, :]).any(-1)
            assert (ids == torch.where(shared, mine, -1)).all()
        else:
            assert (ids == (mine if support == "student" else theirs)).all()
        used = ids >= 0
        for found, logp in ((batch.proximal_topk_logp, student), (batch.teacher_topk_logp, tutor)):
            assert torch.allclose(found[n][mask][used], logp.gather(1, ids.clamp(min=0))[used], atol=1e-4)


def test_the_whole_vocabulary_is_a_distribution_and_too_much_of_it_is_refused(policy):
    rollouts = played(policy)
    teacher = Teacher(reads=("worked",), top_k="all", **SHORT)
    batch, _ = asked(policy, teacher, rollouts)
    for logp in (batch.proximal_topk_logp, batch.teacher_topk_logp):
        mass = logp[batch.action_mask].exp().sum(-1)
        assert torch.allclose(mass, torch.ones_like(mass), atol=1e-5)
    with pytest.raises(ConfigError, match=r"top_k is all, which takes 0.0 GB .* 262 tokens at each place"):
        asked(policy, teacher, rollouts, memory=1000)


@pytest.mark.parametrize("settings", [{"top_k": "all"}, {"top_k": 4, "support": "teacher"}])
def test_the_student_is_not_asked_for_what_no_one_reads(policy, settings, monkeypatch):
    """But in rows without a teacher; what is said stays the same, and a whole vocabulary is not written out."""
    rollouts, passes = played(policy), []
    rollouts[1] = replace(rollouts[1], task=replace(rollouts[1].task, columns={}))
    teacher = Teacher(reads=("worked",), **settings, **SHORT)
    whole, _ = asked(policy, teacher, rollouts)
    forward = policy.forward
    monkeypatch.setattr(policy, "forward", lambda batch, *a, **k: passes.append(len(batch)) or forward(batch, *a, **k))
    asked(policy, teacher, rollouts)
    read = sum(passes)
    passes.clear()
    batch, _ = asked(policy, teacher, rollouts, proximal=False)
    assert sum(passes) == read - 3 + 1
    assert batch.has_teacher.tolist() == [True, False, True] and batch.proximal_topk_logp is None
    close = torch.testing.assert_close
    close(batch.topk_ids, whole.topk_ids)
    close(batch.teacher_topk_logp[batch.action_mask], whole.teacher_topk_logp[batch.action_mask], atol=1e-5, rtol=0)
    if settings["top_k"] == "all":
        assert batch[torch.tensor([2, 0])].narrow(5).topk_ids.untyped_storage().nbytes() == 8 * 262


def test_among_hints_the_one_with_most_tokens_in_common_wins():
    """O = [[2, 1, 0], [1, 2, 2]]: over the reply the second, by token 0, 1, 1. OpenClaw-RL v2, arXiv:2603.10165."""
    mine = torch.tensor([[[1, 2], [1, 2], [1, 2]]])
    first, second = torch.tensor([[[1, 2], [1, 9], [8, 9]]]), torch.tensor([[[1, 9], [2, 1], [2, 1]]])
    said = [Output(logp=torch.full((1, 3), v), entropy=torch.zeros(1, 3), topk_ids=ids, topk_logp=ids * v)
            for v, ids in ((10.0, first), (20.0, second))]  # fmt: skip
    batch = collate([rollout(turn([5], [1, 2, 3]))], codes={})
    batch = batch.replace(topk_ids=torch.cat([torch.full((1, 1, 2), -1), mine], 1))

    def padded(out):
        return Output(
            logp=torch.nn.functional.pad(out.logp, (1, 0)),
            entropy=torch.nn.functional.pad(out.entropy, (1, 0)),
            topk_ids=torch.nn.functional.pad(out.topk_ids, (0, 0, 1, 0), value=-1),
            topk_logp=torch.nn.functional.pad(out.topk_logp, (0, 0, 1, 0)),
        )

    said = [padded(out) for out in said]
    both, one = torch.tensor([2]), torch.tensor([1])
    assert selected(said, batch, both, "sequence").logp[0, 1:].tolist() == [20, 20, 20]
    assert selected(said, batch, both, "token").logp[0, 1:].tolist() == [10, 20, 20]
    assert selected(said, batch, both, "token").topk_logp[0, 2].tolist() == [40, 20]
    assert selected(said, batch, one, "token").logp[0, 1:].tolist() == [10, 10, 10]


# ------------------------------------------------------------------------------------------------------ what is missing


def test_where_there_is_nothing_to_read_the_policy_stands_in_and_it_is_counted(policy):
    rollouts = played(policy, top_k=3)
    turns = [replace(rollouts[0].turns[0], feedback="too low")] + [r.turns[0] for r in rollouts[1:]]
    rollouts = [replace(r, turns=(turn,)) for r, turn in zip(rollouts, turns, strict=True)]
    batch, numbers = asked(policy, Teacher(reads=("feedback",), top_k=3, **SHORT), rollouts)
    assert batch.has_teacher.tolist() == [True, False, False]
    assert numbers["teacher/share"] == pytest.approx(1 / 3)
    assert (batch.teacher_logp[1:] == batch.proximal_logp[1:]).all()
    assert (batch.teacher_topk_logp[1:] == batch.proximal_topk_logp[1:]).all()
    assert (batch.teacher_logp[0] != batch.proximal_logp[0]).any()


def test_the_opposite_hint_must_be_there_too(policy):
    rollouts = played(policy, wrong=" ")
    batch, _ = asked(policy, Teacher(reads=("worked",), against=("wrong",), **SHORT), rollouts)
    assert not batch.has_teacher.any() and (batch.counter_logp == batch.proximal_logp).all()


def test_numbers_that_are_not_finite_turn_the_teacher_off(policy):
    rollouts = played(policy)
    student = policy.measuring(1.0, Train())

    def broken(batch, top_k=0):
        out = student(batch, top_k)
        out.logp[1, -4:] = float("nan")
        return replace(out, entropy=torch.where(torch.arange(len(out.logp))[:, None] == 2, torch.inf, out.entropy))

    batch, numbers = asked(policy, Teacher(reads=("worked",), **SHORT), rollouts, models={"": broken})
    assert batch.has_teacher.tolist() == [True, False, False]
    assert numbers["teacher/not_finite"] == pytest.approx(2 / 3)
    assert batch.teacher_logp.isfinite().all() and batch.teacher_entropy.isfinite().all()
    assert (batch.teacher_logp[1:] == batch.proximal_logp[1:]).all()


def test_what_is_cut_is_counted(policy):
    rollouts = played(policy, worked="four " * 40)
    batch, numbers = asked(policy, Teacher(reads=("worked",), **SHORT), rollouts, room=60)
    assert numbers["teacher/cut"] == 1 and batch.has_teacher.all()
    batch, numbers = asked(policy, Teacher(reads=("worked",), **SHORT), rollouts, room=12)
    assert not batch.has_teacher.any() and numbers["teacher/share"] == 0
    assert numbers["teacher/too_long"] == 1 and numbers["teacher/not_finite"] == 0
    assert asked(policy, Teacher(), rollouts, room=3)[1]["teacher/too_long"] == 1
    assert asked(policy, Teacher(reads=("worked",), **SHORT), rollouts)[1]["teacher/too_long"] == 0


# ------------------------------------------------------------------------------------------------------ whose weights


def test_each_domain_is_taught_by_its_own_model(policy):
    rollouts = played(policy)
    others = {name: small(seed=seed).measuring(1.0, Train()) for name, seed in (("a", 1), ("b", 2), ("c", 3))}
    batch, _ = asked(policy, Teacher(who={"a": "x", "b": "y", "c": "z"}), rollouts, models=others)
    for n, seed in enumerate((1, 2, 3)):
        alone = collate(rollouts[n : n + 1], codes={})
        expected = small(seed=seed).measuring(1.0, Train())(alone).logp[0]
        assert torch.allclose(batch.teacher_logp[n][: len(expected)], expected, atol=1e-5)
    without = {name: others[name] for name in "ab"}
    with pytest.raises(ConfigError, match=r"domain 'c', but teacher.who knows a, b"):
        asked(policy, Teacher(who={"a": "x", "b": "y"}), rollouts, models=without)


def follower(policy, **settings):
    twin = copy.deepcopy(policy.module)
    forward = policy.measuring(1.0, Train())
    teacher = Teacher(**settings)
    return Tutor(
        teacher=teacher, student=forward, models={"": forward}, words=policy.words, room=9, vocabulary=9, copy=twin
    )


def test_an_ema_moves_by_its_rate_once_per_batch_and_only_if_an_update_did():
    policy = small()
    start = [p.detach().clone() for p in policy.module.parameters()]
    tutor = follower(policy, who="ema", rate=0.05)
    with torch.no_grad():
        for p in policy.module.parameters():
            p += 0.5
    tutor.follow(policy.module, 0, moved=False)
    assert all((a == b).all() for a, b in zip(start, tutor.copy.parameters(), strict=True))
    for times in (1, 2):
        tutor.follow(policy.module, times, moved=True)
        for a, b in zip(start, tutor.copy.parameters(), strict=True):
            assert b.dtype is torch.float32
            assert torch.allclose(b, a + 0.5 * (1 - 0.95**times), atol=1e-6)


def test_a_small_drift_is_not_lost_to_rounding():
    """100 updates at rate 0.05 after a drift of 1e-4: bfloat16 would keep about a tenth of it."""
    policy = small()
    tutor = follower(policy, who="ema", rate=0.05)
    with torch.no_grad():
        for p in policy.module.parameters():
            p += 1e-4
    before = [p.detach().double().clone() for p in tutor.copy.parameters()]
    for step in range(100):
        tutor.follow(policy.module, step, moved=True)
    gone = [(b.detach().double() - a).mean() for a, b in zip(before, tutor.copy.parameters(), strict=True)]
    assert torch.stack(gone).mean().item() == pytest.approx(1e-4 * (1 - 0.95**100), rel=0.02)


def test_a_synced_copy_moves_every_so_many_batches():
    policy = small()
    tutor = follower(policy, who="synced", every=3)
    for step in range(6):
        with torch.no_grad():
            for p in policy.module.parameters():
                p += 1.0
        tutor.follow(policy.module, step, moved=True)
        mine, theirs = next(policy.module.parameters()), next(tutor.copy.parameters())
        assert torch.equal(mine, theirs) == (step in (2, 5))
    with torch.no_grad():
        blend(tutor.copy, policy.module, 1.0)


def test_frozen_and_live_teachers_have_nothing_that_moves():
    policy = small()
    tutor = follower(policy, who="frozen")
    start = [p.detach().clone() for p in tutor.copy.parameters()]
    with torch.no_grad():
        for p in policy.module.parameters():
            p += 1.0
    tutor.follow(policy.module, 9, moved=True)
    assert all(torch.equal(a, b) for a, b in zip(start, tutor.copy.parameters(), strict=True))
