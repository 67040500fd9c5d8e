"""Compression: SmolLM2-135M-Instruct in 4 bits, recovered by its full-precision self."""
