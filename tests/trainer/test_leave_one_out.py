import itertools

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from manifests.channels import KINDS, ChannelTag, resolve
from manifests.errors import ConfigError
from trainer.batches import stable_hash
from trainer.models.sleep import SleepEncoder, SleepEncoderConfig
from trainer.objectives.build import OBJECTIVES, ObjectiveConfig, build_objective
from trainer.objectives.leave_one_out import LeaveOneOutConfig, bounded, leave_one_out_loss
from trainer.objectives.modalities import GROUP_MAPS
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
    """The loss by loops: for each contrast and window the two cross-entropies among the windows that take part."""
    num_windows, num_groups = available.shape
    total, count = torch.zeros((), dtype=torch.float64), 0
    groups = range(num_groups)
    if config.contrast == "pairwise":
        contrasts = [(i, (j,)) for i in groups for j in groups if i < j]
    else:
        contrasts = [(i, tuple(j for j in groups if j != i)) for i in groups]
    for i, others in contrasts:
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


OPTIONS = ("detach_target", "normalize_target", "mask_same_recording")
COMBINATIONS = [
    {"contrast": contrast, **dict(zip(OPTIONS, values, strict=True))}
    for contrast in ("leave_one_out", "pairwise")
    for values in itertools.product([False, True], repeat=3)
    if contrast == "leave_one_out" or not any(values[:2])
]


@pytest.mark.parametrize("share", [1.1, 0.6, 0.4])
@pytest.mark.parametrize(
    "options", COMBINATIONS, ids=lambda options: "-".join([options["contrast"], *(o for o in OPTIONS if options[o])])
)
def test_equals_the_slow_reference_in_value_and_gradient(options, share):
    config = LeaveOneOutConfig(**options)
    unit, available, recording = draw(num_windows=9, share=share)
    scales = [SCALE.clone().requires_grad_() for _ in range(2)]
    fast_in, slow_in = unit.clone().requires_grad_(), unit.clone().requires_grad_()
    fast, metrics = leave_one_out_loss(fast_in, available, recording, scale=scales[0], config=config)
    slow = slow_reference(slow_in, available, recording, scales[1], config)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-10)
    torch.testing.assert_close(metrics["loss"], slow.detach(), rtol=0, atol=1e-10)
    fast.backward()
    slow.backward()
    torch.testing.assert_close(fast_in.grad, slow_in.grad, rtol=0, atol=1e-10)
    torch.testing.assert_close(scales[0].grad, scales[1].grad, rtol=0, atol=1e-10)
    assert fast_in.grad.abs().sum() > 1e-3


def test_every_option_changes_the_loss_or_its_gradient():
    unit, available, recording = draw()
    seen = set()
    for options in COMBINATIONS:
        leaf = unit.clone().requires_grad_()
        loss, _ = leave_one_out_loss(leaf, available, recording, scale=SCALE, config=LeaveOneOutConfig(**options))
        loss.backward()
        seen.add((round(float(loss.detach()), 9), round(float(leaf.grad.abs().sum()), 9)))
    assert len(seen) == len(COMBINATIONS) == 10


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


def test_equals_the_published_pairwise_loss_when_everything_is_there():
    """SleepFM's mean over pairs of modalities of both cross-entropies, halved as its other loss is, per sample."""
    unit, available, recording = draw(share=1.1)
    loss, metrics = leave_one_out_loss(
        unit, available, recording, scale=SCALE, config=LeaveOneOutConfig(contrast="pairwise")
    )
    pairs = list(itertools.combinations(range(4), 2))
    total = 0.0
    for i, j in pairs:
        logits = SCALE * unit[:, i] @ unit[:, j].T
        labels = torch.arange(len(unit))
        total += torch.nn.functional.cross_entropy(logits, labels) + torch.nn.functional.cross_entropy(logits.T, labels)
    assert float(loss) == pytest.approx(float(total) / 2 / len(pairs), abs=1e-10)
    assert float(metrics["anchors"]) == len(unit) * len(pairs)


def test_pairwise_refuses_options_of_the_mean_target():
    for option in ("detach_target", "normalize_target"):
        with pytest.raises(ValidationError, match="no mean target"):
            LeaveOneOutConfig(contrast="pairwise", **{option: True})


def test_alignment_and_uniformity_are_those_of_wang_and_isola():
    """Against their definitions by loops, with absent modalities: E|a - b|^2 and log E exp(-2 |a - b|^2)."""
    unit, available, recording = draw()
    _, metrics = leave_one_out_loss(unit, available, recording, scale=SCALE, config=PLAIN)
    positives, potentials, cosines = [], [], []
    for n, k in itertools.product(range(7), repeat=2):
        for i, j in itertools.product(range(4), repeat=2):
            distance = float((unit[n, i] - unit[k, j]).square().sum())
            if available[n, i] and available[k, j]:
                if n == k and i < j:
                    positives.append(distance)
                if n != k and i == j:
                    potentials.append(np.exp(-2 * distance))
    for n, i in itertools.product(range(7), range(4)):
        others = [unit[n, j] for j in range(4) if j != i and available[n, j]]
        if available[n, i] and others:
            cosines.append(float(torch.cosine_similarity(unit[n, i], torch.stack(others).mean(0), dim=0)))
    assert float(metrics["pair_distance"]) == pytest.approx(np.mean(positives), abs=1e-9)
    assert float(metrics["uniformity"]) == pytest.approx(np.log(np.mean(potentials)), abs=1e-9)
    assert float(metrics["alignment"]) == pytest.approx(np.mean(cosines), abs=1e-9)


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
    batch = objective.collate(windows, seed=0).to("cpu")
    assert batch.available_NM.tolist() == [[True] * 4, [True, False, True, False], [True] * 4]
    resp = batch.groups[1].signal_BCT = batch.groups[1].signal_BCT.double().requires_grad_()
    loss, _ = objective(batch)
    loss.backward()
    assert resp.grad is not None
    assert not resp.grad[1].any()
    assert resp.grad[0].any()


def test_missing_modalities_train():
    """SleepFM drops a recording that lacks one of its modalities; here its other modalities learn."""
    objective = make_objective()
    windows = [make_window(n, ("eeg:C3-M2", "ecg:II")) for n in range(2)] + [
        make_window(2, ("resp:thorax", "emg:chin"))
    ]
    batch = objective.collate(windows, seed=0).to("cpu")
    assert not batch.available_NM.all(dim=1).any()
    loss, metrics = objective(batch)
    assert float(metrics["anchors"]) == 6
    loss.backward()
    signal_gradient = objective.encoder.temporal_encoder.project.weight.grad
    assert signal_gradient is not None
    assert signal_gradient.abs().sum() > 0


def test_group_maps_hold_each_source_in_one_modality():
    """As published, pulse stands with breathing and gives the ECG away; cleaned, it stands with the heart."""
    published = LeaveOneOutConfig(groups="sleepfm").modalities
    cleaned = LeaveOneOutConfig(groups="kymo").modalities
    assert list(published) == list(cleaned) == ["BAS", "RESP", "EKG", "EMG"]
    assert {"ppg", "hr", "resp", "spo2", "snore"} == set(published["RESP"])
    assert published["EKG"] == ("ecg",)
    assert set(cleaned["RESP"]) == {"resp", "spo2", "snore"}
    assert set(cleaned["EKG"]) == {"ecg", "ppg"}
    assert "hr" not in {kind for kinds in cleaned.values() for kind in kinds}
    for groups in (published, cleaned):
        assert {kind for kinds in groups.values() for kind in kinds} <= set(KINDS)


def test_a_named_map_equals_its_groups_written_out():
    windows = [make_window(n) for n in range(3)]
    named, free = make_objective(groups="sleepfm"), make_objective(groups=dict(GROUP_MAPS["sleepfm"]))
    losses = [objective(objective.collate(windows, seed=0).to("cpu"))[0] for objective in (named, free)]
    assert torch.equal(*losses)


def test_a_kind_in_two_modalities_is_refused():
    with pytest.raises(ValidationError, match="eeg stands twice"):
        LeaveOneOutConfig(groups={"A": ("eeg", "eog"), "B": ("eeg",)})


def test_modalities_of_two_rates_take_a_pass_each():
    windows = [make_window(n) for n in range(3)]
    for window in windows:
        window.arrays["resp"] = window.arrays["resp"][:, ::2].copy()
        for tag in window.meta["ucs"]["resp"]:
            tag["rate"] = [32, 1]
    objective = make_objective()
    with pytest.raises(ConfigError, match=r"64 Hz x 256.*32 Hz x 128.*one_pass"):
        objective(objective.collate(windows, seed=0).to("cpu"))
    apart = make_objective(one_pass=False)
    assert torch.isfinite(apart(apart.collate(windows, seed=0).to("cpu"))[0])


@pytest.mark.parametrize(("one_pass", "calls"), [(True, 1), (False, 4)])
def test_a_modality_that_no_window_has_still_runs_and_contributes_nothing(one_pass, calls):
    objective = make_objective(one_pass=one_pass)
    runs = []
    objective.encoder.register_forward_hook(lambda *_: runs.append(1))
    windows = [make_window(n, ("eeg:C3-M2", "ecg:II")) for n in range(3)]
    loss, _ = objective(objective.collate(windows, seed=0).to("cpu"))
    assert len(runs) == calls
    pair = make_objective(groups={"BAS": ("eeg",), "EKG": ("ecg",)})
    expected, _ = pair(pair.collate(windows, seed=0).to("cpu"))
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
    loss.backward()
    expected.backward()
    for (name, got), want in zip(objective.named_parameters(), pair.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=0, atol=1e-10, msg=name)


def test_one_pass_equals_a_pass_per_modality():
    windows = [make_window(0), make_window(1, ("eeg:C3-M2", "ecg:II")), make_window(2, ALL[:3])]
    results = []
    for one_pass in (True, False):
        objective = make_objective(one_pass=one_pass)
        loss, _ = objective(objective.collate(windows, seed=0).to("cpu"))
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in objective.parameters())])
    for one, several in zip(*results, strict=True):
        torch.testing.assert_close(one, several, rtol=0, atol=1e-10)


def test_padding_and_batch_mates_change_no_embedding():
    objective = make_objective()
    windows = [make_window(0, ("eeg:C3-M2", "ecg:II")), make_window(1)]
    both = objective.embed(objective.collate(windows, seed=0).to("cpu"))["embedding_NMD"]
    alone = objective.embed(objective.collate(windows[:1], seed=0).to("cpu"))["embedding_NMD"]
    torch.testing.assert_close(both[:1], alone, rtol=0, atol=1e-10)


def test_train_equals_eval_without_dropout():
    objective = make_objective()
    batch = objective.collate([make_window(n) for n in range(3)], seed=0).to("cpu")
    assert torch.equal(objective.train()(batch)[0], objective.eval()(batch)[0])


def test_the_scale_is_learnt_and_never_0_dim():
    objective = make_objective()
    assert objective.log_scale.shape == (1,)
    assert float(objective.log_scale.detach()) == pytest.approx(np.log(1 / 0.07))
    loss, metrics = objective(objective.collate([make_window(n) for n in range(3)], seed=0).to("cpu"))
    loss.backward()
    assert objective.log_scale.grad.abs() > 0
    assert float(metrics["temperature"]) == pytest.approx(0.07)


@pytest.mark.parametrize(
    ("options", "start", "high"),
    [({}, 1 / 0.07, 100.0), ({"temperature": 1.0, "max_scale": None}, 1.0, np.inf)],
    ids=["clip", "as_published"],
)
def test_the_scale_stays_within_its_limits(options, start, high):
    """CLIP's [1, 100]; SleepFM starts at tau = 0, sets it back to 0 when negative, and knows no upper limit."""
    objective = make_objective(**options)
    batch = objective.collate([make_window(n) for n in range(3)], seed=0).to("cpu")
    assert float(objective(batch)[1]["scale"]) == pytest.approx(start)
    objective.log_scale.data.fill_(-99.0)
    assert float(objective(batch)[1]["scale"]) == 1.0
    objective.log_scale.data.fill_(9.0)
    assert float(objective(batch)[1]["scale"]) == pytest.approx(min(high, np.exp(9.0)))


@pytest.mark.parametrize(("value", "expected"), [(-0.5, -0.5), (0.5, 0.5), (1.5, 1.5)])
def test_a_scale_outside_its_limits_comes_back(value, expected):
    """torch.clamp has no gradient there: a scale that once passed its limit would stay at it for ever."""
    for slope in (1.0, -1.0):
        leaf = torch.tensor([value], requires_grad=True)
        clamped = bounded(leaf, low=0.0, high=1.0)
        assert float(clamped.detach()) == min(1.0, max(0.0, expected))
        (slope * clamped).sum().backward()
        leads_out = (value < 0 and slope > 0) or (value > 1 and slope < 0)
        assert float(leaf.grad) == (0.0 if leads_out else slope)


def test_channel_dropout_depends_on_the_key_alone_and_keeps_a_channel():
    objective = make_objective(channel_dropout=0.9)
    windows = [make_window(n) for n in range(20)]
    masks = objective.collate(windows, seed=3).to("cpu").groups[0].mask_BC
    assert masks.any(dim=1).all()
    assert masks.sum() < 2 * 20
    turned = objective.collate(windows[::-1], seed=3).to("cpu").groups[0].mask_BC
    assert torch.equal(masks, turned.flip(0))
    assert not torch.equal(masks, objective.collate(windows, seed=4).to("cpu").groups[0].mask_BC)


def test_recordings_are_told_apart_by_corpus_and_name():
    objective = make_objective()
    windows = [make_window(0, recording="a"), make_window(1, recording="a"), make_window(2, recording="b")]
    recording = objective.collate(windows, seed=0).to("cpu").recording_N.tolist()
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
    batch = objective.collate(windows, seed=0).to("cpu")
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
