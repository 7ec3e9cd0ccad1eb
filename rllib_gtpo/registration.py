"""Makes algorithms known to Tune by name without importing Tune, RLlib or torch.

Tune keeps pickled classes and unpickles one when its name is looked up.  So what is registered here
is an object that unpickles to the class, importing it only then; and if Tune itself is not loaded
yet, the registration waits for its import.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

_TUNE_REGISTRY = "ray.tune.registry"


def load_class(module: str, name: str) -> Any:
    """The class of that name."""
    return getattr(importlib.import_module(module), name)


class _LazyClass:
    """Pickles to a recipe that imports the class."""

    def __init__(self, module: str, name: str) -> None:
        self._recipe = (module, name)

    def __reduce__(self) -> Any:
        return load_class, self._recipe


def register_algorithms(names: Sequence[str], home: Mapping[str, str]) -> None:
    """Registers now if Tune is loaded, else as soon as it is."""

    def register(registry: Any) -> None:
        for name in names:
            lazy = _LazyClass(f"rllib_gtpo.{home[name]}", name)
            registry._global_registry.register(registry.TRAINABLE_CLASS, name, lazy)

    loaded = sys.modules.get(_TUNE_REGISTRY)
    if loaded is not None and hasattr(loaded, "_global_registry"):
        register(loaded)
    else:
        sys.meta_path.insert(0, _AfterImport(_TUNE_REGISTRY, register))


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls `then(module)` once, right after the module's own code has run."""

    def __init__(self, module: str, then: Any) -> None:
        self._module, self._then = module, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """See MetaPathFinder."""
        if fullname != self._module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            loader, run = spec.loader, spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                self._then(module)

            loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
