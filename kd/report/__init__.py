"""Reports: ``python -m kd.report`` makes one HTML page of a study or a run, and the same tables as Markdown.

It trains nothing and only reads the study or run directory. `kd.report.statistics.verdict` words every contrast by the
same rule, whatever the study hoped for.
"""
