"""A critic in a real run: measured before the update, trained beside the policy, recorded, and kept to itself."""

import pytest
import torch
from safetensors.torch import load_file

import tropism
import world
from tropism.config import Model
from tropism.methods.ppo import PPO
from tropism.record import Run, latest
from tropism.training import learn, run
from tropism.training.model import load_policy

LONG = {
    "sampling": {"groups": 8, "group_size": 2, "max_tokens": 4},
    "train": {"steps": 40, "save_every": 0, "record_every": 40, "decay": "none", "warmup": 0},
    "eval": {"every": 0},
}


def recipe(folder, per="token", **changes):
    made = world.ppo(folder, **changes)
    (stage,) = made["stages"]
    stage["method"], stage["rewards"] = {"ppo": {"per": per}}, {"low": 1.0}
    return made


@pytest.mark.parametrize("per", ["token", "turn"])
def test_policy_and_critic_learn_together(per, tmp_path):
    """Replies become letters of the first half of the alphabet, and the critic knows what is still to come: in the
    first turn all of it, in the second what that turn will earn."""
    record = Run(tropism.train(recipe(tmp_path, per, **LONG), quiet=True).path / "rl")
    lines = [line for line in record.metrics() if "reward" in line]
    assert lines[-1]["reward"] > lines[0]["reward"] + 2
    assert lines[-1]["value/loss"] < 0.3 and 0 < sum(line["value/clip_ratio"] for line in lines) < 20
    turns = record.rollouts(40).to_pylist()
    mean = [sum(row["reward"] for row in turns if row["turn"] == n) / 16 for n in (0, 1)]
    for number, expected in enumerate((mean[0] + mean[1], mean[1])):
        said = [row["value"][0] for row in turns if row["turn"] == number]
        assert sum(said) / 16 == pytest.approx(expected, abs=0.7)
    assert mean[0] > 1  # so that the two differ by more than the tolerance


def test_head_and_body_both_move_and_start_from_what_was_measured(tmp_path, monkeypatch):
    seen, real = [], learn.update

    def update(batch, credit, *args, **kwargs):
        seen.append((batch, credit))
        return real(batch, credit, *args, **kwargs)

    monkeypatch.setattr(learn, "update", update)
    path = tropism.train(recipe(tmp_path, train={"steps": 2}, eval={"every": 0}), quiet=True).path
    (first, credit), (second, _) = seen
    assert (first.value == 0).all() and (first.last_value == 0).all()  # a new critic says nothing
    assert credit.target.shape == first.tokens.shape and (credit.target[first.action_mask] != 0).any()
    assert (second.value[second.action_mask] != 0).all() and (second.last_value != 0).all()
    assert first.proximal_logp is first.behavior_logp  # the critic's pass does not replace the sampler's numbers
    last = latest(Run(path / "rl").checkpoints_dir)
    critic = torch.load(last / "state" / "critic.pt")
    assert {name: tuple(value.shape) for name, value in critic.items()} == {"weight": (1, 32), "bias": (1,)}
    assert (critic["weight"] != 0).any() and (critic["bias"] != 0).any()
    start = load_policy(Model(**world.MODEL), 3).module.state_dict()
    weights = load_file(last / "model.safetensors")
    assert all((weights[name] - start[name]).abs().max() > 0 for name in weights)


def test_the_start_up_checks_leave_no_gradient_behind(tmp_path, monkeypatch):
    """Nor would it be seen in the policy: the head is 0, so what it would learn stays its own."""
    left, real = [], run.examine

    def examine(job):
        found = real(job)
        left.extend(parameter.grad for parameter in (*job.policy.module.parameters(), *job.policy.critic.parameters()))
        return found

    monkeypatch.setattr(run, "examine", examine)
    tropism.train(recipe(tmp_path, train={"steps": 1}, eval={"every": 0}), quiet=True)
    assert len(left) > 10 and all(grad is None for grad in left)


def test_the_checkpoint_of_a_policy_with_a_critic_is_an_ordinary_model(tmp_path):
    path = tropism.train(recipe(tmp_path, train={"steps": 1}, eval={"every": 0}), quiet=True).path
    last = latest(Run(path / "rl").checkpoints_dir)
    policy = load_policy(Model(path=str(last), device="cpu"))
    assert policy.critic is None and not any("critic" in name for name in load_file(last / "model.safetensors"))


def test_a_method_without_a_critic_has_none(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("nobody asked for a critic")

    monkeypatch.setattr("tropism.training.model.Policy.add_critic", refuse)
    path = tropism.train(world.grpo(tmp_path, train={"steps": 1}, eval={"every": 0}), quiet=True).path
    assert not list(path.glob("rl/checkpoints/*/state/critic.pt"))
    assert "value" in PPO().needs.live
