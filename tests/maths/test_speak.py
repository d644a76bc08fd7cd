import pytest
import torch

from tropism.maths.logp import entropy, everything, log_softmax
from tropism.maths.speak import said

close = torch.testing.assert_close

TOKENS = torch.tensor([1, 1, 2])


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_token_of_probability_zero_adds_nothing_to_the_entropy_or_its_gradient():
    """0 times minus infinity is not a number."""
    values = torch.tensor([[1.0, 2.0, -torch.inf]], requires_grad=True)
    out = said(values, torch.tensor([1]), 1.0)
    plain = torch.tensor([[1.0, 2.0]], requires_grad=True)
    close(out.entropy, entropy(log_softmax(plain, 1.0)))
    (gradient,) = torch.autograd.grad(out.entropy.sum() + out.logp.sum(), values)
    other = said(plain, torch.tensor([1]), 1.0)
    (without,) = torch.autograd.grad(other.entropy.sum() + other.logp.sum(), plain)
    close(gradient[:, :2], without)
    assert gradient[0, 2] == 0


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_what_is_said_is_read_off_the_softmax(temperature):
    logits, ids = drawn(3, 5), torch.tensor([[2, 0, -1], [1, -1, -1], [0, 1, 4]])
    logp = (logits / temperature).log_softmax(-1)
    out = said(logits, TOKENS, temperature, ids=ids)
    close(out.logp, logp[[0, 1, 2], TOKENS])
    close(out.entropy, torch.distributions.Categorical(logits=logits / temperature).entropy())
    close(out.topk_logp, torch.stack([logp[n, ids[n]] for n in range(3)]).masked_fill(ids < 0, 0.0))
    alone = said(logits, TOKENS, temperature)
    assert alone.topk_logp is None and alone.topk_ids is None


def test_every_id_sums_to_probability_one_and_the_likeliest_come_first():
    out = said(drawn(3, 5), TOKENS, 1.0, ids=torch.arange(5).expand(3, 5))
    close(out.topk_logp.exp().sum(-1), torch.ones(3, dtype=torch.float64))
    best = said(drawn(3, 5), TOKENS, 1.0, top_k=2)
    close(best.topk_logp, drawn(3, 5).log_softmax(-1).topk(2).values)
    assert torch.equal(best.topk_ids, drawn(3, 5).topk(2).indices)
    both = said(drawn(3, 5), TOKENS, 1.0, ids=torch.tensor([[3], [-1], [0]]), top_k=2)
    assert torch.equal(both.topk_ids, best.topk_ids) and both.topk_logp.shape == (3, 1)


@pytest.mark.parametrize("most", [1 << 28, 2 * 8 * 5])
def test_a_whole_vocabulary_held_once_is_the_same_written_out(most):
    """Values and gradients, bit for bit; ids in another order are still looked up."""
    once = torch.arange(5).expand(3, 5)
    assert everything(once, 5) and not everything(once, 6) and not everything(once.clone(), 5)
    found = []
    for ids in (once, once.clone()):
        logits = drawn(3, 5).requires_grad_()
        out = said(logits, TOKENS, 0.6, ids=ids, most=most)
        (out.topk_logp * drawn(3, 5, seed=1)).sum().add(out.logp.sum()).backward()
        found.append((out.topk_logp.detach(), logits.grad))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    back = said(drawn(3, 5), TOKENS, 0.6, ids=once.flip(-1).contiguous()).topk_logp
    assert torch.equal(back, found[0][0].flip(-1))


def test_nothing_said_is_nothing():
    out = said(drawn(0, 4), TOKENS[:0], 1.0, weight=drawn(5, 4), top_k=2)
    assert out.logp.shape == out.entropy.shape == (0,) and out.topk_ids.shape == (0, 2)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("most", [1 << 28, 2 * 4 * 5])
def test_the_gradients_agree_with_finite_differences(temperature, most):
    """With a head and without one; at once, and in chunks of two tokens."""
    ids = torch.tensor([[1, 2, -1], [0, -1, 4], [2, 3, 1]])

    def outputs(out):
        return out.logp, out.entropy, out.topk_logp

    def by_head(states, weight, bias):
        return outputs(said(states, TOKENS, temperature, weight=weight, bias=bias, ids=ids, most=most))

    given = tuple(drawn(*shape, seed=n).requires_grad_() for n, shape in enumerate([(3, 4), (5, 4), (5,)]))
    assert torch.autograd.gradcheck(by_head, given)
    assert torch.autograd.gradcheck(
        lambda logits: outputs(said(logits, TOKENS, temperature, ids=ids, most=most)), drawn(3, 5).requires_grad_()
    )
    assert torch.autograd.gradcheck(
        lambda states: said(states, TOKENS, temperature, weight=drawn(5, 4), most=most).logp,
        drawn(3, 4).requires_grad_(),
    )


@pytest.mark.parametrize("likeliest", [0, 2])
def test_the_gradient_of_a_sum_of_all_that_is_said_is_the_sum_of_gradients(likeliest):
    """Of token, entropy and ids that were given, or of the likeliest ones; against torch's own gradient."""
    logits, by = drawn(3, 5).requires_grad_(), [drawn(3, seed=1), drawn(3, seed=2), drawn(3, 2, seed=3)]
    logp = (logits / 0.7).log_softmax(-1)
    ids = logp.topk(2).indices if likeliest else torch.tensor([[1, 2], [0, 3], [2, 4]])
    expected = [logp[[0, 1, 2], TOKENS], -(logp.exp() * logp).sum(-1), logp.gather(1, ids)]
    out = said(logits, TOKENS, 0.7, **({"top_k": 2} if likeliest else {"ids": ids}))
    found = [out.logp, out.entropy, out.topk_logp]
    slopes = [
        torch.autograd.grad(sum((value * w).sum() for value, w in zip(values, by, strict=True)), logits)[0]
        for values in (found, expected)
    ]
    close(*slopes)


@pytest.mark.parametrize("most", [1 << 28, 2 * 4 * 5])
def test_a_head_with_a_bias_says_what_its_logits_say_with_gradients_to_all_that_learns(most):
    """In the precision of the weights; none is computed for what does not learn."""
    shapes = {"states": (3, 4), "weight": (5, 4), "bias": (5,)}
    given = {name: drawn(*shape, seed=n).requires_grad_() for n, (name, shape) in enumerate(shapes.items())}
    out = said(given["states"], TOKENS, 1.0, weight=given["weight"], bias=given["bias"], most=most)
    plain = said(given["states"] @ given["weight"].t() + given["bias"], TOKENS, 1.0)
    close(out.logp, plain.logp)
    close(out.entropy, plain.entropy)
    for name, value in given.items():
        slope, expected = (torch.autograd.grad(o.logp.sum(), value, retain_graph=True)[0] for o in (out, plain))
        close(slope, expected, atol=1e-12, rtol=0)
        others = {other: v.detach() if other != name else v for other, v in given.items()}
        alone = said(others["states"], TOKENS, 1.0, weight=others["weight"], bias=others["bias"], most=most)
        close(torch.autograd.grad(alone.logp.sum(), value)[0], expected, atol=1e-12, rtol=0)


def test_chunks_change_nothing():
    states, weight, tokens = drawn(7, 4), drawn(6, 4, seed=1), torch.arange(7) % 6
    whole = said(states, tokens, 0.8, weight=weight, top_k=3)
    for rows in (1, 2, 6):
        parts = said(states, tokens, 0.8, weight=weight, top_k=3, most=4 * 6 * rows)
        for name, value in vars(whole).items():
            close(getattr(parts, name), value)


def test_no_array_over_the_vocabulary_outgrows_a_chunk(monkeypatch):
    import tropism.maths.speak as module

    real, sizes = module.log_softmax, []
    monkeypatch.setattr(module, "log_softmax", lambda z, t: sizes.append(z.numel()) or real(z, t))
    weight, tokens = drawn(50, 4, seed=1).requires_grad_(), torch.arange(40)
    said(drawn(40, 4), tokens, 1.0, weight=weight, most=4 * 50 * 8).logp.sum().backward()
    assert sizes == [8 * 50] * 10
    sizes.clear()
    said(drawn(40, 50).requires_grad_(), tokens, 1.0, most=4 * 50 * 8).logp.sum().backward()
    assert sizes == [8 * 50] * 10, "logits, not states"
    sizes.clear()
    said(drawn(2, 4), tokens[:2], 1.0, weight=weight, most=1)
    assert sizes == [50] * 2, "a token is the least"


@pytest.mark.parametrize("given", ["states", "logits"])
def test_half_precision_computes_the_products_and_nothing_else(given):
    states, weight = drawn(3, 16).float().requires_grad_(), drawn(5, 16, seed=1).float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        head = {"weight": weight} if given == "states" else {}
        out = said(states if head else states @ weight.t(), TOKENS, 1.0, **head)
    out.logp.sum().backward()
    close(out.logp, said(states, TOKENS, 1.0, weight=weight).logp, atol=0.05, rtol=0.05)
    assert out.logp.dtype == out.entropy.dtype == weight.grad.dtype == states.grad.dtype == torch.float32
    expected = torch.autograd.grad(said(states, TOKENS, 1.0, weight=weight).logp.sum(), weight)[0]
    close(weight.grad, expected, atol=0.05 * float(expected.abs().max()), rtol=0)
    assert torch.equal(states.grad, states.grad.bfloat16().float()), "a product of the backward pass"


def test_chunks_in_half_precision_are_added_up_in_float32():
    """Each of 512 adds a half to a gradient that bfloat16 no longer raises by a half."""
    states, weight, bias = torch.ones(512, 1), torch.zeros(2, 1).requires_grad_(), torch.zeros(2).requires_grad_()
    tokens = torch.zeros(512, dtype=torch.long)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        said(states, tokens, 1.0, weight=weight, bias=bias, most=4 * 2).logp.sum().backward()
    assert weight.grad[0, 0] == bias.grad[0] == 256
