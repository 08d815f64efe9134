# shellcheck shell=sh
# The compiler's flags for each platform, in this one place. Sourced by the other scripts; it sets FLAGS_NAME and FLAGS_VALUE.
# Flags of your own, in the same variable, come last and so win. XLA ends a program at a flag that it does not know: all of these
# are known to jaxlib 0.10.2 and libtpu 0.0.42.1, which tests/launch/test_flags.py checks. None has been timed on Lumina yet.
#
# gpu: XLA_FLAGS
#   xla_gpu_enable_latency_hiding_scheduler  starts collectives early and waits late. docs.jax.dev "GPU performance tips"; the one
#                                            flag that NVIDIA's JAX images set
#   xla_gpu_enable_pipelined_all_gather      a layer's weights are gathered while the layer before computes, and
#   xla_gpu_enable_pipelined_reduce_scatter  its gradients are scattered while the next does: layers are scanned, as these need;
#   xla_gpu_enable_while_loop_double_buffering  for that, two layers' gathered weights are in memory at once. NVIDIA JAX-Toolbox,
#                                            "GPU performance", on FSDP
# tpu: LIBTPU_INIT_ARGS. MaxText, benchmarks/xla_flags_library.py
#   xla_enable_async_all_gather, xla_tpu_enable_async_collective_fusion, ..._fuse_all_gather, ..._multiple_steps,
#   xla_tpu_overlap_compute_collective_tc    gathers run beside what computes (there CF_FOR_ALL_GATHER: "enabled by default but
#                                            lets make sure")
#   xla_tpu_enable_data_parallel_all_reduce_opt, xla_tpu_data_parallel_opt_different_sized_ops
#                                            the all-reduce over `data`, between slices (there DATA_PARALLEL_OVERLAP)
# cpu: nothing for the compiler; gloo is what processes talk with (docs.jax.dev, jax_cpu_collectives_implementation)
# shellcheck disable=SC2034 # used where this is sourced
case $PLATFORM in
    gpu)
        FLAGS_NAME=XLA_FLAGS
        FLAGS_VALUE='--xla_gpu_enable_latency_hiding_scheduler=true --xla_gpu_enable_pipelined_all_gather=true'
        FLAGS_VALUE="$FLAGS_VALUE --xla_gpu_enable_pipelined_reduce_scatter=true --xla_gpu_enable_while_loop_double_buffering=true"
        FLAGS_VALUE=$FLAGS_VALUE${XLA_FLAGS:+ $XLA_FLAGS}
        ;;
    tpu)
        FLAGS_NAME=LIBTPU_INIT_ARGS
        FLAGS_VALUE='--xla_enable_async_all_gather=true --xla_tpu_enable_async_collective_fusion=true'
        FLAGS_VALUE="$FLAGS_VALUE --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true"
        FLAGS_VALUE="$FLAGS_VALUE --xla_tpu_enable_async_collective_fusion_multiple_steps=true"
        FLAGS_VALUE="$FLAGS_VALUE --xla_tpu_overlap_compute_collective_tc=true"
        FLAGS_VALUE="$FLAGS_VALUE --xla_tpu_enable_data_parallel_all_reduce_opt=true"
        FLAGS_VALUE="$FLAGS_VALUE --xla_tpu_data_parallel_opt_different_sized_ops=true"
        FLAGS_VALUE=$FLAGS_VALUE${LIBTPU_INIT_ARGS:+ $LIBTPU_INIT_ARGS}
        ;;
    cpu)
        FLAGS_NAME=JAX_CPU_COLLECTIVES_IMPLEMENTATION
        FLAGS_VALUE=gloo
        ;;
    *) refuse PLATFORM "$PLATFORM" 'one of: cpu gpu tpu' ;;
esac
