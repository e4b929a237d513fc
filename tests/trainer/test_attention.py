import torch
from torch import nn

from trainer.models.attention import Attention, AttentionPool, Block, masked_mean

torch.manual_seed(0)
TOKENS = torch.randn(3, 5, 16, dtype=torch.float64)
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


def test_pool_ignores_padding_and_batch_mates():
    pool = AttentionPool(16, num_heads=4).double()
    pooled = pool(TOKENS, MASK)
    other = torch.where(MASK[..., None], TOKENS, 1e3 * torch.ones_like(TOKENS))
    torch.testing.assert_close(pool(other, MASK), pooled, rtol=0, atol=1e-12)
    torch.testing.assert_close(pool(TOKENS[1:2, :2]), pooled[1:2], rtol=0, atol=1e-12)


def test_pool_runs_its_layer_on_a_single_member():
    pool = AttentionPool(16, num_heads=4).double()
    alone = pool(TOKENS[2:3, :1])
    assert not torch.allclose(alone, TOKENS[2:3, 0])
    torch.testing.assert_close(alone, pool(TOKENS, MASK)[2:3], rtol=0, atol=1e-12)


def test_pool_of_nothing_is_zero_with_zero_gradient():
    pool = AttentionPool(16, num_heads=4).double()
    tokens = TOKENS.clone().requires_grad_()
    pooled = pool(tokens, torch.zeros(3, 5, dtype=torch.bool))
    assert not pooled.any()
    pooled.square().sum().backward()
    assert tokens.grad is not None
    assert not tokens.grad.any()
    assert all(torch.isfinite(parameter.grad).all() for parameter in pool.parameters() if parameter.grad is not None)


def test_pool_does_not_depend_on_the_order_of_members():
    pool = AttentionPool(16, num_heads=4).double()
    order = torch.tensor([4, 2, 0, 1, 3])
    torch.testing.assert_close(pool(TOKENS[:, order], MASK[:, order]), pool(TOKENS, MASK), rtol=0, atol=1e-12)


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
