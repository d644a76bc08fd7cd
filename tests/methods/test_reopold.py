"""The paper's own code is not public; numbers are worked out from arXiv:2603.11137's equations."""

import math
from dataclasses import replace

import pytest
import torch

from taught import P, Q, descend, expected_gradient, replies, slopes
from toy import forward, gradient, on_policy, toy_batch
from tropism.errors import ConfigError
from tropism.maths.divergence import reverse_kl
from tropism.methods.opd import OPD
from tropism.methods.reopold import REOPOLD

close = torch.testing.assert_close
FIRST, SECOND = {"switch": 1.0}, {"switch": 0.0}
GAP, ENTROPY = [0.5, -0.1, -1.0, -2.3, -5.0, 0.0], [0.1, 1.2, 0.6, 0.05, 0.9, 0.3]


def floor(share):
    """What a target with this share of the student in it bounds the reward by."""
    return math.log(share) / (1 - share)


def example(gap=GAP, entropy=ENTROPY, **fields):
    student = [-3.0] * len(gap)
    return replies([student], [[a + b for a, b in zip(student, gap, strict=True)]], entropy=[entropy], **fields)


def objective(method, out, batch):
    return (method.loss(out, batch, method.credit(batch)).values * method.weights(batch)).sum()


# ------------------------------------------------------------------------------------------------------------ identity


def test_without_floor_selection_and_first_phase_it_is_opd():
    weights, batch = toy_batch()
    fresh = on_policy(weights, batch)
    method = REOPOLD(reward_floor=-math.inf, keep=1.0, switch=0.0)
    close(gradient(method, weights, fresh), gradient(OPD(), weights, fresh))
    close(gradient(method, weights, batch), gradient(OPD(clip_low=math.inf, clip_high=math.inf), weights, batch))
    assert (gradient(method, weights, batch) - gradient(OPD(), weights, batch)).abs().max() > 1e-3
    for settings in ({"reward_floor": -1.0}, {"keep": 0.5}, {"switch": 1.0, "reward_floor": -1.0}):
        other = gradient(replace(method, **settings), weights, fresh)
        assert (other - gradient(OPD(), weights, fresh)).abs().max() > 1e-3


@pytest.mark.parametrize("phase", [FIRST, SECOND])
def test_a_teacher_that_is_the_student_teaches_nothing_and_drops_nothing_at_first(phase):
    weights, batch = toy_batch()
    fresh = on_policy(weights, batch)
    same = fresh.replace(teacher_logp=fresh.proximal_logp, has_teacher=fresh.has_teacher | True)
    assert (gradient(REOPOLD(**phase), weights, same) == 0).all()
    assert ((REOPOLD(**FIRST).weights(same) > 0) == same.action_mask).all()


# ----------------------------------------------------------------------------------------------------------- direction


@pytest.mark.parametrize("phase", [FIRST, SECOND])
def test_one_step_makes_likelier_what_the_teacher_finds_likelier(phase):
    out, batch = replies([[-1.0, -1.0, -1.0]], [[-0.5, -1.0, -2.0]])
    slope = slopes(REOPOLD(keep=1.0, **phase), out, batch)[0]
    assert slope[0] < 0 == slope[1] < slope[2]


@pytest.mark.parametrize("phase", [FIRST, SECOND])
def test_one_step_brings_the_student_closer_to_the_teacher(phase):
    after = (P.log() - 0.1 * expected_gradient(REOPOLD(**phase), P.log(), Q)).log_softmax(-1)
    assert reverse_kl(after, Q.log()) < reverse_kl(P.log(), Q.log())


# --------------------------------------------------------------------------------------------------------- closed form


@pytest.mark.parametrize(("share", "number"), [(0.1, -2.558), (0.2, -2.012), (0.3, -1.720), (0.5, -1.386)])
def test_a_hopeless_token_costs_the_floor_and_no_more(share, number):
    """log(m + (1 - m) e^R) >= (1 - m) R, with a limit of log m: hence the floor log(m) / (1 - m)."""
    _, batch = example([-50.0, number + 0.01], [1.0, 1.0])
    advantage = REOPOLD(reward_floor=floor(share)).credit(batch).advantage
    close(advantage, torch.tensor([[number, number + 0.01]]), atol=5e-4, rtol=0)
    gap = torch.linspace(-60, 3, 200)
    assert (torch.logaddexp(torch.tensor(math.log(share)), math.log(1 - share) + gap) >= (1 - share) * gap).all()


@pytest.mark.parametrize(
    ("share", "rewards", "kept", "first", "second"),
    [
        (0.1, [0.5, -0.1, -1.0, -2.3, -2.558428, 0.0], [1, 1, 1, 1, 0, 1], 0.58, 1.219476),
        (0.3, [0.5, -0.1, -1.0, -1.719961, -1.719961, 0.0], [1, 1, 1, 0, 0, 1], 0.15, 0.939987),
    ],
)
def test_both_phases_by_hand(share, rewards, kept, first, second):
    """Six tokens; the second phase keeps half of them, those above the entropy 0.45, and divides by their number."""
    out, batch = example()
    early = REOPOLD(reward_floor=floor(share), keep=0.5, **FIRST)
    late = replace(early, **SECOND)
    close(early.credit(batch).advantage, torch.tensor([rewards]), atol=1e-6, rtol=0)
    close(early.weights(batch), torch.tensor([kept]) / sum(kept))
    close(late.weights(batch), torch.tensor([[0.0, 1.0, 1.0, 0.0, 1.0, 0.0]]) / 3)
    close(objective(early, out, batch), torch.tensor(first), atol=1e-6, rtol=0)
    close(objective(late, out, batch), torch.tensor(second), atol=1e-6, rtol=0)
    halved = (late.loss(out, batch, late.credit(batch)).values * (late.weights(batch) > 0)).mean()
    close(halved, torch.tensor(second / 2), atol=1e-6, rtol=0)  # what dividing by all tokens would give


def test_the_reward_is_never_below_what_it_is_and_equal_above_the_floor():
    _, batch = toy_batch()
    gap = batch.teacher_logp - batch.proximal_logp
    found = REOPOLD(reward_floor=-1.0).credit(batch).advantage
    assert (found >= gap).all() and (found == gap)[gap >= -1].all() and (found > gap).any()


def test_at_first_every_token_that_is_kept_has_its_own_reward():
    _, batch = toy_batch()
    method = REOPOLD(reward_floor=-1.0, **FIRST)
    gap, kept = batch.teacher_logp - batch.proximal_logp, method.weights(batch) > 0
    taught = batch.action_mask & batch.has_teacher[:, None]
    assert (kept == (taught & (gap >= -1))).all() and 0 < kept.sum() < taught.sum()
    assert (method.credit(batch).advantage == gap)[kept].all()


@pytest.mark.parametrize(("keep", "number"), [(0.2, 5), (0.5, 12), (1.0, 24), (0.01, 1)])
def test_the_share_that_is_kept(keep, number):
    """Of 24 tokens, the least certain; padding and rows without a teacher do not enter the quantile."""
    entropy = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    _, batch = replies(entropy * 0 - 1, entropy * 0 - 2, entropy=entropy)
    kept = REOPOLD(keep=keep, **SECOND).weights(batch) > 0
    assert kept.sum() == number
    assert entropy[kept].min() > entropy[~kept].max() if number < 24 else kept.all()
    far = [[*row, *[9.0] * 3] for row in entropy.tolist()]
    _, wide = replies([[-1.0] * 9] * 6, [[-2.0] * 9] * 6, entropy=[*far, [9.0] * 9, [9.0] * 9])
    mask = torch.arange(9) < torch.tensor([[6], [6], [6], [6], [9], [9]])
    wide = wide.replace(action_mask=mask, has_teacher=torch.tensor([True] * 4 + [False] * 2))
    assert (REOPOLD(keep=keep, **SECOND).weights(wide)[:4, :6] > 0).equal(kept)


def test_equal_entropies_are_all_kept():
    _, batch = example(entropy=[0.5] * 6)
    assert (REOPOLD(keep=0.2, **SECOND).weights(batch) > 0).all()


def test_the_quantile_is_that_of_the_optimizer_step():
    """Weights are asked of a mini-batch, so each keeps its share; the certain half of a batch is not left out of it."""
    entropy = torch.rand(8, 5, generator=torch.Generator().manual_seed(0)).sort(0).values
    _, batch = replies(entropy * 0 - 1, entropy * 0 - 2, entropy=entropy)
    for rows in (slice(0, 4), slice(4, 8)):
        weights = REOPOLD(keep=0.25, **SECOND).weights(batch[rows])
        assert (weights > 0).sum() == 5 and weights.sum() == pytest.approx(1)


@pytest.mark.parametrize(("step", "phase"), [(0, FIRST), (2, FIRST), (3, SECOND), (29, SECOND)])
def test_the_second_phase_begins_after_its_share_of_the_run(step, phase):
    """At step 3 of 30 for switch = 0.1; nothing but the tokens that count changes there."""
    _, batch = toy_batch()
    batch = batch.replace(step=step, steps=30)
    method = REOPOLD(switch=0.1, reward_floor=-1.0)
    other = FIRST if phase is SECOND else SECOND
    assert method.weights(batch).equal(replace(method, **phase).weights(batch))
    assert not method.weights(batch).equal(replace(method, **other).weights(batch))
    assert method.credit(batch).advantage.equal(replace(method, **other).credit(batch).advantage)


def test_unless_told_otherwise_half_of_the_run_selects_by_reward_and_then_a_fifth_by_entropy():
    _, batch = example([*[-1.0] * 9, -2.0, -2.5], [0.1 * n for n in range(11)], step=4, steps=10)
    assert (REOPOLD().weights(batch) > 0).tolist() == [[True] * 10 + [False]]
    assert (REOPOLD().weights(batch.replace(step=5)) > 0).tolist() == [[False] * 8 + [True] * 3]


def test_the_expected_gradient_by_hand():
    """Student (.5, .3, .2), teacher (.001, .799, .2): unbounded, bounded, and with the hopeless token dropped."""
    teacher = torch.tensor([0.001, 0.799, 0.2])
    free = REOPOLD(reward_floor=-math.inf, **SECOND)
    bounded, dropped = replace(free, reward_floor=floor(0.1)), REOPOLD(reward_floor=floor(0.1), **FIRST)
    for method, ascent in (
        (free, [-1.700589, 1.137903, 0.562686]),
        (bounded, [-0.786544, 0.589476, 0.197068]),
        (dropped, [-0.146937, 0.205711, -0.058775]),
    ):
        close(-expected_gradient(method, P.log(), teacher), torch.tensor(ascent), atol=1e-6, rtol=0)


def test_neither_reward_nor_mask_carries_gradient():
    """An entropy with gradient would be an entropy bonus. At ratio 1 the slope is -credit / kept, and nothing else."""
    out, batch = example()
    method = REOPOLD(keep=0.5, **SECOND)
    close(slopes(method, out, batch), torch.tensor([[0.0, 0.1, 1.0, 0.0, 2.0, 0.0]]) / 3)
    _, batch = toy_batch()
    assert not method.weights(batch).requires_grad and not method.credit(batch).advantage.requires_grad


def test_the_ratio_is_not_clipped_and_the_sampler_is_corrected_for():
    """Ratio 4 with credit 1 counts 4 times, 2 where the sampler was 10 times less sure."""
    out, batch = replies([[-1.0, -1.0]], [[0.0, 0.0]], behavior=[[-1.0, -1.0 - math.log(10)]])
    ahead = replace(out, logp=out.logp + math.log(4.0))
    loss = REOPOLD().loss(ahead, batch, REOPOLD().credit(batch))
    close(loss.values.detach(), torch.tensor([[-4.0, -8.0]]))


@pytest.mark.parametrize("phase", [FIRST, SECOND])
def test_a_row_without_a_teacher_neither_trains_nor_counts(phase):
    weights, batch = toy_batch()
    method = REOPOLD(**phase)
    close(gradient(method, weights, batch), gradient(method, weights, batch[batch.has_teacher]))
    nobody = batch.replace(has_teacher=batch.has_teacher & False)
    assert (method.weights(nobody) == 0).all() and (gradient(method, weights, nobody) == 0).all()


def test_a_hopeless_student_moves_nothing_at_first_and_without_a_nan():
    out, batch = example([-5.0] * 6)
    assert (REOPOLD(**FIRST).weights(batch) == 0).all() and (slopes(REOPOLD(**FIRST), out, batch) == 0).all()
    empty = batch[torch.zeros(1, dtype=torch.bool)]
    assert REOPOLD(**SECOND).weights(empty).shape == (0, 6)


# -------------------------------------------------------------------------------------------------------------- learns


def test_it_becomes_the_teacher_for_a_floor_moves_no_optimum():
    close(descend(REOPOLD(reward_floor=-0.5, **SECOND), P.log(), Q), Q, atol=1e-4, rtol=0)
    close(descend(REOPOLD(reward_floor=-2.0, **FIRST), P.log(), Q), Q, atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward_floor": 0.0}, r"reward_floor is 0\.0, but then no token is ever discouraged"),
        ({"keep": 0.0}, r"keep is 0\.0, but it is a share of the tokens"),
        ({"keep": 1.5}, r"keep is 1\.5"),
        ({"switch": -0.1}, r"switch is -0\.1, but it is a share of the run"),
        ({"switch": 1.5}, r"switch is 1\.5"),
        ({"truncate": 0}, "truncate is 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        REOPOLD(**settings)


def test_it_runs_on_what_the_forward_pass_gives():
    weights, batch = toy_batch()
    method = REOPOLD()
    assert method.loss(forward(weights, batch), batch, method.credit(batch)).metrics["ratio"].isfinite().all()
    assert "proximal_entropy" in method.needs.measured
