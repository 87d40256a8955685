"""Smoke checks: fixed prompts through both models, which show a broken artifact before anything is measured.

What counts as a failure, in the order it is looked for in every case:

- a logit that is NaN or infinite (always counts);
- an empty answer: no token, or white space only;
- one or two tokens over and over: the last 24 new tokens (all, where there are fewer, but at least 8) have at most two
  distinct ids, as in "!!!!";
- a loop: an n-gram of at most 8 tokens repeats back to back, three times at least, over 3/4 of at least 12 new tokens;
- replacement characters (U+FFFD); one at the very end of an answer that was cut at its limit is half a character;
- the chat template: it is missing, refuses the messages, lacks their contents or role marks, or its own ids differ from
  those of the rendered text.

A healthy small model shows some of this by itself, so the baseline answers the same prompts, and what does not count is
told in its notes:

- an empty answer, one or two tokens, a loop or a fault of the template that the baseline has in the same case too;
- a loop, unless the quantized model falls into loops in at least half of the cases and in twice as many as the baseline
  (a faithful Int4 artifact of a 135M model looped in one case of ten where its baseline did not);
- replacement characters, where the baseline has some in any case.

One more case compares how the answers end: the quantized folder must name every stop token of the baseline, and where
the baseline stops within the first half of the allowed tokens in any case, the quantized model must stop in one too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jinja2 import TemplateError

from qwen_quant.errors import InputError
from qwen_quant.evaluation.generation import Generated, Request, RunSettings, fits_in_memory, generate, stop_ids
from qwen_quant.progress import ProgressFn
from qwen_quant.results import SmokeCase
from qwen_quant.runtime.loading import WeightSource
from qwen_quant.tokenizer import Message, Tokenizer, load_tokenizer

STREAMED_NEW_TOKENS = 12
TAIL_TOKENS, TAIL_LEAST = 24, 8
LOOP_NGRAM, LOOP_REPEATS, LOOP_LEAST, LOOP_SHARE = 8, 3, 12, 0.75
LOOPS = {"repetition", "loop"}
REPLACEMENT = "\ufffd"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"


@dataclass(frozen=True)
class SmokePrompt:
    """One fixed prompt.

    Attributes:
        name, language: of the case.
        text: the user's message, or the text to be continued.
        system: the system message; such a prompt is asked only where there is a chat template.
        continued: sent as plain text even where there is a chat template.
    """

    name: str
    language: str
    text: str
    system: str = ""
    continued: bool = False

    @property
    def messages(self) -> list[Message]:
        """The conversation up to the answer."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.text}]


PROMPTS = (
    SmokePrompt("question-en", "en", "What is the capital of France?"),
    SmokePrompt("arithmetic-en", "en", "What is 17 + 25? Answer with the number."),
    SmokePrompt("code-en", "en", "Write a Python function that returns the larger of two numbers."),
    SmokePrompt("list-en", "en", "Name three fruits, one on each line."),
    SmokePrompt("continuation-en", "en", "The train left the station in the early morning, and", continued=True),
    SmokePrompt("chat-en", "en", "Hello! What can you do?", system="You are a friendly librarian."),
    SmokePrompt("question-zh", "zh", "中国的首都是哪座城市？"),
    SmokePrompt("translation-zh", "zh", "请把这句话翻译成英文：今天的天气很好。"),
    SmokePrompt("continuation-zh", "zh", "春天来了，公园里的花", continued=True),
    SmokePrompt("chat-zh", "zh", "你好，请介绍一下你自己。", system="你是一位耐心的老师。"),
)


@dataclass(frozen=True)
class Answer:
    """What one model was sent and what came back.

    Attributes:
        prompt: as sent. chat_problems: what is wrong with its chat template, in words.
        generated, text: the answer as tokens and decoded.
    """

    prompt: str
    chat_problems: tuple[str, ...]
    generated: Generated
    text: str


@dataclass(frozen=True)
class Sent:
    """A prompt ready for one model: rendered, encoded, with the problems of its chat template."""

    prompt: str
    ids: tuple[int, ...]
    is_chat: bool
    chat_problems: tuple[str, ...]


def smoke_cases(
    baseline: WeightSource,
    quantized: WeightSource,
    device: torch.device,
    progress: ProgressFn,
    *,
    max_new_tokens: int = 48,
    kv_cache: str = "",
) -> tuple[SmokeCase, ...]:
    """Ask both models every prompt, greedy and in FP32, and name what is wrong with the quantized model's answers.

    Models too large for memory are streamed from disk (`generation.fits_in_memory`) and say at most
    STREAMED_NEW_TOKENS tokens, which a note of every case then tells.  A quantized folder that cannot be read or
    run gives failing cases with the reason.  The quantized model answers with a cache of kind `kv_cache` ("": the plain
    one), the baseline with the plain one.  The last case, "stop-tokens", has no prompt of its own.

    Errors: InputError when the baseline cannot be read or run.
    """
    streamed = not (fits_in_memory(baseline, device) and fits_in_memory(quantized, device))
    limit = min(max_new_tokens, STREAMED_NEW_TOKENS) if streamed else max_new_tokens
    tokenizer = load_tokenizer(baseline.folder)
    prompts = [prompt for prompt in PROMPTS if tokenizer.has_chat_template or not prompt.system]
    sent = [_send(tokenizer, prompt, tokenizer.has_chat_template and not prompt.continued) for prompt in prompts]
    run = RunSettings(limit, device, streamed)
    theirs = _answers(baseline, tokenizer, sent, run, progress)
    run = replace(run, kv_cache=kv_cache or run.kv_cache)
    try:
        own_tokenizer = load_tokenizer(quantized.folder)
        own = [_send_like(own_tokenizer, prompt, like) for prompt, like in zip(prompts, sent, strict=True)]
        ours = _answers(quantized, own_tokenizer, own, run, progress)
        stops = _stop_case(theirs, ours, stop_ids(baseline) - stop_ids(quantized), limit)
    except InputError as error:
        return tuple(_unanswered(*item, str(error)) for item in zip(prompts, theirs, strict=True))
    notes = (f"limited to {limit} new tokens: the model is streamed from disk",) if streamed else ()
    cases = judged(prompts, theirs, ours)
    return tuple(replace(case, notes=case.notes + notes) for case in (*cases, stops))


def _send(tokenizer: Tokenizer, prompt: SmokePrompt, is_chat: bool) -> Sent:
    """The prompt through the chat template, or plain where `is_chat` is false (or the template fails)."""
    if not is_chat:
        return Sent(prompt.text, tuple(tokenizer.encode(prompt.text)), False, ())
    try:
        rendered = str(_apply_template(tokenizer, prompt.messages, tokenize=False))
        ids = tokenizer.encode(rendered)
        template_ids = _apply_template(tokenizer, prompt.messages, tokenize=True)
    except (TemplateError, ValueError, KeyError, TypeError) as error:
        problem = f"the chat template refuses the messages: {error}"
        return Sent(prompt.text, tuple(tokenizer.encode(prompt.text)), True, (problem,))
    problems = _template_problems(tokenizer, prompt.messages, rendered, ids)
    if template_ids != ids:
        problems.append("the chat template's own token ids differ from those of the text it renders")
    return Sent(rendered, tuple(ids), True, tuple(problems))


def _apply_template(tokenizer: Tokenizer, messages: Sequence[Message], *, tokenize: bool) -> object:
    """The conversation as text or token ids, ending where the assistant's answer begins."""
    inner = tokenizer._inner  # Tokenizer.chat_ids renders finished conversations only
    return inner.apply_chat_template(list(messages), tokenize=tokenize, add_generation_prompt=True, return_dict=False)


def _template_problems(
    tokenizer: Tokenizer, messages: Sequence[Message], rendered: str, ids: Sequence[int]
) -> list[str]:
    """What the rendered prompt lacks: contents, role marks, role marks as tokens of their own."""
    problems = [
        f"the chat template drops the {message['role']} message"
        for message in messages
        if message["content"] not in rendered
    ]
    mark = tokenizer.encode(TURN_START)
    known = len(mark) == 1
    roles = [*(message["role"] for message in messages), "assistant"]
    marks = [f"{TURN_START}{role}" if known else role for role in roles]
    problems += [f"the chat template does not write {text!r}" for text in marks if text not in rendered]
    if known and not problems and list(ids).count(mark[0]) < len(roles):
        problems.append(f"{TURN_START} is not encoded as one token")
    return problems


def _send_like(tokenizer: Tokenizer, prompt: SmokePrompt, like: Sent) -> Sent:
    """The prompt for the quantized model, in the form `like` in which the baseline got it."""
    if not like.is_chat:
        return _send(tokenizer, prompt, False)
    if not tokenizer.has_chat_template:
        problem = "the quantized folder has no chat template, the baseline has one"
        return Sent(like.prompt, tuple(tokenizer.encode(like.prompt)), True, (problem,))
    sent = _send(tokenizer, prompt, True)
    if sent.chat_problems or (sent.prompt, sent.ids) == (like.prompt, like.ids):
        return sent
    return replace(sent, chat_problems=("the chat template gives another prompt than the baseline's",))


def _answers(
    source: WeightSource, tokenizer: Tokenizer, sent: Sequence[Sent], run: RunSettings, progress: ProgressFn
) -> list[Answer]:
    """Generate and decode; a chat also ends at <|im_end|> where that is one token."""
    stops, end = stop_ids(source), tokenizer.encode(TURN_END)
    chat_stops = stops | set(end) if len(end) == 1 else stops
    requests = [Request(item.ids, chat_stops if item.is_chat else stops) for item in sent]
    generated = generate(source, requests, run, progress)
    answers = []
    for item, said in zip(sent, generated, strict=True):
        text = tokenizer.decode(said.ids) if said.ids else ""
        text = text if said.stopped else text.rstrip(REPLACEMENT)
        answers.append(Answer(item.prompt, item.chat_problems, said, text))
    return answers


def repeats_itself(ids: Sequence[int]) -> bool:
    """Whether the last TAIL_TOKENS ids (all, where there are fewer) are TAIL_LEAST or more with two distinct values."""
    return len(ids) >= TAIL_LEAST and len(set(ids[-TAIL_TOKENS:])) <= 2


def loop_length(ids: Sequence[int]) -> int:
    """Length of the shortest n-gram that repeats back to back over LOOP_SHARE of the ids, or 0 when none does."""
    if len(ids) < LOOP_LEAST:
        return 0
    for length in range(1, LOOP_NGRAM + 1):
        longest = run = 0
        for place in range(length, len(ids)):
            run = run + 1 if ids[place] == ids[place - length] else 0
            longest = max(longest, run)
        covered = longest + length if longest else 0
        if covered >= max(LOOP_REPEATS * length, LOOP_SHARE * len(ids)):
            return length
    return 0


def symptoms(answer: Answer) -> dict[str, str]:
    """What is wrong with one answer: kind -> words. Kinds: non-finite, empty, repetition, loop, mojibake."""
    found, ids = {}, answer.generated.ids
    if answer.generated.non_finite:
        found["non-finite"] = f"the logits of new token {len(ids) + 1} are not finite"
    elif not answer.text.strip():
        found["empty"] = "the answer is empty"
    if repeats_itself(ids):
        tokens = " and ".join(str(token) for token in sorted(set(ids[-TAIL_TOKENS:])))
        found["repetition"] = f"the last {min(len(ids), TAIL_TOKENS)} tokens are only token {tokens}"
    elif length := loop_length(ids):
        found["loop"] = f"the answer repeats {length} token(s) over and over"
    if REPLACEMENT in answer.text:
        found["mojibake"] = f"the answer holds {answer.text.count(REPLACEMENT)} replacement character(s) (U+FFFD)"
    return found


def judged(
    prompts: Sequence[SmokePrompt], baseline: Sequence[Answer], quantized: Sequence[Answer]
) -> tuple[SmokeCase, ...]:
    """One case a prompt: its symptoms are failures unless the baseline has them, as the module docstring says."""
    theirs, ours = [symptoms(answer) for answer in baseline], [symptoms(answer) for answer in quantized]
    excuses = _excuses(theirs, ours)
    cases = []
    for prompt, their, our, shown, found in zip(prompts, baseline, quantized, theirs, ours, strict=True):
        alike = shown.keys() | (LOOPS if LOOPS & shown.keys() else set())
        reasons = {**excuses, **dict.fromkeys(alike - {"non-finite"}, "the baseline does so too")}
        failures = [words for kind, words in found.items() if kind not in reasons]
        notes = [f"not counted, {reasons[kind]}: {words}" for kind, words in found.items() if kind in reasons]
        for problem in our.chat_problems:
            if problem in their.chat_problems:
                notes.append(f"not counted, the baseline's is the same: {problem}")
            else:
                failures.append(problem)
        cases.append(_case(prompt, their, our, failures, notes))
    return tuple(cases)


def _excuses(baseline: Sequence[dict[str, str]], quantized: Sequence[dict[str, str]]) -> dict[str, str]:
    """Kinds of symptoms that do not count in any case -> why, from the symptoms of all cases of both models."""
    theirs, ours = (sum(bool(LOOPS & found.keys()) for found in cases) for cases in (baseline, quantized))
    excuses = {}
    if ours < max(len(quantized) / 2, 2 * theirs):
        excuses["loop"] = f"only {ours} of {len(quantized)} answers loop and {theirs} of the baseline's"
    if any("mojibake" in found for found in baseline):
        excuses["mojibake"] = "the baseline has such answers"
    return excuses


def _case(prompt: SmokePrompt, their: Answer, our: Answer, failures: Sequence[str], notes: Sequence[str]) -> SmokeCase:
    return SmokeCase(
        name=prompt.name,
        language=prompt.language,
        prompt=our.prompt,
        text=our.text,
        tokens=len(our.generated.ids),
        stopped=our.generated.stopped,
        baseline_text=their.text,
        failures=tuple(failures),
        notes=tuple(notes),
    )


def _unanswered(prompt: SmokePrompt, their: Answer, reason: str) -> SmokeCase:
    """The case of a quantized folder that could not be read or run."""
    silent = Answer(their.prompt, (), Generated((), False, False), "")
    return _case(prompt, their, silent, (reason,), ())


def _stop_case(
    baseline: Sequence[Answer], quantized: Sequence[Answer], missing: frozenset[int], limit: int
) -> SmokeCase:
    """How the answers of both models end; `missing` are stop tokens that only the baseline's folder names."""
    early = sum(answer.generated.stopped and len(answer.generated.ids) < limit / 2 for answer in baseline)
    stopped = [sum(answer.generated.stopped for answer in answers) for answers in (baseline, quantized)]
    failures = []
    if missing:
        names = ", ".join(str(token) for token in sorted(missing))
        failures.append(f"the quantized folder does not name the baseline's stop token(s) {names}")
    if early and not stopped[1] and not all(answer.generated.non_finite for answer in quantized):
        failures.append(f"the model never stops; the baseline stops early in {early} of {len(baseline)} cases")
    texts = [f"{count} of {len(baseline)} answers end at a stop token within {limit} tokens" for count in stopped]
    return SmokeCase("stop-tokens", "", "", texts[1], 0, stopped[1] > 0, texts[0], tuple(failures))
