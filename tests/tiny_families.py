"""One tiny model folder for each family of text models: random weights, dropout on, and one tokenizer for all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny_model import HIDDEN, WORDS

DEPTH = 3


@dataclass(frozen=True)
class Family:
    """name: the config's model_type. settings: what its config is made of. query: the linear layer that makes queries,
    where there is one (else all three). linear: at most so many linear layers are in one block."""

    name: str
    settings: dict[str, Any]
    query: str
    linear: int
    decoder: bool = False


PAD, UNKNOWN, BEGIN, END = range(4)

_BERT = {"num_hidden_layers": DEPTH, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64}
LLAMA = _BERT | {"num_key_value_heads": 1, "head_dim": HIDDEN // 2, "pad_token_id": None}

FAMILIES = [
    Family("bert", _BERT, "query", 6),
    Family("roberta", _BERT | {"pad_token_id": PAD}, "query", 6),
    Family("distilbert", {"dim": HIDDEN, "n_layers": DEPTH, "n_heads": 2, "hidden_dim": 32}, "q_lin", 6),
    Family("electra", _BERT | {"embedding_size": 8}, "query", 6),
    Family("mpnet", _BERT, "attn.q", 6),
    Family("modernbert", _BERT | {"pad_token_id": PAD, "global_attn_every_n_layers": 2}, "Wqkv", 4),
    Family("deberta-v2", _BERT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, "query_proj", 8),
    Family("gpt2", {"n_embd": HIDDEN, "n_layer": DEPTH, "n_head": 2, "n_positions": 64}, "c_attn", 4, decoder=True),
    Family(
        "opt", _BERT | {"ffn_dim": 32, "word_embed_proj_dim": HIDDEN, "pad_token_id": PAD}, "q_proj", 6, decoder=True
    ),
    Family("llama", LLAMA, "q_proj", 7, decoder=True),
    Family("mistral", LLAMA, "q_proj", 7, decoder=True),
    Family("qwen2", LLAMA, "q_proj", 7, decoder=True),
    Family("qwen3", LLAMA, "q_proj", 7, decoder=True),
    Family("gemma2", LLAMA, "q_proj", 7, decoder=True),
    Family("gpt_neox", _BERT, "query_key_value", 4, decoder=True),
]


def write_family(family: Family, folder: Path, **changes: Any) -> Path:
    """Config, safetensors and tokenizer. A decoder's tokenizer has no padding token, and would pad on the left."""
    import torch
    from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

    made = bytes_alone() if family.decoder else words_between_special_tokens()
    special = (
        {"padding_side": "left", "eos_token": "!"} if family.decoder else {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    )
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)
    common = {"vocab_size": made.get_vocab_size(), "hidden_size": HIDDEN, "bos_token_id": BEGIN, "eos_token_id": END}
    if "dim" in family.settings or "n_embd" in family.settings:
        del common["hidden_size"]
    config = AutoConfig.for_model(family.name, **common, **(family.settings | changes))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModel.from_config(config)
        for parameter in model.parameters():  # far from the small initial weights, so that texts differ
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.5)
        model.save_pretrained(folder)
    return folder


def words_between_special_tokens() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.pre_tokenizers import BertPreTokenizer
    from tokenizers.processors import TemplateProcessing

    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(WordPiece(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = BertPreTokenizer()
    special = [("[CLS]", BEGIN), ("[SEP]", END)]
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    return tokenizer


def bytes_alone() -> Any:
    """Byte-level BPE without merges, which adds nothing to a text."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel

    tokenizer = Tokenizer(BPE({letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    return tokenizer
