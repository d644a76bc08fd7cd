import pytest
import torch

from tropism.maths.check import same_shape


def test_equal_shapes_pass():
    same_shape("here", a=torch.zeros(2, 3), b=torch.ones(2, 3), c=torch.ones(2, 3, dtype=torch.bool))


@pytest.mark.parametrize(("a", "b"), [((4, 7), (4,)), ((4, 4), (4,)), ((4, 7), (4, 1)), ((4, 7), (1, 7))])
def test_what_torch_would_broadcast_in_silence_is_refused(a, b):
    """[N] times [N, T] broadcasts without a word when N = T."""
    with pytest.raises(ValueError, match="they must match"):
        same_shape("here", first=torch.zeros(a), second=torch.zeros(b))


@pytest.mark.parametrize("order", [("log_ratio", "advantage"), ("advantage", "log_ratio")])
def test_the_message_names_the_function_the_flat_tensor_first_and_the_way_out(order):
    shapes = {"log_ratio": torch.zeros(4, 7), "advantage": torch.zeros(4)}
    with pytest.raises(ValueError) as error:
        same_shape("clipped_surrogate", **{name: shapes[name] for name in order})
    assert str(error.value) == (
        "clipped_surrogate: `advantage` is [4] but `log_ratio` is [4, 7]; they must match. "
        "Use spread() to give every token its row's value."
    )


def test_every_tensor_is_compared():
    with pytest.raises(ValueError, match="`third` is"):
        same_shape("here", first=torch.zeros(2), second=torch.zeros(2), third=torch.zeros(3))
