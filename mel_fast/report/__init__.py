"""Run directories -> `report.html`: curves, meta-experiences and rollouts in one file that opens offline.

python -m mel_fast.report runs/latest
"""

from mel_fast.report.build import write_report
from mel_fast.report.summary import Summary, summarise
from mel_fast.report.thin import Limits

__all__ = ["Limits", "Summary", "summarise", "write_report"]
