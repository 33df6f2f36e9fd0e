"""The experiments of week 8: python tools/week_8.py [experiment ...]

`others` also needs torchao and bitsandbytes: pip install torchao==0.18.0 bitsandbytes==0.50.2
"""

import copy
import importlib.util
import json
import statistics
import sys
import time
from dataclasses import replace

import matplotlib.pyplot as plt
import torch
import torch.nn as nn
from common import LOGS, ROOT, machine, run_experiments, spread, table

import v7_quantize as v7

ROUNDS = 3
GPT2 = dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, position="learned", vocab_size=50257)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def plain_gpt2(seed=1):
    """GPT-2's smallest in our own code, of nn.Linear and nn.Embedding, weights at random."""
    torch.manual_seed(seed)
    return v7.LanguageModel(v7.Config(**GPT2, init_std=0.02), 50257).eval()


def gpt2(kind="none"):
    """The same as --quantize says."""
    model = plain_gpt2()
    return v7.quantize(model, replace(model.config, quantize=kind))


def transformers_gpt2(dtype=torch.float32):
    """The same of transformers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    return GPT2LMHeadModel(GPT2Config()).eval().to(dtype)


def n_bytes(model):
    """Bytes of a model's weights."""
    return sum(x.nbytes for x in model.state_dict().values())


def seconds_of(function):
    """How long a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def in_turn(functions, rounds=ROUNDS):
    """Call each once to warm up, then all in turn; return {name: spread of seconds}."""
    for function in functions.values():
        function()
    seconds = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            seconds[name].append(seconds_of(function))
    return {name: spread(values) for name, values in seconds.items()}


# ------------------------------------------------ speed ------------------------------------------------


@torch.inference_mode()
def decode():
    """128 new tokens after a prompt of 32, greedy, one text: seconds of the whole, beside transformers."""
    idx = torch.randint(50257, (1, 32))
    config = v7.Config(greedy=True, max_new_tokens=128)
    functions, size = {}, {}
    for name, dtype in DTYPES.items():
        model = transformers_gpt2(dtype)
        quiet = dict(do_sample=False, eos_token_id=None, pad_token_id=0, max_new_tokens=128)
        quiet["attention_mask"] = torch.ones_like(idx)
        functions[f"transformers, {name}"] = lambda model=model, quiet=quiet: model.generate(idx, **quiet)
        size[f"transformers, {name}"] = sum(p.nbytes for p in model.parameters())  # tied weights once
    models = {"none, by F.linear": plain_gpt2()} | {kind: gpt2(kind) for kind in v7.KINDS}
    for name, model in models.items():
        functions[name] = lambda model=model: v7.generate(model, idx, config)
        size[name] = n_bytes(model)
    seconds = in_turn(functions)
    bandwidth = v7.memory_bandwidth(torch.device("cpu"))
    results = {
        name: {
            "tokens_per_second": 128 / times["mean"],
            "slowest": 128 / times["most"],
            "fastest": 128 / times["least"],
            "megabytes": size[name] / 1e6,
            "gb_per_second": size[name] * 128 / times["mean"] / 1e9,
            "share": size[name] * 128 / times["mean"] / bandwidth,
        }
        for name, times in seconds.items()
    }
    return results | {"bandwidth": bandwidth / 1e9, "machine": machine()}


@torch.inference_mode()
def products():
    """Milliseconds of all matrix products of one token, alone, and the GB/s at which they read weights."""
    models = {kind: gpt2(kind) for kind in v7.KINDS}
    inputs = {k: torch.randn(1, k) for k in (768, 3072)}

    def multiply(model):
        for part in model.modules():
            if isinstance(part, v7.QuantizedLinear):
                part(inputs[part.k])

    seconds = in_turn({kind: lambda model=model: multiply(model) for kind, model in models.items()}, 20)
    bandwidth, results = v7.memory_bandwidth(torch.device("cpu")), {}
    for kind, times in seconds.items():
        speed = n_bytes(models[kind]) / statistics.median(times["values"])
        results[kind] = {"ms": 1000 * statistics.median(times["values"]), "gb_per_second": speed / 1e9}
        results[kind]["share"] = speed / bandwidth
    return results | {"bandwidth": bandwidth / 1e9, "machine": machine()}


@torch.inference_mode()
def prefill():
    """Seconds from a prompt of 512 tokens to the logits of the next."""
    idx = torch.randint(50257, (1, 512))
    theirs = transformers_gpt2()
    functions = {"transformers": lambda: theirs(idx, use_cache=True, logits_to_keep=1)}
    for kind in v7.KINDS:
        model = gpt2(kind)

        def ours(model=model):
            model.logits(model.hidden_states(idx, v7.KVCache(model, 1))[:, -1])

        functions[kind] = ours
    return {name: times for name, times in in_turn(functions, 5).items()} | {"machine": machine()}


def draw_cache(found):
    """Write logs/week_8_cache.png."""
    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    for name in ("without", "with"):
        ax.plot(list(found), [times[name] for times in found.values()], ".-", label=f"{name} cache")
    ax.set(xlabel="tokens before", ylabel="milliseconds for one more token", xscale="log", yscale="log")
    ax.set_xticks(list(found), map(str, found))
    ax.set_yticks([20, 50, 100, 200, 500], ["20", "50", "100", "200", "500"])
    ax.minorticks_off()
    ax.grid(alpha=0.3)
    ax.legend()
    fig.savefig(LOGS / "week_8_cache.png", dpi=90)


@torch.inference_mode()
def cache():
    """Milliseconds of one more token after 32 to 1,023, with the cache and without it, in float32."""
    model, found = gpt2(), {}
    idx = torch.randint(50257, (1, 1024))
    for T in (32, 64, 128, 256, 512, 768, 1023):
        kv = v7.KVCache(model, 1)
        model.hidden_states(idx[:, :T], kv)

        def cached(T=T, kv=kv):
            kv.lengths.fill_(T)
            model.logits(model.hidden_states(idx[:, T : T + 1], kv)[:, -1])

        def uncached(T=T):
            model.logits(model.hidden_states(idx[:, : T + 1])[:, -1])

        times = {"with": [], "without": []}
        for i in range(12):
            times["with"].append(seconds_of(cached))
            if i < 4:
                times["without"].append(seconds_of(uncached))
        found[T] = {name: 1000 * sorted(values[1:])[len(values[1:]) // 2] for name, values in times.items()}
    draw_cache(found)
    return found | {"machine": machine()}


@torch.inference_mode()
def batch():
    """Tokens per second of all rows together, 64 steps after prompts of 32, for 1 to 16 rows."""
    config, results = v7.Config(greedy=True, max_new_tokens=66), {}
    for kind in v7.KINDS:
        model, results[kind] = gpt2(kind), {}
        for rows in (1, 2, 4, 8, 16):
            engine = v7.Engine(model, rows)
            for _ in range(rows):
                engine.add(torch.randint(50257, (32,)).tolist(), config)
            engine.step()
            seconds = seconds_of(lambda engine=engine: [engine.step() for _ in range(64)])
            results[kind][rows] = 64 * rows / seconds
    return results | {"machine": machine()}


# ------------------------------------------------ error ------------------------------------------------


def trained():
    """The model of v6's default run, its Config and the two splits."""
    checkpoint, config = v7.load_checkpoint("train", {}, ROOT / "runs" / "v6_amp_ddp")
    config.vocab_size = len(v7.make_tokenizer(checkpoint["vocab"]).vocab)
    return checkpoint, config, v7.load_splits(config, checkpoint["vocab"])


def bits_per_nat(checkpoint, config, val_ids):
    """What turns v6's loss per token into bits per character: the ratio of the two in its metrics."""
    metrics = json.loads((ROOT / "runs" / "v6_amp_ddp" / "metrics.json").read_text(encoding="utf-8"))
    return metrics["bits_per_char"] / metrics["val_loss"]


def quantized_in_part(checkpoint, config, wanted):
    """v6's model with those matrices rounded to what int8 or int4 holds whose names `wanted` picks."""
    model = v7.load_model(checkpoint["model"], replace(config, quantize="none"), "cpu")
    small = v7.load_model(checkpoint["model"], config, "cpu")
    for name, module in model.named_modules():
        if wanted(name) and isinstance(module, v7.FloatLinear):
            module.weight.data = small.get_submodule(name).rows(slice(len(module.weight))).contiguous()
    return model


INT4 = dict(quantize="int4")
ERRORS = {"none": (None, dict(quantize="none")), "int8": ("", dict(quantize="int8"))}
ERRORS |= {f"int4, groups of {n}": ("", INT4 | dict(group_size=n)) for n in (16, 32, 64, 128, 256)}
ERRORS |= {
    "int4, embedding only": ("token_embedding", INT4),
    "int4, queries, keys and values only": ("attention.qkv", INT4),
    "int4, output of attention only": ("attention.proj", INT4),
    "int4, first matrix of the MLPs only": ("mlp.0", INT4),
    "int4, second matrix of the MLPs only": ("mlp.2", INT4),
}


def draw_size(results):
    """Write logs/week_8_size.png."""
    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    for name in ("none", "int8", *(name for name in ERRORS if "groups" in name)):
        x, y = results[name]["megabytes"], results[name]["bits_per_char"]
        ax.plot(x, y, "o", color="C2" if "groups" in name else "C0" if name == "none" else "C1")
        offset = (-18, -4) if name.endswith("64") else (7, -3)
        ax.annotate(
            name.removeprefix("int4, groups of "),
            (x, y),
            xytext=offset,
            textcoords="offset points",
            fontsize=9,
        )
    ax.plot([], [], "o", color="C2", label="int4, with the size of its groups")
    ax.set(xlabel="size of the weights (MB)", ylabel="bits per character", xlim=(0, 9), ylim=(2.085, 2.104))
    ax.grid(alpha=0.3)
    ax.legend()
    fig.savefig(LOGS / "week_8_size.png", dpi=90)


LARGEST = "int4, but the largest hundredth of each matrix as it is"


def error():
    """Bits per character of v6's model in int8 and in int4 with groups of 16 to 256, and by part."""
    checkpoint, config, (_, val_ids) = trained()
    factor, results = bits_per_nat(checkpoint, config, val_ids), {}

    def measure(name, wanted, **flags):
        small = replace(config, **flags)
        model = quantized_in_part(checkpoint, small, wanted)
        size = n_bytes(v7.load_model(checkpoint["model"], small, "cpu"))
        loss = v7.evaluate(model, val_ids, config)
        results[name] = {"bits_per_char": loss * factor, "megabytes": size / 1e6, "val_loss": loss}

    for name, (part, flags) in ERRORS.items():
        measure(name, lambda name, part=part: part is not None and part in name, **flags)
    model = v7.load_model(checkpoint["model"], replace(config, quantize="none"), "cpu")
    for module in model.modules():
        if isinstance(module, v7.FloatLinear):  # int4 of what is left without the largest weights
            whole = module.weight.detach()
            large = whole.abs() >= whole.abs().flatten().kthvalue(int(0.99 * whole.numel()))[0]
            rest = copy.deepcopy(module).requires_grad_(False)
            rest.weight[large] = 0
            rows = v7.Int4Linear(rest, config).rows(slice(len(whole)))
            module.weight.data = torch.where(large, whole, rows)
    loss = v7.evaluate(model, val_ids, config)
    results[LARGEST] = {"bits_per_char": loss * factor, "megabytes": None, "val_loss": loss}
    draw_size(results)
    return results


# --------------------------------------------- other libraries ---------------------------------------------


class WithHead(v7.LanguageModel):
    """v7's model with a linear layer for the logits: the libraries replace only those."""

    def __init__(self, config, vocab_size):
        super().__init__(config, vocab_size)
        self.head = nn.Linear(config.n_embd, vocab_size, bias=False)

    def logits(self, x):
        """Hidden states (..., C) to logits (..., V)."""
        return self.head(x)


def with_head(model):
    """A float model of v7 as WithHead."""
    other = WithHead(model.config, model.token_embedding.num_embeddings).eval()
    other.load_state_dict(model.state_dict() | {"head.weight": model.token_embedding.weight})
    return other


def dynamic(model):
    """PyTorch's dynamic quantization: int8 weights, and activations rounded to int8 as they come."""
    return torch.ao.quantization.quantize_dynamic(with_head(model), {nn.Linear}, dtype=torch.qint8)


def torchao_int8(model):
    """torchao's int8, weights only."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = with_head(model)
    quantize_(model, Int8WeightOnlyConfig())
    return model


def torchao_dynamic(model):
    """torchao's int8 for weights and activations."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = with_head(model)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def bitsandbytes_linears(model, make, multiple=1):
    """The model with make(in, out, bias) for each linear layer whose outputs are a multiple of that."""
    model = with_head(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and child.out_features % multiple == 0:
                small = make(child.in_features, child.out_features, child.bias is not None)
                small.load_state_dict(child.state_dict())
                setattr(parent, name, small.to("cpu"))
    return model


def bitsandbytes_nf4(model):
    """bitsandbytes' 4-bit NormalFloat (Dettmers et al. 2023); its CPU kernel refuses 50,257 outputs."""
    from bitsandbytes.nn import Linear4bit

    options = dict(compute_dtype=torch.float32, quant_type="nf4")
    return bitsandbytes_linears(model, lambda k, n, bias: Linear4bit(k, n, bias=bias, **options), 64)


def bitsandbytes_int8(model):
    """bitsandbytes' int8 (Dettmers et al. 2022)."""
    from bitsandbytes.nn import Linear8bitLt

    return bitsandbytes_linears(
        model, lambda k, n, bias: Linear8bitLt(k, n, bias=bias, has_fp16_weights=False)
    )


OTHERS = {
    "PyTorch, dynamic int8": dynamic,
    "torchao, int8 weights": torchao_int8,
    "torchao, dynamic int8": torchao_dynamic,
    "bitsandbytes, int8": bitsandbytes_int8,
    "bitsandbytes, NF4": bitsandbytes_nf4,
}


@torch.inference_mode()
def others():
    """Tokens per second of 124 million weights and bits per character of v6's model, by other libraries."""
    for name in ("torchao", "bitsandbytes"):
        if not importlib.util.find_spec(name):
            sys.exit(f"error: this compares with {name}: pip install torchao==0.18.0 bitsandbytes==0.50.2")
    idx, config = torch.randint(50257, (1, 32)), v7.Config(greedy=True, max_new_tokens=64)
    makers = {"ours, none": lambda model: v7.quantize(model, replace(model.config, quantize="none"))}
    makers |= {"ours, int8": lambda model: v7.quantize(model, replace(model.config, quantize="int8"))}
    makers["ours, int4"] = lambda model: v7.quantize(model, replace(model.config, quantize="int4"))
    makers |= OTHERS
    functions = {}
    for name, make in makers.items():
        model = make(plain_gpt2())
        functions[name] = lambda model=model: v7.generate(model, idx, config)
    seconds = in_turn(functions)
    checkpoint, settings, (_, val_ids) = trained()
    factor, results = bits_per_nat(checkpoint, settings, val_ids), {}
    for name, make in makers.items():
        model = v7.LanguageModel(settings, settings.vocab_size).eval()
        v7.load_weights(model, checkpoint["model"])
        model = make(model)
        loss = v7.evaluate(model, val_ids, settings)
        results[name] = {"tokens_per_second": 64 / seconds[name]["mean"], "bits_per_char": loss * factor}
        results[name] |= {"seconds": seconds[name]}
    return results | {"machine": machine()}


# ------------------------------------------------- by hand -------------------------------------------------


def by_hand():
    """What a token of GPT-2's smallest costs this machine: bytes, operations, and the seconds of each."""
    matrices = [torch.randn(2048, 2048) for _ in range(2)]
    flops = 2 * 2048**3 / min(seconds_of(lambda: matrices[0] @ matrices[1]) for _ in range(5))
    bandwidth = v7.memory_bandwidth(torch.device("cpu"))
    with torch.device("meta"):
        params = sum(p.numel() for p in v7.LanguageModel(v7.Config(**GPT2), 50257).parameters())
    return {
        "params": params,
        "gflops": flops / 1e9,
        "gb_per_second": bandwidth / 1e9,
        "ms_of_arithmetic": 1000 * 2 * params / flops,
        "ms_of_memory": 1000 * 4 * params / bandwidth,
        "machine": machine(),
    }


@torch.no_grad()
def four_numbers():
    """The example of the log: 0.31, -0.62, 0.05 and 0.9 in int8 and in int4."""
    layer, found = nn.Linear(4, 1, bias=False), {}
    layer.weight[:] = torch.tensor([0.31, -0.62, 0.05, 0.9])
    found["weights"] = layer.weight[0].tolist()
    small = v7.Int8Linear(layer, v7.Config())
    found["int8"] = {
        "scale": small.scales.item(),
        "codes": small.codes[0].tolist(),
        "back": small.rows(0).tolist(),
    }
    small = v7.Int4Linear(layer, v7.Config())
    found["int4"] = {"scale": small.scales[0, 0].item(), "zero": small.zeros[0, 0].item()}
    found["int4"] |= {"codes": small.unpacked(0)[:4].tolist(), "back": small.rows(slice(1))[0].tolist()}
    return found


def samples():
    """What v6's model writes as it is, in int8 and in int4, from the same seed."""
    checkpoint, config, _ = trained()
    tokenizer, texts = v7.make_tokenizer(checkpoint["vocab"]), {}
    prompt = torch.tensor([tokenizer.encode("\n")])
    for kind in v7.KINDS:
        model = v7.load_model(checkpoint["model"], replace(config, quantize=kind), "cpu")
        ids = v7.generate(model, prompt, replace(config, max_new_tokens=120))
        texts[kind] = tokenizer.decode(ids[0].tolist())
    return texts


# --------------------------------------------------- log ---------------------------------------------------


def tables(results):
    """The blocks of logs/week_8.md."""
    week = results["week_8"]
    speeds = [
        [
            name,
            f"{m['megabytes']:.1f}",
            f"{m['tokens_per_second']:.1f} ({m['slowest']:.1f} to {m['fastest']:.1f})",
            f"{m['tokens_per_second'] / week['decode']['transformers, fp32']['tokens_per_second']:.2f}",
            f"{m['gb_per_second']:.1f}",
            f"{m['share']:.0%}",
        ]
        for name, m in week["decode"].items()
        if isinstance(m, dict)
    ]
    speeds.sort(key=lambda row: (not row[0].startswith("transformers"), -float(row[1])))
    first = [
        [name, f"{m['mean']:.2f} ({m['least']:.2f} to {m['most']:.2f})"]
        for name, m in week["prefill"].items()
        if name != "machine"
    ]
    lengths = sorted((int(T), times) for T, times in week["cache"].items() if T != "machine")
    waits = [[T, f"{times['with']:.1f}", f"{times['without']:.0f}"] for T, times in lengths]
    together = [
        [kind, *(f"{week['batch'][kind][rows]:.0f}" for rows in ("1", "2", "4", "8", "16"))]
        for kind in v7.KINDS
    ]
    errors = []
    for name in (*ERRORS, LARGEST):
        m = week["error"][name]
        whole = name in ("none", "int8") or "groups" in name
        errors.append([name, f"{m['megabytes']:.2f}" if whole else "-", f"{m['bits_per_char']:.4f}"])
    others = [
        [name, f"{m['tokens_per_second']:.1f}", f"{m['bits_per_char']:.4f}"]
        for name, m in week["others"].items()
        if name != "machine"
    ]
    blocks = {
        "decode": table(
            ["weights", "MB", "tokens/s", "of transformers' fp32", "GB/s", "of the memory's"], speeds
        ),
        "products": table(
            ["weights", "ms", "GB/s", "of the memory's"],
            [
                [kind, f"{m['ms']:.1f}", f"{m['gb_per_second']:.1f}", f"{m['share']:.0%}"]
                for kind, m in ((kind, week["products"][kind]) for kind in v7.KINDS)
            ],
        ),
        "prefill": table(["weights", "seconds for 512 tokens"], first),
        "cache": table(["tokens before", "with cache, ms", "without, ms"], waits),
        "batch": table(["weights", "1 text", "2", "4", "8", "16"], together),
        "error": table(["what is rounded", "MB", "bits/char"], errors),
        "others": table(["weights", "tokens/s", "bits/char"], others),
        "samples": "\n\n".join(f"{kind}:\n\n```\n{week['samples'][kind].strip()}\n```" for kind in v7.KINDS),
    }
    return {"week_8": blocks}


EXPERIMENTS = {
    "by_hand": by_hand,
    "four_numbers": four_numbers,
    "decode": decode,
    "products": products,
    "prefill": prefill,
    "cache": cache,
    "batch": batch,
    "error": error,
    "others": others,
    "samples": samples,
}

if __name__ == "__main__":
    run_experiments(8, EXPERIMENTS, tables)
