"""How tests have XLA compile: the same programs in a third of the time, which is most of what the suite does.

Without LLVM's optimisations, and with the older code for fusions, a quarter of the instructions. AVX has no fused multiply-add,
into which that code turns a mean and a difference: two equal loads would then differ by a rounding.
"""

QUICKLY = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_max_isa=AVX"
