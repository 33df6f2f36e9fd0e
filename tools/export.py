"""Write a trained model in Hugging Face's layout, for transformers and what is built on it.

    python tools/export.py RUN FOLDER     RUN: what a rung from v5 on has written, such as runs/v5_gpt2

Learned positions become a GPT2LMHeadModel, rope a GPTNeoXForCausalLM; both give the logits that ours gives.
The tokenizer is written twice: tokenizer.json for AutoTokenizer, vocab.json and merges.txt for --init_from.
Needs the package tokenizers. FOLDER must be new or empty.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from common import RUNGS, number
from safetensors.torch import save_file

import v5_gpt2
import v8_lora
from bpe_tokenizer import END_OF_TEXT


def load_run(folder):
    """Return Config, vocabulary and weights of a run, the Config as v5 has it; exits if there is none."""
    try:
        checkpoint = torch.load(Path(folder, "checkpoint.pt"), map_location="cpu", weights_only=True)
        version, saved = checkpoint["version"], checkpoint["config"]
        vocab, weights = checkpoint["vocab"], checkpoint["model"]
    except Exception as error:  # a file that is missing, cut short or something else altogether
        reason = str(error).split("\n")[0]
        sys.exit(f"error: there is no checkpoint in {folder} ({reason})")
    if version not in RUNGS or number(version) < 5:
        sys.exit(f"error: {folder} was trained by {version}; only runs of v5 and later rungs can be exported")
    if any(name.endswith(".codes") for name in weights):
        sys.exit(f"error: the model in {folder} is quantized; export the one that it was made from")
    names = ("n_embd", "n_head", "n_layer", "block_size", "position")
    return v5_gpt2.Config(**{name: saved[name] for name in names}), vocab, weights


def published_config(config, vocab_size, end):
    """Return what config.json holds; `end` is the id of <|endoftext|>, None where there is none."""
    shared = {"vocab_size": vocab_size, "tie_word_embeddings": True, "dtype": "float32"}
    shared |= {"bos_token_id": end, "eos_token_id": end, "initializer_range": 0.02, "use_cache": True}
    if config.position == "learned":
        return shared | {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "n_embd": config.n_embd,
            "n_head": config.n_head,
            "n_layer": config.n_layer,
            "n_positions": config.block_size,
            "n_ctx": config.block_size,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
        }
    return shared | {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "hidden_size": config.n_embd,
        "num_attention_heads": config.n_head,
        "num_hidden_layers": config.n_layer,
        "intermediate_size": 4 * config.n_embd,
        "max_position_embeddings": config.block_size,
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": False,
        "attention_bias": True,
        "rope_parameters": {"partial_rotary_factor": 1.0, "rope_theta": 10000.0, "rope_type": "default"},
        # for readers that are older than rope_parameters, llama.cpp's converter among them
        "rotary_pct": 1.0,
        "rotary_emb_base": 10000,
    }


def published_weights(weights, config):
    """Return plain weights with the names and shapes of GPT-2 or GPT-NeoX: the reverse of load_published."""
    learned, theirs = config.position == "learned", {}
    for name, weight in weights.items():
        if learned and weight.dim() == 2 and name.startswith("blocks."):
            weight = weight.T  # as (in, out)
        elif not learned and ".qkv." in name:  # head by head, in each q, k and v
            weight = weight.unflatten(0, (3, config.n_head, -1)).transpose(0, 1).flatten(0, 2)
        prefix = "transformer." if learned else "gpt_neox."
        theirs[prefix + v5_gpt2.published_name(name, config.position)] = weight.float().contiguous()
    return theirs


def published_tokenizer(vocab):
    """Return a `tokenizers` Tokenizer that gives our ids: one of characters, or of byte-level BPE."""
    try:
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    except ImportError:
        sys.exit("error: this needs the package tokenizers: pip install tokenizers")
    ours = v8_lora.make_tokenizer(vocab)
    if not isinstance(vocab, dict):
        tokenizer = Tokenizer(models.WordLevel(ours.ids, unk_token=""))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
        tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ours.special_tokens])
        return tokenizer
    ids = {name: i for i, name in enumerate(ours.names)}
    tokenizer = Tokenizer(models.BPE(ids, [tuple(merge.split(" ")) for merge in vocab["merges"]]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ours.special_tokens])
    return tokenizer


def write_json(path, content):
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


def export(run, folder):
    """Write the model of a run into `folder`, which exists."""
    config, vocab, weights = load_run(run)
    tokenizer = published_tokenizer(vocab)
    size = weights["token_embedding.weight"].shape[0]
    end = tokenizer.token_to_id(END_OF_TEXT)
    write_json(folder / "config.json", published_config(config, size, end))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.block_size}
    settings |= {"clean_up_tokenization_spaces": False}
    settings |= {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT} if end is not None else {}
    write_json(folder / "tokenizer_config.json", settings)
    tokenizer.save(str(folder / "tokenizer.json"))
    if isinstance(vocab, dict):
        write_json(folder / "vocab.json", tokenizer.get_vocab())
        merges = "\n".join(["#version: 0.2", *vocab["merges"], ""])
        (folder / "merges.txt").write_text(merges, encoding="utf-8", newline="\n")
    save_file(published_weights(weights, config), folder / "model.safetensors", metadata={"format": "pt"})


def main():
    if len(sys.argv) != 3:
        sys.exit("error: name a run and a folder to write: python tools/export.py runs/v5_gpt2 exported")
    folder = Path(sys.argv[2])
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        sys.exit(f"error: {folder} is not empty; name a folder that is new")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
            export(sys.argv[1], Path(unfinished))
            shutil.copytree(unfinished, folder, dirs_exist_ok=True)
    except OSError as error:
        sys.exit(f"error: cannot write to {folder} ({error})")
    print(f"{folder}: " + ", ".join(sorted(path.name for path in folder.iterdir())))


if __name__ == "__main__":
    main()
