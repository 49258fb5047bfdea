"""The report: one HTML file with clips side by side, figures beside the noise floor, charts and layers. Measuring does not belong here.

``data`` reads the content of ``report.json`` into types; everything else takes those. ``html`` is the page of one test:
``metric_table``, ``clip_cards``, ``plots`` (drawn by ``charts`` and ``cell_charts``), ``proof`` are its sections, ``panels`` makes the
videos. ``several`` is the page of several tests, ``several_table`` their table; ``page`` holds what both pages share.
``markdown`` is the summary for a pull request, ``sentences``, ``glossary`` and ``numbers`` the words that all share. Templates
(``*.jinja``), ``report.css``, ``report.js`` and ``blind.js`` (the blind comparison) lie beside them.
``docs/report.md`` has the schema.
"""

from reelquant.evidence.report.html import render, write
from reelquant.evidence.report.markdown import summary
from reelquant.evidence.report.panels import Panel

__all__ = ["Panel", "render", "summary", "write"]
