"""Compiling is most of what these tests do."""

import os

# XLA compiles the same program without LLVM's optimisations, in half the time. Read when JAX first looks for devices, and by
# subprocesses.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
