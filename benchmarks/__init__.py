"""The instruments: kernels and whole models beside their peers, in one process and one run.

``python -m benchmarks`` measures, prints, saves and draws; ``docs/performance.md`` explains.
"""
