import math
from types import SimpleNamespace

import pytest
import torch

from tropism.maths import evidence
from tropism.maths.advantage import leave_one_out

close = torch.testing.assert_close
OUTCOME = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
SAID = [0.3, -0.3, 0.0, 0.1]
BAYES = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0])


def ids(*numbers):
    return torch.tensor(numbers)


def read(fit, *, said=SAID, expected=0.4, outcome=1.0, told=True):
    """One answer, a token for each number in `said`."""
    words = torch.tensor([said]).double()
    mask = torch.ones_like(words, dtype=torch.bool)
    one = torch.ones(1).double()
    return evidence.read(
        one * outcome, one * expected, torch.tensor([told]), words, fit.double(), mask, ids(0), mask.long() - 1
    )


def test_the_baseline_by_hand():
    """(others + 2 * 0.5) / (3 + 2)."""
    found = evidence.shrunk_baseline(OUTCOME, ids(0, 0, 0, 0), ids(0, 1, 2, 3), 0.5, shrink=1.0)
    close(found, torch.tensor([0.4, 0.6, 0.6, 0.4]))
    close(found.logit(), torch.tensor([-0.4054651, 0.4054651, 0.4054651, -0.4054651]).double(), atol=1e-7, rtol=0)


def test_the_baseline_stays_within_its_edges():
    failed = torch.zeros(4)
    for outcome, mean, edge in ((failed, 0.01, 0.02), (failed + 1, 0.99, 0.98)):
        found = evidence.shrunk_baseline(outcome, ids(0, 0, 0, 0), ids(0, 1, 2, 3), mean, shrink=1.0)
        close(found, torch.full((4,), edge))


def test_without_shrinking_the_baseline_is_leave_one_out():
    generator = torch.Generator().manual_seed(0)
    outcome = torch.rand(9, generator=generator)
    group, episode = ids(0, 0, 1, 1, 1, 2, 2, 2, 2), torch.arange(9)
    found = evidence.shrunk_baseline(outcome, group, episode, 0.3, shrink=0.0, edge=0.0)
    close(outcome - found, leave_one_out(outcome, group, episode))


def test_an_answer_s_own_outcome_is_not_in_its_baseline_and_an_episode_counts_once():
    group, episode = ids(0, 0, 0, 0), ids(0, 1, 1, 2)
    found = evidence.shrunk_baseline(torch.tensor([1.0, 1.0, 1.0, 0.0]), group, episode, 0.5, shrink=1.0)
    close(found, torch.tensor([2 / 4, 2 / 4, 2 / 4, 3 / 4]))
    other = evidence.shrunk_baseline(torch.tensor([0.0, 1.0, 1.0, 0.0]), group, episode, 0.5, shrink=1.0)
    close(other[0], found[0])
    assert other[1] < found[1]


@pytest.mark.parametrize("shrink", [0.0, 1.0])
def test_alone_an_answer_is_expected_to_do_as_earlier_ones_did(shrink):
    close(evidence.shrunk_baseline(OUTCOME, torch.arange(4), torch.arange(4), 0.3, shrink=shrink), OUTCOME * 0 + 0.3)


# ------------------------------------------------------------------------------------------------------ along an answer


def test_evidence_adds_up_in_the_order_of_turns_across_rows():
    """One answer on rows 2 and 0, another on row 1; what stands off the mask is not heard."""
    values = torch.tensor([[9.0, 4.0, 8.0], [5.0, 6.0, 9.0], [1.0, 9.0, 2.0]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 0], [1, 0, 1]]).bool()
    turn = ids([-1, 2, 2], [0, 0, -1], [0, -1, 1])
    found = evidence.running_sum(values, mask, ids(7, 3, 7), turn)
    close(found, torch.tensor([[0.0, 7.0, 15.0], [5.0, 11.0, 0.0], [1.0, 0.0, 3.0]]))
    values[~mask] = math.nan
    close(evidence.running_sum(values, mask, ids(7, 3, 7), turn), found)


@pytest.mark.parametrize(("length", "quarters"), [(1, (0, 2)), (4, (0, 0, 1, 2, 3)), (8, (0, 0, 0, 1, 1, 2, 2, 3, 3))])
def test_the_quarters_of_an_answer_by_hand(length, quarters):
    number = torch.arange(length + 1.0)
    found = evidence.features(number * 0 + 0.7, number, number * 0 + length)
    close(found[:, 0], number * 0 + 0.7)
    assert found[:, 1:].argmax(-1).tolist() == list(quarters) and (found[:, 1:].sum(-1) == 1).all()


@pytest.mark.parametrize(
    ("expected", "outcome", "values"),
    [
        (0.4, 1.0, [0.4, 0.4736581, 0.4, 0.4, 0.424222]),
        (0.6, 0.0, [0.6, 0.6693983, 0.6, 0.6, 0.6237428]),
    ],
)
def test_the_value_of_what_was_said_so_far_by_hand(expected, outcome, values):
    seen = read(BAYES, expected=expected, outcome=outcome)
    wanted = torch.tensor([values]).double()
    close(seen.value, wanted[:, 1:], atol=1e-7, rtol=0)
    close(seen.before, wanted[:, :-1], atol=1e-7, rtol=0)
    assert seen.last.tolist() == [[False, False, False, True]]
    close(seen.share, torch.full((1, 4), 0.25).double())


def test_slope_and_intercepts_by_hand():
    seen = read(torch.tensor([2, 0, 0.1, -0.1, 0.2]))
    close(seen.value, torch.tensor([[0.5484809, 0.424222, 0.3762572, 0.4986337]]).double(), atol=1e-7, rtol=0)
    close(seen.before, torch.tensor([[0.4, 0.5484809, 0.424222, 0.3762572]]).double(), atol=1e-7, rtol=0)
    first = read(torch.tensor([0.0, 1.0, 0, 0, 0]))  # an intercept in the first quarter is no reason to move V_0
    close(first.before[0, 0], torch.tensor(0.4).double())


def test_where_not_all_was_told_the_value_is_the_baseline():
    seen = read(torch.tensor([2, 0.3, 0.1, -0.1, 0.2]), told=False)
    close(seen.value, torch.full((1, 4), 0.4).double())
    close(seen.before, torch.full((1, 4), 0.4).double())
    assert (seen.words == 0).all()


def test_what_is_not_the_policy_s_is_neither_heard_nor_the_end_of_an_answer():
    """An answer of two tokens among others' words, one of one token, and a row on which the policy wrote nothing."""
    mask = torch.tensor([[0, 1, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]]).bool()
    words, rows = torch.full((3, 4), 0.7), ids(0, 1, 2)
    seen = evidence.read(rows / 2, rows / 4 + 0.1, rows < 3, words, BAYES, mask, rows, mask.long() - 1)
    close(seen.words, 0.7 * mask)
    assert seen.last.nonzero().tolist() == [[0, 3], [1, 1]]
    close(seen.share, mask * torch.tensor([[0.5], [1.0], [0.0]]))
    close(seen.value[0, [1, 3]].logit(), torch.tensor(0.1).logit() + torch.tensor([0.7, 1.4]))


@pytest.mark.parametrize(("right", "wrong", "after"), [(0.8, 0.4, 0.4), (0.2, 0.6, 0.1)])
def test_for_a_teacher_that_knows_the_outcome_it_is_bayes_rule(right, wrong, after):
    """Prior 0.25, P(y | success) = right, P(y | failure) = wrong."""
    assert 0.25 * right / (0.25 * right + 0.75 * wrong) == pytest.approx(after)
    seen = read(BAYES, said=[math.log(right / wrong)], expected=0.25)
    close(seen.value, torch.tensor([[after]]).double())


@pytest.mark.parametrize(
    ("expected", "outcome", "mix", "credit"),
    [
        (0.4, 1.0, 1.0, [0.6, 0.5263419, 0.6, 0.6]),
        (0.4, 1.0, 0.5, [0.3368291, 0.2263419, 0.3, 0.312111]),
        (0.4, 1.0, 0.1, [0.1262923, -0.0136581, 0.06, 0.0817998]),
        (0.4, 1.0, 0.0, [0.0736581, -0.0736581, 0.0, 0.024222]),
        (0.6, 0.0, 1.0, [-0.6, -0.6693983, -0.6, -0.6]),
        (0.6, 0.0, 0.5, [-0.2653008, -0.3693983, -0.3, -0.2881286]),
    ],
)
def test_the_credit_by_hand(expected, outcome, mix, credit):
    seen = read(BAYES, expected=expected, outcome=outcome)
    found = evidence.blended(seen.value, seen.before, seen.outcome[:, None], torch.tensor(mix))
    close(found, torch.tensor([credit]).double(), atol=1e-7, rtol=0)


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
def test_credit_telescopes(mix):
    seen = read(torch.tensor([2, 0, 0.1, -0.1, 0.2]))
    found = evidence.blended(seen.value, seen.before, seen.outcome[:, None], torch.tensor(mix))
    rest = mix * (seen.outcome[:, None] - seen.value).sum()
    close(found.sum(), seen.value[0, -1] - seen.before[0, 0] + rest)


def test_two_steps_that_tell_as_much_have_the_variances_of_the_table():
    """V goes from 1/2 to 1/2 ± sqrt(1/8) and then to the outcome, so each step holds half the variance of R."""
    step = math.sqrt(1 / 8)
    middle = torch.tensor([0.5 + step, 0.5 + step, 0.5 - step, 0.5 - step])
    outcome = torch.tensor([1.0, 0.0, 1.0, 0.0])
    chance = 0.5 * torch.where(outcome > 0, middle, 1 - middle)
    after, before = torch.stack([middle, outcome], 1), torch.stack([middle * 0 + 0.5, middle], 1)
    for mix, variance in ((1.0, 1.5), (0.0, 1.0)):
        credit = evidence.blended(after, before, outcome[:, None], torch.tensor(mix))
        close((chance @ credit), torch.zeros(2))
        close((chance @ credit.square()).sum(), torch.tensor(variance * 0.25))
    flat = evidence.blended(after * 0 + 0.5, before * 0 + 0.5, outcome[:, None], torch.tensor(1.0))
    close((chance @ flat.square()).sum(), torch.tensor(2 * 0.25))


def planted(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 2, generator=generator).double()
    offset = torch.randn(count, generator=generator).double()
    chance = (offset + x @ torch.tensor([1.5, -0.5]).double()).sigmoid()
    return x, (torch.rand(count, generator=generator) < chance).double(), offset


def test_the_fit_finds_what_was_planted_and_is_drawn_towards_zero():
    x, outcome, offset = planted(20000)
    ones = torch.ones_like(outcome)
    found = evidence.ridge_logistic(x, outcome, offset, ones)
    close(found, torch.tensor([1.5, -0.5]).double(), atol=0.06, rtol=0)
    drawn = evidence.ridge_logistic(x, outcome, offset, ones, ridge=1e4)
    assert (drawn.abs() < found.abs() / 2).all() and drawn[0] > 0 > drawn[1]


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_at_the_fit_the_slope_of_what_is_minimised_is_zero(scale):
    """Also where evidence is so strong that almost every outcome is explained."""
    x, outcome, offset = planted(60)
    weight = torch.linspace(0.1, 1, 60).double()
    found = evidence.ridge_logistic(scale * x, outcome, offset, weight, ridge=2.0).requires_grad_()
    z = offset + scale * x @ found
    total = (weight * torch.nn.functional.binary_cross_entropy_with_logits(z, outcome, reduction="none")).sum()
    (slope,) = torch.autograd.grad(total + found.square().sum(), found)
    assert slope.abs().max() < 1e-7


def test_a_leap_too_far_is_taken_back():
    """From p = 0.007 Newton's method leaps to where all is explained, from there back to 0, and so on for ever."""
    one = torch.ones(1)
    found = evidence.ridge_logistic(torch.tensor([[10.0]]), one, -5 * one, one)
    close(10 * (1 - (10 * found - 5).sigmoid()), 2 * found)


def test_the_fit_of_an_intercept_by_hand():
    """Three of four succeed: logit(3/4) in all, of which 0.2 is known."""
    one = torch.ones(4).double()
    found = evidence.ridge_logistic(one[:, None], torch.tensor([1.0, 1.0, 1.0, 0.0]), 0.2 * one, one, ridge=1e-12)
    close(found, torch.tensor([math.log(3) - 0.2]).double())


def test_a_row_of_weight_two_is_two_rows():
    x, outcome, offset = planted(30)
    weight = torch.arange(30).remainder(3).double()
    twice = torch.arange(30).repeat_interleave(weight.long())
    found = evidence.ridge_logistic(x[twice], outcome[twice], offset[twice], torch.ones(len(twice)))
    close(evidence.ridge_logistic(x, outcome, offset, weight), found)
    close(evidence.ridge_logistic(x, outcome, offset, weight, ridge=2.0), found)


def test_nothing_is_fitted_to_nothing():
    assert (evidence.ridge_logistic(torch.zeros(0, 5), *[torch.zeros(0)] * 3) == 0).all()


BEFORE, AFTER = 1 + 3 / 9, 0.3**2 + 3 * 0.1**2


def trust(explained):
    """Groups of one success in four: V_T is right by 0.7 and 0.1 where `explained`, else V_0."""
    before = torch.full((len(explained),), BEFORE).double()
    return evidence.skill(before, torch.where(torch.tensor(explained), AFTER, before))


@pytest.mark.parametrize(
    ("explained", "skill", "trusted"),
    [
        ([True] * 20, 0.91, 0.91),
        ([False, True] * 10, 0.455, 0.2876359),
        ([True] * 16, 0.91, 0.91),
        ([True] * 15, 0.91, 0.0),
        ([False] * 20, 0.0, 0.0),
    ],
)
def test_trust_by_hand(explained, skill, trusted):
    found = trust(explained)
    close(torch.stack(found), torch.tensor([skill, trusted]).double(), atol=1e-7, rtol=0)


def test_evidence_that_makes_errors_larger_or_has_none_to_judge_is_not_trusted():
    assert torch.stack(evidence.skill(torch.ones(20), torch.full((20,), 1.5))).tolist() == [-0.5, 0]
    assert torch.stack(evidence.skill(torch.zeros(0), torch.zeros(0))).tolist() == [0, 0]


def test_rows_are_ordered_by_what_they_say_and_none_is_lost():
    rows = torch.tensor([[1.0, 2.0], [0.0, 3.0], [1.0, 1.0], [1.0, 2.0]])
    wanted = torch.tensor([[0.0, 3.0], [1.0, 1.0], [1.0, 2.0], [1.0, 2.0]])
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        close(evidence.ordered(rows[order]), wanted)
    assert len(evidence.ordered(rows[:0])) == 0


def test_the_last_batches_are_kept():
    rows = torch.tensor([[2.0, 9.0], [3.0, 1.0], [4.0, 5.0], [4.0, 8.0], [6.0, 0.0]])
    assert evidence.batches(rows, 3)[:, 0].tolist() == [4, 4, 6]
    assert evidence.batches(rows, 10)[:, 0].tolist() == [2, 3, 4, 4, 6]
    assert len(evidence.batches(rows[:0], 3)) == 0


def test_whole_batches_are_kept_until_they_hold_enough_rows():
    rows = torch.tensor([[1.0, 5.0], [2.0, 1.0], [2.0, 4.0], [3.0, 2.0], [3.0, 6.0]])
    assert evidence.newest(rows, 2)[:, 0].tolist() == [3, 3]
    assert evidence.newest(rows, 3)[:, 0].tolist() == [2, 2, 3, 3]
    assert evidence.newest(rows, 9)[:, 0].tolist() == [1, 2, 2, 3, 3]


def some(step, past, *, groups=4, said=2.0, told=(), turned=()):
    """(Reading, group, episode) of mixed groups of four: of a success's second token the teacher says `said`, of a
    failure's the opposite. Not all was told to groups that `told` lacks; outcomes of `turned` are turned round."""
    generator = torch.Generator().manual_seed(step)
    won = torch.rand(groups, 4, generator=generator) < 0.5
    won[:, 0], won[:, 1] = True, False
    words = torch.zeros(4 * groups, 4)
    words[:, 1] = said * (2.0 * won.flatten() - 1)
    words += 0.1 * torch.randn(words.shape, generator=generator)
    for number in turned:
        won[number] = ~won[number]
    group, episode = torch.arange(groups).repeat_interleave(4), torch.arange(4 * groups)
    outcome, mask = won.flatten().double(), words < 9
    expected = evidence.shrunk_baseline(outcome, group, episode, past.get("mean", 0.5), shrink=1.0)
    known = torch.isin(group, torch.tensor(told or range(groups)))
    fit = past.get("fit", torch.zeros(5))
    return evidence.read(outcome, expected, known, words, fit, mask, episode, mask.long() - 1), group, episode


def lived(steps, **how):
    past = {}
    for step in range(steps):
        past = evidence.learned(past, step, *some(step, past, **how))
    return past


def test_what_a_batch_tells_of_the_fit_by_hand():
    """A row for every token: step, R, logit q, a fourth of an answer, evidence so far, quarters 0, 1, 2, 3."""
    rows = evidence.observations(7, read(BAYES))
    head = [7, 1, math.log(2 / 3), 1 / 4]
    wanted = [[*head, 0.0, 0, 0, 1, 0], [*head, 0.0, 0, 1, 0, 0], [*head, 0.1, 0, 0, 0, 1], [*head, 0.3, 1, 0, 0, 0]]
    close(rows, torch.tensor(wanted).double())
    assert len(evidence.observations(7, read(BAYES, told=False))) == 0
    two = read(BAYES)._replace(share=torch.tensor([[0.0, 0.5, 0.0, 0.5]]))
    assert evidence.observations(7, two)[:, 4].tolist() == [0.0, pytest.approx(0.1)]


def test_the_errors_of_a_batch_by_hand():
    """Two mixed groups, the first answer on two rows; all failed, all passed and not told all are left out."""
    outcome = torch.tensor([1.0, 1, 0, 1, 0, 0, 0, 1, 0, 1, 1])
    group = ids(0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4)
    half, last = torch.full((11,), 0.5), torch.tensor([[False, False]] + 10 * [[False, True]])
    value = torch.tensor([0.4, 0.9, 0.2, 0.5, 0.5, 0.1, 0.1, 0.9, 0.1, 0.8, 0.8])[:, None].expand(11, 2)
    seen = evidence.Reading(outcome, half, group != 3, *[half] * 3, value, half, last)
    close(evidence.errors(4, seen, group), torch.tensor([[4, 0.1**2 + 0.2**2, 0.5], [4, 0.5, 0.5]]))


def test_trust_is_earned_by_what_was_not_yet_learned_from():
    """The first batch is fitted and judges nothing; sixteen groups later there is trust."""
    first = lived(1)
    assert set(first) == {"mean", "usual", "fit", "tokens"} and len(first["tokens"]) == 64 and first["fit"][0] > 0.3
    assert lived(4)["trust"] == 0 and lived(4)["skill"] > 0.5
    past = lived(5)
    assert past["trust"] > 0.5 and len(past["groups"]) == 16
    turned = evidence.learned(lived(4), 4, *some(4, lived(4), turned=(0, 1, 2, 3)))
    assert turned["skill"] < past["skill"] - 0.3


def test_slopes_of_either_sign_are_learned_and_a_teacher_without_words_is_not_trusted():
    assert lived(6, said=-2.0)["fit"][0] < -0.5 and lived(6, said=-2.0)["trust"] > 0.5
    assert lived(6, said=0.0)["trust"] == 0


def test_the_fit_looks_back_ten_batches_and_trust_at_least_96_groups():
    past = lived(13)
    assert past["tokens"][:, 0].unique().tolist() == list(range(3, 13)) and len(past["tokens"]) == 10 * 16 * 4
    assert len(past["groups"]) == 12 * 4
    assert lived(5, groups=40)["groups"][:, 0].unique().tolist() == [2, 3, 4]


def test_the_fit_is_that_of_the_rows_that_are_kept():
    past = lived(3)
    _, outcome, offset, weight = past["tokens"][:, :4].unbind(1)
    close(past["fit"], evidence.ridge_logistic(past["tokens"][:, 4:], outcome, offset, weight))
    skill, trust = evidence.skill(past["groups"][:, 2], past["groups"][:, 1])
    close((past["skill"], past["trust"]), (skill, trust))


def test_the_mean_is_that_of_answers_and_moves_a_tenth_of_the_way():
    seen, group, episode = some(0, {})
    first = evidence.learned({}, 0, seen, group, episode)
    close(first["mean"], seen.outcome.mean())
    later = evidence.learned(first, 1, *some(1, first))
    close(later["mean"], 0.9 * first["mean"] + 0.1 * some(1, first)[0].outcome.mean())
    twice = evidence.learned({}, 0, seen, group, episode.clamp(max=14))  # the last two rows are one answer's
    close(twice["mean"], seen.outcome[:15].mean())


def test_the_usual_word_is_the_mean_of_what_was_heard_and_moves_a_tenth_of_the_way():
    seen, group, episode = some(0, {}, told=(1, 2))
    first = evidence.learned({}, 0, seen, group, episode)
    close(first["usual"], seen.words[(group == 1) | (group == 2)].abs().double().mean())
    seen, *rest = some(1, first)
    close(evidence.learned(first, 1, seen, *rest)["usual"], 0.9 * first["usual"] + 0.1 * seen.words.abs().mean())
    order = torch.arange(15, -1, -1)
    other = evidence.Reading(*(part[order] for part in seen))
    assert (
        evidence.learned(first, 1, other, *(ids[order] for ids in rest))["usual"]
        == (evidence.learned(first, 1, seen, *rest)["usual"])
    ), "to the last bit, however the rows are ordered"
    silent = some(2, first, told=(9,))
    assert evidence.learned(first, 2, *silent)["usual"] == first["usual"]
    assert "usual" not in evidence.learned({}, 0, *silent)


def test_a_salient_token_counts_more_by_hand():
    """A share of a half, the usual word being 0.175 nats; none counts more than four times the usual."""
    seen, usual = read(BAYES), {"usual": torch.tensor(0.175)}
    close(evidence.salient(seen, usual, 0.5), torch.tensor([[1.3571429, 1.3571429, 0.5, 0.7857143]]).double())
    loud = seen._replace(words=torch.tensor([[3.0, -3.0, 0.35, 0.0]]))
    close(evidence.salient(loud, usual, 1.0), torch.tensor([[4.0, 4.0, 2.0, 0.0]]))
    ones = torch.ones(1, 4).double()
    for found in (
        evidence.salient(seen, usual, 0.0),
        evidence.salient(seen, {}, 0.5),
        evidence.salient(seen, {"usual": torch.tensor(0.0)}, 0.5),
        evidence.salient(read(BAYES, told=False), usual, 0.5),
    ):
        close(found, ones)


def test_what_is_not_trusted_is_the_baseline_by_hand():
    seen, told = read(BAYES), torch.tensor([True])
    value, before, mix = evidence.trusted(seen, 0.3, 0.1)
    assert value.equal(seen.value) and before.equal(seen.before) and float(mix) == pytest.approx(0.7)
    assert float(evidence.trusted(seen, 0.95, 0.1)[2]) == pytest.approx(0.1)
    for value, before, mix in (
        evidence.trusted(seen, 0.0, 0.1),
        evidence.trusted(seen._replace(told=~told), 0.3, 0.1),
    ):
        assert (value == seen.expected).all() and (before == seen.expected).all() and float(mix) == 1


def test_nothing_is_learned_from_nothing():
    past = lived(2)
    seen, group, episode = some(2, past)
    none = evidence.Reading(*(part[:0] for part in seen))
    assert evidence.learned(past, 2, none, group[:0], episode[:0]) == past


def test_what_is_worth_watching_by_hand():
    seen, group, _ = some(2, lived(2))
    seen = seen._replace(share=seen.share * torch.tensor([0.0, 1, 1, 1]))  # as if the first were not the policy's
    found = evidence.watched(lived(2) | {"trust": torch.tensor(0.4), "skill": torch.tensor(0.6)}, seen, group)
    won = seen.outcome > 0
    assert found == {
        "gate/trust": pytest.approx(0.4),
        "gate/skill": pytest.approx(0.6),
        "gate/slope": pytest.approx(float(lived(2)["fit"][0])),
        "gate/value/success": pytest.approx(float(seen.value[won, 3].mean())),
        "gate/value/failure": pytest.approx(float(seen.value[~won, 3].mean())),
        "gate/evidence": pytest.approx(float(seen.words[:, 1:].std(correction=0))),
        "teacher/used": 1.0,
    }
    assert found["gate/value/success"] > 0.6 > 0.4 > found["gate/value/failure"]


def test_what_there_is_none_of_is_not_told():
    none = dict.fromkeys(("gate/trust", "gate/skill", "gate/slope", "teacher/used"), 0.0)
    assert evidence.watched({}, *some(0, {}, told=(9,))[:2]) == none
    seen, group, _ = some(0, {}, told=(2,))
    assert evidence.watched({}, seen, group)["teacher/used"] == 0.25
    close(evidence.watched({}, seen, group)["gate/evidence"], float(seen.words[group == 2].std(correction=0)))


def test_style_is_what_both_hints_say_in_common_of_what_was_heard():
    """Row 0: the right hint says 2 and 1 nats more than the student, the wrong one 0 and 2; row 1 was told nothing; the
    last place is no action."""
    told = SimpleNamespace(
        words=torch.tensor([[2.0, -1.0, 9.0], [5.0, 5.0, 5.0]]),
        share=torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]]),
        told=torch.tensor([True, False]),
    )
    gap = torch.tensor([[2.0, 1.0, 7.0], [4.0, 4.0, 4.0]])
    assert evidence.style(gap, told) == {"gate/style": pytest.approx((1.0 + 1.5) / 2)}
    assert evidence.style(gap[1:], SimpleNamespace(**{n: v[1:] for n, v in vars(told).items()})) == {}


def test_the_bias_of_blending_by_skill_is_bounded():
    """Weighted states of true success p, calibrated values f with E f = V_0, skill S = 1 - error(f) / error(V_0): the
    blended credit is at most S sqrt(1 - S) of the error's root away from that of the outcome alone."""
    generator, tried = torch.Generator().manual_seed(0), 0
    for _ in range(500):
        w, p, e = (
            torch.rand(8, generator=generator),
            torch.rand(8, generator=generator),
            torch.randn(8, generator=generator),
        )
        w, p, e = w.double() / w.double().sum(), p.double(), e.double()
        start = (w * p).sum()
        value = (p + 0.3 * e).clamp(0.01, 0.99)
        value = value - (w * value).sum() + start
        error = [(w * (p * (1 - v) ** 2 + (1 - p) * v**2)).sum() for v in (start, value)]
        skill = 1 - error[1] / error[0]
        if skill <= 0:
            continue
        tried += 1

        def mean(mix, p=p, value=value, start=start):
            outcomes = ((p, torch.tensor(1.0).double()), (1 - p, torch.tensor(0.0).double()))
            return sum(chance * evidence.blended(value, start, won, mix) for chance, won in outcomes)

        bias = (w * (mean(1 - skill) - mean(torch.tensor(1.0).double())).square()).sum().sqrt()
        assert bias <= skill * (1 - skill).sqrt() * error[0].sqrt() + 1e-12
    assert tried > 200
