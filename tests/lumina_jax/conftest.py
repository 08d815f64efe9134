"""Compiling is most of what these tests do; some of it is for several devices."""

import os

import pytest

from tests.compiling import QUICKLY

# Read when JAX first looks for devices, and by subprocesses. The processor counts as eight devices, of which a test uses one
# unless it asks for more.
flags = os.environ.get("XLA_FLAGS", QUICKLY)
if "device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8"


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """All runs of a file, in this process and in others, share what they compile; none measures the machine."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    import lumina_jax.device

    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(value))
        compilation_cache.reset_cache()
        patch.setattr(lumina_jax.device, "matmul_peak", lambda dtype: 1e12)
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
