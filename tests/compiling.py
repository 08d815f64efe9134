"""How tests have XLA compile: a step in a third of the time, which is most of what the suite does.

Without LLVM's optimisations, and with XLA's older code for fusions, which makes far fewer instructions. That code joins a
product and a difference where the processor can: the mean of equal loads, a sum times 1/5, would then differ from them. AVX,
unlike what came after it, cannot; only an x86 processor can be told so. A jaxlib that has dropped a flag says its name.
"""

import platform

QUICKLY = "--xla_backend_optimization_level=0"
if platform.machine() in ("x86_64", "AMD64"):
    QUICKLY += " --xla_cpu_use_fusion_emitters=false --xla_cpu_max_isa=AVX"
