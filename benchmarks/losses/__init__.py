"""The tables of src/opd/losses/README.md."""
