"""What a toy of each architecture of transformers is made of: sizes by name, and the exceptions."""

from __future__ import annotations

from typing import Any

VOCABULARY = 99
RARE_ID = VOCABULARY - 1  # for the ids of masks, images, audio...: no input holds it

_NAMES_BY_SIZE: dict[int, str] = {
    0: "first_k_dense_replace num_dense_layers moe_layer_start_index",
    1: "n_shared_experts num_shared_experts topk_group n_group",
    2: """
        num_hidden_layers n_layer n_layers num_layers num_blocks max_window_layers
        encoder_layers decoder_layers num_encoder_layers num_decoder_layers speech_encoder_layers
        t2u_encoder_layers t2u_decoder_layers num_self_attends_per_block
        num_experts_per_tok moe_topk moe_k linear_num_key_heads num_codebooks n_groups
    """,
    3: "conv_kernel_size",
    4: """
        num_attention_heads num_key_value_heads n_head n_heads num_heads attention_heads
        encoder_attention_heads decoder_attention_heads num_encoder_attention_heads
        num_decoder_attention_heads num_cross_attention_heads num_self_attention_heads
        t2u_encoder_attention_heads t2u_decoder_attention_heads speech_encoder_attention_heads
        swa_num_attention_heads swa_num_key_value_heads linear_num_value_heads linear_num_heads
        mamba_n_heads n_mamba_heads mamba_num_heads index_n_heads index_topk num_random_blocks
        num_experts n_routed_experts num_local_experts moe_num_experts zero_expert_num
        expert_capacity
    """,
    8: """
        head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim d_kv d_head dim_head kv_channels
        swa_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim index_head_dim
        rotary_dim mamba_d_state state_size ssm_state_size num_mel_bins
    """,
    16: """
        kv_lora_rank q_lora_rank o_lora_rank adapter_rank laurel_rank embedding_size
        input_embedding_size output_embedding_size hidden_size_per_layer_input output_channels
        downsample_hidden_size attention_window chunk_size mamba_chunk_size mamba_head_dim
    """,
    32: """
        hidden_size d_model n_embd dim emb_dim embedding_dim encoder_hidden_size lang_embed_dim
        output_dim input_size prediction_head_size nemo_conv_channels ext_pw_out_channel
        depthwise_separable_out_channel
    """,
    48: """
        intermediate_size moe_intermediate_size shared_expert_intermediate_size
        shared_intermediate_size dense_intermediate_size shared_experts_intermediate_size
        moe_shared_expert_intermediate_size speech_encoder_intermediate_size intermediate_size_mlp
        encoder_ffn_dim decoder_ffn_dim t2u_encoder_ffn_dim t2u_decoder_ffn_dim ffn_dim d_ff dff
        d_inner dim_ff hidden_dim mlp_dim ffn_hidden_size expert_ffn_hidden_size
    """,
    64: """
        max_position_embeddings max_2d_position_embeddings max_encoder_position_embeddings
        max_decoder_position_embeddings t2u_max_position_embeddings n_positions n_ctx max_seq_len
        max_source_positions max_target_positions context_length max_pos_emb sliding_window
        prompt_mid_dim
    """,
    VOCABULARY: """
        vocab_size src_vocab_size tgt_vocab_size vocab_size_per_layer_input unpadded_vocab_size
        entity_vocab_size shape_vocab_size pronunciation_vocab_size char_vocab_size
        audio_vocab_size t2u_vocab_size unit_hifi_gan_vocab_size
    """,
}
TOY_VALUES = {name: size for size, names in _NAMES_BY_SIZE.items() for name in names.split()} | {
    "pad_token_id": 1,
    "bos_token_id": 2,
    "decoder_start_token_id": 2,
    "eos_token_id": 3,
    "sep_token_id": 3,
}
# Where these have no plain number as their default, the class derives them from other attributes,
# not always in step with the toy sizes.
ALWAYS = ("head_dim", "num_key_value_heads", "eos_token_id")

_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
OVERRIDES: dict[str, dict[str, Any]] = {
    "BailingHybridConfig": _HYBRID,
    "BambaConfig": {"attn_layer_indices": [1]},
    "BltConfig": {"use_cache": False, "encoder_hash_byte_group_vocab": 64},
    "BltLocalDecoderConfig": {"hidden_size_global": 32},
    "BltLocalEncoderConfig": {"hidden_size_global": 32},
    "CohereCompassTextConfig": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "DbrxConfig": {
        "attn_config": {"kv_n_heads": 4, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48},
    },
    "DeepseekV2Config": {"num_experts_per_tok": 2},
    "Dots1Config": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "EsmConfig": {"vocab_size": VOCABULARY, "pad_token_id": 1, "mask_token_id": RARE_ID},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "Gemma3nTextConfig": {"num_kv_shared_layers": 0},
    "Gemma4UnifiedTextConfig": {"num_kv_shared_layers": 0},
    "GraniteMoeHybridConfig": _HYBRID,
    "GraniteSpeechEncoderConfig": {"context_size": 16},
    "GraniteSpeechPlusEncoderConfig": {"context_size": 16},
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "KimiLinearConfig": _HYBRID,
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "Lfm3Config": {"layer_types": ["conv", "full_attention"]},
    "Mamba2Config": {"num_heads": 8},
    "MiMoV2FlashConfig": {"num_key_value_heads": 2},
    "NeoMMEConfig": {"head_dim": 16},
    "Nemotron3DiarizationHeadConfig": {"audio_hidden_size": 32},
    "NemotronHConfig": _HYBRID,
    "NystromformerConfig": {"num_landmarks": 64, "segment_means_seq_len": 64},
    "PerceiverConfig": {"d_latents": 32, "num_latents": 16},
    "Qwen2VLVisionConfig": {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4},
    "Qwen3NextConfig": _HYBRID,
    "Qwen3_5MoeTextConfig": _HYBRID,
    "Qwen3_5TextConfig": _HYBRID,
    "Qwen4ExpTextConfig": {
        "layer_types": ["linear_attention", "indexed_attention"],
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "RecurrentGemmaConfig": {"block_types": ["recurrent", "attention"]},
    "RwkvConfig": {"use_cache": False},  # its cache is written in place, against backward
    "SqueezeBertConfig": {"embedding_size": 32},
    "VibeVoiceAcousticTokenizerEncoderConfig": {
        "num_filters": 4,
        "depths": [1, 1],
        "downsampling_ratios": [2],
    },
    "XmodConfig": {"default_language": "en_XX"},
    "Zamba2Config": {"layers_block_type": ["linear_attention", "hybrid"]},
    "ZambaConfig": {"layers_block_type": ["hybrid", "hybrid"]},
    "ZayaConfig": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    "xLSTMConfig": {"hidden_size": 128},  # its heads round up to multiples of 64
}
EXCLUDED: dict[str, str] = {
    "Gemma3nForConditionalGeneration": "its vision tower needs the timm package",
    "Gemma4AssistantForCausalLM": "never reads its embedding, but another model's states",
    "Gemma4UnifiedAssistantForCausalLM": "never reads its embedding, but another model's states",
    "ReformerForMaskedLM": "its reversible layers refuse a backward pass in evaluation mode",
    "ReformerModelWithLMHead": "its reversible layers refuse a backward pass in evaluation mode",
}

# Where a model does not name one embedding of its text.
TARGETS = {
    "MusicgenForCausalLM": "model.decoder.embed_tokens.0",
    "MusicgenForConditionalGeneration": "decoder.model.decoder.embed_tokens.0",
    "MusicgenMelodyForCausalLM": "model.decoder.embed_tokens.0",
    "MusicgenMelodyForConditionalGeneration": "decoder.model.decoder.embed_tokens.0",
    "PerceiverForMaskedLM": "perceiver.input_preprocessor.embeddings",
}

# What transformers' resize_token_embeddings leaves as it is, breaks or does not take; for Gemma 3n
# it adds random rows to a second table, in which a token without a row counts as token 0.
BUILT_LONGER = {
    "EncoderDecoderModel",
    "EsmForMaskedLM",
    "Gemma3nForCausalLM",
    "IBertForMaskedLM",
    "xLSTMForCausalLM",
}
