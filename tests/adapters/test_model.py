import copy

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import save_file

from adapters.config import LoraSpec
from adapters.model import MultiTaskModel, load_strict
from manifests.errors import ConfigError, ContractError
from trainer.batches import ChannelBatch

OUTPUTS = {"staging": 5, "rhythm": 4}
LORA = LoraSpec(r=4, dropout=0.0)


def batch(seed: int = 0, channels: int = 3) -> ChannelBatch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.arange(1, channels + 1).expand(2, channels)
    return ChannelBatch(
        signal_BCT=torch.randn(2, channels, 256, generator=generator),
        mask_BC=torch.ones(2, channels, dtype=torch.bool),
        anode_BC=ids,
        cathode_BC=torch.zeros_like(ids),
        kind_BC=torch.zeros_like(ids),
        rate_hz=32.0,
    )


@pytest.fixture
def model(make_encoder):
    model = MultiTaskModel(make_encoder(), OUTPUTS, lora=LORA)
    with torch.no_grad():  # B starts at zero, where A gets no gradient
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def test_trainable_set_is_lora_heads_and_the_shared_encoder(model):
    names = set(model.trainable())
    lora = {name for name in names if ".lora_" in name}
    assert len(lora) == 2 * len(OUTPUTS) * 6 * 2  # A and B, tasks, layers per block, blocks
    others = names - lora
    assert all(name.startswith("heads.") or ".temporal_encoder." in name for name in others)
    assert any(".temporal_encoder." in name for name in others)
    assert not any("lora" in name and "temporal" in name for name in names)
    assert model.peft.peft_config["staging"].modules_to_save is None


def test_every_lora_tensor_gets_gradient_from_its_task_only(model):
    for task, other in (("staging", "rhythm"), ("rhythm", "staging")):
        model.zero_grad(set_to_none=True)
        model(task, batch()).square().sum().backward()
        for name, parameter in model.trainable().items():
            if f".{task}." in name:
                assert parameter.grad is not None, name
                assert parameter.grad.abs().max() > 0, name
            elif f".{other}." in name:
                assert parameter.grad is None, name
            else:
                assert parameter.grad is not None, name


def test_gradients_add_up_over_tasks_in_one_step(model):
    """`set_adapter` between two forwards would drop the first task's gradients."""
    loss = model("staging", batch()).sum() + model("rhythm", batch(1)).sum()
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.trainable().values())
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if ".lora_" in name)


@pytest.mark.parametrize("training", [True, False])
def test_adapter_on_differs_from_off_and_from_the_other_task(model, training):
    model.train(training)
    with torch.no_grad():
        model.activate("staging")
        staging = model.peft(batch()).pooled_BD
        model.activate("rhythm")
        rhythm = model.peft(batch()).pooled_BD
        with model.peft.disable_adapter():
            off = model.peft(batch()).pooled_BD
    assert (staging - off).abs().max() > 1e-4
    assert (staging - rhythm).abs().max() > 1e-4


def test_fresh_adapters_leave_the_encoder_as_it_was(make_encoder):
    encoder = make_encoder()
    with torch.no_grad():
        before = copy.deepcopy(encoder)(batch()).pooled_BD
        model = MultiTaskModel(encoder, OUTPUTS, lora=LORA)
        model.activate("rhythm")
        assert torch.equal(model.peft(batch()).pooled_BD, before)


def test_base_is_bit_identical_after_training_but_for_the_shared_encoder(model):
    frozen = model.frozen_digest()
    shared = [parameter.clone() for parameter in model.shared.parameters()]
    optimizer = torch.optim.AdamW(model.trainable().values(), lr=0.01)
    for task in OUTPUTS:
        model(task, batch()).square().sum().backward()
    optimizer.step()
    assert model.frozen_digest() == frozen
    assert any(not torch.equal(a, b) for a, b in zip(shared, model.shared.parameters(), strict=True))
    with torch.no_grad():
        model.encoder.norm.weight.add_(1e-7)
    assert model.frozen_digest() != frozen


def test_a_step_on_one_task_leaves_the_other_bit_identical(model):
    before = {name: tensor.clone() for name, tensor in model.adapter_tensors("rhythm").items()}
    optimizer = torch.optim.AdamW(model.trainable().values(), lr=0.01)
    model("staging", batch()).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.adapter_tensors("rhythm").items())


@pytest.mark.parametrize("name", ["blocks", "attn", "q", "norm", "temporal_encoder", "train", "keys", "default"])
def test_names_that_peft_would_mix_up_are_refused(make_encoder, name):
    with pytest.raises(ConfigError, match="choose another"):
        MultiTaskModel(make_encoder(), {name: 2}, lora=LORA)


def test_an_encoder_that_lacks_a_layer_is_refused(make_encoder):
    encoder = make_encoder()
    encoder.blocks[1].mlp1 = encoder.blocks[1].fc1
    del encoder.blocks[1].fc1
    with pytest.raises(ConfigError, match=r"the encoder has no blocks\.1\.fc1; name"):
        MultiTaskModel(encoder, OUTPUTS, lora=LORA)
    MultiTaskModel(encoder, OUTPUTS, lora=LORA.model_copy(update={"targets": "attention"}))


def test_adapter_is_loaded_strictly(model):
    tensors = dict(model.adapter_tensors("rhythm"))
    first = next(iter(tensors))
    for wrong in (
        {key: value for key, value in tensors.items() if key != first},
        {**tensors, "extra": torch.zeros(1)},
        {**tensors, first: torch.zeros(1, 1)},
    ):
        with pytest.raises(ContractError, match="belongs to another model"):
            model.load_adapter("rhythm", wrong)
    model.load_adapter("staging", tensors)
    assert all(torch.equal(model.adapter_tensors("staging")[key], value) for key, value in tensors.items())
    with pytest.raises(ContractError, match="is missing"):
        load_strict("head", model.heads["staging"], {})


def test_stock_peft_reads_an_adapter_file(model, make_encoder, tmp_path):
    model.peft.peft_config["rhythm"].save_pretrained(str(tmp_path))
    save_file(model.adapter_tensors("rhythm"), str(tmp_path / "adapter_model.safetensors"), {"format": "pt"})
    stock = peft.PeftModel.from_pretrained(make_encoder(), str(tmp_path)).eval()
    model.eval().activate("rhythm")
    with torch.no_grad():
        np.testing.assert_array_equal(stock(batch()).pooled_BD, model.peft(batch()).pooled_BD)
