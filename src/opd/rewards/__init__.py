"""Rewards: plain functions of a prompt and a response, for training and for evaluation."""

from __future__ import annotations

from opd.rewards.base import Reward, Scorer, Scores, load_reward, score_reward
from opd.rewards.exact import exact_match
from opd.rewards.numeric import numeric_answer
from opd.rewards.regex import regex_answer

__all__ = ["Reward", "Scorer", "Scores", "exact_match", "load_reward", "numeric_answer", "regex_answer", "score_reward"]
