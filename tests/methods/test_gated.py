import itertools
import math
from dataclasses import replace

import pytest
import torch

from toy import bandit, forward, gradient, on_policy, toy_batch
from tropism.errors import ConfigError
from tropism.maths.advantage import leave_one_out
from tropism.methods.gated import Gated
from tropism.methods.grpo import GRPO
from tropism.teacher import Teacher
from tropism.types import Batch

close = torch.testing.assert_close
ALONE = Gated(teacher=None)
SAID = (0.3, -0.3, 0.0, 0.1)


def answers(success=(1, 0, 0, 1), *, said=None, group=None, told=None, **changes):
    """A batch of answers of four tokens each; `said`: what the teacher says more after the right hint, [N][4]."""
    won = torch.tensor(success).bool()
    count, zeros = len(won), torch.zeros(len(won), 4)
    said = zeros + torch.tensor(SAID) if said is None else torch.as_tensor(said).to(zeros)
    numbers = torch.arange(count)
    batch = Batch(
        tokens=zeros.long(),
        length=numbers * 0 + 4,
        action_mask=zeros == 0,
        token_reward=zeros,
        turn=zeros.long(),
        reward=won.to(zeros),
        success=won,
        truncated=~won,
        group=numbers * 0 if group is None else torch.tensor(group),
        episode=numbers,
        role=numbers,
        domain=numbers,
        proximal_logp=zeros - 1,
        behavior_logp=zeros - 1,
        teacher_logp=said - 2,
        counter_logp=zeros - 2,
        has_teacher=torch.ones(count, dtype=torch.bool) if told is None else torch.tensor(told),
    )
    return batch.replace(**changes)


def knowing(trust=1.0, fit=(1.0, 0, 0, 0, 0), mean=0.5):
    """A memory in which this was learned."""
    return {"mean": torch.tensor(mean), "fit": torch.tensor(fit).double(), "trust": torch.tensor(trust)}


def credit(method, batch):
    return method.credit(batch).advantage


def noisy(batch, seed=0):
    noise = torch.randn(batch.tokens.shape, generator=torch.Generator().manual_seed(seed))
    return batch.replace(teacher_logp=batch.teacher_logp + noise)


# ------------------------------------------------------------------------------------------------------------ identity


@pytest.mark.parametrize("memory", [{}, knowing(trust=0.0, fit=(2.0, 0.3, 0.2, 0.1, 0.0))], ids=["new", "untrusted"])
def test_without_trust_it_is_reinforce_against_the_shrunk_baseline_whatever_the_teacher_says(memory):
    batch = answers(memory=memory)
    wanted = torch.tensor([0.6, -0.6, -0.6, 0.6])[:, None].expand(4, 4)
    for found in (batch, noisy(batch)):
        assert torch.equal(credit(Gated(), found), wanted)
    weights, toy = toy_batch()
    assert (credit(Gated(), toy)[~toy.action_mask] == 0).all()
    assert torch.equal(gradient(Gated(), weights, toy), gradient(ALONE, weights, noisy(toy)))
    assert (gradient(ALONE, weights, toy) - gradient(GRPO(scale="none"), weights, toy)).abs().max() > 1e-3


def test_without_trust_or_shrinking_it_is_rloo_where_siblings_differ():
    batch = answers((1, 0, 0, 1, 1, 0, 0), group=(0, 0, 0, 0, 1, 1, 1))
    rloo = leave_one_out(batch.reward, batch.group, batch.episode)[:, None].expand(7, 4)
    found = credit(Gated(shrink=0.0), batch)
    mixed = torch.tensor([True, True, True, True, False, True, True])  # the fifth's siblings all failed: q is 0.02
    close(found[mixed], rloo[mixed])
    close(found[4], torch.full((4,), 0.98))
    assert (credit(Gated(), batch)[:4] - rloo[:4]).abs().min() > 0.01


def test_without_a_gate_nothing_that_was_learned_is_used():
    batch = answers(memory=knowing())
    close(credit(Gated(gate=False), batch), credit(ALONE, batch))
    assert (credit(Gated(), batch) - credit(ALONE, batch)).abs().max() > 0.1
    assert Gated(gate=False).credit(batch).metrics == Gated().credit(batch).metrics


def test_with_floor_1_it_is_the_critic_that_does_not_know_the_token():
    """R - V_{t-1}: what is said of a token and after it changes nothing at that token."""
    batch, method = answers(memory=knowing()), Gated(floor=1.0)
    before = torch.tensor([0.4, 0.4736581, 0.4, 0.4])
    close(credit(method, batch)[0], 1 - before, atol=1e-7, rtol=0)
    for t in range(4):
        other = batch.teacher_logp.clone()
        other[:, t:] += torch.tensor([0.5, -1.0, 0.7, 2.0])[: 4 - t]
        found = credit(method, batch.replace(teacher_logp=other))
        close(found[:, : t + 1], credit(method, batch)[:, : t + 1])
        assert t == 3 or (found[:, t + 1] - credit(method, batch)[:, t + 1]).abs().min() > 0.01


def test_with_full_trust_and_floor_0_it_is_the_change_of_value():
    found = credit(Gated(floor=0.0), answers(memory=knowing()))
    close(found[0], torch.tensor([0.0736581, -0.0736581, 0.0, 0.024222]), atol=1e-7, rtol=0)
    close(found[0].sum(), torch.tensor(0.424222 - 0.4), atol=1e-7, rtol=0)


def test_an_inverted_teacher_of_inverted_slope_is_the_teacher():
    right = answers(memory=knowing(trust=0.6, fit=(1.5, 0.1, 0.2, 0.0, -0.1)))
    wrong = right.replace(
        teacher_logp=right.counter_logp,
        counter_logp=right.teacher_logp,
        memory=knowing(trust=0.6, fit=(-1.5, 0.1, 0.2, 0.0, -0.1)),
    )
    close(credit(Gated(), wrong), credit(Gated(), right))


def test_what_both_hints_change_cancels():
    batch = answers(memory=knowing())
    style = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    styled = batch.replace(teacher_logp=batch.teacher_logp + style, counter_logp=batch.counter_logp + style)
    close(credit(Gated(), styled), credit(Gated(), batch))
    bare = Gated(teacher=Teacher(reads=("answer",)))
    assert (credit(bare, styled) - credit(bare, batch)).abs().max() > 0.01


def test_against_nothing_the_teacher_is_compared_with_the_student():
    bare = Gated(teacher=Teacher(reads=("answer",)))
    assert bare.needs.measured == {"proximal_logp", "teacher_logp", "has_teacher"}
    assert Gated().needs.measured == bare.needs.measured | {"counter_logp"}
    batch = answers(memory=knowing())
    alike = batch.replace(teacher_logp=batch.proximal_logp + torch.tensor(SAID), counter_logp=None)
    close(credit(bare, alike), credit(Gated(), batch))
    assert ALONE.needs.measured == {"proximal_logp"}


def exact(method, memory, *, size=2, ends=None):
    """Gradient expected of groups of two answers of two words out of three; an answer succeeds if both are 1.

    The policy reads the last word; the teacher is the policy, but for what it adds to a word's log-probability.

    Args:
        ends: a word that ends the answer at once.
    """
    weights = torch.tensor([[0.2, -0.3, 0.0], [0.1, 0.4, 0.1], [-0.2, 0.3, -0.4]]).requires_grad_()
    leaning = torch.tensor([[-0.4, 0.6, 0.1], [0.3, -0.5, 0.2]])
    total = torch.zeros_like(weights)
    for words in itertools.product(range(3), repeat=2 * size):
        said = torch.tensor(words).reshape(size, 2)
        short = said[:, 0] == (-1 if ends is None else ends)
        if said[short, 1].any():  # what would follow is nothing, and counted once
            continue
        batch = answers((said == 1).all(1).tolist(), memory=memory).narrow(3)
        mask = torch.tensor([[False, True, True]]).expand(size, 3).clone()
        mask[short, 2] = False
        tokens = torch.cat([torch.full((size, 1), 2), said], 1)  # the first word is read, not written
        batch = batch.replace(tokens=tokens, length=1 + mask.sum(1), action_mask=mask, turn=mask.long() - 1)
        batch = on_policy(weights, batch)
        extra = torch.nn.functional.pad(leaning[torch.arange(2), said], (1, 0))
        batch = batch.replace(counter_logp=batch.proximal_logp, teacher_logp=batch.proximal_logp + extra)
        total += batch.proximal_logp.sum().exp() * gradient(method, weights, batch)
    return total


def test_the_expected_gradient_is_that_of_reinforce_at_floor_1_and_moved_by_trust_in_a_wrong_value():
    plain = exact(GRPO(scale="none"), {}) * 2  # leave-one-out is G / (G - 1) times the centred reward
    assert plain.abs().max() > 0.01
    wrong = knowing(trust=0.7, fit=(2.0, 0.5, -0.4, 0.3, 0.1))
    close(exact(ALONE, {}), plain)
    close(exact(Gated(floor=1.0), wrong), plain)
    assert (exact(Gated(floor=0.0), wrong) - plain).abs().max() > 0.01


@pytest.mark.parametrize("method", [ALONE, Gated(floor=1.0)], ids=["alone", "floor 1"])
def test_it_favours_no_length(method):
    """Answers of one word and of two, each of which counts the same: GRPO's gradient, whatever the baseline."""
    plain = 2 * exact(GRPO(scale="none"), {}, ends=2)
    for mean in (0.1, 0.9):
        close(exact(method, knowing(trust=0.7, fit=(2.0, 0.5, -0.4, 0.3, 0.1), mean=mean), ends=2), plain)


def test_without_siblings_or_where_they_are_as_long_there_is_nothing_to_free():
    close(credit(ALONE, answers((1,), memory=knowing(mean=0.25))), torch.full((1, 4), 0.75))
    short = torch.tensor([[True] * 4, [True, False, False, False]])
    found = credit(ALONE, answers((1, 0), memory=knowing(mean=0.25), action_mask=short))
    # q is (0 + 2 * 0.25) / 3 and (1 + 2 * 0.25) / 3; 4 tokens where the sibling has 1, and 1 where it has 4
    close(found[0], torch.full((4,), (1 - 0) + (0 - 1 / 6) * 4))
    close(found[1, 0], torch.tensor((0 - 1) + (1 - 1 / 2) / 4))


def test_what_the_reward_pays_beyond_success_is_credited_by_leave_one_out():
    batch = answers(memory=knowing())
    extra = torch.tensor([0.3, -0.2, 0.0, 0.5])
    more = batch.replace(reward=batch.reward + extra)
    wanted = leave_one_out(extra, batch.group, batch.episode)[:, None].expand(4, 4)
    close(credit(Gated(), more) - credit(Gated(), batch), wanted)
    close(credit(Gated(), batch.replace(reward=batch.reward * 0 + batch.success)), credit(Gated(), batch))


# ----------------------------------------------------------------------------------------------------------- direction


@pytest.mark.parametrize("memory", [{}, knowing(trust=0.5), knowing(trust=1.0)], ids=["new", "half", "full"])
def test_one_step_makes_the_lonely_success_likelier_and_the_failures_less_likely(memory):
    batch = answers((0, 1, 0, 0), said=[[0.0] * 4, [0.2] * 4, [-0.2] * 4, [0.0] * 4], memory=memory)
    found = credit(Gated(), batch)
    assert (found[1] > 0).all() and (found[[0, 2, 3]] < 0).all()


def test_the_token_that_the_teacher_holds_for_right_gets_most_of_the_credit():
    found = credit(Gated(), answers(said=[[0.0, 2.0, 0.0, 0.0]] * 4, memory=knowing(trust=0.9)))
    assert found[0].argmax() == 1 and found[1].argmax() == 1
    turned = credit(
        Gated(), answers(said=[[0.0, 2.0, 0.0, 0.0]] * 4, memory=knowing(trust=0.9, fit=(-1.0, 0, 0, 0, 0)))
    )
    assert turned[0].argmin() == 1 and turned[1].argmin() == 1


def test_a_group_that_all_failed_or_all_passed_is_not_silent():
    """q is (0 + 2 * 0.25) / 5 = 0.1 in the first and (3 + 2 * 0.5) / 5 = 0.8 in the second."""
    close(credit(Gated(), answers((0, 0, 0, 0), memory=knowing(0.0, mean=0.25))), torch.full((4, 4), -0.1))
    close(credit(Gated(), answers((1, 1, 1, 1), memory=knowing(0.0, mean=0.5))), torch.full((4, 4), 0.2))


# --------------------------------------------------------------------------------------------------------- closed form


@pytest.mark.parametrize(
    ("trust", "first", "second"),
    [
        (0.5, [0.3368291, 0.2263419, 0.3, 0.312111], [-0.2653008, -0.3693983, -0.3, -0.2881286]),
        (0.9, [0.1262923, -0.0136581, 0.06, 0.0817998], None),
        (1.0, [0.1262923, -0.0136581, 0.06, 0.0817998], None),
    ],
)
def test_the_credit_of_a_batch_by_hand(trust, first, second):
    """Rewards 1, 0, 0, 1 and mean 0.5: q is 0.4 and 0.6; the mix is 1 - trust, but 0.1 at least."""
    found = credit(Gated(), answers(memory=knowing(trust=trust)))
    close(found[0], torch.tensor(first), atol=1e-7, rtol=0)
    if second:
        close(found[1], torch.tensor(second), atol=1e-7, rtol=0)


def test_a_token_s_word_is_bounded():
    """5, -0.3 counts as 3, -0.3: D is 3, then 2.7. -5 counts as -3."""
    found = credit(Gated(floor=0.0), answers(said=[[5.0, -0.3, 0.0, 0.0]] * 4, memory=knowing()))
    logit = math.log(0.4 / 0.6)
    values = torch.tensor([logit, logit + 3, logit + 2.7]).sigmoid()
    close(found[0, :2], values.diff())
    low = credit(Gated(floor=0.0), answers(said=[[-5.0, 0.0, 0.0, 0.0]] * 4, memory=knowing()))
    close(low[0, 0], torch.tensor(logit - 3).sigmoid() - 0.4)
    wide = credit(Gated(floor=0.0, bound=9.0), answers(said=[[5.0, -0.3, 0.0, 0.0]] * 4, memory=knowing()))
    close(wide[0, 0], torch.tensor(logit + 5).sigmoid() - 0.4)


@pytest.mark.parametrize("trust", [0.0, 0.5])
def test_a_salient_token_gets_more_of_the_credit_trusted_or_not(trust):
    """The words 0.3, -0.3, 0, 0.1 are 0.175 nats in the mean; half of the credit goes by them."""
    memory = knowing(trust=trust) | {"usual": torch.tensor(0.175)}
    plain, found = (credit(Gated(saliency=share), answers(memory=memory)) for share in (0.0, 0.5))
    close(found, plain * torch.tensor([1.3571429, 1.3571429, 0.5, 0.7857143]))
    untold = answers(memory=memory, told=[True, True, True, False])
    close(credit(Gated(saliency=0.5), untold), credit(Gated(), untold))
    new = answers(memory=knowing(trust=trust))
    close(credit(Gated(saliency=0.5), new), credit(Gated(), new))


def test_one_member_without_a_hint_takes_the_evidence_from_the_whole_group():
    told = [True, True, False, True, True, True, True, True]
    batch = answers((1, 0, 0, 1) * 2, group=(0,) * 4 + (1,) * 4, told=told, memory=knowing())
    close(credit(Gated(), batch)[:4], credit(ALONE, batch)[:4])
    assert (credit(Gated(), batch)[4:] - credit(ALONE, batch)[4:]).abs().max() > 0.1
    kept = Gated().remember(batch)
    assert len(kept["tokens"]) == 16 and len(kept["groups"]) == 1


@pytest.mark.parametrize(("ratio", "rewarded", "blamed"), [(1.5, 1.2, 1.5), (0.5, 0.5, 0.8)])
def test_the_loss_is_the_clipped_surrogate_of_the_credit(ratio, rewarded, blamed):
    """Of a sampler that found everything four times less likely than the trainer, which counts twice."""
    batch = answers(memory=knowing())
    batch = batch.replace(behavior_logp=batch.proximal_logp - math.log(4))
    found = Gated().loss(replace_logp(batch, math.log(ratio)), batch, Gated().credit(batch)).values
    counted = torch.where(credit(Gated(), batch) > 0, rewarded, blamed)
    close(found, -2 * counted * credit(Gated(), batch))


def replace_logp(batch, rise):
    """What a policy says under which every token is likelier by so much."""
    out = forward(torch.zeros(6, 7), batch)
    return replace(out, logp=batch.proximal_logp + rise)


def test_groups_that_agree_are_not_silent_without_the_shrunk_baseline_where_values_keep_an_edge():
    """The leave-one-out mean of equal answers is 0 or 1, and is held .02 away from both."""
    for outcome, sign in ((0, -1), (1, 1)):
        close(credit(Gated(shrink=0.0), answers((outcome,) * 4)), torch.full((4, 4), 0.02 * sign))


# -------------------------------------------------------------------------------------------------------------- memory


def some(step, memory, *, groups=4, said=2.0, seed=0):
    """Groups of mixed outcome whose teacher says `said` of a success's second token, of a failure's the opposite."""
    generator = torch.Generator().manual_seed(1000 * seed + step)
    won = torch.rand(groups, 4, generator=generator) < 0.5
    won[:, 0], won[:, 1] = True, False
    won = won.flatten()
    words = torch.zeros(4 * groups, 4)
    words[:, 1] = said * (2.0 * won - 1)
    words += 0.1 * torch.randn(words.shape, generator=generator)
    group = torch.arange(groups).repeat_interleave(4).tolist()
    return answers(won.tolist(), said=words, group=group, memory=memory, step=step)


def lived(steps, method=None, **how):
    memory = {}
    for step in range(steps):
        memory = (method or Gated()).remember(some(step, memory, **how))
    return memory


def test_credit_is_made_before_a_batch_is_learned_from():
    """Other groups' outcomes, had they all succeeded, would change nothing but what is remembered."""
    batch = some(6, lived(6))
    turned = batch.success | (batch.group > 0)
    other = batch.replace(success=turned, reward=turned.double())
    close(credit(Gated(), other)[batch.group == 0], credit(Gated(), batch)[batch.group == 0])
    assert (Gated().remember(other)["fit"] - Gated().remember(batch)["fit"]).abs().max() > 0.1
    assert Gated().remember(other)["mean"] != Gated().remember(batch)["mean"]


def test_what_is_learned_does_not_depend_on_its_use():
    close(lived(6, method=Gated(gate=False)), lived(6), rtol=0, atol=0)
    assert lived(6)["trust"] > 0.5 and lived(6, said=0.0)["trust"] == 0
    assert lived(6, said=-2.0)["fit"][0] < -0.5


def test_an_answer_counts_once_however_many_rows_and_tokens_it_has():
    _, batch = toy_batch()
    memory = Gated().remember(batch.replace(has_teacher=batch.has_teacher | True))
    close(memory["tokens"][:, 3].sum(), torch.tensor(8.0))
    assert len(memory["tokens"]) == batch.action_mask.sum()
    close(memory["mean"], torch.tensor(3 / 8))  # episodes 0, 3 and 5


def test_a_batch_without_answers_teaches_nothing():
    memory = lived(2)
    assert Gated().remember(some(2, memory)[:0]) == memory


def test_what_is_worth_watching_is_told_of_a_method_with_a_teacher():
    memory = lived(6)
    found = Gated().credit(some(6, memory)).metrics
    assert found["gate/trust"] == pytest.approx(float(memory["trust"]))
    assert found["teacher/used"] == 1
    batch, told = some(6, memory), some(6, memory).action_mask
    common = (batch.teacher_logp + batch.counter_logp) / 2 - batch.proximal_logp
    assert found["gate/style"] == pytest.approx(float(common[told].mean())), "what both hints say in common"
    assert Gated(gate=False).credit(some(6, memory)).metrics == found
    assert Gated().credit(some(6, memory))[:3].narrow(2).metrics == found
    assert ALONE.credit(some(6, memory)).metrics == {}
    uncontrasted = Gated(teacher=Teacher(reads=("sibling",))).credit(some(6, memory)).metrics
    assert "gate/trust" in uncontrasted and "gate/style" not in uncontrasted


# -------------------------------------------------------------------------------------------------------------- learns


@pytest.mark.parametrize("method", [ALONE, Gated(), Gated(gate=False)], ids=["alone", "gated", "watched"])
def test_it_learns_a_bandit_with_three_arms(method):
    """To more than 0.95 on the best arm, which starts as the least likely, with a teacher that talks at random."""
    weights, memory = torch.tensor([[0.5, 0.2, -0.5], [0.0] * 3, [0.0] * 3]).requires_grad_(), {}
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        batch = bandit(weights, torch.tensor([0.0, 0.5, 1.0]), groups=4, size=8, generator=generator)
        words = torch.randn(batch.tokens.shape, generator=generator)
        batch = batch.replace(
            memory=memory,
            teacher_logp=batch.proximal_logp + words,
            counter_logp=batch.proximal_logp,
            has_teacher=batch.success | True,
        )
        for _ in range(4):
            weights = (weights - gradient(method, weights, batch)).detach().requires_grad_()
        memory = method.remember(batch)
    assert weights[0].softmax(-1)[2] > 0.95


# ------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_low": -0.1}, "clip_low is -0.1"),
        ({"truncate": 0.0}, "truncate is 0.0"),
        ({"shrink": -1.0}, "shrink is -1.0"),
        ({"bound": 0.0}, "bound 0.0"),
        ({"floor": -0.1}, "floor -0.1"),
        ({"floor": 1.1}, "floor 1.1"),
        ({"saliency": -0.1}, "saliency -0.1"),
        ({"saliency": 1.1}, "saliency 1.1"),
        ({"saliency": 0.5, "teacher": None}, "without teacher.against"),
        ({"saliency": 0.5, "teacher": Teacher(reads=("sibling",))}, "without teacher.against"),
        ({"teacher": Teacher(reads=("feedback",))}, "reads feedback.*know the reward"),
        ({"teacher": Teacher(reads=("answer",), against=("hint",))}, "know the reward"),
        ({"teacher": Teacher(reads=("sibling", "answer"), need="any")}, "sibling, answer \\(need: any\\)"),
        ({"teacher": Teacher(reads=("sibling", "answer"), need="first")}, "need: first"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Gated(**settings)


def test_settings_at_the_edge_are_accepted():
    Gated(shrink=0.0, bound=1e-3, floor=0.0, teacher=Teacher(reads=("sibling",), need="any"))
    Gated(floor=1.0, saliency=1.0, teacher=Teacher(reads=("answer", "sibling"), against=("other", "wrong_sibling")))
    assert Gated().needs.sampling == {"siblings"}
