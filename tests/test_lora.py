"""v8: adapters, 4-bit weights, conversations as ids, examples from plays and files, the command line."""

import json
import math
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path

import matplotlib.image
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT, run_here
from test_command_line import METRICS, OTHER, flag, refused
from test_rungs import assert_same

import v8_lora as v8
from bpe_tokenizer import BPETokenizer, TokenizerError, read_data

RUNG, BASE = "v8_lora", "runs/v6_amp_ddp"
V = 65
END, USER, ASSISTANT, CONTEXT = v8.SPECIAL_TOKENS
SPECIAL_IDS = [61, 62, 63, 64]  # of make_model's vocabulary
TARGETS = ["qkv", "proj", "mlp.0", "mlp.2"]


def make_model(method="full", seed=0, **changes):
    """A plain model with weights large enough that every part of it matters, and it adapted; a Config."""
    torch.manual_seed(seed)
    settings = dict(n_embd=16, n_head=2, n_layer=2, block_size=8, vocab_size=V, max_new_tokens=20)
    config = v8.Config(**settings | {"method": method} | changes)
    plain = v8.LanguageModel(config, config.vocab_size)
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.3)
    model = v8.LanguageModel(config, config.vocab_size)
    model.load_state_dict(plain.state_dict())
    return plain.eval(), v8.adapt(model, config, SPECIAL_IDS).eval(), config


def new_run():
    """What main gives to train for a run that begins."""
    return {"version": RUNG, "base_hash": "", "step": 0, "seconds": 0.0, "tokens": 0, "history": []}


def shake(model):
    """Give all that learns other numbers, so that adapters add something."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)


def linear(n, k):
    """A layer of k inputs and n outputs with random weights, without gradients."""
    torch.manual_seed(n * k)
    layer = nn.Linear(k, n)
    nn.init.normal_(layer.weight, std=0.1)
    return layer.requires_grad_(False)


# ------------------------------------------------ LoRA ------------------------------------------------


def test_an_adapter_is_two_products_beside_the_layer():
    layer, config = linear(7, 5), v8.Config(lora_rank=3, lora_alpha=12.0)
    adapter = v8.LoRALinear(layer, config)
    nn.init.normal_(adapter.lora_B)
    x = torch.randn(2, 4, 5)
    W, b, A, B = (t.double() for t in (layer.weight, layer.bias, adapter.lora_A, adapter.lora_B))
    exact = x.double() @ W.T + b + 12 / 3 * x.double() @ A.T @ B.T
    torch.testing.assert_close(adapter(x).double(), exact, atol=1e-5, rtol=0)
    torch.testing.assert_close(adapter.weight.double(), W + 4 * B @ A, atol=1e-5, rtol=0)
    assert torch.equal(adapter.bias, layer.bias)


def test_an_adapter_begins_with_b_at_zero_and_a_at_random():
    adapter = v8.LoRALinear(linear(300, 100), v8.Config(lora_rank=4))
    assert adapter.lora_A.shape == (4, 100) and adapter.lora_B.shape == (300, 4)
    assert not adapter.lora_B.any()
    assert 0.09 < adapter.lora_A.abs().max() <= 0.1  # uniform up to 1 / sqrt(K)
    assert adapter.lora_A.std().item() == pytest.approx(0.1 / math.sqrt(3), rel=0.1)


PEFT_NAMES = {
    "attention.qkv": "attn.c_attn",
    "attention.proj": "attn.c_proj",
    "mlp.0": "mlp.c_fc",
    "mlp.2": "mlp.c_proj",
}
GPT2_NAMES = {"norm1": "ln_1", "norm2": "ln_2"} | PEFT_NAMES


def from_gpt2(weights, config):
    """Weights of transformers' GPT-2 by the names of this project; Conv1D keeps its matrices transposed."""
    found = {"token_embedding.weight": weights["transformer.wte.weight"]}
    found["position_embedding.weight"] = weights["transformer.wpe.weight"]
    for leaf in ("weight", "bias"):
        found[f"norm.{leaf}"] = weights[f"transformer.ln_f.{leaf}"]
        for i in range(config.n_layer):
            for ours, theirs in GPT2_NAMES.items():
                x = weights[f"transformer.h.{i}.{theirs}.{leaf}"]
                found[f"blocks.{i}.{ours}.{leaf}"] = x.T if x.dim() == 2 else x
    return found


@pytest.mark.filterwarnings("ignore")
def test_outputs_and_merged_weights_are_those_of_peft():
    import peft
    import transformers

    sizes = dict(n_embd=32, n_head=2, n_layer=2, vocab_size=V)
    _, _, config = make_model("lora", position="learned", lora_rank=4, lora_alpha=6.0, **sizes)
    torch.manual_seed(1)
    their_config = transformers.GPT2Config(**sizes, n_positions=config.block_size)
    theirs = transformers.GPT2LMHeadModel(their_config).eval()
    plain = v8.LanguageModel(config, V)
    plain.load_state_dict(from_gpt2(theirs.state_dict(), config))
    ours = v8.adapt(plain, config, SPECIAL_IDS).eval()

    options = dict(r=4, lora_alpha=6, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(**options)).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
        for i in range(config.n_layer):
            for mine, name in PEFT_NAMES.items():
                layer = theirs.get_submodule(f"base_model.model.transformer.h.{i}.{name}")
                adapter = ours.get_submodule(f"blocks.{i}.{mine}")
                adapter.lora_A.copy_(layer.lora_A["default"].weight)
                adapter.lora_B.copy_(layer.lora_B["default"].weight)
        idx = torch.randint(V, (3, 8))
        torch.testing.assert_close(ours(idx), theirs(idx).logits, atol=1e-5, rtol=0)
        expected = from_gpt2(theirs.merge_and_unload().state_dict(), config)
    merged = v8.merge(ours)
    assert merged.keys() == expected.keys()
    for name, weight in merged.items():
        torch.testing.assert_close(weight, expected[name], atol=1e-5, rtol=0)


def test_before_the_first_step_lora_is_the_plain_model_to_the_bit():
    plain, model, config = make_model("lora")
    idx = torch.randint(V, (4, config.block_size))
    assert torch.equal(model(idx), plain(idx))


def test_before_the_first_step_qlora_is_the_model_of_the_unpacked_weights():
    plain, model, config = make_model("qlora", n_embd=20)
    unpacked = v8.LanguageModel(config, V).eval()
    unpacked.load_state_dict(plain.state_dict())
    for part in unpacked.modules():
        if isinstance(part, nn.Linear):
            part.weight.data = v8.NF4Linear(part).weight.detach()
    table = unpacked.token_embedding.weight.data
    rest = [i for i in range(V) if i not in SPECIAL_IDS]
    table[rest] = table[rest].bfloat16().float()
    idx = torch.randint(V, (4, config.block_size))
    torch.testing.assert_close(model(idx), unpacked(idx), atol=1e-5, rtol=0)
    assert not torch.allclose(model(idx), plain(idx), atol=1e-3)


@pytest.mark.parametrize("targets", [TARGETS, ["qkv"], ["proj", "mlp.2"]], ids=",".join)
@pytest.mark.parametrize("method", v8.METHODS)
def test_what_learns_moves_and_no_other_bit_does(method, targets):
    _, model, config = make_model(method, lora_targets=",".join(targets), weight_decay=0.1)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    learned = v8.learned(model)
    if method != "full":
        expected = {"token_embedding.rows", "norm.weight", "norm.bias"}
        paths = {"qkv": "attention.qkv", "proj": "attention.proj"}
        for i in range(2):
            expected |= {f"blocks.{i}.norm{n}.{leaf}" for n in (1, 2) for leaf in ("weight", "bias")}
            expected |= {f"blocks.{i}.{paths.get(t, t)}.lora_{side}" for t in targets for side in "AB"}
        assert learned.keys() == expected
    else:
        assert learned.keys() == before.keys()
    optimizer = v8.make_optimizer(model, config)
    x, y = torch.randint(V, (2, 4, config.block_size))
    for _ in range(3):  # in the first, B is zero and A gets no gradient
        optimizer.zero_grad()
        model.loss(x, y).backward()
        optimizer.step()
    after = model.state_dict()
    assert after.keys() == before.keys() and len(before) > len(learned) - (method == "full")
    for name, x in before.items():
        assert torch.equal(x, after[name]) == (name not in learned), name
        assert name not in learned or learned[name].data_ptr() == after[name].data_ptr()


@pytest.mark.parametrize("targets", [TARGETS, ["qkv"], ["mlp.0", "proj"]], ids=",".join)
@pytest.mark.parametrize("method", v8.METHODS)
@pytest.mark.parametrize("position", ["rope", "learned"])
def test_merged_weights_compute_what_the_adapted_model_does(method, targets, position):
    _, model, config = make_model(method, lora_targets=",".join(targets), position=position)
    at_first = v8.merge(model)
    shake(model)
    plain, merged = v8.LanguageModel(config, V).eval(), v8.merge(model)
    plain.load_state_dict(merged)
    idx = torch.randint(V, (4, config.block_size))
    torch.testing.assert_close(plain(idx), model(idx), atol=1e-5, rtol=0)
    assert not torch.allclose(merged["blocks.0.attention.proj.weight"], at_first["norm.weight"].diag()[:16])
    changed = {name for name in merged if not torch.equal(merged[name], at_first[name])}
    assert {"norm.weight", "token_embedding.weight"} <= changed
    if method == "full":
        assert_same(merged, dict(model.state_dict()))
        assert all(merged[name].data_ptr() != x.data_ptr() for name, x in model.state_dict().items())
    else:
        paths = {"qkv": "attention.qkv", "proj": "attention.proj"}
        matrices = {name for name in changed if re.search(r"(qkv|proj|mlp\.\d)\.weight", name)}
        assert matrices == {f"blocks.{i}.{paths.get(t, t)}.weight" for i in (0, 1) for t in targets}


def test_only_the_rows_of_special_tokens_learn():
    _, model, _ = make_model("lora")
    before = v8.merge(model)["token_embedding.weight"]
    shake(model)
    after = v8.merge(model)["token_embedding.weight"]
    assert (before != after).any(dim=1).nonzero().flatten().tolist() == SPECIAL_IDS
    assert torch.equal(after[SPECIAL_IDS], model.token_embedding.rows)
    idx = torch.randint(V, (3, 5))
    assert torch.equal(model.token_embedding(idx), after[idx])


# ------------------------------------------------- NF4 -------------------------------------------------


def test_the_sixteen_values_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    theirs = functional.get_4bit_type("nf4", device="cpu")
    assert torch.equal(torch.tensor(v8.NF4), theirs)


def test_the_sixteen_values_are_quantiles_of_a_normal_distribution():
    """Eight above zero and seven below, evenly in probability between 0.5 and 0.9677083; the largest is 1."""
    last, quantile = 0.9677083, statistics.NormalDist().inv_cdf
    above = [quantile(last + (0.5 - last) * i / 8) for i in range(8)]
    below = [-quantile(last + (0.5 - last) * i / 7) for i in range(7)]
    values = sorted([*above, 0.0, *below])
    assert list(v8.NF4) == pytest.approx([value / values[-1] for value in values], abs=1e-6)


SHAPES = [(4, 64), (64, 64), (7, 13), (1, 1), (33, 200), (257, 80), (130, 128)]


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_each_weight_is_the_nearest_value_times_the_scale_of_its_block(n, k):
    layer = linear(n, k)
    small = v8.NF4Linear(layer)
    weights, found = layer.weight.flatten(), small.weight
    assert found.shape == (n, k) and torch.equal(small.bias, layer.bias)
    scales = small.scales()
    assert len(scales) == math.ceil(n * k / 64)
    products = torch.tensor(v8.NF4) * scales.repeat_interleave(64)[: n * k, None]  # (n * k, 16)
    assert (products == found.flatten()[:, None]).any(dim=1).all()
    least = (products - weights[:, None]).abs().amin(dim=1)
    torch.testing.assert_close((found.flatten() - weights).abs(), least, atol=1e-7, rtol=0)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_a_scale_is_off_by_half_a_step_of_its_256_at_most(n, k):
    layer = linear(n, k)
    small = v8.NF4Linear(layer)
    largest = [block.abs().max().item() for block in layer.weight.flatten().split(64)]
    mean = statistics.fmean(largest)
    for start in range(0, len(largest), 256):
        group = largest[start : start + 256]
        step = max(abs(x - mean) for x in group) / 127
        for x, scale in zip(group, small.scales()[start : start + 256].tolist(), strict=True):
            assert abs(scale - x) <= 0.5001 * step + 1e-7
    assert small.scale_codes.dtype == torch.int8 and small.codes.dtype == torch.uint8
    assert len(small.codes) == 32 * len(largest)


def test_weights_that_are_all_zero_stay_zero():
    layer = linear(3, 70)
    layer.weight.data.zero_()
    assert not v8.NF4Linear(layer).weight.any()


def test_an_nf4_layer_takes_an_eighth_of_the_bytes():
    layer = linear(256, 256)
    small = v8.NF4Linear(layer).state_dict()
    whole = sum(x.nbytes for x in layer.state_dict().values())
    assert sum(x.nbytes for x in small.values()) <= 0.135 * whole


@pytest.mark.parametrize("shape", [(40,), (5, 40), (2, 3, 40)])
@pytest.mark.parametrize("autocast", [False, True])
def test_products_and_gradients_of_an_nf4_layer_are_those_of_its_weights(shape, autocast):
    small = v8.NF4Linear(linear(24, 40))
    x, grad = torch.randn(shape), torch.randn(*shape[:-1], 24)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = []
        for forward in (small, lambda x: F.linear(x, small.weight) + small.bias):
            leaf = x.clone().requires_grad_()
            y = forward(leaf)
            y.backward(grad.to(y.dtype))
            outputs.append((y, leaf.grad))
    for found, expected in zip(*outputs, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


# ------------------------------------------- what is learned -------------------------------------------

HAND = v8.CharTokenizer([*"ab?", *v8.SPECIAL_TOKENS])  # a 0, b 1, ? 2, then <|endoftext|> 3 to <|context|> 6
LONG = [("context", "ab"), ("user", "a?"), ("assistant", "b"), ("user", "?"), ("assistant", "ba")]
SHORT = [("user", "a"), ("assistant", "b")]


def test_a_conversation_written_out_by_hand():
    ids, learned = v8.encode_chat(LONG, HAND)
    assert ids == [6, 0, 1, 4, 0, 2, 5, 1, 3, 4, 2, 5, 1, 0, 3]
    assert learned == [bool(int(c)) for c in "000000011000111"]
    assert v8.encode_prompt(LONG[:2], HAND) == [6, 0, 1, 4, 0, 2, 5]
    assert v8.encode_prompt(LONG[:4], HAND) == [6, 0, 1, 4, 0, 2, 5, 1, 3, 4, 2, 5]


def test_targets_written_out_by_hand():
    x, y = v8.pad([v8.encode_chat(turns, HAND) for turns in (LONG, SHORT)])
    n = -100
    assert x.tolist() == [[6, 0, 1, 4, 0, 2, 5, 1, 3, 4, 2, 5, 1, 0], [4, 0, 5, 1, 3] + [0] * 9]
    assert y[0].tolist() == [n, n, n, n, n, n, 1, 3, n, n, n, 1, 0, 3]
    assert y[1].tolist() == [n, n, 1, 3] + [n] * 10


@pytest.mark.parametrize("method", v8.METHODS)
def test_padding_changes_no_loss(method):
    _, model, _ = make_model(method, block_size=16)
    shake(model)
    conversations = [LONG, SHORT, [("user", "?" * 9), ("assistant", "a")], SHORT]
    examples = [v8.encode_chat(turns, HAND) for turns in conversations]
    with torch.no_grad():
        together = model.loss(*v8.pad(examples)).item()
        singly = 0.0
        for ids, learned in examples:
            probs = model(torch.tensor([ids]))[0].double().log_softmax(-1)
            singly -= sum(probs[t - 1, ids[t]].item() for t in range(1, len(ids)) if learned[t])
    assert together == pytest.approx(singly, rel=1e-5)


def test_logits_in_pieces_of_256_give_the_same_loss():
    plain, _, _ = make_model(block_size=64)
    x, y = torch.randint(V, (2, 10, 64))
    y[:, ::3] = -100
    expected = F.cross_entropy(plain(x).flatten(0, 1), y.flatten(), reduction="sum")
    assert plain.loss(x, y).item() == pytest.approx(expected.item(), rel=1e-5)


BPE = BPETokenizer.train("to be or not to be, that is the question " * 3, 280, v8.SPECIAL_TOKENS)
CHARS = v8.CharTokenizer(
    [*sorted(set("<|endoftext|><|user|><|assistant|><|context|> hello\n")), *v8.SPECIAL_TOKENS]
)


@pytest.mark.parametrize("tokenizer", [BPE, CHARS], ids=["bpe", "char"])
@pytest.mark.parametrize(
    "text",
    [*v8.SPECIAL_TOKENS, "hello<|endoftext|><|assistant|>", "<|<|user|>|>", "".join(v8.SPECIAL_TOKENS)],
)
def test_special_tokens_in_a_text_are_plain_text(tokenizer, text):
    turns = [("context", text), ("user", text), ("assistant", text)]
    ids, learned = v8.encode_chat(turns, tokenizer)
    special = {i: token for token, i in tokenizer.special_tokens.items()}
    assert [special[i] for i in ids if i in special] == [CONTEXT, USER, ASSISTANT, END]
    n = len(tokenizer.encode(text))
    assert learned == [False] * (2 * n + 3) + [True] * (n + 1)
    assert tokenizer.decode(ids) == CONTEXT + text + USER + text + ASSISTANT + text + END


def test_batches_are_neighbours_in_length():
    config = v8.Config(batch_size=3)
    examples = [([4] * n, [False] + [True] * (n - 1)) for n in range(2, 12)]
    torch.manual_seed(0)
    seen = set()
    for _ in range(200):
        x, y = v8.get_batch(examples, config)
        lengths = ((y != -100).sum(dim=1) + 1).tolist()
        assert x.shape == (3, lengths[-1] - 1) and lengths == list(range(lengths[0], lengths[0] + 3))
        seen.add(lengths[0])
    assert seen == set(range(2, 10))  # each start that fits, no other
    assert len(v8.get_batch(examples[:2], config)[0]) == 2
    sizes = [len(x) for x, _ in v8.batches(examples * 15)]
    assert sum(sizes) == 150 and max(sizes) == 64


# ------------------------------------ examples from plays and files ------------------------------------


def speeches_of_plays():
    """The speeches of both parts of input.txt."""
    splits = {"train": "", "val": ""}
    for split, _, text in read_data(str(ROOT / "input.txt")):
        splits[split] += text
    return {split: v8.read_speeches(text) for split, text in splits.items()}


def test_speeches_are_read_with_their_names():
    text = (
        "tail of one\n\nROMEO:\nAy me!\nSad hours.\n\nFirst Citizen:\nWho: you?\n\nEXEUNT\n\nO'NEIL-X:\naaa"
    )
    found = v8.read_speeches(text)
    assert found == [("ROMEO", "Ay me!\nSad hours."), ("First Citizen", "Who: you?"), ("O'NEIL-X", "aaa")]
    assert v8.read_speeches("ROMEO:\nAy!\n") == [("ROMEO", "Ay!")]
    assert v8.read_speeches("nobody says this: or that\n") == []


@pytest.mark.parametrize("n_passages", [1, 3])
def test_the_answer_to_a_reading_stands_in_its_passages(n_passages):
    config = v8.Config(n_passages=n_passages)
    speeches = speeches_of_plays()["train"]
    readings, replies = v8.make_examples(speeches, 300, config, random.Random(3), 0.5)
    assert len(readings) == len(replies) == 300
    places, follows = set(), {(a[1], *b) for a, b in pairwise(speeches)}
    for (_, context), (_, question), (_, name) in readings:
        passages = [part.split(":\n", maxsplit=1) for part in context.split("\n\n")]
        assert len(passages) == n_passages
        words = re.fullmatch(r"Who says: (.+)\?", question, flags=re.DOTALL)[1].split(" ")
        said = [" ".join(speech.split()) if who == name else "" for who, speech in passages]
        right = [i for i, speech in enumerate(said) if f" {' '.join(words)} " in f" {speech} "]
        assert 4 <= len(words) <= 7 and right
        places.add(right[0])
    assert places == set(range(n_passages))
    for (_, asked), (_, reply) in replies:
        speech, name = re.fullmatch(r"(.+)\nAnswer as (.+)\.", asked, flags=re.DOTALL).groups()
        assert (speech, name, reply) in follows and max(len(speech), len(reply)) <= v8.LONGEST


@pytest.mark.parametrize("renamed", [0.0, 0.75, 1.0])
def test_a_share_of_the_names_is_invented(renamed):
    speeches = speeches_of_plays()["train"]
    real = {name for name, _ in speeches}
    readings, _ = v8.make_examples(speeches, 1000, v8.Config(), random.Random(1), renamed)
    names = [turns[-1][1] for turns in readings]
    share = sum(name not in real for name in names) / len(names)
    assert share == pytest.approx(renamed, abs=0.05) and (renamed or share == 0)
    assert renamed < 1 or len(set(names)) > 900


def test_invented_names_are_names():
    """A passage begins with a name and a colon: what stands there must be read as one, and be the answer."""
    speeches = speeches_of_plays()["train"]
    readings, _ = v8.make_examples(speeches, 10_000, v8.Config(), random.Random(1), 1.0)
    names = {turns[-1][1] for turns in readings}
    bad = [name for name in names if not re.fullmatch(r"[A-Za-z]([A-Za-z' -]{0,22}[A-Za-z])?", name)]
    assert bad == []


@pytest.mark.parametrize("seed", [1337, 1, 2])
def test_names_asked_in_the_exam_are_no_name_in_training(seed):
    config, speeches = v8.Config(seed=seed), speeches_of_plays()
    with pytest.MonkeyPatch.context() as patch:
        made = []
        real = v8.make_examples
        patch.setattr(v8, "make_examples", lambda *args: made.append(real(*args)) or made[-1])
        patch.chdir(ROOT)
        v8.load_tasks(replace(config, n_examples=24_000), BPE)
    (readings, replies), (exam, _) = made
    asked = {turns[-1][1] for turns in exam}
    assert len(exam) == 500 and len(asked) > 15
    assert not asked & {name for name, _ in speeches["train"]}
    assert not asked & {re.search(r"Answer as (.+)\.$", turns[0][1])[1] for turns in replies}
    assert asked & {turns[-1][1] for turns in readings} == set()


def test_same_seed_same_examples_and_one_exam_for_all(bases, monkeypatch):
    monkeypatch.chdir(bases)
    config = v8.Config(n_examples=40)
    a, b, c = (v8.load_tasks(replace(config, seed=seed), BPE) for seed in (1, 1, 2))
    assert a == b and a["stages"] != c["stages"]
    assert a["exam"] == c["exam"] and a["val"] == c["val"]
    first, second = (len(stage) for stage in a["stages"])  # of 20 and 40 the long ones are left out
    assert 10 < first <= 20 < second <= 40
    lengths = [len(ids) for ids, _ in a["stages"][1]]
    assert lengths == sorted(lengths)


def test_what_is_held_out_of_a_file_is_the_same_for_all_seeds(bases, monkeypatch):
    """A run that is resumed with another seed must not be measured on what it has learned."""
    monkeypatch.chdir(bases)
    config = v8.Config(instructions="examples.jsonl")
    a, b = (v8.load_tasks(replace(config, seed=seed), BPE) for seed in (1, 2))
    assert a["replies"] == b["replies"] and a["val"] == b["val"] and len(a["replies"]) == 4
    assert a["exam"] == [] and [len(stage) for stage in a["stages"]] == [36]


MESSAGES = {
    "messages": [
        {"role": r, "content": t} for r, t in zip(("system", "user", "assistant"), "xyz", strict=True)
    ]
}
ALPACA = {"instruction": "add", "input": "1 1", "output": "2"}
GOOD = [
    MESSAGES,
    ALPACA,
    {"instruction": "hi", "output": "ho"},
    {"instruction": "i", "input": "", "output": "o"},
]


def test_both_kinds_of_instructions_are_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n".join(map(json.dumps, GOOD)) + "\n", encoding="utf-8")
    several = {"messages": [*MESSAGES["messages"], *MESSAGES["messages"][1:]]}
    path.write_text(path.read_text() + json.dumps(several), encoding="utf-8")
    assert v8.read_instructions(path) == [
        [("context", "x"), ("user", "y"), ("assistant", "z")],
        [("context", "1 1"), ("user", "add"), ("assistant", "2")],
        [("user", "hi"), ("assistant", "ho")],
        [("user", "i"), ("assistant", "o")],
        [("context", "x"), ("user", "y"), ("assistant", "z"), ("user", "y"), ("assistant", "z")],
    ]


def turn(role="user", content="x"):
    return {"role": role, "content": content}


BAD_LINES = [
    ("{", "no example"),
    ("5", "no example"),
    ('"messages"', "no example"),
    ('["messages"]', "no example"),
    ("null", "no example"),
    ({"instruction": "hi"}, "output"),
    ({"output": "hi"}, "instruction"),
    ({"messages": [turn(), {"role": "assistant"}]}, "content"),
    ({"messages": [turn("tool"), turn("assistant")]}, "tool"),
    ({"messages": [turn(content=""), turn("assistant")]}, "missing"),
    ({"messages": [turn(content=[{"text": "x"}]), turn("assistant")]}, "missing"),
    ({"messages": [turn(), turn("assistant"), turn()]}, "must end"),
    ({"messages": [turn("assistant")]}, "must end"),
    ({"messages": []}, "must end"),
    ({"messages": "user"}, "no example"),
    ({"instruction": "hi", "output": 5}, "missing"),
    ({"instruction": "hi", "input": 5, "output": "x"}, "missing"),
]


@pytest.mark.parametrize(("line", "word"), BAD_LINES)
def test_a_bad_line_is_refused_by_its_number(line, word, bases, tmp_path):
    path = tmp_path / "bad.jsonl"
    line = line if isinstance(line, str) else json.dumps(line)
    path.write_text("\n".join([*map(json.dumps, GOOD), "", line]), encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        v8.read_instructions(path)
    assert str(end.value).startswith(f"error: line 6 of {path} ") and word in str(end.value)
    assert "\n" not in str(end.value)


def test_files_of_instructions_that_cannot_be_used(bases, tmp_path):
    def run(content):
        if content is not None:
            (tmp_path / "x.jsonl").write_bytes(content)
        return run_v8(bases, f"--instructions={tmp_path}/x.jsonl", f"--out_dir={tmp_path}/out")

    assert refused(run(None), "--instructions", "x.jsonl")
    assert refused(run(b""), "--instructions", "fewer than two")
    assert refused(run(json.dumps(ALPACA).encode()), "--instructions", "fewer than two")
    assert refused(run(b"\xff\xfe"), "--instructions", "x.jsonl")
    assert refused(run(b"{}\n{}"), "line 1", "instruction")
    long = json.dumps({"instruction": "hi " * 400, "output": "x"}).encode()
    assert refused(run(long + b"\n" + long), "nothing to learn from", "256")
    assert not (tmp_path / "out" / "checkpoint.pt").exists()


def test_examples_that_are_too_long_are_left_out():
    fits, one_more = [("user", "a"), ("assistant", "b")], [("user", "aa"), ("assistant", "b")]
    kept = v8.encode_examples([one_more, fits, one_more, fits], HAND, v8.Config(block_size=4))
    assert [ids for ids, _ in kept] == [[4, 0, 5, 1, 3]] * 2
    both = v8.encode_examples([one_more, fits], HAND, v8.Config(block_size=5))
    assert [len(ids) for ids, _ in both] == [5, 6]  # shortest first


# ----------------------------------------------- grow -----------------------------------------------


def weights_of(n):
    torch.manual_seed(n)
    return {"token_embedding.weight": torch.randn(n, 16), "norm.weight": torch.randn(16)}


BYTES = BPETokenizer.train("to be or not to be " * 3, 262)
OLD_VOCABS = {
    "char": "ab ?",
    "bpe": BYTES.to_dict(),
    "one": BPETokenizer(["t h"], [END]).to_dict(),
    "all": BPETokenizer(["t h"], v8.SPECIAL_TOKENS).to_dict(),
}


@pytest.mark.parametrize("kind", OLD_VOCABS)
@pytest.mark.parametrize("learned_from_text", [True, False])
def test_a_vocabulary_grows_by_the_special_tokens_that_it_lacks(kind, learned_from_text, capsys):
    old = OLD_VOCABS[kind]
    before = v8.make_tokenizer(old)
    weights = weights_of(len(before.vocab))
    copied = {name: x.clone() for name, x in weights.items()}
    vocab, grown = v8.grow(old, weights, learned_from_text)
    tokenizer = v8.make_tokenizer(vocab)
    lacking = [token for token in v8.SPECIAL_TOKENS if token not in before.special_tokens]
    assert tokenizer.vocab[: len(before.vocab)] == [*before.vocab]
    assert set(tokenizer.special_tokens) == set(v8.SPECIAL_TOKENS)
    assert len(tokenizer.vocab) == len(before.vocab) + len(lacking) == len(grown["token_embedding.weight"])
    roles = [tokenizer.special_tokens[token] for token in (USER, ASSISTANT, CONTEXT)]
    plain = [i for i in range(len(before.vocab)) if i not in roles]
    assert torch.equal(grown["token_embedding.weight"][plain], weights["token_embedding.weight"][plain])
    assert grown["norm.weight"] is weights["norm.weight"]
    assert_same(weights, copied)
    assert tokenizer.encode("to be" if kind != "char" else "ab ?") == before.encode(
        "to be" if kind != "char" else "ab ?"
    )
    printed = "".join(capsys.readouterr())
    assert printed.count("\n") == bool(lacking) and all(token in printed for token in lacking)
    new = grown["token_embedding.weight"][roles]
    if learned_from_text:
        mean = weights["token_embedding.weight"].mean(dim=0)
        assert 0.3 < (new - mean).std() / weights["token_embedding.weight"].std() < 2
        assert (new[0] - new[1]).norm() > 0.5 * (weights["token_embedding.weight"][0] - mean).norm()
    elif not lacking:
        assert torch.equal(grown["token_embedding.weight"], weights["token_embedding.weight"])
    assert_same(grown, v8.grow(old, weights, learned_from_text)[1])  # the same again, whatever the seed


@pytest.mark.parametrize(("version", "kind"), [("v6_amp_ddp", "char"), ("v6_amp_ddp", "all"), (RUNG, "all")])
def test_logits_of_plain_text_stay_and_rows_of_roles_that_were_taught_too(version, kind):
    n = len(v8.make_tokenizer(OLD_VOCABS[kind]).vocab)
    plain, _, config = make_model(vocab_size=n)
    base = {"vocab": OLD_VOCABS[kind], "model": dict(plain.state_dict()), "version": version}
    model, same = v8.make_model(base, {}, config, "cpu")
    idx = torch.randint(n, (3, 8)) if kind == "char" else torch.randint(n - 3, (3, 8))
    old = n if kind == "char" else n - 3
    assert torch.equal(model(idx)[..., :old], plain(idx)[..., :old])
    assert_same(dict(model.state_dict()), dict(same.state_dict()))
    if version == RUNG:
        assert torch.equal(model.token_embedding.weight, plain.token_embedding.weight)
    else:
        assert len(model.token_embedding.weight[old:].unique(dim=0)) == 4 - (kind == "all")


# ------------------------------------------- properties -------------------------------------------


@pytest.mark.parametrize("position", ["rope", "learned"])
@pytest.mark.parametrize("method", v8.METHODS)
def test_no_position_sees_the_future(method, position):
    _, model, config = make_model(method, position=position)
    shake(model)
    idx = torch.randint(V, (4, config.block_size))
    with torch.inference_mode():
        before = model(idx)
        for t in range(config.block_size):
            changed = idx.clone()
            changed[:, t:] = (changed[:, t:] + 1 + torch.randint(V - 1, changed[:, t:].shape)) % V
            after = model(changed)
            assert torch.equal(before[:, :t], after[:, :t])
            assert not torch.isclose(before[:, t], after[:, t]).all(dim=-1).any()


@pytest.mark.parametrize("length", [2, 8, 9, 10, 77, 130])
def test_evaluation_counts_every_token_once(length):
    _, model, config = make_model("lora")
    shake(model)
    ids = torch.randint(V, (length,))
    losses = []
    with torch.inference_mode():
        for start in range(0, length - 1, config.block_size):
            x = ids[start : start + config.block_size][: length - 1 - start]
            logits = model(x[None])[0].double()
            losses += [-logits[t].log_softmax(-1)[ids[start + t + 1]].item() for t in range(len(x))]
    assert len(losses) == length - 1
    found = v8.evaluate(model, v8.windows(ids.to(torch.uint16), config))
    assert found == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert model.training  # evaluate leaves the model ready to go on


def test_bits_per_character_of_a_text_with_characters_of_several_bytes():
    text = "to be, \u00e9t\u00e9 \u4e2d or \U0001f9c0 not to be"
    tokenizer = BPETokenizer(["t o", "b e"], v8.SPECIAL_TOKENS)
    plain, _, config = make_model(vocab_size=len(tokenizer.vocab))
    ids = tokenizer.encode(text)
    ids.insert(9, tokenizer.special_tokens[END])  # between two documents: it costs bits and is no text
    ids, nats = torch.tensor(ids), 0.0
    with torch.inference_mode():
        for start in range(0, len(ids) - 1, 8):
            x, y = ids[start : start + 8], ids[start + 1 : start + 9]
            nats += F.cross_entropy(plain(x[None, : len(y)])[0].double(), y, reduction="sum").item()
    expected = nats / math.log(2) / (len(text) - 2)  # the first token, "to", is given
    ids = ids.to(torch.uint16)
    loss = v8.evaluate(plain, v8.windows(ids, config))
    assert v8.bits_per_char(loss, ids, tokenizer) == pytest.approx(expected, rel=1e-5)


def one_at_a_time(model, ids, config, stop):
    """Continue `ids` with no cache: each token is drawn after a pass over the whole window."""
    T, start, ids, n = config.block_size, max(0, len(ids) - config.block_size), list(ids), len(ids)
    generator = torch.Generator().manual_seed(config.seed)
    while len(ids) < n + config.max_new_tokens and (len(ids) == n or ids[-1] != stop):
        if len(ids) - start > T:
            start = len(ids) - T // 2
        with torch.inference_mode():
            logits = model(torch.tensor([ids[start:]]))[:, -1]
        ids.append(v8.sample_next(logits, config, generator).item())
    return ids[n:]


@pytest.mark.parametrize("method", v8.METHODS)
@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("n_rows", [1, 3, 32])
def test_many_prompts_are_answered_as_each_would_be_alone(method, greedy, n_rows):
    _, model, config = make_model(method, greedy=greedy, max_new_tokens=15)
    shake(model)
    prompts = [[1], [5, 6, 7], list(range(12)), [2] * 8, [9, 9], [3, 1, 4, 1, 5]]
    ends = [
        one_at_a_time(model, ids, replace(config, seed=config.seed + i), None)
        for i, ids in enumerate(prompts)
    ]
    stop = ends[1][4]
    expected = [
        one_at_a_time(model, ids, replace(config, seed=config.seed + i), stop)
        for i, ids in enumerate(prompts)
    ]
    shown = []
    found = v8.generate(model, prompts, config, stop, lambda ids: shown.append(list(ids)), n_rows)
    assert found == expected and (greedy or len({len(ids) for ids in found}) > 1)
    assert shown == [expected[0][: i + 1] for i in range(len(expected[0]))]


def test_greedy_is_the_likeliest_and_sampling_follows_the_probabilities():
    plain, _, config = make_model(max_new_tokens=1)
    ids = [3, 1, 4, 1, 5]
    with torch.inference_mode():
        probs = plain(torch.tensor([ids]))[0, -1].softmax(-1)
    assert v8.generate(plain, [ids], replace(config, greedy=True)) == [[probs.argmax().item()]]
    draws = torch.tensor(v8.generate(plain, [ids] * 2000, config, n_rows=500))[:, 0]
    shares = draws.bincount(minlength=V) / len(draws)
    assert (shares - probs).abs().max() < 5 * (0.25 / len(draws)) ** 0.5


def test_the_exam_counts_right_names_and_answers_that_end(monkeypatch):
    """A stand-in knows each name if there is a passage, and ends its answers to questions only."""
    plain, _, config = make_model(vocab_size=len(BPE.vocab), block_size=64)
    exam = [
        [("context", f"{name}:\nto be"), ("user", "Who?"), ("assistant", name)]
        for name in ("to", "be", "or", "no")
    ]
    held_out = [[("user", f"{i}"), ("assistant", "x")] for i in range(12)]
    tasks = {"exam": exam, "replies": held_out, "val": v8.encode_examples(held_out, BPE, config)}
    end, context = BPE.special_tokens[END], BPE.special_tokens[CONTEXT]
    asked = []

    def generate(model, prompts, config, stop):
        assert config.greedy and stop == end
        asked.append(config.max_new_tokens)
        answers = []
        for ids in prompts:
            name = re.search(r"<\|context\|>(\w+):", BPE.decode(ids))
            text = name[1] if name else "be" if "Who?" in BPE.decode(ids) else "reply"
            answers.append(
                BPE.encode("wrong" if text == "no" else text) + [end] * ("Who?" in BPE.decode(ids))
            )
        assert all((context in ids) == bool(exam and len(asked) == 2) for ids in prompts)
        return answers

    monkeypatch.setattr(v8, "generate", generate)
    val_ids = torch.randint(256, (50,)).to(torch.uint16)
    numbers, answers = v8.measure(plain, tasks, val_ids, BPE, replace(config, temperature=0.5))
    assert numbers["names_right"] == 0.75 and numbers["without_passage"] == 0.25
    assert numbers["answers_ended"] == 4 / 16 and asked == [100, 32, 32]
    assert answers == ["to", "be", "or", "wrong"] + ["reply"] * 10
    exam.clear()
    numbers, answers = v8.measure(plain, tasks, val_ids, BPE, config)
    assert "names_right" not in numbers and numbers["answers_ended"] == 0 and answers == ["reply"] * 10
    with torch.inference_mode():
        plain.eval()
        losses = [plain.loss(*v8.pad([example])).item() for example in tasks["val"]]
        n = sum(sum(learned) for _, learned in tasks["val"])
    assert numbers["val_loss"] == pytest.approx(sum(losses) / n, rel=1e-5)


def test_learning_rate_warms_up_and_decays():
    config = v8.Config(learning_rate=1.0, warmup_steps=10, max_steps=110, lr_floor=0.2)
    rates = [v8.learning_rate_at(step, config) for step in range(1, 111)]
    assert rates[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert rates[59] == pytest.approx(0.6) and rates[109] == pytest.approx(0.2)
    assert rates[9:] == sorted(rates[9:], reverse=True)


@pytest.mark.parametrize("method", v8.METHODS)
def test_a_few_answers_are_learned_by_heart(method, tmp_path):
    _, model, config = make_model(method, n_embd=32, learning_rate=0.01, max_steps=200, eval_interval=200)
    config = replace(config, batch_size=4, warmup_steps=5, out_dir=str(tmp_path), precision="fp32")
    pairs = [("a", "b"), ("b", "?"), ("?", "a"), ("aa", "bb")]
    examples = [v8.encode_chat([("user", q), ("assistant", a)], HAND) for q, a in pairs]
    model.train()
    v8.train(
        model,
        [examples[:2], examples],
        examples,
        config,
        new_run(),
    )
    prompts = [v8.encode_prompt([("user", q)], HAND) for q, _ in pairs]
    found = v8.generate(model, prompts, replace(config, greedy=True), stop=3)
    assert [HAND.decode(ids) for ids in found] == [a + END for _, a in pairs]


def test_steps_are_shared_out_among_the_stages(tmp_path, monkeypatch):
    _, model, config = make_model(max_steps=7, eval_interval=7, out_dir=str(tmp_path), precision="fp32")
    example = v8.encode_chat(SHORT, HAND)
    stages = [[example] * n for n in (1, 2, 3)]
    seen, get_batch = [], v8.get_batch
    monkeypatch.setattr(v8, "get_batch", lambda *args: seen.append(len(args[0])) or get_batch(*args))
    v8.train(model, stages, [example], config, new_run())
    assert seen == [1, 1, 1, 2, 2, 3, 3]


# ------------------------------------ from the command line ------------------------------------

SMALL = "--max_steps=12 --eval_interval=5 --batch_size=4 --max_new_tokens=20 --warmup_steps=3".split()
SMALL += ["--precision=fp32"]
TOLD = "--instructions=examples.jsonl"  # few examples and no exam: it takes a second
V6 = "--n_embd=16 --n_head=2 --n_layer=2 --block_size=256 --batch_size=4 --max_steps=12".split()
V6 += ["--eval_interval=6", "--eval_tokens=300", "--max_new_tokens=3", "--precision=fp32"]
NUMBERS = ("answers_ended", "val_loss", "reply_loss", "bits_per_char")


def run_v8(folder, *flags):
    """Run v8 in a folder with small settings; flags that come later win."""
    modes = {"--sample", "--chat", "--evaluate", "--resume"} & set(flags)
    rank = ["--lora_rank=2"] * any(flag in ("--method=lora", "--method=qlora") for flag in flags)
    return run_here(RUNG, *([] if modes else SMALL + rank), *flags, cwd=folder)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A folder with two models of v6, of 300 tokens and of characters, and a file of 40 examples."""
    folder = tmp_path_factory.mktemp("bases")
    text = (ROOT / "input.txt").read_text(encoding="utf-8")[:30_000]
    for name in ("input.txt", "other.txt"):
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    rng = random.Random(0)
    lines = []
    for i in range(40):
        a, b = (rng.choice(["the king", "my lord", "a horse", "no more"]) for _ in range(2))
        record = {"instruction": f"say {a}", "input": "" if i % 2 else f"not {b}", "output": a}
        if i % 4 == 1:
            record = {"messages": [turn(content=f"say {a}"), turn("assistant", a)]}
        lines.append(json.dumps(record))
    (folder / "examples.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for more in (["--vocab_size=300"], ["--tokenizer=char", "--out_dir=char"]):
        process = run_here("v6_amp_ddp", *V6, *more, cwd=folder)
        assert process.returncode == 0, process.stderr
    return folder


@pytest.fixture(scope="module")
def trained(bases):
    """Run v8 once for each method with the examples of the file; return {method: finished process}."""
    return {m: run_v8(bases, TOLD, f"--method={m}", f"--out_dir={m}") for m in v8.METHODS}


@pytest.fixture(scope="module")
def plays(bases):
    """Run v8 once with examples from the plays."""
    return run_v8(bases, "--method=lora", "--n_examples=60", "--out_dir=plays")


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def load(path):
    return torch.load(path, weights_only=True)


def files_of(folder):
    """All files of a folder but the ids that are kept of a text."""
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and "tokens" not in p.parts}


@pytest.fixture
def copy(bases, trained, tmp_path):
    """A copy of the folder with all that was trained in it, to work in."""
    return Path(shutil.copytree(bases, tmp_path / "copy", copy_function=shutil.copy2))


@pytest.mark.parametrize("method", v8.METHODS)
def test_training_makes_all_its_files(method, bases, trained):
    process, out = trained[method], bases / method
    assert process.returncode == 0, process.stderr
    adapter = {"adapter.pt"} if method != "full" else set()
    files = {path.name for path in out.iterdir()}
    assert files == {"checkpoint.pt", "metrics.json", "loss.png", "sample.txt"} | adapter
    assert not adapter or (out / "adapter.pt").stat().st_size < (out / "checkpoint.pt").stat().st_size / 2
    metrics, checkpoint = metrics_of(out), load(out / "checkpoint.pt")
    assert set(metrics) >= METRICS and metrics["version"] == RUNG and metrics["steps"] == 12
    assert [point["step"] for point in metrics["history"]] == [5, 10, 12]
    assert metrics["tokens_per_second"] == pytest.approx(metrics["tokens"] / metrics["seconds"])
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["val_loss"]))
    assert metrics["params"] == sum(x.numel() for x in checkpoint["model"].values())
    block = 2 * (16 + 48) + 2 * (16 + 16) + 2 * 2 * (16 + 64) + 4 * 16  # adapters of rank 2, two norms
    learned = metrics["params"] if method == "full" else 2 * block + 2 * 16 + 4 * 16
    assert metrics["learned"] == learned == sum(x.numel() for x in checkpoint["last"].values())
    assert metrics["share_learned"] == pytest.approx(
        learned / (metrics["params"] + (method != "full") * 2 * (block - 64))
    )
    assert metrics["base_share"] == pytest.approx(metrics["base_bytes"] / 4 / metrics["params"])
    assert metrics["base_share"] == 1.0 if method != "qlora" else 0.1 < metrics["base_share"] < 0.5
    assert metrics["before"].keys() == set(NUMBERS) and metrics["before"]["val_loss"] > metrics["val_loss"]
    sample = (out / "sample.txt").read_text(encoding="utf-8")
    assert sample in process.stdout and sample.count("<|user|>") == 4 and sample.count("after: ") == 4
    assert (
        f"{metrics['val_loss']:.4f}" in process.stdout
        and f"{metrics['before']['val_loss']:.4f}" in process.stdout
    )
    assert f"--method {method}" in process.stdout and BASE in process.stdout
    assert ("in 4 bits the base needs" in process.stdout) == (method == "qlora")
    assert "loss" in process.stderr and "examples/s" in process.stderr
    assert matplotlib.image.imread(out / "loss.png").std() > 0


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_checkpoint_is_a_plain_model_and_the_adapter_its_difference(method, bases, trained):
    checkpoint, adapter = load(bases / method / "checkpoint.pt"), load(bases / method / "adapter.pt")
    base = load(bases / BASE / "checkpoint.pt")
    assert_same(adapter["last"], checkpoint["last"])
    assert checkpoint["model"].keys() == base["model"].keys()
    for name, B in adapter["last"].items():
        if name.endswith("lora_B") and method == "lora":
            path = name.removesuffix(".lora_B")
            expected = base["model"][f"{path}.weight"] + 16 / 2 * B @ adapter["last"][f"{path}.lora_A"]
            torch.testing.assert_close(checkpoint["model"][f"{path}.weight"], expected, atol=1e-6, rtol=0)
            assert B.any()
    assert base["model"].keys() == load(bases / "full/checkpoint.pt")["model"].keys()


def test_examples_of_the_plays_from_end_to_end(bases, plays):
    assert plays.returncode == 0, plays.stderr
    metrics = metrics_of(bases / "plays")
    for name in ("names_right", "without_passage"):
        assert 0 <= metrics[name] <= 1 and name in metrics["before"]
    sample = (bases / "plays/sample.txt").read_text(encoding="utf-8")
    assert sample.count("<|context|>") == 10 and sample.count("right: ") == 10
    assert sample.count("in the text: ") == 10 and sample.count("\nAnswer as ") == 10
    evaluated = run_v8(bases, "--evaluate", "--out_dir=plays")
    assert evaluated.returncode == 0 and f"{metrics['names_right']:.4f}" in evaluated.stdout


def test_examples_longer_than_the_window_are_counted_in_the_command_line_too(copy):
    lines = (copy / "examples.jsonl").read_text(encoding="utf-8")
    long = json.dumps({"instruction": "x " * 300, "output": "y"})
    (copy / "long.jsonl").write_text("\n".join([lines, *[long] * 3]), encoding="utf-8")
    process = run_v8(copy, "--instructions=long.jsonl", "--out_dir=new", "--max_steps=1")
    assert process.returncode == 0, process.stderr
    notes = re.findall(r"note: (\d+) of (\d+) examples are longer", process.stdout)
    assert sum(int(dropped) for dropped, _ in notes) == 3


@pytest.mark.parametrize("method", v8.METHODS)
def test_a_model_of_characters_learns_to_answer_and_can_be_a_base_again(method, bases, tmp_path):
    flags = [TOLD, f"--method={method}", "--base=char", f"--out_dir={tmp_path}/out", "--max_steps=5"]
    process = run_v8(bases, *flags)
    assert process.returncode == 0, process.stderr
    assert (process.stdout + process.stderr).count("it grows by them") == 1
    vocab = load(tmp_path / "out/checkpoint.pt")["vocab"]
    assert vocab == [*load(bases / "char/checkpoint.pt")["vocab"], *v8.SPECIAL_TOKENS]
    again = run_v8(bases, TOLD, f"--base={tmp_path}/out", f"--out_dir={tmp_path}/again", "--max_steps=5")
    assert again.returncode == 0 and "grows" not in again.stdout + again.stderr
    first, second = (metrics_of(tmp_path / name) for name in ("out", "again"))
    for name in NUMBERS:  # it begins where the first has ended
        assert second["before"][name] == pytest.approx(first[name], abs=1e-5), name
    assert run_v8(bases, "--sample", f"--out_dir={tmp_path}/out").returncode == 0


def test_sampling_answers_and_changes_no_file(bases, trained):
    before = files_of(bases)
    args = ["--sample", "--out_dir=lora", "--prompt=say my lord", "--max_new_tokens=30"]
    texts = []
    for more in (
        [],
        [],
        ["--seed=7"],
        ["--greedy"],
        ["--context=not my lord"],
        ["--stream"],
        ["--greedy", "--stream"],
    ):
        process = run_v8(bases, *args, *more)
        assert process.returncode == 0 and process.stderr == "", process.stderr
        texts.append(process.stdout)
    plain, same, seed, greedy, context, stream, greedy_stream = texts
    assert plain == same == stream and greedy == greedy_stream
    assert len({plain, seed, greedy, context}) == 4
    assert before == files_of(bases)


def test_an_answer_is_that_of_the_ids_of_the_prompt(bases, trained):
    checkpoint = load(bases / "full/checkpoint.pt")
    config = v8.Config(**checkpoint["config"])
    model = v8.LanguageModel(config, config.vocab_size).eval()
    model.load_state_dict(checkpoint["model"])
    tokenizer = v8.make_tokenizer(checkpoint["vocab"])
    s = tokenizer.special_tokens
    ids = [s[CONTEXT], *tokenizer.encode("A:\nno"), s[USER], *tokenizer.encode("say\nit"), s[ASSISTANT]]
    config = replace(config, greedy=True, max_new_tokens=12)
    expected = tokenizer.decode([i for i in one_at_a_time(model, ids, config, s[END]) if i != s[END]])
    args = ["--sample", "--greedy", "--max_new_tokens=12", r"--context=A:\nno", r"--prompt=say\nit"]
    process = run_v8(bases, *args, "--out_dir=full")
    assert process.stdout == expected + "\n"


def test_a_conversation_remembers_its_turns(bases, trained, monkeypatch):
    seen, typed = [], iter([r"say my lord\nnow", "and again", ""])
    generate = v8.generate
    monkeypatch.setattr(
        v8,
        "generate",
        lambda model, prompts, *rest: seen.append(prompts[0]) or generate(model, prompts, *rest),
    )
    monkeypatch.setattr("builtins.input", lambda *_: next(typed))
    monkeypatch.chdir(bases)
    monkeypatch.setattr(sys, "argv", [RUNG, "--chat", "--out_dir=lora", "--greedy", r"--context=A:\nno"])
    v8.main()
    tokenizer = v8.make_tokenizer(load(bases / "lora/checkpoint.pt")["vocab"])
    first, second = (tokenizer.decode(ids) for ids in seen)
    assert first == f"{CONTEXT}A:\nno{USER}say my lord\nnow{ASSISTANT}"
    assert second.startswith(first) and re.search(
        r"<\|endoftext\|><\|user\|>and again<\|assistant\|>$", second
    )
    assert seen[1][: len(seen[0])] == seen[0]


def test_what_does_not_fit_the_window_is_left_out_oldest_first(monkeypatch):
    _, model, config = make_model(vocab_size=len(HAND.vocab), block_size=16, max_new_tokens=4)
    turns = [
        ("context", "ab"),
        ("user", "ab"),
        ("assistant", "a"),
        ("user", "b"),
        ("assistant", "a"),
        ("user", "a?"),
    ]
    seen = []
    monkeypatch.setattr(v8, "generate", lambda model, prompts, *rest: seen.append(prompts[0]) or [[3]])
    for block_size in (12, 16, 20, 64):  # 8, 12, 16 and 60 ids at most; all turns have 18
        v8.answer(model, turns, HAND, replace(config, block_size=block_size))
    assert HAND.decode(seen[0]) == f"{CONTEXT}ab{USER}a?{ASSISTANT}"
    assert seen[1] == seen[2] == v8.encode_prompt([turns[0], *turns[3:]], HAND)
    assert seen[3] == v8.encode_prompt(turns, HAND)
    with pytest.raises(SystemExit, match="what is asked has 19 tokens, the model reads 16"):
        v8.answer(model, [("context", "ab" * 6), ("user", "a?ab")], HAND, config)


def test_a_conversation_from_a_terminal_ends_with_the_input(bases, trained):
    args = [sys.executable, str(ROOT / f"{RUNG}.py"), "--chat", "--out_dir=full"]
    process = subprocess.run(args, cwd=bases, input="say no more\n", capture_output=True, encoding="utf-8")
    assert process.returncode == 0 and process.stderr == "" and process.stdout.count(">") >= 2


def test_a_conversation_takes_no_prompt_from_a_flag(bases, trained):
    assert refused(run_v8(bases, "--chat", "--out_dir=full", "--prompt=hi"), "leave out --prompt", "--sample")


@pytest.mark.parametrize("method", v8.METHODS)
def test_evaluate_prints_the_numbers_of_the_metrics_and_writes_nothing(method, bases, trained):
    before = files_of(bases)
    process = run_v8(bases, "--evaluate", f"--out_dir={method}")
    assert process.returncode == 0 and "step/s" not in process.stderr
    assert before == files_of(bases)
    metrics = metrics_of(bases / method)
    for name in NUMBERS:  # the merged weights are other sums of the same: the last digit may differ
        printed = float(re.search(rf"^ *{name} +([\d.]+)$", process.stdout, flags=re.M)[1])
        assert printed == pytest.approx(metrics[name], abs=5.1e-5 if method == "full" else 1e-4), name


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_an_adapter_on_its_base_answers_as_the_merged_model(method, bases, trained):
    args = ["--sample", "--greedy", "--max_new_tokens=40", "--prompt=say my lord"]
    merged = run_v8(bases, *args, f"--out_dir={method}")
    for more in ([], [f"--base={BASE}"], [f"--base={bases}/{BASE}"]):
        process = run_v8(bases, *args, f"--adapter={method}/adapter.pt", *more)
        assert process.returncode == 0 and process.stdout == merged.stdout, process.stderr
    evaluated = run_v8(bases, "--evaluate", f"--adapter={method}/adapter.pt")
    assert f"{metrics_of(bases / method)['val_loss']:.4f}" in evaluated.stdout


def test_an_adapter_of_characters_prints_the_answer_alone(bases, tmp_path):
    flags = [TOLD, "--method=lora", "--base=char", f"--out_dir={tmp_path}", "--max_steps=2"]
    assert run_v8(bases, *flags).returncode == 0
    merged = run_v8(bases, "--sample", "--greedy", f"--out_dir={tmp_path}")
    process = run_v8(bases, "--sample", "--greedy", f"--adapter={tmp_path}/adapter.pt")
    assert process.returncode == 0 and process.stdout == merged.stdout


def test_adapters_that_do_not_fit_are_refused(copy):
    torch.save([1], copy / "list.pt")
    adapter = load(copy / "lora/adapter.pt")
    torch.save(adapter | {"config": adapter["config"] | {"lora_rank": 3}}, copy / "rank.pt")
    torch.save(adapter | {"config": adapter["config"] | {"unknown": 3}}, copy / "unknown.pt")
    torch.save({"last": adapter["last"]}, copy / "lacks.pt")
    base = load(copy / BASE / "checkpoint.pt")
    base["model"]["norm.weight"][0] += 1e-3
    (copy / "near").mkdir()
    torch.save(base, copy / "near/checkpoint.pt")
    for mode in ("--sample", "--evaluate", "--chat"):
        assert refused(
            run_v8(copy, mode, "--adapter=lora/adapter.pt", "--base=near"), "near", "base", "trained on"
        )
        assert refused(run_v8(copy, mode, "--adapter=lora/adapter.pt", "--base=char"), "char", "--base")
        for name in ("nowhere.pt", "list.pt", "unknown.pt", "lacks.pt", "examples.jsonl"):
            assert refused(run_v8(copy, mode, f"--adapter={name}"), name, "adapter")
        assert refused(run_v8(copy, mode, "--adapter=rank.pt"), "fit")
        assert refused(run_v8(copy, mode, "--adapter=lora/adapter.pt", "--out_dir=full"), "--out_dir")
        assert refused(run_v8(copy, mode, "--adapter=lora/adapter.pt", "--lora_rank=4"), "--lora_rank")
    for more in ([], ["--resume"]):
        assert refused(run_v8(copy, "--adapter=lora/adapter.pt", *more), "--adapter", "--sample")


# ------------------------------------ nothing is lost, nothing lies ------------------------------------


def main_here(folder, monkeypatch, *flags, ctrl_c_at=None):
    """Run main in this process; with `ctrl_c_at`, press Ctrl-C in that step, and return what it says."""
    with monkeypatch.context() as patch:
        calls, get_batch = [], v8.get_batch

        def get_batch_and_press_ctrl_c(*args):
            calls.append(1)
            if len(calls) == ctrl_c_at:
                signal.raise_signal(signal.SIGINT)
            return get_batch(*args)

        patch.setattr(v8, "get_batch", get_batch_and_press_ctrl_c)
        patch.chdir(folder)
        patch.setattr(sys, "argv", [RUNG, *flags])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            v8.main()
        except SystemExit as end:
            return str(end.code)
        finally:
            v8.plt.close("all")
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return ""


@pytest.mark.parametrize("method", v8.METHODS)
def test_resumed_run_equals_uninterrupted_run(method, bases, tmp_path, monkeypatch):
    flags = [*SMALL, TOLD, f"--method={method}", "--dropout=0.2", "--weight_decay=0.1"]
    assert main_here(bases, monkeypatch, *flags, f"--out_dir={tmp_path}/whole") == ""
    for stop_at in (5, 7, 12):
        parts = tmp_path / f"parts{stop_at}"
        said = main_here(bases, monkeypatch, *flags, f"--out_dir={parts}", ctrl_c_at=stop_at)
        assert (
            re.search("step" if stop_at == 12 else f"step {stop_at} and saved", said) and "--resume" in said
        )
        assert not (parts / "metrics.json").exists()
        assert load(parts / "checkpoint.pt")["step"] == stop_at
        assert main_here(bases, monkeypatch, "--resume", f"--out_dir={parts}") == ""
        names = ["checkpoint.pt"] + ["adapter.pt"] * (method != "full" and stop_at != 12)
        for name in names:
            assert_same(load(tmp_path / "whole" / name), load(parts / name))
        metrics = [metrics_of(folder) for folder in (tmp_path / "whole", parts)]
        for name in (*NUMBERS, "before", "steps", "tokens", "learned", "base_bytes"):
            assert metrics[0][name] == metrics[1][name], name
        texts = [(folder / "sample.txt").read_bytes() for folder in (tmp_path / "whole", parts)]
        assert texts[0] == texts[1]


def test_same_seed_same_numbers(bases, trained, tmp_path):
    assert run_v8(bases, TOLD, "--method=lora", f"--out_dir={tmp_path}/a").returncode == 0
    assert run_v8(bases, TOLD, "--method=lora", f"--out_dir={tmp_path}/b", "--seed=2").returncode == 0
    one, a, b = (
        load(folder / "checkpoint.pt") for folder in (bases / "lora", tmp_path / "a", tmp_path / "b")
    )
    assert_same(one, a)
    assert not torch.equal(one["model"]["norm.weight"], b["model"]["norm.weight"])


def test_a_finished_run_goes_on_with_more_steps(copy):
    process = run_v8(copy, "--resume", "--out_dir=qlora", "--max_steps=20")
    assert process.returncode == 0, process.stderr
    metrics = metrics_of(copy / "qlora")
    assert metrics["steps"] == 20 and [p["step"] for p in metrics["history"]] == [5, 10, 12, 15, 20]
    assert not (copy / "qlora/checkpoint.previous.pt").exists()


def test_a_finished_run_survives_a_new_one(copy, monkeypatch):
    out, new = copy / "lora", [*SMALL, TOLD, "--method=lora", "--out_dir=lora", "--seed=2"]
    finished = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "nothing is saved" in main_here(copy, monkeypatch, *new, ctrl_c_at=3)
    assert finished == {path.name: path.read_bytes() for path in out.iterdir()}
    assert "step 7 and saved" in main_here(copy, monkeypatch, *new, ctrl_c_at=7)
    kept = {"checkpoint.previous.pt": "checkpoint.pt", "metrics.previous.json": "metrics.json"}
    kept["adapter.previous.pt"] = "adapter.pt"
    for _ in range(2):  # an unfinished run takes no finished one's place
        assert all((out / name).read_bytes() == finished[old] for name, old in kept.items())
        assert load(out / "checkpoint.pt")["step"] == load(out / "checkpoint.pt")["history"][-1]["step"] + 2
        assert not (out / "metrics.json").exists()
        main_here(copy, monkeypatch, *new, ctrl_c_at=7)
    sampled = run_v8(copy, "--sample", "--adapter=lora/adapter.previous.pt", "--greedy")
    assert sampled.returncode == 0, sampled.stderr


def test_no_adapter_is_left_beside_the_model_of_another_run(copy, monkeypatch):
    """Neither that of an unfinished run beside the next one nor an older one beside what was finished."""
    new = [*SMALL, TOLD, "--out_dir=lora", "--seed=2"]
    assert "saved" in main_here(copy, monkeypatch, *new, "--method=lora", ctrl_c_at=7)
    assert main_here(copy, monkeypatch, *new, "--method=full") == ""
    assert not (copy / "lora/adapter.pt").exists()
    assert "saved" in main_here(copy, monkeypatch, *new, "--method=full", ctrl_c_at=7)
    assert load(copy / "lora/checkpoint.previous.pt")["config"]["method"] == "full"
    assert not (copy / "lora/adapter.previous.pt").exists()


def test_loss_that_is_not_finite_stops_the_run_and_harms_nothing(copy):
    before = files_of(copy)
    for method in v8.METHODS:
        process = run_v8(copy, TOLD, f"--method={method}", f"--out_dir={method}", "--learning_rate=1e38")
        assert refused(process, "not finite", "--learning_rate")
    assert before == files_of(copy)


def test_the_run_of_v6_is_the_default_base_and_is_made_first_where_there_is_none(
    bases, tmp_path, monkeypatch, capsys
):
    for name in ("input.txt", "examples.jsonl"):
        shutil.copy(bases / name, tmp_path)
    calls = []

    def run(args, **rest):
        calls.append(list(map(str, args)))
        if len(calls) > 1:
            shutil.copytree(bases / BASE, tmp_path / BASE)
        return subprocess.CompletedProcess(args, len(calls) == 1)

    monkeypatch.setattr(subprocess, "run", run)
    assert "v6_amp_ddp.py has failed" in main_here(tmp_path, monkeypatch, *SMALL, TOLD)
    assert main_here(tmp_path, monkeypatch, *SMALL, TOLD) == ""
    assert calls == [[sys.executable, str(ROOT / "v6_amp_ddp.py")]] * 2
    said = capsys.readouterr().out
    assert said.count("there is no base yet") == 2 and "minutes" in said
    assert metrics_of(tmp_path / "runs" / RUNG)["config"]["base"] == BASE
    assert main_here(tmp_path, monkeypatch, *SMALL, TOLD) == "" and len(calls) == 2


@pytest.mark.parametrize(
    "flags",
    [
        "--lora_rank=0",
        "--method=abc",
        "--n_embd=32",
        "--instructions=nowhere.jsonl",
        "--data=nowhere.txt",
        "--out_dir=input.txt",
    ],
)
def test_what_is_impossible_is_refused_before_a_base_is_trained(flags, bases, tmp_path, monkeypatch):
    shutil.copy(bases / "input.txt", tmp_path)
    calls, failed = [], subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(subprocess, "run", lambda *args, **rest: calls.append(args) or failed)
    with pytest.raises((SystemExit, TokenizerError)):
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            patch.setattr(sys, "argv", [RUNG, flags])
            v8.main()
    assert calls == []


BAD_FLAGS = [
    ("--base=nowhere", ["nowhere", "--base"]),
    ("--base=quantized", ["quantized", "--base"]),
    ("--base=runs/../runs/v6_amp_ddp --out_dir=runs/v6_amp_ddp", ["overwritten", "--out_dir"]),
    ("--lora_targets=abc", ["--lora_targets", "abc", "qkv"]),
    ("--lora_targets=qkv,", ["--lora_targets", "qkv"]),
    ("--lora_rank=0", ["--lora_rank 0"]),
    ("--lora_alpha=-1", ["--lora_alpha -1"]),
    ("--method=abc", ["--method", "abc", "qlora"]),
    ("--renamed=2", ["--renamed"]),
    ("--renamed=nan", ["--renamed"]),
    ("--n_passages=0", ["--n_passages 0"]),
    ("--dropout=1", ["--dropout"]),
    ("--greedy --temperature=0.5", ["--greedy", "--temperature"]),
    ("--precision=fp16", ["--precision", "fp16", "bf16"]),
    ("--device=abacus", ["abacus", "cpu"]),
    ("--data=nowhere.txt", ["nowhere.txt", "--data"]),
    ("--data=short.txt", ["short.txt", "short"]),
    ("--data=prose.txt", ["prose.txt", "speeches"]),
    ("--out_dir=input.txt", ["input.txt", "--out_dir"]),
    ("--out_dir=input.txt/below", ["input.txt", "--out_dir"]),
    ("--max_steps=many", ["--max_steps", "many"]),
    ("--no_such_flag=1", ["--no_such_flag"]),
    *(
        (f"--{name}={OTHER[name]}", [f"--{name}"])
        for name in v8.MODEL
        if name not in ("tokenizer", "position", "vocab_size")
    ),
    ("--tokenizer=char", ["--tokenizer"]),
    ("--vocab_size=301", ["--vocab_size"]),
    ("--position=learned", ["--position"]),
]


@pytest.mark.parametrize(("flags", "words"), BAD_FLAGS, ids=[flags for flags, _ in BAD_FLAGS])
def test_bad_input_is_refused_in_one_sentence_and_harms_nothing(flags, words, bases, tmp_path):
    for name in ("input.txt", "examples.jsonl"):
        shutil.copy(bases / name, tmp_path)
    shutil.copytree(bases / BASE, tmp_path / BASE)
    (tmp_path / "short.txt").write_text("short", encoding="utf-8")
    (tmp_path / "prose.txt").write_text("Call me Ishmael. " * 500, encoding="utf-8")
    checkpoint = load(tmp_path / BASE / "checkpoint.pt")
    (tmp_path / "quantized").mkdir()
    codes = {"blocks.0.mlp.0.codes": torch.zeros(2, dtype=torch.int8)}
    checkpoint |= {"version": "v7_quantize", "model": checkpoint["model"] | codes}
    torch.save(checkpoint, tmp_path / "quantized/checkpoint.pt")
    before = files_of(tmp_path)
    process = run_v8(tmp_path, "--n_examples=20", *flags.split())
    assert refused(process, *words) and "step/s" not in process.stderr
    assert before == files_of(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="a folder where not even root can write")
def test_a_folder_that_cannot_be_written_is_refused(bases):
    assert refused(run_v8(bases, TOLD, "--out_dir=/proc"), "/proc", "--out_dir")


def test_a_model_that_v7_has_quantized_is_no_base(bases, tmp_path):
    process = run_here("v7_quantize", f"--out_dir={tmp_path}/v7", "--max_new_tokens=3", cwd=bases)
    assert process.returncode == 0, process.stderr
    assert refused(
        run_v8(bases, TOLD, f"--base={tmp_path}/v7", f"--out_dir={tmp_path}/x"), "quantized", "--base"
    )
    process = run_here(
        "v7_quantize", "--quantize=none", f"--out_dir={tmp_path}/v7", "--max_new_tokens=3", cwd=bases
    )
    assert process.returncode == 0, process.stderr
    process = run_v8(bases, TOLD, f"--base={tmp_path}/v7", f"--out_dir={tmp_path}/x", "--max_steps=2")
    assert process.returncode == 0, process.stderr


def damaged(good, unused):
    """Checkpoints that lack a part of a good one, or in which one has another shape; no `unused` one."""
    name, bad = "token_embedding.weight", {}
    for part in good:
        bad[f"no {part}"] = {key: value for key, value in good.items() if key != part}
    for i, part in enumerate(sorted(good.keys() - {"version", "config"})):
        value = [None, "x", [], torch.zeros(2)][i % 4]
        bad[f"{part} {value!r}"] = good | {part: 5 if isinstance(value, type(good[part])) else value}
    for key, value in [("block_size", "8"), ("n_embd", None), ("n_head", -1), ("seed", "x"), ("unknown", 1)]:
        bad[f"config {key} {value!r}"] = good | {"config": good["config"] | {key: value}}
    bad["config None"] = good | {"config": None}
    bad["rows"] = good | {"model": good["model"] | {name: torch.zeros(2, 3)}}
    bad["other weights"] = good | {"model": {"other": torch.zeros(2)}}
    bad["no tensor"] = good | {"model": good["model"] | {name: 5}}
    bad |= {"version": good | {"version": 3}, "list": [good], "number": 5}
    return {what: content for what, content in bad.items() if not re.match(f"(no )?({unused})", what)}


@pytest.mark.parametrize(
    ("mode", "unused"),
    [
        ("--sample", "last|optimizer|tokens|before|base_hash|config unknown"),
        ("--evaluate", "last|optimizer|tokens|before|base_hash|config unknown"),
        ("--resume", "model|rows|other weights|no tensor|vocab|config unknown"),  # made anew of the base
        ("train", "last|optimizer|tokens|skipped|scaler|config (seed|unknown)"),
    ],
    ids=["--sample", "--evaluate", "--resume", "train"],
)
def test_damaged_checkpoints_are_refused_in_one_sentence(mode, unused, bases, trained, tmp_path):
    path = bases / (BASE if mode == "train" else "lora") / "checkpoint.pt"
    content, place, wrong = path.read_bytes(), tmp_path / "bad/checkpoint.pt", []
    place.parent.mkdir()
    flags = [mode, f"--out_dir={tmp_path}/bad", *["--max_steps=14"] * (mode == "--resume")]
    if mode == "train":
        flags = [TOLD, f"--base={tmp_path}/bad", f"--out_dir={tmp_path}/out"]
    bad = {"cut": content[: len(content) // 2], "empty": b"", "text": b"no checkpoint"}
    for name, content in (bad | damaged(load(path), unused)).items():
        if isinstance(content, bytes):
            place.write_bytes(content)
        else:
            torch.save(content, place)
        try:
            process = run_v8(bases, *flags)
            assert refused(process)
        except AssertionError:
            wrong.append(f"{name}: {process.returncode} {process.stderr[-200:]!r}")
        except Exception as error:  # a traceback
            wrong.append(f"{name}: {error!r:.200}")
    assert not wrong, "\n".join(wrong)
    assert not (tmp_path / "out/checkpoint.pt").exists()


def test_no_model_yet(bases):
    for mode in ("--sample", "--chat", "--evaluate", "--resume"):
        assert refused(run_v8(bases, mode, "--out_dir=nothing"), "nothing", "train first")


def test_a_base_that_has_gone_or_changed_is_said_in_resuming_and_may_be_named_anew(copy):
    (copy / BASE).rename(copy / "moved")
    assert refused(run_v8(copy, "--resume", "--out_dir=lora", "--max_steps=14"), BASE, "--base")
    process = run_v8(copy, "--resume", "--out_dir=lora", "--max_steps=14", "--base=moved")
    assert process.returncode == 0, process.stderr
    assert run_v8(copy, "--sample", "--out_dir=lora").returncode == 0  # the merged model needs no base
    checkpoint = load(copy / "moved/checkpoint.pt")
    checkpoint["model"]["norm.weight"][0] += 1e-3
    torch.save(checkpoint, copy / "moved/checkpoint.pt")
    assert refused(run_v8(copy, "--resume", "--out_dir=lora", "--max_steps=16"), "moved", "not the base")


# ------------------------------------ a flag takes effect or is refused ------------------------------------

MINE = OTHER | dict(
    instructions="other.jsonl", base="char", adapter="nowhere.pt", method="qlora", lora_rank=3
)
MINE |= dict(lora_alpha=3.0, lora_targets="qkv", n_examples=9, n_passages=2, renamed=0.1, context="A: b")
MINE |= dict(position="learned", tokenizer="char", block_size=128, n_embd=32, prompt="say no more")
SAMPLING = {"device", "seed", "greedy", "temperature", "top_k", "top_p", "prompt", "max_new_tokens"}
SAMPLING |= {"stream", "context"}
TRAINING = {"max_steps", "learning_rate", "warmup_steps", "lr_floor", "grad_clip", "eval_interval", "dropout"}
TRAINING |= {"beta2", "weight_decay", "precision"}


def other(name, value):
    """Another value for a field than a run has."""
    if name == "precision":
        return "bf16"
    return {"vocab_size": value + 1}.get(name, MINE[name]) if name == "vocab_size" else MINE[name]


@pytest.mark.parametrize("mode", ["--sample", "--evaluate", "--resume"])
def test_a_flag_of_a_finished_run_takes_effect_or_is_refused(mode, copy):
    shutil.copy(copy / "examples.jsonl", copy / "other.jsonl")
    saved = load(copy / "lora/checkpoint.pt")["config"]
    plain = run_v8(copy, mode, "--out_dir=lora")
    assert plain.returncode == 0, plain.stderr
    before = files_of(copy)
    takes = {"--sample": SAMPLING, "--evaluate": {"device"}, "--resume": SAMPLING}[mode]
    for name in (field.name for field in fields(v8.Config)):
        value = other(name, saved[name])
        assert value != saved[name], f"MINE needs another {name}"
        if name == "max_steps" and mode == "--resume":
            continue
        where = [] if name == "out_dir" else ["--out_dir=lora"] if name != "adapter" else []
        process = run_v8(copy, mode, flag(name, value), *where)
        if name in takes:
            assert process.returncode == 0, f"{name}: {process.stderr}"
            assert (process.stdout != plain.stdout) == (name not in ("device", "stream")), name
            before = files_of(copy) if mode == "--resume" else before  # whose report is written again
        else:
            assert refused(process, value if name == "out_dir" else name), name
            assert before == files_of(copy), name


def test_a_flag_of_a_resumed_run_takes_effect_or_is_refused(bases, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(bases, tmp_path / "copy"))
    shutil.copy(folder / "examples.jsonl", folder / "other.jsonl")
    flags = [*SMALL, TOLD, "--method=lora", "--out_dir=run", "--eval_interval=3"]
    assert "step 7 and saved" in main_here(folder, monkeypatch, *flags, ctrl_c_at=7)
    kept = shutil.copytree(folder / "run", folder / "kept")
    saved = load(kept / "checkpoint.pt")["config"]

    def resume(*more):
        shutil.rmtree(folder / "run")
        shutil.copytree(kept, folder / "run")
        before = files_of(folder)
        return main_here(folder, monkeypatch, "--resume", "--out_dir=run", *more), before

    def outcome():
        checkpoint = load(folder / "run/checkpoint.pt")
        history = [{k: v for k, v in point.items() if k != "seconds"} for point in checkpoint["history"]]
        return {name: x.tolist() for name, x in checkpoint["last"].items()}, history

    assert resume()[0] == ""
    plain = outcome()
    for name in (field.name for field in fields(v8.Config)):
        if name in ("out_dir", "adapter"):
            continue
        value = other(name, saved[name])
        said, before = resume(flag(name, value))
        if name not in SAMPLING | TRAINING:
            assert said.startswith("error: ") and f"--{name}" in said and "\n" not in said, name
            assert before == files_of(folder), name
            continue
        assert said == "", f"{name}: {said}"
        assert load(folder / "run/checkpoint.pt")["config"][name] == value  # what --sample will go by
        assert metrics_of(folder / "run")["config"][name] == value
        assert (outcome() != plain) == (name in TRAINING | {"seed"}), name


def test_help_names_every_flag_with_meaning_and_default(tmp_path):
    process = run_here(RUNG, "--help", cwd=tmp_path)
    text = " ".join(process.stdout.split())
    assert process.returncode == 0 and "None" not in text
    assert all(mode in text for mode in ("--sample", "--chat", "--evaluate", "--resume"))
    for name, field in v8.Config.__dataclass_fields__.items():
        assert re.search(rf"--{name}[ ,]", text) and f"(default: {field.default!r})" in text, name


# ---------------------------------------------- weights out ----------------------------------------------


def test_a_vocabulary_of_characters_that_has_grown_is_exported():
    export, tokenizers = pytest.importorskip("export"), pytest.importorskip("tokenizers")
    vocab = [*"\n !:ab<>|endoftxusr", *v8.SPECIAL_TOKENS]
    ours, theirs = v8.make_tokenizer(vocab), export.published_tokenizer(vocab)
    assert isinstance(theirs, tokenizers.Tokenizer)
    assert theirs.encode("a b:\nba!").ids == ours.encode("a b:\nba!")
    assert theirs.encode(f"{USER}a{END}").ids == [
        ours.special_tokens[USER],
        *ours.encode("a"),
        vocab.index(END),
    ]
    assert theirs.decode(ours.encode("ab ba")) == "ab ba"
