"""Verbs that use an allocation: convert a model, generate text, serve."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from consa.cli.options import (
    RULE_FIELDS,
    Chosen,
    Converted,
    Device,
    SavedDtype,
    chosen,
    number,
    text,
    was_given,
    with_fields_of,
)
from consa.config import EvalConfig
from consa.errors import ConsaError
from consa.files import read_text


@with_fields_of(EvalConfig, only=(*RULE_FIELDS, "seed"))
def convert(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model, as for `consa learn`.")],
    *,
    out: Annotated[Path, text("FOLDER", "New folder for the checkpoint.")],
    allocation: Chosen = None,
    kind: Annotated[
        str,
        text(
            "auto|plain|hybrid|gguf",
            "Kind of checkpoint. A hybrid needs consa. A plain one loads without; some model families allow it for"
            " whole layers without sink tokens. gguf copies a GGUF file for llama.cpp. auto is plain with --for, else"
            " hybrid.",
        ),
    ] = "auto",
    ctx: typer.Context,
    engine: Annotated[
        str | None,
        text(
            "ENGINE",
            "Engine that must be able to read the plain checkpoint: transformers, vllm, sglang, llama.cpp or mlx."
            " tensorrt-llm cannot, and the message says why.",
            "--for",
        ),
    ] = None,
    device: Annotated[str | None, text("DEVICE", "Device that holds the model. Default: cpu.")] = None,
    dtype: SavedDtype = None,
    push_to_hub: Annotated[
        str | None, text("OWNER/NAME", "Repository on the Hugging Face hub to upload the folder to.")
    ] = None,
    **options: Any,
) -> None:
    """Write MODEL with an allocation as a checkpoint that generates with a small KV cache."""
    config = EvalConfig(**options)
    import torch

    from consa.model import convert, gguf_spelling, spelling
    from consa.model.layout import max_positions
    from consa.model.load import load_model, read_config
    from consa.progress import note
    from consa.runs import card

    if kind == "gguf":
        if push_to_hub is not None:
            raise ConsaError("--push-to-hub uploads folders, and --kind gguf writes a file; upload it by hf upload")
        if device or dtype:
            raise ConsaError("--device and --dtype apply to checkpoints; --kind gguf copies the weights as they are")
        gguf_spelling.check_wish(model, out, engine)
    else:
        convert.check_wish(out, kind, engine)
    if push_to_hub is not None:
        card.check_repo(push_to_hub)
    allocated = chosen(ctx, allocation, model, config)
    if kind == "gguf":
        print(f"{out}: {gguf_spelling.respell(Path(model), allocated, out)}")
        return
    if kind == "plain" or engine:
        convert.check_plain(read_config(model), allocated, engine)
    loaded = load_model(model, device=device or "cpu", dtype=getattr(torch, dtype) if dtype else "auto")
    match allocated.provenance.get("config"):
        case {"mode": "joint"}:
            note("Mode joint trained weights along with this allocation; they are in the folder `model` of its run")
    written = convert.convert(
        loaded.model, allocated, out, tokenizer=loaded.tokenizer, kind=cast(Any, kind), engine=engine
    )
    print(f"{written.folder}: {written.kind} checkpoint in {str(loaded.model.dtype)[6:]} ({written.reason})")
    if written.kind == "hybrid":
        print(f"To try it: {shlex.join(['consa', 'generate', str(out), '--prompt', 'Once upon a time'])}")
    else:
        print(f"Window of each layer: {spelling.window_of_layers(allocated, max_positions(loaded.model.config))}")
    model_card = card.write(out, loaded.identity["model"], allocation=str(allocation), repo=push_to_hub or "OWNER/NAME")
    print(f"Model card: {model_card}")
    if push_to_hub is None:
        print(f"To share it: {shlex.join(['hf', 'upload', 'OWNER/NAME', str(out)])}")
    else:
        print(card.push(out, push_to_hub))


def generate(
    folder: Converted,
    *,
    prompt: Annotated[str | None, text("TEXT", "Prompt to continue.")] = None,
    file: Annotated[Path | None, text("FILE", "File with the prompt, instead of --prompt.", "--file", "-f")] = None,
    max_new_tokens: Annotated[int, number(help="Maximum number of tokens to generate.")] = 256,
    temperature: Annotated[
        float, number(kind=float, help="Sampling temperature. 0 always takes the most likely token.")
    ] = 0.0,
    top_p: Annotated[float, number(kind=float, help="Nucleus sampling: share of probability to sample from.")] = 1.0,
    seed: Annotated[int, number(help="Random seed of the sampling.")] = 0,
    model_sampling: Annotated[
        bool,
        typer.Option(
            "--model-sampling",
            help="Follow the sampling settings and penalties of the model's generation_config.json, instead of"
            " --temperature and --top-p.",
        ),
    ] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the chat template.")] = False,
    device: Device = None,
    dtype: SavedDtype = None,
    ctx: typer.Context,
) -> None:
    """Continue a prompt with a converted model, and print the text as it is generated."""
    if (prompt is None) == (file is None):
        raise ConsaError("give either --prompt or --file")
    if model_sampling and (was_given(ctx, "temperature") or was_given(ctx, "top_p")):
        raise ConsaError("--model-sampling replaces --temperature and --top-p; give one or the other")
    if file is not None:
        prompt = read_text(file, max_bytes=2**28)
    assert prompt is not None
    from consa.model.generate import Sampling, generate_text, load_with_tokenizer

    sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed, of_model=model_sampling)
    model, tokenizer = load_with_tokenizer(folder, device=device, dtype=dtype)
    generate_text(
        model,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        chat=chat,
        on_text=lambda words: print(words, end="", flush=True),
    )
    print()


def serve(
    folder: Converted,
    options: Annotated[
        list[str] | None, typer.Argument(metavar="[-- OPTION...]", help="Options of `vllm serve`, after --.")
    ] = None,
) -> None:
    """Serve a converted model with vLLM behind an OpenAI-compatible API. See docs/SERVING.md."""
    from consa.serving import server

    command = server.command(folder, options or [])
    print(shlex.join(command), flush=True)
    os.execv(command[0], command)
