"""Which of attention's CUDA kernels run, and on a Hopper GPU both of them against float64."""

import contextlib

import pytest
import torch

import lmengine
from lmengine.backends import library, unusable
from lmengine.ops.attention import attention
from lmengine.ops.attention_reference import reference
from tests.attention.test_attention import tolerance
from tests.numerics import assert_right

HOPPER = unusable("cuda") is None and torch.cuda.get_device_capability() == (9, 0)
needs_hopper = pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")


@contextlib.contextmanager
def use_sm90(use):
    before = library().lmengine_attention_use_sm90(use)
    try:
        yield
    finally:
        library().lmengine_attention_use_sm90(before)


@pytest.mark.skipif(library() is None or not library().lmengine_built_with_cuda(), reason="built without CUDA")
def test_the_kernels_for_hopper_can_be_switched_off():
    with use_sm90(0):
        assert library().lmengine_attention_use_sm90(0) == 0
        with use_sm90(1):
            assert library().lmengine_attention_use_sm90(1) == 1
        assert library().lmengine_attention_use_sm90(0) == 0
    assert library().lmengine_attention_use_sm90(1) == 1


@needs_hopper
@pytest.mark.parametrize("use", [1, 0], ids=["sm_90", "sm_80"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    "shape",
    [(2, 4, 2, 1000, 1000, 64), (1, 16, 16, 2048, 2048, 128), (1, 8, 1, 333, 1500, 128), (3, 2, 2, 257, 65, 80)],
    ids=str,
)
def test_both_kernels(shape, is_causal, dtype, use):
    batch, heads, kv_heads, queries, keys, dim = shape
    tensors = []
    for count, length in ((heads, queries), (kv_heads, keys), (kv_heads, keys), (heads, queries)):
        tensors.append(torch.randn(batch, length, count, dim, device="cuda").to(dtype).transpose(1, 2))

    def results(function, tensors):
        *arguments, grad_output = (tensor.detach().clone().requires_grad_() for tensor in tensors)
        output = function(*arguments)
        return [output, *torch.autograd.grad(output, arguments, grad_output)]

    def plain(query, key, value):
        return reference(query, key, value, is_causal)[0]

    with use_sm90(use), lmengine.use_backend("cuda"):
        mine = results(lambda *arguments: attention(*arguments, is_causal), tensors)
    other, right = results(plain, tensors), results(plain, [tensor.double() for tensor in tensors])
    for name, a, b, c in zip(("output", "grad_query", "grad_key", "grad_value"), mine, other, right, strict=True):
        assert_right(a, b, c, tiny=tolerance(dtype) * max(1.0, c.abs().max().item()), name=name)


@needs_hopper
def test_deterministic_gradients():
    tensors = [torch.randn(1, 4, 3000, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    with lmengine.use_backend("cuda"):
        first, second = (
            torch.autograd.grad(attention(*tensors, deterministic=True).float().square().sum(), tensors)
            for _ in range(2)
        )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
