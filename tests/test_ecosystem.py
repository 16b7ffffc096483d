"""A checkpoint in other people's hands: PEFT, Trainer, plain optimizers, pipelines, torch.compile, save_pretrained."""

import json
import logging

import pytest
import torch
from test_checkpoint import compress, logits
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, pipeline

from cluscomp import checkpoint
from cluscomp.errors import InputError
from cluscomp.forms import adapters
from cluscomp.forms.layers import size_of
from cluscomp.forms.linear import compressed
from cluscomp.models.quantised import opened
from cluscomp.store.tensor_files import tensor_bytes


@pytest.fixture(scope="module")
def folder(tiny_folder, tmp_path_factory):
    """A checkpoint of the tiny Llama. Read it only."""
    made = tmp_path_factory.mktemp("saved") / "tiny"
    checkpoint.save(*compress(tiny_folder), made)
    return made


def loaded(folder, **more):
    return AutoModelForCausalLM.from_pretrained(folder, **more)


def test_peft_takes_a_checkpoint_as_it_takes_any_model(folder, ids, tmp_path):
    peft = pytest.importorskip("peft")
    plain = logits(loaded(folder), ids)
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(loaded(folder), config)
    names = {name.rpartition(".")[0] for name in adapters.parameters(model)}
    assert len(names) == 2 * len(compressed(model)) > 0
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad.any() for parameter in adapters.parameters(model).values())
    adapted = logits(model, ids)
    assert not torch.equal(adapted, plain)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(loaded(folder), tmp_path / "adapter")
    assert torch.equal(logits(again, ids), adapted)
    with pytest.raises(RuntimeError):  # there is no dense weight to merge into
        again.merge_and_unload()
    assert torch.equal(logits(again, ids), adapted)
    with again.disable_adapter():
        assert torch.equal(logits(again, ids), plain)
    again.get_base_model().save_pretrained(tmp_path / "base")
    assert torch.equal(logits(loaded(tmp_path / "base"), ids), plain)
    again.get_base_model().dequantize()  # gives it one
    assert torch.equal(logits(again, ids), adapted)
    torch.testing.assert_close(logits(again.merge_and_unload(), ids), adapted, rtol=1e-4, atol=1e-4)


def test_codebooks_learn_under_a_plain_optimizer_after_one_call(folder, ids, tmp_path):
    """float16 numbers would be infinite after the first step: eps of Adam is 0 in them."""
    model = loaded(folder)
    assert not any(parameter.requires_grad for layer in compressed(model).values() for parameter in layer.parameters())
    trained = checkpoint.unfreeze(model)
    assert len(trained) == len(compressed(model)) and {parameter.dtype for parameter in trained} == {torch.float32}
    assert sum(parameter.requires_grad for parameter in model.parameters()) == len(trained)
    optimizer = torch.optim.AdamW(trained, lr=1e-2, foreach=False)
    losses = []
    for _ in range(6):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    model.save_pretrained(tmp_path / "trained")
    assert {parameter.dtype for parameter in trained} == {torch.float32} and trained[0].requires_grad  # goes on
    again = loaded(tmp_path / "trained")
    torch.testing.assert_close(logits(again, ids), logits(model, ids), rtol=1e-2, atol=1e-2)
    assert size_of(again) == size_of(loaded(folder))
    trained[0].data.fill_(torch.nan)
    with pytest.raises(ValueError, match="does not fit"):
        model.save_pretrained(tmp_path / "broken")


def test_trainer_trains_the_codebooks_alone_and_what_it_saves_is_scored(folder, ids, tmp_path, caplog):
    arguments = TrainingArguments(
        str(tmp_path / "trainer"), optim="adamw_torch", learning_rate=1e-2, max_steps=3, use_cpu=True, report_to=[],
        per_device_train_batch_size=2, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in ids]
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(loaded(folder), arguments, train_dataset=rows)
    model = loaded(folder)
    before = model.get_input_embeddings().weight.clone()
    checkpoint.unfreeze(model)
    trainer = Trainer(model, arguments, train_dataset=rows)
    first = model(ids, labels=ids).loss.item()
    trainer.train()
    assert model(ids, labels=ids).loss.item() < first
    assert torch.equal(model.get_input_embeddings().weight, before)
    trainer.save_model(str(tmp_path / "saved"))
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    with caplog.at_level(logging.WARNING):
        original = opened(tmp_path / "saved", torch.float32, torch.device("cpu"), to_score=True)
        ledger = original.size()["ledger"]
    assert "not compared with hashes" in caplog.text
    assert sum(ledger.values()) == 8 * tensor_bytes(tmp_path / "saved")
    assert original.size()["linear_bits_per_weight"] == size_of(loaded(folder)).linear_bits_per_weight


def test_what_another_hand_wrote_wider_counts_as_it_lies(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    size = opened(folder, torch.float32, torch.device("cpu"), to_score=True).size()
    model = loaded(folder)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.embed_tokens.weight"
    tensors[name] = tensors[name].double()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    wide = opened(tmp_path, torch.float32, torch.device("cpu"), to_score=True).size()
    added = 8 * (tensor_bytes(tmp_path) - tensor_bytes(folder))
    assert added > 0 and wide["ledger"]["kept"] == size["ledger"]["kept"] + added
    numbers = sum(size["ledger"].values()) / size["model_bits_per_weight"]
    assert wide["model_bits_per_weight"] == pytest.approx(size["model_bits_per_weight"] + added / numbers)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="no checkpoint of cluscomp"):
        checkpoint.load(tmp_path)


def test_the_usual_ways_to_use_a_model(folder, ids):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = logits(checkpoint.load(str(folder)), ids)
    assert torch.equal(logits(loaded(folder, device_map="cpu"), ids), expected)
    model = loaded(folder, device_map="auto", dtype="auto")
    assert model.dtype == checkpoint.load(folder).dtype
    made = model.generate(ids[:1], max_new_tokens=3, do_sample=False, pad_token_id=0)
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    text = write(tokenizer.decode(ids[0]), max_new_tokens=3, do_sample=False, return_full_text=False)
    assert isinstance(text[0]["generated_text"], str) and made.shape[1] > ids.shape[1]
    layer = next(iter(compressed(model).values()))  # of a whole model it takes 8 seconds
    x = torch.randn(3, 32)
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, backend="eager")(x), layer(x))


def test_trl_trains_adapters_or_codebooks(folder, tmp_path):
    trl, peft = pytest.importorskip("trl"), pytest.importorskip("peft")
    from datasets import Dataset

    arguments = trl.SFTConfig(
        str(tmp_path), max_steps=2, max_length=16, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
        use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    rows, tokenizer = Dataset.from_list([{"text": "abc def ghi"}] * 4), AutoTokenizer.from_pretrained(folder)
    for config in (peft.LoraConfig(r=2, target_modules="all-linear"), None):
        model = loaded(folder)
        if config is None:
            checkpoint.unfreeze(model)
        trainer = trl.SFTTrainer(
            model, args=arguments, train_dataset=rows, processing_class=tokenizer, peft_config=config
        )
        trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        before = [parameter.detach().clone() for parameter in trained]
        trainer.train()
        assert all(parameter.isfinite().all() for parameter in trained)
        assert any(not torch.equal(one, other) for one, other in zip(trained, before))


def adapted(folder, tmp_path):
    """A checkpoint with adapters that do something, and its model."""
    model = checkpoint.load(folder)
    adapters.add(model, rank=2, alpha=4, seed=0)
    for parameter in adapters.parameters(model).values():
        parameter.data.normal_(0, 0.1)
    made = tmp_path / "adapted"
    checkpoint.save(model, AutoTokenizer.from_pretrained(folder), made)
    return made, model


def test_adapters_of_a_checkpoint_are_not_lost(folder, ids, tmp_path):
    pytest.importorskip("peft")
    made, model = adapted(folder, tmp_path)
    expected = logits(model, ids)
    assert not torch.equal(expected, logits(loaded(folder), ids))
    again = checkpoint.load(made)
    assert torch.equal(logits(again, ids), expected)
    for one in (again, model):
        with pytest.raises(ValueError, match=r"lose the model's LoRA adapters: cluscomp\.checkpoint\.save"):
            one.save_pretrained(tmp_path / "lost")
    again.dequantize()
    again.save_pretrained(tmp_path / "dense")
    dense, info = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(logits(dense, ids), expected, rtol=1e-4, atol=1e-4)


def test_a_model_with_fewer_layers_saves_those(folder, ids, tmp_path):
    model = checkpoint.load(folder)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(checkpoint.load(tmp_path), ids), logits(model, ids))


def test_blocks_may_lie_on_a_disk(folder, ids, tmp_path):
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{index}": "disk" if index == 1 else "cpu" for index in range(3)}
    model = loaded(folder, device_map=places, offload_folder=tmp_path)
    assert next(model.model.layers[1].mlp.parameters()).is_meta
    for some in (ids, ids[:1, :3]):  # rebuilt, and multiplied from the codes
        torch.testing.assert_close(logits(model, some), logits(loaded(folder), some), rtol=1e-4, atol=1e-4)
