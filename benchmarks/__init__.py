"""``make bench``: every engine on the same weights, in processes of their own that take turns.

In: the grid of ``benchmarks.cases``. Out: a table, ``bench_report/report.json`` and ``bench_report/speedup.png``.
"""
