from __future__ import annotations

import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tropism.record import Run
from tropism.view.report import write_report
from tropism.view.words import Decode

VOID = {"meta", "br", "circle", "rect"}
HOSTILE = "<script>alert(1)</script><img src=//x.test/p onerror=a()>\"'&\x00\x1b[2J\u202e"


class Page(HTMLParser):
    """Reads a page as a browser would, and insists that every tag is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if not self.open or self.open[-1] != "style" else ""


def page(runs: list[Run], path: Path, decode: Decode | None = None) -> Page:
    return Page(write_report(runs, path, decode).read_text("utf-8"))


def test_the_page_shows_the_record(recorded: list[Run], decode: Decode, tmp_path: Path) -> None:
    found = page(recorded, tmp_path / "report.html", decode)
    titles = {attrs["aria-label"] for tag, attrs in found.tags if tag == "svg"}
    assert {"Loss", "Reward", "Held-out play", "Parts of the reward", "Entropy (nats)", "Gradient norm"} <= titles
    headings = ("Before and after", "Stage format", "Stage play", "Step 1 ", "Step 11 ", "Step 20 ", "Best", "Worst")
    for text in (
        *headings,
        "0.77",
        "a corner was better",
        "KeyError",
        "clip_high",
        "0.28",
        "2.13.0",
        "options.task_seed",
    ):
        assert text in found.text, text
    assert (tmp_path / "report.html").stat().st_mode & 0o777 == 0o644


def test_a_matrix_says_what_each_stage_did_to_what_others_measure_too(tmp_path: Path) -> None:
    """Before its first step and after its last; not what a single stage measures, nor what was measured once."""
    evals = {
        "sft": [{"eval/gold": 0.25, "eval/own": 1.0}, {"eval/gold": 0.5, "eval/own": 2.0}],
        "rm": [{"eval/loss": 0.7}, {"eval/loss": 0.6}],
        "ppo": [
            {"eval/gold": 0.5, "eval/kl": 0.0},
            {"loss": 3.0},
            {"eval/gold": 0.625},
            {"eval/gold": 0.75, "eval/kl": 9.0},
        ],
        "once": [{"eval/gold": 0.1}],
    }
    runs = []
    for stage, lines in evals.items():
        run = Run.create(tmp_path / stage, {"name": "x", "stages": []}, {})
        for step, line in enumerate(lines):
            run.log(step, line)
        runs.append(run)
    html = write_report(runs, tmp_path / "report.html").read_text("utf-8")
    table = Page(html[html.index("<section><h2>What each") : html.index('<section id="sft"')]).text
    assert table == "What each stage did to the others' lessonsheld outsftrmppogold0.25 → 0.5–0.5 → 0.75"
    assert "What each" not in write_report(runs[:2], tmp_path / "two.html").read_text("utf-8")


def test_the_page_reaches_for_nothing_outside_itself(recorded: list[Run], decode: Decode, tmp_path: Path) -> None:
    found = page(recorded, tmp_path / "report.html", decode)
    assert not {"script", "link", "img", "iframe", "object", "embed"} & {tag for tag, _ in found.tags}
    for _, attrs in found.tags:
        assert "src" not in attrs and not any(name.startswith("on") for name in attrs)
        assert (attrs.get("href") or "#").startswith("#")
    assert "url(" not in (tmp_path / "report.html").read_text("utf-8")


def test_every_token_is_shown_once_with_its_credit_and_its_log_probabilities(decode: Decode, tmp_path: Path) -> None:
    run = Run(tmp_path / "rl")
    row = {
        "episode": 0, "turn": 0, "total": 1.0, "prompt": "q", "reply": "ö no", "stop": "truncated",
        "action": [*"ö no".encode(), 256], "advantage": [0.5, 0.5, 0.0, -1.0, 0.25, 0.25],
        "behavior_logp": [-1.0, -0.5, -0.25, -2.0, -3.0, -4.0], "teacher_logp": [-0.125] * 6,
    }  # fmt: skip
    run.save_rollouts(1, [row])
    found = page([run], tmp_path / "r.html", decode)
    spans = [attrs for tag, attrs in found.tags if tag == "span" and "title" in attrs]
    assert [span.get("class") for span in spans] == ["credit", None, "blame", "credit", "credit"]
    assert [span.get("style") for span in spans] == ["--a:0.50", None, "--a:1.00", "--a:0.25", "--a:0.25"]
    first, *_, last = [(span["title"] or "").split("\n") for span in spans]
    assert first == ["advantage +0.5", "sampler log-prob -1.500", "teacher log-prob -0.250", "token 195 182"]
    assert last == ["advantage +0.25", "sampler log-prob -4.000", "teacher log-prob -0.125", "token 256"]
    assert "truncated" in found.text


def test_best_and_worst_are_by_reward_and_failures_are_neither(tmp_path: Path) -> None:
    run = Run(tmp_path / "rl")
    totals = enumerate((0.5, 2.0, -1.0, 9.0))
    rows = [{"episode": n, "turn": 0, "total": total, "reply": f"reply{n}"} for n, total in totals]
    run.save_rollouts(4, [*rows[:3], {**rows[3], "failure": "judge: no answer"}])
    text = page([run], tmp_path / "r.html").text
    assert "reward +2" in text and "reply1" in text and "reward -1" in text and "reply2" in text
    assert "reply0" not in text and "reward +9" not in text
    assert "judge: no answer" in text and "3 rollouts" in text


def test_text_from_a_model_stays_text(decode: Decode, tmp_path: Path) -> None:
    run = Run.create(tmp_path / "rl", {"name": HOSTILE, HOSTILE: {"seed": HOSTILE}}, {HOSTILE: HOSTILE})
    row = {
        "episode": 0, "turn": 0, "total": 1.0, "prompt": [{"role": HOSTILE, "content": HOSTILE}], "reply": HOSTILE,
        "action": list(HOSTILE.encode()), "feedback": HOSTILE, "env": HOSTILE, "rewards": {HOSTILE: 1.0},
        "stop": HOSTILE, "domain": HOSTILE,
    }  # fmt: skip
    run.save_rollouts(1, [row, {**row, "episode": 1, "failure": HOSTILE}])
    run.log(1, {HOSTILE: 1.0, "rewards/" + HOSTILE + "/mean": 1.0})
    run.note("table", {"columns": [HOSTILE], "rows": [[HOSTILE]]})
    for by_token in (decode, None):
        found = page([run], tmp_path / "r.html", by_token)
        assert not {"script", "img"} & {tag for tag, _ in found.tags}
        assert not any(char in found.text for char in "\x00\x1b\u202e")
        assert found.text.count("alert(1)") > 8


@pytest.mark.parametrize("written", ["nothing", "metrics", "empty rollouts", "only evaluations"])
def test_a_record_of_a_run_that_hardly_began_has_a_page(tmp_path: Path, written: str) -> None:
    run = Run(tmp_path / "rl")
    if written == "metrics":
        run.log(1, {"reward": float("nan")})
    if written == "empty rollouts":
        run.save_rollouts(1, [])
    if written == "only evaluations":
        run.save_rollouts(0, [{"episode": 0, "turn": 0, "total": 0.0, "reply": "held out"}], kind="eval")
    text = page([run], tmp_path / "r.html").text
    assert "This record has no config.yaml" in text
    assert ("No step has finished yet" in text) == (written != "metrics")
    assert ("held out" in text) == (written == "only evaluations")


def test_the_settings_are_shown_once_for_all_stages_that_share_them(recorded: list[Run], tmp_path: Path) -> None:
    text = page(recorded, tmp_path / "r.html").text
    assert text.count("clip_high") == 1 and text.count("transformers") == 1


def test_a_page_of_many_steps_is_quick_and_small(tmp_path: Path) -> None:
    run = Run(tmp_path / "rl")
    for step in range(1, 201):
        run.log(step, {f"metric_{n}": float(step * n % 7) for n in range(30)} | {"failures": float(step % 50 == 0)})
        run.save_rollouts(step, [{"episode": n, "turn": 0, "total": float(n), "reply": "r"} for n in range(8)])
    start = time.perf_counter()
    path = write_report([run], tmp_path / "r.html")
    assert time.perf_counter() - start < 5
    assert path.stat().st_size < 1_500_000
