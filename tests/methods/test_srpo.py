"""SRPO: arXiv:2604.02288. No official code exists; the numbers are those of its formulas."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from toy import V, forward, gradient, on_policy, table, toy_batch
from tropism.errors import ConfigError
from tropism.load import load
from tropism.maths.advantage import group_relative
from tropism.maths.divergence import reverse_kl
from tropism.methods.grpo import GRPO
from tropism.methods.sdpo import SDPO
from tropism.methods.srpo import SRPO
from tropism.teacher import Teacher
from tropism.types import Batch, Credit, Output

close = torch.testing.assert_close
RECIPES = Path(__file__).parents[2] / "recipes"
PLAIN = GRPO(scale="none", average="token", clip_high=0.28)


def group(reward, entropy=0.0, places=1):
    """Siblings, each of `places` tokens; those beside another's success have a teacher."""
    reward = torch.tensor(reward)
    number, success = torch.arange(len(reward)), reward > 0.5
    others = success.sum() - success.long()
    mask = torch.ones(len(reward), places, dtype=torch.bool)
    logp = torch.full(mask.shape, -1.0)
    ids = torch.arange(2).expand(*mask.shape, 2)
    return Batch(
        tokens=number[:, None].expand(mask.shape),
        length=number * 0 + places,
        action_mask=mask,
        token_reward=logp * 0,
        turn=mask.long() - 1,
        reward=reward,
        success=success,
        truncated=number < 0,
        group=number * 0,
        episode=number,
        role=number,
        domain=number,
        proximal_logp=logp,
        behavior_logp=logp,
        has_teacher=others > 0,
        teacher_entropy=torch.as_tensor(entropy).expand(mask.shape),
        topk_ids=ids,
        teacher_topk_logp=torch.tensor([0.9, 0.1]).log().expand(ids.shape),
    )


def said(batch):
    """A policy that gives the two tokens one half each."""
    half = torch.full(batch.topk_ids.shape, 0.5).log().requires_grad_()
    logp = batch.proximal_logp.clone().requires_grad_()
    return Output(logp=logp, entropy=logp.detach() * 0, topk_logp=half)


def routed():
    """The toy batch with failures and successes in groups that have both, and unequal entropies."""
    weights, batch = toy_batch()
    assert (batch.success & batch.has_teacher).any() and (~batch.success & batch.has_teacher).any()
    return weights, batch


# ------------------------------------------------------------------------------------------------------------ identity


def test_what_its_routing_is_compared_with_is_a_mixture_of_grpo_and_sdpo():
    mixed = load(f"{RECIPES}/mixed.py:Mixed")
    weights, batch = routed()
    reward = gradient(PLAIN, weights, batch)
    told = batch.replace(has_teacher=torch.ones_like(batch.success))
    distilled = gradient(SDPO(), weights, told)
    close(gradient(mixed(share=1.0), weights, batch), reward)
    close(gradient(mixed(share=0.0), weights, told), distilled)
    close(gradient(mixed(), weights, told), 0.9 * reward + 0.1 * distilled)
    assert (gradient(mixed(), weights, batch) - reward).abs().max() > 1e-3


def test_where_nobody_has_a_teacher_it_is_grpo_to_the_bit():
    weights, batch = routed()
    alone = batch.replace(has_teacher=torch.zeros_like(batch.success))
    close(gradient(SRPO(), weights, alone), gradient(PLAIN, weights, batch), rtol=0, atol=0)
    assert (gradient(SRPO(), weights, batch) - gradient(PLAIN, weights, batch)).abs().max() > 1e-3


def test_where_everybody_failed_and_has_a_teacher_it_is_sdpo_without_caution():
    weights, batch = routed()
    failed = batch.replace(success=batch.success & False, has_teacher=batch.success | True)
    close(gradient(SRPO(caution=0.0), weights, failed), gradient(SDPO(), weights, failed))
    assert (gradient(SRPO(), weights, failed) - gradient(SDPO(), weights, failed)).abs().max() > 1e-3


def test_a_success_hears_no_teacher_and_a_distilled_failure_no_reward():
    weights, batch = routed()
    method = SRPO()
    distilled = method.distilled(batch).any(1)
    noise = torch.randn(batch.teacher_topk_logp.shape, generator=torch.Generator().manual_seed(0)).abs()
    deaf = batch.replace(
        teacher_topk_logp=batch.teacher_topk_logp - noise * ~distilled[:, None, None],
        teacher_entropy=batch.teacher_entropy + noise[..., 0] * ~distilled[:, None],
    )
    close(gradient(method, weights, deaf), gradient(method, weights, batch), rtol=0, atol=0)
    credit = method.credit(batch)
    other = Credit(torch.where(distilled[:, None], 7.0, credit.advantage))
    one, two = (method.loss(forward(weights, batch), batch, c).values for c in (credit, other))
    close(one[batch.action_mask], two[batch.action_mask], rtol=0, atol=0)


def test_every_row_goes_exactly_one_way():
    _, batch = routed()
    method = SRPO()
    distilled = method.distilled(batch)
    close(distilled, batch.action_mask & (batch.has_teacher & ~batch.success)[:, None])
    plain = method.weights(batch)[batch.action_mask & ~distilled]
    close(plain, torch.full_like(plain, 1 / batch.action_mask.sum()))


@pytest.mark.parametrize("caution", [0.0, 1.0, 3.0])
def test_the_weights_of_the_distilled_tokens_have_mean_one_over_the_whole_optimizer_step(caution):
    _, batch = routed()
    method = SRPO(caution=caution)
    found = method.weights(batch)[method.distilled(batch)] * batch.action_mask.sum()
    close(found.mean(), torch.tensor(1.0))
    shifted = batch.replace(teacher_entropy=batch.teacher_entropy + 5.0)
    close(method.weights(shifted), method.weights(batch))
    order = batch.teacher_entropy[method.distilled(batch)].argsort()
    assert (found[order].diff() <= 1e-12).all()
    assert (found == 1).all() if caution == 0 else found.std() > 0.1


def test_the_gradient_agrees_with_finite_differences_where_the_importance_weight_stands_still():
    weights, batch = routed()
    still = SRPO(truncate=1e-3)
    credit, share = still.credit(batch), still.weights(batch) * 1e3
    assert torch.autograd.gradcheck(
        lambda w: (still.loss(forward(w, batch), batch, credit).values * share).sum(), (weights,)
    )


# ----------------------------------------------------------------------------------------------------------- direction


def test_one_step_makes_the_lonely_success_likelier_and_the_failures_more_like_their_teacher():
    batch, method = group([0.0, 1.0, 0.0, 0.0]), SRPO()
    out = said(batch)
    loss = (method.loss(out, batch, method.credit(batch)).values * method.weights(batch)).sum()
    logp, topk = torch.autograd.grad(loss, (out.logp, out.topk_logp))
    assert logp[1] < 0 and (logp[[0, 2, 3]] == 0).all()
    assert (topk[[0, 2, 3], 0, 0] < topk[[0, 2, 3], 0, 1]).all() and (topk[1] == 0).all()


# --------------------------------------------------------------------------------------------------------- closed form


@pytest.mark.parametrize(
    ("reward", "distilled", "credit"),
    [
        ([1.0, 0.0, 0.0, 0.0], [0, 1, 1, 1], [0.75, -0.25, -0.25, -0.25]),
        ([1.0, 1.0, 1.0, 1.0], [0, 0, 0, 0], [0.0, 0.0, 0.0, 0.0]),
        ([0.0, 0.0, 0.0, 0.0], [0, 0, 0, 0], [0.0, 0.0, 0.0, 0.0]),
        ([1.0, 1.0, 0.0, 1.0], [0, 0, 1, 0], [0.25, 0.25, -0.75, 0.25]),
    ],
)
def test_the_route_of_four_siblings_by_hand(reward, distilled, credit):
    """Advantages are against all siblings: among the successes alone they would all be 0."""
    batch, method = group(reward), SRPO()
    close(method.distilled(batch)[:, 0], torch.tensor(distilled).bool())
    close(method.credit(batch).advantage[:, 0], torch.tensor(credit))
    assert (method.credit(batch).advantage[~method.distilled(batch)] >= 0).all()
    if len(set(reward)) == 1:
        out = said(batch)
        loss = (method.loss(out, batch, method.credit(batch)).values * method.weights(batch)).sum()
        assert loss == 0 and (torch.autograd.grad(loss, out.logp)[0] == 0).all()


def test_the_least_advantage_that_is_reinforced_is_told():
    """With rewards between 0 and 1 a reply may lie below the mean and still not go to the teacher."""
    assert SRPO().credit(group([1.0, 0.0, 0.0, 0.0])).metrics["advantage/least"] == pytest.approx(0.75)
    padded = group([1.0, 0.0, 0.0, 0.0], places=2)
    padded = padded.replace(action_mask=padded.action_mask & torch.tensor([True, False]))
    assert SRPO().credit(padded).metrics["advantage/least"] == pytest.approx(0.75), "padding deserves 0"
    untaught = group([1.0, 0.4, 0.0, 0.0])
    untaught = untaught.replace(has_teacher=untaught.has_teacher & False)
    assert SRPO().credit(untaught).metrics["advantage/least"] == pytest.approx(-0.35)
    assert SRPO().credit(group([0.0, 0.0]).replace(has_teacher=torch.tensor([True, True]))).metrics == {}


@pytest.mark.parametrize(("successes", "credit"), [(1, 0.875), (4, 0.5), (7, 0.125)])
def test_a_success_among_eight_earns_one_minus_the_success_rate(successes, credit):
    batch = group([1.0] * successes + [0.0] * (8 - successes))
    close(SRPO().credit(batch).advantage[0, 0], torch.tensor(credit))
    assert not SRPO().distilled(batch)[0, 0]  # a lonely success has no teacher, and is reinforced


@pytest.mark.parametrize(
    ("entropy", "expected"),
    [([0.1, 2.0], [1.73978, 0.26022]), ([0.1, 0.5, 1.0, 2.0], [1.79658, 1.20428, 0.73043, 0.26871])],
)
def test_the_weights_by_hand(entropy, expected):
    """Sec. 3.3, beta 1: exp(-H) over its mean; of two micro-batches each alone, the four would be 1.197, .803 | ..."""
    batch = group([1.0] + [0.0] * len(entropy), torch.tensor([9.0, *entropy])[:, None])
    found = SRPO().weights(batch)[:, 0] * len(batch)
    close(found, torch.tensor([1.0, *expected]), atol=1e-5, rtol=0)
    sharp = SRPO(caution=1e4).weights(batch)[:, 0] * len(batch)
    close(sharp, torch.tensor([1.0, len(entropy)] + [0.0] * (len(entropy) - 1)))


@pytest.mark.parametrize(("caution", "expected"), [(1.0, -0.415613), (0.0, -0.46)])
def test_one_mean_over_both_ways_by_hand(caution, expected):
    """Three reinforced tokens of loss -1 and two distilled ones of 0.5 and 0.2: their sum over five."""
    batch = group([1.0, 1.0, 1.0, 0.0, 0.0], torch.tensor([0.0, 0.0, 0.0, 0.1, 2.0])[:, None])
    losses = torch.tensor([-1.0, -1.0, -1.0, 0.5, 0.2])[:, None]
    found = (losses * SRPO(caution=caution).weights(batch)).sum()
    close(found, torch.tensor(expected), atol=1e-6, rtol=0)


def test_the_loss_of_each_way_is_that_of_its_method():
    weights, batch = routed()
    out, method = forward(weights, batch), SRPO()
    found, distilled = method.loss(out, batch, method.credit(batch)), method.distilled(batch)
    sdpo = SDPO().loss(out, batch, None).values
    grpo = PLAIN.loss(out, batch, PLAIN.credit(batch)).values
    close(found.values, torch.where(distilled, sdpo, grpo), rtol=0, atol=0)
    close(found.metrics["distilled"], distilled.double())
    assert found.metrics.keys() == {"distilled", *PLAIN.loss(out, batch, PLAIN.credit(batch)).metrics}


# -------------------------------------------------------------------------------------------------------------- learns


def test_it_learns_a_bandit_whose_failures_are_shown_a_success():
    """Five arms, one pays. The teacher puts 0.8 on it where a sibling found it; the copy does not move."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.0, 0.5, 0.5, 0.5, 0.0]).requires_grad_()
    teacher = torch.tensor([0.8, 0.05, 0.05, 0.05, 0.05]).log()
    for _ in range(200):
        with torch.no_grad():
            old = logits.log_softmax(-1)
        arms = torch.multinomial(old.exp(), 32, replacement=True, generator=generator)
        number, won = torch.arange(32), arms == 0
        found = torch.zeros(4, dtype=torch.bool).scatter_(0, number[won] // 8, True)[number // 8]
        ids = torch.arange(5).expand(32, 1, 5)
        batch = group([1.0, 0.0] * 16).replace(
            reward=won.double(),
            success=won,
            group=number // 8,
            has_teacher=found & ~won,
            proximal_logp=old[arms][:, None],
            behavior_logp=old[arms][:, None],
            topk_ids=ids,
            teacher_topk_logp=teacher.expand(32, 1, 5),
            teacher_entropy=-(teacher.exp() * teacher).sum().expand(32, 1),
        )
        logp, method = logits.log_softmax(-1), SRPO()
        out = Output(logp=logp[arms][:, None], entropy=logp[arms][:, None], topk_logp=logp.expand(32, 1, 5))
        loss = (method.loss(out, batch, method.credit(batch)).values * method.weights(batch)).sum()
        logits = (logits - 2.0 * torch.autograd.grad(loss, logits)[0]).detach().requires_grad_()
    assert logits.softmax(-1)[0] > 0.95


# ------------------------------------------------------------------------------------------------------------ settings


def test_the_default_is_the_papers():
    assert SRPO().teacher == Teacher(who="ema", rate=0.05, reads=("sibling",), top_k=100) and SRPO().caution == 1
    assert SRPO().needs.sampling == {"siblings"} and SRPO().needs.live == {"topk_logp"}
    taught = {"has_teacher", "teacher_entropy", "topk_ids", "teacher_topk_logp"}
    assert SRPO().needs.measured == taught | {"proximal_logp"}
    _, batch = toy_batch()
    close(
        SRPO().credit(batch).advantage[1, 3:].max(),
        group_relative(batch.reward, batch.group, batch.episode, scale="none")[1],
    )


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match=r"SRPO's teacher\.top_k is 0"):
        SRPO(teacher=Teacher(reads=("sibling",)))
    with pytest.raises(ConfigError, match="SRPO's caution is -1"):
        SRPO(caution=-1.0)


def test_a_teacher_that_says_the_same_leaves_only_the_successes_to_learn_from():
    weights, batch = routed()
    fresh = on_policy(weights, batch)
    everything = fresh.replace(topk_ids=torch.arange(V).expand(*batch.tokens.shape, V))
    same = everything.replace(teacher_topk_logp=forward(weights, everything).topk_logp.detach())
    only = replace(PLAIN).credit(fresh).advantage * ~SRPO().distilled(fresh)
    objective = -(forward(weights, fresh).logp * only).sum() / fresh.action_mask.sum()
    close(gradient(SRPO(), weights, same), torch.autograd.grad(objective, weights)[0])
    other = everything.replace(teacher_topk_logp=forward(table(7), everything).topk_logp.detach())
    away = reverse_kl(forward(weights, other).topk_logp, other.teacher_topk_logp)[batch.action_mask]
    assert away.min() > 1e-3 and (gradient(SRPO(), weights, other) - gradient(SRPO(), weights, same)).abs().max() > 1e-3
