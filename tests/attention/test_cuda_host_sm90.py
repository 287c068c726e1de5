"""Attention's sm_90 kernels on the CPU, on the emulation of TMA and wgmma, against float64 beside PyTorch's own."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from lmengine.ops.attention_reference import reference
from tests import cuda_host
from tests.attention.test_attention import tolerance
from tests.numerics import assert_right

TYPES = {torch.bfloat16: 1, torch.float16: 2}
FOLDER = cuda_host.ROOT / "csrc"
SOURCES = [
    *sorted((FOLDER / "attention").glob("*_sm90.cu")),
    FOLDER / "support" / "tensor_map_cuda.cpp",
    cuda_host.ROOT / "tests" / "attention" / "cuda_host_sm90.cpp",
]


@pytest.fixture(scope="module")
def memory_library():
    return cuda_host.build("attention_sm90", SOURCES)


@pytest.fixture(scope="module")
def races_library():
    return cuda_host.build("attention_sm90", SOURCES, kind="races")


@dataclass(frozen=True)
class Case:
    """B, N, M, Q, K, D, E as in the reference; the last three change what a query sees."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    dim: int
    value_dim: int
    gap: int = 0
    window_right: int = -1
    bottom_right: bool = False

    def tensors(self, dtype, magnitude=1.0):
        """query, key, value, grad_output (B, heads, length, dim), laid out as (B, length, heads, dim + gap)."""
        made = []
        for heads, length, dim in (
            (self.heads, self.queries, self.dim),
            (self.kv_heads, self.keys, self.dim),
            (self.kv_heads, self.keys, self.value_dim),
            (self.heads, self.queries, self.value_dim),
        ):
            wide = (torch.randn(self.batch, length, heads, dim + self.gap) * magnitude).to(dtype)
            made.append(wide[..., :dim].transpose(1, 2))
        return made

    def numbers(self, dtype, scale):
        sizes = (self.batch, self.heads, self.kv_heads, self.queries, self.keys, self.dim, self.value_dim, self.gap)
        return (TYPES[dtype], *sizes, self.window_right, int(self.bottom_right), float(scale))

    def seen(self):
        shift = self.window_right + (self.keys - self.queries if self.bottom_right else 0)
        every = torch.ones(self.queries, self.keys, dtype=torch.bool)
        return every if self.window_right < 0 else every.tril(shift)


def widened(tensor, gap):
    """The memory of a tensor of Case.tensors, as (B, length, heads, dim + gap)."""
    return F.pad(tensor.transpose(1, 2), (0, gap), value=torch.nan).contiguous()


def kernels(library, case, tensors, scale):
    """output and logsumexp of the CUDA kernels."""
    dtype = tensors[0].dtype
    query, key, value = (widened(tensor.detach(), case.gap) for tensor in tensors[:3])
    # what the kernels may not write keeps its value
    wide = torch.full((case.batch, case.queries, case.heads, case.value_dim + case.gap), 7, dtype=dtype)
    outputs = {"output": wide, "logsumexp": ((case.batch, case.heads, case.queries), torch.float32)}
    inputs = {"query": query, "key": key, "value": value}
    done = cuda_host.run(library, "attention_forward", inputs, outputs, *case.numbers(dtype, scale))
    assert (done["output"][..., case.value_dim :] == 7).all()
    return [done["output"][..., : case.value_dim].transpose(1, 2), done["logsumexp"]]


def kernels_backward(library, case, tensors, output, logsumexp, grad_logsumexp, scale, deterministic=False):
    """The gradients of query, key and value from the CUDA kernels."""
    dtype = tensors[0].dtype
    query, key, value, grad_output, output = (widened(t.detach(), case.gap) for t in (*tensors, output))
    inputs = {"query": query, "key": key, "value": value, "output": output, "logsumexp": logsumexp}
    inputs |= {"grad_output": grad_output, "grad_logsumexp": grad_logsumexp}
    outputs = {f"grad_{name}": torch.full_like(inputs[name], 7) for name in ("query", "key", "value")}
    numbers = (*case.numbers(dtype, scale), int(deterministic))
    # the gradient of queries is a sum of atomics; in 16 bits a sum near the middle is rounded either way
    eps = 0.0 if deterministic else torch.finfo(dtype).eps
    found = cuda_host.run(library, "attention_backward", inputs, outputs, *numbers, tolerance=eps)
    dims = {"grad_query": case.dim, "grad_key": case.dim, "grad_value": case.value_dim}
    assert all((found[name][..., dim:] == 7).all() for name, dim in dims.items())
    return [found[name][..., :dim].transpose(1, 2) for name, dim in dims.items()]


def check_right(
    library, case, dtype, scale=None, magnitude=1.0, backward=True, with_logsumexp=False, deterministic=False
):
    tensors = case.tensors(dtype, magnitude)
    scale = case.dim**-0.5 if scale is None else scale
    output, logsumexp = kernels(library, case, tensors, scale)
    seen = case.seen()
    grad_logsumexp = torch.randn(logsumexp.shape) if with_logsumexp else None

    def theirs(query, key, value):
        key, value = (tensor.repeat_interleave(case.heads // case.kv_heads, 1) for tensor in (key, value))
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale)
        if grad_logsumexp is None:
            return output
        scores = scale * query @ key.transpose(2, 3)
        return output, scores.masked_fill(~seen, -torch.inf).float().logsumexp(-1)

    def right(query, key, value):
        window = (-1, case.window_right)
        return reference(query, key, value, scale=scale, window_size=window, bottom_right=case.bottom_right)

    def results(function, tensors):
        *arguments, grad_output = (tensor.detach().clone().requires_grad_() for tensor in tensors)
        result = function(*arguments)
        outputs = result if isinstance(result, tuple) else (result,)
        grads = [grad_output]
        if len(outputs) == 2:
            grads.append((torch.zeros_like(logsumexp) if grad_logsumexp is None else grad_logsumexp).to(outputs[1]))
        found = [outputs[0], *torch.autograd.grad(outputs, arguments, grads)] if backward else [outputs[0]]
        return [tensor.nan_to_num(0.0) for tensor in found], outputs[-1]

    other, _ = results(theirs, tensors)
    ref, right_logsumexp = results(right, [tensor.double() for tensor in tensors])
    mine = [output]
    if backward:
        mine += kernels_backward(library, case, tensors, output, logsumexp, grad_logsumexp, scale, deterministic)
    for name, a, b, c in zip(("output", "grad_query", "grad_key", "grad_value"), mine, other, ref, strict=False):
        tiny = tolerance(dtype) * max(1.0, c.abs().max().item())
        assert_right(a, b, c, tiny=tiny, name=name)
    torch.testing.assert_close(logsumexp.double(), right_logsumexp, rtol=1e-5, atol=1e-5)


FULL = [
    Case(1, 1, 1, 200, 150, 64, 64),  # two blocks of queries, the second with one warp group's worth
    Case(2, 2, 1, 65, 300, 40, 40, gap=8),
    Case(1, 1, 1, 140, 390, 128, 128),
    Case(1, 2, 2, 67, 35, 96, 80),
    Case(1, 1, 1, 130, 200, 256, 256),
    Case(1, 1, 1, 30, 140, 192, 128),
]
MASKED = [
    Case(1, 2, 1, 420, 420, 64, 64, window_right=0),
    Case(1, 1, 1, 300, 300, 128, 128, window_right=0),
    Case(1, 1, 1, 150, 310, 128, 128, window_right=0, bottom_right=True),
    Case(1, 1, 1, 310, 150, 64, 64, window_right=0, bottom_right=True),  # the first queries see no key
    Case(1, 3, 1, 140, 140, 256, 256, window_right=0, gap=16),
    Case(1, 1, 1, 200, 200, 72, 72, window_right=70),
]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("case", [*FULL, *MASKED], ids=str)
def test_output_and_gradients(memory_library, case, dtype):
    check_right(memory_library, case, dtype, backward=max(case.dim, case.value_dim) <= 128)


@pytest.mark.parametrize("case", [FULL[0], MASKED[1]], ids=str)
def test_gradient_of_logsumexp(memory_library, case):
    check_right(memory_library, case, torch.bfloat16, with_logsumexp=True)


@pytest.mark.parametrize(
    "case", [Case(1, 2, 1, 130, 1200, 64, 64), Case(1, 1, 1, 400, 600, 128, 128, window_right=250)], ids=str
)
def test_deterministic_gradients_hang_on_no_order(memory_library, case):
    """Several blocks of keys add to the same queries' gradient: in both orders of threads to the same bits."""
    check_right(memory_library, case, torch.bfloat16, deterministic=True)


@pytest.mark.parametrize("window_right", [-1, 0])
def test_many_tiles_for_each_block(memory_library, window_right):
    """The emulation has four multiprocessors: rounds go forwards and backwards."""
    check_right(memory_library, Case(2, 4, 2, 390, 270, 64, 64, window_right=window_right), torch.bfloat16)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 200), (200, 1)])
@pytest.mark.parametrize("window_right", [-1, 0])
def test_length_one(memory_library, queries, keys, window_right):
    check_right(memory_library, Case(1, 2, 1, queries, keys, 64, 64, window_right=window_right), torch.bfloat16)


@pytest.mark.parametrize("shape", [(0, 2, 1, 5, 5), (1, 2, 1, 0, 5), (1, 2, 1, 5, 0)], ids=str)
def test_empty_dimensions(memory_library, shape):
    case = Case(*shape, 64, 64)
    tensors = case.tensors(torch.bfloat16)
    output, logsumexp = kernels(memory_library, case, tensors, 0.25)
    assert (output == 0).all()  # a query without keys gives 0
    assert (logsumexp == -torch.inf).all()
    if case.queries:  # without any the sm_80 kernels are taken
        grads = kernels_backward(memory_library, case, tensors, output, logsumexp, None, 0.25)
        assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_large_magnitudes_neither_overflow_nor_lose_rows(memory_library, dtype):
    case = Case(1, 1, 1, 70, 200, 64, 64, window_right=0)
    check_right(memory_library, case, dtype, magnitude=6.0)
    tensors = case.tensors(dtype, magnitude=1e4)
    output, logsumexp = kernels(memory_library, case, tensors, 1.0)
    assert output.isfinite().all() and logsumexp.isfinite().all()
    # each row is a mean of values: scores this far apart leave one of them
    nearest = (output[0, 0, :, None].double() - tensors[2][0, 0, None].double()).abs().sum(-1).min(1).values
    assert (nearest <= 1e-2 * tensors[2].double().abs().sum(-1).max()).all()


def test_a_nan_stays_in_its_row_and_is_not_hidden(memory_library):
    case = Case(2, 1, 1, 140, 140, 64, 64, window_right=0)
    tensors = case.tensors(torch.bfloat16)
    tensors[0][0, 0, 30, 3] = torch.nan
    tensors[2][1, 0, 139] = torch.nan  # seen by the last query of the second sequence only
    output, logsumexp = kernels(memory_library, case, tensors, 0.2)
    hit = torch.zeros(2, 140, dtype=torch.bool)
    hit[0, 30] = True
    assert torch.equal(logsumexp[:, 0].isnan(), hit)
    assert torch.equal(output[0, 0].isnan().all(-1), hit[0])
    assert torch.equal(output[0, 0].isnan().any(-1), hit[0])
    assert output[1, 0, 139].isnan().all()


@pytest.mark.parametrize("case", [FULL[0], MASKED[1], MASKED[3], FULL[4]], ids=str)
def test_no_races(races_library, case):
    deterministic = case.window_right >= 0
    check_right(races_library, case, torch.bfloat16, backward=case.dim <= 128, deterministic=deterministic)
