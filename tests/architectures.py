"""Every causal, masked and sequence-to-sequence language model of transformers, at toy size."""

import dataclasses
import functools
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, SiglipVisionConfig
from transformers.models.auto import modeling_auto

VOCABULARY = 99
SIZES: dict[int, str] = {
    0: "first_k_dense_replace num_dense_layers moe_layer_start_index",
    1: "n_shared_experts num_shared_experts topk_group n_group",
    2: """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers
        num_encoder_layers num_decoder_layers num_blocks
        num_experts_per_tok moe_topk moe_k moe_top_k 
        t2u_encoder_layers t2u_decoder_layers speech_encoder_layers conf_num_hidden_layers
        num_self_attends_per_block
        num_global_layers max_window_layers linear_num_key_heads num_codebooks n_groups prompt_types""",
    3: "conv_kernel_size",
    4: """num_key_value_heads kv_n_heads num_kv_heads swa_num_key_value_heads num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads
        attention_heads num_encoder_attention_heads num_decoder_attention_heads
        num_experts n_routed_experts num_local_experts moe_num_experts swa_num_attention_heads
        linear_num_value_heads linear_num_heads index_n_heads
        t2u_encoder_attention_heads t2u_decoder_attention_heads speech_encoder_attention_heads
        mamba_n_heads n_mamba_heads num_cross_attention_heads num_self_attention_heads
        conf_num_attention_heads num_landmarks index_topk expert_capacity
        local_num_experts zero_expert_num num_random_blocks
        mamba_num_heads prompt_length""",
    8: """head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim d_kv d_head dim_head kv_channels
        swa_head_dim swa_v_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim index_head_dim
        attention_head_size rotary_dim mamba_d_state state_size ssm_state_size time_step_rank mamba_dt_rank num_mel_bins""",
    16: """kv_lora_rank q_lora_rank o_lora_rank embedding_size input_embedding_size
        output_embedding_size adapter_rank laurel_rank attention_window chunk_size mamba_chunk_size
        hidden_size_per_layer_input output_channels downsample_hidden_size mamba_d_head mamba_head_dim""",
    32: """hidden_size d_model n_embd dim emb_dim embedding_dim word_embed_proj_dim lru_width
        encoder_hidden_size lang_embed_dim output_dim input_size backbone_hidden_size
        prediction_head_size nemo_conv_channels ext_pw_out_channel depthwise_separable_out_channel""",
    48: """intermediate_size encoder_ffn_dim decoder_ffn_dim moe_intermediate_size
        shared_expert_intermediate_size shared_intermediate_size ffn_dim d_ff d_inner dff dim_ff hidden_dim
        ffn_hidden_size expert_ffn_hidden_size intermediate_size_mlp dense_intermediate_size
        feed_forward_size moe_shared_expert_intermediate_size shared_experts_intermediate_size mlp_dim
        t2u_encoder_ffn_dim t2u_decoder_ffn_dim speech_encoder_intermediate_size""",
    64: """max_position_embeddings n_positions n_ctx max_seq_len max_source_positions max_target_positions
        max_2d_position_embeddings max_encoder_position_embeddings max_decoder_position_embeddings
        context_length max_pos_emb prompt_mid_dim t2u_max_position_embeddings sliding_window""",
    VOCABULARY: """vocab_size decoder_vocab_size src_vocab_size tgt_vocab_size vocab_size_per_layer_input
        t2u_vocab_size entity_vocab_size shape_vocab_size pronunciation_vocab_size unpadded_vocab_size
        unit_hifi_gan_vocab_size char_vocab_size audio_vocab_size""",
}
VALUES: dict[str, int] = {name: size for size, names in SIZES.items() for name in names.split()}
VALUES |= {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 2, "sep_token_id": 3}

# The stock vision tower of Gemma3n needs the timm package; text alone never reaches it.
GEMMA3N_VISION = SiglipVisionConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=32,
    rms_norm_eps=1e-6, vocab_size=1, vocab_offset=VOCABULARY,
)
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
OVERRIDES: dict[str, dict[str, Any]] = {
    "BailingHybridConfig": HYBRID,
    "BambaConfig": {"attn_layer_indices": [1]},
    "BltConfig": {"use_cache": False, "encoder_hash_byte_group_vocab": 64},
    "BltLocalEncoderConfig": {"hidden_size_global": 32},
    "BltLocalDecoderConfig": {"hidden_size_global": 32},
    "CohereCompassTextConfig": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "DbrxConfig": {
        "attn_config": {"kv_n_heads": 4, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 48},
    },
    "DeepseekV2Config": {"num_experts_per_tok": 2},
    "Dots1Config": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "EsmConfig": {"vocab_size": VOCABULARY, "pad_token_id": 1, "mask_token_id": VOCABULARY - 1},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "Gemma3nConfig": {"vision_config": GEMMA3N_VISION},
    "Gemma3nTextConfig": {"num_kv_shared_layers": 0},
    "Gemma4UnifiedTextConfig": {"num_kv_shared_layers": 0},
    "GraniteMoeHybridConfig": HYBRID,
    "GraniteSpeechEncoderConfig": {"context_size": 16},
    "GraniteSpeechPlusEncoderConfig": {"context_size": 16},
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "KimiLinearConfig": HYBRID,
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "Lfm3Config": {"layer_types": ["conv", "full_attention"]},
    "Mamba2Config": {"num_heads": 8},
    "MiMoV2FlashConfig": {"num_key_value_heads": 2},
    "NeoMMEConfig": {"head_dim": 16},
    "NemotronHConfig": HYBRID,
    "Nemotron3DiarizationHeadConfig": {"audio_hidden_size": 32},
    "NystromformerConfig": {"num_landmarks": 64, "segment_means_seq_len": 64},
    "PerceiverConfig": {"d_latents": 32, "num_latents": 16},
    "Qwen3NextConfig": HYBRID,
    "Qwen3_5TextConfig": HYBRID,
    "Qwen3_5MoeTextConfig": HYBRID,
    "Qwen4ExpTextConfig": {
        "layer_types": ["linear_attention", "indexed_attention"],
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "RecurrentGemmaConfig": {"block_types": ["recurrent", "attention"]},
    "RwkvConfig": {"use_cache": False},
    "SqueezeBertConfig": {"embedding_size": 32},
    "VibeVoiceAcousticTokenizerEncoderConfig": {"num_filters": 4, "depths": [1, 1], "downsampling_ratios": [2]},
    "XmodConfig": {"default_language": "en_XX"},
    "ZambaConfig": {"layers_block_type": ["hybrid", "hybrid"]},
    "Zamba2Config": {"layers_block_type": ["linear_attention", "hybrid"]},
    "ZayaConfig": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    "xLSTMConfig": {"hidden_size": 128},
}
EXCLUDED: dict[str, str] = {
    "Gemma4AssistantForCausalLM": "never reads its token embedding: it takes another model's hidden states",
    "Gemma4UnifiedAssistantForCausalLM": "never reads its token embedding: it takes another model's hidden states",
    "ReformerForMaskedLM": "its reversible layers refuse a backward pass in evaluation mode",
    "ReformerModelWithLMHead": "its reversible layers refuse a backward pass in evaluation mode",
}


@functools.cache
def architectures() -> list[str]:
    """Return the sorted class names of all language models in transformers' auto mappings."""
    names: set[str] = set()
    for kind in ("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM"):
        for entry in getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES").values():
            names.update([entry] if isinstance(entry, str) else entry)
    return sorted(names)


def _toy_value(name: str, default: Any) -> Any:
    """Return the toy value of the configuration attribute `name`, or its default where no rule applies."""
    if default is None and name in ("head_dim", "num_key_value_heads"):
        return VALUES[name]
    if isinstance(default, bool) or not isinstance(default, int):
        return default
    if name in VALUES:
        return VALUES[name]
    if name.endswith(("token_id", "token_index")) or default > 1000 and name.endswith("_id"):
        return VOCABULARY - 1
    return default


def toy_config(cls: type[PreTrainedConfig], **given: Any) -> PreTrainedConfig:
    """Return a toy-sized configuration of class `cls`, its sub-configurations toy-sized too."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if field.default is None or isinstance(field.default, int):
            values[field.name] = _toy_value(field.name, field.default)
    for name, spec in (cls.sub_configs_defaults or {}).items():
        if not spec.optional:
            exact = issubclass(spec.config_class, PreTrainedConfig)
            sub_class = spec.config_class if exact else CONFIG_MAPPING[spec.model_type]
            values[name] = toy_config(sub_class, **(spec.init_kwargs or {}))
    given = {name: _toy_value(name, value) for name, value in given.items()}
    return cls(**values | given | OVERRIDES.get(cls.__name__, {}))


def build(name: str, *, tie: bool | None = None) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a toy model of class `name` in evaluation mode, and its inputs."""
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    config = toy_config(model_class.config_class, **OVERRIDES.get(name, {}))
    if tie is not None:
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = tie
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = model_class(config).float().eval()
    ids = torch.randint(5, 90, (2, 10))
    ids[:, 1], ids[:, 4], ids[:, 8] = 5, 7, 11
    inputs = {"input_ids": ids}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(0)
    if name == "VoxtralRealtimeForConditionalGeneration":
        # Audio is not optional here: one position per token, after two strides of 2 and a downsampling by 4.
        inputs["input_features"] = torch.randn(2, 8, 80)
    return model, inputs


def logits_of(output: Any) -> Tensor:
    """Return the vocabulary logits of a model's output."""
    return output.logits


@torch.no_grad()
def perturb(model: nn.Module, seed: int = 0) -> None:
    """Add noise to every parameter, so that none is left at zero or at identity."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
