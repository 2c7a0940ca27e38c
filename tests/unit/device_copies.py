# SPDX-License-Identifier: Apache-2.0
"""Watches what code does to a device that is not there: torch's "meta", on which tensors have shapes and no values."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

META = torch.device("meta")

# What makes a host wait for the device, or sorts there. `index` and `index_put_` do so for masks.
WAITS = ("nonzero", "item", "_local_scalar_dense", "masked_select", "unique", "sort", "argsort", "topk", "is_nonzero")
COPIES = ("to", "_to_copy", "copy", "copy_")  # the first where inference mode leaves it whole


class DeviceCopies(TorchDispatchMode):
    """Lists, while it is entered, copies from or to the device and operations that would wait for it.

    Attributes:
        copies: Number of copies between the CPU and the device.
        waits: Names of the operations that would have the host wait, or sort on the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies = 0
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        name = func._schema.name.split("::")[-1]
        on_device = any(x.device == META for x in given)
        if on_device and (
            name.rstrip("_") in WAITS or (name.startswith("index") and any(x.dtype == torch.bool for x in given))
        ):
            self.waits.append(name)
        out = func(*args, **(kwargs or {}))
        made = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.copies += name in COPIES and len({x.device for x in (*given, *made)}) > 1
        return out
