"""A small fuzzer that is guided by coverage: `python -m tests.fuzz header --executions 100000`.

Why our own: the parsers under test are Python that reads JSON and YAML, where mutations of the tree get further than
those of bytes, and no compiled instrumentation is needed to see which lines an input reaches.
"""
