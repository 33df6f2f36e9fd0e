"""The measures and the picture of tools/week_5.py."""

import pytest
import torch
import torch.nn.functional as F
import week_5
from conftest import ROOT, tiny_config

import v4_rope_alibi as v4


@pytest.mark.parametrize("block_size", [8, 30])
def test_window_losses_are_those_of_single_windows(block_size, monkeypatch):
    torch.manual_seed(0)
    ids = torch.randint(65, (1007,))
    monkeypatch.setattr(week_5, "splits", lambda config: (None, ids))
    config = tiny_config(v4, block_size=block_size)
    model = v4.LanguageModel(config, 65)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.eval()
    whole, last = [], []
    with torch.inference_mode():
        for start in range(0, len(ids) - 1, block_size):
            x, y = (
                ids[start : start + block_size][: len(ids) - 1 - start],
                ids[start + 1 : start + block_size + 1],
            )
            losses = F.cross_entropy(model(x[None])[0], y, reduction="none").tolist()
            whole += losses
            last += losses[3 * block_size // 4 :]
    expected = [sum(whole) / len(whole), sum(last) / len(last)]
    assert week_5.window_losses(model, config) == pytest.approx(expected, rel=1e-5)
    assert len(whole) == 1006


def test_the_raised_base_leaves_the_fastest_angle_and_brings_the_slowest_back():
    """bloc97 2023: at n times the length the slowest angle turns as far as it did at the length itself."""
    config = tiny_config(v4, n_embd=32, n_head=2)
    for n in (2, 4):
        raised = tiny_config(v4, n_embd=32, n_head=2, position_base=week_5.raised_base(config, n))
        before, after = (v4.position_angles(n * 8 + 1, 16, c, "cpu") for c in (config, raised))
        torch.testing.assert_close(after[:, 0], before[:, 0])
        torch.testing.assert_close(after[n * 8, -1], before[8, -1])


def test_rmsnorm_is_that_of_pytorch():
    ours, theirs = week_5.RMSNorm(32), torch.nn.RMSNorm(32, eps=1e-5)
    torch.nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    for size in (1e-3, 1, 100):
        x = size * torch.randn(4, 7, 32)
        torch.testing.assert_close(ours(x), theirs(x))


def test_with_rmsnorm_no_layernorm_is_left():
    parts = [type(part) for part in week_5.WithRMSNorm(tiny_config(v4), 65).modules()]
    assert parts.count(week_5.RMSNorm) == 2 * 2 + 1 and torch.nn.LayerNorm not in parts


def test_kinds_of_tokens():
    kinds = {"a": "vowel", " u": "vowel", "th": "consonant", "y": "consonant", "\u00e4": "consonant"}
    kinds |= {"A": "capital", " The": "capital", "3": "digit", "42": "digit"}
    kinds |= dict.fromkeys([" ", "\n", "", "!", "'ll", "\ufffd"], "punctuation, space")
    assert {token: week_5.kind_of(token) for token in kinds} == kinds


def test_embedding_picture_shows_the_principal_components(monkeypatch, tmp_path):
    """Embeddings in a plane of 16 dimensions: the picture keeps their distances, of the 100 most frequent."""
    texts, n = {}, 130
    monkeypatch.setattr(
        week_5.plt.Axes, "text", lambda self, x, y, s, **rest: texts.update({s: (x, y, rest["color"])})
    )
    model = v4.LanguageModel(tiny_config(v4), n)
    coordinates = torch.stack([10 * torch.randn(n), torch.randn(n)], dim=1)
    model.token_embedding.weight.data = 3 + coordinates @ torch.linalg.qr(torch.randn(16, 2))[0].T
    vocab = "".join(map(chr, range(n)))
    ids = torch.arange(n).repeat_interleave(torch.arange(n))  # id i occurs i times, id 0 never
    week_5.plot_embeddings(model, v4.CharTokenizer(vocab), ids, tmp_path / "embeddings.png")
    shown = [repr(char)[1:-1].replace(" ", "\u2423") for char in vocab[30:]]
    assert set(texts) == set(shown) and {"\u2423", "a", "$"} <= set(texts)
    assert texts["a"][2] == texts["o"][2] != texts["b"][2]
    points = torch.tensor([texts[label][:2] for label in shown])
    exact = "donot_use_mm_for_euclid_dist"
    ours, theirs = (torch.cdist(x, x, compute_mode=exact) for x in (points, coordinates[30:]))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert points[:, 0].std() > 5 * points[:, 1].std()


def test_the_text_of_the_experiments_is_that_of_the_rungs():
    config = v4.Config(data=str(ROOT / "input.txt"))
    train_ids, val_ids = week_5.splits(config)
    assert (len(train_ids), len(val_ids)) == (len(week_5.TRAIN), len(week_5.VAL))
