"""A GPT-2 transformer with random weights, as large as a given model: as Hugging Face safetensors and as GGUF files.

Stands alone: it needs numpy and gguf and runs with the interpreter of the peers' tools, not of this project.
The same numbers go into every file, so that all peers compute the same network:

    python transformer.py OUT_DIR --like MODEL_DIR
"""

from __future__ import annotations

import argparse
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEED = 0
STANDARD_DEVIATION = 0.02
"""Of all matrices, as GPT-2 begins its training."""
BF16, Q8_0 = "bf16", "q8_0"


@dataclass(frozen=True, slots=True)
class Sizes:
    """What determines the network. The last `hidden_ids` of the vocabulary get embeddings of zero: they are half
    characters and the end of a text, and a random network with tied embeddings never prefers them to all others."""

    num_layers: int
    width: int
    num_heads: int
    vocab_size: int
    context: int
    hidden_ids: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """One parameter by both names. `array` is what Hugging Face stores; GGUF has matrices of layers transposed."""

    name: str
    gguf_name: str
    array: Any
    is_transposed: bool = False


def tensors(sizes: Sizes) -> Iterator[Tensor]:
    """All parameters in float32, always in the same order, so that equal sizes give equal numbers."""
    import numpy as np

    random = np.random.default_rng(SEED)
    d, v = sizes.width, sizes.vocab_size

    def drawn(*shape: int) -> Any:
        return random.standard_normal(shape, dtype=np.float32) * np.float32(STANDARD_DEVIATION)

    def norm(name: str, gguf_name: str) -> Iterator[Tensor]:
        yield Tensor(f"{name}.weight", f"{gguf_name}.weight", np.ones(d, np.float32))
        yield Tensor(f"{name}.bias", f"{gguf_name}.bias", np.zeros(d, np.float32))

    def linear(name: str, gguf_name: str, num_in: int, num_out: int) -> Iterator[Tensor]:
        yield Tensor(f"{name}.weight", f"{gguf_name}.weight", drawn(num_in, num_out), is_transposed=True)
        yield Tensor(f"{name}.bias", f"{gguf_name}.bias", np.zeros(num_out, np.float32))

    embeddings = drawn(v, d)
    embeddings[v - sizes.hidden_ids :] = 0
    yield Tensor("transformer.wte.weight", "token_embd.weight", embeddings)
    yield Tensor("transformer.wpe.weight", "position_embd.weight", drawn(sizes.context, d))
    for i in range(sizes.num_layers):
        layer, block = f"transformer.h.{i}", f"blk.{i}"
        yield from norm(f"{layer}.ln_1", f"{block}.attn_norm")
        yield from linear(f"{layer}.attn.c_attn", f"{block}.attn_qkv", d, 3 * d)
        yield from linear(f"{layer}.attn.c_proj", f"{block}.attn_output", d, d)
        yield from norm(f"{layer}.ln_2", f"{block}.ffn_norm")
        yield from linear(f"{layer}.mlp.c_fc", f"{block}.ffn_up", d, 4 * d)
        yield from linear(f"{layer}.mlp.c_proj", f"{block}.ffn_down", 4 * d, d)
    yield from norm("transformer.ln_f", "output_norm")


def write_hugging_face(sizes: Sizes, tokenizer: Path, directory: Path) -> None:
    """A model directory in bfloat16."""
    directory.mkdir(parents=True, exist_ok=True)
    _save_safetensors(((tensor.name, tensor.array) for tensor in tensors(sizes)), directory / "model.safetensors")
    end = sizes.vocab_size - 1
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": sizes.num_layers,
        "n_embd": sizes.width,
        "n_head": sizes.num_heads,
        "n_positions": sizes.context,
        "n_ctx": sizes.context,
        "vocab_size": sizes.vocab_size,
        "bos_token_id": end,
        "eos_token_id": end,
        "activation_function": "gelu_new",
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    (directory / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps({**names, "model_max_length": sizes.context}))


def _save_safetensors(named: Iterator[tuple[str, Any]], path: Path) -> None:
    """In bfloat16, which numpy has no type for: the format is a length, a JSON header and the bytes."""
    from gguf.constants import GGMLQuantizationType  # type: ignore[import-not-found]
    from gguf.quants import quantize  # type: ignore[import-not-found]

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blobs: list[bytes] = []
    offset = 0
    for name, array in named:
        blob = quantize(array, GGMLQuantizationType.BF16).tobytes()
        header[name] = {"dtype": "BF16", "shape": list(array.shape), "data_offsets": [offset, offset + len(blob)]}
        blobs.append(blob)
        offset += len(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.writelines(blobs)


def write_gguf(sizes: Sizes, tokenizer: Path, path: Path, weights: str) -> None:
    """One file, matrices and embeddings in `weights`; vectors and positions in float32, as llama.cpp keeps them."""
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType  # type: ignore[import-not-found]
    from gguf.quants import quantize

    kind = {BF16: GGMLQuantizationType.BF16, Q8_0: GGMLQuantizationType.Q8_0}[weights]
    writer = GGUFWriter(path, "gpt2")
    writer.add_name(path.stem)
    writer.add_context_length(sizes.context)
    writer.add_embedding_length(sizes.width)
    writer.add_block_count(sizes.num_layers)
    writer.add_feed_forward_length(4 * sizes.width)
    writer.add_head_count(sizes.num_heads)
    writer.add_layer_norm_eps(1e-5)
    writer.add_file_type(LlamaFileType.MOSTLY_BF16 if weights == BF16 else LlamaFileType.MOSTLY_Q8_0)
    _add_tokenizer(writer, json.loads(tokenizer.read_text()))
    for tensor in tensors(sizes):
        array = tensor.array.T.copy() if tensor.is_transposed else tensor.array
        if array.ndim == 2 and tensor.gguf_name != "position_embd.weight":
            writer.add_tensor(tensor.gguf_name, quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor.gguf_name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: Any, tokenizer: dict[str, Any]) -> None:
    from gguf import TokenType

    vocabulary = {**tokenizer["model"]["vocab"], **{t["content"]: t["id"] for t in tokenizer["added_tokens"]}}
    special = {token["id"] for token in tokenizer["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if i in special else TokenType.NORMAL for i in range(len(tokens))])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(len(tokens) - 1)
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_add_bos_token(False)


def read_sizes(model: Path, context: int) -> Sizes:
    """Layers, width, heads and vocabulary of a model directory of this project's."""
    config = json.loads((model / "config.json").read_text())
    return Sizes(
        num_layers=config["n_layer"],
        width=config["n_embd"],
        num_heads=config["n_head"],
        vocab_size=config["vocab_size"],
        context=context,
        hidden_ids=config["vocab_size"] - config["tokenizer_vocab_size"],
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, help="directory to write")
    parser.add_argument("--like", type=Path, required=True, help="model directory with the sizes and the tokenizer")
    parser.add_argument("--context", type=int, default=1024, help="positions (default: %(default)s)")
    options = parser.parse_args()
    sizes, tokenizer = read_sizes(options.like, options.context), options.like / "tokenizer.json"
    write_hugging_face(sizes, tokenizer, options.out / "hugging-face")
    for weights in (BF16, Q8_0):
        write_gguf(sizes, tokenizer, options.out / f"{weights}.gguf", weights)


if __name__ == "__main__":
    main()
