"""Files of other tools, as those write them."""

from __future__ import annotations

import textwrap

# As llm-compressor 0.14 writes them, but for the Python objects in it, which are tested below.
GPTQ = """
    default_stage:
      default_modifiers:
        GPTQModifier:
          targets: [Linear]
          ignore: [lm_head]
          scheme: W4A16
          bypass_divisibility_checks: false
          requires_calibration_data: true
          block_size: 128
          dampening_frac: 0.01
          actorder: static
          batched_quantization: auto
"""
AWQ = """
    default_stage:
      default_modifiers:
        AWQModifier:
          requires_calibration_data: true
          duo_scaling: both
          n_grid: 20
          mappings:
          - {smooth_layer: 're:.*input_layernorm$', balance_layers: ['re:.*q_proj$', 're:.*k_proj$', 're:.*v_proj$']}
        QuantizationModifier:
          targets: [Linear]
          ignore: [lm_head]
          scheme: W4A16_ASYM
          requires_calibration_data: false
"""
# As its older versions had it: one modifier that moves factors and quantizes.
OLD_AWQ = """
    default_stage:
      default_modifiers:
        AWQModifier:
          config_groups:
            group_0:
              targets: [Linear]
              weights: {num_bits: 4, type: int, symmetric: false, group_size: 64, strategy: group, observer: mse, dynamic: false}
              input_activations: null
              output_activations: null
          targets: [Linear]
          ignore: [lm_head]
          duo_scaling: true
"""
SMOOTH = """
    quant_stage:
      run_type: oneshot
      quant_modifiers:
        SmoothQuantModifier:
          smoothing_strength: 0.8
          mappings:
          - - ['re:.*q_proj', 're:.*k_proj', 're:.*v_proj']
            - re:.*input_layernorm
        GPTQModifier:
          sequential_update: true
          dampening_frac: 0.1
          ignore: [lm_head]
          config_groups:
            group_0:
              targets: [Linear]
              weights: {num_bits: 8, type: int, symmetric: true, strategy: channel, observer: mse}
              input_activations: {num_bits: 8, type: int, symmetric: true, strategy: token, dynamic: true, observer: memoryless}
"""
FP8_CACHE = """
    default_stage:
      default_modifiers:
        QuantizationModifier:
          targets: [Linear]
          ignore: [lm_head]
          scheme: FP8_DYNAMIC
          kv_cache_scheme: {num_bits: 8, type: float, symmetric: true, group_size: null, strategy: tensor, dynamic: false, observer_kwargs: {}}
"""

# A Truss config.yaml.
CONFIG = textwrap.dedent("""\
    model_name: Llama 3.1 8B Instruct
    resources: {accelerator: H100:1, use_gpu: true}
    secrets: {hf_access_token: null}
    trt_llm:
      inference_stack: v1
      build:
        base_model: decoder
        checkpoint_repository:
          source: HF
          repo: meta-llama/Llama-3.1-8B-Instruct
          revision: 0e9e39f249a16976918f6564b8830bc894c89659
        max_seq_len: 8192
        tensor_parallel_count: 1
        quantization_type: fp8_kv
        quantization_config:
          calib_size: 512
          calib_dataset: baseten/quant_calibration_dataset_v1
          calib_max_seq_length: 1024
        plugin_configuration: {paged_kv_cache: true, use_paged_context_fmha: true}
      runtime:
        kv_cache_free_gpu_mem_fraction: 0.9
    """)
