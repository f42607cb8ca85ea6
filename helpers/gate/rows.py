"""Texts of different lengths that one model reads together: any of them in one forward, the others left as they are.

`RowReader` is to a batch what `writing.TextReader` is to one text. Its cache holds every text from slot 0 on, so that a
text that reads on disturbs no other; new tokens are padded on the left, and padding is written to a slot of its own
that nobody reads.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    get_layer_types_and_kwargs,
)

from helpers.cache import explain_out_of_memory
from helpers.cache.kinds import shares_states
from helpers.models import check_context


def reads_rows(model: PreTrainedModel) -> bool:
    """Whether all layers of a model are of full attention, each with keys and values of its own, as a batch needs."""
    kinds, _ = get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))
    dense = all(DYNAMIC_LAYER_TYPE_MAPPING.get(kind) is DynamicLayer for kind in kinds)
    return dense and not shares_states(model.config)


class RowCache(Cache):
    """Keys and values of texts `[B, heads, room + 1, head_dim]`; `place` says who reads next, and where.

    Raises `ValueError` for models with sliding windows, states, or shared keys and values.
    """

    def __init__(self, model: PreTrainedModel, batch: int, room: int):
        if not reads_rows(model):
            kind = model.config.model_type
            raise ValueError(
                f"several prompts at once need layers of full attention only, each with its own keys, and {kind} has "
                "others: write one text at a time with gated_generate"
            )
        layers = model.config.get_text_config(decoder=True).num_hidden_layers
        super().__init__(layers=[_RowLayer(self) for _ in range(layers)])
        self.batch, self.room = batch, room
        self.rows, self.slots, self.seen = torch.arange(batch), torch.zeros(batch, 1, dtype=torch.long), 0

    def place(self, rows: torch.Tensor, slots: torch.Tensor, seen: int) -> None:
        """Before a forward: it reads `rows` `[S]`, writes to `slots` `[S, n]` and sees slots below `seen`."""
        self.rows, self.slots, self.seen = rows, slots, seen


class _RowLayer(CacheLayerMixin):
    """One layer of a `RowCache`."""

    def __init__(self, cache: RowCache):
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        def room(x: torch.Tensor) -> torch.Tensor:
            # Zeros: what was never written is weighted by 0, which NaN would survive.
            return x.new_zeros(self.cache.batch, x.shape[1], self.cache.room + 1, x.shape[-1])

        self.keys, self.values = room(key_states), room(value_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, slots, seen = self.cache.rows, self.cache.slots, self.cache.seen
        for kept, new in ((self.keys, key_states), (self.values, value_states)):
            kept[rows[:, None], :, slots] = new.transpose(1, 2)
        if len(rows) == self.cache.batch:
            return self.keys[:, :, :seen], self.values[:, :, :seen]
        return self.keys[rows, :, :seen], self.values[rows, :, :seen]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.seen, 0

    def get_seq_length(self) -> int:
        return self.cache.seen

    def get_max_length(self) -> int:
        return self.cache.room


class RowReader:
    """A model, its own versions of several prompts (token ids), and what it has read of each text, nothing at first.

    Raises `ValueError` where a prompt and what is to be written do not fit into the context of the model, which is
    called `name` then.
    """

    def __init__(self, model: PreTrainedModel, name: str, prompts: Sequence[list[int]], max_new_tokens: int):
        longest = max(map(len, prompts))
        check_context(model, longest, max_new_tokens, name)
        self.model, self.prompts, self.device = model, prompts, model.device
        self.cache = RowCache(model, len(prompts), longest + max_new_tokens)
        self.lengths = [0] * len(prompts)

    def unread(self, row: int, written: list[int]) -> int:
        """How many tokens of prompt number `row` and of what was `written` on it this model has not read."""
        return len(self.prompts[row]) + len(written) - self.lengths[row]

    def catch_up(self, rows: list[int], texts: list[list[int]], keep: int = 1) -> torch.Tensor:
        """Read what is new of the prompts number `rows` and of what was written on each, one of `texts` a row.

        Returns predictions after the last `keep` tokens of each, `[rows, keep, vocabulary]`; where fewer are new, what
        stands before them means nothing.
        """
        news = [(self.prompts[row] + text)[self.lengths[row] :] for row, text in zip(rows, texts, strict=True)]
        n = max(keep, *map(len, news))
        read = torch.tensor([self.lengths[row] for row in rows])
        count = torch.tensor([len(new) for new in news])
        position = read[:, None] + torch.arange(n) - (n - count)[:, None]  # [rows, n]
        real = position >= read[:, None]
        seen = int((read + count).max())
        slots = torch.where(real, position, self.cache.room)
        position = position.clamp(min=0)  # of padding: anything that there is
        sees = torch.arange(seen) <= position[..., None]
        ids = torch.tensor([[0] * (n - len(new)) + new for new in news])
        mask = torch.zeros(sees.shape, dtype=self.model.dtype).masked_fill_(~sees, torch.finfo(self.model.dtype).min)
        device = self.device
        self.cache.place(torch.tensor(rows, device=device), slots.to(device), seen)
        with torch.no_grad(), explain_out_of_memory(f"reading {len(rows)} texts", (self.model, self.cache)):
            logits = self.model(
                input_ids=ids.to(device),
                position_ids=position.to(device),
                attention_mask=mask[:, None].to(device),
                cache=self.cache,
                logits_to_keep=keep,
            ).logits
        for row, new in zip(rows, news, strict=True):
            self.lengths[row] += len(new)
        return logits

    def take_back(self, row: int, tokens: int) -> None:
        """Forget the newest `tokens` tokens of text number `row`."""
        self.lengths[row] -= tokens
