"""The base model with a PEFT adapter on it, and the loss of a batch.

Shapes: N rows, L tokens a row, P positions at which some row of the batch has a target, V vocabulary.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from manylora.errors import ConfigError, ModelError
from manylora.models.locate import locate
from manylora.models.progress_bars import no_progress_bars
from manylora.models.tokenizer import load_tokenizer
from manylora.train.text_config import ALL_LINEAR, TextTrainConfig
from manylora.train.text_data import IGNORED, Batch, Example, make_batch

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase


def load_base(model: str) -> "tuple[Any, PreTrainedTokenizerBase]":
    """Load transformers' model in fp32, and the tokenizer that the text engine uses, so that both see the same tokens.

    Args:
        model: what manylora.models.locate takes: a folder, a GGUF file, a hub id or the demo model's name.
    Raises:
        ModelError: it cannot be loaded; with transformers' reason.
    """
    from transformers import AutoModelForCausalLM

    files = locate(model)
    options: dict[str, Any] = {} if files.gguf is None else {"gguf_file": files.gguf.name}
    try:
        with no_progress_bars():
            base = AutoModelForCausalLM.from_pretrained(
                files.directory, dtype=torch.float32, local_files_only=True, **options
            )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"base model '{files.name}' cannot be loaded: {error}") from error
    return base, load_tokenizer(model)


class TextStudent:
    """A causal LM whose adapter is trained: what is trained, what a batch costs.

    Args:
        model: transformers' causal LM in fp32. PEFT wraps its Linear layers in place.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: "PreTrainedTokenizerBase",
        config: TextTrainConfig,
        accelerator: "Accelerator",
    ) -> None:
        from peft import LoraConfig, get_peft_model

        _check_fit(model, config)
        all_linear = config.targets == (ALL_LINEAR,)
        lora = LoraConfig(
            r=config.rank,
            lora_alpha=config.resolved_alpha,
            target_modules=ALL_LINEAR if all_linear else list(config.targets),
            use_rslora=config.rslora,
            lora_dropout=config.dropout,
            bias="none",
            task_type="CAUSAL_LM",
        )
        torch.manual_seed(config.seed)
        with warnings.catch_warnings():
            # PEFT asks for `is_gradient_checkpointing`, which transformers 5 has renamed: nothing the user can change.
            warnings.simplefilter("ignore", FutureWarning)
            self.model = get_peft_model(model, lora).to(accelerator.device)
        self.accelerator = accelerator
        self.pad_token: int = _pad_token(tokenizer)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def batch(self, examples: Sequence[Example]) -> Batch:
        """Pad examples and move them to the model's device."""
        return make_batch(examples, self.pad_token, self.accelerator.device)

    def loss_sum(self, batch: Batch) -> Tensor:
        """Return the summed cross entropy of the batch's targets, in nats, fp32 scalar."""
        # The vocabulary product is a fifth of a small model's work: do it only where some row has a target.
        positions_P = (batch.labels != IGNORED).any(0).nonzero().squeeze(1)
        with self.accelerator.autocast():
            logits_NPV = self.model(
                input_ids=batch.tokens,
                attention_mask=batch.attention_mask,
                logits_to_keep=positions_P,
                use_cache=False,
            ).logits
        labels_NP = batch.labels[:, positions_P]
        return cross_entropy(
            logits_NPV.float().flatten(0, 1), labels_NP.flatten(), ignore_index=IGNORED, reduction="sum"
        )

    def mean_loss(self, examples: Sequence[Example], batch_rows: int) -> float:
        """Return the mean loss a target token over examples, in nats, without dropout."""
        by_length = sorted(examples, key=lambda example: len(example.tokens))
        total, num_targets = 0.0, 0
        self.model.eval()
        with torch.no_grad():
            for start in range(0, len(by_length), batch_rows):
                batch = self.batch(by_length[start : start + batch_rows])
                total += self.loss_sum(batch).item()
                num_targets += batch.num_targets
        self.model.train()
        return total / num_targets

    def base_loss(self, examples: Sequence[Example], batch_rows: int) -> float:
        """`mean_loss` of the base alone."""
        with self.model.disable_adapter():
            return self.mean_loss(examples, batch_rows)


def step_losses(
    student: TextStudent, examples: Sequence[Example], plan: Callable[[int], list[list[int]]]
) -> Callable[[int], Iterator[Tensor]]:
    """Return, for a training loop, the losses of a step's micro-batches; they add up to the mean over its targets.

    Args:
        plan: the step's micro-batches as indices of examples.
    """

    def losses(step: int) -> Iterator[Tensor]:
        batches = [student.batch([examples[i] for i in rows]) for rows in plan(step)]
        # Every target of the step weighs the same, whichever micro-batch it stands in.
        num_targets = sum(batch.num_targets for batch in batches)
        for batch in batches:
            yield student.loss_sum(batch) / num_targets

    return losses


def _check_fit(model: Any, config: TextTrainConfig) -> None:
    head = model.get_output_embeddings()  # often the embedding itself, and no site of the text engine
    linears = sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module is not head
        }
    )
    if config.targets != (ALL_LINEAR,):
        unknown = [target for target in config.targets if target not in linears]
        if unknown:
            raise ConfigError(
                f"targets {unknown} are no linear modules of '{config.model}'; it has {linears}, or '{ALL_LINEAR}'"
            )
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and config.max_tokens > longest:
        raise ConfigError(
            f"max_tokens is {config.max_tokens}, but '{config.model}' takes at most {longest} tokens"
        )


def _pad_token(tokenizer: "PreTrainedTokenizerBase") -> int:
    # Padding is masked out and has no target, so any token does where the tokenizer names none.
    pad_token: int | None = tokenizer.pad_token_id
    return 0 if pad_token is None else pad_token
