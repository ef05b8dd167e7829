"""Triton kernels, one op a file; imported only when a CUDA tensor comes, so that `import stars` needs no Triton."""
