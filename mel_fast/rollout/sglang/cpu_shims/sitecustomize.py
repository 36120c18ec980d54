"""On the path of servers on a CPU. torchvision, which SGLang imports, registers meta kernels for two operators that
its wheel only brings with CUDA; they are declared here just before torchvision is imported, and never called."""

import importlib.abc
import sys
from typing import ClassVar


class _DeclareOperators(importlib.abc.MetaPathFinder):
    libraries: ClassVar = []  # declarations last as long as someone holds them

    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            from torch.library import Library

            library = Library("torchvision", "DEF")
            for name in ("nms", "qnms"):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            self.libraries.append(library)


sys.meta_path.insert(0, _DeclareOperators())
