"""DPO against Rafailov et al. 2023, arXiv:2305.18290, and its kin against their own papers."""

import math

import pytest
import torch

from pairs import F64, answers, objective, preferred
from tropism.errors import ConfigError
from tropism.methods.dpo import DPO
from tropism.methods.simpo import SimPO

close = torch.testing.assert_close
FORMS = ("sigmoid", "robust", "hinge", "ipo")
STUDENT = [[-1.0, -0.5], [-0.7], [-2.0, -0.1, -0.3], [-0.4, -0.9]]
REFERENCE = [[-1.2, -0.6], [-0.5], [-1.5, -0.3, -0.2], [-0.8, -0.8]]


def of_form(form, **settings):
    return DPO(loss_type=form, **settings, **({"label_smoothing": 0.2} if form == "robust" else {}))


def slopes(method, out, batch):
    return torch.autograd.grad(objective(method, out, batch), out.logp)[0]


# ------------------------------------------------------------------------------------------------------------ identity


@pytest.mark.parametrize("beta", [0.01, 0.1, 3.0])
def test_where_the_policy_is_its_reference_it_is_log_two_and_ipo_the_square_of_its_target(beta):
    out, batch = answers(STUDENT)
    for form, value in (("sigmoid", math.log(2)), ("robust", math.log(2)), ("hinge", 1.0), ("ipo", (0.5 / beta) ** 2)):
        close(objective(DPO(beta=beta, loss_type=form), out, batch), torch.tensor(value, dtype=F64))


def test_without_wrong_labels_robust_is_sigmoid():
    out, batch = answers(STUDENT, REFERENCE)
    close(objective(DPO(loss_type="robust"), out, batch), objective(DPO(), out, batch))


def test_under_a_uniform_reference_and_equal_lengths_it_is_simpo_without_a_gap():
    student = [row[:1] * 3 for row in STUDENT]
    out, batch = answers(student, [[math.log(0.1)] * 3] * 4)
    close(objective(DPO(beta=0.2), out, batch), objective(SimPO(beta=0.6, gap=0.0), out, batch))


# ----------------------------------------------------------------------------------------------------------- direction


@pytest.mark.parametrize("form", FORMS)
def test_one_step_makes_the_chosen_answer_likelier_and_the_rejected_one_less_likely(form):
    out, batch = answers(STUDENT)
    slope = slopes(of_form(form), out, batch)
    assert (slope[::2][batch.action_mask[::2]] < 0).all() and (slope[1::2][batch.action_mask[1::2]] > 0).all()
    assert (slope[~batch.action_mask] == 0).all()


def test_ipo_goes_back_where_the_margin_is_too_large_and_the_hinge_stops():
    out, batch = answers([[-0.1], [-9.0]], [[-5.0], [-1.0]])
    assert slopes(DPO(loss_type="ipo"), out, batch)[0, 1] > 0
    out, batch = answers([[-0.1], [-9.0]], [[-8.0], [-1.0]])
    assert (slopes(DPO(loss_type="hinge"), out, batch) == 0).all()


# --------------------------------------------------------------------------------------------------------- closed form


@pytest.mark.parametrize(
    ("form", "smoothing", "value"),
    [("sigmoid", 0.0, 0.474077), ("sigmoid", 0.1, 0.524077), ("robust", 0.1, 0.411577), ("hinge", 0.0, 0.5)],
)
def test_the_loss_of_a_margin_of_half_by_hand(form, smoothing, value):
    """log p - log q is 3 for the chosen answer and -2 for the rejected one; times beta 0.1 they differ by .5."""
    out, batch = answers([[-1.0, -1.0], [-4.0]], [[-2.0, -3.0], [-2.0]])
    method = DPO(beta=0.1, loss_type=form, label_smoothing=smoothing)
    close(objective(method, out, batch), torch.tensor(value, dtype=F64), atol=5e-7, rtol=0)


def test_the_best_policy_of_another_start_and_what_it_is_worth():
    """q = (.5, .3, .2), rewards (1, 0, .5), beta .5: q exp(r / beta) normalised is (.81410, .06611, .11980), worth
    beta log Z = .756264, and the margin of every pair is the difference of their rewards."""
    start, reward, beta = torch.tensor([0.5, 0.3, 0.2], dtype=F64), torch.tensor([1.0, 0.0, 0.5], dtype=F64), 0.5
    best = (start.log() + reward / beta).softmax(0)
    close(best, torch.tensor([0.81410, 0.06611, 0.11980], dtype=F64), atol=5e-6, rtol=0)
    worth = (best * reward).sum() - beta * (best * (best / start).log()).sum()
    close(worth, torch.tensor(0.756264, dtype=F64), atol=5e-7, rtol=0)
    for chosen, rejected in ((0, 1), (0, 2), (2, 1)):
        policy, reference = ([[float(p[n].log())] for n in (chosen, rejected)] for p in (best, start))
        expected = torch.nn.functional.softplus(reward[rejected] - reward[chosen])
        close(objective(DPO(beta=beta), *answers(policy, reference)), expected)


def test_ipo_compares_tokens_and_not_answers():
    """Mean log-ratios 1.5 and -2, target 5: (3.5 - 5)^2. Azar et al. 2023, arXiv:2310.12036, eq. 17."""
    out, batch = answers([[-1.0, -1.0], [-4.0]], [[-2.0, -3.0], [-2.0]])
    close(objective(DPO(beta=0.1, loss_type="ipo"), out, batch), torch.tensor(2.25, dtype=F64))


def test_the_gradient_is_that_of_the_paper():
    """-beta s(-m) (grad log p_c - grad log p_r), below eq. 7; a mean over two pairs."""
    out, batch = answers(STUDENT, REFERENCE)
    gain = ((out.logp - batch.reference_logp) * batch.action_mask).sum(1).detach()
    push = 0.1 * torch.sigmoid(-0.1 * (gain[::2] - gain[1::2])).repeat_interleave(2) / 2
    sign = torch.where(batch.success, -1.0, 1.0)
    close(slopes(DPO(), out, batch), (sign * push)[:, None] * batch.action_mask)


def test_every_pair_counts_the_same_however_long_its_answers():
    out, batch = answers(STUDENT, REFERENCE)
    first, second = (answers(STUDENT[k : k + 2], REFERENCE[k : k + 2]) for k in (0, 2))
    close(objective(DPO(), out, batch), (objective(DPO(), *first) + objective(DPO(), *second)) / 2)


def test_both_log_probabilities_are_told_apart():
    out, batch = answers(STUDENT, REFERENCE)
    told = DPO().loss(out, batch, DPO().credit(batch)).metrics
    value, where = told["logps/rejected"]
    close(value[where], torch.tensor([-0.7, -1.3], dtype=F64))
    value, where = told["rewards/chosen"]
    close(value[where], torch.tensor([0.03, -0.04], dtype=F64))


# -------------------------------------------------------------------------------------------------------------- learns


def test_on_bradley_and_terrys_pairs_it_reaches_the_policy_of_rl_with_a_kl_penalty():
    """200,000 pairs of three answers worth 1, 0 and .5, beta .5, uniform reference: p = exp(r / beta), normalised.

    Rafailov et al. 2023, arXiv:2305.18290, eq. 4: (.66524, .09003, .24473).
    """
    reward, beta = torch.tensor([1.0, 0.0, 0.5], dtype=F64), 0.5
    chosen, rejected = preferred(reward, 200_000, torch.Generator().manual_seed(0))
    counts = torch.zeros(3, 3, dtype=F64).index_put((chosen, rejected), torch.ones(200_000, dtype=F64), accumulate=True)
    logits = torch.zeros(3, dtype=F64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-10)
    rows = [(a, b) for a in range(3) for b in range(3) if a != b]
    method, weight = DPO(beta=beta), torch.stack([counts[pair] for pair in rows]) / 200_000

    def closure():
        optimizer.zero_grad()
        logp = logits.log_softmax(0)
        out, batch = answers([[0.0]] * 12, [[math.log(1 / 3)]] * 12)
        said = torch.stack([torch.zeros(12, dtype=F64), logp[torch.tensor(rows).flatten()]], 1)
        loss = method.loss(type(out)(logp=said, entropy=said), batch, method.credit(batch)).values
        total = (loss[::2, -1] * weight).sum()
        total.backward()
        return total

    optimizer.step(closure)
    found, exact = logits.detach().softmax(0), (reward / beta).softmax(0)
    close(exact, torch.tensor([0.66524, 0.09003, 0.24473], dtype=F64), atol=5e-6, rtol=0)
    assert (found - exact).abs().sum() / 2 < 0.005


@pytest.mark.parametrize("method", [of_form(form, beta=0.5) for form in FORMS], ids=FORMS)
def test_it_learns_who_is_preferred(method):
    """Six answers, each better than the next one: after training their order is the policy's."""
    generator, reward = torch.Generator().manual_seed(1), torch.linspace(2.0, -2.0, 6, dtype=F64)
    logits = torch.zeros(6, dtype=F64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], 0.03)
    for _ in range(300):
        pairs = torch.stack(preferred(reward, 64, generator), 1)
        pairs = pairs[pairs[:, 0] != pairs[:, 1]]
        out, batch = answers([[0.0]] * pairs.numel(), [[math.log(1 / 6)]] * pairs.numel())
        said = torch.stack([torch.zeros(pairs.numel(), dtype=F64), logits.log_softmax(0)[pairs.flatten()]], 1)
        loss = method.loss(type(out)(logp=said, entropy=said), batch, method.credit(batch))
        optimizer.zero_grad()
        (loss.values * method.weights(batch)).sum().backward()
        optimizer.step()
    assert logits.argsort(descending=True).tolist() == list(range(6))


# ------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, "beta is 0.0"),
        ({"label_smoothing": 0.5}, "below a half"),
        ({"label_smoothing": -0.1}, "below a half"),
        ({"label_smoothing": 0.1, "loss_type": "ipo"}, "ipo has none"),
        ({"label_smoothing": 0.1, "loss_type": "hinge"}, "hinge has none"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        DPO(**settings)
