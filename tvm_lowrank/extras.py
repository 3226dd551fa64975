"""Optional dependencies, asked for in one place."""

from __future__ import annotations

from typing import Any

from tvm_lowrank.errors import LowRankError


def require_torch() -> Any:
    """The module ``torch``.

    Raises
    ------
    LowRankError
        PyTorch is not installed; the message names the extra.
    """
    try:
        import torch
    except ImportError as error:
        raise LowRankError(
            "training factors needs PyTorch; install the extra: pip install tvm-lowrank[torch]"
        ) from error
    return torch
