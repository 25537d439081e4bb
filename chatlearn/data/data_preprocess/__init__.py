"""Scripts that turn public datasets into agent tasks, each run as a file or with ``-m``."""
