"""The model card of an exported run: what it is, what it was made from, and that it is exact."""

from __future__ import annotations

from fedexlora import __version__
from fedexlora.engine.finished import FinishedRun
from fedexlora.exchange.adapter_records import ExportRecord
from fedexlora.exchange.records import RoundRecord

_PIPELINES = {
    "classification": "text-classification",
    "regression": "text-classification",
    "causal-lm": "text-generation",
    "chat": "text-generation",
}
_LOADERS = {
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
    "chat": "AutoModelForCausalLM",
}


def model_card(run: FinishedRun, record: ExportRecord, *, merged: bool) -> str:
    """The content of ``README.md`` beside an exported adapter or model.

    Args:
        run: the run.
        record: what was exported.
        merged: whether it is a full model.
    """
    what = "Model" if merged else "LoRA adapter"
    parts = [
        _front_matter(run, merged=merged),
        f"# {what} fine-tuned by {len(run.header['clients'])} clients that kept their data\n",
        _facts(run, record),
        _scores(run, record),
        _use(run, merged=merged),
    ]
    return "\n".join(parts)


def _front_matter(run: FinishedRun, *, merged: bool) -> str:
    from huggingface_hub import ModelCardData

    source = run.recipe.model.source
    on_the_hub = not source.startswith((".", "/", "~", "package:"))
    kind = run.recipe.task.kind
    data = ModelCardData(
        base_model=source if on_the_hub else None,
        library_name="transformers" if merged else "peft",
        pipeline_tag=_PIPELINES[kind],
        tags=["lora", "federated-learning", "fedexlora"],
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _facts(run: FinishedRun, record: ExportRecord) -> str:
    recipe, last = run.recipe, run.records[-1]
    clients = run.header["clients"]
    source = recipe.data.source + (f" ({recipe.data.config})" if recipe.data.config else "")
    facts = {
        "base model": f"{recipe.model.source}, trained beside {run.header['precision']} weights",
        "task": recipe.task.kind,
        "data": f"{source}, {sum(clients.values()):,} training rows at {len(clients)} clients, "
        f"{run.header['validation_rows']:,} validation rows",
        "method": f"{recipe.method.title} ({recipe.method.paper})",
        "rounds": str(len(run.records)),
        "largest rank": str(record.rank),
        "exactness": _exactness(run.records),
        "left out on export": f"{record.error:.2%} of the update" if record.error else "nothing",
        "made with": f"fedexlora {__version__}, seed {recipe.federation.seed}",
    }
    if record.rounding:
        facts["rounded away on merging"] = f"{record.rounding:.2%} of the update"
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return f"| | |\n|---|---|\n{rows}\n\nLast round: {_participation(last)}.\n"


def _exactness(records: tuple[RoundRecord, ...]) -> str:
    worst = max(m.error for record in records for m in record.modules)
    if all(record.certificate.held and not record.certificate.truncated for record in records):
        return (
            f"in every round the model applied the clients' mean update; worst module off by "
            f"{worst:.1e} of it"
        )
    off = max(record.certificate.error for record in records)
    return f"not exact: the model was off by up to {off:.1%} of the clients' mean update"


def _participation(record: RoundRecord) -> str:
    left_out = f", {len(record.left_out)} left out" if record.left_out else ""
    return f"{len(record.clients)} clients took part{left_out}"


def _scores(run: FinishedRun, record: ExportRecord) -> str:
    initial = run.header["initial_metrics"]
    head = "| validation | before | after the last round |"
    line = "|---|---|---|"
    if record.exported_metrics is not None:
        head, line = f"{head} as exported |", f"{line}---|"
    rows = []
    for name, value in record.metrics.items():
        cells = [name, f"{initial[name]:.4f}", f"{value:.4f}"]
        if record.exported_metrics is not None:
            cells.append(f"{record.exported_metrics[name]:.4f}")
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([head, line, *rows, ""])


def _use(run: FinishedRun, *, merged: bool) -> str:
    loader = _LOADERS[run.recipe.task.kind]
    labels = run.header["model_config"].get("num_labels")
    more = f", num_labels={labels}" if labels else ""
    if merged:
        code = (
            f"from transformers import {loader}\n\n"
            f'model = {loader}.from_pretrained("PATH TO THIS FOLDER")'
        )
    else:
        code = (
            f"from peft import PeftModel\nfrom transformers import {loader}\n\n"
            f'base = {loader}.from_pretrained("BASE MODEL"{more})\n'
            f'model = PeftModel.from_pretrained(base, "PATH TO THIS FOLDER")'
        )
    return f"```python\n{code}\n```\n"
