import pytest

from small import small
from tropism.errors import ConfigError
from tropism.signals.contexts import Opening, available, chosen, contexts_of, fitting, opposite
from tropism.teacher import Teacher
from tropism.types import Rollout, Task, Turn

WORDS = small().words


def said(reply, *, success=False, prompt="2+2=", turns=1, **fields):
    turn = Turn(context=WORDS.context(prompt), action=WORDS.action(prompt, reply), prompt=prompt, reply=reply, **fields)
    task = Task(columns={"worked": "2+2 is 4", "empty": " "})
    return Rollout(task=task, group=0, turns=(turn,) * turns, success=success)


def read(teacher, opening):
    found = available(opening, [*teacher.reads, *teacher.against])
    return chosen(teacher, found), found


def text(teacher, opening, room=10_000):
    texts, _ = read(teacher, opening)
    (context,) = contexts_of(teacher, opening, texts, WORDS, room)
    return WORDS.tokenizer.decode(context.ids)


def test_paragraphs_follow_the_students_prompt_in_the_order_of_reads():
    teacher = Teacher(
        reads=("worked", "feedback"), say={"worked": "Solution: {}", "feedback": "Said: {}"}, closing="Go."
    )
    opening = Opening(said("5", feedback="too high"), 0, [])
    assert text(teacher, opening) == "2+2=\n\nSolution: 2+2 is 4\n\nSaid: too high\n\nGo."


def test_of_messages_the_last_of_the_user_gets_them():
    prompt = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"})
    found = text(
        Teacher(reads=("worked",), say={"worked": "({})"}, closing=""), Opening(said("5", prompt=prompt), 0, [])
    )
    assert found == "<|system|>Be brief.<|end|><|user|>2+2?\n\n(2+2 is 4)<|end|><|assistant|>"


def test_a_braced_text_is_read_as_it_is():
    teacher = Teacher(reads=("feedback",), say={"feedback": "{} {x}"}, closing="")
    assert text(teacher, Opening(said("5", feedback="use {} and {0}"), 0, [])).endswith("use {} and {0} {x}")


def test_a_sibling_is_the_first_other_one_that_succeeded():
    """Rewards 1, 0, 0, 1 show 3, 0, 0, 0, never one's own success. Huebotter et al. 2026, arXiv:2601.20802."""
    group = [said("a", success=True), said("b"), said("c"), said("d", success=True)]
    shown = [available(Opening(r, 0, group), ["sibling", "wrong_sibling"]) for r in group]
    assert [found["sibling"] for found in shown] == [("d",), ("a",), ("a",), ("a",)]
    assert [found["wrong_sibling"] for found in shown] == [("b",), ("c",), ("b",), ("b",)]
    alone = [said("a", success=True), said("b")]
    assert "sibling" not in available(Opening(alone[0], 0, alone), ["sibling"])


@pytest.mark.parametrize(
    ("need", "feedback", "expected"),
    [
        ("all", "no", None),
        ("any", "no", ["feedback"]),
        ("first", "no", ["feedback"]),
        ("all", None, None),
        ("any", None, None),
        ("first", None, None),
    ],
)
def test_what_a_teacher_needs(need, feedback, expected):
    teacher = Teacher(reads=("sibling", "feedback"), need=need)
    alone = said("a", feedback=feedback)
    found, _ = read(teacher, Opening(alone, 0, [alone]))
    assert (found and list(found)) == expected
    group = [alone, said("b", success=True)]
    found, _ = read(teacher, Opening(alone, 0, group))
    both = {"all": ["sibling", "feedback"], "any": ["sibling", "feedback"], "first": ["sibling"]}[need]
    if feedback is None:
        both = None if need == "all" else ["sibling"]
    assert (found and list(found)) == both


def test_what_is_blank_is_not_there():
    opening = Opening(said("a", feedback=" \n", hints=("",)), 0, [])
    assert available(opening, ["feedback", "empty", "hint", "follow_up", "missing"]) == {}


def test_the_opposite_stands_in_the_same_words():
    group = [said("right", success=True), said("wrong"), said("mine")]
    teacher = Teacher(reads=("sibling",), against=("wrong_sibling",), say={"sibling": "See {}."}, closing="")
    opening = Opening(group[2], 0, group)
    found, told = read(teacher, opening)
    (context,) = contexts_of(teacher, opening, opposite(teacher, found, told), WORDS, 100)
    assert WORDS.tokenizer.decode(context.ids) == "2+2=\n\nSee wrong."
    assert opposite(teacher, found, {"sibling": ("right",)}) is None


def test_a_follow_up_is_what_the_user_said_next():
    first = ({"role": "user", "content": "hi"},)
    second = (*first, {"role": "assistant", "content": "HELLO"}, {"role": "user", "content": "do not shout"})
    turns = [Turn(context=[1], action=[2], prompt=p, reply=r) for p, r in ((first, "HELLO"), (second, "sorry"))]
    rollout = Rollout(task=Task(), group=0, turns=tuple(turns))
    assert available(Opening(rollout, 0, []), ["follow_up"]) == {"follow_up": ("do not shout",)}
    assert available(Opening(rollout, 1, []), ["follow_up"]) == {}
    plain = [Turn(context=[1], action=[2], prompt=p, reply="4") for p in ("2+2=", "2+2=4 right. 3+3=")]
    plain = Rollout(task=Task(columns={"follow_up": "thanks"}), group=0, turns=tuple(plain))
    assert available(Opening(plain, 0, []), ["follow_up"]) == {"follow_up": (" right. 3+3=",)}
    assert available(Opening(plain, 1, []), ["follow_up"]) == {"follow_up": ("thanks",)}


def test_several_hints_give_several_contexts_only_to_a_teacher_that_chooses():
    opening = Opening(said("a", hints=("short", "longer")), 0, [])
    for select, expected in (("first", ["short"]), ("sequence", ["short", "longer"])):
        teacher = Teacher(reads=("hint",), say={"hint": "{}"}, closing="", top_k=2, select=select)
        found, _ = read(teacher, opening)
        contexts = contexts_of(teacher, opening, found, WORDS, 100)
        assert [WORDS.tokenizer.decode(c.ids) for c in contexts] == [f"2+2=\n\n{hint}" for hint in expected]


@pytest.mark.parametrize("room", [24, 30, 60])
def test_what_is_too_long_loses_the_end_of_what_is_read_and_never_the_closing_words(room):
    teacher = Teacher(reads=("feedback",), say={"feedback": "S: {}"}, closing="Now.")
    context = fitting(teacher, "2+2=", {"feedback": "0123456789" * 9}, WORDS, room)
    found = WORDS.tokenizer.decode(context.ids)
    assert context.cut and len(context.ids) <= room
    assert found.startswith("2+2=\n\nS: 0123") and found.endswith("\n\nNow.")
    assert len(context.ids) == room  # not more is cut than must be: a token is a byte here


def test_where_not_even_the_prompt_fits_there_is_no_context():
    teacher = Teacher(reads=("feedback",))
    assert fitting(teacher, "2+2=" * 10, {"feedback": "no"}, WORDS, 20) is None
    whole = fitting(teacher, "2+2=", {"feedback": "no"}, WORDS, 100)
    assert not whole.cut


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"who": ""}, "who is empty"),
        ({"rate": 0.0}, "rate is 0"),
        ({"every": 0}, "every is 0"),
        ({"reads": ("hint", "hint")}, "twice"),
        ({"reads": ("sibling", "hint"), "against": ("wrong_sibling",)}, "1 entries and teacher.reads 2"),
        ({"top_k": -1}, "top_k is -1"),
        ({"select": "token"}, "likeliest"),
        ({"say": {"hint": "no place"}}, "needs one {}"),
    ],
)
def test_a_teacher_that_cannot_be_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Teacher(**settings)
