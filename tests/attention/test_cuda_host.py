"""The CUDA kernels of attention on the CPU, under sanitizers, against float64 beside PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F

from lmengine.ops.attention_reference import reference
from tests import cuda_host
from tests.attention.test_attention import tolerance
from tests.numerics import assert_right

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


# the 16-bit types are one template: what does not hang on rounding is tested with one of them
TWO_TYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def memory_library():
    return cuda_host.build("attention")


@pytest.fixture(scope="module")
def races_library():
    return cuda_host.build("attention", kind="races")


def inputs(shape, dtype, gap=0, magnitude=1.0):
    """query, key, value and grad_output (B, N, length, D), laid out as (B, length, N, D + gap)."""
    batch, heads, queries, keys, dim = shape
    made = []
    for length in (queries, keys, keys, queries):
        wide = (torch.randn(batch, length, heads, dim + gap) * magnitude).to(dtype)
        made.append(wide[..., :dim].transpose(1, 2))
    return made


def widened(tensor, gap):
    """The memory of a tensor from `inputs`, as (B, length, N, D + gap)."""
    return F.pad(tensor.transpose(1, 2), (0, gap), value=torch.nan).contiguous()


def kernels(library, tensors, is_causal, scale, gap=0):
    """output, logsumexp, grad_query, grad_key, grad_value of the CUDA kernels."""
    batch, heads, queries, dim = tensors[0].shape
    keys, dtype = tensors[1].shape[2], tensors[0].dtype
    query, key, value, grad_output = (widened(tensor.detach(), gap) for tensor in tensors)
    numbers = (TYPES[dtype], batch, heads, queries, keys, dim, gap, int(is_causal), float(scale))
    single = ((batch, heads, queries), torch.float32)
    # what the kernels may not write keeps its value
    outputs = {"output": torch.full_like(query, 7), "logsumexp": single}
    done = cuda_host.run(library, "attention_forward", {"query": query, "key": key, "value": value}, outputs, *numbers)
    arguments = {"query": query, "key": key, "value": value, "output": done["output"], "logsumexp": done["logsumexp"]}
    grads = {"delta": single}
    grads |= {f"grad_{name}": torch.full_like(arguments[name], 7) for name in ("query", "key", "value")}
    found = cuda_host.run(library, "attention_backward", {**arguments, "grad_output": grad_output}, grads, *numbers)
    results = [done["output"], *(found[f"grad_{name}"] for name in ("query", "key", "value"))]
    assert all((result[..., dim:] == 7).all() for result in results)
    output, *grads = (result[..., :dim].transpose(1, 2) for result in results)
    return [output, done["logsumexp"], *grads]


def check_right(library, shape, dtype, is_causal, scale=None, gap=0, magnitude=1.0, tiny=2e-6):
    tensors = inputs(shape, dtype, gap, magnitude)
    scale = shape[-1] ** -0.5 if scale is None else scale
    output, logsumexp, *grads = kernels(library, tensors, is_causal, scale, gap)

    def results(function, tensors):
        *arguments, grad_output = (tensor.detach().clone().requires_grad_() for tensor in tensors)
        result = function(*arguments)
        return [result, *torch.autograd.grad(result, arguments, grad_output)]

    sign = -1 if scale < 0 else 1  # PyTorch's bfloat16 gives NaN with a negative scale
    theirs = results(
        lambda q, k, v: F.scaled_dot_product_attention(sign * q, k, v, is_causal=is_causal, scale=sign * scale), tensors
    )
    wide = [tensor.double() for tensor in tensors]
    right = results(lambda q, k, v: reference(q, k, v, is_causal, scale)[0], wide)
    for name, mine, other, ref in zip(
        ("output", "grad query", "grad key", "grad value"), [output, *grads], theirs, right, strict=True
    ):
        assert_right(mine, other, ref, tiny=tolerance(dtype, tiny) * max(1.0, ref.abs().max().item()), name=name)
    scores = scale * wide[0] @ wide[1].transpose(2, 3)
    if is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    torch.testing.assert_close(logsumexp.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)


# batch, heads, query length, key length, head_dim: a shape for each size that the kernels are compiled for, more than
# one block and less than one, more queries than keys and fewer
SHAPES = [(1, 1, 133, 150, 16), (2, 1, 65, 65, 40), (1, 1, 140, 70, 64), (1, 1, 67, 35, 80), (1, 1, 40, 67, 128)]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients(memory_library, shape, is_causal, dtype):
    check_right(memory_library, shape, dtype, is_causal, gap=8 if shape[-1] == 40 else 0)


@pytest.mark.parametrize("dtype", TWO_TYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 16), (1, 2, 1, 66, 24), (2, 1, 66, 1, 16)], ids=str)
def test_length_one(memory_library, shape, dtype):
    for is_causal in (False, True):
        check_right(memory_library, shape, dtype, is_causal)


@pytest.mark.parametrize("dtype", TWO_TYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 2, 5, 5, 16), (2, 0, 5, 5, 16), (1, 2, 0, 5, 16), (1, 2, 5, 0, 16)], ids=str)
def test_empty_dimensions(memory_library, shape, dtype):
    output, logsumexp, *grads = kernels(memory_library, inputs(shape, dtype), True, 0.25)
    assert (output == 0).all()  # a query without keys gives 0
    assert (logsumexp == -torch.inf).all()
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("dtype", TWO_TYPES, ids=str)
@pytest.mark.parametrize("scale", [-0.5, 0.0, 2.0])
def test_any_scale(memory_library, scale, dtype):
    check_right(memory_library, (1, 1, 70, 70, 32), dtype, True, scale)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_large_magnitudes_neither_overflow_nor_lose_rows(memory_library, dtype):
    check_right(memory_library, (1, 1, 70, 70, 32), dtype, True, magnitude=6.0, tiny=3e-5)
    tensors = inputs((1, 1, 70, 70, 32), dtype, magnitude=1e4)
    output, _, *grads = kernels(memory_library, [*tensors[:3], tensors[3] * 1e-6], True, 1.0)
    assert output.isfinite().all()
    # each row is a mean of values: scores this far apart leave one of them
    nearest = (output[0, 0, :, None].double() - tensors[2][0, 0, None].double()).abs().sum(-1).min(1).values
    assert (nearest <= 1e-2 * tensors[2].double().abs().sum(-1).max()).all()
    if dtype != torch.float16:  # whose range the gradients of queries and keys leave
        assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("dtype", TWO_TYPES, ids=str)
def test_a_weight_computed_again_is_at_most_one(memory_library, dtype):
    query, key, value, grad_output = (widened(t, 0) for t in inputs((1, 2, 40, 40, 32), dtype))
    arguments = {"query": query, "key": key, "value": value, "output": torch.zeros_like(query)}
    arguments |= {"logsumexp": torch.full((1, 2, 40), -1e6), "grad_output": grad_output}
    outputs = {"delta": ((1, 2, 40), torch.float32)}
    outputs |= {f"grad_{name}": (query.shape, dtype) for name in ("query", "key", "value")}
    numbers = (TYPES[dtype], 1, 2, 40, 40, 32, 0, 0, 1.0)
    grads = cuda_host.run(memory_library, "attention_backward", arguments, outputs, *numbers)
    expected = grad_output.double().sum(1, keepdim=True).expand(grad_output.shape)
    torch.testing.assert_close(grads["grad_value"].double(), expected, rtol=1e-2, atol=1e-2)
    assert grads["grad_query"].isfinite().all() and grads["grad_key"].isfinite().all()


@pytest.mark.parametrize("dtype", TWO_TYPES, ids=str)
def test_a_nan_stays_in_its_row_and_is_not_hidden(memory_library, dtype):
    tensors = inputs((1, 1, 70, 70, 32), dtype)
    tensors[0][0, 0, 30, 3] = torch.nan
    output, logsumexp, grad_query, *_ = kernels(memory_library, tensors, True, 0.2)
    hit = torch.arange(70) == 30
    for result in (output, logsumexp[..., None], grad_query):
        assert torch.equal(result[0, 0].isnan().all(-1), hit)
        assert torch.equal(result[0, 0].isnan().any(-1), hit)


@pytest.mark.parametrize("dtype", TWO_TYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 133, 70, 64), (1, 1, 66, 66, 128)], ids=str)
def test_no_races(races_library, shape, dtype):
    for is_causal in (False, True):
        check_right(races_library, shape, dtype, is_causal)
