"""Stands in for ``sgl_kernel``, which has no CPU build on PyPI: names import, calls say so."""

__version__ = "0.0.0+absent"


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*args, **kwargs):
        raise NotImplementedError(f"sgl_kernel.{name} does not exist in this CPU environment")

    return absent
