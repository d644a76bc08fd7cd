import pytest
import torch

from taught import P, Q, R, state
from toy import bandit, forward, gradient, on_policy, toy_batch
from tropism.errors import ConfigError
from tropism.maths.divergence import reverse_kl
from tropism.maths.reduce import sequence_mean
from tropism.methods.follow_up import FollowUp
from tropism.teacher import Teacher
from tropism.types import Batch, Output
from turns import turns

close = torch.testing.assert_close
LOGP, TOLD = [-1.0, -0.5, -2.0], [-0.7, -0.9, -1.5]
"""Log-probabilities of a reply of three tokens, and the same after the user's next message was read."""


def reply(*, logp=LOGP, told=TOLD, online=True) -> tuple[Output, Batch]:
    """(Output, Batch) of one reply; the policy that made the batch gave it LOGP."""
    batch = turns([LOGP], reward=[0.0], told=[told])
    batch = batch if online else batch.replace(behavior_logp=None)
    return Output(logp=torch.tensor([logp]).requires_grad_(), entropy=batch.token_reward), batch


def learned(method, out, batch):
    """(loss, gradient on log p) of one optimizer step."""
    loss = (method.loss(out, batch, method.credit(batch)).values * method.weights(batch)).sum()
    (slope,) = torch.autograd.grad(loss, out.logp)
    return loss.detach(), slope


def offline(batch):
    return batch.replace(behavior_logp=None)


# ------------------------------------------------------------------------------------------------------------ identity


@pytest.mark.parametrize("online", [True, False])
def test_used_once_it_is_reinforce_with_that_credit(online):
    weights, batch = toy_batch()
    fresh = on_policy(weights, batch)
    fresh = fresh if online else offline(fresh)
    method = FollowUp(skip=0)
    told = (fresh.teacher_logp - fresh.proximal_logp) * fresh.action_mask
    if online:
        told = (told - told.sum(1, keepdim=True) / fresh.action_mask.sum(1, keepdim=True)) * fresh.action_mask
    share = sequence_mean(fresh.action_mask & fresh.has_teacher[:, None], torch.arange(len(fresh)))
    (expected,) = torch.autograd.grad(-(forward(weights, fresh).logp * told * share).sum(), weights)
    close(gradient(method, weights, fresh), expected)
    assert expected.abs().max() > 1e-3


def test_on_its_own_tokens_the_expected_gradient_is_that_of_the_kl_to_the_teacher():
    """arXiv:2603.12273, eq. 4, uncentred; on tokens of another model it is not, whatever the paper says. The raw credit
    is -KL(p || teacher) on average, so it has a bias downwards that centring takes away."""
    logits = P.log().requires_grad_()
    out, batch = state(logits, Q)
    method, batch = FollowUp(skip=0), offline(batch)
    credit = method.credit(batch)
    values = method.loss(out, batch, credit).values[:, 0]
    (exact,) = torch.autograd.grad(reverse_kl(logits.log_softmax(-1), Q.log()), logits)
    close((P * credit.advantage[:, 0]).sum(), torch.tensor(-0.342585).double(), atol=1e-6, rtol=0)
    close((P * credit.advantage[:, 0]).sum(), -reverse_kl(P.log(), Q.log()))
    for author, wanted in ((P, [0.286853, -0.356965, 0.070112]), (R, [0.290302, -0.325143, 0.034841])):
        (found,) = torch.autograd.grad((author * values).sum(), logits, retain_graph=True)
        close(found, torch.tensor(wanted).double(), atol=1e-6, rtol=0)
        assert torch.allclose(found, exact) is (author is P)


@pytest.mark.parametrize("online", [True, False])
def test_with_nothing_more_to_read_there_is_no_credit_and_no_gradient(online):
    out, batch = reply(told=LOGP, online=online)
    assert (FollowUp().credit(batch).advantage == 0).all()
    assert (learned(FollowUp(skip=0), out, batch)[1] == 0).all()


def test_both_forms_differ():
    out, batch = reply()
    assert (
        learned(FollowUp(skip=0), out, batch)[1] - learned(FollowUp(skip=0), out, offline(batch))[1]
    ).abs().max() > 0.01


# ----------------------------------------------------------------------------------------------------------- direction


@pytest.mark.parametrize("online", [True, False])
def test_tokens_that_look_worse_once_the_reaction_is_known_become_less_likely(online):
    _, slope = learned(FollowUp(skip=0), *reply(online=online))
    assert slope[0, 1] > 0 and slope[0, 0] < 0 and slope[0, 2] < 0


# --------------------------------------------------------------------------------------------------------- closed form


def test_the_offline_loss_by_hand():
    """A = (0.3, -0.4, 0.5): -(sum A log p) / 3, with gradient -A / 3."""
    out, batch = reply(online=False)
    close(FollowUp().credit(batch).advantage, torch.tensor([[0.3, -0.4, 0.5]]))
    loss, slope = learned(FollowUp(skip=0), out, batch)
    close(loss, torch.tensor(0.3666667), atol=1e-7, rtol=0)
    close(slope, torch.tensor([[-0.1, 0.1333333, -0.1666667]]), atol=1e-7, rtol=0)


def test_the_online_loss_by_hand():
    """Centred A = (1/6, -8/15, 11/30): at ratio 1 its loss is 0 and says nothing; the gradient is what matters."""
    out, batch = reply()
    close(FollowUp().credit(batch).advantage, torch.tensor([[1 / 6, -8 / 15, 11 / 30]]))
    loss, slope = learned(FollowUp(), out, batch)
    close(loss, torch.tensor(0.0), atol=1e-12, rtol=0)
    close(slope, torch.tensor([[-0.0555556, 0.1777778, -0.1222222]]), atol=1e-7, rtol=0)


def test_the_clipped_online_loss_by_hand():
    """Ratios 1.3, 0.7 and 1.1 at clips of 0.2."""
    moved = (torch.tensor(LOGP) + torch.tensor([1.3, 0.7, 1.1]).log()).tolist()
    loss, slope = learned(FollowUp(), *reply(logp=moved))
    close(loss, torch.tensor(-0.0588889), atol=1e-7, rtol=0)
    assert slope[0, 0] == slope[0, 1] == 0 and slope[0, 2] < 0


def test_raw_credit_sums_to_the_log_ratio_of_the_reply_and_centred_credit_to_0():
    _, batch = toy_batch()
    raw, centred = FollowUp().credit(offline(batch)).advantage, FollowUp().credit(batch).advantage
    whole = ((batch.teacher_logp - batch.proximal_logp) * batch.action_mask).sum(1)
    close(raw.sum(1), whole)
    close(centred.sum(1), torch.zeros(len(batch)))
    assert whole.abs().max() > 0.1 and not raw.requires_grad


def test_the_offline_gradient_scales_with_the_credit():
    out, batch = reply(online=False)
    thrice = batch.replace(teacher_logp=batch.proximal_logp + 3 * (batch.teacher_logp - batch.proximal_logp))
    close(learned(FollowUp(skip=0), out, thrice)[1], 3 * learned(FollowUp(skip=0), out, batch)[1])


@pytest.mark.parametrize(("skip", "counted"), [(0, [1, 1, 1]), (1, [0, 1, 1]), (2, [0, 0, 1]), (3, [0, 0, 0])])
def test_on_data_the_first_tokens_do_not_count_and_the_last_one_does(skip, counted):
    out, batch = reply(online=False)
    close(FollowUp(skip=skip).weights(batch), torch.tensor([counted]) / max(sum(counted), 1))
    slope = learned(FollowUp(skip=skip), out, batch)[1]
    assert ((slope != 0) == torch.tensor([counted]).bool()).all()
    close(FollowUp(skip=skip).weights(reply()[1]), torch.full((1, 3), 1 / 3))


def test_two_tokens_are_skipped_unless_it_is_said_otherwise():
    _, batch = reply(online=False)
    close(FollowUp().weights(batch), torch.tensor([[0.0, 0.0, 1.0]]))


def test_the_weight_for_another_sampler_is_cut_at_2():
    """Proximal / behavior is 1.5, 1 and 4; credit (1/6, -8/15, 11/30)."""
    out, batch = reply()
    batch = batch.replace(behavior_logp=batch.proximal_logp - torch.tensor([[1.5, 1.0, 4.0]]).log())
    loss = FollowUp().loss(out, batch, FollowUp().credit(batch)).values.detach()
    close(loss, torch.tensor([[-1.5 / 6, 8 / 15, -22 / 30]]))


def test_a_row_without_a_token_has_no_mean_and_does_no_harm():
    _, batch = reply()
    empty = batch.replace(action_mask=torch.zeros_like(batch.action_mask))
    assert (FollowUp().credit(empty).advantage == 0).all() and (FollowUp().weights(empty) == 0).all()


def test_a_reply_that_nobody_answered_counts_nothing_and_all_others_the_same():
    _, batch = toy_batch()
    found = FollowUp().weights(batch)
    close(found.sum(1), batch.has_teacher / batch.has_teacher.sum())
    assert (found[~batch.action_mask] == 0).all()


def test_the_gradient_goes_through_the_ordinary_prompt_alone():
    out, batch = reply(online=False)
    told = batch.replace(teacher_logp=batch.teacher_logp.clone().requires_grad_())
    loss = FollowUp().loss(out, told, FollowUp().credit(told.replace(teacher_logp=told.teacher_logp.detach())))
    assert torch.autograd.grad(loss.values.sum(), told.teacher_logp, allow_unused=True) == (None,)


# -------------------------------------------------------------------------------------------------------------- learns


def tables(weights, drawn):
    """Every row is token 0, then a reply of two tokens; the user's reaction makes the teacher prefer 1 after 0."""
    tokens = torch.cat([torch.zeros(len(drawn), 1, dtype=torch.long), drawn], 1)
    mask = torch.tensor([[False, True, True]]).expand_as(tokens)
    one = bandit(weights, torch.zeros(3), groups=len(drawn), size=1, generator=torch.Generator().manual_seed(0))
    wide = {name: None for name, value in one.tensors() if value.ndim > 1}
    wide |= {"tokens": tokens, "action_mask": mask, "turn": mask.long() - 1, "token_reward": mask * 0.0}
    batch = on_policy(weights, one.replace(length=one.length + 1, **wide))
    teacher = torch.tensor([[0.02, 0.96, 0.02], [0.3, 0.4, 0.3], [0.3, 0.4, 0.3]]).log()
    logp = teacher[tokens.roll(1, 1)].gather(-1, tokens[..., None])[..., 0] * mask
    return batch.replace(teacher_logp=logp, has_teacher=torch.ones(len(drawn), dtype=torch.bool))


@pytest.mark.parametrize("online", [True, False])
def test_it_learns_what_the_user_would_have_liked(online):
    """Online the verdict on a whole reply is centred away, so what is learned is which token of it to blame."""
    weights = torch.tensor([[1.0, -1.0, 0.0], [0.0] * 3, [0.0] * 3]).requires_grad_()
    generator, optimizer = torch.Generator().manual_seed(0), torch.optim.SGD([weights], lr=0.5)
    method = FollowUp(skip=0)
    before = weights[0].softmax(-1)[1].item()
    for _ in range(120):
        with torch.no_grad():
            first = torch.multinomial(weights[0].softmax(-1), 64, replacement=True, generator=generator)
            second = torch.multinomial(weights[first].softmax(-1), 1, generator=generator)
        batch = tables(weights, torch.cat([first[:, None], second], 1))
        weights.grad = gradient(method, weights, batch if online else offline(batch))
        optimizer.step()
    after = weights[0].softmax(-1)[1].item()
    assert before < 0.1 and after > 0.9
    if not online:
        close(weights[0].softmax(-1), torch.tensor([0.02, 0.96, 0.02]), atol=0.03, rtol=0)


# ------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"skip": -1}, "skip is -1"),
        ({"clip_high": -1.0}, "clip_high is -1.0"),
        ({"truncate": 0.0}, "truncate is 0.0"),
        ({"teacher": Teacher()}, "teacher reads nothing"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        FollowUp(**settings)


def test_it_asks_for_no_rollouts_so_that_it_can_learn_from_data():
    assert FollowUp().needs.sampling == set() and FollowUp().teacher.reads == ("follow_up",)
