"""v9: the formulas of alignment against independent ones, replies, pairs, judges, the command line."""

import inspect
import json
import math
import random
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from copy import deepcopy
from dataclasses import fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import matplotlib.figure
import matplotlib.image
import pytest
import torch
import torch.nn as nn
from conftest import ROOT, run_here
from test_command_line import METRICS, flag, refused
from test_rungs import assert_same

import v9_rlhf as v9
from bpe_tokenizer import BPETokenizer

RUNG, BASE = "v9_rlhf", "runs/v8_lora"
END = v9.SPECIAL_TOKENS[0]
CHARS = v9.CharTokenizer([*"abcdefgh ", *v9.SPECIAL_TOKENS])  # a 0, b 1 ... space 8, then <|endoftext|> 9
V, STOP = len(CHARS.vocab), CHARS.special_tokens[END]
LEARNING = ["ppo", "grpo", "dpo"]


def make_model(seed=1, vocab_size=V, **changes):
    """A base with weights large enough that every part of it matters; a Config."""
    torch.manual_seed(seed)
    settings = dict(n_embd=16, n_head=2, n_layer=2, block_size=24, max_new_tokens=6, batch_size=8)
    settings |= dict(group_size=4, n_minibatches=2, warmup_steps=1, max_steps=3, eval_interval=10)
    config = v9.Config(**settings | {"vocab_size": vocab_size} | changes)
    base = v9.LanguageModel(config, vocab_size)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.6 if name.startswith("blocks") else 0.3)
            else:  # near 1 and 0: with tied embeddings, large ones say the same token for ever
                parameter += 0.1 * torch.randn_like(parameter)
    return base.eval().requires_grad_(False), config


def make_policy(base, config):
    """What main makes of a base: what learns and what it is compared with."""
    policy = v9.WithHead(v9.copy.deepcopy(base).requires_grad_(True)).eval()
    if config.lora_rank:
        base = v9.adapt(policy.model, config)
    return policy, base


def shake(model, seed=3):
    """Give all that learns other numbers."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)


def prompts_of(*texts):
    """Prompts that are plain ids."""
    return [v9.Prompt(CHARS.encode(text), text, "") for text in texts]


def random_mask(B, T):
    """(B, T) with a run of ones in each row, of any length and place."""
    mask = torch.zeros(B, T)
    for row in mask:
        start = torch.randint(T, ()).item()
        row[start : start + 1 + torch.randint(T - start, ()).item()] = 1
    return mask


# ------------------------------------------- the formulas -------------------------------------------


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 0.95, 1.0])
def test_advantages_are_sums_of_surprises(gae_lambda):
    torch.manual_seed(0)
    mask = random_mask(40, 9)
    rewards, values = torch.randn(2, 40, 9).double()
    found = v9.advantages(rewards, values, mask, gae_lambda)
    for row in range(40):
        reply = mask[row].nonzero().flatten().tolist()
        v = {t: values[row, t].item() for t in reply}
        r = {t: rewards[row, t].item() for t in reply}
        surprise = {t: r[t] + v.get(t + 1, 0.0) - v[t] for t in reply}
        for t in range(9):
            expected = sum(gae_lambda ** (s - t) * surprise[s] for s in reply if s >= t) if t in v else 0.0
            if gae_lambda == 1.0 and t in v:  # all that is still to come, less what was expected
                assert expected == pytest.approx(sum(r[s] for s in reply if s >= t) - v[t])
            assert found[row, t].item() == pytest.approx(expected, abs=1e-9)


def test_whitened_numbers_have_mean_0_and_standard_deviation_1_in_the_replies():
    torch.manual_seed(0)
    mask, x = random_mask(6, 9), 5 + 3 * torch.randn(6, 9)
    white = v9.whiten(x, mask)
    inside = white[mask == 1]
    assert inside.mean().item() == pytest.approx(0, abs=1e-5)
    assert inside.std(unbiased=False).item() == pytest.approx(1, abs=1e-5)
    assert not white[mask == 0].any() and (mask == 0).any()
    other = torch.where(mask == 1, x, 1e3 * torch.randn(6, 9))
    torch.testing.assert_close(v9.whiten(other, mask), white)
    order = x[mask == 1].argsort()
    assert torch.equal(order, inside.argsort())


CLIPPED = [  # ratio, advantage, objective, derivative with respect to the log-probability; clip_range 0.2
    (1.5, 2.0, 1.2 * 2, 0.0),
    (1.5, -2.0, 1.5 * -2, 1.5 * -2),
    (0.5, -2.0, 0.8 * -2, 0.0),
    (0.5, 2.0, 0.5 * 2, 0.5 * 2),
    (1.1, 2.0, 1.1 * 2, 1.1 * 2),
    (0.9, -2.0, 0.9 * -2, 0.9 * -2),
]


@pytest.mark.parametrize("case", [*CLIPPED, None])
def test_clipped_loss_by_hand(case):
    cases = [case] if case else CLIPPED
    ratio, advantage, objective, slope = (torch.tensor(column) for column in zip(*cases, strict=True))
    n, old = len(cases), torch.linspace(-3, -1, len(cases) + 1)
    # beside them a place outside the replies, which counts nowhere
    new = (old + torch.cat([ratio, torch.tensor([7.0])]).log())[None].requires_grad_()
    advantage = torch.cat([advantage, torch.tensor([9.0])])[None]
    mask = torch.tensor([[1.0] * n + [0.0]])
    loss, share = v9.clipped_loss(new, old[None], advantage, mask, 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(-objective.mean().item(), rel=1e-5)
    torch.testing.assert_close(new.grad[0], torch.cat([-slope / n, torch.zeros(1)]), atol=1e-5, rtol=0)
    outside = sum(abs(r - 1) > 0.2 for r, *_ in cases)
    assert share.item() == pytest.approx(outside / n)


VALUES = [  # new, old, return; squared error, its derivative; clip_range 0.2
    (0.1, 0.0, 1.0, 0.81, -1.8),  # inside
    (0.5, 0.0, 1.0, 0.64, 0.0),  # too far towards the return: counts as 0.2
    (-0.5, 0.0, 1.0, 2.25, -3.0),  # too far away from it
    (1.9, 1.0, 1.1, 0.64, 1.6),  # past it
    (0.5, 1.0, 0.0, 0.64, 0.0),  # too far towards it, downwards: counts as 0.8
]


@pytest.mark.parametrize("case", [*VALUES, None])
def test_value_loss_by_hand(case):
    cases = [case] if case else VALUES
    new, old, returns, error, slope = (torch.tensor([*column, 5.0]) for column in zip(*cases, strict=True))
    n, new = len(cases), new[None].clone().requires_grad_()
    mask = torch.tensor([[1.0] * n + [0.0]])
    loss = v9.value_loss(new, old[None], returns[None] - 3 * (1 - mask), mask, 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * error[:n].mean().item(), rel=1e-5)
    expected = torch.cat([0.5 * slope[:n] / n, torch.zeros(1)])
    torch.testing.assert_close(new.grad[0], expected, atol=1e-5, rtol=0)


def all_replies(end, length, vocab_size):
    """Every reply that can be drawn: up to the id `end`, or cut at `length`."""
    for n in range(1, length + 1):
        for ids in product(range(vocab_size), repeat=n):
            if end not in ids[:-1] and (ids[-1] == end or n == length):
                yield list(ids)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_exact_kl_is_that_of_the_distributions_over_replies(temperature):
    base, config = make_model(vocab_size=4, max_new_tokens=3, temperature=temperature)
    policy, _ = make_model(seed=2, vocab_size=4)
    prompt, end = [1, 2], 3
    replies = list(all_replies(end, 3, 4))
    assert len(replies) == 1 + 3 + 9 * 4
    x, y = v9.encode_replies([prompt] * len(replies), replies)
    logs = []  # of the probability of each reply, token by token from whole passes
    for model in (policy, base):
        logs.append([])
        for reply in replies:
            total = 0.0
            for n, i in enumerate(reply):
                logits = model(torch.tensor([prompt + reply[:n]]))[0, -1].double() / temperature
                total += (logits - logits.logsumexp(0))[i].item()
            logs[-1].append(total)
    p, q = torch.tensor(logs)
    assert p.exp().sum().item() == pytest.approx(1, abs=1e-5)
    exact = (p.exp() * (p - q)).sum().item()
    per_token = v9.exact_kl(policy(x), base(x), y, temperature)
    assert (p.exp() * per_token).sum().item() == pytest.approx(exact, rel=1e-4) and exact > 0.1
    for model, log in ((policy, p), (base, q)):
        torch.testing.assert_close(v9.log_probs(model(x), y, temperature).sum(dim=1), log, atol=1e-4, rtol=0)

    torch.manual_seed(0)  # and of replies that are drawn, the mean difference of log-probabilities
    drawn = v9.generate(policy, [prompt] * 3000, config, end)
    at = [replies.index(reply) for reply in drawn]
    estimates = (p - q)[at]
    assert abs(estimates.mean().item() - exact) < 4 * estimates.std().item() / len(drawn) ** 0.5
    assert abs(per_token[at].mean().item() - exact) < 4 * per_token[at].std().item() / len(drawn) ** 0.5


def test_kl_of_a_model_from_itself_is_nothing():
    base, _ = make_model()
    idx = torch.randint(V, (3, 7))
    assert not v9.exact_kl(base(idx), base(idx), idx, 1.0).any()


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_dpo_loss_is_the_closed_form(beta):
    margin = torch.tensor([-3.0, -0.5, 0.0, 2.0]).requires_grad_()
    loss = v9.dpo_loss(margin, beta)
    loss.backward()
    numbers = margin.tolist()
    assert loss.item() == pytest.approx(sum(math.log(1 + math.exp(-beta * m)) for m in numbers) / 4, rel=1e-5)
    slopes = [-beta / (1 + math.exp(beta * m)) / 4 for m in numbers]
    torch.testing.assert_close(margin.grad, torch.tensor(slopes), atol=1e-6, rtol=0)


def log_prob_of(model, prompt, reply):
    """ln of the probability of a reply, from one whole pass a token."""
    total = 0.0
    for n, i in enumerate(reply):
        total = total + model(torch.tensor([prompt + reply[:n]]))[0, -1].double().log_softmax(-1)[i]
    return total


PAIRS = [([1, 2], [3, 4, STOP], [5, STOP]), ([6], [7, STOP], [1, 1, 1, STOP]), ([2, 2, 2], [0, 0], [8, STOP])]


def batch_of(pairs):
    """Pairs of ids as the batch that reward_loss and preference_loss take."""
    prompts, *sides = zip(*pairs, strict=True)
    return [v9.encode_replies(prompts, side) for side in sides]


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_preference_loss_by_hand(lora_rank):
    plain, config = make_model(lora_rank=lora_rank, dpo_beta=0.3)
    policy, base = make_policy(plain, config)
    shake(policy)
    loss, shown = v9.preference_loss(policy, batch_of(PAIRS), base, config)
    margins = []
    for prompt, chosen, rejected in PAIRS:
        gains = [
            log_prob_of(policy.model, prompt, reply) - log_prob_of(plain, prompt, reply)
            for reply in (chosen, rejected)
        ]
        margins.append(gains[0] - gains[1])
    expected = sum(torch.log1p(torch.exp(-0.3 * margin)) for margin in margins) / 3
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and abs(loss.item() - math.log(2)) > 1e-3
    assert shown["accuracy"].item() == pytest.approx(sum(m.item() > 0 for m in margins) / 3)
    learning = [p for p in policy.model.parameters() if p.requires_grad]
    found, wanted = (torch.autograd.grad(x, learning) for x in (loss, expected))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_preference_loss_and_its_gradient_are_those_of_trl(tmp_path):
    trl = pytest.importorskip("trl", reason="TRL needs Python 3.11")
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate("abcdefghi")}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="a", pad_token="a", unk_token="a")
    torch.manual_seed(0)
    sizes = dict(vocab_size=STOP + 1, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    base = deepcopy(model)
    shake(model)
    some = Dataset.from_list(
        [{"prompt": "b c", "chosen": " d", "rejected": " e"}]
    )  # a trainer needs some text
    settings = dict(beta=0.3, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none")
    settings = trl.DPOConfig(output_dir=str(tmp_path), **settings)
    trainer = trl.DPOTrainer(model, base, settings, train_dataset=some, processing_class=words)
    named = [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), pair, strict=True)) for pair in PAIRS]
    expected = trainer.compute_loss(trainer.model, DataCollatorForPreference(pad_token_id=0)(named))
    wanted = torch.autograd.grad(expected, [*model.parameters()])
    policy = SimpleNamespace(model=lambda x: model(x).logits)
    config = v9.Config(method="dpo", dpo_beta=0.3)
    loss, _ = v9.preference_loss(policy, batch_of(PAIRS), lambda x: base(x).logits, config)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6) and abs(loss.item() - math.log(2)) > 1e-3
    for a, b in zip(torch.autograd.grad(loss, [*model.parameters()]), wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


# ------------------------------------------ the reward model ------------------------------------------


def test_reward_loss_is_the_closed_form():
    class Fixed:
        def reward(self, x, y):
            return x

    sides = torch.tensor([1.0, 0.0, -2.0, 5.0]), torch.tensor([0.0, 0.5, -4.0, 5.0])
    loss, shown = v9.reward_loss(Fixed(), [(side, None) for side in sides])
    expected = [
        -math.log(1 / (1 + math.exp(r - c))) for c, r in zip(*map(torch.Tensor.tolist, sides), strict=True)
    ]
    assert loss.item() == pytest.approx(sum(expected) / 4, rel=1e-5)
    assert shown["accuracy"].item() == 0.5  # a tie is not won


def test_a_reward_is_the_mean_over_the_reply_alone():
    class Given(nn.Module):
        def forward(self, states):
            return self.numbers[..., None]

    base, _ = make_model()
    judge = v9.WithHead(base)
    judge.head = Given()
    x, y = v9.encode_replies([[1, 2, 3], [4]], [[5, STOP], [6, 7, STOP]])
    assert x.shape == (2, 4)
    # ids of the first row: 1 2 3 5 STOP, of the second: 4 6 7 STOP and one that fills it up
    judge.head.numbers = torch.tensor([[9.0, 9.0, 9.0, 1.0, 2.0], [9.0, 3.0, 4.0, 8.0, 9.0]])
    assert judge.reward(x, y).tolist() == [1.5, 5.0]
    judge.head.numbers[0, :3] = judge.head.numbers[1, 0] = judge.head.numbers[1, 4] = -50
    assert judge.reward(x, y).tolist() == [1.5, 5.0]
    judge.head.numbers[0, 3] += 4
    assert judge.reward(x, y).tolist() == [3.5, 5.0]


def test_a_reward_sees_the_whole_reply_and_nothing_else():
    base, _ = make_model()
    judge = v9.WithHead(base)
    nn.init.normal_(judge.head.weight)
    replies = [[5, 6], [5, STOP], [5, STOP, 7]]  # the last id counts too, and so does where it ends
    rewards = [judge.reward(*v9.encode_replies([[1, 2, 3]], [reply])).item() for reply in replies]
    assert len({round(reward, 4) for reward in rewards}) == 3
    with torch.no_grad():
        states = base.hidden_states(torch.tensor([[1, 2, 3, 5, STOP]]))
        expected = judge.head(states)[0, 3:, 0].mean().item()
    assert rewards[1] == pytest.approx(expected, abs=1e-6)


def test_padding_changes_no_reward_and_no_log_probability():
    base, _ = make_model()
    judge = v9.WithHead(base)
    shake(judge.head.requires_grad_(True))
    prompts, replies = [[1, 2, 3], [4], [5, 5]], [[5, STOP], [6, 7, 1, 1, 1, STOP], [0]]
    x, y = v9.encode_replies(prompts, replies)
    together = judge.reward(x, y), v9.log_probs(base(x), y, 0.8).sum(dim=1)
    for i in range(3):
        x, y = v9.encode_replies(prompts[i : i + 1], replies[i : i + 1])
        assert x[0].tolist() == (prompts[i] + replies[i])[:-1]
        assert y[0].tolist() == [-100] * (len(prompts[i]) - 1) + replies[i]
        alone = judge.reward(x, y), v9.log_probs(base(x), y, 0.8).sum(dim=1)
        for a, b in zip(together, alone, strict=True):
            assert a[i].item() == pytest.approx(b.item(), abs=1e-5)
    assert together[0].std() > 1e-3


def test_values_do_not_move_the_states_below_them():
    base, _ = make_model()
    policy = v9.WithHead(base.requires_grad_(True))
    shake(policy.head)
    _, values = policy(torch.randint(V, (2, 5)))
    values.sum().backward()
    assert policy.head.weight.grad.any() and all(p.grad is None for p in policy.model.parameters())


def test_a_reward_model_learns_pairs_that_can_be_told_apart(tmp_path):
    base, config = make_model(max_steps=40, learning_rate=0.01, out_dir=str(tmp_path))
    rng = random.Random(0)

    def pair():
        """The better reply has an a in it, the other a b."""
        rest = [rng.choice([2, 3, 4, 5]) for _ in range(4)]
        place = rng.randrange(5)
        return [rng.randrange(2, 8)], *([*rest[:place], i, *rest[place:], STOP] for i in (0, 1))

    pairs, test = [pair() for _ in range(100)], [pair() for _ in range(50)]
    judge = v9.WithHead(v9.copy.deepcopy(base).requires_grad_(True))
    first = v9.reward_loss(judge, batch_of(test))
    assert first[0].item() == pytest.approx(math.log(2)) and first[1]["accuracy"] == 0  # the head is zero
    loss = partial(v9.reward_loss, judge)
    v9.train(judge, partial(v9.get_batch, pairs, 16, 1), loss, config, new_run())
    loss, shown = v9.reward_loss(judge.eval(), batch_of(test))
    assert shown["accuracy"].item() == 1 and loss.item() < 0.2


def new_run():
    """What main gives to train for a run that begins."""
    return {"version": RUNG, "step": 0, "seconds": 0.0, "tokens": 0, "history": []}


def test_scores_are_in_standard_deviations_from_the_mean():
    base, _ = make_model()
    judge = v9.WithHead(base)
    shake(judge.head.requires_grad_(True))
    judge.mean, judge.std = torch.tensor(3.0), torch.tensor(0.5)
    prompts, replies = prompts_of("ab", "c") * 100, [[1, STOP], [2, 3, STOP]] * 100
    scores = v9.score(judge, prompts, replies)  # more than fit one pass
    x, y = v9.encode_replies([[0, 1], [2]], replies[:2])
    torch.testing.assert_close(scores, ((judge.reward(x, y) - 3) / 0.5).repeat(100), atol=1e-5, rtol=0)


# -------------------------------------- the annotator and the pairs --------------------------------------

ANNOTATED = [
    ("good friend", 2 / 8),
    ("Good FRIEND!", 2 / 8),
    ("the king", 0.0),
    ("", 0.0),
    ("death", -1 / 8),
    ("good death", 0.0),
    ("good good good", (1 + 1 / 2 + 1 / 3) / 8),
    ("death death", (-1 - 1 / 2) / 8),
    ("good friend, good friend, good friend", 2 * (1 + 1 / 2 + 1 / 3) / 8),
    ("a b c d e f g good h i", 1 / 10),
    ("goodly friends' lovers", 0.0),  # whole words
]


@pytest.mark.parametrize(("reply", "expected"), ANNOTATED)
def test_the_annotator_by_hand(reply, expected):
    assert v9.annotate(reply) == pytest.approx(expected)


def test_to_say_the_same_again_and_again_is_worth_less_a_word():
    once, thrice = "good friend", "good friend, good friend, good friend"
    fresh = "good friend, sweet love, gentle peace"
    assert v9.annotate(once) < v9.annotate(thrice) < v9.annotate(fresh)
    assert v9.annotate(thrice) < 3 * v9.annotate(once) == pytest.approx(v9.annotate(fresh))
    assert v9.annotate(" ".join([once] * 20)) < v9.annotate(once)


def test_the_annotator_knows_enough_words_and_none_twice():
    assert len(set(v9.KIND)) == len(v9.KIND) >= 30 and len(set(v9.CRUEL)) == len(v9.CRUEL) >= 30
    assert not {*v9.KIND} & {*v9.CRUEL}
    assert all(re.fullmatch("[a-z]+", word) for word in v9.KIND + v9.CRUEL)


WORDS = BPETokenizer.train("good love death the king my lord hate " * 3, 280, v9.SPECIAL_TOKENS)
SAID = ["good", "good love", "death", "the king", "my lord", "hate my lord", "good death", ""]


def judged(monkeypatch, noise, n=400, **changes):
    """Pairs of judge_pairs, where a model says one thing or another of SAID."""
    said = [[*WORDS.encode(text), v9.end_of(WORDS)] for text in SAID]

    def sample_replies(model, prompts, n, tokenizer, config):
        return [said[i] for i in torch.randint(len(said), (n * len(prompts),)).tolist()]

    monkeypatch.setattr(v9, "sample_replies", sample_replies)
    prompts = [v9.Prompt([], f"prompt {i}", "") for i in range(n)]
    return v9.judge_pairs(None, prompts, noise, WORDS, v9.Config(**changes))


def test_pairs_are_the_annotators_opinion(monkeypatch):
    right = judged(monkeypatch, 0.0)
    value = {"good": 1, "good love": 2, "death": -1, "hate my lord": -1, "good death": 0}  # eighths
    assert len(right) > 500
    assert all(value.get(chosen, 0) > value.get(rejected, 0) for _, chosen, rejected in right)  # and no ties
    assert all("" not in pair for pair in right)
    assert len(set(right)) == len(right)  # the same two replies to a prompt are judged once
    wrong = judged(monkeypatch, 1.0)
    assert wrong == [(prompt, b, a) for prompt, a, b in right]
    some = judged(monkeypatch, 0.1, n=2000)
    clean = judged(monkeypatch, 0.0, n=2000)
    share = sum(a != b for a, b in zip(some, clean, strict=True)) / len(some)
    assert {*map(frozenset, some)} == {*map(frozenset, clean)}
    assert abs(share - 0.1) < 4 * (0.09 / len(some)) ** 0.5
    # of four replies that all differ in worth all six pairs are judged
    counts = Counter(prompt for prompt, *_ in clean)
    assert (
        max(counts.values()) == 6
        and max(Counter(p for p, *_ in judged(monkeypatch, 0.0, n_replies=2)).values()) == 1
    )


def test_same_seed_same_pairs(monkeypatch):
    assert judged(monkeypatch, 0.1) == judged(monkeypatch, 0.1)
    assert judged(monkeypatch, 0.1) != judged(monkeypatch, 0.1, seed=2)


def test_pairs_of_texts_become_ids():
    _, config = make_model(block_size=8)
    special = CHARS.special_tokens
    pairs = [
        ("abc", "h" * 9, "b"),
        ("ab", "cd", "e"),
        ("a", "b", "c"),
        ("a", "b" * 4, "c"),
        ("a", "c", "b" * 5),
    ]
    found = v9.encode_pairs(pairs, CHARS, config)
    a = [special["<|user|>"], 0, special["<|assistant|>"]]
    ab = [special["<|user|>"], 0, 1, special["<|assistant|>"]]
    # 3 + 5 ids fill the window, 3 + 6 do not fit
    assert found == [
        (a, [1, STOP], [2, STOP]),
        (ab, [2, 3, STOP], [4, STOP]),
        (a, [1] * 4 + [STOP], [2, STOP]),
    ]
    [((x, y), (x2, y2))], shown = v9.get_batch(found[1:2], 4, 1)
    assert shown == {"length": 5}  # of both replies, with their ends
    assert x.tolist() == [[*ab, 2, 3]] and y.tolist() == [[-100] * 3 + [2, 3, STOP]]
    assert x2.tolist() == [[*ab, 4]] and y2.tolist() == [[-100] * 3 + [4, STOP]]


def test_batches_of_pairs_are_neighbours_and_reach_all():
    pairs = [([i % 8], [i % 7, STOP], [i % 5, STOP]) for i in range(6)]
    seen = set()
    torch.manual_seed(0)
    batches, shown = v9.get_batch(pairs, 80, 40)
    assert len(batches) == 40 and shown == {"length": 4}
    for (x, y), _ in batches:
        first = x[:, 0].tolist()
        assert first[1] == first[0] + 1 and y[0, 0].item() == first[0] % 7
        seen.add(first[0])
    assert seen == {0, 1, 2, 3, 4}


# ---------------------------------------------- replies ----------------------------------------------


def one_at_a_time(model, ids, config, stop):
    """Go on with `ids`, greedily and with no cache: each token after a pass over all that is before it."""
    ids, new = ids[-(config.block_size - config.max_new_tokens) :], []
    while len(new) < config.max_new_tokens and stop not in new:
        new.append(model(torch.tensor([ids + new]))[0, -1].argmax().item())
    return new


@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("position", ["rope", "learned"])
def test_many_prompts_are_answered_as_each_would_be_alone(position, lora_rank, monkeypatch):
    plain, config = make_model(position=position, greedy=True, max_new_tokens=12, lora_rank=lora_rank)
    policy, _ = make_policy(plain, config)
    shake(policy)
    model = policy.model
    rng = random.Random(0)
    lengths = [1, 3, 2, 12, 5, 20, 1, 7, 7, 4]  # 20 are more than 24 - 12
    prompts = [[rng.randrange(V) for _ in range(n)] for n in lengths]
    endless = [one_at_a_time(model, ids, config, None) for ids in prompts]
    stop = Counter(i for ids in endless for i in {*ids[1:9]} - {ids[0]}).most_common(1)[0][0]
    expected = [one_at_a_time(model, ids, config, stop) for ids in prompts]
    assert len({len(ids) for ids in expected}) > 2 and len(expected[0]) != len(expected[-1])
    kept, keep = [], v9.KVCache.keep
    monkeypatch.setattr(v9.KVCache, "keep", lambda cache, rows: kept.append(rows) or keep(cache, rows))
    assert v9.generate(model, prompts, config, stop) == expected
    assert kept  # some have ended before the others, and these have closed ranks
    assert v9.generate(model, prompts[:1], config, stop) == expected[:1]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_probabilities_of_drawing_are_those_of_learning(temperature, monkeypatch):
    """What the cache gave when a token was drawn is what one pass over the whole reply gives."""
    base, config = make_model(max_new_tokens=12, temperature=temperature)
    torch.manual_seed(0)
    prompts = [[i % V] * (1 + i % 7) for i in range(16)]
    rows, found = list(range(16)), [[] for _ in range(16)]
    sample_next, keep = v9.sample_next, v9.KVCache.keep

    def keep_and_note(cache, going):
        rows[:] = [row for row, is_going in zip(rows, going.tolist(), strict=True) if is_going]
        keep(cache, going)

    def sample_and_note(logits, config):
        drawn = sample_next(logits, config)
        logs = (logits / temperature).log_softmax(-1).gather(1, drawn)[:, 0].tolist()
        for row, log in zip(rows, logs, strict=True):
            found[row].append(log)
        return drawn

    monkeypatch.setattr(v9, "sample_next", sample_and_note)
    monkeypatch.setattr(v9.KVCache, "keep", keep_and_note)
    replies = v9.generate(base, prompts, config, STOP)
    assert len(rows) < 16 and len({len(reply) for reply in replies}) > 2
    x, y = v9.encode_replies(prompts, replies)
    logs = v9.log_probs(base(x), y, temperature)
    for row, reply in enumerate(replies):
        expected = logs[row][y[row] != -100].tolist()
        assert found[row][: len(reply)] == pytest.approx(expected, abs=1e-5) and len(expected) == len(reply)
    assert not logs[y == -100].any()


def test_replies_follow_the_probabilities_at_a_temperature():
    base, config = make_model(max_new_tokens=1, temperature=0.7)
    with torch.inference_mode():
        probs = (base(torch.tensor([[3, 1, 4]]))[0, -1] / 0.7).softmax(-1)
    torch.manual_seed(0)
    draws = torch.tensor(v9.generate(base, [[3, 1, 4]] * 2000, config, STOP))[:, 0]
    shares = draws.bincount(minlength=V) / len(draws)
    assert (shares - probs).abs().max() < 5 * (0.25 / len(draws)) ** 0.5 and probs.max() < 0.9


def test_replies_to_learn_from_are_drawn_from_all_ids(monkeypatch):
    """Whatever --greedy, --top_k and --top_p say: log_probs knows nothing of them."""
    seen, generate = [], v9.generate
    monkeypatch.setattr(v9, "generate", lambda *args: seen.append(args) or generate(*args))
    base, config = make_model(top_k=1, top_p=0.1, temperature=0.7)
    prompts = prompts_of("ab", "c")
    replies = v9.sample_replies(base, prompts, 70, CHARS, config)
    assert [len(args[1]) for args in seen] == [128, 12]
    assert [ids for args in seen for ids in args[1]] == [[0, 1]] * 70 + [[2]] * 70
    for _, _, used, stop in seen:
        assert (used.greedy, used.top_k, used.top_p, used.temperature) == (
            False,
            0,
            1.0,
            0.7,
        ) and stop == STOP
    assert len(replies) == 140 and len({tuple(reply) for reply in replies[:70]}) > 10


# ---------------------------------------- learning from replies ----------------------------------------


def share_of_a(prompts, replies):
    """A reward: the share of the id 0 in a reply."""
    return torch.tensor([reply.count(0) / len(reply) for reply in replies])


def set_up(tmp_path, reward=share_of_a, prompts=("ab", "c", "ddd", "e f"), **changes):
    """A base, its policy and what train takes to let it learn."""
    plain, config = make_model(out_dir=str(tmp_path), **changes)
    policy, base = make_policy(plain, config)
    pairs = [(ids, [0, STOP], [1, 1, STOP]) for ids in ([2], [3], [4, 4])] * 4
    if config.method == "dpo":
        return (
            (plain, policy, base),
            partial(v9.get_batch, pairs, config.batch_size, 1),
            partial(v9.preference_loss, policy, base=base, config=config),
            config,
        )
    draw = v9.make_draw(policy, base, reward, reward, prompts_of(*prompts), CHARS, config)
    return (plain, policy, base), draw, partial(v9.policy_loss, policy, config=config), config


@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("method", LEARNING)
def test_the_reference_never_moves_and_what_learns_does(method, lora_rank, tmp_path):
    models, draw, loss, config = set_up(tmp_path, method=method, lora_rank=lora_rank, learning_rate=0.01)
    plain, policy, base = models
    before = {name: x.clone() for name, x in plain.state_dict().items()}
    start = {name: x.clone() for name, x in policy.named_parameters()}
    idx = torch.randint(V, (4, 9))
    with v9.without_adapters():
        assert torch.equal(base(idx), plain(idx))
    assert torch.equal(policy.model(idx), plain(idx))  # an adapter adds nothing at first
    v9.train(policy, draw, loss, config, new_run())
    assert_same(before, dict(plain.state_dict()))
    with v9.without_adapters():
        assert torch.equal(base(idx), plain(idx)) and base.training is False
    assert not torch.allclose(policy.model(idx), plain(idx), atol=1e-3)

    learned = v9.learned(policy)
    if lora_rank:
        assert base is policy.model and len(learned) == 2 * 4 * 2 + 2
        frozen = {name for name in start if ".layer." in name or "embedding" in name or "norm" in name}
        assert learned.keys() == start.keys() - frozen
    else:
        assert learned.keys() == start.keys()
    for name, x in policy.named_parameters():
        moves = name in learned and (not name.startswith("head") or method == "ppo")
        assert torch.equal(x, start[name]) != moves, name
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    merged = v9.LanguageModel(config, V).eval()
    merged.load_state_dict(saved["model"])
    torch.testing.assert_close(merged(idx), policy.model(idx), atol=1e-4, rtol=0)
    assert_same(saved["last"], learned)


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_rewards_grow(method, tmp_path):
    changes = dict(method=method, max_steps=12, batch_size=64, learning_rate=0.005, group_size=8)
    changes |= dict(kl_coef=0.05)
    _, draw, loss, config = set_up(tmp_path, **changes)
    run = new_run()
    v9.train(loss.args[0], draw, loss, config, run)
    scores = [point["score"] for point in run["history"]]
    assert sum(scores[-3:]) / 3 > sum(scores[:2]) / 2 + 0.2
    assert run["history"][0]["kl"] == pytest.approx(0, abs=1e-5) and run["history"][-1]["kl"] > 0.1
    assert run["tokens"] == sum(round(64 * point["length"]) for point in run["history"]) > 0


def test_dpo_leans_to_what_was_chosen(tmp_path):
    models, draw, loss, config = set_up(tmp_path, method="dpo", max_steps=12, learning_rate=0.005)
    run = new_run()
    v9.train(models[1], draw, loss, config, run)
    first, last = run["history"][0], run["history"][-1]
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-4) and last["accuracy"] == 1
    assert last["loss"] < 0.6


def drawn(draw, monkeypatch, step=1):
    """The first batch of a step and its numbers, its rows in the order in which they were drawn."""
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randperm", torch.arange)
        torch.manual_seed(step)
        batches, shown = draw()
    return batches[0], shown, batches


def test_ppo_pays_for_each_token_and_rewards_the_last(tmp_path, monkeypatch):
    changes = dict(n_minibatches=1, n_epochs=3, kl_coef=0.3, temperature=0.8, gae_lambda=1.0, method="ppo")
    (plain, policy, _), draw, _, _ = set_up(tmp_path, **changes)
    shake(policy)
    batch, shown, batches = drawn(draw, monkeypatch)
    assert len(batches) == 3 and (batch["returns"] != 0).any()
    kls, scores, lengths = [], [], []
    for row in range(8):
        x, y, mask = (batch[name][row] for name in ("x", "y", "mask"))
        places = mask.nonzero().flatten().tolist()
        assert places == (y != -100).nonzero().flatten().tolist() == list(range(places[0], places[-1] + 1))
        logs = []
        for model in (policy.model, plain):
            logits = model(x[None])[0].double() / 0.8
            logs.append([logits[t].log_softmax(-1)[y[t]].item() for t in places])
        assert batch["old"][row, places].tolist() == pytest.approx(logs[0], abs=1e-4)
        assert batch["reference"][row, places].tolist() == pytest.approx(logs[1], abs=1e-4)
        differences = [a - b for a, b in zip(*logs, strict=True)]
        reward = (y[places] == 0).sum().item() / len(places)
        expected = [reward - 0.3 * sum(differences[i:]) for i in range(len(places))]  # what is to come
        assert batch["returns"][row, places].tolist() == pytest.approx(expected, abs=1e-4)
        assert batch["values"][row].tolist() == pytest.approx(policy(x[None])[1][0].tolist(), abs=1e-5)
        kls.append(sum(differences)), scores.append(reward), lengths.append(len(places))
    inside = batch["mask"] == 1
    surprise = (batch["returns"] - batch["values"])[inside]
    expected = (surprise - surprise.mean()) / surprise.std(unbiased=False)
    torch.testing.assert_close(batch["advantage"][inside], expected, atol=1e-4, rtol=0)
    assert not batch["advantage"][~inside].any()
    found = [shown[name] for name in ("kl", "score", "truth", "length")]
    means = [sum(numbers) / 8 for numbers in (kls, scores, scores, lengths)]
    assert found == pytest.approx(means, abs=1e-4) and abs(means[0]) > 0.01


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_each_epoch_goes_over_all_replies_once(method, tmp_path):
    _, draw, _, _ = set_up(tmp_path, method=method, n_epochs=3, n_minibatches=4)
    torch.manual_seed(0)
    batches, _ = draw()
    assert len(batches) == 12 and all(len(batch["x"]) == 2 for batch in batches)
    epochs = [torch.cat([batch["old"] for batch in batches[i : i + 4]]) for i in (0, 4, 8)]
    rows = [epoch.sum(dim=1).tolist() for epoch in epochs]
    assert len(set(rows[0])) == 8 and rows[0] != rows[1] != rows[2]
    assert sorted(rows[0]) == sorted(rows[1]) == sorted(rows[2])


def test_grpo_compares_the_replies_to_one_prompt(tmp_path, monkeypatch):
    seen = []

    def reward(prompts, replies):
        seen.append([prompt.text for prompt in prompts])
        return share_of_a(prompts, replies)

    changes = dict(method="grpo", n_minibatches=1, batch_size=12, group_size=4)
    _, draw, _, _ = set_up(tmp_path, reward, **changes)
    batch, _, _ = drawn(draw, monkeypatch)
    assert all(len(set(texts[i : i + 4])) == 1 for texts in seen for i in (0, 4, 8))
    for i in (0, 4, 8):
        rewards, found = [], []
        for row in range(i, i + 4):
            inside = batch["mask"][row] == 1
            y, advantage = batch["y"][row][inside], batch["advantage"][row]
            assert len(set(advantage[inside].tolist())) == 1 and not advantage[~inside].any()
            rewards.append((y == 0).double().mean().item()), found.append(advantage[inside][0].item())
        mean = sum(rewards) / 4
        std = (sum((r - mean) ** 2 for r in rewards) / 3) ** 0.5
        assert sum(found) == pytest.approx(0, abs=1e-5)
        assert found == pytest.approx([(r - mean) / (std + 1e-4) for r in rewards], abs=1e-4)
    assert batch["advantage"].any()


@pytest.mark.parametrize("kl_coef", [0.0, 0.7])
def test_a_group_of_equal_rewards_gives_no_gradient_but_that_of_the_kl(kl_coef, tmp_path, monkeypatch):
    changes = dict(method="grpo", n_minibatches=1, kl_coef=kl_coef)
    models, draw, loss, _ = set_up(tmp_path, lambda _, replies: torch.full((len(replies),), 0.3), **changes)
    plain, policy, _ = models
    shake(policy)
    batch, _, _ = drawn(draw, monkeypatch)
    assert not batch["advantage"].any()
    value, shown = loss(batch)
    learning = list(policy.model.parameters())
    found = torch.autograd.grad(value, learning)
    assert shown["clipped"] == 0
    if not kl_coef:
        assert all(not gradient.any() for gradient in found)
        return
    inside = batch["mask"] == 1
    p, q = (  # of the tokens that were drawn
        model(batch["x"]).log_softmax(-1).gather(2, batch["y"].clamp(min=0)[..., None])[..., 0][inside]
        for model in (policy.model, plain)
    )
    expected = kl_coef * ((q - p).exp() - (q - p) - 1).mean()
    assert value.item() == pytest.approx(expected.item(), rel=1e-4) and expected > 1e-3
    for a, b in zip(found, torch.autograd.grad(expected, learning), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)


def test_ppo_adds_half_the_loss_of_the_values(tmp_path, monkeypatch):
    (_, policy, _), draw, loss, _ = set_up(tmp_path, n_minibatches=1, method="ppo")
    shake(policy)
    batch, _, _ = drawn(draw, monkeypatch)
    shake(policy, seed=2)
    new, values = v9.log_probs(policy(batch["x"])[0], batch["y"], 1.0), policy(batch["x"])[1]
    actor, clipped = v9.clipped_loss(new, batch["old"], batch["advantage"], batch["mask"], 0.2)
    critic = v9.value_loss(values, batch["values"], batch["returns"], batch["mask"], 0.2)
    value, shown = loss(batch)
    assert value.item() == pytest.approx(actor.item() + 0.5 * critic.item(), rel=1e-5)
    assert shown["clipped"] == clipped > 0 and critic > 1e-4


def test_an_answer_is_right_when_it_is_the_name_and_nothing_else():
    tokenizer = v9.CharTokenizer([*"EMORemo .", *v9.SPECIAL_TOKENS])
    prompt = v9.Prompt([], "", "ROMEO")
    answers = ["ROMEO", "ROME", "ROMEO.", " ROMEO", "romeo", "Romeo", ""]
    answers = [text for text in answers if {*text} <= {*"EMORemo ."}]
    end = [tokenizer.special_tokens[END]]
    replies = [tokenizer.encode(text) + end for text in answers if text] + [tokenizer.encode("ROMEO"), end]
    config = v9.Config(method="grpo", task="read")
    rewards = v9.true_reward([prompt] * len(replies), replies, tokenizer, config)
    assert rewards.tolist() == [float(text == "ROMEO") for text in answers if text] + [1.0, 0.0]
    kind = [WORDS.encode("good love"), [*WORDS.encode("death"), v9.end_of(WORDS)]]
    assert v9.true_reward([prompt] * 2, kind, WORDS, v9.Config()).tolist() == [0.25, -0.125]


class CountingJudge:
    """A reward model that likes the id 0."""

    mean, std = 1.0, 2.0

    def reward(self, x, y):
        return (y == 0).sum(dim=1).float()


def test_the_best_of_n_is_the_reply_with_the_largest_score(monkeypatch):
    plain, config = make_model(method="best_of_n", n_best=5)
    policy, base = make_policy(plain, config)
    held_out, replies, real = prompts_of(*"abcdefgh"), [], v9.sample_replies
    monkeypatch.setattr(v9, "sample_replies", lambda *a, **k: replies.append(real(*a, **k)) or replies[-1])
    args = policy, base, CountingJudge(), share_of_a, held_out, CHARS, config
    numbers, texts = v9.measure(*args)
    assert [len(part) for part in replies] == [8, 40]
    best = [max(replies[1][5 * i : 5 * i + 5], key=lambda ids: ids.count(0)) for i in range(8)]
    assert texts["policy"] == [v9.to_text(ids, CHARS) for ids in best]
    assert numbers["policy"]["score"] == pytest.approx(sum((ids.count(0) - 1) / 2 for ids in best) / 8)
    assert numbers["policy"]["kl"] == pytest.approx(math.log(5) - 4 / 5)
    assert numbers["policy"]["score"] > numbers["base"]["score"] and numbers["base"]["kl"] == 0


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_what_is_measured_of_the_policy_and_of_the_base(lora_rank, monkeypatch):
    plain, config = make_model(lora_rank=lora_rank, temperature=0.7)
    policy, base = make_policy(plain, config)
    shake(policy)
    held_out, replies, real = prompts_of(*"abcdefgh"), [], v9.sample_replies
    monkeypatch.setattr(v9, "sample_replies", lambda *a, **k: replies.append(real(*a, **k)) or replies[-1])
    numbers, texts = v9.measure(policy, base, CountingJudge(), share_of_a, held_out, CHARS, config)
    torch.manual_seed(config.seed)
    expected = v9.generate(plain, [prompt.ids for prompt in held_out], config, STOP)
    assert replies[0] == expected != replies[1]
    kl = 0.0
    for prompt, reply in zip(held_out, replies[1], strict=True):
        for n in range(len(reply)):
            idx = torch.tensor([prompt.ids + reply[:n]])
            p, q = ((model(idx)[0, -1].double() / 0.7).log_softmax(-1) for model in (policy.model, plain))
            kl += (p.exp() * (p - q)).sum().item()
    assert numbers["policy"]["kl"] == pytest.approx(kl / 8, rel=1e-3) and kl > 0.01
    worth = [share_of_a(held_out, part) for part in replies]
    assert [numbers[name]["truth"] for name in ("base", "policy")] == pytest.approx(
        [x.mean().item() for x in worth]
    )
    won = sum(
        1.0 if b > a else 0.5 if a == b else 0.0
        for a, b in zip(*map(torch.Tensor.tolist, worth), strict=True)
    )
    assert numbers["policy"]["preferred"] == won / 8 == 1 - numbers["base"]["preferred"]
    for name, part in zip(("base", "policy"), replies, strict=True):
        assert texts[name] == ["".join(CHARS.vocab[i] for i in ids if i != STOP) for ids in part]
        words = [word for text in texts[name] for word in re.split("[^a-z]+", text) if word]
        assert numbers[name]["length"] == len(words) / 8
        assert numbers[name]["distinct_words"] == len(set(words))


@pytest.mark.parametrize("position", ["rope", "learned"])
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_no_position_sees_the_future(lora_rank, position):
    base, config = make_model(position=position, lora_rank=lora_rank)
    policy, _ = make_policy(base, config)
    shake(policy)
    idx = torch.randint(V, (4, 12))
    with torch.inference_mode():
        before = policy(idx)
        for t in range(12):
            changed = idx.clone()
            changed[:, t:] = (changed[:, t:] + 1 + torch.randint(V - 1, changed[:, t:].shape)) % V
            after = policy(changed)
            for a, b in zip(before, after, strict=True):
                assert torch.equal(a[:, :t], b[:, :t])
            assert not torch.isclose(before[0][:, t], after[0][:, t]).all(dim=-1).any()


# --------------------------------------------- pairs in files ---------------------------------------------

GOOD_PAIR = {"prompt": "say a", "chosen": "good", "rejected": "death"}


def test_pairs_of_a_file_are_read(tmp_path):
    records = [GOOD_PAIR, GOOD_PAIR | {"prompt": "\u00e9\n\u2028x", "more": 5}]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\n", encoding="utf-8")
    assert v9.read_preferences(path) == [("say a", "good", "death"), ("\u00e9\n\u2028x", "good", "death")]


BAD_LINES = [
    ("{", "line 3 of", ""),
    ("[1, 2]", "line 3 of", ""),
    ("5", "line 3 of", ""),
    ('"prompt chosen rejected"', "line 3 of", ""),
    (json.dumps({"prompt": "a", "chosen": "b"}), "line 3 of", "rejected"),
    (json.dumps(GOOD_PAIR | {"chosen": 5}), "line 3 of", "text"),
    (json.dumps(GOOD_PAIR | {"rejected": ""}), "line 3 of", "text"),
    (json.dumps(GOOD_PAIR | {"prompt": None}), "line 3 of", "text"),
]


@pytest.mark.parametrize(("line", "where", "why"), BAD_LINES)
def test_a_bad_line_is_refused_by_its_number(line, where, why, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join([json.dumps(GOOD_PAIR), "", line, json.dumps(GOOD_PAIR)]), encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        v9.read_preferences(str(path))
    said = str(end.value)
    assert said.startswith("error: ") and where in said and str(path) in said and why in said
    assert "\n" not in said


@pytest.mark.parametrize("content", [None, b"", json.dumps(GOOD_PAIR).encode(), b"\xff\xfe\xfa"])
def test_files_of_pairs_that_cannot_be_used(content, tmp_path):
    path = tmp_path / "pairs.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as end:
        v9.read_preferences(str(path))
    said = str(end.value)
    assert said.startswith("error: ") and "--preferences" in said and str(path) in said and "\n" not in said


# ---------------------------------------- from the command line ----------------------------------------

V6 = "--n_embd=16 --n_head=2 --n_layer=1 --block_size=256 --batch_size=8 --max_steps=80".split()
V6 += [
    "--vocab_size=300",
    "--eval_interval=80",
    "--eval_tokens=300",
    "--max_new_tokens=3",
    "--precision=fp32",
]
V8 = "--instructions=examples.jsonl --max_steps=40 --eval_interval=20 --max_new_tokens=8".split()
V8 += ["--batch_size=16", "--learning_rate=0.01", "--warmup_steps=3", "--precision=fp32", "--method=full"]
SMALL = (
    "--max_steps=4 --eval_interval=2 --batch_size=8 --group_size=4 --n_minibatches=2 --warmup_steps=2".split()
)
SMALL += "--max_new_tokens=8 --n_prompts=30 --n_replies=3 --reward_steps=8 --reward_batch=4".split()
OWN = {
    "group_size": "grpo",
    "n_minibatches": "ppo grpo dpo",
    "batch_size": "ppo grpo dpo",
}  # flags of SMALL, by method
SPOKEN = "good love sweet death hate villain the a my lord king".split()


def small(method="ppo", task="reply", **changes):
    """SMALL, without what is idle in a method and a task, and `changes`."""
    idle = {name for name, methods in OWN.items() if method not in methods.split()}
    idle |= {*v9.TRAINING} if method == "best_of_n" else set()
    idle |= {"n_replies", "reward_steps", "reward_batch"} if task == "read" else set()
    idle |= {"n_prompts", "n_replies"} if "preferences" in changes else set()
    flags = [text for text in SMALL if text[2:].split("=")[0] not in idle | changes.keys()]
    return [*flags, f"--method={method}", f"--task={task}", *(flag(*item) for item in changes.items())]


def plays(names, n, rng):
    """A play of n speeches."""
    speeches = [" ".join(rng.choices(SPOKEN, k=rng.randint(4, 7))) for _ in range(n)]
    return "\n\n".join(f"{rng.choice(names)}:\n{speech}" for speech in speeches)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A folder with a model of v6 and one of v8 that answers with a few words, some kind and some cruel."""
    folder, rng = tmp_path_factory.mktemp("bases"), random.Random(0)
    text = plays(["ROMEO", "JULIET", "NURSE"], 150, rng) + "\n\n" + plays(["PARIS", "ROMEO"], 16, rng)
    (folder / "input.txt").write_text(text, encoding="utf-8", newline="\n")
    records = []
    for _ in range(60):
        prompt, reply = (" ".join(rng.choices(SPOKEN, k=n)) for n in (5, rng.randint(2, 5)))
        records.append({"instruction": f"{prompt}\nAnswer as ROMEO.", "output": reply})
    lines = [json.dumps(record) for record in records]
    (folder / "examples.jsonl").write_text("\n".join(lines), encoding="utf-8")
    pairs = [
        {"prompt": f"{r['instruction']}{i % 20}", "chosen": "my king", "rejected": r["output"]}
        for i, r in enumerate(records)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    for rung, flags in (("v6_amp_ddp", V6), ("v8_lora", V8)):
        process = run_here(rung, *flags, cwd=folder)
        assert process.returncode == 0, process.stderr
    return folder


def run_v9(folder, *flags):
    """Run v9 in a folder."""
    return run_here(RUNG, *flags, cwd=folder)


@pytest.fixture(scope="module")
def trained(bases):
    """Run v9 once in each way; return {folder: finished process}."""
    done = {method: run_v9(bases, *small(method), f"--out_dir={method}") for method in v9.METHODS}
    done["lora"] = run_v9(bases, *small("ppo", lora_rank=2, learning_rate=0.01), "--out_dir=lora")
    done["own"] = run_v9(bases, *small("dpo", preferences="pairs.jsonl"), "--out_dir=own")
    return done | {"read": run_v9(bases, *small("grpo", "read"), "--out_dir=read")}


RUNS = [*v9.METHODS, "lora", "own", "read"]


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


@pytest.mark.parametrize("run", RUNS)
def test_a_run_makes_all_its_files(run, bases, trained):
    process, out = trained[run], bases / run
    assert process.returncode == 0, process.stderr
    pictures = {"loss.png"} if run != "best_of_n" else set()
    pictures |= {"reward.png"} if run in ("ppo", "grpo", "lora", "read") else set()
    assert {path.name for path in out.iterdir()} == {"checkpoint.pt", "metrics.json", "sample.txt"} | pictures
    metrics, checkpoint = metrics_of(out), load(out / "checkpoint.pt")
    assert set(metrics) >= METRICS and metrics["version"] == RUNG == checkpoint["version"]
    assert metrics["params"] == sum(x.numel() for x in checkpoint["model"].values())
    steps = 0 if run == "best_of_n" else 4
    assert metrics["steps"] == steps == checkpoint["step"] == len(metrics["history"])
    assert metrics["config"]["base"] == BASE and metrics["device"] == "cpu"
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["val_loss"]))
    assert [point["step"] for point in metrics["history"]] == list(range(1, steps + 1))
    if steps:
        assert metrics["train_loss"] == metrics["history"][-1]["loss"]
        assert metrics["tokens_per_second"] == pytest.approx(metrics["tokens"] / metrics["seconds"])
        for picture in pictures:
            assert matplotlib.image.imread(out / picture).std() > 0
    if run in ("ppo", "grpo", "lora", "read"):
        assert metrics["tokens"] == round(8 * sum(point["length"] for point in metrics["history"])) > 0
        assert all({"score", "truth", "kl", "clipped"} <= point.keys() for point in metrics["history"])
    of_each = {"kl", "length", "distinct_words", "preferred", "bits_per_char", "val_loss"}
    of_each |= {"score"} if run != "read" else set()
    of_each |= {"truth"} if run != "own" else set()  # nobody can ask the people behind one's own pairs
    assert of_each == metrics["before"].keys() and of_each <= metrics.keys()
    assert metrics["before"]["kl"] == 0 and (metrics["kl"] > 0) == (run != "read")  # no reward
    assert ("accuracy" in metrics) == (run != "read")
    same = metrics["bits_per_char"] == metrics["before"]["bits_per_char"]
    assert same == (run in ("best_of_n", "read"))
    sample = (out / "sample.txt").read_text(encoding="utf-8")
    assert sample in process.stdout and sample.count("  before: ") == sample.count("  after:  ") > 5
    for name in ("preferred", "bits_per_char"):
        assert f"{metrics[name]:.4f}" in process.stdout and f"{metrics['before'][name]:.4f}" in process.stdout


@pytest.mark.parametrize("run", RUNS)
def test_the_base_is_not_touched_and_the_checkpoint_is_a_plain_model(run, bases, trained):
    checkpoint, base = load(bases / run / "checkpoint.pt"), load(bases / BASE / "checkpoint.pt")
    assert checkpoint["vocab"] == base["vocab"] and checkpoint["base_hash"] == v9.hash_of(base["model"])
    config = v9.Config(**checkpoint["config"])
    model = v9.LanguageModel(config, config.vocab_size)
    model.load_state_dict(checkpoint["model"])
    moved = any(not torch.equal(x, base["model"][name]) for name, x in checkpoint["model"].items())
    assert moved == (run not in ("best_of_n", "read"))
    if run == "lora":
        for name, B in checkpoint["last"].items():
            if name.endswith("lora_B"):
                path, A = name[len("model.") : -len(".lora_B")], checkpoint["last"][name[:-1] + "A"]
                expected = base["model"][f"{path}.weight"] + 16 / 2 * B @ A
                torch.testing.assert_close(checkpoint["model"][f"{path}.weight"], expected, atol=1e-6, rtol=0)
                assert B.any()


def test_the_bits_per_character_are_those_of_v8(bases, trained):
    evaluated = run_here("v8_lora", "--evaluate", cwd=bases)
    printed = float(re.search(r"^ *bits_per_char +([\d.]+)$", evaluated.stdout, flags=re.M)[1])
    assert metrics_of(bases / "ppo")["before"]["bits_per_char"] == pytest.approx(printed, abs=5.1e-5)


@pytest.mark.parametrize("run", RUNS)
def test_sampling_answers_as_after_training_and_changes_no_file(run, bases, trained):
    if run == "best_of_n":
        refused(run_v9(bases, "--sample", f"--out_dir={run}"), "best_of_n has trained nothing")
        return
    before, texts = files_of(bases), []
    for more in ([], [], ["--seed=7"], ["--greedy"], ["--prompt=death death\\nAnswer as NURSE."]):
        process = run_v9(bases, "--sample", f"--out_dir={run}", *more)
        assert process.returncode == 0 and process.stderr == "", process.stderr
        texts.append(process.stdout)
    assert texts[0] == texts[1] and len({*texts}) >= 3
    sample = (bases / run / "sample.txt").read_text(encoding="utf-8")
    assert sample.endswith(f"\n{texts[0]}")
    assert before == files_of(bases)


def test_an_answer_is_that_of_the_ids_of_the_prompt(bases, trained):
    checkpoint = load(bases / "lora/checkpoint.pt")
    config = v9.Config(**checkpoint["config"])
    model = v9.LanguageModel(config, config.vocab_size).eval()
    model.load_state_dict(checkpoint["model"])
    tokenizer = v9.make_tokenizer(checkpoint["vocab"])
    s = tokenizer.special_tokens
    ids = [s["<|user|>"], *tokenizer.encode("my king\nlord"), s["<|assistant|>"]]
    new = one_at_a_time(model, ids, replace(config, max_new_tokens=12), s[END])
    flags = ["--greedy", "--max_new_tokens=12", r"--prompt=my king\nlord", "--out_dir=lora"]
    assert (
        run_v9(bases, "--sample", *flags).stdout == tokenizer.decode([i for i in new if i != s[END]]) + "\n"
    )


@pytest.mark.parametrize("run", RUNS)
def test_evaluate_prints_the_numbers_of_the_metrics_and_writes_nothing(run, bases, trained):
    before, metrics = files_of(bases), metrics_of(bases / run)
    process = run_v9(bases, "--evaluate", f"--out_dir={run}")
    assert process.returncode == 0 and "step/s" not in process.stderr, process.stderr
    assert before == files_of(bases)
    for name in metrics["before"]:
        printed = re.search(rf"^ *{name} +(-?[\d.]+) +(-?[\d.]+)$", process.stdout, flags=re.M)
        expected = [metrics["before"][name], metrics[name]]
        assert [float(number) for number in printed.groups()] == pytest.approx(expected, abs=5.1e-5), name


def test_the_reward_model_is_made_once_and_used_by_all_methods(bases, trained):
    texts = {run: process.stdout for run, process in trained.items()}
    assert texts["ppo"].count("a reward model learns from") == 1
    assert all(
        "a reward model learns" not in texts[run] for run in ("grpo", "dpo", "best_of_n", "lora", "read")
    )
    assert "a reward model learns" in texts["own"]
    folders = list((bases / "runs/preferences").iterdir())
    assert len(folders) == 2
    pairs = next(path for folder in folders for path in folder.glob("preferences.jsonl"))
    lines = [json.loads(line) for line in pairs.read_text(encoding="utf-8").split("\n")]
    shares = [v9.annotate(line["chosen"]) > v9.annotate(line["rejected"]) for line in lines]
    assert 0.7 < sum(shares) / len(shares) < 1  # one in ten is the wrong way round
    metrics = metrics_of(bases / "ppo")
    assert metrics["pairs"] == len(lines) and f"{metrics['accuracy']:.1%}" in texts["ppo"]
    assert metrics["accuracy"] == metrics_of(bases / "dpo")["accuracy"]


@pytest.mark.parametrize("changed", ["dropout=0.7", "seed=3", "noise=0.5", "reward_steps=9", "preferences"])
def test_other_settings_have_another_reward_model(changed, copy):
    flags = small("best_of_n")
    if changed == "preferences":  # another text under the same name
        flags = small("best_of_n", preferences="pairs.jsonl")
        lines = (copy / "pairs.jsonl").read_text(encoding="utf-8").split("\n")
        (copy / "pairs.jsonl").write_text("\n".join(lines[:-10]), encoding="utf-8")
    else:
        flags = [text for text in flags if not text.startswith(f"--{changed.split('=')[0]}=")]
        flags.append(f"--{changed}")
    process = run_v9(copy, *flags, "--out_dir=new")
    assert process.returncode == 0, process.stderr
    assert "a reward model learns" in process.stdout


@pytest.mark.parametrize("changed", ["lr_floor=0.9", "grad_clip=0.001"])
def test_how_a_policy_learns_does_not_change_the_reward_model(changed, copy):
    """It is kept under a name that tells how it was made; what is not told there must not matter."""
    scores = []
    for more in ([], [f"--{changed}"]):
        shutil.rmtree(copy / "runs/preferences")
        flags = small("ppo", reward_steps=40, max_steps=1)  # longer than its warm-up
        process = run_v9(copy, *flags, *more, "--out_dir=new")
        assert process.returncode == 0 and "a reward model learns" in process.stdout, process.stderr
        scores.append(metrics_of(copy / "new")["before"]["score"])
    assert scores[0] == scores[1]


def test_prompts_to_measure_with_are_not_those_to_learn_with(bases, trained, monkeypatch):
    monkeypatch.chdir(bases)
    tokenizer = v9.make_tokenizer(load(bases / BASE / "checkpoint.pt")["vocab"])
    text = (bases / "input.txt").read_text(encoding="utf-8")
    cut = int(0.9 * len(text))
    for config in (v9.Config(), v9.Config(task="read", method="grpo"), v9.Config(preferences="pairs.jsonl")):
        learning, held_out = v9.load_prompts(config, tokenizer)
        texts = [{prompt.text for prompt in part} for part in (learning, held_out)]
        assert learning and held_out and not texts[0] & texts[1]
        if config.task == "read":
            assert {prompt.right for prompt in held_out} == {"PARIS"}
            assert "PARIS" not in {prompt.right for prompt in learning}
            for prompt in learning[:50] + held_out[:50]:
                words = re.fullmatch(r"Who says: (.*)\?", prompt.text, flags=re.DOTALL)[1]
                context = tokenizer.decode(prompt.ids)
                assert (
                    context.startswith(f"<|context|>{prompt.right}:\n")
                    and words in context.split("<|user|>")[0]
                )
        elif not config.preferences:
            assert all(prompt.text.split("\n")[0] in text[:cut] for prompt in learning)
            assert all(prompt.text.split("\n")[0] in text[cut - 100 :] for prompt in held_out)
            assert len(texts[0]) == len(learning) <= config.n_prompts
        for prompt in learning[:50]:
            assert tokenizer.decode(prompt.ids).endswith(f"<|user|>{prompt.text}<|assistant|>")
        again = v9.load_prompts(replace(config, seed=2), tokenizer)
        assert again == [learning, held_out]


# ------------------------------------ nothing is lost, nothing lies ------------------------------------


SOURCE = inspect.getsource(v9.Config)


def main_here(folder, monkeypatch, *flags, ctrl_c_at=None, where="out"):
    """Run main in this process; press Ctrl-C in step `ctrl_c_at` of what is trained in a folder `where`."""
    with monkeypatch.context() as patch:
        rate = v9.learning_rate_at

        def learning_rate_at(step, config):
            if step == ctrl_c_at and where in config.out_dir:
                signal.raise_signal(signal.SIGINT)
            return rate(step, config)

        patch.setattr(v9, "learning_rate_at", learning_rate_at)
        patch.setattr(inspect, "getsource", lambda _: SOURCE)  # found once: that takes the most time
        patch.chdir(folder)
        patch.setattr(sys, "argv", [RUNG, *flags])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            v9.main()
        except SystemExit as end:
            return str(end.code)
        finally:
            v9.plt.close("all")
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return ""


RESUMED = [("ppo", {}), ("ppo", {"lora_rank": 2}), ("grpo", {}), ("dpo", {}), ("dpo", {"lora_rank": 2})]


@pytest.mark.parametrize(("method", "changes"), RESUMED)
def test_resumed_run_equals_uninterrupted_run(method, changes, bases, trained, tmp_path, monkeypatch):
    flags = small(method, **changes)
    assert main_here(bases, monkeypatch, *flags, f"--out_dir={tmp_path}/whole") == ""
    stop_at = [2, 3, 4][RESUMED.index((method, changes)) % 3]
    parts = tmp_path / "out"
    said = main_here(bases, monkeypatch, *flags, f"--out_dir={parts}", ctrl_c_at=stop_at)
    assert re.search("step" if stop_at == 4 else f"step {stop_at} and saved", said) and "--resume" in said
    assert load(parts / "checkpoint.pt")["step"] == stop_at and not (parts / "metrics.json").exists()
    assert main_here(bases, monkeypatch, "--resume", f"--out_dir={parts}") == ""
    whole, found = (load(folder / "checkpoint.pt") for folder in (tmp_path / "whole", parts))
    assert_same(whole, found)
    metrics = [metrics_of(folder) for folder in (tmp_path / "whole", parts)]
    for one in metrics:
        del one["seconds"], one["tokens_per_second"], one["config"]["out_dir"]
        one["history"] = [{k: v for k, v in point.items() if k != "seconds"} for point in one["history"]]
    assert metrics[0] == metrics[1]
    texts = [(folder / "sample.txt").read_bytes() for folder in (tmp_path / "whole", parts)]
    assert texts[0] == texts[1]


def test_an_interrupted_reward_model_goes_on(copy, monkeypatch):
    flags = [text for text in small("best_of_n") if "reward_steps" not in text] + ["--reward_steps=104"]
    shutil.rmtree(copy / "runs/preferences")
    stop = partial(main_here, copy, monkeypatch, *flags, where="preferences")
    assert "nothing is saved" in stop("--out_dir=new", ctrl_c_at=50)
    said = stop("--out_dir=new", ctrl_c_at=102)
    assert "step 102 and saved" in said and "--resume" not in said  # there is nothing to resume yet
    (place,) = (copy / "runs/preferences").iterdir()
    assert load(place / "checkpoint.pt")["step"] == 102 and (place / "preferences.jsonl").exists()
    assert not (copy / "new/metrics.json").exists()
    assert stop("--out_dir=new") == ""
    parts = load(place / "checkpoint.pt")
    shutil.rmtree(place)
    assert stop("--out_dir=whole") == ""
    assert_same(load(place / "checkpoint.pt"), parts)
    assert parts["step"] == 104
    metrics = [metrics_of(copy / name) for name in ("new", "whole")]
    assert metrics[0]["accuracy"] == metrics[1]["accuracy"] and metrics[0]["score"] == metrics[1]["score"]


def test_a_finished_run_survives_a_new_one(copy, monkeypatch):
    (copy / "ppo").rename(copy / "out")
    out, new = copy / "out", [*small("ppo"), "--out_dir=out", "--learning_rate=0.01"]
    finished = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "nothing is saved" in main_here(copy, monkeypatch, *new, ctrl_c_at=1)
    assert finished == {path.name: path.read_bytes() for path in out.iterdir()}
    kept = {"checkpoint.previous.pt": "checkpoint.pt", "metrics.previous.json": "metrics.json"}
    for _ in range(2):  # an unfinished run takes no finished one's place
        assert "step 3 and saved" in main_here(copy, monkeypatch, *new, ctrl_c_at=3)
        assert all((out / name).read_bytes() == finished[old] for name, old in kept.items())
        assert load(out / "checkpoint.pt")["step"] == 3 and not (out / "metrics.json").exists()


def test_best_of_n_keeps_the_finished_run_of_another_method_too(copy):
    out = copy / "ppo"
    finished = {path.name: path.read_bytes() for path in out.iterdir()}
    process = run_v9(copy, *small("best_of_n"), "--out_dir=ppo")
    assert process.returncode == 0, process.stderr
    kept = {"checkpoint.previous.pt": "checkpoint.pt", "metrics.previous.json": "metrics.json"}
    assert all((out / name).read_bytes() == finished[old] for name, old in kept.items())
    assert (
        metrics_of(out)["config"]["method"] == load(out / "checkpoint.pt")["config"]["method"] == "best_of_n"
    )


def test_a_finished_run_goes_on_with_more_steps(copy):
    process = run_v9(copy, "--resume", "--out_dir=grpo", "--max_steps=6")
    assert process.returncode == 0, process.stderr
    metrics = metrics_of(copy / "grpo")
    assert metrics["steps"] == 6 and [point["step"] for point in metrics["history"]] == [1, 2, 3, 4, 5, 6]
    assert not (copy / "grpo/checkpoint.previous.pt").exists()


ONE_UPDATE = dict(n_epochs=1, n_minibatches=1)


@pytest.mark.parametrize(
    ("method", "changes"), [("ppo", {}), ("ppo", ONE_UPDATE), ("grpo", ONE_UPDATE), ("dpo", {})]
)
def test_loss_that_is_not_finite_stops_the_run_and_harms_nothing(method, changes, copy):
    before = files_of(copy)
    flags = [*small(method, **changes), f"--out_dir={method}", "--learning_rate=1e38", "--eval_interval=4"]
    assert refused(run_v9(copy, *flags), "not finite", "--learning_rate")
    assert before == files_of(copy)


def test_a_reward_model_whose_loss_is_not_finite_names_its_own_flag(copy):
    before = files_of(copy)
    process = run_v9(copy, *small("ppo"), "--out_dir=new", "--reward_rate=1e38", "--reward_steps=30")
    assert refused(process, "not finite", "--reward_rate")
    assert before == {p: x for p, x in files_of(copy).items() if p.name != "preferences.jsonl" or p in before}


def test_same_seed_same_numbers(copy):
    for seed in (1337, 2):
        process = run_v9(copy, *small("ppo"), "--out_dir=again", f"--seed={seed}")
        assert process.returncode == 0, process.stderr
        a, b = load(copy / "ppo/checkpoint.pt"), load(copy / "again/checkpoint.pt")
        if seed == 1337:
            assert_same(a["last"], b["last"])
    assert not torch.equal(a["last"]["head.weight"], b["last"]["head.weight"])


# ----------------------------------------------- the base -----------------------------------------------


def test_the_run_of_v8_is_the_default_base_and_is_made_first_where_there_is_none(
    bases, tmp_path, monkeypatch, capsys
):
    shutil.copy(bases / "input.txt", tmp_path)
    calls = []

    def run(args, **rest):
        calls.append(list(map(str, args)))
        if len(calls) > 1:
            shutil.copytree(bases / BASE, tmp_path / BASE)
        return subprocess.CompletedProcess(args, len(calls) == 1)

    monkeypatch.setattr(subprocess, "run", run)
    flags = small("best_of_n", prompt="my king")
    assert "v8_lora.py has failed" in main_here(tmp_path, monkeypatch, *flags)
    assert main_here(tmp_path, monkeypatch, *flags) == ""
    assert calls == [[sys.executable, str(ROOT / "v8_lora.py")]] * 2
    said = capsys.readouterr().out
    assert said.count("there is no base yet") == 2 and "minutes" in said
    assert metrics_of(tmp_path / "runs" / RUNG)["config"]["base"] == BASE
    assert main_here(tmp_path, monkeypatch, *flags) == "" and len(calls) == 2


@pytest.mark.parametrize(
    "flags",
    [
        "--clip_range=0",
        "--method=abc",
        "--task=read",
        "--n_best=3",
        "--n_embd=32",
        "--preferences=nowhere.jsonl",
        "--data=nowhere.txt",
        "--out_dir=input.txt",
    ],
)
def test_what_is_impossible_is_refused_before_a_base_is_trained(flags, bases, tmp_path, monkeypatch):
    shutil.copy(bases / "input.txt", tmp_path)
    calls, failed = [], subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(subprocess, "run", lambda *args, **rest: calls.append(args) or failed)
    process = run_v9(tmp_path, flags)
    assert refused(process, flags[2:].split("=")[0]) and calls == []


@pytest.mark.parametrize("version", ["v5_gpt2", "v6_amp_ddp", "v7_quantize", "v10_x", "v0_bigram"])
def test_models_that_do_not_answer_are_no_base(version, bases, trained, tmp_path):
    checkpoint = load(bases / BASE / "checkpoint.pt") | {"version": version}
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    process = run_v9(bases, *small(), f"--base={tmp_path}", f"--out_dir={tmp_path}/out")
    assert refused(process, version, "--base", str(tmp_path)) and not (tmp_path / "out").exists()


def test_the_model_of_v6_is_refused_and_one_of_v9_is_a_base(copy):
    assert refused(run_v9(copy, *small(), "--base=runs/v6_amp_ddp"), "v6_amp_ddp", "--base")
    process = run_v9(copy, *small("best_of_n"), "--base=ppo", "--out_dir=again")
    assert process.returncode == 0, process.stderr
    ppo, again = metrics_of(copy / "ppo"), metrics_of(copy / "again")
    assert again["before"]["bits_per_char"] == pytest.approx(ppo["bits_per_char"], abs=1e-6)
    assert again["config"]["base"] == "ppo"


def test_a_base_that_has_gone_or_changed_is_said_in_resuming_and_may_be_named_anew(copy):
    (copy / BASE).rename(copy / "moved")
    assert refused(run_v9(copy, "--resume", "--out_dir=ppo", "--max_steps=5"), BASE, "--base")
    process = run_v9(copy, "--resume", "--out_dir=ppo", "--max_steps=5", "--base=moved")
    assert process.returncode == 0, process.stderr
    assert run_v9(copy, "--sample", "--out_dir=ppo").returncode == 0  # the merged model needs no base
    checkpoint = load(copy / "moved/checkpoint.pt")
    checkpoint["model"]["norm.weight"][0] += 1e-3
    torch.save(checkpoint, copy / "moved/checkpoint.pt")
    assert refused(run_v9(copy, "--resume", "--out_dir=ppo", "--max_steps=6"), "moved", "--base")


# -------------------------------------------- bad input --------------------------------------------

BAD_FLAGS = [
    ("--base=nowhere", ["nowhere", "--base"]),
    ("--base=runs/../runs/v8_lora --out_dir=runs/v8_lora", ["overwritten", "--out_dir"]),
    ("--method=abc", ["--method", "abc", "best_of_n"]),
    ("--task=abc", ["--task", "abc", "read"]),
    ("--task=read", ["--task", "--method grpo"]),
    ("--method=grpo --batch_size=9 --group_size=4", ["--batch_size 9", "--group_size 4"]),
    ("--method=dpo --batch_size=3", ["--batch_size 3", "--n_minibatches 4"]),
    ("--method=grpo --group_size=1", ["--group_size"]),
    ("--n_replies=1", ["--n_replies"]),
    ("--lora_rank=-1", ["--lora_rank -1"]),
    ("--lora_alpha=8", ["--lora_alpha", "--lora_rank"]),
    ("--noise=2", ["--noise"]),
    ("--noise=nan", ["--noise"]),
    ("--gae_lambda=1.5", ["--gae_lambda"]),
    ("--clip_range=0", ["--clip_range"]),
    ("--dpo_beta=0.2", ["--dpo_beta", "--method"]),
    ("--n_best=3", ["--n_best", "--method"]),
    ("--method=dpo --kl_coef=0.2", ["--kl_coef", "--method"]),
    ("--method=best_of_n --max_steps=3", ["--max_steps"]),
    ("--method=best_of_n --batch_size=3", ["--batch_size"]),
    ("--method=best_of_n --lora_rank=3", ["--lora_rank"]),
    ("--method=grpo --task=read --noise=0.2", ["--noise"]),
    ("--preferences=pairs.jsonl --n_prompts=5", ["--n_prompts"]),
    ("--preferences=nowhere.jsonl", ["--preferences", "nowhere.jsonl"]),
    ("--preferences=bad.jsonl", ["line 2 of", "bad.jsonl"]),
    ("--preferences=one.jsonl", ["one.jsonl"]),
    ("--preferences=same.jsonl", ["--preferences", "same.jsonl"]),
    ("--preferences=long.jsonl", ["--preferences", "long.jsonl"]),
    ("--max_new_tokens=256", ["--max_new_tokens"]),
    ("--max_new_tokens=300", ["--max_new_tokens"]),
    ("--dropout=1", ["--dropout"]),
    ("--greedy --temperature=0.5", ["--greedy", "--temperature"]),
    ("--device=abacus", ["abacus", "cpu"]),
    ("--data=nowhere.txt", ["nowhere.txt", "--data"]),
    ("--data=short.txt", ["short.txt"]),
    ("--data=prose.txt", ["prose.txt", "speeches"]),
    ("--out_dir=input.txt", ["input.txt", "--out_dir"]),
    ("--out_dir=input.txt/below", ["input.txt", "--out_dir"]),
    ("--max_steps=many", ["--max_steps", "many"]),
    ("--no_such_flag=1", ["--no_such_flag"]),
    ("--max_steps=0", ["--max_steps 0"]),
]


@pytest.mark.parametrize(("flags", "words"), BAD_FLAGS, ids=[flags for flags, _ in BAD_FLAGS])
def test_bad_input_is_refused_in_one_sentence_and_harms_nothing(flags, words, bases, tmp_path):
    for name in ("input.txt", "pairs.jsonl"):
        shutil.copy(bases / name, tmp_path)
    shutil.copytree(bases / BASE, tmp_path / BASE)
    good = json.dumps(GOOD_PAIR)
    same = "\n".join(json.dumps(GOOD_PAIR | {"rejected": f"death {i}"}) for i in range(20))
    long = "\n".join(json.dumps(GOOD_PAIR | {"prompt": f"{i} " * 300}) for i in range(20))
    texts = {"short.txt": "short", "prose.txt": "Call me Ishmael. " * 500, "bad.jsonl": f"{good}\n{{"}
    texts |= {"one.jsonl": good, "same.jsonl": same, "long.jsonl": long}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    before = files_of(tmp_path)
    process = run_v9(tmp_path, *flags.split())
    assert refused(process, *words) and "step/s" not in process.stderr
    assert before == files_of(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="a folder where not even root can write")
def test_a_folder_that_cannot_be_written_is_refused(bases):
    assert refused(run_v9(bases, *small(), "--out_dir=/proc"), "/proc", "--out_dir")


def test_no_model_yet(bases):
    for mode in ("--sample", "--evaluate", "--resume"):
        assert refused(run_v9(bases, mode, "--out_dir=nothing"), "nothing", "train first")


def test_there_is_no_mode_that_does_nothing(bases, trained):
    """Each that --help lists works."""
    modes = re.findall(r"^  --(\w+) +[a-z]", run_v9(bases, "--help").stdout, flags=re.M)
    assert {"sample", "evaluate", "resume"} <= {*modes}
    for mode in modes:
        process = run_v9(bases, f"--{mode}", "--out_dir=dpo")
        assert process.returncode == 0, process.stderr


def damaged(good):
    """Checkpoints that lack a part of a good one, or in which one has another shape."""
    name, bad = "token_embedding.weight", {}
    for part in good:
        bad[f"no {part}"] = {key: value for key, value in good.items() if key != part}
    for i, part in enumerate(sorted(good.keys() - {"version", "config"})):
        value = [None, "x", [], torch.zeros(2)][i % 4]
        bad[f"{part} {value!r}"] = good | {part: 5.5j if isinstance(value, type(good[part])) else value}
    for key, value in [("block_size", "8"), ("n_embd", None), ("n_head", -1), ("seed", "x")]:
        bad[f"config {key} {value!r}"] = good | {"config": good["config"] | {key: value}}
    bad["config None"] = good | {"config": None}
    bad["rows"] = good | {"model": good["model"] | {name: torch.zeros(2, 3)}}
    bad["other weights"] = good | {"model": {"other": torch.zeros(2)}}
    bad["no tensor"] = good | {"model": good["model"] | {name: 5}}
    return bad | {"version": good | {"version": 3}, "list": [good], "number": 5}


UNUSED = {  # parts that a mode has no use for
    "--sample": "last|optimizer|tokens|base_hash",
    "--evaluate": "optimizer|base_hash|model|rows|other weights|no tensor",
    "--resume": "model|rows|other weights|no tensor",  # made anew of the base
    "train": "last|optimizer|tokens|base_hash|before|config seed",
}


@pytest.mark.parametrize("mode", UNUSED)
def test_damaged_checkpoints_are_refused_in_one_sentence(mode, bases, trained, tmp_path):
    path = bases / (BASE if mode == "train" else "ppo") / "checkpoint.pt"
    content, place, wrong = path.read_bytes(), tmp_path / "bad/checkpoint.pt", []
    place.parent.mkdir()
    flags = [mode, f"--out_dir={tmp_path}/bad", *["--max_steps=6"] * (mode == "--resume")]
    if mode == "train":
        flags = [*small("best_of_n"), f"--base={tmp_path}/bad", f"--out_dir={tmp_path}/out"]
    bad = {"cut": content[: len(content) // 2], "empty": b"", "text": b"no checkpoint"}
    for name, content in (bad | damaged(load(path))).items():
        if re.match(f"(no )?({UNUSED[mode]})", name):
            continue
        place.write_bytes(content) if isinstance(content, bytes) else torch.save(content, place)
        try:
            assert refused(run_v9(bases, *flags))
        except AssertionError as error:
            wrong.append(f"{name}: {str(error)[-200:]!r}")
        except Exception as error:  # a traceback
            wrong.append(f"{name}: {error!r:.200}")
    assert not wrong, "\n".join(wrong)
    assert not (tmp_path / "out/metrics.json").exists()


@pytest.mark.parametrize("name", ["checkpoint.pt", "preferences.jsonl"])
@pytest.mark.parametrize("content", [b"", b"{"])
def test_a_damaged_reward_model_or_its_pairs_are_said(name, content, copy):
    for folder in (copy / "runs/preferences").iterdir():
        if (folder / name).exists():
            (folder / name).write_bytes(content)
    before = files_of(copy)
    assert refused(run_v9(copy, *small("ppo"), "--out_dir=new"), "runs/preferences", name)
    assert before == files_of(copy)


# ------------------------------------ a flag takes effect or is refused ------------------------------------

OTHER = dict(data="other.txt", preferences="pairs.jsonl", base="dpo", out_dir="elsewhere", method="grpo")
OTHER |= dict(task="read", n_prompts=9, n_replies=4, noise=0.9, reward_steps=9, reward_batch=5)
OTHER |= dict(reward_rate=0.01, n_best=3, kl_coef=3.0, dpo_beta=2.0, clip_range=1e-4, gae_lambda=0.1)
OTHER |= dict(n_epochs=3, n_minibatches=4, group_size=2, lora_rank=2, lora_alpha=99.0, device="cpu", seed=7)
OTHER |= dict(tokenizer="char", vocab_size=301, block_size=128, n_embd=32, n_head=1, n_layer=2, init_std=0.5)
OTHER |= dict(position="learned", batch_size=4, dropout=0.6, max_steps=3, learning_rate=0.02, warmup_steps=3)
OTHER |= dict(lr_floor=0.9, grad_clip=1e-4, eval_interval=3, greedy=True, temperature=0.3, top_k=1, top_p=0.1)
OTHER |= dict(prompt="my lord", max_new_tokens=5)
SILENT = {"device", "eval_interval", "out_dir"}  # change no number
WAYS = {  # where all flags are tried: method, task, and flags without which others do nothing
    "ppo": ("ppo", "reply", dict(learning_rate=0.01, warmup_steps=1)),
    "grpo": ("grpo", "reply", dict(learning_rate=0.01, warmup_steps=1, lora_rank=1)),
    "dpo": ("dpo", "reply", dict(learning_rate=0.01, warmup_steps=1)),
    "best_of_n": ("best_of_n", "reply", {}),
    "read": ("grpo", "read", dict(learning_rate=0.01, warmup_steps=1)),
}
JUDGED = {"preferences", "n_replies", "noise", "reward_steps", "reward_batch", "reward_rate", "dropout"}
REPLIES = {"kl_coef", "clip_range", "n_epochs", "n_minibatches"}
REFUSED = {name: {*v9.MODEL} for name in WAYS}  # the table says so, not the rung
REFUSED["ppo"] |= {"n_best", "dpo_beta", "group_size", "lora_alpha", "task"}
REFUSED["grpo"] |= {"n_best", "dpo_beta", "gae_lambda"}
REFUSED["dpo"] |= {"n_best", "gae_lambda", "group_size", "lora_alpha", "task"} | REPLIES - {"n_minibatches"}
REFUSED["best_of_n"] |= {"dpo_beta", "gae_lambda", "group_size", "lora_alpha", "lora_rank", "task"} | REPLIES
REFUSED["best_of_n"] |= {"batch_size", "learning_rate", "warmup_steps", "lr_floor", "grad_clip", "max_steps"}
REFUSED["best_of_n"] |= {"eval_interval"}
REFUSED["read"] |= {"n_best", "dpo_beta", "gae_lambda", "lora_alpha"} | JUDGED


OWN_WAY = {"grpo": {"group_size", "kl_coef", "clip_range", "n_epochs", "n_minibatches", "lora_alpha"}}
OWN_WAY |= {
    "dpo": {
        "dpo_beta",
        "n_minibatches",
        "batch_size",
        "learning_rate",
        "warmup_steps",
        "lr_floor",
        "max_steps",
    }
}
OWN_WAY |= {"best_of_n": {"n_best", "noise", "temperature", "seed"}, "read": set()}  # where nobody is right


def outcome(out):
    """What a run has made, without how long it took."""
    metrics = metrics_of(out)
    for name in ("seconds", "tokens_per_second", "config"):
        del metrics[name]
    for point in metrics["history"]:
        del point["seconds"]
    return metrics, (out / "sample.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("way", WAYS)
def test_a_flag_takes_effect_or_is_refused(way, copy, monkeypatch):
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda *args: None)  # it takes the most time
    method, task, changes = WAYS[way]
    text = (copy / "input.txt").read_text(encoding="utf-8")
    (copy / "other.txt").write_text(text.replace("good", "fair"), encoding="utf-8", newline="\n")
    changes = changes | ({} if method == "best_of_n" else {"max_steps": 2})
    start = small(method, task, **changes)
    assert main_here(copy, monkeypatch, *start, "--out_dir=plain") == ""
    plain, wrong = outcome(copy / "plain"), []
    for field in fields(v9.Config):
        name = field.name
        if name in ("method", "task") and name not in REFUSED[way]:
            continue  # another way
        if way != "ppo" and name not in REFUSED[way] - {*v9.MODEL} | OWN_WAY[way]:
            continue  # as for ppo
        flags = small(method, task, **changes, preferences="x") if name == "preferences" else start
        flags, out = [*flags, flag(name, OTHER[name])], "elsewhere" if name == "out_dir" else "new"
        shutil.rmtree(copy / "new", ignore_errors=True)
        before = files_of(copy) if name in REFUSED[way] else None
        said = main_here(copy, monkeypatch, *flags, *[f"--out_dir={out}"] * (name != "out_dir"))
        try:
            if name in REFUSED[way]:
                assert re.fullmatch(f"error: .*--{name} .*", said) and before == files_of(copy), said
            else:
                assert said == ""
                assert (outcome(copy / out) != plain) == (name not in SILENT)
        except AssertionError as error:
            wrong.append(f"{name}: {str(error)[:300]}")
    assert not wrong, "\n".join(wrong)


MODES = {
    "--sample": {"device", "seed", "greedy", "temperature", "top_k", "top_p", "prompt", "max_new_tokens"}
}
MODES |= {"--evaluate": {"device"}}
MODES |= {
    "--resume": {"max_steps", "learning_rate", "warmup_steps", "lr_floor", "grad_clip", "eval_interval"}
    | {"base", "device"}
}


@pytest.mark.parametrize("mode", MODES)
def test_a_flag_of_a_saved_run_takes_effect_or_is_refused(mode, copy, monkeypatch, capsys):
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda *args: None)
    shutil.copytree(copy / BASE, copy / "moved")
    changes = OTHER | dict(base="moved", max_steps=4, greedy=True, n_replies=5)
    flags = [*small("ppo", learning_rate=0.01), "--out_dir=out"]
    flags[flags.index("--max_steps=4")] = "--max_steps=3"
    stop = {"ctrl_c_at": 2} if mode == "--resume" else {}
    assert ("saved" in main_here(copy, monkeypatch, *flags, **stop)) == bool(stop)
    kept = shutil.copytree(copy / "out", copy / "kept")
    saved, plain, wrong = load(kept / "checkpoint.pt")["config"], None, []
    for name in [None, *(field.name for field in fields(v9.Config))]:
        if name == "out_dir":
            continue
        if mode == "--resume":
            shutil.rmtree(copy / "out")
            shutil.copytree(kept, copy / "out")
        value, before, _ = changes.get(name), files_of(copy / "out"), capsys.readouterr()
        assert name is None or value != saved[name], f"OTHER needs another {name}"
        more = [flag(name, value)] if name else []
        said = main_here(copy, monkeypatch, mode, "--out_dir=out", *more)
        try:
            if name in {None, *MODES[mode]}:
                assert said == ""
                found = outcome(copy / "out") if mode == "--resume" else capsys.readouterr().out
                plain = plain or found
                assert (found != plain) == (name not in {None, "device", "base", "eval_interval"})
                if mode == "--resume" and name:
                    assert metrics_of(copy / "out")["config"][name] == value
            else:
                assert re.fullmatch(f"error: .*--{name} .*", said) and before == files_of(copy / "out"), said
        except AssertionError as error:
            wrong.append(f"{name}: {str(error)[:300]}")
    assert not wrong, "\n".join(wrong)


def test_help_names_every_flag_with_meaning_and_default(tmp_path):
    process = run_here(RUNG, "--help", cwd=tmp_path)
    text = " ".join(process.stdout.split())
    assert process.returncode == 0 and "None" not in text
    assert all(mode in text for mode in ("--sample", "--evaluate", "--resume"))
    for name, field in v9.Config.__dataclass_fields__.items():
        assert re.search(rf"--{name}[ ,]", text) and f"(default: {field.default!r})" in text, name
