"""The two apps that Flower runs, and the recipe that they are about."""

from pathlib import Path

from fedexlora.flower import client_app, server_app

recipe = Path(__file__).with_name("recipe.toml")
server = server_app(recipe)
client = client_app(recipe)
