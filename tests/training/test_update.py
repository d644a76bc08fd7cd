"""The update with a real language model. In float64, where only true differences between splits remain."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from metal import Metal
from small import rollout, small, turn
from tropism.config import Train
from tropism.methods.dr_grpo import DrGRPO
from tropism.methods.follow_up import FollowUp
from tropism.methods.grpo import GRPO
from tropism.methods.opd import OPD
from tropism.methods.sft import SFT
from tropism.training.collate import collate
from tropism.training.optim import AdamW
from tropism.training.update import mini_batch_rows, summed, update
from tropism.types import Credit, Output

close = torch.testing.assert_close


@dataclass
class Still:
    """An optimizer that notes every gradient and rate, and moves nothing."""

    parameters: Sequence[torch.Tensor]
    gradients: list = field(default_factory=list)
    rates: list = field(default_factory=list)

    def step(self, rate):
        self.gradients.append(torch.cat([p.grad.flatten() for p in self.parameters]))
        self.rates.append(rate)
        for parameter in self.parameters:
            parameter.grad = None
        return {"grad_norm": float(self.gradients[-1].norm()), "learning_rate": rate}


def episodes(groups=4, size=3):
    """Episodes of one to three turns, some of several rows; sampler and trainer differ a little."""
    draw = torch.Generator().manual_seed(0)
    integers = lambda *a: torch.randint(*a, generator=draw).tolist()  # noqa: E731
    made = []
    for group in range(groups):
        for _ in range(size):
            turns, context = [], integers(1, 250, (3,))
            for number in range(1 + integers(0, 3, (1,))[0]):
                action = integers(1, 250, (1 + integers(0, 4, (1,))[0],))
                logp = (-5.5 + 0.3 * torch.randn(len(action), generator=draw)).tolist()
                turns.append(turn(context, action, logp=logp, reward=float(torch.randn((), generator=draw))))
                context = [*context, *action, 7] if number % 2 == 0 else integers(1, 250, (5,))
            made.append(rollout(*turns, group=group))
    return made


@pytest.fixture(scope="module")
def policy():
    found = small()
    found.module.double()
    return found


def batch_of(made, method):
    batch = collate(made, codes={})
    batch = batch.replace(**{n: v.double() for n, v in batch.tensors() if v.is_floating_point()})
    return batch.replace(proximal_logp=batch.behavior_logp + 0.05 * batch.action_mask), method


def updated(policy, method=None, made=None, **settings):
    batch, method = batch_of(made or episodes(), method or GRPO(kl=0.0))
    optimizer = Still(list(policy.module.parameters()))
    metrics, weights = update(
        batch, method.credit(batch), method, policy.forward, optimizer, lambda k: 1.0 + k, **settings
    )
    return optimizer, metrics, weights


@pytest.mark.parametrize("method", [GRPO(), GRPO(average="token"), SFT()], ids=["grpo", "token", "sft"])
@pytest.mark.parametrize("mini_batches", [1, 3])
def test_micro_batches_change_neither_gradients_nor_metrics(policy, method, mini_batches):
    whole, metrics, weights = updated(policy, method, mini_batches=mini_batches)
    assert len(whole.gradients) == mini_batches and all(g.norm() > 1e-3 for g in whole.gradients)
    for micro_tokens in (1, 40, 90):
        cut, cut_metrics, cut_weights = updated(policy, method, mini_batches=mini_batches, micro_tokens=micro_tokens)
        for mine, theirs in zip(cut.gradients, whole.gradients, strict=True):
            close(mine, theirs)
        assert cut_metrics == pytest.approx(metrics) and torch.equal(cut_weights, weights)


def equal_groups():
    """The first two groups earned the same throughout."""
    return [
        replace(one, reward=1.0, turns=tuple(replace(turn, reward=0.0) for turn in one.turns)) if one.group < 2 else one
        for one in episodes()
    ]


@pytest.mark.parametrize("method", [GRPO(), DrGRPO()], ids=["grpo", "dr_grpo"])
@pytest.mark.parametrize("mini_batches", [1, 2])
def test_what_has_no_advantage_need_not_pass_forward(policy, method, mini_batches):
    settings = {"made": equal_groups(), "mini_batches": mini_batches, "micro_tokens": 40}
    whole, metrics, weights = updated(policy, method, **settings)
    seen = []
    real = policy.forward
    policy.forward = lambda batch, *rest: seen.append(batch.group.tolist()) or real(batch, *rest)
    try:
        short, short_metrics, short_weights = updated(policy, method, skip=True, **settings)
    finally:
        del policy.forward
    heard = {group for groups in seen for group in groups}
    assert heard == {2, 3} if mini_batches == 1 else {2, 3} <= heard
    for mine, theirs in zip(short.gradients, whole.gradients, strict=True):
        close(mine, theirs)
    assert torch.equal(short_weights, weights) and short_metrics["loss"] == pytest.approx(metrics["loss"])


@pytest.mark.parametrize("method", [FollowUp(), OPD()], ids=["follow_up", "opd"])
@pytest.mark.parametrize("mini_batches", [1, 2])
def test_what_does_not_count_need_not_pass_forward(policy, method, mini_batches):
    """Half of the rows had nothing for a teacher to read: they are left out by themselves, or by whole episodes."""
    batch, _ = batch_of(episodes(), method)
    told = torch.arange(len(batch)) % 2 == 0
    batch = batch.replace(teacher_logp=batch.behavior_logp - 0.3 * batch.turn, has_teacher=told)
    found, seen = [], []
    real = policy.forward
    for skip in (False, True):
        optimizer, heard = Still(list(policy.module.parameters())), []
        policy.forward = lambda part, *rest, heard=heard: heard.extend(part.episode.tolist()) or real(part, *rest)
        try:
            settings = {"mini_batches": mini_batches, "micro_tokens": 40, "skip": skip}
            update(batch, method.credit(batch), method, policy.forward, optimizer, lambda k: 1.0, **settings)
        finally:
            del policy.forward
        found.append(optimizer.gradients)
        seen.append(heard)
    apart = told if method.needs.by_row else torch.isin(batch.episode, batch.episode[told])
    assert len(seen[0]) == len(batch) and len(seen[1]) == int(apart.sum()) < len(batch)
    assert sorted(seen[1]) == batch.episode[apart].sort().values.tolist()
    for whole, short in zip(*found, strict=True):
        assert whole.abs().max() > 1e-3
        close(short, whole)


def test_where_nothing_has_an_advantage_the_optimizer_still_steps_with_a_gradient_of_zero(policy):
    made = [replace(one, reward=1.0) for one in episodes()]
    still, metrics, _ = updated(policy, GRPO(), made=made, skip=True)
    assert (still.gradients[0] == 0).all() and metrics["updates"] == 1


def test_a_loss_with_a_divergence_lets_nothing_be_left_out(policy):
    made, found = equal_groups(), []
    for skip in (False, True):
        batch, method = batch_of(made, GRPO(kl=0.5))
        batch = batch.replace(reference_logp=batch.behavior_logp - 0.3 * batch.action_mask)
        optimizer = Still(list(policy.module.parameters()))
        update(batch, method.credit(batch), method, policy.forward, optimizer, lambda k: 1.0, skip=skip)
        found.append(optimizer.gradients[0])
    close(found[0], found[1], rtol=0, atol=0)


def test_entropy_is_of_all_tokens_also_of_those_left_out(policy):
    with torch.no_grad():
        batch, method = batch_of(equal_groups(), GRPO())
        batch = batch.replace(proximal_entropy=policy.forward(batch).entropy)
    found = []
    for skip in (False, True):
        optimizer = Still(list(policy.module.parameters()))
        metrics, _ = update(batch, method.credit(batch), method, policy.forward, optimizer, lambda k: 1.0, skip=skip)
        found.append(metrics["entropy"])
    assert found[0] == pytest.approx(found[1])


def test_metrics_are_means_over_action_tokens_and_the_loss_is_per_step(policy):
    batch, method = batch_of(episodes(), GRPO())
    with torch.no_grad():
        result = method.loss(policy.forward(batch), batch, method.credit(batch))
    _, metrics, _ = updated(policy, method, micro_tokens=40, epochs=2)
    for name, values in result.metrics.items():
        assert metrics[name] == pytest.approx(float(values[batch.action_mask].mean()))
    assert metrics["ratio"] > 0 and metrics["ratio"] != metrics["sampling/importance_sampling_ratio/mean"]
    assert metrics["loss"] == pytest.approx(float((result.values * method.weights(batch)).sum()))


def test_metrics_are_summed_in_float64_without_it_on_metal():
    with FakeTensorMode(), Metal():
        found = summed(torch.ones(2, 3, device="mps"), torch.ones(2, 3, device="mps").bool())
    assert found.dtype == torch.float64 and found.device.type == "cpu"
    close(summed(torch.tensor([1e8, 1.0, 5.0]), torch.tensor([True, True, False])), torch.tensor(1e8 + 1).double())


def test_the_seed_decides_what_shares_a_mini_batch(policy):
    one, again, other = (updated(policy, mini_batches=3, seed=seed)[0].gradients[0] for seed in (5, 5, 6))
    assert torch.equal(one, again) and (one - other).norm() > 1e-3


def test_an_epoch_of_mini_batches_is_the_whole_batch_when_nothing_moves(policy):
    """Over a constant length every token's weight times its episodes is the same, so the parts add up to the whole."""
    method = DrGRPO(longest=8)
    whole, metrics, _ = updated(policy, method)
    parts, cut_metrics, _ = updated(policy, method, mini_batches=4)
    close(sum(parts.gradients) / 4, whole.gradients[0])
    for name in ("clip_ratio/region_mean", "ratio", "sampling/importance_sampling_ratio/mean"):
        assert cut_metrics[name] == pytest.approx(metrics[name])


def test_every_optimizer_step_has_its_own_rate(policy):
    optimizer, metrics, _ = updated(policy, epochs=2, mini_batches=3)
    assert optimizer.rates == [1, 2, 3, 4, 5, 6]
    assert metrics["updates"] == 6 and metrics["skipped"] == 0 and metrics["learning_rate"] == 3.5


def test_epochs_are_cut_differently(policy):
    optimizer, _, _ = updated(policy, epochs=2, mini_batches=3)
    assert (optimizer.gradients[0] - optimizer.gradients[3]).norm() > 1e-3


def test_mini_batches_never_part_an_episode_and_hold_every_row_once():
    batch = collate(episodes(), codes={})
    assert len(batch) > len(batch.episode.unique())
    cuts = set()
    for seed in range(5):
        parts = list(mini_batch_rows(batch.episode, 3, seed))
        assert sorted(torch.cat(parts).tolist()) == list(range(len(batch)))
        named = [set(batch.episode[part].tolist()) for part in parts]
        assert sum(map(len, named)) == len(batch.episode.unique()) and {len(n) for n in named} == {4}
        cuts.add(str(sorted(map(sorted, named))))
    assert len(cuts) == 5


def test_what_siblings_share_cancels_in_every_optimizer_step(policy):
    """Equal tokens under advantages that sum to zero: no gradient, unless a mini-batch parts the siblings."""
    draw = torch.Generator().manual_seed(1)
    made = []
    for group in range(4):
        context, action = torch.randint(1, 250, (2, 4), generator=draw).tolist()
        said = [turn(context, action, logp=[-5.5] * 4, reward=float(reward)) for reward in (0, 0, 1, 3)]
        made += [rollout(one, group=group) for one in said]
    method = GRPO(average="token", clip_low=0.99, clip_high=50.0)
    optimizer, _, _ = updated(policy, method, made, mini_batches=4)
    assert len(optimizer.gradients) == 4
    for gradient in optimizer.gradients:
        close(gradient, torch.zeros_like(gradient), atol=1e-9, rtol=0)
    different, _, _ = updated(policy, method, [rollout(r.turns[0], group=n // 4) for n, r in enumerate(episodes())])
    assert different.gradients[0].norm() > 1e-3


def adam(policy, **settings):
    return AdamW(policy.module, Train(**settings))


def frozen(policy):
    return [parameter.detach().clone() for parameter in policy.module.parameters()]


def moved(policy, before):
    return [not torch.equal(p, old) for p, old in zip(policy.module.parameters(), before, strict=True)]


def test_a_step_that_is_not_finite_is_skipped_and_counted_and_the_next_one_is_taken():
    policy, (batch, method) = small(), batch_of(episodes(), GRPO())
    optimizer, before, calls = adam(policy), frozen(policy), []

    def forward(rows):
        out = policy.forward(rows)
        calls.append(len(rows))
        bad = torch.where(rows.action_mask, torch.nan, 0.0) if len(calls) == 1 else 0.0
        return Output(logp=out.logp + bad, entropy=out.entropy)

    credit = method.credit(batch)
    metrics, _ = update(batch, credit, method, forward, optimizer, lambda _: 1e-3)
    assert metrics["skipped"] == 1 and metrics["updates"] == 0 and "grad_norm" not in metrics
    assert not any(moved(policy, before))
    metrics, _ = update(batch, credit, method, forward, optimizer, lambda _: 1e-3)
    assert metrics["skipped"] == 0 and metrics["updates"] == 1 and metrics["grad_norm"] > 0
    assert all(moved(policy, before))


@dataclass(frozen=True)
class Nothing(SFT):
    """No token counts, and every loss is infinite: their product is not a number."""

    def weights(self, batch):
        return torch.zeros_like(batch.token_reward)

    def loss(self, out, batch, credit):
        return type(super().loss(out, batch, credit))(out.logp * torch.inf)


def test_a_step_in_which_no_token_counts_is_skipped_and_leaves_no_gradient():
    policy, (batch, method) = small(), batch_of(episodes(), Nothing())
    optimizer, before = adam(policy, weight_decay=0.1), frozen(policy)
    metrics, weights = update(batch, method.credit(batch), method, policy.forward, optimizer, lambda _: 1e-3)
    assert metrics["skipped"] == 1 and metrics["updates"] == 0 and not weights.any()
    assert not any(moved(policy, before)) and all(p.grad is None for p in policy.module.parameters())
    metrics, _ = update(batch, method.credit(batch), SFT(), policy.forward, optimizer, lambda _: 1e-3)
    assert metrics["updates"] == 1 and metrics["grad_norm"] < 1e3


def test_a_batch_without_rows_is_skipped():
    policy, method = small(), GRPO()
    batch = collate([], codes={})
    batch = batch.replace(behavior_logp=batch.token_reward, proximal_logp=batch.token_reward)
    credit = method.credit(batch)
    metrics, _ = update(batch, credit, method, policy.forward, adam(policy), lambda _: 1e-3, epochs=2, mini_batches=2)
    assert metrics["skipped"] == 4 and metrics["updates"] == 0 and metrics["loss"] == 0


def test_weights_for_the_record_stand_on_their_rows(policy):
    (batch, method), (_, _, weights) = batch_of(episodes(), GRPO()), updated(policy, mini_batches=1)
    close(weights, method.weights(batch).double())
    (_, _, parts) = updated(policy, mini_batches=4)
    assert ((parts > 0) == batch.action_mask).all() and float(parts.sum()) == pytest.approx(4.0)


def test_rows_that_earned_nothing_have_no_gradient(policy):
    batch, method = batch_of(episodes(), GRPO())
    optimizer = Still(list(policy.module.parameters()))
    update(batch, Credit(torch.zeros_like(batch.token_reward)), method, policy.forward, optimizer, lambda _: 1.0)
    assert optimizer.gradients[0].norm() == 0
