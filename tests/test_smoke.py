"""evaluation/smoke.py and generation.py: planted damage is named, a healthy pair passes, both ways to run agree.

The scripted checkpoint says the character after the last one it saw ("A" -> "B" -> ...) and stops after "J": one-hot
embeddings, blocks that add nothing, and a head that is the table of successors. So every answer is known in advance.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qwen_quant.errors import InputError
from qwen_quant.evaluation import generation, smoke
from qwen_quant.evaluation.generation import Generated, Request, RunSettings, fits_in_memory, generate, stop_ids
from qwen_quant.evaluation.smoke import PROMPTS, loop_length, repeats_itself, smoke_cases
from qwen_quant.progress import no_progress
from qwen_quant.results import SmokeCase
from qwen_quant.runtime.loading import WeightSource, load_model
from qwen_quant.tokenizer import load_tokenizer
from tests.support.artifacts import change_config, make_artifact
from tests.support.checkpoints import CHAT_TEMPLATE, edit_tensors, make_checkpoint

CPU = torch.device("cpu")
VOCABULARY, IM_END = 320, 258
A, J = ord("A") - ord("!"), ord("J") - ord("!")  # ids 0 to 93 are the printable ASCII characters in order
TEMPLATE = CHAT_TEMPLATE + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"


def successors() -> dict[int, int]:
    """What the scripted model says after each token."""
    table = {token: (token + 1) % 94 if token < 94 else A for token in range(VOCABULARY)}
    return {**table, J: IM_END}


def head(table: dict[int, int]) -> torch.Tensor:
    weight = torch.zeros(VOCABULARY, VOCABULARY)
    weight[list(table.values()), list(table)] = 1
    return weight.bfloat16()


def set_template(folder: Path, template: str | None) -> None:
    path = folder / "tokenizer_config.json"
    settings = {**json.loads(path.read_text()), "chat_template": template}
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))


@pytest.fixture(scope="session")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripted checkpoint. Read only: copy it to damage it."""
    folder = make_checkpoint(tmp_path_factory.mktemp("scripted") / "scripted", tied=False, hidden_size=VOCABULARY)
    silent = {name: torch.zeros_like(value) for name, value in load_file(folder / "model.safetensors").items()}
    blocks = {name.replace(".", "__"): value for name, value in silent.items() if "o_proj" in name or "down" in name}
    edit_tensors(folder, **blocks, lm_head__weight=head(successors()))
    edit_tensors(folder, model__embed_tokens__weight=torch.eye(VOCABULARY).bfloat16())
    change_config(folder, eos_token_id=IM_END)
    set_template(folder, TEMPLATE)
    return folder


@pytest.fixture
def damaged(scripted: Path, tmp_path: Path) -> Path:
    """A copy of the scripted checkpoint to damage."""
    return Path(shutil.copytree(scripted, tmp_path / "damaged"))


def cases(baseline: Path, quantized: Path, **settings: Any) -> dict[str, SmokeCase]:
    found = smoke_cases(WeightSource(baseline), WeightSource(quantized), CPU, no_progress, **settings)
    return {case.name: case for case in found}


def failures(baseline: Path, quantized: Path) -> dict[str, tuple[str, ...]]:
    return {name: case.failures for name, case in cases(baseline, quantized).items() if case.failures}


def requests(folder: Path, stops: frozenset[int] = frozenset()) -> list[Request]:
    tokenizer = load_tokenizer(folder)
    return [Request(tuple(tokenizer.encode(prompt.text)), stops) for prompt in PROMPTS]


@pytest.fixture(params=["qwen2", "qwen3", "artifact"])
def random_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param != "artifact":
        return Path(request.getfixturevalue(f"{request.param}_folder"))
    make_artifact(request.getfixturevalue("qwen2_folder"), tmp_path / "artifact")
    return tmp_path / "artifact"


def test_dense_and_streamed_say_the_same_and_what_transformers_says(random_folder: Path) -> None:
    source, asked = WeightSource(random_folder), requests(random_folder)
    dense = generate(source, asked, RunSettings(12, CPU, False), no_progress)
    assert dense == generate(source, asked, RunSettings(12, CPU, True), no_progress)
    model = load_model(random_folder)
    for said, request in zip(dense, asked, strict=True):
        row = model.generate(torch.tensor([request.ids]), max_new_tokens=12, do_sample=False, eos_token_id=None)
        assert said == Generated(tuple(row[0, len(request.ids) :].tolist()), False, False)
    assert len({said.ids for said in dense}) > len(dense) // 2  # the answers depend on the prompts


@pytest.mark.parametrize("streamed", [False, True])
def test_a_stop_token_ends_one_prompt_and_not_the_others(qwen2_folder: Path, streamed: bool) -> None:
    source, asked = WeightSource(qwen2_folder), requests(qwen2_folder)
    free = generate(source, asked, RunSettings(8, CPU, streamed), no_progress)
    token = free[0].ids[3]
    asked[0] = Request(asked[0].ids, frozenset({token}))
    held = generate(source, asked, RunSettings(8, CPU, streamed), no_progress)
    assert held[0] == Generated(free[0].ids[: free[0].ids.index(token)], True, False) and held[1:] == free[1:]


def test_a_healthy_pair_passes_and_its_texts_are_told(scripted: Path) -> None:
    found = cases(scripted, scripted)
    assert list(found) == [*(prompt.name for prompt in PROMPTS), "stop-tokens"]
    assert not any(case.failures for case in found.values())
    chat = found["chat-zh"]
    assert (chat.text, chat.baseline_text, chat.tokens, chat.stopped) == ("ABCDEFGHIJ", "ABCDEFGHIJ", 10, True)
    assert chat.prompt.startswith("<|im_start|>system\n你是") and chat.prompt.endswith("<|im_start|>assistant\n")
    plain = found["continuation-en"]
    assert (
        plain.prompt.endswith(", and")
        and plain.text.startswith("efgh")
        and (plain.tokens, plain.stopped) == (48, False)
    )
    assert found["stop-tokens"].text == "9 of 10 answers end at a stop token within 48 tokens"


def test_without_a_chat_template_prompts_are_plain(scripted: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(scripted, tmp_path / "base"))
    set_template(folder, None)
    found = cases(folder, folder)
    assert "chat-en" not in found and found["question-en"].prompt == PROMPTS[0].text
    assert not any(case.failures for case in found.values())


@pytest.mark.parametrize("streamed", [False, True])
def test_nan_weights(scripted: Path, damaged: Path, streamed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoke, "fits_in_memory", lambda source, device: not streamed)
    weight = load_file(damaged / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    weight[5, 7] = float("nan")
    edit_tensors(damaged, model__layers__1__mlp__down_proj__weight=weight)
    found = failures(scripted, damaged)
    assert found == {prompt.name: ("the logits of new token 1 are not finite",) for prompt in PROMPTS}
    assert failures(damaged, damaged) == found  # never forgiven


def test_nan_in_one_prompt_leaves_the_others_alone(scripted: Path, damaged: Path) -> None:
    weight = torch.eye(VOCABULARY).bfloat16()
    weight[ord("P") - ord("!")] = float("nan")  # only "Python" has a P
    edit_tensors(damaged, model__embed_tokens__weight=weight)
    assert list(failures(scripted, damaged)) == ["code-en"]


def test_exclamation_marks(scripted: Path, damaged: Path) -> None:
    weight = head(successors())
    weight[0] = 2
    edit_tensors(damaged, lm_head__weight=weight)
    found = failures(scripted, damaged)
    assert len(found) == len(PROMPTS) + 1
    assert found["chat-en"] == ("the last 24 tokens are only token 0",)
    assert cases(scripted, damaged)["chat-en"].text == 48 * "!"


def test_loops(scripted: Path, damaged: Path) -> None:
    edit_tensors(damaged, lm_head__weight=head({**successors(), A + 4: A}))
    found = failures(scripted, damaged)
    assert found["chat-zh"] == ("the answer repeats 5 token(s) over and over",) and "continuation-en" not in found


def test_a_model_that_never_stops(scripted: Path, damaged: Path) -> None:
    edit_tensors(damaged, lm_head__weight=head({**successors(), J: 0}))
    found = failures(scripted, damaged)
    assert found == {"stop-tokens": ("the model never stops; the baseline stops early in 9 of 10 cases",)}


def test_a_baseline_that_never_stops_asks_nothing_of_the_artifact(scripted: Path, damaged: Path) -> None:
    edit_tensors(damaged, lm_head__weight=head({**successors(), J: 0}))
    assert not failures(damaged, damaged)


def test_empty_answers(scripted: Path, damaged: Path) -> None:
    weight = head(successors())
    weight[IM_END] = 2
    edit_tensors(damaged, lm_head__weight=weight)
    assert failures(scripted, damaged) == {prompt.name: ("the answer is empty",) for prompt in PROMPTS}


def test_replacement_characters(scripted: Path, damaged: Path) -> None:
    continuation_bytes = {94 + step: 95 + step for step in range(8)} | {102: IM_END}
    edit_tensors(damaged, lm_head__weight=head({**successors(), A: 94, **continuation_bytes}))
    found = failures(scripted, damaged)
    words = "the answer holds 9 replacement character(s) (U+FFFD)"
    assert found["question-zh"] == (words,)
    baseline = Path(shutil.copytree(scripted, damaged.parent / "baseline"))
    edit_tensors(baseline, lm_head__weight=head({**successors(), A + 40: 94, **continuation_bytes}))  # one case only
    case = cases(baseline, damaged)["question-zh"]
    assert not case.failures and case.notes == (f"not counted, the baseline has such answers: {words}",)


def test_half_a_character_at_the_limit_is_no_damage(scripted: Path, damaged: Path) -> None:
    edit_tensors(damaged, lm_head__weight=head({**successors(), A + 4: 94, 94: A}))
    assert cases(scripted, damaged, max_new_tokens=6)["chat-en"].text == "ABCDE"


def test_what_the_baseline_does_too_is_only_noted(scripted: Path, damaged: Path, tmp_path: Path) -> None:
    edit_tensors(damaged, lm_head__weight=head({**successors(), A + 4: A}))
    assert not failures(damaged, damaged)
    notes = cases(damaged, damaged)["chat-en"].notes
    assert notes == ("not counted, the baseline does so too: the answer repeats 5 token(s) over and over",)


def test_a_few_loops_are_only_noted(scripted: Path, damaged: Path) -> None:
    edit_tensors(damaged, lm_head__weight=head({**successors(), A + 40: A + 36}))  # only "d" gets to "i" -> "e"
    assert not failures(scripted, damaged)
    note = "not counted, only 1 of 10 answers loop and 0 of the baseline's: the answer repeats 5 token(s) over and over"
    assert cases(scripted, damaged)["continuation-en"].notes == (note,)


def test_loops_count_beside_a_baseline_that_loops_less(scripted: Path, damaged: Path) -> None:
    base = {**successors(), A + 40: A + 36}
    edit_tensors(damaged, lm_head__weight=head(base))
    worse = Path(shutil.copytree(damaged, damaged.parent / "worse"))
    edit_tensors(worse, lm_head__weight=head({**base, A + 4: A}))
    found = failures(damaged, worse)
    assert "chat-en" in found and "continuation-en" not in found


def test_exclamation_marks_in_one_case_count(scripted: Path, damaged: Path) -> None:
    edit_tensors(damaged, lm_head__weight=head({**successors(), A + 40: A + 40}))
    assert failures(scripted, damaged) == {"continuation-en": ("the last 24 tokens are only token 72",)}


def test_the_chat_template_is_checked(scripted: Path, damaged: Path) -> None:
    set_template(damaged, None)
    assert failures(scripted, damaged)["chat-en"] == (
        "the quantized folder has no chat template, the baseline has one",
    )
    set_template(damaged, CHAT_TEMPLATE)
    assert failures(scripted, damaged)["chat-en"] == ("the chat template does not write '<|im_start|>assistant'",)
    assert not failures(damaged, damaged)
    assert "not write '<|im_start|>assistant'" in cases(damaged, damaged)["chat-en"].notes[0]
    set_template(damaged, TEMPLATE.replace("m['content']", "m['content'] + '.'"))
    assert failures(scripted, damaged)["chat-en"] == ("the chat template gives another prompt than the baseline's",)
    set_template(damaged, "{{ raise_exception('no system messages') }}")
    assert "refuses the messages: no system messages" in failures(scripted, damaged)["chat-en"][0]
    set_template(damaged, TEMPLATE.replace("m['content']", "m['content'][:3]"))
    assert "the chat template drops the user message" in failures(scripted, damaged)["question-en"]


def test_lost_stop_tokens(scripted: Path, damaged: Path) -> None:
    change_config(damaged, eos_token_id=None)
    found = failures(scripted, damaged)
    assert found == {"stop-tokens": ("the quantized folder does not name the baseline's stop token(s) 258",)}


def test_stop_ids_come_from_generation_config_first(scripted: Path, damaged: Path) -> None:
    assert stop_ids(WeightSource(scripted)) == {IM_END}
    (damaged / "generation_config.json").write_text('{"eos_token_id": [256, 258]}')
    assert stop_ids(WeightSource(damaged)) == {256, 258}
    (damaged / "generation_config.json").write_text('{"eos_token_id": "end"}')
    with pytest.raises(InputError, match="eos_token_id is 'end'"):
        stop_ids(WeightSource(damaged))
    (damaged / "generation_config.json").write_text("{")
    assert all("cannot be read" in words[0] for words in failures(scripted, damaged).values())


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("shape", [None, (320, 64)])
def test_an_artifact_that_cannot_be_read_is_a_failing_case(
    scripted: Path, damaged: Path, streamed: bool, shape: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smoke, "fits_in_memory", lambda source, device: not streamed)
    weight = None if shape is None else torch.zeros(shape).bfloat16()
    edit_tensors(damaged, model__layers__1__mlp__up_proj__weight=weight)
    found = failures(scripted, damaged)
    assert len(found) == len(PROMPTS)
    assert all("model.layers.1.mlp.up_proj.weight" in words[0] for words in found.values())
    with pytest.raises(InputError, match="up_proj"):
        cases(damaged, scripted)


def test_a_tokenizer_of_another_model_is_a_failing_case(scripted: Path, damaged: Path) -> None:
    edit_tensors(damaged, model__embed_tokens__weight=torch.eye(VOCABULARY).bfloat16()[:200])
    assert all("the embedding has 200 rows" in words[0] for words in failures(scripted, damaged).values())


def test_streaming_limits_the_tokens_and_says_so(scripted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "DENSE_LIMIT_BYTES", 1000)
    seen: list[tuple[str, int, int]] = []
    source = WeightSource(scripted)
    found = smoke_cases(source, source, CPU, lambda *step: seen.append(step))
    assert not any(case.failures for case in found)
    assert all(case.notes[-1] == "limited to 12 new tokens: the model is streamed from disk" for case in found)
    assert max(case.tokens for case in found) == 12
    assert seen[0] == ("generating with scripted", 0, 24) and seen[-1] == ("generating with scripted", 24, 24)


def test_what_fits(scripted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = WeightSource(scripted)
    needed = 4 * sum(value.numel() for value in load_file(scripted / "model.safetensors").values())
    monkeypatch.setattr(generation, "memory_bytes", lambda: (10**12, 2 * needed))
    assert fits_in_memory(source, CPU)
    monkeypatch.setattr(generation, "memory_bytes", lambda: (10**12, 2 * needed - 1))
    assert not fits_in_memory(source, CPU)


def test_repetition_rules_by_hand() -> None:
    assert repeats_itself([0] * 8) and not repeats_itself([0] * 7)
    assert repeats_itself([*range(30), *[5, 9] * 12]) and not repeats_itself([*[5, 9] * 12, 1])
    assert loop_length([1, 2, 3] * 4) == 3 and loop_length([1, 2, 3] * 3) == 0
    assert loop_length([*range(100, 104), *[1, 2, 3] * 4]) == 3 and loop_length([*range(100, 105), *[1, 2, 3] * 4]) == 0
    assert loop_length(list(range(9)) * 5) == 0 and loop_length(list(range(8)) * 5) == 8
    assert loop_length(list(range(8)) * 2) == 0
