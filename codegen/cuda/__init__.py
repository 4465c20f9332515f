"""Kernels as CUDA C++ text, compiled by NVRTC without a toolkit: what Triton has no words for. And cuSPARSELt beside."""
