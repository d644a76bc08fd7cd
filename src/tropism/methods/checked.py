"""What settings mean that many methods share, and which values of them cannot work: said once, by their names."""

from __future__ import annotations

from torch import Tensor

from tropism.errors import ConfigError
from tropism.maths.divergence import with_tail
from tropism.teacher import Teacher
from tropism.types import Batch, Method, Output


def checked(method: Method) -> None:
    """Raise for a value with which nothing, or the wrong thing, would be learned."""
    name, fields = type(method).__name__, vars(method)
    for key in ("clip_low", "clip_high", "kl", "clip_weight", "decay", "caution", "distill", "center"):
        if fields.get(key, 0) < 0:
            raise ConfigError(f"{name}'s {key} is {fields[key]}, but cannot be negative.")
    for key in ("discount", "trace"):
        if not 0 <= fields.get(key, 1) <= 1:
            raise ConfigError(f"{name}'s {key} is {fields[key]}, but what is far away cannot count more: use 0 to 1.")
    if not 0 < fields.get("mix", 0.5) < 1:
        raise ConfigError(
            f"{name}'s mix is {fields['mix']}, where the Jensen-Shannon divergence is 0 everywhere. Use more than 0 "
            "and less than 1; the ends are divergence: forward and divergence: reverse."
        )
    if fields.get("eps", 1) <= 0:
        raise ConfigError(
            f"{name}'s eps is {fields['eps']}, but siblings that all earned the same give 0 / 0. Use 1e-6."
        )
    if not 0 <= fields.get("label_smoothing", 0) < 0.5:
        raise ConfigError(
            f"{name}'s label_smoothing is {fields['label_smoothing']}, but a share of wrong labels is below a half."
        )
    if fields.get("truncate", 1) <= 0:
        raise ConfigError(f"{name}'s truncate is {fields['truncate']}, but then no token would count. Use 2, or more.")
    if (dual := fields.get("dual_clip")) is not None and dual <= 1 + fields["clip_high"]:
        raise ConfigError(
            f"{name}'s dual_clip is {dual}: nothing with a negative advantage would be unlearned once its ratio passes "
            f"that. Use more than 1 + clip_high = {1 + fields['clip_high']}; 3 is usual."
        )
    if fields.get("longest", 1) < 1:
        raise ConfigError(f"{name}'s longest is {fields['longest']}, but it divides. Set it to sampling.max_tokens.")
    if "teacher_topk_logp" in method.needs.measured and not fields["teacher"].top_k:
        raise ConfigError(
            f"{name}'s teacher.top_k is 0, but its divergence is a sum over likely tokens. Use 20, say, or all."
        )


def compared(out: Output, batch: Batch, teacher: Teacher) -> tuple[Tensor, Tensor]:
    """(student, teacher) [N, T, K or K + 1]: their log-probabilities of the tokens on which `top_k` compares them, and
    of all others in one, unless there are none."""
    ids = None if teacher.top_k == "all" else batch.topk_ids
    return with_tail(out.topk_logp, ids), with_tail(batch.teacher_topk_logp, ids)
