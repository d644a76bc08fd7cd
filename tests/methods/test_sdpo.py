"""SDPO: arXiv:2601.20802. SDFT, its reverse KL with another context, goes through the same tests."""

import math
from dataclasses import replace

import pytest
import torch

from toy import V, forward, gradient, on_policy, table, toy_batch
from tropism.errors import ConfigError
from tropism.maths.divergence import forward_kl, jensen_shannon, reverse_kl
from tropism.methods.grpo import GRPO
from tropism.methods.sdft import SDFT
from tropism.methods.sdpo import SDPO
from tropism.signals.contexts import Opening, available, chosen
from tropism.teacher import Teacher
from tropism.types import Batch, Credit, Output, Rollout, Task, Turn

close = torch.testing.assert_close
SAMPLED = SDPO(teacher=Teacher(who="ema", reads=("sibling",)), divergence="reverse")
KINDS = {"jensen_shannon": jensen_shannon, "reverse": reverse_kl, "forward": forward_kl}
kinds = pytest.mark.parametrize("divergence", KINDS)


def rows(mask, has_teacher=None, **fields):
    """A batch whose tokens nobody reads, every row an episode; log-probabilities are given by name."""
    mask = torch.tensor(mask, dtype=torch.bool)
    number = torch.arange(len(mask))
    fields = {name: torch.as_tensor(value) for name, value in fields.items()}
    return Batch(
        tokens=number[:, None].expand(mask.shape),
        length=number * 0 + mask.shape[1],
        action_mask=mask,
        token_reward=torch.zeros(mask.shape),
        turn=mask.long() - 1,
        reward=number * 0.0,
        success=number < 0,
        truncated=number < 0,
        group=number * 0,
        episode=number,
        role=number,
        domain=number,
        has_teacher=number >= 0 if has_teacher is None else torch.tensor(has_teacher),
        **fields,
    )


def total(method, batch, *, logp=None, topk=None):
    logp = torch.zeros(batch.action_mask.shape) if logp is None else torch.as_tensor(logp)
    out = Output(logp=logp, entropy=logp * 0, topk_logp=None if topk is None else torch.as_tensor(topk))
    return (method.loss(out, batch, method.credit(batch)).values * method.weights(batch)).sum()


def whole(weights, batch, teacher):
    """The batch with a teacher's word on the whole vocabulary."""
    everything = batch.replace(topk_ids=torch.arange(V).expand(*batch.tokens.shape, V))
    with torch.no_grad():
        said = forward(teacher, everything)
    return everything.replace(
        teacher_topk_logp=said.topk_logp, teacher_logp=said.logp, has_teacher=torch.ones_like(batch.success)
    )


# ------------------------------------------------------------------------------------------------------------ identity


@kinds
def test_a_teacher_that_says_the_same_teaches_nothing(divergence):
    weights, batch = toy_batch()
    same = whole(weights, batch, weights)
    for method in (SDPO(divergence=divergence), SDFT()):
        found = method.loss(forward(weights, same), same, None).values[same.action_mask]
        close(found.detach(), found.detach() * 0, atol=1e-12, rtol=0)
        close(gradient(method, weights, same), torch.zeros_like(weights), atol=1e-12, rtol=0)
    found = SAMPLED.loss(forward(weights, same), same, None).values
    assert (found == 0).all() and (gradient(SAMPLED, weights, same) == 0).all()


def test_on_the_sampled_token_it_is_reinforce_with_the_teachers_log_ratio_as_credit():
    weights, batch = toy_batch()
    fresh = on_policy(weights, batch).replace(has_teacher=torch.ones_like(batch.success))
    ratio = (fresh.teacher_logp - fresh.proximal_logp) * fresh.action_mask
    method = GRPO(average="token")
    loss = method.loss(forward(weights, fresh), fresh, Credit(ratio))
    (reinforce,) = torch.autograd.grad((loss.values * method.weights(fresh)).sum(), weights)
    close(gradient(SAMPLED, weights, fresh), reinforce)


@kinds
def test_with_all_of_the_vocabulary_the_bucket_for_the_rest_changes_nothing(divergence):
    weights, batch = toy_batch()
    full = whole(weights, batch, table(7))
    out = forward(weights, full)
    found = SDPO(divergence=divergence).loss(out, full, None).metrics["divergence"]
    exact = KINDS[divergence](out.topk_logp, full.teacher_topk_logp).detach()
    close(found[full.action_mask], exact[full.action_mask], atol=1e-7, rtol=0)
    assert (exact[full.action_mask] > 1e-2).all()


def test_rewards_are_not_read():
    weights, batch = toy_batch()
    other = batch.replace(reward=10 - 7 * batch.reward, token_reward=batch.token_reward + 1)
    for method in (SDPO(), SDFT(), SAMPLED):
        close(gradient(method, weights, other), gradient(method, weights, batch), rtol=0, atol=0)
        assert (method.credit(batch).advantage == 0).all()


def test_a_row_without_a_teacher_is_masked_and_not_counted():
    weights, batch = toy_batch()
    without = ~batch.has_teacher
    assert without.any()
    draw = torch.Generator().manual_seed(0)
    noise = torch.where(without[:, None], torch.randn(batch.tokens.shape, generator=draw), 0.0)
    other = batch.replace(teacher_topk_logp=batch.teacher_topk_logp - noise.abs()[..., None])
    other = other.replace(proximal_logp=batch.proximal_logp + noise, teacher_logp=batch.teacher_logp + noise)
    for method in (SDPO(), SDFT(), SAMPLED):
        assert (method.weights(batch)[without] == 0).all()
        close(method.weights(batch).sum(), torch.tensor(1.0))
        close(gradient(method, weights, other), gradient(method, weights, batch), rtol=0, atol=0)
        silent = batch.replace(has_teacher=torch.zeros_like(without))
        assert (method.weights(silent) == 0).all() and (gradient(method, weights, silent) == 0).all()


@pytest.mark.parametrize("method", [*(SDPO(divergence=d) for d in KINDS), SDFT()], ids=[*KINDS, "sdft"])
def test_the_gradient_agrees_with_finite_differences_where_the_importance_weight_stands_still(method):
    """A limit below every ratio makes the weight a constant; elsewhere it moves with the policy, without gradient."""
    weights, batch = toy_batch()
    still, share = replace(method, truncate=1e-3), method.weights(batch) * 1e6
    assert torch.autograd.gradcheck(
        lambda w: (still.loss(forward(w, batch), batch, None).values * share).sum(), (weights,)
    )
    loss = still.loss(forward(weights, batch), batch, None)
    assert (loss.metrics["importance"][batch.action_mask] == 1e-6).all()


@pytest.mark.parametrize("method", [SDPO(), SDFT(), SAMPLED], ids=["sdpo", "sdft", "sampled"])
def test_no_gradient_flows_through_the_importance_weights(method):
    weights, batch = toy_batch()
    logp = forward(weights, batch).logp
    live = {"proximal_logp": logp * 1.01, "behavior_logp": logp * 0.99, "teacher_logp": batch.teacher_logp}
    touched = {name: value.detach().clone().requires_grad_() for name, value in live.items()}
    out = forward(weights, batch)
    out = Output(logp=logp, entropy=out.entropy, topk_logp=out.topk_logp)
    loss = (method.loss(out, batch.replace(**touched), None).values * method.weights(batch)).sum()
    found = torch.autograd.grad(loss, list(touched.values()), allow_unused=True)
    assert all(slope is None or (slope == 0).all() for slope in found)


@pytest.mark.parametrize(
    ("won", "said", "expected"),
    [
        ("1001", "....", "3000"),
        ("1000", "....", ".000"),
        ("0000", "....", "...."),
        ("1000", "aaaa", "a000"),
        ("0000", "a.a.", "a.a."),
    ],
)
def test_each_of_four_siblings_is_told_of_the_first_other_success_else_of_its_own_feedback(won, said, expected):
    """Which reply the teacher of each row reads, by number; `a`: what was said of its own; `.`: nothing, so masked."""
    siblings = [
        Rollout(
            task=Task(),
            group=0,
            success=won[n] == "1",
            turns=(Turn(context=[1], action=[2], reply=str(n), feedback="a" if said[n] == "a" else None),),
        )
        for n in range(4)
    ]
    teacher = SDPO().teacher
    read = [chosen(teacher, available(Opening(rollout, 0, siblings), teacher.reads)) for rollout in siblings]
    assert "".join(next(iter(told.values()))[0] if told else "." for told in read) == expected


# ----------------------------------------------------------------------------------------------------------- direction


@pytest.mark.parametrize(
    "method", [*(SDPO(divergence=d) for d in KINDS), SDFT(), SAMPLED], ids=[*KINDS, "sdft", "sampled"]
)
def test_one_step_brings_the_student_closer_to_the_teacher(method):
    weights, batch = toy_batch()
    full = whole(weights, on_policy(weights, batch), table(7))

    def away(student):
        return reverse_kl(forward(student, full).topk_logp, full.teacher_topk_logp)[full.action_mask].mean()

    after = (weights - 0.1 * gradient(method, weights, full)).detach()
    assert away(after) < away(weights.detach()) - 1e-4


def test_the_gradient_on_the_logits_sums_to_zero_at_each_place():
    weights, batch = toy_batch()
    for method in (SDPO(), SDFT(), SAMPLED):
        slopes = gradient(method, weights, batch)[:, :V]
        assert slopes.abs().max() > 1e-3
        close(slopes.sum(-1), torch.zeros(V), atol=1e-12, rtol=0)


# --------------------------------------------------------------------------------------------------------- closed form

STUDENT = [[-0.2, -1.1, -0.7], [-0.4, -0.9, -1.3]]
TEACHER = [[-0.1, -1.4, -0.4], [-0.6, -0.5, -1.7]]
MASK = [[1, 1, 0], [1, 0, 1]]


@pytest.mark.parametrize(
    ("old", "limit", "taught", "expected"),
    [
        (STUDENT, 2.0, [True, True], -0.2275),
        (STUDENT, 2.0, [True, False], -0.155),
        ([[-0.5, -1.0, -0.8], [-0.1, -1.4, -1.9]], 1.2, [True, True], -0.23946545),
    ],
)
def test_the_sampled_token_by_hand(old, limit, taught, expected):
    """Sec. 2: (log p - log q) log p, no gradient through the first, averaged over all tokens; the value may be < 0."""
    batch = rows(MASK, taught, teacher_logp=TEACHER, proximal_logp=old, behavior_logp=old)
    close(total(replace(SAMPLED, truncate=limit), batch, logp=STUDENT), torch.tensor(expected), atol=1e-8, rtol=0)


@pytest.mark.parametrize(("divergence", "expected"), [("forward", 0.3899572), ("reverse", 0.3037020)])
def test_the_whole_vocabulary_by_hand(divergence, expected):
    """Four tokens, two places, whose means over the vocabulary are these and 0.0804777 for Jensen-Shannon (eq. 1)."""
    student = [[-1.4350729, -1.9350729, -0.6350728, -2.4350729], [-0.4234670, -2.4234672, -1.6234670, -2.8234673]]
    teacher = [[-0.9254559, -2.0254560, -1.2254559, -1.7254560], [-1.2512126, -0.6512126, -2.0512125, -2.7512126]]
    ids, zeros = torch.arange(4).expand(1, 2, 4), torch.zeros(1, 2)
    batch = rows([[1, 1]], teacher_topk_logp=[teacher], topk_ids=ids, proximal_logp=zeros, behavior_logp=zeros)
    close(total(SDPO(divergence=divergence), batch, topk=[student]), torch.tensor(expected), atol=1e-6, rtol=0)
    close(total(SDPO(), batch, topk=[student]), torch.tensor(0.0804777), atol=1e-6, rtol=0)


def likeliest(**fields):
    """Three tokens and a tail: student .45 .25 .10 (.20) and .35 .20 .15 (.30), teacher .30 .35 .15 and .25 .25 .20."""
    student = torch.tensor([[[0.45, 0.25, 0.10], [0.35, 0.20, 0.15]]]).log()
    teacher = torch.tensor([[[0.30, 0.35, 0.15], [0.25, 0.25, 0.20]]]).log()
    zeros = {"proximal_logp": torch.zeros(1, 2), "behavior_logp": torch.zeros(1, 2)}
    return student, rows(
        [[1, 1]], teacher_topk_logp=teacher, topk_ids=torch.arange(3).expand(1, 2, 3), **zeros | fields
    )


def test_three_likely_tokens_and_the_rest_by_hand():
    student, batch = likeliest()
    close(total(SDPO(divergence="reverse"), batch, topk=student), torch.tensor(0.0438895), atol=1e-7, rtol=0)
    close(total(SDFT(), batch, topk=student), torch.tensor(0.0438895), atol=1e-7, rtol=0)
    out = Output(logp=torch.zeros(1, 2), entropy=torch.zeros(1, 2), topk_logp=student)
    found = SDPO().loss(out, batch, None).values
    close(found, torch.tensor([[0.01425393, 0.00736977]]), atol=1e-8, rtol=0)


def test_both_importance_weights_by_hand():
    """Ratios 1.4918247 and 0.5488116, once for a stale policy, once for another sampler, and both together."""
    now, old = torch.tensor([[-0.3, -0.8]]), torch.tensor([[-0.7, -0.2]])
    for proximal, behavior, expected in (
        (old, 2 * old - now, 0.0169712),
        (old, old, 0.0126545),
        (now, old, 0.0126545),
    ):
        student, batch = likeliest(proximal_logp=proximal, behavior_logp=behavior)
        close(total(SDPO(), batch, logp=now, topk=student), torch.tensor(expected), atol=1e-7, rtol=0)
    student, batch = likeliest(proximal_logp=old, behavior_logp=old)
    low = torch.minimum((now - old).exp(), torch.tensor(1.1)) * torch.tensor([[0.01425393, 0.00736977]])
    close(total(SDPO(truncate=1.1), batch, logp=now, topk=student), low.mean(), atol=1e-7, rtol=0)


def test_used_once_and_sampled_by_the_trainer_the_importance_weight_is_exactly_one():
    weights, batch = toy_batch()
    fresh = on_policy(weights, batch)
    loss = SDPO(truncate=1.0).loss(forward(weights, fresh), fresh, None)
    assert (loss.metrics["importance"] == 1).all()


@pytest.mark.parametrize(("taught", "ours", "theirs"), [([True, True], 0.4, 0.6), ([True, False], 1.0, 0.5)])
def test_every_token_with_a_teacher_counts_the_same_unlike_in_the_authors_code(taught, ours, theirs):
    """Rows of one and three tokens with losses of 1 and 0.2 each. Theirs is the mean of row means, masked rows as 0."""
    wanted = torch.tensor([[1.0, 0.0, 0.0], [0.2, 0.2, 0.2]])
    logp = torch.full((2, 3), -1.0)
    batch = rows([[1, 0, 0], [1, 1, 1]], taught, teacher_logp=logp + wanted, proximal_logp=logp, behavior_logp=logp)
    out = Output(logp=logp, entropy=logp * 0)
    values = SAMPLED.loss(out, batch, None).values
    close(values * batch.action_mask, wanted)
    close((values * SAMPLED.weights(batch)).sum(), torch.tensor(ours))
    mask = batch.action_mask & batch.has_teacher[:, None]
    shipped = ((values * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()
    close(shipped, torch.tensor(theirs))


@kinds
def test_likely_tokens_and_the_rest_never_say_more_than_the_whole_vocabulary(divergence):
    """0 <= D of fewer tokens <= D of more <= D of all, and Jensen-Shannon at most log 2 (data processing)."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = ((3 * torch.randn(1, 200, 12, generator=generator)).log_softmax(-1) for _ in range(2))
    order = student.argsort(-1, descending=True)
    method, before, zeros = SDPO(divergence=divergence), torch.zeros(1, 200), torch.zeros(1, 200)
    for k in (1, 3, 6, 12):
        ids = order[..., :k]
        fields = {"topk_ids": ids, "teacher_topk_logp": teacher.gather(-1, ids)}
        batch = rows([[1] * 200], proximal_logp=zeros, behavior_logp=zeros, **fields)
        out = Output(logp=zeros, entropy=zeros, topk_logp=student.gather(-1, ids))
        found = method.loss(out, batch, None).values
        assert (found >= before - 1e-9).all() and (found > 1e-4).any()
        before = found
    close(before, KINDS[divergence](student, teacher), atol=1e-6, rtol=0)
    if divergence == "jensen_shannon":
        assert before.max() < math.log(2)


def test_over_many_samples_the_sampled_token_has_the_gradient_of_reverse_kl():
    """Sec. 2, exactly: the expectation over the sampled token, summed over the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, generator=generator).requires_grad_()
    teacher = torch.randn(6, generator=generator).log_softmax(-1)
    logp = logits.log_softmax(-1)
    old = logp.detach()[:, None]
    batch = rows([[1]] * 6, teacher_logp=teacher[:, None], proximal_logp=old, behavior_logp=old)
    values = SAMPLED.loss(Output(logp=logp[:, None], entropy=old), batch, None).values[:, 0]
    (found,) = torch.autograd.grad((logp.detach().exp() * values).sum(), logits, retain_graph=True)
    close(found, torch.autograd.grad(reverse_kl(logp, teacher), logits)[0])


@pytest.mark.parametrize("divergence", KINDS)
def test_the_gradient_on_the_logits_by_formula(divergence):
    """Prop. 2.1 and its like: p (x - KL), p - q, and half p (log p/m - KL(p || m))."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(1, 1, 5, generator=generator).requires_grad_()
    logq = torch.randn(5, generator=generator).log_softmax(-1)
    logp = logits.log_softmax(-1)
    zeros, ids = torch.zeros(1, 1), torch.arange(5).expand(1, 1, 5)
    batch = rows([[1]], topk_ids=ids, teacher_topk_logp=logq[None, None], proximal_logp=zeros, behavior_logp=zeros)
    out = Output(logp=zeros, entropy=zeros, topk_logp=logp)
    (found,) = torch.autograd.grad(SDPO(divergence=divergence).loss(out, batch, None).values.sum(), logits)
    p, q = logp.detach().exp()[0, 0], logq.exp()
    m = (p + q) / 2
    expected = {
        "reverse": p * ((p / q).log() - (p * (p / q).log()).sum()),
        "forward": p - q,
        "jensen_shannon": p * ((p / m).log() - (p * (p / m).log()).sum()) / 2,
    }[divergence]
    close(found[0, 0], expected, atol=1e-7, rtol=0)


# -------------------------------------------------------------------------------------------------------------- learns


@pytest.mark.parametrize(
    ("method", "rate"),
    [
        (SDPO(), 4.0),
        (SDPO(divergence="reverse"), 1.0),
        (SDPO(divergence="forward"), 1.0),
        (SDFT(teacher=Teacher(reads=("demonstration",), top_k=3)), 1.0),
        (SAMPLED, 0.5),
    ],
    ids=[*KINDS, "sdft", "sampled"],
)
def test_it_becomes_a_teacher_that_stands_still(method, rate):
    """On its own tokens, five arms, from a uniform start to within 0.03 of each of the teacher's probabilities."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.zeros(5).requires_grad_()
    teacher = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2]).log()
    for step in range(300):
        with torch.no_grad():
            old = logits.log_softmax(-1)
        arms = torch.multinomial(old.exp(), 64, replacement=True, generator=generator)
        ids = old.topk(3).indices if step % 2 else torch.arange(5)
        batch = rows(
            [[1]] * 64,
            topk_ids=ids.expand(64, 1, len(ids)),
            teacher_topk_logp=teacher[ids].expand(64, 1, len(ids)),
            teacher_logp=teacher[arms][:, None],
            proximal_logp=old[arms][:, None],
            behavior_logp=old[arms][:, None],
        )
        logp = logits.log_softmax(-1)
        out = Output(logp=logp[arms][:, None], entropy=logp[arms][:, None], topk_logp=logp[ids].expand(64, 1, len(ids)))
        loss = (method.loss(out, batch, None).values * method.weights(batch)).sum()
        (slope,) = torch.autograd.grad(loss, logits)
        logits = (logits - rate * slope).detach().requires_grad_()
    close(logits.softmax(-1), teacher.exp(), atol=0.03, rtol=0)


# ------------------------------------------------------------------------------------------------------------ settings


def test_the_default_teacher():
    """A slow copy that read a correct sibling, else feedback."""
    assert SDPO().teacher == Teacher(who="ema", rate=0.05, reads=("sibling", "feedback"), need="first", top_k=20)
    assert SDPO().needs.live == {"topk_logp"} and SDPO().truncate == 2
    assert SAMPLED.needs.measured == {"teacher_logp", "proximal_logp", "has_teacher"} and not SAMPLED.needs.live


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match=r"SDPO's divergence is jensen_shannon, but teacher\.top_k is 0"):
        SDPO(teacher=SAMPLED.teacher)
    with pytest.raises(ConfigError, match=r"divergence is forward, but teacher\.top_k is 0"):
        SDPO(teacher=SAMPLED.teacher, divergence="forward")
    with pytest.raises(ConfigError, match="SDPO's truncate is 0"):
        SDPO(truncate=0.0)
