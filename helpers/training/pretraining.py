"""Training the story models that the project ships with, from text files to a folder in Hugging Face format.

    python main.py pretrain --text stories.txt.gz --holdout-text real_stories.txt --out data/models/large

Byte-level BPE tokenizer, a small Llama, next-token loss on packed sequences. Hidden matrices are trained with Muon
(K. Jordan, 2024), the rest with AdamW; warm-up, then cosine decay to zero. Batches are a function of seed and step
alone, and a checkpoint holds weights and optimizer state, so an interrupted run goes on as if it had not been.
"""

import json
import math
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from helpers.io import provenance, write_filled, write_json, write_table
from helpers.io.atomic import atomic_files, remove_folder
from helpers.io.processes import on_cpu
from helpers.models import load_stories, read_stories, split_holdout
from helpers.training.checkpoints import load_checkpoint, read_log, save_checkpoint
from helpers.training.settings import PretrainOptions, TrainingSettings
from helpers.training.tokenizer import encode_stories, train_tokenizer

CARD = Path(__file__).parent / "cards" / "story_model.md"


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


def batch_sequences(tokens: np.ndarray, settings: TrainingSettings, step: int) -> np.ndarray:
    """Sequences `[batch, context + 1]` of a step: each epoch cuts the text at another offset and shuffles the pieces.

    The last token of a sequence is the target of the one before it only, so it opens the next sequence again.
    """
    an_epoch = (len(tokens) - settings.context - 1) // settings.context
    sequences = []
    for index in range(step * settings.batch, (step + 1) * settings.batch):
        epoch, position = divmod(index, an_epoch)
        order = np.random.default_rng((settings.seed, epoch))
        offset = int(order.integers(settings.context))
        start = int(order.permutation(an_epoch)[position]) * settings.context + offset
        sequences.append(tokens[start : start + settings.context + 1])
    return np.stack(sequences)


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


def train(
    tokenizer: PreTrainedTokenizerFast,
    train_stories: list[str],
    holdout_stories: list[str],
    out: str | Path,
    settings: TrainingSettings,
    checkpoint_every: int = 500,
    stop_after: int | None = None,
) -> dict[str, object]:
    """Train a model and save it, its tokenizer, card and `training.json` in `out`; return the content of the last.

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
    if len(tokens) < (least := settings.context * (settings.batch + 2)):
        raise ValueError(
            f"the training text holds {len(tokens)} tokens; one batch needs {least}: give more text, or a smaller "
            "batch or context"
        )
    run = {"settings": asdict(settings), "tokens": len(tokens), "checksum": int(tokens.astype(np.int64).sum())}
    model = build_model(settings, tokenizer)
    optimizers = build_optimizers(model, settings)
    first_step = load_checkpoint(checkpoint, model, optimizers, run)
    log_path = out / "training_log.csv"
    log = read_log(log_path, first_step)
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
        ids = torch.from_numpy(batch_sequences(tokens, settings, step)[mine]).long().to(accelerator.device)
        factor = learning_rate_factor(step, settings)
        for optimizer, rate in zip(optimizers, (settings.muon_lr, settings.adamw_lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), settings.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        done = step + 1
        if done % 50 == 0 or done == last_step:
            seconds = seconds_before + time.perf_counter() - started
            log.append({"step": done, "loss": f"{np.mean(losses):.4f}", "seconds": f"{seconds:.0f}"})
            progress.set_postfix(loss=log[-1]["loss"])
            losses = []
        if accelerator.is_main_process and (done % checkpoint_every == 0 or done == last_step):
            bare = accelerator.unwrap_model(model)
            # The log first: its lines beyond the checkpoint are dropped when the run is taken up again.
            write_table(log_path, pd.DataFrame(log, columns=["step", "loss", "seconds"]))
            save_checkpoint(checkpoint, bare, [o.optimizer for o in optimizers], done, run)
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
        write_filled(out / "README.md", CARD, **result, minutes=result["seconds"] / 60)
        remove_folder(checkpoint)
    accelerator.wait_for_everyone()
    return result


def pretrain(options: PretrainOptions) -> dict[str, object]:
    """Train a model as `options` say and print what `training.json` says of it, which is returned too."""
    stories = [story for source in options.text for story in load_stories(source)]
    if options.holdout_text:
        kept, holdout = split_holdout(read_stories(options.holdout_text))
        stories += kept
    else:
        stories, holdout = split_holdout(stories, 0.01)
    settings = options.settings
    if options.tokenizer:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(options.tokenizer)
    else:
        tokenizer = train_tokenizer(stories, options.vocab_size, settings.context)
    result = train(tokenizer, stories, holdout, options.out, settings, options.checkpoint_every)
    print(json.dumps(result, indent=2))
    return result
