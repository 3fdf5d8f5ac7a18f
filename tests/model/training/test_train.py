"""The command: a run's files, its exact resumption, several processes, what it refuses."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from model.checkpoint import load_model
from model.tokenizer import Tokenizer
from model.train import main
from model.training import loop
from model.training.loop import Trainer
from model.training.networks import make_network
from model.training.processes import Processes
from model.training.recipe import load_recipe
from model.training.tokens import pack
from tests.model.training.texts import write_recipe

ROOT = Path(__file__).resolve().parents[3]


def state_of(run: Path) -> dict[str, Tensor]:
    (directory,) = (run / "state").iterdir()
    return load_file(directory / "state.safetensors")


def log_of(run: Path) -> list[dict[str, str]]:
    with (run / "log.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


class Forgetful(nn.Module):
    """A network that draws random numbers in training."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, token_ids: Tensor) -> Tensor:
        return F.dropout(self.network(token_ids), 0.3, self.training)


def test_a_run_makes_a_model_that_has_learned(corpus: Path) -> None:
    recipe = write_recipe(corpus, training={"steps": 30}, run={"evaluate_every": 20, "prompts": ["Tom found"]})
    assert main([str(recipe)]) == 0
    lines = log_of(corpus / "run")
    assert [int(line["step"]) for line in lines] == list(range(2, 31, 2))
    validated = [float(line["validation_loss"]) for line in lines if line["validation_loss"]]
    assert len(validated) == 2
    assert validated[-1] < 0.87 * float(lines[0]["loss"])
    assert float(lines[-1]["validation_bits_per_byte"]) > 0
    model, tokenizer = load_model(corpus / "run" / "model"), Tokenizer.load(corpus / "run" / "model")
    assert tokenizer is not None
    assert (model.config.vocab_size, model.config.block_size) == (tokenizer.vocab_size, 24)
    assert model.config.eos_token_id == tokenizer.eos_token_id == 0
    state = state_of(corpus / "run")
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, state[f"network.{name}"])
    assert (corpus / "run" / "samples.txt").read_text(encoding="utf-8").count("Tom found|") == 2


@pytest.mark.parametrize("draws", [False, True])
def test_a_stopped_run_goes_on_to_the_same_bits(corpus: Path, monkeypatch: pytest.MonkeyPatch, draws: bool) -> None:
    if draws:
        monkeypatch.setattr(loop, "make_network", lambda config: Forgetful(make_network(config)))
        monkeypatch.setattr(loop, "save_network", lambda *_: (corpus / "run" / "model").mkdir(exist_ok=True))
    path = write_recipe(corpus, training={"optimiser": "muon" if draws else "adamw"}, run={"weights": "bfloat16"})
    packed = pack(load_recipe(path).data, corpus / "run" / "tokens")

    def train(stop_after: int) -> bool:
        trainer = Trainer(load_recipe(path), packed, Processes())
        return trainer.run(lambda: trainer.progress.step >= stop_after)

    assert train(99)
    straight, log = state_of(corpus / "run"), log_of(corpus / "run")
    for name in ("state", "log.csv"):
        (corpus / "run" / name).rename(corpus / name)
    assert not train(1)
    assert not train(4)
    torch.manual_seed(5)
    assert train(99)
    assert_same(state_of(corpus / "run"), straight)
    assert [line["loss"] for line in log_of(corpus / "run")][-1] == log[-1]["loss"]
    if not draws:
        model = load_model(corpus / "run" / "model", dtype=torch.bfloat16)
        assert torch.equal(model.embedding.weight, straight["network.embedding.weight"].bfloat16())


def test_a_killed_run_does_again_what_was_not_saved(corpus: Path) -> None:
    path = write_recipe(corpus)
    assert main([str(path), "training.steps=4", "training.schedule=constant"]) == 0
    with (corpus / "run" / "log.csv").open("a", encoding="utf-8") as file:
        file.write("5,480,0.1,9.9,1,1,1,1,,\n")
    assert main([str(path), "training.schedule=constant"]) == 0
    assert [line["step"] for line in log_of(corpus / "run")] == ["2", "4", "6"]


def test_a_run_that_is_asked_to_stop_saves_and_goes_on(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_recipe(corpus, training={"schedule": "constant"})
    assert main([str(path)]) == 0
    straight, handler = state_of(corpus / "run"), signal.getsignal(signal.SIGTERM)
    step = Trainer._step

    def interrupted(trainer: Trainer, number: int) -> tuple[float, float]:
        if number == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, number)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", interrupted)
        assert main([str(path), "run.directory=stopped"]) == 130
    assert [path.name for path in (corpus / "stopped" / "state").iterdir()] == ["step-00000004"]
    assert signal.getsignal(signal.SIGTERM) is handler
    assert main([str(path), "run.directory=stopped"]) == 0
    assert_same(state_of(corpus / "stopped"), straight)


def test_two_processes_do_what_one_does(corpus: Path) -> None:
    path = write_recipe(corpus, training={"autocast": None, "micro_batch": 1}, run={"threads": 1})
    assert main([str(path)]) == 0
    one, log = state_of(corpus / "run"), log_of(corpus / "run")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [*command, "-m", "model.train", str(path), "run.directory=two"],
        cwd=ROOT, check=True, timeout=120, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    for name, tensor in state_of(corpus / "two").items():
        torch.testing.assert_close(tensor, one[name], rtol=1e-3, atol=1e-4)
    for mine, theirs in zip(log, log_of(corpus / "two"), strict=True):
        for name in ("loss", "validation_loss"):
            assert float(theirs[name] or 0) == pytest.approx(float(mine[name] or 0), rel=1e-4)
    assert float(log_of(corpus / "two")[-1]["validation_loss"]) == pytest.approx(
        float(log[-1]["validation_loss"]), rel=1e-4
    )


def test_a_transformer_trains_with_the_same_command(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_recipe(corpus)
    sizes = "{architecture: transformer, n_layer: 1, n_head: 2, n_embd: 16}"
    assert main([str(path), f"model={sizes}", "training.steps=30", "run.prompts=[Tom]", "run.tensorboard=true"]) == 0
    assert list((corpus / "run" / "tensorboard").iterdir())
    lines = log_of(corpus / "run")
    assert float(lines[-1]["validation_loss"]) < 0.9 * float(lines[0]["loss"])
    assert main([str(path), f"model={sizes}", "model.n_head=3", "run.directory=other"]) == 2
    assert "n_embd: 16 cannot be divided" in capsys.readouterr().err


def test_a_run_begins_with_the_weights_of_a_model(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_recipe(corpus, training={"schedule": "constant", "steps": 30})
    assert main([str(path)]) == 0
    model = corpus / "tales"
    (corpus / "run" / "model").rename(model)
    text, weights = "[{path: tales.txt}]", (model / "model.safetensors").read_bytes()
    data = f"data={{sources: {text}, tokenizer: tales/tokenizer.json, window: 24, held_out: 0.1}}"
    command = [str(path), data, "run.directory=further", "training.initial=tales", "training.steps=4"]
    assert main([*command, "training.learning_rate=1e-30", "training.weight_decay=0"]) == 0
    first = load_model(model)
    for name, tensor in load_model(corpus / "further" / "model").state_dict().items():
        assert torch.equal(tensor, first.state_dict()[name]), name
    assert (model / "model.safetensors").read_bytes() == weights
    assert float(log_of(corpus / "further")[0]["loss"]) < 0.87 * float(log_of(corpus / "run")[0]["loss"])
    # From here on the state is what counts.
    model.rename(corpus / "away")
    (corpus / "tales").mkdir()
    (corpus / "tales" / "tokenizer.json").write_bytes((corpus / "away" / "tokenizer.json").read_bytes())
    assert main([*command, "training.steps=6"]) == 0
    assert not torch.equal(load_model(corpus / "further" / "model").embedding.weight, first.embedding.weight)
    assert main([*command, "training.initial=away"]) == 2
    assert "training.initial is not what the run began with" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.n_embd=8", "model.logit_scale=0.25"], "has n_embd = 16; the recipe n_embd = 8"),
        (["model={architecture: transformer, n_layer: 1, n_head: 2, n_embd: 16}"], "has architecture = "),
        (["data.tokenizer=null", "data.vocab_size=300", "data.held_out=0.3"], "has another tokenizer"),
        (["training.initial=nothing"], "nothing/config.json"),
    ],
)
def test_another_models_weights_are_refused(
    corpus: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    path = write_recipe(corpus, training={"steps": 1})
    assert main([str(path)]) == 0
    capsys.readouterr()
    own = ["data.vocab_size=null", "data.tokenizer=run/model/tokenizer.json", "training.initial=run/model"]
    assert main([str(path), "run.directory=further", *own, *overrides]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert message in line


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.n_embd=8", "model.n_embd is not what the run began with"),
        ("training.batch=6", "training.batch is not"),
        ("data.held_out=0.2", "not of the texts that the run began with"),
    ],
)
def test_a_state_of_another_run_is_refused(
    corpus: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    path = write_recipe(corpus, training={"steps": 1})
    assert main([str(path)]) == 0
    assert main([str(path), override]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.architecture=rnn", "architecture"),
        ("model.pmem_size=0", "pmem_size"),
        ("data.window=4000", "less than"),
        ("training.learning_rate=1e30", "the loss is"),
    ],
)
def test_what_cannot_be_trained_is_said_in_one_line(
    corpus: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    assert main([str(write_recipe(corpus)), override, "run.weights=bfloat16"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert message in line


def test_the_second_version_trains_and_resumes_to_the_same_bits(corpus: Path) -> None:
    memories = "persistent_size: 24, short_window: 8, long_delay: 2, max_train_delay: 6"
    sizes = f"{{architecture: memory-mosaic-v2, n_layer: 1, n_head: 2, n_embd: 16, {memories}}}"
    command = [str(write_recipe(corpus)), f"model={sizes}", "training.schedule=constant"]
    assert main([*command, "training.steps=4"]) == 0
    assert main(command) == 0
    assert main([*command, "run.directory=straight"]) == 0
    assert_same(state_of(corpus / "run"), state_of(corpus / "straight"))
    assert load_model(corpus / "run" / "model").config.architecture == "memory-mosaic-v2"
