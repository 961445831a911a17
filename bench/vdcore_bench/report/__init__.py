"""The report kit, and what ``vdcore bench`` makes with it.

The kit knows of no benchmark: :mod:`.table` (a table for a terminal, a page or Markdown), :mod:`.page` (an HTML page
that opens offline), :mod:`.plot` (plots in one style) and :mod:`.terminal` (tables and progress). The rest makes tables
and pictures of rows.
"""
