"""Kernels as CUDA C++ text, compiled by NVRTC without a toolkit, where Triton has no words; and cuSPARSELt."""
