from itertools import islice

import numpy as np
import pytest
import torch

from manifests.channels import KINDS, ChannelTag, resolve
from manifests.errors import ConfigError, ContractError
from trainer.batches import ChannelBatch, Cut, StoredBatch, collate_channels, draw_cuts, generator, stable_hash
from trainer.data import Order
from trainer.filters import SampleFilter
from trainer.read import SnapshotReader, Tags, Window
from trainer.samples import SnapshotSource, load_streams
from trainer.views import VIEWS


def make_tag(symbol, *, rate=64, role="signal"):
    tag = resolve(symbol)
    assert isinstance(tag, ChannelTag)
    ids = {"anode_id": tag.anode_id, "cathode_id": tag.cathode_id}
    numbers = {"scale": 0.01, "mean": 0.0, "sd": 1.0, "median": 0.0, "mad": 0.7}
    return {"symbol": symbol, "kind": tag.kind, "role": role, "unit": tag.unit, "rate": [rate, 1], **ids, **numbers}


def make_window(symbols, *, key="w0", rate=64, seconds=4):
    rng = np.random.default_rng(stable_hash(key))
    ucs, arrays = {}, {}
    for symbol in symbols:
        ucs.setdefault(symbol.split(":")[0], []).append(make_tag(symbol, rate=rate))
    for kind, tags in ucs.items():
        arrays[kind] = rng.integers(-300, 300, (len(tags), rate * seconds)).astype(np.int16)
    meta = {"ucs": ucs, "start": 0, "length": rate * seconds, "rate": [rate, 1]}
    return Window(key=key, position=0, epoch=0, corpus="c", recording="r", meta=meta, arrays=arrays)


def test_channels_lie_in_the_order_of_kinds_padded_with_a_false_mask():
    few, many = make_window(["ecg:II"]), make_window(["ecg:II", "eeg:C3-M2", "eeg:C4-M1"], key="w1")
    batch = collate_channels([few, many], kinds=("eeg", "ecg"), view="zscore").to("cpu")
    assert batch.signal_BCT.shape == (2, 3, 256)
    assert batch.signal_BCT.dtype == torch.float32
    assert batch.mask_BC.tolist() == [[True, False, False], [True, True, True]]
    expected = [make_tag(symbol)["anode_id"] for symbol in ("eeg:C3-M2", "eeg:C4-M1", "ecg:II")]
    assert batch.anode_BC[1].tolist() == expected
    assert batch.kind_BC[1].tolist() == [KINDS.index("eeg")] * 2 + [KINDS.index("ecg")]
    assert batch.rate_hz == 64.0
    np.testing.assert_allclose(batch.signal_BCT[1, 0].numpy(), many.arrays["eeg"][0] * 0.01, atol=1e-6)
    np.testing.assert_allclose(batch.signal_BCT[1, 2].numpy(), many.arrays["ecg"][0] * 0.01, atol=1e-6)
    padding = ~batch.mask_BC
    assert not batch.signal_BCT[padding].any()
    assert not torch.stack([batch.anode_BC, batch.cathode_BC, batch.kind_BC])[:, padding].any()


@pytest.mark.parametrize("role", ["reference", "flag", "derived", "marker", "unmapped"])
def test_rows_that_are_not_signals_never_enter(role):
    window = make_window(["eeg:C3-M2", "eeg:C4-M1"])
    window.meta["ucs"]["eeg"][0]["role"] = role
    batch = collate_channels([window], kinds=("eeg",), view="zscore").to("cpu")
    assert batch.mask_BC.tolist() == [[True]]
    np.testing.assert_allclose(batch.signal_BCT[0, 0].numpy(), window.arrays["eeg"][1] * 0.01, atol=1e-6)


def test_a_channel_list_selects_symbols():
    window = make_window(["eeg:C3-M2", "eeg:C4-M1"])
    batch = collate_channels([window], kinds=("eeg",), view="zscore", channels=["eeg:C4-M1"]).to("cpu")
    np.testing.assert_allclose(batch.signal_BCT[0, 0].numpy(), window.arrays["eeg"][1] * 0.01, atol=1e-6)
    assert batch.mask_BC.sum() == 1


def test_a_window_without_such_channels_keeps_a_masked_row():
    batch = collate_channels([make_window(["eeg:C3-M2"])], kinds=("ecg",), view="zscore").to("cpu")
    assert batch.signal_BCT.shape == (1, 1, 256)
    assert not batch.mask_BC.any()
    assert not batch.signal_BCT.any()


def test_mixed_rates_are_refused_with_both_places():
    windows = [make_window(["eeg:C3-M2"]), make_window(["eeg:C3-M2"], key="w1", rate=128)]
    with pytest.raises(ConfigError, match=r"w0\.eeg: 64 Hz x 256; w1\.eeg: 128 Hz x 512"):
        collate_channels(windows, kinds=("eeg",), view="zscore")


def test_unknown_kind_and_empty_batch_are_refused():
    with pytest.raises(ConfigError, match="'brain' is not a kind"):
        collate_channels([make_window(["eeg:C3-M2"])], kinds=("brain",), view="zscore")
    with pytest.raises(ContractError, match="0 windows"):
        collate_channels([], kinds=("eeg",), view="zscore")


def test_to_moves_every_tensor():
    batch = collate_channels([make_window(["eeg:C3-M2"])], kinds=("eeg",), view="zscore").to("meta")
    assert isinstance(batch, ChannelBatch)
    assert batch.signal_BCT.device.type == batch.mask_BC.device.type == batch.kind_BC.device.type == "meta"


@pytest.mark.parametrize("view", ["zscore", "robust", "labram"])
def test_the_host_holds_int16_and_the_device_gets_each_window_in_its_view(view):
    windows = [make_window(["eeg:C3-M2", "eeg:C4-M1"]), make_window(["eeg:C3-M2"], key="w1"), make_window([], key="w2")]
    host = collate_channels(windows, kinds=("eeg",), view=view)
    assert isinstance(host, StoredBatch)
    assert host.stored_RT.dtype == torch.int16
    assert host.stored_RT.shape == (3, 256)  # real channels only
    assert host.num_samples == 256
    batch = host.to("cpu")
    for window, signal_CT, mask_C in zip(windows, batch.signal_BCT, batch.mask_BC, strict=True):
        if "eeg" in window.arrays:
            expected = VIEWS[view](window.arrays["eeg"], window.meta["ucs"]["eeg"])
            np.testing.assert_array_equal(signal_CT[mask_C], expected)
        assert not signal_CT[~mask_C].any()


def test_padding_is_zero_also_in_memory_used_before():
    for seconds in (5, 4):
        windows = [make_window(["eeg:C3-M2", "eeg:C4-M1"], seconds=seconds), make_window([], key="w1")]
        windows[1].meta["length"] = 64 * seconds
        batch = collate_channels(windows, kinds=("eeg",), view="zscore").to("cpu")
        assert batch.signal_BCT[0].any()
        assert not batch.signal_BCT[1].any()
        batch.signal_BCT[:] = 7.0  # what a later batch finds


def test_a_batch_that_is_held_stays_as_it_is(tiny_snapshot):
    """Its memory is lent to no other batch while it lives, in any thread, and is used again after it."""
    order = Order(
        load_streams([SnapshotSource(path=str(tiny_snapshot))], split="train", keep=SampleFilter()),
        seed=5,
        global_batch=6,
    )
    reader = SnapshotReader(order.streams, num_threads=3)
    stream = reader.stream(order, lambda _, windows: collate_channels(windows, kinds=("eeg", "ecg"), view="zscore"))
    first, *held = islice(stream, 3)
    before = [batch.stored_RT.clone() for batch in (first, *held)]
    addresses = {batch.stored_RT.data_ptr() for batch in (first, *held)}
    rows = first.stored_RT[4:6]  # a part keeps all of it
    del first
    later = set()
    for batch in islice(stream, 40):
        later.add(batch.stored_RT.data_ptr())
        assert not addresses & later
    assert len(later) < 20
    assert torch.equal(rows, before[0][4:6])
    for batch, stored in zip(held, before[1:], strict=True):
        assert torch.equal(batch.stored_RT, stored)
    stream.close()


def test_windows_that_share_tags_are_told_apart_by_view_and_channels():
    windows = [make_window(["eeg:C3-M2", "eeg:C4-M1"], key=f"w{n}") for n in range(2)]
    shared = Tags(windows[0].meta["ucs"])
    for window in windows:
        window.meta["ucs"] = shared
    for view in ("zscore", "labram", "zscore"):
        for channels in (None, ["eeg:C4-M1"]):
            batch = collate_channels(windows, kinds=("eeg",), view=view, channels=channels).to("cpu")
            tags = shared["eeg"][0 if channels is None else 1 :]
            for window, signal_CT in zip(windows, batch.signal_BCT, strict=True):
                expected = VIEWS[view](window.arrays["eeg"][-len(tags) :], tags)
                np.testing.assert_array_equal(signal_CT, expected)


def test_a_cut_takes_the_same_stretch_of_every_rate():
    window = make_window(["eeg:C3-M2"], seconds=300)
    slow = make_window(["eeg:C3-M2"], seconds=300, rate=10)
    cut = Cut(seconds=60.0, share=0.5)
    batch = collate_channels([window], kinds=("eeg",), view="zscore", cuts=[cut]).to("cpu")
    start = 120 * 64
    np.testing.assert_allclose(batch.signal_BCT[0, 0], window.arrays["eeg"][0, start : start + 3840] * 0.01, atol=1e-6)
    assert collate_channels([slow], kinds=("eeg",), view="zscore", cuts=[cut]).num_samples == 600
    assert abs(cut.samples(3000, 10.0)[0] / 10 - cut.samples(300 * 64, 64.0)[0] / 64) <= 0.1
    for share in (0.0, 0.999999):
        first, width = Cut(seconds=60.0, share=share).samples(3000, 10.0)
        assert (first, width) == (round(share * 2400), 600)
    with pytest.raises(ConfigError, match=r"60 s, but w0 has 4 s; shorten it"):
        collate_channels([make_window(["eeg:C3-M2"])], kinds=("eeg",), view="zscore", cuts=[cut])


def test_cuts_depend_on_seed_epoch_and_key_alone():
    windows = [make_window([], key=f"w{n}") for n in range(50)]
    cuts = draw_cuts(windows, 60.0, seed=1)
    assert draw_cuts(windows[::-1], 60.0, seed=1) == cuts[::-1]
    assert not set(cuts) & set(draw_cuts(windows, 60.0, seed=2))
    for window in windows:
        window.epoch = 1
    assert not set(cuts) & set(draw_cuts(windows, 60.0, seed=1))
    shares = [cut.share for cut in cuts]
    assert min(shares) < 0.1
    assert 0.9 < max(shares) < 1


def test_hashes_are_stable_and_tell_parts_apart():
    assert stable_hash(1, 23) != stable_hash(12, 3)
    assert (
        stable_hash("key", 0) == 3834238526293362837
    )  # fixed: a resume after an upgrade must draw the same augmentations
    assert 0 <= stable_hash("key") < 2**63
    assert generator(1, "k").random() == generator(1, "k").random() != generator(2, "k").random()
