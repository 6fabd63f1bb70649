"""FedEx-LoRA in the place of Flower's ``FedAvg``: exact aggregation within Flower's own loop."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.exception import AggregationError
from flwr.serverapp.strategy import FedAvg
from torch import bfloat16, finfo, float16

from fedexlora.algebra.deviation import ratio
from fedexlora.errors import UpdateError
from fedexlora.exchange.spec import AdapterSpec
from fedexlora.exchange.state import GlobalState
from fedexlora.exchange.update import ClientUpdate, check_update, decode_update, largest_update
from fedexlora.flower.arrays import UPDATE, Shared, pack_shared, read_bytes, unpack_shared
from fedexlora.flower.replies import (
    NodeReply,
    leave_out,
    logger,
    usable_replies,
    with_like_metrics,
)
from fedexlora.methods.fedex import FEDEX
from fedexlora.peft_bridge.export_check import TOLERANCE
from fedexlora.rounds.common_update import CommonForm, HeldUpdate
from fedexlora.rounds.reduction import Reducer, Reduction, WeightedUpdate, drift, step_in_memory
from fedexlora.rounds.screening import MOST_STRAIN, strain_reason
from fedexlora.rounds.step_certificate import deviation_of
from fedexlora.rounds.survey import strains_of
from fedexlora.texts import few

_SHOWN = 50
"""Modules and nodes that an error names; the others are counted."""


@dataclass(frozen=True, slots=True)
class _Open:
    """A round that waits for replies."""

    sent: Shared
    asked: tuple[int, ...]


class FedExLoRA(FedAvg):
    """Federated LoRA whose aggregate is exactly the mean of the clients' models.

    The next adapter is the mean of the clients' factors, and what the product of the means lacks
    of the mean of the products travels with it, in factors, to be put into or beside the frozen
    weight (FedEx-LoRA, arXiv:2410.09432, eq. 9-16, weighted by ``weighted_by_key``). The server
    needs no base model. In a server app::

        strategy = FedExLoRA(fraction_train=0.5, min_available_nodes=4)
        result = strategy.start(grid, initial_arrays=initial_arrays(model), num_rounds=3)
        save_adapter(model, result.arrays, "adapter")

    and in the client app, around training of its own::

        load_arrays(model, msg.content["arrays"])
        arrays = update_arrays(model, msg, num_examples=len(rows), loss=loss)

    The arguments are those of ``FedAvg``. A node that fails, that does not answer, whose adapter
    has other modules, shapes, dtypes, ranks or scalings, whose base model is another, or whose
    update is damaged, not finite or of another round is left out of the round and named in the
    log with every fault; the round goes on with the others, and if none is left the global model
    stays as it is. Where Flower's default key ``num-examples`` is used, the number must be the one
    that the update was made with.

    What it cannot do, because Flower's loop does not:

    - Resume. ``start`` begins at round 1. Arrays that an ``evaluate_fn`` stored can be handed over
      as ``initial_arrays``, and the model goes on from there, but rounds are counted anew.
    - Stream. Replies are held in memory until the last one has come, or the timeout is over.
    - Send only what a client lacks. Every message holds the whole remainder of all rounds so far.
    - Be made private by Flower's differential privacy or SecAgg+. They clip, mask or add noise to
      arrays of numbers, which factors behind a checksum are not: the clients' modifiers and the
      strategies around this one refuse such arrays, or what they made of them is found damaged.
    - Have clients with ranks of their own, or use another method than FedEx-LoRA.

    All but the private ones are what ``fedexlora run`` is for.
    """

    _open: _Open | None = None

    def summary(self) -> None:
        """Log the strategy's configuration."""
        logger.info("\t├──> FedEx-LoRA:")
        logger.info("\t│\t├── Next adapter: weighted mean of the factors")
        logger.info("\t│\t└── Remainder: kept exactly; a round is off by at most %g", TOLERANCE)
        super().summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages to a sample of nodes, as of ``FedAvg``.

        Args:
            server_round: from 1.
            arrays: the global model, from :func:`~fedexlora.flower.initial_arrays` at first.
            config: for the clients; the round is added.
            grid: how nodes are reached.

        Raises:
            RunError: if the arrays hold no version of a global model.
        """
        sent = unpack_shared(arrays)
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self._open = _Open(sent, tuple(m.metadata.dst_node_id for m in messages))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The next version of the global model, and the clients' metrics as of ``FedAvg``.

        Args:
            server_round: from 1.
            replies: of the nodes, in any order.

        Returns:
            ``(None, None)`` if no node delivered a usable update.

        Raises:
            AggregationError: if no round was configured, or the next version is not the ideal one.
        """
        step = "aggregate_train"
        if self._open is None:
            raise AggregationError("configure_train was not called before aggregate_train")
        opened, self._open = self._open, None
        sent = opened.sent
        form, counted = CommonForm(sent.state, sent.spec, {}), []
        updates: list[WeightedUpdate] = []
        for reply in usable_replies(replies, self.weighted_by_key, opened.asked, step):
            try:
                update = self._update(reply, server_round, sent)
            except UpdateError as error:
                leave_out(step, reply.node, error.faults)
            else:
                updates.append(WeightedUpdate(HeldUpdate.of(update, form), reply.weight))
                counted.append(reply)
        logger.info("%s: %d of %d nodes count", step, len(counted), len(opened.asked))
        if not counted:
            return None, None
        reduction = Reducer(form, FEDEX.default, _no_fresh).reduce(
            updates, step_in_memory(sent.state, FEDEX.default)
        )
        state = sent.state.advance([reduction.step])
        _certify(reduction, state, form, updates)
        metrics = self.train_metrics_aggr_fn(with_like_metrics(counted, step), self.weighted_by_key)
        return pack_shared(replace(sent, state=state)), metrics

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """The clients' metrics, as of ``FedAvg``, over the nodes whose reply is usable."""
        del server_round
        step = "aggregate_evaluate"
        usable = usable_replies(replies, self.weighted_by_key, (), step)
        logger.info("%s: %d nodes count", step, len(usable))
        if not usable:
            return None
        return self.evaluate_metrics_aggr_fn(with_like_metrics(usable, step), self.weighted_by_key)

    def _update(self, reply: NodeReply, server_round: int, sent: Shared) -> ClientUpdate:
        """A reply's checked update.

        Raises:
            UpdateError: naming every fault.
        """
        client, records = str(reply.node), list(reply.content.array_records.values())
        try:
            if len(records) != 1:
                raise ValueError(f"expected one ArrayRecord, found {len(records)}")
            message = read_bytes(records[0], UPDATE, largest_update(sent.spec))
        except ValueError as error:
            raise UpdateError(server_round, client, [str(error)]) from error
        update = decode_update(message, sent.spec, server_round, client)
        check_update(
            update,
            sent.spec,
            client=client,
            round_=server_round,
            version=sent.state.id,
            base=sent.base,
        )
        if self.weighted_by_key == "num-examples" and reply.weight != update.num_examples:
            said = f"expected the update's {update.num_examples}, found {reply.weight:g}"
            raise UpdateError(server_round, client, [f"metric 'num-examples': {said}"])
        return update


def _certify(
    reduction: Reduction, state: GlobalState, form: CommonForm, updates: Sequence[WeightedUpdate]
) -> None:
    """Hold the next version against the naive float64 sum of what was received, and log it.

    Raises:
        AggregationError: naming every module, head and bias that is off by more than is allowed of
            its own update, and nodes that may be the cause.
    """
    errors = _module_errors(reduction, state, form) | _head_errors(reduction, state)
    worst = max(errors, key=lambda name: errors[name][0] / errors[name][1])
    logger.info(
        "aggregate_train: version %d is off the ideal by at most %.1e of a module's update, in %s; "
        "averaging the factors would lose %.1f %%",
        state.version,
        errors[worst][0],
        worst,
        100 * deviation_of(reduction, form.spec),
    )
    faults = [
        f"{name}: off by {error:.1e} of its update, allowed is {allowed:.1e}"
        for name, (error, allowed) in errors.items()
        if not error <= allowed  # NaN is neither
    ]
    if faults:
        sent, weights = [x.update for x in updates], [x.weight for x in updates]
        strains = strains_of(sent, weights, 0.0, form.before, form.spec)
        faults += [
            f"node {update.client}: {strain_reason(strain)}"
            for update, strain in zip(sent, strains, strict=True)
            if strain > MOST_STRAIN
        ]
        raise AggregationError(
            f"version {state.version} is not the ideal one: " + "; ".join(few(faults, _SHOWN))
        )


def _module_errors(
    reduction: Reduction, state: GlobalState, form: CommonForm
) -> dict[str, tuple[float, float]]:
    """By module, what the error is at most, relative to its ideal, and what is allowed."""
    errors = {}
    for name, figures in reduction.modules.items():
        moved = drift(form.before, reduction.step, state, name)
        errors[name] = ratio(figures.error.bound + moved.bound, figures.ideal), TOLERANCE
    return errors


def _head_errors(reduction: Reduction, state: GlobalState) -> dict[str, tuple[float, float]]:
    """The same of heads and biases, whose mean is rounded to their dtype."""
    errors = {}
    for name, (rounded, ideal) in reduction.heads.items():
        held = state.dense[name]
        moved = float((held.double() - reduction.step.dense[name].double()).norm())
        rounding = finfo(held.dtype).eps / 2 if held.dtype in (bfloat16, float16) else 0.0
        errors[name] = ratio(rounded + moved, ideal), TOLERANCE + rounding
    return errors


def _no_fresh(spec: AdapterSpec) -> NoReturn:
    raise AssertionError(f"FedEx-LoRA draws no new factors, of {len(spec.modules)} modules")
