"""The numerics rule must accept what is right and reject what is not."""

import pytest
import torch

from tests.numerics import assert_right


def test_accepts_twice_the_error_and_rejects_more():
    ref64 = torch.zeros(3, 4, dtype=torch.float64)
    theirs = torch.full((3, 4), 1e-3)
    assert_right(torch.full((3, 4), 2e-3), theirs, ref64, tiny=1e-9)
    ours = torch.zeros(3, 4)
    ours[1, 2] = 3e-3
    with pytest.raises(AssertionError, match=r"max error 3.000e-03 at \(1, 2\)"):
        assert_right(ours, theirs, ref64)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rejects_what_is_not_finite(bad):
    ours = torch.zeros(4)
    ours[3] = bad
    with pytest.raises(AssertionError, match=r"expected 0\.0"):
        assert_right(ours, torch.zeros(4), torch.zeros(4, dtype=torch.float64))


def test_accepts_nothing_at_all_and_the_same_infinities():
    assert_right(torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.float64))
    values = torch.tensor([float("inf"), -float("inf"), float("nan"), 1.0])
    assert_right(values, values, values.double())


def test_rejects_other_shapes_and_dtypes():
    with pytest.raises(AssertionError, match="shape"):
        assert_right(torch.zeros(2), torch.zeros(3), torch.zeros(3, dtype=torch.float64))
    with pytest.raises(AssertionError, match="dtype"):
        assert_right(torch.zeros(2), torch.zeros(2).bfloat16(), torch.zeros(2, dtype=torch.float64))
