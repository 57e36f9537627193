"""A Hugging Face text model, encoder or decoder, with LoRA factors, made from a local folder; the spec of an adapter
comes from here.

Only built-in architectures and safetensors are loaded, and nothing is ever fetched. The same code builds the encoder on
the meta device (shapes without weights: seconds and little memory), so the coordinator's spec is the site's. Knows
nothing of data, labels beyond their number, or training.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from foedus_common.adapters import AdapterSpec, Role, TensorSpec
from foedus_common.errors import LocalError
from foedus_common.plan import RunPlan
from foedus_common.tasks.head import HEAD
from foedus_common.tasks.targets import blocks, target_names

BaseWeights = Literal["float32", "bfloat16", "4bit"]

_LORA = "default"  # peft's name for the only adapter of a model


def encoder_spec(folder: Path, plan: RunPlan) -> AdapterSpec:
    """The adapter's spec for a plan on the model in `folder`, without reading the weights.

    Raises LocalError when the folder is no model that can be used, or the plan's [adapter] does not fit it.
    """
    config = _config(folder)
    with _refusing(folder), torch.device("meta"):
        encoder = _with_factors(AutoModel.from_config(config, trust_remote_code=False), plan)
    return spec_of(encoder, plan)


def load_encoder(
    folder: Path,
    plan: RunPlan,
    device: torch.device,
    base_weights: BaseWeights = "float32",
    products: torch.dtype = torch.float32,
) -> PeftModel:
    """The encoder on `device`, in evaluation mode (no dropout), every parameter frozen, the factors in float32.

    base_weights: how the others are held. "4bit" is NF4 with double quantization (Dettmers et al., QLoRA, NeurIPS
    2023) for the linear layers, multiplied in `products`, in which the rest is held. Raises LocalError as
    `encoder_spec` does, when the weights are incomplete, and when bitsandbytes is wanted and not there.
    """
    config = _config(folder)
    # On CPUs the backward pass of eager attention in bfloat16 takes half the time of the fused one's (MiniLM, Zen 4).
    how: dict[str, Any] = {"attn_implementation": "eager"} if device.type == "cpu" else {}
    how["dtype"] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "4bit": products}[base_weights]
    if base_weights == "4bit":
        how |= {"quantization_config": _nf4(products), "device_map": {"": device}}
    with _refusing(folder):
        encoder, loading = AutoModel.from_pretrained(
            folder,
            config=config,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **how,
        )
    absent = sorted(key for key in loading["missing_keys"] if not key.startswith("pooler."))
    if absent:
        raise LocalError(f"The model in {folder} lacks weights ({absent[0]}); it is not a complete model.")
    # To the device before the factors are added: hooks on modules that move afterwards are lost.
    adapted = _with_factors(encoder if base_weights == "4bit" else encoder.to(device), plan)
    adapted.requires_grad_(False).eval()
    for module in adapted.modules():
        if type(module).__name__ == "Linear4bit" and not list(module.children()):
            module.train()  # else bitsandbytes packs it for CPUs with AVX-512, and then knows no backward pass
    _return_freed_memory()
    return adapted


def _return_freed_memory() -> None:
    """Loading frees a copy of the weights in pieces between what stays; glibc keeps them, and training's larger tensors
    do not fit into them (malloc_trim(3)). Other C libraries have no such call."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _nf4(products: torch.dtype) -> BitsAndBytesConfig:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise LocalError('base_weights = "4bit" needs bitsandbytes, which is not installed; pip install "foedus[gpu]".')
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=products,
    )


def recompute_blocks(encoder: PeftModel) -> None:
    """Gradient checkpointing (Chen et al., arXiv:1604.06174): of each layer of the stack only what enters it is kept,
    and the layer runs again in the backward pass. Not transformers' own, which wants the model in training mode, with
    its dropout."""
    for _, block in blocks(encoder).values():
        again = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        setattr(block, "forward", again)  # noqa: B010


def spec_of(encoder: PeftModel, plan: RunPlan) -> AdapterSpec:
    """The head, then A and B of each adapted layer in the model's order, under peft's names for them in files."""
    role_of_a: Role = "frozen" if plan.adapter.method == "ffa-lora" else "adapter"
    width = getattr(encoder.config, "word_embed_proj_dim", encoder.config.hidden_size)  # small OPTs project back to it
    tensors = [TensorSpec(HEAD, (len(plan.task.labels), width + 1), "head")]
    for name, layer in _adapted_layers(encoder):
        tensors.append(TensorSpec(f"{name}.lora_A.weight", tuple(layer.lora_A[_LORA].weight.shape), role_of_a))
        tensors.append(TensorSpec(f"{name}.lora_B.weight", tuple(layer.lora_B[_LORA].weight.shape), "adapter"))
    return AdapterSpec(tuple(tensors))


def factors(encoder: PeftModel) -> dict[str, nn.Linear]:
    """The modules that hold the tensors of the spec (all but the head), by the tensor's name."""
    modules = {}
    for name, layer in _adapted_layers(encoder):
        modules[f"{name}.lora_A.weight"] = layer.lora_A[_LORA]
        modules[f"{name}.lora_B.weight"] = layer.lora_B[_LORA]
    return modules


def _config(folder: Path) -> PretrainedConfig:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if not (folder / "config.json").is_file():
        raise LocalError(f"{folder} is not a model folder: it has no config.json.")
    with _refusing(folder):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if config.is_encoder_decoder or not isinstance(getattr(config, "hidden_size", None), int):
        raise LocalError(f"The model in {folder} ({config.model_type}) is not a text encoder or decoder alone.")
    config.use_cache = False  # of keys and values, which only generating text needs
    # Not as the folder likes: some ways take the padding out, or hide in one product whose rows come how often.
    config._attn_implementation, config._experts_implementation = None, "eager"
    return config


def _check_length(encoder: PreTrainedModel, max_length: int) -> None:
    positions = getattr(encoder.config, "max_position_embeddings", None) or max_length
    for name, module in encoder.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions = module.num_embeddings - module.padding_idx - 1  # RoBERTa counts from behind its padding
    if 0 < positions < max_length:
        raise LocalError(f"[task] max_length is {max_length}, but the model reads at most {positions} tokens.")


def _with_factors(encoder: PreTrainedModel, plan: RunPlan) -> PeftModel:
    """The encoder with LoRA factors on the plan's targets; the pooler goes, because features are pooled here."""
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None
    _check_length(encoder, plan.task.max_length)
    names = target_names(encoder, plan.adapter.targets, plan.adapter.layers)
    chosen = LoraConfig(
        r=plan.adapter.rank,
        lora_alpha=plan.adapter.alpha,
        target_modules="|".join(re.escape(name) for name in names),  # these and no others
        fan_in_fan_out=any(isinstance(encoder.get_submodule(name), Conv1D) for name in names),
        lora_dropout=0.0,
        bias="none",
        task_type="FEATURE_EXTRACTION",
    )
    with warnings.catch_warnings(action="ignore"):  # peft's, about its own calls and about models with both layouts
        adapted = get_peft_model(encoder, chosen)
    _check_layers(adapted, plan.adapter.rank)
    return adapted


def _check_layers(encoder: PeftModel, rank: int) -> None:
    names_of: dict[int, str] = {}
    for name, parameter in encoder.named_parameters(remove_duplicate=False):
        first = names_of.setdefault(id(parameter), name)
        if first != name and any(part in tied for tied in (first, name) for part in (".base_layer.", ".lora_")):
            raise LocalError(f"The model ties the weights of {name} and {first}; a tied layer cannot be adapted.")
    for name, layer in _adapted_layers(encoder):
        if rank > (size := min(layer.in_features, layer.out_features)):
            raise LocalError(f"[adapter] rank is {rank}, but {name} has only {size} dimensions.")


def _adapted_layers(encoder: PeftModel) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in encoder.named_modules() if isinstance(module, LoraLayer)]


@contextmanager
def _refusing(folder: Path) -> Iterator[None]:
    """transformers raises many kinds of errors for a folder that it cannot use; all of them say just that."""
    try:
        yield
    except LocalError:
        raise
    except Exception as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LocalError(f"The model in {folder} cannot be used: {first_line}") from None
