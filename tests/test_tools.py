"""What other tools ask of a TokenModule, each at work."""

from __future__ import annotations

import warnings

import pytest
import torch
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torchao.quantization import Int8WeightOnlyConfig
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    DataCollatorForSeq2Seq,
    T5Config,
    T5ForConditionalGeneration,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
    pipeline,
)

from tests.helpers.lessons import QUIET, TOKENS, distance, lessons, merged
from tests.helpers.llama import llama
from tests.helpers.rows import random_rows
from tests.helpers.trl import NEW, dataset, module_of, pupil_tokenizer, sentences
from ttfunc import functional_call, patch
from ttfunc.module.token_module import TokenModule

SETTINGS = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "optim": "sgd",
    **QUIET,
}


def quantised(folder) -> torch.nn.Module:
    llama(vocabulary=50, width=64).save_pretrained(folder)
    config = TorchAoConfig(Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    return model.requires_grad_(False)


@pytest.mark.parametrize("ids", [TOKENS, [*TOKENS, 50]], ids=["old", "new"])
def test_what_is_saved_over_a_quantised_body_loads(ids, tmp_path):
    model = quantised(tmp_path / "model")
    params = random_rows(model, ids, grow=True)
    before = set(vars(model))
    TokenModule(model, params).save_pretrained(tmp_path / "saved")
    assert set(vars(model)) == before
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert "Int8" in type(saved.model.layers[0].mlp.up_proj.weight).__name__
    x = torch.tensor([[3, *ids, 4]])
    expected = functional_call(model, patch(params), x).logits
    torch.testing.assert_close(saved(x).logits, expected)


def test_trainer_trains_rows_over_a_quantised_body(tmp_path):
    def made() -> tuple[torch.nn.Module, TokenModule]:
        model = quantised(tmp_path / "model")
        return model, TokenModule(model, random_rows(model, TOKENS))

    model, module = made()
    assert "Int8" in type(model.model.layers[0].mlp.up_proj.weight).__name__
    Trainer(module, TrainingArguments(str(tmp_path), **SETTINGS), train_dataset=lessons()).train()
    other, _ = made()
    params = random_rows(other, TOKENS, requires_grad=True)
    (rows,) = params.deltas.values()
    start = rows.detach().clone()
    examples = lessons()
    for step in range(3):
        batch = examples[2 * step : 2 * step + 2]
        x, y = (torch.stack([one[key] for one in batch]) for key in ("input_ids", "labels"))
        loss = functional_call(other, patch(params), kwargs={"input_ids": x, "labels": y}).loss
        (grad,) = torch.autograd.grad(loss, rows)
        with torch.no_grad():
            rows -= 0.05 * grad
    (found,) = module.parameters()
    assert distance(found, start) > 1e-4
    torch.testing.assert_close(found, rows, rtol=0, atol=1e-5)


def test_generation_with_it_as_the_assistant_and_as_the_assisted():
    module = module_of()
    plain, x = merged(module), torch.tensor([[5, 6, 7]])
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = plain.generate(x, **options)
    assert torch.equal(plain.generate(x, assistant_model=module, **options), expected)
    assert torch.equal(module.generate(x, assistant_model=plain, **options), expected)


def test_a_pipeline_says_what_the_merged_model_says():
    module, words = module_of(), pupil_tokenizer()
    said = [
        pipeline("text-generation", model=model, tokenizer=words, device="cpu")(
            "A row <call>", max_new_tokens=6, do_sample=False
        )
        for model in (module, merged(module))
    ]
    assert said[0] == said[1]


def test_noise_on_the_embeddings_is_that_of_the_model(tmp_path):
    """NEFTune sets an attribute and a hook on the input embedding, and takes them off again."""
    trained = []
    for noise in (None, 5.0):
        model = llama(vocabulary=50, width=16)
        params = random_rows(model, TOKENS)
        module = TokenModule(model, params)
        settings = TrainingArguments(str(tmp_path), neftune_noise_alpha=noise, **SETTINGS)
        Trainer(module, settings, train_dataset=lessons()).train()
        trained.append(next(iter(params.deltas.values())).detach().clone())
        embedding = model.get_input_embeddings()
        assert not embedding._forward_hooks
        assert not hasattr(embedding, "neftune_noise_alpha")
    assert distance(*trained) > 1e-4


def test_label_smoothing_of_a_model_with_two_stacks(tmp_path):
    """The collator asks the model for the decoder's inputs."""
    config = T5Config(
        vocab_size=340, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(1)
    model = T5ForConditionalGeneration(config).requires_grad_(False)
    module = TokenModule(model, random_rows(model, [7, 3]))
    settings = TrainingArguments(
        str(tmp_path), label_smoothing_factor=0.1, per_device_eval_batch_size=2, **SETTINGS
    )
    examples = [{"input_ids": [7, 9, 3, 4 + i], "labels": [3, 7, 5 + i]} for i in range(4)]
    found = []
    for one in (module, merged(module)):
        collator = DataCollatorForSeq2Seq(pupil_tokenizer(), model=one)
        batch = collator([dict(example) for example in examples])
        assert batch["decoder_input_ids"][0].tolist() == [0, 3, 7]
        trainer = Trainer(one, settings, data_collator=collator, eval_dataset=examples)
        found.append(trainer.evaluate()["eval_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


# sentence-transformers


def encoder(folder) -> tuple[SentenceTransformer, TokenModule]:
    """A text encoder whose transformer is a TokenModule."""
    words = pupil_tokenizer()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        pad_token_id=words.pad_token_id,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    words.save_pretrained(folder)
    made = SentenceTransformer(modules=[Transformer(str(folder)), Pooling(32)], device="cpu")
    model = made[0].model.requires_grad_(False)
    module = TokenModule(model, random_rows(model, words.convert_tokens_to_ids(NEW)))
    made[0].model = module
    return made, module


def test_sentence_transformers_trains_and_saves_the_rows_of_an_encoder(tmp_path):
    data = dataset("text", 6)
    data = data.rename_column("text", "anchor").add_column("positive", sentences(7)[1:])
    made, module = encoder(tmp_path / "model")
    (row,) = module.parameters()
    before = row.detach().clone()
    loss = MultipleNegativesRankingLoss(made)
    settings = SentenceTransformerTrainingArguments(
        str(tmp_path / "out"),
        # All at once: it shuffles.
        **{**SETTINGS, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 6},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        SentenceTransformerTrainer(made, settings, train_dataset=data, loss=loss).train()
    # The same by hand.
    other, same = encoder(tmp_path / "model")
    objective = MultipleNegativesRankingLoss(other)
    (rows,) = same.parameters()
    for _ in range(3):
        inputs = [other.preprocess(data[name]) for name in ("anchor", "positive")]
        (grad,) = torch.autograd.grad(objective(inputs, None), rows)
        with torch.no_grad():
            rows -= 0.05 * grad
    assert distance(row, before) > 1e-4
    torch.testing.assert_close(row, rows, rtol=0, atol=1e-6)
    # What it saved has the rows, for those who know nothing of them.
    loaded = SentenceTransformer(str(tmp_path / "out" / "checkpoint-3"), device="cpu")
    assert type(loaded[0].model) is BertModel
    text = ["<call> a row <end>"]
    torch.testing.assert_close(
        loaded.encode(text, convert_to_tensor=True), made.encode(text, convert_to_tensor=True)
    )
