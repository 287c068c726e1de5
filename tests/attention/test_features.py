"""Every feature of attention on every backend, with its gradients, against the reference in float64.

Beside them stands the reference in the same dtype: PyTorch's own operators, step by step, and the tests of
test_reference.py hold it against torch's attention.
"""

import math

import pytest
import torch

import lmengine
from lmengine.backends import UnsupportedCall
from lmengine.ops.attention import attention
from lmengine.ops.attention_reference import dropout_kept, reference
from tests.attention.test_attention import BACKENDS, device_of, tolerance
from tests.numerics import assert_right


def integers(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def boolean(*shape):
    """A mask that hides a third of the keys, and all keys from the first query where it has one of its own."""
    mask = torch.rand(shape) < 2 / 3
    if shape[2] > 1:
        mask[:, :, 0] = False
    return mask


def additive(*shape):
    mask = torch.randn(shape)
    mask[..., ::5] = -torch.inf
    return mask.requires_grad_()


# Each makes the options for a batch of 2 with 4 heads, Q queries and K keys.
OPTIONS = {
    "causal": lambda q, k: {"is_causal": True},
    "causal, bottom right": lambda q, k: {"is_causal": True, "bottom_right": True},
    "window": lambda q, k: {"window_size": (5, 3)},
    "window to the right": lambda q, k: {"window_size": (-1, 2), "bottom_right": True},
    "causal window, bottom right": lambda q, k: {"is_causal": True, "window_size": (7, -1), "bottom_right": True},
    "window of one": lambda q, k: {"window_size": (0, 0)},
    "prefix": lambda q, k: {"is_causal": True, "prefix_lengths": integers(0, 9)},
    "prefix and window": lambda q, k: {"window_size": (4, 0), "prefix_lengths": integers(3, k + 5)},
    "key lengths": lambda q, k: {"key_lengths": integers(k // 2, 0)},
    "key lengths, causal, bottom right": lambda q, k: {
        "is_causal": True,
        "bottom_right": True,
        "key_lengths": integers(k // 2 + 1, k + 7),
    },
    "boolean mask": lambda q, k: {"mask": boolean(2, 4, q, k)},
    "padding mask": lambda q, k: {"mask": boolean(2, 1, 1, k)},
    "mask of queries": lambda q, k: {"mask": boolean(1, 4, q, 1)},
    "additive mask": lambda q, k: {"mask": additive(2, 4, q, k)},
    "additive mask, one for all": lambda q, k: {"mask": additive(1, 1, q, k)},
    "additive mask of keys": lambda q, k: {"mask": additive(2, 1, 1, k), "is_causal": True},
    "additive mask of queries": lambda q, k: {"mask": torch.randn(1, 4, q, 1).requires_grad_()},
    "additive mask, a number": lambda q, k: {"mask": torch.randn(1, 1, 1, 1).requires_grad_()},
    "ALiBi": lambda q, k: {"alibi_slopes": torch.rand(4)},
    "ALiBi of each sequence, causal": lambda q, k: {
        "alibi_slopes": torch.rand(2, 4),
        "is_causal": True,
        "bottom_right": True,
    },
    "soft-capping": lambda q, k: {"softcap": 1.5},
    "dropout": lambda q, k: {"dropout_p": 0.3, "seed": torch.tensor([-(2**40) - 3])},
    "dropout of everything": lambda q, k: {"dropout_p": 1.0, "seed": torch.tensor([3])},
    "everything": lambda q, k: {
        "is_causal": True,
        "bottom_right": True,
        "window_size": (k // 2, 3),
        "prefix_lengths": integers(2, 5),
        "key_lengths": integers(k - 2, k),
        "mask": additive(1, 4, q, k),
        "alibi_slopes": torch.rand(4),
        "softcap": 2.0,
        "dropout_p": 0.2,
        "seed": torch.tensor([7]),
    },
}
# query length, key length, heads of keys, head_dim, the values' head_dim
SHAPES = [(37, 37, 4, 32, 32), (19, 70, 2, 16, 40), (70, 19, 1, 64, 24)]


def inputs(queries, keys, kv_heads, head_dim, value_dim, dtype, device):
    shapes = [(2, queries, 4, head_dim), (2, keys, kv_heads, head_dim), (2, keys, kv_heads, value_dim)]
    return [torch.randn(shape).to(device, dtype).transpose(1, 2).requires_grad_() for shape in shapes]


def moved(options, device, dtype=None):
    """The options on a device, and an additive mask as a leaf of dtype."""
    made = {name: o.to(device) if isinstance(o, torch.Tensor) else o for name, o in options.items()}
    mask = made.get("mask")
    if mask is not None and mask.is_floating_point():
        made["mask"] = mask.detach().to(dtype or mask.dtype).requires_grad_(mask.requires_grad)
    return made


def results(function, tensors, options, grads):
    """Output, logsumexp, and the gradients of the tensors and of a mask that wants one."""
    outputs = function(*tensors, **options)
    # where a query sees no key the logsumexp is -infinity, whose gradient nobody may use
    finite = torch.where(outputs[1].isfinite(), outputs[1], 0)
    wanted = [*tensors, *(o for o in options.values() if isinstance(o, torch.Tensor) and o.requires_grad)]
    grads = [grad.to(o.dtype) for grad, o in zip(grads, outputs, strict=True)]
    return [outputs[0], outputs[1].detach(), *torch.autograd.grad((outputs[0], finite), wanted, grads)]


def check_function(function, tensors, options, tiny=4e-6):
    """Holds outputs and gradients of a function of query, key, value and options against the reference's."""
    device, dtype = tensors[0].device, tensors[0].dtype
    batch, heads, queries, _ = tensors[0].shape
    grad_output = torch.randn(batch, heads, queries, tensors[2].shape[3], device=device).to(dtype)
    grads = [grad_output, torch.randn(batch, heads, queries, device=device)]
    ours = results(function, tensors, moved(options, device), grads)
    theirs = results(reference, tensors, moved(options, device), grads)
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    right = results(reference, wide, moved(options, device, torch.float64), grads)
    # A kernel's backward, PyTorch's too, takes sum(grad_output * output) from the output as it was stored, where the
    # reference's has the weights: what the rounding of the output does to the gradients is allowed for.
    lost = (grad_output.double() * (ours[0].detach().double() - right[0].detach())).sum(-1)
    stored = results(reference, wide, moved(options, device, torch.float64), [grad_output, grads[1] - lost])
    names = ("output", "logsumexp", "grad query", "grad key", "grad value", "grad mask")
    for name, mine, other, ref, rounded in zip(names, ours, theirs, right, stored, strict=False):
        largest = ref[ref.isfinite()].abs().max().item() if ref.isfinite().any() else 1.0
        bound = tolerance(dtype, tiny) * max(1.0, largest)
        if name.startswith("grad") and dtype != torch.float32 and ref.numel():
            bound += 2 * (rounded - ref).abs().max().item()
        assert_right(mine, other.to(mine.dtype), ref, tiny=bound, name=name)


def check_right(tensors, options, backend, tiny=4e-6):
    def function(*args, **kwargs):
        with lmengine.use_backend(backend):
            return attention(*args, return_logsumexp=True, **kwargs)

    check_function(function, tensors, options, tiny)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", OPTIONS)
def test_float32(backend, shape, case):
    tensors = inputs(*shape, torch.float32, device_of(backend))
    check_right(tensors, OPTIONS[case](*shape[:2]), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["everything", "additive mask", "dropout", "prefix and window"])
def test_16_bits(backend, dtype, case):
    tensors = inputs(*SHAPES[1], dtype, device_of(backend))
    check_right(tensors, OPTIONS[case](*SHAPES[1][:2]), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_of_the_query_dtype_and_any_strides(backend):
    tensors = inputs(*SHAPES[0], torch.bfloat16, device_of(backend))
    mask = additive(2, 37, 4, 37).detach().to(torch.bfloat16).transpose(1, 2)
    check_right(tensors, {"mask": mask.requires_grad_()}, backend)
    check_right(tensors, {"mask": boolean(2, 4, 37, 74)[..., ::2]}, backend)
    check_right(tensors, {"mask": boolean(1, 1, 1, 37).expand(2, 4, 37, 37)}, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["full", "causal", "window", "everything"])
def test_packed_sequences(backend, case):
    """Sequences one behind the other are what each gives alone; one has no keys, one no queries, one neither."""
    lengths_q, lengths_k = [5, 33, 4, 0, 0, 21], [9, 20, 0, 6, 0, 40]
    shapes = [(1, sum(lengths_q), 4, 32), (1, sum(lengths_k), 2, 32), (1, sum(lengths_k), 2, 24)]
    device = device_of(backend)
    tensors = [torch.randn(shape, device=device).transpose(1, 2).requires_grad_() for shape in shapes]
    options = {
        "cu_seqlens_q": integers(0, *torch.tensor(lengths_q).cumsum(0)),
        "cu_seqlens_k": integers(0, *torch.tensor(lengths_k).cumsum(0)),
    }
    if case == "causal":
        options |= {"is_causal": True, "max_seqlen_q": 33, "max_seqlen_k": 40}
    if case == "window":
        options |= {"window_size": (6, 2), "bottom_right": True}
    if case == "everything":
        options |= {"is_causal": True, "bottom_right": True, "prefix_lengths": integers(2, 0, 1, 1, 1, 30)}
        options |= {"key_lengths": integers(9, 18, 1, 2, 0, 33), "alibi_slopes": torch.rand(6, 4), "softcap": 2.0}
        options |= {"dropout_p": 0.25, "seed": torch.tensor([12345678901])}
    check_right(tensors, options, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head_dim", [8, 20, 96, 192, 256], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_head_dims(backend, head_dim, dtype):
    tensors = inputs(33, 50, 4, head_dim, head_dim, dtype, device_of(backend))
    reason = lmengine.explain("attention", *(t.detach() for t in tensors)).reasons[backend]
    if "head_dim" in reason:  # a backend's own limit
        with lmengine.use_backend(backend), pytest.raises(UnsupportedCall, match="head_dim"):
            attention(*tensors)
    else:
        check_right(tensors, {"is_causal": True}, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_is_that_of_the_reference(backend):
    """The same weights survive on every backend: values of one-hot rows show them."""
    device = device_of(backend)
    query, key = torch.zeros(2, 3, 50, 16, device=device), torch.zeros(2, 3, 64, 16, device=device)
    value = torch.eye(64, device=device).expand(2, 3, 64, 64)
    seed = torch.tensor([2**62 + 17], device=device)
    with lmengine.use_backend(backend):
        weights = attention(query, key, value, dropout_p=0.4, seed=seed)
        again = attention(query, key, value, dropout_p=0.4, seed=seed)
        other = attention(query, key, value, dropout_p=0.4, seed=seed + 1)
    kept = dropout_kept(seed, torch.Size((2, 3, 50, 64)), 0.4)
    torch.testing.assert_close(weights, kept / 64 / 0.6)
    assert torch.equal(weights, again)
    assert not torch.equal(weights, other)


def test_dropout_draws_its_seed_from_the_generator():
    tensors = inputs(*SHAPES[0], torch.float32, "cpu")
    torch.manual_seed(5)
    with lmengine.use_backend("reference"):
        first, second = (attention(*tensors, dropout_p=0.5) for _ in range(2))
        torch.manual_seed(5)
        again = attention(*tensors, dropout_p=0.5)
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_dropout_keeps_the_share_it_should():
    for probability in (0.1, 0.5, 0.9):
        kept = dropout_kept(torch.tensor([11]), torch.Size((4, 8, 64, 256)), probability).double()
        deviation = math.sqrt(probability * (1 - probability) / kept.numel())
        assert abs(kept.mean().item() - (1 - probability)) < 5 * deviation
        # rows, columns and heads are independent of each other
        centred = (kept - kept.mean()).flatten(0, 1)
        assert (centred[1:] * centred[:-1]).mean().abs() < 5 / math.sqrt(kept.numel())
        assert (centred[:, 1:] * centred[:, :-1]).mean().abs() < 5 / math.sqrt(kept.numel())
        assert (centred[..., 1:] * centred[..., :-1]).mean().abs() < 5 / math.sqrt(kept.numel())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_or_infinity_stays_in_its_sequence(backend):
    """In keys and values behind a sequence's end it does nothing; in one batch element it touches no other."""
    device = device_of(backend)
    tensors = [t.detach() for t in inputs(40, 70, 4, 32, 32, torch.float32, device)]
    with lmengine.use_backend(backend):
        clean = attention(*tensors, is_causal=True)
        for bad in (torch.nan, torch.inf):
            query, key, value = (t.clone() for t in tensors)
            query[1, :, 3], key[1, :, 5], value[1, :, 6] = bad, bad, bad
            assert torch.equal(attention(query, key, value, is_causal=True)[0], clean[0])
            lengths = integers(50, 70).to(device)
            expected = attention(*tensors, key_lengths=lengths)
            query, key, value = (t.clone() for t in tensors)
            key[0, :, 50:], value[0, :, 50:] = bad, bad
            leaves = [t.requires_grad_() for t in (query, key, value)]
            output = attention(*leaves, key_lengths=lengths)
            assert torch.equal(output, expected)
            grads = torch.autograd.grad(output.sum(), leaves)
            assert all(grad.isfinite().all() for grad in grads)
            assert (grads[1][0, :, 50:] == 0).all() and (grads[2][0, :, 50:] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_is_its_members_one_by_one(backend):
    tensors = [t.detach() for t in inputs(67, 67, 4, 32, 32, torch.float32, device_of(backend))]
    with lmengine.use_backend(backend):
        together = attention(*tensors, is_causal=True)
        alone = [attention(*(t[b : b + 1] for t in tensors), is_causal=True) for b in range(2)]
    assert torch.equal(together, torch.cat(alone))


TRITON = [parameter for parameter in BACKENDS if parameter.values[0] == "triton"]


@pytest.mark.parametrize("backend", TRITON)
@pytest.mark.parametrize(
    ("case", "shape"),
    [
        ("full", (70, 50, 4, 32, 32)),
        ("causal, bottom right", (40, 130, 2, 64, 40)),
        ("prefix", (70, 71, 1, 40, 16)),
    ],
)
def test_tensor_descriptors(backend, case, shape, monkeypatch):
    """What sm_90 loads by descriptors, also where a head_dim is no power of two and a block passes the tensor's end."""
    from lmengine.kernels import attention as kernels

    if not torch.cuda.is_available():
        monkeypatch.setattr(kernels, "architecture_of", lambda tensor: 90)
    elif kernels.architecture_of(torch.empty(0, device="cuda")) < 90:
        pytest.skip("this GPU has no tensor descriptors")
    used, run = [], kernels.Launch.run
    monkeypatch.setattr(
        kernels.Launch, "run", lambda launch: (used.append(launch.arguments.get("TMA", True)), run(launch))
    )
    tensors = inputs(*shape, torch.float16, device_of(backend))
    check_right(tensors, {} if case == "full" else OPTIONS[case](*shape[:2]), backend)
    assert len(used) == 4 and all(used)
    used.clear()
    key = torch.randn(1, 1, shape[1], shape[3], dtype=torch.float16).expand(2, shape[2], -1, -1)
    check_right([tensors[0], key.to(tensors[0].device).requires_grad_(), tensors[2]], {}, backend)
    assert not used[0]  # a stride of 0 is none that a descriptor may have


@pytest.mark.parametrize("backend", TRITON)
def test_a_deterministic_gradient_of_a_mask_that_broadcasts(backend):
    tensors = inputs(*SHAPES[1], torch.float32, device_of(backend))
    for case in ("additive mask, one for all", "additive mask of keys"):
        check_right(tensors, OPTIONS[case](*SHAPES[1][:2]) | {"deterministic": True}, backend)


@pytest.mark.parametrize("backend", TRITON)
@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True},
        {"is_causal": True, "prefix_lengths": integers(70, 0)},
        {"window_size": (3, 80), "prefix_lengths": integers(64, 130), "bottom_right": True},
        {"window_size": (70, 0), "key_lengths": integers(200, 128)},
        {"window_size": (0, 150)},
    ],
    ids=str,
)
def test_several_blocks(backend, options):
    """Whole blocks and partly visible ones, with a gap between the prefix and the window."""
    tensors = inputs(200, 150, 1, 32, 32, torch.float16, device_of(backend))
    check_right(tensors, options, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_double_backward(backend):
    """The second derivative comes from the reference, the first from the kernels."""
    tensors = inputs(9, 12, 4, 16, 16, torch.float32, device_of(backend))

    def second(function):
        output, logsumexp = function(*tensors, True, None)
        first = torch.autograd.grad(output.square().sum() + logsumexp.sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(f.square().sum() for f in first), tensors)

    with lmengine.use_backend(backend):
        ours = second(lambda *args: attention(*args, return_logsumexp=True))
    for mine, ref in zip(ours, second(reference), strict=True):
        torch.testing.assert_close(mine, ref, rtol=1e-4, atol=1e-5 * ref.abs().max().item())


def test_the_gradients_of_the_reference():
    tensors = [torch.randn(2, n, length, dim, dtype=torch.double).requires_grad_()
               for n, length, dim in ((4, 6, 3), (2, 7, 3), (2, 7, 2))]  # fmt: skip
    options = OPTIONS["everything"](6, 7)
    mask = torch.randn(1, 4, 6, 7, dtype=torch.double).requires_grad_()

    def function(query, key, value, mask):
        output, logsumexp = reference(query, key, value, **(options | {"mask": mask}))
        return output, logsumexp.clamp(min=-1e9)  # a difference of infinities has no slope

    assert torch.autograd.gradcheck(function, (*tensors, mask))
    assert torch.autograd.gradgradcheck(function, (*tensors, mask))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mask": torch.ones(4, 4)}, ValueError, r"mask: expected four dimensions .* \(2, 2, 3, 5\), got \(4, 4\)"),
        ({"mask": torch.ones(1, 1, 3, 5, dtype=torch.int32)}, TypeError, "mask: expected bool, float32"),
        ({"key_lengths": integers(1)}, ValueError, r"key_lengths: expected shape \(2,\), got \(1,\)"),
        ({"prefix_lengths": torch.ones(2)}, TypeError, "prefix_lengths: expected torch.int32, got torch.float32"),
        ({"window_size": (-2, 0)}, ValueError, r"window_size: expected two numbers from -1 up, got \(-2, 0\)"),
        ({"softcap": -1.0}, ValueError, "softcap: expected a number from 0 up, got -1.0"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p: expected a number from 0 to 1, got 1.5"),
        ({"dropout_p": 0.5, "seed": torch.tensor([1.0])}, TypeError, "seed: expected torch.int64"),
        ({"alibi_slopes": torch.ones(3)}, ValueError, r"alibi_slopes: expected shape \(2,\), got \(3,\)"),
        ({"cu_seqlens_q": integers(0, 3)}, ValueError, "cu_seqlens_k: expected to be given"),
        ({"cu_seqlens_q": integers(0, 3), "cu_seqlens_k": integers(0, 5)}, ValueError, "query: expected a batch of 1"),
    ],
)
def test_wrong_options_are_named(options, error, message):
    query, key = torch.randn(2, 2, 3, 16), torch.randn(2, 2, 5, 16)
    with pytest.raises(error, match=message):
        attention(query, key, key, **options)
    with pytest.raises(ValueError, match="divides the query's 2, got 3"):
        attention(query, torch.randn(2, 3, 5, 16), torch.randn(2, 3, 5, 16))
