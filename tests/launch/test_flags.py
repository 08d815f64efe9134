"""The platforms' flags are known to the compilers: an unknown one ends a program."""

import os
import shlex
import subprocess
import sys

import pytest

from tests.launch.scripts import dry

TPU = """
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
devices = np.array(topologies.get_topology_desc("v5p:2x2x1", platform="tpu").devices).reshape(-1)
split = NamedSharding(Mesh(devices, ("x",)), P("x"))
a = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16, sharding=split)
compiled = jax.jit(lambda a, b: a @ b, out_shardings=split).lower(a, a).compile()
print("compiled", len(devices), "all-gather" in compiled.as_text())
"""


def python(text, **variables):
    environment = {"PATH": os.environ["PATH"], "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    done = subprocess.run([sys.executable, "-c", text], env=environment | variables, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def variable_of(script, **variables):
    """The NAME=VALUE that the script gives to `env` first."""
    words = shlex.split(dry(script, **variables))
    return words[words.index("env") + 1].split("=", 1)


# XLA reads flags for all platforms on each.
@pytest.mark.parametrize(("platform", "name"), [("gpu", "XLA_FLAGS"), ("cpu", "JAX_CPU_COLLECTIVES_IMPLEMENTATION")])
def test_xla_knows_the_flags(platform, name):
    found, value = variable_of("local.sh", PLATFORM=platform)
    assert found == name
    assert python("import jax; print(len(jax.devices()))", **{name: value})[:2] == (0, "1\n")
    code, _, errors = python("import jax; print(len(jax.devices()))", **{name: f"{value} --xla_gpu_none=1"})
    assert code != 0
    assert "none" in errors


def test_libtpu_knows_the_flags(tmp_path):
    pytest.importorskip("libtpu", reason="the tpu extra")
    curl = tmp_path / "curl"
    curl.write_text("#!/bin/sh\ncase $* in *-endpoints) echo a:b:c ;; *) echo 0 ;; esac\n")
    curl.chmod(0o755)
    name, value = variable_of("tpu_host.sh", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert name == "LIBTPU_INIT_ARGS"
    alone = {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # no TPU is asked for, so none need be kept from others
    code, output, errors = python(TPU, **{name: value}, **alone)
    assert (code, output) == (0, "compiled 4 True\n"), errors
    code, _, errors = python(TPU, **{name: f"{value} --xla_tpu_none=true"}, **alone)
    assert code != 0
    assert "xla_tpu_none" in errors
