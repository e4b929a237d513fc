import pytest
import torch
from torch import nn

from trainer.models.attention import Attention, AttentionPool, Block, LayerPool, masked_mean, run_blocks

torch.manual_seed(0)
TOKENS = torch.randn(3, 5, 16, dtype=torch.float64)
POOLS = {
    "query": lambda: AttentionPool(16, num_heads=4).double(),
    "layer": lambda: LayerPool(16, num_heads=4, hidden=32).double(),
}
MASK = torch.tensor([[True] * 5, [True, True, False, False, False], [True, False, False, False, False]])


def test_attention_equals_a_slow_reference():
    attention = Attention(16, num_heads=4).double()
    query, key, value = (layer(TOKENS) for layer in (attention.q, attention.k, attention.v))
    mixed = torch.zeros_like(TOKENS)
    for b in range(3):
        for head in range(4):
            part = slice(4 * head, 4 * head + 4)
            score = query[b, :, part] @ key[b, :, part].T / 2.0
            score[:, ~MASK[b]] = -torch.inf
            mixed[b, :, part] = score.softmax(-1) @ value[b, :, part]
    torch.testing.assert_close(attention(TOKENS, MASK), attention.o(mixed), rtol=0, atol=1e-12)


def test_masked_keys_do_not_enter():
    block = Block(16, num_heads=4, hidden=32).double()
    other = torch.where(MASK[..., None], TOKENS, 1e3 * torch.ones_like(TOKENS))
    torch.testing.assert_close(block(TOKENS, MASK)[MASK], block(other, MASK)[MASK], rtol=0, atol=1e-12)
    assert not torch.allclose(block(TOKENS)[MASK], block(other)[MASK])


@pytest.mark.parametrize("kind", list(POOLS))
def test_pool_ignores_padding_and_batch_mates(kind):
    pool = POOLS[kind]()
    pooled = pool(TOKENS, MASK)
    other = torch.where(MASK[..., None], TOKENS, 1e3 * torch.ones_like(TOKENS))
    torch.testing.assert_close(pool(other, MASK), pooled, rtol=0, atol=1e-12)
    torch.testing.assert_close(pool(TOKENS[1:2, :2]), pooled[1:2], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", list(POOLS))
def test_pool_runs_its_layer_on_a_single_member(kind):
    pool = POOLS[kind]()
    alone = pool(TOKENS[2:3, :1])
    assert not torch.allclose(alone, TOKENS[2:3, 0])
    torch.testing.assert_close(alone, pool(TOKENS, MASK)[2:3], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", list(POOLS))
def test_pool_of_nothing_is_zero_with_zero_gradient(kind):
    pool = POOLS[kind]()
    tokens = TOKENS.clone().requires_grad_()
    pooled = pool(tokens, torch.zeros(3, 5, dtype=torch.bool))
    assert not pooled.any()
    pooled.square().sum().backward()
    assert tokens.grad is not None
    assert not tokens.grad.any()
    assert all(torch.isfinite(parameter.grad).all() for parameter in pool.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("kind", list(POOLS))
def test_pool_does_not_depend_on_the_order_of_members(kind):
    pool = POOLS[kind]()
    order = torch.tensor([4, 2, 0, 1, 3])
    torch.testing.assert_close(pool(TOKENS[:, order], MASK[:, order]), pool(TOKENS, MASK), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_blocks_computed_again_give_the_same_bits_and_keep_less(dropout):
    blocks = nn.ModuleList(Block(16, num_heads=4, hidden=64, dropout=dropout) for _ in range(3))
    results, kept = [], []
    for is_checkpointed in (False, True):
        blocks.zero_grad()
        torch.manual_seed(1)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            tokens = run_blocks(blocks, TOKENS.float().requires_grad_(), is_checkpointed=is_checkpointed)
        tokens.square().sum().backward()
        results.append([tokens.detach(), *(parameter.grad for parameter in blocks.parameters())])
        kept.append(sum(sizes))
    assert all(torch.equal(one, again) for one, again in zip(*results, strict=True))
    assert kept[1] < 0.2 * kept[0]


def test_masked_mean():
    values = torch.tensor([[[2.0], [4.0], [float("nan")]]])
    assert masked_mean(values, torch.tensor([[True, True, False]])).tolist() == [[3.0]]
    assert masked_mean(values, torch.zeros(1, 3, dtype=torch.bool)).tolist() == [[0.0]]


def test_every_linear_is_called_as_a_module():
    """A LoRA wrapper replaces the module: whatever reads `.weight` instead would silently skip the adapter."""
    block = Block(16, num_heads=4, hidden=32)
    called = set()
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_, name=name: called.add(name))
    block.eval()(TOKENS.float())
    assert called == {"attn.q", "attn.k", "attn.v", "attn.o", "fc1", "fc2"}
