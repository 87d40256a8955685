"""The steps of .github/workflows/release.yml on this machine, with a Hub on loopback in place of the real one.

    make release-demo          (or: .venv/bin/python scripts/release_demo.py [--work DIR])

The commands are read out of the workflow itself, so that what CI does is what runs here: only the steps that are
GitHub's own (`uses:`) and the installation are left out. The source is the checkpoint that ships with the package, put
onto the loopback Hub under a name; the recipe is recipes/demo.toml with that name in it. At the end the release is run
once more, to show that nothing is done twice, and the remote files are compared with the artifact.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from qwen_quant.data import bundled_path  # noqa: E402
from tests.loophub import Hub, serve_hub  # noqa: E402

WORKFLOW = ROOT / ".github" / "workflows" / "release.yml"
RECIPE = ROOT / "recipes" / "demo.toml"
SOURCE, TARGET = "demo-org/Tiny-Qwen3", "demo-org/Tiny-Qwen3-GPTQ-Int4"
SOURCE_CARD = "---\nlicense: apache-2.0\nlanguage: [en]\npipeline_tag: text-generation\n---\n# Tiny-Qwen3\n"
INPUTS = {"repo": TARGET, "push": "true", "upload_model": "false", "runner": "here"}
NOT_HERE = ("Install", "Install what the formats of the recipe need")
PROGRAMS = {"qwen-quant": f"{sys.executable} -m qwen_quant", "python": sys.executable}  # of .venv/bin
CONDITIONS = {  # as they stand in the workflow, for this run: the secret is there, push is ticked, all steps succeed
    "always()": True,
    "inputs.push": True,
    "success() && inputs.push && env.HAS_TOKEN == 'true'": True,
}


def fill(text: str, values: dict[str, str]) -> str:
    """`text` with each ${{ name }} replaced by its value (KeyError for a name that is not known here)."""
    return re.sub(r"\$\{\{\s*(.+?)\s*\}\}", lambda found: values[found[1]], text)


def run_steps(place: Path, hub: Hub) -> None:
    """Every `run` step of the workflow's one job that applies, in order; stops at the first that fails."""
    job: dict[str, Any] = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"]["release"]
    recipe = place / "demo.toml"
    text = RECIPE.read_text(encoding="utf-8")
    recipe.write_text(text.replace('"bundled:demo_checkpoint"', f'"{SOURCE}"'), encoding="utf-8")
    values = {f"inputs.{name}": value for name, value in INPUTS.items()}
    values |= {"inputs.recipe": str(recipe), "github.workspace": str(place)}
    values |= {"secrets.HF_TOKEN": hub.token, "secrets.HF_READ_TOKEN": "", "secrets.HF_TOKEN != ''": "true"}
    environment = hub.environment(place / "home", token=None)
    environment |= {name: fill(value, values) for name, value in job["env"].items() if name != "HF_HOME"}
    environment |= {
        "GITHUB_STEP_SUMMARY": str(place / "summary.md"),
        "PATH": f"{Path(sys.executable).parent}:{environment['PATH']}",
    }
    for step in job["steps"]:
        if "run" not in step or step["name"] in NOT_HERE or not applies(step.get("if")):
            continue
        print(f"\n== {step['name']}", flush=True)
        own = {name: fill(value, values) for name, value in step.get("env", {}).items()}
        started = time.perf_counter()
        command = re.sub(r"\.venv/bin/([\w-]+)", lambda found: PROGRAMS[found[1]], fill(step["run"], values))
        subprocess.run(["bash", "-e", "-c", command], cwd=ROOT, env=environment | own, check=True)
        print(f"   ({time.perf_counter() - started:.1f} s)", flush=True)


def applies(text: str | None) -> bool:
    """Whether a step's `if` holds here (KeyError for one that CONDITIONS does not know)."""
    if text is None:
        return True
    found = re.fullmatch(r"\$\{\{\s*(.+?)\s*\}\}", text)
    return CONDITIONS[found[1]] if found else CONDITIONS[text]


def check(place: Path, hub: Hub) -> None:
    """The Hub holds every file of the artifact and of its exports, byte for byte, in one commit after the first."""
    document = json.loads((place / "release-work" / "release.json").read_text(encoding="utf-8"))
    assert document["complete"], document["error"]
    folders = {TARGET: Path(document["artifact"])}
    for name, repo in document["formats"].items():
        folders[repo] = next((place / "release-work").glob(f"exports-*/*-{name}"))
    for repo, folder in folders.items():
        commits = hub.commits(repo)
        for path in sorted(folder.iterdir()):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            assert digest == hashlib.sha256(hub.file_bytes(repo, "main", path.name)).hexdigest(), path.name
        names = {path.name for path in folder.iterdir()}
        assert set(commits[0].files) - {".gitattributes"} == names, set(commits[0].files) ^ names
        print(f"\n{repo} on the loopback Hub: {len(names)} files equal to {folder.name}, {len(commits)} commit(s)")


def main() -> None:
    """Run the demo in --work (a new folder; what is there is replaced)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "release-demo")
    place = parser.parse_args().work.absolute()
    started = time.perf_counter()
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    with serve_hub(place / "hub", mode="lfs") as hub:
        folder = bundled_path("demo_checkpoint")
        files: dict[str, bytes | Path] = {path.name: path for path in folder.iterdir() if path.is_file()}
        hub.add_repo(SOURCE, {**files, "README.md": SOURCE_CARD.encode(), "LICENSE": ROOT / "LICENSE"})
        run_steps(place, hub)
        check(place, hub)
        before = len(hub.commits(TARGET))
        run_again(place, hub)
        assert len(hub.commits(TARGET)) == before, "the second run made another commit"
    print((place / "summary.md").read_text(encoding="utf-8"))
    print(f"release-demo: {time.perf_counter() - started:.0f} s; everything is in {place}")


def run_again(place: Path, hub: Hub) -> None:
    """The same release once more: every stage is unchanged, and no request writes."""
    print("\n== Once more", flush=True)
    seen = len(hub.requests)
    command = [sys.executable, "-m", "qwen_quant", "release", str(place / "demo.toml"), "--repo", TARGET]
    command += ["--work", str(place / "release-work"), "--json", "--quiet"]
    environment = hub.environment(place / "home", token=hub.token)
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    statuses = {row["name"]: row["status"] for row in json.loads(done.stdout)["stages"]}
    assert set(statuses.values()) <= {"unchanged", "left out"}, statuses
    writes = [request for request in hub.requests[seen:] if request[0] not in ("GET", "HEAD")]
    assert not writes, writes
    print("every stage unchanged, nothing written to the Hub")


if __name__ == "__main__":
    main()
