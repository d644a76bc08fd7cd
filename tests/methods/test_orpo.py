"""ORPO against Hong et al. 2024, arXiv:2403.07691."""

import pytest
import torch

from pairs import F64, answers, objective
from tropism.errors import ConfigError
from tropism.maths.reduce import sequence_mean
from tropism.methods.orpo import ORPO

close = torch.testing.assert_close
STUDENT = [[-0.4, -0.6], [-0.7], [-0.2, -0.9, -1.0], [-0.3, -1.1]]


def test_the_loss_by_hand():
    """Means -.5 and -.7: log-odds .446411 apart, their loss .494648; likelihood .5, beta .1. Eq. 6."""
    out, batch = answers(STUDENT[:2])
    close(objective(ORPO(), out, batch), torch.tensor(0.549465, dtype=F64), atol=5e-7, rtol=0)


def test_without_odds_it_is_sft_on_the_chosen_answers():
    out, batch = answers(STUDENT)
    (found,) = torch.autograd.grad(objective(ORPO(beta=0.0), out, batch), out.logp)
    chosen = batch.action_mask & batch.success[:, None]
    close(found, -sequence_mean(chosen, batch.episode))


def test_one_step_makes_the_chosen_answer_likelier_and_the_rejected_one_less_likely():
    out, batch = answers(STUDENT)
    (slope,) = torch.autograd.grad(objective(ORPO(), out, batch), out.logp)
    assert (slope[::2][batch.action_mask[::2]] < 0).all() and (slope[1::2][batch.action_mask[1::2]] > 0).all()


def test_the_odds_push_a_rejected_answer_harder_the_likelier_it_is():
    pushes = []
    for logp in (-2.0, -0.5, -0.05):
        out, batch = answers([[-1.0], [logp]])
        pushes.append(float(torch.autograd.grad(objective(ORPO(), out, batch), out.logp)[0][1, 1]))
    assert 0 < pushes[0] < pushes[1] < pushes[2]


def test_it_learns_the_chosen_answer_from_a_pair_that_starts_the_other_way_round():
    logits = torch.tensor([0.0, 2.0, 1.0], dtype=F64, requires_grad=True)
    optimizer = torch.optim.SGD([logits], 0.5)
    for _ in range(200):
        out, batch = answers([[0.0], [0.0]])
        said = torch.stack([torch.zeros(2, dtype=F64), logits.log_softmax(0)[:2]], 1)
        optimizer.zero_grad()
        objective(ORPO(beta=1.0), type(out)(logp=said, entropy=said), batch).backward()
        optimizer.step()
    assert logits.softmax(0)[0] > 0.95


def test_the_reward_that_is_told_is_beta_times_the_mean_log_probability():
    """As the paper's code and others': means -.5 and -.7."""
    out, batch = answers(STUDENT[:2])
    told = ORPO(beta=0.2).loss(out, batch, ORPO().credit(batch)).metrics
    for name, wanted in (("chosen", -0.1), ("rejected", -0.14), ("margins", 0.04)):
        value, where = told[f"rewards/{name}"]
        close(value[where], torch.tensor([wanted], dtype=F64))


def test_a_negative_weight_is_refused():
    with pytest.raises(ConfigError, match="would prefer the rejected answer"):
        ORPO(beta=-0.1)
