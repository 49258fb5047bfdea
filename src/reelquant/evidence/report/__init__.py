"""The report a person looks at: one HTML file with the clips side by side, figures against their floors, charts and the proof.

``html`` (the page), ``panels`` (clips as videos inside of it), ``charts`` (SVG), ``markdown`` (sentences, and a summary for a pull
request). What goes in is plain data, the content of ``report.json``: ``docs/report.md`` has its schema.
"""

from reelquant.evidence.report.html import render, write
from reelquant.evidence.report.markdown import summary
from reelquant.evidence.report.panels import Panel

__all__ = ["Panel", "render", "summary", "write"]
