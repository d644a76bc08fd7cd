"""Benchmarks that tests do not run whole: what they count, by hand, and that their recipes resolve."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "bench"))
import methods
import objectives
import overoptimisation
import rlhf
import signals
from tropism.maths.best_of_n import expected_best, kl_of_best
from tropism.recipe import resolve


def test_wins_are_of_the_same_instruction_and_ties_are_half():
    mine = {1: {"gold": 0.9}, 2: {"gold": 0.5}, 3: {"gold": 0.1}, 4: {"gold": 1.0}}
    theirs = {1: {"gold": 0.2}, 2: {"gold": 0.5}, 3: {"gold": 0.2}, 9: {"gold": 0.0}}
    assert rlhf.wins(mine, theirs) == pytest.approx(1.5 / 3) and rlhf.wins(mine, mine) == 0.5


def test_every_timed_method_is_a_stage(monkeypatch):
    monkeypatch.chdir(signals.ROOT)
    arms = methods.arms("some/expert")
    assert {"grpo", "mopd", "openclaw", "follow_up", "gated"} <= arms.keys() and next(iter(arms)) == "grpo"
    for stage in arms.values():
        recipe = {"name": "run", "model": "tiny", "stages": [methods.staged(stage, 3)]}
        assert resolve(recipe).stages[0].train.steps == 3


def test_ratios_are_over_grpo_and_tokens_are_of_one_step():
    step = {"time/step": 2.0, "time/update": 1.0, "read": 30}
    steps = [step | {"step": k, "num_tokens": 100.0 * k} for k in (2, 3)]
    line = methods.line_of("x", steps, grpo=0.5, token=0.01)
    assert (line["over grpo"], line["student"], line["read"], line["update"], line["draw"]) == (4.0, 100, 30, 0.5, 0)
    assert line["allowed"] == pytest.approx(1 + 1.1 * 30 * 0.01 / 0.5)


def test_an_adapter_learns_rank_times_in_plus_out_of_each_layer():
    pytest.importorskip("peft")
    import lora

    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 50}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
    whole, learns, size = lora.counted(shape, None)
    assert whole == learns == size / 4
    _, learns, _ = lora.counted(shape, lora.Lora(rank=2))
    assert learns == 2 * (4 * (64 + 64) + 3 * (64 + 96))


def test_bytes_in_four_bits_are_those_that_bitsandbytes_holds():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    import lora

    size = 256 * 1024
    held = bitsandbytes.nn.Params4bit(torch.randn(256, 1024), quant_type="nf4", compress_statistics=True).to("cpu")
    state = held.quant_state
    assert held.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes == lora.FOUR_BITS * size


def test_a_setting_is_on_the_front_unless_another_is_as_good_in_both_and_better_in_one():
    found = {("a", 1.0): (0.5, 0.5), ("a", 2.0): (0.5, 0.4), ("b", 1.0): (0.9, 0.1), ("b", 2.0): (0.5, 0.5)}
    assert objectives.front(found) == {("a", 1.0), ("b", 1.0), ("b", 2.0)}
    line = {"way": "a", "number": 1.0, "seed": 0, "content": 0.4, "terse": 0.2}
    assert objectives.means([line, line | {"seed": 1, "content": 0.6}]) == {("a", 1.0): (0.5, 0.2)}


def test_every_way_to_want_both_is_a_recipe(monkeypatch):
    monkeypatch.chdir(objectives.ROOT)
    for way, number in objectives.settings():
        recipe = resolve(objectives.recipe_of(way, number, 0, "some/model"))
        assert set(recipe.stages[0].rewards) == {"content", "terse"}
        if way in ("undamped", "damped"):
            assert recipe.stages[0].method.at_least == {"content": number}


def test_gaos_curves_are_found_again_with_where_gold_turns():
    """alpha 1; beta .2 for the best of n, which turns at 2.5, and .6 for RL, which turns at exp(1 / .6 - 1).

    Gao, Schulman and Hilton 2022, arXiv:2210.10760, sec. 3.1.
    """
    far = [0.2 * k for k in range(40)]
    bon = [(d, 0.0, 0.0, 0.5 + d * (1 - 0.2 * d)) for d in far]
    rl = [(d, 0.0, 0.0, 0.5 + d * (1 - 0.6 * overoptimisation.logarithmic(d or 1))) for d in far]
    assert overoptimisation.fitted(bon, overoptimisation.linear) == pytest.approx((1.0, 0.2))
    assert overoptimisation.turn_of(bon, overoptimisation.linear) == pytest.approx(2.5)
    assert overoptimisation.fitted(rl, overoptimisation.logarithmic) == pytest.approx((1.0, 0.6))
    assert overoptimisation.turn_of(rl, overoptimisation.logarithmic) == pytest.approx(math.exp(1 / 0.6 - 1))
    highest = [
        max(overoptimisation.curve(points, shape), key=lambda point: point[1])
        for points, shape in ((bon, overoptimisation.linear), (rl, overoptimisation.logarithmic))
    ]
    assert highest[0] == (pytest.approx(2.5, abs=0.2), pytest.approx(0.5 + 1 / (4 * 0.2), abs=0.01))
    gain = 0.6 * math.exp(1 / 0.6 - 1)
    assert highest[1] == (pytest.approx(math.exp(1 / 0.6 - 1), abs=0.2), pytest.approx(0.5 + gain, abs=0.01))
    rising = [(d, 0.0, 0.0, d) for d in far]
    assert overoptimisation.turn_of(rising, overoptimisation.linear) is None


def test_the_pull_of_length_is_what_gold_does_not_explain():
    gold, length = torch.randn(2, 4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    length = length + gold  # the better ones are longer
    assert overoptimisation.pull_of_length(3 * gold, gold, length) == pytest.approx(0, abs=1e-9)
    liked = gold + 2 * length
    wanted = float(2 * length.std() / liked.std())
    assert overoptimisation.pull_of_length(liked, gold, length) == pytest.approx(wanted) and wanted > 0.7


def test_gold_turns_under_a_proxy_of_heavy_tails_and_not_under_one_of_light_ones():
    """Proxy = gold + error, normal or Student's t with two degrees of freedom. Kwa et al. 2024, arXiv:2407.14503."""
    generator = torch.Generator().manual_seed(0)
    gold, error, top, *chi = torch.randn(5, 100, 256, generator=generator, dtype=torch.float64)
    heavy = top / ((chi[0].square() + chi[1].square()) / 2).sqrt()
    found = []
    for proxy in (gold + error, gold + heavy):
        best = [(n, float(expected_best(gold, proxy, n).mean())) for n in (1, 2, 4, 8, 16, 32, 64, 128, 256)]
        points = [(math.sqrt(kl_of_best(n)), 0.0, 0.0, value) for n, value in best]
        found.append(overoptimisation.turn_of(points, overoptimisation.linear))
    assert found == [None, pytest.approx(1.2, abs=0.3)]
