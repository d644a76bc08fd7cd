"""RLSD: arXiv:2604.03128, and the numbers of its authors' code in rlsd_reference.json (inputs, outputs, commit)."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from toy import bandit, forward, gradient, on_policy, toy_batch
from tropism.errors import ConfigError
from tropism.methods.grpo import GRPO
from tropism.methods.rlsd import RLSD
from tropism.teacher import Teacher
from tropism.types import Batch, Output

close = torch.testing.assert_close
REFERENCE = json.loads((Path(__file__).parent / "rlsd_reference.json").read_text())
PLAIN = GRPO(scale="sample_std", average="token", clip_high=0.28, dual_clip=3.0)
EVIDENCE = torch.tensor([0.3, -0.3, 0.0, 0.1])


def answers(reward, evidence, step=0):
    """(Output, Batch): siblings that each wrote as many tokens as there is evidence, all with the same evidence."""
    rows, places = len(reward), evidence.shape[-1]
    number, mask = torch.arange(rows), torch.ones(rows, places, dtype=torch.bool)
    logp = torch.full((rows, places), -1.0)
    batch = Batch(
        tokens=number[:, None].expand(rows, places),
        length=number * 0 + places,
        action_mask=mask,
        token_reward=logp * 0,
        turn=mask.long() - 1,
        reward=torch.tensor(reward),
        success=torch.tensor(reward) > 0,
        truncated=~mask[:, 0],
        group=number * 0,
        episode=number,
        role=number,
        domain=number,
        step=step,
        steps=200,
        proximal_logp=logp,
        behavior_logp=logp,
        teacher_logp=logp + evidence,
    )
    return Output(logp=logp.clone().requires_grad_(), entropy=torch.zeros_like(logp)), batch


def factors(method, sign, evidence=EVIDENCE, step=0):
    """Credit over |A| of a success (sign 1) or a failure (-1)."""
    _, batch = answers([1.0, 0.0], evidence, step)
    row = 0 if sign > 0 else 1
    return method.credit(batch).advantage[row] / PLAIN.credit(batch).advantage[row].abs()


# ------------------------------------------------------------------------------------------------------------ identity


@pytest.mark.parametrize("method", [RLSD(share=0.0), RLSD(clip_weight=0.0)], ids=["no_share", "no_weight"])
def test_without_share_or_weight_it_is_grpo_to_the_bit(method):
    weights, batch = toy_batch()
    close(gradient(method, weights, batch), gradient(PLAIN, weights, batch), rtol=0, atol=0)
    assert (gradient(RLSD(), weights, batch) - gradient(PLAIN, weights, batch)).abs().max() > 1e-3


def test_where_the_teacher_agrees_it_is_grpo_to_the_bit():
    weights, batch = toy_batch()
    agreed = batch.replace(teacher_logp=batch.proximal_logp)
    close(gradient(RLSD(share=1.0), weights, agreed), gradient(PLAIN, weights, batch), rtol=0, atol=0)


def test_from_the_end_of_the_decay_on_it_is_grpo_to_the_bit():
    weights, batch = toy_batch()
    for step in (50, 51, 200):
        late = batch.replace(step=step, steps=300)
        close(gradient(RLSD(), weights, late), gradient(PLAIN, weights, late), rtol=0, atol=0)
    kept = batch.replace(step=200, steps=300)
    close(RLSD(decay=0).credit(kept).advantage, RLSD().credit(batch).advantage, rtol=0, atol=0)


def test_equal_rewards_teach_nothing_whatever_the_teacher_says():
    weights, batch = toy_batch()
    equal = batch.replace(reward=batch.reward * 0 + 0.1)
    assert (gradient(RLSD(share=1.0, clip_weight=0.9), weights, equal) == 0).all()


def test_no_gradient_flows_through_a_token_s_weight():
    """At ratio 1 the slope is the credit of a token over the number of tokens, and nothing else."""
    out, batch = answers([1.0, 0.0], EVIDENCE)
    method = RLSD(share=1.0)
    credit = method.credit(batch)
    (slope,) = torch.autograd.grad((method.loss(out, batch, credit).values * method.weights(batch)).sum(), out.logp)
    close(slope, -credit.advantage / 8)


def test_weights_hold_a_part_that_the_sign_of_the_reward_does_not_reach():
    """w(d) = clip(exp(d), .8, 1.2): A w(sign(A) d) = A even(d) + |A| odd(d)."""
    up, down = (factors(RLSD(share=1.0), sign, torch.tensor([0.3, 0.1])) for sign in (1, -1))
    close((up - down) / 2, torch.tensor([1.0, 1.0050042]), atol=1e-7, rtol=0)
    close((up + down) / 2, torch.tensor([0.2, 0.1001668]), atol=1e-7, rtol=0)


def test_how_many_weights_stand_at_the_edge_of_their_band_is_told():
    _, batch = answers([1.0, 0.0], EVIDENCE)
    assert RLSD(clip_weight=0.2).credit(batch).metrics == {"teacher/clipped": 0.5}
    assert RLSD(clip_weight=0.5).credit(batch).metrics == {"teacher/clipped": 0.0}
    assert RLSD().credit(batch.replace(action_mask=batch.action_mask & False)).metrics == {}


# ----------------------------------------------------------------------------------------------------------- direction


def test_one_step_raises_a_success_and_lowers_a_failure_most_where_the_teacher_agrees():
    out, batch = answers([1.0, 0.0], torch.tensor([0.15, -0.15]))
    method = RLSD()
    loss = method.loss(out, batch, method.credit(batch))
    (slope,) = torch.autograd.grad((loss.values * method.weights(batch)).sum(), out.logp)
    assert (slope[0] < 0).all() and (slope[1] > 0).all()
    assert slope[0, 0] < slope[0, 1]  # of a success the token the teacher likes rises more
    assert slope[1, 0] < slope[1, 1]  # of a failure it falls less


def test_the_teacher_never_turns_the_sign_and_moves_it_by_no_more_than_its_share():
    generator = torch.Generator().manual_seed(0)
    evidence = 3 * torch.randn(200, generator=generator)
    for method in (RLSD(), RLSD(share=1.0, clip_weight=0.5)):
        for sign in (1, -1):
            factor = factors(method, sign, evidence) * sign
            bound = method.share * method.clip_weight
            assert (factor > 0).all() and factor.min() >= 1 - bound - 1e-9 and factor.max() <= 1 + bound + 1e-9
            assert factor.std() > 0.05


# --------------------------------------------------------------------------------------------------------- closed form


@pytest.mark.parametrize(
    ("share", "sign", "expected"),
    [
        (0.5, 1, [1.1, 0.9, 1, 1.0525855]),
        (0.5, -1, [-0.9, -1.1, -1, -0.9524187]),
        (1.0, 1, [1.2, 0.8, 1, 1.1051709]),
        (1.0, -1, [-0.8, -1.2, -1, -0.9048374]),
    ],
)
def test_the_credit_by_hand(share, sign, expected):
    """Eq. 15 with log q - log p of 0.3, -0.3, 0 and 0.1; not eq. 16, which would leave 0.741 and -1.350 unclipped."""
    close(factors(RLSD(share=share), sign), torch.tensor(expected), atol=1e-7, rtol=0)


def test_a_success_and_a_failure_with_opposite_evidence_weigh_alike():
    close(factors(RLSD(), 1), -factors(RLSD(), -1, -EVIDENCE), rtol=0, atol=1e-15)


@pytest.mark.parametrize(("sign", "expected"), [(1, -1.0131463), (-1, 0.9881047)])
def test_the_surrogate_at_ratio_one_by_hand(sign, expected):
    """For an advantage of 1 or -1: minus the mean of the credit."""
    out, batch = answers([1.0, 0.0], EVIDENCE)
    row, credit = 0 if sign > 0 else 1, RLSD().credit(batch)
    size = PLAIN.credit(batch).advantage[row, 0].abs()
    close(
        (RLSD().loss(out, batch, credit).values[row] / size).mean().detach(), torch.tensor(expected), atol=1e-7, rtol=0
    )


@pytest.mark.parametrize(("step", "share"), [(0, 0.5), (25, 0.25), (49, 0.01), (50, 0.0), (200, 0.0)])
def test_the_share_falls_in_a_straight_line(step, share):
    close(factors(RLSD(), 1, step=step), 1 + share * torch.tensor([0.2, -0.2, 0, 0.1051709]), atol=1e-7, rtol=0)


def test_the_sample_deviation_scales_the_advantage():
    """Eight siblings, three successes: 1.2076124 and -0.7245674; with the population's, 1.2909944 and -0.7745967."""
    _, batch = answers([1.0] * 3 + [0.0] * 5, torch.zeros(1))
    found = RLSD(share=0.0).credit(batch).advantage[:, 0]
    close(found[[0, 7]], torch.tensor([1.2076124, -0.7245674]), atol=1e-5, rtol=0)
    other = GRPO().credit(batch).advantage[:, 0]
    close(other[[0, 7]], torch.tensor([1.2909944, -0.7745967]), atol=1e-5, rtol=0)


def test_with_negative_only_successes_are_reinforced_plainly():
    close(factors(RLSD(negative_only=True), 1), torch.ones(4), rtol=0, atol=1e-15)
    close(factors(RLSD(negative_only=True), -1), factors(RLSD(), -1), rtol=0, atol=0)


# --------------------------------------------------------------------------------------------- the authors' own numbers


def published():
    """(our batch, current log-probabilities) of the stored inputs."""
    given = REFERENCE["inputs"]
    old, new, teacher = (torch.tensor(given[name]) for name in ("old_log_probs", "log_probs", "teacher_log_probs"))
    rows, places = old.shape
    number, mask = torch.arange(rows), torch.arange(places) < torch.tensor(given["length"])[:, None]
    batch = Batch(
        tokens=number[:, None].expand(rows, places),
        length=torch.tensor(given["length"]),
        action_mask=mask,
        token_reward=old * 0,
        turn=mask.long() - 1,
        reward=torch.tensor(given["reward"]),
        success=number > 0,
        truncated=number < 0,
        group=torch.tensor(given["group"]),
        episode=number,
        role=number,
        domain=number,
        proximal_logp=old * mask,
        behavior_logp=old * mask,
        teacher_logp=teacher * mask,
    )
    return batch, new * mask


@pytest.mark.parametrize("number", range(len(REFERENCE["cases"])))
def test_credit_loss_and_gradient_are_those_of_the_authors_code(number):
    case, (batch, new) = REFERENCE["cases"][number], published()
    method = RLSD(**{key: case[key] for key in ("share", "clip_weight", "negative_only")})
    credit = method.credit(batch)
    expected = torch.tensor(case["first_step"]["advantages"])
    close(credit.advantage, expected * batch.action_mask, atol=1e-6, rtol=0)
    new.requires_grad_()
    loss = method.loss(Output(logp=new, entropy=torch.zeros_like(new)), batch, credit)
    total = (loss.values * method.weights(batch)).sum()
    close(total.detach(), torch.tensor(case["first_step"]["loss"]), atol=1e-6, rtol=0)
    (slope,) = torch.autograd.grad(total, new)
    close(slope, torch.tensor(case["first_step"]["gradient"]), atol=1e-6, rtol=0)
    assert slope.abs().max() > 1e-3


def test_later_in_a_batch_the_authors_weigh_by_the_policy_being_updated_and_we_by_the_one_that_made_it():
    case, (batch, new) = REFERENCE["cases"][0], published()
    later = torch.tensor(case["later_step"]["advantages"]) * batch.action_mask
    close(RLSD().credit(batch.replace(proximal_logp=new)).advantage, later, atol=1e-6, rtol=0)
    assert (RLSD().credit(batch).advantage - later).abs().max() > 0.05


# -------------------------------------------------------------------------------------------------------------- learns


@pytest.mark.parametrize("liked", [2, 0], ids=["right", "inverted"])
def test_it_learns_a_bandit_with_three_arms_even_from_a_teacher_that_likes_the_wrong_one(liked):
    weights = torch.tensor([[0.5, 0.2, -0.5], [0.0] * 3, [0.0] * 3]).requires_grad_()
    generator = torch.Generator().manual_seed(0)
    told = torch.nn.functional.one_hot(torch.tensor(liked), 3) * 2.0
    for step in range(60):
        batch = bandit(weights, torch.tensor([0.0, 0.5, 1.0]), groups=4, size=8, generator=generator)
        teacher = (weights[0].detach() + told).log_softmax(-1)[batch.tokens] * batch.action_mask
        batch = batch.replace(teacher_logp=teacher, step=step)
        weights = (weights - gradient(RLSD(), weights, batch)).detach().requires_grad_()
    assert weights[0].softmax(-1)[2] > 0.95


# ------------------------------------------------------------------------------------------------------------ settings


def test_the_default_teacher_is_a_synced_copy_that_read_the_answer():
    assert RLSD().teacher == Teacher(who="synced", every=10, reads=("answer",))
    assert RLSD().needs.sampling == {"siblings"} and not RLSD().needs.live
    assert (RLSD().clip_low, RLSD().clip_high, RLSD().dual_clip) == (0.2, 0.28, 3.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 1.5}, "RLSD's share is 1.5"),
        ({"share": -0.1}, "share is -0.1"),
        ({"clip_weight": -0.2}, "clip_weight is -0.2"),
        ({"decay": -1}, "decay is -1"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        RLSD(**settings)


def test_used_once_without_a_share_it_is_reinforce_with_a_group_baseline():
    weights, batch = toy_batch()
    fresh = on_policy(weights, batch)
    method = replace(RLSD(), share=0.0)
    objective = -(forward(weights, fresh).logp * method.credit(fresh).advantage * method.weights(fresh)).sum()
    close(gradient(method, weights, fresh), torch.autograd.grad(objective, weights)[0])
