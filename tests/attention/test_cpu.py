"""What attention's CPU kernels have of their own: blocks, threads, instruction sets and lengths beyond memory for all scores."""

import os
import resource
import subprocess
import sys
import time

import pytest
import torch

import lmengine
from lmengine.backends import unusable
from lmengine.ops.attention import attention, lowered
from lmengine.ops.attention_reference import dropout_kept
from tests.attention.test_features import OPTIONS, check_right, inputs, integers

pytestmark = pytest.mark.skipif(unusable("cpu") is not None, reason=str(unusable("cpu")))


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", OPTIONS)
def test_several_blocks(case, dtype):
    """Of 48 queries and 128 keys, the last ones partly filled."""
    check_right(inputs(101, 301, 2, 24, 33, dtype, "cpu"), OPTIONS[case](101, 301), "cpu", tiny=1e-5)


@pytest.mark.parametrize("mask_size", [(1, 1, 200, 330), (1, 1, 1, 330), (1, 1, 200, 1), (1, 2, 1, 1)], ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_few_heads_are_shared_by_the_threads(threads, mask_size, kv_heads):
    """Threads then share a head's keys: the gradients of queries and of a mask of one column are sums over threads."""
    query, key, value = ((torch.randn(1, n, heads, 40)).transpose(1, 2).requires_grad_()
                         for n, heads in ((200, 2), (330, kv_heads), (330, kv_heads)))  # fmt: skip
    options = {"mask": torch.randn(mask_size).requires_grad_(), "is_causal": True, "bottom_right": True}
    check_right([query, key, value], options, "cpu", tiny=1e-5)


@pytest.mark.parametrize("mask_size", [(1, 1, 300, 330), (3, 4, 1, 1), (1, 4, 300, 330)], ids=str)
def test_the_backward_gives_the_same_bits_again(threads, mask_size):
    tensors = [torch.randn(3, heads, n, 32).requires_grad_() for n, heads in ((300, 4), (330, 2), (330, 2))]
    mask = torch.randn(mask_size).requires_grad_()

    def grads():
        output = attention(*tensors, mask=mask, dropout_p=0.1, seed=torch.tensor([5]))
        return torch.autograd.grad(output.square().sum(), [*tensors, mask])

    with lmengine.use_backend("cpu"):
        first = grads()
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(first, grads(), strict=True))


def test_many_short_heads(threads):
    tensors = [torch.randn(60, 30, 5, 8).requires_grad_() for _ in range(3)]
    check_right(tensors, {"is_causal": True}, "cpu")


@pytest.mark.parametrize("instructions", ["avx2", "avx512"])
def test_older_processors_have_every_feature(instructions):
    code = (
        "import torch, lmengine, tests.attention.test_features as t\n"
        "torch.set_num_threads(1)\n"
        "print(lmengine.info()['instruction set'])\n"
        "for case in t.OPTIONS:\n"
        "    some = case in ('everything', 'dropout', 'padding mask')\n"
        "    for dtype in (torch.float32, *((torch.bfloat16, torch.float16) if some else ())):\n"
        "        t.check_right(t.inputs(53, 150, 2, 20, 30, dtype, 'cpu'), t.OPTIONS[case](53, 150), 'cpu', 1e-5)\n"
    )
    environment = {**os.environ, "LMENGINE_ISA": instructions}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] in (instructions, "avx2")


def test_dropout_of_many_keys_is_that_of_the_reference():
    query, key = torch.zeros(3, 2, 50, 16), torch.zeros(3, 2, 300, 16)
    value, seed = torch.eye(300).expand(3, 2, 300, 300), torch.tensor([-(2**63) + 987654321])
    with lmengine.use_backend("cpu"):
        weights = attention(query, key, value, dropout_p=0.7, seed=seed)
    torch.testing.assert_close(weights, dropout_kept(seed, torch.Size((3, 2, 50, 300)), 0.7) / 300 / 0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"window_size": (20, 20)},
        {"mask": (torch.arange(400)[:, None] // 200 == torch.arange(400) // 200)[None, None]},
        {"window_size": (20, 20), "prefix_lengths": integers(50)},
    ],
    ids=["window", "boolean mask", "window and prefix"],
)
def test_blocks_that_no_query_sees_are_left_out(options, dtype):
    """Even a NaN in them is not read; weights of 0 would make NaNs of it."""
    query, key, value = (torch.randn(1, 2, 400, 32).to(dtype) for _ in range(3))
    with lmengine.use_backend("cpu"):
        clean = attention(query, key, value, **options)
        key[:, :, 290:], value[:, :, 290:] = torch.nan, torch.nan
        output = attention(query, key, value, **options)
    # the block of keys from 256 on has NaNs, which queries up to 200 do not see in any of the cases
    assert torch.equal(output[:, :, :190], clean[:, :, :190])
    assert output[:, :, 380:].isnan().all()


def test_a_nan_stays_in_its_packed_sequence():
    starts = integers(0, 33, 70, 75)
    tensors = [torch.randn(1, 2, 75, 16) for _ in range(3)]
    for dtype in (torch.float32, torch.bfloat16):
        query, key, value = (t.to(dtype).requires_grad_() for t in tensors)
        with torch.no_grad():
            key[:, :, 33:70], value[:, :, 33:70], query[:, :, 40] = torch.nan, torch.inf, torch.nan
        with lmengine.use_backend("cpu"):
            output = attention(query, key, value, cu_seqlens_q=starts, cu_seqlens_k=starts)
            grads = torch.autograd.grad(output[:, :, 70:].sum() + output[:, :, :33].sum(), (query, key, value))
        assert output[:, :, 33:70].isnan().all()
        for result in (output, *grads):
            assert result[:, :, :33].isfinite().all() and result[:, :, 70:].isfinite().all()


def test_packed_lengths_that_do_not_fit_are_refused():
    query = torch.randn(1, 2, 10, 16)
    for name, wrong in (("cu_seqlens_q", integers(0, 4, 11)), ("cu_seqlens_k", integers(0, 12, 10))):
        options = {"cu_seqlens_q": integers(0, 4, 10), "cu_seqlens_k": integers(0, 4, 10)} | {name: wrong}
        with lmengine.use_backend("cpu"), pytest.raises(RuntimeError, match=f"{name}: expected sums of lengths"):
            attention(query, query, query, **options)


@pytest.mark.parametrize("sizes", [(0, 2, 5, 5), (2, 2, 0, 5), (2, 2, 5, 0)], ids=str)
def test_the_gradient_of_a_mask_without_scores_is_zero(sizes):
    batch, heads, queries, keys = sizes
    tensors = [torch.randn(batch, heads, n, 16).requires_grad_() for n in (queries, keys, keys)]
    for mask_size in ((1, 1, 1, 1), (1, heads, queries, 1), (batch, 1, 1, keys)):
        mask = torch.randn(mask_size).requires_grad_()
        with lmengine.use_backend("cpu"):
            (grad,) = torch.autograd.grad(attention(*tensors, mask=mask).sum(), [mask])
        assert grad.shape == mask.shape and (grad == 0).all()


def test_the_gradient_of_a_mask_where_no_query_sees_a_key_is_zero():
    tensors = [torch.randn(1, 1, 300, 16) for _ in range(3)]
    mask = torch.randn(1, 1, 300, 300).requires_grad_()
    with lmengine.use_backend("cpu"):
        output = attention(*tensors, mask=mask, window_size=(10, 0))
        (grad,) = torch.autograd.grad(output.square().sum(), [mask])
    assert (grad.triu(1) == 0).all() and (grad.tril(-11) == 0).all()
    assert (grad.diagonal(dim1=2, dim2=3)[..., 1:] != 0).all()


LONG = 131072


def long_context(options):
    """Output and gradients for one head of LONG queries and keys, and the memory that the call took beside them."""
    tensors = [torch.randn(1, 1, LONG, 8).requires_grad_() for _ in range(3)]
    grad = torch.randn(1, 1, LONG, 8)
    with lmengine.use_backend("cpu"):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        output = attention(*tensors, **options)
        grads = torch.autograd.grad(output, tensors, grad)
        taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return tensors, grad, output, grads, taken * 1024


def check_long(tensors, grad, output, grads, options, places):
    """Some queries and their gradients against the reference, which sees those queries alone."""
    wide = [t.detach().double().requires_grad_() for t in tensors]
    scores = 8**-0.5 * wide[0][:, :, places] @ wide[1].transpose(2, 3)
    position, keys = torch.tensor(places)[:, None], torch.arange(LONG)
    seen = (keys <= position) & (keys >= position - options.get("window_size", (LONG, 0))[0])
    expected = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ wide[2]
    torch.testing.assert_close(output[:, :, places].double(), expected, rtol=1e-4, atol=1e-6)
    (expected_grad,) = torch.autograd.grad(expected, wide[:1], grad[:, :, places].double())
    torch.testing.assert_close(grads[0][:, :, places].double(), expected_grad[:, :, places], rtol=1e-3, atol=1e-6)
    # each query's weights add up to 1
    torch.testing.assert_close(grads[2].double().sum(2), grad.double().sum(2), rtol=1e-3, atol=1e-2)


def test_long_context_with_a_window():
    options = {"is_causal": True, "window_size": (500, 0)}
    start = time.perf_counter()
    *results, _ = long_context(options)
    seconds = time.perf_counter() - start
    check_long(*results, options, [0, 1, 499, 500, 501, 65536, 65537, LONG - 1])
    assert seconds < 60  # all blocks would take some minutes


@pytest.mark.slow
def test_long_context():
    *results, taken = long_context({"is_causal": True})
    check_long(*results, {}, [0, 1, 128, 65535, 65536, 100001, LONG - 1])
    assert taken < 100 * LONG * 8 * 4  # bytes: a few tensors of the inputs' size, where all scores are 64 GB


def test_direct_calls_of_the_operators_check_their_mask():
    query = torch.randn(1, 2, 5, 16)
    options = list(lowered(query, query, False, 0.25))
    options[0] = torch.ones(1, 1, 4, 5, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="mask: expected size 1 or 5 in dimension 2, got 4"):
        torch.ops.lmengine.attention_forward(query, query, query, *options)
