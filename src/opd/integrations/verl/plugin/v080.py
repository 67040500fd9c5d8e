"""Differences between verl 0.8 and later releases: in 0.8 engines have no vendor, and the first one registered stays."""

# pyright: reportMissingImports=false
from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TypeVar

from verl.utils import device
from verl.workers.engine import EngineRegistry

Engine = TypeVar("Engine", bound=type)


def register_engine(model_type: str, backend: str) -> Callable[[Engine], Engine]:
    """Put an engine before verl's own of this model type and backend, on this machine's device.

    Since 0.9 by its vendor, which verl looks up first. In 0.8 by its place in the table: a second registration is ignored there,
    and no function takes one back.
    """
    name = device.get_device_name()
    if "vendor" in inspect.signature(EngineRegistry.register).parameters:
        return EngineRegistry.register(model_type=model_type, backend=backend, device=name, vendor=device.get_vendor())

    def put(engine: Engine) -> Engine:
        EngineRegistry._engines.setdefault(model_type, {}).setdefault(backend, {})[name] = engine
        return engine

    return put
