# SPDX-License-Identifier: Apache-2.0
"""Lets a CUDA build of torchvision be imported beside a CPU build of torch.

The package index's torchvision is built against CUDA torch. Beside torch+cpu its C++ library does not load, and the
import then dies with "operator torchvision::nms does not exist", because its Python side attaches fake kernels to two
operators the library would have declared. Hugging Face's video processors need only ``torchvision.transforms``, which
is plain torch, so declaring the two schemas is enough. Calling an operator still fails, as it should.

``bootstrap.py`` copies this file into the environment with a ``.pth`` line that imports it, and only when the import
was seen to fail. It can go once a CPU torchvision is installed; until then it steps aside by itself, because it
declares nothing when torchvision's own library loaded. It costs an interpreter start one list insert, and each
import one string comparison; torch is not imported here.
"""

import sys

_TARGET = "torchvision.extension"  # its body tries to load the C++ library; _has_ops() then tells the outcome
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library = None  # a torch Library takes its operators with it when collected


def _declare(extension):
    global _library
    if extension._has_ops():
        return
    import torch

    _library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        # Guarded one by one: a torchvision that declares one of them in Python must not become an import error.
        if not hasattr(torch.ops.torchvision, schema.partition("(")[0]):
            _library.define(schema)


class _Finder:
    """Runs ``_declare`` right after the body of ``torchvision.extension``."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != _TARGET:
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        run_body = spec.loader.exec_module

        def exec_module(module):
            run_body(module)
            _declare(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _Finder)
