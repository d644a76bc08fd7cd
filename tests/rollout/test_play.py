import random
from dataclasses import dataclass, field, replace

import pytest

from small import small
from tropism.envs import open_source
from tropism.errors import ConfigError
from tropism.rollout.play import play
from tropism.types import Ask, Failure, SamplingParams, Stop, Task, Turn, seed_of

PARAMS = SamplingParams(max_tokens=4)


class Letters:
    """Words without a tokenizer: a token is a letter, 0 ends a reply."""

    def context(self, prompt, before=None):
        return [ord(letter) for letter in prompt]

    def reply(self, action):
        return "".join(chr(token) for token in action if token)


@dataclass
class Echo:
    """A sampler that repeats the last letter of the prompt, and notes what it was asked."""

    calls: list = field(default_factory=list)

    def __call__(self, prompts, params):
        self.calls.append(["".join(map(chr, prompt)) for prompt in prompts])
        full = Failure("play", "the prompt does not fit")
        return [
            full if len(prompt) > 30 else Turn(context=prompt, action=[prompt[-1], 0], logp=[-1.0, 0.0])
            for prompt in prompts
        ]


class Source:
    """Opens what a task's columns say."""

    def task(self, number):
        return Task(seed=number)

    def open(self, task, sibling):
        return task.columns["env"](task, sibling)


class Script:
    """Asks the seats of `plan` in turn; `gains[n]` is what reply n brings: {seat: {part: change}}."""

    plan = (0,)
    gains = ()
    start = 0.0
    breaks = ""

    def __init__(self, task, sibling):
        self.task, self.sibling, self.heard = task, sibling, []
        self.total = {0: {"points": self.start}, 1: {"points": self.start}}
        self.broken("open")

    def broken(self, where):
        if self.breaks == where:
            raise RuntimeError(f"no {where} today")

    def ask(self):
        self.broken("ask")
        number = len(self.heard)
        return Ask(self.plan[number], f"{self.task.seed}:{number}") if number < len(self.plan) else None

    def tell(self, reply):
        self.broken("tell")
        for seat, parts in (self.gains[len(self.heard)] if len(self.heard) < len(self.gains) else {}).items():
            for name, change in parts.items():
                self.total[seat][name] = self.total[seat].get(name, 0.0) + change
        self.heard.append(reply)

    def score(self, seat):
        if self.heard:
            self.broken("score")
        return self.total[seat]

    def feedback(self, seat):
        self.broken("feedback")
        return f"secret {len(self.heard)}"


def script(**fields):
    return type("Made", (Script,), fields)


def played(*envs, sampler=None, max_turns=64, **fields):
    tasks = [(Task(seed=n, columns={"env": env}, **fields), n, 0) for n, env in enumerate(envs)]
    return play(tasks, Source(), sampler or Echo(), Letters(), PARAMS, max_turns=max_turns, version=7)


def earned(rollout):
    return [dict(turn.earned) for turn in rollout.turns]


def test_episodes_are_asked_in_lock_step_and_those_that_are_over_are_not():
    sampler = Echo()
    found = played(script(plan=(0,)), script(plan=(0, 0, 0)), script(plan=(0, 0)), sampler=sampler)
    assert sampler.calls == [["0:0", "1:0", "2:0"], ["1:1", "2:1"], ["1:2"]]
    assert [[turn.reply for turn in r.turns] for r in found] == [["0"], ["0", "1", "2"], ["0", "1"]]
    assert [r.version for r in found] == [7, 7, 7] and [r.group for r in found] == [0, 1, 2]


def test_every_call_of_the_sampler_has_a_seed_of_its_own():
    seeds = []

    def sampler(prompts, params):
        seeds.append(params.seed)
        return Echo()(prompts, params)

    played(script(plan=(0, 0, 0)), sampler=sampler)
    assert len(set(seeds)) == 3
    again, seeds = seeds, []
    played(script(plan=(0, 0, 0)), sampler=sampler)
    assert again == seeds


def test_two_seats_of_one_game_are_two_rollouts_with_their_own_rewards():
    gains = ({0: {"points": 1.0}}, {1: {"points": -2.0}}, {0: {"points": 0.5}, 1: {"points": 4.0}})
    first, second = played(script(plan=(0, 1, 0), gains=gains), seat=0)
    assert (first.task.seat, second.task.seat) == (0, 1) and first.group == second.group
    assert [turn.reply for turn in first.turns] == ["0", "2"] and [turn.reply for turn in second.turns] == ["1"]
    assert earned(first) == [{"points": 1.0}, {"points": 0.5}]
    assert earned(second) == [{"points": 2.0}]  # -2, and later 4 more: both belong to its only turn


def test_a_change_of_score_goes_to_the_latest_turn_of_its_seat():
    """Also where another seat's reply brought it, and also a loss."""
    gains = ({}, {0: {"points": -1.0}}, {}, {0: {"points": 3.0, "bonus": 1.0}})
    first, _ = played(script(plan=(0, 1, 0, 1), gains=gains))
    assert earned(first) == [{"points": -1.0}, {"points": 3.0, "bonus": 1.0}]


@pytest.mark.parametrize("seat", [0, 1])
def test_what_a_seat_earned_before_its_first_word_goes_to_its_first_turn(seat):
    """Whichever seat the task is about."""
    gains = ({1: {"points": 0.5}}, {1: {"points": 0.25}}, {1: {"points": 1.0}}, {1: {"points": 8.0}})
    _, second = played(script(plan=(0, 0, 1, 0), gains=gains), seat=seat)
    assert earned(second) == [{"points": 9.75}]
    _, second = played(script(plan=(0, 0, 1, 1), gains=gains), seat=seat)
    assert earned(second) == [{"points": 1.75}, {"points": 8.0}]


@pytest.mark.parametrize("start", [0.0, -1.0])
def test_what_the_turns_earned_sums_to_the_score_of_the_environment(start):
    """An environment may start below zero: a lost game is -1 until it is won."""
    draw = random.Random(0)
    for _ in range(20):
        plan = tuple(draw.choices((0, 1), k=6))
        gains = tuple({seat: {"points": draw.uniform(-1, 1), "b": 1.0} for seat in (0, 1)} for _ in plan)
        made = []

        class Kept(Script):
            def __init__(self, task, sibling, made=made):
                super().__init__(task, sibling)
                made.append(self)

        env = type("Made", (Kept,), {"plan": plan, "gains": gains, "start": start})
        for rollout in played(env, seat=draw.choice((0, 1))):
            for name in ("points", "b"):
                total = sum(turn.earned.get(name, 0.0) for turn in rollout.turns)
                assert total == pytest.approx(made[0].total[rollout.task.seat][name])


@pytest.mark.parametrize("where", ["open", "ask", "tell", "score", "feedback"])
def test_an_environment_that_raises_fails_its_own_episode_only(where):
    found = played(script(plan=(0, 0)), script(plan=(0, 0), breaks=where), script(plan=(0, 0)))
    assert [len(r.turns) for r in found if r.failure is None] == [2, 2]
    (bad,) = (r for r in found if r.failure is not None)
    assert bad.failure == Failure("play", f"the environment raised RuntimeError: no {where} today")
    assert bad.task.seed == 1 and bad.group == 1


@pytest.mark.parametrize("where", ["tell", "score", "feedback"])
def test_the_reply_that_broke_an_environment_is_recorded(where):
    (bad,) = played(script(plan=(0, 0), breaks=where))
    (turn,) = bad.turns
    assert (turn.prompt, turn.reply, turn.logp) == ("0:0", "0", [-1.0, 0.0]) and where in bad.failure.reason


def test_an_environment_that_raised_is_left_alone():
    class Stumbling(Script):
        plan = (0, 0, 0)

        def tell(self, reply):
            super().tell(reply)
            if len(self.heard) == 2:
                raise RuntimeError("once")

    sampler = Echo()
    (bad,) = played(Stumbling, sampler=sampler)
    assert sampler.calls == [["0:0"], ["0:1"]]
    assert bad.failure is not None and [turn.feedback for turn in bad.turns] == ["secret 1", None]


def test_an_error_that_is_meant_for_the_user_stops_the_run():
    class Refusing(Script):
        def tell(self, reply):
            raise ConfigError("this option cannot work")

    with pytest.raises(ConfigError, match="cannot work"):
        played(script(), Refusing)


def test_a_prompt_that_does_not_fit_fails_its_own_episode_only():
    class Growing(Script):
        def ask(self):
            return Ask(0, "x" * 20 * len(self.heard) + "?") if len(self.heard) < 5 else None

    good, bad = played(script(plan=(0, 0, 0)), Growing)
    assert good.failure is None and len(good.turns) == 3
    assert bad.failure == Failure("play", "the prompt does not fit") and len(bad.turns) == 2


def test_an_episode_that_is_too_long_is_truncated_and_one_that_ends_in_time_is_not():
    short, exact, long = played(script(plan=(0,)), script(plan=(0, 0)), script(plan=(0, 0, 0)), max_turns=2)
    assert [[turn.stop for turn in r.turns] for r in (short, exact, long)] == [
        [Stop.finished],
        [Stop.finished, Stop.finished],
        [Stop.finished, Stop.truncated],
    ]
    assert long.failure is None and [turn.reply for turn in long.turns] == ["0", "1"]


def test_replies_of_all_seats_count_toward_the_limit():
    first, second = played(script(plan=(0, 1, 0, 1)), max_turns=3)
    assert len(first.turns) == 2 and len(second.turns) == 1
    assert first.turns[-1].stop is Stop.truncated and second.turns[-1].stop is Stop.truncated
    (only,) = played(script(plan=(0, 1)), max_turns=1)
    assert only.task.seat == 0 and only.turns[0].stop is Stop.truncated


def test_feedback_is_recorded_and_never_read_by_the_student():
    policy = small()
    tasks = [(Task(seed=n, columns={"env": script(plan=(0, 0, 0))}), n, 0) for n in range(3)]
    for rollout in play(tasks, Source(), policy.sampler, policy.words, PARAMS, max_turns=9):
        assert [turn.feedback for turn in rollout.turns] == ["secret 1", "secret 2", "secret 3"]
        for turn in rollout.turns:
            assert "secret" not in policy.tokenizer.decode(turn.context) and "secret" not in turn.prompt


def test_a_turn_holds_the_words_the_environment_said_and_heard():
    policy = small()
    tasks = [(Task(seed=5, columns={"env": script(plan=(0, 0))}), 0, 0)]
    (rollout,) = play(tasks, Source(), policy.sampler, policy.words, SamplingParams(max_tokens=6), max_turns=9)
    for number, turn in enumerate(rollout.turns):
        assert turn.prompt == f"5:{number}"
        assert turn.reply == policy.words.reply(turn.action)
        assert len(turn.logp) == len(turn.action)
        assert list(turn.context) == policy.words.context(turn.prompt)


def test_a_seat_that_sees_its_past_reads_on_where_its_latest_turn_ended():
    """Each seat in its own context, token for token, whatever was sampled."""

    class Talk(Script):
        plan = (0, 1, 0, 1, 0)

        def __init__(self, task, sibling):
            super().__init__(task, sibling)
            self.past = {seat: [{"role": "user", "content": f"you are {seat}"}] for seat in (0, 1)}

        def ask(self):
            if len(self.heard) == len(self.plan):
                return None
            seat = self.plan[len(self.heard)]
            return Ask(seat, tuple(self.past[seat]))

        def tell(self, reply):
            seat = self.plan[len(self.heard)]
            self.past[seat] += [{"role": "assistant", "content": reply}, {"role": "user", "content": "go on"}]
            super().tell(reply)

    policy = small()
    tasks = [(Task(columns={"env": Talk}), n, 0) for n in range(3)]
    rollouts = play(tasks, Source(), policy.sampler, policy.words, SamplingParams(max_tokens=6), max_turns=9)
    assert [len(r.turns) for r in rollouts] == [3, 2] * 3
    for rollout in rollouts:
        for before, after in zip(rollout.turns, rollout.turns[1:], strict=False):
            said = [*before.context, *before.action]
            assert list(after.context[: len(said)]) == said
            assert policy.tokenizer.decode(after.context[len(said) :]).endswith("<|user|>go on<|end|><|assistant|>")


def test_any_sibling_can_be_replayed_alone():
    """Its opponent draws from the task's seed and the sibling's number, whoever plays beside it."""
    policy, source = small(), open_source("tictactoe", {}, split="train", seed=3)
    tasks = [(source.task(n), n, sibling) for n in range(4) for sibling in range(3)]
    params = SamplingParams(max_tokens=3, seed=seed_of(1))

    def moves(prompts, params):
        """A legal move at random, which a random policy would hardly write."""
        draw, turns = random.Random(params.seed), []
        for prompt in prompts:
            board = policy.tokenizer.decode(prompt)
            free = [letter for letter in board if letter in "123456789"]
            ids = policy.tokenizer(f"[{draw.choice(free)}]").input_ids
            turns.append(Turn(context=prompt, action=[*ids, policy.words.stop_ids[0]]))
        return turns

    together = play(tasks, source, moves, policy.words, params, max_turns=9)
    assert len({str(turn.prompt) for r in together for turn in r.turns}) > 10 and len(together) == 12
    for rollout in together:
        env = source.open(rollout.task, rollout.sibling)
        for turn in rollout.turns:
            assert env.ask() == Ask(rollout.task.seat, turn.prompt)
            env.tell(turn.reply)
        assert env.ask() is None
        total = {name: sum(turn.earned.get(name, 0.0) for turn in rollout.turns) for name in env.score(0)}
        assert total == pytest.approx(dict(env.score(rollout.task.seat)))
    openings = {(r.group, str(r.turns[0].prompt)) for r in together if r.task.seat == 0}
    assert len(openings) == 2, "siblings share their opening"


def test_nobody_asked_is_nobody_played():
    silent = script(plan=())
    assert played(silent) == []
    assert played() == []
    (good,) = played(silent, script())
    assert good.group == 1 and replace(good, turns=()).failure is None
