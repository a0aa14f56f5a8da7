"""Every causal, masked and sequence-to-sequence language model of transformers, at toy size.

A toy is the default configuration of its class with every size shrunk by the attribute's name, and
random weights. A few architectures need more than that: see `OVERRIDES` in architecture_sizes.py.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto import modeling_auto

from tests.helpers.architecture_sizes import (
    ALWAYS,
    BUILT_LONGER,
    OVERRIDES,
    RARE_ID,
    TARGETS,
    TOY_VALUES,
)
from tests.helpers.rows import random_rows
from ttfunc import TokenDeltas
from ttfunc.model.targets import find_targets

IDS = [11, 5, 7]  # in every row of the inputs


def _mapped_names() -> set[str]:
    """Return the class names in transformers' three auto mappings of language models."""
    names: set[str] = set()
    for kind in ("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM"):
        for entry in getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES").values():
            names.update([entry] if isinstance(entry, str) else entry)
    return names


ARCHITECTURES: tuple[str, ...] = tuple(sorted(_mapped_names()))


def _toy_value(name: str, default: Any) -> Any:
    """Return the toy value of the attribute `name`, or its `default` where no rule applies."""
    plain = isinstance(default, int) and not isinstance(default, bool)
    if name in TOY_VALUES and (plain or name in ALWAYS):
        return TOY_VALUES[name]
    if plain and name.endswith(("token_id", "token_index")):
        return RARE_ID
    return default


def _toy_config(cls: type[PreTrainedConfig], given: dict[str, Any]) -> PreTrainedConfig:
    """Return a toy configuration of `cls`, shrinking its fields, sub-configurations and `given`."""
    defaults = {field.name: field.default for field in dataclasses.fields(cls)} | given
    values = {name: _toy_value(name, default) for name, default in defaults.items()}
    values = {name: value for name, value in values.items() if value is not dataclasses.MISSING}
    for name, spec in cls.sub_configs_defaults.items():
        if not spec.optional:
            own = issubclass(spec.config_class, PreTrainedConfig)
            part = spec.config_class if own else CONFIG_MAPPING[spec.model_type]
            values[name] = _toy_config(part, spec.init_kwargs or {})
    return cls(**values | copy.deepcopy(OVERRIDES.get(cls.__name__, {})))


def _inputs(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Return the keyword arguments of a forward pass; the ids 5, 7 and 11 occur in every row."""
    ids = torch.randint(5, RARE_ID, (2, 10))
    ids[:, 1], ids[:, 4], ids[:, 8] = 5, 7, 11
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(0)
    if name == "VoxtralRealtimeForConditionalGeneration":
        # It adds audio to each token: 8 frames a token, for a stride of 2 and a downsampling by 4.
        inputs["input_features"] = torch.randn(2, TOY_VALUES["num_mel_bins"], 80)
    return inputs


def build(name: str, *, tie: bool | None = None) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a toy model of the class `name` in evaluation mode, and its inputs.

    `tie` sets `tie_word_embeddings`, which a few architectures ignore; None leaves the default.
    """
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    config = _toy_config(model_class.config_class, {})
    if tie is not None:
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = tie
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = model_class(config).float().eval()
    return model, _inputs(model, name)


def logits_of(output: Any) -> Tensor:
    """Return the vocabulary logits in a model's output."""
    return output.logits


@torch.no_grad()
def perturb(model: nn.Module, seed: int = 0) -> None:
    """Add noise to every parameter, so that none is left at zero or at the identity."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def toy(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    model, inputs = build(name)
    perturb(model)
    for path, buffer in model.named_buffers():
        if path.endswith("final_logits_bias"):
            nn.init.normal_(buffer)
    return model, inputs


def new_rows(model: nn.Module, name: str) -> TokenDeltas:
    """Rows of three tokens of the inputs, as far from the base as the base is wide."""
    with warnings.catch_warnings():  # the default is tried, whatever stands at the head
        warnings.filterwarnings("ignore", message="rows of .* alone are trained")
        return random_rows(model, IDS, seed=1, targets=TARGETS.get(name), requires_grad=True)


def in_place(model: nn.Module, name: str, params: TokenDeltas) -> tuple[nn.Module, nn.Parameter]:
    """A copy with the rows written into its embedding alone: what is tied follows by itself."""
    reference = copy.deepcopy(model)
    (target,) = find_targets(reference, TARGETS.get(name))
    weight = reference.get_submodule(target).weight
    with torch.no_grad():
        weight[IDS] = next(iter(params.deltas.values()))
    return reference, weight


def find_height(model: nn.Module, name: str) -> int:
    """How many rows its embedding has."""
    (module,) = find_targets(model, TARGETS.get(name)).values()
    return len(module.weight)


def reloaded(model: nn.Module, folder: Path) -> nn.Module:
    """What transformers loads from a folder, as a model of this class."""
    chosen = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return type(model).from_pretrained(folder, **chosen).eval().requires_grad_(False)


def longer(model: nn.Module, params: TokenDeltas) -> nn.Module:
    """The model with new tokens, made without ttfunc, and these rows written into it.

    transformers resizes a copy of it. Where it cannot, one that is longer is built from the config,
    and every other weight is copied.
    """
    (height,) = {spec.height for spec in params.specs.values()}
    if type(model).__name__ in BUILT_LONGER:
        made = _built(model, height)
    else:
        made = copy.deepcopy(model)
        made.resize_token_embeddings(height, mean_resizing=False)
    for key, names in params.tied.items():
        for weight in {made.get_parameter(name) for name in names}:
            assert len(weight) == height
            with torch.no_grad():
                weight[params.token_indices[key]] = params.deltas[key].detach()
    return made.eval().requires_grad_(False)


def _built(model: nn.Module, height: int) -> nn.Module:
    old = len(model.get_input_embeddings().weight)
    config = copy.deepcopy(model.config)
    for part in (config, *(value for value in vars(config).values() if hasattr(value, "to_dict"))):
        if getattr(part, "vocab_size", None) == old:
            part.vocab_size = height
    made = type(model)(config)
    with torch.no_grad():
        for name, tensor in made.state_dict().items():
            given = model.state_dict()[name]
            if given.shape == tensor.shape:
                tensor.copy_(given)
            else:  # the biases of new tokens are 0
                tensor.zero_()[: len(given)] = given
    return made


def with_state(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """A copy with the tensors of a state dict, of whatever size, in the place of its own."""
    model = copy.deepcopy(model)
    made: dict[int, nn.Parameter] = {}
    for name, tensor in state.items():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        if attribute in module._buffers:
            module._buffers[attribute] = tensor
        else:
            parameter = made.setdefault(id(tensor), nn.Parameter(tensor.detach(), False))
            module._parameters[attribute] = parameter
    return model
