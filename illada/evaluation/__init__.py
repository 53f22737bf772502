"""Evaluation: scores of given text under a masked diffusion model, and the adapter to lm-eval.

The scoring functions need nothing beyond the package's own dependencies; `illada.evaluation.harness` needs `lm_eval`.
"""

from .confidence import ConfidenceScore, confidence_score, is_greedy
from .likelihood import (
    LogLikelihood,
    RollingLogLikelihood,
    monte_carlo_log_likelihood,
    rolling_log_likelihood,
)

__all__ = [
    "ConfidenceScore",
    "LogLikelihood",
    "RollingLogLikelihood",
    "confidence_score",
    "is_greedy",
    "monte_carlo_log_likelihood",
    "rolling_log_likelihood",
]
