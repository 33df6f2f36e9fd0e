"""What v4_rope_alibi.py promises, against transformers, PyTorch, formulas and the rung below."""

import json
import math

import pytest
import torch
import torch.nn as nn
from conftest import run_here, tiny_config, tiny_flags
from test_command_line import refused
from transformers import BloomConfig, LlamaConfig
from transformers.models.bloom.modeling_bloom import BloomAttention, build_alibi_tensor
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

import v3_gpt
import v4_rope_alibi as v4
from bpe_tokenizer import BPETokenizer

V = 65
BEYOND = ("sinusoidal", "rope", "alibi", "none")  # these have no last position


@pytest.fixture
def float64():
    """Compute in float64 as a matter of course."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def close(a, b):
    """Equal to 1e-6."""
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6, check_dtype=False)


def make_attention(config):
    """An attention layer whose weights are large enough that positions matter."""
    attention = v4.MultiHeadAttention(config)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.2)
    return attention.eval()


def make_model(**changes):
    """A model of small settings with weights large enough that every part of it matters."""
    torch.manual_seed(0)
    config = tiny_config(v4, **changes)
    model = v4.LanguageModel(config, V)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval(), config


@pytest.mark.parametrize(
    ("T", "base", "scale"), [(1, 1e4, 1), (8, 1e4, 1), (300, 1e4, 1), (100, 500, 1), (64, 1e4, 4)]
)
def test_rope_is_that_of_llama(T, base, scale):
    torch.manual_seed(0)
    config = tiny_config(v4, n_embd=48, n_head=3, position_base=base, position_scale=scale)
    rotation = v4.rope_rotation(T, config, "cpu").double()
    rope = {"rope_type": "linear", "factor": scale, "rope_theta": base}
    llama = LlamaConfig(hidden_size=48, num_attention_heads=3, head_dim=16, rope_parameters=rope)
    q, k = torch.randn(2, 2, 3, T, 16, dtype=torch.float64)
    cos, sin = LlamaRotaryEmbedding(llama)(q, torch.arange(T)[None])
    for ours, theirs in zip((q, k), apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        close(v4.apply_rope(ours, rotation), theirs)


def test_attention_with_rope_is_that_of_llama():
    torch.manual_seed(0)
    T, config = 40, tiny_config(v4, n_embd=48, n_head=3)
    ours = make_attention(config).double()
    llama = LlamaConfig(
        hidden_size=48, num_attention_heads=3, head_dim=16, num_key_value_heads=3, attention_bias=True
    )
    llama._attn_implementation = "eager"
    theirs = LlamaAttention(llama, 0).double().eval()
    projections = theirs.q_proj, theirs.k_proj, theirs.v_proj
    for projection, weight in zip(projections, ours.qkv.weight.chunk(3), strict=True):
        projection.weight.data, projection.bias.data = weight, torch.zeros(48, dtype=torch.float64)
    theirs.o_proj.load_state_dict(ours.proj.state_dict())
    x = torch.randn(2, T, 48, dtype=torch.float64)
    mask = torch.full((T, T), -math.inf, dtype=torch.float64).triu(1)
    with torch.inference_mode():
        cos_sin = LlamaRotaryEmbedding(llama)(x, torch.arange(T)[None])
        close(ours(x, v4.rope_rotation(T, config, "cpu").double(), None), theirs(x, cos_sin, mask)[0])


@pytest.mark.parametrize("n_head", [*range(1, 21), 32, 40])
def test_alibi_slopes_are_those_of_bloom(n_head, float64):
    config = tiny_config(v4, n_embd=2 * n_head, n_head=n_head)
    bias = v4.alibi_bias(9, config, "cpu")[0]  # (n_head, T, T)
    theirs = build_alibi_tensor(torch.ones(1, 9), n_head, torch.float64)  # (n_head, 1, T), rises to the right
    theirs = theirs - theirs[:, 0, :, None]  # zero where a query meets its own key
    past = torch.ones(9, 9, dtype=torch.bool).tril()
    close(bias[:, past], theirs[:, past])
    assert (bias[:, ~past] == -math.inf).all()


def test_alibi_slopes_of_the_paper():
    """Those that the paper prints for 8 and 16 heads; for 12 its code takes 8, then 4 of those of 16."""

    def slopes(n_head):
        return -v4.alibi_bias(2, tiny_config(v4, n_embd=2 * n_head, n_head=n_head), "cpu")[0, :, 1, 0]

    assert slopes(8).tolist() == [1 / 2**i for i in range(1, 9)]
    assert slopes(16)[:2].tolist() == pytest.approx([2**-0.5, 2**-1])
    assert slopes(12).tolist() == pytest.approx([*slopes(8).tolist(), *slopes(16)[:8:2].tolist()])


@pytest.mark.parametrize("n_head", [3, 4])
def test_attention_with_alibi_is_that_of_bloom(n_head, float64):
    T, C = 20, 8 * n_head
    config = tiny_config(v4, n_embd=C, n_head=n_head, position="alibi")
    ours = make_attention(config)
    theirs = BloomAttention(BloomConfig(hidden_size=C, n_head=n_head, hidden_dropout=0.0), 0).eval()
    weight = ours.qkv.weight.view(3, n_head, 8, C).transpose(0, 1)  # BLOOM keeps a head's q, k and v together
    theirs.query_key_value.weight.data = weight.reshape(3 * C, C)
    theirs.query_key_value.bias.data.zero_()
    theirs.dense.load_state_dict(ours.proj.state_dict())
    x = torch.randn(2, T, C)
    alibi = build_alibi_tensor(torch.ones(2, T), n_head, torch.float64)
    with torch.inference_mode():
        mask = torch.full((T, T), -math.inf).triu(1)
        bias = v4.alibi_bias(T, config, "cpu")
        close(ours(x, None, bias), theirs(x, torch.zeros_like(x), alibi, mask)[0])


def test_sinusoidal_positions_are_the_formula(float64):
    table = v4.sinusoidal_embedding(50, tiny_config(v4), "cpu")
    assert table.shape == (50, 16)
    odd = v4.sinusoidal_embedding(50, tiny_config(v4, n_embd=15, n_head=1, position="alibi"), "cpu")
    assert odd[7, 14].item() == pytest.approx(math.sin(7 / 10_000 ** (14 / 15)))
    for t in range(50):
        for i in range(8):
            angle = t / 10_000 ** (2 * i / 16)
            assert table[t, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[t, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_sinusoidal_positions_are_added_to_scaled_tokens(float64):
    model, config = make_model(position="sinusoidal")
    idx = torch.randint(V, (2, 8))
    x = model.token_embedding(idx)
    x = x * 4 + v4.sinusoidal_embedding(8, config, "cpu")  # 4 = sqrt(16)
    for block in model.blocks:
        x = block(x, None, None)
    close(model(idx), model.head(model.norm(x)))


def test_rope_scores_depend_on_the_distance_alone(float64):
    config, T = tiny_config(v4), 200
    rotation = v4.rope_rotation(T, config, "cpu")
    q, k = torch.randn(2, 1, 2, 1, 8)
    q, k = (v4.apply_rope(x.expand(-1, -1, T, -1), rotation) for x in (q, k))  # the same at every position
    scores = q @ k.mT  # (1, n_head, T, T)
    for distance in (0, 1, 7, 150):
        diagonal = scores.diagonal(-distance, dim1=-2, dim2=-1)
        close(diagonal, diagonal[..., :1].expand_as(diagonal))
    assert (scores[..., 150, 150] - scores[..., 150, 143]).abs().min() > 1e-3  # but on that they do
    close(q.norm(dim=-1), q.norm(dim=-1)[..., :1].expand(1, 2, T))  # turning keeps lengths


def test_alibi_bias_is_zero_on_the_diagonal_and_falls_with_distance(float64):
    bias = v4.alibi_bias(30, tiny_config(v4, n_embd=60, n_head=6), "cpu")[0]
    assert (bias.diagonal(dim1=1, dim2=2) == 0).all()
    steps = bias.diagonal(-1, dim1=1, dim2=2) - bias.diagonal(0, dim1=1, dim2=2)[:, 1:]
    for distance in range(1, 30):
        diagonal = bias.diagonal(-distance, dim1=1, dim2=2)
        close(diagonal, distance * steps[:, :1].expand_as(diagonal))
    assert (steps < 0).all()


@pytest.mark.parametrize("position", v4.POSITIONS)
def test_only_without_positions_one_layer_cannot_tell_orderings_apart(position, float64):
    model, _ = make_model(position=position, n_layer=1)
    idx = torch.randint(V, (1, 8))
    idx[0, :2] = torch.tensor([3, 5])
    other = idx[:, [1, 6, 0, 4, 2, 3, 5, 7]]  # the past in another order, the last token in its place
    same = torch.allclose(model(idx)[0, -1], model(other)[0, -1], rtol=0, atol=1e-6)
    assert same == (position == "none")


def test_without_positions_two_layers_can_tell_orderings_apart(float64):
    """The causal mask gives the order away: a state in the middle knows what came before it."""
    model, _ = make_model(position="none", n_layer=2)
    idx = torch.tensor([[3, 5, 7]])
    assert not torch.allclose(model(idx)[0, -1], model(idx[:, [1, 0, 2]])[0, -1], rtol=0, atol=1e-3)


def test_learned_char_is_v3_to_the_bit():
    torch.manual_seed(0)
    below = v3_gpt.LanguageModel(v3_gpt.Config(), V).eval()
    same = {"position": "learned", "tokenizer": "char"}
    model = v4.LanguageModel(v4.Config(**vars(v3_gpt.Config()) | same), V).eval()
    model.load_state_dict(below.state_dict())
    for T in (1, 17, 64):
        idx = torch.randint(V, (3, T))
        assert torch.equal(model(idx), below(idx))


def test_training_with_learned_positions_is_that_of_v3(folder):
    names = ("init_std", "learning_rate", "lr_floor", "beta2")
    recipe = {name: getattr(v3_gpt.Config, name) for name in names}
    flags = {"position": "learned", "tokenizer": "char"} | recipe
    for rung, module, more in (("v3_gpt", v3_gpt, {}), ("v4_rope_alibi", v4, flags)):
        process = run_here(rung, *tiny_flags(module, **more), cwd=folder)
        assert process.returncode == 0, process.stderr
    a, b = (torch.load(folder / f"runs/{rung}/checkpoint.pt") for rung in ("v3_gpt", "v4_rope_alibi"))
    assert a["last"].keys() == b["last"].keys()
    assert all(torch.equal(a["last"][name], b["last"][name]) for name in a["last"])
    samples = [(folder / f"runs/{rung}/sample.txt").read_bytes() for rung in ("v3_gpt", "v4_rope_alibi")]
    assert samples[0] == samples[1]


@pytest.mark.parametrize("position", BEYOND)
def test_these_schemes_go_past_the_training_length(position):
    model, config = make_model(position=position, max_new_tokens=5, context=20, greedy=True)
    idx = torch.randint(V, (1, 50))
    with torch.inference_mode():
        assert model(idx).shape == (1, 50, V)
    seen = []
    handle = model.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    out = v4.generate(model, idx[:, -18:], config)
    handle.remove()
    assert seen == [18, 19, 20, 20, 20]  # the context, not block_size = 8
    with torch.inference_mode():
        assert torch.equal(out[:, -1], model(out[:, -21:-1])[:, -1].argmax(-1))


def test_interpolated_positions_stand_between_those_of_training():
    angles = v4.position_angles(32, 8, tiny_config(v4, position_scale=4.0), "cpu")
    close(angles[::4], v4.position_angles(8, 8, tiny_config(v4), "cpu"))
    assert angles.max() < 8


# ------------------------------------- tokens of several characters -------------------------------------


@pytest.fixture
def vocabulary(folder):
    """A vocabulary file of 300 ids, learned from input.txt in `folder`."""
    text = (folder / "input.txt").read_text(encoding="utf-8")
    BPETokenizer.train(text, 300).save(folder / "bpe.json")
    return "bpe.json"


def test_bits_per_char_of_a_bpe_model(folder, vocabulary):
    process = run_here("v4_rope_alibi", *tiny_flags(v4, tokenizer=vocabulary), cwd=folder)
    assert process.returncode == 0, process.stderr
    out = folder / "runs/v4_rope_alibi"
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    text = (folder / "input.txt").read_text(encoding="utf-8")
    ids = BPETokenizer.load(folder / vocabulary).encode(text[int(0.9 * len(text)) :])
    first = len(BPETokenizer.load(folder / vocabulary).decode(ids[:1]))  # it is given, not predicted
    bits = metrics["val_loss"] * (len(ids) - 1) / math.log(2)
    assert metrics["bits_per_char"] == pytest.approx(bits / (len(text) - int(0.9 * len(text)) - first))
    assert metrics["bits_per_char"] < metrics["val_loss"] / math.log(2)
    assert len(torch.load(out / "checkpoint.pt")["model"]["token_embedding.weight"]) == 300


def test_bpe_from_the_command_line(folder, vocabulary):
    run = lambda *flags: run_here("v4_rope_alibi", *flags, cwd=folder)  # noqa: E731
    assert run(*tiny_flags(v4, tokenizer=vocabulary)).returncode == 0
    (folder / vocabulary).rename(folder / "elsewhere.json")  # the checkpoint holds the vocabulary
    prompt = "Na\u00efve caf\u00e9 \U0001f642"
    for mode, more in (("--sample", []), ("--resume", ["--max_steps=15"])):
        process = run(mode, f"--prompt={prompt}", "--max_new_tokens=5", *more)
        assert process.returncode == 0 and f"\n{prompt}" in "\n" + process.stdout, process.stderr
    process = run("--sample", "--max_new_tokens=5", "--prompt=")
    assert process.returncode == 0 and process.stdout.startswith("\n")  # an empty prompt is a new line
    assert refused(run("--resume", "--tokenizer=char", "--prompt="), "--tokenizer", "bpe.json", "train anew")
    for name in ("nowhere.json", "input.txt", "bpe"):
        before = sorted(folder.rglob("*"))
        assert refused(run(f"--tokenizer={name}"), f"no vocabulary in {name}", "python bpe_tokenizer.py")
        assert sorted(folder.rglob("*")) == before


def test_too_few_tokens_are_refused(folder, vocabulary):
    """600 characters for validation are 600 windows of one character, but fewer pieces of words."""
    flags = tiny_flags(v4, tokenizer=vocabulary, block_size=590)
    assert refused(run_here("v4_rope_alibi", *flags, cwd=folder), "input.txt is too short")
    assert not (folder / "runs").exists()
    assert run_here("v4_rope_alibi", *tiny_flags(v4, block_size=590), cwd=folder).returncode == 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--position=absolute"], ["--position", "learned, sinusoidal, rope, alibi, none"]),
        (["--n_embd=12", "--n_head=4"], ["--n_embd 12", "even"]),
        (["--position=learned", "--context=1000"], ["--position learned", "--context"]),
        (["--position_scale=0"], ["--position_scale 0"]),
        (["--position=alibi", "--position_base=500"], ["--position alibi", "--position_base"]),
        (["--position=none", "--position_scale=2"], ["--position none", "--position_scale"]),
        (["--position_base=-1"], ["--position_base -1"]),
        (["--context=-1"], ["--context -1"]),
    ],
)
def test_impossible_values(flags, words, folder):
    assert refused(run_here("v4_rope_alibi", *flags, cwd=folder), *words)
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("flag", ["--position=alibi", "--block_size=16"])
def test_a_saved_model_keeps_its_shape(flag, folder):
    assert run_here("v4_rope_alibi", *tiny_flags(v4), cwd=folder).returncode == 0
    for mode in ("--sample", "--resume"):
        name = flag.split("=")[0]
        assert refused(run_here("v4_rope_alibi", mode, flag, cwd=folder), name, "train anew")
