import torch

from toy import forward, gradient, table, toy_batch
from tropism.methods.grpo import GRPO
from tropism.methods.sft import SFT
from tropism.types import Credit, Needs

close = torch.testing.assert_close


def test_it_is_reinforce_with_advantage_one_averaged_over_tokens():
    """On data the policy itself wrote, with every token credited 1, GRPO's token average is maximum likelihood."""
    weights, batch = toy_batch()
    logp = forward(weights, batch).logp.detach()
    fresh = batch.replace(proximal_logp=logp, behavior_logp=logp)
    method, credit = GRPO(average="token"), Credit(torch.ones_like(batch.token_reward))
    loss = method.loss(forward(weights, fresh), fresh, credit)
    (reinforce,) = torch.autograd.grad((loss.values * method.weights(fresh)).sum(), weights)
    close(gradient(SFT(), weights, batch), reinforce)


def test_the_loss_is_the_negative_log_likelihood_and_its_sum_the_mean_cross_entropy():
    weights, batch = toy_batch()
    out = forward(weights, batch)
    loss = SFT().loss(out, batch, SFT().credit(batch))
    assert torch.equal(loss.values, -out.logp)
    rows, places = batch.action_mask.nonzero(as_tuple=True)
    logits, written = weights[batch.tokens[rows, places - 1], :-1], batch.tokens[rows, places]
    close((loss.values * SFT().weights(batch)).sum(), torch.nn.functional.cross_entropy(logits, written))


def test_one_step_makes_what_was_written_likelier():
    weights, batch = toy_batch()
    after = weights - 0.1 * gradient(SFT(), weights, batch)
    before = (forward(weights, batch).logp * SFT().weights(batch)).sum()
    assert (forward(after, batch).logp * SFT().weights(batch)).sum() > before


def test_the_loss_is_direct_and_needs_nothing():
    weights, batch = toy_batch()
    assert SFT().needs == Needs()
    assert torch.equal(SFT().credit(batch).advantage, torch.zeros_like(batch.token_reward))
    assert SFT().credit(batch).target is None
    assert gradient(SFT(), weights, batch.replace(behavior_logp=None, proximal_logp=None)).abs().sum() > 0


def test_it_memorises_a_sequence():
    """Which proves the shift as well: entry t of the log-probabilities is about token t, given what stands before."""
    _, batch = toy_batch()
    tokens = torch.tensor([[0, 3, 1, 4, 2, 5]])
    mask = torch.tensor([[False, True, True, True, True, True]])
    one = batch[:1].replace(
        tokens=tokens,
        length=torch.tensor([6]),
        action_mask=mask,
        **{name: None for name, value in batch.tensors() if value.ndim > 1 and name not in ("tokens", "action_mask")}
        | {"token_reward": mask * 0.0, "turn": mask.long() - 1},
    )
    weights = table()
    for _ in range(200):
        weights = (weights - 5.0 * gradient(SFT(), weights, one)).detach().requires_grad_()
    assert (forward(weights, one).logp[mask] > -0.05).all()
    assert weights[:5, :-1].argmax(-1).tolist() == [3, 4, 5, 1, 2]
