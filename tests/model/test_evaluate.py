"""The evaluation: each token predicted once from its own window, in any chunks; divergences that mean something."""

import lzma
import math
from pathlib import Path

import pytest
import torch

from model.checkpoint import load_model
from model.convert import convert_checkpoint
from model.evaluate import Score, Subject, evaluate, main, read_text, window_batches
from model.gpt2_tokenizer import byte_level_bpe_json
from model.kernels.cpu_library import kernel_path
from model.kernels.kernel import TorchKernel
from model.tokenizer import Tokenizer
from tests.model.published_checkpoints import library_checkpoint, published_logits
from tests.model.small_bpe import ranks

CHECKPOINT = library_checkpoint(vocab_size=304)
DOCUMENTS = ["the thing and the rest", "on\n\nand on caf\u00e9"]
TEXT = "\n<|endoftext|>\n".join(["", *DOCUMENTS, "  ", ""])


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("evaluate")
    (directory / "small.json").write_text(byte_level_bpe_json(ranks()))
    (directory / "valid.txt").write_text(TEXT)
    (directory / "valid.txt.xz").write_bytes(lzma.compress(TEXT.encode()))
    torch.save(CHECKPOINT, directory / "ckpt.pt")
    convert_checkpoint(directory / "ckpt.pt", directory / "model", directory / "small.json")
    return directory


@pytest.fixture(scope="module")
def token_ids(model_dir: Path) -> list[int]:
    tokenizer = Tokenizer.load(model_dir / "model")
    assert tokenizer is not None
    return read_text(model_dir / "valid.txt", tokenizer)


def expected_nats(token_ids: list[int], window: int) -> float:
    """By the definition: window after window, every token from those before it in its window."""
    nats = 0.0
    for start in range(0, len(token_ids) - 1, window):
        part = torch.tensor(token_ids[start : start + window + 1])
        log_probabilities = published_logits(CHECKPOINT, part[:-1]).log_softmax(-1)
        nats -= log_probabilities.gather(1, part[1:, None]).sum().item()
    return nats


def test_documents_follow_each_other_each_with_its_end(model_dir: Path, token_ids: list[int]) -> None:
    tokenizer = Tokenizer.load(model_dir / "model")
    assert tokenizer is not None
    assert tokenizer.decode(token_ids, skip_special=False) == "".join(f"{text}<|endoftext|>" for text in DOCUMENTS)
    assert read_text(model_dir / "valid.txt.xz", tokenizer) == token_ids


@pytest.mark.parametrize("window", [1, 4, 7, 100])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_token_but_the_first_is_predicted_once(window: int, batch: int) -> None:
    ids = list(range(29))
    batches = list(window_batches(ids, window, batch))
    assert [target for _, targets in batches for target in targets.flatten().tolist()] == ids[1:]
    assert all(torch.equal(inputs + 1, targets) for inputs, targets in batches)
    assert all(1 <= inputs.shape[0] <= batch and inputs.shape[1] <= window for inputs, _ in batches)


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("is_cached", [True, False])
def test_loss_is_the_definitions_in_any_chunks(
    model_dir: Path, token_ids: list[int], is_cached: bool, chunk: int
) -> None:
    model = load_model(model_dir / "model", dtype=torch.float64)
    subject = Subject(model, torch.float64, TorchKernel(model) if is_cached else None, chunk)
    score = Score()
    for inputs, targets in window_batches(token_ids, 8, 2):
        evaluate(subject, inputs, targets, None, score)
    assert score.num_tokens == len(token_ids) - 1
    assert score.nats == pytest.approx(expected_nats(token_ids, 8), rel=1e-9)


def test_divergence_is_zero_from_oneself_and_positive_from_another(model_dir: Path, token_ids: list[int]) -> None:
    model = load_model(model_dir / "model")
    for memory_dtype, is_same in ((torch.float32, True), (torch.bfloat16, False)):
        score = Score()
        for inputs, targets in window_batches(token_ids, 8, 2):
            tested = Subject(model, memory_dtype, TorchKernel(model))
            evaluate(tested, inputs, targets, Subject(model, torch.float32, TorchKernel(model)), score)
        assert score.baseline_nats == pytest.approx(expected_nats(token_ids, 8), rel=1e-5)
        assert (abs(score.divergence) < 1e-5) == is_same
        assert (score.nats == score.baseline_nats) == is_same


def test_divergence_is_kullback_leiblers() -> None:
    score = Score()
    score.add(torch.tensor([[0.0, 0.0]]), torch.tensor([0]), torch.tensor([[math.log(3), 0.0]]))
    assert score.divergence == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert score.nats == pytest.approx(math.log(2))
    assert score.baseline_nats == pytest.approx(-math.log(0.75))


def test_command_line(model_dir: Path, token_ids: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(model_dir / "model"), "--text", str(model_dir / "valid.txt.xz"), "--window", "8"]
    assert main([*command, "--dtype", "float64", "--kernel", "torch"]) == 0
    row = capsys.readouterr().out.splitlines()[-1].split()
    nats = expected_nats(token_ids, 8)
    num_bytes = sum(len(document.encode()) for document in DOCUMENTS)
    num_bytes -= len(Tokenizer((model_dir / "small.json").read_text()).token_bytes(token_ids[0]))
    assert row == [
        "float64", "float64", "torch-cpu", str(len(token_ids) - 1), f"{nats / (len(token_ids) - 1):.4f}",
        f"{nats / math.log(2) / num_bytes:.4f}",
    ]  # fmt: skip


def test_command_line_compares_with_a_baseline(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(model_dir / "model"), "--text", str(model_dir / "valid.txt"), "--max-windows", "1"]
    assert main([*command, "--dtype", "bfloat16", "--baseline", "float32"]) == 0
    header, baseline, tested = capsys.readouterr().out.splitlines()
    assert "mean KL" in header
    assert baseline.split()[:4] == ["float32", "float32", "torch-cpu", "16"]
    assert tested.split()[:4] == ["bfloat16", "float16", kernel_path() or "torch-cpu", "16"]
    assert "%" in tested


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.write_bytes(b"nonsense"), "text.xz"),
        (lambda path: path.write_bytes(lzma.compress(b"\xff")), "utf-8"),
        (lambda path: path.write_bytes(lzma.compress(b" \n")), "no text to predict"),
    ],
)
def test_unusable_texts_are_one_line(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], make: object, complaint: str
) -> None:
    path = tmp_path / "text.xz"
    make(path)  # type: ignore[operator]
    assert main([str(model_dir / "model"), "--text", str(path)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert complaint in line


def test_a_model_without_tokenizer_cannot_read_text(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert_checkpoint(model_dir / "ckpt.pt", tmp_path / "bare")
    assert main([str(tmp_path / "bare"), "--text", str(model_dir / "valid.txt")]) == 2
    assert "no tokenizer.json" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--window", "--chunk", "--batch", "--max-windows"])
def test_sizes_below_one_are_refused(model_dir: Path, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([str(model_dir / "model"), "--text", "x", option, "0"])
    assert caught.value.code == 2
    assert "not a number of 1 or more" in capsys.readouterr().err
