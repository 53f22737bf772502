"""Evaluation: scores of given text under a masked diffusion model, and the adapter to lm-eval.

The scoring functions need nothing beyond the package's own dependencies; `illada.evaluation.harness` needs `lm_eval`.
"""

from .choices import ChoiceText, Decision, choice_probabilities
from .confidence import ConfidenceScore, confidence_score, is_greedy
from .decisions import Blank, Choice, Predicate, Score, decide
from .likelihood import (
    LogLikelihood,
    RollingLogLikelihood,
    monte_carlo_log_likelihood,
    rolling_log_likelihood,
)

__all__ = [
    "Blank",
    "Choice",
    "ChoiceText",
    "ConfidenceScore",
    "Decision",
    "LogLikelihood",
    "Predicate",
    "RollingLogLikelihood",
    "Score",
    "choice_probabilities",
    "confidence_score",
    "decide",
    "is_greedy",
    "monte_carlo_log_likelihood",
    "rolling_log_likelihood",
]
