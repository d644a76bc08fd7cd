import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from small import rollout
from tropism.errors import ConfigError
from tropism.rollout.render import Render
from tropism.training.collate import collate, rows_of
from tropism.training.model import byte_tokenizer
from tropism.types import Stop, Turn

END = "<|end|>"
FORGETFUL = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Drops the reasoning of past turns, as Qwen3's and DeepSeek-R1's templates do."""


def words(template=None, *, plain=False):
    tokenizer = byte_tokenizer()
    if template:
        tokenizer.chat_template = template
    if plain:
        tokenizer.chat_template = None
    return Render(tokenizer, [tokenizer.eos_token_id])


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def answered(render, prompt, reply, before=None, stop=Stop.finished):
    """A turn as `play` makes it: sampled ids, and the words that the environment heard."""
    action = [
        *render.tokenizer(reply, add_special_tokens=False).input_ids,
        *([render.stop_ids[0]] if stop is Stop.finished else []),
    ]
    context = render.context(prompt, before)
    return Turn(context=context, action=action, prompt=prompt, reply=render.reply(action), stop=stop)


def spoken(render, ids):
    return render.tokenizer.decode(ids)


def test_messages_go_through_the_chat_template():
    render = words()
    context = render.context((user("hi"),))
    assert spoken(render, context) == "<|user|>hi<|end|><|assistant|>"
    assert len(context) == 5


def test_a_text_is_given_as_it_is_even_to_a_chat_model():
    render = words()
    assert spoken(render, render.context("2 + 2 =")) == "2 + 2 ="


def test_messages_of_a_model_without_a_template_are_lines():
    render = words(plain=True)
    assert spoken(render, render.context((user("one"), user("two")))) == "one\ntwo\n"


def test_an_empty_prompt_starts_with_one_token():
    assert words().context("") == [words().stop_ids[0]]


@pytest.mark.parametrize("stop", [*Stop])
def test_a_context_extends_the_conversation_token_for_token(stop):
    """Also after a reply that ran into the limit: the end that it lacks stands outside the action."""
    render = words()
    first = answered(render, (user("a"),), "bc", stop=stop)
    context = render.context((user("a"), assistant("bc"), user("d")), first)
    assert context[: len(first.context) + len(first.action)] == [*first.context, *first.action]
    assert spoken(render, context) == "<|user|>a<|end|><|assistant|>bc<|end|><|user|>d<|end|><|assistant|>"


def test_three_turns_stand_on_one_row_and_only_replies_are_actions():
    """Nothing that the policy did not write is an action: neither questions, nor a tool's answer, nor role marks."""
    render = words()
    history, turns = [user("q1")], []
    for reply, heard in (("r1", {"role": "tool", "content": "t"}), ("r2", user("q2")), ("r3", None)):
        turns.append(answered(render, tuple(history), reply, turns[-1] if turns else None))
        history += [assistant(reply), *([heard] if heard else [])]
    assert len(rows_of([rollout(*turns)])) == 1
    batch = collate([rollout(*turns)], codes={})
    row, mask = batch.tokens[0], batch.action_mask[0]
    first, second, third = (
        "<|user|>q1<|end|><|assistant|>r1<|end|>",
        "<|tool|>t<|end|><|assistant|>r2<|end|>",
        "r3<|end|>",
    )
    assert spoken(render, row) == f"{first}{second}<|user|>q2<|end|><|assistant|>{third}"
    assert spoken(render, row[mask]) == "r1<|end|>r2<|end|>r3<|end|>"


def test_a_template_that_forgets_past_reasoning_makes_the_context_afresh_and_a_new_row():
    render = words(FORGETFUL)
    first = answered(render, (user("a"),), "hm</think>b")
    prompt = (user("a"), assistant("hm</think>b"), user("c"))
    second = answered(render, prompt, "d", first)
    assert spoken(render, second.context) == "<|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>"
    assert len(rows_of([rollout(first, second)])) == 2
    remembering = answered(words(), prompt[:1], "hm</think>b")
    assert len(rows_of([rollout(remembering, answered(words(), prompt, "d", remembering))])) == 1


def beginning(template=None):
    """A tokenizer that puts <|pad|> before every text, as Llama's puts <s>."""
    render = words(template, plain=template is None)
    mark = ("<|pad|>", render.tokenizer.pad_token_id)
    post = TemplateProcessing(single="<|pad|> $A", special_tokens=[mark])
    render.tokenizer.backend_tokenizer.post_processor = post
    return render


def test_a_text_begins_once_and_never_again():
    render = beginning()
    first = answered(render, "Q", "A")
    assert spoken(render, first.context) == "<|pad|>Q"
    assert spoken(render, render.context("QAQ", first)) == f"<|pad|>QA{END}Q"
    assert spoken(render, render.context((user("a"),))) == "<|pad|>a\n"
    assert spoken(render, render.action("Q", "A")) == f"A{END}"


def test_a_chat_template_writes_its_own_beginning():
    render = beginning("<|pad|>" + FORGETFUL)
    assert spoken(render, render.context((user("a"),))) == f"<|pad|><|user|>a{END}<|assistant|>"


def test_a_prompt_of_another_kind_gets_a_fresh_context():
    render = words()
    chat, text = answered(render, (user("a"),), "b"), answered(render, "a", "b")
    assert render.context("ab", chat) == render.context("ab")
    assert render.context((user("ab"),), text) == render.context((user("ab"),))


def test_what_came_after_no_prompt_is_not_continued():
    render = words()
    loose = Turn(context=[5], action=[7, render.stop_ids[0]], reply="b")
    assert render.context("bc", loose) == render.context("bc")


def test_an_environment_that_shows_no_past_gets_a_fresh_context():
    render = words()
    first = answered(render, (user("board 1"),), "[5]")
    assert render.context((user("board 2"),), first) == render.context((user("board 2"),))


@pytest.mark.parametrize("stop", [*Stop])
def test_plain_texts_extend_too(stop):
    render = words(plain=True)
    first = answered(render, "Q: 1+1\nA:", " 2", stop=stop)
    context = render.context("Q: 1+1\nA: 2\nQ: 2+2\nA:", first)
    assert context[: len(first.context) + len(first.action)] == [*first.context, *first.action]
    end = END if stop is Stop.finished else ""
    assert spoken(render, context) == f"Q: 1+1\nA: 2{end}\nQ: 2+2\nA:"


def test_messages_of_a_model_without_a_template_extend_too():
    render = words(plain=True)
    first = answered(render, (user("a"),), "b")
    context = render.context((user("a"), assistant("b"), user("c")), first)
    assert context[: len(first.context) + len(first.action)] == [*first.context, *first.action]
    assert spoken(render, context) == f"a\nb{END}\nc\n"


def merging():
    """BPE that knows `ab` as one token, so that the sampled ids a, b do not survive a trip through their text."""
    inner = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2, "?": 3}, merges=[("a", "b")]))
    inner.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    inner.decoder = decoders.Fuse()
    return Render(PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END), [4])


def test_ids_stay_as_sampled_where_their_text_would_become_other_ids():
    render = merging()
    assert render.tokenizer("ab").input_ids == [2]
    first = Turn(context=render.context("?"), action=[0, 1, 4], prompt="?", reply=render.reply([0, 1, 4]))
    assert first.reply == "ab"
    assert render.context("?ab?", first) == [3, 0, 1, 4, 3]
    assert render.context("?ab?") == [3, 2, 3]


def spaced():
    """SentencePiece's habit, as Llama 2 and Mistral have it: a space before the first word of whatever is tokenized."""
    letters = {piece: n for n, piece in enumerate(["▁", "a", "b", "q", "\n", "▁a", "▁b", "▁q"])}
    inner = Tokenizer(models.BPE(vocab=letters, merges=[("▁", "a"), ("▁", "b"), ("▁", "q")]))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END)
    return Render(tokenizer, [tokenizer.eos_token_id])


@pytest.mark.parametrize("reply", ["a b", "b", " a"])
def test_words_that_follow_others_get_no_space_before_them(reply):
    render = spaced()
    prompt = "q\n"
    given = [*render.context(prompt), *render.action(prompt, reply)]
    assert given == render.tokenizer(prompt + reply).input_ids + list(render.stop_ids)
    first = Turn(context=render.context(prompt), action=given[2:], prompt=prompt, reply=reply)
    extended = render.context(f"{prompt}{reply}a b", first)
    assert extended[: len(given)] == given
    assert render.tokenizer.convert_ids_to_tokens(extended[len(given) :]) == ["a", "▁b"]


def test_bytes_of_a_character_that_was_cut_stay_as_sampled():
    """Half of é reads as U+FFFD, which is three other bytes: only the ids know what was said."""
    render = words()
    half = render.tokenizer("é").input_ids[:1]
    prompt, said = (user("a"),), render.reply(half)
    first = Turn(context=render.context(prompt), action=half, prompt=prompt, reply=said, stop=Stop.truncated)
    context = render.context((*prompt, assistant(said), user("b")), first)
    assert context[: len(first.context) + 1] == [*first.context, *half]


@pytest.mark.parametrize("text", ["é → 漢", "🙂", " two  spaces ", "\n\t", "don ' t , no !", "a\u0301", ""])
def test_every_text_survives_the_byte_tokenizer(text):
    render = words()
    ids = render.tokenizer(text).input_ids
    assert len(ids) == len(text.encode())
    assert render.reply(ids) == text and render.reply([*ids, *render.stop_ids]) == text


def test_a_stop_token_is_not_a_word_and_only_the_last_one_is_taken_away():
    render = words()
    end = render.stop_ids[0]
    assert render.reply([*render.tokenizer("a").input_ids, end]) == "a"
    assert render.reply([end]) == "" and render.reply([]) == ""


def test_any_of_several_stop_tokens_ends_a_reply():
    tokenizer = byte_tokenizer()
    render = Render(tokenizer, [tokenizer.eos_token_id, tokenizer.pad_token_id])
    assert render.reply([*tokenizer("a").input_ids, tokenizer.pad_token_id]) == "a"


@pytest.mark.parametrize("prompt", ["text", (user("a"),)])
@pytest.mark.parametrize("plain", [True, False])
def test_a_given_reply_ends_with_the_stop_token(prompt, plain):
    render = words(plain=plain)
    assert spoken(render, render.action(prompt, "yes")) == f"yes{END}"


def test_a_given_reply_reads_as_the_template_writes_it():
    """What the template trims or adds is part of what the model will read later, so it is what it must learn to say."""
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}.<|end|>{% endfor %}"
    template += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    render = words(template)
    assert spoken(render, render.action((user("a"),), "  yes ")) == f"yes.{END}"


def test_a_given_reply_ends_with_the_stop_token_that_ends_a_turn_in_the_template():
    """Gemma's template ends a turn with <end_of_turn> and Phi's with <|end|>, while eos is another token."""
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|pad|>\n{% endfor %}"
    template += "{% if add_generation_prompt %}<|assistant|>{% else %}<|end|>{% endif %}"
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    render = Render(tokenizer, [tokenizer.eos_token_id, tokenizer.pad_token_id])
    action = render.action((user("a"),), " yes")
    assert spoken(render, action) == "yes<|pad|>" and action[-1] == tokenizer.pad_token_id
    assert render.reply(action) == "yes"
    assert spoken(render, render.action("a", "yes")) == f"yes{END}"


def test_a_tokenizer_without_an_end_is_refused():
    with pytest.raises(ConfigError, match=r"no end-of-sequence token.*Set eos_token"):
        Render(byte_tokenizer(), [])
