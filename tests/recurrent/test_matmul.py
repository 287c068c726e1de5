"""The float32 matrix product on the CPU: strides, odd sizes, gradients, and when PyTorch's own is used instead."""

import pytest
import torch
import torch.nn.functional as F

import lmengine
from lmengine.ops.matmul import linear, matmul
from tests.numerics import assert_right


def layouts(matrix):
    yield matrix
    yield matrix.t().contiguous().t()
    yield torch.stack((matrix, matrix), dim=2)[..., 1]
    yield matrix[:1].expand_as(matrix)


@pytest.mark.parametrize("rows, depth, columns", [(1, 1, 1), (3, 5, 7), (97, 300, 70), (13, 257, 129), (200, 64, 33)])
def test_numerics_of_any_strides(rows, depth, columns):
    torch.manual_seed(0)
    for left in layouts(torch.randn(rows, depth)):
        for right in layouts(torch.randn(depth, columns)):
            assert_right(matmul(left, right), left @ right, left.double() @ right.double(), tiny=1e-5)


def test_linear_and_its_gradients():
    torch.manual_seed(0)
    leaves = [torch.randn(4, 9, 50), torch.randn(70, 50), torch.randn(70)]
    grad = torch.randn(4, 9, 70)
    results = []
    for function, dtype in ((linear, torch.float32), (F.linear, torch.float32), (F.linear, torch.float64)):
        inputs = [x.to(dtype).requires_grad_() for x in leaves]
        output = function(*inputs)
        results.append([output, *torch.autograd.grad(output, inputs, grad.to(dtype))])
    for ours, theirs, exact in zip(*results, strict=True):
        assert_right(ours, theirs, exact, tiny=1e-5)


@pytest.mark.parametrize("shapes", [((0, 3), (3, 4)), ((2, 0), (0, 4)), ((2, 3), (3, 0))])
def test_empty(shapes):
    left, right = (torch.randn(*shape) for shape in shapes)
    torch.testing.assert_close(matmul(left, right), left @ right)
    bias = torch.randn(right.shape[1])
    torch.testing.assert_close(linear(left, right.t(), bias), F.linear(left, right.t(), bias))


def test_opcheck():
    left, right, bias = (torch.randn(*shape, requires_grad=True) for shape in ((5, 6), (6, 7), (7,)))
    torch.library.opcheck(torch.ops.lmengine.matmul, (left, right, bias))
    torch.library.opcheck(torch.ops.lmengine.matmul, (left, right.detach(), None))


def test_what_is_not_ours_is_pytorchs():
    left, right = torch.randn(3, 4, dtype=torch.bfloat16), torch.randn(4, 5, dtype=torch.bfloat16)
    assert torch.equal(matmul(left, right), left @ right)
    with lmengine.use_backend("reference"):
        assert torch.equal(matmul(left.float(), right.float()), left.float() @ right.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(left.float(), right.float().t()).dtype == torch.bfloat16


def test_operator_rejects_what_does_not_fit():
    with pytest.raises(RuntimeError, match="right: expected size 4 in dimension 0, got 5"):
        torch.ops.lmengine.matmul(torch.randn(3, 4), torch.randn(5, 6), None)
    with pytest.raises(RuntimeError, match="bias: expected size 6 in dimension 0, got 3"):
        torch.ops.lmengine.matmul(torch.randn(3, 5), torch.randn(5, 6), torch.randn(3))
