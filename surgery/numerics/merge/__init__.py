"""The kernels of all merge methods, one module a family, and the arithmetic that families share.

Arithmetic and rounding are mergekit's, step by step and in the working dtype; the bits are held to
its own code, on one thread. What is different is written where it is: ties at a threshold, draws of
random masks, sums over more than WHOLE elements.
"""
