import math
from dataclasses import replace

import pytest
import torch

from toy import bandit, forward, gradient, on_policy, toy_batch
from tropism.errors import ConfigError
from tropism.maths.divergence import among_top_k, reverse_kl
from tropism.maths.reduce import sequence_mean
from tropism.methods.openclaw import OpenClaw
from tropism.teacher import Teacher
from tropism.types import Batch, Credit, Output
from turns import turns

close = torch.testing.assert_close
TOP = Teacher(who="frozen", reads=("hint",), top_k=4, select="sequence")
WHOLE = Teacher(who="frozen", reads=("hint",), top_k="all")
OLD, TEACHER, NEW = [0.4, 0.3, 0.2, 0.1], [0.1, 0.6, 0.25, 0.05], [0.3, 0.4, 0.2, 0.1]
"""Distributions of the policy that sampled, of the teacher and of a policy that has moved, over four tokens."""


def head(*, old=OLD, teacher=TEACHER, new=OLD, ids=(0, 1)) -> tuple[Output, Batch]:
    """One turn of one token, compared on `ids`; the policy's logits are `out.entropy`, for want of another place."""
    logits = torch.tensor(new).log().requires_grad_()
    old, teacher, places = torch.tensor(old).log(), torch.tensor(teacher).log(), torch.tensor(ids)
    logp = logits.log_softmax(-1)

    def at(values):
        return (values[places.clamp(min=0)] * (places >= 0))[None, None]

    batch = turns([[math.log(OLD[0])]], reward=[0.0]).replace(
        topk_ids=places[None, None],
        proximal_topk_logp=at(old),
        teacher_topk_logp=at(teacher),
        has_teacher=torch.tensor([True]),
    )
    return Output(logp=batch.proximal_logp.clone(), entropy=logits, topk_logp=at(logp)), batch


def hinted(method, **settings):
    """(value, gradient on the policy's logits) of the loss of that one token."""
    out, batch = head(**settings)
    loss = method.loss(out, batch, method.credit(batch)).values.sum()
    (slope,) = torch.autograd.grad(loss, out.entropy)
    return loss.detach(), slope


# ------------------------------------------------------------------------------------------------------------ identity


def test_without_hints_it_is_reinforce_with_the_raw_score_bit_for_bit():
    weights, batch = toy_batch()
    fresh = on_policy(weights, batch)
    method = OpenClaw(w_hint=0.0)
    score = fresh.token_reward.sum(1, keepdim=True)
    told = fresh.action_mask & (score != 0)
    share = sequence_mean(told, torch.arange(len(fresh)))
    (expected,) = torch.autograd.grad(-(forward(weights, fresh).logp * score * share).sum(), weights)
    close(gradient(method, weights, fresh), expected)
    other = fresh.replace(teacher_logp=fresh.teacher_logp * 3 - 1, has_teacher=~fresh.has_teacher)
    close(gradient(method, weights, other), gradient(method, weights, fresh), rtol=0, atol=0)
    assert (gradient(OpenClaw(), weights, fresh) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("teacher", [Teacher(who="frozen", reads=("hint",)), TOP])
def test_without_scores_it_is_distillation_whatever_the_score_bit_for_bit(teacher):
    weights, batch = toy_batch()
    method = OpenClaw(w_rl=0.0, teacher=teacher)
    scored = batch.replace(token_reward=7 * batch.token_reward - 1.0 * batch.action_mask)
    close(gradient(method, weights, scored), gradient(method, weights, batch), rtol=0, atol=0)
    assert (gradient(OpenClaw(teacher=teacher), weights, scored) - gradient(method, weights, batch)).abs().max() > 1e-3


def test_on_the_whole_vocabulary_it_is_the_gradient_of_the_kl_to_the_teacher():
    """Section 3 of arXiv:2603.10165 v2 with S = V and no clip; by hand (+0.406014, -0.319322, -0.118881, +0.032189)."""
    method = OpenClaw(w_rl=0.0, teacher=WHOLE)
    _, slope = hinted(method, ids=(0, 1, 2, 3))
    logits = torch.tensor(OLD).log().requires_grad_()
    (exact,) = torch.autograd.grad(reverse_kl(logits.log_softmax(-1), torch.tensor(TEACHER).log()), logits)
    close(slope, exact)
    close(slope, torch.tensor([0.406014, -0.319322, -0.118881, 0.032189]), atol=1e-6, rtol=0)
    _, part = hinted(method)
    assert (part - exact).abs().max() > 1e-2


@pytest.mark.parametrize("teacher", [Teacher(who="frozen", reads=("hint",)), TOP])
def test_where_no_teacher_spoke_the_hint_adds_exactly_nothing(teacher):
    """A turn with a score only: the policy stands in the teacher's place."""
    weights, batch = toy_batch()
    alone = batch.replace(
        teacher_logp=batch.proximal_logp,
        teacher_topk_logp=batch.proximal_topk_logp,
        has_teacher=torch.zeros_like(batch.has_teacher),
    )
    plain = gradient(OpenClaw(w_hint=0.0), weights, batch)
    close(gradient(OpenClaw(teacher=teacher), weights, alone), plain, rtol=0, atol=0)


def test_two_temperatures_are_not_one():
    """The same weights and prompt give no credit, unless student and teacher are heated differently."""
    logits = torch.tensor([[2.0, 0.0, -1.0]])
    warm, plain = ((logits / heat).log_softmax(-1)[:, :1] for heat in (0.6, 1.0))
    batch = turns([[0.0]], reward=[0.0])
    for teacher, same in ((warm, True), (plain, False)):
        told = batch.replace(proximal_logp=warm, teacher_logp=teacher, has_teacher=torch.tensor([True]))
        assert bool((OpenClaw().credit(told).advantage == 0).all()) is same


# ----------------------------------------------------------------------------------------------------------- direction


def test_one_step_makes_a_praised_turn_likelier_and_a_criticised_one_less_likely():
    batch = turns([[-1.0], [-1.0]], reward=[1.0, -1.0])
    out = Output(logp=batch.proximal_logp.clone().requires_grad_(), entropy=batch.token_reward)
    loss = OpenClaw().loss(out, batch, OpenClaw().credit(batch))
    (slope,) = torch.autograd.grad((loss.values * OpenClaw().weights(batch)).sum(), out.logp)
    assert slope[0] < 0 < slope[1]


@pytest.mark.parametrize("ids", [(0, 1), (0, 1, 2, 3)])
def test_one_step_brings_the_student_closer_to_the_teacher(ids):
    _, slope = hinted(OpenClaw(teacher=TOP, gap=1.0), ids=ids)
    before = torch.tensor(OLD).log()
    distance = [reverse_kl(p.log_softmax(-1), torch.tensor(TEACHER).log()) for p in (before, before - 0.1 * slope)]
    assert distance[1] < distance[0] - 1e-3


# --------------------------------------------------------------------------------------------------------- closed form


@pytest.mark.parametrize(
    ("score", "credit"), [(1.0, [1.3, -0.5, 1.0]), (0.0, [0.3, -1.5, 0.0]), (-1.0, [-0.7, -2.5, -1.0])]
)
def test_score_and_hint_add_up_by_hand(score, credit):
    """arXiv:2603.10165 v1, the combined advantage."""
    batch = turn_of_three(score)
    close(OpenClaw().credit(batch).advantage, torch.tensor([credit]))


def turn_of_three(score):
    """One turn of three tokens that a hinted teacher finds likelier, less likely and as likely."""
    return turns([[-0.5, -0.5, -0.7]], reward=[score], told=[[-0.2, -2.0, -0.7]])


def test_the_combined_loss_by_hand():
    """log p has moved to (-0.3, -0.4, -0.9), score +1: the mean over the turn's tokens is -0.617990."""
    batch = turn_of_three(1.0)
    out = Output(logp=torch.tensor([[-0.3, -0.4, -0.9]]), entropy=torch.zeros(1, 3))
    loss = OpenClaw().loss(out, batch, OpenClaw().credit(batch))
    close(loss.metrics["ratio"], torch.tensor([[1.221403, 1.105171, 0.818731]]), atol=1e-6, rtol=0)
    close(loss.values, torch.tensor([[-1.587824, 0.552585, -0.818731]]), atol=1e-6, rtol=0)
    mean = (loss.values * OpenClaw().weights(batch)).sum()
    close(mean, torch.tensor(-0.617990), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("gap", "deserved", "still", "moved"),
    [(1.0, [-0.571429, 0.297063], 0.274365, 0.076902), (2.0, [-0.792168, 0.297063], 0.495105, 0.253494)],
)
def test_the_loss_of_the_likeliest_tokens_by_hand(gap, deserved, still, moved):
    """arXiv:2603.10165 v2: weights (4/7, 3/7), differences clipped at C; ratios (0.75, 4/3) are both at their clip."""
    method = OpenClaw(teacher=TOP, gap=gap)
    _, batch = head()
    share = among_top_k(batch.proximal_topk_logp, batch.topk_ids)
    close(share, torch.tensor([[[4 / 7, 3 / 7]]]))
    told = method.told(batch.teacher_topk_logp, batch.proximal_topk_logp) * share
    close(told, torch.tensor([[deserved]]), atol=1e-6, rtol=0)
    close(hinted(method)[0], torch.tensor(still), atol=1e-6, rtol=0)
    loss, slope = hinted(method, new=NEW)
    close(loss, torch.tensor(moved), atol=1e-6, rtol=0)
    close(slope, torch.zeros(4))


def test_the_gradient_on_the_likeliest_tokens_by_hand():
    """-sum_v A_v (e_v - p) at ratio 1 and C = 1."""
    _, slope = hinted(OpenClaw(teacher=TOP, gap=1.0))
    close(slope, torch.tensor([0.461682, -0.379373, -0.054873, -0.027437]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("teacher", [Teacher(who="frozen", reads=("hint",)), TOP])
def test_half_the_weight_of_the_hint_is_half_its_gradient(teacher):
    weights, batch = toy_batch()
    fresh = on_policy(weights, batch)
    fresh = fresh.replace(proximal_topk_logp=forward(weights, fresh).topk_logp.detach())
    whole, half = (OpenClaw(w_rl=0.0, w_hint=w, teacher=teacher) for w in (1.0, 0.5))
    close(2 * gradient(half, weights, fresh), gradient(whole, weights, fresh))


def test_the_weight_for_another_sampler_is_cut_at_2():
    """Proximal / behavior is 1.5 and 4."""
    batch = turns([[math.log(0.3)], [math.log(0.4)]], reward=[1.0, 1.0])
    batch = batch.replace(behavior_logp=torch.tensor([[0.2], [0.1]]).log())
    out = Output(logp=batch.proximal_logp, entropy=batch.token_reward)
    close(OpenClaw().loss(out, batch, OpenClaw().credit(batch)).values, torch.tensor([[-1.5], [-2.0]]))


def test_what_others_said_deserves_nothing():
    _, batch = toy_batch()
    noisy = batch.replace(teacher_logp=batch.teacher_logp + 5.0)
    assert (OpenClaw().credit(noisy).advantage[~batch.action_mask] == 0).all()


def test_what_a_token_can_deserve_and_cost_is_bounded():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(60, 3, 4, generator=generator).mul(3).softmax(-1).tolist()
    for gap in (0.5, 1.0, 2.0):
        method = OpenClaw(teacher=TOP, gap=gap)
        for old, teacher, new in drawn:
            told = method.told(torch.tensor(teacher[:2]).log(), torch.tensor(old[:2]).log())
            assert (told.abs() <= gap + 1e-12).all()
            loss, _ = hinted(method, old=old, teacher=teacher, new=new)
            assert abs(loss) <= gap * max(1.28, *(n / o for n, o in zip(new[:2], old[:2], strict=True))) + 1e-9
    ids = torch.arange(4).repeat(60, 1)
    close(among_top_k(torch.tensor(drawn)[:, 0].log(), ids).sum(-1), torch.ones(60))


def test_the_order_of_the_likeliest_tokens_and_a_constant_on_all_logits_do_not_matter():
    method = OpenClaw(teacher=TOP, gap=1.0)
    loss, slope = hinted(method, ids=(0, 1, 3), new=NEW)
    for settings in ({"ids": (3, 0, 1), "new": NEW}, {"ids": (0, 1, 3), "new": [7 * p for p in NEW]}):
        found = hinted(method, **settings)
        close(found[0], loss)
        close(found[1], slope)


def test_an_unused_place_counts_nothing():
    """Student and teacher share fewer tokens than K, or none."""
    method = OpenClaw(teacher=replace(TOP, support="overlap"), gap=1.0)
    for ids, full in (((0, -1, 1), (0, 1)), ((-1, 1), (1,))):
        found, expected = hinted(method, ids=ids), hinted(method, ids=full)
        close(found[0], expected[0])
        close(found[1], expected[1])
    assert hinted(method, ids=(-1, -1))[0] == 0


@pytest.mark.parametrize(
    ("method", "counted"),
    [(OpenClaw(), [1, 1, 1, 0]), (OpenClaw(w_hint=0.0), [1, 0, 1, 0]), (OpenClaw(w_rl=0.0), [1, 1, 0, 0])],
)
def test_a_turn_without_score_and_hint_counts_nothing(method, counted):
    batch = turns([[-1.0]] * 4, reward=[1.0, 0.0, -1.0, 0.0])
    batch = batch.replace(has_teacher=torch.tensor([True, True, False, False]))
    close(method.weights(batch), torch.tensor(counted)[:, None] / sum(counted))


def test_every_turn_counts_the_same_however_long_and_however_many_an_episode_has():
    _, batch = toy_batch()
    found = OpenClaw().weights(batch)
    rows = (batch.token_reward.sum(1) != 0) | batch.has_teacher
    close(found.sum(1), rows / rows.sum())
    spread = [row[mask] for row, mask in zip(found, batch.action_mask, strict=True)]
    assert all((row == row[0]).all() for row in spread)


# -------------------------------------------------------------------------------------------------------------- learns


def taught(batch: Batch, weights, teacher) -> Batch:
    """The same batch with a teacher over all arms."""
    old, ids = weights[0, :3].detach().log_softmax(-1), torch.arange(3).expand(*batch.tokens.shape, 3)
    mask = batch.action_mask
    return batch.replace(
        teacher_logp=teacher[batch.tokens] * mask,
        has_teacher=torch.ones(len(batch), dtype=torch.bool),
        topk_ids=ids,
        proximal_topk_logp=old.expand_as(ids) * mask[..., None],
        teacher_topk_logp=teacher.expand_as(ids) * mask[..., None],
    )


@pytest.mark.parametrize(
    ("method", "best"),
    [
        (OpenClaw(w_hint=0.0), 2),
        (OpenClaw(w_rl=0.0), 0),
        (OpenClaw(w_rl=0.0, gap=1.0, teacher=TOP), 0),
        (OpenClaw(w_rl=0.1), 0),
    ],
    ids=["score", "hint", "likeliest", "both"],
)
def test_it_learns_what_the_score_or_the_hint_says(method, best):
    """Three arms: the judge likes the last one, the hinted teacher plays the first one 19 times in 20."""
    weights = torch.tensor([[-0.5, 0.2, 0.0], [0.0] * 3, [0.0] * 3]).requires_grad_()
    generator, optimizer = torch.Generator().manual_seed(0), torch.optim.SGD([weights], lr=0.5)
    teacher = torch.tensor([0.95, 0.025, 0.025]).log()
    for _ in range(80):
        batch = bandit(weights, torch.tensor([-1.0, -1.0, 1.0]), groups=32, size=1, generator=generator)
        batch = taught(batch, weights, teacher)
        for _ in range(2):
            weights.grad = gradient(method, weights, batch)
            optimizer.step()
    assert weights[0].softmax(-1)[best] > 0.85
    if not method.w_rl:
        close(weights[0].softmax(-1)[0], torch.tensor(0.95), atol=0.05, rtol=0)


# ------------------------------------------------------------------------------------------------------------ settings


def test_likeliest_tokens_are_measured_only_where_they_are_compared():
    assert OpenClaw().needs.live == set() and "topk_ids" not in OpenClaw().needs.measured
    assert OpenClaw(teacher=TOP).needs.live == {"topk_logp"}
    assert {"topk_ids", "proximal_topk_logp", "teacher_topk_logp"} <= OpenClaw(teacher=TOP).needs.measured
    assert OpenClaw().needs.sampling == {"rollouts"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"w_rl": -0.5}, "w_rl is -0.5"),
        ({"w_hint": -0.5}, "w_hint -0.5"),
        ({"w_rl": 0.0, "w_hint": 0.0}, "if both are 0 nothing is learned"),
        ({"gap": 0.0}, "gap is 0.0"),
        ({"clip_low": -1.0}, "clip_low is -1.0"),
        ({"truncate": 0.0}, "truncate is 0.0"),
        ({"teacher": Teacher()}, "teacher reads nothing"),
        ({"teacher": Teacher(reads=("answer",))}, "teacher reads answer"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        OpenClaw(**settings)


def test_credit_of_a_turn_stands_on_all_of_its_tokens():
    _, batch = toy_batch()
    found = OpenClaw(w_hint=0.0, w_rl=0.5).credit(batch)
    assert isinstance(found, Credit)
    close(found.advantage, 0.5 * batch.token_reward.sum(1, keepdim=True) * batch.action_mask)
