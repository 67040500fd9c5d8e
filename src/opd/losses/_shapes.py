"""Shape annotations. With jaxtyping installed they can be checked at run time; without it they are only read."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

CHECKABLE = find_spec("jaxtyping") is not None

if TYPE_CHECKING or CHECKABLE:
    from jaxtyping import Bool, Float, Int
else:

    class _Unchecked:
        """Stands for a jaxtyping dtype, so that `Float[Tensor, "tokens"]` can be evaluated."""

        def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
            return item[0]

    class Float(_Unchecked): ...

    class Int(_Unchecked): ...

    class Bool(_Unchecked): ...


__all__ = ["Bool", "Float", "Int"]
