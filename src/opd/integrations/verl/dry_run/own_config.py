"""`python -m … WORDS`: what verl's main checks on the driver before Ray starts, for the sizes that the user wrote."""

# pyright: reportMissingImports=false
from __future__ import annotations

import sys
from collections.abc import Sequence

from opd.integrations.verl.dry_run.compose import compose, read_words


def main(words: Sequence[str]) -> None:
    """Raises what verl raises, or returns."""
    config = compose(read_words(words))
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    validate_config(config, need_reference_policy(config), need_critic(config))


if __name__ == "__main__":
    main(sys.argv[1:])
