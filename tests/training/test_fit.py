import json

import pytest
import torch

from small import rollout, small
from small import turn as said_turn
from tropism.config import Data, Named, Told
from tropism.errors import ConfigError, GuardStopped
from tropism.teacher import Teacher
from tropism.training.checkpoint import State
from tropism.training.collate import collate
from tropism.training.fit import Reading, load_rows, order, sifted, usable
from tropism.training.model import byte_tokenizer

POLICY = small()
U = {"role": "user", "content": "q1"}
A = {"role": "assistant", "content": "r1"}
T = {"role": "tool", "content": "t"}
B = {"role": "assistant", "content": "r2"}


def read(tmp_path, rows, words=POLICY.words, context=1000):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_rollouts(Data(path=str(path)), words, seed=0, context=context)


def load_rollouts(*args, **kwargs):
    return [one for row in load_rows(*args, **kwargs) for one in row]


def trained(rollouts):
    """(everything that is read, what is learned from), as text, row by row."""
    batch, decode = collate(rollouts, codes={}), POLICY.tokenizer.decode
    rows = [decode(row[:length]) for row, length in zip(batch.tokens, batch.length, strict=True)]
    return [(text, decode(row[mask])) for text, row, mask in zip(rows, batch.tokens, batch.action_mask, strict=True)]


def test_every_assistant_message_is_learned_from_and_nothing_else(tmp_path):
    whole = "<|user|>q1<|end|><|assistant|>r1<|end|><|tool|>t<|end|><|assistant|>r2<|end|>"
    assert trained(read(tmp_path, [{"messages": [U, A, T, B]}])) == [(whole, "r1<|end|>r2<|end|>")]


def test_messages_after_the_last_reply_are_not_read(tmp_path):
    assert trained(read(tmp_path, [{"messages": [U, A, T]}])) == [
        ("<|user|>q1<|end|><|assistant|>r1<|end|>", "r1<|end|>")
    ]


def test_a_completion_is_learned_from_and_its_prompt_is_not(tmp_path):
    assert trained(read(tmp_path, [{"prompt": "2 + 2 =", "completion": " 4"}])) == [("2 + 2 = 4<|end|>", " 4<|end|>")]


def test_a_conversational_prompt_may_hold_earlier_replies_which_are_not_learned_from(tmp_path):
    whole = "<|user|>q1<|end|><|assistant|>r1<|end|><|tool|>t<|end|><|assistant|>r2<|end|>"
    assert trained(read(tmp_path, [{"prompt": [U, A, T], "completion": [B]}])) == [(whole, "r2<|end|>")]


def test_a_text_is_learned_from_after_its_first_token(tmp_path):
    assert trained(read(tmp_path, [{"text": "abc"}, {"text": "d"}])) == [
        ("abc<|end|>", "bc<|end|>"),
        ("d<|end|>", "<|end|>"),
    ]


def test_a_text_keeps_its_first_token_where_a_model_starts_with_one(tmp_path):
    from tokenizers.processors import TemplateProcessing

    from tropism.rollout.render import Render

    tokenizer = byte_tokenizer()
    tokenizer.bos_token = "<|pad|>"
    start = TemplateProcessing(single="<|pad|> $A", special_tokens=[("<|pad|>", tokenizer.pad_token_id)])
    tokenizer.backend_tokenizer.post_processor = start
    words = Render(tokenizer, [tokenizer.eos_token_id])
    assert trained(read(tmp_path, [{"text": "abc"}], words)) == [("<|pad|>abc<|end|>", "abc<|end|>")]


def test_nobody_sampled_it(tmp_path):
    (one,) = read(tmp_path, [{"text": "abc"}])
    assert one.turns[0].logp is None and one.failure is None and one.task.columns == {"text": "abc"}


@pytest.mark.parametrize(
    "row",
    [
        {"question": "q", "answer": "a"},
        {"messages": [U]},
        {"prompt": "p"},
        {"prompt": "p", "completion": None},
        {"text": None},
    ],
)
def test_a_row_without_anything_to_learn_is_refused(tmp_path, row):
    with pytest.raises(ConfigError, match=f"row 1 has the columns {', '.join(row)}.* needs messages") as error:
        read(tmp_path, [{"text": "ok"}, row])
    assert "prompt and completion, or text" in str(error.value)


@pytest.mark.parametrize(
    "row",
    [{"messages": "hello"}, {"messages": [{"role": "user"}]}, {"messages": [U, {"role": "assistant", "content": None}]},
     {"prompt": [U], "completion": "text"}, {"messages": [{"from": "human", "value": "hi"}]}],
)  # fmt: skip
def test_messages_of_another_form_are_refused(tmp_path, row):
    with pytest.raises(ConfigError, match=r"row 0.*role.*content"):
        read(tmp_path, [row])


def test_an_epoch_reads_every_row_once_and_the_next_in_another_order(tmp_path):
    rollouts = read(tmp_path, [{"text": f"row {n}"} for n in range(10)])
    state, draw = State(), Reading([(one,) for one in rollouts], 4, seed=1)
    seen = [one.group for _ in range(5) for one in draw(state)]
    assert state.cursor == 20
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]
    assert seen[:10] != list(range(10))
    again = State(cursor=8)
    assert [one.group for one in draw(again)] == seen[8:12]
    assert [one.group for one in Reading([(one,) for one in rollouts], 4, seed=2)(State())] != seen[:4]
    assert order(10, 1, 1) is order(10, 1, 1) and list(order(10, 1, 1)) == seen[10:], "drawn once an epoch"


def test_a_batch_may_be_larger_than_the_data(tmp_path):
    rollouts = read(tmp_path, [{"text": "a"}, {"text": "b"}])
    groups = [one.group for one in Reading([(one,) for one in rollouts], 5, seed=0)(State())]
    assert sorted(groups[:4]) == [0, 0, 1, 1] and set(groups[:2]) == {0, 1}


def test_demonstrations_are_what_the_environment_says_itself():
    data = Data(demos=Named(name="tictactoe"), episodes=6)
    rollouts = load_rollouts(data, POLICY.words, seed=0)
    assert len(rollouts) == 6 and {one.task.seat for one in rollouts} == {0, 1}
    for turn in (turn for one in rollouts for turn in one.turns):
        assert POLICY.words.reply(turn.action) == turn.reply and turn.action[-1] in POLICY.words.stop_ids
        assert turn.context == POLICY.words.context(turn.prompt) and turn.reply[-3:] in {f"[{n}]" for n in range(1, 10)}
    again = load_rollouts(data, POLICY.words, seed=0)
    assert [one.turns for one in again] == [one.turns for one in rollouts]
    assert [one.turns for one in load_rollouts(data, POLICY.words, seed=1)] != [one.turns for one in rollouts]


def test_an_environment_that_cannot_demonstrate_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{n}"}) + "\n" for n in range(40)))
    data = Data(demos=Named(name="dataset", options={"path": str(path)}))
    with pytest.raises(ConfigError, match="no `demonstrate`"):
        load_rollouts(data, POLICY.words, seed=0)


def test_what_is_learned_has_a_log_probability(tmp_path):
    batch = collate(read(tmp_path, [{"messages": [U, A, T, B]}, {"text": "x"}]), codes={})
    with torch.no_grad():
        logp = POLICY.forward(batch).logp
    assert (logp[batch.action_mask] < 0).all() and (logp[~batch.action_mask] == 0).all()


def test_what_the_model_cannot_read_whole_is_a_failure_and_not_learned_from(tmp_path):
    """abcdefg and the end are eight tokens."""
    short, long = read(tmp_path, [{"text": "abcdefg"}, {"text": "abcdefgh"}], context=8)
    assert short.failure is None and long.failure is not None
    assert "has 9 tokens but the model reads at most 8." in long.failure.reason
    assert trained([short, long]) == [("abcdefg<|end|>", "bcdefg<|end|>")]


THREE = {"config": {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1}, "worked": 1.0}


@pytest.mark.parametrize("wrong", [0.0, 0.5, 1.0])
def test_a_share_of_the_demonstrations_answers_what_a_teacher_may_read_right_or_wrong(wrong):
    teacher = Teacher(reads=("worked",), say={"worked": "hint: {}"}, closing="")
    data = Data(
        demos=Named(name="reasoning", options=THREE), episodes=200, told=Told(teacher=teacher, share=0.5, wrong=wrong)
    )
    said = [rollout.turns[0] for rollout in load_rollouts(data, POLICY.words, seed=0)]
    tasks = [rollout.task.columns for rollout in load_rollouts(data, POLICY.words, seed=0)]
    told = [n for n, turn in enumerate(said) if "hint: " in turn.prompt[0]["content"]]
    assert 80 < len(told) < 120
    misled = [n for n in told if said[n].reply == tasks[n]["decoy"]]
    assert len(misled) == pytest.approx(wrong * len(told), abs=15)
    for n, turn in enumerate(said):
        assert turn.reply == tasks[n]["decoy" if n in misled else "worked"]
        if n in told:
            assert turn.prompt[0]["content"].endswith(f"\n\nhint: {turn.reply}")
        assert POLICY.tokenizer.decode(turn.context) == POLICY.words.text(turn.prompt, opening=True)


def test_only_an_environment_that_advises_can_tell(tmp_path):
    (tmp_path / "mute.py").write_text("from world import World\n\n\nclass Mute(World):\n    pass\n")
    teacher = Teacher(reads=("worked",))
    with pytest.raises(ConfigError, match="has no `advise`"):
        load_rollouts(
            Data(demos=Named(name=f"{tmp_path}/mute.py:Mute"), told=Told(teacher=teacher)), POLICY.words, seed=0
        )
    with pytest.raises(ConfigError, match=r"data.demos names none"):
        Data(path="rows.jsonl", told=Told(teacher=teacher))
    with pytest.raises(ConfigError, match=r"told.wrong is 2"):
        Told(teacher=teacher, wrong=2)
    with pytest.raises(ConfigError, match=r"reads nothing"):
        Told(teacher=Teacher())


def test_a_teacher_of_whose_readings_nothing_is_ever_advised_is_refused():
    told = Told(teacher=Teacher(reads=("follow_up",)))
    with pytest.raises(
        ConfigError, match=r"reads follow_up, but in 20 episodes reasoning advised nothing of that name"
    ):
        load_rollouts(Data(demos=Named(name="reasoning", options=THREE), episodes=20, told=told), POLICY.words, seed=0)


# --------------------------------------------------------------------------------------------------------- preferences

PAIRS, LABELS, STEPS = (frozenset({kind}) for kind in ("pairs", "labels", "steps"))


def preferred(tmp_path, rows, asked=PAIRS, context=1000):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_rows(Data(path=str(path)), POLICY.words, seed=0, context=context, asked=asked)


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "q: ", "chosen": "good", "rejected": "bad"}, "q: "),
        ({"prompt": [U], "chosen": [A], "rejected": [B]}, (U,)),
        ({"chosen": "a cat is good", "rejected": "a cat is bad"}, "a cat is"),
        ({"chosen": [U, A], "rejected": [U, B]}, (U,)),
    ],
)
def test_a_pair_is_two_answers_to_one_prompt_the_chosen_one_first(tmp_path, row, prompt):
    ((chosen, rejected),) = preferred(tmp_path, [row])
    assert (chosen.success, rejected.success, chosen.group == rejected.group) == (True, False, True)
    said = [one.turns[0].reply.strip() for one in (chosen, rejected)]
    assert said in (["good", "bad"], ["r1", "r2"]) and chosen.failure is None
    for one in (chosen, rejected):
        given = one.turns[0].prompt
        assert (given if isinstance(given, str) else tuple(given)) == prompt
    batch = collate([chosen, rejected], codes={})
    assert len(batch) == 2 and batch.success.tolist() == [True, False] and batch.behavior_logp is None


def test_an_implicit_prompt_is_split_as_trl_splits_it(tmp_path):
    from trl.data_utils import extract_prompt

    rows = [("the sky is blue", "the sky is green"), ("yes", "no"), ("ab cd", "ab ce"), ("a b", "a b c"), (" x", " y")]
    for chosen, rejected in rows:
        wanted = extract_prompt({"chosen": chosen, "rejected": rejected})
        ((one, other),) = preferred(tmp_path, [{"chosen": chosen, "rejected": rejected}])
        assert (one.turns[0].prompt, one.turns[0].reply, other.turns[0].reply) == tuple(
            wanted[name] for name in ("prompt", "chosen", "rejected")
        )


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q", "chosen": "same", "rejected": "same"}, "row 1 has the same answer twice"),
        ({"prompt": "q", "chosen": "good", "rejected": " "}, "row 1 has an empty answer"),
        ({"prompt": "q", "chosen": "", "rejected": "bad"}, "row 1 has an empty answer"),
        ({"prompt": "q", "chosen": "good", "rejected": "b" * 60}, "row 1 has 62 tokens but the model reads at most 50"),
    ],
)
def test_a_pair_that_cannot_be_used_is_two_failures_that_say_why(tmp_path, row, reason):
    good, bad = preferred(tmp_path, [{"prompt": "q", "chosen": "good", "rejected": "bad"}, row], context=50)
    assert all(one.failure is None for one in good)
    assert all(one.failure.where == "data" and one.failure.reason.startswith(reason) for one in bad)
    assert len(collate([*good, *bad], codes={})) == 2


def test_how_strong_a_preference_is_becomes_the_chosen_answers_reward(tmp_path):
    row = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    pairs = preferred(tmp_path, [row | {"margin": 0.7}, row | {"margin": None}, row])
    assert [[one.reward for one in pair] for pair in pairs] == [[0.7, 0.0], [0.0, 0.0], [0.0, 0.0]]
    for margin in ("much", -1.0):
        with pytest.raises(ConfigError, match=r"row 0 has the margin .* is 0 or more"):
            preferred(tmp_path, [row | {"margin": margin}])


def test_labels_say_which_answers_are_desirable(tmp_path):
    row = {"prompt": "q", "completion": "a"}
    assert [one.success for (one,) in preferred(tmp_path, [row | {"label": x} for x in (True, False)], LABELS)] == [
        True,
        False,
    ]
    for label in (None, 1, "yes"):
        with pytest.raises(
            ConfigError, match=r"row 0 has label .*, but this method learns from answers that are good or bad"
        ):
            preferred(tmp_path, [row | {"label": label}], LABELS)


def test_steps_are_turns_that_earn_their_label(tmp_path):
    """Each ends with a line break, the last with the end of the reply; a whole answer is one step."""
    rows = [
        {"prompt": "q: ", "completions": ["one\n", "two"], "labels": [True, 0.25]},
        {"prompt": [U], "completion": [A], "label": False},
    ]
    (first,), (second,) = preferred(tmp_path, rows, STEPS)
    decode, (end, *_) = POLICY.tokenizer.decode, POLICY.words.stop_ids
    assert [(decode(t.action), t.reward) for t in first.turns] == [("one\n", 1.0), (f"two{decode([end])}", 0.25)]
    assert decode(first.turns[1].context) == "q: one\n" and first.reward == 1.25 and first.success
    assert [(t.reply, t.reward) for t in second.turns] == [(A["content"], 0.0)] and not second.success
    (row,) = collate([first], codes={}).turn
    assert row.max() == 1  # both on one row


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "q", "completions": ["a"], "labels": [True, False]}, "completions and labels of one length"),
        ({"prompt": "q", "completions": [], "labels": []}, "completions and labels of one length"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "it needs prompt"),
        ({"prompt": "q", "completion": "a", "label": 2}, "true, false or a probability"),
        ({"prompt": "q", "completions": ["a\nb", "c"], "labels": [True, True]}, "each is one line"),
        ({"prompt": "q", "completions": ["a", " "], "labels": [True, True]}, "each is one line"),
    ],
)
def test_steps_of_another_form_are_refused(tmp_path, row, says):
    with pytest.raises(ConfigError, match=says):
        preferred(tmp_path, [row], STEPS)


def test_rows_of_another_kind_are_refused(tmp_path):
    with pytest.raises(
        ConfigError, match="row 0 has the columns prompt, completion, but this method learns from pairs"
    ):
        preferred(tmp_path, [{"prompt": "q", "completion": "a"}])


def test_a_pair_drawn_twice_in_a_batch_is_two_pairs(tmp_path):
    draw = Reading(preferred(tmp_path, [{"prompt": "q", "chosen": c, "rejected": "bad"} for c in "abc"]), 7, seed=0)
    drawn = draw(State())
    assert len(drawn) == 14 and len({one.group for one in drawn}) == 7
    assert all(a.success and not b.success and a.group == b.group for a, b in zip(drawn[::2], drawn[1::2], strict=True))


def test_in_balanced_pairs_the_longer_answer_is_the_chosen_one_as_often_as_not(tmp_path):
    """Five pairs prefer the longer answer, two the shorter one, which are read again and again, and one neither."""
    answers = [("aaa" + "a" * n, "b") for n in range(5)] + [("a", "bbb"), ("a", "bbbb"), ("a", "b")]
    rows = preferred(tmp_path, [{"prompt": "q", "chosen": chosen, "rejected": other} for chosen, other in answers])
    draw, state = Reading(rows, 11, seed=0, balance=True), State()
    for _ in range(2):
        said = [(a.turns[-1].reply, b.turns[-1].reply) for a, b in zip(*[iter(draw(state))] * 2, strict=True)]
        assert sorted(said[0:]) == sorted([*answers[:5], *[answers[5]] * 3, *[answers[6]] * 2, answers[7]])
    with pytest.raises(ConfigError, match="of 5 there are 5 and 0"):
        Reading(rows[:5], 4, seed=0, balance=True)(State())


def test_rows_that_cannot_be_used_are_left_out_and_listed_and_too_many_stop_the_run(tmp_path):
    row, said = {"prompt": "q", "chosen": "good", "rejected": "bad"}, []
    rows = preferred(tmp_path, [row, row | {"rejected": "good"}, row])
    kept, why = sifted(rows, 0.5, said.append)
    assert [one.group for one, _ in kept] == [0, 2] and len(why) == 1 and "row 1 has the same answer twice" in why[0]
    assert said[0].startswith("1 of 3 rows cannot be used and are left out") and why[0] in said[0]
    with pytest.raises(GuardStopped, match=r"1 of 3 rows cannot be used, more than train.failure_limit = 0.1 allows"):
        sifted(rows, 0.1, said.append)
    with pytest.raises(GuardStopped, match="1 of 1 rows"):
        sifted(rows[1:2], 1.0, said.append)
    assert sifted(kept, 0.0, said.append) == (kept, []) and len(said) == 1


def test_labelled_answers_count_once_each():
    """One that is several rows would count several times; pairs are refused likewise, and single answers are not."""
    twice = (rollout(said_turn([1, 2], [3], reply="a"), said_turn([7, 8], [9], reply="b")),)
    assert usable(twice, 100)[0].failure is None
    (found,) = usable(twice, 100, frozenset({"labels"}))
    assert "several turns that the chat template does not write" in found.failure.reason
