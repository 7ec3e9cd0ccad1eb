"""What `rllib evaluate` does: results of single tasks as Parquet, and paired comparisons of two.

docs/evaluation.md describes the columns and the test.
"""

from rllib_gtpo.evaluations.comparison import Comparison, compare
from rllib_gtpo.evaluations.results import Results

__all__ = ["Comparison", "Results", "compare"]
