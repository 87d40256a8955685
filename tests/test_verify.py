"""`verify` and `sign`: every way in which a folder can differ from its manifest, and signatures where installed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_quant import cli
from qwen_quant.checkpoint.manifest import seal, write_manifest
from qwen_quant.errors import InputError
from qwen_quant.signing import check_key, stale_names
from qwen_quant.verify import check_verified, verify_folder
from tests.loophub import serve_hub
from tests.support.pushable import make_pushable, seal_again

KEY = "openssl ecparam -name prime256v1 -genkey -noout -out {0} && openssl ec -in {0} -pubout -out {0}.pub"


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_pushable(tmp_path_factory.mktemp("verify") / "tiny-Int4")
    (folder / "report.json").unlink()
    return folder


@pytest.fixture
def artifact(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "tiny-Int4"))


def problems(folder: Path, **settings) -> set[tuple[str, str]]:
    return {(problem.name, problem.kind) for problem in verify_folder(folder, **settings).problems}


def flip(path: Path, place: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_a_sound_artifact(artifact: Path) -> None:
    result = verify_folder(artifact)
    check_verified(result)
    assert result.problems == () and result.signature == "none"
    assert (result.quantized_linears, result.method, result.source_id) == (14, "gptq", "Qwen/Qwen2-tiny")
    assert set(result.sha256) == {path.name for path in artifact.iterdir()} - {"qwen-quant.json"}
    (artifact / ".gitattributes").write_text("*.safetensors filter=lfs")
    (artifact / ".cache").mkdir()
    (artifact / ".cache" / "state").write_text("x")
    assert problems(artifact) == set()


def test_each_kind_of_change_is_named(artifact: Path, tmp_path: Path) -> None:
    flip(artifact / "model.safetensors")
    (artifact / "tokenizer.json").unlink()
    (artifact / ".env").write_text("SECRET=1")
    (artifact / "sub").mkdir()
    (artifact / "sub" / "x.bin").write_text("x")
    (artifact / "LICENSE").rename(tmp_path / "LICENSE")
    (artifact / "LICENSE").symlink_to(tmp_path / "LICENSE")
    (artifact / "linked").symlink_to(tmp_path)
    found = problems(artifact)
    assert found == {
        ("model.safetensors", "changed"),
        ("tokenizer.json", "missing"),
        (".env", "unknown"),
        ("sub/x.bin", "unknown"),
        ("LICENSE", "link"),
        ("linked", "link"),
    }
    with pytest.raises(InputError, match=r"\.env.*and 1 more"):
        check_verified(verify_folder(artifact))
    assert ("LICENSE", "link") not in problems(artifact, allow_links=True)
    assert ("linked", "link") in problems(artifact, allow_links=True)


def test_tensors_against_the_audits_own_counts(artifact: Path) -> None:
    manifest = json.loads((artifact / "qwen-quant.json").read_text())
    audit = {**manifest["audit"], "quantized": 15, "kept": {**manifest["audit"]["kept"], "gone.weight": "a rule"}}
    seal_again(artifact, audit=audit)
    details = [problem.detail for problem in verify_folder(artifact).problems]
    assert details == ["14 linears are quantized, the audit counted 15", "'gone.weight' was kept, and is missing"]


def test_a_truncated_weight_file_is_a_finding_and_not_a_crash(artifact: Path) -> None:
    path = artifact / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert {kind for _, kind in problems(artifact)} == {"changed", "tensors"}


def run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = cli.run(list(arguments))
    return (code, *capsys.readouterr())


def test_the_command(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("verify", str(artifact), capsys=capsys)
    assert code == 0 and "everything is as the manifest says" in out
    flip(artifact / "config.json", 5)
    code, out, err = run("verify", str(artifact), "--json", capsys=capsys)
    document = json.loads(out)
    assert code == 3 and document["problems"][0]["name"] == "config.json" and document["error"]["exit_code"] == 3
    assert "config.json" in err
    (artifact / "qwen-quant.json").unlink()
    code, _, err = run("verify", str(artifact), capsys=capsys)
    assert code == 3 and "is not an artifact of qwen-quant" in err
    code, _, err = run("sign", str(artifact), capsys=capsys)
    assert code == 2 and "--key is missing" in err


def test_a_repository_through_the_cache(artifact: Path, tmp_path: Path) -> None:
    files = {path.name: path for path in artifact.iterdir()}
    with serve_hub(tmp_path / "hub", mode="lfs") as hub:
        hub.add_repo("loop/good", dict(files))
        hub.add_repo("loop/odd", {**files, "extra.bin": b"x", "notes.md": b"x"})
        for repo, code, word in (("loop/good", 0, "everything"), ("loop/odd", 3, "extra.bin")):
            environment = {**hub.environment(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
            command = [sys.executable, "-m", "qwen_quant", "verify", repo]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
            assert done.returncode == code, done.stderr
            assert word in done.stdout and ("notes.md" in done.stdout) == bool(code)


def test_a_repository_whose_format_has_a_bin(tmp_path: Path) -> None:
    """OpenVINO's weights look like a pickle by their name; those that the manifest names are fetched and checked."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "openvino_model.xml").write_text("<net/>")
    (folder / "openvino_model.bin").write_bytes(b"numbers")
    write_manifest(folder, {"schema": "qwen-quant/1", "method": "export", "format": "openvino", "source": {"id": "x"}})
    with serve_hub(tmp_path / "hub", mode="lfs") as hub:
        hub.add_repo("loop/ov", {path.name: path for path in folder.iterdir()})
        hub.add_repo("loop/odd", {**{path.name: path for path in folder.iterdir()}, "other.bin": b"x"})
        for repo, code, word in (("loop/ov", 0, "everything"), ("loop/odd", 3, "other.bin")):
            environment = {**hub.environment(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
            command = [sys.executable, "-m", "qwen_quant", "verify", repo]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
            assert done.returncode == code, done.stderr
            assert word in done.stdout and "openvino_model.bin" not in done.stdout


def test_without_the_extra_the_error_names_it(artifact: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    code, _, err = run("sign", str(artifact), "--key", str(tmp_path / "key"), capsys=capsys)
    assert code == 3 and "qwen-quant[sign]" in err


def test_an_outdated_signature_is_found_without_key_and_package(artifact: Path) -> None:
    import base64

    from qwen_quant.checkpoint.reader import file_sha256

    rows = [{"name": p.name, "digest": file_sha256(p), "algorithm": "sha256"} for p in sorted(artifact.iterdir())]
    payload = base64.b64encode(json.dumps({"predicate": {"resources": rows}}).encode()).decode()
    (artifact / "model.sig").write_text(json.dumps({"dsseEnvelope": {"payload": payload}}))
    assert stale_names(artifact) == [] and verify_folder(artifact).signature == "not checked"
    flip(artifact / "LICENSE", 0)
    assert stale_names(artifact) == ["LICENSE"]
    assert ("model.sig", "signature") in problems(artifact)
    (artifact / "model.sig").write_text("{}")
    with pytest.raises(InputError, match="is not a signature"):
        stale_names(artifact)


@pytest.fixture
def key(tmp_path: Path) -> Path:
    pytest.importorskip("model_signing", reason="needs the extra 'sign'")
    subprocess.run(KEY.format(tmp_path / "key"), shell=True, check=True, capture_output=True)
    return tmp_path / "key"


def test_sign_and_verify(artifact: Path, key: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    public = key.with_suffix(".pub")
    assert run("sign", str(artifact), "--key", str(key), capsys=capsys)[0] == 0
    first = (artifact / "model.sig").read_bytes()
    assert verify_folder(artifact, key=public).signature == "valid"
    assert run("sign", str(artifact), "--key", str(key), capsys=capsys)[0] == 0
    assert (artifact / "model.sig").read_bytes() == first  # still valid, so kept
    official = [sys.executable, "-m", "model_signing", "verify", "key", str(artifact), "--public_key", str(public)]
    subprocess.run([*official, "--signature", str(artifact / "model.sig")], check=True, capture_output=True)
    flip(artifact / "LICENSE", 0)
    found = verify_folder(artifact, key=public)
    assert found.signature == "invalid" and {p.kind for p in found.problems} == {"changed", "signature"}
    assert [p.detail for p in found.problems if p.kind == "signature"] == ["does not sign LICENSE as it is now"]
    code, _, err = run("sign", str(artifact), "--key", str(key), capsys=capsys)
    assert code == 3 and "LICENSE: changed" in err and "model.sig" not in err


@pytest.mark.parametrize("text", ["garbage", "{}", ""])
def test_a_signature_that_is_outdated_or_none_is_replaced(artifact: Path, key: Path, text: str, capsys) -> None:
    run("sign", str(artifact), "--key", str(key), capsys=capsys)
    if text:
        (artifact / "model.sig").write_text(text)
    else:
        (artifact / "LICENSE").write_text("MIT License")
        seal(artifact, ["LICENSE"])
    code, _, err = run("verify", str(artifact), capsys=capsys)
    assert code == 3 and "model.sig: " in err
    assert run("sign", str(artifact), "--key", str(key), capsys=capsys)[0] == 0
    assert verify_folder(artifact, key=key.with_suffix(".pub")).signature == "valid"


def test_keys_that_cannot_sign_are_refused_beforehand(key: Path, tmp_path: Path) -> None:
    check_key(key)
    other = tmp_path / "rsa"
    subprocess.run(["openssl", "genrsa", "-out", str(other), "2048"], check=True, capture_output=True)
    for wrong in (other, key.with_suffix(".pub"), tmp_path / "none"):
        with pytest.raises(InputError, match="cannot be"):
            check_key(wrong)


def test_another_key_and_no_key(artifact: Path, key: Path, tmp_path: Path, capsys) -> None:
    run("sign", str(artifact), "--key", str(key), capsys=capsys)
    other = tmp_path / "other"
    subprocess.run(KEY.format(other), shell=True, check=True, capture_output=True)
    assert verify_folder(artifact, key=other.with_suffix(".pub")).signature == "invalid"
    code, _, err = run("verify", str(artifact), "--key", str(artifact / "LICENSE"), capsys=capsys)
    assert code == 3 and "is not a PEM file" in err
    code, _, err = run("verify", str(artifact), "--key", str(key), capsys=capsys)
    assert code == 3 and "cannot be used" in err
    (artifact / "model.sig").unlink()
    assert ("model.sig", "signature") in problems(artifact, key=other.with_suffix(".pub"))
