"""GPU kernels against the best dense product of the same run: ``python -m benchmarks.gpu``, or ``make gpu-bench``."""
