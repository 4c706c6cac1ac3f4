"""Benchmarks: each fast path beside a plain one, equal in result, timed in turns in one run (`nox -s bench`)."""
