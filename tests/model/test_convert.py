"""The converter: every published option, parity with the published code, and refusals that say why."""

import argparse
import copy
import math
import os
import pickle
import stat
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model import convert
from model.checkpoint import load_model
from model.config import MosaicConfig
from model.convert import convert_checkpoint, main, read_conversion
from model.gpt2_tokenizer import byte_level_bpe_json
from model.published import ConversionError
from tests.model.published_checkpoints import Checkpoint, library_checkpoint, nano_checkpoint, published_logits
from tests.model.small_bpe import ranks

REFERENCES = Path(__file__).parent / "references"
TOKENS = torch.randint(0, 41, (9,), generator=torch.Generator().manual_seed(3))


def written(directory: Path, checkpoint: Any) -> Path:
    path = directory / "ckpt.pt"
    torch.save(checkpoint, path)
    return path


def refusal(directory: Path, checkpoint: Any, **options: Any) -> str:
    """The message with which a checkpoint is refused; nothing may be left behind."""
    out_dir = directory / "out"
    with pytest.raises(ConversionError) as caught:
        convert_checkpoint(written(directory, checkpoint), out_dir, **options)
    assert [path.name for path in directory.iterdir() if path.suffix != ".json"] == ["ckpt.pt"]
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What the definition in published_checkpoints says is what the published code computed.


@pytest.mark.parametrize("name", ["library", "library-eft", "library-edge", "nanomosaics"])
def test_the_definition_agrees_with_the_published_code(name: str) -> None:
    checkpoint = torch.load(REFERENCES / name / "ckpt.pt", weights_only=True)
    expected = load_file(REFERENCES / name / "expected.safetensors")
    logits = published_logits(checkpoint, expected["tokens"][0])
    torch.testing.assert_close(logits, expected["logits_float64"][0], rtol=1e-9, atol=1e-9)


VARIANTS: dict[str, Checkpoint] = {
    "library": library_checkpoint(),
    "library compiled": library_checkpoint(prefix="_orig_mod."),
    "library eft": library_checkpoint(eft=True),
    "library eft, all options": library_checkpoint(
        eft=True, prefix="_orig_mod.", bias=True, weight_tying=False, pre_ln=False, pmem_count=2, v_fe_type="linearconv"
    ),
    "library banks": library_checkpoint(pmem_count=11, pmem_size=3),
    "library untied": library_checkpoint(weight_tying=False),
    "library post-LN": library_checkpoint(pre_ln=False),
    "library post-LN, bias, attn_only": library_checkpoint(pre_ln=False, bias=True, attn_only=True),
    "library attn_only": library_checkpoint(attn_only=True),
    "library bias": library_checkpoint(bias=True),
    "library linearconv": library_checkpoint(v_fe_type="linearconv"),
    "library linearconv, bias": library_checkpoint(v_fe_type="linearconv", bias=True),
    "library scales beyond the bound": library_checkpoint(log_scale=2.0, crowded=True),
    "library one head, odd sizes": library_checkpoint(n_head=1, n_embd=5, n_layer=1, vocab_size=43, pmem_size=1),
    "library one channel a head": library_checkpoint(n_head=12, eft=True),
    "nano": nano_checkpoint(),
    "nano compiled, bias": nano_checkpoint(prefix="_orig_mod.", bias=True),
    "nano banks": nano_checkpoint(pmem_count=3),
    "nano scales beyond the bound": nano_checkpoint(log_scale=2.0, crowded=True),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_converted_model_computes_what_the_checkpoint_means(tmp_path: Path, variant: str) -> None:
    checkpoint = VARIANTS[variant]
    config = convert_checkpoint(written(tmp_path, checkpoint), tmp_path / "out")
    model = load_model(tmp_path / "out", dtype=torch.float64)
    assert model.config == config
    logits = model(TOKENS[None])[0]
    torch.testing.assert_close(logits, published_logits(checkpoint, TOKENS), rtol=1e-9, atol=1e-9)


def test_later_nano_release_bounds_its_scales_lower(tmp_path: Path) -> None:
    checkpoint = nano_checkpoint(log_scale=2.0, crowded=True)
    path = written(tmp_path, checkpoint)
    config = convert_checkpoint(path, tmp_path / "out", key_log_scale_max=5)
    assert (config.key_log_scale_max, config.persistent_key_log_scale_max) == (5, 5)
    logits = load_model(tmp_path / "out", dtype=torch.float64)(TOKENS[None])[0]
    torch.testing.assert_close(logits, published_logits(checkpoint, TOKENS, nano_bound=5), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(logits, published_logits(checkpoint, TOKENS), rtol=1e-3)


def test_where_the_nano_releases_differ_it_is_said(tmp_path: Path) -> None:
    beyond = read_conversion(written(tmp_path, nano_checkpoint(log_scale=2.0)))
    assert any("--key-log-scale-max 5" in note for note in beyond.notes())
    within = read_conversion(written(tmp_path, nano_checkpoint(log_scale=0.05)))
    assert not any("--key-log-scale-max" in note for note in within.notes())


def test_the_published_variants_become_numbers(tmp_path: Path) -> None:
    library = read_conversion(written(tmp_path, library_checkpoint(pmem_count=2))).config
    nano = read_conversion(written(tmp_path, nano_checkpoint())).config
    assert (library.key_log_scale_max, library.persistent_key_log_scale_max) == (5, 10)
    assert nano.key_log_scale_max == nano.persistent_key_log_scale_max == math.log(65535)
    assert (library.norm_eps, nano.norm_eps) == (0, 1e-10)
    assert (library.logit_scale, nano.logit_scale) == (12**-0.5, 1)
    assert (library.pmem_count, library.tokenizer_vocab_size, library.eos_token_id) == (2, None, None)


def test_half_precision_weights_are_stored_as_float32(tmp_path: Path) -> None:
    checkpoint = library_checkpoint()
    checkpoint["model"] = {name: tensor.half() for name, tensor in checkpoint["model"].items()}
    convert_checkpoint(written(tmp_path, checkpoint), tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert torch.equal(weights["embedding.weight"], checkpoint["model"]["emb.weight"].float())


def test_files_in_torchs_older_format_are_read(tmp_path: Path) -> None:
    torch.save(library_checkpoint(), tmp_path / "ckpt.pt", _use_new_zipfile_serialization=False)
    convert_checkpoint(tmp_path / "ckpt.pt", tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()


# The tokenizer.


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    path = tmp_path / "small.json"
    path.write_text(byte_level_bpe_json(ranks()))
    return path


def test_tokenizer_is_copied_and_recorded(tmp_path: Path, tokenizer: Path) -> None:
    path = written(tmp_path, library_checkpoint(vocab_size=304))
    config = convert_checkpoint(path, tmp_path / "out", tokenizer)
    assert (config.vocab_size, config.tokenizer_vocab_size, config.eos_token_id) == (304, 286, 285)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == tokenizer.read_text()
    assert MosaicConfig.load(tmp_path / "out" / "config.json") == config
    assert "Ids 286 to 303 are padding" in (tmp_path / "out" / "README.md").read_text()


def test_gpt2_tokenizer_is_built(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "gpt2_tokenizer_json", tokenizer.read_text)
    config = convert_checkpoint(written(tmp_path, library_checkpoint(vocab_size=304)), tmp_path / "out", "gpt2")
    assert (config.tokenizer_vocab_size, config.eos_token_id) == (286, 285)


def test_tokenizer_larger_than_the_model_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    message = refusal(tmp_path, library_checkpoint(), tokenizer=tokenizer)
    assert "286 tokens" in message
    assert "41" in message


def test_unusable_tokenizers_are_refused(tmp_path: Path) -> None:
    assert "no such tokenizer file" in refusal(tmp_path, library_checkpoint(), tokenizer=tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    assert "not a tokenizer.json" in refusal(tmp_path, library_checkpoint(), tokenizer=tmp_path / "bad.json")


# What cannot be represented is refused by name.


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("v_shift", 2),
        ("v_shift", True),
        ("k_kernel_size", 2),
        ("v_kernel_size", 3),
        ("k_fe_type", "lowrlinearconv"),
        ("v_fe_type", "reluconv"),
        ("attn_only", "yes"),
    ],
)
def test_unsupported_options_are_refused_by_name(tmp_path: Path, option: str, value: object) -> None:
    checkpoint = library_checkpoint()
    checkpoint["model_args"][option] = value
    assert f"{option}={value!r} is not supported" in refusal(tmp_path, checkpoint)


@pytest.mark.parametrize("option", ["pre_ln", "n_head", "v_shift", "weight_tying", "pmem_size"])
def test_missing_arguments_are_named(tmp_path: Path, option: str) -> None:
    checkpoint = library_checkpoint()
    del checkpoint["model_args"][option]
    assert f"model_args lack '{option}'" in refusal(tmp_path, checkpoint)


@pytest.mark.parametrize(("option", "value"), [("n_head", 5), ("n_embd", "12"), ("n_layer", 0), ("bias", 1)])
def test_nonsense_arguments_are_named(tmp_path: Path, option: str, value: object) -> None:
    checkpoint = library_checkpoint()
    checkpoint["model_args"][option] = value
    assert option in refusal(tmp_path, checkpoint)


def baseline(**entries: Any) -> Checkpoint:
    state = {"transformer.wte.weight": torch.ones(4, 4), "transformer.h.0.attn.c_attn.weight": torch.ones(12, 4)}
    return {"model": state, "model_args": {"n_layer": 1}, **entries}


def test_baselines_are_refused(tmp_path: Path) -> None:
    assert "GPT baseline" in refusal(tmp_path, baseline())
    assert "model_type is 'gpt'" in refusal(tmp_path, baseline(config={"model_type": "gpt"}))


def test_other_models_are_refused(tmp_path: Path) -> None:
    checkpoint = {"model": {f"layers.{n}.weight": torch.ones(1) for n in range(5)}, "model_args": {}}
    message = refusal(tmp_path, checkpoint)
    assert "layers.0.weight" in message
    assert "and 2 more" in message


def edited(
    edit: Callable[[dict[str, Any]], Any], make: Callable[..., Checkpoint] = library_checkpoint, **o: Any
) -> Any:
    checkpoint = copy.deepcopy(make(**o))
    edit(checkpoint["model"])
    return checkpoint


KEY = "blocks.1.attn.k_featurizer.conv.weight"
EFT_LEAK = "blocks.1.pmem.leaky_average.leaky_beta_{}_under"


@pytest.mark.parametrize(
    ("checkpoint", "complaint"),
    [
        (edited(lambda m: m.pop(KEY)), f"missing tensors: {KEY}"),
        (edited(lambda m: m.update(extra=torch.ones(1))), "unknown tensors: extra"),
        (edited(lambda m: m.update({"blocks.0.ln1.bias": torch.ones(12)})), "unknown tensors: blocks.0.ln1.bias"),
        (edited(lambda m: m.update({KEY: m[KEY][..., 0]})), f"{KEY} has shape [12, 12]"),
        (edited(lambda m: m.update({KEY: m[KEY] * math.nan})), f"{KEY} holds numbers that are not finite"),
        (edited(lambda m: m.update({KEY: m[KEY].double() * 1e300})), f"{KEY} holds numbers that are not finite"),
        (edited(lambda m: m.update({KEY: m[KEY].int()})), f"{KEY} is not a dense tensor of floating-point"),
        (edited(lambda m: m.update({KEY: "text"})), f"{KEY} is not a tensor"),
        (edited(lambda m: m.update({"_orig_mod." + KEY: m[KEY]})), f"{KEY} is there twice"),
        (edited(lambda m: m.update({"head.weight": m["head.weight"] + 1})), "emb.weight and head.weight differ"),
        (
            edited(lambda m: m.update({EFT_LEAK.format("u"): m[EFT_LEAK.format("w")] + 1}), eft=True),
            f"{EFT_LEAK.format('w')} and {EFT_LEAK.format('u')} differ",
        ),
        (
            edited(lambda m: m.update({EFT_LEAK.format("w"): torch.ones(12)}), eft=True),
            f"{EFT_LEAK.format('w')} holds a leak per channel",
        ),
        (edited(lambda m: m.pop("mosaic.h.0.mlp.P_k"), nano_checkpoint), "missing tensors: mosaic.h.0.mlp.P_k"),
        (
            edited(lambda m: m.update({"lm_head.bias": torch.ones(41)}), nano_checkpoint),
            "unknown tensors: lm_head.bias",
        ),
    ],
)
def test_unfitting_tensors_are_named(tmp_path: Path, checkpoint: Checkpoint, complaint: str) -> None:
    assert complaint in refusal(tmp_path, checkpoint)


# Files that are no such checkpoint.


def test_missing_files_and_directories(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="no such file"):
        convert_checkpoint(tmp_path / "none.pt", tmp_path / "out")
    with pytest.raises(ConversionError, match="a directory"):
        convert_checkpoint(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04" + bytes(50), pickle.dumps([1, 2])])
def test_files_that_torch_did_not_write(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "ckpt.pt").write_bytes(content)
    with pytest.raises(ConversionError, match=r"ckpt\.pt: "):
        convert_checkpoint(tmp_path / "ckpt.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_truncated_checkpoint(tmp_path: Path) -> None:
    path = written(tmp_path, library_checkpoint())
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(ConversionError, match=r"not a file written by torch\.save"):
        convert_checkpoint(path, tmp_path / "out")


@pytest.mark.parametrize("entry", [torch.ones(2), {"state_dict": {}}, {"model": {}}, {"model": [], "model_args": {}}])
def test_files_of_torch_that_hold_something_else(tmp_path: Path, entry: Any) -> None:
    assert "not a" in refusal(tmp_path, entry)


class Exploit:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploited",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = {**library_checkpoint(), "config": Exploit()}
    torch.save(checkpoint, tmp_path / "ckpt.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ConversionError) as caught:
        convert_checkpoint(tmp_path / "ckpt.pt", tmp_path / "out")
    assert not (tmp_path / "exploited").exists()
    if zipped:
        assert "mkdir" in str(caught.value)


def test_arguments_kept_as_a_namespace_are_refused_with_its_name(tmp_path: Path) -> None:
    checkpoint = library_checkpoint()
    checkpoint["model_args"] = argparse.Namespace(**checkpoint["model_args"])
    assert "argparse.Namespace" in refusal(tmp_path, checkpoint)


# What is written, and where.


def test_writes_the_four_files_readable_by_all(tmp_path: Path, tokenizer: Path) -> None:
    path = written(tmp_path, library_checkpoint(vocab_size=304))
    convert_checkpoint(path, tmp_path / "new" / "out", tokenizer)
    files = {file.name: stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "new" / "out").iterdir()}
    assert set(files) == {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert len(set(files.values())) == 1, "one file's permissions differ"


def test_an_empty_directory_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    convert_checkpoint(written(tmp_path, library_checkpoint()), tmp_path / "out")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors", "README.md"}


def test_a_directory_in_use_is_left_alone(tmp_path: Path) -> None:
    path = written(tmp_path, library_checkpoint())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(ConversionError, match="not empty"):
        convert_checkpoint(path, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine"]
    with pytest.raises(ConversionError, match="not a directory"):
        convert_checkpoint(path, path)


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("failing", ["model_card", "save_model"])
def test_a_failure_midway_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool, failing: str
) -> None:
    def fail(*arguments: Any) -> None:
        if failing == "save_model":
            (arguments[2] / "model.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    out_dir = tmp_path / "out"
    if exists:
        out_dir.mkdir()
    path = written(tmp_path, library_checkpoint())
    monkeypatch.setattr(convert, failing, fail)
    with pytest.raises(OSError, match="disk full"):
        convert_checkpoint(path, out_dir)
    assert out_dir.exists() == exists
    assert {file.name for file in tmp_path.rglob("*")} == ({"ckpt.pt", "out"} if exists else {"ckpt.pt"})


def test_a_failing_move_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, library_checkpoint())
    (tmp_path / "out").mkdir()
    rename = Path.rename

    def fail_at_the_configuration(self: Path, target: Path) -> Path:
        if Path(target).name == "config.json" and Path(target).parent == tmp_path / "out":
            raise OSError("disk gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_at_the_configuration)
    with pytest.raises(OSError, match="disk gone"):
        convert_checkpoint(path, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


# The command line.


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, library_checkpoint())
    assert main([str(path), str(tmp_path / "out")]) == 0
    shown = capsys.readouterr()
    assert "Library" in shown.out
    assert str(tmp_path / "out") in shown.out
    assert "token ids only" in shown.err


def test_command_line_hints_at_gpt2_for_its_vocabulary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(written(tmp_path, library_checkpoint(vocab_size=50304))), str(tmp_path / "out")])
    assert "--tokenizer gpt2" in capsys.readouterr().err


def test_errors_are_one_line_and_exit_code_2(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "model.convert",
        str(tmp_path / "a long name [red] none.pt"),
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [f"error: {tmp_path / 'a long name [red] none.pt'}: no such file"]


def test_offline_gpt2_is_one_line_naming_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable() -> str:
        raise convert.TokenizerDataError("needs r50k_base.tiktoken")

    monkeypatch.setattr(convert, "gpt2_tokenizer_json", unreachable)
    assert main([str(written(tmp_path, library_checkpoint())), str(tmp_path / "out"), "--tokenizer", "gpt2"]) == 2
    assert capsys.readouterr().err.splitlines() == ["error: needs r50k_base.tiktoken"]


def test_optimizer_state_does_not_stand_in_the_way(tmp_path: Path) -> None:
    checkpoint = library_checkpoint()
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3, fused=True)
    parameter.grad = torch.ones(3)
    optimizer.step()
    checkpoint["optimizer"] = optimizer.state_dict()
    checkpoint["model"] = OrderedDict(checkpoint["model"])
    convert_checkpoint(written(tmp_path, checkpoint), tmp_path / "out")
