"""Attention on every backend that this machine can use, against float64, beside PyTorch's own."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import lmengine
from lmengine.backends import UnsupportedCall, unusable
from lmengine.nn.functional import scaled_dot_product_attention
from lmengine.ops.attention import attention, lowered
from lmengine.ops.attention_reference import reference
from tests.numerics import assert_right

GPU = torch.cuda.is_available()
BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(unusable(name) is not None, reason=str(unusable(name))))
    for name in (["cpu", "triton", "cuda"] if GPU else ["cpu", "triton"])
]
BACKENDS_AND_DTYPES = [
    pytest.param(*backend.values, dtype, marks=backend.marks, id=f"{backend.values[0]}-{dtype}")
    for backend in BACKENDS
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    if backend.values[0] != "cpu" or dtype != torch.float16
]


def device_of(backend):
    """Where a backend's tensors lie: without a GPU Triton runs in its interpreter."""
    return "cuda" if GPU and backend != "cpu" else "cpu"


def operators(backend):
    """A backend's forward and backward as PyTorch knows them."""
    found = torch.ops.lmengine
    if backend == "triton":
        return found.attention_triton_forward.default, found.attention_triton_backward.default
    return found.attention_forward.default, found.attention_backward.default


# batch, heads, query length, key length, head_dim
SHAPES = [
    (2, 3, 64, 64, 32),
    (1, 2, 129, 129, 64),
    (2, 1, 1, 1, 16),
    (1, 1, 300, 300, 128),
    (3, 2, 50, 70, 40),
    (1, 2, 97, 33, 24),
    (1, 1, 1, 260, 72),
    (1, 9, 7, 13, 16),
]


def inputs(shape, dtype, *, device="cpu", grad=True, magnitude=1.0):
    batch, heads, queries, keys, dim = shape
    made = []
    for length in (queries, keys, keys):
        # laid out as a layer makes them: the heads stand side by side in a row
        tensor = (torch.randn(batch, length, heads, dim, device=device) * magnitude).to(dtype).transpose(1, 2)
        made.append(tensor.requires_grad_(grad))
    return made


def results(function, tensors, grad_output):
    output = function(*tensors)
    return [output, *torch.autograd.grad(output, tensors, grad_output.to(output.dtype))]


def tolerance(dtype, tiny=2e-6):
    """What is added to the bound of a result, relative to the largest.

    A result beside the middle between two 16-bit numbers is rounded either way. Where PyTorch's largest error is half
    a unit in the last place, by luck, ours may be a whole one: 4 of 24000 comparisons (2519 the other way).
    """
    return tiny if dtype == torch.float32 else max(tiny, torch.finfo(dtype).eps / 2)


def check_right(tensors, is_causal, scale=None, tiny=2e-6):
    grad = torch.randn_like(tensors[0])
    ours = results(lambda q, k, v: attention(q, k, v, is_causal, scale), tensors, grad)
    theirs = results(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale), tensors, grad
    )
    wide = [t.detach().double().requires_grad_() for t in tensors]
    right = results(lambda q, k, v: reference(q, k, v, is_causal, scale)[0], wide, grad)
    for name, mine, other, ref in zip(
        ("output", "grad query", "grad key", "grad value"), ours, theirs, right, strict=True
    ):
        assert_right(mine, other, ref, tiny=tolerance(mine.dtype, tiny) * max(1.0, ref.abs().max().item()), name=name)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients(backend, dtype, is_causal, shape):
    with lmengine.use_backend(backend):
        check_right(inputs(shape, dtype, device=device_of(backend)), is_causal)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [-0.5, 0.0, 2.0])
def test_any_scale(backend, scale):
    with lmengine.use_backend(backend):
        check_right(inputs((2, 2, 60, 60, 32), torch.float32, device=device_of(backend)), True, scale)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_magnitudes_neither_overflow_nor_lose_rows(backend):
    # a score of 500 is rounded to 3e-5, and its weight with it
    tensors = inputs((1, 2, 150, 150, 32), torch.float32, device=device_of(backend), magnitude=10.0)
    huge = inputs((1, 2, 150, 150, 32), torch.float32, device=device_of(backend), magnitude=1e4)
    with lmengine.use_backend(backend):
        check_right(tensors, True, tiny=3e-5)
        assert all(result.isfinite().all() for result in results(attention, huge, torch.ones_like(huge[0])))


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
def test_a_weight_computed_again_is_at_most_one(backend, dtype):
    """As where a recomputed score of 1e8 exceeds the logsumexp that was stored; a NaN is not bounded away."""
    device = device_of(backend)
    query, key, value = inputs((1, 2, 40, 40, 32), dtype, device=device, grad=False)
    grad, backward = torch.randn_like(query), operators(backend)[1]
    logsumexp = torch.full((1, 2, 40), -1e6, device=device)
    grads = backward(
        grad, None, query, key, value, torch.zeros_like(query), logsumexp, *lowered(query, key, False, 1.0), False
    )
    assert all(g.isfinite().all() for g in grads)
    expected = grad.double().sum(2, keepdim=True).expand(value.shape)
    torch.testing.assert_close(grads[2].double(), expected, rtol=1e-2, atol=1e-5 if dtype == torch.float32 else 1e-2)
    key[0, 1, 7, 3] = torch.nan
    grad_value = backward(
        grad, None, query, key, value, torch.zeros_like(query), logsumexp, *lowered(query, key, False, 1.0), False
    )[2]
    assert grad_value[0, 1, 7].isnan().all()
    assert grad_value[0, 0].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_transposed_and_sliced_tensors(backend):
    query, key, value = inputs((2, 2, 40, 40, 64), torch.float32, device=device_of(backend), grad=False)
    columns = [t.transpose(2, 3).contiguous().transpose(2, 3)[..., ::2].requires_grad_() for t in (query, key, value)]
    with lmengine.use_backend(backend):
        check_right(columns, True)
        broadcast = query[:, :1].expand(2, 2, 40, 64)
        torch.testing.assert_close(attention(broadcast, key, value), attention(broadcast.clone(), key, value))
        # rows that begin at no multiple of 16 bytes
        odd = [t[..., 3:43].detach().requires_grad_() for t in (query, key, value)]
        check_right(odd, False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_beyond_32_bits(backend):
    """Two batches that lie more than 2^31 elements apart; what lies between them is never touched."""
    device, step = device_of(backend), 2**31 + 64
    memory = torch.empty(step + 20 * 16, dtype=torch.bfloat16, device=device)
    view = memory.as_strided((2, 1, 20, 16), (step, 16, 16, 1))
    tensors = inputs((2, 1, 20, 20, 16), torch.bfloat16, device=device)
    grad = torch.randn_like(tensors[0])
    with lmengine.use_backend(backend):
        near = results(attention, tensors, grad)
        for index in range(3):
            view.copy_(tensors[index].detach())
            far = [*tensors[:index], view.detach().requires_grad_(), *tensors[index + 1 :]]
            for ours, expected in zip(results(attention, far, grad), near, strict=True):
                torch.testing.assert_close(ours, expected, rtol=0, atol=0)


@pytest.mark.skipif(not GPU, reason="no GPU")
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_more_heads_than_a_grid_dimension_has(backend):
    with lmengine.use_backend(backend):
        check_right(inputs((2, 40000, 3, 3, 16), torch.bfloat16, device="cuda"), True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 2, 5, 5, 16), (2, 0, 5, 5, 16), (2, 2, 0, 5, 16), (2, 2, 5, 0, 16)], ids=str)
def test_empty_dimensions(backend, shape):
    tensors = inputs(shape, torch.float32, device=device_of(backend))
    with lmengine.use_backend(backend):
        output = attention(*tensors)
        grads = torch.autograd.grad(output.sum(), tensors)
    assert output.shape == tensors[0].shape
    assert (output == 0).all()  # a query without keys gives 0
    assert all((grad == 0).all() and grad.shape == tensor.shape for grad, tensor in zip(grads, tensors, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_stays_in_its_row_and_is_not_hidden(backend):
    query, key, value = inputs((1, 1, 70, 70, 32), torch.float32, device=device_of(backend), grad=False)
    with lmengine.use_backend(backend):
        clean = attention(query, key, value, True)
        query[0, 0, 30, 3] = torch.nan
        output = attention(query, key, value, True)
    assert output[0, 0, 30].isnan().all()
    rest = [i for i in range(70) if i != 30]
    torch.testing.assert_close(output[0, 0, rest], clean[0, 0, rest])


@pytest.mark.parametrize("threads", [1, 2])
def test_few_heads_are_shared_by_the_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_right(inputs((1, 1, 500, 500, 32), torch.float32), True)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(backend, dtype):
    query, key, value = inputs((2, 2, 9, 7, 16), dtype, device=device_of(backend))
    forward, backward = operators(backend)
    for is_causal in (False, True):
        options = lowered(query, key, is_causal, 0.25)
        torch.library.opcheck(forward, (query, key, value, *options))
        output, logsumexp = (result.detach() for result in forward(query, key, value, *options))
        tensors = (torch.randn_like(output), None, query.detach(), key.detach(), value.detach(), output, logsumexp)
        torch.library.opcheck(backward, (*tensors, *options, False))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_without_graph_breaks(backend, compiler, dynamic):
    torch._dynamo.reset()

    def layer(q, k, v):
        return scaled_dot_product_attention(q * 2, k, v, is_causal=True).sin()

    compiled = torch.compile(layer, fullgraph=True, backend=compiler, dynamic=dynamic)
    with lmengine.use_backend(backend):
        for length in (33, 20) if dynamic else (33,):
            tensors = inputs((2, 2, length, length, 32), torch.float32, device=device_of(backend))
            grad = torch.randn_like(tensors[0])
            for ours, eager in zip(results(compiled, tensors, grad), results(layer, tensors, grad), strict=True):
                torch.testing.assert_close(ours, eager)


def test_wrong_arguments_are_named():
    query = torch.randn(2, 3, 4, 16)
    with pytest.raises(ValueError, match=r"key: expected \(2, 3, 4, 16\), got \(2, 3, 4, 8\)"):
        attention(query, torch.randn(2, 3, 4, 8), query)
    with pytest.raises(TypeError, match=r"value: expected torch.float32, got torch.float64"):
        attention(query, query, query.double())
    with pytest.raises(ValueError, match=r"query: expected \(batch, heads, length, head_dim\), got \(4, 16\)"):
        attention(query[0, 0], query, query)
    with pytest.raises(TypeError, match="key: expected a tensor, got str"):
        attention(query, "key", query)


def test_a_dtype_that_no_kernel_has_is_refused_by_name_and_done_by_the_reference():
    query = torch.randn(1, 1, 4, 16, dtype=torch.float64)
    with lmengine.use_backend("cpu"), pytest.raises(UnsupportedCall, match=r"query: expected .*, got torch.float64"):
        attention(query, query, query)
    found = lmengine.explain("attention", query, query, query)
    assert found.backend == "reference"
    assert "float64" in found.reasons["cpu"]


@pytest.mark.skipif(unusable("cpu") is not None, reason=str(unusable("cpu")))
@pytest.mark.parametrize("instructions", ["avx2", "avx512"])
def test_older_processors(instructions):
    code = (
        "import torch, lmengine, tests.attention.test_attention as t\n"
        "torch.manual_seed(0)\n"
        "print(lmengine.info()['instruction set'])\n"
        "with lmengine.use_backend('cpu'):\n"
        "    for dtype in (torch.float32, torch.bfloat16):\n"
        "        for shape in t.SHAPES:\n"
        "            t.check_right(t.inputs(shape, dtype), True)\n"
    )
    environment = {**os.environ, "LMENGINE_ISA": instructions}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] in (instructions, "avx2")
