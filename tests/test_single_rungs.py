"""What one rung promises, against closed forms and independent implementations."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT, run_rung, tiny_config

import v0_bigram
import v1_mlp
import v2_attention
import v3_gpt

V = 65


def test_v0_reaches_the_closed_form_of_counted_pairs(tmp_path):
    text = (ROOT / "input.txt").read_text(encoding="utf-8")
    places = {char: i for i, char in enumerate(sorted(set(text)))}
    ids = np.array([places[char] for char in text])
    train, val = np.split(ids, [int(0.9 * len(ids))])
    counts = np.ones((V, V))  # add-one smoothing
    np.add.at(counts, (train[:-1], train[1:]), 1)
    log_probs = np.log(counts / counts.sum(axis=1, keepdims=True))
    closed_form = -log_probs[val[:-1], val[1:]].mean()
    assert closed_form == pytest.approx(2.4819, abs=5e-5)

    process = run_rung("v0_bigram", "--data", ROOT / "input.txt", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    metrics = json.loads((tmp_path / "runs/v0_bigram/metrics.json").read_text(encoding="utf-8"))
    assert metrics["val_loss"] <= 2.49 and abs(metrics["val_loss"] - closed_form) <= 0.01


def test_v0_loss_of_a_known_table_is_exact():
    model = v0_bigram.LanguageModel(v0_bigram.Config(), 3)
    model.table.weight.data = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [1 / 3, 1 / 3, 1 / 3]]).log()
    ids = torch.tensor([0, 0, 1, 1, 2, 0])
    expected = -(math.log(0.5) + math.log(0.25) + math.log(0.8) + math.log(0.1) + math.log(1 / 3)) / 5
    for block_size in (1, 2, 3, 5, 8):
        config = tiny_config(v0_bigram, block_size=block_size)
        assert v0_bigram.evaluate(model, ids, config) == pytest.approx(expected, rel=1e-6)


def test_v1_is_the_window_network_written_as_a_loop():
    config = tiny_config(v1_mlp, window=4)
    model = v1_mlp.LanguageModel(config, V)
    nn.init.normal_(model.position_embedding)
    idx = torch.randint(V, (2, 9))
    for b in range(2):
        for t in range(9):
            slots = []
            for slot in range(4):  # slot 3 holds the current character
                at = t - 3 + slot
                token = model.token_embedding.weight[idx[b, at]] if at >= 0 else torch.zeros(config.n_embd)
                slots.append(token + model.position_embedding[slot])
            torch.testing.assert_close(model(idx)[b, t], model.mlp(torch.cat(slots)))


def test_v1_sees_its_window_and_nothing_before():
    config = tiny_config(v1_mlp, window=4)
    model = v1_mlp.LanguageModel(config, V)
    idx = torch.randint(V, (1, 8))
    other = idx.clone()
    other[0, :4] = (other[0, :4] + 1) % V
    assert torch.equal(model(idx)[0, 7], model(other)[0, 7])
    assert not torch.allclose(model(idx)[0, 6], model(other)[0, 6])


def copy_heads(v2, v3):
    """Copy the weights of v2's MultiHeadAttention into v3's."""
    heads = [[head.query, head.key, head.value] for head in v2.heads]
    v3.qkv.weight.data = torch.cat([head[part].weight for part in range(3) for head in heads])
    v3.proj.load_state_dict(v2.proj.state_dict())


@pytest.mark.parametrize("n_head", [1, 2, 4])
def test_attention_of_v2_v3_and_pytorch_are_the_same_function(n_head):
    torch.manual_seed(0)
    config = dict(n_embd=16, n_head=n_head, block_size=12)
    v2 = v2_attention.MultiHeadAttention(v2_attention.Config(**config)).double()
    v3 = v3_gpt.MultiHeadAttention(v3_gpt.Config(**config)).double()
    copy_heads(v2, v3)
    reference = nn.MultiheadAttention(16, n_head, batch_first=True).double()
    reference.in_proj_weight.data = v3.qkv.weight.data
    reference.in_proj_bias.data.zero_()
    reference.out_proj.load_state_dict(v3.proj.state_dict())
    for T in (1, 7, 12):
        x = torch.randn(3, T, 16, dtype=torch.double)
        future = torch.triu(torch.ones(T, T, dtype=torch.bool), diagonal=1)
        expected, _ = reference(x, x, x, attn_mask=future, need_weights=False)
        torch.testing.assert_close(v2(x), expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(v3(x), expected, rtol=0, atol=1e-10)


def test_v2_attention_weights_by_hand():
    head = v2_attention.SelfAttentionHead(v2_attention.Config(n_embd=2, n_head=1, block_size=4))
    for linear in (head.query, head.key, head.value):
        linear.weight.data = torch.eye(2)
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]]])
    e = [math.exp(score / math.sqrt(2)) for score in (2, 0, 4)]  # the third query against the three keys
    expected = torch.tensor(
        [[1, 0, 0], [1 / (1 + math.exp(1 / math.sqrt(2))), 0, 0], [w / sum(e) for w in e]]
    )
    expected[1, 1] = 1 - expected[1, 0]
    torch.testing.assert_close(head.weights(x)[0], expected)


def test_v3_block_is_pytorch_encoder_layer():
    torch.manual_seed(0)
    config = v3_gpt.Config(n_embd=16, n_head=4, block_size=12)
    block = v3_gpt.TransformerBlock(config).double()
    reference = nn.TransformerEncoderLayer(
        16, 4, dim_feedforward=64, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    ).double()
    reference.self_attn.in_proj_weight.data = block.attention.qkv.weight.data
    reference.self_attn.in_proj_bias.data.zero_()
    reference.self_attn.out_proj.load_state_dict(block.attention.proj.state_dict())
    reference.linear1.load_state_dict(block.mlp[0].state_dict())
    reference.linear2.load_state_dict(block.mlp[2].state_dict())
    reference.norm1.load_state_dict(block.norm1.state_dict())
    reference.norm2.load_state_dict(block.norm2.state_dict())
    x = torch.randn(3, 12, 16, dtype=torch.double)
    future = torch.triu(torch.ones(12, 12, dtype=torch.bool), diagonal=1)
    torch.testing.assert_close(block(x), reference(x, src_mask=future), rtol=0, atol=1e-10)


def test_v3_initialisation_is_that_of_gpt2():
    torch.manual_seed(0)
    model = v3_gpt.LanguageModel(v3_gpt.Config(n_layer=4, n_embd=128), V)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            scaled = name.endswith(("attention.proj.weight", "mlp.2.weight"))
            assert parameter.std().item() == pytest.approx(0.02 / math.sqrt(8) if scaled else 0.02, rel=0.05)
            assert abs(parameter.mean().item()) < 0.001
        else:
            assert torch.equal(parameter, torch.full_like(parameter, "norm" in name and "weight" in name))


def test_v3_decays_matrices_only():
    config = v3_gpt.Config(weight_decay=0.5, n_embd=16)
    model = v3_gpt.LanguageModel(config, V)
    optimizer = v3_gpt.make_optimizer(model, config)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for parameter in model.parameters():
        assert decay[id(parameter)] == (0.5 if parameter.dim() == 2 else 0.0)


def test_v3_dropout_acts_in_training_only():
    model = v3_gpt.LanguageModel(tiny_config(v3_gpt, dropout=0.5), V)
    idx = torch.randint(V, (2, 8))
    assert not torch.equal(model(idx), model(idx))
    model.eval()
    assert torch.equal(model(idx), model(idx))


def draw(probs, n=20_000, **changes):
    """Shares of each id among n draws by v3 from these probabilities."""
    torch.manual_seed(0)
    config = tiny_config(v3_gpt, **changes)
    ids = v3_gpt.sample_next(torch.tensor(probs).log().expand(n, -1), config)
    assert ids.shape == (n, 1)
    return (ids.flatten().bincount(minlength=len(probs)) / n).tolist()


PROBS = [0.1, 0.4, 0.05, 0.3, 0.15]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (dict(), PROBS),
        (dict(top_k=5), PROBS),
        (dict(top_k=99), PROBS),
        (dict(top_k=1), [0, 1, 0, 0, 0]),
        (dict(top_k=2), [0, 4 / 7, 0, 3 / 7, 0]),
        (dict(top_p=0.39), [0, 1, 0, 0, 0]),
        (dict(top_p=0.41), [0, 4 / 7, 0, 3 / 7, 0]),
        (dict(top_p=0.8), [0, 0.4 / 0.85, 0, 0.3 / 0.85, 0.15 / 0.85]),
        (dict(top_p=1e-6), [0, 1, 0, 0, 0]),
        (dict(temperature=1e-5), [0, 1, 0, 0, 0]),
        (dict(temperature=2.0), [p**0.5 / sum(q**0.5 for q in PROBS) for p in PROBS]),
        (dict(temperature=0.5), [p**2 / sum(q**2 for q in PROBS) for p in PROBS]),
        (dict(top_k=3, top_p=0.5), [0, 0.4 / 0.7, 0, 0.3 / 0.7, 0]),  # 0.4 / 0.85 is below one half
    ],
)
def test_v3_sampling(changes, expected):
    shares = draw(PROBS, **changes)
    assert all(share == 0 for share, p in zip(shares, expected, strict=True) if p == 0)
    assert shares == pytest.approx(expected, abs=0.015)


def test_v3_greedy_is_the_limit_of_every_knob():
    torch.manual_seed(0)
    model = v3_gpt.LanguageModel(tiny_config(v3_gpt), V)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    idx = torch.randint(V, (4, 5))
    greedy = v3_gpt.generate(model, idx, tiny_config(v3_gpt, greedy=True))
    for changes in (dict(top_k=1), dict(temperature=1e-4), dict(top_p=1e-6)):
        assert torch.equal(v3_gpt.generate(model, idx, tiny_config(v3_gpt, **changes)), greedy)


def test_bits_and_perplexity_of_knowing_nothing():
    logits = torch.zeros(10, V)
    assert F.cross_entropy(logits, torch.arange(10)).item() == pytest.approx(math.log(V))
