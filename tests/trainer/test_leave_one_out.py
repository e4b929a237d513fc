import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from manifests.channels import ChannelTag, resolve
from trainer.batches import stable_hash
from trainer.models.sleep import SleepEncoder, SleepEncoderConfig
from trainer.objectives.build import OBJECTIVES, ObjectiveConfig, build_objective
from trainer.objectives.leave_one_out import MAX_LOG_SCALE, LeaveOneOutConfig, leave_one_out_loss
from trainer.read import Window

SCALE = torch.tensor([5.0], dtype=torch.float64)
PLAIN = LeaveOneOutConfig()
ALL = ("eeg:C3-M2", "eeg:C4-M1", "ecg:II", "resp:thorax", "emg:chin")


def make_window(number, symbols=ALL, *, recording=None):
    rng = np.random.default_rng(number)
    ucs, arrays = {}, {}
    for symbol in symbols:
        tag = resolve(symbol)
        assert isinstance(tag, ChannelTag)
        numbers = {"scale": 0.01, "mean": 0.0, "sd": 1.0, "rate": [64, 1]}
        ids = {"anode_id": tag.anode_id, "cathode_id": tag.cathode_id}
        ucs.setdefault(tag.kind, []).append(
            {"symbol": symbol, "kind": tag.kind, "role": "signal", "unit": tag.unit, **numbers, **ids}
        )
    for kind, tags in ucs.items():
        arrays[kind] = rng.integers(-300, 300, (len(tags), 256)).astype(np.int16)
    meta = {"ucs": ucs, "start": 256 * number, "length": 256, "rate": [64, 1]}
    name = f"r{number}" if recording is None else recording
    return Window(key=f"w{number}", position=number, epoch=0, corpus="c", recording=name, meta=meta, arrays=arrays)


def make_objective(**options):
    torch.manual_seed(0)
    encoder = SleepEncoder(SleepEncoderConfig(width=16, depth=1, patch_s=1.0))
    return build_objective(encoder, LeaveOneOutConfig(**options)).double()


def draw(num_windows=7, num_groups=4, *, seed=0, share=0.6):
    torch.manual_seed(seed)
    unit = torch.nn.functional.normalize(torch.randn(num_windows, num_groups, 8, dtype=torch.float64), dim=-1)
    available = torch.rand(num_windows, num_groups) < share
    recording = torch.randint(0, 3, (num_windows,))
    return torch.where(available[..., None], unit, torch.zeros_like(unit)), available, recording


def slow_reference(unit, available, recording, scale, config):
    """Written from the equations, one number at a time."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    num_windows, num_groups, _ = unit.shape
    for i in range(num_groups):
        others = [j for j in range(num_groups) if j != i]
        members = [n for n in range(num_windows) if available[n, i] and any(available[n, j] for j in others)]
        target = {}
        for n in members:
            mean = torch.stack([unit[n, j] for j in others if available[n, j]]).mean(0)
            mean = mean / mean.norm() if config.normalize_target else mean
            target[n] = mean.detach() if config.detach_target else mean
        for n in members:
            rivals = [k for k in members if k == n or not (config.mask_same_recording and recording[k] == recording[n])]
            row = torch.stack([scale[0] * unit[n, i] @ target[k] for k in rivals])
            column = torch.stack([scale[0] * unit[k, i] @ target[n] for k in rivals])
            own = rivals.index(n)
            total = total + 0.5 * (row.logsumexp(0) - row[own] + column.logsumexp(0) - column[own])
        count += len(members)
    return total / max(1, count)


@pytest.mark.parametrize("share", [1.0, 0.6, 0.3])
@pytest.mark.parametrize(
    "options",
    [{}, {"normalize_target": True}, {"detach_target": True}, {"mask_same_recording": True}],
    ids=lambda options: next(iter(options), "plain"),
)
def test_equals_the_slow_reference_in_value_and_gradient(options, share):
    config = LeaveOneOutConfig(**options)
    unit, available, recording = draw(share=share)
    fast_in, slow_in = unit.clone().requires_grad_(), unit.clone().requires_grad_()
    fast, metrics = leave_one_out_loss(fast_in, available, recording, scale=SCALE, config=config)
    slow = slow_reference(slow_in, available, recording, SCALE, config)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-10)
    torch.testing.assert_close(metrics["loss"], slow.detach(), rtol=0, atol=1e-10)
    fast.backward()
    slow.backward()
    torch.testing.assert_close(fast_in.grad, slow_in.grad, rtol=0, atol=1e-10)


def test_by_hand_on_two_windows_and_two_modalities():
    unit = torch.eye(2, dtype=torch.float64)[:, None, :].expand(2, 2, 2).contiguous()
    loss, metrics = leave_one_out_loss(
        unit, torch.ones(2, 2, dtype=torch.bool), torch.arange(2), scale=SCALE, config=PLAIN
    )
    assert float(loss) == pytest.approx(np.log(1 + np.exp(-5.0)), abs=1e-12)
    assert float(metrics["top1"]) == 1.0
    assert float(metrics["alignment"]) == pytest.approx(1.0)


def test_equals_the_published_loss_when_everything_is_there():
    """SleepFM's sum over modalities of both cross-entropies over 2 M, per sample."""
    unit, available, recording = draw(share=1.1)
    loss, _ = leave_one_out_loss(unit, available, recording, scale=SCALE, config=PLAIN)
    total = 0.0
    for i in range(4):
        logits = SCALE * unit[:, i] @ unit[:, [j for j in range(4) if j != i]].mean(dim=1).T
        labels = torch.arange(len(unit))
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        total += torch.nn.functional.cross_entropy(logits.T, labels, reduction="sum")
    assert float(loss) == pytest.approx(float(total) / 8 / len(unit), abs=1e-10)


def test_permuting_modalities_changes_nothing():
    unit, available, recording = draw()
    order = torch.tensor([2, 0, 3, 1])
    loss, _ = leave_one_out_loss(unit, available, recording, scale=SCALE, config=PLAIN)
    turned, _ = leave_one_out_loss(unit[:, order], available[:, order], recording, scale=SCALE, config=PLAIN)
    torch.testing.assert_close(loss, turned, rtol=0, atol=1e-12)


def test_same_recording_negatives_are_counted():
    unit, available, _ = draw(num_windows=4, share=1.1)
    recording = torch.tensor([1, 1, 2, 3])
    _, metrics = leave_one_out_loss(unit, available, recording, scale=SCALE, config=PLAIN)
    assert float(metrics["same_recording_negatives"]) == pytest.approx(2 / 12)


def test_a_batch_without_any_pair_gives_zero_loss_and_finite_gradients():
    unit, _, recording = draw()
    unit.requires_grad_()
    available = torch.zeros(7, 4, dtype=torch.bool)
    available[:, 0] = True
    loss, _ = leave_one_out_loss(unit, available, recording, scale=SCALE, config=PLAIN)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert unit.grad is not None
    assert not unit.grad.any()


def test_absent_modality_has_zero_gradient_through_the_encoder():
    """Whatever stands in the rows of an absent modality, neither loss nor gradient may change."""
    objective = make_objective()
    windows = [make_window(0), make_window(1, ("eeg:C3-M2", "ecg:II")), make_window(2)]
    batch = objective.collate(windows, seed=0)
    assert batch.available_NM.tolist() == [[True] * 4, [True, False, True, False], [True] * 4]
    resp = batch.groups[1].signal_BCT = batch.groups[1].signal_BCT.double().requires_grad_()
    loss, _ = objective(batch)
    loss.backward()
    assert resp.grad is not None
    assert not resp.grad[1].any()
    assert resp.grad[0].any()


def test_a_modality_that_no_window_has_still_runs_and_contributes_nothing():
    objective = make_objective()
    runs = []
    objective.encoder.register_forward_hook(lambda *_: runs.append(1))
    windows = [make_window(n, ("eeg:C3-M2", "ecg:II")) for n in range(3)]
    loss, _ = objective(objective.collate(windows, seed=0))
    assert len(runs) == 4
    pair = make_objective(groups={"BAS": ("eeg",), "EKG": ("ecg",)})
    expected, _ = pair(pair.collate(windows, seed=0))
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
    loss.backward()
    expected.backward()
    for (name, got), want in zip(objective.named_parameters(), pair.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=0, atol=1e-10, msg=name)


def test_padding_and_batch_mates_change_no_embedding():
    objective = make_objective()
    windows = [make_window(0, ("eeg:C3-M2", "ecg:II")), make_window(1)]
    both = objective.embed(objective.collate(windows, seed=0))["embedding_NMD"]
    alone = objective.embed(objective.collate(windows[:1], seed=0))["embedding_NMD"]
    torch.testing.assert_close(both[:1], alone, rtol=0, atol=1e-10)


def test_train_equals_eval_without_dropout():
    objective = make_objective()
    batch = objective.collate([make_window(n) for n in range(3)], seed=0)
    assert torch.equal(objective.train()(batch)[0], objective.eval()(batch)[0])


def test_the_scale_is_learnt_clamped_and_never_0_dim():
    objective = make_objective()
    assert objective.log_scale.shape == (1,)
    assert float(objective.log_scale.detach()) == pytest.approx(np.log(1 / 0.07))
    batch = objective.collate([make_window(n) for n in range(3)], seed=0)
    objective(batch)[0].backward()
    assert objective.log_scale.grad.abs() > 0
    objective.log_scale.data.fill_(99.0)
    assert float(objective(batch)[1]["scale"]) == pytest.approx(np.exp(MAX_LOG_SCALE))
    objective.log_scale.data.fill_(-99.0)
    assert float(objective(batch)[1]["scale"]) == pytest.approx(1.0)


def test_channel_dropout_depends_on_the_key_alone_and_keeps_a_channel():
    objective = make_objective(channel_dropout=0.9)
    windows = [make_window(n) for n in range(20)]
    masks = objective.collate(windows, seed=3).groups[0].mask_BC
    assert masks.any(dim=1).all()
    assert masks.sum() < 2 * 20
    turned = objective.collate(windows[::-1], seed=3).groups[0].mask_BC
    assert torch.equal(masks, turned.flip(0))
    assert not torch.equal(masks, objective.collate(windows, seed=4).groups[0].mask_BC)


def test_recordings_are_told_apart_by_corpus_and_name():
    objective = make_objective()
    windows = [make_window(0, recording="a"), make_window(1, recording="a"), make_window(2, recording="b")]
    recording = objective.collate(windows, seed=0).recording_N.tolist()
    assert recording[0] == recording[1] == stable_hash("c", "a") != recording[2]


def test_it_learns_a_shared_latent():
    torch.manual_seed(0)
    objective = make_objective().float()
    windows = []
    for number in range(24):
        window = make_window(number)
        wave = 200 * np.sin(2 * np.pi * (1 + number / 3) * np.arange(256) / 64)
        for kind, array in window.arrays.items():
            window.arrays[kind] = (wave + 0.1 * array).astype(np.int16)
        windows.append(window)
    batch = objective.collate(windows, seed=0)
    optimiser = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss, metrics = objective(batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 2.0
    assert losses[-1] < 0.5 * losses[0]
    assert float(metrics["top1"]) > 5 / 24


def test_objectives_configs_and_dict_agree():
    schema = TypeAdapter(ObjectiveConfig).json_schema()
    assert set(OBJECTIVES) == set(schema["discriminator"]["mapping"]) == {"leave_one_out", "nt_xent"}
