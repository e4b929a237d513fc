"""Every PEFT method of the list on two tasks of one base: trains, keeps tasks apart, comes back from a file."""

import json
from typing import get_args

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from safetensors.torch import load, save, save_file

from adapters.bundle import write_bundle
from adapters.config import REFUSED_KINDS, LoraSpec, PeftKind
from adapters.fused import FusedAttention, fuse_attention
from adapters.guards import check_adapters, probe_batch
from adapters.methods import METHODS, peft_config, required_config
from adapters.model import MultiTaskModel
from adapters.train import adapt
from manifests.errors import ConfigError, ContractError
from trainer.models.build import build_encoder
from trainer.models.sleep import SleepEncoderConfig

OUTPUTS = {"staging": 5, "rhythm": 4}
KINDS = tuple(METHODS)


def spec(kind: str = "lora", **changes) -> LoraSpec:
    return LoraSpec.model_validate({"kind": kind, "r": 4, "dropout": 0.0, **changes})


def build(make_encoder, lora: LoraSpec, *, seed: int = 0, **options) -> MultiTaskModel:
    return MultiTaskModel(make_encoder(), OUTPUTS, lora=lora, seed=seed, **options)


def trained(model: MultiTaskModel, *tasks: str, steps: int = 2) -> MultiTaskModel:
    optimizer = torch.optim.SGD(model.trainable().values(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        for task in tasks:
            (model(task, probe_batch(model.encoder)) - 1).square().mean().backward()
        optimizer.step()
    return model.eval()


def test_the_list_is_that_of_the_configuration():
    assert get_args(PeftKind) == KINDS
    assert not set(KINDS) & set(REFUSED_KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_leaves_the_encoder_as_it_was(make_encoder, kind):
    encoder = make_encoder()
    batch = probe_batch(encoder)
    with torch.no_grad():
        before = encoder(batch).pooled_BD
        model = MultiTaskModel(encoder, OUTPUTS, lora=spec(kind)).eval()
        for task in OUTPUTS:
            model.activate(task)
            torch.testing.assert_close(model.peft(batch).pooled_BD, before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_training_one_task_moves_its_adapter_alone(make_encoder, kind):
    model = build(make_encoder, spec(kind), temporal="frozen")
    check_adapters(model)
    frozen = model.frozen_digest()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        rhythm = model.eval()("rhythm", probe_batch(model.encoder))
    trained(model.train(), "staging")
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    own = set(model.adapter_parameters("staging"))
    assert own & moved
    assert moved <= own | {name for name in before if name.startswith("heads.staging.")}
    assert model.frozen_digest() == frozen
    with torch.no_grad():
        assert torch.equal(model("rhythm", probe_batch(model.encoder)), rhythm)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_come_back_from_a_file_and_from_it_alone(make_encoder, kind):
    model = trained(build(make_encoder, spec(kind), temporal="frozen"), *OUTPUTS)
    fresh = build(make_encoder, spec(kind), temporal="frozen", seed=5).eval()
    batch = probe_batch(model.encoder)
    for task in OUTPUTS:
        content = load(save({name: t.contiguous() for name, t in model.adapter_tensors(task).items()}))
        for wrong in ({**content, "extra": torch.zeros(1)}, dict(list(content.items())[1:])):
            with pytest.raises(ContractError, match="belongs to another model"):
                fresh.load_adapter(task, wrong)
        fresh.load_adapter(task, content)
        fresh.heads[task].load_state_dict(model.heads[task].state_dict())
    with torch.no_grad():
        outputs = {task: model(task, batch) for task in OUTPUTS}
        assert all(torch.equal(fresh(task, batch), outputs[task]) for task in OUTPUTS)


@pytest.mark.parametrize("kind", KINDS)
def test_stock_peft_reads_the_file(make_encoder, tmp_path, kind):
    model = trained(build(make_encoder, spec(kind), temporal="frozen"), *OUTPUTS)
    model.peft.peft_config["rhythm"].save_pretrained(str(tmp_path))
    tensors = {name: tensor.contiguous() for name, tensor in model.adapter_tensors("rhythm").items()}
    save_file(tensors, str(tmp_path / "adapter_model.safetensors"))
    stock = peft.PeftModel.from_pretrained(make_encoder(), str(tmp_path)).eval()
    batch = probe_batch(model.encoder)
    model.activate("rhythm")
    with torch.no_grad():
        assert torch.equal(stock(batch).pooled_BD, model.peft(batch).pooled_BD)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    required = required_config(model.lora["rhythm"])
    assert {key: said.get(key) for key in required} == required


@pytest.mark.parametrize("other", [spec("dora"), spec(r=8), spec(alpha=8), spec(targets="attention"), spec("ia3")])
def test_the_required_configuration_tells_adapters_apart(other):
    assert required_config(other) != required_config(spec())


@pytest.mark.parametrize("kind", REFUSED_KINDS)
def test_methods_that_do_not_suit_a_shared_base_are_refused_with_the_reason(kind):
    with pytest.raises(ValidationError, match=REFUSED_KINDS[kind][:30]):
        spec(kind)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_the_reason_holds_such_methods_change_the_base_and_each_other(make_encoder, start):
    """What would be lost: if PEFT stops writing into the base, this fails and the method can be allowed."""
    batch = probe_batch(make_encoder())
    config = LoraConfig(r=4, target_modules=spec().pattern, init_lora_weights=start)
    model = get_peft_model(make_encoder(), config, adapter_name="staging").eval()
    with torch.no_grad():
        alone = model(batch).pooled_BD
        with model.disable_adapter():
            off = model(batch).pooled_BD
        assert (off - make_encoder()(batch).pooled_BD).abs().max() > 1e-3
        model.add_adapter("rhythm", config)
        assert (model(batch).pooled_BD - alone).abs().max() > 1e-3


def test_tasks_of_two_kinds_are_refused(make_encoder):
    for field, value in (("kind", "dora"), ("attn", "fused")):
        specs = {"staging": spec(), "rhythm": spec().model_copy(update={field: value})}
        with pytest.raises(ConfigError, match=rf"lora\.{field}: staging: \w+, rhythm: {value}; .* have one {field}"):
            MultiTaskModel(make_encoder(), OUTPUTS, lora=specs)
    model = MultiTaskModel(make_encoder(), OUTPUTS, lora={"staging": spec(), "rhythm": spec(r=8)})
    assert {len(p) for n, p in model.adapter_parameters("rhythm").items() if "lora_A" in n} == {8}


@pytest.mark.parametrize(
    ("attn", "targets", "layers"),
    [
        ("split", "both", {"attn.q", "attn.k", "attn.v", "attn.o", "fc1", "fc2"}),
        ("split", "attention", {"attn.q", "attn.k", "attn.v", "attn.o"}),
        ("fused", "both", {"attn.qkv", "attn.o", "fc1", "fc2"}),
        ("fused", "attention", {"attn.qkv", "attn.o"}),
        ("split", "feed_forward", {"fc1", "fc2"}),
        ("fused", "feed_forward", {"fc1", "fc2"}),
    ],
)
def test_targets_are_the_chosen_layers_of_every_block(make_encoder, attn, targets, layers):
    model = build(make_encoder, spec(attn=attn, targets=targets))
    assert set(model.adapted_layers()) == {f"blocks.{index}.{layer}" for index in range(2) for layer in layers}
    check_adapters(model)
    assert isinstance(model.encoder.blocks[0].attn, FusedAttention) == ("attn.qkv" in layers)


@pytest.mark.parametrize("width", [16, 200])
def test_fused_attention_has_the_same_weights_and_output(width):
    torch.manual_seed(0)
    encoder = build_encoder(SleepEncoderConfig(width=width, depth=2, num_heads=2)).eval()
    batch = probe_batch(encoder)
    split = [torch.cat([getattr(block.attn, part).weight for part in "qkv"]) for block in encoder.blocks]
    with torch.no_grad():
        before = encoder(batch).pooled_BD
        fuse_attention(encoder.blocks)
        assert all(torch.equal(block.attn.qkv.weight, own) for block, own in zip(encoder.blocks, split, strict=True))
        assert {name for name, _ in encoder.blocks[0].attn.named_modules()} == {"", "qkv", "o"}
        # One product instead of three may be summed in another order.
        torch.testing.assert_close(encoder(batch).pooled_BD, before, rtol=0, atol=1e-6)
        first = encoder.blocks[0].attn.qkv
        fuse_attention(encoder.blocks)
        assert encoder.blocks[0].attn.qkv is first
        first.weight[0] *= -1  # it is the joint layer that computes
        assert (encoder(batch).pooled_BD - before).abs().max() > 1e-4


def test_attention_without_q_k_and_v_cannot_be_fused(make_encoder):
    encoder = make_encoder()
    encoder.blocks[1].attn = torch.nn.Identity()
    with pytest.raises(ConfigError, match=r"blocks\.1\.attn is a Identity without q, k and v"):
        build(lambda: encoder, spec(attn="fused"))


@pytest.mark.parametrize(("attn", "per_layer"), [("fused", 16), ("split", 18)])
def test_six_tasks_on_the_sizes_of_labram_base_have_as_many_parameters_as_published(attn, per_layer):
    """MTEEG, table of parameters: 1.8 M. Per layer r D times 4 (qkv), 2 (o), 5 (fc1), 5 (fc2); 6 for q, k, v."""
    width, depth, rank, tasks = 200, 12, 8, 6
    encoder = build_encoder(SleepEncoderConfig(width=width, depth=depth, num_heads=10, hidden_ratio=4))
    temporal = sum(parameter.numel() for parameter in encoder.temporal_encoder.parameters())
    outputs = {f"task_{index}": classes for index, classes in enumerate((2, 6, 5, 2, 5, 5))}
    model = MultiTaskModel(encoder, outputs, lora=LoraSpec(r=rank, attn=attn))
    adapters = per_layer * rank * width * depth * tasks
    assert adapters == {"fused": 1_843_200, "split": 2_073_600}[attn]
    heads = sum(2 * width + (width + 1) * classes for classes in outputs.values())  # a norm and a linear layer
    assert sum(parameter.numel() for parameter in model.trainable().values()) == adapters + temporal + heads
    groups = {"lora": 0, "head": 0, "temporal": 0}
    for name, parameter in model.trainable().items():
        groups[model.group(name)] += parameter.numel()
    assert groups == {"lora": adapters, "head": heads, "temporal": temporal}


def test_a_frozen_temporal_encoder_is_not_trained(make_encoder):
    model = build(make_encoder, spec(), temporal="frozen")
    assert {model.group(name) for name in model.trainable()} == {"lora", "head"}
    before = [parameter.clone() for parameter in model.shared.parameters()]
    trained(model, *OUTPUTS)
    assert all(torch.equal(a, b) for a, b in zip(before, model.shared.parameters(), strict=True))


def test_peft_config_takes_rank_scale_and_dropout():
    config = peft_config(LoraSpec(r=32, alpha=64, dropout=0.1))
    assert (config.r, config.lora_alpha, config.lora_dropout) == (32, 64, 0.1)
    assert peft_config(spec("rslora")).use_rslora
    assert peft_config(spec("dora")).use_dora


@pytest.mark.parametrize("lora", [spec("dora", attn="fused"), spec("vera"), spec("ia3", targets="attention")])
def test_a_bundle_holds_any_kind(make_config, tmp_path, lora):
    config = make_config(lora=lora.model_dump(), steps=1, eval_every=9, keep="last", eval_windows=16)
    result = adapt(config)
    bundle = write_bundle(result, tmp_path / "bundle")  # it is read back, and its expected logits are computed again
    assert {record.lora for record in bundle.records.values()} == {lora}
    for task in result.tasks:
        own, read = result.adapters().adapter_tensors(task), bundle.model.adapter_tensors(task)
        assert own.keys() == read.keys()
        assert all(torch.equal(own[name], read[name]) for name in own)
