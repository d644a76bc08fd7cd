"""The lean decoder against transformers: within 1e-4 of the logits' size in float32, where sums have another order."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from small import SHAPE, small
from tropism.config import Lora
from tropism.rollout.lean import LeanStream, misfit
from tropism.rollout.recorded import UNRECORDED
from tropism.rollout.sampler import Local
from tropism.rollout.stream import WithCache
from tropism.training.examine import decoder
from tropism.types import SamplingParams

KINDS = ["llama", "mistral", "qwen2", "qwen3", "gemma"]
PROMPTS = [[7, 8, 9, 10, 11, 12], [65], [50, 3, 99], [7, 8, 9, 10, 11, 12], [20, 21, 22, 23]]
kinds = pytest.mark.parametrize("kind", KINDS)


def made(kind, **more):
    """A model whose every weight is random, biases and norms too."""
    torch.manual_seed(0)
    sizes = SHAPE | {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 120}
    module = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(sizes | {"sliding_window": None} | more)))
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return module.eval()


def no_autocast():
    return torch.autocast("cpu", enabled=False)


def whole(module, rows):
    """What transformers says after each of these sequences, read alone and without a cache."""
    with torch.no_grad():
        return torch.stack([module(torch.tensor([row])).logits[0, -1] for row in rows])


def close(mine, theirs):
    assert (mine - theirs).abs().max() <= 1e-4 * theirs.abs().max()


class Tape:
    """Records as a CUDA graph does, on a CPU: from the recording, work is done on the memory that it saw."""

    def __init__(self, fails_after=1000):
        self.recordings, self.replays, self.fails_after = 0, 0, fails_after

    def __call__(self, work):
        if self.recordings == self.fails_after:
            raise RuntimeError("no memory for a recording")
        self.recordings += 1
        into = work()

        def again():
            self.replays += 1
            return into.copy_(work())

        return again


@kinds
@pytest.mark.parametrize("recorder", [None, Tape()])
@torch.inference_mode()
def test_sequences_that_join_go_on_and_leave_are_read_as_transformers_reads_each_alone(kind, recorder):
    """Recorded steps too, which attend to all places of the cache, and to nothing at those that are not written."""
    module = made(kind)
    stream, rows = LeanStream(module, no_autocast, recorder), [list(prompt) for prompt in PROMPTS]
    close(stream.join(rows), whole(module, rows))
    for step in range(5):
        tokens = [31 + step + n for n in range(len(rows))]
        rows = [[*row, token] for row, token in zip(rows, tokens, strict=True)]
        close(stream.next(torch.tensor(tokens)), whole(module, rows))
    keep = [3, 0, 2]
    stream.keep(torch.tensor(keep))
    rows = [rows[n] for n in keep] + [[5] * 90, [5] * 90, [9, 9]]
    close(stream.join(rows[3:]), whole(module, rows[3:]))
    rows = [[*row, 77] for row in rows]
    close(stream.next(torch.tensor([77] * len(rows))), whole(module, rows))
    assert (whole(module, rows[:1]) - whole(module, rows[1:2])).abs().max() > 0.1


@kinds
def test_models_of_the_shape_are_decoded_here(kind):
    tape = Tape()
    assert misfit(made(kind), no_autocast) is None
    assert misfit(made(kind), no_autocast, tape) is None
    assert tape.replays == 2, "what was compared came from a recording"


@torch.inference_mode()
def test_a_step_is_recorded_where_sequences_stay_and_anew_where_they_or_caches_change():
    tape = Tape()
    stream = LeanStream(made("qwen3"), no_autocast, tape)
    stream.join([[1, 2, 3], [4, 5]])
    for _ in range(UNRECORDED):
        stream.next(torch.tensor([6, 7]))
    assert tape.recordings == 0, "sequences that soon leave are not worth it"
    one = stream.next(torch.tensor([6, 7]))
    two = stream.next(torch.tensor([8, 9]))
    assert (tape.recordings, tape.replays) == (1, 2) and stream.place.tolist() == [7, 6]
    assert (one - two).abs().max() > 1e-3, "the first answer is not overwritten"
    changes = (lambda: stream.join([[1]]), lambda: stream.keep(torch.tensor([1])), lambda: stream.reserve(500, 1))
    for count, change in enumerate(changes, 2):
        change()
        for _ in range(UNRECORDED + 3):
            stream.next(torch.zeros(len(stream.place), dtype=torch.long))
        assert tape.recordings == count


@pytest.mark.parametrize(
    ("misfit", "unrecorded", "device", "line"),
    [
        ("gpt2 is not of Llama's shape", "", "cpu", "that of transformers, for gpt2 is not of Llama's shape"),
        (None, "there is no GPU", "cpu", "lean"),
        (None, None, "cuda", "lean, its steps recorded as CUDA graphs"),
        (
            None,
            "its steps cannot be recorded",
            "cuda",
            "lean, its steps not recorded, for its steps cannot be recorded",
        ),
    ],
)
def test_a_start_says_which_decoder_there_is_and_why_no_faster_one(misfit, unrecorded, device, line):
    model = SimpleNamespace(device=torch.device(device))
    sampler = SimpleNamespace(misfit=misfit, unrecorded=unrecorded, model=model)
    assert decoder(sampler) == f"decoder: {line}"


def test_without_a_gpu_nothing_is_recorded():
    policy = small()
    assert policy.sampler.unrecorded == "there is no GPU" and policy.sampler.stream().recorder is None


@torch.inference_mode()
def test_where_a_recording_fails_decoding_goes_on_without_and_says_so():
    module, tape, rows = made("qwen3"), Tape(fails_after=1), [[1, 2, 3], [4, 5]]
    stream = LeanStream(module, no_autocast, tape)
    stream.join(rows)
    for _ in range(UNRECORDED + 2):
        stream.next(torch.tensor([6, 7]))
    rows = [[*row, *[token] * (UNRECORDED + 2)] for row, token in zip(rows, (6, 7), strict=True)]
    stream.reserve(500, 2)
    with pytest.warns(UserWarning, match="without recordings of its steps: no memory"):
        for _ in range(UNRECORDED + 2):
            rows = [[*row, 8] for row in rows]
            close(stream.next(torch.tensor([8, 8])), whole(module, rows))
    with pytest.warns(UserWarning):
        assert misfit(module, no_autocast, Tape(fails_after=0)) == "its steps cannot be recorded"


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (lambda: small("tiny-gpt2").module, "gpt2 is not of Llama's shape"),
        (lambda: made("mistral", sliding_window=8), "its attention sees 8 tokens at a time"),
        (
            lambda: made("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "positions",
        ),
    ],
)
def test_others_are_not_and_it_says_why(module, reason):
    assert reason in misfit(module(), no_autocast)


def test_a_model_that_computes_something_else_is_found_out_by_its_numbers():
    module = made("qwen3")
    module.model.layers[1].register_forward_hook(lambda _, args, out: out + 0.1)
    assert "logits would differ" in misfit(module, no_autocast)


def test_equal_prompts_are_read_once():
    module, read = made("llama"), []
    module.get_input_embeddings().register_forward_hook(lambda _, args, out: read.append(tuple(args[0].shape)))
    with torch.inference_mode():
        LeanStream(module, no_autocast).join([[1, 2, 3]] * 8 + [[4, 5, 6]] * 8)
    assert read == [(2, 3)]


def test_many_prompts_are_read_in_parts_and_end_where_they_belong(monkeypatch):
    module = made("qwen3")
    prompts = [[n, *range(1 + n % 3)] for n in range(20)] * 2
    with torch.inference_mode():
        at_once = LeanStream(module, no_autocast).join(prompts)
        monkeypatch.setattr("tropism.rollout.lean.READ", 12)
        stream = LeanStream(module, no_autocast)
        close(stream.join(prompts), at_once)
        close(stream.next(torch.tensor([3] * 40)), whole(module, [[*prompt, 3] for prompt in prompts]))


def test_an_adapter_is_part_of_what_is_decoded(tmp_path):
    small().module.save_pretrained(tmp_path)
    small().tokenizer.save_pretrained(tmp_path)
    from tropism.config import Model
    from tropism.training.model import load_policy

    policy = load_policy(Model(path=str(tmp_path), lora=Lora(rank=4)), 0)
    with torch.no_grad():
        for name, weight in policy.module.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    assert policy.sampler.misfit is None
    with torch.inference_mode():
        close(LeanStream(policy.module, policy.precision).join(PROMPTS), whole(policy.module, PROMPTS))


def sharp(**settings):
    policy = small("tiny", **settings)
    with torch.no_grad():
        policy.module.get_input_embeddings().weight.mul_(3.0)
    return policy


def test_both_decoders_draw_the_same_replies():
    policy = sharp()
    prompts, stops = [[n, n + 1, 7] for n in range(20) for _ in range(4)], range(0, 260, 12)
    decoders = [Local(policy.module, stops, 1024, policy.precision, rows=24, lean=lean) for lean in (True, False)]
    assert decoders[0].misfit is None and decoders[1].misfit
    lean, plain = (decoder(prompts, SamplingParams(max_tokens=20, seed=4)) for decoder in decoders)
    assert len({len(turn.action) for turn in lean}) > 5
    assert [turn.action for turn in lean] == [turn.action for turn in plain]


def test_in_bfloat16_it_is_as_far_from_float32_as_transformers_is():
    prompts, policy, exact = [[n, n + 1, 7] for n in range(40)], sharp(compute="bfloat16"), sharp()
    with torch.inference_mode():
        mine, theirs = (kind(policy.module, policy.precision).join(prompts) for kind in (LeanStream, WithCache))
        truth = WithCache(exact.module, exact.precision).join(prompts)
    mine, theirs = (float((logits.float() - truth).square().mean().sqrt()) for logits in (mine, theirs))
    assert 0.001 < mine < 1.3 * theirs


def test_the_one_that_refills_needs_fewer_steps(monkeypatch):
    policy, steps = small("tiny"), {}
    for kind in (LeanStream, WithCache):
        original = kind.next

        def counted(self, tokens, original=original):
            steps[type(self)] = steps.get(type(self), 0) + 1
            return original(self, tokens)

        monkeypatch.setattr(kind, "next", counted)
    prompts, params = [[n, 3, 4] for n in range(64)], SamplingParams(max_tokens=40)
    for lean in (True, False):
        Local(policy.module, range(0, 260, 20), 1024, policy.precision, rows=8, lean=lean)(prompts, params)
    assert steps[LeanStream] < 0.8 * steps[WithCache]
