import copy

import pytest
import torch

from tropism.maths import linear as module
from tropism.maths.linear import Linear, linear, packed, product, suits, use

close = torch.testing.assert_close


def given(dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    return [torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in ((2, 3, 8), (5, 8), (5,))[: 2 + bias]]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_those_of_torch(dtype, bias):
    found = []
    for function in (linear, torch.nn.functional.linear):
        inputs = given(dtype, bias)
        y = function(*inputs)
        y.square().sum().backward()
        found.append([y, *(x.grad for x in inputs)])
    for mine, theirs in zip(*found, strict=True):
        close(mine, theirs)


def test_only_float32_on_a_cpu_outside_autocast_goes_by_onednn():
    x, weight, _ = given()
    assert suits(x, weight) == module.AVAILABLE
    assert not suits(x.double(), weight.double()) and not suits(x.double(), weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not suits(x, weight) and linear(x, weight).dtype == torch.bfloat16


def test_what_needs_no_gradient_gets_none():
    x, weight, bias = given()
    linear(x.detach(), weight, bias.detach()).sum().backward()
    assert weight.grad is not None and bias.grad is None
    x, weight, _ = given()
    linear(x, weight.detach()).sum().backward()
    assert x.grad is not None and weight.grad is None


def test_a_weight_that_was_laid_out_gives_the_same_product():
    x, weight, bias = given()
    if module.AVAILABLE:
        laid_out = packed(weight, 6)
        assert not laid_out.requires_grad
        with torch.no_grad():
            close(product(x, laid_out, bias), torch.nn.functional.linear(x, weight, bias))


def test_layers_keep_their_weights_and_others_their_class():
    class Other(torch.nn.Linear):
        pass

    net = torch.nn.Sequential(torch.nn.Linear(4, 4), Other(4, 4), torch.nn.Linear(4, 2, bias=False))
    x, before, weights = torch.randn(3, 4), net, [*net.parameters()]
    expected = copy.deepcopy(before)(x)
    use(net)
    assert [type(layer) for layer in net] == [Linear, Other, Linear]
    assert all(one is other for one, other in zip(net.parameters(), weights, strict=True))
    close(net(x), expected)
    close(copy.deepcopy(net)(x), expected)


def test_without_the_operator_torch_computes(monkeypatch):
    monkeypatch.setattr(module, "AVAILABLE", False)
    x, weight, bias = given()
    assert torch.equal(linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))
