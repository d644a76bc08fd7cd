"""A reward model against Bradley and Terry's likelihood, by hand and by what it learns."""

import math

import pytest
import torch

from pairs import F64, answers
from tropism.errors import ConfigError
from tropism.methods.reward_model import RewardModel

close = torch.testing.assert_close
ROWS = [[-1.0, -0.5], [-0.7], [-2.0], [-0.4]]


def cost(method, out, batch):
    loss = method.loss(out, batch, method.credit(batch))
    return (loss.values * method.weights(batch)).sum()


def of(scores, method=None, **fields):
    out, batch = answers(ROWS[: len(scores)], score=scores, **fields)
    return cost(method or RewardModel(), out, batch), out


@pytest.mark.parametrize(("margin", "value"), [(-2.0, 2.12693), (0.0, 0.69315), (1.0, 0.31326), (2.0, 0.12693)])
def test_the_loss_of_a_pair_by_hand(margin, value):
    close(of([margin + 7, 7.0])[0], torch.tensor(value, dtype=F64), atol=5e-6, rtol=0)


def test_a_stated_strength_must_be_won_by():
    """At strength 1 the loss of margin 1 is that of margin 0, and of margin 0 that of margin -1."""
    strength = torch.tensor([1.0, 0.0], dtype=F64)
    close(of([1.0, 0.0], reward=strength)[0], torch.tensor(math.log(2), dtype=F64))
    close(of([0.0, 0.0], reward=strength)[0], of([-1.0, 0.0])[0])


def test_smoothing_is_of_what_is_left_after_the_strength_and_is_least_at_the_log_odds():
    """At margin .5 and .1 of labels wrong: .9 log(1 + e^-.5) + .1 log(1 + e^.5); strength 1 makes it margin -.5."""
    smooth, strength = RewardModel(label_smoothing=0.1), torch.tensor([1.0, 0.0], dtype=F64)
    close(of([0.5, 0.0], smooth)[0], torch.tensor(0.524077, dtype=F64), atol=5e-7, rtol=0)
    close(of([0.5, 0.0], smooth, reward=strength)[0], torch.tensor(0.924077, dtype=F64), atol=5e-7, rtol=0)
    loss, out = of([math.log(9), 0.0], smooth)
    close(torch.autograd.grad(loss, out.last_value)[0], torch.zeros(2, dtype=F64), atol=1e-12, rtol=0)


def test_a_constant_on_the_scores_of_a_pair_changes_nothing_unless_they_are_centred():
    close(of([1.0, 0.3, 2.0, 2.5])[0], of([6.0, 5.3, -1.0, -0.5])[0])
    centred = RewardModel(center=0.01)
    close(of([1.0, 0.3], centred)[0] - of([1.0, 0.3])[0], torch.tensor(0.01 * 1.3**2, dtype=F64))
    assert of([6.0, 5.3], centred)[0] > of([0.35, -0.35], centred)[0]


def test_centring_takes_away_the_constant_that_pairs_leave_free():
    """Scores that start at 3 on average stay there without it, and end around 0 with it, in the same order."""
    ends = []
    for center in (0.0, 0.1):
        scores = torch.tensor([3.5, 2.5, 3.2, 2.8], dtype=F64, requires_grad=True)
        for _ in range(400):
            loss = torch.nn.functional.softplus(scores[1::2] - scores[::2]).mean()
            ours, out = of(scores.tolist(), RewardModel(center=center))
            (slope,) = torch.autograd.grad(ours, out.last_value)
            assert center or torch.allclose(slope, torch.autograd.grad(loss, scores)[0])
            scores = (scores - 0.5 * slope).detach().requires_grad_()
        ends.append(scores.detach())
    close(ends[0].mean(), torch.tensor(3.0, dtype=F64))
    assert abs(float(ends[1].mean())) < 1e-6 and (ends[1][::2] > ends[1][1::2]).all()


def test_exchanging_a_pair_turns_its_margin_round():
    close(of([0.3, 1.0])[0], of([1.0, 0.3])[0] + 0.7)


def test_one_step_raises_the_chosen_score_and_lowers_the_rejected_one_by_half_at_a_tie():
    loss, out = of([0.4, 0.4, 1.0, -1.0])
    (slope,) = torch.autograd.grad(loss, out.last_value)
    sure = torch.sigmoid(torch.tensor(-2.0, dtype=F64)) / 2
    close(slope, torch.stack([torch.tensor(-0.25, dtype=F64), torch.tensor(0.25, dtype=F64), -sure, sure]))


def test_no_token_s_likelihood_matters():
    loss, out = of([0.4, 0.4])
    assert torch.autograd.grad(loss, out.logp, allow_unused=True)[0] is None


def test_accuracy_and_scores_are_told_and_likelihoods_are_not():
    out, batch = answers(ROWS, score=[1.0, 0.5, 0.0, 2.0])
    told = RewardModel().loss(out, batch, RewardModel().credit(batch)).metrics
    assert {name: value[where].tolist() for name, (value, where) in told.items()} == {
        "rewards/chosen": [1.0, 0.0],
        "rewards/rejected": [0.5, 2.0],
        "rewards/margins": [0.5, -2.0],
        "rewards/accuracies": [1.0, 0.0],
    }


def test_it_recovers_a_linear_reward_and_is_as_accurate_as_the_labels_allow():
    """20,000 pairs of ten normal features, labels by Bradley and Terry: cosine above .999, accuracy near E s(|d|)."""
    generator, n = torch.Generator().manual_seed(0), 20_000
    true = torch.randn(10, generator=generator, dtype=F64)
    one, other = torch.randn(2, n, 10, generator=generator, dtype=F64)
    apart = (one - other) @ true
    won = torch.rand(n, generator=generator, dtype=F64) < torch.sigmoid(apart)
    features = torch.where(won[:, None, None], torch.stack([one, other], 1), torch.stack([other, one], 1)).flatten(0, 1)
    out, batch = answers([[0.0]] * (2 * n))
    found = torch.zeros(10, dtype=F64, requires_grad=True)
    optimizer = torch.optim.LBFGS([found], max_iter=100)

    def closure():
        optimizer.zero_grad()
        said = type(out)(logp=out.logp, entropy=out.entropy, last_value=features @ found)
        loss = cost(RewardModel(), said, batch)
        loss.backward()
        return loss

    at = torch.ones(10, dtype=F64, requires_grad=True)
    said = type(out)(logp=out.logp, entropy=out.entropy, last_value=features @ at)
    regression = torch.nn.functional.binary_cross_entropy_with_logits
    logistic = regression((features[::2] - features[1::2]) @ at, torch.ones(n, dtype=F64))
    for ours, theirs in zip(*((v, *torch.autograd.grad(v, at)) for v in (cost(RewardModel(), said, batch), logistic))):
        close(ours, theirs)
    optimizer.step(closure)
    assert torch.cosine_similarity(found, true, 0) > 0.999
    scores = (features @ found).detach()
    accuracy = float((scores[::2] > scores[1::2]).double().mean())
    assert accuracy == pytest.approx(float(torch.sigmoid(apart.abs()).mean()), abs=0.01) and accuracy < 0.95


@pytest.mark.parametrize("settings", [{"center": -0.1}, {"label_smoothing": 0.5}, {"label_smoothing": -0.1}])
def test_settings_that_cannot_work_are_refused(settings):
    with pytest.raises(ConfigError, match="RewardModel"):
        RewardModel(**settings)
