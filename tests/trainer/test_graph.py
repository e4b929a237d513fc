import numpy as np
import pytest
import torch

from manifests.channels import ChannelTag, resolve
from trainer.batches import KIND_IDS, ChannelBatch
from trainer.models.graph import UNKNOWN_DISTANCE, ChannelDistance, GraphLayer

GRAPHS = ["gat", "gcn", "mean"]


def batch_of(*symbols):
    tags = [tag for tag in map(resolve, symbols) if isinstance(tag, ChannelTag)]
    assert len(tags) == len(symbols)
    ids = torch.tensor([[tag.anode_id, tag.cathode_id, KIND_IDS[tag.kind]] for tag in tags])[None]
    return ChannelBatch(
        signal_BCT=torch.zeros(1, len(tags), 4),
        mask_BC=torch.ones(1, len(tags), dtype=torch.bool),
        anode_BC=ids[..., 0],
        cathode_BC=ids[..., 1],
        kind_BC=ids[..., 2],
        rate_hz=1.0,
    )


def make_layer(graph, width=8):
    torch.manual_seed(0)
    layer = GraphLayer(width, graph=graph, num_heads=2).double()
    if graph == "gat":
        torch.nn.init.uniform_(layer.nearness)
    return layer


def make_input(num_channels=4):
    torch.manual_seed(1)
    tokens = torch.randn(2, num_channels, 3, 8, dtype=torch.float64)
    distance = torch.rand(2, num_channels, num_channels, dtype=torch.float64)
    distance = (distance + distance.mT) * (1 - torch.eye(num_channels))
    return tokens, torch.ones(2, num_channels, dtype=torch.bool), distance


def slow_reference(layer, tokens, mask, distance):
    """One pair of channels at a time, from the papers' equations."""
    out = tokens.clone()
    windows, channels, times, width = tokens.shape
    size = width // layer.num_heads
    sent = layer.project(layer.norm(tokens))
    for b in range(windows):
        present = [c for c in range(channels) if mask[b, c]]
        for p in range(times):
            for i in present:
                for h in range(layer.num_heads):
                    part = slice(h * size, (h + 1) * size)
                    weights = []
                    for j in present:
                        d = float(distance[b, i, j])
                        if layer.graph == "gat":
                            score = layer.receiver[h] @ sent[b, i, p, part] + layer.sender[h] @ sent[b, j, p, part]
                            score = score - layer.nearness[h] * d
                            weights.append(float((score if score > 0 else 0.2 * score).exp().detach()))
                        elif layer.graph == "gcn":
                            degrees = [sum(np.exp(-(float(distance[b, k, m]) ** 2)) for m in present) for k in (i, j)]
                            weights.append(np.exp(-(d**2)) / np.sqrt(degrees[0] * degrees[1]))
                        else:
                            weights.append(1.0)
                    total = 1.0 if layer.graph == "gcn" else sum(weights)
                    heard = sum(w / total * sent[b, j, p, part] for w, j in zip(weights, present, strict=True))
                    heard = heard + layer.bias[part]
                    out[b, i, p, part] += torch.where(heard > 0, heard, heard.exp() - 1)
    return out


@pytest.mark.parametrize("graph", GRAPHS)
def test_equals_the_slow_reference_with_an_absent_channel(graph):
    layer = make_layer(graph)
    tokens, mask, distance = make_input()
    mask[1, 2] = False
    got = layer(tokens, mask, distance)
    expected = slow_reference(layer, tokens, mask, distance)
    torch.testing.assert_close(got[mask], expected[mask], rtol=0, atol=1e-10)


@pytest.mark.parametrize("graph", GRAPHS)
def test_the_order_of_channels_and_absent_ones_change_nothing(graph):
    layer = make_layer(graph)
    tokens, mask, distance = make_input()
    mask[:, 3] = False
    before = layer(tokens, mask, distance)
    order = torch.tensor([2, 0, 3, 1])
    turned = layer(tokens[:, order], mask[:, order], distance[:, order][:, :, order])
    torch.testing.assert_close(turned[mask[:, order]], before[:, order][mask[:, order]], rtol=0, atol=1e-12)
    changed = tokens.clone()
    changed[:, 3] = 1e3
    torch.testing.assert_close(layer(changed, mask, distance)[mask], before[mask], rtol=0, atol=1e-12)
    changed[:, 2] = -1.0
    assert not torch.allclose(layer(changed, mask, distance)[:, 0], before[:, 0])


def test_a_window_without_channels_is_finite():
    tokens, mask, distance = make_input()
    mask[0] = False
    for graph in GRAPHS:
        assert make_layer(graph)(tokens, mask, distance).isfinite().all()


def test_distances_are_those_on_the_head_and_one_where_there_is_no_place():
    distance = ChannelDistance()(batch_of("eeg:C3", "eeg:C4", "eeg:Cz", "eeg:C3-C4", "ecg:II"))[0]
    assert torch.equal(distance, distance.T)
    assert not distance.diagonal().any()
    assert float(distance[0, 1]) > 1.2  # across the head
    assert float(distance[0, 2]) == pytest.approx(float(distance[1, 2]), abs=0.05)
    assert float(distance[0, 3]) == pytest.approx(float(distance[1, 3]), abs=0.05)
    assert float(distance[0, 3]) == pytest.approx(float(distance[0, 1]) / 2, abs=0.01)
    assert distance[4, :4].tolist() == [UNKNOWN_DISTANCE] * 4
