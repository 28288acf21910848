"""Can a learned sink, a logit and a value that no token has, replace the sink tokens of a frozen hybrid?

    python -m research.sinks --allocation smollm2-135m/layer-0.75 --train train.npy --heldout heldout.npy \
        --out research/results/sinks.json

Every SWA head gets one more term in its softmax: a logit for each query head and a value vector for each KV head. They
start at what far queries see of the first four tokens under full attention, and are trained, the weights frozen, on the
next token (`next`) or to follow the hybrid with sink tokens (`follow`). A row's name is what is measured, the window
and the seed of the training text: `follow-30/128/0` trains 30 steps, `logit-30` on the next token without values.

A row's `kept` is the share of what four sink tokens save over none (loss) or find (retrieval) that it keeps too; losses
are compared by sequence, with an interval over sequences. Retrieval is the share of answers whose every token is the
most likely one after the tokens before it. An interrupted run continues with the first missing row.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from consa.allocation import Allocation
from consa.attention.ops import full_attention, sliding_attention
from consa.data.questions import examples
from consa.evaluation.intervals import bootstrap
from consa.model import loss
from consa.model.attach import attached
from consa.model.load import LoadedModel, load_model
from consa.model.plan import Plan
from consa.published import resolve
from consa.training.objective import Batch, divergence, order
from research.records import Heldout, Rows, run_missing, study_parser, tokens_of

NUM_TOKENS = 4  # sink tokens that are replaced


class Sinks(torch.nn.Module):
    """Logits `(layers, q_heads)` and values `(layers, kv_heads, head_dim)` of the learned sinks."""

    def __init__(self, logits: Tensor, values: Tensor) -> None:
        super().__init__()
        self.logits, self.values = torch.nn.Parameter(logits), torch.nn.Parameter(values)

    @classmethod
    def initial(cls, model: Any, tokens: Tensor, allocation: Allocation) -> Sinks:
        """Mean log-sum-exp of far queries' scores to the first tokens under full attention, and what those yield."""
        plan = _Watching(allocation)
        with torch.no_grad(), _following(model, allocation, plan):
            loss.hidden_states(model, tokens)
        logits, values = zip(*plan.seen, strict=True)
        return cls(torch.stack(logits), torch.stack(values))


class _Watching(Plan):
    """Full attention that keeps what the queries of the second half see of the first tokens."""

    def _attend(self, layer: int, sequences: Tensor | None, q: Tensor, k: Tensor, v: Tensor, **scores: Any) -> Tensor:
        self.seen = [*getattr(self, "seen", []), _seen(q, k, v, scores["scaling"])]
        return full_attention(q, k, v, **scores)


def _seen(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    far = q[:, :, q.shape[2] // 2 :].float().unflatten(1, (k.shape[1], -1))
    scores = far.flatten(2, 3) @ k[:, :, :NUM_TOKENS].float().transpose(2, 3) * scaling
    values = (scores.softmax(-1) @ v[:, :, :NUM_TOKENS].float()).mean((0, 2))
    return scores.logsumexp(-1).unflatten(2, far.shape[2:4]).mean((0, 3)).flatten(), values


class _WithSinks(Plan):
    """Whole layers and single heads alike attend over their window and the learned sink.

    The sink is a key before the first one, at which all queries have the score `logits`: the head vectors get two more
    components, 1 in that key and 0 in all others, which hold the logit and what bfloat16 rounds off it.
    """

    def __init__(self, allocation: Allocation, sinks: Sinks) -> None:
        super().__init__(allocation)
        self.sinks = sinks

    def _attend(self, layer: int, sequences: Tensor | None, q: Tensor, k: Tensor, v: Tensor, **scores: Any) -> Tensor:
        full = self._fixed[layer, 0].bool().to(q.device)
        whole = [x.unflatten(1, (len(full), -1)) for x in (q, k, v)]
        out = torch.empty_like(whole[0])
        if full.any():
            out[:, full] = full_attention(*(x[:, full].flatten(1, 2) for x in whole), **scores).unflatten(
                1, (int(full.sum()), -1)
            )
        if not full.all():
            parts = self._with_sink(layer, ~full, scores["scaling"], *(x[:, ~full].flatten(1, 2) for x in whole))
            near = sliding_attention(*parts, window=self.allocation.window, num_sink_tokens=1, **scores)
            out[:, ~full] = near[..., : q.shape[3]].unflatten(1, (int((~full).sum()), -1))
        return out.flatten(1, 2)

    def _with_sink(
        self, layer: int, heads: Tensor, scaling: float, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.sinks.logits[layer].unflatten(0, (len(heads), -1))[heads].flatten() / scaling
        rounded = logits.to(q.dtype)
        ends = torch.stack([rounded, (logits - rounded.float()).to(q.dtype)], dim=1)[None, :, None]
        values = self.sinks.values[layer][heads].to(v.dtype)[None, :, None].expand(len(q), -1, -1, -1)
        sink = pad(k.new_ones(*values.shape[:3], 2), (q.shape[3], 6))  # 8 more components, for TMA's 16 bytes
        q = torch.cat([q, pad(ends, (0, 6)).expand(len(q), -1, q.shape[2], -1)], dim=3)
        return q, torch.cat([sink, pad(k, (0, 8))], dim=2), pad(torch.cat([values, v], dim=2), (0, 8))


@contextmanager
def _following(model: Any, allocation: Allocation, plan: Plan) -> Iterator[None]:
    with attached(model, allocation) as own:
        for module in model.modules():
            if getattr(module, "consa_plan", None) is own:
                module.consa_plan = plan
        yield


def trained(
    model: Any, sinks: Sinks, allocation: Allocation, tokens: np.ndarray, kind: str, options: Any
) -> list[float]:
    """Train `sinks` in place; the loss of every step."""
    objective, _, steps = kind.partition("-")
    if objective == "logit":
        sinks.values = torch.nn.Parameter(torch.zeros_like(sinks.values), requires_grad=False)
    groups = [{"params": [sinks.logits], "lr": options.rate}, {"params": [sinks.values], "lr": options.rate / 5}]
    optimizer, losses = torch.optim.AdamW(groups, weight_decay=0.0), []
    for step in range(int(steps or 0)):
        for group, rate in zip(optimizer.param_groups, (1, 0.2), strict=True):
            group["lr"] = options.rate * rate * (1 - step / int(steps))
        batch = Batch(torch.from_numpy(tokens[step % len(tokens)][None].astype(np.int64)).to(model.device))
        wanted = _divergence(model, allocation, batch) if objective == "follow" else None
        with _following(model, replace(allocation, num_sink_tokens=0), _WithSinks(allocation, sinks)):
            losses.append(round(float(loss.backward(model, batch.tokens, scale=1.0, objective=wanted)), 5))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def _divergence(model: Any, allocation: Allocation, batch: Batch) -> loss.Objective:
    """The distance of next-token probabilities from those of the hybrid with sink tokens."""
    with torch.no_grad(), attached(model, allocation):
        wanted, head = loss.hidden_states(model, batch.tokens), loss.output_layer(model)

    def of_chunk(hidden: Tensor, logits: Tensor, chunk: slice) -> Tensor:
        with torch.no_grad():
            target = head(wanted[:, chunk])
        return divergence(logits, target, batch, chunk)

    return of_chunk


def prompts(loaded: LoadedModel, options: Any) -> dict[str, list[tuple[Tensor, list[range]]]]:
    """By task and length, prompts with their answers, `(1, tokens)`, and where the answers stand."""
    tokenizer, every = loaded.tokenizer, {}
    for task, length in itertools.product(options.tasks.split(","), map(int, options.lengths.split(","))):
        every[f"{task} {length}"] = asked = []
        for example in examples(task, tokenizer, length=length, count=options.count, seed=1):
            ids, places = list(tokenizer(example.prompt)["input_ids"]), []
            for index, answer in enumerate(example.answers):
                comma = "," if index and task != "variable_tracking" else ""
                new = tokenizer(f"{comma} {answer}", add_special_tokens=False)["input_ids"]
                places.append(range(len(ids) + len(comma), len(ids) + len(new)))
                ids += new
            asked.append((torch.tensor([ids], device=loaded.model.device), places))
    return every


def found(model: Any, asked: list[tuple[Tensor, list[range]]]) -> float:
    """The share of the answers found by the model as it is."""
    head, right = loss.output_layer(model), []
    for row, places in asked:
        with torch.no_grad():
            start = places[0].start
            likely = head(loss.hidden_states(model, row)[:, start - 1 : -1]).argmax(-1)
        hits = (likely == row[:, start:])[0].tolist()
        right += [all(hits[place.start - start : place.stop - start]) for place in places]
    return round(float(np.mean(right)), 4)


def main() -> None:
    parser = study_parser(__doc__)
    parser.add_argument("--allocation", required=True)
    parser.add_argument("--windows", default="128,1024")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--kinds", default="next-0,next-30,next-100,follow-30,follow-100,logit-100")
    parser.add_argument("--train-len", type=int, default=4096)
    parser.add_argument("--rate", type=float, default=0.05, help="peak learning rate of the logits; values get a fifth")
    parser.add_argument("--tasks", default="single,multi_key,multi_value,variable_tracking")
    parser.add_argument("--lengths", default="2048,4096,8000")
    parser.add_argument("--count", type=int, default=16, help="examples of each task and length")
    options = parser.parse_args()
    began, loaded = time.perf_counter(), load_model(options.model)
    model, heldout, text = loaded.model.requires_grad_(False), Heldout.of(options), tokens_of(options.train)
    allocation = replace(Allocation.load(resolve(options.allocation)), num_sink_tokens=NUM_TOKENS)
    free = {"out", "seconds", "seeds", "kinds", "windows"}
    settings = {name: value for name, value in vars(options).items() if name not in free}
    asked = prompts(loaded, options)
    rows = Rows(options.out, settings, sparsity=allocation.sparsity, heldout_len=heldout.tokens.shape[1])
    kinds = ["tokens", "none", *options.kinds.split(",")]
    names = ["dense"] + [
        f"{kind}/{window}" + (f"/{seed}" if kind not in ("tokens", "none") else "")
        for window in options.windows.split(",")
        for kind in kinds
        for seed in range(options.seeds if kind not in ("tokens", "none") else 1)
    ]

    def measured() -> dict[str, Any]:
        return heldout.measured(model, None) | {"retrieval": {name: found(model, each) for name, each in asked.items()}}

    def add(name: str) -> None:
        kind, *rest = name.split("/")
        if kind == "dense":
            return rows.add(name, measured())
        limits = replace(allocation, window=int(rest[0]), num_sink_tokens=NUM_TOKENS * (kind != "none"))
        if kind in ("tokens", "none"):
            with attached(model, limits):
                return rows.add(name, measured())
        tokens = text[order(text, int(rest[1]), range(min(len(text), 256))), : options.train_len]
        sinks = Sinks.initial(model, torch.from_numpy(tokens[:2].astype(np.int64)).to(model.device), limits)
        start = time.perf_counter()
        losses = trained(model, sinks, limits, tokens, kind, options)
        row: dict[str, Any] = {"train_seconds": round(time.perf_counter() - start, 1), "train_losses": losses}
        with _following(model, replace(limits, num_sink_tokens=0), _WithSinks(limits, sinks)):
            row |= measured()
        row["kept"] = kept(row, rows[f"tokens/{rest[0]}"], rows[f"none/{rest[0]}"])
        rows.add(name, row)
        print(f"  kept {row['kept']}", flush=True)

    run_missing(names, rows.__contains__, add, began=began, seconds=options.seconds)


def kept(row: dict[str, Any], tokens: dict[str, Any], none: dict[str, Any]) -> dict[str, Any]:
    """Share of the loss that sink tokens save, the difference from them with its interval, and of their retrieval."""
    ours, theirs, floor = (np.array(each["losses"]) for each in (row, tokens, none))
    rise = bootstrap(ours - theirs, np.arange(len(ours)))
    answered, of = (sum(each["retrieval"].values()) for each in (row, tokens))
    return {
        "loss": round(float((floor - ours).mean() / (floor - theirs).mean()), 4),
        "rise": [round(rise.mean, 5), round(rise.low, 5), round(rise.high, 5)],
        "retrieval": round(answered / of, 4) if of else None,
    }


if __name__ == "__main__":
    main()
