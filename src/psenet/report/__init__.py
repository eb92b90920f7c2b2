"""The report of a run: one self-contained HTML file and the same facts as Markdown, in English and Japanese.

facts -> sections of blocks -> HTML and Markdown; nothing is computed twice.
"""

from psenet.report.money import ReturnFigures
from psenet.report.write import report_name, write_report

__all__ = ["ReturnFigures", "report_name", "write_report"]
