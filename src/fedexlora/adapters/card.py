"""The model card of an exported run: what it is, what it was made from, and that it is exact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedexlora import __version__
from fedexlora.adapters.card_code import usage
from fedexlora.adapters.card_source import Source, data_name
from fedexlora.adapters.finished_run import FinishedRun
from fedexlora.adapters.markdown import code_span
from fedexlora.exchange.adapter_records import ExportRecord
from fedexlora.exchange.records import CertificateRecord, RoundRecord, score_text
from fedexlora.methods import METHODS

_PIPELINES: Mapping[str, str] = {
    "classification": "text-classification",
    "regression": "text-classification",
    "causal-lm": "text-generation",
    "chat": "text-generation",
}
_METRICS: Mapping[str, tuple[str, str | None]] = {
    "accuracy": ("accuracy", "accuracy"),
    "f1": ("F1", "f1"),
    "matthews": ("Matthews correlation", "matthews_correlation"),
    "pearson": ("Pearson correlation", "pearsonr"),
    "spearman": ("Spearman correlation", "spearmanr"),
    "mse": ("mean squared error", "mse"),
    "perplexity": ("perplexity", "perplexity"),
    "loss": ("loss", None),
    "bleu": ("BLEU", "bleu"),
    "e2e_bleu": ("BLEU in lower case", "bleu"),
    "nist": ("NIST", "nist_mt"),
    "meteor": ("METEOR", "meteor"),
    "rouge_l": ("ROUGE-L", "rouge"),
    "cider": ("CIDEr", None),
    "mean": ("mean of the sets", None),
}
"""By our name: what people call a metric, and its name on the hub, if it has one."""


def model_card(
    run: FinishedRun, record: ExportRecord, *, merged: bool, hub: str | None = None
) -> str:
    """The content of ``README.md`` beside an exported adapter or model.

    Nothing of the run is Markdown, YAML or code in it, whatever names it has; folders of the
    machine are named by their last part.

    Args:
        run: the run.
        record: what was exported.
        merged: whether it is a full model.
        hub: the name under which it is on the hub; None for a folder.
    """
    what = "Model" if merged else "LoRA adapter"
    labels = _labels(run)
    code = usage(run.recipe, labels, hub or ".", merged=merged)
    parts = [
        _front_matter(run, record, merged=merged),
        f"# {what} fine-tuned by {len(run.header['clients'])} clients that kept their data\n",
        _facts(run, record, labels),
        _scores(run, record),
        "## Use\n",
        f"```python\n{code}\n```\n",
        _exactness(run, record),
    ]
    return "\n".join(parts)


def _labels(run: FinishedRun) -> tuple[str, ...]:
    """The names of a classification's classes, in the model's order."""
    if run.recipe.task.kind != "classification":
        return ()
    names = run.header["model_config"]["id2label"]
    return tuple(str(names[number]) for number in sorted(names, key=int))


def _front_matter(run: FinishedRun, record: ExportRecord, *, merged: bool) -> str:
    from huggingface_hub import ModelCardData

    source = Source.of(run.recipe.model.source)
    known = [_METRICS.get(name, (name, None))[1] for name in record.metrics]
    data = ModelCardData(
        base_model=source.name if source.kind == "hub" else None,
        library_name="transformers" if merged else "peft",
        pipeline_tag=_PIPELINES[run.recipe.task.kind],
        metrics=[name for name in known if name],
        tags=["lora", "federated-learning", "fedexlora"],
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _facts(run: FinishedRun, record: ExportRecord, labels: tuple[str, ...]) -> str:
    recipe, last, clients = run.recipe, run.records[-1], run.header["clients"]
    method = METHODS[recipe.method.name]
    base = Source.of(recipe.model.source, recipe.model.revision).describe()
    left_out = f", {len(last.left_out)} left out" if last.left_out else ""
    facts = {
        "base model": f"{base}, trained beside {run.header['precision']} weights",
        "task": recipe.task.kind,
        "labels": ", ".join(map(code_span, labels)),
        "data": f"{data_name(recipe)}; {sum(clients.values()):,} training rows at "
        f"{len(clients)} clients, {run.header['validation_rows']:,} validation rows",
        "method": f"{method.title}, {method.paper}",
        "rounds": f"{len(run.records)}; in the last one, {len(last.clients)} clients took part"
        f"{left_out}",
        "largest rank": str(record.rank),
        "left out on export": f"{record.error:.2%} of the update" if record.error else "nothing",
        "rounded away on merging": f"{record.rounding:.2%} of the update"
        if record.rounding
        else "",
        "made with": f"fedexlora {__version__}, seed {recipe.federation.seed}",
    }
    return "\n".join(f"- **{name}**: {value}" for name, value in facts.items() if value) + "\n"


def _scores(run: FinishedRun, record: ExportRecord) -> str:
    initial = run.header["initial_metrics"]
    head = "| on the validation rows | before | after the last round |"
    line = "|---|---|---|"
    if record.exported_metrics is not None:
        head, line = f"{head} as exported |", f"{line}---|"
    rows = []
    for name in record.metrics:
        called = _METRICS.get(name, (name, None))[0]
        cells = [called, score_text(initial, name), score_text(record.metrics, name)]
        if record.exported_metrics is not None:
            cells.append(score_text(record.exported_metrics, name))
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([head, line, *rows, ""])


def _exactness(run: FinishedRun, record: ExportRecord) -> str:
    """What the certificates of the rounds say, and what of them holds for this folder."""
    ideal = "The ideal of a round is the weighted mean of the clients' updates B·A, in float64."
    lines = _certificate(run.records[-1])
    if record.error:
        lines.append(f"on export {record.error:.2%} of that update were left out, as asked")
    listed = "".join(f"- {line}\n" for line in lines)
    return f"## What exact means\n\n{ideal} {_verdict(run.records)}\n\n{listed}"


def _verdict(records: Sequence[RoundRecord]) -> str:
    worst = max(module.error for record in records for module in record.modules)
    left_out = max(record.certificate.truncated for record in records)
    if not all(record.certificate.held for record in records):
        off = max(record.certificate.error for record in records)
        return f"This run was **not exact**: its model was off by up to {off:.1%} of the ideal."
    if left_out:
        return (
            f"This run was **truncated**, as asked: rounds left out up to {left_out:.2%} of the "
            f"ideal and nothing else."
        )
    return (
        f"This run was **exact**: in every round the model applied the clients' mean update, with "
        f"its worst module off by {worst:.1e} of the ideal."
    )


def _certificate(last: RoundRecord) -> list[str]:
    """The numbers of the last round, one a line, with what each one means."""
    certificate = last.certificate
    distance = "distance of the applied update from the ideal, as a share of the ideal"
    return [
        f"error {certificate.error:.1e}: {distance}; {certificate.allowed:.1e} is allowed",
        f"worst module {code_span(certificate.worst_module)}: {certificate.worst_error:.1e}",
        f"averaging the factors would have lost {last.deviation:.2%} of the last round's update",
        *_through_layers(certificate),
    ]


def _through_layers(certificate: CertificateRecord) -> list[str]:
    """What the layers make of the update, in the run's own arithmetic and in a server's."""
    narrowed = "the same distance, with every operand rounded as its layer rounds it"
    out = "how much of what the trained rank does not hold came out of the layers"
    served = "rounds W·x before it adds B·A·x of an adapter, and loses what is below that rounding"
    lines = [f"forward {certificate.forward:.1e}: {narrowed} in training or scoring"]
    if certificate.kept is not None:
        lines.append(f"kept {certificate.kept:.1%}: {out}, over validation rows")
    lines.append(f"a server that computes in bfloat16 {served}; one in float32 loses nothing")
    return lines
