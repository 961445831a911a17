"""What happens inside a call of a model: the attention that it computes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch.nn.functional as F

import vdcore


class AttentionCalls:
    """Counts the attention that is computed inside: torch's, by the length of queries and keys, and vdcore's.

    It stands in torch's place, and is no function mode: under one, calls are left to the host.
    """

    def __init__(self) -> None:
        self.torch: Counter[tuple[int, int]] = Counter()
        self._before = vdcore.calls()

    def __enter__(self) -> AttentionCalls:
        self._attention = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = self._counted
        return self

    def __exit__(self, *error: Any) -> None:
        F.scaled_dot_product_attention = self._attention

    def _counted(self, query: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
        self.torch[query.shape[-2], key.shape[-2]] += 1
        return self._attention(query, key, *args, **kwargs)

    @property
    def served(self) -> int:
        """Calls of vdcore's attention operators since."""
        return sum(self.operators().values())

    def operators(self) -> Counter[str]:
        """The same by operator."""
        found: Counter[str] = Counter()
        for (op, _, direction), n in (vdcore.calls() - self._before).items():
            if op.endswith("attention") and direction == "fwd":
                found[op] += n
        return found
