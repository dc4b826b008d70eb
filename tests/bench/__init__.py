"""How fast, and in how much memory: `python -m tests.bench kernel|convert|merge|fold|many|tensor`.

Plain scripts that print tables; nothing here asserts a time. Machines are noisy, so what is
compared runs in turn, and medians and ratios are given beside each round.
"""
