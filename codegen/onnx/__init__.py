"""Kernels of CPUs as operators of ONNX Runtime: the same text, in a library that a session registers."""
