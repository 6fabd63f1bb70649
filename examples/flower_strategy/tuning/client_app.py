"""The client: Flower's own, but for the lines that load the model and send it."""

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedexlora.flower import load_arrays, update_arrays
from tuning import task

app = ClientApp()


@app.train()
def train(msg: Message, context: Context) -> Message:
    """Train the global model on this client's rows."""
    config, node = context.run_config, context.node_config
    rows = task.load_data(config, node["partition-id"], node["num-partitions"], test=False)

    model = task.get_model(config)
    load_arrays(model, msg.content["arrays"])

    loss = task.train(model, rows, config)

    count = len(rows.dataset)
    arrays = update_arrays(model, msg, num_examples=count, loss=loss)
    metrics = MetricRecord({"train_loss": loss, "num-examples": count})
    return Message(content=RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    """Score the global model on the test rows."""
    config, node = context.run_config, context.node_config
    rows = task.load_data(config, node["partition-id"], node["num-partitions"], test=True)

    model = task.get_model(config)
    load_arrays(model, msg.content["arrays"])

    loss, accuracy = task.test(model, rows)
    metrics = {"eval_loss": loss, "eval_acc": accuracy, "num-examples": len(rows.dataset)}
    return Message(content=RecordDict({"metrics": MetricRecord(metrics)}), reply_to=msg)
