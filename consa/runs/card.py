"""The model card of a converted folder, README.md, and sending the folder to the Hugging Face hub."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from consa import picture, published
from consa.allocation import Allocation
from consa.errors import ConsaError, first_line
from consa.evaluation.table import Table
from consa.files import read_json, read_text, write_atomically
from consa.model.convert import MANIFEST
from consa.model.register import ARCHITECTURE_PREFIX
from consa.model.spelling import readers
from consa.progress import note
from consa.rules import dense
from consa.runs.summary import markdown_table
from consa.serving import limits

CARD = "README.md"
MAX_BYTES = 2**24
LICENCE = ("license", "license_name", "license_link")  # keys of a card's header
CONTEXT = 32768  # tokens in the KV cache whose size the card shows
HUB_NAME = r"[A-Za-z0-9][\w.-]*/[\w.-]+"


def write(folder: Path, model: str, *, allocation: str | None = None, repo: str = "OWNER/NAME") -> Path:
    """Write the card of a converted folder, which other programs and people may edit afterwards.

    Args:
        folder: that `consa.convert` wrote; its manifest does not list the card.
        model: name or folder of the base model. A folder's name is shown without its path.
        allocation: where the allocation came from. The folder of a run adds the losses it measured.
        repo: name under which the folder is going to be shared.
    """
    kept, manifest = Allocation.load(folder), read_json(folder / MANIFEST, max_bytes=MAX_BYTES)
    base = model if re.fullmatch(HUB_NAME, model) and not os.path.exists(model) else None
    licence = _licence(model, base)
    header = {"base_model": [base]} if base else {}
    header |= {"library_name": "transformers", "pipeline_tag": "text-generation", **licence}
    header["tags"] = ["consa", "hybrid-attention", "sliding-window-attention"]
    lines = [f"{name}: {json.dumps(value)}" for name, value in header.items()]  # JSON is YAML
    name = base or Path(model).name
    text = f"""---
{chr(10).join(lines)}
---

# {name} with full and sliding-window attention

{_summary(kept, name)} {_dtype(folder)}
{"" if licence else LICENCE_UNKNOWN}
```text
{picture.characters(kept)}
```

## Load

{_loading(manifest["kind"], repo)}

## Engines

{_engines(folder, manifest["kind"], kept)}

## Numbers

{_numbers(allocation)}

## Origin

{_origin(kept)}
"""
    write_atomically(folder / CARD, text.encode(errors="backslashreplace"))
    return folder / CARD


LICENCE_UNKNOWN = """\
The licence is that of the base model. Add it as `license` to the header above before you share this folder.
"""


def _licence(model: str, base: str | None) -> dict[str, Any]:
    """The licence in the base model's own card, if that is on this machine."""
    import yaml
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(base, CARD) if base else os.path.join(model, CARD)
    if not isinstance(file, (str, os.PathLike)) or not os.path.isfile(file):
        return {}
    match = re.match(r"---\n(.*?)\n---", read_text(Path(file), max_bytes=MAX_BYTES), re.DOTALL)
    try:
        header = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError:
        return {}
    return {key: header[key] for key in LICENCE if isinstance(header, dict) and key in header}


def _summary(kept: Allocation, name: str) -> str:
    whole = dense(kept.num_layers, kept.num_kv_heads, native_windows=dict(kept.native_windows))
    taken, full = (one.kv_cache_bytes(CONTEXT, head_dim=1) for one in (kept, whole))
    unit = "layers" if kept.granularity == "layer" else "KV heads"
    return (
        f"{kept.sparsity:.1%} of the {unit} of {name} use a sliding window of {kept.window} tokens and"
        f" {kept.num_sink_tokens} sink tokens; the others keep full attention. With {CONTEXT} tokens, the KV cache"
        f" takes {taken / full:.1%} of what the base model's takes."
    )


def _dtype(folder: Path) -> str:
    config = read_json(folder / "config.json", max_bytes=MAX_BYTES)
    dtype = config.get("dtype", config.get("torch_dtype"))  # the name before transformers 5
    return f"The weights are {dtype}.\n"


def _loading(kind: str, repo: str) -> str:
    if kind == "plain":
        code = f'model = AutoModelForCausalLM.from_pretrained("{repo}")'
        return f"```python\nfrom transformers import AutoModelForCausalLM\n\n{code}\n```"
    return (
        "Loading needs the Python package consa. `generate` uses the small KV cache by itself.\n\n```python\n"
        "import consa\nfrom huggingface_hub import snapshot_download\n\n"
        f'model = consa.load(snapshot_download("{repo}"))\n```'
    )


def _engines(folder: Path, kind: str, kept: Allocation) -> str:
    config = read_json(folder / "config.json", max_bytes=MAX_BYTES)
    if kind == "plain":
        engines = "\n".join(f"- {reader}" for reader in readers(config))
        return f"These engines read this folder, a `{config['model_type']}`, without consa.\n\n{engines}"
    obstacle = limits.hybrid_obstacle(config["architectures"][0].removeprefix(ARCHITECTURE_PREFIX), kept)
    vllm = f"vLLM {' and '.join(limits.VERSIONS)} with consa's plugin: `consa serve FOLDER`."
    vllm = f"vLLM cannot serve it: {obstacle}." if obstacle else vllm
    return f"- Transformers with consa.\n- {vllm}\n- Others refuse it, since its model type is consa's own."


def _numbers(allocation: str | None) -> str:
    path = published.resolve(allocation).parent / "summary.json" if allocation else None
    if path is None or not os.path.isfile(path):
        return "None come with this folder. `consa eval MODEL --allocation FOLDER/allocation.json` measures some."
    summary = read_json(path, max_bytes=MAX_BYTES)
    section = next(Table.from_record(summary["table"]).sections())
    table = markdown_table(section.columns, section.rows)
    return f"{section.title}:\n\n{table}\n\nMeasured on {summary['hardware']} by\n\n    {summary['command']}"


def _origin(kept: Allocation) -> str:
    made = kept.provenance
    method = f"Method of the allocation: {made.get('method', 'unknown')}."
    command = f" It was chosen by\n\n    {made['command']}" if "command" in made else ""
    return f"{method}{command}\n\n`allocation.json` holds the allocation with all settings and versions."


def check_repo(repo: str) -> None:
    """Raise ConsaError unless `repo` is a name on the hub and this machine is logged in there."""
    from huggingface_hub import get_token

    if not re.fullmatch(HUB_NAME, repo):
        raise ConsaError(f"push_to_hub must be a name like owner/model, got {repo!r}")
    if get_token() is None:
        raise ConsaError(f"not logged in to the Hugging Face hub, so {repo} cannot be written; run: hf auth login")


def push(folder: Path, repo: str) -> str:
    """Send a folder to the hub, into a new repository or an existing one of one's own; returns its address."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    note(f"Uploading {folder} to {repo}")
    try:
        HfApi().create_repo(repo, exist_ok=True)
        HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload a hybrid made with consa")
    except (HfHubHTTPError, OSError) as error:
        again = f"the folder is complete; try again with: hf upload {repo} {folder}"
        raise ConsaError(f"cannot upload to {repo}: {first_line(error)}; {again}") from error
    return f"https://huggingface.co/{repo}"
