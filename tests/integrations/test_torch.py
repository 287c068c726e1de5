"""Models that call PyTorch's attention, on our kernels: what the dispatcher calls, and whole models on a CPU."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F

import lmengine
import lmengine.integrations.torch as integration
from lmengine import UnsupportedCall
from lmengine.ops.attention import OPTIONS, attention, operator
from lmengine.ops.attention_reference import reference
from tests.integrations.models import CONFIGURATIONS, batch
from tests.numerics import assert_right


@pytest.fixture
def activated():
    integration.activate()
    yield
    integration.restore()


@pytest.fixture
def ran(monkeypatch):
    """A list of "forward" and "backward", one for each run of our kernels."""
    names = []

    def recorded(name, run):
        def then(*args):
            result = run(*args)
            names.append(name)
            return result

        return then

    for name in ("forward", "backward"):
        monkeypatch.setattr(integration, name, recorded(name, getattr(integration, name)))
    return names


def tensors(*shapes, dtype=torch.float32):
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def sdpa(query, key, value, **options):
    return F.scaled_dot_product_attention(query, key, value, **options)


def results(function, inputs, grad, **options):
    output = function(*inputs, **options)
    return [output.detach(), *torch.autograd.grad(output, inputs, grad.to(output.dtype))]


def exact(inputs, grad, **options):
    return results(sdpa, [x.detach().double().requires_grad_() for x in inputs], grad, **options)


def assert_all_right(ours, theirs, ref64):
    """Gradients of a whole model: of terms that cancel a few numbers may be left, or 0, whose error is the terms'."""
    largest = max(right.abs().max().item() for right in ref64)
    for our, their, right in zip(ours, theirs, ref64, strict=True):
        assert_right(our, their, right, tiny=1e-3 * right.abs().max().item() + 1e-5 * largest)


# ---- F.scaled_dot_product_attention on a CPU ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}, {"enable_gqa": True}])
def test_function_on_a_cpu(dtype, options, ran):
    heads = 2 if "enable_gqa" in options else 4
    inputs = tensors((2, 4, 37, 24), (2, heads, 53, 24), (2, heads, 53, 24), dtype=dtype)
    inputs[0] = inputs[0].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    grad = torch.randn(2, 4, 37, 24)
    ref64, theirs = exact(inputs, grad, **options), results(sdpa, inputs, grad, **options)
    integration.activate()
    try:
        ours = results(sdpa, inputs, grad, **options)
    finally:
        integration.restore()
    supported = operator.refusal("cpu", "cpu", *inputs) is None  # heads of keys may be missing from the kernels
    assert ran == (["forward", "backward"] if supported else []) and (supported or "enable_gqa" in options)
    for our, their, right, name in zip(ours, theirs, ref64, ("output", "query", "key", "value"), strict=True):
        assert our.stride() == their.stride()  # as PyTorch's graphs expect it
        assert_right(our, their, right, tiny=2e-2 if dtype == torch.bfloat16 else 1e-5, name=name)
    count = len(ran)
    if supported:
        declared = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        arguments = {name: option for name, option in options.items() if name != "enable_gqa"}
        with torch.no_grad():
            pairs = zip(integration.for_cpu(*inputs, **arguments), declared(*inputs, **arguments), strict=True)
        for our, their in pairs:  # output and logsumexp
            assert our.stride() == their.stride() and our.dtype == their.dtype
            torch.testing.assert_close(our, their, rtol=2e-2, atol=2e-2)
        count += 1
    assert torch.equal(results(sdpa, inputs, grad, **options)[0], theirs[0]) and len(ran) == count


def test_a_gradient_without_memory_of_its_own(activated, ran):
    inputs = tensors(*[(2, 4, 9, 16)] * 3)
    for grad, loss in (
        (torch.ones(2, 4, 9, 16), lambda x: x.sum()),
        (torch.full((2, 4, 9, 16), 1 / 1152), lambda x: x.mean()),
    ):
        ours = torch.autograd.grad(loss(sdpa(*inputs, is_causal=True)), inputs)
        for our, right in zip(ours, exact(inputs, grad, is_causal=True)[1:], strict=True):
            torch.testing.assert_close(our.double(), right, rtol=1e-4, atol=1e-5)
    assert ran == ["forward", "backward"] * 2


@pytest.mark.parametrize("shape", [(37, 53), (2, 1, 1, 53), (1, 4, 37, 53)])
def test_a_mask_on_a_cpu(shape):
    """On our kernels or, where they have no masks, on PyTorch's: the result is right in either case."""
    inputs = tensors((2, 4, 37, 24), (2, 4, 53, 24), (2, 4, 53, 24))
    mask = torch.randn(shape).masked_fill(torch.rand(shape) < 0.3, -torch.inf)
    grad = torch.randn(2, 4, 37, 24)
    ref64 = exact(inputs, grad, attn_mask=mask.double())
    theirs = results(sdpa, inputs, grad, attn_mask=mask)
    integration.activate()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours = results(sdpa, inputs, grad, attn_mask=mask)
    finally:
        integration.restore()
    for our, their, right in zip(ours, theirs, ref64, strict=True):
        assert_right(our, their, right, tiny=1e-5)


def test_what_is_not_supported_is_pytorchs_and_a_warning_says_so(activated, ran):
    inputs = tensors(*[(2, 4, 9, 16)] * 3, dtype=torch.float64)
    grad = torch.randn(2, 4, 9, 16)
    integration.warn_of_pytorch.cache_clear()
    with pytest.warns(UserWarning, match="PyTorch's kernel runs, not lmengine's: cpu: query: expected float32"):
        ours = results(sdpa, inputs, grad)
    assert ran == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once
        results(sdpa, inputs, grad)
    integration.restore()
    for our, their in zip(ours, results(sdpa, inputs, grad), strict=True):
        assert torch.equal(our, their)
    integration.activate()
    with lmengine.use_backend("cpu"), pytest.raises(UnsupportedCall, match="query: expected float32"):
        sdpa(*inputs)
    with lmengine.use_backend("reference"), pytest.raises(UnsupportedCall, match="reference"):
        sdpa(*inputs)


def test_transformer_encoder(activated, ran):
    """A model of torch.nn as it is, in training, with and without a causal mask."""
    encoder = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(64, 4, 96, 0.0, batch_first=True), 2)
    x = torch.randn(3, 19, 64)
    weights = torch.randn(3, 19, 64)

    def gradients(model, **options):
        dtype = next(model.parameters()).dtype
        output = model(x.to(dtype), **options)
        return [output.detach(), *torch.autograd.grad(output, list(model.parameters()), weights.to(dtype))]

    ours = gradients(encoder)
    assert ran == ["forward", "forward", "backward", "backward"]
    integration.restore()
    theirs, ref64 = gradients(encoder), gradients(copy.deepcopy(encoder).double())
    assert_all_right(ours, theirs, ref64)


def test_a_model_of_transformers_that_is_left_as_it_is(activated, ran):
    from transformers import LlamaForCausalLM

    configuration = CONFIGURATIONS["llama"]()
    configuration.num_key_value_heads = configuration.num_attention_heads
    model = LlamaForCausalLM._from_config(configuration, attn_implementation="sdpa").eval()
    ids, _ = batch(None)
    weights = torch.randn(*ids.shape, 64)

    def gradients(model):
        logits = model(ids).logits
        return [logits.detach(), *torch.autograd.grad(logits, list(model.parameters()), weights.to(logits))]

    ours = gradients(model)
    assert ran == ["forward", "forward", "backward", "backward"]
    tokens = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert len(ran) == 4 + 6 * 2
    integration.restore()
    assert torch.equal(tokens, model.generate(ids, max_new_tokens=6, do_sample=False))
    assert_all_right(ours, gradients(model), gradients(copy.deepcopy(model).double()))


def test_compiled(activated, ran):
    inputs = tensors(*[(2, 4, 9, 16)] * 3)
    grad = torch.randn(2, 4, 9, 16)
    eager = results(sdpa, inputs, grad, is_causal=True)
    compiled = results(torch.compile(sdpa, backend="aot_eager", fullgraph=True), inputs, grad, is_causal=True)
    assert ran == ["forward", "backward"] * 2
    torch.testing.assert_close(compiled, eager, rtol=0, atol=0)
    torch._dynamo.reset()


# ---- the registry ----------------------------------------------------------------------------------------------


def test_activate_and_restore(ran):
    attention_module = torch.nn.attention
    inputs = tensors(*[(1, 2, 5, 16)] * 3)
    integration.register()
    assert "lmengine" in attention_module.list_flash_attention_impls()
    assert attention_module.current_flash_attention_impl() is None
    sdpa(*inputs)
    assert ran == []
    attention_module.activate_flash_attention_impl("lmengine")  # PyTorch's own way
    sdpa(*inputs)
    assert ran == ["forward"]
    integration.activate()  # twice does no harm
    sdpa(*inputs)
    assert ran == ["forward"] * 2
    assert attention_module.current_flash_attention_impl() == "lmengine"
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    attention_module.restore_flash_attention_impl()
    sdpa(*inputs)
    integration.restore()
    assert ran == ["forward"] * 2 and attention_module.current_flash_attention_impl() is None
    assert torch.backends.cuda.cudnn_sdp_enabled()
    handle = integration.Overrides()
    handle.remove()  # and is still there itself
    sdpa(*inputs)
    assert ran == ["forward"] * 2


def test_the_dispatcher_calls_us_on_cuda(activated):
    for key, implementations in integration.IMPLEMENTATIONS.items():
        for name in implementations:
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key)
            found = next(line for line in torch._C._dispatch_dump(f"aten::{name}").splitlines() if line.startswith(key))
            assert "lmengine/integrations/torch.py" in found
    integration.restore()
    for name in integration.IMPLEMENTATIONS["CUDA"]:
        assert "lmengine" not in torch._C._dispatch_dump(f"aten::{name}")


def test_an_older_pytorch_is_told(monkeypatch):
    monkeypatch.delattr(torch.nn.attention, "register_flash_attention_impl")
    for function in (integration.register, integration.activate, integration.restore):
        with pytest.raises(RuntimeError, match=r"needs PyTorch 2\.13 or later"):
            function()


# ---- what is called on CUDA, with tensors on the CPU ---------------------------------------------------------------


def reference_backward(grad_output, grad_logsumexp, query, key, value, output, logsumexp, *arguments):
    options = dict(zip(OPTIONS, arguments, strict=False))
    options["window_size"] = (options.pop("window_left"), options.pop("window_right"))
    inputs = [x.detach().requires_grad_() for x in (query, key, value)]
    with torch.enable_grad():
        right = reference(*inputs, **options)
        torch.testing.assert_close(output, right[0])  # dropout is the forward's
        torch.testing.assert_close(logsumexp, right[1])
        return *torch.autograd.grad(right[0], inputs, grad_output), None


@pytest.fixture(params=["reference", "cpu"])
def backend(request, monkeypatch):
    """Calls of the wrappers that no dispatcher is in between may take the reference too."""
    monkeypatch.setitem(integration.BACKWARD, "reference", reference_backward)
    with lmengine.use_backend(request.param):
        yield request.param


def call_flash(query, key, value, grad, dropout_p=0.0, is_causal=False, scale=None):
    """Output, logsumexp and gradients as autograd gets them from the two operators; and the state of dropout."""
    with torch.no_grad():
        output, logsumexp, cum_q, cum_k, max_q, max_k, state, unused, _ = integration.flash(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )
        grads = integration.flash_backward(
            grad, query, key, value, output, logsumexp, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, state, unused,
            scale=scale,
        )  # fmt: skip
    return [output, logsumexp, *grads], state


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("head_dim", [8, 32])
def test_flash_operators(backend, is_causal, head_dim):
    inputs = tensors(*[(2, 3, 21, head_dim)] * 3)
    grad = torch.randn(2, 3, 21, head_dim)
    theirs, ref64 = results(sdpa, inputs, grad, is_causal=is_causal), exact(inputs, grad, is_causal=is_causal)
    with lmengine.use_backend(backend):
        if operator.explain(*inputs, is_causal).backend is None:
            with pytest.raises(UnsupportedCall, match="head_dim"):
                call_flash(*inputs, grad, is_causal=is_causal)
            return
        (output, logsumexp, *grads), state = call_flash(*inputs, grad, is_causal=is_causal)
    for our, their, right in zip([output, *grads], theirs, ref64, strict=True):
        assert_right(our, their, right, tiny=1e-5)
    scores = inputs[0].detach().double() @ inputs[1].detach().double().mT / head_dim**0.5
    if is_causal:
        scores = scores.masked_fill(torch.ones(21, 21).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(logsumexp.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)
    assert logsumexp.dtype == torch.float32 and output.stride() == inputs[0].stride()
    assert state.dtype == torch.uint64 and state.shape == (2,)


def test_flash_operators_return_what_pytorch_declares(backend):
    """Against the meta functions, which graphs are built on."""
    query, key, value = (x.detach() for x in tensors(*[(2, 9, 4, 16)] * 3))
    dense = [x.transpose(1, 2) for x in (query, key, value)]
    starts = torch.tensor([0, 4, 9], dtype=torch.int32)
    packed = [x[0] for x in (query, key, value)]
    aten = torch.ops.aten
    cases = [
        (aten._scaled_dot_product_flash_attention, integration.flash, (*dense, 0.1, True)),
        (aten._flash_attention_forward, integration.varlen, (query, key, value, None, None, 9, 9, 0.0, True, False)),
        (aten._flash_attention_forward, integration.varlen, (*packed, starts, starts, 5, 5, 0.0, True, False)),
    ]
    for declared, ours, arguments in cases:
        expected = declared(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments))
        for one, other in zip(ours(*arguments), expected, strict=True):
            if isinstance(other, torch.Tensor):
                assert one.shape == other.shape and one.dtype == other.dtype
                assert one.dim() < 3 or one.stride() == other.stride()
            else:
                assert one == other


def test_dropout_is_the_same_forward_and_backward(backend):
    inputs = [x.detach() for x in tensors(*[(2, 3, 21, 16)] * 3)]
    grad = torch.randn(2, 3, 21, 16)
    found = []
    for generator in (1, 1, 2):
        torch.manual_seed(generator)
        found.append(call_flash(*inputs, grad, dropout_p=0.4, is_causal=True))  # reference_backward compares
    assert torch.equal(found[0][0][0], found[1][0][0]) and not torch.equal(found[0][0][0], found[2][0][0])
    seed = found[0][1][:1].view(torch.int64)
    leaves = [x.clone().requires_grad_() for x in inputs]
    output = attention(*leaves, is_causal=True, dropout_p=0.4, seed=seed)
    for our, right in zip(found[0][0][2:], torch.autograd.grad(output, leaves, grad), strict=True):
        torch.testing.assert_close(our, right, rtol=1e-4, atol=1e-5)


VARLEN = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"window_size_left": 3, "window_size_right": 2},
    "left window": {"is_causal": True, "window_size_left": 3, "window_size_right": -1},
    "scale": {"scale": 0.5},
    "dropout": {"dropout_p": 0.3, "is_causal": True},
    "seqused_k": {"is_causal": True, "seqused_k": torch.tensor([4, 1, 7], dtype=torch.int32)},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25]), "is_causal": True},
}


@pytest.mark.parametrize("options", VARLEN.values(), ids=VARLEN)
def test_varlen_operators(options, backend):
    """Sequences packed without padding: forward and backward give what each sequence gives alone."""
    lengths_q, lengths_k, heads = [3, 1, 6], [5, 1, 9], 2
    starts_q, starts_k = (torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (lengths_q, lengths_k))
    query, key, value, grad = (x.detach() for x in tensors(*[(10, heads, 16)], *[(15, heads, 16)] * 2, (10, heads, 16)))
    given = {"dropout_p": 0.0, "is_causal": False} | options
    forward = [given.pop(name) for name in ("dropout_p", "is_causal")]
    numbers = (starts_q, starts_k, 6, 9, *forward)
    output, logsumexp, state, unused, _ = integration.varlen(query, key, value, *numbers, False, **given)
    assert logsumexp.shape == (heads, 10)
    into = torch.empty_like(output)
    if not given.keys() & {"seqused_k", "alibi_slopes"}:  # of which PyTorch's backward is not told
        grads = integration.varlen_backward(
            grad, query, key, value, output, logsumexp, *numbers, state, unused, **given
        )
    if "dropout_p" not in options:
        assert torch.equal(integration.varlen_into(into, query, key, value, *numbers, False, **given), logsumexp)
        assert torch.equal(into, output)
    names = {"scale": "scale", "alibi_slopes": "alibi_slopes"}
    others = {names[name]: option for name, option in given.items() if name in names}
    window = tuple(given.get(f"window_size_{side}", -1) for side in ("left", "right"))
    for row, (from_q, from_k) in enumerate(zip(starts_q[:-1].tolist(), starts_k[:-1].tolist(), strict=True)):
        to_q, to_k = from_q + lengths_q[row], from_k + lengths_k[row]
        used = from_k + int(options["seqused_k"][row]) if "seqused_k" in options else to_k
        leaves = [
            x[start:end].transpose(0, 1)[None].clone().requires_grad_()
            for x, start, end in ((query, from_q, to_q), (key, from_k, used), (value, from_k, used))
        ]
        if "dropout_p" in options:
            continue  # reference_backward compared; that sequences are numbered is the operator's to test
        right, right_logsumexp = attention(
            *leaves, options.get("is_causal", False), bottom_right=True, window_size=window, return_logsumexp=True,
            **others,
        )  # fmt: skip
        torch.testing.assert_close(output[from_q:to_q], right[0].transpose(0, 1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logsumexp[:, from_q:to_q], right_logsumexp[0], rtol=1e-4, atol=1e-5)
        if not given.keys() & {"seqused_k", "alibi_slopes"}:
            expected = torch.autograd.grad(right, leaves, grad[from_q:to_q].transpose(0, 1)[None])
            pieces = (grads[0][from_q:to_q], grads[1][from_k:to_k], grads[2][from_k:to_k])
            for our, one in zip(pieces, expected, strict=True):
                torch.testing.assert_close(our, one[0].transpose(0, 1), rtol=1e-4, atol=1e-5)


def test_what_the_varlen_operator_refuses():
    query = torch.randn(1, 5, 2, 16)
    with pytest.raises(UnsupportedCall, match="block_table"):
        integration.varlen(query, query, query, None, None, 5, 5, 0.0, False, False, block_table=torch.zeros(1, 1))
    with pytest.raises(UnsupportedCall, match="return_debug_mask"):
        integration.varlen(query, query, query, None, None, 5, 5, 0.0, False, True)
    with pytest.raises(UnsupportedCall, match="return_debug_mask"):
        integration.flash(query, query, query, 0.0, False, True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [False, True])
def test_function_on_a_gpu(dtype, is_causal, ran):
    inputs = [x.detach().cuda().requires_grad_() for x in tensors(*[(2, 4, 300, 64)] * 3, dtype=dtype)]
    grad = torch.randn(2, 4, 300, 64, device="cuda")
    ref64, theirs = exact(inputs, grad, is_causal=is_causal), results(sdpa, inputs, grad, is_causal=is_causal)
    integration.activate()
    try:
        ours = results(sdpa, inputs, grad, is_causal=is_causal)
    finally:
        integration.restore()
    assert ran == ["forward", "backward"]
    for our, their, right in zip(ours, theirs, ref64, strict=True):
        assert_right(our, their, right, tiny=1e-3)
