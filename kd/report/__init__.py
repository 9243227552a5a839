"""A study's results for people: ``python -m kd.report DIR`` makes one HTML page and the same tables as Markdown.

It reads the folder that `kd.study` fills and nothing else, trains nothing, and writes its own files only. What a
contrast shows is said by rule (`kd.report.statistics.verdict`), alike for what was hoped for and for what was not.
"""
