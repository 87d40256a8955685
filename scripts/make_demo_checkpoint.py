"""Train the small Qwen3-layout checkpoint that ships with the package, from public text, on a CPU.

    python scripts/make_demo_checkpoint.py --minutes 20 [--start FOLDER] [--data FOLDER] [--out FOLDER] [--force]

The network is transformers' own Qwen3 (q/k norms, grouped heads, tied embeddings) with about 4.2 million parameters;
its tokenizer is a byte-level BPE of 4096 entries trained on the same text. It exists so that quantization can be seen
to cost perplexity without any download: it is a language model, though a very small one, and answers no questions.

The learning rate follows elapsed time, so that the cosine always ends when ``--minutes`` does. Data order and initial
weights are fixed by ``--seed``; the number of steps, hence the weights, depends on the machine.
The last ``LONG_SHARE`` of the time uses 2048-token windows, for calibration and perplexity at that usual length.
The shipped weights are two runs: 20 minutes, then 16 more with ``--start`` on the first one's folder.
The log (standard error) holds the loss curve and the final held-out perplexities.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from bundled_sources import (
    C4_SOURCE,
    CHAT_SOURCES,
    DEFAULT_DATA,
    PACKAGE_DATA,
    ZH_TRAIN_FOLDS,
    read_c4,
    read_chat,
    read_long_documents,
    read_wikitext,
    read_zh_wiki,
    render_chatml,
)
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

log = logging.getLogger("make_demo_checkpoint")

VOCAB_SIZE = 4096
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Word splitting of the Qwen2 tokenizer (a public format constant; a different one would not be Qwen-compatible)."""
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MIX = {"wikitext": 0.42, "chat": 0.24, "c4": 0.14, "longdoc": 0.09, "zh": 0.11}
"""Share of training windows drawn from each source."""


@dataclass(frozen=True)
class Training:
    """Settings of one run. ``seconds`` bounds training; windows are in tokens, and a batch holds at least one."""

    seconds: float
    seed: int
    window: int = 256
    long_window: int = 2048
    batch_tokens: int = 1024
    learning_rate: float = 2.5e-3
    warmup_share: float = 0.04
    weight_decay: float = 0.1


LONG_SHARE = 0.15
"""Share of the time, at its end, spent on the long windows."""
RESTART_SHARE = 0.8
"""Peak learning rate of a run that starts from trained weights, as a share of the first run's."""


def read_documents(data: Path) -> dict[str, list[str]]:
    """Training texts per source of ``MIX``; the WikiText-2 test split is not among them."""
    return {
        "wikitext": [read_wikitext(data, "wiki.valid.raw")],
        "chat": ["".join(render_chatml(row.messages)) for row in read_chat(data)],
        "c4": read_c4(data),
        "longdoc": [row["text"] for row in read_long_documents(data)],
        "zh": read_zh_wiki(data, ZH_TRAIN_FOLDS),
    }


def train_tokenizer(documents: dict[str, list[str]]) -> PreTrainedTokenizerFast:
    """Byte-level BPE in Qwen2's layout: NFC, its split pattern, ``VOCAB_SIZE`` entries with the specials last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for texts in documents.values() for text in texts), trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    return wrap_tokenizer(tokenizer)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of an earlier run, with the template and special tokens that this script gives it."""
    return wrap_tokenizer(Tokenizer.from_file(str(folder / "tokenizer.json")))


def wrap_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """A transformers tokenizer around a byte-level one whose vocabulary holds ``SPECIALS``."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def tokenize_documents(tokenizer: PreTrainedTokenizerFast, texts: list[str], seed: int) -> torch.Tensor:
    """One int64 stream of token ids: the texts in a seeded order, each closed by ``<|endoftext|>``."""
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    encoded = tokenizer.backend_tokenizer.encode_batch([texts[index] for index in order])
    return torch.tensor([token for item in encoded for token in (*item.ids, end)])


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A randomly initialised Qwen3; in_features of its linears are multiples of 128, out_features of 32."""
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        attn_implementation="sdpa",
    )
    model = Qwen3ForCausalLM(config)
    model.config.use_cache = False
    return model


def draw_batch(streams: dict[str, torch.Tensor], window: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """``[count, window + 1]`` int64 windows, each from a source drawn by ``MIX`` and at a uniform position."""
    names = list(MIX)
    picks = torch.multinomial(torch.tensor(list(MIX.values())), count, replacement=True, generator=generator)
    rows = []
    for pick in picks.tolist():
        stream = streams[names[pick]]
        start = int(torch.randint(len(stream) - window - 1, (1,), generator=generator))
        rows.append(stream[start : start + window + 1])
    return torch.stack(rows)


def mean_loss(model: Qwen3ForCausalLM, windows: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy in nats over windows ``[count, length]``."""
    logits = model(input_ids=windows[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: Qwen3ForCausalLM, tokens: torch.Tensor, window: int) -> float:
    """Nats per token over disjoint windows ``[window]`` of a stream (the last, shorter one is dropped)."""
    windows = tokens[: len(tokens) // window * window].view(-1, window)
    step = max(1, 2048 // window)
    losses = [mean_loss(model, part).item() * len(part) for part in windows.split(step)]
    return sum(losses) / len(windows)


def make_optimizer(model: Qwen3ForCausalLM, training: Training) -> torch.optim.AdamW:
    """AdamW that decays matrices only, never norms."""
    matrices = [value for value in model.parameters() if value.ndim > 1]
    vectors = [value for value in model.parameters() if value.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": training.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=training.learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)


def learning_rate_at(progress: float, training: Training) -> float:
    """Linear warm-up, then a cosine down to 2 % of the peak, for ``progress`` in [0, 1]."""
    if progress < training.warmup_share:
        return training.learning_rate * (progress / training.warmup_share + 0.01)
    along = (progress - training.warmup_share) / (1 - training.warmup_share)
    return training.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * along)))


def train(
    model: Qwen3ForCausalLM, streams: dict[str, torch.Tensor], held_out: torch.Tensor, training: Training
) -> None:
    """Train in place until ``training.seconds`` have passed; logs the running loss and a held-out loss."""
    optimizer = make_optimizer(model, training)
    generator = torch.Generator().manual_seed(training.seed)
    started, step, tokens, smooth = time.monotonic(), 0, 0, math.log(VOCAB_SIZE)
    while (progress := (time.monotonic() - started) / training.seconds) < 1:
        window = training.long_window if progress > 1 - LONG_SHARE else training.window
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(progress, training)
        batch = draw_batch(streams, window, max(1, training.batch_tokens // window), generator)
        loss = mean_loss(model, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        smooth += 0.05 * (loss.item() - smooth)
        step, tokens = step + 1, tokens + batch[:, 1:].numel()
        if step % 50 == 0:
            log.info("step %d  progress %.3f  window %d  loss %.4f", step, progress, window, smooth)
        if step % 400 == 0:
            log.info("step %d  held-out loss %.4f", step, held_out_loss(model, held_out[:8192], training.window))
    log.info("trained %d steps, %d tokens", step, tokens)


def report_held_out(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Log the final perplexity per token (and bits per byte) of both held-out texts at three window lengths."""
    for name in ("demo_eval.txt", "eval_zh.txt"):
        text = (PACKAGE_DATA / name).read_text(encoding="utf-8")
        tokens = torch.tensor(tokenizer.backend_tokenizer.encode(text).ids)
        for window in (256, 1024, 2048):
            loss = held_out_loss(model, tokens, window)
            bits = loss / math.log(2) * len(tokens) / len(text.encode())
            log.info("%s window %d: loss %.4f perplexity %.3f bits/byte %.4f", name, window, loss, math.exp(loss), bits)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """tokenizer.json and a tokenizer_config.json that names Qwen2's class and holds the template, as Qwen's own do."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("backend", "is_local", "local_files_only"):
        config.pop(key, None)
    config |= {"tokenizer_class": "Qwen2Tokenizer", "chat_template": CHAT_TEMPLATE, "add_prefix_space": False}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").unlink(missing_ok=True)


def write_notice(folder: Path, data: Path) -> None:
    """``NOTICE.md``: what the folder is, and each text it was trained on with its licence."""
    lines = [
        "# Demo checkpoint\n",
        "Weights and tokenizer trained by `scripts/make_demo_checkpoint.py` of qwen-quant for its demo and tests.",
        "The weights are offered under the licence of qwen-quant. No weights of any other model were used.",
        "No training text is included here; the texts, with their licences and origins:\n",
        "| text | licence | origin |",
        "|---|---|---|",
        "| WikiText-2 raw, validation split | CC BY-SA 3.0 | Wikipedia contributors; Merity et al. 2016 |",
        "| CMRC 2018 contexts, half of the rows | CC BY-SA 4.0 | ymcui/cmrc2018@c0eb1b6ba219; Chinese Wikipedia |",
        f"| C4 sample | {C4_SOURCE.licence} | {C4_SOURCE.origin} |",
    ]
    lines += [f"| {row['id']} | {row['licence']} | {row['source']} |" for row in read_long_documents(data)]
    lines += [f"| {name} | {source.licence} | {source.origin} |" for name, source in CHAT_SOURCES.items()]
    (folder / "NOTICE.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path, data: Path) -> None:
    """Write config, BF16 safetensors, tokenizer and notice to a temporary folder, then rename it to ``out``."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.config.use_cache = True
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.convert_tokens_to_ids("<|im_end|>"), end], pad_token_id=end
    )
    model.to(torch.bfloat16).save_pretrained(partial)
    save_tokenizer(tokenizer, partial)
    (partial / "model.safetensors").chmod(0o644)
    write_notice(partial, data)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


def parse_arguments() -> argparse.Namespace:
    """The command line; exits with usage when the output folder exists and ``--force`` is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder of the public texts")
    parser.add_argument("--out", type=Path, default=PACKAGE_DATA / "demo_checkpoint", help="folder to write")
    parser.add_argument("--start", type=Path, help="go on from this folder's weights and tokenizer")
    parser.add_argument("--minutes", type=float, default=20.0, help="training time")
    parser.add_argument("--seed", type=int, default=20240921)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--force", action="store_true", help="replace an existing output folder")
    options = parser.parse_args()
    if options.out.exists() and not options.force:
        parser.error(f"{options.out} exists; pass --force to replace it")
    return options


def main() -> int:
    """Train, save, report; returns the exit status."""
    options = parse_arguments()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    documents = read_documents(options.data)
    tokenizer = load_tokenizer(options.start) if options.start else train_tokenizer(documents)
    streams = {name: tokenize_documents(tokenizer, texts, options.seed) for name, texts in documents.items()}
    log.info("training tokens: %s", {name: len(stream) for name, stream in streams.items()})
    model = build_model(tokenizer)
    training = Training(seconds=options.minutes * 60, seed=options.seed)
    if options.start:
        model.load_state_dict(Qwen3ForCausalLM.from_pretrained(options.start, dtype=torch.float32).state_dict())
        training = replace(training, seed=options.seed + 1, learning_rate=training.learning_rate * RESTART_SHARE)
    log.info("parameters: %d", sum(value.numel() for value in model.parameters()))
    held_out_text = (PACKAGE_DATA / "demo_eval.txt").read_text(encoding="utf-8")
    held_out = torch.tensor(tokenizer.backend_tokenizer.encode(held_out_text).ids)
    train(model, streams, held_out, training)
    save(model, tokenizer, options.out, options.data)
    report_held_out(model.float(), tokenizer)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
