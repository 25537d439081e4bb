"""One schema, one loader: the configuration of a run, and nothing that imports torch."""

from chatlearn.config.load import dump_config, load_config
from chatlearn.config.schema import GrpoConfig

__all__ = ["GrpoConfig", "dump_config", "load_config"]
