import numpy as np
import pytest
import torch

from manifests.channels import ChannelTag, resolve
from manifests.errors import ConfigError
from trainer.augment import AugmentConfig
from trainer.models.sleep import SleepEncoder, SleepEncoderConfig
from trainer.models.univariate import UnivariateEncoder, UnivariateEncoderConfig
from trainer.objectives.build import build_objective
from trainer.objectives.nt_xent import NtXentConfig, nt_xent_loss, resampled
from trainer.read import Window

SYMBOLS = ("eeg:C3-M2", "eeg:C4-M1", "eeg:O1-M2", "ecg:II")
FAR = {"recording_N": torch.arange(6), "start_ms_N": torch.zeros(6, dtype=torch.int64)}


def make_window(number, symbols=SYMBOLS, *, recording=None, rate=64, is_silent=False):
    rng = np.random.default_rng(number)
    ucs, arrays = {}, {}
    for symbol in symbols:
        tag = resolve(symbol)
        assert isinstance(tag, ChannelTag)
        numbers = {"scale": 0.01, "mean": 0.0, "sd": 1.0, "rate": [rate, 1]}
        ids = {"anode_id": tag.anode_id, "cathode_id": tag.cathode_id}
        ucs.setdefault(tag.kind, []).append(
            {"symbol": symbol, "kind": tag.kind, "role": "signal", "unit": tag.unit, **numbers, **ids}
        )
    for kind, tags in ucs.items():
        size = (len(tags), 8 * rate)
        arrays[kind] = np.zeros(size, np.int16) if is_silent else rng.integers(-300, 300, size).astype(np.int16)
    meta = {"ucs": ucs, "start": 8 * rate * number, "length": 8 * rate, "rate": [rate, 1]}
    name = f"r{number}" if recording is None else recording
    return Window(key=f"w{number}", position=number, epoch=0, corpus="c", recording=name, meta=meta, arrays=arrays)


def make_objective(*, channel_code=False, **options):
    torch.manual_seed(0)
    encoder = UnivariateEncoder(
        UnivariateEncoderConfig(
            width=16, depth=1, conv_channels=(4, 8, 8), channel_code=channel_code, rate_code=channel_code
        )
    )
    return build_objective(encoder, NtXentConfig(**{"rates_hz": (64.0,), "projection": 8} | options)).double()


def draw(num_crops=6):
    torch.manual_seed(1)
    return torch.nn.functional.normalize(torch.randn(num_crops, 2, 8, dtype=torch.float64), dim=-1)


def slow_reference(unit, channel, recording, start_ms, config):
    """l(a, b) of the paper for every ordered pair of views, one number at a time."""
    total = torch.zeros((), dtype=torch.float64)
    num = len(unit)
    for n in range(num):
        for v in range(2):
            positive = (unit[n, v] @ unit[n, 1 - v] / config.temperature).exp()
            denominator = positive
            for k in range(num):
                near = recording[k] == recording[n] and abs(start_ms[k] - start_ms[n]) < 1000 * config.near_s
                other = config.id_leak_guard == "homogeneous" and channel[k] != channel[n]
                if k != n and not near and not other:
                    for w in range(2):
                        denominator = denominator + (unit[n, v] @ unit[k, w] / config.temperature).exp()
            total = total - (positive / denominator).log()
    return total / (2 * num)


@pytest.mark.parametrize("near_s", [0.0, 60.0, 1e6], ids=["none_near", "a_minute", "whole_recording"])
@pytest.mark.parametrize("guard", ["drop", "homogeneous", "dropout"])
def test_equals_the_slow_reference_in_value_and_gradient(guard, near_s):
    config = NtXentConfig(id_leak_guard=guard, near_s=near_s)
    ids = {
        "channel_N": torch.tensor([1, 1, 2, 2, 1, 3]),
        "recording_N": torch.tensor([0, 0, 0, 1, 1, 2]),
        "start_ms_N": torch.tensor([0, 59_000, 60_000, 0, 10_000, 0]),
    }
    fast_in, slow_in = draw().requires_grad_(), draw().requires_grad_()
    fast, metrics = nt_xent_loss(fast_in, **ids, config=config)
    slow = slow_reference(slow_in, *ids.values(), config)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-10)
    torch.testing.assert_close(metrics["loss"], slow.detach(), rtol=0, atol=1e-10)
    fast.backward()
    slow.backward()
    torch.testing.assert_close(fast_in.grad, slow_in.grad, rtol=0, atol=1e-10)


def test_guard_and_neighbours_each_change_the_loss():
    """Else the test above would hold for a loss that ignores them."""
    ids = {
        "channel_N": torch.tensor([1, 1, 2, 2, 1, 3]),
        "recording_N": torch.tensor([0, 0, 0, 1, 1, 2]),
        "start_ms_N": torch.tensor([0, 59_000, 60_000, 0, 10_000, 0]),
    }
    losses = [
        float(nt_xent_loss(draw(), **ids, config=NtXentConfig(id_leak_guard=guard, near_s=near_s))[0])
        for guard in ("drop", "homogeneous")
        for near_s in (0.0, 60.0)
    ]
    assert len({round(loss, 6) for loss in losses}) == len(losses)


def test_uniformity_by_hand():
    """Two crops of two views at angles 0, 60 and 180, 180 degrees: four pairs of different crops."""
    angles = torch.tensor([[0.0, 60.0], [180.0, 180.0]], dtype=torch.float64).deg2rad()
    unit = torch.stack([angles.cos(), angles.sin()], dim=-1)
    ids = {"channel_N": torch.zeros(2), "recording_N": torch.arange(2), "start_ms_N": torch.zeros(2)}
    _, metrics = nt_xent_loss(unit, **ids, config=NtXentConfig())
    squared = [4.0, 4.0, 3.0, 3.0]
    assert float(metrics["uniformity"]) == pytest.approx(np.log(np.mean(np.exp(-2 * np.array(squared)))))
    assert float(metrics["pair_distance"]) == pytest.approx((1.0 + 0.0) / 2)


def test_metrics_by_hand():
    unit = torch.eye(6, dtype=torch.float64)[:, None, :].expand(6, 2, 6).contiguous()
    loss, metrics = nt_xent_loss(unit, channel_N=torch.zeros(6), **FAR, config=NtXentConfig(temperature=0.5))
    assert float(loss) == pytest.approx(np.log(1 + 10 * np.exp(-2.0)))
    assert {name: float(value) for name, value in metrics.items() if name != "loss"} == {
        "top1": 1.0,
        "alignment": pytest.approx(1.0),
        "pair_distance": pytest.approx(0.0, abs=1e-12),
        "uniformity": pytest.approx(-4.0),  # orthogonal crops: |a - b|^2 = 2
        "negatives": 10.0,
        "anchors": 12,
        "temperature": 0.5,
    }


def train_on_silence(guard, *, codes_of=None, steps=60):
    """Loss per step, and the loss by guessing, when nothing but the ids of a channel is there to learn from."""
    quiet = {"channel_code": True, "augment": AugmentConfig(noise=(0.0, 0.0))}
    objective = make_objective(id_leak_guard=guard, **quiet).float()
    windows = [make_window(n, (symbol,), is_silent=True) for n, symbol in enumerate(SYMBOLS * 4)]
    batch = make_objective(id_leak_guard=codes_of or guard, **quiet).collate(windows, seed=0)
    assert not batch.groups[0].signal_BCT.any()
    optimiser = torch.optim.AdamW(objective.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss, metrics = objective(batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return np.array(losses), float(np.log1p(float(metrics["negatives"])))


@pytest.mark.parametrize(("guard", "rivals"), [("drop", 30), ("homogeneous", 6)])
def test_ids_alone_give_chance_under_the_guard(guard, rivals):
    losses, chance = train_on_silence(guard)
    assert chance == pytest.approx(np.log1p(rivals))
    np.testing.assert_allclose(losses, chance, atol=1e-4)


def test_the_shortcut_is_there_when_codes_pass_without_a_guard():
    """Four channels: the loss falls by log 4 without any signal if codes are shown and all pairs are negatives."""
    losses, chance = train_on_silence("drop", codes_of="homogeneous")
    assert losses[-1] == pytest.approx(chance - np.log(4), abs=0.15)


def gain_by_ids_alone(*, kept):
    """How far below chance embeddings made of the channel alone bring the loss; a share `kept` of views shows it."""
    num = 64
    channel_N = torch.arange(num) % 4
    shown_NV1 = torch.from_numpy(np.random.default_rng(0).random((num, 2, 1)) < kept)
    axes = torch.eye(5, dtype=torch.float64)
    ids = {"channel_N": channel_N, "recording_N": torch.arange(num), "start_ms_N": torch.zeros(num)}
    gains = []
    for strength in (0.0, 0.3, 0.5, 1.0, 2.0):
        unit = torch.nn.functional.normalize(axes[4] + strength * shown_NV1 * axes[channel_N][:, None, :], dim=-1)
        loss, metrics = nt_xent_loss(unit, **ids, config=NtXentConfig(id_leak_guard="dropout"))
        gains.append(float(metrics["negatives"].log1p() - loss))
    return max(gains)


def test_dropout_of_the_codes_narrows_the_shortcut_and_does_not_close_it():
    """Why `drop` is the default: pairs that both show their channel can still be told by it."""
    assert gain_by_ids_alone(kept=0.0) == pytest.approx(0.0, abs=1e-9)
    assert 0.05 < gain_by_ids_alone(kept=0.5) < 0.2
    assert gain_by_ids_alone(kept=1.0) == pytest.approx(np.log(4), abs=0.05)


def test_dropout_hides_the_codes_of_about_half_of_the_views():
    objective = make_objective(id_leak_guard="dropout")
    keep = objective.collate([make_window(n) for n in range(100)], seed=0).keeps[0]
    assert set(keep.unique().tolist()) == {0.0, 1.0}
    assert 0.35 < float(keep.mean()) < 0.65


def test_draws_depend_on_seed_epoch_and_key_alone():
    objective = make_objective()
    windows = [make_window(n) for n in range(6)]
    batch = objective.collate(windows, seed=1)
    turned = objective.collate(windows[::-1], seed=1)
    signal, again = (x.groups[0].signal_BCT.unflatten(0, (2, 6)) for x in (batch, turned))
    assert torch.equal(signal, again.flip(1))
    assert not torch.equal(signal, objective.collate(windows, seed=2).groups[0].signal_BCT.unflatten(0, (2, 6)))
    for window in windows:
        window.epoch = 1
    assert not torch.equal(signal, objective.collate(windows, seed=1).groups[0].signal_BCT.unflatten(0, (2, 6)))
    assert not torch.equal(signal[0], signal[1])


def test_all_channels_are_drawn_in_time():
    objective = make_objective()
    batch = objective.collate([make_window(n) for n in range(40)], seed=0)
    assert len(batch.channel_N.unique()) == len(SYMBOLS)
    within_ms = batch.start_ms_N - 8000 * torch.arange(40)
    assert within_ms.min() >= 0
    assert within_ms.max() <= 4000
    assert len(within_ms.unique()) > 20


def test_rows_that_are_not_signals_are_never_drawn_and_empty_windows_are_left_out():
    objective = make_objective()
    marked = make_window(0)
    for tag in [tag for tags in marked.meta["ucs"].values() for tag in tags]:
        tag["role"] = "marker"
    batch = objective.collate([marked, make_window(1)], seed=0)
    assert batch.counts == (1,)
    assert len(batch.channel_N) == 1


def test_rates_are_grouped_in_declared_order_and_an_absent_rate_still_runs():
    objective = make_objective(rates_hz=(32.0, 64.0, 128.0), channel_code=True)
    runs = []
    objective.encoder.register_forward_hook(lambda *_: runs.append(1))
    mixed = [make_window(n, rate=64 if n % 2 else 128) for n in range(5)]
    batch = objective.collate(mixed, seed=0)
    assert batch.counts == (0, 2, 3)
    assert [group.signal_BCT.shape[2] for group in batch.groups] == [128, 256, 512]
    loss, _ = objective(batch)
    loss.backward()
    assert len(runs) == 3
    fewer = make_objective(rates_hz=(64.0, 128.0), channel_code=True)
    expected, _ = fewer(fewer.collate(mixed, seed=0))
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
    for got, want in zip(objective.parameters(), fewer.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize("rates", [(128, 200), (200, 128), (64, 512), (128, 128)])
def test_resampling_keeps_a_wave_and_a_trend(rates):
    before, after = (torch.arange(4 * rate, dtype=torch.float64) / rate for rate in rates)
    wave, expected = (torch.sin(2 * torch.pi * 7 * t) + 3 * t + 1 for t in (before, after))
    got = resampled(wave[None, None], len(after))[0, 0]
    inner = slice(len(after) // 8, -len(after) // 8)  # a window's ends have no neighbours
    torch.testing.assert_close(got[inner], expected[inner], rtol=0, atol=0.05)


def test_mixed_rates_give_the_second_view_another_rate_and_the_first_its_own():
    windows = [make_window(n, rate=64 if n % 2 else 128) for n in range(5)]
    objective = make_objective(rates_hz=(64.0, 128.0), mix_rates=True)
    batch = objective.collate(windows, seed=0)
    seen = []
    objective.encoder.register_forward_pre_hook(lambda _, args: seen.append((args[0].rate_hz, args[0].signal_BCT)))
    _, features = objective._encode(batch)
    assert [(rate, tuple(signal.shape)) for rate, signal in seen] == [
        (64.0, (2, 1, 256)),
        (128.0, (2, 1, 512)),
        (128.0, (3, 1, 512)),
        (64.0, (3, 1, 256)),
    ]
    assert torch.equal(seen[0][1], batch.groups[0].signal_BCT[:2])
    plain = make_objective(rates_hz=(64.0, 128.0))._encode(batch)[1]
    torch.testing.assert_close(features[:, 0], plain[:, 0], rtol=0, atol=1e-10)
    assert not torch.allclose(features[:, 1], plain[:, 1])


def test_a_batch_without_any_crop_gives_zero_loss_and_zero_gradients():
    objective = make_objective(kinds=("emg",))
    loss, metrics = objective(objective.collate([make_window(0)], seed=0))
    loss.backward()
    assert float(loss.detach()) == float(metrics["anchors"]) == 0.0
    assert all(not p.grad.any() for p in objective.parameters())


def test_batch_mates_change_no_embedding():
    objective = make_objective()
    windows = [make_window(n) for n in range(4)]
    both = objective.embed(objective.collate(windows, seed=0))["embedding_NVD"]
    alone = objective.embed(objective.collate(windows[:1], seed=0))["embedding_NVD"]
    torch.testing.assert_close(both[:1], alone, rtol=0, atol=1e-10)


def test_train_equals_eval_without_dropout():
    objective = make_objective()
    batch = objective.collate([make_window(n) for n in range(3)], seed=0)
    assert torch.equal(objective.train()(batch)[0], objective.eval()(batch)[0])


def test_wrong_configs_say_what_to_do():
    with pytest.raises(ConfigError, match=r"set encoder\.kind to univariate"):
        build_objective(SleepEncoder(SleepEncoderConfig(width=16)), NtXentConfig())
    with pytest.raises(ConfigError, match="sort it"):
        make_objective(rates_hz=(128.0, 64.0))
    with pytest.raises(ConfigError, match=r"mix_rates: rates_hz is \[64.0\], two rates or more"):
        make_objective(mix_rates=True)
    with pytest.raises(ConfigError, match=r"w0 has a channel at 128 Hz, listed are 64; add the rate"):
        make_objective().collate([make_window(0, rate=128)], seed=0)
    with pytest.raises(ConfigError, match=r"9 s, but w0 has 8 s"):
        make_objective(crop_s=9.0).collate([make_window(0)], seed=0)


def test_it_learns_to_find_the_other_view():
    objective = make_objective().float()
    windows = []
    for number in range(24):
        window = make_window(number)
        wave = 200 * np.sin(2 * np.pi * 1.15**number * np.arange(512) / 64)
        for kind, array in window.arrays.items():
            window.arrays[kind] = (wave + 0.1 * array).astype(np.int16)
        windows.append(window)
    optimiser = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    losses, hits = [], []
    for seed in range(60):
        loss, metrics = objective(objective.collate(windows, seed=seed))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
        hits.append(float(metrics["top1"]))
    assert np.mean(losses[-5:]) < 0.85 * np.mean(losses[:5])
    assert np.mean(hits[-10:]) > 4 / 47
