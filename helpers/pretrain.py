"""Train the story models that the project ships with, from text files to a folder in Hugging Face format.

    python -m helpers.pretrain --text stories.txt.gz --holdout-text real_stories.txt --out data/models/large

Byte-level BPE tokenizer, a small Llama, next-token loss on packed rows. Hidden matrices are trained with Muon
(K. Jordan, 2024), the rest with AdamW; warm-up, then cosine decay to zero. Batches are a function of seed and step
alone, and a checkpoint holds weights and optimizer state, so an interrupted run goes on as if it had not been.
"""

import argparse
import csv
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from helpers.corpora import STORY_SEPARATOR, load_stories, read_stories, split_holdout
from helpers.files import (
    atomic_files,
    atomic_path,
    provenance,
    recover,
    relative_to_root,
    remove_folder,
    write_json,
)
from helpers.processes import on_cpu


@dataclass(frozen=True)
class TrainingSettings:
    """Shape of the model and of its training. Batch sizes count rows of `context` tokens over all processes."""

    layers: int = 6
    hidden: int = 192
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    intermediate: int = 512
    context: int = 512
    batch: int = 4
    steps: int = 5000
    warmup: int = 100
    muon_lr: float = 0.02
    adamw_lr: float = 4e-3
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0


SIZES = {
    "large": TrainingSettings(),
    "small": TrainingSettings(layers=2, hidden=128, heads=2, kv_heads=1, intermediate=384),
}


def train_tokenizer(stories: list[str], vocab_size: int = 2048, context: int = 512) -> PreTrainedTokenizerFast:
    """Byte-level BPE over `stories`; token 0 is the separator and serves as beginning, end and padding of a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[STORY_SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(stories, trainer)
    separator = (STORY_SEPARATOR, tokenizer.token_to_id(STORY_SEPARATOR))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{STORY_SEPARATOR} $A", special_tokens=[separator])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=STORY_SEPARATOR,
        eos_token=STORY_SEPARATOR,
        pad_token=STORY_SEPARATOR,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def encode_stories(tokenizer: PreTrainedTokenizerFast, stories: list[str]) -> np.ndarray:
    """One flat array of token ids, a separator before every story."""
    flat: list[int] = []
    for start in range(0, len(stories), 1000):
        for ids in tokenizer(stories[start : start + 1000], verbose=False)["input_ids"]:
            flat.extend(ids)
    return np.array(flat, dtype=np.int32)


def build_model(settings: TrainingSettings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A freshly initialised Llama with tied embeddings."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        head_dim=settings.head_dim,
        max_position_embeddings=settings.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def batch_rows(tokens: np.ndarray, settings: TrainingSettings, step: int) -> np.ndarray:
    """Rows `[batch, context + 1]` of step `step`: each epoch cuts the text at another offset and shuffles the rows.

    The last token of a row is the target of the one before it only, so it opens the next row again.
    """
    rows_per_epoch = (len(tokens) - settings.context - 1) // settings.context
    rows = []
    for index in range(step * settings.batch, (step + 1) * settings.batch):
        epoch, position = divmod(index, rows_per_epoch)
        order = np.random.default_rng((settings.seed, epoch))
        offset = int(order.integers(settings.context))
        start = int(order.permutation(rows_per_epoch)[position]) * settings.context + offset
        rows.append(tokens[start : start + settings.context + 1])
    return np.stack(rows)


def learning_rate_factor(step: int, settings: TrainingSettings) -> float:
    """Linear warm-up to 1, then half a cosine down to 0."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def build_optimizers(model: torch.nn.Module, settings: TrainingSettings) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=settings.muon_lr, weight_decay=settings.weight_decay),
        torch.optim.AdamW(others, lr=settings.adamw_lr, betas=(0.9, 0.95), weight_decay=settings.weight_decay),
    ]


@torch.no_grad()
def bits_per_byte(model, tokenizer, stories: list[str]) -> float:
    """Negative log2-likelihood of the stories' tokens over their UTF-8 bytes, each story read from its beginning.

    A story longer than the context is read in pieces, each without sight of the one before (separators are
    read, never scored).
    """
    context, device = model.config.max_position_embeddings, model.device
    nats, size = 0.0, 0
    for story in stories:
        ids = tokenizer(story, add_special_tokens=False, verbose=False)["input_ids"]
        size += len(story.encode())
        for start in range(0, len(ids), context - 1):
            row = torch.tensor([[tokenizer.bos_token_id, *ids[start : start + context - 1]]], device=device)
            logits = model(input_ids=row).logits[0, :-1].float()
            nats += torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum").item()
    return nats / math.log(2) / size


def _save_checkpoint(folder: Path, model, optimizers, step: int, fingerprint: dict) -> None:
    with atomic_path(folder, directory=True) as temporary:
        save_file({k: v.contiguous() for k, v in model.named_parameters()}, temporary / "weights.safetensors")
        state = {}
        for number, optimizer in enumerate(optimizers):
            for index, entries in optimizer.state_dict()["state"].items():
                for name, value in entries.items():
                    state[f"{number}.{index}.{name}"] = torch.as_tensor(value).contiguous()
        save_file(state, temporary / "optimizer.safetensors")
        (temporary / "state.json").write_text(json.dumps({"step": step, **fingerprint}), encoding="utf-8")


def _load_checkpoint(folder: Path, model, optimizers, fingerprint: dict) -> int:
    """Restore weights and optimizer state; return the step to go on with (0 without a checkpoint)."""
    recover(folder)
    if not (folder / "state.json").is_file():
        return 0
    saved = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    step = saved.pop("step")
    if saved != fingerprint:
        changed = sorted(k for k in fingerprint if saved.get(k) != fingerprint[k])
        raise ValueError(
            f"checkpoint {relative_to_root(folder)} was written with other {', '.join(changed)}; "
            "train with the same, or remove the checkpoint to start anew"
        )
    weights = load_file(folder / "weights.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    state = load_file(folder / "optimizer.safetensors")
    for number, optimizer in enumerate(optimizers):
        content = optimizer.state_dict()
        content["state"] = {}
        for key, value in state.items():
            owner, index, name = key.split(".", 2)
            if int(owner) == number:
                content["state"].setdefault(int(index), {})[name] = value
        optimizer.load_state_dict(content)
    return step


def train(
    tokenizer: PreTrainedTokenizerFast,
    train_stories: list[str],
    holdout_stories: list[str],
    out: str | Path,
    settings: TrainingSettings,
    checkpoint_every: int = 500,
    stop_after: int | None = None,
) -> dict[str, object]:
    """Train a model and save it, its tokenizer and `training.json` in `out`; return the content of that file.

    `out/checkpoint` holds the last checkpoint until the run is complete. `stop_after` ends the run early, as an
    interruption would. Raises `ValueError` where the text is too short for one batch, or where a checkpoint of
    other settings or other text lies in `out`.
    """
    out = Path(out)
    checkpoint = out / "checkpoint"
    accelerator = Accelerator(cpu=on_cpu(), mixed_precision="bf16" if torch.cuda.is_available() else "no")
    if settings.batch % accelerator.num_processes:
        raise ValueError(f"batch {settings.batch} does not divide over {accelerator.num_processes} processes")
    set_seed(settings.seed)
    tokens = encode_stories(tokenizer, train_stories)
    if len(tokens) < settings.context * (settings.batch + 2):
        raise ValueError(
            f"the training text holds {len(tokens)} tokens; one batch needs "
            f"{settings.context * (settings.batch + 2)}: give more text, or a smaller batch or context"
        )
    fingerprint = {"settings": asdict(settings), "tokens": len(tokens), "checksum": int(tokens.astype(np.int64).sum())}
    model = build_model(settings, tokenizer)
    optimizers = build_optimizers(model, settings)
    first_step = _load_checkpoint(checkpoint, model, optimizers, fingerprint)
    log_path = out / "training_log.csv"
    log = [row for row in _read_log(log_path) if int(row["step"]) <= first_step]
    seconds_before = float(log[-1]["seconds"]) if log else 0.0
    model, *optimizers = accelerator.prepare(model, *optimizers)

    share = settings.batch // accelerator.num_processes
    mine = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    started, losses = time.perf_counter(), []
    last_step = min(settings.steps, stop_after or settings.steps)
    progress = tqdm(range(first_step, last_step), initial=first_step, total=settings.steps, mininterval=5,
                    disable=not accelerator.is_main_process)  # fmt: skip
    model.train()
    for step in progress:
        rows = torch.from_numpy(batch_rows(tokens, settings, step)[mine]).long().to(accelerator.device)
        factor = learning_rate_factor(step, settings)
        for optimizer, rate in zip(optimizers, (settings.muon_lr, settings.adamw_lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), settings.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        done = step + 1
        if done % 50 == 0 or done == last_step:
            seconds = seconds_before + time.perf_counter() - started
            speed = (done - first_step) * settings.batch * settings.context / (time.perf_counter() - started)
            log.append({"step": done, "loss": f"{np.mean(losses):.4f}", "seconds": f"{seconds:.0f}"})
            progress.set_postfix(loss=log[-1]["loss"], tokens_per_s=f"{speed:.0f}")
            losses = []
        if accelerator.is_main_process and (done % checkpoint_every == 0 or done == last_step):
            bare = accelerator.unwrap_model(model)
            _write_log(log_path, log)  # first: lines beyond the checkpoint are dropped when the run is taken up again
            _save_checkpoint(checkpoint, bare, [o.optimizer for o in optimizers], done, fingerprint)
    result = {}
    if last_step == settings.steps and accelerator.is_main_process:
        bare = accelerator.unwrap_model(model).eval()
        result = {
            "settings": asdict(settings),
            "parameters": sum(p.numel() for p in bare.parameters()),
            "train_tokens": len(tokens),
            "tokens_seen": settings.steps * settings.batch * settings.context,
            "seconds": round(float(log[-1]["seconds"])),
            "holdout_stories": len(holdout_stories),
            "holdout_bits_per_byte": round(bits_per_byte(bare, tokenizer, holdout_stories), 4),
            **provenance(processes=accelerator.num_processes),
        }
        with atomic_files(out) as temporary:
            bare.to(torch.float16).save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        write_json(out / "training.json", result)
        write_card(out, result)
        remove_folder(checkpoint)
    accelerator.wait_for_everyone()
    return result


def write_card(out: Path, result: dict) -> None:
    """Write the model card `out/README.md` from the content of `training.json`."""
    s = result["settings"]
    rows = {
        "architecture": f"Llama, {s['layers']} layers of {s['hidden']}, {s['heads']} query / {s['kv_heads']} key-value "
        f"heads of {s['head_dim']}, tied embeddings, byte-level BPE",
        "parameters": f"{result['parameters']:,}",
        "context": f"{s['context']} tokens",
        "training text": f"{result['train_tokens']:,} tokens of English stories",
        "training": f"{s['steps']:,} steps of {s['batch']} rows, {result['tokens_seen']:,} tokens seen, "
        f"seed {s['seed']}; Muon {s['muon_lr']} and AdamW {s['adamw_lr']}, warm-up {s['warmup']} steps, "
        "cosine decay to 0",
        "held-out bits per byte": f"{result['holdout_bits_per_byte']} ({result['holdout_stories']} stories)",
        "hardware and time": f"{result['device']}, {result['processes']} process(es) of {result['threads']} threads, "
        f"{result['seconds'] / 60:.0f} min",
        "versions": f"torch {result['torch']}, transformers {result['transformers']}",
        "limits": "simple stories only: no chat, no facts, no other language; objects and names drift",
        "licence": "that of the project, and of the text it was trained on",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    with atomic_path(out / "README.md") as temporary:
        title = "# A story model trained by `helpers.pretrain`\n\nLoss over the run: `training_log.csv`.\n\n"
        temporary.write_text(f"{title}| | |\n|---|---|\n{table}\n", encoding="utf-8")


def _read_log(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _write_log(path: Path, rows: list[dict[str, str]]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=["step", "loss", "seconds"])
        writer.writeheader()
        writer.writerows(rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", nargs="+", default=["roneneldan/TinyStories"],
                        help="training texts: story files (.txt, .txt.gz) or hub data sets")  # fmt: skip
    parser.add_argument("--holdout-text", help="story file whose last tenth is held out and whose rest is trained on")
    parser.add_argument("--out", required=True, help="folder of the finished model")
    parser.add_argument("--size", choices=sorted(SIZES), default="large")
    parser.add_argument("--tokenizer", help="folder with a tokenizer to reuse; without it one is trained")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--checkpoint-every", type=int, default=500)
    options = parser.parse_args(arguments)
    changed = {k: getattr(options, k) for k in ("steps", "batch", "seed") if getattr(options, k) is not None}
    settings = TrainingSettings(**{**asdict(SIZES[options.size]), **changed})

    stories = [story for source in options.text for story in load_stories(source)]
    if options.holdout_text:
        kept, holdout = split_holdout(read_stories(options.holdout_text))
        stories += kept
    else:
        stories, holdout = split_holdout(stories, 0.01)
    if options.tokenizer:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(options.tokenizer)
    else:
        tokenizer = train_tokenizer(stories, options.vocab_size, settings.context)
    result = train(tokenizer, stories, holdout, options.out, settings, options.checkpoint_every)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
