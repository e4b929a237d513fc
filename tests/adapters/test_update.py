"""What a step does to weights: the loss, the gradients of several tasks, what is left alone."""

import math
from collections.abc import Callable
from itertools import pairwise, repeat

import pytest
import torch
from torch.nn import functional

from adapters import train
from adapters.checkpoint import copy_trainable
from adapters.config import AdaptConfig
from adapters.model import MultiTaskModel
from adapters.sampling import Share
from adapters.stream import labelled_batches
from adapters.train import adapt, load_data, share_out, train_step
from adapters.update import LabelledBatch, Update, loss_weight, rate_factor, summed_loss
from manifests.errors import ConfigError
from manifests.tasks import load_task
from trainer.export import load_encoder

MakeConfig = Callable[..., AdaptConfig]
NO_DROPOUT = {"lora": {"r": 4, "dropout": 0.0}}


@pytest.fixture
def first_step(make_config: MakeConfig) -> Callable[..., tuple[Update, dict[str, LabelledBatch], dict[str, Share]]]:
    """Makes an update with a fresh model, and the first batch of each task."""

    def make(**changes) -> tuple[Update, dict[str, LabelledBatch], dict[str, Share]]:
        config = make_config(**{**NO_DROPOUT, **changes})
        data = load_data(config)
        outputs = {name: len(item.task.labels) for name, item in data.items()}
        model = MultiTaskModel(load_encoder(config.encoder), outputs, lora=config.lora, seed=1)
        with torch.no_grad():  # as if trained for a while: LoRA starts with B = 0, below which A has no gradient
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
        parts = share_out(config, data)
        batches = {}
        for name, item in data.items():
            stream = labelled_batches(item, parts[name], seed=1, start=0)
            batches[name] = next(stream)
            stream.close()
        return Update(config, model, num_tasks=len(data)), batches, parts

    return make


def gradients(update: Update) -> dict[str, torch.Tensor | None]:
    found = update.model.trainable().items()
    return {name: None if parameter.grad is None else parameter.grad.clone() for name, parameter in found}


def test_a_step_adds_up_the_gradients_of_its_tasks(first_step, monkeypatch):
    update, batches, parts = first_step()
    alone = {}
    for name, item in batches.items():
        update.begin(0)
        loss = summed_loss(item.task, update.forward(name, item.batch), item.target)
        update.backward(loss / loss_weight(item.task, item.target))
        alone[name] = gradients(update)
    monkeypatch.setattr(update, "finish", lambda: 1.0)
    streams = {name: repeat(item) for name, item in batches.items()}
    train_step(update_config(update), update, streams, parts, step=0)
    for name, together in gradients(update).items():
        own = [found[name] for found in alone.values() if found[name] is not None]
        assert together is not None, name
        torch.testing.assert_close(together, sum(own), rtol=1e-5, atol=1e-8)
        shared = name.startswith("peft.base_model.model.temporal_encoder.")
        assert len(own) == (2 if shared else 1), f"{name}: one task's weights are another's business"


def update_config(update: Update) -> AdaptConfig:
    """Of the seed alone, which is what a step asks for."""
    return AdaptConfig.model_construct(seed=0)


def test_a_step_leaves_the_weights_of_absent_tasks_bit_identical(first_step):
    update, batches, parts = first_step()
    both = {name: repeat(item) for name, item in batches.items()}
    train_step(update_config(update), update, both, parts, step=0)  # momentum for all
    before = copy_trainable(update.model)
    train_step(update_config(update), update, {"rhythm": both["rhythm"]}, parts, step=1)
    for name, tensor in copy_trainable(update.model).items():
        is_other = "sleep_staging" in name.split(".")
        assert torch.equal(tensor, before[name]) == is_other, name


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(make_config, monkeypatch):
    config = make_config(steps=3, log_every=1, eval_every=3, checkpoint_every=1)
    seen, real = [], Update.forward

    def forward(self, name, batch):
        logits = real(self, name, batch)
        if name == "rhythm":
            seen.append(copy_trainable(self.model))
        return logits * math.nan if len(seen) == 2 and name == "rhythm" else logits

    monkeypatch.setattr(Update, "forward", forward)
    rows: list[dict] = []
    adapt(config, report=rows.append)
    same = [all(torch.equal(a, b) for a, b in zip(x.values(), y.values(), strict=True)) for x, y in pairwise(seen)]
    assert same == [False, True]
    assert [row["skipped"] for row in rows if row["split"] == "train"] == [0, 1, 1]


def test_too_many_such_steps_end_the_run_with_the_remedy(make_config, monkeypatch):
    monkeypatch.setattr(train, "MAX_SKIPPED", 2)
    real = Update.forward
    monkeypatch.setattr(Update, "forward", lambda self, *given: real(self, *given) * math.inf)
    with pytest.raises(ConfigError, match=r"step 3: the gradient is nan.*lower the learning rates"):
        adapt(make_config())


@pytest.mark.parametrize("weights", [None, {"sinus": 1.0, "bradycardia": 4.0, "tachycardia": 0.5, "af": 2.0}])
def test_parts_of_a_batch_have_the_loss_of_the_whole(weights):
    task = load_task("rhythm").model_copy(update={"class_weights": weights})
    logits, target = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 4
    weight = None if weights is None else torch.tensor(list(weights.values()))
    whole = functional.cross_entropy(logits, target, weight=weight)
    assert float(summed_loss(task, logits, target) / loss_weight(task, target)) == pytest.approx(float(whole), rel=1e-6)
    cut = (slice(0, 2), slice(2, 9))
    total = sum(loss_weight(task, target[part]) for part in cut)
    summed = sum(float(summed_loss(task, logits[part], target[part])) for part in cut)
    assert summed / total == pytest.approx(float(whole), rel=1e-6)


def test_the_loss_of_yes_and_no_is_the_mean_over_all_answers():
    task = load_task("rhythm").model_copy(update={"loss": "bce", "class_weights": None})
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    target = (logits > 0.3).float()
    expected = functional.binary_cross_entropy_with_logits(logits, target)
    assert float(summed_loss(task, logits, target) / loss_weight(task, target)) == pytest.approx(
        float(expected), rel=1e-6
    )


def test_the_weight_of_a_task_scales_its_gradient(first_step, monkeypatch):
    found = []
    for weight in (1.0, 4.0):  # a power of two scales without rounding
        update, batches, _ = first_step()
        monkeypatch.setattr(update, "finish", lambda: 1.0)
        parts = {name: Share(epoch=1, batch=16, weight=weight if name == "rhythm" else 1.0) for name in batches}
        train_step(update_config(update), update, {n: repeat(b) for n, b in batches.items()}, parts, step=0)
        found.append(gradients(update))
    for name, gradient in found[0].items():
        if "rhythm" in name.split("."):
            assert torch.equal(found[1][name], 4 * gradient), name
        elif "sleep_staging" in name.split("."):
            assert torch.equal(found[1][name], gradient)


def test_bf16_is_near_fp32_and_its_weights_stay_fp32(make_config, tmp_path):
    runs = {
        p: adapt(make_config(run_dir=str(tmp_path / p), steps=2, keep="last", precision=p)) for p in ("fp32", "bf16")
    }
    full, half = (copy_trainable(run.model) for run in runs.values())
    assert all(tensor.dtype == torch.float32 for tensor in half.values())
    assert any(not torch.equal(full[name], half[name]) for name in full), "nothing was computed in bf16"
    scores = [run.scores["rhythm"]["val"]["metrics"]["balanced_accuracy"]["value"] for run in runs.values()]
    assert scores[0] == pytest.approx(scores[1], abs=0.2)


def test_an_update_that_does_not_do_the_stage_is_refused(make_config):
    with pytest.raises(ConfigError, match=r"zero_stage: 1 is not what Update does.*ZeroUpdate"):
        adapt(make_config(zero_stage=1))


def test_zero_3_is_refused_with_the_reason(make_config):
    with pytest.raises(ValueError, match="applies the last gradient again"):
        make_config(zero_stage=3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_a_gpu_that_is_not_there_is_refused(make_config):
    with pytest.raises(ConfigError, match="device: cuda, and torch finds no GPU"):
        adapt(make_config(device="cuda"))


def test_learning_rate_warms_up_and_decays():
    factors = [rate_factor(step, steps=100, warmup=10) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == pytest.approx(1.0)
    assert factors[-1] < 0.06
    assert factors[10:] == sorted(factors[10:], reverse=True)
