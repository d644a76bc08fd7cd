"""SimPO against Meng et al. 2024, arXiv:2405.14734."""

import pytest
import torch

from pairs import F64, answers, objective
from tropism.errors import ConfigError
from tropism.methods.simpo import SimPO

close = torch.testing.assert_close


def test_the_loss_by_hand():
    """Mean log-probabilities -.5 and -.7, beta 2.5, gap 1.375: margin -.875. Eq. 6."""
    out, batch = answers([[-0.4, -0.6], [-0.7]])
    close(objective(SimPO(), out, batch), torch.tensor(1.223445, dtype=F64), atol=5e-7, rtol=0)


def test_an_answer_said_twice_as_long_is_worth_the_same():
    out, batch = answers([[-0.4, -0.6], [-0.7]])
    twice, other = answers([[-0.4, -0.6] * 2, [-0.7, -0.7]])
    close(objective(SimPO(), out, batch), objective(SimPO(), twice, other))


def test_without_a_gap_equal_answers_are_log_two():
    out, batch = answers([[-0.5], [-0.5, -0.5]])
    close(objective(SimPO(gap=0.0), out, batch), torch.tensor(2.0, dtype=F64).log())


def test_one_step_makes_the_chosen_answer_likelier_and_a_token_of_a_long_one_moves_less():
    out, batch = answers([[-0.5], [-0.5, -0.5, -0.5, -0.5]])
    (slope,) = torch.autograd.grad(objective(SimPO(), out, batch), out.logp)
    assert slope[0, 1] < 0 and (slope[1, 1:] > 0).all()
    close(slope[1, 1:], -slope[0, 1].expand(4) / 4)


def test_it_needs_no_reference():
    out, batch = answers([[-0.4, -0.6], [-0.7]])
    close(objective(SimPO(), out, batch.replace(reference_logp=None)), objective(SimPO(), out, batch))
    assert not SimPO().needs.measured and SimPO().needs.data == {"pairs"}


def test_it_learns_to_keep_the_gap():
    """One pair, two answers of one token: the margin passes the gap, and goes on more and more slowly."""
    logits = torch.zeros(2, dtype=F64, requires_grad=True)
    optimizer, margins = torch.optim.SGD([logits], 0.5), []
    for _ in range(200):
        logp = logits.log_softmax(0)
        out, batch = answers([[0.0], [0.0]])
        said = torch.stack([torch.zeros(2, dtype=F64), logp], 1)
        optimizer.zero_grad()
        objective(SimPO(), type(out)(logp=said, entropy=said), batch).backward()
        optimizer.step()
        margins.append(2.5 * float((logp[0] - logp[1]).detach()))
    assert margins[-1] > 1.375 and margins[-1] - margins[-50] < margins[100] - margins[50]


def test_a_small_beta_is_one():
    out, batch = answers([[-0.4, -0.6], [-0.7]])
    close(objective(SimPO(beta=0.5, gap=0.0), out, batch), torch.tensor(-0.1, dtype=F64).exp().log1p())


def test_what_the_model_says_of_other_tokens_does_not_matter():
    out, batch = answers([[-0.4, -0.6], [-0.7]])
    noisy = out.logp + (~batch.action_mask) * 3.0
    close(objective(SimPO(), type(out)(logp=noisy, entropy=out.entropy), batch), objective(SimPO(), out, batch))


@pytest.mark.parametrize("settings", [{"beta": 0.0}, {"gap": -1.0}, {"label_smoothing": 0.5}])
def test_settings_that_cannot_work_are_refused(settings):
    with pytest.raises(ConfigError, match="SimPO"):
        SimPO(**settings)
