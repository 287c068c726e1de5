"""The numerics rule of every operator test: ours may be at most twice as far from float64 as PyTorch's own operator."""

import torch


def assert_right(
    ours: torch.Tensor,
    torch_same_dtype: torch.Tensor,
    ref64: torch.Tensor,
    *,
    tiny: float = 1e-6,
    name: str = "output",
) -> None:
    """Assert ``max|ours - ref64| <= 2 * max|torch_same_dtype - ref64| + tiny``.

    ``torch_same_dtype`` is PyTorch's operator on the same inputs in the same dtype, ``ref64`` the reference in float64
    on the upcast inputs. Infinities and NaNs must stand in the same places in ``ours`` and ``ref64``.
    """
    assert ours.shape == ref64.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(ref64.shape)}"
    assert ours.dtype == torch_same_dtype.dtype, f"{name}: dtype {ours.dtype}, expected {torch_same_dtype.dtype}"
    assert ref64.dtype == torch.float64, f"{name}: the reference must be float64, not {ref64.dtype}"
    ours, theirs, ref64 = (tensor.detach().double().cpu() for tensor in (ours, torch_same_dtype, ref64))
    same_kind = (ours.isnan() == ref64.isnan()) & (~ref64.isinf() | (ours == ref64)) & (~ours.isinf() | ref64.isinf())
    if not same_kind.all():
        index = tuple((~same_kind).nonzero()[0].tolist())
        raise AssertionError(f"{name}[{index}] is {ours[index].item()}, expected {ref64[index].item()}")
    finite = ref64.isfinite()
    if not finite.any():
        return
    our_error = torch.where(finite, ours - ref64, 0).abs()
    their_error = torch.where(finite & theirs.isfinite(), theirs - ref64, 0).abs().max().item()
    worst, bound = our_error.max().item(), 2 * their_error + tiny
    if worst > bound:
        index = tuple(int(i) for i in torch.unravel_index(our_error.argmax(), our_error.shape))
        raise AssertionError(
            f"{name}: max error {worst:.3e} at {index} (ours {ours[index].item():.8g}, expected "
            f"{ref64[index].item():.8g}) exceeds 2 x PyTorch's {their_error:.3e} + {tiny:.1e} = {bound:.3e}"
        )
