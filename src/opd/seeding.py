"""Random draws as pure functions of (seed, step, purpose): a resumed run needs no saved generator state."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, step: int, purpose: str) -> int:
    """A 63-bit seed, unrelated for any two different arguments."""
    digest = hashlib.blake2b(f"{seed}/{step}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
