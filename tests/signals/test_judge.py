"""A judge's score is a majority, its hints are few, and what it could not say is never a 0."""

import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import world
from tropism.api import Lines
from tropism.config import Judge, Model, Stage
from tropism.envs import open_source
from tropism.envs.user import TASTES, judge
from tropism.errors import ConfigError
from tropism.methods.openclaw import OpenClaw
from tropism.recipe import resolve
from tropism.signals.judge import Panel, Seen, Vote, by_function, by_model, decided, over_http, seen, vote_in
from tropism.training.judges import local, open_judge
from tropism.training.model import load_policy
from tropism.training.run import run
from tropism.training.scoring import scoring
from tropism.types import Failure, Rollout, SamplingParams, Task, Turn

GOOD, BAD, HINT = "\\boxed{+1}", "\\boxed{-1}[HINT_START]small letters only[HINT_END]", "small letters only"


def talked(*following, replies=(), failure=None):
    """A rollout of which these messages came after its turns; nothing comes after the last one."""
    replies = replies or [f"reply {n}" for n in range(len(following) + 1)]
    heard, turns = [{"role": "user", "content": "Begin."}], []
    for reply, message in zip(replies, [*following, None], strict=True):
        turns.append(Turn(context=[1], action=[2], prompt=tuple(heard), reply=reply))
        heard += [{"role": "assistant", "content": reply}]
        heard += [message if isinstance(message, dict) else {"role": "user", "content": message}]
    return Rollout(task=Task(), group=0, turns=tuple(turns), failure=failure)


def said(*votes):
    """A voter that says these about every turn, one after the other."""
    left = list(votes)
    return lambda turns, seed: [left.pop(0) for _ in turns]


# ----------------------------------------------------------------------------------------------------- what it is shown


def test_it_sees_the_reply_what_came_next_and_who_said_that():
    asked = []
    rollout = talked("More.", {"role": "tool", "content": "exit code 1"})
    Panel(by_function(lambda *facts: asked.append(facts) or 0))([rollout])
    assert asked == [("reply 0", "More.", "user"), ("reply 1", "exit code 1", "tool")]


def test_of_plain_text_it_sees_what_was_added_or_else_the_new_text():
    turn = Turn(context=[1], action=[2], prompt="2+2=", reply="5")
    assert seen(turn, "2+2=5 No!") == Seen("5", " No!", "user")
    assert seen(turn, "another board") == Seen("5", "another board", "user")
    assert seen(turn, "2+2=5") is None and seen(turn, ()) is None


def test_a_turn_without_a_next_state_has_no_score():
    hinted, (parts,) = Panel(said(Vote(1, ("a hint long enough",)))).read([talked("Thank you.")])
    assert parts == {"judge": [1.0, None]}
    assert [turn.hints for turn in hinted[0].turns] == [("a hint long enough",), ()]
    assert Panel(said())([talked()]) == [{"judge": None}]


def test_what_failed_before_is_not_judged_and_the_others_keep_their_places():
    failed = talked("x", failure=Failure("play", "broke"))
    hinted, parts = Panel(said(Vote(1), Vote(-1))).read([talked("a"), failed, talked("b")])
    assert parts == [{"judge": [1.0, None]}, {"judge": [-1.0, None]}] and hinted[1] is failed


# ------------------------------------------------------------------------------------------------------------- majority


@pytest.mark.parametrize(
    ("votes", "score"),
    [((1,), 1), ((1, 1, -1), 1), ((-1, 1, -1), -1), ((0, 0, 1), 0), ((1, -1), 0), ((1, 1, -1, -1, 0), 0),
     ((1, None, None), 1), ((1, -1, None), 0)],
)  # fmt: skip
def test_the_majority_of_valid_votes_decides_and_a_tie_is_0(votes, score):
    bad = Failure("judge", "nonsense")
    assert decided([bad if vote is None else Vote(vote) for vote in votes]).score == score


def test_without_a_valid_vote_it_is_a_failure_and_never_0():
    found = decided([Failure("judge", "timed out"), Failure("judge", "timed out"), Failure("judge", "nonsense")])
    assert found == Failure("judge", "no valid vote of 3: timed out")
    (parts,) = Panel(said(Vote(1), Failure("judge", "gone")))([talked("a", "b")])
    assert isinstance(parts, Failure) and "gone" in parts.reason


def test_hints_are_kept_once_shortest_first_at_most_three_and_longer_than_ten_characters():
    hints = [
        "ten chars.",
        "eleven char",
        " eleven char ",
        "a longer one than that",
        "the middle one",
        "fourth and longest of all",
    ]
    assert decided([Vote(1, tuple(hints[:3])), Vote(-1, tuple(hints[3:]))]).hints == (
        "eleven char", "the middle one", "a longer one than that",
    )  # fmt: skip


def test_every_turn_is_asked_about_as_often_as_there_are_votes():
    panel = Panel(said(*map(Vote, (1, -1, 1, 0, 0, 1))), votes=3)
    assert panel([talked("a", "b")]) == [{"judge": [1.0, 0.0, None], "judge/failed": 0.0}]


def test_votes_that_failed_are_counted_where_others_decide():
    """Of three a turn; of one a turn there is nothing to count, for the rollout fails."""
    bad = Failure("judge", "timed out")
    panel = Panel(said(Vote(1), bad, bad, Vote(1), Vote(1), bad), votes=3)
    assert panel([talked("a", "b")]) == [{"judge": [1.0, 1.0, None], "judge/failed": 0.5}]
    assert Panel(said(Vote(1), Vote(1)))([talked("a", "b")]) == [{"judge": [1.0, 1.0, None]}]


# ------------------------------------------------------------------------------------------------------------ functions


@pytest.mark.parametrize(
    ("answer", "vote"),
    [(1, Vote(1)), (-1.0, Vote(-1)), ((0, "a hint"), Vote(0, ("a hint",))), ([1, ["x", "y"]], Vote(1, ("x", "y")))],
)
def test_a_function_gives_a_score_or_a_score_and_hints(answer, vote):
    assert by_function(lambda *_: answer)([Seen("", "", "")], 0) == [vote]


@pytest.mark.parametrize("answer", [0.5, 2, None, "good", float("nan"), (1, 2, 3)])
def test_a_function_that_gives_nonsense_has_not_voted(answer):
    (found,) = by_function(lambda *_: answer)([Seen("", "", "")], 0)
    assert isinstance(found, Failure)


def test_a_function_that_raises_has_not_voted():
    (found,) = by_function(lambda *_: 1 / 0)([Seen("", "", "")], 0)
    assert found == Failure("judge", "ZeroDivisionError: division by zero")


# --------------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize(
    ("text", "vote"),
    [
        ("It thanks. \\boxed{+1}", Vote(1)),
        ("\\boxed{1} or rather \\boxed{ -1 } [HINT_START]be brief[HINT_END]", Vote(-1, ("be brief",))),
        ("\\boxed{0}[HINT_START]one\ntwo[HINT_END] and [HINT_START]three[HINT_END]", Vote(0, ("one\ntwo", "three"))),
    ],
)
def test_the_last_box_of_an_answer_counts(text, vote):
    assert vote_in(text, "question") == vote


@pytest.mark.parametrize("text", ["", "+1", "\\boxed{2}", "\\boxed{good}", "\\boxed{-0.5}"])
def test_an_answer_without_a_box_is_no_vote(text):
    assert isinstance(vote_in(text, "question"), Failure)


def test_the_question_shows_the_turn_and_a_reply_cannot_add_slots_of_its_own():
    asked = []
    voter = by_model(lambda prompts, seed: asked.extend(prompts) or [GOOD for _ in prompts])
    assert voter([Seen("I say {next}", "You did", "tool")], 0) == [Vote(1)]
    (message,) = asked[0]
    assert "I say {next}" in message["content"] and "from the tool:\nYou did" in message["content"]


def test_a_repeated_question_is_not_taken_for_the_answer():
    repeating = by_model(
        lambda prompts, seed: [f"<user>{prompt[0]['content']}<assistant>\\boxed{{-1}}" for prompt in prompts]
    )
    assert repeating([Seen("a", "b", "user")], 0) == [Vote(-1)]
    mute = by_model(lambda prompts, seed: [prompt[0]["content"] for prompt in prompts])
    assert isinstance(mute([Seen("a", "b", "user")], 0)[0], Failure)


@pytest.fixture(scope="module")
def judge_model(tmp_path_factory):
    """A tiny model that was taught to judge two next messages, and to say something else of a third."""
    folder = tmp_path_factory.mktemp("judge")
    answers = {"Good.": GOOD, "Bad.": BAD, "Odd.": "what?"}
    rows = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
        for asked, answer in answers.items()
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = {"steps": 60, "batch": 3, "learning_rate": 1e-2, "save_every": 0}
    stage = {"method": "sft", "data": str(folder / "rows.jsonl"), "train": train}
    recipe = {"name": "judge", "output": str(folder), "model": world.MODEL, "stages": [stage]}
    return str(run(resolve(recipe), Lines()).model)


ASKED = "{next}{reply}"
"""The question that this model was taught; replies are empty in these tests."""


def silent(*following):
    return talked(*following, replies=[""] * (len(following) + 1))


def test_a_local_model_judges(judge_model):
    settings = Judge(who=judge_model, ask=ASKED, votes=3, temperature=0.2, max_tokens=60)
    panel = open_judge(settings, Model(**world.MODEL), load_policy(Model(**world.MODEL), 0))
    hinted, parts = panel.read([silent("Good.", "Bad."), silent("Odd.")])
    assert parts[0] == {"judge": [1.0, -1.0, None], "judge/failed": 0.0} and hinted[0].turns[1].hints == (HINT,)
    assert parts[1] == Failure("judge", parts[1].reason) and "no valid vote of 3" in parts[1].reason


def test_a_local_model_repeats_itself_for_the_same_seed(judge_model):
    answering = local(load_policy(Model(path=judge_model, device="cpu")), SamplingParams(temperature=3.0, max_tokens=9))
    prompts = [({"role": "user", "content": "Good."},)] * 3
    first = answering(prompts, 5)
    assert answering(prompts, 5) == first != answering(prompts, 6)
    assert len(set(first)) > 1, "votes of one turn are drawn apart"


# --------------------------------------------------------------------------------------------------------------- server


@pytest.fixture(scope="module")
def server(judge_model):
    """That model behind a real HTTP server; the model that is asked for may have a fault planted in it."""
    policy, lock, count = load_policy(Model(path=judge_model, device="cpu")), threading.Lock(), [0]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            fault = asked["model"]
            with lock:
                count[0] += 1
                number = count[0]
                params = SamplingParams(
                    temperature=asked["temperature"], max_tokens=asked["max_tokens"], seed=asked["seed"]
                )
                (turn,) = policy.sampler([policy.words.context(tuple(asked["messages"]))], params)
            if fault == "slow" or (fault == "sometimes" and number % 3 == 0):
                time.sleep(1.0)
            if fault == "cut":
                return
            answer = {"choices": [{"message": {"content": policy.words.reply(turn.action)}}]}
            bodies = {"garbage": b"<html>", "empty": b"{}", "null": b'{"choices": [{"message": {"content": null}}]}'}
            bodies |= {"nonsense": b'{"choices": [{"message": {"content": "as an assistant"}}]}'}
            body = bodies.get(fault, json.dumps(answer).encode())
            self.send_response(500 if fault == "broken" else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 64  # with 5, as it comes, connections are reset where the machine is busy

        def handle_error(self, *_):  # a client that gave up is what some of these tests plant
            pass

    serving = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{serving.server_port}/v1"
    serving.shutdown()
    serving.server_close()


def panel_at(url, model="good", votes=1, timeout=20.0):
    answering = over_http(url, model, temperature=0.2, max_tokens=60, timeout=timeout)
    return Panel(by_model(answering, ASKED), votes)


def test_a_server_judges_as_the_model_behind_it_does(server):
    settings = Judge(who=server, model="good", ask=ASKED, votes=3, temperature=0.2, max_tokens=60)
    panel = open_judge(settings, Model(**world.MODEL), load_policy(Model(**world.MODEL), 0))
    hinted, parts = panel.read([silent("Good.", "Bad.") for _ in range(12)])
    assert parts == [{"judge": [1.0, -1.0, None], "judge/failed": 0.0}] * 12
    assert {rollout.turns[1].hints for rollout in hinted} == {(HINT,)}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("slow", "timed out"),
        ("broken", "HTTPError: HTTP Error 500"),
        ("garbage", "JSONDecodeError"),
        ("empty", "KeyError: 'choices'"),
        ("null", "no \\boxed"),
        ("nonsense", "no \\boxed"),
        ("cut", "RemoteDisconnected"),
    ],
)
def test_a_server_that_fails_in_every_vote_gives_a_failure(server, fault, reason):
    (found,) = panel_at(server, fault, votes=2, timeout=0.3)([silent("Good.")])
    assert isinstance(found, Failure) and found.where == "judge"
    assert "no valid vote of 2" in found.reason and reason in found.reason


def test_a_server_that_is_not_there_gives_a_failure():
    (found,) = panel_at("http://127.0.0.1:9/v1")([silent("Good.")])
    assert isinstance(found, Failure) and "URLError" in found.reason and "127.0.0.1:9" in found.reason


def test_votes_that_came_in_time_are_enough(server):
    (found,) = panel_at(server, "sometimes", votes=3, timeout=0.5)([silent("Good.")])
    assert found["judge"] == [1.0, None] and 0 < found["judge/failed"] < 1


def test_requests_are_under_way_at_the_same_time(server):
    start = time.perf_counter()
    panel_at(server, "slow", votes=8)([silent("Good.")])
    assert time.perf_counter() - start < 4, "one after the other they would sleep for 8 seconds"


def test_a_server_of_transformers_judges(judge_model):
    """A real one, with a model that says something valid of one reply and nonsense of another, and too little time."""
    command = [os.path.join(os.path.dirname(sys.executable), "transformers"), "serve", judge_model, "--port", "8127"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([*command, "--device", "cpu"], env=env)
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen("http://127.0.0.1:8127/health", timeout=1)
                break
            except OSError:
                time.sleep(1)
        panel = panel_at("http://127.0.0.1:8127/v1", judge_model, votes=2, timeout=60.0)
        found, failed = panel([silent("Good.", "Bad."), silent("Odd.")])
        assert found == {"judge": [1.0, -1.0, None], "judge/failed": 0.0}
        assert isinstance(failed, Failure) and "no \\boxed" in failed.reason
        (late,) = panel_at("http://127.0.0.1:8127/v1", judge_model, timeout=1e-3)([silent("Good.")])
        assert isinstance(late, Failure) and "timed out" in late.reason
    finally:
        process.terminate()
        process.wait(timeout=30)


# -------------------------------------------------------------------------------------------------------------- scoring


def staged(rewards, who="tropism.envs.user:judge"):
    return Stage(name="s", method=OpenClaw(), env=resolve_env(), rewards=rewards, judge=Judge(who=who))


def resolve_env():
    return resolve({"method": "grpo", "env": "user"}).stages[0].env


def scored(stage, rollouts, panel):
    source = open_source("user", {}, split="train", seed=0)
    return scoring(stage, stage.env, source, panel)(rollouts)


def test_its_scores_are_weighted_like_any_part_and_its_hints_stay_on_the_turns():
    complaint = TASTES["short"][1]
    rollout = talked("Thank you. Name one bird.", f"{complaint} Name one tree.")
    (found,) = scored(staged({"judge": 0.5}), [rollout], Panel(by_function(judge)))
    assert [turn.reward for turn in found.turns] == [0.5, -0.5, 0.0] and found.rewards["judge"] == 0.0
    assert [turn.hints for turn in found.turns] == [(), (complaint,), ()] and found.failure is None


def test_where_it_never_applies_or_never_votes_the_rollout_fails():
    never, mute = scored(staged({"judge": 1.0}), [talked(), talked("a")], Panel(said(Failure("judge", "gone"))))
    assert "no reward applies" in never.failure.reason
    assert mute.failure == Failure("judge", "no valid vote of 1: gone") and mute.reward == 0


def test_without_a_weight_it_is_recorded_only():
    (found,) = scored(staged({}), [talked("Thank you.")], Panel(by_function(judge)))
    assert found.rewards == {"pleased": 0.0, "judge": 1.0} and found.reward == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"who": ""}, "judge.who is empty"),
        ({"who": "a.py:f", "votes": 0}, "judge.votes is 0"),
        ({"who": "a.py:f", "timeout": 0.0}, "judge.timeout is 0.0"),
        ({"who": "http://x/v1"}, "a server is asked for one of its models by name"),
        ({"who": "a.py:f", "model": "m"}, "and nothing else is"),
        ({"who": "m", "ask": "{reply}?"}, "must show the judge"),
        ({"who": "m", "temperature": -1.0}, "temperature is -1.0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Judge(**settings)


def test_a_judge_that_is_no_function_is_refused():
    with pytest.raises(ConfigError, match="is a type, but must be a function"):
        open_judge(Judge(who="tropism.envs.user:User"), None, None)


def test_a_recipe_names_a_judge_by_a_word_or_a_section():
    short = resolve({"method": "openclaw", "env": "user", "judge": "x.py:f"}, ["judge.votes=3"])
    assert short.stages[0].judge == Judge(who="x.py:f", votes=3)
    with pytest.raises(ConfigError, match=r"Did you mean judge\.votes"):
        resolve({"method": "openclaw", "env": "user", "judge": {"who": "x.py:f", "vots": 3}})
    with pytest.raises(ConfigError, match="has a judge, but reads data"):
        resolve({"method": "sft", "data": "rows.jsonl", "judge": "x.py:f"})


def test_what_a_judge_draws_depends_on_the_run_s_seed_and_on_the_step():
    drawn = []
    for seed, version in ((0, 1), (0, 1), (0, 2), (7, 1)):
        panel = Panel(lambda asked, seed: drawn.append(seed) or [Vote(1) for _ in asked], seed=seed)
        panel([replace(talked("a"), version=version)])
    assert drawn[0] == drawn[1] and len(set(drawn)) == 3


def test_the_shortest_hint_comes_first():
    votes = [Vote(1, ("a longer one than that", "the middle one"))]
    assert decided(votes).hints[0] == "the middle one"
