"""The model cards: logs/card_base.md and the others, which tools/export.py puts beside the weights.

A card's blocks hold what a run has measured. In logs/ they are those of the published runs, from
logs/results.json; `tools/reproduce.py --tables` fills them. Beside exported weights they are those of the run
that was exported, from its metrics.json: no card has figures of another model than its own.
"""

import importlib
import json
import shlex
import shutil
from dataclasses import asdict
from pathlib import Path

from common import LOGS, fill, load_results, number, table

# What a card is about, and the rung whose published run fills it.
CARDS = {"base": "v6_amp_ddp", "finetuned": "v8_lora", "aligned": "v9_rlhf", "quantized": "v6_amp_ddp"}
UNKNOWN = "Not measured."

LOAD = {
    "base": """```python
from transformers import pipeline

write = pipeline("text-generation", "FOLDER")
print(write("ROMEO:\\n", max_new_tokens=100, do_sample=True)[0]["generated_text"])
```""",
    "chat": """```python
from transformers import pipeline

answer = pipeline("text-generation", "FOLDER")
turns = [
    {"role": "system", "content": "GREMIO:\\nGood morrow, neighbour Baptista."},
    {"role": "user", "content": "Who says: Good morrow, neighbour Baptista."},
]
print(answer(turns, max_new_tokens=50, do_sample=False)[0]["generated_text"][-1]["content"])
```""",
    "gguf": """```
llama-server -m FILE.gguf
```

It listens at `http://127.0.0.1:8080` and speaks OpenAI's API at `/v1`.""",
}


# What a card shows of metrics.json, as far as a run has measured it: the name there, and how it looks here
TEXT = {
    "val_loss": ("val loss, nats per token", "{:.4f}"),
    "perplexity": ("perplexity per token", "{:.2f}"),
    "bits_per_char": ("bits per character", "{:.4f}"),
    "train_loss": ("loss on as much text of the training split", "{:.4f}"),
}
ANSWERS = {
    "names_right": ("new names right", "{:.1%}"),
    "without_passage": ("names right without the passage", "{:.1%}"),
    "answers_ended": ("answers that end by themselves", "{:.1%}"),
    "reply_loss": ("loss of replies, nats per token", "{:.4f}"),
    "preferred": ("preferred to the other's reply", "{:.1%}"),
    "truth": ("the annotator's own score", "{:.2f}"),
    "score": ("the reward model's score", "{:.2f}"),
    "kl": ("KL from the model before, nats a reply", "{:.2f}"),
    "bits_per_char": ("plain text, bits per character", "{:.4f}"),
}


def training(metrics):
    """How long and where a model was trained, as a list."""
    lines = ["- {steps:,} steps, {tokens:,} tokens, {seconds:,.0f} seconds".format(**metrics)]
    where = metrics.get("machine") or "{threads} threads on {device}".format(**metrics)
    return "\n".join([*lines, f"- {where}, PyTorch {metrics['torch']}"])


def evaluation(kind, metrics):
    """The table of what a run has measured; `kind` is one of CARDS."""
    size = f"{metrics['params']:,}"
    if kind in ("base", "quantized"):
        rows = [
            [words, form.format(metrics[name])] for name, (words, form) in TEXT.items() if name in metrics
        ]
        return table(["", "value"], [["parameters", size], *rows])
    before = metrics["before"]
    rows = [
        [words, form.format(before[name]), form.format(metrics[name])]
        for name, (words, form) in ANSWERS.items()
        if name in metrics and name in before
    ]
    return table(["", "before", "after"], [["parameters", size, size], *rows])


def eight_bits(results):
    """What 8 and 4 bits a weight cost the published base model, in v7's own formats."""
    rows = []
    for kind, m in results["rungs"]["v7_quantize"]["compared"].items():
        name = "as it was, float32" if kind == "none" else kind
        rows.append([name, f"{m['megabytes']:.2f}", f"{m['val_loss']:.4f}", f"{m['bits_per_char']:.4f}"])
    rows.sort(key=lambda row: -float(row[1]))
    return table(["weights", "megabytes", "val loss", "bits per character"], rows)


def blocks(kind, metrics, use):
    """The blocks of a card, for the `metrics` of a run, {} if there are none; `use` is a key of LOAD."""
    known = {"use": LOAD[use]}
    known["training"] = training(metrics) if metrics else UNKNOWN
    known["evaluation"] = evaluation(kind, metrics) if metrics else UNKNOWN
    return known


def published_blocks(results):
    """The blocks of all cards in logs/, {kind: {name of a block: text}}."""
    cards = {}
    for kind, rung in CARDS.items():
        use = {"base": "base", "quantized": "gguf"}.get(kind, "chat")
        cards[kind] = blocks(kind, results["rungs"].get(rung, {}), use)
    cards["quantized"]["formats"] = eight_bits(results)
    return cards


def rounded(gguf_type):
    """What a card says of the weights in a GGUF file, which are those of the figures but for rounding."""
    if gguf_type in (None, "f32"):
        return ""
    return (
        f"> The matrices in this file are rounded to {gguf_type}. The figures are those before rounding.\n\n"
    )


def note(version, metrics):
    """What a card says first if the run is not the published one, with the flags that are no defaults."""
    published = load_results()["rungs"].get(version, {}).get("bits_per_char")
    if metrics and published is not None and round(metrics["bits_per_char"], 6) == published:
        return ""
    told = f"Not the model that the project publishes: this one is from another run of `{version}.py`"
    defaults = asdict(importlib.import_module(version).Config())
    flags = []
    for name, value in metrics.get("config", {}).items():
        if name != "out_dir" and value != defaults.get(name, value):
            flags += [f"--{name}", str(value)]
    told += f" with `{shlex.join(flags)}`" if flags else ""
    return f"> {told}. Read what is said of data and training with that in mind; the figures are its own.\n\n"


def write_card(path, run, version, gguf_type=None):
    """Write the card of an exported run to `path`; `gguf_type` is that of a GGUF file, None for a folder."""
    kind = {8: "finetuned", 9: "aligned"}.get(number(version), "base")
    use = "gguf" if gguf_type else "base" if kind == "base" else "chat"
    try:
        metrics = json.loads(Path(run, "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        metrics = {}
    if "bits_per_char" not in metrics:  # a run that was stopped, or v7's own base: nothing was measured
        metrics = {}
    source = "quantized" if gguf_type == "q8_0" and kind == "base" else kind
    shutil.copy(LOGS / f"card_{source}.md", path)
    fill(path, blocks(source, metrics, use))
    text = path.read_text(encoding="utf-8")
    if gguf_type:
        text = text.replace("library_name: transformers", "library_name: gguf", 1)
    head, title, rest = text.partition("\n# ")
    line, rest = rest.split("\n\n", 1)
    told = note(version, metrics) + ("" if source == "quantized" else rounded(gguf_type))
    path.write_text(f"{head}{title}{line}\n\n{told}{rest}", encoding="utf-8", newline="\n")
