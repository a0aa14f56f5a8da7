"""Tokenizers of each common kind, trained on a few sentences."""

from __future__ import annotations

import functools

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT = (
    "A tokenizer cuts a text into pieces that its vocabulary has, and a new token is one more "
    "entry of it. The model then needs a row for the token, at both of its ends.\nA row that "
    "starts as the mean of its pieces stands near to what the text meant before."
)
UNKNOWN = "<unk>"
KINDS = ["byte-level BPE", "SentencePiece", "Metaspace", "WordPiece"]


@functools.cache
def _trained(kind: str) -> str:
    if kind == "WordPiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=[UNKNOWN])
    elif kind == "byte-level BPE":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        letters = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=letters)
    else:
        tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN, byte_fallback=True))
        if kind == "Metaspace":
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
            tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
        else:  # as Llama 2 and Mistral have it
            tokenizer.normalizer = normalizers.Sequence(
                [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            )
            tokenizer.decoder = decoders.Sequence(
                [
                    decoders.Replace("▁", " "),
                    decoders.ByteFallback(),
                    decoders.Fuse(),
                    decoders.Strip(" ", 1, 0),
                ]
            )
        known = [UNKNOWN, *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=known)
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer.to_str()


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of one's own: adding a token to it changes no other."""
    unknown = {} if kind == "byte-level BPE" else {"unk_token": UNKNOWN}
    made = Tokenizer.from_str(_trained(kind))
    return PreTrainedTokenizerFast(tokenizer_object=made, **unknown)
