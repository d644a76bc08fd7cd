"""KTO against Ethayarajh et al. 2024, arXiv:2402.01306; z on a real model's answers to other prompts."""

import math

import pytest
import torch

from pairs import F64, answers, objective
from small import rollout, small, turn
from tropism.config import Train
from tropism.errors import ConfigError
from tropism.methods.kto import KTO
from tropism.signals.frozen import measure
from tropism.training.collate import collate

close = torch.testing.assert_close
STUDENT, REFERENCE = [[-1.0, -0.5], [-0.7], [-2.0], [-0.4]], [[-1.2, -0.6], [-0.5], [-1.5], [-0.8]]
NONE = torch.zeros(4, dtype=F64)


def s(x):
    return 1 / (1 + math.exp(-x))


def test_where_the_policy_is_its_reference_every_answer_costs_a_half():
    out, batch = answers(STUDENT, mismatch=NONE)
    close(objective(KTO(), out, batch), torch.tensor(0.5, dtype=F64))
    close(objective(KTO(desirable_weight=1.0, undesirable_weight=0.5), out, batch), torch.tensor(0.375, dtype=F64))


def test_the_loss_by_hand():
    """Log-ratios .3, -.2, -.5, .4; z is the mean of the mismatched ones, .25. Eq. 8."""
    mismatch = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=F64)
    out, batch = answers(STUDENT, REFERENCE, mismatch=mismatch)
    wanted = [
        1 - s(0.5 * (0.3 - 0.25)),
        1 - s(0.5 * (0.25 + 0.2)),
        1 - s(0.5 * (-0.5 - 0.25)),
        1 - s(0.5 * (0.25 - 0.4)),
    ]
    close(objective(KTO(beta=0.5), out, batch), torch.tensor(sum(wanted) / 4, dtype=F64))


def test_the_drift_is_never_below_zero_and_the_same_for_all():
    _, batch = answers(STUDENT, mismatch=torch.tensor([-3.0, -1.0, 1.0, 0.0], dtype=F64))
    assert (KTO().credit(batch).advantage == 0).all() and KTO().credit(batch).metrics == {"kto/drift": 0.0}
    _, batch = answers(STUDENT, mismatch=torch.tensor([3.0, -1.0, 1.0, 1.0], dtype=F64))
    close(KTO().credit(batch).advantage, batch.action_mask.double())


def test_one_step_makes_desirable_answers_likelier_and_the_others_less_likely():
    out, batch = answers(STUDENT, mismatch=NONE)
    (slope,) = torch.autograd.grad(objective(KTO(), out, batch), out.logp)
    assert (slope[::2][batch.action_mask[::2]] < 0).all() and (slope[1::2][batch.action_mask[1::2]] > 0).all()


def test_rewards_are_told_of_desirable_answers_and_of_the_others():
    """0.1 times log-ratios .3, -.2, -.5, .4, each on its answer's last token."""
    out, batch = answers(STUDENT, REFERENCE, mismatch=NONE)
    told = KTO().loss(out, batch, KTO().credit(batch)).metrics
    for name, wanted in (("desirable", [0.03, -0.05]), ("undesirable", [-0.02, 0.04])):
        value, where = told[f"rewards/{name}"]
        close(value[where], torch.tensor(wanted, dtype=F64))


def test_answers_need_no_partner():
    """Log-ratios .3, -.2, -.5, of which the last is not wanted, at beta .1."""
    marks = {"group": torch.arange(3), "success": torch.tensor([True, True, False])}
    out, batch = answers(STUDENT[:3], REFERENCE[:3], mismatch=NONE[:3], **marks)
    wanted = (1 - s(0.03) + 1 - s(-0.02) + 1 - s(0.05)) / 3
    close(objective(KTO(), out, batch), torch.tensor(wanted, dtype=F64))


def test_it_learns_which_answers_are_desirable():
    """Four answers, two of them desirable three times in four, the others one time in four."""
    generator, good = torch.Generator().manual_seed(0), torch.tensor([0.75, 0.25, 0.75, 0.25])
    logits = torch.zeros(4, dtype=F64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], 0.02)
    for _ in range(300):
        drawn = torch.randint(4, (32,), generator=generator)
        success = torch.rand(32, generator=generator) < good[drawn]
        out, batch = answers([[0.0]] * 32, [[math.log(0.25)]] * 32)
        batch = batch.replace(success=success, group=torch.arange(32), mismatch=torch.zeros(32, dtype=F64))
        said = torch.stack([torch.zeros(32, dtype=F64), logits.log_softmax(0)[drawn]], 1)
        optimizer.zero_grad()
        objective(KTO(beta=0.5), type(out)(logp=said, entropy=said), batch).backward()
        optimizer.step()
    assert logits.softmax(0)[[0, 2]].sum() > 0.9


def test_the_mismatch_is_that_of_the_answer_before_after_this_prompt():
    """A real model and another as reference; the same numbers from a batch of the swapped rows, written by hand."""
    policy, other = small(seed=0), small(seed=1)
    prompts, replies = [[5, 6, 7], [8], [9, 10]], [[11, 12], [13, 14, 15], [16]]

    def batch_of(order):
        made = [
            rollout(turn(p, replies[k], sampled=False), group=n)
            for n, (p, k) in enumerate(zip(prompts, order, strict=True))
        ]
        return collate(made, codes={})

    forwards = [model.measuring(1.0, Train()) for model in (policy, other)]
    found = measure(batch_of([0, 1, 2]), KTO().needs, policy=forwards[0], exact=False, reference=forwards[1]).mismatch
    swapped = batch_of([2, 0, 1])
    own, theirs = (forward(swapped).logp * swapped.action_mask for forward in forwards)
    close(found, (own - theirs).sum(1))
    assert found.abs().min() > 1e-3


def test_answers_of_one_kind_alone_may_count():
    out, batch = answers(STUDENT, REFERENCE, mismatch=NONE)
    one, other = (KTO(**{f"{kind}desirable_weight": 0.0}) for kind in ("", "un"))
    close(objective(one, out, batch) + objective(other, out, batch), objective(KTO(), out, batch))


@pytest.mark.parametrize(
    "settings", [{"beta": 0.0}, {"desirable_weight": -0.5}, {"desirable_weight": 0.0, "undesirable_weight": 0.0}]
)
def test_settings_that_cannot_work_are_refused(settings):
    with pytest.raises(ConfigError, match="KTO"):
        KTO(**settings)


def test_an_answer_that_does_not_fit_behind_another_prompt_is_read_as_far_as_it_does():
    """A model of learned positions cannot read on."""
    one, other = (small("tiny-gpt2", seed, {"n_positions": 8}) for seed in (0, 1))
    forward, reference = (policy.measuring(1.0, Train()) for policy in (one, other))
    rows = [rollout(turn([1, 2, 3, 4, 5, 6], [7, 8]), group=0), rollout(turn([1], [9, 10, 11, 12]), group=1)]
    batch = collate(rows, codes={})
    found = measure(batch, KTO().needs, policy=forward, exact=False, reference=reference, context=8).mismatch
    cut = collate([rollout(turn([1, 2, 3, 4, 5, 6], [9, 10])), rollout(turn([1], [7, 8]))], codes={})
    wanted = ((forward(cut).logp - reference(cut).logp) * cut.action_mask).sum(1)
    close(found, wanted, atol=1e-5, rtol=0)
