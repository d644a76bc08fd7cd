"""Process and outcome reward models: Lightman et al. 2023, arXiv:2305.20050; Cobbe et al. 2021, arXiv:2110.14168."""

import math

import torch

from small import rollout, turn
from tropism.methods.process_reward import ProcessReward
from tropism.training.collate import collate
from tropism.types import Output

close = torch.testing.assert_close
F64 = torch.float64


def answer(*steps, start=(1, 2)):
    """Steps as (how many tokens, label)."""
    turns, context = [], list(start)
    for number, (count, label) in enumerate(steps):
        action = [10 + number] * count
        turns.append(turn(context, action, reward=label))
        context = context + action
    return rollout(*turns)


def batch_of(*answers):
    batch = collate(list(answers), codes={})
    return batch.replace(token_reward=batch.token_reward.double())


def heads(batch, after):
    """Output whose head says `after` [N, T] once each token has been read."""
    after = torch.as_tensor(after, dtype=F64)
    value = (after.roll(1, 1) * batch.action_mask).requires_grad_()
    last = after.gather(1, batch.length[:, None] - 1)[:, 0].requires_grad_()
    return Output(logp=value.detach() * 0, entropy=value.detach() * 0, value=value, last_value=last)


def cost(method, batch, after):
    out = heads(batch, after)
    loss = method.loss(out, batch, method.credit(batch))
    return (loss.values * method.weights(batch)).sum(), out, loss


def bce(score, label):
    return math.log1p(math.exp(score)) - label * score


def test_the_loss_of_every_step_stands_after_its_last_token_by_hand():
    """Two steps of two tokens, right and wrong; and one of one token: scores .5, -1 and 2, mean of three."""
    batch = batch_of(answer((2, 1.0), (2, 0.0)), answer((1, 1.0)))
    after = [[9, 9, 9, 0.5, 9, -1.0], [9, 9, 2.0, 9, 9, 9]]
    found, _, loss = cost(ProcessReward(), batch, after)
    close(found, torch.tensor((bce(0.5, 1) + bce(-1, 0) + bce(2, 1)) / 3, dtype=F64))
    right, where = loss.metrics["accuracy"]
    assert where.nonzero().tolist() == [[0, 3], [0, 5], [1, 2]] and right[where].tolist() == [1, 1, 1]
    assert loss.metrics["accuracy/right"][1].nonzero().tolist() == [[0, 3], [1, 2]]
    assert loss.metrics["accuracy/wrong"][1].nonzero().tolist() == [[0, 5]]


def test_after_every_token_the_answer_s_label_is_asked_for_by_hand():
    """Of an outcome reward model."""
    batch = batch_of(answer((3, 0.0)), answer((1, 1.0)))
    after = [[9, 9, 0.5, 1.0, -1.0], [9, 9, -2.0, 9, 9]]
    found, _, loss = cost(ProcessReward(per="token"), batch, after)
    close(found, torch.tensor((bce(0.5, 0) + bce(1, 0) + bce(-1, 0) + bce(-2, 1)) / 4, dtype=F64))
    for name, wanted in (("accuracy", 0.25), ("accuracy/right", 0.0), ("accuracy/wrong", 1 / 3)):
        value, where = loss.metrics[name]
        close(value[where].mean(), torch.tensor(wanted, dtype=F64))


def test_an_unsure_label_is_best_met_by_its_probability():
    batch = batch_of(answer((1, 0.25)))
    _, out, _ = cost(ProcessReward(), batch, [[0, 0, math.log(0.25 / 0.75)]])
    found, _, _ = cost(ProcessReward(), batch, [[0, 0, 0.0]])
    loss = ProcessReward().loss(out, batch, ProcessReward().credit(batch)).values.sum()
    (slope,) = torch.autograd.grad(loss, out.last_value)
    close(slope, torch.zeros(1, dtype=F64))
    assert loss.detach() < found.detach()


def test_a_score_of_0_and_a_label_of_a_half_say_that_it_is_not_right():
    batch = batch_of(answer((1, 1.0), (1, 0.5)))
    _, _, loss = cost(ProcessReward(), batch, [[0.0] * 4])
    (right, good), (wrong, bad) = (loss.metrics[f"accuracy/{name}"] for name in ("right", "wrong"))
    assert right[good].tolist() == [0.0] and wrong[bad].tolist() == [1.0]


def test_one_step_raises_the_score_of_a_right_step_and_lowers_that_of_a_wrong_one():
    batch = batch_of(answer((1, 1.0), (1, 0.0)))
    found, out, _ = cost(ProcessReward(), batch, [[0.0] * 4])
    value, last = torch.autograd.grad(found, (out.value, out.last_value))
    assert value[0, 3] < 0 < last[0] and (value[0, :3] == 0).all()


def test_steps_that_somebody_else_s_words_follow_are_not_counted():
    """There the head has read them too."""
    talk = rollout(turn([1], [2, 3], reward=1.0), turn([1, 2, 3, 7, 7], [4], reward=1.0))
    batch = batch_of(talk)
    assert ProcessReward().judged(batch).tolist() == [[False] * 5 + [True]]
    assert ProcessReward(per="token").judged(batch).tolist() == [[False, True, False, False, False, True]]
