"""Implementations of one request; they never import each other."""
