"""The same losses and gradients of preferences as TRL 1.16.0's trainers, whose own code computes the other side.

Where ours differs on purpose a test says how: TRL's `label_smoothing` does nothing to its sigmoid loss, and its ORPO
takes the likelihood of the prompt too.
"""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.reward_trainer import RewardTrainer

from tropism.methods.dpo import DPO
from tropism.methods.kto import KTO
from tropism.methods.orpo import ORPO
from tropism.methods.simpo import SimPO
from tropism.signals.frozen import mismatch
from tropism.types import Batch, Credit, Output

close = torch.testing.assert_close
V = 11
EQUAL = {"rtol": 1e-6, "atol": 1e-6, "check_dtype": False}
"""TRL computes log-probabilities in single precision, whatever the model's."""
PAIRS = [("2 3", " 4 5 6", " 7"), ("4", " 5", " 6 7 8 9"), ("2 2 2", " 3 4", " 4 3"), ("9 8", " 7 6 5 4", " 4 5 6 7")]


def tiny(seed):
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, num_hidden_layers=2, initializer_range=0.5, **shape)).double()


def trainer(kind, config, rows, folder, **settings):
    words = Tokenizer(WordLevel({str(i): i for i in range(V)}, unk_token="0"))
    words.pre_tokenizer = WhitespaceSplit()
    args = config(
        output_dir=str(folder),
        per_device_train_batch_size=len(rows),
        use_cpu=True,
        bf16=False,
        report_to=[],
        train_sampling_strategy="sequential",
        **settings,
    )
    return kind(
        model=tiny(0),
        ref_model=tiny(1),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1"),
    )


def of(model, tokens):
    """[N, T] log-probability of every token, 0 for the first."""
    logp = model(tokens).logits.log_softmax(-1)
    return torch.nn.functional.pad(logp[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0], (1, 0))


def batch_of(tokens, mask, success, group):
    mask, n = mask.bool(), torch.arange(len(tokens))
    return Batch(
        tokens=tokens,
        length=mask.long().cumsum(1).argmax(1) + 1,
        action_mask=mask,
        token_reward=torch.zeros(tokens.shape, dtype=torch.float64),
        turn=mask.long() - 1,
        reward=torch.zeros(len(tokens), dtype=torch.float64),
        success=success,
        truncated=n < 0,
        group=group,
        episode=n,
        role=n * 0,
        domain=n * 0,
        reference_logp=(of(tiny(1), tokens) * mask).detach(),
    )


def ours(method, model, batch):
    logp = of(model, batch.tokens) * batch.action_mask
    loss = method.loss(Output(logp=logp, entropy=logp), batch, method.credit(batch))
    return (loss.values * method.weights(batch)).sum()


def gradient(loss, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        (DPO(beta=0.3), {"loss_type": ["sigmoid"]}),
        (DPO(beta=0.3, loss_type="robust", label_smoothing=0.2), {"loss_type": ["robust"], "label_smoothing": 0.2}),
        (DPO(beta=0.3, loss_type="hinge"), {"loss_type": ["hinge"]}),
        (DPO(beta=0.3, loss_type="ipo"), {"loss_type": ["ipo"]}),
    ],
    ids=["sigmoid", "robust", "hinge", "ipo"],
)
def test_dpo_has_trls_loss_and_gradient(method, settings, tmp_path):
    rows = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in PAIRS]
    made = trainer(DPOTrainer, DPOConfig, rows, tmp_path, beta=0.3, **settings)
    inputs = next(iter(made.get_train_dataloader()))
    theirs = made.compute_loss(made.model, inputs)
    pairs = torch.arange(len(PAIRS)).repeat(2)
    batch = batch_of(inputs["input_ids"], inputs["completion_mask"], torch.arange(8) < 4, pairs)
    close(ours(method, made.model, batch), theirs, **EQUAL)
    close(gradient(ours(method, made.model, batch), made.model), gradient(theirs, made.model), **EQUAL)


def test_smoothed_labels_do_something_here_and_nothing_in_trls_sigmoid_loss(tmp_path):
    rows = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in PAIRS]
    made = trainer(DPOTrainer, DPOConfig, rows, tmp_path, beta=0.3, loss_type=["sigmoid"], label_smoothing=0.2)
    inputs = next(iter(made.get_train_dataloader()))
    pairs = torch.arange(len(PAIRS)).repeat(2)
    batch = batch_of(inputs["input_ids"], inputs["completion_mask"], torch.arange(8) < 4, pairs)
    plain, smoothed = (ours(DPO(beta=0.3, label_smoothing=e), made.model, batch) for e in (0.0, 0.2))
    close(made.compute_loss(made.model, inputs), plain, **EQUAL)
    assert abs(float(smoothed - plain)) > 1e-3


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.5, 0.5)])
def test_kto_has_trls_loss_and_gradient(weights, tmp_path):
    rows = [{"prompt": p, "completion": c, "label": n % 2 == 0} for n, (p, c, _) in enumerate(PAIRS)]
    settings = {"beta": 0.3, "desirable_weight": weights[0], "undesirable_weight": weights[1]}
    made = trainer(KTOTrainer, KTOConfig, rows, tmp_path, **settings)
    inputs = next(iter(made.get_train_dataloader()))
    theirs = made.compute_loss(made.model, inputs)
    batch = batch_of(
        inputs["input_ids"], inputs["completion_mask"], torch.as_tensor(inputs["label"]).bool(), torch.arange(4)
    )

    def said_by(model):
        return lambda rows, top_k=0: Output(logp=of(model, rows.tokens) * rows.action_mask, entropy=None)

    with torch.no_grad():
        batch = batch.replace(
            mismatch=mismatch(batch, batch[[-1, *range(len(batch) - 1)]], said_by(made.model), said_by(tiny(1)))
        )
    assert float(batch.mismatch.mean()) != 0
    mine = ours(KTO(**settings), made.model, batch)
    close(mine, theirs, **EQUAL)
    close(gradient(mine, made.model), gradient(theirs, made.model), **EQUAL)


def answers():
    """(mean log-probabilities of four chosen and four rejected answers, a batch of one-token answers with them)."""
    draw = torch.Generator().manual_seed(0)
    logp = -torch.rand(8, generator=draw, dtype=torch.float64).mul(2).add(0.1)
    mask = torch.tensor([[False, True]]).expand(8, 2)
    batch = batch_of(torch.ones(8, 2).long(), mask, torch.arange(8) < 4, torch.arange(4).repeat(2))
    return logp, batch


def told(method, logp, batch):
    out = torch.stack([logp * 0, logp], 1)
    return method.loss(Output(logp=out, entropy=out), batch, Credit(out * 0)).values[:4, -1]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_simpo_has_trls_loss(smoothing):
    """TRL subtracts gamma / beta inside beta (...), so its gamma is our gap."""
    logp, batch = answers()
    self = SimpleNamespace(
        alpha=0.0, beta=2.5, loss_type="simpo", simpo_gamma=1.375, label_smoothing=smoothing,
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    theirs, *_ = CPOTrainer.cpo_loss(self, logp[:4], logp[4:])
    close(told(SimPO(label_smoothing=smoothing), logp, batch), theirs, **EQUAL)


def test_orpos_odds_are_trls_in_its_single_precision_and_its_likelihood_is_of_the_answer_alone():
    logp, batch = answers()
    self = SimpleNamespace(beta=0.1, accelerator=SimpleNamespace(device="cpu"))
    odds, *_ = ORPOTrainer.odds_ratio_loss(self, logp[:4], logp[4:])
    close(told(ORPO(beta=0.1), logp, batch), -logp[:4] - odds.double(), rtol=1e-6, atol=1e-6)


def test_a_reward_models_loss_is_trls():
    from tropism.methods.reward_model import RewardModel

    draw = torch.Generator().manual_seed(1)
    score, strength = torch.randn(8, generator=draw, dtype=torch.float64), torch.rand(4, generator=draw).double()
    _, batch = answers()
    batch = batch.replace(reward=torch.cat([strength, strength * 0]))
    self = SimpleNamespace(
        args=SimpleNamespace(center_rewards_coefficient=0.01), model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        _total_train_tokens=0,
        _metrics={"eval": {name: [] for name in ("min_reward", "mean_reward", "max_reward", "accuracy", "margin")}},
    )  # fmt: skip
    model = lambda **_: SimpleNamespace(logits=score[:, None])  # noqa: E731
    theirs = RewardTrainer.compute_loss(self, model, {"margin": strength})
    method, blank = RewardModel(center=0.01), torch.zeros(8, 2, dtype=torch.float64)
    loss = method.loss(Output(logp=blank, entropy=blank, last_value=score), batch, Credit(blank))
    close((loss.values * method.weights(batch)).sum(), theirs, **EQUAL)
