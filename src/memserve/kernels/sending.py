"""Small arrays of the host on their way to a device, whose steps they must not hold up."""

from __future__ import annotations

import numpy as np
import torch


def sent(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy of ``values`` on ``device``, in its stream's order. The host does not wait, and may write ``values`` again.

    A copy from ordinary memory waits for all that was launched before. torch keeps the pinned memory until the copy is done.
    """
    there = torch.from_numpy(values.copy())
    return there if device.type == "cpu" else there.pin_memory().to(device, non_blocking=True)
