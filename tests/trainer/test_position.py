import itertools

import numpy as np
import pytest
import torch

from manifests.channels import KINDS, ChannelTag, resolve
from trainer.models.position import PositionCode, fourier_features, time_code

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
