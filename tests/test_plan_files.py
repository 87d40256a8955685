"""Which files of a listing are fetched, and which names, ids and kinds are refused. No network."""

from __future__ import annotations

import pytest

from qwen_quant.errors import InputError
from qwen_quant.hub.plan_files import Listing, RemoteFile, select

BLOB = "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def listing(*paths: str, commit: str = COMMIT) -> Listing:
    return Listing("hf", "org/name", None, commit, tuple(RemoteFile(path, 3, None, BLOB) for path in paths))


def chosen(*paths: str, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> set[str]:
    return {file.path for file in select(listing(*paths), include, exclude).files}


def test_only_weights_configs_tokenizer_and_licences_are_needed() -> None:
    wanted = (
        "model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json", "merges.txt", "LICENSE",
        "LICENSE.md", "Notice.txt", "qwen.tiktoken", "chat_template.jinja", "tokenizer.model", "README.md", "model.sig",
    )  # fmt: skip
    refused = (
        "modeling_qwen.py", "pytorch_model.bin", "pytorch_model.bin.index.json", "x.pt", "model.gguf", "weights.pkl",
        "run.sh", ".gitattributes", "original/model.safetensors", "assets/config.json", "CHANGES.md",
    )  # fmt: skip
    assert chosen(*wanted, *refused) == set(wanted)
    left = select(listing(*wanted, *refused)).left_out
    assert set(left) == set(refused)
    assert left["modeling_qwen.py"] == "code is never fetched" and left["x.pt"] == "pickles are never fetched"


def test_include_replaces_and_exclude_takes_from_the_list() -> None:
    paths = ("model.safetensors", "config.json", "sub/a.json", "model.gguf")
    assert chosen(*paths, include=("*.json",)) == {"config.json", "sub/a.json"}
    assert chosen(*paths, include=("*.gguf",)) == {"model.gguf"}
    assert chosen(*paths, exclude=("config*",)) == {"model.safetensors"}
    assert chosen(*paths, exclude=("*.safetensors",)) == {"config.json"}
    assert chosen(*paths, include=("*",), exclude=("sub/*", "*.gguf")) == {"model.safetensors", "config.json"}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "MODEL.PT", "x.pickle", "modeling.py", ".qwen-quant/lock"])
def test_no_pattern_brings_what_is_never_fetched(name: str) -> None:
    with pytest.raises(InputError, match=r"leaves none \(code and pickles are never fetched\)"):
        chosen(name, "model.safetensors", include=(name, name.lower()))


@pytest.mark.parametrize("exclude", [(), ("config.json",)])
def test_pickles_only_says_so(exclude: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="pickles only") as caught:
        chosen("pytorch_model.bin", "config.json", exclude=exclude)
    assert "refs/pr/N" in caught.value.next_step
    assert chosen("pytorch_model.bin", "config.json", include=("config.json",)) == {"config.json"}


def test_no_weights_at_all_says_so() -> None:
    with pytest.raises(InputError, match="no safetensors weights"):
        chosen("config.json", "model.gguf")
    with pytest.raises(InputError, match=r"leaves none") as caught:
        chosen("config.json", include=("*.gguf",))
    assert "config.json" in caught.value.next_step


@pytest.mark.parametrize(
    "path",
    [
        "../x.json",
        "a/../../x.json",
        "/etc/x.json",
        "a//b.json",
        "./x.json",
        "a\\..\\x.json",
        "x\n.json",
        "",
        "a/",
        "..",
    ],
)
def test_a_name_that_leads_out_refuses_the_repository(path: str) -> None:
    with pytest.raises(InputError, match="leads out of the folder"):
        chosen("model.safetensors", path)


@pytest.mark.parametrize(
    "pair",
    [("Config.json", "config.json"), ("README.md", "readme.md"), ("caf\u00e9.json", "cafe\u0301.json")],
)
def test_names_that_differ_only_in_case_are_refused(pair: tuple[str, str]) -> None:
    with pytest.raises(InputError, match="has both") as caught:
        chosen("model.safetensors", *pair)
    assert "--exclude" in caught.value.next_step
    assert chosen("model.safetensors", *pair, exclude=(pair[0],)) == {"model.safetensors", pair[1]}


def test_folders_that_differ_only_in_case_are_refused() -> None:
    with pytest.raises(InputError, match="has both"):
        chosen("Sub/a.json", "sub/b.json", include=("*",))
    with pytest.raises(InputError, match="has both"):
        chosen("sub", "SUB/b.json", include=("*",))
    assert len(chosen("sub/a.json", "sub/b.json", include=("*",))) == 2


@pytest.mark.parametrize(
    "file",
    [
        RemoteFile("config.json", 3, "../../etc/passwd", None),
        RemoteFile("config.json", 3, None, "../x"),
        RemoteFile("config.json", -1, None, BLOB),
        RemoteFile("config.json", 3, None, BLOB, "x"),
    ],
)
def test_ids_become_file_names_and_must_be_hex(file: RemoteFile) -> None:
    with pytest.raises(InputError, match="damaged"):
        select(Listing("hf", "org/name", None, COMMIT, (file,)), ("*",))
    with pytest.raises(InputError, match="commit"):
        select(listing("model.safetensors", commit="../up"))


def test_a_file_without_a_hash_is_refused() -> None:
    with pytest.raises(InputError, match="cannot be verified"):
        select(Listing("hf", "org/name", None, COMMIT, (RemoteFile("model.safetensors", 3),)))
