"""The credit debugger: `rllib report RUN`.  docs/report.md is its guide.

`build_report` makes one HTML file that needs nothing else; `print_report` prints the main things.
"""

from rllib_gtpo.report.command import build_report, print_report

__all__ = ["build_report", "print_report"]
