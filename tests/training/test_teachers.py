"""A real tiny model distils from others, and a teacher that cannot teach is refused before the run begins."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import tropism
import world
from small import rollout, turn
from tropism.api import resolved_recipe
from tropism.config import Model, Train
from tropism.errors import ConfigError
from tropism.maths.divergence import reverse_kl
from tropism.methods.g_opd import GOPD
from tropism.methods.mopd import MOPD
from tropism.methods.opd import OPD
from tropism.methods.reopold import REOPOLD
from tropism.record import Run, latest
from tropism.signals.frozen import measure
from tropism.teacher import Teacher
from tropism.training.checkpoint import State
from tropism.training.collate import collate
from tropism.training.model import load_policy
from tropism.training.ranks import Ranks
from tropism.training.teachers import check, heard, load_other, open_tutor, openings
from tropism.types import Ask, Needs, Output, SamplingParams

SETTINGS = Model(**world.MODEL)
LONG = {"groups": 12, "group_size": 2, "max_tokens": 4}
TRAIN = {"steps": 12, "mini_batches": 1, "save_every": 0, "warmup": 0, "decay": "none"}


class Shouts(world.World):
    """Two domains that a model of one layer can tell apart: eight times their letter."""

    def task(self, number):
        return replace(super().task(number), domain="ab"[number % 2])

    def open(self, task, sibling):
        return Shout(task.domain)


class Shout(world.Letters):
    def ask(self):
        return None if self.heard else Ask(0, self.letter * 8)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Two directories of models that nobody trained, each with an opinion of its own."""
    folder = tmp_path_factory.mktemp("teachers")
    for name, seed in (("one", 11), ("two", 12)):
        load_policy(SETTINGS, seed).save(folder / name)
    return {name: str(folder / name) for name in ("one", "two")}


@pytest.fixture(scope="module")
def student():
    return load_policy(SETTINGS, 3)


def recipe(folder, method, **changes):
    """`changes`: section -> settings, on top of LONG and TRAIN."""
    sections = {"sampling": LONG, "train": TRAIN, "eval": {"every": 0}}
    changes |= {name: settings | changes.get(name, {}) for name, settings in sections.items()}
    return world.grpo(folder, method=method, **changes)


def trained(folder, method, **changes):
    result = tropism.train(recipe(folder, method, **changes), quiet=True)
    return result, Run(result.path / "rl").metrics()


@torch.no_grad()
def apart(policy, path, prompts=tuple(f"0 say {letter}: " for letter in "abc")):
    """KL(policy || the model of this path) over the vocabulary, mean over states that play visits."""
    other, words = load_policy(Model(path=path, device="cpu")), policy.words
    found = []
    for text in prompts:
        prompt = words.context(text)
        params = SamplingParams(max_tokens=2, seed=7)
        for drawn in load_policy(SETTINGS, 3).sampler([prompt] * 6, params):
            ids = torch.tensor([[*drawn.context, *drawn.action]])
            mine, theirs = (model.module(input_ids=ids).logits[0, len(prompt) - 1 :] for model in (policy, other))
            found.append(reverse_kl(mine.log_softmax(-1), theirs.log_softmax(-1)).mean())
    return torch.stack(found).mean().item()


def loaded(result):
    return load_policy(Model(path=str(result.model), device="cpu"))


# -------------------------------------------------------------------------------------------------------- it distils


@pytest.mark.parametrize(
    "method",
    [
        OPD(),
        OPD(teacher=Teacher(top_k=96)),
        OPD(teacher=Teacher(top_k="all"), divergence="forward"),
        OPD(teacher=Teacher(top_k=96, support="teacher"), divergence="jensen_shannon"),
        GOPD(reward_scaling=1.25),
        REOPOLD(keep=0.5),
        MOPD(),
    ],
    ids=["opd", "top_k", "whole", "mixture", "g_opd", "reopold", "mopd"],
)
def test_a_student_comes_closer_to_its_teacher(method, teachers, student, tmp_path):
    method = replace(method, teacher=replace(method.teacher, who=teachers["one"]))
    result, lines = trained(tmp_path, method)
    before, after = apart(student, teachers["one"]), apart(loaded(result), teachers["one"])
    assert after < 0.7 * before
    assert lines[-1]["teacher/kl"] < lines[0]["teacher/kl"] and all(line["teacher/share"] == 1 for line in lines)


def test_each_domain_comes_closer_to_its_own_teacher_than_to_the_others(teachers, student, tmp_path):
    method = MOPD(teacher=Teacher(who={"a": teachers["one"], "b": teachers["two"]}))
    result, lines = trained(tmp_path, method, env=f"{__file__}:Shouts", train={"steps": 40}, sampling={"max_tokens": 2})
    policy = loaded(result)
    for letter, own, other in (("a", "one", "two"), ("b", "two", "one")):
        prompts = [letter * 8]
        assert apart(policy, teachers[own], prompts) < 0.5 * apart(student, teachers[own], prompts)
        assert apart(policy, teachers[own], prompts) < 0.7 * apart(policy, teachers[other], prompts)
        early, late = (sum(line[f"teacher/kl/{letter}"] for line in some) for some in (lines[:5], lines[-5:]))
        assert late < 0.5 * early
        assert all(1 <= line[f"teacher/length/{letter}"] <= 2 for line in lines)


def test_a_recipe_names_its_teachers_in_words(teachers, tmp_path):
    settings = {"sampling": {"groups": 3, "group_size": 1}, "train": TRAIN | {"steps": 1}, "eval": {"every": 0}}
    raw = world.grpo(tmp_path, method="mopd", **settings)
    raw["stages"][0]["method"] = {"mopd": {"teacher": {"who": dict.fromkeys("abc", teachers["one"])}}}
    result = tropism.train(raw, quiet=True)
    (line,) = Run(result.path / "rl").metrics()
    assert line["teacher/kl"] > 0.05 and "sampling/dropped" in line


def test_the_reference_is_the_start_model_or_the_one_that_is_named(teachers, tmp_path):
    """At the first step: twice the gap to the teacher where the start is the reference, once where the teacher is."""
    for name, reference, factor in (("start", "", 2.0), ("teacher", teachers["one"], 1.0)):
        method = GOPD(reward_scaling=2.0, reference=reference, teacher=Teacher(who=teachers["one"]))
        result, _ = trained(tmp_path / name, method, train={"steps": 1}, sampling={"groups": 3})
        for row in Run(result.path / "rl").rollouts(1).to_pylist():
            gap = [t - p for t, p in zip(row["teacher_logp"], row["proximal_logp"], strict=True)]
            assert row["advantage"] == pytest.approx([factor * x for x in gap], abs=1e-4) and max(map(abs, gap)) > 0.02


def test_a_frozen_teacher_is_the_student_as_it_started(student, tmp_path):
    tutor = opened(OPD(), student)
    batch, numbers = said(tutor, student, ("a", [5, 6, 7]))
    assert batch.has_teacher.all() and abs(numbers["teacher/kl"]) < 1e-6
    with torch.no_grad():
        moved = next(student.module.parameters())
        moved.mul_(2.0)
        _, numbers = said(tutor, student, ("a", [5, 6, 7]))
        moved.div_(2.0)
    assert abs(numbers["teacher/kl"]) > 1e-3


# -------------------------------------------------------------------------------------------------- what is said where


def staged(folder, method, **changes):
    (stage,) = resolved_recipe(recipe(folder, method, **changes), (), {}).stages
    return stage


def opened(method, student, source=None):
    return open_tutor(staged("nowhere", method), SETTINGS, student, source)


def said(tutor, student, *replies):
    """(batch, metrics) of replies, each (domain, action tokens), to one prompt."""
    context = student.words.context("0 say a: ")
    rollouts = [rollout(turn(context, action), domain=domain) for domain, action in replies]
    batch = collate(rollouts, codes={})
    batch = measure(batch, Needs(measured=frozenset({"proximal_logp"})), policy=tutor.student, exact=False)
    batch, sums = tutor.measure(batch, openings(rollouts, apart=False))
    return batch, Ranks().means(sums)


def gaps(batch, row=0):
    return OPD().credit(batch).advantage[row][batch.action_mask[row]]


@torch.no_grad()
def test_a_token_that_the_teacher_finds_odd_is_blamed_itself_and_not_its_neighbours(student, teachers):
    """Every token is the one that the teacher likes most beyond the student, but for the fourth: there the least."""
    other, ids = load_other(teachers["one"], SETTINGS, student), list(student.words.context("0 say a: "))
    start = len(ids)
    for place in range(6):
        logp = [p.module(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1) for p in (other, student)]
        gain = logp[0] - logp[1]
        ids.append(int(gain.argmin() if place == 3 else gain.argmax()))
    batch, _ = said(opened(OPD(teacher=Teacher(who=teachers["one"])), student), student, ("a", ids[start:]))
    assert [place for place, gap in enumerate(gaps(batch).tolist()) if gap < 0] == [3]


def test_what_comes_later_changes_nothing_before_it(student, teachers):
    tutor = opened(OPD(teacher=Teacher(who=teachers["one"])), student)
    batch, _ = said(tutor, student, ("a", [5, 6, 7, 8, 9]), ("a", [5, 6, 7, 200, 100]), ("a", [5, 6, 7, 8]))
    assert torch.allclose(gaps(batch, 0)[:3], gaps(batch, 1)[:3], atol=1e-5)
    assert torch.allclose(gaps(batch, 0)[:4], gaps(batch, 2), atol=1e-5)
    assert (gaps(batch, 0)[3:] - gaps(batch, 1)[3:]).abs().min() > 1e-3


def test_whoever_the_student_is_to_itself_starts_by_agreeing_and_agrees_again_once_it_has_followed(student):
    """Before the first update all self-teachers say the same; after one, those that caught up, not the frozen one."""
    settings = {"live": {"reads": ("answer",)}, "frozen": {}, "ema": {"rate": 1.0}, "synced": {"every": 1}}
    tutors = {who: opened(OPD(teacher=Teacher(who=who, **more)), student) for who, more in settings.items()}
    tutors["live"] = replace(tutors["live"], teacher=replace(tutors["live"].teacher, reads=()))

    def spoken():
        return {who: said(tutor, student, ("a", [5, 6, 7]))[0].teacher_logp for who, tutor in tutors.items()}

    first = spoken()
    assert all(torch.equal(logp, first["live"]) for logp in first.values())
    with torch.no_grad():
        moved = next(student.module.parameters())
        moved.mul_(2.0)
        for tutor in tutors.values():
            tutor.follow(student.module, 0, moved=True)
        then = spoken()
        moved.div_(2.0)
    assert torch.equal(then["frozen"], first["frozen"]) and not torch.allclose(then["live"], first["live"])
    assert torch.equal(then["ema"], then["live"]) and torch.equal(then["synced"], then["live"])


def test_another_temperature_is_another_teacher(student):
    """So the test that a frozen teacher agrees can fail."""
    tutor = opened(OPD(), student)
    batch, _ = said(replace(tutor, student=student.measuring(0.7, Train())), student, ("a", [5, 6, 7]))
    assert gaps(batch).abs().max() > 1e-2


def test_a_domain_is_taught_by_its_own_model_and_tasks_without_one_by_the_model_for_those(student, teachers):
    alone = [
        said(opened(OPD(teacher=Teacher(who=teachers[name])), student), student, ("", [5, 6]))[0] for name in teachers
    ]
    tutor = opened(MOPD(teacher=Teacher(who={"": teachers["one"], "a": teachers["two"]})), student)
    batch, numbers = said(tutor, student, ("a", [5, 6]), ("", [5, 6]))
    assert torch.allclose(batch.teacher_logp[0], alone[1].teacher_logp[0], atol=1e-6)
    assert torch.allclose(batch.teacher_logp[1], alone[0].teacher_logp[0], atol=1e-6)
    assert not torch.allclose(batch.teacher_logp[0], batch.teacher_logp[1], atol=1e-3)
    tutor = opened(MOPD(teacher=Teacher(who={"": teachers["one"]})), student)
    with pytest.raises(ConfigError, match="a task has the domain 'a'"):  # one that the first tasks did not show
        said(tutor, student, ("a", [5, 6]))
    assert numbers["teacher/kl/a"] == pytest.approx(-gaps(batch, 0).mean().item(), abs=1e-6)
    assert numbers["teacher/kl/"] == pytest.approx(-gaps(batch, 1).mean().item(), abs=1e-6)
    assert numbers["teacher/kl"] == pytest.approx((numbers["teacher/kl/a"] + numbers["teacher/kl/"]) / 2, abs=1e-6)
    assert numbers["teacher/length/a"] == 2
    with pytest.raises(ConfigError, match="a task has the domain 'chess', but"):
        said(tutor, student, ("chess", [5, 6]))


def test_of_each_domain_it_is_told_on_what_share_of_tokens_the_sampler_is_too_far_away(student, teachers):
    """The first token of `a` was sampled as the trainer would, all others at three times the probability or a third."""
    tutor = opened(MOPD(teacher=Teacher(who={"a": teachers["one"], "b": teachers["two"]})), student)
    rollouts = [rollout(turn(student.words.context("0 say a: "), [5, 6]), domain=domain) for domain in "ab"]
    needs = Needs(measured=frozenset({"proximal_logp"}))
    batch = measure(collate(rollouts, codes={}), needs, policy=tutor.student, exact=False)
    sampled = batch.proximal_logp + torch.tensor([[math.log(3)], [-math.log(3)]])
    first = batch.action_mask.int().argmax(1)[0]
    sampled[0, first] = batch.proximal_logp[0, first] + 0.5
    batch, sums = tutor.measure(batch.replace(behavior_logp=sampled), openings(rollouts, apart=False))
    assert [Ranks().means(sums)[f"teacher/mismatch/{domain}"] for domain in "ab"] == [0.5, 1.0]
    out = Output(logp=batch.proximal_logp, entropy=sampled)
    dropped = MOPD().loss(out, batch, MOPD().credit(batch)).metrics["sampling/dropped"]
    assert [dropped[row][batch.action_mask[row]].mean() for row in (0, 1)] == [0.5, 1.0]


def test_a_model_that_teaches_two_domains_is_opened_once(student, teachers, monkeypatch):
    asked = []
    monkeypatch.setattr("tropism.training.teachers.load_other", lambda path, *rest: asked.append(path) or student)
    opened(MOPD(teacher=Teacher(who={"a": teachers["one"], "b": teachers["two"], "c": teachers["two"]})), student)
    assert asked == [teachers["one"], teachers["two"]]


def test_a_row_that_is_longer_than_its_teacher_can_read_has_none(student, tmp_path):
    shape = world.MODEL["shape"] | {"max_position_embeddings": 13}
    load_policy(replace(SETTINGS, shape=shape), 5).save(tmp_path / "short")
    tutor = opened(OPD(teacher=Teacher(who=str(tmp_path / "short"))), student)
    start = len(student.words.context("0 say a: "))
    batch, numbers = said(tutor, student, ("a", [5] * (13 - start)), ("a", [5] * (14 - start)))
    assert tutor.room == 13 and batch.has_teacher.tolist() == [True, False]
    assert numbers["teacher/share"] == 0.5 and (gaps(batch, 1) == 0).all()


# -------------------------------------------------------------------------------------------- who cannot be a teacher


def refused(folder, who, message):
    with pytest.raises(ConfigError, match=message):
        tropism.train(recipe(folder, MOPD(teacher=Teacher(who=who))), quiet=True)
    assert not (folder / "run" / "rl" / "metrics.jsonl").exists()


def test_a_teacher_of_another_tokenizer_is_refused(tmp_path):
    other = load_policy(SETTINGS, 1)
    other.tokenizer.add_tokens(["zebra"])
    other.module.resize_token_embeddings(len(other.tokenizer))
    other.save(tmp_path / "other")
    path = str(tmp_path / "other")
    refused(tmp_path, path, r"other has another tokenizer than the student \(263 tokens against 262; 'zebra', for one")
    refused(tmp_path, dict.fromkeys("abc", path), "another tokenizer")


def test_a_teacher_whose_output_is_padded_is_refused(tmp_path):
    load_policy(replace(SETTINGS, shape=world.MODEL["shape"] | {"vocab_size": 320}), 1).save(tmp_path / "wide")
    refused(tmp_path, str(tmp_path / "wide"), "wide gives 320 numbers for each token and the student 262: .* Resize")


def test_a_domain_without_a_teacher_is_refused_before_the_run_begins(teachers, tmp_path):
    some = {"a": teachers["one"], "b": teachers["two"]}
    refused(tmp_path, some, r"domain 'c', but teacher.who knows a, b. Name a teacher for every domain")


@pytest.mark.parametrize("who", ["{}/nowhere", {"a": "{}/nowhere", "b": "{}", "c": "{}"}])
def test_a_path_without_a_model_is_refused(who, tmp_path):
    fill = lambda text: text.format(tmp_path)  # noqa: E731
    who = fill(who) if isinstance(who, str) else {domain: fill(path) for domain, path in who.items()}
    refused(tmp_path, who, r"nowhere' is to score the student's tokens, but cannot be opened: .* no such directory")


def test_a_directory_that_holds_no_model_and_a_word_that_is_none_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path, str(tmp_path / "empty"), "cannot be opened: .* holds neither .* Give the directory or hub id")
    refused(tmp_path, dict.fromkeys("abc", "./frozen"), "The student itself is live, frozen, ema, synced: as teach")


def test_a_preset_is_refused_for_its_weights_would_be_random(tmp_path):
    refused(tmp_path, "tiny", "tiny is a preset, so its weights would be random .* frozen is the student")


def test_a_reference_is_refused_for_the_same_reasons(tmp_path):
    with pytest.raises(ConfigError, match="nowhere' is to score the student's tokens, but cannot be opened"):
        tropism.train(recipe(tmp_path, GOPD(reference=str(tmp_path / "nowhere"))), quiet=True)


@pytest.mark.parametrize(
    ("teacher", "changes", "message"),
    [
        (Teacher(), {}, "the teacher is the student itself, and reads no more than the student: .* Set teacher.who"),
        (Teacher(reads=("sibling",)), {"sampling": {"group_size": 1}}, "reads a sibling, but sampling.group_size is 1"),
        (Teacher(reads=("sibling",)), {"success": None}, "does not say what a success is. Add success: {part: NAME"),
        (Teacher(reads=("hint",)), {}, "reads a hint, but stage 'rl' has no judge to give one. Add judge"),
        (Teacher(reads=("worked",)), {}, "column 'worked', but 256 of 256 tasks of world lack it; they have answer"),
        (Teacher(reads=("answer",), against=("decoy",)), {}, "column 'decoy', but 256 of 256 tasks"),
        (Teacher(who={"a": "x", "b": "y"}), {}, "domain 'c', but teacher.who knows a, b"),
    ],
)
def test_what_the_teacher_would_miss_in_every_step_is_said_first(teacher, changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        check(teacher, staged(tmp_path, OPD(teacher=teacher), **changes), world.World("train", 0))


def test_a_teacher_that_misses_nothing_passes(tmp_path):
    for teacher in (Teacher(who="frozen"), Teacher(reads=("answer",)), Teacher(who=dict.fromkeys("abc", "x"))):
        check(teacher, staged(tmp_path, OPD(teacher=teacher)), world.World("train", 0))
    check(Teacher(reads=("worked",)), staged(tmp_path, OPD()), None)


class Half(world.World):
    """Every other task has a solution."""

    def task(self, number):
        task = super().task(number)
        return replace(task, columns=task.columns | ({"solution": "x"} if number % 2 else {}))


def test_a_column_that_some_tasks_lack_is_refused_only_where_it_must_be_there(tmp_path):
    source = Half("train", 0)
    for need in ("any", "first"):
        teacher = Teacher(reads=("solution", "answer"), need=need)
        check(teacher, staged(tmp_path, OPD(teacher=teacher)), source)
    with pytest.raises(ConfigError, match="column 'solution', but 128 of 256 tasks"):
        check(Teacher(reads=("solution", "answer")), staged(tmp_path, OPD()), source)


@pytest.mark.parametrize("method", ["opd", "g_opd", "reopold", "mopd"])
def test_what_is_learned_from_sampled_tokens_is_refused_on_data(method, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    stage = {"name": "rl", "method": method, "data": {"path": str(tmp_path / "rows.jsonl")}}
    with pytest.raises(ConfigError, match="learns from its own rollouts, but stage 'rl' has data"):
        resolved_recipe({"name": "run", "model": world.MODEL, "stages": [stage]}, (), {})


def test_a_method_without_a_teacher_opens_none(student, tmp_path):
    assert open_tutor(staged(tmp_path, "grpo"), SETTINGS, student, None) is None


def test_a_teacher_that_is_silent_for_so_many_steps_is_reported_with_its_reason_and_again():
    state, said = State(), []
    nothing = {"teacher/share": 0.0, "teacher/not_finite": 0.0, "teacher/too_long": 0.0}
    for step, taught in enumerate([nothing] * 4 + [nothing | {"teacher/share": 0.5}] + [nothing] * 2):
        state.step = step
        heard(state, taught, 2, said.append)
    assert [line.split(":")[0] for line in said] == ["step 2", "step 4", "step 7"]
    assert "silent for 4 steps; there was nothing for it to read" in said[1] and "silent for 2 steps" in said[2]
    heard(state, nothing | {"teacher/not_finite": 1.0}, 1, said.append)
    assert said[-1].endswith("its numbers are not finite")
    heard(state, nothing | {"teacher/too_long": 0.5}, 1, said.append)
    assert said[-1].endswith("leaves no room for the reply, even cut")
    heard(state, nothing | {"teacher/share": 0.5, "teacher/used": 0.0}, 1, said.append)
    assert said[-1].endswith("of no group did it speak of every reply, so the method used none of it")
    state.untaught = 3
    heard(state, nothing | {"teacher/share": 0.5, "teacher/used": 0.1}, 1, said.append)
    assert state.untaught == 0


@pytest.mark.parametrize("mini_batches", [1, 4])
def test_a_copy_follows_once_a_rollout_batch_however_many_optimizer_steps_there_are(mini_batches, tmp_path):
    told = {"who": "ema", "rate": 0.25, "reads": ["answer"], "must_add": -1, "closing": ""}
    train = {"steps": 1, "save_every": 1, "mini_batches": mini_batches, "epochs": 1, "learning_rate": 1e-2, "warmup": 0}
    sampling, success = {"groups": 8, "group_size": 4, "max_tokens": 4}, {"part": "low", "at_least": 0.5}
    made = world.grpo(tmp_path, sampling=sampling, train=train, eval={"every": 0}, success=success)
    made["stages"][0]["method"] = {"rlsd": {"teacher": told}}
    run = Run(tropism.train(made, quiet=True).path / "rl")
    last = latest(run.checkpoints_dir)
    assert run.metrics()[0]["updates"] == mini_batches
    copy, end = torch.load(last / "state" / "teacher.pt"), load_file(last / "model.safetensors")
    start = load_policy(SETTINGS, made["seed"]).module.state_dict()
    for name in end:
        assert torch.allclose(copy[name], 0.75 * start[name] + 0.25 * end[name], atol=1e-6, rtol=0)
