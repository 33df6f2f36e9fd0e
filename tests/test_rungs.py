"""What holds for every rung: shapes, causality, gradients, learning, exact evaluation, exact repetition."""

import importlib
import json
import math
import signal
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, RUNGS, VARIANTS, tiny_config, tiny_flags, training_folder

V = 65


def make_model(module, seed=0, **changes):
    """A model of small settings with weights large enough that every part of it matters."""
    torch.manual_seed(seed)
    config = tiny_config(module, **changes)
    model = module.LanguageModel(config, V)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval(), config


def run_main(module, folder, monkeypatch, out, *flags):
    """Run a rung's main in this process; return the checkpoint of its training."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [module.NAME, *tiny_flags(module), f"--out_dir={out}", *flags])
    module.main()
    return torch.load(training_folder(module.NAME, folder / out) / "checkpoint.pt", weights_only=True)


def assert_same(a, b):
    """Two nested structures are equal, their tensors to the bit."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a.keys() - {"seconds", "out_dir"}:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def test_shapes(module):
    model, config = make_model(module)
    for T in (1, 5, config.block_size):
        assert model(torch.zeros(3, T, dtype=torch.long)).shape == (3, T, V)


def test_no_position_sees_the_future(module):
    model, config = make_model(module)
    idx = torch.randint(V, (4, config.block_size))
    with torch.inference_mode():
        before = model(idx)
        for t in range(config.block_size):
            changed = idx.clone()
            changed[:, t:] = (changed[:, t:] + 1 + torch.randint(V - 1, changed[:, t:].shape)) % V
            after = model(changed)
            assert torch.equal(before[:, :t], after[:, :t])
            assert not torch.isclose(before[:, t], after[:, t]).all(dim=-1).any()


def test_gradients_reach_every_parameter(module):
    torch.manual_seed(0)
    config = tiny_config(module)
    model = module.LanguageModel(config, V)
    x, y = torch.randint(V, (2, 16, config.block_size))
    F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_loss_at_initialisation_is_that_of_knowing_nothing(rung):
    module = importlib.import_module(rung)
    torch.manual_seed(0)
    config = tiny_config(module)
    if hasattr(config, "init_std"):
        config.init_std = 0.02  # the wider the weights, the further the first logits are from equal
    model = module.LanguageModel(config, V)
    x, y = torch.randint(V, (2, 32, config.block_size))
    loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten()).item()
    assert loss == pytest.approx(math.log(V), abs=1e-5 if rung == "v0_bigram" else 0.05)


@pytest.mark.parametrize("rung", RUNGS[1:] + VARIANTS, indirect=True)
def test_learns_one_batch_by_heart(rung):
    module = importlib.import_module(rung)
    torch.manual_seed(0)
    config = tiny_config(module, n_embd=32, learning_rate=0.01)
    model = module.LanguageModel(config, V)
    several = getattr(module, "make_optimizers", None)  # from v6 on
    optimizers = several(model, config).values() if several else [module.make_optimizer(model, config)]
    x, y = torch.randint(V, (2, 4, config.block_size))
    x[:, 0] = torch.arange(4)  # rows that start alike could not be told apart
    for _ in range(300):
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        model.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    assert loss.item() < 0.05


def test_batches_are_windows_of_the_text_and_their_successors(module):
    config = tiny_config(module)
    ids = torch.arange(100)
    x, y = module.get_batch(ids, config)
    assert x.shape == y.shape == (config.batch_size, config.block_size)
    assert torch.equal(y, x + 1) and torch.equal(x, x[:, :1] + torch.arange(config.block_size))
    starts = torch.cat([module.get_batch(ids, config)[0][:, 0] for _ in range(500)])
    assert starts.unique().tolist() == list(range(100 - config.block_size))  # each start that fits, no other


@pytest.mark.parametrize("length", [2, 8, 9, 10, 77])
def test_evaluation_counts_every_token_once(module, length):
    model, config = make_model(module)
    ids = torch.randint(V, (length,))
    losses = []
    with torch.inference_mode():
        for start in range(0, length - 1, config.block_size):
            x = ids[start : start + config.block_size][: length - 1 - start]
            logits = model(x[None])[0].double()
            for t in range(len(x)):
                losses.append(-logits[t].log_softmax(-1)[ids[start + t + 1]].item())
    assert len(losses) == length - 1
    assert module.evaluate(model, ids, config) == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert model.training  # evaluate leaves the model ready to go on


@pytest.mark.parametrize("rung", RUNGS[1:] + VARIANTS, indirect=True)
def test_estimate_is_a_fixed_subset(rung):
    module = importlib.import_module(rung)
    model, config = make_model(module)
    ids = torch.randint(V, (4001,))
    estimates = {module.evaluate(model, ids, config, 1000) for _ in range(3)}
    kept = torch.cat([ids[i : i + 9] for i in range(0, 4000, 32)]).view(-1, 9)
    with torch.inference_mode():
        exact = F.cross_entropy(model(kept[:, :-1]).flatten(0, 1), kept[:, 1:].flatten()).item()
    assert len(estimates) == 1 and estimates.pop() == pytest.approx(exact, rel=1e-5)


def test_same_seed_same_numbers(module, folder, monkeypatch):
    a = run_main(module, folder, monkeypatch, "a")
    b = run_main(module, folder, monkeypatch, "b")
    c = run_main(module, folder, monkeypatch, "c", "--seed=1")
    a["config"]["out_dir"] = b["config"]["out_dir"]
    assert_same(a, b)
    assert any(not torch.equal(a["model"][name], c["model"][name]) for name in a["model"])
    assert (folder / "a/sample.txt").read_bytes() == (folder / "b/sample.txt").read_bytes()


@pytest.mark.parametrize("rung", RUNGS[1:] + VARIANTS, indirect=True)
@pytest.mark.parametrize("stop_at", [5, 6, 8])  # the first estimate is after step 5
def test_resumed_run_equals_uninterrupted_run(rung, stop_at, folder, monkeypatch):
    module = importlib.import_module(rung)
    dropout = ["--dropout=0.2"] if hasattr(module.Config, "dropout") else []
    whole = run_main(module, folder, monkeypatch, "whole", *dropout)

    calls, get_batch = [], module.get_batch

    def get_batch_and_press_ctrl_c(*args):
        calls.append(1)
        if len(calls) == stop_at:
            signal.raise_signal(signal.SIGINT)
        return get_batch(*args)

    monkeypatch.setattr(module, "get_batch", get_batch_and_press_ctrl_c)
    with pytest.raises(SystemExit, match=f"step {stop_at} and saved.*--resume"):
        run_main(module, folder, monkeypatch, "parts", *dropout)
    parts = training_folder(rung, folder / "parts") / "checkpoint.pt"
    assert torch.load(parts, weights_only=True)["step"] == stop_at
    monkeypatch.setattr(sys, "argv", [rung, "--out_dir=parts", "--resume"])
    module.main()
    assert_same(whole, torch.load(parts, weights_only=True))
    metrics = [json.loads((folder / out / "metrics.json").read_text()) for out in ("whole", "parts")]
    assert metrics[0]["val_loss"] == metrics[1]["val_loss"] and metrics[1]["steps"] == 12


@pytest.mark.parametrize("rung", RUNGS[1:] + VARIANTS, indirect=True)
def test_checkpoint_keeps_the_weights_of_the_best_estimate(rung, folder, monkeypatch):
    module = importlib.import_module(rung)
    losses = iter([3.0, 3.0, 2.0, 2.0, 2.5, 2.5])  # train and val at steps 5, 10 and 12
    seen = {}
    real_evaluate = module.evaluate

    def evaluate(model, ids, config, max_tokens=None):
        if max_tokens is None:
            return real_evaluate(model, ids, config)
        loss = next(losses)
        seen[loss] = {name: p.clone() for name, p in model.state_dict().items()}
        return loss

    monkeypatch.setattr(module, "evaluate", evaluate)
    checkpoint = run_main(module, folder, monkeypatch, "best")
    assert_same(dict(checkpoint["model"]), seen[2.0])
    assert_same(dict(checkpoint["last"]), seen[2.5])
    assert [point["val_loss"] for point in checkpoint["history"]] == [3.0, 2.0, 2.5]


@pytest.mark.parametrize("rung", RUNGS[1:] + VARIANTS, indirect=True)
def test_learning_rate_warms_up_and_decays(rung):
    module = importlib.import_module(rung)
    config = tiny_config(module, learning_rate=1.0, warmup_steps=10, max_steps=110)
    rates = [module.learning_rate_at(step, config) for step in range(1, 111)]
    assert rates[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    floor = config.lr_floor
    assert rates[59] == pytest.approx((1 + floor) / 2) and rates[109] == pytest.approx(floor)
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_greedy_is_the_likeliest_and_sampling_follows_the_probabilities(module):
    model, config = make_model(module, max_new_tokens=1)
    idx = torch.randint(V, (1, 5))
    with torch.inference_mode():
        probs = model(idx)[0, -1].softmax(-1)
    assert module.generate(model, idx, replace(config, greedy=True))[0, -1] == probs.argmax()
    torch.manual_seed(0)
    n = 2_000 if hasattr(module, "Engine") else 20_000  # whose rows each draw for themselves
    draws = module.generate(model, idx.expand(n, -1), config)[:, -1]
    shares = draws.bincount(minlength=V) / len(draws)
    assert (shares - probs).abs().max() < 5 * (0.25 / len(draws)) ** 0.5


def test_generation_looks_at_the_last_block_only_and_keeps_the_prompt(module):
    model, config = make_model(module, max_new_tokens=6, greedy=True)
    long = torch.randint(V, (2, 3 * config.block_size))
    a = module.generate(model, long, config)
    b = module.generate(model, long[:, -config.block_size :], config)
    assert a.shape == (2, 3 * config.block_size + 6) and torch.equal(a[:, : long.shape[1]], long)
    assert torch.equal(a[:, -6:], b[:, -6:])


def test_tokenizer_round_trip(module):
    text = (ROOT / "input.txt").read_text(encoding="utf-8")
    tokenizer = module.CharTokenizer("".join(sorted(set(text))))
    assert len(tokenizer.vocab) == V
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("\n !") == [0, 1, 2]
