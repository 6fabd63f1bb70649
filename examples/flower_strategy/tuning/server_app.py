"""The server: Flower's own, but for the arrays it starts from and the strategy."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedexlora.flower import FedExLoRA, initial_arrays, save_adapter
from tuning import task

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation; write the global model as one PEFT adapter."""
    config = context.run_config

    model = task.get_model(config)
    arrays = initial_arrays(model)

    strategy = FedExLoRA(
        fraction_train=config["fraction-train"], min_available_nodes=config["min-nodes"]
    )
    result = strategy.start(
        grid=grid, initial_arrays=arrays, num_rounds=config["num-server-rounds"]
    )

    if config["save-path"]:
        save_adapter(model, result.arrays, config["save-path"])
