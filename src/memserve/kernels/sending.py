"""Copies small arrays between host and device without waiting for what the device runs."""

from __future__ import annotations

import numpy as np
import torch


def sent(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy of ``values`` on ``device``, in stream order. Does not wait; the caller may reuse ``values``.

    A copy from unpinned memory would wait for everything launched before. torch keeps the pinned memory until
    the copy is done.
    """
    return pinned(values, device).to(device, non_blocking=True)


def pinned(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy of ``values`` on the host, from which copying to ``device`` need not wait."""
    here = torch.from_numpy(values.copy())
    return here if device.type == "cpu" else here.pin_memory()


def fetched(values: torch.Tensor) -> torch.Tensor:
    """A copy of ``values`` on the host, valid once the device has done all that was launched so far."""
    here = torch.empty_like(values, device="cpu", pin_memory=values.device.type != "cpu")
    return here.copy_(values, non_blocking=True)
