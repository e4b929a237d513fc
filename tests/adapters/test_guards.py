"""Failures of adapters that come without an error, each measured once (research: peft_hub), each held here."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn.functional import linear, scaled_dot_product_attention

from adapters import guards
from adapters.build import build_task_model
from adapters.config import LoraSpec
from adapters.fused import FusedAttention
from adapters.guards import check_adapters, probe_batch
from adapters.model import MultiTaskModel, load_strict
from adapters.train import adapt
from adapters.update import Update
from manifests.errors import ConfigError, ContractError
from trainer.batches import ChannelBatch
from trainer.models.attention import Attention, split_heads
from trainer.models.build import build_encoder
from trainer.models.sleep import SleepEncoderConfig
from trainer.models.univariate import UnivariateEncoderConfig

OUTPUTS = {"staging": 5, "rhythm": 4}
LORA = LoraSpec(r=4, dropout=0.0)
SIZES = {"width": 16, "depth": 2, "num_heads": 2}
CONFIGS = {
    "sleep": SleepEncoderConfig(**SIZES),
    "checkpointed": SleepEncoderConfig(**SIZES, checkpoint_blocks=True),
    "univariate": UnivariateEncoderConfig(**SIZES, num_tokens=4, conv_channels=(4, 8, 16)),
}


def encoder_of(kind: str = "sleep", *, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_encoder(CONFIGS[kind])


def adapted_model(encoder: nn.Module | None = None, *, lora: LoraSpec = LORA, seed: int = 0) -> MultiTaskModel:
    """A model whose adapters do something: B starts at zero."""
    model = MultiTaskModel(encoder_of() if encoder is None else encoder, OUTPUTS, lora=lora, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for task in OUTPUTS:
            for parameter in model.adapter_parameters(task).values():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


# An adapter without gradient or effect


class PastTheLayer(FusedAttention):
    """Reads the weight of qkv as LaBraM's published code does, past an adapter on it."""

    def project(self, tokens_BLD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return linear(tokens_BLD, self.qkv.weight, self.qkv.bias).chunk(3, dim=-1)


class PastTheLayerInEvaluation(Attention):
    """Right in training; in evaluation it reads the weights of v."""

    def project(self, tokens_BLD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if torch.is_grad_enabled():
            return super().project(tokens_BLD)
        return self.q(tokens_BLD), self.k(tokens_BLD), linear(tokens_BLD, self.v.weight, self.v.bias)


class WithoutUse(Attention):
    """Calls k as it should, and then computes with something else."""

    def forward(self, tokens_BLD: torch.Tensor, mask_BL: torch.Tensor | None = None) -> torch.Tensor:
        assert mask_BL is None
        query, _, value = (split_heads(part, self.num_heads) for part in self.project(tokens_BLD))
        return self.o(scaled_dot_product_attention(query, query.detach(), value).transpose(1, 2).flatten(2))


class StockBlock(nn.TransformerEncoderLayer):
    """torch's own layer, whose feed-forward linears are called fc1 and fc2; its kernel in evaluation reads weights."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 2, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.fc1, self.fc2 = self.linear1, self.linear2
        del self.linear1, self.linear2

    @property
    def linear1(self) -> nn.Module:
        return self.fc1

    @property
    def linear2(self) -> nn.Module:
        return self.fc2

    def forward(self, tokens_BLD: torch.Tensor, mask_BL: torch.Tensor | None = None) -> torch.Tensor:
        assert mask_BL is None
        return super().forward(tokens_BLD)


def broken(attention: type[Attention], encoder: nn.Module) -> nn.Module:
    """The encoder with its second block's attention of another class, weights as before."""
    old = encoder.blocks[1].attn
    new = attention(old) if issubclass(attention, FusedAttention) else attention(16, num_heads=2)
    if not isinstance(new, FusedAttention):
        new.load_state_dict(old.state_dict())
    encoder.blocks[1].attn = new
    return encoder


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("attn", ["split", "fused"])
def test_adapters_of_sound_encoders_pass_and_are_left_as_they_were(kind, attn):
    model = MultiTaskModel(encoder_of(kind), OUTPUTS, lora=LORA.model_copy(update={"attn": attn}))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    check_adapters(model)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any("forward" in vars(layer) for layer in model.adapted_layers().values())


def test_an_encoder_that_computes_past_the_layer_is_refused_by_name():
    encoder = broken(PastTheLayer, encoder_of())
    model = MultiTaskModel(encoder, OUTPUTS, lora=LORA.model_copy(update={"attn": "fused"}))
    with pytest.raises(
        ConfigError, match=r"task staging get no gradient on blocks\.1\.attn\.qkv: the encoder"
    ) as error:
        check_adapters(model)
    assert "blocks.0" not in str(error.value)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_encoder_that_computes_past_the_layer_in_evaluation_only_is_refused():
    model = MultiTaskModel(broken(PastTheLayerInEvaluation, encoder_of()), OUTPUTS, lora=LORA)
    with pytest.raises(ConfigError, match=r"change nothing in evaluation on blocks\.1\.attn\.v: "):
        check_adapters(model)


def test_an_adapter_whose_result_is_not_used_is_refused():
    model = MultiTaskModel(broken(WithoutUse, encoder_of()), OUTPUTS, lora=LORA)
    with pytest.raises(ConfigError, match=r"get no gradient on blocks\.1\.attn\.k: "):
        check_adapters(model)


def test_the_fast_path_of_torch_transformer_layers_is_refused():
    encoder = encoder_of()
    encoder.blocks = nn.ModuleList(StockBlock(16) for _ in range(2))
    model = MultiTaskModel(encoder, OUTPUTS, lora=LORA.model_copy(update={"targets": "feed_forward"}))
    named = r"blocks\.0\.fc1, blocks\.0\.fc2, blocks\.1\.fc1, blocks\.1\.fc2: "
    with pytest.raises(ConfigError, match="change nothing in evaluation on " + named):
        check_adapters(model)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        check_adapters(model)  # it is that path alone
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_an_adapter_that_was_frozen_is_refused():
    model = MultiTaskModel(encoder_of(), OUTPUTS, lora=LORA)
    model.peft.set_adapter("staging")  # freezes all others
    with pytest.raises(ConfigError, match=r"task rhythm are missing or frozen on blocks\.0\.attn\.q, .* and 8 more"):
        check_adapters(model)


def test_a_run_asks_before_its_first_step(make_config):
    with pytest.raises(ConfigError, match="change nothing in evaluation"):
        build_task_model(make_config(), broken(PastTheLayerInEvaluation, encoder_of()), OUTPUTS)


def test_half_of_a_fresh_adapter_gets_no_gradient_which_is_why_the_probe_moves_it(monkeypatch):
    monkeypatch.setattr(guards, "NOISE", 0.0)
    with pytest.raises(ConfigError, match="get no gradient"):
        check_adapters(MultiTaskModel(encoder_of(), OUTPUTS, lora=LORA))


# What switching may do


def test_the_shared_encoder_is_one_for_all_adapters():
    encoder = encoder_of()
    own = list(encoder.temporal_encoder.parameters())
    model = MultiTaskModel(encoder, OUTPUTS, lora=LORA)
    found = {id(p) for name, p in model.named_parameters() if "temporal_encoder" in name}
    assert found == {id(parameter) for parameter in own}
    assert not any("modules_to_save" in name for name, _ in model.named_modules())
    batch = probe_batch(encoder)
    for task in OUTPUTS:
        before = [parameter.grad.clone() if parameter.grad is not None else 0 for parameter in own]
        model(task, batch).square().sum().backward()
        assert all(not torch.equal(p.grad, torch.as_tensor(b)) for p, b in zip(own, before, strict=True))


def test_switching_flips_no_requires_grad_and_loses_no_gradient():
    model = adapted_model()
    batch = probe_batch(model.encoder)
    trainable = set(model.trainable())
    separate = {}
    for task in OUTPUTS:
        model(task, batch).square().sum().backward()
        separate |= {name: p.grad.clone() for name, p in model.adapter_parameters(task).items()}
        assert set(model.trainable()) == trainable
    model.zero_grad(set_to_none=True)
    losses = [model(task, batch).square().sum() for task in OUTPUTS]
    sum(losses).backward()
    for task in OUTPUTS:
        for name, parameter in model.adapter_parameters(task).items():
            torch.testing.assert_close(parameter.grad, separate[name], rtol=0, atol=1e-5)
    assert set(model.trainable()) == trainable


@pytest.mark.parametrize("together", [False, True], ids=["a backward pass per task", "one for both"])
@pytest.mark.parametrize("kind", ["sleep", "univariate"])
def test_checkpointing_gives_the_same_gradients(kind, together):
    """Blocks are computed again in the backward pass: with the adapter of their task, not with the active one."""
    plain = encoder_of(kind)
    again = build_encoder(CONFIGS[kind].model_copy(update={"checkpoint_blocks": True}))
    again.load_state_dict(plain.state_dict())
    assert again.config.checkpoint_blocks
    gradients = []
    for encoder in (plain, again):
        model = adapted_model(encoder).train()
        losses = []
        for task in OUTPUTS:
            losses.append(model(task, probe_batch(encoder)).square().sum())
            if not together:
                losses[-1].backward()
        if together:
            sum(losses).backward()
        gradients.append({name: parameter.grad for name, parameter in model.trainable().items()})
    expected, got = gradients
    assert all(expected[name].any() for name in expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-6)


def test_binding_blocks_to_a_task_leaves_no_trace():
    model = adapted_model().train()
    names = [name for name, _ in model.named_parameters()]
    blocks = model.encoder.blocks
    model("staging", probe_batch(model.encoder)).sum().backward()
    assert model.encoder.blocks is blocks
    assert [name for name, _ in model.named_parameters()] == names
    with pytest.raises(AttributeError):
        model("staging", None)
    assert model.encoder.blocks is blocks


def test_threads_that_switch_adapters_get_the_outputs_of_one_thread():
    """Without the lock 66 of 80 were wrong."""
    model = adapted_model().eval()
    batches = {task: probe_batch(model.encoder) for task in OUTPUTS}
    with torch.no_grad():
        expected = {task: model(task, batch) for task, batch in batches.items()}
    assert (expected["staging"][:, :4] - expected["rhythm"]).abs().max() > 1e-3
    start = threading.Barrier(4)

    def serve(index: int) -> list[tuple[str, torch.Tensor]]:
        start.wait()
        with torch.no_grad():
            order = [list(OUTPUTS)[(index + turn) % 2] for turn in range(20)]
            return [(task, model(task, batches[task])) for task in order]

    with ThreadPoolExecutor(4) as pool:
        answers = [answer for found in pool.map(serve, range(4)) for answer in found]
    assert len(answers) == 80
    assert all(torch.equal(output, expected[task]) for task, output in answers)


def test_no_thread_can_come_between_activation_and_the_end_of_a_forward_pass():
    model = adapted_model().eval()
    batch = probe_batch(model.encoder)
    entered = []

    def from_another_thread(*_: object) -> None:
        with ThreadPoolExecutor(1) as pool:
            entered.append(pool.submit(model._lock.acquire, blocking=False).result())

    for place in (model.encoder.blocks[0], model.heads["staging"]):
        place.register_forward_hook(from_another_thread)
    with torch.no_grad():
        model("staging", batch)
    assert entered == [False, False]
    from_another_thread()
    assert entered[2]  # and afterwards it is free


# Tasks that are absent from a step


def test_no_task_is_absent_from_a_step_so_no_gradient_is_stale(make_config):
    """Under ZeRO a weight without a new gradient is moved all the same: by momentum, or by the old gradient again.

    What holds for every update: a step forgets all gradients, runs every task, and gives every weight a new one.
    """
    seen: list[list[str]] = []

    class Watched(Update):
        def begin(self, step: int) -> None:
            super().begin(step)
            assert all(parameter.grad is None for parameter in self.model.parameters())
            seen.append([])

        def forward(self, name: str, batch: ChannelBatch) -> torch.Tensor:
            seen[-1].append(name)
            return super().forward(name, batch)

        def finish(self) -> float:
            assert all(parameter.grad is not None for parameter in self.model.trainable().values())
            return super().finish()

    config = make_config(
        sampling={"alpha": 1.0, "batch": 2}, steps=3, eval_every=9, checkpoint_every=9, eval_windows=16, keep="last"
    )
    adapt(config, update=Watched)
    assert seen == [["sleep_staging", "rhythm"]] * 3


# Names


@pytest.mark.parametrize("task", ["fc1", "blocks", "attn", "lora_A", "base_layer", "lora", "ora", "weight", "qkv"])
def test_task_names_that_collide_with_modules_are_refused(task):
    with pytest.raises(ConfigError, match="choose another"):
        MultiTaskModel(encoder_of(), {"staging": 5, task: 2}, lora=LORA)


@pytest.mark.parametrize("kind", ["ia3", "vera"])
def test_task_names_are_held_against_the_method_that_is_used(kind):
    name = {"ia3": "ia3", "vera": "lambda"}[kind]
    with pytest.raises(ConfigError, match="choose another"):
        MultiTaskModel(encoder_of(), {name: 2}, lora=LoraSpec(kind=kind))
    MultiTaskModel(encoder_of(), {name: 2}, lora=LORA)


# Loads


def test_every_adapter_is_saved_whole():
    model = adapted_model()
    for task in OUTPUTS:
        tensors = model.adapter_tensors(task)
        assert len(tensors) == 2 * len(model.adapted_layers()) == 2 * 2 * 6
        assert len(tensors) == len(model.adapter_parameters(task))


@pytest.mark.parametrize("part", ["adapter", "head", "shared encoder"])
@pytest.mark.parametrize("fault", ["is missing", "is not expected", "has shape"])
def test_tensors_are_loaded_strictly_and_all_or_none(part, fault):
    """PEFT takes what it finds. Files with a right hash and wrong tensors, and a wrong base: test_bundle."""
    model = adapted_model()
    of_part = {
        "adapter": (model.adapter_tensors("rhythm"), lambda t: model.load_adapter("rhythm", t)),
        "head": (model.heads["rhythm"].state_dict(), lambda t: load_strict("head", model.heads["rhythm"], t)),
        "shared encoder": (model.shared.state_dict(), lambda t: load_strict("shared", model.shared, t)),
    }
    tensors, put = of_part[part]
    tensors = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    first = next(iter(tensors))
    wrong = {
        "is missing": {name: tensor for name, tensor in tensors.items() if name != first},
        "is not expected": {**tensors, "of.another.model": torch.zeros(1)},
        "has shape": {**tensors, first: torch.zeros(3, 3, 3, 3)},
    }[fault]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ContractError, match=f"{fault}.*belongs to another model"):
        put(wrong)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    put(tensors)
    assert not all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
