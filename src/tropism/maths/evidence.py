"""What a teacher's words say about an answer's success, as a value function that is calibrated as one goes along.

Let one teacher read a right hint and then a wrong one. If it is the policy that knows how its answer will turn out,
what the two say of the same tokens is the likelihood ratio of success and failure, so by Bayes' rule

    logit P(success | x, y_<=t) = logit P(success | x) + D_t
    D_t = sum_{s <= t} d_s        d_s = log teacher(y_s | right, y_<s) - log teacher(y_s | wrong, y_<s)

with slope 1 and nothing to normalise; and whatever any hint does to the style cancels in d. A real teacher is not that
one: slope and intercepts are fitted to outcomes, and a slope below 0 is as good as one above. No gradient flows through
any of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from tropism.maths.advantage import leave_one_out
from tropism.maths.check import same_shape
from tropism.maths.reduce import first_row, sum_by
from tropism.maths.returns import chains

QUARTERS = 4
"""An answer's quarters have an intercept each."""


def shrunk_baseline(
    outcome: Tensor, group: Tensor, episode: Tensor, mean: Tensor | float, *, shrink: float, edge: float = 0.02
) -> Tensor:
    """What its siblings let one expect of an answer, drawn towards the mean of earlier answers.

        q_i = clip((sum_{j != i} R_j + 2 shrink mean) / (G - 1 + 2 shrink), edge, 1 - edge)

    As if 2 shrink siblings more had earned the mean. q_i does not depend on R_i, so R_i - q_i leaves the gradient
    unbiased; at shrink = edge = 0 it is `leave_one_out`.

    Args:
        outcome: [N] in [0, 1], of the row's episode.
        group, episode: [N] ids.
        mean: of earlier batches; this one must not enter.

    Returns:
        [N]; the mean where there is nobody to compare with.
    """
    same_shape("shrunk_baseline", outcome=outcome, group=group, episode=episode)
    once = first_row(episode).to(outcome.dtype)
    others = sum_by(outcome * once, group) - outcome + 2 * shrink * mean
    count = sum_by(once, group) - 1 + 2 * shrink
    return torch.where(count > 0, others / count, mean).clamp(edge, 1 - edge)


def running_sum(values: Tensor, action_mask: Tensor, episode: Tensor, turn: Tensor) -> Tensor:
    """sum_{s <= t} values_s over the action tokens of an episode along (episode, turn), across rows.

    Args:
        values: [N, T].
        action_mask: [N, T] bool.
        episode: [N] ids.
        turn: [N, T] number of the turn within its episode.

    Returns:
        [N, T], 0 off the mask. Of ones: the token's number within its episode, from 1.
    """
    same_shape("running_sum", values=values, action_mask=action_mask, turn=turn)
    chain = chains(action_mask, episode, turn)
    real, found = chain >= 0, torch.zeros_like(values).flatten()
    found[chain[real]] = torch.where(real, values.flatten()[chain], 0.0).cumsum(1)[real]
    return found.reshape(values.shape)


def features(evidence: Tensor, number: Tensor, length: Tensor) -> Tensor:
    """What the logit of success is linear in: D_t, and which quarter of the answer t lies in.

        quarter = floor(4 t / (length + 1))        t = 0 … length; 0 is the empty answer

    Args:
        evidence, number: [...] D_t and t.
        length: [...] tokens of the whole answer.

    Returns:
        [..., 5].
    """
    quarter = (QUARTERS * number.clamp(min=0)).div(length + 1, rounding_mode="floor").long()
    return torch.cat([evidence[..., None], torch.nn.functional.one_hot(quarter, QUARTERS).to(evidence)], -1)


class Reading(NamedTuple):
    """A batch as seen before its own outcomes are learned from."""

    outcome: Tensor
    """[N] R."""
    expected: Tensor
    """[N] q."""
    told: Tensor
    """[N] bool: every member of the group has all hints."""
    words: Tensor
    """[N, T] d_t; 0 off the mask and where not all was told."""
    share: Tensor
    """[N, T] 1 / length of the answer; 0 off the mask."""
    features: Tensor
    """[N, T, 5] what the logit of V_t is linear in."""
    value: Tensor
    """[N, T] V_t: probability of success once token t is known."""
    before: Tensor
    """[N, T] V_{t-1}; q at the first token."""
    last: Tensor
    """[N, T] bool: the last token of an answer."""


def heard(seen: Reading) -> Tensor:
    """[N, T] bool: tokens of an answer to which all was told."""
    return (seen.share > 0) & seen.told[:, None]


def read(
    outcome: Tensor,
    expected: Tensor,
    told: Tensor,
    words: Tensor,
    fit: Tensor,
    action_mask: Tensor,
    episode: Tensor,
    turn: Tensor,
) -> Reading:
    """Probability of success along every answer.

        logit V_t = logit q + slope D_t + c_quarter(t)        V_0 = q

    V_{t-1} knows nothing of token t. Without fit, or where not all was told, V is q.

    Args:
        outcome, expected, told: [N]; see `Reading`.
        words: [N, T] d_t.
        fit: [5] slope and the four c.
        action_mask: [N, T] bool.
        episode: [N] ids.
        turn: [N, T] number of the turn within its episode.
    """
    words = words.where(action_mask & told[:, None], 0.0)
    number = running_sum(action_mask.to(words.dtype), action_mask, episode, turn)
    length = sum_by(action_mask.sum(1), episode)[:, None].expand_as(number)
    so_far = running_sum(words, action_mask, episode, turn)
    here, earlier = features(so_far, number, length), features(so_far - words, number - 1, length)
    prior, fit = expected.logit()[:, None], fit * told[:, None, None]
    value = (prior + (here * fit).sum(-1)).sigmoid()
    before = torch.where(number > 1, (prior + (earlier * fit).sum(-1)).sigmoid(), expected[:, None])
    last = action_mask & (number == length)
    return Reading(outcome, expected, told, words, action_mask / length.clamp(min=1), here, value, before, last)


def trusted(seen: Reading, trust: float, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    """(V_t, V_{t-1}, mix) as far as the evidence is trusted: mix = max(1 - trust, floor).

    Where it is not trusted at all, or not all was told: (q, q, 1), which is the baseline alone.

    Args:
        trust, floor: from 0 to 1.

    Returns:
        [N, T], [N, T], [N, 1].
    """
    used, q = (seen.told & (trust > 0))[:, None], seen.expected[:, None]
    return seen.value.where(used, q), seen.before.where(used, q), torch.where(used, max(1 - trust, floor), 1.0)


def salient(seen: Reading, past: Mapping[str, Tensor], share: float) -> Tensor:
    """How much a token counts by what the evidence says of it, the usual word counting 1.

        1 - share + share min(|d_t| / usual, 4)

    Args:
        past: what `learned` returned; its `usual` is the running mean of |d|.
        share: from 0 to 1.

    Returns:
        [N, T]; 1 where not all was told, and before there is a usual word.
    """
    usual = past.get("usual", seen.words.new_zeros(()))
    known = seen.told[:, None] & (usual > 0)
    word = (seen.words.abs() / usual.clamp(min=1e-12)).clamp(max=4)
    return torch.where(known, 1 - share + share * word, 1.0)


def blended(after: Tensor, before: Tensor, outcome: Tensor, mix: Tensor | float) -> Tensor:
    """What a token changed, and a share of what is left unexplained.

        A_t = (V_t - V_{t-1}) + mix (R - V_t)

        mix   A_t              variance, T steps that tell as much    bias
        1     R - V_{t-1}      (T + 1) / 2                            none, whatever V
        0     V_t - V_{t-1}    1                                      -E[R - V_t]: none if V is right

    Variances are sums over the answer, in units of that of R; a constant V has T at any mix. If V is a martingale with
    skill S, and mix = 1 - S, the bias is at most S sqrt(1 - S) times the baseline's error, both root mean squares: none
    at either end.

    Args:
        after, before, outcome, mix: V_t, V_{t-1}, R and the mix, of shapes that broadcast to [N, T].
    """
    return (after - before) + mix * (outcome - after)


def credited(
    value: Tensor, before: Tensor, seen: Reading, mix: Tensor | float, group: Tensor, episode: Tensor
) -> Tensor:
    """`blended`, its baseline freed of length: for a loss in which an answer of n tokens counts 1 / n.

        A_t = (V_t - V_{t-1}) + mix (R - V_t + (S - V_{t-1}) (n / N - 1))

        S, N    mean of the siblings' outcomes, and of their lengths; of one who has none, its own

    Over n, R - V_{t-1} alone would favour short answers where V is low and long ones where it is high, for
    E[V grad log pi / n] is V grad E[1 / n], and not 0. With the last term it is (R - S) / n + (S - V_{t-1}) / N: the
    first is GRPO's, not divided by a standard deviation; N does not depend on the answer, so the second has mean 0.

    Args:
        value, before: [N, T] V_t and V_{t-1}, or [N, 1].
        group, episode: [N] ids.
    """
    outcome, n = seen.outcome, sum_by(seen.share.gt(0).sum(1), episode).to(before.dtype)
    siblings, usual = (own - leave_one_out(own, group, episode) for own in (outcome, n))
    free = (siblings[:, None] - before) * (n / usual.clamp(min=1) - 1)[:, None]
    return blended(value, before, outcome[:, None], mix) + mix * free


def ridge_logistic(x: Tensor, outcome: Tensor, offset: Tensor, weight: Tensor, *, ridge: float = 2.0) -> Tensor:
    """Logistic regression of outcomes, drawn towards 0.

        minimise over w        sum_m weight_m (softplus(z_m) - outcome_m z_m) + ridge |w|^2 / 2        z = offset + x w

    By Newton's method in float64 on the CPU; a step that would not lower the sum, as where all outcomes are already
    explained, is halved until it does.

    Args:
        x: [M, F].
        outcome, offset, weight: [M].

    Returns:
        [F]; 0 without data.
    """
    design, y, start, share = (tensor.cpu().double() for tensor in (x, outcome, offset, weight))

    def total(w: Tensor) -> Tensor:
        z = start + design @ w
        return (share * (torch.nn.functional.softplus(z) - y * z)).sum() + ridge * w.square().sum() / 2

    w = design.new_zeros(x.shape[1])
    for _ in range(100):
        p = (start + design @ w).sigmoid()
        slope = design.T @ (share * (p - y)) + ridge * w
        curvature = design.T @ ((share * p * (1 - p))[:, None] * design) + ridge * torch.eye(len(w)).to(w)
        step = torch.linalg.solve(curvature, slope)
        gain = slope @ step
        while gain > 1e-9 and total(w - step) > total(w):  # below that, only rounding makes a difference
            step = step / 2
        w = w - step
        if gain < 1e-20:
            break
    return w.to(x)


def skill(before: Tensor, after: Tensor, *, least: int = 16, errors: float = 1.645) -> tuple[Tensor, Tensor]:
    """Share of the baseline's squared error that the evidence explains, and how much of it is beyond doubt.

        S = 1 - sum_g after_g / sum_g before_g
        trust = max(S - errors se, 0)        se = sqrt(sum_g (before_g - after_g - S before_g)^2) / sum_g before_g

    1.645 standard errors: a teacher without skill is trusted once in twenty times. Errors must be those of a fit that
    had not seen them. Ranking answers rightly is not enough for trust, as it would be by an AUC: noise of any size that
    keeps the order, or a last token that gives the answer away, would pass.

    Args:
        before, after: [K] sums over a group's answers of (R - V_0)^2 and (R - V_T)^2.
        least: with fewer groups trust is 0.

    Returns:
        (S, trust), both [].
    """
    if not len(before):
        return before.new_zeros(()), before.new_zeros(())
    whole = before.sum()
    found = 1 - after.sum() / whole
    doubt = (before - after - found * before).square().sum().sqrt() / whole
    return found, (found - errors * doubt).clamp(min=0) * (len(before) >= least)


def observations(step: int, seen: Reading) -> Tensor:
    """What a batch tells of slope and intercepts: a row for every token of an answer to which all was told.

    Returns:
        [M, 9] step, R, logit q, weight (1 for an answer, shared by its tokens), features; the same however the rows of
        the batch are ordered, as of several processes.
    """
    facts = torch.stack([torch.full_like(seen.outcome, step), seen.outcome, seen.expected.logit()], -1)
    facts = torch.cat([facts[:, None].expand(-1, seen.share.shape[1], -1), seen.share[..., None], seen.features], -1)
    return ordered(facts[heard(seen)])


def errors(step: int, seen: Reading, group: Tensor) -> Tensor:
    """How wrong V was at the end, and q: a row for every group of mixed outcome to which all was told.

    Returns:
        [K, 3] step, sum over the group's answers of (R - V_T)^2, of (R - q)^2; in an order of their own.
    """
    after = ((seen.outcome[:, None] - seen.value).square() * seen.last).sum(1)
    before = (seen.outcome - seen.expected).square() * seen.last.any(1)
    mixed = (sum_by(seen.outcome, group) > 0) & (sum_by(1 - seen.outcome, group) > 0)
    rows = torch.stack([torch.full_like(after, step), sum_by(after, group), sum_by(before, group)], -1)
    return ordered(rows[first_row(group) & mixed & seen.told])


def ordered(rows: Tensor) -> Tensor:
    """[K, C] on the CPU, sorted by the first column, then the second, …"""
    rows = rows.cpu()
    return rows[rows.unique(dim=0, return_inverse=True)[1].argsort()]


def batches(rows: Tensor, count: int) -> Tensor:
    """Rows, the first column their step, of the last `count` batches up to the newest that has any."""
    return rows[rows[:, 0] > rows[-1:, 0] - count]


def newest(rows: Tensor, count: int) -> Tensor:
    """Rows, the first column their step, of the fewest whole batches that hold the last `count` rows."""
    return rows[(rows[:, 0] > rows[:, :1]).sum(1) < count]


def learned(past: Mapping[str, Tensor], step: int, seen: Reading, group: Tensor, episode: Tensor) -> dict[str, Tensor]:
    """What is known once a batch's outcomes are: the running mean of outcomes, slope and intercepts of the last 10
    batches, and how far earlier ones explained outcomes that they had not seen, over the fewest whole batches
    that hold the last 96 mixed groups.

    Args:
        past: what this returned last, or {}; `seen` was read with its fit and mean.

    Returns:
        mean []; usual [], the running mean of |d| where all was told; fit [5]; skill, trust [] from the second batch
        on; tokens [M, 9] and groups [K, 3] of the batches that all this is made from. A batch without rows teaches
        nothing.
    """
    if not len(episode):
        return dict(past)
    mean = seen.outcome[first_row(episode)].mean()
    new = observations(step, seen)
    tokens = batches(torch.cat([past.get("tokens", new[:0]).cpu(), new]), 10)
    fit = ridge_logistic(tokens[:, 4:], tokens[:, 1], tokens[:, 2], tokens[:, 3])
    memory = {**past, "mean": 0.9 * past.get("mean", mean) + 0.1 * mean, "fit": fit, "tokens": tokens}
    words = seen.words[heard(seen)].abs().double().sort().values  # one sum however rows are ordered
    if len(words):
        memory["usual"] = 0.9 * past.get("usual", words.mean()) + 0.1 * words.mean()
    if "fit" not in past:  # nothing to be judged yet
        return memory
    tried = errors(step, seen, group)
    groups = newest(torch.cat([past.get("groups", tried[:0]).cpu(), tried]), 96)
    found, trust = skill(groups[:, 2], groups[:, 1])
    return memory | {"groups": groups, "skill": found, "trust": trust}


def watched(past: Mapping[str, Tensor], seen: Reading, group: Tensor, gap: Tensor | None = None) -> dict[str, float]:
    """Numbers worth watching: trust, skill, slope (about 1 for a right hint against a wrong one), mean V_T of successes
    and of failures, standard deviation of d, and with `gap` the `style` of both hints. What there is none of is left
    out. `teacher/used` is the share of groups to which all was told: the others go by their reward alone.
    """
    words, end = seen.words[heard(seen)], seen.last & seen.told[:, None]
    won, nothing = seen.outcome[:, None] > 0, seen.outcome.new_zeros(1)
    found = {name: past.get(name, nothing) for name in ("trust", "skill")} | {"slope": past.get("fit", nothing)[:1]}
    found |= {"value/success": seen.value[end & won], "value/failure": seen.value[end & ~won]}
    if len(words):
        found["evidence"] = words.std(correction=0)
    named = {f"gate/{name}": values for name, values in found.items()}
    named["teacher/used"] = seen.told[first_row(group)].double()
    told = {name: float(values.mean()) for name, values in named.items() if values.numel()}
    return told if gap is None else told | style(gap, seen)


def style(gap: Tensor, seen: Reading) -> dict[str, float]:
    """What both hints say in common of the student's tokens, which their contrast leaves out: mean of
    (log teacher + log counter) / 2 - log proximal, in nats, over tokens of groups to which all was told.

    Args:
        gap: [N, T] log teacher - log proximal.
    """
    common = (gap - seen.words / 2)[heard(seen)]
    return {"gate/style": float(common.mean())} if len(common) else {}
