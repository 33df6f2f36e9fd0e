"""Write a trained model for other programs: in Hugging Face's layout, or as a file for llama.cpp.

    python tools/export.py RUN FOLDER       for transformers and what is built on it
    python tools/export.py RUN FILE.gguf    for llama.cpp and what is built on it, in float32
    python tools/export.py RUN FILE.gguf --type q8_0
                                            the same in fewer bytes: f16, or q8_0, llama.cpp's own 8 bits

RUN is what a rung from v5 on has written, such as runs/v5_gpt2. Learned positions become a GPT-2, rope a
GPT-NeoX; both give the logits that ours gives. A model card lies beside the weights, with the figures of the
run: README.md in a folder, FILE.md beside a file. Nothing that is there is overwritten.

FOLDER has the tokenizer twice: tokenizer.json for AutoTokenizer, vocab.json and merges.txt for --init_from.
It needs the package tokenizers. FILE.gguf needs the package gguf, and a vocabulary of BPE: llama.cpp has no
tokenizer of characters.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import cards
import torch
from common import RUNGS, number
from safetensors.torch import save_file

import v5_gpt2
import v8_lora
from bpe_tokenizer import END_OF_TEXT

TYPES = ("f32", "f16", "q8_0")  # of the matrices in a GGUF file; vectors and positions are float32 in each
# The turns of a conversation as v8's encode_chat writes them; what a system message says is the context.
CHAT_TEMPLATE = """{% for message in messages %}\
{% if message.role in ('system', 'developer') %}<|context|>{% else %}<|{{ message.role }}|>{% endif %}\
{{ message.content }}\
{% if message.role == 'assistant' %}<|endoftext|>{% endif %}\
{% endfor %}\
{% if add_generation_prompt %}<|assistant|>{% endif %}"""


def load_run(folder):
    """Return the rung, Config as v5 has it, vocabulary and weights of a run; exits if there is none."""
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
    return version, v5_gpt2.Config(**{name: saved[name] for name in names}), vocab, weights


def chats(version):
    """Whether a rung's model has learned to read what CHAT_TEMPLATE writes."""
    return number(version) in (8, 9)


# --------------------------------------- Hugging Face's layout ---------------------------------------


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


def full_name(name, position):
    """What a weight of ours is called in the files of a whole GPT-2 (learned positions) or GPT-NeoX."""
    prefix = "transformer." if position == "learned" else "gpt_neox."
    return prefix + v5_gpt2.published_name(name, position)


def published_weights(weights, config):
    """Return plain weights with the names and shapes of GPT-2 or GPT-NeoX: the reverse of load_published."""
    learned, theirs = config.position == "learned", {}
    for name, weight in weights.items():
        if learned and weight.dim() == 2 and name.startswith("blocks."):
            weight = weight.T  # as (in, out)
        elif not learned and ".qkv." in name:  # head by head, in each q, k and v
            weight = weight.unflatten(0, (3, config.n_head, -1)).transpose(0, 1).flatten(0, 2)
        theirs[full_name(name, config.position)] = weight.float().contiguous()
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


def export_folder(run, folder):
    """Write the model of a run into `folder`, which exists, in Hugging Face's layout."""
    version, config, vocab, weights = load_run(run)
    tokenizer = published_tokenizer(vocab)
    size = weights["token_embedding.weight"].shape[0]
    end = tokenizer.token_to_id(END_OF_TEXT)
    write_json(folder / "config.json", published_config(config, size, end))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.block_size}
    settings |= {"clean_up_tokenization_spaces": False}
    settings |= {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT} if end is not None else {}
    settings |= {"chat_template": CHAT_TEMPLATE} if chats(version) else {}
    write_json(folder / "tokenizer_config.json", settings)
    tokenizer.save(str(folder / "tokenizer.json"))
    if isinstance(vocab, dict):
        write_json(folder / "vocab.json", tokenizer.get_vocab())
        merges = "\n".join(["#version: 0.2", *vocab["merges"], ""])
        (folder / "merges.txt").write_text(merges, encoding="utf-8", newline="\n")
    save_file(published_weights(weights, config), folder / "model.safetensors", metadata={"format": "pt"})
    cards.write_card(folder / "README.md", run, version)


# ------------------------------------------- a GGUF file -------------------------------------------


def gguf_weights(weights, config, gguf):
    """Return plain weights in float32 with llama.cpp's names; their shapes are ours."""
    arch = gguf.MODEL_ARCH.GPT2 if config.position == "learned" else gguf.MODEL_ARCH.GPTNEOX
    names = gguf.get_tensor_name_map(arch, config.n_layer)  # from those of Hugging Face
    theirs = {}
    for name, weight in weights.items():
        name = names.get_name(full_name(name, config.position), try_suffixes=(".weight", ".bias"))
        theirs[name] = weight.float().contiguous().numpy()
    if config.position == "rope":  # llama.cpp lets a GPT-2 share this tensor, a GPT-NeoX not
        theirs["output.weight"] = theirs["token_embd.weight"]
    return theirs


def describe(writer, config, run, kind, gguf):
    """Give a GGUFWriter the shape of the model."""
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(Path(run).resolve().name)
    files = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(gguf.LlamaFileType[files[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(1e-5)
    if config.position == "rope":
        writer.add_rope_dimension_count(config.n_embd // config.n_head)
        writer.add_rope_freq_base(10_000.0)
        writer.add_parallel_residual(False)


def add_tokenizer(writer, version, vocab, gguf):
    """Give a GGUFWriter a vocabulary of byte-level BPE."""
    ours = v8_lora.make_tokenizer(vocab)
    special, plain = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre("gpt-2")  # whose split into words is SPLIT of bpe_tokenizer
    writer.add_token_list(ours.names)
    writer.add_token_types([special if name in ours.special_tokens else plain for name in ours.names])
    writer.add_token_merges(vocab["merges"])
    writer.add_add_bos_token(False)
    if (end := ours.special_tokens.get(END_OF_TEXT)) is not None:
        writer.add_bos_token_id(end)
        writer.add_eos_token_id(end)
    if chats(version):
        writer.add_chat_template(CHAT_TEMPLATE)


def export_gguf(run, path, kind):
    """Write the model of a run to the file `path` in GGUF, its matrices as `kind`, one of TYPES."""
    try:
        import gguf
    except ImportError:
        sys.exit("error: this needs the package gguf: pip install gguf")
    version, config, vocab, weights = load_run(run)
    if not isinstance(vocab, dict) or not vocab["merges"]:
        reason = "llama.cpp reads the tokens of a BPE that has learned merges, not characters or bytes alone"
        sys.exit(f"error: the vocabulary of {run} has no merges; {reason}")
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q8_0][0]
    if kind == "q8_0" and config.n_embd % block:
        reason = f"q8_0 packs {block} neighbours of a row, and n_embd is {config.n_embd}"
        sys.exit(f"error: {reason}; choose --type f16 or f32")
    writer = gguf.GGUFWriter(path, "gpt2" if config.position == "learned" else "gptneox")
    describe(writer, config, run, kind, gguf)
    add_tokenizer(writer, version, vocab, gguf)
    for name, weight in gguf_weights(weights, config, gguf).items():
        is_matrix = weight.ndim == 2 and name != "position_embd.weight"
        as_type = gguf.GGMLQuantizationType[kind.upper() if is_matrix else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(weight, as_type), raw_dtype=as_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    cards.write_card(path.with_suffix(".md"), run, version, gguf_type=kind)


# ----------------------------------------------- main -----------------------------------------------


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.error = lambda message: sys.exit(
        f"error: {message}; name a run and what to write: python tools/export.py runs/v5_gpt2 exported"
    )
    parser.add_argument("run", metavar="RUN", help="folder of a trained model")
    parser.add_argument("target", metavar="FOLDER or FILE.gguf", help="what to write; it must be new")
    parser.add_argument("--type", choices=TYPES, help="of the matrices in a GGUF file (default: f32)")
    args = parser.parse_args()
    if args.type and not args.target.endswith(".gguf"):
        sys.exit("error: --type is for a GGUF file; end its name in .gguf")
    return args


def main():
    args = parse_args()
    target, is_file = Path(args.target), args.target.endswith(".gguf")
    if is_file:
        if taken := [path for path in (target, target.with_suffix(".md")) if path.exists()]:
            sys.exit(f"error: {taken[0]} is there already; name a file that is new")
    elif target.exists() and (not target.is_dir() or any(target.iterdir())):
        sys.exit(f"error: {target} is not empty; name a folder that is new")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as unfinished:
            if is_file:
                export_gguf(args.run, Path(unfinished, target.name), args.type or "f32")
            else:
                export_folder(args.run, Path(unfinished))
                target.mkdir(exist_ok=True)
            for path in Path(unfinished).iterdir():
                shutil.move(path, target.parent if is_file else target)
    except OSError as error:
        sys.exit(f"error: cannot write to {target} ({error})")
    files = [target, target.with_suffix(".md")] if is_file else sorted(target.iterdir())
    print(f"{target.parent if is_file else target}: " + ", ".join(path.name for path in files))


if __name__ == "__main__":
    main()
