"""Which modes of autograd are at work: below everything, as torch alone says it."""

from __future__ import annotations

import torch
import torch.autograd.forward_ad as forward_ad


def is_transformed() -> bool:
    """A transform of torch.func is at work, or forward-mode derivatives: no path may leave autograd then."""
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def is_differentiated() -> bool:
    """Derivatives may be taken through what runs now, of either mode."""
    return torch.is_grad_enabled() or is_transformed()
