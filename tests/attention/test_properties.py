"""Attention on the CPU for any combination of shapes, strides, dtypes and features, against the reference in float64."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.attention.test_features import check_right


@st.composite
def calls(draw):
    """Tensors and options of one call that the CPU's kernels take."""
    torch.manual_seed(draw(st.integers(0, 2**32)))
    batch, kv_heads, groups = draw(st.integers(0, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 3]))
    queries, keys = draw(st.integers(0, 70)), draw(st.integers(0, 150))
    head_dim = draw(st.sampled_from([1, 5, 8, 16, 24, 33, 64]))
    value_dim = draw(st.sampled_from([head_dim, head_dim, 3, 40]))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]))
    shapes = [(kv_heads * groups, queries, head_dim), (kv_heads, keys, head_dim), (kv_heads, keys, value_dim)]
    tensors = [laid_out(draw, (batch, *shape), dtype) for shape in shapes]
    options = {}
    if draw(st.booleans()):
        options["is_causal"] = True
    if draw(st.booleans()):
        options["bottom_right"] = True
    if draw(st.booleans()):
        options["window_size"] = (draw(st.integers(-1, 80)), draw(st.integers(-1, 80)))
    for name in ("prefix_lengths", "key_lengths"):
        if draw(st.integers(0, 3)) == 0:
            options[name] = torch.randint(0, keys + 3, (batch,), dtype=torch.int32)
    if draw(st.integers(0, 2)) == 0:
        sizes = [n if draw(st.booleans()) else 1 for n in (batch, kv_heads * groups, queries, keys)]
        if draw(st.booleans()):
            options["mask"] = torch.rand(sizes) < 0.7
        else:
            kind = draw(st.sampled_from([torch.float32, dtype]))
            options["mask"] = torch.randn(sizes).to(kind).requires_grad_(draw(st.booleans()))
    if draw(st.integers(0, 3)) == 0:
        options["alibi_slopes"] = torch.rand(kv_heads * groups)
    if draw(st.integers(0, 3)) == 0:
        options["softcap"] = draw(st.floats(0.5, 5))
    if draw(st.integers(0, 3)) == 0:
        options["dropout_p"] = draw(st.floats(0.05, 0.95))
        options["seed"] = torch.randint(-(2**62), 2**62, (1,))
    return tensors, options


def laid_out(draw, shape, dtype):
    """A tensor of a shape, with one of the layouts that callers have."""
    batch, heads, length, dim = shape
    layout = draw(st.sampled_from(["heads first", "length first", "a part of a row", "columns apart"]))
    if layout == "length first":
        tensor = torch.randn(batch, length, heads, dim).to(dtype).transpose(1, 2)
    elif layout == "a part of a row":
        tensor = torch.randn(batch, length, 3, heads, dim).to(dtype)[:, :, 1].transpose(1, 2)
    elif layout == "columns apart":
        tensor = torch.randn(batch, heads, length, 2 * dim).to(dtype)[..., ::2]
    else:
        tensor = torch.randn(shape).to(dtype)
    return tensor.detach().requires_grad_()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(calls())
def test_any_call_of_the_cpu_is_right(call):
    check_right(*call, "cpu", tiny=1e-5)
