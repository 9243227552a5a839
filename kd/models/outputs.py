"""What networks return: logits, or an output that has them."""

from typing import Any

from torch import Tensor


def logits_of(output: Any) -> Any:
    """The logits of what a network returns: itself, or its `logits`, as networks of transformers name them."""
    return output if isinstance(output, Tensor) else getattr(output, "logits", output)
