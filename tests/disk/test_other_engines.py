"""A merged folder in an engine that reads it by code of its own.

`examples.served_elsewhere` asks more engines.
"""

from __future__ import annotations

import copy

import ctranslate2
import numpy as np
import pytest
import torch

from tests.helpers.llama import llama
from tests.helpers.rows import random_rows
from tests.helpers.tokenizers import tokenizer
from ttfunc import functional_call, merge_checkpoint, patch


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the converter
@pytest.mark.parametrize("tie", [True, False])
def test_ctranslate2_gives_the_logits_of_a_patched_call(tie: bool, tmp_path):
    known = tokenizer("byte-level BPE")
    known.add_special_tokens(dict.fromkeys(["bos_token", "eos_token", "unk_token"], "<|end|>"))
    model = llama(vocabulary=len(known), tie=tie)
    model.save_pretrained(tmp_path / "model")
    known.save_pretrained(tmp_path / "model")
    after = copy.deepcopy(known)
    after.add_tokens(["<call>", "</call>"])
    ids = [7, *after.convert_tokens_to_ids(["<call>", "</call>"])]
    targets = None if tie else ["embed_tokens", "lm_head"]
    params = random_rows(model, ids, grow=True, targets=targets)
    merge_checkpoint(tmp_path / "model", params, tmp_path / "merged", tokenizer=after)

    converter = ctranslate2.converters.TransformersConverter(str(tmp_path / "merged"))
    engine = ctranslate2.Generator(converter.convert(str(tmp_path / "made")), intra_threads=1)
    text = after("a token<call> is one</call>")["input_ids"]
    assert set(ids[1:]) < set(text)
    x = torch.tensor([[7, *text]])
    expected = functional_call(model, patch(params), x).logits
    found = torch.from_numpy(np.array(engine.forward_batch(x.tolist())))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
