"""Texts, models and the hub: local files in the official formats, presets, and a hub that fails or dawdles."""

import json
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import random_ids

from helpers.io.paths import ROOT
from helpers.models import hub
from helpers.models.hub import HubError, fetch_model
from helpers.models.items import load_multiple_choice, sample_texts
from helpers.models.loading import choose_device, load_model
from helpers.models.presets import PRESETS, get_preset
from helpers.models.splits import split_holdout
from helpers.models.stories import load_articles, load_stories, read_stories
from helpers.models.tokens import encode, pack_tokens

ITEM = {"ind": 4, "ctx": "A dog runs. ", "endings": ["It barks.", "It flies."], "label": "0"}


def write_lines(path, *records):
    path.write_text("".join(json.dumps(r) + "\n" if not isinstance(r, str) else r + "\n" for r in records))
    return path


def test_items_in_hellaswag_format(tmp_path):
    items = load_multiple_choice(write_lines(tmp_path / "h.jsonl", ITEM, ITEM | {"label": 1}))
    assert [item.text for item in items] == ["A dog runs. It barks.", "A dog runs. It flies."]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "h.jsonl, line 2: not JSON"),
        ("[1]", "line 2: expected a JSON object, got list"),
        ({"ctx": "a", "endings": ["b"]}, r"line 2: missing field\(s\) \['label'\]"),
        (ITEM | {"label": "2"}, "line 2: label '2' is not an index into its 2 endings"),
        (ITEM | {"label": ""}, "label '' is not an index"),
    ],
)
def test_faulty_items_are_named_by_line(tmp_path, line, message):
    with pytest.raises(ValueError, match=message):
        load_multiple_choice(write_lines(tmp_path / "h.jsonl", ITEM, line))


def test_an_empty_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no items"):
        load_multiple_choice(write_lines(tmp_path / "h.jsonl"))


def test_stories_plain_and_zipped(tmp_path):
    import gzip

    text = "One.\n<|endoftext|>\nTwo.\nMore.\n<|endoftext|>\n\n"
    (tmp_path / "s.txt").write_text(text)
    with gzip.open(tmp_path / "s.txt.gz", "wt") as file:
        file.write(text)
    for name in ("s.txt", "s.txt.gz"):
        assert read_stories(tmp_path / name) == ["One.", "Two.\nMore."]
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match="holds no text"):
        read_stories(tmp_path / "empty.txt")
    (tmp_path / "bad.txt.gz").write_bytes(b"not gzip")
    with pytest.raises(ValueError, match="cannot be read as UTF-8 text"):
        read_stories(tmp_path / "bad.txt.gz")


def test_samples_holdouts_and_packing(tmp_path):
    items = load_multiple_choice(write_lines(tmp_path / "h.jsonl", *(ITEM | {"ctx": str(i)} for i in range(20))))
    drawn = sample_texts(items, 8, seed=1)
    assert drawn == sample_texts(items, 8, seed=1) != sample_texts(items, 8, seed=2)
    assert len(set(drawn)) == 8
    with pytest.raises(ValueError, match=r"count must lie between 1 and the number of items \(20\), got 21"):
        sample_texts(items, 21)
    assert split_holdout(list("abcdefghij")) == (list("abcdefghi"), ["j"])
    with pytest.raises(ValueError, match="holdout must lie between 0 and 1"):
        split_holdout(["a"], 1.5)
    assert pack_tokens([[1, 2, 3], [4, 5], [6, 7]], 3) == [[1, 2, 3], [4, 5, 6]]


def test_sample_stories_of_the_project():
    items = load_multiple_choice(PRESETS["embedded"].multiple_choice)
    assert len(items) >= 100
    assert len(load_stories(PRESETS["embedded"].stories)) == len(items)
    lengths = [len(item.text.split()) for item in items]
    assert min(lengths) >= 80
    assert max(lengths) <= 200
    assert len({item.context for item in items}) == len(items)
    for label in range(4):
        assert abs(sum(item.label == label for item in items) - len(items) / 4) <= 2
    assert all(len(set(item.endings)) == 4 for item in items)


def test_presets(monkeypatch):
    assert get_preset().name == "embedded"
    assert get_preset().data_dir == ROOT / "data"
    monkeypatch.setenv("PRESET", "smollm")
    assert get_preset().figures_dir == ROOT / "figures" / "smollm"
    assert get_preset("llama").name == "llama"
    assert get_preset("llama").without_pair == ""
    assert get_preset("smollm2").without_pair == (
        "preset smollm2 has no pair of models; embedded, smollm, llama have one"
    )
    with pytest.raises(ValueError, match="preset must be one of embedded, smollm2, smollm, llama, got 'gpt5'"):
        get_preset("gpt5")


def test_a_local_folder_loads_like_a_hub_name(tiny_folder, capsys):
    model, tokenizer = load_model(tiny_folder, device="cpu")
    assert "parameters on cpu, float32" in capsys.readouterr().out
    assert model.config._attn_implementation == "packed_kv"
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token is not None
    ids = encode(tokenizer, "the cat", 3)
    assert len(ids) == 3
    with pytest.raises(ValueError, match="text is empty"):
        encode(tokenizer, " \n")
    assert load_model(tiny_folder, device="cpu", dtype=torch.bfloat16, quiet=True)[0].dtype == torch.bfloat16


def test_device_and_dtype_belong_together(monkeypatch):
    assert choose_device() == (torch.device("cpu"), torch.float32) or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert choose_device() == (torch.device("cuda"), torch.float16)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert choose_device() == (torch.device("cuda"), torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device() == (torch.device("mps"), torch.float16)


def test_folders_without_safetensors_are_refused(tiny_folder, tmp_path):
    copy = tmp_path / "m"
    shutil.copytree(tiny_folder, copy)
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no model in safetensors format"):
        load_model(copy)


class Hub(BaseHTTPRequestHandler):
    """Just enough of the hub's protocol to serve one model, as slowly as asked, or nothing at all."""

    folder, pause, silent = None, 0.0, False

    def log_message(self, *args):
        pass

    def _reply(self, body: bytes, headers: dict[str, str], send: bool, status: int = 200):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if send:
            for start in range(0, len(body), max(1, len(body) // 8)):
                self.wfile.write(body[start : start + max(1, len(body) // 8)])
                self.wfile.flush()
                time.sleep(self.pause if len(body) > 20000 else 0)

    def _serve(self, send: bool):
        while self.silent:
            time.sleep(0.1)
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"] and "tree" in parts:
            files = [
                {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "b" * 40}
                for path in sorted(self.folder.iterdir())
            ]
            self._reply(json.dumps(files).encode(), {"Content-Type": "application/json"}, send)
        elif parts[:4] == ["api", "models", "org", "tiny"]:
            files = [{"rfilename": path.name} for path in sorted(self.folder.iterdir())]
            body = {"id": "org/tiny", "sha": "a" * 40, "siblings": files, "private": False, "tags": [], "downloads": 0}
            self._reply(json.dumps(body).encode(), {"Content-Type": "application/json"}, send)
        elif "resolve" in parts and (path := self.folder / parts[-1]).is_file():
            body = path.read_bytes()
            etag = f'"{path.name}-{len(body)}"'
            self._reply(body, {"ETag": etag, "X-Repo-Commit": "a" * 40}, send)
        else:
            self._reply(b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, send, 404)

    def do_GET(self):
        self._serve(True)

    def do_HEAD(self):
        self._serve(False)


@pytest.fixture
def fake_hub(tiny_folder, tmp_path, monkeypatch):
    """A hub on this machine, and an empty cache."""
    handler = type("H", (Hub,), {"folder": tiny_folder})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    from huggingface_hub import constants

    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(constants, "HF_XET_CACHE", str(tmp_path / "hf" / "xet"))
    yield handler
    handler.silent = False
    server.shutdown()


def test_a_model_comes_from_the_hub_and_then_from_the_cache(fake_hub):
    model, tokenizer = load_model("org/tiny", device="cpu", quiet=True)
    ids = torch.tensor([encode(tokenizer, "the cat sat")])
    assert model(input_ids=ids).logits.shape[:2] == ids.shape
    fake_hub.silent = True  # from now on only the cache can answer
    assert fetch_model("org/tiny").is_dir()


def test_a_slow_download_that_moves_goes_on(fake_hub):
    fake_hub.pause = 0.4  # 8 pieces: 3.2 s for the weights, over twice the silence that is allowed
    started = time.monotonic()
    assert (fetch_model("org/tiny", silence=1.5) / "model.safetensors").is_file()
    assert time.monotonic() - started > 2


def test_a_silent_hub_is_given_up(fake_hub):
    fake_hub.silent = True
    started = time.monotonic()
    with pytest.raises(HubError, match=r"model 'org/tiny' could not be had .* no data arrived for 1.5 s.*run offline"):
        fetch_model("org/tiny", silence=1.5)
    assert time.monotonic() - started < 20
    assert hub.SILENCE_SECONDS == 15


def test_an_unreachable_hub_and_an_unknown_name_are_told(fake_hub, monkeypatch):
    with pytest.raises(HubError, match="model 'org/other' could not be had"):
        fetch_model("org/other", silence=5)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"model 'org/new' could not be had.*PRESET=embedded"):
        fetch_model("org/new", silence=5)
    with pytest.raises(HubError, match="neither a folder here nor the name of a hub repository"):
        fetch_model("../no/such/folder")


def test_a_data_set_that_cannot_be_had(fake_hub, monkeypatch):
    monkeypatch.setattr(hub, "SILENCE_SECONDS", 1.0)
    monkeypatch.setattr(hub.fetch_dataset, "__defaults__", (1.0,))
    fake_hub.silent = True
    with pytest.raises(HubError, match="data set 'org/texts' could not be had"):
        load_multiple_choice("org/texts")


def test_official_files_and_real_models(shared):
    items = load_multiple_choice(str(shared / "data/hellaswag_validation.jsonl"))
    assert len(items) == 5021
    assert all(len(item.endings) == 4 for item in items)
    model, tokenizer = load_model(shared / "models/stories3M", quiet=True, device="cpu")
    logits = model(input_ids=torch.tensor([encode(tokenizer, "Once upon a time")])).logits
    assert "there" in tokenizer.decode(logits[0, -1].topk(3).indices) or "," in tokenizer.decode(logits[0, -1].argmax())
    assert random_ids(1, 3).shape == (1, 3)


def test_openings_are_the_stories_cut_in_two():
    preset = PRESETS["embedded"]
    stories = load_multiple_choice(preset.multiple_choice)
    openings = load_articles(ROOT / "data/samples/openings.jsonl", None)
    assert [f"{o.article} {o.highlights}" for o in openings] == [story.text for story in stories]
    parts = {split: load_multiple_choice(preset.multiple_choice, split) for split in ("train", "test")}
    assert len(parts["train"]) + len(parts["test"]) == len(stories)
    assert len(load_articles(ROOT / "data/samples/openings.jsonl", "test")) == len(parts["test"]) >= 50
    with pytest.raises(ValueError, match="holds no items of split 'dev'"):
        load_multiple_choice(preset.multiple_choice, "dev")


def test_articles_in_official_format(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"id": 1, "article": " A. ", "highlights": "B."})
    assert [(a.article, a.highlights) for a in load_articles(path, None)] == [("A.", "B.")]
    with pytest.raises(ValueError, match=r"line 1: missing field\(s\) \['highlights'\]; expected article, highlights"):
        load_articles(write_lines(path, {"article": "A."}))


def test_a_data_set_folder_loads_through_the_hub_code(tmp_path, monkeypatch):
    """What `Rowan/hellaswag` goes through: a child process fetches the split, then it is read from the cache."""
    folder = tmp_path / "hellaswag"
    folder.mkdir()
    write_lines(folder / "validation.jsonl", *(ITEM | {"ind": i, "ctx": f"Dog {i} runs."} for i in range(5)))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    items = load_multiple_choice(str(folder))
    assert [item.context for item in items] == [f"Dog {i} runs." for i in range(5)]
    write_lines(folder / "train.jsonl", *({"text": f"Story {i}."} for i in range(3)))
    (folder / "validation.jsonl").unlink()
    assert load_stories(str(folder)) == ["Story 0.", "Story 1.", "Story 2."]
