"""linear_cross_entropy against PyTorch's two operators."""

import pytest
import torch
import torch.nn.functional as F

from lmengine.ops.loss import CHUNK, linear_cross_entropy
from tests.numerics import assert_right


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("rows", "vocabulary", "dim"), [(1, 1, 1), (7, 50, 16), (CHUNK + 5, 333, 24)])
@pytest.mark.parametrize("magnitude", [1.0, 30.0])
def test_right(dtype, rows, vocabulary, dim, magnitude):
    given = [torch.randn(shape) for shape in ((rows, dim), (vocabulary, dim), (vocabulary,))]
    given[0] *= magnitude
    targets = torch.randint(vocabulary, (rows,))

    def run(function, dtype):
        leaves = [tensor.to(torch.bfloat16 if low else tensor.dtype).to(dtype).requires_grad_() for tensor in given]
        loss = function(*leaves)
        (loss * 3).backward()
        return [loss.detach(), *(leaf.grad for leaf in leaves)]

    low = dtype == torch.bfloat16
    plain = lambda f, w, b: F.cross_entropy(F.linear(f, w, b).float() if low else F.linear(f, w, b), targets)  # noqa: E731
    reference = run(lambda f, w, b: F.cross_entropy(F.linear(f, w, b), targets), torch.float64)
    theirs = run(plain, dtype)
    ours = run(lambda f, w, b: linear_cross_entropy(f, w, b, targets), dtype)
    for name, a, b, c in zip(("loss", "features", "weight", "bias"), ours, theirs, reference, strict=True):
        # the gradient is made before it is known by what it will be multiplied: that is one rounding more
        rounding = torch.finfo(a.dtype).eps / 2 * c.abs().max().item()
        assert_right(a, b, c, name=name, tiny=1e-6 * magnitude + rounding)


def test_without_gradients_and_with_some():
    features, weight, bias = torch.randn(9, 4), torch.randn(6, 4), torch.zeros(6, requires_grad=True)
    targets = torch.randint(6, (9,))
    linear_cross_entropy(features, weight, bias, targets).backward()
    assert bias.grad is not None and features.grad is None
    with torch.no_grad():
        loss = linear_cross_entropy(features, weight, bias, targets)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, F.cross_entropy(F.linear(features, weight, bias), targets))


def test_bad_shapes():
    features, weight, bias, targets = torch.randn(9, 4), torch.randn(6, 4), torch.zeros(6), torch.zeros(9).long()
    for name, given in (
        ("features", (features[:, :3], weight, bias, targets)),
        ("features", (features[:0], weight, bias, targets[:0])),
        ("bias", (features, weight, bias[:5], targets)),
        ("targets", (features, weight, bias, targets[:8])),
    ):
        with pytest.raises(ValueError, match=f"{name}: expected shape"):
            linear_cross_entropy(*given)
