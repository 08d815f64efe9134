"""Compiling is most of what these tests do; some of it is for several devices."""

import os

# XLA compiles the same program without LLVM's optimisations, in half the time. Read when JAX first looks for devices, and by
# subprocesses. The processor counts as eight devices, of which a test uses one unless it asks for more.
flags = os.environ.get("XLA_FLAGS", "--xla_backend_optimization_level=0")
if "device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8"
