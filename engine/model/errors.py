"""What is wrong with a model's configuration."""


class ConfigError(ValueError):
    """A `config.json` that cannot be read, lacks a field, or asks for something the engine does not compute."""
