"""Section of the trained student as a folder."""

from __future__ import annotations

import re
from typing import Literal

from opd.config.sections import Section
from opd.errors import require


class SaveConfig(Section, key="save"):
    """The trained student, as a Hugging Face folder with a model card: student/, and adapter/ where there is one."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """'auto' is the type that the student came in, as its config.json says; a narrower one than student.dtype rounds small updates."""
    push_to_hub: str | None = None
    """Upload student/ to this repository of the Hugging Face hub, USER/NAME, as the last step; a failure leaves the run as it is."""
    private: bool = True
    """A repository that is made for it is private."""

    def __post_init__(self) -> None:
        require(
            self.push_to_hub is None or re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", self.push_to_hub) is not None,
            f"save.push_to_hub={self.push_to_hub} is no repository; write USER/NAME, e.g. ada/qwen-distilled.",
        )
