"""Evidence on a real language model: SmolLM2-135M-Instruct, trained by `opd train`."""
