"""What adapters are held against, each on the run of an adapter: what it trains, and that it learns."""

import copy

import pytest
import torch
from pydantic import ValidationError

from adapters.baselines import ExpertModel, SharedModel, pooled_tokens
from adapters.build import METHODS, build_task_model
from adapters.bundle import write_bundle
from adapters.checkpoint import copy_trainable
from adapters.config import AdaptConfig
from adapters.guards import probe_batch
from adapters.model import MultiTaskModel
from adapters.train import adapt
from adapters.update import build_optimizer
from manifests.errors import ConfigError
from trainer.models.build import build_encoder
from trainer.models.univariate import UnivariateEncoderConfig

OUTPUTS = {"staging": 5, "rhythm": 4}


def experts_of(make_encoder, *, own: int = 0, experts: int = 3) -> ExpertModel:
    return ExpertModel(make_encoder(), OUTPUTS, experts=experts, task_experts=own)


def moved(model, *tasks: str) -> set[str]:
    """Names of what one step on tasks moves."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    optimizer = torch.optim.SGD(model.trainable().values(), lr=0.1)
    for task in tasks:
        model.train()(task, probe_batch(make_probe(model))).square().sum().backward()
    optimizer.step()
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


def make_probe(model) -> torch.nn.Module:
    return model.experts[0] if isinstance(model, ExpertModel) else model.encoder


def test_the_methods_of_the_configuration_are_those_that_can_be_built():
    annotation = AdaptConfig.model_fields["method"].annotation
    assert set(annotation.__args__) == set(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_every_trained_weight_has_a_learning_rate(make_config, make_encoder, method):
    config = make_config(method=method, tasks=make_config().tasks[:1])
    model = build_task_model(config, make_encoder(), OUTPUTS)
    groups = {model.group(name) for name in model.trainable()}
    expected = {"lora": {"lora", "head", "temporal"}, "linear_probe": {"head"}}
    assert groups == expected.get(method, {"encoder", "head", "temporal"})
    grouped = [id(p) for group in build_optimizer(config, model).param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.trainable().values())


def test_a_frozen_probe_trains_heads_alone_and_sees_no_dropout(make_encoder):
    model = SharedModel(make_encoder(), OUTPUTS, is_frozen=True)
    model.encoder.blocks[0].dropout.p = 0.5
    batch = probe_batch(model.encoder)
    model.train()
    assert torch.equal(model("staging", batch), model("staging", batch))
    assert model.heads.training
    assert moved(model, "staging") == {name for name in model.state_dict() if name.startswith("heads.staging.")}


def test_hard_sharing_trains_one_encoder_with_every_task(make_encoder):
    model = SharedModel(make_encoder(), OUTPUTS, is_frozen=False)
    model.encoder.blocks[0].dropout.p = 0.5
    batch = probe_batch(model.encoder)
    assert not torch.equal(model.train()("staging", batch), model("staging", batch))
    for task, other in (("staging", "rhythm"), ("rhythm", "staging")):
        names = moved(model, task)
        assert any(name.startswith("encoder.blocks.1.") for name in names)
        assert any(name.startswith("encoder.temporal_encoder.") for name in names)
        assert not any(name.startswith(f"heads.{other}.") for name in names)


def test_experts_start_as_the_pretrained_encoder_and_share_its_temporal_encoder(make_encoder):
    model = experts_of(make_encoder, own=2).eval()
    all_experts = [*model.experts, *model.own["staging"], *model.own["rhythm"]]
    assert len(all_experts) == 3 + 2 * 2
    batch = probe_batch(make_encoder())
    with torch.no_grad():
        expected = make_encoder().eval()(batch).pooled_BD
        assert all(torch.equal(expert(batch).pooled_BD, expected) for expert in all_experts)
        # A mean of equal vectors, whatever the gate says.
        torch.testing.assert_close(model("staging", batch), model.heads["staging"](expected), rtol=0, atol=1e-5)
    assert len({id(expert.temporal_encoder) for expert in all_experts}) == 1
    assert len({id(expert.blocks[0].fc1.weight) for expert in all_experts}) == len(all_experts)


def test_logits_are_the_head_of_the_gated_mean_of_experts(make_encoder):
    """By hand: softmax of a linear map of the pooled tokens weighs what shared and own experts say."""
    model = experts_of(make_encoder, own=1).eval()
    with torch.no_grad():
        for index, expert in enumerate([*model.experts, *model.own["rhythm"]]):
            expert.blocks[0].fc1.weight.mul_(1 + index)
        batch = probe_batch(make_encoder())
        tokens = model.experts[0].temporal_tokens(batch)
        mean = tokens.reshape(2, 3, -1, 16).mean(dim=(1, 2))  # all three channels of both windows are real
        gate = model.gates["rhythm"](mean).softmax(dim=1)
        features = [expert(batch).pooled_BD for expert in [*model.experts, *model.own["rhythm"]]]
        mixed = sum(gate[:, [index]] * feature for index, feature in enumerate(features))
        torch.testing.assert_close(model("rhythm", batch), model.heads["rhythm"](mixed), rtol=1e-5, atol=1e-6)
    assert gate.shape == (2, 4)


@pytest.mark.parametrize("own", [0, 1], ids=["mmoe", "cgc"])
def test_a_task_trains_shared_experts_and_only_its_own(make_encoder, own):
    model = experts_of(make_encoder, own=own)
    names = moved(model, "staging")
    assert all(any(name.startswith(f"experts.{index}.blocks.") for name in names) for index in range(3))
    assert any(name.startswith("own.staging.0.blocks.") for name in names) == bool(own)
    assert not any(".rhythm." in name for name in names)


def test_gates_tell_experts_apart(make_encoder):
    """They start equal; were they to stay so, there would be one expert and no more."""
    model = experts_of(make_encoder)
    assert torch.equal(model.experts[0].blocks[0].fc1.weight, model.experts[1].blocks[0].fc1.weight)
    moved(model, *OUTPUTS)
    assert not torch.equal(model.experts[0].blocks[0].fc1.weight, model.experts[1].blocks[0].fc1.weight)
    moved(model, *OUTPUTS)
    gate = model.gates["staging"].weight.grad
    assert gate.abs().max() > 0  # and by then the gate has something to choose from


def test_pooled_tokens_leave_padding_out(make_encoder):
    batch = probe_batch(make_encoder())
    padded = copy.copy(batch)
    padded.mask_BC = batch.mask_BC.clone()
    padded.mask_BC[0, 1:] = False
    alone = copy.copy(batch)
    for name in ("signal_BCT", "mask_BC", "anode_BC", "cathode_BC", "kind_BC"):
        setattr(alone, name, getattr(batch, name)[:1, :1])
    encoder = make_encoder().eval()
    with torch.no_grad():
        mixed = pooled_tokens(encoder.temporal_tokens(padded), padded.mask_BC)
        single = pooled_tokens(encoder.temporal_tokens(alone), alone.mask_BC)
    torch.testing.assert_close(mixed[:1], single, rtol=0, atol=1e-6)


def test_univariate_encoders_can_be_experts():
    config = UnivariateEncoderConfig(width=16, depth=1, num_heads=2, num_tokens=4, conv_channels=(4, 8, 16))
    model = ExpertModel(build_encoder(config), OUTPUTS, experts=2, task_experts=1)
    assert model("staging", probe_batch(model.experts[0])).shape == (2, 5)


@pytest.mark.parametrize("task", ["train", "keys"])
def test_names_of_torch_are_refused_for_heads(make_encoder, task):
    for build in (
        lambda: SharedModel(make_encoder(), {task: 2}, is_frozen=True),
        lambda: ExpertModel(make_encoder(), {task: 2}, experts=1, task_experts=1),
    ):
        with pytest.raises(ConfigError, match="torch has an attribute of this name"):
            build()


@pytest.mark.parametrize(("method", "steps"), [("hps", 40), ("cgc", 40), ("mmoe", 2), ("linear_probe", 2)])
def test_a_run_learns_both_tasks_and_is_read_back(make_config, tmp_path, method, steps):
    config = make_config(
        method=method, steps=steps, log_every=1, eval_every=steps, checkpoint_every=steps, keep="last", experts=2
    )
    rows = []
    result = adapt(config, report=rows.append)
    if steps > 2:
        for name in ("sleep_staging", "rhythm"):
            entry = result.scores[name]["test"]["metrics"]["balanced_accuracy"]
            assert entry["value"] > entry["chance"] + 0.3, (name, entry)
    assert all(set(row["loss"]) == {"sleep_staging", "rhythm"} for row in rows if row["split"] == "train")
    again = adapt(config)
    assert again.scores == result.scores
    expected, got = copy_trainable(result.model), copy_trainable(again.model)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    with pytest.raises(ConfigError, match=f"method: {method} .* makes no bundle: a bundle is a frozen base"):
        write_bundle(result, tmp_path / "bundle")


def test_full_fine_tuning_is_of_one_task(make_config, tmp_path):
    with pytest.raises(ValidationError, match="method full trains one task, there are 2; give one task, or take hps"):
        make_config(method="full")
    config = make_config(method="full", tasks=make_config().tasks[1:], steps=2, eval_every=2, checkpoint_every=2)
    result = adapt(config)
    assert list(result.scores) == ["rhythm"]
    assert isinstance(result.model, SharedModel)
    assert isinstance(build_task_model(make_config(), make_probe(result.model), OUTPUTS), MultiTaskModel)


def test_a_frozen_temporal_encoder_goes_with_adapters(make_config):
    with pytest.raises(ValidationError, match="temporal frozen goes with method lora, not with hps; leave it out"):
        make_config(method="hps", temporal="frozen")
    config = make_config(temporal="frozen", steps=2, eval_every=2, checkpoint_every=2)
    assert {name.split(".")[0] for name in adapt(config).model.trainable()} == {"peft", "heads"}
    assert not any("temporal" in name for name in adapt(config).model.trainable())
