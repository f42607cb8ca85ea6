"""The training script on a toy run."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.io.paths import ROOT
from helpers.models.stories import STORY_SEPARATOR
from helpers.training.pretraining import batch_sequences, bits_per_byte, pretrain, train
from helpers.training.settings import SIZES, PretrainOptions, TrainingSettings
from helpers.training.tokenizer import encode_stories, train_tokenizer

TOY = TrainingSettings(
    layers=2, hidden=32, heads=2, kv_heads=1, head_dim=16, intermediate=48, context=32, batch=4, steps=60, warmup=5
)
STORIES = [
    f"{name} had a {thing}. {name} liked the {thing} very much. The {thing} was {colour}." * 2
    for name in ("Tim", "Ann", "Bo")
    for thing in ("ball", "hat", "kite", "dog")
    for colour in ("red", "blue")
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(STORIES, vocab_size=320, context=32)


@pytest.fixture(scope="module")
def trained(tokenizer, tmp_path_factory):
    out = tmp_path_factory.mktemp("toy") / "model"
    return out, train(tokenizer, STORIES, STORIES[:4], out, TOY, checkpoint_every=20)


def test_texts_survive_the_tokenizer(tokenizer):
    assert 256 < len(tokenizer) <= 320
    for text in (*STORIES[:3], "Ünïcode 😀 and\nnew lines  too"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    ids = encode_stories(tokenizer, STORIES[:2])
    assert (ids == tokenizer.bos_token_id).sum() == 2
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    assert tokenizer.convert_ids_to_tokens(0) == STORY_SEPARATOR


def test_loss_falls_and_the_result_is_a_usual_model(trained, tokenizer):
    out, result = trained
    log = (out / "training_log.csv").read_text().splitlines()
    early, late = (float(line.split(",")[1]) for line in (log[1], log[-1]))
    assert late < early < math.log(len(tokenizer))
    assert late < 0.45 * math.log(len(tokenizer))
    model = AutoModelForCausalLM.from_pretrained(out)
    reloaded = AutoTokenizer.from_pretrained(out)
    assert reloaded(STORIES[0])["input_ids"] == tokenizer(STORIES[0])["input_ids"]
    assert load_file(out / "model.safetensors")["model.norm.weight"].dtype == torch.float16
    told = json.loads((out / "training.json").read_text())
    assert told == result
    assert told["tokens_seen"] == 60 * 4 * 32
    assert told["holdout_bits_per_byte"] == pytest.approx(bits_per_byte(model.float(), reloaded, STORIES[:4]), abs=0.01)
    assert told["holdout_bits_per_byte"] < 2.5
    assert not (out / "checkpoint").exists()
    card = (out / "README.md").read_text()
    for part in ("7,680 tokens seen", f"{told['holdout_bits_per_byte']} (4 stories)", "2 layers of 32", "context"):
        assert part in card, part


@pytest.mark.parametrize("stop_after", [20, 33])
def test_an_interrupted_run_ends_with_the_same_weights(trained, tokenizer, tmp_path, stop_after):
    out, result = trained
    assert train(tokenizer, STORIES, STORIES[:4], tmp_path / "m", TOY, 20, stop_after=stop_after) == {}
    again = train(tokenizer, STORIES, STORIES[:4], tmp_path / "m", TOY, 20)
    mine, other = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "m"))
    assert all(torch.equal(mine[name], other[name]) for name in mine)
    assert again["holdout_bits_per_byte"] == result["holdout_bits_per_byte"]


def test_a_checkpoint_of_other_settings_is_refused(tokenizer, tmp_path):
    train(tokenizer, STORIES, STORIES[:4], tmp_path, TOY, stop_after=3)
    with pytest.raises(ValueError, match="was written with other settings"):
        train(tokenizer, STORIES, STORIES[:4], tmp_path, TrainingSettings(**{**vars(TOY), "seed": 1}))


def test_batches_depend_on_seed_and_step_alone_and_cover_the_text(tokenizer):
    tokens = encode_stories(tokenizer, STORIES)
    rows_per_epoch = (len(tokens) - 33) // 32
    assert (batch_sequences(tokens, TOY, 7) == batch_sequences(tokens, TOY, 7)).all()
    assert batch_sequences(tokens, TOY, 0).shape == (4, 33)
    seen = {row.tobytes() for step in range(rows_per_epoch // 4) for row in batch_sequences(tokens, TOY, step)}
    assert len(seen) >= rows_per_epoch // 4 * 4 - 4


def test_bits_per_byte_by_hand(tokenizer):
    """A model that finds every token equally likely needs log2(vocabulary) bits for each."""

    class Even(torch.nn.Module):
        device = torch.device("cpu")

        class config:
            max_position_embeddings = 32

        def forward(self, input_ids):
            return type("Out", (), {"logits": torch.zeros(*input_ids.shape, 256)})

    plain = train_tokenizer(["x"], vocab_size=257)
    assert bits_per_byte(Even(), plain, ["abcd" * 20, "ab"]) == pytest.approx(8.0)


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "holds no text"), ("too short", "one batch needs"), (b"\xff\xfe\x00", "cannot be read")],
)
def test_bad_files_are_refused(tmp_path, content, message):
    path = tmp_path / "t.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    good = tmp_path / "good.txt"
    good.write_text(STORY_SEPARATOR.join(["A cat."] * 10))
    with pytest.raises(ValueError, match=message):
        pretrain(PretrainOptions(tmp_path / "m", text=(str(path),), holdout_text=str(good)))
    assert not (tmp_path / "m" / "model.safetensors").exists()


def test_the_options_of_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SIZES, "small", TOY)
    text = tmp_path / "t.txt"
    text.write_text(f"\n{STORY_SEPARATOR}\n".join(STORIES))
    common = {"text": (str(text),), "size": "small", "steps": 10, "vocab_size": 300}
    pretrain(PretrainOptions(tmp_path / "a", holdout_text=str(text), **common))
    assert '"holdout_stories": 2' in capsys.readouterr().out
    pretrain(PretrainOptions(tmp_path / "b", tokenizer=str(tmp_path / "a"), seed=5, **common))
    a, b = (json.loads((tmp_path / name / "tokenizer.json").read_text()) for name in "ab")
    assert a["model"]["vocab"] == b["model"]["vocab"]


def test_two_processes_train_one_model(tokenizer, tmp_path):
    """Each process takes half of every batch; the weights come out as from one process, up to rounding."""
    text = tmp_path / "t.txt"
    text.write_text(f"\n{STORY_SEPARATOR}\n".join(STORIES))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    script = f"""
import sys
from helpers.training.pretraining import pretrain
from helpers.training.settings import SIZES, PretrainOptions, TrainingSettings

SIZES["small"] = {TOY!r}
text, tokenizer, out = sys.argv[1:]
pretrain(PretrainOptions(out, text=(text,), size="small", steps=12, tokenizer=tokenizer))
"""
    (tmp_path / "run.py").write_text(script)
    results = []
    for processes in ("1", "2"):
        out = tmp_path / processes
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
        command = [*launch, str(tmp_path / "run.py"), str(text), str(tmp_path / "tokenizer"), str(out)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        results.append((json.loads((out / "training.json").read_text()), load_file(out / "model.safetensors")))
    assert [told["processes"] for told, _ in results] == [1, 2]
    for name, weights in results[0][1].items():
        assert torch.allclose(weights.float(), results[1][1][name].float(), atol=0.02), name
