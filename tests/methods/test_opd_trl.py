"""The same divergences as TRL 1.16.0's GKDTrainer, whose own code computes the other side."""

import os

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import pytest
import torch
from trl.experimental.gkd import GKDTrainer

from taught import state
from tropism.methods.opd import OPD
from tropism.teacher import Teacher

ALL = Teacher(who="frozen", top_k="all")
SETTINGS = [({}, 1.0), ({"divergence": "forward"}, 0.0)]
SETTINGS += [({"divergence": "jensen_shannon", "mix": mix}, mix) for mix in (0.1, 0.5, 0.9)]


@pytest.mark.parametrize(("settings", "beta"), SETTINGS)
def test_loss_and_gradient_are_those_of_trl(settings, beta):
    """Its beta = 1 is the reverse and beta = 0 the forward KL itself, not the limit of the mixture, which is 0."""
    generator = torch.Generator().manual_seed(0)
    ours, teacher = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    theirs = ours.clone().requires_grad_()
    ours = ours.requires_grad_()
    out, batch = state(ours, teacher.softmax(-1), teacher.softmax(-1))
    method = OPD(teacher=ALL, **settings)
    loss = (method.loss(out, batch, method.credit(batch)).values * method.weights(batch)).sum()
    expected = GKDTrainer.generalized_jsd_loss(theirs[None, None], teacher[None, None], beta=beta, reduction="sum")
    assert expected > 0.01
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, ours), torch.autograd.grad(expected, theirs))
