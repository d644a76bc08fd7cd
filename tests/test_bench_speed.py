"""Benchmarks of speed and memory: how they count, and that each peer takes a turn."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "bench"))
import ahead
import decode
import floor
import gpu
import least
import memory
import peers
import scaling
import step
import tropism
import world
from small import rollout, turn
from tropism.config import Model
from tropism.training.collate import collate
from tropism.training.model import load_policy


class Counted:
    def __init__(self, name, order):
        self.name, self.order = name, order

    def turn(self):
        self.order.append(self.name)
        return {"step": float(len(self.order))}


def test_peers_take_turns_in_an_order_that_changes_and_the_first_turns_are_left_out():
    order = []
    found = peers.taking_turns({name: Counted(name, order) for name in "ab"}, turns=2, warm=1)
    assert order == ["b", "a", "a", "b", "b", "a"]
    assert found == {"a": [{"step": 3.0}, {"step": 6.0}], "b": [{"step": 4.0}, {"step": 5.0}]}


def test_a_program_of_another_environment_takes_its_turns_like_a_peer():
    program = """import sys
print("{}", flush=True)
for n, _ in enumerate(sys.stdin):
    print("noise")
    print('{"step": %d}' % n, flush=True)"""
    peer = peers.Outside([sys.executable, "-c", program])
    assert [peer.turn(), peer.turn()] == [{"step": 0}, {"step": 1}]
    peer.end()
    with pytest.raises(SystemExit, match="has ended"):
        peers.Outside([sys.executable, "-c", "print('no JSON')"])


def test_a_step_is_accounted_for_by_kinds_of_operation():
    rows = floor.measured("0.5M", "float32", 1)
    assert [row["phase"] for row in rows] == ["draw", "update", "half, beside another"]
    draw, update, half = rows
    for name in (*floor.KINDS, "ms", "floor"):
        assert half[name] >= 0.4 * (draw[name] + update[name]) - 2
    for row in rows:
        kinds = [row[kind] for kind in (*floor.KINDS, "optimizer", "other", "python")]
        assert sum(kinds) == pytest.approx(row["ms"], abs=len(kinds)) and min(kinds) >= 0
        assert row["products"] == max(kinds) and row["other"] < 0.2 * row["ms"]
        assert 0 < row["floor"] < row["ms"] and 0 < row["bytes"] < row["ms"]
    whole = floor.measured("0.5M", "float32", 1, threads=2, whole=True)  # the half is left out
    assert [row["work"] for row in (update, *whole)] == ["packed", "whole", "whole"]
    assert whole[1]["floor"] > 1.05 * update["floor"]


def test_a_step_on_several_threads_has_no_half_and_what_the_optimizer_moves_counts_once(monkeypatch):
    monkeypatch.setattr(floor, "moved", lambda parameters, times: 1e12 * times)
    monkeypatch.setattr(floor, "limits", lambda compute: least.Least(1e12, 1e12))
    rows = floor.measured("0.5M", "float32", 1, threads=2)
    assert 1000 <= rows[1]["bytes"] < 1010 and rows[0]["bytes"] < 10
    assert [(row["phase"], row["threads"]) for row in rows] == [("draw", 2), ("update", 2)]


def test_a_finished_runs_stages_are_accounted_for_from_where_each_began(tmp_path):
    """Rows are not drawn, and replies that earn what their siblings do are not learned from."""
    rl = world.grpo(tmp_path)
    sft = {"name": "sft", "method": "sft", "data": {"demos": "tictactoe", "episodes": 8}}
    sft["train"] = {"steps": 2, "batch": 4}
    tropism.train(rl | {"stages": [sft, *rl["stages"]]}, quiet=True)
    rows = floor.of_run(tmp_path / "run", 1)
    shown = [("sft", "update"), ("rl", "draw"), ("rl", "measure"), ("rl", "update")]
    assert [(row["stage"], row["phase"]) for row in rows] == shown
    assert rows[0]["steps"] == 2 and all(row["seconds"] >= 0 and row["ms"] >= row["floor"] for row in rows)


def test_the_least_of_a_pass_is_counted_from_what_it_reads_and_keeps():
    policy = load_policy(Model(path="tiny"), 0)
    batch = collate([rollout(turn([1, 2], [3, n])) for n in range(4)], codes={})
    size, once = least.size_of(policy), 3 + 4  # tokens that rows do not begin with in common
    assert size.weights == size.trained == sum(p.numel() for p in policy.module.parameters())
    assert size.layers + size.head == size.weights  # tied: the embedding is the head
    assert size.head == policy.module.config.vocab_size * policy.module.config.hidden_size
    with torch.no_grad(), least.counted(read := least.Least()):
        policy.forward(batch)
    assert read == least.Least(2.0 * (size.layers * once + size.head * 8), 4.0 * size.weights)
    with least.counted(learned := least.Least()):
        policy.forward(batch).logp.sum().backward()
    assert learned.operations == 3 * read.operations and learned.bytes > 3 * read.bytes
    policy.module.get_input_embeddings().requires_grad_(False)
    with least.counted(frozen := least.Least()):
        policy.forward(batch)
    assert frozen.operations / read.operations == pytest.approx(2 + size.layers / size.weights)


def test_what_is_kept_for_the_way_back_is_written_and_read_once():
    numbers, factor = torch.rand(10, requires_grad=True), torch.rand(10)
    with least.counted(found := least.Least()):
        (numbers.exp() * factor).sum().backward()  # the exponential is kept by one operation, the factor by another
    assert found == least.Least(0.0, 2 * 2 * 40)


def test_a_policy_that_does_not_pack_is_counted_row_by_row_without_padding():
    batch = collate([rollout(turn([1, 2], [3, n][: 1 + n % 2])) for n in range(4)], codes={})
    policy = load_policy(Model(path="tiny", pack=False), 0)
    size = least.size_of(policy)
    with torch.no_grad(), least.counted(read := least.Least()):
        policy.forward(batch)
    assert read.operations == 2.0 * (size.layers * (3 + 4 + 3 + 4) + size.head * (1 + 2 + 1 + 2))


def test_drawing_reads_weights_for_all_sequences_at_once_and_for_each_what_was_said_before():
    policy = load_policy(Model(path="tiny"), 0)
    batch = collate([rollout(turn([1, 2], [3, n])) for n in range(4)], codes={})
    weights, config = sum(p.numel() for p in policy.module.parameters()), policy.module.config
    token = 4 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    found = least.to_draw(batch, policy)
    head = config.vocab_size * config.hidden_size  # tied: the embedding, where nothing is multiplied, is the head
    assert found.operations == 2 * (weights * 8 + (weights - head) * 2), "the prompt once, and no head for it"
    assert found.bytes == pytest.approx(4 * weights * 8 / 4 + token * 4 * (2 + 3)), "four sequences at once"
    policy.sampler.rows = 2
    assert least.to_draw(batch, policy).bytes == pytest.approx(4 * weights * 8 / 2 + token * 4 * (2 + 3))
    assert least.moved([torch.zeros(10)], 3) == 3 * 10 * (4 + 3) * 4
    other = load_policy(Model(path="tiny-gpt2"), 0)  # as many keys as queries, of a width that it does not name
    assert least.size_of(other).token == 4 * 2 * other.module.config.n_layer * other.module.config.n_embd


def test_a_gradient_is_compared_by_halves_that_share_no_noise():
    """Noise of its own in each half is not taken for length: what is twice as long differs by its own length."""
    draw = torch.Generator().manual_seed(0)
    mean = torch.ones(10_000, dtype=torch.float64)

    def noisy(scale):
        return [scale * mean + torch.randn(10_000, generator=draw, dtype=torch.float64) for _ in (0, 1)]

    along, apart = ahead.compared(noisy(2.0), noisy(1.0))
    assert along == pytest.approx(2, abs=0.05) and apart == pytest.approx(1, abs=0.05)
    assert all(map(math.isnan, ahead.compared(noisy(2.0), [mean, -mean]))), "nothing but noise"


def test_quartiles_and_exponents_by_hand():
    assert peers.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, 2.0, 4.0)
    assert peers.quartiles([7.0]) == (7.0, 7.0, 7.0)
    assert scaling.slope([(x, 3 * x**0.5) for x in (1.0, 4.0, 9.0)]) == pytest.approx(0.5)


def test_the_peak_is_that_of_the_fastest_backend():
    rate, name = peers.peak("float32")
    assert rate > 1e9 and name in ("torch.mm", "linear", "oneDNN")


def test_a_step_of_ours_and_of_trl_draws_about_as_many_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "ROLLOUTS", 16)
    path = step.model("0.5M", tmp_path)
    ours = step.tropism(path, "float32", str(tmp_path), whole=False, groups=2)()
    theirs = step.trl(path, "float32", str(tmp_path), tuned=True)()
    for took in (ours, theirs):
        assert took["step"] == pytest.approx(took["generate"] + took["update"]) and took["update"] > 0
    assert ours["tokens"] == pytest.approx(theirs["tokens"], rel=0.4)


def test_trl_as_installed_computes_in_the_precision_that_its_row_names():
    from trl import GRPOConfig

    config = GRPOConfig(output_dir="unused", use_cpu=True, report_to="none")
    assert (step.INSTALLED["TRL, defaults"], config.bf16) == ("bfloat16", True)


@pytest.mark.parametrize("way", decode.WAYS)
def test_every_decoder_counts_the_tokens_that_it_drew(way):
    turn, found = decode.decoder(way, "0.5M", "float32", 8), dict[str, float]()
    seconds = peers.timed(lambda: found.update(turn()))
    assert 8 <= found["tokens/s"] * seconds <= 1.2 * 8 * peers.REPLY


def test_generate_is_that_of_transformers_alone():
    policy = decode.made("0.5M", "float32")
    plain = decode.stock(policy)
    assert {type(layer) for layer in plain.modules() if isinstance(layer, torch.nn.Linear)} == {torch.nn.Linear}
    assert plain.config._attn_implementation == "sdpa" != policy.module.config._attn_implementation
    assert all(torch.equal(*pair) for pair in zip(plain.parameters(), policy.module.parameters(), strict=True))


def test_a_decoder_is_held_against_products_and_bandwidth():
    (row,) = decode.compared("0.5M", "float32", 64, 1, ways=("generate",))
    products, bandwidth = (float(row[name].rstrip("%")) / 100 for name in ("of peak", "of bandwidth"))
    assert 0 < products < 1 and 0 < bandwidth < 1 and row["over generate"] == 1
    counted = float(row["peak GFLOP/s"].split()[0]) * 1e9 * products / (2 * 427_520)  # tokens a second
    assert counted == pytest.approx(row["tokens/s"], rel=0.15), "of rounded numbers"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux keeps count")
def test_memory_grows_with_the_vocabulary():
    small, large = (memory.measured("grpo", 0, size, 32, 8) for size in (500, 20_000))
    assert 0 < small < large and math.isfinite(large)
    assert memory.measured("sdpo", 20, 20_000, 32, 8) < 1.3 * large
    assert memory.resident("VmRSS") > 10 and torch.get_num_threads() >= 1


def test_the_bench_of_an_accelerator_counts_on_a_cpu_and_refuses_to_measure_there(monkeypatch):
    monkeypatch.setattr(gpu, "REPLIES", 4)
    policy = load_policy(Model(path="tiny", shape=gpu.SIZES["dry"], device="cpu"))
    found = gpu.decode(policy, "cpu", 1e12)
    assert 0 < found["of bandwidth"] < 1 and found["tokens/s"] > 0
    assert gpu.update(policy, "cpu", 1e15)["of products"] < 1
    if not torch.cuda.is_available():
        monkeypatch.setattr(sys, "argv", ["gpu.py"])
        with pytest.raises(SystemExit, match="nothing was measured"):
            gpu.main()
