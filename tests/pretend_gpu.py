# SPDX-License-Identifier: Apache-2.0
"""Tensors that say they are on a GPU, for what decides by that: their data are on the CPU.

Torch then acts as on a machine with a GPU: a tensor on the CPU and one that pretends cannot be mixed, what is made of
one that pretends pretends too, and every copy back is counted. The kernels for the GPU are replaced by those of the
CPU, which tests/kernels compares them with. So this shows where data go, not what a GPU computes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from evs_kernels import _dispatch

GPU = torch.device("cuda", 0)

_MIXES = ("index.Tensor", "index_put_.default", "copy_.default")
"""What takes indices, or data, from the CPU on a real one, too."""


class There(torch.Tensor):
    """A tensor on the pretended GPU.

    Args:
        held: Its data, on the CPU; views of one are views of the other.
    """

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "There":
        # Torch's own code asks the true device for the GPU that is not there; "meta" needs none.
        there: There = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device="meta",
        )
        return there

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    @property
    def device(self) -> torch.device:
        return GPU

    is_cpu = False

    def __repr__(self) -> str:  # type: ignore[override]
        return f"There({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.__name__, kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if name not in _MIXES and any(x.ndim and not isinstance(x, There) for x in tensors):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device")
        if "device" in kwargs:
            kwargs = kwargs | {"device": "cpu"}
        out = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        in_place = name.split(".")[0].endswith("_") and not name.startswith("__")
        return args[0] if in_place else tree_map(_there, out)


def _held(x: Any) -> Any:
    return x.held if isinstance(x, There) else x


def _there(x: Any) -> Any:
    return There(x) if isinstance(x, torch.Tensor) else x


@dataclass
class Copied:
    """What went from the pretended GPU to the CPU.

    Attributes:
        sizes: The bytes of each copy.
    """

    sizes: list[int] = field(default_factory=list)

    def note(self, tensor: There) -> torch.Tensor:
        self.sizes.append(tensor.held.nbytes)
        return tensor.held.clone()


class _Pretend(TorchFunctionMode):
    def __init__(self, copied: Copied) -> None:
        super().__init__()
        self._copied = copied

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        if func is torch.Tensor.__setitem__ and isinstance(first, There):
            return func(*tree_map(_held, args))
        if func in (torch.Tensor.numpy, torch.Tensor.data_ptr) and isinstance(first, There):
            raise TypeError("the data are on a GPU")
        if func in (torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.__int__, torch.Tensor.__bool__):
            return func(self._copied.note(first)) if isinstance(first, There) else func(*args)
        if func is torch.Tensor.cpu and isinstance(first, There):
            return self._copied.note(first)
        named = [x for x in args[1:] if isinstance(x, str | torch.device)] if func is torch.Tensor.to else []
        asked = kwargs.get("device") or (named[0] if named else None)
        if asked is None or (where := torch.device(asked).type) == "meta":
            return func(*args, **kwargs)
        if func is torch.Tensor.to:
            rest = [x for x in args[1:] if not isinstance(x, str | torch.device)]
            kwargs.pop("device", None)
            if where == "cuda" and not isinstance(first, There):
                first = There(first.clone())  # type: ignore[union-attr]
            elif where == "cpu" and isinstance(first, There):
                first = self._copied.note(first)
            return first.to(*rest, **kwargs) if rest or kwargs else first  # type: ignore[union-attr]
        if where != "cuda":
            return func(*args, **kwargs)
        return There(func(*args, **(kwargs | {"device": "cpu"})))


@contextmanager
def pretended_gpu() -> Iterator[Copied]:
    """Lets `There` be used; gives what was copied from it to the CPU."""
    load = _dispatch._load

    def load_for_both(op: str, backend: str) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            on_gpu = isinstance(args[0], There)
            out = load(op, "cpu" if on_gpu else backend)(*tree_map(_held, args), **tree_map(_held, kwargs))
            if not on_gpu:
                return out
            return There(out) if isinstance(out, torch.Tensor) else type(out)(*map(_there, out))

        return run

    copied = Copied()
    with (
        patch.object(_dispatch, "_load", load_for_both),
        patch.object(torch.cuda, "get_device_name", lambda device: "pretended"),
        _Pretend(copied),
    ):
        yield copied
