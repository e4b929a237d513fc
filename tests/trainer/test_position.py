import itertools

import numpy as np
import pytest
import torch

from manifests.channels import KINDS, ChannelTag, resolve
from manifests.errors import ConfigError
from trainer.models.position import LegacyPositionCode, PositionCode, fourier_features, legacy_features, time_code

# fmt: off
SITES = [
    "Fp1", "Fpz", "Fp2", "F7", "F3", "Fz", "F4", "F8", "FC5", "FC1", "FC2", "FC6", "T7", "C3", "Cz", "C4", "T8",
    "CP5", "CP1", "CP2", "CP6", "P7", "P3", "Pz", "P4", "P8", "O1", "Oz", "O2", "M1", "M2",
]
# fmt: on


@pytest.fixture(scope="module")
def code():
    torch.manual_seed(0)
    return PositionCode(64).eval()


def code_of(module, label):
    tag = resolve(label)
    assert isinstance(tag, ChannelTag), label
    ids = [torch.tensor([[value]]) for value in (tag.anode_id, tag.cathode_id, KINDS.index(tag.kind))]
    with torch.no_grad():
        return module(*ids)[0, 0]


def cosine(a, b):
    return float(torch.cosine_similarity(a, b, dim=0))


def test_left_differs_from_right_and_all_31_sites_from_each_other(code):
    codes = {site: code_of(code, f"eeg:{site}") for site in SITES}
    assert cosine(codes["C3"], codes["C4"]) < 0.9
    closest = max((cosine(codes[a], codes[b]), a, b) for a, b in itertools.combinations(SITES, 2))
    assert closest[0] < 0.99, closest


def test_geometry_alone_tells_the_sites_apart(code):
    blind = PositionCode(64).eval()
    for table in (blind.anode, blind.cathode):
        torch.nn.init.zeros_(table.weight)
    codes = [code_of(blind, f"eeg:{site}") for site in SITES]
    assert max(cosine(a, b) for a, b in itertools.combinations(codes, 2)) < 0.99


def test_polarity_is_seen(code):
    assert cosine(code_of(code, "eeg:C3-M2"), code_of(code, "eeg:M2-C3")) < 0.95


def test_the_reference_is_seen(code):
    assert cosine(code_of(code, "eeg:C3-M2"), code_of(code, "eeg:C3-Cz")) < 0.99


@pytest.mark.parametrize(("alias", "name"), [("T3", "T7"), ("T4", "T8"), ("T5", "P7"), ("T6", "P8")])
def test_aliases_have_one_code(code, alias, name):
    assert torch.equal(code_of(code, f"EEG {alias}"), code_of(code, f"EEG {name}"))


def test_the_kind_is_seen(code):
    ids = torch.zeros(1, len(KINDS), dtype=torch.long)
    with torch.no_grad():
        codes = code(ids, ids, torch.arange(len(KINDS))[None])[0]
    assert max(cosine(a, b) for a, b in itertools.combinations(codes, 2)) < 0.9


def test_unknown_coordinates_contribute_nothing():
    xyz = np.array([[np.nan] * 3, [0.1, 0.2, 0.3]], dtype=np.float32)
    features = fourier_features(xyz, num_frequencies=4)
    assert features.shape == (2, 25)
    assert not features[0].any()
    assert features[1, -1] == 1.0


def test_all_axes_count():
    base = np.zeros((1, 3), dtype=np.float32)
    for axis in range(3):
        moved = base.copy()
        moved[0, axis] = 1.9  # across the whole head
        change = fourier_features(moved, num_frequencies=6) - fourier_features(base, num_frequencies=6)
        assert np.abs(change).max() > 0.5


def test_padding_id_stays_zero_and_learns_nothing(code):
    assert not code.anode.weight[0].any()
    ids = torch.zeros(1, 2, dtype=torch.long)
    code(ids, ids, ids).square().sum().backward()
    assert code.anode.weight.grad is not None
    assert not code.anode.weight.grad[0].any()


def test_time_code_tells_every_token_of_a_night_apart():
    tokens = time_code(2000, 64, like=torch.zeros(1))
    distance = torch.cdist(tokens, tokens) + 10 * torch.eye(2000)
    assert distance.min() > 0.05


@pytest.fixture(scope="module")
def legacy():
    torch.manual_seed(0)
    return LegacyPositionCode(128).eval()


def test_the_published_code_cannot_tell_left_from_right(legacy):
    """Its defect, kept for comparison: `legacy_features` of mirrored places are equal; ours differ."""
    left = torch.rand(20, 3, dtype=torch.float64) - 0.5
    right = left * torch.tensor([-1.0, 1.0, 1.0])
    torch.testing.assert_close(legacy_features(left, width=128), legacy_features(right, width=128), rtol=0, atol=1e-12)
    ours = [fourier_features(places.numpy(), num_frequencies=6) for places in (left, right)]
    assert np.abs(ours[0] - ours[1]).max() > 0.5
    for one, other in (("C3", "C4"), ("F3", "F4"), ("O1", "O2")):
        # Not quite 1: our coordinates, measured on a template head, are not quite symmetric.
        assert cosine(code_of(legacy, f"eeg:{one}"), code_of(legacy, f"eeg:{other}")) > 0.9
    moved = left + torch.tensor([0.0, 0.2, 0.0])
    assert (legacy_features(left, width=128) - legacy_features(moved, width=128)).abs().max() > 0.1


def test_the_published_code_cannot_tell_polarity_and_knows_no_other_channels(legacy):
    assert torch.equal(code_of(legacy, "eeg:C3-M2"), code_of(legacy, "eeg:M2-C3"))
    assert not torch.equal(code_of(legacy, "eeg:C3-M2"), code_of(legacy, "eeg:C3"))
    for other in ("ecg:II", "resp:thorax", "emg:chin"):
        assert not code_of(legacy, other).any()


def test_the_published_code_by_its_equation():
    """phi = 2 pi ((x + m) fx + (y + m) fy + (z + m) fz) / (1 + 2 m), m = 0.4, cut to the first width / 2, z fastest."""
    xyz = np.array([0.1, -0.3, 0.7])
    phases = [
        2 * np.pi * ((xyz + 0.4) @ np.array([fx, fy, fz])) / 1.8
        for fx in range(8)
        for fy in range(8)
        for fz in range(8)
    ]
    expected = np.concatenate([np.cos(phases[:64]), np.sin(phases[:64])])
    np.testing.assert_allclose(legacy_features(torch.from_numpy(xyz), width=128).numpy(), expected, atol=1e-12)


def test_the_published_code_refuses_a_width_that_it_has_no_phases_for():
    with pytest.raises(ConfigError, match="1026"):
        LegacyPositionCode(1026)
