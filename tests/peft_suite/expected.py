"""What is expected not to pass: by reason, the message that the error must have, and the cases.

A case is given by the name of its function, or by a pattern for its whole name, which has a `*`. An entry that meets
no case is an error of its own: the lists stay as short as they can be. Groups of a message fill the braces of its
reason.
"""

from __future__ import annotations

Lists = dict[str, tuple[str, list[str]]]


def names(text: str) -> list[str]:
    return text.split()


# What the library refuses on purpose: docs/troubleshooting.md has every message.
REFUSALS: Lists = {
    "no adapter takes a module of type {}": (
        r"cannot be adapted: it is of type (\w+)",
        [
            "*[[]*Conv1d*",
            "*[[]*Conv2d*",
            "*[[]*Conv3d*",
            "*[[]*MHA*",
            "*Embedding + transformers Conv1D [23] LoRA*",
            *names("""
        test_active_adapters_large test_adapter_model_type_large
        test_alt_weight_tying_tied_model_target_modules_lora test_available_adapters_large
        test_base_model_type_large test_custom_lora_layer_issues_warning test_custom_lora_layer_used
        test_devices_all_cpu_large test_enabled_irregular test_enabled_large
        test_ensure_weight_tying_not_tying_when_model_config_tie_false_target_modules
        test_error_raised_if_rank_not_divisible_by_groups test_hotswap_works_different_ranks_alphas_conv2d
        test_hotswap_works_different_ranks_conv2d_groups test_layer_names_large
        test_load_resized_embedding_ignore_mismatched_sizes test_lora_conv2d_default test_lora_conv2d_false
        test_lora_conv2d_init_gaussian test_lora_conv2d_with_bias_when_base_layer_has_no_bias_warns
        test_lora_embed_scale_is_applied test_lora_embed_scale_is_applied_mixed_batch
        test_lora_embedding_default test_lora_embedding_false test_lora_embedding_gaussian
        test_lora_intruders_embedding test_lora_plus_embedding_lr test_lora_plus_helper_sucess
        test_lora_plus_optimizer_sucess test_lora_rslora_scaling
        test_lora_safe_merge_does_not_mutate_base_layer_on_non_finite_bias test_lora_scaling_default
        test_lora_with_bias_argument test_lora_with_bias_embedding_raises test_lora_with_bias_extra_params
        test_lorafa_init_embedding_target_module test_merge_adapters_large
        test_merge_and_unload_fixes_tie_word_embeddings_config
        test_merge_with_lora_bias_when_base_layer_has_no_bias_warns_and_raises test_mha_exposes_attributes
        test_mha_gradients_set_correctly test_mha_load_init_model_first test_mha_merge_masks_method
        test_mha_with_separate_qkv_embed_raises test_mixed_adapter_batches_lora_conv1d_emb
        test_mixed_adapter_batches_lora_conv1d_emb_multiple_modules_to_save
        test_mixed_adapter_batches_lora_conv2d test_mixed_adapter_batches_mha_raises
        test_model_active_adapters_irregular test_model_active_adapters_large
        test_model_available_adapters_large test_model_devices_all_cpu_large test_model_disabled_large
        test_model_enabled_irregular test_model_enabled_large test_model_merged_adapters_irregular
        test_model_merged_adapters_large test_model_quantization_backend_large
        test_model_requires_grad_model_irregular test_model_requires_grad_model_large
        test_model_target_parameters test_model_target_parameters_and_target_modules
        test_model_with_injected_layers test_module_type_large test_nb_params_large
        test_num_adapter_layers_large test_peft_types_large
        test_plain_lora_and_dora_adapters_merge_matches_forward
        test_prepare_model_for_compiled_hotswap_conv2d_conserves_requires_grad
        test_prepare_model_for_compiled_hotswap_conv2d_groups_rank_not_divisible_raises
        test_prepare_model_for_compiled_hotswap_conv2d_groups_rank_padding_works
        test_prepare_model_for_compiled_hotswap_conv2d_lora_bias
        test_prepare_model_for_compiled_hotswap_conv2d_rank_padding_works
        test_prepare_model_for_compiled_hotswap_does_not_change_output_conv2d test_quantization_backend_large
        test_repr_lora_conv2d test_repr_lora_embedding test_requires_grad_irregular test_requires_grad_large
        test_requires_grad_lora_conv2d test_requires_grad_lora_emb_conv1d
        test_save_pretrained_targeting_lora_to_embedding_layer
        test_save_pretrained_targeting_lora_to_embedding_layer_non_transformers test_saving_and_loading
        test_self_targeting_is_ignored test_target_layer_without_in_features_out_features
        test_target_parameters test_target_parameters_and_target_modules test_targeting_trainable_tokens_raises
        test_trainable_token_indices_targets_lora_layer_raises test_training_works
        test_unload_adapter_multihead_attention test_weight_tying_enc_dec_target_modules_lora
        test_weight_tying_tied_model_target_modules_lora test_weight_tying_tied_model_target_modules_str_lora
        """),
        ],
    ),
    "experts get loose tokens": (
        r"cannot be adapted: it belongs to an expert",
        names("""
        test_layers_to_transform_filters_by_layer_not_expert_index
        """),
    ),
    "an update that depends on the input cannot be merged": (
        r"A Queryable LoRA adapter cannot be merged",
        names("""
        test_delete_merged_adapter_only_rejects_the_merged_one
        test_delete_merged_adapter_raises_without_mutation test_disable_adapters_with_merging
        test_forward_bfloat16 test_forward_bfloat16_no_autocast test_forward_float16
        test_forward_float16_no_autocast test_hotswap_allowed_when_other_adapter_merged
        test_hotswap_raises_when_target_adapter_merged test_load_merged_and_unmerged_same_weights
        test_lora_safe_merge_does_not_mutate_base_layer_on_non_finite_bias test_merge_adapters_small
        test_merge_layers test_merge_layers_fp16 test_merge_layers_is_deterministic_in_train_mode
        test_merge_layers_is_idempotent test_merge_layers_multi test_merge_layers_nan
        test_merge_with_lora_bias_when_base_layer_has_no_bias_warns_and_raises test_merging_adapter
        test_mixed_adapter_batches_merged_raises test_model_merged_adapters_small
        test_multiple_active_adapters_merge_and_unmerge test_safe_merge test_safe_merge_with_adapter
        test_scaled_embedding_with_lora test_sequential_merge_matches_batch_merge
        test_unload_with_inactive_modules_to_save test_unmerge_after_sequential_merge_restores_base
        test_weight_tying_applied_when_model_is_tied
        test_weight_tying_applied_when_model_is_tied_encoder_decoder
        """),
    ),
    "adapters cannot be combined into one": (
        r"adapters cannot be combined into one",
        names("""
        test_add_weighted_adapter_negative_weight_negates_adapter
        test_add_weighted_adapter_subtraction_with_negative_weights
        test_add_weighted_adapter_with_different_scaling test_multiple_active_adapters_forward
        test_multiple_adapters_mixed_modules_to_save_merging_adapters
        test_multiple_adapters_same_modules_to_save_merging_adapters_raises
        test_weighted_combination_of_adapters
        """),
    ),
    "reentrant gradient checkpointing": (
        r"does not support reentrant gradient checkpointing",
        names("""
        test_training_decoders_gradient_checkpointing test_training_encoder_decoders_gradient_checkpointing
        test_training_gradient_checkpointing
        """),
    ),
    "the configuration refuses `{}`": (
        r"QueryableLoraConfig does not support `(\w+)` ",
        names("""
        test_add_weighted_adapter_cat_with_rank_pattern
        test_adding_multiple_adapters_with_different_target_parameters_raises
        test_adding_multiple_adapters_with_same_target_parameters_works test_bdlora_both_patterns_raises
        test_bdlora_feature_size_non_divisible_by_blocksize_raises test_bdlora_strict_matching_raises
        test_dora_caching_conv test_dora_caching_embedding test_dora_caching_linear
        test_dora_save_and_load_remapping test_inject_from_state_dict_transformers_target_parameters_fails
        test_inject_from_state_dict_transformers_target_parameters_raises test_kasa_config_invalid_type_raises
        test_kasa_mixing_with_non_kasa_adapter_raises
        test_loading_multiple_adapters_with_target_parameters_works test_lora_config_pissa_olora_warns
        test_lora_default_scaling_pattern test_lora_embed_scale_is_applied test_lora_layer_replication
        test_lora_pissa_conversion_same_output_after_loading_with_rank_pattern test_lora_rslora_scaling_pattern
        test_lora_use_dora_linear test_lora_use_dora_linear_init_false
        test_lora_use_dora_with_megatron_core_raises test_lora_with_bias_incompatible_arguments
        test_lorafa_respects_layer_specific_scaling_patterns test_matched_pattern_keys_do_not_warn
        test_mha_with_dora_raises test_misconfigured_second_adapter_warns_on_add_adapter
        test_mixed_adapter_batches_lora_with_dora_but_dora_not_included_works
        test_mixed_adapter_batches_lora_with_dora_raises test_mixin_adds_variational_loss_to_trainer
        test_monteclora_variational_loss_computation test_monteclora_variational_loss_computation_eval_mode
        test_multiple_active_dora_adapters_merge_matches_forward
        test_multiple_active_dora_adapters_safe_and_unsafe_merge_agree test_multirank test_multirank_2
        test_nested_config_survives_save_load_roundtrip
        test_olora_conversion_same_output_after_loading_with_rank_pattern
        test_olora_rank_pattern_and_rslora_raises test_one_targeted_parameters_list
        test_partially_matched_pattern_warns_for_unmatched_keys_only test_pissa_rank_pattern_and_rslora_raises
        test_plain_lora_and_dora_adapters_merge_matches_forward
        test_prepare_model_for_compiled_hotswap_lower_rank_padding_raises
        test_prepare_model_for_compiled_hotswap_scalings_update_config
        test_prepare_model_for_compiled_hotswap_with_rank_pattern test_rank_alpha_pattern
        test_rank_alpha_pattern_override test_rank_and_alpha_pattern_no_matching_keys
        test_rank_pattern_target_all test_rank_pattern_target_inner test_rank_pattern_target_inner_with_caret
        test_rank_pattern_target_middle test_rank_pattern_target_middle_inner
        test_rank_pattern_target_middle_inner_different_ranks test_rank_pattern_target_outer
        test_rank_pattern_target_outer_inner test_rank_pattern_target_outer_inner_with_caret
        test_rank_pattern_target_outer_middle test_rank_pattern_target_outer_middle_inner_with_caret
        test_rank_pattern_target_outer_middle_inner_with_caret_dict_order test_realistic_example
        test_repr_lora_paramwrapper test_scaling_multiple_times test_scaling_rank_pattern_alpha_pattern
        test_target_module_and_target_parameter_on_same_layer test_target_parameters_wrong_type_raises
        test_two_targeted_parameters_list test_unmatched_rank_pattern_key_warns
        test_valid_no_target_module_nor_target_parameter_match_raises
        test_valid_target_modules_invalid_target_parameters_warns
        test_valid_target_parameters_invalid_target_modules_warns
        """),
    ),
    "the configuration refuses this initialisation": (
        r"does not support `init_lora_weights=|`init_lora_weights` must be one of",
        names("""
        test_lora_config_pissa_olora_warns test_lora_corda_alpha_pattern_and_rslora_raises
        test_lora_corda_conv1d_gpt2 test_lora_corda_conversion_same_output_after_loading
        test_lora_corda_conversion_same_output_after_loading_with_alpha_pattern
        test_lora_corda_conversion_same_output_after_loading_with_rank_pattern
        test_lora_corda_conversion_same_output_after_loading_with_rslora test_lora_corda_hook_unregister
        test_lora_corda_hooked_model_linear_init_default test_lora_corda_linear_init_default
        test_lora_corda_linear_init_default_with_rank_pattern test_lora_corda_no_redundant_fields
        test_lora_corda_rank_pattern_and_rslora_raises test_lora_corda_sample_count
        test_lora_mica_embedding_init_default test_lora_mica_freezes_B
        test_lora_mica_freezes_B_when_switching_adapters test_lora_mica_linear_init_default
        test_lora_mica_rank_too_large_raises test_lora_mica_uses_minor_components
        test_lora_olora_linear_init_default test_lora_pissa_linear_init_default
        test_lora_with_bias_incompatible_arguments
        """),
    ),
    "the configuration refuses `eva_config.rho` other than 1": (
        r"`eva_config\.rho` must be 1",
        names("""
        test_lora_config_raises_warning_with_eva_init_but_not_eva_config
        """),
    ),
    "an initialisation that moves base weights beside another adapter": (
        r"Of several adapters, none may be made with",
        names("""
        test_load_pissa_olora_with_other_adapter_warns
        """),
    ),
    "a checkpoint that lacks tensors, of which PEFT only warns": (
        r"The checkpoint does not fit adapter",
        names("""
        test_from_pretrained_missing_keys_warning
        """),
    ),
}

# What looks at something that LoRA alone has, or that PEFT keeps to LoRA.
NOT_APPLICABLE: Lists = {
    "PEFT injects no method that has a shared state": (
        r"`inject_adapter_in_model` does not support PeftType.QUERYABLE_LORA",
        names("""
        test_get_peft_model_state_dict test_inject_adapter_in_model test_inject_adapter_low_cpu_mem_usage_works
        test_inject_from_state_dict_and_from_config_target_same_layers test_inject_from_state_dict_extra_keys_warning
        test_inject_from_state_dict_low_cpu_mem_usage test_inject_from_state_dict_missing_keys_warning
        test_modules_to_save test_no_warning_without_naming_conflict_save_and_load test_transformers_pipeline
        test_warning_naming_conflict_save_and_load
        """),
    ),
    "PeftMixedModel takes a fixed list of methods": (
        r"not compatible with the `PeftMixedModel`|not supported for mixed models",
        names("""
        test_add_adapter_rejects_duplicate_name_without_mutation
        test_mixed_model_from_pretrained_low_cpu_mem_usage_works test_mixed_model_raises
        test_no_infinite_recursion
        """),
    ),
    "PEFT swaps and pads LoRA only": (
        r"Hotswapping only supports LORA|Incompatible PEFT types found: QUERYABLE_LORA|assert 8 == 13",
        names("""
        test_hotswap_different_peft_types_raises test_hotswap_extra_key_raises test_hotswap_missing_key_works
        test_hotswap_works test_hotswap_works_different_ranks_alphas
        test_prepare_model_for_compiled_hotswap_lora_bias
        test_prepare_model_for_compiled_hotswap_rank_padding_works
        """),
    ),
    "PEFT converts `pissa` and `olora` to LoRA for LoRA only": (
        r"`path_initial_model_for_weight_conversion` to `save_pretrained` is not supported",
        names("""
        test_lora_pissa_conversion_same_output_after_loading
        test_lora_pissa_conversion_same_output_after_loading_with_alpha_pattern
        test_lora_pissa_conversion_same_output_after_loading_with_rslora
        test_olora_conversion_same_output_after_loading
        test_olora_conversion_same_output_after_loading_with_alpha_pattern
        test_olora_conversion_same_output_after_loading_with_rslora
        """),
    ),
    "it trains at a rate at which this method diverges on inputs up to 90": (
        r"has NaN or infinite values",
        ["*::test_parameters_after_loading_model[[]Vanilla MLP*"],
    ),
    "it lists the tensors of LoRA, which has no gate and no router": (
        r"Expected \('base_model|assert 1985 == 160|queryable_lora_(gate|router)",
        names("""
        test_get_peft_model_state_dict_removes_adapter_name_when_same_as_module_name test_nb_params_small
        test_prefixes_select_correct_state_dict_keys test_requires_grad_follows_inference_mode_modules_to_save
        test_requires_grad_follows_inference_mode_trainable_token_indices
        test_requires_grad_lora_different_targets test_requires_grad_lora_same_targets
        test_requires_grad_modules_to_save_default test_requires_grad_modules_to_save_disabling
        test_requires_grad_modules_to_save_multiple_adapters
        """),
    ),
    "it names LoRA's classes, type or tag": (
        r"lora\.Linear|LoraModel|lora\.layer\.Linear|'LORA'|issubset|custom_models|not using LoRA",
        names("""
        test_adapter_model_type_small test_lora_intruders_linear test_lora_intruders_linear_bf16_no_autocast
        test_model_card_has_expected_tags test_model_status_with_modules_to_save
        test_model_status_with_trainable_tokens test_module_type_small
        test_modules_to_save_targets_lora_layer_raises test_override_lora_linear test_peft_types_small
        test_repr_lora_conv1d test_repr_lora_linear
        """),
    ),
    "the library says it in other words": (
        r"`adapter_names` (has|is for|names)",
        names("""
        test_mixed_adapter_batches_length_mismatch_raises
        test_mixed_adapter_batches_lora_wrong_adapter_name_raises
        test_mixed_adapter_batches_training_mode_raises
        """),
    ),
    "transformers 5.24 asks for PEFT 0.22, of LoRA too": (
        r"The version of PEFT you are using is not compatible",
        names("""
        test_inject_from_state_dict_compiled_model test_inject_from_state_dict_transformers
        test_inject_from_state_dict_transformers_irregular_targets
        """),
    ),
    "LoRA-FA's optimizer takes every tensor called lora for A or B": (
        r"'NoneType' and 'Tensor'",
        names("""
        test_LoraFAOptimizer_step test_lorafa_weight_decay_decoupled_update_lora_b
        test_lorafa_weight_decay_decoupled_update_non_lora_params
        """),
    ),
    "PEFT checks the files of LoRA only": (
        r"DID NOT WARN",
        names("""
        test_save_pretrained_warns_for_unsharded_state_dict
        """),
    ),
    "it ties an adapter of the head to one of the embedding, which takes none": (
        r"Embedding\(1000, 1000\), LoraLayer",
        names("""
        test_weight_tying_enc_dec_target_modules_lora test_weight_tying_tied_model_target_modules_lora
        test_weight_tying_tied_model_target_modules_str_lora
        """),
    ),
}

OFFLINE = (
    r"LocalEntryNotFoundError|OfflineModeIsEnabled|Can't find 'adapter_config.json' at|offline mode|HfHubHTTPError"
)
HUB: Lists = {
    "a model, data set or adapter that is not made here": (OFFLINE, ["*"]),
    "diffusers' models": (
        r"'StableDiffusionPipeline' has no attribute",
        ["test_diffusers_pipeline", "test_inject_from_state_dict_stable_diffusion"],
    ),
    "the vocabulary of the base model on the Hub": (r"assert False", ["test_save_pretrained_auto"]),
}

EXPECTED = {"expected refusal": REFUSALS, "not applicable": NOT_APPLICABLE, "needs the Hub": HUB}
