"""Ingredients of `opd demo`: a task, a teacher trained on it, and a student trained on wrong answers."""
