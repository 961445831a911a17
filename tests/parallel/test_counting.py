"""What is held at once, counted over torch's tensors."""

import torch

from vdcore.parallel import Allocations


def test_tensors_count_while_somebody_holds_them():
    with Allocations() as counted:
        a = torch.empty(1000)
        view = a[10:]
        assert counted.now == 4000
        b = torch.empty(500, dtype=torch.bfloat16)
        assert counted.now == counted.peak == 5000
        del a, b
        assert counted.now == 4000  # of which the view is a part
        view.add_(1)
        del view
        c = torch.empty(100)
    assert (counted.now, counted.peak) == (c.nbytes, 5000)


def test_what_was_there_before_does_not_count_and_what_autograd_saves_does():
    x = torch.randn(1000, requires_grad=True)
    with Allocations() as counted:
        x.detach().view(10, 100).mul_(2)
        assert counted.peak == 0
        y = x.exp().sin()
        assert counted.now == 8000  # the exponential, saved, and its sine
        y.sum().backward()
        del y
    assert counted.now == 4000  # the gradient
