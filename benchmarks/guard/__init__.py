"""Thresholds of the guard: false alarms, and what is seen."""
