"""The CUDA kernels of attention on the CPU, under sanitizers, against float64 beside PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F

from lmengine.ops.attention_reference import reference
from tests import cuda_host
from tests.attention import cuda_kernels, test_features
from tests.attention.test_attention import tolerance
from tests.attention.test_features import OPTIONS, integers
from tests.numerics import assert_right

TYPES = [torch.float32, torch.bfloat16, torch.float16]
# the 16-bit types are one template: what does not hang on rounding is tested with one of them
TWO_TYPES = TYPES[:2]


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


def kernels(library, tensors, is_causal, scale, gap=0):
    """output, logsumexp, grad_query, grad_key, grad_value of the CUDA kernels."""
    *tensors, grad_output = (tensor.detach() for tensor in tensors)
    output, logsumexp = cuda_kernels.forward(library, *tensors, is_causal, scale, gap=gap)
    grads = cuda_kernels.backward(
        library, grad_output, None, *tensors, output, logsumexp, is_causal, scale, gap=gap
    )  # fmt: skip
    return [output, logsumexp, *grads[:3]]


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
SHAPES = [(1, 1, 133, 150, 16), (2, 1, 65, 65, 40), (1, 1, 140, 70, 64), (1, 1, 67, 35, 80), (1, 1, 40, 67, 128),
          (1, 1, 33, 50, 184), (1, 1, 30, 33, 256)]  # fmt: skip


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
    query, key, value, grad_output = inputs((1, 2, 40, 40, 32), dtype)
    logsumexp = torch.full((1, 2, 40), -1e6)
    grad_query, grad_key, grad_value, _ = cuda_kernels.backward(
        memory_library, grad_output, None, query, key, value, torch.zeros_like(query), logsumexp, False, 1.0
    )
    expected = grad_output.double().sum(2, keepdim=True).expand(value.shape)
    torch.testing.assert_close(grad_value.double(), expected, rtol=1e-2, atol=1e-2)
    assert grad_query.isfinite().all() and grad_key.isfinite().all()


@pytest.mark.parametrize("dtype", TWO_TYPES, ids=str)
def test_a_nan_stays_in_its_row_and_is_not_hidden(memory_library, dtype):
    tensors = inputs((1, 1, 70, 70, 32), dtype)
    tensors[0][0, 0, 30, 3] = torch.nan
    output, logsumexp, grad_query, *_ = kernels(memory_library, tensors, True, 0.2)
    hit = torch.arange(70) == 30
    for result in (output, logsumexp[..., None], grad_query):
        assert torch.equal(result[0, 0].isnan().all(-1), hit)
        assert torch.equal(result[0, 0].isnan().any(-1), hit)


# ---- features --------------------------------------------------------------------------------------------------


def check_features(library, tensors, options):
    def function(*tensors, **options):
        return cuda_kernels.attention(library, *tensors, **options)

    test_features.check_function(function, tensors, options)


# each case with a shape and a type, each shape with both types
FEATURES = [
    (case, test_features.SHAPES[index % 3], TWO_TYPES[index % 2]) for index, case in enumerate(OPTIONS)
] + [(case, test_features.SHAPES[1], torch.float16) for case in ("everything", "causal, bottom right")]  # fmt: skip


@pytest.mark.parametrize(("case", "shape", "dtype"), FEATURES, ids=str)
def test_features_and_their_gradients(memory_library, case, shape, dtype):
    check_features(
        memory_library, test_features.inputs(*shape, dtype, "cpu"), OPTIONS[case](*shape[:2])
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", test_features.SHAPES, ids=str)
@pytest.mark.parametrize("case", OPTIONS)
def test_every_feature_and_shape(memory_library, case, shape, dtype):
    check_features(
        memory_library, test_features.inputs(*shape, dtype, "cpu"), OPTIONS[case](*shape[:2])
    )  # fmt: skip


# several blocks of queries and keys: what a block passes over, and what it sees whole
@pytest.mark.parametrize(
    ("dtype", "shape", "options"),
    [
        (torch.bfloat16, (150, 200, 1, 16, 16), {"window_size": (40, 20), "prefix_lengths": integers(0, 33)}),
        (torch.float32, (100, 230, 2, 8, 16), {"is_causal": True, "bottom_right": True, "window_size": (70, -1)}),
        (torch.float32, (150, 90, 4, 8, 8), {"window_size": (-1, 3), "key_lengths": integers(65, 0)}),
        (torch.bfloat16, (70, 140, 1, 72, 16), {"is_causal": True, "softcap": 3.0}),
        (torch.bfloat16, (20, 40, 2, 200, 136), {"is_causal": True, "dropout_p": 0.2, "seed": torch.tensor([5])}),
        (torch.float32, (20, 40, 2, 200, 136), {"is_causal": True, "alibi_slopes": torch.rand(4)}),
        (torch.bfloat16, (70, 150, 1, 24, 8), {"is_causal": True, "key_lengths": integers(149, 66)}),
        (torch.bfloat16, (20, 70, 4, 192, 128), {"is_causal": True, "bottom_right": True}),
    ],
    ids=str,
)  # fmt: skip
def test_many_blocks(memory_library, dtype, shape, options):
    check_features(memory_library, test_features.inputs(*shape, dtype, "cpu"), options)


def packed(dtype, lengths_q, lengths_k, dims=(32, 24)):
    shapes = [(1, sum(lengths_q), 4, dims[0]), (1, sum(lengths_k), 2, dims[0]), (1, sum(lengths_k), 2, dims[1])]
    tensors = [torch.randn(shape).to(dtype).transpose(1, 2).requires_grad_() for shape in shapes]
    starts = {f"cu_seqlens_{side}": integers(0, *torch.tensor(lengths).cumsum(0))
              for side, lengths in (("q", lengths_q), ("k", lengths_k))}  # fmt: skip
    return tensors, starts


@pytest.mark.parametrize("dtype", TWO_TYPES, ids=str)
@pytest.mark.parametrize("case", ["full", "causal", "everything"])
def test_packed_sequences(memory_library, dtype, case):
    """One sequence has no keys, one no queries, one neither; one is longer than a block."""
    tensors, options = packed(dtype, [5, 133, 4, 0, 0, 21], [9, 70, 0, 6, 0, 40])
    if case == "causal":
        options |= {"is_causal": True, "bottom_right": True, "max_seqlen_q": 140, "max_seqlen_k": 70}
    if case == "everything":
        options |= {"is_causal": True, "bottom_right": True, "prefix_lengths": integers(2, 0, 1, 1, 1, 30)}
        options |= {"key_lengths": integers(9, 18, 1, 2, 0, 33), "alibi_slopes": torch.rand(6, 4), "softcap": 2.0}
        options |= {"window_size": (20, -1), "dropout_p": 0.25, "seed": torch.tensor([12345678901])}
    check_features(memory_library, tensors, options)


def test_a_mask_of_the_query_dtype_and_any_strides(memory_library):
    tensors = test_features.inputs(9, 37, 2, 16, 16, torch.bfloat16, "cpu")
    mask = test_features.additive(2, 9, 4, 37).detach().to(torch.bfloat16).transpose(1, 2)
    check_features(memory_library, tensors, {"mask": mask.requires_grad_()})
    check_features(memory_library, tensors, {"mask": test_features.boolean(2, 4, 9, 74)[..., ::2]})
    check_features(memory_library, tensors, {"mask": test_features.boolean(1, 1, 1, 37).expand(2, 4, 9, 37)})


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [((1, 4, 70, 1), torch.float32), ((1, 1, 1, 90), torch.bfloat16), ((2, 1, 70, 90), torch.float32)],
    ids=str,
)
def test_the_gradient_of_a_mask_of_many_blocks(memory_library, sizes, dtype):
    tensors = test_features.inputs(70, 90, 2, 16, 16, dtype, "cpu")
    check_features(memory_library, tensors, {"mask": torch.randn(sizes).requires_grad_(), "window_size": (20, 9)})


@pytest.mark.parametrize("dtype", TWO_TYPES, ids=str)
def test_the_smallest_float_as_a_mask(memory_library, dtype):
    """As transformers masks: a query that sees no key otherwise has the mean of all values, not NaN."""
    tensors = test_features.inputs(20, 37, 2, 16, 16, dtype, "cpu")
    mask = torch.zeros(2, 1, 20, 37)
    mask[0, :, :, 30:] = torch.finfo(torch.float32).min
    mask[1, :, 3] = torch.finfo(torch.float32).min
    output, _ = cuda_kernels.forward(memory_library, *tensors, mask=mask)
    right, _ = reference(*(t.detach().double() for t in tensors), mask=mask)
    torch.testing.assert_close(output.double(), right, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", TWO_TYPES, ids=str)
def test_a_nan_or_infinity_stays_in_its_sequence(memory_library, dtype):
    query, key, value = (t.detach() for t in test_features.inputs(20, 70, 2, 32, 32, dtype, "cpu"))
    options = {"key_lengths": integers(50, 70), "is_causal": True, "bottom_right": True}
    clean, _ = cuda_kernels.forward(memory_library, query, key, value, **options)
    key[0, :, 50:], value[0, :, 50:] = torch.nan, torch.inf
    query[1, :, 3], key[1, :, 5], value[1, :, 6] = torch.nan, torch.inf, torch.nan
    output, logsumexp = cuda_kernels.forward(memory_library, query, key, value, **options)
    assert torch.equal(output[0], clean[0])
    grad = torch.randn_like(output)
    grads = cuda_kernels.backward(memory_library, grad, None, query, key, value, output, logsumexp, **options)
    assert all(g[0].isfinite().all() for g in grads[:3])
    assert (grads[1][0, :, 50:] == 0).all() and (grads[2][0, :, 50:] == 0).all()


@pytest.mark.parametrize("dtype", TWO_TYPES, ids=str)
def test_a_query_without_keys_has_no_gradient_whatever_comes(memory_library, dtype):
    tensors = [t.detach() for t in test_features.inputs(9, 12, 2, 16, 16, dtype, "cpu")]
    mask = torch.ones(1, 1, 9, 12, dtype=torch.bool)
    mask[:, :, 4] = False
    for options in ({"mask": mask}, {"is_causal": True, "bottom_right": True, "key_lengths": integers(8, 8)}):
        output, logsumexp = cuda_kernels.forward(memory_library, *tensors, **options)
        empty = logsumexp == -torch.inf
        assert empty.any() and (output[empty] == 0).all()
        grad_logsumexp = torch.where(empty, torch.nan, 1.0)
        grads = cuda_kernels.backward(
            memory_library, torch.randn_like(output), grad_logsumexp, *tensors, output, logsumexp, **options
        )
        assert all(grad.isfinite().all() for grad in grads[:3])
        assert (grads[0][empty] == 0).all()


@pytest.mark.parametrize("dtype", TWO_TYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 133, 70, 64), (1, 1, 66, 66, 128)], ids=str)
def test_no_races(races_library, shape, dtype):
    for is_causal in (False, True):
        check_right(races_library, shape, dtype, is_causal)


@pytest.mark.parametrize("dtype", TWO_TYPES, ids=str)
def test_no_races_with_features(races_library, dtype):
    check_features(races_library, test_features.inputs(70, 37, 1, 72, 16, dtype, "cpu"), OPTIONS["everything"](70, 37))
    check_features(races_library, test_features.inputs(20, 37, 2, 136, 16, dtype, "cpu"), {"window_size": (9, 2)})
    tensors, options = packed(dtype, [5, 70], [66, 9])
    check_features(races_library, tensors, options)
