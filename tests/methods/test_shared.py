"""What is true of every method, on a batch with two rows for some episodes, unequal groups and stale policies."""

import dataclasses

import pytest
import torch

from toy import forward, gradient, toy_batch
from tropism.methods import METHODS
from tropism.methods.grpo import GRPO

close = torch.testing.assert_close
VARIANTS = [
    GRPO(average="token", clip_high=0.28, dual_clip=3.0, scale="sample_std"),
    GRPO(kl=0.3, scale="batch_std"),
    METHODS["reinforce"](baseline="none"),
    METHODS["rloo"](kl=0.3),
    METHODS["reinforce_pp"](kl=0.3),
    METHODS["reinforce_pp"](kl=0.3, baseline=True),
    METHODS["ppo"](kl=0.3),
    METHODS["ppo"](kl=0.3, kl_in="loss"),
    METHODS["ppo"](kl=0.3, kl_in="loss", kl_loss="k2"),
    METHODS["ppo"](per="turn", kl=0.3),
    METHODS["ppo"](whiten_reward=True, kl=0.3),
    METHODS["dpo"](label_smoothing=0.2),
    METHODS["dpo"](loss_type="robust", label_smoothing=0.2),
    METHODS["dpo"](loss_type="ipo"),
    METHODS["dpo"](loss_type="hinge"),
    METHODS["simpo"](label_smoothing=0.2),
    METHODS["kto"](desirable_weight=1.5, undesirable_weight=0.5),
    METHODS["reward_model"](center=0.1, label_smoothing=0.2),
    METHODS["process_reward"](per="token"),
]
IDS = ["dual", "with_kl", "no_baseline", "rloo_kl", "whitened_kl", "whitened_groups"]
IDS += ["ppo_kl", "ppo_k3", "ppo_k2", "ppo_turns", "ppo_whitened_reward"]
IDS += ["dpo_smooth", "dpo_robust", "dpo_ipo", "dpo_hinge", "simpo_smooth", "kto_weighted", "rm_centred", "orm_token"]
EVERY = [*(method() for method in METHODS.values()), *VARIANTS]
every = pytest.mark.parametrize("method", EVERY, ids=[*METHODS, *IDS])
STOPPED = tuple(METHODS[name] for name in ("cispo", "sdpo", "sdft", "srpo"))
"""Their loss holds a ratio without gradient on purpose, which finite differences see; each proves its own gradient."""

SELECTIVE = (METHODS["reopold"],)
"""Which tokens count is their point; each proves which."""


def toy(method):
    """(weights, batch); for methods that learn from data every row is an answer, and rows 2k and 2k + 1 are a pair."""
    weights, batch = toy_batch()
    if method.needs.data:
        row = torch.arange(len(batch))
        batch = batch.replace(episode=row, group=row // 2, success=row % 2 == 0, mismatch=row / 10.0)
    return weights, batch


@every
def test_any_split_into_micro_batches_gives_the_same_gradient(method):
    weights, batch = toy(method)
    whole = gradient(method, weights, batch)
    assert whole.abs().sum() > 1e-3
    splits = [[0, 2, 3, 6, 1, 5], [4, 9], [7], [8]], [[1, 3], [8], [4, 9], [7, 5, 0], [2, 6]]
    if method.needs.data:
        splits = [[2, 3, 8, 9], [0, 1], [4, 5, 6, 7]], [[9, 8], [1, 0, 5, 4], [2, 3], [7, 6]]
    for split in splits:
        close(gradient(method, weights, batch, split), whole)


@pytest.mark.parametrize("method", [one for one in EVERY if one.needs.by_row], ids=lambda one: type(one).__name__)
def test_who_says_that_rows_are_looked_at_one_by_one_may_have_an_episode_parted(method):
    weights, batch = toy(method)
    close(gradient(method, weights, batch, [[row] for row in range(len(batch))]), gradient(method, weights, batch))


def test_methods_that_learn_turn_by_turn_look_at_rows_one_by_one():
    assert {name for name, method in METHODS.items() if method().needs.by_row} == {"follow_up", "openclaw"}


@every
def test_nothing_off_the_mask_matters(method):
    """Prompt, padding and what others said: their log-probabilities may be anything finite."""
    weights, batch = toy(method)
    noise = torch.where(batch.action_mask, 0.0, torch.randn(batch.tokens.shape, dtype=torch.float64))
    fields = ("behavior_logp", "proximal_logp", "reference_logp", "teacher_logp", "value", "counter_logp")
    fields = (*fields, "teacher_entropy", "proximal_entropy")
    dirty = batch.replace(**{name: getattr(batch, name) + k * noise for k, name in enumerate(fields, 1)})
    over = ("teacher_topk_logp", "proximal_topk_logp")
    dirty = dirty.replace(**{name: getattr(batch, name) - noise.abs()[..., None] for name in over})
    close(gradient(method, weights, dirty), gradient(method, weights, batch), rtol=0, atol=0)


@every
def test_order_of_rows_and_numbering_of_groups_and_episodes_do_not_matter(method):
    weights, batch = toy(method)
    shuffled = batch[torch.tensor([7, 2, 9, 0, 4, 6, 8, 1, 3, 5])]
    renamed = shuffled.replace(group=40 - shuffled.group, episode=100 - 3 * shuffled.episode)
    close(gradient(method, weights, renamed), gradient(method, weights, batch))


@every
def test_the_loss_is_per_token_and_so_are_its_metrics(method):
    weights, batch = toy(method)
    loss = method.loss(forward(weights, batch), batch, method.credit(batch))
    metrics = [given if isinstance(given, tuple) else (given, batch.action_mask) for given in loss.metrics.values()]
    assert all(where.dtype == torch.bool and not (where & ~batch.action_mask).any() for _, where in metrics)
    for values in (loss.values, method.weights(batch), *(value for value, _ in metrics)):
        assert values.shape == batch.tokens.shape
        assert values.isfinite().all() and values.is_floating_point()
    assert loss.values.requires_grad and not any(value.requires_grad for value, _ in metrics)


@every
def test_weights_are_zero_off_the_mask_and_nowhere_else(method):
    _, batch = toy(method)
    assert (method.weights(batch)[~batch.action_mask] == 0).all()
    taught = batch.has_teacher[:, None] if "has_teacher" in method.needs.measured else True
    counted = method.weights(batch)[batch.action_mask & taught] > 0
    assert counted.any() if isinstance(method, SELECTIVE) or method.needs.data else counted.all()


@pytest.mark.parametrize("method", [m for m in EVERY if not isinstance(m, STOPPED)], ids=lambda m: type(m).__name__)
def test_the_gradient_agrees_with_finite_differences(method):
    weights, batch = toy(method)
    credit, share = method.credit(batch), method.weights(batch)
    run = lambda table: (method.loss(forward(table, batch), batch, credit).values * share).sum()  # noqa: E731
    assert torch.autograd.gradcheck(run, (weights,))


@every
def test_only_what_is_needed_is_read(method):
    weights, batch = toy(method)
    optional = {f.name for f in dataclasses.fields(batch) if f.default is None} - {"behavior_logp", "proximal_logp"}
    bare = batch.replace(**dict.fromkeys(optional - method.needs.measured))
    close(gradient(method, weights, bare), gradient(method, weights, batch), rtol=0, atol=0)


@pytest.mark.parametrize("method", [one for one in EVERY if one.needs.by_advantage], ids=lambda one: type(one).__name__)
def test_who_says_that_only_the_advantage_counts_has_no_gradient_without_one(method):
    weights, batch = toy(method)
    credit = method.credit(batch)
    for advantage, there in ((torch.zeros_like(credit.advantage), False), (credit.advantage, True)):
        loss = method.loss(forward(weights, batch), batch, dataclasses.replace(credit, advantage=advantage))
        (found,) = torch.autograd.grad((loss.values * method.weights(batch)).sum(), weights)
        assert bool(found.abs().max() > 0) == there


def test_these_methods_spare_the_pass_over_what_has_no_advantage():
    """Those whose whole loss is advantage times something. Opd's tokens have an advantage nearly everywhere."""
    told = {name for name, method in METHODS.items() if method().needs.by_advantage}
    assert told == {
        "cispo",
        "constrained",
        "dapo",
        "dr_grpo",
        "gdpo",
        "grpo",
        "gspo",
        "max_rl",
        "rlcsd",
        "rloo",
        "rlsd",
    }
